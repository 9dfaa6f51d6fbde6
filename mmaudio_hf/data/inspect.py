"""What a feature store holds, in plain values; nothing but the index of the texts is read of its columns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.data.store_files import dtype_name, layout_columns

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
                "bytes": records * column.record_bytes,
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
