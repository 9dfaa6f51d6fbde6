"""How benchmarks measure. Everything that is compared runs in turn in one process: absolute times drift."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from accelerate.state import AcceleratorState

from mmaudio_hf.bench.loader import make_stores
from mmaudio_hf.config import DataConfig, ModelConfig, Recipe, StoreConfig, TrainingConfig
from mmaudio_hf.data.loader import BatchLoader
from mmaudio_hf.data.mixture import open_mixture
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import RunError
from mmaudio_hf.training.loop import Run

MATMUL_SIZE, SMALL_MATMUL = 3072, 256
SLOW_BF16 = 0.1  # of the float32 rate: below it the processor emulates bf16, and a single sample is measured

Timed = tuple[Callable[[], object], float]
"""Something to run, and its floating-point operations."""
Result = TypeVar("Result")


def seconds(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turn(measures: Sequence[Callable[[], Result]], rounds: int, warm_up: int = 1) -> list[tuple[Result, ...]]:
    """What each of `measures` returns in `rounds` rounds, after `warm_up` more that are dropped."""
    results = [[measure() for measure in measures] for _ in range(warm_up + rounds)]
    return list(zip(*results[warm_up:], strict=True))


def compare(other: Path, program: str, arguments: Sequence[str], rounds: int) -> np.ndarray:
    """(2, rounds, F): the F numbers that `program` prints for each line it reads, with this package and with `other`'s.

    Two processes, in turn. ValueError where `other` is no checkout of this repository.
    """
    roots = (Path(__file__).parents[2], other.resolve())
    if not (roots[1] / "mmaudio_hf" / "bench").is_dir():
        way = f"make one with `git worktree add {other} COMMIT`"
        raise ValueError(f"--against {other}: no checkout of this repository; {way}")
    command = [sys.executable, "-P", "-c", program, *arguments]
    popen = partial(subprocess.Popen[str], command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def measure(process: subprocess.Popen[str]) -> list[float]:
        assert process.stdin is not None and process.stdout is not None
        print(file=process.stdin, flush=True)
        if not (line := process.stdout.readline()):
            raise RunError("a process that is measured has ended; what it said is above")
        return [float(word) for word in line.split()]

    with ExitStack() as stack:
        processes = [stack.enter_context(popen(env=os.environ | {"PYTHONPATH": str(root)})) for root in roots]
        return np.array(in_turn([partial(measure, process) for process in processes], rounds))


def median_rates(timed: Sequence[Timed], rounds: int) -> list[float]:
    """Median operations per second of each, run in turn; a single round has no warm-up, for what takes minutes."""
    times = in_turn([partial(seconds, run) for run, _ in timed], rounds, warm_up=int(rounds > 1))
    return [flops / statistics.median(each) for (_, flops), each in zip(timed, times, strict=True)]


def time_matmul(device: torch.device, dtype: torch.dtype, size: int | None = None) -> Timed:
    """A large product of square matrices, by default a small one where the processor emulates the dtype."""
    size = size or (SMALL_MATMUL if dtype == torch.bfloat16 and emulates_bf16(device) else MATMUL_SIZE)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def run() -> None:
        torch.mm(a, b)
        synchronize(device)

    return run, 2.0 * size**3


@lru_cache
def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 products are far slower than float32 ones here."""
    timed = [time_matmul(device, dtype, SMALL_MATMUL) for dtype in (torch.float32, torch.bfloat16)]
    fp32, bf16 = median_rates(timed, 2)
    return bf16 < SLOW_BF16 * fp32


def synchronize(device: torch.device) -> None:
    """Wait for queued kernels; a processor has none."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- Steps of the real training loop, one at a time, over generated stores -------------------------------------------

STEPS = 1_000_000  # more than are measured
ROWS = 64  # of the store: it stays in the page cache, as reading is measured by `bench loader`


def bench_recipe(config: ModelConfig, batch_size: int, mixed_precision: Literal["no", "bf16"], folder: Path) -> Recipe:
    """A recipe over random features, which are written to `folder` unless they are there."""
    if not (folder / "features").exists():
        make_stores(folder / "features", ROWS, 0.0, config)
    training = TrainingConfig(steps=STEPS, batch_size=batch_size, mixed_precision=mixed_precision, trackers=())
    stores = (StoreConfig(str(folder / "features" / "video")),)
    return Recipe("bench", output_dir=str(folder), model=config, data=DataConfig(train=stores), training=training)


@contextmanager
def training_loop(recipe: Recipe) -> Iterator[tuple[Run, Callable[[], None]]]:
    """A run that has begun, and a function for its next step, as `Run.train` takes it between two log lines."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of a run with another precision in this process
    model = MMAudio(recipe.model)
    channels = recipe.model.latent_channels
    model.set_latent_statistics(torch.zeros(channels), torch.ones(channels))
    mixture = open_mixture(recipe.data.train, recipe.model)
    run = Run(recipe, model, mixture)
    run.prepare()
    with run.loader(STEPS) as loader:
        yield run, partial(update, run, loader)
    mixture.close()


def update(run: Run, loader: BatchLoader) -> None:
    """The step of the next batches, to its end."""
    run.update(next(loader))
    run.guard.poll()
    synchronize(run.accelerator.device)
