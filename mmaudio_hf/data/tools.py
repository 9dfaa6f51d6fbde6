"""Whether a feature store is what was exported, and whether it belongs to its captions and media."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmaudio_hf.data.layout import (
    AGAIN,
    SYNC_DTYPES,
    TEXT_INDEX,
    bytes_of,
    column_file,
    dtype_name,
    layout_columns,
    manifest_file,
    manifest_text,
    meta_text,
)
from mmaudio_hf.data.mixture import check_agreement, check_encoders, refuse_columns
from mmaudio_hf.data.store import FeatureStore, StoreWriter
from mmaudio_hf.schema import SYNC_FEATURES, TEXT_FEATURES, RunError

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


# --- What a feature store holds --------------------------------------------------------------------------------------


_FACTS = ("mode", "duration", "normalisation", "preprocessing", "encoders", "counts", "latent_statistics")


def describe(path: str | Path, shown: int = 3) -> dict[str, Any]:
    """Layout, rows, bytes per column, captions, the first `shown` rows and what the manifest says (None without one).

    `reference_bytes` is the size of the same rows in the reference layout. Raises what `FeatureStore.open` raises.
    """
    with FeatureStore.open(path) as store:
        contents = store.contents
        shapes = {name: column.shape for name, column in store.columns.items()}
        columns = {
            name: {
                "dtype": dtype_name(column.dtype),
                "shape": list(column.shape),
                "records": records,
                "bytes": records * column.row_bytes,
            }
            for name, (column, records) in contents.files.items()
        }
        reference_bytes = replace(contents, columns=layout_columns(shapes), texts=None).size
        return {
            "path": str(store.path),
            "layout": store.layout,
            "rows": len(store),
            "bytes": contents.size,
            "reference_bytes": reference_bytes,
            "columns": columns,
            "distinct_captions": len(set(store.captions)),
            "captions_with_several_texts": _ambiguous_captions(store),
            "repeated_ids": len(store) - len(set(store.ids)),
            "manifest": store.manifest is not None,
            **{key: (store.manifest or {}).get(key) for key in _FACTS},
            "first_rows": [list(row) for row in zip(store.ids[:shown], store.captions[:shown], strict=True)],
        }


def _ambiguous_captions(store: FeatureStore) -> int | None:
    """Captions that stand for more than one text record: shifted, or encoded with other digits in another batch."""
    if store.text_index is None:
        return None
    captions = dict.fromkeys(store.captions)
    numbers = {caption: number for number, caption in enumerate(captions)}
    pairs = np.stack([[numbers[caption] for caption in store.captions], store.text_index], axis=1)
    return int((np.bincount(np.unique(pairs, axis=0)[:, 0]) > 1).sum())


# --- New stores from stores ------------------------------------------------------------------------------------------


_BLOCK_BYTES = 32 << 20  # of a block of rows in memory


def convert(source: str | Path, target: str | Path, layout: str, sync_dtype: str = "float32") -> FeatureStore:
    """Write the store `source` in another layout as `target`, and open it.

    To compact, CLIP and text features (and sync features if `sync_dtype` is "bfloat16") are rounded to nearest even;
    the other way nothing changes but the types. ValueError when the target exists or a setting is not known.
    """
    with FeatureStore.open(source) as store:
        facts = _facts([store]) | {"counts": (store.manifest or {}).get("counts", {})}
        _write(target, [(store, np.arange(len(store)))], layout, sync_dtype, facts)
    return FeatureStore.open(target)


def subset(source: str | Path, target: str | Path, rows: Sequence[int] | np.ndarray) -> FeatureStore:
    """Write rows `rows` of `source`, in this order, as the store `target` in the same layout, and open it."""
    rows = np.asarray(rows, dtype=np.int64).reshape(-1)
    with FeatureStore.open(source) as store:
        if len(rows) == 0:
            raise ValueError(f"no row of {store.path} is chosen")
        if rows.min() < 0 or rows.max() >= len(store):
            raise ValueError(f"{store.path} has rows 0 to {len(store) - 1}, not {rows.min()} to {rows.max()}")
        facts = _facts([store]) | {"counts": {"chosen": len(rows), "of": len(store)}}
        _write(target, [(store, rows)], *layout_of(store), facts)
    return FeatureStore.open(target)


def merge(sources: Sequence[str | Path], target: str | Path, *, skip_duplicates: bool = False) -> FeatureStore:
    """Write the rows of all `sources`, one after the other, as the store `target`, and open it.

    Sources must agree in columns, layout, mode, duration, encoders, preprocessing and normalisation. An id that
    stands twice is refused, naming both places, or with `skip_duplicates` only its first row is taken.
    ValueError otherwise, before anything is written.
    """
    stores: list[FeatureStore] = []
    try:
        for source in sources:
            stores.append(FeatureStore.open(source))
        _check_mergeable(stores)
        parts = _without_duplicates(stores, skip_duplicates)
        facts = _facts(stores) | {"counts": _summed_counts(stores)}
        skipped = sum(map(len, stores)) - sum(len(rows) for _, rows in parts)
        if skipped:
            facts["counts"]["skipped_duplicates"] = skipped
        _write(target, parts, *layout_of(stores[0]), facts)
    finally:
        for store in stores:
            store.close()
    return FeatureStore.open(target)


def layout_of(store: FeatureStore) -> tuple[str, str]:
    """Layout and sync dtype in which the rows of `store` keep all their digits."""
    sync = store.columns.get(SYNC_FEATURES)
    sync_dtype = "float32" if sync is None else dtype_name(sync.dtype)
    shapes = {name: column.shape for name, column in store.columns.items()}
    possible = store.layout == "compact" and sync_dtype in SYNC_DTYPES
    if possible and layout_columns(shapes, "compact", sync_dtype) == store.columns:
        return "compact", sync_dtype
    return "reference", "float32"


def _write(
    target: str | Path,
    parts: Sequence[tuple[FeatureStore, np.ndarray]],
    layout: str,
    sync_dtype: str,
    facts: Mapping[str, Any],
) -> None:
    shapes = {name: column.shape for name, column in parts[0][0].columns.items()}
    total = sum(len(rows) for _, rows in parts)
    with StoreWriter(target, shapes, total, layout=layout, sync_dtype=sync_dtype, **facts) as writer:
        done = 0
        for store, rows in _blocks(parts):
            ids, captions = [store.ids[row] for row in rows], [store.captions[row] for row in rows]
            writer.write(done, ids, captions, store.read(rows))
            done += len(rows)


def _blocks(parts: Sequence[tuple[FeatureStore, np.ndarray]]) -> Iterator[tuple[FeatureStore, np.ndarray]]:
    for store, rows in parts:
        step = max(1, _BLOCK_BYTES // sum(column.row_bytes for column in store.columns.values()))
        for first in range(0, len(rows), step):
            yield store, rows[first : first + step]


def _facts(stores: Sequence[FeatureStore]) -> dict[str, Any]:
    """What the manifests say of the rows of all stores, which agree; nothing that only some of them know."""
    manifests = [store.manifest or {} for store in stores]
    facts: dict[str, Any] = {}
    for key in ("mode", "duration", "normalisation", "preprocessing"):
        facts[key] = manifests[0].get(key) if all(m.get(key) is not None for m in manifests) else None
    encoders = [manifest.get("encoders", {}) for manifest in manifests]
    return facts | {"encoders": {name: v for name, v in encoders[0].items() if all(name in each for each in encoders)}}


def _check_mergeable(stores: Sequence[FeatureStore]) -> None:
    first = stores[0]
    for other in stores[1:]:
        if other.columns.keys() != first.columns.keys():
            raise ValueError(
                f"{first.path} has the columns {', '.join(first.columns)}, {other.path} has {', '.join(other.columns)}:"
                " they cannot be one store, name both in the recipe"
            )
        for name in first.columns:
            if other.columns[name] != first.columns[name]:
                refuse_columns(first, other, name)
    for key in ("mode", "duration", "normalisation", "preprocessing"):
        check_agreement(stores, key)
    check_encoders(stores)


def _without_duplicates(stores: Sequence[FeatureStore], skip: bool) -> list[tuple[FeatureStore, np.ndarray]]:
    seen: dict[str, tuple[FeatureStore, int]] = {}
    parts = []
    for store in stores:
        kept = []
        for row, item_id in enumerate(store.ids):
            owner, first = seen.setdefault(item_id, (store, row))
            if (owner, first) == (store, row):
                kept.append(row)
            elif not skip:
                raise ValueError(
                    f"id {item_id!r} is in row {first} of {owner.path} and in row {row} of {store.path}:"
                    " choose rows with `mmaudio-hf store subset`, or give --skip-duplicates to keep the first"
                )
        parts.append((store, np.array(kept, dtype=np.int64)))
    return parts


def _summed_counts(stores: Sequence[FeatureStore]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for store in stores:
        for name, count in (store.manifest or {}).get("counts", {}).items():
            counts[name] = counts.get(name, 0) + count
    return counts
