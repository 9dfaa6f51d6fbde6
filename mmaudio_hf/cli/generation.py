"""Commands that generate audio, and score and show it."""

import argparse
import contextlib
import json
import os
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmaudio_hf.cli.hub import Add, hub_stores, warn
from mmaudio_hf.cli.media import share_of_process
from mmaudio_hf.cli.training import recipe_of_run
from mmaudio_hf.config import Recipe, load_recipe, read_json
from mmaudio_hf.schema import PROCESS_TIMEOUT

if TYPE_CHECKING:
    from mmaudio_hf.generation.pipeline import MMAudioPipeline

SUMMARY_NAMES = {"onset_f1": "f1_right", "onset_f1_shuffled": "f1_shuffled"}
SUMMARY_NAMES |= {"steps_per_second": "steps_per_s", "peak_memory_gb": "peak_mem_gb"}


def add_commands(add: Add) -> None:
    """`generate`, `demo` and `report`."""
    generate = add("generate", _generate, "generate audio for videos, images and texts")
    option = generate.add_argument
    option("--run", required=True, help="run folder, pretrained_model folder, Hub id or released file")
    option("--video", type=Path, help="video to generate audio for")
    option("--image", type=Path, help="image to generate audio for")
    option("--folder", type=Path, help="folder of videos and images, or of those in --list")
    option("--list", type=Path, help="TSV: id, and video, image, prompt, negative_prompt, duration, seed")
    option("--prompt", default="", help="what should be heard")
    option("--negative-prompt", default="", help="what should not be heard")
    option("--out", required=True, type=Path, help="result: .wav, .flac, .mp4 or .mkv with --video; of many, a folder")
    option("--format", choices=("mp4", "mkv", "wav", "flac"), default="mp4", help="of many (default mp4)")
    option("--duration", type=float, help="seconds; default: the whole video, else as trained")
    option("--window", type=float, help="longest piece generated at once, in seconds; default: as trained")
    option("--steps", type=int, default=25, help="Euler steps (default 25)")
    option("--guidance-scale", type=float, default=4.5, help="default 4.5")
    option("--seed", type=_seed, default=0, help="a number, or random: one is drawn and printed")
    _add_adapters(generate, "adapter to add; may be repeated")
    option("--batch-size", type=int, default=8, help="clips or windows generated at once (default 8)")
    option("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the network")
    option("--device", default="auto", help="auto, cpu, cuda, cuda:N or N, mps (default auto)")
    option("--alignment", choices=("timestamps", "reference"), help="how frames are read; default: as for training")
    option("--shard-index", type=int, metavar="I", help="generate every N-th item, beginning with the I-th (0 ...)")
    option("--num-shards", type=int, metavar="N", help="number of shards the items are divided into")

    demo = add("demo", _demo, "a page to try a run: video and text in, audio and its spectrogram out")
    option = demo.add_argument
    option("run", metavar="RUN", help="run folder, pretrained_model folder or Hub id")
    option("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)")
    option("--port", type=int, default=7860, help="default 7860, or a free one when it is taken")
    option("--max-upload-mb", type=float, default=200, help="largest upload in MB (default 200)")
    option("--device", default="auto")
    _add_adapters(demo, "adapter that visitors can choose; may be repeated")

    report = add("report", _report, "generate a held-out split of a run, score it and write report/index.html")
    report.add_argument("--run", required=True, type=Path, help="run folder")
    report.add_argument("--split", choices=("test", "validation"), default="", help="default: test where there is one")
    report.add_argument("--events", type=Path, help="events.json of example media: adds onset scores")
    report.add_argument("--clips", type=int, default=6, help="clips shown on the page (default 6)")
    report.add_argument("--started", type=float, help="time in s since the epoch that `seconds` counts from")


def _add_adapters(command: argparse.ArgumentParser, meaning: str) -> None:
    command.add_argument("--lora", metavar="DIR", action="append", default=[], help=meaning)
    command.add_argument("--lora-scale", type=float, action="append", default=[], help="of each adapter (default 1)")


