"""New audio for a video: what is copied, what is encoded, how long the result is."""

import errno
import math
import resource
import signal
from fractions import Fraction

import av
import numpy as np
import odd_media
import pytest
import torch
from odd_media import Odd, cut_without_encoding, read_codes, steady, write_odd

from mmaudio_hf.media.container import MediaError, probe
from mmaudio_hf.media.mux import write_video_with_audio
from mmaudio_hf.media.video import read_video

LATE = Fraction(3, 10)


def packets_of(path):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(container.streams.best("video")) if packet.size]


SOUND = torch.from_numpy(odd_media.burst_track(5.0, 16_000)[0])


@pytest.mark.parametrize("case", ["plain", "late", "cut", "mkv", "rotated", "silent"])
def test_new_audio_with_copied_frames(case, tmp_path):
    long = {"options": (("g", "100"),), "audio_seconds": 5}
    odd = {
        "late": Odd(steady(4, start=LATE)),
        "rotated": Odd(steady(4), rotation=90),
        "silent": Odd(steady(4), audio_seconds=None),
    }.get(case, Odd(steady(4), **long))
    source = write_odd(tmp_path / ("a.mkv" if case == "mkv" else "a.mp4"), odd)
    if case == "cut":
        source = cut_without_encoding(source, tmp_path / "cut.mp4", 1.3)
    before = read_video(source, duration=2.0, video_only=True)
    write_video_with_audio(source, SOUND, 16_000, tmp_path / "out.mp4")
    assert packets_of(tmp_path / "out.mp4") == packets_of(source), "copied, not encoded again"
    after = read_video(tmp_path / "out.mp4", duration=2.0)
    assert torch.equal(after.sync_frames[2:-2], before.sync_frames[2:-2]) or case == "late"
    assert after.sync_frames.shape == before.sync_frames.shape
    assert np.abs(np.array(odd_media.burst_times(after.audio, 16_000)) - [0, 0.5, 1, 1.5, 2]).max() < 0.002
    stated = probe(tmp_path / "out.mp4")
    expected = 4 - (1.32 if case == "cut" else 0)
    assert stated["video"]["duration"] == pytest.approx(expected, abs=0.05)
    assert stated["audio"]["duration"] == pytest.approx(stated["video"]["duration"], abs=0.03)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_short_audio_cuts_the_frames(tmp_path):
    source = write_odd(tmp_path / "a.mp4", Odd(steady(4)))
    write_video_with_audio(source, torch.stack([SOUND, SOUND])[:, :32_000], 16_000, tmp_path / "out.mp4")
    stated = probe(tmp_path / "out.mp4")
    assert stated["audio"]["channels"] == 2 and stated["audio"]["duration"] == pytest.approx(2.0, abs=0.001)
    assert 2.0 <= stated["video"]["duration"] <= 2.2


@pytest.mark.parametrize("ending", ["mkv", "mov"])
def test_rotated_frames_are_copied_into_mkv_too(ending, tmp_path):
    source = write_odd(tmp_path / f"a.{ending}", Odd(steady(2), rotation=90))
    before = read_video(source, duration=1.5, video_only=True)
    for out in ("out.mkv", "out.mp4"):
        assert write_video_with_audio(source, SOUND, 16_000, tmp_path / out)
        assert packets_of(tmp_path / out) == packets_of(source)
        after = read_video(tmp_path / out, duration=1.5)
        assert torch.equal(after.sync_frames[2:-2], before.sync_frames[2:-2])


def test_frames_that_mp4_cannot_hold_are_encoded(tmp_path):
    odd = Odd(steady(4), codec="libvpx", size=(97, 97), audio_seconds=None)
    source = write_odd(tmp_path / "a.webm", odd)
    assert write_video_with_audio(source, SOUND, 16_000, tmp_path / "out.mkv")
    assert packets_of(tmp_path / "out.mkv") == packets_of(source)
    with pytest.raises(ValueError, match=r"written as \.mp4 or \.mkv"):
        write_video_with_audio(source, SOUND, 16_000, tmp_path / "out.avi")
    assert not write_video_with_audio(source, SOUND, 16_000, tmp_path / "out.mp4")
    stated = probe(tmp_path / "out.mp4")
    assert stated["video"]["codec"] == "h264" and stated["video"]["width"] == stated["video"]["height"] == 96
    assert read_codes((read_video(tmp_path / "out.mp4", duration=2.0).sync_frames + 1) / 2) == list(range(50))


def test_new_audio_begins_at_a_start_within_the_video(tmp_path):
    """Also between two frames, far from a frame that stands alone, and smaller."""
    source = write_odd(tmp_path / "a.mp4", Odd(steady(4), options=(("g", "100"),), audio_seconds=5))
    for start, first in ((1.2, 30), (1.21, 30)):
        assert not write_video_with_audio(source, SOUND[:32_000], 16_000, tmp_path / "out.mp4", start=start)
        frames = (read_video(tmp_path / "out.mp4", duration=1.6).sync_frames + 1) / 2
        assert read_codes(frames)[:20] == list(range(first, first + 20))
        assert probe(tmp_path / "out.mp4")["video"]["duration"] == pytest.approx(2.0, abs=0.05)
    assert not write_video_with_audio(source, SOUND, 16_000, tmp_path / "out.mp4", max_height=48)
    stated = probe(tmp_path / "out.mp4")
    assert stated["video"]["height"] == 48 and stated["video"]["duration"] == pytest.approx(4.0, abs=0.05)
    with pytest.raises(MediaError, match="ends before 4 s"):
        write_video_with_audio(source, SOUND, 16_000, tmp_path / "out.mp4", start=4.0)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    source, out = write_odd(tmp_path / "a.mp4", Odd(steady(1))), tmp_path / "out.mp4"
    out.write_text("old")
    for wave in (torch.full((16_000,), math.nan), torch.zeros(3, 16_000), torch.zeros(0)):
        with pytest.raises(ValueError, match="waveform"):
            write_video_with_audio(source, wave, 16_000, out)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(MediaError):
        write_video_with_audio(tmp_path / "text.mp4", SOUND, 16_000, out)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "out.mp4", "text.mp4"]


def test_a_full_disk_is_no_fault_of_the_video(tmp_path):
    """A limit on the size of files acts as the disk; then a folder that is not there."""
    source, out = write_odd(tmp_path / "a.mp4", Odd(steady(2))), tmp_path / "out"
    out.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[0][1]))
        problems = []
        for name in ("a.mp4", "a.mkv"):
            with pytest.raises(OSError) as problem:
                write_video_with_audio(source, SOUND, 16_000, out / name)
            problems.append(problem.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert [(p.errno, p.filename) for p in problems] == [(errno.EFBIG, str(out / n)) for n in ("a.mp4", "a.mkv")]
    assert list(out.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"gone/a\.mp4"):
        write_video_with_audio(source, SOUND, 16_000, tmp_path / "gone" / "a.mp4")
