"""The feature store: fixed-size records of float features beside a table of ids and captions.

A store called NAME is a folder `NAME/` with one headerless `COLUMN.memmap` per column and a `meta.json`
(the memory-mapped layout of TensorDict), a table `NAME.tsv` whose row i belongs to record i, and
`NAME.manifest.json` with what the numbers mean. Stores of the reference implementation have no manifest and open too.
Record i of a column starts at byte i * record_bytes (spec media, section 5.2), so reading is one positional read.
"""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mmaudio_hf.schema import (
    CLIP_FEATURES,
    MEAN,
    SCHEMA_VERSION,
    STD,
    SYNC_FEATURES,
    TEXT_FEATURES,
    audio_mode,
    check_id,
)

_BLOCK_BYTES = 64 << 20  # what whole-column passes hold in memory
_PARTIAL = ".partial"
_MAX_BUFFERS = 1024  # IOV_MAX of Linux: buffers of one preadv
_PLAIN_ID = re.compile(r"[\w-]{1,50}", re.ASCII)  # passes schema.check_id, which takes 6 s for a million ids
_AGAIN = "remove the store folder and run `mmaudio-hf extract-video` (or extract-audio) again"


class Column(NamedTuple):
    """Shape of one record and how its numbers are stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class FeatureStore:
    """A feature store opened for reading; `FeatureStore.open(path)` checks it first. Safe to read from many threads."""

    def __init__(self, path: Path, columns: dict[str, Column], ids: list[str], captions: list[str], manifest):
        self.path = path
        self.columns = columns
        self.ids = ids
        self.captions = captions
        self.manifest: dict[str, Any] | None = manifest
        self._statistics: tuple[torch.Tensor, torch.Tensor] | None = None
        self._files = {name: open(_column_file(path, name), "rb", buffering=0) for name in columns}  # noqa: SIM115

    @classmethod
    def open(cls, path: str | Path) -> "FeatureStore":
        """Open the store whose folder is `path`, after checking files, sizes, shapes, row counts and ids.

        Raises ValueError naming the file that is wrong and what mends it.
        """
        path = Path(path)
        rows, columns = _read_meta(path)
        for name, column in columns.items():
            _check_size(_column_file(path, name), rows * column.record_bytes)
        table = _table_file(path)
        ids, captions = _read_table(table)
        if len(ids) != rows:
            raise ValueError(f"{table} has {len(ids)} rows, {path} has {rows} records: they do not belong together")
        manifest = _read_manifest(path)
        if manifest is not None:
            _check_manifest(_manifest_file(path), manifest, rows, columns)
            if manifest["ids_sha256"] != ids_hash(ids):
                raise ValueError(f"{table} does not list the ids of {_manifest_file(path)} in their order; {_AGAIN}")
        return cls(path, columns, ids, captions, manifest)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_video(self) -> bool:
        """Whether the rows have CLIP and sync features."""
        return CLIP_FEATURES in self.columns

    @property
    def has_text(self) -> bool:
        """Whether the rows have text features."""
        return TEXT_FEATURES in self.columns

    def read(self, indices, columns: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Records `indices` (any order, repeats allowed) as `{column: (B, *shape)}`, in the stored dtype.

        IndexError for an index outside the store; OSError naming the file when it cannot be read.
        """
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        out = {}
        for name in self.columns if columns is None else columns:
            column = self.columns[name]
            out[name] = torch.empty((len(rows), *column.shape), dtype=column.dtype)
            self.read_into(name, rows, bytes_of(out[name]))
        return out

    def read_into(self, name: str, rows: np.ndarray, target: memoryview, places: np.ndarray | None = None) -> None:
        """Put record `rows[i]` of column `name` at record `places[i]` (default i) of `target`; errors as for `read`.

        Records that lie together in the file are one system call, wherever they go. Releases the interpreter lock.
        """
        if len(rows) == 0:
            return
        file, size = self._files[name], self.columns[name].record_bytes
        order, runs = self._runs(name, rows)
        where = ((order if places is None else places[order]) * size).tolist()
        for record, first, last in runs:
            for low in range(first, last, _MAX_BUFFERS):
                parts = [target[place : place + size] for place in where[low : min(low + _MAX_BUFFERS, last)]]
                _read_at(file, (record + low - first) * size, parts)

    def expect(self, name: str, rows: np.ndarray) -> None:
        """Have the system fetch records of a column from the disk, without waiting for them."""
        size = self.columns[name].record_bytes
        for record, first, last in self._runs(name, rows)[1]:
            os.posix_fadvise(self._files[name].fileno(), record * size, (last - first) * size, os.POSIX_FADV_WILLNEED)

    def expect_random_order(self) -> None:
        """Have the system read no further than asked: for stores that do not fit into memory."""
        for file in self._files.values():
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def _runs(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """Order of `rows` in the file of a column, and what lies together: (record, first, last + 1 in that order)."""
        if rows.min(initial=0) < 0 or rows.max(initial=0) >= len(self):
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}, asked for {rows.min()} to {rows.max()}")
        order = np.argsort(rows, kind="stable")
        records = rows[order]
        firsts = np.flatnonzero(np.diff(records, prepend=-2) != 1).tolist()
        return order, list(zip(records[firsts].tolist(), firsts, [*firsts[1:], len(rows)], strict=True))

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The column in file order, as (first row, records); memory does not grow with the store."""
        step = max(1, _BLOCK_BYTES // self.columns[name].record_bytes)
        for first in range(0, len(self), step):
            rows = np.arange(first, min(first + step, len(self)))
            yield first, self.read(rows, [name])[name]

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and unbiased std (C,) float32 of the stored latent means, over rows and time (spec networks, section 4).

        From the manifest; a store without one is read through once.
        """
        if self._statistics is None and self.manifest is not None:
            stored = self.manifest["latent_statistics"]
            self._statistics = (torch.tensor(stored["mean"]), torch.tensor(stored["std"]))
        if self._statistics is None:
            moments = Moments(self.columns[MEAN].shape[-1])
            for _, block in self.blocks(MEAN):
                moments.add(block)
            self._statistics = (moments.mean.float(), moments.std().float())
        return self._statistics

    def close(self) -> None:
        """Close the files; the store cannot be read afterwards."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Moments:
    """Running mean and variance per channel in float64, merged block by block (Chan, Golub and LeVeque 1983)."""

    def __init__(self, channels: int):
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)  # sum of squared distances from the mean

    def add(self, values: torch.Tensor) -> None:
        """Add values (..., C)."""
        values = values.reshape(-1, values.shape[-1]).double()
        total = self.count + len(values)
        block_mean = values.mean(0)
        shift = block_mean - self.mean
        self._squares += ((values - block_mean) ** 2).sum(0) + shift**2 * (self.count * len(values) / total)
        self.mean = self.mean + shift * (len(values) / total)
        self.count = total

    def std(self) -> torch.Tensor:
        """Unbiased standard deviation (C,)."""
        return (self._squares / (self.count - 1)).sqrt()


class StoreWriter:
    """Writes a store of `num_rows` rows by position; use as a context manager.

    Everything goes to `<name>.partial/`; leaving the context completes and renames it, an error removes it, and a kill
    leaves a `.partial` folder that does not open and that the next writer replaces. Memory does not grow with the rows.

        with StoreWriter(path, column_shapes("16k"), num_rows, mode="16k", duration=8.0, encoders=..., ...) as writer:
            writer.write(first_row, ids, captions, {"mean": mean_BNC, ...})

    shapes: column name -> shape of one record, in storage order. encoders: name -> {"id", "fingerprint"} of what made
    the features. preprocessing: hash of the settings that shaped the inputs. normalisation: how the audio level was
    set (any JSON value; stores that are mixed must agree). counts: extra numbers for the record (accepted, rejected).
    Raises ValueError when the store exists, OSError when the disk has no room for it.
    """

    def __init__(
        self,
        path: str | Path,
        shapes: Mapping[str, tuple[int, ...]],
        num_rows: int,
        *,
        mode: str,
        duration: float,
        encoders: Mapping[str, Mapping[str, str]],
        preprocessing: str = "",
        normalisation: Any = None,
        counts: Mapping[str, int] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.path = Path(path)
        self.columns = {name: Column(tuple(shape), dtype) for name, shape in shapes.items()}
        self.num_rows = num_rows
        self._facts = {
            "mode": audio_mode(mode).name,
            "duration": float(duration),
            "encoders": {name: dict(facts) for name, facts in encoders.items()},
            "preprocessing": preprocessing,
            "normalisation": normalisation,
            "counts": dict(counts or {}),
        }
        json.dumps(self._facts)  # fail now rather than after the last row
        _check_columns(self.path, num_rows, self.columns)
        if "." in self.path.name:
            raise ValueError(f"store name {self.path.name!r} has a dot: other readers would look for another .tsv")
        if self.path.exists():
            raise ValueError(f"{self.path} exists: remove it or give the new store another name")
        table = self.path.with_name(f"{self.path.name}.tsv")
        if table.exists() and not _manifest_file(self.path).exists():  # with one, it is left from a killed export
            raise ValueError(f"{table} exists and would be replaced: move it or give the new store another name")
        self._ids: list[str | None] = [None] * num_rows
        self._captions = [""] * num_rows
        self._moments = Moments(self.columns[MEAN].shape[-1])
        self._partial = self.path.with_name(self.path.name + _PARTIAL)
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        _check_room(self._partial, num_rows * sum(column.record_bytes for column in self.columns.values()))
        self._files = {name: _preallocated(self._partial, name, num_rows, c) for name, c in self.columns.items()}

    def write(self, first_row: int, ids: Sequence[str], captions: Sequence[str], values: Mapping[str, Any]) -> None:
        """Write rows `first_row` onwards: `values[column]` is (B, *shape), tensor or array, of any float dtype.

        ValueError for a wrong column, shape, id or position, a row written twice, or a value that is not finite.
        """
        rows = range(first_row, first_row + len(ids))
        self._check_rows(rows, ids, captions, values)
        tensors = {name: torch.as_tensor(values[name]).to("cpu", c.dtype) for name, c in self.columns.items()}
        for name, tensor in tensors.items():
            self._check_values(name, tensor, ids)
        for name, tensor in tensors.items():
            _write_all(self._files[name], bytes_of(tensor.contiguous()), first_row * self.columns[name].record_bytes)
        for row in tensors[MEAN]:  # one by one: the sums, and so the bytes, do not depend on how rows are grouped
            self._moments.add(row)
        self._ids[rows.start : rows.stop] = ids
        self._captions[rows.start : rows.stop] = captions

    def _check_rows(self, rows: range, ids, captions, values) -> None:
        if not ids or len(ids) != len(captions):
            raise ValueError(f"{self.path}: {len(ids)} ids and {len(captions)} captions given")
        if rows.start < 0 or rows.stop > self.num_rows:
            raise ValueError(f"{self.path}: rows {rows.start} to {rows.stop - 1} given, the store has {self.num_rows}")
        if set(values) != set(self.columns):
            raise ValueError(f"{self.path}: columns {sorted(values)} given, the store has {sorted(self.columns)}")
        for row, item_id in zip(rows, ids, strict=True):
            check_id(item_id, f"{self.path}, row {row}")
            if self._ids[row] is not None:
                raise ValueError(f"{self.path}: row {row} ({item_id!r}) is written a second time")

    def _check_values(self, name: str, tensor: torch.Tensor, ids) -> None:
        wanted = (len(ids), *self.columns[name].shape)
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{self.path}: {name} has shape {tuple(tensor.shape)}, must be {wanted}")
        finite = tensor.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(f"{self.path}: {name} of id {ids[int(finite.int().argmin())]!r} has values not finite")

    def finish(self) -> None:
        """Complete the store and give it its name. ValueError when rows are missing."""
        missing = [row for row, item_id in enumerate(self._ids) if item_id is None]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} of {self.num_rows} rows were never written, first {missing[0]}"
            )
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        table, manifest = self._partial / "table.tsv", self._partial / "manifest.json"
        _write_text(manifest, json.dumps(self._manifest(), indent=1) + "\n")
        _write_table(table, self._ids, self._captions, "label" if CLIP_FEATURES in self.columns else "caption")
        _write_text(self._partial / "meta.json", json.dumps(_meta(self.num_rows, self.columns)))
        # The folder comes last: without it nothing opens, so a kill between the renames leaves no half store.
        os.replace(manifest, _manifest_file(self.path))
        os.replace(table, self.path.with_name(f"{self.path.name}.tsv"))
        _sync_folder(self._partial)
        os.rename(self._partial, self.path)
        _sync_folder(self.path.parent)

    def abort(self) -> None:
        """Remove what was written."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _manifest(self) -> dict[str, Any]:
        columns = {
            name: {"dtype": _dtype_name(c.dtype), "shape": list(c.shape), "sha256": _file_hash(self._partial, name)}
            for name, c in self.columns.items()
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "layout": "reference",
            "rows": self.num_rows,
            **self._facts,
            "columns": columns,
            "ids_sha256": ids_hash(self._ids),
            "latent_statistics": {"mean": self._moments.mean.tolist(), "std": self._moments.std().tolist()},
        }

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.abort()  # nothing is left to remove after finish


