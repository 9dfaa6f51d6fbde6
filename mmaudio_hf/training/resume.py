"""Taking up a run where its newest checkpoint left it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmaudio_hf.config import Recipe, to_dict
from mmaudio_hf.training.checkpoint import TrainingState, list_checkpoints
from mmaudio_hf.training.ema import find_snapshots


def check_same_run(recipe: Recipe, state: TrainingState, say: Callable[[str], None]) -> None:
    """ValueError where the recipe no longer fits the checkpoint; a note where it continues differently."""
    facts = state.facts
    if state.step > recipe.training.steps:
        raise ValueError(f"{recipe.run_dir} has trained {state.step} steps, training.steps is {recipe.training.steps}")
    now = identity(recipe)
    for name, was in facts.get("must_match", {}).items():  # an imported checkpoint has none
        if now["must_match"][name] != was:
            raise ValueError(
                f"{recipe.run_dir} was trained with {name} {was}, the recipe has {now['must_match'][name]}: put it"
                " back, or give the new run another name"
            )
    for name, was in facts.get("may_change", {}).items():
        if now["may_change"][name] != was:
            say(f"note: {name} was {was} and is {now['may_change'][name]} from here on")


def identity(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What of a recipe a checkpoint depends on, as plain JSON values."""
    plain = to_dict(recipe)
    return {
        "must_match": {
            "model": plain["model"],
            "finetune": plain["finetune"],
            "ema.sigma_rels": plain["ema"]["sigma_rels"],
            "ema.update_every": plain["ema"]["update_every"],
        },
        "may_change": {
            "seed": plain["seed"],
            "training.batch_size": plain["training"]["batch_size"],
            "data.train": plain["data"]["train"],
            "flow": plain["flow"],
            "optim": plain["optim"],
        },
    }


def set_aside_later(run_dir: Path, step: int, ema_step: int) -> None:
    """Put away what belongs to a future that is trained anew: later (damaged) checkpoints and EMA snapshots.

    Checkpoints are renamed, not deleted. Leftovers of killed writers go.
    """
    for folder in list_checkpoints(run_dir):
        if int(folder.name.removeprefix("step_")) > step:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
    for partial in (run_dir / "checkpoints").glob("step_*.partial"):
        shutil.rmtree(partial)
    for snapshot in find_snapshots(run_dir / "ema"):
        if snapshot.step > ema_step:
            snapshot.tensors.unlink()


def truncate_metrics(path: Path, step: int) -> list[dict[str, float]]:
    """Drop the lines that a killed run logged after `step`, which will be logged again; return the others."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break  # a line cut short by the kill
        # At step 0 only the validation before training is logged, and a run without checkpoint repeats it.
        if entry["step"] <= step and step > 0:
            kept.append(entry)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    partial.replace(path)
    return kept
