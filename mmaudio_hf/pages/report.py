"""The page of a run, `report/index.html`: curves, scores and clips to watch; and pages that compare evaluations."""

import contextlib
import itertools
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import torch
from markupsafe import Markup
from tqdm import tqdm

from mmaudio_hf.config import Recipe, load_recipe, read_json, read_json_lines
from mmaudio_hf.data.layout import offsets_file, read_offsets
from mmaudio_hf.evaluation import onset_f1, onset_scores, onset_times, waveform_scores
from mmaudio_hf.evaluation.metrics import METRICS
from mmaudio_hf.evaluation.onsets import BUILT_IN
from mmaudio_hf.evaluation.results import (
    ALIGNED,
    SHOWN,
    audio_folder,
    best_of,
    find_scores,
    of_common_items,
    read_clips,
)
from mmaudio_hf.evaluation.samples import REFERENCE, SAMPLES_FILE, HeldOutItem, HeldOutItems, generate_items
from mmaudio_hf.generation import RECIPE_FILE
from mmaudio_hf.generation.pipeline import MMAudioPipeline
from mmaudio_hf.media.audio import read_waveform, write_audio
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.example import read_events
from mmaudio_hf.media.lists import VideoStart, find_video, read_video_clips
from mmaudio_hf.media.mux import write_video_with_audio
from mmaudio_hf.media.video import read_video
from mmaudio_hf.models.pretrained import find_pretrained
from mmaudio_hf.pages import Curve, data_uri, decibels, line_chart, spectrogram_figure, write_page
from mmaudio_hf.schema import check_id

MEDIA_LIMIT, MAX_HEIGHT = 6_000_000, 360  # bytes of one video on the page; pixels of one that would be larger
_LOSS, _TIME = "mean squared error", "t: 0 is noise, 1 is data"
# Of the samples made during training, since audio is the heaviest content of the page: items, those of the user's own
# prompts and videos among them, and steps.
_ITEMS, _OWN, _STEPS = 3, 4, 4


@dataclass(frozen=True)
class ReportClip:
    """One clip on the page. Waveforms are (samples,) at `sample_rate`, times are in seconds."""

    name: str
    caption: str
    generated: torch.Tensor
    sample_rate: int
    reference: torch.Tensor | None = None  # the true audio
    video: Path | None = None
    start: float = 0.0  # of the clip in its video, in s
    events: tuple[float, ...] | None = None  # when something happens; None: not known
    scores: Mapping[str, float] = field(default_factory=dict)


# --- from a run to clips and scores --------------------------------------------------------------------------------


def report_run(
    run_dir: str | os.PathLike,
    *,
    events: str | os.PathLike | None = None,
    split: str = "",
    shown: int = 6,
    scored: int = 64,
    device: str = "auto",
    started: float | None = None,
) -> dict[str, Any]:
    """Generate the first `scored` clips of a split of a run, score them, write the page with `shown` of them.

    split: "test" or "validation"; empty: test where the recipe has one, else validation.

    events: `events.json` of the example media, for scores of event timing. Returns the key figures as plain JSON
    values; with `started`, a time in seconds since the epoch, "seconds" is what has passed since.
    ValueError when the run has no checkpoint, a store of the split is missing, or an encoder file is.
    """
    run_dir = Path(run_dir)
    if not (run_dir / RECIPE_FILE).is_file():
        raise ValueError(f"{run_dir} is no run folder: it has no config.yaml")
    recipe = load_recipe(run_dir / RECIPE_FILE)
    times = {} if events is None else {name: e.times for name, e in read_events(events).items()}
    split = split or ("test" if recipe.data.test else "validation")
    pipeline = MMAudioPipeline.from_pretrained(run_dir, device=device)
    with contextlib.closing(HeldOutItems(getattr(recipe.data, split))) as items:
        count = min(scored, len(items))
        clips, timing = _generated_clips(recipe, pipeline, itertools.islice(items, count), count, times, shown)
        known, shown = len(items), min(shown, count)
    heading = f"{split} split: {known} clips, the first {count} generated and scored, {shown} shown"
    write_report(run_dir, clips[:shown], timing=timing, heading=heading)
    summary = run_summary(run_dir) | timing
    if started is not None:
        summary["seconds"] = round(time.time() - started, 1)
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in summary.items()}
    return {n: None if isinstance(value, float) and not math.isfinite(value) else value for n, value in rounded.items()}