@dataclass(frozen=True)
class Report:
    """What `verify` found: `problems` make a store unfit for use, `notes` do not."""

    path: Path
    rows: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """No problems."""
        return not self.problems


def verify(path: str | Path) -> Report:
    """Check the store at `path` completely: all that `open` checks, every checksum, and that every value is finite.

    Reads every byte once. Never raises for a bad store: what is wrong is in the report.
    """
    try:
        store = FeatureStore.open(path)
    except (ValueError, OSError) as error:
        return Report(Path(path), 0, (str(error),), ())
    problems, notes = [], []
    with store:
        for name in store.columns:
            try:
                problems += _verify_column(store, name)
            except OSError as error:
                problems.append(str(error))
        if store.manifest is None:
            notes.append(f"{store.path} has no manifest: only sizes and finiteness could be checked")
        repeated = len(store) - len(set(store.ids))
        if repeated:
            notes.append(f"{repeated} rows repeat an id")
        return Report(store.path, len(store), tuple(problems), tuple(notes))


def _verify_column(store: FeatureStore, name: str) -> list[str]:
    problems, digest, bad_rows = [], hashlib.sha256(), []
    for first, block in store.blocks(name):
        digest.update(bytes_of(block))
        finite = block.flatten(1).isfinite().all(1)
        bad_rows += (first + (~finite).nonzero().flatten()).tolist()
    file = _column_file(store.path, name)
    if store.manifest is not None and digest.hexdigest() != store.manifest["columns"][name]["sha256"]:
        problems.append(f"{file} is not what was exported (checksum differs); copy it again or {_AGAIN}")
    if bad_rows:
        shown = ", ".join(f"{row} ({store.ids[row]})" for row in bad_rows[:5])
        problems.append(f"{file} has values that are not finite in {len(bad_rows)} rows: {shown}")
    return problems


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype, as writable bytes."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def ids_hash(ids: Sequence[str]) -> str:
    """SHA-256 of the ids in order, each ended by a newline (which no id contains)."""
    return hashlib.sha256("".join(f"{item_id}\n" for item_id in ids).encode()).hexdigest()


