"""The command line, and the only place where the parts are put together: parse, build, connect, run.

Recipes are read and checked before anything heavy is imported, so a typing error costs a fraction of a second.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mmaudio_hf.config import Recipe, load_recipe, micro_batch_size
from mmaudio_hf.schema import RunError

ENCODERS_FILE = "encoders.json"
SUMMARY_NAMES = {
    "onset_f1": "f1_right",
    "onset_f1_shuffled": "f1_shuffled",
    "steps_per_second": "steps_per_s",
    "peak_memory_gb": "peak_mem_gb",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mmaudio-hf`; returns the exit code.

    A user's mistake ends with one sentence on stderr and code 2; a fault of the machine or the data with code 1.
    """
    options = parse(arguments)
    try:
        return options.command(options) or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run `train.py RECIPE [key=value ...] [--dry-run]`."""
    return main(["train", *(sys.argv[1:] if arguments is None else arguments)])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; overrides may stand before and after options, which argparse alone does not take."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    strangers = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmaudio-hf", description="Train MMAudio: from media to a published model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name, function, help_text, recipe=False):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(command=function)
        if recipe:
            command.add_argument("recipe", metavar="RECIPE", help="recipe file, as recipes/example.yaml")
            command.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
        return command

    media = add("example-media", _example_media, "write the synthesised example videos, recordings and captions")
    media.add_argument("directory", metavar="DIR", type=Path)
    media.add_argument("--seed", type=int, default=0)
    media.add_argument("--small", action="store_true", help="a handful of clips, for a quick trial")
    add("partition", _partition, "cut the recordings of a recipe into clips (writes clips.tsv)", recipe=True)
    add("extract-video", _extract_video, "make the feature stores of a recipe's videos", recipe=True)
    add("extract-audio", _extract_audio, "make the feature stores of a recipe's recordings", recipe=True)
    train = add("train", _train, "train as train.py does; start it with accelerate for several processes", recipe=True)
    train.add_argument("--dry-run", action="store_true", help="print the resolved recipe and its numbers, and stop")

    generate = add("generate", _generate, "make sound for a video, for a text, or for both")
    generate.add_argument("--run", required=True, help="run folder, pretrained_model folder or Hub id")
    generate.add_argument("--video", type=Path, help="video to make sound for")
    generate.add_argument("--prompt", default="", help="what is to be heard")
    generate.add_argument("--negative-prompt", default="", help="what is not to be heard")
    generate.add_argument("--out", required=True, type=Path, help="result: .wav, .flac, or .mp4 with --video")
    generate.add_argument("--duration", type=float, help="seconds; default: what the model was trained on")
    generate.add_argument("--steps", type=int, default=25, help="Euler steps (default 25)")
    generate.add_argument("--guidance-scale", type=float, default=4.5, help="default 4.5")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--device", default="auto")

    report = add("report", _report, "generate the test split of a run, score it and write report/index.html")
    report.add_argument("--run", required=True, type=Path, help="run folder")
    report.add_argument("--events", type=Path, help="events.json of example media: adds onset scores")
    report.add_argument("--clips", type=int, default=6, help="clips shown on the page (default 6)")
    report.add_argument("--started", type=float, help="time in s since the epoch that `seconds` counts from")

    verify = add("verify", _verify, "check a feature store: sizes, checksums, ids, non-finite values")
    verify.add_argument("store", metavar="STORE", type=Path)

    _add_weights_commands(add("weights", None, "list, download, verify and convert released weights"))

    importing = add("import", _import, "make a run folder of a checkpoint of the reference implementation")
    importing.add_argument("file", metavar="FILE", type=Path, help="training checkpoint or flow network, .pth")
    importing.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    importing.add_argument("--recipe", required=True, help="recipe to go on with")
    importing.add_argument("--run", required=True, type=Path, help="run folder to make")
    importing.add_argument("--snapshots", type=Path, help="folder of its EMA snapshots, 0.5000.pt and so on")
    exporting = add("export", _export, "write a run as files of the reference implementation")
    exporting.add_argument("run", metavar="RUN", type=Path, help="run folder")
    exporting.add_argument("--out", required=True, type=Path, help="folder for the files")
    exporting.add_argument("--step", type=int, help="checkpoint to take (default: the newest)")

    bench = add("bench", _bench, "measure training steps, or extraction, against what the machine can do")
    bench.add_argument("what", choices=("step", "extract"))
    bench.add_argument("--variant", default="small_16k", help="step: network (default small_16k)")
    bench.add_argument("--batch-size", type=int, default=4, help="step: samples (default 4)")
    bench.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both", help="step: default both")
    bench.add_argument("--video", type=Path, help="extract: video to read (default: one of 720p is made)")
    bench.add_argument("--rounds", type=int, default=3, help="repetitions, of which the median counts (default 3)")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_weights_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name, function, help_text, folder=True):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(command=function)
        if folder:
            command.add_argument("--dir", type=Path, help="folder of weights (default: the recipe's, or ext_weights)")
        return command

    add("list", _weights_list, "what is released, under which licence, and what of it is here")
    download = add("download", _weights_download, "fetch released files; licences and sizes are shown first")
    download.add_argument("names", metavar="NAME", nargs="*", help="names of `weights list`, or all")
    download.add_argument("--for", dest="for_recipe", metavar="RECIPE", help="everything that a recipe reads")
    download.add_argument("--force", action="store_true", help="fetch again what is already there")
    verify = add("verify", _weights_verify, "compare files with their published checksums, or read them")
    verify.add_argument("names", metavar="NAME", nargs="*", help="default: whatever is there")
    convert = add("convert", _weights_convert, "make a pretrained_model folder of a flow network", folder=False)
    convert.add_argument("file", metavar="FILE", type=Path, help="released file")
    convert.add_argument("out", metavar="OUT", type=Path, help="new folder; for other networks NAME.safetensors")
    convert.add_argument("--variant", help="network that it must be (default: recognised)")


# --- media and features --------------------------------------------------------------------------------------------


def _example_media(options) -> None:
    from mmaudio_hf.media.example import write_example_media

    write_example_media(options.directory, seed=options.seed, small=options.small)
    print(f"example media: {options.directory}")


def _partition(options) -> None:
    from mmaudio_hf.media.clips import write_clips

    recipe = load_recipe(options.recipe, options.overrides)
    for source in _sources(recipe, "audios"):
        path = clips_path(recipe, source)
        rejects = path.with_suffix(".rejects.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        report = write_clips(source.media_dir, path, workers=recipe.extraction.num_proc, progress=True)
        rejects.write_text("".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in report.rejects))
        if not report.clips:
            path.unlink()
            raise ValueError(
                f"{source.media_dir}: no recording gives a clip, each needs 8.1 s of sound at least;"
                f" {rejects} says what is wrong with each of {len(report.rejects)}"
            )
        left_out = f", see {rejects}" if report.rejects else ""
        print(
            f"{path}: {len(report.clips)} clips, {len(report.rejects)} recordings rejected{left_out};"
            f" {len(report.ignored)} other files ignored"
        )


def clips_path(recipe: Recipe, source) -> Path:
    """The clips.tsv of an audio source: named in the recipe, or beside its store."""
    return Path(source.clips or Path(recipe.extraction.output_dir) / f"{source.name}.clips.tsv")


def _sources(recipe: Recipe, kind: str):
    sources = getattr(recipe.extraction, kind)
    if not sources:
        raise ValueError(f"recipe {recipe.name} names nothing under extraction.{kind}")
    return sources


def _encoder_options(recipe: Recipe) -> dict:
    return asdict(recipe.encoders)


def _open_writer():
    from mmaudio_hf.data.store import StoreWriter

    return StoreWriter


def _extraction_options(recipe: Recipe) -> dict:
    extraction = recipe.extraction
    return {
        "output_dir": Path(extraction.output_dir),
        "encoders": _encoder_options(recipe),
        "mode": recipe.model.mode,
        "duration": recipe.model.duration,
        "batch_size": extraction.batch_size,
        "num_proc": extraction.num_proc,
        "shard_size": extraction.shard_size,
        "open_writer": _open_writer(),
    }


def _extract_video(options) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    sources = _sources(recipe, "videos")
    from mmaudio_hf.features.extract import extract_video

    for source in sources:
        extract_video(
            source.name,
            source.media_dir,
            source.list,
            alignment=recipe.extraction.alignment,
            normalize_audio=source.normalize_audio,
            **_extraction_options(recipe),
        )


def _extract_audio(options) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    sources = _sources(recipe, "audios")
    for source in sources:
        if not clips_path(recipe, source).is_file():
            raise ValueError(
                f"{clips_path(recipe, source)} is missing: run `mmaudio-hf partition {options.recipe}` first"
            )
    from mmaudio_hf.features.extract import extract_audio

    for source in sources:
        extract_audio(
            source.name, source.media_dir, source.list, clips_path(recipe, source), **_extraction_options(recipe)
        )


def _verify(options) -> int:
    from mmaudio_hf.data.store import verify

    report = verify(options.store)
    for line in (*report.problems, *report.notes):
        print(line)
    print(f"{report.path}: {report.rows} rows, {'ok' if report.ok else f'{len(report.problems)} problems'}")
    return 0 if report.ok else 1


# --- released weights ----------------------------------------------------------------------------------------------


def _weights_dir(options, recipe: Recipe | None = None) -> Path:
    return options.dir or Path(recipe.encoders.weights_dir if recipe else "ext_weights")


def _weights_list(options) -> None:
    from mmaudio_hf import weights

    print(weights.table(_weights_dir(options)))


def _weights_download(options) -> None:
    from mmaudio_hf import weights

    recipe = load_recipe(options.for_recipe) if options.for_recipe else None
    wanted = weights.find(options.names)
    if recipe is not None:
        wanted += [weight for weight in weights.needed(recipe) if weight not in wanted]
        if recipe.encoders.kind == "toy":
            print(f"{options.for_recipe} has toy encoders, which need no released weights")
    elif not wanted:
        names = " ".join(weight.path for weight in weights.CATALOGUE)
        raise ValueError(f"say what to download: `--for RECIPE`, `all`, or some of {names}")
    weights.download(wanted, _weights_dir(options, recipe), _weight_checks(), options.force)


def _weights_verify(options) -> int:
    from mmaudio_hf import weights

    folder, bad = _weights_dir(options), 0
    chosen = weights.find(options.names) or [w for w in weights.CATALOGUE if weights.locate(w, folder)]
    for weight in chosen:
        problem = weights.problem_of(weight, folder, _weight_checks())
        bad += problem is not None
        print(problem or f"{weight.path}: ok", flush=True)
    if not chosen:
        print(f"{folder} holds no released weights: `mmaudio-hf weights list` shows what there is")
    return 1 if bad else 0


def _weights_convert(options) -> None:
    from mmaudio_hf import weights

    print(weights.convert(options.file, options.out, options.variant))


def _weight_checks():
    """How to tell a right file from a wrong one where no checksum is published: the network must take it."""

    def vocoder(path: Path) -> None:
        from mmaudio_hf.features.vocoder import Vocoder

        Vocoder("44k").load_released(path)

    def vocoder_settings(path: Path) -> None:
        try:
            rates = json.loads(path.read_text())["upsample_rates"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the configuration of a vocoder ({error!r})") from error
        if rates != [8, 4, 2, 2, 2, 2]:
            raise ValueError(f"{path} is of another vocoder: its upsample_rates are {rates}")

    def empty_text(path: Path) -> None:
        from mmaudio_hf.features.clip import load_empty_text

        load_empty_text(path)

    from mmaudio_hf.weights import BIGVGAN

    return {
        f"{BIGVGAN}/bigvgan_generator.pt": vocoder,
        f"{BIGVGAN}/config.json": vocoder_settings,
        "empty_string.pth": empty_text,
    }


# --- training ------------------------------------------------------------------------------------------------------


def _train(options) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch_size(recipe.training, world)
    if options.dry_run:
        print(dry_run_text(recipe, world))
        return 0
    if not recipe.data.train:
        raise ValueError(f"{options.recipe}: data.train names no feature store")
    from mmaudio_hf.training.loop import check_launch

    check_launch()
    return _run_training(recipe)


def _run_training(recipe: Recipe) -> int:
    import torch

    from mmaudio_hf.data.dataset import open_mixture
    from mmaudio_hf.models.network import MMAudio
    from mmaudio_hf.training.loop import train

    mixture = open_mixture(recipe.data.train, recipe.model)
    validation = open_mixture(recipe.data.validation, recipe.model) if recipe.data.validation else None
    torch.manual_seed(recipe.seed)
    network = MMAudio(recipe.model)
    network.set_latent_statistics(*mixture.latent_statistics())
    network.set_empty_text(empty_text_features(recipe))
    result = train(
        recipe, network, mixture, validation, write_extras=lambda folder: write_encoder_files(recipe, folder)
    )
    if result.stopped_by is not None:
        print(f"stopped at step {result.step}; the same command goes on from there", file=sys.stderr)
        return 128 + result.stopped_by
    return 0


def empty_text_features(recipe: Recipe):
    """Text features (77, 1024) of the empty string, from the toy formulas or the released file of them."""
    if recipe.encoders.kind == "toy":
        from mmaudio_hf.features.toy import text_features

        return text_features([""])[0]
    from mmaudio_hf.features.clip import load_empty_text

    return load_empty_text(Path(recipe.encoders.weights_dir) / "empty_string.pth")


def write_encoder_files(recipe: Recipe, folder: Path) -> None:
    """Put beside a model what generation needs to know of its encoders, and the fitted codec of toy ones.

    The folder is meant to be published, so paths that hold for this machine alone stay out of it.
    """
    encoders = recipe.encoders
    noted = {"kind": encoders.kind, "precision": encoders.precision}
    paths = {"weights_dir": encoders.weights_dir, "clip": encoders.clip}
    noted |= {name: path for name, path in paths.items() if not path.startswith("~") and not Path(path).is_absolute()}
    (folder / ENCODERS_FILE).write_text(json.dumps(noted, indent=1) + "\n")
    if recipe.encoders.kind == "toy":
        from mmaudio_hf.features.encoders import toy_codec_file

        codec = toy_codec_file(recipe.encoders.weights_dir, recipe.model.mode)
        if codec.is_file():  # absent when only the store of another machine is here
            shutil.copyfile(codec, folder / codec.name)


def dry_run_text(recipe: Recipe, world_size: int = 1) -> str:
    """The resolved recipe as YAML, and the numbers that follow from it."""
    import torch
    import yaml

    from mmaudio_hf.config import to_dict
    from mmaudio_hf.models.network import MMAudio
    from mmaudio_hf.schema import audio_mode, sequence_lengths

    with torch.device("meta"):
        network = MMAudio(recipe.model)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    lengths = sequence_lengths(recipe.model.mode, recipe.model.duration)
    training = recipe.training
    derived = {
        "sample_rate": audio_mode(recipe.model.mode).sample_rate,
        "lengths": asdict(lengths),
        "trainable_parameters": trainable,
        "batch": {
            "global": training.batch_size,
            "processes": world_size,
            "accumulation_steps": training.accumulation_steps,
            "per_process_and_pass": micro_batch_size(training, world_size),
        },
        "rows_per_epoch": "unknown: a store of data.train is missing",
    }
    rows = [_store_rows(store.path) for store in recipe.data.train]
    if rows and all(rows):
        per_epoch = sum(n * store.repeats for n, store in zip(rows, recipe.data.train, strict=True))
        derived["rows_per_epoch"] = per_epoch
        derived["steps_per_epoch"] = round(per_epoch / training.batch_size, 2)
        derived["epochs"] = round(training.steps * training.batch_size / per_epoch, 2)
    parts = {"recipe": to_dict(recipe), "derived": derived}
    return yaml.safe_dump(parts, sort_keys=False, allow_unicode=True).rstrip()


def _store_rows(path: str) -> int:
    from mmaudio_hf.data.store import FeatureStore

    if not Path(path).exists():
        return 0
    with FeatureStore.open(path) as store:
        return len(store)


# --- checkpoints of the reference ----------------------------------------------------------------------------------


def _import(options) -> None:
    place = [f"name={json.dumps(options.run.name)}", f"output_dir={json.dumps(str(options.run.parent))}"]
    recipe = load_recipe(options.recipe, [*options.overrides, *place])
    from mmaudio_hf.interop import import_checkpoint

    result = import_checkpoint(
        options.file, recipe, options.snapshots, lambda folder: write_encoder_files(recipe, folder)
    )
    for note in result.notes:
        print(f"note: {note}")
    print(f"{result.folder}: step {result.step}")
    print(f"go on with: accelerate launch train.py {options.run / 'config.yaml'}")


def _export(options) -> None:
    from mmaudio_hf.interop import export_run

    for path in export_run(options.run, options.out, options.step):
        print(path)


# --- generation and report -----------------------------------------------------------------------------------------


def _generate(options) -> None:
    if options.video is None and not options.prompt:
        raise ValueError("nothing to go by: give --video, --prompt or both")
    if options.out.suffix.lower() == ".mp4" and options.video is None:
        raise ValueError("--out is a video, but no --video is given: choose a .wav or .flac name")
    from mmaudio_hf.generation import MMAudioPipeline, save_generated

    pipeline = MMAudioPipeline.from_pretrained(options.run, device=options.device)
    result = pipeline(
        video=options.video,
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        duration=options.duration,
        num_steps=options.steps,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_generated(result, options.out, video=options.video)
    seconds = len(result.waveform) / result.sample_rate
    print(f"{options.out}: {seconds:.2f} s at {result.sample_rate} Hz")


def _report(options) -> None:
    from mmaudio_hf.report import report_run

    figures = report_run(options.run, events=options.events, shown=options.clips, started=options.started)
    print(f"report: {options.run / 'report' / 'index.html'}")
    if "onset_f1" in figures:
        right, shuffled = figures["onset_f1"], figures["onset_f1_shuffled"]
        print(f"onset F1 (+-100 ms): {right:.3f} with the right videos, {shuffled:.3f} with shuffled ones")
    if "val_loss_first" in figures:
        print(f"validation loss: {figures['val_loss_first']:.4f} first, {figures['val_loss_last']:.4f} last")
    if "steps_per_second" in figures:
        print(f"training: {figures['steps_per_second']:.2f} steps/s, peak memory {figures['peak_memory_gb']:.2f} GB")
    print("summary " + json.dumps({SUMMARY_NAMES.get(name, name): value for name, value in figures.items()}))


def _bench(options) -> None:
    if options.what == "step":
        from mmaudio_hf.bench import step

        precisions = ("fp32", "bf16") if options.precision == "both" else (options.precision,)
        figures = step(options.variant, options.batch_size, options.rounds, precisions)
    else:
        from mmaudio_hf.bench_extract import extract

        figures = extract(options.video, options.rounds)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:36} {value:.4g}" if isinstance(value, float) else f"{name:36} {value}")


if __name__ == "__main__":
    sys.exit(main())
