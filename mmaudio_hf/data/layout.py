"""The files of a feature store: `meta.json`, the table, the manifest and the columns, and how they must agree.

Two layouts, told apart by meta.json alone, so that a store opens without its manifest:

    reference   every column in float32, rows one after the other: what the reference implementation reads and writes
    compact     CLIP and text features in bfloat16, sync features too on request; text_features.memmap holds each
                different text once, and text_index.memmap (int32) the row there of every row of the store
"""

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from mmaudio_hf.files import add_path_to_oserror, sha256_of
from mmaudio_hf.schema import CLIP_FEATURES, MEAN, SCHEMA_VERSION, STD, SYNC_FEATURES, TEXT_FEATURES, check_id

LAYOUTS = ("reference", "compact")
SYNC_DTYPES = ("float32", "bfloat16")
TEXT_INDEX = "text_index"
PARTIAL = ".partial"
AGAIN = "remove the store folder and run `mmaudio-hf extract-video` (or extract-audio) again"

_PLAIN_ID = re.compile(r"[\w-]{1,50}", re.ASCII)  # passes schema.check_id, which takes 6 s for a million ids


class Column(NamedTuple):
    """Shape of one row and how its numbers are stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Contents:
    """What the folder of a store holds. `texts`: rows of text_features.memmap when rows share them, else None."""

    rows: int
    columns: dict[str, Column]  # of the store, in storage order
    texts: int | None = None

    @property
    def layout(self) -> str:
        """One of LAYOUTS."""
        plain = self.texts is None and all(column.dtype == torch.float32 for column in self.columns.values())
        return "reference" if plain else "compact"

    @property
    def files(self) -> dict[str, tuple[Column, int]]:
        """Column file -> what one of its rows is, and their number."""
        files = {name: (column, self.rows) for name, column in self.columns.items()}
        if self.texts is not None:
            files[TEXT_FEATURES] = (self.columns[TEXT_FEATURES], self.texts)
            files[TEXT_INDEX] = (Column((), torch.int32), self.rows)
        return files

    @property
    def size(self) -> int:
        """Bytes of all columns."""
        return sum(column.row_bytes * rows for column, rows in self.files.values())


def layout_columns(
    shapes: Mapping[str, tuple[int, ...]], layout: str = "reference", sync_dtype: str = "float32"
) -> dict[str, Column]:
    """Columns of a store in `layout` with rows of `shapes`. ValueError for an unknown setting.

    mean and std stay float32 in both: they make the regression target, which no autocast rounds, and are 3 % of a
    row with video.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: use one of {', '.join(LAYOUTS)}")
    if sync_dtype not in SYNC_DTYPES:
        raise ValueError(f"sync dtype {sync_dtype!r}: use one of {', '.join(SYNC_DTYPES)}")
    if layout == "reference" and sync_dtype != "float32":
        raise ValueError("the reference layout is float32 throughout: ask for the compact one with bfloat16")
    dtypes = {}
    if layout == "compact":
        half = torch.bfloat16
        dtypes = {CLIP_FEATURES: half, TEXT_FEATURES: half, SYNC_FEATURES: getattr(torch, sync_dtype)}
    return {name: Column(tuple(shape), dtypes.get(name, torch.float32)) for name, shape in shapes.items()}


# --- names -------------------------------------------------------------------------------------------------------


def column_file(path: Path, name: str) -> Path:
    """File of a column."""
    return path / f"{name}.memmap"


def offsets_file(path: Path) -> Path:
    """Where a store has the seconds by which extraction shifted the audio of some ids; mostly there is none."""
    return path.with_name(f"{path.name}.offsets.json")


def read_offsets(file: Path, ids: Iterable[str]) -> dict[str, float]:
    """What such a file, if it is there, says of these ids."""
    known = read_json(file) if file.is_file() else {}
    return {item_id: known[item_id] for item_id in ids if item_id in known} if known else {}


def write_offsets(path: Path, late: Mapping[str, float]) -> None:
    """Write that file of a store, or remove it where nothing was shifted."""
    offsets_file(path).unlink(missing_ok=True)
    if late:
        write_text(offsets_file(path), [json.dumps(late, indent=0) + "\n"])


def manifest_file(path: Path) -> Path:
    """Manifest of the store at `path`."""
    return path.with_name(f"{path.name}.manifest.json")


def new_table_file(path: Path) -> Path:
    """Table of a store to be written at `path`."""
    return path.with_name(f"{path.name}.tsv")


def table_file(path: Path) -> Path:
    """`<name>.tsv`, or what the reference implementation calls it: without what follows the last dot of the name."""
    for candidate in (new_table_file(path), path.with_suffix(".tsv")):
        if candidate.is_file():
            return candidate
    raise ValueError(f"no {path.name}.tsv beside {path}: copy it from where the store was made or {AGAIN}")


# --- meta.json ---------------------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and the like."""
    return str(dtype).removeprefix("torch.")


