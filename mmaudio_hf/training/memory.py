"""How much memory a recipe takes on a device, found without allocating it."""

from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmaudio_hf.config import ModelConfig, Recipe
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import column_shapes
from mmaudio_hf.training.finetune import frozen_parameters

_FLOAT = 4  # bytes


class MemoryEstimate:
    """Sizes of a network in training. `make_network` builds it as the run has it, with its frozen parts and adapters.

    Activations are what backward needs of a pass over tensors without data, at two batch sizes, continued in a straight
    line.
    """

    def __init__(self, recipe: Recipe, make_network: Callable[[], MMAudio]):
        self.recipe = recipe
        with FakeTensorMode():
            network = make_network().train()
            self.parameters = sum(p.numel() for p in network.parameters())
            self.trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
            without = set(frozen_parameters(network))
            self.averaged = sum(p.numel() for name, p in network.named_parameters() if name not in without)
            one, two = (_activation_bytes(network, recipe, batch) for batch in (1, 2))
        self._fixed, self._per_sample = 2 * one - two, two - one

    def on_device(self, processes: int, accumulation_steps: int, fsdp: bool = False) -> dict[str, int]:
        """Bytes on one device by what they hold, at the peak of a step; the context of a GPU comes on top.

        fsdp: weights, moments and averages are shared out over the processes, and two blocks are gathered at a time.
        """
        recipe = self.recipe
        size = recipe.training.batch_size // processes // accumulation_steps
        shapes = column_shapes(recipe.model.mode, recipe.model.duration)
        numbers = sum(a * b for a, b in shapes.values()) + 2 * shapes["mean"][0] * shapes["mean"][1]  # and the noise
        activations = self._fixed + self._per_sample * size
        # Gradients are freed before a step, and made while activations go; DDP keeps buckets of them all the time.
        kept = (processes > 1 and not fsdp) + (accumulation_steps > 1)
        shares = processes if fsdp else 1
        gathered = 2 * self.parameters // recipe.model.depth if fsdp else 0
        return {
            "parameters": _FLOAT * (self.parameters // shares + gathered),
            "optimizer": 2 * _FLOAT * self.trained // shares,
            "EMA": _FLOAT * self.averaged * len(recipe.ema.sigma_rels) // shares,
            "kept gradients": _FLOAT * self.trained * kept,
            "activations": max(activations, _FLOAT * self.trained // shares),
            "batches": _FLOAT * numbers * size * (1 + accumulation_steps),
        }

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint: weights, optimizer, averages, and the averages that are published."""
        return _FLOAT * (2 * self.parameters + 2 * self.trained) + self.snapshot

    @property
    def snapshot(self) -> int:
        """Bytes of the EMA snapshots of one step."""
        return _FLOAT * self.averaged * len(self.recipe.ema.sigma_rels)


def _activation_bytes(network: MMAudio, recipe: Recipe, batch: int) -> int:
    network.activation_checkpointing = False
    whole = _saved_bytes(network, recipe, batch)
    if not recipe.training.activation_checkpointing:
        return whole
    network.activation_checkpointing = True
    outside, blocks, model = _saved_bytes(network, recipe, batch), recipe.model.depth, recipe.model
    tokens = model.latent_length + model.clip_length + model.text_tokens
    # Of the blocks their inputs are left, and all of the one that is run again; a joint block may be two of the others.
    inputs = _FLOAT * batch * tokens * model.hidden_dim * blocks
    return min(whole, outside + inputs + 2 * (whole - outside) // blocks)


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
    del loss  # until here: a storage that is freed could give its number to the next one
    return kept_bytes


# --- Floating-point operations of the flow network -------------------------------------------------------------------


def forward_flops(config: ModelConfig) -> int:
    """Operations of one forward pass of one sample."""
    dim, latent, clip, text = config.hidden_dim, config.latent_length, config.clip_length, config.text_tokens
    embedded = dim if config.v2 else 256
    total = _map(latent, config.latent_channels, dim, 7) + _gated(latent, dim, 7)
    total += _map(config.sync_length, config.sync_dim, dim, 7) + _gated(config.sync_length, dim, 3)
    total += _map(clip, config.clip_dim, dim) + _gated(clip, dim, 3)
    total += _map(text, config.text_dim, dim) + _gated(text, dim)
    total += _map(1, embedded, dim) + 3 * _map(1, dim, dim) + _gated(1, dim)  # time, and the global condition
    for number in range(config.joint_depth):
        ends = number == config.joint_depth - 1  # the last joint block reads the other streams and leaves them
        total += _block(latent, latent, dim, 3) + _block(clip, 1, dim, 3, ends) + _block(text, 1, dim, 1, ends)
        total += _attention(latent + clip + text, dim)
    total += config.fused_depth * (_block(latent, latent, dim, 3) + _attention(latent, dim))
    return total + _map(1, dim, 2 * dim) + _map(latent, dim, config.latent_channels, 7)


def training_flops(config: ModelConfig) -> int:
    """Operations of forward and backward of one sample: the backward pass makes every product twice over."""
    return 3 * forward_flops(config)


def _map(tokens: int, inputs: int, outputs: int, kernel_size: int = 1) -> int:
    return 2 * tokens * inputs * outputs * kernel_size


def _gated(tokens: int, dim: int, kernel_size: int = 1) -> int:
    hidden = -(-int(8 * dim / 3) // 256) * 256
    return 3 * _map(tokens, dim, hidden, kernel_size)


def _attention(tokens: int, dim: int) -> int:
    return 2 * _map(tokens, tokens, dim)


def _block(tokens: int, conditions: int, dim: int, kernel_size: int, pre_only: bool = False) -> int:
    """One stream's share: queries, keys, values and modulation, and unless `pre_only` output map and feed-forward."""
    total = _map(tokens, dim, 3 * dim) + _map(conditions, dim, (2 if pre_only else 6) * dim)
    return total if pre_only else total + _map(tokens, dim, dim, kernel_size) + _gated(tokens, dim, kernel_size)
