"""The prefetching loader: what it delivers, how it fails and how it ends."""

import os
import queue
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_stores import AUDIO_SHAPES, MODEL, SHAPES, make_store

from mmaudio_hf.data.loader import (
    BatchIndices,
    BatchLoader,
    bucketed_batch_indices,
    pack,
    sample_bytes,
    training_batches,
    validation_batches,
)
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.sampler import dataset_indices, process_sample_indices, sample_noise, sample_noise_for_ids
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.schema import AUDIO_COLUMNS, VIDEO_COLUMNS

SEED = 11


@pytest.fixture
def mixture(tmp_path):
    """13 rows with video (twice), 7 without, 4 with video and without text."""
    silent = {name: shape for name, shape in SHAPES.items() if name != "text_features"}
    stores = (
        make_store(tmp_path / "video", 13, seed=1),
        make_store(tmp_path / "audio", 7, AUDIO_SHAPES, seed=2),
        make_store(tmp_path / "mute", 4, silent, seed=3),
    )
    return Mixture(list(zip(stores, (2, 3, 1), strict=True)), MODEL)


@pytest.fixture(autouse=True)
def no_threads_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def loader(mixture, global_batch=12, world_size=1, rank=0, accumulation=1, **changes) -> BatchLoader:
    settings = {"start_step": 0, "num_steps": 6, "threads": 3} | changes
    samples = process_sample_indices(global_batch, world_size, rank, accumulation)
    return training_batches(mixture, seed=SEED, global_batch=global_batch, sample_indices=samples, **settings)


def wait_until_read(batches: BatchLoader, count: int) -> None:
    while sum(batch.done() for batch in list(batches._ready.queue)) < count:
        time.sleep(0.01)


def check_against_store(batch, mixture, indices: np.ndarray) -> None:
    """Every value of the batch is what the stores hold at the dataset indices, grouped by store."""
    source, rows = mixture.locate(indices)
    order = np.argsort(source, kind="stable")
    source, rows = source[order], rows[order]
    assert batch.source.tolist() == source.tolist()
    video_row = {batch_row: row for row, batch_row in enumerate(batch.video_rows.tolist())}
    assert len(batch.clip_features) == len(batch.sync_features) == len(video_row) == int(batch.has_video.sum())
    for i, (s, row) in enumerate(zip(source.tolist(), rows.tolist(), strict=True)):
        store = mixture.stores[s]
        values = {name: value[0] for name, value in store.read([row]).items()}
        assert batch.ids[i] == store.ids[row]
        assert (bool(batch.has_video[i]), bool(batch.has_text[i])) == (store.has_video, store.has_text)
        assert (i in video_row) == store.has_video
        assert torch.equal(batch.mean[i], values["mean"]) and torch.equal(batch.std[i], values["std"])
        assert torch.equal(batch.text_features[i], values.get("text_features", torch.zeros(7, 8)))
        if store.has_video:
            assert torch.equal(batch.clip_features[video_row[i]], values["clip_features"])
            assert torch.equal(batch.sync_features[video_row[i]], values["sync_features"])


def check_training_batch(batch, mixture, step: int, samples: np.ndarray, global_batch: int) -> None:
    """The batch holds these samples of the step, each with its own noise."""
    assert batch.step == step and batch.valid.all() and sorted(batch.sample_indices) == samples.tolist()
    check_against_store(batch, mixture, dataset_indices(SEED, step, samples, global_batch, len(mixture)))
    own = dataset_indices(SEED, step, np.array(batch.sample_indices), global_batch, len(mixture))
    assert mixture.locate(own)[0].tolist() == batch.source.tolist()
    noise = sample_noise(SEED, "train", step, batch.sample_indices, (5, 4))
    assert all(torch.equal(getattr(batch.noise, name), value) for name, value in vars(noise).items())


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_delivers_the_rows_and_noise_of_its_samples(mixture, world_size, accumulation):
    for rank in range(world_size):
        shares = process_sample_indices(12, world_size, rank, accumulation)
        with loader(mixture, world_size=world_size, rank=rank, accumulation=accumulation, start_step=2) as batches:
            steps = list(range(2, 8))
            for micro_batches in batches:
                step = steps.pop(0)
                assert len(micro_batches) == accumulation
                for batch, samples in zip(micro_batches, shares, strict=True):
                    check_training_batch(batch, mixture, step, samples, 12)
        assert steps == []


