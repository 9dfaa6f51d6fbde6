"""Batches from a mixture, read ahead by a background thread.

Records are read with concurrent positional reads straight into a ring of reused buffers, and the random numbers of
the samples are drawn meanwhile, so the training loop waits for neither. There are no worker processes: reading
releases the interpreter lock, and nothing is pickled or copied between processes.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from mmaudio_hf.data.dataset import Mixture
from mmaudio_hf.data.noise import Draws, draws, draws_for_ids
from mmaudio_hf.data.sampler import positions, validation_positions
from mmaudio_hf.data.store import bytes_of
from mmaudio_hf.schema import CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES

_VIDEO = (CLIP_FEATURES, SYNC_FEATURES)


@dataclass(frozen=True)
class Batch:
    """B samples; the Bv among them that have video are listed in `video_rows`. Rows without text hold zeros there."""

    step: int
    mean: torch.Tensor  # (B, N, C), of the latent before normalisation
    std: torch.Tensor  # (B, N, C)
    text_features: torch.Tensor  # (B, 77, 1024)
    clip_features: torch.Tensor  # (Bv, T, 1024)
    sync_features: torch.Tensor  # (Bv, S, 768)
    video_rows: torch.Tensor  # (Bv,) int64, ascending: row i of the two above belongs to sample video_rows[i]
    has_video: torch.Tensor  # (B,) bool
    has_text: torch.Tensor  # (B,) bool
    source: torch.Tensor  # (B,) int64, index of the store in the mixture
    counted: torch.Tensor  # (B,) bool, False for the padding of a last validation batch
    ids: list[str]
    draws: Draws

    def to(self, device, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`."""
        return replace(self, **{name: v.to(device, non_blocking=non_blocking) for name, v in self._tensors().items()})

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; tensors that are there already stay."""
        return replace(self, **{name: value.pin_memory() for name, value in self._tensors().items()})

    def _tensors(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("step", "ids")}


@dataclass(frozen=True)
class Plan:
    """What one batch is made of: epoch positions (B,) of the mixture, which of them count, and their random numbers."""

    step: int
    positions: np.ndarray
    counted: np.ndarray
    draw: Callable[[list[str]], Draws]  # given the ids of the batch


def training_batches(
    mixture: Mixture,
    *,
    seed: int,
    global_batch: int,
    slots: Sequence[np.ndarray],
    start_step: int,
    num_steps: int,
    prefetch: int = 2,
    threads: int = 4,
    device: torch.device | str | None = None,
) -> "BatchLoader":
    """Loader of this process's share of steps `start_step` to `start_step + num_steps - 1`.

    slots: global slots of each accumulation micro batch, from `sampler.process_slots`. Iterating yields one list of
    batches per step, one batch per micro batch. `device` None leaves them on the CPU.
    """

    def plan(step: int, share: np.ndarray) -> Plan:
        draw = lambda ids: draws(seed, "train", step, share, mixture.latent_shape)  # noqa: E731
        found = positions(seed, step, share, global_batch, len(mixture))
        return Plan(step, found, np.ones(len(share), dtype=bool), draw)

    steps = ([plan(step, share) for share in slots] for step in range(start_step, start_step + num_steps))
    return BatchLoader(
        mixture, steps, max(map(len, slots)), len(slots), prefetch=prefetch, threads=threads, device=device
    )


def validation_batches(
    mixture: Mixture,
    *,
    seed: int,
    batch_size: int,
    chosen: np.ndarray | None = None,
    rank: int = 0,
    world_size: int = 1,
    prefetch: int = 2,
    threads: int = 4,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """Batches of process `rank` over the whole mixture, or the `chosen` positions of it, in order; as many everywhere.

    Random numbers depend on the seed and an item's id alone; rows with `counted` False are padding. A batch is valid
    until the next one is taken.
    """
    draw = lambda ids: draws_for_ids(seed, ids, mixture.latent_shape)  # noqa: E731
    chosen = np.arange(len(mixture)) if chosen is None else chosen
    shares = validation_positions(len(chosen), batch_size, rank, world_size)
    steps = ([Plan(i, chosen[found], counted, draw)] for i, (found, counted) in enumerate(shares))
    with BatchLoader(mixture, steps, batch_size, 1, prefetch=prefetch, threads=threads, device=device) as loader:
        for (batch,) in loader:
            yield batch


class BatchLoader:
    """Iterator over steps, each a list of batches, that are read ahead; close it, or use it as a context manager.

    On the CPU the tensors of a step are views of reused buffers: they are valid until the next step is taken. On
    another device they are copies that stay valid; for CUDA they are made from page-locked buffers without waiting.
    `prefetch` batches are read ahead, and at least one whole step. `wait_seconds` adds up how long the consumer
    waited. What goes wrong while reading (OSError with the file name) is raised by the iterator.
    """

    def __init__(
        self,
        mixture: Mixture,
        steps: Iterable[list[Plan]],
        batch_size: int,
        micro_batches: int,
        *,
        prefetch: int = 2,
        threads: int = 4,
        device: torch.device | str | None = None,
    ):
        self.wait_seconds = 0.0
        self._mixture = mixture
        self._steps = steps
        self._micro_batches = micro_batches
        self._device = torch.device(device or "cpu")
        self._pinned = self._device.type == "cuda"
        self._threads = threads
        self._free: queue.SimpleQueue = queue.SimpleQueue()  # buffers to fill; None: stop
        self._ready: queue.SimpleQueue = queue.SimpleQueue()  # (batch, buffers), or what ends the iteration
        self._held: list[_Buffers] = []
        for _ in range(micro_batches + max(prefetch, micro_batches)):
            self._free.put(_Buffers(mixture, batch_size, self._pinned))
        self._stopped = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mmaudio-read")
        self._thread = threading.Thread(target=self._produce, name="mmaudio-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Batches of the next step; the tensors of the step before are given up."""
        if self._stopped:
            raise StopIteration
        for buffers in self._held:
            self._free.put(buffers)
        self._held = []
        batches = []
        while len(batches) < self._micro_batches:
            item = self._take()
            if isinstance(item, BaseException):
                self.close()
                raise item
            batches.append(self._hand_over(*item))
        return batches

    def _take(self):
        start = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - start
        return item

    def _hand_over(self, batch: Batch, buffers: "_Buffers") -> Batch:
        """The batch on its device; its buffers are free after the copy, or else when the next step is taken."""
        if self._device.type == "cpu":
            self._held.append(buffers)
            return batch
        batch = batch.to(self._device, non_blocking=self._pinned)
        buffers.mark_copied(self._device)
        self._free.put(buffers)
        return batch

    def close(self) -> None:
        """Stop reading and end all threads; waits at most for the reads under way."""
        self._stopped = True
        self._free.put(None)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._thread.join()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _produce(self) -> None:
        try:
            for plans in self._steps:
                for plan in plans:
                    buffers = self._free.get()
                    if buffers is None:
                        return
                    self._ready.put((self._fill(plan, buffers), buffers))
            self._ready.put(StopIteration())
        except BaseException as error:
            self._ready.put(error)

    def _fill(self, plan: Plan, buffers: "_Buffers") -> Batch:
        mixture, stores = self._mixture, self._mixture.stores
        buffers.wait_copied()
        source, rows = mixture.locate(plan.positions)
        has_video = np.array([store.has_video for store in stores])[source]
        has_text = np.array([store.has_text for store in stores])[source]
        places = np.cumsum(has_video) - 1
        shares = np.array_split(np.arange(len(rows)), 2 * self._threads)  # more than threads: they balance
        running = [self._pool.submit(buffers.fill, mixture, source, rows, places, share) for share in shares]
        ids = [stores[s].ids[row] for s, row in zip(source.tolist(), rows.tolist(), strict=True)]
        noise = plan.draw(ids)
        tensors = buffers.views(len(rows), int(has_video.sum()))
        for future in running:
            future.result()
        if not has_text.all():
            tensors[TEXT_FEATURES][torch.from_numpy(~has_text)] = 0
        batch = Batch(
            step=plan.step,
            video_rows=torch.from_numpy(np.flatnonzero(has_video)),
            has_video=torch.from_numpy(has_video),
            has_text=torch.from_numpy(has_text),
            source=torch.from_numpy(source),
            counted=torch.from_numpy(plan.counted),
            ids=ids,
            draws=noise,
            **tensors,
        )
        return batch.pin_memory() if self._pinned else batch


