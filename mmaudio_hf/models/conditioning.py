"""Conditions of the flow model: CLIP, sync and text features, projected once for all sampling steps."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mmaudio_hf.models.blocks import ChannelLastConv1d, GatedMLP, no_autocast


class Conditions(NamedTuple):
    """Projected conditions of a batch, the same at every sampling step."""

    clip: torch.Tensor  # (B, T, D)
    sync: torch.Tensor  # (B, N, D), upsampled to the latent length
    text: torch.Tensor  # (B, L, D)
    clip_global: torch.Tensor  # (B, D)
    text_global: torch.Tensor  # (B, D)


def clip_projection(in_dim: int, dim: int, v2: bool) -> nn.Sequential:
    """CLIP features to the hidden size. Only v2 has an activation between the two maps."""
    return nn.Sequential(nn.Linear(in_dim, dim), *([nn.SiLU()] if v2 else []), GatedMLP(dim, kernel_size=3))


def text_projection(in_dim: int, dim: int, v2: bool) -> nn.Sequential:
    """Text features to the hidden size, without mixing tokens."""
    return nn.Sequential(nn.Linear(in_dim, dim), *([nn.SiLU()] if v2 else []), GatedMLP(dim))


def temporal_projection(in_dim: int, dim: int, v2: bool, kernel_size: int) -> nn.Sequential:
    """Latents or sync features to the hidden size, looking at seven neighbouring tokens first."""
    activation = nn.SiLU() if v2 else nn.SELU()
    return nn.Sequential(ChannelLastConv1d(in_dim, dim, 7, padding=3), activation, GatedMLP(dim, kernel_size))


def upsample_sync(sync_BSD: torch.Tensor, latent_length: int) -> torch.Tensor:
    """Nearest neighbour with half-pixel centres from S to N tokens.

    The ratio is float32, as torch forms it: exact arithmetic moves two rows at the default 44k lengths.
    """
    with no_autocast(sync_BSD):
        sync_BDN = F.interpolate(sync_BSD.transpose(1, 2), size=latent_length, mode="nearest-exact")
    return sync_BDN.transpose(1, 2).contiguous()  # or every modulation of it is a slower product


def fill_missing(features: torch.Tensor, missing_B: torch.Tensor | None, empty: torch.Tensor) -> torch.Tensor:
    """Replace the tokens of samples where `missing_B` is true by `empty` (1 or L tokens, broadcast).

    With a mask given, `empty` takes part in the graph even when no sample is missing: its gradient is then zero, not
    absent, so that AdamW updates it as in the published training. The result has the wider of both types: bf16
    features of a compact store are filled in float32, so that the gradient of `empty` is summed as for float32 ones.
    """
    if missing_B is None:
        return features
    return torch.where(missing_B.view(-1, 1, 1), empty, features)
