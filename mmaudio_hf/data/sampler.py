"""Which samples form a step, and their random inputs: pure functions of (seed, step, sample index), nothing to save.

Sample i of a step (0 <= i < global_batch) is number g = step * global_batch + i of the run. It lies in epoch
g // epoch_length, and every epoch is a permutation of the mixture that depends on (seed, epoch) alone. A step may span
two epochs, and no sample of an epoch is left out. Processes and accumulation only divide the samples of a step among
themselves, so they never change which samples form it.

Clips of several durations are in buckets, each with epochs of its own, and a step is of one of them (`bucket_of_step`).

Random inputs come from a counter-based generator (Philox 4x64, Salmon et al. 2011): its key is (seed, stream) and its
counter starts at (sample index, step), so any process can draw the numbers of any sample in any order. Between
processors with other vector units the last digit of a normal number may differ.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

NOISE_VERSION = 2  # of the numbers that a seed gives; 1 were those of numpy's `standard_normal`
_SCALARS = 4  # 64-bit words of a sample before those of its latents: four uniforms, two words for z, two unused
_STREAM = 0x5A3C_0DE5_0F0E_70C5  # second word of the key: keeps the order apart from other uses of a seed
_MASK = (1 << 64) - 1


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, length: int, bucket: int = 0) -> np.ndarray:
    """Order of the `length` samples of one epoch of a bucket (int64, read-only).

    The argsort of Philox's raw numbers: unlike a library's shuffle it is fixed by the generator's definition.
    """
    key, counter = np.array([seed & _MASK, _STREAM], np.uint64), np.array([0, 0, bucket, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key, counter=counter).random_raw(length), kind="stable")
    order.flags.writeable = False
    return order


def dataset_indices(
    seed: int, step: int, sample_indices: np.ndarray, global_batch: int, epoch_length: int, bucket: int = 0
) -> np.ndarray:
    """Dataset indices (int64, as many as `sample_indices`) of samples of `step`, for `Mixture.locate`.

    Index d means sample d % epoch_length of the mixture, in epoch d // epoch_length. With several buckets all of this
    is of one of them, `step` counts its steps, and the indices are for `Mixture.of_bucket`.
    """
    numbers = step * global_batch + np.asarray(sample_indices, dtype=np.int64)
    epochs, offsets = np.divmod(numbers, epoch_length)
    indices = np.empty_like(numbers)
    for epoch in np.unique(epochs).tolist():
        in_epoch = epochs == epoch
        indices[in_epoch] = epoch * epoch_length + permutation(seed, epoch, epoch_length, bucket)[offsets[in_epoch]]
    return indices


def bucket_of_step(step: int, epoch_lengths: Sequence[int], batch_sizes: Sequence[int]) -> tuple[int, int]:
    """The bucket of `step`, and how many steps before it were of that bucket.

    A bucket has steps in proportion to its samples per epoch over its samples per step, so that every sample of the
    mixture is as likely as without buckets. They are spread evenly and not drawn: the first bucket has had
    round(share * step) of them, the second its share of the others, and so on, in exact arithmetic. So after any number
    of steps the counts are within one step of the shares.
    """
    weights = [Fraction(length, size) for length, size in zip(epoch_lengths, batch_sizes, strict=True)]
    for bucket, weight in enumerate(weights):
        share = weight / sum(weights[bucket:])
        before, after = (int(n * share + Fraction(1, 2)) for n in (step, step + 1))
        if after > before:
            return bucket, before
        step -= before  # of the steps of later buckets
    raise AssertionError("the share of the last bucket is 1")


def process_sample_indices(global_batch: int, world_size: int, rank: int, accumulation: int = 1) -> list[np.ndarray]:
    """Sample indices of process `rank`, one array per accumulation micro batch; the same for every step.

    ValueError when the global batch does not divide evenly.
    """
    if global_batch % (world_size * accumulation):
        passes = f"{world_size} processes x {accumulation} accumulation steps"
        raise ValueError(f"batch size {global_batch} does not split over {passes}")
    grid = np.arange(global_batch, dtype=np.int64).reshape(accumulation, world_size, -1)
    return list(grid[:, rank])


def validation_indices(
    length: int, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of process `rank` over 0 .. length - 1 in plain order, as (indices, valid).

    Every process gets as many full batches: padding beyond the end repeats the last index and is not valid.
    """
    for first in range(0, length, world_size * batch_size):
        indices = np.arange(first + rank * batch_size, first + (rank + 1) * batch_size, dtype=np.int64)
        yield np.minimum(indices, length - 1), indices < length


