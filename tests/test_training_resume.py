"""Resuming: killed runs end as undisturbed ones, changed recipes are shown, and one launch at a time trains a run."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forked import PATIENCE, Command, wait_until
from safetensors.torch import save_file
from toy_stores import recipe_tree, write_recipe, write_store
from training_runs import (
    POISONED,
    STEPS,
    accelerate_command,
    assert_close,
    assert_same_metrics,
    checkpoint_names,
    environment,
    gated_program,
    last_step,
    lines,
    poisoned_recipe,
    run_dir,
    same_run,
    start,
    train,
)

from mmaudio_hf.cli import main
from mmaudio_hf.config import Recipe, load_recipe, to_dict
from mmaudio_hf.data.mixture import open_mixture
from mmaudio_hf.training import resume
from mmaudio_hf.training.checkpoint import TrainingState
from mmaudio_hf.training.resume import check_same_run, dependencies

# --- killed and interrupted runs -------------------------------------------------------------------------------------


def kill_moments(seed: int) -> list[tuple[int, float, int]]:
    """Of five launches: the logged step to wait for, a delay in s, and the file of a checkpoint that is not written.

    Step None waits for that file instead: the run is killed while it writes. A checkpoint has four files, so a launch
    comes no further than four of them, and no run ends before its fifth kill.
    """
    choose = random.Random(seed)
    steps = sorted(choose.sample(range(1, STEPS // 2), 2))
    at_steps = [(step, choose.uniform(0, 0.05), 16) for step in steps]
    writing = [(None, 0.0, choose.randint(1, 8)) for _ in range(2)]
    return [(0, 0.0, 16), at_steps[0], writing[0], at_steps[1], writing[1]]


def has_logged(recipe: Path, step: int) -> bool:
    log = run_dir(recipe) / "metrics.jsonl"
    return log.exists() and log.read_bytes().count(b'"train/loss"') >= step


def is_writing(recipe: Path) -> bool:
    return any((run_dir(recipe) / "checkpoints").glob("step_*.partial"))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(poisoned_run, seed):
    """SIGKILL at five random moments, some of them while a checkpoint is being written."""
    recipe = poisoned_recipe(poisoned_run.parent, f"killed_{seed}")
    for step, delay, file in kill_moments(seed):
        with start(recipe, freeze=("mmaudio_hf.training.checkpoint.write_safetensors", file)) as process:
            wait_until(partial(is_writing, recipe) if step is None else partial(has_logged, recipe, step), process)
            time.sleep(delay)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert step is not None or is_writing(recipe)
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    same_run(recipe, poisoned_run)


def test_ctrl_c_under_a_launcher_and_other_processes_afterwards(poisoned_run):
    """Two processes are interrupted as a terminal does it; four finish the run: same data, same noise, same model."""
    recipe = poisoned_recipe(poisoned_run.parent, "elastic")
    process = subprocess.Popen(
        accelerate_command(*gated_program({16: recipe.parent / "never"}, recipe), processes=2),
        env=environment(), cwd=recipe.parent,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(lambda: has_logged(recipe, 14), process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    step = last_step(recipe)
    assert "SIGINT: saving a checkpoint after this step" in output and f"stopped at step {step}" in output, output
    assert step >= 14 and not list((run_dir(recipe) / "checkpoints").glob("*.partial"))
    result = train(recipe, processes=4)
    assert result.returncode == 0, result.stderr
    assert "4 processes on cpu, batch 4 = 4 x 1 x 1, precision no" in result.stdout
    assert f"from step {step} to {STEPS}" in result.stdout
    assert_close(recipe, poisoned_run, 1e-5)
    assert_same_metrics(recipe, poisoned_run)
    ours, theirs = ([(e["step"], set(e["ids"])) for e in lines(r, "skipped.jsonl")] for r in (recipe, poisoned_run))
    assert ours == theirs
    figures = json.loads((run_dir(recipe) / f"autopsy/step_{ours[-1][0]}.json").read_text())
    assert figures["suspects"] == [POISONED] and [sample["slot"] for sample in figures["samples"]] == [0, 1, 2, 3]


def test_a_damaged_checkpoint_is_passed_over(finished_run):
    recipe = write_recipe(finished_run.parent, "damaged")
    assert train(recipe, "training.steps=8", "training.log_every=4").returncode == 0
    file = run_dir(recipe) / "checkpoints" / "step_8" / "training_state" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = train(recipe, "training.steps=9")
    assert result.returncode == 0, result.stderr
    assert "damaged" in result.stdout and "from step 4 to 9" in result.stdout
    assert checkpoint_names(recipe) == {"step_4", "step_8", "step_8.damaged", "step_9"}


# --- changed recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["model.hidden_dim=128"], ["depend on: put model.hidden_dim back", "- model.hidden_dim: 64"]),
        (["ema.sigma_rels=[0.03, 0.2]", "--allow-changes"], ["depend on", "+ ema.sigma_rels: [0.03, 0.2]"]),
        (
            ["seed=8", "flow.condition_dropout=0.2", "training.log_every=1"],
            [
                "--allow-changes\n  - seed: 7\n  + seed: 8\n",
                "- flow.condition_dropout: 0.1\n  + flow.condition_dropout: 0.2\n",
            ],
        ),
        (["training.steps=6"], ["has trained 12 steps"]),
        (["training.best_metric=score/f1"], ["name a score that begins with val/ or val_ema/"]),
        (["resume=never"], ["holds checkpoints"]),
    ],
    ids=["model", "profiles", "harmful", "steps", "metric", "never"],
)
def test_a_recipe_that_does_not_fit_the_run_is_an_error(finished_run, overrides, messages):
    kept = (run_dir(finished_run) / "config.yaml").read_bytes()
    result = train(finished_run, *overrides)
    assert result.returncode == 2 and "log_every" not in result.stderr, result.stderr
    assert all(message in result.stderr for message in messages), result.stderr
    assert (run_dir(finished_run) / "config.yaml").read_bytes() == kept


def test_other_stores_may_follow_and_leftovers_are_removed(finished_run):
    recipe = write_recipe(finished_run.parent, "moved_on")
    assert train(recipe, "training.steps=4", "training.log_every=3").returncode == 0
    leftover = run_dir(recipe) / "checkpoints" / "step_9.partial"
    leftover.mkdir()
    stale = run_dir(recipe) / "ema" / "sigma_0.05_step_000000099.safetensors"
    save_file({"w": torch.zeros(1)}, stale, metadata={"sigma_rel": "0.05", "step": "99"})
    changes = ("data.train=[{path: videos}]", "seed=8", "training.steps=5")
    result = train(recipe, *changes, "--allow-changes")
    assert result.returncode == 0, result.stderr
    assert "- seed: 7\n  + seed: 8" in result.stdout and "+ data.train: [{'path': 'videos'" in result.stdout
    assert "- training.steps: 4\n  + training.steps: 5" in result.stdout
    assert not leftover.exists() and not stale.exists()


# --- stores are identified by what they hold, wherever they lie -----------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> tuple[Recipe, TrainingState]:
    """A recipe with its stores in `here`, copies of them in `there`, and a state that was saved with it."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(tmp_path / "here")))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    metadata = json.loads(json.dumps({"recipe": to_dict(recipe), "depends_on": depends_on(recipe)}))
    return recipe, TrainingState(4, {}, metadata)