def _adapters(options: argparse.Namespace) -> dict[str, float]:
    """Source and scale of each adapter."""
    scales = options.lora_scale or [1.0] * len(options.lora)
    if len(scales) != len(options.lora):
        raise ValueError(f"--lora is given {len(options.lora)} times, --lora-scale {len(scales)} times: one for each")
    if twice := {source for source in options.lora if options.lora.count(source) > 1}:
        raise ValueError(f"--lora {min(twice)} is given twice: add its scales")
    return dict(zip(options.lora, scales, strict=True))


def _generate(options: argparse.Namespace) -> None:
    if options.folder is not None or options.list is not None:
        _generate_many(options)
        return
    if options.video is None and options.image is None and not options.prompt:
        raise ValueError("nothing to generate from: give --video, --image, --prompt, --folder or --list")
    if options.out.suffix.lower() in (".mp4", ".mkv") and options.video is None:
        raise ValueError("--out is a video, but no --video is given: choose a .wav or .flac name")
    if options.out.suffix.lower() not in (".mp4", ".mkv", ".wav", ".flac"):
        raise ValueError(f"--out {options.out}: choose a name that ends with .wav or .flac, .mp4 or .mkv for a video")
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder: give the name of a file")
    media = [path for path in (options.video, options.image) if path is not None and path.exists()]
    if options.out.exists() and any(path.samefile(options.out) for path in media):
        raise ValueError(f"--out {options.out} is the input itself: choose another name, to keep it")
    from mmaudio_hf.generation.files import check_out_dir
    from mmaudio_hf.generation.pipeline import Request, save_with_note

    check_out_dir(options.out.parent)
    pipeline = _pipeline(options)
    texts = {"prompt": options.prompt, "negative_prompt": options.negative_prompt}
    request = Request(video=options.video, image=options.image, **texts)
    sampling = {"progress": True, **_sampling(options)}
    with contextlib.closing(pipeline.generate([request], options.batch_size, **sampling)) as results:
        result = next(results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    drawn = f"seed {result.seed}" if options.seed is None else ""
    notes = [drawn, result.note, save_with_note(result, options.out, video=options.video)]
    seconds = len(result.waveform) / result.sample_rate
    print("; ".join([f"{options.out}: {seconds:.2f} s at {result.sample_rate} Hz", *filter(None, notes)]))


def _demo(options: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise ValueError("the demo page needs gradio: run `pip install 'mmaudio-hf[demo]'`")
    from mmaudio_hf.pages.demo import serve

    given = {name: getattr(options, name) for name in ("host", "port", "max_upload_mb", "device")}
    serve(options.run, adapters=_adapters(options), **given)
    sys.stdout.flush()
    os._exit(0)  # without waiting for a thread that still generates


def _generate_many(options: argparse.Namespace) -> None:
    if options.video is not None or options.image is not None:
        raise ValueError("--video and --image are for one result: leave them out with --folder and --list")
    if options.list is not None and (options.prompt or options.negative_prompt):
        raise ValueError("with --list, texts are given in its columns prompt and negative_prompt")
    share = share_of_process(options)
    from mmaudio_hf.generation.files import check_out_dir, generate_files, read_folder, read_list

    notes: list[str] = []
    if options.list is not None:
        entries = read_list(options.list, options.folder)
    else:
        entries = read_folder(options.folder, options.prompt, options.negative_prompt, notes.append)
    check_out_dir(options.out, entries)  # before the network is loaded
    how: dict[str, Any] = {"ending": f".{options.format}", "batch_size": options.batch_size, "share": share}
    report = generate_files(_pipeline(options, share.local_rank), entries, options.out, **how, **_sampling(options))
    print(report, *notes, sep="\n")
    if report.listed and report.rejected == report.listed:
        raise ValueError(f"all {report.listed} items were rejected; {report.rejects_path} says why")


def _pipeline(options: argparse.Namespace, local_rank: int = 0) -> "MMAudioPipeline":
    from mmaudio_hf.features.encoders import pick_device
    from mmaudio_hf.generation.pipeline import MMAudioPipeline

    adapters = _adapters(options)
    settings = {"precision": options.precision, "alignment": options.alignment}
    settings["device"] = pick_device(options.device, local_rank)
    pipeline = MMAudioPipeline.from_pretrained(options.run, **settings)
    for adapter, scale in adapters.items():
        pipeline.load_lora_weights(adapter, scale)
    return pipeline


def _seed(text: str) -> int | None:
    if text == "random":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor random") from None


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in ("duration", "window", "guidance_scale", "seed")}
    return {"num_steps": options.steps, **given}


def _report(options: argparse.Namespace) -> None:
    from mmaudio_hf.generation.files import check_out_dir
    from mmaudio_hf.pages.report import report_run

    recipe = recipe_of_run(options.run)
    given = {name: getattr(options, name) for name in ("events", "split", "started")}
    check_out_dir(options.run)
    with hub_stores(recipe, [options.split or ("test" if recipe.data.test else "validation")]):
        figures = report_run(options.run, shown=options.clips, **given)
    print(f"report: {options.run / 'report' / 'index.html'}")
    if "onset_f1" in figures:
        right, shuffled = figures["onset_f1"], figures["onset_f1_shuffled"]
        print(f"onset F1 (+-100 ms): {right:.3f} with the right videos, {shuffled:.3f} with shuffled ones")
    if "val_loss_first" in figures:
        print(f"validation loss: {figures['val_loss_first']:.4f} first, {figures['val_loss_last']:.4f} last")
    if "steps_per_second" in figures:
        print(f"training: {figures['steps_per_second']:.2f} steps/s, peak memory {figures['peak_memory_gb']:.2f} GB")
    print("summary " + json.dumps({SUMMARY_NAMES.get(name, name): value for name, value in figures.items()}))


# --- The command that scores trained networks on a split and compares them --------------------------------------------


def add_evaluation_commands(add: Add) -> None:
    """`evaluate`."""
    command = add("evaluate", _evaluate, "generate and score the audio of a split, and compare trained networks")
    command.add_argument(
        "sources",
        metavar="RUN",
        nargs="+",
        help="run folder, pretrained_model folder or Hub id; section.key=value changes settings of the recipe",
    )
    command.set_defaults(overrides=[])  # those that stand after options
    command.add_argument("--split", choices=("validation", "test"), default="test", help="default: test")
    command.add_argument("--recipe", help="recipe with the data and settings; default: that of each run folder")
    command.add_argument("--out", type=Path, help="folder for the results; default: evaluation/ of each run folder")
    command.add_argument("--page", type=Path, help="page with the table; default: index.html beside the results")


class _Source(NamedTuple):
    """A network to evaluate: RUN as it was given."""

    name: str
    run: Path | None  # the run folder that it is or lies in
    label: str  # in the results
    recipe: Recipe  # with the overrides
    own: Recipe  # without: results by it have their usual names


def _evaluate(options: argparse.Namespace) -> None:
    sources = _sources(options)
    for source in sources:
        if not getattr(source.recipe.data, options.split):
            raise ValueError(f"recipe {source.recipe.name}: data.{options.split} names no store to evaluate")
    import torch
    from accelerate import PartialState

    from mmaudio_hf.generation.files import check_out_dir
    from mmaudio_hf.training.distributed import check_launch

    check_launch()
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PROCESS_TIMEOUT)
    results = []
    for source in sources:
        folder = (source.run or Path(source.recipe.output_dir) / source.label) / "evaluation"
        if options.out is not None:
            folder = options.out / source.label if len(sources) > 1 else options.out
        check_out_dir(folder)
        with hub_stores(source.recipe, [options.split]):
            results.append(_evaluate_one(source, folder, options.split))
    if state.is_main_process:
        from mmaudio_hf.evaluation.results import of_common_items
        from mmaudio_hf.pages.report import as_text, write_comparison

        compared = of_common_items(results)
        together = folder if len(sources) == 1 else options.out or Path("output") / "comparison"
        print(as_text(compared))
        print(f"page: {write_comparison(compared, options.page or together / 'index.html')}")
    state.wait_for_everyone()
    state.destroy_process_group()


