"""Fine-tuning to a kind of event that the base has never seen: what is learned, and what is forgotten.

The base learns four kinds from the example's videos, once, and is kept. Each method then gets 20 clips of a withheld
kind, which is seen, heard and timed as no other (`media.example.WITHHELD`), and is scored on clips that nothing saw:
onsets of the generated audio against the events, distance to the true audio, and both again on the kinds of the base.
"""

import shutil
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from mmaudio_hf.config import (
    DataConfig,
    EmaConfig,
    EncoderConfig,
    ExtractionConfig,
    FinetuneConfig,
    LoraConfig,
    OptimConfig,
    Recipe,
    SamplingConfig,
    StoreConfig,
    TrainingConfig,
    VideoSource,
    variant_config,
)
from mmaudio_hf.config.reading import read_json_lines
from mmaudio_hf.data.mixture import open_mixture
from mmaudio_hf.data.store import StoreWriter
from mmaudio_hf.evaluation.onsets import onset_scores, onset_times, waveform_scores
from mmaudio_hf.evaluation.samples import HeldOutItems, decoding_pipeline, generate_items
from mmaudio_hf.features.extract import extract_video
from mmaudio_hf.features.toy import text_features
from mmaudio_hf.media.example import SPLITS, read_events, write_example_media, write_withheld_media
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import RunError
from mmaudio_hf.training.finetune import initial_model, set_trainable
from mmaudio_hf.training.loop import train

CLIPS = {"train": 20, "val": 4, "test": 12}  # of the withheld kind
DURATION = 4.0  # s: half of the usual length costs half as much, and has four events all the same
OLD, BASE = "old", "base"
BASE_STEPS = (400, 300)

Scores = dict[str, float]


def recipe_of(folder: Path, name: str, **changes: Any) -> Recipe:
    """The recipe of every run here: the small network of the example, its toy encoders, clips of 4 s."""
    features = str(folder / "features")
    return Recipe(
        name,
        output_dir=str(folder / "runs"),
        model=variant_config("small_16k", hidden_dim=64, num_heads=1, depth=4, fused_depth=2, duration=DURATION),
        encoders=EncoderConfig(kind="toy", weights_dir=features, device="cpu"),
        extraction=ExtractionConfig(output_dir=features, batch_size=8, shard_size=32),
        sampling=SamplingConfig(num_steps=12, batch_size=12),
        **changes,
    )


def base_recipes(folder: Path) -> tuple[Recipe, Recipe]:
    """The base learns four kinds of event: 400 steps from random weights, and 300 more from a high learning rate."""
    data = DataConfig(train=_stores(folder, f"{OLD}_train"), validation=_stores(folder, f"{OLD}_val"))
    first = recipe_of(
        folder,
        f"{BASE}-first",
        data=data,
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=20, milestones=(250, 340)),
        ema=EmaConfig(snapshot_every=100),
        training=_training(BASE_STEPS[0], 16, validate_every=100),
    )
    again = recipe_of(
        folder,
        BASE,
        data=data,
        finetune=FinetuneConfig(init_from=str(first.run_dir)),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=10, schedule="poly"),
        ema=EmaConfig(snapshot_every=100),
        training=_training(BASE_STEPS[1], 16, validate_every=100),
    )
    return first, again


# Name -> what differs: share of yours in an epoch, learning rate, adapter.
# The streams of text and CLIP in the blocks stay as they are: with them an adapter has more than 3 % of the parameters.
_LORA: dict[str, Any] = {
    "rank": 4,
    "targets": ("qkv", "proj", "mlp", "modulation", "inputs", "conditions", "output"),
    "rank_pattern": (
        *("joint_blocks.*.text_block=0", "joint_blocks.*.clip_block=0", "clip_input_proj=0", "audio_input_proj=0"),
        *("text_input_proj=2", "sync_input_proj=2"),
    ),
}
METHODS: dict[str, tuple[float, float, LoraConfig]] = {
    "full": (1.0, 1.5e-3, LoraConfig()),
    "full_replay": (0.5, 1.5e-3, LoraConfig()),
    "lora": (1.0, 6e-3, LoraConfig(**_LORA, alpha=8)),
    "lora_replay": (0.5, 6e-3, LoraConfig(**_LORA, alpha=8)),
    "rslora_replay": (0.5, 6e-3, LoraConfig(**_LORA, alpha=4, rslora=True)),
    "dora_replay": (0.5, 6e-3, LoraConfig(**_LORA, alpha=4, rslora=True, dora=True)),
    "pissa_replay": (0.5, 2e-3, LoraConfig(**_LORA, alpha=4, rslora=True, init="pissa")),
}
STEPS = 600


def tuned_recipe(folder: Path, kind: str, method: str, seed: int) -> Recipe:
    """One fine-tuning of the base to `kind`, for a fixed number of steps."""
    share, rate, lora = METHODS[method]
    names, repeats = [f"{kind}_train"], [1.0]
    if share < 1:
        names, repeats = [*names, f"{OLD}_train"], [share / (1 - share) * SPLITS["train"] / CLIPS["train"], 1.0]
    return recipe_of(
        folder,
        f"{kind}-{method}-{seed}",
        seed=seed,
        data=DataConfig(
            train=_stores(folder, *names, repeats=repeats),
            validation=_stores(folder, f"{kind}_val", f"{OLD}_test"),
        ),
        finetune=FinetuneConfig(init_from=str(folder / "runs" / BASE), lora=lora),
        optim=OptimConfig(learning_rate=rate, warmup_steps=60, schedule="poly"),
        ema=EmaConfig(sigma_rels=(0.1,), sigma_rel=0.1, snapshot_every=STEPS),
        training=_training(STEPS, 8, validate_every=100),
    )


