"""Validation losses that can be compared between steps, runs and process counts.

Noise and time of an item depend on the seed and the ids of the split alone. The times are stratified: the n ids, in the
order of their hashes, get one n-th of the distribution of t each, so that even a small split covers all of it evenly.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from mmaudio_hf.config import Recipe, micro_batch_size
from mmaudio_hf.data.loader import Batch, validation_batches
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.training.step import flow_step

TIME_BINS = 10
# What an item is conditioned on, video and text; what is left out is replaced by the learned (or empty) features.
COMBINATIONS = {"video_text": (True, True), "video": (True, False), "text": (False, True), "none": (False, False)}


class Validator:
    """The held-out mixture of a recipe, and how this process and the others score networks on it together.

    Raises ValueError when two scores would have one name.
    """

    def __init__(self, mixture: Mixture, recipe: Recipe, accelerator: Accelerator):
        self.mixture, self.recipe, self.accelerator = mixture, recipe, accelerator
        self.combinations = [name for name in recipe.training.validation_combinations if self._possible(name)]
        stores = [store.path.name for store in mixture.stores]
        self._names = ["loss", *(f"loss_{name}" for name in stores)]
        self._names += [f"loss_t_{i / TIME_BINS:.1f}" for i in range(TIME_BINS)]
        self._names += [f"loss_{name}" for name in self.combinations]
        if twice := sorted({name for name in self._names if self._names.count(name) > 1}):
            raise ValueError(
                f"data.validation: {', '.join(twice)} would be the name of two scores (stores {', '.join(stores)});"
                " give the stores other names, or leave the combination out of training.validation_combinations"
            )
        ids = self._ids()
        order = hash_order(recipe.seed, ids)
        self._z = dict(zip(order, stratified_normals(recipe.seed, order), strict=True))
        # Scored under every combination: evenly spread over the times.
        count = min(recipe.training.validation_items, len(order))
        chosen = {order[i * len(order) // count] for i in range(count)}
        self._shared = np.flatnonzero([item_id in chosen for item_id in ids])

    def _possible(self, combination: str) -> bool:
        """Whether any store has what `combination` keeps."""
        video, text = COMBINATIONS[combination]
        return any(store.has_video >= video and store.has_text >= text for store in self.mixture.stores)

    def _ids(self) -> list[str]:
        """Id at every position of the mixture."""
        source, rows = self.mixture.locate(np.arange(len(self.mixture)))
        stores = self.mixture.stores
        return [stores[s].ids[row] for s, row in zip(source.tolist(), rows.tolist(), strict=True)]

    @torch.no_grad()
    def scores(
        self, forward: Callable[..., torch.Tensor], latent_mean: torch.Tensor, latent_std: torch.Tensor
    ) -> dict[str, float]:
        """Mean losses of `forward` (an `MMAudio` in evaluation mode); the same on every process, which all call it.

        "loss" is over the whole split with the condition dropping of training, "loss_STORE" and "loss_t_X" are its
        parts by store and by time from X to X + 0.1. "loss_video_text" and the other combinations are over the same
        `training.validation_items` items each, as far as they have the condition, with the others left out.
        """
        statistics, rows = (latent_mean, latent_std), len(self.mixture.stores)
        sums = torch.zeros(2, len(self._names), device=self.accelerator.device, dtype=torch.float64)

        def add(column: torch.Tensor, losses: torch.Tensor, valid: torch.Tensor) -> None:
            sums[0].index_add_(0, column, losses.double() * valid)
            sums[1].index_add_(0, column, valid.double())

        for batch in self._batches(np.arange(len(self.mixture))):
            result = flow_step(forward, batch, self.recipe.flow, *statistics)
            bins = (result.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
            for column in (torch.zeros_like(bins), 1 + batch.source, 1 + rows + bins):
                add(column, result.loss, batch.valid)
        first = 1 + rows + TIME_BINS
        for batch in self._batches(self._shared) if self.combinations else ():
            for place, name in enumerate(self.combinations):
                video, text = COMBINATIONS[name]
                losses = flow_step(forward, _keeping(batch, video, text), self.recipe.flow, *statistics).loss
                valid = batch.valid & (batch.has_video | (not video)) & (batch.has_text | (not text))
                add(torch.full_like(batch.source, first + place), losses, valid)
        totals, counts = self.accelerator.reduce(sums, "sum").tolist()
        return {name: a / c for name, a, c in zip(self._names, totals, counts, strict=True) if c}

    def _batches(self, positions: np.ndarray) -> Iterable[Batch]:
        """This process's share of the items at `positions`, with their times."""
        world = self.accelerator.num_processes
        size = max(1, min(micro_batch_size(self.recipe.training, world), -(-len(positions) // world)))
        batches = validation_batches(
            self.mixture,
            dataset_indices=positions,
            seed=self.recipe.seed,
            batch_size=size,
            rank=self.accelerator.process_index,
            world_size=world,
            threads=self.recipe.data.read_threads,
            device=self.accelerator.device,
        )
        for batch in batches:
            z = torch.tensor([self._z[item_id] for item_id in batch.ids], dtype=torch.float32)
            yield replace(batch, noise=replace(batch.noise, z=z.to(batch.mean.device)))


def _keeping(batch: Batch, video: bool, text: bool) -> Batch:
    """The batch with the video, the text, both or neither: the uniform numbers that decide on dropping are replaced."""
    keep = {name: torch.full_like(batch.noise.drop_text, 1.0 if video else -1.0) for name in _VIDEO_DRAWS}
    keep["drop_text"] = torch.full_like(batch.noise.drop_text, 1.0 if text else -1.0)
    return replace(batch, noise=replace(batch.noise, **keep))


_VIDEO_DRAWS = ("drop_video", "drop_clip", "drop_sync")


def hash_order(seed: int, ids: Iterable[str]) -> list[str]:
    """The distinct ids in an order that depends on the seed and on what they are, not on where they stand."""
    return sorted(set(ids), key=lambda item_id: _hash(seed, item_id))


def stratified_normals(seed: int, order: list[str]) -> list[float]:
    """A standard normal number for each of n ids: entry i lies in the i-th of n parts of equal probability."""
    inside = np.array([int.from_bytes(_hash(seed, item_id)[8:16], "little") / 2.0**64 for item_id in order])
    uniform = (np.arange(len(order)) + inside) / len(order)
    return torch.special.ndtri(torch.from_numpy(uniform.clip(1e-9, 1 - 1e-9))).tolist()


def _hash(seed: int, item_id: str) -> bytes:
    return hashlib.sha256(f"validation {seed} {item_id}".encode()).digest()
