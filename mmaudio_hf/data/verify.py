"""Whether a feature store is what was exported, and whether it belongs to its captions and media."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.data.store_files import (
    AGAIN,
    TEXT_INDEX,
    bytes_of,
    column_file,
    manifest_file,
    manifest_text,
    meta_text,
)
from mmaudio_hf.schema import TEXT_FEATURES, RunError

TOLERANCE = 0.05  # relative; rounding to bf16 alone is at most 0.004

Reencode = Callable[[str, str], Mapping[str, torch.Tensor]]
"""(id, caption of a row) -> what the columns must hold, of as many columns as it can make; RunError if not at all"""


@dataclass(frozen=True)
class Report:
    """What `verify` found: `problems` make a store unfit for use, `notes` do not."""

    path: Path
    rows: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """No problems."""
        return not self.problems


def verify(path: str | Path, *, sample: int = 0, reencode: Reencode | None = None, seed: int = 0) -> Report:
    """Check the store at `path` completely: all that `open` checks, every checksum, and that every value is finite.

    Reads every byte once. With `sample`, that many rows, drawn by `seed`, are made anew by `reencode` and compared;
    a text that does not fit is looked for in the captions of the neighbouring rows. Never raises for a bad store: what
    is wrong is in the report.
    """
    try:
        store = FeatureStore.open(path)
    except (ValueError, OSError) as error:
        return Report(Path(path), 0, (str(error),), ())
    with store:
        problems, notes = _check_texts(store)
        for name in store.columns:
            try:
                problems += _check_column(store, name)
            except OSError as error:
                problems.append(str(error))
        repeated = [item_id for item_id, count in Counter(store.ids).items() if count > 1]
        if repeated:
            rows = ", ".join(str(row) for row, item_id in enumerate(store.ids) if item_id == repeated[0])
            extra = len(store) - len(set(store.ids))
            notes.append(f"{extra} rows repeat an id; the first is {repeated[0]!r} in rows {rows}")
        if sample:
            found = _check_sample(store, sample, reencode, seed)
            problems, notes = problems + found[0], notes + found[1]
        return Report(store.path, len(store), tuple(problems), tuple(notes))


def _check_texts(store: FeatureStore) -> tuple[list[str], list[str]]:
    """meta.json, manifest and text index; `open` has read them and seen that they agree."""
    if store.manifest is None:
        return [], [f"{store.path} has no manifest: only sizes and finiteness could be checked"]
    problems = []
    meta, manifest = store.path / "meta.json", manifest_file(store.path)
    if meta.read_text(encoding="utf-8") != meta_text(store.contents):
        problems.append(f"{meta} was changed after the export; copy it again or {AGAIN}")
    if "captions_sha256" not in store.manifest:  # came together with the manifest's own checksum
        return problems, [f"{manifest} is of an earlier version: captions and the manifest itself have no checksum"]
    if manifest.read_text(encoding="utf-8") != manifest_text(store.manifest):
        problems.append(f"{manifest} was changed after the export; copy it again or {AGAIN}")
    if store.text_index is not None:
        data = column_file(store.path, TEXT_INDEX).read_bytes()
        problems += _compare_checksum(store, TEXT_INDEX, hashlib.sha256(data).hexdigest())
    return problems, []


def _check_column(store: FeatureStore, name: str) -> list[str]:
    digest, bad = hashlib.sha256(), []
    for first, block in store.file_blocks(name):
        digest.update(bytes_of(block))
        finite = block.flatten(1).isfinite().all(1)
        bad += (first + (~finite).nonzero().flatten()).tolist()
    problems = _compare_checksum(store, name, digest.hexdigest())
    if bad:
        if name == TEXT_FEATURES and store.text_index is not None:
            bad = np.flatnonzero(np.isin(store.text_index, bad)).tolist()
        shown = ", ".join(f"{row} ({store.ids[row]})" for row in bad[:5])
        file = column_file(store.path, name)
        problems.append(f"{file} has values that are not finite in {len(bad)} rows: {shown}")
    return problems


def _compare_checksum(store: FeatureStore, name: str, found: str) -> list[str]:
    if store.manifest is None or found == store.manifest["columns"][name]["sha256"]:
        return []
    file = column_file(store.path, name)
    return [f"{file} is not what was exported (checksum differs); copy it again or {AGAIN}"]


# --- making rows anew --------------------------------------------------------------------------------------------


def _check_sample(store: FeatureStore, count: int, reencode: Reencode, seed: int) -> tuple[list[str], list[str]]:
    rows = np.sort(np.random.default_rng(seed).choice(len(store), min(count, len(store)), replace=False)).tolist()
    problems, largest, compared = [], {}, Counter()
    for row in rows:
        try:
            wanted = reencode(store.ids[row], store.captions[row])
        except (RunError, OSError) as error:
            problems.append(f"{store.path}: row {row} ({store.ids[row]}) cannot be made anew: {error}")
            continue
        for name in [name for name in store.columns if name in wanted]:
            difference = relative_difference(store.read([row], [name])[name][0], wanted[name])
            compared[name] += 1
            largest[name] = max(largest.get(name, 0.0), difference)
            if not difference <= TOLERANCE:
                problems.append(_mismatch(store, row, name, difference, reencode))
    notes = [
        f"{name}: {compared[name]} rows made anew, relative difference at most {largest[name]:.2g}" for name in largest
    ]
    return problems, notes


def relative_difference(stored: torch.Tensor, wanted: torch.Tensor) -> float:
    """|stored - wanted| / |wanted|, Euclidean; infinite when the shapes differ."""
    stored, wanted = stored.double().cpu(), wanted.double().cpu()
    if stored.shape != wanted.shape:
        return float("inf")
    return float((stored - wanted).norm() / wanted.norm().clamp_min(1e-12))


def _mismatch(store: FeatureStore, row: int, name: str, difference: float, reencode: Reencode) -> str:
    message = (
        f"{store.path}: {name} of row {row} ({store.ids[row]}) are not those of"
        f" {'its caption' if name == TEXT_FEATURES else 'its file'}: relative difference {difference:.2g}"
    )
    if name != TEXT_FEATURES:
        return message
    stored = store.read([row], [name])[name][0]
    for other in {max(0, row - 1), min(len(store) - 1, row + 1)} - {row}:
        with contextlib.suppress(RunError, OSError):  # its media may be gone
            text = reencode(store.ids[other], store.captions[other])[name]
            if relative_difference(stored, text) <= TOLERANCE:
                return f"{message}; they are those of the caption of row {other}: captions are shifted"
    return message
