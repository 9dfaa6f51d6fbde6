"""Feature stores as dataset repositories of the Hub, whole or in part, piece by piece.

    store.json                          the files below: parts of every column in their order, sizes and checksums
    meta.json, table.tsv, manifest.json what is in and beside the folder of a store
    columns/COLUMN/00000.CHECKSUM.bin   so many records of a column, one after the other
    README.md                           the card

A part is what is sent at once. It is made of blocks, which are what is fetched at once, each with its own checksum:
so any rows can be had without the rest of their part, and what is there after a kill is known to be right. The name of
a part depends on its content, and store.json is replaced last: who pulls while another pushes has the old store.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from mmaudio_hf.data.layout import (
    TEXT_INDEX,
    Column,
    Contents,
    check_contents,
    column_file,
    fsync_path,
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
from mmaudio_hf.hub import repository as hub
from mmaudio_hf.hub.cards import store_card, told
from mmaudio_hf.hub_client import CARD_FILE, TIMEOUT, api, download_card, hub_errors, merge_cards
from mmaudio_hf.schema import CLIP_FEATURES, MEAN, TEXT_FEATURES

FORMAT, VERSION = "mmaudio_hf feature store", 1
INDEX, META, TABLE, MANIFEST = "store.json", "meta.json", "table.tsv", "manifest.json"
BLOCK_BYTES = 8 << 20
LARGEST_BLOCK = 256 << 20
PART_BYTES = 512 << 20  # one part is held in memory while it is sent
COMMIT_BYTES = 8 << 30  # a commit after so much: a push that is killed afterwards finds it there
THREADS = 4  # blocks fetched beside each other
PULLING = ".pull"  # what is on its way into a store lies beside it, under its name with this ending

_PART = re.compile(r"columns/([\w-]{1,200})/\d{5,9}\.[0-9a-f]{16}\.bin", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[int], Any]  # told of bytes that are done


class Part(NamedTuple):
    """Consecutive records of a column in one file of a repository; `blocks` are the checksums of its blocks."""

    file: str
    records: int
    sha256: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class StoredColumn:
    """The file of a column, in parts."""

    column: Column
    block_records: int  # the last block of a part may have fewer
    parts: tuple[Part, ...]

    @property
    def records(self) -> int:
        """Of all parts."""
        return sum(part.records for part in self.parts)


# --- push ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StorePush:
    """What a push would send. Nothing but reading has been done."""

    path: Path
    contents: hub.Contents | None  # of the repository before; None: there is none
    columns: dict[str, StoredColumn]
    missing: tuple[Part, ...]  # parts that the repository lacks
    small: dict[str, bytes]  # the other files, with their content

    @property
    def size(self) -> int:
        """Bytes of the parts to send."""
        sizes = {p.file: p.records * c.column.row_bytes for c in self.columns.values() for p in c.parts}
        return sum(sizes[part.file] for part in self.missing)


def plan_push(
    path: str | Path,
    repo: str,
    *,
    license: str = "",
    source: str = "",
    part_bytes: int = PART_BYTES,
    progress: Progress = lambda count: None,
) -> StorePush:
    """Read the store at `path` once, and look up what `repo` lacks of it.

    license, source: of the media, for the card; empty: as the card on the Hub has them. ValueError for a store that is
    damaged, or does not open.
    """
    if part_bytes < 1:
        raise ValueError(f"parts must have at least one byte, not {part_bytes}")
    with FeatureStore.open(path) as store:
        manifest = (store.manifest or {}).get("columns")
        columns = {}
        for name, (column, records) in store.contents.files.items():
            columns[name], digest = _hash_column(store.path, name, column, records, part_bytes, progress)
            if manifest and manifest[name]["sha256"] != digest:
                file = column_file(store.path, name)
                raise ValueError(f"{file} is not what was exported (checksum differs): copy it again, nothing was sent")
        small = {META: (store.path / "meta.json").read_bytes(), TABLE: table_file(store.path).read_bytes()}
        if manifest:
            small[MANIFEST] = manifest_file(store.path).read_bytes()
    small[INDEX] = _index_text(columns, small).encode()
    contents = hub.find_contents(repo, kind="dataset")
    there = contents.files if contents else {}
    with hub_errors(repo, "dataset"):
        existing = download_card(repo, "dataset", revision=contents.commit) if CARD_FILE in there else None
    stated = told(existing) | {key: value for key, value in (("license", license), ("source", source)) if value}
    small[CARD_FILE] = merge_cards(existing, store_card(path, repo, **stated)).encode()
    parts = [part for column in columns.values() for part in column.parts]
    missing = tuple(p for p in parts if p.file not in there or there[p.file].sha256 not in ("", p.sha256))
    return StorePush(Path(path), contents, columns, missing, small)


def _hash_column(
    path: Path, name: str, column: Column, records: int, part_bytes: int, progress: Progress
) -> tuple[StoredColumn, str]:
    """A column divided into parts and blocks, and the checksum of its file."""
    size = column.row_bytes
    block_records = max(1, min(BLOCK_BYTES, part_bytes) // size)
    part_records = max(1, part_bytes // (block_records * size)) * block_records
    whole, parts = hashlib.sha256(), []
    with open(column_file(path, name), "rb") as file:
        for first in range(0, records, part_records):
            digest, blocks, count = hashlib.sha256(), [], min(part_records, records - first)
            for low in range(0, count, block_records):
                data = file.read(min(block_records, count - low) * size)
                for each in (whole, digest):
                    each.update(data)
                blocks.append(hashlib.sha256(data).hexdigest())
                progress(len(data))
            sha256 = digest.hexdigest()
            place = f"columns/{name}/{len(parts):05d}.{sha256[:16]}.bin"
            parts.append(Part(place, count, sha256, tuple(blocks)))
    return StoredColumn(column, block_records, tuple(parts)), whole.hexdigest()


def _index_text(columns: dict[str, StoredColumn], small: dict[str, bytes]) -> str:
    files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in small.items()}
    listed = {
        name: {"block_records": stored.block_records, "parts": [part._asdict() for part in stored.parts]}
        for name, stored in columns.items()
    }
    return json.dumps({"format": FORMAT, "version": VERSION, "files": files, "columns": listed}) + "\n"


def push_store(plan: StorePush, repo: str, *, private: bool = True, progress: Progress = lambda count: None) -> str:
    """Send what is missing and then the new index, and return the commit. Interrupted, the same call goes on.

    ConnectionError when the Hub cannot be reached or another commit came first, ValueError when it refuses.
    """
    hub.ensure_repository(repo, private, kind="dataset")
    operations, waiting = [], 0
    missing = {part.file for part in plan.missing}
    for name, stored in plan.columns.items():
        for part, data in _part_data(plan.path, name, stored, missing):
            if hashlib.sha256(data).hexdigest() != part.sha256:
                raise ValueError(f"{column_file(plan.path, name)} changed while it was sent: start again")
            add = CommitOperationAdd(part.file, data)
            with hub_errors(repo, "dataset"):
                api().preupload_lfs_files(repo, [add], repo_type="dataset")
            operations.append(add)
            waiting += len(data)
            progress(len(data))
            if waiting >= COMMIT_BYTES:
                _commit(repo, operations, f"Parts of {plan.path.name}")
                operations, waiting = [], 0
    if operations:
        _commit(repo, operations, f"Parts of {plan.path.name}")
    return _publish(plan, repo)


def _part_data(path: Path, name: str, stored: StoredColumn, wanted: set[str]) -> Iterator[tuple[Part, bytes]]:
    size, offset = stored.column.row_bytes, 0
    with open(column_file(path, name), "rb") as file:
        for part in stored.parts:
            if part.file in wanted:
                file.seek(offset)
                yield part, file.read(part.records * size)
            offset += part.records * size


def _publish(plan: StorePush, repo: str) -> str:
    """The commit after which the repository holds the new store."""
    contents = hub.read_contents(repo, kind="dataset")
    parts = {part.file for stored in plan.columns.values() for part in stored.parts}
    if absent := parts - set(contents.files):
        raise ConnectionError(f"Hub dataset {repo} lacks {min(absent)}, which was there: push again")
    operations = [
        CommitOperationAdd(name, content)
        for name, content in plan.small.items()
        if name not in contents.files or not _is_same(content, contents.files[name])
    ]
    stale = [n for n in contents.files if n not in plan.small and (_PART.fullmatch(n) or n == MANIFEST)]
    operations += [CommitOperationDelete(name) for name in stale if name not in parts]
    if not operations:
        return contents.commit
    return _commit(repo, operations, f"Feature store {plan.path.name}", contents.commit)


def _is_same(content: bytes, remote: hub.RemoteFile) -> bool:
    if remote.sha256:
        return hashlib.sha256(content).hexdigest() == remote.sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.git_sha1


def _commit(repo: str, operations: Sequence, message: str, parent: str | None = None) -> str:
    with hub_errors(repo, "dataset"):
        info = api().create_commit(
            repo, list(operations), repo_type="dataset", commit_message=message, parent_commit=parent
        )
    return info.oid


# --- what a repository holds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreIndex:
    """store.json of a repository, checked against the files that are there; what it names has no other place."""

    contents: hub.Contents
    small: dict[str, str]  # name -> checksum
    columns: dict[str, dict[str, Any]]


def read_index(repo: str, revision: str | None = None) -> StoreIndex:
    """Read store.json of a dataset repository. ValueError when there is none, or it is not what it should be."""
    contents = hub.read_contents(repo, revision, kind="dataset")
    if INDEX not in contents.files:
        raise ValueError(f"Hub dataset {repo} holds no feature store: it has no {INDEX}")
    tree = hub.read_json(contents, INDEX)
    where = f"Hub dataset {repo}, {INDEX}"
    if tree.get("format") != FORMAT or not isinstance(tree.get("version"), int):
        raise ValueError(f"{where}: this is not the index of a feature store")
    if tree["version"] > VERSION:
        raise ValueError(f"{where}: version {tree['version']} is not known here ({VERSION}); update mmaudio_hf")
    try:
        small = {name: facts["sha256"] for name, facts in tree["files"].items()}
        entries = tree["columns"].items()
        columns = {name: {**entry, "parts": [_read_part(p) for p in entry["parts"]]} for name, entry in entries}
        known = {META, TABLE} <= set(small) <= {META, TABLE, MANIFEST}
        whole = all(isinstance(c["block_records"], int) and c["block_records"] > 0 for c in columns.values())
        if not (known and whole and all(_HASH.fullmatch(digest) for digest in small.values())):
            raise ValueError("its files or blocks are not those of a store")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is malformed ({error}): nothing was fetched") from error
    return StoreIndex(contents, small, columns)


def _read_part(entry: dict[str, Any]) -> Part:
    part = Part(entry["file"], entry["records"], entry["sha256"], tuple(entry["blocks"]))
    if not (isinstance(part.file, str) and _PART.fullmatch(part.file)):
        raise ValueError(f"{part.file!r} is no name of a part")
    if not (isinstance(part.records, int) and part.records > 0):
        raise ValueError(f"{part.file} has {part.records!r} records")
    if not all(isinstance(digest, str) and _HASH.fullmatch(digest) for digest in (part.sha256, *part.blocks)):
        raise ValueError(f"{part.file} has no checksums")
    return part


def _check_columns(index: StoreIndex, held: Contents) -> dict[str, StoredColumn]:
    """The columns in their parts, when these are just what meta.json (`held`) asks for; else ValueError."""
    repo, files = index.contents.repo, index.contents.files
    if set(index.columns) != set(held.files):
        raise ValueError(
            f"Hub dataset {repo}: {INDEX} lists the columns {', '.join(sorted(index.columns))},"
            f" {META} {', '.join(sorted(held.files))}: nothing was fetched"
        )
    columns = {}
    for name, (column, records) in held.files.items():
        entry = index.columns[name]
        stored = columns[name] = StoredColumn(column, entry["block_records"], tuple(entry["parts"]))
        if not 0 < stored.block_records * column.row_bytes <= LARGEST_BLOCK:
            raise ValueError(f"Hub dataset {repo}: the blocks of {name} are empty, or too large to be held in memory")
        if stored.records != records:
            raise ValueError(f"Hub dataset {repo}: the parts of {name} have {stored.records} records, not {records}")
        for part in stored.parts:
            size, blocks = part.records * column.row_bytes, -(-part.records // stored.block_records)
            found = files.get(part.file)
            if found is None or not part.file.startswith(f"columns/{name}/") or len(part.blocks) != blocks:
                raise ValueError(f"Hub dataset {repo}: {part.file} of column {name} is not there, or misplaced")
            if found.size != size or (found.sha256 and found.sha256 != part.sha256):
                raise ValueError(
                    f"Hub dataset {repo}: {part.file} has {found.size} bytes, or other content than {INDEX} says"
                    f" ({size} bytes): it was damaged or changed there, push the store again"
                )
    return columns


# --- pull ----------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Records `source` onwards of a column that go to records `target` onwards of a file."""

    source: int
    count: int
    target: int