def test_a_resumed_run_sees_the_same_batches(mixture):
    with loader(mixture) as batches:
        whole = [(batch.ids, batch.noise.z.tolist()) for (batch,) in batches]
    with loader(mixture, start_step=4, num_steps=2) as batches:
        assert [(batch.ids, batch.noise.z.tolist()) for (batch,) in batches] == whole[4:]


@pytest.mark.parametrize("shapes", [SHAPES, AUDIO_SHAPES])
def test_one_kind_of_rows_is_enough(shapes, tmp_path):
    mixture = Mixture([(make_store(tmp_path / "s", 9, shapes), 1)], MODEL)
    with loader(mixture, global_batch=4) as batches:
        for step, (batch,) in enumerate(batches):
            check_against_store(batch, mixture, dataset_indices(SEED, step, np.arange(4), 4, 9))
            assert batch.clip_features.shape[1:] == (6, 8) and batch.sync_features.shape[1:] == (16, 3)


def test_reads_half_precision_as_it_is_stored(tmp_path):
    mixture = Mixture([(make_store(tmp_path / "s", 9, layout="compact"), 1)], MODEL)
    with loader(mixture, global_batch=4) as batches:
        for step, (batch,) in enumerate(batches):
            assert batch.clip_features.dtype == torch.bfloat16
            check_against_store(batch, mixture, dataset_indices(SEED, step, np.arange(4), 4, 9))


def test_rows_without_video_cost_no_video_bytes(mixture, monkeypatch):
    read, read_into = [], FeatureStore.read_into

    def counting(self, name, rows, out):
        read.append(out.nbytes)
        read_into(self, name, rows, out)

    monkeypatch.setattr(FeatureStore, "read_into", counting)
    with loader(mixture, num_steps=1, global_batch=24) as batches:
        ((batch,),) = list(batches)
    assert len(read) == 5 + 3 + 4  # one call for each column of each store
    sizes = {name: column.row_bytes for name, column in mixture.columns.items()}
    expected = sum(
        sum(sizes[name] for name in (VIDEO_COLUMNS if video else AUDIO_COLUMNS) if text or name != "text_features")
        for video, text in zip(batch.has_video.tolist(), batch.has_text.tolist(), strict=True)
    )
    indices = dataset_indices(SEED, 0, np.arange(24), 24, len(mixture))
    assert sum(read) == expected == sample_bytes(mixture, indices)


def test_a_step_stays_valid_until_the_next_is_taken(mixture):
    with loader(mixture, accumulation=2, prefetch=3) as batches:
        for micro_batches in batches:
            copies = [batch.text_features.clone() for batch in micro_batches]
            time.sleep(0.02)  # the background thread fills what it may
            assert all(torch.equal(b.text_features, c) for b, c in zip(micro_batches, copies, strict=True))


def test_batches_of_another_device_are_copies_there(mixture):
    with loader(mixture, device="meta") as batches:
        for (batch,) in batches:
            tensors = [
                value for value in (*vars(batch).values(), *vars(batch.noise).values()) if torch.is_tensor(value)
            ]
            assert len(tensors) == 17 and all(value.device.type == "meta" for value in tensors)
            with_video = len(batch.video_rows)
            assert 0 < with_video < len(batch.ids) == len(batch.text_features)
            assert len(batch.clip_features) == len(batch.sync_features) == with_video  # no other row costs any bytes


# --- CUDA ----------------------------------------------------------------------------------------------------------


class SlowStream:
    """A CUDA stream: work that is queued on it runs later, in order."""

    def __init__(self, delay: float):
        self.work, self.delay, self.random = queue.Queue(), delay, random.Random(0)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while (function := self.work.get()) is not None:
            time.sleep(self.random.random() * self.delay)
            function()

    def record_event(self):
        done = threading.Event()
        self.work.put(done.set)
        return SimpleNamespace(wait=done.wait, synchronize=done.wait)

    def wait_event(self, event):
        self.work.put(event.wait)


