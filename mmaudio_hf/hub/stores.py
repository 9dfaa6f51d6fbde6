"""Feature stores as dataset repositories of the Hub, whole or in part.

    store.json                          the files below: chunks of every column in their order, sizes and checksums
    meta.json, table.tsv, manifest.json, offsets.json
                                        what is in and beside the folder of a store
    columns/COLUMN/00000.CHECKSUM.bin   a chunk: consecutive records of a column ("parts" in store.json)
    checksums/COLUMN.CHECKSUM.sha256    16 bytes for each record of a column: the first half of its SHA-256
    README.md                           the card

A chunk is what one request uploads. It consists of blocks, each with its own checksum, which are what one request
downloads: so any rows can be fetched without the rest of their chunk, and what an interrupted pull has is verified.
The name of a chunk depends on its content and store.json is replaced last: a pull during a push has the old store.
Streaming (`connect`) fetches single records, which have their own checksums.
"""

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urljoin, urlsplit

import httpx2
import numpy as np
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, hf_hub_url
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, hf_raise_for_status

from mmaudio_hf import hub
from mmaudio_hf.config import read_json
from mmaudio_hf.data import store as data_store
from mmaudio_hf.data.layout import (
    TEXT_INDEX,
    Column,
    Contents,
    check_contents,
    column_file,
    manifest_columns,
    manifest_file,
    manifest_text,
    meta_text,
    new_table_file,
    offsets_file,
    read_meta,
    read_offsets,
    read_table,
    read_text_index,
    table_file,
    table_lines,
    write_all,
    write_offsets,
    write_text,
)
from mmaudio_hf.data.remote import CHECKSUM_BYTES, RemoteStore, Seat, divide, own_columns, record_checksum
from mmaudio_hf.data.store import FeatureStore, Moments, manifest_of
from mmaudio_hf.files import fsync_path, hash_once, locked, readable, sha256_of
from mmaudio_hf.hub.cards import stated_origin, store_card
from mmaudio_hf.hub_client import CARD_FILE, TIMEOUT, api, download_card, hub_errors, merge_cards
from mmaudio_hf.schema import CLIP_FEATURES, HUB_PREFIX, MEAN, TEXT_FEATURES, split_hub_id

FORMAT, VERSION = "mmaudio_hf feature store", 2  # 1: without offsets.json, and still written where there is none
INDEX, META, TABLE, MANIFEST, OFFSETS = "store.json", "meta.json", "table.tsv", "manifest.json", "offsets.json"
BLOCK_BYTES = 8 << 20
MAX_BLOCK_BYTES = 256 << 20
CHUNK_BYTES = 512 << 20  # a chunk is held in memory while it is sent
COMMIT_BYTES = 8 << 30  # a push that is killed finds in the repository what was committed before
THREADS = 4  # blocks that are fetched at once
PULL_PATIENCE = 20  # s that a pull waits for a lost connection, which the same command resumes
PULLING = ".pull"  # suffix of the folder beside a store that is being pulled

_CHUNK_FILE = re.compile(r"columns/([\w-]{1,200})/\d{5,9}\.[0-9a-f]{16}\.bin", re.ASCII)
_CHECKSUM_FILE = re.compile(r"checksums/([\w-]{1,200})\.[0-9a-f]{16}\.sha256", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}")
_NOTHING = "nothing was fetched"

Progress = Callable[[int], Any]  # is called with the number of bytes since the last call


class Chunk(NamedTuple):
    """Consecutive records of a column in one file of a repository; `blocks` are the checksums of its blocks."""

    file: str
    records: int
    sha256: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class StoredColumn:
    """The file of a column, in chunks."""

    column: Column
    block_records: int  # the last block of a chunk may have fewer
    chunks: tuple[Chunk, ...]
    checksums: bytes = field(default=b"", repr=False)  # of its records, while it is pushed

    @property
    def records(self) -> int:
        """Of all chunks."""
        return sum(chunk.records for chunk in self.chunks)


# --- push ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StorePush:
    """What a push would send. Nothing has been changed yet."""

    path: Path
    contents: hub.RepoContents | None  # None: the repository does not exist yet
    columns: dict[str, StoredColumn]
    missing: frozenset[str]  # names of chunks that the repository lacks
    small: dict[str, bytes]  # the other files, with their content

    @property
    def size(self) -> int:
        """Bytes of the chunks to send."""
        sizes = {c.file: c.records * stored.column.row_bytes for stored in self.columns.values() for c in stored.chunks}
        return sum(sizes[file] for file in self.missing)


