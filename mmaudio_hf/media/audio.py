"""Audio from files: decoding with PyAV, resampling, clips of long files, and writing wav or flac.

All waveforms are mono float32 tensors `(samples,)` in [-1, 1].
"""

import math
import os
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import scipy.signal
import torch
from torchaudio.transforms import Resample

from mmaudio_hf.media.container import MediaError, decode_error, media_error, open_media
from mmaudio_hf.schema import audio_mode, sequence_lengths

PEAK = 0.95  # of a normalised track
SILENCE = 1e-6  # a track whose peak is no higher than this is rejected

# The resampling filter "kaiser best": 64 zero crossings, cut-off at 0.9476 of the lower Nyquist frequency.
_ZEROS, _ROLLOFF, _BETA = 64, 0.9475937167399596, 14.769656459379492
_MAX_KERNEL = 20_000_000  # values; odd rate pairs such as 44099 -> 16000 would need 1.5e9

_FULL_SCALE = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63, "flt": 1.0, "dbl": 1.0}


class WaveformBuffer:
    """Mono samples `[skip, skip + keep)` of a track, and the peak of the whole of it."""

    def __init__(self, skip: int, needed: int, keep: int):
        self.skip, self.needed = skip, needed
        self.keep = keep  # what is needed and what the resampling filter reaches beyond
        self.chunks: list[np.ndarray] = []
        self.count = 0  # samples seen
        self.peak = 0.0

    @property
    def complete(self) -> bool:
        return self.count >= self.skip + self.needed

    @property
    def full(self) -> bool:
        return self.count >= self.skip + self.keep

    def add(self, samples: np.ndarray) -> None:
        inside = samples[max(0, self.skip - self.count) : max(0, self.skip + self.keep - self.count)]
        if inside.size:
            self.chunks.append(inside)
        if samples.size:
            self.peak = float(np.maximum(self.peak, np.abs(samples).max()))  # keeps NaN
        self.count += samples.size

    def add_silence(self, num_samples: int) -> None:
        """A hole of any length; no more zeros are allocated than can be kept."""
        zeros = min(num_samples, max(0, self.skip + self.keep - self.count))
        self.add(np.zeros(zeros, np.float32))
        self.count += num_samples - zeros

    def waveform(self) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *self.chunks]))


def mono_samples(frame: av.AudioFrame) -> np.ndarray:
    """Mean over the channels of a decoded frame, (samples,) float32, integers scaled to [-1, 1)."""
    return channel_samples(frame).mean(axis=0, dtype=np.float32)


def channel_samples(frame: av.AudioFrame) -> np.ndarray:
    """A decoded frame as (channels, samples) float32, integers scaled to [-1, 1)."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(frame.samples, frame.layout.nb_channels).T
    dtype = frame.format.name.removesuffix("p")
    data = data.astype(np.float32) - np.float32(128 if dtype == "u8" else 0)
    return data / np.float32(_FULL_SCALE[dtype])


def _decode_mono(path: str | os.PathLike) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (mono samples, sample rate) of every frame of the best audio track; any damage is a MediaError."""
    with open_media(path) as container:
        stream = container.streams.best("audio")
        if stream is None:
            raise media_error(path, "no_audio", "has no audio track; remove it from the list")
        rate, count = None, 0
        try:
            for frame in container.decode(stream):
                if rate not in (None, frame.sample_rate):
                    problem = "the sample rate changes within the file; re-encode it"
                    raise media_error(path, "decode_error", problem)
                rate, count = frame.sample_rate, count + frame.samples
                yield mono_samples(frame), rate
        except (av.error.FFmpegError, OSError) as error:
            raise decode_error(path, error) from error
        if container.format.name == "flac" and stream.duration and count != stream.duration:
            # The flac reader steps over damaged blocks without an error.
            raise decode_error(path, ValueError(f"{count} of {stream.duration} samples can be read"))


def read_waveform(path: str | os.PathLike) -> tuple[torch.Tensor, int]:
    """Whole file as mono: (waveform (samples,), sample rate in Hz).

    flac, wav, mp3, ogg, m4a and whatever else PyAV opens. Raises MediaError.
    """
    chunks, rate = [], 0
    for samples, rate in _decode_mono(path):  # noqa: B007  (the last rate is the file's)
        chunks.append(samples)
    if not chunks:
        raise MediaError("audio_too_short", f"{path}: has no samples; remove it from the list")
    return torch.from_numpy(np.concatenate(chunks)), rate


def count_samples(path: str | os.PathLike) -> tuple[int, int]:
    """(number of samples, sample rate) by decoding the file, which also shows that it can be decoded; MediaError."""
    total, rate = 0, 0
    for samples, rate in _decode_mono(path):  # noqa: B007
        total += samples.size
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
    file stays quiet. Raises MediaError. For several clips of one file, `read_waveform` once
    and `cut_audio_clip` for each.
    """
    waveform, rate = read_waveform(path)
    return cut_audio_clip(
        waveform, rate, mode=mode, start_sample=start_sample, end_sample=end_sample, duration=duration, source=str(path)
    )


def cut_audio_clip(
    waveform: torch.Tensor,
    sample_rate: int,
    *,
    mode: str = "16k",
    start_sample: int = 0,
    end_sample: int | None = None,
    duration: float = 8.0,
    source: str = "waveform",
) -> torch.Tensor:
    """`read_audio_clip` from the waveform of the whole file; `source` names it in messages."""
    end_sample = len(waveform) if end_sample is None else end_sample
    if not 0 <= start_sample < end_sample <= len(waveform):
        message = f"{source}: clip [{start_sample}, {end_sample}) is outside its {len(waveform)} samples"
        raise MediaError("clip_out_of_range", f"{message}; make the clip list again")
    peak = peak_of(waveform, source)
    if peak < SILENCE:
        raise MediaError("silent", f"{source}: is silent; remove it from the list")
    clip = resample(waveform[start_sample:end_sample] / peak * PEAK, sample_rate, audio_mode(mode).sample_rate)
    needed = sequence_lengths(mode, duration).audio_samples
    if len(clip) < needed:
        have = (end_sample - start_sample) / sample_rate
        message = f"{source}: {have:.3f} s of audio, {needed / audio_mode(mode).sample_rate:.3f} s needed; remove it"
        raise MediaError("audio_too_short", message)
    return clip[:needed]


def peak_of(waveform: torch.Tensor, source: str) -> float:
    """Largest magnitude; MediaError when a sample is not finite (possible in float files)."""
    peak = float(waveform.abs().max())
    if not math.isfinite(peak):
        raise MediaError("decode_error", f"{source}: has samples that are not finite numbers; write the file again")
    return peak


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
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with av.open(str(partial), "w", format=path.suffix.lower()[1:]) as container:
            stream = container.add_stream(codecs[path.suffix.lower()], rate=sample_rate, layout=frame.layout)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        os.replace(partial, path)
    except av.error.FFmpegError as error:  # the file is opened with the first packet, and the error does not name it
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


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
