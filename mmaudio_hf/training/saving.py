"""Saving beside training: tensors are copied to host memory at once, and written to disk by a thread meanwhile."""

import threading
import time
from collections.abc import Callable, Mapping

import torch

Groups = Mapping[str, Mapping[str, torch.Tensor]]


class HostCopy:
    """Host memory for a copy of many tensors, kept from one copy to the next.

    Fresh pages cost several times what copying into known ones does; for CUDA they are page-locked as well.
    """

    def __init__(self):
        self._memory: dict[tuple, torch.Tensor] = {}

    @torch.no_grad()
    def take(self, groups: Groups) -> tuple[dict[str, dict[str, torch.Tensor]], torch.cuda.Event | None]:
        """Copies of the tensors of all groups, and what to wait for before they are read (None: nothing).

        A tensor that occurs in several groups is copied once. The copies hold until the next call.
        """
        memory, taken, event = {}, {}, None
        for group, tensors in groups.items():
            taken[group] = {}
            for name, tensor in tensors.items():
                source = tensor.detach()
                key = (source.data_ptr(), source.dtype, source.shape, source.device)
                if key not in memory:
                    memory[key] = self._room(key, source)
                    memory[key].copy_(source, non_blocking=True)
                    if source.is_cuda:
                        event = torch.cuda.current_stream(source.device)
                taken[group][name] = memory[key]
        self._memory = memory  # room of tensors that are gone is given back
        # The copies are queued before whatever the next step changes, so the host need not wait for them.
        return taken, None if event is None else event.record_event()

    def _room(self, key: tuple, source: torch.Tensor) -> torch.Tensor:
        if key in self._memory:
            return self._memory[key]
        return torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)


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

    def save(self, groups: Groups, write: Callable[[dict[str, dict[str, torch.Tensor]]], None]) -> None:
        """Copy the tensors and hand the copies to `write` in the thread, once the job before is done."""
        began = time.perf_counter()
        self.wait()
        copies, event = self._copy.take(groups)
        # A daemon: a second Ctrl-C does not wait for a disk.
        self._thread = threading.Thread(target=self._work, args=(copies, event, write), name="writer", daemon=True)
        self._thread.start()
        self.stall_seconds += time.perf_counter() - began

    def _work(self, copies, event, write) -> None:
        began = time.perf_counter()
        try:
            if event is not None:
                event.synchronize()
            write(copies)
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