def plan_push(
    path: str | Path,
    repo: str,
    contents: hub.RepoContents | None,
    *,
    license: str = "",
    source: str = "",
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress = lambda count: None,
) -> StorePush:
    """Read the store at `path` once, and compare it with the `contents` of `repo` (None: it does not exist yet).

    license, source: of the media, for the card; empty: what the card on the Hub states. ValueError for a store that is
    damaged, or does not open.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunks must have at least one byte, not {chunk_bytes}")
    with FeatureStore.open(path) as store:
        stated = store.manifest or {}
        manifest = stated.get("columns")
        columns = {}
        for name, (column, records) in store.contents.files.items():
            columns[name], digest = _hash_column(store.path, name, column, records, chunk_bytes, progress)
            if manifest and manifest[name]["sha256"] != digest:
                file = column_file(store.path, name)
                raise ValueError(f"{file} is not what was exported (checksum differs): copy it again, nothing was sent")
        small = {META: (store.path / "meta.json").read_bytes(), TABLE: table_file(store.path).read_bytes()}
        if manifest:
            small[MANIFEST] = manifest_file(store.path).read_bytes()
            if (stated.get("counts") or {}).get("corrected") and offsets_file(store.path).is_file():
                small[OFFSETS] = offsets_file(store.path).read_bytes()
    checksums = {name: _checksum_file(name, each.checksums) for name, each in columns.items() if each.checksums}
    small |= {file: columns[name].checksums for name, file in checksums.items()}
    small[INDEX] = _index_text(columns, small, checksums).encode()
    existing, remote = None, contents.files if contents else {}
    if contents and CARD_FILE in remote:
        with hub_errors(repo, "dataset"):
            existing = download_card(repo, "dataset", revision=contents.commit)
    origin = stated_origin(existing) | {k: v for k, v in (("license", license), ("source", source)) if v}
    small[CARD_FILE] = merge_cards(existing, store_card(path, repo, **origin)).encode()
    chunks = [chunk for stored in columns.values() for chunk in stored.chunks]
    missing = {c.file for c in chunks if c.file not in remote or remote[c.file].sha256 not in ("", c.sha256)}
    return StorePush(Path(path), contents, columns, frozenset(missing), small)


def _hash_column(
    path: Path, name: str, column: Column, records: int, chunk_bytes: int, progress: Progress
) -> tuple[StoredColumn, str]:
    """A column divided into chunks and blocks, and the checksum of its file."""
    size = column.row_bytes
    block_records = max(1, min(BLOCK_BYTES, chunk_bytes) // size)
    chunk_records = max(1, chunk_bytes // (block_records * size)) * block_records
    file_digest = hashlib.sha256()
    chunks: list[Chunk] = []
    checksums = bytearray()
    with open(column_file(path, name), "rb") as file:
        for first in range(0, records, chunk_records):
            chunk_digest, blocks, count = hashlib.sha256(), [], min(chunk_records, records - first)
            for low in range(0, count, block_records):
                data = file.read(min(block_records, count - low) * size)
                file_digest.update(data)
                chunk_digest.update(data)
                blocks.append(hashlib.sha256(data).hexdigest())
                if name != TEXT_INDEX:  # 4 bytes a record: it is always fetched whole
                    checksums += b"".join(record_checksum(data[i : i + size]) for i in range(0, len(data), size))
                progress(len(data))
            sha256 = chunk_digest.hexdigest()
            chunks.append(Chunk(f"columns/{name}/{len(chunks):05d}.{sha256[:16]}.bin", count, sha256, tuple(blocks)))
    return StoredColumn(column, block_records, tuple(chunks), bytes(checksums)), file_digest.hexdigest()


def _checksum_file(name: str, checksums: bytes) -> str:
    return f"checksums/{name}.{hashlib.sha256(checksums).hexdigest()[:16]}.sha256"


def _index_text(columns: dict[str, StoredColumn], small: dict[str, bytes], checksums: dict[str, str]) -> str:
    listed = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in small.items()}
    entries: dict[str, Any] = {}
    for name, stored in columns.items():
        file = {"file": checksums[name], **listed.pop(checksums[name])} if name in checksums else None
        entries[name] = {"block_records": stored.block_records, "parts": [chunk._asdict() for chunk in stored.chunks]}
        entries[name] |= {"checksums": file} if file else {}
    version = VERSION if OFFSETS in small else 1
    return json.dumps({"format": FORMAT, "version": version, "files": listed, "columns": entries}) + "\n"


def push_store(plan: StorePush, repo: str, *, private: bool = True, progress: Progress = lambda count: None) -> str:
    """Send what is missing and then the new index, and return the commit. After an interruption call it again.

    ConnectionError when the Hub cannot be reached or another commit came first, ValueError when it rejects the push.
    """
    hub.ensure_repository(repo, private, kind="dataset")
    message = f"Chunks of {plan.path.name}"
    operations, size = [], 0
    for chunk, data in _missing_chunks(plan):
        add = CommitOperationAdd(chunk.file, data)
        with hub_errors(repo, "dataset"):
            api().preupload_lfs_files(repo, [add], repo_type="dataset")
        operations.append(add)
        size += len(data)
        progress(len(data))
        if size >= COMMIT_BYTES:
            hub.create_commit(repo, operations, message, "dataset")
            operations, size = [], 0
    if operations:
        hub.create_commit(repo, operations, message, "dataset")
    return _publish(plan, repo)


def _missing_chunks(plan: StorePush) -> Iterator[tuple[Chunk, bytes]]:
    for name, stored in plan.columns.items():
        offset, path = 0, column_file(plan.path, name)
        with open(path, "rb") as file:
            for chunk in stored.chunks:
                size = chunk.records * stored.column.row_bytes
                if chunk.file in plan.missing:
                    file.seek(offset)
                    data = file.read(size)
                    if hashlib.sha256(data).hexdigest() != chunk.sha256:
                        raise ValueError(f"{path} changed while it was sent: start again")
                    yield chunk, data
                offset += size


def _publish(plan: StorePush, repo: str) -> str:
    """The commit from which on the repository holds the new store."""
    contents = hub.read_contents(repo, kind="dataset")
    chunks = {chunk.file for stored in plan.columns.values() for chunk in stored.chunks}
    if absent := chunks - set(contents.files):
        raise ConnectionError(f"Hub dataset {repo} lacks {min(absent)}, which was there: push again")
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content)
        for name, content in plan.small.items()
        if name not in contents.files or not hub.is_same(content, contents.files[name])
    ]
    ours = re.compile(f"{_CHUNK_FILE.pattern}|{_CHECKSUM_FILE.pattern}|{MANIFEST}|{OFFSETS}", re.ASCII)
    stale = set(filter(ours.fullmatch, contents.files))
    operations += [CommitOperationDelete(name) for name in sorted(stale - chunks - set(plan.small))]
    if not operations:
        return contents.commit
    return hub.create_commit(repo, operations, f"Feature store {plan.path.name}", "dataset", contents.commit)


# --- what a repository holds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreIndex:
    """store.json of a repository, well-formed; it can name nothing but chunks and the small files."""

    contents: hub.RepoContents
    small: dict[str, str]  # name -> checksum
    columns: dict[str, tuple[int, tuple[Chunk, ...]]]  # name -> records of a block, chunks
    checksums: dict[str, tuple[str, str]]  # name -> file with those of its records, and its checksum

    @property
    def label(self) -> str:
        """What messages call the repository."""
        return self.contents.label


def read_index(repo: str, revision: str | None = None) -> StoreIndex:
    """Read store.json of a dataset repository. ValueError when there is none, or it is malformed."""
    contents = hub.read_contents(repo, revision, kind="dataset")
    if INDEX not in contents.files:
        raise ValueError(f"{contents.label} holds no feature store: it has no {INDEX}")
    tree = hub.fetch_json(contents, INDEX)
    where = f"{contents.label}, {INDEX}"
    if tree.get("format") != FORMAT or not isinstance(tree.get("version"), int):
        raise ValueError(f"{where}: this is not the index of a feature store")
    if tree["version"] > VERSION:
        raise ValueError(f"{where}: version {tree['version']} is not known here ({VERSION}); update mmaudio_hf")
    try:
        small = {name: entry["sha256"] for name, entry in tree["files"].items()}
        columns = {
            name: (entry["block_records"], tuple(map(_read_chunk, entry["parts"])))
            for name, entry in tree["columns"].items()
        }
        listed = {name: entry["checksums"] for name, entry in tree["columns"].items() if "checksums" in entry}
        checksums = {name: _read_checksum_file(entry) for name, entry in listed.items()}
        named = {META, TABLE} <= set(small) <= {META, TABLE, MANIFEST, OFFSETS}
        sized = all(isinstance(records, int) and records > 0 for records, _ in columns.values())
        if not (named and sized and all(_HASH.fullmatch(digest) for digest in small.values())):
            raise ValueError("its files or blocks are not those of a store")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is malformed ({error}): {_NOTHING}") from error
    return StoreIndex(contents, small, columns, checksums)


def _read_checksum_file(entry: dict[str, Any]) -> tuple[str, str]:
    if not (_CHECKSUM_FILE.fullmatch(entry["file"]) and _HASH.fullmatch(entry["sha256"])):
        raise ValueError(f"{entry['file']!r} is no file of checksums")
    return entry["file"], entry["sha256"]


def _read_chunk(entry: dict[str, Any]) -> Chunk:
    chunk = Chunk(entry["file"], entry["records"], entry["sha256"], tuple(entry["blocks"]))
    if not (isinstance(chunk.file, str) and _CHUNK_FILE.fullmatch(chunk.file)):
        raise ValueError(f"{chunk.file!r} is no name of a chunk")
    if not (isinstance(chunk.records, int) and chunk.records > 0):
        raise ValueError(f"{chunk.file} has {chunk.records!r} records")
    if not all(isinstance(digest, str) and _HASH.fullmatch(digest) for digest in (chunk.sha256, *chunk.blocks)):
        raise ValueError(f"{chunk.file} has no checksums")
    return chunk


def _check_columns(index: StoreIndex, held: Contents) -> dict[str, StoredColumn]:
    """The columns in their chunks, if these are exactly what meta.json (`held`) describes; else ValueError."""
    if set(index.columns) != set(held.files):
        listed, stated = (", ".join(sorted(names)) for names in (index.columns, held.files))
        raise ValueError(f"{index.label}: {INDEX} lists the columns {listed}, {META} {stated}: {_NOTHING}")
    columns = {}
    for name, (column, records) in held.files.items():
        stored = columns[name] = StoredColumn(column, *index.columns[name])
        if not 0 < stored.block_records * column.row_bytes <= MAX_BLOCK_BYTES:
            raise ValueError(f"{index.label}: the blocks of {name} are empty, or too large to be held in memory")
        if stored.records != records:
            raise ValueError(f"{index.label}: the chunks of {name} have {stored.records} records, not {records}")
        for chunk in stored.chunks:
            size, blocks = chunk.records * column.row_bytes, -(-chunk.records // stored.block_records)
            remote = index.contents.files.get(chunk.file)
            if remote is None or not chunk.file.startswith(f"columns/{name}/") or len(chunk.blocks) != blocks:
                raise ValueError(f"{index.label}: {chunk.file} of column {name} is not there, or misplaced")
            if remote.size != size or (remote.sha256 and remote.sha256 != chunk.sha256):
                raise ValueError(
                    f"{index.label}: {chunk.file} has {remote.size} bytes, or other content than {INDEX} says"
                    f" ({size} bytes): it was damaged or changed there, push the store again"
                )
    return columns


# --- pull ----------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """`length` consecutive records: from record `source` of a column to record `target` of a file."""

    source: int
    length: int
    target: int


@dataclass(frozen=True)
class StorePull:
    """What a pull would fetch: rows `rows` of `columns` of the store that `whole` describes."""

    index: StoreIndex
    whole: Contents
    stored: dict[str, StoredColumn]
    columns: tuple[str, ...]  # without the index of shared texts
    rows: range

    @property
    def complete(self) -> bool:
        """Whether this is the whole store as it was pushed."""
        return len(self.rows) == self.whole.rows and set(self.columns) == set(self.whole.columns)

    @property
    def sizes(self) -> dict[str, int]:
        """File -> bytes in the pulled store; an upper bound for the shared texts of some rows."""
        chosen = replace(self.whole, rows=len(self.rows), columns={n: self.whole.columns[n] for n in self.columns})
        if TEXT_FEATURES not in self.columns:
            chosen = replace(chosen, texts=None)
        elif chosen.texts is not None and not self.complete:
            chosen = replace(chosen, texts=min(chosen.texts, chosen.rows))
        return {name: column.row_bytes * records for name, (column, records) in chosen.files.items()}


def plan_pull(
    repo: str,
    target: str | Path,
    *,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
    rows: slice = slice(None),
) -> StorePull:
    """Look up the store in `repo` and fetch its small files into `target`.pull/, all verified.

    columns: None is all of them. ValueError for a target that exists, a column or rows that are not there, and for a
    repository that is damaged.
    """
    target = Path(target)
    check_free(target)
    index = read_index(repo, revision)
    work = _work_folder(target)
    resumes = work.exists()
    try:
        _fetch_small(index, work / "files")
        whole = read_meta(work / "files")
        stored = _check_columns(index, whole)
        chosen = tuple(name for name in whole.columns if columns is None or name in columns)
        if unknown := sorted(set(columns or ()) - set(whole.columns)):
            raise ValueError(f"{index.label} has no column {', '.join(unknown)}; it has {', '.join(whole.columns)}")
        check_contents(target, Contents(whole.rows, {name: whole.columns[name] for name in chosen}))
        if not range(whole.rows)[rows]:
            raise ValueError(f"{index.label} has rows 0 to {whole.rows - 1}: none of them is chosen")
        return StorePull(index, whole, stored, chosen, range(whole.rows)[rows])
    except ValueError:
        if not resumes:
            shutil.rmtree(work, ignore_errors=True)
        raise


def check_free(target: Path) -> None:
    """ValueError when files of the new store exist already, or its name will not do."""
    if "." in target.name:
        raise ValueError(f"store name {target.name!r} has a dot: other readers would look for another .tsv")
    beside = () if _renaming(target).exists() else (new_table_file(target), manifest_file(target), offsets_file(target))
    for path in (target, *beside):
        if path.exists():
            raise ValueError(f"{path} exists: choose another name, {_NOTHING}")


def _work_folder(target: Path) -> Path:
    return target.with_name(target.name + PULLING)


def _renaming(target: Path) -> Path:
    """A marker that exists while a pull renames its files: after a kill, those in place are known as its own."""
    return _work_folder(target) / "placing"


def _fetch_small(index: StoreIndex, folder: Path, more: Mapping[str, str] | None = None) -> None:
    """The small files, and `more` of them: name -> checksum."""
    limits, small = {META: 1 << 20, MANIFEST: 64 << 20, OFFSETS: 64 << 20}, {**index.small, **(more or {})}
    differs = f"is not that of {INDEX}: push the store again"
    for name, digest in small.items():
        remote = index.contents.files.get(name)
        if remote is None or remote.size > limits.get(name, remote.size):
            raise ValueError(f"{index.label}: {name} is not there, or too large to be what it says")
        if remote.sha256 and remote.sha256 != digest:
            raise ValueError(f"{index.label}: {name} {differs}")
    hub.fetch(index.contents, list(small), folder)
    for name, digest in small.items():
        if hash_once(sha256_of, folder / name) != digest:
            raise ValueError(f"{index.label}: {name} {differs}")


def pull_store(plan: StorePull, target: str | Path, *, progress: Progress = lambda count: None) -> FeatureStore:
    """Fetch what is chosen, verify it, and open it as the store `target`. After an interruption call it again.

    A whole store has the bytes that were pushed; some rows or columns have those of `data.tools.subset`. OSError when
    the disk is too small, ConnectionError when the Hub cannot be reached or sends something wrong.
    """
    target = Path(target)
    work = _work_folder(target)
    store, selection = work / "store", {"columns": list(plan.columns), "rows": [plan.rows.start, plan.rows.stop]}
    if not (work / "selection.json").is_file() or json.loads((work / "selection.json").read_text()) != selection:
        shutil.rmtree(store, ignore_errors=True)  # an earlier pull chose something else
        write_text(work / "selection.json", [json.dumps(selection)])
    store.mkdir(exist_ok=True)
    _check_space(plan, store)
    contents = _fetch_columns(plan, store, progress)
    _write_small(plan, contents, work)
    FeatureStore.open(store).close()  # checks that everything fits together
    _renaming(target).touch()
    for beside in (new_table_file, manifest_file, offsets_file):
        if beside(store).exists():
            beside(store).replace(beside(target))
    fsync_path(store)
    store.rename(target)
    fsync_path(target.parent)
    shutil.rmtree(work)
    return FeatureStore.open(target)


def _check_space(plan: StorePull, store: Path) -> None:
    present = sum(file.stat().st_blocks * 512 for file in store.glob("*.memmap"))
    needed, free = sum(plan.sizes.values()) - present, shutil.disk_usage(store).free
    if needed > free:
        raise OSError(
            f"{store.parent} needs {readable(needed)} more, the disk has {readable(free)}: free some space,"
            " or choose columns or rows"
        )


def _fetch_columns(plan: StorePull, store: Path, progress: Progress) -> Contents:
    """Fetch the columns into the folder `store`; returns what it then holds."""
    rows, columns = plan.rows, {name: plan.whole.columns[name] for name in plan.columns}
    row_span = [Span(rows.start, len(rows), 0)]
    shared = plan.whole.texts is not None and TEXT_FEATURES in columns
    for name in columns:
        if not (shared and name == TEXT_FEATURES):
            _fetch_spans(plan, name, row_span, column_file(store, name), progress)
    if not shared:
        return Contents(len(rows), columns)
    index_file, texts = column_file(store, TEXT_INDEX), plan.whole.texts or 0
    spans = [Span(0, texts, 0)]
    if len(rows) == plan.whole.rows:
        _fetch_spans(plan, TEXT_INDEX, row_span, index_file, progress)
    else:
        original = store.parent / "text_index.original"
        _fetch_spans(plan, TEXT_INDEX, row_span, original, progress)
        index = np.fromfile(original, "<i4").astype(np.int64)
        if index.min() < 0 or index.max() >= texts:
            raise ValueError(f"{plan.index.label}: {TEXT_INDEX} names texts that are not there")
        # Each text once, in the order of the first rows that have it, as a writer stores them.
        used, first_rows, inverse = np.unique(index, return_index=True, return_inverse=True)
        order = np.argsort(first_rows)
        spans, texts = list(_spans(used[order])), len(used)
        index_file.write_bytes(np.argsort(order)[inverse].astype("<i4").tobytes())
    _fetch_spans(plan, TEXT_FEATURES, spans, column_file(store, TEXT_FEATURES), progress)
    return Contents(len(rows), columns, texts)


def _spans(records: np.ndarray) -> Iterator[Span]:
    """Records that follow one another in a file, as spans of consecutive ones."""
    firsts = np.flatnonzero(np.diff(records, prepend=records[0] - 2) != 1).tolist()
    for first, stop in zip(firsts, [*firsts[1:], len(records)], strict=True):
        yield Span(int(records[first]), stop - first, first)


class _Block(NamedTuple):
    """Records `first` onwards of a column: bytes `start` to `stop` of a chunk."""

    first: int
    records: int
    file: str
    start: int
    stop: int
    sha256: str


def _blocks(stored: StoredColumn) -> Iterator[_Block]:
    size, first = stored.column.row_bytes, 0
    for chunk in stored.chunks:
        for number, sha256 in enumerate(chunk.blocks):
            low = number * stored.block_records
            high = min(low + stored.block_records, chunk.records)
            yield _Block(first + low, high - low, chunk.file, low * size, high * size, sha256)
        first += chunk.records


def _overlap(block: _Block, spans: Sequence[Span]) -> Iterator[Span]:
    """What of a block goes where: `source` counts records from the start of the block."""
    for span in spans:
        low, high = max(span.source, block.first), min(span.source + span.length, block.first + block.records)
        if low < high:
            yield Span(low - block.first, high - low, span.target + low - span.source)


def _fetch_spans(plan: StorePull, name: str, spans: Sequence[Span], target: Path, progress: Progress) -> None:
    """Write the records of `spans` into `target`, fetching the blocks that hold them unless `target` has them."""
    stored, size = plan.stored[name], plan.stored[name].column.row_bytes
    target.touch()
    with (
        open(target, "r+b", buffering=0) as file,
        RangeReader(plan.index.contents, THREADS) as reader,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        pending = []
        for block in _blocks(stored):
            if not (overlap := list(_overlap(block, spans))):
                continue
            if _is_present(file, block, overlap, size):
                progress(block.stop - block.start)
            else:
                pending.append((block, overlap))
        for first in range(0, len(pending), THREADS):
            group = pending[first : first + THREADS]
            blocks = pool.map(lambda item: _fetch_block(reader, item[0]), group)
            for (block, overlap), data in zip(group, blocks, strict=True):
                for span in overlap:
                    records = memoryview(data)[span.source * size : (span.source + span.length) * size]
                    write_all(file, records, span.target * size)
                progress(block.stop - block.start)
        file.truncate(sum(span.length for span in spans) * size)


def _is_present(file: BinaryIO, block: _Block, overlap: Sequence[Span], size: int) -> bool:
    """Whether a file has a whole block already; a part of a block has no checksum."""
    if overlap[0].length != block.records:
        return False
    file.seek(overlap[0].target * size)
    return hashlib.sha256(file.read(block.records * size)).hexdigest() == block.sha256


def _fetch_block(reader: "RangeReader", block: _Block) -> bytes:
    data = reader.read(block.file, block.start, block.stop)
    if hashlib.sha256(data).hexdigest() != block.sha256:
        raise ConnectionError(
            f"{reader.contents.label}: bytes {block.start} to {block.stop} of {block.file} are not what {INDEX} says;"
            " damaged on the way, the same command fetches them again; damaged on the Hub, push the store again"
        )
    return data


class RangeReader:
    """Bytes of the files of one commit, by requests on connections that stay open. Safe to use from many threads.

    A file is asked for at the Hub once, which answers with its address at the storage; the ranges come from there,
    until the address expires. patience: s for which what may pass is tried again; `log` gets a message when that
    begins, and when it ends.
    """

    def __init__(
        self,
        contents: hub.RepoContents,
        connections: int,
        patience: float = PULL_PATIENCE,
        log: Callable[[str], Any] = lambda message: None,
        endpoint: str = "",
    ):
        self.contents, self.patience, self._log = contents, patience, log
        self._endpoint = endpoint or api().endpoint
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx2.Client(limits=limits, timeout=TIMEOUT)
        self._addresses: dict[str, str] = {}  # by file, at the storage
        self._lost, self._lock = False, threading.Lock()
        self.closed = threading.Event()

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file. ConnectionError when `patience` is over, ValueError at once."""
        end, pause = time.monotonic() + self.patience, 0.25
        while True:
            try:
                with hub_errors(self.contents.repo, self.contents.kind):
                    data = self._read(file, start, stop)
                self._report(False, f"{self.contents.label} answers again")
                return data
            except ConnectionError as error:
                if time.monotonic() >= end or self.closed.is_set():
                    raise ConnectionError(f"{error}: {file} was asked for during {self.patience:.0f} s") from error
                self._report(True, f"{error}: it is tried again for {self.patience:.0f} s")
                self.closed.wait(min(pause, max(0.0, end - time.monotonic())))
                pause = min(2 * pause, 30)

    def _report(self, lost: bool, message: str) -> None:
        with self._lock:
            if lost != self._lost:
                self._lost = lost
                self._log(message)

    def _read(self, file: str, start: int, stop: int) -> bytes:
        known = self._addresses.get(file)
        if known is not None:
            with self._request(known, start, stop, token=False) as response:
                if response.status_code not in (400, 401, 403, 404):  # else the address has expired
                    return self._body(response, file, start, stop)
            self._addresses.pop(file, None)
        where = {"repo_type": self.contents.kind, "revision": self.contents.commit, "endpoint": self._endpoint}
        address = hf_hub_url(self.contents.repo, file, **where)
        host, token = urlsplit(address).netloc, True
        for _ in range(5):
            with self._request(address, start, stop, token) as response:
                self._check_version(response, file)
                if not response.has_redirect_location:
                    return self._body(response, file, start, stop)
                address = urljoin(address, response.headers["Location"])
            token = urlsplit(address).netloc == host  # which never follows to another one
            if not token:
                self._addresses[file] = address
        raise ConnectionError(f"{file} is redirected without an end")

    def _request(self, address: str, start: int, stop: int, token: bool) -> Any:
        headers = build_hf_headers(library_name="mmaudio_hf", token=None if token else False)
        return self._client.stream("GET", address, headers={**headers, "Range": f"bytes={start}-{stop - 1}"})

    def _check_version(self, response: httpx2.Response, file: str) -> None:
        """The commit is part of the address; a server that answers with another file all the same is no Hub."""
        tag, expected = response.headers.get("X-Linked-ETag", "").strip('"'), self.contents.files[file].sha256
        if response.status_code < 400 and tag and expected and tag != expected:
            raise ValueError(f"{file} has changed since commit {self.contents.commit[:12]} was read: start again")

    def _body(self, response: httpx2.Response, file: str, start: int, stop: int) -> bytes:
        if response.status_code >= 400:
            response.read()
            hf_raise_for_status(response)
        size = self.contents.files[file].size
        if response.status_code != 206 and (start, stop) != (0, size):
            raise ValueError(
                f"{response.url.host} sends all of {file} (status {response.status_code}) where {stop - start} bytes"
                " were asked for: a proxy between may be the reason; `mmaudio-hf store pull` fetches a whole store"
            )
        expected = f"bytes {start}-{stop - 1}/{size}"
        if response.status_code == 206 and response.headers.get("Content-Range", expected) != expected:
            raise ValueError(f"{file}: {response.headers['Content-Range']} came, not {expected}: it has changed there")
        data = response.read()
        if len(data) != stop - start:
            raise ConnectionError(f"{len(data)} of {stop - start} bytes of {file} came")
        return data

    def __enter__(self) -> "RangeReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._client.close()


