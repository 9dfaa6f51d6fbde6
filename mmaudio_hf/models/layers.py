"""Layers of the flow network (spec networks, section 2.2). Token axis second, channels last: (B, N, D)."""

import torch
import torch.nn.functional as F
from torch import nn

from mmaudio_hf.models.winograd import convolve

# The float32 machine epsilon whatever the input dtype: under bf16 the statistic is formed in float32.
RMS_EPS = torch.finfo(torch.float32).eps


class ChannelLastConv1d(nn.Conv1d):
    """Convolution along the token axis of a channel-last tensor; takes what `nn.Conv1d` takes, as adapters rely on."""

    transformed: torch.Tensor | None = None  # of the weight, while `winograd_convolutions` holds

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Convolve (B, N, in_dim) to (B, N, out_dim)."""
        if self.transformed is not None:
            return convolve(x_BND, self.transformed, self.bias)
        return super().forward(x_BND.transpose(1, 2)).transpose(1, 2)


def token_map(in_dim: int, out_dim: int, kernel_size: int, bias: bool = True) -> nn.Module:
    """A map over channels that sees `kernel_size` neighbouring tokens; a kernel of 1 is stored as a Linear (2-D)."""
    if kernel_size == 1:
        return nn.Linear(in_dim, out_dim, bias=bias)
    return ChannelLastConv1d(in_dim, out_dim, kernel_size, padding=kernel_size // 2, bias=bias)


class GatedMLP(nn.Module):
    """`w2(silu(w1 x) * w3 x)` without biases (Shazeer 2020, SwiGLU); kernel_size > 1 makes the maps convolutions."""

    def __init__(self, dim: int, kernel_size: int = 1, multiple_of: int = 256):
        super().__init__()
        hidden = int(2 * (4 * dim) / 3)
        hidden = -(-hidden // multiple_of) * multiple_of
        self.w1 = token_map(dim, hidden, kernel_size, bias=False)
        self.w2 = token_map(hidden, dim, kernel_size, bias=False)
        self.w3 = token_map(dim, hidden, kernel_size, bias=False)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.w2(F.silu(self.w1(x_BND)) * self.w3(x_BND))


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32, returned in the input's dtype."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), RMS_EPS).to(x.dtype)


class TimestepEmbedder(nn.Module):
    """Sinusoids of t and a two-layer map. v1 has 256 features of at most 1 rad, v2 has D features of up to 1e4 rad.

    The frequencies are a buffer on purpose: a network cast to bf16 rounds them, as the reference does.
    """

    def __init__(self, dim: int, v2: bool):
        super().__init__()
        self.num_features = dim if v2 else 256
        self.scale = 10_000.0 if v2 else 1.0  # 10000 / P
        self.mlp = nn.Sequential(nn.Linear(self.num_features, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.register_buffer("freqs", self.frequencies(), persistent=False)

    def frequencies(self, device: torch.device | None = None) -> torch.Tensor:
        """(E/2,) float32. Power and reciprocal in float32: for v2 one ulp here moves a cosine by 6e-4."""
        exponents = torch.arange(0, self.num_features, 2, dtype=torch.float32, device=device) / self.num_features
        return self.scale * (1.0 / 10_000.0**exponents)

    def forward(self, t_B: torch.Tensor) -> torch.Tensor:
        """Embed times (B,) in [0, 1] as (B, D)."""
        angles = t_B[:, None].float() * self.freqs.float()
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(t_B.dtype))


def rotary_table(
    length: int, head_dim: int, frequency_scale: float = 1.0, device: torch.device | None = None
) -> torch.Tensor:
    """Cosines and sines (length, head_dim / 2, 2), float32, of positions 0 .. length - 1 (Su et al. 2021).

    `frequency_scale` stretches positions: N / T gives a CLIP frame the angle of the latent at the same instant.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = (1.0 / 10_000.0**exponents) * frequency_scale
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x_BHNd: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs of channels by the angles of `table`, in float32."""
    even, odd = x_BHNd.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x_BHNd.dtype)


def modulate(x_BND: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`LN(x) * (1 + scale) + shift`; the layer normalisation has no parameters, eps 1e-5."""
    normed = F.layer_norm(x_BND, x_BND.shape[-1:])
    return torch.addcmul(shift, normed, 1 + scale)
