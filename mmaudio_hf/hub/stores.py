"""Feature stores as dataset repositories of the Hub, whole or in part.

    store.json                          the files below: chunks of every column in their order, sizes and checksums
    meta.json, table.tsv, manifest.json what is in and beside the folder of a store
    columns/COLUMN/00000.CHECKSUM.bin   a chunk: consecutive records of a column ("parts" in store.json)
    README.md                           the card

A chunk is what one request uploads. It consists of blocks, each with its own checksum, which are what one request
downloads: so any rows can be fetched without the rest of their chunk, and what an interrupted pull has is verified.
The name of a chunk depends on its content and store.json is replaced last: a pull during a push has the old store.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from mmaudio_hf import hub
from mmaudio_hf.config import read_json
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
    read_meta,
    read_table,
    table_file,
    table_lines,
    write_all,
    write_text,
)
from mmaudio_hf.data.store import FeatureStore, Moments, manifest_of
from mmaudio_hf.files import fsync_path, hash_once, sha256_of
from mmaudio_hf.hub.cards import stated_origin, store_card
from mmaudio_hf.hub_client import CARD_FILE, TIMEOUT, api, download_card, hub_errors, merge_cards
from mmaudio_hf.schema import CLIP_FEATURES, MEAN, TEXT_FEATURES

FORMAT, VERSION = "mmaudio_hf feature store", 1
INDEX, META, TABLE, MANIFEST = "store.json", "meta.json", "table.tsv", "manifest.json"
BLOCK_BYTES = 8 << 20
MAX_BLOCK_BYTES = 256 << 20
CHUNK_BYTES = 512 << 20  # a chunk is held in memory while it is sent
COMMIT_BYTES = 8 << 30  # a push that is killed finds in the repository what was committed before
THREADS = 4  # blocks that are fetched at once
PULLING = ".pull"  # suffix of the folder beside a store that is being pulled

_CHUNK_FILE = re.compile(r"columns/([\w-]{1,200})/\d{5,9}\.[0-9a-f]{16}\.bin", re.ASCII)
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
        manifest = (store.manifest or {}).get("columns")
        columns = {}
        for name, (column, records) in store.contents.files.items():
            columns[name], digest = _hash_column(store.path, name, column, records, chunk_bytes, progress)
            if manifest and manifest[name]["sha256"] != digest:
                file = column_file(store.path, name)
                raise ValueError(f"{file} is not what was exported (checksum differs): copy it again, nothing was sent")
        small = {META: (store.path / "meta.json").read_bytes(), TABLE: table_file(store.path).read_bytes()}
        if manifest:
            small[MANIFEST] = manifest_file(store.path).read_bytes()
    small[INDEX] = _index_text(columns, small).encode()
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
    with open(column_file(path, name), "rb") as file:
        for first in range(0, records, chunk_records):
            chunk_digest, blocks, count = hashlib.sha256(), [], min(chunk_records, records - first)
            for low in range(0, count, block_records):
                data = file.read(min(block_records, count - low) * size)
                file_digest.update(data)
                chunk_digest.update(data)
                blocks.append(hashlib.sha256(data).hexdigest())
                progress(len(data))
            sha256 = chunk_digest.hexdigest()
            chunks.append(Chunk(f"columns/{name}/{len(chunks):05d}.{sha256[:16]}.bin", count, sha256, tuple(blocks)))
    return StoredColumn(column, block_records, tuple(chunks)), file_digest.hexdigest()


def _index_text(columns: dict[str, StoredColumn], small: dict[str, bytes]) -> str:
    files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in small.items()}
    entries = {
        name: {"block_records": stored.block_records, "parts": [chunk._asdict() for chunk in stored.chunks]}
        for name, stored in columns.items()
    }
    return json.dumps({"format": FORMAT, "version": VERSION, "files": files, "columns": entries}) + "\n"


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
    stale = {name for name in contents.files if _CHUNK_FILE.fullmatch(name) or name == MANIFEST}
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
        named = {META, TABLE} <= set(small) <= {META, TABLE, MANIFEST}
        sized = all(isinstance(records, int) and records > 0 for records, _ in columns.values())
        if not (named and sized and all(_HASH.fullmatch(digest) for digest in small.values())):
            raise ValueError("its files or blocks are not those of a store")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is malformed ({error}): {_NOTHING}") from error
    return StoreIndex(contents, small, columns)


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
        raise ValueError(
            f"{index.label}: {INDEX} lists the columns {', '.join(sorted(index.columns))},"
            f" {META} {', '.join(sorted(held.files))}: {_NOTHING}"
        )
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
    beside = () if _renaming(target).exists() else (new_table_file(target), manifest_file(target))
    for path in (target, *beside):
        if path.exists():
            raise ValueError(f"{path} exists: choose another name, {_NOTHING}")


def _work_folder(target: Path) -> Path:
    return target.with_name(target.name + PULLING)


def _renaming(target: Path) -> Path:
    """A marker that exists while a pull renames its files: after a kill, those in place are known as its own."""
    return _work_folder(target) / "placing"


def _fetch_small(index: StoreIndex, folder: Path) -> None:
    limits = {META: 1 << 20, MANIFEST: 64 << 20}
    differs = f"is not that of {INDEX}: push the store again"
    for name, digest in index.small.items():
        remote = index.contents.files.get(name)
        if remote is None or remote.size > limits.get(name, remote.size):
            raise ValueError(f"{index.label}: {name} is not there, or too large to be what it says")
        if remote.sha256 and remote.sha256 != digest:
            raise ValueError(f"{index.label}: {name} {differs}")
    hub.fetch(index.contents, list(index.small), folder)
    for name, digest in index.small.items():
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
    new_table_file(store).replace(new_table_file(target))
    if manifest_file(store).exists():
        manifest_file(store).replace(manifest_file(target))
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
            f"{store.parent} needs {hub.readable(needed)} more, the disk has {hub.readable(free)}: free some space,"
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
    with open(target, "r+b", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
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
            blocks = pool.map(lambda item: _fetch_block(plan.index.contents, item[0]), group)
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


def _fetch_block(contents: hub.RepoContents, block: _Block) -> bytes:
    url = hf_hub_url(contents.repo, block.file, repo_type=contents.kind, revision=contents.commit)
    headers = {**build_hf_headers(library_name="mmaudio_hf"), "Range": f"bytes={block.start}-{block.stop - 1}"}
    with hub_errors(contents.repo, contents.kind):
        response = http_backoff("GET", url, headers=headers, timeout=TIMEOUT)
        hf_raise_for_status(response)
    data = response.content
    if hashlib.sha256(data).hexdigest() != block.sha256:
        raise ConnectionError(
            f"{contents.label}: bytes {block.start} to {block.stop} of {block.file} are not what {INDEX} says; damaged"
            " on the way, the same command fetches them again; damaged on the Hub, push the store again"
        )
    return data


def _write_small(plan: StorePull, contents: Contents, work: Path) -> None:
    """meta.json, table and manifest of what was fetched, so that it opens as the store `work`/store."""
    store, files = work / "store", work / "files"
    manifest = read_json(files / MANIFEST) if MANIFEST in plan.index.small else None
    if plan.complete:
        entries = manifest_columns(store, contents)
        if manifest is not None and manifest.get("columns") != entries:
            raise ValueError(f"{plan.index.label}: its manifest describes other columns")
        shutil.copyfile(files / META, store / "meta.json")
        shutil.copyfile(files / TABLE, new_table_file(store))
        if manifest is not None:
            shutil.copyfile(files / MANIFEST, manifest_file(store))
        return
    ids, captions = read_table(files / TABLE)
    if len(ids) != plan.whole.rows:
        raise ValueError(f"{plan.index.label}: {TABLE} has {len(ids)} rows, not {plan.whole.rows}")
    ids, captions = ids[plan.rows.start : plan.rows.stop], captions[plan.rows.start : plan.rows.stop]
    write_text(store / "meta.json", [meta_text(contents)])
    text = "label" if CLIP_FEATURES in contents.columns else "caption"
    write_text(new_table_file(store), table_lines(ids, captions, text))
    inherited = _inherited_metadata(manifest or {}, plan)
    moments = Moments.of_file(column_file(store, MEAN), contents.columns[MEAN])
    write_text(manifest_file(store), manifest_text(manifest_of(store, contents, inherited, ids, captions, moments)))


def _inherited_metadata(manifest: dict[str, Any], plan: StorePull) -> dict[str, Any]:
    """What the manifest says of all rows and is true for some of them."""
    metadata = {key: manifest.get(key) for key in ("mode", "duration", "encoders", "preprocessing", "normalisation")}
    counts = manifest.get("counts", {})
    if len(plan.rows) != plan.whole.rows:
        counts = {"chosen": len(plan.rows), "of": plan.whole.rows}
    return metadata | {"encoders": metadata["encoders"] or {}, "counts": counts}
