"""Write a video file with new audio: its packets copied where the container allows it, else encoded as H.264."""

import errno
import heapq
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
import torch

from mmaudio_hf.media.audio import (
    audio_frame,
    open_media,
)
from mmaudio_hf.media.video import _first_times, _frame_time, _Request, _RgbConverter, _video_length
from mmaudio_hf.schema import (
    SYNC_FPS,
)

VIDEO_FORMATS = {".mp4": "mp4", ".mkv": "matroska"}  # that are written
_TARGET_FAULTS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOTDIR),
)


def write_video_with_audio(
    video_path: str | os.PathLike, waveform: torch.Tensor, sample_rate: int, out_path: str | os.PathLike
) -> bool:
    """Write an .mp4 or .mkv with the pictures of `video_path` and `waveform` as its only sound (AAC).

    waveform: `(samples,)` or `(1 or 2, samples)` in [-1, 1], starting with the first picture. Pictures are copied
    without re-encoding where the container can hold their codec, else encoded as H.264; returns whether they were
    copied. The result is as long as the shorter of
    the two, to a picture (a copy may keep the few pictures that others depend on). Written under another name and
    renamed. Raises MediaError for a video that cannot be read, ValueError for a bad waveform or another ending, OSError
    that names the result for a full disk and a folder that cannot be written.
    """
    out_path, waveform = Path(out_path), torch.atleast_2d(torch.as_tensor(waveform))
    if out_path.suffix.lower() not in VIDEO_FORMATS:
        raise ValueError(f"{out_path}: a video is written as {' or '.join(VIDEO_FORMATS)}, not {out_path.suffix!r}")
    request = _Request(Path(video_path), "16k", 8.0, Fraction(0), "timestamps", False, sound=False)
    audio_frame(waveform, sample_rate, "fltp")  # refuses a bad waveform before any file is made
    partial = out_path.with_name(f".{out_path.name}.{os.getpid()}.part")
    try:
        with open_media(video_path) as source:
            start = _first_times(request, source)[0].video
        length, copyable = _video_length(request, start)
        length = min(length, Fraction(waveform.shape[-1], sample_rate))
        sound = audio_frame(waveform[:, : round(length * sample_rate)], sample_rate, "fltp")
        with open_media(video_path) as source, _new_video(partial, out_path) as target:
            video = source.streams.best("video")
            copy = copyable and video.codec_context.codec.canonical_name in target.supported_codecs
            pictures = (_copied if copy else _encoded)(request, source, video, target, start, length)
            stream = target.add_stream("aac", rate=sample_rate, layout=sound.layout.name)
            next(pictures)  # adds its stream, which must come before the first packet
            for packet in heapq.merge(pictures, _encoded_sound(stream, sound), key=_packet_time):
                target.mux(packet)
        os.replace(partial, out_path)
        return copy
    except av.error.FFmpegError as error:
        if error.errno in _TARGET_FAULTS:  # the error need not name its file; the video was there and could be opened
            raise OSError(error.errno, error.strerror, str(out_path)) from error
        what = f"no sound can be put under it ({error.strerror}); re-encode it as H.264 mp4"
        raise request.refuse("decode_error", what) from error
    finally:
        partial.unlink(missing_ok=True)


def _new_video(partial: Path, out_path: Path) -> av.container.OutputContainer:
    return av.open(str(partial), "w", format=VIDEO_FORMATS[out_path.suffix.lower()])


def _packet_time(packet: av.Packet) -> Fraction:
    return (packet.pts if packet.dts is None else packet.dts) * packet.time_base


def _copied(request, source, video, target, start: Fraction, length: Fraction) -> Iterator[av.Packet | None]:
    """None once the stream is added, then the source's packets moved to start at 0."""
    stream = target.add_stream_from_template(video)
    yield None
    packets = [packet for packet in source.demux(video) if packet.size]
    if any(packet.dts is None for packet in packets):
        # Matroska has no decoding times: the presentation times in order, early enough for every picture.
        order = sorted(packet.pts for packet in packets)
        delay = max(early - packet.pts for early, packet in zip(order, packets, strict=True))
        for early, packet in zip(order, packets, strict=True):
            packet.dts = early - delay
    shift = round(start / video.time_base)
    for packet in packets:
        # By decoding time: a picture shown after the end may be needed by one shown before it.
        if (packet.dts - shift) * packet.time_base < length:
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
            yield packet


def _encoded(request, source, video, target, start: Fraction, length: Fraction) -> Iterator[av.Packet | None]:
    """None once the stream is added, then the pictures as H.264 yuv420p, cut to even sizes and upright."""
    frames, to_rgb = source.decode(video), _RgbConverter()
    first = next(frames)
    height, width = (side // 2 * 2 for side in to_rgb(first, True).shape[:2])
    rate, unit = video.average_rate or SYNC_FPS, video.time_base
    stream = target.add_stream("libx264", rate=rate, width=width, height=height, pix_fmt="yuv420p")
    stream.options, stream.codec_context.time_base = {"crf": "18"}, unit
    yield None
    for frame in itertools.chain([first], frames):
        if (time := _frame_time(request, frame) - start) < length:
            picture = np.ascontiguousarray(to_rgb(frame, True)[:height, :width])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time / unit), unit
            yield from stream.encode(frame)
    yield from stream.encode(None)


def _encoded_sound(stream, sound: av.AudioFrame) -> Iterator[av.Packet]:
    yield from stream.encode(sound)
    yield from stream.encode(None)
