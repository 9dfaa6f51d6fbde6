"""`mmaudio-hf doctor`: whether a recipe will run here, before it is started.

`CHECKS` names everything that is checked, in the order of the printed table. Findings are "ok", "warn" or "FAIL", and
whatever fails says what to do.
"""

import contextlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import ComputeEnvironment, DistributedType, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from mmaudio_hf import weights
from mmaudio_hf.config import Recipe, StoreConfig, config_of_duration, is_released, micro_batch_size, samples_per_step
from mmaudio_hf.data.mixture import Mixture, check_encoders, open_mixture, samples_per_epoch
from mmaudio_hf.data.remote import RemoteStore
from mmaudio_hf.evaluation.av_bench import AvBench, hub_truth, truth_caches
from mmaudio_hf.features.encoders import check_encoders as check_encoder_files
from mmaudio_hf.features.encoders import pick_device
from mmaudio_hf.files import read_json
from mmaudio_hf.media.lists import source_problems
from mmaudio_hf.models.convert import check_sizes
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.pretrained import ENCODERS_FILE, hub_config, is_weights_file
from mmaudio_hf.schema import HUB_PREFIX, split_hub_id
from mmaudio_hf.training.checkpoint import STATE_FILE, TrainingState, list_checkpoints
from mmaudio_hf.training.distributed import check_launch, launch_notes
from mmaudio_hf.training.finetune import check_encoders as check_kind_of_encoders
from mmaudio_hf.training.finetune import read_pretrained, set_trainable
from mmaudio_hf.training.logs import check_trackers, device_peak
from mmaudio_hf.training.memory import MemoryEstimate, training_flops
from mmaudio_hf.training.resume import check_same_run, dependencies

UTILISATION = 0.4  # assumed fraction of a device's peak, while the run has not measured its own speed
# What a GPU needs besides tensors: assumed, since none was at hand.
CUDA_CONTEXT = 0.8e9  # context, kernels, workspaces of cuBLAS and cuDNN
NCCL_BUFFERS = 0.5e9  # of a process among several
FRAGMENTATION = 0.04  # of the tensors: blocks that the caching allocator has and cannot use
TIGHT = 0.9  # of the memory: more than this may not fit after all
SAMPLED_ROWS = 64  # of a store, to look for values that are not finite
READ_SECONDS = 1.5
# Launchers of accelerate that start other programs than this one, or need a package that ends in a traceback without.
NOT_LAUNCHED = (ComputeEnvironment.AMAZON_SAGEMAKER, DistributedType.DEEPSPEED, DistributedType.XLA)
LONGEST = 90 * 86400  # s; a run that would take longer is hardly what somebody wants


class Finding(NamedTuple):
    """One line of the table."""

    level: str  # "ok", "warn" or "FAIL"
    subject: str
    message: str


