"""What follows a step, as a table; and the two rules about scores: the best one, and early stopping."""

import math
from dataclasses import dataclass, replace

import pytest

from mmaudio_hf.config import EarlyStoppingConfig, EmaConfig, Recipe, TrainingConfig
from mmaudio_hf.training.actions import BestScore, Save, Verdict, actions_after, check_metrics, find_plateau

RECIPE = Recipe(
    name="run",
    ema=EmaConfig(snapshot_every=20),
    training=TrainingConfig(steps=100, log_every=2, validate_every=10, checkpoint_every=25),
)
SNAPSHOT, CHECKPOINT, BOTH, NOTHING = Save(snapshot=True), Save(checkpoint=True), Save(True, True), Save()
TERM = 15


@dataclass
class Every:
    """An evaluator that is due every so many steps."""

    every: int
    long: bool
    name: str = "score"

    def run(self, *_):
        raise AssertionError("deciding runs nothing")


QUICK, LONG = Every(10, long=False), Every(50, long=True)


def names(actions) -> str:
    """The flags that are set, in order."""
    flags = ("log", "validate", "evaluate", "finished", "stop")
    return " ".join(name for name in flags if getattr(actions, name))


@pytest.mark.parametrize(
    ("step", "signal", "flags", "save"),
    [
        (1, None, "", NOTHING),
        (2, None, "log", NOTHING),
        (10, None, "log validate", NOTHING),
        (20, None, "log validate", SNAPSHOT),
        (25, None, "", CHECKPOINT),
        (1, TERM, "stop", CHECKPOINT),
        (20, TERM, "log validate stop", BOTH),
        (50, None, "log validate", CHECKPOINT),
        (100, TERM, "log validate finished stop", CHECKPOINT),
    ],
)
def test_what_is_due_by_the_number_of_the_step(step, signal, flags, save):
    actions = actions_after(step, Verdict(), signal, RECIPE)
    assert (names(actions), actions.save) == (flags, save)
    # The weights that a finished run publishes are made of all snapshots: the last ones come first.
    assert actions.save_first == (SNAPSHOT if step == 100 else NOTHING) and actions.evaluators == ()


def test_logs_and_validations_need_not_divide_the_number_of_steps():
    recipe = replace(RECIPE, training=replace(RECIPE.training, steps=101))
    assert names(actions_after(101, Verdict(), None, recipe)) == "log validate finished stop"


@pytest.mark.parametrize(
    ("verdict", "signal", "flags", "save_first", "save"),
    [
        (Verdict(), None, "", NOTHING, NOTHING),
        (Verdict(best_validation=True), None, "", NOTHING, CHECKPOINT),
        (Verdict(best_evaluation=True), None, "", NOTHING, CHECKPOINT),
        (Verdict(plateau=True), None, "finished stop", SNAPSHOT, CHECKPOINT),
        (Verdict(plateau=True, best_validation=True), TERM, "finished stop", SNAPSHOT, CHECKPOINT),
    ],
)
def test_what_the_scores_add(verdict, signal, flags, save_first, save):
    actions = actions_after(31, verdict, signal, RECIPE)
    assert (names(actions), actions.save_first, actions.save) == (flags, save_first, save)


@pytest.mark.parametrize(
    ("evaluator", "step", "signal", "verdict", "evaluate", "save_first", "save"),
    [
        (QUICK, 9, None, Verdict(), False, NOTHING, NOTHING),
        (QUICK, 10, None, Verdict(), True, NOTHING, NOTHING),
        (QUICK, 10, None, Verdict(best_evaluation=True), True, NOTHING, CHECKPOINT),
        (QUICK, 10, TERM, Verdict(), True, NOTHING, CHECKPOINT),
        (QUICK, 100, None, Verdict(), True, SNAPSHOT, CHECKPOINT),
        # Before a long one a checkpoint is saved, which is saved again for a reason of the evaluation's alone.
        (LONG, 50, None, Verdict(), True, CHECKPOINT, NOTHING),
        (LONG, 50, None, Verdict(best_validation=True), True, CHECKPOINT, NOTHING),
        (LONG, 50, None, Verdict(best_evaluation=True), True, CHECKPOINT, CHECKPOINT),
        # A signal puts it off until the run is resumed, unless the run is finished.
        (LONG, 50, TERM, Verdict(), False, CHECKPOINT, NOTHING),
        (LONG, 100, None, Verdict(), True, BOTH, CHECKPOINT),
        (LONG, 100, TERM, Verdict(), True, BOTH, CHECKPOINT),
        # A run that ends early is evaluated at a step that `every` does not divide.
        (LONG, 31, None, Verdict(plateau=True), True, BOTH, CHECKPOINT),
        (QUICK, 31, None, Verdict(plateau=True), True, SNAPSHOT, CHECKPOINT),
    ],
)
def test_evaluations_and_the_checkpoints_around_them(evaluator, step, signal, verdict, evaluate, save_first, save):
    actions = actions_after(step, verdict, signal, RECIPE, [evaluator])
    assert (actions.evaluate, actions.save_first, actions.save) == (evaluate, save_first, save)
    assert actions.evaluators == ((evaluator,) if step in (10, 31, 50, 100) else ())


