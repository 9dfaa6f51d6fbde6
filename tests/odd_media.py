"""Media with awkward properties for the tests, written with PyAV.

Every frame carries its own number as a 16-bit code, every audio track a 6 ms burst at each multiple of 0.5 s of
presentation time, so a test can tell which frame and which moment it was given.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

BURST_SECONDS = 0.006


def code_image(number: int, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: two rows of eight blocks at the top, bright for 1, over a slanted gradient."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([60 + 60 * x / width, 60 + 60 * y / height, np.full(x.shape, 90.0)], axis=-1)
    for bit in range(16):
        row, column = divmod(bit, 8)
        block = (
            slice(row * (height // 6), (row + 1) * (height // 6)),
            slice(column * width // 8, (column + 1) * width // 8),
        )
        image[block] = 230 if number >> bit & 1 else 20
    return image.astype(np.uint8)


def read_codes(frames: torch.Tensor) -> list[int]:
    """Source frame numbers of float frames in [0, 1] (T, 3, S, S) that show the whole source frame."""
    size = frames.shape[-1]
    codes = []
    for frame in frames.mean(dim=1):
        bits = [frame[int(size * (0.5 + b // 8) / 6), int(size * (0.5 + b % 8) / 8)] > 0.5 for b in range(16)]
        codes.append(sum(int(bit) << b for b, bit in enumerate(bits)))
    return codes


def burst_track(seconds: float, rate: int, start: float = 0.0, channels: int = 1) -> np.ndarray:
    """(channels, samples) float32 for presentation times [start, start + seconds); the channels differ in level."""
    times = start + np.arange(round(seconds * rate)) / rate
    # The small addition keeps a burst whose first sample falls a rounding error before the half second.
    since = (times + 1e-9) % 0.5
    wave = 0.6 * np.sin(2 * np.pi * 2000 * since) * (since < BURST_SECONDS)
    levels = 1 - 0.1 * np.arange(channels)
    return (levels[:, None] * wave).astype(np.float32)


def burst_times(audio: torch.Tensor, rate: int) -> list[float]:
    """Onsets of the bursts in seconds."""
    loud = (audio.abs() > 0.3 * audio.abs().max()).numpy()
    onsets = np.flatnonzero(loud)
    starts = onsets[np.diff(onsets, prepend=-rate) > 0.1 * rate]
    return [float(start) / rate for start in starts]


@dataclass(frozen=True)
class Odd:
    """How a test video differs from plain 25 fps frames and stereo AAC that start together."""

    frame_times: tuple[Fraction, ...]  # s, one for each frame
    audio_seconds: float | None = 2.5  # None: no audio track
    audio_start: float = 0.0
    rate: int = 44_100
    layout: str = "stereo"
    silent: bool = False
    gain: float = 1.0  # of the bursts, which are clipped at full scale
    still: bool = False  # every frame is the first one
    size: tuple[int, int] = (96, 96)  # width, height
    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    frame_rate: Fraction = Fraction(25)
    colorspace: int | None = None
    rotation: int = 0
    hdr: bool = False  # tagged as PQ
    pixel_aspect: Fraction | None = None
    audio_tracks: int = 1  # the first is the one with the bursts, others are silent
    options: tuple[tuple[str, str], ...] = ()


def steady(seconds: float, fps=25, start=0) -> tuple[Fraction, ...]:
    """Frame times of a constant rate."""
    fps, start = Fraction(fps), Fraction(start)
    return tuple(start + n / fps for n in range(round(seconds * fps)))


def write_odd(path: Path, odd: Odd, container_options: dict | None = None) -> Path:
    """Write the file and return its path; the format goes by the ending."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        width, height = odd.size
        video = container.add_stream(odd.codec, rate=odd.frame_rate, width=width, height=height, pix_fmt=odd.pix_fmt)
        video.codec_context.time_base = Fraction(1, 90_000) if odd.codec == "libx264" else 1 / odd.frame_rate
        video.options = {"threads": "1", **dict(odd.options)}
        if odd.codec == "libx264":
            video.options = {"preset": "veryfast", "crf": "20", **video.options}
        if odd.colorspace is not None:
            video.codec_context.colorspace = odd.colorspace
        if odd.hdr:
            video.codec_context.color_trc = 16
        if odd.pixel_aspect:
            video.codec_context.sample_aspect_ratio = odd.pixel_aspect
        if odd.rotation:
            video.set_display_rotation(odd.rotation)
        unit = video.codec_context.time_base
        audio = None
        if odd.audio_seconds is not None:
            audio = container.add_stream("aac", rate=odd.rate, layout=odd.layout)
            others = [container.add_stream("aac", rate=odd.rate, layout=odd.layout) for _ in range(1, odd.audio_tracks)]
        packets = []
        for number, time in enumerate(odd.frame_times):
            frame = av.VideoFrame.from_ndarray(code_image(0 if odd.still else number, width, height), format="rgb24")
            frame.pts, frame.time_base = round(time / unit), unit
            packets += video.encode(frame)
        packets += video.encode(None)
        if audio is not None:
            packets += audio_packets(audio, odd)
            packets += [packet for other in others for packet in audio_packets(other, replace(odd, silent=True))]
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):  # interleaved as recorders do
            container.mux(packet)
    return path


