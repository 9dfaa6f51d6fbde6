"""Extraction: listed media to feature shards, one `datasets.map` each, and from the shards to a feature store.

    FOLDER/NAME.shards/        the shards (`features.shards`)
    OUTPUT/NAME.rejects.jsonl  every item left out: id, stage, reason, message, probe of the file
    OUTPUT/NAME/               the store, by the writer that is passed in; its manifest says what it was made of

A run makes the shards that are missing or whose key has changed. So it may be killed at any time, the next one resumes,
and the store comes out the same. Any number of runs may share the folder: each shard is made by the process that has
its lock, and the run that finds all of them complete exports the store. A store that was made of the same inputs is
left as it is, whether or not its shards are still there.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np
from tqdm.auto import tqdm

from mmaudio_hf.config import AudioSource, Recipe, VideoSource
from mmaudio_hf.features.encoders import check_encoders, fit_toy_codec, pick_device
from mmaudio_hf.features.shards import Item, Job, Shard, make_shards
from mmaudio_hf.features.toy import toy_codec_file
from mmaudio_hf.files import RESUME_HINT, Share, add_path_to_oserror, locked, read_json, readable, write_text
from mmaudio_hf.media import lists
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.schema import RunError, check_id

_AUDIO_PEAK = 0.95
_EXPORT_ROWS = 32  # 38 MB of features of 8 s
_MAX_UNLISTED = 1000  # files that are named in the rejects, though the list does not name them
_ALL_SHARDS = Share()

Problems = Mapping[str, tuple[str, str]]
"""Id of a clip of a video, or name of an audio file -> (reason, message) of an audit."""
Problem = tuple[str, str, str]
"""Stage, reason and message of a reject."""


class Writer(Protocol):
    """What extraction needs of a `StoreWriter`."""

    def write(self, first_row: int, ids: Sequence[str], captions: Sequence[str], values: Mapping[str, Any]) -> None: ...


OpenWriter = Callable[..., AbstractContextManager[Writer]]
"""`StoreWriter`, or a function of its arguments."""


@dataclass(frozen=True)
class ExtractionReport:
    """What became of a list. accepted + rejected = listed; `missing` counts the rejects whose file was not found.

    With `pending_shards`, those that other processes have still to make, the counts are of the complete ones alone, and
    there is no store yet.
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
    reduced: dict[str, int] = field(default_factory=dict)  # component -> largest batch that fitted, after out-of-memory

    def __str__(self) -> str:
        if self.pending_shards:
            return (
                f"{self.name}: {self.shards - self.pending_shards} of {self.shards} shards complete,"
                f" {self.seconds:.1f} s; the process that finishes the last shard, or this command without a share of"
                f" the shards, writes {self.store_path}"
            )
        left_out = f", {self.rejected} rejected ({self.missing} not found), see {self.rejects_path}"
        kept = f", {self.reused_shards} of {self.shards} shards kept" if self.reused_shards else ""
        sizes = ", ".join(f"{component} {size}" for component, size in self.reduced.items())
        reduced = f", batch size reduced after out-of-memory ({sizes})" if sizes else ""
        return (
            f"{self.name}: {self.accepted} of {self.listed} in {self.store_path}"
            f"{left_out if self.rejected else ''}{kept}{reduced}, {self.seconds:.1f} s"
        )


class Options(TypedDict, total=False):
    """Options of an extraction."""

    offsets: Mapping[str, float] | None  # id of a clip -> s that its audio is late, by an audit: it is shifted
    problems: Problems | None  # what an audit found; such an item is a reject of the stage "audit", its file unopened
    share: Share  # the shards that this process makes
    clean: bool  # remove the shards of a complete store
    progress: bool


