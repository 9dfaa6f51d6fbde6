"""Every recipe and every command line of the documentation is read by the program that it is meant for."""

import ast
import errno
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from test_cli_arguments import COMMANDS
from torch.distributed.run import get_args_parser

from mmaudio_hf.cli import EXAMPLES, parse
from mmaudio_hf.config import load_recipe, variant_config

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LAUNCHERS = {"accelerate": launch_command_parser, "torchrun": get_args_parser}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipe_is_valid_and_opens_with_its_command(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"recipes/{path.name}" in header
    assert "Hardware:" in header and "Cost:" in header


def test_the_published_recipe():
    """Optimizer, schedule and EMA of MMAudio (arXiv 2412.15322, section 4.1 and the published training code)."""
    recipe = load_recipe(ROOT / "recipes" / "small_16k.yaml")
    assert recipe.model == variant_config("small_16k")
    optim, training = recipe.optim, recipe.training
    assert (optim.learning_rate, optim.betas, optim.eps, optim.weight_decay) == (1e-4, (0.9, 0.95), 1e-6, 1e-6)
    assert (optim.schedule, optim.warmup_steps, optim.milestones, optim.gamma) == (
        "step",
        1000,
        (240_000, 270_000),
        0.1,
    )
    assert (training.steps, training.batch_size, training.mixed_precision) == (300_000, 512, "bf16")
    assert optim.max_grad_norm == 1.0 and recipe.flow.condition_dropout == 0.1
    assert (recipe.ema.sigma_rels, recipe.ema.sigma_rel, recipe.ema.snapshot_every) == ((0.05, 0.1), 0.05, 5000)
    assert [store.repeats for store in recipe.data.train] == [5, 1, 1, 1, 1, 1]
    assert recipe.seed == 14159265


def test_dry_run_prints_the_recipe_and_its_numbers():
    command = [sys.executable, "train.py", "recipes/small_16k.yaml", "--dry-run", "training.accumulation_steps=4"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line in (
        "accumulation_steps: 4",
        "per_process_and_pass: 128",
        "trainable_parameters: 157204756",
        "latent: 250",
    ):
        assert line in result.stdout


def commands() -> list[tuple[str, list[str]]]:
    """Command lines of the pages: in fenced blocks and recipe headers."""
    lines = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            line = re.sub(r"^(#\s*|exec )", "", line.strip())
            if re.match(r"(mmaudio-hf|accelerate launch|torchrun|make|python train\.py) ", line):
                lines.append((f"{page.name}: {line}", shlex.split(line, comments=True)))
    return lines


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda v: v if isinstance(v, str) else "")
def test_command_lines_of_the_documentation(where, words):
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word} <= targets
        return
    if words[0] == "mmaudio-hf":
        check_arguments(words[1:])
        return
    program = "train.py" if "train.py" in words else "mmaudio_hf.cli"  # the latter behind -m
    before, after = words[: words.index(program)], words[words.index(program) + 1 :]
    if "--config_file" in before:
        assert (ROOT / before[before.index("--config_file") + 1]).is_file()
    if words[0] in LAUNCHERS:
        launcher = LAUNCHERS[words[0]]()
        options = [re.sub(r"^\$\w+$", "1", word) for word in before if word not in ("accelerate", "launch", "torchrun")]
        launcher.parse_args([*options, program])  # ends the test where an option is unknown
    check_arguments(["train", *after] if program == "train.py" else after)


def test_bash_of_the_documentation_is_bash():
    blocks = [b for page in PAGES for b in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    assert any("#SBATCH" in block for block in blocks)
    for block in blocks:
        result = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert result.returncode == 0, (block, result.stderr)


def check_arguments(words: list[str]) -> None:
    """The command is known, and a recipe that is named exists and takes the overrides."""
    words = [re.sub(r"^\$SLURM_\w+$", "1", word) for word in words]  # numbers that a scheduler sets
    try:
        options = parse(words)
    except SystemExit:
        pytest.fail(f"the command line does not parse: {' '.join(words)}")
    recipe = getattr(options, "recipe", None) or "$"
    if not recipe.startswith("$") and recipe != "RECIPE":
        load_recipe(ROOT / recipe, getattr(options, "overrides", ()))


def test_every_help_ends_with_an_example(capsys):
    """Each command has one, and it parses; those with a recipe load it."""
    assert EXAMPLES.keys() - {"bench", "store", "weights"} == COMMANDS.keys()  # these have commands below them
    for name, arguments in EXAMPLES.items():
        with pytest.raises(SystemExit) as ending:
            parse([*name.split(), "--help"])
        assert ending.value.code == 0
        assert f"example: mmaudio-hf {name} {arguments}" in capsys.readouterr().out.splitlines()[-1]
        check_arguments([*name.split(), *shlex.split(arguments)])


def commands_of_messages() -> dict[str, str]:
    """Every `mmaudio-hf WORD` in the strings of the package: WORD and where it was seen first."""
    first_seen = {}
    for path in sorted((ROOT / "mmaudio_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for word in re.findall(r"mmaudio-hf\s+([\w-]+)", node.value):
                    first_seen.setdefault(word, f"{path.name}, line {node.lineno}")
    return first_seen


def test_messages_name_commands_that_exist(capsys):
    first_seen = commands_of_messages()
    assert {"extract-video", "partition", "weights"} <= set(first_seen)
    for word, where in first_seen.items():
        with pytest.raises(SystemExit) as ending:
            parse([word, "--help"])
        assert ending.value.code == 0, f"{where}: there is no `mmaudio-hf {word}`"


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_scripts_are_thin_doors(path, monkeypatch, capsys):
    assert len(path.read_text().splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(path), run_name="__main__")
    assert ending.value.code == 0 and "usage: mmaudio-hf" in capsys.readouterr().out


def test_messages_of_the_troubleshooting_page_are_those_of_the_package():
    """The longest literal piece of each quoted message is in the source; others are of the system and of pip."""
    source = "".join(path.read_text() for path in (ROOT / "mmaudio_hf").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that continue on the next line
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(
        r"`([^`]+)`", "".join(line.split(" | ")[0] for line in page.splitlines() if line[:3] == "| `")
    )
    assert len(messages) > 20
    changing = r"\.\.\.|\d+|'[^']*'|ACCELERATE_\w+=\S+|\bN\b|(?:finetune|optim|training|data)\.[.\w]+|DeepSpeed|wandb"
    changing += "|SIG[A-Z]+"
    source += "".join(os.strerror(number) for number in errno.errorcode)
    for message in messages:
        piece = max((piece.strip(" .:") for piece in re.split(changing, message)), key=len)
        assert piece in source or "distribution" in message, f"{message}: {piece!r} is not in the package"
