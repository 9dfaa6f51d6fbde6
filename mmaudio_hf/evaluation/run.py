"""Evaluation of a network: the audio of a whole split, generated and scored by all processes.

    FOLDER/SPLIT_step_N.json          scores, see `results`; SPLIT_step_N_VARIANT with other settings than the run's own
    FOLDER/SPLIT_step_N.clips.jsonl   built-in scores of each clip
    FOLDER/SPLIT_step_N.audio/ID.wav  the audio of a few items, and in reference/ the true one
    FOLDER/SPLIT_step_N/clips/ID.wav  the audio, until it is scored (or for good, with evaluation.keep_clips)
    FOLDER/SPLIT_step_N/cache/        its features, likewise
    FOLDER/SPLIT_truth/cache/         features of the true latents, decoded, where the recipe names none

A clip is written under another name and renamed, so an evaluation that was killed resumes with the clips that are
there. They belong to the weights and settings whose hash is in `key.json`; with any others the folder is emptied first.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from mmaudio_hf.config import Recipe
from mmaudio_hf.evaluation.av_bench import AV_BENCH, PublishedScores, av_bench_problem, check_truth
from mmaudio_hf.evaluation.metrics import METRICS, dropped_json
from mmaudio_hf.evaluation.onsets import clip_scores, mean_scores
from mmaudio_hf.evaluation.results import (
    FOLDER,
    FORMAT,
    OWN_TRUTH,
    SHOWN,
    audio_folder,
    category_scores,
    digest,
    gather_results,
    ids_json,
    on_main,
    read_categories,
    read_key,
    read_scores,
    scores_file,
    with_intervals,
    write_key,
)
from mmaudio_hf.evaluation.samples import REFERENCE, HeldOutItems, decoding_pipeline, generate_items
from mmaudio_hf.features.encoders import check_encoders, decoder_fingerprint
from mmaudio_hf.files import write_text
from mmaudio_hf.generation.pipeline import MMAudioPipeline
from mmaudio_hf.media.audio import read_waveform, write_audio
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import Evaluation, RunError

NOT_FINITE = "a clip that is not finite"
UNREADABLE = "a clip that cannot be read"
REPEATED = "another row of the same id"


def evaluators_of(recipe: Recipe, log: Callable[[str], None]) -> list["SplitEvaluator"]:
    """What the training loop is to run for `recipe.evaluation`.

    The first process logs once when av-benchmark is needed and cannot be used; the other scores are computed all the
    same. ValueError when a store, a file of the decoder or a folder of true features is missing.
    """
    settings = recipe.evaluation
    splits = {settings.split: settings.every} if settings.every else {}
    if settings.after_training:
        splits.setdefault("test", recipe.training.steps)
    problem = av_bench_problem(recipe, log) if splits else None
    check_truth(recipe, splits, problem, log)
    return [SplitEvaluator(recipe, split, every=every, av_bench_problem=problem) for split, every in splits.items()]


class SplitEvaluator:
    """Generates the audio of `data.SPLIT` and scores it, every `every` steps of training or on its own.

    av_bench_problem: what `av_bench_problem` returned. folder: for the results, by default RUN/evaluation.
    label: name of the network in the results. variant: what `variant_of` returned.
    ValueError when a store or a file of the decoder is missing.
    """

    long, at_start = True, False

    def __init__(
        self,
        recipe: Recipe,
        split: str,
        *,
        every: int = 0,
        av_bench_problem: str | None = None,
        folder: Path | None = None,
        label: str = "",
        variant: str = "",
    ):
        self.name, self.every, self.split = f"eval_{split}", every, split
        self.recipe, self.label = recipe, label or recipe.name
        self.folder = folder or recipe.run_dir / FOLDER
        self._problem, self._variant = av_bench_problem, variant
        categories = recipe.evaluation.categories
        self._categories = read_categories(categories) if categories else {}
        check_encoders(recipe.encoders, recipe.model.mode, ("decode",))
        stores = getattr(recipe.data, split)
        if not stores:
            raise ValueError(f"data.{split} names no store: there is nothing to evaluate")
        self.items = HeldOutItems(stores, recipe.evaluation.items, spread=True)
        if recipe.evaluation.metrics and (other := self.items.durations - {recipe.model.duration}):
            raise ValueError(
                f"data.{split} has clips of {', '.join(f'{d:g}' for d in sorted(other))} s, and evaluation.metrics"
                f" compares clips of model.duration alone, {recipe.model.duration:g} s: set evaluation.metrics=[], or"
                f" name only stores of that duration in data.{split}"
            )

    def run(self, model: MMAudio, step: int, weights: Mapping[str, Any]) -> Evaluation:
        """`evaluate` for the training loop, which a full disk or a failing library must not end."""
        try:
            content = self.evaluate(model, step, weights)
        except RunError as error:
            if PartialState().is_main_process:
                print(f"warning: the evaluation of step {step} was given up ({error})", file=sys.stderr)
            return Evaluation({}, [])
        scores = {name: score["value"] for name, score in content["scores"].items()}
        return Evaluation({name: value for name, value in scores.items() if value is not None}, [])

    def evaluate(self, model: MMAudio, step: int | None, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Generate and score the split with `model`; every process calls it and returns the content of the file.

        weights: which these are, as in weights.json. RunError, on every process, when one of them fails.
        """
        state = PartialState()
        path = scores_file(self.folder, self.split, step, self._variant)
        work = path.with_suffix("")
        earlier, keys, problem = on_main(lambda: self._prepare(model, path, work))
        if earlier is not None:
            return earlier | {"run": self.label, "clips": str(path.with_suffix(".clips.jsonl"))}
        published = PublishedScores(self.recipe, self.split, self.folder, self.items, keys["truth"], problem)
        truth, ids = published.truth_dir(), self.items.ids[state.process_index :: state.num_processes]
        results: dict[str, Any] = {}
        for scores in gather_results(lambda: self._generate_and_score(model, ids, work, truth)):
            results |= scores
        clips = {i: results[i] for i in self.items.ids if not isinstance(results[i], str)}
        dropped: dict[str, list[str]] = {}
        for item_id in self.items.ids:
            if item_id not in clips:
                dropped.setdefault(results[item_id], []).append(item_id)
        published_scores, not_computed = published.scores(list(clips), work)
        means = with_intervals(mean_scores(clips, dropped) | published_scores)
        reasons = {**dropped} | ({REPEATED: self.items.repeated} if self.items.repeated else {})
        content: dict[str, Any] = {
            "format": FORMAT,
            "run": self.label,
            "split": self.split,
            "step": step,
            "weights": dict(weights),
            "settings": self.recipe.generation_settings,
            "stores": [Path(store.path).name for store in getattr(self.recipe.data, self.split)],
            "truth": getattr(self.recipe.evaluation.truth, self.split) or OWN_TRUTH,
            "ids": ids_json(clips),
            "items": {"listed": len(self.items.ids), "scored": len(clips), "dropped": dropped_json(reasons)},
            "scores": {name: score.to_json() for name, score in means.items()},
            "not_computed": dict(not_computed),
            "categories": category_scores(means, self._categories),
            "key": keys["scores"],
        }
        contributions = {i: {n: s.items[i] for n, s in means.items() if i in s.items} for i in clips}
        on_main(lambda: _write(path, content, contributions))
        # What failed may work the next time, with the clips and features that are there.
        if state.is_main_process and not self.recipe.evaluation.keep_clips and not _failed(content):
            shutil.rmtree(work, ignore_errors=True)
        return content | {"clips": str(path.with_suffix(".clips.jsonl"))}

    def _prepare(self, model: MMAudio, path: Path, work: Path) -> tuple[dict | None, dict[str, Any], str | None]:
        """Earlier scores if they are still valid, the keys of this evaluation, and why av-benchmark cannot be used.

        On the main process, which alone changes the folder: clips in it that belong to something else are removed.
        """
        settings, decoder = self.recipe.evaluation, decoder_fingerprint(self.recipe.encoders, self.recipe.model.mode)
        origin = {"decoder": decoder, "stores": [_store_hash(path) for path in self.items.paths]}
        clips_key = digest({"settings": self.recipe.generation_settings, **origin}, network_hash(model))
        truth = getattr(settings.truth, self.split)
        # Caches that were added to a folder allow more scores; the Hub's come with a revision.
        caches = sorted(Path(truth).glob("*.pth")) if truth else ()
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in caches]
        requested = {"metrics": sorted(settings.metrics), "truth": truth, "files": files}
        if self._categories:
            requested["categories"] = {name: sorted(ids) for name, ids in self._categories.items()}
        scores_key = digest(requested, clips_key, *self.items.ids)
        keys = {"truth": origin, "scores": scores_key}
        with suppress(ValueError):  # none, or of another version
            earlier = read_scores(path)
            unreadable = UNREADABLE in {entry["reason"] for entry in earlier["items"]["dropped"]}
            if earlier["key"] == scores_key and not _failed(earlier) and not unreadable:
                return earlier, keys, self._problem
        if work.exists() and read_key(work) != clips_key:
            shutil.rmtree(work)
        shutil.rmtree(audio_folder(path.with_suffix(".clips.jsonl")), ignore_errors=True)
        (work / "clips").mkdir(parents=True, exist_ok=True)
        write_key(work, clips_key)
        return None, keys, self._problem

    def _generate_and_score(
        self, model: MMAudio, ids: Sequence[str], work: Path, truth: Path | None
    ) -> dict[str, dict[str, float] | str]:
        """Built-in scores of each of `ids`, or the reason for which it has none; clips that exist are not generated.

        The true latents, decoded, are written to `truth`, where it is given.
        """
        if not ids:
            return {}
        pipeline = decoding_pipeline(self.recipe, model)
        missing = [item_id for item_id in ids if not (work / "clips" / f"{item_id}.wav").is_file()]
        items = (self.items.of(item_id) for item_id in missing)
        results = generate_items(pipeline, items, self.recipe.sampling, self.recipe.seed)
        scores: dict[str, dict[str, float] | str] = {}
        for item, result in self._progress(results, len(missing), "clips"):
            if result.waveform.isfinite().all():
                write_audio(work / "clips" / f"{item.item_id}.wav", result.waveform, result.sample_rate)
            else:
                scores[item.item_id] = NOT_FINITE
        rest = [item_id for item_id in ids if item_id not in scores]
        for item_id in self._progress(rest, len(rest), "scores"):
            scores[item_id] = self._scores_of(pipeline, item_id, work, truth)
        return scores

    def _scores_of(
        self, pipeline: MMAudioPipeline, item_id: str, work: Path, truth: Path | None
    ) -> dict[str, float] | str:
        # Scored as it is in the file, so that a clip from before a kill and one from now have the same scores.
        file = work / "clips" / f"{item_id}.wav"
        try:
            waveform, rate = read_waveform(file)
        except MediaError:
            file.unlink(missing_ok=True)  # the next evaluation generates it again
            return UNREADABLE
        reference = pipeline.decode(self.items.of(item_id).latent.to(pipeline.device))
        folders = [] if truth is None else [truth]
        count = min(SHOWN, len(self.items))
        if item_id in {self.items.ids[i * len(self.items) // count] for i in range(count)}:
            kept = audio_folder(work.with_name(f"{work.name}.clips.jsonl"))
            folders.append(kept / REFERENCE)
            (kept / REFERENCE).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, kept / f"{item_id}.wav")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            write_audio(folder / f"{item_id}.wav", reference, rate)
        return clip_scores(waveform, reference, rate)

    def _progress(self, items: Iterable, total: int, what: str) -> tqdm:
        hidden = not PartialState().is_main_process
        return tqdm(items, f"{self.split}: {what}", total, leave=False, disable=hidden, dynamic_ncols=True)


def _write(path: Path, content: Mapping[str, Any], clips: Mapping[str, Mapping[str, float]]) -> None:
    """Write the contributions of every clip, and then the file of scores."""
    lines = [json.dumps({"id": item_id, **scores}) + "\n" for item_id, scores in clips.items()]
    write_text(path.with_suffix(".clips.jsonl"), "".join(lines))
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _failed(content: Mapping[str, Any]) -> bool:
    """Whether scores are missing for which everything was there."""
    return bool({AV_BENCH, *METRICS} & set(content["not_computed"]))


def variant_of(recipe: Recipe, own: Recipe, split: str, weights: Mapping[str, Any] | None = None) -> str:
    """Short hash of how `recipe` differs from a run's `own` in what the scores of a split depend on; "" for nothing.

    weights: content of weights.json for weights that are none of the run's checkpoints.
    """
    theirs, ours = (
        {
            "settings": each.generation_settings,
            "items": each.evaluation.items,
            "stores": [str(Path(store.path).resolve()) for store in getattr(each.data, split)],
        }
        for each in (own, recipe)
    )
    return "" if ours == theirs and weights is None else digest({**ours, "weights": weights})[:8]


def network_hash(model: torch.nn.Module) -> str:
    """SHA-256 of every tensor of a network."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _store_hash(path: Path) -> str:
    """Of the manifest, which has checksums of the columns; of a store without one, of its list and file sizes."""
    manifest, table = (path.with_name(f"{path.name}{ending}") for ending in (".manifest.json", ".tsv"))
    if manifest.is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.iterdir())]
    return hashlib.sha256(table.read_bytes() + repr(sizes).encode()).hexdigest()
