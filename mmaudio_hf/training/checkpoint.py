"""The files of a checkpoint: what is published (`pretrained_model/`) and what resumes (`training_state/`).

    <run>/checkpoints/step_N/pretrained_model/   config.json, model.safetensors, weights.json, encoder files
    <run>/checkpoints/step_N/training_state/     model, optimizer and EMA tensors, state.json with their checksums
    <run>/last                                   link to the newest complete checkpoint
    <run>/best                                   link to the best one by `training.best_metric`, if that is set

A checkpoint is written to a temporary folder and renamed when it is complete, so a kill or a full disk never leaves
half of one under a valid name. One that it replaces is `step_N.old` meanwhile, and is used while there is no `step_N`.
Everything random in training is a function of (seed, step), so no generator state is saved.

Where the tensors of a run are sharded over its processes (FSDP), each of them writes its shards to files of its own,
and state.json has the full shapes. Reading either kind gives full tensors.
"""

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmaudio_hf.files import fsync_path, sha256_of
from mmaudio_hf.training.distributed import TensorGroups
from mmaudio_hf.weights import write_safetensors

STATE_FILE = "state.json"
TENSOR_FILES = ("model", "optimizer", "ema", "window")
FULL, SHARDED = 1, 2  # versions of state.json
CHECKPOINT = re.compile(r"step_(\d+)(\.old)?")
OTHER = "resume from another checkpoint"
_KINDS = {"step": int, "facts": dict, "recipe": dict, "depends_on": dict, "ema_step": int, "skipped": int}
WAIT_SECONDS = 1800.0  # that the first process, done with its shards, waits for those of the others

Shapes = Mapping[str, Mapping[str, Sequence[int]]]  # full shapes of the sharded ones, by file


@dataclass(frozen=True)
class RankShards:
    """Which shards of a checkpoint a process writes."""

    folder: Path  # training_state/ in the temporary folder, which the first process has made
    rank: int
    world_size: int
    full_shapes: Shapes

    def file(self, group: str) -> Path:
        """The file for the shards of a group."""
        return self.folder / shard_file(group, self.rank, self.world_size)

    def signal_file(self, rank: int) -> Path:
        """By which process `rank` tells the first one that its shards are written, or why they are not."""
        return self.folder / f"rank_{rank}_of_{self.world_size}.json"


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to resume: tensors of each file by name, and plain values."""

    step: int
    tensors: TensorGroups  # one entry per name of TENSOR_FILES
    metadata: Mapping[str, Any]  # "facts" in state.json


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return run_dir / "checkpoints" / f"step_{step}"


def checkpoint_step(folder: Path) -> int:
    """Step of a folder that `list_checkpoints` returned."""
    return int(folder.name.removeprefix("step_").removesuffix(".old"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; `step_N.old` where a kill came before another took its place."""
    names = sorted((path.name for path in (run_dir / "checkpoints").glob("step_*")), reverse=True)
    by_step = {int(match[1]): match.string for match in map(CHECKPOINT.fullmatch, names) if match}  # step_N is last
    return [run_dir / "checkpoints" / by_step[step] for step in sorted(by_step)]


def point_at(run_dir: Path, name: str, folder: Path | None) -> None:
    """Let the link `name` ("last" or "best") of a run point at a checkpoint, or remove it."""
    if (run_dir / name).is_dir() and not (run_dir / name).is_symlink():
        raise ValueError(f"{run_dir / name} is a folder and no link, as some tools copy them: remove it")
    link = run_dir / f"{name}.partial"
    link.unlink(missing_ok=True)
    if folder is None:
        (run_dir / name).unlink(missing_ok=True)
        return
    link.symlink_to(folder.relative_to(run_dir), target_is_directory=True)
    link.replace(run_dir / name)
    fsync_path(folder.parent)
    fsync_path(run_dir)


def prune(run_dir: Path, newest: int, every: int) -> None:
    """Remove all checkpoints except the `newest` ones, those of steps that `every` divides (0: none), and the best."""
    best = (run_dir / "best").resolve().name
    for folder in list_checkpoints(run_dir)[:-newest]:
        if folder.name != best and not (every and checkpoint_step(folder) % every == 0):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a checkpoint, so that a kill on the way leaves nothing under its name."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.removed.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


# --- Writing ---------------------------------------------------------------------------------------------------------


def begin_sharded(run_dir: Path, step: int) -> Path:
    """Make the folder in which all processes write a checkpoint, before any of them does; return its training_state/.

    Its name is new, since another machine may have cached the contents of an earlier one. What an earlier attempt at
    this step left is removed.
    """
    folder = checkpoint_folder(run_dir, step)
    for left in folder.parent.glob(f"{folder.name}.*partial"):
        shutil.rmtree(left, ignore_errors=True)
    training = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial") / "training_state"
    training.mkdir(parents=True)
    return training


def discard(partial: Path) -> None:
    """Remove an incomplete checkpoint that cannot be finished; other processes then find no folder to write to."""
    with suppress(OSError):  # the next start removes it
        _remove(partial)


