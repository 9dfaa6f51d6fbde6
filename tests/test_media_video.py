"""Reading videos: which source frame and which moment of audio arrives where, in both alignments.

The expectations come from `shown`, the frame-rate rule written down once more in rational arithmetic, and from the
times at which the test files were written.
"""

import math
import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import odd_media
import pytest
import torch
from odd_media import (
    Odd,
    burst_times,
    cut_without_encoding,
    joined_audio,
    overwrite_packet,
    read_codes,
    retime_audio,
    steady,
    truncate,
    write_odd,
)
from PIL import Image

from mmaudio_hf.media import video
from mmaudio_hf.media.audio import mono_samples, resample
from mmaudio_hf.media.container import MediaError, probe
from mmaudio_hf.media.video import RgbConverter, apply_display_matrix, normalize_frames, read_video

SECONDS = 1.024  # of most clips here; the rules do not depend on it
CLIP, SYNC = 8, 25  # frames of such a clip
LATE = Fraction(3, 10)


def shown(times, fps, count, *, origin=None, start=0):
    """Source frame at each of `count` positions: the last one whose rounded tick is not later.

    origin None: position 0 is the tick of the first frame; else it is the moment `origin`.
    """

    def nearest(time):
        return math.floor(Fraction(time) * fps + Fraction(1, 2))

    first = nearest(times[0]) if origin is None else 0
    ticks = [nearest(time - (origin or 0) - Fraction(start)) for time in times]
    return [max(n for n, tick in enumerate(ticks) if tick <= first + k) for k in range(count)]


def numbers(clip):
    """Source frame numbers at 8 and at 25 fps; only for square sources."""
    return read_codes(clip.clip_frames), read_codes((clip.sync_frames + 1) / 2)


def read(path, **options):
    return read_video(path, **{"duration": SECONDS, **options})


def reason_of(path, **options):
    with pytest.raises(MediaError) as caught:
        read(path, **options)
    assert str(path) in str(caught.value), "the message names the file"
    return caught.value.reason


def check_bursts(audio, first, rate=16_000):
    """Bursts every 0.5 s from `first` on, as long as the audio lasts, within 2 ms (AAC smears an onset)."""
    expected = np.arange(first, len(audio) / rate - 0.01, 0.5)
    times = burst_times(audio, rate)
    assert len(times) == len(expected) and np.abs(np.array(times) - expected).max() < 0.002, (times, expected)


TOGETHER = {
    "plain": Odd(steady(1.5)),
    "vfr": Odd(tuple(Fraction(n, 100) for n in (0, 2, 10, 11, 19, 64, 66, 69, *range(70, 160, 7)))),
    "ntsc": Odd(steady(1.5, Fraction(30000, 1001)), frame_rate=Fraction(30000, 1001)),
    "upsample": Odd(steady(1.5, 12), frame_rate=Fraction(12)),
    "60 fps": Odd(steady(1.5, 60), frame_rate=Fraction(60)),
    "4:4:4": Odd(steady(1.5), pix_fmt="yuv444p"),
    "tagged": Odd(steady(1.5), colorspace=1),
    "5.1": Odd(steady(1.5), layout="5.1", rate=48_000),
    "mono 32k": Odd(steady(1.5), layout="mono", rate=32_000),
    "b-frames off": Odd(steady(1.5), options=(("bf", "0"),)),
    "mpeg4": Odd(steady(1.5), codec="mpeg4"),
    "sub-tick gap": Odd(steady(1.5, start=Fraction(1, 100))),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_tracks_that_start_together_are_the_same_in_both_alignments(name, tmp_path):
    odd = TOGETHER[name]
    path = write_odd(tmp_path / "a.mp4", odd)
    ours, reference = read(path), read(path, alignment="reference")
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))
    clip, sync = numbers(ours)
    assert clip == shown(odd.frame_times, 8, CLIP)
    assert sync == shown(odd.frame_times, 25, SYNC)
    assert ours.audio.shape == (16_384,)
    check_bursts(ours.audio, 0.0)


@pytest.mark.parametrize("container", ["mkv", "mov", "ts"])
def test_other_containers(container, tmp_path):
    odd = Odd(steady(1.5))
    ours = read(write_odd(tmp_path / f"a.{container}", odd))
    start = Fraction(7200, 90_000) if container == "ts" else 0  # mpeg-ts leaves room for decoding times
    assert numbers(ours)[1] == shown([start + t for t in odd.frame_times], 25, SYNC)
    check_bursts(ours.audio, 0.0)


