"""Video files to pictures at 8 and 25 fps and mono sound, and new sound under a video. PyAV alone decodes.

Both picture rates and the sound come from one pass over the file. A source picture is shown from its own time on
until the next one's, so with one picture of look-ahead it is known, before any conversion, whether and where it is
shown; what is never shown is never converted, and what is repeated is resized once per output size.
"""

import contextlib
import itertools
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.filter
import numpy as np
import torch
import torch.nn.functional as F

from mmaudio_hf.media.audio import (
    PEAK,
    SILENCE,
    MediaError,
    mono_samples,
    open_media,
    resample,
)
from mmaudio_hf.schema import (
    CLIP_FPS,
    CLIP_PIXELS,
    SYNC_FPS,
    SYNC_PIXELS,
    SequenceLengths,
    audio_mode,
    sequence_lengths,
)

__all__ = [
    "MediaError",
    "VideoClip",
    "normalize_frames",
    "probe",
    "read_image",
    "read_video",
    "read_windows",
    "video_seconds",
]

ALIGNMENTS = ("timestamps", "reference")
SAME_START = Fraction(1, 2 * SYNC_FPS)  # s; a smaller offset is below what the 25 fps pictures can express
PADDING = 0.015  # s of missing sound that "timestamps" fills with zeros: half an AAC frame, and 353280 - 8 s
GAP = 0.1  # s; a hole in the sound at least this long is filled with zeros in "timestamps"
_HOLD = Fraction(1, 4)  # s that `read_windows` shows the last picture longer, where the file ends a little early
_SEEK_MARGIN = 1  # s before a window, so that pictures which depend on an earlier key picture are whole
# EPERM is not among them: parts of FFmpeg say so of data they do not understand.
_AUDIO_REASONS = ("no_audio", "audio_too_short", "silent", "decode_error")


class VideoClip(NamedTuple):
    """One clip. Pictures are float32, or uint8 before `normalize_frames`; `audio` is None if it was not wanted."""

    clip_frames: torch.Tensor  # (T, 3, 384, 384) at 8 fps, [0, 1]
    sync_frames: torch.Tensor  # (sync frames, 3, 224, 224) at 25 fps, [-1, 1]
    audio: torch.Tensor | None  # (samples,) float32


def read_video(
    path: str | os.PathLike,
    *,
    mode: str = "16k",
    duration: float = 8.0,
    start: float = 0.0,
    alignment: str = "timestamps",
    normalize_audio: bool = True,
    as_uint8: bool = False,
    need_audio: bool = True,
    video_only: bool = False,
) -> VideoClip:
    """Read `duration` seconds of a video, from `start` seconds on. Spec media, sections 1.2-1.4 and 2.1.

    alignment: "timestamps" puts pictures and sound on one clock. The clip begins when both tracks have begun: the
    earlier one is trimmed (an offset up to 20 ms, half a 25 fps period, is left as it is). The last picture counts
    for its duration, rotation and mirroring of the file are applied, up to 15 ms of missing sound are filled with
    zeros, holes of 0.1 s and more in the sound become silence, and damage outside the clip is ignored.
    "reference" follows the published rules number for number: each track starts at its own first
    sample, the last picture has no duration, rotation is ignored and damage anywhere in the file refuses it; but
    files over 24 s give their first 8 s, not a later window. Files whose tracks start together and
    are long enough give identical arrays in both.

    normalize_audio: peak of the WHOLE track to 0.95, which means reading the file to its end; silent files are refused.
    need_audio=False: `audio` is None where the sound is missing or unusable, instead of an error.
    video_only: the sound is not looked at, `audio` is None, reading stops early, and a late `start` is sought.
    as_uint8: resized pictures before the conversion to float; `normalize_frames` finishes them to the same values.

    Raises MediaError, ValueError for wrong arguments.
    """
    request = _checked(path, mode, duration, start, alignment, normalize_audio, sound=not video_only)
    try:
        clip = _read(request)
    except MediaError as error:
        if need_audio or video_only or error.reason not in _AUDIO_REASONS:
            raise
        clip = _read(replace(request, sound=False))
    if not as_uint8:
        clip = VideoClip(*normalize_frames(clip.clip_frames, clip.sync_frames), clip.audio)
    return clip


