"""How much memory a recipe takes on a device, found without allocating it."""

from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmaudio_hf.config import Recipe, micro_batch_size
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import TEXT_FEATURES, column_shapes

_FLOAT = 4  # bytes


def training_memory(recipe: Recipe, processes: int, make_network: Callable[[], MMAudio]) -> dict[str, int]:
    """Bytes on one device by what they hold, when training is at its peak; the context of a GPU comes on top.

    `make_network` builds the network as the run has it. Activations are what backward needs of a pass over tensors
    without data, at two batch sizes, continued in a straight line.
    """
    size = micro_batch_size(recipe.training, processes)
    with FakeTensorMode():
        network = make_network().train()
        parameters = sum(p.numel() for p in network.parameters())
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        one, two = (_saved_bytes(network, recipe, batch) for batch in (1, 2))
    columns = column_shapes(recipe.model.mode, recipe.model.duration)
    numbers = sum(a * b for a, b in columns.values()) + 2 * columns["mean"][0] * columns["mean"][1]
    del columns[TEXT_FEATURES]
    activations, accumulation = one + (two - one) * (size - 1), recipe.training.accumulation_steps
    # Gradients are freed before a step, and made while activations go; DDP keeps buckets of them all the time.
    kept = (processes > 1) + (accumulation > 1)
    return {
        "parameters": _FLOAT * parameters,
        "optimizer": 2 * _FLOAT * trained,
        "EMA": _FLOAT * parameters * len(recipe.ema.sigma_rels),
        "kept gradients": _FLOAT * trained * kept,
        "activations": max(activations, _FLOAT * trained),
        "batches": _FLOAT * numbers * size * (1 + accumulation),
    }


def _saved_bytes(network: MMAudio, recipe: Recipe, batch: int) -> int:
    """Bytes that autograd keeps of a forward pass, parameters aside; every storage once."""
    model = recipe.model
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    inputs = (
        torch.empty(batch, model.latent_length, model.latent_channels),
        torch.empty(batch, model.clip_length, model.clip_dim),
        torch.empty(batch, model.sync_length, model.sync_dim),
        torch.empty(batch, model.text_tokens, model.text_dim),
        torch.empty(batch),
    )
    missing = torch.zeros(batch, dtype=torch.bool)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=recipe.training.mixed_precision == "bf16")
    with precision, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        velocity = network(*inputs, clip_missing=missing, sync_missing=missing, text_missing=missing)
        loss = velocity.float().square().sum()
    kept_bytes = sum(kept.values())
    del loss
    return kept_bytes
