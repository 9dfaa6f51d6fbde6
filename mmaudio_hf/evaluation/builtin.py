"""Scores that need no networks: each generated sound against the true one, and their means over a split."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mmaudio_hf.evaluation.caches import Score
from mmaudio_hf.evaluation.onsets import onset_f1, onset_times
from mmaudio_hf.evaluation.sound import waveform_scores

# Name -> unit and which values are better.
BUILT_IN = {
    "log_mel_distance": ("dB", "lower"),
    "loudness_difference": ("dB", "zero"),
    "centroid_difference": ("octaves", "zero"),
    "flatness_difference": ("dB", "zero"),
    "envelope_correlation": ("correlation", "higher"),
    "onset_precision": ("share", "higher"),
    "onset_recall": ("share", "higher"),
    "onset_f1": ("share", "higher"),
}
NO_ONSETS = "neither sound has an onset"


def clip_scores(predicted, reference, sample_rate: int) -> dict[str, float]:
    """`waveform_scores` of one sound, and how its onsets agree with those of the true one within 0.1 s.

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
        values = [found[name] for found in clips.values() if name in found]
        silent = [item_id for item_id, found in clips.items() if name not in found]
        reasons = {reason: list(ids) for reason, ids in dropped.items() if ids} | (
            {NO_ONSETS: silent} if silent else {}
        )
        mean = float(np.mean(values)) if values else math.nan
        scores[name] = Score(mean, unit, better, len(values), reasons)
    return scores
