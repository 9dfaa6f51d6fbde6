"""Runs of several processes that must train the same model: FSDP, and two machines."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from forked import run_together
from safetensors.torch import load_file
from toy_stores import recipe_tree

from mmaudio_hf import MMAudio
from mmaudio_hf.cli import main
from mmaudio_hf.data.sampler import dataset_indices
from mmaudio_hf.training.checkpoint import load_training_state

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent
FILES = ("training_state/model", "training_state/ema", "training_state/optimizer", "pretrained_model/model")
SHARED_OUT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what launchers make of fsdp.yaml


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def launch_command(hardware: str, *script: str) -> list[str]:
    config = str(ROOT / "accelerate_configs" / hardware)
    command = [str(SCRIPTS / "accelerate"), "launch", "--config_file", config, "--num_processes", "2"]
    return [*command, "--main_process_port", "0", *script]


def train(recipe: Path, *overrides: str, **variables: str) -> str:
    """Two processes, without the time that launchers and imports take; returns what they printed."""
    words = ["train", str(recipe), *overrides]
    result = run_together(2, *words, cwd=recipe.parent, env=environment(**variables))
    assert result.returncode == 0, result.stderr
    return result.stdout


def write(folder: Path, name: str, **changes) -> Path:
    tree = recipe_tree(folder, steps=6, accumulation_steps=2, checkpoint_every=4, validate_every=3)
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree | {"name": name}))
    return path


def last(recipe: Path) -> Path:
    return recipe.parent / "output" / recipe.stem / "last"


def groups(recipe: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors that a run has left, whole, whether its processes share them out or not."""
    stored = load_training_state(last(recipe)).tensors
    published = load_file(last(recipe) / "pretrained_model" / "model.safetensors")
    return {name: dict(tensors) for name, tensors in stored.items()} | {"published": published}


def assert_same_model(ours: Path, theirs: Path, tolerance: float) -> None:
    ours, theirs = groups(ours), groups(theirs)
    for group in ("model", "ema", "optimizer", "published"):
        a, b = ours[group], theirs[group]
        assert a.keys() == b.keys()
        for name in a:
            difference = (a[name] - b[name]).norm()
            assert difference <= tolerance * b[name].norm() + 1e-12, (group, name)


