"""The training loop: one legible function over accelerate, with everything it decides spelled out.

`step` counts finished optimizer updates. Whatever is random depends on (seed, step, global sample slot) alone, so a run
that was killed and resumed is the same run, and the same global batch trains the same model on any number of processes.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, gather_object
from tqdm import tqdm

from mmaudio_hf.config import Recipe, micro_batch_size, save_recipe, to_dict
from mmaudio_hf.data.loader import Batch, BatchLoader, training_batches
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.sampler import process_sample_indices
from mmaudio_hf.models.network import FROZEN_TENSORS, MMAudio
from mmaudio_hf.schema import PROCESS_TIMEOUT, Evaluation, RunError
from mmaudio_hf.training.actions import BestScore, check_metric, judge
from mmaudio_hf.training.checkpoint import (
    Part,
    Retention,
    TrainingState,
    begin_attempt,
    give_up,
    latest_training_state,
    list_checkpoints,
    point_at,
    save_checkpoint,
    save_local_shards,
)
from mmaudio_hf.training.checkpointer import BackgroundWriter, published_network, write_pretrained
from mmaudio_hf.training.distributed import (
    allow_tf32,
    apply_fsdp,
    check_same_everywhere,
    check_visible_everywhere,
    compile_blocks,
    first_error,
    fsdp_plugin,
    full_shapes,
    gather_full_tensors,
    local_shards,
    make_shared_folder,
    no_sync,
    should_compile,
    swap_weights,
)
from mmaudio_hf.training.ema import PostHocEMA, find_snapshots, save_snapshots, snapshot_path, synthesize
from mmaudio_hf.training.finetune import frozen_parameters, seed_dropout
from mmaudio_hf.training.guard import (
    Guard,
    StepTrace,
    StopSignals,
    broken_parameters,
    examine_samples,
    examine_step,
    write_autopsy,
)
from mmaudio_hf.training.logs import JsonLines, Progress, check_trackers, in_short, log_audio
from mmaudio_hf.training.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norms,
    learning_rate,
    set_learning_rate,
    step_unless_nonfinite,
)
from mmaudio_hf.training.resume import (
    RunLock,
    check_same_run,
    collect_tensors,
    drop_later,
    flat_settings,
    restore_tensors,
)
from mmaudio_hf.training.step import StepResult, flow_step
from mmaudio_hf.training.validation import Validator


class Evaluator(Protocol):
    """Something that is run every `every` steps, and after the last one, and judges the network."""

    name: str
    every: int
    long: bool  # it takes so long that a checkpoint is saved first, from which a killed run goes on with it

    def run(self, model: MMAudio, step: int, weights: Mapping[str, Any]) -> Evaluation:
        """Judge `model`, which holds the averaged weights; called on every process. The scores are the same on all,

        and logged as NAME/SCORE; the first process may have sounds for the trackers beside them. `weights` says which
        weights of the run they are, as weights.json does.
        """


@dataclass
class RunResult:
    """How a run ended."""

    step: int
    stopped_by: int | None  # number of the signal that ended it early, or None
    skipped_steps: int
    stopped_early: bool  # validation no longer improved
    final_weights: dict[str, Any]
    steps_per_second: float
    history: list[dict[str, float]]  # lines of metrics.jsonl; empty but on the main process


def check_launch() -> None:
    """ValueError when the launcher was asked for several processes and started one.

    accelerate does that silently for `distributed_type: MULTI_CPU`: it sets the address of the main process then, but
    no WORLD_SIZE.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # set by accelerate's launcher, unlike the two below
    if launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "the launch asked for several processes but started one: use accelerate_configs/ddp.yaml, or on a machine"
            " without GPUs `accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes N`"
        )


