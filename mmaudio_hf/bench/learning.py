"""What small networks learn of synthesised clips: when they are fine-tuned, and when their training data was audited.

Fine-tuning: the base learns four kinds of event from the example's videos, once, and is kept. Each method then gets 20
clips of a withheld kind, which is seen, heard and timed as no other (`media.example.WITHHELD`), and is scored on clips
that nothing saw: onsets of the generated audio against the events, distance to the true audio, and both again on the
kinds of the base, for what is forgotten.

Curation: `audit --sync` is asked for the faults of 200 clips, of which 15 % have their audio 0.2 to 1 s early or late
and 15 % that of another schedule; noise, audio from off-screen, events that are not heard, and clips that do not move
make it hard. The same network is then trained on 60 such clips without that noise, as they are ("dirty") and as the
audit leaves them ("cleaned": other audio left out, offsets corrected), and scored by the onsets of what it generates
for clean videos.
"""

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from mmaudio_hf.config import EncoderConfig, Recipe, StoreConfig, load_recipe, read_json_lines
from mmaudio_hf.data.mixture import open_mixture
from mmaudio_hf.data.store import StoreWriter
from mmaudio_hf.evaluation.av_bench import AvBench
from mmaudio_hf.evaluation.offsets import SECONDS, Comparison, MediaClips, figures_of, measure
from mmaudio_hf.evaluation.onsets import onset_scores, onset_times, waveform_scores
from mmaudio_hf.evaluation.samples import HeldOutItems, decoding_pipeline, generate_items
from mmaudio_hf.features.extract import extract_video
from mmaudio_hf.features.toy import text_features
from mmaudio_hf.generation.pipeline import MMAudioPipeline
from mmaudio_hf.media.audit import AuditSource, Limits, audit, known_offsets, known_problems, sync_status
from mmaudio_hf.media.example import SPLITS, read_events, write_example_media, write_faulty_media, write_withheld_media
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import RunError
from mmaudio_hf.training.finetune import initial_model, set_trainable
from mmaudio_hf.training.loop import train

EXAMPLE = Path(__file__).parent.parent / "recipes" / "example.yaml"
CLIPS = {"train": 20, "val": 4, "test": 12}  # of the withheld kind
OLD, BASE = "old", "base"
DETECTED, CURATED = 200, {"train": 60, "val": 4, "test": 32}  # clips of the detection, and of both arms
ARMS = ("dirty", "cleaned")
BASE_STEPS, STEPS = 800, 500
# Clips of 4 s cost half as much as usual ones, and have four events all the same. The times of events are decided while
# there is mostly noise, and a half of these steps has t < 0.27: with the usual half of them below 0.5 the onset F1 of
# the withheld kind was 0.67 after 600 steps, and is 1.00 so.
WORLD = (
    *("model.duration=4.0", "encoders.device=cpu", "sampling.num_steps=12", "sampling.batch_size=12"),
    *("flow.time_mean=-1", "optim.schedule=poly", "ema.sigma_rels=[0.1]", "ema.sigma_rel=0.1"),
    *("training.validation_combinations=[]", "training.trackers=[]", "training.keep_checkpoints=1"),
    *("samples.every=0", "evaluation.after_training=false"),
)
# The streams of text and CLIP in the blocks stay as they are: with them an adapter has more than 3 % of the parameters.
LORA = (
    *("finetune.lora.rank=4", "finetune.lora.alpha=4", "finetune.lora.rslora=true", "optim.learning_rate=6e-3"),
    "finetune.lora.targets=[qkv, proj, mlp, modulation, inputs, conditions, output]",
    "finetune.lora.rank_pattern=[joint_blocks.*.text_block=0, joint_blocks.*.clip_block=0, clip_input_proj=0,"
    " audio_input_proj=0, text_input_proj=2, sync_input_proj=2]",
)
FULL = ("optim.learning_rate=1.5e-3",)
# Name -> share of the new clips in an epoch, and overrides of the recipe.
METHODS: dict[str, tuple[float, tuple[str, ...]]] = {
    "full": (1.0, FULL),
    "full_replay": (0.5, FULL),
    "lora": (1.0, (*LORA, "finetune.lora.rslora=false", "finetune.lora.alpha=8")),
    "lora_replay": (0.5, (*LORA, "finetune.lora.rslora=false", "finetune.lora.alpha=8")),
    "rslora_replay": (0.5, LORA),
    "dora_replay": (0.5, (*LORA, "finetune.lora.dora=true")),
    "pissa_replay": (0.5, (*LORA, "finetune.lora.init=pissa", "optim.learning_rate=2e-3")),
}

