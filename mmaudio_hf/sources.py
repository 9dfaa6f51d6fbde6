"""How data comes in: official annotation files, captioned folders, tables and data sets become our media lists.

    vggsound   vggsound.csv: YouTube id, start, label, split; no header
    audiocaps  train.csv ...: audiocap_id, youtube_id, start_time, caption
    wavcaps    a JSON of WavCaps, or the folder of all; SoundBible is left out, as in the published mix
    clotho     clotho_captions_*.csv: file_name, caption_1 ... caption_5
    folder     a folder with metadata.csv, captions.csv, metadata.jsonl or captions.jsonl: file_name, caption or text
    table      any .csv, .tsv or .jsonl, with the names of its columns
    dataset    what `datasets.load_dataset` reads: a Hub data set, a folder, or BUILDER:FILES, as webdataset:clips/*.tar

Ids are the names of the files without their ending. Those of YouTube clips are the video's and the start in seconds
with six digits, as in the lists of the reference implementation: `r1nicOVtvkQ_000130`.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmaudio_hf.media.lists import AUDIO_ENDINGS, VIDEO_ENDINGS, write_table
from mmaudio_hf.schema import check_id

KINDS = ("vggsound", "audiocaps", "wavcaps", "clotho", "folder", "table", "dataset")
WAVCAPS_NAMES = {"as_final": "audioset_sl", "bbc_final": "bbcsound", "fsd_final": "freesound", "sb_final": "soundbible"}
_ENDINGS = {*AUDIO_ENDINGS, *VIDEO_ENDINGS}
_MEDIA = ("video", "audio")
_FOLDER_FILES = ("metadata.csv", "captions.csv", "metadata.jsonl", "captions.jsonl")
_ID_COLUMNS, _TEXT_COLUMNS = ("file_name", "id", "path", "audio", "video"), ("caption", "text", "label", "description")


@dataclass(frozen=True)
class Row:
    """A captioned file; `split` is empty where the annotations have none."""

    id: str
    caption: str
    split: str = ""


@dataclass(frozen=True)
class Prepared:
    """One written list."""

    path: Path
    rows: int
    missing: int | None  # ids without a file in the media folder; None when none was given


def prepare(
    kind: str,
    source: str | Path,
    out: Path,
    *,
    name: str = "",
    media: Path | None = None,
    shares: Mapping[str, float] | None = None,
    columns: tuple[str, str] = ("", ""),
    split: str = "train",
    media_column: str = "",
) -> tuple[list[Prepared], Counter[str]]:
    """Write `NAME.tsv`, or `NAME-SPLIT.tsv` for each split, to `out`; returns the lists, and counts of left-out rows.

    shares: split -> share of the ids that is taken from those without a split, or from "train", as {"val": 0.05}; drawn
    by a hash of the id, so a longer list keeps the split of every id. media: the folder whose files are looked for.
    columns: of the file names and captions of a "table" or "dataset". A "dataset" is streamed, its `split`, and the
    media in `media_column` are written to `media` as they are, so features are the same as from files. ValueError names
    the file and line that cannot be read.
    """
    shares = dict(shares or {})
    if any(not 0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise ValueError(f"shares {shares} must each be above 0, and below 1 together: the rest is train")
    lists: dict[str, list[Row]] = {}
    left_out: Counter[str] = Counter()
    example = ""
    if kind == "dataset" and media is None:
        raise ValueError("give the folder that the media of the data set are written to")
    dataset = str(source), media or Path(), split, columns, media_column
    for group, row in _dataset(*dataset) if kind == "dataset" else _read(kind, Path(source), columns):
        try:
            check_id(row.id)
        except ValueError as error:
            left_out["with a name that cannot be an id"] += 1
            example = str(error)
            continue
        if not row.caption.strip():
            left_out["without a caption"] += 1
            continue
        split, base = _split_of(row, shares), name or group
        lists.setdefault(f"{base}-{split}" if split else base, []).append(row)
    if not lists:
        raise ValueError(f"{source}: no row can be used, {example or 'all are without a caption'}")
    stems = None if media is None else _stems(media)
    out.mkdir(parents=True, exist_ok=True)
    prepared = []
    for list_name, rows in lists.items():
        path, text = out / f"{list_name}.tsv", "label" if kind == "vggsound" else "caption"
        write_table(path, [("id", text), *((row.id, row.caption) for row in rows)])
        missing = None if stems is None else len({row.id for row in rows} - stems)
        prepared.append(Prepared(path, len(rows), missing))
    return prepared, left_out


def _split_of(row: Row, shares: Mapping[str, float]) -> str:
    if row.split not in ("", "train") or not shares:
        return row.split
    position = int.from_bytes(hashlib.sha256(row.id.encode()).digest()[:8], "big") / 2**64  # uniform in [0, 1)
    for split, share in shares.items():
        if position < share:
            return split
        position -= share
    return "train"


def _stems(media: Path) -> set[str]:
    """Names of the media files of a folder and its subfolders, without their endings."""
    if not media.is_dir():
        raise ValueError(f"{media}: no such folder; give the folder that holds the media")
    return {path.stem for path in media.rglob("*") if path.suffix.lower() in _ENDINGS}


# --- Reading: (name of the list, row) of every annotation ------------------------------------------------------------


def _read(kind: str, source: Path, columns: tuple[str, str]) -> Iterator[tuple[str, Row]]:
    if kind == "folder":
        files = [source / file for file in _FOLDER_FILES if (source / file).is_file()]
        if not files:
            raise ValueError(f"{source}: has none of {', '.join(_FOLDER_FILES)}")
        return ((source.resolve().name, row) for row in _table(files[0], columns))
    if kind == "wavcaps":
        return _wavcaps(source)
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: use one of {', '.join(KINDS)}")
    read = {"vggsound": _vggsound, "audiocaps": _audiocaps, "clotho": _clotho}.get(kind)
    rows = read(source) if read else _table(source, columns)
    group = {"vggsound": "vgg", "table": source.stem}.get(kind, kind)
    return ((group, row) for row in rows)


def _csv(path: Path, fields: tuple[str, ...] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: text}) of a comma-separated file, or a tab-separated one; `fields` of one without a header."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            reader = csv.DictReader(file, fields or None, delimiter=delimiter, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}, line {reader.line_num}: not as many fields as columns")
                yield reader.line_num, {name.strip(): text for name, text in row.items()}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f'{path}: cannot be read ({error}); save it as UTF-8, with fields quoted by "') from error


def _vggsound(path: Path) -> Iterator[Row]:
    for line, row in _csv(path, ("video", "start", "label", "split")):
        yield Row(_youtube_id(path, line, row["video"], row["start"]), row["label"], row["split"])


def _audiocaps(path: Path) -> Iterator[Row]:
    for line, row in _csv(path):
        _require(path, row, "youtube_id", "start_time", "caption")
        yield Row(_youtube_id(path, line, row["youtube_id"], row["start_time"]), row["caption"])


def _youtube_id(path: Path, line: int, video: str, start: str) -> str:
    try:
        return f"{video}_{int(float(start)):06d}"
    except ValueError:
        raise ValueError(f"{path}, line {line}: start {start!r} is not a number of seconds") from None


def _clotho(path: Path) -> Iterator[Row]:
    for _, row in _csv(path):
        _require(path, row, "file_name", "caption_1")
        for name, caption in row.items():
            if name.startswith("caption_"):
                yield Row(Path(row["file_name"]).stem, caption)


def _wavcaps(source: Path) -> Iterator[tuple[str, Row]]:
    files = sorted(source.rglob("*_final.json")) if source.is_dir() else [source]
    if not files:
        raise ValueError(f"{source}: no *_final.json of WavCaps is there")
    for file in files:
        group = WAVCAPS_NAMES.get(file.stem, file.stem)
        if group == "soundbible" and source.is_dir():
            continue
        content = _json(file, file.read_text(encoding="utf-8") if file.is_file() else "")
        for entry in content.get("data", []):
            # Ids of AudioSet carry an ending, Yxxx.wav, those of the other sets do not.
            yield group, Row(str(entry["id"]).removesuffix(".wav").removesuffix(".flac"), str(entry["caption"]))


def _table(path: Path, columns: tuple[str, str]) -> Iterator[Row]:
    rows: Iterator[Mapping[str, Any]]
    if path.suffix == ".jsonl":
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
        lines = enumerate(text.splitlines(), 1)
        rows = (_json(f"{path}, line {number}", line) for number, line in lines if line.strip())
    else:
        rows = (row for _, row in _csv(path))
    for row in rows:
        names, text = _column(path, row, columns[0], _ID_COLUMNS), _column(path, row, columns[1], _TEXT_COLUMNS)
        file = str(row[names])
        item_id = Path(file).stem if Path(file).suffix.lower() in _ENDINGS else file
        yield Row(item_id, str(row[text]), str(row.get("split", "")))


def _dataset(
    source: str, media: Path, split: str, columns: tuple[str, str], media_column: str
) -> Iterator[tuple[str, Row]]:
    """Stream a data set and write its media, bytes or files, without decoding them."""
    import datasets  # here: it takes a second, and annotation files do not need it

    builder, _, files = source.partition(":")
    try:
        if files:
            data = datasets.load_dataset(builder, data_files=files, split=split, streaming=True)
        else:
            data = datasets.load_dataset(source, split=split, streaming=True)
    except Exception as error:  # of many kinds, by where it is
        raise ValueError(f"data set {source!r}, split {split!r}, cannot be read: {error}") from error
    names = list(data.features or next(iter(data)))
    media_column = media_column or next((name for name in names if f".{name}" in _ENDINGS or name in _MEDIA), "")
    if media_column not in names:
        raise ValueError(f"data set {source!r} has no column of media {media_column}: it has {', '.join(names)}")
    media.mkdir(parents=True, exist_ok=True)
    # As Video even where it is audio: the feature of audio imports torchcodec before it knows that nothing is decoded.
    for number, row in enumerate(data.cast_column(media_column, datasets.Video(decode=False))):
        file = Path(row[media_column]["path"] or f"{number:06d}.{media_column}")
        given = columns[0] or ("__key__" if "__key__" in row else "")
        item_id = check_id(str(row[given]) if given else file.stem, f"data set {source!r}, row {number}")
        flat = row | (row["json"] if isinstance(row.get("json"), dict) else {})  # of a WebDataset
        caption = str(flat[_column(source, flat, columns[1], _TEXT_COLUMNS)])
        content = row[media_column]["bytes"]
        target = media / f"{item_id}{file.suffix.lower()}"
        content = file.read_bytes() if content is None else content
        if not (target.is_file() and target.stat().st_size == len(content)):
            partial = target.with_name(f".{target.name}.part")
            partial.write_bytes(content)
            partial.replace(target)
        yield Path(source.partition(":")[2] or source).stem, Row(item_id, caption)


def _column(path: Path | str, row: Mapping[str, Any], given: str, usual: tuple[str, ...]) -> str:
    name = given or next((name for name in usual if name in row), "")
    if name not in row:
        raise ValueError(f"{path}: no column {given or ' or '.join(usual)}; it has {', '.join(row)}")
    return name


def _require(path: Path, row: Mapping[str, str], *names: str) -> None:
    if missing := [name for name in names if name not in row]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(row)}: is it another data set?")


def _json(where: Path | str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: is absent or not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: holds a {type(content).__name__}, not an object")
    return content
