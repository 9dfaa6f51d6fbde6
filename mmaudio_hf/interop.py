"""Training checkpoints of the reference implementation to run folders, and back.

    {"it", "weights", "optimizer", "scheduler", "ema"}      <exp>_ckpt_last.pth
    weights alone                                           <exp>_last.pth, <exp>_ema_final.pth, mmaudio_*.pth
    {"ema_model.<name>", "_extra_state"}                    <profile>.<update>.pt, an EMA snapshot

Tensors keep their bits in both directions. What one side does not know is left out: the reference's generator state,
and our running metrics. Everything random differs between the two programs, so an imported run sees other noise and
another order of the data than it would have seen there.
"""

import errno
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmaudio_hf.config import OptimConfig, Recipe, load_recipe, save_recipe, to_dict
from mmaudio_hf.data.sampler import NOISE_VERSION
from mmaudio_hf.models.convert import infer_config, reference_order, trainable
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.pretrained import WEIGHTS_FILE, find_pretrained, read_network
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
from mmaudio_hf.training.finetune import comfyui_adapter, published_state, trainable_model, without_derived
from mmaudio_hf.training.optim import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from mmaudio_hf.weights import check_state, load_state, read_file, write_safetensors

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
EMA_PREFIX = "ema_model."
SNAPSHOT_NAME = re.compile(r"(\d+)\.(\d+)\.pt")


@dataclass(frozen=True)
class Imported:
    """Result of an import."""

    folder: Path  # the checkpoint
    step: int
    notes: tuple[str, ...]  # where the file and the recipe disagree without harm to the import


# --- Import ----------------------------------------------------------------------------------------------------------


def import_checkpoint(
    file: Path,
    recipe: Recipe,
    snapshots: Path | None = None,
    write_extras: Callable[[Path], None] = lambda folder: None,
) -> Imported:
    """Write a released flow model or a training checkpoint as a checkpoint of `recipe`, from which training resumes.

    Weights alone start at step 0 with fresh moments and EMA. `step` of a training checkpoint is the number of updates
    in its scheduler and optimizer, not `it`: a file that was saved inside iteration `it` holds `it + 1` of them, and
    each resume of the reference repeats one. `snapshots` is a folder of EMA snapshots to import as well, and
    `write_extras` adds files to `pretrained_model/`. ValueError naming the file and what does not fit.
    """
    if list_checkpoints(recipe.run_dir):
        raise ValueError(f"{recipe.run_dir} holds checkpoints: import into a new folder")
    if recipe.optim.moments == "8bit":
        raise ValueError("optim.moments=8bit cannot take the moments of another trainer: set optim.moments=float32")
    content = read_file(file)
    weights = load_state(file, key="weights")
    model = trainable_model(recipe, infer_config(weights, file), weights, file)
    ema = PostHocEMA(model, recipe.ema.sigma_rels, recipe.ema.update_every)
    optimizer, notes, step, skipped = build_optimizer(model, recipe.optim), [], 0, 0
    metadata: dict[str, Any] = {"depends_on": {"noise": NOISE_VERSION}}  # on which data it was trained is not known
    if isinstance(content, Mapping) and isinstance(content.get("optimizer"), Mapping):
        try:
            moments, updates = _moments(content["optimizer"], list(weights), model, file)
            load_optimizer_tensors(model, optimizer, moments)
            # The scheduler counts skipped updates too.
            step = operator.index((content.get("scheduler") or {}).get("last_epoch", updates))
            if (skipped := step - updates) < 0:
                raise ValueError(f"{file}: its scheduler has made {step} steps, its optimizer {updates}: it is damaged")
            metadata["reference"] = {"it": operator.index(content.get("it", step)), "step": step}
            notes = _differences(content, recipe.optim)
            if isinstance(content.get("ema"), Mapping):
                _load_ema(ema, content["ema"], model, file)
        except (TypeError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(f"{file} is not a training checkpoint of the reference ({error!r})") from error
    if step > recipe.training.steps:
        raise ValueError(f"{file} has {step} updates, training.steps of the recipe is {recipe.training.steps}")
    snapshot_files, later = _snapshot_files(snapshots, recipe, ema.step) if snapshots is not None else ([], [])
    if later:
        names = ", ".join(later[:3]) + (f" and {len(later) - 3} more" if len(later) > 3 else "")
        notes.append(f"snapshots of later updates than {ema.step}, that of {file}, are left out: {names}")
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, recipe.run_dir / "config.yaml")
    for profile, update, path in tqdm(snapshot_files, "snapshots", unit="file", disable=None, leave=False):
        _import_snapshot(path, update, recipe.ema.sigma_rels[profile], model, recipe.run_dir / "ema")
    sigma, ema_weights = ema.nearest(recipe.ema.sigma_rel)
    published = {"weights": "ema", "sigma_rel": sigma, "step": step}
    metadata |= {"skipped": skipped, "ema_step": ema.step, "recipe": to_dict(recipe), "weights": published}
    tensors = {
        "model": model.state_dict(),
        "optimizer": optimizer_tensors(model, optimizer),
        "ema": ema.tensors(),
        "window": {"sums": torch.zeros(3 + 2 * len(recipe.data.train))},  # running metrics: nothing to log yet
    }
    publish = partial(write_pretrained, recipe, ema_weights, published, write_extras)
    folder = save_checkpoint(recipe.run_dir, TrainingState(step, tensors, metadata), publish)
    return Imported(folder, step, tuple(notes))