def meta_text(contents: Contents) -> str:
    """Content of meta.json as TensorDict writes it, key order included."""
    entries = {
        name: {"device": "cpu", "shape": [rows, *c.shape], "dtype": str(c.dtype), "is_nested": False}
        for name, (c, rows) in contents.files.items()
    }
    kind = {"_type": "<class 'tensordict._td.TensorDict'>", "_format_version": 1, "_class": "tensordict:TensorDict"}
    return json.dumps({**entries, "shape": [], "device": "cpu", **kind})


def read_meta(path: Path) -> Contents:
    """What meta.json of the folder `path` says, as older and newer TensorDict write it. ValueError when unusable."""
    file = path / "meta.json"
    if not path.is_dir():
        raise ValueError(
            f"no feature store at {path}; make it with `mmaudio-hf extract-video` (or extract-audio),"
            " or correct data.*.path"
        )
    if path.name.endswith(PARTIAL):
        raise ValueError(f"{path} is an export that was not finished; {AGAIN}")
    if not file.is_file():
        inside = ", ".join(sorted(meta.parent.name for meta in path.glob("*/meta.json"))[:3])
        way = f"name one in it: {inside}" if inside else AGAIN
        raise ValueError(f"{path} is not a feature store (it has no meta.json); {way}")
    entries = {name: entry for name, entry in read_json(file).items() if isinstance(entry, dict)}
    index = entries.pop(TEXT_INDEX, None)
    columns, counts = {}, {}
    for name, entry in entries.items():
        shape, dtype = entry.get("shape"), getattr(torch, str(entry.get("dtype")).removeprefix("torch."), None)
        if not (isinstance(shape, list) and len(shape) > 1 and all(isinstance(n, int) and n > 0 for n in shape)):
            raise ValueError(f"{file}: {name} has shape {shape!r}, expected [rows, ...]; {AGAIN}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{file}: {name} has dtype {entry.get('dtype')!r}, expected a float type; {AGAIN}")
        check_id(name, str(file))  # it becomes a file name
        columns[name], counts[name] = Column(tuple(shape[1:]), dtype), shape[0]
    texts = None
    if index is not None:
        texts = counts.pop(TEXT_FEATURES, None)
        if texts is None or index.get("dtype") != "torch.int32" or index.get("shape") != [counts.get(MEAN)]:
            raise ValueError(f"{file}: {TEXT_INDEX} is {index}, expected int32 [rows] beside {TEXT_FEATURES}; {AGAIN}")
    if len(set(counts.values())) > 1:
        raise ValueError(f"{file}: the columns have different numbers of rows {counts}; {AGAIN}")
    contents = Contents(next(iter(counts.values()), 0), columns, texts)
    check_contents(path, contents)
    return contents


def check_contents(path: Path, contents: Contents) -> None:
    """ValueError unless there are rows and the columns that belong together."""
    columns = contents.columns
    if contents.rows < 1:
        raise ValueError(f"{path}: a store needs at least one row")
    if MEAN not in columns or STD not in columns or columns[MEAN] != columns[STD]:
        raise ValueError(f"{path}: a store needs the columns {MEAN} and {STD}, of one shape; found {list(columns)}")
    if (CLIP_FEATURES in columns) != (SYNC_FEATURES in columns):
        raise ValueError(f"{path}: {CLIP_FEATURES} and {SYNC_FEATURES} come together; found {list(columns)}")


def check_sizes(path: Path, contents: Contents) -> None:
    """ValueError naming the first file that is missing or not as long as meta.json says."""
    for name, (column, rows) in contents.files.items():
        file, expected = column_file(path, name), rows * column.row_bytes
        if not file.is_file():
            raise ValueError(f"{file} is missing; copy it from where the store was made or {AGAIN}")
        if (size := file.stat().st_size) != expected:
            raise ValueError(f"{file} has {size} bytes, meta.json says {expected}; copy it again or {AGAIN}")


def read_text_index(path: Path, contents: Contents) -> np.ndarray | None:
    """Row of text_features.memmap for every row (int64), or None when rows do not share texts."""
    if contents.texts is None:
        return None
    file = column_file(path, TEXT_INDEX)
    index = np.fromfile(file, "<i4").astype(np.int64)
    if index.min() < 0 or index.max() >= contents.texts:
        there = f"there are {contents.texts}; copy it again or {AGAIN}"
        raise ValueError(f"{file} names text {index.min()} to {index.max()}, {there}")
    return index


