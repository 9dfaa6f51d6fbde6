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
    """`sample_noise` into CPU memory; releases the GIL for nearly all of its time."""
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
    words = bits.astype("<u8", copy=False).view("<i4")  # (B, 2 * (_SCALARS + size))
    for index, name in enumerate(("drop_video", "drop_clip", "drop_sync", "drop_text")):
        np.multiply(words[:, index] & 0xFFFFFF, np.float32(2**-24), out=getattr(out, name).numpy(), casting="unsafe")
    _box_muller(words[:, 4], words[:, 5], out.z.numpy(), np.empty(len(words), np.float32))
    radius, angle = np.split(words[:, 2 * _SCALARS :], 2, axis=1)
    _box_muller(radius, angle, *(x.view(-1, size).numpy() for x in (out.latent_noise, out.x0)))


def _box_muller(radius: np.ndarray, angle: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> None:
    """Two independent standard normals of two random int32 (Box and Muller 1958), float32, at most 6.7 in size.

    Three times as fast as numpy's `standard_normal`, which decides number by number; whole arrays use vector units.
    """
    r = radius.astype(np.float32)
    np.abs(r, out=r)
    r += np.float32(0.5)
    r *= np.float32(2**-31)  # in (0, 1]
    np.log(r, out=r)
    r *= np.float32(-2)
    np.sqrt(r, out=r)
    np.copyto(sine, angle, casting="unsafe")  # a product of int32 and float32 would be float64
    sine *= np.float32(np.pi * 2**-31)  # in [-pi, pi]
    np.cos(sine, out=cosine)
    np.sin(sine, out=sine)
    cosine *= r
    sine *= r


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
