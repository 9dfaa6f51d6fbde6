"""Log-mel spectrograms, the input of the VAE and of the vocoder, as BigVGAN computes them (arXiv 2206.04658)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmaudio_hf.schema import audio_mode, checked

MAGNITUDE_EPS = 1e-9
MEL_FLOOR = 1e-5

# Slaney's mel scale: linear below 1 kHz (15 mels), then 27 mels per factor 6.4.
_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0
_LOG_STEP = np.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    return 3 * hz / 200 if hz < _BREAK_HZ else _BREAK_MEL + np.log(hz / _BREAK_HZ) / _LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < _BREAK_MEL, mel * 200 / 3, _BREAK_HZ * np.exp((mel - _BREAK_MEL) * _LOG_STEP))


def mel_filter_bank(mode: str) -> Tensor:
    """Slaney filter bank with area normalisation, (bins, n_fft // 2 + 1) float32.

    Own arithmetic in double: `torchaudio.functional.melscale_fbanks` works in float32, which moves
    single weights at 44.1 kHz by more than the 1e-6 the features are held to.
    """
    rate = audio_mode(mode)
    frequency_K = np.linspace(0, rate.sample_rate / 2, rate.mel_window // 2 + 1)
    corner = _mel_to_hz(np.linspace(0, _hz_to_mel(rate.mel_fmax), rate.mel_bins + 2))
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
            raise ValueError(
                f"waveform has shape {tuple(waveform.shape)}: give (batch, samples) with more than {padding} samples"
            )
        with torch.autocast(waveform.device.type, enabled=False):
            padded = F.pad(waveform.float().clamp(-1, 1), (padding, padding), mode="reflect")
            spectrum = torch.stft(padded, n_fft, hop, window=self.window, center=False, return_complex=True)
            magnitude = torch.view_as_real(spectrum).square().sum(-1).add(MAGNITUDE_EPS).sqrt()
            return self.log((self.filter_bank @ magnitude).clamp(min=MEL_FLOOR))