class SlowCuda:
    """The calls of torch.cuda that the loader makes, on two slow streams: `side` copies, `main` computes."""

    def __init__(self, monkeypatch):
        self.main, self.side, self.recorded = SlowStream(0), SlowStream(0.008), []
        self.current, empty = self.main, torch.empty
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        self.pinned = 0  # allocations

        def pinning(*shape, pin_memory=False, **settings):
            self.pinned += pin_memory
            return empty(*shape, **settings)

        monkeypatch.setattr(torch, "empty", pinning)
        monkeypatch.setattr(torch.Tensor, "to", lambda *args, **settings: self.copy(*args, **settings))
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: self.recorded.append((tensor, stream))
        )

    @contextmanager
    def stream(self, stream):
        self.current = stream
        yield
        self.current = self.main

    def copy(self, tensor, device, non_blocking):
        """As cudaMemcpyAsync with pinned memory: it is read when the stream gets there."""
        assert non_blocking and device == torch.device("cuda:0")
        out = torch.zeros_like(tensor)
        self.current.work.put(lambda: out.copy_(tensor))
        return out

    def train(self, batches) -> list[list[torch.Tensor]]:
        """What computation on the main stream sees of every batch."""
        results: list = []
        for step in batches:
            for batch in step:
                tensors = [v for v in (*vars(batch).values(), *vars(batch.noise).values()) if torch.is_tensor(v)]
                self.main.work.put(lambda tensors=tensors: results.append([t.clone() for t in tensors]))
                assert {id(t) for t in tensors} <= {id(t) for t, s in self.recorded if s is self.main}
        return results

    def end(self):
        for stream in (self.side, self.main):
            stream.work.put(None)
            stream.thread.join(60)


def wrong_tensors(mixture, monkeypatch, accumulation: int, broken: str = "") -> int:
    """Tensors that computation on a device sees otherwise than on the CPU, with one wait of the loader left out."""
    settings = {"global_batch": 8, "accumulation": accumulation, "num_steps": 10}
    expected = []
    with loader(mixture, **settings) as batches:
        for step in batches:
            for batch in step:
                values = (*vars(batch).values(), *vars(batch.noise).values())
                expected.append([v.clone() for v in values if torch.is_tensor(v)])
    with monkeypatch.context() as patch:
        cuda = SlowCuda(patch)
        if broken == "buffers are filled again before the copy is done":
            cuda.side.record_event = lambda event=cuda.side.record_event: SimpleNamespace(
                wait=event().wait, synchronize=lambda: None
            )
        if broken == "computation does not wait for the copy":
            cuda.main.wait_event = lambda event: None
        with loader(mixture, **settings, device="cuda:0") as batches:
            results = cuda.train(batches)
        cuda.end()
    assert len(results) == len(expected) == 10 * accumulation
    pairs = [pair for theirs, ours in zip(results, expected, strict=True) for pair in zip(theirs, ours, strict=True)]
    return sum(not torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_copies_on_a_slow_stream_are_right(mixture, monkeypatch, accumulation):
    assert wrong_tensors(mixture, monkeypatch, accumulation) == 0


def test_the_next_batch_is_copied_beside_a_step_from_few_pinned_blocks(mixture, monkeypatch):
    with monkeypatch.context() as patch:
        cuda = SlowCuda(patch)
        with loader(mixture, num_steps=3, device="cuda:0") as batches:
            wait_until_read(batches, 2)
            next(batches)
            assert len(batches._copying) == 1
        cuda.end()
    assert 0 < cuda.pinned < 17, "three batches have 51 tensors"


@pytest.mark.parametrize(
    "broken", ["buffers are filled again before the copy is done", "computation does not wait for the copy"]
)
def test_the_check_of_the_copies_finds_a_wait_that_is_left_out(mixture, monkeypatch, broken):
    assert wrong_tensors(mixture, monkeypatch, 1, broken) > 0


@pytest.mark.parametrize(("batch", "count"), [(64, 4), (32, 3), (256, 3), (7, 2)])
def test_pinned_buffers_waste_little(batch, count):
    """torch rounds each pinned allocation up to a power of two: 503 MB for the tensors of four batches of small_16k."""
    sample = [77 * 1024, 64 * 1024, 192 * 768, *[250 * 20] * 4]
    sizes = [4 * batch * elements for elements in sample]
    blocks, positions = pack({(i, j): size for i in range(count) for j, size in enumerate(sizes)})
    ends = sorted((block, start, start + sizes[key[1]]) for key, (block, start) in positions.items())
    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in pairwise(ends)), "none overlaps another"
    pinned = sum(1 << (size - 1).bit_length() for size in blocks)
    assert len(positions) == 7 * count and count * sum(sizes) <= pinned < 1.25 * count * sum(sizes)


