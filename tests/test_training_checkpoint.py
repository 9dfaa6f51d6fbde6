"""Files of a checkpoint: full and sharded ones are read alike, damage is named, and a kill leaves one of the two."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from forked import PATIENCE
from sharded import begin, finish, local_tensors, save_sharded

from mmaudio_hf.training import checkpoint
from mmaudio_hf.training.checkpoint import (
    TENSOR_FILES,
    RankShards,
    TrainingState,
    latest_training_state,
    load_training_state,
    point_at,
    save_checkpoint,
    save_local_shards,
    wait_for_shards,
)
from mmaudio_hf.training.resume import drop_later

METADATA = {"ema_step": 3, "recipe": {"name": "run"}}


def tensors(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Groups as a run has them: with first dimensions that divide, that do not, and of fewer rows than processes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"even": (6, 2), "uneven": (5, 3), "chunks": (4,), "row": (1, 3), "kernel": (3, 2, 2)}

    def random(prefix: str) -> dict[str, torch.Tensor]:
        return {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    buffers = {"buffer": torch.randn(2, generator=generator), "half": torch.randn(7, generator=generator).bfloat16()}
    return {
        "model": random("") | buffers,
        "optimizer": random("exp_avg.") | {f"step.{name}": torch.tensor(4.0) for name in shapes},
        "ema": random("0.") | random("1."),
        "window": {"sums": torch.randn(7, generator=generator)},
    }


def sharded_names(groups: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, list[str]]:
    """All but a buffer, counters and running metrics."""
    full = ("buffer", "step.", "sums")
    return {g: [n for n in names if not n.startswith(full)] for g, names in groups.items() if g != "window"}


def write_network(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def save(run: Path, step: int, world_size: int) -> Path:
    """A checkpoint by so many processes; 0: not sharded."""
    state = TrainingState(step, tensors(step), METADATA)
    if world_size:
        return save_sharded(run, state, sharded_names(state.tensors), world_size, write_network)
    return save_checkpoint(run, state, write_network)


def assert_holds(state: TrainingState | None, step: int) -> None:
    expected = tensors(step)
    assert (state.step, dict(state.metadata)) == (step, METADATA) and state.tensors.keys() == expected.keys()
    for group, values in expected.items():
        stored = state.tensors[group]
        assert set(stored) == set(values) and len(stored) == len(values)
        for name, value in values.items():
            assert stored[name].dtype == value.dtype and torch.equal(stored[name], value), (group, name)
        assert "other" not in stored and stored.get("other") is None


@pytest.mark.parametrize("world_size", [0, 1, 2, 3, 7])
def test_the_same_tensors_are_read_of_any_number_of_processes(tmp_path, world_size):
    folder = save(tmp_path, 4, world_size)
    assert_holds(load_training_state(folder), 4)
    record = json.loads((folder / "training_state" / "state.json").read_text())
    assert record["version"] == (2 if world_size else 1) and ("shards" in record) == bool(world_size)
    files = {path.name for path in (folder / "training_state").iterdir()}
    assert files == {*record["sha256"], "state.json"} and len(files) == 5 + 3 * world_size
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_4"]


@pytest.mark.parametrize("world_size", [0, 3])
def test_tensors_are_copies_of_files_that_may_be_removed(tmp_path, world_size):
    folder = save(tmp_path, 4, world_size)
    state = load_training_state(folder)
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


DAMAGES = pytest.mark.parametrize("damage", [Path.unlink, flip, truncate], ids=["missing", "flipped", "truncated"])
FILES = pytest.mark.parametrize("file", ["optimizer.rank_2_of_3", "model.rank_0_of_3", "window"])


@pytest.fixture
def two_checkpoints(tmp_path) -> Path:
    """A run with checkpoints of step 4, by two processes, and step 8, by three."""
    save(tmp_path, 4, 2), save(tmp_path, 8, 3)
    return tmp_path


@DAMAGES
@FILES
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(two_checkpoints, damage, file):
    path = two_checkpoints / "checkpoints" / "step_8" / "training_state" / f"{file}.safetensors"
    damage(path)
    warnings = []
    assert_holds(latest_training_state(two_checkpoints, warnings.append), 4)
    assert warnings == [f"{path} is missing or damaged (its checksum differs): resume from another checkpoint"]


@DAMAGES
@FILES
def test_of_several_processes_each_verifies_a_share_and_all_go_back(two_checkpoints, damage, file):
    folder = two_checkpoints / "checkpoints" / "step_8"
    path = folder / "training_state" / f"{file}.safetensors"
    damage(path)
    problems = [problem_of(folder, (rank, 3)) for rank in range(3)]
    assert all(str(path) in problem for problem in problems if problem)
    assert damage is not flip or sum(problem is not None for problem in problems) == 1
    first = next(problem for problem in problems if problem)
    for rank in range(3):
        warnings, answers = [], iter([first, None])
        state = latest_training_state(two_checkpoints, warnings.append, None, (rank, 3), lambda own, a=answers: next(a))
        assert_holds(state, 4)
        assert warnings == [first]


def problem_of(folder: Path, share: tuple[int, int]) -> str | None:
    try:
        load_training_state(folder, share)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "has version 3, this program reads 1 and 2"),
        ({"shards": None}, "state.json cannot be read"),
        ({"shards": {"count": 2, "shapes": {"model": {"uneven": 5}}}}, "state.json cannot be read"),
        ({"shards": {"count": 10**15, "shapes": ...}}, "state.json cannot be read .*cannot have written 10 files"),
        ({"sha256": ["model.safetensors"]}, "state.json cannot be read"),
        ({"step": "ten"}, "state.json cannot be read .step is 'ten'"),
        ({"facts": [1]}, "state.json cannot be read"),
        ({"facts": {"recipe": {}}}, "state.json cannot be read .'ema_step'"),
        ({"facts": {"recipe": "x"}}, "state.json cannot be read .recipe is 'x'"),
        ({"facts": {"depends_on": [1]}}, "state.json cannot be read .depends_on is"),
        ({"shards": {"count": 3, "shapes": ...}}, "model.rank_0_of_3.safetensors is missing or damaged"),
        ({"shards": {"count": 2, "shapes": {"model": {"uneven": []}}}}, "of uneven do not make"),
        ({"shards": {"count": 2, "shapes": {"model": {"uneven": [6, 3]}}}}, "of uneven do not make"),
        ({"shards": {"count": 2, "shapes": {"model": {"strange": [6, 3]}}}}, "lacks a shard of strange"),
    ],
)
def test_state_json_must_fit_the_files(tmp_path, change, message):
    path = save(tmp_path, 4, 2) / "training_state" / "state.json"
    record = json.loads(path.read_text())
    if change.get("shards"):
        shapes = change["shards"]["shapes"]
        shapes = record["shards"]["shapes"] | ({} if shapes is ... else shapes)
        change = {"shards": change["shards"] | {"shapes": shapes}}
    path.write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=message):
        load_training_state(path.parents[1])


def test_a_link_that_a_tool_has_copied_as_a_folder_is_named(tmp_path):
    folder = save(tmp_path, 4, 1)
    (tmp_path / "last").unlink()
    shutil.copytree(folder, tmp_path / "last")
    with pytest.raises(ValueError, match="last is a folder and no link"):
        point_at(tmp_path, "last", folder)


# --- kills ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process: nothing that handles errors catches it."""


