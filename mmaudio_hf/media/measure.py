"""Figures of one media file, measured cheaply: times, hashes, movement and loudness; `audit` decides the verdicts.

A file is read once as a whole: every packet gives its time and its bytes for the hashes, and the audio is decoded. Of
the frames at most eight are sampled, by seeking; to get at them, the ones before them back to a keyframe are decoded.
"""

import base64
import bisect
import contextlib
import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.stream
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image

from mmaudio_hf.files import sha256_of
from mmaudio_hf.media.audio import AudioTrack, channel_samples
from mmaudio_hf.media.container import (
    MediaError,
    audio_stream,
    check_not_encrypted,
    error_text,
    open_media,
    seconds,
    video_stream,
)

VERSION = 4  # of the measures: raise it when the same file gives other figures

SILENT_DBFS = -60.0  # a block of audio whose RMS is lower is silent
CLIPPED = 0.99  # a sample of any channel at or above this magnitude is clipped
STILL_CHANGE = 2.0  # of 255: two frames of which no cell differs by more are the same
CELLS = 16  # a frame is compared as 16x16 cells, each the mean of its pixels
QUARTERS = 4  # of the clip; two frames are sampled from each

_BLOCK = Fraction(1, 20)  # s of audio
_LOWEST_DBFS = -120.0
_UNEVEN = Fraction(1, 10)  # of the usual interval; a larger deviation is another interval
_HDR = {16: "PQ", 18: "HLG"}  # transfer functions of FFmpeg (AVCOL_TRC) that need more than 8 bits
_THUMBNAIL_HEIGHT = 80  # pixels
_ROUNDING = Fraction(2, 1000)  # s, by which containers that count milliseconds may be off


class _FramePacket(NamedTuple):
    time: Fraction  # s
    size: int  # bytes
    key: bool
    duration: Fraction  # s, 0 if unknown


def measure(
    path: str | os.PathLike, kind: str, duration: float = 8.0, starts: Sequence[float] = (0.0,)
) -> dict[str, Any]:
    """Figures of one file as plain JSON values, None where the file has no such thing. Columns of the audit's table.

    kind: "video", whose level, silence, clipping and movement are those of `duration` seconds from where both tracks
    have begun and each of `starts` on, which is what training sees, and under "clips" unless the one start is 0; or
    "audio", where frames are ignored and the whole file counts.
    "damage" is what went wrong while reading, "" if nothing did; a file that does not open, or is encrypted, has only
    that and the hash of its bytes. OSError for faults of the machine.
    """
    assert kind in ("video", "audio"), kind
    figures: dict[str, Any] = {"file_sha256": sha256_of(Path(path)), "damage": "", "opened": False}
    try:
        with open_media(path) as container:
            spans = [Fraction(second).limit_denominator(1_000_000) for second in (duration, *starts)]
            measured, samples = _measured(path, container, kind, *spans)
    except MediaError as error:
        return figures | {"damage": str(error).removeprefix(f"{path}: ")}
    figures |= {"opened": True, **measured}
    for clip, of_clip in zip(figures["clips"], samples, strict=True):
        if of_clip:
            clip |= _movement(path, of_clip)
        clip["damage"] = figures["damage"] or clip.get("damage", "")
    return figures if any(starts) or len(starts) > 1 else figures | figures.pop("clips")[0]


_Samples = list[tuple[Fraction, Fraction]]
"""(time, time of the keyframe before it) of the frames to decode, in order."""


def _measured(
    path: str | os.PathLike, container: InputContainer, kind: str, duration: Fraction, *starts: Fraction
) -> tuple[dict[str, Any], list[_Samples]]:
    video, audio = video_stream(container) if kind == "video" else None, audio_stream(container)
    if video is not None and av.stream.Disposition.attached_pic in video.disposition:
        video = None  # the cover image of an audio file
    stated = seconds(container.duration or None, Fraction(1, av.time_base))
    figures: dict[str, Any] = {"container": container.format.name, "stated_duration": _rounded(stated)}
    frames, level = _VideoTrack(video), _AudioLevel(path, container, audio)
    streams = [stream for stream in (video, audio) if stream is not None]
    end_error = ""
    try:
        for packet in container.demux(*streams) if streams else ():
            check_not_encrypted(path, packet)
            (frames if packet.stream is video else level).add(packet)
    except (av.error.FFmpegError, OSError) as error:
        if not (level.track and level.track.is_end(error)):
            end_error = f"cannot be read to its end ({error_text(error)})"
    figures |= frames.figures() | level.figures()
    if kind == "video" and frames.start is not None and level.start is not None:
        figures["start_gap"] = _rounded(level.start - frames.start)
    spans = [(track.start, track.end) for track in (frames, level) if track.start is not None]
    begin = max((start for start, _ in spans), default=Fraction(0))
    end = min((end for _, end in spans), default=begin)
    figures["duration"] = _rounded(max(Fraction(0), end - begin))
    length = duration if kind == "video" else None
    figures["clips"] = [level.levels(begin + start, length) if level.start is not None else {} for start in starts]
    figures["damage"] = frames.damage or level.damage(whole=kind == "audio") or end_error
    return figures, [frames.samples(begin + start, duration) if frames.packets else [] for start in starts]


