"""Event timing: when sounds begin, and how well that agrees with when they should."""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import maximum_filter1d, uniform_filter1d
from scipy.signal import stft
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from mmaudio_hf.evaluation.sound import mel_bank

_ONSET_HOP = 0.01  # s
_ONSET_WINDOW = 0.04  # s
_ONSET_BANDS = 40
_ONSET_RANGE = 45.0  # dB below the loudest band value; what is quieter counts as silence
_ONSET_RISE = 3  # hops over which a rise is measured
_ONSET_CONTEXT = 0.25  # s on each side, for the mean that a rise must exceed
_ONSET_APART = 0.15  # s between two onsets
_ONSET_STRENGTH = 0.4  # of the strongest rises of the clip
_ONSET_LEAST = 3.0  # dB averaged over the bands; the least that counts as a rise at all
_SILENCE_DBFS = -70.0


def onset_times(waveform, sample_rate: int) -> np.ndarray:
    """Times in seconds, ascending, at which sounds begin in `waveform` (samples,).

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
    # A rise is strongest in the hop whose windows reach half their length into the sound.
    return np.flatnonzero(peak & (flux > threshold)) * hop + _ONSET_WINDOW / 2


def _spectral_flux(samples: np.ndarray, sample_rate: int) -> tuple[np.ndarray, float]:
    """Mean rise over the bands in dB, per hop, and the hop in seconds. Entry i is about sounds that begin at i hops."""
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
    whole = (samples.size - window // 2) // hop - 1  # the rest compares windows that are cut off by the end
    return np.maximum(rise, 0).mean(0)[:whole], hop / sample_rate


def onset_f1(predicted, reference, tolerance: float = 0.1) -> tuple[float, float, float]:
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


def onset_scores(
    detected: Sequence[np.ndarray], events: Sequence[Sequence[float]], *, duration: float, tolerance=0.1, seed: int = 0
) -> dict[str, float]:
    """Means over clips of the agreement between detected onsets and the clips' event times, both in seconds.

    Events from `duration` on do not count. "f1_shuffled" is the control: the same sounds against the events of other
    clips, averaged over ten pairings; NaN where no pairing exists. "clips" is how many were scored.
    """
    inside = [[time for time in times if time < duration] for times in events]
    right = [onset_f1(d, e, tolerance) for d, e in zip(detected, inside, strict=True)]
    try:
        orders = [shuffled_pairing(len(inside), seed + k, inside) for k in range(10)]
        shuffled = float(
            np.mean([onset_f1(detected[i], inside[j], tolerance)[2] for o in orders for i, j in enumerate(o)])
        )
    except ValueError:
        shuffled = float("nan")
    precision, recall, f1 = np.mean(right, axis=0) if right else (float("nan"),) * 3
    means = {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    return {**means, "f1_shuffled": shuffled, "clips": len(right)}


def shuffled_pairing(n: int, seed: int = 0, events: Sequence[Sequence[float]] | None = None) -> np.ndarray:
    """A permutation (n,) that leaves no index in its place: partners for a control without the right pairs.

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
    raise ValueError(
        f"{n} clips cannot be paired with others that differ: at least two with different events are needed"
    )
