"""Which sample is seen when: pure functions of (seed, step, global slot), so there is nothing to save or resume.

Sample g of a run is `g = step * global_batch + slot` with 0 <= slot < global_batch. It lies in epoch
`g // epoch_length` at place `g % epoch_length`, and every epoch is a permutation of all its positions that depends on
(seed, epoch) alone. A step may span two epochs and no position is ever left out. Processes and accumulation only
divide the slots of a step among themselves, so they never change which samples form it.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

_STREAM = 0x5A3C_0DE5_0F0E_70C5  # second key word: keeps the order apart from other uses of a seed
_MASK = (1 << 64) - 1


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Order of the `length` positions in one epoch (int64, read-only).

    The rank of Philox's raw numbers: unlike a library's shuffle it is fixed by the generator's definition.
    """
    key, counter = np.array([seed & _MASK, _STREAM], np.uint64), np.array([0, 0, 0, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key, counter=counter).random_raw(length), kind="stable")
    order.flags.writeable = False
    return order


def positions(seed: int, step: int, slots: np.ndarray, global_batch: int, epoch_length: int) -> np.ndarray:
    """Positions (int64, as many as `slots`) of the samples in global `slots` of `step`.

    Position p is place p % epoch_length of epoch p // epoch_length, as `Mixture.locate` takes it.
    """
    epochs, places = np.divmod(step * global_batch + np.asarray(slots, dtype=np.int64), epoch_length)
    found = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        found[chosen] = epoch * epoch_length + permutation(seed, epoch, epoch_length)[places[chosen]]
    return found


def process_sample_indices(global_batch: int, world_size: int, rank: int, accumulation: int = 1) -> list[np.ndarray]:
    """Slots of process `rank`, one array per accumulation micro batch; the same for every step.

    ValueError when the global batch does not divide evenly.
    """
    if global_batch % (world_size * accumulation):
        raise ValueError(
            f"batch size {global_batch} does not split over {world_size} processes x {accumulation} accumulation steps"
        )
    grid = np.arange(global_batch, dtype=np.int64).reshape(accumulation, world_size, -1)
    return list(grid[:, rank])


def validation_positions(
    length: int, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of process `rank` over positions 0 .. length - 1 in plain order, as (positions, counted).

    Every process gets as many full batches; slots beyond the end repeat the last position and have counted False.
    """
    share = world_size * batch_size
    for first in range(0, length, share):
        slots = np.arange(first + rank * batch_size, first + (rank + 1) * batch_size, dtype=np.int64)
        yield np.minimum(slots, length - 1), slots < length
