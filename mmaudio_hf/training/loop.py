"""The training loop, in the order in which things happen: read, step, log, validate, evaluate, save.

`step` counts optimizer updates, those that were skipped included. Whatever is random depends on (seed, step, global
sample index) alone, so a run that was killed and resumed is the same run, and the same global batch trains the same
model on any number of processes. `actions` decides what follows a step, and `checkpointer` does the saving.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from mmaudio_hf.config import Recipe, samples_per_step
from mmaudio_hf.data.loader import Batch, BatchLoader, training_batches
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.sampler import process_sample_indices
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import RunError
from mmaudio_hf.training import distributed, optim, resume
from mmaudio_hf.training.actions import (
    BestScore,
    Evaluator,
    Save,
    Verdict,
    actions_after,
    check_metrics,
    find_plateau,
)
from mmaudio_hf.training.checkpoint import TrainingState
from mmaudio_hf.training.checkpointer import Checkpointer
from mmaudio_hf.training.ema import PostHocEMA
from mmaudio_hf.training.finetune import frozen_parameters, seed_dropout
from mmaudio_hf.training.guard import Guard, StepTrace, diagnose_step
from mmaudio_hf.training.logs import Progress, RunLog
from mmaudio_hf.training.step import flow_step
from mmaudio_hf.training.validation import Validator


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    step: int
    stopped_by: int | None  # number of the signal that ended it early, or None
    stopped_early: bool  # validation no longer improved
    skipped_steps: int  # over all sessions


def train(
    recipe: Recipe,
    model: MMAudio,
    mixture: Mixture,
    validation: Mixture | None = None,
    evaluators: Sequence[Evaluator] = (),
    write_extras: Callable[[Path], None] = lambda folder: None,
    allow_changes: bool = False,
    on_checkpoint: Callable[[Path], None] = lambda folder: None,
    lock: resume.RunLock | None = None,
) -> RunResult:
    """Train `model` as `recipe` says and return how it went; everything else is in `recipe.run_dir`.

    `model` holds its initial weights (or those to fine-tune), latent statistics and empty-text features; a run folder
    with checkpoints is resumed when `recipe.resume` is "auto". `write_extras` and `on_checkpoint` are those of
    `Checkpointer`. A `lock` of the run folder, which may be acquired already, stays acquired.
    Raises ValueError for settings that do not fit the processes or (unless `allow_changes`) the run to be resumed, and
    RunError after too many non-finite steps, or when the last checkpoint could not be written.
    """
    run = Run(recipe, model, mixture, validation, evaluators, write_extras, on_checkpoint)
    with nullcontext(lock) if lock else resume.RunLock(recipe.run_dir, run.log.warn) as held:
        try:
            with distributed.waiting_for("validation, evaluation or saving"):
                result = run.train(held, allow_changes)
        except BaseException:
            with suppress(Exception):  # a tracker that never started must not hide what went wrong
                run.accelerator.end_training()
            raise
    run.accelerator.end_training()
    return result


class Run:
    """State of one run. Methods are in the order in which they are called."""

    def __init__(
        self,
        recipe: Recipe,
        model: MMAudio,
        mixture: Mixture,
        validation: Mixture | None = None,
        evaluators: Sequence[Evaluator] = (),
        write_extras: Callable[[Path], None] = lambda folder: None,
        on_checkpoint: Callable[[Path], None] = lambda folder: None,
    ):
        self.recipe, self.mixture = recipe, mixture
        self.accelerator = accelerator = distributed.make_accelerator(recipe)
        self.step = 0
        self.validator = None if validation is None else Validator(validation, recipe, accelerator)
        self.evaluators = evaluators
        kinds = ["val", "val_ema"] if validation is not None else []
        self.best = BestScore(recipe.training, [*kinds, *(evaluator.name for evaluator in evaluators)])
        self.log = RunLog(recipe, accelerator, [store.path.name for store in mixture.stores])
        # Copies, of the shape (1, 1, C): FSDP shards the model's own, and every step needs them in full.
        self.latent_statistics = tuple(
            s.to(accelerator.device, copy=True) for s in (model.latent_mean, model.latent_std)
        )
        self.unwrapped_model = distributed.configure_model(model, recipe.training, accelerator)
        # After sharding: EMA weights and moments are sharded as the weights are.
        self.ema = PostHocEMA(model, recipe.ema.sigma_rels, recipe.ema.update_every, frozen_parameters(model))
        self.optimizer = optim.build_optimizer(model, recipe.optim)
        self.guard = Guard(accelerator, recipe.training.max_skipped_steps, self._on_skip)
        self.checkpointer = Checkpointer(
            recipe, accelerator, model, self.optimizer, self.ema, self.log.warn, write_extras, on_checkpoint
        )

    def train(self, lock: resume.RunLock, allow_changes: bool = False) -> RunResult:
        """Resume or begin, and train to the end or until a signal comes."""
        recipe, accelerator, steps = self.recipe, self.accelerator, self.recipe.training.steps
        state = resume.find_checkpoint(recipe, self.depends_on, accelerator, lock, allow_changes)
        if state is not None:
            self.load(state)
        self.log.history = resume.open_run_dir(recipe, accelerator, lock, self.step, self.ema.step, self.best.step)
        self.prepare()
        self.log.start(self.step, self.unwrapped_model, self.mixture, self.checkpointer.sharded)
        if self.step == 0:  # a name that no validation computes is an error now, and not after hours
            check_metrics(recipe.training, self._validate())
            self._evaluate([evaluator for evaluator in self.evaluators if evaluator.at_start], finished=False)
        finished = actions_after(self.step, Verdict(self._plateau()), None, recipe).finished
        first_step, until = self.step, self.step if finished else steps
        with (
            self.guard.signals,
            self.checkpointer.writer,
            Progress(self.log, self.step) as progress,
            self.loader(until) as loader,
        ):
            if state is not None:
                self._resume_evaluation(state.metadata.get("to_evaluate", []), finished)
            progress.start_step()
            for batches in loader:
                with distributed.step_timeout(self.step):
                    self.update(batches)
                    signal = self.guard.poll()  # of the step before, whose flags have arrived: the host need not wait
                progress.end_step(batches)  # what follows is not time of training
                finished, stop = self._after_step(signal, progress, loader)
                if stop:
                    break
                if self.step == first_step + 1:  # the optimizer has its moments now
                    self.checkpointer.reserve()
                progress.start_step()
            self.checkpointer.finish()
        stopped_by = None if finished else self.guard.stopped_by
        return RunResult(self.step, stopped_by, finished and self.step < steps, self.guard.skipped)

    # --- start ------------------------------------------------------------------------------------------------------

    @cached_property
    def depends_on(self) -> dict[str, Any]:
        """What `resume.dependencies` says of this run."""
        validation = None if self.validator is None else self.validator.mixture
        return resume.dependencies(self.mixture, validation, self.accelerator.device)

    def load(self, state: TrainingState) -> None:
        """Bring the run to where `state` was saved; nothing is written."""
        self.checkpointer.restore(state)
        self.log.running.restore(state.tensors["window"]["sums"])
        statistics = (state.tensors["model"][name] for name in ("latent_mean", "latent_std"))
        self.latent_statistics = tuple(value.to(self.accelerator.device) for value in statistics)
        self.step, self.guard.skipped = state.step, state.metadata["skipped"]
        self.best.restore(state.metadata.get("best"))

    def differences(self, state: TrainingState) -> list[str]:
        """What this run reads or computes otherwise than the one that saved `state`."""
        return list(
            resume.changed_dependencies(
                resume.recorded_dependencies(state.metadata), self.depends_on, self.recipe
            ).values()
        )

    def prepare(self) -> None:
        """Wrap the model for its processes, after `find_checkpoint` has checked that it is the same on all of them."""
        sharded = self.checkpointer.sharded
        self.model = self.unwrapped_model if sharded else distributed.wrap_model(self.unwrapped_model, self.accelerator)

    # --- read -------------------------------------------------------------------------------------------------------

    @cached_property
    def batch_sizes(self) -> dict[int, int]:
        """Latents of a clip -> samples of a step, for each bucket of the mixture."""
        lengths = [bucket.lengths[0] for bucket in self.mixture.buckets]
        return {length: samples_per_step(self.recipe.training, length) for length in lengths}

    def sample_indices(self) -> list[list[np.ndarray]]:
        """Indices in the global batch of the samples of this process, per micro-batch, for each bucket."""
        accelerator, passes = self.accelerator, self.recipe.training.accumulation_steps
        share = (accelerator.num_processes, accelerator.process_index, passes)
        return [process_sample_indices(size, *share) for size in self.batch_sizes.values()]

    def loader(
        self,
        until: int,
        *,
        start: int | None = None,
        sample_indices: Sequence[np.ndarray] | None = None,
        device: torch.device | None = None,
    ) -> BatchLoader:
        """Batches of the steps from the present one (or `start`) to the one before `until`.

        They are those of this process, or of `sample_indices`, and on its device, or on `device`.
        """
        start = self.step if start is None else start
        shares = self.sample_indices() if sample_indices is None else [sample_indices] * len(self.batch_sizes)
        return training_batches(
            self.mixture,
            seed=self.recipe.seed,
            global_batch=[*self.batch_sizes.values()],
            sample_indices=shares,
            start_step=start,
            num_steps=until - start,
            prefetch=self.recipe.data.prefetch_batches,
            threads=self.recipe.data.read_threads,
            device=device or self.accelerator.device,
        )

    # --- step -------------------------------------------------------------------------------------------------------

    def update(self, batches: Sequence[Batch]) -> None:
        """One optimizer update, or none where its numbers are not finite, and one of the EMA profiles."""
        trace = self.backward(batches)
        found_inf = self.guard.check_finite(trace)
        optim.step_unless_nonfinite(self.optimizer, found_inf)
        self.log.running.add(trace.loss, trace.source, trace.total_norm, found_inf)
        if self.step >= self.recipe.ema.start:
            self.ema.update()
        self.step += 1  # skipped or not: the next step sees other samples

    def backward(self, batches: Sequence[Batch]) -> StepTrace:
        """Clipped gradients of the present step from its micro-batches, and the numbers that they come from."""
        training, settings = self.recipe.training, self.recipe.optim
        optim.set_learning_rate(self.optimizer, optim.learning_rate(self.step, settings, training.steps))
        self.optimizer.zero_grad(set_to_none=True)
        if len(self.batch_sizes) > 1:  # a step is of one duration, the same on all processes
            self.unwrapped_model.set_lengths(*batches[0].lengths)
        results = []
        for index, batch in enumerate(batches):
            # Processes exchange gradients once per update, in the backward pass of the last micro-batch.
            last = index == len(batches) - 1
            with nullcontext() if last else distributed.no_sync(self.accelerator, self.model):
                if self.recipe.finetune.lora.dropout:
                    seed_dropout(self.recipe.seed, self.step, index, self.accelerator.process_index)
                result = flow_step(self.model, batch, self.recipe.flow, *self.latent_statistics)
                # DDP averages over processes: scaled so that the sum is the mean over the global batch.
                scale = self.accelerator.num_processes / self.batch_sizes[batch.lengths[0]]
                self.accelerator.backward(result.loss.sum() * scale)
            results.append((batch.source, result.loss.detach(), result.t))
        norms = optim.gradient_norms(self.unwrapped_model.parameters())
        total = optim.clip_gradients(self.unwrapped_model.parameters(), settings.max_grad_norm, norms)
        ids = [item_id for batch in batches for item_id in batch.ids]
        # torch.cat copies: tensors of batches are views of buffers that the next step fills again.
        source, losses, times = (torch.cat(values) for values in zip(*results, strict=True))
        return StepTrace(self.step, ids, source, losses, times, norms, total)

    def _on_skip(self, trace: StepTrace) -> None:
        self.log.skipped_step(self.diagnose(trace))

    def diagnose(self, trace: StepTrace) -> dict[str, Any]:
        """Diagnostics of a step, whose batches are read once more; called on every process."""
        rate = optim.learning_rate(trace.step, self.recipe.optim, self.recipe.training.steps)
        # On the host: a device that has memory for one batch may have none for two.
        with self.loader(trace.step + 1, start=trace.step, device=torch.device("cpu")) as loader:
            return diagnose_step(self.unwrapped_model, trace, next(loader), rate)

    # --- log, validate, evaluate, save ------------------------------------------------------------------------------

    def _after_step(self, signal: int | None, progress: Progress, loader: BatchLoader) -> tuple[bool, bool]:
        """Do what `actions_after` decides; whether the run is finished, and whether it is to stop."""
        recipe, verdict = self.recipe, Verdict()
        now = actions_after(self.step, verdict, signal, recipe, self.evaluators)
        if now.log:
            try:
                self.guard.settle()  # so that the line counts the last step too
            except RunError:  # too many in a row: how far it came is in the log
                self._log_window()
                raise
            line = self._log_window()
        if now.validate:
            is_best = self._is_best(self._validate())
            verdict = Verdict(self._plateau(), best_validation=is_best)
            now = actions_after(self.step, verdict, signal, recipe, self.evaluators)
        self._save(now.save_first, now.finished, [evaluator.name for evaluator in now.evaluators])
        if now.evaluate:
            is_best = self._is_best(self._evaluate(now.evaluators, now.finished))
            verdict = verdict._replace(best_evaluation=is_best)
            now = actions_after(self.step, verdict, signal, recipe, self.evaluators)
        self._save(now.save, now.finished)
        if now.log:  # at the end, so that the stall of a checkpoint is in the line of its step
            progress.report(self.step, loader.wait_seconds, self.checkpointer.writer.stall_seconds, line)
            loader.wait_seconds = self.checkpointer.writer.stall_seconds = 0.0
        return now.finished, now.stop

    def _log_window(self) -> dict[str, float | None]:
        """Log the means since the last line; it is returned."""
        rate = optim.learning_rate(self.step - 1, self.recipe.optim, self.recipe.training.steps)
        line = self.log.running.means()
        line |= {"train/learning_rate": rate, "train/skipped_steps": self.guard.skipped}
        self.log.scores(self.step, line)
        return line

    def _resume_evaluation(self, names: Sequence[str], finished: bool) -> None:
        """Run the evaluators that were due at the checkpoint and were not done when the run was killed."""
        if not names:
            return
        logged = {k: v for line in self.log.history if line["step"] == self.step for k, v in line.items()}
        [logged] = broadcast_object_list([logged])
        done = {key.partition("/")[0] for key in logged}
        due = [e for e in self.evaluators if e.name in names and e.name not in done]
        # The checkpoint does not know scores that came after it, even if they have been logged.
        best = self._is_best(logged | self._evaluate(due, finished))
        self._save(Save(checkpoint=best or finished), finished)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Losses on the held-out mixture: val/ with the raw weights, val_ema/ with the nearest EMA profile."""
        if self.validator is None:
            return {}
        weights: dict[str, Any] = {"val": None}
        if self.ema.step:
            weights["val_ema"] = self.ema.nearest(self.recipe.ema.sigma_rel)[1]
        scores: dict[str, float] = {}
        model = self.unwrapped_model.eval()
        for kind, values in weights.items():
            with distributed.swap_weights(model, values):  # in place: there is no memory for a second model
                forward = self.accelerator.autocast()(model.__call__)
                mean, std = self.latent_statistics
                losses = self.validator.scores(forward, mean, std, model.set_lengths)
            scores |= {f"{kind}/{name}": value for name, value in losses.items()}
        model.train()
        self.log.scores(self.step, scores)
        ema = f", EMA {scores['val_ema/loss']:.4f}" if self.ema.step else ""
        self.log.print(f"step {self.step}: validation loss {scores['val/loss']:.4f}{ema}")
        return scores

    def _evaluate(self, due: Sequence[Evaluator], finished: bool) -> dict[str, float]:
        """Scores of the weights to publish, by every evaluator that is due."""
        scores: dict[str, float] = {}
        if due:
            model, weights = self.checkpointer.model_to_publish(self.step, finished)
        for evaluator in due:
            result = evaluator.run(model, self.step, weights)
            named = {f"{evaluator.name}/{name}": value for name, value in result.scores.items()}
            if named:
                self.log.scores(self.step, named)
            self.log.audio(evaluator.name, result.samples, self.step)
            scores |= named
        return scores

    def _is_best(self, scores: dict[str, float]) -> bool:
        """Whether the weights are the best so far by `training.best_metric`; the first process decides for all."""
        [best] = broadcast_object_list([self.best.update(scores, self.step)])
        return best

    def _plateau(self) -> bool:
        """Whether early stopping ends the run; the first process, which has the log, decides for all."""
        stopping = self.recipe.training.early_stopping
        plateau = find_plateau(self.log.history, stopping)
        [stop] = broadcast_object_list([plateau.stop])
        if stop and self.step < self.recipe.training.steps:
            self.log.print(
                f"step {self.step}: {stopping.metric} no longer improves, it was best at step {plateau.best_step}"
                f" ({plateau.best:.4f}): the run is finished"
            )
        return stop

    def _save(self, what: Save, finished: bool, to_evaluate: Sequence[str] = ()) -> None:
        """`to_evaluate`: names of the evaluators that are to be run when the run is resumed from this checkpoint."""
        if what.checkpoint:
            self.guard.settle()
        elif not what.snapshot:
            return
        metadata = {
            "skipped": self.guard.skipped,
            "to_evaluate": list(to_evaluate),
            "depends_on": self.depends_on,
            "best": self.best.record,
        }
        sums = self.log.running.gather() if what.checkpoint else self.log.running.sums
        # A run that resumed from a checkpoint would never log the lines that still wait for disk space.
        problem = f"lines of {self.log.metrics.path} wait for disk space" if self.log.metrics.waiting else None
        best = self.best.step == self.step
        self.checkpointer.save(what, self.step, metadata, sums, finished=finished, best=best, problem=problem)
        self.accelerator.wait_for_everyone()  # for a process that waited for its disk: a step would time out
