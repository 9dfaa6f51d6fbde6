"""What follows a training step: one pure function, and the two rules that turn scores into its inputs.

a step of the optimizer -> log -> validate -> save -> evaluate -> save -> stop
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from mmaudio_hf.config import EarlyStoppingConfig, Recipe, TrainingConfig
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import Evaluation


class Evaluator(Protocol):
    """Scores the EMA weights every `every` steps, and after the last one."""

    name: str
    every: int
    long: bool  # it takes so long that a checkpoint is saved first, from which a killed run resumes the evaluation
    at_start: bool  # the weights that a run starts from are evaluated too, before the first step

    def run(self, model: MMAudio, step: int, weights: Mapping[str, Any]) -> Evaluation:
        """Evaluate `model`, which holds the EMA weights; called on every process, where the scores are the same.

        They are logged as NAME/SCORE. The first process may return audio for the trackers too. `weights` says which
        weights of the run these are, as in weights.json.
        """
        ...


class Verdict(NamedTuple):
    """What the scores of a step say, as far as they are known: all False before its validation."""

    plateau: bool = False  # early stopping: validation no longer improves
    best_validation: bool = False  # a validation score is the best so far by training.best_metric
    best_evaluation: bool = False  # the same of an evaluator's score


class Save(NamedTuple):
    """What is written at one point of a step."""

    snapshot: bool = False  # of the EMA profiles, from which any other width is synthesised afterwards
    checkpoint: bool = False


class Actions(NamedTuple):
    """What follows a step, in this order."""

    log: bool
    validate: bool
    save_first: Save
    evaluators: tuple[Evaluator, ...]  # those that are due
    evaluate: bool  # now; else the checkpoint that was saved first says that they are to be run after resuming
    save: Save
    finished: bool  # all steps are done, or validation no longer improves
    stop: bool


def actions_after(
    step: int, verdict: Verdict, signal: int | None, recipe: Recipe, evaluators: Sequence[Evaluator] = ()
) -> Actions:
    """What follows once `step` updates are done, given what the scores say and the `signal` to stop, if one came.

    The loop calls it after the step, after validation and after evaluation, knowing more each time. Nothing that has
    been done by then changes: `log` and `validate` do not depend on scores, `save_first` not on those of evaluators.
    """
    training = recipe.training
    last = step == training.steps
    finished = last or verdict.plateau
    due = tuple(e for e in evaluators if finished or step % e.every == 0)
    long = any(e.long for e in due)
    snapshot = finished or step % recipe.ema.snapshot_every == 0
    checkpoint = bool(signal) or finished or verdict.best_validation or step % training.checkpoint_every == 0
    # A finished run is evaluated and published with weights synthesised from all snapshots, so the last comes first.
    save_first = Save(snapshot and (finished or long), long)
    # Saved again: the card of the published weights shows the scores, and `best` needs a checkpoint.
    again = finished if long else checkpoint
    return Actions(
        log=last or step % training.log_every == 0,
        validate=last or step % training.validate_every == 0,
        save_first=save_first,
        evaluators=due,
        # Who sends a signal does not want to wait for hours.
        evaluate=bool(due) and (finished or not (signal and long)),
        save=Save(snapshot and not save_first.snapshot, again or verdict.best_evaluation),
        finished=finished,
        stop=bool(signal) or finished,
    )


# --- The best checkpoint ---------------------------------------------------------------------------------------------


class BestScore:
    """Follows `training.best_metric`, a name of metrics.jsonl ("": none), whose best value is the least or the largest.

    ValueError for a metric with a prefix that is none of `kinds`: "val", "val_ema" and the names of evaluators.
    """

    def __init__(self, training: TrainingConfig, kinds: Sequence[str]):
        self.metric, self.sign = training.best_metric, -1 if training.best_mode == "max" else 1
        self.record: dict[str, Any] | None = None  # metric, value and step of the best checkpoint
        if self.metric and self.metric.partition("/")[0] not in kinds:
            prefixes = " or ".join(f"{kind}/" for kind in kinds)
            known = f"that begins with {prefixes}" if prefixes else "once data.validation is set"
            raise ValueError(f"training.best_metric {self.metric} is never computed: name a score {known}")

    @property
    def step(self) -> int | None:
        """Step of the best checkpoint so far."""
        return self.record["step"] if self.record else None

    def restore(self, record: Mapping[str, Any] | None) -> None:
        """Continue from the record of a checkpoint, unless it followed another metric."""
        if record and record["metric"] == self.metric:
            self.record = dict(record)

    def update(self, scores: Mapping[str, float | None], step: int) -> bool:
        """Whether the weights after `step` updates have the best score so far, which is then the new record."""
        value = scores.get(self.metric)
        if value is None or not math.isfinite(value):
            return False
        if self.record and self.sign * value >= self.sign * self.record["value"]:
            return False
        self.record = {"metric": self.metric, "value": value, "step": step}
        return True


# --- Early stopping: a function of metrics.jsonl alone, so killed and resumed runs decide alike ----------------------


class Plateau(NamedTuple):
    """Whether a run no longer improves."""

    stop: bool
    best_step: int  # -1 without any score
    best: float


def find_plateau(history: Iterable[Mapping[str, Any]], config: EarlyStoppingConfig) -> Plateau:
    """Whether `config.patience` scores in a row were not better than the best before them by `config.min_delta`.

    `history` are the lines of metrics.jsonl in their order; a score that is not finite, null there, is no improvement.
    """
    best, best_step, waited = math.inf, -1, 0
    for line in history:
        if config.metric not in line:
            continue
        score = math.nan if line[config.metric] is None else line[config.metric]
        if score < best - config.min_delta or (best_step < 0 and math.isfinite(score)):
            best, best_step, waited = score, int(line["step"]), 0
        else:
            waited += 1
    return Plateau(config.patience > 0 and waited >= config.patience, best_step, best)


def check_metrics(training: TrainingConfig, validated: Mapping[str, float]) -> None:
    """ValueError for a metric to follow that should come from validation, whose first scores have no such name.

    Scores of the EMA weights come with the first update, under the names of those of the raw ones.
    """
    names = [name.partition("/")[2] for name in validated if name.startswith("val/")]
    kind, _, name = training.best_metric.partition("/")
    if kind in ("val", "val_ema") and names and name not in names:
        way = f"use one of {', '.join(validated)}"
        raise ValueError(f"training.best_metric {training.best_metric} is never computed: {way}")
    stopping = training.early_stopping
    kind, _, name = stopping.metric.partition("/")
    if not stopping.patience or name in names:
        return
    if not names:
        raise ValueError(f"training.early_stopping waits for {stopping.metric}, but data.validation names no store")
    close = (difflib.get_close_matches(name, names, n=1) or names)[0]
    raise ValueError(f"training.early_stopping.metric: there is no {stopping.metric}: did you mean {kind}/{close}?")