def extract_video(
    recipe: Recipe, source: VideoSource, open_writer: OpenWriter, **options: Unpack[Options]
) -> ExtractionReport:
    """Make the feature store `source.name` in `extraction.output_dir` of the videos that `source.list` lists.

    recipe: gives `model.mode`, `encoders`, `extraction` and, for a source without a duration, `model.duration`; the toy
    codec is fitted to these media if there is none. extraction.batch_size items go through the encoders together, fewer
    after out-of-memory; extraction.num_proc processes, process i on CUDA device i modulo their number, make shards of
    extraction.shard_size rows. Unless source.max_clips is 1, each clip in `extraction.clips_path(source)` is a row.

    A file that cannot be used is rejected, never fatal. Raises ValueError for mistakes in settings, lists and folders
    before any work, when the disk is too small, and when every item was rejected (then there is no store); OSError
    naming the file when the disk fills up all the same; RunError when memory holds not even one item, a worker process
    dies, or another run changes the shards.
    """
    return _extract(recipe, source, open_writer, **options)


def extract_audio(
    recipe: Recipe, source: AudioSource, open_writer: OpenWriter, **options: Unpack[Options]
) -> ExtractionReport:
    """Make the feature store `source.name` of the clips of audio files in `extraction.clips_path(source)`.

    `source.list` is a TSV of captions (`id` of the audio file, `caption`; several rows per id allowed). Every clip
    gives one row for each different caption of its file that `source.captions` selects: the first has the id of the
    clip, the n-th that id and `.n`. A clip whose file has no caption is rejected as no_caption, a listed file without
    any clip as no_clip. The rest is as for `extract_video`.
    """
    return _extract(recipe, source, open_writer, **options)


# --- The items -------------------------------------------------------------------------------------------------------


def _video_items(job: Job, source: VideoSource, problems: Problems, offsets: Mapping[str, float]) -> list[Item]:
    items: list[Item] = []
    folder, several = lists.MediaFolder(source.media_dir, "video"), source.max_clips != 1
    starts = lists.starts_by_name(job.recipe.extraction.clips_path(source)) if several else {}
    for row in lists.read_media_list(source.list, "label"):
        path, missing = _find(folder, row.id)
        clips = lists.starts_of(starts, row.id, path)
        if several and not clips:
            missing = missing or ("list", "no_clip", f"{path}: has no clip in the clip list; it is damaged, or new")
        for clip in clips or [lists.VideoStart(row.id, row.id, 0.0)]:
            problem = missing or _audited(clip.id, problems)
            late = offsets.get(clip.id, 0.0)
            items.append(Item(clip.id, row.caption, path, problem=problem, start=clip.start, audio_offset=late))
    return items


def _audio_items(job: Job, source: AudioSource, problems: Problems) -> list[Item]:
    clips_path = job.recipe.extraction.clips_path(source)
    folder, captions = lists.MediaFolder(source.media_dir, "audio"), _captions(source)
    items: list[Item] = []
    files: dict[str, tuple[str, Problem | None]] = {}
    for clip in lists.read_clips(clips_path):
        name = lists.normal_name(clip.name)
        if name not in files:
            path, problem = _find(folder, name)
            files[name] = path, problem or _audited(name, problems)
        path, problem = files[name]
        if name not in captions:
            message = f"{source.list}: has no caption for {name!r}; add a row or remove the clip"
            problem = ("list", "no_caption", message)
        for number, caption in enumerate(captions.get(name, [""]), start=1):
            row_id = clip.id if number == 1 else f"{clip.id}.{number}"
            items.append(Item(row_id, caption, path, (clip.start_sample, clip.end_sample), problem))
    repeated = [item_id for item_id, count in Counter(item.id for item in items).items() if count > 1]
    if repeated:
        raise ValueError(f"{clips_path}: clip {repeated[0]!r} has the id of another clip's second caption; rename it")
    left_out = _left_out_of_clips(clips_path)
    for name in captions:
        if name not in files:
            reason = left_out.get(name, "it is absent, or newer than the list")
            message = f"{clips_path}: has no clip of {name!r}; {reason}"
            items.append(Item(name, "", str(Path(source.media_dir) / name), problem=("list", "no_clip", message)))
    return items


