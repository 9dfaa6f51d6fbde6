"""Runs that are killed, interrupted, short of disk space and poisoned still end as an undisturbed one."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forked import Command
from safetensors.torch import load_file
from toy_stores import MODEL, recipe_tree
from training_runs import (
    ROOT,
    SCRIPTS,
    assert_close,
    command,
    environment,
    metrics,
    run_dir,
    same_bytes,
    start,
    tensors,
    train,
)

from mmaudio_hf.bench.training import checkpoint as bench_checkpoint
from mmaudio_hf.cli import main
from mmaudio_hf.config import TrainingConfig, model_config
from mmaudio_hf.models.pretrained import find_pretrained
from mmaudio_hf.training.actions import BestScore, check_metrics
from mmaudio_hf.training.checkpoint import TENSOR_FILES, TrainingState, latest_training_state, save_checkpoint
from mmaudio_hf.training.resume import drop_later

STEPS, EVERY = 40, 4
POISONED = "videos_0000"
SIZES = {"hidden_dim": 16, "num_heads": 1, "depth": 2, "fused_depth": 1, "duration": 1.0}


def small_recipe(folder: Path, name: str) -> Path:
    """A tiny network; one row of its videos has values that overflow, so about every tenth step is refused."""
    tree = recipe_tree(folder, steps=STEPS, checkpoint_every=EVERY, log_every=1, validate_every=6) | {"name": name}
    tree["model"] = MODEL | SIZES
    tree["training"] |= {"keep_checkpoints": 2, "keep_every": 16, "best_metric": "val_ema/loss"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    means = np.memmap(folder / "videos" / "mean.memmap", dtype=np.float32, mode="r+")
    means[: means.size // 24] = 1e30
    means.flush()
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    recipe = small_recipe(tmp_path_factory.mktemp("checkpoints"), "undisturbed")
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    return recipe


def lines(recipe: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir(recipe) / name).read_text().splitlines()]


def same_run(a: Path, b: Path) -> None:
    same_bytes(a, b)
    assert (run_dir(a) / "skipped.jsonl").read_bytes() == (run_dir(b) / "skipped.jsonl").read_bytes()
    assert (run_dir(a) / "best").resolve().name == (run_dir(b) / "best").resolve().name
    folders = [sorted(p.name for p in (run_dir(r) / "checkpoints").iterdir()) for r in (a, b)]
    assert folders[0] == folders[1]


# --- which checkpoints stay ----------------------------------------------------------------------------------------


def test_the_newest_the_kept_and_the_best_stay(undisturbed):
    scores = {line["step"]: line["val_ema/loss"] for line in metrics(undisturbed) if "val_ema/loss" in line}
    best = min(scores, key=scores.get)
    assert (run_dir(undisturbed) / "best").resolve().name == f"step_{best}"
    names = {path.name for path in (run_dir(undisturbed) / "checkpoints").iterdir()}
    # A best one is saved when it is found, and between two of the rhythm where it is found there.
    saved = sorted({*range(EVERY, STEPS + 1, EVERY), best})
    assert names == {f"step_{step}" for step in (*saved[-2:], 16, 32, best)}
    published = find_pretrained(run_dir(undisturbed) / "best")
    assert json.loads((published / "weights.json").read_text())["step"] == best
    stalls = [line["speed/checkpoint_stall_seconds"] for line in lines(undisturbed, "speed.jsonl")]
    assert all(stalls[step - 1] > 0 for step in range(EVERY, STEPS + 1, EVERY))
    assert stalls[0] == stalls[1] == 0


def test_best_score_follows_its_metric():
    best = BestScore(TrainingConfig(best_metric="onsets/f1", best_mode="max"), ["val", "onsets"])
    assert [best.update({"onsets/f1": value}, i) for i, value in enumerate([0.1, 0.3, math.nan, 0.2, 0.4])] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert best.record == {"metric": "onsets/f1", "value": 0.4, "step": 4}
    with pytest.raises(ValueError, match="begins with val/ or onsets/"):
        BestScore(TrainingConfig(best_metric="loss"), ["val", "onsets"])
    with pytest.raises(ValueError, match="use one of val/loss"):
        check_metrics(TrainingConfig(best_metric="val_ema/lossy"), {"val/loss": 1.0})


def test_averages_of_other_widths_are_made_afterwards(undisturbed, tmp_path, capsys):
    averages, out = tensors(undisturbed, "ema"), tmp_path / "wide"
    assert main(["ema", str(run_dir(undisturbed)), "--sigma-rel", "0.1", "--out", str(out)]) == 0
    assert f"as of step {STEPS}" in capsys.readouterr().out
    made = load_file(find_pretrained(out) / "model.safetensors")
    for name in ("final_layer.conv.weight", "latent_mean"):
        torch.testing.assert_close(made[name], averages[f"1.{name}"], rtol=1e-4, atol=1e-6)
    assert json.loads((out / "pretrained_model" / "weights.json").read_text())["sigma_rel"] == 0.1
    # As of an earlier step it is near what the run held then.
    assert main(["ema", str(run_dir(undisturbed)), "--sigma-rel", "0.1", "--step", "32", "--out", f"{out}_32"]) == 0
    then = run_dir(undisturbed) / "checkpoints" / "step_32" / "training_state" / "ema.safetensors"
    made = load_file(find_pretrained(f"{out}_32") / "model.safetensors")["final_layer.conv.weight"]
    torch.testing.assert_close(made, load_file(then)["1.final_layer.conv.weight"], rtol=1e-4, atol=1e-6)
    for arguments, message in (
        (["--sigma-rel", "0.3"], "between 0 and 0.28"),
        (["--sigma-rel", "0.1", "--step", "41"], "EMA weights of the steps 1 to 40, not of 41"),
    ):
        assert main(["ema", str(run_dir(undisturbed)), *arguments, "--out", f"{out}_no"]) == 2
        assert message in capsys.readouterr().err
    assert main(["ema", str(run_dir(undisturbed)), "--sigma-rel", "0.1", "--out", str(out)]) == 2


# --- killed, interrupted, full -------------------------------------------------------------------------------------


def kill_moments(seed: int) -> list[tuple[str, int, float]]:
    """Five moments of a run: awaited (a logged step, or a checkpoint being written after it), and a delay in s."""
    choose = random.Random(seed)
    steps = sorted(choose.sample(range(1, STEPS - EVERY), 4))
    kinds = ["step", "writing", "step", "writing"]
    return [("step", 0, 0.0), *((kind, step, choose.uniform(0, 0.05)) for kind, step in zip(kinds, steps, strict=True))]


def has_come(folder: Path, kind: str, step: int) -> bool:
    log = folder / "metrics.jsonl"
    if not log.exists() or log.read_bytes().count(b'"train/loss"') < step:
        return False
    return kind == "step" or any((folder / "checkpoints").glob("step_*.partial"))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(undisturbed, seed):
    """SIGKILL at five random moments, some of them while a checkpoint is being written."""
    recipe = small_recipe(undisturbed.parent, f"killed_{seed}")
    while_writing = 0
    for kind, step, delay in kill_moments(seed):
        with start(recipe) as process:
            while not has_come(run_dir(recipe), kind, step):
                assert process.poll() is None, "the run ended before it could be killed"
                time.sleep(0.002)
            time.sleep(delay if kind == "step" else 0)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        while_writing += any((run_dir(recipe) / "checkpoints").glob("step_*.partial"))
    assert while_writing
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    same_run(recipe, undisturbed)


class Killed(BaseException):
    """The end of a process: nothing that looks after errors takes it for one."""


def test_one_of_the_two_is_there_whenever_a_second_save_of_a_step_is_killed(tmp_path, monkeypatch):
    """Before or after each thing that is done to a folder, from the first save to the clearing at the next start."""
    left = 0  # things that are still done before the kill

    def fatal(real, after):
        def deadly(*args, **kwargs):
            nonlocal left
            left -= 1
            if left >= 0 or (after and left == -1):
                real(*args, **kwargs)
            if left < 0:
                raise Killed
            return Path(args[-1])

        return deadly

    def write(step, value):
        tensors = {name: {"t": torch.full((4,), value)} for name in TENSOR_FILES}
        save_checkpoint(run, TrainingState(step, tensors, {}), lambda folder: None)

    found = set()
    for after in (False, True):
        for moment in range(20):
            run, killed = tmp_path / f"{after}_{moment}", False
            left = math.inf
            write(4, 1.0)
            with monkeypatch.context() as patch:
                for owner, name in ((Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
                    patch.setattr(owner, name, fatal(getattr(owner, name), after))
                left = moment
                try:
                    write(4, 2.0)
                    drop_later(run, 4, 0, None)
                except Killed:
                    killed = True
            found.add(latest_training_state(run, pytest.fail).tensors["model"]["t"][0].item())
            drop_later(run, 4, 0, None)
            assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_4"]
            assert (run / "last" / "training_state" / "state.json").is_file()
            if not killed:
                break
        assert not killed and moment > 4
    assert found == {1.0, 2.0}


LATE = """
import os, sys, time
from pathlib import Path
from mmaudio_hf.cli import train_main
from mmaudio_hf.training import checkpointer

