"""All random inputs of a training sample, as a pure function of (seed, stream, step, sample index).

A counter-based generator (Philox 4x64, Salmon et al. 2011) needs no state: its key is (seed, stream) and its counter
starts at (sample index, step), so any process can draw the numbers of any sample in any order. Between processors
with other vector units the last digit of a normal number may differ.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

NOISE_VERSION = 2  # of the numbers that a seed gives; 1 were those of numpy's `standard_normal`
_MASK = (1 << 64) - 1
_SCALARS = 4  # 64-bit words of a sample before those of its latents: four uniforms, two words for z, two unused


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
