"""What is wrong with the media of a list, known before any feature is made.

    OUT.parquet   one row per listed item, or per clip of a long video: figures of its file and of what is used of it,
                  verdicts and the reason of each (`SCHEMA`)
    OUT.html      the same as a page (`pages/audit.py`)
    OUT.sqlite    the figures of every file measured so far, by path, size and time of change

Files are measured by processes and the figures kept as they come, so an audit that was killed is
resumed and ends with the same table. Memory grows with the length of the lists alone; nothing of the media is kept.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import av.error
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from mmaudio_hf.files import file_key, hash_of, replacing
from mmaudio_hf.media import measure
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.lists import (
    CLIP_SECONDS,
    MediaFolder,
    VideoStart,
    read_media_list,
    starts_by_name,
    starts_of,
    stem_of,
)
from mmaudio_hf.schema import AuditVerdict, RunError, check_id

VERDICTS: tuple[str, ...] = get_args(AuditVerdict)
OF_SYNC = frozenset(("unrelated", "offset", "caption_mismatch", "frames_mismatch"))  # what audit --sync adds
# Remarks: the item counts as ok.
HARMLESS = ("audio_tracks", "hdr", "interlaced", "non_square_pixels", "empty_caption", "duplicate_caption")

_TEXT, _LISTED, _FLAG = pa.string(), pa.list_(pa.string()), pa.bool_()
_INT, _SIZE, _FLOAT = pa.int64(), pa.int32(), pa.float64()
SCHEMA = pa.schema(
    [
        # clip: its row in the store, the id of a video unless it gives several. start: s into the video. kind: video or
        # audio. held_out: validated or tested on. row: line of the list. reasons: one for each verdict.
        *(("id", _TEXT), ("clip", _TEXT), ("start", _FLOAT), ("source", _TEXT), ("kind", _TEXT), ("held_out", _FLAG)),
        *(("row", _INT), ("path", _TEXT), ("ok", _FLAG), ("verdicts", _LISTED), ("reasons", _LISTED)),
        *(("bytes", _INT), ("mtime_ns", _INT), ("container", _TEXT)),
        ("duration", _FLOAT),  # s for which both tracks, or the audio file, have data
        ("stated_duration", _FLOAT),  # s, by the container
        *(("video_codec", _TEXT), ("width", _SIZE), ("height", _SIZE)),  # as stored, before the rotation in degrees
        *(("rotation", _SIZE), ("fps", _FLOAT), ("frames", _INT), ("variable_frame_rate", _FLAG)),
        ("uneven_intervals", _FLOAT),  # share of the intervals between frames that are not the usual one
        *(("video_start", _FLOAT), ("video_duration", _FLOAT), ("sampled_pictures", _SIZE)),
        ("still_fraction", _FLOAT),  # share of the sampled frames that are like the one before
        *(("hdr", _TEXT), ("interlaced", _FLAG)),  # PQ or HLG
        ("pixel_aspect", _FLOAT),  # width of a pixel by its height
        ("largest_change", _FLOAT),  # of a cell between two of them, of 255
        *(("audio_codec", _TEXT), ("sample_rate", _SIZE), ("channels", _SIZE)),
        *(("audio_start", _FLOAT), ("audio_duration", _FLOAT), ("audio_tracks", _SIZE)),
        ("audio_drift", _FLOAT),  # s by which timestamps and the number of samples before them differ at most
        ("start_gap", _FLOAT),  # audio_start - video_start
        *(("peak", _FLOAT), ("level_dbfs", _FLOAT)),  # of the mono mix: of the whole track, and its RMS
        *(("silent_fraction", _FLOAT), ("clipped_fraction", _FLOAT)),
        *(("file_sha256", _TEXT), ("video_hash", _TEXT), ("audio_hash", _TEXT)),  # hashes of the packets
        ("thumbnails", _TEXT),  # frames of the four quarters side by side, base64 of a JPEG
        ("copy_of", _INT),  # row of this table with the same content, counted from 0
        ("captions", _LISTED),
        ("sync", _TEXT),  # related, offset, unrelated or unknown; none where it was not measured
        ("sync_offset", _FLOAT),  # s that the audio is late
        ("sync_fit", _FLOAT),  # how well frames and audio agree at this offset, of 1
        ("sync_chance", _FLOAT),  # share of the audio of other clips that fits as well
        *(("clap_score", _FLOAT), ("imagebind_score", _FLOAT)),  # cosines of caption and of frames with the audio
        *(("sync_seconds", _FLOAT), ("sync_unknown", _TEXT)),  # s that were compared; why it is unknown
    ]
)
_MEASURED = tuple(SCHEMA.names[SCHEMA.get_field_index("container") : SCHEMA.get_field_index("copy_of")])
_SYNC = tuple(SCHEMA.names[SCHEMA.get_field_index("sync") :])
Sync = Mapping[tuple[str, str], Mapping[str, Any]]
"""(source, clip) -> figures of `evaluation.offsets`."""
_TOLERANCE = 0.02  # s that may be missing, as in `read_video`
_ROWS = 1024  # per write
_COMMIT_SECONDS = 1.0


@dataclass(frozen=True)
class AuditSource:
    """A list and the folder of its media. kind: "video" or "audio". seconds: of its clips, 0: those of the audit.

    clips: list of the clips of long videos, each of which is an item; empty: their first seconds.
    """

    name: str
    kind: str
    media_dir: str | os.PathLike
    list: str | os.PathLike
    trains: bool = True
    held_out: bool = False
    seconds: float = 0.0
    clips: str | os.PathLike = ""


@dataclass(frozen=True)
class Limits:
    """Where a figure becomes a verdict; the fractions count from 0 to 1, the rest is in seconds."""

    max_still: float = 0.85  # of the sampled frames: one change of scene in a slide show is not enough
    max_silent: float = 0.95  # of the audio below -60 dBFS: 0.4 s of 8 s may be all there is to hear
    max_clipped: float = 0.005
    max_uneven: float = 0.02  # of the intervals between frames
    max_start_gap: float = 0.1
    max_drift: float = 0.04  # of the audio within a file: a frame of 25 fps
    max_duration: float = 60.0  # of a video
    max_offset: float = 0.2  # of the audio against what is seen
    max_chance: float = 0.01  # of the audio of other clips that fits the frames as well
    min_clap: float = 0.0  # cosine of caption and audio
    min_imagebind: float = 0.0  # cosine of frames and audio
    max_difference: float = 1.0  # between the tracks, or the stated and the true length

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0:
                raise ValueError(f"limit {name} must be 0 or more, not {value}")


@dataclass(frozen=True)
class AuditReport:
    """Result of an audit: listed items, those with no verdict other than remarks, and items per verdict."""

    table: Path
    listed: int
    ok: int
    counts: dict[str, int]
    measured: int  # files read in this run
    seconds: float
    bad_ids: tuple[str, ...] = ()  # of the rows of a store


@dataclass(slots=True)
class Item:
    """A row of a list or one of its clips, or all rows of one audio file."""

    source: AuditSource
    id: str
    row: int
    captions: tuple[str, ...]
    path: str
    key: tuple[int, int] | None  # bytes, mtime in ns; None: no such file
    clip: str
    starts: tuple[float, ...] = (0.0,)  # s, of the clips of the file
    number: int = 0  # which of them it is
    problem: str = ""  # why there is no file

    @property
    def start(self) -> float:
        return self.starts[self.number]


def audit(
    sources: Sequence[AuditSource],
    table: str | os.PathLike,
    *,
    duration: float = 8.0,
    limits: Limits | None = None,
    workers: int = 1,
    progress: bool = True,
    sync: Sync | None = None,
) -> AuditReport:
    """Measure all files of the lists and write `table` with their verdicts, one row per item in the order of the lists.

    duration: seconds of a clip of a video, where its source has none. Files measured by an earlier call with this
    table, killed or not, are not read again unless their size or time of change differs. sync: what
    `evaluation.offsets` measured, for the verdicts on audio that does not belong to its frames. ValueError for mistakes
    in lists and settings, OSError and RunError for faults of the machine.
    """
    began, table = time.monotonic(), Path(table)
    _check(sources, table, workers, duration)
    limits = limits or Limits()
    items = [item for source in sources for item in items_of(source)]
    table.parent.mkdir(parents=True, exist_ok=True)
    with _Measures(table.with_suffix(".sqlite"), duration) as measures:
        measured = _measure(items, measures, workers, progress)
        known = _Known(items, measures, limits)
        settings = {"duration": duration, "limits": asdict(limits), "sources": [_plain(source) for source in sources]}
        rows = _rows(items, measures, known, limits, duration, sync or {})
        ok, counts = _write(table, rows, settings | {"sync": sync is not None})
    return AuditReport(table, len(items), ok, counts, measured, time.monotonic() - began)


def known_problems(
    table: str | os.PathLike, source: AuditSource, reject: Sequence[str], *, renew: str
) -> dict[str, tuple[str, str]]:
    """Clip -> (verdict, message) of the items of a source to which the table gives a verdict of `reject`.

    ValueError when there is no table, it is not one, or it does not describe the listed files as they are now: every
    item must be there, with its start and the size and the time of change that its file has. `renew` is the command
    that makes it.
    """
    if missing := sorted(OF_SYNC & set(reject)):
        _check_sync(table, f"extraction.reject names {', '.join(missing)}", renew)
    rows = {row["clip"]: row for row in _read(table, renew) if row["source"] == source.name}
    stale, problems = [], {}
    for item in items_of(source):
        row = rows.get(item.clip)
        known = (item.start, *(item.key or (None, None)))
        if row is None or (row["start"], row["bytes"], row["mtime_ns"]) != known:
            stale.append(item.path)
        else:
            verdicts = dict(zip(row["verdicts"], row["reasons"], strict=True))
            verdict = next((verdict for verdict in VERDICTS if verdict in reject and verdict in verdicts), None)
            if verdict is not None:
                problems[item.clip] = (verdict, f"{item.path}: {verdicts[verdict]}")
    if stale:
        raise ValueError(
            f"{table}: is older than the media of {source.name!r}: {len(stale)} listed files or clips are new or have"
            f" changed, as {stale[0]}; renew it with `{renew}`"
        )
    return problems


def known_offsets(table: str | os.PathLike, source: AuditSource, *, renew: str) -> dict[str, float]:
    """Clip -> seconds that its audio is late, of the items of a source with the verdict `offset`."""
    _check_sync(table, "extraction.correct_offset is set", renew)
    rows = (row for row in _read(table, renew, "sync_offset") if row["source"] == source.name)
    return {row["clip"]: row["sync_offset"] for row in rows if "offset" in row["verdicts"]}


def _check_sync(table: str | os.PathLike, why: str, renew: str) -> None:
    if Path(table).is_file():  # without one `_read` says so
        with contextlib.suppress(pa.ArrowException, KeyError, TypeError):
            if json.loads(pq.read_schema(table).metadata[b"mmaudio_hf.audit"]).get("sync"):
                return
        raise ValueError(f"{table}: {why}, but it was made without --sync; renew it with `{renew} --sync`")


def _read(table: str | os.PathLike, renew: str, *more: str) -> Iterator[dict[str, Any]]:
    columns = ["id", "source", "bytes", "mtime_ns", "verdicts", "reasons", *more]
    if not Path(table).is_file():
        raise ValueError(f"{table}: no such audit; make it with `{renew}`")
    try:
        with pq.ParquetFile(table) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise pa.ArrowInvalid(f"no column {missing[0]}")
            columns += [name for name in ("clip", "start") if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():  # of earlier versions every item was the first clip of its file
                    yield {"clip": row["id"], "start": 0.0} | row
    except pa.ArrowException as error:
        raise ValueError(f"{table}: is no audit table ({error}); make it again with `{renew}`") from error


# --- lists ---------------------------------------------------------------------------------------------------------


def check_table(table: Path) -> None:
    """ValueError for another name than a table's."""
    if table.suffix != ".parquet":
        raise ValueError(f"{table}: the table of an audit is a .parquet file")