@dataclass(frozen=True)
class StorePull:
    """What a pull would fetch: rows `rows` of `columns` of the store that `whole` describes."""

    index: StoreIndex
    whole: Contents
    stored: dict[str, StoredColumn]
    columns: tuple[str, ...]  # of a row, so without the index of shared texts
    rows: range

    @property
    def complete(self) -> bool:
        """Whether this is the store as it was pushed."""
        return len(self.rows) == self.whole.rows and set(self.columns) == set(self.whole.columns)

    @property
    def sizes(self) -> dict[str, int]:
        """File -> bytes in the store that is made; of the shared texts of some rows, at most."""
        chosen = replace(self.whole, rows=len(self.rows), columns={n: self.whole.columns[n] for n in self.columns})
        if TEXT_FEATURES not in self.columns:
            chosen = replace(chosen, texts=None)
        elif chosen.texts is not None:
            chosen = replace(chosen, texts=min(chosen.texts, chosen.rows) if not self.complete else chosen.texts)
        return {name: column.row_bytes * records for name, (column, records) in chosen.files.items()}


def plan_pull(
    repo: str,
    target: str | Path,
    *,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
    rows: slice = slice(None),
) -> StorePull:
    """Look up the store in `repo` and fetch its small files into `target`.pull/, all checked.

    columns: None is all of them. ValueError for a target that exists, a column or rows that are not there, and for a
    repository that is damaged.
    """
    target = Path(target)
    check_free(target)
    index = read_index(repo, revision)
    work = _work_folder(target)
    began = work.exists()
    try:
        _fetch_small(index, work / "files")
        return _chosen(index, read_meta(work / "files"), target, columns, rows)
    except ValueError:
        if not began:
            shutil.rmtree(work, ignore_errors=True)
        raise


