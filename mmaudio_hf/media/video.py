"""Video files to frames at 8 and 25 fps and a mono waveform on one clock. PyAV alone decodes.

Both frame rates and the audio come from one pass over the file. A source frame is shown from its own time on until the
next one's, so with one frame of look-ahead it is known, before any conversion, whether and where it is shown: frames
that are never shown are never converted, and a repeated frame is resized once per output size. The rules are in
docs/media.md; the conversion and resizing are those of the published features (MMAudio, arXiv 2412.15322, section 4.1).
"""

import bisect
import itertools
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.filter
import av.sidedata.sidedata
import numpy as np
import torch
import torch.nn.functional as F
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

from mmaudio_hf.media.audio import PEAK, SILENCE, AudioPlacement, WaveformBuffer, mono_samples, resample
from mmaudio_hf.media.container import (
    MediaError,
    audio_stream,
    check_not_encrypted,
    decode_error,
    frame_time,
    media_error,
    open_any,
    open_media,
    seconds,
    video_stream,
)
from mmaudio_hf.schema import (
    CLIP_FPS,
    CLIP_PIXELS,
    SYNC_FPS,
    SYNC_PIXELS,
    SequenceLengths,
    audio_mode,
    checked,
    sequence_lengths,
)

ALIGNMENTS = ("timestamps", "reference")
SAME_START = Fraction(1, 2 * SYNC_FPS)  # s; a smaller offset is below what 25 fps can express
PADDING = 0.015  # s of missing audio that "timestamps" fills with zeros: half an AAC frame, and 353280 samples - 8 s
_HOLD = Fraction(1, 4)  # s that `read_windows` shows the last frame longer, where the file ends a little early
_NO_TIME = Fraction(0)
_SEEK_MARGIN = 1  # s before a window, so that frames which depend on an earlier keyframe are complete
_SIDE_DATA_TYPES = 40  # FFmpeg 8 has 32
_AUDIO_REASONS = ("no_audio", "audio_too_short", "silent", "decode_error")


class VideoClip(NamedTuple):
    """One clip. Frames are float32, or uint8 before `normalize_frames`; `audio` is None where none was read."""

    clip_frames: torch.Tensor  # (T, 3, 384, 384) at 8 fps, [0, 1]
    sync_frames: torch.Tensor  # (sync frames, 3, 224, 224) at 25 fps, [-1, 1]
    audio: torch.Tensor | None  # (samples,) float32


@checked
def read_video(
    path: str | os.PathLike,
    *,
    mode: str = "16k",
    duration: float = 8.0,
    start: float = 0.0,
    audio_offset: float = 0.0,
    alignment: str = "timestamps",
    normalize_audio: bool = True,
    as_uint8: bool = False,
    need_audio: bool = True,
    video_only: bool = False,
) -> VideoClip:
    """Read `duration` seconds of a video, from `start` seconds on.

    alignment: "timestamps" puts frames and audio on one clock, and the clip begins when both tracks have begun;
    "reference" follows the published rules number for number, except that files over 24 s give their first 8 s, not a
    later window. docs/media.md, "What is read", compares the two.

    audio_offset: seconds that the audio of the file is late, less than 0 where it is early. What leads is trimmed by
    as much, so that the two belong together; the clip ends that much later in the file.
    normalize_audio: peak of the WHOLE track to 0.95, which means reading the file to its end; silent files are
    rejected. need_audio=False: `audio` is None where it is missing or unusable, instead of an error.
    video_only: the audio is not looked at, `audio` is None, reading stops early, and a late `start` is sought.
    as_uint8: resized frames before the conversion to float; `normalize_frames` finishes them to the same values.

    Raises MediaError, ValueError for wrong arguments.
    """
    offset = Fraction(audio_offset).limit_denominator(1_000_000) if math.isfinite(audio_offset) else None
    if offset is None or (offset and alignment != "timestamps"):
        raise ValueError(f"audio_offset {audio_offset} must be seconds, and 0 with alignment {alignment!r}")
    options = (_start(start), alignment, normalize_audio, not video_only, offset)
    request = _Request(Path(path), mode, duration, *options)
    try:
        clip = _read(request)
    except MediaError as error:
        if need_audio or video_only or error.reason not in _AUDIO_REASONS:
            raise
        clip = _read(replace(request, with_audio=False))
    return clip if as_uint8 else VideoClip(*normalize_frames(clip.clip_frames, clip.sync_frames), clip.audio)


