"""Log-mel spectrograms, and the VAE between them and latents of MMAudio (https://arxiv.org/abs/2412.15322).

Spectrograms are those of BigVGAN (https://arxiv.org/abs/2206.04658), whose vocoders take them too. The VAE is a 1-D
convolutional network after Make-An-Audio 2 (https://arxiv.org/abs/2305.18474) whose layers preserve magnitudes as those
of EDM2 do (Karras et al., https://arxiv.org/abs/2312.02696). Inside, activations are channel-first, (B, channels,
time); latents outside are time-first, (B, N, C), as they are stored.
"""

import math
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmaudio_hf.schema import LATENT_STRIDE, audio_mode, checked
from mmaudio_hf.weights import Source, check_state, load_state, load_strict

WIDTHS = {"16k": 384, "44k": 512}
ACTIVATION_BOUND = 256  # as in EDM2, where it keeps fp16 from overflowing
NORM_EPS = 1e-4
BRANCH_WEIGHT = 0.3  # of the residual branch; the skip path has 0.7
SILU_SCALE = 0.596  # rms of silu(x) for standard normal x

MAGNITUDE_EPS = 1e-9
MEL_FLOOR = 1e-5

# Slaney's mel scale: linear below 1 kHz (15 mels), then 27 mels per factor 6.4.
_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0
_LOG_STEP = np.log(6.4) / 27


def mel_filter_bank(mode: str) -> Tensor:
    """Slaney filter bank with area normalisation, (bins, n_fft // 2 + 1) float32.

    Own arithmetic in double: `torchaudio.functional.melscale_fbanks` works in float32, which moves
    single weights at 44.1 kHz by more than the 1e-6 the features are held to.
    """
    rate = audio_mode(mode)
    frequency_K = np.linspace(0, rate.sample_rate / 2, rate.mel_window // 2 + 1)
    mel = np.linspace(0, _BREAK_MEL + np.log(rate.mel_fmax / _BREAK_HZ) / _LOG_STEP, rate.mel_bins + 2)
    corner = np.where(mel < _BREAK_MEL, mel * 200 / 3, _BREAK_HZ * np.exp((mel - _BREAK_MEL) * _LOG_STEP))  # Hz
    lower, peak, upper = corner[:-2, None], corner[1:-1, None], corner[2:, None]
    rising = (frequency_K - lower) / (peak - lower)
    falling = (upper - frequency_K) / (upper - peak)
    triangle = np.maximum(0, np.minimum(rising, falling))
    return torch.from_numpy((triangle * 2 / (upper - lower)).astype(np.float32))


class MelSpectrogram(nn.Module):
    """Log-mel spectrogram of `mode` ("16k" or "44k"), which each VAE and vocoder was trained on.

    Call with waveform (B, samples) at the rate of the mode, full scale 1 (clipped to it). Returns
    (B, bins, samples // hop) float32: log10 of the mel magnitude for "16k", its natural logarithm for
    "44k". Nothing is stored in the state dict.
    """

    filter_bank: Tensor
    window: Tensor

    def __init__(self, mode: str):
        super().__init__()
        self.mode = audio_mode(mode)
        self.log = torch.log10 if mode == "16k" else torch.log
        self.register_buffer("filter_bank", mel_filter_bank(mode), persistent=False)
        self.register_buffer("window", torch.hann_window(self.mode.mel_window), persistent=False)

    @torch.no_grad()
    @checked
    def forward(self, waveform: Tensor) -> Tensor:
        n_fft, hop = self.mode.mel_window, self.mode.mel_hop
        padding = (n_fft - hop) // 2
        if waveform.ndim != 2 or waveform.shape[1] <= padding:
            shape = tuple(waveform.shape)
            raise ValueError(f"waveform has shape {shape}: give (batch, samples) with more than {padding} samples")
        with torch.autocast(waveform.device.type, enabled=False):
            padded = F.pad(waveform.float().clamp(-1, 1), (padding, padding), mode="reflect")
            spectrum = torch.stft(padded, n_fft, hop, window=self.window, center=False, return_complex=True)
            magnitude = torch.view_as_real(spectrum).square().sum(-1).add(MAGNITUDE_EPS).sqrt()
            return self.log((self.filter_bank @ magnitude).clamp(min=MEL_FLOOR))


# --- The VAE ----------------------------------------------------------------------------------------------------------


def _normalize(x: Tensor) -> Tensor:
    """Pixel norm: x / (eps + rms of x over the channels)."""
    return x / (NORM_EPS + torch.linalg.vector_norm(x, dim=1, keepdim=True) / math.sqrt(x.shape[1]))


def _silu(x: Tensor) -> Tensor:
    """Magnitude-preserving SiLU, EDM2 equation 81."""
    return F.silu(x) / SILU_SCALE


def _sum(skip: Tensor, branch: Tensor) -> Tensor:
    """Magnitude-preserving sum, EDM2 equation 88: ((1 - t) skip + t branch) / sqrt((1 - t)^2 + t^2)."""
    return torch.lerp(skip, branch, BRANCH_WEIGHT) / math.hypot(1 - BRANCH_WEIGHT, BRANCH_WEIGHT)


def _bound(x: Tensor) -> Tensor:
    return x.clamp(-ACTIVATION_BOUND, ACTIVATION_BOUND)


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Conv1d:
    return nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, bias=False)


