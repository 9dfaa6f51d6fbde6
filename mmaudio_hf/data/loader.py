"""Batches of a mixture, read ahead by threads.

Each thread fills whole batches of a ring of reused buffers: it copies rows from the memory-mapped columns of stores,
one `torch.index_select` for each store and column, and draws the random inputs; the training loop waits for neither.
There are no worker processes: all of it releases the GIL, and nothing is pickled or copied between processes.
"""

import atexit
import math
import mmap
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch

from mmaudio_hf.data.mixture import Bucket, Mixture
from mmaudio_hf.data.remote import Lease, NextUse, RemoteStore, batches_ahead
from mmaudio_hf.data.sampler import (
    Draws,
    bucket_of_step,
    dataset_indices,
    fill_noise,
    fill_noise_for_ids,
    validation_indices,
)
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.schema import CLIP_FEATURES, MEAN, SYNC_FEATURES, TEXT_FEATURES

_VIDEO = (CLIP_FEATURES, SYNC_FEATURES)
_READAHEAD = 2  # batches that are requested from the disk before they are read
_ALIGNMENT = 64  # bytes, of tensors in a block

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Batch:
    """B samples of one duration, grouped by store; the Bv that have video are in `video_rows`. Absent text is zeros."""

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

    @property
    def lengths(self) -> tuple[int, int, int]:
        """(N, T, S), for `MMAudio.set_lengths`."""
        return self.mean.shape[1], self.clip_features.shape[1], self.sync_features.shape[1]

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
    global_batch: int | Sequence[int],
    sample_indices: Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]],
    start_step: int,
    num_steps: int,
    prefetch: int = 2,
    threads: int = 4,
    device: torch.device | str | None = None,
) -> "BatchLoader":
    """Loader of this process's share of steps `start_step` to `start_step + num_steps - 1`.

    sample_indices: those of each accumulation micro batch, from `sampler.process_sample_indices`. Iterating yields one
    list of batches per step, one batch per micro batch. `device` None leaves them on the CPU. Of a mixture of several
    durations, `global_batch` and `sample_indices` are lists of these, one for each bucket.
    """
    sizes: Sequence[int] = (global_batch,) if isinstance(global_batch, int) else global_batch
    shares: Any = (sample_indices,) if isinstance(global_batch, int) else sample_indices
    steps = range(start_step, start_step + num_steps)
    indices = bucketed_batch_indices(mixture, seed, sizes, shares, steps)
    largest = [max(map(len, share)) for share in shares]

    def order(step: int) -> np.ndarray:  # of all processes: which of them uses a row next is the same to the cache
        samples = [[np.arange(size)] for size in sizes]
        [[batch]] = bucketed_batch_indices(mixture, seed, sizes, samples, range(step, step + 1))
        return batch.dataset_indices

    epoch = sum(bucket.samples / size for bucket, size in zip(mixture.buckets, sizes, strict=True))
    settings: dict[str, Any] = {"prefetch": prefetch, "threads": threads, "device": device}
    return BatchLoader(
        mixture, indices, largest, len(shares[0]), next_use=NextUse(mixture, order, math.ceil(epoch)), **settings
    )


def bucketed_batch_indices(
    mixture: Mixture, seed: int, sizes: Sequence[int], shares: Sequence[Sequence[np.ndarray]], steps: range
) -> Iterator[list[BatchIndices]]:
    """Indices of the micro batches of each step: sizes and sample indices of a step for each bucket of the mixture."""
    epochs = [bucket.samples for bucket in mixture.buckets]
    for step in steps:
        bucket, before = bucket_of_step(step, epochs, sizes)
        of_step = partial(dataset_indices, seed, before, global_batch=sizes[bucket], epoch_length=epochs[bucket])
        indices = (mixture.of_bucket(bucket, of_step(samples, bucket=bucket)) for samples in shares[bucket])

        def fill(out: Draws, samples: list[int], ids: list[str], step: int = step) -> None:
            fill_noise(out, seed, "train", step, samples)

        pairs = zip(indices, shares[bucket], strict=True)
        yield [BatchIndices(step, *pair, np.ones(len(pair[1]), dtype=bool), fill) for pair in pairs]


