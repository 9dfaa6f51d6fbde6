"""Making feature shards: media read ahead, batches through the encoders, one `datasets.map` per shard.

The batches of a shard are runs of `batch_size` items of its part of the list, in order, less those that cannot be read.
So they depend on the list and the files alone, not on who makes the shard, when, or what became of other shards.
"""

import contextlib
import ctypes
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from mmaudio_hf.features.encoders import Encoders, load_encoders, pick_device
from mmaudio_hf.features.jobs import Item, Job, digest_of, locked, naming, read_ahead, sync, write_text
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.schema import CLIP_FEATURES, MEAN, STD, SYNC_FEATURES, TEXT_FEATURES, RunError

_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 8 << 20

Task = tuple[int, str, Sequence[Item]]
"""Number, key and items of a shard."""


def make_shards(job: Job, tasks: Sequence[Task], progress: bool) -> None:
    """Make the shards that are not complete; when it returns, each was made here or is complete by another process.

    Shards that other processes are making are left for last and then waited for, in case they do not finish them.
    """
    pending = [task for task in tasks if not job.is_complete(task[0], task[1])]
    if not pending:
        return
    listed, waiting = (sum(len(items) for *_, items in some) for some in (tasks, pending))
    with tqdm(
        total=listed, initial=listed - waiting, desc=job.name, unit="item", disable=not progress, smoothing=0.1
    ) as bar:
        processes = min(job.num_proc, len(pending))
        with _here(job) if processes == 1 else _in_processes(job, processes) as run:
            busy = run(pending, False, bar.update)
            if busy and progress:
                tqdm.write(f"{job.name}: {len(busy)} shards are being made by other processes; waiting for them")
            run(busy, True, bar.update)


@contextlib.contextmanager
def _here(job: Job) -> Iterator[Callable]:
    """Function that makes shards in this process; returns those it left to others."""
    threads, show_bars = torch.get_num_threads(), not datasets.are_progress_bars_disabled()
    try:
        maker = ShardMaker(job, rank=0, processes=1)
        yield lambda tasks, wait_for_others, advance: [
            task for task in tasks if not maker.make(*task, wait_for_others, advance)
        ]
    finally:
        torch.set_num_threads(threads)
        if show_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _in_processes(job: Job, processes: int) -> Iterator[Callable]:
    """The same, spread over processes that live until the last shard; each builds its encoders once.

    Spawned, not forked: neither CUDA nor the threads of torch survive a fork. They end at once when this process ends
    in any way, or is interrupted.
    """
    context = multiprocessing.get_context("spawn")
    ranks, ticks = context.Queue(), context.Queue()
    for rank in range(processes):
        ranks.put(rank)
    alive, ours = context.Pipe(duplex=False)  # closing `ours` ends the workers; so does the end of this process
    with ProcessPoolExecutor(processes, context, _start_worker, (job, processes, ranks, ticks, alive)) as pool:

        def run(tasks: Sequence[Task], wait_for_others: bool, advance: Callable[[int], Any]) -> list[Task]:
            with _interrupts_held():  # Ctrl-C is for this process, which ends the workers; they inherit the mask
                futures = {pool.submit(_make_in_worker, *task, wait_for_others): task for task in tasks}
            waiting, left = set(futures), []
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                left += [futures[future] for future in done if not future.result()]
                with contextlib.suppress(queue.Empty):
                    while True:
                        advance(ticks.get_nowait() if waiting else ticks.get(timeout=0.1))
            return left

        try:
            yield run
        except BrokenProcessPool:
            raise RunError(
                f"{job.name}: a worker process died, perhaps for want of memory: lower extraction.num_proc or"
                " batch_size; complete shards are kept and the same command goes on from them"
            ) from None
        except KeyboardInterrupt:
            ours.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            ours.close()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: dict[str, Any] = {}  # of a worker process: what _start_worker made


def _start_worker(job: Job, processes: int, ranks, ticks, alive) -> None:
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which an abrupt end would leak
    _worker.update(maker=ShardMaker(job, ranks.get(), processes), advance=ticks.put)


def _end_with_parent(alive) -> None:
    multiprocessing.connection.wait([alive])  # never written to: ready when its other end is closed
    os._exit(1)


def _make_in_worker(number: int, key: str, items: Sequence[Item], wait_for_others: bool) -> bool:
    return _worker["maker"].make(number, key, items, wait_for_others, _worker["advance"])


