"""Files of scores: RUN/evaluation/SPLIT_step_N.json, one per evaluated split and weights.

Those of other settings or weights than the run's own are SPLIT_step_N_VARIANT.json.

format, run, split, step                  what was evaluated
weights                                   as in weights.json: raw or EMA, sigma_rel, step
settings                                  how the audio was generated
stores, ids                               names of the stores; count and hash of the ids that were scored
items                                     listed, scored, and dropped with reasons
scores                                    NAME: value, unit, better, used, interval, dropped, note, warning
categories                                CATEGORY, or "aligned": NAME: value, used, interval
not_computed                              scores that were requested, and why they are missing
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from mmaudio_hf.evaluation.metrics import METRICS, Score, score_caches
from mmaudio_hf.files import write_text
from mmaudio_hf.schema import RunError

FORMAT = 1
FOLDER = "evaluation"
OWN_TRUTH = "true latents, decoded"
RESAMPLES = 1000
LEVEL = 0.95  # of intervals
SHOWN = 6  # items whose audio is kept for the page that compares evaluations: 256 kB each


def scores_file(folder: Path, split: str, step: int | None, variant: str = "") -> Path:
    """File of the scores of a split; `step` None for weights that do not say how long they were trained."""
    name = split if step is None else f"{split}_step_{step}"
    return folder / (f"{name}_{variant}.json" if variant else f"{name}.json")


def audio_folder(clips_file: Path) -> Path:
    """Folder with the audio of a few items, ID.wav, and below it their true audio, beside SPLIT_step_N.clips.jsonl."""
    return clips_file.with_name(f"{clips_file.name.partition('.clips.')[0]}.audio")


def read_key(folder: Path) -> str | None:
    """The key that `write_key` left in `folder`; None without one that can be read."""
    with suppress(OSError, ValueError):
        return json.loads((folder / "key.json").read_text())
    return None


def write_key(folder: Path, key: str) -> None:
    """Record in `folder` the hash of what its content was made from."""
    write_text(folder / "key.json", json.dumps(key))


def read_scores(path: str | PathLike) -> dict[str, Any]:
    """One file of scores. ValueError when it is something else."""
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != FORMAT or not isinstance(content["scores"], dict):
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of scores: {error}") from error
    return content


def find_scores(run_dir: str | PathLike, split: str = "") -> list[dict[str, Any]]:
    """All scores of a run (of `split` alone) with its own settings, by split and step; no damaged files."""
    contents = []
    for path in (Path(run_dir) / FOLDER).glob("*.json"):
        if re.fullmatch(r"(validation|test)(_step_\d+)?\.json", path.name):
            try:
                content = read_scores(path)
            except ValueError:
                continue
            if split in ("", content["split"]):
                contents.append(content)
    return sorted(contents, key=lambda content: (content["split"], content["step"] or 0))


def gather_results(function: Callable[[], Any]) -> list[Any]:
    """What `function` returned on every process, in their order; RunError on all of them when it failed on one.

    A collective: every process calls it.
    """
    result, problem = None, None
    try:
        result = function()
    except (OSError, ValueError, RuntimeError) as error:  # CUDA raises the last of these when memory is short
        problem = str(error)
        if isinstance(error, OSError) and error.filename:
            problem = f"{error.filename}: {error.strerror}"
    outcomes = gather_object([(result, problem)])
    if problems := [each for _, each in outcomes if each is not None]:
        raise RunError(problems[0])
    return [result for result, _ in outcomes]


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returned on the main process, on every process; RunError on all of them when it failed."""
    return gather_results(lambda: function() if PartialState().is_main_process else None)[0]


def digest(plain: Mapping[str, Any], *more: str) -> str:
    """SHA-256 of plain values and texts."""
    text = json.dumps(plain, sort_keys=True) + "".join(f"\n{line}" for line in more)
    return hashlib.sha256(text.encode()).hexdigest()


# --- How sure scores are ----------------------------------------------------------------------------------------------