class _VideoTrack:
    """Times and bytes of the frames; none is decoded."""

    def __init__(self, stream: VideoStream | None):
        self.stream, self.hash, self.damage = stream, hashlib.sha256(), ""
        self.packets: list[_FramePacket] = []

    def add(self, packet: av.Packet) -> None:
        if not packet.size:  # the end of the track
            return
        self.hash.update(packet)
        time = seconds(packet.dts if packet.pts is None else packet.pts, packet.time_base)
        if packet.is_corrupt:
            self.damage = self.damage or "a frame is incomplete"
        if time is None:
            self.damage = self.damage or "its frames come without timestamps; convert it to mp4"
        elif not packet.is_discard:
            duration = seconds(packet.duration or 0, packet.time_base) or Fraction(0)
            self.packets.append(_FramePacket(time, packet.size, packet.is_keyframe, duration))

    @property
    def start(self) -> Fraction | None:
        return min(packet.time for packet in self.packets) if self.packets else None

    @property
    def end(self) -> Fraction:
        first, last = min(self.packets), max(self.packets)
        usual = (last.time - first.time) / (len(self.packets) - 1) if len(self.packets) > 1 else Fraction(0)
        return last.time + (last.duration or usual)

    def figures(self) -> dict[str, Any]:
        if self.stream is None:
            return {}
        context = self.stream.codec_context
        figures = {"video_codec": context.name, "width": context.width, "height": context.height}
        aspect = self.stream.sample_aspect_ratio
        figures |= {"frames": len(self.packets), "pixel_aspect": _rounded(aspect or Fraction(1))}
        figures["hdr"] = _HDR.get(int(context.color_trc))
        if not self.packets:
            return figures
        times = sorted(packet.time for packet in self.packets)
        intervals = sorted(b - a for a, b in itertools.pairwise(times))
        if intervals:
            usual = intervals[len(intervals) // 2]
            uneven = sum(abs(value - usual) > max(_UNEVEN * usual, _ROUNDING) for value in intervals)
            figures["fps"] = _rounded(len(intervals) / (times[-1] - times[0])) if times[-1] > times[0] else None
            figures["uneven_intervals"] = _rounded(Fraction(uneven, len(intervals)))
        return figures | {
            "video_start": _rounded(times[0]),
            "video_duration": _rounded(self.end - times[0]),
            "video_hash": self.hash.hexdigest()[:32],
        }

    def samples(self, begin: Fraction, duration: Fraction) -> _Samples:
        """Of each quarter of the clip the first frame, and the one with the most bytes that is no keyframe.

        The encoder spent them on something that moved there.
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


class _AudioLevel:
    """The decoded audio in blocks of 50 ms."""

    def __init__(self, path: str | os.PathLike, container: InputContainer, stream: AudioStream | None):
        self.hash = hashlib.sha256()
        self.track = None if stream is None else AudioTrack(path, container, stream)
        self.others = len(container.streams.audio) - 1
        self.packets = self.rate = self.channels = 0
        self.start: Fraction | None = None
        self.peak = 0.0
        self.rest = np.zeros((2, 0), np.float32)  # mono, share of the channels that are clipped
        self.power: list[np.ndarray] = []  # mean square of each block, mono
        self.clipped: list[np.ndarray] = []

    def add(self, packet: "av.Packet[Any]") -> None:
        assert self.track is not None, "the packet is of it"
        if packet.size:
            self.packets += 1
            self.hash.update(packet)
        for frame in self.track.decode(packet):
            self._add_frame(self.track, frame)

    def _add_frame(self, track: AudioTrack, frame: av.AudioFrame) -> None:
        if self.start is None:
            self.rate, self.channels = frame.sample_rate, frame.layout.nb_channels
            self.start = seconds(frame.pts, frame.time_base) or Fraction(0)
        channels = channel_samples(frame)
        mono = channels.mean(axis=0, dtype=np.float32)
        for _ in track.add(frame, mono):
            pass  # for its counts alone: levels hardly depend on where a hole is
        self.peak = float(np.maximum(self.peak, np.abs(mono).max(initial=0)))  # keeps NaN
        clipped = (np.abs(channels) >= CLIPPED).mean(axis=0, dtype=np.float32)
        self.rest = np.concatenate([self.rest, [mono, clipped]], axis=1)
        if self.rest.shape[1] >= self.rate:
            self._reduce()

    def damage(self, whole: bool) -> str:
        """What cannot be decoded; whole: also what is missing of the length that the file states."""
        if self.track is None:
            return ""
        error = self.track.finish() if whole else self.track.error
        if not error and not np.isfinite(self.peak):
            error = "has samples that are not finite numbers"
        return error and f"the audio is damaged: {error}"

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
        assert self.track is not None and self.track.placement is not None and self.start is not None
        for _ in self.track.placement.flush():
            pass
        return self.start + Fraction(self.track.placement.count, self.rate)

    def figures(self) -> dict[str, Any]:
        if self.track is None:
            return {}
        name = self.track.stream.codec_context.name
        figures: dict[str, Any] = {"audio_codec": name, "audio_tracks": self.others + 1}
        if self.packets:
            figures["audio_hash"] = self.hash.hexdigest()[:32]
        if self.start is None or self.track.placement is None:
            return figures
        return figures | {
            "sample_rate": self.rate,
            "channels": self.channels,
            "audio_start": _rounded(self.start),
            "audio_duration": _rounded(self.end - self.start),
            "audio_drift": _rounded(Fraction(self.track.placement.drift, self.rate)),
        }

    def levels(self, begin: Fraction, duration: Fraction | None) -> dict[str, Any]:
        """Peak of the whole track; level, silence and clipping from `begin` on."""
        assert self.start is not None
        self._reduce()  # less than a block at the end is left out
        first = int((begin - self.start) / _BLOCK)
        last = None if duration is None else first + int(duration / _BLOCK)
        power, clipped = (np.concatenate(values)[first:last] for values in (self.power, self.clipped))
        if not len(power) or not np.isfinite(self.peak):
            return {}
        quiet = power < 10 ** (SILENT_DBFS / 10)
        return {
            "peak": _rounded(self.peak),
            "level_dbfs": _rounded(max(_LOWEST_DBFS, 10 * np.log10(max(power.mean(), 1e-30)))),
            "silent_fraction": _rounded(quiet.mean()),
            "clipped_fraction": _rounded(clipped.mean()),
        }


def _movement(path: str | os.PathLike, samples: _Samples) -> dict[str, Any]:
    cells, thumbnails, interlaced, rotation = [], [], False, None
    figures: dict[str, Any] = {}
    try:
        for number, frame in enumerate(_sampled(path, samples)):
            rotation = frame.rotation % 360 if rotation is None else rotation
            interlaced = interlaced or frame.interlaced_frame
            small = frame.reformat(width=CELLS, height=CELLS, format="gray", interpolation="AREA")
            cells.append(small.to_ndarray().astype(np.int16))
            if number % 2 == 0:  # the first of each quarter
                height = _THUMBNAIL_HEIGHT
                width = min(2 * height, max(height // 2, round(height * frame.width / frame.height)))
                rgb = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
                thumbnails.append(Image.fromarray(rgb).rotate(rotation, expand=True))
            if frame.is_corrupt:
                figures["damage"] = f"the frame at {frame.time:.2f} s is damaged"
    except (av.error.FFmpegError, OSError, MediaError) as error:
        figures["damage"] = f"a frame cannot be decoded ({error_text(error)})"
    changes = np.array([np.abs(a - b).max() for a, b in itertools.pairwise(cells)])
    figures |= {"rotation": rotation, "sampled_pictures": len(cells), "interlaced": interlaced}
    if cells:
        figures["still_fraction"] = _rounded((changes <= STILL_CHANGE).mean()) if len(changes) else 1.0
        figures["largest_change"] = _rounded(changes.max(initial=0))
        size, left = (sum(image.width for image in thumbnails), max(image.height for image in thumbnails)), 0
        strip, buffer = Image.new("RGB", size), io.BytesIO()
        for image in thumbnails:
            strip.paste(image, (left, 0))
            left += image.width
        strip.save(buffer, "JPEG", quality=60)  # about 5 kB
        figures["thumbnails"] = base64.b64encode(buffer.getvalue()).decode()
    return figures


def _sampled(path: str | os.PathLike, samples: _Samples) -> Iterator[av.VideoFrame]:
    """Decode the frames of these times, from the keyframe before each one on."""
    with open_media(path) as container:
        stream = video_stream(container)
        assert stream is not None and stream.time_base, "its packets have been read"
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
                shown = seconds(frame.dts if frame.pts is None else frame.pts, frame.time_base)
                if shown is None or shown >= time:
                    yield frame
                    break


def _rounded(value: float | Fraction | None) -> float | None:
    return None if value is None else round(float(value), 6)
