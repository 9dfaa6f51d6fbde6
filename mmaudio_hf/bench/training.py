"""`mmaudio-hf bench step`: whole training steps against a matrix product."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import patch_environment
from accelerate.utils.other import get_free_port
from torch.utils.flop_counter import FlopCounterMode

from mmaudio_hf.bench import Timed, bench_recipe, emulates_bf16, median_rates, time_matmul, training_loop, wait_for
from mmaudio_hf.config import EmaConfig, FlowConfig, ModelConfig, OptimConfig, Recipe
from mmaudio_hf.data.loader import Batch
from mmaudio_hf.data.noise import sample_noise
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import RunError
from mmaudio_hf.training.checkpoint import TrainingState, save_checkpoint
from mmaudio_hf.training.checkpointer import BackgroundWriter, write_pretrained
from mmaudio_hf.training.ema import PostHocEMA
from mmaudio_hf.training.optim import build_optimizer, clip_gradients, optimizer_tensors, step_unless_nonfinite
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
            device = run.accelerator.device
            batch, never = random_batch(config, batch_size).to(device), torch.zeros((), device=device)

            def bare() -> None:
                run.optimizer.zero_grad(set_to_none=True)
                loss = flow_step(run.model, batch, recipe.flow, *run.latent_statistics).loss.mean()
                run.accelerator.backward(loss)
                step_unless_nonfinite(run.optimizer, never)
                wait_for(device)

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
        step_unless_nonfinite(optimizer, ~torch.isfinite(norm))
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
        valid=every,
        ids=[str(i) for i in range(size)],
        noise=sample_noise(0, "bench", 0, range(size), (config.latent_length, config.latent_channels)),
    )


# --- `mmaudio-hf bench scaling` --------------------------------------------------------------------------------------


ANSWER_SECONDS = 600.0  # for an answer of a process, before it is given up
Figures = dict[str, float | int | str]


def scaling(config: ModelConfig, batch_size: int, rounds: int, mixed_precision: str = "no") -> Figures:
    """Seconds of a step of one process alone, and of two that train one model, in turn; the efficiency is their ratio.

    `batch_size` is that of each process. Three processes are started and wait for orders, so that all of it is measured
    in one run. `machine_efficiency` is the same ratio for a matrix product, which needs no exchange: what two processes
    take from each other here whatever they do.
    """
    times: dict[str, list[float]] = {"one": [], "two": [], "matmul_one": [], "matmul_two": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        recipes = [bench_recipe(config, batch_size * size, mixed_precision, Path(folder)) for size in (1, 2)]
        alone, pair = (stack.enter_context(_team(size, recipe)) for size, recipe in zip((1, 2), recipes, strict=True))
        teams = {"one": (alone, "step"), "two": (pair, "step")}
        teams |= {"matmul_one": (alone, "matmul"), "matmul_two": (pair, "matmul")}
        for number in range(rounds + 1):
            for name, (workers, order) in teams.items():
                seconds = _together(workers, order)
                if number:  # the first round warms up
                    times[name].append(seconds)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "batch_size_per_process": batch_size,
        "rounds": rounds,
        "one_process_step_seconds": seconds["one"],
        "two_processes_step_seconds": seconds["two"],
        "weak_scaling_efficiency": seconds["one"] / seconds["two"],
        "machine_efficiency": seconds["matmul_one"] / seconds["matmul_two"],
    }


def _together(workers: list, order: str) -> float:
    """Seconds until all `workers` have done what they are told: the slower one counts."""
    for worker in workers:
        worker.send(order)
    return max(_receive(worker) for worker in workers)


def _receive(worker) -> float:
    try:
        if worker.poll(ANSWER_SECONDS):
            return worker.recv()
    except EOFError:
        raise RunError("a process has ended too early: its memory may be short, take a smaller --batch-size") from None
    raise RunError(f"a process did not answer for {ANSWER_SECONDS:.0f} s: take a smaller --variant or --batch-size")


@contextmanager
def _team(size: int, recipe: Recipe) -> Iterator[list]:
    """Start the processes of one run and wait for it to begin; the ends of the pipes by which they take orders."""
    context, port, processes, pipes = multiprocessing.get_context("spawn"), get_free_port(), [], []
    try:
        for rank in range(size):
            group = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            pipe, theirs = context.Pipe()
            with patch_environment(OMP_NUM_THREADS=1, WORLD_SIZE=size, **(group if size > 1 else {})):
                process = context.Process(target=_work, args=(theirs, recipe), daemon=True)
                process.start()
            processes.append(process)
            theirs.close()
            pipes.append(pipe)
        for pipe in pipes:
            _receive(pipe)
        yield pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(pipe, recipe: Recipe) -> None:
    """Do what is ordered and answer how many seconds it took; the first answer says that the run has begun."""
    torch.set_num_threads(1)
    with training_loop(recipe) as (run, step):
        matmul, _ = time_matmul(run.accelerator.device, torch.float32)
        orders = {"step": step, "matmul": matmul}
        step()  # allocates
        pipe.send(0.0)
        while True:
            order = orders[pipe.recv()]
            run.accelerator.wait_for_everyone()
            began = time.perf_counter()
            order()
            pipe.send(time.perf_counter() - began)


# --- `mmaudio-hf bench step` -----------------------------------------------------------------------------------------


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
    groups = {
        "model": network.state_dict(),
        "optimizer": optimizer_tensors(network, optimizer),
        "ema": ema.tensors(),
        "window": {"sums": torch.zeros(3)},
    }
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
