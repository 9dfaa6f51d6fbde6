"""One launch at a time trains a run."""

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

LOCK_FILE = "lock"
PATIENCE = 20.0  # s in which the processes of a launch that was just killed should end


class RunLock:
    """Holds a run folder for this process, until it ends in any way or `release` is called.

    `warn` is told where the file system has no locks; the run then goes on without.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None]):
        self.run_dir, self.warn = run_dir, warn
        self._file: IO | None = None

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

    def release(self) -> None:
        """Let others have it. The file stays: removing it would let two hold "it"."""
        if self._file is not None:
            self._file.close()
            self._file = None
