"""Benchmarks of training: steps against a matrix product, checkpoints against memcpy, two processes against one.

And steps of clips of several durations against those of one.
"""

import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import patch_environment
from accelerate.utils.other import get_free_port

from mmaudio_hf.bench import (
    ROWS,
    STEPS,
    Timed,
    bench_recipe,
    compare,
    emulates_bf16,
    in_turn,
    median_rates,
    seconds,
    synchronize,
    time_matmul,
    training_loop,
    update,
)
from mmaudio_hf.config import (
    DataConfig,
    EmaConfig,
    FlowConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    StoreConfig,
    config_of_duration,
    samples_per_step,
)
from mmaudio_hf.data.loader import Batch, training_batches
from mmaudio_hf.data.mixture import open_mixture
from mmaudio_hf.data.sampler import sample_noise
from mmaudio_hf.data.store import StoreWriter
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import RunError, column_shapes
from mmaudio_hf.training.checkpoint import TrainingState, save_checkpoint
from mmaudio_hf.training.checkpointer import BackgroundWriter, write_pretrained
from mmaudio_hf.training.distributed import TensorGroups
from mmaudio_hf.training.ema import PostHocEMA
from mmaudio_hf.training.loop import Run
from mmaudio_hf.training.memory import empty_batch, training_flops
from mmaudio_hf.training.optim import build_optimizer, clip_gradients, optimizer_tensors, step_unless_nonfinite
from mmaudio_hf.training.step import flow_step

REPLY_SECONDS = 600.0  # for a reply of a process, before it is given up
COPIED_BYTES = 1 << 30  # at most, to measure memcpy: longer copies are as fast

Figures = dict[str, float | int | str]


# --- `mmaudio-hf bench step`: the step, and what the loop adds -------------------------------------------------------


def step(
    config: ModelConfig, batch_size: int = 4, rounds: int = 3, precisions: Sequence[str] = ("fp32", "bf16")
) -> Figures:
    """GFLOP/s of a whole training step (forward, backward, clipping, AdamW, EMA) against a large matrix product.

    Operations are those of matrix products, convolutions and attention; what else a step does counts as time only.
    `loop_overhead` is what steps of the training loop take beyond forward, backward and optimizer, relative to these.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: Figures = {"variant": config.variant, "device": device.type, "threads": torch.get_num_threads()}
    for name in precisions:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        slow = dtype == torch.bfloat16 and emulates_bf16(device)
        size = 1 if slow else batch_size
        matmul, (train, update_ema) = time_matmul(device, dtype), _train_step(config, size, device, dtype)
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
            ema_seconds = statistics.median(seconds(update_ema) for _ in range(3))
            figures[f"{name}_ema_share"] = ema_seconds / (train[1] / step_rate)
            del matmul, train, update_ema  # memory for one model is enough
            figures[f"{name}_loop_overhead"] = loop_overhead(config, size, name, rounds)
    return figures


def loop_overhead(config: ModelConfig, batch_size: int, precision: str, rounds: int) -> float:
    """What a step of the training loop takes beyond forward, backward and optimizer, relative to these.

    That is reading, noise, clipping, the guard, running metrics and EMA. Both are measured in turn, on the same model;
    the median of their ratios counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = bench_recipe(config, batch_size, "bf16" if precision == "bf16" else "no", Path(folder))
        with training_loop(recipe) as (run, step):
            device = run.accelerator.device
            batch, found_inf = random_batch(config, batch_size).to(device), torch.zeros((), device=device)

            def bare_step() -> None:
                run.optimizer.zero_grad(set_to_none=True)
                loss = flow_step(run.model, batch, recipe.flow, *run.latent_statistics).loss.mean()
                run.accelerator.backward(loss)
                step_unless_nonfinite(run.optimizer, found_inf)
                synchronize(device)

            times = in_turn([partial(seconds, step), partial(seconds, bare_step)], rounds)
    return statistics.median(whole / bare for whole, bare in zip(*times, strict=True)) - 1


