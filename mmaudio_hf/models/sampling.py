"""Sampling with classifier-free guidance: what steps, branches and tokens have in common is computed once.

Nothing here takes part in training. `GuidedVelocity` is the velocity function for `flow.sample_euler`. Weights do not
change meanwhile, so `prepared_convolutions` prepares them once, and not at every step as training does.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from mmaudio_hf.models.blocks import ChannelLastConv1d, Conditions, upsample_sync, winograd_weight
from mmaudio_hf.models.flow import guided_velocity
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import SYNC_TOKENS_PER_SEGMENT


class GuidedVelocity:
    """Velocity function for a sampler: `flow.guided_velocity` of the conditional and the unconditional velocity.

    Both go through the blocks as one batch of 2B; a guidance scale below 1 means none, and evaluates the conditional
    one alone. Latents are projected once for both. Sync features are upsampled, and repeat in every segment where they
    are empty, so the adaLN modulations are computed for the distinct tokens only (R of 2 B N) and then looked up.
    All times of one call must be the same.
    """

    def __init__(self, model: MMAudio, conditions: Conditions, unconditional: Conditions, guidance_scale: float):
        """`conditions` of `preprocess_conditions`, `unconditional` of `empty_conditions`, both of the same batch."""
        self.model, self.scale = model, guidance_scale
        branches = [conditions, unconditional][: 2 if guidance_scale >= 1 else 1]
        self.branches = len(branches)
        self.clip = torch.cat([branch.clip for branch in branches])
        self.text = torch.cat([branch.text for branch in branches])
        summed_BD = torch.cat([branch.clip_global + branch.text_global for branch in branches])
        self.global_BD = model.global_cond_mlp(summed_BD)
        rows, indices, count = [], [], 0
        for branch, global_BD in zip(branches, self.global_BD.chunk(self.branches), strict=True):
            first, index_N = _distinct_tokens(model, branch.sync.device, repeats=branch is unconditional)
            rows.append((global_BD[:, None] + branch.sync[:, first]).flatten(0, 1))
            offsets = torch.arange(len(branch.sync), device=first.device)[:, None] * len(first)
            indices.append(count + offsets + index_N)
            count += len(rows[-1])
        self.condition_RD, self.rows_BN = torch.cat(rows), torch.cat(indices)

    def __call__(self, latent_BNC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Velocity (B, N, C) in float32."""
        time_D = self.model.t_embed(t_B[:1])
        latent = self.model.audio_input_proj(latent_BNC).repeat(self.branches, 1, 1)
        velocity = self._run_blocks(
            latent, F.silu(time_D + self.condition_RD), F.silu(time_D + self.global_BD)[:, None]
        )
        if self.branches == 1:
            return velocity.float()
        conditional, unconditional = velocity.float().chunk(2)
        return guided_velocity(conditional, unconditional, self.scale)

    def _run_blocks(self, latent: torch.Tensor, adaln_RD: torch.Tensor, adaln_B1D: torch.Tensor) -> torch.Tensor:
        model, streams = self.model, (latent, self.clip, self.text)
        tables = (model._latent_table, model._clip_table)
        for block in model.joint_blocks:
            streams = block(*streams, adaln_RD, adaln_B1D, *tables, self.rows_BN)
        latent = streams[0]
        for block in model.fused_blocks:
            latent = block(latent, adaln_RD, tables[0], self.rows_BN)
        return model.final_layer(latent, adaln_B1D)


def _distinct_tokens(model: MMAudio, device: torch.device, repeats: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """First latent of each distinct sync token (R,), and for each latent which of these it has (N,).

    Both follow from the lengths alone, so that the host does not wait for the device, as for `torch.unique`.
    `repeats`: the features are the empty ones, the same in every segment of 8 tokens. Their projection sees 5 tokens on
    either side (kernels 7, 3, 3), so only the first and the last segment differ from the others.
    """
    length, segment = model.sync_length, SYNC_TOKENS_PER_SEGMENT
    tokens_S = torch.arange(length, device=device)
    token_N = upsample_sync(tokens_S.float().view(1, length, 1), model.latent_length).flatten().long()
    index_N = token_N
    if repeats and 3 * segment < length <= model.latent_length:
        inner = segment + token_N % segment
        last = token_N - length + 3 * segment
        index_N = torch.where(token_N < segment, token_N, torch.where(last < 2 * segment, inner, last))
        tokens_S = torch.cat([tokens_S[: 2 * segment], tokens_S[-segment:]])
    return torch.searchsorted(token_N, tokens_S).clamp_max(model.latent_length - 1), index_N


@contextlib.contextmanager
def prepared_convolutions(model: MMAudio, precision: str) -> Iterator[None]:
    """Keep what every step makes of the weights of its convolutions, which must not change until the end.

    In float32 on a CPU they are transformed, in twice their memory, and under autocast rounded, in half of it. Compiled
    blocks have convolutions of their own, and weights that a hook makes before each call stay as they are.
    """
    weight, half = model.final_layer.conv.weight, precision != "fp32"
    worthwhile = torch.is_autocast_enabled(weight.device.type) if half else weight.device.type == "cpu"
    worthwhile &= weight.dtype == torch.float32 and model.blocks[0]._compiled_call_impl is None
    steps = [*model.blocks, model.audio_input_proj, model.final_layer] if worthwhile else []
    modules = [m for module in steps for m in module.modules() if isinstance(m, ChannelLastConv1d)]
    maps = [m for m in modules if not m._forward_pre_hooks]
    try:
        for module in maps:
            if half:
                dtype = torch.get_autocast_dtype(weight.device.type)
                module.rounded = module.weight.detach().unsqueeze(2).to(dtype, memory_format=torch.channels_last)
            else:
                module.transformed = winograd_weight(module.weight.detach())
        yield
    finally:
        for module in maps:
            module.transformed = module.rounded = None
