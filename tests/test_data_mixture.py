"""Stores of clips of several durations in one mixture: which step has which clips, and what a batch holds."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from data_stores import MODEL, SHAPES, make_store
from toy_stores import write_store

from mmaudio_hf.cli import main
from mmaudio_hf.config import ModelConfig, TrainingConfig, load_recipe, micro_batch_size, samples_per_step
from mmaudio_hf.data.loader import training_batches, validation_batches
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.sampler import bucket_of_step, process_sample_indices, sample_noise
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.data.tools import convert
from mmaudio_hf.schema import duration_of, sequence_lengths

SEED, TOKENS = 11, 500  # latents of a step: 4, 7 and 14 clips
ROWS = {2.0: 14, 4.0: 9, 1.0: 30}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig(duration=4.0)


@pytest.fixture
def mixture(tmp_path, model):
    """Videos of 2, 4 and 1 s and audio of 2 s, which counts twice."""
    stores = [(FeatureStore.open(write_store(tmp_path / f"s{d:g}", n, duration=d)), 1) for d, n in ROWS.items()]
    audio = write_store(tmp_path / "audio", 5, duration=2.0, video=False)
    yield (mixture := Mixture([*stores, (FeatureStore.open(audio), 2)], model, seed=SEED))
    mixture.close()


def sizes_of(mixture) -> list[int]:
    training = TrainingConfig(batch_size=0, batch_tokens=TOKENS, batch_size_multiple=1)
    return [samples_per_step(training, bucket.lengths[0]) for bucket in mixture.buckets]


def batches_of(mixture, steps: int, world: int = 1, rank: int = 0, accumulation: int = 1, start: int = 0):
    sizes = sizes_of(mixture) if world * accumulation == 1 else [4, 4, 4]
    shares = [process_sample_indices(size, world, rank, accumulation) for size in sizes]
    return training_batches(
        mixture, seed=SEED, global_batch=sizes, sample_indices=shares, start_step=start, num_steps=steps - start
    )


def test_steps_of_a_bucket_are_its_share_after_any_number_of_them():
    lengths, sizes = [7000, 11, 3000, 500], [100, 3, 50, 7]
    weights = np.array(lengths) / sizes
    counts = Counter()
    for step in range(3000):
        bucket, before = bucket_of_step(step, lengths, sizes)
        assert before == counts[bucket]
        counts[bucket] += 1
        shares = (step + 1) * weights / weights.sum()
        assert all(abs(counts[b] - share) <= 1 for b, share in enumerate(shares))
    assert [bucket_of_step(step, [50], [4]) for step in (0, 1, 99)] == [(0, 0), (0, 1), (0, 99)]
    assert bucket_of_step(10**12, lengths, sizes)[1] < 10**12  # exact, and not counted from 0


def test_a_batch_holds_rows_of_one_duration_and_nothing_else(mixture):
    assert [bucket.duration for bucket in mixture.buckets] == [1.0, 2.0, 4.0]
    assert [b.samples for b in mixture.buckets] == [30, 24, 9] and len(mixture) == 63
    visits, sizes, steps = Counter(), dict(zip((1.0, 2.0, 4.0), sizes_of(mixture), strict=True)), 180
    assert sizes == {1.0: 15, 2.0: 7, 4.0: 4}
    with batches_of(mixture, steps) as loader:
        for step, (batch,) in enumerate(loader):
            duration = mixture.buckets[mixture.bucket_of[batch.source[0]]].duration
            lengths = sequence_lengths("16k", duration)
            assert batch.lengths == (lengths.latent, lengths.clip, lengths.sync) and batch.valid.all()
            assert len(batch.ids) == sizes[duration] and batch.mean.numel() // 20 <= TOKENS
            values = [mixture.stores[s].ids.index(i) for s, i in zip(batch.source.tolist(), batch.ids, strict=True)]
            for row, (s, stored) in enumerate(zip(batch.source.tolist(), values, strict=True)):
                assert torch.equal(batch.mean[row], mixture.stores[s].read([stored])["mean"][0])
            noise = sample_noise(SEED, "train", step, batch.sample_indices, (lengths.latent, 20))
            assert torch.equal(noise.x0, batch.noise.x0) and torch.equal(noise.drop_text, batch.noise.drop_text)
            visits.update(batch.ids)
    epochs = visits.total() / len(mixture)  # every row is as likely as its store's repeats say, whatever its duration
    for store, repeats in zip(mixture.stores, mixture.repeats, strict=True):
        counts = [visits[i] for i in store.ids]
        assert max(counts) - min(counts) <= repeats
        assert sum(counts) / len(store) == pytest.approx(repeats * epochs, rel=0.03)


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (2, 2)])
def test_processes_have_shares_of_the_same_steps(mixture, world, accumulation):
    with batches_of(mixture, 12, accumulation=4) as loader:
        whole = [(batches[0].lengths, sorted(i for batch in batches for i in batch.ids)) for batches in loader]
    loaders = [batches_of(mixture, 12, world, rank, accumulation, start=5) for rank in range(world)]
    for lengths, ids in whole[5:]:
        batches = [batch for loader in loaders for batch in next(loader)]
        assert {batch.lengths for batch in batches} == {lengths}
        assert sorted(i for batch in batches for i in batch.ids) == ids
    for loader in loaders:
        loader.close()
    assert len({lengths for lengths, _ in whole}) == 3


@pytest.mark.parametrize("world", [1, 2])
def test_validation_has_every_row_once_in_batches_of_one_duration(mixture, world):
    batches = [
        (batch.lengths, batch.valid.tolist(), list(batch.ids))
        for rank in range(world)
        for batch in validation_batches(mixture, seed=1, batch_size=[4, 3, 2], rank=rank, world_size=world)
    ]
    seen = Counter(i for _, valid, ids in batches for i, ok in zip(ids, valid, strict=True) if ok)
    assert seen == {i: 2 if i.startswith("audio") else 1 for store in mixture.stores for i in store.ids}
    assert {lengths[0]: len(ids) for lengths, _, ids in batches} == {32: 4, 63: 3, 125: 2}


def test_what_does_not_mix_is_named(tmp_path, model):
    two = FeatureStore.open(write_store(tmp_path / "two", 3, duration=2.0))
    four = FeatureStore.open(write_store(tmp_path / "four", 3, duration=4.0))
    with pytest.raises(ValueError, match=r"two has duration 2\.0, model small_16k expects 4\.0: set model\.duration"):
        Mixture([(two, 1)], model)
    assert Mixture([(two, 1), (four, 1)]).buckets[1].duration == 4.0  # without a model
    bare = [FeatureStore.open(write_store(tmp_path / f"b{10 * d:g}", 2, duration=d, video=d > 2)) for d in (2.0, 2.5)]
    for store in bare:
        store.manifest = None  # as the stores of the reference implementation
    buckets = Mixture([(four, 1), *((store, 1) for store in bare)], model).buckets
    assert [bucket.duration for bucket in buckets] == [2.0, 2.5, 4.0], "by their shapes"
    assert buckets[1].lengths == (79, 20, 48) and duration_of("44k", 345, 64, 192) == 8.0
    shares = Mixture([(two, 1), (four, 1), (two, 2)], model).shares  # a store may be named twice
    assert shares == [("two (2 s)", 0.25), ("four (4 s)", 0.25), ("two (2 s)", 0.5)]
    third = Mixture([(two, 1 / 3), (four, 1)], model)  # another row of the three in each epoch
    assert sorted(third.locate(third.of_bucket(0, np.arange(3)))[1].tolist()) == [0, 1, 2]
    half = tmp_path / "half"
    convert(two.path, half, layout="compact")
    with pytest.raises(ValueError, match=r"four has clip_features as float32 .*half as bfloat16 .*store convert"):
        Mixture([(four, 1), (FeatureStore.open(half), 1)], model)
    odd = make_store(tmp_path / "odd", 2, SHAPES, duration=3.0)
    with pytest.raises(ValueError, match=r"odd: mean has shape \(5, 4\), model small_16k expects \(94, 4\) at 3 s"):
        Mixture([(odd, 1)], replace(MODEL, latent_length=6))


def test_tokens_give_the_size_of_a_step_and_are_never_truncated():
    training = TrainingConfig(batch_size=0, batch_tokens=128_000)
    assert [samples_per_step(training, n) for n in (63, 125, 250, 313)] == [2024, 1024, 512, 408]
    assert [micro_batch_size(training, 4, n) for n in (63, 313)] == [506, 102]
    with pytest.raises(ValueError, match=r"gives 408 samples of 313 latents, which does not split over 16 .*multiple"):
        micro_batch_size(training, 16, 313)
    with pytest.raises(ValueError, match=r"batch_tokens 1000 holds no 8 clips of 250 latents: use 2000 or more"):
        samples_per_step(TrainingConfig(batch_size=0, batch_tokens=1000), 250)
    for sizes in ({"batch_tokens": 5}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="one of them gives the size of a step, set the other to 0"):
            TrainingConfig(**sizes)
    with pytest.raises(ValueError, match=r"batch_size_multiple 4 has no effect with training\.batch_size"):
        TrainingConfig(batch_size_multiple=4)


def test_the_recipe_of_the_page(tmp_path, monkeypatch, capsys):
    """As it stands in docs/stores.md, on stores of one or two rows: what --dry-run says is what the page says."""
    root = Path(__file__).parent.parent
    section = (root / "docs" / "stores.md").read_text().split("### Clips of several durations")[1]
    recipe = section.split("```yaml\n")[1].split("```")[0].replace("recipes/", f"{root}/recipes/")
    monkeypatch.chdir(tmp_path)
    Path("mixed.yaml").write_text(recipe)
    Path("data/features_16k").mkdir(parents=True)
    for name, duration, rows in (("vgg-train", 8.0, 3), ("steps", 4.0, 1), ("takes", 10.0, 2)):
        write_store(tmp_path / "data/features_16k" / name, rows, duration=duration)
    changes = ["data.validation=[]", "data.test=[]", "samples.every=0", "evaluation.every=0"]
    assert main(["train", "mixed.yaml", "--dry-run", *changes, "evaluation.after_training=false"]) == 0
    derived = yaml.safe_load(capsys.readouterr().out)["derived"]
    assert {d: batch["global"] for d, batch in derived["batch"].items()} == {"4 s": 1024, "8 s": 512, "10 s": 408}
    assert all(f"{batch['global']} of {d}" in section for d, batch in derived["batch"].items())
    assert derived["shares"] == "vgg-train (8 s) 38%, steps (4 s) 38%, takes (10 s) 25%"
    extraction = load_recipe("mixed.yaml").extraction
    assert [source.duration for source in extraction.videos] == [0.0, 4.0, 10.0]
