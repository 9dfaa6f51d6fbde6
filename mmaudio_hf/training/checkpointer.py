"""Saving beside training: tensors are copied to host memory at once, and written to disk by a thread meanwhile."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmaudio_hf.config import Recipe, load_recipe
from mmaudio_hf.data.layout import bytes_of
from mmaudio_hf.models.network import FROZEN_TENSORS, MMAudio
from mmaudio_hf.training.checkpoint import latest_training_state
from mmaudio_hf.training.ema import find_snapshots, synthesize
from mmaudio_hf.training.finetune import published_state, save_adapter

Groups = Mapping[str, Mapping[str, torch.Tensor]]


class HostCopy:
    """Host memory for a copy of many tensors, kept from one copy to the next.

    Fresh pages cost several times what copying into known ones does; for CUDA they are page-locked as well. A tensor
    that occurs in several groups has one copy.
    """

    def __init__(self):
        self._memory: dict[tuple, torch.Tensor] = {}
        self._reserved: set[tuple] = set()

    def reserve(self, groups: Groups) -> None:
        """Get the memory for a copy of these tensors and keep it for good."""
        self._find_memory(groups)
        self._reserved = set(self._memory)
        for room in self._memory.values():
            room.zero_()  # before that a page is only promised

    def _find_memory(self, groups: Groups) -> None:
        sources = {_place(tensor): tensor for tensors in groups.values() for tensor in tensors.values()}
        wanted = self._reserved | sources.keys()  # memory of other tensors, which are gone, is given back
        self._memory = {place: room for place, room in self._memory.items() if place in wanted}
        for place in sources.keys() - self._memory.keys():
            source = sources[place]
            self._memory[place] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)

    @torch.no_grad()
    def take(self, groups: Groups) -> tuple[dict[str, dict[str, torch.Tensor]], torch.cuda.Event | None]:
        """Copies of the tensors of all groups, and what to wait for before they are read (None: nothing).

        The copies hold until the next call.
        """
        self._find_memory(groups)
        copied, taken, stream = set(), {}, None
        for group, tensors in groups.items():
            taken[group] = {}
            for name, tensor in tensors.items():
                place = _place(tensor)
                taken[group][name] = self._memory[place]
                if place not in copied:
                    _copy(self._memory[place], tensor.detach())
                    copied.add(place)
                if tensor.is_cuda:
                    stream = torch.cuda.current_stream(tensor.device)
        # The copies are queued before whatever the next step changes, so the host need not wait for them.
        return taken, None if stream is None else stream.record_event()


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Without waiting from CUDA; on the CPU in this thread alone.

    torch divides every copy among threads, and waiting for the slowest of them at each of some thousand tensors takes
    longer than the copies do.
    """
    if source.device.type == "cpu" and source.is_contiguous():
        np.copyto(np.asarray(bytes_of(target)), np.asarray(bytes_of(source)))
    else:
        target.copy_(source, non_blocking=True)


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.device


class BackgroundWriter:
    """Writes copies of tensors in a thread, one job at a time.

    `warn` is told of a job that fails because of the disk (OSError); training goes on, and `finish` raises the error
    of the last job. `stall_seconds` adds up how long training stood still; `write_seconds` is the time of the last job.
    """

    def __init__(self, warn: Callable[[str], None]):
        self.warn = warn
        self.stall_seconds = self.write_seconds = 0.0
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def reserve(self, groups: Groups) -> None:
        """Get the memory that saving these tensors will need, in the thread, so that the first copy is no slower."""
        self.wait()
        self._start(lambda: self._copy.reserve(groups))

    def save(self, groups: Groups, write: Callable[[Groups], None]) -> None:
        """Copy the tensors and hand the copies to `write` in the thread, once the job before is done."""
        began = time.perf_counter()
        self.wait()
        copies, event = self._copy.take(groups)

        def work() -> None:
            if event is not None:
                event.synchronize()
            write(copies)

        self._start(work)
        self.stall_seconds += time.perf_counter() - began

    def _start(self, work: Callable[[], None]) -> None:
        # A daemon: a second Ctrl-C does not wait for a disk.
        self._thread = threading.Thread(target=self._run, args=(work,), name="writer", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        try:
            work()
            self._error = None
        except OSError as error:
            self._error = error
            self.warn(str(error))
        except BaseException as error:  # a bug of ours: raised in the training thread
            self._error = error
        self.write_seconds = time.perf_counter() - began

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None and not isinstance(self._error, OSError):
            raise self._error

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:
            self._thread.join()

    def finish(self) -> str | None:
        """Wait; what went wrong with the last job, or None."""
        self.wait()
        return None if self._error is None else str(self._error)


# --- `pretrained_model/`: the folder that generation and the Hub read ------------------------------------------------


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


def publish_ema(
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
