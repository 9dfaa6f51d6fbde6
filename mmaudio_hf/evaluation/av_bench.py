"""The published scores of a split: features from av-benchmark (https://github.com/hkchengrex/av-benchmark), compared.

av-benchmark runs here or in an environment of its own: it needs an older transformers than this package does.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download

from mmaudio_hf.config import Recipe
from mmaudio_hf.evaluation import av_bench_job
from mmaudio_hf.evaluation.metrics import Score, score_caches
from mmaudio_hf.evaluation.results import digest, gather_results, on_main, read_key, write_key
from mmaudio_hf.evaluation.samples import HeldOutItems
from mmaudio_hf.schema import SYNC_TOKENS_PER_SEGMENT, RunError, split_hub_id

CLAP_FILE = "music_speech_audioset_epoch_15_esc_89.98.pt"
SYNCHFORMER_FILE = "synchformer_state_dict.pth"
INSTALL = (
    "`git clone https://github.com/hkchengrex/av-benchmark && python -m venv av-bench-env &&"
    " av-bench-env/bin/pip install ./av-benchmark 'transformers<5'`, then set"
    " evaluation.av_bench_python=av-bench-env/bin/python"
)
_LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LINES_SHOWN = 3  # of what it printed last

# Caches of features of audio, by the metrics that read them.
_BASE_FILES = ("pann_features.pth", "vggish_features.pth", "passt_features_embed.pth", "passt_logits.pth")
_VIDEO_FILES = ("imagebind_audio.pth", "synchformer_audio.pth")
_CLAP_FILES = ("clap_laion_audio.pth", "clap_ms_audio.pth")


@dataclass(frozen=True)
class AvBench:
    """Where av-benchmark is, and its settings."""

    python: str  # interpreter; "": this process
    weights_dir: Path  # holds CLAP_FILE and SYNCHFORMER_FILE
    batch_size: int = 32

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "AvBench":
        """As `recipe.evaluation` says."""
        settings = recipe.evaluation
        return cls(settings.av_bench_python, Path(recipe.encoders.weights_dir), settings.av_bench_batch_size)

    def problem(self) -> str | None:
        """Why it cannot be used, with the way out; None when it can. Imports it, which takes some seconds."""
        if self.python and not (Path(self.python).is_file() and os.access(self.python, os.X_OK)):
            return f"evaluation.av_bench_python {self.python} is not a program: install av-benchmark by {INSTALL}"
        try:
            self._run({"action": "check"}, None)
        except RunError as error:
            return f"av-benchmark cannot be imported ({error}): install it by {INSTALL}"
        missing = [name for name in (SYNCHFORMER_FILE, CLAP_FILE) if not (self.weights_dir / name).is_file()]
        if missing:
            command = f"`mmaudio-hf weights download {' '.join(missing)} --dir {self.weights_dir}`"
            return f"av-benchmark needs {' and '.join(missing)} in {self.weights_dir}: fetch with {command}"
        return None

    def extract(
        self,
        audio_dir: Path,
        cache_dir: Path,
        *,
        duration: float,
        device: torch.device,
        video: bool,
        clap: bool,
    ) -> None:
        """Write the caches of every file in `audio_dir` to `cache_dir`.

        video, clap: also features of ImageBind and Synchformer, and of CLAP. RunError, with the last lines that it
        printed, when it fails, dies or does not write a file.
        """
        cuda = device.type == "cuda"
        job = {
            "action": "extract",
            "audio_path": str(audio_dir.resolve()),
            "output_path": str(cache_dir.resolve()),
            "audio_length": duration,
            "batch_size": self.batch_size,
            "num_workers": min(4, len(os.sched_getaffinity(0))) if cuda else 0,
            "device": (str(device) if not self.python else "cuda") if cuda else "cpu",
            "skip_video_related": not video,
            "skip_clap": not clap,
            "clap": str((self.weights_dir / CLAP_FILE).resolve()),
            "synchformer": str((self.weights_dir / SYNCHFORMER_FILE).resolve()),
        }
        cache_dir.mkdir(parents=True, exist_ok=True)
        self._run(job, device, cache_dir.with_name(f"{cache_dir.name}.log"))
        missing = [name for name in feature_files(video, clap) if not (cache_dir / name).is_file()]
        if missing:
            raise RunError(f"av-benchmark ended without an error, but wrote no {', '.join(missing)}")

    def _run(self, job: dict[str, Any], device: torch.device | None, log: Path | None = None) -> None:
        if self.python:
            _run_in_environment(self.python, job, device, log)
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):
                av_bench_job.run(job)
        except (Exception, SystemExit) as error:  # whatever its libraries raise
            raise RunError(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}") from error


def feature_files(video: bool, clap: bool) -> list[str]:
    """Names of the files that extraction writes."""
    return [*_BASE_FILES, *(_VIDEO_FILES if video else ()), *(_CLAP_FILES if clap else ())]


def _run_in_environment(python: str, job: dict[str, Any], device: torch.device | None, log: Path | None) -> None:
    """Run the job with another interpreter; its output goes to `log`. RunError when it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        job_file, result_file = Path(scratch) / "job.json", Path(scratch) / "result.json"
        job_file.write_text(json.dumps(job | {"parent": os.getpid()}))
        log = log or Path(scratch) / "log"
        with open(log, "wb") as output:
            # A session of its own: a Ctrl-C in the terminal reaches this process alone, which ends the other.
            try:
                ended = subprocess.run(
                    [python, av_bench_job.__file__, str(job_file), str(result_file)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_environment(device),
                    start_new_session=True,
                )
            except OSError as error:  # as a text file without a shebang
                raise RunError(f"{python} cannot be run: {error.strerror or error}") from error
        try:
            result = json.loads(result_file.read_text())
        except (OSError, ValueError):
            how = f"by signal {-ended.returncode}" if ended.returncode < 0 else f"with code {ended.returncode}"
            result = {"error": f"its process ended {how} without a result"}
        if "error" in result:
            raise RunError(f"{result['error']}{_last_lines(log)}")


def _environment(device: torch.device | None) -> dict[str, str]:
    """Variables without those of a launcher and of this environment; only the GPU of this process is visible."""
    kept = {name: value for name, value in os.environ.items() if name not in (*_LAUNCHER, "PYTHONPATH", "PYTHONHOME")}
    if device is None or device.type != "cuda":
        return kept | {"CUDA_VISIBLE_DEVICES": ""}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    index = device.index or 0
    return kept | {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_bytes()[-4000:].decode(errors="replace").splitlines() if line.strip()]
    printable = ["".join(c for c in line if c.isprintable())[:200] for line in lines[-_LINES_SHOWN:]]
    return f"; it printed last: {' | '.join(printable)}" if printable else ""


def merge_caches(folders: Sequence[Path], into: Path, files: Collection[str], ids: Sequence[str]) -> list[str]:
    """Merge the caches of several folders, in the order of `ids`; return the ids that any file lacks.

    RunError for a file that cannot be read.
    """
    into.mkdir(parents=True, exist_ok=True)
    lacking: set[str] = set()
    for name in files:
        features: dict[str, Any] = {}
        for folder in folders:
            try:
                features |= torch.load(folder / name, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file can break the reader anywhere
                raise RunError(f"{folder / name}, which av-benchmark wrote, cannot be read: {error}") from error
        lacking |= set(ids) - set(features)
        partial = into / f"{name}.partial"
        torch.save({item_id: features[item_id] for item_id in ids if item_id in features}, partial)
        partial.replace(into / name)
    return sorted(lacking)


# --- The published scores of a split ----------------------------------------------------------------------------------


AV_BENCH = "av-benchmark"  # in `not_computed`
NO_FEATURES = "av-benchmark gave no features"

# Caches of the ground truth that some families of scores need.
_TRUTH_FILES = {
    "ib": ("imagebind_video.pth",),
    "desync": ("synchformer_video.pth",),
    "clap": ("clap_laion_text.pth", "clap_ms_text.pth"),
}


def av_bench_problem(recipe: Recipe, log: Callable[[str], None]) -> str | None:
    """Why av-benchmark cannot compute `evaluation.metrics`; None when it can, or none are requested.

    The first process checks and logs it, before the process group exists.
    """
    if not recipe.evaluation.metrics or int(os.environ.get("RANK", "0")):
        return None
    problem = AvBench.from_recipe(recipe).problem()
    if problem:
        log(f"evaluation.metrics are left out, the other scores are computed: {problem}")
    return problem


def check_truth(recipe: Recipe, splits: Iterable[str], problem: str | None, log: Callable[[str], None]) -> None:
    """Check that the features `evaluation.truth` names for `splits` exist, and download those on the Hub.

    The first process does it, before anything is generated. problem: why av-benchmark cannot be used; nothing is
    downloaded then. ValueError for what is neither a folder of caches nor a dataset on the Hub; an unreachable Hub is
    logged, and asked again when scores are computed.
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
            log(f"evaluation.truth.{split}: {error}")


class PublishedScores:
    """What `evaluation.metrics` requests for one split; every method is called on every process.

    truth_key: hash inputs of the true audio. problem: why av-benchmark cannot be used.
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
        self.av_bench = AvBench.from_recipe(recipe)
        self._key = digest(truth_key, *items.ids)

    def truth_dir(self) -> Path | None:
        """Folder for the true audio if av-benchmark needs it; None if not: its features are cached, or given."""
        if not self.metrics or self.problem or self.source:
            return None
        return on_main(lambda: None if read_key(self.folder) == self._key else self.folder / "clips")

    def scores(self, ids: Sequence[str], work: Path) -> tuple[dict[str, Score], dict[str, str]]:
        """The scores of `work`/clips/ID.wav, and what is missing, and why.

        A library that fails costs its scores and no more.
        """
        if not self.metrics:
            return {}, {}
        try:
            return self._scores(ids, work)
        except RunError as error:
            if PartialState().is_main_process and str(error) != self.problem:  # which was logged before
                print(f"warning: evaluation.metrics of {self.split} are left out ({error})", file=sys.stderr)
            return {}, {AV_BENCH: str(error)}

    def _scores(self, ids: Sequence[str], work: Path) -> tuple[dict[str, Score], dict[str, str]]:
        if self.problem is not None:
            raise RunError(self.problem)
        if not ids:
            raise RunError("there is no audio to score")
        true_clips = self.truth_dir()
        truth, families, lacking = on_main(self._truth)
        if not families:
            return {}, lacking
        if true_clips is not None:
            self._extract(true_clips, truth, ids)
            on_main(lambda: self._complete_truth(ids))
        missing = self._extract(work / "clips", work / "cache", ids, families)
        return on_main(lambda: self._compare(truth, work / "cache", families, missing)), lacking

    def _truth(self) -> tuple[Path, list[str], dict[str, str]]:
        """Folder of the ground truth's features, families of scores that it allows, and why it does not others."""
        folder = truth_caches(self.source) if self.source else self.folder / "cache"
        names = {path.name for path in folder.glob("*.pth")} if self.source else self._caches_of_stores()
        lacking: dict[str, str] = {}
        for family, files in _TRUTH_FILES.items():
            absent = [name for name in files if name not in names]
            if family in self.metrics and absent:
                where, key = self.source or "the stores", f"evaluation.truth.{self.split}"
                lacking[family] = f"{where} has no {', '.join(absent)}: name caches with it in {key}"
        return folder, [family for family in self.metrics if family not in lacking], lacking

    def _caches_of_stores(self) -> set[str]:
        """Caches that the stores provide: their sync features are Synchformer's, unless they are toy ones."""
        if self.recipe.encoders.kind == "toy":
            return set()
        ends = (self.items[0], self.items[len(self.items) - 1])
        return {"synchformer_video.pth"} if any(i.request.sync_features is not None for i in ends) else set()

    def _complete_truth(self, ids: Sequence[str]) -> None:
        """Record whose true audio has features now, add those of the stores, and delete the audio."""
        if self._caches_of_stores():
            features = {i: self.items.of(i).request.sync_features for i in ids}
            shape = (-1, SYNC_TOKENS_PER_SEGMENT)
            cache = {i: tokens.unflatten(0, shape) for i, tokens in features.items() if tokens is not None}
            torch.save(cache, self.folder / "cache" / "synchformer_video.pth")
        shutil.rmtree(self.folder / "clips")
        if list(ids) == self.items.ids:
            write_key(self.folder, self._key)

    def _extract(self, clips: Path, cache: Path, ids: Sequence[str], families: Sequence[str] = ()) -> list[str]:
        """Let each process extract the features of its share of `clips`, and merge them in `cache`.

        Returns the ids that got none. RunError, on every process, when one fails.
        """
        state, shares = PartialState(), cache.with_name("parts")
        kinds = {"video": bool({"ib", "desync"} & set(families)), "clap": "clap" in families}
        on_main(lambda: shutil.rmtree(shares, ignore_errors=True))
        mine, share = ids[state.process_index :: state.num_processes], shares / str(state.process_index)
        gather_results(lambda: self._extract_share(clips, share, mine, kinds) if mine else None)
        files = feature_files(**kinds)
        missing = on_main(lambda: merge_caches(sorted(shares.glob("*/cache")), cache, files, ids))
        on_main(lambda: shutil.rmtree(shares, ignore_errors=True))
        return missing

    def _extract_share(self, clips: Path, share: Path, ids: Sequence[str], kinds: Mapping[str, bool]) -> None:
        """Extract the features of some clips to `share`/cache. The extractor takes whole folders, so links make one."""
        (share / "audio").mkdir(parents=True)
        for item_id in ids:
            (share / "audio" / f"{item_id}.wav").symlink_to((clips / f"{item_id}.wav").resolve())
        duration, device = self.recipe.model.duration, PartialState().device
        self.av_bench.extract(share / "audio", share / "cache", duration=duration, device=device, **kinds)

    def _compare(self, truth: Path, cache: Path, families: Sequence[str], missing: Sequence[str]) -> dict[str, Score]:
        sync_weights = self.av_bench.weights_dir / SYNCHFORMER_FILE if "desync" in families else None
        device = PartialState().device
        scores = score_caches(truth, cache, sync_weights=sync_weights, device=device, families=families)
        more = {NO_FEATURES: list(missing)} if missing else {}
        return {name: replace(score, dropped={**score.dropped, **more}) for name, score in scores.items()}


def hub_truth(source: str) -> tuple[str, str | None, str] | None:
    """Dataset, revision (None: the newest) and folder in it that `source` names on the Hub; None for a local folder.

    ValueError when it is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return None
    if folder.is_absolute() or source.startswith((".", "~")) or "/" not in source or Path(folder.parts[0]).is_dir():
        raise ValueError(f"{source} is neither a folder nor a dataset on the Hub (owner/name/folder)")
    owner, name, *inside = source.strip("/").split("/")
    return *split_hub_id(f"{owner}/{name}"), "/".join(inside)


def truth_caches(source: str) -> Path:
    """Folder of caches: `source`, or downloaded from the dataset OWNER/NAME[@REVISION][/FOLDER]; ValueError without."""
    folder, on_hub = Path(source), hub_truth(source)
    if on_hub is not None:
        repo, revision, below = on_hub
        pattern = f"{below}/*.pth" if below else "*.pth"
        try:
            fetched = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[pattern])
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{source} is not a folder here and cannot be fetched from the Hub: {reason}") from error
        folder = Path(fetched) / below
    if not any(folder.glob("*.pth")):
        raise ValueError(f"{source} holds no cached features (*.pth)")
    return folder
