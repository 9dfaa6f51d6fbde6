"""Training checkpoints of the reference implementation to run folders, and back (spec networks, sections 4 and 5).

    {"it", "weights", "optimizer", "scheduler", "ema"}      <exp>_ckpt_last.pth
    weights alone                                           <exp>_last.pth, <exp>_ema_final.pth, mmaudio_*.pth
    {"ema_model.<name>", "_extra_state"}                    <profile>.<update>.pt, a snapshot

Tensors keep their bits in both directions. What one side does not know is left out: the reference's generator state,
and our log sums. Everything random differs between the two programs, so an imported run sees other noise and another
order of the data than it would have seen there.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmaudio_hf.config import OptimConfig, Recipe, load_recipe, save_recipe, to_dict
from mmaudio_hf.models.convert import check_sizes, infer_config, reference_order, trainable
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.pretrained import DERIVED_TENSORS, WEIGHTS_FILE
from mmaudio_hf.training.checkpoint import (
    TrainingState,
    checkpoint_folder,
    latest_training_state,
    list_checkpoints,
    load_training_state,
    save_checkpoint,
)
from mmaudio_hf.training.checkpointer import write_pretrained
from mmaudio_hf.training.ema import PostHocEMA, Snapshot, find_snapshots
from mmaudio_hf.training.finetune import published_state
from mmaudio_hf.training.optim import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from mmaudio_hf.weights import check_state, load_state, read_file

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
SNAPSHOT_NAME = re.compile(r"(\d+)\.(\d+)\.pt")


@dataclass(frozen=True)
class Imported:
    """What came of an import."""

    folder: Path  # the checkpoint
    step: int
    notes: tuple[str, ...]  # where the file and the recipe disagree without harm to the import


# --- import --------------------------------------------------------------------------------------------------------


def import_checkpoint(
    file: Path,
    recipe: Recipe,
    snapshots: Path | None = None,
    write_extras: Callable[[Path], None] = lambda folder: None,
) -> Imported:
    """Make `recipe.run_dir` of a released flow network or of a training checkpoint; training then goes on from it.

    Weights alone start at step 0 with fresh moments and averages. `step` of a training checkpoint is the number of
    updates in its scheduler and optimizer, not `it`: a file that was saved inside iteration `it` holds `it + 1` of
    them, and each resume of the reference repeats one. `snapshots` is a folder of EMA snapshots to bring along, and
    `write_extras` adds files to `pretrained_model/`. ValueError naming the file and what does not fit.
    """
    if list_checkpoints(recipe.run_dir):
        raise ValueError(f"{recipe.run_dir} holds checkpoints: import into a new folder")
    content = read_file(file)
    resumable = isinstance(content, Mapping) and isinstance(content.get("optimizer"), Mapping)
    weights = load_state(file, key="weights")
    network = _network(recipe, weights, file)
    ema = PostHocEMA(network, recipe.ema.sigma_rels, recipe.ema.update_every)
    optimizer, notes, step, skipped = build_optimizer(network, recipe.optim), [], 0, 0
    facts: dict[str, Any] = {}
    if resumable:
        moments, updates = _moments(content["optimizer"], list(weights), network, file)
        load_optimizer_tensors(network, optimizer, moments)
        step = _steps(content, updates, file)
        skipped = step - updates
        facts["reference"] = {"it": int(content.get("it", step)), "step": step}
        notes = _differences(content, recipe.optim)
        if isinstance(content.get("ema"), Mapping):
            _load_ema(ema, content["ema"], network, file)
    if step > recipe.training.steps:
        raise ValueError(f"{file} has {step} updates, training.steps of the recipe is {recipe.training.steps}")
    found = _snapshot_files(snapshots, recipe) if snapshots is not None else []
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, recipe.run_dir / "config.yaml")
    for profile, path in found:
        _import_snapshot(path, recipe.ema.sigma_rels[profile], network, recipe.run_dir / "ema")
    facts |= {"skipped": skipped, "ema_step": ema.step, "recipe": to_dict(recipe)}
    folder = _save(recipe, network, optimizer, ema, step, facts, write_extras)
    return Imported(folder, step, tuple(notes))


def _network(recipe: Recipe, weights: Mapping[str, torch.Tensor], file: Path) -> MMAudio:
    found = infer_config(weights, file)
    check_sizes(found, recipe.model, file)
    kept = {name: value for name, value in weights.items() if name not in DERIVED_TENSORS}
    network = MMAudio.from_config_and_state(recipe.model, kept, file)
    for name in ("latent_mean", "latent_std"):
        if not getattr(network, name).isfinite().all():
            raise ValueError(f"{file} has a {name} that is not finite: nothing can be trained with it")
    return network


def _moments(
    optimizer: Mapping, weight_names: Sequence[str], network: MMAudio, file: Path
) -> tuple[dict[str, torch.Tensor], int]:
    """Optimizer state by tensor name, and its number of updates.

    It is stored by the number of a tensor among the trainable ones, in the order in which they were registered; that is
    the order of the file's weights, as long as nobody has sorted them.
    """
    ours = list(network.state_dict())
    names = [name for name in weight_names if name not in DERIVED_TENSORS]
    if names not in (reference_order(ours), ours):
        raise ValueError(
            f"{file}: its weights are not in their original order, so optimizer state cannot be told apart"
        )
    names = trainable(names)
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(groups, list) or not isinstance(state, Mapping) or len(groups) != 1:
        raise ValueError(f"{file}: its optimizer is not an AdamW with one group of tensors")
    if state and sorted(state) != list(range(len(names))):
        raise ValueError(f"{file}: its optimizer has {len(state)} tensors, the network {len(names)} trainable ones")
    tensors = {}
    for index, entry in state.items():
        if set(entry) != set(MOMENTS):
            raise ValueError(f"{file}: its optimizer keeps {', '.join(sorted(entry))}, AdamW {', '.join(MOMENTS)}")
        values = {kind: torch.as_tensor(entry[kind], dtype=torch.float32) for kind in MOMENTS}
        tensors |= {f"{kind}.{names[index]}": value for kind, value in values.items()}
    updates = {int(value) for key, value in tensors.items() if key.startswith("step.")}
    if len(updates) > 1:
        raise ValueError(f"{file}: its optimizer has updated some tensors {min(updates)} times, others {max(updates)}")
    return tensors, updates.pop() if updates else 0


def _steps(content: Mapping, updates: int, file: Path) -> int:
    """Steps made: by the scheduler, which counts refused updates too, else by the optimizer."""
    scheduler = content.get("scheduler")
    steps = int(scheduler["last_epoch"]) if isinstance(scheduler, Mapping) and "last_epoch" in scheduler else updates
    if steps < updates:
        raise ValueError(f"{file}: its scheduler has made {steps} steps, its optimizer {updates}: it is damaged")
    return steps


def _differences(content: Mapping, optim: OptimConfig) -> list[str]:
    """Settings of the optimizer that differ from the recipe, whose settings hold."""
    group = content["optimizer"]["param_groups"][0]
    ours = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    ours["initial_lr"] = optim.learning_rate
    notes = []
    for name, value in ours.items():
        theirs = tuple(group[name]) if isinstance(group.get(name), list) else group.get(name, value)
        if theirs != value:
            notes.append(f"the file was trained with {name} {theirs}, the recipe says {value}, which now holds")
    return notes


def _load_ema(ema: PostHocEMA, stored: Mapping, network: MMAudio, file: Path) -> None:
    """Averages `ema_models.<i>.ema_model.<name>` and their counters, for the profiles of the recipe in their order."""
    found = sorted({int(name.split(".")[1]) for name in stored if re.match(r"ema_models\.\d+\.", name)})
    profiles = list(ema.profiles)
    if found != list(range(len(profiles))):
        raise ValueError(
            f"{file} has {len(found)} EMA profiles, ema.sigma_rels of the recipe {len(profiles)}: set them"
        )
    tensors, steps = {}, set()
    for i in found:
        part = {n.removeprefix(f"ema_models.{i}."): v for n, v in stored.items() if n.startswith(f"ema_models.{i}.")}
        averages, step = _averages(part, network, file)
        tensors |= {f"{i}.{name}": value for name, value in averages.items()}
        steps.add(step)
    if len(steps) > 1:
        raise ValueError(f"{file}: its EMA profiles have different counters, {sorted(steps)}: it is damaged")
    ema.load_tensors(tensors, steps.pop())


def _averages(part: Mapping, network: MMAudio, file: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Averages by name and the counter of one profile, from a checkpoint or from a snapshot."""
    opening = "ema_model."
    averages = {name.removeprefix(opening): value for name, value in part.items() if name.startswith(opening)}
    averages = {name: value for name, value in averages.items() if name not in DERIVED_TENSORS}
    check_state(averages, network.state_dict(), file)
    counter = part.get("_extra_state", part)  # the published EMA package has a tensor `step` instead
    if "step" not in counter:
        raise ValueError(f"{file}: its EMA has no counter `step`")
    return averages, int(counter["step"])


