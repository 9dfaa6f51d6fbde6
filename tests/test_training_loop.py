"""Whole runs of `train.py` on small stores: what they leave, and the same model in every way of launching them."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forked import PATIENCE, Command, wait_until
from safetensors.torch import load_file
from toy_stores import MODEL, recipe_tree, write_recipe, write_store
from training_runs import (
    ROOT,
    TINY,
    accelerate_command,
    assert_close,
    assert_same_metrics,
    checkpoint_names,
    environment,
    finished,
    last_step,
    launch,
    lines,
    metrics,
    run_dir,
    same_bytes,
    start,
    tensors,
    train,
)

from mmaudio_hf import MMAudio
from mmaudio_hf.cli import main
from mmaudio_hf.config import config_of_duration, load_recipe
from mmaudio_hf.data.loader import BatchIndices, BatchLoader
from mmaudio_hf.data.mixture import Mixture, open_mixture
from mmaudio_hf.data.sampler import sample_noise
from mmaudio_hf.training.loop import Run
from mmaudio_hf.training.step import flow_step


def test_a_run_leaves_what_is_promised(finished_run):
    folder = run_dir(finished_run)
    assert (folder / "last").resolve().name == "step_12"
    assert checkpoint_names(finished_run) == {"step_12", "step_4", "step_8"}
    # Weights, which safetensors writes for their owner alone, are for whom the umask lets read the others.
    assert len({path.stat().st_mode for path in (folder / "last").resolve().rglob("*") if path.is_file()}) == 1
    weights = json.loads((folder / "last" / "pretrained_model" / "weights.json").read_text())
    assert weights == {"weights": "ema", "sigma_rel": 0.05, "step": 12}
    encoders = json.loads((folder / "last" / "pretrained_model" / "encoders.json").read_text())
    assert encoders["kind"] == "toy"
    published = load_file(folder / "last" / "pretrained_model" / "model.safetensors")
    assert not torch.equal(published["final_layer.conv.weight"], tensors(finished_run)["final_layer.conv.weight"])


def test_a_run_logs_losses_scores_and_speed(finished_run):
    log = metrics(finished_run)
    assert [line["step"] for line in log if "train/loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in log if "val/loss" in line] == [0, 6, 12]
    rates = [line["train/learning_rate"] for line in log if "train/loss" in line]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert {"val/loss_held_out", "val_ema/loss"} <= log[-1].keys()
    assert {"train/loss_videos", "train/loss_audios"} <= {name for line in log for name in line}
    assert all(line["speed/steps_per_second"] > 0 for line in lines(finished_run, "speed.jsonl"))


@pytest.mark.parametrize("processes", [0, 1], ids=["python", "accelerate"])
def test_the_same_recipe_gives_the_same_bytes(finished_run, processes):
    """With accelerate's launcher and by the program `train.py`."""
    again = write_recipe(finished_run.parent, f"again_{processes}")
    result = launch(again) if processes else Command(str(ROOT / "train.py"), str(again), env=environment()).result()
    assert result.returncode == 0, result.stderr
    assert "1 process on cpu" in result.stdout
    same_bytes(finished_run, again)


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_and_accumulation_train_the_same_model(finished_run, processes):
    recipe = write_recipe(finished_run.parent, f"split_{processes}", accumulation_steps=2)
    result = train(recipe, processes=processes)
    assert result.returncode == 0, result.stderr
    assert f"{processes} process" in result.stdout
    assert_close(recipe, finished_run, 1e-5)
    assert_same_metrics(recipe, finished_run)
    # Another number of processes, and no accumulation, continues the same run.
    (run_dir(recipe) / "last").unlink()
    shutil.rmtree(run_dir(recipe) / "checkpoints" / "step_12")
    result = train(recipe, "training.accumulation_steps=1")
    assert "from step 8 to 12" in result.stdout, result.stderr
    assert_close(recipe, finished_run, 1e-5)


