"""Resuming a run from its newest checkpoint, with the same recipe or a changed one, by one launch at a time."""

import fcntl
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator

from mmaudio_hf.config import Recipe, save_recipe, to_dict
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.sampler import NOISE_VERSION
from mmaudio_hf.schema import LOCK_FILE
from mmaudio_hf.training import checkpoint
from mmaudio_hf.training.distributed import check_same_everywhere, check_visible_everywhere, first_error
from mmaudio_hf.training.ema import find_snapshots, set_aside
from mmaudio_hf.training.logs import truncate_lines

# What the tensors of a checkpoint depend on: it cannot change at all.
FIXED = ("model", "finetune", "optim.moments", "ema.sigma_rels", "ema.update_every")
# What leaves the weights as they would have been, up to the order of sums. Any other key is taken to alter training.
HARMLESS = (
    *("name", "output_dir", "resume", "encoders", "extraction", "sampling", "samples", "evaluation", "card", "hub"),
    *("ema.snapshot_every", "ema.sigma_rel"),
    *("data.validation", "data.test", "data.prefetch_batches", "data.read_threads"),
    *("data.cache_dir", "data.cache_gb", "data.connections", "data.connection_wait"),
    *("training.accumulation_steps", "training.log_every", "training.validate_every", "training.trackers"),
    "training.tracker_project",
    *("training.checkpoint_every", "training.keep_checkpoints", "training.keep_every", "training.max_skipped_steps"),
    *("training.activation_checkpointing", "training.compile", "training.early_stopping"),
    *("training.best_metric", "training.best_mode", "training.validation_combinations", "training.validation_items"),
)
# The modules whose code makes the numbers of a run.
CODE = (
    *("schema.py", "data/loader.py", "data/mixture.py", "data/sampler.py", "data/store.py"),
    *("models/blocks.py", "models/flow.py", "models/network.py"),
    *("training/ema.py", "training/finetune.py", "training/loop.py", "training/optim.py", "training/step.py"),
    *("training/distributed.py", "training/validation.py"),
)


def dependencies(mixture: Mixture, validation: Mixture | None, device: torch.device) -> dict[str, Any]:
    """What the numbers of a run depend on besides its recipe, by name, for state.json; see docs/training.md."""
    splits = {"train": mixture, "validation": validation}
    stores = {
        f"data.{name}.{i}": store.identity | {"duration": split.buckets[split.bucket_of[i]].duration}
        for name, split in splits.items()
        if split is not None
        for i, store in enumerate(split.stores)
    }
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rounding = {"torch": torch.__version__, "numpy": np.__version__, "device": processor}
    return {**stores, "noise": NOISE_VERSION, "code": code_hash(), "rounding": rounding}


def code_hash() -> str:
    """SHA-256 of the lines of `CODE`, except comments and empty ones."""
    digest = hashlib.sha256()
    for name in CODE:
        lines = (Path(__file__).parents[1] / name).read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        digest.update("\n".join([name, *kept, ""]).encode())
    return digest.hexdigest()


def find_checkpoint(
    recipe: Recipe, depends_on: Mapping[str, Any], accelerator: Accelerator, lock: "RunLock", allow_changes: bool
) -> checkpoint.TrainingState | None:
    """What to resume from, None for a new run; called on every process. Nothing is written: first everything must fit.

    depends_on: what `dependencies` returned.

    ValueError, on every process, when another launch trains the run, the processes do not agree on recipe, data and
    checkpoints, or the recipe does not fit the checkpoint.
    """
    run_dir = recipe.run_dir
    acquire_everywhere(lock, accelerator)
    for folder in (run_dir / name for name in ("checkpoints", "ema", "samples", "trackers")):
        if folder.exists() and not folder.is_dir():  # else snapshots are given up one by one, as on a full disk
            raise ValueError(f"{folder} is a file, and the run needs a folder there: move it away")
    if recipe.resume != "auto" and (run_dir / "checkpoints").exists():
        raise ValueError(f"{run_dir} holds checkpoints and resume is 'never': choose another name or resume=auto")
    check_same_everywhere(
        flat_settings(to_dict(recipe))
        | {_name(key, recipe): value for key, value in depends_on.items() if key != "rounding"}
        | {f"the list of checkpoints in {run_dir}": [path.name for path in checkpoint.list_checkpoints(run_dir)]}
    )
    if recipe.resume != "auto":
        return None
    share = (accelerator.process_index, accelerator.num_processes)
    state = checkpoint.latest_training_state(run_dir, accelerator.print, share=share, agree=first_error)
    if state is not None:
        check_same_run(recipe, depends_on, state, allow_changes, accelerator.print)
    return state


