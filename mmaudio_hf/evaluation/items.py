"""Held-out items: rows of feature stores, read one by one, and the sound that a network makes of their features."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from mmaudio_hf.config import SamplingConfig, StoreConfig
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.generation import Generated, MMAudioPipeline, Request
from mmaudio_hf.schema import CLIP_FEATURES, MEAN, SYNC_FEATURES, TEXT_FEATURES, check_id


@dataclass(frozen=True)
class HeldOutItem:
    """One row of a store: what a network is given for it, and the latent (N, C) of its true sound."""

    item_id: str
    caption: str
    request: Request
    latent: torch.Tensor
    store: str  # name of the store


class HeldOutItems(Sequence):
    """The first `limit` rows of the stores one after the other, or with `spread` as many at even distances; 0: all.

    A sequence of `HeldOutItem`s that are read when they are asked for: the features of a test set fill memory. The
    first row of an id counts; `repeated` has the ids of the others. ValueError for a store that cannot be opened.
    """

    def __init__(self, sources: Sequence[StoreConfig], limit: int = 0, spread: bool = False):
        self._stores = [FeatureStore.open(source.path) for source in sources]
        rows = [(store, row) for store in self._stores for row in range(len(store))]
        count = min(limit, len(rows)) if limit else len(rows)
        chosen: dict[str, tuple[FeatureStore, int]] = {}
        self.repeated: list[str] = []
        for store, row in (rows[i * len(rows) // count if spread else i] for i in range(count)):
            item_id = check_id(store.ids[row], f"{store.path}.tsv")
            if item_id in chosen:
                self.repeated.append(item_id)
            chosen.setdefault(item_id, (store, row))
        self.ids, self._rows = list(chosen), list(chosen.values())
        self._places = {item_id: place for place, item_id in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> HeldOutItem:
        store, row = self._rows[place]
        values = {name: column[0].float() for name, column in store.read([row]).items()}
        features = {name: values.get(name) for name in (CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES)}
        request = Request(key=self.ids[place], **features)
        return HeldOutItem(self.ids[place], store.captions[row], request, values[MEAN], store.path.name)

    def of(self, item_id: str) -> HeldOutItem:
        """The item of an id."""
        return self[self._places[item_id]]

    def close(self) -> None:
        """Close the stores; what was read stays."""
        for store in self._stores:
            store.close()


def read_items(sources: Sequence[StoreConfig], limit: int, spread: bool = False) -> list[HeldOutItem]:
    """A few `HeldOutItems`, all read. ValueError for a store that cannot be opened."""
    items = HeldOutItems(sources, limit, spread)
    found = list(items)
    items.close()
    return found


def generate_items(
    pipeline: MMAudioPipeline, items: Iterable[HeldOutItem], sampling: SamplingConfig, seed: int
) -> Iterator[tuple[HeldOutItem, Generated]]:
    """Each item with the sound of its features, as `sampling` says; the noise depends on `seed` and the id alone.

    Items are taken a batch at a time.
    """
    items = iter(items)
    while batch := list(islice(items, sampling.batch_size)):
        results = pipeline.generate(
            [item.request for item in batch],
            sampling.batch_size,
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            solver=sampling.solver,
            seed=seed,
        )
        yield from zip(batch, results, strict=True)
