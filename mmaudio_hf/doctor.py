"""`mmaudio-hf doctor`: whether a recipe will run here, before it is started.

Every finding is "ok", "warn" or "FAIL", and whatever fails says what to do.
"""

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from mmaudio_hf import weights
from mmaudio_hf.config import Recipe, StoreConfig, micro_batch_size
from mmaudio_hf.data.mixture import Mixture, check_encoders, open_mixture
from mmaudio_hf.data.store import bytes_of
from mmaudio_hf.evaluation.av_bench import AvBench, hub_truth, truth_caches
from mmaudio_hf.features.encoders import check_encoders as check_encoder_files
from mmaudio_hf.features.encoders import pick_device
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import HUB_PREFIX, split_hub_id
from mmaudio_hf.training.checkpoint import list_checkpoints
from mmaudio_hf.training.finetune import set_trainable
from mmaudio_hf.training.logs import check_trackers, device_peak
from mmaudio_hf.training.memory import MemoryEstimate, training_flops

UTILISATION = 0.4  # assumed share of a device's peak, while the run has not measured its own speed
GPU_CONTEXT = 1.2e9  # bytes that CUDA and its libraries take besides
TIGHT = 0.9  # of the memory: more than this may not fit after all
_LOOKED_AT = 64  # rows of a store that are read
_READ_SECONDS = 1.5


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    level: str  # "ok", "warn" or "FAIL"
    subject: str
    message: str


def examine(
    recipe: Recipe,
    processes: int,
    checks: Mapping[str, weights.Check],
    *,
    machines: int = 1,
    fsdp: bool = False,
    quick: bool = False,
) -> Iterator[Finding]:
    """Everything there is to say of `recipe` on `processes` devices of this machine, in the order of the table.

    checks: how released files without published checksums are told, for `weights.problem_of`. machines: as many like
    this one train together. fsdp: the launch shares out the network. quick: released files are only looked for, and no
    speed is measured.
    """
    device, world = pick_device("auto"), processes * machines
    yield from _software(recipe, device, processes)
    yield from _batch(recipe, world)
    yield from _run_folder(recipe)
    mixtures: dict[str, Mixture] = {}
    yield from _stores(recipe, mixtures)
    yield from _weights(recipe, checks, quick, complete=all(mixtures.get(s) for s in _needed_splits(recipe)))
    yield from _trackers(recipe)
    yield from evaluation_findings(recipe)
    yield from _hub(recipe)
    if recipe.training.batch_size % (world * recipe.training.accumulation_steps):
        return  # what follows is about the share of one device
    estimate = MemoryEstimate(recipe, lambda: set_trainable(MMAudio(recipe.model), recipe.finetune))
    yield from _memory(recipe, device, processes, machines, estimate, fsdp)
    yield from _disk_space(recipe, estimate)
    if not quick:
        rate, finding = _expected_speed(recipe, device, processes, machines)
        yield finding
        if "train" in mixtures:
            yield _reading(recipe, mixtures["train"], rate / machines)
    for mixture in mixtures.values():
        mixture.close()


def as_table(findings: Sequence[Finding], width: int = 120) -> str:
    """The findings as lines of text."""
    column = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        opening = f"{finding.level:4}  {finding.subject:{column}}  "
        lines += textwrap.wrap(
            finding.message, width, initial_indent=opening, subsequent_indent=" " * len(opening), break_on_hyphens=False
        )
    return "\n".join(lines)


# --- what is installed and set -------------------------------------------------------------------------------------


def _software(recipe: Recipe, device: torch.device, processes: int) -> Iterator[Finding]:
    found = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate"))
    yield Finding("ok", "software", f"Python {platform.python_version()}, {found}")
    bf16 = recipe.training.mixed_precision == "bf16"
    if device.type != "cuda":
        cores = len(os.sched_getaffinity(0))
        level = "warn" if bf16 else "ok"
        note = ": most processors have no bf16 arithmetic, training.mixed_precision=no is faster there" if bf16 else ""
        yield Finding(level, "device", f"no GPU, {cores} CPU cores, processes: {processes}{note}")
    elif processes > (count := torch.cuda.device_count()):
        yield Finding("FAIL", "device", f"{processes} processes, but {count} GPUs: launch {count}")
    elif bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        yield Finding("FAIL", "device", f"{name} has no bf16 arithmetic: set training.mixed_precision=no")
    else:
        yield Finding("ok", "device", f"{processes} of {count} GPUs, {torch.cuda.get_device_name(device)}")
    if recipe.finetune.lora.rank and importlib.util.find_spec("peft") is None:
        yield Finding("FAIL", "software", "finetune.lora needs peft: run `pip install 'mmaudio-hf[lora]'`")


