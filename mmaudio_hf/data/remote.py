"""Feature stores that stay on the Hub: rows come into a cache on the disk before the loader reads them (docs/hub.md).

The cache of a store is a smaller store: files of the same columns, with entries for as many rows as the cap allows, and
`NAME.entries`, which says what each one holds. All of it is allocated at once, so the disk never has more. Processes
of one machine share it through mapped memory: changes are made under a lock, and what is read is pinned. An entry is
ready when all its columns are written and have the checksums of the pushed store. What a killed process pinned or was
fetching is known by its lock, which the system releases.
"""

import errno
import hashlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mmaudio_hf.data.layout import Column, Contents, column_file, write_all
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.store import FeatureStore, MappedColumn
from mmaudio_hf.files import add_path_to_oserror, locked, readable
from mmaudio_hf.schema import TEXT_FEATURES

SEATS = 32  # processes that can share the cache of a store
CHECKSUM_BYTES = 16  # of a row: the first half of its SHA-256
NEVER = 1 << 62  # the next use of a row that is not known to be used again
AHEAD = 16  # batches that are requested before they are read, where the cache holds as many
RUN_BYTES = 4 << 20  # of rows that follow each other and come with one request
ENTRY_BYTES = 4 + 1 + 1 + 8 + SEATS  # of NAME.entries for each entry
_FREE, _LOADING, _READY, _UNVERIFIED = range(4)
_VERSION = 1
_POLL = 0.005  # s
_PATIENCE = 600  # s for other processes to unpin rows, which takes them a step

FetchRecords = Callable[[str, int, int], bytes]
"""(column, first record, their number) -> their bytes. ConnectionError after its own retries, ValueError at once"""


def record_checksum(data: bytes | memoryview) -> bytes:
    """What a store on the Hub lists for each of its records."""
    return hashlib.sha256(data).digest()[:CHECKSUM_BYTES]


class Share(NamedTuple):
    """Records that are kept together: `size` bytes each, visited `repeats` times an epoch."""

    records: int
    size: int
    repeats: float = 1.0


def divide(cap: int, shares: Sequence[Share], least: int = 1) -> list[int]:
    """Entries of each share so that all take at most `cap` bytes: `least` each, and more by bytes visited in an epoch.

    None gets more than it has records; all zero where `cap` does not hold the least.
    """
    entries = [min(least, share.records) for share in shares]
    free = cap - sum(n * share.size for n, share in zip(entries, shares, strict=True))
    if free < 0:
        return [0] * len(shares)
    left = {i for i, share in enumerate(shares) if entries[i] < share.records}
    while left:
        total = sum(shares[i].records * shares[i].size * shares[i].repeats for i in left)
        more = {i: int(free * shares[i].records * shares[i].repeats / total) for i in left}
        full = {i for i in left if entries[i] + more[i] >= shares[i].records}
        for i in full or left:
            added = min(more[i], shares[i].records - entries[i])
            entries[i], free = entries[i] + added, free - added * shares[i].size
        left = left - full if full else set()
    return entries


def rows_needed(batch_size: int, in_use: int, processes: int) -> int:
    """Rows of a store that a cache must hold: for two loaders of each process, `in_use` batches and two more each."""
    return 2 * processes * batch_size * (in_use + 2)


# --- when a row is used again ----------------------------------------------------------------------------------------