def save_checkpoint(
    run_dir: Path, state: TrainingState, write_pretrained: Callable[[Path], None], shards: RankShards | None = None
) -> Path:
    """Write a checkpoint and point `last` at it; return its folder.

    `write_pretrained` fills the `pretrained_model/` folder it is given. With sharded tensors, `shards` is that of the
    first process, which calls this while the others call `save_local_shards`; `state` then has its shards.
    OSError naming the folder when the disk fails or is full, for any process; earlier checkpoints are then untouched.
    """
    folder = checkpoint_folder(run_dir, state.step)
    partial = folder.with_name(folder.name + ".partial")
    if shards is not None:
        partial = shards.folder.parent
    else:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, state, write_pretrained, shards)
        old = folder.with_name(folder.name + ".old")
        if folder.exists():  # the same step again: with the scores of its evaluation, or after a resume
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        point_at(run_dir, "last", folder)
        shutil.rmtree(old, ignore_errors=True)  # what is left of it is removed at the next start
    except (OSError, SafetensorError) as error:
        discard(partial)
        good = run_dir / "last"
        kept = f"the last good one is {good.resolve().name}" if good.exists() else "there is none before it"
        raise OSError(f"{folder} could not be written ({error}); {kept}") from error
    return folder


def _write(partial: Path, state: TrainingState, publish: Callable[[Path], None], shards: RankShards | None) -> None:
    training = partial / "training_state"
    training.mkdir(parents=True, exist_ok=shards is not None)
    sharded: Shapes = {} if shards is None else shards.full_shapes
    checksums: dict[str, str] = {}
    for group in TENSOR_FILES:
        names = state.tensors[group].keys() - sharded.get(group, {}).keys()
        checksums |= _save_tensors(training / f"{group}.safetensors", state.tensors[group], names)
    record = {"version": FULL, "step": state.step, "facts": dict(state.metadata), "sha256": checksums}
    if shards is not None:
        checksums |= write_local_shards(shards, state.tensors) | wait_for_shards(shards)
        record |= {"version": SHARDED, "shards": {"count": shards.world_size, "shapes": sharded}}
    (training / STATE_FILE).write_text(json.dumps(record, indent=1) + "\n")
    (partial / "pretrained_model").mkdir()
    publish(partial / "pretrained_model")
    for path in sorted(partial.rglob("*")):
        fsync_path(path)
    fsync_path(partial)


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], names: Collection[str]) -> dict[str, str]:
    write_safetensors({name: value for name, value in tensors.items() if name in names}, path)
    return {path.name: sha256_of(path)}


# --- Sharded tensors: each process writes its own, the first one waits for all ---------------------------------------


def shard_file(group: str, rank: int, world_size: int) -> str:
    """Name of the file that process `rank` writes its shards of a group to."""
    return f"{group}.rank_{rank}_of_{world_size}.safetensors"


def write_local_shards(shards: RankShards, tensors: TensorGroups) -> dict[str, str]:
    """Write the shards of this process, until they are on the disk; checksums by the name of the file."""
    checksums: dict[str, str] = {}
    for group, shapes in shards.full_shapes.items():
        checksums |= _save_tensors(shards.file(group), tensors[group], shapes.keys())
        fsync_path(shards.file(group))
    return checksums


def save_local_shards(shards: RankShards, tensors: TensorGroups) -> None:
    """Write the shards of a process that is not the first, and signal to that one that they are there, or an error.

    OSError when not even the signal can be written.
    """
    try:
        _signal(shards, {"sha256": write_local_shards(shards, tensors)})
    except Exception as error:
        with suppress(OSError):  # on a full disk the signal needs the space of what was written
            for group in shards.full_shapes:
                shards.file(group).unlink(missing_ok=True)
        if shards.folder.exists():  # else the first process has given up already, and reports why
            _signal(shards, {"error": str(error) or repr(error)})
        if not isinstance(error, (OSError, SafetensorError)):
            raise


def _signal(shards: RankShards, message: Mapping[str, Any]) -> None:
    path = shards.signal_file(shards.rank)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(message))
    fsync_path(partial)
    partial.replace(path)


def wait_for_shards(shards: RankShards) -> dict[str, str]:
    """Wait for all other processes and remove their signals; checksums of their files by name.

    OSError naming a process that failed, with its reason, or that is not done after `WAIT_SECONDS`.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    checksums: dict[str, str] = {}
    missing = set(range(1, shards.world_size))
    while missing:
        for rank in [rank for rank in missing if shards.signal_file(rank).exists()]:
            message = json.loads(shards.signal_file(rank).read_text())
            if "error" in message:
                raise OSError(f"process {rank} failed: {message['error']}")
            checksums |= message["sha256"]
            missing.remove(rank)
        if missing and time.monotonic() > deadline:
            raise OSError(f"process {min(missing)} has not written its shards in {WAIT_SECONDS:g} s")
        time.sleep(0.05 if missing else 0)
    for rank in range(1, shards.world_size):
        shards.signal_file(rank).unlink()
    return checksums


# --- Reading ---------------------------------------------------------------------------------------------------------


def latest_training_state(
    run_dir: Path,
    warn: Callable[[str], None],
    until: int | None = None,
    share: tuple[int, int] = (0, 1),
    agree: Callable[[str | None], str | None] = lambda problem: problem,
) -> TrainingState | None:
    """The newest state that loads, of those at step `until` or before, or None when there is no such checkpoint.

    A damaged checkpoint is reported through `warn` and the one before it is tried; ValueError when all are damaged.
    Processes that each verify a `share` of the files exchange by `agree` what one of them has found.
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
        raise ValueError(f"no checkpoint of {run_dir} can be read: move the folder away to start again")
    return None


