"""Which checkpoints are kept, EMA weights made afterwards, full disks, and the copies that the thread writes."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from forked import Command, resize_disk, run_together, wait_until
from safetensors.torch import load_file
from toy_stores import MODEL
from training_runs import (
    EVERY,
    STEPS,
    TINY,
    checkpoint_names,
    copy_run,
    environment,
    gated_program,
    lines,
    metrics,
    poisoned_recipe,
    run_dir,
    same_bytes,
    tensors,
    train,
)

from mmaudio_hf import MMAudio
from mmaudio_hf.bench.training import checkpoint as bench_checkpoint
from mmaudio_hf.cli import main
from mmaudio_hf.config import model_config
from mmaudio_hf.models.pretrained import find_pretrained
from mmaudio_hf.training import checkpointer
from mmaudio_hf.training.checkpointer import BackgroundWriter, HostCopy


def test_the_newest_every_16th_and_the_best_checkpoint_are_kept(poisoned_run):
    scores = {line["step"]: line["val_ema/loss"] for line in metrics(poisoned_run) if "val_ema/loss" in line}
    best = min(scores, key=scores.get)
    assert (run_dir(poisoned_run) / "best").resolve().name == f"step_{best}"
    # A new best is saved when it is found, also at a step that checkpoint_every does not divide.
    saved = sorted({*range(EVERY, STEPS + 1, EVERY), best})
    assert checkpoint_names(poisoned_run) == {f"step_{step}" for step in (*saved[-2:], 16, 32, best)}
    published = find_pretrained(run_dir(poisoned_run) / "best")
    assert json.loads((published / "weights.json").read_text())["step"] == best


def test_the_stall_of_a_checkpoint_is_logged(poisoned_run):
    stalls = [line["speed/checkpoint_stall_seconds"] for line in lines(poisoned_run, "speed.jsonl")]
    assert all(stalls[step - 1] > 0 for step in range(EVERY, STEPS + 1, EVERY))
    assert stalls[0] == stalls[1] == 0


# --- EMA weights of other widths ---------------------------------------------------------------------------------


def make_ema(run: Path, out: Path, *options: str, sigma_rel: str = "0.1") -> int:
    return main(["ema", str(run), "--sigma-rel", sigma_rel, "--out", str(out), *options])


def test_ema_weights_of_a_stored_width_are_those_of_the_run(poisoned_run, tmp_path, capsys):
    out = tmp_path / "wide"
    assert make_ema(run_dir(poisoned_run), out) == 0
    assert f"step {STEPS}" in capsys.readouterr().out
    published, stored = load_file(find_pretrained(out) / "model.safetensors"), tensors(poisoned_run, "ema")
    for name in ("final_layer.conv.weight", "latent_mean"):
        torch.testing.assert_close(published[name], stored[f"1.{name}"], rtol=1e-4, atol=1e-6)
    assert json.loads((out / "pretrained_model" / "weights.json").read_text())["sigma_rel"] == 0.1
    assert make_ema(run_dir(poisoned_run), out) == 2  # the folder exists


def test_ema_weights_of_an_earlier_step_are_near_those_that_the_run_had(poisoned_run, tmp_path):
    name, out = "final_layer.conv.weight", tmp_path / "early"
    assert make_ema(run_dir(poisoned_run), out, "--step", "32") == 0
    stored = run_dir(poisoned_run) / "checkpoints" / "step_32" / "training_state" / "ema.safetensors"
    published = load_file(find_pretrained(out) / "model.safetensors")[name]
    torch.testing.assert_close(published, load_file(stored)[f"1.{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("sigma_rel", "options", "message"),
    [
        ("0.3", [], "between 0 and 0.28"),
        ("0.1", ["--step", "41"], "EMA weights of the steps 1 to 40, not of 41"),
    ],
)
def test_ema_weights_that_do_not_exist(poisoned_run, tmp_path, capsys, sigma_rel, options, message):
    assert make_ema(run_dir(poisoned_run), tmp_path / "none", *options, sigma_rel=sigma_rel) == 2
    assert message in capsys.readouterr().err


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: {"truncated": len(content) // 2, "flipped": None, "empty": 0}[how]])


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_snapshot_is_named_and_left_out(poisoned_run, tmp_path, how):
    """By the commands, and by a run, which sets it aside and continues."""
    recipe = copy_run(poisoned_run, poisoned_recipe(poisoned_run.parent, f"damaged_{how}"))
    name = "sigma_0.05_step_000000008.safetensors"
    damaged = run_dir(recipe) / "ema" / name
    damage(damaged, how)
    for words in (["ema", "--sigma-rel", "0.07", "--out", "wide"], ["export", "--out", "reference"]):
        result = Command(words[0], str(run_dir(recipe)), *words[1:], cwd=tmp_path).result()
        assert result.returncode == 0 and damaged.exists(), result.stderr
        output = result.stdout + result.stderr
        assert output.count(f"warning: {damaged} is ") == 1, output
    assert not (tmp_path / "reference" / "ema" / "0.8.pt").exists()
    assert (tmp_path / "reference" / "ema" / "1.8.pt").exists()
    result = train(recipe, f"training.steps={STEPS + 1}", "ema.sigma_rel=0.07")
    assert result.returncode == 0 and f"it is moved to {damaged}.damaged" in result.stderr, result.stderr
    assert not damaged.exists()
    weights = json.loads((run_dir(recipe) / "last" / "pretrained_model" / "weights.json").read_text())
    assert weights == {"weights": "ema", "sigma_rel": 0.07, "step": STEPS + 1}


def train_without_snapshots(recipe: Path, steps: int) -> int:
    """Runs in a process of its own, where no EMA snapshot can be written."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    checkpointer.save_snapshots = fail
    return main(["train", str(recipe), f"training.steps={steps}"])