def _write_small(plan: StorePull, contents: Contents, work: Path) -> None:
    """meta.json, table and manifest of what was fetched, so that it opens as the store `work`/store."""
    store, files = work / "store", work / "files"
    offsets_file(store).unlink(missing_ok=True)  # of an earlier pull of other rows
    manifest = read_json(files / MANIFEST) if MANIFEST in plan.index.small else None
    if plan.complete:
        entries = manifest_columns(store, contents)
        if manifest is not None and manifest.get("columns") != entries:
            raise ValueError(f"{plan.index.label}: its manifest describes other columns")
        copies = {META: store / "meta.json", TABLE: new_table_file(store)}
        copies |= {MANIFEST: manifest_file(store), OFFSETS: offsets_file(store)}
        for name in plan.index.small:
            shutil.copyfile(files / name, copies[name])
        return
    ids, captions = read_table(files / TABLE)
    if len(ids) != plan.whole.rows:
        raise ValueError(f"{plan.index.label}: {TABLE} has {len(ids)} rows, not {plan.whole.rows}")
    ids, captions = ids[plan.rows.start : plan.rows.stop], captions[plan.rows.start : plan.rows.stop]
    write_text(store / "meta.json", [meta_text(contents)])
    text = "label" if CLIP_FEATURES in contents.columns else "caption"
    write_text(new_table_file(store), table_lines(ids, captions, text))
    late = read_offsets(files / OFFSETS, ids) if OFFSETS in plan.index.small else {}
    write_offsets(store, late)
    inherited = _inherited_metadata(manifest or {}, plan)
    inherited["counts"] = inherited["counts"] | ({"corrected": len(late)} if late else {})
    moments = Moments.of_file(column_file(store, MEAN), contents.columns[MEAN])
    write_text(manifest_file(store), manifest_text(manifest_of(store, contents, inherited, ids, captions, moments)))


