"""Guided sampling: what the steps, the two sides of guidance and the tokens share is computed once."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from mmaudio_hf.models.blocks import ChannelLastConv1d, SharedRows, transform_weight
from mmaudio_hf.models.conditioning import Conditions
from mmaudio_hf.models.flow import guided_velocity
from mmaudio_hf.models.network import MMAudio


class GuidedVelocity:
    """Velocity function for a sampler, equal to `MMAudio.predict_guided_velocity` up to float rounding.

    Both sides go through the blocks as one batch of 2B; a scale below 1 evaluates one side only. The latents, the
    same on both sides, are projected once; what the two sides and their tokens are modulated by is computed for each
    different pair of global and sync condition, of which there are far fewer than tokens: sync features are repeated
    up to the rate of the latents, and empty ones repeat every eighth of them.
    All times of one call must be the same.
    """

    def __init__(self, network: MMAudio, conditions: Conditions, empty: Conditions, guidance_scale: float):
        self.network, self.scale = network, guidance_scale
        self.sides = 2 if guidance_scale >= 1 else 1
        if self.sides == 2:
            conditions = Conditions(*(torch.cat(pair) for pair in zip(conditions, empty, strict=True)))
        self.clip, self.text = conditions.clip, conditions.text
        summed, sync = conditions.clip_global + conditions.text_global, conditions.sync
        pairs = torch.cat([summed[:, None].expand(-1, sync.shape[1], -1), sync], dim=2)
        rows, index = torch.unique(pairs.flatten(0, 1), dim=0, return_inverse=True)
        row_sums, self.row_sync = rows.chunk(2, dim=1)
        self.index_BN = index.view(sync.shape[:2])
        self.row_global, self.global_condition = network.global_cond_mlp(row_sums), network.global_cond_mlp(summed)

    def __call__(self, latent_BNC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Velocity (B, N, C) in float32."""
        network, time = self.network, self.network.t_embed(t_B[:1])
        activated = SharedRows(F.silu(time + self.row_global + self.row_sync), self.index_BN)
        activated_global = F.silu(time + self.global_condition)[:, None]
        latent = network.audio_input_proj(latent_BNC).repeat(self.sides, 1, 1)
        velocity = network.transform(latent, self.clip, self.text, activated, activated_global).float()
        return velocity if self.sides == 1 else guided_velocity(*velocity.chunk(2), self.scale)


@contextlib.contextmanager
def fast_convolutions(network: MMAudio, precision: str) -> Iterator[None]:
    """Have the blocks convolve as `models.winograd` does, in float32 on a processor; elsewhere nothing changes.

    Needs twice the memory of the weights concerned meanwhile. The weights must not change until the end.
    """
    weight = network.final_layer.conv.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and precision == "fp32"
    compiled = any(block._compiled_call_impl is not None for block in network.blocks)
    maps = [m for block in network.blocks for m in block.modules() if isinstance(m, ChannelLastConv1d)]
    maps = [m for m in maps if plain and not compiled and m.kernel_size == (3,)]
    try:
        for module in maps:
            module.transformed = transform_weight(module.weight.detach())
        yield
    finally:
        for module in maps:
            module.transformed = None
