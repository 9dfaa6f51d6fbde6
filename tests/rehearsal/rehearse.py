"""`make rehearse`: the CUDA paths at full size on fake tensors, against ceilings. Nothing here is measured on a GPU.

    python tests/rehearsal/rehearse.py [NAME ...] [--json]

Counts kernels, bytes moved, peak memory, host syncs and attention kernels of training steps, alone and under FSDP, and
compares the peaks with what `mmaudio-hf doctor` says. Exit code 1 when a figure is above its ceiling.
"""

# isort: off
from fake_cuda import FakeCuda  # before torch: it loads stand-ins for the driver

# isort: on
import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mmaudio_hf.config import ModelConfig, Recipe, load_recipe
from mmaudio_hf.data.loader import Batch
from mmaudio_hf.data.noise import Draws
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training import distributed
from mmaudio_hf.training.checkpointer import _allocate_packed
from mmaudio_hf.training.distributed import local_shards
from mmaudio_hf.training.finetune import set_trainable
from mmaudio_hf.training.loop import Run
from mmaudio_hf.training.memory import MemoryEstimate

ROOT = Path(__file__).parents[2]

# Where the host may wait in a step: the guard reads the flag of the step before, which has long been copied.
ALLOWED_SYNCS = ("event.synchronize in training/guard.py:_read",)


class StubStore:
    """What `Run` asks of a store before anything is read."""

    has_video = has_text = True
    identity: ClassVar[dict] = {}

    def __init__(self, name: str):
        self.path = Path(name)


class StubMixture:
    """Six stores without rows: batches of the rehearsal are made from shapes."""

    def __init__(self):
        self.stores = [StubStore(f"store_{i}") for i in range(6)]

    def __len__(self) -> int:
        return 1_000_000


def make_batch(config: ModelConfig, size: int) -> Batch:
    """A batch of `size` samples in host memory, all with video."""
    lengths = (config.latent_length, config.latent_channels)
    shapes = {
        **dict.fromkeys(("mean", "std"), (size, *lengths)),
        "clip_features": (size, config.clip_length, config.clip_dim),
        "sync_features": (size, config.sync_length, config.sync_dim),
        "text_features": (size, config.text_tokens, config.text_dim),
    }
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    for name in ("video_rows", "source"):
        tensors[name] = torch.empty(size, dtype=torch.int64)
    for name in ("has_video", "has_text", "valid"):
        tensors[name] = torch.empty(size, dtype=torch.bool)
    noise = Draws.empty(size, lengths)
    return Batch(step=0, ids=[f"id_{i}" for i in range(size)], noise=noise, **tensors)


def copied_steps(config: ModelConfig, size: int, micro_batches: int) -> Iterator[list[Batch]]:
    """The batches of each step, copied to the device as `BatchLoader` does: on a stream of its own, one batch ahead.

    The loop still has those of a step when the next ones are requested.
    """
    stream = torch.cuda.Stream()

    def copy() -> Batch:
        with torch.cuda.stream(stream):
            return make_batch(config, size).to("cuda", non_blocking=True)

    ahead = copy()
    while True:
        step = [ahead, *(copy() for _ in range(micro_batches - 1))]
        ahead = copy()
        yield step


def recipe_of(name: str, *overrides: str) -> Recipe:
    """A published recipe, uncompiled, with its run folder out of the way."""
    fixed = (f"output_dir={tempfile.gettempdir()}/rehearsal", "training.compile='off'")
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", [*fixed, *overrides])


def steps(device: FakeCuda, recipe: Recipe, processes: int = 1) -> dict[str, Any]:
    """Figures of the second step of `recipe` on this device: the first one makes the moments of the optimizer."""
    with torch.device("cuda"):
        model = MMAudio(recipe.model)
    run = Run(recipe, set_trainable(model, recipe.finetune), StubMixture())
    run.prepare()
    training = recipe.training
    size = training.batch_size // processes // training.accumulation_steps
    batches = copied_steps(recipe.model, size, training.accumulation_steps)
    for _ in range(2):
        gc.collect()
        device.counts.reset()
        device.syncs.clear()
        device.attention.clear()
        step = next(batches)
        run.update(step)
        run.guard.poll()
    misplaced = [name for name, p in model.named_parameters() if p.device.type != "cuda"]
    assert not misplaced, f"not on the device: {misplaced}"
    figures = figures_of(device)
    saved = local_shards(run.checkpointer.tensors(), first=True)  # tensors that are in two groups are two objects
    _allocate_packed({(name,): tensor for tensors in saved.values() for name, tensor in tensors.items()})
    return figures | {"host_gb": device.counts.pinned_bytes / 1e9}


def figures_of(device: FakeCuda) -> dict[str, Any]:
    """Counts since the last reset."""
    counts = device.counts
    return {
        "kernels": counts.kernels,
        "gb_moved": counts.bytes / 1e9,
        "tflop": counts.flops / 1e12,
        "estimate_ms": counts.seconds * 1e3,
        "peak_gb": counts.peak_bytes / 1e9,
        "attention": {" ".join(key).strip(): calls for key, calls in device.attention.items()},
        "syncs": dict(device.syncs),
    }