class Countdown:
    """Lets so many operations on folders happen before it kills; `after`: the next one is done too."""

    def __init__(self, operations: int, after: bool):
        self.left, self.after = operations, after

    def deadly(self, operation: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            self.left -= 1
            if self.left >= 0 or (self.after and self.left == -1):
                operation(*args, **kwargs)
            if self.left < 0:
                raise Killed
            return Path(args[-1])

        return wrapped


@pytest.mark.parametrize("after", [False, True])
def test_one_of_the_two_is_there_whenever_a_second_save_of_a_step_is_killed(tmp_path, monkeypatch, after):
    """Before or after each operation on a folder, from the save to what the next start removes."""

    def write(run: Path, value: float) -> None:
        groups = {name: {"t": torch.full((4,), value)} for name in TENSOR_FILES}
        save_checkpoint(run, TrainingState(4, groups, {}), lambda folder: None)

    values = set()
    for moment in range(20):
        run, killed, countdown = tmp_path / str(moment), False, Countdown(moment, after)
        write(run, 1.0)
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
                patch.setattr(owner, name, countdown.deadly(getattr(owner, name)))
            try:
                write(run, 2.0)
                drop_later(run, 4, 0, None)
            except Killed:
                killed = True
        values.add(latest_training_state(run, pytest.fail).tensors["model"]["t"][0].item())
        drop_later(run, 4, 0, None)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_4"]
        assert (run / "last" / "training_state" / "state.json").is_file()
        if not killed:
            break
    assert not killed and moment > 4
    assert values == {1.0, 2.0}


# --- processes that wait for each other ----------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path) -> tuple[Path, TrainingState, list[RankShards]]:
    """A run with a good checkpoint of step 4, and the shards of three processes of the one of step 8."""
    save(tmp_path, 4, 3)
    state = TrainingState(8, tensors(8), METADATA)
    return tmp_path, state, begin(tmp_path, state, sharded_names(state.tensors), 3)


def assert_step_4_is_kept(run: Path, error: OSError, reason: str) -> None:
    assert str(error) == f"{run}/checkpoints/step_8 could not be written ({reason}); the last good one is step_4"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_4"]
    assert (run / "last").resolve().name == "step_4"
    assert_holds(latest_training_state(run, pytest.fail), 4)


def test_the_first_process_waits_for_the_others(begun):
    run, state, (first, *others) = begun
    thread = threading.Thread(target=finish, args=(run, state, first, write_network))
    thread.start()
    for shards in others:
        time.sleep(0.2)
        assert thread.is_alive() and not (run / "checkpoints" / "step_8").exists()
        save_local_shards(shards, local_tensors(state, shards))
    thread.join(timeout=PATIENCE)
    assert not thread.is_alive()
    assert_holds(latest_training_state(run, pytest.fail), 8)


def test_a_process_that_fails_signals_its_reason_and_leaves_no_file(begun, monkeypatch):
    run, state, (first, second, third) = begun
    save_local_shards(third, local_tensors(state, third))
    monkeypatch.setattr(checkpoint, "fsync_path", lambda path: full(path.name == "ema.rank_1_of_3.safetensors"))
    save_local_shards(second, local_tensors(state, second))
    assert not list(first.folder.glob("*.rank_1_of_3.*"))
    monkeypatch.undo()
    with pytest.raises(OSError, match="step_8") as caught:
        finish(run, state, first, write_network)
    assert_step_4_is_kept(run, caught.value, "process 1 failed: [Errno 28] No space left on device")
    # The others, if they are late, find nothing to write to and need not signal.
    save_local_shards(third, local_tensors(state, third))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_4"]


def full(is_full: bool) -> None:
    if is_full:
        raise OSError(28, "No space left on device")


def test_a_bug_is_signalled_and_raised(begun):
    _, state, (first, second, third) = begun
    save_local_shards(third, local_tensors(state, third))
    with pytest.raises(KeyError):
        save_local_shards(second, {})
    with pytest.raises(OSError, match="process 1 failed: 'model'"):
        wait_for_shards(first)


def test_a_process_that_never_signals_is_given_up(begun, monkeypatch):
    run, state, (first, second, _) = begun
    save_local_shards(second, local_tensors(state, second))
    monkeypatch.setattr(checkpoint, "WAIT_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(OSError, match="step_8") as caught:
        finish(run, state, first, write_network)
    assert time.monotonic() - began > 0.3
    assert_step_4_is_kept(run, caught.value, "process 2 has not written its shards in 0.3 s")


def test_files_of_an_earlier_attempt_do_not_count(begun, monkeypatch):
    run, state, (_, *others) = begun
    for shards in others:
        save_local_shards(shards, local_tensors(state, shards))  # and the first process is killed
    (run / "checkpoints" / "step_80.0.partial").mkdir()
    (run / "checkpoints" / "step_8.partial").mkdir()
    first, *_ = begin(run, state, sharded_names(state.tensors), 3)
    assert first.folder != others[0].folder and not others[0].folder.exists() and not list(first.folder.iterdir())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step_4", "step_80.0.partial", first.folder.parent.name,
    }  # fmt: skip
    monkeypatch.setattr(checkpoint, "WAIT_SECONDS", 0.0)
    with pytest.raises(OSError, match="process 1 has not written"):
        finish(run, state, first, write_network)