def _sources(options: argparse.Namespace) -> list[_Source]:
    """The networks of the command line; other runs of the same name are numbered."""
    words = [*options.sources, *options.overrides]
    overrides = [word for word in words if re.match(r"[a-z_]+(\.\w+|\[\d+\])*=", word)]
    sources: list[_Source] = []
    seen: dict[str, list[Path]] = {}
    for name in words:
        if name in overrides:
            continue
        folders = (Path(name), *Path(name).resolve().parents) if Path(name).is_dir() else ()
        run = next((folder for folder in folders if (folder / "config.yaml").is_file()), None)
        if run is None and options.recipe is None:
            raise ValueError(f"{name} is part of no run folder: correct it, or give the --recipe with its stores")
        recipe = load_recipe(options.recipe, overrides) if options.recipe or not run else recipe_of_run(run, overrides)
        own = load_recipe(run / "config.yaml" if run else options.recipe)
        path = (run or Path(name)).resolve()
        label = path.name if path.is_dir() else name.replace("/", "--")
        paths = seen.setdefault(label, [])
        if path not in paths:
            paths.append(path)
        number = paths.index(path) + 1
        sources.append(_Source(name, run, label if number == 1 else f"{label}-{number}", recipe, own))
    if not sources:
        raise ValueError("name at least one run folder, pretrained_model folder or Hub id")
    return sources


