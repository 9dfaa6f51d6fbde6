"""Folders of media, lists of ids and captions, and the clips cut from long files. docs/media.md, "Lists".

Clip lists say which samples or seconds of audio files and long videos become rows of a feature store:

    audio files   id, name, start_sample, end_sample   at most `max_clips` clips of 8.1 s, 5 in the published lists
    videos        id, name, start                      at most `max_clips` clips from `start` seconds on
"""

import contextlib
import csv
import difflib
import io
import json
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmaudio_hf.config import AudioSource, ExtractionConfig, VideoSource
from mmaudio_hf.files import Share, add_path_to_oserror, file_key, hash_of, locked, read_json, replacing, write_text
from mmaudio_hf.media.audio import count_samples
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.video import video_seconds
from mmaudio_hf.schema import check_id, checked

# In order of preference where several files have one name; in any case of letters.
AUDIO_ENDINGS = (
    *(".flac", ".wav", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".wma"),
    *(".mka", ".webm", ".mp4", ".m4b", ".mov", ".mkv"),
)
VIDEO_ENDINGS = (
    *(".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v"),
    *(".ts", ".flv", ".3gp", ".mpg", ".mpeg", ".wmv", ".m2ts", ".mts", ".vob", ".ogv", ".3g2", ".asf", ".f4v"),
)
ENDINGS = {"video": VIDEO_ENDINGS, "audio": AUDIO_ENDINGS}

_TEXT_COLUMNS = ("label", "caption")

CLIP_SECONDS = 8.1
MAX_CLIPS = 5  # of an audio file, in the published lists
_VIDEO_MARGIN = 0.1  # s that a clip of a video may end before the track: the audio is often that much shorter
_AUDIO_COLUMNS = ("id", "name", "start_sample", "end_sample")
_VIDEO_COLUMNS = ("id", "name", "start")
_VERSION = 3  # part of the key of a shard: raise it when the same file gives other clips
_ALL_SHARDS = Share()


@dataclass(frozen=True)
class MediaItem:
    """One row of a media list; `row` is its line in the file (the header is line 1)."""

    id: str
    caption: str
    row: int


# --- Folders ---------------------------------------------------------------------------------------------------------


