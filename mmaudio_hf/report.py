"""The page of a run: `report/index.html`, one file that opens offline, with curves, scores and clips to watch.

Nothing on the page is fetched: pictures, sound and plots are inside it, and its content policy forbids the network.
"""

import base64
import contextlib
import glob
import hashlib
import json
import math
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mmaudio_hf.config import Recipe, load_recipe
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.evaluation import onset_f1, onset_scores, onset_times, waveform_scores
from mmaudio_hf.features.mel import MelSpectrogram
from mmaudio_hf.generation import MMAudioPipeline, Request
from mmaudio_hf.media.audio import MediaError, write_audio
from mmaudio_hf.media.example import read_events
from mmaudio_hf.media.video import read_video, write_video_with_audio
from mmaudio_hf.models.pretrained import find_pretrained
from mmaudio_hf.schema import (
    CLIP_FEATURES,
    MEAN,
    MODES,
    SYNC_FEATURES,
    TEXT_FEATURES,
    audio_mode,
    check_id,
)

MEDIA_LIMIT = 6_000_000  # bytes of one video on the page; larger ones are shown by their sound alone
IMAGE_RANGE = 60.0  # dB between the brightest and the darkest colour of a spectrogram


@dataclass(frozen=True)
class ReportClip:
    """One clip on the page. Waveforms are (samples,) at `sample_rate`, the times are in seconds."""

    name: str
    caption: str
    generated: torch.Tensor
    sample_rate: int
    reference: torch.Tensor | None = None  # the true sound
    video: Path | None = None
    events: tuple[float, ...] | None = None  # when something happens; None: not known
    scores: Mapping[str, float] = field(default_factory=dict)


# --- a run to clips and scores -------------------------------------------------------------------------------------


def report_run(
    run_dir: str | os.PathLike,
    *,
    events: str | os.PathLike | None = None,
    shown: int = 6,
    scored: int = 64,
    device: str = "auto",
    started: float | None = None,
) -> dict[str, Any]:
    """Generate the first `scored` test clips of a run, score them, write the page with `shown` of them.

    events: `events.json` of the example media, for scores of event timing. Returns the key figures as plain JSON
    values; with `started`, a time in seconds since the epoch, "seconds" is what has passed since.
    ValueError when the run has no checkpoint, a store of `data.test` is missing, or an encoder file is.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is no run folder: it has no config.yaml")
    recipe = load_recipe(run_dir / "config.yaml")
    times = {} if events is None else {name: e.times for name, e in read_events(events).items()}
    pipeline = MMAudioPipeline.from_pretrained(run_dir, device=device)
    rows = _test_rows(recipe, scored)
    clips, timing = _generated_clips(recipe, pipeline, rows, times, shown)
    write_report(run_dir, clips[:shown], timing=timing)
    summary = run_summary(run_dir) | timing
    if started is not None:
        summary["seconds"] = round(time.time() - started, 1)
    return {name: _plain(value) for name, value in summary.items()}


@dataclass(frozen=True)
class _Row:
    """One row of a test store."""

    item_id: str
    caption: str
    request: Request
    mean: torch.Tensor  # (N, C) latent of the true sound
    video: Path | None
    normalize_audio: bool  # of the source of the video


def _test_rows(recipe: Recipe, limit: int) -> list[_Row]:
    videos = {source.name: source for source in recipe.extraction.videos}
    rows: list[_Row] = []
    for source in recipe.data.test:
        with FeatureStore.open(source.path) as store:
            count = min(len(store), limit - len(rows))
            media = videos.get(Path(source.path).name)
            for place in range(count):
                item_id = check_id(store.ids[place], f"{store.path}.tsv")
                values = {name: column[0].float() for name, column in store.read([place]).items()}
                features = {n: values.get(n) for n in (CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES)}
                request = Request(key=item_id, **features)
                video = None if media is None else _find_video(Path(media.media_dir), item_id)
                normalize = media is None or media.normalize_audio
                rows.append(_Row(item_id, store.captions[place], request, values[MEAN], video, normalize))
    return rows


def _find_video(folder: Path, item_id: str) -> Path | None:
    found = sorted(path for path in folder.glob(f"{glob.escape(item_id)}.*") if path.stem == item_id)
    return found[0] if found else None


def _generated_clips(recipe: Recipe, pipeline: MMAudioPipeline, rows: list[_Row], times, shown: int):
    """Clips with generated and true sound, and the scores of event timing, {} where no events are known."""
    sampling = recipe.sampling
    results = pipeline.generate(
        [row.request for row in rows],
        sampling.batch_size,
        num_steps=sampling.num_steps,
        guidance_scale=sampling.guidance_scale,
        solver=sampling.solver,
        seed=recipe.seed,
    )
    clips, detected, ceiling, known = [], [], [], []
    rate, duration = pipeline.sample_rate, recipe.model.duration
    for row, result in zip(rows, results, strict=True):
        decoded = pipeline.decode(row.mean)
        reference = _true_sound(row, recipe) if len(clips) < shown else None
        events = times.get(row.item_id)
        if events is not None:
            known.append(events)
            detected.append(onset_times(result.waveform, rate))
            ceiling.append(onset_times(decoded, rate))
        inside = None if events is None else tuple(t for t in events if t < duration)
        reference = decoded if reference is None else reference
        distance = waveform_scores(result.waveform, reference, rate)["log_mel_distance"]
        scores = {"log-mel distance to the truth in dB:": distance}
        clips.append(ReportClip(row.item_id, row.caption, result.waveform, rate, reference, row.video, inside, scores))
    if not known:
        return clips, {"generated_clips": len(clips)}
    scores = onset_scores(detected, known, duration=duration, seed=recipe.seed)
    best = onset_scores(ceiling, known, duration=duration, seed=recipe.seed)
    timing = {f"onset_{name}": value for name, value in scores.items()} | {"onset_f1_true_latents": best["f1"]}
    return clips, {"generated_clips": len(clips), **timing}


def _true_sound(row: _Row, recipe: Recipe) -> torch.Tensor | None:
    """The sound of the file, read as extraction reads it; None when it cannot be read any more."""
    if row.video is None:
        return None
    with contextlib.suppress(MediaError):
        return read_video(
            row.video,
            mode=recipe.model.mode,
            duration=recipe.model.duration,
            alignment=recipe.extraction.alignment,
            normalize_audio=row.normalize_audio,
            as_uint8=True,
        ).audio
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


# --- what a run has written ----------------------------------------------------------------------------------------


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Entries of a JSON lines file; a last line cut short by a kill is passed over."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def _series(entries: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) wherever the value was logged and is finite."""
    return [(e["step"], e[name]) for e in entries if name in e and math.isfinite(e[name])]


