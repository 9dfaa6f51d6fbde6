"""Log files of JSON lines that outlive a full disk and a killed run."""

import json
import os
from collections.abc import Callable
from pathlib import Path


class JsonLines:
    """A log file to which lines are added. While they cannot be written they wait in memory; `warn` is told once."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path, self.warn = path, warn
        self._waiting: list[dict] = []
        self._warned = False

    def append(self, entry: dict) -> None:
        """Add one line, and those that wait."""
        self._waiting.append(entry)
        try:
            self.flush()
        except OSError as error:
            if not self._warned:
                self.warn(f"{error}; its lines wait in memory")
            self._warned = True

    @property
    def waiting(self) -> bool:
        """Whether there are lines that could not be written yet."""
        return bool(self._waiting)

    def flush(self) -> None:
        """Write what waits. OSError naming the file when that fails; the file then ends where it did before."""
        if not self._waiting:
            return
        text = "".join(json.dumps(entry) + "\n" for entry in self._waiting)
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if file.write(text.encode()) < len(text.encode()):
                    file.truncate(end)
                    raise OSError("the disk is full")
        except OSError as error:
            raise OSError(f"{self.path} could not be written ({error})") from error
        self._waiting, self._warned = [], False


def truncate_lines(path: Path, keep: Callable[[dict], bool]) -> list[dict]:
    """Drop the lines of a log that a killed run wrote after its last checkpoint; return the others."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break  # a line cut short by the kill
        if keep(entry):
            kept.append(entry)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    partial.replace(path)
    return kept
