"""Convolutions over three tokens with half the multiplications (Winograd; Lavin & Gray 2016, F(4, 3)).

Four neighbouring outputs of a kernel of three are a linear map of six products instead of twelve. Most of the network
is such convolutions. In float32 the result is as near to the exact one as that of the usual way; in bf16 it is not.
"""

import torch
import torch.nn.functional as F

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