class ShardMaker:
    """Makes shards in this process, the `rank`-th of `processes` of the run; builds the encoders."""

    def __init__(self, job: Job, rank: int, processes: int):
        share = job.share
        device = pick_device(job.encoders.get("device", "cpu"), share.local_rank * processes + rank)
        self.job = job
        self.threads = max(1, len(os.sched_getaffinity(0)) // (processes * share.local_count))
        # Reading fills the cores; only large networks on the CPU are worth threads of their own.
        released = job.encoders["kind"] == "released"
        torch.set_num_threads(self.threads if device.type == "cpu" and released else 1)
        # A whole batch is read while a CUDA device encodes one; on the CPU both want the same cores.
        self.ahead = self.threads if device.type == "cpu" else max(self.threads, job.batch_size)
        datasets.disable_progress_bars()  # of every map
        _free_large_blocks()
        settings = {**job.encoders, "device": device}
        self.encoders = load_encoders(mode=job.mode, duration=job.duration, parts=job.parts, **settings)
        self.limits: dict[str, int] = {}  # part -> size of batch that did not fit; see FittingBatches

    def make(self, number: int, key: str, items: Sequence[Item], wait_for_others: bool, advance) -> bool:
        """Make a shard unless it is complete. False, with nothing done, when another process holds it."""
        with locked(self.job.file(number, ".lock"), wait=wait_for_others) as held:
            if held and self.job.is_complete(number, key):
                advance(len(items))
            elif held:
                self._make(number, key, items, advance)
            return held

    def _make(self, number: int, key: str, items: Sequence[Item], advance) -> None:
        """Read and encode `items` and write the shard: first the rows, last its record, which makes it complete."""
        job, usable = self.job, [item for item in items if item.problem is None]
        arrow, sidecar, work = (job.file(number, ending) for ending in (".arrow", ".json", ".partial"))
        advance(len(items) - len(usable))
        sidecar.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        try:
            with naming(arrow):
                work.mkdir()
                batches = _Batches(job, FittingBatches(self.encoders, self.limits), advance)
                with contextlib.closing(read_ahead(job, usable, self.threads, self.ahead)) as readings:
                    _map(job, usable, batches, readings, work / "rows.arrow")
                if batches.accepted:
                    sync(work / "rows.arrow")
                    os.replace(work / "rows.arrow", arrow)
                else:
                    arrow.unlink(missing_ok=True)
                shutil.rmtree(work)
            write_text(sidecar, _record(key, items, arrow, batches))
        except BaseException:
            arrow.unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)
            raise


def _record(key: str, items: Sequence[Item], arrow: Path, batches: "_Batches") -> str:
    record = {
        "key": key,
        "listed": len(items),
        "accepted": len(batches.accepted),
        "arrow_bytes": arrow.stat().st_size if batches.accepted else 0,
        "arrow_sha256": digest_of(arrow) if batches.accepted else "",
        "batch_size": batches.job.batch_size,
        "halved": batches.fitting.halved,
        "ids": batches.accepted,
        "rejects": [
            batches.rejects[item.id] if item.problem is None else _reject(item, *item.problem)
            for item in items
            if item.problem is not None or item.id in batches.rejects
        ],
    }
    return json.dumps(record) + "\n"


def _map(job: Job, items: Sequence[Item], batches: "_Batches", readings: Iterator, path: Path) -> None:
    """Run `datasets.map` over the items, a batch at a time, into the Arrow file at `path`."""
    if not items:
        return
    text = datasets.Value("string")
    features = {name: datasets.Array2D(shape, "float32") for name, shape in job.shapes.items()}

    def encode_batch(batch: Mapping[str, list]) -> dict[str, Any]:
        return batches.encode([next(readings) for _ in batch["id"]])

    datasets.Dataset.from_dict({"id": [item.id for item in items]}).map(
        encode_batch,
        batched=True,
        batch_size=job.batch_size,
        writer_batch_size=job.batch_size,
        features=datasets.Features({"id": text, "caption": text, **features}),
        cache_file_name=str(path),
        load_from_cache_file=False,
        new_fingerprint=path.stem,
    )


# --- batches -----------------------------------------------------------------------------------------------------


class FittingBatches:
    """Runs an encoder on a batch; one that the memory does not hold is halved, and the halves again if need be.

    limits: part -> smallest size known not to fit, kept from shard to shard so that it is met once. A batch of any size
    is split in the same way whether or not the limit was known, so results do not depend on what was made before.
    """

    def __init__(self, encoders: Encoders, limits: dict[str, int]):
        self.encoders, self.limits = encoders, limits
        self.halved: dict[str, int] = {}  # part -> largest batch left where one was split

    def run(self, part: str, encode: Callable, inputs: Sequence, is_half: bool = False) -> list[torch.Tensor]:
        """Results of `encode(inputs)`, each (B, ...) on the CPU. RunError when not even one item fits."""
        if len(inputs) < self.limits.get(part, math.inf):
            try:
                results = [values.cpu() for values in encode(inputs)]
                if is_half:
                    self.halved[part] = max(len(inputs), self.halved.get(part, 0))
                return results
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0]
            if self.encoders.device.type == "cuda":
                torch.cuda.empty_cache()  # not above: the error holds on to what was computed
            if len(inputs) == 1:
                raise RunError(
                    f"the {part} encoder finds no memory on {self.encoders.device} for a single item ({reason}): end"
                    " what else uses the device, take a larger one, or set encoders.device=cpu; complete shards are"
                    " kept and the same command goes on from them"
                )
            self.limits[part] = len(inputs)
        middle = (len(inputs) + 1) // 2
        halves = [self.run(part, encode, half, True) for half in (inputs[:middle], inputs[middle:])]
        return [torch.cat(pair) for pair in zip(*halves, strict=True)]


