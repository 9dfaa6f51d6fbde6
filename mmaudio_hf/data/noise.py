"""All random numbers of a training sample, as a pure function of (seed, stream, step, global slot).

A counter-based generator (Philox 4x64, Salmon et al. 2011) needs no state: its key is (seed, stream) and its counter
starts at (step, slot), so any process can make the numbers of any sample in any order.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Draws:
    """Random numbers of B samples (spec networks, section 4), float32: normal, and uniform in [0, 1)."""

    latent_noise: torch.Tensor  # (B, N, C) normal: latent = mean + std * latent_noise
    z: torch.Tensor  # (B,) normal: t = sigmoid(scale * z + mean)
    x0: torch.Tensor  # (B, N, C) normal: start of the path
    drop_video: torch.Tensor  # (B,) uniform: clip and sync are dropped together where it is below the probability
    drop_clip: torch.Tensor  # (B,) uniform, for dropping them one by one
    drop_sync: torch.Tensor  # (B,) uniform
    drop_text: torch.Tensor  # (B,) uniform

    def to(self, device, non_blocking: bool = False) -> "Draws":
        """The same numbers on `device`."""
        return Draws(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})

    def pin_memory(self) -> "Draws":
        """The same numbers in page-locked memory."""
        return Draws(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


def draws(seed: int, stream: str, step: int, slots: Iterable[int], latent_shape: tuple[int, int]) -> Draws:
    """Draws of the samples in global `slots` of `step`; `stream` keeps independent uses apart ("train", ...)."""
    return _draws(seed, stream, [(int(slot), step) for slot in slots], latent_shape)


def draws_for_ids(seed: int, ids: Sequence[str], latent_shape: tuple[int, int], stream: str = "validation") -> Draws:
    """Draws that depend on the seed and each item's id alone, whatever the batch, order or process count."""
    return _draws(seed, stream, [(_hash64(item_id), 0) for item_id in ids], latent_shape)


def _draws(seed: int, stream: str, counters: Sequence[tuple[int, int]], latent_shape: tuple[int, int]) -> Draws:
    batch, (length, channels) = len(counters), latent_shape
    uniforms = np.empty((batch, 4), np.float32)
    z = np.empty((batch, 1), np.float32)
    latent_noise = np.empty((batch, length, channels), np.float32)
    x0 = np.empty((batch, length, channels), np.float32)
    key = np.array([seed & _MASK, _hash64(stream)], dtype=np.uint64)
    for i, (low, high) in enumerate(counters):
        # The first two words count the numbers drawn within a sample; the others are the sample.
        counter = np.array([0, 0, low, high], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        generator.random(dtype=np.float32, out=uniforms[i])
        generator.standard_normal(dtype=np.float32, out=z[i])
        generator.standard_normal(dtype=np.float32, out=latent_noise[i])
        generator.standard_normal(dtype=np.float32, out=x0[i])
    drops = torch.from_numpy(uniforms).t().contiguous()
    return Draws(torch.from_numpy(latent_noise), torch.from_numpy(z)[:, 0], torch.from_numpy(x0), *drops)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
