"""Media files: opening them, what their container states, and the error for a file that cannot be used."""

import contextlib
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer


class MediaError(ValueError):
    """A file that cannot be used.

    `reason` is a stable token: not_found, unreadable, no_video, no_audio, video_too_short, audio_too_short, silent,
    decode_error, clip_out_of_range. `probe` is what the container states (see `probe`), {} if it did not open.
    """

    def __init__(self, reason: str, message: str, probe: dict[str, Any] | None = None):
        super().__init__(reason, message, probe or {})  # all three in args, so that it pickles between processes

    @property
    def reason(self) -> str:
        return self.args[0]

    @property
    def probe(self) -> dict[str, Any]:
        return self.args[2]

    def __str__(self) -> str:
        return self.args[1]


def open_media(path: str | os.PathLike) -> InputContainer:
    """Open a local file for reading; MediaError not_found or unreadable."""
    path = Path(path)
    if not path.is_file():
        raise MediaError("not_found", f"{path}: no such file; check the folder and the id in the list")
    try:
        # Absolute, so that no name is read as a protocol; a playlist inside may not reach the network.
        container = av.open(str(path.absolute()), options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        message = f"{path}: cannot be opened as media ({error.strerror}); replace the file"
        raise MediaError("unreadable", message) from error
    for stream in container.streams.video:
        stream.codec_context.thread_count = 1  # extraction runs one process per core
    return container


def probe(path: str | os.PathLike) -> dict[str, Any]:
    """What the container states about a file, as plain JSON values; times in seconds. Decodes nothing. MediaError."""

    def seconds(value: int | None, unit: Fraction | None) -> float | None:
        return None if value is None or unit is None else round(float(value * unit), 6)

    with open_media(path) as container:
        stated: dict[str, Any] = {"format": container.format.name, "bytes": container.size}
        stated["duration"] = seconds(container.duration, Fraction(1, av.time_base))
        for stream in (container.streams.best("video"), container.streams.best("audio")):
            if stream is None:
                continue
            context = stream.codec_context
            track = {"codec": context.name, "start": seconds(stream.start_time, stream.time_base)}
            track["duration"] = seconds(stream.duration, stream.time_base)
            if stream.type == "video":
                track |= {"width": context.width, "height": context.height, "pixel_format": context.pix_fmt}
                track |= {"frame_rate": str(stream.average_rate), "frames": stream.frames}
            else:
                track |= {"sample_rate": context.sample_rate, "channels": context.channels}
            stated[stream.type] = track
        return stated


def media_error(path: str | os.PathLike, reason: str, problem: str) -> MediaError:
    """The MediaError about a file that opens; `problem` is what is wrong with it and what to do."""
    stated = {}
    with contextlib.suppress(MediaError):
        stated = probe(path)
    return MediaError(reason, f"{path}: {problem}", stated)


def decode_error(path: str | os.PathLike, error: Exception) -> MediaError:
    """The MediaError for data that the decoder rejects."""
    return media_error(path, "decode_error", f"damaged data ({error_text(error)}); replace or re-encode the file")


def error_text(error: Exception) -> str:
    """FFmpeg's own words for an error, without errno and file name."""
    return getattr(error, "strerror", None) or str(error)


def frame_time(path: str | os.PathLike, frame: av.VideoFrame | av.AudioFrame) -> Fraction:
    """Presentation time of a frame in seconds; MediaError where the file has none."""
    ticks = frame.dts if frame.pts is None else frame.pts
    if ticks is None:
        raise media_error(path, "decode_error", "its frames come without timestamps; convert it to mp4")
    return ticks * frame.time_base