# --- files -------------------------------------------------------------------------------------------------------


def _column_file(path: Path, name: str) -> Path:
    return path / f"{name}.memmap"


def _manifest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.manifest.json")


def _table_file(path: Path) -> Path:
    """`<name>.tsv`, or what the reference implementation calls it: without what follows the last dot of the name."""
    for candidate in (path.with_name(f"{path.name}.tsv"), path.with_suffix(".tsv")):
        if candidate.is_file():
            return candidate
    raise ValueError(f"no {path.name}.tsv beside {path}: copy it from where the store was made or {_AGAIN}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not readable JSON ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object; {_AGAIN}")
    return content


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _meta(rows: int, columns: Mapping[str, Column]) -> dict[str, Any]:
    """Content of meta.json as TensorDict writes it, key order included."""
    entries = {
        name: {"device": "cpu", "shape": [rows, *c.shape], "dtype": str(c.dtype), "is_nested": False}
        for name, c in columns.items()
    }
    kind = {"_type": "<class 'tensordict._td.TensorDict'>", "_format_version": 1, "_class": "tensordict:TensorDict"}
    return {**entries, "shape": [], "device": "cpu", **kind}


def _read_meta(path: Path) -> tuple[int, dict[str, Column]]:
    """Number of rows and columns of a folder; entries of both vintages of TensorDict."""
    file = path / "meta.json"
    if not path.is_dir():
        raise ValueError(
            f"no feature store at {path}; make it with `mmaudio-hf extract-video` (or extract-audio),"
            " or correct data.*.path"
        )
    if path.name.endswith(_PARTIAL):
        raise ValueError(f"{path} is an export that was not finished; {_AGAIN}")
    if not file.is_file():
        raise ValueError(f"{path} is not a feature store (it has no meta.json); {_AGAIN}")
    columns, counts = {}, {}
    for name, entry in _read_json(file).items():
        if not isinstance(entry, dict):
            continue
        shape, dtype = entry.get("shape"), _float_dtype(entry.get("dtype"))
        if not (isinstance(shape, list) and len(shape) > 1 and all(isinstance(n, int) and n > 0 for n in shape)):
            raise ValueError(f"{file}: {name} has shape {shape!r}, expected [rows, ...]; {_AGAIN}")
        if dtype is None:
            raise ValueError(f"{file}: {name} has dtype {entry.get('dtype')!r}, expected a float type; {_AGAIN}")
        check_id(name, str(file))  # it becomes a file name
        columns[name], counts[name] = Column(tuple(shape[1:]), dtype), shape[0]
    if len(set(counts.values())) > 1:
        raise ValueError(f"{file}: the columns have different numbers of rows {counts}; {_AGAIN}")
    rows = next(iter(counts.values()), 0)
    _check_columns(path, rows, columns)
    return rows, columns