def run_summary(run_dir: str | os.PathLike) -> dict[str, Any]:
    """Key figures of a run, from metrics.jsonl, speed.jsonl and the weights that generation uses."""
    run_dir = Path(run_dir)
    metrics, speed = _read_lines(run_dir / "metrics.jsonl"), _read_lines(run_dir / "speed.jsonl")
    raw, averaged = _series(metrics, "val/loss"), _series(metrics, "val_ema/loss")
    summary: dict[str, Any] = {"run": run_dir.resolve().name, "steps": metrics[-1]["step"] if metrics else 0}
    if raw:
        summary |= {"val_loss_first": raw[0][1], "val_loss_last": raw[-1][1]}
    if averaged:
        summary["val_loss_last_ema"] = averaged[-1][1]
    if speed:
        summary["steps_per_second"] = median(e["speed/steps_per_second"] for e in speed)
        summary["samples_per_second"] = median(e["speed/samples_per_second"] for e in speed)
        summary["peak_memory_gb"] = max(e["speed/peak_memory_gb"] for e in speed)
    with contextlib.suppress(ValueError, OSError):
        weights = json.loads((find_pretrained(run_dir) / "weights.json").read_text())
        summary |= {"weights": weights["weights"], "sigma_rel": weights["sigma_rel"], "weights_step": weights["step"]}
    return summary


# --- the page ------------------------------------------------------------------------------------------------------


