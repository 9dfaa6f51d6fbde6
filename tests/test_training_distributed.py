"""Runs of several processes that train the same model: FSDP, two machines, and what the processes must agree on."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from forked import PATIENCE, run_together, together, wait_until
from safetensors.torch import load_file
from toy_stores import recipe_tree
from training_runs import (
    ROOT,
    SCRIPTS,
    accelerate_command,
    checkpoint_names,
    copy_run,
    environment,
    last_step,
    metrics,
    run_dir,
    train,
)

from mmaudio_hf import MMAudio
from mmaudio_hf.cli import main
from mmaudio_hf.config import load_recipe
from mmaudio_hf.data.sampler import dataset_indices
from mmaudio_hf.training import distributed
from mmaudio_hf.training.checkpoint import begin_sharded, load_training_state

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what launchers make of fsdp.yaml
FULL = "(process 1 failed: [Errno 28] No space left on device); the last good one is"


def write(folder: Path, name: str, **changes) -> Path:
    tree = recipe_tree(folder, steps=6, accumulation_steps=2, checkpoint_every=4, validate_every=6)
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    shutil.rmtree(folder / "output" / name, ignore_errors=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree | {"name": name}))
    return path


def train_two(recipe: Path, *overrides: str, **variables: str) -> str:
    """Two processes; returns what they printed."""
    result = train(recipe, *overrides, processes=2, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


def last(recipe: Path) -> Path:
    return run_dir(recipe) / "last"


def groups(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of a checkpoint, in full, whether it was sharded or not."""
    stored = load_training_state(checkpoint).tensors
    published = load_file(checkpoint / "pretrained_model" / "model.safetensors")
    return {name: dict(tensors) for name, tensors in stored.items()} | {"published": published}


def assert_same_model(ours: Path, theirs: Path, tolerance: float) -> None:
    a, b = groups(last(ours)), groups(last(theirs))
    for group in ("model", "ema", "optimizer", "published"):
        assert a[group].keys() == b[group].keys()
        for name, value in b[group].items():
            assert (a[group][name] - value).norm() <= tolerance * value.norm() + 1e-12, (group, name)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """A finished run of two processes on this machine. One of its samples is not finite, so a step is skipped."""
    recipe = write(tmp_path_factory.mktemp("parallel"), "two_processes")
    means = np.memmap(recipe.parent / "videos" / "mean.memmap", dtype=np.float32, mode="r+").reshape(24, -1)
    visited = [row for row in dataset_indices(7, 2, np.arange(4), 4, 40) if row < 24]  # step 2, in the first store
    means[visited[0]] = np.nan
    means.flush()
    train_two(recipe)
    assert metrics(recipe)[-2]["train/skipped_steps"] == 1
    return recipe


# --- FSDP --------------------------------------------------------------------------------------------------------

# Prints what is gathered. Where the second process writes its shards of one step, its disk is full, or it stands still.
WATCHED = """
import os, sys, time
from mmaudio_hf.cli import train_main
from mmaudio_hf.training import checkpoint, distributed

rank, (fault, step), save_file = os.environ["RANK"], sys.argv.pop(1).split(), checkpoint.write_safetensors
gather = distributed.gather_full_tensors

def printing(groups, keep):
    sys.stdout.write(f"gathered by {rank}: {', '.join(groups)}\\n")  # at once: both share one pipe
    return gather(groups, keep)

def failing(tensors, path):
    if rank == "1" and path.parent.parent.name.startswith(f"{step}."):
        if fault == "stands":
            time.sleep(600)
        raise OSError(28, "No space left on device")
    save_file(tensors, path)

distributed.gather_full_tensors, checkpoint.write_safetensors = printing, failing
sys.exit(train_main())
"""


def watched(fault: str, recipe: Path, *overrides: str) -> list[str]:
    """Words of the program, for a recipe."""
    program = recipe.parent / "watched.py"
    program.write_text(WATCHED)
    return [str(program), fault, str(recipe), *overrides]


