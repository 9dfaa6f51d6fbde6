"""How data comes in: official annotation files, captioned folders, tables and data sets become our media lists.

    vggsound   vggsound.csv: YouTube id, start, label, split; no header
    audiocaps  train.csv ...: audiocap_id, youtube_id, start_time, caption
    wavcaps    a JSON of WavCaps, or the folder of all; SoundBible is left out, as in the published mix
    clotho     clotho_captions_*.csv: file_name, caption_1 ... caption_5
    folder     a folder with metadata.csv, captions.csv, metadata.jsonl or captions.jsonl: file_name, caption or text
    table      any .csv, .tsv or .jsonl, with the names of its columns
    dataset    what `datasets` reads: a Hub data set, a folder, or BUILDER:FILES, as webdataset:clips/*.tar

Ids are the names of the files without their ending. Those of YouTube clips are the video's and the start in seconds
with six digits, as in the lists of the reference implementation: `r1nicOVtvkQ_000130`.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec
from tqdm.auto import tqdm

from mmaudio_hf.config import AudioSource, DatasetConfig, VideoSource
from mmaudio_hf.files import add_path_to_oserror, hash_of, locked, read_json, replacing, write_text
from mmaudio_hf.media.lists import AUDIO_ENDINGS, ENDINGS, VIDEO_ENDINGS, normal_name, read_rows, read_text, write_table
from mmaudio_hf.schema import check_id

if TYPE_CHECKING:
    from datasets import DatasetBuilder

KINDS = ("vggsound", "audiocaps", "wavcaps", "clotho", "folder", "table", "dataset")
WAVCAPS_NAMES = {"as_final": "audioset_sl", "bbc_final": "bbcsound", "fsd_final": "freesound", "sb_final": "soundbible"}
_ENDINGS = {*AUDIO_ENDINGS, *VIDEO_ENDINGS}
_FOLDER_FILES = ("metadata.csv", "captions.csv", "metadata.jsonl", "captions.jsonl")
_ID_COLUMNS = ("file_name", "id", "path", "audio", "video")
_TEXT_COLUMNS = ("caption", "text", "label", "description", "txt")
_USUAL_ENDING = {"video": ".mp4", "audio": ".mp3"}  # of media without one: decoders look at the content
_MAX_EXAMPLES = 1000  # rows of each reason that are named beside a list


@dataclass(frozen=True)
class Row:
    """A captioned file; `split` is empty where the annotations have none.

    where: file and line, or data set and row. problem: why it cannot be used, where that is known.
    """

    id: str
    caption: str
    split: str = ""
    where: str = ""
    problem: str = ""

    def rejection(self) -> tuple[str, str]:
        """Reason why the row is left out, and a message; ("", "") of a usable one."""
        if self.problem:
            return self.problem, f"{self.where}: {self.id!r}"
        try:
            check_id(self.id, self.where)
        except ValueError as error:
            return "with a name that cannot be an id", str(error)
        return ("", "") if self.caption.strip() else ("without a caption", f"{self.where}: {self.id!r}")


@dataclass(frozen=True)
class Prepared:
    """One written list."""

    path: Path
    rows: int
    missing: int | None  # ids without a file in the media folder; None when none was given


LeftOut = dict[str, list[str]]
"""Reason -> a message for each row that was left out."""


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
) -> tuple[list[Prepared], LeftOut]:
    """Write `NAME.tsv`, or `NAME-SPLIT.tsv` for each split, to `out`; returns the lists and the rows left out.

    shares: split -> share of the ids that is taken from those without a split, or from "train", as {"val": 0.05}; drawn
    by a hash of the id, so a longer list keeps the split of every id. media: the folder whose files are looked for.
    columns: of the file names and captions of a "table" or "dataset". A "dataset" is streamed, its `split`, and the
    media in `media_column` are written to `media` as they are, so features are the same as from files. ValueError names
    the file and line that cannot be read.
    """
    shares = dict(shares or {})
    if any(not 0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise ValueError(f"shares {shares} must each be above 0, and below 1 together: the rest is train")
    for share in shares:
        check_id(share, "split of a share")
    if kind == "dataset":
        if media is None:
            raise ValueError("give the folder that the media of the data set are written to")
        config = DatasetConfig(str(source), "", "", split, True, media_column, *columns)
        path = Path(str(source).partition(":")[2] or source)
        group = path.parent.name or "dataset" if re.search(r"[*?\[]", path.stem) else path.stem
        rows: Iterator[tuple[str, Row]] = ((group, row) for row in _dataset_rows(config, _builder(config), media))
    else:
        rows = _read(kind, Path(source), columns)
    lists, left_out = _by_list(str(source), rows, name, shares, unique_ids=kind == "vggsound")
    stems = None if media is None else _stems(media)
    out.mkdir(parents=True, exist_ok=True)
    text, prepared = "label" if kind == "vggsound" else "caption", []
    for name, listed in lists.items():
        write_table(out / f"{name}.tsv", [("id", text), *((row.id, row.caption) for row in listed)])
        missing = None if stems is None else sum(normal_name(i) not in stems for i in {row.id for row in listed})
        prepared.append(Prepared(out / f"{name}.tsv", len(listed), missing))
    return prepared, left_out


def write_dataset(source: VideoSource | AudioSource) -> tuple[Prepared, LeftOut] | None:
    """Write media and list of a source from its `dataset`; None when it has none, or all of it is there.

    `LIST.dataset.json` beside the list has a hash of what they were written from (settings; files with their revision
    or time) and names the rows left out. One process writes while others wait; a killed one is resumed, and files that
    are there stay. ValueError names what cannot be read, or a list that was not written from a data set.
    """
    config, path, media = source.dataset, Path(source.list), Path(source.media_dir)
    if not config.path:
        return None
    record = path.with_suffix(".dataset.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".dataset.lock")):
        if path.exists() and not record.is_file():
            raise ValueError(f"{path} exists and was not written from a data set: move it, or name another list")
        builder, written = _builder(config), read_json(record)
        inputs = hash_of([dataclasses.asdict(config), _data_files(builder)])
        complete = written.get("inputs") == inputs and path.is_file() and media.is_dir()
        if complete and not set(map(normal_name, written.get("ids", [""]))) - _stems(media):
            return None
        write_text(record, "{}\n")
        kind = "video" if isinstance(source, VideoSource) else "audio"
        rows = ((path.stem, row) for row in _dataset_rows(config, builder, media, kind))
        where = f"data set {config.path!r}, split {config.split!r}"
        lists, left_out = _by_list(where, rows, path.stem, {}, unique_ids=kind == "video")
        usable, stems = lists[path.stem], _stems(media)
        text, ids = "label" if kind == "video" else "caption", list(dict.fromkeys(row.id for row in usable))
        write_table(path, [("id", text), *((row.id, row.caption) for row in usable)])
        examples = {reason: messages[:_MAX_EXAMPLES] for reason, messages in left_out.items()}
        entries = {"inputs": inputs, "left_out": examples, "ids": ids}
        write_text(record, json.dumps(entries, ensure_ascii=False) + "\n")
        return Prepared(path, len(usable), sum(normal_name(item_id) not in stems for item_id in ids)), left_out


def _by_list(
    source: str, rows: Iterable[tuple[str, Row]], name: str, shares: Mapping[str, float], unique_ids: bool
) -> tuple[dict[str, list[Row]], LeftOut]:
    lists: dict[str, list[Row]] = {}
    left_out: LeftOut = {}
    ids: set[str] = set()
    for group, row in rows:
        reason, message = row.rejection()
        if not reason and unique_ids and row.id in ids:
            reason, message = "with the id of an earlier row", f"{row.where}: {row.id!r}"
        if reason:
            left_out.setdefault(reason, []).append(message)
            continue
        ids.add(row.id)
        split, base = _split_of(row, shares), name or group
        list_name = check_id(f"{base}-{split}" if split else base, f"name of a list; {row.where}")
        lists.setdefault(list_name, []).append(row)
    if not lists:
        reasons = "; ".join(f"{len(rows)} {reason}, the first: {rows[0]}" for reason, rows in left_out.items())
        raise ValueError(f"{source}: no row can be used: {reasons or 'it has none'}")
    return lists, left_out


def _split_of(row: Row, shares: Mapping[str, float]) -> str:
    split = row.split.strip()
    if split.lower() not in ("", "train") or not shares:
        return split
    position = int.from_bytes(hashlib.sha256(row.id.encode()).digest()[:8], "big") / 2**64  # uniform in [0, 1)
    ends = zip(shares, itertools.accumulate(shares.values()), strict=True)
    return next((share for share, end in ends if position < end), "train")


def _stems(media: Path) -> set[str]:
    """Names of the media files of a folder and its subfolders, with and without endings, as names are compared."""
    if not media.is_dir():
        raise ValueError(f"{media}: no such folder; give the folder that holds the media")
    return {normal_name(name) for path in _files(media) for name in (path.stem, path.name)}


def _files(media: Path) -> Iterator[Path]:
    return (path for path in media.rglob("[!.]*") if path.suffix.lower() in _ENDINGS and path.is_file())


# --- Annotation files: (name of the list, row) of every annotation ---------------------------------------------------


def _read(kind: str, source: Path, columns: tuple[str, str]) -> Iterator[tuple[str, Row]]:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: use one of {', '.join(KINDS)}")
    if kind == "wavcaps":
        return _wavcaps(source)
    folder = Path(os.path.abspath(source)).name  # a link has the name that the recipe knows
    group, file = {"vggsound": "vgg", "table": source.stem, "folder": folder}.get(kind, kind), source
    shared: set[str] = set()
    if kind == "folder":
        stems = Counter(normal_name(path.stem) for path in _files(source))
        shared = {stem for stem, count in stems.items() if count > 1}
        file = next((source / name for name in _FOLDER_FILES if (source / name).is_file()), source)
        if file == source:
            raise ValueError(f"{source}: has none of {', '.join(_FOLDER_FILES)}")
    rows = _table(file, columns, shared) if kind in ("folder", "table") else _official(kind, file)
    return ((group, row) for row in rows)


def _csv(path: Path, *needed: str, header: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """(file and line, {column: text}) of a comma-separated file, or a tab-separated .tsv; `header` if it has none."""
    rows = read_rows(path, "\t" if path.suffix.lower() == ".tsv" else ",", header)
    _, names = next(rows)
    if not names:
        raise ValueError(f"{path}: is empty: its first line must name the columns")
    if len(names) == 1 and (other := re.search(r"[;\t,|]", names[0])):  # as spreadsheets of many countries do
        raise ValueError(f"{path}: its columns are separated by {other[0]!r}: save it with commas, or tabs in a .tsv")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: column {repeated[0]!r} is there more than once")
    if missing := [name for name in needed if name not in names]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(names)}: is it another data set?")
    for line, row in rows:
        yield f"{path}, line {line}", dict(zip(names, row, strict=True))


def _official(kind: str, path: Path) -> Iterator[Row]:
    columns = {"audiocaps": ("youtube_id", "start_time", "caption"), "clotho": ("file_name", "caption_1")}
    header = ("video", "start", "label", "split") if kind == "vggsound" else ()
    for where, row in _csv(path, *columns.get(kind, ()), header=header):
        if kind == "clotho":
            item_id = _id_of(row["file_name"])
            yield from (Row(item_id, row[name], where=where) for name in row if name.startswith("caption_"))
            continue
        video, start, caption = (row[name] for name in header[:3] or columns[kind])
        split = row["split"] if header else ""
        if header and split.strip() not in ("train", "test"):
            raise ValueError(f"{where}: split {split!r} is neither train nor test")
        if not video.strip():
            raise ValueError(f"{where}: has no YouTube id")
        seconds = -1
        with contextlib.suppress(ValueError, OverflowError):  # the latter for inf
            seconds = int(float(start))
        if seconds < 0:
            raise ValueError(f"{where}: start {start!r} is not a number of seconds")
        yield Row(f"{video.strip()}_{seconds:06d}", caption, split, where)


def _wavcaps(source: Path) -> Iterator[tuple[str, Row]]:
    files = sorted(source.rglob("*_final.json")) if source.is_dir() else [source]
    if not files:
        raise ValueError(f"{source}: no *_final.json of WavCaps is there")
    for file in files:
        group = WAVCAPS_NAMES.get(file.stem, file.stem)
        if group == "soundbible" and source.is_dir():
            continue
        entries = _json(str(file), read_text(file)).get("data")
        if not isinstance(entries, list):
            raise ValueError(f"{file}: has no list 'data'; is it a JSON of WavCaps?")
        for number, entry in enumerate(entries):
            where = f"{file}, data[{number}]"
            if not isinstance(entry, dict) or entry.get("id") is None or "caption" not in entry:
                raise ValueError(f"{where}: has no id and caption; is it a JSON of WavCaps?")
            # Ids of AudioSet carry an ending, Yxxx.wav, those of the other sets do not.
            for caption in _captions(entry["caption"], where):
                yield group, Row(_id_of(str(entry["id"])), caption, where=where)


def _table(path: Path, columns: tuple[str, str], shared: Collection[str]) -> Iterator[Row]:
    """Rows of a table. An id of the stems that several files share (`shared`) keeps the ending of its file."""
    files: dict[str, str] = {}  # id -> the file that it names
    rows: Iterator[tuple[str, Mapping[str, Any]]] = _csv(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        lines = ((f"{path}, line {number}", line) for number, line in enumerate(read_text(path).split("\n"), 1))
        rows = ((where, _json(where, line)) for where, line in lines if line.strip())
    elif path.suffix.lower() not in (".csv", ".tsv"):
        raise ValueError(f"{path}: a table is a .csv, .tsv or .jsonl file")
    for where, row in rows:
        names, text = _column(where, row, columns[0], _ID_COLUMNS), _column(where, row, columns[1], _TEXT_COLUMNS)
        split = "" if row.get("split") is None else str(row["split"])
        file = "" if row[names] is None else str(row[names])
        item_id = PurePosixPath(file).name if normal_name(_id_of(file)) in shared else _id_of(file)
        other = files.setdefault(normal_name(item_id), file) != file
        for caption in _captions(row[text], where):
            yield Row(item_id, caption, split, where, "with the name of another file: rename it" if other else "")


def _id_of(file: str) -> str:
    """The name of a media file without folders and ending; anything else as it is, for `check_id` to reject."""
    return PurePosixPath(file).stem if PurePosixPath(file).suffix.lower() in _ENDINGS else file


def _captions(value: Any, where: str) -> list[str]:
    """The captions of a row: text, a list of texts, or nothing (an empty one, which is left out)."""
    values = value if isinstance(value, list) and value else [value]
    if any(isinstance(text, dict | list | bool) for text in values):
        raise ValueError(f"{where}: its caption is {str(value)[:80]}, not text")
    return ["" if text is None or text != text else str(text) for text in values]  # NaN is what pandas has for none


def _column(where: str, row: Mapping[str, Any], given: str, usual: tuple[str, ...]) -> str:
    name = given or next((name for name in usual if name in row), "")
    if not name or name not in row:  # a table with its index has a column without a name
        raise ValueError(f"{where}: no column {given or ' or '.join(usual)}; it has {', '.join(row)}")
    return name


def _json(where: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # brackets nested a thousand times end the recursion
        raise ValueError(f"{where}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: holds a {type(content).__name__}, not an object")
    return content


# --- Data sets -------------------------------------------------------------------------------------------------------


def _builder(config: DatasetConfig) -> "DatasetBuilder":
    import datasets  # here: it takes a second, and annotation files do not need it

    path, files = config.path, None
    if Path(path).is_file():
        raise ValueError(f"{path} is a file: write BUILDER:{path}, with what reads it, as parquet, csv or webdataset")
    if not Path(path).exists():
        path, _, files = path.partition(":")
    if path == "pandas":
        raise ValueError(f"data set {config.path!r}: files of pandas are pickles, which may run code; use parquet")
    try:
        return datasets.load_dataset_builder(
            path, config.name or None, data_files=files or None, revision=config.revision or None
        )
    except Exception as error:  # of many kinds, by where it is
        raise _dataset_error(config, "", error) from error


def _dataset_error(config: DatasetConfig, where: str, error: Exception) -> ValueError:
    text = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"data set {config.path!r}, split {config.split!r}{where}, cannot be read: {text}")


def _data_files(builder: "DatasetBuilder") -> dict[str, list]:
    splits = builder.config.data_files or {}
    return {str(split): [list(files), [list(m) for m in files.origin_metadata]] for split, files in splits.items()}


def _dataset_rows(config: DatasetConfig, builder: "DatasetBuilder", media: Path, kind: str = "") -> Iterator[Row]:
    """Rows of a data set; their media, bytes or files, are written to `media` without decoding them."""
    remote = any("://" in file for files, _ in _data_files(builder).values() for file in files)
    rows, names, media_column, kind = _open_dataset(config, builder, kind)
    media.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[str, str]] = {}  # id -> name and checksum of the file written for it
    with tqdm(rows, desc=config.path, unit="row") as bar:  # closed before an error is printed below it
        data = iter(bar)
        for number in itertools.count():
            try:
                row = next(data, None)
            except Exception as error:  # a damaged file, or the network
                raise _dataset_error(config, f", row {number}", error) from error
            if row is None:
                return
            where = f"data set {config.path!r}, row {number}"
            # Of a column, of the `json` of a WebDataset, or names of classes.
            flat = dict(row) | (row["json"] if isinstance(row.get("json"), dict) else {})
            if number == 0:
                _column(where, flat, config.text_column, _TEXT_COLUMNS)  # raises where no row can have it
            text = config.text_column or next((name for name in _TEXT_COLUMNS if name in flat), "")
            label = flat.get(text)
            if isinstance(label, int) and hasattr(names.get(text), "int2str"):
                label = names[text].int2str(label)
            captions = _captions(label, where)
            value = row[media_column] or {}
            file = PurePosixPath((value.get("path") or "").partition("::")[0])  # before it: the archive it is in
            given = config.id_column or ("__key__" if "__key__" in row else "")
            name = "" if given and row[given] is None else str(row[given]) if given else file.stem or f"{number:06d}"
            item_id = PurePosixPath(name).name if given == "__key__" else _id_of(name)
            problem = ""
            if not Row(item_id, "".join(captions)).rejection()[0]:
                ending = file.suffix.lower()
                target = media / f"{item_id}{ending if ending in ENDINGS[kind] else _USUAL_ENDING[kind]}"
                try:
                    content = _content(value, remote)
                except FileNotFoundError:
                    problem = "without media"
                except Exception as error:  # of the network
                    raise _dataset_error(config, f", row {number}", error) from error
                else:
                    problem = _write_media(target, content, files)
            for caption in captions:
                yield Row(item_id, caption, where=where, problem=problem)


def _open_dataset(config: DatasetConfig, builder: "DatasetBuilder", kind: str) -> tuple[Any, dict[str, Any], str, str]:
    """The rows with the columns that are needed, {column: feature or None}, the column of media, and their kind."""
    import datasets

    try:
        for split, files in ({} if config.streaming else builder.config.data_files or {}).items():
            # The files, and not `download_and_prepare`: that encodes audio, which needs torchcodec, and copies it.
            if str(split) == config.split or config.split not in builder.config.data_files:
                files[:] = datasets.DownloadManager().download(list(files))
        if hasattr(builder.config, "decode_num_threads"):  # where it decodes in threads unless it is told not to
            builder.config.decode_num_threads = 0
        data = builder.as_streaming_dataset(split=config.split)
        names: dict[str, Any] = dict(data.features or dict.fromkeys(next(iter(data), {})))
    except Exception as error:
        raise _dataset_error(config, "", error) from error
    kinds: dict[str, str] = {}  # "video" or "audio" for a column of such media by its type, or else by its name
    for name, feature in names.items():
        word, ending = type(feature).__name__.lower(), f".{name.lower()}"
        by_name = (each for each in ("video", "audio") if name.lower() == each or ending in ENDINGS[each])
        kinds[name] = word if word in ("video", "audio") else next(by_name, "")
    usual = (name for name, its_kind in kinds.items() if its_kind and kind in ("", its_kind))
    media_column = config.media_column or next(usual, "")
    text_column = "" if "json" in names else config.text_column  # that of a WebDataset is looked for in its rows
    for name in filter(None, (media_column, config.id_column, text_column)):
        if name not in names:
            raise ValueError(f"data set {config.path!r} has no column {name!r}: it has {', '.join(names)}")
    if not media_column:
        what = f"of {kind} files" if kind else "of videos or audio files"
        raise ValueError(f"data set {config.path!r}: no column {what} is known, name it; it has {', '.join(names)}")
    texts = [config.text_column] if config.text_column in names else [*_TEXT_COLUMNS, "json"]
    needed = [name for name in names if name in (media_column, config.id_column, "__key__", *texts)]
    # As Video even where it is audio: the feature of audio imports torchcodec before it knows that nothing is decoded.
    data = data.select_columns(needed).cast_column(media_column, datasets.Video(decode=False))
    return data, names, media_column, kind or kinds[media_column] or "video"


def _content(value: Mapping[str, Any], remote: bool) -> bytes | Path:
    """The bytes of a file, or its path where it is on this machine; FileNotFoundError where there is none.

    A data set from elsewhere (remote) may name files of its own alone, and none of this machine outside of the caches.
    """
    import datasets

    path = value.get("path") or ""
    if value.get("bytes") is not None:
        return value["bytes"]
    # `datasets` downloads the files whose ending it knows; others, as .ts, are named by where they would be.
    if remote and not Path(path).is_file() and (file := re.search(r"/datasets--(\w.*)/snapshots/(\w+)/(.+)$", path)):
        path = f"hf://datasets/{file[1].replace('--', '/', 1)}@{file[2]}/{file[3]}"
    if not path:
        raise FileNotFoundError
    if "://" in path:
        if remote and "hf://" not in path and not path.startswith(datasets.config.HF_ENDPOINT):
            raise FileNotFoundError
        with fsspec.open(path, "rb") as file:
            return file.read()
    local = Path(path).absolute()
    caches = datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE
    cached = any(local.resolve().is_relative_to(Path(str(cache)).resolve()) for cache in caches)
    if not local.is_file() or (remote and not cached):
        raise FileNotFoundError
    return local


def _write_media(target: Path, content: bytes | Path, files: dict[str, tuple[str, str]]) -> str:
    """Write a media file, or a link to one on this machine, unless it is there. Returns why its row is left out."""
    checksum = str(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    key, entry = normal_name(target.stem), (target.name, checksum)
    if key in files:  # another caption of the same file, or another file
        return "" if files[key] == entry else "with the id of another file"
    files[key] = entry
    if target.exists():
        same = target.samefile(content) if isinstance(content, Path) else target.read_bytes() == content
        if not same:
            raise ValueError(f"{target} exists and is another file: choose another folder for the media, or remove it")
        return ""
    with add_path_to_oserror(target), replacing(target) as partial:
        if isinstance(content, Path):
            partial.symlink_to(content)
        else:
            partial.write_bytes(content)
            # Shards are made again when times change. This one is that of the content, so not where a file is
            # written again or on another machine.
            seconds = 2**29 + int(checksum[:7], 16)
            os.utime(partial, (seconds, seconds))
    return ""