def write_report(
    run_dir: str | os.PathLike, clips: Sequence[ReportClip], *, timing: Mapping[str, float] | None = None
) -> Path:
    """Write `report/index.html` of a run and return its path.

    timing: `evaluation.onset_scores` with "onset_" before each name, over all generated clips.
    """
    run_dir = Path(run_dir)
    metrics, summary = _read_lines(run_dir / "metrics.jsonl"), run_summary(run_dir)
    name = escape(summary["run"])
    with tempfile.TemporaryDirectory() as scratch:
        cards = "".join(_clip_card(clip, Path(scratch)) for clip in clips)
    if not cards:
        cards = "<p>No clips were generated: the recipe has no <code>data.test</code>.</p>"
    script_hash = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline';"
        f" script-src 'sha256-{script_hash}'"
    )
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{name}: report</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kind">Training report</p>
<h1>{name}</h1>
<p class="note">{_headline(summary)}</p>
</header>
<section aria-labelledby="figures"><h2 id="figures">Key figures</h2>{_tiles(summary, timing or {})}</section>
<section aria-labelledby="curves"><h2 id="curves">Curves</h2><div class="charts">{_charts(metrics)}</div></section>
<section aria-labelledby="clips"><h2 id="clips">Held-out clips</h2>{_legend(clips)}{cards}</section>
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""
    path = run_dir / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _headline(summary: Mapping[str, Any]) -> str:
    text = f"{summary['steps']:,} steps"
    if "weights" in summary:
        kind = escape(str(summary["weights"])).upper()
        width = "" if summary["sigma_rel"] is None else f" (σ<sub>rel</sub> {summary['sigma_rel']:g})"
        text += f" · sound from the {kind}{width} weights of step {summary['weights_step']:,}"
    return text


