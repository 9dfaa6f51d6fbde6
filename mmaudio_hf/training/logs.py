"""What a run logs: metrics.jsonl and the trackers, speed.jsonl, skipped.jsonl, and lines on the terminal."""

import importlib
import importlib.util
import json
import math
import os
import re
import secrets
import sys
import tempfile
import time
import wave
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from tqdm import tqdm

from mmaudio_hf.config import Recipe, micro_batch_size, read_json_lines, samples_per_step, to_dict
from mmaudio_hf.data.loader import Batch
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.schema import AudioSample, RunError
from mmaudio_hf.training.guard import write_diagnostics
from mmaudio_hf.training.memory import training_flops


class RunLog:
    """The log files and trackers of a run. Only the main process writes; what all processes compute is reduced first.

    stores: names of the stores of `data.train`.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, stores: Sequence[str]):
        check_trackers(recipe.training.trackers)
        self.recipe, self.accelerator = recipe, accelerator
        self.running = RunningMetrics(stores, accelerator)
        self.history: list[dict[str, Any]] = []  # lines of metrics.jsonl, on the main process
        files = (JsonLines(recipe.run_dir / f"{name}.jsonl", self.warn) for name in ("metrics", "speed", "skipped"))
        self.metrics, self.speed, self.skipped = files

    def print(self, message: str) -> None:
        """Print a line on the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message)

    def warn(self, message: str) -> None:
        """Report what has failed and does not end the run."""
        tqdm.write(f"warning: {message}; training continues")

    def start(self, step: int, model: torch.nn.Module, mixture: Mixture, sharded: bool) -> None:
        """Start the trackers and print what is trained on what, from `step` on.

        A resumed run continues what it began in wandb and trackio. RunError naming a tracker that does not start.
        """
        recipe, training, world_size = self.recipe, self.recipe.training, self.accelerator.num_processes
        if self.accelerator.is_main_process and training.trackers:
            self._start_trackers()
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        batches, steps = [], 0.0
        for bucket in mixture.buckets:
            latents = bucket.lengths[0]
            size, micro = samples_per_step(training, latents), micro_batch_size(training, world_size, latents)
            of_duration = f" of {bucket.duration:g} s" if len(mixture.buckets) > 1 else ""
            batches.append(f"{size}{of_duration} = {world_size} x {training.accumulation_steps} x {micro}")
            steps += bucket.samples / size
        self.accelerator.print(
            f"{recipe.name}: {world_size} process{'es' * (world_size > 1)} on {self.accelerator.device.type},"
            f" batch {', '.join(batches)}, precision {training.mixed_precision},"
            f" {parameters / 1e6:.1f} M trainable parameters{', sharded' if sharded else ''},"
            f" {len(mixture)} rows per epoch ({steps:.1f} steps), from step {step} to {training.steps}"
        )

    def _start_trackers(self) -> None:
        recipe, folder = self.recipe, self.recipe.run_dir / "trackers"
        folder.mkdir(exist_ok=True)
        id_file = folder / "id"  # names of runs may repeat
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        run_id, project = id_file.read_text(errors="replace"), recipe.training.tracker_project
        if not re.fullmatch("[0-9a-f]{8}", run_id):
            raise RunError(f"{id_file} is damaged: remove it, and trackers begin a new run")
        makers: dict[str, Callable[[], GeneralTracker]] = {
            "tensorboard": lambda: TensorBoardTracker(recipe.name, folder),
            "wandb": lambda: WandBTracker(project, id=run_id, name=recipe.name, resume="allow", dir=str(folder)),
            "trackio": lambda: TrackioTracker(project, name=f"{recipe.name}-{run_id}", resume="allow"),
        }
        for name in recipe.training.trackers:
            try:
                tracker = makers[name]()
                tracker.start()
                tracker.store_init_configuration({"recipe": json.dumps(to_dict(recipe))})
            except Exception as error:  # three packages, each with errors of its own
                raise RunError(f"the tracker {name} could not be started ({error}): see training.trackers") from error
            self.accelerator.trackers.append(tracker)

    def scores(self, step: int, scores: Mapping[str, float | None]) -> None:
        """Log to metrics.jsonl and the trackers. Only what is reproducible goes here; timings have their own file.

        What is None or not finite is null in the file, and left out of the trackers.
        """
        finite = {name: value for name, value in scores.items() if value is not None and math.isfinite(value)}
        self.accelerator.log(finite, step=step)
        if self.accelerator.is_main_process:
            # The history too, so that a run decides alike before and after it has been read from the file.
            self.history.append({"step": step, **dict.fromkeys(scores), **finite})
            self.metrics.append(self.history[-1])

    def audio(self, kind: str, samples: Sequence[AudioSample], step: int) -> None:
        """Log audio to every tracker, as KIND/NAME; accelerate logs none."""
        for tracker in self.accelerator.trackers if samples and self.accelerator.is_main_process else ():
            run: Any = tracker.tracker  # a SummaryWriter of TensorBoard, or a run of wandb or trackio
            if tracker.name == "tensorboard":
                for sample in samples:
                    name = f"{kind}/{sample.name}"
                    run.add_audio(name, sample.waveform[None], step, sample_rate=sample.sample_rate)
                run.flush()
                continue
            player = importlib.import_module(tracker.name).Audio
            # They take arrays too, but wandb needs another package for them, and trackio scales each to full loudness.
            with tempfile.TemporaryDirectory() as folder:
                players = {}
                for number, sample in enumerate(samples):
                    path = str(Path(folder) / f"{number}.wav")
                    with wave.open(path, "wb") as file:
                        file.setparams((1, 2, sample.sample_rate, 0, "NONE", ""))
                        file.writeframes((sample.waveform.clamp(-1, 1) * 32767).short().numpy().tobytes())
                    players[f"{kind}/{sample.name}"] = player(path, caption=sample.caption)
                run.log(players, step=step)  # copies the files

    def skipped_step(self, figures: Mapping[str, Any]) -> None:
        """Log a step that was not finite, given its diagnostics."""
        if not self.accelerator.is_main_process:
            return
        suspects = f"; not finite: {', '.join(figures['suspects'][:5])}" if figures["suspects"] else ""
        tqdm.write(f"step {figures['step']}: loss or gradient is not finite, the step is skipped{suspects}")
        self.skipped.append({"step": figures["step"], "ids": [sample["id"] for sample in figures["samples"]]})
        try:
            write_diagnostics(self.recipe.run_dir, figures)
        except OSError as error:
            self.warn(str(error))


