"""The pages of an audit, made from its table alone: the first has figures and the worst items, others have all items.

    OUT.html          counts, histograms, the worst of each verdict, copies beside each other
    OUT_items/1.html  frames and a player of every listed item, 100 a page; media are links relative to the page

Ids, captions, paths and messages come from files of others: templates escape all text, and the policy of the pages
forbids scripts and the network.
"""

import heapq
import itertools
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq

from mmaudio_hf.media.audit import HARMLESS, VERDICTS
from mmaudio_hf.pages import ticks
from mmaudio_hf.pages import write_page as write_template

SHOWN = 12  # examples per verdict
ITEMS = 100  # per page
BARS = 24

MEANING = (
    {"not_found": "there is no file of this id"}
    | {"unreadable": "the file does not open, is a still image or encrypted, or nothing of it can be decoded"}
    | {"no_video": "no video track in a file of a list of videos"}
    | {"no_audio": "no audio track, or none that can be decoded"}
    | {"leakage": "is trained on, and its id or a copy of its content is held out"}
    | {"duplicate_id": "the id is in the list before"}
    | {"duplicate_content": "a copy of an item before it, under another id"}
    | {"unrelated": "no evident relation: the audio of other clips fits the frames as well as its own does"}
    | {"offset": "what is heard is early or late against what is seen", "still": "the frames do not move"}
    | {"silent": "nothing or next to nothing can be heard"}
    | {"damaged": "something of it cannot be decoded, or is missing of the length it states"}
    | {"too_short": "shorter than a clip", "too_long": "longer than expected"}
    | {"odd_duration": "frames, audio and container do not agree on the length"}
    | {"start_gap": "frames and audio do not begin together"}
    | {"audio_drift": "timestamps and number of samples do not agree within the file; audio is placed by timestamps"}
    | {"clipped": "samples at full scale", "caption_mismatch": "the caption does not describe the audio, by CLAP"}
    | {"frames_mismatch": "the frames do not show what is heard, by ImageBind"}
    | {"variable_frame_rate": "frames at uneven times", "audio_tracks": "several audio tracks; a remark"}
    | {"hdr": "high dynamic range; a remark", "interlaced": "interlaced video; a remark"}
    | {"non_square_pixels": "pixels that are not square; a remark", "empty_caption": "a caption without text; a remark"}
    | {"duplicate_caption": "other items of the source have the same caption; a remark"}
)


class _Figure(NamedTuple):
    """A column that is drawn as a histogram."""

    column: str
    title: str
    unit: str
    is_share: bool = False  # drawn from 0 to 1


_HISTOGRAMS = (
    _Figure("sync_offset", "Audio after what is seen", "seconds"),
    _Figure("sync_fit", "Fit of audio and frames at that offset", "correlation or probability"),
    _Figure("sync_chance", "Audio of other clips that fits as well", "share"),
    _Figure("clap_score", "Caption and audio, by CLAP", "cosine"),
    _Figure("imagebind_score", "Frames and audio, by ImageBind", "cosine"),
    _Figure("duration", "Usable length", "seconds"),
    _Figure("fps", "Frame rate", "frames per second"),
    _Figure("still_fraction", "Sampled frames that do not move", "share", True),
    _Figure("uneven_intervals", "Uneven intervals between frames", "share", True),
    _Figure("start_gap", "Start of the audio after that of the frames", "seconds"),
    _Figure("audio_drift", "Timestamps against samples of the audio", "seconds"),
    _Figure("level_dbfs", "Level of the audio, RMS", "dBFS"),
    _Figure("silent_fraction", "Silence", "share", True),
    _Figure("clipped_fraction", "Clipped samples", "share"),
)

_UNITS = {"seconds": "s", "frames per second": "fps", "dBFS": "dBFS"}  # of a number alone

_Row = Mapping[str, Any]

# How bad an item is among those of its verdict; where nothing is named, the first of the list are shown.
_WORST: dict[str, Callable[[_Row], tuple[float, ...]]] = {
    "unrelated": lambda row: (row["sync_chance"],),
    "offset": lambda row: (abs(row["sync_offset"]),),
    "caption_mismatch": lambda row: (-row["clap_score"],),
    "frames_mismatch": lambda row: (-row["imagebind_score"],),
    "still": lambda row: (row["still_fraction"] or 0, -(row["largest_change"] or 0)),
    "silent": lambda row: (row["silent_fraction"] or 0, -(row["level_dbfs"] or 0)),
    "clipped": lambda row: (row["clipped_fraction"] or 0,),
    "too_short": lambda row: (-(row["duration"] or 0),),
    "too_long": lambda row: (row["duration"] or 0,),
    "odd_duration": lambda row: (abs((row["video_duration"] or 0) - (row["audio_duration"] or 0)),),
    "start_gap": lambda row: (abs(row["start_gap"] or 0),),
    "audio_drift": lambda row: (row["audio_drift"] or 0,),
    "variable_frame_rate": lambda row: (row["uneven_intervals"] or 0,),
}


