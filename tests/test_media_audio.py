"""Audio files: scales of sample formats, damage, resampling, clips of loud files, writing."""

import math
import re
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
import scipy.io.wavfile
import scipy.signal
import torch
from odd_media import Odd, remux, retime_audio, steady, write_odd

from mmaudio_hf.media import audio
from mmaudio_hf.media.audio import (
    AudioPlacement,
    count_samples,
    read_audio_clip,
    read_audio_clips,
    read_waveform,
    resample,
    write_audio,
)
from mmaudio_hf.media.container import MediaError

RNG = np.random.default_rng(0)
NOISE = RNG.uniform(-1, 1, (2, 20_000))


def write_frames(path, codec, rate, samples, sample_format, layout):
    """`samples` (channels, n), planar or interleaved by the format."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.codec_context.format = sample_format
        data = samples if sample_format.endswith("p") else samples.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), format=sample_format, layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "bits"),
    [
        ("a.wav", "pcm_s16le", "s16", 16),
        ("a.wav", "pcm_s24le", "s32", 24),
        ("a.wav", "pcm_s32le", "s32", 32),
        ("a.flac", "flac", "s16", 16),
        ("a.flac", "flac", "s32", 24),
    ],
)
def test_integer_formats_keep_their_scale(name, codec, sample_format, bits, tmp_path):
    integers = np.round(NOISE * (2 ** (bits - 1) - 1)).astype(np.int64)
    container_bits = 16 if sample_format == "s16" else 32
    stored = (integers << (container_bits - bits)).astype(f"int{container_bits}")
    write_frames(tmp_path / name, codec, 44_100, stored, sample_format, "stereo")
    waveform, rate = read_waveform(tmp_path / name)
    assert rate == 44_100 and waveform.dtype == torch.float32
    expected = (integers / 2.0 ** (bits - 1)).astype(np.float32).mean(axis=0)
    assert np.abs(waveform.numpy() - expected).max() < 1e-7
    assert count_samples(tmp_path / name) == (20_000, 44_100)


def test_unsigned_bytes_and_floats(tmp_path):
    scipy.io.wavfile.write(tmp_path / "u8.wav", 8000, np.array([0, 128, 255], np.uint8))
    assert read_waveform(tmp_path / "u8.wav")[0].tolist() == [-1.0, 0.0, 127 / 128]
    floats = (2 * NOISE[0]).astype(np.float32)  # beyond full scale: floats are not clipped
    scipy.io.wavfile.write(tmp_path / "f32.wav", 8000, floats)
    scipy.io.wavfile.write(tmp_path / "f64.wav", 8000, floats.astype(np.float64))
    for name in ("f32.wav", "f64.wav"):
        assert np.array_equal(read_waveform(tmp_path / name)[0].numpy(), floats)


@pytest.mark.parametrize(
    ("name", "codec", "sample_format"),
    [("a.mp3", "libmp3lame", "fltp"), ("a.m4a", "aac", "fltp"), ("a.opus", "libopus", "flt")],
)
def test_compressed_formats(name, codec, sample_format, tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)[None].astype(np.float32)
    write_frames(tmp_path / name, codec, 48_000, tone, sample_format, "mono")
    waveform, rate = read_waveform(tmp_path / name)
    assert rate == 48_000 and 0 <= len(waveform) - 48_000 < 2400  # the padding of the last frame may stay
    assert np.corrcoef(waveform.numpy()[2400:45_600], tone[0, 2400:45_600])[0, 1] > 0.98  # no shift by an encoder delay


@pytest.mark.parametrize(("source", "target"), [(44_100, 16_000), (48_000, 44_100), (16_000, 44_100), (44_099, 16_000)])
def test_resampling_keeps_tones_and_length(source, target):
    """Below the pass band's edge a sine stays the same sine; above the new Nyquist frequency it vanishes."""
    n = source + 17
    middle = slice(target // 4, target // 2)
    low = torch.sin(2 * math.pi * 1000 * torch.arange(n, dtype=torch.float64) / source).float()
    out = resample(low, source, target)
    assert len(out) == math.ceil(target * n / source)
    expected = torch.sin(2 * math.pi * 1000 * torch.arange(len(out), dtype=torch.float64) / target).float()
    assert (out - expected)[middle].abs().max() < 1e-4
    if target < source:
        high = torch.sin(2 * math.pi * 1.02 * target / 2 * torch.arange(n, dtype=torch.float64) / source).float()
        assert resample(high, source, target)[middle].abs().max() < 1e-3


def test_resampling_kernel_is_the_kaiser_windowed_sinc():
    """One impulse through 48 -> 16 kHz gives the filter itself, written down here once more."""
    impulse = torch.zeros(3 * 2001)
    impulse[3000] = 1
    ours = resample(impulse, 48_000, 16_000).double().numpy()
    cutoff, zeros, beta = 0.9475937167399596, 64, 14.769656459379492
    time = (3 * np.arange(2001) - 3000) / 3 * cutoff
    window = np.where(abs(time) < zeros, np.i0(beta * np.sqrt(np.clip(1 - (time / zeros) ** 2, 0, 1))) / np.i0(beta), 0)
    assert np.abs(ours - np.sinc(time) * window * cutoff / 3).max() < 1e-6


def test_odd_rates_use_little_memory_and_the_same_filter():
    noise = torch.from_numpy(NOISE[0].astype(np.float32))
    table = resample(noise, 44_100, 16_000)
    assert (audio._resample_odd(noise, 160, 441) - table).abs().max() < 1e-4
    assert resample(noise, 44_101, 16_000).shape == (math.ceil(16_000 * 20_000 / 44_101),)


def test_clip_of_a_loud_file_stays_quiet(tmp_path):
    quiet, loud = 0.01 * NOISE[0], NOISE[1]
    track = np.concatenate([np.tile(quiet, 7), loud]).astype(np.float32)  # 140 000 quiet samples, then loud ones
    write_audio(tmp_path / "a.flac", torch.from_numpy(track), 16_000)
    clip = read_audio_clip(tmp_path / "a.flac", start_sample=100, end_sample=129_700)
    peak = np.abs(np.round(track * 32767)).max() / 32768
    expected = np.round(track * 32767)[100:128_100] / 32768 / peak * 0.95
    assert clip.shape == (128_000,) and np.abs(clip.numpy() - expected).max() < 1e-6


def test_refusals(tmp_path):
    def reason(path, **options):
        with pytest.raises(MediaError) as caught:
            read_audio_clip(path, **options)
        assert str(path) in str(caught.value)
        return caught.value.reason

    path = tmp_path / "a.wav"
    assert reason(path) == "not_found"
    path.write_bytes(b"RIFF of nothing")
    assert reason(path) == "unreadable"
    write_audio(path, torch.zeros(200_000), 16_000)
    assert reason(path) == "silent"
    write_audio(path, torch.rand(127_999), 16_000)
    assert reason(path) == "audio_too_short"
    assert read_audio_clip(path, duration=2.0).shape == (32_256,)
    assert reason(path, start_sample=10, end_sample=128_000) == "clip_out_of_range"
    assert reason(path, start_sample=-1) == "clip_out_of_range"
    scipy.io.wavfile.write(path, 16_000, np.full(130_000, np.nan, np.float32))
    assert reason(path) == "decode_error"
    scipy.io.wavfile.write(path, 16_000, np.zeros(0, np.int16))
    assert reason(path) in ("audio_too_short", "unreadable")


def test_damaged_audio_file(tmp_path):
    write_audio(tmp_path / "a.flac", torch.from_numpy(NOISE[0].astype(np.float32)), 16_000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    (tmp_path / "a.flac").write_bytes(data)
    with pytest.raises(MediaError) as caught:
        read_waveform(tmp_path / "a.flac")
    assert caught.value.reason == "decode_error"


def tone(seconds: float, rate: int) -> np.ndarray:
    """(1, samples) float32, no two frames alike."""
    times = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (300 + 20 * times) * times))[None].astype(np.float32)


