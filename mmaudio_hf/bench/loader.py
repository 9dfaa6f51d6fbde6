"""`mmaudio-hf bench loader`: batches as training reads them, against a DataLoader over memory maps and against memcpy.

GB/s counts the bytes of features that are delivered, once: zeros in place of absent video count as time only.
"""

import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch.utils.data import DataLoader, Dataset

from mmaudio_hf.config import ModelConfig, variant_config
from mmaudio_hf.data.layout import Column, bytes_of, layout_columns
from mmaudio_hf.data.loader import BatchLoader, bucketed_batch_indices, sample_bytes, training_batches
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.remote import CHECKSUM_BYTES, RemoteStore, Seat, divide, record_checksum, rows_needed
from mmaudio_hf.data.sampler import dataset_indices, permutation
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.hub import RemoteFile, RepoContents
from mmaudio_hf.hub.stores import RangeReader
from mmaudio_hf.schema import column_shapes

SEED = 0
THREADS = 2  # that read batches in `bench remote`
WARM, MEASURED = 24, 48  # steps before the clock starts, by when the buffers have touched their pages, and after that
WORKERS = (0, 2, 4)
VIDEO_ROWS, VIDEO_REPEATS, AUDIO_ROWS, GLOBAL_BATCH = 180_000, 5, 380_000, 512  # recipes/small_16k.yaml
AUDIO_SHARE = AUDIO_ROWS / (VIDEO_ROWS * VIDEO_REPEATS + AUDIO_ROWS)
SWEEP_ROWS, SWEEP_STEPS = (1_000, 10_000, 100_000, 1_000_000), WARM + 12
COPIES, DATALOADER_COPIES = 2, 3  # of every byte, until it is on a device: see `mix_bytes`

Figures = dict[str, float | int | str]


def loader(
    stores: Sequence[Path] = (),
    rows: int = 2000,
    batch_size: int = 64,
    audio_share: float = AUDIO_SHARE,
    rounds: int = 3,
    threads: int = 4,
    variant: str = "small_16k",
    sweep: bool = False,
) -> Figures:
    """Figures of reading random rows that are in the page cache; `docs/performance.md` says what each one is.

    stores: feature stores to read; none: `rows` rows of the variant's sizes are made, `audio_share` of them without
    video. With `sweep`, also the time per sample from a thousand to a million rows.
    """
    model = variant_config(variant)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores
        paths = list(stores) or make_stores(Path(folder) / "stores", rows, audio_share, model)
        with closing(Mixture([(FeatureStore.open(path), 1) for path in paths])) as mixture:
            figures = _compare(mixture, batch_size, rounds, threads)
        figures |= mix_bytes(Path(folder))
        if sweep:
            figures |= _sweep(Path(folder), batch_size, audio_share, rounds, threads, model)
    return figures


# --- ours, a DataLoader and memcpy --------------------------------------------------------------------------------


def _compare(mixture: Mixture, batch_size: int, rounds: int, threads: int) -> Figures:
    for store in mixture.stores:
        if store.layout != "reference":
            raise ValueError(f"{store.path} has the {store.layout} layout, which no memory map reads: convert it first")
    steps = WARM + MEASURED
    order = np.concatenate(
        [dataset_indices(SEED, step, np.arange(batch_size), batch_size, len(mixture)) for step in range(steps)]
    )
    size = sample_bytes(mixture, order[WARM * batch_size :]) / MEASURED  # bytes of an average step
    cores = os.cpu_count() or 1
    runs: dict[str, Callable[[], float]] = {}
    for workers in WORKERS:  # first, so that the processes fork off a small one
        runs[f"dataloader_workers_{workers}"] = partial(_timed, _dataloader(mixture, order, batch_size, workers))
    runs["ours"] = partial(_ours, mixture, batch_size, steps, threads, False)
    runs["ours_with_noise"] = partial(_ours, mixture, batch_size, steps, threads, True)
    memory = _Memory(int(size))
    for count in sorted({1, cores}):
        runs[f"memcpy_threads_{count}"] = partial(memory.copy, steps, count)
    seconds = _interleaved(runs, rounds)  # of a step

    figures: Figures = {"rows": len(mixture), "batch_size": batch_size, "bytes_per_step": int(size), "cores": cores}
    figures |= {"threads": threads, "rounds": rounds}
    for name, taken in seconds.items():
        figures |= {f"{name}_gb_s": size / taken / 1e9, f"{name}_samples_s": batch_size / taken}
    for kind, label, limit in (
        ("memcpy", "memcpy", "memcpy_limit"),
        ("dataloader", "best_dataloader", "best_dataloader"),
    ):
        best = min((name for name in seconds if name.startswith(kind)), key=lambda name: seconds[name])
        figures |= {f"{label}_gb_s": size / seconds[best] / 1e9, limit: best}
        figures |= {f"{ours}_of_{kind}": seconds[best] / seconds[ours] for ours in ("ours", "ours_with_noise")}
    return figures


