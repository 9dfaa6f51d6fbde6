"""Checkpoints of a run: what is published (`pretrained_model/`) and what resumes (`training_state/`).

    <run>/checkpoints/step_N/pretrained_model/   config.json, model.safetensors, weights.json, encoder files
    <run>/checkpoints/step_N/training_state/     model, optimizer and EMA tensors, state.json with their checksums
    <run>/last                                   link to the newest complete checkpoint
    <run>/best                                   link to the best one by `training.best_metric`, if that is set

A checkpoint is written beside its place and renamed when it is complete, so a kill or a full disk never leaves half of
one under a valid name. One that it replaces stands aside meanwhile, as `step_N.old`, and counts where there is no
`step_N`. Everything random in training is a function of (seed, step), so no generator state is saved.

Where the tensors of a run are shared out over its processes (FSDP), each of them writes its slices to files of its own
(`shards`), and state.json has the whole shapes; what is read of either kind are whole tensors.
"""

import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmaudio_hf.data.layout import fsync_path

STATE_FILE = "state.json"
TENSOR_FILES = ("model", "optimizer", "ema", "window")
WHOLE, SHARED_OUT = 1, 2  # versions of state.json: the second has files of slices besides
CHECKPOINT = re.compile(r"step_(\d+)(\.old)?")


OTHER = "resume from another checkpoint"
WAIT_SECONDS = 1800.0  # that the first process, done with its slices, leaves the others for theirs

Groups = Mapping[str, Mapping[str, torch.Tensor]]
Shapes = Mapping[str, Mapping[str, Sequence[int]]]  # whole shapes of the tensors that are shared out, by group


@dataclass(frozen=True)
class Part:
    """Which part of a checkpoint a process writes."""

    folder: Path  # training_state/ of the attempt, which the first process has made
    rank: int
    count: int
    shapes: Shapes

    def file(self, group: str) -> Path:
        """The file for the slices of a group."""
        return self.folder / slice_file(group, self.rank, self.count)


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to go on: tensors of each file by name, and plain facts."""

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]  # one entry per name of TENSOR_FILES
    facts: Mapping[str, Any]


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return run_dir / "checkpoints" / f"step_{step}"


def begin_attempt(run_dir: Path, step: int) -> Path:
    """Make the folder in which all processes write a checkpoint, before any of them does; return its training_state/.

    Its name is new, since another machine may remember what had an earlier one. What an earlier attempt at this step
    left goes.
    """
    folder = checkpoint_folder(run_dir, step)
    for left in folder.parent.glob(f"{folder.name}.*partial"):
        shutil.rmtree(left, ignore_errors=True)
    training = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial") / "training_state"
    training.mkdir(parents=True)
    return training


def give_up(partial: Path) -> None:
    """Remove what there is of a checkpoint that cannot be written; other processes find no folder to write to then."""
    with suppress(OSError):  # the next start removes it
        _remove(partial)


def save_checkpoint(
    run_dir: Path, state: TrainingState, write_pretrained: Callable[[Path], None], part: Part | None = None
) -> Path:
    """Write a checkpoint and point `last` at it; return its folder.

    `write_pretrained` fills the `pretrained_model/` folder it is given. `part`, where processes share out the tensors,
    is that of the first one, which calls this while the others call `save_local_shards`; `state` then has its slices.
    OSError naming the folder when the disk fails or is full, for one of the others too; what was saved before is then
    untouched.
    """
    folder = checkpoint_folder(run_dir, state.step)
    partial = folder.with_name(folder.name + ".partial")
    if part is not None:
        partial = part.folder.parent
    else:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, state, write_pretrained, part)
        old = folder.with_name(folder.name + ".old")
        if folder.exists():  # the same step again: with the scores of its evaluation, or after a resume
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        point_at(run_dir, "last", folder)
        shutil.rmtree(old, ignore_errors=True)  # what stays of it goes at the next start
    except (OSError, SafetensorError) as error:
        give_up(partial)
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


def _write(partial: Path, state: TrainingState, write_pretrained: Callable[[Path], None], part: Part | None) -> None:
    training = partial / "training_state"
    training.mkdir(parents=True, exist_ok=part is not None)
    shapes, checksums = {} if part is None else part.shapes, {}
    for name in TENSOR_FILES:
        path, cut = training / f"{name}.safetensors", shapes.get(name, {})
        save_file({k: value.detach().contiguous() for k, value in state.tensors[name].items() if k not in cut}, path)
        checksums[path.name] = sha256(path)
    record = {"version": WHOLE, "step": state.step, "facts": dict(state.facts), "sha256": checksums}
    if part is not None:
        checksums |= write_local_shards(part, state.tensors) | wait_for_shards(part)
        record |= {"version": SHARED_OUT, "shards": {"count": part.count, "shapes": shapes}}
    (training / STATE_FILE).write_text(json.dumps(record, indent=1) + "\n")
    (partial / "pretrained_model").mkdir()
    write_pretrained(partial / "pretrained_model")
    for path in sorted(partial.rglob("*")):
        fsync_path(path)
    fsync_path(partial)


def point_at(run_dir: Path, name: str, folder: Path | None) -> None:
    """Let the link `name` ("last" or "best") of a run point at a checkpoint, or remove it."""
    link = run_dir / f"{name}.partial"
    link.unlink(missing_ok=True)
    if folder is None:
        (run_dir / name).unlink(missing_ok=True)
        return
    link.symlink_to(folder.relative_to(run_dir), target_is_directory=True)
    link.replace(run_dir / name)
    fsync_path(folder.parent)
    fsync_path(run_dir)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; `step_N.old` where a kill came before another took its place."""
    names = sorted((path.name for path in (run_dir / "checkpoints").glob("step_*")), reverse=True)
    found = {int(match[1]): match.string for match in map(CHECKPOINT.fullmatch, names) if match}  # step_N is the last
    return [run_dir / "checkpoints" / found[step] for step in sorted(found)]


