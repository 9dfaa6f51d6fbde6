"""Several processes and what makes a step faster or smaller: TF32, torch.compile, FSDP.

Under FSDP every process has a shard of each parameter, gradient, optimizer moment and EMA weight, as a DTensor; the
parameters of a block are gathered while it runs. Each process saves its shards; what is published is gathered first.
"""

import copy
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    broadcast_object_list,
    convert_outputs_to_fp32,
    gather_object,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mmaudio_hf.config import Recipe, TrainingConfig, micro_batch_size, to_dict
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import PROCESS_TIMEOUT, RunError

SHARED_SECONDS = 30.0  # until one machine sees a file that another has written: network file systems cache listings

STEP_TIMEOUT = timedelta(minutes=10)  # as torch has it for NCCL; compiling the first step takes a few

TensorGroups = Mapping[str, Mapping[str, torch.Tensor]]
"""Named tensors by group, as checkpoints have them: model, optimizer, ema, ..."""


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA may round the inputs of float32 matrix products and convolutions to TF32 (10 bits of mantissa)."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def should_compile(mode: str, device: torch.device) -> bool:
    """Whether `training.compile` means to compile: "auto" does on CUDA only."""
    return mode == "on" or (mode == "auto" and device.type == "cuda")


def compile_blocks(model: MMAudio, log: Callable[[str], None], required: bool = False) -> bool:
    """Compile the transformer blocks; return whether they are. Parameter names stay as they are.

    One block is tried first, forward and backward. Where that fails, the reason is logged and training runs without;
    RunError when it is `required`.
    """
    if reason := probe_compile(model):
        if required:
            raise RunError(f"torch.compile does not work here, set training.compile=off: {reason}")
        log(f"note: torch.compile does not work here, training runs without it: {reason}")
        return False
    model.compile_blocks()
    return True


def probe_compile(model: MMAudio) -> str | None:
    """Why a block of the model cannot be compiled on its device, in one line; None when it can."""
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "it is switched off by TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE"
    block = copy.deepcopy(model.blocks[0])
    block.compile()
    latent, clip, text = (
        model.sync_pos_emb.new_zeros(1, length, model.config.hidden_dim)
        for length in (model.latent_length, model.clip_length, model.config.text_tokens)
    )
    try:
        with torch._dynamo.config.patch(suppress_errors=False):  # a variable lets what fails run without a word
            outputs = block(latent, clip, text, latent, latent[:, :1], model._latent_table, model._clip_table)
            outputs[0].sum().backward()
    except Exception as error:  # whatever a compiler, its libraries and the driver can raise
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    finally:
        torch._dynamo.reset()
    return None


def configure_model(model: MMAudio, training: TrainingConfig, accelerator: Accelerator) -> MMAudio:
    """Move the model to the device of this process, compile its blocks and shard it, as the recipe and launch say."""
    model.to(accelerator.device).train()
    model.activation_checkpointing = training.activation_checkpointing
    allow_tf32(training.tf32)
    if should_compile(training.compile, accelerator.device):
        with accelerator.autocast():  # what is tried must be what training compiles
            compile_blocks(model, accelerator.print, required=training.compile == "on")
    if plugin := fsdp_plugin():
        if any(p.dtype != torch.float32 for p in model.parameters()):
            raise ValueError("finetune.frozen_dtype=bfloat16 does not shard: set float32, or launch without FSDP")
        apply_fsdp(model, accelerator, plugin)
    return model


# --- Processes and machines: the launch, then collectives by which they agree ----------------------------------------


