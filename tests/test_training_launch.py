"""The launch: what accelerate would take from its environment, or from a configuration of another project."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from toy_stores import recipe_tree
from training_runs import ROOT, SCRIPTS, command, environment, last_step, launch, run_dir

from mmaudio_hf.cli import main
from mmaudio_hf.config import load_recipe
from mmaudio_hf.training.distributed import launch_notes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(folder, steps=1, log_every=1, trackers=[]) | {"name": "launch"}))
    return path


def gradient_norm(recipe, name: str) -> float:
    assert main(["train", str(recipe), f"name={name}"]) == 0
    lines = (run_dir(recipe).with_name(name) / "metrics.jsonl").read_text().splitlines()
    return next(line["train/grad_norm"] for line in map(json.loads, lines) if "train/grad_norm" in line)


def test_accumulation_and_compilation_are_those_of_the_recipe(recipe, monkeypatch, capsys):
    expected = gradient_norm(recipe, "plain")
    assert "note:" not in capsys.readouterr().out
    for name, value in (("GRADIENT_ACCUMULATION_STEPS", "4"), ("DYNAMO_BACKEND", "INDUCTOR"), ("FP8_BACKEND", "TE")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert gradient_norm(recipe, "left_over") == expected
    output = capsys.readouterr().out
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 of the launch is not used: the recipe has" in output
    assert "ACCELERATE_DYNAMO_BACKEND=inductor of the launch is not used" in output
    assert "ACCELERATE_FP8_BACKEND=te of the launch is not used" in output


def test_precision_of_the_launch_is_reported_when_it_differs(recipe, monkeypatch):
    loaded = load_recipe(recipe, ["training.mixed_precision=bf16"])
    for given, notes in (("no", 0), ("bf16", 0), ("fp16", 1), ("fp8", 1)):  # the launcher sets "no" by itself
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", given)
        assert len(launch_notes(loaded)) == notes, given


@pytest.mark.parametrize(
    ("variable", "value", "note"),
    [
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "is not used: the recipe has optim.max_grad_norm=1.0"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", ""),
        ("ACCELERATE_FP8_BACKEND", "TE", "is not used: the recipe has training.mixed_precision=no"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune", "is not used: the recipe has training.compile=auto"),
        ("ACCELERATE_DYNAMO_MODE", "default", ""),
        ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "True", "is not used: the recipe has training.compile=auto"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "is not used, but sharding by block"),
        ("FSDP_IGNORED_MODULES", "blocks", "is not used, but sharding of all modules"),
        ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", "is not used, but one file for each process"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", ""),
        ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD", "is not used, but fsdp_reshard_after_forward"),
        ("ACCELERATE_DEBUG_MODE", "1", "is set: every collective is checked"),
        ("ACCELERATE_DEBUG_MODE", "false", ""),
        ("NVIDIA_TF32_OVERRIDE", "0", "is set: it decides on TF32, whatever training.tf32 says"),
        ("CUDA_LAUNCH_BLOCKING", "1", "is set: the host waits for every kernel"),
    ],
)
def test_what_the_environment_would_change_is_one_line(recipe, variable, value, note, monkeypatch):
    monkeypatch.setenv(variable, value)
    if variable.startswith("FSDP_"):
        assert launch_notes(load_recipe(recipe)) == []  # accelerate takes nothing of them without FSDP
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    notes = launch_notes(load_recipe(recipe))
    assert len(notes) == bool(note) and all(
        n.startswith(f"{variable}={value.lower()} ") and note in n for n in notes
    ), notes


def test_a_process_by_itself_says_what_it_waits_for(recipe, monkeypatch, capsys):
    variables = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    output = []

    def wait(*_, **__):
        while "waits" not in "".join(output):
            output.append(capsys.readouterr().err)
        raise ValueError("over")

    monkeypatch.setattr("mmaudio_hf.training.loop.train", wait)
    monkeypatch.setattr("mmaudio_hf.cli.training.CONNECT_SECONDS", 0)
    assert main(["train", str(recipe), "name=alone"]) == 2
    assert "process 1 of 2 waits at 127.0.0.1:29 for the others: start them with" in "".join(output)


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE"])
def test_compilation_that_is_switched_off_is_an_error(recipe, variable):
    words = command(recipe, "training.compile=on", f"name={variable}", processes=0)
    result = subprocess.run(words, capture_output=True, text=True, env=environment(**{variable: "1"}))
    expected = "torch.compile does not work here, set training.compile=off: it is switched off by TORCHDYNAMO_DISABLE"
    assert result.returncode == 1 and expected in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_SAGEMAKER": "true"}, "data parallelism of SageMaker is not supported"),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, "one device for all processes is not supported: launch with a file of"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU=maybe in the environment has no meaning: unset it"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment has no meaning"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment has no meaning"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x in the environment has no meaning"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 and RANK=0 in the environment are of no launch: unset them"),
        ({"RANK": "1"}, "WORLD_SIZE=1 and RANK=1 in the environment are of no launch"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP needs a launcher"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "x"}, "of the launch (inv"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported: launch with a file of accelerate_configs/"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism_config is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP is supported in version 2 alone"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_what_is_not_supported_ends_with_one_sentence(recipe, variables, message, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(recipe), "name=refused"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.strip().splitlines()) == 1
    assert not run_dir(recipe).with_name("refused").exists()


def test_our_sentence_comes_last_under_the_launcher(recipe):
    result = launch(recipe, "data.train=[{path: gone}]", processes=2)
    lines = [line for line in result.stderr.splitlines() if line.strip("= ")]
    assert result.returncode == 1 and "error: no feature store at gone; make it with" in lines[-1], result.stderr


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (
            {"mixed_precision": "fp16", "dynamo_config": {"dynamo_backend": "INDUCTOR"}},
            0,
            "ACCELERATE_DYNAMO_BACKEND=inductor of the launch is not used",
        ),
        ({"distributed_type": "MEGATRON_LM", "use_cpu": False}, 1, "Megatron-LM is not supported: launch with a file"),
    ],
)
def test_the_users_own_configuration_of_accelerate(recipe, tmp_path, settings, code, message):
    own = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": True, "num_machines": 1}
    own |= {"num_processes": 1, "machine_rank": 0, "debug": False, "mixed_precision": "no"}
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(own | settings))
    words = [str(SCRIPTS / "accelerate"), "launch", str(ROOT / "train.py"), str(recipe), f"name=own{code}"]
    result = subprocess.run(words, capture_output=True, text=True, env=environment(HF_HOME=str(tmp_path)))
    assert result.returncode == code and message in result.stdout + result.stderr, result.stdout + result.stderr


def test_after_a_killed_process_the_launcher_repeats_that_the_same_command_resumes(recipe):
    words = command(recipe, "training.steps=100000", "training.checkpoint_every=1", "name=killed", processes=2)
    launcher = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        while last_step(recipe.with_name("killed.yaml")) < 1:
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.05)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ranks = {Path(f"/proc/{pid}/environ").read_text().split("\0RANK=")[1][0]: int(pid) for pid in children}
        os.kill(ranks["1"], signal.SIGKILL)
        output = launcher.communicate(timeout=300)[0]
    finally:
        launcher.kill()
    assert "killed, perhaps for want of memory: the same command continues" in output.rpartition("Root Cause")[2], (
        output
    )
    expected = r"error: process 0 had no answer from another one, .* waited for .*; the same command resumes from"
    assert launcher.returncode == 1 and re.search(expected, output), output
