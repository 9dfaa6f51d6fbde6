"""Extraction: listed media to feature shards, one `datasets.map` each, and from the shards to a feature store.

    OUTPUT/NAME.shards/shard_00012.arrow   rows of the list's 12th part: id, caption and a column per feature
    OUTPUT/NAME.shards/shard_00012.json    key, counts, ids and rejects of that part; written last
    OUTPUT/NAME.rejects.jsonl              every item left out: id, stage, reason, message, facts
    OUTPUT/NAME/                           the store, by the writer that is handed in

The key of a shard is a hash of all that it depends on. A run makes the shards whose key has changed or that are
missing, so it may be killed at any time, and the next one goes on where it was; the store comes out the same.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av.error
import datasets
import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from mmaudio_hf.features.encoders import (
    Encoders,
    check_encoders,
    fingerprints,
    fit_toy_codec,
    load_encoders,
    pick_device,
    toy_codec_file,
)
from mmaudio_hf.media.audio import MediaError, cut_audio_clip, read_waveform
from mmaudio_hf.media.clips import find_recording, find_video, read_clips, read_media_list
from mmaudio_hf.media.video import ALIGNMENTS, read_video
from mmaudio_hf.schema import (
    CLIP_FEATURES,
    MEAN,
    SCHEMA_VERSION,
    STD,
    SYNC_FEATURES,
    TEXT_FEATURES,
    check_id,
    column_shapes,
)

VERSION = 1  # part of every key: raise it when the same inputs give other features

_AUDIO_PEAK = 0.95
_EXPORT_ROWS = 32  # 38 MB of features of 8 s


@dataclass(frozen=True)
class ExtractionReport:
    """What became of a list. accepted + rejected = listed; `missing` counts the rejects whose file was not found."""

    name: str
    listed: int
    accepted: int
    rejected: int
    missing: int
    shards: int
    reused_shards: int  # complete from an earlier run
    store_path: Path
    rejects_path: Path
    seconds: float

    def __str__(self) -> str:
        left_out = f", {self.rejected} rejected ({self.missing} not found), see {self.rejects_path}"
        kept = f", {self.reused_shards} of {self.shards} shards kept" if self.reused_shards else ""
        return (
            f"{self.name}: {self.accepted} of {self.listed} in {self.store_path}"
            f"{left_out if self.rejected else ''}{kept}, {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class _Item:
    """One row to be: a video, or a clip of a recording. `problem`: known (stage, reason, message) to reject it for."""

    id: str
    caption: str
    path: str
    span: tuple[int, int] | None = None  # samples of the recording; None for videos
    problem: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class _Job:
    """What the extraction of one list depends on, as it goes to the worker processes."""

    name: str
    output_dir: Path
    video: bool
    mode: str
    duration: float
    alignment: str
    normalize_audio: bool
    encoders: dict[str, Any]  # arguments of load_encoders
    batch_size: int
    num_proc: int
    shard_size: int

    @property
    def folder(self) -> Path:
        return self.output_dir / f"{self.name}.shards"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("clip", "sync", "text", "latent") if self.video else ("text", "latent")

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return column_shapes(self.mode, self.duration, video=self.video)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Settings that shape what the encoders are given."""
        settings = {"version": VERSION, "mode": self.mode, "duration": self.duration}
        if self.video:
            settings |= {"alignment": self.alignment, "normalize_audio": self.normalize_audio}
        return settings

    @property
    def weights(self) -> dict[str, Any]:
        return {name: value for name, value in self.encoders.items() if name not in ("kind", "device")}

    @property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        return fingerprints(self.encoders["kind"], self.mode, **self.weights, parts=self.parts)


