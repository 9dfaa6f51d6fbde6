"""Running `train.py` as its users do, and reading what a run left. Finished runs to compare with are in conftest."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forked import PATIENCE, Command, run_together
from safetensors.torch import load_file
from toy_stores import MODEL, recipe_tree

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent
TENSOR_FILES = ("model", "optimizer", "ema", "window")


def environment(**more: str) -> dict[str, str]:
    """Variables for a process of its own: none of a launcher, one thread, no Hub."""
    hidden = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | more


def accelerate_command(*script: str, processes: int, hardware: str = "cpu.yaml") -> list[str]:
    """`accelerate launch` of a script with one of our configurations."""
    config = str(ROOT / "accelerate_configs" / hardware)
    words = [str(SCRIPTS / "accelerate"), "launch", "--config_file", config, "--num_processes", str(processes)]
    return [*words, "--main_process_port", "0", *script]


def command(recipe: Path, *overrides: str, processes: int = 1) -> list[str]:
    """Words that run train.py, through accelerate as the README says; processes=0 leaves out the launcher."""
    script = [str(ROOT / "train.py"), str(recipe), *overrides]
    return accelerate_command(*script, processes=processes) if processes else [sys.executable, *script]


def launch(recipe: Path, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run it."""
    words = command(recipe, *overrides, processes=processes)
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, env=environment(), cwd=recipe.parent)


def train(recipe: Path, *overrides: str, processes: int = 1, **variables: str) -> subprocess.CompletedProcess:
    """The same without the time that launchers and imports take: in processes of their own all the same."""
    if processes == 1:
        return start(recipe, *overrides).result()
    words = ["train", str(recipe), *overrides]
    return run_together(processes, *words, cwd=recipe.parent, env=environment(**variables))


def start(recipe: Path, *overrides: str, freeze: tuple[str, int] | None = None) -> Command:
    """Training in a process of its own, without a launcher; a context that it does not outlive."""
    return Command("train", str(recipe), *overrides, cwd=recipe.parent, env=environment(), freeze=freeze)


# Trains, but takes no step after those that are named before a file is there, or the signal that is to end the run.
GATED = """
import json, sys, time
from pathlib import Path
from mmaudio_hf.cli import train_main
from mmaudio_hf.training.loop import Run

gates, update = json.loads(sys.argv.pop(1)), Run.update

def gated(run, batches):
    file, end = gates.get(str(run.step)), time.monotonic() + 300
    while file and not Path(file).exists() and not run.guard.signals.number and time.monotonic() < end:
        time.sleep(0.005)
    update(run, batches)

Run.update = gated
sys.exit(train_main())
"""


def gated_program(gates: Mapping[int, Path], recipe: Path, *overrides: str) -> list[str]:
    """A program and its arguments: a run that waits after some steps until a file is there: step -> file."""
    program = recipe.parent / "gated.py"
    program.write_text(GATED)
    return [str(program), json.dumps({step: str(file) for step, file in gates.items()}), str(recipe), *overrides]


# --- finished runs -------------------------------------------------------------------------------------------------

STEPS, EVERY = 40, 4  # of the runs with a poisoned row, and their checkpoint_every
POISONED = "videos_0000"
TINY = {"hidden_dim": 16, "num_heads": 1, "depth": 2, "fused_depth": 1, "duration": 1.0}


def finished(recipe: Path) -> Path:
    """The recipe of a run, once it is finished in one process."""
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    return recipe


def poisoned_recipe(folder: Path, name: str) -> Path:
    """A tiny model; one row of its videos has values that overflow, so about every tenth step is skipped."""
    tree = recipe_tree(folder, steps=STEPS, checkpoint_every=EVERY, log_every=1, validate_every=6) | {"name": name}
    tree["model"] = MODEL | TINY
    tree["training"] |= {"keep_checkpoints": 2, "keep_every": 16, "best_metric": "val_ema/loss"}
    shutil.rmtree(folder / "output" / name, ignore_errors=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    means = np.memmap(folder / "videos" / "mean.memmap", dtype=np.float32, mode="r+")
    means[: means.size // 24] = 1e30  # the first of 24 rows
    means.flush()
    return path


def copy_run(recipe: Path, copy: Path) -> Path:
    """The run folder of `recipe` as that of the recipe `copy`, which is returned."""
    shutil.copytree(run_dir(recipe), run_dir(copy), symlinks=True)
    return copy


# --- what a run left -----------------------------------------------------------------------------------------------


def run_dir(recipe: Path) -> Path:
    """Folder of the run of a recipe that `write_recipe` wrote."""
    return recipe.parent / "output" / recipe.stem


def last_step(recipe: Path) -> int:
    """Step of the newest checkpoint; 0 without any."""
    link = run_dir(recipe) / "last"
    return int(link.resolve().name.removeprefix("step_")) if link.exists() else 0


def checkpoint_names(recipe: Path) -> set[str]:
    """Names of everything in the folder of checkpoints."""
    return {path.name for path in (run_dir(recipe) / "checkpoints").iterdir()}


def tensors(recipe: Path, name: str = "model") -> dict[str, torch.Tensor]:
    """One group of tensors in the newest checkpoint."""
    return load_file(run_dir(recipe) / "last" / "training_state" / f"{name}.safetensors")


def lines(recipe: Path, name: str) -> list[dict]:
    """Entries of a log of JSON lines."""
    return [json.loads(line) for line in (run_dir(recipe) / name).read_text().splitlines()]


def metrics(recipe: Path) -> list[dict]:
    """Lines of metrics.jsonl."""
    return lines(recipe, "metrics.jsonl")


def same_bytes(a: Path, b: Path) -> None:
    """Both runs ended with the same tensors and logged the same."""
    files = [f"last/training_state/{name}.safetensors" for name in TENSOR_FILES]
    snapshots = sorted(f"ema/{path.name}" for path in (run_dir(b) / "ema").iterdir())
    for file in (*files, *snapshots, "last/pretrained_model/model.safetensors", "metrics.jsonl"):
        assert (run_dir(a) / file).read_bytes() == (run_dir(b) / file).read_bytes(), file


def same_run(a: Path, b: Path) -> None:
    """The same, and they skipped the same steps and kept the same checkpoints."""
    same_bytes(a, b)
    assert (run_dir(a) / "skipped.jsonl").read_bytes() == (run_dir(b) / "skipped.jsonl").read_bytes()
    assert (run_dir(a) / "best").resolve().name == (run_dir(b) / "best").resolve().name
    assert checkpoint_names(a) == checkpoint_names(b)


def assert_close(a: Path, b: Path, tolerance: float) -> None:
    """Same weights up to summation order: relative to how far training moved them from their initial values."""
    ours, theirs = tensors(a), tensors(b)
    distance = torch.cat([(ours[n] - theirs[n]).flatten() for n in ours if n != "latent_mean"]).norm()
    size = torch.cat([theirs[n].flatten() for n in theirs if n != "latent_mean"]).norm()
    assert distance / size < tolerance


def assert_same_metrics(a: Path, b: Path, tolerance: float = 1e-3) -> None:
    """Both runs logged the same up to summation order."""
    for ours, theirs in zip(metrics(a), metrics(b), strict=True):
        # Null, of a window of skipped steps, is nothing that pytest.approx takes.
        values, expected = ({n: math.nan if v is None else v for n, v in line.items()} for line in (ours, theirs))
        assert values == pytest.approx(expected, rel=tolerance, nan_ok=True)