# --- reading ahead -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "prefetch", "accumulation"), [(1, 1, 1), (2, 4, 3), (6, 2, 2), (5, 1, 3)])
def test_every_row_is_right_whatever_is_read_ahead(mixture, monkeypatch, threads, prefetch, accumulation):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(threads))
    shares = process_sample_indices(36, 1, 0, accumulation)
    memory = {}
    settings = {"threads": threads, "prefetch": prefetch, "accumulation": accumulation, "num_steps": 25}
    with loader(mixture, global_batch=36, **settings) as batches:
        for step, micro_batches in enumerate(batches):
            for batch, samples in zip(micro_batches, shares, strict=True):
                check_training_batch(batch, mixture, step, samples, 36)
                for name, value in (*vars(batch).items(), *vars(batch.noise).items()):
                    if torch.is_tensor(value):
                        memory.setdefault(name, set()).add(value.data_ptr())
    ring = accumulation + max(prefetch, accumulation)
    assert len(memory) == 17 and max(map(len, memory.values())) <= ring  # every buffer is used again


@pytest.mark.parametrize("exceeds", [False, True])
def test_rows_are_requested_from_the_disk_before_they_are_needed(mixture, monkeypatch, exceeds):
    """In the first epoch, or always when the stores exceed memory; the kernel is told that their order is random."""
    requested, random, prefetch, sysconf = [], [], FeatureStore.prefetch, os.sysconf

    def noting(self, name, rows):
        requested.append(len(rows) * self.columns[name].row_bytes)
        prefetch(self, name, rows)

    monkeypatch.setattr(FeatureStore, "prefetch", noting)
    monkeypatch.setattr(FeatureStore, "advise_random", lambda self: random.append(self))
    if exceeds:
        monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else sysconf(name))
    with loader(mixture, num_steps=12) as batches:
        for step, (batch,) in enumerate(batches):
            check_training_batch(batch, mixture, step, np.arange(12), 12)
    first_epoch = range(12 if exceeds else 5)  # 5 steps of 12 are an epoch of 51
    indices = [dataset_indices(SEED, step, np.arange(12), 12, len(mixture)) for step in first_epoch]
    assert sum(requested) == sum(sample_bytes(mixture, batch) for batch in indices)
    assert random == (list(mixture.stores) if exceeds else [])


def test_readahead_can_be_turned_off(mixture, monkeypatch):
    monkeypatch.setattr(FeatureStore, "prefetch", None)
    batch_indices = bucketed_batch_indices(mixture, SEED, [12], [[np.arange(12)]], range(2))
    with BatchLoader(mixture, batch_indices, 12, 1, readahead=False) as batches:
        assert len(list(batches)) == 2


def test_readers_take_their_threads_and_leave_those_of_training(mixture, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(5))
    seen, later, own, read_into = set(), [], torch.get_num_threads(), FeatureStore.read_into

    def noting(*arguments):
        seen.add((threading.get_ident(), torch.get_num_threads()))
        read_into(*arguments)

    monkeypatch.setattr(FeatureStore, "read_into", noting)
    # Each fills a batch of those that are read ahead; more threads than cores would wait for each other.
    for threads, prefetch, readers, each in ((2, 2, 2, 1), (4, 1, 1, 4), (8, 2, 2, 2), (3, 9, 3, 1)):
        with loader(mixture, num_steps=40, threads=threads, prefetch=prefetch) as batches:
            thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
            thread.start()
            assert len(list(batches)) == 40
            thread.join()
        assert {count for _, count in seen} == {each} and len(seen) <= readers == len(batches._threads)
        assert torch.get_num_threads() == own == later.pop(), "nor does it change those of threads made later"
        seen.clear()


def test_waiting_time_is_measured(mixture):
    def slow():
        for step in range(3):
            time.sleep(0.05)
            yield [BatchIndices(step, np.arange(2), np.arange(2), np.ones(2, bool), lambda *_: None)]

    with BatchLoader(mixture, slow(), 2, 1) as batches:
        assert len(list(batches)) == 3
        assert 0.1 < batches.wait_seconds < 5
    with loader(mixture, num_steps=3) as batches:
        wait_until_read(batches, 1)
        next(batches)
        assert batches.wait_seconds < 0.05  # it was read ahead