def _generated_clips(
    recipe: Recipe,
    pipeline: MMAudioPipeline,
    items: Iterable[HeldOutItem],
    count: int,
    times: Mapping[str, Sequence[float]],
    shown: int,
) -> tuple[list[ReportClip], dict[str, float]]:
    """Clips with generated and true audio, and key figures: of event timing too, where events are known."""
    clips: list[ReportClip] = []
    detected, ceiling, known = [], [], []
    rate, longest = pipeline.sample_rate, recipe.model.duration
    results = generate_items(pipeline, items, recipe.sampling, recipe.seed)
    for item, result in tqdm(results, "report", count, unit="clip", disable=None, leave=False):
        decoded, duration = pipeline.decode(item.latent), item.duration or recipe.model.duration
        longest = max(longest, duration)
        video, start, reference = _video_and_audio(item, recipe, with_audio=len(clips) < shown)
        reference, inside = decoded if reference is None else reference, None
        if item.item_id in times:
            inside = tuple(t for t in times[item.item_id] if t < duration)
            known.append(inside)
            detected.append(onset_times(result.waveform, rate))
            ceiling.append(onset_times(decoded, rate))
        distance = waveform_scores(result.waveform, reference, rate)["log_mel_distance"]
        heard, scores = (result.waveform, rate, reference), {"log-mel distance to the truth in dB:": distance}
        clips.append(ReportClip(item.item_id, item.caption, *heard, video, start, inside, scores))
    if not known:
        return clips, {"generated_clips": len(clips)}
    scores = onset_scores(detected, known, duration=longest, seed=recipe.seed)
    # What the autoencoder alone leaves of the onsets: no network can be expected to score higher.
    best = onset_scores(ceiling, known, duration=longest, seed=recipe.seed)
    timing = {f"onset_{name}": value for name, value in scores.items()} | {"onset_f1_true_latents": best["f1"]}
    return clips, {"generated_clips": len(clips), **timing}


def _video_and_audio(
    item: HeldOutItem, recipe: Recipe, with_audio: bool
) -> tuple[Path | None, float, torch.Tensor | None]:
    """The video of an item, where in it the clip begins (s), and its audio, read as extraction reads it; None: gone."""
    source = next((source for source in recipe.extraction.videos if source.name == item.store), None)
    if source is None or not with_audio:
        return None, 0.0, None
    clip_list, clip_of, video = recipe.extraction.clips_path(source), VideoStart(item.item_id, item.item_id, 0.0), None
    with contextlib.suppress(MediaError, ValueError):
        if source.max_clips != 1 and clip_list.is_file():
            clip_of = next((row for row in read_video_clips(clip_list) if row.id == item.item_id), clip_of)
        video = find_video(source.media_dir, clip_of.name)
        late = read_offsets(offsets_file(Path(recipe.extraction.output_dir) / source.name), [item.item_id])
        offset = late.get(item.item_id, 0.0)  # by which extraction has shifted the audio
        settings: Any = {"duration": item.duration or recipe.model.duration, "alignment": recipe.extraction.alignment}
        settings |= {"mode": recipe.model.mode, "normalize_audio": source.normalize_audio, "as_uint8": True}
        audio = read_video(video, start=clip_of.start, audio_offset=offset, **settings).audio
        return video, clip_of.start + max(0.0, -offset), audio
    return video, clip_of.start, None


# --- what a run has written ----------------------------------------------------------------------------------------


