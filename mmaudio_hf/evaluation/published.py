"""The published scores of a split: features by av-benchmark, extracted by all processes, and those of the true sounds.

FOLDER/SPLIT_truth/cache/  features of the true sounds, where the recipe names none in evaluation.truth
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download

from mmaudio_hf.config import Recipe
from mmaudio_hf.evaluation.av_bench import SYNCHFORMER_FILE, AvBench, feature_files, merge_caches
from mmaudio_hf.evaluation.caches import Score, score_caches
from mmaudio_hf.evaluation.items import HeldOutItems
from mmaudio_hf.evaluation.processes import digest, together
from mmaudio_hf.evaluation.results import read_key, write_key
from mmaudio_hf.schema import SYNC_TOKENS_PER_SEGMENT, RunError, split_hub_id

AV_BENCH = "av-benchmark"  # in `not_computed`
NO_FEATURES = "av-benchmark gave no features"

# Files of the ground truth that some families of scores compare sounds with.
_TRUTH_FILES = {
    "ib": ("imagebind_video.pth",),
    "desync": ("synchformer_video.pth",),
    "clap": ("clap_laion_text.pth", "clap_ms_text.pth"),
}


def av_bench_problem(recipe: Recipe, say: Callable[[str], None]) -> str | None:
    """Why the scores of av-benchmark that `recipe` asks for cannot be had; None when they can, or none are wanted.

    The first process finds out and tells `say`.
    """
    if not recipe.evaluation.metrics or int(os.environ.get("RANK", "0")):
        return None
    problem = AvBench.of(recipe).problem()
    if problem:
        say(f"evaluation.metrics are left out, the other scores are computed: {problem}")
    return problem


def check_truth(recipe: Recipe, splits: Iterable[str], problem: str | None, say: Callable[[str], None]) -> None:
    """See that the features `evaluation.truth` names for `splits` are there, and fetch those of the Hub.

    The first process does it, before anything is made. problem: why av-benchmark cannot be used; nothing is fetched
    then. ValueError for what is neither a folder of caches nor a place on the Hub; that the Hub does not give them is
    told to `say`, and it is asked again when scores are computed.
    """
    if not recipe.evaluation.metrics or int(os.environ.get("RANK", "0")):
        return
    for split in splits:
        source, on_hub = getattr(recipe.evaluation.truth, split), False
        if not source:
            continue
        try:
            on_hub = hub_truth(source) is not None
            if not (on_hub and problem):
                truth_caches(source)
        except ValueError as error:
            if not on_hub:
                raise ValueError(f"evaluation.truth.{split}: {error}") from error
            say(f"evaluation.truth.{split}: {error}")


class PublishedScores:
    """What `evaluation.metrics` asks for, of one split.

    truth_key: what the true sounds are made of. problem: why av-benchmark cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        split: str,
        folder: Path,
        items: HeldOutItems,
        truth_key: Mapping[str, Any],
        problem: str | None,
    ):
        self.recipe, self.split, self.items, self.problem = recipe, split, items, problem
        self.metrics, self.source = recipe.evaluation.metrics, getattr(recipe.evaluation.truth, split)
        self.folder = folder / f"{split}_truth"
        self.av_bench = AvBench.of(recipe)
        self._key = digest(truth_key, *items.ids)

    def truth_wanted(self) -> Path | None:
        """Folder for the true sounds, where av-benchmark is to hear them; None where it need not.

        Called on every process; the first one looks.
        """
        if not self.metrics or self.problem or self.source:
            return None
        return self._on_main(lambda: None if read_key(self.folder) == self._key else self.folder / "clips")

    def scores(self, ids: Sequence[str], work: Path) -> tuple[dict[str, Score], dict[str, str]]:
        """The scores of the sounds `work`/clips/ID.wav, {} but on the first process; and what is missing, and why.

        Called on every process. A library that fails costs its scores and no more.
        """
        if not self.metrics:
            return {}, {}
        try:
            return self._scores(ids, work)
        except RunError as error:
            if PartialState().is_main_process and str(error) != self.problem:  # which was told before
                print(f"warning: evaluation.metrics of {self.split} are left out ({error})", file=sys.stderr)
            return {}, {AV_BENCH: str(error)}

    def _scores(self, ids: Sequence[str], work: Path) -> tuple[dict[str, Score], dict[str, str]]:
        if self.problem is not None:
            raise RunError(self.problem)
        if not ids:
            raise RunError("there is no sound to hear")
        hear = self.truth_wanted()
        truth, families, lacking = self._on_main(self._truth)
        if not families:
            return {}, lacking
        if hear is not None:
            self._extract(hear, truth, ids)
            self._on_main(lambda: self._keep_truth(ids))
        silent = self._extract(work / "clips", work / "cache", ids, families)
        return self._on_main(lambda: self._compare(truth, work / "cache", families, silent)), lacking

    @staticmethod
    def _on_main(function: Callable[[], Any]) -> Any:
        """What the first process made of `function`, on every process."""
        return together(lambda: function() if PartialState().is_main_process else None)[0]

    def _truth(self) -> tuple[Path, list[str], dict[str, str]]:
        """Folder of the ground truth's features, families of scores that it allows, and why it does not others."""
        folder = truth_caches(self.source) if self.source else self.folder / "cache"
        there = {path.name for path in folder.glob("*.pth")} if self.source else self._from_stores()
        lacking = {}
        for family, files in _TRUTH_FILES.items():
            absent = [name for name in files if name not in there]
            if family in self.metrics and absent:
                where, key = self.source or "the stores", f"evaluation.truth.{self.split}"
                lacking[family] = f"{where} has no {', '.join(absent)}: name caches with it in {key}"
        return folder, [family for family in self.metrics if family not in lacking], lacking

    def _from_stores(self) -> set[str]:
        """Caches that the stores give: their sync features are Synchformer's, unless they are toy ones."""
        ends = (self.items[0], self.items[len(self.items) - 1])
        real = self.recipe.encoders.kind == "released"
        return {"synchformer_video.pth"} if real and any(i.request.sync_features is not None for i in ends) else set()

    def _keep_truth(self, ids: Sequence[str]) -> None:
        """Note whose true sounds have features now, add those of the stores, and drop the sounds."""
        if self._from_stores():
            features = {i: self.items.of(i).request.sync_features for i in ids}
            shape = (-1, SYNC_TOKENS_PER_SEGMENT)
            cache = {i: tokens.unflatten(0, shape) for i, tokens in features.items() if tokens is not None}
            torch.save(cache, self.folder / "cache" / "synchformer_video.pth")
        shutil.rmtree(self.folder / "clips")
        if list(ids) == self.items.ids:
            write_key(self.folder, self._key)

    def _extract(self, clips: Path, cache: Path, ids: Sequence[str], families: Sequence[str] = ()) -> list[str]:
        """Have each process extract the features of its share of `clips`, put them together in `cache`.

        Returns the ids that got none. RunError, on every process, when one fails.
        """
        state, parts = PartialState(), cache.with_name("parts")
        kinds = {"video": bool({"ib", "desync"} & set(families)), "clap": "clap" in families}
        self._on_main(lambda: shutil.rmtree(parts, ignore_errors=True))
        share = ids[state.process_index :: state.num_processes]
        together(lambda: self._extract_share(clips, parts / str(state.process_index), share, kinds) if share else None)
        files = feature_files(**kinds)
        silent = self._on_main(lambda: merge_caches(sorted(parts.glob("*/cache")), cache, files, ids))
        self._on_main(lambda: shutil.rmtree(parts, ignore_errors=True))
        return silent

    def _extract_share(self, clips: Path, part: Path, ids: Sequence[str], kinds: Mapping[str, bool]) -> None:
        """Extract the features of some clips to `part`/cache. The extractor takes whole folders, so links make one."""
        (part / "audio").mkdir(parents=True)
        for item_id in ids:
            (part / "audio" / f"{item_id}.wav").symlink_to((clips / f"{item_id}.wav").resolve())
        duration, device = self.recipe.model.duration, PartialState().device
        self.av_bench.extract(part / "audio", part / "cache", duration=duration, device=device, **kinds)

    def _compare(self, truth: Path, cache: Path, families: Sequence[str], silent: Sequence[str]) -> dict[str, Score]:
        sync_weights = self.av_bench.weights_dir / SYNCHFORMER_FILE if "desync" in families else None
        device = PartialState().device
        found = score_caches(truth, cache, sync_weights=sync_weights, device=device, families=families)
        more = {NO_FEATURES: list(silent)} if silent else {}
        return {name: replace(score, dropped={**score.dropped, **more}) for name, score in found.items()}


