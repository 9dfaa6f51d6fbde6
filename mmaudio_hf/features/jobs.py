"""What one extraction consists of: its items, its settings, its shards, and the files and locks that belong to them."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av.error
import torch

from mmaudio_hf.features.encoders import fingerprints
from mmaudio_hf.media.audio import cut_audio_clip, read_waveform
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.video import VideoClip, read_video
from mmaudio_hf.schema import SCHEMA_VERSION, column_shapes

VERSION = 1  # part of every key: raise it when the same inputs give other features


@dataclass(frozen=True)
class Share:
    """Which shards a process makes: those whose number is `index` modulo `count`.

    local_rank, local_count: its place among the processes of this machine, for the choice of the CUDA device and the
    number of threads.
    """

    index: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard index {self.index} of {self.count}: it must be from 0 to the number of shares - 1")
        if not 0 <= self.local_rank < self.local_count:
            raise ValueError(f"local rank {self.local_rank} of {self.local_count}: the launcher's numbers do not fit")


@dataclass(frozen=True)
class Item:
    """One row to be: a video, or a clip of a recording. `problem`: known (stage, reason, message) to reject it for."""

    id: str
    caption: str
    path: str
    span: tuple[int, int] | None = None  # samples of the recording; None for videos
    problem: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class Job:
    """What the extraction of one list depends on, as it goes to the worker processes."""

    name: str
    output_dir: Path
    video: bool
    mode: str
    duration: float
    alignment: str
    normalize_audio: bool
    encoders: dict[str, Any]  # arguments of load_encoders
    batch_size: int
    num_proc: int
    shard_size: int
    share: Share

    @property
    def folder(self) -> Path:
        """Where the shards are."""
        return self.output_dir / f"{self.name}.shards"

    @property
    def parts(self) -> tuple[str, ...]:
        """The encoders that are needed."""
        return ("clip", "sync", "text", "latent") if self.video else ("text", "latent")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of one row of every column."""
        return column_shapes(self.mode, self.duration, video=self.video)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Settings that shape what the encoders are given."""
        settings = {"version": VERSION, "mode": self.mode, "duration": self.duration}
        if self.video:
            settings |= {"alignment": self.alignment, "normalize_audio": self.normalize_audio}
        return settings

    @property
    def weights(self) -> dict[str, Any]:
        """Arguments of `check_encoders` and `fingerprints`."""
        return {name: value for name, value in self.encoders.items() if name not in ("kind", "device")}

    @property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """What makes the features."""
        return fingerprints(self.encoders["kind"], self.mode, **self.weights, parts=self.parts)

    def file(self, number: int, ending: str) -> Path:
        """A file of shard `number`."""
        return self.folder / f"shard_{number:05d}{ending}"

    def is_complete(self, number: int, key: str) -> bool:
        """Whether shard `number` is there, of its full size, and made of what `key` says."""
        sidecar, arrow = read_json(self.file(number, ".json")), self.file(number, ".arrow")
        size = arrow.stat().st_size if arrow.is_file() else 0
        return sidecar.get("key") == key and sidecar.get("arrow_bytes") == size


def shard_keys(job: Job, parts: Sequence[Sequence[Item]]) -> list[str]:
    """One hash per shard of what its features depend on: settings, encoders, ids, captions, sizes and times of files.

    The batch size and the number of processes are left out: they move results by rounding at most, and machines that
    share a folder may differ in them.
    """
    settings = {"schema": SCHEMA_VERSION, "preprocessing": job.preprocessing, "encoders": job.fingerprints}
    facts: dict[str, list[int] | None] = {}
    keys = []
    for part in parts:
        rows = []
        for item in part:
            if item.path not in facts:
                facts[item.path] = _file_facts(item.path)
            reason = item.problem and item.problem[:2]
            rows.append([item.id, item.caption, Path(item.path).name, item.span, reason, facts[item.path]])
        keys.append(hash_of([settings, rows]))
    return keys


def _file_facts(path: str) -> list[int] | None:
    with contextlib.suppress(OSError):
        facts = os.stat(path)
        return [facts.st_size, facts.st_mtime_ns]
    return None


def hash_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Hold the lock file `path`; False, without it, when another holds it and `wait` is not set.

    The system frees it when the process ends in any way. Lock files stay: removing one would let two hold "it".
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        except OSError as error:
            message = f"{error.strerror}: extraction needs a file system with working locks (flock)"
            raise OSError(error.errno, message, str(path)) from error
        yield held


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give OSErrors that name no file the name `path`; say of a full disk, with any name, how to go on."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is not None and not full:
            raise
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = "make room; " if full else ""
        message = f"{reason}: {hint}complete shards are kept and the same command goes on from them"
        raise OSError(error.errno or errno.EIO, message, error.filename or str(path)) from error


def read_json(path: Path) -> dict[str, Any]:
    """Content of a file of ours, {} if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole; it is on the disk when this returns."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with naming(path):
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Reading media ahead of the encoders, by threads, a bounded number of files at a time ----------------------------


def read_ahead(job: Job, items: Sequence[Item], threads: int, ahead: int) -> Iterator[tuple[Item, Any]]:
    """Yield (item, VideoClip, waveform or MediaError) in order, while threads read up to `ahead` files further on.

    A video of 8 s is 58 MB. Close the generator to stop the threads.
    """
    groups = (list(group) for _, group in itertools.groupby(items, key=lambda item: item.path))
    waiting: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for group in groups:
                waiting.append((group, pool.submit(_read_group, job, group)))
                if len(waiting) > ahead:
                    yield from _results(*waiting.popleft())
            while waiting:
                yield from _results(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _results(group: Sequence[Item], future) -> Iterator[tuple[Item, Any]]:
    """The items of a group with what was read, none of it held here any longer than needed."""
    media = deque(future.result())
    del future
    for item in group:
        yield item, media.popleft()


def _read_group(job: Job, items: Sequence[Item]) -> list[VideoClip | torch.Tensor | MediaError]:
    """The media of items of one file, each a result or the MediaError it met."""
    path = items[0].path
    try:
        if job.video:
            return [_read_video(job, path) for _ in items]
        waveform, rate = read_waveform(path)
    except MediaError as error:
        return [error] * len(items)
    except Exception as error:
        if isinstance(error, (OSError, MemoryError)) and not isinstance(error, av.error.FFmpegError):
            raise  # the machine's fault, not the file's
        return [MediaError("unexpected", f"{path}: reading failed ({error!r}); re-encode the file")] * len(items)
    cuts = {span: _cut(job, path, span, waveform, rate) for span in dict.fromkeys(item.span for item in items)}
    return [cuts[item.span] for item in items]


def _read_video(job: Job, path: str) -> VideoClip:
    return read_video(
        path,
        mode=job.mode,
        duration=job.duration,
        alignment=job.alignment,
        normalize_audio=job.normalize_audio,
        as_uint8=True,
    )


def _cut(job: Job, path: str, span: tuple[int, int], waveform: torch.Tensor, rate: int) -> torch.Tensor | MediaError:
    start, end = span
    try:
        return cut_audio_clip(
            waveform, rate, mode=job.mode, start_sample=start, end_sample=end, duration=job.duration, source=path
        )
    except MediaError as error:
        return error
