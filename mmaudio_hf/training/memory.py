"""What a training step costs: bytes of memory and floating-point operations, counted on tensors without data.

A step of the real model is traced on a CPU under `FakeTensorMode`, so that any size is counted on any machine in
seconds, and as CUDA would run it.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmaudio_hf.config import ModelConfig, Recipe
from mmaudio_hf.data.loader import Batch, pack
from mmaudio_hf.data.sampler import Draws
from mmaudio_hf.models.blocks import POINTS, ChannelLastConv1d
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training.checkpointer import BLOCK_BYTES
from mmaudio_hf.training.finetune import frozen_parameters
from mmaudio_hf.training.step import flow_step

FLOAT32 = 4  # bytes
TRACED_BATCH = 1009  # a prime: a storage whose size is a multiple of it has the batch as a dimension


def training_flops(config: ModelConfig) -> int:
    """Floating-point operations of forward and backward of one sample: products, convolutions and attention.

    The backward pass makes every product of the forward pass twice: for its inputs and for its weights.
    """
    with torch.device("meta"):
        model, batch = MMAudio(config), empty_batch(config, 1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(batch.mean, batch.clip_features, batch.sync_features, batch.text_features, batch.noise.z)
    return 3 * counter.get_total_flops()


def empty_batch(config: ModelConfig, size: int) -> Batch:
    """A batch of `size` samples with video and text for a model of these sizes; its numbers are not initialised."""
    latent_shape, present = (config.latent_length, config.latent_channels), torch.ones(size, dtype=torch.bool)
    return Batch(
        step=0,
        mean=torch.empty(size, *latent_shape),
        std=torch.empty(size, *latent_shape),
        text_features=torch.empty(size, config.text_tokens, config.text_dim),
        clip_features=torch.empty(size, config.clip_length, config.clip_dim),
        sync_features=torch.empty(size, config.sync_length, config.sync_dim),
        video_rows=torch.arange(size),
        has_video=present,
        has_text=present,
        source=torch.zeros(size, dtype=torch.int64),
        valid=present,
        ids=[str(i) for i in range(size)],
        noise=Draws.empty(size, latent_shape),
    )


class MemoryEstimate:
    """Memory of a model in training. `make_model` builds it as the run has it, with frozen parameters and adapters."""

    def __init__(self, recipe: Recipe, make_model: Callable[[], MMAudio]) -> None:
        self.recipe = recipe
        with FakeTensorMode():
            model = make_model().train()
            frozen, blocks = set(frozen_parameters(model)), [_count(block.parameters()) for block in model.blocks]
            self.parameters = _count(model.parameters())
            self.weights = sum(p.nbytes for p in model.parameters())  # frozen ones may be in bfloat16
            self.trained = _count(p for p in model.parameters() if p.requires_grad)
            # Of 8 bits: a byte, and a float32 maximum for 256 of them.
            self.moments = int(2 * self.trained * (FLOAT32 if recipe.optim.moments == "float32" else 1 + FLOAT32 / 256))
            self.in_ema = _count(p for name, p in model.named_parameters() if name not in frozen)
            # FSDP gathers what is outside the blocks and one block, and copies it for the computation: the buffers are
            # those of another stream, whose memory the computation cannot take.
            self._gathered = 2 * (self.parameters - sum(blocks) + max(blocks))
            self.transformed = _transformed_bytes(model, recipe) if recipe.training.mixed_precision == "no" else 0
            self._trace = _trace_step(model, recipe)

    def on_device(self, processes: int, accumulation_steps: int, fsdp: bool = False) -> dict[str, int]:
        """Bytes of the tensors on one device, by what they hold, at the peak of a step.

        fsdp: parameters, gradients, moments and EMA weights are sharded over the processes. On a CPU add `transformed`.
        """
        recipe, shards = self.recipe, processes if fsdp else 1
        size = recipe.training.batch_size // processes // accumulation_steps
        # DDP keeps gradients in its buckets, FSDP on a stream of its own, accumulation from pass to pass; else they
        # come while activations go.
        kept = processes > 1 or accumulation_steps > 1
        fixed, per_sample, gradients = self._trace
        activations = fixed + size * per_sample + (0 if kept else gradients)
        return {
            "parameters": self.weights // shards + FLOAT32 * self._gathered * fsdp,
            "optimizer": self.moments // shards,
            "EMA": FLOAT32 * self.in_ema * len(recipe.ema.sigma_rels) // shards,
            "gradients": FLOAT32 * self.trained * kept // shards,
            "activations": int(activations.max()),
            # The loader copies on a stream of its own, whose memory no other can take: the batches of a step, those of
            # the step before, which the loop has until then, and one ahead. One of them is among the activations.
            "batches": FLOAT32 * sum(self._sample_elements) * size * 2 * accumulation_steps,
        }

    def on_host(self, processes: int, machines: int, accumulation_steps: int, fsdp: bool = False) -> dict[str, int]:
        """Bytes of host memory of one machine, as CUDA pins it: the copy that checkpoints are written from, batches.

        Without FSDP the first process alone copies; with it each copies its shards, and the first what is published.
        """
        training, here = self.recipe.training, processes // machines
        state = self.weights + self.moments + self.snapshot
        shards = here * _pinned(state // processes) + FLOAT32 * self.parameters  # what is published is not pinned
        size = training.batch_size // processes // accumulation_steps
        buffers = accumulation_steps + max(self.recipe.data.prefetch_batches, accumulation_steps)  # of `BatchLoader`
        tensors = [FLOAT32 * size * count for count in self._sample_elements]
        blocks, _ = pack(dict(enumerate(buffers * tensors)))
        batches = here * sum(map(_pinned, blocks))
        return {"checkpoint copy": shards if fsdp else _pinned(state), "batches": batches}

    @property
    def _sample_elements(self) -> list[int]:
        """Elements of each large tensor of one sample: its features, the latent's mean and std, and two noises."""
        config = self.recipe.model
        text, clip = config.text_tokens * config.text_dim, config.clip_length * config.clip_dim
        return [text, clip, config.sync_length * config.sync_dim, *[config.latent_length * config.latent_channels] * 4]

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint: weights, moments, EMA weights, and the EMA weights that are published."""
        return self.weights + FLOAT32 * self.parameters + self.moments + self.snapshot

    @property
    def snapshot(self) -> int:
        """Bytes of the EMA snapshots of one step."""
        return FLOAT32 * self.in_ema * len(self.recipe.ema.sigma_rels)


def _pinned(size: int) -> int:
    blocks, rest = divmod(size, BLOCK_BYTES)
    return blocks * BLOCK_BYTES + (1 << (rest - 1).bit_length() if rest else 0)


def _transformed_bytes(model: MMAudio, recipe: Recipe) -> int:
    """Bytes of convolutions' weights that a float32 step on a CPU keeps in transformed form for the backward pass."""

    def of(module: nn.Module) -> int:
        layers = [m for m in module.modules() if isinstance(m, ChannelLastConv1d) and m.kernel_size[0] in POINTS]
        return sum(m.weight.nbytes * (len(POINTS[m.kernel_size[0]]) + 1) // m.kernel_size[0] for m in layers)

    of_blocks = [of(block) for block in model.blocks]
    kept = max(of_blocks) if recipe.training.activation_checkpointing else sum(of_blocks)
    return of(model) - sum(of_blocks) + (0 if recipe.training.compile == "on" else kept)


def _count(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


# --- The trace of a step ---------------------------------------------------------------------------------------------


def _trace_step(model: MMAudio, recipe: Recipe) -> np.ndarray:
    """(3, T) bytes alive after each of T operators of forward and backward, parameters aside; see `_AllocationTrace`.

    Only what has the batch as a dimension grows with it, and operators allocate in the same order at every batch size.
    So each point is linear in the batch size, and the peak at any size is the maximum of `fixed + size * per_sample`.
    """
    model.activation_checkpointing = recipe.training.activation_checkpointing
    trace = _AllocationTrace(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(trace.finish)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.training.mixed_precision == "bf16")
    with trace, _cuda_operators():
        batch = empty_batch(recipe.model, TRACED_BATCH)
        result = flow_step(autocast(model), batch, recipe.flow, model.latent_mean, model.latent_std)
        result.loss.sum().backward()
    return np.array(trace.points).T


class _AllocationTrace(TorchDispatchMode):
    """Bytes alive after every operator: of fixed size, per sample of the batch, and of gradients that are finished."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.points: list[tuple[int, ...]] = []
        self._alive = [0, 0, 0]
        self._storages = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._storages:
                storage = tensor.untyped_storage()
                per_sample, fixed = divmod(storage.nbytes(), TRACED_BATCH)
                kind, size = (0, storage.nbytes()) if fixed else (1, per_sample)
                self._storages.add(key)
                self._alive[kind] += size
                weakref.finalize(storage, self._free, key, kind, size)
        self.points.append(tuple(self._alive))
        return outputs

    def _free(self, key: int, kind: int, size: int) -> None:
        self._storages.remove(key)
        self._alive[kind] -= size

    def finish(self, parameter: torch.Tensor) -> None:
        """Count a gradient as finished; DDP and FSDP move it elsewhere at this point."""
        assert parameter.grad is not None
        self._alive[2] += parameter.grad.nbytes
        parameter.grad = None


@contextmanager
def _cuda_operators() -> Iterator[None]:
    """Replace what a CPU computes otherwise than CUDA: attention and normalisation are one kernel there.

    Its autocast, where it is on, has normalisations and `addcmul` in float32. Convolutions are not products on CUDA.
    """

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            return torch.ops.aten._scaled_dot_product_flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]

    def normalize(x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, *_: Any) -> torch.Tensor:
        x = x.float() if torch.is_autocast_enabled("cpu") else x
        return torch.native_layer_norm(x, shape, weight, None, 1e-5)[0]

    def addcmul(*tensors: torch.Tensor, original: Callable[..., torch.Tensor] = torch.addcmul) -> torch.Tensor:
        return original(*(t.float() for t in tensors) if torch.is_autocast_enabled("cpu") else tensors)

    replaced = patch.multiple(F, scaled_dot_product_attention=attention, layer_norm=normalize, rms_norm=normalize)
    convolve = patch.object(torch.compiler, "is_compiling", lambda: True)  # see `ChannelLastConv1d`
    with replaced, convolve, patch.object(torch, "addcmul", addcmul):
        yield
