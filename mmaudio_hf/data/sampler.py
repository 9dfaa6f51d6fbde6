"""Which sample is seen when: pure functions of (seed, step, sample index), so there is nothing to save or resume.

Sample i of a step (0 <= i < global_batch) is number g = step * global_batch + i of the run. It lies in epoch
g // epoch_length, and every epoch is a permutation of the mixture that depends on (seed, epoch) alone. A step may span
two epochs, and no sample of an epoch is left out. Processes and accumulation only divide the samples of a step among
themselves, so they never change which samples form it.

Clips of several durations are in buckets, each with epochs of its own, and a step is of one of them (`bucket_of_step`).
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

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
        raise ValueError(
            f"batch size {global_batch} does not split over {world_size} processes x {accumulation} accumulation steps"
        )
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
