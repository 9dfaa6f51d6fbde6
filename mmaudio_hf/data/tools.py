"""Verify, inspect and rewrite feature stores."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

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
    offsets_file,
    read_offsets,
    write_offsets,
)
from mmaudio_hf.data.mixture import check_agreement, check_encoders, different_columns
from mmaudio_hf.data.store import FeatureStore, StoreWriter
from mmaudio_hf.schema import SYNC_FEATURES, TEXT_FEATURES, RunError

TOLERANCE = 0.05  # relative; rounding to bf16 alone is at most 0.004
_BLOCK_BYTES = 32 << 20  # of the rows in memory while a store is rewritten

Reencode = Callable[[str, str], Mapping[str, torch.Tensor]]
"""(id, caption of a row) -> the features it should have, of as many columns as possible; RunError if of none"""


# --- verify ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What `verify` found: `problems` make a store unfit for use, `notes` do not."""

    path: Path | str  # hub://owner/name@commit of a store on the Hub
    rows: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """No problems."""
        return not self.problems


def verify(path: str | Path, *, sample: int = 0, reencode: Reencode | None = None, seed: int = 0) -> Report:
    """Check the store at `path` completely: all that `open` checks, every checksum, and that every value is finite.

    Reads every byte once. With `sample`, that many rows, chosen by `seed`, are encoded again by `reencode` and
    compared; a text that differs is compared with the captions of the neighbouring rows too. A broken store raises
    nothing: the report says what is wrong.
    """
    try:
        store = FeatureStore.open(path)
    except (ValueError, OSError) as error:
        return Report(path, 0, (str(error),), ())
    with store:
        problems, notes = _check_small_files(store)
        size = store.contents.size
        with tqdm(desc=store.path.name, total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for name in store.columns:
                try:
                    problems += _check_column(store, name, bar)
                except OSError as error:
                    problems.append(str(error))
        repeated = [item_id for item_id, count in Counter(store.ids).items() if count > 1]
        if repeated:
            rows = ", ".join(str(row) for row, item_id in enumerate(store.ids) if item_id == repeated[0])
            extra = len(store) - len(set(store.ids))
            notes.append(f"{extra} rows repeat an id; the first is {repeated[0]!r} in rows {rows}")
        if sample and reencode is not None:
            more_problems, more_notes = _compare_sample(store, sample, reencode, seed)
            problems, notes = problems + more_problems, notes + more_notes
        return Report(store.label, len(store), tuple(problems), tuple(notes))


def _check_small_files(store: FeatureStore) -> tuple[list[str], list[str]]:
    """Problems and notes of manifest and text index; `open` has checked that they agree."""
    if store.manifest is None:
        return [], [f"{store.path} has no manifest: only sizes and finiteness could be checked"]
    problems: list[str] = []
    manifest = manifest_file(store.path)
    if "captions_sha256" not in store.manifest:  # came together with the manifest's own checksum
        return problems, [f"{manifest} is of an earlier version: captions and the manifest itself have no checksum"]
    if manifest.read_text(encoding="utf-8") != manifest_text(store.manifest):
        problems.append(f"{manifest} was changed after the export; copy it again or {AGAIN}")
    if store.text_index is not None:
        data = column_file(store.path, TEXT_INDEX).read_bytes()
        problems += _compare_checksum(store, TEXT_INDEX, hashlib.sha256(data).hexdigest())
    return problems, []


def _check_column(store: FeatureStore, name: str, bar: tqdm) -> list[str]:
    digest, not_finite = hashlib.sha256(), []
    for first, block in store.blocks(name):
        digest.update(bytes_of(block))
        bar.update(block.nbytes)
        finite = block.flatten(1).isfinite().all(1)
        not_finite += (first + (~finite).nonzero().flatten()).tolist()
    problems = _compare_checksum(store, name, digest.hexdigest())
    if not_finite:
        if name == TEXT_FEATURES and store.text_index is not None:
            not_finite = np.flatnonzero(np.isin(store.text_index, not_finite)).tolist()
        examples = ", ".join(f"{row} ({store.ids[row]})" for row in not_finite[:5])
        file = column_file(store.path, name)
        problems.append(f"{file} has values that are not finite in {len(not_finite)} rows: {examples}")
    return problems


def _compare_checksum(store: FeatureStore, name: str, checksum: str) -> list[str]:
    if store.manifest is None or checksum == store.manifest["columns"][name]["sha256"]:
        return []
    file = column_file(store.path, name)
    return [f"{file} is not what was exported (checksum differs); copy it again or {AGAIN}"]


def _compare_sample(store: FeatureStore, count: int, reencode: Reencode, seed: int) -> tuple[list[str], list[str]]:
    rows = np.sort(np.random.default_rng(seed).choice(len(store), min(count, len(store)), replace=False)).tolist()
    problems: list[str] = []
    differences: dict[str, list[float]] = {}
    for row in rows:
        try:
            features = reencode(store.ids[row], store.captions[row])
        except (RunError, OSError) as error:
            problems.append(f"{store.path}: row {row} ({store.ids[row]}) cannot be encoded again: {error}")
            continue
        for name in [name for name in store.columns if name in features]:
            stored = store.read([row], [name])[name][0]
            difference = relative_difference(stored, features[name])
            differences.setdefault(name, []).append(difference)
            if difference <= TOLERANCE:
                continue
            source, hint = "its file", ""
            if name == TEXT_FEATURES:
                source = "its caption"
                for other in {max(0, row - 1), min(len(store) - 1, row + 1)} - {row}:
                    with contextlib.suppress(RunError, OSError):  # its media may be missing
                        text = reencode(store.ids[other], store.captions[other])[name]
                        if relative_difference(stored, text) <= TOLERANCE:
                            hint = f"; they are those of the caption of row {other}: captions are shifted"
            problems.append(
                f"{store.path}: {name} of row {row} ({store.ids[row]}) are not those of {source}: relative difference"
                f" {difference:.2g}{hint}"
            )
    again = "rows encoded again, relative difference at most"
    return problems, [f"{name}: {len(values)} {again} {max(values):.2g}" for name, values in differences.items()]


def relative_difference(stored: torch.Tensor, expected: torch.Tensor) -> float:
    """|stored - expected| / |expected|, Euclidean; infinite when the shapes differ."""
    stored, expected = stored.double().cpu(), expected.double().cpu()
    if stored.shape != expected.shape:
        return float("inf")
    return float((stored - expected).norm() / expected.norm().clamp_min(1e-12))


# --- inspect -----------------------------------------------------------------------------------------------------


def describe(path: str | Path, shown: int = 3) -> dict[str, Any]:
    """Layout, rows, bytes per column, captions, the first `shown` rows and what the manifest says (None without one).

    `reference_bytes` is the size of the same rows in the reference layout. Raises what `FeatureStore.open` raises.
    """
    with FeatureStore.open(path) as store:
        contents, manifest = store.contents, store.manifest or {}
        columns: dict[str, dict[str, Any]] = {}
        for name, (column, rows) in contents.files.items():
            columns[name] = {"dtype": dtype_name(column.dtype), "shape": list(column.shape)}
            columns[name] |= {"records": rows, "bytes": rows * column.row_bytes}
        ambiguous = None
        if store.text_index is not None:  # else shifted captions, or other rounding in other batches, do not show
            pairs = {*zip(store.captions, store.text_index.tolist(), strict=True)}
            ambiguous = sum(count > 1 for count in Counter(caption for caption, _ in pairs).values())
        reference = replace(contents, columns=layout_columns(_shapes(store)), texts=None)
        keys = ("mode", "duration", "normalisation", "preprocessing", "encoders", "counts", "latent_statistics")
        return {
            "path": store.label,
            "layout": store.layout,
            "rows": len(store),
            "bytes": contents.size,
            "reference_bytes": reference.size,
            "columns": columns,
            "distinct_captions": len(set(store.captions)),
            "captions_with_several_texts": ambiguous,
            "repeated_ids": len(store) - len(set(store.ids)),
            "manifest": store.manifest is not None,
            **{key: manifest.get(key) for key in keys},
            "first_rows": [list(row) for row in zip(store.ids[:shown], store.captions[:shown], strict=True)],
        }


def _shapes(store: FeatureStore) -> dict[str, tuple[int, ...]]:
    return {name: column.shape for name, column in store.columns.items()}


# --- rewrite -----------------------------------------------------------------------------------------------------

Selection = Sequence[tuple[FeatureStore, np.ndarray]]
"""Rows of stores, one store after the other"""


def convert(source: str | Path, target: str | Path, layout: str, sync_dtype: str = "float32") -> FeatureStore:
    """Write the store `source` in another layout as `target`, and open it.

    To compact, CLIP and text features (and sync features if `sync_dtype` is "bfloat16") are rounded to nearest even;
    the other way only the types change. ValueError when the target exists or a setting is not known.
    """
    with FeatureStore.open(source) as store:
        counts = (store.manifest or {}).get("counts", {})
        _write(target, [(store, np.arange(len(store)))], layout, sync_dtype, counts)
    return FeatureStore.open(target)


def subset(source: str | Path, target: str | Path, rows: Sequence[int] | np.ndarray) -> FeatureStore:
    """Write rows `rows` of `source`, in this order, as the store `target` in the same layout, and open it."""
    rows = np.asarray(rows, dtype=np.int64).reshape(-1)
    with FeatureStore.open(source) as store:
        if len(rows) == 0:
            raise ValueError(f"no row of {store.path} is chosen")
        if rows.min() < 0 or rows.max() >= len(store):
            raise ValueError(f"{store.path} has rows 0 to {len(store) - 1}, not {rows.min()} to {rows.max()}")
        _write(target, [(store, rows)], *layout_of(store), {"chosen": len(rows), "of": len(store)})
    return FeatureStore.open(target)


def merge(sources: Sequence[str | Path], target: str | Path, *, skip_duplicates: bool = False) -> FeatureStore:
    """Write the rows of all `sources`, one after the other, as the store `target`, and open it.

    Sources must agree in columns, layout, mode, duration, encoders, preprocessing and normalisation. With
    `skip_duplicates` only the first row of an id is written, without it a repeated id is an error that names both
    rows. ValueError before anything is written.
    """
    with ExitStack() as stack:
        stores = [stack.enter_context(FeatureStore.open(source)) for source in sources]
        for other in stores[1:]:
            if other.columns.keys() != stores[0].columns.keys():
                raise ValueError(
                    f"{stores[0].path} has the columns {', '.join(stores[0].columns)}, {other.path} has"
                    f" {', '.join(other.columns)}: they cannot be one store, name both in the recipe"
                )
            for name in other.columns:
                if other.columns[name] != stores[0].columns[name]:
                    raise different_columns(stores[0], other, name)
        for key in ("mode", "duration", "normalisation", "preprocessing"):
            check_agreement(stores, key)
        check_encoders(stores)
        first_rows: dict[str, tuple[FeatureStore, int]] = {}
        selection = []
        for store in stores:
            kept = []
            for row, item_id in enumerate(store.ids):
                owner, first = first_rows.setdefault(item_id, (store, row))
                if (owner, first) == (store, row):
                    kept.append(row)
                elif not skip_duplicates:
                    raise ValueError(
                        f"id {item_id!r} is in row {first} of {owner.path} and in row {row} of {store.path}:"
                        " choose rows with `mmaudio-hf store subset`, or give --skip-duplicates to keep the first"
                    )
            selection.append((store, np.array(kept, dtype=np.int64)))
        counts: Counter[str] = Counter()
        for store in stores:
            counts.update((store.manifest or {}).get("counts", {}))
        if skipped := sum(map(len, stores)) - sum(len(rows) for _, rows in selection):
            counts["skipped_duplicates"] = skipped
        _write(target, selection, *layout_of(stores[0]), counts)
    return FeatureStore.open(target)


def layout_of(store: FeatureStore) -> tuple[str, str]:
    """Layout and sync dtype in which the rows of `store` keep all their digits."""
    sync = store.columns.get(SYNC_FEATURES)
    sync_dtype = "float32" if sync is None else dtype_name(sync.dtype)
    known = store.layout == "compact" and sync_dtype in SYNC_DTYPES
    if known and layout_columns(_shapes(store), "compact", sync_dtype) == store.columns:
        return "compact", sync_dtype
    return "reference", "float32"


def _write(target: str | Path, selection: Selection, layout: str, sync_dtype: str, counts: Mapping[str, int]) -> None:
    stores = [store for store, _ in selection]
    total = sum(len(rows) for _, rows in selection)
    late: dict[str, float] = {}
    for store, rows in selection:
        late |= read_offsets(offsets_file(store.path), (store.ids[row] for row in rows))
    counts = {**counts, **({"corrected": len(late)} if late else {})}
    settings = _common_metadata(stores) | {"layout": layout, "sync_dtype": sync_dtype, "counts": counts}
    with (
        StoreWriter(target, _shapes(stores[0]), total, **settings) as writer,
        tqdm(desc=Path(target).name, total=total, unit="row", disable=None, leave=False) as bar,
    ):
        first = 0
        for store, chosen in selection:
            step = max(1, _BLOCK_BYTES // sum(column.row_bytes for column in store.columns.values()))
            for rows in np.split(chosen, range(step, len(chosen), step)) if len(chosen) else ():
                ids, captions = [store.ids[row] for row in rows], [store.captions[row] for row in rows]
                writer.write(first, ids, captions, store.read(rows))
                first += len(rows)
                bar.update(len(rows))
        write_offsets(Path(target), late)


def _common_metadata(stores: Sequence[FeatureStore]) -> dict[str, Any]:
    """What all manifests say, which agree; None for what one of them does not know."""
    manifests = [store.manifest or {} for store in stores]
    metadata: dict[str, Any] = {}
    for key in ("mode", "duration", "normalisation", "preprocessing"):
        metadata[key] = manifests[0].get(key) if all(m.get(key) is not None for m in manifests) else None
    encoders = [manifest.get("encoders", {}) for manifest in manifests]
    common = {name: entry for name, entry in encoders[0].items() if all(name in each for each in encoders)}
    return metadata | {"encoders": common}