def _check(sources: Sequence[AuditSource], table: Path, workers: int, duration: float) -> None:
    if not sources:
        raise ValueError("there is nothing to audit: name a list of videos or audio files")
    check_table(table)
    if workers < 1 or not duration > 0:
        raise ValueError(f"workers {workers} must be at least 1 and duration {duration} more than 0")
    for name, count in Counter(source.name for source in sources).items():
        check_id(name, "name of a source")
        if count > 1:
            raise ValueError(f"two sources are called {name!r}; their names must differ")
    for source in sources:
        if not Path(source.media_dir).is_dir():
            raise ValueError(f"{source.media_dir}: no such folder; it must hold the media of {source.name!r}")


def items_of(source: AuditSource) -> Iterator[Item]:
    """Every row of a list of videos, or every clip of it; every audio file once, with its captions."""
    video, folder = source.kind == "video", MediaFolder(source.media_dir, source.kind)
    rows = read_media_list(source.list, "label" if video else "caption", unique_ids=False)
    clips = starts_by_name(source.clips) if source.clips and Path(source.clips).is_file() else {}
    captions: dict[str, dict[str, None]] = {}
    for row in rows:
        captions.setdefault(stem_of(row.id, source.kind), {})[row.caption] = None
    seen = set()
    for row in rows:
        name = stem_of(row.id, source.kind)
        if not video and name in seen:
            continue
        seen.add(name)
        path, problem = Path(source.media_dir) / row.id, ""
        try:
            path = folder.find(row.id)
        except MediaError as error:
            problem = str(error)
        texts, key = (row.caption,) if video else tuple(captions[name]), file_key(path)
        # A file without a clip has one row all the same, which says why.
        of_file = starts_of(clips, row.id, path) or [VideoStart(row.id, row.id, 0.0)]
        starts = tuple(clip.start for clip in of_file)
        for number, clip in enumerate(of_file):
            yield Item(source, row.id, row.row, texts, str(path), key, clip.id, starts, number, problem)