def _evaluate_one(source: _Source, folder: Path, split: str) -> dict[str, Any]:
    """Generate and score the audio of one network; return the content of its file of scores."""
    from accelerate import PartialState

    from mmaudio_hf.evaluation.av_bench import av_bench_problem, check_truth
    from mmaudio_hf.evaluation.run import SplitEvaluator, variant_of
    from mmaudio_hf.features.toy import toy_codec_file
    from mmaudio_hf.models.network import MMAudio
    from mmaudio_hf.models.pretrained import find_pretrained

    pretrained, recipe = find_pretrained(source.name), source.recipe
    if recipe.encoders.kind == "toy" and toy_codec_file(pretrained, recipe.model.mode).is_file():
        # The toy codec is with the weights of the network; what av-benchmark reads is where the recipe says.
        own_weights = recipe.evaluation.av_bench_weights or recipe.encoders.weights_dir
        evaluation = replace(recipe.evaluation, av_bench_weights=own_weights)
        encoders = replace(recipe.encoders, weights_dir=str(pretrained))
        recipe = replace(recipe, encoders=encoders, evaluation=evaluation)
    file, run = pretrained / "weights.json", source.run
    weights: Any = read_json(file) if file.is_file() else {"weights": "not stated", "sigma_rel": None}
    problem = av_bench_problem(recipe, warn)
    check_truth(recipe, [split], problem, warn)
    checkpoint = run is None or pretrained.resolve().is_relative_to(run.resolve() / "checkpoints")
    variant = variant_of(recipe, source.own, split, None if checkpoint else weights)
    names: Any = {"folder": folder, "label": source.label, "variant": variant}
    evaluator = SplitEvaluator(recipe, split, av_bench_problem=problem, **names)
    model = MMAudio.from_pretrained(pretrained)
    if replace(model.config, variant="") != replace(recipe.model, variant=""):
        raise ValueError(f"{source.name} has other sizes than the recipe: give the recipe it was trained with")
    return evaluator.evaluate(model.to(PartialState().device).eval(), weights.get("step"), weights)
