"""Commands for released weights, and for checkpoints of the reference implementation."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from mmaudio_hf.cli.hub import Add, adder
from mmaudio_hf.cli.training import weight_checks, write_extras
from mmaudio_hf.config import Recipe, load_recipe


def add_commands(add: Add) -> None:
    """`weights` with its commands, `import` and `export`."""
    _add_commands(add("weights", None, "list, download, verify and convert released weights"))
    importing = add("import", _import, "convert a checkpoint of the reference implementation to a run folder")
    importing.add_argument("file", metavar="FILE", type=Path, help="training checkpoint or flow network, .pth")
    importing.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    importing.add_argument("--recipe", required=True, help="recipe to continue with")
    importing.add_argument("--run", required=True, type=Path, help="new run folder")
    importing.add_argument("--snapshots", type=Path, help="folder of its EMA snapshots, 0.5000.pt and so on")
    exporting = add("export", _export, "write a run as files of the reference implementation")
    exporting.add_argument("run", metavar="RUN", type=Path, help="run folder, or pretrained_model folder")
    exporting.add_argument("--out", required=True, type=Path, help="folder for the files")
    exporting.add_argument(
        "--safetensors", action="store_true", help="one file of bf16 weights, as for ComfyUI, and one of the adapter"
    )
    exporting.add_argument("--step", type=int, help="checkpoint to take (default: the newest)")


def _add_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable, help_text: str) -> argparse.ArgumentParser:
        command = adder(commands)(name, function, help_text)
        command.add_argument("--dir", type=Path, help="folder of weights (default: the recipe's, or ext_weights)")
        return command

    add("list", _weights_list, "what is released, under which licence, and what of it is here")
    download = add("download", _weights_download, "fetch released files; licences and sizes are shown first")
    download.add_argument("names", metavar="NAME", nargs="*", help="names of `weights list`, or all")
    download.add_argument("--for", dest="for_recipe", metavar="RECIPE", help="everything that a recipe reads")
    download.add_argument("--force", action="store_true", help="fetch again what is already there")
    verify = add("verify", _weights_verify, "compare files with their published checksums, or read them")
    verify.add_argument("names", metavar="NAME", nargs="*", help="default: whatever is there")
    av_bench = add("av-bench", _weights_av_bench, "make av-benchmark's environment, fetch its weights and try it")
    av_bench.add_argument("--env", type=Path, default=Path("av-bench-env"), help="its folder (default: %(default)s)")
    convert = adder(commands)("convert", _weights_convert, "make a pretrained_model folder of a flow network")
    convert.add_argument("file", metavar="FILE", type=Path, help="released file")
    convert.add_argument("out", metavar="OUT", type=Path, help="new folder; for other networks NAME.safetensors")
    convert.add_argument("--variant", help="network that it must be (default: recognised)")


def _weights_dir(options: argparse.Namespace, recipe: Recipe | None = None) -> Path:
    return options.dir or Path(recipe.encoders.weights_dir if recipe else "ext_weights")


def _weights_list(options: argparse.Namespace) -> None:
    from mmaudio_hf import weights

    print(weights.table(_weights_dir(options)))


def _weights_download(options: argparse.Namespace) -> None:
    from mmaudio_hf import weights

    recipe = load_recipe(options.for_recipe) if options.for_recipe else None
    chosen = weights.find(options.names)
    if recipe is not None:
        chosen += [weight for weight in weights.needed(recipe) if weight not in chosen]
        if recipe.encoders.kind == "toy":
            print(f"{options.for_recipe} has toy encoders, which need no released weights")
    elif not chosen:
        names = " ".join(weight.path for weight in weights.CATALOGUE)
        raise ValueError(f"say what to download: `--for RECIPE`, `all`, or some of {names}")
    weights.download(chosen, _weights_dir(options, recipe), weight_checks(), options.force)


def _weights_verify(options: argparse.Namespace) -> int:
    from mmaudio_hf import weights

    folder, bad = _weights_dir(options), 0
    chosen = weights.find(options.names) or [w for w in weights.CATALOGUE if weights.locate(w, folder)]
    for weight in chosen:
        problem = weights.problem_of(weight, folder, weight_checks())
        bad += problem is not None
        print(problem or f"{weight.path}: ok", flush=True)
    if not chosen:
        print(f"{folder} holds no released weights: `mmaudio-hf weights list` shows what there is")
    return 1 if bad else 0


def _weights_av_bench(options: argparse.Namespace) -> int:
    from mmaudio_hf import weights
    from mmaudio_hf.evaluation.av_bench import SYNCHFORMER_FILE, set_up

    folder = _weights_dir(options)
    weights.download(weights.find([SYNCHFORMER_FILE, weights.CLAP_FILE]), folder, weight_checks())
    problems = set_up(options.env, folder)
    for problem in problems:
        print(f"does not work yet: {problem}")
    print(f"evaluation.av_bench_python={options.env / 'bin' / 'python'}")
    return 1 if problems else 0


def _weights_convert(options: argparse.Namespace) -> None:
    from mmaudio_hf.models.convert import convert_file

    print(convert_file(options.file, options.out, options.variant))


def _import(options: argparse.Namespace) -> None:
    folder = [f"name={json.dumps(options.run.name)}", f"output_dir={json.dumps(str(options.run.parent))}"]
    recipe = load_recipe(options.recipe, [*options.overrides, *folder])
    from mmaudio_hf.interop import import_checkpoint

    result = import_checkpoint(
        options.file, recipe, options.snapshots, lambda folder: write_extras(recipe, folder, str(options.file))
    )
    for note in result.notes:
        print(f"note: {note}")
    print(f"{result.folder}: step {result.step}")
    print(f"continue with: accelerate launch train.py {options.run / 'config.yaml'}")


def _export(options: argparse.Namespace) -> None:
    from mmaudio_hf.interop import export_run, export_safetensors

    write = export_safetensors if options.safetensors else export_run
    for path in write(options.run, options.out, options.step):
        print(path)