def _float_dtype(name: Any) -> torch.dtype | None:
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _check_columns(path: Path, rows: int, columns: Mapping[str, Column]) -> None:
    if rows < 1:
        raise ValueError(f"{path}: a store needs at least one row")
    if MEAN not in columns or STD not in columns or columns[MEAN] != columns[STD]:
        raise ValueError(f"{path}: a store needs the columns {MEAN} and {STD}, of one shape; found {list(columns)}")
    if (CLIP_FEATURES in columns) != (SYNC_FEATURES in columns):
        raise ValueError(f"{path}: {CLIP_FEATURES} and {SYNC_FEATURES} come together; found {list(columns)}")


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise ValueError(f"{file} is missing; copy it from where the store was made or {_AGAIN}")
    found = file.stat().st_size
    if found != size:
        raise ValueError(f"{file} has {found} bytes, meta.json says {size}; copy it again or {_AGAIN}")


def _read_manifest(path: Path) -> dict[str, Any] | None:
    file = _manifest_file(path)
    return _read_json(file) if file.exists() else None


def _check_manifest(file: Path, manifest: dict[str, Any], rows: int, columns: Mapping[str, Column]) -> None:
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(f"{file}: schema version {version!r} is not known here ({SCHEMA_VERSION}); update mmaudio_hf")
    keys = ("mode", "duration", "encoders", "normalisation", "rows", "columns", "ids_sha256", "latent_statistics")
    absent = [key for key in keys if key not in manifest]
    if absent:
        raise ValueError(f"{file} lacks {', '.join(absent)}; {_AGAIN}")
    try:
        listed = {name: (tuple(c["shape"]), c["dtype"]) for name, c in manifest["columns"].items()}
        channels = {len(manifest["latent_statistics"][key]) for key in ("mean", "std")}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: columns or latent_statistics are malformed; {_AGAIN}") from error
    found = {name: (c.shape, _dtype_name(c.dtype)) for name, c in columns.items()}
    if manifest["rows"] != rows or listed != found or channels != {columns[MEAN].shape[-1]}:
        raise ValueError(f"{file} describes {manifest['rows']} rows of {listed}, the folder holds {rows} of {found}")


