"""The command that scores trained networks on a split and compares them."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from mmaudio_hf.config import Recipe, load_recipe
from mmaudio_hf.schema import PROCESS_TIMEOUT


def add_commands(add) -> None:
    """Add it by `add(name, function, help, recipe=False)`, which returns the parser of one command."""
    command = add("evaluate", _evaluate, "make and score the sound of a split with trained networks, and compare them")
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


def _evaluate(options) -> None:
    words = [*options.sources, *options.overrides]
    overrides = [word for word in words if re.match(r"[a-z_]+(\.\w+)*=", word)]
    sources = [word for word in words if word not in overrides]
    if not sources:
        raise ValueError("name at least one run folder, pretrained_model folder or Hub id")
    recipes = [_recipe_of(source, options.recipe, overrides) for source in sources]
    for recipe in recipes:
        if not getattr(recipe.data, options.split):
            raise ValueError(f"recipe {recipe.name}: data.{options.split} names no store to evaluate")
    owns = {source: _own_recipe(source, options.recipe) for source in sources}
    from accelerate import PartialState

    from mmaudio_hf.training.loop import check_launch

    state = PartialState(cpu=_no_accelerator(), timeout=PROCESS_TIMEOUT)
    check_launch()
    labels, results = _labels(sources), []
    for source, label, recipe in zip(sources, labels, recipes, strict=True):
        folder = _folder(source, label, recipe, options.out, len(sources))
        results.append(_evaluate_one(source, label, recipe, owns[source], options.split, folder))
    if state.is_main_process:
        from mmaudio_hf.report.comparison import as_text, write_comparison

        together = options.out or Path("output") / "comparison"
        page = options.page or (
            _folder(sources[0], labels[0], recipes[0], options.out, 1) if len(sources) == 1 else together
        )
        print(as_text(results))
        print(f"page: {write_comparison(results, page if options.page else page / 'index.html')}")
    state.wait_for_everyone()
    state.destroy_process_group()


def _no_accelerator() -> bool:
    import torch

    return not torch.accelerator.is_available()


def _run_of(source: str) -> Path | None:
    """The run folder that `source` is or lies in."""
    folders = (Path(source), *Path(source).resolve().parents) if Path(source).is_dir() else ()
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def _recipe_of(source: str, recipe: str | None, overrides: list[str]) -> Recipe:
    """The recipe that is given, or that of the run of `source`."""
    run = _run_of(source)
    if recipe is not None:
        return load_recipe(recipe, overrides)
    if run is None:
        raise ValueError(f"{source} is part of no run folder: say by --recipe RECIPE which stores to evaluate it on")
    loaded = load_recipe(run / "config.yaml", overrides)
    return replace(loaded, name=run.resolve().name, output_dir=str(run.resolve().parent))  # it may have moved


def _own_recipe(source: str, recipe: str | None) -> Recipe:
    """The recipe by which the results of a source have their usual names: its run's, or else the one given."""
    run = _run_of(source)
    return load_recipe(recipe if run is None else run / "config.yaml", [])


def _labels(sources: list[str]) -> list[str]:
    """What each source is called in the results; other runs of the same name are numbered."""
    labels, places = [], {}
    for source in sources:
        run = _run_of(source) or Path(source)
        label = run.resolve().name if run.is_dir() else source.replace("/", "--")
        same = places.setdefault(label, [])
        if run.resolve() not in same:
            same.append(run.resolve())
        number = same.index(run.resolve()) + 1
        labels.append(label if number == 1 else f"{label}-{number}")
    return labels


def _folder(source: str, label: str, recipe: Recipe, out: Path | None, sources: int) -> Path:
    """Where the results of a source go."""
    if out is not None:
        return out / label if sources > 1 else out
    run = _run_of(source)
    return (run or Path(recipe.output_dir) / label) / "evaluation"


def _evaluate_one(source: str, label: str, recipe: Recipe, own: Recipe, split: str, folder: Path) -> dict:
    """Make and score the sounds of one network; return the content of its file of scores."""
    from accelerate import PartialState

    from mmaudio_hf.evaluation.published import av_bench_problem, check_truth
    from mmaudio_hf.evaluation.run import SplitEvaluator, variant_of
    from mmaudio_hf.features.toy import toy_codec_file
    from mmaudio_hf.models.network import MMAudio
    from mmaudio_hf.models.pretrained import find_pretrained

    pretrained = find_pretrained(source)
    if recipe.encoders.kind == "toy" and toy_codec_file(pretrained, recipe.model.mode).is_file():
        recipe = replace(recipe, encoders=replace(recipe.encoders, weights_dir=str(pretrained)))
    noted = pretrained / "weights.json"
    weights = json.loads(noted.read_text()) if noted.is_file() else {"weights": "not stated", "sigma_rel": None}
    say = lambda message: print(f"warning: {message}", file=sys.stderr)  # noqa: E731
    problem = av_bench_problem(recipe, say)
    check_truth(recipe, [split], problem, say)
    run = _run_of(source)
    checkpoint = run is None or pretrained.resolve().is_relative_to(run.resolve() / "checkpoints")
    variant = variant_of(recipe, own, split, None if checkpoint else weights)
    options = {"av_bench_problem": problem, "folder": folder, "label": label, "variant": variant}
    evaluator = SplitEvaluator(recipe, split, **options)
    network = MMAudio.from_pretrained(pretrained)
    if replace(network.config, variant="") != replace(recipe.model, variant=""):
        raise ValueError(f"{source} is a network of other sizes than the recipe's: give the recipe it was trained with")
    return evaluator.evaluate(network.to(PartialState().device).eval(), weights.get("step"), weights)
