"""Synchformer visual encoder: synchronisation features of 25 fps frames.

Iashin et al., Synchformer: Efficient Synchronization from Sparse Cues, https://arxiv.org/abs/2401.16423, with the
divided space-time attention of Bertasius et al., https://arxiv.org/abs/2102.05095.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmaudio_hf.schema import SYNC_DIM, SYNC_HOP_FRAMES, SYNC_PIXELS, SYNC_SEGMENT_FRAMES, SYNC_TOKENS_PER_SEGMENT
from mmaudio_hf.weights import Source, check_state, load_state, load_strict

DEPTH, HEADS = 12, 12
PATCH_FRAMES, PATCH_PIXELS = 2, 16
GRID = SYNC_PIXELS // PATCH_PIXELS
PATCHES = GRID * GRID
PREFIX = "vfeat_extractor."
SEGMENT_SHAPE = (SYNC_SEGMENT_FRAMES, 3, SYNC_PIXELS, SYNC_PIXELS)


def segment_frames(frames: Tensor) -> Tensor:
    """Overlapping segments (segments, 16, 3, 224, 224), one every 8 frames, of frames (F, 3, 224, 224): a view."""
    if frames.ndim != 4 or frames.shape[1:] != SEGMENT_SHAPE[1:] or len(frames) < SYNC_SEGMENT_FRAMES:
        raise ValueError(f"frames have shape {tuple(frames.shape)}: give (at least 16, 3, 224, 224)")
    return frames.unfold(0, SYNC_SEGMENT_FRAMES, SYNC_HOP_FRAMES).movedim(-1, 1)


def _norm() -> nn.LayerNorm:
    return nn.LayerNorm(SYNC_DIM, eps=1e-6)


class PatchEmbedding(nn.Module):
    """Linear map of patches of 2 frames x 16 x 16 pixels, stored as the 3-D convolution it is equal to."""

    def __init__(self) -> None:
        super().__init__()
        patch = (PATCH_FRAMES, PATCH_PIXELS, PATCH_PIXELS)
        self.proj = nn.Conv3d(3, SYNC_DIM, patch, stride=patch)

    def forward(self, segments: Tensor) -> Tensor:
        """(B, 16, 3, 224, 224) -> (B, 8, 196, D), patches row by row."""
        patches = segments.unflatten(4, (GRID, PATCH_PIXELS)).unflatten(3, (GRID, PATCH_PIXELS))
        patches = patches.unflatten(1, (SYNC_TOKENS_PER_SEGMENT, PATCH_FRAMES))  # (B, 8, 2, 3, row, 16, column, 16)
        patches = patches.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(2, 3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class DividedAttention(nn.Module):
    """Attention of each patch to CLS and to the patches of its own frame ("space") or position ("time").

    CLS itself attends to every token of the segment.
    """

    def __init__(self, axis: str):
        super().__init__()
        self.axis = axis
        self.qkv = nn.Linear(SYNC_DIM, 3 * SYNC_DIM)
        self.proj = nn.Linear(SYNC_DIM, SYNC_DIM)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + 8 * 196, D), CLS first and then time-major patches."""
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, tokens, 64)
        cls = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        patches = F.scaled_dot_product_attention(self._groups(q, False), self._groups(k, True), self._groups(v, True))
        patches = patches.unflatten(0, (len(x), HEADS))
        if self.axis == "time":
            patches = patches.transpose(2, 3)
        return self.proj(torch.cat([cls, patches.flatten(2, 3)], dim=2).transpose(1, 2).flatten(2))

    def _groups(self, tokens: Tensor, with_cls: bool) -> Tensor:
        """(B, H, tokens, 64) -> (B * H, groups, members, 64); the CLS token is the first member with `with_cls`."""
        groups = tokens[:, :, 1:].unflatten(2, (SYNC_TOKENS_PER_SEGMENT, PATCHES))
        if self.axis == "time":
            groups = groups.transpose(2, 3)
        if with_cls:
            cls = tokens[:, :, None, :1].expand(-1, -1, groups.shape[2], -1, -1)
            groups = torch.cat([cls, groups], dim=3)
        return groups.flatten(0, 1)