def _train_step(
    config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Timed, Callable[[], None]]:
    """A whole step, and its EMA update alone."""
    model = MMAudio(config).to(device).train()
    model.set_latent_statistics(torch.zeros(config.latent_channels), torch.ones(config.latent_channels))
    optimizer, ema = build_optimizer(model, OptimConfig()), PostHocEMA(model, EmaConfig().sigma_rels)
    batch = random_batch(config, batch_size).to(device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = flow_step(model, batch, FlowConfig(), model.latent_mean, model.latent_std).loss
        loss.mean().backward()
        norm = clip_gradients(model.parameters(), 1.0)
        step_unless_nonfinite(optimizer, ~torch.isfinite(norm))
        update_ema()

    def update_ema() -> None:
        ema.update()
        synchronize(device)

    return (run, training_flops(config) * batch_size), update_ema


# A process that does a step for each line it reads and writes the seconds; commits before `bench.training` had it in
# `bench.step`. Only names that both have may be used.
_STEPPER = """
import importlib.util, json, sys, time, torch
from mmaudio_hf.config import ModelConfig
torch.set_flush_denormal(True)  # see `cli.training._bench`
bench = "mmaudio_hf.bench." + ("training" if importlib.util.find_spec("mmaudio_hf.bench.training") else "step")
config, batch_size = ModelConfig(**json.loads(sys.argv[1])), int(sys.argv[2])
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
(run, _), _ = importlib.import_module(bench)._train_step(config, batch_size, device, torch.float32)
for _ in sys.stdin:
    began = time.perf_counter()
    run()
    print(time.perf_counter() - began, flush=True)
"""


def compare_step(config: ModelConfig, checkout: Path, batch_size: int, rounds: int) -> Figures:
    """Seconds of a float32 step, and of that of the package in `checkout`, by `compare`."""
    ours, other = compare(checkout, _STEPPER, [json.dumps(asdict(config)), str(batch_size)], rounds)[..., 0].tolist()
    return {
        "fp32_other_step_seconds": statistics.median(other),
        "fp32_throughput_of_other": statistics.median(b / a for a, b in zip(ours, other, strict=True)),
    }


def random_batch(config: ModelConfig, size: int) -> Batch:
    """A batch of `size` random samples with video and text for a model of these sizes."""
    batch = empty_batch(config, size)
    for values in (batch.mean, batch.text_features, batch.clip_features, batch.sync_features):
        values.normal_()
    noise = sample_noise(0, "bench", 0, range(size), (config.latent_length, config.latent_channels))
    return replace(batch, std=batch.std.fill_(1.0), noise=noise)


# --- `mmaudio-hf bench durations` ------------------------------------------------------------------------------------


def durations(config: ModelConfig, seconds_of: Sequence[float], batch_tokens: int, rounds: int) -> Figures:
    """Steps of a mixture of clips of several durations against the same steps of a run of each duration alone.

    Both are steps of one training loop, whose model is shared since its state takes gigabytes. A round has a step of
    each duration from the mixture, which follows one of another duration as in a run, and after each the step of that
    duration alone. `of_one_length` is the time of a round of them alone over that in the mixture. Tokens are those that
    the blocks see: latents, CLIP frames and text. In float32.
    """
    times: dict[int, list[tuple[float, float]]] = {}  # latents of a clip -> (in the mixture, alone)
    figures: Figures = {"variant": config.variant, "batch_tokens": batch_tokens, "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        alone = {d: _of_duration(config, d, batch_tokens, Path(folder) / f"{d:g}") for d in seconds_of}
        stores = tuple(store for recipe in alone.values() for store in recipe.data.train)
        first = alone[seconds_of[0]]
        mixed = replace(first, name="mixed", data=replace(first.data, train=stores))
        run, step = stack.enter_context(training_loop(mixed))
        own = {recipe.model.latent_length: stack.enter_context(_steps_of(run, recipe)) for recipe in alone.values()}
        for number in range((1 + rounds) * len(own)):  # the first of each is a warm-up
            in_mixture, latents = seconds(step), run.unwrapped_model.latent_length
            pair = in_mixture, seconds(own[latents])
            times.setdefault(latents, []).extend([pair] * (number >= len(own)))
        for duration, recipe in alone.items():
            latents, model = recipe.model.latent_length, recipe.model
            in_mixture, by_itself = map(statistics.median, zip(*times[latents], strict=True))
            samples = samples_per_step(recipe.training, latents)
            tokens = samples * (latents + model.clip_length + model.text_tokens)
            figures[f"samples_of_{duration:g}s"] = samples
            figures[f"tokens_per_second_{duration:g}s"] = tokens / in_mixture
            figures[f"of_{duration:g}s_alone"] = by_itself / in_mixture
    in_mixture, by_itself = (sum(statistics.median(p[i] for p in pairs) for pairs in times.values()) for i in range(2))
    return figures | {"of_one_length": by_itself / in_mixture}


@contextmanager
def _steps_of(run: Run, recipe: Recipe) -> Iterator[Callable[[], None]]:
    """A function for the next step of `run` over the clips of a recipe of one duration."""
    size, data = samples_per_step(recipe.training, recipe.model.latent_length), recipe.data
    with closing(open_mixture(data.train, recipe.model)) as mixture:
        order: Any = {"seed": recipe.seed, "global_batch": size, "start_step": 0, "num_steps": STEPS}
        order |= {"prefetch": data.prefetch_batches, "threads": data.read_threads, "device": run.accelerator.device}
        with training_batches(mixture, sample_indices=[np.arange(size)], **order) as loader:
            yield partial(update, run, loader)


def _of_duration(config: ModelConfig, duration: float, batch_tokens: int, folder: Path) -> Recipe:
    """A recipe over random features of clips of one duration, in a store with a manifest, which states it."""
    config, path = config_of_duration(config, duration), folder / "features" / f"of_{duration * 1000:.0f}_ms"
    path.parent.mkdir(parents=True)
    shapes, ids = column_shapes(config.mode, duration), [f"row_{row}" for row in range(ROWS)]
    with StoreWriter(path, shapes, ROWS, mode=config.mode, duration=duration, encoders={}) as writer:
        writer.write(0, ids, ids, {name: torch.rand(ROWS, *shape) for name, shape in shapes.items()})
    recipe = bench_recipe(config, 1, "no", folder)
    training = replace(recipe.training, batch_size=0, batch_tokens=batch_tokens, batch_size_multiple=1)
    repeats = samples_per_step(training, config.latent_length)  # so that a mixture has as many steps of each duration
    return replace(recipe, training=training, data=DataConfig(train=(StoreConfig(str(path), repeats),)))


# --- `mmaudio-hf bench scaling` --------------------------------------------------------------------------------------


def scaling(
    config: ModelConfig, batch_size: int, rounds: int, mixed_precision: Literal["no", "bf16"] = "no"
) -> Figures:
    """Seconds of a step of one process alone, and of two that train one model, in turn; the efficiency is their ratio.

    `batch_size` is that of each process. Three processes are started and wait for commands, so that all of it is
    measured in one run. `machine_efficiency` is the same ratio for a matrix product, which needs no communication: what
    two processes cost each other here whatever they do.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        recipes = [bench_recipe(config, batch_size * size, mixed_precision, Path(folder)) for size in (1, 2)]
        one, two = (stack.enter_context(_workers(size, recipe)) for size, recipe in zip((1, 2), recipes, strict=True))
        commands = [(one, "step"), (two, "step"), (one, "matmul"), (two, "matmul")]
        times = in_turn([partial(_slowest, *command) for command in commands], rounds)
    one_step, two_steps, one_matmul, two_matmuls = (statistics.median(each) for each in times)
    return {
        "batch_size_per_process": batch_size,
        "rounds": rounds,
        "one_process_step_seconds": one_step,
        "two_processes_step_seconds": two_steps,
        "weak_scaling_efficiency": one_step / two_steps,
        "machine_efficiency": one_matmul / two_matmuls,
    }


def _slowest(workers: Sequence[Connection], command: str) -> float:
    """Seconds until all `workers` have done a command."""
    for worker in workers:
        worker.send(command)
    return max(_receive(worker) for worker in workers)


def _receive(worker: Connection) -> float:
    try:
        if worker.poll(REPLY_SECONDS):
            return worker.recv()
    except EOFError:
        raise RunError("a process has ended too early: its memory may be short, take a smaller --batch-size") from None
    raise RunError(f"a process did not answer for {REPLY_SECONDS:.0f} s: take a smaller --variant or --batch-size")


@contextmanager
def _workers(size: int, recipe: Recipe) -> Iterator[list[Connection]]:
    """Start the processes of one run and wait until it has begun; the ends of the pipes by which they get commands."""
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


def _work(pipe: Connection, recipe: Recipe) -> None:
    """Run commands and reply how many seconds each took; the first reply says that the run has begun."""
    torch.set_num_threads(1)
    with training_loop(recipe) as (run, step):
        matmul, _ = time_matmul(run.accelerator.device, torch.float32)
        commands = {"step": step, "matmul": matmul}
        step()  # allocates
        pipe.send(0.0)
        while True:
            command = commands[pipe.recv()]
            run.accelerator.wait_for_everyone()
            pipe.send(seconds(command))


# --- `mmaudio-hf bench step`: checkpoints ----------------------------------------------------------------------------


def checkpoint(config: ModelConfig, rounds: int, folder: Path | None = None) -> Figures:
    """Stall and writing time, in s, of whole checkpoints of a model, against copying the same bytes in host memory.

    They are written to `folder`, by default a temporary one.
    """
    recipe = Recipe(name="bench", model=config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MMAudio(config).to(device)
    optimizer, ema = build_optimizer(model, OptimConfig()), PostHocEMA(model, EmaConfig().sigma_rels)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # its moments are allocated
    groups = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer), "ema": ema.tensors()}
    groups["window"] = {"sums": torch.zeros(3)}
    size = sum({t.data_ptr(): t.nbytes for group in groups.values() for t in group.values()}.values())
    groups["published"] = model.state_dict() | ema.nearest(0.05)[1]
    writer = BackgroundWriter(print)
    writer.reserve(groups)
    writer.wait()
    stalls, writes = [], []
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        for step in range(rounds):

            def write(copies: TensorGroups, step: int = step) -> None:
                publish = partial(write_pretrained, recipe, copies["published"], {}, lambda folder: None)
                save_checkpoint(Path(run_dir), TrainingState(step, copies, {}), publish)

            writer.stall_seconds = 0.0
            writer.save(groups, write)
            synchronize(device)
            stalls.append(writer.stall_seconds)
            if error := writer.finish():
                raise OSError(error)
            writes.append(writer.write_seconds)
    stall, memcpy = statistics.median(stalls), _memcpy_seconds(size, rounds)
    return {
        "checkpoint_gb": size / 1e9,
        "checkpoint_stall_seconds": stall,
        "checkpoint_write_seconds": statistics.median(writes),
        "checkpoint_memcpy_seconds": memcpy,
        "checkpoint_stall_of_memcpy": stall / memcpy,
    }


def _memcpy_seconds(size: int, rounds: int) -> float:
    """Seconds to copy `size` bytes within host memory whose pages are allocated."""
    measured = min(size, COPIED_BYTES)
    source, target = torch.ones(measured, dtype=torch.uint8), torch.ones(measured, dtype=torch.uint8)
    return statistics.median(seconds(partial(target.copy_, source)) for _ in range(rounds)) * size / measured
