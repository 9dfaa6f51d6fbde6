"""What ends a run early or keeps a step out of it: signals, and numbers that are not finite."""

import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from mmaudio_hf.data.loader import Batch
from mmaudio_hf.schema import CLIP_FEATURES, MEAN, STD, SYNC_FEATURES, TEXT_FEATURES, RunError
from mmaudio_hf.training.distributed import local_shard

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ONE_PRESS_SECONDS = 2.0  # a launcher passes on the signal that the whole process group has already had


class StopSignals:
    """Notes the first of SIGINT, SIGTERM and SIGUSR1 instead of dying of it; a later one interrupts at once."""

    def __init__(self):
        self.number: int | None = None
        self._noted = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def _note(self, number: int, _frame) -> None:
        if self.number is None:
            self.number, self._noted = number, time.monotonic()
            tqdm.write(f"{signal.Signals(number).name}: saving a checkpoint after this step; once more to stop at once")
        elif time.monotonic() - self._noted > ONE_PRESS_SECONDS:
            raise KeyboardInterrupt

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _OnHost:
    """A small tensor on its way to the host; reading it waits for the copy alone, not for work queued after it."""

    def __init__(self, values: torch.Tensor):
        self.event = None
        self.values = values
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.current_stream(values.device).record_event()

    def read(self) -> list[int]:
        """The values, as soon as they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


@dataclass(frozen=True)
class StepTrace:
    """What is known of one step's numbers, on the device; samples are those of this process, in micro-batch order."""

    step: int
    ids: list[str]
    loss: torch.Tensor  # (B,)
    t: torch.Tensor  # (B,)
    gradient_norms: torch.Tensor  # (P,) of every trainable tensor, in the order of the parameters
    total_norm: torch.Tensor  # ()


class Guard:
    """Keeps non-finite steps from the optimizer and lets all processes stop after the same step.

    The verdict on a step is formed on the device and read one step later, so the host never waits for it. `on_skip` is
    called on every process for a step that was refused.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        max_skipped_steps: int,
        stop: StopSignals,
        on_skip: Callable[[StepTrace], None],
    ):
        self.accelerator, self.stop, self.on_skip = accelerator, stop, on_skip
        self.max_skipped_steps = max_skipped_steps
        self.skipped = 0  # over all sessions of the run
        self.pending: deque[tuple[StepTrace, _OnHost]] = deque()
        self.in_a_row = 0
        self.stopped_by: int | None = None  # number of the signal that a process has had, the same on all of them

    def judge(self, trace: StepTrace) -> torch.Tensor:
        """True (a boolean scalar on the device) where this step must not reach the optimizer, on every process."""
        bad = ~(torch.isfinite(trace.loss).all() & torch.isfinite(trace.total_norm))
        bad = bad.to(torch.int32)
        flags = torch.stack([bad, torch.full_like(bad, self.stop.number or 0)])
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self.pending.append((trace, _OnHost(flags)))
        return flags[0] > 0

    def check(self) -> bool:
        """Read the verdicts of all steps but the last; True when a process was asked to stop."""
        while len(self.pending) > 1:
            self._settle_one()
        return self.stopped_by is not None

    def settle(self) -> None:
        """Read all verdicts, before a checkpoint."""
        while self.pending:
            self._settle_one()

    def _settle_one(self) -> None:
        trace, flags = self.pending.popleft()
        bad, signal_number = flags.read()
        self.stopped_by = self.stopped_by or signal_number or None
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if not bad:
            return
        self.skipped += 1
        self.on_skip(trace)
        if self.in_a_row >= self.max_skipped_steps:
            raise RunError(
                f"{self.in_a_row} steps in a row were not finite: their samples are in skipped.jsonl and autopsy/ of"
                " the run; the last checkpoint is as it was, lower optim.learning_rate or check the data and start"
                " again"
            )


# --- What a step looked like whose numbers were not finite -----------------------------------------------------------


MAX_AUTOPSIES = 100  # files per run: a run that skips more has shown what it can


def autopsy_path(run_dir: Path, step: int) -> Path:
    """File of the autopsy of the update that followed `step` completed ones."""
    return run_dir / "autopsy" / f"step_{step}.json"


def examine_samples(trace: StepTrace, batches: Iterable[Batch], slots: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per sample of this process: id, slot, loss, t, and statistics of its features (absent ones left out).

    `batches` are those of the step, read once more; `slots` the global slots of their samples.
    """
    losses, times, entries = trace.loss.tolist(), trace.t.tolist(), []
    for batch in batches:
        video_row = {sample: row for row, sample in enumerate(batch.video_rows.tolist())}
        for i, item_id in enumerate(batch.ids):
            columns = {MEAN: batch.mean[i], STD: batch.std[i]}
            if i in video_row:
                columns |= {CLIP_FEATURES: batch.clip_features[video_row[i]]}
                columns |= {SYNC_FEATURES: batch.sync_features[video_row[i]]}
            if batch.has_text[i]:
                columns[TEXT_FEATURES] = batch.text_features[i]
            place = len(entries)
            features = {name: _statistics(values) for name, values in columns.items()}
            entries.append(
                {"id": item_id, "slot": int(slots[place]), "loss": losses[place], "t": times[place]}
                | {"features": features}
            )
    return entries


