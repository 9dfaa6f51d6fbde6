"""Audio for many files, of a folder or a list; the same command resumes after any interruption.

    OUT/ID.wav, .flac, .mp4 or .mkv   the audio of item ID, or its video with that audio
    OUT/ID.json                       what it was generated from and with; written last
    OUT/rejects.jsonl                 every item left out: id, stage, reason, message

An item whose JSON has the same key, a hash of all that its audio depends on, is kept. Ids are plain names, so nothing
is ever written outside of OUT. Several processes may write to one OUT, each its shard of the items.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmaudio_hf.files import Share, hash_of, read_json, write_text
from mmaudio_hf.generation.pipeline import Generated, MMAudioPipeline, Request, save_with_note
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.lists import VIDEO_ENDINGS, MediaFolder, read_table
from mmaudio_hf.media.mux import VIDEO_FORMATS
from mmaudio_hf.schema import check_id

VERSION = 1  # part of every key: raise it when the same request gives other audio
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# A folder to generate for may hold more than those that are extracted from.
MOVING = (*VIDEO_ENDINGS, ".gif", ".mts", ".m2ts", ".ogv", ".asf", ".vob", ".mxf")
ENDINGS = (".wav", ".flac", *VIDEO_FORMATS)
_TEXTS = ("prompt", "caption", "label")
_OPTIONAL = ("video", "image", *_TEXTS, "negative_prompt", "duration", "seed")


@dataclass(frozen=True)
class Entry:
    """One listed item. `problem`: a known (stage, reason, message) to reject it for."""

    id: str
    request: Request
    problem: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class FilesReport:
    """Counts of items: generated + kept + rejected = listed."""

    out_dir: Path
    listed: int
    generated: int
    kept: int  # complete, and with the same key
    rejected: int
    rejects_path: Path

    def __str__(self) -> str:
        kept = f", {self.kept} kept" if self.kept else ""
        rejected = f", {self.rejected} rejected, see {self.rejects_path}" if self.rejected else ""
        return f"{self.out_dir}: {self.generated} of {self.listed} generated{kept}{rejected}"


def read_folder(
    folder: str | os.PathLike, prompt: str = "", negative_prompt: str = "", log: Callable[[str], None] = print
) -> list[Entry]:
    """The videos and images of a folder, by name; their ids are the names without suffix. ValueError if none.

    log: gets a line on the files that are neither.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one with videos or images")
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    paths = [path for path in files if path.suffix.lower() in (*MOVING, *IMAGE_ENDINGS)]
    paths.sort(key=lambda path: path.suffix.lower() in IMAGE_ENDINGS)  # of the same name, the video comes first
    if not paths:
        raise ValueError(f"{folder}: no videos or images; looked for {' '.join((*MOVING, *IMAGE_ENDINGS))}")
    if others := [path.name for path in files if path not in paths]:
        names = f"{', '.join(others[:5])}{', ...' if len(others) > 5 else ''}"
        log(f"{folder}: {len(others)} other files are left out: {names}; a list may name them")
    entries: list[Entry] = []
    first: dict[str, Path] = {}
    for path in paths:
        video, image = (path, None) if path.suffix.lower() in MOVING else (None, path)
        entry = Entry(path.stem, Request(path.stem, video, image, prompt, negative_prompt))
        if (other := first.setdefault(path.stem, path)) is not path:
            message = f"{path}: {other.name} has the same name; rename one of them"
            entry = replace(entry, id=path.name, problem=("list", "duplicate_id", message))
        try:
            check_id(path.stem, str(path))
        except ValueError as error:
            entry = replace(entry, problem=("list", "bad_name", str(error)))
        entries.append(entry)
    return entries