def _chosen(index: StoreIndex, whole: Contents, target: Path, columns: Sequence[str] | None, rows: slice) -> StorePull:
    repo = index.contents.repo
    stored = _check_columns(index, whole)
    chosen = tuple(whole.columns) if columns is None else tuple(n for n in whole.columns if n in columns)
    if columns is not None and (strangers := sorted(set(columns) - set(whole.columns))):
        raise ValueError(f"Hub dataset {repo} has no column {', '.join(strangers)}; it has {', '.join(whole.columns)}")
    check_contents(target, Contents(whole.rows, {name: whole.columns[name] for name in chosen}))
    wanted = range(whole.rows)[rows]
    if not wanted:
        raise ValueError(f"Hub dataset {repo} has rows 0 to {whole.rows - 1}: none of them is chosen")
    return StorePull(index, whole, stored, chosen, wanted)


def check_free(target: Path) -> None:
    """ValueError when there is something in the place of the store that is to be made."""
    if "." in target.name:
        raise ValueError(f"store name {target.name!r} has a dot: other readers would look for another .tsv")
    beside = () if _placing(target).exists() else (new_table_file(target), manifest_file(target))
    for path in (target, *beside):
        if path.exists():
            raise ValueError(f"{path} exists: choose another name, nothing was fetched")