# --- Random inputs of samples ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """Random inputs of B samples (docs/training.md), float32: standard normal, and uniform in [0, 1)."""

    latent_noise: torch.Tensor  # (B, N, C) normal: latent = mean + std * latent_noise
    z: torch.Tensor  # (B,) normal: t = sigmoid(scale * z + mean)
    x0: torch.Tensor  # (B, N, C) normal: start of the path
    drop_video: torch.Tensor  # (B,) uniform: clip and sync are dropped together where it is below the probability
    drop_clip: torch.Tensor  # (B,) uniform, for dropping them one by one
    drop_sync: torch.Tensor  # (B,) uniform
    drop_text: torch.Tensor  # (B,) uniform

    @classmethod
    def shapes(cls, latent_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shape of each for one sample."""
        return {f.name: latent_shape if f.name in ("latent_noise", "x0") else () for f in fields(cls)}

    @classmethod
    def empty(cls, batch: int, latent_shape: tuple[int, ...]) -> "Draws":
        """Uninitialised memory for `batch` samples."""
        return cls(**{name: torch.empty(batch, *shape) for name, shape in cls.shapes(latent_shape).items()})

    def __getitem__(self, rows: slice) -> "Draws":
        """Some samples, in the same memory."""
        return Draws(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Draws":
        """The same numbers on `device`."""
        return Draws(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})


def sample_noise(
    seed: int, stream: str, step: int, sample_indices: Sequence[int], latent_shape: tuple[int, ...]
) -> Draws:
    """Random inputs of samples of `step`; `stream` keeps independent uses of a seed apart ("train", ...)."""
    out = Draws.empty(len(sample_indices), latent_shape)
    fill_noise(out, seed, stream, step, sample_indices)
    return out


def sample_noise_for_ids(seed: int, ids: Sequence[str], latent_shape: tuple[int, ...]) -> Draws:
    """Random inputs that depend on the seed and each item's id alone, whatever the batch, order or process count."""
    out = Draws.empty(len(ids), latent_shape)
    fill_noise_for_ids(out, seed, ids)
    return out


def fill_noise(out: Draws, seed: int, stream: str, step: int, sample_indices: Sequence[int]) -> None:
    """`sample_noise` into CPU memory, by the intra-op threads of the calling thread."""
    _fill(out, seed, stream, [(int(index), step) for index in sample_indices])


def fill_noise_for_ids(out: Draws, seed: int, ids: Sequence[str]) -> None:
    """`sample_noise_for_ids` into CPU memory."""
    _fill(out, seed, "validation", [(_hash64(item_id), 0) for item_id in ids])


def _fill(out: Draws, seed: int, stream: str, counters: Sequence[tuple[int, int]]) -> None:
    rows, size = len(counters), math.prod(out.x0.shape[1:])
    philox = np.random.Philox(key=np.array([seed & _MASK, _hash64(stream)], dtype=np.uint64), counter=0)
    state, generator = philox.state, np.random.Generator(philox)
    radius, angle = out.latent_noise.view(rows, size), out.x0.view(rows, size)
    scalars = np.empty((rows, 2 * _SCALARS), dtype="<i4")
    targets = scalars, radius.numpy().view("<i4"), angle.numpy().view("<i4")  # numbers are made where bits were
    for row, (low, high) in enumerate(counters):
        # The first two words count the numbers drawn within a sample; the others are the sample.
        state["state"]["counter"] = np.array([0, 0, low, high], dtype=np.uint64)
        philox.state = state  # six times faster than a new generator
        # `random_raw` has the same words, and holds the GIL, which other threads of the loader need.
        words = generator.integers(0, _MASK, _SCALARS + size, dtype=np.uint64, endpoint=True)
        words = words.astype("<u8", copy=False).view("<i4")
        for target, values in zip(targets, np.split(words, [2 * _SCALARS, 2 * _SCALARS + size]), strict=True):
            target[row] = values
    bits = torch.from_numpy(scalars)
    for index, name in enumerate(("drop_video", "drop_clip", "drop_sync", "drop_text")):
        getattr(out, name).copy_(bits[:, index] & 0xFFFFFF).mul_(2**-24)
    _box_muller(out.z.copy_(bits[:, 4]), bits[:, 5].float())
    _box_muller(radius.copy_(radius.view(torch.int32)), angle.copy_(angle.view(torch.int32)))


def _box_muller(radius: torch.Tensor, angle: torch.Tensor) -> None:
    """Turn random int32, as float32, into two independent standard normals, at most 6.7 in size (Box and Muller 1958).

    Seven times as fast as numpy's `standard_normal`, which decides number by number.
    """
    radius.abs_().add_(0.5).mul_(2**-31).log_().mul_(-2).sqrt_()  # of a number in (0, 1]
    cosine = torch.cos(angle.mul_(math.pi * 2**-31))  # of an angle in [-pi, pi]
    angle.sin_().mul_(radius)
    radius.mul_(cosine)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
