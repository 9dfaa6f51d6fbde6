"""The page of an audit: one HTML file that opens offline, made from the table alone.

Ids, captions, paths and messages come from files of others: all text is escaped, and the page's policy forbids scripts
and the network.
"""

import heapq
import json
import math
import os
from collections import Counter, defaultdict
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from mmaudio_hf.media.audit import HARMLESS, VERDICTS

SHOWN = 12  # examples per verdict
BARS = 24

MEANING = {
    "not_found": "there is no file of this id",
    "unreadable": "the file does not open, or nothing of it can be decoded",
    "no_video": "no pictures in a list of videos",
    "no_audio": "no sound, or none that can be decoded",
    "leakage": "is trained on, and its id or a copy of its content is held out",
    "duplicate_id": "the id stands in the list before",
    "duplicate_content": "a copy of an item before it, under another id",
    "still": "the pictures do not move",
    "silent": "nothing or next to nothing is heard",
    "damaged": "something of it cannot be decoded",
    "too_short": "shorter than a clip",
    "too_long": "longer than expected",
    "odd_duration": "pictures, sound and container do not agree on the length",
    "start_gap": "pictures and sound do not begin together",
    "clipped": "samples at full scale",
    "variable_frame_rate": "pictures at uneven times",
    "duplicate_caption": "other items of the source have the same caption; nothing bad by itself",
}


class _Figure(NamedTuple):
    """A column that is drawn as a histogram."""

    column: str
    title: str
    unit: str
    share: bool = False  # is drawn from 0 to 1


_HISTOGRAMS = (
    _Figure("duration", "Usable length", "s"),
    _Figure("fps", "Pictures per second", "fps"),
    _Figure("still_fraction", "Share of sampled pictures that do not move", "", True),
    _Figure("uneven_intervals", "Share of uneven intervals between pictures", "", True),
    _Figure("start_gap", "Start of the sound after that of the pictures", "s"),
    _Figure("level_dbfs", "Level of the sound, RMS", "dBFS"),
    _Figure("silent_fraction", "Share of silence", "", True),
    _Figure("clipped_fraction", "Share of clipped samples", ""),
)

# How bad an item is among those of its verdict; where nothing is named, the first of the list are shown.
_WORST = {
    "still": lambda row: (row["still_fraction"] or 0, -(row["largest_change"] or 0)),
    "silent": lambda row: (row["silent_fraction"] or 0, -(row["level_dbfs"] or 0)),
    "clipped": lambda row: (row["clipped_fraction"] or 0,),
    "too_short": lambda row: (-(row["duration"] or 0),),
    "too_long": lambda row: (row["duration"] or 0,),
    "odd_duration": lambda row: (abs((row["video_duration"] or 0) - (row["audio_duration"] or 0)),),
    "start_gap": lambda row: (abs(row["start_gap"] or 0),),
    "variable_frame_rate": lambda row: (row["uneven_intervals"] or 0,),
}


class _Gathered:
    """What the page needs of the table, taken row by row: counts, one float per item and figure, a few rows."""

    def __init__(self, table: Path):
        self.rows = 0
        self.sources: dict[str, Counter] = defaultdict(Counter)
        self.verdicts: Counter = Counter()
        self.values: dict[str, list[np.ndarray]] = defaultdict(list)
        self.worst: dict[str, list[tuple]] = defaultdict(list)
        with pq.ParquetFile(table) as file:
            self.settings = json.loads(file.schema_arrow.metadata[b"mmaudio_hf.audit"])
            for batch in file.iter_batches(batch_size=1024):
                for figure in _HISTOGRAMS:
                    self.values[figure.column].append(batch.column(figure.column).drop_null().to_numpy())
                for row in batch.to_pylist():
                    self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        source = self.sources[row["source"]]
        source.update(listed=1, ok=row["ok"], held_out=row["held_out"], **{row["kind"]: 1})
        self.verdicts.update(row["verdicts"])
        self.rows += 1
        for verdict, reason in zip(row["verdicts"], row["reasons"], strict=True):
            entry = (*_WORST.get(verdict, lambda row: ())(row), -self.rows), (row, reason)
            if len(self.worst[verdict]) < SHOWN:
                heapq.heappush(self.worst[verdict], entry)
            else:
                heapq.heappushpop(self.worst[verdict], entry)