class RunningMetrics:
    """Sums since the last log line, on the device: the host waits for them only when they are logged.

    (3 + 2 S,): loss, gradient norm and steps, then the loss and the number of samples of each of S stores.
    """

    def __init__(self, stores: Sequence[str], accelerator: Accelerator):
        self._stores, self._accelerator = stores, accelerator
        self.sums = torch.zeros(3 + 2 * len(stores), device=accelerator.device)

    def add(self, loss: torch.Tensor, source: torch.Tensor, gradient_norm: torch.Tensor, skipped: torch.Tensor) -> None:
        """Add a step: loss and store (B,) of the samples of this process. A `skipped` one, (), counts for nothing."""
        step = torch.zeros_like(self.sums)
        step[0] = loss.sum() / (len(loss) * self._accelerator.num_processes)  # the size of the step
        step[1] = gradient_norm / self._accelerator.num_processes  # the same on every process, which are summed
        step[2].fill_(float(self._accelerator.is_main_process))  # `step[2] = 1` would be a copy from the host
        losses, counts = step[3:].view(2, -1)
        losses.index_add_(0, source, loss)
        counts.index_add_(0, source, torch.ones_like(loss))
        self.sums += torch.where(skipped, torch.zeros_like(step), step)  # not a product: 0 * nan is nan

    def gather(self) -> torch.Tensor:
        """The sums over all processes, for a checkpoint; from now on the first process has them, as after a resume."""
        total = self._accelerator.reduce(self.sums.clone(), "sum")
        self.sums.copy_(total if self._accelerator.is_main_process else torch.zeros_like(total))
        return total

    def restore(self, sums: torch.Tensor) -> None:
        """Continue from the sums of a checkpoint; with other stores they have no meaning and are dropped."""
        if self._accelerator.is_main_process and sums.shape == self.sums.shape:
            self.sums.copy_(sums)

    def means(self) -> dict[str, float | None]:
        """Means since the last call, over all processes; None where every step was skipped."""
        loss, norm, steps, *per_store = self._accelerator.reduce(self.sums.clone(), "sum").tolist()
        self.sums.zero_()
        totals = {"train/loss": loss, "train/grad_norm": norm}
        means = {name: total / steps if steps else None for name, total in totals.items()}
        count = len(self._stores)
        for store, total, samples in zip(self._stores, per_store[:count], per_store[count:], strict=True):
            if samples:
                means[f"train/loss_{store}"] = total / samples
        return means