def test_late_audio(tmp_path):
    """mp4 gives the 1024 priming samples of late AAC as audio, so the track begins 1024 samples early."""
    path = write_odd(tmp_path / "a.mp4", Odd(steady(2), audio_start=float(LATE), audio_seconds=1.7))
    origin = LATE - Fraction(1024, 44_100)
    ours = read(path)
    clip, sync = numbers(ours)
    assert clip == shown(steady(2), 8, CLIP, origin=origin)
    assert sync == shown(steady(2), 25, SYNC, origin=origin)
    check_bursts(ours.audio, 0.5 - float(origin))
    reference = read(path, alignment="reference")  # each track from its own start: the frames are too early
    assert numbers(reference) == (shown(steady(2), 8, CLIP), shown(steady(2), 25, SYNC))
    assert torch.equal(reference.audio, ours.audio)


def test_late_frames(tmp_path):
    times = steady(1.5, start=LATE)
    path = write_odd(tmp_path / "a.mp4", Odd(times, audio_seconds=1.8))
    ours, reference = read(path), read(path, alignment="reference")
    assert numbers(ours) == (shown(times, 8, CLIP, origin=LATE), shown(times, 25, SYNC, origin=LATE))
    check_bursts(ours.audio, 0.2)  # the burst at 0.5 s, the clip begins at 0.3 s
    assert numbers(reference)[1] == shown(times, 25, SYNC)
    check_bursts(reference.audio, 0.0)


def test_frames_and_audio_agree_wherever_a_file_was_cut(tmp_path):
    source = write_odd(tmp_path / "a.mp4", Odd(steady(5), audio_seconds=5, options=(("g", "100"),)))
    path = cut_without_encoding(source, tmp_path / "cut.mp4", 1.3)
    ours = read(path)
    assert numbers(ours)[1][0] == 33  # 1.32 s: the frames between the keyframe and the cut are not shown
    check_bursts(ours.audio, 0.2)


def test_exactly_as_long_as_needed(tmp_path):
    """The last frame counts for its duration; the published rule lets it only mark the end."""
    path = write_odd(tmp_path / "a.mp4", Odd(steady(8), audio_seconds=8, rate=48_000))
    for mode, samples in (("16k", 128_000), ("44k", 353_280)):
        ours = read(path, mode=mode, duration=8.0)
        assert ours.sync_frames.shape == (200, 3, 224, 224) and ours.clip_frames.shape == (64, 3, 384, 384)
        assert numbers(ours)[1] == list(range(200))
        assert ours.audio.shape == (samples,)
    assert not ours.audio[-480:].any(), "8.000 s is 10.9 ms short of the 44.1 kHz clip: filled with zeros"
    with pytest.raises(MediaError, match=r"7\.96 s of frames"):
        read(path, duration=8.0, alignment="reference")


def test_longer_than_24_seconds_gives_the_first_seconds(tmp_path):
    path = write_odd(tmp_path / "a.mp4", Odd(steady(26, 5), audio_seconds=26, frame_rate=Fraction(5), rate=16_000))
    for alignment in ("timestamps", "reference"):
        assert numbers(read(path, alignment=alignment)) == (
            shown(steady(26, 5), 8, CLIP),
            shown(steady(26, 5), 25, SYNC),
        )


def test_start_of_a_window(tmp_path, monkeypatch):
    passes = []
    fill = video._fill
    monkeypatch.setattr(video, "_fill", lambda *args, **options: passes.append(options) or fill(*args, **options))
    odd = Odd(steady(9), audio_seconds=9, options=(("g", "30"),))
    path = write_odd(tmp_path / "a.mp4", odd)
    for start in (0.04, 1.0, 5.3, 7.9):
        ours = read(path, start=start)
        when = Fraction(start).limit_denominator(100)
        assert numbers(ours) == tuple(shown(odd.frame_times, fps, n, start=when) for fps, n in ((8, CLIP), (25, SYNC)))
        check_bursts(ours.audio, -start % 0.5)
        sought = read(path, start=start, video_only=True)
        assert torch.equal(sought.sync_frames, ours.sync_frames) and torch.equal(sought.clip_frames, ours.clip_frames)
        assert sought.audio is None
    sought = sum("latest" in options for options in passes)
    assert sought == 2 and len(passes) == 8, "a late start is sought, and found at once"
    assert reason_of(path, start=8.2) == "video_too_short"
    assert reason_of(path, start=100.0, video_only=True) == "video_too_short"