def read_windows(
    path: str | os.PathLike,
    starts: Sequence[float],
    *,
    mode: str = "16k",
    duration: float = 8.0,
    alignment: str = "timestamps",
) -> Iterator[VideoClip]:
    """The frames, uint8 and without audio, of windows of `duration` seconds that begin at `starts` (ascending).

    Each is what `read_video(start=..., video_only=True)` gives, but the file is read once, and no more windows are
    held than overlap at one moment. Where the file ends up to 0.25 s before a window does, its last frame is shown
    until then, in both alignments. Raises as `read_video` does, after the windows before have been yielded.
    """
    requests = [_Request(Path(path), mode, duration, _start(start), alignment) for start in starts]
    if any(after.start < before.start for before, after in itertools.pairwise(requests)):
        raise ValueError("the starts of windows must ascend")
    return _windows(requests)


def array_windows(
    frames: np.ndarray | torch.Tensor, frame_rate: float, starts: Sequence[float], *, mode: str, duration: float
) -> Iterator[VideoClip]:
    """As `read_windows`, of frames that `check_frames` takes, at a constant rate; they end as late as is needed."""
    lengths, rate = sequence_lengths(mode, duration), Fraction(frame_rate).limit_denominator(1_000_000)
    for start in map(_start, starts):
        first = max(0, math.floor(start * rate) - 1)
        shown = range(first, min(len(frames), math.ceil((start + Fraction(duration)) * rate) + 2))
        resized = []
        for fps, count in ((CLIP_FPS, lengths.clip), (SYNC_FPS, lengths.sync_frames)):
            ticks = [_tick(index / rate - start, fps) for index in shown]
            indices = [first + max(0, bisect.bisect_right(ticks, position) - 1) for position in range(count)]
            images = {index: _resize(_rgb(frames[index]), fps) for index in set(indices)}
            resized.append(torch.stack([images[index] for index in indices]))
        yield VideoClip(resized[0], resized[1], None)


def check_frames(frames: np.ndarray | torch.Tensor, name: str, still: bool = False) -> None:
    """ValueError unless these are frames (F, H, W, 3) or (F, 3, H, W), or one without F, uint8 or floats in [0, 1]."""
    axes = ("" if still else "frames, ") + "height, width, 3"
    if frames.ndim != 4 - still or 3 not in (frames.shape[-1], frames.shape[-3]) or 0 in frames.shape:
        raise ValueError(f"{name} has the shape {tuple(frames.shape)}: give ({axes}), or the 3 before the height")
    if frames.dtype in (np.uint8, torch.uint8):
        return
    is_float = frames.is_floating_point() if isinstance(frames, torch.Tensor) else frames.dtype.kind == "f"
    if not is_float or not (frames.min() >= 0 and frames.max() <= 1):
        raise ValueError(f"{name} is {frames.dtype}: give uint8, or floats from 0 to 1")