def _work_folder(target: Path) -> Path:
    return target.with_name(target.name + PULLING)


def _placing(target: Path) -> Path:
    """Is there once a pull gives its files their names: after a kill they are not taken for somebody else's."""
    return _work_folder(target) / "placing"


def _fetch_small(index: StoreIndex, folder: Path) -> None:
    limits = {META: 1 << 20, MANIFEST: 64 << 20}
    for name, digest in index.small.items():
        found = index.contents.files.get(name)
        if found is None or found.size > limits.get(name, found.size):
            raise ValueError(f"Hub dataset {index.contents.repo}: {name} is not there, or too large to be what it says")
        if found.sha256 and found.sha256 != digest:
            raise ValueError(f"Hub dataset {index.contents.repo}: {name} is not that of {INDEX}: push the store again")
    hub.fetch(index.contents, list(index.small), folder)
    for name, digest in index.small.items():
        if hub.sha256_of(folder / name) != digest:
            raise ValueError(f"Hub dataset {index.contents.repo}: {name} is not that of {INDEX}: push the store again")


def pull_store(plan: StorePull, target: str | Path, *, progress: Progress = lambda count: None) -> FeatureStore:
    """Fetch what is chosen, check it, and open it as the store `target`. Interrupted, the same call goes on.

    A whole store has the bytes that were pushed; a part of one those that `data.rewrite.subset` would give. Needs room
    for the store. OSError when there is none, ConnectionError when the Hub cannot be reached or sends something wrong.
    """
    target = Path(target)
    work = _work_folder(target)
    store, selection = work / "store", {"columns": list(plan.columns), "rows": [plan.rows.start, plan.rows.stop]}
    if not (work / "selection.json").is_file() or json.loads((work / "selection.json").read_text()) != selection:
        shutil.rmtree(store, ignore_errors=True)  # of a pull of something else
        write_text(work / "selection.json", [json.dumps(selection)])
    store.mkdir(exist_ok=True)
    _check_room(plan, store)
    contents = _fetch_columns(plan, store, progress)
    _write_rest(plan, contents, work)
    FeatureStore.open(store).close()  # everything fits together
    _placing(target).touch()
    new_table_file(store).replace(new_table_file(target))
    if manifest_file(store).exists():
        manifest_file(store).replace(manifest_file(target))
    fsync_path(store)
    store.rename(target)
    fsync_path(target.parent)
    shutil.rmtree(work)
    return FeatureStore.open(target)