def _plain(source: AuditSource) -> dict[str, Any]:
    return asdict(source) | {name: str(getattr(source, name)) for name in ("media_dir", "list", "clips")}


# --- measuring -----------------------------------------------------------------------------------------------------


class _Measures:
    """Figures of files on disk, under path, kind and how they were measured; for one size and time of change."""

    def __init__(self, path: Path, duration: float):
        self.path, self.duration = path, duration
        self.last: tuple[Any, dict[str, Any]] = (None, {})  # of the file before: its clips follow each other

    def seconds(self, item: Item) -> float:
        """Of a clip of a video."""
        return item.source.seconds or self.duration

    def where(self, item: Item) -> tuple[str, str]:
        """The path of its file, and what the figures depend on."""
        clips = f" {hash_of(item.starts)}" if item.starts != (0.0,) else ""
        how = f" {self.seconds(item):g}{clips}" if item.source.kind == "video" else ""
        return os.path.abspath(item.path), f"{measure.VERSION} {item.source.kind}{how}"

    def __enter__(self) -> "_Measures":
        with self._faults():
            self.base = sqlite3.connect(self.path)
            self.base.execute(
                "CREATE TABLE IF NOT EXISTS figures (path TEXT, how TEXT, bytes INTEGER, mtime_ns INTEGER,"
                " figures TEXT, PRIMARY KEY (path, how))"
            )
            self.base.commit()
        self.committed = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        with self._faults():
            self.base.commit()
        self.base.close()

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RunError(
                f"{self.path}: cannot be used ({error}); if another audit writes it, wait for that one; if the disk is"
                " full, free some space; if the file is damaged, delete it, and all files are measured again"
            ) from error

    def find(self, item: Item) -> dict[str, Any] | None:
        """Figures of the file of an item in its present state and of its clip, None if there are none."""
        if item.key is None:
            return None
        query, where = "SELECT bytes, mtime_ns, figures FROM figures WHERE path = ? AND how = ?", self.where(item)
        if self.last[0] != (where, item.key):
            with self._faults():
                row = self.base.execute(query, where).fetchone()
            if row is None or row[:2] != item.key:
                return None
            self.last = (where, item.key), json.loads(row[2])
        figures = self.last[1]
        return figures | figures["clips"][item.number] if "clips" in figures else figures

    def keep(self, item: Item, figures: Mapping[str, Any]) -> None:
        """Safe on the disk within a second."""
        row = *self.where(item), *(item.key or ()), json.dumps(figures)
        self.last = (None, {})
        with self._faults():
            self.base.execute("INSERT OR REPLACE INTO figures VALUES (?, ?, ?, ?, ?)", row)
            if time.monotonic() - self.committed > _COMMIT_SECONDS:
                self.base.commit()
                self.committed = time.monotonic()