def _tiles(summary: Mapping[str, Any], timing: Mapping[str, float]) -> str:
    tiles = []
    if "onset_f1" in timing:
        chance, best = timing["onset_f1_shuffled"], timing.get("onset_f1_true_latents")
        note = f"{timing['onset_clips']} clips, ±0.1 s" + ("" if best is None else f"; true latents {best:.2f}")
        tiles.append(("Onset F1", f"{timing['onset_f1']:.2f}", note))
        tiles.append(("Onset F1, shuffled", f"{chance:.2f}", "same sounds, events of other clips"))
    if "val_loss_first" in summary:
        tiles.append(("Validation loss, first", f"{summary['val_loss_first']:.3f}", "before training"))
        last = summary.get("val_loss_last_ema", summary["val_loss_last"])
        note = f"raw weights {summary['val_loss_last']:.3f}" if "val_loss_last_ema" in summary else "raw weights"
        tiles.append(
            ("Validation loss, last", f"{last:.3f}", ("EMA; " if "val_loss_last_ema" in summary else "") + note)
        )
    if "steps_per_second" in summary:
        note = f"{summary['samples_per_second']:.3g} samples/s, median"
        tiles.append(("Steps per second", f"{summary['steps_per_second']:.3g}", note))
        tiles.append(("Peak memory", f"{summary['peak_memory_gb']:.2f} GB", "of the first process"))
    cells = (f'<div><dt>{a}</dt><dd>{b}<span class="note">{c}</span></dd></div>' for a, b, c in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _charts(metrics: Sequence[Mapping[str, Any]]) -> str:
    loss = {
        "train/loss": ("training", "a thin"),
        "val/loss": ("validation", "b"),
        "val_ema/loss": ("validation, EMA", "c"),
    }
    curves = [Curve(n, label, style, _series(metrics, n)) for n, (label, style) in loss.items()]
    rate = Curve("train/learning_rate", "learning rate", "a", _series(metrics, "train/learning_rate"))
    charts = [
        line_chart("Loss", "step", [c for c in curves if c.points]),
        line_chart("Validation loss over time t", "t: 0 is noise, 1 is data", _loss_over_time(metrics), x_range=(0, 1)),
        line_chart("Learning rate", "step", [rate] if rate.points else [], from_zero=True),
    ]
    return "".join(charts)


def _loss_over_time(metrics: Sequence[Mapping[str, Any]]) -> list["Curve"]:
    """Validation loss by bins of t: before training, and last."""
    curves = []
    for kind, label, style, pick in (
        ("val", "first", "b dashed", 0),
        ("val", "last", "b", -1),
        ("val_ema", "last, EMA", "c", -1),
    ):
        prefix = f"{kind}/loss_t_"
        lines = [entry for entry in metrics if any(key.startswith(prefix) for key in entry)]
        if lines and not (pick == -1 and kind == "val" and len(lines) == 1):
            bins = {
                float(key.removeprefix(prefix)): value for key, value in lines[pick].items() if key.startswith(prefix)
            }
            points = [(t + 0.05, bins[t]) for t in sorted(bins)]
            curves.append(
                Curve(f"{prefix}*:{lines[pick]['step']}", f"{label} (step {lines[pick]['step']})", style, points)
            )
    return curves


# --- plots ---------------------------------------------------------------------------------------------------------

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


# --- clips ---------------------------------------------------------------------------------------------------------


def _legend(clips: Sequence[ReportClip]) -> str:
    if not any(clip.events is not None for clip in clips):
        return ""
    return (
        '<p class="note marks">Over the spectrograms: <span class="key event"></span> when something happens in the'
        ' picture, <span class="key onset"></span> when a sound was found to begin.</p>'
    )


def _clip_card(clip: ReportClip, scratch: Path) -> str:
    sounds = [("Generated", clip.generated)]
    if clip.reference is not None:
        sounds.append(("Ground truth", clip.reference))
    levels = [_decibels(waveform, clip.sample_rate) for _, waveform in sounds]
    top = max(float(level.max()) for level in levels)
    sides = "".join(
        _side(clip, title, waveform, _image(level, top), scratch)
        for (title, waveform), level in zip(sounds, levels, strict=True)
    )
    extra = "".join(f" · {escape(name)} {value:.3g}" for name, value in clip.scores.items())
    return (
        f'<article aria-label="clip {escape(clip.name)}"><h3>{escape(clip.caption) or "no caption"}</h3>'
        f'<p class="note">{escape(clip.name)}{extra}</p><div class="sides">{sides}</div></article>'
    )


def _side(clip: ReportClip, title: str, waveform: torch.Tensor, image: bytes, scratch: Path) -> str:
    seconds = waveform.shape[-1] / clip.sample_rate
    onsets = onset_times(waveform, clip.sample_rate)
    marks, verdict = [], ""
    if clip.events is not None:
        marks = [_mark("event", time, seconds) for time in clip.events]
        marks += [_mark("onset", time, seconds) for time in onsets]
        precision, recall, f1 = onset_f1(onsets, clip.events)
        verdict = f'<span class="note">onset F1 {f1:.2f} (precision {precision:.2f}, recall {recall:.2f})</span>'
    described = f"Mel spectrogram of the {title.lower()} sound, {seconds:.1f} s, {len(onsets)} onsets"
    return (
        f'<figure class="side"><figcaption>{title}{verdict}</figcaption>'
        f"{_player(clip, title, waveform, scratch)}"
        f'<div class="spectrogram"><img src="{_data_uri("image/png", image)}" alt="{described}">{"".join(marks)}'
        f'<i class="playhead"></i></div><div class="seconds" aria-hidden="true">{_second_labels(seconds)}</div>'
        "</figure>"
    )


def _mark(kind: str, time: float, seconds: float) -> str:
    return f'<i class="{kind}" style="left:{100 * time / seconds:.2f}%"></i>'


def _second_labels(seconds: float) -> str:
    step = max(1, round(seconds / 8))
    return "".join(
        f'<span style="left:{100 * s / seconds:.2f}%">{s}{" s" if s == 0 else ""}</span>'
        for s in range(0, math.ceil(seconds), step)
    )


def _player(clip: ReportClip, title: str, waveform: torch.Tensor, scratch: Path) -> str:
    """The video with this sound, or the sound alone where there is no video or it is too large."""
    label = escape(f"{title} sound of {clip.name}")
    if clip.video is not None:
        path = scratch / "clip.mp4"
        with contextlib.suppress(MediaError):
            write_video_with_audio(clip.video, waveform, clip.sample_rate, path)
            if path.stat().st_size <= MEDIA_LIMIT:
                source = _data_uri("video/mp4", path.read_bytes())
                return f'<video controls playsinline preload="metadata" aria-label="{label}" src="{source}"></video>'
    path = scratch / "clip.wav"
    write_audio(path, waveform, clip.sample_rate)
    return f'<audio controls aria-label="{label}" src="{_data_uri("audio/wav", path.read_bytes())}"></audio>'


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --- spectrogram pictures ------------------------------------------------------------------------------------------

# Dark to bright at even steps of lightness: red, green, blue.
_COLOURS = ((12, 10, 30), (58, 22, 92), (130, 36, 104), (198, 62, 76), (240, 124, 40), (252, 200, 80), (255, 250, 210))


def _decibels(waveform: torch.Tensor, sample_rate: int) -> np.ndarray:
    """Mel levels (bins, frames) in dB; only differences have a meaning."""
    mode = next(name for name in MODES if audio_mode(name).sample_rate == sample_rate)
    mel = MelSpectrogram(mode)(waveform.reshape(1, -1))[0].numpy()
    return 20 * mel if mode == "16k" else 20 / math.log(10) * mel


def _image(level: np.ndarray, top: float) -> bytes:
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


_STYLE = """
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
"""

# One player at a time, and a line over its spectrogram where it is.
_SCRIPT = """
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
