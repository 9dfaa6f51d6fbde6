"""Saving beside training: tensors are copied to host memory at once, and written to disk by a thread meanwhile."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mmaudio_hf.config import Recipe, load_recipe, to_dict
from mmaudio_hf.data.layout import bytes_of
from mmaudio_hf.data.loader import allocate_packed
from mmaudio_hf.models.network import FROZEN_TENSORS, MMAudio
from mmaudio_hf.schema import RunError
from mmaudio_hf.training import checkpoint, distributed
from mmaudio_hf.training.actions import Save
from mmaudio_hf.training.checkpoint import RankShards, TrainingState, latest_training_state, point_at
from mmaudio_hf.training.ema import PostHocEMA, find_snapshots, save_snapshots, set_aside, snapshot_path, synthesize
from mmaudio_hf.training.finetune import published_state, save_adapter
from mmaudio_hf.training.optim import load_optimizer_tensors, optimizer_tensors
from mmaudio_hf.weights import check_state


@dataclass(frozen=True)
class _Job:
    """What the thread writes besides tensors: the run as it was when they were copied, not as it is now."""

    state: TrainingState  # without tensors
    ema_step: int
    best: bool
    problem: str | None  # why there can be no checkpoint
    shards: RankShards | None  # where tensors are sharded, those of this process


class Checkpointer:
    """Saves a run while it trains, in one folder a checkpoint, and makes the model that is published and evaluated.

    `write_extras` adds files to every `pretrained_model/`. `on_checkpoint` gets the folder of every finished checkpoint
    on the main process, in the thread that wrote it, before older ones are removed; it must not raise.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: MMAudio,
        optimizer: torch.optim.Optimizer,
        ema: PostHocEMA,
        warn: Callable[[str], None],
        write_extras: Callable[[Path], None] = lambda folder: None,
        on_checkpoint: Callable[[Path], None] = lambda folder: None,
    ):
        self.recipe, self.accelerator = recipe, accelerator
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.write_extras, self.on_checkpoint = write_extras, on_checkpoint
        self.writer = BackgroundWriter(warn)
        self.sharded = distributed.fsdp_plugin() is not None
        self._damaged: dict[Path, str] = {}  # EMA snapshots, and why

    # --- one checkpoint ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """All that a checkpoint keeps of the run except the running metrics, by file; called on every process."""
        moments, ema = optimizer_tensors(self.model, self.optimizer), self.ema.tensors()
        return {"model": self.model.state_dict(), "optimizer": moments, "ema": ema}

    def restore(self, state: TrainingState) -> None:
        """Load what `tensors` returned; called on every process."""
        check_state(state.tensors["model"], self.model.state_dict(), "the checkpoint")
        for name, tensor in self.model.state_dict().items():
            distributed.copy_full_tensor(tensor, state.tensors["model"][name])
        load_optimizer_tensors(self.model, self.optimizer, state.tensors["optimizer"])
        self.ema.load_tensors(state.tensors["ema"], state.metadata["ema_step"])

    def save(
        self,
        what: Save,
        step: int,
        metadata: Mapping[str, Any],
        sums: torch.Tensor,
        *,
        finished: bool,
        best: bool = False,
        problem: str | None = None,
    ) -> None:
        """Copy what is to be saved and write it while training continues; every process calls it.

        metadata: plain values that resuming needs. sums: the running metrics of the first process. `best` points the
        link of that name at the checkpoint. With a `problem` there is none: the thread reports it.
        """
        if what.snapshot and finished and what.checkpoint:  # the published weights are made of all snapshots
            self.save(Save(snapshot=True), step, metadata, sums, finished=True)
            what = Save(checkpoint=True)
        state: dict[str, Mapping[str, torch.Tensor]] = {}  # each process saves its shards of these
        full: dict[str, Mapping[str, torch.Tensor]] = {}  # the first process saves these, gathered
        if what.checkpoint:
            state = self.tensors() | {"window": {"sums": sums}}
            full["published"], weights = self.weights_to_publish(step, finished)
            world_size = self.accelerator.num_processes
            metadata = {"ema_step": self.ema.step, "weights": weights, **metadata}
            metadata |= {"processes": world_size, "recipe": to_dict(self.recipe)}
        if what.snapshot and self.ema.step:
            full["snapshot"] = self.ema.tensors()
        job = _Job(TrainingState(step, {}, metadata), self.ema.step, best, problem, None)
        if self.sharded and full:
            self._save_sharded(job, state, full)
        elif full and self.accelerator.is_main_process:
            self.writer.save(state | full, partial(self._write, job))
        if what.snapshot and finished:
            self.finish()  # without the last snapshot the weights that are published would be of earlier ones
            for sigma in self.recipe.ema.sigma_rels:  # until every process sees the last ones
                distributed.check_visible_everywhere(snapshot_path(self.recipe.run_dir / "ema", sigma, self.ema.step))

    def _save_sharded(self, job: _Job, state: distributed.TensorGroups, full: distributed.TensorGroups) -> None:
        began, main = time.perf_counter(), self.accelerator.is_main_process
        self.writer.wait()  # there may be memory for one set of gathered tensors, and not for two
        if state:
            folder, problem = distributed.make_shared_folder(
                partial(checkpoint.begin_sharded, self.recipe.run_dir, job.state.step)
            )
            job = replace(job, problem=problem or job.problem)
            if folder is not None:
                rank, count = self.accelerator.process_index, self.accelerator.num_processes
                job = replace(job, shards=RankShards(folder, rank, count, distributed.full_shapes(state)))
        gathered = distributed.gather_full_tensors(full, keep=main)
        self.writer.stall_seconds += time.perf_counter() - began
        if main:
            self.writer.save(distributed.local_shards(state, main), lambda own: self._write(job, {**own, **gathered}))
        elif job.shards is not None:
            self.writer.save(distributed.local_shards(state, main), partial(checkpoint.save_local_shards, job.shards))

    def _write(self, job: _Job, groups: distributed.TensorGroups) -> None:
        recipe, step = self.recipe, job.state.step
        try:
            if "snapshot" in groups:
                save_snapshots(recipe.run_dir / "ema", recipe.ema.sigma_rels, groups["snapshot"], job.ema_step)
            if "published" in groups and job.problem is not None:
                raise OSError(f"step_{step} is not saved: {job.problem}")
        except OSError:
            if job.shards is not None:
                checkpoint.discard(job.shards.folder.parent)
            raise
        if "published" not in groups:
            return  # only snapshots were due
        weights = job.state.metadata["weights"]
        publish = partial(write_pretrained, recipe, groups["published"], weights, self.write_extras)
        folder = checkpoint.save_checkpoint(recipe.run_dir, replace(job.state, tensors=groups), publish, job.shards)
        if job.best:  # before pruning, which spares what the link points at
            point_at(recipe.run_dir, "best", folder)
        self.on_checkpoint(folder)
        checkpoint.prune(recipe.run_dir, recipe.training.keep_checkpoints, recipe.training.keep_every)

    # --- the weights that are published ------------------------------------------------------------------------------

    def weights_to_publish(self, step: int, finished: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """State dict, possibly sharded, and the content of weights.json: the nearest of the stored EMA profiles.

        When training is `finished` it is the profile of the recipe, synthesised from all snapshots. The names are those
        of the model in training, with an adapter of its own.
        """
        raw = self.model.state_dict()
        if self.ema.step == 0:  # before ema.start
            return raw, {"weights": "raw", "sigma_rel": None, "step": step}
        published = self.recipe.ema.sigma_rel
        sigma, ema_weights = self.ema.nearest(published)
        folder = self.recipe.run_dir / "ema"
        if finished and sigma != published and (snapshots := find_snapshots(folder, self._damaged.__setitem__)):
            frozen = {name: getattr(self.model, name) for name in FROZEN_TENSORS}
            sigma, ema_weights = published, synthesize(snapshots, published, self.ema.step, frozen)
        return raw | ema_weights, {"weights": "ema", "sigma_rel": sigma, "step": step}

    def model_to_publish(self, step: int, finished: bool) -> tuple[MMAudio, dict[str, Any]]:
        """These weights, gathered, as a model for evaluation on the device; called on every process."""
        tensors, weights = self.weights_to_publish(step, finished)
        full = distributed.gather_full_tensors({"published": tensors}, keep=True)["published"]
        return published_model(self.recipe, full).to(self.accelerator.device).eval(), weights

    # --- the thread --------------------------------------------------------------------------------------------------

    def reserve(self) -> None:
        """Allocate the memory for the copies. What is gathered from all processes is allocated for each checkpoint."""
        main = self.accelerator.is_main_process
        if main or self.sharded:
            self.writer.reserve(distributed.local_shards(self.tensors(), main))

    def finish(self) -> None:
        """Wait for the thread. RunError, on every process, when the last checkpoint could not be written."""
        [error] = broadcast_object_list([self.writer.finish()])
        for path, reason in self._damaged.items() if self.accelerator.is_main_process else ():
            set_aside(path, reason)  # not before: another process may have listed it
        if error is not None:
            raise RunError(f"{error}: free disk space and start again; the run resumes from its last good checkpoint")


# --- The thread and its memory ---------------------------------------------------------------------------------------

BLOCK_BYTES = 1 << 30  # of the memory for copies


class HostCopy:
    """Host memory for a copy of many tensors, reused from one copy to the next.

    Fresh pages cost several times what copying into touched ones does; for CUDA they are pinned as well. A tensor that
    occurs in several groups is copied once.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._reserved: set[tuple] = set()

    def reserve(self, groups: distributed.TensorGroups) -> None:
        """Allocate the memory for a copy of these tensors and keep it for good."""
        self._allocate(groups)
        self._reserved = set(self._buffers)
        for buffer in self._buffers.values():
            buffer.zero_()  # the system maps a page when it is first written

    def _allocate(self, groups: distributed.TensorGroups) -> None:
        sources = {_key(tensor): tensor for tensors in groups.values() for tensor in tensors.values()}
        needed = self._reserved | sources.keys()  # buffers of other tensors, which are gone, are freed
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in needed}
        new = {key: sources[key] for key in sources.keys() - self._buffers.keys()}
        pinned = any(source.is_cuda for source in new.values())
        self._buffers |= allocate_packed(new, pinned, BLOCK_BYTES)

    @torch.no_grad()
    def copy(
        self, groups: distributed.TensorGroups
    ) -> tuple[dict[str, dict[str, torch.Tensor]], torch.cuda.Event | None]:
        """Copies of the tensors of all groups, and what to wait for before they are read (None: nothing).

        The copies are valid until the next call.
        """
        self._allocate(groups)
        done, copies, stream = set(), {}, None
        for group, tensors in groups.items():
            copies[group] = {name: self._buffers[_key(tensor)] for name, tensor in tensors.items()}
            for tensor in tensors.values():
                if (key := _key(tensor)) not in done:
                    source, target = tensor.detach(), self._buffers[key]
                    if source.device.type == "cpu" and source.is_contiguous():
                        # In this thread alone: torch divides every copy among threads, and waiting for the slowest of
                        # them at each of some thousand tensors takes longer than the copies do.
                        np.copyto(np.asarray(bytes_of(target)), np.asarray(bytes_of(source)))
                    else:
                        target.copy_(source, non_blocking=True)
                    done.add(key)
                if tensor.is_cuda:
                    stream = torch.cuda.current_stream(tensor.device)
        # The copies are queued before whatever the next step changes, so the host need not wait for them.
        return copies, None if stream is None else stream.record_event()


def _key(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.device


class BackgroundWriter(AbstractContextManager["BackgroundWriter"]):
    """Writes copies of tensors in a thread, one job at a time.

    `warn` gets the message of a job that fails because of the disk (OSError); training continues, and `finish` returns
    the error of the last job. `stall_seconds` adds up how long training waited; `write_seconds` is of the last job.
    """

    def __init__(self, warn: Callable[[str], None]):
        self.warn = warn
        self.stall_seconds = self.write_seconds = 0.0
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def reserve(self, groups: distributed.TensorGroups) -> None:
        """Allocate the memory that saving these tensors needs, in the thread, so that the first copy is no slower."""
        self.wait()
        self._start(lambda: self._host.reserve(groups))

    def save(self, groups: distributed.TensorGroups, write: Callable[[distributed.TensorGroups], None]) -> None:
        """Copy the tensors, and call `write` with the copies in the thread, once the job before is done."""
        began = time.perf_counter()
        self.wait()
        copies, event = self._host.copy(groups)

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

    def finish(self) -> str | None:
        """Wait; the error of the last job, or None."""
        self.wait()
        return None if self._error is None else str(self._error)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:
            self._thread.join()


# --- `pretrained_model/`: the folder that generation and the Hub read ------------------------------------------------


def published_model(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> MMAudio:
    """The model with `tensors`, which are named as in the training of `recipe`: an adapter is merged."""
    return MMAudio.from_config_and_state(recipe.model, published_state(tensors, recipe.finetune.lora), "these weights")


def write_pretrained(
    recipe: Recipe,
    tensors: Mapping[str, torch.Tensor],
    weights: Mapping[str, Any],
    write_extras: Callable[[Path], None],
    folder: Path,
) -> None:
    """Fill `folder` with the model of `tensors` and what `write_extras` adds.

    `weights` says in weights.json which weights of the run they are. An adapter that was trained goes to `adapter/`
    beside the folder as well.
    """
    published_model(recipe, tensors).save_pretrained(folder)
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
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Write `out/pretrained_model/` with EMA weights of width `sigma_rel` at training step `step`; return weights.json.

    They are synthesised from the snapshots of the run; `step` None is that of the last one. ValueError where there are
    none, or `out` exists, or no EMA weights exist at that step.
    """
    recipe = load_recipe(run_dir / "config.yaml")
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder")
    if not 0 < sigma_rel < 0.28:  # the profile of exponent 0, the widest one, has sigma_rel 0.2887 (12**-0.5)
        raise ValueError(f"sigma_rel {sigma_rel} must be between 0 and 0.28")
    snapshots = find_snapshots(run_dir / "ema", lambda _, reason: log(f"warning: {reason}; it is left out"))
    state = latest_training_state(run_dir, log)
    if not snapshots or state is None:
        raise ValueError(f"{run_dir} has no EMA snapshots and checkpoint yet: train at least ema.snapshot_every steps")
    last = max(snapshot.step for snapshot in snapshots) + recipe.ema.start
    step = last if step is None else step
    if not recipe.ema.start < step <= last:
        raise ValueError(f"{run_dir} has EMA weights of the steps {recipe.ema.start + 1} to {last}, not of {step}")
    model = state.tensors["model"]
    frozen = {name: model[name] for name in FROZEN_TENSORS}
    ema_weights = synthesize(snapshots, sigma_rel, step - recipe.ema.start, frozen)
    weights = {"weights": "ema", "sigma_rel": sigma_rel, "step": step}
    partial_out = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    (partial_out / "pretrained_model").mkdir(parents=True)
    write_pretrained(recipe, {**model, **ema_weights}, weights, write_extras, partial_out / "pretrained_model")
    partial_out.rename(out)
    return weights