@dataclass
class Launch:
    """What is checked: a recipe, on `machines` machines like this one with `processes` processes (and devices) each.

    fsdp: the launch shards the model. quick: released files are only looked for, and no speed is measured.
    weight_checks: how released files without published checksums are recognised, for `weights.problem_of`.
    """

    recipe: Recipe
    processes: int = 1
    machines: int = 1
    fsdp: bool = False
    quick: bool = False
    weight_checks: Mapping[str, weights.Check] = field(default_factory=dict)
    mixtures: dict[str, Mixture] = field(default_factory=dict)  # by split: those whose check is done

    def __post_init__(self) -> None:
        self.world = self.processes * self.machines
        self.device = pick_device("auto")

    @cached_property
    def of_durations(self) -> list[tuple[Recipe, float]]:
        """The recipe with clips of each duration alone, and its share of the steps, as far as the stores are there."""
        training, pairs = self.recipe.training, [(self.recipe.model.duration, 1)]
        with contextlib.suppress(ValueError, OSError):  # the check of data.train says what is wrong with it
            mixture = open_mixture(self.recipe.data.train, self.recipe.model)
            pairs = [(bucket.duration or 0, bucket.samples) for bucket in mixture.buckets]
            mixture.close()
        recipes, weights = [], []
        for duration, samples in pairs:
            config = config_of_duration(self.recipe.model, duration)
            size = samples_per_step(training, config.latent_length)
            alone = replace(training, batch_size=size, batch_tokens=0, batch_size_multiple=8)
            recipes.append(replace(self.recipe, model=config, training=alone))
            weights.append(samples / size)
        return [(recipe, weight / sum(weights)) for recipe, weight in zip(recipes, weights, strict=True)]

    def splits(self, accumulation_steps: int) -> bool:
        """Whether the steps of every duration split evenly over the processes, with so many passes."""
        sizes = [recipe.training.batch_size for recipe, _ in self.of_durations]
        return all(size % (self.world * accumulation_steps) == 0 for size in sizes)

    @cached_property
    def estimate(self) -> MemoryEstimate:
        """That of the duration which takes most."""
        estimates = [
            MemoryEstimate(recipe, lambda of=recipe: set_trainable(MMAudio(of.model), of.finetune))  # type: ignore[misc]
            for recipe, _ in self.of_durations
        ]
        passes = self.recipe.training.accumulation_steps
        return max(estimates, key=lambda each: sum(each.on_device(self.world, passes, self.fsdp).values()))

    @property
    def has_stores(self) -> bool:
        """Whether the stores that training reads are there."""
        return "train" in self.mixtures and ("validation" in self.mixtures or not self.recipe.data.validation)


Check = Callable[[Launch], Iterator[tuple[str, str]]]
"""Yields levels and messages; a ValueError that it raises is a FAIL."""


def examine(launch: Launch, checks: Mapping[str, Check] | None = None) -> Iterator[Finding]:
    """The findings of `checks`, by default all of `CHECKS`."""
    passes = launch.recipe.training.accumulation_steps
    for subject, check in (CHECKS if checks is None else checks).items():
        try:
            if subject in PER_DEVICE and not launch.splits(passes):
                continue
            for level, message in check(launch):
                yield Finding(level, subject, message)
        except (ValueError, ConnectionError) as error:
            yield Finding("FAIL", subject, str(error))
    for mixture in launch.mixtures.values():
        mixture.close()


def as_table(findings: Sequence[Finding], width: int = 120) -> str:
    """The findings as lines of text."""
    column = max(len(finding.subject) for finding in findings)
    lines = []
    for level, subject, message in findings:
        prefix = f"{level:4}  {subject:{column}}  "
        indent = " " * len(prefix)
        for line in message.splitlines():  # those of changed settings have one each
            lines += textwrap.wrap(line, width, initial_indent=prefix, subsequent_indent=indent, break_on_hyphens=False)
            prefix = indent
    return "\n".join(lines)


# --- Software and settings -------------------------------------------------------------------------------------------


def _software(launch: Launch) -> Iterator[tuple[str, str]]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate"))
    yield "ok", f"Python {platform.python_version()}, {versions}"
    if launch.recipe.finetune.lora.rank and importlib.util.find_spec("peft") is None:
        yield "FAIL", "finetune.lora needs peft: run `pip install 'mmaudio-hf[lora]'`"
    if launch.recipe.optim.moments == "8bit" and importlib.util.find_spec("bitsandbytes") is None:
        yield "FAIL", "optim.moments=8bit needs bitsandbytes: run `pip install 'mmaudio-hf[8bit]'`"


def _device(launch: Launch) -> Iterator[tuple[str, str]]:
    processes, bf16 = launch.processes, launch.recipe.training.mixed_precision == "bf16"
    if launch.device.type != "cuda":
        note = ": most processors have no bf16 arithmetic, training.mixed_precision=no is faster there" if bf16 else ""
        cores = len(os.sched_getaffinity(0))
        yield "warn" if bf16 else "ok", f"no GPU, {cores} CPU cores, processes: {processes}{note}"
        return
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(launch.device)
    if processes > count:
        yield "FAIL", f"{processes} processes, but {count} GPUs: launch {count}"
    elif bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "FAIL", f"{name} has no bf16 arithmetic: set training.mixed_precision=no"
    else:
        yield "ok", f"{processes} of {count} GPUs, {name}"


