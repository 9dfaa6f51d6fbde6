"""What makes a step faster or smaller: TF32, torch.compile, and networks whose tensors are shared out (FSDP).

Under FSDP every process holds a slice of each parameter, gradient, moment and average, as a DTensor; the tensors of a
block are gathered while it runs. Each saves its slices; what is published is gathered on the first one.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    convert_outputs_to_fp32,
    gather_object,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import RunError

SHARED_SECONDS = 30.0  # until a file that one machine has written is seen by another: network file systems remember


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA may round the inputs of float32 products and convolutions to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def should_compile(mode: str, device: torch.device) -> bool:
    """Whether to compile with `training.compile` as it is: "auto" does on CUDA only."""
    return mode == "on" or (mode == "auto" and device.type == "cuda")


def compile_blocks(network: MMAudio, say: Callable[[str], None], required: bool = False) -> bool:
    """Compile the transformer blocks, each on its own; return whether they are. Names of parameters stay as they are.

    One block is tried first, forward and backward. Where that fails, `say` is told why and training goes on without;
    RunError when it is `required`.
    """
    if reason := probe_compile(network):
        if required:
            raise RunError(f"torch.compile does not work here, set training.compile=off: {reason}")
        say(f"note: torch.compile does not work here, training goes on without it: {reason}")
        return False
    for block in network.blocks:
        block.compile()
    return True


def probe_compile(network: MMAudio) -> str | None:
    """Why a block of the network cannot be compiled on its device, in one line; None when it can."""
    block = copy.deepcopy(network.blocks[0])
    block.compile()
    weight = network.sync_pos_emb
    latent, clip, text = (
        weight.new_zeros(1, n, network.config.hidden_dim)
        for n in (network.latent_length, network.clip_length, network.config.text_tokens)
    )
    try:
        outputs = block(latent, clip, text, latent, latent[:, :1], network._latent_table, network._clip_table)
        outputs[0].sum().backward()
    except Exception as error:  # whatever a compiler, its libraries and the driver can raise
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    finally:
        torch._dynamo.reset()
    return None


# --- several processes, and machines -------------------------------------------------------------------------------


def check_same_everywhere(facts: Mapping[str, Any]) -> None:
    """ValueError, on every process, naming the first of `facts` that is not the same on all; called on each of them."""
    told = gather_object([dict(facts)])
    for rank, theirs in enumerate(told):
        for name, fact in told[0].items():
            if theirs.get(name) != fact:
                raise ValueError(
                    f"the processes are not of one run: {name} is {fact} for process 0 and {theirs.get(name)} for"
                    f" process {rank}; every machine needs the same command, the same stores and a run folder on a file"
                    " system that all of them share"
                )


def check_visible_everywhere(path: Path) -> None:
    """ValueError, on every process, when one of them does not see the file, if the first has written it."""
    [there] = broadcast_object_list([path.exists()])
    check_same_everywhere({f"the presence of {path}": _comes(path) if there else path.exists()})


def _comes(path: Path) -> bool:
    """Whether a file that another machine may have written is there, or is soon."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return path.exists()


def first_error(problem: str | None) -> str | None:
    """The problem of the first process that has one, None when none has; called on each of them."""
    return next((found for found in gather_object([problem]) if found is not None), None)


def make_shared_folder(make: Callable[[], Path]) -> tuple[Path | None, str | None]:
    """The folder that `make` makes on the first process, or None and the reason when it fails or one does not see it.

    Called on every process; `make` is once all of them have come here.
    """
    state, found = PartialState(), [None, None]
    state.wait_for_everyone()
    if state.is_main_process:
        try:
            found[0] = make()
        except OSError as error:
            found[1] = str(error)
    folder, problem = broadcast_object_list(found)
    if problem is None:
        unseen = f"process {state.process_index} does not see {folder}"
        problem = first_error(None if _comes(folder) else unseen)
    return (folder, None) if problem is None else (None, problem)


# --- FSDP ----------------------------------------------------------------------------------------------------------


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """What the launch says about FSDP, None without it; ValueError for settings that are not supported.

    It is read from the launcher's environment, since accelerate itself leaves FSDP out on machines without GPUs.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP is supported in version 2 alone: use accelerate_configs/fsdp.yaml")
    plugin = FullyShardedDataParallelPlugin()
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("fsdp_offload_params is not supported: set it to false")
    if plugin.activation_checkpointing:
        raise ValueError("set training.activation_checkpointing in the recipe, and fsdp_activation_checkpointing false")
    return plugin


def apply_fsdp(network: MMAudio, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Share out the tensors of the network over all processes, block by block; what is left is one more group.

    Weights stay float32 and are gathered as such; bf16 is that of autocast, as without FSDP. An optimizer and averages
    must be made afterwards.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in network.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(network, mesh=mesh)
    network.forward = convert_outputs_to_fp32(accelerator.autocast()(network.forward))


@contextmanager
def no_sync(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[None]:
    """Gradients are kept by each process, to be summed with those of later passes before they are exchanged."""
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def gather_full_tensors(
    groups: Mapping[str, Mapping[str, torch.Tensor]], keep: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """Groups of named tensors. Where some are shared out, copies of all in host memory; called on every process.

    One tensor at a time is gathered on the device. Processes that do not `keep` them get empty groups.
    """
    shared_out = any(isinstance(tensor, DTensor) for tensors in groups.values() for tensor in tensors.values())
    gathered: dict[int, torch.Tensor] = {}
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in groups}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if shared_out and id(tensor) not in gathered:
                part = tensor.detach()
                part = part.full_tensor() if isinstance(part, DTensor) else part
                gathered[id(tensor)] = part.to("cpu", copy=True) if keep else part.new_empty(0)
            if keep:
                found[group][name] = gathered.get(id(tensor), tensor)
    return found


def full_shapes(groups: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, list[int]]]:
    """Shapes of the tensors that are shared out, by group; groups without any are left out."""
    shapes = {
        group: {name: list(tensor.shape) for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        for group, tensors in groups.items()
    }
    return {group: found for group, found in shapes.items() if found}


def local_shards(groups: Mapping[str, Mapping[str, torch.Tensor]], first: bool) -> dict[str, dict[str, torch.Tensor]]:
    """What this process saves: its slices of the tensors that are shared out, and if it is the `first` all others."""
    return {
        group: {name: local_shard(tensor) for name, tensor in tensors.items() if first or isinstance(tensor, DTensor)}
        for group, tensors in groups.items()
    }


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_full_tensor(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor into `target`, or this process's slice of it where `target` is shared out."""
    target.copy_(shard_like(target, value))


def shard_like(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, on the device of `target` and shared out as it is."""
    value = value.to(target.device)
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


@contextmanager
def swap_weights(network: MMAudio, weights: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Meanwhile the parameters in `weights` have these values, and `weights` theirs; they are exchanged back after."""
    _exchange(network, weights or {})
    try:
        yield
    finally:
        _exchange(network, weights or {})


@torch.no_grad()
def _exchange(network: MMAudio, weights: Mapping[str, torch.Tensor]) -> None:
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass leaves the outermost group gathered, where changes would not last
    for name, theirs in weights.items():
        ours = network.get_parameter(name)
        kept = ours.clone()
        ours.copy_(theirs)
        theirs.copy_(kept)