def write_page(table: str | os.PathLike, path: str | os.PathLike) -> Path:
    """Write the page of the audit in `table` and return its path; replaced as a whole."""
    path, found = Path(path), _Gathered(Path(table))
    listed, ok = found.rows, sum(counts["ok"] for counts in found.sources.values())
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Audit of {listed:,} items</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<p class="note">Audit of media</p>
<h1>{ok:,} of {listed:,} items are ok</h1>
<p class="note">{escape(Path(table).name)} has a row for each; limits: {_limits(found.settings)}</p>
</header>
<section aria-labelledby="sources"><h2 id="sources">Sources</h2>{_sources(found)}</section>
<section aria-labelledby="verdicts"><h2 id="verdicts">Verdicts</h2>{_verdicts(found, listed)}</section>
<section aria-labelledby="figures"><h2 id="figures">Figures</h2>
<p class="note">Heights are logarithms of counts.</p><div class="charts">{_histograms(found)}</div></section>
<section aria-labelledby="worst"><h2 id="worst">The worst of each</h2>{_examples(found)}</section>
</main>
</body>
</html>
"""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _limits(settings: dict[str, Any]) -> str:
    limits = {"clip of": f"{settings['duration']:g} s", **settings["limits"]}
    return escape(", ".join(f"{name} {value}" for name, value in limits.items()))


def _sources(found: _Gathered) -> str:
    rows = "".join(
        f"<tr><th scope=row><bdi>{escape(name)}</bdi></th><td>{'videos' if counts['video'] else 'recordings'}</td>"
        f"<td>{'held out' if counts['held_out'] else ''}</td><td class=n>{counts['listed']:,}</td>"
        f"<td class=n>{counts['ok']:,}</td></tr>"
        for name, counts in found.sources.items()
    )
    return _table(("source", "kind", "use", "items", "ok"), rows)


def _verdicts(found: _Gathered, listed: int) -> str:
    rows = "".join(
        f'<tr class="{"" if found.verdicts[verdict] else "none"}"><th scope=row>{_link(verdict, found)}'
        f'<span class="note">{MEANING[verdict]}</span></th><td class=n>{found.verdicts[verdict]:,}</td>'
        f"<td class=n>{100 * found.verdicts[verdict] / max(1, listed):.3g} %</td></tr>"
        for verdict in VERDICTS
    )
    return _table(("verdict", "items", "share"), rows)


def _link(verdict: str, found: _Gathered) -> str:
    return f'<a href="#{verdict}">{verdict}</a>' if found.verdicts[verdict] else verdict


def _table(heads: tuple[str, ...], rows: str) -> str:
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _examples(found: _Gathered) -> str:
    parts = []
    for verdict in (v for v in VERDICTS if found.verdicts[v]):
        count = found.verdicts[verdict]
        cards = "".join(_example(*entry[1]) for entry in sorted(found.worst[verdict], key=lambda e: e[0], reverse=True))
        shown = f"{min(SHOWN, count)} of {count:,}" if count > SHOWN else f"{count}"
        harmless = ", nothing bad by itself" if verdict in HARMLESS else ""
        parts.append(f'<h3 id="{verdict}">{verdict} <span class="note">{shown}{harmless}</span></h3><ul>{cards}</ul>')
    return "".join(parts) or "<p>Nothing was found.</p>"


def _example(row: dict[str, Any], reason: str) -> str:
    captions = " · ".join(row["captions"])
    caption = captions if len(captions) <= 200 else f"{captions[:200]}…"
    others = [verdict for verdict in row["verdicts"] if verdict not in HARMLESS]
    return (
        f"<li><b><bdi>{escape(row['id'])}</bdi></b> <span class=note>{escape(row['source'])}</span>"
        f"<p><bdi>{escape(reason)}</bdi></p>"
        f"<p class=note><bdi>{escape(caption) or 'no caption'}</bdi></p><p class=note><bdi>{escape(row['path'])}</bdi>"
        f"{' · ' + ', '.join(others) if len(others) > 1 else ''}</p></li>"
    )


# --- histograms ----------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _BOTTOM, _TOP = 400, 170, 24, 16


def _histograms(found: _Gathered) -> str:
    values = ((figure, np.concatenate([np.zeros(0), *found.values[figure.column]])) for figure in _HISTOGRAMS)
    return "".join(_histogram(*pair) for pair in values)


def _histogram(figure: _Figure, values: np.ndarray) -> str:
    """Bars of counts; the height is the logarithm, so that one bad item among a million is seen."""
    if not values.size:
        return ""
    low, high = (0.0, 1.0) if figure.share else (float(values.min()), float(values.max()))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, BARS, (low, high))
    width, top = _WIDTH / BARS, math.log1p(counts.max())
    bars = []
    for number, count in enumerate(counts):
        height = (_HEIGHT - _BOTTOM - _TOP) * math.log1p(count) / top
        if count:
            bars.append(
                f'<rect x="{number * width + 1:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" width="{width - 2:.1f}"'
                f' height="{height:.1f}"><title>{count:,} from {edges[number]:.4g} to {edges[number + 1]:.4g}'
                f" {figure.unit}</title></rect>"
            )
    marks = "".join(
        f'<text x="{x}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{value:.4g}</text>'
        for x, anchor, value in ((0, "start", low), (_WIDTH / 2, "middle", (low + high) / 2), (_WIDTH, "end", high))
    )
    label = f"{figure.title}: {values.size:,} items from {values.min():.4g} to {values.max():.4g} {figure.unit}"
    median = f"median {np.median(values):.4g} {figure.unit}".strip()
    return (
        f"<figure><figcaption>{figure.title} <span class=note>{median}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f'<text x="0" y="11">{counts.max():,}</text>'
        f'<path d="M0 {_HEIGHT - _BOTTOM}H{_WIDTH}"/>{"".join(bars)}{marks}</svg></figure>'
    )


_STYLE = """
:root { color-scheme: light dark; --back: #fbfaf7; --card: #fff; --text: #1d1c1a; --soft: #6a6862; --line: #dedbd3;
  --bar: #1f6fb2; }
@media (prefers-color-scheme: dark) { :root { --back: #161617; --card: #202022; --text: #eceae4; --soft: #a3a098;
  --line: #3a393a; --bar: #6cb2ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 34px 0 12px; }
h3 { font-size: 1rem; margin: 22px 0 8px; }
p { margin: 0; }
a { color: var(--bar); }
.note { color: var(--soft); font-size: .875rem; font-weight: 400; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; overflow-wrap: normal; }
th, td { text-align: left; padding: 5px 14px; vertical-align: top; }
thead th { color: var(--soft); font-weight: 400; font-size: .875rem; }
tbody tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; }
tbody th .note { display: block; }
tr.none th { color: var(--soft); font-weight: 400; }
tr.none td { color: var(--soft); }
td.n { white-space: nowrap; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 12px; }
figure, li { margin: 0; min-width: 0; padding: 10px 14px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
figcaption { font-weight: 600; font-size: .9375rem; margin-bottom: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg rect { fill: var(--bar); }
svg path { stroke: var(--line); }
ul { list-style: none; margin: 0; padding: 0; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
"""