def train(
    recipe: Recipe,
    network: MMAudio,
    mixture: Mixture,
    validation: Mixture | None = None,
    evaluators: Sequence[Evaluator] = (),
    write_extras: Callable[[Path], None] = lambda folder: None,
    allow_changes: bool = False,
    on_checkpoint: Callable[[Path], None] = lambda folder: None,
    lock: RunLock | None = None,
) -> RunResult:
    """Train `network` as `recipe` says and return how it went; everything else is in `recipe.run_dir`.

    `network` holds its initial weights (or those to fine-tune), latent statistics and empty-text features; a run folder
    with checkpoints is resumed when `recipe.resume` is "auto". `write_extras` adds files to every `pretrained_model/`.
    `on_checkpoint` is told of every finished checkpoint, on the main process in the thread that wrote it, before older
    ones are removed; it must not raise. `lock` is that of the run folder, which may be held already and stays held; one
    of the function's own is let go at the end.
    Raises ValueError for settings that do not fit the processes or (but for `allow_changes`) the run to be resumed, and
    RunError after too many non-finite steps, or when the last checkpoint could not be written.
    """
    check_launch()
    check_trackers(recipe.training.trackers)
    accelerator = make_accelerator(recipe)
    run = Run(recipe, network, mixture, validation, evaluators, write_extras, accelerator, on_checkpoint, lock)
    try:
        result = run.go(allow_changes)
    except BaseException:
        with suppress(Exception):  # a tracker that never started must not hide what went wrong
            accelerator.end_training()
        raise
    finally:
        if lock is None:
            run.lock.release()
    accelerator.end_training()
    return result


