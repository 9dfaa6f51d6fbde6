"""The best checkpoint of a run by one of its scores."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mmaudio_hf.config import EarlyStoppingConfig


class BestScore:
    """Follows `metric`, a name of metrics.jsonl ("": nothing), whose best value is the least ("min") or largest one.

    ValueError for a metric whose first part is none of `kinds`, which are what computes scores: "val", "val_ema" and
    the names of evaluators.
    """

    def __init__(self, metric: str, mode: str, kinds: Sequence[str]):
        self.metric, self.sign = metric, -1 if mode == "max" else 1
        self.kind = metric.partition("/")[0]
        self.record: dict[str, Any] | None = None  # metric, value and step of the best checkpoint
        if metric and self.kind not in kinds:
            ways = " or ".join(f"{kind}/" for kind in kinds)
            known = f"that begins with {ways}" if ways else "once data.validation is set"
            raise ValueError(f"training.best_metric {metric} is computed by nothing: name a score {known}")

    @property
    def step(self) -> int | None:
        """Step of the best checkpoint so far."""
        return self.record["step"] if self.record else None

    def restore(self, record: Mapping[str, Any] | None) -> None:
        """Go on from what a checkpoint noted, unless it followed another metric."""
        if record and record["metric"] == self.metric:
            self.record = dict(record)

    def check(self, scores: Mapping[str, float]) -> None:
        """ValueError when `scores`, those of the validation before training, have no such name."""
        # Averaged weights come with the first update; the names of their scores are the same.
        if scores and self.kind in ("val", "val_ema") and self.metric.replace("val_ema/", "val/") not in scores:
            raise ValueError(
                f"training.best_metric {self.metric} is computed by nothing: use one of {', '.join(scores)}"
            )

    def note(self, scores: Mapping[str, float], step: int) -> bool:
        """Whether the weights after `step` updates have the best score so far, which is then remembered."""
        value = scores.get(self.metric, math.nan)
        if not math.isfinite(value) or (self.record and self.sign * value >= self.sign * self.record["value"]):
            return False
        self.record = {"metric": self.metric, "value": value, "step": step}
        return True


# --- Ending a run whose validation no longer improves. The verdict is a function of metrics.jsonl alone --------------


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