def _check_room(plan: StorePull, store: Path) -> None:
    there = sum(file.stat().st_blocks * 512 for file in store.glob("*.memmap"))
    needed, free = sum(plan.sizes.values()) - there, shutil.disk_usage(store).free
    if needed > free:
        raise OSError(
            f"{store.parent} needs {hub.readable(needed)} more, the disk has {hub.readable(free)}: make room, or choose"
            " columns or rows"
        )


def _fetch_columns(plan: StorePull, store: Path, progress: Progress) -> Contents:
    """Fetch the columns into the folder `store`; returns what it then holds."""
    rows, columns = plan.rows, {name: plan.whole.columns[name] for name in plan.columns}
    shared = plan.whole.texts is not None and TEXT_FEATURES in columns
    for name in columns:
        if not (shared and name == TEXT_FEATURES):
            _fetch_runs(plan, name, [Run(rows.start, len(rows), 0)], column_file(store, name), progress)
    if not shared:
        return Contents(len(rows), columns)
    index_file, texts = column_file(store, TEXT_INDEX), plan.whole.texts
    if len(rows) == plan.whole.rows:
        _fetch_runs(plan, TEXT_INDEX, [Run(0, len(rows), 0)], index_file, progress)
        runs = [Run(0, texts, 0)]
    else:
        original = store.parent / "text_index.original"
        _fetch_runs(plan, TEXT_INDEX, [Run(rows.start, len(rows), 0)], original, progress)
        index = np.fromfile(original, "<i4").astype(np.int64)
        if index.min() < 0 or index.max() >= texts:
            raise ValueError(f"Hub dataset {plan.index.contents.repo}: {TEXT_INDEX} names texts that are not there")
        # Each text once, in the order of the first rows that have them, as a store is written.
        used, first_rows, places = np.unique(index, return_index=True, return_inverse=True)
        order = np.argsort(first_rows)
        runs, texts = list(_runs(used[order])), len(used)
        index_file.write_bytes(np.argsort(order)[places].astype("<i4").tobytes())
    _fetch_runs(plan, TEXT_FEATURES, runs, column_file(store, TEXT_FEATURES), progress)
    return Contents(len(rows), columns, texts)


def _runs(records: np.ndarray) -> Iterator[Run]:
    """Records that go one after the other into a file, as runs."""
    firsts = np.flatnonzero(np.diff(records, prepend=records[0] - 2) != 1).tolist()
    for first, stop in zip(firsts, [*firsts[1:], len(records)], strict=True):
        yield Run(int(records[first]), stop - first, first)


class _Block(NamedTuple):
    """Records `first` onwards of a column: bytes `start` to `stop` of a part."""

    first: int
    records: int
    file: str
    start: int
    stop: int
    sha256: str


def _blocks(stored: StoredColumn) -> Iterator[_Block]:
    size, first = stored.column.row_bytes, 0
    for part in stored.parts:
        for number, sha256 in enumerate(part.blocks):
            low = number * stored.block_records
            high = min(low + stored.block_records, part.records)
            yield _Block(first + low, high - low, part.file, low * size, high * size, sha256)
        first += part.records


