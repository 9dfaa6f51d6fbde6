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


# --- Looks of the report, and its players ----------------------------------------------------------------------------


STYLE = """
:root { color-scheme: light dark; --back: #fbfaf7; --card: #fff; --text: #1d1c1a; --soft: #6a6862; --line: #dedbd3;
  --a: #9a968c; --b: #1f6fb2; --c: #c2471d; }
@media (prefers-color-scheme: dark) { :root { --back: #161617; --card: #202022; --text: #eceae4; --soft: #a3a098;
  --line: #3a393a; --a: #8d8a83; --b: #6cb2ee; --c: #f0895f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 34px 0 12px; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.kind, .note { color: var(--soft); font-size: .875rem; margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 160px), 1fr)); gap: 12px; margin: 0; }
.tiles > div, .charts > figure, article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tiles > div { padding: 10px 14px; }
dt { color: var(--soft); font-size: .875rem; }
dd { margin: 0; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
dd .note { display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 12px; }
figure { margin: 0; min-width: 0; }
.charts > figure { padding: 12px; }
figcaption { font-weight: 600; font-size: .9375rem; margin-bottom: 6px; }
figcaption .note { font-weight: 400; margin-left: 10px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.thin { stroke-width: 1.3; }
.dashed { stroke-dasharray: 5 4; }
.line.a { stroke: var(--a); } .line.b { stroke: var(--b); } .line.c { stroke: var(--c); }
.dot.a { fill: var(--a); } .dot.b { fill: var(--b); } .dot.c { fill: var(--c); }
.keys { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 0;
  padding: 0; font-size: .8125rem; }
.keys li::before { content: ""; display: inline-block; width: 18px; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid; }
.keys li.dashed::before { border-top-style: dashed; }
.keys .a::before { border-color: var(--a); } .keys .b::before { border-color: var(--b); }
.keys .c::before { border-color: var(--c); }
.marks { margin-bottom: 12px; }
.key { display: inline-block; vertical-align: middle; background: #17152a; width: 18px; height: 18px;
  position: relative; }
article { padding: 14px; margin-bottom: 14px; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px;
  margin-top: 10px; }
.narrow { grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); }
video, audio { display: block; width: 100%; margin-bottom: 8px; }
video { max-height: 330px; background: #000; border-radius: 4px; }
.spectrogram { position: relative; height: 130px; overflow: hidden; border-radius: 4px; background: #0c0a1e; }
.spectrogram img { position: absolute; width: 100%; height: 100%; }
i.event, i.onset, .playhead, .key::before { position: absolute; content: ""; }
i.event, .key.event::before { top: 0; bottom: 0; border-left: 1px dashed #fff; opacity: .8; }
.key::before { left: 8px; }
i.onset, .key.onset::before { bottom: 0; border: 5px solid transparent; border-top-width: 0;
  border-bottom: 9px solid #5ff0d8; }
i.onset, .key.onset::before { margin-left: -5px; }
.key.onset::before { left: 9px; }
.playhead { display: none; top: 0; bottom: 0; width: 2px; background: #5ff0d8; }
.seconds { position: relative; height: 20px; font-size: .75rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.seconds span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.seconds span:first-child { transform: none; }
.wide { margin: 12px 0; overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.scores { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.scores th, .scores td { padding: 8px 14px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
.scores tbody tr:last-child > * { border-bottom: 0; }
.scores th { font-weight: 600; }
.scores .note { display: block; font-weight: 400; }
.scores .best { font-weight: 700; color: var(--b); }
"""

# One player at a time, and a line over its spectrogram where it is.
SCRIPT = """
const players = document.querySelectorAll("video, audio");
for (const player of players) {
  const head = player.parentElement.querySelector(".playhead");
  const follow = () => {
    head.style.display = "block";
    head.style.left = 100 * player.currentTime / player.duration + "%";
    if (!player.paused) requestAnimationFrame(follow);
  };
  player.addEventListener("play", () => {
    for (const other of players) if (other !== player) other.pause();
    follow();
  });
  player.addEventListener("seeked", follow);
}
"""
