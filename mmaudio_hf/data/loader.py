"""Batches of a mixture, read ahead by one thread.

The thread copies rows from the memory-mapped columns of the stores straight into a ring of reused buffers, one
`torch.index_select` for each store and column, and draws the random inputs; the training loop waits for neither.
There are no worker processes: all of it releases the GIL, and nothing is pickled or copied between processes.
"""

import atexit
import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.noise import Draws, fill_noise, fill_noise_for_ids
from mmaudio_hf.data.sampler import dataset_indices, validation_indices
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.schema import CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES

_VIDEO = (CLIP_FEATURES, SYNC_FEATURES)
_READAHEAD = 2  # batches that are requested from the disk before they are read


@dataclass(frozen=True)
class Batch:
    """B samples, grouped by store; the Bv that have video are listed in `video_rows`. Absent text is zeros."""

    step: int
    mean: torch.Tensor  # (B, N, C), of the latent before normalisation
    std: torch.Tensor  # (B, N, C)
    text_features: torch.Tensor  # (B, 77, 1024)
    clip_features: torch.Tensor  # (Bv, T, 1024)
    sync_features: torch.Tensor  # (Bv, S, 768)
    video_rows: torch.Tensor  # (Bv,) int64, ascending: row i of the two above belongs to batch row video_rows[i]
    has_video: torch.Tensor  # (B,) bool
    has_text: torch.Tensor  # (B,) bool
    source: torch.Tensor  # (B,) int64, index of the store in the mixture
    valid: torch.Tensor  # (B,) bool, False for the padding of a last validation batch
    ids: list[str]
    noise: Draws
    sample_indices: Sequence[int] = ()  # (B,) which sample of the step each batch row is

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor | Draws)}
        copies: dict[str, Any] = {n: value.to(device, non_blocking=non_blocking) for n, value in tensors.items()}
        return replace(self, **copies)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of all tensors until the work now queued on `stream` is done, even if freed before."""
        for value in (*vars(self).values(), *vars(self.noise).values()):
            if isinstance(value, torch.Tensor):
                value.record_stream(stream)


@dataclass(frozen=True)
class BatchIndices:
    """What one batch consists of, in any order; the loader groups it by store."""

    step: int
    dataset_indices: np.ndarray  # (B,), for `Mixture.locate`
    sample_indices: np.ndarray  # (B,) of the step
    valid: np.ndarray  # (B,) bool, False for padding
    fill_noise: Callable[[Draws, list[int], list[str]], None]  # given sample indices and ids of the rows to fill


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
    steps = range(start_step, start_step + num_steps)
    indices = training_batch_indices(len(mixture), seed, global_batch, sample_indices, steps)
    size, count = max(map(len, sample_indices)), len(sample_indices)
    return BatchLoader(mixture, indices, size, count, prefetch=prefetch, threads=threads, device=device)


def training_batch_indices(
    epoch_length: int, seed: int, global_batch: int, sample_indices: Sequence[np.ndarray], steps: range
) -> Iterator[list[BatchIndices]]:
    """Indices of the micro batches of each step."""

    def micro_batch(step: int, samples: np.ndarray) -> BatchIndices:
        def fill(out: Draws, samples: list[int], ids: list[str]) -> None:
            fill_noise(out, seed, "train", step, samples)

        indices = dataset_indices(seed, step, samples, global_batch, epoch_length)
        return BatchIndices(step, indices, samples, np.ones(len(samples), dtype=bool), fill)

    return ([micro_batch(step, samples) for samples in sample_indices] for step in steps)


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
    """Batches of process `rank` over the whole mixture, or those `dataset_indices` of it; as many everywhere.

    The noise depends on the seed and an item's id alone; rows that are not `valid` are padding. A batch may be used
    until the next one is requested.
    """

    def fill(out: Draws, samples: list[int], ids: list[str]) -> None:
        fill_noise_for_ids(out, seed, ids)

    items = np.arange(len(mixture)) if dataset_indices is None else dataset_indices
    batches = enumerate(validation_indices(len(items), batch_size, rank, world_size))
    indices = ([BatchIndices(step, items[chosen], chosen, valid, fill)] for step, (chosen, valid) in batches)
    with BatchLoader(mixture, indices, batch_size, 1, prefetch=prefetch, threads=threads, device=device) as loader:
        for (batch,) in loader:
            yield batch


class BatchLoader:
    """Iterator over steps, each a list of batches, that are read ahead; close it, or use it as a context manager.

    On the CPU the tensors of a step are views of reused buffers: they may be used until the next step is requested. On
    another device they are copies that stay. For CUDA they are copied from pinned buffers on a stream of its own, one
    batch ahead, so that the copy runs beside the computation of the step before; the host waits for neither.
    `prefetch` batches are read ahead, and at least one whole step. `wait_seconds` adds up how long the consumer
    waited. Errors while reading (OSError with the file name) are raised by the iterator.

    threads: of torch, for reading and for the random numbers; no more than there are cores.
    readahead: request the rows of coming batches from the disk, in the first epoch and always when the stores exceed
    memory. Rows that are in the page cache cost about 10 % more with it.
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
        readahead: bool = True,
    ):
        self.wait_seconds = 0.0
        self.bytes_read = 0  # of features
        self._mixture = mixture
        self._steps = steps
        self._micro_batches = micro_batches
        self._device = torch.device(device or "cpu")
        self._copy_stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._copying: deque[tuple[Batch, torch.cuda.Event]] = deque()  # at most one batch ahead
        self._threads = min(threads, len(os.sched_getaffinity(0)))  # more would only wait for each other
        self._readahead = readahead
        self._free: queue.SimpleQueue[_Buffers | None] = queue.SimpleQueue()  # None: stop
        self._ready: queue.SimpleQueue[tuple[Batch, _Buffers] | BaseException] = queue.SimpleQueue()
        self._held: list[_Buffers] = []  # of the batches that the consumer has
        for _ in range(micro_batches + max(prefetch, micro_batches)):
            self._free.put(_Buffers(mixture, batch_size, pinned=self._copy_stream is not None))
        self._stopped = False
        self._thread = threading.Thread(target=self._read_all, name="mmaudio-prefetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread within torch while the interpreter ends would abort the process

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Batches of the next step; the buffers of the step before are used again."""
        if self._stopped:
            raise StopIteration
        for buffers in self._held:
            self._free.put(buffers)
        self._held = []
        try:
            batches = [self._next_batch() for _ in range(self._micro_batches)]
            self._copy_ahead()
            return batches
        except BaseException as error:
            stopped = self._stopped  # by another thread: the errors that it causes are none
            self.close()
            if stopped and isinstance(error, Exception):
                raise StopIteration from None
            raise

    def _wait_next(self) -> "tuple[Batch, _Buffers]":
        start = time.perf_counter()
        try:
            item = self._ready.get()
        finally:
            self.wait_seconds += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def _next_batch(self) -> Batch:
        """The next batch, on its device."""
        if self._copy_stream is not None:
            if not self._copying:
                self._start_copy(*self._wait_next())
            batch, copied = self._copying.popleft()
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            batch.record_stream(current)  # it was allocated on the other stream
            return batch
        batch, buffers = self._wait_next()
        if self._device.type == "cpu":
            self._held.append(buffers)  # free when the next step is requested
            return batch
        copy = batch.to(self._device)
        self._free.put(buffers)
        return copy

    def _start_copy(self, batch: Batch, buffers: "_Buffers") -> None:
        with torch.cuda.stream(self._copy_stream):
            copy = batch.to(self._device, non_blocking=True)
            buffers.copied = torch.cuda.current_stream(self._device).record_event()
        self._copying.append((copy, buffers.copied))
        self._free.put(buffers)  # filled again after `copied`

    def _copy_ahead(self) -> None:
        """Start copying the batch after this step, when it has been read."""
        if self._copy_stream is None or self._copying:
            return
        with contextlib.suppress(queue.Empty):
            item = self._ready.get_nowait()
            if isinstance(item, BaseException):
                self._ready.put(item)  # the last item, for the next step
            else:
                self._start_copy(*item)

    def close(self) -> None:
        """Stop reading and end all threads; waits at most for the batch that is being read."""
        atexit.unregister(self.close)
        self._stopped = True
        self._free.put(None)
        self._thread.join()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the thread that reads -------------------------------------------------------------------------------------

    def _read_all(self) -> None:
        """Fill all batches, each as soon as a buffer is free."""
        torch.set_num_threads(self._threads)  # of this thread alone, as in the pin_memory thread of torch's DataLoader
        end: BaseException = StopIteration()
        try:
            for samples in self._located():
                buffers = self._free.get()
                if buffers is None or self._stopped:
                    return
                self._ready.put((buffers.fill(samples), buffers))
                self.bytes_read += samples.bytes
        except BaseException as error:
            end = error
        finally:
            self._ready.put(end)

    def _located(self) -> "Iterator[_Samples]":
        """Where the samples of all batches are, requested from the disk some batches before they are read."""
        exceeds = self._readahead and exceeds_memory(self._mixture)
        for store in self._mixture.stores if exceeds else ():
            store.advise_random()
        coming: deque[_Samples] = deque()
        count = 0
        for indices in chain.from_iterable(self._steps):
            samples = _Samples(self._mixture, indices)
            if exceeds or (self._readahead and count < len(self._mixture)):
                samples.prefetch()
            count += len(samples.ids)
            coming.append(samples)
            if len(coming) > _READAHEAD:
                yield coming.popleft()
        yield from coming


def sample_bytes(mixture: Mixture, indices: np.ndarray) -> int:
    """Bytes of the features of samples: what is read for them, once, and what goes to the device besides noise."""
    source, _ = mixture.locate(indices)
    return int(mixture.row_bytes[source].sum())


def exceeds_memory(mixture: Mixture) -> bool:
    """Whether the features take more than half of this machine's memory, so that the page cache will not keep them."""
    size = sum(store.contents.size for store in mixture.stores)
    return 2 * size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _Piece(NamedTuple):
    """Rows of one column of one store, which follow each other in the batch from `start` on."""

    store: FeatureStore
    column: str
    rows: np.ndarray
    start: int


class _Samples:
    """The samples of a batch, grouped by store so that each column of a store is one slice of the batch."""

    def __init__(self, mixture: Mixture, indices: BatchIndices):
        stores = mixture.stores
        source, rows = mixture.locate(indices.dataset_indices)
        order = np.argsort(source, kind="stable")
        source, rows = source[order], rows[order]
        self.step, self.fill_noise = indices.step, indices.fill_noise
        self.sample_indices: list[int] = indices.sample_indices[order].tolist()
        self.ids = [stores[s].ids[row] for s, row in zip(source.tolist(), rows.tolist(), strict=True)]
        self.bytes = int(mixture.row_bytes[source].sum())
        has_video = np.array([store.has_video for store in stores])[source]
        has_text = np.array([store.has_text for store in stores])[source]
        self.flags = {"has_video": has_video, "has_text": has_text, "valid": indices.valid[order], "source": source}
        self.flags["video_rows"] = np.flatnonzero(has_video)
        self.pieces: list[_Piece] = []
        for index, store in enumerate(stores):
            first, last = np.searchsorted(source, [index, index + 1]).tolist()
            for name in mixture.columns.keys() & store.columns.keys() if first < last else ():
                start = int(has_video[:first].sum()) if name in _VIDEO else first
                self.pieces.append(_Piece(store, name, rows[first:last], start))

    def prefetch(self) -> None:
        """Request all rows from the disk."""
        for piece in self.pieces:
            piece.store.prefetch(piece.column, piece.rows)


class _Buffers:
    """The memory of one batch. Pages that no row is ever read into are never touched, unless they are pinned."""

    def __init__(self, mixture: Mixture, batch_size: int, pinned: bool):
        video_size = batch_size if any(store.has_video for store in mixture.stores) else 0
        self._tensors = {
            name: torch.empty(
                (video_size if name in _VIDEO else batch_size, *column.shape), dtype=column.dtype, pin_memory=pinned
            )
            for name, column in mixture.columns.items()
        }
        flags = dict.fromkeys(("has_video", "has_text", "valid"), torch.bool) | dict.fromkeys(
            ("source", "video_rows"), torch.int64
        )
        self._tensors |= {n: torch.empty(batch_size, dtype=dtype, pin_memory=pinned) for n, dtype in flags.items()}
        self._noise = Draws.empty(batch_size, mixture.latent_shape, pinned)
        self.copied: torch.cuda.Event | None = None  # after the last copy to the device

    def fill(self, samples: _Samples) -> Batch:
        """The batch of these samples, in these buffers."""
        if self.copied is not None:
            self.copied.synchronize()
        size, video_size = len(samples.ids), len(samples.flags["video_rows"])
        tensors = {n: buffer[: video_size if n in _VIDEO else size] for n, buffer in self._tensors.items()}
        for name, values in samples.flags.items():
            tensors[name] = self._tensors[name][: len(values)].copy_(torch.from_numpy(values))
        absent = np.flatnonzero(~samples.flags["has_text"])
        if len(absent):  # indexing with an empty mask still costs a millisecond
            tensors[TEXT_FEATURES][torch.from_numpy(absent)] = 0
        for store, name, rows, start in samples.pieces:
            store.read_into(name, rows, tensors[name][start : start + len(rows)])
        noise = self._noise[:size]
        samples.fill_noise(noise, samples.sample_indices, samples.ids)
        return Batch(step=samples.step, ids=samples.ids, noise=noise, sample_indices=samples.sample_indices, **tensors)