Scores = dict[str, float]


def _recipe(values: dict[str, Any], steps: int, *changes: str) -> Recipe:
    values |= dict.fromkeys(("training.steps", "training.checkpoint_every", "ema.snapshot_every"), steps)
    # JSON is YAML, whatever a path has in it.
    return load_recipe(EXAMPLE, [*WORLD, *(f"{k}={json.dumps(v)}" for k, v in values.items()), *changes])


def recipe_of(folder: Path, kind: str, name: str, steps: int, train: dict[str, float], *changes: str) -> Recipe:
    """The example's network and toy encoders in the world of `folder`; `train`: store -> times in an epoch."""
    stores = {
        "train": [{"path": str(folder / "features" / store), "repeats": repeats} for store, repeats in train.items()],
        "validation": [{"path": str(folder / "features" / store)} for store in (f"{kind}_val", f"{OLD}_test")],
        "test": [{"path": str(folder / "features" / f"{store}_test")} for store in (kind, OLD)],
    }
    # The codec is fitted to the first list: that of the base.
    lists = [(store, split, folder / "media" / store) for store in (OLD, kind) for split in CLIPS]
    videos = [
        {"name": f"{store}_{split}", "media_dir": str(media / "videos"), "list": str(media / f"{split}.tsv")}
        for store, split, media in lists
    ]
    own = {"output_dir": "runs", "encoders.weights_dir": "features", "extraction.output_dir": "features"}
    values: dict[str, Any] = {key: str(folder / value) for key, value in own.items()}
    values |= {"name": name, "extraction.videos": videos, "extraction.audios": []}
    values |= {f"data.{split}": entries for split, entries in stores.items()}
    return _recipe(values, steps, *changes)


def tuned_recipe(folder: Path, kind: str, method: str, seed: int) -> Recipe:
    """One fine-tuning of the base to `kind`, for a fixed number of steps."""
    share, changes = METHODS[method]
    stores = {f"{kind}_train": 1.0}
    if share < 1:
        stores = {f"{kind}_train": share / (1 - share) * SPLITS["train"] / CLIPS["train"], f"{OLD}_train": 1.0}
    base = json.dumps(str(folder / "runs" / BASE))
    changes = (f"seed={seed}", "training.batch_size=8", "optim.warmup_steps=60", *changes)
    return recipe_of(folder, kind, f"{kind}-{method}-{seed}", STEPS, stores, f"finetune.init_from={base}", *changes)


def make_world(recipe: Recipe, folder: Path, kind: str) -> None:
    """Write the media of the base and of `kind`, and their features, unless they are there."""
    old, new = folder / "media" / OLD, folder / "media" / kind
    if not (old / "events.json").is_file():
        write_example_media(old)
    if not (new / "events.json").is_file():
        write_withheld_media(new, kind, CLIPS)
    for source in recipe.extraction.videos:
        extract_video(recipe, source, _writer(recipe))


def _writer(recipe: Recipe) -> partial[StoreWriter]:
    return partial(StoreWriter, layout=recipe.extraction.layout, sync_dtype=recipe.extraction.sync_dtype)


def run(recipe: Recipe) -> float:
    """Train a recipe to its end, from its beginning or where it was stopped; the seconds that it took."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the run before in this process
    began = time.perf_counter()
    expected = (recipe.model, recipe.encoders, recipe.seed)
    mixture, validation = (open_mixture(s, *expected) for s in (recipe.data.train, recipe.data.validation))
    torch.manual_seed(recipe.seed)
    model = initial_model(recipe, mixture.latent_statistics, lambda: text_features([""])[0])
    result = train(recipe, model, mixture, validation)
    if result.stopped_by is not None:
        raise RunError(f"stopped at step {result.step} of {recipe.name}: the same command resumes it")
    mixture.close()
    validation.close()
    return time.perf_counter() - began


def score(recipe: Recipe) -> Scores:
    """Scores of the published weights of a run on the test clips of the withheld kind and of the base's kinds."""
    scores: Scores = {}
    pipeline = published_pipeline(recipe)
    for which, source in zip(("new", "old"), recipe.data.test, strict=True):
        media = Path(recipe.output_dir).parent / "media" / Path(source.path).name.removesuffix("_test")
        each = score_store(recipe, pipeline, source, media / "events.json")
        scores |= {f"{which}_{name}": value for name, value in each.items()}
    return scores