def _inherited_metadata(manifest: dict[str, Any], plan: StorePull) -> dict[str, Any]:
    """What the manifest says of all rows and is true for some of them."""
    metadata = {key: manifest.get(key) for key in ("mode", "duration", "encoders", "preprocessing", "normalisation")}
    chosen, whole = len(plan.rows), plan.whole.rows
    counts = {"chosen": chosen, "of": whole} if chosen != whole else manifest.get("counts", {})
    return metadata | {"encoders": metadata["encoders"] or {}, "counts": counts}


# --- streaming -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubStore:
    """A store that `connect` has looked up: the plan of all its rows, its folder in the cache, and who uses it."""

    label: str
    plan: StorePull
    repeats: float
    path: Path  # of the store in the cache: meta.json lies there, table and manifest beside it
    seat: Seat

    @property
    def small_bytes(self) -> int:
        """What its folder takes besides entries; a page for each file, which a file system allocates whole."""
        files = [p for p in self.path.parent.rglob("*") if p.is_file() and p.parent != self.path and not p.is_symlink()]
        rows, texts = self.plan.whole.rows, self.plan.whole.texts or 0  # and an index of each, 4 bytes a record
        return sum(p.stat().st_size for p in files) + 4 * (rows + texts + rows * (texts > 0)) + 4096 * (len(files) + 20)


