"""Files that several processes and machines share: locks, atomic writes, checksums, and the share of each process."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESUME_HINT = "complete shards are kept; run the same command again to resume"


@dataclass(frozen=True)
class Share:
    """The shards of one process: those whose number is `index` modulo `count`.

    local_rank, local_count: its rank among the processes of this machine, for the choice of the CUDA device and the
    number of threads.
    """

    index: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard index {self.index} of {self.count}: it must be from 0 to the number of shares - 1")
        if not 0 <= self.local_rank < self.local_count:
            raise ValueError(f"local rank {self.local_rank} of {self.local_count}: the launcher's numbers do not fit")


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Acquire the lock file `path`; False, without it, when another process has it and `wait` is not set.

    The system releases it when the process ends in any way. Lock files stay: were one removed, two processes could each
    lock "it".
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            acquired = True
        except BlockingIOError:
            acquired = False
        except OSError as error:
            message = f"{error.strerror or error}: extraction needs a file system with working locks (flock)"
            raise OSError(error.errno, message, str(path)) from error
        yield acquired


@contextlib.contextmanager
def add_path_to_oserror(path: str | os.PathLike, hint: str = "") -> Iterator[None]:
    """Add `path` to OSErrors that name no file; of a full disk, with any name, `hint` says how to resume."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = os.strerror(error.errno) if error.errno else str(error)
        message = f"{reason}: free some space; {hint}" if full and hint else error.strerror or reason
        raise OSError(error.errno or errno.EIO, message, error.filename or str(path)) from error


def readable(size: float) -> str:
    """Bytes for people, in the unit that shows the figure."""
    unit, factor = next((pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= pair[1]), ("bytes", 0))
    return f"{size / factor:.1f} {unit}" if factor else f"{size:.0f} bytes"


def hash_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_key(path: str | os.PathLike) -> tuple[int, int] | None:
    """(bytes, mtime in ns) of a file, None if there is none: what is known of it without reading it."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        status = os.stat(path)
        return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
    return None


_hashes: dict[tuple, str] = {}  # of this process


def hash_once(compute: Callable[..., str], *files: Path) -> str:
    """`compute(*files)`, once as long as none of the files changes."""
    stats = [file.stat() for file in files]
    key = (compute, *((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))
    if key not in _hashes:
        _hashes[key] = compute(*files)
    return _hashes[key]


def read_json(path: Path) -> dict[str, Any]:
    """Content of a file of ours, {} if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: the file becomes `path` at the end, and is removed after an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically; it is on the disk when this returns."""
    with add_path_to_oserror(path):
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # of names that are not UTF-8
            fsync_path(partial)
        fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Until what was written to a file, or the names that appeared in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