def read_list(path: str | os.PathLike, media_dir: str | os.PathLike | None = None) -> list[Entry]:
    """The rows of a tab-separated list with a header.

    `id` is required. `video` and `image` are files, relative to `media_dir` or to the folder of the list; with a
    `media_dir` and without these columns, item ID is the video `media_dir/ID.mp4` (or another suffix). `prompt` may be
    called caption or label. `negative_prompt`, `duration` (s) and `seed` replace those of the call where they are not
    empty. ValueError names the line of what is wrong.
    """
    path = Path(path)
    rows = read_table(path, ("id",), optional=_OPTIONAL)
    columns = set(rows[0][1])
    if len(texts := sorted(columns & set(_TEXTS))) > 1:
        raise ValueError(f"{path}: has the columns {' and '.join(texts)}; keep the one that is the prompt")
    base, by_id = Path(media_dir or path.parent), media_dir is not None and not columns & {"video", "image"}
    if media_dir is None and not columns & {"video", "image", *_TEXTS}:
        raise ValueError(f"{path}: nothing to generate from: add a column video, image or prompt, or give a folder")
    folder = MediaFolder(base, "video") if by_id else None
    entries: list[Entry] = []
    lines: dict[str, int] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        item_id = check_id(row["id"].strip(), where)
        if item_id in lines:
            raise ValueError(f"{where}: id {item_id!r} is already on line {lines[item_id]}; ids must differ")
        lines[item_id] = line
        video, problem = base / row["video"] if row.get("video") else None, None
        if folder is not None:
            try:
                video = folder.find(item_id)
            except MediaError as error:
                video, problem = base / item_id, ("list", error.reason, f"{error} ({where})")
        image = base / row["image"] if row.get("image") else None
        numbers: Any = {name: _number(row, name, kind, where) for name, kind in (("duration", float), ("seed", int))}
        prompts = row[texts[0]] if texts else "", row.get("negative_prompt", "")
        request = Request(item_id, video, image, *prompts, **numbers)
        missing = next((file for file in (video, image) if file is not None and not file.is_file()), None)
        if missing and problem is None:
            problem = ("list", "not_found", f"{missing}: no such file ({where})")
        if video is None and image is None and not request.prompt:
            problem = ("list", "nothing_given", f"{where}: has no video, image or prompt")
        entries.append(Entry(item_id, request, problem))
    return entries


def _number(row: Mapping[str, str], name: str, kind: Callable[[str], Any], where: str) -> Any:
    if not row.get(name, "").strip():
        return None
    try:
        return kind(row[name])
    except ValueError:
        raise ValueError(f"{where}: {name} {row[name]!r} is not a{' whole' if kind is int else ''} number") from None


def generate_files(
    pipeline: MMAudioPipeline,
    entries: Sequence[Entry],
    out_dir: str | os.PathLike,
    *,
    ending: str = ".mp4",
    batch_size: int = 8,
    share: Share | None = None,
    progress: bool = True,
    **options: Any,
) -> FilesReport:
    """Generate what is not complete yet of a shard of the entries; `options` are those of `pipeline.generate`.

    ending: suffix of the results; where there is no video to show, .mp4 and .mkv become .wav. ValueError for wrong
    settings (no seed is one), missing weights and a folder with media of the entries, OSError for one that cannot be
    written, before any work; OSError when the disk is full: complete results are kept.
    """
    if ending not in ENDINGS:
        raise ValueError(f"results end with {', '.join(ENDINGS)}, not {ending!r}")
    check_out_dir(out_dir, entries)
    if options.get("seed", 0) is None:
        raise ValueError("seed: give a number, since what is complete would have another one in the next run")
    share = share or Share()
    results = _Results(pipeline, Path(out_dir), ending, options)
    entries = [results.read_metadata(entry) for entry in entries[share.index :: share.count]]
    rejected = [(entry.id, *entry.problem) for entry in entries if entry.problem is not None]
    valid = [entry for entry in entries if entry.problem is None]
    generate = {"batch_size": batch_size, "on_reject": results.reject, **options}
    pipeline.generate([entry.request for entry in valid], **generate)  # generates nothing, only checks
    pending = {entry.id: entry for entry in valid if not results.is_complete(entry)}
    generated = pipeline.generate([entry.request for entry in pending.values()], **generate)
    results.out_dir.mkdir(parents=True, exist_ok=True)
    partial = {f".{results.path(entry).name}" for entry in pending.values()}
    for path in results.out_dir.glob(".*.part"):  # of an earlier run that was killed
        if path.name.removesuffix(".part").rpartition(".")[0] in partial:
            path.unlink(missing_ok=True)
    suffix = "" if share.count == 1 else f".{share.index}-{share.count}"
    rejects_path, kept = results.out_dir / f"rejects{suffix}.jsonl", len(valid) - len(pending)
    try:
        with tqdm(total=len(entries), initial=len(entries) - len(pending), unit="item", disable=not progress) as bar:
            results.bar = bar
            for result in generated:
                results.save(pending[result.key], result)
    except KeyboardInterrupt:
        complete = f"{out_dir}: {results.generated + kept} of {len(entries)} are complete"
        raise KeyboardInterrupt(f"{complete}; run the same command again to resume") from None
    finally:
        generated.close()
        names = ("id", "stage", "reason", "message")
        rows = [dict(zip(names, row, strict=True)) for row in (*rejected, *results.rejects)]
        write_text(rejects_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    report = FilesReport(results.out_dir, len(entries), results.generated, kept, len(rows), rejects_path)
    assert report.generated + report.kept + report.rejected == report.listed
    return report


def check_out_dir(out_dir: str | os.PathLike, entries: Sequence[Entry] = ()) -> None:
    """Check that results can be written to a folder; it need not exist yet, and nothing is left in it.

    ValueError for a file, and for a folder with media of the entries, whose names results would take; OSError.
    """
    out_dir = Path(out_dir)
    existing = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file; give a folder for the results")
    media = [os.path.abspath(e.request.file) for e in entries if e.request.file is not None]
    folders = {os.path.dirname(path) for path in media}
    folders |= {os.path.dirname(os.path.realpath(path)) for path in media if os.path.islink(path)}
    if os.path.realpath(out_dir) in map(os.path.realpath, folders):
        raise ValueError(f"{out_dir} holds media of the list, which results would replace; give another folder")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(existing)) from None


