"""Saving beside training: tensors are copied to host memory at once, and written to disk by a thread meanwhile."""

import threading
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from mmaudio_hf.data.store_files import bytes_of

Groups = Mapping[str, Mapping[str, torch.Tensor]]


class HostCopy:
    """Host memory for a copy of many tensors, kept from one copy to the next.

    Fresh pages cost several times what copying into known ones does; for CUDA they are page-locked as well. A tensor
    that occurs in several groups has one copy.
    """

    def __init__(self):
        self._memory: dict[tuple, torch.Tensor] = {}
        self._reserved: set[tuple] = set()

    def reserve(self, groups: Groups) -> None:
        """Get the memory for a copy of these tensors and keep it for good."""
        self._find_memory(groups)
        self._reserved = set(self._memory)
        for room in self._memory.values():
            room.zero_()  # before that a page is only promised

    def _find_memory(self, groups: Groups) -> None:
        sources = {_place(tensor): tensor for tensors in groups.values() for tensor in tensors.values()}
        wanted = self._reserved | sources.keys()  # memory of other tensors, which are gone, is given back
        self._memory = {place: room for place, room in self._memory.items() if place in wanted}
        for place in sources.keys() - self._memory.keys():
            source = sources[place]
            self._memory[place] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)

    @torch.no_grad()
    def take(self, groups: Groups) -> tuple[dict[str, dict[str, torch.Tensor]], torch.cuda.Event | None]:
        """Copies of the tensors of all groups, and what to wait for before they are read (None: nothing).

        The copies hold until the next call.
        """
        self._find_memory(groups)
        copied, taken, stream = set(), {}, None
        for group, tensors in groups.items():
            taken[group] = {}
            for name, tensor in tensors.items():
                place = _place(tensor)
                taken[group][name] = self._memory[place]
                if place not in copied:
                    _copy(self._memory[place], tensor.detach())
                    copied.add(place)
                if tensor.is_cuda:
                    stream = torch.cuda.current_stream(tensor.device)
        # The copies are queued before whatever the next step changes, so the host need not wait for them.
        return taken, None if stream is None else stream.record_event()


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Without waiting from CUDA; on the CPU in this thread alone.

    torch divides every copy among threads, and waiting for the slowest of them at each of some thousand tensors takes
    longer than the copies do.
    """
    if source.device.type == "cpu" and source.is_contiguous():
        np.copyto(np.asarray(bytes_of(target)), np.asarray(bytes_of(source)))
    else:
        target.copy_(source, non_blocking=True)


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.device


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

    def reserve(self, groups: Groups) -> None:
        """Get the memory that saving these tensors will need, in the thread, so that the first copy is no slower."""
        self.wait()
        self._start(lambda: self._copy.reserve(groups))

    def save(self, groups: Groups, write: Callable[[Groups], None]) -> None:
        """Copy the tensors and hand the copies to `write` in the thread, once the job before is done."""
        began = time.perf_counter()
        self.wait()
        copies, event = self._copy.take(groups)

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

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:
            self._thread.join()

    def finish(self) -> str | None:
        """Wait; what went wrong with the last job, or None."""
        self.wait()
        return None if self._error is None else str(self._error)
