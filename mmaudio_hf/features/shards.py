"""The numbered Arrow shards of one extraction: what each is made of, its files, its lock, and reading its rows.

    FOLDER/NAME.shards/shard_00012.arrow   rows of the list's 12th block: id, caption and a column per feature
    FOLDER/NAME.shards/shard_00012.json    key, counts, ids and rejects of that block; written last
    FOLDER/NAME.shards/*.lock              locked by the process that makes the shard or exports the store; empty

FOLDER is `extraction.shards_dir`, or else `extraction.output_dir`. The key of a shard is a hash of everything that its
features depend on.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmaudio_hf.config import AudioSource, Recipe, VideoSource
from mmaudio_hf.features.encoders import fingerprints
from mmaudio_hf.files import Share, hash_of, locked, read_json, sha256_of
from mmaudio_hf.schema import SCHEMA_VERSION, RunError, column_shapes

# Part of every key: raise it when the same inputs give other features. 2: audio lies where its timestamps say, after
# holes and overlaps too.
VERSION = 2
_REFERENCE_VERSION = 1  # of `alignment: reference`, which stays as published


@dataclass(frozen=True)
class Item:
    """One row of the store to be: a video, or a clip of an audio file.

    problem: a known (stage, reason, message) to reject it for; its file is not opened then.
    """

    id: str
    caption: str
    path: str
    span: tuple[int, int] | None = None  # samples of the audio file; None for videos
    problem: tuple[str, str, str] | None = None
    start: float = 0.0  # s into the video


@dataclass(frozen=True)
class Shard:
    """A block of the list, with the key of what its features depend on."""

    number: int
    key: str
    items: Sequence[Item]


@dataclass(frozen=True)
class Job:
    """The extraction of one source of a recipe; it is sent to the worker processes."""

    recipe: Recipe
    source: VideoSource | AudioSource
    share: Share

    @property
    def name(self) -> str:
        """Of the store."""
        return self.source.name

    @property
    def is_video(self) -> bool:
        """Whether the source lists videos, else audio files."""
        return isinstance(self.source, VideoSource)

    @property
    def output_dir(self) -> Path:
        """Where the store will be."""
        return Path(self.recipe.extraction.output_dir)

    @property
    def folder(self) -> Path:
        """Where the shards are."""
        return Path(self.recipe.extraction.shards_dir or self.output_dir) / f"{self.name}.shards"

    @property
    def components(self) -> tuple[str, ...]:
        """The encoders that are needed."""
        return ("clip", "sync", "text", "latent") if self.is_video else ("text", "latent")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of one row of every column."""
        return column_shapes(self.recipe.model.mode, self.recipe.model.duration, video=self.is_video)

    @property
    def normalize_audio(self) -> bool:
        """Whether the peak of every waveform is set to the same level; clips of audio files always are."""
        return not isinstance(self.source, VideoSource) or self.source.normalize_audio

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Settings that determine the inputs of the encoders."""
        model = self.recipe.model
        settings: dict[str, Any] = {"version": VERSION, "mode": model.mode, "duration": float(model.duration)}
        if self.is_video:
            alignment = self.recipe.extraction.alignment
            settings |= {"alignment": alignment, "normalize_audio": self.normalize_audio}
            if alignment == "reference":
                settings["version"] = _REFERENCE_VERSION
        return settings

    @property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """The encoders, as in the manifest of the store."""
        return fingerprints(self.recipe.encoders, self.recipe.model.mode, self.components)

    def shards(self, items: Sequence[Item]) -> tuple[str, list[Shard]]:
        """Key of the store, and the items in blocks of `extraction.shard_size` with their keys.

        A key hashes settings, encoders, ids, captions, and sizes and times of the files. Batch size and number of
        processes are left out: they move results by rounding at most, and machines that share a folder may differ.
        """
        settings = {"schema": SCHEMA_VERSION, "preprocessing": self.preprocessing, "encoders": self.fingerprints}
        stats: dict[str, list[int] | None] = {}
        rows: list[list] = []
        for item in items:
            if item.path not in stats:
                stats[item.path] = _size_and_time(item.path)
            reason = item.problem and item.problem[:2]
            span = ["start", item.start] if item.start else item.span
            rows.append([item.id, item.caption, Path(item.path).name, span, reason, stats[item.path]])
        size = self.recipe.extraction.shard_size
        blocks = [slice(first, first + size) for first in range(0, len(items), size)]
        shards = [Shard(i, hash_of([settings, rows[block]]), items[block]) for i, block in enumerate(blocks)]
        return hash_of([settings, rows]), shards

    def file(self, number: int, ending: str) -> Path:
        """A file of shard `number`."""
        return self.folder / f"shard_{number:05d}{ending}"

    def metadata(self, shard: Shard) -> dict[str, Any]:
        """The JSON of a complete shard: there, of its full size, and made of what its key says; else {}."""
        metadata, arrow = read_json(self.file(shard.number, ".json")), self.file(shard.number, ".arrow")
        size = arrow.stat().st_size if arrow.is_file() else 0
        return metadata if (metadata.get("key"), metadata.get("arrow_bytes")) == (shard.key, size) else {}

    def rows(self, shard: Shard) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
        """(id, caption, {column: (*shape)}) of every row of a complete shard, which is memory-mapped.

        It is locked meanwhile. RunError if another run has made it again of other inputs, or if it was damaged.
        """
        path, metadata_file = (self.file(shard.number, ending) for ending in (".arrow", ".json"))
        with locked(self.file(shard.number, ".lock"), wait=False, shared=True) as acquired:
            metadata = self.metadata(shard)
            if not (acquired and metadata):
                raise RunError(self.changed_message)
            if not metadata["accepted"]:
                return
            checksum = metadata.get("arrow_sha256")  # None: of an earlier version
            if checksum and checksum != sha256_of(path):
                metadata_file.unlink()
                raise RunError(
                    f"{path} is not what was written (its checksum differs; check the disk): the same command makes"
                    " this shard again"
                )
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                for batch in reader:
                    values = {}
                    for name, shape in self.shapes.items():
                        numbers = batch.column(name).storage.flatten().flatten()
                        values[name] = numbers.to_numpy().reshape(len(batch), *shape)
                    captions = batch.column("caption").to_pylist()
                    for i, item_id in enumerate(batch.column("id").to_pylist()):
                        yield item_id, captions[i], {name: value[i].copy() for name, value in values.items()}

    @property
    def changed_message(self) -> str:
        """Two runs of different inputs use the same folder."""
        return (
            f"{self.folder}: another run with other settings, list or media makes these shards again; let it end, then"
            " start this one again"
        )

    def remove_stale(self, count: int) -> None:
        """Remove shards from number `count` on, which a longer list left behind; not those another run is making."""
        numbers = {int(name[1]) for path in self.folder.iterdir() if (name := re.match(r"shard_(\d{5,})\.", path.name))}
        for number in sorted(number for number in numbers if number >= count):
            with locked(self.file(number, ".lock"), wait=False) as acquired:
                if acquired:
                    shutil.rmtree(self.file(number, ".partial"), ignore_errors=True)
                    for path in self.folder.glob(f"{self.file(number, '').name}.*"):
                        path.unlink(missing_ok=True)


def reject_of(item: Item, stage: str, reason: str, message: str, probe: Mapping | None = None) -> dict[str, Any]:
    """A line of NAME.rejects.jsonl; probe: what is known of the streams of the file."""
    return {"id": item.id, "stage": stage, "reason": reason, "message": message, "facts": dict(probe or {})}


def _size_and_time(path: str) -> list[int] | None:
    with contextlib.suppress(OSError):
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]
    return None