def _launch(launch: Launch) -> Iterator[tuple[str, str]]:
    """What training would take, or refuse, of this shell and of the user's own configuration of accelerate."""
    try:
        check_launch()
        own = [("warn", note) for note in launch_notes(launch.recipe)]
    except ValueError as error:
        own = [("FAIL", str(error))]
    yield from own or [("ok", "nothing in the environment changes the recipe")]
    if not Path(default_config_file).is_file():
        return
    try:
        config, quiet = load_config_from_file(None), contextlib.redirect_stderr(io.StringIO())
        for setting in (config.compute_environment, config.distributed_type):
            if setting in NOT_LAUNCHED:
                raise ValueError(f"{setting.value} is not supported")
        with quiet, warnings.catch_warnings(action="ignore"):
            arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(["train.py"]))
            several = arguments.multi_gpu or arguments.use_fsdp or arguments.use_megatron_lm
            environment = prepare_multi_gpu_env(arguments) if several else prepare_simple_launcher_cmd_env(arguments)[1]
        with patch_environment(**environment | ({"WORLD_SIZE": "1"} if several else {})):  # torchrun sets it
            check_launch()
            notes = launch_notes(launch.recipe)
    except Exception as error:  # the launcher's own: it ends before training begins, which could not say a word
        notes = [" ".join(str(error).split())]
    way = f"`accelerate launch` without --config_file reads {default_config_file}"
    yield from (("warn", f"{way}: {note}") for note in notes if ("warn", note) not in own)


def _batch(launch: Launch) -> Iterator[tuple[str, str]]:
    training, several = launch.recipe.training, len(launch.of_durations) > 1
    for recipe, share in launch.of_durations:
        size = micro_batch_size(training, launch.world, recipe.model.latent_length)
        of = f" of {recipe.model.duration:g} s in {share:.0%} of the steps" if several else ""
        passes = f"processes {launch.world} x passes {training.accumulation_steps}"
        yield "ok", f"{recipe.training.batch_size}{of} = {passes} x samples {size}"


def _run_folder(launch: Launch) -> Iterator[tuple[str, str]]:
    folder, checkpoints = launch.recipe.run_dir, list_checkpoints(launch.recipe.run_dir)
    if not os.access(_existing(folder), os.W_OK):
        yield "FAIL", f"{_existing(folder)} cannot be written to: set output_dir to a folder of yours"
    elif checkpoints and launch.recipe.resume == "never":
        yield "FAIL", f"{folder} holds checkpoints and resume is 'never': choose another name or resume=auto"
    else:
        yield "ok", f"{folder}: {f'resumes from {checkpoints[-1].name}' if checkpoints else 'a new run'}"


def _media(launch: Launch) -> Iterator[tuple[str, str]]:
    extraction = launch.recipe.extraction
    for kind, command, sources in (
        ("videos", "`mmaudio-hf extract-video`", extraction.videos),
        ("audios", "`mmaudio-hf extract-audio`", extraction.audios),
    ):
        for source in sources:
            if (Path(extraction.output_dir) / source.name).exists():
                continue
            key = f"extraction.{kind} {source.name}"
            if source.dataset.path and not Path(source.list).is_file():
                yield "ok", f"{key}: {command} writes media and list from the data set {source.dataset.path}"
            elif not Path(source.media_dir).is_dir():
                yield "warn", f"{key}: media_dir {source.media_dir} is not a folder"
            elif problems := source_problems(extraction, source):
                yield "warn", f"{key}: {'; '.join(problems)}"
            else:
                yield "ok", f"{key}: media and list are present, {command} makes the store"


def _trackers(launch: Launch) -> Iterator[tuple[str, str]]:
    for name in launch.recipe.training.trackers:
        try:
            check_trackers([name])
            yield "ok", f"{name} {version(name)}"
        except ValueError as error:  # the next one is checked all the same
            yield "FAIL", str(error)