def published_pipeline(recipe: Recipe) -> MMAudioPipeline:
    """The weights that a run publishes, with its decoder."""
    return decoding_pipeline(recipe, MMAudio.from_pretrained(recipe.run_dir / "last" / "pretrained_model").eval())


def score_store(recipe: Recipe, pipeline: MMAudioPipeline, source: StoreConfig, events_file: Path) -> Scores:
    """Onset F1 of the audio generated for the rows of a store, and its mean distance to the true audio."""
    events, items = read_events(events_file), HeldOutItems([source])
    detected, times, distances = [], [], []
    for item, result in generate_items(pipeline, items, recipe.sampling, seed=0):
        detected.append(onset_times(result.waveform, result.sample_rate))
        times.append(events[item.item_id].times)
        truth = pipeline.decode(item.latent)
        distances.append(waveform_scores(result.waveform, truth, result.sample_rate)["log_mel_distance"])
    items.close()
    f1 = onset_scores(detected, times, duration=recipe.model.duration)["f1"]
    return {"f1": float(f1), "log_mel_distance": statistics.mean(distances)}


def finetune(folder: Path, kind: str, methods: Sequence[str], seeds: int) -> dict[str, Any]:
    """Scores of the base, and of every method the mean over `seeds` seeds and those of each seed.

    `new_` is of the withheld kind, `old_` of the kinds of the base: "f1" of the onsets against the events,
    "log_mel_distance" in dB, "loss" of the validation. `parameters_share` is of all parameters of the network.
    """
    base = recipe_of(folder, kind, BASE, BASE_STEPS, {f"{OLD}_train": 1.0}, "optim.warmup_steps=40")
    make_world(base, folder, kind)
    if not (base.run_dir / "checkpoints" / f"step_{BASE_STEPS}").exists():
        run(base)
    figures: dict[str, Any] = {"kind": kind, "seeds": seeds}
    figures |= {f"base_{name}": value for name, value in score(base).items()}
    for method in methods:
        runs = [_tune(tuned_recipe(folder, kind, method, seed)) for seed in range(seeds)]
        for name in runs[0]:
            each = [scores[name] for scores in runs]
            figures[f"{method}_{name}"] = statistics.mean(each)
            if name.startswith(("new_", "old_")) and seeds > 1:
                figures[f"{method}_{name}_each"] = each
    return figures


def _tune(recipe: Recipe) -> Scores:
    """Train and score one fine-tuned model; a run of an earlier call is replaced."""
    shutil.rmtree(recipe.run_dir, ignore_errors=True)
    elapsed = run(recipe)
    lines, loss = read_json_lines(recipe.run_dir / "metrics.jsonl")[0], f"loss_{OLD}_test"
    start = next(line[f"val/{loss}"] for line in lines if f"val/{loss}" in line)
    end = next(line[f"val_ema/{loss}"] for line in reversed(lines) if f"val_ema/{loss}" in line)
    with torch.device("meta"):
        model = MMAudio(recipe.model)
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in set_trainable(model, recipe.finetune).parameters() if p.requires_grad)
    scores = score(recipe) | {"old_loss": end, "old_loss_change": end - start, "seconds": elapsed}
    return scores | {"parameters": trained, "parameters_share": trained / total}


# --- Curation -------------------------------------------------------------------------------------------------------


def curation(folder: Path, seeds: int, *, clips: int = DETECTED, train: bool = True) -> dict[str, Any]:
    """Shares of faults found and of false alarms, errors of offsets, and onset F1 of the two networks of each seed."""
    figures = detection(folder / "detection", clips)
    if not train or not seeds:
        return figures
    media = folder / "media"
    if not (media / "faults.json").is_file():
        write_faulty_media(media, CURATED, hard=False)
    source, table = _training_clips(media), folder / "audit.parquet"
    audit([source], table, duration=4.0, sync=compared(media, table.with_suffix(".sync.jsonl")))
    each: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm, seed in ((arm, seed) for seed in range(seeds) for arm in ARMS):
        recipe = trained(folder, table, arm, seed)
        scores = score_store(recipe, published_pipeline(recipe), recipe.data.test[0], media / "events.json")
        each[arm].append(scores["f1"])
    for arm in ARMS:
        figures |= {f"{arm}_f1": statistics.mean(each[arm]), f"{arm}_f1_each": each[arm]}
    return figures | {"gain_f1": figures["cleaned_f1"] - figures["dirty_f1"], "seeds": seeds}