def read_windows(
    path: str | os.PathLike,
    starts: Sequence[float],
    *,
    mode: str = "16k",
    duration: float = 8.0,
    alignment: str = "timestamps",
) -> Iterator[VideoClip]:
    """The pictures, uint8 and without sound, of windows of `duration` seconds that begin at `starts` (ascending).

    Each is what `read_video(start=..., video_only=True)` gives, but the file is read once, and no more windows are
    held than overlap at one moment. Where the file ends up to 0.25 s before a window does, its last picture is shown
    until then, in both alignments. Raises as `read_video` does, once the pictures before have been given.
    """
    requests = [_checked(path, mode, duration, start, alignment, False, sound=False) for start in starts]
    if any(after.start < before.start for before, after in itertools.pairwise(requests)):
        raise ValueError("the starts of windows must ascend")
    return _windows(requests)


def read_image(path: str | os.PathLike) -> VideoClip:
    """A still picture as one CLIP picture (1, 3, 384, 384) and no sync pictures (0, 3, 224, 224), uint8. MediaError."""
    request = _checked(path, "16k", 8.0, 0.0, "timestamps", False, sound=False)
    with open_media(path) as container:
        if not container.streams.video:
            raise request.refuse("no_video", "is no picture; give a picture file such as .png or .jpg")
        try:
            frame = next(container.decode(video=0))
        except (av.error.FFmpegError, OSError, StopIteration) as error:
            raise request.damaged(error) from error
        picture = _resized(_RgbConverter()(frame, rotate=True), CLIP_FPS)
    return VideoClip(picture[None], torch.empty((0, 3, SYNC_PIXELS, SYNC_PIXELS), dtype=torch.uint8), None)


def video_seconds(path: str | os.PathLike) -> float:
    """Seconds from the first picture to the end of the last, by the times of all packets. MediaError."""
    request = _checked(path, "16k", 8.0, 0.0, "timestamps", False, sound=False)
    with open_media(path) as container:
        start = _first_times(request, container)[0].video
    return float(_video_length(request, start)[0])


