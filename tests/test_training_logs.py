"""Running metrics, log files that outlive a full disk and a killed run, and the peak of a device."""

import json
import math
import os
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from forked import Command
from toy_stores import write_recipe
from training_runs import environment, run_dir

from mmaudio_hf.config import EarlyStoppingConfig, load_recipe
from mmaudio_hf.training.actions import BestScore, find_plateau
from mmaudio_hf.training.logs import JsonLines, RunLog, RunningMetrics, device_peak, truncate_lines


def test_running_metrics_are_means_over_steps_and_over_samples_of_a_store():
    running = RunningMetrics(["videos", "audios", "unused"], Accelerator(cpu=True))
    no, yes = torch.tensor(False), torch.tensor(True)
    source = torch.tensor([0, 0, 1, 0])
    running.add(torch.tensor([1.0, 2.0, 3.0, 6.0]), source, torch.tensor(0.5), no)
    running.add(torch.tensor([3.0, 2.0, 5.0, 2.0]), source, torch.tensor(1.5), no)
    running.add(torch.full((4,), math.nan), source, torch.tensor(math.inf), yes)  # skipped
    saved = running.gather()
    means = running.means()
    assert means == {
        "train/loss": 3.0, "train/grad_norm": 1.0, "train/loss_videos": pytest.approx(16 / 6), "train/loss_audios": 4.0,
    }  # fmt: skip
    assert running.means() == {"train/loss": None, "train/grad_norm": None}
    running.restore(saved)
    assert running.means() == means
    running.restore(saved[:-2])  # of other stores
    assert running.means()["train/loss"] is None


def test_what_is_not_finite_is_null_in_the_log(tmp_path):
    """And a run decides alike with its scores in memory and with those it reads from the file."""
    recipe = load_recipe(write_recipe(tmp_path, "log"))
    log = RunLog(recipe, Accelerator(cpu=True), [])
    recipe.run_dir.mkdir(parents=True)
    for step, score in enumerate((2.0, math.nan, math.inf, 1.0)):
        log.scores(step, {"val/loss": score, "train/loss": None})
    text = log.metrics.path.read_text()
    assert text.splitlines()[1] == '{"step": 1, "val/loss": null, "train/loss": null}' and text.count("null") == 6
    assert truncate_lines(log.metrics.path, lambda step: True) == log.history
    stopping = EarlyStoppingConfig(metric="val/loss", patience=2)
    assert find_plateau(log.history[:3], stopping) == (True, 0, 2.0) and find_plateau(log.history, stopping).best == 1
    best = BestScore(replace(recipe.training, best_metric="val/loss"), ["val"])
    assert [best.update(line, line["step"]) for line in log.history] == [True, False, False, True]


def test_lines_wait_in_memory_while_they_cannot_be_written(tmp_path):
    warnings: list[str] = []
    log = JsonLines(tmp_path / "folder" / "log.jsonl", warnings.append)
    log.append({"step": 1})
    log.append({"step": 2})
    assert log.waiting and len(warnings) == 1 and "its lines wait in memory" in warnings[0]
    (tmp_path / "folder").mkdir()
    log.append({"step": 3})
    assert not log.waiting
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]


def test_a_line_that_a_kill_cut_short_is_dropped_with_later_ones(tmp_path):
    path = tmp_path / "log.jsonl"
    assert truncate_lines(path, lambda line: True) == []
    path.write_text('{"step": 1}\n{"step": 5}\n{"step": 2}\n{"st')
    assert truncate_lines(path, lambda step: step < 5) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "damage", [b'{"step": 2, "a', b"\xff\x00\xfe", b"[1]", b"[" * 100_000, b'{"stap": 2}', b'{"step": "2"}']
)
def test_a_damaged_line_in_the_middle_costs_no_other(tmp_path, damage, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n{"st')
    assert truncate_lines(path, lambda line: True) == [{"step": 1}, {"step": 3}]
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == damage + b"\n"
    assert "has 1 damaged lines, which are moved to" in capsys.readouterr().err


def test_the_peak_of_an_unknown_device_is_measured():
    peak = device_peak(torch.device("cpu"), "no")
    assert peak.measured and 1e8 < peak.flops_per_second < 1e14


def test_the_peak_of_a_known_gpu_is_that_of_its_data_sheet(monkeypatch):
    h100 = (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H100 80GB HBM3", 989e12))
    for name, rate in (*h100, ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device_peak(torch.device("cuda"), "bf16") == (rate, False)


def logged_out(home) -> dict[str, str]:
    """Variables of somebody who has never logged in to wandb."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return {**environment(), **kept, "HOME": str(home), "NETRC": str(home / "none"), "WANDB_ERROR_REPORTING": "false"}


@pytest.mark.parametrize("words", [["train"], ["doctor", "--quick"]], ids=["train", "doctor"])
def test_wandb_without_a_login_is_one_sentence_before_training(tmp_path, words):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mmaudio-hf[wandb]'")
    recipe = write_recipe(tmp_path, trackers=["wandb"])
    (command, *options) = words
    result = Command(command, str(recipe), *options, cwd=tmp_path, env=logged_out(tmp_path)).result()
    output = " ".join((result.stdout + result.stderr).split())
    assert result.returncode == (2 if command == "train" else 1), output
    assert "nobody is logged in: run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline" in output
    assert "Traceback" not in output and not list(run_dir(recipe).glob("*.jsonl"))


def test_a_resumed_run_is_one_run_of_wandb_and_trackio(tmp_path):
    for name in ("wandb", "trackio"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'mmaudio-hf[{name}]'")
    recipe = write_recipe(tmp_path, trackers=["wandb", "trackio"], tracker_project="curves", steps=4, log_every=1)
    variables = logged_out(tmp_path) | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    for steps in (2, 4):
        words = ("train", str(recipe), f"training.steps={steps}", "ema.start=0")
        result = Command(*words, cwd=tmp_path, env=variables).result()
        assert result.returncode == 0, result.stderr
    sessions = sorted((run_dir(recipe) / "trackers" / "wandb").glob("offline-run-*"))
    run_id = (run_dir(recipe) / "trackers" / "id").read_text()
    assert len(sessions) == 2 and {path.name.split("-")[-1] for path in sessions} == {run_id}
    assert all(b"curves" in next(path.glob("*.wandb")).read_bytes() for path in sessions)
    with closing(sqlite3.connect(tmp_path / "trackio" / "curves.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, *_ in rows} == {f"run-{run_id}"}
    assert [step for _, step, scores in rows if "train/loss" in json.loads(scores)] == [1, 2, 3, 4]