def extract_video(
    name: str,
    media_dir: str | os.PathLike,
    list_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    encoders: Mapping[str, Any],
    mode: str,
    open_writer: Callable,
    duration: float = 8.0,
    alignment: str = "timestamps",
    normalize_audio: bool = True,
    batch_size: int = 16,
    num_proc: int = 1,
    shard_size: int = 512,
    problems: Mapping[str, tuple[str, str]] | None = None,
    progress: bool = True,
) -> ExtractionReport:
    """Make the feature store `output_dir/name` of the videos `media_dir/ID.mp4` listed in a TSV (`id`, `label`).

    encoders: the arguments of `load_encoders` without mode, duration and parts, as in {"kind": "toy", "weights_dir":
    ..., "clip": "", "precision": "fp32", "device": "auto"}; the toy codec is fitted to these media if there is none.
    open_writer: `StoreWriter`, or what takes its arguments. batch_size: rows per batch of the Arrow files. num_proc:
    processes; process i uses CUDA device i modulo their number. shard_size: rows of the list per shard.
    problems: id of a video -> (reason, message) of what is known to be wrong with it, from an audit; such a video is
    a reject of the stage "audit" and its file is not opened.

    A file that cannot be used is rejected, never fatal. Raises ValueError for mistakes in settings, lists and folders
    before any work, when the disk is too small, and when every item was rejected (then there is no store).
    """
    job = _Job(
        name, Path(output_dir), True, mode, float(duration), alignment, normalize_audio, dict(encoders), batch_size,
        num_proc, shard_size,
    )  # fmt: skip
    _check_settings(job, media_dir)
    items = []
    for row in read_media_list(list_path, "label"):
        path = find_video(media_dir, row.id)
        problem = _audit_problem(problems, row.id)
        if not path.is_file():
            problem = ("list", "not_found", f"{path}: no such file; check the folder and the id")
        items.append(_Item(row.id, row.caption, str(path), problem=problem))
    return _extract(job, items, list_path, open_writer, progress)


def extract_audio(
    name: str,
    media_dir: str | os.PathLike,
    list_path: str | os.PathLike,
    clips_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    encoders: Mapping[str, Any],
    mode: str,
    open_writer: Callable,
    duration: float = 8.0,
    batch_size: int = 16,
    num_proc: int = 1,
    shard_size: int = 512,
    problems: Mapping[str, tuple[str, str]] | None = None,
    progress: bool = True,
) -> ExtractionReport:
    """Make the feature store `output_dir/name` of the clips in `clips_path` of recordings in `media_dir`.

    `list_path` is a TSV of captions (`id` of the recording, `caption`; several rows per id allowed). Every clip gives
    one row for each different caption of its recording: the first has the id of the clip, the n-th that id and
    `.n`. A clip whose recording has no caption is rejected as no_caption, a listed recording without any clip as
    no_clip. `problems` is keyed by the name of the recording. The rest is as for `extract_video`.
    """
    job = _Job(
        name, Path(output_dir), False, mode, float(duration), "timestamps", True, dict(encoders), batch_size, num_proc,
        shard_size,
    )  # fmt: skip
    _check_settings(job, media_dir)
    if not Path(clips_path).is_file():
        raise ValueError(f"{clips_path}: no such clip list; make it with `mmaudio-hf partition`")
    captions: dict[str, dict[str, None]] = {}
    for row in read_media_list(list_path, "caption"):
        captions.setdefault(row.id, {})[row.caption] = None
    items, paths = [], {}
    for clip in read_clips(clips_path):
        if clip.name not in paths:
            paths[clip.name] = _find_recording(Path(media_dir), clip.name)
        path, problem = paths[clip.name]
        problem = problem or _audit_problem(problems, clip.name)
        if clip.name not in captions:
            problem = (
                "list",
                "no_caption",
                f"{list_path}: has no caption for {clip.name!r}; add a row or remove the clip",
            )
        for number, caption in enumerate(captions.get(clip.name, {"": None}), start=1):
            row_id = clip.id if number == 1 else f"{clip.id}.{number}"
            items.append(_Item(row_id, caption, path, (clip.start_sample, clip.end_sample), problem))
    repeated = [item_id for item_id, count in Counter(item.id for item in items).items() if count > 1]
    if repeated:
        raise ValueError(f"{clips_path}: clip {repeated[0]!r} has the id of another clip's second caption; rename it")
    for name in captions:
        if name not in paths:
            message = f"{clips_path}: has no clip of {name!r}; it is absent, damaged or shorter than 8.1 s"
            items.append(_Item(name, "", str(Path(media_dir) / name), problem=("list", "no_clip", message)))
    return _extract(job, items, list_path, open_writer, progress)


