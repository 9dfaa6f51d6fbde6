"""Every command in the blocks of README and docs/: its options exist, and its recipes take its settings."""

import re
import shlex
from pathlib import Path

import pytest

from mmaudio_hf.cli import parse
from mmaudio_hf.config import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Up to the arguments of `mmaudio-hf`, or of train.py.
TRAIN = r"(?:accelerate launch|torchrun|python) .*(train\.py|-m mmaudio_hf\.train) "
COMMAND = re.compile(rf"^(?:exec )?(?:mmaudio-hf |.*-m mmaudio_hf\.cli |{TRAIN})")


def commands() -> list:
    cases = []
    for page in PAGES:
        fenced = False
        lines = page.read_text().splitlines()
        for number, line in enumerate(lines, start=1):
            fenced ^= line.startswith("```")
            for following in lines[number:]:
                if not line.endswith("\\"):
                    break
                line = line.removesuffix("\\") + following
            if (fenced or line.startswith("    ")) and (match := COMMAND.match(line.strip())):
                words = (["train"] if match[1] else []) + shlex.split(line.strip()[match.end() :], comments=True)
                cases.append(pytest.param(words, id=f"{page.name}:{number}"))
    return cases


@pytest.mark.parametrize("words", commands())
def test_a_documented_command_is_one(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [re.sub(r"\$\w+", "1", word) for word in words if not word.startswith(("[", "key=value"))]
    options = parse(words)
    recipe = getattr(options, "recipe", None)
    if recipe and Path(recipe).is_file():
        load_recipe(recipe, options.overrides if hasattr(options, "overrides") else [])
    else:
        assert recipe in (None, "RECIPE") or recipe.startswith(("my", "output/")), f"{recipe} is not in the repository"
