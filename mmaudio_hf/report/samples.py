"""The part of the report that lets one hear how the samples of a run changed while it was trained."""

import json
import re
from html import escape
from pathlib import Path

from mmaudio_hf.media.audio import read_waveform
from mmaudio_hf.report.plots import data_uri, decibels, spectrogram_image
from mmaudio_hf.samples import REFERENCE, SAMPLES_FILE
from mmaudio_hf.schema import check_id

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
        _side(title, path, scores, spectrogram_image(level, top), row["id"])
        for (title, path, scores), level in zip(files, levels, strict=True)
    )
    return (
        f'<article aria-label="sample {escape(row["id"])}"><h3>{escape(row["caption"]) or "no caption"}</h3>'
        f'<p class="note">{escape(row["id"])}</p><div class="sides narrow">{sides}</div></article>'
    )


def _side(title: str, path: Path, scores: dict[str, float], image: bytes, item_id: str) -> str:
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
