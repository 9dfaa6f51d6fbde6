"""Lists of media: tab-separated ids and captions, and the files that belong to the ids."""

import csv
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmaudio_hf.media.container import MediaError
from mmaudio_hf.schema import check_id

AUDIO_ENDINGS = (".flac", ".wav", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".wma")
VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")

_TEXT_COLUMNS = ("label", "caption")


@dataclass(frozen=True)
class MediaItem:
    """One row of a media list; `row` is its line in the file (the header is line 1)."""

    id: str
    caption: str
    row: int


def find_audio_file(folder: str | os.PathLike, name: str) -> Path:
    """The file of the audio called `name`: flac before wav before the others; MediaError not_found."""
    check_id(name)
    for ending in AUDIO_ENDINGS:
        if (path := Path(folder) / f"{name}{ending}").is_file():
            return path
    raise MediaError("not_found", f"{Path(folder) / name}: no audio file with an ending of {' '.join(AUDIO_ENDINGS)}")


def find_video(folder: str | os.PathLike, item_id: str) -> Path:
    """`ID.mp4`, or the same with another ending (`VIDEO_ENDINGS`) if only that exists; `ID.mp4` when none does."""
    check_id(item_id)
    paths = [Path(folder) / f"{item_id}{ending}" for ending in VIDEO_ENDINGS]
    return next((path for path in paths if path.is_file()), paths[0])


def read_media_list(
    path: str | os.PathLike, text_column: str = "label", *, unique_ids: bool | None = None
) -> list[MediaItem]:
    """Read a media list: tab-separated, with a header; `id` and `text_column` are used, other columns are ignored.

    "label" is the list of videos, where every id may occur once; "caption" is the list of audio files, where each row
    is another caption of the same file (`unique_ids` overrides this). Either name is accepted for the column. All
    values stay text: `NA` is a caption, `00008` keeps its zeros. Quotes as pandas writes them; a BOM and CRLF are
    fine. ValueError names the file and line.
    """
    assert text_column in _TEXT_COLUMNS, text_column
    unique_ids = text_column == "label" if unique_ids is None else unique_ids
    items: list[MediaItem] = []
    lines: dict[str, int] = {}
    for line, row in read_table(path, ("id", text_column), synonyms=_TEXT_COLUMNS):
        where = f"{path}, line {line}"
        item_id = check_id(row["id"], where)
        if unique_ids and item_id in lines:
            raise ValueError(f"{where}: id {item_id!r} is already on line {lines[item_id]}; remove one of the two rows")
        lines.setdefault(item_id, line)
        items.append(MediaItem(item_id, row[text_column], line))
    return items


def audio_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Audio files of a folder in sorted order, one per stem, and the names of everything else."""
    chosen: dict[str, Path] = {}
    entries = sorted(folder.iterdir())
    media = [p for p in entries if p.is_file() and p.suffix.lower() in AUDIO_ENDINGS and not p.name.startswith(".")]
    for path in sorted(media, key=lambda p: AUDIO_ENDINGS.index(p.suffix.lower())):
        chosen.setdefault(path.stem, path)
    files = sorted(chosen.values())
    return files, [p.name for p in entries if p not in set(files)]


def write_table(path: str | os.PathLike, rows: Sequence[Sequence]) -> None:
    """Replace a tab-separated file by `rows`, of which the first is the header."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_table(
    path: str | os.PathLike, columns: Sequence[str], synonyms: Sequence[str] = (), optional: Sequence[str] = ()
) -> list[tuple[int, dict[str, str]]]:
    """[(line number, {column: text})] of a tab-separated file with a header; blank lines are skipped.

    A column of `synonyms` may have any of those names. Columns of `optional` are given where they are there; a
    name that is nearly one of them is refused. ValueError names the file and line.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t", strict=True)
            header = [name.strip() for name in next(reader, [])]
            columns_at = _column_indices(path, header, columns, synonyms) | _optional_indices(path, header, optional)
            rows, end = [], reader.line_num
            for row in reader:
                line, end = end + 1, reader.line_num
                if row and len(row) != len(header):
                    raise ValueError(f"{path}, line {line}: {len(row)} fields, the header has {len(header)}")
                if row:
                    rows.append((line, {name: row[index] for name, index in columns_at.items()}))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; quote the field as pandas does") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    if not rows:
        raise ValueError(f"{path}: has no rows after the header")
    return rows


def _column_indices(
    path: str | os.PathLike, header: list[str], columns: Sequence[str], synonyms: Sequence[str]
) -> dict[str, int]:
    """Index of each required column; a column of `synonyms` may have any of those names."""
    if not header:
        raise ValueError(f"{path}: is empty; its first line must name the columns {', '.join(columns)}")
    indices = {}
    for name in columns:
        names = [name, *(s for s in synonyms if name in synonyms and s != name)]
        present = next((n for n in names if n in header), None)
        if present is None:
            nearest = difflib.get_close_matches(name, header, n=1, cutoff=0.5)
            hint = f"; rename {nearest[0]!r}?" if nearest else ""
            hint += "; columns must be separated by tabs" if len(header) == 1 else ""
            raise ValueError(f"{path}: no column {' or '.join(map(repr, names))}; it has {header}{hint}")
        if header.count(present) > 1:
            raise ValueError(f"{path}: column {present!r} is there more than once")
        indices[name] = header.index(present)
    return indices


def _optional_indices(path: str | os.PathLike, header: list[str], optional: Sequence[str]) -> dict[str, int]:
    for name in header:
        nearest = difflib.get_close_matches(name, optional, n=1, cutoff=0.8)
        if nearest and name not in optional and nearest[0] not in header:
            raise ValueError(f"{path}: column {name!r} is not known; rename it {nearest[0]!r}, or to something else")
        if name in optional and header.count(name) > 1:
            raise ValueError(f"{path}: column {name!r} is there more than once")
    return {name: header.index(name) for name in optional if name in header}
