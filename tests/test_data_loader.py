"""The prefetching loader: what it delivers, how it fails and how it ends."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from data_stores import AUDIO_SHAPES, MODEL, SHAPES, make_store

from mmaudio_hf.data import reads
from mmaudio_hf.data.loader import BatchIndices, BatchLoader, sample_bytes, training_batches, validation_batches
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.noise import sample_noise, sample_noise_for_ids
from mmaudio_hf.data.reads import read_records
from mmaudio_hf.data.sampler import dataset_indices, process_sample_indices
from mmaudio_hf.schema import AUDIO_COLUMNS, VIDEO_COLUMNS

SEED = 11


@pytest.fixture
def mixture(tmp_path):
    """13 rows with video (twice), 7 without, 4 of video without text."""
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
    slots = process_sample_indices(global_batch, world_size, rank, accumulation)
    return training_batches(mixture, seed=SEED, global_batch=global_batch, sample_indices=slots, **settings)


def check_against_store(batch, mixture, wanted: np.ndarray) -> None:
    """Every value of the batch is what the stores hold at epoch positions `wanted`."""
    source, rows = mixture.locate(wanted)
    assert batch.source.tolist() == source.tolist()
    videos = {sample: place for place, sample in enumerate(batch.video_rows.tolist())}
    assert len(batch.clip_features) == len(batch.sync_features) == len(videos) == int(batch.has_video.sum())
    for i, (s, row) in enumerate(zip(source.tolist(), rows.tolist(), strict=True)):
        store = mixture.stores[s]
        record = {name: value[0] for name, value in store.read([row]).items()}
        assert batch.ids[i] == store.ids[row]
        assert (bool(batch.has_video[i]), bool(batch.has_text[i])) == (store.has_video, store.has_text)
        assert (i in videos) == store.has_video
        assert torch.equal(batch.mean[i], record["mean"]) and torch.equal(batch.std[i], record["std"])
        assert torch.equal(batch.text_features[i], record.get("text_features", torch.zeros(7, 8)))
        if store.has_video:
            assert torch.equal(batch.clip_features[videos[i]], record["clip_features"])
            assert torch.equal(batch.sync_features[videos[i]], record["sync_features"])


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_delivers_the_records_and_numbers_of_its_slots(mixture, world_size, accumulation):
    for rank in range(world_size):
        shares = process_sample_indices(12, world_size, rank, accumulation)
        with loader(mixture, world_size=world_size, rank=rank, accumulation=accumulation, start_step=2) as batches:
            steps = 0
            for step, (micro_batches) in enumerate(batches, start=2):
                assert len(micro_batches) == accumulation
                for batch, share in zip(micro_batches, shares, strict=True):
                    assert batch.step == step and batch.valid.all()
                    check_against_store(batch, mixture, dataset_indices(SEED, step, share, 12, len(mixture)))
                    assert torch.equal(batch.noise.x0, sample_noise(SEED, "train", step, share, (5, 4)).x0)
                steps += 1
        assert steps == 6


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
    read = {"bytes": 0}

    def counting(file, records, size, target, places):
        read["bytes"] += len(records) * size
        read_records(file, records, size, target, places)

    monkeypatch.setattr("mmaudio_hf.data.store.read_records", counting)
    with loader(mixture, num_steps=1, global_batch=24, threads=1) as batches:
        ((batch,),) = list(batches)
        assert batches.bytes_read == read["bytes"]
    sizes = {name: column.row_bytes for name, column in mixture.columns.items()}
    wanted = sum(
        sum(sizes[name] for name in (VIDEO_COLUMNS if video else AUDIO_COLUMNS) if text or name != "text_features")
        for video, text in zip(batch.has_video.tolist(), batch.has_text.tolist(), strict=True)
    )
    assert read["bytes"] == wanted == sample_bytes(mixture, dataset_indices(SEED, 0, np.arange(24), 24, len(mixture)))


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


@pytest.mark.parametrize(("threads", "prefetch", "accumulation"), [(1, 1, 1), (2, 4, 3), (6, 2, 2), (5, 1, 3)])
def test_every_record_is_right_whatever_is_read_at_once(mixture, monkeypatch, threads, prefetch, accumulation):
    monkeypatch.setattr("mmaudio_hf.data.loader._TASK_BYTES", 600)  # a few records: many tasks, in any order
    monkeypatch.setattr("mmaudio_hf.data.loader._TASK_DRAWS", 3)
    shares = process_sample_indices(36, 1, 0, accumulation)
    memory = {}
    settings = {"threads": threads, "prefetch": prefetch, "accumulation": accumulation, "num_steps": 25}
    with loader(mixture, global_batch=36, **settings) as batches:
        for step, micro_batches in enumerate(batches):
            for batch, share in zip(micro_batches, shares, strict=True):
                check_against_store(batch, mixture, dataset_indices(SEED, step, share, 36, len(mixture)))
                wanted = sample_noise(SEED, "train", step, share, (5, 4))
                assert all(torch.equal(getattr(batch.noise, name), value) for name, value in vars(wanted).items())
                for name, value in (*vars(batch).items(), *vars(batch.noise).items()):
                    if torch.is_tensor(value):
                        memory.setdefault(name, set()).add(value.data_ptr())
    ring = accumulation + max(prefetch, accumulation)
    assert len(memory) == 17 and max(map(len, memory.values())) <= ring  # nothing is allocated anew


def test_stores_that_exceed_memory_are_announced_to_the_system(mixture, monkeypatch):
    advised, advise, sysconf = [], os.posix_fadvise, os.sysconf

    def noting(file, offset, length, advice):
        advised.append((length, advice))
        advise(file, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", noting)
    with loader(mixture) as batches:
        list(batches)
    assert advised == []  # what is cached need not be asked for
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else sysconf(name))
    with loader(mixture) as batches:
        for step, (batch,) in enumerate(batches):
            check_against_store(batch, mixture, dataset_indices(SEED, step, np.arange(12), 12, len(mixture)))
        soon = sum(length for length, advice in advised if advice == os.POSIX_FADV_WILLNEED)
        assert soon == batches.bytes_read
    files = sum(len(store.columns) for store in mixture.stores)
    assert [advice for _, advice in advised].count(os.POSIX_FADV_RANDOM) == files


def test_waiting_is_counted(mixture):
    def slow():
        for step in range(3):
            time.sleep(0.05)
            yield [BatchIndices(step, np.arange(2), np.ones(2, bool), lambda out, part, ids: None)]

    with BatchLoader(mixture, slow(), 2, 1) as batches:
        assert len(list(batches)) == 3
        assert 0.1 < batches.wait_seconds < 5
    with loader(mixture, num_steps=3) as batches:
        while batches._ready.empty():
            time.sleep(0.01)
        next(batches)
        assert batches.wait_seconds < 0.05  # it was read ahead


# --- failing and ending ------------------------------------------------------------------------------------------


def test_a_file_that_shrinks_is_named_in_the_training_thread(mixture, tmp_path):
    with loader(mixture, num_steps=50) as batches:
        next(batches)
        os.truncate(tmp_path / "video" / "sync_features.memmap", 0)
        with pytest.raises(OSError, match=r"sync_features\.memmap ends before byte"):
            list(batches)
        assert list(batches) == []


def test_a_failing_disk_is_named_in_the_training_thread(mixture, monkeypatch):
    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reads, "_submit", lambda *_: False)  # what it says of a read that fails
    monkeypatch.setattr(os, "preadv", failing)
    with loader(mixture) as batches, pytest.raises(OSError, match=r"Input/output error: '.*\.memmap'"):
        next(batches)


def test_a_read_that_delivers_less_is_continued(mixture, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(reads, "_submit", lambda *_: False)
    monkeypatch.setattr(
        os, "preadv", lambda fd, parts, offset: preadv(fd, [parts[0][: max(1, len(parts[0]) // 3)]], offset)
    )
    with loader(mixture, num_steps=1) as batches:
        (batch,) = next(batches)
    monkeypatch.undo()
    check_against_store(batch, mixture, dataset_indices(SEED, 0, np.arange(12), 12, len(mixture)))


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
slots = process_sample_indices(4, 1, 0)
batches = training_batches(mixture, seed=1, global_batch=4, sample_indices=slots, start_step=0, num_steps=10**9)
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