def _read_table(file: Path) -> tuple[list[str], list[str]]:
    """Ids and captions, all as text: "NA" stays a word and "00008" keeps its zeros (spec media, section 5.3)."""
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
    id_place, text_place = header.index("id"), header.index(text)
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{file}, line {line}: {len(row)} fields, the header has {len(header)}")
        if not _PLAIN_ID.fullmatch(row[id_place]):
            check_id(row[id_place], f"{file}, line {line}")
    return [row[id_place] for _, row in rows], [row[text_place] for _, row in rows]


def _write_table(file: Path, ids: Sequence[str], captions: Sequence[str], text: str) -> None:
    lines = (f"{_quoted(item_id)}\t{_quoted(caption)}\n" for item_id, caption in zip(ids, captions, strict=True))
    _write_text(file, f"id\t{text}\n" + "".join(lines))


def _quoted(field: str) -> str:
    """A field of a table, quoted when it must be; the csv module leaves a bare carriage return as it is."""
    return '"' + field.replace('"', '""') + '"' if set(field) & set('\t\n\r"') else field


def _write_text(file: Path, text: str) -> None:
    with open(file, "w", newline="", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _check_room(folder: Path, size: int) -> None:
    """A full disk shows now, not after hours of encoding."""
    free = shutil.disk_usage(folder).free
    if size > free:
        folder.rmdir()
        raise OSError(errno.ENOSPC, f"the store needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f}", str(folder))


def _preallocated(folder: Path, name: str, rows: int, column: Column):
    file = open(_column_file(folder, name), "w+b", buffering=0)  # noqa: SIM115
    os.posix_fallocate(file.fileno(), 0, rows * column.record_bytes)
    return file


def _read_at(file, offset: int, parts: list[memoryview]) -> None:
    """Fill `parts` one after the other from byte `offset` on. OSError naming the file when bytes are missing."""
    while parts:
        try:
            count = os.preadv(file.fileno(), parts, offset)
        except OSError as error:
            raise OSError(error.errno, f"reading byte {offset}: {error.strerror}", str(file.name)) from error
        if count == 0:
            raise OSError(f"{file.name} ends before byte {offset}: it became shorter since the store was opened")
        offset += count
        while parts and count >= len(parts[0]):
            count -= len(parts[0])
            parts = parts[1:]
        if count:  # the system may deliver less than asked for
            parts = [parts[0][count:], *parts[1:]]


def _write_all(file, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file.fileno(), data, offset)
        data, offset = data[count:], offset + count


def _file_hash(folder: Path, name: str) -> str:
    with open(_column_file(folder, name), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