@pytest.fixture(scope="module")
def fsdp(two_processes) -> tuple[Path, subprocess.CompletedProcess]:
    """The same run under FSDP, with a skipped step and a checkpoint that one process cannot write; and its output."""
    recipe = write(two_processes.parent, "fsdp", training={"checkpoint_every": 2})
    words = accelerate_command(*watched("full step_4", recipe), processes=2, hardware="fsdp.yaml")
    result = subprocess.run(
        words, capture_output=True, text=True, timeout=PATIENCE, env=environment(), cwd=recipe.parent
    )
    assert result.returncode == 0, result.stderr
    return recipe, result


def test_fsdp_trains_the_same_model(two_processes, fsdp):
    recipe, result = fsdp
    assert "parameters, sharded" in result.stdout
    assert_same_model(recipe, two_processes, 1e-5)
    ours, theirs = (metrics(run)[-1] for run in (recipe, two_processes))  # validation, of raw and of EMA weights
    assert ours.keys() == theirs.keys() and "val_ema/loss" in ours
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)
    model = MMAudio.from_pretrained(last(recipe) / "pretrained_model")
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_only_what_is_published_is_gathered(fsdp):
    _, result = fsdp
    gathered = {line for line in result.stdout.splitlines() if line.startswith("gathered")}
    # Weights for the checkpoints of steps 2, 4 and 6, and EMA profiles where a snapshot is due.
    published = {"published", "published, snapshot", "snapshot"}
    assert gathered == {f"gathered by {rank}: {names}" for rank in (0, 1) for names in published}


