"""Taking up a run where its newest checkpoint left it, with the same recipe or a changed one."""

import fcntl
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from mmaudio_hf.config import Recipe, to_dict
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import LOCK_FILE
from mmaudio_hf.training.checkpoint import TrainingState, checkpoint_folder, checkpoint_step, list_checkpoints, point_at
from mmaudio_hf.training.distributed import copy_full_tensor
from mmaudio_hf.training.ema import PostHocEMA, find_snapshots
from mmaudio_hf.training.logs import truncate_lines
from mmaudio_hf.training.optim import load_optimizer_tensors, optimizer_tensors
from mmaudio_hf.weights import check_state

# What the tensors of a checkpoint depend on: it cannot change at all.
FIXED = ("model", "finetune", "ema.sigma_rels", "ema.update_every")
# What leaves the weights as they would have been, up to the order of sums. Any other key is taken to alter training.
HARMLESS = (
    *("name", "output_dir", "resume", "encoders", "extraction", "sampling", "samples", "evaluation", "card", "hub"),
    *("ema.snapshot_every", "ema.sigma_rel"),
    *("data.validation", "data.test", "data.prefetch_batches", "data.read_threads"),
    *("training.accumulation_steps", "training.log_every", "training.validate_every", "training.trackers"),
    *("training.checkpoint_every", "training.keep_checkpoints", "training.keep_every", "training.max_skipped_steps"),
    *("training.activation_checkpointing", "training.compile", "training.early_stopping"),
    *("training.best_metric", "training.best_mode", "training.validation_combinations", "training.validation_items"),
)


def check_same_run(
    recipe: Recipe, stores: Sequence[str | None], state: TrainingState, allow_changes: bool, say: Callable[[str], None]
) -> None:
    """Show every setting that differs from those of the checkpoint as `- key: old`, `+ key: new`.

    stores: `content_hash` of each store of `data.train`, by which stores are known that lie elsewhere now.
    Harmless ones are noted and used from here on. ValueError for one that alters training, unless `allow_changes`, and
    for one that the tensors of the checkpoint depend on.
    """
    if state.step > recipe.training.steps:
        raise ValueError(f"{recipe.run_dir} has trained {state.step} steps, training.steps is {recipe.training.steps}")
    if "recipe" not in state.facts:
        return
    was, now = state.facts["recipe"], to_dict(recipe)
    if None not in stores and state.facts.get("stores") == list(stores):
        was = _with_paths_of(now, was)
    changes = changed_settings(was, now)
    shown = {key: f"  - {key}: {was}\n  + {key}: {now}" for key, (was, now) in changes.items()}
    fixed = [key for key in shown if _within(key, FIXED)]
    altering = [key for key in shown if not _within(key, (*FIXED, *_harmless(recipe)))]
    listed = "\n".join(shown[key] for key in (*fixed, *altering))
    if fixed:
        raise ValueError(
            f"{recipe.run_dir} was trained with other settings, which its checkpoints depend on: put {fixed[0]} back,"
            f" or give the new run another name\n{listed}"
        )
    if altering and not allow_changes:
        raise ValueError(
            f"{recipe.run_dir} was trained with other settings: put them back, give the new run another name, or go on"
            f" with the new ones by --allow-changes\n{listed}"
        )
    if shown:
        say(f"settings that differ from step {state.step} on:\n" + "\n".join(shown.values()))