class JsonLines:
    """A log file to which lines are added; while they cannot be written they wait in memory, with one warning."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path, self.warn = path, warn
        self._waiting: list[dict] = []
        self._warned = False

    def append(self, entry: dict) -> None:
        """Add one line, and those that wait."""
        self._waiting.append(entry)
        data = "".join(json.dumps(entry) + "\n" for entry in self._waiting).encode()
        try:
            # Without a buffer: of a buffered line a full disk could keep one half, and the rest would follow later.
            with open(self.path, "ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if file.write(data) < len(data):
                    file.truncate(end)
                    raise OSError("the disk is full")
            self._waiting, self._warned = [], False
        except OSError as error:
            if not self._warned:
                self.warn(f"{self.path} could not be written ({error}); its lines wait in memory")
            self._warned = True

    @property
    def waiting(self) -> bool:
        """Whether there are lines that could not be written yet."""
        return bool(self._waiting)


def truncate_lines(path: Path, keep: Callable[[int], bool]) -> list[dict]:
    """Drop the lines of a log that a killed run wrote after its last checkpoint, by their step; return the others.

    Damaged lines, except for a last one that the kill cut short, go to a file beside it, with a warning.
    """
    if not path.exists():
        return []
    entries, damaged = read_json_lines(path)
    if damaged and not path.read_bytes().endswith(b"\n"):
        damaged.pop()
    kept = [entry for entry in entries if keep(entry["step"])]
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        with open(aside, "ab") as file:
            file.writelines(line + b"\n" for line in damaged)
        tqdm.write(f"warning: {path} has {len(damaged)} damaged lines, which are moved to {aside}", file=sys.stderr)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    partial.replace(path)
    return kept


# --- Cost of a run: speed, waiting for data, use of the device, memory, time left ------------------------------------


# Part of the device's name -> dense bf16 TFLOP/s with float32 sums, from the makers' data sheets. First match counts.
PEAK_BF16 = (
    {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312}
    | {"A10G": 70, "A10": 125, "A40": 149.7, "A30": 165, "L40S": 362, "L40": 181, "L4": 121}
    | {"RTX 6000 Ada": 364, "RTX A6000": 154.8, "RTX 4090": 165.2, "RTX 3090": 71}
    | {"MI300X": 1307, "MI250": 181}  # of one of the two dies of a MI250, which is what a process has
)
_MEASURED_SIZE = {"cpu": 512, "cuda": 4096}
_MEASURING_SECONDS = 0.2


class Peak(NamedTuple):
    """Most FLOP/s that one device can do, and how that is known."""

    flops_per_second: float
    measured: bool


def device_peak(device: torch.device, mixed_precision: str) -> Peak:
    """From the table for bf16 on a known GPU; else the best of a few square matrix products, timed for 0.2 s."""
    if device.type == "cuda" and mixed_precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for model, rate in PEAK_BF16.items():
            if model.replace(" ", "") in name.replace(" ", "").replace("-", ""):
                return Peak(rate * 1e12, False)
    size = _MEASURED_SIZE.get(device.type, 1024)
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < _MEASURING_SECONDS:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number waits for the device
        best = min(best, time.perf_counter() - started)
    return Peak(2.0 * size**3 / best, True)


class Progress(AbstractContextManager["Progress"]):
    """Times the steps of a session, without validation and saving, for speed.jsonl, the trackers and a progress bar."""

    def __init__(self, log: RunLog, first_step: int):
        self._log, self._first_step = log, first_step
        training = log.recipe.training
        self._peak = device_peak(log.accelerator.device, training.mixed_precision)
        self._flops_of = {log.recipe.model.latent_length: training_flops(log.recipe.model)}  # of one sample
        how: dict[str, Any] = {"initial": first_step, "disable": not log.accelerator.is_main_process}
        self._bar = tqdm(total=training.steps, unit="step", dynamic_ncols=True, **how)
        self._steps, self._seconds, self._samples = 0, 0.0, Counter[int]()  # since the last report, samples by latents
        self._began = self._step_began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def start_step(self) -> None:
        """Start the clock, before the batches of a step are read."""
        self._step_began = time.perf_counter()

    def end_step(self, batches: Sequence[Batch]) -> None:
        """Stop the clock, after a step of these micro-batches."""
        self._steps += 1
        self._seconds += time.perf_counter() - self._step_began
        latents, clip, sync = batches[0].lengths
        self._samples[latents] += sum(len(batch.ids) for batch in batches) * self._log.accelerator.num_processes
        if latents not in self._flops_of:
            config = replace(self._log.recipe.model, latent_length=latents, clip_length=clip, sync_length=sync)
            self._flops_of[latents] = training_flops(config)
        self._bar.update()

    def report(self, step: int, wait_seconds: float, stall_seconds: float, line: Mapping[str, float | None]) -> None:
        """Log what the steps since the last report cost, `step` being done; every process calls it.

        Since then this process has waited `wait_seconds` for data and `stall_seconds` for checkpoints. The progress bar
        shows some scores of the log `line` too.
        """
        accelerator, training = self._log.accelerator, self._log.recipe.training
        seconds, device = max(self._seconds, 1e-9), accelerator.device
        own = [seconds, wait_seconds / seconds, self._peak.flops_per_second, peak_memory_gb(device)]
        times, waits, peaks, memory = accelerator.gather(torch.tensor([own], dtype=torch.float64, device=device)).T
        mean, done, by_latents = times.mean().item(), self._steps, self._samples
        samples = by_latents.total() / mean
        flops = sum(self._flops_of[latents] * count for latents, count in by_latents.items())
        self._steps, self._seconds, self._samples = 0, 0.0, Counter()
        elapsed = time.perf_counter() - self._began
        speed = {
            "speed/steps_per_second": done / mean,
            "speed/samples_per_second": samples,
            "speed/latents_per_second": sum(latents * count for latents, count in by_latents.items()) / mean,
            "speed/data_wait": waits.mean().item(),
            "speed/model_flop_utilisation": flops / mean / peaks.sum().item(),
            "speed/peak_memory_gb": memory.max().item(),
            "speed/seconds_left": elapsed / (step - self._first_step) * (training.steps - step),
            "speed/checkpoint_stall_seconds": stall_seconds,
        }
        accelerator.log(speed, step=step)
        if accelerator.is_main_process:
            self._log.speed.append({"step": step, **speed})
        self._bar.set_postfix(
            {
                "loss": "-" if line["train/loss"] is None else f"{line['train/loss']:.4f}",
                "lr": f"{line['train/learning_rate']:.1e}",
                "samples/s": f"{samples:.3g}",
                "wait": f"{speed['speed/data_wait']:.0%}",
                "mfu": f"{speed['speed/model_flop_utilisation']:.0%}",
                "mem": f"{speed['speed/peak_memory_gb']:.1f}G",
            }
        )


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has used: on the accelerator, or resident on the host when there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Not getrusage, which counts what the program that started this one used.
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024 / 1e9


# --- Trackers --------------------------------------------------------------------------------------------------------


def check_trackers(trackers: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not installed (accelerate would leave it out) or that needs a login."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"training.trackers names {name}, which is not installed: run `pip install {name}`")
    if "wandb" in trackers:
        import wandb

        try:
            mode = wandb.setup().settings.mode
            ready = mode in ("offline", "disabled") or wandb.login(prompt=False, verify=False)
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"training.trackers names wandb, whose settings are not valid: {reason}") from error
        if not ready:
            raise ValueError(
                "training.trackers names wandb, and nobody is logged in: run `wandb login`, set WANDB_API_KEY, or"
                " WANDB_MODE=offline to upload later by `wandb sync`"
            )