def test_several_processes_that_did_not_start_are_noticed(finished_run, tmp_path):
    text = (ROOT / "accelerate_configs" / "cpu.yaml").read_text().replace("type: MULTI_GPU", "type: MULTI_CPU")
    config = tmp_path / "multi_cpu.yaml"
    config.write_text(text)
    words = accelerate_command(str(ROOT / "train.py"), str(finished_run), processes=2)
    words = [str(config) if word.endswith("cpu.yaml") else word for word in words]
    result = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=PATIENCE)
    assert result.returncode != 0
    assert "asked for several processes but started one" in result.stderr


def test_a_batch_that_does_not_split_is_an_error(finished_run, monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)  # as launchers set it
    assert main(["train", str(finished_run), "training.batch_size=5", "name=uneven"]) == 2
    expected = "batch_size 5 does not split over 2 processes x 1 accumulation steps: use 4 or 6"
    assert expected in capsys.readouterr().err


DURATIONS = {1.0: 12, 2.0: 10, 1.5: 9}


@pytest.fixture(scope="module")
def durations(tmp_path_factory) -> Path:
    """A finished run on clips of 1, 2 and 1.5 s, whose steps are of at most 250 latents: 6, 2 and 4 clips."""
    folder = tmp_path_factory.mktemp("durations")
    stores = [write_store(folder / f"s{d * 10:g}", rows, duration=d, seed=5) for d, rows in DURATIONS.items()]
    held_out = [write_store(folder / f"held_{d:g}", 5, duration=d, seed=6) for d in (1.0, 2.0)]
    tree = recipe_tree(folder, batch_size=0, batch_tokens=250, batch_size_multiple=2, log_every=1)
    tree["model"] = MODEL | TINY
    tree["data"] = {"train": [{"path": str(p)} for p in stores], "validation": [{"path": str(p)} for p in held_out]}
    for name in ("whole", "killed", "two"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree | {"name": name}))
    return finished(folder / "whole.yaml")


def test_a_run_on_several_durations_validates_each(durations):
    log = metrics(durations)
    last = log[-1]
    assert last["val/loss"] == pytest.approx((last["val/loss_1s"] + last["val/loss_2s"]) / 2, rel=1e-5)
    assert {"val/loss_held_1", "val_ema/loss_2s"} <= last.keys() and last["val/loss_1s"] != last["val/loss_2s"]
    steps = [{name for name in line if name.startswith("train/loss_")} for line in log if "train/loss" in line]
    assert len(steps) == 12 and all(len(stores) == 1 for stores in steps) and len(set.union(*steps)) == 3
    assert all(line["speed/latents_per_second"] > 63 for line in lines(durations, "speed.jsonl"))
    state = json.loads((run_dir(durations) / "last" / "training_state" / "state.json").read_text())
    assert [state["facts"]["depends_on"][f"data.train.{i}"]["duration"] for i in range(3)] == [1.0, 2.0, 1.5]
    config = json.loads((run_dir(durations) / "last" / "pretrained_model" / "config.json").read_text())
    assert config["duration"] == 1.0


def test_a_run_on_several_durations_that_was_killed_ends_with_the_same_bytes(durations):
    killed = durations.parent / "killed.yaml"
    with start(
        killed, freeze=("mmaudio_hf.training.checkpoint.write_safetensors", 7)
    ) as process:  # of the second checkpoint
        wait_until(lambda: last_step(killed), process)
        process.kill()
    assert last_step(killed) == 4
    result = train(killed)
    assert result.returncode == 0, result.stderr
    same_bytes(durations, killed)