def _with_paths_of(now: Mapping[str, Any], was: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `was` with the stores of `data.train` where they are `now`: there are as many of them."""
    pairs = zip(was["data"]["train"], now["data"]["train"], strict=True)
    return {**was, "data": was["data"] | {"train": [old | {"path": new["path"]} for old, new in pairs]}}


def _harmless(recipe: Recipe) -> tuple[str, ...]:
    # Only this schedule looks ahead to the end of the run.
    return HARMLESS if recipe.optim.schedule == "poly" else (*HARMLESS, "training.steps")


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def changed_settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Old and new value of every key, as `section.key`, that differs; a key that one side lacks has its default."""
    defaults = flat_settings(to_dict(Recipe(name="default")))
    old, new = ({**defaults, **flat_settings(tree)} for tree in (was, now))
    return {key: (old.get(key), new.get(key)) for key in {**new, **old} if old.get(key) != new.get(key)}


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a recipe's plain dict by `section.key`."""
    flat = {}
    for key, value in tree.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def drop_later(run_dir: Path, step: int, ema_step: int, best: int | None) -> list[dict[str, float]]:
    """Put away what belongs to a future that is trained anew after `step`; return the lines of metrics.jsonl.

    Later checkpoints, which are damaged ones, are renamed and not deleted; later EMA snapshots, samples, scores, log
    lines and what killed writers left go. `last` and `best` point at what is left.
    """
    for folder in list_checkpoints(run_dir):
        if checkpoint_step(folder) > step:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        elif folder != (place := checkpoint_folder(run_dir, checkpoint_step(folder))):
            folder.rename(place)  # it stood aside for another, which did not get there
    for old in (run_dir / "checkpoints").glob("step_*.old"):
        shutil.rmtree(old)
    for partial in (run_dir / "checkpoints").glob("step_*.partial"):
        shutil.rmtree(partial)
    for partial in (run_dir / "ema").glob("*.partial"):
        partial.unlink()
    for snapshot in find_snapshots(run_dir / "ema"):
        if snapshot.step > ema_step:
            snapshot.tensors.unlink()
    for folder in (run_dir / "samples").glob("step_*"):
        number = re.fullmatch(r"step_(\d+)(\.partial)?", folder.name)
        if number and (number[2] or int(number[1]) > step):
            shutil.rmtree(folder)
    for scores in (run_dir / "evaluation").glob("*_step_*.json*"):  # sounds stay: they are known by their weights
        number = re.search(r"_step_(\d+)[._]", scores.name)
        if number and int(number[1]) > step:
            scores.unlink()
    if run_dir.exists():
        for name, pointed in (("last", step), ("best", best)):
            folder = None if pointed is None else checkpoint_folder(run_dir, pointed)
            point_at(run_dir, name, folder if folder is not None and folder.exists() else None)
    truncate_lines(run_dir / "skipped.jsonl", lambda line: line["step"] < step)
    # At step 0 only the validation before training is logged, and a run without checkpoint repeats it.
    return truncate_lines(run_dir / "metrics.jsonl", lambda line: line["step"] <= step and step > 0)


def collect_tensors(network: MMAudio, optimizer: torch.optim.Optimizer, ema: PostHocEMA) -> dict[str, dict]:
    """Everything a checkpoint keeps of a run, as named tensors in groups; called on every process."""
    return {
        "model": network.state_dict(),
        "optimizer": optimizer_tensors(network, optimizer),
        "ema": ema.tensors(),
    }


def restore_tensors(state: TrainingState, network: MMAudio, optimizer: torch.optim.Optimizer, ema: PostHocEMA) -> None:
    """Put back what `collect_tensors` returned; called on every process."""
    check_state(state.tensors["model"], network.state_dict(), "the checkpoint")
    for name, tensor in network.state_dict().items():
        copy_full_tensor(tensor, state.tensors["model"][name])
    load_optimizer_tensors(network, optimizer, state.tensors["optimizer"])
    ema.load_tensors(state.tensors["ema"], state.facts["ema_step"])


# --- One launch at a time trains a run -------------------------------------------------------------------------------


PATIENCE = 20.0  # s in which the processes of a launch that was just killed should end


class RunLock:
    """Holds a run folder for this process once it is taken, until `with` or the process ends in any way.

    `warn` is told where the file system has no locks; the run then goes on without.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None]):
        self.run_dir, self.warn = run_dir, warn
        self._file: IO | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def take(self) -> bool:
        """Whether the folder is ours now; one that is not there is nobody's. Waits a little for another to end."""
        if self._file is not None or not self.run_dir.exists():
            return True
        self._file = open(self.run_dir / LOCK_FILE, "a")  # noqa: SIM115  (held for as long as the run)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > until:
                    self.release()
                    return False
            except OSError as error:
                self.warn(f"{self.run_dir} has no locks ({error.strerror}): see to it that one launch alone trains it")
                return True
            time.sleep(0.1)

    def refusal(self) -> ValueError:
        """What to raise when it could not be taken."""
        return ValueError(
            f"{self.run_dir} is being trained by another launch: wait for its end, or choose another name"
        )

    def wait_for_release(self, limit: float) -> None:
        """Wait until no other process holds it, at most `limit` seconds; not at all where there are no locks."""
        until = time.monotonic() + limit
        with open(self.run_dir / LOCK_FILE, "a") as file:
            while time.monotonic() < until:
                try:
                    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.3)
                except OSError:
                    return None

    def release(self) -> None:
        """Let others have it. The file stays: removing it would let two hold "it"."""
        if self._file is not None:
            self._file.close()
            self._file = None