# --- before the work ---------------------------------------------------------------------------------------------


def _check_settings(job: _Job, media_dir) -> None:
    check_id(job.name, "name of the store")
    if "." in job.name:
        raise ValueError(f"store name {job.name!r} has a dot: other readers would look for another .tsv")
    if job.alignment not in ALIGNMENTS:
        raise ValueError(f"alignment {job.alignment!r}: use one of {', '.join(ALIGNMENTS)}")
    for setting in ("batch_size", "num_proc", "shard_size"):
        if getattr(job, setting) < 1:
            raise ValueError(f"extraction.{setting} must be at least 1")
    job.shapes  # noqa: B018  (checks mode and duration)
    pick_device(job.encoders.get("device", "cpu"))
    if not Path(media_dir).is_dir():
        raise ValueError(f"{media_dir}: no such folder; it must hold the media of {job.name!r}")
    if job.output_dir.exists() and not job.output_dir.is_dir():
        raise ValueError(f"{job.output_dir} is a file; extraction.output_dir must be a folder")


def _audit_problem(problems: Mapping[str, tuple[str, str]] | None, name: str) -> tuple[str, str, str] | None:
    return ("audit", *problems[name]) if problems and name in problems else None


def _find_recording(folder: Path, name: str) -> tuple[str, tuple[str, str, str] | None]:
    try:
        return str(find_recording(folder, name)), None
    except MediaError as error:
        return str(folder / name), ("list", error.reason, str(error))


def _prepare_encoders(job: _Job, items: Sequence[_Item], list_path) -> None:
    """Refuse a list without media and encoders without files; fit the toy codec if there is none."""
    usable = [item for item in items if item.problem is None]
    if not usable:
        _, reason, message = items[0].problem
        raise ValueError(f"{list_path}: none of {len(items)} items can be used; the first: {reason}: {message}")
    kind, weights_dir = job.encoders["kind"], job.encoders["weights_dir"]
    if kind == "toy" and not toy_codec_file(weights_dir, job.mode).is_file():
        fit_toy_codec(weights_dir, job.mode, list(dict.fromkeys(item.path for item in usable)))
    check_encoders(kind, job.mode, **job.weights, parts=job.parts)


def _check_room(job: _Job, pending_rows: int, store_rows: int) -> None:
    row_bytes = 4 * sum(math.prod(shape) for shape in job.shapes.values())
    needed, free = (pending_rows + store_rows) * row_bytes, shutil.disk_usage(job.output_dir).free
    if needed > free:
        raise ValueError(
            f"{job.output_dir}: {needed / 1e9:.2f} GB are needed for the shards and the store of {job.name!r},"
            f" {free / 1e9:.2f} GB are free; make room or change extraction.output_dir"
        )


# --- the whole of it ---------------------------------------------------------------------------------------------