def audio_packets(stream, odd: Odd) -> list[av.Packet]:
    channels = stream.codec_context.layout.nb_channels
    track = burst_track(odd.audio_seconds, odd.rate, odd.audio_start, channels) * (0 if odd.silent else odd.gain)
    track = np.clip(track, -1, 1)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(track), format="fltp", layout=odd.layout)
    frame.sample_rate, frame.time_base = odd.rate, Fraction(1, odd.rate)
    frame.pts = round(odd.audio_start * odd.rate)
    return [*stream.encode(frame), *stream.encode(None)]


def cut_without_encoding(source: Path, path: Path, start: float) -> Path:
    """Copy the packets from the keyframe before `start` on, with times that make `start` the beginning."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        packets = [packet for packet in old.demux() if packet.size]
        keys = [p.pts for p in packets if p.stream.type == "video" and p.is_keyframe and p.pts * p.time_base <= start]
        for packet in packets:
            if packet.stream.type == "video" and packet.pts < max(keys) and packet.dts < max(keys):
                continue
            if packet.stream.type == "audio" and packet.pts * packet.time_base < start - 0.05:
                continue
            shift = round(Fraction(start).limit_denominator(1000) / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = streams[packet.stream.index]
            new.mux(packet)
    return path


def remux(source: Path, path: Path, **options: str) -> Path:
    """The same packets in another container, by the ending."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                new.mux(packet)
    return path


def truncate(source: Path, path: Path, share: float) -> Path:
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def overwrite_packet(source: Path, path: Path, kind: str, seconds: float) -> Path:
    """Overwrite the inside of the packet of `kind` ("video" or "audio") that holds the time `seconds`."""
    with av.open(str(source)) as container:
        packets = [p for p in container.demux(container.streams.best(kind)) if p.size]
        packet = max((p for p in packets if p.pts * p.time_base <= seconds), key=lambda p: p.pts)
        position, size = packet.pos, packet.size
    data = bytearray(source.read_bytes())
    data[position : position + size] = bytes([0xFF]) * size
    path.write_bytes(data)
    return path


def retime_audio(source: Path, path: Path, time_of: Callable[[int, Fraction], Fraction | None]) -> Path:
    """Copy a file packet by packet; `time_of(number, time)` of an audio packet is its new time in s, None drops it."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        number, packets = 0, []
        for packet in old.demux():
            if not packet.size:
                continue
            if packet.stream.type == "audio":
                time = time_of(number, packet.pts * packet.time_base)
                number += 1
                if time is None:
                    continue
                packet.pts = packet.dts = round(time / packet.time_base)
            packets.append((packet.dts * packet.time_base, packet))
        for _, packet in sorted(packets, key=lambda pair: pair[0]):
            packet.stream = streams[packet.stream.index]
            new.mux(packet)
    return path


def joined_audio(path: Path, seconds: float, each: float, rate: int = 48_000) -> Path:
    """Video with AAC audio of pieces that were encoded one by one and joined without encoding, as editors do.

    Each piece has 1024 samples of priming and its padding, so the pieces overlap by their timestamps.
    """
    plain = Odd(steady(seconds), audio_seconds=None)
    with av.open(str(write_odd(path.with_suffix(".plain.mp4"), plain))) as old, av.open(str(path), "w") as new:
        video = new.add_stream_from_template(old.streams.video[0])
        audio = new.add_stream("aac", rate=rate, layout="mono")
        packets = [packet for packet in old.demux() if packet.size]
        for packet in packets:
            packet.stream = video
        for number in range(round(seconds / each)):
            encoder = av.CodecContext.create("aac", "w")
            encoder.sample_rate, encoder.layout, encoder.format = rate, "mono", "fltp"
            track = burst_track(each, rate, number * each)
            frame = av.AudioFrame.from_ndarray(track, format="fltp", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            begin = round(number * each * rate)
            for packet in [*encoder.encode(frame), *encoder.encode(None)]:
                packet.pts = packet.dts = packet.pts + begin
                packet.time_base, packet.stream = Fraction(1, rate), audio
                packets.append(packet)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            new.mux(packet)
    return path
