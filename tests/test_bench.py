"""What the benchmarks compare is the same work."""

import torch

from mmaudio_hf.bench.extract import plain_read
from mmaudio_hf.media.video import read_video


def test_the_straightforward_reading_gives_the_same(example_media):
    video = sorted((example_media() / "videos").glob("*.mp4"))[0]
    clip_frames, sync_frames, sound = plain_read(video, "16k")
    clip = read_video(video, as_uint8=True, normalize_audio=False)
    assert torch.equal(clip_frames, clip.clip_frames)
    assert torch.equal(sync_frames, clip.sync_frames)
    torch.testing.assert_close(sound[: len(clip.audio)], clip.audio, atol=1e-5, rtol=0)
