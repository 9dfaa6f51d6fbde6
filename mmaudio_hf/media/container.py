"""Media files: opening them, what their container states, and the error for a file that cannot be used."""

import contextlib
import mmap
import os
import re
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

# Formats that state their length; of others, such as raw streams, FFmpeg estimates it from the bit rate.
_STATED_LENGTH = {"flac", "wav", "w64", "aiff", "caf", "au", "ogg", "mov", "matroska", "asf", "wv", "tta", "ape"}
_ANIMATIONS = {"gif", "apng"}
_IMAGE_BRANDS = {"avif", "avis", "heic", "heix", "hevc", "mif1", "msf1"}  # of the file type box
_WAV_SLACK = 1024  # bytes that a header may promise too many
_SEGMENT, _CLUSTER = "18538067", "1f43b675"  # of Matroska
_MATROSKA_ELEMENTS = (
    *("1a45dfa3", "114d9b74", "ec", "bf", "1549a966", "1654ae6b", "1c53bb6b", "1043a770", "1941a469", "1254c367"),
    *("e7", "5854", "a7", "ab", "a3", "a0", "af"),  # of a cluster
)


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
    """Open a local video or audio file for reading; MediaError not_found or unreadable, as an image is too."""
    container = open_any(path)
    # FFmpeg looks at the content, whatever the name is, and reads images by formats of their own, those of AVIF and
    # HEIC as mp4. A GIF is a video without audio where its name says that it is one, and else a mistake.
    name, brand = container.format.name, container.metadata.get("major_brand", "").strip()
    renamed = name in _ANIMATIONS and Path(path).suffix.lower() != f".{name}"
    if name.endswith("_pipe") or name.startswith("image2") or renamed or brand in _IMAGE_BRANDS:
        codec = container.streams.video[0].codec_context.name
        container.close()
        what = f"is a still image or an animation ({codec}), not a video or audio file"
        raise MediaError("unreadable", f"{path}: {what}; replace the file")
    return container


def open_any(path: str | os.PathLike) -> InputContainer:
    """`open_media`, for still images too."""
    path = Path(path)
    if not path.is_file():
        raise MediaError("not_found", f"{path}: no such file; correct the path")
    try:
        # Absolute, so that no name is read as a protocol; a playlist inside may not reach the network.
        container = av.open(str(path.absolute()), options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        reason = error_text(error)
        with contextlib.suppress(OSError, UnicodeDecodeError):  # text, as an error page or a Git LFS pointer
            text = path.open("rb").read(60).decode()
            reason = "it is empty" if not text else reason if "\0" in text else f"it is text: {text!r}"
        raise MediaError("unreadable", f"{path}: cannot be opened as media ({reason}); replace the file") from error
    for video in container.streams.video:
        video.codec_context.thread_count = 1  # extraction runs one process per core
    for audio in container.streams.audio:
        if audio.codec_context.name == "flac":  # its frames have checksums, which FFmpeg does not look at by itself
            audio.codec_context.options = {"err_detect": "crccheck+explode"}
    return container


def video_stream(container: InputContainer) -> VideoStream | None:
    """The video track that players choose."""
    stream = container.streams.best("video")
    return stream if isinstance(stream, VideoStream) else None


def audio_stream(container: InputContainer) -> AudioStream | None:
    """The audio track that players choose."""
    stream = container.streams.best("audio")
    return stream if isinstance(stream, AudioStream) else None


def seconds(ticks: int | None, unit: Fraction | None) -> Fraction | None:
    """A time of FFmpeg in seconds; None where the file has none."""
    return None if ticks is None or unit is None else Fraction(ticks * unit)


def check_not_encrypted(path: str | os.PathLike, packet: av.Packet) -> None:
    """MediaError for a packet that needs a key: decoders report damage, or decode it to noise."""
    if packet.has_sidedata("encryption_info"):
        raise media_error(path, "decode_error", "is encrypted (DRM); replace it by an unencrypted copy")


def probe(path: str | os.PathLike) -> dict[str, Any]:
    """What the container states about a file, as plain JSON values; times in seconds. Decodes nothing. MediaError."""

    def rounded(ticks: int | None, unit: Fraction | None) -> float | None:
        time = seconds(ticks, unit)
        return None if time is None else round(float(time), 6)

    with open_any(path) as container:
        stated: dict[str, Any] = {"format": container.format.name, "bytes": container.size}
        stated["duration"] = rounded(container.duration, Fraction(1, av.time_base))
        video, audio = video_stream(container), audio_stream(container)
        for stream in (video, audio):
            if stream is not None:
                stated[stream.type] = {
                    "codec": stream.codec_context.name,
                    "start": rounded(stream.start_time, stream.time_base),
                    "duration": rounded(stream.duration, stream.time_base),
                }
        if video is not None:
            stated["video"] |= {"width": video.codec_context.width, "height": video.codec_context.height}
            stated["video"] |= {"pixel_format": video.codec_context.pix_fmt, "frame_rate": str(video.average_rate)}
            stated["video"]["frames"] = video.frames
        if audio is not None:
            stated["audio"] |= {"sample_rate": audio.codec_context.sample_rate}
            stated["audio"] |= {"channels": audio.codec_context.layout.nb_channels}
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
    time = seconds(frame.dts if frame.pts is None else frame.pts, frame.time_base)
    if time is None:
        raise media_error(path, "decode_error", "its frames come without timestamps; convert it to mp4")
    return time


# --- The length that a file states, and whether it is whole ----------------------------------------------------------


def stated_seconds(
    path: str | os.PathLike, container: InputContainer, stream: AudioStream, begin: Fraction
) -> Fraction | None:
    """Length of the audio from `begin` on (s, its first frame), as the file states it.

    None where it does not, and FFmpeg only estimates it, or knows that of a longer track alone.
    """
    name = container.format.name.partition(",")[0]
    if name == "mp3":
        samples = _mpeg_header_samples(path, stream.codec_context.frame_size)
        return Fraction(samples, stream.codec_context.sample_rate) if samples else None
    if name not in _STATED_LENGTH:
        return None
    stated = seconds(stream.duration or None, stream.time_base)
    if name == "matroska" and (tag := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))):
        stated = 3600 * int(tag[1]) + 60 * int(tag[2]) + Fraction(tag[3])
    if stated is None and len(container.streams) == 1:
        stated = seconds(container.duration, Fraction(1, av.time_base))
    # Both state when the track ends.
    return stated - begin if stated and name in ("ogg", "matroska") else stated