def _av_benchmark(launch: Launch) -> Iterator[tuple[str, str]]:
    """Training does without av-benchmark: its scores are then left out."""
    settings = launch.recipe.evaluation
    if not (settings.metrics and (settings.every or settings.after_training)):
        return
    if problem := AvBench.from_recipe(launch.recipe).problem():
        yield "warn", f"without {', '.join(settings.metrics)} until this is fixed: {problem}"
    else:
        yield "ok", f"works in {settings.av_bench_python or 'this environment'}"


def _truth(split: str, launch: Launch) -> Iterator[tuple[str, str]]:
    settings, source = launch.recipe.evaluation, getattr(launch.recipe.evaluation.truth, split)
    evaluated = settings.metrics and (settings.every or settings.after_training)
    if not (source and evaluated and split in launch.recipe.generated_splits):
        return
    if hub_truth(source) is None:
        truth_caches(source)
    else:
        yield "warn", f"{source} is no folder here and will be fetched from the Hub: a connection is needed"


def _resume(launch: Launch) -> Iterator[tuple[str, str]]:
    """Compares recipe and stores with the newest checkpoint, as the run will."""
    recipe, checkpoints = launch.recipe, list_checkpoints(launch.recipe.run_dir)
    if checkpoints and recipe.resume == "auto" and launch.has_stores:
        record, notes = read_json(checkpoints[-1] / "training_state" / STATE_FILE), list[str]()
        state = TrainingState(record.get("step", 0), {}, record.get("facts", {}))
        depends_on = dependencies(launch.mixtures["train"], launch.mixtures.get("validation"), launch.device)
        check_same_run(recipe, depends_on, state, False, notes.append)
        yield "ok", (notes or [f"{checkpoints[-1].name} is of this recipe and these stores"])[0]
    if not recipe.resume.startswith(HUB_PREFIX) or checkpoints:
        return
    source, revision = split_hub_id(recipe.resume.removeprefix(HUB_PREFIX))
    if source == recipe.hub.repo_id and not revision:
        return  # a first launch begins at step 0
    from mmaudio_hf.hub.runs import plan_pull

    plan = plan_pull(source, revision)
    problem = f"{recipe.resume} has no training state, only a network: name it in finetune.init_from"
    yield ("ok", f"resumes from step {plan.step} of {recipe.resume}") if plan.has_state else ("FAIL", problem)


def _hub(launch: Launch) -> Iterator[tuple[str, str]]:
    """Nothing is changed on the Hub."""
    recipe, notes = launch.recipe, list[str]()
    if not recipe.hub.repo_id:
        return
    from mmaudio_hf.hub.runs import check_repository

    resumes = recipe.resume.startswith(HUB_PREFIX)
    check_repository(recipe.hub, recipe.run_dir, resumes, notes.append, create=False)
    yield from (("warn", note) for note in notes)
    if not notes:
        yield "ok", f"{recipe.hub.repo_id} takes pushes"


# --- Stores and weights ----------------------------------------------------------------------------------------------

NO_STORE = {
    "train": ("FAIL", "names no store: there is nothing to train on; name one"),
    "validation": ("warn", "names no store: nothing will tell when training goes wrong"),
    "test": ("ok", "names no store: the report shows the validation split"),
}


def _stores(split: str, launch: Launch) -> Iterator[tuple[str, str]]:
    recipe, sources = launch.recipe, getattr(launch.recipe.data, split)
    if not sources:
        yield NO_STORE[split]
        return
    level = "FAIL" if split != "test" or split in recipe.generated_splits else "warn"
    expected = (recipe.model, recipe.encoders, recipe.seed, recipe.extraction)
    problems = [problem for source in sources if (problem := _store_problem(source, expected))]
    yield from ((level, problem) for problem in problems)
    if problems:
        return
    try:
        mixture = open_mixture(sources, *expected)
        launch.mixtures[split] = mixture
        check_encoders([store for each in launch.mixtures.values() for store in each.stores])
    except ValueError as error:
        yield level, str(error)
        return
    pairs = zip(mixture.stores, mixture.shares, strict=True)
    rows = [f"{name} {len(store):,} rows ({share:.0%})" for store, (name, share) in pairs]
    shares = [f"{b.samples / len(mixture):.0%} of {b.duration:g} s" for b in mixture.buckets if b.duration]
    durations = f": {', '.join(shares)}" if len(shares) > 1 else ""
    yield "ok", f"{', '.join(rows)}; {len(mixture):,} an epoch{durations}"