def _rgb(frame: np.ndarray | torch.Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of one frame that `check_frames` takes."""
    tensor = torch.as_tensor(frame).detach().cpu()
    if tensor.shape[-1] != 3:
        tensor = tensor.movedim(0, -1)
    if tensor.dtype != torch.uint8:
        tensor = tensor.double().mul(255).round().byte()
    return tensor.contiguous().numpy()


def array_image(frame: np.ndarray | torch.Tensor) -> VideoClip:
    """As `read_image`, of a frame that `check_frames` takes."""
    return _still(_rgb(frame))


def _still(rgb: np.ndarray) -> VideoClip:
    empty = torch.empty((0, 3, SYNC_PIXELS, SYNC_PIXELS), dtype=torch.uint8)
    return VideoClip(_resize(rgb, CLIP_FPS)[None], empty, None)


def sparse_frames(path: str | os.PathLike, period: float, count: int, start: float = 0.0) -> torch.Tensor:
    """Frames `period` seconds apart from `start` s on, whole: uint8 (count, 3, H, W). MediaError.

    Frame k is the last one that begins before (k + 1/2) periods after `start` s, counted from the first one, as
    ffmpeg's fps filter rounds.
    """
    with open_media(path) as container:
        stream = video_stream(container)
        if stream is None:
            raise media_error(path, "no_video", "has no video track")
        to_rgb, last = RgbConverter(rotate=False), None
        frames: list[np.ndarray] = []
        first = time = Fraction(0)
        try:
            for frame in container.decode(stream):
                time = frame_time(Path(path), frame)
                if last is None:
                    first, last = time + _start(start), frame
                while len(frames) < count and time - first >= (len(frames) + 0.5) * period:
                    frames.append(to_rgb(last))
                if len(frames) == count:
                    break
                last = frame
        except (av.error.FFmpegError, OSError) as error:
            raise decode_error(path, error) from error
        while last is not None and len(frames) < count and time - first >= (len(frames) - 0.5) * period:
            frames.append(to_rgb(last))  # the last frame is shown to the end
    if len(frames) < count:
        raise media_error(path, "video_too_short", f"has {len(frames)} of {count} frames, {period:g} s apart")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def read_image(path: str | os.PathLike) -> VideoClip:
    """A still image as one CLIP frame (1, 3, 384, 384) and no sync frames (0, 3, 224, 224), uint8. MediaError."""
    with open_any(path) as container:
        if not container.streams.video:
            raise media_error(path, "no_video", "is no image; give an image file such as .png or .jpg")
        try:
            frame = next(container.decode(video=0))
        except (av.error.FFmpegError, OSError, StopIteration) as error:
            raise decode_error(path, error) from error
        return _still(RgbConverter(rotate=True)(frame))


def normalize_frames(clip_frames: torch.Tensor, sync_frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 frames of any leading shape to float32: CLIP to [0, 1], sync to [-1, 1]."""
    return clip_frames.float().div_(255), sync_frames.float().div_(255).sub_(0.5).div_(0.5)


class VideoExtent(NamedTuple):
    """Where the frames of a file lie in time, by the timestamps of all packets."""

    start: Fraction  # s, of the first frame that is shown
    length: Fraction  # s, to the end of the last one
    has_timestamps: bool  # every packet has the presentation time that a copy needs


def video_extent(path: str | os.PathLike) -> VideoExtent:
    """Read all packets of the video track; only the first frame is decoded. MediaError."""
    with open_media(path) as container:
        start = end = _open_tracks(_Request(Path(path)), container)[0].video
    with open_media(path) as container:
        stream = video_stream(container)
        assert stream is not None, "its first frame was decoded"
        usual = 1 / Fraction(stream.average_rate or SYNC_FPS)  # s
        has_timestamps = container.format.name != "avi"  # avi has an order of decoding, no presentation times
        for packet in container.demux(stream):
            if packet.size and (time := seconds(packet.pts, packet.time_base)) is not None:
                end = max(end, time + (seconds(packet.duration or None, packet.time_base) or usual))
            has_timestamps = has_timestamps and not (packet.size and packet.pts is None)
    return VideoExtent(start, end - start, has_timestamps)


def video_seconds(path: str | os.PathLike) -> float:
    """Seconds from the first frame to the end of the last. MediaError."""
    return float(video_extent(path).length)


# --- The request and the alignment of the tracks ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    path: Path
    mode: str = "16k"
    duration: float = 8.0
    start: Fraction = Fraction(0)  # s
    alignment: str = "timestamps"
    normalize_audio: bool = False
    with_audio: bool = False
    audio_offset: Fraction = Fraction(0)  # s that the audio is late

    def __post_init__(self) -> None:
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"alignment {self.alignment!r}: use one of {', '.join(ALIGNMENTS)}")
        _ = self.lengths  # checks mode and duration

    @property
    def lengths(self) -> SequenceLengths:
        return sequence_lengths(self.mode, self.duration)

    @property
    def by_timestamps(self) -> bool:
        return self.alignment == "timestamps"

    @property
    def strict(self) -> bool:
        """Whether any damage in the file rejects it; the published reader of frames alone stops early."""
        return self.with_audio and not self.by_timestamps

    def error(self, reason: str, problem: str) -> MediaError:
        return media_error(self.path, reason, problem)


