"""`mmaudio-hf bench step`: how long training stands still for a checkpoint, and how long writing it takes."""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from mmaudio_hf.bench.measure import wait_for
from mmaudio_hf.config import EmaConfig, ModelConfig, OptimConfig, Recipe
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training.checkpoint import TrainingState, save_checkpoint
from mmaudio_hf.training.ema import PostHocEMA
from mmaudio_hf.training.optim import build_optimizer
from mmaudio_hf.training.publish import write_pretrained
from mmaudio_hf.training.resume import collect_tensors
from mmaudio_hf.training.saving import BackgroundWriter


def checkpoint(model: ModelConfig, rounds: int, folder: Path | None = None) -> dict[str, float]:
    """Stall and writing time, in s, of whole checkpoints of a network, against copying the same bytes in host memory.

    They are written to `folder`, by default a temporary one.
    """
    recipe = Recipe(name="bench", model=model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = MMAudio(recipe.model).to(device)
    optimizer, ema = build_optimizer(network, OptimConfig()), PostHocEMA(network, EmaConfig().sigma_rels)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    groups = collect_tensors(network, optimizer, ema) | {"window": {"sums": torch.zeros(3)}}
    distinct = {tensor.data_ptr(): tensor.nbytes for group in groups.values() for tensor in group.values()}
    groups["published"] = network.state_dict() | ema.nearest(0.05)[1]
    writer = BackgroundWriter(print)
    writer.reserve(groups)
    writer.wait()
    stalls, writes = [], []
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        for step in range(rounds):

            def write(copies: dict, step: int = step) -> None:
                publish = partial(write_pretrained, recipe, copies["published"], {}, lambda folder: None)
                save_checkpoint(Path(run_dir), TrainingState(step, copies, {}), publish)

            writer.stall_seconds = 0.0
            writer.save(groups, write)
            wait_for(device)
            stalls.append(writer.stall_seconds)
            if error := writer.finish():
                raise OSError(error)
            writes.append(writer.write_seconds)
    stall, memcpy = statistics.median(stalls), _copy_seconds(sum(distinct.values()), rounds)
    return {
        "checkpoint_gb": sum(distinct.values()) / 1e9,
        "checkpoint_stall_seconds": stall,
        "checkpoint_write_seconds": statistics.median(writes),
        "checkpoint_memcpy_seconds": memcpy,
        "checkpoint_stall_of_memcpy": stall / memcpy,
    }


def _copy_seconds(size: int, rounds: int) -> float:
    """Time of a copy of `size` bytes between two places of host memory that are in use; a part of it is measured."""
    part = min(size, 1 << 30)
    source, target, times = torch.ones(part, dtype=torch.uint8), torch.ones(part, dtype=torch.uint8), []
    for _ in range(rounds):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * size / part