def normalize_frames(clip_frames: torch.Tensor, sync_frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pictures of any leading shape to float32: clip to [0, 1], sync to [-1, 1]. Spec media, section 1.4."""
    return clip_frames.float().div_(255), sync_frames.float().div_(255).sub_(0.5).div_(0.5)


def probe(path: str | os.PathLike) -> dict:
    """What the container says of a file, as plain JSON values; times in seconds. Nothing is decoded. MediaError."""
    with open_media(path) as container:
        return _facts(container)


@dataclass(frozen=True)
class _Request:
    """The arguments of one read; `sound` tells whether the sound is read."""

    path: Path
    mode: str
    duration: float
    start: Fraction
    alignment: str
    normalize_audio: bool
    sound: bool

    @property
    def lengths(self) -> SequenceLengths:
        return sequence_lengths(self.mode, self.duration)

    @property
    def strict(self) -> bool:
        """Whether any damage in the file refuses it; the published reader of pictures alone stops early."""
        return self.alignment == "reference" and self.sound

    def refuse(self, reason: str, what: str) -> MediaError:
        """A MediaError about this file; `what` says what is wrong and what to do."""
        facts = {}
        with contextlib.suppress(MediaError):
            facts = probe(self.path)
        return MediaError(reason, f"{self.path}: {what}", facts)

    def damaged(self, error: Exception) -> MediaError:
        text = getattr(error, "strerror", None) or str(error)
        return self.refuse("decode_error", f"damaged data ({text}); replace or re-encode the file")


def _checked(path, mode, duration, start, alignment, normalize_audio, *, sound: bool) -> _Request:
    """The request these arguments make; ValueError for wrong ones."""
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment {alignment!r}: use one of {', '.join(ALIGNMENTS)}")
    if not (start >= 0 and math.isfinite(start)):
        raise ValueError(f"start {start} must be 0 or more seconds")
    when = Fraction(start).limit_denominator(1_000_000)
    request = _Request(Path(path), mode, duration, when, alignment, normalize_audio, sound)
    request.lengths  # noqa: B018  (checks mode and duration)
    return request


@dataclass(frozen=True)
class _Starts:
    """Time of the first picture, of the first sample (None: no sound is read), and the sample rate."""

    video: Fraction
    audio: Fraction | None = None
    rate: int = 0


_Read = tuple[av.Packet, list[av.VideoFrame | av.AudioFrame] | None]
"""A packet of the file and its frames; None: not decoded yet."""


@dataclass
class _Grid:
    """Pictures of one rate. Position k shows the last source picture whose tick is at most `first + k`."""

    fps: int
    shift: Fraction  # s, taken from every time stamp
    first: int  # tick of position 0
    frames: torch.Tensor  # (positions, 3, H, W) uint8
    filled: int = 0

    @property
    def full(self) -> bool:
        return self.filled == len(self.frames)

    def before(self, time: Fraction) -> int:
        """Number of positions before the one where a source picture of this time begins to be shown."""
        return min(_tick(time - self.shift, self.fps) - self.first, len(self.frames))


class _Pictures:
    """Both rates. A source picture is kept until the next one's time tells how long it is shown."""

    def __init__(self, grids: list[_Grid], rotate: bool):
        self.grids, self.rotate, self.to_rgb = grids, rotate, _RgbConverter()
        self.last: av.VideoFrame | None = None
        self.time = self.gap = Fraction(0)
        self.more = False  # whether grids are still to come

    @property
    def full(self) -> bool:
        return not self.more and all(grid.full for grid in self.grids)

    def add(self, frame: av.VideoFrame, time: Fraction) -> None:
        if self.last is not None:
            self._show_last(until=time)
            self.gap = time - self.time
        self.last, self.time = frame, time

    def finish(self) -> None:
        """Show the last picture for its own duration: the container's, else as long as the one before it."""
        if self.last is not None:
            stated = (self.last.duration or 0) * self.last.time_base
            self.time += stated if stated > 0 else self.gap
            self._show_last(until=self.time)

    def hold(self, seconds: Fraction) -> None:
        """Behind `finish`: show the last picture that much longer."""
        if self.last is not None:
            self._show_last(until=self.time + seconds)

    def _show_last(self, until: Fraction) -> None:
        rgb, resized = None, {}
        for grid in self.grids:
            if (end := grid.before(until)) > grid.filled:
                if rgb is None:
                    rgb = self.to_rgb(self.last, self.rotate)
                if grid.fps not in resized:  # windows that overlap share it
                    resized[grid.fps] = _resized(rgb, grid.fps)
                grid.frames[grid.filled : end] = resized[grid.fps]
                grid.filled = end


class _RgbConverter:
    """8-bit RGB by a filter graph: `VideoFrame.to_ndarray` differs by up to 70 at chroma edges of odd 4:2:0 sizes."""

    def __init__(self):
        self.layout = self.graph = self.matrix = None

    def __call__(self, frame: av.VideoFrame, rotate: bool) -> np.ndarray:
        """(H, W, 3) uint8, turned and mirrored as the file asks if `rotate`."""
        layout = frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range
        if layout != self.layout:  # also when the size changes within a file
            self.layout, self.graph = layout, _rgb_graph(frame)
            # Not of every picture: one whose side data were asked for stays in memory until the garbage collector runs.
            matrix = frame.side_data.get("DISPLAYMATRIX") if rotate else None
            self.matrix = None if matrix is None else np.frombuffer(bytes(matrix), np.int32)
        self.graph.push(frame)
        picture = self.graph.pull().to_ndarray()
        return picture if self.matrix is None else _turned(picture, self.matrix)


@dataclass
class _Sound:
    """Samples of a track from `skip` on, and the peak of the whole of it."""

    skip: int
    needed: int
    keep: int  # needed and what the resampling filter reaches beyond
    chunks: list[np.ndarray] = field(default_factory=list)
    count: int = 0  # samples seen
    peak: float = 0.0

    @property
    def complete(self) -> bool:
        return self.count >= self.skip + self.needed

    @property
    def full(self) -> bool:
        return self.count >= self.skip + self.keep

    def add(self, samples: np.ndarray) -> None:
        wanted = samples[max(0, self.skip - self.count) : max(0, self.skip + self.keep - self.count)]
        if wanted.size:
            self.chunks.append(wanted)
        if samples.size:
            self.peak = float(np.maximum(self.peak, np.abs(samples).max()))  # keeps NaN
        self.count += samples.size

    def add_silence(self, num_samples: int) -> None:
        """A hole of any length; no more zeros are made than can be wanted."""
        zeros = min(num_samples, max(0, self.skip + self.keep - self.count))
        self.add(np.zeros(zeros, np.float32))
        self.count += num_samples - zeros

    def waveform(self) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *self.chunks]))


