"""Checkpoints as several processes share them out, written by one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mmaudio_hf.training.checkpoint import Part, TrainingState, begin_attempt, save_checkpoint, save_local_shards

Names = Mapping[str, Sequence[str]]  # of the tensors that are shared out, by group


def parts(run: Path, state: TrainingState, names: Names, count: int) -> list[Part]:
    """Begin a checkpoint: what each of `count` processes is to write."""
    shapes = {group: {name: list(state.tensors[group][name].shape) for name in found} for group, found in names.items()}
    folder = begin_attempt(run, state.step)
    return [Part(folder, rank, count, shapes) for rank in range(count)]


def slices(state: TrainingState, part: Part) -> dict[str, dict[str, torch.Tensor]]:
    """What a process has of the tensors: slices of those that are shared out, and all others."""
    return {
        group: {n: _chunk(value, part) if n in part.shapes.get(group, {}) else value for n, value in tensors.items()}
        for group, tensors in state.tensors.items()
    }


def _chunk(value: torch.Tensor, part: Part) -> torch.Tensor:
    chunks = value.chunk(part.count)  # fewer than asked for, where there are fewer rows
    return chunks[part.rank] if part.rank < len(chunks) else value[:0]


def share_out(
    run: Path, state: TrainingState, names: Names, count: int, write_pretrained: Callable[[Path], None]
) -> Path:
    """Write a checkpoint as `count` processes do; return its folder."""
    first, *others = parts(run, state, names, count)
    for part in others:
        save_local_shards(part, slices(state, part))
    return save_checkpoint(run, TrainingState(state.step, slices(state, first), state.facts), write_pretrained, first)