# Ways to train that accelerate would set up by itself, from a configuration of its own or what is left in a shell.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "data parallelism of SageMaker",
    "ACCELERATE_TORCH_DEVICE": "one device for all processes",
}
_FLAG = "1|0|true|false|yes|no|on|off|t|f|y|n"  # anything else ends accelerate with an error that names no variable
EXPECTED = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_PORT"), r"\d{1,5}"),
    "WORLD_SIZE": r"[1-9]\d{0,4}",
    **dict.fromkeys(("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"), _FLAG),
}
# What the recipe, or this package, decides: variables, the values that mean nothing, and what holds instead.
NOT_USED = (
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "training.accumulation_steps"),
    ("ACCELERATE_GRADIENT_CLIPPING", ("auto",), "optim.max_grad_norm"),
    ("ACCELERATE_MIXED_PRECISION", ("no",), "training.mixed_precision"),
    ("ACCELERATE_FP8_*", ("no",), "training.mixed_precision"),
    ("ACCELERATE_DYNAMO_*", ("no", "default", "false"), "training.compile"),
    ("FSDP_SHARDING_STRATEGY", ("full_shard", "1"), "fsdp_reshard_after_forward"),
    ("FSDP_STATE_DICT_TYPE", ("sharded_state_dict",), "one file for each process"),
    ("FSDP_*WRAP*", ("no_wrap",), "sharding by block"),
    ("FSDP_MIN_NUM_PARAMS", ("0", "100000000"), "sharding by block"),
    ("FSDP_IGNORED_MODULES", (), "sharding of all modules"),
    ("FSDP_*PREFETCH", ("false", "no_prefetch"), "the prefetching of FSDP2"),
    ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", ("false",), "training.activation_checkpointing"),
)
# What is used, since it is there to be set; it changes more than people may remember.
USED = {
    "ACCELERATE_DEBUG_MODE": "every collective is checked, which takes time",
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel, which takes time",
    "NVIDIA_TF32_OVERRIDE": "it decides on TF32, whatever training.tf32 says",
}


def _is_set(variable: str) -> bool:
    """Whether a variable of the environment has a value, other than one that means no."""
    if variable == "ACCELERATE_TORCH_DEVICE":  # of which 0 is one
        return variable in os.environ
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off", "n", "f")


def check_launch() -> None:
    """ValueError when the launch asks for what is not supported, or for several processes and started one.

    accelerate does the latter silently for `distributed_type: MULTI_CPU`: it sets the address of the main process then,
    but no WORLD_SIZE.
    """
    for variable, name in UNSUPPORTED.items():
        if _is_set(variable):
            raise ValueError(f"{name} is not supported: launch with a file of accelerate_configs/, or unset {variable}")
    for variable, expected in EXPECTED.items():
        if not re.fullmatch(expected, value := os.environ.get(variable, "1"), re.IGNORECASE):
            raise ValueError(f"{variable}={value} in the environment has no meaning: unset it")
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if rank >= world or (world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()):
        what = f"WORLD_SIZE={world} and RANK={rank}"
        raise ValueError(f"{what} in the environment are of no launch: unset them, or use a launcher")
    if fsdp_plugin() and "WORLD_SIZE" not in os.environ:
        raise ValueError("FSDP needs a launcher: use `accelerate launch --config_file accelerate_configs/fsdp.yaml`")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # set by accelerate's launcher, unlike the two below
    if launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "the launch asked for several processes but started one: use accelerate_configs/ddp.yaml, or on a machine"
            " without GPUs `accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes N`"
        )


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Connect the processes of the run. ValueError when they do not find each other, or the batch does not split."""
    check_launch()
    accelerator = Accelerator(
        # accelerate's launcher does not pass `use_cpu` on to several processes, which then do not connect.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=recipe.training.mixed_precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT),
            # Gradients are views of DDP's buckets: without that it has them twice (4.1 GB for large) and copies them.
            # Unused parameters need no search: missing conditions are replaced by `where`, so all have gradients.
            # Gradients are summed in float32: a bf16 communication hook would halve the traffic and round them.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
        # The loop accumulates and compiles as the recipe says. Without these two accelerate reads its environment: with
        # 4 accumulation steps there it divides every loss by 4.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
    )
    for note in launch_notes(recipe):
        accelerator.print(f"note: {note}")
    os.environ.pop("ACCELERATE_FP8_BACKEND", None)  # accelerate looks at it whenever it prepares a model
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError(
            f"the launch started {os.environ['WORLD_SIZE']} processes that do not find each other: on a machine with"
            " GPUs that are not to be used, set ACCELERATE_USE_CPU=true"
        )
    # An error before anything is allocated.
    micro_batch_size(recipe.training, accelerator.num_processes, recipe.model.latent_length)
    return accelerator


def wrap_model(model: MMAudio, accelerator: Accelerator) -> nn.Module:
    """`model` as it is called in training: under DDP where there are several processes."""
    wrapped = accelerator.prepare(model)
    if isinstance(wrapped, DistributedDataParallel):
        # Buffers are tables that every process computes alike: no broadcast before each forward pass. accelerate knows
        # only the old name of this, with which torch warns.
        wrapped.forward_sync_buffers = False
        # Those of convolutions' adapters: DDP warns where strides differ, also in dimensions of size 1.
        for parameter in (p for p in wrapped.parameters() if p.requires_grad and 1 in p.shape):
            parameter.register_hook(lambda g, p=parameter: g.contiguous().as_strided(p.shape, p.stride()))
    return wrapped


@contextmanager
def step_timeout(step: int) -> Iterator[None]:
    """Collectives inside time out in minutes, so that a run whose process hangs or is lost soon ends.

    Outside they have PROCESS_TIMEOUT: processes wait there while one evaluates or saves alone.
    """
    if not dist.is_initialized():
        yield
        return
    dist.set_timeout(STEP_TIMEOUT)
    try:
        with waiting_for(f"the gradients of step {step}"):
            yield
    finally:
        dist.set_timeout(PROCESS_TIMEOUT)


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """RunError that names what others were to send, in place of what a backend raises when one is lost or hangs."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):  # gloo has no class for its errors
            raise
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        raise RunError(
            f"process {PartialState().process_index} had no answer from another one, which is lost or hangs, while it"
            f" waited for {what} ({reason}); the same command resumes from the last checkpoint"
        ) from error