def load_training_state(folder: Path, share: tuple[int, int] = (0, 1)) -> TrainingState:
    """Open the training state of the checkpoint in `folder`; each tensor is read when it is accessed.

    Checksums are verified first. Of n processes that all read, each may verify the files of its `share`, (rank, n).
    ValueError naming the file when one is missing, damaged or from another version.
    """
    training = folder / "training_state"
    try:
        record = json.loads((training / STATE_FILE).read_text())
        version, step, metadata, checksums = (record[key] for key in ("version", "step", "facts", "sha256"))
        checksums = dict(checksums)
        # Over how many processes tensors are sharded, and the full shapes of these by group.
        sharding: dict[str, Any] = record["shards"] if version == SHARDED else {"count": 0, "shapes": {}}
        world_size, shapes = int(sharding["count"]), dict[str, dict[str, list[int]]]()
        if version == SHARDED and not 0 < world_size < len(checksums):  # a loop over 10**15 names would never end
            raise ValueError(f"{world_size} processes cannot have written {len(checksums)} files")
        for group in [group for group in TENSOR_FILES if group in sharding["shapes"]]:
            shapes[group] = {name: [int(n) for n in shape] for name, shape in sharding["shapes"][group].items()}
        for name, value in {"step": step, "facts": metadata, **metadata}.items():
            if type(value) is not _KINDS.get(name, type(value)):
                raise TypeError(f"{name} is {repr(value)[:40]}")
        _ = "recipe" in metadata and metadata["ema_step"]  # a run has both
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{training / STATE_FILE} cannot be read ({error}): {OTHER}") from error
    if version not in (FULL, SHARDED):
        raise ValueError(f"{training} has version {version}, this program reads {FULL} and {SHARDED}")
    full = {group: training / f"{group}.safetensors" for group in TENSOR_FILES}
    shards = {g: [training / shard_file(g, rank, world_size) for rank in range(world_size)] for g in shapes}
    _verify([*full.values(), *(path for paths in shards.values() for path in paths)], checksums, share)
    tensors = {g: StoredTensors(path, shards.get(g, ()), shapes.get(g, {})) for g, path in full.items()}
    return TrainingState(step, tensors, metadata)


def _verify(paths: list[Path], checksums: Mapping[str, str], share: tuple[int, int]) -> None:
    damaged = f"is missing or damaged (its checksum differs): {OTHER}"
    for path in paths:
        if not path.is_file() or path.name not in checksums:
            raise ValueError(f"{path} {damaged}")
    rank, processes = share
    for path in sorted(paths, key=lambda path: (-path.stat().st_size, path.name))[rank::processes]:
        try:
            intact = sha256_of(path) == checksums[path.name]
        except OSError as error:  # of the disk
            raise ValueError(f"{path} cannot be read ({error}): {OTHER}") from error
        if not intact:
            raise ValueError(f"{path} {damaged}")


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of one group, each read when it is accessed, as a copy, and concatenated where it is sharded.

    ValueError naming the file when one cannot be read or does not hold what it should.
    """

    def __init__(self, full: Path, shards: Sequence[Path], full_shapes: Mapping[str, Sequence[int]]):
        self._full, self._shards = _open(full), [_open(path) for path in shards]
        self._sharded = set(full_shapes)
        self._names = dict.fromkeys([*self._full.keys(), *full_shapes])
        for name, shape in full_shapes.items():
            try:
                shapes = [file.get_slice(name).get_shape() for file in self._shards]
            except SafetensorError as error:
                raise ValueError(f"{full.parent} lacks a shard of {name} ({error}): {OTHER}") from error
            rows = sum(sum(each[:1]) for each in shapes)  # tensors are sharded along their first dimension
            if [rows, *shape[1:]] != list(shape) or any(each[1:] != list(shape[1:]) for each in shapes):
                raise ValueError(f"{full.parent}: shards {shapes} of {name} do not make {list(shape)}: {OTHER}")

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._sharded:
            return torch.cat([file.get_tensor(name) for file in self._shards])
        if name not in self._names:
            raise KeyError(name)
        return self._full.get_tensor(name).clone()  # a view of the file would keep it on the disk once it is removed

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open(path: Path) -> Any:  # safe_open has no type stubs
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {OTHER}") from error