def _batch(recipe: Recipe, processes: int) -> Iterator[Finding]:
    training = recipe.training
    try:
        size = micro_batch_size(training, processes)
    except ValueError as error:
        yield Finding("FAIL", "batch", str(error))
        return
    split = f"{training.batch_size} = processes {processes} x passes {training.accumulation_steps} x samples {size}"
    yield Finding("ok", "batch", split)


def _run_folder(recipe: Recipe) -> Iterator[Finding]:
    folder, checkpoints = recipe.run_dir, list_checkpoints(recipe.run_dir)
    if not os.access(_existing(folder), os.W_OK):
        message = f"{_existing(folder)} cannot be written to: set output_dir to a folder of yours"
        yield Finding("FAIL", "run folder", message)
    elif checkpoints and recipe.resume == "never":
        message = f"{folder} holds checkpoints and resume is 'never': choose another name or resume=auto"
        yield Finding("FAIL", "run folder", message)
    else:
        state = f"goes on from {checkpoints[-1].name}" if checkpoints else "a new run"
        yield Finding("ok", "run folder", f"{folder}: {state}")


def _trackers(recipe: Recipe) -> Iterator[Finding]:
    for name in recipe.training.trackers:
        try:
            check_trackers([name])
            yield Finding("ok", "tracker", f"{name} {version(name)}")
        except ValueError as error:
            yield Finding("FAIL", "tracker", str(error))


def _hub(recipe: Recipe) -> Iterator[Finding]:
    """Whether what `resume` names is on the Hub, and whether pushes will be taken; nothing is changed there."""
    repo, resumes = recipe.hub.repo_id, recipe.resume.startswith(HUB_PREFIX)
    if not (repo or resumes):
        return
    from mmaudio_hf.hub.runs import plan_pull
    from mmaudio_hf.hub.sync import check_repository

    notes: list[str] = []
    try:
        if resumes and not list_checkpoints(recipe.run_dir):
            source, revision = split_hub_id(recipe.resume.removeprefix(HUB_PREFIX))
            if source != repo or revision:  # else a first launch begins at step 0
                plan = plan_pull(source, revision)
                yield Finding("ok" if plan.has_state else "FAIL", "resume", _resumed(recipe.resume, plan))
        if repo:
            check_repository(recipe.hub, recipe.run_dir, resumes, notes.append, create=False)
    except (ValueError, ConnectionError) as error:
        yield Finding("FAIL", "Hub", str(error))
        return
    yield from (Finding("warn", "Hub", note) for note in notes)
    if repo and not notes:
        yield Finding("ok", "Hub", f"{repo} takes pushes")


def _resumed(resume: str, plan) -> str:
    if not plan.has_state:
        return f"{resume} has no training state, only a network: name it in finetune.init_from"
    return f"goes on from step {plan.step} of {resume}"


def evaluation_findings(recipe: Recipe) -> Iterator[Finding]:
    """Whether the published scores that the recipe asks for can be had; training does without av-benchmark."""
    settings = recipe.evaluation
    if not (settings.metrics and (settings.every or settings.after_training)):
        return
    problem = AvBench.from_recipe(recipe).problem()
    where = settings.av_bench_python or "this environment"
    found = f"without {', '.join(settings.metrics)} until this is mended: {problem}" if problem else f"works in {where}"
    yield Finding("warn" if problem else "ok", "av-benchmark", found)
    for split in sorted(recipe.generated_splits):
        source, subject = getattr(settings.truth, split), f"evaluation.truth.{split}"
        if not source:
            continue
        try:
            if hub_truth(source) is None:
                truth_caches(source)
            else:
                note = f"{source} is no folder here and will be fetched from the Hub: a connection is needed"
                yield Finding("warn", subject, note)
        except ValueError as error:
            yield Finding("FAIL", subject, str(error))


# --- what is there -------------------------------------------------------------------------------------------------


def _needed_splits(recipe: Recipe) -> list[str]:
    return [split for split in ("train", "validation") if split == "train" or recipe.data.validation]


_ABSENT = {
    "train": ("FAIL", "there is nothing to train on; name one"),
    "validation": ("warn", "nothing will tell when training goes wrong"),
    "test": ("ok", "the report will show no clips"),
}


