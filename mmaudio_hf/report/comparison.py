"""Scores of one or several evaluations in one table: as text, as a page, and as a section of the report."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmaudio_hf.report.style import STYLE

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
