"""Sound for many files, of a folder or a list: made once, taken up again after any end, nothing lost.

    OUT/ID.wav, .flac, .mp4 or .mkv   the sound of item ID, or its video with that sound
    OUT/ID.json                       what it was made of and with; written last
    OUT/rejects.jsonl                 every item left out: id, stage, reason, message

An item whose JSON has the same key, a hash of all that its sound depends on, is kept. Ids are plain names, so nothing
is ever written outside OUT. Any number of processes may share OUT, each with its share of the items.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmaudio_hf.features.shards import Share, hash_of, read_json, write_text
from mmaudio_hf.generation.pipeline import Generated, MMAudioPipeline, Request, save_and_tell
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.lists import VIDEO_ENDINGS, find_video, read_table
from mmaudio_hf.media.mux import VIDEO_FORMATS
from mmaudio_hf.schema import check_id

VERSION = 1  # part of every key: raise it when the same request gives another sound
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ENDINGS = (".wav", ".flac", *VIDEO_FORMATS)
_TEXTS = ("prompt", "caption", "label")
_OPTIONAL = ("video", "image", *_TEXTS, "negative_prompt", "duration", "seed")
_REJECT = ("id", "stage", "reason", "message")
_WHOLE = Share()


@dataclass(frozen=True)
class Entry:
    """One listed item. `problem`: known (stage, reason, message) to leave it out for."""

    id: str
    request: Request
    problem: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class FilesReport:
    """What became of the items: made + kept + rejected = listed."""

    out_dir: Path
    listed: int
    made: int
    kept: int  # made before, of the same
    rejected: int
    rejects_path: Path

    def __str__(self) -> str:
        kept = f", {self.kept} kept" if self.kept else ""
        rejected = f", {self.rejected} rejected, see {self.rejects_path}" if self.rejected else ""
        return f"{self.out_dir}: {self.made} of {self.listed} made{kept}{rejected}"


def read_folder(folder: str | os.PathLike, prompt: str = "", negative_prompt: str = "") -> list[Entry]:
    """The videos and pictures of a folder, by name; their ids are the names without ending. ValueError if none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one that holds videos or pictures")
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    paths = [path for path in paths if path.suffix.lower() in (*VIDEO_ENDINGS, *IMAGE_ENDINGS)]
    paths.sort(key=lambda path: path.suffix.lower() in IMAGE_ENDINGS)  # of the same name, a video goes first
    if not paths:
        raise ValueError(f"{folder}: no videos or pictures; looked for {' '.join((*VIDEO_ENDINGS, *IMAGE_ENDINGS))}")
    entries, seen = [], {}
    for path in paths:
        kind = "video" if path.suffix.lower() in VIDEO_ENDINGS else "image"
        item_id, problem = path.stem, None
        request = Request(key=item_id, prompt=prompt, negative_prompt=negative_prompt, **{kind: path})
        if path.stem in seen:
            item_id = path.name
            problem = ("list", "duplicate_id", f"{path}: {seen[path.stem]} has the same name; rename one of them")
        try:
            check_id(path.stem, str(path))
        except ValueError as error:
            problem = ("list", "bad_name", str(error))
        seen.setdefault(path.stem, path.name)
        entries.append(Entry(item_id, request, problem))
    return entries


