"""Work that all processes of an evaluation share: done by each, collected by all, and failing on all of them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from accelerate.utils import gather_object

from mmaudio_hf.schema import RunError


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