def _store_problem(source: StoreConfig, expected: tuple) -> str | None:
    """What is wrong with one store by itself: every one that is missing is named, not the first alone."""
    try:
        with contextlib.closing(open_mixture([source], *(*expected, False))) as mixture:
            store = mixture.stores[0]
            rows = np.unique(np.linspace(0, len(store) - 1, SAMPLED_ROWS).round().astype(np.int64))
            for name, values in store.read(rows).items():
                finite = values.flatten(1).float().isfinite().all(1)
                if not finite.all():
                    row = int(rows[int(finite.int().argmin())])
                    return (
                        f"{store.path}: {name} of row {row} ({store.ids[row]}) is not finite; `mmaudio-hf verify"
                        f" {store.path}` finds all such rows, then extract the store again"
                    )
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _weights(launch: Launch) -> Iterator[tuple[str, str]]:
    recipe, folder = launch.recipe, Path(launch.recipe.encoders.weights_dir)
    if recipe.encoders.kind == "toy":
        try:
            check_encoder_files(recipe.encoders, recipe.model.mode, ("decode",))
            yield "ok", "toy encoders, and their codec is fitted"
        except ValueError as error:
            yield "FAIL" if recipe.generated_splits and launch.has_stores else "warn", str(error)
        return
    missing: list[str] = []
    decoders = {"v1-16.pth", "best_netG.pt", "v1-44.pth", f"{weights.BIGVGAN}/bigvgan_generator.pt"}
    for weight in weights.needed(recipe):
        if weight.path == weights.CLAP_FILE:
            continue  # checked with av-benchmark, which reads it
        initial = weight.path in ("empty_string.pth", Path(recipe.finetune.init_from).name)
        needed = not launch.has_stores or initial or (recipe.generated_splits and weight.path in decoders)
        later = "" if needed else " (training does without; generation from files does not)"
        if weights.locate(weight, folder) is None:
            missing.append(weight.path)
            yield "FAIL" if needed else "warn", f"{weight.path} is missing{later}"
        elif launch.quick:
            yield "ok", f"{weight.path}: present"
        elif problem := weights.problem_of(weight, folder, launch.weight_checks):
            yield "FAIL" if needed else "warn", problem + later
        else:
            yield "ok", f"{weight.path}: verified"
    if missing:
        yield "warn", f"download what is missing with `mmaudio-hf weights download {' '.join(missing)} --dir {folder}`"


def _initial_weights(launch: Launch) -> Iterator[tuple[str, str]]:
    """What `finetune.init_from` names, where no checkpoint takes its place."""
    recipe, source = launch.recipe, launch.recipe.finetune.init_from
    among_weights = recipe.encoders.kind == "released" and is_released(source) and not Path(source).exists()
    if not source or among_weights or list_checkpoints(recipe.run_dir):
        return
    local = is_weights_file(source) or Path(source).is_dir()
    config, file = read_pretrained(source)[::2] if local else hub_config(source)
    check_sizes(config, recipe.model, source)
    check_kind_of_encoders(file.parent / ENCODERS_FILE, recipe.encoders.kind)
    yield "ok", f"{source}: variant {config.variant}"


# --- Memory, disk space and speed ------------------------------------------------------------------------------------


def _memory(launch: Launch) -> Iterator[tuple[str, str]]:
    components = launch.estimate.on_device(launch.world, launch.recipe.training.accumulation_steps, launch.fsdp)
    tensors, allowance = sum(components.values()), {}
    if launch.device.type == "cuda":
        available, owner = torch.cuda.mem_get_info(launch.device)[1], "the GPU has"
        allowance = {"context": CUDA_CONTEXT, "fragmentation": FRAGMENTATION * tensors}
        allowance |= {"NCCL": NCCL_BUFFERS} if launch.world > 1 else {}
    else:
        available, owner = available_memory() // launch.processes, "each process can have"
        allowance = {"transformed weights": launch.estimate.transformed}
    need = tensors + sum(allowance.values())
    of = f", for clips of {launch.estimate.recipe.model.duration:g} s" if len(launch.of_durations) > 1 else ""
    message = f"about {_gb(need)} a device{of} ({_listed(components | allowance)}); {owner} {_gb(available)}"
    if need > available:
        yield "FAIL", f"{message}: {_smaller(launch, available - sum(allowance.values()))}"
    else:
        yield ("warn", f"{message}: this may be too tight") if need > TIGHT * available else ("ok", message)