def _extract(job: _Job, items: list[_Item], list_path, open_writer: Callable, progress: bool) -> ExtractionReport:
    started = time.monotonic()
    store, record = job.output_dir / job.name, job.folder / "store.json"
    if store.exists() and not record.is_file():
        raise ValueError(f"{store} exists and was not made from {job.folder}: move it or give the store another name")
    _prepare_encoders(job, items, list_path)
    job.folder.mkdir(parents=True, exist_ok=True)
    with _locked(job):
        parts = [items[first : first + job.shard_size] for first in range(0, len(items), job.shard_size)]
        keys = _shard_keys(job, parts)
        _remove_strays(job, len(parts))
        pending = [number for number, key in enumerate(keys) if not _is_complete(job, number, key)]
        store_key = hashlib.sha256("".join(keys).encode()).hexdigest()
        current = not pending and store.exists() and _read_json(record).get("key") == store_key
        if not current:
            _check_room(job, sum(len(parts[number]) for number in pending), 0 if store.exists() else len(items))
        _make_shards(job, parts, keys, pending, progress)
        sidecars = [_read_json(_shard_file(job, number, ".json")) for number in range(len(parts))]
        report = _summary(job, len(items), sidecars, len(parts) - len(pending), started)
        _write_rejects(report, sidecars, list_path)
        if not current:
            _export(job, report, store_key, record, open_writer, progress)
    report = replace(report, seconds=time.monotonic() - started)
    if progress:
        tqdm.write(str(report))
    return report


@contextlib.contextmanager
def _locked(job: _Job) -> Iterator[None]:
    """Keep a second run of the same extraction away; the system frees the lock when the process ends in any way."""
    with open(job.folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{job.folder}: another process extracts {job.name!r} at the moment; wait for it"
            ) from None
        yield


def _shard_keys(job: _Job, parts: Sequence[Sequence[_Item]]) -> list[str]:
    settings = {"schema": SCHEMA_VERSION, "preprocessing": job.preprocessing, "encoders": job.fingerprints}
    facts: dict[str, list[int] | None] = {}
    keys = []
    for part in parts:
        rows = []
        for item in part:
            if item.path not in facts:
                facts[item.path] = _file_facts(item.path)
            reason = item.problem and item.problem[:2]
            rows.append([item.id, item.caption, Path(item.path).name, item.span, reason, facts[item.path]])
        keys.append(_hash([settings, rows]))
    return keys


def _file_facts(path: str) -> list[int] | None:
    with contextlib.suppress(OSError):
        facts = os.stat(path)
        return [facts.st_size, facts.st_mtime_ns]
    return None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _shard_file(job: _Job, number: int, ending: str) -> Path:
    return job.folder / f"shard_{number:05d}{ending}"


def _remove_strays(job: _Job, count: int) -> None:
    """Take away what killed runs and longer lists left behind."""
    for path in job.folder.iterdir():
        shard = re.match(r"shard_(\d{5,})\.", path.name)
        if path.suffix == ".partial":
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix == ".part" or (shard and int(shard[1]) >= count):
            path.unlink()


def _is_complete(job: _Job, number: int, key: str) -> bool:
    sidecar, arrow = _read_json(_shard_file(job, number, ".json")), _shard_file(job, number, ".arrow")
    size = arrow.stat().st_size if arrow.is_file() else 0
    return sidecar.get("key") == key and sidecar.get("arrow_bytes") == size


def _summary(job: _Job, listed: int, sidecars: Sequence[Mapping], reused: int, started: float) -> ExtractionReport:
    accepted = sum(sidecar["accepted"] for sidecar in sidecars)
    rejects = [reject for sidecar in sidecars for reject in sidecar["rejects"]]
    assert accepted + len(rejects) == listed
    return ExtractionReport(
        name=job.name,
        listed=listed,
        accepted=accepted,
        rejected=len(rejects),
        missing=sum(reject["reason"] == "not_found" for reject in rejects),
        shards=len(sidecars),
        reused_shards=reused,
        store_path=job.output_dir / job.name,
        rejects_path=job.output_dir / f"{job.name}.rejects.jsonl",
        seconds=time.monotonic() - started,
    )


