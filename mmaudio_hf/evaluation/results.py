"""Files of scores: RUN/evaluation/SPLIT_step_N.json, one per evaluated split and weights.

Those of other settings or weights than the run's own are SPLIT_step_N_VARIANT.json.

format, run, split, step                  what was evaluated
weights                                   as in weights.json: raw or EMA, sigma_rel, step
settings                                  how the audio was generated
items                                     listed, scored, and dropped with reasons
scores                                    NAME: value, unit, better, used, dropped, note
not_computed                              scores that were requested, and why they are missing
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from mmaudio_hf.files import write_text
from mmaudio_hf.schema import RunError

FORMAT = 1
FOLDER = "evaluation"


def scores_file(folder: Path, split: str, step: int | None, variant: str = "") -> Path:
    """File of the scores of a split; `step` None for weights that do not say how long they were trained."""
    name = split if step is None else f"{split}_step_{step}"
    return folder / (f"{name}_{variant}.json" if variant else f"{name}.json")


def read_key(folder: Path) -> str | None:
    """The key that `write_key` left in `folder`; None without one that can be read."""
    with suppress(OSError, ValueError):
        return json.loads((folder / "key.json").read_text())
    return None


def write_key(folder: Path, key: str) -> None:
    """Record in `folder` the hash of what its content was made from."""
    write_text(folder / "key.json", json.dumps(key))


def write_scores(path: Path, content: Mapping[str, Any]) -> None:
    """Write one file of scores."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_scores(path: str | PathLike) -> dict[str, Any]:
    """One file of scores. ValueError when it is something else."""
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != FORMAT or not isinstance(content["scores"], dict):
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of scores: {error}") from error
    return content


def find_scores(run_dir: str | PathLike, split: str = "") -> list[dict[str, Any]]:
    """All scores of a run (of `split` alone) with its own settings, by split and step; no damaged files."""
    contents = []
    for path in (Path(run_dir) / FOLDER).glob("*.json"):
        if re.fullmatch(r"(validation|test)(_step_\d+)?\.json", path.name):
            try:
                content = read_scores(path)
            except ValueError:
                continue
            if split in ("", content["split"]):
                contents.append(content)
    return sorted(contents, key=lambda content: (content["split"], content["step"] or 0))


def gather_results(function: Callable[[], Any]) -> list[Any]:
    """What `function` returned on every process, in their order; RunError on all of them when it failed on one.

    A collective: every process calls it.
    """
    outcome: tuple[Any, str | None]
    try:
        outcome = (function(), None)
    except (OSError, ValueError, RuntimeError) as error:  # CUDA raises the last of these when memory is short
        outcome = (None, str(error))
    outcomes = gather_object([outcome])
    for _, problem in outcomes:
        if problem is not None:
            raise RunError(problem)
    return [result for result, _ in outcomes]


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returned on the main process, on every process; RunError on all of them when it failed."""
    return gather_results(lambda: function() if PartialState().is_main_process else None)[0]


def digest(plain: Mapping[str, Any], *more: str) -> str:
    """SHA-256 of plain values and texts."""
    text = json.dumps(plain, sort_keys=True) + "".join(f"\n{line}" for line in more)
    return hashlib.sha256(text.encode()).hexdigest()