RATE = 48_000
SECONDS = 4.0
WRITERS = {
    "mp3": ("libmp3lame", "fltp"),
    "opus": ("libopus", "flt"),
    "webm": ("libopus", "flt"),
    "mka": ("aac", "fltp"),
    "mp4": ("aac", "fltp"),
    "m4a": ("aac", "fltp"),
    "aiff": ("pcm_s16be", "s16"),
    "wav": ("pcm_s16le", "s16"),
    "flac": ("flac", "s16"),
}


def write_tone(path):
    """A tone of SECONDS in the format of the ending."""
    codec, sample_format = WRITERS[path.suffix[1:]]
    data = tone(SECONDS, RATE)
    data = np.round(data * 32767).astype(np.int16) if sample_format == "s16" else data
    write_frames(path, codec, RATE, data, sample_format, "mono")
    return path


def damage_of(path) -> str | None:
    """What is wrong with the file, the same for every way to read it."""
    messages = set()
    for read in (count_samples, read_waveform, lambda path: read_audio_clip(path, duration=1.0)):
        try:
            read(path)
            messages.add(None)
        except MediaError as error:
            assert error.reason == "decode_error" and str(path) in str(error)
            messages.add(str(error))
    assert len(messages) == 1
    return messages.pop()


@pytest.mark.parametrize("ending", WRITERS)
def test_a_file_that_ends_early_is_damaged(ending, tmp_path):
    """Whatever states the length: the header, the index, the size of the last chunk or page."""
    path = write_tone(tmp_path / f"a.{ending}")
    if ending in ("mp4", "m4a"):  # with the index at the end nothing would be left to open
        path = remux(path, tmp_path / f"b.{ending}", movflags="faststart")
    assert damage_of(path) is None
    assert count_samples(path)[0] / RATE == pytest.approx(SECONDS, abs=0.03)
    data = path.read_bytes()
    path.write_bytes(data[: int(0.7 * len(data))])
    assert damage_of(path) is not None


