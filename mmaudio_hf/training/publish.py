"""`pretrained_model/`: the folder that generation and the Hub read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmaudio_hf.config import Recipe
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training.finetune import published_state, save_adapter


def published_network(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> MMAudio:
    """The network with `tensors`, which are named as in the training of `recipe`: an adapter is merged."""
    return MMAudio.from_config_and_state(recipe.model, published_state(tensors, recipe.finetune.lora), "these weights")


def write_pretrained(
    recipe: Recipe,
    tensors: Mapping[str, torch.Tensor],
    weights: Mapping[str, Any],
    write_extras: Callable[[Path], None],
    folder: Path,
) -> None:
    """Fill `folder` with the network of `tensors` and what `write_extras` adds; an adapter goes beside it as well.

    `weights` says in weights.json which weights of the run they are.
    """
    published_network(recipe, tensors).save_pretrained(folder)
    if recipe.finetune.lora.rank:
        save_adapter(tensors, recipe, folder.with_name("adapter"))
    (folder / "weights.json").write_text(json.dumps(weights) + "\n")
    write_extras(folder)
