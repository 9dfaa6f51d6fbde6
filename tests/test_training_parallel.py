"""Runs of several processes that must train the same model: FSDP, and two machines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_stores import recipe_tree

from mmaudio_hf import MMAudio
from mmaudio_hf.cli import main
from mmaudio_hf.data.sampler import positions

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent
FILES = ("training_state/model", "training_state/ema", "training_state/optimizer", "pretrained_model/model")


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def launch_command(hardware: str, recipe: Path, *overrides: str, options: tuple[str, ...] = ()) -> list[str]:
    config = str(ROOT / "accelerate_configs" / hardware)
    port = () if "--main_process_port" in options else ("--main_process_port", "0")
    command = [str(SCRIPTS / "accelerate"), "launch", "--config_file", config, "--num_processes", "2", *port, *options]
    return [*command, str(ROOT / "train.py"), str(recipe), *overrides]


def launch(hardware: str, recipe: Path, *overrides: str) -> str:
    """Two processes; returns what they printed."""
    command = launch_command(hardware, recipe, *overrides)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), cwd=recipe.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def write(folder: Path, name: str, **changes) -> Path:
    tree = recipe_tree(folder, steps=6, accumulation_steps=2, checkpoint_every=4, validate_every=3)
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree | {"name": name}))
    return path


def last(recipe: Path) -> Path:
    return recipe.parent / "output" / recipe.stem / "last"


def assert_same_model(ours: Path, theirs: Path, tolerance: float) -> None:
    for file in FILES:
        a, b = (load_file(last(recipe) / f"{file}.safetensors") for recipe in (ours, theirs))
        assert a.keys() == b.keys()
        for name in a:
            difference = (a[name] - b[name]).norm()
            assert difference <= tolerance * b[name].norm() + 1e-12, (file, name)


def metrics(recipe: Path) -> list[dict]:
    return [json.loads(line) for line in (last(recipe).parent / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A finished run of two processes on this machine. One of its samples is not finite, so a step is refused."""
    recipe = write(tmp_path_factory.mktemp("parallel"), "local")
    memmap = np.memmap(recipe.parent / "videos" / "mean.memmap", dtype=np.float32, mode="r+").reshape(24, -1)
    visited = [p for p in positions(7, 2, np.arange(4), 4, 40) if p < 24]  # of the third step, in the first store
    memmap[visited[0]] = np.nan
    memmap.flush()
    launch("cpu.yaml", recipe)
    assert metrics(recipe)[-2]["train/skipped_steps"] == 1
    return recipe


def test_shared_out_tensors_train_the_same_model_and_go_on_with_and_without(local):
    """FSDP, also over a resume and a refused step; and one process without it goes on from its checkpoint."""
    recipe = write(local.parent, "shared")
    launch("fsdp.yaml", recipe, "training.steps=4")
    alone = write(local.parent, "alone")
    (local.parent / "output" / "alone").symlink_to("shared")
    assert "from step 4 to 6" in launch("fsdp.yaml", recipe)
    assert_same_model(recipe, local, 1e-5)
    ours, theirs = (metrics(run)[-1] for run in (recipe, local))  # validation, of raw and averaged weights
    assert ours.keys() == theirs.keys() and "val_ema/loss" in ours
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)
    network = MMAudio.from_pretrained(last(recipe) / "pretrained_model")
    assert all(value.isfinite().all() for value in network.state_dict().values())
    assert main(["train", str(alone), "training.steps=7"]) == 0
    assert last(recipe).resolve().name == "step_7"


def test_shared_out_adapters_with_checkpointed_activations(local):
    """Frozen and trained tensors in one group, merged when published; early stopping ends both processes."""
    start = MMAudio.from_pretrained(last(local) / "pretrained_model")
    torch.save(start.state_dict(), local.parent / "start.pth")
    finetune = {"init_from": str(local.parent / "start.pth"), "lora": {"rank": 2}, "freeze": ["text"]}
    stopping = {"metric": "val/loss", "patience": 2, "min_delta": 100.0}
    training = {"activation_checkpointing": True, "early_stopping": stopping, "validate_every": 2}
    shared = write(local.parent, "shared_adapter", finetune=finetune, training=training)
    alone = write(local.parent, "adapter", finetune=finetune, training=training)
    assert "no longer improves" in launch("fsdp.yaml", shared)
    assert main(["train", str(alone)]) == 0
    assert last(shared).resolve().name == last(alone).resolve().name == "step_4"
    assert_same_model(shared, alone, 1e-4)