def _measure(items: Sequence[Item], measures: _Measures, workers: int, progress: bool) -> int:
    """Measure what is not known yet; returns the number of files."""
    files = {measures.where(item): item for item in items if item.key is not None}
    # A file that did not open may have been a matter of rights or memory: it is tried again.
    pending = [item for item in files.values() if not (measures.find(item) or {}).get("opened")]
    done = len(files) - len(pending)
    with tqdm(total=len(files), initial=done, desc="audit", unit="file", disable=not progress, smoothing=0.1) as bar:
        for item, figures in _measured(pending, measures, workers):
            measures.keep(item, figures)
            bar.update()
    return len(pending)


def _measured(pending: Sequence[Item], measures: _Measures, workers: int) -> Iterator[tuple[Item, dict[str, Any]]]:
    """(item, figures) as they come. Files that were being read when a process died are read again one at a time."""
    waiting = iter(pending)
    suspects: list[Item] = []
    while True:
        with contextlib.suppress(BrokenProcessPool):
            yield from _in_processes(waiting, suspects, measures, min(workers, len(pending)))
        if not suspects:
            return
        for item in suspects:
            alone: list[Item] = []
            with contextlib.suppress(BrokenProcessPool):
                yield from _in_processes(iter([item]), alone, measures, 1)
            if alone:
                yield item, {"opened": False, "damage": "the decoder crashes on it"}
        suspects.clear()