def test_a_lost_page_is_damage_though_the_rest_decodes(tmp_path):
    path = write_tone(tmp_path / "a.opus")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 100] = bytes(100)
    path.write_bytes(data)
    assert re.search(r"\d+ of 19\d{4} samples can be decoded", damage_of(path))


def test_checksums_show_damage_that_decodes(tmp_path):
    """FFmpeg looks at neither: the one of a FLAC frame, and that of the last Ogg page, which zeros replace here."""
    flac, opus = write_tone(tmp_path / "a.flac"), write_tone(tmp_path / "a.opus")
    data = flac.read_bytes()
    middle = len(data) // 2
    flac.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    assert re.search(r"\d+ of 192000 samples can be decoded", damage_of(flac))
    data = opus.read_bytes()
    cut = data.rindex(b"OggS") + 100
    opus.write_bytes(data[:cut] + bytes(len(data) - cut))
    assert "cut off" in damage_of(opus)
    opus.write_bytes(data + bytes(5000))
    assert damage_of(opus) is None, "zeros behind a whole file are no damage"


@pytest.mark.parametrize("ending", ["mka", "webm", "mp4", "m4a", "opus"])
def test_pauses_are_filled_and_a_late_start_is_no_damage(ending, tmp_path):
    """A recorder that was stopped for half a second; the packets of one that began 3 s after its clock."""
    path = write_tone(tmp_path / f"a.{ending}")
    pause = retime_audio(path, tmp_path / f"b.{ending}", lambda _, time: time + Fraction(time >= 2) / 2)
    late = retime_audio(path, tmp_path / f"c.{ending}", lambda _, time: time + 3)
    (whole, _), (placed, _) = read_waveform(path), read_waveform(pause)
    assert damage_of(pause) is None and damage_of(late) is None
    assert len(placed) - len(whole) == pytest.approx(RATE / 2, abs=RATE / 50)
    gap = torch.nonzero(placed == 0).flatten()
    gap = gap[(gap > RATE) & (gap < 3 * RATE)]
    assert 0 <= gap[0] / RATE - 2 < 0.03 and len(gap) == pytest.approx(RATE / 2, abs=RATE / 50)
    assert torch.equal(placed[: 2 * RATE - 2048], whole[: 2 * RATE - 2048])