def read_list(path: str | os.PathLike, media_dir: str | os.PathLike | None = None) -> list[Entry]:
    """The rows of a tab-separated list with a header.

    `id` must be there. `video` and `image` are files, relative to `media_dir` or to the folder of the list; with a
    `media_dir` and without these columns, item ID is the video `media_dir/ID.mp4` (or another ending). `prompt` may be
    called caption or label. `negative_prompt`, `duration` (s) and `seed` stand for those of the call where they are
    not empty. ValueError names the line of what cannot be meant.
    """
    path = Path(path)
    rows = read_table(path, ("id",), optional=_OPTIONAL)
    columns = set(rows[0][1])
    if len(texts := sorted(columns & set(_TEXTS))) > 1:
        raise ValueError(f"{path}: has the columns {' and '.join(texts)}; keep the one that is the prompt")
    base, by_id = Path(media_dir or path.parent), media_dir is not None and not columns & {"video", "image"}
    if media_dir is None and columns <= {"id", "negative_prompt", "duration", "seed"}:
        raise ValueError(f"{path}: names nothing to go by: add a column video, image or prompt, or give a folder")
    entries, lines = [], {}
    for line, row in rows:
        where = f"{path}, line {line}"
        item_id = check_id(row["id"], where)
        if item_id in lines:
            raise ValueError(f"{where}: id {item_id!r} is already on line {lines[item_id]}; ids must differ")
        lines[item_id] = line
        video = find_video(base, item_id) if by_id else base / row["video"] if row.get("video") else None
        image = base / row["image"] if row.get("image") else None
        request = Request(
            key=item_id,
            video=video,
            image=image,
            prompt=next((row[name] for name in texts), ""),
            negative_prompt=row.get("negative_prompt", ""),
            duration=_number(row, "duration", float, where),
            seed=_number(row, "seed", int, where),
        )
        missing = next((file for file in (video, image) if file is not None and not file.is_file()), None)
        problem = ("list", "not_found", f"{missing}: no such file ({where})") if missing else None
        if video is None and image is None and not request.prompt:
            problem = ("list", "nothing_given", f"{where}: has no video, picture or prompt to go by")
        entries.append(Entry(item_id, request, problem))
    return entries


def _number(row: Mapping[str, str], name: str, kind: type, where: str):
    if not row.get(name, "").strip():
        return None
    try:
        return kind(row[name])
    except ValueError:
        raise ValueError(f"{where}: {name} {row[name]!r} is no {'whole ' if kind is int else ''}number") from None


def generate_files(
    pipeline: MMAudioPipeline,
    entries: Sequence[Entry],
    out_dir: str | os.PathLike,
    *,
    ending: str = ".mp4",
    batch_size: int = 8,
    share: Share = _WHOLE,
    progress: bool = True,
    **options: Any,
) -> FilesReport:
    """Make what is not there yet of a share of the entries; `options` are those of `pipeline.generate`.

    ending: of the results; where there is no video to show, .mp4 and .mkv stand for .wav. ValueError for wrong
    settings, missing weights and a folder that holds media of the entries, OSError for one that cannot be written,
    before any work; OSError when the disk fills up, what is complete being kept.
    """
    if ending not in ENDINGS:
        raise ValueError(f"results end with {', '.join(ENDINGS)}, not {ending!r}")
    check_out_dir(out_dir, entries)
    out_dir, entries = Path(out_dir), entries[share.index :: share.count]
    work = _Work(pipeline, out_dir, ending, options)
    entries = [work.look_at(entry) for entry in entries]
    asked = [entry.request for entry in entries if entry.problem is None]
    pipeline.generate(asked, batch_size, on_reject=work.reject, **options)  # makes nothing, only checks
    pending = [entry for entry in entries if entry.problem is None and not work.is_made(entry)]
    results = pipeline.generate([e.request for e in pending], batch_size, on_reject=work.reject, **options)
    out_dir.mkdir(parents=True, exist_ok=True)
    work.remove_stale_shards(pending)
    rejects_path = out_dir / ("rejects.jsonl" if share.count == 1 else f"rejects.{share.index}-{share.count}.jsonl")
    refused = [(entry.id, *entry.problem) for entry in entries if entry.problem is not None]
    kept = len(entries) - len(pending) - len(refused)
    by_key = {entry.id: entry for entry in pending}
    try:
        with tqdm(total=len(entries), initial=len(entries) - len(pending), unit="item", disable=not progress) as bar:
            work.bar = bar
            for result in results:
                work.save(by_key[result.key], result)
    except KeyboardInterrupt:
        told = f"{out_dir}: {work.made + kept} of {len(entries)} are there, and the same command goes on from them"
        raise KeyboardInterrupt(told) from None
    finally:
        results.close()
        rejects = [dict(zip(_REJECT, row, strict=True)) for row in (*refused, *work.rejects)]
        write_text(rejects_path, "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects))
    report = FilesReport(out_dir, len(entries), work.made, kept, len(rejects), rejects_path)
    assert report.made + report.kept + report.rejected == report.listed
    return report


def check_out_dir(out_dir: str | os.PathLike, entries: Sequence[Entry] = ()) -> None:
    """Refuse a folder that no result can be written to; it need not be there yet, and nothing is left in it.

    ValueError for a file, and for a folder that holds media of the entries, whose names results would take; OSError.
    """
    out_dir = Path(out_dir)
    place = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"{place} is a file; give a folder for the results")
    media = [os.path.abspath(path) for e in entries if (path := e.request.video or e.request.image) is not None]
    folders = {os.path.dirname(path) for path in media}
    folders |= {os.path.dirname(os.path.realpath(path)) for path in media if os.path.islink(path)}
    if os.path.realpath(out_dir) in map(os.path.realpath, folders):
        raise ValueError(f"{out_dir} holds the media that sound is made for; give another folder, to lose none of them")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from None


