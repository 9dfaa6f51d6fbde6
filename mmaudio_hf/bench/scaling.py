"""`mmaudio-hf bench scaling`: what a second process adds, each with its own batch and one thread (weak scaling)."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate.utils import patch_environment
from accelerate.utils.other import get_free_port

from mmaudio_hf.bench.loop import bench_recipe, training_loop
from mmaudio_hf.bench.measure import time_matmul
from mmaudio_hf.config import ModelConfig, Recipe
from mmaudio_hf.schema import RunError

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
        matmul, _ = time_matmul(run.device, torch.float32)
        orders = {"step": step, "matmul": matmul}
        step()  # allocates
        pipe.send(0.0)
        while True:
            order = orders[pipe.recv()]
            run.accelerator.wait_for_everyone()
            began = time.perf_counter()
            order()
            pipe.send(time.perf_counter() - began)