class ResidualBlock(nn.Module):
    """The skip path carries the normalised input, before the activation."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3)
        self.conv2 = _conv(outputs, outputs, 3)
        self.nin_shortcut = _conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = _normalize(x)
        branch = self.conv2(_silu(self.conv1(_silu(x))))
        return _sum(self.nin_shortcut(x), branch)


class AttentionBlock(nn.Module):
    """One head over time; q, k and v (channel 3c + i of `qkv`) are each normalised over their channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = _conv(channels, 3 * channels, 1)
        self.proj_out = _conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (-1, 3)).unbind(2)  # three of (B, channels, time)
        # (B, 1 head, time, channels), contiguous: fused attention needs a last stride of 1
        q, k, v = (_normalize(y).transpose(1, 2).contiguous().unsqueeze(1) for y in qkv)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return _sum(x, self.proj_out(attended))


def _middle(channels: int) -> nn.Sequential:
    """Two residual blocks with attention between them, at the lowest resolution."""
    blocks = {"block_1": ResidualBlock(channels, channels), "attn_1": AttentionBlock(channels)}
    return nn.Sequential(OrderedDict(blocks, block_2=ResidualBlock(channels, channels)))


def _downsample(channels: int) -> nn.Sequential:
    """Halves the length: the mean of each pair of frames, an odd last one dropped."""
    layers = {"conv1": _conv(channels, channels, 1), "pool": nn.AvgPool1d(2), "conv2": _conv(channels, channels, 1)}
    return nn.Sequential(OrderedDict(layers))


def _upsample(channels: int) -> nn.Sequential:
    """Doubles the length by repeating every frame."""
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2), conv=_conv(channels, channels, 3)))