def _in_processes(
    waiting: Iterator[Item], unfinished: list[Item], measures: _Measures, workers: int
) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Measure in a pool that lives until the last file; `unfinished` has what was begun and not yielded."""
    # Processes are forked from a server that has imported this module and nothing else: neither threads nor a GPU of
    # the caller come along, and a hundred of them start in a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # A Ctrl-C during its imports would end the server with a traceback: it begins, and stays, without this signal.
    multiprocessing.resource_tracker.ensure_running()  # first: its start lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    pool = ProcessPoolExecutor(max(1, workers), context, _start_worker)
    running = {}
    try:
        while True:
            for item in waiting:
                unfinished.append(item)
                how = item.source.kind, measures.seconds(item), item.starts
                running[pool.submit(_figures_of, item.path, *how)] = item
                if len(running) >= 2 * workers:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running[future]
                figures = future.result()
                del running[future]
                unfinished.remove(item)
                yield item, figures
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers wait for files for ever when the main process is killed; end with it."""
    if (parent := multiprocessing.parent_process()) is not None:
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _figures_of(path: str, kind: str, duration: float, starts: tuple[float, ...]) -> dict[str, Any]:
    try:
        return measure.measure(path, kind, duration, starts)
    except Exception as error:
        if isinstance(error, (OSError, MemoryError)) and not isinstance(error, (av.error.FFmpegError, PermissionError)):
            raise  # the machine's fault, not the file's
        return {"opened": False, "damage": f"reading it failed ({error!r})"}


# --- verdicts -------------------------------------------------------------------------------------------------------


class _Known:
    """What the verdicts on one item need of all others: who else has its id, its captions and its content."""

    def __init__(self, items: Sequence[Item], measures: _Measures, limits: Limits):
        self.items, self.limits = items, limits
        self.ids: dict[tuple[str, str], int] = {}  # (source, id): the first item
        self.captions: Counter = Counter()  # (source, caption): items
        self.contents: dict[bool, dict[bytes, int]] = {True: {}, False: {}}  # by `trains`; hash: the first item
        self.held_ids: dict[str, int] = {}
        self.held_contents: dict[bytes, int] = {}
        for number, item in enumerate(items):
            self.ids.setdefault((item.source.name, item.id), number)
            self.captions.update((item.source.name, caption) for caption in item.captions if item.number == 0)
            if item.source.held_out:
                self.held_ids.setdefault(item.id, number)
            for _, content in _contents(measures.find(item), limits):
                self.contents[item.source.trains].setdefault(content, number)
                if item.source.held_out:
                    self.held_contents.setdefault(content, number)

    def copies(self, item: Item, figures: Mapping[str, Any] | None) -> Iterator[tuple[str, str, int]]:
        """(verdict, what is the same, number of the other item) for every content that an item has in common."""
        for what, content in _contents(figures, self.limits):
            first = self.contents[item.source.trains][content]
            if self.items[first].id != item.id:
                yield "duplicate_content", what, first
            if item.source.trains and content in self.held_contents:
                yield "leakage", what, self.held_contents[content]

    def name(self, number: int) -> str:
        item = self.items[number]
        return f"{item.id!r} of {item.source.name}"