def with_stores(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe with the stores of `folder`."""
    stores = tuple(replace(store, path=str(folder / Path(store.path).name)) for store in recipe.data.train)
    return replace(recipe, data=replace(recipe.data, train=stores))


def depends_on(recipe: Recipe) -> dict:
    mixtures = [open_mixture(split, recipe.model) for split in (recipe.data.train, recipe.data.validation)]
    result = dependencies(*mixtures, torch.device("cpu"))
    for mixture in mixtures:
        mixture.close()
    return result


def check(recipe: Recipe, state: TrainingState, allow_changes: bool = False) -> list[str]:
    """What `check_same_run` logs."""
    logged: list[str] = []
    check_same_run(recipe, depends_on(recipe), state, allow_changes, logged.append)
    return logged


def replace_store(path: Path, rows: int, **how) -> None:
    for old in path.parent.glob(f"{path.name}*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    write_store(path, rows, **how)


def test_stores_may_move(saved, tmp_path):
    recipe, state = saved
    moved = with_stores(recipe, tmp_path / "there")
    assert check(moved, state) == []
    with pytest.raises(ValueError, match=r"- seed: 7\n  \+ seed: 8$"):
        check(replace(moved, seed=8), state)
    repeats = tuple(replace(store, repeats=3.0) for store in moved.data.train)
    with pytest.raises(ValueError, match=r"\+ data\.train: .*'repeats': 3\.0"):
        check(replace(moved, data=replace(moved.data, train=repeats)), state)


@pytest.mark.parametrize("name", ["audios", "held_out"])
@pytest.mark.parametrize("rows", [-1, 0, 2])
def test_another_store_at_the_same_path_is_an_error(saved, tmp_path, name, rows):
    """With rows less, rows more, or as many of them; of training or of validation."""
    recipe, state = saved
    count = {"audios": 8, "held_out": 5}[name]
    replace_store(tmp_path / "here" / name, count + rows, video=name != "audios", seed=5)
    key = {"audios": "data.train.1", "held_out": "data.validation.0"}[name]
    path = re.escape(str(tmp_path / "here" / name))
    lines = rf"  - {key} \({path}\): {count} rows, content \w{{12}}\n  \+ .*: {count + rows} rows, content \w{{12}}$"
    with pytest.raises(ValueError, match=f"--allow-changes\n{lines}") as caught:
        check(recipe, state)
    [logged] = check(recipe, state, allow_changes=True)
    assert logged.splitlines()[1:] == str(caught.value).splitlines()[1:]
    there = replace(recipe.data.validation[0], path=str(tmp_path / "there" / "held_out"))
    chosen = replace(recipe, data=replace(recipe.data, validation=(there,)))
    if name == "held_out":  # another store for validation that somebody names is their choice, and is shown
        assert "+ data.validation: " in check(chosen, state)[0]


def test_other_data_need_allow_changes(tmp_path):
    recipe = write_recipe(tmp_path, "swapped")
    assert train(recipe, "training.steps=6").returncode == 0
    replace_store(tmp_path / "audios", 6, video=False, seed=5)
    result = train(recipe, "training.steps=7")
    changed = re.escape(f"data.train.1 ({tmp_path / 'audios'}): ")
    assert result.returncode == 2 and re.search(rf"\n  - {changed}8 rows.*\n  \+ {changed}6 rows", result.stderr)
    replayed = Command("replay-step", str(run_dir(recipe)), "5").result()
    assert "warning: this is not the step that was trained:\n  - data.train.1" in replayed.stderr
    assert train(recipe, "training.steps=7", "--allow-changes").returncode == 0
    assert train(recipe, "training.steps=8").returncode == 0  # the checkpoint has seen them now


def test_a_store_without_a_manifest_is_identified_by_samples_of_it(saved, tmp_path):
    recipe, state = saved
    for folder in ("here", "there"):
        (tmp_path / folder / "videos.manifest.json").unlink()
    with pytest.raises(ValueError, match=r"data\.train\.0 .*24 rows, content"):  # its checksums are not known any more
        check(recipe, state)
    state.metadata["depends_on"]["data.train.0"] = depends_on(recipe)["data.train.0"]
    assert check(with_stores(recipe, tmp_path / "there"), state) == []
    os.utime(tmp_path / "here" / "videos" / "mean.memmap")
    assert check(recipe, state) == []
    values = np.memmap(tmp_path / "here" / "videos" / "std.memmap", dtype=np.float32, mode="r+")
    values[-1] += 1
    values.flush()
    with pytest.raises(ValueError, match=r"data\.train\.0"):
        check(recipe, state)


def test_other_encoders_are_named(saved):
    recipe, state = saved
    state.metadata["depends_on"]["data.train.1"]["encoders"] = {"toy": "tensors ab12"}
    with pytest.raises(ValueError, match=r"8 rows, content \w{12}, toy encoder tensors ab12\n.*, toy encoder 0$"):
        check(recipe, state)


def test_random_inputs_and_code_are_those_of_the_checkpoint(saved, monkeypatch, tmp_path):
    recipe, state = saved
    monkeypatch.setattr(resume, "NOISE_VERSION", 99)
    with pytest.raises(ValueError, match=r"- random inputs of a seed: version \d+\n  \+ .*: version 99$"):
        check(recipe, state)
    monkeypatch.undo()
    copied = tmp_path / "package" / "training"
    shutil.copytree(Path(resume.__file__).parents[1], copied.parent)
    monkeypatch.setattr(resume, "__file__", str(copied / "resume.py"))
    with open(copied.parent / "training" / "step.py", "a") as file:
        file.write("\n# a comment\n")
    assert check(recipe, state) == []
    with open(copied.parent / "data" / "sampler.py", "a") as file:
        file.write("SWAPPED = True\n")
    with pytest.raises(ValueError, match=r"- code of the numbers: \w{12}\n  \+ code of the numbers: \w{12}$"):
        check(recipe, state)
    assert all((Path(__file__).parents[1] / "mmaudio_hf" / name).is_file() for name in resume.CODE)


def test_what_changes_rounding_alone_is_logged(saved):
    recipe, state = saved
    state.metadata["depends_on"]["rounding"]["torch"] = "2.0.0"
    [logged] = check(recipe, state)
    assert "- rounding: torch 2.0.0, numpy" in logged


def test_a_state_of_an_earlier_version_knows_some_contents_and_other_noise(saved, tmp_path):
    recipe, state = saved
    contents = [state.metadata["depends_on"][f"data.train.{i}"]["content"] for i in (0, 1)]
    early = TrainingState(4, {}, {"recipe": to_dict(recipe), "stores": contents})
    with pytest.raises(ValueError, match=r"allow-changes\n  - random inputs of a seed: version 1\n  \+ .*version 2$"):
        check(with_stores(recipe, tmp_path / "there"), early)
    replace_store(tmp_path / "here" / "audios", 8, video=False, seed=5)
    early.metadata["stores"][0] = None  # it had no manifest
    with pytest.raises(ValueError, match=r"- data\.train\.1 .*: content \w{12}\n  \+ .*: 8 rows, content"):
        check(recipe, early)
    with pytest.raises(ValueError, match=r"\+ data\.train: "):  # so it may not move
        check(with_stores(recipe, tmp_path / "there"), early)


# --- the lock --------------------------------------------------------------------------------------------------------


def test_two_launches_do_not_train_one_run(finished_run, monkeypatch, capsys):
    recipe = write_recipe(finished_run.parent, "locked", steps=100_000, log_every=1, checkpoint_every=100_000)
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setattr(resume, "LOCK_TIMEOUT", 0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    staged, log = run_dir(recipe) / "hub" / "step_1_1", run_dir(recipe) / "metrics.jsonl"
    with start(recipe) as first:
        wait_until(lambda: log.exists() and "train/loss" in log.read_text(), first)
        before = log.read_bytes()
        staged.mkdir(parents=True)  # as a launch that pushes has it
        for words in ([], ["hub.repo_id=me/locked"], ["resume=hub://me/other"]):
            assert main(["train", str(recipe), *words]) == 2
            assert "locked is being trained by another launch" in capsys.readouterr().err
        assert staged.exists()
        wait_until(lambda: log.stat().st_size > len(before), first)  # it was not disturbed
        assert log.read_bytes().startswith(before)
    assert main(["train", str(recipe), "training.steps=1"]) == 0  # the system releases the lock of a killed process
    shutil.rmtree(run_dir(recipe) / "ema", ignore_errors=True)
    (run_dir(recipe) / "ema").write_text("")
    assert main(["train", str(recipe), "training.steps=2"]) == 2
    assert "ema is a file, and the run needs a folder there" in capsys.readouterr().err