class _Batches:
    """From media to rows, batch by batch; collects the accepted ids and the rejects of a shard."""

    def __init__(self, job: Job, fitting: FittingBatches, advance: Callable[[int], Any]):
        self.job, self.fitting, self.advance = job, fitting, advance
        self.accepted: list[str] = []
        self.rejects: dict[str, dict] = {}  # by id; the ids of a list differ

    def encode(self, read: list[tuple[Item, Any]]) -> dict[str, Any]:
        """Columns of the rows that can be used; `read` is emptied."""
        for item, media in read:
            if isinstance(media, MediaError):
                self.rejects[item.id] = _reject(item, "read", media.reason, str(media), media.probe)
        count, items = len(read), [item for item, media in read if not isinstance(media, MediaError)]
        inputs = self._inputs(read)
        values = self._encode(items, inputs) if items else {}
        usable = [place for place, item in enumerate(items) if self._is_finite(item, place, values)]
        self.accepted += [items[place].id for place in usable]
        self.advance(count)
        columns = {name: np.empty((0, *shape), np.float32) for name, shape in self.job.shapes.items()}
        if usable:
            whole = len(usable) == len(items)
            columns = {name: (value if whole else value[usable]).numpy() for name, value in values.items()}
        kept = [items[place] for place in usable]
        return {"id": [item.id for item in kept], "caption": [item.caption for item in kept], **columns}

    def _inputs(self, read: list[tuple[Item, Any]]) -> dict[str, list]:
        """What each encoder is given, one entry per item; empties `read`, so that each may be freed after its use."""
        inputs: dict[str, list] = {part: [] for part in self.job.parts}
        for item, media in read:
            if isinstance(media, MediaError):
                continue
            inputs["text"].append(item.caption)
            inputs["latent"].append(media.audio if self.job.video else media)
            if self.job.video:
                inputs["clip"].append(media.clip_frames)
                inputs["sync"].append(media.sync_frames)
        read.clear()
        return inputs

    def _encode(self, items: Sequence[Item], inputs: dict[str, list]) -> dict[str, torch.Tensor]:
        encoders = self.fitting.encoders
        encode = {
            "clip": lambda frames: [encoders.encode_clip(torch.stack(frames))],
            "sync": lambda frames: [encoders.encode_sync(torch.stack(frames))],
            "text": lambda captions: [encoders.encode_text(captions)],
            "latent": lambda waveforms: encoders.encode_audio(torch.stack(waveforms)),
        }
        columns = {"clip": [CLIP_FEATURES], "sync": [SYNC_FEATURES], "text": [TEXT_FEATURES], "latent": [MEAN, STD]}
        values, captions = {}, inputs["text"]
        inputs["text"] = list(dict.fromkeys(captions))  # clips of a recording share theirs
        places = {caption: place for place, caption in enumerate(inputs["text"])}
        for part in self.job.parts:
            results = self.fitting.run(part, encode[part], inputs.pop(part))
            values |= dict(zip(columns[part], results, strict=True))
        values[TEXT_FEATURES] = values[TEXT_FEATURES][[places[caption] for caption in captions]]
        return {name: values[name] for name in self.job.shapes}

    def _is_finite(self, item: Item, place: int, values: Mapping[str, torch.Tensor]) -> bool:
        for name, value in values.items():
            if not value[place].isfinite().all():
                message = f"{item.path}: {name} are not finite; look at the file and encoders.precision"
                self.rejects[item.id] = _reject(item, "encode", "not_finite", message)
                return False
        return True


def _reject(item: Item, stage: str, reason: str, message: str, facts: Mapping | None = None) -> dict[str, Any]:
    return {"id": item.id, "stage": stage, "reason": reason, "message": message, "facts": dict(facts or {})}


def _free_large_blocks() -> None:
    """Have glibc give blocks of 8 MB and more back to the system when they are freed.

    Of itself it raises that threshold to 32 MB when the first pictures of a video are freed, and keeps later ones for
    reuse in each of the heaps of the reading threads.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
