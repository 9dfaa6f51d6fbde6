"""Layers, conditions and transformer blocks of the flow model (arXiv 2412.15322, section 3).

Shape suffixes: B batch, N latent tokens, T CLIP tokens, S sync tokens, L text tokens, D hidden size, H heads,
d = D / H; M is 1 for a condition that all tokens share, or N for one of every token.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# --- layers ---------------------------------------------------------------------------------------------------------

# The float32 machine epsilon whatever the input dtype: under bf16 the statistic is formed in float32.
RMS_EPS = torch.finfo(torch.float32).eps


class ChannelLastConv1d(nn.Conv1d):
    """Convolution along the tokens of a channel-last tensor, with zeros outside; odd kernels, stride 1.

    Takes the arguments of `nn.Conv1d`, as peft expects. `nn.Conv1d` itself would transpose every input and output.
    """

    # What every step of sampling makes of the weight, as long as it does not change; see `prepared_convolutions`.
    transformed: torch.Tensor | None = None  # `winograd_weight`
    rounded: torch.Tensor | None = None  # (O, C, 1, r) in the type of autocast and the channels_last format

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Convolve (B, N, in_dim) to (B, N, out_dim)."""
        return convolve(x_BND, self)[0]


def convolve(x_BND: torch.Tensor, *layers: ChannelLastConv1d) -> Sequence[torch.Tensor]:
    """Outputs of one or several layers for one input; those of one kernel size share what depends on the input."""
    first = layers[0]
    if x_BND.device.type == "cpu" and first.kernel_size[0] in POINTS and not torch.compiler.is_compiling():
        exact = x_BND.dtype == first.weight.dtype and x_BND.dtype in (torch.float32, torch.float64)
        if exact and not torch.is_autocast_enabled("cpu"):  # bf16 would lose digits
            parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
            return _Winograd.apply(x_BND, [layer.transformed for layer in layers], *parameters)
    # A view in the channels_last format, which cuDNN takes as it is.
    x_BD1N, padding = x_BND.transpose(1, 2).unsqueeze(2), (0, first.kernel_size[0] // 2)
    weights = [layer.weight.unsqueeze(2) if layer.rounded is None else layer.rounded for layer in layers]
    pairs = zip(weights, layers, strict=True)
    return [F.conv2d(x_BD1N, w, layer.bias, padding=padding).squeeze(2).transpose(1, 2) for w, layer in pairs]


def called_plainly(layer: nn.Module) -> TypeGuard[ChannelLastConv1d]:
    """Whether to call the layer is to convolve: with an adapter, FSDP, a parametrization, hooks, ... it is more."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    plain = type(layer) is ChannelLastConv1d and layer._compiled_call_impl is None and "forward" not in vars(layer)
    return plain and not any(hooks) and not torch.nn.modules.module._has_any_global_hook()


# Where the polynomials of a convolution are evaluated, infinity aside: the more points, the fewer products and digits.
# These make 4 outputs of 6 products instead of 12, and 2 of 8 instead of 14; errors are 0.7e-6 and 1.4e-6 of the result
# and of its gradients. 4 of 10 would have 4e-6. With -2 for -1/2 kernels of three would have 0.9e-6.
POINTS = {3: (0, 1, -1, 2, -1 / 2), 7: (0, 1, -1, 2, -2, 1 / 2, -1 / 2)}


@cache
def winograd_matrices(kernel_size: int) -> tuple[np.ndarray, ...]:
    """A (m, n), B (n, n) and G (n, r) of F(m, r): `A ((G w) * (B d))` are m outputs of a kernel w of r taps.

    d are their n = m + r - 1 inputs. An algorithm of Toom, Cook and Winograd; Lavin & Gray 2016, arXiv 1509.09308,
    section 4; points after Barabasz et al. 2018, arXiv 1803.10986.
    """
    points = np.array(POINTS[kernel_size], dtype=np.float64)
    size = len(points) + 1
    distances = points[:, None] - points + np.eye(size - 1)
    A, B, G = (np.zeros(shape) for shape in ((size - kernel_size + 1, size), (size, size), (size, kernel_size)))
    A[:, :-1], A[-1, -1] = np.vander(points, len(A), increasing=True).T, 1
    G[:-1], G[-1, -1] = np.vander(points, kernel_size, increasing=True) / distances.prod(1)[:, None], 1
    for row, left_out in enumerate(np.eye(size - 1, dtype=bool)):
        B[row, :-1] = np.poly(points[~left_out])[::-1]
    B[-1] = np.poly(points)[::-1]
    scale = 2.0 ** np.round(np.log2(np.abs(G).max(1)))[:, None]  # of a power of two, for numbers of one size
    return A, B * scale, G / scale


def winograd_weight(weight_OCr: torch.Tensor) -> torch.Tensor:
    """(n, O, C). A product, as fast as a copy: no layout of the weights in memory would be faster."""
    G_nr = weight_OCr.new_tensor(winograd_matrices(weight_OCr.shape[2])[2])
    return (G_nr @ weight_OCr.reshape(-1, G_nr.shape[1]).T).view(-1, *weight_OCr.shape[:2])


class _Winograd(torch.autograd.Function):
    """Convolutions of one input by `winograd_matrices`, for the processor: 75 % of a step are convolutions.

    Each is n products of P = B G tiles of m tokens; O = out_dim, C = in_dim. Transformed weights are kept for the
    backward pass, which takes 2 % of a step off; inputs, of 1.5 to 4 times their memory, are transformed again. Neither
    is kept where its gradient is not needed: those of frozen weights need no inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BNC: torch.Tensor, transformed: Sequence[torch.Tensor | None], *parameters: Any
    ) -> tuple[torch.Tensor, ...]:
        """`parameters` are the weight (O, C, r) and the bias (O,) or None of each, `transformed` its (n, O, C)."""
        weights, biases = parameters[::2], parameters[1::2]
        ctx.margin, ctx.shapes = weights[0].shape[2] // 2, [weight.shape for weight in weights]
        A, B, _ = ctx.matrices = [x_BNC.new_tensor(matrix) for matrix in winograd_matrices(weights[0].shape[2])]
        kept = [winograd_weight(w) if t_nOC is None else t_nOC for w, t_nOC in zip(weights, transformed, strict=True)]
        of_x, _, *of_each = ctx.needs_input_grad
        ctx.save_for_backward(x_BNC if any(of_each[::2]) else None, *(kept if of_x else ()))
        ctx.tokens = x_BNC.shape[:2]
        x_nPC = _gather(x_BNC, B, ctx.margin, len(A))
        outputs = [_scatter(torch.bmm(x_nPC, t_nOC.mT), A, 0, len(A), x_BNC.shape[:2]) for t_nOC in kept]
        return tuple(y if bias is None else y.add_(bias) for y, bias in zip(outputs, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_BNO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x_BNC, *transformed), (A, B, G), (of_x, _, *of_each) = ctx.saved_tensors, ctx.matrices, ctx.needs_input_grad
        grads_nPO = [_gather(grad_BNO, A.T, 0, len(A)) for grad_BNO in grads_BNO]
        gradients: list[torch.Tensor | None] = [None, None]
        if of_x:  # the transposed transforms of the forward pass
            products_nPC = torch.bmm(grads_nPO[0], transformed[0])
            for grad_nPO, t_nOC in zip(grads_nPO[1:], transformed[1:], strict=True):
                products_nPC.baddbmm_(grad_nPO, t_nOC)
            gradients[0] = _scatter(products_nPC, B.T, ctx.margin, len(A), ctx.tokens)
        x_nPC: Any = x_BNC if x_BNC is None else _gather(x_BNC, B, ctx.margin, len(A))
        for grad_BNO, grad_nPO, shape, *needed in zip(
            grads_BNO, grads_nPO, ctx.shapes, of_each[::2], of_each[1::2], strict=True
        ):
            gradients.append((torch.bmm(grad_nPO.mT, x_nPC).flatten(1).T @ G).view(shape) if needed[0] else None)
            gradients.append(grad_BNO.sum((0, 1)) if needed[1] else None)
        return tuple(gradients)


def _gather(x_BNC: torch.Tensor, matrix_nk: torch.Tensor, margin: int, step: int) -> torch.Tensor:
    """(n, P, C): `matrix_nk` times the k tokens of each tile; tiles begin every `step` tokens from -`margin` on."""
    batch, length, channels = x_BNC.shape
    tiles, (size, taken) = -(-length // step), matrix_nk.shape
    values = x_BNC.new_empty(batch, tiles, size, channels)
    # Tiles first to last - 1 have all their tokens: read where they are, without a padded copy, 2 % of a step.
    first = min(-(-margin // step), tiles)
    last = max((length + margin - taken) // step + 1, first)
    matrices = matrix_nk.expand(last - first, -1, -1)
    for x_NC, value in zip(x_BNC, values, strict=True):  # a sample at a time stays in the cache: half the time
        if last == first:
            break
        windows = x_NC.contiguous()[first * step - margin :].unfold(0, taken, step).mT
        torch.bmm(matrices, windows, out=value[first:last])
    for tile in (*range(first), *range(last, tiles)):
        begin = tile * step - margin
        low, high = max(begin, 0), min(begin + taken, length)
        values[:, tile] = matrix_nk[:, low - begin : high - begin] @ x_BNC[:, low:high]
    return values.flatten(0, 1).transpose(0, 1)


def _scatter(
    values_nPC: torch.Tensor, matrix_kn: torch.Tensor, margin: int, step: int, shape: Sequence[int]
) -> torch.Tensor:
    """The transpose of `_gather`: (B, N, C), where tokens of several tiles are summed; `shape` is (B, N)."""
    batch, length = shape
    values = values_nPC.unflatten(1, (batch, -1)).movedim(0, 2)  # (B, G, n, C)
    tiles, chunks = values.shape[1], matrix_kn.split(step)
    y = values_nPC.new_empty(batch, tiles + len(chunks) - 1, step, values_nPC.shape[2])
    for value, rows in zip(values, y, strict=True):
        torch.bmm(chunks[0].expand(tiles, -1, -1), value, out=rows[:tiles])
        rows[tiles:] = 0
        for shift, chunk in enumerate(chunks[1:], 1):
            # Not baddbmm_, which takes the tiles one by one where they are not contiguous.
            rows[shift : shift + tiles, : len(chunk)] += torch.bmm(chunk.expand(tiles, -1, -1), value)
    return y.flatten(1, 2)[:, margin : margin + length]


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
        w1, w3 = self.w1, self.w3
        # A compiler sees two convolutions either way, and no guards for hooks.
        if not torch.compiler.is_compiling() and called_plainly(w1) and called_plainly(w3):
            gate_BNH, value_BNH = convolve(x_BND, w1, w3)
        else:
            gate_BNH, value_BNH = w1(x_BND), w3(x_BND)
        return self.w2(F.silu(gate_BNH) * value_BNH)


def no_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """For what torch computes in float32 inside of its kernels: autocast would write float32 copies to memory."""
    # Meta tensors, on which FLOPs are counted, know no autocast.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, computed in float32, in the input's dtype."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), RMS_EPS)


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
    """Cosines and signed sines (2, length, head_dim), float32, of positions 0 .. length - 1; see `rotate`.

    `frequency_scale` stretches positions: N / T gives a CLIP frame the angle of the latent at the same instant.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = (1.0 / 10_000.0**exponents) * frequency_scale
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    sines = torch.stack([-angles.sin(), angles.sin()], dim=-1).flatten(-2)
    return torch.stack([angles.cos().repeat_interleave(2, dim=-1), sines])


def rotate(x_BNHd: torch.Tensor, table_2Nd: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of adjacent channel pairs, in float32.

    (x0, x1) becomes (x0 cos - x1 sin, x1 cos + x0 sin).
    """
    cos_N1d, sin_N1d = table_2Nd.unsqueeze(2)
    swapped_BNHd = x_BNHd.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x_BNHd * cos_N1d, swapped_BNHd, sin_N1d).to(x_BNHd.dtype)


def modulate(x_BND: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`LN(x) * (1 + scale) + shift`; the layer normalisation has no parameters, eps 1e-5."""
    with no_autocast(x_BND):
        # Not addcmul: its backward multiplies both factors by 1 first, which costs more than it saves.
        return F.layer_norm(x_BND, x_BND.shape[-1:]) * (1 + scale) + shift


# --- conditions: CLIP, sync and text features, projected once for all sampling steps ---------------------------------


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

    def forward(self, x_BND: torch.Tensor, table_2Nd: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return q, k, v, each (B, N, H, d); q and k are normalised per head, then rotated when a table is given."""
        q_BNHd, k_BNHd, v_BNHd = self._project(x_BND).unbind(2)
        with no_autocast(x_BND):
            q_BNHd, k_BNHd = self.q_norm(q_BNHd), self.k_norm(k_BNHd)
            if table_2Nd is not None:
                q_BNHd, k_BNHd = rotate(q_BNHd, table_2Nd), rotate(k_BNHd, table_2Nd)
        return q_BNHd, k_BNHd, v_BNHd

    def _project(self, x_BND: torch.Tensor) -> torch.Tensor:
        """(B, N, 3, H, d): last strides are 1, without which torch has no fused attention and takes the slow one.

        The outputs of `qkv` are laid out (head, channel, {q, k, v}) in released files. It is cheaper to reorder the
        rows of the weight than (B, N, 3 D) outputs; an adapter in its place has no single weight.
        """
        layout = (self.num_heads, -1, 3)
        if not isinstance(self.qkv, nn.Linear):
            return self.qkv(x_BND).unflatten(-1, layout).movedim(-1, 2).contiguous()
        weight, bias = (p.unflatten(0, layout).movedim(2, 0).flatten(0, 2) for p in (self.qkv.weight, self.qkv.bias))
        return F.linear(x_BND, weight, bias).unflatten(-1, (3, self.num_heads, -1))


def attention(q_BNHd: torch.Tensor, k_BNHd: torch.Tensor, v_BNHd: torch.Tensor) -> torch.Tensor:
    """Softmax attention with scale 1/sqrt(d) and no mask; heads are concatenated to (B, N, D)."""
    q_BHNd, k_BHNd, v_BHNd = (x.transpose(1, 2) for x in (q_BNHd, k_BNHd, v_BNHd))
    return F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd).transpose(1, 2).flatten(2)


class ModulatedBlock(nn.Module):
    """Transformer block of one stream, modulated by a condition (adaLN-Zero, Peebles & Xie 2023, arXiv 2212.09748).

    A `pre_only` block gives queries, keys and values to the other streams, and its own stream ends.
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

    def modulation(self, condition: torch.Tensor, rows_BN: torch.Tensor | None = None) -> Modulation:
        """Shifts, scales and gates from the condition (B, M, D) after its SiLU.

        With `rows_BN` the condition is (R, D), and token n of sample b has its row `rows_BN[b, n]`.
        """
        modulation = self.adaLN_modulation(condition)
        modulation = modulation if rows_BN is None else F.embedding(rows_BN, modulation)
        return modulation.chunk(2 if self.pre_only else 6, dim=-1)

    def project(self, x_BND: torch.Tensor, modulation: Modulation, table_2Nd: torch.Tensor | None) -> tuple:
        """Queries, keys and values (B, N, H, d) of the modulated stream."""
        return self.attn(modulate(x_BND, modulation[0], modulation[1]), table_2Nd)

    def finish(self, x_BND: torch.Tensor, attended_BND: torch.Tensor, modulation: Modulation) -> torch.Tensor:
        """Add the attention output and the feed-forward branch to the stream."""
        _, _, gate_attention, shift, scale, gate_ffn = modulation
        x_BND = x_BND + self.linear1(attended_BND) * gate_attention
        return x_BND + self.ffn(modulate(x_BND, shift, scale)) * gate_ffn

    def forward(
        self,
        x_BND: torch.Tensor,
        condition: torch.Tensor,
        table_2Nd: torch.Tensor,
        rows_BN: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The block with self attention over this stream alone; the condition is that of `modulation`."""
        modulation = self.modulation(condition, rows_BN)
        return self.finish(x_BND, attention(*self.project(x_BND, modulation, table_2Nd)), modulation)


class JointBlock(nn.Module):
    """Attention over latent, CLIP and text tokens (MM-DiT of Esser et al. 2024, arXiv 2403.03206).

    A `pre_only` block returns the latents alone: FSDP would have to guard streams that came back unchanged.
    """

    def __init__(self, dim: int, num_heads: int, pre_only: bool):
        super().__init__()
        self.latent_block = ModulatedBlock(dim, num_heads, kernel_size=3)
        self.clip_block = ModulatedBlock(dim, num_heads, kernel_size=3, pre_only=pre_only)
        self.text_block = ModulatedBlock(dim, num_heads, kernel_size=1, pre_only=pre_only)

    def forward(
        self,
        latent_BND: torch.Tensor,
        clip_BTD: torch.Tensor,
        text_BLD: torch.Tensor,
        latent_condition: torch.Tensor,
        global_condition_B1D: torch.Tensor,
        latent_table_2Nd: torch.Tensor,
        clip_table_2Td: torch.Tensor,
        rows_BN: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return the streams that continue.

        Latents have the condition of each token, as in `ModulatedBlock.modulation`; the others have the global one.
        """
        blocks, streams = (self.latent_block, self.clip_block, self.text_block), (latent_BND, clip_BTD, text_BLD)
        modulations = (
            self.latent_block.modulation(latent_condition, rows_BN),
            self.clip_block.modulation(global_condition_B1D),
            self.text_block.modulation(global_condition_B1D),
        )
        tables = (latent_table_2Nd, clip_table_2Td, None)
        projected = [
            block.project(x, modulation, table)  # three of (B, N | T | L, H, d)
            for block, x, modulation, table in zip(blocks, streams, modulations, tables, strict=True)
        ]
        q, k, v = (torch.cat(tensors, dim=1) for tensors in zip(*projected, strict=True))  # (B, N + T + L, H, d)
        attended = attention(q, k, v).split([x.shape[1] for x in streams], dim=1)
        return tuple(
            block.finish(x, a, modulation)
            for block, x, a, modulation in zip(blocks, streams, attended, modulations, strict=True)
            if not block.pre_only
        )


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