def _moments(
    optimizer: Mapping[str, Any], weight_names: Sequence[str], model: MMAudio, file: Path
) -> tuple[dict[str, torch.Tensor], int]:
    """Optimizer state by tensor name, and its number of updates.

    The file numbers the trainable tensors in the order in which they were registered; that is the order of its
    weights, as long as nobody has sorted them.
    """
    ours = list(model.state_dict())
    names = [name for name in weight_names if name in ours]
    if names not in (reference_order(ours), ours):
        raise ValueError(f"{file}: its weights are not in their original order: optimizer state cannot be assigned")
    names = trainable(names)
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(groups, list) or not isinstance(state, Mapping) or len(groups) != 1:
        raise ValueError(f"{file}: its optimizer is not an AdamW with one group of tensors")
    if state and sorted(state) != list(range(len(names))):
        raise ValueError(f"{file}: its optimizer has {len(state)} tensors, the network {len(names)} trainable ones")
    tensors: dict[str, torch.Tensor] = {}
    for index, entry in state.items():
        if set(entry) != set(ADAMW_STATE):
            kinds = ", ".join(ADAMW_STATE)
            raise ValueError(f"{file}: its optimizer keeps {', '.join(sorted(entry))}, AdamW {kinds}")
        values = {kind: torch.as_tensor(entry[kind], dtype=torch.float32) for kind in ADAMW_STATE}
        tensors |= {f"{kind}.{names[index]}": value for kind, value in values.items()}
    updates = {int(value) for key, value in tensors.items() if key.startswith("step.")}
    if len(updates) > 1:
        raise ValueError(f"{file}: its optimizer has updated some tensors {min(updates)} times, others {max(updates)}")
    return tensors, updates.pop() if updates else 0


def _differences(content: Mapping[str, Any], optim: OptimConfig) -> list[str]:
    """Settings of the optimizer that differ from the recipe, which takes precedence."""
    group = content["optimizer"]["param_groups"][0]
    ours = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    ours["initial_lr"] = optim.learning_rate
    notes = []
    for name, value in ours.items():
        theirs = tuple(group[name]) if isinstance(group.get(name), list) else group.get(name, value)
        if theirs != value:
            notes.append(f"the file was trained with {name} {theirs}, the recipe says {value}, which now holds")
    return notes


