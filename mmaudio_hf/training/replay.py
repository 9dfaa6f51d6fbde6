"""One step of a run once more, alone: all it depends on but the weights is a function of (seed, step, slot)."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mmaudio_hf.config import Recipe
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training.checkpoint import latest_training_state
from mmaudio_hf.training.loop import Run, make_accelerator


def replay_step(
    recipe: Recipe, network: MMAudio, mixture: Mixture, step: int, *, advance: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Figures of the update that followed `step` completed ones, as in its autopsy; nothing in the run is changed.

    The weights are those of the last checkpoint at `step` or before (of `network`, where there is none), or with
    `advance` those that training on to `step` makes of them. When the gradient is not finite though every loss is,
    each sample is tried alone and becomes a suspect if its own gradient is not. ValueError for a step beyond the run.
    """
    if not 0 <= step < recipe.training.steps:
        raise ValueError(f"step {step} is not one of 0 to {recipe.training.steps - 1}, the steps of {recipe.name}")
    state = latest_training_state(recipe.run_dir, say, until=step)
    processes = state.facts.get("processes", 1) if state else 1
    # The micro batches of all processes, one after the other: the same samples together, the same memory.
    accumulation = recipe.training.accumulation_steps * processes
    training = replace(recipe.training, accumulation_steps=accumulation, trackers=(), best_metric="")
    accelerator = make_accelerator(replace(recipe, training=training))
    run = Run(replace(recipe, training=training), network, mixture, None, (), lambda folder: None, accelerator)
    run.guard.on_skip = lambda trace: say(f"step {trace.step} is refused, as it was")
    if state is not None:
        run.load(state)
    run.prepare()
    if advance and run.step < step:
        say(f"training from step {run.step} to {step}")
        with run.loader(step) as loader:
            for batches in loader:
                run.update(batches)
                run.guard.check()
    weights_of, run.step = run.step, step
    with run.loader(step + 1) as loader:
        trace = run.gradients(next(loader), torch.zeros_like(run.window))
        figures = {"weights_of_step": weights_of} | run.autopsy(trace)
    if not figures["suspects"] and not math.isfinite(figures["gradient_norm"]):
        figures["suspects"] = [s["id"] for s in figures["samples"] if not _has_finite_gradient(run, s["slot"])]
    return figures


def _has_finite_gradient(run: Run, slot: int) -> bool:
    """Whether the gradient of one sample of the present step, alone, is finite."""
    with run.loader(run.step + 1, [np.array([slot])]) as loader:
        trace = run.gradients(next(loader), torch.zeros_like(run.window))
    return bool(trace.total_norm.isfinite())
