"""Runs that are stopped by a signal, and steps that are not finite: skipped, explained, and replayed."""

import json
import math
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from forked import PATIENCE, Command, wait_until
from toy_stores import write_recipe
from training_runs import (
    EVERY,
    POISONED,
    command,
    environment,
    last_step,
    lines,
    metrics,
    run_dir,
    start,
    tensors,
    train,
)

from mmaudio_hf.training.guard import StopSignals, summary, to_json

PASSED_ON = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1"}


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """Recipe of a run that only a signal ends; each test resumes it where the one before left it."""
    folder = tmp_path_factory.mktemp("signals")
    return write_recipe(folder, "endless", steps=100_000, log_every=1, checkpoint_every=100_000)


@pytest.mark.parametrize(
    ("processes", "number", "send", "code", "variables"),
    [
        (0, signal.SIGINT, os.kill, 130, {}),
        (0, signal.SIGTERM, os.kill, 143, {}),
        (0, signal.SIGHUP, os.kill, 129, {}),
        (0, signal.SIGUSR1, os.kill, 138, {}),
        (1, signal.SIGINT, os.killpg, None, {}),  # a terminal signals all processes
        (2, signal.SIGUSR1, os.kill, 1, PASSED_ON),  # a scheduler may reach the launcher alone
    ],
    ids=["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "launcher-SIGINT", "launcher-2-SIGUSR1"],
)
def test_a_signal_saves_and_ends_the_run(endless, processes, number, send, code, variables):
    step, log = last_step(endless), run_dir(endless) / "metrics.jsonl"
    process = start(endless) if not processes else subprocess.Popen(
        command(endless, processes=processes), env=environment(**variables), cwd=endless.parent,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(lambda: log.exists() and f'{{"step": {step + 1}, "train/loss"' in log.read_text(), process)
    send(process.pid, number)
    output = "".join(filter(None, process.communicate(timeout=PATIENCE)))  # until the last of the processes has ended
    # accelerate's launcher for one process is ended by Ctrl-C itself.
    assert process.returncode == code or (code is None and process.returncode != 0), output
    assert f"from step {step} to 100000" in output and f"{number.name}: saving a checkpoint" in output, output
    assert last_step(endless) > step and f"stopped at step {last_step(endless)}; the same command" in output
    assert ("resumes from there; a traceback below is how the launcher ends" in output) == (processes > 0), output


def test_one_press_is_one_however_often_it_comes(monkeypatch):
    """`timeout` signals a process twice at once; torchrun passes on, whenever it can, what all have had already."""
    for launched, late in ((False, False), (True, False), (True, True)):
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setattr("mmaudio_hf.training.guard.ONE_PRESS_SECONDS", -1.0 if late else 1000.0)
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert signals.number == signal.SIGINT
            monkeypatch.setattr("mmaudio_hf.training.guard.ONE_PRESS_SECONDS", -1.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


# --- steps that are not finite ---------------------------------------------------------------------------------------


def test_steps_that_are_not_finite_are_skipped(tmp_path):
    recipe = write_recipe(tmp_path, "broken", max_skipped_steps=3)
    means = np.memmap(tmp_path / "videos" / "mean.memmap", dtype=np.float32, mode="r+")
    means[: means.size // 24] = np.nan  # the first of 24 rows
    means.flush()
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    skipped = lines(recipe, "skipped.jsonl")
    assert skipped and all("videos_0000" in line["ids"] for line in skipped)
    assert all(value.isfinite().all() for value in tensors(recipe).values())
    assert metrics(recipe)[-2]["train/skipped_steps"] == len(skipped)


def test_too_many_of_them_end_the_run(tmp_path):
    recipe = write_recipe(tmp_path, "hopeless", max_skipped_steps=1)
    means = np.memmap(tmp_path / "videos" / "mean.memmap", dtype=np.float32, mode="r+")
    means[:] = np.nan
    means.flush()
    result = train(recipe, "data.train.0.repeats=20")
    assert result.returncode == 1
    assert "not finite" in result.stderr and "optim.learning_rate" in result.stderr


def poisoned_step(recipe: Path) -> int:
    """A skipped step that follows no checkpoint."""
    return next(n for line in lines(recipe, "skipped.jsonl") if (n := line["step"]) >= 32 and n % EVERY)


def diagnostics(recipe: Path, step: int) -> dict:
    return json.loads((run_dir(recipe) / f"autopsy/step_{step}.json").read_text())


def test_a_skipped_step_leaves_diagnostics(poisoned_run):
    skipped = lines(poisoned_run, "skipped.jsonl")
    assert len(skipped) >= 3 and all(POISONED in line["ids"] for line in skipped)
    logged = [line for line in metrics(poisoned_run) if "train/loss" in line]  # of one step each
    counts = [0, *(line["train/skipped_steps"] for line in logged)]
    for line, before in zip(logged, counts, strict=False):
        empty = [name for name, value in line.items() if value is None]
        assert empty == ["train/loss", "train/grad_norm"] * (line["train/skipped_steps"] > before)
    assert counts[-1] == len(skipped)
    figures = diagnostics(poisoned_run, poisoned_step(poisoned_run))
    assert figures["suspects"] == [POISONED] and figures["loss"] == "nan" and figures["nonfinite_parameters"] == []
    assert figures["gradient_norms"]["final_layer"] == "nan" and "sync_pos_emb" in figures["nonfinite_gradients"]
    assert [sample["slot"] for sample in figures["samples"]] == [0, 1, 2, 3]
    sample = next(s for s in figures["samples"] if s["id"] == POISONED)
    assert sample["features"]["mean"]["max"] == pytest.approx(1e30) and sample["features"]["mean"]["nonfinite"] == 0


def test_a_skipped_step_can_be_replayed(poisoned_run):
    step, log = poisoned_step(poisoned_run), run_dir(poisoned_run) / "skipped.jsonl"
    before = log.stat().st_mtime_ns
    result = Command("replay-step", str(run_dir(poisoned_run)), str(step), "--json", "--advance").result()
    assert result.returncode == 0, result.stderr
    assert f"to {step}" in result.stderr and "training from step " in result.stderr
    figures = json.loads(result.stdout)
    assert figures.pop("weights_of_step") == step
    assert figures == diagnostics(poisoned_run, step)  # same weights, data and noise: the same to the last bit
    assert log.stat().st_mtime_ns == before


def test_diagnostics_as_text_and_json():
    features = {"mean": {"min": -7.0, "max": 2.0, "mean": 0.0, "std": 1.0, "nonfinite": 0}, "std": {"nonfinite": 9}}
    figures = {
        "step": 5, "loss": math.nan, "gradient_norm": math.inf, "learning_rate": 1e-4, "weights_of_step": 4,
        "suspects": list("abcdefg"), "nonfinite_gradients": [], "nonfinite_parameters": ["w"],
        "samples": [{"id": "a", "slot": 0, "loss": 1.5, "t": 0.25, "features": features}],
    }  # fmt: skip
    assert summary(figures).splitlines() == [
        "step 5: loss nan, gradient norm inf, learning rate 0.0001",
        "weights: those after 4 updates",
        "suspects: a, b, c, d, e and 2 more",
        "gradients not finite: none",
        "weights not finite: w",
        "  a: loss 1.5, t 0.2500; largest values: mean 7, std 0",
    ]
    assert json.loads(to_json(figures)) == figures | {"loss": "nan", "gradient_norm": "inf"}