class MediaFolder:
    """The files of a folder and its subfolders, found by id in the time of a dictionary; read once.

    An id is the name of a file, with or without its ending. Endings count in any case of letters, and names are
    compared in Unicode's composed form (NFC) without outer white space, for file systems and archives differ in both.
    Hidden files are left out. kind: "video" or "audio". ValueError where there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike, kind: str):
        self.folder, self.kind, self.endings = Path(folder), kind, ENDINGS[kind]
        if not self.folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give the folder that holds the {kind} files")
        self.media: list[Path] = []  # files with one of the endings, in sorted order
        self.others: list[Path] = []
        paths, seen = [], set()
        for parent, folders, names in os.walk(self.folder, followlinks=True):  # each once, whatever links there are
            status = os.stat(parent)
            inode = status.st_dev, status.st_ino
            folders[:] = [name for name in folders if not name.startswith(".") and inode not in seen]
            paths += [Path(parent, name) for name in names if not name.startswith(".") and inode not in seen]
            seen.add(inode)
        for path in sorted(path for path in paths if path.is_file()):
            (self.media if path.suffix.lower() in self.endings else self.others).append(path)
        self._by_name: dict[str, list[Path]] = {}
        self._nearest: dict[str, Path] = {}
        order = lambda path: (self.endings.index(path.suffix.lower()), path.suffix != path.suffix.lower())  # noqa: E731
        for path in sorted(self.media, key=order):
            self._by_name.setdefault(normal_name(path.stem), []).append(path)
            self._nearest.setdefault(_loose_name(path.stem), path)
        for path in self.others:
            self._nearest.setdefault(_loose_name(path.stem), path)

    def find(self, item_id: str) -> Path:
        """The file of an id; MediaError not_found, which names what was looked for and what is nearly it."""
        check_id(item_id)
        name = normal_name(item_id)
        whole = lambda path: normal_name(path.name).lower() == name.lower()  # noqa: E731
        paths = self._by_name.get(name) or [*filter(whole, self._by_name.get(stem_of(name, self.kind), ()))]
        nearest = min((len(path.parts) for path in paths), default=0)
        paths = [path for path in paths if len(path.parts) == nearest]  # the folder before its subfolders
        exact = [path for path in paths if path.stem == item_id] or paths
        if not paths:
            raise MediaError("not_found", self._missing(item_id))
        if len({path.parent for path in exact}) > 1:
            names = " and ".join(str(path.relative_to(self.folder)) for path in exact[:2])
            raise MediaError("not_found", f"{self.folder}: {item_id!r} may be {names}; rename one of them")
        return exact[0]

    def unlisted(self, item_ids: Iterable[str]) -> list[Path]:
        """Media files that no id names."""
        listed = {stem_of(item_id, self.kind) for item_id in item_ids} | {normal_name(item_id) for item_id in item_ids}
        return [path for path in self.media if normal_name(path.stem) not in listed]

    def _missing(self, item_id: str) -> str:
        stem = stem_of(item_id, self.kind)
        near = self._nearest.get(_loose_name(stem))
        hint, ending = "; check the folder and the id", near.suffix.lower() if near else ""
        if near:
            kinds = [kind for kind in ENDINGS if ending in ENDINGS[kind] and ending not in self.endings]
            way = f"it is for a list of extraction.{kinds[0]}s" if kinds else "rename it or the id"
            hint = f"; there is {str(near.relative_to(self.folder))!r}: {way}"
        looked_for = f"no file {stem!r} with an ending of {' '.join(self.endings)}, in subfolders neither"
        return f"{self.folder / item_id}: no such file ({looked_for}){hint}"


def normal_name(name: str) -> str:
    """The form in which names are compared."""
    return unicodedata.normalize("NFC", name.strip())


def stem_of(item_id: str, kind: str) -> str:
    """An id in the form in which names are compared, without the ending of a media file that it may have."""
    stem, ending = os.path.splitext(normal_name(item_id))
    return stem if ending.lower() in ENDINGS[kind] else normal_name(item_id)


def _loose_name(name: str) -> str:
    """What names that are nearly the same have in common: letters of any case and numbers without leading zeros."""
    plain = unicodedata.normalize("NFKD", name).casefold()
    return re.sub(r"0*(\d+)", r"\1", re.sub(r"[^\w]|_", "", re.sub(r"(?<=\d)[\W_]+(?=\d)", "x", plain)))


def find_audio_file(folder: str | os.PathLike, name: str) -> Path:
    """The audio file of an id: flac before wav before the others; MediaError not_found."""
    return _find(folder, name, "audio")


def find_video(folder: str | os.PathLike, item_id: str) -> Path:
    """The video of an id: `ID.mp4`, or the same with another of `VIDEO_ENDINGS`; MediaError not_found."""
    return _find(folder, item_id, "video")


def _find(folder: str | os.PathLike, item_id: str, kind: str) -> Path:
    usual = Path(folder) / f"{check_id(item_id)}{ENDINGS[kind][0]}"  # without a look at the whole folder
    return usual if usual.is_file() else MediaFolder(folder, kind).find(item_id)


# --- Lists -----------------------------------------------------------------------------------------------------------


def read_media_list(
    path: str | os.PathLike, text_column: str = "label", *, unique_ids: bool | None = None
) -> list[MediaItem]:
    """Read a media list: tab-separated, with a header; `id` and `text_column` are used, other columns are ignored.

    "label" is the list of videos, where every id may occur once; "caption" is the list of audio files, where each row
    is another caption of the same file (`unique_ids` overrides this). Either name is accepted for the column. All
    values stay text: `NA` is a caption, `00008` keeps its zeros; white space around an id is no part of it. Quotes as
    pandas writes them; a BOM and CRLF are fine. ValueError names the file and line.
    """
    assert text_column in _TEXT_COLUMNS, text_column
    unique_ids = text_column == "label" if unique_ids is None else unique_ids
    items: list[MediaItem] = []
    lines: dict[str, int] = {}
    for line, row in read_table(path, ("id", text_column), synonyms=_TEXT_COLUMNS):
        where = f"{path}, line {line}"
        item_id = check_id(row["id"].strip(), where)
        name = normal_name(item_id)  # two forms of one name in Unicode are one file
        if unique_ids and name in lines:
            raise ValueError(f"{where}: id {item_id!r} is already on line {lines[name]}; remove one of the two rows")
        lines.setdefault(name, line)
        items.append(MediaItem(item_id, row[text_column], line))
    return items


def write_table(path: str | os.PathLike, rows: Iterable[Sequence]) -> None:
    """Replace a tab-separated file."""
    with add_path_to_oserror(path), replacing(Path(path)) as new, open(new, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)


def read_table(
    path: str | os.PathLike, columns: Sequence[str], synonyms: Sequence[str] = (), optional: Sequence[str] = ()
) -> list[tuple[int, dict[str, str]]]:
    """[(line number, {column: text})] of a tab-separated file with a header; blank lines are skipped.

    A column of `synonyms` may have any of those names, each in any case of letters. Columns of `optional` are given
    where they are there; a name that is nearly one of them is rejected. ValueError names the file and line.
    """
    lines = read_rows(path)
    indices = _column_indices(path, next(lines)[1], columns, synonyms, optional)
    rows = [(line, {name: row[index] for name, index in indices.items()}) for line, row in lines]
    if not rows:
        raise ValueError(f"{path}: has no rows after the header")
    return rows


def read_rows(
    path: str | os.PathLike, delimiter: str = "\t", header: Sequence[str] = ()
) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a table: first its header, or `header` for a file without one, then every row.

    Blank lines are skipped. ValueError names the file and the line where a row begins that cannot be read.
    """
    line, text = 1, read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = list(header) or [name.strip() for name in next(filter(None, reader), [])]
        if "\0" in "".join(columns):
            raise ValueError(f"{path}: has NUL bytes; write the file again, as UTF-8 text")
        yield line, columns
        line = reader.line_num + 1  # where a row begins: a quoted field may end on a later line
        for row in reader:
            if any(field.strip() for field in row):
                if len(row) != len(columns):
                    raise ValueError(f"{path}, line {line}: {len(row)} fields, the header has {len(columns)}")
                joined, delimiters = delimiter.join(row), len(columns) - 1
                if "\0" in joined:
                    raise ValueError(f"{path}, line {line}: has a NUL byte; write the file again, as UTF-8 text")
                # A caption may have several lines. Where a stray quote has swallowed rows, the first line and others
                # are rows.
                first, *others = (each.count(delimiter) for each in joined.splitlines())
                swallowed = sum(count >= delimiters for count in others)
                if first == delimiters > 0 and swallowed:
                    raise ValueError(
                        f"{path}, line {line}: a field begins with a quote here and ends on line {reader.line_num},"
                        f" with {swallowed} rows in it; remove the quote, or quote the field as pandas does"
                    )
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        problem = f"a field is too long ({error}); shorten it"
        if "field larger" not in str(error) and "unexpected end" not in str(error):
            problem = f"{error}; quote the field as pandas does"
        elif re.search(r'(^|[\t,;])"', "".join(re.split(r"\r\n?|\n", text)[line - 1 : line])):
            problem = f"a field begins with a quote here that nothing ends ({error}); remove it, or quote the field"
        raise ValueError(f"{path}, line {line}: {problem}") from error


