"""One launch at a time trains a run."""

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mmaudio_hf.schema import LOCK_FILE

PATIENCE = 20.0  # s in which the processes of a launch that was just killed should end


class RunLock:
    """Holds a run folder for this process once it is taken, until `with` or the process ends in any way.

    `warn` is told where the file system has no locks; the run then goes on without.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None]):
        self.run_dir, self.warn = run_dir, warn
        self._file: IO | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def take(self) -> bool:
        """Whether the folder is ours now; one that is not there is nobody's. Waits a little for another to end."""
        if self._file is not None or not self.run_dir.exists():
            return True
        self._file = open(self.run_dir / LOCK_FILE, "a")  # noqa: SIM115  (held for as long as the run)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > until:
                    self.release()
                    return False
            except OSError as error:
                self.warn(f"{self.run_dir} has no locks ({error.strerror}): see to it that one launch alone trains it")
                return True
            time.sleep(0.1)

    def refusal(self) -> ValueError:
        """What to raise when it could not be taken."""
        return ValueError(
            f"{self.run_dir} is being trained by another launch: wait for its end, or choose another name"
        )

    def await_release(self, limit: float) -> None:
        """Wait until no other process holds it, at most `limit` seconds; not at all where there are no locks."""
        until = time.monotonic() + limit
        with open(self.run_dir / LOCK_FILE, "a") as file:
            while time.monotonic() < until:
                try:
                    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.3)
                except OSError:
                    return None

    def release(self) -> None:
        """Let others have it. The file stays: removing it would let two hold "it"."""
        if self._file is not None:
            self._file.close()
            self._file = None
