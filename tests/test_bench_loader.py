"""`bench loader`: a DataLoader that delivers the same, the bytes of the published mix, and the figures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_stores import AUDIO_SHAPES, SHAPES, make_store

from mmaudio_hf.bench import loader as bench
from mmaudio_hf.cli import main
from mmaudio_hf.config import load_recipe, variant_config
from mmaudio_hf.data.loader import BatchLoader, bucketed_batch_indices
from mmaudio_hf.data.mixture import Mixture


def test_the_dataloader_delivers_what_ours_does(tmp_path):
    mixture = Mixture([(make_store(tmp_path / "v", 9), 1), (make_store(tmp_path / "a", 7, AUDIO_SHAPES, seed=2), 1)])
    steps = list(bucketed_batch_indices(mixture, bench.SEED, [4], [[np.arange(4)]], range(6)))
    order = np.concatenate([indices.dataset_indices for (indices,) in steps])
    theirs = bench._dataloader(mixture, order, 4, 0)
    with BatchLoader(mixture, steps, 4, 1) as ours:
        for (batch,), plain in zip(ours, theirs, strict=True):
            assert plain.keys() == SHAPES.keys()
            plain = {name: values[batch.sample_indices] for name, values in plain.items()}  # ours are grouped by store
            video = batch.has_video
            for name in ("mean", "std", "text_features"):
                assert torch.equal(getattr(batch, name), plain[name])
            for name in ("clip_features", "sync_features"):
                assert torch.equal(getattr(batch, name), plain[name][video]) and not plain[name][~video].any()


def test_the_published_mix_moves_less_than_two_fifths_of_the_bytes(tmp_path):
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "small_16k.yaml")
    assert recipe.training.batch_size == bench.GLOBAL_BATCH
    assert recipe.data.train[0].repeats == bench.VIDEO_REPEATS
    figures = bench.mix_bytes(tmp_path)
    with_video, without = 4 * (2 * 250 * 20 + (64 + 77) * 1024 + 192 * 768), 4 * (2 * 250 * 20 + 77 * 1024)
    assert figures["mix_dataloader_bytes"] == 3 * 512 * with_video
    expected = 2 * 512 * (900 * with_video + 380 * without) / 1280
    assert figures["mix_reference_bytes"] == pytest.approx(expected, rel=1e-12)
    assert figures["mix_compact_of_dataloader"] <= 0.4
    assert figures["mix_compact_bf16_sync_of_dataloader"] <= 0.3


def test_bench_loader_prints_json(capsys):
    assert not main(["bench", "loader", "--rows", "20", "--batch-size", "2", "--rounds", "1", "--json"])
    figures = json.loads(capsys.readouterr().out)
    rates = ["ours", "ours_with_noise", "best_dataloader", "memcpy", *(f"dataloader_workers_{n}" for n in (0, 2, 4))]
    assert all(figures[f"{name}_gb_s"] > 0 for name in rates)
    assert figures["ours_of_memcpy"] == pytest.approx(figures["ours_gb_s"] / figures["memcpy_gb_s"])
    assert figures["ours_of_dataloader"] == pytest.approx(figures["ours_gb_s"] / figures["best_dataloader_gb_s"])
    assert figures["ours_samples_s"] == pytest.approx(figures["ours_gb_s"] * 2e9 / figures["bytes_per_step"], rel=1e-6)
    assert figures["best_dataloader_gb_s"] == max(figures[f"dataloader_workers_{n}_gb_s"] for n in (0, 2, 4))


def test_the_sweep_measures_every_size(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SWEEP_ROWS", (1_000, 2_000))
    figures = bench._sweep(tmp_path, 4, 0.3, 1, 2, variant_config("small_16k"))
    assert all(figures[f"sweep_us_per_sample_{rows}"] > 0 for rows in bench.SWEEP_ROWS)


def test_bench_remote_counts_what_came(capsys):
    words = ["--rows", "40", "--batch-size", "1", "--rounds", "2", "--step", "1", "--latency", "1", "--json"]
    assert not main(["bench", "remote", *words])
    figures = json.loads(capsys.readouterr().out)
    assert figures["same_batches"] == 1 and 0 < figures["peak_bytes"] <= figures["cap_bytes"]
    assert figures["hits_later_epochs"] == pytest.approx(figures["kept_share"], abs=0.12)
    assert figures["bytes_used"] >= 3 * 40 * figures["row_bytes"]  # what is requested ahead is counted too
    assert main(["bench", "remote", "--rows", "20"]) == 2
    assert "the cache would have 5 rows, it needs 65: take more --rows or --share" in capsys.readouterr().err
