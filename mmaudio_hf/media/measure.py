"""What one media file holds, measured cheaply: times, hashes, movement and loudness. `audit` judges the figures.

A file is read once as a whole: every packet gives its time and its bytes for the hashes, and the sound is decoded. Of
the pictures at most eight are looked at, found by seeking; to get at them, the ones before them back to a key picture
are decoded.
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
from av.container import InputContainer

from mmaudio_hf.media.audio import MediaError, channel_samples, open_media

VERSION = 1  # of the measures: raise it when the same file gives other figures

SILENT_DBFS = -60.0  # a block of sound whose RMS is lower is silent
CLIPPED = 0.99  # a sample of any channel at or above this magnitude is clipped
STILL_CHANGE = 2.0  # of 255: two pictures of which no cell differs by more are the same
CELLS = 16  # a picture is compared as 16x16 cells, each the mean of its pixels
QUARTERS = 4  # of the clip; two pictures are taken from each

_BLOCK = Fraction(1, 20)  # s of sound
_LOWEST_DBFS = -120.0
_UNEVEN = Fraction(1, 10)  # of the usual interval; a larger deviation is another interval
_ROUNDING = Fraction(2, 1000)  # s, by which containers that count milliseconds may be off


class _Picture(NamedTuple):
    """A packet of the video track that is shown."""

    time: Fraction  # s
    size: int  # bytes
    key: bool
    duration: Fraction  # s, 0 if unknown


def measure(path: str | os.PathLike, kind: str, duration: float = 8.0) -> dict[str, Any]:
    """Figures of one file as plain JSON values, None where the file has no such thing. Columns of the audit's table.

    kind: "video", whose level, silence, clipping and movement are those of the first `duration` seconds from where
    both tracks have begun, which is what training sees; or "audio", where pictures are ignored and the whole counts.
    "damage" is what went wrong while reading, "" if nothing did; a file that does not open has only that and the hash
    of its bytes. OSError for faults of the machine.
    """
    assert kind in ("video", "audio"), kind
    facts: dict[str, Any] = {"file_sha256": _file_hash(path), "damage": "", "opened": False}
    try:
        with open_media(path) as container:
            facts["opened"] = True
            facts |= _measured(container, kind, Fraction(duration).limit_denominator(1_000_000))
    except MediaError as error:
        facts["damage"] = str(error).removeprefix(f"{path}: ")
    if facts.get("frames"):
        facts |= _movement(path, facts)
    facts.pop("_samples", None)
    return facts


def _file_hash(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _streams(container: InputContainer, kind: str):
    """The tracks that extraction reads; the cover of a recording is no video."""
    video = container.streams.best("video") if kind == "video" else None
    if video is not None and av.stream.Disposition.attached_pic in video.disposition:
        video = None
    return video, container.streams.best("audio")


def _measured(container: InputContainer, kind: str, duration: Fraction) -> dict[str, Any]:
    video, audio = _streams(container, kind)
    stated = container.duration and Fraction(container.duration, av.time_base)
    facts: dict[str, Any] = {"container": container.format.name, "stated_duration": _rounded(stated)}
    track, sound = _VideoTrack(video), _Sound(audio)
    wanted = [stream for stream in (video, audio) if stream is not None]
    for packet in _packets(container, wanted, sound):
        (track if packet.stream is video else sound).add(packet)
    if audio is not None and container.format.name == "flac" and audio.duration not in (None, 0, sound.count):
        sound.damage = sound.damage or f"{sound.count} of {audio.duration} samples of the sound can be read"
    facts |= track.facts() | sound.facts()
    starts = [t for t in (track.start, sound.start) if t is not None]
    if kind == "video" and len(starts) == 2:
        facts["start_gap"] = _rounded(sound.start - track.start)
    ends = [t.end for t in (track, sound) if t.start is not None]
    begin = max(starts, default=Fraction(0))
    facts["duration"] = _rounded(max(Fraction(0), min(ends, default=begin) - begin))
    if sound.start is not None:
        facts |= sound.levels(begin, duration if kind == "video" else None)
    if track.pictures:
        facts["_samples"] = track.samples(begin, duration)
    facts["damage"] = track.damage or sound.damage
    return facts


def _packets(container: InputContainer, wanted: list, sound: "_Sound") -> Iterator[av.Packet]:
    """Packets with data, in file order, as far as the file can be read."""
    if not wanted:
        return
    packets = container.demux(*wanted)
    while True:
        try:
            packet = next(packets, None)
        except (av.error.FFmpegError, OSError) as error:
            sound.damage = sound.damage or f"cannot be read to its end ({_text(error)})"
            return
        if packet is None:
            return
        if packet.stream in wanted:
            yield packet


class _VideoTrack:
    """Times and bytes of the pictures; none is decoded."""

    def __init__(self, stream):
        self.stream, self.hash, self.damage = stream, hashlib.sha256(), ""
        self.pictures: list[_Picture] = []

    def add(self, packet: av.Packet) -> None:
        if not packet.size:  # the end of the track
            return
        self.hash.update(packet)
        ticks = packet.dts if packet.pts is None else packet.pts
        if packet.is_corrupt:
            self.damage = self.damage or "a picture is incomplete"
        if ticks is None:
            self.damage = self.damage or "its pictures come without times; convert it to mp4"
        elif not packet.is_discard:
            unit = packet.time_base
            self.pictures.append(_Picture(ticks * unit, packet.size, packet.is_keyframe, (packet.duration or 0) * unit))

    @property
    def start(self) -> Fraction | None:
        return min(picture.time for picture in self.pictures) if self.pictures else None

    @property
    def end(self) -> Fraction:
        last = max(self.pictures)
        usual = (last.time - self.start) / (len(self.pictures) - 1) if len(self.pictures) > 1 else Fraction(0)
        return last.time + (last.duration or usual)

    def facts(self) -> dict[str, Any]:
        if self.stream is None:
            return {}
        context = self.stream.codec_context
        facts = {"video_codec": context.name, "width": context.width, "height": context.height}
        facts["frames"] = len(self.pictures)
        if not self.pictures:
            return facts
        times = sorted(picture.time for picture in self.pictures)
        intervals = sorted(b - a for a, b in itertools.pairwise(times))
        if intervals:
            usual = intervals[len(intervals) // 2]
            limit = max(_UNEVEN * usual, _ROUNDING)
            facts["fps"] = _rounded(len(intervals) / (times[-1] - times[0])) if times[-1] > times[0] else None
            facts["uneven_intervals"] = _rounded(
                Fraction(sum(abs(value - usual) > limit for value in intervals), len(intervals))
            )
        return facts | {
            "video_start": _rounded(self.start),
            "video_duration": _rounded(self.end - self.start),
            "video_hash": self.hash.hexdigest()[:32],
        }

    def samples(self, begin: Fraction, duration: Fraction) -> list[tuple[Fraction, Fraction]]:
        """(time, time of the key picture before it) of the pictures to look at, in order.

        Of each quarter of the clip the first picture, and the one with the most bytes that is no key picture: the
        encoder spent them on something that moved there.
        """
        pictures = sorted(self.pictures)
        keys = [picture.time for picture in pictures if picture.key]
        shown = [picture for picture in pictures if begin <= picture.time < begin + duration] or pictures[:1]
        length = min(duration, shown[-1].time - begin) / QUARTERS
        times = set()
        for quarter in range(QUARTERS):
            first = bisect.bisect_left(shown, begin + quarter * length, key=lambda picture: picture.time)
            last = bisect.bisect_left(shown, begin + (quarter + 1) * length, key=lambda picture: picture.time)
            inside = shown[first : max(last, first + 1)] or shown[-1:]
            moved = [picture for picture in inside[1:] if not picture.key] or inside[-1:]
            times |= {inside[0].time, max(moved, key=lambda picture: picture.size).time}
        before = [bisect.bisect_right(keys, time) - 1 for time in sorted(times)]
        return [(time, keys[max(0, k)] if keys else time) for time, k in zip(sorted(times), before, strict=True)]


class _Sound:
    """The decoded sound in blocks of 50 ms."""

    def __init__(self, stream):
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
            self.damage = self.damage or f"the sound cannot be decoded at {self.count / (self.rate or 1):.2f} s"
            self.damage += f" ({_text(error)})" if "(" not in self.damage else ""

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

    def facts(self) -> dict[str, Any]:
        if self.stream is None:
            return {}
        facts: dict[str, Any] = {"audio_codec": self.stream.codec_context.name}
        if self.packets:
            facts["audio_hash"] = self.hash.hexdigest()[:32]
        if self.start is None:
            return facts
        if not np.isfinite(self.peak):
            self.damage = self.damage or "has samples that are not finite numbers"
        return facts | {
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


def _movement(path, facts: dict[str, Any]) -> dict[str, Any]:
    """How much the sampled pictures differ, and how the file wants them turned."""
    cells, rotation = [], None
    found: dict[str, Any] = {}
    try:
        for frame in _sampled(path, facts["_samples"]):
            rotation = frame.rotation % 360 if rotation is None else rotation
            small = frame.reformat(width=CELLS, height=CELLS, format="gray", interpolation="AREA")
            cells.append(small.to_ndarray().astype(np.int16))
            if frame.is_corrupt:
                found["damage"] = facts["damage"] or f"the picture at {frame.time:.2f} s is damaged"
    except (av.error.FFmpegError, OSError, MediaError) as error:
        found["damage"] = facts["damage"] or f"a picture cannot be decoded ({_text(error)})"
    changes = np.array([np.abs(a - b).max() for a, b in itertools.pairwise(cells)])
    found |= {"rotation": rotation, "sampled_pictures": len(cells)}
    if cells:
        found["still_fraction"] = _rounded((changes <= STILL_CHANGE).mean()) if len(changes) else 1.0
        found["largest_change"] = _rounded(changes.max(initial=0))
    return found


def _sampled(path, samples: list[tuple[Fraction, Fraction]]) -> Iterator[av.VideoFrame]:
    """Decode the pictures of these times, from the key picture before each one on."""
    with open_media(path) as container:
        stream = container.streams.best("video")
        # Pictures that no other one refers to and the smoothing of block edges cost half the time and show no movement.
        stream.codec_context.skip_frame = "NONREF"
        stream.codec_context.options = {"skip_loop_filter": "all"}
        frames, reached = container.decode(stream), None  # the key picture that decoding started from
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


def _text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _rounded(value) -> float | None:
    return None if value is None else round(float(value), 6)


def file_key(path: str | os.PathLike) -> tuple[int, int] | None:
    """(bytes, mtime in ns) of a file, None if there is none: with its path, what a measure is kept under."""
    try:
        facts = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (facts.st_size, facts.st_mtime_ns) if Path(path).is_file() else None