def launch_notes(recipe: Recipe) -> list[str]:
    """What is set in the environment although the recipe decides it, or changes what the recipe says."""
    notes, plain = [], to_dict(recipe)
    for variable, value in sorted(os.environ.items()):
        value = value.lower()
        if variable.startswith("FSDP_") and not _is_set("ACCELERATE_USE_FSDP"):
            continue
        for pattern, usual, instead in NOT_USED:
            section, _, key = instead.partition(".")
            decided = str(plain[section][key]) if key else ""
            if fnmatch(variable, pattern) and value not in (*usual, decided):
                holds = f": the recipe has {instead}={decided}" if key else f", but {instead}"
                notes.append(f"{variable}={value} of the launch is not used{holds}")
        if variable in USED and (_is_set(variable) or variable == "NVIDIA_TF32_OVERRIDE"):
            notes.append(f"{variable}={value} is set: {USED[variable]}")
    return notes


def check_same_everywhere(values: Mapping[str, Any]) -> None:
    """ValueError, on every process, naming the first of `values` that is not the same on all; a collective."""
    gathered = gather_object([dict(values)])
    for rank, theirs in enumerate(gathered):
        for name, value in gathered[0].items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"the processes are not of one run: {name} is {value} for process 0 and {theirs.get(name)} for"
                    f" process {rank}; every machine needs the same command, the same stores and a run folder on a file"
                    " system that all of them share"
                )


def check_visible_everywhere(path: Path) -> None:
    """ValueError, on every process, when one does not see a file that the first has; a collective."""
    [exists] = broadcast_object_list([path.exists()])
    check_same_everywhere({f"the presence of {path}": _appears(path) if exists else path.exists()})