def broken_parameters(network: nn.Module) -> list[str]:
    """Names of the parameters with values, of those that this process holds, that are not finite."""
    return [name for name, parameter in network.named_parameters() if not local_shard(parameter).isfinite().all()]


def _statistics(values: torch.Tensor) -> dict[str, float]:
    finite = values.isfinite()
    good = values[finite].double()
    if not len(good):
        return {"nonfinite": values.numel()}
    figures = {"min": good.min(), "max": good.max(), "mean": good.mean(), "std": good.std(correction=0)}
    return {name: float(value) for name, value in figures.items()} | {"nonfinite": int((~finite).sum())}


def examine_step(
    network: nn.Module,
    trace: StepTrace,
    samples: Sequence[Mapping[str, Any]],
    broken: Sequence[str],
    learning_rate: float,
) -> dict[str, Any]:
    """The whole autopsy, given `examine_samples` and `broken_parameters` of every process.

    `suspects` are the samples whose loss or features are not finite. Gradient norms are those before clipping, by
    block of the network.
    """
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    norms = dict(zip(names, trace.gradient_norms.tolist(), strict=True))
    groups: dict[str, float] = {}
    for name, norm in norms.items():
        group = _group(name)
        groups[group] = math.hypot(groups.get(group, 0.0), norm)
    samples = sorted(samples, key=lambda sample: sample["slot"])
    return {
        "step": trace.step,
        "learning_rate": learning_rate,
        "loss": sum(sample["loss"] for sample in samples) / len(samples),
        "gradient_norm": float(trace.total_norm),
        "suspects": [s["id"] for s in samples if not math.isfinite(s["loss"]) or _has_nonfinite(s["features"])],
        "gradient_norms": groups,
        "nonfinite_gradients": [name for name, norm in norms.items() if not math.isfinite(norm)],
        "nonfinite_parameters": [name for name, _ in network.named_parameters() if name in set(broken)],
        "samples": samples,
    }


def _has_nonfinite(features: Mapping[str, Mapping[str, float]]) -> bool:
    return any(column["nonfinite"] for column in features.values())


def _group(name: str) -> str:
    """`joint_blocks.3` of `joint_blocks.3.latent_block.attn.qkv.weight`, `final_layer` of `final_layer.conv.weight`."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def to_json(figures: Any) -> str:
    """Figures as JSON, where numbers that are not finite are the strings "nan", "inf" and "-inf"."""
    return json.dumps(_plain(figures), indent=1) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_autopsy(run_dir: Path, figures: Mapping[str, Any]) -> Path | None:
    """Write `autopsy/step_N.json`; None, and nothing, when the run has `MAX_AUTOPSIES` of them."""
    path = autopsy_path(run_dir, figures["step"])
    path.parent.mkdir(exist_ok=True)
    if not path.exists() and len(list(path.parent.glob("step_*.json"))) >= MAX_AUTOPSIES:
        return None
    path.write_text(to_json(figures))
    return path


def summary(figures: Mapping[str, Any]) -> str:
    """An autopsy as lines of text: the whole step, its suspects, then every sample."""
    lines = [
        f"step {figures['step']}: loss {figures['loss']:.6g}, gradient norm {figures['gradient_norm']:.6g},"
        f" learning rate {figures['learning_rate']:.3g}"
    ]
    if "weights_of_step" in figures:
        lines.append(f"weights: those after {figures['weights_of_step']} updates")
    titles = {"suspects": "suspects", "nonfinite_gradients": "gradients not finite"}
    for name, title in (titles | {"nonfinite_parameters": "weights not finite"}).items():
        found = figures[name]
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        lines.append(f"{title}: {', '.join(found[:5]) or 'none'}{more}")
    for sample in figures["samples"]:
        sizes = {n: max(abs(c.get("min", 0.0)), abs(c.get("max", 0.0))) for n, c in sample["features"].items()}
        largest = ", ".join(f"{name} {size:.3g}" for name, size in sizes.items())
        lines.append(f"  {sample['id']}: loss {sample['loss']:.6g}, t {sample['t']:.4f}; largest values: {largest}")
    return "\n".join(lines)