exists, glob, find, rank = Path.exists, Path.glob, checkpointer.find_snapshots, os.environ["RANK"]

def seen(path):  # by a second machine, whose file system remembers for a while what was in a folder
    return rank == "0" or path.parent.name != "ema" or time.time() - path.stat().st_mtime > 2

Path.exists = lambda path: exists(path) and seen(path)
Path.glob = lambda path, pattern: (found for found in glob(path, pattern) if seen(found))

def counted(folder):
    print(f"process {rank} has {len(snapshots := find(folder))} snapshots")
    return snapshots

checkpointer.find_snapshots = counted
sys.exit(train_main())
"""


def test_the_last_snapshots_are_awaited_where_they_are_seen_later(tmp_path):
    recipe, program = small_recipe(tmp_path, "late"), tmp_path / "program.py"
    program.write_text(LATE)
    words = [str(SCRIPTS / "accelerate"), "launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]
    words += ["--num_processes", "2", "--main_process_port", "0", str(program), str(recipe), "training.steps=2"]
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*words, "ema.sigma_rel=0.07", "training.best_metric=val/loss"], env=variables, cwd=recipe.parent,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert all(f"process {rank} has 2 snapshots" in result.stdout for rank in (0, 1)), result.stdout


def test_ctrl_c_under_a_launcher_and_other_processes_afterwards(undisturbed):
    """Two processes are interrupted as a terminal does it; four finish the run: same data, same noise, same model."""
    recipe = small_recipe(undisturbed.parent, "elastic")
    process = subprocess.Popen(
        command(recipe, processes=2), env=environment(), cwd=recipe.parent, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not has_come(run_dir(recipe), "step", 14):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "SIGINT: saving a checkpoint after this step" in output and "goes on from there" in output, output
    step = int((run_dir(recipe) / "last").resolve().name.removeprefix("step_"))
    assert step >= 14 and not list((run_dir(recipe) / "checkpoints").glob("*.partial"))
    result = train(recipe, processes=4)
    assert result.returncode == 0, result.stderr
    assert "4 processes on cpu, batch 4 = 4 x 1 x 1, precision no" in result.stdout
    assert f"from step {step} to {STEPS}" in result.stdout
    assert_close(recipe, undisturbed, 1e-5)
    for ours, theirs in zip(metrics(recipe), metrics(undisturbed), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    ids = [[(line["step"], set(line["ids"])) for line in lines(r, "skipped.jsonl")] for r in (recipe, undisturbed)]
    assert ids[0] == ids[1]
    figures = json.loads((run_dir(recipe) / "autopsy" / f"step_{ids[0][-1][0]}.json").read_text())
    assert figures["suspects"] == [POISONED] and [sample["slot"] for sample in figures["samples"]] == [0, 1, 2, 3]


FULL_DISK = """
set -e
mount -t tmpfs -o size=$SIZE tmpfs $DISK
head -c $BALLAST /dev/zero > $DISK/ballast
set +e
$TRAIN > $LOGS/full.txt 2>&1
echo $? > $LOGS/full.code
readlink $DISK/full_disk/last > $LOGS/last
ls $DISK/full_disk/checkpoints > $LOGS/checkpoints
$TRAIN > $LOGS/freed.txt 2>&1 &
training=$!
until grep -q "could not be written" $LOGS/freed.txt || ! kill -0 $training; do sleep 0.02; done
rm $DISK/ballast
wait $training
echo $? > $LOGS/freed.code
cp -a $DISK/full_disk $KEPT
"""


def test_a_full_disk_costs_checkpoints_and_nothing_else(undisturbed, tmp_path):
    """In a file system of its own: room for one checkpoint, none at all for the last one, then room again."""
    recipe = small_recipe(undisturbed.parent, "full_disk")
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system does not let a test mount a small disk (unshare -rm)")
    disk, logs = tmp_path / "disk", tmp_path / "logs"
    disk.mkdir(), logs.mkdir()
    first = run_dir(undisturbed) / "checkpoints" / "step_16"
    checkpoint = sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    snapshots = sum(path.stat().st_size for path in (run_dir(undisturbed) / "ema").glob("*_step_000000016.*"))
    count = len(list((run_dir(undisturbed) / "ema").iterdir())) // 2
    room = 5 * checkpoint + count * snapshots  # for everything that stays, and one that is being written
    train = [*command(recipe, processes=0), f"output_dir={disk}"]
    variables = {
        "SIZE": str(room + (1 << 20)),
        "BALLAST": str(room - int(1.5 * checkpoint) - snapshots),
        "DISK": str(disk),
        "LOGS": str(logs),
        "KEPT": str(run_dir(recipe)),
        "TRAIN": " ".join(train),
    }
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", FULL_DISK], env=environment() | variables, cwd=recipe.parent,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = {path.stem: path.read_text() for path in logs.glob("*.txt")}
    assert done.returncode == 0, (done.stderr, said)
    assert (logs / "full.code").read_text() == "1\n", said["full"]
    assert said["full"].count("could not be written") > 2 and "step_4; training continues" in said["full"], said["full"]
    assert "error:" in said["full"] and "free disk space and start again" in said["full"].splitlines()[-1]
    assert (logs / "last").read_text() == "checkpoints/step_4\n" and (logs / "checkpoints").read_text() == "step_4\n"
    assert (logs / "freed.code").read_text() == "0\n", said["freed"]
    assert f"from step 4 to {STEPS}" in said["freed"] and "could not be written" in said["freed"]
    same_bytes(recipe, undisturbed)


# --- a step that is not finite -------------------------------------------------------------------------------------


def test_a_refused_step_is_explained_and_can_be_replayed(undisturbed):
    skipped = lines(undisturbed, "skipped.jsonl")
    assert len(skipped) >= 3 and all(POISONED in line["ids"] for line in skipped)
    assert all(math.isfinite(value) for line in metrics(undisturbed) for value in line.values())
    step = next(line["step"] for line in skipped if line["step"] >= 32 and line["step"] % EVERY)
    autopsy = json.loads((run_dir(undisturbed) / "autopsy" / f"step_{step}.json").read_text())
    assert autopsy["suspects"] == [POISONED] and autopsy["loss"] == "nan" and autopsy["nonfinite_parameters"] == []
    assert autopsy["gradient_norms"]["final_layer"] == "nan" and "sync_pos_emb" in autopsy["nonfinite_gradients"]
    sample = next(s for s in autopsy["samples"] if s["id"] == POISONED)
    assert sample["features"]["mean"]["max"] == pytest.approx(1e30) and sample["features"]["mean"]["nonfinite"] == 0
    before = (run_dir(undisturbed) / "skipped.jsonl").stat().st_mtime_ns
    result = Command("replay-step", str(run_dir(undisturbed)), str(step), "--json", "--advance").result()
    assert result.returncode == 0, result.stderr
    again = json.loads(result.stdout)
    assert f"to {step}" in result.stderr and "training from step " in result.stderr
    assert again.pop("weights_of_step") == step
    assert again == autopsy  # the same weights, data and noise: the same figures, to the last bit
    assert (run_dir(undisturbed) / "skipped.jsonl").stat().st_mtime_ns == before


def test_bench_measures_checkpoints(tmp_path):
    fields = MODEL | SIZES
    figures = bench_checkpoint(model_config(fields, "test"), rounds=1, folder=tmp_path)
    assert 0 < figures["checkpoint_stall_seconds"] < figures["checkpoint_write_seconds"]
    assert figures["checkpoint_gb"] > 0.005 and not list(tmp_path.iterdir())
