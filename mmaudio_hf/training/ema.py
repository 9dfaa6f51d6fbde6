"""Post-hoc EMA: a few power-law averages are kept while training, any other is made from their snapshots afterwards.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C; the
step-size correction and the treatment of frozen tensors follow spec networks, section 5.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmaudio_hf.training.distributed import copy_full_tensor, local_shard


def exponent(sigma_rel: float) -> float:
    """Exponent gamma of the power-law profile whose relative width is `sigma_rel` (equation 126 of the paper)."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(step: int, gamma: float, update_every: int = 1, step_size_correction: bool = True) -> float:
    """Weight beta that the average keeps at update number `step` (from 1), in double precision.

    Plain: `(1 - 1/(step+1))^(1+gamma)`. Corrected: geometric mean of that value and the one `update_every` later, to
    the power of `update_every`; the published training uses it.
    """
    plain = (1 - 1 / (step + 1)) ** (1 + gamma)
    if not step_size_correction:
        return plain
    later = (1 - 1 / (step + 1 + update_every)) ** (1 + gamma)
    return (plain * later) ** (update_every / 2)


@torch.no_grad()
def update(
    averages: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    step: int,
    gamma: float,
    update_every: int = 1,
    step_size_correction: bool = True,
) -> None:
    """Move `averages` towards `weights` in place, for update number `step` (from 1); the first one copies.

    With `update_every` q, only the calls 1, 1 + q, 1 + 2q, ... change anything.
    """
    if (step - 1) % update_every:
        return
    if step == 1:
        torch._foreach_copy_(list(averages), list(weights))
    beta = decay(step, gamma, update_every, step_size_correction)
    torch._foreach_lerp_(list(averages), list(weights), 1 - beta)


class PostHocEMA:
    """Averages of every floating tensor of a network, one set per profile, in float32 on the network's device.

    Tensors in `leave_out` have none.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        sigma_rels: Iterable[float],
        update_every: int = 1,
        leave_out: Collection[str] = (),
    ):
        self.update_every = update_every
        self.step = 0
        # The parameters themselves: wrapping a network for several processes may give them new storage.
        self._weights = {n: p for n, p in network.named_parameters() if p.is_floating_point() and n not in leave_out}
        # Copied and not left empty, so that a profile is usable before the first update.
        self.profiles = {
            sigma: {name: weight.detach().float().clone() for name, weight in self._weights.items()}
            for sigma in sigma_rels
        }

    def update(self) -> None:
        """Take in the network's present weights."""
        self.step += 1
        weights = [local_shard(weight.detach()) for weight in self._weights.values()]
        for sigma, averages in self.profiles.items():
            update(
                [local_shard(average) for average in averages.values()],
                weights,
                self.step,
                exponent(sigma),
                self.update_every,
            )

    def nearest(self, sigma_rel: float) -> tuple[float, dict[str, torch.Tensor]]:
        """The stored profile whose width is nearest to `sigma_rel`, and its averages."""
        sigma = min(self.profiles, key=lambda stored: abs(stored - sigma_rel))
        return sigma, self.profiles[sigma]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All averages, as `<profile number>.<name>`."""
        return {f"{i}.{n}": t for i, averages in enumerate(self.profiles.values()) for n, t in averages.items()}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Put back what `tensors` returned. ValueError when a tensor is missing or has another shape."""
        for key, average in self.tensors().items():
            value = tensors.get(key)
            if value is None or value.shape != average.shape:
                raise ValueError(f"EMA tensor {key} is missing or has another shape: the checkpoint is of another run")
            copy_full_tensor(average, value)
        self.step = step

    def save_snapshots(self, folder: Path) -> list[Path]:
        """Write one file per profile; return their paths."""
        return save_snapshots(folder, list(self.profiles), self.tensors(), self.step)


