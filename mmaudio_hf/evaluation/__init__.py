"""Scores of generated audio: onsets, statistics of the waveform, and the published metrics on cached features.

What is named here takes arrays or files. `run` evaluates a network: it generates the audio of a split, has its features
extracted by av-benchmark, and writes the scores.
"""

from mmaudio_hf.evaluation.metrics import (
    Score,
    clean_id,
    desync_score,
    evaluate_caches,
    frechet_distance,
    inception_score,
    kernel_audio_distance,
    kernel_distance,
    kl_divergence,
    mean_cosine,
    score_caches,
)
from mmaudio_hf.evaluation.onsets import onset_f1, onset_scores, onset_times, shuffled_pairing, waveform_scores

__all__ = ["Score", "clean_id", "desync_score", "evaluate_caches", "frechet_distance", "inception_score"]
__all__ += ["kernel_audio_distance", "kernel_distance", "kl_divergence", "mean_cosine", "onset_f1", "onset_scores"]
__all__ += ["onset_times", "score_caches", "shuffled_pairing", "waveform_scores"]
