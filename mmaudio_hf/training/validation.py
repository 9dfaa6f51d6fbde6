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
# Whether video and text are kept; what is not is replaced by the learned (or empty-string) features.
COMBINATIONS = {"video_text": (True, True), "video": (True, False), "text": (False, True), "none": (False, False)}


class Validator:
    """Computes the validation losses of a recipe on its held-out mixture, sharded over the processes.

    ValueError when two scores would have one name.
    """

    def __init__(self, mixture: Mixture, recipe: Recipe, accelerator: Accelerator) -> None:
        self.mixture, self.recipe, self.accelerator = mixture, recipe, accelerator
        self.combinations: list[str] = []  # those whose conditions any store has
        for name in recipe.training.validation_combinations:
            video, text = COMBINATIONS[name]
            if any(store.has_video >= video and store.has_text >= text for store in mixture.stores):
                self.combinations.append(name)
        stores = [store.path.name for store in mixture.stores]
        self._names = ["loss", *(f"loss_{name}" for name in stores)]
        self._names += [f"loss_t_{i / TIME_BINS:.1f}" for i in range(TIME_BINS)]
        self._names += [f"loss_{name}" for name in self.combinations]
        self._durations = len(self._names)  # column of the first
        if len(mixture.buckets) > 1:
            self._names += [f"loss_{bucket.duration:g}s" for bucket in mixture.buckets]
        if twice := sorted({name for name in self._names if self._names.count(name) > 1}):
            raise ValueError(
                f"data.validation: {', '.join(twice)} would be the name of two scores (stores {', '.join(stores)});"
                " give the stores other names, or leave the combination out of training.validation_combinations"
            )
        self._bucket_of = torch.from_numpy(mixture.bucket_of).to(accelerator.device)
        self._all = np.arange(len(mixture))  # dataset indices
        sources, rows = mixture.locate(self._all)
        ids = [mixture.stores[s].ids[row] for s, row in zip(sources.tolist(), rows.tolist(), strict=True)]
        order = hash_order(recipe.seed, ids)
        self._z = dict(zip(order, stratified_normals(recipe.seed, order), strict=True))
        # The combinations are scored on these items: evenly spread over the order, and so over the times.
        count = min(recipe.training.validation_items, len(order))
        chosen = {order[i * len(order) // count] for i in range(count)}
        self._subset = np.flatnonzero([item_id in chosen for item_id in ids])

    @torch.no_grad()
    def scores(
        self,
        forward: Callable[..., torch.Tensor],
        latent_mean: torch.Tensor,
        latent_std: torch.Tensor,
        set_lengths: Callable[[int, int, int], None] | None = None,
    ) -> dict[str, float]:
        """Mean losses of `forward` (an `MMAudio` in evaluation mode), the same on every process; a collective.

        set_lengths: that of the model, where the split has other durations than it is set to.

        "loss" is over the whole split with the condition dropout of training; "loss_STORE", "loss_t_X" and, of several
        durations, "loss_Ns" split it by store, by time from X to X + 0.1 and by duration. "loss_video_text" and the
        other combinations are over the same `training.validation_items` items each, as far as they have the condition,
        with the others left out.
        """
        flow, statistics, num_stores = self.recipe.flow, (latent_mean, latent_std), len(self.mixture.stores)
        # Row 0: sum of the losses of each score, row 1: how many there are. In float64: sums over a whole split.
        sums = torch.zeros(2, len(self._names), device=self.accelerator.device, dtype=torch.float64)

        def add(column_B: torch.Tensor, loss_B: torch.Tensor, valid_B: torch.Tensor) -> None:
            sums[0].index_add_(0, column_B, loss_B.double() * valid_B)
            sums[1].index_add_(0, column_B, valid_B.double())

        for batch in self._batches(self._all, set_lengths):
            result = flow_step(forward, batch, flow, *statistics)
            time_bin_B = (result.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
            columns = [torch.zeros_like(time_bin_B), 1 + batch.source, 1 + num_stores + time_bin_B]
            if self._durations < len(self._names):
                columns.append(self._durations + self._bucket_of[batch.source])
            for column_B in columns:
                add(column_B, result.loss, batch.valid)
        first = 1 + num_stores + TIME_BINS
        for batch in self._batches(self._subset, set_lengths) if self.combinations else ():
            for column, name in enumerate(self.combinations, first):
                video, text = COMBINATIONS[name]
                # The numbers that decide on dropout are in [0, 1) and compared with a probability, so 1 always keeps a
                # condition and -1 always drops it.
                kept = [torch.full_like(batch.noise.drop_text, 1.0 if keep else -1.0) for keep in (video, text)]
                drops = dict.fromkeys(("drop_video", "drop_clip", "drop_sync"), kept[0]) | {"drop_text": kept[1]}
                chosen = replace(batch, noise=replace(batch.noise, **drops))
                loss_B = flow_step(forward, chosen, flow, *statistics).loss
                valid_B = batch.valid & (batch.has_video | (not video)) & (batch.has_text | (not text))
                add(torch.full_like(batch.source, column), loss_B, valid_B)
        totals, counts = self.accelerator.reduce(sums, "sum").tolist()
        return {name: total / n for name, total, n in zip(self._names, totals, counts, strict=True) if n}

    def _batches(self, dataset_indices: np.ndarray, set_lengths: Callable[..., None] | None) -> Iterable[Batch]:
        """This process's share of the items, with their stratified times; the model is set to the lengths of each."""
        world, training = self.accelerator.num_processes, self.recipe.training
        largest = -(-len(dataset_indices) // world)
        latents = [bucket.lengths[0] for bucket in self.mixture.buckets]
        batches = validation_batches(
            self.mixture,
            dataset_indices=dataset_indices,
            seed=self.recipe.seed,
            batch_size=[max(1, min(micro_batch_size(training, world, length), largest)) for length in latents],
            rank=self.accelerator.process_index,
            world_size=world,
            threads=self.recipe.data.read_threads,
            device=self.accelerator.device,
        )
        for batch in batches:
            if set_lengths is not None:
                set_lengths(*batch.lengths)
            z_B = torch.tensor([self._z[item_id] for item_id in batch.ids], dtype=torch.float32)
            yield replace(batch, noise=replace(batch.noise, z=z_B.to(batch.mean.device)))


def hash_order(seed: int, ids: Iterable[str]) -> list[str]:
    """The distinct ids in an order that depends on the seed and the ids alone, not on their order in the stores."""
    return sorted(set(ids), key=lambda item_id: _hash(seed, item_id))


def stratified_normals(seed: int, order: list[str]) -> list[float]:
    """A standard normal number for each of n ids: entry i lies in the i-th of n intervals of equal probability."""
    offsets = np.array([int.from_bytes(_hash(seed, item_id)[8:16], "little") / 2.0**64 for item_id in order])
    uniform = (np.arange(len(order)) + offsets) / len(order)
    return torch.special.ndtri(torch.from_numpy(uniform.clip(1e-9, 1 - 1e-9))).tolist()


def _hash(seed: int, item_id: str) -> bytes:
    return hashlib.sha256(f"validation {seed} {item_id}".encode()).digest()
