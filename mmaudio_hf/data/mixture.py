"""A mixture of feature stores, seen as one long epoch, and whether stores fit together.

A store of n rows with `repeats` r has round(r * n) places in every epoch. Its visits, counted over the whole run, go
through all rows again and again, so after k epochs every row has been visited k * round(r * n) // n times or once more.
A whole r visits every row r times an epoch; where an epoch ends inside a round through the rows (r = 0.5: after one
half), the round has an order of its own, drawn from the seed, the store's place in the mixture and the round's number.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmaudio_hf.config import EncoderConfig, ExtractionConfig, ModelConfig, StoreConfig
from mmaudio_hf.data.layout import Column, dtype_name
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.schema import (
    CLIP_DIM,
    CLIP_FEATURES,
    MEAN,
    STD,
    SYNC_DIM,
    SYNC_FEATURES,
    TEXT_DIM,
    TEXT_FEATURES,
    TEXT_TOKENS,
)

_ROUND_STREAM = 0x0B5E_55ED_1D1C_E500  # second key word: keeps these orders apart from other uses of a seed


class Mixture:
    """Feature stores with repeats: an epoch visits every row of a store `repeats` times (see above for fractions).

    Stores with and without video mix freely; one of either kind is enough. Raises ValueError naming both sides when
    stores disagree with each other, or with what `model` and `encoders` expect, in shapes, number types, mode,
    duration, encoders or normalisation.
    """

    def __init__(
        self,
        stores_with_repeats: Sequence[tuple[FeatureStore, float]],
        model: ModelConfig | None = None,
        encoders: EncoderConfig | None = None,
        seed: int = 0,
    ):
        if not stores_with_repeats:
            raise ValueError("the mixture is empty: data.train (or data.validation) names no store")
        self.stores = tuple(store for store, _ in stores_with_repeats)
        self.repeats = tuple(repeats for _, repeats in stores_with_repeats)
        self.seed = seed
        for store, repeats in stores_with_repeats:
            if not repeats > 0:
                raise ValueError(f"repeats of {store.path} must be positive, not {repeats}")
            if model is not None:
                _check_against_model(store, model)
            if encoders is not None:
                _check_encoder_settings(store, encoders)
        self.columns = _common_columns(self.stores, model)
        for key in ("mode", "duration", "normalisation"):
            check_agreement(self.stores, key)
        check_encoders(self.stores)
        self._lengths = np.array([len(store) for store in self.stores], dtype=np.int64)
        places = [samples_per_epoch(len(store), repeats) for store, repeats in stores_with_repeats]
        self._places = np.array(places, dtype=np.int64)
        self._ends = np.cumsum(self._places)

    def __len__(self) -> int:
        """Length of an epoch: the sum of `samples_per_epoch` of all stores."""
        return int(self._ends[-1])

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(N, C)."""
        return self.columns[MEAN].shape

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store index and row (int64) of positions, where position p is place p % len(self) of epoch p // len(self)."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), len(self))
        source = np.searchsorted(self._ends, places, side="right")
        visits = places - (self._ends - self._places)[source]  # of the store, in this epoch; below: in the whole run
        first, after = epochs * self._places[source], (epochs + 1) * self._places[source]
        rounds, rows = np.divmod(first + visits, self._lengths[source])
        split = (rounds * self._lengths[source] < first) | ((rounds + 1) * self._lengths[source] > after)
        for store, number in {*zip(source[split].tolist(), rounds[split].tolist(), strict=True)}:
            chosen = split & (source == store) & (rounds == number)
            rows[chosen] = _round_order(self.seed, store, number, len(self.stores[store]))[rows[chosen]]
        return source, rows

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`latent_mean`, `latent_std` (C,) of the first store with video, or the first store when none has any."""
        return next((store for store in self.stores if store.has_video), self.stores[0]).latent_statistics()

    def close(self) -> None:
        """Close all stores."""
        for store in self.stores:
            store.close()


def open_mixture(
    sources: Sequence[StoreConfig],
    model: ModelConfig | None = None,
    encoders: EncoderConfig | None = None,
    seed: int = 0,
    extraction: ExtractionConfig | None = None,
) -> Mixture:
    """Open the stores of a recipe's `data.train`, `data.validation` or `data.test` as one mixture."""
    stores = [(FeatureStore.open(source.path), source.repeats) for source in sources]
    if extraction is not None:
        check_extraction([store for store, _ in stores], extraction)
    return Mixture(stores, model, encoders, seed)


def samples_per_epoch(rows: int, repeats: float) -> int:
    """Samples that a store of `rows` rows gives to every epoch: `repeats * rows`, rounded, and at least one."""
    return max(1, round(repeats * rows))


@lru_cache(maxsize=16)
def _round_order(seed: int, store: int, number: int, rows: int) -> np.ndarray:
    """Order of the rows in one round through a store, when an epoch ends within it."""
    key = np.array([seed & ((1 << 64) - 1), _ROUND_STREAM], np.uint64)
    counter = np.array([0, 0, store, number], np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(rows), kind="stable")


def _model_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    latent = (model.latent_length, model.latent_channels)
    return {
        MEAN: latent,
        STD: latent,
        CLIP_FEATURES: (model.clip_length, model.clip_dim),
        SYNC_FEATURES: (model.sync_length, model.sync_dim),
        TEXT_FEATURES: (model.text_tokens, model.text_dim),
    }