def _fetch_runs(plan: StorePull, name: str, runs: Sequence[Run], target: Path, progress: Progress) -> None:
    """Write the records of `runs` into `target`, fetching the blocks that have some and are not there already."""
    stored, size = plan.stored[name], plan.stored[name].column.row_bytes
    wanted = [(block, pieces) for block in _blocks(stored) if (pieces := list(_pieces(block, runs)))]
    with open(target, "ab"):  # made when it is missing
        pass
    with open(target, "r+b", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        pending = []
        for block, pieces in wanted:
            if _is_there(file, block, pieces, size):
                progress(block.stop - block.start)
            else:
                pending.append((block, pieces))
        for first in range(0, len(pending), THREADS):
            group = pending[first : first + THREADS]
            found = pool.map(lambda item: _read_block(plan.index.contents, item[0]), group)
            for (block, pieces), data in zip(group, found, strict=True):
                for offset, count, place in pieces:
                    write_all(file, memoryview(data)[offset * size : (offset + count) * size], place * size)
                progress(block.stop - block.start)
        file.truncate(sum(run.count for run in runs) * size)


def _pieces(block: _Block, runs: Sequence[Run]) -> Iterator[tuple[int, int, int]]:
    """What of a block goes where: (first record in the block, number, first record in the file)."""
    for run in runs:
        low, high = max(run.source, block.first), min(run.source + run.count, block.first + block.records)
        if low < high:
            yield low - block.first, high - low, run.target + low - run.source


def _is_there(file, block: _Block, pieces: Sequence[tuple[int, int, int]], size: int) -> bool:
    """Whether a file has a whole block already; of a block that is cut there is no checksum."""
    (_, count, place), *others = pieces
    if others or count != block.records:
        return False
    file.seek(place * size)
    data = file.read(count * size)
    return len(data) == count * size and hashlib.sha256(data).hexdigest() == block.sha256


def _read_block(contents: hub.Contents, block: _Block) -> bytes:
    url = hf_hub_url(contents.repo, block.file, repo_type=contents.kind, revision=contents.commit)
    headers = {**build_hf_headers(library_name="mmaudio_hf"), "Range": f"bytes={block.start}-{block.stop - 1}"}
    with hub_errors(contents.repo, contents.kind):
        response = http_backoff("GET", url, headers=headers, timeout=TIMEOUT)
        hf_raise_for_status(response)
    data = response.content
    if hashlib.sha256(data).hexdigest() != block.sha256:
        raise ConnectionError(
            f"Hub dataset {contents.repo}: bytes {block.start} to {block.stop} of {block.file} are not what {INDEX}"
            " says; damaged on the way, the same command fetches them again; damaged on the Hub, push the store again"
        )
    return data


def _write_rest(plan: StorePull, contents: Contents, work: Path) -> None:
    """meta.json, table and manifest of what was fetched, so that it opens as the store `work`/store."""
    store, files = work / "store", work / "files"
    manifest = json.loads((files / MANIFEST).read_text()) if MANIFEST in plan.index.small else None
    if plan.complete:
        entries = manifest_columns(store, contents)
        if manifest is not None and manifest.get("columns") != entries:
            raise ValueError(f"Hub dataset {plan.index.contents.repo}: its manifest is of other columns")
        shutil.copyfile(files / META, store / "meta.json")
        shutil.copyfile(files / TABLE, new_table_file(store))
        if manifest is not None:
            shutil.copyfile(files / MANIFEST, manifest_file(store))
        return
    ids, captions = read_table(files / TABLE)
    if len(ids) != plan.whole.rows:
        raise ValueError(f"Hub dataset {plan.index.contents.repo}: {TABLE} has {len(ids)} rows, not {plan.whole.rows}")
    ids, captions = ids[plan.rows.start : plan.rows.stop], captions[plan.rows.start : plan.rows.stop]
    write_text(store / "meta.json", [meta_text(contents)])
    text = "label" if CLIP_FEATURES in contents.columns else "caption"
    write_text(new_table_file(store), table_lines(ids, captions, text))
    facts, moments = _facts(manifest or {}, plan), _moments(store, contents)
    write_text(manifest_file(store), manifest_text(manifest_of(store, contents, facts, ids, captions, moments)))


def _facts(manifest: dict[str, Any], plan: StorePull) -> dict[str, Any]:
    """What holds for some rows of a store as for all of them."""
    facts = {name: manifest.get(name) for name in ("mode", "duration", "encoders", "preprocessing", "normalisation")}
    counts = manifest.get("counts", {})
    if len(plan.rows) != plan.whole.rows:
        counts = {"chosen": len(plan.rows), "of": plan.whole.rows}
    return facts | {"encoders": facts["encoders"] or {}, "counts": counts}


def _moments(store: Path, contents: Contents) -> Moments:
    """Statistics of the latents, summed row by row as by a writer."""
    column = contents.columns[MEAN]
    moments = Moments(column.shape[-1])
    with open(column_file(store, MEAN), "rb") as file:
        while record := file.read(column.row_bytes):
            moments.add(torch.frombuffer(bytearray(record), dtype=column.dtype).reshape(column.shape))
    return moments