def _series(entries: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) wherever the value was logged and is finite."""
    return [(e["step"], e[name]) for e in entries if e.get(name) is not None and math.isfinite(e[name])]


def run_summary(run_dir: str | os.PathLike) -> dict[str, Any]:
    """Key figures of a run, from metrics.jsonl, speed.jsonl and the weights that generation uses."""
    run_dir = Path(run_dir)
    (metrics, damaged), (speed, _) = (read_json_lines(run_dir / f"{name}.jsonl") for name in ("metrics", "speed"))
    if damaged:
        print(f"warning: {run_dir / 'metrics.jsonl'}: {len(damaged)} damaged lines are left out", file=sys.stderr)
    raw, ema = _series(metrics, "val/loss"), _series(metrics, "val_ema/loss")
    summary: dict[str, Any] = {"run": run_dir.resolve().name, "steps": metrics[-1]["step"] if metrics else 0}
    if raw:
        summary |= {"val_loss_first": raw[0][1], "val_loss_last": raw[-1][1]}
    if ema:
        summary["val_loss_last_ema"] = ema[-1][1]
    if speed:
        summary["steps_per_second"] = median(e["speed/steps_per_second"] for e in speed)
        summary["samples_per_second"] = median(e["speed/samples_per_second"] for e in speed)
        summary["peak_memory_gb"] = max(e["speed/peak_memory_gb"] for e in speed)
    with contextlib.suppress(ValueError, OSError, KeyError):
        weights = read_json(find_pretrained(run_dir) / "weights.json")
        summary |= {"weights": weights["weights"], "sigma_rel": weights["sigma_rel"], "weights_step": weights["step"]}
    return summary


# --- the page ------------------------------------------------------------------------------------------------------


def write_report(
    run_dir: str | os.PathLike,
    clips: Sequence[ReportClip],
    *,
    timing: Mapping[str, float] | None = None,
    heading: str = "",
) -> Path:
    """Write `report/index.html` of a run and return its path.

    timing: `evaluation.onset_scores` with "onset_" before each name, over all generated clips. heading: over the clips.
    """
    run_dir = Path(run_dir)
    metrics, summary = read_json_lines(run_dir / "metrics.jsonl")[0], run_summary(run_dir)
    scores = {content["split"]: content for content in find_scores(run_dir)}  # the last of each split
    recipe = load_recipe(run_dir / RECIPE_FILE) if (run_dir / RECIPE_FILE).is_file() else None
    with tempfile.TemporaryDirectory() as scratch:
        cards = [_clip_card(clip, Path(scratch)) for clip in clips]
        videos = {Path(path).stem: Path(path) for path in recipe.samples.videos} if recipe else {}
        sampled_steps, sampled_items, samples = _samples(run_dir, videos, Path(scratch))
    return write_page(
        run_dir / "report" / "index.html",
        "report.html.jinja",
        summary=summary,
        tiles=_tiles(summary, timing or {}),
        charts=_charts(metrics),
        choices=_choices(metrics),
        kept=recipe.training.best_metric if recipe and (run_dir / "best").exists() else "",
        heading=heading,
        scores=_scores_table(list(scores.values())) if scores else None,
        sampled_steps=sampled_steps,
        sampled_items=sampled_items,
        samples=samples,
        has_events=any(clip.events is not None for clip in clips),
        clips=cards,
    )


def _tiles(summary: Mapping[str, Any], timing: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Name, figure and note of each tile."""
    tiles = []
    if "onset_f1" in timing:
        shuffled, best = timing["onset_f1_shuffled"], timing.get("onset_f1_true_latents")
        note = f"{timing['onset_clips']} clips, ±0.1 s" + ("" if best is None else f"; true latents {best:.2f}")
        tiles.append(("Onset F1", f"{timing['onset_f1']:.2f}", note))
        tiles.append(("Onset F1, shuffled", f"{shuffled:.2f}", "same audio, events of other clips"))
    if "val_loss_first" in summary:
        tiles.append(("Validation loss, first", f"{summary['val_loss_first']:.3f}", "before training"))
        last, note = summary["val_loss_last"], "raw weights"
        if "val_loss_last_ema" in summary:
            last, note = summary["val_loss_last_ema"], f"EMA; raw weights {last:.3f}"
        tiles.append(("Validation loss, last", f"{last:.3f}", note))
    if "steps_per_second" in summary:
        note = f"{summary['samples_per_second']:.3g} samples/s, median"
        tiles.append(("Steps per second", f"{summary['steps_per_second']:.3g}", note))
        tiles.append(("Peak memory", f"{summary['peak_memory_gb']:.2f} GB", "most of one process"))
    return tiles