def _rgb_graph(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1  # waking threads costs more than converting a picture
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    convert, sink = graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")
    source.link_to(convert)
    convert.link_to(sink)
    graph.configure()
    return graph


def _turned(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a display matrix of quarter turns and mirrorings: (x, y) goes to (a x + c y, b x + d y)."""
    a, b, _, c, d = (int(value) for value in matrix[:5])
    if abs(a) >= abs(b):
        columns, rows = a, d
    else:
        picture, columns, rows = picture.transpose(1, 0, 2), c, b
    picture = picture[:, ::-1] if columns < 0 else picture
    return np.ascontiguousarray(picture[::-1] if rows < 0 else picture)


def _resized(rgb: np.ndarray, fps: int) -> torch.Tensor:
    """(3, S, S) uint8: squeezed to 384x384 for CLIP; for sync the shorter side to 224 and the centre cut out.

    Bicubic with antialiasing on uint8: the rounding and clamping to uint8 are part of the published features.
    """
    picture = torch.from_numpy(rgb).permute(2, 0, 1)[None]
    if fps == CLIP_FPS:
        return _bicubic(picture, CLIP_PIXELS, CLIP_PIXELS)[0]
    height, width = picture.shape[-2:]
    short = min(height, width)
    height, width = (int(SYNC_PIXELS * side / short) if side != short else SYNC_PIXELS for side in (height, width))
    picture = _bicubic(picture, height, width)[0]
    top, left = round((height - SYNC_PIXELS) / 2), round((width - SYNC_PIXELS) / 2)
    return picture[:, top : top + SYNC_PIXELS, left : left + SYNC_PIXELS]


def _bicubic(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if picture.shape[-2:] == (height, width):
        return picture
    return F.interpolate(picture, (height, width), mode="bicubic", antialias=True, align_corners=False)


def _tick(seconds: Fraction, fps: int) -> int:
    """Nearest tick, halves away from zero."""
    nearest = math.floor(abs(seconds) * fps + Fraction(1, 2))
    return nearest if seconds >= 0 else -nearest


def _read(request: _Request) -> VideoClip:
    """One clip with uint8 pictures."""
    with open_media(request.path) as container:
        starts, packets = _first_times(request, container)
        grids, sound = _plan(request, starts)
        pictures = _Pictures(grids, rotate=request.alignment == "timestamps")
        seek = not request.sound and request.start > 2 * _SEEK_MARGIN
        if not (seek and _fill_from_key_picture(request, starts, pictures)):
            _fill(request, starts, packets, pictures, sound)
    if request.alignment == "timestamps" and not pictures.full:
        pictures.finish()
    _check_full(request, grids)
    return VideoClip(grids[0].frames, grids[1].frames, sound and _waveform(request, sound, starts.rate))


def _check_full(request: _Request, grids: list[_Grid]) -> None:
    for grid in grids:
        if not grid.full:
            have, need = grid.filled / grid.fps, len(grid.frames) / grid.fps
            what = f"{have:.2f} s of pictures where {need:.2f} s are needed; remove it or ask for a shorter duration"
            raise request.refuse("video_too_short", what)


def _windows(requests: list[_Request]) -> Iterator[VideoClip]:
    """The clips of windows of one file, in order, each as soon as it is complete."""
    waiting = deque(requests)
    opened: deque[list[_Grid]] = deque()
    with open_media(requests[0].path) as container:
        starts, packets = _first_times(requests[0], container)
        pictures = _Pictures([], rotate=requests[0].alignment == "timestamps")
        pictures.more = True
        for frame in _frames(requests[0], packets, pictures, None):
            time = _frame_time(requests[0], frame)
            while waiting and starts.video + waiting[0].start <= time:
                opened.append(_plan(waiting.popleft(), starts)[0])
                pictures.grids += opened[-1]
                pictures.more = bool(waiting)
            _add_picture(requests[0], pictures, frame, time)
            while opened and all(grid.full for grid in opened[0]):
                done = opened.popleft()
                pictures.grids = [grid for grid in pictures.grids if not grid.full]
                yield VideoClip(done[0].frames, done[1].frames, None)
                del done  # of 58 MB, which the reader of the next window must not keep
    pictures.finish()
    pictures.hold(_HOLD)
    opened.extend(_plan(request, starts)[0] for request in waiting)
    for request, grids in zip(requests[len(requests) - len(opened) :], opened, strict=True):
        _check_full(request, grids)
        yield VideoClip(grids[0].frames, grids[1].frames, None)


def _frame_time(request: _Request, frame: av.VideoFrame | av.AudioFrame) -> Fraction:
    ticks = frame.dts if frame.pts is None else frame.pts
    if ticks is None:
        raise request.refuse("decode_error", "its pictures or sound come without times; convert it to mp4")
    return ticks * frame.time_base


def _first_times(request: _Request, container: av.container.InputContainer) -> tuple[_Starts, Iterator[_Read]]:
    """When pictures and sound begin, and everything that is read, from the beginning of the file on.

    The first picture and the first samples are decoded to know: the container's start times leave out priming and edit
    lists. What was decoded on the way is kept, so that nothing is decoded twice.
    """
    video, audio = container.streams.best("video"), container.streams.best("audio")
    if video is None:
        raise request.refuse("no_video", "has no pictures; remove it from the list")
    if request.sound and audio is None:
        raise request.refuse("no_audio", "has no readable sound; remove it from the list or put sound under it")
    missing = [video, audio] if request.sound else [video]
    packets = container.demux(*missing)
    first, read = {}, []
    try:
        while missing and (packet := next(packets, None)) is not None:
            frames = packet.decode() if packet.stream in missing else None
            read.append((packet, frames))
            if frames:
                first[packet.stream.type] = frames[0]
                missing.remove(packet.stream)
    except (av.error.FFmpegError, OSError) as error:
        raise request.damaged(error) from error
    if missing:
        kind = missing[0].type
        raise request.refuse(f"{kind}_too_short", f"nothing of its {kind} can be decoded; remove it from the list")
    starts = _Starts(_frame_time(request, first["video"]))
    if request.sound:
        audio_start = _frame_time(request, first["audio"])
        starts = replace(starts, audio=audio_start, rate=first["audio"].sample_rate)
    return starts, itertools.chain(read, ((packet, None) for packet in packets))


def _plan(request: _Request, starts: _Starts) -> tuple[list[_Grid], _Sound | None]:
    """Empty picture grids and the sound to keep, all beginning at the same moment of the clip."""
    together = starts.audio is None or abs(starts.video - starts.audio) <= SAME_START
    own_starts = request.alignment == "reference" or together
    origin = starts.video if own_starts else max(starts.video, starts.audio)
    lengths = request.lengths
    grids = []
    for fps, count, size in ((CLIP_FPS, lengths.clip, CLIP_PIXELS), (SYNC_FPS, lengths.sync_frames, SYNC_PIXELS)):
        # Position 0 is the tick of the first picture, or of the common origin where that is another moment.
        shift, first = (Fraction(0), _tick(starts.video, fps)) if own_starts else (origin, 0)
        frames = torch.empty((count, 3, size, size), dtype=torch.uint8)
        grids.append(_Grid(fps, shift + request.start, first, frames))
    if not request.sound:
        return grids, None
    skip = request.start + (0 if own_starts else origin - starts.audio)
    target = audio_mode(request.mode).sample_rate
    needed = math.ceil(lengths.audio_samples * starts.rate / target)
    return grids, _Sound(round(skip * starts.rate), needed, needed + starts.rate)  # the filter is far shorter than 1 s


def _fill_from_key_picture(request: _Request, starts: _Starts, pictures: _Pictures) -> bool:
    """`_fill` from shortly before the window on. False, with nothing done: the file has no key picture there."""
    with open_media(request.path) as container:
        video = container.streams.best("video")
        moment = starts.video + request.start
        try:
            container.seek(int((moment - _SEEK_MARGIN) / video.time_base), stream=video)
        except (av.error.FFmpegError, OSError):
            return False
        packets = ((packet, None) for packet in container.demux(video))
        return _fill(request, starts, packets, pictures, None, latest=moment)


def _fill(
    request: _Request,
    starts: _Starts,
    packets: Iterator[_Read],
    pictures: _Pictures,
    sound: _Sound | None,
    latest: Fraction | None = None,
) -> bool:
    """Decode until pictures and sound are complete. False, with nothing done: the first picture is behind `latest`."""
    for frame in _frames(request, packets, pictures, sound):
        time, begun = _frame_time(request, frame), pictures.last is not None
        if isinstance(frame, av.AudioFrame):
            _add_sound(request, sound, frame, time - starts.audio, starts.rate)
        elif latest is not None and not begun and time > latest:
            return False
        else:
            _add_picture(request, pictures, frame, time)
    return True


def _add_picture(request: _Request, pictures: _Pictures, frame: av.VideoFrame, time: Fraction) -> None:
    if request.alignment == "timestamps" and pictures.last is not None and time < pictures.time:
        raise request.refuse("decode_error", "its pictures come without usable times; convert it to mp4")
    pictures.add(frame, time)


def _frames(request, packets: Iterator[_Read], pictures, sound) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """Decoded frames in file order for as long as they are wanted; damage of a wanted stream is a MediaError."""

    def lacking(kind: str) -> bool:
        return not (pictures.full if kind == "video" else sound.complete)

    kinds = ["video", "audio"] if sound else ["video"]
    while request.strict or not pictures.full or (sound and (request.normalize_audio or not sound.full)):
        kind = None  # of an error while reading
        try:
            packet, frames = next(packets, (None, None))
            if packet is None:
                return
            kind = packet.stream.type
            if frames is None:
                # Behind the clip the sound still counts for the peak of the track; pictures are of no use.
                frames = packet.decode() if request.strict or kind == "audio" or not pictures.full else []
        except (av.error.FFmpegError, OSError) as error:
            if request.strict or any(lacking(k) for k in kinds if kind in (None, k)):
                raise request.damaged(error) from error
            continue
        for frame in frames:
            if request.alignment == "timestamps" and frame.is_corrupt and lacking(kind):
                raise request.damaged(ValueError(f"{kind} at {float(_frame_time(request, frame)):.2f} s"))
            yield frame


def _add_sound(request: _Request, sound: _Sound, frame: av.AudioFrame, time: Fraction, rate: int) -> None:
    """Take a frame that lies `time` seconds behind the first one."""
    if frame.sample_rate != rate:
        raise request.refuse("decode_error", "the sample rate changes within the file; re-encode it")
    if request.alignment == "timestamps":
        hole = round(time * rate) - sound.count
        if hole >= GAP * rate:
            sound.add_silence(hole)
    sound.add(mono_samples(frame))


def _waveform(request: _Request, sound: _Sound, rate: int) -> torch.Tensor:
    """Normalise, resample and cut, in the published order (spec media, section 2.1, steps 3-5)."""
    waveform = sound.waveform()
    if not math.isfinite(sound.peak):
        raise request.refuse("decode_error", "has samples that are not finite numbers; re-encode the sound")
    if request.normalize_audio:
        if sound.peak <= SILENCE:
            raise request.refuse("silent", "its sound is silent; remove it from the list")
        waveform = waveform / sound.peak * PEAK
    target, needed = audio_mode(request.mode).sample_rate, request.lengths.audio_samples
    waveform = resample(waveform, rate, target)
    short = needed - len(waveform)
    if short > (PADDING * target if request.alignment == "timestamps" else 0):
        what = f"{len(waveform) / target:.3f} s of sound where {needed / target:.3f} s are needed; remove it"
        raise request.refuse("audio_too_short", what)
    return F.pad(waveform, (0, short)) if short > 0 else waveform[:needed].clone()


def _facts(container: av.container.InputContainer) -> dict:
    def seconds(value, unit) -> float | None:
        return None if value is None else round(float(value * unit), 6)

    facts = {"format": container.format.name, "bytes": container.size}
    facts["duration"] = seconds(container.duration, Fraction(1, av.time_base))
    for stream in (container.streams.best("video"), container.streams.best("audio")):
        if stream is None:
            continue
        context = stream.codec_context
        fact = {"codec": context.name, "start": seconds(stream.start_time, stream.time_base)}
        fact["duration"] = seconds(stream.duration, stream.time_base)
        if stream.type == "video":
            fact |= {"width": context.width, "height": context.height, "pixel_format": context.pix_fmt}
            fact |= {"frame_rate": str(stream.average_rate), "pictures": stream.frames}
        else:
            fact |= {"sample_rate": context.sample_rate, "channels": context.channels}
        facts[stream.type] = fact
    return facts


def _video_length(request: _Request, start: Fraction) -> tuple[Fraction, bool]:
    """Seconds from the first picture to the end of the last, and whether the packets have the times a copy needs."""
    end = start
    with open_media(request.path) as container:
        video = container.streams.best("video")
        copyable = container.format.name != "avi"  # avi has an order of decoding, no times of presentation
        for packet in container.demux(video):
            if packet.size and packet.pts is not None:
                shown = packet.duration * packet.time_base if packet.duration else 1 / (video.average_rate or SYNC_FPS)
                end = max(end, packet.pts * packet.time_base + shown)
            copyable = copyable and not (packet.size and packet.pts is None)
    return end - start, copyable