def validation_batches(
    mixture: Mixture,
    *,
    seed: int,
    batch_size: int | Sequence[int],
    dataset_indices: np.ndarray | None = None,
    rank: int = 0,
    world_size: int = 1,
    prefetch: int = 2,
    threads: int = 4,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """Batches of process `rank` over the whole mixture, or those `dataset_indices` of it; as many everywhere.

    The noise depends on the seed and an item's id alone; rows that are not `valid` are padding. A batch may be used
    until the next one is requested. batch_size: one number, or one for each bucket; these follow one another.
    """
    sizes = [batch_size] * len(mixture.buckets) if isinstance(batch_size, int) else list(batch_size)

    def fill(out: Draws, samples: list[int], ids: list[str]) -> None:
        fill_noise_for_ids(out, seed, ids)

    items = np.arange(len(mixture)) if dataset_indices is None else dataset_indices
    buckets = mixture.bucket_of[mixture.locate(items)[0]]
    of_bucket = [np.flatnonzero(buckets == bucket) for bucket in range(len(sizes))]  # indices into items
    batches = enumerate(
        (of_bucket[bucket][chosen], valid)
        for bucket, size in enumerate(sizes)
        for chosen, valid in validation_indices(len(of_bucket[bucket]), size, rank, world_size)
    )
    indices = ([BatchIndices(step, items[chosen], chosen, valid, fill)] for step, (chosen, valid) in batches)
    with BatchLoader(mixture, indices, sizes, 1, prefetch=prefetch, threads=threads, device=device) as loader:
        for (batch,) in loader:
            yield batch


class BatchLoader(AbstractContextManager["BatchLoader"]):
    """Iterator over steps, each a list of batches, that are read ahead; close it, or use it as a context manager.

    On the CPU the tensors of a step are views of reused buffers: they may be used until the next step is requested. On
    another device they are copies that stay. For CUDA they are copied from pinned buffers on a stream of its own, one
    batch ahead, so that the copy runs beside the computation of the step before; the host waits for neither.
    `prefetch` batches are read ahead, and at least one whole step. `batch_size` is that of the largest batch, or a list
    of one for each bucket. `wait_seconds` adds up how long the consumer
    waited. Errors while reading (OSError with the file name) are raised by the iterator.

    threads: in all, no more than there are cores. As many of them as batches are read ahead fill one batch each, since
    several that divide one batch would wait for each other at every column; what is left helps them.
    readahead: request the rows of coming batches from the disk, in the first epoch and always when the stores exceed
    memory. Rows that are in the page cache cost about 10 % more with it.
    next_use: for stores on the Hub, which of the rows that came are kept; None: the first ones.
    """

    def __init__(
        self,
        mixture: Mixture,
        steps: Iterable[list[BatchIndices]],
        batch_size: int | Sequence[int],
        micro_batches: int,
        *,
        prefetch: int = 2,
        threads: int = 4,
        device: torch.device | str | None = None,
        readahead: bool = True,
        next_use: NextUse | None = None,
    ):
        self.wait_seconds = 0.0
        self._mixture = mixture
        self._steps = steps
        self._micro_batches = micro_batches
        self._device = torch.device(device or "cpu")
        self._copy_stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._copying: deque[tuple[Batch, torch.cuda.Event]] = deque()  # at most one batch ahead
        self._readahead, self._next_use = readahead, next_use
        self._free: queue.SimpleQueue[_Buffers | None] = queue.SimpleQueue()  # None: stop
        self._ready: queue.Queue[Future[tuple[Batch, _Buffers]]] = queue.Queue()  # in order, some still being read
        self._held: list[_Buffers] = []  # of the batches that the consumer has
        ahead = max(prefetch, micro_batches)
        # Ahead of those that are being filled; rows on the Hub take longer than those on the disk.
        sizes = [batch_size] * len(mixture.buckets) if isinstance(batch_size, int) else batch_size
        self._requested = max(_READAHEAD, batches_ahead(mixture, sizes, min(threads, ahead)))
        self._samples, self._taking, self._ended = self._located(), threading.Lock(), False
        self._stopped = False
        for buffers in _make_buffers(mixture, sizes, micro_batches + ahead, self._copy_stream is not None):
            self._free.put(buffers)
        threads = max(1, min(threads, len(os.sched_getaffinity(0))))
        count, own = min(threads, ahead), torch.get_num_threads()
        begun = threading.Barrier(count + 1)
        settings: dict[str, Any] = {"target": self._read_all, "args": (threads // count, begun), "daemon": True}
        self._threads = [threading.Thread(**settings, name=f"mmaudio-prefetch-{i}") for i in range(count)]
        for thread in self._threads:
            thread.start()
        begun.wait()
        torch.set_num_threads(own)  # what any thread sets is also MKL's, and where threads made later begin
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
            # Start copying the batch after this step, when it has been read.
            if self._copy_stream is not None and not self._copying and not self._ready.empty():
                coming = self._ready.queue[0]
                if coming.done() and coming.exception() is None:
                    self._start_copy(*self._wait_next())
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
            return self._ready.get().result()
        finally:
            self.wait_seconds += time.perf_counter() - start

    def _next_batch(self) -> Batch:
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

    def close(self) -> None:
        """Stop reading and end all threads; waits at most for the batches that are being read."""
        atexit.unregister(self.close)
        self._stopped = True
        self._free.put(None)
        for thread in self._threads:
            thread.join()
        if not any(thread.is_alive() for thread in self._threads):
            self._samples.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the threads that read --------------------------------------------------------------------------------------

    def _read_all(self, threads: int, begun: threading.Barrier) -> None:
        """Fill batches, each as soon as a buffer is free."""
        torch.get_num_threads()  # the first call in a thread sets what the process has, and would do so later
        torch.set_num_threads(threads)
        begun.wait()
        while (taken := self._take()) is not None:
            result, samples, buffers = taken
            try:
                samples.wait()
                result.set_result((buffers.fill(samples), buffers))
            except BaseException as error:
                result.set_exception(error)
            finally:
                samples.release()

    def _take(self) -> "tuple[Future[tuple[Batch, _Buffers]], _Samples, _Buffers] | None":
        """The next batch to fill, by one thread at a time; None after the last one, an error or `close`."""
        with self._taking:
            if self._ended:
                return None
            result: Future[tuple[Batch, _Buffers]] = Future()
            try:
                samples, buffers = next(self._samples), self._free.get()
                if buffers is None or self._stopped:
                    samples.release()
                    raise StopIteration
            except BaseException as error:
                self._ended = True
                result.set_exception(error)
                return None
            finally:
                self._ready.put(result)
            return result, samples, buffers

    def _located(self) -> "Generator[_Samples, None, None]":
        """Where the samples of all batches are, requested from the disk some batches before they are read."""
        # Of a store larger than half of the memory the page cache will not keep the rows.
        size = sum(store.contents.size for store in self._mixture.stores)
        exceeds = self._readahead and 2 * size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for store in self._mixture.stores if exceeds else ():
            store.advise_random()
        coming: deque[_Samples] = deque()
        count = 0
        try:
            for indices in chain.from_iterable(self._steps):
                samples = _Samples(self._mixture, indices)
                coming.append(samples)
                if exceeds or (self._readahead and count < len(self._mixture)):
                    samples.prefetch()
                samples.hold(self._next_use)
                count += len(samples.ids)
                if len(coming) > self._requested:
                    yield coming.popleft()
            while coming:
                yield coming.popleft()
        finally:
            for samples in coming:
                samples.release()


def sample_bytes(mixture: Mixture, indices: np.ndarray) -> int:
    """Bytes of the features of samples: what is read for them, once, and what goes to the device besides noise."""
    source, _ = mixture.locate(indices)
    return int(mixture.row_bytes[source].sum())


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
        self.bucket = int(mixture.bucket_of[source[0]])
        assert (mixture.bucket_of[source] == self.bucket).all(), "a batch of two durations"
        self.bytes = int(mixture.row_bytes[source].sum())
        has_video = np.array([store.has_video for store in stores])[source]
        has_text = np.array([store.has_text for store in stores])[source]
        self.flags = {"has_video": has_video, "has_text": has_text, "valid": indices.valid[order], "source": source}
        self.flags["video_rows"] = np.flatnonzero(has_video)
        # Store, column and rows of what follows each other in the batch, and where it begins there.
        self.pieces: list[tuple[FeatureStore, str, np.ndarray, int]] = []
        self._remote: list[tuple[int, RemoteStore, np.ndarray]] = []  # index in the mixture, rows
        self._leases: list[Lease] = []
        for index, store in enumerate(stores):
            first, last = np.searchsorted(source, [index, index + 1]).tolist()
            if isinstance(store, RemoteStore) and first < last:
                self._remote.append((index, store, rows[first:last]))
            for name in mixture.columns.keys() & store.columns.keys() if first < last else ():
                start = int(has_video[:first].sum()) if name in _VIDEO else first
                self.pieces.append((store, name, rows[first:last], start))

    def prefetch(self) -> None:
        for store, name, rows, _ in self.pieces:
            store.prefetch(name, rows)

    def hold(self, next_use: NextUse | None) -> None:
        """Request rows that are on the Hub; they can be read after `wait`, and stay until `release`."""
        for index, store, rows in self._remote:
            self._leases.append(store.hold(rows, None if next_use is None else next_use(self.step, index, rows)))

    def wait(self) -> None:
        """Until they are there; raises the errors of fetching them."""
        for lease in self._leases:
            lease.wait()

    def release(self) -> None:
        for lease in self._leases:
            lease.release()
        self._leases = []


class _Buffers:
    """The memory of one batch, shared by the buckets, whose tensors it has views of.

    Pages that no row is ever read into are never touched, unless they are pinned.
    """

    def __init__(self, buckets: Sequence[dict[str, torch.Tensor]]):
        noise = Draws.__annotations__
        self._tensors = [{name: t for name, t in tensors.items() if name not in noise} for tensors in buckets]
        self._noise = [Draws(**{name: tensors[name] for name in noise}) for tensors in buckets]
        self.copied: torch.cuda.Event | None = None  # after the last copy to the device

    def fill(self, samples: _Samples) -> Batch:
        if self.copied is not None:
            self.copied.synchronize()
        size, video_size = len(samples.ids), len(samples.flags["video_rows"])
        buffers = self._tensors[samples.bucket]
        tensors = {n: buffer[: video_size if n in _VIDEO else size] for n, buffer in buffers.items()}
        for name, values in samples.flags.items():
            tensors[name] = buffers[name][: len(values)]
            tensors[name].numpy()[:] = values
        absent = np.flatnonzero(~samples.flags["has_text"])
        if len(absent):  # indexing with an empty mask still costs a millisecond
            tensors[TEXT_FEATURES][torch.from_numpy(absent)] = 0
        for store, name, rows, start in samples.pieces:
            store.read_into(name, rows, tensors[name][start : start + len(rows)])
        noise = self._noise[samples.bucket][:size]
        samples.fill_noise(noise, samples.sample_indices, samples.ids)
        return Batch(step=samples.step, ids=samples.ids, noise=noise, sample_indices=samples.sample_indices, **tensors)


def _make_buffers(mixture: Mixture, batch_sizes: Sequence[int], count: int, pinned: bool) -> list[_Buffers]:
    pairs = zip(mixture.buckets, batch_sizes, strict=True)
    like = [_batch_like(mixture, bucket, batch_size) for bucket, batch_size in pairs]
    largest = {name: max((tensors[name] for tensors in like), key=torch.Tensor.numel) for name in like[0]}
    memory = allocate_packed({(i, name): tensor for i in range(count) for name, tensor in largest.items()}, pinned)

    def views(index: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        flat = {name: memory[index, name].flatten()[: tensor.numel()] for name, tensor in tensors.items()}
        return {name: flat[name].view(tensor.shape) for name, tensor in tensors.items()}

    return [_Buffers([views(i, tensors) for tensors in like]) for i in range(count)]


def _batch_like(mixture: Mixture, bucket: Bucket, batch_size: int) -> dict[str, torch.Tensor]:
    video_size = batch_size if any(mixture.stores[index].has_video for index in bucket.stores) else 0
    kinds = {n: ((video_size if n in _VIDEO else batch_size, *c.shape), c.dtype) for n, c in bucket.columns.items()}
    kinds |= dict.fromkeys(("has_video", "has_text", "valid"), ((batch_size,), torch.bool))
    kinds |= dict.fromkeys(("source", "video_rows"), ((batch_size,), torch.int64))
    shapes = Draws.shapes(bucket.columns[MEAN].shape)
    kinds |= {name: ((batch_size, *shape), torch.float32) for name, shape in shapes.items()}
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in kinds.items()}


def pack(sizes: Mapping[Key, int], block_bytes: int = 0) -> tuple[list[int], dict[Key, tuple[int, int]]]:
    """Bytes of the blocks that hold all `sizes`, and for each its block and its start there.

    torch rounds every pinned allocation up to a power of two; full blocks of a power of two waste next to nothing.
    Largest first, each into the first block that has space; what is larger than a block has one of its own.
    block_bytes: 0 is the power of two that holds the largest.
    """
    block_bytes = block_bytes or 1 << (max(sizes.values()) - 1).bit_length()
    blocks: list[int] = []
    positions: dict[Key, tuple[int, int]] = {}
    for key in sorted(sizes, key=lambda key: sizes[key], reverse=True):
        size = -(-sizes[key] // _ALIGNMENT) * _ALIGNMENT
        block = next((i for i, used in enumerate(blocks) if used + size <= block_bytes), len(blocks))
        if block == len(blocks):
            blocks.append(0)
        positions[key] = block, blocks[block]
        blocks[block] += size
    return blocks, positions


def allocate_packed(like: Mapping[Key, torch.Tensor], pinned: bool, block_bytes: int = 0) -> dict[Key, torch.Tensor]:
    """Host memory for tensors of the shapes and types of `like`, as views of a few blocks (`pack`)."""
    sizes, positions = pack({key: tensor.nbytes for key, tensor in like.items()}, block_bytes)
    blocks = []
    for size in sizes:
        if pinned:
            blocks.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
            continue
        memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)  # a batch spans 15,000 pages of 4 kB
        blocks.append(torch.frombuffer(memory, dtype=torch.uint8))
    return {
        key: blocks[block][start : start + like[key].nbytes].view(like[key].dtype).view(like[key].shape)
        for key, (block, start) in positions.items()
    }