class Level(nn.Module):
    """Residual blocks of one resolution, then a change of resolution in the levels that have one."""

    def __init__(self, inputs: int, outputs: int, blocks: int, downsample: bool = False, upsample: bool = False):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.downsample = _downsample(outputs) if downsample else nn.Identity()
        self.upsample = _upsample(outputs) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = _bound(block(x))
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """Mel (B, bins, 2N) -> mean and log variance (B, 2C, N)."""

    def __init__(self, bins: int, width: int, channels: int):
        super().__init__()
        self.conv_in = _conv(bins, width, 3)
        levels = [Level(width, width, 2, downsample=True), Level(width, 2 * width, 2), Level(2 * width, 4 * width, 2)]
        self.down = nn.ModuleList(levels)
        self.mid = _middle(4 * width)
        self.conv_out = _conv(4 * width, 2 * channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(_silu(_bound(self.mid(x))))


class Decoder(nn.Module):
    """Latent (B, C, N) -> mel (B, bins, 2N)."""

    def __init__(self, bins: int, width: int, channels: int):
        super().__init__()
        self.conv_in = _conv(channels, 4 * width, 3)
        self.mid = _middle(4 * width)
        levels = [
            Level(2 * width, width, 3),
            Level(4 * width, 2 * width, 3, upsample=True),
            Level(4 * width, 4 * width, 3),
        ]
        self.up = nn.ModuleList(levels)  # by resolution: the last one runs first
        self.conv_out = _conv(width, bins, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = _bound(self.mid(self.conv_in(x)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(_silu(x))


class MelVAE(nn.Module):
    """VAE of `mode` ("16k" or "44k"), frozen; its parameters have no storage before `load_released`.

    `width` overrides the hidden width, for tests. The state dict has the released names, without the two
    `learnable_gain`: weights are kept as they are used, normalised once when they are loaded.
    """

    data_mean: Tensor
    data_std: Tensor

    def __init__(self, mode: str, width: int | None = None):
        super().__init__()
        self.mode = audio_mode(mode)
        bins, width = self.mode.mel_bins, width or WIDTHS[mode]
        with torch.device("meta"):
            self.encoder = Encoder(bins, width, self.mode.latent_channels)
            self.decoder = Decoder(bins, width, self.mode.latent_channels)
            self.register_buffer("data_mean", torch.empty(1, bins, 1))
            self.register_buffer("data_std", torch.empty(1, bins, 1))
        self.requires_grad_(False).eval()

    def load_released(self, source: Source) -> "MelVAE":
        """Load a released VAE (`v1-16.pth`, `v1-44.pth`, or its state dict); ValueError where it does not fit."""
        state = load_state(source)
        gains = {f"{half}.learnable_gain": torch.empty((), device="meta") for half in ("encoder", "decoder")}
        check_state(state, self.state_dict() | gains, source)
        return load_strict(self, _fold(state), source)

    @torch.no_grad()
    @checked
    def encode(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent, each (B, N, C) float32, of mel (B, bins, 2N)."""
        if mel.ndim != 3 or mel.shape[1] != self.mode.mel_bins or mel.shape[2] < LATENT_STRIDE:
            raise ValueError(f"mel has shape {tuple(mel.shape)}: give (batch, {self.mode.mel_bins}, frames >= 2)")
        moments = self.encoder((mel - self.data_mean) / self.data_std).float().transpose(1, 2)
        mean, logvar = moments.chunk(2, dim=2)
        return mean.contiguous(), (logvar.clamp(-30, 20) / 2).exp()

    @torch.no_grad()
    @checked
    def decode(self, latent_BNC: Tensor) -> Tensor:
        """Mel (B, bins, 2N) float32 of latents (B, N, C) that are not normalised."""
        if latent_BNC.ndim != 3 or latent_BNC.shape[2] != self.mode.latent_channels:
            shape = tuple(latent_BNC.shape)
            raise ValueError(f"latent has shape {shape}: give (batch, length, {self.mode.latent_channels})")
        return self.decoder(latent_BNC.transpose(1, 2)).float() * self.data_std + self.data_mean


def _fold(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict with effective convolution weights, EDM2 equation 47: V / (eps + rms V) / sqrt(fan in).

    Those of the last layers are multiplied by 1 + gain. Folded once: inference need not normalise at every call.
    """
    folded = {}
    for name, value in state.items():
        if name.endswith(".weight"):
            fan_in = value[0].numel()
            length = torch.linalg.vector_norm(value.flatten(1), dim=1)[:, None, None]
            scale = 1 / (NORM_EPS * math.sqrt(fan_in) + length)
            if name.endswith("conv_out.weight"):
                scale = scale * (1 + state[name.replace("conv_out.weight", "learnable_gain")])
            value = value * scale
        if not name.endswith("learnable_gain"):
            folded[name] = value
    return folded


def flops(mode: str, mel_frames: int) -> tuple[int, int]:
    """Floating-point operations (a multiplication and an addition are two) to encode and to decode one mel."""
    vae, counts = MelVAE(mode), []
    mel = torch.empty(1, vae.mode.mel_bins, mel_frames, device="meta")
    latent_BNC = torch.empty(1, mel_frames // LATENT_STRIDE, vae.mode.latent_channels, device="meta")
    for call, x in ((vae.encode, mel), (vae.decode, latent_BNC)):
        with FlopCounterMode(display=False) as counter:
            call(x)
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]