def _host_memory(launch: Launch) -> Iterator[tuple[str, str]]:
    """Of this machine; on a CPU beside the tensors of its processes."""
    accumulation = launch.recipe.training.accumulation_steps
    components = launch.estimate.on_host(launch.world, launch.machines, accumulation, launch.fsdp)
    need, available = sum(components.values()), available_memory()
    if launch.device.type == "cpu":
        tensors = launch.estimate.on_device(launch.world, accumulation, launch.fsdp).values()
        available -= launch.processes * (sum(tensors) + launch.estimate.transformed)
    message = f"about {_gb(need)} ({_listed(components)}); there are {_gb(max(0, available))}"
    way = "lower data.prefetch_batches or training.batch_size, or take more memory"
    yield _verdict(need <= available, "FAIL", message, way)


def _verdict(ok: bool, level: str, message: str, way: str) -> tuple[str, str]:
    return ("ok", message) if ok else (level, f"{message}: {way}")


def _listed(components: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_gb(size)}" for name, size in components.items() if size)


def _smaller(launch: Launch, available: float) -> str:
    training, world = launch.recipe.training, launch.world
    per_process = launch.estimate.recipe.training.batch_size // world
    for steps in filter(launch.splits, range(training.accumulation_steps + 1, per_process + 1)):
        if sum(launch.estimate.on_device(world, steps, launch.fsdp).values()) <= available * TIGHT:
            return f"set training.accumulation_steps={steps}"
    if not training.activation_checkpointing:
        return "set training.activation_checkpointing=true, or take more or larger devices"
    if not launch.fsdp and world > 1:
        return "shard the network by accelerate_configs/fsdp.yaml, or take larger devices"
    return "a smaller model or larger devices are needed"


def fitting_settings(recipe: Recipe, size: float, processes: int = 1) -> tuple[str, bool]:
    """What the recipe needs on a GPU of `size` bytes, and the settings that make it fit; whether there are any.

    Tried in the order of what they cost: accumulation changes nothing but the order of sums, recomputed activations
    take a third more operations, frozen weights and moments lose digits, an adapter trains another thing.
    """
    lines, keys, training = list[str](), list[str](), recipe.training
    freezes = recipe.finetune.lora.rank or recipe.finetune.freeze
    savings: list[tuple[str, str, Any]] = [("training", "activation_checkpointing", True), ("optim", "moments", "8bit")]
    if training.mixed_precision == "bf16" and freezes:
        savings.insert(1, ("finetune", "frozen_dtype", "bfloat16"))
    for section, name, value in (("training", "batch_size", training.batch_size), *savings):  # the first: as it is
        if getattr(getattr(recipe, section), name) != value:
            recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{name: value})})
            keys.append(f"{section}.{name}={str(value).lower()}")
        launch = Launch(recipe, processes)
        per_process = launch.estimate.recipe.training.batch_size // processes
        for steps in filter(launch.splits, range(training.accumulation_steps, per_process + 1)):
            tensors = sum(launch.estimate.on_device(processes, steps).values())
            need = tensors * (1 + FRAGMENTATION) + CUDA_CONTEXT + (NCCL_BUFFERS if processes > 1 else 0)
            if not lines:
                lines.append(f"{recipe.name} needs about {_gb(need)} on each GPU as it is")
            if need <= TIGHT * size:
                accumulates = steps != training.accumulation_steps
                settings = keys + [f"training.accumulation_steps={steps}"] * accumulates
                lines.append(f"{_gb(need)} with {' '.join(settings)}" if settings else f"it fits {_gb(size)}")
                return "; ".join(lines), True
    adapter = "take a smaller model" if recipe.finetune.lora.rank else "train an adapter: finetune.lora.rank=8"
    return f"{'; '.join(lines)}; no accumulation{''.join(f' or {k}' for k in keys)} fits {_gb(size)}: {adapter}", False


