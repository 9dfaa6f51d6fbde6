"""Ending a run whose validation no longer improves. The verdict is a function of metrics.jsonl alone.

So it needs no state of its own: a run that was killed and resumed decides as an undisturbed one.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mmaudio_hf.config import EarlyStoppingConfig


class Verdict(NamedTuple):
    """What the scores so far say."""

    stop: bool
    best_step: int  # -1 without any score
    best: float


def judge(history: Iterable[Mapping[str, float]], config: EarlyStoppingConfig) -> Verdict:
    """Whether `config.patience` scores in a row were not better than the best before them by `config.min_delta`.

    `history` are the lines of metrics.jsonl in their order; a score that is not finite is no improvement.
    """
    best, best_step, waited = math.inf, -1, 0
    for line in history:
        if config.metric not in line:
            continue
        score = line[config.metric]
        if score < best - config.min_delta or (best_step < 0 and math.isfinite(score)):
            best, best_step, waited = score, line["step"], 0
        else:
            waited += 1
    return Verdict(config.patience > 0 and waited >= config.patience, best_step, best)


def check_metric(config: EarlyStoppingConfig, validated: Sequence[str]) -> None:
    """ValueError when the metric is to come from validation, and validation, which gave `validated`, has none such.

    Scores of the averaged weights come later, under the names of those of the raw ones.
    """
    kind, _, name = config.metric.partition("/")
    names = [each.partition("/")[2] for each in validated if each.startswith("val/")]
    if not config.patience or name in names:
        return
    if not names:
        raise ValueError(f"training.early_stopping waits for {config.metric}, but data.validation names no store")
    close = difflib.get_close_matches(name, names, n=1) or names
    raise ValueError(f"training.early_stopping.metric: there is no {config.metric}: did you mean {kind}/{close[0]}?")
