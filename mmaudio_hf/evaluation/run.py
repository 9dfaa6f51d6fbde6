"""Evaluating a network: the sound of a whole split, made and scored by all processes.

    FOLDER/SPLIT_step_N.json          scores, see `results`; SPLIT_step_N_VARIANT of other settings than the run's own
    FOLDER/SPLIT_step_N.clips.jsonl   built-in scores of each sound
    FOLDER/SPLIT_step_N/clips/ID.wav  the sounds, until they are scored (or always, with evaluation.keep_clips)
    FOLDER/SPLIT_step_N/cache/        their features, likewise
    FOLDER/SPLIT_truth/cache/         features of the true sounds, where the recipe names none

A sound is written under another name and renamed, so whatever is there is whole: an evaluation that was killed goes on
with the sounds already made. They belong to the weights and settings whose hash is in `key.json`; with any others the
folder is emptied first.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from mmaudio_hf.config import Recipe
from mmaudio_hf.evaluation.av_bench import AV_BENCH, PublishedScores, av_bench_problem, check_truth
from mmaudio_hf.evaluation.caches import listed
from mmaudio_hf.evaluation.onsets import clip_scores, mean_scores
from mmaudio_hf.evaluation.results import (
    FOLDER,
    FORMAT,
    digest,
    everything,
    read_key,
    read_scores,
    scores_file,
    together,
    write_key,
    write_scores,
)
from mmaudio_hf.evaluation.samples import HeldOutItems, generate_items
from mmaudio_hf.features.encoders import check_encoders, decoder_fingerprint, load_encoders
from mmaudio_hf.generation.pipeline import MMAudioPipeline
from mmaudio_hf.media.audio import read_waveform, write_audio
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import Evaluation, RunError

NOT_FINITE = "a sound that is not finite"
UNREADABLE = "a sound that cannot be read"
REPEATED = "another row of the same id"


def evaluators_of(recipe: Recipe, say: Callable[[str], None]) -> list["SplitEvaluator"]:
    """What the training loop is to run for `recipe.evaluation`.

    `say` is told once, by the first process, when av-benchmark is asked for and cannot be used; the other scores are
    computed all the same. ValueError when a store, a file of the decoder or a folder of true features is missing.
    """
    settings = recipe.evaluation
    wanted = {settings.split: settings.every} if settings.every else {}
    if settings.after_training:
        wanted.setdefault("test", recipe.training.steps)
    problem = av_bench_problem(recipe, say) if wanted else None
    check_truth(recipe, wanted, problem, say)
    return [SplitEvaluator(recipe, split, every=every, av_bench_problem=problem) for split, every in wanted.items()]


class SplitEvaluator:
    """Makes the sound of `data.SPLIT` and scores it, every `every` steps of training or when it is asked to.

    av_bench_problem: what `av_bench_problem` returned. folder: for the results, by default RUN/evaluation.
    label: what the network is called there. variant: what `variant_of` returned.
    ValueError when a store or a file of the decoder is missing.
    """

    long = True

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
        check_encoders(recipe.encoders, recipe.model.mode, ("decode",))
        stores = getattr(recipe.data, split)
        if not stores:
            raise ValueError(f"data.{split} names no store: there is nothing to evaluate")
        self.items = HeldOutItems(stores, recipe.evaluation.items, spread=True)
        self._pipeline: MMAudioPipeline | None = None

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
        """Make, score and write the split with `model`; every process calls it and has the content of the file.

        weights: which these are, as in weights.json. RunError, on every process, when one of them fails.
        """
        state = PartialState()
        path = scores_file(self.folder, self.split, step, self._variant)
        work = path.with_suffix("")
        earlier, missing, truth_key, problem = together(lambda: self._prepare(model, path, work))[0]
        if earlier is not None:
            return earlier | {"run": self.label}
        published = PublishedScores(self.recipe, self.split, self.folder, self.items, truth_key, problem)
        truth = published.truth_wanted()
        try:
            share = missing[state.process_index :: state.num_processes]
            broken = everything(lambda: self._make(model, share, work))
            own = self.items.ids[state.process_index :: state.num_processes]
            scored = everything(lambda: self._score(model, own, work, set(broken), truth))
        finally:
            self._pipeline = None
        clips, dropped = self._sorted(scored)
        scores, lacking = published.scores(list(clips), work)
        content = together(
            lambda: self._write(path, step, weights, clips, dropped, scores, lacking) if state.is_main_process else None
        )[0]
        if state.is_main_process and not self.recipe.evaluation.keep_clips:
            shutil.rmtree(work, ignore_errors=True)
        return content

    # --- what is there already --------------------------------------------------------------------------------------

    def _prepare(self, model: MMAudio, path: Path, work: Path):
        """The scores, if they are there already; ids whose sound is not; what the true ones are made of; and why
        av-benchmark cannot be used.

        Of the first process, which alone changes the folder.
        """
        if not PartialState().is_main_process:
            return None
        made_of = self._made_of()
        truth_key = {name: made_of[name] for name in ("decoder", "stores")}
        clips_key = digest(made_of, network_hash(model))
        self._scores_key = self._key_of_scores(clips_key)
        with suppress(ValueError):  # none, or of another version
            earlier = read_scores(path)
            unreadable = UNREADABLE in {entry["reason"] for entry in earlier["items"]["dropped"]}
            if earlier["key"] == self._scores_key and AV_BENCH not in earlier["not_computed"] and not unreadable:
                return earlier, [], truth_key, self._problem
        _claim(work, clips_key)
        (work / "clips").mkdir(exist_ok=True)
        missing = [item_id for item_id in self.items.ids if not (work / "clips" / f"{item_id}.wav").is_file()]
        return None, missing, truth_key, self._problem

    def _made_of(self) -> dict[str, Any]:
        """Everything besides the weights that a sound depends on."""
        decoder = decoder_fingerprint(self.recipe.encoders, self.recipe.model.mode)
        stores = [_store_hash(Path(store.path)) for store in getattr(self.recipe.data, self.split)]
        return {"settings": self.recipe.generation_settings, "decoder": decoder, "stores": stores}

    def _key_of_scores(self, clips_key: str) -> str:
        settings = self.recipe.evaluation
        truth = getattr(settings.truth, self.split)
        # Caches that were added to a folder allow more scores; the Hub's come with a revision.
        caches = sorted(Path(truth).glob("*.pth")) if truth else ()
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in caches]
        wanted = {"metrics": sorted(settings.metrics), "truth": truth, "files": files}
        return digest(wanted, clips_key, *self.items.ids)

    # --- sounds -----------------------------------------------------------------------------------------------------

    def _made_by(self, model: MMAudio) -> MMAudioPipeline:
        """The pipeline of this evaluation; its decoder is loaded once and held meanwhile only."""
        if self._pipeline is None:
            device, mode = model.latent_mean.device, self.recipe.model.mode
            encoders = load_encoders(self.recipe.encoders, mode, ("decode",), device=device)
            self._pipeline = MMAudioPipeline(model, encoders, precision=self.recipe.generation_settings["precision"])
        return self._pipeline

    def _make(self, model: MMAudio, ids: Sequence[str], work: Path) -> list[str]:
        """Write the sounds of `ids`; return those that are not finite."""
        if not ids:
            return []
        items, broken = (self.items.of(item_id) for item_id in ids), []
        results = generate_items(self._made_by(model), items, self.recipe.sampling, self.recipe.seed)
        for item, result in self._bar(results, len(ids), "sounds"):
            if result.waveform.isfinite().all():
                write_audio(work / "clips" / f"{item.item_id}.wav", result.waveform, result.sample_rate)
            else:
                broken.append(item.item_id)
        return broken

    def _score(
        self, model: MMAudio, ids: Sequence[str], work: Path, broken: set[str], truth: Path | None
    ) -> list[tuple[str, Any]]:
        """(id, built-in scores, or the reason for which there are none) of each of `ids`.

        The true sounds are written to `truth`, where it is given.
        """
        return [
            (item_id, NOT_FINITE if item_id in broken else self._scores_of(model, item_id, work, truth))
            for item_id in self._bar(ids, len(ids), "scores")
        ]

    def _scores_of(self, model: MMAudio, item_id: str, work: Path, truth: Path | None) -> dict[str, float] | str:
        # Scored as it is in the file, so that a sound made before a kill and one made now count alike.
        file = work / "clips" / f"{item_id}.wav"
        try:
            waveform, rate = read_waveform(file)
        except MediaError:
            file.unlink(missing_ok=True)  # the next time it is made anew
            return UNREADABLE
        pipeline = self._made_by(model)
        true = pipeline.decode(self.items.of(item_id).latent.to(pipeline.device))
        if truth is not None:
            truth.mkdir(parents=True, exist_ok=True)
            write_audio(truth / f"{item_id}.wav", true, rate)
        return clip_scores(waveform, true, rate)

    def _bar(self, things, total: int, what: str):
        hidden = not PartialState().is_main_process
        return tqdm(things, f"{self.split}: {what}", total, leave=False, disable=hidden, dynamic_ncols=True)

    def _sorted(self, scored: Sequence[tuple[str, Any]]) -> tuple[dict[str, dict], dict[str, list[str]]]:
        """Scores by id and dropped ids by reason, both in the order of the split."""
        found, dropped = dict(scored), {}
        for item_id in self.items.ids:
            if isinstance(found[item_id], str):
                dropped.setdefault(found[item_id], []).append(item_id)
        return {i: found[i] for i in self.items.ids if not isinstance(found[i], str)}, dropped

    # --- results ----------------------------------------------------------------------------------------------------

    def _write(self, path, step, weights, clips, dropped, published, lacking) -> dict[str, Any]:
        """Write the file of scores and that of each sound's; return the content of the former."""
        reasons = dropped | ({REPEATED: self.items.repeated} if self.items.repeated else {})
        scores = mean_scores(clips, dropped) | published
        content = {
            "format": FORMAT,
            "run": self.label,
            "split": self.split,
            "step": step,
            "weights": dict(weights),
            "settings": self.recipe.generation_settings,
            "truth": getattr(self.recipe.evaluation.truth, self.split) or "true latents, decoded",
            "items": {"listed": len(self.items.ids), "scored": len(clips), "dropped": listed(reasons)},
            "scores": {name: score.to_json() for name, score in scores.items()},
            "not_computed": lacking,
            "key": self._scores_key,
        }
        lines = [json.dumps({"id": item_id, **found}) + "\n" for item_id, found in clips.items()]
        clips_file = path.with_suffix(".clips.jsonl")
        partial = clips_file.with_name(f".{clips_file.name}.partial")
        partial.write_text("".join(lines))
        partial.replace(clips_file)
        write_scores(path, content)
        return content


