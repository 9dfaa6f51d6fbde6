"""A mixture of feature stores, seen as one long epoch, and whether stores fit together.

A store of n rows with `repeats` r gives round(r * n) samples to every epoch. Over the whole run its samples go through
all rows again and again, so after k epochs every row has been visited k * round(r * n) // n times or once more.
A whole r visits every row r times an epoch. Where an epoch ends inside a round through the rows (r = 0.5: after one
half), the round has an order of its own, drawn from the seed, the store's index in the mixture and the round's number.

Stores of clips of several durations mix too: those of one duration form a bucket, and a batch is of one bucket.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mmaudio_hf.config import EncoderConfig, ExtractionConfig, ModelConfig, StoreConfig, config_of_duration
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

_COLUMNS = (MEAN, STD, CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES)
_ROUND_STREAM = 0x0B5E_55ED_1D1C_E500  # second word of the key: keeps these orders apart from other uses of a seed


class Bucket(NamedTuple):
    """The stores whose clips have one duration."""

    duration: float | None  # s; None: neither a manifest nor the shapes of the columns say it, and there is no model
    columns: dict[str, Column]  # of a batch
    stores: list[int]  # indices in the mixture
    samples: int  # per epoch

    @property
    def lengths(self) -> tuple[int, int, int]:
        """(N, T, S), for `MMAudio.set_lengths`."""
        latent, clip, sync = (self.columns[name].shape[0] for name in (MEAN, CLIP_FEATURES, SYNC_FEATURES))
        return latent, clip, sync


class Mixture:
    """Feature stores with repeats: an epoch visits every row of a store `repeats` times (see above for fractions).

    Stores with and without video mix freely; one of either kind is enough. Raises ValueError naming both sides when
    stores disagree with each other, or with what `model` and `encoders` expect, in shapes, number types, mode,
    encoders or normalisation, or when no store has the duration of the model.

    complete: whether these are all stores of a split, of which one must have that duration.
    buckets: in the order of their durations. bucket_of: (stores,) the bucket of each store.
    """

    def __init__(
        self,
        stores_with_repeats: Sequence[tuple[FeatureStore, float]],
        model: ModelConfig | None = None,
        encoders: EncoderConfig | None = None,
        seed: int = 0,
        complete: bool = True,
    ):
        if not stores_with_repeats:
            raise ValueError("the mixture is empty: data.train (or data.validation) names no store")
        self.stores = tuple(store for store, _ in stores_with_repeats)
        self.repeats = tuple(repeats for _, repeats in stores_with_repeats)
        self.seed = seed
        for store, repeats in stores_with_repeats:
            if not repeats > 0:
                raise ValueError(f"repeats of {store.path} must be positive, not {repeats}")
            check_store(store, model, encoders)
        for key in ("mode", "normalisation"):
            check_agreement(self.stores, key)
        check_encoders(self.stores)
        columns = [[column for n, column in store.columns.items() if n in _COLUMNS] for store in self.stores]
        self.row_bytes = np.array([sum(c.row_bytes for c in each) for each in columns])  # of one row of each store
        self._lengths = np.array([len(store) for store in self.stores], dtype=np.int64)
        self._counts = np.array([samples_per_epoch(len(store), repeats) for store, repeats in stores_with_repeats])
        self._ends = np.cumsum(self._counts)
        latents = [store.columns[MEAN].shape[0] for store in self.stores]
        self.bucket_of = np.searchsorted(np.unique(latents), latents)
        self.buckets = tuple(self._bucket(index, model) for index in range(int(self.bucket_of.max()) + 1))
        _check_dtypes(self.stores)
        if complete and model is not None and model.latent_length not in latents:
            raise ValueError(
                f"{self.stores[0].path} has duration {self.stores[0].duration}, model"
                f" {model.variant} expects {model.duration}: set model.duration to that of a store, or add one of it"
            )

    def _bucket(self, index: int, model: ModelConfig | None) -> Bucket:
        members = np.flatnonzero(self.bucket_of == index).tolist()
        stores = [self.stores[i] for i in members]
        check_agreement(stores, "duration")
        stated = (manifest_value(store, "duration") for store in stores)
        duration = next((d for d in stated if d is not None), None)
        if duration is None and (model is None or stores[0].columns[MEAN].shape[0] != model.latent_length):
            duration = max(stores, key=lambda store: store.has_video).duration  # audio alone leaves some frames open
        if model is not None:
            model = config_of_duration(model, model.duration if duration is None else duration)
            duration = model.duration
        columns = _common_columns(stores, model)
        return Bucket(duration, columns, members, int(self._counts[members].sum()))

    @property
    def columns(self) -> dict[str, Column]:
        """Columns of a batch of the first bucket; their names and number types are those of all."""
        return self.buckets[0].columns

    def __len__(self) -> int:
        """Length of an epoch: the sum of `samples_per_epoch` of all stores."""
        return int(self._ends[-1])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(N, C), of the first bucket."""
        return self.columns[MEAN].shape

    @property
    def shares(self) -> list[tuple[str, float]]:
        """Name of each store, with its duration where there are several, and its share of the samples of an epoch."""
        durations = [f" ({self.buckets[b].duration:g} s)" if len(self.buckets) > 1 else "" for b in self.bucket_of]
        names = [f"{store.path.name}{text}" for store, text in zip(self.stores, durations, strict=True)]
        return list(zip(names, (self._counts / len(self)).tolist(), strict=True))

    def locate(self, dataset_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store index and row (int64) of samples, where index d means sample d % len(self) of epoch d // len(self)."""
        epochs, offsets = np.divmod(np.asarray(dataset_indices, dtype=np.int64), len(self))
        source = np.searchsorted(self._ends, offsets, side="right")
        counts, lengths = self._counts[source], self._lengths[source]
        first, end = epochs * counts, (epochs + 1) * counts  # samples of the store before and with this epoch
        rounds, rows = np.divmod(first + offsets - (self._ends[source] - counts), lengths)
        split = (rounds * lengths < first) | ((rounds + 1) * lengths > end)  # the epoch ends inside the round
        for store, number in {*zip(source[split].tolist(), rounds[split].tolist(), strict=True)}:
            in_round = split & (source == store) & (rounds == number)
            rows[in_round] = _round_order(self.seed, store, number, len(self.stores[store]))[rows[in_round]]
        return source, rows

    def of_bucket(self, bucket: int, indices: np.ndarray) -> np.ndarray:
        """Dataset indices of samples of a bucket, where index d means its sample d % n of its epoch d // n.

        n is the number of its samples per epoch.
        """
        if len(self.buckets) == 1:
            return indices
        members = self.buckets[bucket].stores
        ends = np.cumsum(self._counts[members])
        epochs, offsets = np.divmod(indices, ends[-1])
        store = np.searchsorted(ends, offsets, side="right")
        return epochs * len(self) + offsets + (self._ends[members] - ends)[store]

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
    complete: bool = True,
) -> Mixture:
    """Open the stores of a recipe's `data.train`, `data.validation` or `data.test` as one mixture."""
    stores = [(FeatureStore.open(source.path), source.repeats) for source in sources]
    if extraction is not None:
        check_extraction([store for store, _ in stores], extraction, model)
    return Mixture(stores, model, encoders, seed, complete)


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


