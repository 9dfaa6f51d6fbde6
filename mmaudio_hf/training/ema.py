"""Post-hoc EMA: a few power-law profiles are tracked in training, any other is synthesised from their snapshots.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696), section 3
and appendix C. The step-size correction and the treatment of frozen tensors are those MMAudio was trained with.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from mmaudio_hf.schema import checked
from mmaudio_hf.training.distributed import copy_full_tensor, local_shard
from mmaudio_hf.weights import check_file, save_tensors


def exponent(sigma_rel: float) -> float:
    """Exponent gamma of the power-law profile of relative width `sigma_rel`: the largest root of equation 126,

    `gamma^3 + 7 gamma^2 + (16 - sigma_rel^-2) gamma + (12 - sigma_rel^-2) = 0`.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(step: int, gamma: float, update_every: int = 1, step_size_correction: bool = True) -> float:
    """Weight beta that the EMA keeps at update number `step` (from 1), in double precision.

    Plain: `(1 - 1/(step+1))^(1+gamma)` (section 3.1, where the first update is step 0). Corrected, as MMAudio was
    trained: geometric mean of that value and the one `update_every` later, to the power of `update_every`.
    """
    plain = (1 - 1 / (step + 1)) ** (1 + gamma)
    if not step_size_correction:
        return plain
    later = (1 - 1 / (step + 1 + update_every)) ** (1 + gamma)
    return (plain * later) ** (update_every / 2)


@torch.no_grad()
@checked
def update(
    ema_weights: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    step: int,
    gamma: float,
    update_every: int = 1,
    step_size_correction: bool = True,
) -> None:
    """Move `ema_weights` towards `weights` in place, for update number `step` (from 1); the first one copies.

    With `update_every` q, only the calls 1, 1 + q, 1 + 2q, ... change anything.
    """
    if step < 1 or update_every < 1 or not ema_weights or not weights:
        raise ValueError(f"update {step} every {update_every} of {len(ema_weights)} tensors: each must be at least 1")
    if (step - 1) % update_every:
        return
    if step == 1:
        torch._foreach_copy_(list(ema_weights), list(weights))
    beta = decay(step, gamma, update_every, step_size_correction)
    torch._foreach_lerp_(list(ema_weights), list(weights), 1 - beta)


class PostHocEMA:
    """EMA of every floating-point parameter of a model, one set of weights per profile, in float32 on its device.

    `profiles` maps each sigma_rel to its weights by name; parameters in `exclude` have none. `step` counts updates.
    """

    def __init__(
        self, model: nn.Module, sigma_rels: Iterable[float], update_every: int = 1, exclude: Collection[str] = ()
    ) -> None:
        self.update_every = update_every
        self.step = 0
        # Parameters and not their data: DDP or FSDP may give them other storage.
        self._parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point() and n not in exclude}
        # Copied and not left empty, so that a profile is usable before the first update.
        self.profiles = {
            sigma: {name: parameter.detach().float().clone() for name, parameter in self._parameters.items()}
            for sigma in sigma_rels
        }

    def update(self) -> None:
        """One update from the model's present weights."""
        self.step += 1
        weights = [local_shard(parameter.detach()) for parameter in self._parameters.values()]
        for sigma, profile in self.profiles.items():
            ema_weights = [local_shard(tensor) for tensor in profile.values()]
            update(ema_weights, weights, self.step, exponent(sigma), self.update_every)

    def nearest(self, sigma_rel: float) -> tuple[float, dict[str, torch.Tensor]]:
        """The tracked profile whose width is nearest to `sigma_rel`, and its weights."""
        sigma = min(self.profiles, key=lambda stored: abs(stored - sigma_rel))
        return sigma, self.profiles[sigma]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All EMA weights, as `<profile number>.<name>`."""
        return {f"{i}.{n}": t for i, profile in enumerate(self.profiles.values()) for n, t in profile.items()}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Load what `tensors` returned, of all ranks. ValueError when a tensor is missing or has another shape."""
        for key, target in self.tensors().items():
            value = tensors.get(key)
            if value is None or value.shape != target.shape:
                raise ValueError(f"EMA tensor {key} is missing or has another shape: the checkpoint is of another run")
            copy_full_tensor(target, value)
        self.step = step

    def save_snapshots(self, folder: Path) -> list[Path]:
        """Write one file per profile; return their paths."""
        return save_snapshots(folder, list(self.profiles), self.tensors(), self.step)


