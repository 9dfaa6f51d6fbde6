"""Sounds longer than the network was trained for: windows that overlap, and how they are made one."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from mmaudio_hf.schema import LATENT_STRIDE, SequenceLengths, audio_mode, sequence_lengths

STRETCH = 1.05  # of a window: what is no longer than this is made in one piece
OVERLAP = 0.25  # of a window
_MARGIN = 8  # latents at the end of a decoded piece that its neighbour replaces: what is near an edge sounds different


@dataclass(frozen=True)
class Plan:
    """How a sound of `latent` latents is made: windows of `lengths`, one from each of `starts` (in latents) on."""

    latent: int
    duration: float  # s, of one window
    lengths: SequenceLengths  # of one window
    starts: tuple[int, ...]


def plan_windows(mode: str, seconds: float, window: float, lengths: SequenceLengths) -> Plan:
    """Windows of `window` seconds, whose lengths are `lengths`, for a sound of `seconds`.

    One of its own length if that is no more than STRETCH windows. ValueError for less than 0.64 s.
    """
    if seconds == window:
        return Plan(lengths.latent, window, lengths, (0,))
    whole = sequence_lengths(mode, seconds)
    if seconds <= STRETCH * window:
        return Plan(whole.latent, seconds, whole, (0,))
    return Plan(whole.latent, window, lengths, window_starts(whole.latent, lengths.latent, OVERLAP))


def window_starts(total: int, size: int, overlap: float) -> tuple[int, ...]:
    """First positions of windows of `size` that cover `total`; they overlap by that share of a window or more.

    All hops are `size - overlap * size`, but the last, which is shorter, so that the last window ends at the end.
    """
    hop = max(1, size - round(overlap * size))
    return (*range(0, max(1, total - size), hop), total - size) if total > size else (0,)


def latent_seconds(mode: str) -> float:
    """Seconds of sound that one latent stands for."""
    rate = audio_mode(mode)
    return rate.mel_hop * LATENT_STRIDE / rate.sample_rate


def cross_fade(starts: Sequence[int], size: int, place: int, margin: int = 0) -> torch.Tensor:
    """Weights (size,) of window number `place`: 1, and linear from and to its neighbours where they overlap.

    A window has no weight on the outer `margin` positions of an overlap, or a quarter of it if that is less.
    Where the last hop is short, three windows may meet: divide by the sum.
    """
    weight = torch.ones(size)
    for neighbour, before in ((place - 1, True), (place + 1, False)):
        if 0 <= neighbour < len(starts):
            overlap = size - abs(starts[place] - starts[neighbour])
            edge = min(margin, overlap // 4)
            rise = ((torch.arange(overlap) + 0.5 - edge) / (overlap - 2 * edge)).clamp(0, 1)
            if before:
                weight[:overlap] *= rise
            else:
                weight[size - overlap :] *= 1 - rise
    return weight


def decode_pieces(decode, latent_NC: torch.Tensor, size: int, samples_per_latent: int) -> torch.Tensor:
    """Waveform (samples,), on the CPU, of a latent of any length, decoded in pieces of `size` latents.

    decode: (1, size, C) to (1, samples). Pieces overlap, and are cross-faded where both have a context.
    """
    starts = window_starts(len(latent_NC), size, OVERLAP)
    samples = [start * samples_per_latent for start in starts]
    waveform, total = torch.zeros(2, len(latent_NC) * samples_per_latent)
    for place, (start, first) in enumerate(zip(starts, samples, strict=True)):
        piece = decode(latent_NC[None, start : start + size])[0].float().cpu()
        weight = cross_fade(samples, len(piece), place, _MARGIN * samples_per_latent)
        waveform[first : first + len(piece)] += weight * piece
        total[first : first + len(piece)] += weight
    return waveform / total


_END = object()


def read_ahead(source: Iterator, depth: int) -> Iterator[Any]:
    """What `source` gives, made by a thread `depth` steps ahead. Close the generator to stop the thread."""
    with ThreadPoolExecutor(1) as pool:
        try:
            waiting = deque(pool.submit(next, source, _END) for _ in range(depth))
            while (found := waiting.popleft().result()) is not _END:
                waiting.append(pool.submit(next, source, _END))
                yield found
                del found  # pictures, which nobody needs any more
        finally:
            pool.shutdown(cancel_futures=True)