def _write_rejects(report: ExtractionReport, sidecars: Sequence[Mapping], list_path) -> None:
    rejects = [reject for sidecar in sidecars for reject in sidecar["rejects"]]
    _write_text(report.rejects_path, "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects))
    if report.accepted == 0:
        reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(r["reason"] for r in rejects).most_common())
        raise ValueError(
            f"{list_path}: all {report.listed} items were rejected ({reasons}), so there is no store;"
            f" {report.rejects_path} says why"
        )


def _export(job: _Job, report: ExtractionReport, key: str, record: Path, open_writer: Callable, progress: bool) -> None:
    """Copy the shards into a new store, in the order of the list, a block of rows at a time."""
    if report.store_path.exists():  # of other shards; see `record` in _extract
        stale = report.store_path.with_name(f"{job.name}.partial")
        shutil.rmtree(stale, ignore_errors=True)
        os.rename(report.store_path, stale)
        shutil.rmtree(stale)
    # The record comes before the store, which appears by a renaming: a store beside a record is the one it names.
    _write_text(record, json.dumps({"key": key}) + "\n")
    with open_writer(
        report.store_path,
        job.shapes,
        report.accepted,
        mode=job.mode,
        duration=job.duration,
        encoders=job.fingerprints,
        preprocessing=job.preprocessing,
        normalisation={"audio_peak": _AUDIO_PEAK if job.normalize_audio else None},
        counts={"listed": report.listed, "accepted": report.accepted, "rejected": report.rejected},
    ) as writer:
        shards = (_shard_file(job, number, ".arrow") for number in range(report.shards))
        rows = itertools.chain.from_iterable(_rows(shard, job.shapes) for shard in shards)
        with tqdm(total=report.accepted, desc=f"{job.name}: store", unit="row", disable=not progress) as bar:
            for first in range(0, report.accepted, _EXPORT_ROWS):
                ids, captions, values = zip(*itertools.islice(rows, _EXPORT_ROWS), strict=True)
                stacked = {name: np.stack([row[name] for row in values]) for name in job.shapes}
                writer.write(first, ids, captions, stacked)
                bar.update(len(ids))


def _rows(path: Path, shapes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, str, dict]]:
    """(id, caption, {column: (*shape)}) of every row of a shard; the shard is mapped, not read."""
    if not path.is_file():  # every item was rejected
        return
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            values = {}
            for name, shape in shapes.items():
                numbers = batch.column(name).storage.flatten().flatten()
                values[name] = numbers.to_numpy().reshape(len(batch), *shape)
            for place, (item_id, caption) in enumerate(zip(batch.column("id"), batch.column("caption"), strict=True)):
                yield item_id.as_py(), caption.as_py(), {name: value[place].copy() for name, value in values.items()}


# --- shards ------------------------------------------------------------------------------------------------------


def _make_shards(job: _Job, parts, keys: Sequence[str], pending: Sequence[int], progress: bool) -> None:
    listed, waiting = sum(map(len, parts)), sum(len(parts[number]) for number in pending)
    if not pending:
        return
    tasks = [(number, keys[number], parts[number]) for number in pending]
    processes = min(job.num_proc, len(tasks))
    with tqdm(
        total=listed, initial=listed - waiting, desc=job.name, unit="item", disable=not progress, smoothing=0.1
    ) as bar:
        if processes == 1:
            _make_here(job, tasks, bar.update)
        else:
            _make_in_processes(job, tasks, processes, bar.update)


def _make_here(job: _Job, tasks: Sequence[tuple], advance: Callable[[int], Any]) -> None:
    threads, show_bars = torch.get_num_threads(), not datasets.are_progress_bars_disabled()
    try:
        tools = _start(job, rank=0, processes=1)
        for number, key, items in tasks:
            _make_shard(job, number, key, items, *tools, advance)
    finally:
        torch.set_num_threads(threads)
        if show_bars:
            datasets.enable_progress_bars()