# How files of other kinds begin, whatever they are called: what they are, and the way out.
_UNPACK, _EXPORT = "unpack it first", "export its rows as UTF-8 text"
_OTHER_KINDS = {
    b"PK": ("an Excel workbook or another zip archive", "save the sheet as CSV UTF-8, or unpack the archive"),
    b"\xd0\xcf\x11\xe0": ("a workbook of an old Excel", "save the sheet as CSV UTF-8"),
    **dict.fromkeys((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf"), ("compressed", _UNPACK)),
    b"PAR1": ("a parquet file", "give it to `mmaudio-hf prepare dataset parquet:FILE`, or save its rows as text"),
    **dict.fromkeys((b"ARROW1", b"SQLite format 3", b"\x89HDF", b"\x93NUMPY"), ("a table in binary form", _EXPORT)),
    **dict.fromkeys((b"%PDF", b"{\\rtf"), ("a document", _EXPORT)),
    **dict.fromkeys((b"<!doctype", b"<html", b"<?xml"), ("a page of the web or XML", "download the file itself")),
    b"version https://git-lfs": ("the pointer of a file in Git LFS", "fetch it by `git lfs pull`"),
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), ("UTF-16, not UTF-8 text", "save it as UTF-8")),
}


def read_text(path: str | os.PathLike) -> str:
    """A text file without its BOM, line ends as they are; ValueError where there is none, or it is not UTF-8."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: {'is a folder; give a file' if Path(path).is_dir() else 'no such file'}")
    content = Path(path).read_bytes()
    beginning = content[:32].lstrip().lower()
    for signature, (what, way) in _OTHER_KINDS.items():
        if beginning.startswith(signature.lower()):
            raise ValueError(f"{path}: is {what}: {way}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _column_indices(
    path: str | os.PathLike, header: list[str], columns: Sequence[str], synonyms: Sequence[str], optional: Sequence[str]
) -> dict[str, int]:
    if not header:
        raise ValueError(f"{path}: is empty; its first line must name the columns {', '.join(columns)}")
    lower, indices = [name.lower() for name in header], dict[str, int]()
    for name in columns:
        names = [name, *(s for s in synonyms if name in synonyms and s != name)]
        present = next((n for n in names if n in lower), None)
        if present is None:
            nearest = difflib.get_close_matches(name, header, n=1, cutoff=0.5)
            hint = f"; rename {nearest[0]!r}?" if nearest and len(header) > 1 else ""
            hint += "; columns must be separated by tabs" if len(header) == 1 else ""
            hint += "; `mmaudio-hf prepare` makes lists of csv files and other tables" if not indices else ""
            raise ValueError(f"{path}: no column {' or '.join(map(repr, names))}; it has {str(header)[:200]}{hint}")
        exact = header if present in header else lower
        if exact.count(present) > 1:
            raise ValueError(f"{path}: column {present!r} is there more than once")
        indices[name] = exact.index(present)
    for name in header:
        close = difflib.get_close_matches(name, optional, n=1, cutoff=0.8)
        if close and name not in optional and close[0] not in header:
            raise ValueError(f"{path}: column {name!r} is not known; rename it {close[0]!r}, or to something else")
        if name in optional and header.count(name) > 1:
            raise ValueError(f"{path}: column {name!r} is there more than once")
    return indices | {name: header.index(name) for name in optional if name in header}


# --- Clips -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """Samples `[start_sample, end_sample)` of the audio file called `name` (its stem), at the file's own rate."""

    id: str
    name: str
    start_sample: int
    end_sample: int


