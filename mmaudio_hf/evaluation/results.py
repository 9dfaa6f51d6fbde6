"""Files of scores: RUN/evaluation/SPLIT_step_N.json, one per evaluated split and weights.

Those of other settings or weights than the run's own are SPLIT_step_N_VARIANT.json.

format, run, split, step                  what was evaluated
weights                                   as in weights.json: raw or EMA, sigma_rel, step
settings                                  how the sound was made
items                                     listed, scored, and dropped with reasons
scores                                    NAME: value, unit, better, used, dropped, note
not_computed                              what was asked for and why it is not there
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from mmaudio_hf.schema import RunError

FORMAT = 1
FOLDER = "evaluation"


def scores_file(folder: Path, split: str, step: int | None, variant: str = "") -> Path:
    """Where the scores of a split are; `step` None for weights that do not say how long they were trained."""
    name = split if step is None else f"{split}_step_{step}"
    return folder / (f"{name}_{variant}.json" if variant else f"{name}.json")


def read_key(folder: Path) -> str | None:
    """What the content of `folder` belongs to; None where that is not noted, or cannot be read."""
    with suppress(OSError, ValueError):
        return json.loads((folder / "key.json").read_text())
    return None


def write_key(folder: Path, key: str) -> None:
    """Note what the content of `folder` belongs to."""
    partial = folder / "key.json.partial"
    partial.write_text(json.dumps(key))
    partial.replace(folder / "key.json")


def write_scores(path: Path, content: Mapping[str, Any]) -> None:
    """Write one file of scores, beside its place first."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    partial.replace(path)


def read_scores(path: str | PathLike) -> dict[str, Any]:
    """One file of scores. ValueError when it is something else."""
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != FORMAT or not isinstance(content["scores"], dict):
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of scores: {error}") from error
    return content


def find_scores(run_dir: str | PathLike, split: str = "") -> list[dict[str, Any]]:
    """All scores of a run (of `split` alone) with its own settings, by split and step; no damaged files."""
    found = []
    for path in (Path(run_dir) / FOLDER).glob("*.json"):
        if re.fullmatch(r"(validation|test)(_step_\d+)?\.json", path.name):
            try:
                content = read_scores(path)
            except ValueError:
                continue
            if split in ("", content["split"]):
                found.append(content)
    return sorted(found, key=lambda content: (content["split"], content["step"] or 0))


def together(function: Callable[[], Any]) -> list[Any]:
    """What `function` returned on every process, in their order; RunError on all of them when it failed on one."""
    try:
        outcome = (function(), None)
    except (OSError, ValueError, RuntimeError) as error:  # CUDA raises the last of these when memory is short
        outcome = (None, str(error))
    outcomes = gather_object([outcome])
    for _, error in outcomes:
        if error is not None:
            raise RunError(error)
    return [result for result, _ in outcomes]


def everything(function: Callable[[], list]) -> list:
    """The entries of the lists that `function` returned on every process."""
    return [entry for result in together(function) for entry in result]


def digest(plain: Mapping[str, Any], *more: str) -> str:
    """SHA-256 of plain values and texts."""
    text = json.dumps(plain, sort_keys=True) + "".join(f"\n{part}" for part in more)
    return hashlib.sha256(text.encode()).hexdigest()
