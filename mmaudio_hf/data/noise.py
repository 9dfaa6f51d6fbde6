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
    def empty(cls, batch: int, latent_shape: tuple[int, ...], pin_memory: bool = False) -> "Draws":
        """Uninitialised memory for `batch` samples."""
        shapes = {"latent_noise": (batch, *latent_shape), "x0": (batch, *latent_shape)}
        return cls(**{f.name: torch.empty(shapes.get(f.name, (batch,)), pin_memory=pin_memory) for f in fields(cls)})

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
    philox = np.random.Philox(key=np.array([seed & _MASK, _hash64(stream)], dtype=np.uint64), counter=0)
    state = philox.state
    size = math.prod(out.x0.shape[1:])
    bits = np.empty((len(counters), _SCALARS + size), dtype=np.uint64)
    for row, (low, high) in zip(bits, counters, strict=True):
        # The first two words count the numbers drawn within a sample; the others are the sample.
        state["state"]["counter"] = np.array([0, 0, low, high], dtype=np.uint64)
        philox.state = state  # six times faster than a new generator
        row[:] = philox.random_raw(len(row))
    words = torch.from_numpy(bits.astype("<u8", copy=False).view("<i4"))  # (B, 2 * (_SCALARS + size))
    for index, name in enumerate(("drop_video", "drop_clip", "drop_sync", "drop_text")):
        getattr(out, name).copy_(words[:, index] & 0xFFFFFF).mul_(2**-24)
    _box_muller(words[:, 4], words[:, 5], out.z, torch.empty_like(out.z))
    radius, angle = words[:, 2 * _SCALARS :].split(size, dim=1)
    _box_muller(radius, angle, out.latent_noise.view(-1, size), out.x0.view(-1, size))


def _box_muller(radius: torch.Tensor, angle: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    """Two independent standard normals of two random int32 (Box and Muller 1958), float32, at most 6.7 in size.

    Seven times as fast as numpy's `standard_normal`, which decides number by number; torch divides whole arrays
    among its threads, which numpy's functions do not, and threads of Python that call them wait for the GIL.
    """
    r = torch.empty_like(cosine).copy_(radius)
    r.abs_().add_(0.5).mul_(2**-31).log_().mul_(-2).sqrt_()  # of a number in (0, 1]
    sine.copy_(angle).mul_(math.pi * 2**-31)  # in [-pi, pi]
    torch.cos(sine, out=cosine)
    sine.sin_()
    cosine.mul_(r)
    sine.mul_(r)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