def _charts(metrics: Sequence[Mapping[str, Any]]) -> list[Markup]:
    best = {name: step for name, (step, _) in _choices(metrics).items()}

    def curves(*chosen: tuple[str, str, str]) -> list[Curve]:
        named = [Curve(name, label, style, _series(metrics, name), best.get(name)) for name, label, style in chosen]
        return [curve for curve in named if curve.points]

    held_out = ("val/loss", "validation", "b"), ("val_ema/loss", "validation, EMA", "c")
    loss = curves(("train/loss", "training", "a thin"), *held_out)
    rate = curves(("train/learning_rate", "learning rate", "a"))
    charts = [
        line_chart("Loss", "step", loss, y_label=_LOSS),
        line_chart("Validation loss over time t", _TIME, _loss_over_time(metrics), y_label=_LOSS, x_range=(0, 1)),
        line_chart("Learning rate", "step", rate, y_label="change per step", from_zero=True),
    ]
    scores = ("log_mel_distance", "log-mel distance to the truth", "dB"), ("onset_f1", "onset F1", "share")
    for name, label, unit in scores:
        if scored := curves((f"eval/{name}", label, "c")):
            charts.append(line_chart(f"Samples: {label}", "step", scored, y_label=unit))
    return charts


def _choices(metrics: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Step and value that each score would choose as `best`: losses improve past the best audio."""
    better = {"val/loss": "lower", "val_ema/loss": "lower"}
    evaluated = {name for entry in metrics for name in entry if name.startswith("eval")}
    directions = {name: entry[-1] for name, entry in {**BUILT_IN, **METRICS}.items()}
    better |= {name: directions.get(name.partition("/")[2], "") for name in sorted(evaluated)}
    return {
        name: min(points, key=lambda point: _RANK[direction](point[1]))
        for name, direction in better.items()
        if direction in _RANK and (points := _series(metrics, name))
    }


def _loss_over_time(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Validation loss by bins of t: before training, and last."""
    curves, drawn = [], (("val", "first", "b dashed", 0), ("val", "last", "b", -1), ("val_ema", "last, EMA", "c", -1))
    for kind, label, style, index in drawn:
        prefix = f"{kind}/loss_t_"
        entries = [entry for entry in metrics if any(key.startswith(prefix) for key in entry)]
        if not entries or (label == "last" and len(entries) == 1):
            continue
        entry = entries[index]
        # Keys name the lower edge of their bin of width 0.1: the point is drawn at its middle.
        bins = [(float(key.removeprefix(prefix)) + 0.05, key) for key in entry if key.startswith(prefix)]
        points = sorted((t, entry[key]) for t, key in bins if entry[key] is not None and math.isfinite(entry[key]))
        curves.append(Curve(f"{prefix}*:{entry['step']}", f"{label} (step {entry['step']})", style, points))
    return curves


# --- cards: players of one clip or sample side by side -------------------------------------------------------------


@dataclass(frozen=True)
class _Track:
    """What one player of a card plays: `media`, a data URI or link of audio or video, has `waveform` (samples,)."""

    title: str
    waveform: torch.Tensor
    rate: int
    media: str
    label: str
    note: str = ""
    marks: Sequence[tuple[str, float]] = ()  # (CSS class, seconds) over the spectrogram


def _players(tracks: Sequence[_Track]) -> list[dict[str, Any]]:
    """Values of the template for each track; their spectrograms have one scale."""
    levels = [decibels(track.waveform, track.rate) for track in tracks]
    top = max(float(level.max()) for level in levels)
    players = []
    for track, level in zip(tracks, levels, strict=True):
        seconds = track.waveform.shape[-1] / track.rate
        marks = [(kind, f"{100 * time / seconds:.2f}%") for kind, time in track.marks]
        description = f"Mel spectrogram: {track.label}, {seconds:.1f} s"
        figure = spectrogram_figure(level, top, seconds, track.rate)
        players.append(vars(track) | {"figure": figure, "description": description, "marks": marks})
    return players


def _clip_card(clip: ReportClip, scratch: Path) -> dict[str, Any]:
    tracks, rate = [], clip.sample_rate
    for title, waveform in (("Generated", clip.generated), ("Ground truth", clip.reference)):
        if waveform is None:
            continue
        onsets, marks, note = onset_times(waveform, rate), [], ""
        if clip.events is not None:
            marks = [("event", time) for time in clip.events] + [("onset", time) for time in onsets]
            precision, recall, f1 = onset_f1(onsets, clip.events)
            note = f"onset F1 {f1:.2f} (precision {precision:.2f}, recall {recall:.2f})"
        label = f"{title.lower()} audio of {clip.name}, {len(onsets)} onsets"
        media = _media(clip.video, waveform, rate, scratch, clip.start)
        tracks.append(_Track(title, waveform, rate, media, label, note, marks))
    note = " · ".join([clip.name, *(f"{name} {value:.3g}" for name, value in clip.scores.items())])
    return {"name": clip.name, "caption": clip.caption, "note": note, "players": _players(tracks)}


def _media(video: Path | None, waveform: torch.Tensor, rate: int, scratch: Path, start: float = 0.0) -> str:
    """The video from `start` on with this audio as a data URI, or the audio alone where there is no video."""
    if video is not None:
        path = scratch / "clip.mp4"
        with contextlib.suppress(MediaError):
            write_video_with_audio(video, waveform, rate, path, start=start)
            if path.stat().st_size > MEDIA_LIMIT:
                write_video_with_audio(video, waveform, rate, path, start=start, max_height=MAX_HEIGHT)
            return data_uri("video/mp4", path.read_bytes())
    path = scratch / "clip.wav"
    write_audio(path, waveform, rate)
    return data_uri("audio/wav", path.read_bytes())


def _samples(run_dir: Path, videos: Mapping[str, Path], scratch: Path) -> tuple[int, int, list[dict[str, Any]]]:
    """How many steps have `samples/`, of how many items, and cards of its first ones from the first step to the last.

    Prompts and videos of the user's own come before the other items: they were chosen. `videos` are these by item.
    """
    written = [file.parent for file in (run_dir / "samples").glob(f"step_*/{SAMPLES_FILE}")]
    folders = {int(folder.name[5:]): folder for folder in written if re.fullmatch(r"step_\d+", folder.name)}
    if not (steps := sorted(folders)):
        return 0, 0, []
    count = min(_STEPS, len(steps))
    chosen = sorted({steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)} | {steps[-1]})
    items: dict[str, dict[int, dict[str, Any]]] = {}  # id -> step -> row
    for step in reversed(chosen):  # the last step says which items there are
        for row in read_json(folders[step] / SAMPLES_FILE, list):
            if step == chosen[-1] or row["id"] in items:
                items.setdefault(row["id"], {})[step] = row | {"folder": folders[step]}
    own = [item_id for item_id, rows in items.items() if "scores" not in rows[chosen[-1]]]
    shown = own[:_OWN] + [item_id for item_id in items if item_id not in own][: max(1, _ITEMS - len(own))]
    cards = [_sample_card(run_dir, items[item_id], videos.get(item_id), scratch) for item_id in shown]
    return len(steps), len(items), cards