def with_intervals(scores: Mapping[str, Score]) -> dict[str, Score]:
    """Scores with the interval in which their value lies over items drawn again (bootstrap, Efron 1979).

    The items are drawn once for all scores. Distances and inception scores are no means: those of the contributions of
    their items move as they do, to first order (the infinitesimal jackknife).
    """
    ids = list(dict.fromkeys(item_id for score in scores.values() for item_id in score.items))
    names = [name for name, score in scores.items() if len(score.items) > 1]
    if not names:
        return dict(scores)
    values = np.array([[scores[name].items.get(item_id, np.nan) for name in names] for item_id in ids])
    low, high = interval(resampled_means(values))
    ends = {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}
    return {name: replace(score, interval=ends.get(name)) for name, score in scores.items()}


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means (RESAMPLES, K) of as many rows of values (n, K), drawn with replacement; NaN are left out of them."""
    generator, valid = np.random.default_rng(seed), np.isfinite(values)
    filled, means = np.where(valid, values, 0.0), []
    for _ in range(0, RESAMPLES, 100):  # weights of 100 resamples of 15,000 items take 12 MB
        drawn = generator.integers(0, len(values), (100, len(values)))
        weights = np.stack([np.bincount(row, minlength=len(values)) for row in drawn]).astype(np.float64)
        counts = weights @ valid
        means.append(np.divide(weights @ filled, counts, out=np.full(counts.shape, np.nan), where=counts > 0))
    return np.concatenate(means)


def interval(means: np.ndarray) -> np.ndarray:
    """Ends (2, K) of the middle 95 % of (RESAMPLES, K)."""
    return np.nanquantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


ALIGNED = "aligned"
_DISTRIBUTIONS = ("fd", "is", "kad")  # families of scores that are no means over items
_ID_COLUMNS, _LABEL_COLUMNS = ("video_id", "key", "id"), ("label", "ucs_category", "category")
_FLAGS = ("background_music", "static_image", "voice_over")  # of VGGSounder: what is heard is not what is seen


def read_categories(path: str | PathLike) -> dict[str, set[str]]:
    """Ids of each category of VGGSounder's list (video_id, label, modality, flags; several rows of an id) or of
    FoleyBench's (key, ucs_category). "aligned" has those with a label that is heard and seen and without a flag; of a
    list without modalities all. ValueError for another file.
    """
    groups: dict[str, set[str]] = {ALIGNED: set()}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            key = next((name for name in _ID_COLUMNS if name in columns), None)
            label = next((name for name in _LABEL_COLUMNS if name in columns), None)
            if key is None or label is None:
                names = f"{', '.join(_ID_COLUMNS)} and of {', '.join(_LABEL_COLUMNS)}"
                raise ValueError(f"{path} has the columns {', '.join(columns)}: one of {names} is needed")
            for row in reader:
                groups.setdefault(row[label], set()).add(row[key])
                flagged = any((row.get(name) or "").strip().lower() in ("true", "1") for name in _FLAGS)
                if (row.get("modality") or "AV").strip() == "AV" and not flagged:
                    groups[ALIGNED].add(row[key])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a list of categories: {error}") from error
    return groups


def category_scores(scores: Mapping[str, Score], groups: Mapping[str, set[str]]) -> dict[str, dict[str, Any]]:
    """Means over the items of each category, of scores that are means; categories without an item are left out."""
    means = {n: s for n, s in scores.items() if METRICS.get(n, ("",))[0] not in _DISTRIBUTIONS and s.items}
    results: dict[str, dict[str, Any]] = {}
    for group, ids in groups.items():
        chosen = {n: {i: v for i, v in s.items.items() if i in ids} for n, s in means.items()}
        some = {
            n: replace(means[n], value=float(np.mean(list(items.values()))), used=len(items), items=items)
            for n, items in chosen.items()
            if items
        }
        if some:
            plain = {n: s.to_json() for n, s in with_intervals(some).items()}
            results[group] = {n: {k: s[k] for k in ("value", "used", "interval") if k in s} for n, s in plain.items()}
    return results


def ids_json(ids: Collection[str]) -> dict[str, Any]:
    """Count and hash of the ids of items, as files of scores name them."""
    return {"count": len(ids), "sha256": digest({}, *sorted(ids))}


def read_clips(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Contributions by id of the file of scores whose content this is; {} where there are none."""
    if "contributions" in content:  # of `of_common_items`
        return content["contributions"]
    with suppress(OSError, ValueError, KeyError):
        lines = Path(content["clips"]).read_text().splitlines()
        return {line.pop("id"): line for line in map(json.loads, lines)}
    return {}


