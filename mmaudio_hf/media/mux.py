"""Write a video file with new audio: its packets copied where the container allows it, else encoded as H.264."""

import errno
import heapq
import itertools
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

from mmaudio_hf.media.audio import audio_frame
from mmaudio_hf.media.container import frame_time, media_error, open_media
from mmaudio_hf.media.video import RgbConverter, video_extent
from mmaudio_hf.schema import SYNC_FPS

VIDEO_FORMATS = {".mp4": "mp4", ".mkv": "matroska"}  # what is written
_TARGET_FAULTS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOTDIR),
)


def write_video_with_audio(
    video_path: str | os.PathLike, waveform: torch.Tensor, sample_rate: int, out_path: str | os.PathLike
) -> bool:
    """Write an .mp4 or .mkv with the frames of `video_path` and `waveform` as its only audio track (AAC).

    waveform: `(samples,)` or `(1 or 2, samples)` in [-1, 1], starting with the first frame. Packets are copied without
    re-encoding where the container can hold their codec, else frames are encoded as H.264; returns whether they were
    copied. The result is as long as the shorter of the two, to a frame (a copy may keep the few frames that others
    depend on). Written under another name and renamed. Raises MediaError for a video that cannot be read, ValueError
    for a bad waveform or another ending, OSError that names the result for a full disk and a folder that cannot be
    written.
    """
    out_path, waveform = Path(out_path), torch.atleast_2d(torch.as_tensor(waveform))
    if out_path.suffix.lower() not in VIDEO_FORMATS:
        raise ValueError(f"{out_path}: a video is written as {' or '.join(VIDEO_FORMATS)}, not {out_path.suffix!r}")
    audio_frame(waveform, sample_rate, "fltp")  # raises for a bad waveform before any file is written
    partial = out_path.with_name(f".{out_path.name}.{os.getpid()}.part")
    try:
        start, length, has_timestamps = video_extent(video_path)
        length = min(length, Fraction(waveform.shape[-1], sample_rate))
        audio = audio_frame(waveform[:, : round(length * sample_rate)], sample_rate, "fltp")
        target_format = VIDEO_FORMATS[out_path.suffix.lower()]
        with open_media(video_path) as source, av.open(str(partial), "w", format=target_format) as target:
            video = source.streams.best("video")
            copy = has_timestamps and video.codec_context.codec.canonical_name in target.supported_codecs
            packets = (_copied if copy else _encoded)(source, video, target, start, length)
            stream = target.add_stream("aac", rate=sample_rate, layout=audio.layout.name)
            next(packets)  # adds its stream, which must come before the first packet
            for packet in heapq.merge(packets, _encoded_audio(stream, audio), key=_packet_time):
                target.mux(packet)
        os.replace(partial, out_path)
        return copy
    except av.error.FFmpegError as error:
        if error.errno in _TARGET_FAULTS:  # the error need not name its file; the video was there and could be opened
            raise OSError(error.errno, error.strerror or str(error), str(out_path)) from error
        problem = f"no audio can be added to it ({error.strerror or error}); re-encode it as H.264 mp4"
        raise media_error(video_path, "decode_error", problem) from error
    finally:
        partial.unlink(missing_ok=True)


def _packet_time(packet: av.Packet) -> Fraction:
    return (packet.pts if packet.dts is None else packet.dts) * packet.time_base


def _copied(
    source: InputContainer, video: VideoStream, target: OutputContainer, start: Fraction, length: Fraction
) -> Iterator[av.Packet | None]:
    """None once the stream is added, then the source's packets moved to start at 0."""
    stream = target.add_stream_from_template(video)
    yield None
    packets = [packet for packet in source.demux(video) if packet.size]
    if any(packet.dts is None for packet in packets):
        # Matroska has no decoding times: the presentation times in order, early enough for every frame.
        order = sorted(packet.pts for packet in packets)
        delay = max(early - packet.pts for early, packet in zip(order, packets, strict=True))
        for early, packet in zip(order, packets, strict=True):
            packet.dts = early - delay
    shift = round(start / video.time_base)
    for packet in packets:
        # By decoding time: a frame shown after the end may be needed by one shown before it.
        if (packet.dts - shift) * packet.time_base < length:
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
            yield packet


def _encoded(
    source: InputContainer, video: VideoStream, target: OutputContainer, start: Fraction, length: Fraction
) -> Iterator[av.Packet | None]:
    """None once the stream is added, then the frames as H.264 yuv420p, cropped to even sizes and upright."""
    frames, to_rgb = source.decode(video), RgbConverter(rotate=True)
    first = next(frames)
    height, width = (side // 2 * 2 for side in to_rgb(first).shape[:2])
    rate, unit = video.average_rate or SYNC_FPS, video.time_base
    stream = target.add_stream("libx264", rate=rate, width=width, height=height, pix_fmt="yuv420p")
    stream.options, stream.codec_context.time_base = {"crf": "18"}, unit
    yield None
    for frame in itertools.chain([first], frames):
        if (time := frame_time(source.name, frame) - start) < length:
            rgb = np.ascontiguousarray(to_rgb(frame)[:height, :width])
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = round(time / unit), unit
            yield from stream.encode(frame)
    yield from stream.encode(None)


def _encoded_audio(stream: AudioStream, audio: av.AudioFrame) -> Iterator[av.Packet]:
    yield from stream.encode(audio)
    yield from stream.encode(None)