def check_store(store: FeatureStore, model: ModelConfig | None, encoders: EncoderConfig | None) -> None:
    """ValueError for a store that is not what `model`, set to the store's duration, and `encoders` expect."""
    if model is not None:
        _check_against_model(store, model)
    if encoders is not None:
        _check_encoder_settings(store, encoders)


def _check_against_model(store: FeatureStore, model: ModelConfig) -> None:
    if (duration := store.duration) is not None and store.columns[MEAN].shape[0] != model.latent_length:
        model = config_of_duration(model, duration)
    for name, shape in _model_shapes(model).items():
        if name in store.columns and store.columns[name].shape != shape:
            raise ValueError(
                f"{store.path}: {name} has shape {store.columns[name].shape}, model {model.variant} expects {shape} at"
                f" {model.duration:g} s;"
                " use the variant the store was made for or export it again"
            )
    for key, expected in (("mode", model.mode), ("duration", model.duration)):
        value = manifest_value(store, key)
        if value is not None and value != expected:
            raise ValueError(f"{store.path} has {key} {value!r}, model {model.variant} expects {expected!r}")


def _check_encoder_settings(store: FeatureStore, encoders: EncoderConfig) -> None:
    """Features of toy and released encoders have the same shapes; empty captions and generation use the recipe's."""
    for name, entry in (manifest_value(store, "encoders") or {}).items():
        if name not in ("clip", "sync", "text", "latent") or "id" not in entry:
            continue
        encoder = str(entry["id"])
        kind = "toy" if encoder.startswith("toy_") else "released"
        precision = "bf16" if encoder.endswith(" (bf16)") else "fp32"  # see features.encoders.fingerprints
        if kind != encoders.kind:
            raise ValueError(
                f"{store.path} was made with the {kind} encoder {encoder}, the recipe has encoders.kind"
                f" {encoders.kind}: use the recipe of the extraction, or extract again"
            )
        if kind == "released" and name != "latent" and precision != encoders.precision:
            raise ValueError(
                f"{store.path} was made with the encoder {encoder} in {precision}, the recipe has"
                f" encoders.precision {encoders.precision}: set encoders.precision={precision}, or extract again"
            )


