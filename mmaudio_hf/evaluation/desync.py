"""Synchformer's estimate of how early audio or video is, as a class out of 21 offsets (for DeSync).

Iashin et al., Synchformer: Efficient Synchronization from Sparse Cues, https://arxiv.org/abs/2401.16423, section 3: the
segment features of both sides, projected and normalised, make one sequence behind a token whose output is classified.
Parameters have the released names.
"""

from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmaudio_hf.schema import SYNC_DIM
from mmaudio_hf.weights import load_state, load_strict

CLASSES = 21
SEGMENTS = 14  # classified at once: about 4.8 s
VIDEO_TOKENS, AUDIO_TOKENS = 8, 6  # of a segment
DEPTH, HEADS = 3, 8


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(SYNC_DIM, SYNC_DIM) for _ in range(4))

    def forward(self, x_BND: Tensor) -> Tensor:
        heads = (layer(x_BND).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(SYNC_DIM), nn.LayerNorm(SYNC_DIM)
        self.attn = _Attention()
        self.mlp = nn.Sequential(nn.Linear(SYNC_DIM, 4 * SYNC_DIM), nn.GELU(), nn.Linear(4 * SYNC_DIM, SYNC_DIM))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.ln1(x_BND))
        return x_BND + self.mlp(self.ln2(x_BND))


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tokens = 2 + SEGMENTS * (VIDEO_TOKENS + AUDIO_TOKENS)
        self.pos_emb = nn.Parameter(torch.empty(1, tokens, SYNC_DIM))


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vis_in_lnorm, self.aud_in_lnorm = nn.LayerNorm(SYNC_DIM), nn.LayerNorm(SYNC_DIM)
        self.OFF_tok, self.MOD_tok = (nn.Parameter(torch.empty(1, 1, SYNC_DIM)) for _ in range(2))
        self.pos_emb_cfg = _Positions()
        self.blocks = nn.Sequential(*(_Block() for _ in range(DEPTH)))
        self.ln_f = nn.LayerNorm(SYNC_DIM)
        self.off_head = nn.Linear(SYNC_DIM, CLASSES)

    def forward(self, video_BND: Tensor, audio_BND: Tensor) -> Tensor:
        offset, separator = (token.expand(len(video_BND), -1, -1) for token in (self.OFF_tok, self.MOD_tok))
        tokens = [offset, self.vis_in_lnorm(video_BND), separator, self.aud_in_lnorm(audio_BND)]
        x_BND = self.blocks(torch.cat(tokens, dim=1) + self.pos_emb_cfg.pos_emb)  # N = 1 + 14 * 8 + 1 + 14 * 6 = 198
        return self.off_head(self.ln_f(x_BND[:, 0]))


class OffsetHead(nn.Module):
    """Synchformer behind its two encoders, frozen; without storage before `load_released`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.vproj, self.aproj = nn.Linear(SYNC_DIM, SYNC_DIM), nn.Linear(SYNC_DIM, SYNC_DIM)
            self.transformer = _Transformer()
        self.requires_grad_(False).eval()

    def load_released(self, source: str | PathLike | dict[str, Tensor]) -> "OffsetHead":
        """Load these tensors of `synchformer_state_dict.pth`. Returns self; ValueError where they do not fit."""
        prefixes = ("vproj.", "aproj.", "transformer.")
        state = {name: value for name, value in load_state(source).items() if name.startswith(prefixes)}
        return load_strict(self, state, source)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        """Logits (B, 21) of features (B, 14, 8, 768) and (B, 14, 6, 768)."""
        return self.transformer(self.vproj(video).flatten(1, 2), self.aproj(audio).flatten(1, 2))

    @torch.inference_mode()
    def classes(self, video: Tensor, audio: Tensor) -> Tensor:
        """Class indices (B, 2) of the first and of the last 14 segments of (B, segments, 8 or 6, 768)."""
        sides = (video, VIDEO_TOKENS), (audio, AUDIO_TOKENS)
        if any(x.ndim != 4 or x.shape[1] < SEGMENTS or x.shape[2:] != (tokens, SYNC_DIM) for x, tokens in sides):
            raise ValueError(
                f"Synchformer features of {tuple(video.shape)} and {tuple(audio.shape)}: (n, segments, tokens, 768)"
                f" with {VIDEO_TOKENS} and {AUDIO_TOKENS} tokens and at least {SEGMENTS} segments (4.8 s) are needed"
            )
        device = self.vproj.weight.device
        ends = (slice(None, SEGMENTS), slice(-SEGMENTS, None))
        logits = [self(*(x[:, end].to(device, torch.float32) for x, _ in sides)) for end in ends]
        return torch.stack([end.argmax(1).cpu() for end in logits], dim=1)
