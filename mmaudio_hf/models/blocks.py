"""Modulated transformer blocks: joint attention over three streams, then latents alone (spec networks, 2.2 and 2.4)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class SharedRows(NamedTuple):
    """Values (B, N, D) of which many are the same: the different ones, and which one every token has."""

    rows: torch.Tensor  # (U, D)
    index_BN: torch.Tensor

    def expand(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, N, E) of what was made of the rows, (U, E)."""
        return F.embedding(self.index_BN, rows)


class AttentionProjection(nn.Module):
    """Queries, keys and values of one stream. There is no output map here: that is the block's `linear1`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)

    def forward(self, x_BND: torch.Tensor, table: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return q, k, v, each (B, H, N, d); q and k normalised per head, then rotated when a table is given."""
        # Output units are laid out (head, channel, {q, k, v}), the q/k/v index fastest.
        qkv = self.qkv(x_BND).unflatten(-1, (self.num_heads, -1, 3)).permute(4, 0, 2, 1, 3)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        return q, k, v


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention of (B, H, N, d), scale 1/sqrt(d), no mask; heads concatenated to (B, N, H * d)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ModulatedBlock(nn.Module):
    """One stream's share of a transformer block, modulated by a condition (Peebles & Xie 2023, adaLN-zero).

    A `pre_only` block gives queries, keys and values to the other streams and leaves its own stream as it is.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int, pre_only: bool = False):
        super().__init__()
        self.pre_only = pre_only
        self.attn = AttentionProjection(dim, num_heads)
        # Index 0 is the activation in released files; it is applied once per forward, by the network.
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(dim, (2 if pre_only else 6) * dim))
        if not pre_only:
            self.linear1 = token_map(dim, dim, kernel_size)
            self.ffn = GatedMLP(dim, kernel_size)

    def modulation(self, activated_condition: torch.Tensor | SharedRows) -> tuple[torch.Tensor, ...]:
        """Shift, scale (and gate, shift, scale, gate) from silu(condition), (B, 1 or N, D) each."""
        if isinstance(activated_condition, SharedRows):
            values = activated_condition.expand(self.adaLN_modulation(activated_condition.rows))
        else:
            values = self.adaLN_modulation(activated_condition)
        return values.chunk(2 if self.pre_only else 6, dim=-1)

    def project(self, x_BND: torch.Tensor, modulation: tuple[torch.Tensor, ...], table: torch.Tensor | None):
        """Queries, keys and values of the modulated stream."""
        return self.attn(modulate(x_BND, modulation[0], modulation[1]), table)

    def finish(
        self, x_BND: torch.Tensor, attended_BND: torch.Tensor, modulation: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Add the attention output and the feed-forward branch to the stream."""
        if self.pre_only:
            return x_BND
        _, _, gate_attention, shift, scale, gate_ffn = modulation
        x_BND = x_BND + self.linear1(attended_BND) * gate_attention
        return x_BND + self.ffn(modulate(x_BND, shift, scale)) * gate_ffn

    def forward(
        self, x_BND: torch.Tensor, activated_condition: torch.Tensor | SharedRows, table: torch.Tensor
    ) -> torch.Tensor:
        """Self attention over this stream alone."""
        modulation = self.modulation(activated_condition)
        return self.finish(x_BND, attention(*self.project(x_BND, modulation, table)), modulation)


class JointBlock(nn.Module):
    """Latent, CLIP and text streams attend to one another (Esser et al. 2024, MM-DiT, with a third stream)."""

    def __init__(self, dim: int, num_heads: int, pre_only: bool):
        super().__init__()
        self.latent_block = ModulatedBlock(dim, num_heads, kernel_size=3)
        self.clip_block = ModulatedBlock(dim, num_heads, kernel_size=3, pre_only=pre_only)
        self.text_block = ModulatedBlock(dim, num_heads, kernel_size=1, pre_only=pre_only)

    def forward(self, latent, clip, text, latent_condition, global_condition, latent_table, clip_table):
        """Return the three streams; conditions come activated, per token for latents and global for the others."""
        blocks = (self.latent_block, self.clip_block, self.text_block)
        streams = (latent, clip, text)
        conditions = (latent_condition, global_condition, global_condition)
        tables = (latent_table, clip_table, None)
        modulations = [block.modulation(c) for block, c in zip(blocks, conditions, strict=True)]
        projected = [
            block.project(x, m, table) for block, x, m, table in zip(blocks, streams, modulations, tables, strict=True)
        ]
        attended = attention(*(torch.cat(parts, dim=2) for parts in zip(*projected, strict=True)))
        parts = attended.split([x.shape[1] for x in streams], dim=1)
        return tuple(block.finish(x, a, m) for block, x, a, m in zip(blocks, streams, parts, modulations, strict=True))


class FinalLayer(nn.Module):
    """Modulated normalisation and the map to velocities."""

    def __init__(self, dim: int, latent_channels: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(dim, 2 * dim))
        self.conv = ChannelLastConv1d(dim, latent_channels, 7, padding=3)

    def forward(self, x_BND: torch.Tensor, activated_condition: torch.Tensor) -> torch.Tensor:
        """(B, N, D) to velocities (B, N, C)."""
        shift, scale = self.adaLN_modulation(activated_condition).chunk(2, dim=-1)
        return self.conv(modulate(x_BND, shift, scale))


# --- Layers of the flow network (spec networks -----------------------------------------------------------------------


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


# --- Convolutions over three tokens with half the multiplications (Winograd; Lavin & Gray 2016 -----------------------


TILE = 4  # outputs that are made together

# Rows: the six products; columns: the three taps.
_TAPS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def transform_weight(weight: torch.Tensor) -> torch.Tensor:
    """(6, in, out) of the weight (out, in, 3) of a convolution."""
    taps = torch.tensor(_TAPS, dtype=weight.dtype, device=weight.device)
    return torch.stack([(weight @ row).T for row in taps])


def convolve(x_BND: torch.Tensor, transformed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Convolution of (B, N, in) to (B, N, out) with a kernel of three and zeros outside."""
    batch, length, channels = x_BND.shape
    tiles = -(-length // TILE)
    padded = F.pad(x_BND, (0, 0, 1, TILE * tiles + 1 - length))
    d0, d1, d2, d3, d4, d5 = (padded[:, first : first + TILE * tiles - TILE + 1 : TILE] for first in range(6))
    values = x_BND.new_empty(6, batch, tiles, channels)
    even, odd, near, far = d4 - 4 * d2, d3 - 4 * d1, d4 - d2, 2 * (d3 - d1)
    torch.add(near, d0 - d2, alpha=4, out=values[0])
    torch.add(even, odd, out=values[1])
    torch.sub(even, odd, out=values[2])
    torch.add(near, far, out=values[3])
    torch.sub(near, far, out=values[4])
    torch.add(d5 - d3, d1 - d3, alpha=4, out=values[5])
    m0, m1, m2, m3, m4, m5 = torch.bmm(values.flatten(1, 2), transformed).unflatten(1, (batch, tiles))
    outer, inner, outer_odd, inner_odd = m1 + m2, m3 + m4, m1 - m2, m3 - m4
    y = x_BND.new_empty(batch, tiles, TILE, transformed.shape[2])
    torch.add(m0 + outer, inner, out=y[:, :, 0])
    torch.add(outer_odd, inner_odd, alpha=2, out=y[:, :, 1])
    torch.add(outer, inner, alpha=4, out=y[:, :, 2])
    torch.add(m5 + outer_odd, inner_odd, alpha=8, out=y[:, :, 3])
    y = y.flatten(1, 2)[:, :length]
    return y if bias is None else y + bias