@contextmanager
def connect(
    sources: Mapping[str, float],
    cache_dir: str | Path,
    cache_bytes: float,
    *,
    connections: int = 64,
    patience: float = 600,
    processes: int = 1,
    least: int = 1,
    log: Callable[[str], Any] = lambda message: None,
    late: bool = False,
) -> Iterator[None]:
    """Within it `FeatureStore.open("hub://owner/name[@revision]")` opens the `sources` (-> their repeats).

    Their small files and what is fetched of the columns lie in `cache_dir`, never more than `cache_bytes` of it all.
    connections: requests at once. patience: s that a lost connection is waited for. processes: of this machine, which
    train together and share the cache. least: rows of each store that it must hold at least. ValueError for a store
    that is not there, or was pushed without checksums of its records, and for a cache that is too small;
    ConnectionError without the Hub. late: these are raised when a store is opened, which `doctor` does with each.
    """
    disable_progress_bars()  # huggingface_hub's own, for each of a few small files
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(connections, "mmaudio-fetch")
    with ExitStack() as stack:
        with locked(cache_dir / "connect.lock"):  # processes that begin together do not divide the same space twice
            stores, entries, problems = dict[str, HubStore](), dict[str, tuple[int, int]](), dict[str, Exception]()
            for source, repeats in sources.items():
                try:
                    stores[source] = _look_up(source, repeats, cache_dir)
                    stack.callback(stores[source].seat.close)
                except (ValueError, ConnectionError) as error:
                    problems[source] = error
                    if not late:
                        raise
            try:
                entries = _divide(stores, cache_dir, int(cache_bytes), least)
            except ValueError as error:
                problems |= dict.fromkeys(stores, error)
                if not late:
                    raise
        readers = {
            source: stack.enter_context(RangeReader(store.plan.index.contents, connections, patience, log))
            for source, store in stores.items()
        }
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        for reader in readers.values():
            stack.callback(reader.closed.set)  # ends what waits for a lost connection

        def opener(source: str) -> FeatureStore:
            if source in problems:
                raise problems[source]
            if source not in stores:
                raise ValueError(f"{source} is not connected: {', '.join(stores)}")
            return _open_remote(stores[source], readers[source], pool, entries[source], processes)

        before, data_store.hub_opener = data_store.hub_opener, opener
        stack.callback(setattr, data_store, "hub_opener", before)
        yield


