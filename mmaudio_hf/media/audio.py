"""Audio from files: decoding with PyAV, resampling, clips of long files, and writing wav or flac.

All waveforms are mono float32 tensors `(samples,)` in [-1, 1].
"""

import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import scipy.signal
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from torchaudio.transforms import Resample

from mmaudio_hf.files import replacing
from mmaudio_hf.media.container import (
    MediaError,
    audio_stream,
    check_not_encrypted,
    decode_error,
    error_text,
    is_whole,
    media_error,
    open_media,
    seconds,
    stated_seconds,
)
from mmaudio_hf.schema import audio_mode, sequence_lengths

PEAK = 0.95  # of a normalised track
SILENCE = 1e-6  # a track whose peak is no higher than this is rejected

# The resampling filter "kaiser best": 64 zero crossings, cut-off at 0.9476 of the lower Nyquist frequency.
_ZEROS, _ROLLOFF, _BETA = 64, 0.9475937167399596, 14.769656459379492
_MAX_KERNEL = 20_000_000  # values; odd rate pairs such as 44099 -> 16000 would need 1.5e9

_FULL_SCALE = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63, "flt": 1.0, "dbl": 1.0}


# Offsets between timestamps and samples that are left alone lie between these; in between, 0.9 frames of the codec.
_MIN_JITTER, _MAX_JITTER = 0.005, 0.02  # s; half a 25 fps frame is what training can tell apart
_SETTLED = 0.0015  # s; containers that count milliseconds are off by one
_NO_SAMPLES = np.zeros(0, np.float32)
_NO_LEAD = Fraction(0)
_MISSING = 0.1, 2400  # s, samples: mp3 files state up to 2257 samples of padding as audio


class WaveformBuffer:
    """Mono samples `[skip, skip + keep)` of a track, and the peak of the whole of it."""

    def __init__(self, skip: int, needed: int, keep: int, placement: "AudioPlacement | None" = None):
        self.skip, self.needed = skip, needed
        self.keep = keep  # what is needed and what the resampling filter reaches beyond
        self.placement = placement  # of the frames; None: one after the other
        self.chunks: list[np.ndarray] = []
        self.count = 0  # samples seen
        self.peak = 0.0

    @property
    def complete(self) -> bool:
        return self.count >= self.skip + self.needed

    @property
    def full(self) -> bool:
        return self.count >= self.skip + self.keep

    def add(self, samples: np.ndarray, silence: int = 0) -> None:
        """Append `silence` zeros and `samples`; no more zeros are allocated than can be kept."""
        if silence:
            before = self.count
            self.add(np.zeros(min(silence, max(0, self.skip + self.keep - before)), np.float32))
            self.count = before + silence
        inside = samples[max(0, self.skip - self.count) : max(0, self.skip + self.keep - self.count)]
        if inside.size:
            self.chunks.append(inside)
        if samples.size:
            self.peak = float(np.maximum(self.peak, np.abs(samples).max()))  # keeps NaN
        self.count += samples.size

    def add_frame(self, samples: np.ndarray, time: Fraction | None) -> None:
        """Append the samples of a frame; `time` is that of its timestamp, None where it has none."""
        for silence, placed in self.placement.add(samples, time) if self.placement else [(0, samples)]:
            self.add(placed, silence)

    def flush(self) -> None:
        """Append the frame that `placement` holds, if any."""
        for silence, placed in self.placement.flush() if self.placement else ():
            self.add(placed, silence)

    def waveform(self) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *self.chunks]))


