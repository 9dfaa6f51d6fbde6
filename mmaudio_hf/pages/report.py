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
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mmaudio_hf.config import Recipe, load_recipe
from mmaudio_hf.evaluation import onset_f1, onset_scores, onset_times, waveform_scores
from mmaudio_hf.evaluation.results import find_scores
from mmaudio_hf.evaluation.samples import REFERENCE, SAMPLES_FILE, HeldOutItem, generate_items, read_items
from mmaudio_hf.generation.pipeline import MMAudioPipeline
from mmaudio_hf.media.audio import MediaError, read_waveform, write_audio
from mmaudio_hf.media.example import read_events
from mmaudio_hf.media.mux import write_video_with_audio
from mmaudio_hf.media.video import read_video
from mmaudio_hf.models.pretrained import find_pretrained
from mmaudio_hf.pages.plots import SCRIPT, STYLE, Curve, data_uri, decibels, encode_png, line_chart, spectrogram_image
from mmaudio_hf.schema import check_id

__all__ = [
    "Curve",
    "ReportClip",
    "encode_png",
    "line_chart",
    "report_run",
    "run_summary",
    "write_report",
]

MEDIA_LIMIT = 6_000_000  # bytes of one video on the page; larger ones are shown by their sound alone


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
    clips, timing = _generated_clips(recipe, pipeline, read_items(recipe.data.test, scored), times, shown)
    write_report(run_dir, clips[:shown], timing=timing)
    summary = run_summary(run_dir) | timing
    if started is not None:
        summary["seconds"] = round(time.time() - started, 1)
    return {name: _plain(value) for name, value in summary.items()}


def _find_video(folder: Path, item_id: str) -> Path | None:
    found = sorted(path for path in folder.glob(f"{glob.escape(item_id)}.*") if path.stem == item_id)
    return found[0] if found else None


def _generated_clips(recipe: Recipe, pipeline: MMAudioPipeline, items: list[HeldOutItem], times, shown: int):
    """Clips with generated and true sound, and the scores of event timing, {} where no events are known."""
    clips, detected, ceiling, known = [], [], [], []
    rate, duration = pipeline.sample_rate, recipe.model.duration
    for item, result in generate_items(pipeline, items, recipe.sampling, recipe.seed):
        decoded = pipeline.decode(item.latent)
        video, reference = _video_and_sound(item, recipe, listen=len(clips) < shown)
        events = times.get(item.item_id)
        if events is not None:
            known.append(events)
            detected.append(onset_times(result.waveform, rate))
            ceiling.append(onset_times(decoded, rate))
        inside = None if events is None else tuple(t for t in events if t < duration)
        reference = decoded if reference is None else reference
        distance = waveform_scores(result.waveform, reference, rate)["log_mel_distance"]
        scores = {"log-mel distance to the truth in dB:": distance}
        clips.append(ReportClip(item.item_id, item.caption, result.waveform, rate, reference, video, inside, scores))
    if not known:
        return clips, {"generated_clips": len(clips)}
    scores = onset_scores(detected, known, duration=duration, seed=recipe.seed)
    best = onset_scores(ceiling, known, duration=duration, seed=recipe.seed)
    timing = {f"onset_{name}": value for name, value in scores.items()} | {"onset_f1_true_latents": best["f1"]}
    return clips, {"generated_clips": len(clips), **timing}


def _video_and_sound(item: HeldOutItem, recipe: Recipe, listen: bool) -> tuple[Path | None, torch.Tensor | None]:
    """The video of an item and its sound, read as extraction reads it; None for what is not there any more."""
    source = next((source for source in recipe.extraction.videos if source.name == item.store), None)
    video = None if source is None else _find_video(Path(source.media_dir), item.item_id)
    if video is None or not listen:
        return video, None
    with contextlib.suppress(MediaError):
        sound = read_video(
            video,
            mode=recipe.model.mode,
            duration=recipe.model.duration,
            alignment=recipe.extraction.alignment,
            normalize_audio=source.normalize_audio,
            as_uint8=True,
        ).audio
        return video, sound
    return video, None


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
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
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
<style>{STYLE}</style>
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
{scores_section(find_scores(run_dir))}
{samples_section(run_dir)}
<section aria-labelledby="clips"><h2 id="clips">Held-out clips</h2>{_legend(clips)}{cards}</section>
</main>
<script>{SCRIPT}</script>
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
        tiles.append(("Peak memory", f"{summary['peak_memory_gb']:.2f} GB", "most of one process"))
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
    distance = _series(metrics, "eval/log_mel_distance")
    if distance:
        curve = Curve("eval/log_mel_distance", "log-mel distance", "c", distance)
        charts.append(line_chart("Samples: log-mel distance to the truth in dB", "step", [curve]))
    return "".join(charts)