@dataclass(frozen=True)
class VideoStart:
    """A clip of the video called `name`, from `start` seconds on."""

    id: str
    name: str
    start: float


@dataclass(frozen=True)
class ClipReport:
    """What `write_clips` did: clips written, files rejected, and files that were not read.

    rejects, ignored: file, reason (`MediaError.reason`, bad_name, ignored) and message of each. With `pending_shards`,
    those that other processes have still to make, there is no list yet.
    """

    clips: int
    rejects: list[dict[str, str]]
    ignored: list[dict[str, str]]
    shards: int
    pending_shards: int


@checked
def partition(
    num_samples: int, sample_rate: int, clip_seconds: float = CLIP_SECONDS, max_clips: int = MAX_CLIPS
) -> list[tuple[int, int]]:
    """Cut an audio file into at most 5 clips of 8.1 s, evenly spread and not overlapping: `[(start, end), ...]`.

    max_clips: instead of 5; 0 is all that fit. Ends are exclusive; a file shorter than a clip gives none. Float
    comparison and rounding are those of the published clip lists.
    """
    if num_samples < 0 or sample_rate < 1:
        raise ValueError(f"{num_samples} samples at {sample_rate} Hz are no audio")
    if num_samples < sample_rate * clip_seconds:
        return []
    length = int(sample_rate * clip_seconds)
    count = min(max_clips or num_samples, num_samples // length)
    step = (num_samples - length) // (count - 1) if count > 1 else 0
    return [(i * step, i * step + length) for i in range(count)]


def partition_video(seconds: float, duration: float, max_clips: int) -> list[float]:
    """Starts (s) of at most `max_clips` clips (0: all that fit), evenly spread and not overlapping; [0] if short."""
    usable = seconds - _VIDEO_MARGIN
    fitting = int(usable / duration)
    count = max(1, min(max_clips or fitting, fitting))
    return [round(i * (usable - duration) / (count - 1), 3) if i else 0.0 for i in range(count)]


def write_clips(
    source: VideoSource | AudioSource,
    path: str | os.PathLike,
    *,
    duration: float = 8.0,
    shards_dir: str | os.PathLike | None = None,
    shard_size: int = 512,
    share: Share = _ALL_SHARDS,
    workers: int = 1,
    progress: bool = False,
) -> ClipReport:
    """Write the clip list `path` of a source; `rejects` beside it is for the caller to write.

    Audio files are those of the folder that have a known ending (`AUDIO_ENDINGS`); they are decoded once, so that
    damaged files are found here and lengths are true. Videos are those of the list; all their packets are read. Files
    that are damaged or too short, that are not there, bad names and two files of one name in two subfolders are
    rejects. Other files of the folder, and a second audio file with the same stem (flac before wav before the others),
    are `ignored`.

    The work is divided in shards of `shard_size` files. A process makes those of its `share` whose lock it gets, each a
    JSON in `shards_dir` (None: nothing is kept), so a later run makes only what is missing or has changed. The process
    that finds all of them complete replaces the list. ValueError if there is no file to read.
    """
    files, rejects, ignored, whole = _files_of(source)
    settings: list[Any] = [_VERSION, duration, source.max_clips]
    if isinstance(source, AudioSource):  # the published settings have the key that they had without others
        settings[1] = audio_clip_seconds(source, duration)
        if source.max_clips == MAX_CLIPS:
            settings = settings[: 1 if settings[1] == CLIP_SECONDS else 2]
    settings += whole
    with contextlib.ExitStack() as stack:
        folder = Path(shards_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        blocks = [files[first : first + shard_size] for first in range(0, len(files), shard_size)]
        shards = [_Shard(folder / f"clips_{i:05d}.json", block, settings) for i, block in enumerate(blocks)]
        ours = shards[share.index :: share.count]
        total = sum(len(shard.files) for shard in ours)
        bar = stack.enter_context(tqdm(desc=source.name, total=total, unit="file", disable=not progress))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        outcomes_of = partial(pool.map, partial(_outcome, source, duration, whole))
        busy = [shard for shard in ours if not shard.make(outcomes_of, bar.update, wait=False)]
        for shard in busy:  # those that other processes are making are waited for, in case they do not finish them
            shard.make(outcomes_of, bar.update, wait=True)
        outcomes = [shard.outcomes() for shard in shards]
    rows = [row for shard in outcomes for outcome in shard or () for row in outcome["rows"]]
    rejects += [outcome["reject"] for shard in outcomes for outcome in shard or () if outcome["reject"]]
    pending = outcomes.count(None)
    if rows and not pending:
        write_table(path, [_AUDIO_COLUMNS if isinstance(source, AudioSource) else _VIDEO_COLUMNS, *rows])
    return ClipReport(len(rows), sorted(rejects, key=lambda reject: reject["file"]), ignored, len(shards), pending)


def _files_of(source: VideoSource | AudioSource) -> tuple[list[Path], list[dict], list[dict], list[str]]:
    """Files to read, rejects and ignored ones among the others, and names of videos that are kept whole."""
    is_video = isinstance(source, VideoSource)
    folder = MediaFolder(source.media_dir, "video" if is_video else "audio")
    files: dict[Path, None] = {}
    rejects, ignored, whole = [], [], list[str]()
    stems = Counter(normal_name(path.stem) for path in folder.media)
    if not is_video and not folder.media:
        raise ValueError(f"{source.media_dir}: no audio files there; looked for {' '.join(AUDIO_ENDINGS)}")
    listed: list[tuple[str, Path | None]] = [(str(path.relative_to(folder.folder)), path) for path in folder.media]
    if is_video:
        listed = [(item.id, None) for item in read_media_list(source.list, "label")]
    for name, path in listed:
        try:
            chosen = folder.find(name if path is None else normal_name(path.stem))
        except MediaError as error:
            rejects.append(_reject(name, error.reason, str(error)))
        except ValueError as error:
            rejects.append(_reject(name, "bad_name", f"{error}; rename the file"))
        else:
            if path in (None, chosen):
                files[chosen] = None
                if is_video and stems[normal_name(chosen.stem)] > 1 and normal_name(name) == normal_name(chosen.name):
                    whole.append(chosen.name)
            else:
                ignored.append(_reject(name, "ignored", f"{path}: {chosen.name} has the same name and comes first"))
    for path in folder.others if not is_video else ():
        message = f"{path}: has no ending of an audio file"
        ignored.append(_reject(str(path.relative_to(folder.folder)), "ignored", message))
    return list(files), rejects, ignored, whole


def _outcome(source: VideoSource | AudioSource, duration: float, whole: Sequence[str], path: Path) -> dict[str, Any]:
    try:
        # Where other files of the folder have the stem, and the list names the ending, it tells their rows apart.
        name, rows = check_id(normal_name(path.name if path.name in whole else path.stem)), list[list]()
        if isinstance(source, VideoSource):
            starts = partition_video(video_seconds(path), duration, source.max_clips)
            rows = [[f"{name}_{i}", name, start] for i, start in enumerate(starts)]
            if source.max_clips == 0 and len(starts) == 1:  # the row that it has without a list
                rows = [[name, name, 0.0]]
        else:
            (num_samples, rate), needed = count_samples(path), audio_clip_seconds(source, duration)
            spans = partition(num_samples, rate, needed, source.max_clips)
            rows = [[f"{name}_{i}", name, *span] for i, span in enumerate(spans)]
            if not rows:
                have = num_samples / rate if rate else 0.0
                raise MediaError("audio_too_short", f"{path}: {have:.3f} s of audio, {needed} s needed")
        return {"rows": rows, "reject": None}
    except MediaError as error:
        return {"rows": [], "reject": _reject(path.name, error.reason, str(error))}
    except ValueError as error:
        return {"rows": [], "reject": _reject(path.name, "bad_name", str(error))}


class _Shard:
    """The outcomes of a block of files, in a JSON that is complete when its key is that of the files."""

    def __init__(self, path: Path, files: Sequence[Path], settings: list):
        self.path, self.files = path, files
        self.key = hash_of([settings, [[file.name, file_key(file)] for file in files]])

    def outcomes(self) -> list[dict[str, Any]] | None:
        content = read_json(self.path)
        return content["outcomes"] if content.get("key") == self.key else None

    def make(self, outcomes_of: Callable, advance: Callable[[int], Any], wait: bool) -> bool:
        """Make it unless it is complete; False when another process has its lock, and `wait` is not set."""
        with locked(self.path.with_suffix(".lock"), wait=wait) as acquired:
            if acquired and self.outcomes() is None:
                outcomes = []
                for outcome in outcomes_of(self.files):
                    outcomes.append(outcome)
                    advance(1)
                write_text(self.path, json.dumps({"key": self.key, "outcomes": outcomes}) + "\n")
            elif acquired:
                advance(len(self.files))
            return acquired


def _reject(file: str, reason: str, message: str) -> dict[str, str]:
    return {"file": file, "reason": reason, "message": message}


def audio_clip_seconds(source: AudioSource, duration: float) -> float:
    """What is cut for a clip of `duration`: 0.1 s more, and the published 8.1 s where the source has no duration."""
    longer = round(duration + 0.1, 6)
    return longer if source.duration else max(CLIP_SECONDS, longer)


def check_sources(extraction: ExtractionConfig, *, lists: bool = True) -> None:
    """ValueError that names every folder, and with `lists` every list, of `extraction` that cannot be read.

    Opens no media. Clip lists are read where they exist: `partition` writes them.
    """
    sources: list[VideoSource | AudioSource] = [*extraction.videos, *extraction.audios]
    problems = [problem for source in sources for problem in source_problems(extraction, source, lists)]
    if problems:
        raise ValueError("; ".join(problems))


def source_problems(extraction: ExtractionConfig, source: VideoSource | AudioSource, lists: bool = True) -> list[str]:
    """What `check_sources` says of one source."""
    problems = []
    if not Path(source.media_dir).is_dir():
        problems.append(f"{source.media_dir}: no such folder; it must hold the media of {source.name!r}")
    clips = extraction.clips_path(source)
    try:
        if lists:
            read_media_list(source.list, "caption" if isinstance(source, AudioSource) else "label")
        if lists and clips.is_file() and isinstance(source, AudioSource):
            read_clips(clips)
        elif lists and clips.is_file() and isinstance(source, VideoSource) and source.max_clips != 1:
            read_video_clips(clips)
    except ValueError as error:
        problems.append(str(error))
    return problems


def read_clips(path: str | os.PathLike) -> list[Clip]:
    """Read a clip list of audio files; ValueError names the file and line of a bad or repeated row."""
    return [Clip(*row) for row in _read_rows(path, _AUDIO_COLUMNS, _samples)]


def read_video_clips(path: str | os.PathLike) -> list[VideoStart]:
    """Read a clip list of videos; ValueError names the file and line of a bad or repeated row."""
    return [VideoStart(*row) for row in _read_rows(path, _VIDEO_COLUMNS, _seconds)]


def starts_by_name(path: str | os.PathLike) -> dict[str, list[VideoStart]]:
    """Name of a long video -> its clips in a clip list."""
    starts: dict[str, list[VideoStart]] = {}
    for clip in read_video_clips(path):
        starts.setdefault(clip.name, []).append(clip)
    return starts


def starts_of(starts: Mapping[str, list[VideoStart]], item_id: str, path: str | os.PathLike) -> list[VideoStart]:
    """The clips of a listed video whose file is `path`; [] where `starts_by_name` has none."""
    whole = normal_name(Path(path).name)  # the name of one of two listed files that have this stem
    return starts.get(whole) or starts.get(stem_of(item_id, "video"), [])


def _read_rows(path: str | os.PathLike, columns: Sequence[str], values_of: Callable) -> list[tuple]:
    rows: list[tuple] = []
    lines: dict[str, int] = {}
    for line, row in read_table(path, columns):
        where = f"{path}, line {line}"
        clip_id, name = check_id(row["id"], where), check_id(row["name"], where)
        if clip_id in lines:
            raise ValueError(f"{where}: id {clip_id!r} is already on line {lines[clip_id]}; ids must differ")
        lines[clip_id] = line
        rows.append((clip_id, name, *values_of(row, where)))
    return rows


def _samples(row: dict[str, str], where: str) -> tuple[int, int]:
    try:
        start, end = int(row["start_sample"]), int(row["end_sample"])
    except ValueError:
        raise ValueError(f"{where}: start_sample and end_sample must be whole numbers") from None
    if not 0 <= start < end:
        raise ValueError(f"{where}: samples [{start}, {end}) are not a clip; make the list again")
    return start, end


def _seconds(row: dict[str, str], where: str) -> tuple[float]:
    try:
        start = float(row["start"])
    except ValueError:
        start = -1.0
    if not 0 <= start < float("inf"):
        raise ValueError(f"{where}: start {row['start']!r} must be a number of seconds, 0 or more")
    return (start,)