def make_accelerator(recipe: Recipe) -> Accelerator:
    """This process among those of the run. ValueError when they do not find each other, or the batch is uneven."""
    accelerator = Accelerator(
        # accelerate's launcher does not hand `use_cpu` on to several processes, and without it they stay apart.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=recipe.training.mixed_precision,
        log_with=list(recipe.training.trackers) or None,
        project_config=ProjectConfiguration(str(recipe.run_dir), logging_dir=str(recipe.run_dir / "trackers")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError(
            f"the launch started {os.environ['WORLD_SIZE']} processes that do not find each other: on a machine with"
            " GPUs that are not to be used, set ACCELERATE_USE_CPU=true"
        )
    micro_batch_size(recipe.training, accelerator.num_processes)  # refuses an uneven split before anything is made
    return accelerator


class Run:
    """State of one run. Methods are in the order in which they happen."""

    def __init__(
        self,
        recipe: Recipe,
        network: MMAudio,
        mixture: Mixture,
        validation: Mixture | None,
        evaluators: Sequence[Evaluator],
        write_extras: Callable[[Path], None],
        accelerator: Accelerator,
        on_checkpoint: Callable[[Path], None] = lambda folder: None,
        lock: RunLock | None = None,
    ):
        self.recipe, self.network, self.accelerator = recipe, network, accelerator
        self.mixture, self.evaluators = mixture, evaluators
        self.validation = None if validation is None else Validator(validation, recipe, accelerator)
        self.write_extras = write_extras
        self.on_checkpoint = on_checkpoint
        self.run_dir = recipe.run_dir
        self.step = 0
        self.to_evaluate: list[str] = []  # names of the evaluators that are due now and have not ended
        self.finished = False  # all steps are done, or validation no longer improves
        self.lock = lock or RunLock(self.run_dir, self._warn)
        self.stop = StopSignals()
        self.guard = Guard(accelerator, recipe.training.max_skipped_steps, self.stop, self._report_skip)
        self.writer = BackgroundWriter(self._warn)
        self.metrics = JsonLines(self.run_dir / "metrics.jsonl", self._warn)
        self.speed = JsonLines(self.run_dir / "speed.jsonl", self._warn)
        self.skips = JsonLines(self.run_dir / "skipped.jsonl", self._warn)
        validated = ["val", "val_ema"] if validation is not None else []
        kinds = [*validated, *(evaluator.name for evaluator in evaluators)]
        self.best = BestScore(recipe.training.best_metric, recipe.training.best_mode, kinds)
        self.history: list[dict[str, float]] = []
        self.final_weights: dict[str, Any] = {}
        self.device = accelerator.device
        network.to(self.device).train()
        network.activation_checkpointing = recipe.training.activation_checkpointing
        allow_tf32(recipe.training.tf32)
        if should_compile(recipe.training.compile, self.device):
            compile_blocks(network, accelerator.print, required=recipe.training.compile == "on")
        self.latent_mean, self.latent_std = network.latent_mean.clone(), network.latent_std.clone()
        self.sharded = fsdp_plugin()
        if self.sharded:
            apply_fsdp(network, accelerator, self.sharded)
        self.ema = PostHocEMA(network, recipe.ema.sigma_rels, recipe.ema.update_every, frozen_parameters(network))
        self.optimizer = build_optimizer(network, recipe.optim)
        # Sums since the last log line: loss, gradient norm, steps, then loss and count of every source.
        self.window = torch.zeros(3 + 2 * len(mixture.stores), device=self.device)

    def go(self, allow_changes: bool = False) -> RunResult:
        """Resume or begin, and train to the end or until a signal comes."""
        training = self.recipe.training
        self._resume(allow_changes)
        self._prepare_folder()
        self.prepare()
        self._announce()
        main = self.accelerator.is_main_process
        first_step = self.step
        self.progress = Progress(self.recipe, self.accelerator, self.step)
        if self.step == 0:
            scores = self._validate()
            self.best.check(scores)
            check_metric(training.early_stopping, list(scores))
        self._judge_finished()
        with (
            self.stop,
            self.writer,
            tqdm(total=training.steps, initial=self.step, disable=not main, unit="step", dynamic_ncols=True) as bar,
            self.loader(self.step if self.finished else training.steps) as loader,
        ):
            self._go_on_evaluating()
            began = time.perf_counter()
            for batches in loader:
                self.update(batches)
                bar.update()
                asked = self.guard.check()
                self.progress.add(time.perf_counter() - began)
                self._housekeeping(bar, loader, asked)
                began = time.perf_counter()
                if asked or self.finished:
                    break
                if self.step == first_step + 1:  # the optimizer has its moments now
                    self._reserve()
            self._check_saved()
        stopped_by = None if self.finished else self.guard.stopped_by
        early = self.finished and self.step < training.steps
        rate = self.progress.steps_per_second
        return RunResult(self.step, stopped_by, self.guard.skipped, early, self.final_weights, rate, self.history)

    def _housekeeping(self, bar, loader, asked: bool) -> None:
        """Everything that happens every so many steps, and after the last one; not counted as training time."""
        training, last = self.recipe.training, self.step == self.recipe.training.steps
        log = last or self.step % training.log_every == 0
        scores: dict[str, float] = {}
        if log:
            line = self._log_training()
        if last or self.step % training.validate_every == 0:
            scores |= self._validate()
            self._judge_finished()
        if self.finished:  # the weights to evaluate and publish are made from all snapshots
            self._save(snapshot=True, checkpoint=False)
            self.writer.wait()
            self.accelerator.wait_for_everyone()
            for sigma in self.recipe.ema.sigma_rels:
                check_visible_everywhere(snapshot_path(self.run_dir / "ema", sigma, self.ema.step))
        best, due = self._is_best(scores), [e for e in self.evaluators if self.finished or self.step % e.every == 0]
        snapshot = not self.finished and self.step % self.recipe.ema.snapshot_every == 0
        wanted = asked or self.finished or best or self.step % training.checkpoint_every == 0
        if any(evaluator.long for evaluator in due):  # a run that is killed meanwhile goes on with the evaluation
            self.to_evaluate = [evaluator.name for evaluator in due]
            self._save(snapshot, checkpoint=True)
            snapshot, wanted = False, self.finished  # the card of what is published tells the scores
        if not asked or self.finished or not self.to_evaluate:
            wanted = self._is_best(self._evaluate(due)) or wanted
        self._save(snapshot, checkpoint=wanted)
        if log:
            bar.set_postfix(line | self._log_speed(loader))

    def _is_best(self, scores: Mapping[str, float]) -> bool:
        """Whether the weights are the best so far by `scores`; the first process says it for all."""
        best = [self.best.note(scores, self.step)]
        if self.best.metric in scores and self.accelerator.num_processes > 1:
            broadcast_object_list(best)
        return best[0]

    def _go_on_evaluating(self) -> None:
        """Make up for evaluations that were due at the checkpoint and did not come to their end."""
        if not self.to_evaluate:
            return
        logged = [{k: v for line in self.history if line["step"] == self.step for k, v in line.items()}]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(logged)
        done = [name for name in self.to_evaluate if any(k.startswith(f"{name}/") for k in logged[0])]
        due = [e for e in self.evaluators if e.name in self.to_evaluate and e.name not in done]
        # The checkpoint knows nothing of scores that came after it, even if they have been logged.
        if self._is_best(logged[0] | self._evaluate(due)) or self.finished:
            self._save(snapshot=False, checkpoint=True)

    def _judge_finished(self) -> None:
        """Note the end of the run; the main process, which has the scores, decides on an early one for all."""
        verdict = judge(self.history, self.recipe.training.early_stopping)
        self.finished = self.step == self.recipe.training.steps
        if self.recipe.training.early_stopping.patience:
            [early] = broadcast_object_list([verdict.stop])
            if early and not self.finished:
                self.accelerator.print(
                    f"step {self.step}: {self.recipe.training.early_stopping.metric} no longer improves,"
                    f" it was best at step {verdict.best_step} ({verdict.best:.4f}): the run is finished"
                )
            self.finished = self.finished or early

    # --- start ------------------------------------------------------------------------------------------------------

    def _resume(self, allow_changes: bool) -> None:
        """Take up the newest checkpoint, if there is one. Nothing is written before everything fits."""
        self._hold()
        state, accelerator = None, self.accelerator
        if self.recipe.resume != "auto" and (self.run_dir / "checkpoints").exists():
            raise ValueError(
                f"{self.run_dir} holds checkpoints and resume is 'never': choose another name or resume=auto"
            )
        check_same_everywhere(
            flat_settings(to_dict(self.recipe))
            | {f"rows of {store.path}": len(store) for store in self.mixture.stores}
            | {f"the list of checkpoints in {self.run_dir}": [path.name for path in list_checkpoints(self.run_dir)]}
        )
        if self.recipe.resume == "auto":
            share = (accelerator.process_index, accelerator.num_processes)
            state = latest_training_state(self.run_dir, accelerator.print, share=share, agree=first_error)
        if state is not None:
            check_same_run(self.recipe, self._stores(), state, allow_changes, accelerator.print)
            self.load(state)
        accelerator.wait_for_everyone()  # nobody changes the folder while another still reads
        if self.accelerator.is_main_process:
            self.history = drop_later(self.run_dir, self.step, self.ema.step, self.best.step)

    def _stores(self) -> list[str | None]:
        return [store.content_hash for store in self.mixture.stores]

    def _hold(self) -> None:
        """Hold the run folder against other launches. ValueError, on every process, when one trains it now."""
        held = [not self.accelerator.is_main_process or self.lock.take()]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(held)
        if not held[0]:
            raise self.lock.refusal()

    def load(self, state: TrainingState) -> None:
        """Put the run where `state` was saved; nothing is written."""
        restore_tensors(state, self.network, self.optimizer, self.ema)
        # The sums of a log window that was cut short; with other stores they have no meaning and are dropped.
        if self.accelerator.is_main_process and state.tensors["window"]["sums"].shape == self.window.shape:
            self.window.copy_(state.tensors["window"]["sums"])
        statistics = (state.tensors["model"][name] for name in ("latent_mean", "latent_std"))
        self.latent_mean, self.latent_std = (value.to(self.device) for value in statistics)
        self.step, self.guard.skipped = state.step, state.facts["skipped"]
        self.final_weights = state.facts["weights"]
        self.best.restore(state.facts.get("best"))
        self.to_evaluate = state.facts.get("to_evaluate", [])

    def prepare(self) -> None:
        """Wrap the network for its processes, once its weights are in place."""
        self.model = self.network if self.sharded else self.accelerator.prepare(self.network)

    def _prepare_folder(self) -> None:
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        self._hold()
        if self.accelerator.is_main_process:
            partial = self.run_dir / "config.yaml.partial"
            save_recipe(self.recipe, partial)
            partial.replace(self.run_dir / "config.yaml")
        self.accelerator.wait_for_everyone()
        check_visible_everywhere(self.run_dir / "config.yaml")

    def _announce(self) -> None:
        training, world = self.recipe.training, self.accelerator.num_processes
        if training.trackers:
            config, folder = {"recipe": json.dumps(to_dict(self.recipe))}, self.run_dir / "trackers"
            folder.mkdir(exist_ok=True)
            self.accelerator.init_trackers(self.recipe.name, config, {"wandb": {"dir": str(folder)}})
        parameters = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        self.accelerator.print(
            f"{self.recipe.name}: {world} process{'es' * (world > 1)} on {self.device.type},"
            f" batch {training.batch_size} = {world} x {training.accumulation_steps} x"
            f" {micro_batch_size(training, world)}, precision {training.mixed_precision},"
            f" {parameters / 1e6:.1f} M trainable parameters{' shared out' if self.sharded else ''},"
            f" {len(self.mixture)} rows per epoch"
            f" ({len(self.mixture) / training.batch_size:.1f} steps), from step {self.step} to {training.steps}"
        )

    def slots(self) -> list[np.ndarray]:
        """Global slots of this process, per micro batch."""
        training, accelerator = self.recipe.training, self.accelerator
        return process_sample_indices(
            training.batch_size, accelerator.num_processes, accelerator.process_index, training.accumulation_steps
        )

    def loader(self, until: int, slots: Sequence[np.ndarray] | None = None) -> BatchLoader:
        """Batches of the steps from the present one to the one before `until`: this process's, or those of `slots`."""
        data = self.recipe.data
        return training_batches(
            self.mixture,
            seed=self.recipe.seed,
            global_batch=self.recipe.training.batch_size,
            sample_indices=self.slots() if slots is None else slots,
            start_step=self.step,
            num_steps=until - self.step,
            prefetch=data.prefetch_batches,
            threads=data.read_threads,
            device=self.device,
        )

    # --- one update -------------------------------------------------------------------------------------------------

    def update(self, batches: Sequence[Batch]) -> None:
        """One optimizer update, or none where its numbers are not finite, and one of the averages."""
        sums = torch.zeros_like(self.window)
        trace = self.gradients(batches, sums)
        refuse = self.guard.judge(trace)
        step_unless_nonfinite(self.optimizer, refuse)
        # The norm is the same on every process; summed over them when logged.
        sums[1] = trace.total_norm / self.accelerator.num_processes
        # A refused step counts for nothing in the averages: its numbers are not finite.
        self.window += torch.where(refuse, torch.zeros_like(sums), sums)
        if self.step >= self.recipe.ema.start:
            self.ema.update()
        self.step += 1

    def gradients(self, batches: Sequence[Batch], sums: torch.Tensor) -> StepTrace:
        """Clipped gradients of the present step, and what it looked like; losses are added to `sums`."""
        training, optim = self.recipe.training, self.recipe.optim
        set_learning_rate(self.optimizer, learning_rate(self.step, optim, training.steps))
        self.optimizer.zero_grad(set_to_none=True)
        results = []
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else no_sync(self.accelerator, self.model):
                if self.recipe.finetune.lora.dropout:
                    seed_dropout(self.recipe.seed, self.step, index, self.accelerator.process_index)
                result = flow_step(self.model, batch, self.recipe.flow, self.latent_mean, self.latent_std)
                # DDP averages over processes: scaled so that the sum is the mean over the global batch.
                scale = self.accelerator.num_processes / training.batch_size
                self.accelerator.backward(result.loss.sum() * scale)
            results.append(StepResult(result.loss.detach(), result.t))
            self._add_losses(sums, results[-1].loss, batch.source)
        norms = gradient_norms(self.network.parameters())
        total = clip_gradients(self.network.parameters(), optim.max_grad_norm, norms)
        ids = [item_id for batch in batches for item_id in batch.ids]
        losses, times = (torch.cat(parts) for parts in zip(*results, strict=True))
        return StepTrace(self.step, ids, losses, times, norms, total)

    def _add_losses(self, sums: torch.Tensor, loss: torch.Tensor, source: torch.Tensor) -> None:
        sums[0] += loss.sum() / self.recipe.training.batch_size
        if self.accelerator.is_main_process:
            sums[2] = 1  # steps counted
        per_source = sums[3:].view(2, -1)
        per_source[0].index_add_(0, source, loss)
        per_source[1].index_add_(0, source, torch.ones_like(loss))

    # --- what is written on the way ---------------------------------------------------------------------------------

    def _log_training(self) -> dict[str, str]:
        """Log the means since the last line; returns what the progress line shows of them."""
        sums = self.accelerator.reduce(self.window.clone(), "sum").tolist()
        self.window.zero_()
        steps, stores = max(sums[2], 1), self.mixture.stores
        scores = {
            "train/loss": sums[0] / steps,
            "train/grad_norm": sums[1] / steps,
            "train/learning_rate": learning_rate(self.step - 1, self.recipe.optim, self.recipe.training.steps),
            "train/skipped_steps": self.guard.skipped,
        }
        totals, counts = sums[3 : 3 + len(stores)], sums[3 + len(stores) :]
        for store, total, count in zip(stores, totals, counts, strict=True):
            if count:
                scores[f"train/loss_{store.path.name}"] = total / count
        self._record(scores)
        return {"loss": f"{scores['train/loss']:.4f}", "lr": f"{scores['train/learning_rate']:.1e}"}

    def _log_speed(self, loader) -> dict[str, str]:
        """Log what the steps since the last line cost, apart: this is not reproducible."""
        speed = self.progress.figures(self.step, loader.wait_seconds)
        speed["speed/checkpoint_stall_seconds"] = self.writer.stall_seconds
        loader.wait_seconds = self.writer.stall_seconds = 0.0
        self.accelerator.log(speed, step=self.step)
        if self.accelerator.is_main_process:
            self.speed.append({"step": self.step, **speed})
        return in_short(speed)

    def _record(self, scores: dict[str, float]) -> None:
        """Log to metrics.jsonl and the trackers. Only what is reproducible goes here; timings have their own file."""
        self.accelerator.log(scores, step=self.step)
        if self.accelerator.is_main_process:
            self.history.append({"step": self.step, **scores})
            self.metrics.append(self.history[-1])

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        weights: dict[str, Any] = {"val": None}
        if self.ema.step:
            weights["val_ema"] = self.ema.nearest(self.recipe.ema.sigma_rel)[1]
        scores = {}
        self.network.eval()
        for kind, values in weights.items():
            with swap_weights(self.network, values):
                found = self.validation.scores(self._forward, self.latent_mean, self.latent_std)
            scores |= {f"{kind}/{name}": value for name, value in found.items()}
        self.network.train()
        self._record(scores)
        if self.accelerator.is_main_process:
            averaged = f", EMA {scores['val_ema/loss']:.4f}" if self.ema.step else ""
            tqdm.write(f"step {self.step}: validation loss {scores['val/loss']:.4f}{averaged}")
        return scores

    def _forward(self, *args, **kwargs) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.network(*args, **kwargs)

    def _evaluate(self, due: Sequence[Evaluator]) -> dict[str, float]:
        scores: dict[str, float] = {}
        if due:
            model, weights = self._averaged_network()
            for evaluator in due:
                result = evaluator.run(model, self.step, weights)
                found = {f"{evaluator.name}/{k}": v for k, v in result.scores.items()}
                if found:
                    self._record(found)
                log_audio(self.accelerator, evaluator.name, result.samples, self.step)
                scores |= found
        self.to_evaluate = []
        return scores

    def _averaged_network(self) -> tuple[MMAudio, dict[str, Any]]:
        averages, weights = self._averages()
        tensors = gather_full_tensors({"published": averages}, keep=True)["published"]
        return published_network(self.recipe, tensors).to(self.device).eval(), weights

    def _averages(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Weights to publish and what they are: the nearest stored profile, or the synthesis when training is over.

        The names are those of the network in training, with an adapter of its own.
        """
        raw = self.network.state_dict()
        if self.ema.step == 0:
            return raw, {"weights": "raw", "sigma_rel": None, "step": self.step}
        wanted, frozen = self.recipe.ema.sigma_rel, {n: getattr(self.network, n) for n in FROZEN_TENSORS}
        sigma, averages = self.ema.nearest(wanted)
        if self.finished and sigma != wanted:
            snapshots = find_snapshots(self.run_dir / "ema")
            if snapshots:
                averages, sigma = synthesize(snapshots, wanted, self.ema.step, frozen), wanted
        return raw | averages, {"weights": "ema", "sigma_rel": sigma, "step": self.step}

    def _save(self, snapshot: bool, checkpoint: bool) -> None:
        """Copy what is to be saved and write it while training goes on."""
        snapshot = snapshot and self.ema.step > 0
        state, others = {}, {}
        if checkpoint:
            self.guard.settle()
            window = self.accelerator.reduce(self.window.clone(), "sum")
            state = collect_tensors(self.network, self.optimizer, self.ema) | {"window": {"sums": window}}
            others["published"], self.final_weights = self._averages()
            # The sums over all processes are with the first one now, here and after a resume.
            self.window.copy_(window if self.accelerator.is_main_process else torch.zeros_like(window))
        if snapshot:
            others["snapshot"] = self.ema.tensors()
        if self.sharded and others:
            self._save_shared_out(state, others)
        elif others and self.accelerator.is_main_process:
            self.writer.save(state | others, self._write_job(snapshot, checkpoint))

    def _save_shared_out(self, state: dict[str, dict], others: dict[str, dict]) -> None:
        """Every process saves its slices of `state`; `others` must be whole, and are gathered on the first one."""
        began, main, part, problem = time.perf_counter(), self.accelerator.is_main_process, None, None
        self.writer.wait()  # there may be room for one set of gathered tensors, and not for two
        if state:
            folder, problem = make_shared_folder(partial(begin_attempt, self.run_dir, self.step))
            if folder is not None:
                rank, count = self.accelerator.process_index, self.accelerator.num_processes
                part = Part(folder, rank, count, full_shapes(state))
        gathered = gather_full_tensors(others, keep=main)
        self.writer.stall_seconds += time.perf_counter() - began
        if main:
            write = self._write_job("snapshot" in others, bool(state), part, problem)
            self.writer.save(local_shards(state, main), lambda copies: write(copies | gathered))
        elif part is not None:
            self.writer.save(local_shards(state, main), partial(save_local_shards, part))

    def _reserve(self) -> None:
        """Get the memory for checkpoints. What is gathered from processes for each of them comes with its own."""
        main = self.accelerator.is_main_process
        if main or self.sharded:
            self.writer.reserve(local_shards(collect_tensors(self.network, self.optimizer, self.ema), main))

    def _write_job(
        self, snapshot: bool, checkpoint: bool, part: Part | None = None, problem: str | None = None
    ) -> Callable[[dict], None]:
        """What the thread does with the copies. It sees the run as it is now, not as it will be.

        `part` is what this process writes where tensors are shared out; `problem` why nobody can.
        """
        recipe, run_dir, step, ema_step = self.recipe, self.run_dir, self.step, self.ema.step
        facts = {"skipped": self.guard.skipped, "ema_step": ema_step, "weights": self.final_weights}
        facts |= {"to_evaluate": self.to_evaluate, "stores": self._stores()}
        facts |= {"best": self.best.record, "processes": self.accelerator.num_processes, "recipe": to_dict(recipe)}
        best, logged = self.best.step, not self.metrics.waiting
        retention = Retention(recipe.training.keep_checkpoints, recipe.training.keep_every)

        def before(groups: dict) -> None:
            if snapshot:
                save_snapshots(run_dir / "ema", recipe.ema.sigma_rels, groups["snapshot"], ema_step)
            if checkpoint and not logged:  # a run that resumed from here would never log them
                raise OSError(f"step_{step} is not saved: lines of {self.metrics.path} wait for room on the disk")
            if problem is not None:
                raise OSError(f"step_{step} is not saved: {problem}")

        def write(groups: dict) -> None:
            try:
                before(groups)
            except OSError:
                if part is not None:
                    give_up(part.folder.parent)
                raise
            if not checkpoint:
                return
            publish = partial(write_pretrained, recipe, groups["published"], facts["weights"], self.write_extras)
            folder = save_checkpoint(run_dir, TrainingState(step, groups, facts), publish, part)
            if best == step:
                point_at(run_dir, "best", folder)
            self.on_checkpoint(folder)
            retention.prune(run_dir)

        return write

    def _check_saved(self) -> None:
        """RunError, on every process, when the last checkpoint could not be written."""
        error = [self.writer.finish()]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(error)
        if error[0] is not None:
            raise RunError(f"{error[0]}: make room and start again; the run goes on from its last good checkpoint")

    def _warn(self, message: str) -> None:
        tqdm.write(f"warning: {message}; training goes on")

    def _report_skip(self, trace: StepTrace) -> None:
        """Note a refused step and its samples, and what they looked like."""
        figures = self.autopsy(trace)
        if not self.accelerator.is_main_process:
            return
        ids = [sample["id"] for sample in figures["samples"]]
        suspects = f"; not finite: {', '.join(figures['suspects'][:5])}" if figures["suspects"] else ""
        tqdm.write(f"step {trace.step}: loss or gradient is not finite, the step is skipped{suspects}")
        self.skips.append({"step": trace.step, "ids": ids})
        try:
            write_autopsy(self.run_dir, figures)
        except OSError as error:
            self._warn(str(error))

    def autopsy(self, trace: StepTrace) -> dict[str, Any]:
        """Figures of a step that has been made. Its batches are read once more; called on every process."""
        training, slots = self.recipe.training, self.slots()
        with training_batches(
            self.mixture,
            seed=self.recipe.seed,
            global_batch=training.batch_size,
            sample_indices=slots,
            start_step=trace.step,
            num_steps=1,
        ) as loader:
            samples = examine_samples(trace, next(loader), np.concatenate(slots).tolist())
        rate = learning_rate(trace.step, self.recipe.optim, training.steps)
        broken = gather_object(broken_parameters(self.network))
        return examine_step(self.network, trace, gather_object(samples), broken, rate)
