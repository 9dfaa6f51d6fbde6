"""What makes a step faster or smaller without changing what is trained: TF32, torch.compile."""

import copy
from collections.abc import Callable

import torch

from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import RunError


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA may round the inputs of float32 products and convolutions to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def wants_compile(mode: str, device: torch.device) -> bool:
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
