"""Checkpoints that processes share out: what any number of them wrote is read whole, or refused by name."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from sharded import begin, finish, local_tensors, save_sharded

from mmaudio_hf.training import checkpoint as shards
from mmaudio_hf.training import distributed as parallel
from mmaudio_hf.training.checkpoint import (
    RankShards,
    TrainingState,
    begin_sharded,
    latest_training_state,
    load_training_state,
    save_checkpoint,
    save_local_shards,
    wait_for_shards,
)

FACTS = {"ema_step": 3, "recipe": {"name": "run"}}


def tensors(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Groups as a run has them: with first dimensions that divide, that do not, and of fewer rows than processes."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"even": (6, 2), "uneven": (5, 3), "chunks": (4,), "row": (1, 3), "kernel": (3, 2, 2)}
    model = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    optimizer = {f"exp_avg.{name}": torch.randn(value.shape, generator=draw) for name, value in model.items()}
    return {
        "model": model | {"buffer": torch.randn(2, generator=draw), "half": torch.randn(7, generator=draw).bfloat16()},
        "optimizer": optimizer | {f"step.{name}": torch.tensor(4.0) for name in model},
        "ema": {
            f"{i}.{name}": torch.randn(value.shape, generator=draw) for i in (0, 1) for name, value in model.items()
        },
        "window": {"sums": torch.randn(7, generator=draw)},
    }


def cut(groups: dict) -> dict[str, list[str]]:
    """Names that are shared out: all but a buffer, counters and the sums of the log window."""
    whole = ("buffer", "step.", "sums")
    return {g: [n for n in found if not n.startswith(whole)] for g, found in groups.items() if g != "window"}


def write_network(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def save(run: Path, step: int, count: int) -> Path:
    """A checkpoint by so many processes; 0: whole."""
    state = TrainingState(step, tensors(step), FACTS)
    if count:
        return save_sharded(run, state, cut(state.tensors), count, write_network)
    return save_checkpoint(run, state, write_network)


def assert_holds(state: TrainingState, step: int) -> None:
    expected = tensors(step)
    assert (state.step, dict(state.metadata)) == (step, FACTS) and state.tensors.keys() == expected.keys()
    for group, values in expected.items():
        assert set(state.tensors[group]) == set(values) and len(state.tensors[group]) == len(values)
        for name, value in values.items():
            found = state.tensors[group][name]
            assert found.dtype == value.dtype and torch.equal(found, value), (group, name)
        assert "other" not in state.tensors[group] and state.tensors[group].get("other") is None


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_the_same_tensors_are_read_of_any_number_of_processes(tmp_path, count):
    folder = save(tmp_path, 4, count)
    state = load_training_state(folder)
    assert_holds(state, 4)
    record = json.loads((folder / "training_state" / "state.json").read_text())
    assert record["version"] == (2 if count else 1) and ("shards" in record) == bool(count)
    found = {path.name for path in (folder / "training_state").iterdir()}
    assert found == {*record["sha256"], "state.json"} and len(found) == 5 + 3 * count
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_4"]
    # What was read is nobody's view of a file, which may be removed.
    value = state.tensors["model"]["uneven"].zero_()
    assert not torch.equal(value, state.tensors["model"]["uneven"])
    shutil.rmtree(folder)
    assert torch.equal(state.tensors["ema"]["1.uneven"], tensors(4)["ema"]["1.uneven"])


# --- damage --------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("damage", [Path.unlink, flip, truncate], ids=["missing", "flipped", "truncated"])
@pytest.mark.parametrize("file", ["optimizer.rank_2_of_3", "model.rank_0_of_3", "window"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(tmp_path, damage, file):
    save(tmp_path, 4, 2), save(tmp_path, 8, 3)
    path = tmp_path / "checkpoints" / "step_8" / "training_state" / f"{file}.safetensors"
    damage(path)
    said = []
    assert_holds(latest_training_state(tmp_path, said.append), 4)
    assert said == [f"{path} is missing or damaged (its checksum differs): resume from another checkpoint"]
    # Of several processes each verifies some of the files, and all go back when one of them finds damage.
    found = [problem_of(path.parents[1], (rank, 3)) for rank in range(3)]
    assert {problem for problem in found if problem} and all(str(path) in problem for problem in found if problem)
    assert damage is not flip or sum(problem is not None for problem in found) == 1
    first = next(problem for problem in found if problem)
    for rank in range(3):
        told = iter([first, None])
        assert_holds(
            latest_training_state(tmp_path, said.append, None, (rank, 3), lambda own, told=told: next(told)), 4
        )
    assert said[1:] == [first] * 3


def problem_of(folder: Path, share: tuple[int, int]) -> str | None:
    try:
        load_training_state(folder, share)
    except ValueError as error:
        return str(error)
    return None


def test_what_state_json_says_must_fit(tmp_path):
    record_path = save(tmp_path, 4, 2) / "training_state" / "state.json"
    record = json.loads(record_path.read_text())
    shapes = record["shards"]["shapes"]
    for change, message in (
        ({"version": 3}, "has version 3, this program reads 1 and 2"),
        ({"shards": None}, "state.json cannot be read"),
        ({"shards": {"count": 2, "shapes": {"model": {"uneven": 5}}}}, "state.json cannot be read"),
        ({"shards": {"count": 10**15, "shapes": shapes}}, "state.json cannot be read .*cannot have written 10 files"),
        ({"sha256": ["model.safetensors"]}, "state.json cannot be read"),
        ({"shards": {"count": 3, "shapes": shapes}}, "model.rank_0_of_3.safetensors is missing or damaged"),
        ({"shards": {"count": 2, "shapes": shapes | {"model": {"uneven": []}}}}, "of uneven do not make"),
        ({"shards": {"count": 2, "shapes": shapes | {"model": {"uneven": [6, 3]}}}}, "of uneven do not make"),
        ({"shards": {"count": 2, "shapes": shapes | {"model": {"strange": [6, 3]}}}}, "lacks a shard of strange"),
    ):
        record_path.write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=message):
            load_training_state(record_path.parents[1])


# --- processes that wait for each other ----------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path) -> tuple[Path, TrainingState, list[RankShards]]:
    """A run with a good checkpoint of step 4, and the parts of three processes of the one of step 8."""
    save(tmp_path, 4, 3)
    state = TrainingState(8, tensors(8), FACTS)
    return tmp_path, state, begin(tmp_path, state, cut(state.tensors), 3)


def assert_step_4_is_kept(run: Path, error: OSError, reason: str) -> None:
    assert str(error) == f"{run}/checkpoints/step_8 could not be written ({reason}); the last good one is step_4"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_4"]
    assert (run / "last").resolve().name == "step_4"
    assert_holds(latest_training_state(run, pytest.fail), 4)


def test_the_first_process_waits_for_the_others(begun):
    run, state, (first, *others) = begun
    thread = threading.Thread(target=finish, args=(run, state, first, write_network))
    thread.start()
    for part in others:
        time.sleep(0.2)
        assert thread.is_alive() and not (run / "checkpoints" / "step_8").exists()
        save_local_shards(part, local_tensors(state, part))
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert_holds(latest_training_state(run, pytest.fail), 8)


def test_one_that_fails_leaves_its_reason_and_no_file(begun, monkeypatch):
    run, state, (first, second, third) = begun
    save_local_shards(third, local_tensors(state, third))
    monkeypatch.setattr(shards, "fsync_path", lambda path: full(path.name == "ema.rank_1_of_3.safetensors"))
    save_local_shards(second, local_tensors(state, second))
    assert not list(first.folder.glob("*.rank_1_of_3.*"))
    monkeypatch.undo()
    with pytest.raises(OSError, match="step_8") as caught:
        finish(run, state, first, write_network)
    assert_step_4_is_kept(run, caught.value, "process 1 failed: [Errno 28] No space left on device")
    # The others, if they are late, find nothing to write to and need not say so.
    save_local_shards(third, local_tensors(state, third))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_4"]


def full(is_full: bool) -> None:
    if is_full:
        raise OSError(28, "No space left on device")


def test_a_fault_of_the_program_is_told_and_raised(begun):
    _, state, (first, second, third) = begun
    save_local_shards(third, local_tensors(state, third))
    with pytest.raises(KeyError):
        save_local_shards(second, {})
    with pytest.raises(OSError, match="process 1 failed: 'model'"):
        wait_for_shards(first)


def test_one_that_says_nothing_is_given_up(begun, monkeypatch):
    run, state, (first, second, _) = begun
    save_local_shards(second, local_tensors(state, second))
    monkeypatch.setattr(shards, "WAIT_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(OSError, match="step_8") as caught:
        finish(run, state, first, write_network)
    assert 0.3 < time.monotonic() - began < 20
    assert_step_4_is_kept(run, caught.value, "process 2 has not written its shards in 0.3 s")


def test_what_an_earlier_attempt_left_does_not_count(begun, monkeypatch):
    run, state, (_, *others) = begun
    for part in others:
        save_local_shards(part, local_tensors(state, part))  # and the first process is killed
    (run / "checkpoints" / "step_80.0.partial").mkdir()
    (run / "checkpoints" / "step_8.partial").mkdir()
    first, *_ = begin(run, state, cut(state.tensors), 3)
    assert first.folder != others[0].folder and not others[0].folder.exists() and not list(first.folder.iterdir())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step_4", "step_80.0.partial", first.folder.parent.name,
    }  # fmt: skip
    monkeypatch.setattr(shards, "WAIT_SECONDS", 0.0)
    with pytest.raises(OSError, match="process 1 has not written"):
        finish(run, state, first, write_network)


def test_a_folder_that_cannot_be_made_or_seen_is_a_reason_for_all(tmp_path, monkeypatch):
    PartialState(cpu=True)
    assert parallel.make_shared_folder(lambda: begin_sharded(tmp_path, 4))[0].is_dir()
    (tmp_path / "run").write_text("")
    folder, problem = parallel.make_shared_folder(lambda: begin_sharded(tmp_path / "run", 4))
    assert folder is None and "Not a directory" in problem
    monkeypatch.setattr(parallel, "SHARED_SECONDS", 0.1)
    assert parallel.make_shared_folder(lambda: tmp_path / "no") == (None, f"process 0 does not see {tmp_path / 'no'}")