def test_seeking_in_a_file_with_one_keyframe(tmp_path):
    path = write_odd(tmp_path / "a.mp4", Odd(steady(6), audio_seconds=None, options=(("g", "1000"),)))
    assert numbers(read(path, start=3.0, video_only=True)) == tuple(
        shown(steady(6), fps, n, start=3) for fps, n in ((8, CLIP), (25, SYNC))
    )


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation(degrees, tmp_path):
    plain, turned = Odd(steady(1.5), audio_seconds=None), Odd(steady(1.5), audio_seconds=None, rotation=degrees)
    upright = read(write_odd(tmp_path / "a.mp4", plain), video_only=True)
    path = write_odd(tmp_path / "b.mp4", turned)
    ours = read(path, video_only=True)
    expected = torch.rot90(upright.sync_frames, degrees // 90, (-2, -1))  # the matrix turns counterclockwise
    assert (ours.sync_frames - expected).abs().max() < 0.02  # resizing rounds rows before columns
    assert torch.equal(read(path, video_only=True, alignment="reference").sync_frames, upright.sync_frames)


def test_mirrored_display_matrix():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    one = 1 << 16
    flips = {(-one, 0, one): image[:, ::-1], (one, 0, -one): image[::-1], (one, 0, one): image}
    for (a, b, d), expected in flips.items():
        matrix = np.array([a, b, 0, 0, d, 0, 0, 0, 1 << 30], np.int32)
        assert np.array_equal(apply_display_matrix(image, matrix), expected)
    transposed = apply_display_matrix(image, np.array([0, one, 0, one, 0, 0, 0, 0, 1 << 30], np.int32))
    assert np.array_equal(transposed, image.transpose(1, 0, 2))


@pytest.mark.parametrize(("width", "height"), [(192, 144), (144, 192), (161, 121), (64, 48)])
def test_resizing(width, height, tmp_path):
    """Against resampling in float with the rounding done once at the end: at most two levels apart."""
    odd = Odd(steady(1.2), audio_seconds=None, size=(width, height), codec="mpeg4", options=(("q:v", "2"),))
    path = write_odd(tmp_path / "a.mp4", odd)
    ours = read_video(path, duration=1.0, video_only=True, as_uint8=True)
    with av.open(str(path)) as container:
        frame = list(container.decode(video=0))[shown(steady(1.2), 25, 25)[7]]
    source = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None].float()

    def resized(height, width):
        size = (height, width)
        return torch.nn.functional.interpolate(source, size, mode="bicubic", antialias=True).clamp(0, 255)[0]

    short = min(width, height)
    sides = (int(224 * height / short), int(224 * width / short))
    top, left = (round((side - 224) / 2) for side in sides)
    expected = resized(*sides)[:, top : top + 224, left : left + 224]
    difference = (ours.sync_frames[7].float() - expected).abs()
    # Chroma edges of odd 4:2:0 sizes depend on the conversion to RGB.
    assert (difference.mean() < 1) if width % 2 else (difference.max() <= 2)
    assert ours.clip_frames.shape == (8, 3, 384, 384) and ours.clip_frames.dtype == torch.uint8
    clip = resized(384, 384)
    again = read_video(path, duration=1.0, video_only=True, as_uint8=True).clip_frames
    position = shown(steady(1.2), 8, 8).index(7)  # 8 fps shows source frame 7 as well
    difference = (again[position].float() - clip).abs()
    assert (difference.mean() < 1) if width % 2 else (difference.max() <= 2)


