"""What ends a run early or keeps a step from the weights: signals, and numbers that are not finite."""

import json
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from mmaudio_hf.config import Recipe
from mmaudio_hf.data.loader import Batch
from mmaudio_hf.schema import CLIP_FEATURES, MEAN, STD, SYNC_FEATURES, TEXT_FEATURES, RunError
from mmaudio_hf.training.checkpoint import latest_training_state
from mmaudio_hf.training.distributed import local_shard

if TYPE_CHECKING:
    from mmaudio_hf.training.loop import Run

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# `timeout` signals its child and then the whole group; nobody who has read the line below asks again so soon.
ONE_PRESS_SECONDS = 2.0


class StopSignals:
    """Keeps the first of `STOP_SIGNALS` instead of ending the process; a later one interrupts at once.

    torchrun passes on what a terminal has sent to all processes: under it one repetition means nothing, whenever it
    comes.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._passed_on = "TORCHELASTIC_RUN_ID" in os.environ
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # nohup ignores SIGHUP: it stays ignored.
            kept = signal.SIGHUP if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else None
            self._before = {n: signal.signal(n, self._handle) for n in STOP_SIGNALS if n != kept}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            tqdm.write(f"{signal.Signals(number).name}: saving a checkpoint after this step; once more to stop at once")
        elif self._passed_on and number == self.number:
            self._passed_on = False
        elif time.monotonic() - self._since > ONE_PRESS_SECONDS:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class StepTrace:
    """The numbers of one step, on the device; B samples of this process in the order of its micro-batches."""

    step: int
    ids: list[str]
    source: torch.Tensor  # (B,) int64, index of the store
    loss: torch.Tensor  # (B,)
    t: torch.Tensor  # (B,)
    gradient_norms: torch.Tensor  # (P,) of every trainable tensor, in the order of the parameters
    total_norm: torch.Tensor  # ()


class Guard:
    """Keeps non-finite steps from the optimizer and lets all processes stop after the same step.

    Whether a step is finite is decided on the device and read one step later, so the host never waits for it. `on_skip`
    is called on every process for a step that was skipped.
    """

    def __init__(self, accelerator: Accelerator, max_skipped_steps: int, on_skip: Callable[[StepTrace], None]):
        self.accelerator, self.on_skip, self.max_skipped_steps = accelerator, on_skip, max_skipped_steps
        self.signals = StopSignals()
        self.skipped = 0  # over all sessions of the run
        self.stopped_by: int | None = None  # number of the signal that a process has had, the same on all of them
        self._in_a_row = 0
        self._pending: deque[tuple[StepTrace, torch.Tensor, torch.cuda.Event | None]] = deque()

    def check_finite(self, trace: StepTrace) -> torch.Tensor:
        """`found_inf`: True, (), on the device of every process, where this step must not reach the optimizer."""
        found_inf = ~(torch.isfinite(trace.loss).all() & torch.isfinite(trace.total_norm))
        found_inf = found_inf.to(torch.int32)
        flags = torch.stack([found_inf, torch.full_like(found_inf, self.signals.number or 0)])
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        on_host = flags.to("cpu", non_blocking=True)  # from CUDA: pinned, and valid once the event has been recorded
        event = torch.cuda.current_stream(flags.device).record_event() if flags.is_cuda else None
        self._pending.append((trace, on_host, event))
        return flags[0] > 0

    def poll(self) -> int | None:
        """Read the flags of all steps but the last one; the signal that a process has had, or None."""
        self._read(keep=1)
        return self.stopped_by

    def settle(self) -> None:
        """Read all flags, before a checkpoint."""
        self._read(keep=0)

    def _read(self, keep: int) -> None:
        while len(self._pending) > keep:
            trace, flags, event = self._pending.popleft()
            if event is not None:
                event.synchronize()  # waits for the copy alone, not for work queued after it
            found_inf, number = flags.tolist()
            self.stopped_by = self.stopped_by or number or None
            self._in_a_row = self._in_a_row + 1 if found_inf else 0
            if found_inf:
                self.skipped += 1
                self.on_skip(trace)
            if self._in_a_row >= self.max_skipped_steps:
                raise RunError(
                    f"{self._in_a_row} steps in a row were not finite: their samples are in skipped.jsonl and autopsy/"
                    " of the run; the last checkpoint is intact, lower optim.learning_rate or check the data and start"
                    " again"
                )


# --- Diagnostics of a step that was not finite -----------------------------------------------------------------------


MAX_FILES = 100  # per run: more of them say nothing new


def diagnose_step(model: nn.Module, trace: StepTrace, batches: Iterable[Batch], learning_rate: float) -> dict[str, Any]:
    """Losses, features, gradients and weights of a step; called on every process, each with its share of the step.

    `batches` are read once more. `suspects` are the samples whose loss or features are not finite. Gradient norms are
    those before clipping, by block of the model.
    """
    losses, times = trace.loss.tolist(), trace.t.tolist()
    entries: list[dict[str, Any]] = []  # of the samples of this process; features that one lacks are left out
    for batch in batches:
        video_row = {batch_row: row for row, batch_row in enumerate(batch.video_rows.tolist())}
        for i, item_id in enumerate(batch.ids):
            columns = {MEAN: batch.mean[i], STD: batch.std[i]}
            if i in video_row:
                columns |= {CLIP_FEATURES: batch.clip_features[video_row[i]]}
                columns |= {SYNC_FEATURES: batch.sync_features[video_row[i]]}
            if batch.has_text[i]:
                columns[TEXT_FEATURES] = batch.text_features[i]
            features = {name: _statistics(values) for name, values in columns.items()}
            numbers = {"loss": losses[len(entries)], "t": times[len(entries)], "features": features}
            entries.append({"id": item_id, "slot": batch.sample_indices[i], **numbers})
    samples = sorted(gather_object(entries), key=lambda sample: sample["slot"])
    # Each process checks the weights, or the shards of them, that it holds.
    nonfinite = set(gather_object([n for n, p in model.named_parameters() if not local_shard(p).isfinite().all()]))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    norms = dict(zip(trainable, trace.gradient_norms.tolist(), strict=True))
    blocks: dict[str, float] = {}
    for name, norm in norms.items():
        first, second, *_ = [*name.split("."), ""]
        block = f"{first}.{second}" if second.isdigit() else first  # joint_blocks.3, final_layer
        blocks[block] = math.hypot(blocks.get(block, 0.0), norm)
    return {
        "step": trace.step,
        "learning_rate": learning_rate,
        "loss": sum(sample["loss"] for sample in samples) / len(samples),
        "gradient_norm": float(trace.total_norm),
        "suspects": [
            sample["id"]
            for sample in samples
            if not math.isfinite(sample["loss"]) or any(c["nonfinite"] for c in sample["features"].values())
        ],
        "gradient_norms": blocks,
        "nonfinite_gradients": [name for name, norm in norms.items() if not math.isfinite(norm)],
        "nonfinite_parameters": [name for name, _ in model.named_parameters() if name in nonfinite],
        "samples": samples,
    }


def _statistics(values: torch.Tensor) -> dict[str, float]:
    finite = values.isfinite()
    kept = values[finite].double()
    figures = {"min": kept.min(), "max": kept.max(), "mean": kept.mean()} if len(kept) else {}
    figures |= {"std": kept.std(correction=0)} if len(kept) else {}
    return {name: float(value) for name, value in figures.items()} | {"nonfinite": int((~finite).sum())}


def replay_step(
    recipe: Recipe, start: Callable[[Recipe], "Run"], step: int, *, advance: bool, log: Callable[[str], None]
) -> dict[str, Any]:
    """Diagnostics of the update that followed `step` completed ones, run once more; nothing in the run is changed.

    `start` makes a `Run` of a recipe in this one process. The weights are those of the last checkpoint at `step` or
    before (the initial ones, where there is none), or with `advance` those that training on to `step` makes of them.
    When the gradient is not finite though every loss is, each sample is tried alone and becomes a suspect if its own
    gradient is not. ValueError for a step beyond the run.
    """
    if not 0 <= step < recipe.training.steps:
        raise ValueError(f"step {step} is not one of 0 to {recipe.training.steps - 1}, the steps of {recipe.name}")
    state = latest_training_state(recipe.run_dir, log, until=step)
    processes = state.metadata.get("processes", 1) if state else 1
    # The micro-batches of all processes, one after the other: the same samples together, the same memory.
    accumulation = recipe.training.accumulation_steps * processes
    training = replace(recipe.training, accumulation_steps=accumulation, trackers=(), best_metric="")
    run = start(replace(recipe, training=training))
    run.guard.on_skip = lambda trace: log(f"step {trace.step} is skipped, as it was")
    if state is not None:
        if different := run.differences(state):
            log("warning: this is not the step that was trained:\n" + "\n".join(different))
        run.load(state)
    run.prepare()
    if advance and run.step < step:
        log(f"training from step {run.step} to {step}")
        with run.loader(step) as loader:
            for batches in loader:
                run.update(batches)
                run.guard.poll()
    weights_of_step, run.step = run.step, step
    with run.loader(step + 1) as loader:
        trace = run.backward(next(loader))
        figures = {"weights_of_step": weights_of_step} | run.diagnose(trace)
    if not figures["suspects"] and not math.isfinite(figures["gradient_norm"]):
        for sample in figures["samples"]:
            with run.loader(step + 1, sample_indices=[np.array([sample["slot"]])]) as loader:
                if not run.backward(next(loader)).total_norm.isfinite():
                    figures["suspects"].append(sample["id"])
    return figures


def to_json(figures: Any) -> str:
    """Figures as JSON, where numbers that are not finite are the strings "nan", "inf" and "-inf"."""
    strings = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}  # JSON has no such numbers, Python writes them
    plain = json.loads(json.dumps(figures), parse_constant=strings.__getitem__)
    return json.dumps(plain, indent=1) + "\n"


def write_diagnostics(run_dir: Path, figures: Mapping[str, Any]) -> None:
    """Write `autopsy/step_N.json`, unless the run has `MAX_FILES` of them."""
    path = run_dir / f"autopsy/step_{figures['step']}.json"
    path.parent.mkdir(exist_ok=True)
    if path.exists() or len(list(path.parent.glob("step_*.json"))) < MAX_FILES:
        path.write_text(to_json(figures))


def summary(figures: Mapping[str, Any]) -> str:
    """Diagnostics as lines of text: the whole step, its suspects, then every sample."""
    lines = [
        f"step {figures['step']}: loss {figures['loss']:.6g}, gradient norm {figures['gradient_norm']:.6g},"
        f" learning rate {figures['learning_rate']:.3g}"
    ]
    if "weights_of_step" in figures:
        lines.append(f"weights: those after {figures['weights_of_step']} updates")
    titles = {"suspects": "suspects", "nonfinite_gradients": "gradients not finite"}
    for name, title in (titles | {"nonfinite_parameters": "weights not finite"}).items():
        names = figures[name]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append(f"{title}: {', '.join(names[:5]) or 'none'}{more}")
    for sample in figures["samples"]:
        sizes = {n: max(abs(c.get("min", 0.0)), abs(c.get("max", 0.0))) for n, c in sample["features"].items()}
        largest = ", ".join(f"{name} {size:.3g}" for name, size in sizes.items())
        lines.append(f"  {sample['id']}: loss {sample['loss']:.6g}, t {sample['t']:.4f}; largest values: {largest}")
    return "\n".join(lines)
