"""What ends a run early or keeps a step out of it: signals, and numbers that are not finite."""

import json
import signal
import threading
from collections import deque
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from mmaudio_hf.schema import RunError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes the first of SIGINT, SIGTERM and SIGUSR1 instead of dying of it; a second one interrupts at once."""

    def __init__(self):
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def _note(self, number: int, _frame) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        tqdm.write(f"{signal.Signals(number).name}: saving a checkpoint after this step; once more to stop at once")

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


class Guard:
    """Keeps non-finite steps from the optimizer and lets all processes stop after the same step.

    The verdict on a step is formed on the device and read one step later, so the host never waits for it.
    """

    def __init__(self, accelerator: Accelerator, run_dir: Path, max_skipped_steps: int, stop: StopSignals):
        self.accelerator, self.run_dir = accelerator, run_dir
        self.max_skipped_steps, self.stop = max_skipped_steps, stop
        self.skipped = 0  # over all sessions of the run
        self.pending: deque[tuple[int, _OnHost, list[str]]] = deque()
        self.in_a_row = 0
        self.stopping = False

    def judge(self, step: int, loss: torch.Tensor, norm: torch.Tensor, ids: list[str]) -> torch.Tensor:
        """True (a boolean scalar on the device) where this step must not reach the optimizer, on every process."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        asked = torch.full_like(bad, self.stop.number is not None)
        flags = torch.stack([bad, asked]).to(torch.int32)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self.pending.append((step, _OnHost(flags), ids))
        return flags[0] > 0

    def check(self) -> bool:
        """Read the verdicts of all steps but the last; True when a process was asked to stop."""
        while len(self.pending) > 1:
            self._settle_one()
        return self.stopping

    def settle(self) -> None:
        """Read all verdicts, before a checkpoint."""
        while self.pending:
            self._settle_one()

    def _settle_one(self) -> None:
        step, flags, ids = self.pending.popleft()
        bad, asked = flags.read()
        self.stopping = self.stopping or bool(asked)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if not bad:
            return
        self.skipped += 1
        all_ids = gather_object(ids)
        if self.accelerator.is_main_process:
            tqdm.write(f"step {step}: loss or gradient is not finite, the step is skipped")
            append_line(self.run_dir / "skipped.jsonl", {"step": step, "ids": all_ids})
        if self.in_a_row >= self.max_skipped_steps:
            raise RunError(
                f"{self.in_a_row} steps in a row were not finite: the ids are in {self.run_dir / 'skipped.jsonl'};"
                f" the last checkpoint is as it was, lower optim.learning_rate or check the data and start again"
            )


def append_line(path: Path, entry: dict) -> None:
    """Add one JSON line to a log file."""
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")