def hub_truth(source: str) -> tuple[str, str | None, str] | None:
    """Data set, revision (None: the newest) and folder in it that `source` names on the Hub; None for a folder here.

    ValueError when it is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return None
    if folder.is_absolute() or source.startswith((".", "~")) or "/" not in source or Path(folder.parts[0]).is_dir():
        raise ValueError(f"{source} is neither a folder nor a data set on the Hub (owner/name/folder)")
    owner, name, *inside = source.strip("/").split("/")
    return *split_hub_id(f"{owner}/{name}"), "/".join(inside)


def truth_caches(source: str) -> Path:
    """Folder of caches: `source` itself, or fetched from the data set OWNER/NAME[@REVISION][/FOLDER] on the Hub.

    ValueError when there are none.
    """
    folder, on_hub = Path(source), hub_truth(source)
    if on_hub is not None:
        repo, revision, below = on_hub
        pattern = f"{below}/*.pth" if below else "*.pth"
        try:
            fetched = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[pattern])
        except (OSError, ValueError) as error:
            raise ValueError(f"{source} is no folder here, and cannot be fetched from the Hub: {error}") from error
        folder = Path(fetched) / below
    if not any(folder.glob("*.pth")):
        raise ValueError(f"{source} holds no cached features (*.pth)")
    return folder
