"""Scores of generated sound: event timing, statistics of sound, and the published metrics on cached features.

What is named here takes plain arrays or files. `run` evaluates a network: it makes the sounds of a split, has their
features extracted by av-benchmark, and writes the scores.
"""

from mmaudio_hf.evaluation.caches import Score, evaluate_caches, score_caches
from mmaudio_hf.evaluation.metrics import (
    clean_id,
    desync_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    kl_divergence,
    mean_cosine,
)
from mmaudio_hf.evaluation.onsets import onset_f1, onset_scores, onset_times, shuffled_pairing, waveform_scores

__all__ = [
    "Score",
    "clean_id",
    "desync_score",
    "evaluate_caches",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "kl_divergence",
    "mean_cosine",
    "onset_f1",
    "onset_scores",
    "onset_times",
    "score_caches",
    "shuffled_pairing",
    "waveform_scores",
]
