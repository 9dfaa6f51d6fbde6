"""`pretrained_model/`: the folder that generation and the Hub read."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmaudio_hf.config import Recipe, load_recipe
from mmaudio_hf.models.network import FROZEN_TENSORS, MMAudio
from mmaudio_hf.training.checkpoint import latest_training_state
from mmaudio_hf.training.ema import find_snapshots, synthesize
from mmaudio_hf.training.finetune import published_state, save_adapter


def published_network(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> MMAudio:
    """The network with `tensors`, which are named as in the training of `recipe`: an adapter is merged."""
    return MMAudio.from_config_and_state(recipe.model, published_state(tensors, recipe.finetune.lora), "these weights")


def write_pretrained(
    recipe: Recipe,
    tensors: Mapping[str, torch.Tensor],
    weights: Mapping[str, Any],
    write_extras: Callable[[Path], None],
    folder: Path,
) -> None:
    """Fill `folder` with the network of `tensors` and what `write_extras` adds.

    `weights` says in weights.json which weights of the run they are. An adapter that was trained goes to `adapter/`
    beside the folder as well.
    """
    published_network(recipe, tensors).save_pretrained(folder)
    if recipe.finetune.lora.rank:
        save_adapter(tensors, recipe, folder.with_name("adapter"))
    (folder / "weights.json").write_text(json.dumps(weights) + "\n")
    write_extras(folder)


def publish_average(
    run_dir: Path,
    sigma_rel: float,
    step: int | None,
    out: Path,
    write_extras: Callable[[Path], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write `out/pretrained_model/` with the average of width `sigma_rel` as of training step `step`; return its facts.

    It is made of the EMA snapshots of the run; `step` None takes the last of them. ValueError where there are none, or
    `out` exists, or the average does not.
    """
    recipe = load_recipe(run_dir / "config.yaml")
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder")
    if not 0 < sigma_rel < 0.28:
        raise ValueError(f"sigma_rel {sigma_rel} must be between 0 and 0.28")
    snapshots, state = find_snapshots(run_dir / "ema"), latest_training_state(run_dir, say)
    if not snapshots or state is None:
        raise ValueError(f"{run_dir} has no EMA snapshots and checkpoint yet: train at least ema.snapshot_every steps")
    last = max(snapshot.step for snapshot in snapshots) + recipe.ema.start
    step = last if step is None else step
    if not recipe.ema.start < step <= last:
        raise ValueError(f"{run_dir} has averages of the steps {recipe.ema.start + 1} to {last}, not of {step}")
    model = state.tensors["model"]
    frozen = {name: model[name] for name in FROZEN_TENSORS}
    averages = synthesize(snapshots, sigma_rel, step - recipe.ema.start, frozen)
    weights = {"weights": "ema", "sigma_rel": sigma_rel, "step": step}
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "pretrained_model").mkdir(parents=True)
    write_pretrained(recipe, {**model, **averages}, weights, write_extras, partial / "pretrained_model")
    partial.rename(out)
    return weights
