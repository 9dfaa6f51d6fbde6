"""What the benchmarks compare is the same work."""

import torch

from mmaudio_hf.bench import extract
from mmaudio_hf.bench.extract import plain_read
from mmaudio_hf.media.video import read_video


def test_the_straightforward_reading_gives_the_same(example_media):
    video = sorted((example_media() / "videos").glob("*.mp4"))[0]
    clip_frames, sync_frames, sound = plain_read(video, "16k")
    clip = read_video(video, as_uint8=True, normalize_audio=False)
    assert torch.equal(clip_frames, clip.clip_frames)
    assert torch.equal(sync_frames, clip.sync_frames)
    torch.testing.assert_close(sound[: len(clip.audio)], clip.audio, atol=1e-5, rtol=0)


def test_emulated_bf16_is_measured_at_a_small_size_that_is_told(monkeypatch):
    monkeypatch.setattr(extract.synchformer, "DEPTH", 2)  # of fp32, to be quick
    monkeypatch.setattr(extract, "emulates_bf16", lambda _: True)
    figures = extract._encoder_rates("16k", rounds=1)
    assert figures["fp32_size"] == "2 Synchformer blocks, 500 mel frames"
    assert figures["bf16_size"] == "1 Synchformer blocks, 64 mel frames"
    rates = [value for name, value in figures.items() if name.endswith(("gflop_s", "of_matmul"))]
    assert len(rates) == 8 and all(value > 0 for value in rates)