def _sample_card(run_dir: Path, rows: Mapping[int, Mapping[str, Any]], video: Path | None, scratch: Path) -> dict:
    """The card of one item, from its rows by step, with its own `video`."""
    row = rows[max(rows)]
    name = f"{check_id(row['id'], SAMPLES_FILE)}.wav"
    truth = run_dir / "samples" / REFERENCE
    folders: dict[str, tuple[Path, dict]] = {}
    if (truth / name).is_file():
        folders["True latent, decoded"] = truth, {}
    for step in sorted(rows):
        title = f"Step {step:,}" if step else "Step 0 (base)"
        folders[title] = rows[step]["folder"], rows[step].get("scores", {})
    tracks = []
    for title, (folder, scores) in folders.items():
        waveform, rate = read_waveform(folder / name)
        distance = scores.get("log_mel_distance")
        note = "" if distance is None else f"log-mel distance {distance:.1f} dB"
        label = f"{title}, {row['id']}"
        media = _media(video, waveform, rate, scratch) if video else data_uri("audio/wav", (folder / name).read_bytes())
        tracks.append(_Track(title, waveform, rate, media, label, note))
    notes = [row["id"]] if row["caption"] != row["id"] else []
    notes += [f"{row['duration']:g} s"] if "duration" in row else []
    notes += [f"audio alone, since {video} is not there any more"] if video and not video.exists() else []
    return {"name": row["id"], "caption": row["caption"], "note": " · ".join(notes), "players": _players(tracks)}