def _look_up(source: str, repeats: float, cache_dir: Path) -> HubStore:
    repo, revision = split_hub_id(source.removeprefix(HUB_PREFIX))
    index = read_index(repo, revision)
    if MANIFEST not in index.small:
        raise ValueError(f"{source} has no manifest to know its content: pull it with `mmaudio-hf store pull {repo}`")
    name = repo.partition("/")[2]
    path = cache_dir / f"{repo.replace('/', '+')}@{index.contents.commit[:12]}" / name
    path.mkdir(parents=True, exist_ok=True)
    seat = Seat(path)
    files = path.parent / "files"
    with locked(path.parent / "files.lock"):
        _fetch_small(index, files)
        whole = read_meta(files)
        stored = _check_columns(index, whole)
        if absent := sorted(set(whole.columns) - set(index.checksums)):
            raise ValueError(
                f"{source} was pushed by an earlier version: it lacks checksums of the records of {', '.join(absent)};"
                f" push the store again (only these are sent), or pull it with `mmaudio-hf store pull {repo}`"
            )
        _fetch_small(index, files, dict(index.checksums.values()))
        plan = StorePull(index, whole, stored, tuple(whole.columns), range(whole.rows))
        links = {path / "meta.json": META, new_table_file(path): TABLE, manifest_file(path): MANIFEST}
        for link, target in links.items():
            if not link.is_symlink():
                link.symlink_to(files.resolve() / target)
        if whole.texts is not None:
            _fetch_spans(plan, TEXT_INDEX, [Span(0, whole.rows, 0)], column_file(path, TEXT_INDEX), lambda count: None)
    return HubStore(f"{HUB_PREFIX}{repo}@{index.contents.commit[:12]}", plan, repeats, path, seat)


