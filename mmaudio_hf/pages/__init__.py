"""HTML pages: what they share, that is the templates, the charts (SVG) and the spectrograms (PNG)."""

import base64
import functools
import hashlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from mmaudio_hf.features.autoencoder import MelSpectrogram, mel_filter_bank
from mmaudio_hf.files import replacing
from mmaudio_hf.schema import MODES, audio_mode


@functools.cache
def _environment() -> Environment:
    options: Any = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("mmaudio_hf.pages"), **options)
    script = environment.get_template("players.js").render()  # the one that a page may run, by its policy
    environment.globals["script_hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment


def render(template: str, **values: Any) -> Markup:
    """HTML of a template; `Markup`, so other templates take it as it is."""
    return Markup(_environment().get_template(template).render(**values))


def write_page(path: str | os.PathLike, template: str, **values: Any) -> Path:
    """Render a template that extends `base.html.jinja` into `path`, which is replaced as a whole; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        # File names on Linux are bytes: what is not UTF-8 arrives as surrogates, which no page can hold.
        partial.write_text(render(template, **values), encoding="utf-8", errors="replace")
    return path


IMAGE_RANGE = 60.0  # dB between the brightest and the darkest colour of a spectrogram

# Area of a line chart within its SVG of 400 x 240, which is its size in pixels where three stand side by side.
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 376, 24, 202
_MAX_DOTS = 40  # points of a curve that are marked one by one; more would hide the line


@dataclass(frozen=True)
class Curve:
    """One line of a chart; `style` is its CSS class, `points` are (x, y)."""

    name: str
    label: str
    style: str
    points: list[tuple[float, float]]
    best: float | None = None  # x of a point that is marked by a ring


def line_chart(
    title: str,
    x_label: str,
    curves: Sequence[Curve],
    *,
    y_label: str = "",
    from_zero: bool = False,
    x_range: Sequence[float] = (),
) -> Markup:
    """A figure with an SVG line chart and its legend; every point of every curve is drawn, axes hold `x_range`.

    y_label: what is drawn, or its unit, over the vertical axis.
    """
    lines: list[dict[str, Any]] = []
    x_ticks, y_ticks = [0.0, 1.0], [0.0, 1.0]
    if curves:
        xs, ys = ([point[axis] for curve in curves for point in curve.points] for axis in (0, 1))
        xs += x_range
        x_ticks = ticks(min(xs), max(xs))
        y_ticks = ticks(0 if from_zero else min(ys), max(ys))
    x_pixel = lambda x: round(float(np.interp(x, (x_ticks[0], x_ticks[-1]), (_LEFT, _RIGHT))), 1)  # noqa: E731
    y_pixel = lambda y: round(float(np.interp(y, (y_ticks[0], y_ticks[-1]), (_BOTTOM, _TOP))), 1)  # noqa: E731
    for curve in curves:
        dots = [(x_pixel(x), y_pixel(y), f"{y:.4g} at {x:g}") for x, y in curve.points]
        ring = next((dot for dot, (x, _) in zip(dots, curve.points, strict=True) if x == curve.best), None)
        lines.append({"curve": curve, "dots": dots, "marked": len(dots) <= _MAX_DOTS, "ring": ring})
    axes = {"x_ticks": [(x_pixel(x), _number(x)) for x in x_ticks], "x_label": x_label}
    axes |= {"y_ticks": [(y_pixel(y), _number(y)) for y in y_ticks], "y_label": y_label}
    description = "; ".join(f"{c.label} from {c.points[0][1]:.3g} to {c.points[-1][1]:.3g}" for c in curves)
    return render("line_chart.html.jinja", title=title, description=description, lines=lines, **axes)


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that enclose [low, high]."""
    span = high - low or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * k for k in (1, 2, 5, 10) if span / (unit * k) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * n, 12) if step > 1e-9 else step * n for n in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{round(value, 6):g}"


def data_uri(kind: str, content: bytes) -> str:
    """A file as an address that holds it; `kind` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --- spectrograms --------------------------------------------------------------------------------------------------

# Dark to bright at even steps of lightness: red, green, blue.
_COLOURS = ((12, 10, 30), (58, 22, 92), (130, 36, 104), (198, 62, 76), (240, 124, 40), (252, 200, 80), (255, 250, 210))


def decibels(waveform: torch.Tensor, sample_rate: int) -> np.ndarray:
    """Mel levels (bins, frames) in dB; only differences have a meaning."""
    mode = next(name for name in MODES if audio_mode(name).sample_rate == sample_rate)
    mel = MelSpectrogram(mode)(waveform.reshape(1, -1))[0].numpy()
    # Mels of 16k are log10 of magnitudes, those of 44k natural logarithms.
    return 20 * mel if mode == "16k" else 20 / math.log(10) * mel


def spectrogram_figure(level: np.ndarray, top: float, seconds: float, sample_rate: int) -> dict[str, Any]:
    """Values of `spectrogram.html.jinja`: the image of `level` from `top` dB down, and what stands along its axes."""
    labels = range(0, math.ceil(seconds), max(1, round(seconds / 8)))
    return {
        "image": data_uri("image/png", spectrogram_image(level, top)),
        "length": f"{seconds:.1f} s",
        "hertz": frequency_ticks(sample_rate),
        "seconds": [(f"{s}{'' if s else ' s'}", f"{100 * s / seconds:.2f}%") for s in labels],
    }


def frequency_ticks(sample_rate: int) -> list[tuple[str, str]]:
    """(frequency, place from the top in percent) for the axis of `spectrogram_image` at this rate."""
    mode = next(name for name in MODES if audio_mode(name).sample_rate == sample_rate)
    bank = mel_filter_bank(mode)
    peaks = bank.argmax(1).numpy() * sample_rate / 2 / (bank.shape[1] - 1)  # Hz of each bin, rising
    hertz = [hz for hz in (500, 1000, 2000, 4000, 8000, 16000) if hz < peaks[-1]]
    tops = 100 - 100 * (np.interp(hertz, peaks, np.arange(len(peaks))) + 0.5) / len(peaks)
    names = [f"{hz} Hz" if hz < 1000 else f"{hz // 1000} kHz" for hz in hertz]
    return [(name, f"{top:.1f}%") for name, top in zip(names, tops, strict=True)]


def spectrogram_image(level: np.ndarray, top: float) -> bytes:
    """PNG of levels (bins, frames) from `top` dB down, low frequencies at the bottom."""
    shade = np.clip((level[::-1] - top) / IMAGE_RANGE + 1, 0, 1)
    anchors = np.linspace(0, 255, len(_COLOURS))
    channels = [np.interp(np.arange(256), anchors, channel) for channel in np.array(_COLOURS).T]
    palette = np.stack(channels, axis=1).round().astype(np.uint8)
    return encode_png((255 * shade).round().astype(np.uint8), palette)


def encode_png(pixels: np.ndarray, palette: np.ndarray) -> bytes:
    """PNG file of palette indices (H, W) uint8 with a palette (256, 3) uint8."""
    image = Image.fromarray(pixels)
    image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
