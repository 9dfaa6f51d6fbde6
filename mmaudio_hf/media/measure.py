"""Figures of one media file, measured cheaply: times, hashes, movement and loudness; `audit` decides the verdicts.

A file is read once as a whole: every packet gives its time and its bytes for the hashes, and the audio is decoded. Of
the frames at most eight are sampled, by seeking; to get at them, the ones before them back to a keyframe are decoded.
"""

import bisect
import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.stream
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

from mmaudio_hf.media.audio import channel_samples
from mmaudio_hf.media.container import MediaError, error_text, open_media

VERSION = 1  # of the measures: raise it when the same file gives other figures

SILENT_DBFS = -60.0  # a block of audio whose RMS is lower is silent
CLIPPED = 0.99  # a sample of any channel at or above this magnitude is clipped
STILL_CHANGE = 2.0  # of 255: two frames of which no cell differs by more are the same
CELLS = 16  # a frame is compared as 16x16 cells, each the mean of its pixels
QUARTERS = 4  # of the clip; two frames are sampled from each

_BLOCK = Fraction(1, 20)  # s of audio
_LOWEST_DBFS = -120.0
_UNEVEN = Fraction(1, 10)  # of the usual interval; a larger deviation is another interval
_ROUNDING = Fraction(2, 1000)  # s, by which containers that count milliseconds may be off


class _FramePacket(NamedTuple):
    """A packet of the video track that is shown."""

    time: Fraction  # s
    size: int  # bytes
    key: bool
    duration: Fraction  # s, 0 if unknown


def measure(path: str | os.PathLike, kind: str, duration: float = 8.0) -> dict[str, Any]:
    """Figures of one file as plain JSON values, None where the file has no such thing. Columns of the audit's table.

    kind: "video", whose level, silence, clipping and movement are those of the first `duration` seconds from where
    both tracks have begun, which is what training sees; or "audio", where frames are ignored and the whole file counts.
    "damage" is what went wrong while reading, "" if nothing did; a file that does not open has only that and the hash
    of its bytes. OSError for faults of the machine.
    """
    assert kind in ("video", "audio"), kind
    figures: dict[str, Any] = {"file_sha256": _file_hash(path), "damage": "", "opened": False}
    try:
        with open_media(path) as container:
            figures["opened"] = True
            figures |= _measured(container, kind, Fraction(duration).limit_denominator(1_000_000))
    except MediaError as error:
        figures["damage"] = str(error).removeprefix(f"{path}: ")
    samples = figures.pop("_samples", None)
    if samples:
        damage = figures["damage"]
        figures |= _movement(path, samples)
        figures["damage"] = damage or figures["damage"]
    return figures


def _file_hash(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _streams(container: InputContainer, kind: str) -> tuple[VideoStream | None, AudioStream | None]:
    """The tracks that extraction reads; the cover image of an audio file is no video."""
    video = container.streams.best("video") if kind == "video" else None
    if video is not None and av.stream.Disposition.attached_pic in video.disposition:
        video = None
    return video, container.streams.best("audio")


def _measured(container: InputContainer, kind: str, duration: Fraction) -> dict[str, Any]:
    video, audio = _streams(container, kind)
    stated = container.duration and Fraction(container.duration, av.time_base)
    figures: dict[str, Any] = {"container": container.format.name, "stated_duration": _rounded(stated)}
    video_track, audio_track = _VideoTrack(video), _AudioTrack(audio)
    streams = [stream for stream in (video, audio) if stream is not None]
    for packet in _packets(container, streams, audio_track):
        (video_track if packet.stream is video else audio_track).add(packet)
    if audio is not None and container.format.name == "flac" and audio.duration not in (None, 0, audio_track.count):
        audio_track.damage = (
            audio_track.damage or f"{audio_track.count} of {audio.duration} samples of the audio can be read"
        )
    figures |= video_track.figures() | audio_track.figures()
    starts = [t for t in (video_track.start, audio_track.start) if t is not None]
    if kind == "video" and len(starts) == 2:
        figures["start_gap"] = _rounded(audio_track.start - video_track.start)
    ends = [t.end for t in (video_track, audio_track) if t.start is not None]
    begin = max(starts, default=Fraction(0))
    figures["duration"] = _rounded(max(Fraction(0), min(ends, default=begin) - begin))
    if audio_track.start is not None:
        figures |= audio_track.levels(begin, duration if kind == "video" else None)
    if video_track.packets:
        figures["_samples"] = video_track.samples(begin, duration)
    figures["damage"] = video_track.damage or audio_track.damage
    return figures


def _packets(container: InputContainer, streams: list, audio_track: "_AudioTrack") -> Iterator[av.Packet]:
    """Packets with data, in file order, as far as the file can be read."""
    if not streams:
        return
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets, None)
        except (av.error.FFmpegError, OSError) as error:
            audio_track.damage = audio_track.damage or f"cannot be read to its end ({error_text(error)})"
            return
        if packet is None:
            return
        if packet.stream in streams:
            yield packet