def _start(seconds: float) -> Fraction:
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise ValueError(f"start {seconds} must be 0 or more seconds")
    return Fraction(seconds).limit_denominator(1_000_000)


@dataclass(frozen=True)
class _TrackStarts:
    """Times of the first frame and of the first sample (None: no audio is read), and what is known of the audio."""

    video: Fraction
    audio: Fraction | None = None
    sample_rate: int = 0
    frame_size: int = 0  # samples in a frame of the codec, 0 where they differ


_Read = tuple[av.Packet, list[av.VideoFrame | av.AudioFrame] | None]
"""A packet of the file and its frames; None: not decoded yet."""


def _open_tracks(request: _Request, container: InputContainer) -> tuple[_TrackStarts, Iterator[_Read]]:
    """When frames and audio begin, and everything that is read, from the beginning of the file on.

    The first frame and the first samples are decoded to know: the container's start times leave out priming and edit
    lists. What was decoded on the way is kept, so that nothing is decoded twice.
    """
    video, audio = video_stream(container), audio_stream(container)
    if video is None:
        raise request.error("no_video", "has no video track; remove it from the list")
    if request.with_audio and audio is None:
        raise request.error("no_audio", "has no readable audio track; remove it from the list or add audio to it")
    missing: list[VideoStream | AudioStream] = [video, audio] if request.with_audio and audio else [video]
    packets = container.demux(*missing)
    first: dict[str, av.VideoFrame | av.AudioFrame] = {}
    read: list[_Read] = []
    try:
        while missing and (packet := next(packets, None)) is not None:
            check_not_encrypted(request.path, packet)
            frames = _decode(packet) if packet.stream in missing else None
            read.append((packet, frames))
            if frames:
                first[packet.stream.type] = frames[0]
                missing = [stream for stream in missing if stream is not packet.stream]
    except (av.error.FFmpegError, OSError) as error:
        raise decode_error(request.path, error) from error
    if missing:
        kind = missing[0].type
        raise request.error(f"{kind}_too_short", f"nothing of its {kind} can be decoded; remove it from the list")
    starts = _TrackStarts(frame_time(request.path, first["video"]))
    samples = first.get("audio")
    if audio is not None and isinstance(samples, av.AudioFrame):
        frame_size = audio.codec_context.frame_size or 0
        starts = _TrackStarts(starts.video, frame_time(request.path, samples), samples.sample_rate, frame_size)
    return starts, itertools.chain(read, ((packet, None) for packet in packets))


def _decode(packet: av.Packet) -> list[av.VideoFrame | av.AudioFrame]:
    return [frame for frame in packet.decode() if isinstance(frame, av.VideoFrame | av.AudioFrame)]


def _align(request: _Request, starts: _TrackStarts) -> "tuple[list[_FrameGrid], WaveformBuffer | None]":
    """Empty frame grids and the samples to keep, all beginning at the same moment of the clip."""
    audio_start = starts.video if starts.audio is None else starts.audio
    own_starts = abs(starts.video - audio_start) <= SAME_START or not request.by_timestamps
    origin = starts.video if own_starts else max(starts.video, audio_start)
    lengths = request.lengths
    grids = []
    for fps, count, size in ((CLIP_FPS, lengths.clip, CLIP_PIXELS), (SYNC_FPS, lengths.sync_frames, SYNC_PIXELS)):
        # Position 0 is the tick of the first frame, or of the common origin where that is another moment.
        shift, first = (Fraction(0), _tick(starts.video, fps)) if own_starts else (origin, 0)
        frames = torch.empty((count, 3, size, size), dtype=torch.uint8)
        start = request.start + max(Fraction(0), -request.audio_offset)
        grids.append(_FrameGrid(fps, shift + start, first, frames))
    if not request.with_audio:
        return grids, None
    skip = request.start + max(Fraction(0), request.audio_offset) + (0 if own_starts else origin - audio_start)
    rate = starts.sample_rate
    needed = math.ceil(lengths.audio_samples * rate / audio_mode(request.mode).sample_rate)
    lead = audio_start - starts.video if own_starts else Fraction(0)
    placement = AudioPlacement(rate, starts.frame_size, lead) if request.by_timestamps else None
    keep = needed + rate  # the resampling filter is far shorter than 1 s
    return grids, WaveformBuffer(round(skip * rate), needed, keep, placement)