def save_snapshots(
    folder: Path, sigma_rels: Sequence[float], tensors: Mapping[str, torch.Tensor], step: int
) -> list[Path]:
    """Write the averages that `PostHocEMA.tensors` returned at `step`, one file per profile; return their paths.

    Each is written under a temporary name first. OSError naming the file when the disk fails or is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, sigma in enumerate(sigma_rels):
        opening = f"{index}."
        averages = {n.removeprefix(opening): t for n, t in tensors.items() if n.startswith(opening)}
        path = snapshot_path(folder, sigma, step)
        partial = path.with_suffix(".partial")
        try:
            save_file(averages, partial, metadata={"sigma_rel": repr(sigma), "step": str(step)})
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{path} could not be written ({error})") from error
        paths.append(path)
    return paths


class Snapshot(NamedTuple):
    """Averages of one profile after `step` updates: tensors by name, or the file that holds them."""

    sigma_rel: float
    step: int
    tensors: Mapping[str, torch.Tensor] | Path


def snapshot_path(folder: Path, sigma_rel: float, step: int) -> Path:
    """File of a snapshot."""
    return folder / f"sigma_{sigma_rel:g}_step_{step:09d}.safetensors"


def find_snapshots(folder: Path) -> list[Snapshot]:
    """Every complete snapshot in `folder`, by profile and step."""
    found = []
    for path in sorted(folder.glob("sigma_*.safetensors")):
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
        if "sigma_rel" not in facts or "step" not in facts:
            raise ValueError(f"{path} is not an EMA snapshot: move it out of {folder}")
        found.append(Snapshot(float(facts["sigma_rel"]), int(facts["step"]), path))
    return found


def _inner(step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner product of two power-law profiles (appendix C.3 of the paper), in double precision."""
    power = np.where(step_a < step_b, gamma_b, -gamma_a)
    top = (gamma_a + 1) * (gamma_b + 1) * (step_a / step_b) ** power
    return top / ((gamma_a + gamma_b + 1) * np.maximum(step_a, step_b))


def synthesis_weights(steps: Sequence[int], sigma_rels: Sequence[float], sigma_rel: float, step: int) -> np.ndarray:
    """Least-squares weights of snapshots, given their steps and widths, for the profile (`sigma_rel`, `step`)."""
    # Exponents pass through float32, as in the published tool.
    gammas = np.array([exponent(s) for s in sigma_rels], dtype=np.float32).astype(np.float64)
    target = np.float64(np.float32(exponent(sigma_rel)))
    times = np.asarray(steps, dtype=np.float64)
    gram = _inner(times[:, None], gammas[:, None], times[None, :], gammas[None, :])
    right = _inner(times, gammas, np.float64(step), target)
    return np.linalg.solve(gram, right)


def synthesize(
    snapshots: Sequence[Snapshot],
    sigma_rel: float,
    step: int | None = None,
    frozen: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Average of width `sigma_rel` as of update `step` (default: the last snapshot's), from all snapshots.

    The weights need not sum to 1, so tensors that never change are scaled a little, as in the published tool; pass
    them in `frozen` to keep them. ValueError when there is no snapshot. At a stored profile and step the result is
    that snapshot.
    """
    if not snapshots:
        raise ValueError("there is no EMA snapshot to synthesise from: train at least ema.snapshot_every steps")
    step = max(s.step for s in snapshots) if step is None else step
    factors = synthesis_weights([s.step for s in snapshots], [s.sigma_rel for s in snapshots], sigma_rel, step)
    total: dict[str, torch.Tensor] = {}
    for factor, snapshot in zip(factors.tolist(), snapshots, strict=True):
        for name, value in _tensors_of(snapshot):
            total[name] = total[name].add_(value, alpha=factor) if name in total else value.float() * factor
    return total | {name: value.clone() for name, value in (frozen or {}).items()}


def _tensors_of(snapshot: Snapshot) -> Iterable[tuple[str, torch.Tensor]]:
    """Tensors one by one, so that memory holds one snapshot tensor beside the sum."""
    if not isinstance(snapshot.tensors, Path):
        yield from snapshot.tensors.items()
        return
    with safe_open(snapshot.tensors, "pt") as file:
        for name in file.keys():  # noqa: SIM118, not a dict
            yield name, file.get_tensor(name)