# --- scores of one or several evaluations in one table ---------------------------------------------------------------


_BETTER = {"lower": "lower is better", "higher": "higher is better", "zero": "best at 0", "": ""}
_RANK: dict[str, Any] = {"lower": lambda value: value, "higher": lambda value: -value, "zero": abs}


def as_text(contents: Sequence[Mapping[str, Any]]) -> str:
    """A table of the contents of files of scores: one line per score, one column per evaluation."""
    table = _scores_table(contents)
    rows = [["", *(title for title, _ in table["heads"])]]
    rows.append(["weights", *(weights for _, (weights, *_) in table["heads"])])
    rows.append(["samples", *(samples for _, (_, samples, _) in table["heads"])])
    shown = table["rows"] + [row for row in table["categories"] if row["category"] == ALIGNED]
    rows += [[f"{row['name']} [{row['unit']}]", *(text for text, *_ in row["cells"])] for row in shown]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + table["notes"])


def write_comparison(contents: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """Write a page with the table of scores, and players of the same items; return its path."""
    title = _title(contents[0]) if len(contents) == 1 else f"{len(contents)} evaluations"
    cards = _comparison_cards(contents, Path(path).parent)
    return write_page(path, "scores.html.jinja", title=title, scores=_scores_table(contents), clips=cards)


def _comparison_cards(contents: Sequence[Mapping[str, Any]], base: Path) -> list[dict[str, Any]]:
    """Cards of the items whose audio every evaluation kept, or else of those of most; links are relative to `base`."""
    folders = [audio_folder(Path(content["clips"])) if content.get("clips") else None for content in contents]
    kept = [{path.name for path in folder.glob("*.wav")} if folder else set() for folder in folders]
    names = sorted(set().union(*kept), key=lambda name: (-sum(name in each for each in kept), name))
    cards = []
    for name in names[:SHOWN]:
        named = zip(map(_title, contents), folders, strict=True)
        files = [(title, folder / name) for title, folder in named if folder and (folder / name).is_file()]
        tracks = []
        for title, file in [("True latent, decoded", files[0][1].parent / REFERENCE / name), *files]:
            if file.is_file():
                link = quote(os.path.relpath(file, base))
                tracks.append(_Track(title, *read_waveform(file), link, f"{title}, {file.stem}"))
        stem = name.removesuffix(".wav")
        cards.append({"name": stem, "caption": stem, "note": "", "players": _players(tracks)})
    return cards


def _scores_table(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table: `heads` (title, notes) of its columns, `rows` with cells (text, note, is best), and `notes` below."""
    given, contents = contents, of_common_items(contents)
    heads, notes = [(_title(content), _head_notes(content)) for content in contents], []
    if contents != given:
        counts = " and ".join(f"{content['items']['scored']:,}" for content in given)
        notes.append(f"over the {contents[0]['ids']['count']:,} items that all have, of {counts}")
    for content in contents:
        names_of: dict[str, list[str]] = {}
        for name, reason in content["not_computed"].items():
            names_of.setdefault(reason, []).append(name)
        lacking = [f"no {', '.join(names)}: {reason}" for reason, names in names_of.items()]
        for entry in content["items"]["dropped"]:
            ids = ", ".join(entry["ids"]) + (" ..." if entry["count"] > len(entry["ids"]) else "")
            lacking.append(f"{entry['count']} dropped, {entry['reason']}: {ids}")
        notes += [f"{_title(content)}: {note}" for note in lacking]
    rows, clips = [], [read_clips(content) for content in contents] if len(contents) > 1 else []
    problem = _incomparable(contents, clips)
    notes += [problem] if problem else []
    for name, any_score in {name: score for content in contents for name, score in content["scores"].items()}.items():
        scores = [content["scores"].get(name) for content in contents]
        columns = [{i: clip[name] for i, clip in each.items() if name in clip} for each in clips]
        # A note says that the figure is none to compare, as -1 in place of a distance.
        usable = [s and "note" not in s and s["value"] is not None and c for s, c in zip(scores, columns, strict=False)]
        comparable = not problem and any_score["better"] in _RANK and len(usable) > 1 and all(usable)
        best = best_of(columns, _RANK[any_score["better"]]) if comparable else None
        cells = [
            (_number(score), _score_note(score, content), column == best)
            for column, (score, content) in enumerate(zip(scores, contents, strict=True))
        ]
        about = ", ".join(filter(None, (any_score["unit"], _BETTER[any_score["better"]])))
        rows.append({"name": name, "unit": any_score["unit"], "about": about, "cells": cells})
        if name == "IB-Score":  # as most papers print it
            hundredfold = [s and s | {"value": s["value"] and 100 * s["value"]} for s in scores]
            cells = [(_number(score), "", False) for score in hundredfold]
            rows.append({"name": "IB-Score x 100", "unit": "100 cosine", "about": about, "cells": cells})
    return {"heads": heads, "rows": rows, "notes": notes, "categories": _category_rows(contents, rows)}


def _category_rows(contents: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of each score and category, with its interval; none is called best of so few items."""
    groups = dict.fromkeys(group for content in contents for group in content.get("categories", {}))
    rows_by_category = []
    for group in groups:
        scores = [content.get("categories", {}).get(group, {}) for content in contents]
        for row in rows:
            if any(row["name"] in each for each in scores):
                own = [each.get(row["name"]) for each in scores]
                cells = [(_number(s), f"{s['used']} used{_interval(s)}" if s else "", False) for s in own]
                rows_by_category.append({**row, "category": group, "name": f"{row['name']}, {group}", "cells": cells})
    return rows_by_category


def _interval(score: Mapping[str, Any]) -> str:
    return "; 95 %: {:.4g} to {:.4g}".format(*score["interval"]) if score.get("interval") else ""


def _incomparable(contents: Sequence[Mapping[str, Any]], clips: Sequence[Mapping[str, Any]]) -> str:
    """Why no value of the table is called best; "" when all are of the same items and truth."""
    if len(contents) < 2:
        return ""
    ids = [content.get("ids") for content in contents]
    same = all(each == ids[0] for each in ids) and len({(c["split"], str(c.get("truth"))) for c in contents}) == 1
    if same and None not in ids and all(clips):
        return ""
    hashes = ", ".join(f"{i['count']} items {i['sha256'][:8]}" if i else "items not stated" for i in ids)
    return f"nothing is called best: these scores are not of the same items and truth ({hashes}); evaluate them again"


def _score_note(score: Mapping[str, Any] | None, content: Mapping[str, Any]) -> str:
    """How many items a score is of, where they are not all; and why not."""
    if not score:
        return ""
    notes = [f"{score['used']} used"] if score["used"] != content["items"]["listed"] else []
    notes += [_interval(score).removeprefix("; ")] if score.get("interval") else []
    notes += [score["warning"]] if "warning" in score else []
    notes += [f"{entry['count']} dropped: {entry['reason']}" for entry in score["dropped"]]
    return "; ".join(notes + ([score["note"]] if "note" in score else []))


def _number(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    return "too few" if score["value"] is None else f"{score['value']:.4g}"


def _title(content: Mapping[str, Any]) -> str:
    step = "" if content["step"] is None else f", step {content['step']:,}"
    return f"{content['run']}, {content['split']}{step}"


def _head_notes(content: Mapping[str, Any]) -> tuple[str, str, str]:
    """Weights, number of items and settings of an evaluation."""
    weights, items, settings = content["weights"], content["items"], content["settings"]
    width = "" if weights.get("sigma_rel") is None else f" (sigma_rel {weights['sigma_rel']:g})"
    steps = f"{settings['num_steps']} {settings['solver']} steps" if settings["solver"] == "euler" else "adaptive steps"
    return (
        {"ema": "EMA"}.get(weights["weights"], weights["weights"]) + width,
        f"{items['scored']:,} of {items['listed']:,} items",
        f"{steps}, guidance {settings['guidance_scale']:g}, seed {settings['seed']}, {settings['precision']}",
    )