def _load_ema(ema: PostHocEMA, stored: Mapping[str, Any], model: MMAudio, file: Path) -> None:
    """Load the weights `ema_models.<i>.ema_model.<name>` and counters of the recipe's profiles, in their order."""
    count = len(ema.profiles)
    numbers = sorted({int(name.split(".")[1]) for name in stored if re.match(r"ema_models\.\d+\.", name)})
    if numbers != list(range(count)):
        raise ValueError(f"{file} has {len(numbers)} EMA profiles, ema.sigma_rels of the recipe {count}: set them")
    tensors: dict[str, torch.Tensor] = {}
    steps = set()
    for i in numbers:
        prefix = f"ema_models.{i}."
        profile = {n.removeprefix(prefix): value for n, value in stored.items() if n.startswith(prefix)}
        ema_weights, step = _ema_weights(profile, model, file)
        tensors |= {f"{i}.{name}": value for name, value in ema_weights.items()}
        steps.add(step)
    if len(steps) > 1:
        raise ValueError(f"{file}: its EMA profiles have different counters, {sorted(steps)}: it is damaged")
    ema.load_tensors(tensors, steps.pop())


def _ema_weights(profile: Mapping[str, Any], model: MMAudio, file: Path) -> tuple[dict[str, torch.Tensor], int]:
    """EMA weights by name and the counter of one profile, from a checkpoint or from a snapshot."""
    prefixed = {n.removeprefix(EMA_PREFIX): value for n, value in profile.items() if n.startswith(EMA_PREFIX)}
    ema_weights = without_derived(prefixed)
    check_state(ema_weights, model.state_dict(), file)
    counter = profile.get("_extra_state", profile)  # the ema_pytorch package has a tensor `step` instead
    if "step" not in counter:
        raise ValueError(f"{file}: its EMA has no counter `step`")
    return ema_weights, int(counter["step"])


def _snapshot_files(folder: Path, recipe: Recipe, last: int) -> tuple[list[tuple[int, int, Path]], list[str]]:
    """Snapshots in a folder up to the update `last`, each with its profile and update; and the names of later ones."""
    matches = [match for path in sorted(folder.glob("*.pt")) if (match := SNAPSHOT_NAME.fullmatch(path.name))]
    files = [(int(match[1]), int(match[2]), folder / match.string) for match in matches]
    if not files:
        raise ValueError(f"{folder} holds no EMA snapshots called PROFILE.UPDATE.pt")
    if unknown := next((path for profile, _, path in files if profile >= len(recipe.ema.sigma_rels)), None):
        raise ValueError(f"{unknown} is of a profile that ema.sigma_rels of the recipe does not name")
    kept = [file for file in files if file[1] <= last]
    if not kept:
        raise ValueError(f"{folder} holds only snapshots of updates after {last}, that of the checkpoint")
    return kept, [path.name for _, update, path in files if update > last]


