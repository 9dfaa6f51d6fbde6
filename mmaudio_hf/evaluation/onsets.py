"""Scores that need no networks: onsets, and statistics of a waveform, against the ground truth."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torchaudio
from numpy.typing import ArrayLike
from scipy.ndimage import maximum_filter1d, uniform_filter1d
from scipy.signal import stft
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from mmaudio_hf.evaluation.metrics import Score
from mmaudio_hf.schema import checked

_ONSET_HOP = 0.01  # s
_ONSET_WINDOW = 0.04  # s
_ONSET_BANDS = 40
_ONSET_RANGE = 45.0  # dB below the loudest band; quieter ones count as silence
_ONSET_RISE = 3  # hops over which a rise is measured
_ONSET_CONTEXT = 0.25  # s on each side, for the mean that a rise must exceed
_ONSET_APART = 0.15  # s between two onsets
_ONSET_STRENGTH = 0.4  # of the strongest rises of the clip
_ONSET_LEAST = 3.0  # dB averaged over the bands; the least that counts as a rise at all
_SILENCE_DBFS = -70.0


@checked
def onset_times(waveform: ArrayLike, sample_rate: int) -> np.ndarray:
    """Times in seconds, ascending, at which events begin in `waveform` (samples,).

    Spectral flux on mel bands in decibels (Bello et al. 2005): rises over 30 ms are added over the bands, and a
    local maximum counts that exceeds the mean around it and 0.4 of the strongest rises in the clip. Levels are
    relative to the clip's own, so loudness does not matter; a clip below -70 dBFS has no onsets.
    """
    flux, hop = _spectral_flux(np.asarray(waveform, np.float64), sample_rate)
    if not flux.size:
        return np.zeros(0)
    # The mean of the strongest few, not the strongest: one loud click must not hide the events.
    strongest = np.sort(flux)[-max(3, flux.size // 100) :].mean()
    context = uniform_filter1d(flux, 2 * round(_ONSET_CONTEXT / hop) + 1, mode="nearest")
    threshold = np.maximum(context + _ONSET_STRENGTH * strongest / 2, max(_ONSET_STRENGTH * strongest, _ONSET_LEAST))
    peak = flux == maximum_filter1d(flux, 2 * round(_ONSET_APART / hop) + 1, mode="constant")
    # A rise is strongest in the hop whose windows reach half their length into the event.
    return np.flatnonzero(peak & (flux > threshold)) * hop + _ONSET_WINDOW / 2


def _spectral_flux(samples: np.ndarray, sample_rate: int) -> tuple[np.ndarray, float]:
    """Mean rise over the bands in dB per hop, and the hop in seconds; entry i is for events that begin at i hops."""
    hop, window = round(_ONSET_HOP * sample_rate), round(_ONSET_WINDOW * sample_rate)
    if samples.ndim != 1:
        raise ValueError(f"a waveform must be (samples,), not {samples.shape}")
    if samples.size < window or np.abs(samples).max() < 10 ** (_SILENCE_DBFS / 20):
        return np.zeros(0), hop / sample_rate
    spectrum = stft(samples, sample_rate, nperseg=window, noverlap=window - hop, boundary="even", padded=False)[2]
    power = mel_bank(window // 2 + 1, sample_rate, _ONSET_BANDS) @ np.abs(spectrum) ** 2
    level = 10 * np.log10(power / power.max() + 1e-12).clip(min=-_ONSET_RANGE)
    # Entry i compares the level just after i hops with that just before.
    padded = np.pad(level, ((0, 0), (_ONSET_RISE // 2, _ONSET_RISE - _ONSET_RISE // 2)), mode="edge")
    rise = padded[:, _ONSET_RISE:] - padded[:, :-_ONSET_RISE]
    complete = (samples.size - window // 2) // hop - 1  # the rest compares windows that the end cuts off
    return np.maximum(rise, 0).mean(0)[:complete], hop / sample_rate


@checked
def onset_f1(predicted: ArrayLike, reference: ArrayLike, tolerance: float = 0.1) -> tuple[float, float, float]:
    """Precision, recall and F1 of onset times in seconds, at most `tolerance` apart and matched one to one.

    The matching is the largest possible one, as in the MIREX onset task; all three are 0 when either side is empty.
    """
    predicted, reference = np.sort(np.asarray(predicted, float)), np.sort(np.asarray(reference, float))
    if not predicted.size or not reference.size:
        return 0.0, 0.0, 0.0
    near = (predicted >= reference[:, None] - tolerance) & (predicted <= reference[:, None] + tolerance)
    matched = int((maximum_bipartite_matching(csr_array(near)) >= 0).sum())
    precision, recall = matched / predicted.size, matched / reference.size
    return precision, recall, 2 * matched / (predicted.size + reference.size)


@checked
def onset_scores(
    detected: Sequence[np.ndarray],
    events: Sequence[Sequence[float]],
    *,
    duration: float,
    tolerance: float = 0.1,
    seed: int = 0,
) -> dict[str, float]:
    """Means over clips of the agreement between detected onsets and the clips' event times, both in seconds.

    Events at or after `duration` do not count. "f1_shuffled" is the control: the same clips against the events of
    others, averaged over ten pairings; NaN where no pairing exists. "clips" is how many were scored.
    """
    inside = [[time for time in times if time < duration] for times in events]
    right = [onset_f1(d, e, tolerance) for d, e in zip(detected, inside, strict=True)]
    try:
        orders = [shuffled_pairing(len(inside), seed + k, inside) for k in range(10)]
        scores = [onset_f1(detected[i], inside[j], tolerance)[2] for order in orders for i, j in enumerate(order)]
        shuffled = float(np.mean(scores))
    except ValueError:
        shuffled = math.nan
    precision, recall, f1 = np.mean(right, axis=0) if right else (math.nan,) * 3
    means = {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    return {**means, "f1_shuffled": shuffled, "clips": len(right)}


@checked
def shuffled_pairing(n: int, seed: int = 0, events: Sequence[Sequence[float]] | None = None) -> np.ndarray:
    """A permutation (n,) without fixed points: partners for a control without the right pairs.

    With `events`, the event times of each clip, partners also differ in them. ValueError when there is no such pairing
    (n < 2, or most clips have the same events).
    """
    keys = list(range(n)) if events is None else [tuple(times) for times in events]
    if n != len(keys):
        raise ValueError(f"{len(keys)} lists of events were given for {n} clips")
    generator = np.random.default_rng(seed)
    for _ in range(1000):  # one draw in e succeeds
        order = generator.permutation(n)
        if n and all(i != j and keys[i] != keys[j] for i, j in enumerate(order)):
            return order
    raise ValueError(f"{n} clips cannot be paired with others that differ: two with different events are needed")


# --- Statistics of a waveform against the ground truth ----------------------------------------------------------------


_SCORE_WINDOW, _SCORE_HOP, _SCORE_BANDS = 0.064, 0.016, 80  # s, s


@checked
def waveform_scores(predicted: ArrayLike, reference: ArrayLike, sample_rate: int) -> dict[str, float]:
    """How far a waveform is from the true one, both (samples,); the longer is cut to the length of the shorter.

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