class _Results:
    """The results of one call: their paths, their keys, what was generated and what was rejected."""

    def __init__(self, pipeline: MMAudioPipeline, out_dir: Path, ending: str, options: Mapping[str, Any]):
        self.pipeline, self.out_dir, self.ending, self.options = pipeline, out_dir, ending, dict(options)
        self.rejects: list[tuple[str, str, str, str]] = []  # id, stage, reason, message
        self.generated = 0
        self.bar: Any = None
        self.media: dict[str, list] = {}  # name, size and time of the file of each entry, before it is read

    def path(self, entry: Entry) -> Path:
        """Path of the result of an entry; its JSON has the same name."""
        audio_only = entry.request.video is None and self.ending in VIDEO_FORMATS
        return self.out_dir / f"{entry.id}{'.wav' if audio_only else self.ending}"

    def read_metadata(self, entry: Entry) -> Entry:
        """Note size and time of the file of an entry before it is read: if it changes later, the key differs."""
        media = entry.request.file
        if entry.problem is None and media is not None:
            try:
                stat = os.stat(media)
            except OSError as error:
                return replace(entry, problem=("list", "not_found", f"{media}: {error.strerror or error}"))
            self.media[entry.id] = [Path(media).name, stat.st_size, stat.st_mtime_ns]
        return entry

    def dependencies(self, entry: Entry) -> dict[str, Any]:
        """What the result of an entry depends on: settings, weights, texts, and name, size and time of its file."""
        request = {name: value for name, value in asdict(entry.request).items() if name not in ("video", "image")}
        if entry.id in self.media:
            request["media"] = self.media[entry.id]
        return {
            "version": VERSION,
            "ending": self.path(entry).suffix,
            "request": {name: value for name, value in request.items() if value not in (None, "")},
            "options": self.options,
            "made_by": self.pipeline.fingerprint(entry.request),
        }

    def is_complete(self, entry: Entry) -> bool:
        """Whether the result is there, of the size that was written, and from the same dependencies."""
        path, content = self.path(entry), read_json(self.out_dir / f"{entry.id}.json")
        there = path.is_file() and path.stat().st_size == content.get("bytes")
        return there and content.get("key") == hash_of(self.dependencies(entry))

    def reject(self, request: Request, problem: Exception, stage: str = "read") -> None:
        """Leave an item out."""
        other = "bad_request" if stage == "read" else "bad_sound"
        reason = problem.reason if isinstance(problem, MediaError) else other
        self.rejects.append((request.key, stage, reason, str(problem)))
        self.bar.update()

    def save(self, entry: Entry, result: Generated) -> None:
        """Write the result, and then its JSON."""
        path, dependencies = self.path(entry), self.dependencies(entry)
        json_path = self.out_dir / f"{entry.id}.json"
        json_path.unlink(missing_ok=True)  # of another result, which is replaced now
        try:
            note = save_with_note(result, path, entry.request.video)
        except ValueError as problem:  # of the video, or audio that is not finite
            self.reject(entry.request, problem, "write")
            return
        notes = [text for text in (result.note, note) if text]
        size = {"bytes": path.stat().st_size, "seconds": len(result.waveform) / result.sample_rate}
        content = {"key": hash_of(dependencies), **size, "notes": notes, **dependencies}
        write_text(json_path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        self.generated += 1
        for text in notes:
            tqdm.write(f"{path}: {text}")
        self.bar.update()