# --- Frames at a constant rate ---------------------------------------------------------------------------------------


@dataclass
class _FrameGrid:
    """Frames of one rate. Position k shows the last source frame whose tick is at most `first + k`."""

    fps: int
    shift: Fraction  # s, subtracted from every timestamp
    first: int  # tick of position 0
    frames: torch.Tensor  # (positions, 3, S, S) uint8
    filled: int = 0

    @property
    def full(self) -> bool:
        return self.filled == len(self.frames)

    def before(self, time: Fraction) -> int:
        """Number of positions before the one where a source frame of this time begins to be shown."""
        return min(_tick(time - self.shift, self.fps) - self.first, len(self.frames))


class _FrameSampler:
    """Fills the grids of both rates. A source frame is kept until the next one's time tells how long it is shown."""

    def __init__(self, grids: list[_FrameGrid], rotate: bool):
        self.grids, self.to_rgb = grids, RgbConverter(rotate)
        self.last: av.VideoFrame | None = None
        self.time = self.gap = Fraction(0)  # s: of the last frame, and between it and the one before
        self.more = False  # whether grids are still to come

    @property
    def full(self) -> bool:
        return not self.more and all(grid.full for grid in self.grids)

    def add(self, frame: av.VideoFrame, time: Fraction) -> None:
        if self.last is not None:
            self._show(self.last, until=time)
            self.gap = time - self.time
        self.last, self.time = frame, time

    def finish(self, more: Fraction = _NO_TIME) -> None:
        """Show the last frame for its own duration, the container's, else as long as the one before it; and `more`."""
        if self.last is not None:
            duration = seconds(self.last.duration or None, self.last.time_base) or self.gap
            self._show(self.last, until=self.time + duration + more)

    def _show(self, frame: av.VideoFrame, until: Fraction) -> None:
        rgb, resized = None, {}
        for grid in self.grids:
            if (end := grid.before(until)) > grid.filled:
                if rgb is None:
                    rgb = self.to_rgb(frame)
                if grid.fps not in resized:  # windows that overlap share it
                    resized[grid.fps] = _resize(rgb, grid.fps)
                grid.frames[grid.filled : end] = resized[grid.fps]
                grid.filled = end


class RgbConverter:
    """Frames to 8-bit RGB by a filter graph: `VideoFrame.to_ndarray` differs by up to 70 at chroma edges of odd 4:2:0
    sizes. rotate: turn and mirror frames as the file asks.
    """

    def __init__(self, rotate: bool):
        self.rotate = rotate
        self.layout: tuple | None = None
        self.graph: av.filter.Graph | None = None
        self.matrix: np.ndarray | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        layout = frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range
        if self.graph is None or layout != self.layout:  # also when the size changes within a file
            self.layout, self.graph = layout, _graph(frame, ("format", "pix_fmts=rgb24"))
            # Not of every frame: one whose side data were read stays in memory until the garbage collector runs.
            self.matrix = _display_matrix(frame) if self.rotate else None
        self.graph.push(frame)
        rgb = self.graph.pull().to_ndarray()
        return rgb if self.matrix is None else apply_display_matrix(rgb, self.matrix)


def _graph(frame: av.VideoFrame, *filters: tuple[str, str]) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1  # waking threads costs more than converting a frame
    last = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    for following in (*(graph.add(name, arguments) for name, arguments in filters), graph.add("buffersink")):
        last.link_to(following)
        last = following
    graph.configure()
    return graph


def _display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV refuses side data that it has no name for, as the EXIF of a photo, with all the others
        unnamed = set(range(_SIDE_DATA_TYPES)) - set(av.sidedata.sidedata.Type._value2member_map_)
        graph = _graph(frame, *(("sidedata", f"mode=delete:type={number}") for number in unnamed))
        graph.push(frame)
        matrix = graph.pull().side_data.get("DISPLAYMATRIX")
    # mypy: a buffer, though the stubs of PyAV do not say so
    return None if matrix is None else np.frombuffer(bytes(matrix), np.int32)  # type: ignore[call-overload]