def _divide(stores: Mapping[str, HubStore], cache_dir: Path, cap: int, least: int) -> dict[str, tuple[int, int]]:
    """Entries for rows and for shared texts of each store; folders of others go where there is no space for them."""
    ours = {store.path.parent for store in stores.values()}
    others = [folder for folder in cache_dir.iterdir() if folder.is_dir() and folder not in ours]
    others.sort(key=lambda folder: folder.stat().st_mtime)
    small = sum(store.small_bytes for store in stores.values())
    shares = [share for store in stores.values() for share in RemoteStore.shares(store.plan.whole, store.repeats)]
    complete = small + sum(share.records * share.size for share in shares)
    sizes = {folder: sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file()) for folder in others}
    for folder in others:
        if sum(sizes.values()) + min(complete, cap) > cap and not _in_use(folder):
            shutil.rmtree(folder)
            del sizes[folder]
    left = cap - small - sum(sizes.values())
    entries = divide(left, shares, least)
    if not any(entries):
        used = f", other runs have {readable(sum(sizes.values()))}" if sizes else ""
        need = small + sum(min(least, share.records) * share.size for share in shares)
        raise ValueError(
            f"data.cache_gb is {cap / 1e9:g}: the lists and checksums of {', '.join(stores)} and the rows of the"
            f" batches that are read at once take {readable(need)}{used}; raise it, or train with smaller batches"
        )
    return {source: (entries[2 * i], entries[2 * i + 1]) for i, source in enumerate(stores)}


