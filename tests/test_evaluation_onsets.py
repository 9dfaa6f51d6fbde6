"""Onsets against the example's events and mir_eval, and statistics of a waveform."""

import mir_eval
import numpy as np
import pytest
import torch

from mmaudio_hf.config import EncoderConfig
from mmaudio_hf.evaluation import onset_f1, onset_scores, onset_times, shuffled_pairing, waveform_scores
from mmaudio_hf.features.encoders import load_encoders
from mmaudio_hf.media.audio import read_waveform, resample
from mmaudio_hf.media.example import read_events


@pytest.fixture(scope="module")
def tracks(fitted_media):
    """(16 kHz audio, the same through the toy codec, event times) of every video of the small example."""
    codec = load_encoders(EncoderConfig("toy", str(fitted_media)), "16k", ("latent", "decode"))
    events, clips = read_events(fitted_media / "events.json"), []
    for file in sorted((fitted_media / "videos").glob("*.mp4")):
        waveform, rate = read_waveform(file)
        waveform = resample(waveform, rate, 16000)[:128000]
        decoded = codec.decode_latent(codec.encode_audio(waveform[None])[0])[0]
        clips.append((waveform, decoded, events[file.stem].times))
    return clips


@pytest.mark.parametrize("track", [0, 1], ids=["audio", "through the codec"])
def test_onsets_of_the_example(tracks, track):
    detected = [onset_times(clip[track], 16000) for clip in tracks]
    scores = onset_scores(detected, [clip[2] for clip in tracks], duration=8.0)
    assert scores["f1"] >= 0.97 and scores["clips"] == 12
    assert scores["f1_shuffled"] < 0.45  # about one event a second, and 0.2 s around each counts
    late = [d.min() - clip[2][0] for d, clip in zip(detected, tracks, strict=True)]
    assert np.abs(np.median(late)) < 0.01  # no constant delay


def test_onsets_bear_loudness_and_noise(tracks):
    waveform, _, times = tracks[0]
    plain = onset_times(waveform, 16000)
    assert np.allclose(onset_times(0.01 * waveform, 16000), plain)
    noisy = waveform + 0.02 * waveform.abs().max() * torch.randn(waveform.shape, generator=torch.manual_seed(0))
    assert onset_f1(onset_times(noisy, 16000), [t for t in times if t < 8], 0.03)[2] > 0.9
    assert np.allclose(onset_times(resample(waveform, 16000, 44100), 44100), plain, atol=0.02)


def test_what_has_no_onsets():
    generator = np.random.default_rng(0)
    for silent in (np.zeros(16000), 1e-5 * generator.standard_normal(16000), np.zeros(100), np.zeros(0)):
        assert onset_times(silent, 16000).size == 0
    tone = np.sin(np.arange(32000) * 0.3)
    assert onset_times(tone, 16000).size == 0
    assert onset_times(0.1 * generator.standard_normal(64000), 16000).size <= 1
    tone[:20000] *= 0.01
    assert np.allclose(onset_times(tone, 16000), [1.25], atol=0.02)
    with pytest.raises(ValueError, match=r"\(samples,\)"):
        onset_times(np.zeros((2, 16000)), 16000)


def test_onset_f1_equals_mir_eval():
    generator = np.random.default_rng(0)
    for _ in range(300):
        predicted, reference = (np.sort(generator.uniform(0, 3, generator.integers(0, 25))) for _ in range(2))
        f1, precision, recall = mir_eval.onset.f_measure(reference, predicted, window=0.1)
        assert np.allclose(onset_f1(predicted, reference, 0.1), (precision, recall, f1)), (predicted, reference)
    assert onset_f1([0.0, 0.09], [0.1, 0.18]) == (1, 1, 1)  # the nearest pair first would lose one
    assert onset_f1([1.0, 1.0], [1.0]) == (0.5, 1, 2 / 3)  # one to one
    assert onset_f1([], [1.0]) == onset_f1([], []) == (0, 0, 0)


def test_shuffled_pairing():
    for n in (2, 3, 12, 100):
        order = shuffled_pairing(n, seed=n)
        assert sorted(order) == list(range(n)) and not (order == np.arange(n)).any()
    assert not np.array_equal(shuffled_pairing(12, 0), shuffled_pairing(12, 1))
    assert np.array_equal(shuffled_pairing(12, 0), shuffled_pairing(12, 0))
    events = [(1.0,), (1.0,), (2.0,), (2.0,)]
    for seed in range(20):
        assert all(events[i] != events[j] for i, j in enumerate(shuffled_pairing(4, seed, events)))
    for n, same in ((0, None), (1, None), (3, [(1.0,)] * 3)):
        with pytest.raises(ValueError, match="cannot be paired"):
            shuffled_pairing(n, 0, same)


def test_onset_scores():
    events = [(0.5, 1.5, 9.0), (0.8, 1.2)]
    scores = onset_scores([np.array([0.5, 1.5]), np.array([0.8])], events, duration=2.0)
    assert scores["precision"] == 1 and scores["recall"] == 0.75 and scores["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["f1_shuffled"] == 0
    assert np.isnan(onset_scores([np.array([0.5])], events[:1], duration=2.0)["f1_shuffled"])


def test_waveform_scores():
    generator = np.random.default_rng(0)
    time = np.arange(32000) / 16000
    noise = generator.standard_normal(32000)
    tone = np.sin(2 * np.pi * 500 * time)
    assert waveform_scores(noise, noise, 16000) == pytest.approx(
        {"log_mel_distance": 0, "loudness_difference": 0, "centroid_difference": 0, "flatness_difference": 0}
        | {"envelope_correlation": 1}
    )
    quieter = waveform_scores(0.1 * noise, noise, 16000)
    assert quieter["loudness_difference"] == pytest.approx(-20) == -quieter["log_mel_distance"]
    octave = waveform_scores(np.sin(2 * np.pi * 1000 * time)[:20000], tone, 16000)
    assert octave["centroid_difference"] == pytest.approx(1, abs=0.02)
    other = waveform_scores(noise, tone, 16000)
    assert other["flatness_difference"] > 20 and other["log_mel_distance"] > 20
    gate = 0.01 + (np.sin(2 * np.pi * time) > 0)
    assert waveform_scores(noise * gate, noise * (1.01 - gate), 16000)["envelope_correlation"] < -0.8
    assert np.isfinite(list(waveform_scores(np.zeros(32000), np.zeros(32000), 16000).values())).all()
    with pytest.raises(ValueError, match="too few"):
        waveform_scores(noise[:100], noise, 16000)