def checkpoint_step(folder: Path) -> int:
    """Step of a folder that `list_checkpoints` found."""
    return int(folder.name.removeprefix("step_").removesuffix(".old"))


def load_training_state(folder: Path, share: tuple[int, int] = (0, 1)) -> TrainingState:
    """Read the training state of the checkpoint in `folder`; its tensors are read when they are asked for.

    Checksums are verified before. Of n processes that all read, each may verify the files of its `share`, (rank, n).
    ValueError naming the file when one is missing, damaged or from another version.
    """
    training = folder / "training_state"
    try:
        record = json.loads((training / STATE_FILE).read_text())
        version, step, facts, checksums = (record[key] for key in ("version", "step", "facts", "sha256"))
        count, shapes = _shards(record, len(checksums := dict(checksums)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{training / STATE_FILE} cannot be read ({error}): {OTHER}") from error
    if version not in (WHOLE, SHARED_OUT):
        raise ValueError(f"{training} has version {version}, this program reads {WHOLE} and {SHARED_OUT}")
    whole = {name: training / f"{name}.safetensors" for name in TENSOR_FILES}
    slices = {name: [training / slice_file(name, rank, count) for rank in range(count)] for name in shapes}
    _verify([*whole.values(), *(path for paths in slices.values() for path in paths)], checksums, share)
    tensors = {n: StoredTensors(path, slices.get(n, ()), shapes.get(n, {})) for n, path in whole.items()}
    return TrainingState(step, tensors, facts)


def _shards(record: Mapping[str, Any], files: int) -> tuple[int, dict[str, dict[str, list[int]]]]:
    """How many processes share out the tensors of a checkpoint, and the whole shapes of these by group."""
    if record["version"] != SHARED_OUT:
        return 0, {}
    count, shapes = int(record["shards"]["count"]), record["shards"]["shapes"]
    if not 0 < count < files:
        raise ValueError(f"{count} processes cannot have written {files} files")
    groups = [name for name in TENSOR_FILES if name in shapes]
    return count, {group: {name: [int(n) for n in shape] for name, shape in shapes[group].items()} for group in groups}


def _verify(paths: list[Path], checksums: Mapping[str, str], share: tuple[int, int]) -> None:
    """ValueError naming a file that is missing, or one of the share that cannot be read or has another checksum."""
    damaged = f"is missing or damaged (its checksum differs): {OTHER}"
    for path in paths:
        if not path.is_file() or path.name not in checksums:
            raise ValueError(f"{path} {damaged}")
    rank, processes = share
    for path in sorted(paths, key=lambda path: (-path.stat().st_size, path.name))[rank::processes]:
        try:
            found = sha256(path)
        except OSError as error:  # of the disk
            raise ValueError(f"{path} cannot be read ({error}): {OTHER}") from error
        if found != checksums[path.name]:
            raise ValueError(f"{path} {damaged}")


def latest_training_state(
    run_dir: Path,
    warn: Callable[[str], None],
    until: int | None = None,
    share: tuple[int, int] = (0, 1),
    agree: Callable[[str | None], str | None] = lambda problem: problem,
) -> TrainingState | None:
    """The newest state that loads, of those at step `until` or before, or None when there is no such checkpoint.

    A damaged checkpoint is reported through `warn` and the one before it is tried; ValueError when all are damaged.
    Processes that each verify a `share` of the files tell each other by `agree` what one of them has found.
    """
    folders = [f for f in list_checkpoints(run_dir) if until is None or checkpoint_step(f) <= until]
    for folder in reversed(folders):
        state = problem = None
        try:
            state = load_training_state(folder, share)
        except ValueError as error:
            problem = str(error)
        if (problem := agree(problem)) is None:
            return state
        warn(problem)
    if folders:
        raise ValueError(f"no checkpoint of {run_dir} can be read: move the folder away to start anew")
    return None


# --- Training state that the processes of a run share out ------------------------------------------------------------


def slice_file(group: str, rank: int, count: int) -> str:
    """Name of the file that process `rank` of `count` writes the slices of a group to."""
    return f"{group}.rank_{rank}_of_{count}.safetensors"


def _note(part: Part, rank: int) -> Path:
    return part.folder / f"rank_{rank}_of_{part.count}.json"


# --- writing -------------------------------------------------------------------------------------------------------


def write_local_shards(part: Part, tensors: Groups) -> dict[str, str]:
    """Write the slices of this process, until they are on the disk; checksums by the name of the file."""
    checksums = {}
    for group, shapes in part.shapes.items():
        path = part.file(group)
        save_file({name: tensors[group][name].detach().contiguous() for name in shapes}, path)
        fsync_path(path)
        checksums[path.name] = sha256(path)
    return checksums


def save_local_shards(part: Part, tensors: Groups) -> None:
    """Write the slices of a process that is not the first, and leave word for that one, of a failure too.

    OSError when not even that can be written.
    """
    try:
        _signal(part, {"sha256": write_local_shards(part, tensors)})
    except Exception as error:
        with suppress(OSError):  # what was written may take the room that the word needs
            for group in part.shapes:
                part.file(group).unlink(missing_ok=True)
        if part.folder.exists():  # else the first process has given up before, and says why
            _signal(part, {"error": str(error) or repr(error)})
        if not isinstance(error, (OSError, SafetensorError)):
            raise


def _signal(part: Part, word: Mapping[str, Any]) -> None:
    place = _note(part, part.rank)
    partial = place.with_suffix(".partial")
    partial.write_text(json.dumps(word))
    fsync_path(partial)
    partial.replace(place)


def wait_for_shards(part: Part, seconds: float | None = None) -> dict[str, str]:
    """Wait for all other processes; checksums of their files by name. Their word is removed.

    OSError naming a process that failed, with its reason, or that is not done after `seconds` (`WAIT_SECONDS`).
    """
    seconds = WAIT_SECONDS if seconds is None else seconds
    deadline, checksums = time.monotonic() + seconds, {}
    missing = set(range(1, part.count))
    while missing:
        for rank in [rank for rank in missing if _note(part, rank).exists()]:
            word = json.loads(_note(part, rank).read_text())
            if "error" in word:
                raise OSError(f"process {rank} failed: {word['error']}")
            checksums |= word["sha256"]
            missing.remove(rank)
        if missing and time.monotonic() > deadline:
            raise OSError(f"process {min(missing)} has not written its slices in {seconds:g} s")
        time.sleep(0.05 if missing else 0)
    for rank in range(1, part.count):
        _note(part, rank).unlink()
    return checksums


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading -------------------------------------------------------------------------------------------------------


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of one group, each read when it is asked for, as a copy, and put together where it lies in slices.

    ValueError naming the file when one cannot be read or does not hold what it should.
    """

    def __init__(self, whole: Path, slices: Sequence[Path], shapes: Mapping[str, Sequence[int]]):
        self._whole, self._slices = _open(whole), [_open(path) for path in slices]
        self._shapes = {name: list(shape) for name, shape in shapes.items()}
        self._names = dict.fromkeys([*self._whole.keys(), *self._shapes])
        for name, shape in self._shapes.items():
            try:
                found = [file.get_slice(name).get_shape() for file in self._slices]
            except SafetensorError as error:
                raise ValueError(f"{whole.parent} lacks a slice of {name} ({error}): {OTHER}") from error
            rows = sum(sum(part[:1]) for part in found)
            if [rows, *shape[1:]] != shape or any(part[1:] != shape[1:] for part in found):
                raise ValueError(f"{whole.parent}: slices {found} of {name} do not make {shape}: {OTHER}")

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._shapes:
            return torch.cat([file.get_tensor(name) for file in self._slices])
        if name not in self._names:
            raise KeyError(name)
        return self._whole.get_tensor(name).clone()  # a view of the file would keep it on the disk when it is removed

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {OTHER}") from error