def _appears(path: Path) -> bool:
    """Whether a file that another machine may have written is there, or is soon."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return path.exists()


def first_error(error: str | None) -> str | None:
    """The error of the first process that has one, None when none has; a collective."""
    return next((each for each in gather_object([error]) if each is not None), None)


def make_shared_folder(make: Callable[[], Path]) -> tuple[Path | None, str | None]:
    """The folder that `make` makes on the first process, or None and why it failed or which process does not see it.

    A collective: `make` runs once all processes are here.
    """
    state = PartialState()
    result: list[Any] = [None, None]  # the folder, what went wrong
    state.wait_for_everyone()
    if state.is_main_process:
        try:
            result = [make(), None]
        except OSError as error:
            result = [None, str(error)]
    folder, problem = broadcast_object_list(result)
    if problem is None:
        problem = first_error(None if _appears(folder) else f"process {state.process_index} does not see {folder}")
    return (folder, None) if problem is None else (None, problem)


# --- FSDP ------------------------------------------------------------------------------------------------------------


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """FSDP settings of the launch, None without FSDP; ValueError for settings that are not supported.

    Read from the launcher's environment: accelerate itself ignores FSDP on machines without GPUs.
    """
    if not _is_set("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP is supported in version 2 alone: use accelerate_configs/fsdp.yaml")
    try:
        plugin = FullyShardedDataParallelPlugin()
    except ValueError as error:
        raise ValueError(f"FSDP settings of the launch ({error}): use accelerate_configs/fsdp.yaml") from error
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("fsdp_offload_params is not supported: set it to false")
    if plugin.activation_checkpointing:
        raise ValueError("set training.activation_checkpointing in the recipe, and fsdp_activation_checkpointing false")
    return plugin


def apply_fsdp(model: MMAudio, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Shard the parameters over all processes: one FSDP group for each block, and one for everything else.

    Weights stay float32 and are gathered as such; bf16 comes from autocast, as without FSDP. Optimizer and EMA must be
    made afterwards.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(model, mesh=mesh)
    # As Accelerator.prepare does it for models that it wraps.
    model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))  # type: ignore[method-assign]


@contextmanager
def no_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Accumulate gradients on each process without exchanging them: `Accelerator.no_sync`, also for FSDP modules."""
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def gather_full_tensors(groups: TensorGroups, keep: bool) -> dict[str, dict[str, torch.Tensor]]:
    """`groups` as they are without FSDP; with it full copies in host memory. A collective, one tensor at a time.

    Processes that do not `keep` them get empty groups.
    """
    sharded = any(isinstance(tensor, DTensor) for tensors in groups.values() for tensor in tensors.values())
    copies: dict[int, torch.Tensor] = {}  # a tensor that is in several groups is gathered once
    full: dict[str, dict[str, torch.Tensor]] = {group: {} for group in groups}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if sharded and id(tensor) not in copies:
                value = tensor.detach()
                value = value.full_tensor() if isinstance(value, DTensor) else value
                copies[id(tensor)] = value.to("cpu", copy=True) if keep else value.new_empty(0)
            if keep:
                full[group][name] = copies.get(id(tensor), tensor)
    return full


def full_shapes(groups: TensorGroups) -> dict[str, dict[str, list[int]]]:
    """Full shapes of the sharded tensors, by group; groups without any are left out."""
    shapes = {
        group: {name: list(tensor.shape) for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        for group, tensors in groups.items()
    }
    return {group: named for group, named in shapes.items() if named}


def local_shards(groups: TensorGroups, first: bool) -> dict[str, dict[str, torch.Tensor]]:
    """What this process saves: its shards of the sharded tensors, and on the `first` process all other tensors."""
    return {
        group: {name: local_shard(tensor) for name, tensor in tensors.items() if first or isinstance(tensor, DTensor)}
        for group, tensors in groups.items()
    }


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a DTensor, any other tensor as it is; the memory is the same."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A full tensor, which every process has, on the device of `target` and sharded as it is; no communication."""
    value = value.to(target.device)
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def copy_full_tensor(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full tensor into `target`, or this process's shard of it where `target` is sharded."""
    target.copy_(shard_like(target, value))


@contextmanager
def swap_weights(model: MMAudio, weights: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Exchange the parameters of the model with `weights` inside the context, in place: no second copy of the model."""
    _exchange(model, weights or {})
    try:
        yield
    finally:
        _exchange(model, weights or {})


@torch.no_grad()
def _exchange(model: MMAudio, weights: Mapping[str, torch.Tensor]) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass leaves the outermost group gathered, where changes would not last
    for name, theirs in weights.items():
        ours = model.get_parameter(name)
        before = ours.clone()
        ours.copy_(theirs)
        theirs.copy_(before)
