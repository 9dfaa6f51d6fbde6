"""Extraction: listed media to feature shards, one `datasets.map` each, and from the shards to a feature store.

    OUTPUT/NAME.shards/shard_00012.arrow   rows of the list's 12th part: id, caption and a column per feature
    OUTPUT/NAME.shards/shard_00012.json    key, counts, ids and rejects of that part; written last
    OUTPUT/NAME.shards/*.lock              held by who makes the shard, or by who exports; empty
    OUTPUT/NAME.rejects.jsonl              every item left out: id, stage, reason, message, facts
    OUTPUT/NAME/                           the store, by the writer that is handed in

The key of a shard is a hash of all that it depends on. A run makes the shards whose key has changed or that are
missing, so it may be killed at any time, and the next one goes on where it was; the store comes out the same. Any
number of runs may share the folder: each shard is made by the one that has its lock, and the run that finds all of
them complete exports.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from mmaudio_hf.features.encoders import check_encoders, fit_toy_codec, pick_device
from mmaudio_hf.features.jobs import Item, Job, Share, digest_of, locked, naming, read_json, shard_keys, write_text
from mmaudio_hf.features.shards import make_shards
from mmaudio_hf.features.toy import toy_codec_file
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.lists import find_audio_file, find_video, read_clips, read_media_list
from mmaudio_hf.media.video import ALIGNMENTS
from mmaudio_hf.schema import RunError, check_id

_AUDIO_PEAK = 0.95
_EXPORT_ROWS = 32  # 38 MB of features of 8 s
_WHOLE = Share()


@dataclass(frozen=True)
class ExtractionReport:
    """What became of a list. accepted + rejected = listed; `missing` counts the rejects whose file was not found.

    With `pending_shards`, those that other processes have still to make, the counts are of the others alone, and there
    is no store yet.
    """

    name: str
    listed: int
    accepted: int
    rejected: int
    missing: int
    shards: int
    reused_shards: int  # complete before this run
    pending_shards: int
    store_path: Path
    rejects_path: Path
    seconds: float
    halved: dict[str, int] = field(default_factory=dict)  # encoder -> largest batch where memory did not hold more

    def __str__(self) -> str:
        if self.pending_shards:
            return (
                f"{self.name}: {self.shards - self.pending_shards} of {self.shards} shards complete,"
                f" {self.seconds:.1f} s;"
                f" who makes the last one, or this command without a share of the shards, writes {self.store_path}"
            )
        left_out = f", {self.rejected} rejected ({self.missing} not found), see {self.rejects_path}"
        kept = f", {self.reused_shards} of {self.shards} shards kept" if self.reused_shards else ""
        sizes = ", ".join(f"{part} {size}" for part, size in self.halved.items())
        halved = f", batches halved for want of memory ({sizes})" if sizes else ""
        return (
            f"{self.name}: {self.accepted} of {self.listed} in {self.store_path}"
            f"{left_out if self.rejected else ''}{kept}{halved}, {self.seconds:.1f} s"
        )


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
    share: Share = _WHOLE,
    progress: bool = True,
) -> ExtractionReport:
    """Make the feature store `output_dir/name` of the videos `media_dir/ID.mp4` listed in a TSV (`id`, `label`).

    encoders: the arguments of `load_encoders` without mode, duration and parts, as in {"kind": "toy", "weights_dir":
    ..., "clip": "", "precision": "fp32", "device": "auto"}; the toy codec is fitted to these media if there is none.
    open_writer: `StoreWriter`, or what takes its arguments. batch_size: items that go through
    the encoders together, halved where memory does not hold them. num_proc: processes; process i uses CUDA device i
    modulo their number. shard_size: rows of the list per shard. share: the shards to make, of those of the whole list.
    problems: id of a video -> (reason, message) of what is known to be wrong with it, from an audit; such a video is
    a reject of the stage "audit" and its file is not opened.

    A file that cannot be used is rejected, never fatal. Raises ValueError for mistakes in settings, lists and folders
    before any work, when the disk is too small, and when every item was rejected (then there is no store); OSError
    naming the file when the disk fills up all the same; RunError when memory holds not even one item, a worker process
    dies, or another run changes the shards.
    """
    job = Job(
        name, Path(output_dir), True, mode, float(duration), alignment, normalize_audio, dict(encoders), batch_size,
        num_proc, shard_size, share,
    )  # fmt: skip
    _check_settings(job, media_dir)
    items = []
    for row in read_media_list(list_path, "label"):
        path = find_video(media_dir, row.id)
        problem = _audit_problem(problems, row.id)
        if not path.is_file():
            problem = ("list", "not_found", f"{path}: no such file; check the folder and the id")
        items.append(Item(row.id, row.caption, str(path), problem=problem))
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
    share: Share = _WHOLE,
    progress: bool = True,
) -> ExtractionReport:
    """Make the feature store `output_dir/name` of the clips in `clips_path` of recordings in `media_dir`.

    `list_path` is a TSV of captions (`id` of the recording, `caption`; several rows per id allowed). Every clip gives
    one row for each different caption of its recording: the first has the id of the clip, the n-th that id and
    `.n`. A clip whose recording has no caption is rejected as no_caption, a listed recording without any clip as
    no_clip. `problems` is keyed by the name of the recording. The rest is as for `extract_video`.
    """
    job = Job(
        name, Path(output_dir), False, mode, float(duration), "timestamps", True, dict(encoders), batch_size, num_proc,
        shard_size, share,
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
            items.append(Item(row_id, caption, path, (clip.start_sample, clip.end_sample), problem))
    repeated = [item_id for item_id, count in Counter(item.id for item in items).items() if count > 1]
    if repeated:
        raise ValueError(f"{clips_path}: clip {repeated[0]!r} has the id of another clip's second caption; rename it")
    for name in captions:
        if name not in paths:
            message = f"{clips_path}: has no clip of {name!r}; it is absent, damaged or shorter than 8.1 s"
            items.append(Item(name, "", str(Path(media_dir) / name), problem=("list", "no_clip", message)))
    return _extract(job, items, list_path, open_writer, progress)


# --- before the work ---------------------------------------------------------------------------------------------


def _check_settings(job: Job, media_dir) -> None:
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
        return str(find_audio_file(folder, name)), None
    except MediaError as error:
        return str(folder / name), ("list", error.reason, str(error))


def _prepare_encoders(job: Job, items: Sequence[Item], list_path) -> None:
    """Refuse a list without media and encoders without files; fit the toy codec if there is none."""
    usable = [item for item in items if item.problem is None]
    if not usable:
        _, reason, message = items[0].problem
        raise ValueError(f"{list_path}: none of {len(items)} items can be used; the first: {reason}: {message}")
    kind, weights_dir = job.encoders["kind"], job.encoders["weights_dir"]
    codec = toy_codec_file(weights_dir, job.mode)
    if kind == "toy" and not codec.is_file():
        codec.parent.mkdir(parents=True, exist_ok=True)
        with locked(codec.with_suffix(".lock")):
            if not codec.is_file():  # fitted by another process meanwhile
                fit_toy_codec(weights_dir, job.mode, list(dict.fromkeys(item.path for item in usable)))
    check_encoders(kind, job.mode, **job.weights, parts=job.parts)


def _check_room(job: Job, pending_rows: int, store_rows: int) -> None:
    row_bytes = 4 * sum(math.prod(shape) for shape in job.shapes.values())
    needed, free = (pending_rows + store_rows) * row_bytes, shutil.disk_usage(job.output_dir).free
    if needed > free:
        raise ValueError(
            f"{job.output_dir}: {needed / 1e9:.2f} GB are needed for the shards and the store of {job.name!r},"
            f" {free / 1e9:.2f} GB are free; make room or change extraction.output_dir"
        )


# --- the whole of it ---------------------------------------------------------------------------------------------


def _extract(job: Job, items: list[Item], list_path, open_writer: Callable, progress: bool) -> ExtractionReport:
    started = time.monotonic()
    store, record = job.output_dir / job.name, job.folder / "store.json"
    if store.exists() and not record.is_file():
        raise ValueError(f"{store} exists and was not made from {job.folder}: move it or give the store another name")
    try:
        _prepare_encoders(job, items, list_path)
        job.folder.mkdir(parents=True, exist_ok=True)
        parts = [items[first : first + job.shard_size] for first in range(0, len(items), job.shard_size)]
        keys = shard_keys(job, parts)
        complete = [job.is_complete(number, key) for number, key in enumerate(keys)]
        _remove_strays(job, len(parts))
        mine = range(job.share.index, len(parts), job.share.count)
        rows = sum(len(parts[number]) for number in mine if not complete[number])
        if rows or not store.exists():
            _check_room(job, rows, 0 if store.exists() else len(items))
        make_shards(job, [(number, keys[number], parts[number]) for number in mine], progress)
        report = _finish(job, items, keys, list_path, open_writer, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{job.name}: complete shards are kept and the same command goes on from them"
        ) from None
    report = replace(report, reused_shards=sum(complete), seconds=time.monotonic() - started)
    if progress:
        tqdm.write(str(report))
    return report


def _finish(job: Job, items, keys: Sequence[str], list_path, open_writer: Callable, progress: bool) -> ExtractionReport:
    """Export if all shards are complete and the store is not of them already; one process at a time."""
    record, store_key = job.folder / "store.json", hashlib.sha256("".join(keys).encode()).hexdigest()
    sidecars = _sidecars(job, keys)
    report = _summary(job, len(items), sidecars)
    if report.pending_shards:
        if job.share.count == 1:
            raise RunError(_changed(job))
        return report
    with locked(job.folder / "store.lock"):
        if not (report.store_path.exists() and read_json(record).get("key") == store_key):
            _write_rejects(report, sidecars, list_path)
            _export(job, report, keys, store_key, record, open_writer, progress)
        elif not report.rejects_path.is_file():
            _write_rejects(report, sidecars, list_path)
    return report


def _changed(job: Job) -> str:
    return (
        f"{job.folder}: another run with other settings, list or media makes these shards again; let it end, then start"
        " this one again"
    )


def _remove_strays(job: Job, count: int) -> None:
    """Take away what longer lists left behind."""
    numbers = {int(name[1]) for path in job.folder.iterdir() if (name := re.match(r"shard_(\d{5,})\.", path.name))}
    for number in sorted(number for number in numbers if number >= count):
        with locked(job.file(number, ".lock"), wait=False) as held:
            if held:
                shutil.rmtree(job.file(number, ".partial"), ignore_errors=True)
                for path in job.folder.glob(f"{job.file(number, '').name}.*"):
                    path.unlink(missing_ok=True)


def _sidecars(job: Job, keys: Sequence[str]) -> list[dict]:
    """Records of the shards, {} for those that are not complete."""
    return [
        read_json(job.file(number, ".json")) if job.is_complete(number, key) else {} for number, key in enumerate(keys)
    ]


def _summary(job: Job, listed: int, sidecars: Sequence[Mapping]) -> ExtractionReport:
    complete = [sidecar for sidecar in sidecars if sidecar]
    accepted = sum(sidecar["accepted"] for sidecar in complete)
    rejects = [reject for sidecar in complete for reject in sidecar["rejects"]]
    assert len(complete) < len(sidecars) or accepted + len(rejects) == listed
    halved: dict[str, int] = {}
    for sidecar in complete:
        for part, size in sidecar.get("halved", {}).items():
            halved[part] = max(size, halved.get(part, 0))
    return ExtractionReport(
        name=job.name,
        listed=listed,
        accepted=accepted,
        rejected=len(rejects),
        missing=sum(reject["reason"] == "not_found" for reject in rejects),
        shards=len(sidecars),
        reused_shards=0,
        pending_shards=len(sidecars) - len(complete),
        store_path=job.output_dir / job.name,
        rejects_path=job.output_dir / f"{job.name}.rejects.jsonl",
        seconds=0.0,
        halved=halved,
    )


def _write_rejects(report: ExtractionReport, sidecars: Sequence[Mapping], list_path) -> None:
    rejects = [reject for sidecar in sidecars for reject in sidecar["rejects"]]
    write_text(report.rejects_path, "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects))
    if report.accepted == 0:
        reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(r["reason"] for r in rejects).most_common())
        raise ValueError(
            f"{list_path}: all {report.listed} items were rejected ({reasons}), so there is no store;"
            f" {report.rejects_path} says why"
        )


def _export(
    job: Job, report: ExtractionReport, keys: Sequence[str], store_key: str, record: Path, open_writer, progress: bool
) -> None:
    """Copy the shards into a new store, in the order of the list, a block of rows at a time."""
    partial = report.store_path.with_name(f"{job.name}.partial")
    if report.store_path.exists():  # of other shards; see `record` in _finish
        shutil.rmtree(partial, ignore_errors=True)
        os.rename(report.store_path, partial)
        shutil.rmtree(partial)
    # The record comes before the store, which appears by a renaming: a store beside a record is the one it names.
    write_text(record, json.dumps({"key": store_key}) + "\n")
    try:
        with (
            naming(report.store_path),
            open_writer(
                report.store_path,
                job.shapes,
                report.accepted,
                mode=job.mode,
                duration=job.duration,
                encoders=job.fingerprints,
                preprocessing=job.preprocessing,
                normalisation={"audio_peak": _AUDIO_PEAK if job.normalize_audio else None},
                counts={"listed": report.listed, "accepted": report.accepted, "rejected": report.rejected},
            ) as writer,
        ):
            _copy(job, report, keys, writer, progress)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _copy(job: Job, report: ExtractionReport, keys: Sequence[str], writer, progress: bool) -> None:
    rows = itertools.chain.from_iterable(_rows(job, number, key) for number, key in enumerate(keys))
    with tqdm(total=report.accepted, desc=f"{job.name}: store", unit="row", disable=not progress) as bar:
        for first in range(0, report.accepted, _EXPORT_ROWS):
            ids, captions, values = zip(*itertools.islice(rows, _EXPORT_ROWS), strict=True)
            stacked = {name: np.stack([row[name] for row in values]) for name in job.shapes}
            writer.write(first, ids, captions, stacked)
            bar.update(len(ids))


def _rows(job: Job, number: int, key: str) -> Iterator[tuple[str, str, dict]]:
    """(id, caption, {column: (*shape)}) of every row of a shard; the shard is mapped, not read.

    Nobody makes it again meanwhile. RunError if somebody already did, of other inputs, or if it was damaged.
    """
    path = job.file(number, ".arrow")
    with locked(job.file(number, ".lock"), wait=False, shared=True) as held:
        if not (held and job.is_complete(number, key)):
            raise RunError(_changed(job))
        if not path.is_file():  # every item was rejected
            return
        sidecar = job.file(number, ".json")
        written = read_json(sidecar).get("arrow_sha256")  # None: of an earlier version
        if written is not None and written != digest_of(path):
            sidecar.unlink()
            raise RunError(
                f"{path} is not what was written (its checksum differs; look after the disk): the same command makes"
                " this shard again"
            )
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                values = {}
                for name, shape in job.shapes.items():
                    numbers = batch.column(name).storage.flatten().flatten()
                    values[name] = numbers.to_numpy().reshape(len(batch), *shape)
                for place, ids in enumerate(zip(batch.column("id"), batch.column("caption"), strict=True)):
                    item_id, caption = (value.as_py() for value in ids)
                    yield item_id, caption, {name: value[place].copy() for name, value in values.items()}