def test_a_lost_cluster_is_damage_and_no_pause(tmp_path):
    """FFmpeg steps over what it does not know in a Matroska file, and leaves a hole in the timestamps."""
    path = remux(write_tone(tmp_path / "a.mka"), tmp_path / "b.mka", cluster_time_limit="1000")
    data = path.read_bytes()
    assert data.count(b"\x1f\x43\xb6\x75") > 2 and damage_of(path) is None
    second = data.index(b"\x1f\x43\xb6\x75", data.index(b"\x1f\x43\xb6\x75") + 4)
    path.write_bytes(data[:second] + bytes(100) + data[second + 100 :])
    assert re.search(r"\d+ of 19\d{4} samples can be decoded", damage_of(path))
    path.write_bytes(data + bytes(100))
    assert damage_of(path) is None, "what follows the last element is no audio"


def test_the_audio_of_a_longer_video_is_whole(tmp_path):
    """Matroska states the length of the longest track, and of each in a tag."""
    path = write_odd(tmp_path / "a.mkv", Odd(steady(4), audio_seconds=2.5, layout="mono"))
    assert count_samples(path)[0] / 44_100 == pytest.approx(2.5, abs=0.05)


@pytest.mark.parametrize("kind", ["header", "no header", "aac"])
@pytest.mark.parametrize("junk", [bytes(5000), b"\0" + b"\xff" * 3000, b"TAG" + bytes(125), b"\0", RNG.bytes(4000)])
def test_junk_after_the_last_frame_of_a_raw_file(kind, junk, tmp_path):
    path = tmp_path / ("a.aac" if kind == "aac" else "a.mp3")
    write_frames(path, "aac" if kind == "aac" else "libmp3lame", RATE, tone(SECONDS, RATE), "fltp", "mono")
    data = path.read_bytes()
    # Without the header of the first frame, nothing states the length.
    data = data.replace(b"Info", bytes(4)) if kind == "no header" else data
    path.write_bytes(data)
    whole = read_waveform(path)[0]
    path.write_bytes(data + junk)
    assert damage_of(path) is None
    again = read_waveform(path)[0]  # with much junk FFmpeg no longer cuts the padding of the last frame
    assert torch.equal(again[: len(whole)], whole) and len(again) - len(whole) < 1152
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(3000) + data[middle:])
    assert damage_of(path) is not None, "between frames it is damage"


@pytest.mark.parametrize("tag", [b"", b"TAG" + b"title".ljust(125)])
def test_joined_mp3_files_are_read_to_the_end(tag, tmp_path):
    path = write_tone(tmp_path / "a.mp3")
    path.write_bytes((path.read_bytes() + tag) * 2)
    assert count_samples(path)[0] / RATE == pytest.approx(2 * SECONDS, abs=0.1)


def test_wav_files_of_unknown_length(tmp_path):
    """As programs write them into pipes: the sizes in the header are 0 or the largest number."""
    path = write_tone(tmp_path / "a.wav")
    data, whole = bytearray(path.read_bytes()), read_waveform(path)[0]
    header = data.index(b"data") + 4
    for size in (0, 0xFFFFFFFF):
        data[header : header + 4] = size.to_bytes(4, "little")
        path.write_bytes(data)
        assert torch.equal(read_waveform(path)[0], whole)