def _mpeg_header_samples(path: str | os.PathLike, frame_size: int) -> int | None:
    """Samples of an mp3 file by the header in its first frame (Xing, Info, VBRI); None without one.

    Read here, since FFmpeg falls back on the bit rate where the file is larger than the header says.
    """
    with open(path, "rb") as file:
        header = file.read(10)
        # The size of an ID3 tag is four times seven bits.
        size = sum((byte & 127) << shift for byte, shift in zip(header[6:], (21, 14, 7, 0), strict=False))
        file.seek(10 + size if header[:3] == b"ID3" else 0)
        first = file.read(512)
    if (at := first.find(b"VBRI")) >= 0:
        return int.from_bytes(first[at + 14 : at + 18]) * frame_size
    at = max(first.find(b"Xing"), first.find(b"Info"))
    if at < 0 or not first[at + 7] & 1:
        return None
    padding = int.from_bytes(first[at + 141 : at + 144]) if first[at + 120 : at + 122] in (b"LA", b"La") else 0
    return int.from_bytes(first[at + 8 : at + 12]) * frame_size - (padding >> 12) - (padding & 4095)


def is_whole(path: str | os.PathLike, container: InputContainer) -> bool:
    """Whether the chunks, pages or elements of a wav, Ogg or Matroska file follow one another to its end.

    FFmpeg steps over damaged ones without an error: the time that they took is then a hole in the timestamps, as a
    pause is. True for other formats.
    """
    check = {"wav": _wav_is_whole, "ogg": _ogg_is_whole, "matroska": _matroska_is_whole}
    name = container.format.name.partition(",")[0]
    if name not in check or not container.size:
        return True
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return check[name](data)


def _wav_is_whole(data: mmap.mmap) -> bool:
    at, size = 12, 0
    while data[at : at + 4] != b"data":
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
        if at + 8 > len(data):
            return True
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    return at + 8 + size - len(data) <= _WAV_SLACK or size >= 0xFFFF0000  # larger: unknown, as in a stream


_BITS_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_is_whole(data: mmap.mmap) -> bool:
    """Pages with the right checksums and consecutive numbers; whatever follows the last one is no audio."""
    at, numbers = data.find(b"OggS"), dict[bytes, int]()
    while data[at : at + 4] == b"OggS":
        body = at + 27 + data[at + 26]
        page = data[at : body + sum(data[at + 27 : body])]
        track, number = page[14:18], int.from_bytes(page[18:22], "little")
        # CRC-32 without its own field (RFC 3533): that of zlib with the bits in the other order, begun at 0.
        crc = zlib.crc32((page[:22] + bytes(4) + page[26:]).translate(_BITS_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        checksum = int(f"{crc:032b}"[::-1], 2).to_bytes(4, "little")
        if number != numbers.get(track, number - 1) + 1 or checksum != page[22:26]:
            return False
        numbers[track] = number
        at += len(page)
    return data.find(b"OggS", at) < 0


def _matroska_is_whole(data: mmap.mmap) -> bool:
    """Known elements (RFC 9559) one after the other; those of the segment and its clusters are stepped into."""
    at, end = 0, len(data)
    while at < min(end, len(data)):
        start = at + 9 - data[at].bit_length()
        name = data[at:start].hex()
        at = start + 9 - data[start : start + 1].ljust(1)[0].bit_length()
        # Less the bit that marks the length of the size itself; all bits set: not known.
        size, unknown = (int.from_bytes(data[start:at]) - (1 << 7 * (at - start)), (1 << 7 * (at - start)) - 1)
        if name == _SEGMENT and size != unknown:
            end = at + size  # what follows it is no audio
        elif name in _MATROSKA_ELEMENTS:
            at += size
        elif name not in (_SEGMENT, _CLUSTER):
            return False
    return at == end <= len(data)