def available_memory() -> int:
    """Bytes of host memory that programs can still take."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _disk_space(launch: Launch) -> Iterator[tuple[str, str]]:
    recipe, estimate = launch.recipe, launch.estimate
    training, folder = recipe.training, _existing(recipe.run_dir)
    kept = training.steps // training.keep_every if training.keep_every else 0
    checkpoints = training.keep_checkpoints + kept + bool(training.best_metric) + 1  # the one being written
    snapshots = training.steps // recipe.ema.snapshot_every
    need = checkpoints * estimate.checkpoint + snapshots * estimate.snapshot
    used = sum(path.stat().st_size for path in recipe.run_dir.rglob("*") if path.is_file() and not path.is_symlink())
    free = shutil.disk_usage(folder).free
    message = (
        f"the run takes about {_gb(need)} ({checkpoints} checkpoints of {_gb(estimate.checkpoint)}, {snapshots} EMA"
        f" snapshots of {_gb(estimate.snapshot)}), of which {_gb(used)} is there; {folder} has {_gb(free)} left"
    )
    way = "free some, set output_dir to another disk, raise ema.snapshot_every or lower training.keep_checkpoints"
    yield _verdict(need - used <= free, "FAIL", message, way)


def _expected_speed(launch: Launch) -> tuple[float, str]:
    """Samples per second of all processes, and how that is known: as the run has measured it, or assumed."""
    log = launch.recipe.run_dir / "speed.jsonl"
    for line in reversed(log.read_text().splitlines() if log.is_file() else []):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a kill, or of anything
            return float(json.loads(line)["speed/samples_per_second"]), "as the run had it last"
    peak = device_peak(launch.device, launch.recipe.training.mixed_precision)
    devices = launch.machines if launch.device.type == "cpu" else launch.world  # processes share the cores
    of_step = sum(r.training.batch_size * training_flops(r.model) * share for r, share in launch.of_durations)
    rate = UTILISATION * peak.flops_per_second * devices / of_step * _mean_batch(launch)
    source = "a measured" if peak.measured else "the"
    return rate, f"if {UTILISATION:.0%} of {source} peak of {peak.flops_per_second / 1e12:.3g} TFLOP/s is reached"


def _mean_batch(launch: Launch) -> float:
    return sum(recipe.training.batch_size * share for recipe, share in launch.of_durations)


def _speed(launch: Launch) -> Iterator[tuple[str, str]]:
    if launch.quick:
        return
    training, (rate, source) = launch.recipe.training, _expected_speed(launch)
    seconds = training.steps * _mean_batch(launch) / rate
    duration = f"{seconds:.3g} s" if seconds < 7200 else f"{seconds / 3600:.3g} h"
    per_step = f"{rate / _mean_batch(launch):.3g} steps/s"
    message = f"{rate:.3g} samples/s, {per_step}, {duration} for {training.steps:,} steps, {source}"
    way = "lower training.steps, or take a smaller model, more devices or faster ones"
    yield _verdict(seconds < LONGEST, "warn", message, way)


def _reading(launch: Launch) -> Iterator[tuple[str, str]]:
    """What the disk delivers, past the page cache, against what training at the expected speed reads."""
    stores = launch.mixtures["train"].stores if "train" in launch.mixtures else ()
    if launch.quick or not stores or any(isinstance(store, RemoteStore) for store in stores):
        return
    expected = _expected_speed(launch)[0] / launch.machines
    samples, size = measure_reading(launch.mixtures["train"], launch.recipe.data.read_threads, launch.recipe.seed)
    message = (
        f"random rows come at {samples:.3g} samples/s ({size / 1e6:.3g} MB/s) past the page cache, training reads"
        f" {expected:.3g}"
    )
    way = "put the stores on a faster disk, or see whether they fit into memory, where later epochs find them"
    waits = f"it will wait {1 - samples / expected:.0%} of the time; {way}"
    yield _verdict(samples >= expected, "warn", message, waits)


def _network(launch: Launch) -> Iterator[tuple[str, str]]:
    """What stores on the Hub must deliver at the expected speed, and what they do."""
    mixture, data = launch.mixtures.get("train"), launch.recipe.data
    stores = [(i, store) for i, store in enumerate(mixture.stores if mixture else ()) if isinstance(store, RemoteStore)]
    if mixture is None or not stores:
        return
    rate, size, later = _expected_speed(launch)[0] / launch.machines, 0.0, 0.0
    for index, store in stores:
        share = samples_per_epoch(len(store), mixture.repeats[index]) / len(mixture)
        size += share * mixture.row_bytes[index]
        later += share * mixture.row_bytes[index] * (1 - store.kept_share)
    kept = ", ".join(f"{store.kept_share:.0%} of {store.label}" for _, store in stores)
    message = (
        f"a sample takes {size / 1e6:.3g} MB, in rows of their own; at {rate:.3g} samples/s that is"
        f" {rate * size / 1e6:.3g} MB/s in the first epoch, then {rate * later / 1e6:.3g}, as data.cache_gb"
        f" {data.cache_gb:g} holds {kept}"
    )
    if launch.quick:
        yield "ok", message
        return
    store, began, read = stores[0][1], time.perf_counter(), 0
    rows = np.random.default_rng(0).permutation(len(store))
    for first in range(0, len(rows), data.connections):
        read += sum(v.nbytes for v in store.read(rows[first : first + data.connections]).values())
        if (elapsed := time.perf_counter() - began) > READ_SECONDS:
            break
    speed = read / elapsed
    message += f"; {data.connections} connections bring {speed / 1e6:.3g} MB/s"
    way = f"the first epoch waits {1 - speed / (rate * size):.0%} of the time, later ones do not"
    if speed < rate * later:
        way = f"training waits {1 - speed / (rate * later):.0%} of the time; raise data.cache_gb or data.connections"
        way += ", use compact stores, or pull the store"
    yield _verdict(speed >= rate * size, "warn", message, way)


def measure_reading(mixture: Mixture, threads: int, seed: int = 0, limit: float = READ_SECONDS) -> tuple[float, float]:
    """Samples and bytes per second of random samples, read for `limit` s by `threads` past the page cache."""
    order = np.random.default_rng(seed).permutation(len(mixture))[:4096]
    began = time.perf_counter()

    def read(dataset_indices: np.ndarray) -> tuple[int, int]:
        count = size = 0
        for source, row in zip(*mixture.locate(dataset_indices), strict=True):
            store, rows = mixture.stores[source], np.array([row])
            for name in store.columns:
                store.drop_from_cache(name, rows)
                store.prefetch(name, rows)
            store.read(rows)
            size += sum(column.row_bytes for column in store.columns.values())
            count += 1
            if time.perf_counter() > began + limit:
                break
        return count, size

    with ThreadPoolExecutor(threads) as pool:
        counts, sizes = zip(*pool.map(read, np.array_split(order, threads)), strict=True)
    elapsed = time.perf_counter() - began
    return sum(counts) / elapsed, sum(sizes) / elapsed


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


# Where the batch does not split evenly over the devices, these have no answer.
PER_DEVICE = ("memory", "host memory", "disk space", "speed", "reading", "network")
CHECKS: dict[str, Check] = {"software": _software, "device": _device, "launch": _launch, "batch": _batch}
CHECKS |= {"run folder": _run_folder, "media": _media}
CHECKS |= {f"data.{split}": partial(_stores, split) for split in NO_STORE}
CHECKS |= {"weights": _weights, "initial weights": _initial_weights, "tracker": _trackers}
CHECKS |= {"av-benchmark": _av_benchmark}
CHECKS |= {f"evaluation.truth.{split}": partial(_truth, split) for split in ("test", "validation")}
CHECKS |= {"resume": _resume, "Hub": _hub, "memory": _memory, "host memory": _host_memory, "disk space": _disk_space}
CHECKS |= {"speed": _speed, "reading": _reading, "network": _network}