def _training(steps: int, batch_size: int, **changes: Any) -> TrainingConfig:
    quiet: dict[str, Any] = {"mixed_precision": "no", "validation_combinations": (), "trackers": (), "log_every": 20}
    return TrainingConfig(
        steps=steps, batch_size=batch_size, checkpoint_every=steps, keep_checkpoints=1, **quiet, **changes
    )


def _stores(folder: Path, *names: str, repeats: Sequence[float] = ()) -> tuple[StoreConfig, ...]:
    pairs = zip(names, repeats or [1.0] * len(names), strict=True)
    return tuple(StoreConfig(str(folder / "features" / name), repeats) for name, repeats in pairs)


# --- The world --------------------------------------------------------------------------------------------------------


def make_world(folder: Path, kind: str) -> None:
    """Write the media of the base and of `kind`, and their features, unless they are there."""
    old, new = folder / "media" / OLD, folder / "media" / kind
    if not (old / "events.json").is_file():
        write_example_media(old)
    if not (new / "events.json").is_file():
        write_withheld_media(new, kind, CLIPS)
    recipe = recipe_of(folder, BASE)
    writer = partial(StoreWriter, layout=recipe.extraction.layout, sync_dtype=recipe.extraction.sync_dtype)
    for name, media in ((OLD, old), (kind, new)):  # the codec is fitted to the first list: that of the base
        for split in CLIPS:
            source = VideoSource(f"{name}_{split}", str(media / "videos"), str(media / f"{split}.tsv"))
            extract_video(recipe, source, writer)


def run(recipe: Recipe) -> float:
    """Train a recipe from its beginning, or to its end; the seconds that it took."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the run before in this process
    began = time.perf_counter()
    expected = (recipe.model, recipe.encoders, recipe.seed)
    mixture, validation = (open_mixture(s, *expected) for s in (recipe.data.train, recipe.data.validation))
    torch.manual_seed(recipe.seed)
    model = initial_model(recipe, mixture.latent_statistics, lambda: text_features([""])[0])
    result = train(recipe, model, mixture, validation)
    if result.stopped_by is not None:
        raise RunError(f"stopped at step {result.step} of {recipe.name}: the same command starts this run again")
    mixture.close()
    validation.close()
    return time.perf_counter() - began


def score(recipe: Recipe, kind: str) -> Scores:
    """Scores of the published weights of a run on the test clips of the withheld kind and of the base's kinds."""
    folder, scores = Path(recipe.output_dir).parent, {}
    model = MMAudio.from_pretrained(recipe.run_dir / "last" / "pretrained_model").eval()
    pipeline = decoding_pipeline(recipe, model)
    for name in (kind, OLD):
        events = read_events(folder / "media" / name / "events.json")
        items = HeldOutItems(_stores(folder, f"{name}_test"))
        detected, times, distances = [], [], []
        for item, result in generate_items(pipeline, items, recipe.sampling, seed=0):
            detected.append(onset_times(result.waveform, result.sample_rate))
            times.append(events[item.item_id].times)
            truth = pipeline.decode(item.latent)
            distances.append(waveform_scores(result.waveform, truth, result.sample_rate)["log_mel_distance"])
        items.close()
        which = "old" if name == OLD else "new"
        scores[f"{which}_f1"] = onset_scores(detected, times, duration=DURATION)["f1"]
        scores[f"{which}_log_mel_distance"] = statistics.mean(distances)
    return scores


def finetune(folder: Path, kind: str, methods: Sequence[str], seeds: int) -> dict[str, Any]:
    """Scores of the base, and of every method the mean over `seeds` seeds and those of each seed.

    `new_` is of the withheld kind, `old_` of the kinds of the base: "f1" of the onsets against the events,
    "log_mel_distance" in dB, "loss" of the validation. `parameters_share` is of all parameters of the network.
    """
    make_world(folder, kind)
    for base in base_recipes(folder):
        if not (base.run_dir / "last").exists():
            run(base)
    figures: dict[str, Any] = {"kind": kind, "seeds": seeds}
    figures |= {f"base_{name}": value for name, value in score(base, kind).items()}
    for method in methods:
        runs = [_tune(tuned_recipe(folder, kind, method, seed), kind) for seed in range(seeds)]
        for name in runs[0]:
            each = [scores[name] for scores in runs]
            figures[f"{method}_{name}"] = statistics.mean(each)
            if name.startswith(("new_", "old_")) and seeds > 1:
                figures[f"{method}_{name}_each"] = each
    return figures


def _tune(recipe: Recipe, kind: str) -> Scores:
    """Train and score one fine-tuned model; a run of an earlier call is replaced."""
    shutil.rmtree(recipe.run_dir, ignore_errors=True)
    elapsed = run(recipe)
    lines = read_json_lines(recipe.run_dir / "metrics.jsonl")[0]
    loss = f"loss_{OLD}_test"
    start = next(line[f"val/{loss}"] for line in lines if f"val/{loss}" in line)
    end = next(line[f"val_ema/{loss}"] for line in reversed(lines) if f"val_ema/{loss}" in line)
    with torch.device("meta"):
        model = set_trainable(MMAudio(recipe.model), recipe.finetune)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    share = trained / sum(p.numel() for p in MMAudio(recipe.model).parameters())
    scores = score(recipe, kind) | {"old_loss": end, "old_loss_change": end - start, "seconds": elapsed}
    return scores | {"parameters": trained, "parameters_share": share}