def _check_against_model(store: FeatureStore, model: ModelConfig) -> None:
    for name, shape in _model_shapes(model).items():
        if name in store.columns and store.columns[name].shape != shape:
            raise ValueError(
                f"{store.path}: {name} has shape {store.columns[name].shape}, model {model.variant} expects {shape};"
                " use the variant the store was made for or export it anew"
            )
    for key, wanted in (("mode", model.mode), ("duration", model.duration)):
        found = known(store, key)
        if found is not None and found != wanted:
            raise ValueError(f"{store.path} has {key} {found!r}, model {model.variant} expects {wanted!r}")


def _check_encoder_settings(store: FeatureStore, encoders: EncoderConfig) -> None:
    """Features of toy and released encoders have the same shapes; empty captions and generation use the recipe's."""
    for name, facts in (store.manifest or {"encoders": {}})["encoders"].items():
        if name not in ("clip", "sync", "text", "latent") or "id" not in facts:
            continue
        made = "toy" if str(facts["id"]).startswith("toy_") else "released"
        precision = "bf16" if str(facts["id"]).endswith(" (bf16)") else "fp32"  # see features.encoders.fingerprints
        if made != encoders.kind:
            raise ValueError(
                f"{store.path} was made with the {made} encoder {facts['id']}, the recipe has encoders.kind"
                f" {encoders.kind}: use the recipe of the extraction, or extract anew"
            )
        if made == "released" and name != "latent" and precision != encoders.precision:
            raise ValueError(
                f"{store.path} was made with the encoder {facts['id']} in {precision}, the recipe has"
                f" encoders.precision {encoders.precision}: set encoders.precision={precision}, or extract anew"
            )


def check_extraction(stores: Sequence[FeatureStore], extraction: ExtractionConfig) -> None:
    """ValueError for a store of the recipe's own extraction that was made with other settings than it has now."""
    sources = {(Path(extraction.output_dir) / source.name).resolve(): source for source in extraction.videos}
    for store in stores:
        source, settings = sources.get(store.path.resolve()), known(store, "preprocessing")
        if source is None or not isinstance(settings, dict):
            continue
        for name, wanted in (("alignment", extraction.alignment), ("normalize_audio", source.normalize_audio)):
            if settings.get(name, wanted) != wanted:
                raise ValueError(
                    f"{store.path} was made with {name} {settings[name]!r}, the recipe's extraction has {wanted!r}:"
                    " run `mmaudio-hf extract-video` again, or change the recipe back"
                )


def _common_columns(stores: Sequence[FeatureStore], model: ModelConfig | None) -> dict[str, Column]:
    """Every column of a batch. What no store has keeps the model's shape (or no length), for zero rows of it."""
    absent = {CLIP_FEATURES: (0, CLIP_DIM), SYNC_FEATURES: (0, SYNC_DIM), TEXT_FEATURES: (TEXT_TOKENS, TEXT_DIM)}
    if model is not None:
        absent = _model_shapes(model)
    found: dict[str, tuple[Column, FeatureStore]] = {}
    for store in stores:
        for name, column in store.columns.items():
            first, owner = found.setdefault(name, (column, store))
            if first != column:
                refuse_columns(owner, store, name)
    dtype = found[MEAN][0].dtype
    return {
        name: found[name][0] if name in found else Column(absent[name], dtype)
        for name in (MEAN, STD, CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES)
    }


def refuse_columns(first: FeatureStore, second: FeatureStore, name: str) -> None:
    """Raise ValueError for stores that hold column `name` differently, with what makes them alike."""
    one, other = first.columns[name], second.columns[name]
    told = (
        f"{first.path} has {name} as {dtype_name(one.dtype)} {one.shape},"
        f" {second.path} as {dtype_name(other.dtype)} {other.shape}"
    )
    if one.shape != other.shape:
        raise ValueError(f"{told}: they cannot be mixed, export one anew")
    sync = first.columns.get(SYNC_FEATURES)
    option = f" --sync-dtype {dtype_name(sync.dtype)}" if first.layout == "compact" and sync is not None else ""
    command = f"mmaudio-hf store convert {second.path} {second.path}_{first.layout} --layout {first.layout}{option}"
    raise ValueError(f"{told}: `{command}` makes a store that mixes with the first")


def known(store: FeatureStore, key: str) -> Any:
    """What the manifest of a store says, or None when it has none or does not know."""
    return None if store.manifest is None else store.manifest.get(key)


def check_agreement(stores: Sequence[FeatureStore], key: str) -> None:
    """ValueError naming two stores whose manifests have different values of `key`."""
    values = [(store, known(store, key)) for store in stores if known(store, key) is not None]
    for store, value in values[1:]:
        if value != values[0][1]:
            _refuse(key, values[0][0], values[0][1], store, value)


def check_encoders(stores: Sequence[FeatureStore]) -> None:
    """An encoder that made features of two stores must be the same one; a store names only those it used.

    The fingerprint decides where there is one: the same weights may have been read from places of other names.
    """
    seen: dict[str, tuple[FeatureStore, Any]] = {}
    for store in stores:
        for name, facts in (store.manifest or {"encoders": {}})["encoders"].items():
            owner, first = seen.setdefault(name, (store, facts))
            if first.get("fingerprint", first) != facts.get("fingerprint", facts):
                of_tensors = [str(made.get("fingerprint")).startswith("tensors ") for made in (first, facts)]
                old = "extract the one whose fingerprint is of files and not of tensors anew"
                remedy = {"remedy": old} if len(set(of_tensors)) == 2 else {}
                _refuse(f"encoder {name}", owner, first, store, facts, **remedy)


def _refuse(
    what: str, first: FeatureStore, value: Any, second: FeatureStore, other: Any, remedy: str = "export one anew"
) -> None:
    raise ValueError(f"{first.path} has {what} {value!r}, {second.path} has {other!r}: they cannot be mixed, {remedy}")
