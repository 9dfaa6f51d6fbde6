"""`MMAudio`: the flow model (arXiv 2412.15322, section 3). State-dict names are those of the released files.

Shape suffixes: B batch, N latent tokens, C latent channels, T CLIP tokens, S sync tokens, L text tokens, D hidden size.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmaudio_hf.config import ModelConfig, variant_config
from mmaudio_hf.models.blocks import (
    Conditions,
    FinalLayer,
    GatedMLP,
    JointBlock,
    ModulatedBlock,
    TimestepEmbedder,
    clip_projection,
    fill_missing,
    rotary_table,
    temporal_projection,
    text_projection,
    upsample_sync,
)
from mmaudio_hf.models.pretrained import PretrainedModel
from mmaudio_hf.models.pretrained import read_model_config as read_model_config  # scripts import it from here
from mmaudio_hf.schema import SYNC_TOKENS_PER_SEGMENT, checked

FROZEN_TENSORS = ("latent_mean", "latent_std", "empty_string_feat")


class MMAudio(PretrainedModel):
    """Predicts the velocity of an audio latent, given CLIP, sync and text features and the time.

    Latents are those of the mel VAE, normalised by `latent_mean` and `latent_std`: call `normalize` before and
    `unnormalize` after. The output of an untrained model is exactly zero.
    """

    _latent_table: torch.Tensor  # rotary tables: not in state dicts, rebuilt when lengths change
    _clip_table: torch.Tensor

    @checked
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        dim, heads, v2 = config.hidden_dim, config.num_heads, config.v2
        self.audio_input_proj = temporal_projection(config.latent_channels, dim, v2, kernel_size=7)
        self.clip_input_proj = clip_projection(config.clip_dim, dim, v2)
        self.sync_input_proj = temporal_projection(config.sync_dim, dim, v2, kernel_size=3)
        self.text_input_proj = text_projection(config.text_dim, dim, v2)
        self.clip_cond_proj = nn.Linear(dim, dim)
        self.text_cond_proj = nn.Linear(dim, dim)
        self.global_cond_mlp = GatedMLP(dim)
        self.sync_pos_emb = nn.Parameter(torch.empty(1, 1, SYNC_TOKENS_PER_SEGMENT, config.sync_dim))
        self.final_layer = FinalLayer(dim, config.latent_channels)
        self.latent_mean = nn.Parameter(torch.empty(1, 1, config.latent_channels), requires_grad=False)
        self.latent_std = nn.Parameter(torch.empty(1, 1, config.latent_channels), requires_grad=False)
        self.empty_string_feat = nn.Parameter(torch.empty(config.text_tokens, config.text_dim), requires_grad=False)
        self.empty_clip_feat = nn.Parameter(torch.empty(1, config.clip_dim))
        self.empty_sync_feat = nn.Parameter(torch.empty(1, config.sync_dim))
        self.t_embed = TimestepEmbedder(dim, v2)
        # In the last joint block the CLIP and text streams end: they only offer keys and values to the latents.
        self.joint_blocks = nn.ModuleList(
            [JointBlock(dim, heads, pre_only=i == config.joint_depth - 1) for i in range(config.joint_depth)]
        )
        self.fused_blocks = nn.ModuleList(
            [ModulatedBlock(dim, heads, kernel_size=3) for _ in range(config.fused_depth)]
        )
        self.set_lengths(config.latent_length, config.clip_length, config.sync_length)
        if self.sync_pos_emb.device.type != "meta":
            self.reset_parameters()

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in their order."""
        return [*self.joint_blocks, *self.fused_blocks]

    def compile_blocks(self) -> None:
        """Compile each block on its own: blocks of a kind have the same shapes, so that they share what is compiled."""
        for block in self.blocks:
            block.compile()

    @classmethod
    @checked
    def from_variant(cls, variant: str, **changes: Any) -> Self:
        """Untrained model with the sizes of a released one; `changes` are fields of ModelConfig."""
        return cls(variant_config(variant, **changes))

    # --- initial values and lengths ---------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Published initialisation: adaLN-Zero, convolutions as torch has them. Latent statistics are NaN until set."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self.t_embed.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation.1" in name or name.startswith("final_layer.conv"):
                nn.init.zeros_(parameter)
        for parameter in (self.sync_pos_emb, self.empty_clip_feat, self.empty_sync_feat, self.empty_string_feat):
            nn.init.zeros_(parameter)
        for parameter in (self.latent_mean, self.latent_std):
            nn.init.constant_(parameter, float("nan"))

    @checked
    def set_lengths(self, latent: int, clip: int, sync: int) -> None:
        """Set token counts for another duration (N, T, S) and rebuild the rotary tables."""
        if min(latent, clip, sync) < 1 or sync % SYNC_TOKENS_PER_SEGMENT:
            raise ValueError(f"lengths must be positive and sync a multiple of 8, not {latent}, {clip}, {sync}")
        self.latent_length, self.clip_length, self.sync_length = latent, clip, sync
        self._build_rotary_tables()

    def _build_rotary_tables(self) -> None:
        head_dim = self.config.hidden_dim // self.config.num_heads
        device = self.sync_pos_emb.device
        latent_table = rotary_table(self.latent_length, head_dim, device=device)
        clip_table = rotary_table(self.clip_length, head_dim, self.latent_length / self.clip_length, device=device)
        self.register_buffer("_latent_table", latent_table, persistent=False)
        self.register_buffer("_clip_table", clip_table, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        on_meta = self.t_embed.freqs.is_meta
        super()._apply(fn, recurse)
        self._build_rotary_tables()  # a cast to bf16 must not round them
        if on_meta:  # `to_empty` leaves them undefined, and no state dict holds them
            self.t_embed.freqs.copy_(self.t_embed.frequencies())
        return self

    @torch.no_grad()
    def set_latent_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set the per-channel statistics (C,) of the training latents; ValueError unless finite and std > 0."""
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError("latent statistics must be finite, with a positive standard deviation in every channel")
        self.latent_mean.copy_(mean.view(1, 1, -1))
        self.latent_std.copy_(std.view(1, 1, -1))

    @torch.no_grad()
    def set_empty_text(self, text_features_LD: torch.Tensor) -> None:
        """Set the text features (77, 1024) of the empty string, which replace a missing caption."""
        self.empty_string_feat.copy_(text_features_LD)

    # --- velocity ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        latent_BNC: torch.Tensor,
        clip_features: torch.Tensor,
        sync_features: torch.Tensor,
        text_features: torch.Tensor,
        t_B: torch.Tensor,
        *,
        clip_missing: torch.Tensor | None = None,
        sync_missing: torch.Tensor | None = None,
        text_missing: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity (B, N, C) of a normalised latent (B, N, C) at times (B,).

        clip_features (B, T, 1024), sync_features (B, S, 768), text_features (B, 77, 1024). Where a `*_missing` mask
        (B,) is true, the features of that sample are replaced by the learned (or empty-string) ones.
        """
        clip_features = fill_missing(clip_features, clip_missing, self.empty_clip_feat)
        sync_features = fill_missing(sync_features, sync_missing, self.empty_sync_feat)
        text_features = fill_missing(text_features, text_missing, self.empty_string_feat)
        conditions = self.preprocess_conditions(clip_features, sync_features, text_features)
        return self.predict_velocity(latent_BNC, t_B, conditions)

    @checked
    def preprocess_conditions(
        self, clip_features: torch.Tensor, sync_features: torch.Tensor, text_features: torch.Tensor
    ) -> Conditions:
        """Project features (B, T, 1024), (B, S, 768), (B, 77, 1024); done once for all sampling steps."""
        self._check_tokens("clip_features", clip_features, self.clip_length, self.config.clip_dim)
        self._check_tokens("sync_features", sync_features, self.sync_length, self.config.sync_dim)
        self._check_tokens("text_features", text_features, self.config.text_tokens, self.config.text_dim)
        # (B, S / 8, 8, 768): the position within a segment is added before the projection, the same in every segment.
        sync = sync_features.unflatten(1, (-1, SYNC_TOKENS_PER_SEGMENT)) + self.sync_pos_emb
        sync_BSD = self.sync_input_proj(sync.flatten(1, 2))
        sync_BND = upsample_sync(sync_BSD, self.latent_length)
        clip_BTD, text_BLD = self.clip_input_proj(clip_features), self.text_input_proj(text_features)
        clip_BD, text_BD = self.clip_cond_proj(clip_BTD.mean(1)), self.text_cond_proj(text_BLD.mean(1))
        return Conditions(clip_BTD, sync_BND, text_BLD, clip_BD, text_BD)

    @staticmethod
    def _check_tokens(name: str, features: torch.Tensor, length: int, dim: int) -> None:
        if features.shape[1:] != (length, dim):
            raise ValueError(f"{name} must be (batch, {length}, {dim}), not {tuple(features.shape)}; see set_lengths")

    @checked
    def empty_conditions(self, batch: int, negative_text_features: torch.Tensor | None = None) -> Conditions:
        """Unconditional (null) conditions for guidance. Negative text (B or 1, 77, 1024) replaces the empty text."""
        if not 0 < batch < 2**31:
            raise ValueError(f"batch must be at least 1 and below 2**31, not {batch}")
        clip = self.empty_clip_feat.expand(1, self.clip_length, -1)
        sync = self.empty_sync_feat.expand(1, self.sync_length, -1)
        text = self.empty_string_feat[None] if negative_text_features is None else negative_text_features
        if text.shape[0] not in (1, batch):
            raise ValueError(f"negative_text_features hold {text.shape[0]} samples, the batch {batch}")
        conditions = self.preprocess_conditions(clip, sync, text)  # those of video with a batch of 1
        return Conditions(*(c.expand(batch, *c.shape[1:]) for c in conditions))

    @checked
    def predict_velocity(self, latent_BNC: torch.Tensor, t_B: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Velocity (B, N, C) at times (B,), given projected conditions."""
        if latent_BNC.shape[1] != self.latent_length:
            raise ValueError(f"the latent has {latent_BNC.shape[1]} tokens, the model is set to {self.latent_length}")
        self._check_channels(latent_BNC)
        if len(t_B) not in (1, len(latent_BNC)):
            raise ValueError(f"t_B has {len(t_B)} times, the latent {len(latent_BNC)} samples")
        streams = (self.audio_input_proj(latent_BNC), conditions.clip, conditions.text)
        global_BD = self.t_embed(t_B) + self.global_cond_mlp(conditions.clip_global + conditions.text_global)
        global_B1D = global_BD[:, None]
        # Every adaLN modulation starts with this SiLU: it is applied once here, and not once a block.
        adaln_BND, adaln_B1D = F.silu(global_B1D + conditions.sync), F.silu(global_B1D)
        for block in self.joint_blocks:
            streams = self._run(block, *streams, adaln_BND, adaln_B1D, self._latent_table, self._clip_table)
        latent_BND = streams[0]  # the last joint block ends the others
        for block in self.fused_blocks:
            latent_BND = self._run(block, latent_BND, adaln_BND, self._latent_table)
        # Global condition only, without sync: unintended by the authors, but the weights are trained with it.
        return self.final_layer(latent_BND, adaln_B1D)

    def _run(self, block: nn.Module, *inputs: torch.Tensor) -> Any:
        """Output of a block; with `activation_checkpointing` only its inputs are kept for the backward pass."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    @checked
    def normalize(self, latent_BNC: torch.Tensor) -> torch.Tensor:
        """VAE latent to network latent; not in place."""
        self._check_channels(latent_BNC)
        return (latent_BNC - self.latent_mean) / self.latent_std

    @checked
    def unnormalize(self, latent_BNC: torch.Tensor) -> torch.Tensor:
        """Network latent to VAE latent; not in place."""
        self._check_channels(latent_BNC)
        return latent_BNC * self.latent_std + self.latent_mean

    def _check_channels(self, latent_BNC: torch.Tensor) -> None:
        if latent_BNC.shape[-1] != self.config.latent_channels:
            raise ValueError(f"the latent has {latent_BNC.shape[-1]} channels, not {self.config.latent_channels}")