def _interleaved(runs: Mapping[Any, Callable[[], float]], rounds: int) -> dict[Any, float]:
    """Median of what each run returns, after a round to warm up. All run in turn, quick ones three times a round."""
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    slow = [name for name in runs if str(name).startswith("dataloader")]
    schedule = slow + 3 * [name for name in runs if name not in slow]
    for number in range(rounds + 1):
        for name in schedule:
            value = runs[name]()
            if number:
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _timed(batches: Iterable) -> float:
    """Seconds per batch, of those after the first `WARM`; the consumer does nothing with them."""
    iterator = iter(batches)
    next(islice(iterator, WARM, WARM), None)
    began = time.perf_counter()
    count = sum(1 for _ in iterator)
    return (time.perf_counter() - began) / count


def _ours(mixture: Mixture, batch_size: int, steps: int, threads: int, noise: bool) -> float:
    """What `training_batches` is; without noise it draws no random numbers."""
    indices = bucketed_batch_indices(mixture, SEED, [batch_size], [[np.arange(batch_size)]], range(steps))
    if not noise:
        indices = ([replace(batch, fill_noise=lambda *_: None) for batch in step] for step in indices)
    # Without readahead, as after the first epoch: all rows are in the page cache.
    with BatchLoader(mixture, indices, batch_size, 1, threads=threads, readahead=False) as batches:
        return _timed(batches)


class _MemoryMaps(Dataset):
    """One sample of a mixture at a time, as TensorDict maps its row; absent features are zeros, to collate."""

    def __init__(self, mixture: Mixture):
        self.columns = [dict(TensorDict.load_memmap(store.path).items()) for store in mixture.stores]
        self.absent = {name: torch.zeros(c.shape, dtype=c.dtype) for name, c in mixture.columns.items()}
        self.source, self.rows = (array.tolist() for array in mixture.locate(np.arange(len(mixture))))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row, columns = self.rows[index], self.columns[self.source[index]]
        return {name: columns[name][row] if name in columns else zeros for name, zeros in self.absent.items()}


def _dataloader(mixture: Mixture, order: np.ndarray, batch_size: int, workers: int) -> DataLoader:
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    return DataLoader(_MemoryMaps(mixture), batch_size, sampler=(order % len(mixture)).tolist(), **options)


class _Memory:
    """As much memory as one step moves, in a ring of three as the loader's, and a source that no cache holds."""

    def __init__(self, size: int):
        self._source = np.ones(max(8 * size, 256 << 20), dtype=np.uint8)
        self._targets = [np.ones(size, dtype=np.uint8) for _ in range(3)]

    def copy(self, steps: int, threads: int) -> float:
        """Seconds of copying one step's bytes by memcpy, divided among `threads`."""
        size = len(self._targets[0])
        bounds = np.linspace(0, size, threads + 1).astype(int).tolist()
        with ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter()
            for step in range(steps):
                source = self._source[step * size % (len(self._source) - size) :]
                target = self._targets[step % 3]
                slices = [slice(*ends) for ends in pairwise(bounds)]
                list(pool.map(np.copyto, [target[s] for s in slices], [source[s] for s in slices]))
            return (time.perf_counter() - began) / steps


# --- bytes of the published mix, and any number of rows ----------------------------------------------------------


