"""`mmaudio-hf bench step`: whole training steps against a matrix product."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmaudio_hf.bench.loop import bench_recipe, training_loop
from mmaudio_hf.bench.measure import Timed, emulates_bf16, median_rates, time_matmul, wait_for
from mmaudio_hf.config import EmaConfig, FlowConfig, ModelConfig, OptimConfig
from mmaudio_hf.data.loader import Batch
from mmaudio_hf.data.noise import draws
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training.ema import PostHocEMA
from mmaudio_hf.training.optim import build_optimizer, clip_gradients, guarded_step
from mmaudio_hf.training.step import flow_step


def step(
    config: ModelConfig, batch_size: int = 4, rounds: int = 3, precisions: Sequence[str] = ("fp32", "bf16")
) -> dict[str, float | str]:
    """GFLOP/s of a whole training step (forward, backward, clipping, AdamW, EMA) against a large matrix product.

    Operations are those of matrix products, convolutions and attention; what else a step does counts as time only.
    `loop_overhead` is what steps of the training loop take beyond forward, backward and optimizer, as a share of these.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, float | str] = {
        "variant": config.variant,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
    for name in precisions:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        slow = dtype == torch.bfloat16 and emulates_bf16(device)
        size = 1 if slow else batch_size
        matmul, (train, ema_seconds) = time_matmul(device, dtype), _train_step(config, size, device, dtype)
        matmul_rate, step_rate = median_rates([matmul, train], 1 if slow else rounds)
        figures |= {
            f"{name}_batch_size": size,
            f"{name}_step_tflop": train[1] / 1e12,
            f"{name}_step_seconds": train[1] / step_rate,
            f"{name}_step_gflop_s": step_rate / 1e9,
            f"{name}_matmul_gflop_s": matmul_rate / 1e9,
            f"{name}_step_of_matmul": step_rate / matmul_rate,
        }
        if not slow:
            figures[f"{name}_ema_share"] = ema_seconds() / (train[1] / step_rate)
            del matmul, train, ema_seconds  # the memory of one network is enough
            figures[f"{name}_loop_overhead"] = loop_overhead(config, size, name, rounds)
    return figures


def loop_overhead(config: ModelConfig, batch_size: int, precision: str, rounds: int) -> float:
    """What a step of the training loop takes beyond forward, backward and optimizer, as a share of these.

    That is reading, noise, clipping, the guard, sums for the log, and the averages. Both are measured in turn, on the
    same network; the median of their ratios counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = bench_recipe(config, batch_size, "bf16" if precision == "bf16" else "no", Path(folder))
        with training_loop(recipe) as (run, step):
            batch, never = random_batch(config, batch_size).to(run.device), torch.zeros((), device=run.device)

            def bare() -> None:
                run.optimizer.zero_grad(set_to_none=True)
                loss = flow_step(run.model, batch, recipe.flow, run.latent_mean, run.latent_std).loss.mean()
                run.accelerator.backward(loss)
                guarded_step(run.optimizer, never)
                wait_for(run.device)

            pairs = [[_seconds(part) for part in (step, bare)] for _ in range(rounds + 1)]
    return statistics.median(whole / part for whole, part in pairs[1:]) - 1  # the first round warms up


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _train_step(config: ModelConfig, batch_size: int, device, dtype) -> tuple[Timed, Callable[[], float]]:
    network = MMAudio(config).to(device).train()
    network.set_latent_statistics(torch.zeros(config.latent_channels), torch.ones(config.latent_channels))
    optimizer = build_optimizer(network, OptimConfig())
    ema = PostHocEMA(network, EmaConfig().sigma_rels)
    batch = random_batch(config, batch_size).to(device)

    def losses() -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return flow_step(network, batch, FlowConfig(), network.latent_mean, network.latent_std).loss

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses().mean().backward()
        norm = clip_gradients(network.parameters(), 1.0)
        guarded_step(optimizer, ~torch.isfinite(norm))
        ema.update()
        wait_for(device)

    def ema_seconds() -> float:
        def update() -> None:
            ema.update()
            wait_for(device)

        return statistics.median(_seconds(update) for _ in range(3))

    return (run, _step_flops(config, batch_size)), ema_seconds


def _step_flops(config: ModelConfig, batch_size: int) -> float:
    """Operations of forward and backward, counted on tensors without data."""
    with torch.device("meta"):
        network = MMAudio(config).train()
    batch = random_batch(config, 1).to("meta")
    with FlopCounterMode(display=False) as counter:
        flow_step(network, batch, FlowConfig(), network.latent_mean, network.latent_std).loss.mean().backward()
    return float(counter.get_total_flops()) * batch_size


def random_batch(config: ModelConfig, size: int) -> Batch:
    """A batch of `size` random samples with video and text for a network of these sizes."""
    every = torch.ones(size, dtype=torch.bool)
    latent = torch.randn(size, config.latent_length, config.latent_channels)
    return Batch(
        step=0,
        mean=latent,
        std=torch.ones_like(latent),
        text_features=torch.randn(size, config.text_tokens, config.text_dim, device="cpu"),
        clip_features=torch.randn(size, config.clip_length, config.clip_dim, device="cpu"),
        sync_features=torch.randn(size, config.sync_length, config.sync_dim, device="cpu"),
        video_rows=torch.arange(size, device="cpu"),
        has_video=every,
        has_text=every,
        source=torch.zeros(size, dtype=torch.int64, device="cpu"),
        counted=every,
        ids=[str(i) for i in range(size)],
        draws=draws(0, "bench", 0, range(size), (config.latent_length, config.latent_channels)),
    )