def test_memory_of_a_long_file_is_bounded_by_its_clips(tmp_path):
    """Ten minutes of 8 kHz are 19 MB as float; two clips of a second need less than 2 MB at any moment."""
    path = tmp_path / "a.flac"
    write_audio(path, torch.from_numpy(np.tile(tone(60, 8000)[0], 10)), 8000)
    tracemalloc.start()
    clips = read_audio_clips(path, [(0, 9600), (4_000_000, 4_009_600)], duration=1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [clip.shape for clip in clips] == [(16_384,)] * 2 and peak < 2_000_000
    alone = [read_audio_clip(path, start_sample=s, end_sample=s + 9600, duration=1.0) for s in (0, 4_000_000)]
    assert all(torch.equal(a, b) for a, b in zip(clips, alone, strict=True))
    waveform, _ = read_waveform(path)
    expected = resample(waveform[:9600] / waveform.abs().max() * 0.95, 8000, 16_000)[:16_384]
    assert torch.equal(clips[0], expected)


# (name, frames as (time in ms, samples), expected (zeros, samples) at 1000 Hz with codec frames of 20 samples)
STEADY = [(20 * n, 20) for n in range(6)]
PLACED = [
    ("steady", STEADY, [(0, 20)] * 6),
    ("jitter", [(t + 5 * (n % 2), s) for n, (t, s) in enumerate(STEADY)], [(0, 20)] * 6),
    ("one wrong timestamp", [(t + 35 * (n == 2), s) for n, (t, s) in enumerate(STEADY)], [(0, 20)] * 6),
    ("no timestamps", [(None, s) for _, s in STEADY], [(0, 20)] * 6),
    ("a lost frame", STEADY[:2] + STEADY[3:], [(0, 20), (0, 20), (20, 20), (0, 20), (0, 20)]),
    ("a hole", [(t + 60 * (n > 2), s) for n, (t, s) in enumerate(STEADY)], [*[(0, 20)] * 3, (60, 20), *[(0, 20)] * 2]),
    (
        "an overlap",
        [(t - 18 * (n > 2), s) for n, (t, s) in enumerate(STEADY)],
        [*[(0, 20)] * 2, (0, 2), *[(0, 20)] * 3],
    ),
    ("a repeat", [(t - 40 * (n > 3), s) for n, (t, s) in enumerate(STEADY)], [*[(0, 20)] * 3, (0, 0), (0, 0), (0, 20)]),
    ("the last frame late", [*STEADY[:5], (130, 20)], [*[(0, 20)] * 5, (30, 20)]),
]


@pytest.mark.parametrize(("name", "frames", "expected"), PLACED, ids=[case[0] for case in PLACED])
def test_frames_are_placed_by_their_timestamps(name, frames, expected):
    placement, placed = AudioPlacement(1000, 20), []
    for time, size in frames:
        placed += placement.add(np.zeros(size, np.float32), None if time is None else Fraction(time, 1000))
    placed += placement.flush()
    assert [(silence, samples.size) for silence, samples in placed[1:]] == expected  # the first is what came before
    assert placement.count == sum(map(sum, expected)) and placement.holes == sum(silence for silence, _ in expected)
    drift = {"a lost frame": 20, "a hole": 60, "an overlap": 18, "a repeat": 40, "jitter": 0}
    assert placement.drift == drift.get(name, 0)


@pytest.mark.parametrize(("lead", "corrected"), [(0, False), (10, True), (-10, False), (14, True)])
def test_a_late_track_and_its_jitter_are_together_at_most_20_ms_off(lead, corrected):
    """Each is left alone: the track begins 10 ms after the frames, and from the fourth frame on all are 12 ms late."""
    placement, holes = AudioPlacement(1000, 20, Fraction(lead, 1000)), []
    for number in range(9):
        late = 12 * (number > 3)
        holes += [zeros for zeros, _ in placement.add(np.zeros(20, np.float32), Fraction(20 * number + late, 1000))]
    holes += [zeros for zeros, _ in placement.flush()]
    assert sum(holes) == placement.holes == (12 if corrected else 0)


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_written_audio_reads_back(ending, tmp_path):
    path = tmp_path / f"a.{ending}"
    stereo = torch.from_numpy(NOISE.astype(np.float32)) * 1.5
    write_audio(path, stereo, 44_100)
    waveform, rate = read_waveform(path)
    assert rate == 44_100
    assert (waveform - stereo.clamp(-1, 1).mean(dim=0)).abs().max() < 2 / 32768
    for bad in (torch.full((10,), math.inf), torch.zeros(3, 10), torch.zeros(0)):
        with pytest.raises(ValueError, match="waveform"):
            write_audio(path, bad, 44_100)
    with pytest.raises(ValueError, match=r"\.mp3"):
        write_audio(tmp_path / "a.mp3", stereo, 44_100)
    with pytest.raises(FileNotFoundError, match=rf"nowhere/a\.{ending}"):
        write_audio(tmp_path / "nowhere" / f"a.{ending}", stereo, 44_100)
    assert [p.name for p in tmp_path.iterdir()] == [f"a.{ending}"], "nothing half-written stays behind"
