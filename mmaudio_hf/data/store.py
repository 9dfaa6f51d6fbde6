"""The feature store: fixed-size records of float features beside a table of ids and captions.

A store called NAME is a folder `NAME/` with one headerless `COLUMN.memmap` per column and a `meta.json`
(the memory-mapped layout of TensorDict), a table `NAME.tsv` whose row i belongs to record i, and
`NAME.manifest.json` with what the numbers mean. Stores of the reference implementation have no manifest and open too.
Record i of a column starts at byte i * row_bytes (spec media, section 5.2), so reading is one positional read.
In the compact layout rows share text records (see `store_files`); reading gives every row its own all the same.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmaudio_hf.data.layout import (
    AGAIN,
    PARTIAL,
    TEXT_INDEX,
    Column,
    Contents,
    add_path_to_oserror,
    bytes_of,
    captions_hash,
    check_contents,
    check_sizes,
    column_file,
    fsync_path,
    ids_hash,
    layout_columns,
    manifest_columns,
    manifest_file,
    manifest_text,
    meta_text,
    new_table_file,
    read_manifest,
    read_meta,
    read_table,
    read_text_index,
    table_file,
    table_lines,
    write_all,
    write_text,
)
from mmaudio_hf.data.reads import read_at, read_records, runs
from mmaudio_hf.schema import CLIP_FEATURES, MEAN, SCHEMA_VERSION, TEXT_FEATURES, audio_mode, check_id

_BLOCK_BYTES = 64 << 20  # what whole-column passes hold in memory


class FeatureStore:
    """A feature store opened for reading; `FeatureStore.open(path)` checks it first. Safe to read from many threads."""

    def __init__(self, path: Path, contents: Contents, ids: list[str], captions: list[str], manifest, text_index):
        self.path = path
        self.contents = contents
        self.columns = contents.columns
        self.ids = ids
        self.captions = captions
        self.manifest: dict[str, Any] | None = manifest
        self.text_index: np.ndarray | None = text_index  # (rows,) text record of every row; None: its own
        self._statistics: tuple[torch.Tensor, torch.Tensor] | None = None
        self._files = {name: open(column_file(path, name), "rb", buffering=0) for name in self.columns}  # noqa: SIM115

    @classmethod
    def open(cls, path: str | Path) -> "FeatureStore":
        """Open the store whose folder is `path`, after checking files, sizes, shapes, row counts and ids.

        Raises ValueError add_path_to_oserror the file that is wrong and what mends it.
        """
        path = Path(path)
        contents = read_meta(path)
        check_sizes(path, contents)
        table = table_file(path)
        ids, captions = read_table(table)
        if len(ids) != contents.rows:
            raise ValueError(
                f"{table} has {len(ids)} rows, {path} has {contents.rows} records: they do not belong together"
            )
        manifest = read_manifest(path, contents)
        if manifest is not None:
            if manifest["ids_sha256"] != ids_hash(ids):
                raise ValueError(f"{table} does not list the ids of {manifest_file(path)} in their order; {AGAIN}")
            if manifest.get("captions_sha256", captions_hash(captions)) != captions_hash(captions):
                raise ValueError(
                    f"{table} does not hold the captions that the text features of {path} were made of, row by row"
                    f" (changed or shifted since); copy it again or {AGAIN}"
                )
        return cls(path, contents, ids, captions, manifest, read_text_index(path, contents))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def layout(self) -> str:
        """One of `store_files.LAYOUTS`."""
        return self.contents.layout

    @property
    def has_video(self) -> bool:
        """Whether the rows have CLIP and sync features."""
        return CLIP_FEATURES in self.columns

    @property
    def has_text(self) -> bool:
        """Whether the rows have text features."""
        return TEXT_FEATURES in self.columns

    @property
    def content_hash(self) -> str | None:
        """SHA-256 of the ids and of the checksums in the manifest: the same for copies of a store. None without one."""
        if self.manifest is None:
            return None
        content = [self.manifest["ids_sha256"], sorted((k, v["sha256"]) for k, v in self.manifest["columns"].items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def read(self, indices, columns: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Records `indices` (any order, repeats allowed) as `{column: (B, *shape)}`, in the stored dtype.

        IndexError for an index outside the store; OSError add_path_to_oserror the file when it cannot be read.
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

        Releases the interpreter lock.
        """
        if len(rows):
            places = np.arange(len(rows)) if places is None else places
            read_records(self._files[name], self._records(name, rows), self.columns[name].row_bytes, target, places)

    def prefetch(self, name: str, rows: np.ndarray) -> None:
        """Have the system fetch records of a column from the disk, without waiting for them."""
        self._advise(name, rows, os.POSIX_FADV_WILLNEED)

    def drop_from_cache(self, name: str, rows: np.ndarray) -> None:
        """Have the system drop records of a column from memory, so that they are read from the disk next time."""
        self._advise(name, rows, os.POSIX_FADV_DONTNEED)

    def _advise(self, name: str, rows: np.ndarray, advice: int) -> None:
        size = self.columns[name].row_bytes
        for record, first, last in runs(self._records(name, rows)):
            os.posix_fadvise(self._files[name].fileno(), record * size, (last - first) * size, advice)

    def advise_random(self) -> None:
        """Have the system read no further than asked: for stores that do not fit into memory."""
        for file in self._files.values():
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def _records(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Where in a column's file the rows are."""
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}, asked for {rows.min()} to {rows.max()}")
        return self.text_index[rows] if name == TEXT_FEATURES and self.text_index is not None else rows

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The column in file order, as (first row, records); memory does not grow with the store."""
        step = max(1, _BLOCK_BYTES // self.columns[name].row_bytes)
        for first in range(0, len(self), step):
            rows = np.arange(first, min(first + step, len(self)))
            yield first, self.read(rows, [name])[name]

    def file_blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """What the file of a column holds, as (first record, records): each shared text once, else as `blocks`."""
        column, records = self.contents.files[name]
        step = max(1, _BLOCK_BYTES // column.row_bytes)
        for first in range(0, records, step):
            block = torch.empty((min(step, records - first), *column.shape), dtype=column.dtype)
            read_at(self._files[name], first * column.row_bytes, [bytes_of(block)])
            yield first, block

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
    the features. preprocessing: the settings that shaped the inputs. normalisation: how the audio level was set (any
    JSON value; stores that are mixed must agree). Where mode, duration or normalisation is None, it is not known and
    not compared. counts: extra numbers for the record (accepted, rejected).
    made_of: a hash of everything that the rows depend on, for the manifest. layout, sync_dtype: see `layout_columns`.
    Raises ValueError when the store exists, OSError when the disk has no room for it.
    """

    def __init__(
        self,
        path: str | Path,
        shapes: Mapping[str, tuple[int, ...]],
        num_rows: int,
        *,
        mode: str | None,
        duration: float | None,
        encoders: Mapping[str, Mapping[str, str]],
        preprocessing: Any = None,
        normalisation: Any = None,
        counts: Mapping[str, int] | None = None,
        made_of: str = "",
        layout: str = "reference",
        sync_dtype: str = "float32",
    ):
        self.path = Path(path)
        self.columns = layout_columns(shapes, layout, sync_dtype)
        self.num_rows = num_rows
        self._facts = {
            "mode": mode if mode is None else audio_mode(mode).name,
            "duration": duration if duration is None else float(duration),
            "encoders": {name: dict(facts) for name, facts in encoders.items()},
            "preprocessing": preprocessing,
            "normalisation": normalisation,
            "counts": dict(counts or {}),
            "made_of": made_of,
        }
        json.dumps(self._facts)  # fail now rather than after the last row
        check_contents(self.path, Contents(num_rows, self.columns))
        self._check_free()
        self._ids: list[str | None] = [None] * num_rows
        self._captions = [""] * num_rows
        self._moments = Moments(self.columns[MEAN].shape[-1])
        self._rows_written, self._in_order = 0, True
        self._partial = self.path.with_name(self.path.name + PARTIAL)
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._placed: list[Path] = []  # what has its own name before the folder has
        self._files: dict[str, Any] = {}
        self._texts: _SharedTexts | None = None
        plain = dict(self.columns)
        try:
            if layout == "compact" and TEXT_FEATURES in plain:
                self._texts = _SharedTexts(self._partial, num_rows, plain.pop(TEXT_FEATURES))
            _check_room(self._partial, num_rows * sum(column.row_bytes for column in plain.values()))
            for name, column in plain.items():
                self._files[name] = _preallocated(self._partial, name, num_rows, column)
        except BaseException:
            self.abort()
            raise

    def _check_free(self) -> None:
        if "." in self.path.name:
            raise ValueError(f"store name {self.path.name!r} has a dot: other readers would look for another .tsv")
        if self.path.exists():
            raise ValueError(f"{self.path} exists: remove it or give the new store another name")
        table = new_table_file(self.path)
        if table.exists() and not manifest_file(self.path).exists():  # with one, it is left from a killed export
            raise ValueError(f"{table} exists and would be replaced: move it or give the new store another name")

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
            if name == TEXT_FEATURES and self._texts is not None:
                self._texts.write(first_row, tensor.contiguous())
            else:
                offset = first_row * self.columns[name].row_bytes
                write_all(self._files[name], bytes_of(tensor.contiguous()), offset)
        for row in tensors[MEAN]:  # one by one: the sums, and so the bytes, do not depend on how rows are grouped
            self._moments.add(row)
        self._in_order = self._in_order and first_row == self._rows_written
        self._rows_written += len(ids)
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
        if not self._in_order:
            self._moments = self._ordered_moments()
        texts = None if self._texts is None else self._texts.finish()
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        contents = Contents(self.num_rows, self.columns, texts)
        table, manifest = self._partial / "table.tsv", self._partial / "manifest.json"
        described = manifest_of(self._partial, contents, self._facts, self._ids, self._captions, self._moments)
        write_text(manifest, manifest_text(described))
        text_name = "label" if CLIP_FEATURES in self.columns else "caption"
        write_text(table, table_lines(self._ids, self._captions, text_name))
        write_text(self._partial / "meta.json", [meta_text(contents)])
        # The folder comes last: without it nothing opens, so a kill between the renames leaves no half store.
        for file, name in ((manifest, manifest_file(self.path)), (table, new_table_file(self.path))):
            os.replace(file, name)
            self._placed.append(name)
        fsync_path(self._partial)
        os.rename(self._partial, self.path)
        self._placed = []
        fsync_path(self.path.parent)

    def _ordered_moments(self) -> Moments:
        """The sums as if rows had come in their order; the last digits depend on it."""
        moments, column = Moments(self.columns[MEAN].shape[-1]), self.columns[MEAN]
        record = torch.empty(column.shape, dtype=column.dtype)
        for row in range(self.num_rows):
            read_at(self._files[MEAN], row * column.row_bytes, [bytes_of(record)])
            moments.add(record)
        return moments

    def abort(self) -> None:
        """Remove what was written."""
        for file in (*self._files.values(), *([] if self._texts is None else [self._texts.file])):
            file.close()
        for file in self._placed:
            file.unlink(missing_ok=True)
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.abort()  # nothing is left to remove after finish


