"""What ends a run early or keeps a step out of it: signals, and numbers that are not finite."""

import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from mmaudio_hf.schema import RunError

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