def mix_bytes(folder: Path, variant: str = "small_16k") -> Figures:
    """Bytes that one global batch of the published mix moves, by the loader's own accounting, and its share of theirs.

    A byte is moved by every copy on its way to the device: two here (from the page cache into pinned memory, and to the
    device), three in a DataLoader with worker processes (collated into shared memory, into pinned memory, to the
    device). There every row is float32 and has the size of one with video. Computed for the layouts of stores.
    """
    model = variant_config(variant)
    shapes = column_shapes(model.mode, model.duration)
    theirs = sum(column.row_bytes for column in layout_columns(shapes).values()) * GLOBAL_BATCH
    figures: Figures = {"mix_dataloader_bytes": DATALOADER_COPIES * theirs}
    layouts = {"reference": (), "compact": ("compact",), "compact_bf16_sync": ("compact", "bfloat16")}
    for name, layout in layouts.items():
        stores = []
        for rows, video, repeats in ((VIDEO_ROWS, True, VIDEO_REPEATS), (AUDIO_ROWS, False, 1)):
            columns = layout_columns(column_shapes(model.mode, model.duration, video=video), *layout)
            path = _make_store(folder / f"{name}_{'video' if video else 'audio'}", rows // 100, columns)
            stores.append((FeatureStore.open(path), repeats))
        with closing(Mixture(stores)) as mixture:
            ours = sample_bytes(mixture, np.arange(len(mixture))) / len(mixture) * GLOBAL_BATCH
        figures |= {f"mix_{name}_bytes": COPIES * ours, f"mix_{name}_features_of_dataloader": ours / theirs}
        figures[f"mix_{name}_of_dataloader"] = COPIES * ours / (DATALOADER_COPIES * theirs)
    return figures


def _sweep(folder: Path, batch_size: int, audio_share: float, rounds: int, threads: int, model: ModelConfig) -> Figures:
    """Time per sample over stores of sparse files, from a thousand to a million rows.

    Every size reads as many rows, all of them cached by the round that warms up, so only their number differs.
    """
    runs: dict[int, Callable[[], float]] = {}
    figures: Figures = {}
    size = min(batch_size, min(SWEEP_ROWS) // SWEEP_STEPS)  # no row twice, in none of them
    with ExitStack() as stack:
        for rows in SWEEP_ROWS:
            paths = make_stores(folder / str(rows), rows, audio_share, model, filled=False)
            mixture = stack.enter_context(closing(Mixture([(FeatureStore.open(path), 1) for path in paths])))
            began = time.perf_counter()
            permutation(SEED, 0, rows)  # once per epoch; the loader has it from here
            figures[f"sweep_epoch_order_seconds_{rows}"] = time.perf_counter() - began
            runs[rows] = partial(_ours, mixture, size, SWEEP_STEPS, threads, False)
        seconds = _interleaved(runs, rounds)
    figures |= {f"sweep_us_per_sample_{rows}": taken / size * 1e6 for rows, taken in seconds.items()}
    figures["sweep_slowest_of_fastest"] = max(seconds.values()) / min(seconds.values())
    return figures


# --- a store on the other side of a slow line -----------------------------------------------------------------------


@dataclass
class RemoteBench:
    """`mmaudio-hf bench remote`: training reads `rows` rows of a local server that answers after `latency` seconds.

    The cache has `share` of the store. A step is a pause of `step` seconds. What comes is compared with
    what the loader reads from the disk, byte for byte.
    """

    rows: int = 400
    batch_size: int = 8
    latency: float = 0.05
    share: float = 0.25
    step: float = 0.25
    epochs: int = 4
    connections: int = 64
    variant: str = "small_16k"

    def run(self) -> Figures:
        """Figures; docs/hub.md says what each one is."""
        if self.batch_size > self.rows:
            raise ValueError(f"--batch-size {self.batch_size} is more than --rows {self.rows}")
        kept, needed = int(self.rows * self.share), rows_needed(self.batch_size, THREADS, 1)
        if kept - 1 < needed:
            raise ValueError(f"the cache would have {kept} rows, it needs {needed + 1}: take more --rows or --share")
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            [path] = make_stores(folder, self.rows, 0.0, variant_config(self.variant))
            parent, child = multiprocessing.Pipe()
            server = multiprocessing.get_context("fork").Process(target=_serve, args=(path, self.latency, child))
            server.start()
            stack.callback(server.join)
            stack.callback(server.kill)
            files = {file.name: RemoteFile(file.stat().st_size, "", "") for file in path.glob("*.memmap")}
            contents = RepoContents("bench/store", "0" * 40, files, "dataset")
            reader = RangeReader(contents, self.connections, endpoint=f"http://127.0.0.1:{parent.recv()}")
            stack.enter_context(reader)
            pool = stack.enter_context(ThreadPoolExecutor(self.connections))
            with FeatureStore.open(path) as local:
                expected = self._train(local)[0]
                remote = self._open(local, folder / "cache", reader, pool)
            peak, done = [0], threading.Event()
            watching = threading.Thread(target=_watch, args=(folder / "cache", peak, done))
            watching.start()
            stack.callback(watching.join)
            stack.callback(done.set)
            began = time.process_time()
            digest, waits, first_fetched = self._train(remote)
            busy = time.process_time() - began
            remote.close()
            figures = self._figures(remote, waits, first_fetched, busy, peak[0])
            return figures | {"same_batches": int(digest == expected)}

    def _open(self, local: FeatureStore, cache: Path, reader: RangeReader, pool: ThreadPoolExecutor) -> RemoteStore:
        cache.mkdir()

        def fetch(name: str, first: int, count: int) -> bytes:
            size = local.columns[name].row_bytes
            return reader.read(f"{name}.memmap", first * size, (first + count) * size)

        digests = {
            name: b"".join(record_checksum(bytes_of(row)) for _, block in local.blocks(name) for row in block)
            for name in local.columns
        }
        checksums = {n: np.frombuffer(d, np.uint8).reshape(-1, CHECKSUM_BYTES) for n, d in digests.items()}
        shares = RemoteStore.shares(local.contents)
        rows, _ = divide(int(local.contents.size * self.share) - 4 * self.rows - (1 << 16), shares)
        opened = (cache, local.contents, local.ids, local.captions, None, None)
        settings: dict[str, Any] = {"fetch": fetch, "pool": pool, "seat": Seat(cache), "entries": (rows, 0)}
        return RemoteStore(*opened, label="bench", checksums=checksums, **settings)

    def _train(self, store: FeatureStore) -> tuple[str, list[float], int]:
        """Digest of all batches, share of each epoch that the consumer waited, bytes fetched in the first one."""
        digest, waits, fetched = hashlib.sha256(), [], 0
        settings: dict[str, Any] = {"seed": SEED, "global_batch": self.batch_size, "start_step": 0, "threads": THREADS}
        indices, steps_per_epoch = [np.arange(self.batch_size)], self.rows // self.batch_size
        steps = steps_per_epoch * self.epochs
        with training_batches(Mixture([(store, 1)]), sample_indices=indices, num_steps=steps, **settings) as batches:
            next_batch = next(batches)  # as the first step of a run, which waits for the line and compiles meanwhile
            batches.wait_seconds, began = 0.0, time.perf_counter()
            for number in range(1, steps + 1):
                for name in store.columns:
                    digest.update(bytes_of(getattr(next_batch[0], name)))
                time.sleep(self.step if isinstance(store, RemoteStore) else 0)
                next_batch = next(batches) if number < steps else next_batch
                if number % steps_per_epoch == 0:
                    now = time.perf_counter()
                    waits.append(batches.wait_seconds / (now - began))
                    batches.wait_seconds, began = 0.0, now
                    fetched = fetched or getattr(store, "fetched_bytes", 0)
        return digest.hexdigest(), waits, fetched

    def _figures(self, store: RemoteStore, waits: list[float], first: int, busy: float, peak: int) -> Figures:
        size = store.contents.size
        later = store.used_bytes * (self.epochs - 1) / self.epochs
        return {
            "rows": self.rows,
            "row_bytes": size // self.rows,
            "latency_ms": self.latency * 1e3,
            "connections": self.connections,
            "data_wait_first_epoch": waits[0],
            "data_wait_later_epochs": statistics.mean(waits[1:]) if waits[1:] else waits[0],
            "samples_s": self.batch_size / self.step,
            "needed_mb_s": size / self.rows * self.batch_size / self.step / 1e6,
            "bytes_fetched": store.fetched_bytes,
            "bytes_used": store.used_bytes,
            "fetched_of_used": store.fetched_bytes / store.used_bytes,
            "hits_later_epochs": 1 - (store.fetched_bytes - first) / later if later else 0.0,
            "kept_share": store.kept_share,
            "processor_ms_per_request": busy / (store.fetched_bytes / size * self.rows * len(store.columns)) * 1e3,
            "cap_bytes": int(size * self.share),
            "peak_bytes": peak,
        }


def _serve(folder: Path, latency: float, connection: Any) -> None:
    """Ranges of the files of a folder, each after a pause; nothing of the bench's process is used."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            file = folder / self.path.rpartition("/")[2]
            time.sleep(latency)
            with open(file, "rb") as handle:
                data = os.pread(handle.fileno(), last + 1 - first, first)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{file.stat().st_size}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    connection.send(server.server_address[1])
    server.serve_forever()


def _watch(folder: Path, peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.02):
        peak[0] = max(peak[0], sum(path.stat().st_blocks * 512 for path in folder.iterdir()))


def make_stores(folder: Path, rows: int, audio_share: float, model: ModelConfig, filled: bool = True) -> list[Path]:
    """Stores of random features with and without video, `rows` rows together."""
    audio = round(rows * audio_share)
    paths = []
    for name, count, video in (("video", rows - audio, True), ("audio", audio, False)):
        if count:
            columns = layout_columns(column_shapes(model.mode, model.duration, video=video))
            paths.append(_make_store(folder / name, count, columns, filled))
    return paths


def _make_store(path: Path, rows: int, columns: dict[str, Column], filled: bool = False) -> Path:
    """A store in the layout of TensorDict without a manifest; unless `filled`, its files are sparse."""
    path.mkdir(parents=True)
    block = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32).tobytes() if filled else b""
    meta: dict = {"shape": [], "device": "cpu", "_type": "<class 'tensordict._td.TensorDict'>"}
    for name, column in columns.items():
        meta[name] = {"device": "cpu", "shape": [rows, *column.shape], "dtype": str(column.dtype)}
        size = rows * column.row_bytes
        with open(path / f"{name}.memmap", "wb") as file:
            for first in range(0, size if filled else 0, max(1, len(block))):
                file.write(block[: size - first])
            file.truncate(size)
    (path / "meta.json").write_text(json.dumps(meta))
    path.with_name(f"{path.name}.tsv").write_text("id\tcaption\n" + "".join(f"row_{row}\t\n" for row in range(rows)))
    return path
