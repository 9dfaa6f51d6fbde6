"""Commands that train."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mmaudio_hf.cli.hub import hub_session, resolve_resume
from mmaudio_hf.config import Recipe, load_recipe, micro_batch_size
from mmaudio_hf.training.lock import RunLock


def add_commands(add) -> None:
    """Add them by `add(name, function, help, recipe=False)`, which returns the parser of one command."""
    train = add("train", _train, "train as train.py does; start it with accelerate for several processes", recipe=True)
    train.add_argument("--dry-run", action="store_true", help="print the resolved recipe and its numbers, and stop")
    doctor = add("doctor", _doctor, "say whether a recipe will run here, before it is started", recipe=True)
    doctor.add_argument("--processes", type=int, help="processes that will be launched here (default: one per GPU)")
    doctor.add_argument(
        "--machines", type=int, default=1, help="machines like this one that train together (default 1)"
    )
    doctor.add_argument("--fsdp", action="store_true", help="the launch shares out the network, as by fsdp.yaml")
    doctor.add_argument("--quick", action="store_true", help="only look for released files, and measure no speed")
    train.add_argument("--allow-changes", action="store_true", help="resume a run with settings that alter training")


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
    # Held around the Hub as well: what is fetched and staged belongs to the launch that trains.
    with (
        RunLock(recipe.run_dir, lambda message: print(f"warning: {message}", file=sys.stderr)) as lock,
        hub_session(recipe, lock) as on_checkpoint,
    ):
        return _run_training(resolve_resume(recipe), options.allow_changes, on_checkpoint, lock)


def _doctor(options) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    for name in ("processes", "machines"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, not {number}")
    import torch

    from mmaudio_hf.cli.weights import weight_checks
    from mmaudio_hf.doctor import as_table, examine

    processes = options.processes or max(1, torch.cuda.device_count())
    ways = {"machines": options.machines, "fsdp": options.fsdp, "quick": options.quick}
    findings = list(examine(recipe, processes, weight_checks(), **ways))
    print(as_table(findings, max(80, shutil.get_terminal_size((120, 24)).columns)))
    failed = sum(finding.level == "FAIL" for finding in findings)
    print(f"{recipe.name}: {f'{failed} of these must be mended first' if failed else 'ready to train'}")
    return 1 if failed else 0


def _run_training(recipe: Recipe, allow_changes: bool, on_checkpoint: Callable[[Path], None], lock: RunLock) -> int:
    import torch

    from mmaudio_hf.data.dataset import check_encoders, open_mixture
    from mmaudio_hf.hub.card import code_version
    from mmaudio_hf.training.finetune import initial_network
    from mmaudio_hf.training.loop import train

    code_version()  # now: the first checkpoint, hours later, is to tell of the code that trains
    expected = {
        "model": recipe.model,
        "encoders": recipe.encoders,
        "seed": recipe.seed,
        "extraction": recipe.extraction,
    }
    mixture = open_mixture(recipe.data.train, **expected)
    validation = open_mixture(recipe.data.validation, **expected) if recipe.data.validation else None
    check_encoders([*mixture.stores, *(validation.stores if validation else ())])
    evaluators = []
    if recipe.samples.every:
        from mmaudio_hf.samples import SampleEvaluator

        evaluators.append(SampleEvaluator(recipe))
    if recipe.evaluation.every or recipe.evaluation.after_training:
        from mmaudio_hf.evaluation.run import evaluators_of

        evaluators += evaluators_of(recipe, lambda message: print(f"warning: {message}", file=sys.stderr))
    torch.manual_seed(recipe.seed)
    network = initial_network(recipe, mixture.latent_statistics, lambda: empty_text_features(recipe))
    result = train(
        recipe,
        network,
        mixture,
        validation,
        evaluators,
        write_extras=lambda folder: write_extras(recipe, folder),
        allow_changes=allow_changes,
        on_checkpoint=on_checkpoint,
        lock=lock,
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


def write_extras(recipe: Recipe, folder: Path, start: str = "") -> None:
    """Put beside the weights in a `pretrained_model` folder what goes with them: encoder files, and the model card.

    start: the file the run was imported from.
    """
    from mmaudio_hf.hub.card import write_card

    write_encoder_files(recipe, folder)
    write_card(recipe, folder, start)


def write_encoder_files(recipe: Recipe, folder: Path) -> None:
    """Put beside a model what generation needs to know of its encoders, of the alignment of its pictures, and the
    fitted codec of toy encoders.

    The folder is meant to be published, so paths that hold for this machine alone stay out of it.
    """
    from mmaudio_hf.models.pretrained import ENCODERS_FILE

    encoders = recipe.encoders
    noted = {"kind": encoders.kind, "precision": encoders.precision, "alignment": recipe.extraction.alignment}
    paths = {"weights_dir": encoders.weights_dir, "clip": encoders.clip}
    noted |= {name: path for name, path in paths.items() if not path.startswith("~") and not Path(path).is_absolute()}
    (folder / ENCODERS_FILE).write_text(json.dumps(noted, indent=1) + "\n")
    if recipe.encoders.kind == "toy":
        from mmaudio_hf.features.toy import toy_codec_file

        codec = toy_codec_file(recipe.encoders.weights_dir, recipe.model.mode)
        if codec.is_file():  # absent when only the store of another machine is here
            shutil.copyfile(codec, folder / codec.name)


def dry_run_text(recipe: Recipe, world_size: int = 1) -> str:
    """The resolved recipe as YAML, and the numbers that follow from it."""
    import torch
    import yaml

    from mmaudio_hf.config import to_dict
    from mmaudio_hf.data.dataset import places_per_epoch
    from mmaudio_hf.models.network import MMAudio
    from mmaudio_hf.schema import audio_mode, sequence_lengths
    from mmaudio_hf.training.finetune import mark_trained

    with torch.device("meta"):
        network = mark_trained(MMAudio(recipe.model), recipe.finetune)
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
        per_epoch = sum(places_per_epoch(n, s.repeats) for n, s in zip(rows, recipe.data.train, strict=True))
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
