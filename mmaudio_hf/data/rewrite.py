"""New stores from stores: another layout, some of the rows, several in one. Streaming; the sources are only read.

Every new store comes from a `StoreWriter`, so a kill or a full disk leaves the sources as they are and nothing that
opens; manifest, statistics and checksums are made of the rows that were written.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmaudio_hf.data.dataset import check_agreement, check_encoders, refuse_columns
from mmaudio_hf.data.store import FeatureStore, StoreWriter
from mmaudio_hf.data.store_files import SYNC_DTYPES, dtype_name, layout_columns
from mmaudio_hf.schema import SYNC_FEATURES

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
        step = max(1, _BLOCK_BYTES // sum(column.record_bytes for column in store.columns.values()))
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