def test_a_snapshot_is_saved_once():
    """With the first of the two saves that there is."""
    every = Every(20, long=True)
    actions = actions_after(20, Verdict(), None, RECIPE, [every, QUICK])
    assert (actions.save_first, actions.save, actions.evaluators) == (BOTH, NOTHING, (every, QUICK))
    assert actions_after(20, Verdict(), None, RECIPE, [QUICK]).save == SNAPSHOT


def test_nothing_that_was_done_is_undone_by_later_scores():
    """The loop asks again after validation and after evaluation."""
    flags = [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)]
    for step in range(1, 101):
        for signal in (None, TERM):
            for evaluators in ([], [QUICK], [LONG], [QUICK, LONG]):
                known = {Verdict(*f): actions_after(step, Verdict(*f), signal, RECIPE, evaluators) for f in flags}
                for verdict, actions in known.items():
                    assert actions[:2] == known[Verdict()][:2]
                    before = known[verdict._replace(best_evaluation=False)]
                    assert actions._replace(save=before.save) == before
                    assert actions.save.checkpoint or not before.save.checkpoint
                    assert not (actions.save.snapshot and actions.save_first.snapshot)
                    stays = actions.save.checkpoint or actions.save_first.checkpoint
                    assert stays or not (actions.stop or verdict.best_validation or verdict.best_evaluation)


# --- the best score ------------------------------------------------------------------------------------------------


def test_the_best_score_follows_its_metric():
    best = BestScore(TrainingConfig(best_metric="onsets/f1", best_mode="max"), ["val", "onsets"])
    values = [0.1, 0.3, math.nan, 0.2, 0.3, 0.4]
    assert [best.update({"onsets/f1": value}, i) for i, value in enumerate(values)] == [
        True, True, False, False, False, True,
    ]  # fmt: skip
    assert best.record == {"metric": "onsets/f1", "value": 0.4, "step": 5} and best.step == 5
    assert not best.update({"other/f1": 1.0}, 6)


def test_a_record_of_another_metric_is_dropped():
    record = {"metric": "val/loss", "value": 0.5, "step": 3}
    for metric, step in (("val/loss", 3), ("val_ema/loss", None), ("", None)):
        best = BestScore(TrainingConfig(best_metric=metric), ["val", "val_ema"])
        best.restore(record)
        assert best.step == step
    assert best.update({"val/loss": 0.1}, 4) is False


def test_a_metric_that_nothing_computes_is_an_error():
    with pytest.raises(ValueError, match="begins with val/ or onsets/"):
        BestScore(TrainingConfig(best_metric="loss"), ["val", "onsets"])
    with pytest.raises(ValueError, match=r"once data\.validation is set"):
        BestScore(TrainingConfig(best_metric="val/loss"), [])
    training = TrainingConfig(best_metric="val_ema/lossy")
    with pytest.raises(ValueError, match="use one of val/loss"):
        check_metrics(training, {"val/loss": 1.0})
    check_metrics(replace(training, best_metric="val_ema/loss"), {"val/loss": 1.0})


# --- early stopping ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "stop", "best_step"),
    [
        ((3, 2, 1, 2), 2, 0, False, 20),
        ((3, 2, 1, 2, 1), 2, 0, True, 20),
        ((3, 2, 1.95, 1.9), 2, 0.2, True, 10),
        ((3, 2, 1.95, 1.9), 2, 0.05, False, 30),
        ((3, math.nan, math.inf), 2, 0, True, 0),
        ((3, 3, 3, 3, 3), 0, 0, False, 0),
        ((), 1, 0, False, -1),
    ],
)
def test_early_stopping_is_a_function_of_the_history(scores, patience, min_delta, stop, best_step):
    history = [{"step": 5, "train/loss": 0.0}]
    history += [{"step": 10 * i, "val/loss": score} for i, score in enumerate(scores)]
    plateau = find_plateau(history, EarlyStoppingConfig(metric="val/loss", patience=patience, min_delta=min_delta))
    assert (plateau.stop, plateau.best_step) == (stop, best_step)


def test_early_stopping_needs_a_score_of_validation():
    stopping = TrainingConfig(early_stopping=EarlyStoppingConfig(metric="val_ema/los", patience=1))
    with pytest.raises(ValueError, match="did you mean val_ema/loss"):
        check_metrics(stopping, {"val/loss": 1.0})
    with pytest.raises(ValueError, match=r"data\.validation names no store"):
        check_metrics(stopping, {})
