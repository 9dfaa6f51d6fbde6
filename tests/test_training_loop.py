"""Whole runs of `train.py` on small stores: what they leave, and the same model in every way of launching them."""

import json
import shutil
import subprocess

import pytest
import torch
import yaml
from forked import PATIENCE
from safetensors.torch import load_file
from toy_stores import MODEL, recipe_tree, write_recipe, write_store
from training_runs import (
    ROOT,
    accelerate_command,
    assert_close,
    assert_same_metrics,
    checkpoint_names,
    environment,
    launch,
    lines,
    metrics,
    run_dir,
    same_bytes,
    tensors,
    train,
)

from mmaudio_hf import MMAudio
from mmaudio_hf.cli import main
from mmaudio_hf.config import load_recipe


def test_a_run_leaves_what_is_promised(finished_run):
    folder = run_dir(finished_run)
    assert (folder / "last").resolve().name == "step_12"
    assert checkpoint_names(finished_run) == {"step_12", "step_4", "step_8"}
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
    """With accelerate's launcher and as `python train.py`."""
    again = write_recipe(finished_run.parent, f"again_{processes}")
    result = launch(again, processes=processes)
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
    monkeypatch.setenv("WORLD_SIZE", "2")  # as launchers set it
    assert main(["train", str(finished_run), "training.batch_size=5", "name=uneven"]) == 2
    expected = "batch_size 5 does not split over 2 processes x 1 accumulation steps: use 4 or 6"
    assert expected in capsys.readouterr().err


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