def _contents(figures: Mapping[str, Any] | None, limits: Limits) -> Iterator[tuple[str, bytes]]:
    """(what it is, hash) of everything that a copy of this file would have in common with it.

    Silence and frames that do not move do not count: they are alike without being copies.
    """
    if not figures or not figures["opened"]:
        return
    yield "file", bytes.fromhex(figures["file_sha256"])[:16]
    if figures.get("video_hash") and figures.get("still_fraction", 1.0) < limits.max_still:
        yield "frames", bytes.fromhex(figures["video_hash"])
    if figures.get("audio_hash") and figures.get("silent_fraction", 1.0) < limits.max_silent:
        yield "audio", bytes.fromhex(figures["audio_hash"])


def _verdicts(
    item: Item,
    figures: Mapping[str, Any] | None,
    known: _Known,
    limits: Limits,
    duration: float,
    heard: Mapping[str, Any],
) -> dict[str, str]:
    """verdict -> reason of one item, in the order of `VERDICTS`."""
    if item.key is None or figures is None:
        verdicts = {"not_found": item.problem or f"{item.path}: no such file"}
    elif not figures["opened"]:
        verdicts = {"unreadable": figures["damage"]}
    else:
        needed = (item.source.seconds or duration) if item.source.kind == "video" else CLIP_SECONDS
        if item.source.kind == "audio" and item.source.seconds:
            needed = item.source.seconds + 0.1  # as `partition` cuts it
        verdicts = _verdicts_of_file(item, figures, limits, needed)
    verdicts |= _verdicts_among_others(item, figures, known)
    verdicts |= sync_verdicts(heard, limits, verdicts)
    return {verdict: verdicts[verdict] for verdict in VERDICTS if verdict in verdicts}


def _verdicts_among_others(item: Item, figures: Mapping[str, Any] | None, known: _Known) -> dict[str, str]:
    verdicts = {}
    if "" in {caption.strip() for caption in item.captions}:
        verdicts["empty_caption"] = "it has no text"
    first = known.items[known.ids[item.source.name, item.id]]
    if first.row != item.row:
        verdicts["duplicate_id"] = f"the id is on line {first.row} of the list too"
    others = max(known.captions[item.source.name, caption] for caption in item.captions) - 1
    if others:
        verdicts["duplicate_caption"] = f"{others} other item{'s have' if others > 1 else ' has'} the same caption"
    if item.source.trains and item.id in known.held_ids:
        verdicts["leakage"] = f"the id is held out in {known.items[known.held_ids[item.id]].source.name}"
    for verdict, what, other in known.copies(item, figures):
        held_out = ", held out" if verdict == "leakage" else ""
        verdicts.setdefault(verdict, f"the same {what} as {known.name(other)}{held_out}")
    return verdicts


def _verdicts_of_file(item: Item, figures: Mapping[str, Any], limits: Limits, needed: float) -> dict[str, str]:
    """Verdicts on a file that opens, of which `needed` seconds are used from the start of the item on."""
    verdicts, kind = {}, item.source.kind
    if figures["damage"]:
        verdicts["damaged" if figures["duration"] else "unreadable"] = figures["damage"]
    if "audio_codec" not in figures:
        verdicts["no_audio"] = "has no readable audio"
    if kind == "video" and "video_codec" not in figures:
        verdicts["no_video"] = "has no video track"
    if "no_audio" in verdicts or "no_video" in verdicts:
        return verdicts
    have = max(0.0, figures["duration"] - item.start)
    if have < needed - (_TOLERANCE if kind == "video" else 0):
        verdicts["too_short"] = (
            f"{have:.3f} s can be used{f' from {item.start:g} s on' * (item.start > 0)}, {needed:g} s are needed"
        )
    if figures.get("silent_fraction", 0) >= limits.max_silent:
        verdicts["silent"] = f"{_percent(figures['silent_fraction'])} of it is below {measure.SILENT_DBFS:g} dBFS"
    if figures.get("clipped_fraction", 0) > limits.max_clipped:
        verdicts["clipped"] = f"{_percent(figures['clipped_fraction'])} of its samples are at full scale"
    if (drift := figures.get("audio_drift", 0)) > limits.max_drift and not figures["damage"]:
        verdicts["audio_drift"] = (
            f"timestamps and samples of its audio differ by up to {drift:.3f} s, by holes, overlaps or another rate"
        )
    if (tracks := figures.get("audio_tracks", 1)) > 1:
        verdicts["audio_tracks"] = f"has {tracks} audio tracks; the one that players choose is used"
    verdicts |= _verdicts_of_video(figures, limits) if kind == "video" else {}
    if item.source.clips:
        verdicts.pop("too_long", None)  # it is cut
    return verdicts


