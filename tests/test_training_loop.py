"""Whole runs of `train.py` on small stores: one and two processes, resume, interruption, bad steps."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_stores import write_recipe
from training_runs import (
    ROOT,
    SCRIPTS,
    assert_close,
    command,
    environment,
    launch,
    metrics,
    run_dir,
    same_bytes,
    start,
    tensors,
    train,
)

from mmaudio_hf.cli import main
from mmaudio_hf.training import resume as lock


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A finished run of 12 steps in one process, for the others to compare with."""
    recipe = write_recipe(tmp_path_factory.mktemp("training"), "undisturbed")
    result = launch(recipe)
    assert result.returncode == 0, result.stderr
    assert "1 process on cpu" in result.stdout
    return recipe


def test_a_run_leaves_what_is_promised(undisturbed):
    folder = run_dir(undisturbed)
    assert (folder / "last").resolve().name == "step_12"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_12", "step_4", "step_8"]
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines if "train/loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 6, 12]
    assert [line["train/learning_rate"] for line in lines if "train/loss" in line] == pytest.approx(
        [1e-3, 1e-3, 1e-4, 1e-4]
    )
    final = lines[-1]
    assert {"val/loss_held_out", "val_ema/loss"} <= final.keys()
    weights = json.loads((folder / "last" / "pretrained_model" / "weights.json").read_text())
    assert weights == {"weights": "ema", "sigma_rel": 0.05, "step": 12}
    encoders = json.loads((folder / "last" / "pretrained_model" / "encoders.json").read_text())
    assert encoders["kind"] == "toy"
    averaged = load_file(folder / "last" / "pretrained_model" / "model.safetensors")
    assert not torch.equal(averaged["final_layer.conv.weight"], tensors(undisturbed)["final_layer.conv.weight"])
    speeds = [json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()]
    assert all(line["speed/steps_per_second"] > 0 for line in speeds)