def _snapshot_files(folder: Path, recipe: Recipe) -> list[tuple[int, Path]]:
    found = [(int(match[1]), path) for path in sorted(folder.glob("*.pt")) if (match := SNAPSHOT_NAME.match(path.name))]
    if not found:
        raise ValueError(f"{folder} holds no EMA snapshots called PROFILE.UPDATE.pt")
    if stranger := next((path for profile, path in found if profile >= len(recipe.ema.sigma_rels)), None):
        raise ValueError(f"{stranger} is of a profile that ema.sigma_rels of the recipe does not name")
    return found


def _import_snapshot(path: Path, sigma_rel: float, network: MMAudio, folder: Path) -> None:
    averages, step = _averages(load_snapshot(path), network, path)
    ema = PostHocEMA(network, [sigma_rel])
    ema.load_tensors({f"0.{name}": value for name, value in averages.items()}, step)
    ema.save_snapshots(folder)


def load_snapshot(path: Path) -> Mapping:
    """Content of a snapshot of the reference; ValueError where it is none."""
    content = read_file(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an EMA snapshot")
    return content


def _save(recipe, network, optimizer, ema, step, facts, write_extras) -> Path:
    sigma, averages = ema.nearest(recipe.ema.sigma_rel)
    facts["weights"] = {"weights": "ema", "sigma_rel": sigma, "step": step}
    tensors = {
        "model": network.state_dict(),
        "optimizer": optimizer_tensors(network, optimizer),
        "ema": ema.tensors(),
        "window": {"sums": torch.zeros(3 + 2 * len(recipe.data.train))},  # nothing logged yet
    }

    publish = partial(write_pretrained, recipe, averages, facts["weights"], write_extras)
    return save_checkpoint(recipe.run_dir, TrainingState(step, tensors, facts), publish)


# --- export --------------------------------------------------------------------------------------------------------


def export_run(run_dir: Path, out: Path, step: int | None = None, say: Callable[[str], None] = print) -> list[Path]:
    """Write a run as the files of the reference into `out`; return their paths.

    `<name>_ckpt_last.pth` resumes there, `<name>_last.pth` has the raw weights and `<name>_ema_final.pth` the published
    ones, `ema/<profile>.<update>.pt` are all snapshots. The newest checkpoint is taken, or that of `step`. `it` is the
    number of steps made, so that the reference goes on with the next one; right after an import it is the imported one.
    ValueError where the run cannot be read or a file is already there.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no config.yaml")
    recipe = load_recipe(run_dir / "config.yaml")
    state = (
        latest_training_state(run_dir, say) if step is None else load_training_state(checkpoint_folder(run_dir, step))
    )
    if state is None:
        raise ValueError(f"{run_dir} has no checkpoint yet")
    with torch.device("meta"):
        names = reference_order(MMAudio(recipe.model).state_dict())
    published = checkpoint_folder(run_dir, state.step) / "pretrained_model" / WEIGHTS_FILE
    raw = published_state(state.tensors["model"], recipe.finetune.lora)
    contents: dict[str, Callable[[], Any]] = {
        f"{recipe.name}_last.pth": lambda: _ordered(raw, names),
        f"{recipe.name}_ema_final.pth": lambda: _ordered(load_state(published), names),
    }
    whole = not (recipe.finetune.freeze or recipe.finetune.lora.rank)
    if whole:
        contents[f"{recipe.name}_ckpt_last.pth"] = lambda: _training_checkpoint(recipe, state, names)
    else:
        say("note: only a part of the network is trained, so there is nothing that could resume there, nor snapshots")
    for snapshot in find_snapshots(run_dir / "ema") if whole else []:
        name = f"{recipe.ema.sigma_rels.index(snapshot.sigma_rel)}.{snapshot.step}.pt"
        contents[f"ema/{name}"] = lambda snapshot=snapshot: _snapshot(snapshot, names)
    paths = [out / name for name in contents]
    if present := next((path for path in paths if path.exists()), None):
        raise ValueError(f"{present} exists: choose another folder")
    for path, make in zip(paths, contents.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save(make(), partial)
        partial.replace(path)
    return paths


def _ordered(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in names}


def _training_checkpoint(recipe: Recipe, state: TrainingState, names: Sequence[str]) -> dict[str, Any]:
    optimizer, scheduler = _optimizer_and_scheduler(recipe, state.step, len(trainable(names)))
    moments = state.tensors["optimizer"]
    if moments:
        optimizer["state"] = {
            index: {kind: moments[f"{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
            for index, name in enumerate(trainable(names))
        }
    imported = state.facts.get("reference", {})
    ema: dict[str, Any] = {}
    for i in range(len(recipe.ema.sigma_rels)):
        ema[f"ema_models.{i}._extra_state"] = _counter(state.facts["ema_step"])
        ema |= {f"ema_models.{i}.ema_model.{name}": state.tensors["ema"][f"{i}.{name}"] for name in names}
    return {
        "it": imported["it"] if imported.get("step") == state.step else state.step,
        "weights": _ordered(state.tensors["model"], names),
        "optimizer": optimizer,
        "scheduler": scheduler,
        "ema": ema,
    }


def _counter(step: int) -> dict[str, Any]:
    return {"initted": step > 0, "step": step}


def _snapshot(snapshot: Snapshot, names: Sequence[str]) -> dict[str, Any]:
    averages = load_state(snapshot.tensors)
    return {"_extra_state": _counter(snapshot.step)} | {f"ema_model.{name}": averages[name] for name in names}


def _optimizer_and_scheduler(recipe: Recipe, step: int, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dicts of AdamW over `count` tensors, without moments, and of warm-up then schedule, after `step` steps.

    torch's own objects give the layout, and the counters are set as so many steps would have left them.
    """
    optim, schedulers = recipe.optim, torch.optim.lr_scheduler

    def rate(at: int) -> float:
        return learning_rate(at, optim, recipe.training.steps)

    tensors = torch.nn.ParameterList(torch.zeros(1) for _ in range(count))
    optimizer = build_optimizer(tensors, optim)
    warmup = schedulers.LambdaLR(optimizer, lambda i: (i + 1) / (optim.warmup_steps + 1))
    if optim.schedule == "step":
        later = schedulers.MultiStepLR(optimizer, list(optim.milestones), optim.gamma)
    else:
        later = schedulers.LambdaLR(optimizer, lambda i: rate(i + optim.warmup_steps) / optim.learning_rate)
    both = schedulers.SequentialLR(optimizer, [warmup, later], [optim.warmup_steps])
    state = both.state_dict()
    first, second = state["_schedulers"]
    state |= {"last_epoch": step, "_last_lr": [rate(step)]}
    done = max(0, min(step, optim.warmup_steps - 1))
    first |= {"last_epoch": done, "_step_count": done + 1, "_last_lr": [rate(done)]}
    after = step - optim.warmup_steps
    if after >= 0:
        second |= {"last_epoch": after, "_step_count": after + 1, "_last_lr": [rate(step)]}
    optimizer_state = optimizer.state_dict()
    optimizer_state["param_groups"][0]["lr"] = rate(step)
    return optimizer_state, state
