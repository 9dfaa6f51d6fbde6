"""Running `train.py` as its users do, and reading what it left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from forked import Command, run_together
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent


def environment() -> dict[str, str]:
    """Variables for a process of its own: none of a launcher, one thread, no Hub."""
    hidden = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(recipe: Path, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run train.py through accelerate, as the README says."""
    return subprocess.run(
        command(recipe, *overrides, processes=processes),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
        cwd=recipe.parent,
    )


def train(recipe: Path, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess:
    """The same without the time that launchers and imports take: in processes of their own all the same."""
    if processes == 1:
        return start(recipe, *overrides).result()
    return run_together(processes, "train", str(recipe), *overrides, cwd=recipe.parent, env=environment())


def start(recipe: Path, *overrides: str) -> Command:
    """Training in a process of its own, without a launcher; a context that it does not outlive."""
    return Command("train", str(recipe), *overrides, cwd=recipe.parent, env=environment())


def command(recipe: Path, *overrides: str, processes: int = 1) -> list[str]:
    """The words that `launch` runs; processes=0 leaves out the launcher."""
    words = [sys.executable, str(ROOT / "train.py")]
    if processes:
        config = ROOT / "accelerate_configs" / "cpu.yaml"
        words = [str(SCRIPTS / "accelerate"), "launch", "--config_file", str(config)]
        words += ["--num_processes", str(processes), "--main_process_port", "0", str(ROOT / "train.py")]
    return [*words, str(recipe), *overrides]


def run_dir(recipe: Path) -> Path:
    """Folder of the run of a recipe that `write_recipe` wrote."""
    return recipe.parent / "output" / recipe.stem


def tensors(recipe: Path, name: str = "model") -> dict[str, torch.Tensor]:
    """One group of tensors in the newest checkpoint."""
    return load_file(run_dir(recipe) / "last" / "training_state" / f"{name}.safetensors")


def same_bytes(a: Path, b: Path) -> None:
    """Both runs ended with the same tensors and logged the same."""
    names = ("model", "optimizer", "ema", "window")
    files = [f"last/training_state/{n}.safetensors" for n in names]
    for file in (*files, "last/pretrained_model/model.safetensors", "metrics.jsonl"):
        assert (run_dir(a) / file).read_bytes() == (run_dir(b) / file).read_bytes(), file


def assert_close(a: Path, b: Path, tolerance: float) -> None:
    """Same weights up to summation order: relative to how far training moved them from their initial values."""
    ours, theirs = tensors(a), tensors(b)
    distance = torch.cat([(ours[n] - theirs[n]).flatten() for n in ours if n != "latent_mean"]).norm()
    size = torch.cat([theirs[n].flatten() for n in theirs if n != "latent_mean"]).norm()
    assert distance / size < tolerance


def metrics(recipe: Path) -> list[dict]:
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir(recipe) / "metrics.jsonl").read_text().splitlines()]
