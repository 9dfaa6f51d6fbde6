"""Commands that train, read a run, or measure speed."""

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaudio_hf.cli.hub import (
    Add,
    adder,
    hub_session,
    hub_stores,
    log,
    resolve_resume,
    warn,
    weight_checks,
    write_extras,
)
from mmaudio_hf.config import Recipe, TrainingConfig, load_recipe, micro_batch_size, samples_per_step, variant_config
from mmaudio_hf.config.reading import settings_text
from mmaudio_hf.config.settings import nearest
from mmaudio_hf.schema import HUB_PREFIX

if TYPE_CHECKING:
    import torch

    from mmaudio_hf.data.mixture import Mixture
    from mmaudio_hf.training.actions import Evaluator
    from mmaudio_hf.training.resume import RunLock

CONNECT_SECONDS = 60  # processes of one launch usually find each other within a few seconds


def leave_for_launcher(message: str) -> None:
    """Leave torchrun, when it is there, the sentence that it repeats below its own traceback."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # As torch.distributed.elastic.multiprocessing.errors.record writes it, but without importing torch.
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def add_commands(add: Add) -> None:
    """`train` and `doctor`."""
    train = add("train", _train, "train as train.py does; start it with accelerate for several processes", recipe=True)
    train.add_argument("--dry-run", action="store_true", help="print the resolved recipe and its numbers, and stop")
    train.add_argument("--help-settings", action=_HelpSettings, nargs=0, help="print every setting, and stop")
    train.add_argument("--allow-changes", action="store_true", help="resume a run with settings that alter training")
    doctor = add("doctor", _doctor, "check whether a recipe will run here, before it is started", recipe=True)
    doctor.add_argument("--processes", type=int, help="processes that will be launched here (default: one per GPU)")
    doctor.add_argument("--machines", type=int, default=1, help="machines like this one, training together (default 1)")
    doctor.add_argument("--fsdp", action="store_true", help="the launch shards the network, as fsdp.yaml does")
    doctor.add_argument("--fits", metavar="SIZE", type=_bytes, help="only say what makes it fit a GPU of SIZE, as 12GB")
    doctor.add_argument("--quick", action="store_true", help="only look for released files, and measure no speed")


class _HelpSettings(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(settings_text())
        parser.exit()


def add_example_command(add: Add) -> None:
    """`example`."""
    example = add("example", _example, "run the quick start in this folder: media, features, training, audio, report")
    example.add_argument("--short", action="store_true", help="a few clips and training steps")
    example.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")


def _example(options: Namespace) -> int:
    """The commands of the README, one after the other; each is printed. Recipes that are not here are copied here."""
    started, name = time.time(), "example_short" if options.short else "example"
    recipe, media, run = f"recipes/{name}.yaml", f"output/{name}-media", f"output/{name}"
    for folder in ("recipes", "accelerate_configs"):
        for file in (Path(__file__).parent.parent / folder).iterdir():
            if not (Path(folder) / file.name).exists():
                Path(folder).mkdir(exist_ok=True)
                shutil.copyfile(file, Path(folder) / file.name)
    load_recipe(recipe, options.overrides)  # a mistake ends here, not after minutes of extraction

    def commands() -> Iterator[list[str]]:
        yield ["mmaudio-hf", "example-media", media, *(["--small"] if options.short else [])]
        for command in ("extract-video", "partition", "extract-audio"):
            yield ["mmaudio-hf", command, recipe]
        launch = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "-m", "mmaudio_hf.train"]
        yield [*launch, recipe, *options.overrides]
        video = str(min(Path(media, "videos").glob("test_*.mp4")))
        yield ["mmaudio-hf", "generate", "--run", run, "--video", video, "--out", f"{run}/samples/first.mp4"]
        yield ["mmaudio-hf", "report", "--run", run, "--events", f"{media}/events.json", "--started", f"{started:.1f}"]

    for words in commands():
        print("$", shlex.join(words), flush=True)
        module = "mmaudio_hf.cli" if words[0] == "mmaudio-hf" else "accelerate.commands.launch"
        arguments = words[1:] if words[0] == "mmaudio-hf" else ["--quiet", *words[2:]]
        if code := _wait([sys.executable, "-m", module, *arguments]):
            return code
    return 0


def _wait(words: list[str]) -> int:
    """Exit code of a command. Ctrl-C reaches it as well: it is waited for, since it may save before it ends."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    process = subprocess.Popen(words)
    try:
        code = process.wait()
        if pressed:
            raise KeyboardInterrupt
        return code
    except KeyboardInterrupt:  # or another signal, that this process alone has had
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGINT, before)