def _verdicts_of_video(figures: Mapping[str, Any], limits: Limits) -> dict[str, str]:
    verdicts = {}
    if figures.get("still_fraction", 0) >= limits.max_still:
        verdicts["still"] = (
            f"{_percent(figures['still_fraction'])} of {figures['sampled_pictures']} frames are like the one before,"
            f" the largest change is {figures['largest_change']:g} of 255"
        )
    if figures["duration"] > limits.max_duration:
        verdicts["too_long"] = f"lasts {figures['duration']:.1f} s"
    lengths = {"frames": figures.get("video_duration", 0.0), "audio": figures.get("audio_duration", 0.0)}
    stated = figures["stated_duration"]
    longest = max(figures.get(f"{t}_start", 0) + figures.get(f"{t}_duration", 0) for t in ("video", "audio"))
    if abs(lengths["frames"] - lengths["audio"]) > limits.max_difference:
        verdicts["odd_duration"] = " and ".join(f"{length:.2f} s of {what}" for what, length in lengths.items())
    elif stated is not None and abs(stated - longest) > limits.max_difference:
        verdicts["odd_duration"] = f"the container states {stated:.2f} s, {longest:.2f} s are there"
    gap = figures.get("start_gap", 0.0)
    if abs(gap) > limits.max_start_gap:
        verdicts["start_gap"] = f"the audio begins {abs(gap):.3f} s {'after' if gap > 0 else 'before'} the frames"
    if figures.get("hdr"):
        verdicts["hdr"] = f"is HDR ({figures['hdr']}): its frames are darker than on a display for it"
    if figures.get("interlaced"):
        verdicts["interlaced"] = "is interlaced: moving edges have combs"
    if figures.get("pixel_aspect", 1) != 1:
        verdicts["non_square_pixels"] = f"its pixels are {figures['pixel_aspect']:.4g} times as wide as high"
    uneven = figures.get("uneven_intervals", 0)
    if uneven > limits.max_uneven and uneven * figures["frames"] > 1.5:  # one hole is no variable rate
        verdicts["variable_frame_rate"] = f"{_percent(uneven)} of the intervals are not the usual one"
    return verdicts


def sync_status(heard: Mapping[str, Any], limits: Limits, verdicts: Collection[str] = ()) -> tuple[str | None, str]:
    """What is known of frames and audio: related, offset, unrelated or unknown, and why it is unknown.

    None where nothing was measured. verdicts: on the file; where it is still or silent, no relation can be told.
    """
    if not heard:
        return None, ""
    chance, empty = heard.get("sync_chance"), " and ".join(v for v in ("still", "silent") if v in verdicts)
    if empty or "problem" in heard:
        return "unknown", empty or heard["problem"]
    if chance is None:
        return "unknown", "the frames do not move, or nothing is heard"
    if heard["least_chance"] > limits.max_chance:
        return "unknown", "too few clips to compare with"
    if chance > limits.max_chance:
        steady = "motion or audio is steady, or a half of it has no event"
        return ("unknown", steady) if heard.get("steady") else ("unrelated", "")
    return ("offset" if abs(heard["sync_offset"]) > limits.max_offset else "related"), ""


def _sync_columns(heard: Mapping[str, Any], status: str | None, unknown: str) -> dict[str, Any]:
    """Of the table; without a relation the best lag means nothing."""
    columns = {name: heard.get(name) for name in _SYNC} | {"sync": status, "sync_unknown": unknown or None}
    return columns if status in ("related", "offset") else columns | {"sync_offset": None}


