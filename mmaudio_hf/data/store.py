"""The feature store: fixed-size rows of float features beside a table of ids and captions (docs/stores.md).

A store called NAME is a folder `NAME/` with one headerless `COLUMN.memmap` per column and a `meta.json`
(the memory-mapped layout of TensorDict), a table `NAME.tsv` whose line i describes row i, and `NAME.manifest.json` with
what the numbers are. Stores of the reference implementation have no manifest and open too.
In the compact layout rows share texts (see `layout`); reading returns every row with its own text all the same.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from mmaudio_hf import schema
from mmaudio_hf.data.layout import (
    AGAIN,
    PARTIAL,
    TEXT_INDEX,
    Column,
    Contents,
    bytes_of,
    captions_hash,
    check_contents,
    check_sizes,
    column_file,
    dtype_name,
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
from mmaudio_hf.files import add_path_to_oserror, fsync_path, hash_of, readable

if TYPE_CHECKING:
    import datasets

_DESCRIBED = ("mode", "duration", "encoders", "preprocessing", "normalisation")  # in the manifest, of the features
_BLOCK_BYTES = 64 << 20  # what passes over a whole column hold in memory
_CHUNK = 1 << 14  # elements; see MappedColumn
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # see FeatureStore.content_hash

# Opens what `FeatureStore.open` is given as hub://...; set by `hub.stores.connect`, as this package may not import it.
hub_opener: "Callable[[str], FeatureStore] | None" = None


class FeatureStore(AbstractContextManager["FeatureStore"]):
    """A feature store opened for reading; `FeatureStore.open(path)` checks it first. Safe to read from many threads."""

    def __init__(
        self,
        path: Path,
        contents: Contents,
        ids: list[str],
        captions: list[str],
        manifest: dict[str, Any] | None,
        text_index: np.ndarray | None,
    ):
        self.path = path
        self.contents = contents
        self.columns = contents.columns
        self.layout = contents.layout  # one of `layout.LAYOUTS`
        self.has_video, self.has_text = schema.CLIP_FEATURES in self.columns, schema.TEXT_FEATURES in self.columns
        self.ids = ids
        self.captions = captions
        self.manifest = manifest
        self.text_index = text_index  # (rows,) row of text_features.memmap for every row; None: its own
        self._maps = self._map_columns()

    def _map_columns(self) -> "dict[str, MappedColumn]":
        return {n: MappedColumn(column_file(self.path, n), *self.contents.files[n]) for n in self.columns}

    @classmethod
    @schema.checked
    def open(cls, path: str | Path) -> "FeatureStore":
        """Open the store whose folder is `path`, after checking files, sizes, shapes, row counts and ids.

        hub://owner/name is a store on the Hub, within `hub.stores.connect`. Raises ValueError naming the file that is
        wrong and the way out.
        """
        if str(path).startswith(schema.HUB_PREFIX):
            if hub_opener is None:
                raise ValueError(f"{path}: stores on the Hub open within `mmaudio_hf.hub.stores.connect`")
            return hub_opener(str(path))
        path = Path(path)
        contents = read_meta(path)
        check_sizes(path, contents)
        return cls(path, contents, *cls.read_small_files(path, contents), read_text_index(path, contents))

    @staticmethod
    def read_small_files(path: Path, contents: Contents) -> tuple[list[str], list[str], dict[str, Any] | None]:
        """Ids, captions and manifest of the store at `path`, checked against each other and `contents`."""
        table = table_file(path)
        ids, captions = read_table(table)
        if len(ids) != contents.rows:
            raise ValueError(f"{table} has {len(ids)} rows, {path} has {contents.rows}: they do not belong together")
        manifest = read_manifest(path, contents)
        if manifest is not None:
            # Only our writer makes manifests, and it knows meta.json to the byte: no checksum is needed.
            if (path / "meta.json").read_bytes() != meta_text(contents).encode():
                raise ValueError(f"{path / 'meta.json'} was changed after the export; copy it again or {AGAIN}")
            if manifest["ids_sha256"] != ids_hash(ids):
                raise ValueError(f"{table} does not list the ids of {manifest_file(path)} in their order; {AGAIN}")
            if manifest.get("captions_sha256", captions_hash(captions)) != captions_hash(captions):
                raise ValueError(
                    f"{table} does not hold the captions that the text features of {path} were encoded from, row by row"
                    f" (changed or shifted since); copy it again or {AGAIN}"
                )
        return ids, captions, manifest

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def label(self) -> str:
        """What messages call it."""
        return str(self.path)

    @property
    def duration(self) -> float | None:
        """Seconds of the clips, by the manifest or else the shapes of the columns; None where these are no clip's."""
        if (stated := (self.manifest or {}).get("duration")) is not None:
            return stated
        latents, channels = self.columns[schema.MEAN].shape
        names = [name for name in (schema.CLIP_FEATURES, schema.SYNC_FEATURES) if name in self.columns]
        mode = next((mode.name for mode in schema.MODES.values() if mode.latent_channels == channels), None)
        lengths = (self.columns[name].shape[0] for name in names)
        return None if mode is None else schema.duration_of(mode, latents, *lengths)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the ids and of every column: the same for copies of a store.

        Columns are those of the manifest's checksums. Without a manifest it is sampled: types, sizes and 64 blocks of
        4 KiB of each file, evenly spaced, first and last included. 600 GB would take an hour to read at every start.
        """
        if self.manifest is not None:
            checksums = sorted((name, entry["sha256"]) for name, entry in self.manifest["columns"].items())
            return hash_of([self.manifest["ids_sha256"], checksums])
        sampled = []
        for name, (column, rows) in self.contents.files.items():
            digest, last = hashlib.sha256(), max(0, rows * column.row_bytes - _SAMPLE_BYTES)
            with open(column_file(self.path, name), "rb") as file:
                for i in range(_SAMPLES):
                    digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, last * i // (_SAMPLES - 1)))
            sampled.append([name, dtype_name(column.dtype), rows, *column.shape, digest.hexdigest()])
        return hash_of([ids_hash(self.ids), sampled])

    @property
    def identity(self) -> dict[str, Any]:
        """What a run notes of a store that it reads: rows, content and the fingerprints of the encoders."""
        encoders = (self.manifest or {}).get("encoders", {})
        fingerprints = {name: str(entry.get("fingerprint", entry)) for name, entry in encoders.items()}
        return {"rows": len(self), "content": self.content_hash, "encoders": fingerprints}

    @schema.checked
    def read(self, indices: Any, columns: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Rows `indices` (any order, repeats allowed) as `{column: (B, *shape)}`, in the stored dtype.

        IndexError for an index outside the store; OSError naming a file that was truncated since the store was opened.
        """
        rows, values = self._checked_rows(indices, columns), {}
        for name in self.columns if columns is None else columns:
            column = self.columns[name]
            values[name] = torch.empty((len(rows), *column.shape), dtype=column.dtype)
            self.read_into(name, rows, values[name])
        return values

    def _checked_rows(self, indices: Any, columns: Sequence[str] | None) -> np.ndarray:
        rows = np.asarray(indices).reshape(-1)
        if rows.size and rows.dtype.kind not in "iu":
            raise ValueError(f"{self.path}: indices must be whole numbers, not {repr(indices)[:80]}")
        if unknown := sorted(set(columns or ()) - set(self.columns)):
            raise ValueError(f"{self.path} has no column {unknown[0]}: it has {', '.join(self.columns)}")
        return rows.astype(np.int64)

    def read_into(self, name: str, rows: np.ndarray, out: torch.Tensor) -> None:
        """Copy rows of column `name` into the contiguous `out` (len(rows), *shape); errors as for `read`.

        Releases the GIL and uses the intra-op threads of the calling thread.
        """
        if len(rows):
            self._maps[name].index_select(self._file_rows(name, rows), out)

    def prefetch(self, name: str, rows: np.ndarray) -> None:
        """Ask the kernel to read rows of a column from the disk into the page cache, without waiting for them."""
        self._maps[name].advise(self._file_rows(name, rows), os.POSIX_FADV_WILLNEED)

    def drop_from_cache(self, name: str, rows: np.ndarray) -> None:
        """Drop rows of a column from the page cache, so that they are read from the disk next time."""
        self._maps[name].advise(self._file_rows(name, rows), os.POSIX_FADV_DONTNEED)

    def advise_random(self) -> None:
        """Turn the kernel's own readahead off: for stores larger than memory, whose next rows `prefetch` names."""
        for column in self._maps.values():
            column.memory.madvise(mmap.MADV_RANDOM)

    def _file_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        if rows.view(np.uint64).max() >= len(self.ids):  # a negative one is huge
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}, asked for {rows.min()} to {rows.max()}")
        return self.text_index[rows] if name == schema.TEXT_FEATURES and self.text_index is not None else rows

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The file of a column in order, each shared text once, as (first row of the file, rows).

        Read and not mapped: a failing disk is then an OSError, and memory does not grow with the store.
        """
        column, rows = self.contents.files[name]
        step = max(1, _BLOCK_BYTES // column.row_bytes)
        with open(column_file(self.path, name), "rb") as file:
            for first in range(0, rows, step):
                block = torch.empty((min(step, rows - first), *column.shape), dtype=column.dtype)
                if file.readinto(bytes_of(block)) != block.nbytes:
                    raise _truncated(file, rows * column.row_bytes)
                yield first, block

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and unbiased std (C,) float32 of the stored latent means, over rows and time.

        The network sees (latent - mean) / std. From the manifest; a store without one is read through once.
        """
        return self._statistics

    @cached_property
    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.manifest is not None:
            stored = self.manifest["latent_statistics"]
            return torch.tensor(stored["mean"]), torch.tensor(stored["std"])
        moments = Moments(self.columns[schema.MEAN].shape[-1])
        for _, block in self.blocks(schema.MEAN):
            moments.add(block)
        return moments.mean.float(), moments.std().float()

    def to_dataset(self) -> "datasets.Dataset":
        """The rows as a `datasets.Dataset`: `id`, `caption`, and a nested list of float32 for each column.

        float32 columns are mapped, so it takes no memory; those of the compact layout are written out in float32, to
        the cache of `datasets`. `info.description` says what the features are (encoders ...), for `from_dataset`.
        """
        import datasets  # here and below: training does without it
        import pyarrow as pa

        columns: dict[str, Any] = dict.fromkeys(("id", "caption"), datasets.Value("string"))
        for name, column in self.columns.items():
            columns[name] = datasets.Value("float32")
            for length in reversed(column.shape):
                columns[name] = datasets.List(columns[name], length=length)
        # `datasets` knows what it cached by the fingerprint: it covers captions and, by their checksums, values.
        content = json.dumps([self.manifest or uuid.uuid4().hex, captions_hash(self.captions)], sort_keys=True)
        features, fingerprint = datasets.Features(columns), hashlib.sha256(content.encode()).hexdigest()
        if self.layout == "reference":
            arrays = [pa.chunked_array([self.ids], pa.string()), pa.chunked_array([self.captions], pa.string())]
            for name, column in self.columns.items():
                outer, buffer = features.arrow_schema.field(name).type, pa.py_buffer(self._maps[name].memory)
                step, chunks = max(1, _BLOCK_BYTES // column.row_bytes), []
                for first in range(0, len(self), step):  # Arrow copies whole chunks where rows are out of order
                    size = min(step, len(self) - first) * column.row_bytes
                    block = buffer.slice(first * column.row_bytes, size)
                    values = pa.Array.from_buffers(pa.float32(), size // 4, [None, block])
                    inner = pa.FixedSizeListArray.from_arrays(values, type=outer.value_type)
                    chunks.append(pa.FixedSizeListArray.from_arrays(inner, type=outer))
                arrays.append(pa.chunked_array(chunks, outer))
            table = datasets.table.InMemoryTable(pa.table(arrays, schema=features.arrow_schema))
            dataset = datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint=fingerprint)
        else:
            dataset = datasets.Dataset.from_generator(self._float_rows, features, fingerprint=fingerprint)
        known = {key: (self.manifest or {}).get(key) for key in _DESCRIBED}
        sync_dtype = dtype_name(self.columns[schema.SYNC_FEATURES].dtype) if self.has_video else "float32"
        dataset.info.description = json.dumps(known | {"layout": self.layout, "sync_dtype": sync_dtype})
        return dataset

    def _float_rows(self) -> Iterator[dict[str, Any]]:
        for row, (item_id, caption) in enumerate(zip(self.ids, self.captions, strict=True)):
            values = {name: value[0].float().numpy() for name, value in self.read([row]).items()}
            yield {"id": item_id, "caption": caption, **values}

    @classmethod
    def from_dataset(cls, dataset: "datasets.Dataset", path: str | Path, **metadata: Any) -> "FeatureStore":
        """Write a `datasets.Dataset` with the columns that `to_dataset` gives as the store `path`, and open it.

        metadata: arguments of `StoreWriter`, in place of those in `info.description`, which the Hub does not keep.
        Further columns are left out. ValueError for columns that are missing or ragged, and where neither of the two
        has mode, duration and encoders.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if not hasattr(dataset, "select_columns"):
            raise ValueError(f"from_dataset: dataset must be a datasets.Dataset, not {repr(dataset)[:80]}")
        try:  # what `to_dataset` wrote; a description in words says nothing of the features
            described = json.loads(dataset.info.description or "")
            known = isinstance(described, dict) and described.keys() == {*_DESCRIBED, "layout", "sync_dtype"}
        except ValueError:
            known = False
        given = (described if known else {}) | metadata
        if missing := [key for key in ("mode", "duration", "encoders") if key not in given]:
            raise ValueError(f"the data set does not say {', '.join(missing)} of its features: give them, or None")
        text_name = "label" if "label" in dataset.column_names else "caption"
        names = [name for name in schema.VIDEO_COLUMNS if name in dataset.column_names]
        wanting = {"id", text_name, *(schema.VIDEO_COLUMNS if schema.CLIP_FEATURES in names else schema.AUDIO_COLUMNS)}
        if missing := sorted(wanting - set(dataset.column_names)):
            raise ValueError(f"the data set has no column {', '.join(missing)}; it has {dataset.column_names}")
        if len(dataset) == 0:
            raise ValueError("the data set has no rows")
        shapes = {name: np.asarray(values).shape for name, values in dataset.select_columns(names)[0].items()}
        with StoreWriter(path, shapes, len(dataset), **given | {"encoders": given["encoders"] or {}}) as writer:
            step = max(1, _BLOCK_BYTES // sum(column.row_bytes for column in writer.columns.values()))
            rows = dataset.select_columns(["id", text_name, *names]).with_format("arrow")
            for first in range(0, len(dataset), step):
                block = rows[first : first + step]
                arrays = {name: block[name].combine_chunks() for name in ("id", text_name, *names)}
                for name, array in arrays.items():  # nested lists become flat
                    array = array.storage if isinstance(array, pa.ExtensionArray) else array  # Array2D
                    for length in shapes.get(name, ()):
                        if array.null_count or pc.unique(pc.list_value_length(array)).to_pylist() != [length]:
                            raise ValueError(f"column {name}: rows differ in shape, or some have no values")
                        array = array.flatten()
                    if array.null_count:
                        raise ValueError(f"column {name}: some values are missing")
                    arrays[name] = array
                # Copies: torch warns of arrays that it may not write to.
                flat = {name: np.array(arrays[name].to_numpy(zero_copy_only=False), np.float32) for name in names}
                values = {name: value.reshape(-1, *shapes[name]) for name, value in flat.items()}
                ids, captions = (block[name].cast("string").to_pylist() for name in ("id", text_name))
                writer.write(first, ids, captions, values)
        return cls.open(path)

    def close(self) -> None:
        """Close the files; the store cannot be read afterwards."""
        for column in self._maps.values():
            column.file.close()
        self._maps = {}

    def __exit__(self, *_: object) -> None:
        self.close()


class MappedColumn:
    """The file of one column as a tensor over the page cache.

    Mapped read-only, unlike TensorDict's MemoryMappedTensor: that maps a writable file for writing, and one that is not
    writable privately, which Linux refuses beyond the size of memory. Importing tensordict takes seconds besides.

    Wide rows are split into chunks of at most 16,384 elements: below its grain of 32,768 `index_select` uses memcpy
    and shares rows among threads; above it copies element by element, 5 to 10 % slower.
    """

    def __init__(self, path: Path, column: Column, rows: int):
        self.file = open(path, "rb")  # noqa: SIM115
        self.memory = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        self._size, self._row_bytes = rows * column.row_bytes, column.row_bytes
        elements = math.prod(column.shape)
        chunks = next((n for n in range(1, 64) if elements % n == 0 and elements // n <= _CHUNK), 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # nothing writes to it
            self._chunks = torch.frombuffer(self.memory, dtype=column.dtype).view(-1, elements // chunks)
        self._chunk_of_row = np.arange(chunks)

    def index_select(self, rows: np.ndarray, out: torch.Tensor) -> None:
        """Copy rows into `out` (len(rows), *shape)."""
        assert out.is_contiguous() and len(out) == len(rows), (out.shape, rows.shape)
        # Touching a page behind the end of the file would end the process with SIGBUS.
        if os.fstat(self.file.fileno()).st_size < self._size:
            raise _truncated(self.file, self._size)
        chunks = rows[:, None] * len(self._chunk_of_row) + self._chunk_of_row
        torch.index_select(self._chunks, 0, torch.from_numpy(chunks.ravel()), out=out.view(-1, self._chunks.shape[1]))

    def advise(self, rows: np.ndarray, advice: int) -> None:
        """posix_fadvise for each row."""
        for start in (rows * self._row_bytes).tolist():
            if advice == os.POSIX_FADV_DONTNEED:  # pages that are mapped stay in the cache
                first = start - start % mmap.PAGESIZE
                self.memory.madvise(mmap.MADV_DONTNEED, first, start + self._row_bytes - first)
            os.posix_fadvise(self.file.fileno(), start, self._row_bytes, advice)


def _truncated(file: BinaryIO, size: int) -> OSError:
    now = os.fstat(file.fileno()).st_size
    return OSError(f"{file.name} has {now} bytes, {size} are needed: it became shorter since the store was opened")


class Moments:
    """Running mean and variance per channel in float64, merged block by block (Chan, Golub and LeVeque 1983)."""

    def __init__(self, channels: int):
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)  # sum of squared distances from the mean

    @classmethod
    def of_file(cls, file: Path, column: Column) -> "Moments":
        """Of the file of a column, row by row as `StoreWriter` adds them: equal to the last bit."""
        moments = cls(column.shape[-1])
        with open(file, "rb") as handle:
            while row := handle.read(column.row_bytes):
                moments.add(torch.frombuffer(bytearray(row), dtype=column.dtype).view(column.shape))
        return moments

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


class StoreWriter(AbstractContextManager["StoreWriter"]):
    """Writes a store of `num_rows` rows, in any order; use as a context manager.

    Everything goes to `<name>.partial/`; leaving the context completes and renames it, an error removes it, and a kill
    leaves a `.partial` folder that does not open and that the next writer replaces. Memory does not grow with the rows.

        with StoreWriter(path, column_shapes("16k"), num_rows, mode="16k", duration=8.0, encoders=..., ...) as writer:
            writer.write(first_row, ids, captions, {"mean": mean_BNC, ...})

    shapes: column -> shape of a row, in storage order. encoders: name -> {"id", "fingerprint"} of what computed the
    features. preprocessing: the settings that shaped the inputs. normalisation: how the audio level was set (any JSON
    value; stores that are mixed must agree). Where mode, duration or normalisation is None, it is not known and not
    compared. counts: extra numbers for the manifest (accepted, rejected). inputs_hash: of everything that the
    rows depend on, for the manifest. layout, sync_dtype: see `layout_columns`.
    Raises ValueError when the store exists, OSError when the disk is too small for it.
    """

    @schema.checked
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
        inputs_hash: str = "",
        layout: str = "reference",
        sync_dtype: str = "float32",
    ):
        self.path = Path(path)
        self.columns = layout_columns(shapes, layout, sync_dtype)
        self.num_rows = num_rows
        self._metadata = {
            "mode": mode if mode is None else schema.audio_mode(mode).name,
            "duration": duration if duration is None else float(duration),
            "encoders": {name: dict(entry) for name, entry in encoders.items()},
            "preprocessing": preprocessing,
            "normalisation": normalisation,
            "counts": dict(counts or {}),
            "made_of": inputs_hash,
        }
        json.dumps(self._metadata)  # fail now rather than after the last row
        check_contents(self.path, Contents(num_rows, self.columns))
        if "." in self.path.name:
            raise ValueError(f"store name {self.path.name!r} has a dot: other readers would look for another .tsv")
        if self.path.exists():
            raise ValueError(f"{self.path} exists: remove it or give the new store another name")
        table = new_table_file(self.path)
        if table.exists() and not manifest_file(self.path).exists():  # with one, it is left from a killed export
            raise ValueError(f"{table} exists and would be replaced: move it or give the new store another name")
        self._ids = [""] * num_rows  # "": not written yet
        self._captions = [""] * num_rows
        self._moments = Moments(self.columns[schema.MEAN].shape[-1])
        self._rows_written, self._in_order = 0, True
        self._partial = self.path.with_name(self.path.name + PARTIAL)
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._renamed: list[Path] = []  # files that have their final name before the folder has
        self._files: dict[str, BinaryIO] = {}
        self._texts: _SharedTexts | None = None
        try:
            if layout == "compact" and schema.TEXT_FEATURES in self.columns:
                self._texts = _SharedTexts(self._partial, num_rows, self.columns[schema.TEXT_FEATURES])
            self._preallocate(
                {n: c for n, c in self.columns.items() if n != schema.TEXT_FEATURES or self._texts is None}
            )
        except BaseException:
            self.abort()
            raise

    def _preallocate(self, columns: Mapping[str, Column]) -> None:
        """Allocate the files: a full disk shows now, not after hours of encoding."""
        size = self.num_rows * sum(column.row_bytes for column in columns.values())
        free = shutil.disk_usage(self._partial).free
        if size > free:
            message = f"the store needs {readable(size)}, the disk has {readable(free)}"
            raise OSError(errno.ENOSPC, message, str(self._partial))
        for name, column in columns.items():
            self._files[name] = open(column_file(self._partial, name), "w+b", buffering=0)  # noqa: SIM115
            with add_path_to_oserror(self._files[name].name):
                os.posix_fallocate(self._files[name].fileno(), 0, self.num_rows * column.row_bytes)

    def write(self, first_row: int, ids: Sequence[str], captions: Sequence[str], values: Mapping[str, Any]) -> None:
        """Write rows `first_row` onwards: `values[column]` is (B, *shape), tensor or array, of any float dtype.

        ValueError for a wrong column, shape, id or row, a row written twice, or a value that is not finite.
        """
        rows = range(first_row, first_row + len(ids))
        if not ids or len(ids) != len(captions):
            raise ValueError(f"{self.path}: {len(ids)} ids and {len(captions)} captions given")
        if rows.start < 0 or rows.stop > self.num_rows:
            raise ValueError(f"{self.path}: rows {rows.start} to {rows.stop - 1} given, the store has {self.num_rows}")
        if set(values) != set(self.columns):
            raise ValueError(f"{self.path}: columns {sorted(values)} given, the store has {sorted(self.columns)}")
        for row, item_id in zip(rows, ids, strict=True):
            schema.check_id(item_id, f"{self.path}, row {row}")
            if self._ids[row]:
                raise ValueError(f"{self.path}: row {row} ({item_id!r}) is written a second time")
        tensors = {n: torch.as_tensor(values[n]).to("cpu", c.dtype).contiguous() for n, c in self.columns.items()}
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != (expected := (len(ids), *self.columns[name].shape)):
                raise ValueError(f"{self.path}: {name} has shape {tuple(tensor.shape)}, must be {expected}")
            finite = tensor.isfinite().flatten(1).all(1)
            if not finite.all():
                raise ValueError(f"{self.path}: {name} of id {ids[int(finite.int().argmin())]!r} has values not finite")
        for name, tensor in tensors.items():
            if name == schema.TEXT_FEATURES and self._texts is not None:
                self._texts.write(first_row, tensor)
            else:
                write_all(self._files[name], bytes_of(tensor), first_row * self.columns[name].row_bytes)
        for row in tensors[schema.MEAN]:  # one by one: sums, and so bytes, do not depend on how rows are grouped
            self._moments.add(row)
        self._in_order = self._in_order and first_row == self._rows_written
        self._rows_written += len(ids)
        self._ids[rows.start : rows.stop] = ids
        self._captions[rows.start : rows.stop] = captions

    def finish(self) -> None:
        """Complete the store and rename it to its name. ValueError when rows are missing."""
        if missing := [row for row, item_id in enumerate(self._ids) if not item_id]:
            rows = f"{len(missing)} of {self.num_rows} rows"
            raise ValueError(f"{self.path}: {rows} were never written, first {missing[0]}")
        if not self._in_order:  # the last digits depend on the order
            self._moments = Moments.of_file(column_file(self._partial, schema.MEAN), self.columns[schema.MEAN])
        texts = None if self._texts is None else self._texts.finish()
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        contents = Contents(self.num_rows, self.columns, texts)
        table, manifest = self._partial / "table.tsv", self._partial / "manifest.json"
        entries = manifest_of(self._partial, contents, self._metadata, self._ids, self._captions, self._moments)
        write_text(manifest, manifest_text(entries))
        text_name = "label" if schema.CLIP_FEATURES in self.columns else "caption"
        write_text(table, table_lines(self._ids, self._captions, text_name))
        write_text(self._partial / "meta.json", [meta_text(contents)])
        # The folder comes last: without it nothing opens, so a kill between the renames leaves no half store.
        for partial, path in ((manifest, manifest_file(self.path)), (table, new_table_file(self.path))):
            os.replace(partial, path)
            self._renamed.append(path)
        fsync_path(self._partial)
        os.rename(self._partial, self.path)
        self._renamed = []
        fsync_path(self.path.parent)

    def abort(self) -> None:
        """Remove what was written."""
        for file in (*self._files.values(), *([] if self._texts is None else [self._texts.file])):
            file.close()
        for path in self._renamed:
            path.unlink(missing_ok=True)
        shutil.rmtree(self._partial, ignore_errors=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.abort()  # nothing is left to remove after finish


def manifest_of(
    folder: Path,
    contents: Contents,
    metadata: Mapping[str, Any],
    ids: Sequence[str],
    captions: Sequence[str],
    moments: Moments,
) -> dict[str, Any]:
    """The manifest of a folder of columns. metadata: mode, duration, encoders, preprocessing, normalisation, counts."""
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "layout": contents.layout,
        "rows": contents.rows,
        **{key: metadata[key] for key in (*_DESCRIBED, "counts")},
        **({"made_of": metadata["made_of"]} if metadata.get("made_of") else {}),
        "columns": manifest_columns(folder, contents),
        "ids_sha256": ids_hash(ids),
        "captions_sha256": captions_hash(captions),
        "latent_statistics": {"mean": moments.mean.tolist(), "std": moments.std().tolist()},
    }


class _SharedTexts:
    """The text features of a compact store, each different row once, in the order of the first rows that have them.

    They are compared by their bytes and not by the captions: nothing is lost when one caption has two kinds of
    features, as in stores whose captions are shifted or whose encoder rounds differently in other batches.
    """

    def __init__(self, folder: Path, rows: int, column: Column):
        self._folder, self._size = folder, column.row_bytes
        self._index = np.zeros(rows, dtype=np.int32)
        self._row_of_digest: dict[bytes, int] = {}
        self._written = 0
        self.file: BinaryIO = open(column_file(folder, schema.TEXT_FEATURES), "w+b", buffering=0)  # noqa: SIM115

    def write(self, first_row: int, texts: torch.Tensor) -> None:
        for row, text in enumerate(texts, start=first_row):
            data = bytes_of(text)
            text_row = self._row_of_digest.setdefault(hashlib.sha256(data).digest(), len(self._row_of_digest))
            if text_row == self._written:
                write_all(self.file, data, text_row * self._size)
                self._written += 1
            self._index[row] = text_row

    def finish(self) -> int:
        """Complete both files; returns the number of texts."""
        _, first_rows = np.unique(self._index, return_index=True)
        order = np.argsort(first_rows)
        if (order != np.arange(len(order))).any():  # rows were not written in order
            name = column_file(self._folder, schema.TEXT_FEATURES)
            with self.file as unsorted:
                os.unlink(name)
                self.file = open(name, "w+b", buffering=0)  # noqa: SIM115
                for row, old_row in enumerate(order.tolist()):
                    data = os.pread(unsorted.fileno(), self._size, old_row * self._size)
                    write_all(self.file, memoryview(data), row * self._size)
            self._index = np.argsort(order).astype(np.int32)[self._index]
        os.fsync(self.file.fileno())
        self.file.close()
        with open(column_file(self._folder, TEXT_INDEX), "wb", buffering=0) as file:
            write_all(file, bytes_of(torch.from_numpy(self._index.astype("<i4"))), 0)
            os.fsync(file.fileno())
        return len(order)
