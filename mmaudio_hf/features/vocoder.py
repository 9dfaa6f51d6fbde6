"""BigVGAN vocoders, from mel spectrogram to waveform.

Lee et al., BigVGAN: A Universal Neural Vocoder with Large-Scale Training, https://arxiv.org/abs/2206.04658
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmaudio_hf.schema import audio_mode, checked
from mmaudio_hf.weights import Source, check_state, describe, load_state, load_strict

WIDTH = 1536
RESIDUAL_KERNELS = (3, 7, 11)
DILATIONS = (1, 3, 5)
SNAKE_EPS = 1e-9
FILTER_TAPS = 12
FILTER_NAMES = (".upsample.filter", ".downsample.lowpass.filter")
BLOCK = 16  # samples that one row of a banded matrix product filters at once


@dataclass(frozen=True)
class Generator:
    """What differs between the two released vocoders."""

    upsample_rates: tuple[int, ...]
    upsample_kernels: tuple[int, ...]
    final_bias: bool
    final_tanh: bool  # else clamped to [-1, 1]


GENERATORS = {
    "16k": Generator((4, 4, 2, 2, 2, 2), (8, 8, 4, 4, 4, 4), final_bias=True, final_tanh=True),
    "44k": Generator((8, 4, 2, 2, 2, 2), (16, 8, 4, 4, 4, 4), final_bias=False, final_tanh=False),
}


def low_pass_filter() -> Tensor:
    """The 12 taps f of cutoff 1/4 and transition half-width 0.3, windowed by Kaiser, of sum 1."""
    attenuation = 2.285 * (FILTER_TAPS / 2 - 1) * math.pi * 4 * 0.3 + 7.95
    beta = 0.1102 * (attenuation - 8.7)
    window = torch.kaiser_window(FILTER_TAPS, periodic=False, beta=beta, dtype=torch.float64)
    time = torch.arange(FILTER_TAPS) - (FILTER_TAPS - 1) / 2
    taps = window * torch.sinc(0.5 * time.double())
    return (taps / taps.sum()).float()


def _up_matrix() -> Tensor:
    """(BLOCK + 6, 2 BLOCK): from x[n - 3], x[n - 2], ... to the doubled samples 2n, 2n + 1, ...

    Doubled sample t is 2 sum_k f[k] x[(t + 5 - k) / 2] over the k with whole indices.
    """
    taps, matrix = low_pass_filter(), torch.zeros(BLOCK + 6, 2 * BLOCK)
    for t in range(2 * BLOCK):
        for k in range((t + 1) % 2, FILTER_TAPS, 2):
            matrix[(t + 5 - k) // 2 + 3, t] = 2 * taps[k]
    return matrix


def _down_matrix() -> Tensor:
    """(2 BLOCK + 10, BLOCK): from z[2n - 5], z[2n - 4], ... to y[n], y[n + 1], ...; y[n] = sum_k f[k] z[2n + k - 5]."""
    taps, matrix = low_pass_filter(), torch.zeros(2 * BLOCK + FILTER_TAPS - 2, BLOCK)
    for n in range(BLOCK):
        matrix[2 * n : 2 * n + FILTER_TAPS, n] = taps
    return matrix


def _filter(x: Tensor, matrix: Tensor, left: int, step: int, length: int) -> Tensor:
    """FIR filtering of the last axis by a banded matrix, edges replicated: `step` samples in per block.

    Two to three times as fast as grouped convolutions on CPU, and exact float32 on GPU where those may use TF32.
    """
    size, taps = x.shape[-1], matrix.shape[0]
    blocks = -(-size // step)
    padded = x.new_empty(*x.shape[:-1], (blocks - 1) * step + taps)  # F.pad replicates ten times slower on CPU
    padded[..., :left] = x[..., :1]
    padded[..., left : left + size] = x
    padded[..., left + size :] = x[..., -1:]
    rows = padded.unfold(-1, taps, step).reshape(-1, taps)
    return (rows @ matrix).view(*x.shape[:-1], -1)[..., :length]


class SnakeBeta(nn.Module):
    """Snake with a magnitude of its own: x + sin^2(e^alpha x) / e^beta, one alpha and beta per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        frequency = self.alpha.exp()[:, None]
        magnitude = 1 / (self.beta.exp() + SNAKE_EPS)[:, None]
        return (x * frequency).sin_().square_().mul_(magnitude).add_(x)