def open_run_dir(
    recipe: Recipe, accelerator: Accelerator, lock: "RunLock", step: int, ema_step: int, best: int | None
) -> list[dict[str, Any]]:
    """Bring the run folder to the state at `step` and write the recipe into it; the lines of metrics.jsonl, on the
    main process."""
    accelerator.wait_for_everyone()  # nobody changes the folder while another process still reads
    history: list[dict[str, Any]] = []
    if accelerator.is_main_process:
        history = drop_later(recipe.run_dir, step, ema_step, best)
        recipe.run_dir.mkdir(parents=True, exist_ok=True)
    acquire_everywhere(lock, accelerator)  # again: a folder that was not there could not be locked
    if accelerator.is_main_process:
        partial = recipe.run_dir / "config.yaml.partial"
        save_recipe(recipe, partial)
        partial.replace(recipe.run_dir / "config.yaml")
    accelerator.wait_for_everyone()
    check_visible_everywhere(recipe.run_dir / "config.yaml")
    return history


# --- Whether a recipe is that of the checkpoint ----------------------------------------------------------------------


def check_same_run(
    recipe: Recipe,
    depends_on: Mapping[str, Any],
    state: checkpoint.TrainingState,
    allow_changes: bool,
    log: Callable[[str], None],
) -> None:
    """Show what differs from the run of the checkpoint as `- key: old`, `+ key: new`: settings and `dependencies`.

    Harmless changes are logged and used from here on. ValueError for one that alters training, unless `allow_changes`,
    and for one that the tensors of the checkpoint depend on.
    """
    if state.step > recipe.training.steps:
        raise ValueError(f"{recipe.run_dir} has trained {state.step} steps, training.steps is {recipe.training.steps}")
    old, new, before = state.metadata.get("recipe"), to_dict(recipe), recorded_dependencies(state.metadata)
    contents = [[d[k].get("content") for k in d if k.startswith("data.train.")] for d in (before, depends_on)]
    if old and contents[0] == contents[1] and None not in contents[0]:  # the same stores, wherever they lie now
        pairs = zip(old["data"]["train"], new["data"]["train"], strict=True)
        old = {**old, "data": old["data"] | {"train": [a | {"path": b["path"]} for a, b in pairs]}}
    defaults = flat_settings(to_dict(Recipe(name="default")))  # of a key that one side lacks
    was, now = ({**defaults, **flat_settings(tree or {})} for tree in (old, new))
    changed = [key for key in {**now, **was} if old and was.get(key) != now.get(key)]
    changes = {key: f"  - {key}: {was.get(key)}\n  + {key}: {now.get(key)}" for key in changed}
    for key, text in changed_dependencies(before, depends_on, recipe).items():
        # Who names another store for validation means it; another one under the same name is a trap.
        if not (key.startswith("data.validation.") and "data.validation" in changed):
            changes[key] = text
    # Only this schedule depends on where the run ends.
    harmless = HARMLESS if recipe.optim.schedule == "poly" else (*HARMLESS, "training.steps")
    fixed = [key for key in changes if _within(key, FIXED)]
    altering = [key for key in changes if key in depends_on or not _within(key, (*FIXED, *harmless))]
    altering = [key for key in altering if key != "rounding"]  # as between numbers of processes
    listed = "\n".join(changes[key] for key in (*fixed, *altering))
    if fixed:
        raise ValueError(
            f"{recipe.run_dir} was trained with other settings, which its checkpoints depend on: put {fixed[0]} back,"
            f" or give the new run another name\n{listed}"
        )
    if altering and not allow_changes:
        raise ValueError(
            f"{recipe.run_dir} was trained with other settings, data or code: put them back, give the new run another"
            f" name, or resume with the new ones by --allow-changes\n{listed}"
        )
    if changes:
        log(f"what differs from step {state.step} on:\n" + "\n".join(changes.values()))