def of_common_items(contents: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Contents of files of scores; of different items they are computed again over those that all of them have.

    Means follow from the contributions of items, distances and inception scores from features, where
    `evaluation.keep_clips` kept them: else they are left out, and `not_computed` says so. Contents of other splits or
    truth, or without a common item, are returned as they are.
    """
    clips = [read_clips(content) for content in contents]
    common = [i for i in clips[0] if all(i in each for each in clips)] if clips else []
    known = {(c["split"], str(c.get("truth"))) for c in contents}
    if not common or len(known) > 1 or all(c.get("ids") == contents[0].get("ids") for c in contents):
        return list(contents)
    return [_of_items(content, each, common) for content, each in zip(contents, clips, strict=True)]


def _of_items(content: Mapping[str, Any], clips: Mapping[str, Mapping[str, float]], ids: Sequence[str]) -> dict:
    scores, lost = dict(_scored_again(content, ids)), dict(content["not_computed"])
    for name, old in content["scores"].items():
        items = {i: clips[i][name] for i in ids if name in clips[i]}
        if name not in scores and METRICS.get(name, ("",))[0] in _DISTRIBUTIONS:
            lost[name] = f"the features of the {len(ids)} common items are gone (evaluation.keep_clips keeps them)"
        elif name not in scores and items:
            scores[name] = Score(np.mean([*items.values()]).item(), old["unit"], old["better"], len(items), items=items)
    plain = {name: score.to_json() for name, score in with_intervals(scores).items()}
    contributions = {i: {name: score.items[i] for name, score in scores.items() if i in score.items} for i in ids}
    counts = {**content["items"], "scored": len(ids)}
    changed = {"ids": ids_json(ids), "items": counts, "scores": {n: plain[n] for n in content["scores"] if n in plain}}
    return {**content, **changed, "categories": {}, "not_computed": lost, "contributions": contributions}


def _scored_again(content: Mapping[str, Any], ids: Collection[str]) -> dict[str, Score]:
    """Distances and inception scores of these items, from the features of an evaluation; {} where they are gone."""
    clips = Path(content["clips"])
    truth = Path(str(content.get("truth")))
    if content.get("truth") == OWN_TRUTH:
        truth = clips.parent / f"{content['split']}_truth" / "cache"
    cache = clips.with_name(clips.name.partition(".clips.")[0]) / "cache"
    families = [f for f in _DISTRIBUTIONS if any(METRICS.get(name, ("",))[0] == f for name in content["scores"])]
    if not families or not any(truth.glob("*.pth")) or not any(cache.glob("*.pth")):
        return {}
    with suppress(ValueError):  # none of them can be computed
        return score_caches(truth, cache, families=families, ids=ids)
    return {}


def best_of(columns: Sequence[Mapping[str, float]], rank: Callable[[Any], Any]) -> int | None:
    """Index of the column (id -> contribution) that is better than each other one, beyond the interval of their paired
    difference; None without one. `rank` of a mean is smaller where it is better.
    """
    ids = [i for i in columns[0] if all(i in column for column in columns)]
    if len(ids) < 2:
        return None
    ranks = rank(resampled_means(np.array([[column[i] for column in columns] for i in ids])))
    best = int(np.argmin(np.nanmean(ranks, axis=0)))
    others = [column for column in range(len(columns)) if column != best]
    return best if all(interval(ranks[:, column] - ranks[:, best])[0] > 0 for column in others) else None