def train_step(name: str, *overrides: str) -> dict[str, Any]:
    """One step on one device, and the doctor's estimate of its peak."""
    recipe = recipe_of(name, *overrides)
    with FakeCuda() as device:
        figures = steps(device, recipe)
    return figures | estimates(recipe, 1, False)


def fsdp_step(name: str, *overrides: str, processes: int = 8) -> dict[str, Any]:
    """The same as one of `processes` that shard the model; in a process of its own, since it joins a process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"WORLD_SIZE": str(processes), "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_MIXED_PRECISION": "bf16"}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    make_mesh = distributed.init_device_mesh

    def real_mesh(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():  # the ranks of a mesh are read by the host
            return make_mesh(*args, **kwargs)

    distributed.init_device_mesh = real_mesh
    recipe = recipe_of(name, *overrides)
    with FakeCuda(devices=processes) as device:
        figures = steps(device, recipe, processes)
    return figures | estimates(recipe, processes, True)


def estimates(recipe: Recipe, processes: int, fsdp: bool) -> dict[str, float]:
    """GB that doctor says of the tensors on a device, without its allowance for the context, and of the host copy."""
    memory = MemoryEstimate(recipe, lambda: set_trainable(MMAudio(recipe.model), recipe.finetune))
    on_device = memory.on_device(processes, recipe.training.accumulation_steps, fsdp)
    # One process a machine here; what FSDP gathers to publish is not pinned.
    on_host = memory.on_host(processes, processes, recipe.training.accumulation_steps, fsdp)["checkpoint copy"]
    gathered = 4 * memory.parameters if fsdp else 0
    return {"doctor_gb": sum(on_device.values()) / 1e9, "doctor_host_gb": (on_host - gathered) / 1e9}


SMALL = ("small_16k", "training.batch_size=256")
LARGE = ("large_44k_v2", "training.batch_size=64")
RECOMPUTED = "training.activation_checkpointing=true"
CASES: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...], dict[str, float]]] = {
    "small_16k": (train_step, SMALL, {"kernels": 2600, "gb_moved": 330, "estimate_ms": 160, "peak_gb": 38}),
    "large_44k_v2": (train_step, LARGE, {"kernels": 4430, "gb_moved": 435, "estimate_ms": 254, "peak_gb": 60}),
    "small_16k recomputed": (train_step, (*SMALL, RECOMPUTED), {}),
    "large_44k_v2 recomputed": (train_step, (*LARGE, RECOMPUTED), {}),
    "large_44k_v2 fsdp": (fsdp_step, ("large_44k_v2",), {}),
    "large_44k_v2 fsdp recomputed": (fsdp_step, ("large_44k_v2", RECOMPUTED), {}),
}


def problems_of(figures: dict[str, Any], ceilings: dict[str, float]) -> Iterator[str]:
    """What is above its ceiling, or not as it must be."""
    for key, ceiling in ceilings.items():
        if figures[key] > ceiling:
            yield f"{key} {figures[key]:.4g} is above {ceiling:g}"
    if any(kernel.startswith("math") for kernel in figures["attention"]):
        yield f"attention without a fused kernel: {figures['attention']}"
    if unexpected := set(figures["syncs"]) - set(ALLOWED_SYNCS):
        yield f"the host waits: {', '.join(sorted(unexpected))}"
    for peak, estimate in (("peak_gb", "doctor_gb"), ("host_gb", "doctor_host_gb")):
        if abs(error := figures[estimate] / figures[peak] - 1) > 0.03:
            yield f"{estimate} is {error:+.1%} off: {figures[estimate]:.2f} of {figures[peak]:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        warnings.filterwarnings("error", message="FSDP2-wrapped module")  # a view may lose its hook
        function, arguments, _ = CASES[options.names[0]]
        print(json.dumps(function(*arguments)))
        return 0
    failed = False
    for name in options.names or CASES:
        # Each in a process of its own: a process group, and accelerate's state, stay for the life of one.
        command = [sys.executable, __file__, "--inside", name]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
        figures = json.loads(result.stdout.splitlines()[-1])
        problems = list(problems_of(figures, CASES[name][2]))
        failed |= bool(problems)
        if options.json:
            print(json.dumps({"case": name, **figures, "problems": problems}), flush=True)
            continue
        print(
            f"{name}: {figures['kernels']} kernels, {figures['gb_moved']:.0f} GB moved, {figures['tflop']:.1f} TFLOP,"
            f" estimate {figures['estimate_ms']:.0f} ms, peak {figures['peak_gb']:.2f} GB (doctor"
            f" {figures['doctor_gb']:.2f}), host copy {figures['host_gb']:.2f} GB (doctor"
            f" {figures['doctor_host_gb']:.2f}), attention {figures['attention']}, syncs {figures['syncs'] or 'none'}",
            *(f"  FAILED: {problem}" for problem in problems),
            sep="\n",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