class _VideoTrack:
    """Times and bytes of the frames; none is decoded."""

    def __init__(self, stream: VideoStream | None):
        self.stream, self.hash, self.damage = stream, hashlib.sha256(), ""
        self.packets: list[_FramePacket] = []

    def add(self, packet: av.Packet) -> None:
        if not packet.size:  # the end of the track
            return
        self.hash.update(packet)
        ticks = packet.dts if packet.pts is None else packet.pts
        if packet.is_corrupt:
            self.damage = self.damage or "a frame is incomplete"
        if ticks is None:
            self.damage = self.damage or "its frames come without timestamps; convert it to mp4"
        elif not packet.is_discard:
            unit = packet.time_base
            duration = (packet.duration or 0) * unit
            self.packets.append(_FramePacket(ticks * unit, packet.size, packet.is_keyframe, duration))

    @property
    def start(self) -> Fraction | None:
        return min(packet.time for packet in self.packets) if self.packets else None

    @property
    def end(self) -> Fraction:
        last = max(self.packets)
        usual = (last.time - self.start) / (len(self.packets) - 1) if len(self.packets) > 1 else Fraction(0)
        return last.time + (last.duration or usual)

    def figures(self) -> dict[str, Any]:
        if self.stream is None:
            return {}
        context = self.stream.codec_context
        figures = {"video_codec": context.name, "width": context.width, "height": context.height}
        figures["frames"] = len(self.packets)
        if not self.packets:
            return figures
        times = sorted(packet.time for packet in self.packets)
        intervals = sorted(b - a for a, b in itertools.pairwise(times))
        if intervals:
            usual = intervals[len(intervals) // 2]
            limit = max(_UNEVEN * usual, _ROUNDING)
            figures["fps"] = _rounded(len(intervals) / (times[-1] - times[0])) if times[-1] > times[0] else None
            figures["uneven_intervals"] = _rounded(
                Fraction(sum(abs(value - usual) > limit for value in intervals), len(intervals))
            )
        return figures | {
            "video_start": _rounded(self.start),
            "video_duration": _rounded(self.end - self.start),
            "video_hash": self.hash.hexdigest()[:32],
        }

    def samples(self, begin: Fraction, duration: Fraction) -> list[tuple[Fraction, Fraction]]:
        """(time, time of the keyframe before it) of the frames to decode, in order.

        Of each quarter of the clip the first frame, and the one with the most bytes that is no keyframe: the encoder
        spent them on something that moved there.
        """
        packets = sorted(self.packets)
        keys = [packet.time for packet in packets if packet.key]
        shown = [packet for packet in packets if begin <= packet.time < begin + duration] or packets[:1]
        length = min(duration, shown[-1].time - begin) / QUARTERS
        times = set()
        for quarter in range(QUARTERS):
            first = bisect.bisect_left(shown, begin + quarter * length, key=lambda packet: packet.time)
            last = bisect.bisect_left(shown, begin + (quarter + 1) * length, key=lambda packet: packet.time)
            inside = shown[first : max(last, first + 1)] or shown[-1:]
            moved = [packet for packet in inside[1:] if not packet.key] or inside[-1:]
            times |= {inside[0].time, max(moved, key=lambda packet: packet.size).time}
        before = [bisect.bisect_right(keys, time) - 1 for time in sorted(times)]
        return [(time, keys[max(0, k)] if keys else time) for time, k in zip(sorted(times), before, strict=True)]


class _AudioTrack:
    """The decoded audio in blocks of 50 ms."""

    def __init__(self, stream: AudioStream | None):
        self.stream, self.hash, self.damage = stream, hashlib.sha256(), ""
        self.packets = self.count = self.rate = self.channels = 0
        self.start: Fraction | None = None
        self.peak = 0.0
        self.rest = np.zeros((2, 0), np.float32)  # mono, share of the channels that are clipped
        self.power: list[np.ndarray] = []  # mean square of each block, mono
        self.clipped: list[np.ndarray] = []

    def add(self, packet: av.Packet) -> None:
        if packet.size:
            self.packets += 1
            self.hash.update(packet)
        try:
            for frame in packet.decode():
                self._add_frame(frame)
        except (av.error.FFmpegError, OSError) as error:
            self.damage = self.damage or f"the audio cannot be decoded at {self.count / (self.rate or 1):.2f} s"
            self.damage += f" ({error_text(error)})" if "(" not in self.damage else ""

    def _add_frame(self, frame: av.AudioFrame) -> None:
        if self.start is None:
            self.rate, self.channels = frame.sample_rate, frame.layout.nb_channels
            self.start = (frame.pts or 0) * (frame.time_base or Fraction(1))
        elif frame.sample_rate != self.rate:
            self.damage = self.damage or "the sample rate changes within the file"
            return
        channels = channel_samples(frame)
        self.count += channels.shape[1]
        level = np.abs(channels)
        mono = channels.mean(axis=0, dtype=np.float32)
        self.peak = float(np.maximum(self.peak, np.abs(mono).max(initial=0)))  # keeps NaN
        clipped = (level >= CLIPPED).mean(axis=0, dtype=np.float32)
        self.rest = np.concatenate([self.rest, [mono, clipped]], axis=1)
        if self.rest.shape[1] >= self.rate:
            self._reduce()

    @property
    def block(self) -> int:
        return max(1, round(_BLOCK * self.rate))

    def _reduce(self) -> None:
        whole = self.rest.shape[1] // self.block * self.block
        mono, clipped = self.rest[:, :whole].reshape(2, -1, self.block)
        self.power.append((mono.astype(np.float64) ** 2).mean(axis=1))
        self.clipped.append(clipped.mean(axis=1))
        self.rest = self.rest[:, whole:].copy()

    @property
    def end(self) -> Fraction:
        return self.start + Fraction(self.count, self.rate)

    def figures(self) -> dict[str, Any]:
        if self.stream is None:
            return {}
        figures: dict[str, Any] = {"audio_codec": self.stream.codec_context.name}
        if self.packets:
            figures["audio_hash"] = self.hash.hexdigest()[:32]
        if self.start is None:
            return figures
        if not np.isfinite(self.peak):
            self.damage = self.damage or "has samples that are not finite numbers"
        return figures | {
            "sample_rate": self.rate,
            "channels": self.channels,
            "audio_start": _rounded(self.start),
            "audio_duration": _rounded(self.end - self.start),
        }

    def levels(self, begin: Fraction, duration: Fraction | None) -> dict[str, Any]:
        """Peak of the whole track; level, silence and clipping from `begin` on."""
        self._reduce()  # less than a block at the end is left out
        power, clipped = np.concatenate(self.power), np.concatenate(self.clipped)
        first = int((begin - self.start) / _BLOCK)
        last = None if duration is None else first + int(duration / _BLOCK)
        power, clipped = (values[first:last] for values in (power, clipped))
        if not len(power) or not np.isfinite(self.peak):
            return {}
        quiet = power < 10 ** (SILENT_DBFS / 10)
        return {
            "peak": _rounded(self.peak),
            "level_dbfs": _rounded(max(_LOWEST_DBFS, 10 * np.log10(max(power.mean(), 1e-30)))),
            "silent_fraction": _rounded(quiet.mean()),
            "clipped_fraction": _rounded(clipped.mean()),
        }


def _movement(path: str | os.PathLike, samples: list[tuple[Fraction, Fraction]]) -> dict[str, Any]:
    """How much the sampled frames differ, and how the file asks to rotate them."""
    cells, rotation = [], None
    figures: dict[str, Any] = {}
    try:
        for frame in _sampled(path, samples):
            rotation = frame.rotation % 360 if rotation is None else rotation
            small = frame.reformat(width=CELLS, height=CELLS, format="gray", interpolation="AREA")
            cells.append(small.to_ndarray().astype(np.int16))
            if frame.is_corrupt:
                figures["damage"] = f"the frame at {frame.time:.2f} s is damaged"
    except (av.error.FFmpegError, OSError, MediaError) as error:
        figures["damage"] = f"a frame cannot be decoded ({error_text(error)})"
    changes = np.array([np.abs(a - b).max() for a, b in itertools.pairwise(cells)])
    figures |= {"rotation": rotation, "sampled_pictures": len(cells)}
    if cells:
        figures["still_fraction"] = _rounded((changes <= STILL_CHANGE).mean()) if len(changes) else 1.0
        figures["largest_change"] = _rounded(changes.max(initial=0))
    return figures


def _sampled(path: str | os.PathLike, samples: list[tuple[Fraction, Fraction]]) -> Iterator[av.VideoFrame]:
    """Decode the frames of these times, from the keyframe before each one on."""
    with open_media(path) as container:
        stream = container.streams.best("video")
        # Frames that no other one refers to and the smoothing of block edges cost half the time and show no movement.
        stream.codec_context.skip_frame = "NONREF"
        stream.codec_context.options = {"skip_loop_filter": "all"}
        frames, reached = container.decode(stream), None  # the keyframe that decoding started from
        for time, key in samples:
            if reached is not None and key > reached:
                with contextlib.suppress(av.error.FFmpegError):  # what cannot be sought is read on
                    container.seek(int(time / stream.time_base), stream=stream)
                    frames = container.decode(stream)
            reached = key
            for frame in frames:
                ticks = frame.dts if frame.pts is None else frame.pts
                if ticks is None or ticks * frame.time_base >= time:
                    yield frame
                    break


def _rounded(value: float | Fraction | None) -> float | None:
    return None if value is None else round(float(value), 6)


def file_key(path: str | os.PathLike) -> tuple[int, int] | None:
    """(bytes, mtime in ns) of a file, None if there is none: with its path, the key of its figures."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (status.st_size, status.st_mtime_ns) if Path(path).is_file() else None