def _make_in_processes(job: _Job, tasks: Sequence[tuple], processes: int, advance: Callable[[int], Any]) -> None:
    """Spread the shards over processes that live until the last one; each builds its encoders once.

    Spawned, not forked: neither CUDA nor the threads of torch survive a fork.
    """
    context = multiprocessing.get_context("spawn")
    ranks, ticks = context.Queue(), context.Queue()
    for rank in range(processes):
        ranks.put(rank)
    with ProcessPoolExecutor(processes, context, _start_worker, (job, processes, ranks, ticks)) as pool:
        futures = {pool.submit(_make_shard_in_worker, *task) for task in tasks}
        try:
            while futures:
                done, futures = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED)
                with contextlib.suppress(queue.Empty):
                    while True:
                        advance(ticks.get_nowait() if futures else ticks.get(timeout=0.1))
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"{job.name}: a worker process died, perhaps for want of memory: lower extraction.num_proc or"
                " batch_size; complete shards are kept and the next run goes on from them"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}  # of a worker process: what _start_worker made


def _start_worker(job: _Job, processes: int, ranks, ticks) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(job=job, tools=_start(job, ranks.get(), processes), advance=ticks.put)


def _end_with_parent() -> None:
    """Workers wait for tasks for ever when the main process is killed; end with it."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _make_shard_in_worker(number: int, key: str, items: Sequence[_Item]) -> None:
    _make_shard(_worker["job"], number, key, items, *_worker["tools"], _worker["advance"])


def _start(job: _Job, rank: int, processes: int) -> tuple[Encoders, int]:
    """The encoders of process `rank` and its number of reading threads; sets the threads of torch."""
    cores = max(1, len(os.sched_getaffinity(0)) // processes)
    device = pick_device(job.encoders.get("device", "cpu"), rank)
    # Reading fills the cores; only large networks on the CPU are worth threads of their own.
    torch.set_num_threads(cores if device.type == "cpu" and job.encoders["kind"] == "released" else 1)
    datasets.disable_progress_bars()  # of every map
    settings = {**job.encoders, "device": device}
    return load_encoders(mode=job.mode, duration=job.duration, parts=job.parts, **settings), cores


def _make_shard(
    job: _Job, number: int, key: str, items: Sequence[_Item], encoders: Encoders, threads: int, advance
) -> None:
    """Read and encode `items` and write the shard: first the rows, then its record."""
    usable = [item for item in items if item.problem is None]
    rejects: dict[str, dict] = {}  # of usable items, whose ids differ
    advance(len(items) - len(usable))
    arrow, sidecar = _shard_file(job, number, ".arrow"), _shard_file(job, number, ".json")
    work = _shard_file(job, number, ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    sidecar.unlink(missing_ok=True)
    with contextlib.closing(_read_ahead(job, usable, threads)) as readings:
        accepted = _map(job, encoders, usable, readings, rejects, work / "rows.arrow", advance)
    if accepted:
        _sync(work / "rows.arrow")
        os.replace(work / "rows.arrow", arrow)
    else:
        arrow.unlink(missing_ok=True)
    shutil.rmtree(work)
    record = {
        "key": key,
        "listed": len(items),
        "accepted": len(accepted),
        "arrow_bytes": arrow.stat().st_size if accepted else 0,
        "ids": accepted,
        "rejects": [
            rejects[item.id] if item.problem is None else _reject(item, *item.problem)
            for item in items
            if item.problem is not None or item.id in rejects
        ],
    }
    _write_text(sidecar, json.dumps(record) + "\n")


def _map(job: _Job, encoders: Encoders, items, readings: Iterator, rejects: dict, path: Path, advance) -> list[str]:
    """Run `datasets.map` over the items, filling the Arrow file at `path` and `rejects`; return the accepted ids."""
    accepted = []

    def encode_batch(batch: Mapping[str, list]) -> dict[str, Any]:
        rows = []
        for _ in batch["id"]:
            item, media = next(readings)
            try:
                rows.append((item, _encode(job, encoders, item, _raised(media))))
                accepted.append(item.id)
            except MediaError as error:
                stage = "encode" if error.reason == "not_finite" else "read"
                rejects[item.id] = _reject(item, stage, error.reason, str(error), error.facts)
            advance(1)
        columns = {name: np.empty((len(rows), *shape), np.float32) for name, shape in job.shapes.items()}
        for place, (_, values) in enumerate(rows):
            for name, value in values.items():
                columns[name][place] = value
        return {"id": [item.id for item, _ in rows], "caption": [item.caption for item, _ in rows], **columns}

    if items:
        text = datasets.Value("string")
        features = {name: datasets.Array2D(shape, "float32") for name, shape in job.shapes.items()}
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
    return accepted


def _encode(job: _Job, encoders: Encoders, item: _Item, media) -> dict[str, np.ndarray]:
    """Features of one item. One at a time, so that they do not depend on what else is in the batch."""
    waveform = media.audio if job.video else media
    mean, std = encoders.encode_audio(waveform[None])
    values = {MEAN: mean, STD: std, TEXT_FEATURES: encoders.encode_text([item.caption])}
    if job.video:
        values[CLIP_FEATURES] = encoders.encode_clip(media.clip_frames[None])
        values[SYNC_FEATURES] = encoders.encode_sync(media.sync_frames[None])
    for name, value in values.items():
        if not value.isfinite().all():
            raise MediaError(
                "not_finite", f"{item.path}: {name} are not finite; look at the file and encoders.precision"
            )
    return {name: value[0].cpu().numpy() for name, value in values.items()}


def _raised(media):
    if isinstance(media, MediaError):
        raise media
    return media


def _reject(item: _Item, stage: str, reason: str, message: str, facts: Mapping | None = None) -> dict[str, Any]:
    return {"id": item.id, "stage": stage, "reason": reason, "message": message, "facts": dict(facts or {})}


# --- reading -----------------------------------------------------------------------------------------------------


def _read_ahead(job: _Job, items: Sequence[_Item], threads: int) -> Iterator[tuple[_Item, Any]]:
    """Yield (item, VideoClip, waveform or MediaError) in order, while threads read a few files further on."""
    groups = [list(group) for _, group in itertools.groupby(items, key=lambda item: item.path)]
    waiting: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for group in groups:
                waiting.append((group, pool.submit(_read_group, job, group)))
                if len(waiting) > threads:  # a clip is 58 MB, so no more than are needed to keep the threads busy
                    group, future = waiting.popleft()
                    yield from zip(group, future.result(), strict=True)
            for group, future in waiting:
                yield from zip(group, future.result(), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _read_group(job: _Job, items: Sequence[_Item]) -> list:
    """The media of items of one file, each a result or the MediaError it met."""
    path = items[0].path
    try:
        if job.video:
            return [_read_video(job, path) for _ in items]
        waveform, rate = read_waveform(path)
    except MediaError as error:
        return [error] * len(items)
    except Exception as error:
        if isinstance(error, (OSError, MemoryError)) and not isinstance(error, av.error.FFmpegError):
            raise  # the machine's fault, not the file's
        return [MediaError("unexpected", f"{path}: reading failed ({error!r}); re-encode the file")] * len(items)
    return [_cut(job, item, waveform, rate) for item in items]


def _read_video(job: _Job, path: str):
    return read_video(
        path,
        mode=job.mode,
        duration=job.duration,
        alignment=job.alignment,
        normalize_audio=job.normalize_audio,
        as_uint8=True,
    )


def _cut(job: _Job, item: _Item, waveform: torch.Tensor, rate: int) -> torch.Tensor | MediaError:
    start, end = item.span
    try:
        return cut_audio_clip(
            waveform,
            rate,
            mode=job.mode,
            start_sample=start,
            end_sample=end,
            duration=job.duration,
            source=item.path,
        )
    except MediaError as error:
        return error


# --- files -------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    """Content of a file of ours, {} if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    os.replace(partial, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