def test_the_same_recipe_gives_the_same_bytes(undisturbed):
    """Without a launcher, as `python train.py`."""
    again = write_recipe(undisturbed.parent, "again")
    result = subprocess.run(
        command(again, processes=0), env=environment(), cwd=again.parent, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    same_bytes(undisturbed, again)


def test_signals_save_and_end_with_or_without_a_launcher(undisturbed):
    """Each session goes on from the one before. A terminal signals all processes, a scheduler may reach one alone."""
    recipe = write_recipe(undisturbed.parent, "signals", steps=100_000, log_every=1, checkpoint_every=100_000)
    passed_on = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1"}
    step = 0
    for processes, number, send, code, variables in (
        (0, signal.SIGINT, os.kill, 130, {}),
        (0, signal.SIGTERM, os.kill, 143, {}),
        (0, signal.SIGUSR1, os.kill, 138, {}),
        (1, signal.SIGINT, os.killpg, None, {}),
        (2, signal.SIGUSR1, os.kill, 1, passed_on),
    ):
        process = start(recipe) if not processes else subprocess.Popen(
            command(recipe, processes=processes), env=environment() | variables, cwd=recipe.parent,
            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        log = run_dir(recipe) / "metrics.jsonl"
        while not (log.exists() and f'{{"step": {step + 1}, "train/loss"' in log.read_text()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        send(process.pid, number)
        output = "".join(filter(None, process.communicate(timeout=120)))  # until the last of the processes has ended
        # accelerate's launcher for one process ends of Ctrl-C itself.
        assert process.returncode == code or (code is None and process.returncode != 0), output
        assert f"from step {step} to 100000" in output and f"{number.name}: saving a checkpoint" in output, output
        step = int((run_dir(recipe) / "last").resolve().name.removeprefix("step_"))
        assert f"stopped at step {step}; the same command goes on from there" in output


def test_two_launches_do_not_train_one_run(undisturbed, monkeypatch, capsys):
    recipe = write_recipe(undisturbed.parent, "held", steps=100_000, log_every=1, checkpoint_every=100_000)
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setattr(lock, "LOCK_TIMEOUT", 0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    staged = run_dir(recipe) / "hub" / "step_1_1"
    log = run_dir(recipe) / "metrics.jsonl"
    with start(recipe) as first:
        while not (log.exists() and "train/loss" in log.read_text()):
            assert first.poll() is None
            time.sleep(0.01)
        before = log.read_bytes()
        staged.mkdir(parents=True)  # as a launch that pushes has it
        for words in ([], ["hub.repo_id=me/held"], ["resume=hub://me/other"]):
            assert main(["train", str(recipe), *words]) == 2
            assert "held is being trained by another launch" in capsys.readouterr().err
        assert staged.exists()
        assert log.read_bytes().startswith(before) and log.stat().st_size > len(before)  # undisturbed
    assert main(["train", str(recipe), "training.steps=1"]) == 0  # the system frees what a killed process held


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_and_accumulation_train_the_same_model(undisturbed, processes):
    recipe = write_recipe(undisturbed.parent, f"split_{processes}", accumulation_steps=2)
    result = train(recipe, processes=processes)
    assert result.returncode == 0, result.stderr
    assert f"{processes} process" in result.stdout
    assert_close(recipe, undisturbed, 1e-5)
    for ours, theirs in zip(metrics(recipe), metrics(undisturbed), strict=True):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-3)
    # Another number of processes, and no accumulation, continues the same run.
    (run_dir(recipe) / "last").unlink()
    shutil.rmtree(run_dir(recipe) / "checkpoints" / "step_12")
    result = train(recipe, "training.accumulation_steps=1")
    assert "from step 8 to 12" in result.stdout, result.stderr
    assert_close(recipe, undisturbed, 1e-5)


def test_several_processes_that_did_not_start_are_noticed(undisturbed, tmp_path):
    config = tmp_path / "multi_cpu.yaml"
    text = (ROOT / "accelerate_configs" / "cpu.yaml").read_text().replace("type: MULTI_GPU", "type: MULTI_CPU")
    config.write_text(text.replace("num_processes: 1", "num_processes: 2"))
    words = [str(SCRIPTS / "accelerate"), "launch", "--config_file", str(config), str(ROOT / "train.py")]
    result = subprocess.run(
        [*words, str(undisturbed)], capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=120
    )
    assert result.returncode != 0
    assert "asked for several processes but started one" in result.stderr


def test_a_batch_that_does_not_split_is_refused(undisturbed, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as launchers say it
    assert main(["train", str(undisturbed), "training.batch_size=5", "name=uneven"]) == 2
    expected = "batch_size 5 does not split over 2 processes x 1 accumulation steps: use 4 or 6"
    assert expected in capsys.readouterr().err


def test_steps_that_are_not_finite_are_skipped_and_then_stop_the_run(undisturbed, tmp_path):
    recipe = write_recipe(tmp_path, "broken", max_skipped_steps=3)
    memmap = np.memmap(tmp_path / "videos" / "mean.memmap", dtype=np.float32, mode="r+")
    memmap[: memmap.size // 24] = np.nan  # the first of 24 rows
    memmap.flush()
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    skipped = [json.loads(line) for line in (run_dir(recipe) / "skipped.jsonl").read_text().splitlines()]
    assert skipped and all("videos_0000" in line["ids"] for line in skipped)
    assert all(value.isfinite().all() for value in tensors(recipe).values())
    assert metrics(recipe)[-2]["train/skipped_steps"] == len(skipped)
    memmap[:] = np.nan
    memmap.flush()
    result = train(write_recipe(tmp_path, "hopeless", max_skipped_steps=1), "data.train.0.repeats=20")
    assert result.returncode != 0
    assert "not finite" in result.stderr and "optim.learning_rate" in result.stderr


def test_damaged_checkpoint_falls_back_to_the_one_before(undisturbed):
    recipe = write_recipe(undisturbed.parent, "damaged")
    assert train(recipe, "training.steps=8", "training.log_every=4").returncode == 0
    file = run_dir(recipe) / "checkpoints" / "step_8" / "training_state" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = train(recipe, "training.steps=9")
    assert result.returncode == 0, result.stderr
    assert "damaged" in result.stdout and "from step 4 to 9" in result.stdout
    names = sorted(p.name for p in (run_dir(recipe) / "checkpoints").iterdir())
    assert names == ["step_4", "step_8", "step_8.damaged", "step_9"]


def test_a_changed_recipe_is_shown_and_refused(undisturbed):
    kept = (run_dir(undisturbed) / "config.yaml").read_bytes()
    for overrides, messages in (
        (["model.hidden_dim=128"], ["depend on: put model.hidden_dim back", "- model.hidden_dim: 64"]),
        (["ema.sigma_rels=[0.03, 0.2]", "--allow-changes"], ["depend on", "+ ema.sigma_rels: [0.03, 0.2]"]),
        (
            ["seed=8", "flow.condition_dropout=0.2", "training.log_every=1"],
            [
                "--allow-changes\n  - seed: 7\n  + seed: 8\n",
                "- flow.condition_dropout: 0.1\n  + flow.condition_dropout: 0.2\n",
            ],
        ),
        (["training.steps=6"], ["has trained 12 steps"]),
        (["training.best_metric=score/f1"], ["name a score that begins with val/ or val_ema/"]),
        (["resume=never"], ["holds checkpoints"]),
    ):
        result = train(undisturbed, *overrides)
        assert result.returncode == 2 and "log_every" not in result.stderr, result.stderr
        assert all(message in result.stderr for message in messages), result.stderr
        assert (run_dir(undisturbed) / "config.yaml").read_bytes() == kept


def test_other_stores_may_follow_and_leftovers_go(undisturbed):
    recipe = write_recipe(undisturbed.parent, "moved_on")
    assert train(recipe, "training.steps=4", "training.log_every=3").returncode == 0
    leftover = run_dir(recipe) / "checkpoints" / "step_9.partial"
    leftover.mkdir()
    stale = run_dir(recipe) / "ema" / "sigma_0.05_step_000000099.safetensors"
    save_file({"w": torch.zeros(1)}, stale, metadata={"sigma_rel": "0.05", "step": "99"})
    changes = ("data.train=[{path: videos}]", "seed=8", "training.steps=5")
    result = train(recipe, *changes, "--allow-changes")
    assert result.returncode == 0, result.stderr
    assert "- seed: 7\n  + seed: 8" in result.stdout and "+ data.train: [{'path': 'videos'" in result.stdout
    assert "- training.steps: 4\n  + training.steps: 5" in result.stdout
    assert not leftover.exists() and not stale.exists()


def test_bf16_trains_close_to_float32(undisturbed):
    recipe = write_recipe(undisturbed.parent, "bf16", mixed_precision="bf16", steps=2, log_every=1, validate_every=2)
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    exact = next(line for line in metrics(undisturbed) if "val/loss" in line)
    rounded = next(line for line in metrics(recipe) if "val/loss" in line)
    assert rounded["val/loss"] == pytest.approx(exact["val/loss"], rel=2e-2)
    assert tensors(recipe)["final_layer.conv.weight"].dtype == torch.float32
