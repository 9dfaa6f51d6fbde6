"""Released flow models: which one a state dict is, the order of its tensors, and conversion to `pretrained_model`."""

import dataclasses
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmaudio_hf.config import VARIANTS, ModelConfig, variant_config
from mmaudio_hf.models.network import FROZEN_TENSORS, MMAudio
from mmaudio_hf.models.pretrained import DERIVED_TENSORS
from mmaudio_hf.schema import MODES
from mmaudio_hf.weights import describe, load_state, write_safetensors

FLOW_TENSOR = "audio_input_proj.0.weight"  # in every flow model, and in no other released file
SIZES = (
    "mode", "hidden_dim", "num_heads", "depth", "fused_depth", "v2", "clip_dim", "sync_dim", "text_dim", "text_tokens"
)  # fmt: skip
_BLOCK = re.compile(r"(joint_blocks\.\d+\.\w+|fused_blocks\.\d+)\.")


def is_flow_state(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether `state` is that of a flow network."""
    return FLOW_TENSOR in state


def infer_config(state: Mapping[str, torch.Tensor], source: Any) -> ModelConfig:
    """Configuration of the flow network that `state` belongs to, from its names and shapes, at 8 s.

    The variant is the released one of these sizes; other sizes are written out under a variant of the same mode and
    version. ValueError, naming `source`, where `state` is not that of a flow network.
    """
    try:
        hidden, channels = state[FLOW_TENSOR].shape[:2]
        fused = _count(state, "fused_blocks")
        text_tokens, text_dim = state["empty_string_feat"].shape
        sizes: dict[str, Any] = {
            "mode": next(mode.name for mode in MODES.values() if mode.latent_channels == channels),
            "hidden_dim": hidden,
            "num_heads": hidden // len(state["joint_blocks.0.latent_block.attn.q_norm.weight"]),
            "depth": _count(state, "joint_blocks") + fused,
            "fused_depth": fused,
            "v2": "clip_input_proj.2.w1.weight" in state,
        }
        others: dict[str, Any] = {
            "clip_dim": state["empty_clip_feat"].shape[1],
            "sync_dim": state["empty_sync_feat"].shape[1],
            "text_dim": text_dim,
            "text_tokens": text_tokens,
        }
    except (KeyError, ValueError, IndexError, StopIteration, AttributeError) as error:
        raise ValueError(
            f"{describe(source)} is not a flow network of MMAudio: its names or shapes do not fit ({error!r})"
        ) from None
    exact = [name for name, fixed in VARIANTS.items() if sizes == {"v2": False} | fixed]
    alike = [name for name, fixed in VARIANTS.items() if fixed["mode"] == sizes["mode"]]
    if sizes["v2"]:
        alike = [name for name in alike if VARIANTS[name].get("v2")] or alike
    return ModelConfig(**{"variant": (exact or alike)[0], **sizes, **others})


def _count(state: Mapping[str, torch.Tensor], blocks: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})


def check_variant(config: ModelConfig, variant: str, source: Any) -> None:
    """ValueError unless `config`, inferred from `source`, has the sizes of the released `variant`."""
    expected = variant_config(variant)
    for name in SIZES[:6]:
        ours, theirs = getattr(expected, name), getattr(config, name)
        if ours != theirs:
            raise ValueError(
                f"{describe(source)} is not {variant}: {name} is {theirs}, not {ours};"
                f" leave the variant out, and it is recognised"
            )


def check_sizes(config: ModelConfig, recipe_config: ModelConfig, source: Any) -> None:
    """ValueError unless weights of the sizes of `config` fit the recipe; durations may differ."""
    for name in SIZES:
        ours, theirs = getattr(recipe_config, name), getattr(config, name)
        if ours != theirs:
            raise ValueError(
                f"{describe(source)} has model.{name} {theirs}, the recipe {ours}:"
                f" use a recipe of {config.variant}, or set the sizes"
            )


def reference_order(names: Iterable[str]) -> list[str]:
    """`names` of a flow model in the order in which the reference implementation registers its parameters.

    That is the order of the released state dicts, and of the numbers in an optimizer state (which has no frozen
    tensors). Ours differs in the blocks: there the modulation comes last in the reference implementation.
    """
    order: dict[str, int] = {}

    def key(name: str) -> tuple[int, bool]:
        block = _BLOCK.match(name)
        return order.setdefault(block[1] if block else name, len(order)), bool(block) and "adaLN" in name

    return sorted(names, key=key)  # stable: only the modulations move


def trainable(names: Iterable[str]) -> list[str]:
    """`names` without those of frozen tensors, which no optimizer holds."""
    return [name for name in names if name not in FROZEN_TENSORS]


def write_pretrained(
    state: Mapping[str, torch.Tensor], folder: Path, source: Any, variant: str | None = None
) -> ModelConfig:
    """Write released weights as a `pretrained_model` folder (config.json, model.safetensors); return the config.

    `variant` is recognised when it is not given. The folder must not exist; it appears only when it is complete.
    ValueError naming `source` and the first tensors that do not fit.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists: choose a new folder")
    config = infer_config(state, source)
    if variant is not None:
        check_variant(config, variant, source)
        config = dataclasses.replace(config, variant=variant)
    stored = {name: value for name, value in state.items() if name not in DERIVED_TENSORS}
    model = MMAudio.from_config_and_state(config, stored, source)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def read_released(source: Any) -> dict[str, torch.Tensor]:
    """Named tensors of a released file, also where they are one entry of it (`weights`, `generator`, `state_dict`)."""
    problems = []
    for key in ("weights", "generator", "state_dict"):
        try:
            return load_state(source, key=key)
        except ValueError as error:
            problems.append(error)
    raise problems[0]


def convert_file(file: str | Path, out: str | Path, variant: str | None = None) -> str:
    """Convert a released file; return a sentence on the result.

    A flow network becomes a `pretrained_model` folder `out` that `MMAudio.from_pretrained` reads; its variant is
    recognised from its shapes, or checked against `variant`. Any other file becomes plain safetensors `out`.
    """
    file, out = Path(file), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: choose a new name")
    state = read_released(file)
    out.parent.mkdir(parents=True, exist_ok=True)
    if is_flow_state(state):
        config = write_pretrained(state, out, file, variant)
        return f"{out}: flow network {config.variant}, hidden {config.hidden_dim}, depth {config.depth}"
    if variant is not None:
        raise ValueError(f"{file} is not a flow network of MMAudio: --variant has no meaning for it")
    if out.suffix != ".safetensors":
        raise ValueError(f"{file} is not a flow network and becomes one file: give {out} the ending .safetensors")
    partial = out.with_name(out.name + ".partial")
    # Copied, because tensors of one file may share memory, which safetensors rejects.
    write_safetensors({name: value.clone() for name, value in state.items()}, partial)
    partial.replace(out)
    return f"{out}: {len(state)} tensors"