# --- manifest ----------------------------------------------------------------------------------------------------


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """The file of a manifest: one key a line, closed by a checksum over what stands before it."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return json.dumps({**content, "checksum": _manifest_checksum(content)}, indent=1) + "\n"


def _manifest_checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def manifest_columns(path: Path, contents: Contents) -> dict[str, dict[str, Any]]:
    """Entries of the columns of a finished folder, with checksums of their files."""
    entries: dict[str, dict[str, Any]] = {}
    for name, (column, rows) in contents.files.items():
        entries[name] = {"dtype": dtype_name(column.dtype), "shape": list(column.shape)}
        if rows != contents.rows:
            entries[name]["records"] = rows
        entries[name]["sha256"] = sha256_of(column_file(path, name))
    return entries


def read_manifest(path: Path, contents: Contents) -> dict[str, Any] | None:
    """Manifest of the store at `path`, checked against what the folder holds; None when there is none."""
    file = manifest_file(path)
    if not file.exists():
        return None
    manifest = read_json(file)
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(f"{file}: schema version {version!r} is not known here ({SCHEMA_VERSION}); update mmaudio_hf")
    keys = ("mode", "duration", "encoders", "normalisation", "rows", "columns", "ids_sha256", "latent_statistics")
    absent = [key for key in keys if key not in manifest]
    if absent:
        raise ValueError(f"{file} lacks {', '.join(absent)}; {AGAIN}")
    rows = contents.rows
    try:
        listed = {
            name: (tuple(entry["shape"]), entry["dtype"], entry.get("records", rows))
            for name, entry in manifest["columns"].items()
        }
        checksums = [entry["sha256"] for entry in manifest["columns"].values()]
        channels = {len(manifest["latent_statistics"][key]) for key in ("mean", "std")}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: columns or latent_statistics are malformed; {AGAIN}") from error
    stored = {name: (c.shape, dtype_name(c.dtype), count) for name, (c, count) in contents.files.items()}
    if manifest["rows"] != rows or listed != stored or channels != {contents.columns[MEAN].shape[-1]}:
        raise ValueError(f"{file} describes {manifest['rows']} rows of {listed}, the folder holds {rows} of {stored}")
    layout = manifest.get("layout", "reference")
    hashes = all(isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) for text in checksums)
    if layout != contents.layout or not isinstance(manifest["encoders"], dict) or not hashes:
        wrong = f"layout {layout!r} (the folder is {contents.layout})"
        raise ValueError(f"{file}: {wrong}, encoders or checksums are wrong")
    checksum = manifest.pop("checksum", None)
    if checksum is not None and checksum != _manifest_checksum(manifest):
        raise ValueError(f"{file} was changed after it was written (checksum differs); copy it again or {AGAIN}")
    return manifest


def ids_hash(ids: Sequence[str]) -> str:
    """SHA-256 of the ids in order, each ended by a newline (which no id contains)."""
    return hashlib.sha256("".join(f"{item_id}\n" for item_id in ids).encode()).hexdigest()


def captions_hash(captions: Sequence[str]) -> str:
    """SHA-256 of the captions in order, each as a line of JSON (they may contain newlines)."""
    return hashlib.sha256("".join(f"{json.dumps(caption)}\n" for caption in captions).encode()).hexdigest()


# --- table -------------------------------------------------------------------------------------------------------


def read_table(file: Path) -> tuple[list[str], list[str]]:
    """Ids and captions, all as text: "NA" stays a word and "00008" keeps its zeros."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as handle:
            lines = csv.reader(handle, delimiter="\t", strict=True)
            header = next(lines, [])
            rows = [(lines.line_num, row) for row in lines if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a tab separated UTF-8 table: {error}") from error
    text = next((name for name in ("label", "caption") if name in header), None)
    if "id" not in header or text is None:
        raise ValueError(f"{file} needs the columns `id` and `label` (or `caption`); its header is {header}")
    id_field, text_field = header.index("id"), header.index(text)
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{file}, line {line}: {len(row)} fields, the header has {len(header)}")
        if not _PLAIN_ID.fullmatch(row[id_field]):
            check_id(row[id_field], f"{file}, line {line}")
    return [row[id_field] for _, row in rows], [row[text_field] for _, row in rows]


def table_lines(ids: Sequence[str], captions: Sequence[str], text: str) -> Iterator[str]:
    """Lines of a table whose second column is called `text`."""
    yield f"id\t{text}\n"
    for item_id, caption in zip(ids, captions, strict=True):
        yield f"{_quoted(item_id)}\t{_quoted(caption)}\n"


def _quoted(field: str) -> str:
    """A field of a table, quoted when it must be; the csv module leaves a bare carriage return as it is."""
    return '"' + field.replace('"', '""') + '"' if set(field) & set('\t\n\r"') else field


# --- any file ----------------------------------------------------------------------------------------------------


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; ValueError when it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not readable JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object; {AGAIN}")
    return content


def write_text(file: Path, lines: Iterator[str] | Sequence[str]) -> None:
    """Write the lines and wait until they are on the disk."""
    with add_path_to_oserror(file), open(file, "w", newline="", encoding="utf-8") as handle:
        handle.writelines(lines)
        handle.flush()
        os.fsync(handle.fileno())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype, as writable bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def write_all(file: BinaryIO, data: memoryview, offset: int) -> None:
    """Write `data` at byte `offset` of an unbuffered file."""
    with add_path_to_oserror(file.name):
        while data:
            count = os.pwrite(file.fileno(), data, offset)
            data, offset = data[count:], offset + count