class _Summary:
    """What the first page needs of the table, taken row by row: counts, one float per item and figure, a few rows."""

    def __init__(self, table: Path):
        self.rows, self.compared = 0, 0.0
        self.sources: dict[str, Counter] = defaultdict(Counter)
        self.verdicts: Counter = Counter()
        self.sync: Counter = Counter()
        self.values: dict[str, list[np.ndarray]] = defaultdict(list)
        self.worst: dict[str, list[tuple]] = defaultdict(list)
        with pq.ParquetFile(table) as file:
            self.settings = json.loads(file.schema_arrow.metadata[b"mmaudio_hf.audit"])
            for batch in file.iter_batches(batch_size=1024):
                for figure in _HISTOGRAMS:
                    self.values[figure.column].append(batch.column(figure.column).drop_null().to_numpy())
                for row in batch.to_pylist():
                    self._add(row)

    def _add(self, row: _Row) -> None:
        source = self.sources[row["source"]]
        source.update(listed=1, ok=row["ok"], held_out=row["held_out"], **{row["kind"]: 1})
        self.verdicts.update(row["verdicts"])
        self.sync[row["sync"]] += 1
        self.compared = row["sync_seconds"] or self.compared
        row = {**row, "number": self.rows}
        self.rows += 1
        for verdict, reason in zip(row["verdicts"], row["reasons"], strict=True):
            entry = (*_WORST.get(verdict, lambda row: ())(row), -self.rows), (row, reason)
            if len(self.worst[verdict]) < SHOWN:
                heapq.heappush(self.worst[verdict], entry)
            else:
                heapq.heappushpop(self.worst[verdict], entry)


def write_page(table: str | os.PathLike, path: str | os.PathLike) -> Path:
    """Write the pages of the audit in `table`, each replaced as a whole; returns `path`, the first one."""
    path, table = Path(path), Path(table)
    summary, folder = _Summary(table), path.with_name(f"{path.stem}_items")
    copied = {row["copy_of"] for worst in summary.worst.values() for _, (row, _) in worst} - {None}
    originals: dict[int, _Row] = {}
    pages = math.ceil(summary.rows / ITEMS)
    for number, rows in enumerate(_batches(table), start=1):
        originals |= {row["number"]: row for row in rows if row["number"] in copied}
        cards = [_card(row, folder, list(zip(row["verdicts"], row["reasons"], strict=True))) for row in rows]
        page = {"title": path.name, "number": number, "pages": pages, "home": f"../{quote(path.name)}"}
        write_template(folder / f"{number}.html", "audit_items.html.jinja", cards=cards, page=page)
    for old in folder.glob("*.html"):
        if old.stem.isdecimal() and int(old.stem) > pages:
            old.unlink()
    listed = [verdict for verdict in VERDICTS if summary.verdicts[verdict]]
    limits = (f"{name} {value}" for name, value in summary.settings["limits"].items())
    return write_template(
        path,
        "audit.html.jinja",
        table=table.name,
        listed=summary.rows,
        ok=sum(counts["ok"] for counts in summary.sources.values()),
        limits=", ".join([f"clip of {summary.settings['duration']:g} s", *limits]),
        sources=summary.sources,
        counts=summary.verdicts,
        given=listed,
        others=[verdict for verdict in VERDICTS if verdict not in listed],
        meaning=MEANING,
        harmless=HARMLESS,
        shown=SHOWN,
        sync=_sync_words(summary),
        histograms=[_histogram(figure, summary.values[figure.column]) for figure in _HISTOGRAMS],
        worst={verdict: list(_worst(summary, verdict, originals, path.parent)) for verdict in listed},
        items=[f"{quote(folder.name)}/{number}.html" for number in range(1, pages + 1)],
    )


def _sync_words(summary: _Summary) -> str:
    """What was found of audio against frames, and what was not measured."""
    if not summary.settings.get("sync"):
        return "Audio was not compared with frames: that needs --sync."
    counts = [f"{summary.sync[name]:,} {name}" for name in ("related", "offset", "unrelated", "unknown")]
    chance = summary.settings["limits"]["max_chance"]
    names = {"clap_score": "captions", "imagebind_score": "frames"}
    left_out = [what for name, what in names.items() if not any(map(len, summary.values[name]))]
    relevance = f" Audio was not compared with {' and '.join(left_out)} by av-benchmark: that needs --relevance."
    return (
        f"Audio against frames: {', '.join(counts)}. Of each clip {summary.compared:g} s were compared."
        f" With the audio of another, {100 * chance:g} % of clips pass as related; unknown is what does not move,"
        f" cannot be heard or has no event: the card of it says which.{relevance if left_out else ''}"
    )