def manifest_of(
    folder: Path,
    contents: Contents,
    facts: Mapping[str, Any],
    ids: Sequence[str],
    captions: Sequence[str],
    moments: Moments,
) -> dict[str, Any]:
    """The manifest of a folder of columns. facts: mode, duration, encoders, preprocessing, normalisation, counts."""
    keys = ("mode", "duration", "encoders", "preprocessing", "normalisation", "counts")
    made_of = {"made_of": facts["made_of"]} if facts.get("made_of") else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "layout": contents.layout,
        "rows": contents.rows,
        **{key: facts[key] for key in keys},
        **made_of,
        "columns": manifest_columns(folder, contents),
        "ids_sha256": ids_hash(ids),
        "captions_sha256": captions_hash(captions),
        "latent_statistics": {"mean": moments.mean.tolist(), "std": moments.std().tolist()},
    }


class _SharedTexts:
    """The texts of a compact store, each different record once, in the order of the first rows that have them.

    Records are told apart by their bytes and not by the captions: nothing is lost when one caption has two kinds of
    features, as in stores whose captions are shifted or whose encoder gives other digits in other batches.
    """

    def __init__(self, folder: Path, rows: int, column: Column):
        self._folder, self._column = folder, column
        self._index = np.zeros(rows, dtype=np.int32)
        self._known: dict[bytes, int] = {}  # digest of a record -> its place in the file
        self._written = 0
        self.file = open(column_file(folder, TEXT_FEATURES), "w+b", buffering=0)  # noqa: SIM115

    def write(self, first_row: int, records: torch.Tensor) -> None:
        """Note the texts (B, *shape) of rows `first_row` onwards, and write those that are new."""
        for row, record in enumerate(records, start=first_row):
            data = bytes_of(record)
            place = self._known.setdefault(hashlib.sha256(data).digest(), len(self._known))
            if place == self._written:
                write_all(self.file, data, place * self._column.row_bytes)
                self._written += 1
            self._index[row] = place

    def finish(self) -> int:
        """Complete both files; returns the number of texts."""
        _, first_rows = np.unique(self._index, return_index=True)
        order = np.argsort(first_rows)
        if (order != np.arange(len(order))).any():  # rows came out of their order
            self._sort(order)
            self._index = np.argsort(order).astype(np.int32)[self._index]
        os.fsync(self.file.fileno())
        self.file.close()
        with open(column_file(self._folder, TEXT_INDEX), "wb", buffering=0) as file:
            write_all(file, memoryview(self._index.astype("<i4")).cast("B"), 0)
            os.fsync(file.fileno())
        return len(order)

    def _sort(self, order: np.ndarray) -> None:
        size, name = self._column.row_bytes, column_file(self._folder, TEXT_FEATURES)
        with self.file as unsorted:
            os.unlink(name)
            self.file = open(name, "w+b", buffering=0)  # noqa: SIM115
            for place, record in enumerate(order.tolist()):
                data = torch.empty(size, dtype=torch.uint8)
                read_at(unsorted, record * size, [bytes_of(data)])
                write_all(self.file, bytes_of(data), place * size)


def _check_room(folder: Path, size: int) -> None:
    """A full disk shows now, not after hours of encoding."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"the store needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f}", str(folder))


def _preallocated(folder: Path, name: str, rows: int, column: Column):
    file = open(column_file(folder, name), "w+b", buffering=0)  # noqa: SIM115
    with add_path_to_oserror(file.name):
        os.posix_fallocate(file.fileno(), 0, rows * column.row_bytes)
    return file