def sync_verdicts(heard: Mapping[str, Any], limits: Limits, others: Collection[str] = ()) -> dict[str, str]:
    """Verdicts on audio that does not belong to its frames or caption; `others` are those on the file."""
    verdicts, (status, _) = {}, sync_status(heard, limits, others)
    if status == "unrelated":
        verdicts[status] = (
            f"no evident relation: {_percent(heard['sync_chance'])} of the audio of other clips fits its frames as well"
        )
    elif status == "offset":
        late = heard["sync_offset"]
        verdicts[status] = (
            f"the audio is {abs(late):.3f} s {'late' if late > 0 else 'early'}; {_percent(heard['sync_chance'])} of the"
            " audio of other clips fits as well"
        )
    for verdict, name, what in (("caption_mismatch", "clap", "caption"), ("frames_mismatch", "imagebind", "frames")):
        score, least = heard.get(f"{name}_score"), getattr(limits, f"min_{name}")
        if score is not None and score < least:
            verdicts[verdict] = f"audio and {what} have a cosine of {score:.3f}, less than {least:g}"
    return verdicts


def audit_store(
    path: str | os.PathLike, captions: Mapping[str, str], table: str | os.PathLike, limits: Limits, sync: Sync
) -> AuditReport:
    """Write the table of a feature store's rows, of which there is no file: id -> caption, and their figures."""
    began, name, path, bad = time.monotonic(), Path(path).name, str(path), []
    settings = {"duration": 0.0, "limits": asdict(limits), "sources": [], "sync": True}

    def rows() -> Iterator[dict[str, Any]]:
        for number, (item_id, caption) in enumerate(captions.items()):
            heard = sync.get((name, item_id), {})
            verdicts = sync_verdicts(heard, limits)
            verdicts = {verdict: verdicts[verdict] for verdict in VERDICTS if verdict in verdicts}
            row = {
                "id": item_id,
                "clip": item_id,
                "source": name,
                "kind": "row",
                "held_out": False,
                "row": number,
                "path": path,
            }
            row |= {"verdicts": list(verdicts), "reasons": list(verdicts.values()), "ok": not verdicts}
            row |= {"captions": [caption], **_sync_columns(heard, *sync_status(heard, limits))}
            bad.extend([item_id] * bool(verdicts))
            yield dict.fromkeys(SCHEMA.names) | row

    ok, counts = _write(Path(table), rows(), settings)
    seconds = time.monotonic() - began
    return AuditReport(Path(table), len(captions), ok, counts, len(captions), seconds, tuple(bad))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


# --- the table -----------------------------------------------------------------------------------------------------


def _rows(
    items: Sequence[Item], measures: _Measures, known: _Known, limits: Limits, duration: float, sync: Sync
) -> Iterator[dict[str, Any]]:
    for item in items:
        figures = measures.find(item)
        heard = sync.get((item.source.name, item.clip), {})
        verdicts = _verdicts(item, figures, known, limits, duration, heard)
        size, changed = item.key or (None, None)
        measured = {name: (figures or {}).get(name) for name in _MEASURED}
        if measured["uneven_intervals"] is not None:
            measured["variable_frame_rate"] = "variable_frame_rate" in verdicts
        row = {"id": item.id, "clip": item.clip, "start": item.start, "source": item.source.name}
        row |= {"kind": item.source.kind, "held_out": item.source.held_out}
        row |= {"row": item.row, "path": item.path, "bytes": size, "mtime_ns": changed, "captions": list(item.captions)}
        row |= {"ok": set(verdicts) <= set(HARMLESS), "verdicts": [*verdicts], "reasons": [*verdicts.values()]}
        copy = next((other for *_, other in known.copies(item, figures)), None)
        status = sync_status(heard, limits, verdicts)
        yield row | measured | {"copy_of": copy} | _sync_columns(heard, *status)


def _write(table: Path, rows: Iterator[dict[str, Any]], settings: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """Write the table as a whole; returns the number of good items, and of those with each verdict."""
    counts: Counter = Counter()
    schema, ok, batch = SCHEMA.with_metadata({"mmaudio_hf.audit": json.dumps(settings)}), 0, []
    with replacing(table) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for row in rows:
            ok += row["ok"]
            counts.update(row["verdicts"])
            batch.append(row)
            if len(batch) == _ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch.clear()
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    return ok, {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}