class AudioPlacement:
    """Puts the frames of a track where their timestamps say: fills holes with silence, resolves overlaps.

    Small offsets are jitter, and one frame whose timestamp the next one does not confirm is a mistake of the writer:
    both are left alone. So a frame is held until the next one comes. An offset that is corrected is corrected whole.
    Where frames overlap the later one is kept: the end of the earlier one is the padding of a joined part.
    """

    def __init__(self, rate: int, frame_size: int, lead: Fraction = _NO_LEAD):
        """lead: s by which the track begins after the frames that it is read with; positive or negative."""
        self.rate = rate
        seconds = min(_MAX_JITTER, max(_MIN_JITTER, 0.9 * frame_size / rate)) if frame_size else _MAX_JITTER
        self._limit = self._jitter = round(seconds * rate)
        self._settled, self._lead = round(_SETTLED * rate), round(lead * rate)
        self.count = 0  # samples placed
        self.decoded = 0  # samples given
        self.holes = 0  # samples of silence among those placed
        self.drift = 0  # largest difference between a timestamp and the samples decoded before it, in samples
        self._start: Fraction | None = None  # s
        self._placed: tuple[int, np.ndarray] = (0, _NO_SAMPLES)  # the last silence and frame, whose end may be cut
        self._held: tuple[int | None, np.ndarray] | None = None  # position by its timestamp, and a frame
        self._deviation = 0

    def add(self, samples: np.ndarray, time: Fraction | None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (zeros, samples) to append. `time`: s, of the first sample; None where the frame has no timestamp."""
        if self._start is None and time is not None:
            self._start = time - Fraction(self.decoded, self.rate)
        position = None if time is None or self._start is None else round((time - self._start) * self.rate)
        if position is not None:
            deviation = position - self.decoded
            if deviation * self._deviation > 0:  # two in a row: not the mistake of one frame
                self.drift = max(self.drift, min(abs(deviation), abs(self._deviation)))
            self._deviation = deviation
        if self._held is not None:
            yield self._release(self._held, position)
        self._held = position, samples
        self.decoded += samples.size

    def flush(self) -> Iterator[tuple[int, np.ndarray]]:
        """The frames that are held."""
        if self._held is not None:
            yield self._release(self._held, None)
        self._held = None
        yield self._placed
        self._placed = 0, _NO_SAMPLES

    def _release(self, held: tuple[int | None, np.ndarray], following: int | None) -> tuple[int, np.ndarray]:
        """Place the held frame and return what was placed before; `following`: position of the frame after it."""
        (position, samples), (silence, earlier) = held, self._placed
        offset = 0 if position is None else position - self.count
        after = offset if following is None else following - self.count - samples.size
        least = min(offset, after, key=abs)
        # A lead and jitter that are each left alone may be 30 ms together.
        together = abs(least + self._lead) > _MAX_JITTER * self.rate
        moved = offset * after > 0 and abs(least) >= (self._settled if together else self._limit)
        self._limit = self._settled if moved else self._jitter
        hole = offset if moved and offset > 0 else 0
        if moved and offset < 0:
            cut = min(-offset, earlier.size)
            earlier, samples = earlier[: earlier.size - cut], samples[-offset - cut :]
            self.count -= cut
        self.holes += hole
        self.count += hole + samples.size
        self._placed = hole, samples
        return silence, earlier


class AudioTrack:
    """Decodes the packets of one track, placed by timestamps, and finds out whether all of it can be decoded."""

    def __init__(self, path: str | os.PathLike, container: InputContainer, stream: AudioStream):
        self.path, self.container, self.stream = path, container, stream
        self.placement: AudioPlacement | None = None
        self.is_raw = container.format.name in ("mp3", "aac")  # frames without timestamps: those are FFmpeg's estimate
        self.damage = ""
        self._stated: Fraction | None = None  # s, the length
        self._suspect = ""  # an error after which nothing was decoded so far
        self._suspect_is_junk = False
        self._head = b""  # of the first frame
        self._junk = 0  # samples that belong to no frame

    def decode(self, packet: "av.Packet[AudioStream]") -> list[av.AudioFrame]:
        """The frames of a packet, [] where it cannot be decoded. MediaError for an encrypted file."""
        check_not_encrypted(self.path, packet)
        # What all frames of a raw file begin with: of mp3 sync word, version and layer, of aac the sample rate too.
        head = bytes(memoryview(packet)[:3]) if self.is_raw else b""
        if self.container.format.name == "mp3":
            head = bytes([*head[:1], *(byte | 1 for byte in head[1:2])])
        try:
            frames = packet.decode()
        except (av.error.FFmpegError, OSError) as error:
            # A tag is at the end, or between files that were joined.
            if not (self.is_raw and bytes(memoryview(packet)[:3]) in (b"ID3", b"TAG")):
                self._suspect_is_junk = self.is_raw and head != self._head
                self._suspect = self._suspect or f"{error_text(error)} after {self.seconds:.2f} s"
            return []
        if frames and self.placement is None:
            frame_size, self._head = self.stream.codec_context.frame_size or 0, head
            begin = seconds(frames[0].pts, frames[0].time_base) or Fraction(0)
            self._stated = stated_seconds(self.path, self.container, self.stream, begin)
            self.placement = AudioPlacement(frames[0].sample_rate, frame_size)
        other_rate = self.placement and any(frame.sample_rate != self.placement.rate for frame in frames)
        problem = self._suspect or ("the sample rate changes within the file" if other_rate else "")
        # What follows the last frame of a raw file is no audio, though there may be what looks like a frame in it.
        if frames and self.is_raw and (head != self._head or (problem and self._missing() == 0)):
            self._junk += sum(frame.samples for frame in frames)
            return []
        self.damage = self.damage or (problem if frames else "")
        return [] if other_rate else frames

    def is_end(self, error: Exception) -> bool:
        """Whether an error of reading means no more than a rest that is too short for a frame."""
        return self.is_raw and isinstance(error, av.error.InvalidDataError) and self.placement is not None

    def add(self, frame: av.AudioFrame, samples: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """`AudioPlacement.add` of the samples of a frame that `decode` returned."""
        assert self.placement is not None, "it is there from the first frame on"
        return self.placement.add(samples, None if self.is_raw else seconds(frame.pts, frame.time_base))

    @property
    def seconds(self) -> float:
        return self.placement.decoded / self.placement.rate if self.placement else 0.0

    @property
    def error(self) -> str:
        """The first thing that could not be decoded, "" if there is none."""
        return self.damage or self._suspect

    def _missing(self) -> int | None:
        """Samples that the file states and that are not there; None where it states no length."""
        assert self.placement is not None, "it has frames"
        if self._stated is None:
            return None
        return max(0, round(self._stated * self.placement.rate) - self.placement.count)

    def finish(self) -> str:
        """After the last packet: what is wrong with the track, what is missing at its end included."""
        if self.damage or self.placement is None:
            return self.error
        holes, rate = self.placement.holes, self.placement.rate
        have, missing = self.placement.count - holes, self._missing() or 0
        # Its reader steps over damaged blocks without an error, where all samples are known to be there.
        limit = 0 if self.container.format.name == "flac" else max(_MISSING[0] * rate, _MISSING[1])
        whole = is_whole(self.path, self.container)
        may_pause = self.container.format.name.partition(",")[0] in ("mov", "matroska", "ogg")
        missing += 0 if may_pause and whole else holes
        if missing > limit:
            return f"{have} of {have + missing} samples can be decoded"
        if self._junk > limit:
            return f"{self._junk} samples are of no frame of the file, or follow its stated length and an error"
        if self._suspect and not (self._missing() == 0 or self._suspect_is_junk):
            return self._suspect
        return "" if whole else "the file is cut off, or a part of it is damaged"


def mono_samples(frame: av.AudioFrame) -> np.ndarray:
    """Mean over the channels of a decoded frame, (samples,) float32, integers scaled to [-1, 1)."""
    return channel_samples(frame).mean(axis=0, dtype=np.float32)


def channel_samples(frame: av.AudioFrame) -> np.ndarray:
    """A decoded frame as (channels, samples) float32, integers scaled to [-1, 1)."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(frame.samples, frame.layout.nb_channels).T
    dtype = frame.format.name.removesuffix("p")
    data = data.astype(np.float32) - (128 if dtype == "u8" else 0)
    return data / np.float32(_FULL_SCALE[dtype])


def _decode_mono(path: str | os.PathLike) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yield (zeros, mono samples, sample rate) of every frame of the best audio track; any damage is a MediaError."""
    with open_media(path) as container:
        stream = audio_stream(container)
        if stream is None:
            raise media_error(path, "no_audio", "has no audio track; remove it from the list")
        track = AudioTrack(path, container, stream)
        try:
            for packet in container.demux(stream):
                for frame in track.decode(packet):
                    for silence, samples in track.add(frame, mono_samples(frame)):
                        yield silence, samples, frame.sample_rate
                if track.damage:
                    break
        except (av.error.FFmpegError, OSError) as error:
            if not track.is_end(error):
                raise decode_error(path, error) from error
        if track.placement:
            for silence, samples in track.placement.flush():
                yield silence, samples, track.placement.rate
        if damage := track.finish():
            raise decode_error(path, ValueError(damage))


def read_waveform(path: str | os.PathLike, most: float = math.inf) -> tuple[torch.Tensor, int]:
    """Whole file as mono: (waveform (samples,), sample rate in Hz). most: s after which reading stops.

    flac, wav, mp3, ogg, m4a and whatever else PyAV opens. Raises MediaError.
    """
    chunks, count, rate = [], 0, 0
    for silence, samples, rate in _decode_mono(path):
        chunks += [np.zeros(silence, np.float32), samples] if silence else [samples]
        count += silence + samples.size
        if count > most * rate:
            break
    if not chunks:
        raise MediaError("audio_too_short", f"{path}: has no samples; remove it from the list")
    return torch.from_numpy(np.concatenate(chunks)), rate


def count_samples(path: str | os.PathLike) -> tuple[int, int]:
    """(number of samples, sample rate) by decoding the file, which also shows that it can be decoded; MediaError."""
    total, rate = 0, 0
    for silence, samples, rate in _decode_mono(path):  # noqa: B007
        total += silence + samples.size
    return total, rate


def read_audio_clip(
    path: str | os.PathLike,
    *,
    mode: str = "16k",
    start_sample: int = 0,
    end_sample: int | None = None,
    duration: float = 8.0,
) -> torch.Tensor:
    """One clip of an audio file: (samples,), exactly `sequence_lengths(mode, duration).audio_samples`.

    `[start_sample, end_sample)` counts samples of the file. The whole file is normalised, so a quiet clip of a loud
    file stays quiet. Raises MediaError.
    """
    clip = read_audio_clips(path, [(start_sample, end_sample)], mode=mode, duration=duration)[0]
    if isinstance(clip, MediaError):
        raise clip
    return clip


def read_audio_clips(
    path: str | os.PathLike, spans: Sequence[tuple[int, int | None]], *, mode: str = "16k", duration: float = 8.0
) -> list[torch.Tensor | MediaError]:
    """`read_audio_clip` of several spans in one pass: each the clip, or what is wrong with it.

    Memory is bounded by the lengths of the clips, however long the file is. Raises MediaError where the file as a
    whole cannot be used.
    """
    needed, target = sequence_lengths(mode, duration).audio_samples, audio_mode(mode).sample_rate
    buffers: list[WaveformBuffer] = []
    whole, count, rate = WaveformBuffer(0, 0, 0), 0, 0  # `whole`: for its peak
    for silence, samples, rate in _decode_mono(path):
        if not buffers:
            most = math.ceil(needed * rate / target) + rate  # the filter is far shorter than 1 s
            keeps = [most if end is None else max(0, min(most, end - start)) for start, end in spans]
            buffers = [WaveformBuffer(start, keep, keep) for (start, _), keep in zip(spans, keeps, strict=True)]
        for buffer in (whole, *buffers):
            buffer.add(samples, silence)
        count += silence + samples.size
    if not count:
        raise MediaError("audio_too_short", f"{path}: has no samples; remove it from the list")
    if not math.isfinite(whole.peak):
        raise media_error(path, "decode_error", "has samples that are not finite numbers; write the file again")

    def finish(buffer: WaveformBuffer, start: int, end: int) -> torch.Tensor | MediaError:
        """Normalise, resample and cut, in the order of the published reader."""
        if not 0 <= start < end <= count:
            problem = f"clip [{start}, {end}) is outside its {count} samples; make the clip list again"
            return media_error(path, "clip_out_of_range", problem)
        if whole.peak < SILENCE:
            return media_error(path, "silent", "is silent; remove it from the list")
        clip = resample(buffer.waveform() / whole.peak * PEAK, rate, target)
        if len(clip) < needed:
            problem = f"{(end - start) / rate:.3f} s of audio, {needed / target:.3f} s needed; remove it"
            return media_error(path, "audio_too_short", problem)
        return clip[:needed].clone()

    return [
        finish(buffer, start, count if end is None else end)
        for buffer, (start, end) in zip(buffers, spans, strict=True)
    ]


def resample(waveform: torch.Tensor, source_rate: int, target_rate: int) -> torch.Tensor:
    """Resample `(..., samples)` to ceil(target/source * samples) samples by the "kaiser best" filter.

    The published features were made with it: docs/media.md, "What is read".
    """
    if source_rate == target_rate:
        return waveform
    common = math.gcd(source_rate, target_rate)
    up, down = target_rate // common, source_rate // common
    if up * (down + 2 * _ZEROS * max(1.0, down / up) / _ROLLOFF) > _MAX_KERNEL:
        return _resample_odd(waveform, up, down)
    return _resampler(source_rate, target_rate)(waveform)


@lru_cache(maxsize=16)
def _resampler(source_rate: int, target_rate: int) -> Resample:
    return Resample(
        source_rate,
        target_rate,
        lowpass_filter_width=_ZEROS,
        rolloff=_ROLLOFF,
        resampling_method="sinc_interp_kaiser",
        beta=_BETA,
    )


def _resample_odd(waveform: torch.Tensor, up: int, down: int) -> torch.Tensor:
    """The same filter for rates with hardly a common divisor: one polyphase pass instead of a table of all phases."""
    taps = _odd_filter(max(up, down))
    resampled = scipy.signal.resample_poly(waveform.numpy().astype(np.float64), up, down, axis=-1, window=taps)
    return torch.from_numpy(resampled.astype(np.float32))


@lru_cache(maxsize=2)
def _odd_filter(ratio: int) -> np.ndarray:
    half = math.ceil(_ZEROS * ratio / _ROLLOFF)
    return scipy.signal.firwin(2 * half + 1, _ROLLOFF / ratio, window=("kaiser", _BETA))


def write_audio(path: str | os.PathLike, waveform: torch.Tensor, sample_rate: int) -> None:
    """Write `(samples,)` or `(channels, samples)` as 16-bit .wav or .flac, by the ending.

    Values are clipped to [-1, 1]. Written under another name and renamed, so a reader never sees half a file.
    ValueError for another ending, more than two channels, or values that are not finite; OSError that names the file.
    """
    path = Path(path)
    codecs = {".wav": "pcm_s16le", ".flac": "flac"}
    if path.suffix.lower() not in codecs:
        raise ValueError(f"{path}: audio is written as .wav or .flac, not {path.suffix!r}")
    frame = audio_frame(waveform, sample_rate, "s16")
    try:
        with replacing(path) as partial, av.open(str(partial), "w", format=path.suffix.lower()[1:]) as container:
            stream = container.add_stream(codecs[path.suffix.lower()], rate=sample_rate, layout=frame.layout)
            assert isinstance(stream, AudioStream)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:  # the file is opened with the first packet, and the error does not name it
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def audio_frame(waveform: torch.Tensor, sample_rate: int, sample_format: str) -> av.AudioFrame:
    """A frame at time 0 for an encoder from `(samples,)` or `(channels, samples)`: "s16" packed or "fltp" planar."""
    waveform = torch.atleast_2d(torch.as_tensor(waveform).detach().cpu().float())
    if waveform.dim() != 2 or waveform.shape[0] not in (1, 2) or waveform.shape[1] == 0:
        raise ValueError(f"waveform has shape {tuple(waveform.shape)}: (samples,) or (1 or 2, samples) are possible")
    if not waveform.isfinite().all():
        raise ValueError("waveform has values that are not finite numbers")
    samples = waveform.clamp(-1, 1).numpy()
    if sample_format == "s16":
        samples = np.round(samples * 32767).astype(np.int16).T.reshape(1, -1)
    layout = "stereo" if waveform.shape[0] == 2 else "mono"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format=sample_format, layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
    return frame
