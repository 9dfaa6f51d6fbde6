"""Flow matching: path, target, loss, time law, samplers (Lipman et al. 2023, arXiv 2210.02747)."""

from collections.abc import Callable
from itertools import pairwise

import torch

from mmaudio_hf.schema import checked

VelocityFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(latent (B, N, C), t (B,)) -> velocity (B, N, C)"""


@checked
def sample_time(z_B: torch.Tensor, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Times in (0, 1) from standard normal z: `sigmoid(scale * z + mean)` (Esser et al. 2024, section 3.1)."""
    return torch.sigmoid(scale * z_B + mean)


def _check_shapes(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"both tensors must have one shape, not {tuple(a.shape)} and {tuple(b.shape)}")


@checked
def interpolate(x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, min_sigma: float = 0.0) -> torch.Tensor:
    """Point `(1 - (1 - min_sigma) t) x0 + t x1` of the path from noise x0 (t = 0) to data x1 (t = 1).

    x0, x1: (B, N, C); t: (B,), broadcast over the other axes.
    """
    _check_shapes(x0, x1)
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t must have the shape {tuple(x0.shape[:1])}, not {tuple(t.shape)}")
    t = t.view(-1, *[1] * (x0.ndim - 1))
    return (1 - (1 - min_sigma) * t) * x0 + t * x1


@checked
def velocity_target(x0: torch.Tensor, x1: torch.Tensor, min_sigma: float = 0.0) -> torch.Tensor:
    """Velocity of the path, `x1 - (1 - min_sigma) x0`, the same at every t."""
    _check_shapes(x0, x1)
    return x1 - (1 - min_sigma) * x0


@checked
def flow_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of every sample, (B,), in float32; the training loss is its mean over the batch."""
    _check_shapes(velocity, target)
    return (velocity.float() - target.float()).square().flatten(1).mean(1)


def guided_velocity(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance `w * conditional + (1 - w) * unconditional` (Ho & Salimans 2022)."""
    return guidance_scale * conditional + (1 - guidance_scale) * unconditional


@checked
def sample_euler(
    velocity_fn: VelocityFunction,
    x0: torch.Tensor,
    num_steps: int = 25,
    min_sigma: float = 0.0,
    on_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Integrate from noise x0 (B, N, C) to data with `num_steps` Euler steps on a uniform float32 grid.

    on_step: takes the number of a step and x after it, and returns the x to continue with.
    """
    if type(num_steps) is not int or num_steps < 1:
        raise ValueError(f"num_steps must be a whole number of at least 1, not {num_steps}")
    times = torch.linspace(0, 1 - min_sigma, num_steps + 1, device=x0.device)
    x = x0
    for step, (now, after) in enumerate(pairwise(times)):
        t_B = now.to(x.dtype).expand(x.shape[0])
        x = x + (after - now) * velocity_fn(x, t_B)
        if on_step is not None:
            x = on_step(step, x)
    return x


def sample_adaptive(
    velocity_fn: VelocityFunction, x0: torch.Tensor, rtol: float = 1e-7, atol: float = 1e-9
) -> torch.Tensor:
    """Integrate with the adaptive Dormand-Prince solver of torchdiffeq and return the final state (B, N, C).

    The reference returns the two-point trajectory in this mode; no released script uses it.
    """
    from torchdiffeq import odeint

    times = torch.tensor([0.0, 1.0], device=x0.device)
    return odeint(lambda t, x: velocity_fn(x, t.to(x.dtype).expand(x.shape[0])), x0, times, rtol=rtol, atol=atol)[-1]