def test_every_process_saves_its_shards(fsdp):
    recipe, _ = fsdp
    state = last(recipe) / "training_state"
    files = {f"{group}.rank_{rank}_of_2" for group in ("model", "optimizer", "ema") for rank in (0, 1)}
    files |= {"model", "optimizer", "ema", "window"}
    assert {path.name for path in state.iterdir()} == {f"{name}.safetensors" for name in files} | {"state.json"}
    stored = load_training_state(last(recipe)).tensors["model"]
    model = MMAudio.from_pretrained(last(recipe) / "pretrained_model")
    parameters = dict(model.named_parameters())
    first, second = (load_file(state / f"model.rank_{rank}_of_2.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() == parameters.keys()
    assert any(value.numel() == 0 for value in second.values())  # one row cannot be divided
    for name, value in first.items():
        assert value.shape[0] == -(-parameters[name].shape[0] // 2)
        assert torch.equal(torch.cat([value, second[name]]), stored[name])
    counters = {f"step.{name}" for name, p in parameters.items() if p.requires_grad}
    assert load_file(state / "optimizer.safetensors").keys() == counters
    assert load_file(state / "model.safetensors").keys() == dict(model.named_buffers()).keys() & stored.keys()


def test_a_process_that_cannot_write_costs_that_checkpoint_alone(fsdp):
    recipe, result = fsdp
    warnings = [line for line in (result.stdout + result.stderr).splitlines() if "warning" in line]
    assert len(warnings) == 1 and f"step_4 could not be written {FULL} step_2; training" in warnings[0]
    assert checkpoint_names(recipe) == {"step_2", "step_6"}


def test_where_it_is_the_last_checkpoint_the_run_ends_with_a_fault(fsdp):
    full = copy_run(fsdp[0], write(fsdp[0].parent, "full", training={"checkpoint_every": 2}))
    words = watched("full step_7", full, "training.steps=7")
    result = run_together(2, *words, cwd=full.parent, env=environment(**FSDP))
    assert result.returncode != 0
    reports = re.findall(rf"^error: [^\n]*{re.escape(FULL)} step_6: free", result.stderr, re.MULTILINE)
    assert len(reports) == 2, result.stderr  # of every process
    assert last(full).resolve().name == "step_6"
    assert checkpoint_names(full) == {"step_2", "step_6"}


@pytest.fixture(scope="module")
def killed(fsdp) -> Path:
    """A run under FSDP that was killed while its second checkpoint was written, and then finished."""
    recipe = write(fsdp[0].parent, "killed", training={"checkpoint_every": 2})
    checkpoints = run_dir(recipe) / "checkpoints"
    with together(2, *watched("stands step_4", recipe), cwd=recipe.parent, env=environment(**FSDP)) as group:
        wait_until(lambda: (checkpoints / "step_2").exists() and any(checkpoints.glob("step_4.*")), group[0])
        for process in group:
            process.kill()
    assert {path.name.partition(".")[0] for path in checkpoints.iterdir()} == {"step_2", "step_4"}
    assert re.search(r"sharded.* from step 2 to 6", train_two(recipe, **FSDP))
    return recipe


def test_sharded_runs_that_are_killed_end_with_the_same_bytes(fsdp, killed):
    recipe, _ = fsdp
    assert not list((run_dir(killed) / "checkpoints").glob("*.partial"))
    ours, theirs = (last(run) / "training_state" for run in (killed, recipe))
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in sorted(ours.glob("*.safetensors")):
        assert path.read_bytes() == (theirs / path.name).read_bytes(), path.name
    assert metrics(killed) == metrics(recipe)
    published, others = (groups(last(run))["published"] for run in (killed, recipe))
    assert published.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in published.items())


def test_sharded_runs_resume_in_one_process(two_processes, killed):
    alone = copy_run(killed, write(killed.parent, "alone", training={"checkpoint_every": 2}))
    shutil.rmtree(run_dir(alone) / "checkpoints" / "step_6")
    assert main(["train", str(alone)]) == 0
    assert not list((last(alone) / "training_state").glob("*rank*"))
    assert_same_model(alone, two_processes, 1e-5)


def test_ema_and_export_read_sharded_runs(two_processes, fsdp, tmp_path):
    """EMA weights of other widths and files of the reference implementation, equal to those of the run without FSDP."""
    results = []
    for recipe in (two_processes, fsdp[0]):
        out = tmp_path / recipe.stem
        assert main(["ema", str(run_dir(recipe)), "--sigma-rel", "0.07", "--out", str(out / "wide")]) == 0
        assert main(["export", str(run_dir(recipe)), "--out", str(out)]) == 0
        exported = torch.load(out / f"{recipe.stem}_ckpt_last.pth", weights_only=True)
        wide = load_file(out / "wide" / "pretrained_model" / "model.safetensors")
        results.append((wide, exported["weights"], exported["optimizer"]["state"]))
    for ours, theirs in zip(*results, strict=True):
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_step_of_a_sharded_run_is_replayed(two_processes, fsdp, capsys):
    samples = []
    for recipe, step in ((two_processes, 4), (fsdp[0], 2)):
        assert main(["replay-step", str(run_dir(recipe)), "5", "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["weights_of_step"] == step
        samples.append([sample["id"] for sample in figures["samples"]])
    assert samples[0] == samples[1]


def test_sharded_adapters_with_activation_checkpointing(two_processes):
    """Frozen and trained tensors in one group, merged when published; early stopping ends both processes."""
    start = MMAudio.from_pretrained(last(two_processes) / "pretrained_model")
    torch.save(start.state_dict(), two_processes.parent / "start.pth")
    finetune = {"init_from": str(two_processes.parent / "start.pth"), "lora": {"rank": 2}, "freeze": ["text"]}
    stopping = {"metric": "val/loss", "patience": 2, "min_delta": 100.0}
    training = {"activation_checkpointing": True, "early_stopping": stopping, "validate_every": 2}
    sharded = write(two_processes.parent, "sharded_adapter", finetune=finetune, training=training)
    alone = write(two_processes.parent, "adapter", finetune=finetune, training=training)
    output = train_two(sharded, **FSDP)
    assert "parameters, sharded" in output and "no longer improves" in output
    assert main(["train", str(alone)]) == 0
    assert last(sharded).resolve().name == last(alone).resolve().name == "step_4"
    assert_same_model(sharded, alone, 1e-4)


# --- several machines --------------------------------------------------------------------------------------------

# Two hosts, each with a network of its own and a cable between them, in namespaces that end with this script.
HOSTS = """
set -e
mount -t tmpfs tmpfs /run
mkdir /run/netns
printf '127.0.0.1 localhost\\n10.77.0.1 one\\n10.77.0.2 two\\n' > "$LOGS/hosts"
mount --bind "$LOGS/hosts" /etc/hosts
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
launch=(timeout 400 "$ACCELERATE" launch --config_file "$ROOT/accelerate_configs/multi_node.yaml" --num_processes 2)
launch+=(--main_process_ip 10.77.0.1 --machine_rank)
train=("$ROOT/train.py" "$RECIPE" training.steps=100000 training.keep_checkpoints=100)
ip netns exec two "${launch[@]}" 1 "${train[@]}" > "$LOGS/two" 2>&1 &
two=$!
ip netns exec one "${launch[@]}" 0 "${train[@]}" > "$LOGS/one" 2>&1 &
one=$!
until grep -q '"step": 9,' "$RUN/metrics.jsonl" || ! kill -0 $one; do sleep 0.05; done
for pid in $(ip netns pids two); do
    if grep -qz LOCAL_RANK /proc/$pid/environ; then kill -USR1 $pid; break; fi
done
for pid in $one $two; do
    wait $pid && code=0 || code=$?
    echo $code >> "$LOGS/codes"
done
"""


NAMESPACES = ["unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture(scope="module")
def hosts(two_processes, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Recipe of a run on two hosts in network namespaces that a signal stopped, and the output of both; see `HOSTS`."""
    missing = [program for program in ("ip", "unshare") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} of iproute2 and util-linux missing: two hosts cannot be made")
    tried = subprocess.run([*NAMESPACES, "ip", "link"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this system does not let a test make network namespaces: {tried.stderr.strip()}")
    recipe, logs = write(two_processes.parent, "hosts"), tmp_path_factory.mktemp("the logs")
    variables = {"LOGS": str(logs), "ROOT": str(ROOT), "ACCELERATE": str(SCRIPTS / "accelerate")}
    variables |= {"RECIPE": str(recipe), "RUN": str(run_dir(recipe))}
    result = subprocess.run(
        [*NAMESPACES, "bash", "-c", HOSTS], env=environment(**variables), cwd=recipe.parent,
        capture_output=True, text=True, timeout=2 * PATIENCE,
    )  # fmt: skip
    output = {path.name: path.read_text() for path in logs.iterdir()}
    assert result.returncode == 0, (result.stderr, output)
    return recipe, output


def test_two_machines_train_the_same_model(two_processes, hosts):
    """As two processes on one machine: the same sums in the same order."""
    recipe, output = hosts
    assert "2 processes on cpu, batch 4 = 2 x 2 x 1" in output["one"]
    ours, theirs = (groups(run_dir(r) / "checkpoints" / "step_4") for r in (recipe, two_processes))
    assert ours.keys() == theirs.keys() and len(ours["published"]) > 50
    for group, tensors in ours.items():
        torch.testing.assert_close(tensors, theirs[group], rtol=0, atol=0)
    expected = metrics(two_processes)
    assert expected and metrics(recipe)[: len(expected)] == expected


def test_two_machines_stop_together(hosts):
    """A scheduler's signal to one process of one host."""
    recipe, output = hosts
    assert output["codes"] == "1\n1\n" and "SIGUSR1: saving a checkpoint" in output["two"], output
    assert last_step(recipe) > 8
    for host in ("one", "two"):
        assert f"stopped at step {last_step(recipe)}; the same command" in output[host]


# --- what processes must agree on --------------------------------------------------------------------------------

DIFFERING = """
import sys
from pathlib import Path
from accelerate import PartialState
from mmaudio_hf.cli import train_main
from mmaudio_hf.training import distributed

rank, distributed.SHARED_SECONDS = PartialState(cpu=True).process_index, 0.1
exists, Path.exists = Path.exists, lambda path: rank == 0  # as on machines that do not share a file system
distributed.check_same_everywhere({"seed": 1, "rows": 2})
for check in (
    lambda: distributed.check_same_everywhere({"seed": 1, "rows": rank}),
    lambda: distributed.check_visible_everywhere(Path(sys.argv[1]) / "file"),
):
    try:
        check()
    except ValueError as error:
        sys.stdout.write(f"process {rank} reports: {error}\\n")  # at once: launchers let two processes share one pipe
Path.exists = exists
assert train_main([sys.argv[2], f"seed={rank}"]) == 2
"""


def test_what_processes_do_not_have_in_common_is_named(tmp_path):
    recipe, program = write(tmp_path, "differing"), tmp_path / "program.py"
    program.write_text(DIFFERING)
    result = run_together(2, str(program), str(tmp_path), str(recipe), cwd=tmp_path, env=environment())
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("not of one run: seed is 0 for process 0 and 1 for process 1") == 2, result.stderr
    assert not run_dir(recipe).exists()
    for rank in range(2):
        reports = [line for line in result.stdout.splitlines() if line.startswith(f"process {rank} reports")]
        assert len(reports) == 2, result.stdout
        assert "not of one run: rows is 0 for process 0 and 1 for process 1; every machine" in reports[0]
        assert f"the presence of {tmp_path}/file is True for process 0 and False for process 1" in reports[1]


def test_a_folder_that_one_process_cannot_create_or_see_is_an_error_for_all(tmp_path, monkeypatch):
    PartialState(cpu=True)
    assert distributed.make_shared_folder(lambda: begin_sharded(tmp_path, 4))[0].is_dir()
    (tmp_path / "run").write_text("")
    folder, problem = distributed.make_shared_folder(lambda: begin_sharded(tmp_path / "run", 4))
    assert folder is None and "Not a directory" in problem
    monkeypatch.setattr(distributed, "SHARED_SECONDS", 0.1)
    problem = f"process 0 does not see {tmp_path / 'no'}"
    assert distributed.make_shared_folder(lambda: tmp_path / "no") == (None, problem)


# --- what a process waits for ----------------------------------------------------------------------------------------

LATE = """
import sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from accelerate import PartialState
from mmaudio_hf.training import distributed

rank, distributed.STEP_TIMEOUT = PartialState(cpu=True).process_index, timedelta(seconds=3)
def reduce_late():
    if rank:
        time.sleep(5)
    dist.all_reduce(torch.ones(1))
dist.barrier()  # imports do not take equally long
with distributed.step_timeout(7):
    dist.all_reduce(torch.ones(1))
reduce_late()  # as where one process evaluates or saves alone
sys.stdout.write(f"process {rank} waited\\n")
try:
    with distributed.step_timeout(7):
        reduce_late()
except RuntimeError as error:
    sys.stdout.write(f"process {rank}: {str(error).splitlines()[0]}\\n")
"""


def test_a_step_does_not_wait_for_long_and_evaluation_does(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(LATE)
    result = run_together(2, str(program), cwd=tmp_path, env=environment())
    assert "process 0 waited" in result.stdout and "process 1 waited" in result.stdout, result.stderr
    expected = r"process 0: process 0 had no answer .* waited for the gradients of step 7 \(.*[Tt]imed out.*; the same"
    assert re.search(expected, result.stdout), result.stdout + result.stderr


def test_ddp_neither_copies_gradients_nor_broadcasts_buffers(tmp_path):
    network = MMAudio(load_recipe(write(tmp_path, "start")).model)
    for parameter in network.parameters():  # the last layer starts as zero, and no gradient would pass it
        torch.nn.init.normal_(parameter, std=0.02)
    network.set_latent_statistics(torch.zeros(20), torch.ones(20))
    torch.save(network.state_dict(), tmp_path / "start.pth")
    # The gradients of its convolutions have strides of their own.
    adapter = {"init_from": str(tmp_path / "start.pth"), "lora": {"rank": 2, "dora": True}}
    recipe, program = write(tmp_path, "ddp", finetune=adapter), tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from mmaudio_hf.cli import train_main\n"
        "from mmaudio_hf.training.loop import Run\n"
        "update = Run.update\n"
        "def show(run, batches):\n"
        "    sys.stdout.write(f'{run.model.gradient_as_bucket_view} {run.model.forward_sync_buffers}\\n')\n"
        "    update(run, batches)\n"
        "Run.update = show\n"
        "assert train_main([sys.argv[1], 'training.steps=1']) == 0\n"
    )
    result = run_together(2, str(program), str(recipe), cwd=tmp_path, env=environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("True False") == 2, result.stdout
    assert "Warning" not in result.stderr, result.stderr
