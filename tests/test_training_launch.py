"""The launch: what accelerate would take from its environment, or from a configuration of another project."""

import json

import pytest
import yaml
from toy_stores import recipe_tree
from training_runs import launch, run_dir

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
    for name, value in (("GRADIENT_ACCUMULATION_STEPS", "4"), ("DYNAMO_BACKEND", "INDUCTOR")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert gradient_norm(recipe, "left_over") == expected
    output = capsys.readouterr().out
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 of the launch is not used: the recipe has" in output
    assert "ACCELERATE_DYNAMO_BACKEND=inductor of the launch is not used" in output


def test_precision_of_the_launch_is_reported_when_it_differs(recipe, monkeypatch):
    loaded = load_recipe(recipe, ["training.mixed_precision=bf16"])
    for given, notes in (("no", 0), ("bf16", 0), ("fp16", 1), ("fp8", 1)):  # the launcher sets "no" by itself
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", given)
        assert len(launch_notes(loaded)) == notes, given


@pytest.mark.parametrize(
    ("variables", "message"),
    [
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