def compared(media: Path, lines: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Figures of the training clips of a folder of faulty media."""
    comparison = Comparison(EncoderConfig(kind="toy"), "16k", SECONDS, AvBench("", media))
    clips = MediaClips([_training_clips(media)], comparison)
    measure(clips, comparison, lines)
    return figures_of(clips, lines)


def _training_clips(media: Path) -> AuditSource:
    return AuditSource("train", "video", media / "videos", media / "train.tsv")


def detection(folder: Path, clips: int) -> dict[str, Any]:
    """Shares of what `write_faulty_media` has done that the default limits find."""
    if not (folder / "faults.json").is_file():
        write_faulty_media(folder, {"train": clips})
    faults, figures = json.loads((folder / "faults.json").read_text()), compared(folder, folder / "sync.jsonl")
    status, errors = dict[str, list[str | None]](), list[float]()
    for item_id, fault in faults.items():
        heard = figures["train", item_id]
        status.setdefault(fault["fault"], []).append(sync_status(heard, Limits())[0])
        if fault["fault"] == "offset":
            errors.append(abs(heard.get("sync_offset", np.inf) - fault["offset"]))
    share = lambda fault, what: statistics.mean(s == what for s in status[fault])  # noqa: E731
    return {
        "clips": len(faults),
        **{f"clips_{fault or 'right'}": len(each) for fault, each in status.items()},
        "unrelated_found": share("unrelated", "unrelated"),
        "offset_found": share("offset", "offset"),
        "offset_within_40_ms": float(np.mean(np.array(errors) <= 0.04)),
        "offset_error_p90_ms": float(1000 * np.quantile(errors, 0.9)),
        "false_alarms": 1 - share("", "related"),
        "still_unknown": share("still", "unknown"),
    }


def arm_recipe(folder: Path, arm: str, seed: int) -> Recipe:
    """The example's network and toy encoders on the stores of an arm."""
    media, features = folder / "media", folder / "features"
    videos = [
        {"name": f"{arm if split == 'train' else 'clean'}_{split}", "media_dir": str(media / "videos")}
        | {"list": str(media / f"{split}.tsv")}
        for split in CURATED
    ]
    values: dict[str, Any] = {"name": f"{arm}-{seed}", "seed": seed, "output_dir": str(folder / "runs")}
    values |= {"encoders.weights_dir": str(features), "extraction.output_dir": str(features)}
    values |= {"extraction.videos": videos, "extraction.audios": []}
    splits = dict(zip(("train", "validation", "test"), videos, strict=True))
    values |= {f"data.{name}": [{"path": str(features / str(video["name"]))}] for name, video in splits.items()}
    if arm == "cleaned":
        values |= {"extraction.audit": str(folder / "audit.parquet"), "extraction.correct_offset": True}
        values |= {"extraction.reject": ["unrelated"]}
    return _recipe(values, STEPS, "optim.warmup_steps=40", "training.batch_size=8")


def trained(folder: Path, table: Path, arm: str, seed: int) -> Recipe:
    """Make the stores of an arm unless they are there, and train on them; a finished run is kept."""
    recipe = arm_recipe(folder, arm, seed)
    if (recipe.run_dir / "checkpoints" / f"step_{STEPS}").exists():
        return recipe
    for video in recipe.extraction.videos:
        problems, offsets = None, None
        if arm == "cleaned" and video.name == "cleaned_train":
            source = AuditSource("train", "video", video.media_dir, video.list)
            renew = "mmaudio-hf bench curation"
            problems = known_problems(table, source, recipe.extraction.reject, renew=renew)
            offsets = known_offsets(table, source, renew=renew)
        extract_video(recipe, video, _writer(recipe), problems=problems, offsets=offsets)
    shutil.rmtree(recipe.run_dir, ignore_errors=True)
    run(recipe)
    return recipe