class NextUse:
    """The step in which rows are used again after a step; NEVER where the order of about two epochs does not say.

    order: step -> dataset indices of its global batch, all processes. steps: about as many as an epoch has.
    """

    def __init__(self, mixture: Mixture, order: Callable[[int], np.ndarray], steps: int):
        self._mixture, self._order, self._steps, self._first = mixture, order, steps, -1
        self._base = np.cumsum([0, *(len(store) for store in mixture.stores)])
        self._keys = np.empty(0, dtype=np.int64)  # record * span + step from the first one, in rising order

    def __call__(self, step: int, store: int, rows: np.ndarray) -> np.ndarray:
        """Of rows of a store that `step` uses."""
        first, span = step - step % self._steps, 2 * self._steps
        if first != self._first:
            orders = [self._order(first + i) for i in range(span)]
            source, located = self._mixture.locate(np.concatenate(orders))
            steps = np.repeat(np.arange(span), [len(order) for order in orders])
            self._first, self._keys = first, np.sort((self._base[source] + located) * span + steps)
        records = self._base[store] + rows
        index = np.searchsorted(self._keys, records * span + step - first, side="right")
        key = self._keys[np.minimum(index, len(self._keys) - 1)]
        again = (index < len(self._keys)) & (key // span == records)
        return np.where(again, first + key % span, NEVER)


# --- entries ---------------------------------------------------------------------------------------------------------


class Seat:
    """This process among those that share a folder: a lock file that is held until the process ends or `close`."""

    def __init__(self, folder: Path):
        self.folder, self.pinning = folder, threading.Lock()
        self.reset: set[str] = set()  # tables in which nothing of the process that had this seat before is left
        for self.number in range(SEATS):
            if self._take(self.number):
                return
        raise ValueError(f"{folder}: {SEATS} processes use this cache already: set another data.cache_dir")

    def _file(self, number: int) -> Path:
        return self.folder / f"seat_{number:02d}.lock"

    def _take(self, number: int) -> bool:
        context = locked(self._file(number), wait=False)
        if not context.__enter__():
            context.__exit__(None, None, None)
            return False
        self._context = context
        return True

    def ended(self) -> list[int]:
        """Seats that no process has; nobody takes one of them while the lock of the entries is held."""
        free = []
        for number in range(SEATS):
            if number != self.number and self._file(number).exists():
                with locked(self._file(number), wait=False) as acquired:
                    free += [number] * acquired
        return free

    def others(self) -> bool:
        """Whether another process has a seat."""
        taken = {number for number in range(SEATS) if self._file(number).exists()}
        return bool(taken - {self.number, *self.ended()})

    def close(self) -> None:
        """Leave."""
        self._context.__exit__(None, None, None)


class Entries:
    """The entries of records that are kept together, in the files of `columns`; opened, and allocated where it is new.

    ValueError when another process uses the same files with another number of entries, OSError for a full disk.
    """

    def __init__(self, folder: Path, name: str, columns: Mapping[str, Column], records: int, entries: int, seat: Seat):
        self.folder, self.columns, self.records, self.entries, self._seat = folder, columns, records, entries, seat
        self._lock, self._pinning = folder / f"{name}.lock", seat.pinning
        with locked(self._lock):
            self._open(folder / f"{name}.entries")
            if name not in seat.reset:
                self._free_seats([seat.number])
                seat.reset.add(name)
            self._free_seats(seat.ended())

    def clean(self) -> None:
        """Free what processes that have ended pinned or were fetching."""
        with locked(self._lock):
            self._free_seats(self._seat.ended())

    def _free_seats(self, seats: Sequence[int]) -> None:  # the lock is held
        self.pins[list(seats)] = 0
        self.state[(self.state == _LOADING) & np.isin(self.owner, list(seats))] = _FREE

    def _open(self, file: Path) -> None:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        expected = [_VERSION, self.records, self.entries]
        size = 64 + 4 * self.records + ENTRY_BYTES * self.entries
        header = np.fromfile(file, np.int64, 8) if file.is_file() and file.stat().st_size == size else np.zeros(8, int)
        if header[:3].tolist() != expected:
            if file.is_file() and self._seat.others():
                raise ValueError(
                    f"{self.folder} is used by a process with other settings: give this one the same data.cache_gb and"
                    " stores, or another data.cache_dir"
                )
            self._allocate(file, size)
        self._header, self.entry_of, self.record, self.next_use, self.state, self.owner, self.pins = (
            np.memmap(file, dtype, "r+", offset, shape) for dtype, offset, shape in self._arrays()
        )
        if header[:3].tolist() != expected:
            self.entry_of[:] = self.record[:] = -1
            self._header[:3] = expected
        number = int(boot[:15], 16)
        if self._header[3] != number:  # after a power cut pages may be missing: what was ready is verified again
            self.state[self.state == _READY] = _UNVERIFIED
            self._header[3] = number

    def _arrays(self) -> list[tuple[Any, int, Any]]:
        n = self.entries
        kinds: list[Any] = [(np.int64, 8), (np.int32, self.records), (np.int32, n), (np.int64, n), (np.uint8, n)]
        kinds += [(np.uint8, n), (np.uint8, (SEATS, n))]
        offsets = np.cumsum([0, *(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in kinds)]).tolist()
        return [(dtype, offset, shape) for (dtype, shape), offset in zip(kinds, offsets, strict=False)]

    def _allocate(self, file: Path, size: int) -> None:
        """The files in their full size: a full disk shows now, and the cap holds from here on."""
        sizes = {column_file(self.folder, name): self.entries * c.row_bytes for name, c in self.columns.items()}
        present = sum(path.stat().st_blocks * 512 for path in (*sizes, file) if path.is_file())
        needed, free = sum(sizes.values()) + size, shutil.disk_usage(self.folder).free + present
        if needed > free:
            message = f"the cache needs {readable(needed)}, the disk has {readable(free)}: lower data.cache_gb"
            raise OSError(errno.ENOSPC, message, str(self.folder))
        try:
            for path, length in {**sizes, file: size}.items():
                path.unlink(missing_ok=True)
                with add_path_to_oserror(path), open(path, "wb") as handle:
                    os.posix_fallocate(handle.fileno(), 0, length)
        except OSError:
            for path in (*sizes, file):
                path.unlink(missing_ok=True)
            raise

    def acquire(self, records: np.ndarray, next_use: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Pin the entries of distinct records; returns the entries and what each held: one of the states.

        What is _FREE among these is to be fetched into its entry by the caller, whose it is until `finish`. The entries
        for it are those whose next use is furthest. None when too many are pinned.
        """
        with locked(self._lock):
            entries = self.entry_of[records].astype(np.int64)
            state: np.ndarray = np.where((entries >= 0) & (self.record[entries] == records), self.state[entries], _FREE)
            missing = np.flatnonzero(state == _FREE)
            with self._pinning:
                pinned = np.array(self.pins.any(axis=0))
                pinned[entries[state != _FREE]] = True
                usable = np.flatnonzero(~pinned & (self.state != _LOADING))
                if len(usable) < len(missing):
                    self._free_seats(self._seat.ended())
                    return None
                if len(missing):
                    value = np.where(self.state[usable] == _FREE, NEVER * 2 - 1, self.next_use[usable])
                    victims = usable[np.argpartition(-value, len(missing) - 1)[: len(missing)]]
                    # A kill between two of these leaves a free entry, or one that is fetched by a process that ended.
                    self.state[victims] = _FREE
                    self.record[victims], self.owner[victims] = records[missing], self._seat.number
                    self.pins[self._seat.number, victims] = 0
                    self.state[victims] = _LOADING
                    self.entry_of[records[missing]] = victims
                    entries[missing] = victims
                again = np.flatnonzero(state == _UNVERIFIED)
                self.owner[entries[again]], self.state[entries[again]] = self._seat.number, _LOADING
                self.pins[self._seat.number, entries] += 1
                self.next_use[entries] = next_use
        return entries, state

    def finish(self, entries: np.ndarray, ready: bool) -> None:
        """Entries that this process was fetching are ready, or free again."""
        self.state[entries] = _READY if ready else _FREE

    def release(self, entries: np.ndarray) -> None:
        """Unpin."""
        with self._pinning:
            self.pins[self._seat.number, entries] -= 1

    def close(self) -> None:
        """Nothing of the files is used from here on."""
        self._header = self.entry_of = self.record = self.next_use = self.state = self.owner = self.pins = None  # type: ignore[assignment]


# --- the store -----------------------------------------------------------------------------------------------------


class _Fetch:
    """Columns of some entries that are on their way; when the last one is there, the entries are ready."""

    def __init__(self, entries: Entries, chosen: np.ndarray):
        self._entries, self._chosen, self._lock = entries, chosen, threading.Lock()
        self._left, self._failed = len(entries.columns), False

    def run(self, task: Callable[[], None]) -> None:
        """Do one column."""
        failed = True
        try:
            task()
            failed = False
        finally:
            with self._lock:
                self._left, self._failed = self._left - 1, self._failed or failed
                if not self._left:
                    self._entries.finish(self._chosen, not self._failed)


@dataclass
class Lease:
    """Rows that stay in the cache until `release`; they can be read after `wait`."""

    store: "RemoteStore"
    pinned: list[tuple[Entries, np.ndarray, np.ndarray]]  # entries of some records
    futures: list[Future]
    others: list[tuple[Entries, np.ndarray, np.ndarray]]  # entries and records that another process is fetching

    def wait(self) -> None:
        """Until all rows are there. Errors of the fetch are raised here."""
        for future in self.futures:
            future.result()
        for entries, chosen, records in self.others:
            self._wait_for_others(entries, chosen, records)
        self.futures, self.others = [], []

    def _wait_for_others(self, entries: Entries, chosen: np.ndarray, records: np.ndarray) -> None:
        looked = time.monotonic()
        while (entries.state[chosen] == _LOADING).any():
            time.sleep(_POLL)
            if time.monotonic() > looked + 1:  # whether their process has ended
                looked = time.monotonic()
                entries.clean()
        failed = (entries.state[chosen] != _READY) | (entries.record[chosen] != records)
        if failed.any():
            again = self.store.hold_records(entries, records[failed])
            self.pinned += again.pinned
            again.wait()

    def release(self) -> None:
        """The rows may be replaced."""
        for entries, chosen, _ in self.pinned:
            entries.release(chosen)
        self.pinned = []


class RemoteStore(FeatureStore):
    """A store on the Hub: opened by `hub.stores.connect`, read by the loader through `hold`.

    label: what messages call it. checksums: column file -> (records, CHECKSUM_BYTES) uint8. entries: how many rows, and
    shared texts, the cache holds. processes: of this machine, which share them. `read` goes past the cache.
    """

    def __init__(
        self,
        *opened: Any,
        label: str,
        checksums: Mapping[str, np.ndarray],
        fetch: FetchRecords,
        pool: ThreadPoolExecutor,
        seat: Seat,
        entries: tuple[int, int],
        processes: int = 1,
    ):
        super().__init__(*opened)
        self._label, self.entries, self.processes = label, entries, processes
        self.fetched_bytes = self.used_bytes = 0
        self._checksums, self._fetch, self._pool, self._seat = checksums, fetch, pool, seat
        self._opening = threading.Lock()
        self._tables: dict[str, Entries] = {}
        self._ticks = NEVER

    def _map_columns(self) -> "dict[str, MappedColumn]":
        return {}  # the cache is opened with the first rows that are held

    @property
    def label(self) -> str:
        """hub://owner/name@commit."""
        return self._label

    @staticmethod
    def shares(contents: Contents, repeats: float = 1.0) -> tuple[Share, Share]:
        """Rows and shared texts of a store, for `divide`."""
        own = own_columns(contents)
        rows = Share(contents.rows, sum(c.row_bytes for c in own.values()) + ENTRY_BYTES, repeats)
        size = contents.columns[TEXT_FEATURES].row_bytes + ENTRY_BYTES if contents.texts else ENTRY_BYTES
        return rows, Share(contents.texts or 0, size, repeats)

    def tables(self) -> dict[str, Entries]:
        """The cache, opened; "texts" where rows share texts."""
        with self._opening:
            if not self._tables:
                contents = self.contents
                layout = {"rows": (own_columns(contents), contents.rows, self.entries[0])}
                if contents.texts:
                    texts = {TEXT_FEATURES: contents.columns[TEXT_FEATURES]}
                    layout["texts"] = texts, contents.texts, self.entries[1]
                tables = {name: Entries(self.path, name, *each, self._seat) for name, each in layout.items()}
                for entries in tables.values():
                    for name, column in entries.columns.items():
                        self._maps[name] = MappedColumn(column_file(self.path, name), column, entries.entries)
                self._files = {n: open(column_file(self.path, n), "r+b", buffering=0) for n in self._maps}  # noqa: SIM115
                self._tables = tables
        return self._tables

    def leases(self, rows: int) -> int:
        """How many times `rows` rows this process can hold at once; the rest is left to others, and to what is kept."""
        entries = min(n for n, share in zip(self.entries, self.shares(self.contents), strict=True) if share.records)
        everything = self.entries[0] >= len(self) and (self.entries[1] or 0) >= (self.contents.texts or 0)
        return AHEAD * 4 if everything else entries // self.processes // 2 // rows

    @property
    def kept_share(self) -> float:
        """Share of its bytes that the cache holds: of so many samples the row is there, once the cache is full.

        That is what the furthest next use reaches, and the most there is: between two uses of a row lies the end of an
        epoch, where the cache has no more rows. The least recently used one would reach half the square of it.
        """
        shares = self.shares(self.contents)
        kept = sum(n * share.size for n, share in zip(self.entries, shares, strict=True))
        return kept / sum(share.records * share.size for share in shares)

    # --- fetch ------------------------------------------------------------------------------------------------------

    def hold(self, rows: np.ndarray, next_use: np.ndarray | None = None) -> Lease:
        """Request rows and keep them in the cache; `next_use`, where it is known, decides how long they stay there."""
        self.used_bytes += len(rows) * sum(column.row_bytes for column in self.columns.values())
        if next_use is None:  # the last one that came goes first: a cache that is read in circles keeps a part of it
            self._ticks += 1
            next_use = np.full(len(rows), self._ticks)
        tables = self.tables()
        lease = self.hold_records(tables["rows"], rows, next_use)
        if "texts" in tables:
            texts = self.hold_records(tables["texts"], self._file_rows(TEXT_FEATURES, rows, texts=True), next_use)
            lease.pinned, lease.futures = lease.pinned + texts.pinned, lease.futures + texts.futures
            lease.others += texts.others
        return lease

    def hold_records(self, entries: Entries, records: np.ndarray, next_use: np.ndarray | None = None) -> Lease:
        """Of one table. A text that rows share counts from the nearest next use of these rows."""
        next_use = np.full(len(records), NEVER) if next_use is None else next_use
        distinct, inverse = np.unique(records, return_inverse=True)
        nearest = np.full(len(distinct), NEVER * 2 - 2)
        np.minimum.at(nearest, inverse, next_use)
        end = time.monotonic() + _PATIENCE
        while (acquired := entries.acquire(distinct, nearest)) is None:
            if time.monotonic() > end:
                raise OSError(f"{self.label}: other processes hold all rows of its cache: raise data.cache_gb")
            time.sleep(_POLL)
        chosen, state = acquired
        lease = Lease(self, [(entries, chosen, distinct)], [], [])
        for run in _runs(distinct, state == _FREE, max(c.row_bytes for c in entries.columns.values())):
            self._start(lease, entries, distinct[run], chosen[run], self._load)
        for run in np.flatnonzero(state == _UNVERIFIED)[:, None]:
            self._start(lease, entries, distinct[run], chosen[run], self._verify)
        if (other := state == _LOADING).any():
            lease.others.append((entries, chosen[other], distinct[other]))
        present = chosen[state == _READY]
        for name in entries.columns if len(present) else ():
            self._maps[name].advise(present, os.POSIX_FADV_WILLNEED)
        return lease

    def _start(self, lease: Lease, entries: Entries, records: np.ndarray, chosen: np.ndarray, do: Callable) -> None:
        fetch = _Fetch(entries, chosen)
        for name in entries.columns:
            lease.futures.append(self._pool.submit(fetch.run, partial(do, name, records, chosen)))

    def _load(self, name: str, records: np.ndarray, chosen: np.ndarray) -> None:
        size = self.columns[name].row_bytes
        data = memoryview(self._verified(name, int(records[0]), len(records)))
        for i, entry in enumerate(chosen.tolist()):
            write_all(self._files[name], data[i * size : (i + 1) * size], entry * size)

    def _verify(self, name: str, records: np.ndarray, chosen: np.ndarray) -> None:
        """Of an entry that was ready before the machine was started: fetched again unless it has its checksum."""
        size = self.columns[name].row_bytes
        data = os.pread(self._files[name].fileno(), size, int(chosen[0]) * size)
        if record_checksum(data) != self._checksums[name][records[0]].tobytes():
            self._load(name, records, chosen)

    def _verified(self, name: str, first: int, count: int) -> bytes:
        """Records of a column file as they were pushed."""
        size = self.columns[name].row_bytes
        for _ in range(2):
            data = self._fetch(name, first, count)
            self.fetched_bytes += len(data)
            pieces = (memoryview(data)[i * size : (i + 1) * size] for i in range(count))
            expected = self._checksums[name][first : first + count]
            bad = [i for i, piece in enumerate(pieces) if record_checksum(piece) != expected[i].tobytes()]
            if not bad:
                return data
        raise ConnectionError(
            f"{self.label}: record {first + bad[0]} of {name} came twice with another checksum than was pushed: damaged"
            " on the way, the same command resumes; damaged on the Hub, push the store again"
        )

    # --- read -------------------------------------------------------------------------------------------------------

    def _file_rows(self, name: str, rows: np.ndarray, texts: bool = False) -> np.ndarray:
        records = super()._file_rows(name, rows)
        if texts:
            return records
        tables = self.tables()
        table = tables["texts" if name == TEXT_FEATURES and "texts" in tables else "rows"]
        return table.entry_of[records].astype(np.int64)

    def prefetch(self, name: str, rows: np.ndarray) -> None:
        """Nothing: what is held has been requested."""

    def read(self, indices: Any, columns: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Like that of any store; fetched past the cache, all rows at once."""
        rows = self._checked_rows(indices, columns)
        values, futures = {}, []
        for name in self.columns if columns is None else columns:
            column = self.columns[name]
            values[name] = torch.empty((len(rows), *column.shape), dtype=column.dtype)
            for i, record in enumerate(super()._file_rows(name, rows).tolist() if len(rows) else ()):
                futures.append((values[name][i], self._pool.submit(self._verified, name, record, 1)))
        for out, future in futures:
            out.copy_(torch.frombuffer(bytearray(future.result()), dtype=out.dtype).view(out.shape))
        return values

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Like those of any store; past the cache, some requests ahead."""
        column, records = self.contents.files[name]
        step, coming = max(1, RUN_BYTES // column.row_bytes), deque[tuple[int, Future]]()
        for first in range(0, records, step):
            coming.append((first, self._pool.submit(self._verified, name, first, min(step, records - first))))
            while len(coming) > AHEAD or (coming and first + step >= records):
                start, future = coming.popleft()
                data = torch.frombuffer(bytearray(future.result()), dtype=column.dtype)
                yield start, data.view(-1, *column.shape)

    def to_dataset(self) -> Any:
        """Rejected: a data set of the Hub is read by `datasets` itself, and these are no Arrow files."""
        raise ValueError(f"{self.label} is not on this machine: pull it first, with `mmaudio-hf store pull`")

    def close(self) -> None:
        """Close the files of the cache, which stays for the next run."""
        super().close()
        for file in getattr(self, "_files", {}).values():
            file.close()
        for entries in self._tables.values():
            entries.close()
        self._tables = {}


def own_columns(contents: Contents) -> dict[str, Column]:
    """Columns of which every row has a record of its own."""
    return {name: c for name, c in contents.columns.items() if name != TEXT_FEATURES or not contents.texts}


def _runs(records: np.ndarray, missing: np.ndarray, size: int) -> list[np.ndarray]:
    """Indices of missing records, in groups that follow each other in their files and come with one request."""
    indices = np.flatnonzero(missing)
    longest = max(1, RUN_BYTES // size)
    groups = np.split(indices, np.flatnonzero(np.diff(records[indices]) != 1) + 1)
    return [group[i : i + longest] for group in groups for i in range(0, len(group), longest)]


def batches_ahead(mixture: Mixture, batch_sizes: Sequence[int], in_use: int) -> int:
    """Batches to request before they are read; 0 where all stores are on this machine.

    batch_sizes: of each bucket. in_use: batches that are held besides. ValueError for a cache that is too small.
    """
    remote = [(i, store) for i, store in enumerate(mixture.stores) if isinstance(store, RemoteStore)]
    ahead = AHEAD if remote else 0
    for index, store in remote:
        batch_size = batch_sizes[mixture.bucket_of[index]]
        most = store.leases(batch_size)
        if most < in_use + 2:
            need = rows_needed(batch_size, in_use, store.processes)
            raise ValueError(
                f"data.cache_gb holds {store.entries[0]} rows of {store.label}, {need} are needed for batches of"
                f" {batch_size} in {store.processes} processes: raise it, or train with smaller batches"
            )
        ahead = min(ahead, most - in_use - 1)
    return ahead