def test_a_run_does_not_end_without_its_last_snapshot(poisoned_run):
    """The published weights are made of all of them."""
    recipe = copy_run(poisoned_run, poisoned_recipe(poisoned_run.parent, "no_last_snapshot"))
    words = (train_without_snapshots, recipe, STEPS + 1)
    result = Command(*words, cwd=recipe.parent, env=environment()).result()
    assert result.returncode == 1 and "start again; the run resumes" in result.stderr, result.stderr
    assert "No space left on device" in result.stderr
    assert (run_dir(recipe) / "last").resolve().name == f"step_{STEPS}"


def test_a_changed_byte_of_published_weights_is_named(poisoned_run, capsys, tmp_path):
    recipe = copy_run(poisoned_run, poisoned_recipe(poisoned_run.parent, "changed_weights"))
    weights = run_dir(recipe) / "last" / "pretrained_model" / "model.safetensors"
    damage(weights, "flipped")
    with pytest.raises(ValueError, match=f"{re.escape(str(weights.resolve()))} is damaged.*its checksum differs"):
        MMAudio.from_pretrained(weights.resolve().parent)
    run = str(run_dir(recipe))
    for words in (["push", run, "me/run", "--dry-run"], ["export", run, "--out", str(tmp_path / "reference")]):
        assert main(words) == 2
        assert "model.safetensors is damaged" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*_ema_final.pth"))


LATE = """
import os, sys, time
from pathlib import Path
from mmaudio_hf.cli import train_main
from mmaudio_hf.training import checkpointer

exists, glob, find, rank = Path.exists, Path.glob, checkpointer.find_snapshots, os.environ["RANK"]

def visible(path):  # on a second machine, whose file system caches for a while what was in a folder
    return rank == "0" or path.parent.name != "ema" or time.time() - path.stat().st_mtime > 2

def count(*request):
    print(f"process {rank} has {len(snapshots := find(*request))} snapshots")
    return snapshots

Path.exists = lambda path: exists(path) and visible(path)
Path.glob = lambda path, pattern: (match for match in glob(path, pattern) if visible(match))
checkpointer.find_snapshots = count
sys.exit(train_main())
"""


def test_the_last_snapshots_are_awaited_where_they_are_visible_later(tmp_path):
    recipe, program = poisoned_recipe(tmp_path, "late"), tmp_path / "program.py"
    program.write_text(LATE)
    changes = ["training.steps=2", "ema.sigma_rel=0.07", "training.best_metric=val/loss"]
    result = run_together(2, str(program), str(recipe), *changes, cwd=recipe.parent, env=environment())
    assert result.returncode == 0, result.stderr
    assert all(f"process {rank} has 2 snapshots" in result.stdout for rank in (0, 1)), result.stdout


# --- a full disk -------------------------------------------------------------------------------------------------


def run_program(program: list[str], log: Path) -> None:
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 1), os.dup2(1, 2)
    sys.argv = program
    runpy.run_path(program[0], run_name="__main__")


def train_on_a_full_disk(disk: Path, logs: Path, sizes: tuple[int, int], program: list[str], kept: Path) -> None:
    """Runs in a process of its own: no space at all for the last checkpoint, and space again during the next run."""
    resize_disk(disk, sizes[0])
    (disk / "ballast").write_bytes(bytes(sizes[1]))
    full, freed = (
        multiprocessing.get_context("fork").Process(target=run_program, args=(program, logs / f"{name}.txt"))
        for name in ("full", "freed")
    )
    (logs / "freed").touch()
    full.start(), full.join()
    (logs / "freed").unlink()
    run = disk / "full_disk"
    assert os.readlink(run / "last") == "checkpoints/step_4" and os.listdir(run / "checkpoints") == ["step_4"]
    (logs / "freed.txt").touch()
    freed.start()
    warned = lambda: "could not be written" in (logs / "freed.txt").read_text()  # noqa: E731
    wait_until(lambda: warned() or freed.exitcode is not None)
    (disk / "ballast").unlink()
    (logs / "freed").touch()
    freed.join()
    assert (full.exitcode, freed.exitcode) == (1, 0)
    shutil.copytree(run, kept, symlinks=True)


