"""Checkpoints of a run: what is published (`pretrained_model/`) and what resumes (`training_state/`).

    <run>/checkpoints/step_N/pretrained_model/   config.json, model.safetensors, weights.json, encoder files
    <run>/checkpoints/step_N/training_state/     model, optimizer and EMA tensors, state.json with their checksums
    <run>/last                                   link to the newest complete checkpoint
    <run>/best                                   link to the best one by `training.best_metric`, if that is set

A checkpoint is written beside its place and renamed when it is complete, so a kill or a full disk never leaves half of
one under a valid name. One that it replaces stands aside meanwhile, as `step_N.old`, and counts where there is no
`step_N`. Everything random in training is a function of (seed, step), so no generator state is saved.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

STATE_FILE = "state.json"
TENSOR_FILES = ("model", "optimizer", "ema", "window")
STATE_VERSION = 1
CHECKPOINT = re.compile(r"step_(\d+)(\.old)?")


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to go on: tensors of each file by name, and plain facts."""

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]  # one entry per name of TENSOR_FILES
    facts: Mapping[str, Any]


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return run_dir / "checkpoints" / f"step_{step}"


def save_checkpoint(run_dir: Path, state: TrainingState, write_pretrained: Callable[[Path], None]) -> Path:
    """Write a checkpoint and point `last` at it; return its folder.

    `write_pretrained` fills the `pretrained_model/` folder it is given. OSError naming the folder when the disk fails
    or is full; what was saved before is then untouched.
    """
    folder = checkpoint_folder(run_dir, state.step)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, state, write_pretrained)
        old = folder.with_name(folder.name + ".old")
        if folder.exists():  # the same step again: with the scores of its evaluation, or after a resume
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        point_at(run_dir, "last", folder)
        shutil.rmtree(old, ignore_errors=True)  # what stays of it goes at the next start
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        good = run_dir / "last"
        kept = f"the last good one is {good.resolve().name}" if good.exists() else "there is none before it"
        raise OSError(f"{folder} could not be written ({error}); {kept}") from error
    return folder


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `newest`, those of steps that `every` divides, and the best."""

    newest: int
    every: int = 0  # 0: none

    def prune(self, run_dir: Path) -> None:
        """Remove the others; the best is what the link `best` points at."""
        best = (run_dir / "best").resolve().name
        for folder in list_checkpoints(run_dir)[: -self.newest]:
            step = checkpoint_step(folder)
            if folder.name != best and not (self.every and step % self.every == 0):
                _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a checkpoint, so that a kill on the way leaves nothing under its name."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.removed.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _write(partial: Path, state: TrainingState, write_pretrained: Callable[[Path], None]) -> None:
    training = partial / "training_state"
    training.mkdir(parents=True)
    checksums = {}
    for name in TENSOR_FILES:
        path = training / f"{name}.safetensors"
        save_file({key: value.detach().contiguous() for key, value in state.tensors[name].items()}, path)
        checksums[path.name] = _sha256(path)
    record = {"version": STATE_VERSION, "step": state.step, "facts": dict(state.facts), "sha256": checksums}
    (training / STATE_FILE).write_text(json.dumps(record, indent=1) + "\n")
    (partial / "pretrained_model").mkdir()
    write_pretrained(partial / "pretrained_model")
    for path in sorted(partial.rglob("*")):
        sync(path)
    sync(partial)


def sync(path: Path) -> None:
    """Until what was written to a file, or renamed in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point_at(run_dir: Path, name: str, folder: Path | None) -> None:
    """Let the link `name` ("last" or "best") of a run point at a checkpoint, or remove it."""
    link = run_dir / f"{name}.partial"
    link.unlink(missing_ok=True)
    if folder is None:
        (run_dir / name).unlink(missing_ok=True)
        return
    link.symlink_to(folder.relative_to(run_dir), target_is_directory=True)
    link.replace(run_dir / name)
    sync(folder.parent)
    sync(run_dir)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; `step_N.old` where a kill came before another took its place."""
    names = sorted((path.name for path in (run_dir / "checkpoints").glob("step_*")), reverse=True)
    found = {int(match[1]): match.string for match in map(CHECKPOINT.fullmatch, names) if match}  # step_N is the last
    return [run_dir / "checkpoints" / found[step] for step in sorted(found)]


def checkpoint_step(folder: Path) -> int:
    """Step of a folder that `list_checkpoints` found."""
    return int(folder.name.removeprefix("step_").removesuffix(".old"))


def load_training_state(folder: Path) -> TrainingState:
    """Read the training state of the checkpoint in `folder`.

    ValueError naming the file when one is missing, damaged or from another version.
    """
    training = folder / "training_state"
    try:
        record = json.loads((training / STATE_FILE).read_text())
        version, step, facts, checksums = (record[key] for key in ("version", "step", "facts", "sha256"))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{training / STATE_FILE} cannot be read ({error}): resume from another checkpoint") from error
    if version != STATE_VERSION:
        raise ValueError(f"{training} has version {version}, this program reads {STATE_VERSION}")
    tensors = {}
    for name in TENSOR_FILES:
        path = training / f"{name}.safetensors"
        if not path.is_file() or _sha256(path) != checksums.get(path.name):
            raise ValueError(f"{path} is missing or damaged (its checksum differs): resume from another checkpoint")
        tensors[name] = load_file(path)
    return TrainingState(step, tensors, facts)


def latest_training_state(run_dir: Path, warn: Callable[[str], None], until: int | None = None) -> TrainingState | None:
    """The newest state that loads, of those at step `until` or before, or None when there is no such checkpoint.

    A damaged checkpoint is reported through `warn` and the one before it is tried; ValueError when all are damaged.
    """
    folders = [f for f in list_checkpoints(run_dir) if until is None or checkpoint_step(f) <= until]
    for folder in reversed(folders):
        try:
            return load_training_state(folder)
        except ValueError as error:
            warn(str(error))
    if folders:
        raise ValueError(f"no checkpoint of {run_dir} can be read: move the folder away to start anew")
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