def save_snapshots(
    folder: Path, sigma_rels: Sequence[float], tensors: Mapping[str, torch.Tensor], step: int
) -> list[Path]:
    """Write what `PostHocEMA.tensors` returned at `step`, one file per profile; return their paths.

    Each is written under a temporary name first. OSError naming the file when the disk fails or is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, sigma in enumerate(sigma_rels):
        prefix = f"{index}."
        ema_weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        path = snapshot_path(folder, sigma, step)
        partial = path.with_suffix(".partial")
        try:
            save_tensors(ema_weights, partial, {"sigma_rel": repr(sigma), "step": str(step)})
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{path} could not be written ({error})") from error
        paths.append(path)
    return paths


class Snapshot(NamedTuple):
    """EMA weights of one profile after `step` updates: tensors by name, or the file that holds them."""

    sigma_rel: float
    step: int
    tensors: Mapping[str, torch.Tensor] | Path


def snapshot_path(folder: Path, sigma_rel: float, step: int) -> Path:
    """File of a snapshot."""
    return folder / f"sigma_{sigma_rel:g}_step_{step:09d}.safetensors"


def find_snapshots(
    folder: Path, on_damage: Callable[[Path, str], None] | None = None, verify: bool = True
) -> list[Snapshot]:
    """Every complete snapshot in `folder`, by profile and step.

    ValueError naming a file that is cut short, no snapshot or, with `verify`, which reads the files through, differs
    from its checksum; or `on_damage` gets the file and the reason, and it is left out.
    """
    snapshots = []
    for path in sorted(folder.glob("sigma_*.safetensors")):
        try:
            if verify:
                check_file(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            snapshots.append(Snapshot(float(metadata["sigma_rel"]), int(metadata["step"]), path))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            reason = str(error) if str(path) in str(error) else f"{path} is cut short or no EMA snapshot ({error})"
            if on_damage is None:
                raise ValueError(reason) from error
            on_damage(path, reason)
    return snapshots


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged file of a run, with a warning."""
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    tqdm.write(f"warning: {reason}; it is moved to {aside}, and the run continues without it", file=sys.stderr)


def _inner_product(step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner product of two power-law profiles (appendix C.3), in double precision; the arguments are broadcast."""
    power = np.where(step_a < step_b, gamma_b, -gamma_a)
    numerator = (gamma_a + 1) * (gamma_b + 1) * (step_a / step_b) ** power
    return numerator / ((gamma_a + gamma_b + 1) * np.maximum(step_a, step_b))


def synthesis_weights(steps: Sequence[int], sigma_rels: Sequence[float], sigma_rel: float, step: int) -> np.ndarray:
    """Least-squares weights (S,) of S snapshots, given their steps and widths, for the profile (`sigma_rel`, `step`).

    Solves `A w = b` with `A_ij = <p_i, p_j>` and `b_i = <p_i, p>` (appendix C.3).
    """
    # Exponents are rounded to float32, as in the tool that made the released weights.
    gammas = np.array([exponent(s) for s in sigma_rels], dtype=np.float32).astype(np.float64)
    target = np.array(exponent(sigma_rel), dtype=np.float32).astype(np.float64)
    times = np.asarray(steps, dtype=np.float64)
    gram_SS = _inner_product(times[:, None], gammas[:, None], times[None, :], gammas[None, :])
    return np.linalg.solve(gram_SS, _inner_product(times, gammas, np.array(float(step)), target))


@checked
def synthesize(
    snapshots: Sequence[Snapshot],
    sigma_rel: float,
    step: int | None = None,
    frozen: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """EMA weights of width `sigma_rel` at update `step` (default: the last snapshot's), from all snapshots.

    The factors need not sum to 1, so tensors that never change are scaled a little, as in the released weights; pass
    them in `frozen` to keep them. At the profile and step of a snapshot the result is that snapshot. ValueError when
    there is no snapshot.
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