def write_lossless(path, width, height, pix_fmt):
    """30 frames of one pattern with sharp edges in every channel; returns it (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (37 * x + 11 * y) % 256, (5 * x * y // 7) % 256, 255 * ((x // 3 + y // 5) % 2)
    rgb = np.stack(channels, axis=-1).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25, width=width, height=height, pix_fmt=pix_fmt)
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return rgb


# (width, height, format, RGB of CLIP at row 200, column 100, of sync at row 111, column 7, sums of all values)
PIXELS = [
    (161, 121, "yuv420p", [162, 77, 82], [117, 125, 122], 55_854_047, 19_100_189),
    (96, 97, "yuv420p", [180, 102, 33], [102, 81, 131], 54_769_425, 18_664_292),
    (97, 96, "yuv422p", [183, 107, 121], [106, 88, 118], 54_970_749, 18_736_041),
    (161, 121, "yuv444p", [183, 66, 85], [103, 130, 120], 55_867_729, 19_107_332),
    (97, 97, "bgr0", [193, 123, 0], [116, 93, 52], 55_384_671, 18_846_674),
    (500, 401, "yuv420p", [239, 117, 98], [190, 145, 132], 55_654_065, 18_961_925),
]


@pytest.mark.parametrize(("width", "height", "pix_fmt", "clip", "sync", "clip_sum", "sync_sum"), PIXELS)
def test_pixels_of_odd_formats(width, height, pix_fmt, clip, sync, clip_sum, sync_sum, tmp_path):
    """Exact: odd chroma sizes go through the filter graph, and each bicubic pass rounds to uint8."""
    write_lossless(tmp_path / "a.mkv", width, height, pix_fmt)
    ours = read_video(tmp_path / "a.mkv", duration=1.0, video_only=True, as_uint8=True)
    assert ours.clip_frames[0, :, 200, 100].tolist() == clip and int(ours.clip_frames[0].long().sum()) == clip_sum
    assert ours.sync_frames[0, :, 111, 7].tolist() == sync and int(ours.sync_frames[0].long().sum()) == sync_sum


@pytest.mark.parametrize(("width", "height"), [(97, 97), (161, 121), (500, 401), (640, 361)])
def test_resizing_is_that_of_pillow(width, height, tmp_path):
    """Another implementation of bicubic with antialiasing on uint8: 99 % of the values are equal, none is 3 off."""
    image = Image.fromarray(write_lossless(tmp_path / "a.mkv", width, height, "bgr0"))
    ours = read_video(tmp_path / "a.mkv", duration=1.0, video_only=True, as_uint8=True)
    short = min(width, height)
    sides = int(224 * width / short), int(224 * height / short)
    left, top = (round((side - 224) / 2) for side in sides)
    theirs = image.resize((384, 384), Image.BICUBIC), image.resize(sides, Image.BICUBIC)
    theirs = theirs[0], theirs[1].crop((left, top, left + 224, top + 224))
    for frames, expected in zip(ours[:2], theirs, strict=True):
        difference = (frames[0].permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()).abs()
        assert difference.max() <= 2 and (difference > 0).float().mean() < 0.01


def test_uint8_frames_finish_to_the_same_floats(tmp_path):
    path = write_odd(tmp_path / "a.mp4", Odd(steady(1.5)))
    ours, raw = read(path), read(path, as_uint8=True)
    assert raw.clip_frames.dtype == raw.sync_frames.dtype == torch.uint8
    clip_frames, sync_frames = normalize_frames(raw.clip_frames, raw.sync_frames)
    assert torch.equal(clip_frames, ours.clip_frames) and torch.equal(sync_frames, ours.sync_frames)
    assert torch.equal(clip_frames, raw.clip_frames.float() / 255)
    assert torch.equal(sync_frames, (raw.sync_frames.float() / 255 - 0.5) / 0.5)
    assert torch.equal(raw.audio, ours.audio)


def test_normalisation_uses_the_peak_of_the_whole_track(tmp_path):
    path = write_odd(tmp_path / "a.mp4", Odd(steady(1.5)))
    loud, plain = read(path).audio, read(path, normalize_audio=False).audio
    with av.open(str(path)) as container:
        peak = max(np.abs(frame.to_ndarray().mean(axis=0)).max() for frame in container.decode(audio=0))
    assert torch.allclose(loud, plain / float(peak) * 0.95, atol=1e-6)
    late = write_odd(tmp_path / "b.mp4", Odd(steady(6), audio_seconds=6))
    with av.open(str(late)) as container:
        peak = max(np.abs(frame.to_ndarray().mean(axis=0)).max() for frame in container.decode(audio=0))
    for alignment in ("timestamps", "reference"):
        loud = read(late, alignment=alignment).audio
        plain = read(late, alignment=alignment, normalize_audio=False).audio
        assert torch.allclose(loud, plain / float(peak) * 0.95, atol=1e-6)


def test_mean_of_six_channels(tmp_path):
    """The low-frequency channel counts like the others: levels 1.0, 0.9, ... 0.5 (the encoder low-passes channel 4)."""
    six = read(write_odd(tmp_path / "a.mp4", Odd(steady(1.5), layout="5.1")), normalize_audio=False).audio
    one = read(write_odd(tmp_path / "b.mp4", Odd(steady(1.5), layout="mono")), normalize_audio=False).audio
    assert float(six.abs().max() / one.abs().max()) == pytest.approx((4.5 - 0.7) / 6, rel=0.05)


def test_refusals(tmp_path):
    plain = write_odd(tmp_path / "plain.mp4", Odd(steady(1.5)))
    assert reason_of(tmp_path / "nothing.mp4") == "not_found"
    (tmp_path / "text.mp4").write_text("not a video")
    assert reason_of(tmp_path / "text.mp4") == "unreadable"
    assert reason_of(truncate(plain, tmp_path / "no_index.mp4", 0.9)) == "unreadable"
    with av.open(str(tmp_path / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        for packet in odd_media.audio_packets(stream, Odd((), rate=16_000, layout="mono")):
            container.mux(packet)
    assert reason_of(tmp_path / "audio.mp4") == "no_video"


def test_errors_carry_the_probe_and_cross_processes(tmp_path):
    path = write_odd(tmp_path / "short.mp4", Odd(steady(0.8), size=(64, 48)))
    with pytest.raises(MediaError) as caught:
        read(path)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.reason, str(error)) == ("video_too_short", str(caught.value))
    assert error.probe == probe(path)
    assert error.probe["video"]["width"] == 64 and error.probe["audio"]["sample_rate"] == 44_100


def test_missing_audio_is_no_error_when_it_is_not_needed(tmp_path):
    for odd in (
        Odd(steady(1.5), audio_seconds=None),
        Odd(steady(1.5), silent=True),
        Odd(steady(1.5), audio_seconds=0.5),
    ):
        path = write_odd(tmp_path / "a.mp4", odd)
        clip = read(path, need_audio=False)
        assert clip.audio is None and numbers(clip)[1] == shown(steady(1.5), 25, SYNC)
    assert read(write_odd(tmp_path / "b.mp4", Odd(steady(1.5))), need_audio=False).audio is not None


@pytest.mark.parametrize("alignment", ["timestamps", "reference"])
def test_refusals_of_either_alignment(tmp_path, alignment):
    mute = write_odd(tmp_path / "mute.mp4", Odd(steady(1.5), audio_seconds=None))
    assert reason_of(mute, alignment=alignment) == "no_audio"
    silent = write_odd(tmp_path / "silent.mp4", Odd(steady(1.5), silent=True))
    assert reason_of(silent, alignment=alignment) == "silent"
    assert not read(silent, alignment=alignment, normalize_audio=False).audio.any()
    short = write_odd(tmp_path / "short.mp4", Odd(steady(0.96)))
    assert reason_of(short, alignment=alignment) == "video_too_short"
    brief = write_odd(tmp_path / "brief.mp4", Odd(steady(1.5), audio_seconds=0.95))
    assert reason_of(brief, alignment=alignment) == "audio_too_short"


@pytest.fixture
def fast_start(tmp_path) -> Path:
    """Five seconds, with the index before the packets."""
    odd = Odd(steady(5), audio_seconds=5, options=(("g", "10"),))
    return write_odd(tmp_path / "a.mp4", odd, {"movflags": "faststart"})


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_damage_counts_only_inside_the_clip(fast_start, tmp_path, kind):
    inside = overwrite_packet(fast_start, tmp_path / "inside.mp4", kind, 1.0)
    behind = overwrite_packet(fast_start, tmp_path / "behind.mp4", kind, 4.5)
    assert reason_of(inside) == reason_of(inside, alignment="reference") == "decode_error"
    assert reason_of(behind, alignment="reference") == "decode_error"
    ours, whole = (read(path, normalize_audio=False) for path in (behind, fast_start))
    assert all(torch.equal(a, b) for a, b in zip(ours, whole, strict=True))
    assert read(behind).audio is not None  # the peak is that of what can be decoded


def test_of_a_file_that_is_cut_off_the_beginning_is_read(fast_start, tmp_path):
    whole = read(fast_start, normalize_audio=False)
    tail, middle = (truncate(fast_start, tmp_path / f"{share}.mp4", share) for share in (0.9, 0.3))
    assert torch.equal(read(tail).sync_frames, whole.sync_frames)
    assert reason_of(tail, alignment="reference") == reason_of(middle, alignment="reference") == "decode_error"
    assert reason_of(middle) in ("decode_error", "video_too_short")


def test_hole_in_the_audio_keeps_the_rest_in_time(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25, width=96, height=96, pix_fmt="yuv420p")
        audio = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        packets = []
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(odd_media.code_image(number, 96, 96), format="rgb24")
            packets += video.encode(frame)
        track = odd_media.burst_track(2, 16_000)
        for begin, end in ((0.0, 0.7), (0.9, 2.0)):
            samples = track[:, int(begin * 16_000) : int(end * 16_000)]
            frame = av.AudioFrame.from_ndarray((samples * 30_000).astype(np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, int(begin * 16_000), Fraction(1, 16_000)
            packets += audio.encode(frame)
        for packet in sorted([*packets, *video.encode(None)], key=lambda p: p.dts * p.time_base):
            container.mux(packet)
    for alignment, expected in (("timestamps", [0, 0.5, 1.0]), ("reference", [0, 0.5, 0.8])):
        times = burst_times(read(path, alignment=alignment).audio, 16_000)
        assert np.abs(np.array(times) - expected).max() < 0.002


def lose(*numbers):
    return lambda number, time: None if number in numbers else time


# (how the audio packets of a plain file, 1024 samples each, are changed; bursts by their timestamps in s)
RETIMED = {
    "packets lost": (lose(60, 61, 62, 63), [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
    "single packets lost": (lose(50, 90, 130, 160), [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
    "a hole at the start": (lambda n, time: time + (n > 1) * Fraction(6, 100), [0, *np.arange(0.56, 3.9, 0.5)]),
    "slower": (lambda n, time: time * Fraction(101, 100), np.arange(0, 3.9, 0.505)),
    "faster": (lambda n, time: time * Fraction(99, 100), np.arange(0, 3.9, 0.495)),
}


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("name", RETIMED)
def test_audio_is_placed_by_its_timestamps(name, container, tmp_path):
    change, expected = RETIMED[name]
    plain = Odd(steady(5), audio_seconds=5, rate=48_000, layout="mono")
    source = write_odd(tmp_path / "plain.mp4", plain)
    path = retime_audio(source, tmp_path / f"a.{container}", change)
    times = np.array(burst_times(read(path, duration=4.0).audio, 16_000))
    assert np.abs(times[times < 3.9] - expected).max() <= 0.021, times
    with av.open(str(path)) as file:  # the published rules append what is decoded, frame after frame
        decoded = torch.from_numpy(np.concatenate([mono_samples(frame) for frame in file.decode(audio=0)]))
    reference = read(path, duration=4.0, alignment="reference", normalize_audio=False).audio
    assert torch.equal(reference, resample(decoded, 48_000, 16_000)[: len(reference)])


def test_joined_files_stay_in_time(tmp_path):
    """Ten AAC parts of 0.4 s, each with its priming and padding: the commonest edit there is."""
    path = joined_audio(tmp_path / "a.mp4", 4.0, 0.4)
    times = burst_times(read(path, duration=3.8).audio, 16_000)
    assert np.abs(np.array(times) - np.arange(0, 3.8, 0.5)).max() <= 0.021
    late = burst_times(read(path, duration=3.8, alignment="reference").audio, 16_000)
    assert late[-1] - 3.5 > 0.1, "the published rules append the padding of every part"


def test_one_wrong_timestamp_moves_nothing(tmp_path):
    source = write_odd(tmp_path / "plain.mp4", Odd(steady(3), audio_seconds=3, rate=48_000, layout="mono"))
    right = retime_audio(source, tmp_path / "right.mkv", lambda n, time: time)
    wrong = retime_audio(source, tmp_path / "wrong.mkv", lambda n, time: time + (n == 70) * Fraction(2, 100))
    assert torch.equal(read(wrong, duration=2.0).audio, read(right, duration=2.0).audio)


def test_size_that_changes_within_a_file():
    to_rgb = RgbConverter(rotate=False)
    for size in (96, 144, 96):
        image = odd_media.code_image(5, size, size)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv444p")
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        assert np.abs(to_rgb(frame).astype(int) - image).max() <= 4


def test_wrong_arguments(tmp_path):
    for options in ({"alignment": "best"}, {"start": -1.0}, {"start": math.nan}, {"mode": "22k"}, {"duration": 0.1}):
        with pytest.raises(ValueError) as caught:
            read(tmp_path / "nothing.mp4", **options)
        assert not isinstance(caught.value, MediaError)


def test_sparse_frames_from_a_moment_on(tmp_path):
    """Those of ImageBind: each the last one that begins before half a period later, counted from the start."""
    path = write_odd(tmp_path / "v.mp4", Odd(steady(3), audio_seconds=None))
    for start in (0.0, 1.0):
        codes = read_codes(video.sparse_frames(path, 0.5, 4, start) / 255)
        assert codes == pytest.approx([25 * (start + k / 2) + 6 for k in range(4)], abs=1)
    with pytest.raises(MediaError, match="has 3 of 4 frames"):
        video.sparse_frames(path, 0.5, 4, 1.75)
