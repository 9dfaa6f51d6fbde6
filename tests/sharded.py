"""Sharded checkpoints, as several processes save them, written by one process."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mmaudio_hf.training.checkpoint import (
    RankShards,
    TrainingState,
    begin_sharded,
    save_checkpoint,
    save_local_shards,
)

Names = Mapping[str, Sequence[str]]  # of the tensors that are sharded, by group


def begin(run: Path, state: TrainingState, names: Names, world_size: int) -> list[RankShards]:
    """Begin a checkpoint: what each process is to write."""
    shapes = {group: {name: list(state.tensors[group][name].shape) for name in some} for group, some in names.items()}
    folder = begin_sharded(run, state.step)
    return [RankShards(folder, rank, world_size, shapes) for rank in range(world_size)]


def local_tensors(state: TrainingState, shards: RankShards) -> dict[str, dict[str, torch.Tensor]]:
    """What a process holds: its shards of the sharded tensors, and all others in full."""

    def local(group: str, name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in shards.full_shapes.get(group, {}):
            return value
        chunks = value.chunk(shards.world_size)  # fewer than there are processes, where there are fewer rows
        return chunks[shards.rank] if shards.rank < len(chunks) else value[:0]

    return {
        group: {name: local(group, name, value) for name, value in tensors.items()}
        for group, tensors in state.tensors.items()
    }


def finish(run: Path, state: TrainingState, first: RankShards, write_pretrained: Callable[[Path], None]) -> Path:
    """Do what the first process does."""
    local = TrainingState(state.step, local_tensors(state, first), state.metadata)
    return save_checkpoint(run, local, write_pretrained, first)


def save_sharded(
    run: Path, state: TrainingState, names: Names, world_size: int, write_pretrained: Callable[[Path], None]
) -> Path:
    """Write a checkpoint as `world_size` processes do; return its folder."""
    first, *others = begin(run, state, names, world_size)
    for shards in others:
        save_local_shards(shards, local_tensors(state, shards))
    return finish(run, state, first, write_pretrained)