def _import_snapshot(path: Path, update: int, sigma_rel: float, model: MMAudio, folder: Path) -> None:
    if not isinstance(content := read_file(path), Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an EMA snapshot")
    ema_weights, step = _ema_weights(content, model, path)
    if step != update:
        raise ValueError(f"{path} is of update {step}, not of {update} as it is called: give it the right name")
    ema = PostHocEMA(model, [sigma_rel])
    ema.load_tensors({f"0.{name}": value for name, value in ema_weights.items()}, step)
    ema.save_snapshots(folder)


# --- Export ----------------------------------------------------------------------------------------------------------


def export_run(run_dir: Path, out: Path, step: int | None = None, log: Callable[[str], None] = print) -> list[Path]:
    """Write a run as the files of the reference into `out`; return their paths.

    `<name>_ckpt_last.pth` resumes there, `<name>_last.pth` has the raw weights and `<name>_ema_final.pth` the published
    ones, `ema/<profile>.<update>.pt` are all snapshots. The newest checkpoint is taken, or that of `step`. `it` is the
    number of steps done, so that the reference continues with the next one; right after an import it is the imported
    one. Of a `pretrained_model` folder, `<folder>.pth` has the weights. ValueError where the run cannot be read or a
    file is already there.
    """
    if not (run_dir / "config.yaml").is_file():
        if step is not None:
            raise ValueError(f"{run_dir} is not a run folder, so it has no step {step}: leave --step out")
        config, network, file = read_network(run_dir)
        with torch.device("meta"):
            expected = MMAudio(config).state_dict()
        check_state(network, expected, file)
        return _write_files({f"{run_dir.name}.pth": lambda: _in_order(network, reference_order(expected))}, out)
    recipe = load_recipe(run_dir / "config.yaml")
    folder = None if step is None else checkpoint_folder(run_dir, step)
    state = latest_training_state(run_dir, log) if folder is None else load_training_state(folder)
    if state is None:
        raise ValueError(f"{run_dir} has no checkpoint yet")
    with torch.device("meta"):
        names = reference_order(MMAudio(recipe.model).state_dict())
    published = checkpoint_folder(run_dir, state.step) / "pretrained_model" / WEIGHTS_FILE
    raw = published_state(state.tensors["model"], recipe.finetune.lora)
    # What each file holds is made when it is written: one at a time in memory.
    contents: dict[str, Callable[[], Any]] = {
        f"{recipe.name}_last.pth": lambda: _in_order(raw, names),
        f"{recipe.name}_ema_final.pth": lambda: _in_order(load_state(published), names),
    }
    if recipe.finetune.freeze or recipe.finetune.lora.rank:
        log("note: only a part of the network is trained, so there is nothing that could resume there, nor snapshots")
    elif recipe.optim.moments == "8bit":
        log("note: moments of 8 bits cannot be resumed there: the weights alone are exported")
    else:
        contents[f"{recipe.name}_ckpt_last.pth"] = lambda: _training_checkpoint(recipe, state, names)
        for snapshot in find_snapshots(run_dir / "ema", lambda _, reason: log(f"warning: {reason}; it is left out")):
            name = f"{recipe.ema.sigma_rels.index(snapshot.sigma_rel)}.{snapshot.step}.pt"
            contents[f"ema/{name}"] = partial(_snapshot, snapshot, names)
    return _write_files(contents, out)


def _write_files(contents: Mapping[str, Callable[[], Any]], out: Path) -> list[Path]:
    """Write what the functions return; each file appears when it is complete. ValueError when one is there already."""
    paths = [out / name for name in contents]
    if present := next((path for path in paths if path.exists()), None):
        raise ValueError(f"{present} exists: choose another folder")
    bar = tqdm(zip(paths, contents.values(), strict=True), "export", len(paths), unit="file", disable=None, leave=False)
    for path, make in bar:
        path.parent.mkdir(parents=True, exist_ok=True)
        content, incomplete = make(), path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            if path.suffix == ".safetensors":
                write_safetensors(content, incomplete, {"format": "pt"})
            else:
                torch.save(content, incomplete)
            incomplete.replace(path)
        except RuntimeError as error:  # how the writer of torch.save says that a file cannot grow
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        finally:
            incomplete.unlink(missing_ok=True)
    return paths


def export_safetensors(run_dir: Path, out: Path, step: int | None = None) -> list[Path]:
    """Write the published weights as one file under the released names, in bfloat16, and the adapter as another.

    `<name>_bf16.safetensors` has any adapter merged and takes the place of a converted release, as ComfyUI's nodes for
    MMAudio load them. `<name>_lora.safetensors`, of runs with finetune.lora, has the keys of ComfyUI's own loader of
    LoRA: `diffusion_model.LAYER.lora_A.weight`, `.lora_B.weight`, `.alpha`, and of DoRA `.dora_scale`.
    ValueError where the run has no checkpoint, or a file is already there.
    """
    folder = checkpoint_folder(run_dir, step) if step is not None else find_pretrained(run_dir).parent
    recipe = load_recipe(run_dir / "config.yaml")
    with torch.device("meta"):
        names = reference_order(MMAudio(recipe.model).state_dict())
    state = load_state(folder / "pretrained_model" / WEIGHTS_FILE)
    contents = {f"{recipe.name}_bf16.safetensors": lambda: {n: state[n].to(torch.bfloat16) for n in names}}
    if (folder / "adapter").is_dir():
        contents[f"{recipe.name}_lora.safetensors"] = lambda: comfyui_adapter(folder / "adapter")
    return _write_files(contents, out)


def _in_order(tensors: Mapping[str, torch.Tensor], names: Sequence[str], prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: tensors[name] for name in names}


def _training_checkpoint(recipe: Recipe, state: TrainingState, names: Sequence[str]) -> dict[str, Any]:
    optimizer, scheduler = _optimizer_and_scheduler(recipe, state.step, len(trainable(names)))
    if moments := state.tensors["optimizer"]:
        each = [{kind: moments[f"{kind}.{name}"] for kind in ADAMW_STATE} for name in trainable(names)]
        optimizer["state"] = dict(enumerate(each))
    imported = state.metadata.get("reference", {})
    ema: dict[str, Any] = {}
    for i in range(len(recipe.ema.sigma_rels)):
        ema[f"ema_models.{i}._extra_state"] = _counter(state.metadata["ema_step"])
        ema |= {f"ema_models.{i}.{EMA_PREFIX}{name}": state.tensors["ema"][f"{i}.{name}"] for name in names}
    return {
        "it": imported["it"] if imported.get("step") == state.step else state.step,
        "weights": _in_order(state.tensors["model"], names),
        "optimizer": optimizer,
        "scheduler": scheduler,
        "ema": ema,
    }


def _counter(step: int) -> dict[str, Any]:
    return {"initted": step > 0, "step": step}


def _snapshot(snapshot: Snapshot, names: Sequence[str]) -> dict[str, Any]:
    return {"_extra_state": _counter(snapshot.step), **_in_order(load_state(snapshot.tensors), names, EMA_PREFIX)}


def _optimizer_and_scheduler(recipe: Recipe, step: int, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dicts of AdamW over `count` tensors, without moments, and of warm-up then schedule, after `step` steps.

    torch's own objects give the layout. The counters are set and not counted: 300,000 calls of `step` take seconds.
    """
    optim, schedulers = recipe.optim, torch.optim.lr_scheduler

    def rate(at: int) -> float:
        return learning_rate(at, optim, recipe.training.steps)

    tensors = torch.nn.ParameterList(torch.zeros(1) for _ in range(count))
    optimizer = build_optimizer(tensors, optim)
    warmup = schedulers.LambdaLR(optimizer, lambda i: (i + 1) / (optim.warmup_steps + 1))
    later: schedulers.LRScheduler
    if optim.schedule == "step":
        later = schedulers.MultiStepLR(optimizer, list(optim.milestones), optim.gamma)
    else:
        later = schedulers.LambdaLR(optimizer, lambda i: rate(i + optim.warmup_steps) / optim.learning_rate)
    both = schedulers.SequentialLR(optimizer, [warmup, later], [optim.warmup_steps])
    state = both.state_dict()
    first, second = state["_schedulers"]
    state |= {"last_epoch": step, "_last_lr": [rate(step)]}
    done = max(0, min(step, optim.warmup_steps - 1))  # the warm-up's own steps; then the second scheduler takes over
    first |= {"last_epoch": done, "_step_count": done + 1, "_last_lr": [rate(done)]}
    after = step - optim.warmup_steps
    if after >= 0:
        second |= {"last_epoch": after, "_step_count": after + 1, "_last_lr": [rate(step)]}
    optimizer_state = optimizer.state_dict()
    optimizer_state["param_groups"][0]["lr"] = rate(step)
    return optimizer_state, state
