"""Write a video file with new audio: its packets copied where the container allows it, else encoded as H.264."""

import errno
import heapq
import itertools
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.video.stream import VideoStream

from mmaudio_hf.files import replacing
from mmaudio_hf.media.audio import audio_frame
from mmaudio_hf.media.container import frame_time, media_error, open_media, seconds, video_stream
from mmaudio_hf.media.video import RgbConverter, video_extent
from mmaudio_hf.schema import SYNC_FPS

VIDEO_FORMATS = {".mp4": "mp4", ".mkv": "matroska"}  # what is written
_TARGET_FAULTS = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOTDIR


def write_video_with_audio(
    video_path: str | os.PathLike,
    waveform: torch.Tensor,
    sample_rate: int,
    out_path: str | os.PathLike,
    *,
    start: float = 0.0,
    max_height: int = 0,
) -> bool:
    """Write an .mp4 or .mkv with the frames of `video_path` and `waveform` as its only audio track (AAC).

    waveform: `(samples,)` or `(1 or 2, samples)` in [-1, 1], beginning `start` seconds after the first frame, as the
    result does. Packets are copied without re-encoding where the container can hold their codec, else frames are
    encoded as H.264, as with a `start` or a `max_height` (pixels); returns whether they were copied. The result is as
    long as the shorter of the two, to a frame (a copy may keep the few frames that others depend on). Written under
    another name and renamed. Raises MediaError for a video that cannot be read, ValueError for a bad waveform or
    another ending, OSError that names the result for a full disk and a folder that cannot be written.
    """
    out_path, waveform = Path(out_path), torch.atleast_2d(torch.as_tensor(waveform))
    if out_path.suffix.lower() not in VIDEO_FORMATS:
        raise ValueError(f"{out_path}: a video is written as {' or '.join(VIDEO_FORMATS)}, not {out_path.suffix!r}")
    audio_frame(waveform, sample_rate, "fltp")  # raises for a bad waveform before any file is written
    try:
        first, length, has_timestamps = video_extent(video_path)
        origin = first + Fraction(start).limit_denominator(1_000_000)
        length = min(length + first - origin, Fraction(waveform.shape[-1], sample_rate))
        if length <= 0:
            raise media_error(video_path, "video_too_short", f"ends before {start:g} s")
        audio = audio_frame(waveform[:, : round(length * sample_rate)], sample_rate, "fltp")
        target_format = VIDEO_FORMATS[out_path.suffix.lower()]
        with (
            open_media(video_path) as source,
            replacing(out_path) as partial,
            av.open(str(partial), "w", format=target_format) as target,
        ):
            video = video_stream(source)
            assert video is not None, "its first frame was decoded"
            copy = has_timestamps and video.codec_context.codec.canonical_name in target.supported_codecs
            copy = copy and not start and not max_height
            tracks = source, video, target, origin, length
            # Either adds its stream, before the first packet.
            frames = _copied(*tracks) if copy else _encoded(*tracks, max_height or math.inf)
            stream = target.add_stream("aac", rate=sample_rate, layout=audio.layout.name)
            assert isinstance(stream, AudioStream)
            encoded = (packet for frame in (audio, None) for packet in stream.encode(frame))
            for packet in heapq.merge(frames, encoded, key=_packet_time):
                target.mux(packet)
        return copy
    except av.error.FFmpegError as error:
        if error.errno in _TARGET_FAULTS:  # the error need not name its file; the video was there and could be opened
            raise OSError(error.errno, error.strerror or str(error), str(out_path)) from error
        problem = f"no audio can be added to it ({error.strerror or error}); re-encode it as H.264 mp4"
        raise media_error(video_path, "decode_error", problem) from error


def _packet_time(packet: av.Packet) -> Fraction:
    time = seconds(packet.pts if packet.dts is None else packet.dts, packet.time_base)
    assert time is not None, "copied and encoded packets have times"
    return time


def _copied(
    source: InputContainer, video: VideoStream, target: OutputContainer, start: Fraction, length: Fraction
) -> Iterator[av.Packet]:
    stream, packets = target.add_stream_from_template(video), [packet for packet in source.demux(video) if packet.size]
    shown = [packet.pts or 0 for packet in packets]  # all have one: `VideoExtent.has_timestamps`
    decoded = [packet.dts for packet in packets if packet.dts is not None]
    if len(decoded) < len(packets):
        # Matroska has no decoding times: the presentation times in order, early enough for every frame.
        order = sorted(shown)
        delay = max(early - time for early, time in zip(order, shown, strict=True))
        decoded = [early - delay for early in order]

    def moved() -> Iterator[av.Packet]:
        for packet, pts, dts in zip(packets, shown, decoded, strict=True):
            shift = round(start / packet.time_base)
            # By decoding time: a frame shown after the end may be needed by one shown before it.
            if (dts - shift) * packet.time_base < length:
                packet.pts, packet.dts, packet.stream = pts - shift, dts - shift, stream
                yield packet

    return moved()


def _encoded(
    source: InputContainer,
    video: VideoStream,
    target: OutputContainer,
    start: Fraction,
    length: Fraction,
    max_height: float,
) -> Iterator[av.Packet]:
    """Add the stream; the frames as H.264 yuv420p, cropped to even sizes and upright."""
    frames, to_rgb = source.decode(video), RgbConverter(rotate=True)
    first = next(frames)
    height, width = (side // 2 * 2 for side in to_rgb(first).shape[:2])
    scale = min(1, max_height / height)
    shown_height, shown_width = (round(side * scale / 2) * 2 for side in (height, width))
    rate, unit = video.average_rate or SYNC_FPS, video.time_base or Fraction(1, 90_000)
    stream = target.add_stream("libx264", rate=rate, width=shown_width, height=shown_height, pix_fmt="yuv420p")
    assert isinstance(stream, VideoStream)
    stream.options, stream.codec_context.time_base = {"crf": "18"}, unit

    def packets() -> Iterator[av.Packet]:
        timed = ((frame_time(source.name, frame) - start, frame) for frame in itertools.chain([first], frames))
        for (time, frame), (until, _) in itertools.pairwise(itertools.chain(timed, [(length, first)])):
            if time >= length:
                break
            if until > 0:  # of the frames before the start the last one is seen from there on
                rgb = np.ascontiguousarray(to_rgb(frame)[:height, :width])
                encoded = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(shown_width, shown_height)
                encoded.pts, encoded.time_base = round(max(time, Fraction(0)) / unit), unit
                yield from stream.encode(encoded)
        yield from stream.encode(None)

    return packets()