class _Work:
    """The results of one run: their names, their keys, what was made and what was not."""

    def __init__(self, pipeline: MMAudioPipeline, out_dir: Path, ending: str, options: Mapping[str, Any]):
        self.pipeline, self.out_dir, self.ending, self.options = pipeline, out_dir, ending, dict(options)
        self.rejects: list[tuple[str, str, str, str]] = []  # values of _REJECT
        self.made, self.bar = 0, None
        self.media: dict[str, list] = {}  # of each entry with a file: its name, size and time before it is read

    def path(self, entry: Entry) -> Path:
        """Where the result of an entry goes."""
        audio_only = entry.request.video is None and self.ending in VIDEO_FORMATS
        return self.out_dir / f"{entry.id}{'.wav' if audio_only else self.ending}"

    def record(self, entry: Entry) -> Path:
        """Where the record of an entry goes."""
        return self.out_dir / f"{entry.id}.json"

    def look_at(self, entry: Entry) -> Entry:
        """Note the state of the file of an entry, before it is read: one that changes is made anew."""
        media = entry.request.video or entry.request.image
        if entry.problem is None and media is not None:
            try:
                stat = os.stat(media)
            except OSError as error:
                return replace(entry, problem=("list", "not_found", f"{media}: {error.strerror}"))
            self.media[entry.id] = [Path(media).name, stat.st_size, stat.st_mtime_ns]
        return entry

    def facts(self, entry: Entry) -> dict[str, Any]:
        """What the result of an entry depends on: settings, weights, texts, and name, size and time of its file."""
        request = entry.request
        given = {name: value for name, value in asdict(request).items() if name not in ("video", "image")}
        if entry.id in self.media:
            given["media"] = self.media[entry.id]
        given = {name: value for name, value in given.items() if value not in (None, "")}
        return {
            "version": VERSION,
            "ending": self.path(entry).suffix,
            "request": given,
            "options": self.options,
            "made_by": self.pipeline.fingerprint(request),
        }

    def is_made(self, entry: Entry) -> bool:
        """Whether the result is there, whole, and made of the same."""
        record, path = read_json(self.record(entry)), self.path(entry)
        if not record or not path.is_file() or path.stat().st_size != record.get("bytes"):
            return False
        return record.get("key") == hash_of(self.facts(entry))

    def remove_stale_shards(self, pending: Sequence[Entry]) -> None:
        """Take away what an earlier run that was killed had half written."""
        names = {f".{self.path(entry).name}" for entry in pending}
        for path in self.out_dir.glob(".*.part"):
            if path.name.removesuffix(".part").rpartition(".")[0] in names:
                path.unlink(missing_ok=True)

    def reject(self, request: Request, problem: Exception, stage: str = "read") -> None:
        """Leave an item out."""
        other = "bad_request" if stage == "read" else "bad_sound"
        reason = problem.reason if isinstance(problem, MediaError) else other
        self.rejects.append((request.key, stage, reason, str(problem)))
        self.bar.update()

    def save(self, entry: Entry, result: Generated) -> None:
        """Write the result, and then its record."""
        path, record, facts = self.path(entry), self.record(entry), self.facts(entry)
        record.unlink(missing_ok=True)  # of another result, which is replaced now
        try:
            note = save_and_tell(result, path, entry.request.video)
        except ValueError as problem:  # of the video, or a sound that is not finite
            self.reject(entry.request, problem, "write")
            return
        notes = [text for text in (result.note, note) if text]
        size = {"bytes": path.stat().st_size, "seconds": len(result.waveform) / result.sample_rate}
        content = {"key": hash_of(facts), **size, "notes": notes, **facts}
        write_text(record, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        self.made += 1
        for text in notes:
            tqdm.write(f"{path}: {text}")
        self.bar.update()