# --- Both, of the clips of a split ------------------------------------------------------------------------------------


# Name -> unit and which values are better.
BUILT_IN = {
    "log_mel_distance": ("dB", "lower"),
    "loudness_difference": ("dB", "zero"),
    "centroid_difference": ("octaves", "zero"),
    "flatness_difference": ("dB", "zero"),
    "envelope_correlation": ("correlation", "higher"),
    **dict.fromkeys(("onset_precision", "onset_recall", "onset_f1"), ("share", "higher")),
}
NO_ONSETS = "neither side has an onset"


def clip_scores(predicted: ArrayLike, reference: ArrayLike, sample_rate: int) -> dict[str, float]:
    """`waveform_scores` of one clip, and how its onsets agree with those of the true one within 0.1 s.

    Both are (samples,). Where neither has an onset, the last three are left out.
    """
    scores = waveform_scores(predicted, reference, sample_rate)
    detected, true = onset_times(predicted, sample_rate), onset_times(reference, sample_rate)
    if len(detected) or len(true):
        names = ("onset_precision", "onset_recall", "onset_f1")
        scores |= dict(zip(names, onset_f1(detected, true), strict=True))
    return scores


def mean_scores(clips: Mapping[str, Mapping[str, float]], dropped: Mapping[str, Sequence[str]]) -> dict[str, Score]:
    """Means of `clip_scores` by id; `dropped`, reason -> ids, has what was not scored at all."""
    scores = {}
    for name, (unit, better) in BUILT_IN.items():
        items = {item_id: float(clip[name]) for item_id, clip in clips.items() if name in clip}
        values = list(items.values())
        silent = [item_id for item_id, clip in clips.items() if name not in clip]
        reasons = {reason: ids for reason, ids in {**dropped, NO_ONSETS: silent}.items() if ids}
        mean = float(np.mean(values)) if values else math.nan
        scores[name] = Score(mean, unit, better, len(values), reasons, items=items)
    return scores
