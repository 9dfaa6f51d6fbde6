"""The numbered Arrow shards of one extraction: what each is made of, its files, its lock, and who makes it.

    FOLDER/NAME.shards/shard_00012.arrow   rows of the list's 12th block: id, caption and a column per feature
    FOLDER/NAME.shards/shard_00012.json    key, counts, ids and rejects of that block; written last
    FOLDER/NAME.shards/*.lock              locked by the process that makes the shard or exports the store; empty

FOLDER is `extraction.shards_dir`, or else `extraction.output_dir`. The key of a shard is a hash of everything that its
features depend on.

Processes read media ahead, encode batches and write a shard with one `datasets.map`. Its batches are runs of
`batch_size` items of its block of the list, in order, less those that cannot be read: so they depend on list and
files alone, not on which process makes the shard, when, or on other shards.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av.error
import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmaudio_hf import files, schema
from mmaudio_hf.config import AudioSource, Recipe, VideoSource
from mmaudio_hf.features.encoders import Encoders, fingerprints, load_encoders, pick_device
from mmaudio_hf.media.audio import read_audio_clips
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.video import VideoClip, read_video

# Part of every key: raise it when the same inputs give other features. 2: audio lies where its timestamps say, after
# holes and overlaps too.
VERSION = 2
_REFERENCE_VERSION = 1  # of `alignment: reference`, which stays as published

_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 8 << 20

Media = VideoClip | Tensor


@dataclass(frozen=True)
class Item:
    """One row of the store to be: a video, or a clip of an audio file.

    problem: a known (stage, reason, message) to reject it for; its file is not opened then.
    """

    id: str
    caption: str
    path: str
    span: tuple[int, int] | None = None  # samples of the audio file; None for videos
    problem: tuple[str, str, str] | None = None
    start: float = 0.0  # s into the video
    audio_offset: float = 0.0  # s that its audio is late, which is corrected


@dataclass(frozen=True)
class Shard:
    """A block of the list, with the key of what its features depend on."""

    number: int
    key: str
    items: Sequence[Item]


class Job:
    """The extraction of one source of a recipe; it is sent to the worker processes."""

    def __init__(self, recipe: Recipe, source: VideoSource | AudioSource, share: files.Share):
        self.recipe, self.source, self.share = recipe, source, share
        self.name, self.is_video = source.name, isinstance(source, VideoSource)
        self.output_dir = Path(recipe.extraction.output_dir)  # of the store
        self.folder = Path(recipe.extraction.shards_dir or self.output_dir) / f"{self.name}.shards"
        self.offsets_file = self.output_dir / f"{self.name}.offsets.json"  # id -> s that its audio was late
        self.duration = recipe.clip_seconds(source)  # s of a clip
        # Clips of audio files always have the same peak.
        self.normalize_audio = not isinstance(source, VideoSource) or source.normalize_audio
        self.components = ("clip", "sync", "text", "latent") if self.is_video else ("text", "latent")
        self.shapes = schema.column_shapes(recipe.model.mode, self.duration, video=self.is_video)  # of one row
        # Settings that determine the inputs of the encoders.
        self.preprocessing: dict = {"version": VERSION, "mode": recipe.model.mode, "duration": float(self.duration)}
        alignment = recipe.extraction.alignment
        if self.is_video:
            self.preprocessing |= {"alignment": alignment, "normalize_audio": self.normalize_audio}
        if self.is_video and alignment == "reference":
            self.preprocessing["version"] = _REFERENCE_VERSION
        self.changed_message = (  # two runs of different inputs use the same folder
            f"{self.folder}: another run with other settings, list or media makes these shards again; let it end, then"
            " start this one again"
        )

    @property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """The encoders, as in the manifest of the store."""
        return fingerprints(self.recipe.encoders, self.recipe.model.mode, self.components)

    def shards(self, items: Sequence[Item]) -> tuple[str, list[Shard]]:
        """Key of the store, and the items in blocks of `extraction.shard_size` with their keys.

        A key hashes settings, encoders, ids, captions, and sizes and times of the files. Batch size and number of
        processes are left out: they move results by rounding at most, and machines that share a folder may differ.
        """
        settings = {"schema": schema.SCHEMA_VERSION, "preprocessing": self.preprocessing, "encoders": self.fingerprints}
        known: dict[str, tuple[int, int] | None] = {}
        rows: list[list] = []
        for item in items:
            if item.path not in known:
                known[item.path] = files.file_key(item.path)
            reason = item.problem and item.problem[:2]
            span = ["start", item.start] if item.start else item.span
            shifted = [item.audio_offset] if item.audio_offset else []
            rows.append([item.id, item.caption, Path(item.path).name, span, reason, known[item.path], *shifted])
        size = self.recipe.extraction.shard_size
        blocks = [slice(first, first + size) for first in range(0, len(items), size)]
        shards = [Shard(i, files.hash_of([settings, rows[block]]), items[block]) for i, block in enumerate(blocks)]
        return files.hash_of([settings, rows]), shards

    def file(self, number: int, ending: str) -> Path:
        """A file of shard `number`."""
        return self.folder / f"shard_{number:05d}{ending}"

    def metadata(self, shard: Shard) -> dict[str, Any]:
        """The JSON of a complete shard: there, of its full size, and made of what its key says; else {}."""
        metadata, arrow = files.read_json(self.file(shard.number, ".json")), self.file(shard.number, ".arrow")
        size = arrow.stat().st_size if arrow.is_file() else 0
        return metadata if (metadata.get("key"), metadata.get("arrow_bytes")) == (shard.key, size) else {}

    def rows(self, shard: Shard) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
        """(id, caption, {column: (*shape)}) of every row of a complete shard, which is memory-mapped.

        It is locked meanwhile. RunError if another run has made it again of other inputs, or if it was damaged.
        """
        path, metadata_file = (self.file(shard.number, ending) for ending in (".arrow", ".json"))
        # Who has made it holds the lock a moment longer than until its metadata are there.
        complete = bool(self.metadata(shard))
        with files.locked(self.file(shard.number, ".lock"), wait=complete, shared=True) as acquired:
            metadata = self.metadata(shard)
            if not (acquired and metadata):
                raise schema.RunError(self.changed_message)
            if not metadata["accepted"]:
                return
            checksum = metadata.get("arrow_sha256")  # None: of an earlier version
            if checksum and checksum != files.sha256_of(path):
                metadata_file.unlink()
                raise schema.RunError(
                    f"{path} is not what was written (its checksum differs; check the disk): the same command makes"
                    " this shard again"
                )
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                for batch in reader:
                    values = {}
                    for name, shape in self.shapes.items():
                        numbers = batch.column(name).storage.flatten().flatten()
                        values[name] = numbers.to_numpy().reshape(len(batch), *shape)
                    captions = batch.column("caption").to_pylist()
                    for i, item_id in enumerate(batch.column("id").to_pylist()):
                        yield item_id, captions[i], {name: value[i].copy() for name, value in values.items()}

    def remove_stale(self, count: int) -> None:
        """Remove shards from number `count` on, which a longer list left behind; not those another run is making."""
        numbers = {int(name[1]) for path in self.folder.iterdir() if (name := re.match(r"shard_(\d{5,})\.", path.name))}
        for number in sorted(number for number in numbers if number >= count):
            with files.locked(self.file(number, ".lock"), wait=False) as acquired:
                if acquired:
                    shutil.rmtree(self.file(number, ".partial"), ignore_errors=True)
                    for path in self.folder.glob(f"{self.file(number, '').name}.*"):
                        path.unlink(missing_ok=True)


def reject_of(item: Item, stage: str, reason: str, message: str, probe: Mapping | None = None) -> dict[str, Any]:
    """A line of NAME.rejects.jsonl; probe: what is known of the streams of the file."""
    return {"id": item.id, "stage": stage, "reason": reason, "message": message, "facts": dict(probe or {})}


# --- The processes that make them --------------------------------------------------------------------------------


MakeShards = Callable[[Sequence[Shard], bool, Callable[[int], Any]], list[Shard]]
"""(shards, wait for other processes, progress by items) -> the shards that other processes are making."""


def make_shards(job: Job, shards: Sequence[Shard], progress: bool) -> None:
    """Make the shards that are not complete; when it returns, each was made here or is complete by another process.

    Shards that other processes are making are left for last and then waited for, in case they do not finish them.
    """
    pending = [shard for shard in shards if not job.metadata(shard)]
    if not pending:
        return
    total, remaining = (sum(len(shard.items) for shard in some) for some in (shards, pending))
    done = total - remaining
    with tqdm(total=total, initial=done, desc=job.name, unit="item", disable=not progress, smoothing=0.1) as bar:
        processes = min(job.recipe.extraction.num_proc, len(pending))
        with _this_process(job) if processes == 1 else _process_pool(job, processes) as make:
            busy = make(pending, False, bar.update)
            if busy and progress:
                tqdm.write(f"{job.name}: {len(busy)} shards are being made by other processes; waiting for them")
            make(busy, True, bar.update)


@contextlib.contextmanager
def _this_process(job: Job) -> Iterator[MakeShards]:
    threads, show_bars = torch.get_num_threads(), not datasets.are_progress_bars_disabled()
    try:
        maker = ShardMaker(job, rank=0, processes=1)
        yield lambda shards, wait_for_others, advance: [
            shard for shard in shards if not maker.make(shard, wait_for_others, advance)
        ]
    finally:
        torch.set_num_threads(threads)
        if show_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _process_pool(job: Job, processes: int) -> Iterator[MakeShards]:
    """Processes that live until the last shard; each builds its encoders once.

    Spawned, not forked: neither CUDA nor the threads of torch survive a fork. They end at once when this process ends
    in any way, or is interrupted.
    """
    context = multiprocessing.get_context("spawn")
    ranks, ticks = context.Queue(), context.Queue()
    for rank in range(processes):
        ranks.put(rank)
    alive, ours = context.Pipe(duplex=False)  # closing `ours` ends the workers; so does the end of this process
    with ProcessPoolExecutor(processes, context, _start_worker, (job, processes, ranks, ticks, alive)) as pool:

        def make(shards: Sequence[Shard], wait_for_others: bool, advance: Callable[[int], Any]) -> list[Shard]:
            # Ctrl-C is for this process, which ends the workers; they inherit the mask.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = {pool.submit(_make_in_worker, shard, wait_for_others): shard for shard in shards}
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            waiting, busy = set(futures), []
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                busy += [futures[future] for future in done if not future.result()]
                with contextlib.suppress(queue.Empty):
                    while True:
                        advance(ticks.get_nowait() if waiting else ticks.get(timeout=0.1))
            return busy

        try:
            yield make
        except BrokenProcessPool:
            raise schema.RunError(
                f"{job.name}: a worker process died, perhaps out of memory: lower extraction.num_proc or batch_size;"
                f" {files.RESUME_HINT}"
            ) from None
        except KeyboardInterrupt:
            ours.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            ours.close()


_worker: dict[str, Any] = {}  # of a worker process: what _start_worker made


def _start_worker(job: Job, processes: int, ranks: Any, ticks: Any, alive: Any) -> None:
    def end_with_parent() -> None:
        multiprocessing.connection.wait([alive])  # never written to: ready when its other end is closed
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which an abrupt end would leak
    _worker.update(maker=ShardMaker(job, ranks.get(), processes), advance=ticks.put)


def _make_in_worker(shard: Shard, wait_for_others: bool) -> bool:
    return _worker["maker"].make(shard, wait_for_others, _worker["advance"])


class ShardMaker:
    """Makes shards in this process, the `rank`-th of `processes` of the run; loads the encoders."""

    def __init__(self, job: Job, rank: int, processes: int):
        share, config = job.share, job.recipe.encoders
        device = pick_device(config.device, share.local_rank * processes + rank)
        self.job = job
        self.threads = max(1, len(os.sched_getaffinity(0)) // (processes * share.local_count))
        # Reading fills the cores; only large networks on the CPU are worth threads of their own.
        torch.set_num_threads(self.threads if device.type == "cpu" and config.kind == "released" else 1)
        # A whole batch is read while a CUDA device encodes one; on the CPU both want the same cores.
        self.ahead = self.threads if device.type == "cpu" else max(self.threads, job.recipe.extraction.batch_size)
        datasets.disable_progress_bars()  # of every map
        # Blocks of 8 MB and more return to the system when they are freed. By default glibc raises that threshold to
        # 32 MB when the first frames are freed, and keeps later ones in the heaps of each of the reading threads.
        _glibc("mallopt", _M_MMAP_THRESHOLD, _MMAP_BYTES)
        model = job.recipe.model
        self.encoders = load_encoders(config, model.mode, job.components, device=device, duration=job.duration)
        self.limits: dict[str, int] = {}  # component -> batch size that did not fit; see FittingBatches

    def make(self, shard: Shard, wait_for_others: bool, advance: Callable[[int], Any]) -> bool:
        """Make a shard unless it is complete. False, with nothing done, when another process has its lock."""
        with files.locked(self.job.file(shard.number, ".lock"), wait=wait_for_others) as acquired:
            if acquired and self.job.metadata(shard):
                advance(len(shard.items))
            elif acquired:
                self._make(shard, advance)
                gc.collect()  # graphs and frames in reference cycles, 15 MB of 64 videos
                _glibc("malloc_trim", 0)
            return acquired

    def _make(self, shard: Shard, advance: Callable[[int], Any]) -> None:
        job, usable = self.job, [item for item in shard.items if item.problem is None]
        arrow, metadata, work = (job.file(shard.number, ending) for ending in (".arrow", ".json", ".partial"))
        advance(len(shard.items) - len(usable))
        metadata.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        try:
            with files.add_path_to_oserror(arrow, files.RESUME_HINT):
                work.mkdir()
                batches = _Batches(job, FittingBatches(self.encoders, self.limits), advance)
                with contextlib.closing(read_ahead(job, usable, self.threads, self.ahead)) as reader:
                    _map(job, usable, batches, reader, work / "rows.arrow")
                if batches.accepted:
                    files.fsync_path(work / "rows.arrow")
                    os.replace(work / "rows.arrow", arrow)
                else:
                    arrow.unlink(missing_ok=True)
                shutil.rmtree(work)
            entries = {
                "key": shard.key,
                "listed": len(shard.items),
                "accepted": len(batches.accepted),
                "arrow_bytes": arrow.stat().st_size if batches.accepted else 0,
                "arrow_sha256": files.sha256_of(arrow) if batches.accepted else "",
                "batch_size": job.recipe.extraction.batch_size,
                "halved": batches.fitting.reduced,
                "ids": batches.accepted,
                "rejects": [
                    reject_of(item, *item.problem) if item.problem else batches.rejects[item.id]
                    for item in shard.items
                    if item.problem or item.id in batches.rejects
                ],
            }
            files.write_text(metadata, json.dumps(entries) + "\n")
        except BaseException:
            arrow.unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)
            raise


def _map(job: Job, items: Sequence[Item], batches: "_Batches", reader: Iterator, path: Path) -> None:
    if not items:
        return
    text, size = datasets.Value("string"), job.recipe.extraction.batch_size
    columns = {name: datasets.Array2D(shape, "float32") for name, shape in job.shapes.items()}

    def encode_batch(batch: Mapping[str, list]) -> dict[str, Any]:
        return batches.encode([next(reader) for _ in batch["id"]])

    datasets.Dataset.from_dict({"id": [item.id for item in items]}).map(
        encode_batch,
        batched=True,
        batch_size=size,
        writer_batch_size=size,
        features=datasets.Features({"id": text, "caption": text, **columns}),
        cache_file_name=str(path),
        load_from_cache_file=False,
        new_fingerprint=path.stem,
    )


# --- Batches through the encoders ------------------------------------------------------------------------------------


class FittingBatches:
    """Runs an encoder on a batch; after out-of-memory the batch is halved, and the halves again if need be.

    limits: component -> smallest size known not to fit, kept from shard to shard so that it is met once. A batch of any
    size is split in the same way whether or not the limit was known, so results do not depend on earlier shards.
    """

    def __init__(self, encoders: Encoders, limits: dict[str, int]):
        self.encoders, self.limits = encoders, limits
        self.reduced: dict[str, int] = {}  # component -> largest batch that fitted where one was split

    def run(self, component: str, encode: Callable, inputs: Sequence, is_half: bool = False) -> list[Tensor]:
        """Results of `encode(inputs)`, each (B, ...) on the CPU. RunError when not even one item fits."""
        if len(inputs) < self.limits.get(component, math.inf):
            try:
                results = [values.cpu() for values in encode(inputs)]
                if is_half:
                    self.reduced[component] = max(len(inputs), self.reduced.get(component, 0))
                return results
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0]
            if self.encoders.device.type == "cuda":
                torch.cuda.empty_cache()  # not above: the error holds references to what was computed
            if len(inputs) == 1:
                raise schema.RunError(
                    f"the {component} encoder is out of memory on {self.encoders.device} for a single item ({reason}):"
                    " end other programs on the device, take a larger one, or set encoders.device=cpu;"
                    f" {files.RESUME_HINT}"
                )
            self.limits[component] = len(inputs)
        middle = (len(inputs) + 1) // 2
        halves = [self.run(component, encode, half, True) for half in (inputs[:middle], inputs[middle:])]
        return [torch.cat(pair) for pair in zip(*halves, strict=True)]


class _Batches:
    """From media to rows, batch by batch; collects the accepted ids and the rejects of a shard."""

    def __init__(self, job: Job, fitting: FittingBatches, advance: Callable[[int], Any]):
        self.job, self.fitting, self.advance = job, fitting, advance
        self.accepted: list[str] = []
        self.rejects: dict[str, dict] = {}  # by id; the ids of items without a known problem differ

    def encode(self, read: list[tuple[Item, Media | MediaError]]) -> dict[str, Any]:
        """Columns of the rows that can be used; `read` is emptied, so that each input may be freed after its use."""
        count, items = len(read), []
        inputs: dict[str, list] = {component: [] for component in self.job.components}
        for item, media in read:
            if isinstance(media, MediaError):
                self.rejects[item.id] = reject_of(item, "read", media.reason, str(media), media.probe)
                continue
            items.append(item)
            inputs["text"].append(item.caption)
            inputs["latent"].append(media.audio if isinstance(media, VideoClip) else media)
            if isinstance(media, VideoClip):
                inputs["clip"].append(media.clip_frames)
                inputs["sync"].append(media.sync_frames)
        read.clear()
        del media  # the last one
        values = self._encode(inputs) if items else {}
        rows = []
        for row, item in enumerate(items):
            if name := next((name for name, value in values.items() if not value[row].isfinite().all()), ""):
                message = f"{item.path}: {name} are not finite; check the file and encoders.precision"
                self.rejects[item.id] = reject_of(item, "encode", "not_finite", message)
            else:
                rows.append(row)
        self.accepted += [items[row].id for row in rows]
        self.advance(count)
        columns = {name: np.empty((0, *shape), np.float32) for name, shape in self.job.shapes.items()}
        if rows:
            columns = {name: value[rows].numpy() for name, value in values.items()}
        return {"id": [items[row].id for row in rows], "caption": [items[row].caption for row in rows], **columns}

    def _encode(self, inputs: dict[str, list]) -> dict[str, Tensor]:
        encoders = self.fitting.encoders
        encode: dict[str, Callable] = {
            "clip": lambda frames: [encoders.encode_clip(torch.stack(frames))],
            "sync": lambda frames: [encoders.encode_sync(torch.stack(frames))],
            "text": lambda captions: [encoders.encode_text(captions)],
            "latent": lambda waveforms: encoders.encode_audio(torch.stack(waveforms)),
        }
        columns = {
            "clip": [schema.CLIP_FEATURES],
            "sync": [schema.SYNC_FEATURES],
            "text": [schema.TEXT_FEATURES],
            "latent": [schema.MEAN, schema.STD],
        }
        values: dict[str, Tensor] = {}
        captions = inputs["text"]
        inputs["text"] = list(dict.fromkeys(captions))  # clips of one audio file share its captions
        index = {caption: i for i, caption in enumerate(inputs["text"])}
        for component in self.job.components:
            results = self.fitting.run(component, encode[component], inputs.pop(component))
            values |= dict(zip(columns[component], results, strict=True))
        values[schema.TEXT_FEATURES] = values[schema.TEXT_FEATURES][[index[caption] for caption in captions]]
        return {name: values[name] for name in self.job.shapes}


# --- Reading media ahead of the encoders, by threads, a bounded number of files at a time ----------------------------


def read_ahead(
    job: Job, items: Sequence[Item], threads: int, ahead: int
) -> Generator[tuple[Item, Media | MediaError], None, None]:
    """Yield each item with its VideoClip, waveform or MediaError, in order; threads read up to `ahead` files further.

    A video of 8 s is 58 MB. Close the generator to stop the threads.
    """
    # The clips of an audio file share one reading; those of a video are 58 MB each and are read one by one.
    groups = (list(group) for _, group in itertools.groupby(items, key=lambda item: (item.path, item.start)))
    waiting: deque[tuple[list[Item], Future]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for group in itertools.chain(groups, [None] * ahead):  # at the end, what is still waiting
                if group is not None:
                    waiting.append((group, pool.submit(_read_group, job, group)))
                if waiting and (group is None or len(waiting) > ahead):
                    read, future = waiting.popleft()
                    media = deque(future.result())
                    del future  # nothing keeps a reference to what is yielded
                    for item in read:
                        yield item, media.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


def _read_group(job: Job, items: Sequence[Item]) -> list[Media | MediaError]:
    path, model = items[0].path, job.recipe.model
    try:
        if job.is_video:
            how: dict[str, Any] = {"mode": model.mode, "duration": job.duration, "as_uint8": True}
            how |= {"alignment": job.recipe.extraction.alignment, "normalize_audio": job.normalize_audio}
            return [read_video(path, start=item.start, audio_offset=item.audio_offset, **how) for item in items]
        spans = list(dict.fromkeys(item.span for item in items if item.span))
        clips = dict(zip(spans, read_audio_clips(path, spans, mode=model.mode, duration=job.duration), strict=True))
        return [clips[item.span] for item in items if item.span]
    except MediaError as error:
        return [error] * len(items)
    except Exception as error:
        if isinstance(error, (OSError, MemoryError)) and not isinstance(error, av.error.FFmpegError):
            raise  # the machine's fault, not the file's
        return [MediaError("unexpected", f"{path}: reading failed ({error!r}); re-encode the file")] * len(items)


def _glibc(function: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError):  # another C library
        getattr(ctypes.CDLL(None), function)(*arguments)