def check_extraction(
    stores: Sequence[FeatureStore], extraction: ExtractionConfig, model: ModelConfig | None = None
) -> None:
    """ValueError for a store of the recipe's own extraction that was made with other settings than it has now."""
    sources = {(Path(extraction.output_dir) / source.name).resolve(): source for source in extraction.videos}
    for store in stores:
        source, settings = sources.get(store.path.resolve()), manifest_value(store, "preprocessing")
        if source is None or not isinstance(settings, dict):
            continue
        expectations: dict[str, Any] = {"alignment": extraction.alignment, "normalize_audio": source.normalize_audio}
        if seconds := source.duration or (model.duration if model else 0):
            expectations["duration"] = seconds
        for name, expected in expectations.items():
            if settings.get(name, expected) != expected:
                raise ValueError(
                    f"{store.path} was made with {name} {settings[name]!r}, the recipe's extraction has {expected!r}:"
                    " run `mmaudio-hf extract-video` again, or change the recipe back"
                )


def _common_columns(stores: Sequence[FeatureStore], model: ModelConfig | None) -> dict[str, Column]:
    """Every column of a batch. What no store has keeps the model's shape (or no length), for zero rows of it."""
    absent = {CLIP_FEATURES: (0, CLIP_DIM), SYNC_FEATURES: (0, SYNC_DIM), TEXT_FEATURES: (TEXT_TOKENS, TEXT_DIM)}
    if model is not None:
        absent = _model_shapes(model)
    columns: dict[str, tuple[Column, FeatureStore]] = {}
    for store in stores:
        for name, column in store.columns.items():
            first, owner = columns.setdefault(name, (column, store))
            if first != column:
                raise different_columns(owner, store, name)
    dtype = columns[MEAN][0].dtype
    return {name: columns[name][0] if name in columns else Column(absent[name], dtype) for name in _COLUMNS}


def _check_dtypes(stores: Sequence[FeatureStore]) -> None:
    """The buffers of a batch serve all buckets, and their shapes differ in the lengths alone."""
    first: dict[str, FeatureStore] = {}
    for store in stores:
        for name, column in store.columns.items():
            owner = first.setdefault(name, store)
            if (owner.columns[name].dtype, owner.columns[name].shape[1:]) != (column.dtype, column.shape[1:]):
                raise different_columns(owner, store, name)


def different_columns(first: FeatureStore, second: FeatureStore, name: str) -> ValueError:
    """The error for stores whose columns `name` differ, with the command that makes them equal."""
    column, other = first.columns[name], second.columns[name]
    difference = (
        f"{first.path} has {name} as {dtype_name(column.dtype)} {column.shape},"
        f" {second.path} as {dtype_name(other.dtype)} {other.shape}"
    )
    if column.dtype == other.dtype:
        return ValueError(f"{difference}: they cannot be mixed, export one again")
    sync = first.columns.get(SYNC_FEATURES)
    option = f" --sync-dtype {dtype_name(sync.dtype)}" if first.layout == "compact" and sync is not None else ""
    command = f"mmaudio-hf store convert {second.path} {second.path}_{first.layout} --layout {first.layout}{option}"
    return ValueError(f"{difference}: `{command}` makes a store that mixes with the first")


def manifest_value(store: FeatureStore, key: str) -> Any:
    """Entry of the manifest of a store; None when it has no manifest or does not know."""
    return None if store.manifest is None else store.manifest.get(key)


def check_agreement(stores: Sequence[FeatureStore], key: str) -> None:
    """ValueError naming two stores whose manifests have different values of `key`."""
    values = [(store, value) for store in stores if (value := manifest_value(store, key)) is not None]
    for store, value in values[1:]:
        if value != values[0][1]:
            raise _disagreement(key, *values[0], store, value)


def check_encoders(stores: Sequence[FeatureStore]) -> None:
    """An encoder that computed features of two stores must be the same one; a store names only those it used.

    The fingerprint decides where there is one: the same weights may have been read from paths of other names.
    """
    seen: dict[str, tuple[FeatureStore, Any]] = {}
    for store in stores:
        for name, entry in (manifest_value(store, "encoders") or {}).items():
            owner, first = seen.setdefault(name, (store, entry))
            if first.get("fingerprint", first) != entry.get("fingerprint", entry):
                of_tensors = {str(each.get("fingerprint")).startswith("tensors ") for each in (first, entry)}
                old = "extract the one whose fingerprint is of files and not of tensors again"
                remedy = {"remedy": old} if len(of_tensors) == 2 else {}
                raise _disagreement(f"encoder {name}", owner, first, store, entry, **remedy)


def _disagreement(
    what: str, first: FeatureStore, value: Any, second: FeatureStore, other: Any, remedy: str = "export one again"
) -> ValueError:
    return ValueError(f"{first.path} has {what} {value!r}, {second.path} has {other!r}: they cannot be mixed, {remedy}")
