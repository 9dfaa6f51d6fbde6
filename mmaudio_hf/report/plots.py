"""Charts and spectrograms of the report: SVG and PNG made here, so that the page needs nothing else."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch

from mmaudio_hf.features.mel import MelSpectrogram
from mmaudio_hf.schema import MODES, audio_mode

IMAGE_RANGE = 60.0  # dB between the brightest and the darkest colour of a spectrogram

_WIDTH, _HEIGHT = 400, 240  # of a chart, in pixels where three stand side by side
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 24, 8, 38


@dataclass(frozen=True)
class Curve:
    """One line of a chart; `style` is its CSS class."""

    name: str
    label: str
    style: str
    points: list[tuple[float, float]]


def line_chart(
    title: str, x_label: str, curves: Sequence[Curve], *, from_zero: bool = False, x_range: Sequence[float] = ()
) -> str:
    """A figure with an SVG line chart and its legend; every point of every curve is drawn, axes hold `x_range`."""
    if not curves:
        return f"<figure><figcaption>{escape(title)}</figcaption><p class='note'>Nothing was logged.</p></figure>"
    xs, ys = ([point[axis] for curve in curves for point in curve.points] for axis in (0, 1))
    xs += x_range
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(0 if from_zero else min(ys), max(ys))
    x_low, x_high = min(x_ticks[0], min(xs)), max(x_ticks[-1], max(xs)) or 1
    y_low, y_high = y_ticks[0], y_ticks[-1]
    place_x = lambda x: _LEFT + (x - x_low) / (x_high - x_low or 1) * (_WIDTH - _LEFT - _RIGHT)  # noqa: E731
    place_y = lambda y: _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low or 1) * (_HEIGHT - _TOP - _BOTTOM)  # noqa: E731
    parts = []
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {place_y(y):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place_y(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{place_x(x):.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{_number(x)}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for curve in curves:
        points = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in curve.points)
        parts.append(f'<polyline class="line {curve.style}" data-series="{escape(curve.name)}" points="{points}"/>')
        if len(curve.points) <= 40:
            parts += [
                f'<circle class="dot {curve.style}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="2.5">'
                f"<title>{escape(curve.label)}: {y:.4g} at {x:g}</title></circle>"
                for x, y in curve.points
            ]
    described = "; ".join(f"{c.label} from {c.points[0][1]:.3g} to {c.points[-1][1]:.3g}" for c in curves)
    legend = "".join(f'<li class="{c.style}">{escape(c.label)}</li>' for c in curves) if len(curves) > 1 else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{title}: {described}")}">'
        f'{"".join(parts)}</svg><ul class="keys">{legend}</ul></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers that enclose [low, high]."""
    span = high - low or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * k for k in (1, 2, 5, 10) if span / (unit * k) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * n for n in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{round(value, 6):g}"


def data_uri(kind: str, content: bytes) -> str:
    """A file as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --- spectrogram pictures ------------------------------------------------------------------------------------------

# Dark to bright at even steps of lightness: red, green, blue.
_COLOURS = ((12, 10, 30), (58, 22, 92), (130, 36, 104), (198, 62, 76), (240, 124, 40), (252, 200, 80), (255, 250, 210))


def decibels(waveform: torch.Tensor, sample_rate: int) -> np.ndarray:
    """Mel levels (bins, frames) in dB; only differences have a meaning."""
    mode = next(name for name in MODES if audio_mode(name).sample_rate == sample_rate)
    mel = MelSpectrogram(mode)(waveform.reshape(1, -1))[0].numpy()
    return 20 * mel if mode == "16k" else 20 / math.log(10) * mel


def spectrogram_image(level: np.ndarray, top: float) -> bytes:
    """PNG of levels (bins, frames) from `top` dB down, low frequencies at the bottom."""
    shade = np.clip((level[::-1] - top) / IMAGE_RANGE + 1, 0, 1)
    return encode_png((255 * shade).round().astype(np.uint8), _palette())


def _palette() -> np.ndarray:
    anchors = np.linspace(0, 255, len(_COLOURS))
    channels = [np.interp(np.arange(256), anchors, channel) for channel in np.array(_COLOURS).T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def encode_png(pixels: np.ndarray, palette: np.ndarray) -> bytes:
    """PNG file of palette indices (H, W) uint8 with a palette (256, 3) uint8 (ISO/IEC 15948)."""
    height, width = pixels.shape
    rows = np.pad(pixels, ((0, 0), (1, 0)))  # filter type 0 before every row

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", palette.tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)