def recorded_dependencies(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of `dependencies`; those before 2026-11 have only the contents of some stores."""
    if "depends_on" in metadata:
        return dict(metadata["depends_on"])
    contents = {f"data.train.{i}": {"content": content} for i, content in enumerate(metadata.get("stores", ()))}
    return contents | {"noise": 1}


def changed_dependencies(old: Mapping[str, Any], new: Mapping[str, Any], recipe: Recipe) -> dict[str, str]:
    """Lines for each of `dependencies` that differs, by its key. A store that one side lacks is a changed setting."""
    lines = {}
    for key in [key for key in new if key in old and _differ(old[key], new[key])]:
        name = _name(key, recipe)
        lines[key] = f"  - {name}: {_words(old[key], new[key])}\n  + {name}: {_words(new[key], old[key])}"
    return lines


def _differ(old: Any, new: Any) -> bool:
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return old != new
    return any(_differ(old[key], new[key]) for key in old.keys() & new.keys() if old[key] is not None)


def _name(key: str, recipe: Recipe) -> str:
    """What a message calls a dependency; settings keep their names."""
    section, _, index = key.rpartition(".")
    if section in ("data.train", "data.validation"):
        return f"{key} ({getattr(recipe.data, section[5:])[int(index)].path})"
    return {"noise": "random inputs of a seed", "code": "code of the numbers"}.get(key, key)


def _words(value: Any, other: Any) -> str:
    """A dependency for a message, of encoders those that the `other` side has otherwise; hashes are cut."""
    if not isinstance(value, Mapping):
        return value[:12] if isinstance(value, str) else f"version {value}"
    if "content" not in value:
        return ", ".join(f"{name} {text}" for name, text in value.items())
    theirs = other.get("encoders", {})
    encoders = {name: text for name, text in value.get("encoders", {}).items() if theirs.get(name, text) != text}
    words = [f"{value['rows']} rows"] if "rows" in value else []
    if {"duration"} <= value.keys() & other.keys() and value["duration"] != other["duration"]:
        words.append(f"clips of {value['duration']} s")
    words += [f"content {value['content'][:12]}", *(f"{name} encoder {text}" for name, text in encoders.items())]
    return ", ".join(words)


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a recipe's plain dict by `section.key`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


# --- What a killed run has left --------------------------------------------------------------------------------------


def drop_later(run_dir: Path, step: int, ema_step: int, best: int | None) -> list[dict[str, Any]]:
    """Remove what was written after `step`, which is trained again; return the lines of metrics.jsonl.

    Later checkpoints, which are damaged ones, are renamed and not deleted, as EMA snapshots that are cut short. Later
    EMA snapshots, samples, scores and log lines are deleted, with the temporary files of killed writers. `last` and
    `best` point at what is left.
    """
    for folder in checkpoint.list_checkpoints(run_dir):
        if checkpoint.checkpoint_step(folder) > step:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        elif folder.name.endswith(".old"):
            folder.rename(folder.with_suffix(""))  # the checkpoint that was to replace it was never completed
    for leftover in (*run_dir.glob("checkpoints/step_*.old"), *run_dir.glob("checkpoints/step_*.partial")):
        shutil.rmtree(leftover)
    for partial in run_dir.glob("ema/*.partial"):
        partial.unlink()
    # Not verified: reading all snapshots of a run may take hours. What is synthesised from them verifies them.
    for snapshot in find_snapshots(run_dir / "ema", set_aside, verify=False):
        if snapshot.step > ema_step:
            assert isinstance(snapshot.tensors, Path)
            snapshot.tensors.unlink()
    for folder in run_dir.glob("samples/step_*"):
        number = re.fullmatch(r"step_(\d+)(\.partial)?", folder.name)
        if number and (number[2] or int(number[1]) > step):
            shutil.rmtree(folder)
    for scores in run_dir.glob("evaluation/*_step_*.json*"):  # clips stay: they are identified by their weights
        number = re.search(r"_step_(\d+)[._]", scores.name)
        if number and int(number[1]) > step:
            scores.unlink()
    if run_dir.exists():
        for name, target in (("last", step), ("best", best)):
            folder = checkpoint.checkpoint_folder(run_dir, -1 if target is None else target)
            checkpoint.point_at(run_dir, name, folder if folder.exists() else None)
    truncate_lines(run_dir / "skipped.jsonl", lambda at: at < step)
    # At step 0 only the validation before training is logged, and a run without checkpoint repeats it.
    return truncate_lines(run_dir / "metrics.jsonl", lambda at: at <= step and step > 0)


# --- One launch at a time trains a run -------------------------------------------------------------------------------


LOCK_TIMEOUT = 20.0  # s in which the processes of a launch that was just killed should end


class RunLock(AbstractContextManager["RunLock"]):
    """Lock of a run folder, held from `acquire` until `release` or the process ends in any way.

    `warn` gets a message where the file system has no locks; the run then continues without.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None]):
        self.run_dir, self.warn = run_dir, warn
        self._file: IO[str] | None = None

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Lock the folder, if it exists. ValueError when another launch still trains it after `LOCK_TIMEOUT`."""
        if self._file is not None or not self.run_dir.exists():
            return
        self._file = open(self.run_dir / LOCK_FILE, "a")  # noqa: SIM115  (open for as long as the run)
        try:
            if not _lock_file(self._file, LOCK_TIMEOUT):
                self.release()
                way = "wait for its end, or choose another name"
                raise ValueError(f"{self.run_dir} is being trained by another launch: {way}")
        except OSError as error:
            way = "make sure that only one launch trains it"
            self.warn(f"{self.run_dir} has no locks ({error.strerror or error}): {way}")

    def wait_for_release(self, limit: float) -> None:
        """Wait until no other process holds it, at most `limit` seconds; not at all where there are no locks."""
        with open(self.run_dir / LOCK_FILE, "a") as file, suppress(OSError):
            _lock_file(file, limit)

    def release(self) -> None:
        """Let others acquire it. The file stays: two processes could lock two files of one name after removing it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lock_file(file: IO[str], seconds: float) -> bool:
    """Whether the file could be locked within `seconds`. OSError where the file system has no locks."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
        time.sleep(0.1)


def acquire_everywhere(lock: RunLock, accelerator: Accelerator) -> None:
    """Let the main process acquire the lock; ValueError on every process when it cannot."""
    problem = None
    if accelerator.is_main_process:
        try:
            lock.acquire()
        except ValueError as error:
            problem = str(error)
    if problem := first_error(problem):
        raise ValueError(problem)
