"""Reading of released weight files: never running code from them, and strict about what they hold."""

import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

SHOWN_PROBLEMS = 4


def describe(source) -> str:
    """Origin of a state dict for messages: the path, or that it was given as a dict."""
    return "the given state dict" if isinstance(source, Mapping) else str(source)


def read_file(source: str | PathLike):
    """Content of a weight file, whatever its form: tensors on the CPU in dicts, lists or alone, and plain values.

    ValueError naming the file when it is absent, damaged, or a pickle that would run code.
    """
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"{path} is not a file: correct the path, or fetch released weights with `mmaudio-hf weights download`"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Only the zip format of torch.save can be mapped; older files are read whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        if "global" in str(error).lower():
            reason = "it is a pickle that would run code, which is never done: use a file of tensors alone"
        else:
            reason = "it is damaged or not a file of weights: download it again"
        raise ValueError(f"{path} is refused: {reason}") from None  # torch's message recommends to run the code
    except (SafetensorError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a file of weights: download it again ({error})") from error


def load_state(
    source: str | PathLike | Mapping, *, prefix: str = "", key: str | None = None
) -> dict[str, torch.Tensor]:
    """Return the named tensors of a released file (`.safetensors`, else torch.save), or of a dict like it.

    `key` is the entry that holds the state dict where a file has several parts, and `prefix` opens the names
    wanted: it is cut off, other names are dropped. A source without the key, or without any name under the prefix, is
    taken as the bare state dict. Tensors of files are mapped where the format allows, so that large files open at once.
    Raises ValueError for anything else than a readable file of tensors; pickled code is never run.
    """
    state = source if isinstance(source, Mapping) else read_file(source)
    if key is not None and isinstance(state, Mapping) and key in state:
        state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"{describe(source)} holds a {type(state).__name__}, not named tensors")
    state = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)} or dict(state)
    if strangers := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"{describe(source)} holds entries that are not tensors, as {strangers[:SHOWN_PROBLEMS]}")
    return state


def check_state(state: Mapping, expected: Mapping, source) -> None:
    """Raise one ValueError that names the first missing, unexpected or misshapen tensors of `state`.

    `expected` maps names to tensors (of any device, also meta) with the right shape and dtype.
    """
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not expected" for name in state if name not in expected]
    for name in (name for name in expected if name in state):
        ours, theirs = expected[name], state[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name} has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
        elif ours.dtype != theirs.dtype:
            problems.append(f"{name} is {theirs.dtype}, not {ours.dtype}")
    if problems:
        more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        listed = "; ".join(problems[:SHOWN_PROBLEMS])
        raise ValueError(f"{describe(source)} does not fit this network: {listed}{more}")


def load_strict(module: nn.Module, state: Mapping, source) -> nn.Module:
    """Put `state` into `module`, frozen and in evaluation mode, after `check_state`; returns `module`.

    A module built on the meta device takes the tensors as they are, without a copy: it shares their memory.
    `source` is what `load_state` was given and only names the origin in messages.
    """
    own = module.state_dict()
    check_state(state, own, source)
    placed = {name: value if own[name].is_meta else value.to(own[name].device) for name, value in state.items()}
    module.load_state_dict(placed, assign=True)
    return module.requires_grad_(False).eval()
