"""A mixture of feature stores, seen as one long epoch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmaudio_hf.config import ModelConfig, StoreConfig
from mmaudio_hf.data.store import Column, FeatureStore
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


class Mixture:
    """Feature stores with repeats: an epoch visits every row of a store `repeats` times.

    Stores with and without video mix freely; one of either kind is enough. Raises ValueError naming both sides when
    stores disagree with each other, or with what `model` expects, in shapes, mode, duration, encoders or normalisation.
    """

    def __init__(self, stores_with_repeats: Sequence[tuple[FeatureStore, int]], model: ModelConfig | None = None):
        if not stores_with_repeats:
            raise ValueError("the mixture is empty: data.train (or data.validation) names no store")
        self.stores = tuple(store for store, _ in stores_with_repeats)
        self.repeats = tuple(repeats for _, repeats in stores_with_repeats)
        for store, repeats in stores_with_repeats:
            if repeats < 1:
                raise ValueError(f"repeats of {store.path} must be at least 1, not {repeats}")
            if model is not None:
                _check_against_model(store, model)
        self.columns = _common_columns(self.stores, model)
        for key in ("mode", "duration", "normalisation"):
            _check_agreement(self.stores, key)
        _check_encoders(self.stores)
        self._lengths = np.array([len(store) for store in self.stores], dtype=np.int64)
        self._ends = np.cumsum(self._lengths * np.array(self.repeats, dtype=np.int64))

    def __len__(self) -> int:
        """Length of an epoch: the sum of repeats * rows."""
        return int(self._ends[-1])

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(N, C)."""
        return self.columns[MEAN].shape

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store index and row (int64) of epoch positions 0 .. len - 1."""
        positions = np.asarray(positions, dtype=np.int64)
        source = np.searchsorted(self._ends, positions, side="right")
        starts = np.concatenate(([0], self._ends[:-1]))
        return source, (positions - starts[source]) % self._lengths[source]

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`latent_mean`, `latent_std` (C,) of the first store with video, or the first store when none has any."""
        return next((store for store in self.stores if store.has_video), self.stores[0]).latent_statistics()

    def close(self) -> None:
        """Close all stores."""
        for store in self.stores:
            store.close()


def open_mixture(sources: Sequence[StoreConfig], model: ModelConfig | None = None) -> Mixture:
    """Open the stores of a recipe's `data.train`, `data.validation` or `data.test` as one mixture."""
    return Mixture([(FeatureStore.open(source.path), source.repeats) for source in sources], model)


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
        if store.manifest is not None and store.manifest[key] != wanted:
            raise ValueError(
                f"{store.path} has {key} {store.manifest[key]!r}, model {model.variant} expects {wanted!r}"
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
                raise ValueError(
                    f"{owner.path} has {name} as {tuple(first)}, {store.path} as {tuple(column)}: export one anew"
                )
    dtype = found[MEAN][0].dtype
    return {
        name: found[name][0] if name in found else Column(absent[name], dtype)
        for name in (MEAN, STD, CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES)
    }


def _check_agreement(stores: Sequence[FeatureStore], key: str) -> None:
    known = [(store, store.manifest[key]) for store in stores if store.manifest is not None]
    for store, value in known[1:]:
        if value != known[0][1]:
            _refuse(key, known[0][0], known[0][1], store, value)


def _check_encoders(stores: Sequence[FeatureStore]) -> None:
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
