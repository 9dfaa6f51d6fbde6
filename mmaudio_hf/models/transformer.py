"""Modulated transformer blocks: joint attention over three streams, then latents alone (spec networks, 2.2 and 2.4)."""

import torch
import torch.nn.functional as F
from torch import nn

from mmaudio_hf.models.conditioning import SharedRows
from mmaudio_hf.models.layers import ChannelLastConv1d, GatedMLP, RMSNorm, modulate, rotate, token_map


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
