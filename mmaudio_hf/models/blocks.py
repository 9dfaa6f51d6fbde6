"""Layers and transformer blocks of the flow model (arXiv 2412.15322, section 3): adaLN, joint and self attention.

Shape suffixes: B batch, N latent tokens, T CLIP tokens, L text tokens, D hidden size, H heads, d = D / H; M is 1 for a
condition that all tokens share, or N for one of every token.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

# --- layers ---------------------------------------------------------------------------------------------------------

# The float32 machine epsilon whatever the input dtype: under bf16 the statistic is formed in float32.
RMS_EPS = torch.finfo(torch.float32).eps


class ChannelLastConv1d(nn.Conv1d):
    """Convolution along the token axis of a channel-last tensor; has the arguments of `nn.Conv1d`, as peft expects."""

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Convolve (B, N, in_dim) to (B, N, out_dim)."""
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

    The frequencies are a buffer on purpose: a model cast to bf16 rounds them, as the reference does.
    """

    freqs: torch.Tensor

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


# --- transformer blocks ----------------------------------------------------------------------------------------------

Modulation = tuple[torch.Tensor, ...]
"""Shift and scale, and unless the block is `pre_only` gate, shift, scale and gate: (B, M, D) each"""


class AttentionProjection(nn.Module):
    """Queries, keys and values of one stream. The output map is `linear1` of the block."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)

    def forward(self, x_BND: torch.Tensor, table: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return q, k, v, each (B, H, N, d); q and k are normalised per head, then rotated when a table is given."""
        # The outputs of `qkv` are laid out (head, channel, {q, k, v}) in released files: q/k/v is the fastest index.
        qkv_BNHd3 = self.qkv(x_BND).unflatten(-1, (self.num_heads, -1, 3))
        q_BHNd, k_BHNd, v_BHNd = qkv_BNHd3.permute(4, 0, 2, 1, 3).unbind(0)
        q_BHNd, k_BHNd = self.q_norm(q_BHNd), self.k_norm(k_BHNd)
        if table is not None:
            q_BHNd, k_BHNd = rotate(q_BHNd, table), rotate(k_BHNd, table)
        return q_BHNd, k_BHNd, v_BHNd


def attention(q_BHNd: torch.Tensor, k_BHNd: torch.Tensor, v_BHNd: torch.Tensor) -> torch.Tensor:
    """Softmax attention with scale 1/sqrt(d) and no mask; heads are concatenated to (B, N, D)."""
    return F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd).transpose(1, 2).flatten(2)


class ModulatedBlock(nn.Module):
    """Transformer block of one stream, modulated by a condition (adaLN-Zero, Peebles & Xie 2023, arXiv 2212.09748).

    A `pre_only` block gives queries, keys and values to the other streams and leaves its own stream unchanged.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int, pre_only: bool = False):
        super().__init__()
        self.pre_only = pre_only
        self.attn = AttentionProjection(dim, num_heads)
        # Index 0 is the SiLU in released files; here the model applies it once for all blocks.
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(dim, (2 if pre_only else 6) * dim))
        if not pre_only:
            self.linear1 = token_map(dim, dim, kernel_size)
            self.ffn = GatedMLP(dim, kernel_size)

    def modulation(self, condition_BMD: torch.Tensor) -> Modulation:
        """Shifts, scales and gates from the conditioning after its SiLU."""
        return self.adaLN_modulation(condition_BMD).chunk(2 if self.pre_only else 6, dim=-1)

    def project(self, x_BND: torch.Tensor, modulation: Modulation, table: torch.Tensor | None) -> tuple:
        """Queries, keys and values (B, H, N, d) of the modulated stream."""
        return self.attn(modulate(x_BND, modulation[0], modulation[1]), table)

    def finish(self, x_BND: torch.Tensor, attended_BND: torch.Tensor, modulation: Modulation) -> torch.Tensor:
        """Add the attention output and the feed-forward branch to the stream."""
        if self.pre_only:
            return x_BND
        _, _, gate_attention, shift, scale, gate_ffn = modulation
        x_BND = x_BND + self.linear1(attended_BND) * gate_attention
        return x_BND + self.ffn(modulate(x_BND, shift, scale)) * gate_ffn

    def attend(self, x_BND: torch.Tensor, modulation: Modulation, table: torch.Tensor) -> torch.Tensor:
        """The block with self attention, given its modulation."""
        return self.finish(x_BND, attention(*self.project(x_BND, modulation, table)), modulation)

    def forward(self, x_BND: torch.Tensor, condition_BMD: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The block with self attention over this stream alone; the condition is the adaLN conditioning after SiLU."""
        return self.attend(x_BND, self.modulation(condition_BMD), table)


class JointBlock(nn.Module):
    """Attention over latent, CLIP and text tokens (MM-DiT of Esser et al. 2024, arXiv 2403.03206)."""

    def __init__(self, dim: int, num_heads: int, pre_only: bool):
        super().__init__()
        self.latent_block = ModulatedBlock(dim, num_heads, kernel_size=3)
        self.clip_block = ModulatedBlock(dim, num_heads, kernel_size=3, pre_only=pre_only)
        self.text_block = ModulatedBlock(dim, num_heads, kernel_size=1, pre_only=pre_only)

    def attend(
        self,
        streams: Sequence[torch.Tensor],
        modulations: Sequence[Modulation],
        tables: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """The block, given the modulation of each stream: (B, N, D), (B, T, D) and (B, L, D) to the same shapes."""
        blocks = (self.latent_block, self.clip_block, self.text_block)
        projected = [
            block.project(x, modulation, table)  # three of (B, H, N | T | L, d)
            for block, x, modulation, table in zip(blocks, streams, modulations, (*tables, None), strict=True)
        ]
        q, k, v = (torch.cat(tensors, dim=2) for tensors in zip(*projected, strict=True))  # (B, H, N + T + L, d)
        attended = attention(q, k, v).split([x.shape[1] for x in streams], dim=1)
        return tuple(
            block.finish(x, a, modulation)
            for block, x, a, modulation in zip(blocks, streams, attended, modulations, strict=True)
        )

    def forward(
        self,
        latent_BND: torch.Tensor,
        clip_BTD: torch.Tensor,
        text_BLD: torch.Tensor,
        condition_BND: torch.Tensor,
        global_condition_B1D: torch.Tensor,
        latent_table: torch.Tensor,
        clip_table: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return the three streams. Conditions (after SiLU) are per token for latents and global for the others."""
        modulations = (
            self.latent_block.modulation(condition_BND),
            self.clip_block.modulation(global_condition_B1D),
            self.text_block.modulation(global_condition_B1D),
        )
        return self.attend((latent_BND, clip_BTD, text_BLD), modulations, (latent_table, clip_table))


class FinalLayer(nn.Module):
    """Modulated normalisation and the map to velocities."""

    def __init__(self, dim: int, latent_channels: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(dim, 2 * dim))
        self.conv = ChannelLastConv1d(dim, latent_channels, 7, padding=3)

    def forward(self, x_BND: torch.Tensor, condition_B1D: torch.Tensor) -> torch.Tensor:
        """(B, N, D) to velocities (B, N, C)."""
        shift, scale = self.adaLN_modulation(condition_B1D).chunk(2, dim=-1)
        return self.conv(modulate(x_BND, shift, scale))