def _stores(recipe: Recipe, mixtures: dict[str, Mixture]) -> Iterator[Finding]:
    """Open the stores of every split, into `mixtures`, and look at some rows."""
    for split in ("train", "validation", "test"):
        sources: Sequence[StoreConfig] = getattr(recipe.data, split)
        subject = f"data.{split}"
        if not sources:
            yield Finding(_ABSENT[split][0], subject, f"names no store: {_ABSENT[split][1]}")
            continue
        try:
            mixture = open_mixture(sources, recipe.model, recipe.encoders, recipe.seed, recipe.extraction)
            for store in mixture.stores:
                _look_at(store)
            mixtures[split] = mixture
            check_encoders([store for found in mixtures.values() for store in found.stores])
        except (ValueError, OSError) as error:
            needed = split != "test" or split in recipe.generated_splits
            yield Finding("FAIL" if needed else "warn", subject, str(error))
            continue
        rows = ", ".join(f"{store.path.name} {len(store):,}" for store in mixture.stores)
        yield Finding("ok", subject, f"{rows} rows; {len(mixture):,} an epoch")


def _look_at(store) -> None:
    """ValueError where some rows, spread over the store, hold values that are not finite."""
    rows = np.unique(np.linspace(0, len(store) - 1, _LOOKED_AT).round().astype(np.int64))
    for name, values in store.read(rows).items():
        finite = values.flatten(1).float().isfinite().all(1)
        if not finite.all():
            row = int(rows[int(finite.int().argmin())])
            raise ValueError(
                f"{store.path}: {name} of row {row} ({store.ids[row]}) is not finite; `mmaudio-hf verify {store.path}`"
                " finds all such rows, then extract the store anew"
            )


def _weights(recipe: Recipe, checks, quick: bool, complete: bool) -> Iterator[Finding]:
    encoders, folder = recipe.encoders, Path(recipe.encoders.weights_dir)
    if encoders.kind == "toy":
        yield from _toy_codec(recipe, folder, complete)
        return
    decoder = {"v1-16.pth", "best_netG.pt", "v1-44.pth"} | {f"{weights.BIGVGAN}/bigvgan_generator.pt"}
    for weight in weights.needed(recipe):
        if weight.path == weights.CLAP_FILE:
            continue  # looked for with av-benchmark, which reads it
        started = weight.path in ("empty_string.pth", Path(recipe.finetune.init_from).name)
        now = not complete or started or (recipe.generated_splits and weight.path in decoder)
        if quick and weights.locate(weight, folder) is not None:
            problem = None
        else:
            problem = weights.problem_of(weight, folder, checks)
        if problem is None:
            yield Finding("ok", "weights", f"{weight.path}: {'there' if quick else 'verified'}")
        else:
            later = "" if now else " (training does without; generation from files does not)"
            yield Finding("FAIL" if now else "warn", "weights", problem + later)


def _toy_codec(recipe: Recipe, folder: Path, complete: bool) -> Iterator[Finding]:
    try:
        check_encoder_files(replace(recipe.encoders, weights_dir=str(folder)), recipe.model.mode, ("decode",))
        yield Finding("ok", "weights", "toy encoders, and their codec is fitted")
    except ValueError as error:
        yield Finding("FAIL" if recipe.generated_splits and complete else "warn", "weights", str(error))


# --- what is enough ------------------------------------------------------------------------------------------------


def _memory(
    recipe: Recipe, device: torch.device, processes: int, machines: int, estimate: MemoryEstimate, fsdp: bool
) -> Iterator[Finding]:
    world = processes * machines
    parts = estimate.on_device(world, recipe.training.accumulation_steps, fsdp)
    if device.type == "cuda":
        room, what, share = torch.cuda.mem_get_info(device)[1], "the GPU has", GPU_CONTEXT
    else:
        room, what, share = available_memory() // processes, "each process can have", 0
    need = sum(parts.values()) + share
    listed = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
    message = f"about {_gb(need)} a device ({listed}); {what} {_gb(room)}"
    if need <= room:
        level = "ok" if need <= TIGHT * room else "warn"
        yield Finding(level, "memory", message + ("" if level == "ok" else ": this may be too tight"))
        return
    yield Finding("FAIL", "memory", f"{message}: {_smaller(recipe, world, estimate, fsdp, room - share)}")


def _smaller(recipe: Recipe, processes: int, estimate: MemoryEstimate, fsdp: bool, room: float) -> str:
    """What makes the recipe fit into `room` bytes."""
    share = recipe.training.batch_size // processes
    for steps in (n for n in range(recipe.training.accumulation_steps + 1, share + 1) if share % n == 0):
        if sum(estimate.on_device(processes, steps, fsdp).values()) <= room * TIGHT:
            return f"set training.accumulation_steps={steps}"
    if not recipe.training.activation_checkpointing:
        return "set training.activation_checkpointing=true, or take more or larger devices"
    if not fsdp and processes > 1:
        return "share out the network by accelerate_configs/fsdp.yaml, or take larger devices"
    return "a smaller model or larger devices are needed"