def metrics(recipe: Path) -> list[dict]:
    return [json.loads(line) for line in (last(recipe).parent / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A finished run of two processes on this machine. One of its samples is not finite, so a step is refused."""
    recipe = write(tmp_path_factory.mktemp("parallel"), "local")
    memmap = np.memmap(recipe.parent / "videos" / "mean.memmap", dtype=np.float32, mode="r+").reshape(24, -1)
    visited = [p for p in dataset_indices(7, 2, np.arange(4), 4, 40) if p < 24]  # of the third step, in the first store
    memmap[visited[0]] = np.nan
    memmap.flush()
    train(recipe)
    assert metrics(recipe)[-2]["train/skipped_steps"] == 1
    return recipe


# Tells what is gathered, and the disk is full for the slices of the second process in one checkpoint.
WATCHED = """
import os, sys
from mmaudio_hf.cli import train_main
from mmaudio_hf.training import checkpoint as shards
from mmaudio_hf.training import checkpointer

rank, full, whole, save_file = os.environ["RANK"], sys.argv.pop(1), checkpointer.gather_full_tensors, shards.save_file

def told(groups, keep):
    sys.stdout.write(f"gathered by {rank}: {', '.join(groups)}\\n")  # at once: both share one pipe
    return whole(groups, keep)

def failing(tensors, path):
    if rank == "1" and path.parent.parent.name.startswith(f"{full}."):
        raise OSError(28, "No space left on device")
    save_file(tensors, path)

checkpointer.gather_full_tensors, shards.save_file = told, failing
sys.exit(train_main())
"""


def launch_watched(full: str, recipe: Path, *overrides: str) -> subprocess.CompletedProcess:
    program = recipe.parent / "watched.py"
    program.write_text(WATCHED)
    command = launch_command("fsdp.yaml", str(program), full, str(recipe), *overrides)
    variables = environment(PYTHONPATH=str(ROOT))
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables, cwd=recipe.parent)


@pytest.fixture(scope="module")
def shared(local) -> tuple[Path, subprocess.CompletedProcess]:
    """The same run under FSDP, with a refused step and a checkpoint that one process cannot write; and what it said."""
    recipe = write(local.parent, "shared", training={"checkpoint_every": 2})
    done = launch_watched("step_4", recipe)
    assert done.returncode == 0, done.stderr
    return recipe, done


def test_shared_out_tensors_train_the_same_model(local, shared):
    recipe, done = shared
    assert "parameters, sharded" in done.stdout
    assert_same_model(recipe, local, 1e-5)
    ours, theirs = (metrics(run)[-1] for run in (recipe, local))  # validation, of raw and averaged weights
    assert ours.keys() == theirs.keys() and "val_ema/loss" in ours
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)
    network = MMAudio.from_pretrained(last(recipe) / "pretrained_model")
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_every_process_saves_its_slices_and_what_is_published_alone_is_gathered(shared):
    recipe, done = shared
    gathered = {line for line in done.stdout.splitlines() if line.startswith("gathered")}
    # Weights for the checkpoints of steps 2, 4 and 6, and averages where a snapshot is due.
    published = {"published", "published, snapshot", "snapshot"}
    assert gathered == {f"gathered by {rank}: {names}" for rank in (0, 1) for names in published}
    state = last(recipe) / "training_state"
    slices = {f"{group}.rank_{rank}_of_2" for group in ("model", "optimizer", "ema") for rank in (0, 1)}
    names = slices | {"model", "optimizer", "ema", "window"}
    assert {path.name for path in state.iterdir()} == {f"{name}.safetensors" for name in names} | {"state.json"}
    stored, network = (
        load_training_state(last(recipe)).tensors,
        MMAudio.from_pretrained(last(recipe) / "pretrained_model"),
    )
    parameters = dict(network.named_parameters())
    first, second = (load_file(state / f"model.rank_{rank}_of_2.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() == parameters.keys()
    assert any(value.numel() == 0 for value in second.values())  # there is nothing to share in one row
    for name, value in first.items():
        assert value.shape[0] == -(-parameters[name].shape[0] // 2)
        assert torch.equal(torch.cat([value, second[name]]), stored["model"][name])
    counters = {f"step.{name}" for name, p in parameters.items() if p.requires_grad}
    assert load_file(state / "optimizer.safetensors").keys() == counters
    assert (
        load_file(state / "model.safetensors").keys() == dict(network.named_buffers()).keys() & stored["model"].keys()
    )


def test_a_process_that_cannot_write_costs_that_checkpoint_alone(local, shared):
    recipe, done = shared
    reason = "(process 1 failed: [Errno 28] No space left on device); the last good one is"
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if "warning" in line]
    assert len(warnings) == 1 and f"step_4 could not be written {reason} step_2; training" in warnings[0]
    assert {path.name for path in (last(recipe).parent / "checkpoints").iterdir()} == {"step_2", "step_6"}
    # Where it is the last one, the run ends with a fault, on every process.
    full = write(local.parent, "full", training={"checkpoint_every": 2})
    shutil.copytree(last(recipe).parent, last(full).parent, symlinks=True)
    done = launch_watched("step_7", full, "training.steps=7")
    assert done.returncode != 0
    assert (
        done.stderr.count("(process 1 failed: [Errno 28] No space left on device); the last good one is step_6: free")
        == 2
    )
    assert last(full).resolve().name == "step_6"
    assert {path.name for path in (last(full).parent / "checkpoints").iterdir()} == {"step_2", "step_6"}


def test_shared_out_runs_that_are_killed_end_with_the_same_bytes_and_go_on_as_whole(local, shared):
    recipe = write(local.parent, "killed", training={"checkpoint_every": 2})
    command = launch_command("fsdp.yaml", str(ROOT / "train.py"), str(recipe))
    process = subprocess.Popen(
        command, env=environment(), cwd=recipe.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    checkpoints = last(recipe).parent / "checkpoints"
    while not (checkpoints / "step_2").exists() or not list(checkpoints.glob("step_4*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.kill()
    process.communicate(timeout=60)  # until no process has its output any more
    assert not (checkpoints / "step_6").exists()
    assert re.search(r"sharded.* from step [24] to 6", train(recipe, **SHARED_OUT))
    assert not list(checkpoints.glob("*.partial"))
    ours, theirs = (last(run) / "training_state" for run in (recipe, shared[0]))
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in sorted(ours.glob("*.safetensors")):
        assert path.read_bytes() == (theirs / path.name).read_bytes(), path.name
    assert metrics(recipe) == metrics(shared[0])
    assert groups(recipe)["published"].keys() == groups(shared[0])["published"].keys()
    for name, value in groups(recipe)["published"].items():
        assert torch.equal(value, groups(shared[0])["published"][name]), name

    alone = write(local.parent, "alone", training={"checkpoint_every": 2})
    shutil.copytree(last(recipe).parent, last(alone).parent, symlinks=True)
    shutil.rmtree(last(alone).parent / "checkpoints" / "step_6")
    assert main(["train", str(alone)]) == 0
    assert not list((last(alone) / "training_state").glob("*rank*"))
    assert_same_model(alone, local, 1e-5)


def test_what_reads_runs_reads_shared_out_ones(local, shared, tmp_path, capsys):
    """Other averages, files of the reference implementation, a step once more: the same as of the run without FSDP."""
    made = {}
    for recipe in (local, shared[0]):
        run, out = last(recipe).parent, tmp_path / recipe.stem
        assert main(["ema", str(run), "--sigma-rel", "0.07", "--out", str(out / "wide")]) == 0
        assert main(["export", str(run), "--out", str(out)]) == 0
        capsys.readouterr()
        assert main(["replay-step", str(run), "5", "--json"]) == 0
        made[recipe] = (
            load_file(out / "wide" / "pretrained_model" / "model.safetensors"),
            torch.load(out / f"{recipe.stem}_ckpt_last.pth", weights_only=True),
            json.loads(capsys.readouterr().out),
        )
    (wide, exported, replayed), (their_wide, their_exported, their_replayed) = made[shared[0]], made[local]
    assert wide.keys() == their_wide.keys()
    for name, value in wide.items():
        torch.testing.assert_close(value, their_wide[name], rtol=1e-3, atol=1e-6)
    assert exported["weights"].keys() == their_exported["weights"].keys()
    for name, value in exported["weights"].items():
        torch.testing.assert_close(value, their_exported["weights"][name], rtol=1e-3, atol=1e-6)
    for index, moments in exported["optimizer"]["state"].items():
        torch.testing.assert_close(moments, their_exported["optimizer"]["state"][index], rtol=1e-3, atol=1e-6)
    assert replayed["weights_of_step"] == 2 and their_replayed["weights_of_step"] == 4
    assert [sample["id"] for sample in replayed["samples"]] == [sample["id"] for sample in their_replayed["samples"]]


def test_shared_out_adapters_with_checkpointed_activations(local):
    """Frozen and trained tensors in one group, merged when published; early stopping ends both processes."""
    start = MMAudio.from_pretrained(last(local) / "pretrained_model")
    torch.save(start.state_dict(), local.parent / "start.pth")
    finetune = {"init_from": str(local.parent / "start.pth"), "lora": {"rank": 2}, "freeze": ["text"]}
    stopping = {"metric": "val/loss", "patience": 2, "min_delta": 100.0}
    training = {"activation_checkpointing": True, "early_stopping": stopping, "validate_every": 2}
    shared = write(local.parent, "shared_adapter", finetune=finetune, training=training)
    alone = write(local.parent, "adapter", finetune=finetune, training=training)
    said = train(shared, **SHARED_OUT)
    assert "parameters, sharded" in said and "no longer improves" in said
    assert main(["train", str(alone)]) == 0
    assert last(shared).resolve().name == last(alone).resolve().name == "step_4"
    assert_same_model(shared, alone, 1e-4)


# --- several machines ----------------------------------------------------------------------------------------------

# Two hosts, each with a network of its own and a cable between them, in namespaces that end with this script.
HOSTS = """
set -e
mount -t tmpfs tmpfs /run
mkdir /run/netns
printf '127.0.0.1 localhost\\n10.77.0.1 one\\n10.77.0.2 two\\n' > $LOGS/hosts
mount --bind $LOGS/hosts /etc/hosts
ip netns add one
ip netns add two
ip link add cable netns one type veth peer name cable netns two
ip -n one address add 10.77.0.1/24 dev cable
ip -n two address add 10.77.0.2/24 dev cable
for host in one two; do
    ip -n $host link set lo up
    ip -n $host link set cable up
done
export GLOO_SOCKET_IFNAME=cable  # the name of this machine belongs to a network that the hosts do not have
launch="timeout 140 $ACCELERATE launch --config_file $ROOT/accelerate_configs/multi_node.yaml --num_processes 2"
launch="$launch --main_process_ip 10.77.0.1"
train() {  # train NAME key=value ...: on both hosts
    logs=$LOGS/$1; shift
    run="$ROOT/train.py $RECIPE $*"
    ip netns exec two $launch --machine_rank 1 $run > $logs.two 2>&1 &
    two=$!
    ip netns exec one $launch --machine_rank 0 $run > $logs.one 2>&1 &
    one=$!
}
codes() {
    for pid in $one $two; do
        wait $pid && code=0 || code=$?
        echo $code >> $LOGS/$1.codes
    done
}
train whole
codes whole
cp -a $RUN $KEPT
train stopped training.steps=100000 training.log_every=1
until grep -q '"step": 9,' $RUN/metrics.jsonl || ! kill -0 $one; do sleep 0.05; done
for pid in $(ip netns pids two); do
    if grep -qz LOCAL_RANK /proc/$pid/environ; then kill -USR1 $pid; break; fi
done
codes stopped
"""


def test_two_machines_train_the_same_model_and_stop_together(local, tmp_path):
    """Two hosts in network namespaces end as two processes on one do: the same sums in the same order."""
    missing = [program for program in ("ip", "unshare") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} of iproute2 and util-linux missing: two hosts cannot be made")
    new_namespaces = [
        "unshare",
        "--map-root-user",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]
    tried = subprocess.run([*new_namespaces, "ip", "link"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this system does not let a test make network namespaces: {tried.stderr.strip()}")
    recipe, kept = write(local.parent, "hosts"), local.parent / "output" / "hosts_whole"
    variables = {
        "LOGS": str(tmp_path),
        "ROOT": str(ROOT),
        "ACCELERATE": str(SCRIPTS / "accelerate"),
        "RECIPE": str(recipe),
        "RUN": str(last(recipe).parent),
        "KEPT": str(kept),
    }
    result = subprocess.run(
        [*new_namespaces, "bash", "-c", HOSTS], env=environment(**variables), cwd=local.parent,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert result.returncode == 0, (result.stderr, said)

    assert said["whole.codes"] == "0\n0\n", said
    assert "2 processes on cpu, batch 4 = 2 x 2 x 1" in said["whole.one"]
    for file in FILES:
        ours, theirs = (load_file(run / f"{file}.safetensors") for run in (kept / "last", last(local)))
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, msg=name)
    assert (kept / "metrics.jsonl").read_text() == (last(local).parent / "metrics.jsonl").read_text()

    # A scheduler's signal to one process of one host.
    assert said["stopped.codes"] == "1\n1\n" and "SIGUSR1: saving a checkpoint" in said["stopped.two"], said
    step = int(last(recipe).resolve().name.removeprefix("step_"))
    for host in ("one", "two"):
        assert f"stopped at step {step}; the same command goes on from there" in said[f"stopped.{host}"]
    assert step > 8


DIFFERING = """
import sys
from pathlib import Path
from accelerate import PartialState
from mmaudio_hf.cli import train_main
from mmaudio_hf.training import distributed as parallel

rank, parallel.SHARED_SECONDS = PartialState(cpu=True).process_index, 0.1
exists, Path.exists = Path.exists, lambda path: rank == 0  # as on machines that do not share a file system
parallel.check_same_everywhere({"seed": 1, "rows": 2})
for check in (
    lambda: parallel.check_same_everywhere({"seed": 1, "rows": rank}),
    lambda: parallel.check_visible_everywhere(Path(sys.argv[1]) / "file"),
):
    try:
        check()
    except ValueError as error:
        sys.stdout.write(f"process {rank} says: {error}\\n")  # at once: launchers let two processes share one pipe
Path.exists = exists
assert train_main([sys.argv[2], f"seed={rank}"]) == 2
"""


def test_what_processes_do_not_have_in_common_is_named(tmp_path):
    recipe = write(tmp_path, "differing")
    (tmp_path / "program.py").write_text(DIFFERING)
    command = launch_command("cpu.yaml", str(tmp_path / "program.py"), str(tmp_path), str(recipe))
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(PYTHONPATH=str(ROOT)))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("not of one run: seed is 0 for process 0 and 1 for process 1") == 2, result.stderr
    assert not last(recipe).parent.exists()
    for rank in range(2):
        said = [line for line in result.stdout.splitlines() if line.startswith(f"process {rank} says")]
        assert len(said) == 2, result.stdout
        assert "not of one run: rows is 0 for process 0 and 1 for process 1; every machine" in said[0]
        assert f"the presence of {tmp_path}/file is True for process 0 and False for process 1" in said[1]