def variant_of(recipe: Recipe, own: Recipe, split: str, weights: Mapping[str, Any] | None = None) -> str:
    """Short hash of what `recipe` changes of a run's `own` way to make the sound of a split; "" for nothing.

    weights: what weights.json says of weights that are none of the run's checkpoints.
    """
    theirs, found = (
        {
            "settings": each.generation_settings,
            "items": each.evaluation.items,
            "stores": [str(Path(store.path).resolve()) for store in getattr(each.data, split)],
        }
        for each in (own, recipe)
    )
    return "" if found == theirs and weights is None else digest({**found, "weights": weights})[:8]


def network_hash(network: torch.nn.Module) -> str:
    """SHA-256 of every tensor of a network."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _store_hash(path: Path) -> str:
    """Of the manifest, which has checksums of the columns; of a store without one, of its list and file sizes."""
    manifest, table = (path.with_name(f"{path.name}{ending}") for ending in (".manifest.json", ".tsv"))
    if manifest.is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.iterdir())]
    return hashlib.sha256(table.read_bytes() + repr(sizes).encode()).hexdigest()


def _claim(folder: Path, key: str) -> None:
    """Make `folder` one of `key`: what is in it for another one goes."""
    if folder.exists() and read_key(folder) != key:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_key(folder, key)