def _left_out_of_clips(clips_path: Path) -> dict[str, str]:
    """Name of an audio file -> why `partition` gave it no clip, as far as it left that beside the list."""
    path, messages = clips_path.with_suffix(".rejects.jsonl"), {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # for messages alone: a damaged line is no loss
            reject = json.loads(line)
            messages[lists.stem_of(Path(reject["file"]).name, "audio")] = str(reject["message"])
    return messages


# --- Before the work -------------------------------------------------------------------------------------------------


def _check_settings(job: Job) -> None:
    check_id(job.name, "name of the store")
    if "." in job.name:
        raise ValueError(f"store name {job.name!r} has a dot: other readers would look for another .tsv")
    pick_device(job.recipe.encoders.device)
    if not Path(job.source.media_dir).is_dir():
        raise ValueError(f"{job.source.media_dir}: no such folder; it must hold the media of {job.name!r}")
    clips = job.recipe.extraction.clips_path(job.source)
    if (isinstance(job.source, AudioSource) or job.source.max_clips != 1) and not clips.is_file():
        raise ValueError(f"{clips}: no such clip list; make it with `mmaudio-hf partition`")
    if job.output_dir.exists() and not job.output_dir.is_dir():
        raise ValueError(f"{job.output_dir} is a file; extraction.output_dir must be a folder")


def _audited(name: str, problems: Problems) -> Problem | None:
    return ("audit", *problems[name]) if name in problems else None


def _find(folder: lists.MediaFolder, name: str) -> tuple[str, Problem | None]:
    try:
        return str(folder.find(name)), None
    except MediaError as error:
        return str(folder.folder / name), ("list", error.reason, str(error))


def _captions(source: AudioSource) -> dict[str, list[str]]:
    """Different captions of each file, by its name as clip lists have it, as far as `source.captions` selects them."""
    captions: dict[str, dict[str, None]] = {}
    for row in lists.read_media_list(source.list, "caption"):
        of_file = captions.setdefault(lists.stem_of(row.id, "audio"), {})
        if source.captions == "last":
            of_file.clear()
        of_file.setdefault(row.caption)
    return {name: list(of_file)[: 1 if source.captions == "first" else None] for name, of_file in captions.items()}


def _prepare_encoders(job: Job, items: Sequence[Item]) -> None:
    usable = [item for item in items if item.problem is None]
    if not usable:
        _, reason, message = items[0].problem or ("", "", "")
        raise ValueError(f"{job.source.list}: none of {len(items)} items can be used; the first: {reason}: {message}")
    config, mode = job.recipe.encoders, job.recipe.model.mode
    codec = toy_codec_file(config.weights_dir, mode)
    if config.kind == "toy" and not codec.is_file():
        codec.parent.mkdir(parents=True, exist_ok=True)
        with locked(codec.with_suffix(".lock")):
            if not codec.is_file():  # fitted by another process meanwhile
                fit_toy_codec(config.weights_dir, mode, list(dict.fromkeys(item.path for item in usable)))
    check_encoders(config, mode, job.components)


def _check_disk_space(job: Job, pending_rows: int, store_rows: int) -> None:
    row_bytes = 4 * sum(math.prod(shape) for shape in job.shapes.values())  # float32
    needs: dict[int, int] = {}  # by device: shards and store may be on different disks
    for folder, rows in ((job.folder, pending_rows), (job.output_dir, store_rows)):
        device = folder.stat().st_dev
        needs[device] = needs.get(device, 0) + rows * row_bytes
        free = shutil.disk_usage(folder).free
        if needs[device] > free:
            raise ValueError(
                f"{folder}: {readable(needs[device])} are needed for the shards and the store of {job.name!r},"
                f" {readable(free)} are free; free some space or change extraction.output_dir and shards_dir"
            )


# --- The extraction --------------------------------------------------------------------------------------------------


def _extract(
    recipe: Recipe,
    source: VideoSource | AudioSource,
    open_writer: OpenWriter,
    problems: Problems | None = None,
    offsets: Mapping[str, float] | None = None,
    share: Share = _ALL_SHARDS,
    clean: bool = False,
    progress: bool = True,
) -> ExtractionReport:
    started, job = time.monotonic(), Job(recipe, source, share)
    _check_settings(job)
    if isinstance(source, VideoSource):
        items = _video_items(job, source, problems or {}, offsets or {})
    else:
        items = _audio_items(job, source, problems or {})
        spans = [(item.path, item.span) for item in items if item.span]
        if progress and len(spans) > len(set(spans)):
            tqdm.write(
                f"{job.name}: {len(items)} rows of {len(set(spans))} clips, one for each caption of a file; `captions:"
                " last` (or first) in the recipe's source takes one, as the reference implementation takes the last"
            )
    store = job.output_dir / job.name
    if store.exists() and not _key_of_store(job) and not (job.folder / "store.json").is_file():  # of earlier versions
        raise ValueError(f"{store} exists and was not made by extraction: move it or give the store another name")
    try:
        _prepare_encoders(job, items)
        key, shards = job.shards(items)
        report = _finished(job, key, len(shards))
        if report is None:
            job.output_dir.mkdir(parents=True, exist_ok=True)
            job.folder.mkdir(parents=True, exist_ok=True)
            complete = [bool(job.metadata(shard)) for shard in shards]
            job.remove_stale(len(shards))
            ours = shards[job.share.index :: job.share.count]
            rows = sum(len(shard.items) for shard in ours if not complete[shard.number])
            _check_disk_space(job, rows, 0 if store.exists() else len(items))
            make_shards(job, ours, progress)
            report = replace(_finish(job, key, shards, open_writer, progress), reused_shards=sum(complete))
        if clean and not report.pending_shards:
            shutil.rmtree(job.folder, ignore_errors=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{job.name}: {RESUME_HINT}") from None
    report = replace(report, seconds=time.monotonic() - started)
    if progress:
        tqdm.write(str(report))
    return report


def _key_of_store(job: Job) -> str:
    store = job.output_dir / job.name
    return read_json(job.output_dir / f"{job.name}.manifest.json").get("made_of", "") if store.exists() else ""


def _finished(job: Job, key: str, shards: int) -> ExtractionReport | None:
    rejects_path = job.output_dir / f"{job.name}.rejects.jsonl"
    if _key_of_store(job) != key or not rejects_path.is_file():
        return None
    counts = read_json(job.output_dir / f"{job.name}.manifest.json")["counts"]
    try:
        rejects = [json.loads(line) for line in rejects_path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{rejects_path} is damaged ({error}): remove it, and extraction writes it again") from error
    return _report(job, counts["listed"], counts["accepted"], rejects, shards)


def _report(job: Job, listed: int, accepted: int, rejects: Sequence, shards: int, **more: Any) -> ExtractionReport:
    return ExtractionReport(
        name=job.name,
        listed=listed,
        accepted=accepted,
        rejected=sum(reject["stage"] != "folder" for reject in rejects),
        missing=sum(reject["reason"] == "not_found" for reject in rejects),
        shards=shards,
        store_path=job.output_dir / job.name,
        rejects_path=job.output_dir / f"{job.name}.rejects.jsonl",
        **{"reused_shards": shards, "pending_shards": 0, "seconds": 0.0} | more,
    )


def _finish(job: Job, key: str, shards: Sequence[Shard], open_writer: OpenWriter, progress: bool) -> ExtractionReport:
    """Export if all shards are complete and the store is not of them already; one process at a time."""
    complete = [metadata for shard in shards if (metadata := job.metadata(shard))]
    listed, accepted = sum(len(shard.items) for shard in shards), sum(each["accepted"] for each in complete)
    rejects, pending = [reject for each in complete for reject in each["rejects"]], len(shards) - len(complete)
    assert pending or accepted + len(rejects) == listed
    reduced: dict[str, int] = {}
    for component, size in (pair for each in complete for pair in each.get("halved", {}).items()):
        reduced[component] = max(size, reduced.get(component, 0))
    state: dict[str, Any] = {"reused_shards": 0, "pending_shards": pending, "reduced": reduced}
    report = _report(job, listed, accepted, rejects, len(shards), **state)
    if pending:
        if job.share.count == 1:
            raise RunError(job.changed_message)
        return report
    with locked(job.folder / "store.lock"):
        if _finished(job, key, len(shards)) is not None:
            return report
        # After those of the list, the files of a folder of videos that are not in it.
        lines = [*rejects, *(_unlisted(job) if job.is_video else ())]
        write_text(report.rejects_path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        if not accepted:
            reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(r["reason"] for r in rejects).most_common())
            raise ValueError(
                f"{job.source.list}: all {listed} items were rejected ({reasons}), so there is no store;"
                f" {report.rejects_path} says why"
            )
        ids = {item_id for each in complete for item_id in each["ids"]}
        shifted = [item for shard in shards for item in shard.items if item.audio_offset and item.id in ids]
        job.offsets_file.unlink(missing_ok=True)
        if shifted:
            write_text(job.offsets_file, json.dumps({i.id: i.audio_offset for i in shifted}, indent=0) + "\n")
        if _key_of_store(job) != key:  # a store of other shards is renamed first: a kill leaves no half of it
            removed = job.folder / "replaced_store"
            shutil.rmtree(removed, ignore_errors=True)
            if report.store_path.exists():
                os.rename(report.store_path, removed)
                shutil.rmtree(removed)
            _export(job, key, report, len(shifted), shards, open_writer, progress)
    return report


def _unlisted(job: Job) -> Iterator[dict[str, Any]]:
    """Lines of the rejects for files that neither this list names nor that of another source of the same folder."""
    folder, ids, ours = lists.MediaFolder(job.source.media_dir, "video"), [], {Path(job.source.list).resolve()}
    for other in dict.fromkeys((job.source, *job.recipe.extraction.videos)):
        if Path(other.media_dir) == folder.folder and Path(other.list).is_file():
            ids += [row.id for row in lists.read_media_list(other.list, "label")]
            ours.add(Path(other.list).resolve())
    files = [(path, "unlisted", f"is not in {job.source.list}") for path in folder.unlisted(ids)]
    files += [(path, "ignored", "has no ending of a video") for path in folder.others]
    files = [file for file in files if file[0].resolve() not in ours and job.output_dir not in file[0].parents]
    for path, reason, message in files[:_MAX_UNLISTED]:
        yield {"id": path.stem, "stage": "folder", "reason": reason, "message": f"{path}: {message}", "facts": {}}


def _export(
    job: Job,
    key: str,
    report: ExtractionReport,
    corrected: int,
    shards: Sequence[Shard],
    open_writer: OpenWriter,
    progress: bool,
) -> None:
    """Copy the shards into a new store, in the order of the list, a block of rows at a time."""
    with (
        add_path_to_oserror(report.store_path, RESUME_HINT),
        open_writer(
            report.store_path,
            job.shapes,
            report.accepted,
            mode=job.recipe.model.mode,
            duration=job.duration,
            encoders=job.fingerprints,
            preprocessing=job.preprocessing,
            normalisation={"audio_peak": _AUDIO_PEAK if job.normalize_audio else None},
            counts={"listed": report.listed, "accepted": report.accepted, "rejected": report.rejected}
            | ({"corrected": corrected} if corrected else {}),
            inputs_hash=key,
        ) as writer,
        tqdm(total=report.accepted, desc=f"{job.name}: store", unit="row", disable=not progress) as bar,
    ):
        rows: Iterator = itertools.chain.from_iterable(map(job.rows, shards))
        for first in range(0, report.accepted, _EXPORT_ROWS):
            ids, captions, values = zip(*itertools.islice(rows, _EXPORT_ROWS), strict=True)
            columns = {name: np.stack([row[name] for row in values]) for name in job.shapes}  # each (rows, *shape)
            writer.write(first, ids, captions, columns)
            bar.update(len(ids))