class _Buffers:
    """Room for the features of one batch. Pages that no record is ever read into are never touched."""

    def __init__(self, mixture: Mixture, batch_size: int, pinned: bool):
        any_video = any(store.has_video for store in mixture.stores)
        self._tensors = {
            name: torch.empty(
                (0 if name in _VIDEO and not any_video else batch_size, *column.shape),
                dtype=column.dtype,
                pin_memory=pinned,
            )
            for name, column in mixture.columns.items()
        }
        self._bytes = {name: bytes_of(tensor) for name, tensor in self._tensors.items()}
        self._copied: torch.cuda.Event | None = None

    def fill(self, mixture: Mixture, source, rows, video_places, share) -> None:
        """Read samples `share` of the batch: row `rows[i]` of store `source[i]`, its video to `video_places[i]`."""
        for index, store in enumerate(mixture.stores):
            chosen = share[source[share] == index]
            for name in store.columns.keys() & self._bytes.keys():
                places = video_places[chosen] if name in _VIDEO else chosen
                store.read_into(name, rows[chosen], self._bytes[name], places)

    def views(self, batch: int, with_video: int) -> dict[str, torch.Tensor]:
        """The filled part of every column."""
        return {name: tensor[: with_video if name in _VIDEO else batch] for name, tensor in self._tensors.items()}

    def mark_copied(self, device: torch.device) -> None:
        """Note that the copies queued so far are the last use of the buffers."""
        if device.type == "cuda":
            self._copied = torch.cuda.current_stream(device).record_event()

    def wait_copied(self) -> None:
        """Wait, outside the training loop, until those copies are done."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
