"""Batches from a mixture, read ahead.

Records are read with concurrent positional reads, many in one system call (`reads`), straight into a ring of reused
buffers, and the random numbers of the samples are drawn by the same threads, so the training loop waits for neither.
There are no worker processes: reading and drawing release the interpreter lock, and nothing is pickled or copied
between processes. The threads go on to the next batch without waiting for the last piece of the one before.
"""

import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from mmaudio_hf.data.layout import Column, bytes_of
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.noise import Draws, draw_for_ids_into, draw_into
from mmaudio_hf.data.sampler import dataset_indices, validation_indices
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.schema import CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES

_VIDEO = (CLIP_FEATURES, SYNC_FEATURES)
_TASK_BYTES = 16 << 20  # what one thread reads at a time: about two milliseconds of copying from the page cache
_TASK_DRAWS = 16  # samples whose random numbers one thread draws at a time: about two milliseconds


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
    valid: torch.Tensor  # (B,) bool, False for the padding of a last validation batch
    ids: list[str]
    noise: Draws

    def to(self, device, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`."""
        return replace(self, **{name: v.to(device, non_blocking=non_blocking) for name, v in self._tensors().items()})

    def _tensors(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("step", "ids")}


@dataclass(frozen=True)
class BatchIndices:
    """What one batch is made of: epoch positions (B,) of the mixture, which of them count, and their random numbers."""

    step: int
    dataset_indices: np.ndarray
    valid: np.ndarray
    draw: Callable[[Draws, slice, list[str]], None]  # fills the numbers of the given samples, given the batch's ids


def training_batches(
    mixture: Mixture,
    *,
    seed: int,
    global_batch: int,
    sample_indices: Sequence[np.ndarray],
    start_step: int,
    num_steps: int,
    prefetch: int = 2,
    threads: int = 4,
    device: torch.device | str | None = None,
) -> "BatchLoader":
    """Loader of this process's share of steps `start_step` to `start_step + num_steps - 1`.

    sample_indices: those of each accumulation micro batch, from `sampler.process_sample_indices`. Iterating yields one
    list of batches per step, one batch per micro batch. `device` None leaves them on the CPU.
    """
    steps = training_batch_indices(
        len(mixture), seed, global_batch, sample_indices, range(start_step, start_step + num_steps)
    )
    return BatchLoader(
        mixture,
        steps,
        max(map(len, sample_indices)),
        len(sample_indices),
        prefetch=prefetch,
        threads=threads,
        device=device,
    )


def training_batch_indices(
    epoch_length: int, seed: int, global_batch: int, sample_indices: Sequence[np.ndarray], steps: range
) -> Iterator[list[BatchIndices]]:
    """Plans of the micro batches of each step."""

    def plan(step: int, share: np.ndarray) -> BatchIndices:
        def draw(out: Draws, samples: slice, ids: list[str]) -> None:
            draw_into(out.part(samples), seed, "train", step, share[samples].tolist())

        found = dataset_indices(seed, step, share, global_batch, epoch_length)
        return BatchIndices(step, found, np.ones(len(share), dtype=bool), draw)

    return ([plan(step, share) for share in sample_indices] for step in steps)


def validation_batches(
    mixture: Mixture,
    *,
    seed: int,
    batch_size: int,
    dataset_indices: np.ndarray | None = None,
    rank: int = 0,
    world_size: int = 1,
    prefetch: int = 2,
    threads: int = 4,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """Batches of process `rank` over the whole mixture, or those `dataset_indices` of it, in order; as many everywhere.

    Random numbers depend on the seed and an item's id alone; rows with `valid` False are padding. A batch is valid
    until the next one is taken.
    """

    def draw(out: Draws, samples: slice, ids: list[str]) -> None:
        draw_for_ids_into(out.part(samples), seed, ids[samples])

    chosen = np.arange(len(mixture)) if dataset_indices is None else dataset_indices
    shares = validation_indices(len(chosen), batch_size, rank, world_size)
    steps = ([BatchIndices(i, chosen[found], valid, draw)] for i, (found, valid) in enumerate(shares))
    with BatchLoader(mixture, steps, batch_size, 1, prefetch=prefetch, threads=threads, device=device) as loader:
        for (batch,) in loader:
            yield batch


class BatchLoader:
    """Iterator over steps, each a list of batches, that are read ahead; close it, or use it as a context manager.

    On the CPU the tensors of a step are views of reused buffers: they are valid until the next step is taken. On
    another device they are copies that stay valid; for CUDA they are made from page-locked buffers without waiting.
    `prefetch` batches are read ahead, and at least one whole step. `wait_seconds` adds up how long the consumer
    waited. What goes wrong while reading (OSError with the file name) is raised by the iterator.

    hints: tell the system which records come next and to read nothing else. None does so when the stores do not fit
    into memory; records that are cached cost a little more with it.
    """

    def __init__(
        self,
        mixture: Mixture,
        steps: Iterable[list[BatchIndices]],
        batch_size: int,
        micro_batches: int,
        *,
        prefetch: int = 2,
        threads: int = 4,
        device: torch.device | str | None = None,
        hints: bool | None = None,
    ):
        self.wait_seconds = 0.0
        self.bytes_read = 0  # of features; asked for, as soon as a batch is begun
        self._mixture = mixture
        self._steps = steps
        self._micro_batches = micro_batches
        self._device = torch.device(device or "cpu")
        self._pinned = self._device.type == "cuda"
        self._hints = exceeds_memory(mixture) if hints is None else hints
        self._free: queue.SimpleQueue = queue.SimpleQueue()  # buffers to fill; None: stop
        self._ready: queue.SimpleQueue = queue.SimpleQueue()  # _Filling, in order, or what ends the iteration
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
        try:
            return [self._hand_over(self._take()) for _ in range(self._micro_batches)]
        except BaseException as error:
            stopped = self._stopped  # by another thread: what that broke is no error
            self.close()
            if stopped and isinstance(error, Exception):
                raise StopIteration from None
            raise

    def _take(self) -> "_Filling":
        """The next batch, when it is complete."""
        start = time.perf_counter()
        try:
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            wait(item.tasks, return_when=FIRST_EXCEPTION)  # one waking up rather than one for each task
            for task in item.tasks:
                task.result()
            return item
        finally:
            self.wait_seconds += time.perf_counter() - start

    def _hand_over(self, filled: "_Filling") -> Batch:
        """The batch on its device; its buffers are free after the copy, or else when the next step is taken."""
        if self._device.type == "cpu":
            self._held.append(filled.buffers)
            return filled.batch
        batch = filled.batch.to(self._device, non_blocking=self._pinned)
        filled.buffers.mark_copied(self._device)
        self._free.put(filled.buffers)
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
        """Have all batches filled, each as soon as there is room for it."""
        end: BaseException = StopIteration()
        try:
            if self._hints:
                for store in self._mixture.stores:
                    store.advise_random()
            for plans in self._steps:
                for plan in plans:
                    samples = _Samples(self._mixture, plan.dataset_indices)
                    if self._hints:
                        samples.prefetch()
                    buffers = self._free.get()
                    if buffers is None:
                        return
                    buffers.wait_copied()
                    self._ready.put(self._start(plan, samples, buffers))
        except BaseException as error:
            end = error
        finally:
            self._ready.put(end)

    def _start(self, plan: BatchIndices, samples: "_Samples", buffers: "_Buffers") -> "_Filling":
        """Give the threads all that fills one batch."""
        batch = buffers.batch(plan, samples)
        tasks = [self._pool.submit(buffers.read, pieces) for pieces in samples.tasks()]
        for first in range(0, len(batch.ids), _TASK_DRAWS):
            part = slice(first, first + _TASK_DRAWS)
            tasks.append(self._pool.submit(plan.draw, batch.noise, part, batch.ids))
        self.bytes_read += sum(piece.bytes for piece in samples.pieces)
        return _Filling(batch, buffers, tasks)


def sample_bytes(mixture: Mixture, positions: np.ndarray) -> int:
    """Bytes of the features of samples: what is read for them, once, and what goes to the device besides noise."""
    return sum(piece.bytes for piece in _Samples(mixture, positions).pieces)


def exceeds_memory(mixture: Mixture) -> bool:
    """Whether the features take more than half of this machine's memory, so that the page cache will not hold them."""
    size = sum(store.contents.size for store in mixture.stores)
    return 2 * size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _Piece(NamedTuple):
    """Records of one column of one store, and their places in the batch."""

    store: FeatureStore
    column: str
    rows: np.ndarray
    places: np.ndarray

    @property
    def bytes(self) -> int:
        return len(self.rows) * self.store.columns[self.column].row_bytes


class _Samples:
    """Where the samples at some positions of a mixture lie, and where in a batch their records go."""

    def __init__(self, mixture: Mixture, positions: np.ndarray):
        stores = mixture.stores
        self.source, rows = mixture.locate(positions)
        self.has_video = np.array([store.has_video for store in stores])[self.source]
        self.has_text = np.array([store.has_text for store in stores])[self.source]
        self.ids = [stores[s].ids[row] for s, row in zip(self.source.tolist(), rows.tolist(), strict=True)]
        self.pieces: list[_Piece] = []
        video_places = np.cumsum(self.has_video) - 1
        for index, store in enumerate(stores):
            chosen = np.flatnonzero(self.source == index)
            for name in store.columns.keys() & mixture.columns.keys() if len(chosen) else ():
                places = video_places[chosen] if name in _VIDEO else chosen
                count = max(1, _TASK_BYTES // store.columns[name].row_bytes)
                for first in range(0, len(chosen), count):
                    part = slice(first, first + count)
                    self.pieces.append(_Piece(store, name, rows[chosen[part]], places[part]))

    def prefetch(self) -> None:
        """Have the system fetch all records."""
        for piece in self.pieces:
            piece.store.prefetch(piece.column, piece.rows)

    def tasks(self) -> Iterator[list[_Piece]]:
        """The pieces in portions of about `_TASK_BYTES`."""
        portion, size = [], 0
        for piece in self.pieces:
            portion.append(piece)
            size += piece.bytes
            if size >= _TASK_BYTES:
                yield portion
                portion, size = [], 0
        if portion:
            yield portion


@dataclass(frozen=True)
class _Filling:
    """A batch that is being filled: it is complete when all tasks are."""

    batch: Batch
    buffers: "_Buffers"
    tasks: list[Future]


class _Buffers:
    """Room for one batch. Pages that no record is ever read into are never touched, unless they are page-locked."""

    def __init__(self, mixture: Mixture, batch_size: int, pinned: bool):
        any_video = any(store.has_video for store in mixture.stores)
        self._features = {
            name: _room(column, 0 if name in _VIDEO and not any_video else batch_size, pinned)
            for name, column in mixture.columns.items()
        }
        self._bytes = {name: bytes_of(tensor) for name, tensor in self._features.items()}
        flags = {"has_video": bool, "has_text": bool, "valid": bool, "source": np.int64, "video_rows": np.int64}
        self._facts = {name: torch.from_numpy(np.zeros(batch_size, kind)) for name, kind in flags.items()}
        if pinned:
            self._facts = {name: tensor.pin_memory() for name, tensor in self._facts.items()}
        self._draws = Draws.empty(batch_size, mixture.latent_shape, pinned)
        self._copied: torch.cuda.Event | None = None

    def batch(self, plan: BatchIndices, samples: _Samples) -> Batch:
        """The batch that these buffers will hold; what is not read or drawn is there already."""
        size, video_rows = len(samples.ids), np.flatnonzero(samples.has_video)
        facts = {
            "has_video": samples.has_video,
            "has_text": samples.has_text,
            "valid": plan.valid,
            "source": samples.source,
            "video_rows": video_rows,
        }
        for name, value in facts.items():
            self._facts[name][: len(value)] = torch.from_numpy(value)
        tensors = {name: self._facts[name][: len(value)] for name, value in facts.items()}
        for name, room in self._features.items():
            tensors[name] = room[: len(video_rows) if name in _VIDEO else size]
        if not samples.has_text.all():
            tensors[TEXT_FEATURES][~tensors["has_text"]] = 0
        return Batch(step=plan.step, ids=samples.ids, noise=self._draws.part(slice(0, size)), **tensors)

    def read(self, pieces: Sequence[_Piece]) -> None:
        """Read some of the records."""
        for piece in pieces:
            piece.store.read_into(piece.column, piece.rows, self._bytes[piece.column], piece.places)

    def mark_copied(self, device: torch.device) -> None:
        """Note that the copies queued so far are the last use of the buffers."""
        if device.type == "cuda":
            self._copied = torch.cuda.current_stream(device).record_event()

    def wait_copied(self) -> None:
        """Wait, outside the training loop, until those copies are done."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


def _room(column: Column, records: int, pinned: bool) -> torch.Tensor:
    """Memory for records (records, *shape): page-locked, or in large pages where the system has them to give."""
    shape = (records, *column.shape)
    if pinned or not records * column.row_bytes:
        return torch.empty(shape, dtype=column.dtype, pin_memory=pinned)
    memory = mmap.mmap(-1, records * column.row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=column.dtype).view(shape)
