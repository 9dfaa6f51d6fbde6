"""Audio longer than the model was trained for: overlapping windows, and how they are blended."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from mmaudio_hf.generation import MAX_SECONDS, check_number
from mmaudio_hf.models.flow import VelocityFunction
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import LATENT_STRIDE, SequenceLengths, audio_mode, sequence_lengths

STRETCH = 1.05  # of a window: up to this length, one window of that length is used
OVERLAP = 0.25  # of a window
_MARGIN = 8  # latents at the ends of a decoded chunk that only its neighbour gives: decoders are worse near an edge


@dataclass(frozen=True)
class WindowSchedule:
    """The windows of an audio of `latent` latents: all of `lengths`, and where they start, in latents."""

    latent: int
    duration: float  # s, of one window
    lengths: SequenceLengths  # of one window
    starts: tuple[int, ...]


def schedule_windows(mode: str, seconds: float, window: float, lengths: SequenceLengths) -> WindowSchedule:
    """Windows of `window` seconds, whose lengths are `lengths`, that cover `seconds` of audio.

    Up to STRETCH windows of audio are covered by one of the same length. ValueError for less than 0.64 s.
    """
    if seconds == window:
        return WindowSchedule(lengths.latent, window, lengths, (0,))
    total = sequence_lengths(mode, seconds)
    if seconds <= STRETCH * window:
        return WindowSchedule(total.latent, seconds, total, (0,))
    return WindowSchedule(total.latent, window, lengths, window_starts(total.latent, lengths.latent, OVERLAP))


@contextlib.contextmanager
def lengths_set(model: MMAudio, lengths: SequenceLengths) -> Iterator[None]:
    """The model set to `lengths`, and back. Outside inference mode: its tables must stay usable for training."""
    before = model.latent_length, model.clip_length, model.sync_length
    during = lengths.latent, lengths.clip, lengths.sync
    if during != before:
        model.set_lengths(*during)
    try:
        yield
    finally:
        if during != before:
            model.set_lengths(*before)


def checked_lengths(mode: str, seconds: float, name: str = "duration") -> SequenceLengths:
    """Lengths for a duration; ValueError that begins with `name` for one that is too short, too long, or no number."""
    check_number(name, seconds)
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{name} must be positive and finite, not {seconds} s")
    if seconds > MAX_SECONDS:  # before memory is gone
        raise ValueError(f"{name}: {seconds:g} s is longer than the {MAX_SECONDS:g} s that are generated at once")
    try:
        return sequence_lengths(mode, seconds)
    except ValueError as error:
        raise error if name == "duration" else ValueError(f"{name}: {error}") from None


def window_starts(total: int, size: int, overlap: float) -> tuple[int, ...]:
    """Starts of windows of `size` that cover `total` and overlap by at least the fraction `overlap`.

    All hops are `size - overlap * size`; only the last is shorter, so that the last window ends at the end.
    """
    hop = max(1, size - round(overlap * size))
    return (*range(0, max(1, total - size), hop), total - size) if total > size else (0,)


def latent_seconds(mode: str) -> float:
    """Seconds of audio of one latent."""
    rate = audio_mode(mode)
    return rate.mel_hop * LATENT_STRIDE / rate.sample_rate


def cross_fade(starts: Sequence[int], size: int, index: int, margin: int = 0) -> torch.Tensor:
    """Weights (size,) of window number `index`: 1, and linear from and to its neighbours where they overlap.

    A window has no weight on the outer `margin` of an overlap, or on a quarter of it if that is less. Where the last
    hop is short, three windows may overlap: divide by the sum of weights.
    """
    weight = torch.ones(size)
    for neighbour in (index - 1, index + 1):
        if 0 <= neighbour < len(starts):
            overlap = size - abs(starts[index] - starts[neighbour])
            edge = min(margin, overlap // 4)
            rise = ((torch.arange(overlap) + 0.5 - edge) / (overlap - 2 * edge)).clamp(0, 1)
            if neighbour < index:
                weight[:overlap] *= rise
            else:
                weight[size - overlap :] *= 1 - rise
    return weight


def blended_velocity(
    schedule: WindowSchedule, chunks: Sequence[range], velocities: Sequence[VelocityFunction], device: torch.device
) -> VelocityFunction:
    """Velocity function (1, M, C) of a long latent: that of its windows, cross-faded where they overlap.

    `velocities` are those of each chunk of windows. Since they are blended at every step, the windows agree where they
    overlap (MultiDiffusion, arXiv 2302.08113).
    """
    starts, size = schedule.starts, schedule.lengths.latent
    weights = [cross_fade(starts, size, index)[:, None].to(device) for index in range(len(starts))]
    total_M1 = torch.zeros(schedule.latent, 1, device=device)
    for start, weight in zip(starts, weights, strict=True):
        total_M1[start : start + size] += weight

    def velocity(latent_BMC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        blended = torch.zeros_like(latent_BMC)
        for chunk, window_velocity in zip(chunks, velocities, strict=True):
            windows = torch.cat([latent_BMC[:, starts[i] : starts[i] + size] for i in chunk])  # (chunk, N, C)
            for i, v_NC in zip(chunk, window_velocity(windows, t_B.expand(len(chunk))), strict=True):
                blended[0, starts[i] : starts[i] + size] += weights[i] * v_NC
        return blended / total_M1

    return velocity


def decode_chunks(
    decode: Callable[[torch.Tensor], torch.Tensor], latent_NC: torch.Tensor, size: int, samples_per_latent: int
) -> torch.Tensor:
    """Waveform (samples,), on the CPU, of a latent of any length, decoded in overlapping chunks of `size` latents.

    decode: (1, size, C) to (1, samples). The chunks are cross-faded where both have context.
    """
    starts = window_starts(len(latent_NC), size, OVERLAP)
    first_samples = [start * samples_per_latent for start in starts]
    waveform, total = torch.zeros(2, len(latent_NC) * samples_per_latent)
    for index, (start, first) in enumerate(zip(starts, first_samples, strict=True)):
        chunk = decode(latent_NC[None, start : start + size])[0].float().cpu()
        weight = cross_fade(first_samples, len(chunk), index, _MARGIN * samples_per_latent)
        waveform[first : first + len(chunk)] += weight * chunk
        total[first : first + len(chunk)] += weight
    return waveform / total


_END = object()


def read_ahead(source: Iterator, depth: int) -> Generator[Any, None, None]:
    """Items of `source`, produced by a thread `depth` steps ahead. Close the generator to stop the thread."""
    with ThreadPoolExecutor(1) as pool:
        try:
            pending = deque(pool.submit(next, source, _END) for _ in range(depth))
            while (item := pending.popleft().result()) is not _END:
                pending.append(pool.submit(next, source, _END))
                yield item
                del item  # frames: 58 MB
        finally:
            pool.shutdown(cancel_futures=True)
