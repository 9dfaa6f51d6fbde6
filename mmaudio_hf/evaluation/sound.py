"""Statistics of sound: how far a waveform is from the true one. No network is needed."""

import numpy as np
import torchaudio
from scipy.signal import stft

_SCORE_WINDOW, _SCORE_HOP, _SCORE_BANDS = 0.064, 0.016, 80  # s, s


def waveform_scores(predicted, reference, sample_rate: int) -> dict[str, float]:
    """How far a sound is from the true one, both (samples,); the longer is cut to the length of the shorter.

    "log_mel_distance": root mean square over time and 80 mel bands in dB, both clipped 80 dB below the louder one's
    maximum. "loudness_difference": RMS levels in dB. "centroid_difference" in octaves and "flatness_difference" in dB
    compare the mean power spectra. "envelope_correlation": Pearson's, of the levels in dB over time (0 if one is
    constant). Signed differences are predicted minus reference.
    """
    pair = [np.asarray(waveform, np.float64).reshape(-1) for waveform in (predicted, reference)]
    length, window = min(samples.size for samples in pair), round(_SCORE_WINDOW * sample_rate)
    if length < window:
        raise ValueError(f"{length} samples are too few to compare: at least {window} are needed")
    hop = round(_SCORE_HOP * sample_rate)
    spectra = [
        np.abs(stft(samples[:length], sample_rate, nperseg=window, noverlap=window - hop)[2]) ** 2 for samples in pair
    ]
    bank = mel_bank(window // 2 + 1, sample_rate, _SCORE_BANDS)
    mels = [bank @ power for power in spectra]
    floor = max(max(mel.max() for mel in mels) * 1e-8, 1e-20)
    levels = [10 * np.log10(np.maximum(mel, floor)) for mel in mels]
    envelopes = [10 * np.log10(np.maximum(mel.sum(0), floor)) for mel in mels]
    rms = [10 * np.log10(np.mean(samples[:length] ** 2) + 1e-12) for samples in pair]
    centroid, flatness = zip(*(_spectrum_shape(power.mean(1), sample_rate) for power in spectra), strict=True)
    steady = min(envelope.std() for envelope in envelopes) < 1e-9
    return {
        "log_mel_distance": float(np.sqrt(np.mean((levels[0] - levels[1]) ** 2))),
        "loudness_difference": float(rms[0] - rms[1]),
        "centroid_difference": float(np.log2(centroid[0] / centroid[1])),
        "flatness_difference": float(flatness[0] - flatness[1]),
        "envelope_correlation": 0.0 if steady else float(np.corrcoef(envelopes)[0, 1]),
    }


def _spectrum_shape(power: np.ndarray, sample_rate: int) -> tuple[float, float]:
    """Centroid in Hz and flatness (geometric over arithmetic mean) in dB of a power spectrum; DC is left out."""
    power = power[1:] + 1e-20
    frequencies = np.arange(1, power.size + 1) * sample_rate / (2 * power.size)
    flatness = 10 * (np.log10(power).mean() - np.log10(power.mean()))
    return float(frequencies @ power / power.sum()), float(flatness)


def mel_bank(bins: int, sample_rate: int, bands: int) -> np.ndarray:
    """Triangular mel filters (bands, bins) from 50 Hz to at most 8 kHz."""
    bank = torchaudio.functional.melscale_fbanks(bins, 50.0, min(8000.0, sample_rate / 2), bands, sample_rate)
    return bank.T.double().numpy()
