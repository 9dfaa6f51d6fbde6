"""What `audit --sync` finds among synthesised clips, and what a network gains when it trains on the cleaned store.

Detection: 200 clips, of which 15 % have their audio 0.2 to 1 s early or late and 15 % that of another schedule; noise,
audio from off-screen, events that are not heard, and clips that do not move make it hard.
Training: the same network on 60 such clips without that noise, as they are ("dirty") and as the audit leaves them
("cleaned": other audio left out, offsets corrected), scored by the onsets of what it generates for clean videos.
"""

import json
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmaudio_hf.bench.finetune import EXAMPLE, WORLD, run
from mmaudio_hf.config import EncoderConfig, Recipe, load_recipe
from mmaudio_hf.data.store import StoreWriter
from mmaudio_hf.evaluation.av_bench import AvBench
from mmaudio_hf.evaluation.offsets import SECONDS, Comparison, MediaClips, figures_of, measure
from mmaudio_hf.evaluation.onsets import onset_scores, onset_times
from mmaudio_hf.evaluation.samples import HeldOutItems, decoding_pipeline, generate_items
from mmaudio_hf.features.extract import extract_video
from mmaudio_hf.media.audit import AuditSource, Limits, audit, known_offsets, known_problems, sync_status
from mmaudio_hf.media.example import read_events, write_faulty_media
from mmaudio_hf.models.network import MMAudio

CLIPS = 200  # of the detection
SPLITS = {"train": 60, "val": 4, "test": 32}
STEPS = 500
ARMS = ("dirty", "cleaned")
_RENEW = "mmaudio-hf bench curation"


def curation(folder: Path, seeds: int, *, clips: int = CLIPS, train: bool = True) -> dict[str, Any]:
    """Shares of faults found and of false alarms, errors of offsets, and onset F1 of the two networks of each seed."""
    figures = detection(folder / "detection", clips)
    if not train or not seeds:
        return figures
    media = folder / "media"
    if not (media / "faults.json").is_file():
        write_faulty_media(media, SPLITS, hard=False)
    table = audited(media, folder / "audit.parquet")
    scores = [{arm: score(trained(folder, table, arm, seed)) for arm in ARMS} for seed in range(seeds)]
    for arm in ARMS:
        each = [of_seed[arm] for of_seed in scores]
        figures |= {f"{arm}_f1": statistics.mean(each), f"{arm}_f1_each": each}
    return figures | {"gain_f1": figures["cleaned_f1"] - figures["dirty_f1"], "seeds": seeds}


def compared(media: Path, lines: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Figures of the training clips of a folder of faulty media."""
    comparison = Comparison(EncoderConfig(kind="toy"), "16k", SECONDS, AvBench("", media))
    clips = MediaClips([AuditSource("train", "video", media / "videos", media / "train.tsv")], comparison)
    measure(clips, comparison, lines)
    return figures_of(clips, lines)


def audited(media: Path, table: Path) -> Path:
    """The table of an audit of the training clips."""
    source = AuditSource("train", "video", media / "videos", media / "train.tsv")
    audit([source], table, duration=4.0, sync=compared(media, table.with_suffix(".sync.jsonl")))
    return table


def detection(folder: Path, clips: int) -> dict[str, Any]:
    """Shares of what `write_faulty_media` has done that the default limits find."""
    if not (folder / "faults.json").is_file():
        write_faulty_media(folder, {"train": clips})
    faults, figures = json.loads((folder / "faults.json").read_text()), compared(folder, folder / "sync.jsonl")
    status: dict[str, list[str | None]] = {}
    errors = []
    for item_id, fault in faults.items():
        heard = figures["train", item_id]
        status.setdefault(fault["fault"], []).append(sync_status(heard, Limits()))
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


def recipe_of(folder: Path, arm: str, seed: int) -> Recipe:
    """The example's network and toy encoders on the stores of an arm."""
    media, features = folder / "media", folder / "features"
    videos = [
        {"name": f"{arm if split == 'train' else 'clean'}_{split}", "media_dir": str(media / "videos")}
        | {"list": str(media / f"{split}.tsv")}
        for split in SPLITS
    ]
    values: dict[str, Any] = {"name": f"{arm}-{seed}", "seed": seed, "output_dir": str(folder / "runs")}
    values |= {"encoders.weights_dir": str(features), "extraction.output_dir": str(features)}
    values |= {"extraction.videos": videos, "extraction.audios": []}
    splits = dict(zip(("train", "validation", "test"), videos, strict=True))
    values |= {f"data.{name}": [{"path": str(features / str(video["name"]))}] for name, video in splits.items()}
    values |= dict.fromkeys(("training.steps", "training.checkpoint_every", "ema.snapshot_every"), STEPS)
    if arm == "cleaned":
        values |= {"extraction.audit": str(folder / "audit.parquet"), "extraction.correct_offset": True}
        values |= {"extraction.reject": ["unrelated"]}
    given = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return load_recipe(EXAMPLE, [*WORLD, "optim.warmup_steps=40", "training.batch_size=8", *given])


def trained(folder: Path, table: Path, arm: str, seed: int) -> Recipe:
    """Make the stores of an arm unless they are there, and train on them; a finished run is kept."""
    recipe = recipe_of(folder, arm, seed)
    if (recipe.run_dir / "checkpoints" / f"step_{STEPS}").exists():
        return recipe
    writer = partial(StoreWriter, layout=recipe.extraction.layout, sync_dtype=recipe.extraction.sync_dtype)
    for video in recipe.extraction.videos:
        problems, offsets = None, None
        if arm == "cleaned" and video.name == "cleaned_train":
            source = AuditSource("train", "video", video.media_dir, video.list)
            problems = known_problems(table, source, recipe.extraction.reject, renew=_RENEW)
            offsets = known_offsets(table, source, renew=_RENEW)
        extract_video(recipe, video, writer, problems=problems, offsets=offsets)
    shutil.rmtree(recipe.run_dir, ignore_errors=True)
    run(recipe)
    return recipe


def score(recipe: Recipe) -> float:
    """Onset F1 of the published weights of a run on the clean test clips."""
    model = MMAudio.from_pretrained(recipe.run_dir / "last" / "pretrained_model").eval()
    pipeline, items = decoding_pipeline(recipe, model), HeldOutItems(recipe.data.test)
    events = read_events(Path(recipe.extraction.videos[0].media_dir).parent / "events.json")
    detected, times = [], []
    for item, result in generate_items(pipeline, items, recipe.sampling, seed=0):
        detected.append(onset_times(result.waveform, result.sample_rate))
        times.append(events[item.item_id].times)
    items.close()
    return float(onset_scores(detected, times, duration=recipe.model.duration)["f1"])
