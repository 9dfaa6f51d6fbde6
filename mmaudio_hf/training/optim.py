"""Optimizer, learning-rate schedule and gradient clipping, as MMAudio (arXiv 2412.15322) was trained."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mmaudio_hf.config import OptimConfig
from mmaudio_hf.schema import checked
from mmaudio_hf.training.distributed import shard_like


@checked
def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of the update that follows `step` completed ones.

    Linear warm-up that never is 0, then "step" (milestones count from the end of the warm-up), "constant" or "poly",
    `(1 - progress)^0.9` where `total_steps` are the optimizer updates of the whole run. A pure function of the step in
    place of a torch scheduler: nothing to save, and a resumed run needs no replay.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"step {step} of {total_steps}: the first is 0, and there is at least one")
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


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW on all trainable parameters in one group: biases, norms and embeddings are decayed like the rest.

    The fused kernel is one pass over memory, and takes `found_inf` on the device: see `step_unless_nonfinite`. Moments
    of 8 bits (Dettmers et al. 2022, arXiv 2110.02861) are those of bitsandbytes; ValueError without it, or sharded.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas}
    settings |= {"eps": config.eps, "weight_decay": config.weight_decay}
    if config.moments == "float32":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    if any(isinstance(p, DTensor) for p in parameters):
        raise ValueError("optim.moments=8bit does not shard: set optim.moments=float32, or launch without FSDP")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("optim.moments=8bit needs bitsandbytes: run `pip install 'mmaudio-hf[8bit]'`") from None
    return AdamW8bit(parameters, **settings)


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


def step_unless_nonfinite(optimizer: torch.optim.Optimizer, found_inf: torch.Tensor) -> None:
    """One optimizer update, or none where `found_inf` (a boolean scalar on the device) is true.

    Fused AdamW reads the flag as a GradScaler would set it, without a host sync: weights, moments and the update count
    then stay.
    """
    if not isinstance(optimizer, torch.optim.AdamW):  # bitsandbytes reads no flag: the host waits for it
        if not found_inf:
            optimizer.step()
        return
    optimizer.grad_scale = None  # type: ignore[attr-defined]  # both are set by GradScaler, not by the class
    optimizer.found_inf = found_inf.to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as named tensors: `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, `step.<parameter>`.

    bitsandbytes has `state1` and `state2`, with `absmax1` and 2 of blocks and `qmap1` and 2, in place of the first two.
    """
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        # A copy of what all parameters share: safetensors takes no tensor twice.
        f"{key}.{names[p]}": value.clone() if key.startswith("qmap") else torch.as_tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Load what `optimizer_tensors` returned. ValueError when names or shapes do not fit the model."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state: dict[torch.Tensor, dict[str, Any]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        of_elements = value.ndim > 0 and not kind.startswith(("absmax", "qmap"))
        if name not in parameters or (of_elements and value.shape != parameters[name].shape):
            raise ValueError(f"optimizer state {key} does not fit the network: the checkpoint is of another model")
        parameter = parameters[name]
        value = shard_like(parameter, value) if of_elements else value.to(parameter.device)
        counts = value.dtype == torch.int64  # bitsandbytes counts updates in Python
        state.setdefault(parameter, {})[kind] = int(value) if counts else value.clone()
    missing = [name for name, parameter in parameters.items() if parameter not in state] if tensors else []
    if missing:
        raise ValueError(
            f"optimizer state of {missing[0]} is missing ({len(missing)} in all): the checkpoint is damaged"
        )
    optimizer.state.clear()
    optimizer.state.update(state)