# --- failing and ending ------------------------------------------------------------------------------------------


def test_a_file_that_shrinks_is_named_in_the_training_thread(mixture, tmp_path):
    with loader(mixture, num_steps=50) as batches:
        next(batches)
        wait_until_read(batches, 2)  # then the readers wait for buffers: nothing is read while the file shrinks
        os.truncate(tmp_path / "video" / "sync_features.memmap", 0)
        with pytest.raises(OSError, match=r"sync_features\.memmap has 0 bytes, .* it became shorter"):
            list(batches)
        assert list(batches) == []


def test_an_error_while_reading_is_raised_in_the_training_thread(mixture, monkeypatch):
    def failing(self, name, rows, out):
        raise OSError(5, "Input/output error", f"{self.path}/{name}.memmap")

    monkeypatch.setattr(FeatureStore, "read_into", failing)
    with loader(mixture) as batches, pytest.raises(OSError, match=r"Input/output error: '.*\.memmap'"):
        next(batches)


def test_an_error_while_drawing_noise_is_raised_in_the_training_thread(mixture, monkeypatch):
    def failing(*_):
        raise MemoryError("no noise")

    monkeypatch.setattr("mmaudio_hf.data.loader.fill_noise", failing)
    with loader(mixture) as batches, pytest.raises(MemoryError, match="no noise"):
        next(batches)


def test_closing_early_is_prompt_and_ends_the_iteration(mixture):
    batches = loader(mixture, num_steps=10**9)
    next(batches)
    start = time.perf_counter()
    batches.close()
    batches.close()
    assert time.perf_counter() - start < 5  # the machine may be busy; 10**9 steps take longer
    assert list(batches) == []


def test_closing_from_another_thread_ends_a_consumer_that_waits(mixture):
    begun, go_on = threading.Event(), threading.Event()

    def never():
        begun.set()
        go_on.wait(60)
        yield from ()

    with BatchLoader(mixture, never(), 2, 1) as batches:
        seen = []
        consumer = threading.Thread(target=lambda: seen.extend(batches))
        consumer.start()
        begun.wait(60)
        closer = threading.Thread(target=batches.close)
        closer.start()
        go_on.set()
        closer.join(60)
        consumer.join(60)
        assert not consumer.is_alive() and not closer.is_alive() and seen == []


def test_an_abandoned_loader_does_not_keep_the_process_alive(mixture, tmp_path):
    script = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.loader import training_batches
from mmaudio_hf.data.sampler import process_sample_indices
from mmaudio_hf.data.store import FeatureStore
mixture = Mixture([(FeatureStore.open({str(tmp_path / "video")!r}), 1)])
samples = process_sample_indices(4, 1, 0)
batches = training_batches(mixture, seed=1, global_batch=4, sample_indices=samples, start_step=0, num_steps=10**9)
next(batches)
assert not {{"av", "torchaudio", "transformers", "tensordict", "datasets"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""


# --- validation --------------------------------------------------------------------------------------------------


def test_validation_counts_every_row_once_in_order(mixture):
    seen = []
    for step, batch in enumerate(validation_batches(mixture, seed=SEED, batch_size=8)):
        check_against_store(batch, mixture, np.minimum(np.arange(8 * step, 8 * step + 8), len(mixture) - 1))
        seen += [item_id for item_id, counts in zip(batch.ids, batch.valid.tolist(), strict=True) if counts]
    assert seen == mixture.stores[0].ids * 2 + mixture.stores[1].ids * 3 + mixture.stores[2].ids


@pytest.mark.parametrize(("batch_size", "world_size"), [(8, 1), (3, 1), (4, 2), (2, 4)])
def test_validation_numbers_depend_on_the_id_alone(mixture, batch_size, world_size):
    for rank in range(world_size):
        for batch in validation_batches(mixture, seed=SEED, batch_size=batch_size, rank=rank, world_size=world_size):
            for i, item_id in enumerate(batch.ids):
                alone = sample_noise_for_ids(SEED, [item_id], (5, 4))
                assert torch.equal(batch.noise.x0[i], alone.x0[0]) and batch.noise.z[i] == alone.z[0]


def test_leaving_validation_early_ends_its_threads(mixture):
    batches = validation_batches(mixture, seed=SEED, batch_size=2)
    next(batches)
    batches.close()