def available_memory() -> int:
    """Bytes of host memory that programs can still take."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024


def _disk_space(recipe: Recipe, estimate: MemoryEstimate) -> Iterator[Finding]:
    training = recipe.training
    extra = training.steps // training.keep_every if training.keep_every else 0
    checkpoints = training.keep_checkpoints + extra + bool(training.best_metric) + 1  # the one being written
    snapshots = training.steps // recipe.ema.snapshot_every
    need = checkpoints * estimate.checkpoint + snapshots * estimate.snapshot
    have = sum(path.stat().st_size for path in recipe.run_dir.rglob("*") if path.is_file() and not path.is_symlink())
    place = _existing(recipe.run_dir)
    free = shutil.disk_usage(place).free
    message = (
        f"the run takes about {_gb(need)} ({checkpoints} checkpoints of {_gb(estimate.checkpoint)}, {snapshots} EMA"
        f" snapshots of {_gb(estimate.snapshot)}), of which {_gb(have)} is there; {place} has {_gb(free)} left"
    )
    if need - have <= free:
        yield Finding("ok", "disk space", message)
    else:
        way = "make room, set output_dir to another disk, raise ema.snapshot_every or lower training.keep_checkpoints"
        yield Finding("FAIL", "disk space", f"{message}: {way}")


def _expected_speed(recipe: Recipe, device: torch.device, processes: int, machines: int) -> tuple[float, Finding]:
    """Samples per second of all processes: as the run has measured it, or assumed."""
    rate, how = _last_speed(recipe.run_dir / "speed.jsonl"), "as the run had it last"
    if rate is None:
        peak = device_peak(device, recipe.training.mixed_precision)
        together = machines * (1 if device.type == "cpu" else processes)  # processes share the cores
        rate = UTILISATION * peak.flops_per_second * together / training_flops(recipe.model)
        source = "a measured" if peak.measured else "the"
        how = f"if {UTILISATION:.0%} of {source} peak of {peak.flops_per_second / 1e12:.3g} TFLOP/s is reached"
    seconds = recipe.training.steps * recipe.training.batch_size / rate
    length = f"{seconds:.3g} s" if seconds < 7200 else f"{seconds / 3600:.3g} h"
    steps = rate / recipe.training.batch_size
    message = f"{rate:.3g} samples/s, {steps:.3g} steps/s, {length} for {recipe.training.steps:,} steps, {how}"
    return rate, Finding("ok", "speed", message)


def _last_speed(path: Path) -> float | None:
    for line in reversed(path.read_text().splitlines() if path.is_file() else []):
        with contextlib.suppress(ValueError):  # a line cut short by a kill
            return json.loads(line)["speed/samples_per_second"]
    return None


def _reading(recipe: Recipe, mixture: Mixture, samples_per_second: float) -> Finding:
    """What the disk gives, past the page cache, against what training at this speed asks for."""
    found = measure_reading(mixture, recipe.data.read_threads, recipe.seed)
    share = found.samples_per_second / samples_per_second
    message = (
        f"random rows come at {found.samples_per_second:.3g} samples/s ({found.bytes_per_second / 1e6:.3g} MB/s) past"
        f" the page cache, training asks for {samples_per_second:.3g}"
    )
    if share >= 1:
        return Finding("ok", "reading", message)
    way = "put the stores on a faster disk, or see whether they fit into memory, where later epochs find them"
    return Finding("warn", "reading", f"{message}: it will wait {1 - share:.0%} of the time; {way}")


@dataclass(frozen=True)
class ReadRate:
    """How fast rows come."""

    samples_per_second: float
    bytes_per_second: float


def measure_reading(mixture: Mixture, threads: int, seed: int = 0, seconds: float = _READ_SECONDS) -> ReadRate:
    """Read random samples for `seconds` with `threads` threads, each dropped from the page cache first."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(mixture))[:4096]
    deadline = time.perf_counter() + seconds

    def read(positions: np.ndarray) -> tuple[int, int]:
        count = size = 0
        for position in positions:
            source, row = (int(value[0]) for value in mixture.locate(np.array([position])))
            store = mixture.stores[source]
            for name, column in store.columns.items():
                target = torch.empty(column.shape, dtype=column.dtype)
                store.drop_from_cache(name, np.array([row]))
                store.read_into(name, np.array([row]), bytes_of(target))
                size += column.row_bytes
            count += 1
            if time.perf_counter() > deadline:
                break
        return count, size

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        counts, sizes = zip(*pool.map(read, np.array_split(order, threads)), strict=True)
    elapsed = time.perf_counter() - began
    return ReadRate(sum(counts) / elapsed, sum(sizes) / elapsed)


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