def apply_display_matrix(rgb: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Quarter turns and mirrorings of a display matrix: (x, y) goes to (a x + c y, b x + d y)."""
    a, b, _, c, d = (int(value) for value in matrix[:5])
    if abs(a) >= abs(b):
        columns, rows = a, d
    else:
        rgb, columns, rows = rgb.transpose(1, 0, 2), c, b
    rgb = rgb[:, ::-1] if columns < 0 else rgb
    return np.ascontiguousarray(rgb[::-1] if rows < 0 else rgb)


def _resize(rgb: np.ndarray, fps: int) -> torch.Tensor:
    """(3, S, S) uint8: squeezed to 384x384 for CLIP; for sync the shorter side to 224, then the centre is cropped.

    Bicubic with antialiasing on uint8: the rounding and clamping to uint8 are part of the published features.
    """
    image, short = torch.from_numpy(rgb).permute(2, 0, 1)[None], min(rgb.shape[:2])  # (1, 3, H, W)
    size, height, width = CLIP_PIXELS, CLIP_PIXELS, CLIP_PIXELS
    if fps != CLIP_FPS:
        size = SYNC_PIXELS
        height, width = (int(size * side / short) if side != short else size for side in rgb.shape[:2])
    if image.shape[-2:] != (height, width):
        image = F.interpolate(image, (height, width), mode="bicubic", antialias=True, align_corners=False)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[0, :, top : top + size, left : left + size]


def _tick(seconds: Fraction, fps: int) -> int:
    """Nearest tick, halves away from zero."""
    nearest = math.floor(abs(seconds) * fps + Fraction(1, 2))
    return nearest if seconds >= 0 else -nearest


# --- Reading ---------------------------------------------------------------------------------------------------------


def _read(request: _Request) -> VideoClip:
    with open_media(request.path) as container:
        starts, packets = _open_tracks(request, container)
        grids, audio = _align(request, starts)
        sampler = _FrameSampler(grids, rotate=request.by_timestamps)
        seek = not request.with_audio and request.start > 2 * _SEEK_MARGIN
        if not (seek and _fill_from_keyframe(request, starts, sampler)):
            _fill(request, starts, packets, sampler, audio)
    if request.by_timestamps and not sampler.full:
        sampler.finish()
    _check_full(request, grids)
    clip = VideoClip(grids[0].frames, grids[1].frames, None)
    if audio is None:
        return clip
    # Normalise, resample and cut, in the order of the published reader.
    waveform = audio.waveform()
    if not math.isfinite(audio.peak):
        raise request.error("decode_error", "has samples that are not finite numbers; re-encode the audio")
    if request.normalize_audio:
        if audio.peak <= SILENCE:
            raise request.error("silent", "its audio is silent; remove it from the list")
        waveform = waveform / audio.peak * PEAK
    target, needed = audio_mode(request.mode).sample_rate, request.lengths.audio_samples
    waveform = resample(waveform, starts.sample_rate, target)
    short = needed - len(waveform)
    if short > (PADDING * target if request.by_timestamps else 0):
        problem = f"{len(waveform) / target:.3f} s of audio where {needed / target:.3f} s are needed; remove it"
        raise request.error("audio_too_short", problem)
    return clip._replace(audio=F.pad(waveform, (0, short)) if short > 0 else waveform[:needed].clone())


def _windows(requests: list[_Request]) -> Iterator[VideoClip]:
    waiting = deque(requests)
    opened: deque[list[_FrameGrid]] = deque()
    with open_media(requests[0].path) as container:
        starts, packets = _open_tracks(requests[0], container)
        sampler = _FrameSampler([], rotate=requests[0].by_timestamps)
        sampler.more = True
        for frame in _frames(requests[0], packets, sampler, None):
            assert isinstance(frame, av.VideoFrame), "no other track is read"
            time = frame_time(requests[0].path, frame)
            while waiting and starts.video + waiting[0].start <= time:
                opened.append(_align(waiting.popleft(), starts)[0])
                sampler.grids += opened[-1]
                sampler.more = bool(waiting)
            _add_frame(requests[0], sampler, frame, time)
            while opened and all(grid.full for grid in opened[0]):
                done = opened.popleft()
                sampler.grids = [grid for grid in sampler.grids if not grid.full]
                yield VideoClip(done[0].frames, done[1].frames, None)
                del done  # of 58 MB, which the reader of the next window must not keep
    sampler.finish(_HOLD)
    opened.extend(_align(request, starts)[0] for request in waiting)
    for request, grids in zip(requests[len(requests) - len(opened) :], opened, strict=True):
        _check_full(request, grids)
        yield VideoClip(grids[0].frames, grids[1].frames, None)


def _check_full(request: _Request, grids: list[_FrameGrid]) -> None:
    for grid in grids:
        if not grid.full:
            have, need = grid.filled / grid.fps, len(grid.frames) / grid.fps
            problem = f"{have:.2f} s of frames where {need:.2f} s are needed; remove it or ask for a shorter duration"
            raise request.error("video_too_short", problem)


def _fill_from_keyframe(request: _Request, starts: _TrackStarts, sampler: _FrameSampler) -> bool:
    """`_fill` from shortly before the window on. False, with nothing done: the file has no keyframe there."""
    with open_media(request.path) as container:
        stream = video_stream(container)
        assert stream is not None and stream.time_base, "its first frame was decoded"
        moment = starts.video + request.start
        try:
            container.seek(int((moment - _SEEK_MARGIN) / stream.time_base), stream=stream)
        except (av.error.FFmpegError, OSError):
            return False
        packets: Iterator[_Read] = ((packet, None) for packet in container.demux(stream))
        return _fill(request, starts, packets, sampler, None, latest=moment)


def _fill(
    request: _Request,
    starts: _TrackStarts,
    packets: Iterator[_Read],
    sampler: _FrameSampler,
    audio: WaveformBuffer | None,
    latest: Fraction | None = None,
) -> bool:
    """Decode until frames and audio are complete. False, with nothing done: the first frame is later than `latest`."""
    for frame in _frames(request, packets, sampler, audio):
        if isinstance(frame, av.AudioFrame):
            assert audio is not None, "audio is decoded where it is read"
            if frame.sample_rate != starts.sample_rate:
                raise request.error("decode_error", "the sample rate changes within the file; re-encode it")
            # Some codecs give only the first frame of a packet its time.
            unknown = request.by_timestamps and frame.pts is None
            audio.add_frame(mono_samples(frame), None if unknown else frame_time(request.path, frame))
            continue
        time = frame_time(request.path, frame)
        if latest is not None and sampler.last is None and time > latest:
            return False
        _add_frame(request, sampler, frame, time)
    if audio:
        audio.flush()
    return True


def _frames(
    request: _Request, packets: Iterator[_Read], sampler: _FrameSampler, audio: WaveformBuffer | None
) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """Decoded frames in file order for as long as they are needed; damage of a needed stream is a MediaError."""

    def incomplete(kind: str) -> bool:
        if kind == "video" or audio is None:
            return not sampler.full
        audio.flush()
        return not audio.complete

    kinds = ["video", "audio"] if audio else ["video"]
    while request.strict or not sampler.full or (audio and (request.normalize_audio or not audio.full)):
        kind = None  # of an error while reading
        try:
            item = next(packets, None)
            if item is None:
                return
            packet, frames = item
            kind = packet.stream.type
            if frames is None:
                # After the clip the audio still counts for the peak of the track; frames are of no use.
                frames = _decode(packet) if request.strict or kind == "audio" or not sampler.full else []
        except (av.error.FFmpegError, OSError) as error:
            if request.strict or any(incomplete(k) for k in kinds if kind in (None, k)):
                raise decode_error(request.path, error) from error
            continue
        for frame in frames:
            if request.by_timestamps and frame.is_corrupt and incomplete(kind):
                where = f"{kind} at {float(frame_time(request.path, frame)):.2f} s"
                raise decode_error(request.path, ValueError(where))
            yield frame


def _add_frame(request: _Request, sampler: _FrameSampler, frame: av.VideoFrame, time: Fraction) -> None:
    if request.by_timestamps and sampler.last is not None and time < sampler.time:
        raise request.error("decode_error", "the timestamps of its frames are out of order; convert it to mp4")
    sampler.add(frame, time)
