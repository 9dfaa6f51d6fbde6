"""The training loop: one legible function over accelerate, with everything it decides spelled out.

`step` counts finished optimizer updates. Whatever is random depends on (seed, step, global sample slot) alone, so a run
that was killed and resumed is the same run, and the same global batch trains the same model on any number of processes.
"""

import importlib.util
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from tqdm import tqdm

from mmaudio_hf.config import Recipe, micro_batch_size, save_recipe, to_dict
from mmaudio_hf.data.dataset import Mixture
from mmaudio_hf.data.loader import training_batches
from mmaudio_hf.data.sampler import process_slots
from mmaudio_hf.models.network import FROZEN_TENSORS, MMAudio
from mmaudio_hf.training.checkpoint import TrainingState, latest_training_state, save_checkpoint
from mmaudio_hf.training.early_stopping import check_metric, judge
from mmaudio_hf.training.ema import PostHocEMA, find_snapshots, synthesize
from mmaudio_hf.training.finetune import published_state, save_adapter, seed_dropout
from mmaudio_hf.training.guard import Guard, StopSignals, append_line
from mmaudio_hf.training.optim import (
    build_optimizer,
    clip_gradients,
    guarded_step,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from mmaudio_hf.training.resume import check_same_run, identity, set_aside_later, truncate_metrics
from mmaudio_hf.training.step import flow_step
from mmaudio_hf.training.validation import Validator


class Evaluator(Protocol):
    """Something that is run every `every` steps, and after the last one, and returns scores for the log."""

    name: str
    every: int

    def run(self, model: MMAudio, step: int) -> dict[str, float]:
        """Score `model`, which holds the averaged weights; called on every process."""


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


def check_trackers(trackers: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not installed: accelerate would leave it out without a word."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"training.trackers names {name}, which is not installed: run `pip install {name}`")


def train(
    recipe: Recipe,
    network: MMAudio,
    mixture: Mixture,
    validation: Mixture | None = None,
    evaluators: Sequence[Evaluator] = (),
    write_extras: Callable[[Path], None] = lambda folder: None,
) -> RunResult:
    """Train `network` as `recipe` says and return how it went; everything else is in `recipe.run_dir`.

    `network` holds its initial weights (or those to fine-tune), latent statistics and empty-text features; a run folder
    with checkpoints is resumed when `recipe.resume` is "auto". `write_extras` adds files to every `pretrained_model/`.
    Raises ValueError for settings that do not fit the processes, and RunError after too many non-finite steps.
    """
    check_launch()
    check_trackers(recipe.training.trackers)
    accelerator = Accelerator(
        # accelerate's launcher does not hand `use_cpu` on to several processes, and without it they stay apart.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=recipe.training.mixed_precision,
        log_with=list(recipe.training.trackers) or None,
        project_config=ProjectConfiguration(str(recipe.run_dir), logging_dir=str(recipe.run_dir / "trackers")),
    )
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError(
            f"the launch started {os.environ['WORLD_SIZE']} processes that do not find each other: on a machine with"
            " GPUs that are not to be used, set ACCELERATE_USE_CPU=true"
        )
    micro_batch_size(recipe.training, accelerator.num_processes)  # refuses an uneven split before anything is made
    run = _Run(recipe, network, mixture, validation, evaluators, write_extras, accelerator)
    try:
        return run.go()
    finally:
        accelerator.end_training()


class _Run:
    """State of one run. Methods are in the order in which they happen."""

    def __init__(self, recipe, network, mixture, validation, evaluators, write_extras, accelerator: Accelerator):
        self.recipe, self.network, self.accelerator = recipe, network, accelerator
        self.mixture, self.evaluators = mixture, evaluators
        self.validation = None if validation is None else Validator(validation, recipe, accelerator)
        self.write_extras = write_extras
        self.run_dir = recipe.run_dir
        self.step = 0
        self.finished = False  # all steps are done, or validation no longer improves
        self.stop = StopSignals()
        self.guard = Guard(accelerator, self.run_dir, recipe.training.max_skipped_steps, self.stop)
        self.history: list[dict[str, float]] = []
        self.final_weights: dict[str, Any] = {}
        self.device = accelerator.device
        network.to(self.device).train()
        self.ema = PostHocEMA(network, recipe.ema.sigma_rels, recipe.ema.update_every)
        self.optimizer = build_optimizer(network, recipe.optim)
        # Sums since the last log line: loss, gradient norm, steps, then loss and count of every source.
        self.window = torch.zeros(3 + 2 * len(mixture.stores), device=self.device)
        self.window_steps, self.window_seconds = 0, 0.0

    def go(self) -> RunResult:
        training = self.recipe.training
        self._resume()
        self._prepare_folder()
        self.latent_mean, self.latent_std = self.network.latent_mean.clone(), self.network.latent_std.clone()
        self.model = self.accelerator.prepare(self.network)
        self._announce()
        main = self.accelerator.is_main_process
        first_step, busy = self.step, 0.0
        if self.step == 0:
            self._validate()
            if main:
                check_metric(training.early_stopping, list(self.history[-1]) if self.history else [])
        self._judge_finished()
        with (
            self.stop,
            tqdm(total=training.steps, initial=self.step, disable=not main, unit="step", dynamic_ncols=True) as bar,
            self._loader() as loader,
        ):
            self.clock = began = time.perf_counter()
            for batches in loader:
                self._update(batches)
                bar.update()
                asked = self.guard.check()
                ended = time.perf_counter()
                busy += ended - began
                self.window_seconds += ended - began
                self._housekeeping(bar, loader, asked)
                began = time.perf_counter()
                if asked or self.finished:
                    break
        stopped_by = None if self.finished else self.stop.number
        early = self.finished and self.step < training.steps
        rate = (self.step - first_step) / max(busy, 1e-9)
        return RunResult(self.step, stopped_by, self.guard.skipped, early, self.final_weights, rate, self.history)

    def _housekeeping(self, bar, loader, asked: bool) -> None:
        """Everything that happens every so many steps, and after the last one; not counted as training time."""
        training, last = self.recipe.training, self.step == self.recipe.training.steps
        if last or self.step % training.log_every == 0:
            self._log_training(bar, loader)
        if last or self.step % training.validate_every == 0:
            self._validate()
            self._judge_finished()
        if self.finished or self.step % self.recipe.ema.snapshot_every == 0:
            self._save_snapshots()
        self._evaluate()
        if asked or self.finished or self.step % training.checkpoint_every == 0:
            self.guard.settle()
            self._save_checkpoint()

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

    def _resume(self) -> None:
        """Take up the newest checkpoint, if there is one. Nothing is written before everything fits."""
        state, folder = None, self.run_dir / "checkpoints"
        if self.recipe.resume == "auto":
            state = latest_training_state(self.run_dir, self.accelerator.print)
        elif folder.exists():
            raise ValueError(
                f"{self.run_dir} holds checkpoints and resume is 'never': choose another name or resume=auto"
            )
        self.accelerator.wait_for_everyone()  # nobody changes the folder while another still reads
        if state is not None:
            check_same_run(self.recipe, state, self.accelerator.print)
            self.network.load_state_dict(state.tensors["model"])
            load_optimizer_tensors(self.network, self.optimizer, dict(state.tensors["optimizer"]))
            self.ema.load_tensors(state.tensors["ema"], state.facts["ema_step"])
            # The sums of a log window that was cut short; with other stores they have no meaning and are dropped.
            if self.accelerator.is_main_process and state.tensors["window"]["sums"].shape == self.window.shape:
                self.window.copy_(state.tensors["window"]["sums"])
            self.step, self.guard.skipped = state.step, state.facts["skipped"]
            self.final_weights = state.facts["weights"]
        if self.accelerator.is_main_process:
            self.history = truncate_metrics(self.run_dir / "metrics.jsonl", self.step)
            set_aside_later(self.run_dir, self.step, self.ema.step)

    def _prepare_folder(self) -> None:
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            partial = self.run_dir / "config.yaml.partial"
            save_recipe(self.recipe, partial)
            partial.replace(self.run_dir / "config.yaml")
        self.accelerator.wait_for_everyone()

    def _announce(self) -> None:
        training, world = self.recipe.training, self.accelerator.num_processes
        if training.trackers:
            self.accelerator.init_trackers(self.recipe.name, config={"recipe": json.dumps(to_dict(self.recipe))})
        parameters = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        self.accelerator.print(
            f"{self.recipe.name}: {world} process{'es' * (world > 1)} on {self.device.type},"
            f" batch {training.batch_size} = {world} x {training.accumulation_steps} x"
            f" {micro_batch_size(training, world)}, precision {training.mixed_precision},"
            f" {parameters / 1e6:.1f} M trainable parameters, {len(self.mixture)} rows per epoch"
            f" ({len(self.mixture) / training.batch_size:.1f} steps), from step {self.step} to {training.steps}"
        )

    def _loader(self):
        training, data = self.recipe.training, self.recipe.data
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return training_batches(
            self.mixture,
            seed=self.recipe.seed,
            global_batch=training.batch_size,
            slots=process_slots(training.batch_size, world, rank, training.accumulation_steps),
            start_step=self.step,
            num_steps=0 if self.finished else training.steps - self.step,
            prefetch=data.prefetch_batches,
            threads=data.read_threads,
            device=self.device,
        )

    # --- one update -------------------------------------------------------------------------------------------------

    def _update(self, batches) -> None:
        training = self.recipe.training
        set_learning_rate(self.optimizer, learning_rate(self.step, self.recipe.optim, training.steps))
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros_like(self.window)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                if self.recipe.finetune.lora.dropout:
                    seed_dropout(self.recipe.seed, self.step, index, self.accelerator.process_index)
                result = flow_step(self.model, batch, self.recipe.flow, self.latent_mean, self.latent_std)
                # DDP averages over processes: scaled so that the sum is the mean over the global batch.
                scale = self.accelerator.num_processes / training.batch_size
                self.accelerator.backward(result.loss.sum() * scale)
            self._add_losses(sums, result.loss.detach(), batch.source)
        norm = clip_gradients(self.network.parameters(), self.recipe.optim.max_grad_norm)
        refuse = self.guard.judge(self.step, sums[0], norm, [i for batch in batches for i in batch.ids])
        guarded_step(self.optimizer, refuse)
        sums[1] = norm / self.accelerator.num_processes  # the same on every process; summed over them when logged
        # A refused step counts for nothing in the averages: its numbers are not finite.
        self.window += torch.where(refuse, torch.zeros_like(sums), sums)
        if self.step >= self.recipe.ema.start:
            self.ema.update()
        self.step += 1
        self.window_steps += 1

    def _add_losses(self, sums: torch.Tensor, loss: torch.Tensor, source: torch.Tensor) -> None:
        sums[0] += loss.sum() / self.recipe.training.batch_size
        if self.accelerator.is_main_process:
            sums[2] = 1  # steps counted
        per_source = sums[3:].view(2, -1)
        per_source[0].index_add_(0, source, loss)
        per_source[1].index_add_(0, source, torch.ones_like(loss))

    # --- what is written on the way ---------------------------------------------------------------------------------

    def _log_training(self, bar, loader) -> None:
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
        self._log_speed(loader)
        bar.set_postfix(loss=f"{scores['train/loss']:.4f}", lr=f"{scores['train/learning_rate']:.1e}")

    def _log_speed(self, loader) -> None:
        seconds = max(self.window_seconds, 1e-9)
        rate = self.window_steps / seconds
        speed = {
            "speed/steps_per_second": rate,
            "speed/samples_per_second": rate * self.recipe.training.batch_size,
            "speed/data_wait": loader.wait_seconds / seconds,
            "speed/peak_memory_gb": peak_memory_gb(self.device),
        }
        self.window_steps, self.window_seconds, loader.wait_seconds = 0, 0.0, 0.0
        self.accelerator.log(speed, step=self.step)
        if self.accelerator.is_main_process:
            append_line(self.run_dir / "speed.jsonl", {"step": self.step, **speed})

    def _record(self, scores: dict[str, float]) -> None:
        """Log to metrics.jsonl and the trackers. Only what is reproducible goes here; timings have their own file."""
        self.accelerator.log(scores, step=self.step)
        if self.accelerator.is_main_process:
            self.history.append({"step": self.step, **scores})
            append_line(self.run_dir / "metrics.jsonl", self.history[-1])

    @torch.no_grad()
    def _validate(self) -> None:
        if self.validation is None:
            return
        weights: dict[str, Any] = {"val": None}
        if self.ema.step:
            weights["val_ema"] = self.ema.nearest(self.recipe.ema.sigma_rel)[1]
        scores = {}
        self.network.eval()
        for kind, values in weights.items():
            found = self.validation.scores(self._forward(values), self.latent_mean, self.latent_std)
            scores |= {f"{kind}/{name}": value for name, value in found.items()}
        self.network.train()
        self._record(scores)
        if self.accelerator.is_main_process:
            averaged = f", EMA {scores['val_ema/loss']:.4f}" if self.ema.step else ""
            tqdm.write(f"step {self.step}: validation loss {scores['val/loss']:.4f}{averaged}")

    def _forward(self, weights: dict[str, torch.Tensor] | None) -> Callable[..., torch.Tensor]:
        """The network in training, or with other weights in their place."""

        def forward(*args, **kwargs):
            with self.accelerator.autocast():
                if weights is None:
                    return self.network(*args, **kwargs)
                return torch.func.functional_call(self.network, weights, args, kwargs)

        return forward

    def _evaluate(self) -> None:
        due = [e for e in self.evaluators if self.step % e.every == 0 or self.finished]
        if due:
            model = self._averaged_network()
            for evaluator in due:
                self._record({f"{evaluator.name}/{k}": v for k, v in evaluator.run(model, self.step).items()})

    def _averaged_network(self) -> MMAudio:
        return self._published(self._averages()[0]).to(self.device).eval()

    def _published(self, state: dict[str, torch.Tensor]) -> MMAudio:
        state = published_state(state, self.recipe.finetune.lora)
        return MMAudio.from_config_and_state(self.network.config, state, "EMA")

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

    def _save_snapshots(self) -> None:
        if self.accelerator.is_main_process and self.ema.step:
            self.ema.save_snapshots(self.run_dir / "ema")
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self) -> None:
        window = self.accelerator.reduce(self.window.clone(), "sum")
        averages, self.final_weights = self._averages()
        if self.accelerator.is_main_process:
            facts = {"skipped": self.guard.skipped, "ema_step": self.ema.step, "weights": self.final_weights}
            facts |= identity(self.recipe)
            tensors = {
                "model": self.network.state_dict(),
                "optimizer": optimizer_tensors(self.network, self.optimizer),
                "ema": self.ema.tensors(),
                "window": {"sums": window},
            }

            def write_pretrained(folder: Path) -> None:
                self._published(averages).save_pretrained(folder)
                if self.recipe.finetune.lora.rank:
                    save_adapter(averages, self.recipe, folder.with_name("adapter"))
                (folder / "weights.json").write_text(json.dumps(self.final_weights) + "\n")
                self.write_extras(folder)

            state = TrainingState(self.step, tensors, facts)
            save_checkpoint(self.run_dir, state, write_pretrained, self.recipe.training.keep_checkpoints)
        # The sums over all processes are with the first one now, here and after a resume.
        self.window.copy_(window if self.accelerator.is_main_process else torch.zeros_like(window))
        self.accelerator.wait_for_everyone()


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held: on the accelerator, or resident on the host when there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