def disk_sizes(recipe: Path) -> tuple[int, int]:
    """Bytes of a disk for the run, and of a file on it that leaves space for one checkpoint only."""
    first = run_dir(recipe) / "checkpoints" / "step_16"
    checkpoint = sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    snapshots = sum(path.stat().st_size for path in (run_dir(recipe) / "ema").glob("*_step_000000016.*"))
    count = len(list((run_dir(recipe) / "ema").iterdir())) // 2
    size = 5 * checkpoint + count * snapshots  # for everything that is kept, and one that is being written
    return size + (1 << 20), size - int(1.5 * checkpoint) - snapshots


def test_a_full_disk_costs_checkpoints_and_nothing_else(poisoned_run, tmp_path):
    """In a file system of its own: space for one checkpoint, none at all for the last one, then space again."""
    recipe = poisoned_recipe(poisoned_run.parent, "full_disk")
    disk, logs = tmp_path / "a disk", tmp_path / "its logs"  # a clone may lie in a folder with spaces
    disk.mkdir(), logs.mkdir()
    gates = {STEPS - 2 * EVERY: logs / "freed"}  # no further before there is space
    program = gated_program(gates, recipe, f"output_dir={disk}")
    words = (train_on_a_full_disk, disk, logs, disk_sizes(poisoned_run), program, run_dir(recipe))
    result = Command(*words, cwd=recipe.parent, env=environment(), own_mounts=True).result()
    full, freed = ((logs / f"{name}.txt").read_text() for name in ("full", "freed"))
    assert result.returncode == 0, (result.stderr, full, freed)
    assert full.count("could not be written") > 2 and "step_4; training continues" in full
    assert "error:" in full and "free disk space and start again" in full.splitlines()[-1]
    assert f"from step 4 to {STEPS}" in freed and "could not be written" in freed
    same_bytes(recipe, poisoned_run)


# --- copies, and the thread --------------------------------------------------------------------------------------


def test_copies_of_any_tensor_are_valid_until_the_next():
    """Every kind of tensor, one copy of what occurs twice, and the same memory each time."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 5, generator=generator)
    group = {
        "matrix": matrix,
        "transposed": torch.randn(4, 3, generator=generator).T,  # its memory has another order
        "half": torch.randn(7, generator=generator).bfloat16(),
        "flags": torch.tensor([True, False]),
        "step": torch.tensor(3),
        "none": torch.empty(0),
        "trained": torch.nn.Parameter(torch.randn(3, generator=generator)),
    }
    host, pointers = HostCopy(), None
    host.reserve({"model": group, "ema": {"same": matrix}})
    for _ in range(2):
        copies, event = host.copy({"model": group, "ema": {"same": matrix}})
        assert event is None and copies["ema"]["same"] is copies["model"]["matrix"]
        expected = {name: tensor.detach().clone() for name, tensor in group.items()}
        with torch.no_grad():
            for tensor in group.values():
                tensor.zero_()
        for name, tensor in expected.items():
            assert torch.equal(copies["model"][name], tensor) and copies["model"][name].dtype == tensor.dtype
        assert pointers in (None, [tensor.data_ptr() for tensor in copies["model"].values()])
        pointers = [tensor.data_ptr() for tensor in copies["model"].values()]
        matrix.add_(1)


def test_the_copy_lies_in_few_full_blocks(monkeypatch):
    """Pinned allocations are rounded up to powers of two: not tensor by tensor, and the blocks are full."""
    monkeypatch.setattr(checkpointer, "BLOCK_BYTES", 1 << 16)
    tensors = {f"{i}": torch.full((1000 + 37 * (i % 11),), float(i)) for i in range(100)}
    tensors |= {"large": torch.ones(1 << 15), "scalar": torch.tensor(3.0), "empty": torch.ones(0, dtype=torch.int64)}
    copies = HostCopy().copy({"model": tensors})[0]["model"]
    assert all(torch.equal(copies[name], tensor) for name, tensor in tensors.items())
    blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in copies.values()}
    sizes = sorted(blocks.values())
    assert sizes[-1] == (1 << 17) and all(0.9 * (1 << 16) < size <= 1 << 16 for size in sizes[1:-1])
    assert sum(1 << (size - 1).bit_length() for size in sizes) < 1.2 * sum(t.nbytes for t in tensors.values())


def test_a_failing_disk_is_a_warning_and_a_bug_is_raised():
    warnings: list[str] = []
    writer = BackgroundWriter(warnings.append)

    def fail(error: Exception):
        def write(groups):
            raise error

        return write

    writer.save({}, fail(OSError("the disk is full")))
    assert writer.finish() == "the disk is full" and warnings == ["the disk is full"]
    writer.save({}, lambda groups: None)
    assert writer.finish() is None
    writer.save({}, fail(KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        writer.wait()


def test_bench_measures_checkpoints(tmp_path):
    figures = bench_checkpoint(model_config(MODEL | TINY, "test"), rounds=1, folder=tmp_path)
    assert figures["checkpoint_stall_seconds"] > 0 and figures["checkpoint_write_seconds"] > 0
    assert figures["checkpoint_gb"] > 0.005 and not list(tmp_path.iterdir())
