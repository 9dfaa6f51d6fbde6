"""Optimizer, learning-rate schedule and gradient clipping, as MMAudio (arXiv 2412.15322) was trained."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mmaudio_hf.config import OptimConfig
from mmaudio_hf.training.distributed import shard_like


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of the update that follows `step` completed ones.

    Linear warm-up that never is 0, then "step" (milestones count from the end of the warm-up), "constant" or "poly",
    `(1 - progress)^0.9` where `total_steps` are the optimizer updates of the whole run. A pure function of the step in
    place of a torch scheduler: nothing to save, and a resumed run needs no replay.
    """
    base, after_warmup = config.learning_rate, step - config.warmup_steps
    if after_warmup < 0:
        return base * ((step + 1) / (config.warmup_steps + 1))
    if config.schedule == "step":
        return base * config.gamma ** bisect_right(config.milestones, after_warmup)
    if config.schedule == "poly":
        return base * max(0.0, 1 - after_warmup / total_steps) ** 0.9
    return base


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW on all trainable parameters in one group: biases, norms and embeddings are decayed like the rest.

    The fused kernel is one pass over memory, and takes `found_inf` on the device: see `step_unless_nonfinite`.
    """
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def gradient_norms(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """L2 norm of every gradient there is, (P,), on the device."""
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
    return norms.full_tensor() if isinstance(norms, DTensor) else norms


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, norms: torch.Tensor | None = None
) -> torch.Tensor:
    """Scale gradients so that their global L2 norm is at most `max_norm`; return the norm before, on the device.

    The norm is taken per tensor (`norms`, where they are known), then over tensors: one float32 sum over all elements
    would lose three digits. Gradients are never scaled up.
    """
    parameters = list(parameters)
    norms = gradient_norms(parameters) if norms is None else norms
    total = torch.linalg.vector_norm(norms)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, total, foreach=True)
    return total


def step_unless_nonfinite(optimizer: torch.optim.AdamW, found_inf: torch.Tensor) -> None:
    """One optimizer update, or none where `found_inf` (a boolean scalar on the device) is true; no host sync.

    Fused AdamW reads the flag as a GradScaler would set it: weights, moments and the update count then stay.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]  # both are set by GradScaler, not by the class
    optimizer.found_inf = found_inf.to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as named tensors: `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, `step.<parameter>`."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{key}.{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Load what `optimizer_tensors` returned. ValueError when names or shapes do not fit the model."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
            raise ValueError(f"optimizer state {key} does not fit the network: the checkpoint is of another model")
        parameter = parameters[name]
        value = shard_like(parameter, value) if value.ndim else value.to(parameter.device)
        state.setdefault(parameter, {})[kind] = value.clone()
    missing = [name for name, parameter in parameters.items() if parameter not in state] if tensors else []
    if missing:
        raise ValueError(
            f"optimizer state of {missing[0]} is missing ({len(missing)} in all): the checkpoint is damaged"
        )
    optimizer.state.clear()
    optimizer.state.update(state)