def _batches(table: Path) -> Iterator[list[dict[str, Any]]]:
    number = 0
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(batch_size=ITEMS):
            rows = [{**row, "number": number} for number, row in enumerate(batch.to_pylist(), number)]
            number += len(rows)
            yield rows


def _worst(
    summary: _Summary, verdict: str, originals: Mapping[int, _Row], folder: Path
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """(card, card of what it is a copy of) of the worst items of a verdict, the worst first."""
    for _, (row, reason) in sorted(summary.worst[verdict], key=lambda entry: entry[0], reverse=True):
        original = originals.get(row["copy_of"]) if verdict in ("duplicate_content", "leakage") else None
        others = [(name, "") for name in row["verdicts"] if name != verdict and name not in HARMLESS]
        yield _card(row, folder, [(verdict, reason), *others]), _card(original, folder, []) if original else None


def _card(row: _Row, folder: Path, verdicts: list[tuple[str, str]]) -> dict[str, Any]:
    """What a page in `folder` shows of an item."""
    captions = " · ".join(row["captions"])
    link = os.fsencode(os.path.relpath(os.path.abspath(row["path"]), os.path.abspath(folder)))
    figures = (
        *(("duration", "{:.1f} s"), ("width", "{}x"), ("fps", "{:.4g} fps"), ("level_dbfs", "{:.0f} dBFS")),
        *(
            *(("sync", "audio {}"), ("sync_unknown", "({})")),
            ("sync_offset", "offset {:+.3f} s"),
            ("sync_fit", "fit {:.2f}"),
            ("sync_chance", "chance {:.1%}"),
        ),
        *(("clap_score", "CLAP {:.2f}"), ("imagebind_score", "ImageBind {:.2f}")),
    )
    texts = [text.format(row[name]) for name, text in figures if row[name] is not None]
    start, address = row["start"] or 0.0, quote(link) if row["bytes"] is not None else ""  # "javascript:" is quoted too
    return {
        "id": row["clip"],
        "start": f"{start:g} s" if start else "",
        "source": row["source"],
        "number": row["number"],
        "kind": row["kind"],
        "caption": captions if len(captions) <= 200 else f"{captions[:200]}…",
        "path": row["path"],
        "link": f"{address}#t={start:g}" if address and start else address,
        "frames": f"data:image/jpeg;base64,{row['thumbnails']}" if row["thumbnails"] else "",
        "figures": ", ".join(texts).replace("x,", f"x{row['height']},").replace(", (", " ("),
        "verdicts": verdicts,
        "copy_of": row["copy_of"],
        "copy_page": row["copy_of"] is not None and f"{row['copy_of'] // ITEMS + 1}.html#item-{row['copy_of']}",
    }


# --- Histograms ------------------------------------------------------------------------------------------------------

# Area of the bars within an SVG of 400 x 220.
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 388, 12, 172


def _histogram(figure: _Figure, values: list[np.ndarray]) -> dict[str, Any]:
    """Bars of counts; the height is the logarithm, so that one bad item among a million is seen. {} without values."""
    numbers = np.concatenate([np.zeros(0), *values])
    if not numbers.size:
        return {}
    low, high = (0.0, 1.0) if figure.is_share else (float(numbers.min()), float(numbers.max()))
    x_ticks = ticks(low, high)
    x_range = x_ticks[0], x_ticks[-1]
    counts, edges = np.histogram(numbers, BARS, x_range)
    scale = (_BOTTOM - _TOP) / math.log1p(counts.max())
    width = (_RIGHT - _LEFT) / BARS
    bars = [
        (round(_LEFT + n * width + 1, 1), round(width - 2, 1), round(scale * math.log1p(count), 1), int(count), *pair)
        for n, (count, pair) in enumerate(zip(counts, itertools.pairwise(edges), strict=True))
        if count
    ]
    powers = [10**power for power in range(len(str(counts.max())))]
    return {
        "title": figure.title,
        "unit": figure.unit,
        "summary": f"{numbers.size:,} items, median {np.median(numbers):.4g} {_UNITS.get(figure.unit, '')}",
        "bars": bars,
        "x_ticks": [(round(float(np.interp(x, x_range, (_LEFT, _RIGHT))), 1), f"{x:.4g}") for x in x_ticks],
        "y_ticks": [(round(_BOTTOM - scale * math.log1p(count), 1), f"{count:,}") for count in powers],
    }