def test_two_processes_train_the_same_model_on_several_durations(durations):
    two = durations.parent / "two.yaml"
    result = train(two, processes=2)
    assert result.returncode == 0, result.stderr
    assert "batch 4 of 1 s = 2 x 1 x 2" not in result.stdout and "6 of 1 s = 2 x 1 x 3" in result.stdout
    assert_close(two, durations, 1e-5)
    assert_same_metrics(two, durations)
    uneven = train(two, "training.batch_size_multiple=1", "name=uneven", processes=2)
    assert "does not split over 2 processes" in uneven.stderr and uneven.returncode == 2


def test_losses_are_those_of_a_run_of_one_duration(durations):
    """Of every sample, from a network that was built for its duration and has no other rows around."""
    recipe = load_recipe(durations)
    model = MMAudio.from_pretrained(run_dir(durations) / "last" / "pretrained_model").train()
    run = Run(recipe, model, open_mixture(recipe.data.train, recipe.model, seed=recipe.seed))
    seen = set()
    with run.loader(6) as loader:
        for (batch,) in loader:
            run.unwrapped_model.set_lengths(*batch.lengths)
            with torch.no_grad():
                losses = flow_step(model, batch, recipe.flow, *run.latent_statistics).loss
            store = run.mixture.stores[int(batch.source[0])]
            own = MMAudio(config_of_duration(recipe.model, store.manifest["duration"]))
            own.load_state_dict(model.state_dict())
            alone = Mixture([(store, 1)], own.config)
            assert alone.buckets[0].lengths == batch.lengths
            for row, index in enumerate(batch.sample_indices):
                noise = sample_noise(recipe.seed, "train", batch.step, [index], alone.latent_shape)
                rows = np.array([store.ids.index(batch.ids[row])])
                values = BatchIndices(batch.step, rows, np.array([index]), np.ones(1, dtype=bool), lambda *_: None)
                with BatchLoader(alone, [[values]], 1, 1) as one, torch.no_grad():
                    single = replace(next(one)[0], noise=noise)
                    loss = flow_step(own, single, recipe.flow, *run.latent_statistics).loss
                torch.testing.assert_close(losses[row], loss[0], rtol=1e-6, atol=1e-6)
            seen.add(batch.lengths)
    assert len(seen) == 3


def test_bf16_trains_close_to_float32(finished_run):
    recipe = write_recipe(finished_run.parent, "bf16", mixed_precision="bf16", steps=2, log_every=1, validate_every=2)
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    exact, rounded = (next(e for e in metrics(run) if "val/loss" in e) for run in (finished_run, recipe))
    assert rounded["val/loss"] == pytest.approx(exact["val/loss"], rel=2e-2)
    assert tensors(recipe)["final_layer.conv.weight"].dtype == torch.float32


def test_a_model_of_version_2_learns(tmp_path):
    """The recipe of large_44k_v2 with a small model of that version: its loss falls."""
    published = load_recipe("recipes/large_44k_v2.yaml")
    assert published.flow.independent_video_dropout and published.model.v2
    write_store(tmp_path / "videos", 24, mode="44k")
    tree = recipe_tree(tmp_path, steps=30, batch_size=8, log_every=10, validate_every=100, checkpoint_every=100)
    tree["model"] = MODEL | {"variant": "large_44k_v2"}
    tree["data"] = {"train": [{"path": str(tmp_path / "videos")}], "validation": []}
    tree["flow"] = {"independent_video_dropout": True}
    tree["optim"] = {"learning_rate": 2e-3, "warmup_steps": 2, "schedule": "constant"}
    recipe = tmp_path / "v2.yaml"
    recipe.write_text(yaml.safe_dump(tree | {"name": "v2"}))
    assert main(["train", str(recipe)]) == 0
    losses = [line["train/loss"] for line in metrics(recipe)]
    assert losses[-1] < 0.9 * losses[0]
    trained = MMAudio.from_pretrained(run_dir(recipe) / "last" / "pretrained_model")
    with torch.device("meta"):
        released = MMAudio.from_variant("large_44k_v2", depth=2, fused_depth=1)
    assert trained.config.v2 and trained.state_dict().keys() == released.state_dict().keys()