class Activation(nn.Module):
    """Anti-aliased activation of BigVGAN: doubled rate, snake, low pass, original rate."""

    up: Tensor
    down: Tensor

    def __init__(self, channels: int, up: Tensor, down: Tensor):
        super().__init__()
        self.act = SnakeBeta(channels)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("down", down, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        doubled = self.act(_filter(x, self.up, 3, BLOCK, 2 * length))
        return _filter(doubled, self.down, 5, 2 * BLOCK, length)


class ResidualUnit(nn.Module):
    """The anti-aliased multi-periodicity (AMP) block of BigVGAN, one kernel size and three dilations."""

    def __init__(self, channels: int, kernel: int, filters: tuple[Tensor, Tensor]):
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in DILATIONS)
        self.convs2 = nn.ModuleList(conv(1) for _ in DILATIONS)
        self.activations = nn.ModuleList(Activation(channels, *filters) for _ in range(2 * len(DILATIONS)))

    def forward(self, x: Tensor) -> Tensor:
        for m, (conv1, conv2) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            x = x + conv2(self.activations[2 * m + 1](conv1(self.activations[2 * m](x))))
        return x


class Vocoder(nn.Module):
    """Vocoder of `mode` ("16k" or "44k"), frozen; its parameters have no storage before `load_released`.

    Call with mel (B, bins, frames) as `MelSpectrogram` of the mode makes it; returns the waveform (B, frames * hop)
    in [-1, 1]. `width` overrides the first channel count, for tests.
    """

    def __init__(self, mode: str, width: int = WIDTH):
        super().__init__()
        self.mode, self.generator = audio_mode(mode), GENERATORS[mode]
        rates, kernels = self.generator.upsample_rates, self.generator.upsample_kernels
        channels = [width >> stage for stage in range(len(rates) + 1)]
        filters = _up_matrix(), _down_matrix()
        with torch.device("meta"):
            self.conv_pre = nn.Conv1d(self.mode.mel_bins, width, 7, padding=3)
            self.ups = nn.ModuleList(
                nn.Sequential(nn.ConvTranspose1d(a, b, kernel, rate, padding=(kernel - rate) // 2))
                for a, b, kernel, rate in zip(channels[:-1], channels[1:], kernels, rates, strict=True)
            )
            self.resblocks = nn.ModuleList(
                ResidualUnit(count, kernel, filters) for count in channels[1:] for kernel in RESIDUAL_KERNELS
            )
            self.activation_post = Activation(channels[-1], *filters)
            self.conv_post = nn.Conv1d(channels[-1], 1, 7, padding=3, bias=self.generator.final_bias)
        self.requires_grad_(False).eval()

    def load_released(self, source: Source) -> "Vocoder":
        """Load `best_netG.pt` (16k), `bigvgan_generator.pt` (44k) or its state dict; ValueError if it does not fit."""
        state, taps = load_state(source, key="generator"), low_pass_filter()
        for name in [name for name in state if name.endswith(FILTER_NAMES)]:  # copies of the constant filter
            value = state.pop(name).flatten()
            # 2^-8 is the rounding of a file in bfloat16; the filter itself is computed, not read.
            if value.numel() != FILTER_TAPS or not torch.allclose(value, taps, rtol=2**-8, atol=1e-6):
                raise ValueError(f"{describe(source)} does not fit this network: {name} is another filter")
        released: dict[str, Tensor] = {}  # names and shapes before weight normalisation is folded in
        for name, value in self.state_dict().items():
            weight = name.endswith(".weight")
            released |= {f"{name}_g": value[:, :1, :1], f"{name}_v": value} if weight else {name: value}
        check_state(state, released, source)
        return load_strict(self, _fold(state), source)

    @torch.no_grad()
    @checked
    def forward(self, mel: Tensor) -> Tensor:
        if mel.ndim != 3 or mel.shape[1] != self.mode.mel_bins:
            raise ValueError(f"mel has shape {tuple(mel.shape)}: give (batch, {self.mode.mel_bins}, frames)")
        x, units = self.conv_pre(mel), len(RESIDUAL_KERNELS)
        for stage, upsample in enumerate(self.ups):
            x = upsample(x)  # (B, channels / 2, rate * time)
            x = sum(unit(x) for unit in self.resblocks[units * stage : units * (stage + 1)]) / units
        x = self.conv_post(self.activation_post(x)).squeeze(1).float()
        return x.tanh() if self.generator.final_tanh else x.clamp(-1, 1)


def _fold(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """W = g V / |V|, the norm over all axes but the first."""
    folded = {name: value for name, value in state.items() if not name.endswith((".weight_g", ".weight_v"))}
    for name, v in state.items():
        if name.endswith(".weight_v"):
            length = torch.linalg.vector_norm(v.flatten(1), dim=1)[:, None, None]
            folded[name[:-2]] = v * (state[f"{name[:-1]}g"] / length)
    return folded
