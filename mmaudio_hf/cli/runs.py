"""Commands that look at a run or make something of it."""

import sys
from dataclasses import replace
from pathlib import Path

from mmaudio_hf.cli.training import empty_text_features, write_extras
from mmaudio_hf.config import Recipe, load_recipe


def add_commands(add) -> None:
    """Add them by `add(name, function, help, recipe=False)`, which returns the parser of one command."""
    average = add("ema", _ema, "publish averaged weights of another width or step, from the snapshots of a run")
    average.add_argument("run", type=Path, metavar="RUN", help="run folder")
    average.add_argument("--sigma-rel", type=float, required=True, help="width relative to the length of training")
    average.add_argument("--step", type=int, help="training step (default: that of the last snapshot)")
    average.add_argument("--out", type=Path, required=True, help="new folder; generate takes it as --run")

    replay = add("replay-step", _replay_step, "rerun one training step alone and show its losses and gradients")
    replay.add_argument("run", type=Path, metavar="RUN", help="run folder")
    replay.add_argument(
        "step", type=int, metavar="STEP", help="updates made before it, as in skipped.jsonl and autopsy/"
    )
    replay.add_argument("--advance", action="store_true", help="train from the checkpoint before it to its own weights")
    replay.add_argument("--json", action="store_true", help="print everything as one JSON object, as in autopsy/")


def _recipe_of(run: Path) -> Recipe:
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.yaml")
    recipe = load_recipe(run / "config.yaml")
    return replace(recipe, name=run.resolve().name, output_dir=str(run.resolve().parent))  # it may have moved


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _ema(options) -> None:
    from mmaudio_hf.training.publish import publish_average

    recipe = _recipe_of(options.run)
    average = (options.run, options.sigma_rel, options.step, options.out)
    weights = publish_average(*average, lambda folder: write_extras(recipe, folder), _say)
    print(f"{options.out}: EMA of sigma_rel {weights['sigma_rel']:g} as of step {weights['step']}")


def _replay_step(options) -> None:
    recipe = _recipe_of(options.run)
    import torch

    from mmaudio_hf.data.dataset import open_mixture
    from mmaudio_hf.training.autopsy import summary, to_json
    from mmaudio_hf.training.finetune import initial_network
    from mmaudio_hf.training.replay import replay_step

    mixture = open_mixture(recipe.data.train, recipe.model)
    torch.manual_seed(recipe.seed)
    # As a new run: before the first checkpoint, its own start is what counts.
    start = replace(recipe, resume="never")
    network = initial_network(start, mixture.latent_statistics, lambda: empty_text_features(recipe))
    figures = replay_step(recipe, network, mixture, options.step, advance=options.advance, say=_say)
    print(to_json(figures).rstrip() if options.json else summary(figures))
