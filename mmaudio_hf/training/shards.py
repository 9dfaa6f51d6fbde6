"""Training state that the processes of a run share out: each writes its own slices, whoever reads sees whole tensors.

    training_state/model.safetensors                what every process has as a whole, written by the first one
    training_state/model.rank_0_of_2.safetensors    slices along the first dimension, as torch.chunk makes them

Processes that write meet in files alone, since they write in threads, where nothing may be sent to another: each but
the first leaves the checksums of its files, or what went wrong, in rank_1_of_2.json, which has this name only when it
is complete. The first one gathers these into state.json.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmaudio_hf.data.store_files import sync

OTHER = "resume from another checkpoint"
WAIT_SECONDS = 1800.0  # that the first process, done with its slices, leaves the others for theirs

Groups = Mapping[str, Mapping[str, torch.Tensor]]
Shapes = Mapping[str, Mapping[str, Sequence[int]]]  # whole shapes of the tensors that are shared out, by group


@dataclass(frozen=True)
class Part:
    """Which part of a checkpoint a process writes."""

    folder: Path  # training_state/ of the attempt, which the first process has made
    rank: int
    count: int
    shapes: Shapes

    def file(self, group: str) -> Path:
        """The file for the slices of a group."""
        return self.folder / slice_file(group, self.rank, self.count)


def slice_file(group: str, rank: int, count: int) -> str:
    """Name of the file that process `rank` of `count` writes the slices of a group to."""
    return f"{group}.rank_{rank}_of_{count}.safetensors"


def _note(part: Part, rank: int) -> Path:
    return part.folder / f"rank_{rank}_of_{part.count}.json"


# --- writing -------------------------------------------------------------------------------------------------------


def write_slices(part: Part, tensors: Groups) -> dict[str, str]:
    """Write the slices of this process, until they are on the disk; checksums by the name of the file."""
    checksums = {}
    for group, shapes in part.shapes.items():
        path = part.file(group)
        save_file({name: tensors[group][name].detach().contiguous() for name in shapes}, path)
        sync(path)
        checksums[path.name] = sha256(path)
    return checksums


def leave_slices(part: Part, tensors: Groups) -> None:
    """Write the slices of a process that is not the first, and leave word for that one, of a failure too.

    OSError when not even that can be written.
    """
    try:
        _leave_word(part, {"sha256": write_slices(part, tensors)})
    except Exception as error:
        with suppress(OSError):  # what was written may take the room that the word needs
            for group in part.shapes:
                part.file(group).unlink(missing_ok=True)
        if part.folder.exists():  # else the first process has given up before, and says why
            _leave_word(part, {"error": str(error) or repr(error)})
        if not isinstance(error, (OSError, SafetensorError)):
            raise


def _leave_word(part: Part, word: Mapping[str, Any]) -> None:
    place = _note(part, part.rank)
    partial = place.with_suffix(".partial")
    partial.write_text(json.dumps(word))
    sync(partial)
    partial.replace(place)


def await_slices(part: Part, seconds: float | None = None) -> dict[str, str]:
    """Wait for all other processes; checksums of their files by name. Their word is removed.

    OSError naming a process that failed, with its reason, or that is not done after `seconds` (`WAIT_SECONDS`).
    """
    seconds = WAIT_SECONDS if seconds is None else seconds
    deadline, checksums = time.monotonic() + seconds, {}
    missing = set(range(1, part.count))
    while missing:
        for rank in [rank for rank in missing if _note(part, rank).exists()]:
            word = json.loads(_note(part, rank).read_text())
            if "error" in word:
                raise OSError(f"process {rank} failed: {word['error']}")
            checksums |= word["sha256"]
            missing.remove(rank)
        if missing and time.monotonic() > deadline:
            raise OSError(f"process {min(missing)} has not written its slices in {seconds:g} s")
        time.sleep(0.05 if missing else 0)
    for rank in range(1, part.count):
        _note(part, rank).unlink()
    return checksums


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading -------------------------------------------------------------------------------------------------------


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of one group, each read when it is asked for, as a copy, and put together where it lies in slices.

    ValueError naming the file when one cannot be read or does not hold what it should.
    """

    def __init__(self, whole: Path, slices: Sequence[Path], shapes: Mapping[str, Sequence[int]]):
        self._whole, self._slices = _open(whole), [_open(path) for path in slices]
        self._shapes = {name: list(shape) for name, shape in shapes.items()}
        self._names = dict.fromkeys([*self._whole.keys(), *self._shapes])
        for name, shape in self._shapes.items():
            try:
                found = [file.get_slice(name).get_shape() for file in self._slices]
            except SafetensorError as error:
                raise ValueError(f"{whole.parent} lacks a slice of {name} ({error}): {OTHER}") from error
            rows = sum(sum(part[:1]) for part in found)
            if [rows, *shape[1:]] != shape or any(part[1:] != shape[1:] for part in found):
                raise ValueError(f"{whole.parent}: slices {found} of {name} do not make {shape}: {OTHER}")

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._shapes:
            return torch.cat([file.get_tensor(name) for file in self._slices])
        if name not in self._names:
            raise KeyError(name)
        return self._whole.get_tensor(name).clone()  # a view of the file would keep it on the disk when it is removed

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {OTHER}") from error