def _in_use(folder: Path) -> bool:
    """Whether a process reads a store in this folder of a cache."""
    for lock in folder.glob("*/seat_*.lock"):
        with locked(lock, wait=False) as acquired:
            if not acquired:
                return True
    return False


def _open_remote(
    store: HubStore, reader: RangeReader, pool: ThreadPoolExecutor, entries: tuple[int, int], processes: int
) -> RemoteStore:
    contents, columns = store.plan.whole, store.plan.stored
    names = [*own_columns(contents), TEXT_FEATURES] if contents.texts else list(contents.columns)
    checksums = {}
    for name in names:
        records, file = contents.files[name][1], store.path.parent / "files" / store.plan.index.checksums[name][0]
        checksums[name] = np.fromfile(file, np.uint8).reshape(-1, CHECKSUM_BYTES)
        if len(checksums[name]) != records:
            raise ValueError(
                f"{store.label}: {file.name} has {len(checksums[name])} checksums, not {records}: push it again"
            )
    firsts = {name: np.cumsum([0, *(chunk.records for chunk in columns[name].chunks)]) for name in names}

    def fetch(name: str, first: int, count: int) -> bytes:
        data, size = [], columns[name].column.row_bytes
        while count:
            number = int(np.searchsorted(firsts[name], first, side="right")) - 1
            here = min(count, int(firsts[name][number + 1]) - first)
            start = (first - int(firsts[name][number])) * size
            data.append(reader.read(columns[name].chunks[number].file, start, start + here * size))
            first, count = first + here, count - here
        return b"".join(data)

    ids, captions, manifest = FeatureStore.read_small_files(store.path, contents)
    return RemoteStore(
        *(store.path, contents, ids, captions, manifest, read_text_index(store.path, contents)),
        label=store.label,
        checksums=checksums,
        fetch=fetch,
        pool=pool,
        seat=store.seat,
        entries=entries,
        processes=processes,
    )