def _loss_over_time(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
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
    levels = [decibels(waveform, clip.sample_rate) for _, waveform in sounds]
    top = max(float(level.max()) for level in levels)
    sides = "".join(
        _side(clip, title, waveform, spectrogram_image(level, top), scratch)
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
        f'<div class="spectrogram"><img src="{data_uri("image/png", image)}" alt="{described}">{"".join(marks)}'
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
                source = data_uri("video/mp4", path.read_bytes())
                return f'<video controls playsinline preload="metadata" aria-label="{label}" src="{source}"></video>'
    path = scratch / "clip.wav"
    write_audio(path, waveform, clip.sample_rate)
    return f'<audio controls aria-label="{label}" src="{data_uri("audio/wav", path.read_bytes())}"></audio>'


# --- The part of the report that lets one hear how the samples of a run changed while it was trained -----------------


_ITEMS, _STEPS = 3, 4  # shown; sound is the heaviest part of the page


def samples_section(run_dir: Path) -> str:
    """A section of HTML with the first items of `samples/` at steps from the first to the last; "" without any."""
    found = {}
    for folder in (run_dir / "samples").glob("step_*"):
        if re.fullmatch(r"step_\d+", folder.name) and (folder / SAMPLES_FILE).is_file():
            found[int(folder.name.removeprefix("step_"))] = folder
    steps = sorted(found)
    if not steps:
        return ""
    count = min(_STEPS, len(steps))
    chosen = sorted({steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)} | {steps[-1]})
    rows = {step: {row["id"]: row for row in json.loads((found[step] / SAMPLES_FILE).read_text())} for step in chosen}
    cards = "".join(
        _card(run_dir, row, {step: found[step] for step in chosen if item_id in rows[step]}, rows)
        for item_id, row in list(rows[steps[-1]].items())[:_ITEMS]
    )
    return (
        '<section aria-labelledby="samples"><h2 id="samples">Samples over the steps</h2><p class="note marks">The same'
        f" items and the same noise at every step; {len(steps)} steps were sampled.</p>{cards}</section>"
    )


def _card(run_dir: Path, row: dict, folders: dict[int, Path], rows: dict[int, dict[str, dict]]) -> str:
    name = f"{check_id(row['id'], SAMPLES_FILE)}.wav"
    files = [(f"Step {step:,}", folder / name, rows[step][row["id"]]["scores"]) for step, folder in folders.items()]
    reference = run_dir / "samples" / REFERENCE / name
    if reference.is_file():
        files.insert(0, ("True latent, decoded", reference, {}))
    sounds = [read_waveform(path) for _, path, _ in files]
    levels = [decibels(waveform, rate) for waveform, rate in sounds]
    top = max(float(level.max()) for level in levels)
    sides = "".join(
        _sample_side(title, path, scores, spectrogram_image(level, top), row["id"])
        for (title, path, scores), level in zip(files, levels, strict=True)
    )
    return (
        f'<article aria-label="sample {escape(row["id"])}"><h3>{escape(row["caption"]) or "no caption"}</h3>'
        f'<p class="note">{escape(row["id"])}</p><div class="sides narrow">{sides}</div></article>'
    )


def _sample_side(title: str, path: Path, scores: dict[str, float], image: bytes, item_id: str) -> str:
    note = ""
    if "log_mel_distance" in scores:
        note = f'<span class="note">log-mel distance {scores["log_mel_distance"]:.1f} dB</span>'
    label = escape(f"{title}, {item_id}")
    return (
        f'<figure class="side"><figcaption>{title}{note}</figcaption>'
        f'<audio controls preload="none" aria-label="{label}" src="{data_uri("audio/wav", path.read_bytes())}"></audio>'
        f'<div class="spectrogram"><img src="{data_uri("image/png", image)}" alt="Mel spectrogram: {label}">'
        '<i class="playhead"></i></div></figure>'
    )


# --- Scores of one or several evaluations in one table ---------------------------------------------------------------


_BETTER = {"lower": "lower is better", "higher": "higher is better", "zero": "best at 0", "": ""}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def as_text(contents: Sequence[Mapping[str, Any]]) -> str:
    """A table of the contents of files of scores: one line per score, one column per evaluation."""
    rows = [["", *(_title(content) for content in contents)]]
    rows.append(["weights", *(_weights(content) for content in contents)])
    rows.append(["sounds", *(_sounds(content) for content in contents)])
    for name, unit, _ in _names(contents):
        label = f"{name} [{unit}]"
        rows.append([label, *(_number(content["scores"].get(name)) for content in contents)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for content in contents:
        lines += [f"{_title(content)}: no {what}: {why}" for what, why in content["not_computed"].items()]
        lines += [f"{_title(content)}: {_dropped(entry)}" for entry in content["items"]["dropped"]]
    return "\n".join(lines)


def write_comparison(contents: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """Write a page with `table` that opens offline; return its path."""
    path = Path(path)
    title = _title(contents[0]) if len(contents) == 1 else f"{len(contents)} evaluations"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}: scores</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><p class="kind">Scores</p><h1>{escape(title)}</h1></header>
{table(contents)}
</main>
</body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def scores_section(contents: Sequence[Mapping[str, Any]]) -> str:
    """A section of the report with the last scores of each split; "" without any."""
    last = {content["split"]: content for content in contents}
    if not last:
        return ""
    return f'<section aria-labelledby="scores"><h2 id="scores">Scores</h2>{table(list(last.values()))}</section>'


def table(contents: Sequence[Mapping[str, Any]]) -> str:
    """HTML table of scores, the best of each row marked, and notes on what is missing."""
    head = "".join(_head(content) for content in contents)
    body = "".join(_row(name, unit, better, contents) for name, unit, better in _names(contents))
    notes = [f"{_title(c)}: no {what}: {why}" for c in contents for what, why in c["not_computed"].items()]
    notes += [f"{_title(content)}: {_dropped(entry)}" for content in contents for entry in content["items"]["dropped"]]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<div class="wide"><table class="scores"><thead><tr><th scope="col">Score</th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><ul class="note">{listed}</ul>'
    )


def _head(content: Mapping[str, Any]) -> str:
    notes = (_weights(content), _sounds(content), _settings(content))
    shown = "".join(f'<span class="note">{escape(note)}</span>' for note in notes)
    return f'<th scope="col">{escape(_title(content))}{shown}</th>'


def _row(name: str, unit: str, better: str, contents: Sequence[Mapping[str, Any]]) -> str:
    scores = [content["scores"].get(name) for content in contents]
    # A note says that the figure is none to compare, as -1 in place of a distance; and splits differ in difficulty.
    values = [score["value"] if score and "note" not in score else None for score in scores]
    best = _best(values, better) if len({content["split"] for content in contents}) == 1 else set()
    cells = "".join(
        f"<td{' class=best' if place in best else ''}>{escape(_number(score))}{_used(score, content)}</td>"
        for place, (score, content) in enumerate(zip(scores, contents, strict=True))
    )
    about = ", ".join(part for part in (unit, _BETTER[better]) if part)
    return f'<tr><th scope="row">{escape(name)}<span class="note">{escape(about)}</span></th>{cells}</tr>'


def _best(values: Sequence[float | None], better: str) -> set[int]:
    """Places of the best values; none where they are all alike."""
    rank = {"lower": lambda v: v, "higher": lambda v: -v, "zero": abs}.get(better)
    ranked = {place: rank(value) for place, value in enumerate(values) if rank and value is not None}
    if len(set(ranked.values())) < 2:
        return set()
    return {place for place, value in ranked.items() if value == min(ranked.values())}


def _used(score: Mapping[str, Any] | None, content: Mapping[str, Any]) -> str:
    """How many sounds a score is of, where they are not all; and why not."""
    if not score:
        return ""
    notes = [f"{score['used']} used"] if score["used"] != content["items"]["listed"] else []
    notes += [f"{entry['count']} dropped: {entry['reason']}" for entry in score["dropped"]]
    notes += [score["note"]] if "note" in score else []
    return f'<span class="note">{escape("; ".join(notes))}</span>' if notes else ""


def _names(contents: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, unit and direction of every score that any has, in their order."""
    found = {name: score for content in contents for name, score in content["scores"].items()}
    return [(name, score["unit"], score["better"]) for name, score in found.items()]


def _number(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    return "too few" if score["value"] is None else f"{score['value']:.4g}"


def _title(content: Mapping[str, Any]) -> str:
    step = "" if content["step"] is None else f", step {content['step']:,}"
    return f"{content['run']}, {content['split']}{step}"


def _weights(content: Mapping[str, Any]) -> str:
    weights = content["weights"]
    width = "" if weights.get("sigma_rel") is None else f" (sigma_rel {weights['sigma_rel']:g})"
    return {"ema": "EMA"}.get(weights["weights"], weights["weights"]) + width


def _sounds(content: Mapping[str, Any]) -> str:
    items = content["items"]
    return f"{items['scored']:,} of {items['listed']:,} sounds"


def _settings(content: Mapping[str, Any]) -> str:
    settings = content["settings"]
    steps = f"{settings['num_steps']} {settings['solver']} steps" if settings["solver"] == "euler" else "adaptive steps"
    return f"{steps}, guidance {settings['guidance_scale']:g}, seed {settings['seed']}, {settings['precision']}"


def _dropped(entry: Mapping[str, Any]) -> str:
    ids = ", ".join(entry["ids"]) + (" ..." if entry["count"] > len(entry["ids"]) else "")
    return f"{entry['count']} dropped, {entry['reason']}: {ids}"