class Block(nn.Module):
    """Attention over time comes first; the released norms are numbered 3 (time), 1 (space), 2 (MLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = _norm(), _norm(), _norm()
        self.attn = DividedAttention("space")
        self.timeattn = DividedAttention("time")
        layers = {"fc1": nn.Linear(SYNC_DIM, 4 * SYNC_DIM), "act": nn.GELU(), "fc2": nn.Linear(4 * SYNC_DIM, SYNC_DIM)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.timeattn(self.norm3(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SpatialAggregation(nn.Module):
    """One pre-norm encoder layer that pools the patches of a frame into a CLS token, the only output computed."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, SYNC_DIM))
        self.self_attn = nn.MultiheadAttention(SYNC_DIM, HEADS, batch_first=True)
        self.linear1 = nn.Linear(SYNC_DIM, 4 * SYNC_DIM)
        self.linear2 = nn.Linear(4 * SYNC_DIM, SYNC_DIM)
        self.norm1, self.norm2 = _norm(), _norm()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 196, D) -> (B, D)."""
        cls = self.cls_token.expand(len(x), -1, -1)
        tokens = self.norm1(torch.cat([cls, x], dim=1))
        x = cls + self.self_attn(tokens[:, :1], tokens, tokens, need_weights=False)[0]
        return (x + self.linear2(F.gelu(self.linear1(self.norm2(x))))).squeeze(1)


class SynchformerVisual(nn.Module):
    """Visual part of Synchformer, frozen; its parameters have no storage before `load_released`.

    Call with segments (B, segments, 16, 3, 224, 224) of pixels in [-1, 1]; returns the raw sync features
    (B, 8 * segments, 768) float32, segment after segment. At most `segment_batch` segments are computed at once, which
    bounds memory. bf16 by torch.autocast. `depth` is for tests.
    """

    def __init__(self, segment_batch: int = 8, depth: int = DEPTH):
        super().__init__()
        self.segment_batch = segment_batch
        with torch.device("meta"):
            self.cls_token = nn.Parameter(torch.empty(1, 1, SYNC_DIM))
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + PATCHES, SYNC_DIM))
            self.temp_embed = nn.Parameter(torch.empty(1, SYNC_TOKENS_PER_SEGMENT, SYNC_DIM))
            self.patch_embed_3d = PatchEmbedding()
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.norm = _norm()
            self.spatial_attn_agg = SpatialAggregation()
        self.requires_grad_(False).eval()

    def load_released(self, source: Source) -> "SynchformerVisual":
        """Load `vfeat_extractor.*` of `synchformer_state_dict.pth`, or a state dict of these alone; returns self.

        ValueError where it does not fit. The unused 2-D `patch_embed` must be there, too.
        """
        state = load_state(source, prefix=PREFIX)
        unused = {
            "patch_embed.proj.weight": torch.empty(SYNC_DIM, 3, PATCH_PIXELS, PATCH_PIXELS, device="meta"),
            "patch_embed.proj.bias": torch.empty(SYNC_DIM, device="meta"),
        }
        check_state(state, self.state_dict() | unused, source)
        return load_strict(self, {name: value for name, value in state.items() if name not in unused}, source)

    @torch.no_grad()
    def forward(self, segments: Tensor) -> Tensor:
        if segments.ndim != 6 or segments.shape[2:] != SEGMENT_SHAPE:
            raise ValueError(f"segments have shape {tuple(segments.shape)}: give (batch, segments, 16, 3, 224, 224)")
        batches = segments.flatten(0, 1).split(self.segment_batch)
        tokens = torch.cat([self._encode(batch).float() for batch in batches])
        return tokens.view(len(segments), -1, SYNC_DIM)

    def _encode(self, segments: Tensor) -> Tensor:
        """(B, 16, 3, 224, 224) -> (B, 8, D)."""
        position = self.pos_embed[:, None, 1:] + self.temp_embed[:, :, None]
        patches = (self.patch_embed_3d(segments) + position).flatten(1, 2)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1), patches], dim=1)
        for block in self.blocks:
            x = block(x)
        frames = self.norm(x[:, 1:]).view(-1, PATCHES, SYNC_DIM)  # (B * 8, 196, D)
        return self.spatial_attn_agg(frames).view(len(segments), -1, SYNC_DIM)


def flops(segments: int = 1, depth: int = DEPTH) -> int:
    """Floating-point operations (a multiplication and an addition are two) for so many segments."""
    with FlopCounterMode(display=False) as counter:
        SynchformerVisual(depth=depth)(torch.empty(1, 1, *SEGMENT_SHAPE, device="meta"))
    return segments * counter.get_total_flops()