class _Lasting:
    """A stream of a run, which outlasts its terminal, the reader of its pipe and the space on its disk."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    # Not tqdm's ObjectWrapper: wandb replaces these, and its replacement would be called by the method that it calls.
    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def _train(options: Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    from mmaudio_hf.training.distributed import check_launch
    from mmaudio_hf.training.resume import RunLock

    check_launch()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch_size(recipe.training, world, recipe.model.latent_length)
    if options.dry_run:
        with hub_stores(recipe):
            print(dry_run_text(recipe, world))
        return 0
    if not recipe.data.train:
        raise ValueError(f"{options.recipe}: data.train names no feature store")
    # Around the Hub as well: what is downloaded and staged belongs to the launch that trains.
    splits = ("train", "validation", *sorted(recipe.generated_splits))
    with (
        contextlib.redirect_stdout(_Lasting(sys.stdout)),
        contextlib.redirect_stderr(_Lasting(sys.stderr)),
        RunLock(recipe.run_dir, warn) as lock,
        hub_session(recipe, lock) as on_checkpoint,
        hub_stores(recipe, splits),
    ):
        reminder = threading.Timer(CONNECT_SECONDS, _warn_of_waiting, [world])
        reminder.daemon = True
        reminder.start()
        try:
            return _run_training(resolve_resume(recipe), options.allow_changes, on_checkpoint, lock)
        finally:
            reminder.cancel()


def _warn_of_waiting(world: int) -> None:
    """A process that was started by hand waits for the others, for hours and in torch without a word."""
    import torch.distributed as dist

    if world > 1 and not dist.is_initialized():
        name, address, port = (os.environ.get(key, "0") for key in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
        warn(
            f"process {name} of {world} waits at {address}:{port} for the others: start them with the same variables"
            " and another RANK, or unset WORLD_SIZE to train with one process"
        )


def _doctor(options: Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    for name in ("processes", "machines"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, not {number}")
    import torch

    from mmaudio_hf.doctor import Launch, as_table, examine, fitting_settings

    processes = options.processes or max(1, torch.cuda.device_count())
    if options.fits:
        micro_batch_size(recipe.training, processes, recipe.model.latent_length)
        text, fits = fitting_settings(recipe, options.fits, processes)
        print(text)
        return 0 if fits else 1
    launch = Launch(recipe, processes, options.machines, options.fsdp, options.quick, weight_checks())
    with hub_stores(recipe, launch=(processes, launch.world)):
        findings = list(examine(launch))
    print(as_table(findings, max(80, shutil.get_terminal_size((120, 24)).columns)))
    failed = sum(finding.level == "FAIL" for finding in findings)
    print(f"{recipe.name}: {f'{failed} of these must be fixed first' if failed else 'ready to train'}")
    return 1 if failed else 0


def _run_training(recipe: Recipe, allow_changes: bool, on_checkpoint: Callable[[Path], None], lock: "RunLock") -> int:
    import torch

    from mmaudio_hf.data.mixture import check_encoders, open_mixture
    from mmaudio_hf.data.remote import batches_ahead
    from mmaudio_hf.hub.cards import code_version
    from mmaudio_hf.training.finetune import check_effect, initial_model
    from mmaudio_hf.training.loop import train

    code_version()  # now, and cached: the first checkpoint is written hours later, the code that trains is this one
    expected = (recipe.model, recipe.encoders, recipe.seed, recipe.extraction)
    mixture = open_mixture(recipe.data.train, *expected)
    validation = open_mixture(recipe.data.validation, *expected) if recipe.data.validation else None
    for each in (mixture, *([validation] if validation else ())):
        lengths = [bucket.lengths[0] for bucket in each.buckets]
        sizes = [micro_batch_size(recipe.training, int(os.environ.get("WORLD_SIZE", "1")), n) for n in lengths]
        batches_ahead(each, sizes, max(recipe.data.prefetch_batches, recipe.training.accumulation_steps))
    check_encoders([*mixture.stores, *(validation.stores if validation else ())])
    evaluators: list[Any] = []
    if recipe.samples.every:
        from mmaudio_hf.evaluation.samples import SampleEvaluator

        evaluators.append(SampleEvaluator(recipe))
    if recipe.evaluation.every or recipe.evaluation.after_training:
        from mmaudio_hf.evaluation.run import evaluators_of

        evaluators += evaluators_of(recipe, warn)
    evaluators += extra_evaluators(recipe, [evaluator.name for evaluator in evaluators])
    torch.manual_seed(recipe.seed)
    network = initial_model(recipe, mixture.latent_statistics, lambda: empty_text_features(recipe))
    is_main, finetune = int(os.environ.get("RANK", "0")) == 0, recipe.finetune
    if is_main:
        trained = f"LoRA adapters of rank {finetune.lora.rank}" if finetune.lora.rank else "all weights"
        trained += f" except {', '.join(finetune.freeze)}" if finetune.freeze else ""
        print(f"{recipe.name}: {trained}, initially {finetune.init_from or 'random'}, on {shares(mixture)}")
    how: dict[str, Any] = {"allow_changes": allow_changes, "on_checkpoint": on_checkpoint, "lock": lock}
    result = train(recipe, network, mixture, validation, evaluators, partial(write_extras, recipe), **how)
    if result.stopped_by is not None:
        words = f"stopped at step {result.step}; the same command resumes from there"
        launched = not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}.isdisjoint(os.environ)
        log(words + "; a traceback below is how the launcher ends" * launched) if is_main else None
        leave_for_launcher(words)
        return 128 + result.stopped_by
    if is_main:
        if finetune.lora.rank:
            check_effect(recipe.run_dir / "last" / "adapter")
        run = shlex.quote(str(recipe.run_dir))
        early = " (validation no longer improved)" if result.stopped_early else ""
        print(
            f"finished at step {result.step}{early}: weights are in {run}/last/pretrained_model\n"
            f"  listen:  mmaudio-hf generate --run {run} --prompt 'a dog barks' --out dog.wav\n"
            f"  look:    mmaudio-hf report --run {run}"
            + ("" if recipe.hub.repo_id else f"\n  publish: mmaudio-hf push {run} owner/name")
        )
    return 0


def extra_evaluators(recipe: Recipe, taken: Sequence[str]) -> "list[Evaluator]":
    """The user's own evaluators: `Class(recipe)` for each `module:Class` of evaluation.extra.

    ValueError when one cannot be imported, is no evaluator, or has a name that is taken.
    """
    evaluators: list[Any] = []
    for entry in recipe.evaluation.extra:
        module, _, name = entry.partition(":")
        if os.getcwd() not in sys.path:  # the command `mmaudio-hf` has its own folder there instead
            sys.path.insert(0, os.getcwd())
        try:
            evaluator = getattr(importlib.import_module(module), name)(recipe)
            valid = isinstance(evaluator.name, str) and bool(re.fullmatch(r"[a-z]\w*", evaluator.name))
            valid = valid and type(evaluator.every) is int and evaluator.every > 0
            valid = valid and callable(evaluator.run) and isinstance(evaluator.long, bool)
            evaluator.at_start = bool(getattr(evaluator, "at_start", False))
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"evaluation.extra {entry}: {type(error).__name__}: {error}") from error
        if not valid:
            raise ValueError(f"evaluation.extra {entry}: it needs name (a word), every (at least 1), long and run(...)")
        if evaluator.name in [*taken, "train", "val", "val_ema", "speed", *(other.name for other in evaluators)]:
            raise ValueError(f"evaluation.extra {entry}: its name {evaluator.name!r} is taken")
        evaluators.append(evaluator)
    return evaluators


def shares(mixture: "Mixture") -> str:
    """What share of every epoch each store has."""
    return ", ".join(f"{name} {share:.0%}" for name, share in mixture.shares)


def empty_text_features(recipe: Recipe) -> "torch.Tensor":
    """Text features (77, 1024) of the empty caption, from the toy formulas or the released file."""
    if recipe.encoders.kind == "toy":
        from mmaudio_hf.features.toy import text_features

        return text_features([""])[0]
    from mmaudio_hf.features.clip import load_empty_text

    return load_empty_text(Path(recipe.encoders.weights_dir) / "empty_string.pth")


def dry_run_text(recipe: Recipe, world_size: int = 1) -> str:
    """The resolved recipe as YAML, and the numbers that follow from it."""
    import torch
    import yaml

    from mmaudio_hf.config import to_dict
    from mmaudio_hf.data.mixture import open_mixture
    from mmaudio_hf.models.network import MMAudio
    from mmaudio_hf.schema import audio_mode, sequence_lengths
    from mmaudio_hf.training.finetune import set_trainable

    with torch.device("meta"):
        model = set_trainable(MMAudio(recipe.model), recipe.finetune)
    training = recipe.training
    derived: dict[str, Any] = {
        "sample_rate": audio_mode(recipe.model.mode).sample_rate,
        "lengths": asdict(sequence_lengths(recipe.model.mode, recipe.model.duration)),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "batch": _batch_numbers(training, world_size, recipe.model.latent_length),
    }
    per_epoch, steps_per_epoch = 0, 0.0
    for split in (recipe.data.test, recipe.data.validation, recipe.data.train):
        # Stores that are there must fit the recipe, whether or not the others are.
        per_epoch, present = 0, [s for s in split if s.path.startswith(HUB_PREFIX) or Path(s.path).exists()]
        if present:
            complete = len(present) == len(split)
            mixture = open_mixture(present, recipe.model, recipe.encoders, recipe.seed, recipe.extraction, complete)
            per_epoch = len(mixture) if complete else 0
            if per_epoch and split is recipe.data.train:
                derived["shares"] = shares(mixture)
                of = {bucket.duration: bucket.lengths[0] for bucket in mixture.buckets}
                numbers = {f"{d:g} s": _batch_numbers(training, world_size, latents) for d, latents in of.items()}
                derived["batch"] = derived["batch"] if len(numbers) == 1 else numbers
                steps_per_epoch = sum(b.samples / samples_per_step(training, b.lengths[0]) for b in mixture.buckets)
            mixture.close()
    if not per_epoch:
        missing = ", ".join(store.path for store in recipe.data.train if store not in present)
        derived["rows_per_epoch"] = f"unknown: no store at {missing}"
    else:
        derived |= {"rows_per_epoch": per_epoch, "steps_per_epoch": round(steps_per_epoch, 2)}
        derived["epochs"] = round(training.steps / steps_per_epoch, 2)
    plain = {"recipe": to_dict(recipe), "derived": derived}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip()


def _batch_numbers(training: TrainingConfig, world_size: int, latent_length: int) -> dict[str, int]:
    return {
        "global": samples_per_step(training, latent_length),
        "processes": world_size,
        "accumulation_steps": training.accumulation_steps,
        "per_process_and_pass": micro_batch_size(training, world_size, latent_length),
    }


# --- Commands that read a run -----------------------------------------------------------------------------------------


def add_run_commands(add: Add) -> None:
    """`ema` and `replay-step`."""
    ema = add("ema", _ema, "synthesise EMA weights of another width or step, from the snapshots of a run")
    ema.add_argument("run", type=Path, metavar="RUN", help="run folder")
    ema.add_argument("--sigma-rel", type=float, required=True, help="width relative to the length of training")
    ema.add_argument("--step", type=int, help="training step (default: that of the last snapshot)")
    ema.add_argument("--out", type=Path, required=True, help="new folder; generate takes it as --run")

    replay = add("replay-step", _replay_step, "rerun one training step alone and show its losses and gradients")
    replay.add_argument("run", type=Path, metavar="RUN", help="run folder")
    help_text = "number of updates before it, as in skipped.jsonl and autopsy/"
    replay.add_argument("step", type=int, metavar="STEP", help=help_text)
    replay.add_argument("--advance", action="store_true", help="train from the checkpoint before it to its own weights")
    replay.add_argument("--json", action="store_true", help="print everything as one JSON object, as in autopsy/")


def recipe_of_run(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run folder, which may have been moved. ValueError without config.yaml."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.yaml")
    recipe = load_recipe(run / "config.yaml", overrides)
    return replace(recipe, name=run.resolve().name, output_dir=str(run.resolve().parent))


def _ema(options: Namespace) -> None:
    from mmaudio_hf.training.checkpointer import publish_ema

    recipe = recipe_of_run(options.run)
    request = (options.run, options.sigma_rel, options.step, options.out)
    weights = publish_ema(*request, lambda folder: write_extras(recipe, folder), log)
    print(f"{options.out}: EMA of sigma_rel {weights['sigma_rel']:g} at step {weights['step']}")


def _replay_step(options: Namespace) -> None:
    recipe = recipe_of_run(options.run)
    import torch

    from mmaudio_hf.data.mixture import open_mixture
    from mmaudio_hf.training.finetune import initial_model
    from mmaudio_hf.training.guard import replay_step, summary, to_json
    from mmaudio_hf.training.loop import Run

    with hub_stores(recipe, ["train"]):
        mixture = open_mixture(recipe.data.train, recipe.model)
        torch.manual_seed(recipe.seed)
        # As a new run: before the first checkpoint, its initial weights are needed.
        start = replace(recipe, resume="never")
        network = initial_model(start, mixture.latent_statistics, lambda: empty_text_features(recipe))
        start_run = lambda alone: Run(alone, network, mixture)  # noqa: E731
        figures = replay_step(recipe, start_run, options.step, advance=options.advance, log=log)
    print(to_json(figures).rstrip() if options.json else summary(figures))


# --- `mmaudio-hf bench`: speed against what the machine can do --------------------------------------------------------


def add_bench_commands(add: Add) -> None:
    """`bench` and its benchmarks."""
    parser = add("bench", None, "measure speed against what the machine can do")
    add_benchmark = adder(parser.add_subparsers(required=True, metavar="BENCHMARK"))

    def benchmark(
        name: str, run: Callable[[Namespace], dict[str, Any]], help_text: str, rounds: bool = True
    ) -> argparse.ArgumentParser:
        def show(options: Namespace) -> None:
            figures = run(options)
            lines = [f"{k:36} {v:.4g}" if isinstance(v, float) else f"{k:36} {v}" for k, v in figures.items()]
            print(json.dumps(figures) if options.json else "\n".join(lines))

        command = add_benchmark(name, show, help_text)
        if rounds:
            command.add_argument("--rounds", type=_count, default=3, help="repetitions; the median counts (default 3)")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        return command

    _add_model_benchmarks(benchmark)
    _add_data_benchmarks(benchmark)


def _bench(module: str) -> Any:
    import torch  # here: --help does without it

    # Networks that begin with zeros have gradients below 1e-19 for some steps, whose squares are denormal: with these a
    # backward pass is three times as slow at worst. Threads take the setting from the one that makes them.
    torch.set_flush_denormal(True)
    return importlib.import_module(f"mmaudio_hf.bench.{module}")


def _precisions(options: Namespace) -> tuple[str, ...]:
    return ("fp32", "bf16") if options.precision == "both" else (options.precision,)


def _add_model_benchmarks(benchmark: Callable[..., argparse.ArgumentParser]) -> None:
    """Those of training, encoders and generation."""

    def scaling_of(options: Namespace) -> dict[str, Any]:
        precision = "bf16" if options.precision == "bf16" else "no"
        config = variant_config(options.variant)
        return _bench("training").scaling(config, options.batch_size, options.rounds, precision)

    def durations_of(options: Namespace) -> dict[str, Any]:
        config = variant_config(options.variant)
        return _bench("training").durations(config, options.seconds, options.batch_tokens, options.rounds)

    def extract_of(options: Namespace) -> dict[str, Any]:
        inference, common = _bench("inference"), (options.video, options.rounds)
        return inference.extract_against(options.against, *common) if options.against else inference.extract(*common)

    def generate_of(options: Namespace) -> dict[str, Any]:
        sizes, everything = options.batch_size, not options.sampling_only
        return _bench("inference").generate(options.variant, options.rounds, _precisions(options), sizes, everything)

    step = benchmark("step", _step, "training steps against a matrix product, what the loop adds, and checkpoints")
    step.add_argument("--batch-size", type=_count, default=4, help="samples (default 4)")
    step.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both", help="default both")
    help_text = "save some to a temporary folder"
    step.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=True, help=help_text)
    help_text = "compare with the step of another checkout, in turn"
    step.add_argument("--against", type=Path, metavar="FOLDER", help=help_text)
    scaling = benchmark("scaling", scaling_of, "two processes with one thread each against one: weak scaling")
    scaling.add_argument("--batch-size", type=_count, default=4, help="samples per process (default 4)")
    scaling.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    durations = benchmark("durations", durations_of, "steps of a mixture of several durations against each alone")
    durations.add_argument("--seconds", type=float, nargs="+", default=[2, 4, 8, 10], help="default 2 4 8 10")
    durations.add_argument("--batch-tokens", type=_count, default=320, help="latents of a step (default 320)")
    extract = benchmark("extract", extract_of, "decoding and encoders")
    extract.add_argument("--video", type=Path, help="video to read (default: a generated one of 720p)")
    extract.add_argument("--against", type=Path, metavar="DIR", help="only reading, in turn with another checkout's")
    help_text = "guided sampling against two forwards per step, and the other stages"
    generate = benchmark("generate", generate_of, help_text)
    generate.add_argument("--batch-size", type=_count, nargs="+", default=[1, 8], help="clips at once (default 1 8)")
    generate.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both", help="default both")
    generate.add_argument("--sampling-only", action="store_true", help="leave out reading, encoders, decoders, writing")
    for command in (step, scaling, durations, generate):
        command.add_argument("--variant", default="small_16k", help="network (default small_16k)")


def _add_data_benchmarks(benchmark: Callable[..., argparse.ArgumentParser]) -> None:
    """Those of feature stores, scores and fine-tuning."""

    def loader_of(options: Namespace) -> dict[str, Any]:
        share = _bench("loader").AUDIO_SHARE if options.audio_share is None else options.audio_share
        counts = (options.rows, options.batch_size, share, options.rounds, options.threads)
        return _bench("loader").loader(options.store, *counts, sweep=options.sweep)

    def remote_of(options: Namespace) -> dict[str, Any]:
        times = {"latency": options.latency / 1e3, "share": options.share / 100, "step": options.step / 1e3}
        counts = {"epochs": options.rounds + 1, "connections": options.connections}
        return _bench("loader").RemoteBench(options.rows, options.batch_size, **times, **counts).run()

    loader = benchmark("loader", loader_of, "batches from feature stores against a DataLoader and memcpy")
    loader.add_argument("--store", type=Path, nargs="+", default=[], help="feature stores to read (default: generated)")
    loader.add_argument("--rows", type=_count, default=2000, help="rows of generated stores (default 2000, 2 GB)")
    loader.add_argument("--batch-size", type=_count, default=64, help="samples (default 64)")
    help_text = "rows without video (default: as in the published mixture, 0.3)"
    loader.add_argument("--audio-share", type=float, help=help_text)
    loader.add_argument("--threads", type=_count, default=4, help="data.read_threads (default 4)")
    loader.add_argument("--sweep", action="store_true", help="also 1,000 to 1,000,000 rows, in sparse files")
    remote_help = "training from a store behind a slow line; --rounds: epochs after the first"
    remote = benchmark("remote", remote_of, remote_help)
    for name, default, text in (
        ("rows", 400, "rows of the store (default 400, 0.5 GB)"),
        ("batch-size", 8, "samples (default 8)"),
        ("latency", 50, "ms before each answer (default 50)"),
        ("share", 25, "%% of the store that the cache has (default 25)"),
        ("step", 250, "ms of a training step (default 250)"),
        ("connections", 64, "data.connections (default 64)"),
    ):
        remote.add_argument(f"--{name}", type=_count, default=default, help=text)
    scores = benchmark(
        "scores",
        lambda options: _bench("inference").scores(options.items, options.rounds, options.folder),
        "published scores of cached features, and DeSync against a matrix product",
    )
    scores.add_argument("--items", type=_count, default=15000, help="of random features (default 15000, 0.9 GB)")
    scores.add_argument("--folder", type=Path, help="for the features, which are used again (default: temporary)")
    finetune_help = "fine-tuning to a kind of event that the base has not seen; --rounds: seeds"
    finetune = benchmark("finetune", _finetune, finetune_help)
    finetune.add_argument("--folder", type=Path, default=Path("output/bench-finetune"), help="media, features and runs")
    finetune.add_argument("--kind", choices=("storm", "frog"), default="storm", help="what is learned (default storm)")
    finetune.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all of them")
    curation = benchmark(
        "curation",
        lambda options: _bench("learning").curation(options.folder, options.seeds),
        "what an audit of audio against frames finds, and what training on the cleaned store gains",
        rounds=False,
    )
    curation.add_argument("--folder", type=Path, default=Path("output/bench-curation"), help="media, features and runs")
    seeds = lambda text: 0 if text == "0" else _count(text)  # noqa: E731
    help_text = "networks of each kind; 0: detection alone (default 3)"
    curation.add_argument("--seeds", type=seeds, default=3, help=help_text)


def _bytes(text: str) -> float:
    number = text.lower().removesuffix("b").removesuffix("g").strip()
    if not re.fullmatch(r"\d+(\.\d+)?", number) or not float(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 12GB")
    return float(number) * 1e9


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,7}", text) or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000000")
    return int(text)


def _step(options: Namespace) -> dict[str, Any]:
    bench, config, precisions = _bench("training"), variant_config(options.variant), _precisions(options)
    sizes = (options.batch_size, options.rounds)
    figures = bench.compare_step(config, options.against, *sizes) if options.against else {}
    figures |= bench.step(config, *sizes, precisions)
    if options.checkpoint:
        figures |= bench.checkpoint(config, options.rounds)
        seconds = float(figures[f"{precisions[0]}_step_seconds"])
        figures["checkpoint_stall_in_steps"] = float(figures["checkpoint_stall_seconds"]) / seconds
    return figures


def _finetune(options: Namespace) -> dict[str, Any]:
    bench = _bench("learning")
    for method in options.methods or ():
        if method not in bench.METHODS:
            raise ValueError(f"unknown method {method!r}: {nearest(method, bench.METHODS)}")
    return bench.finetune(options.folder, options.kind, options.methods or list(bench.METHODS), options.rounds)
