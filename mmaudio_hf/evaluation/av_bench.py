"""The published scores of a split: features from av-benchmark (https://github.com/hkchengrex/av-benchmark), compared.

av-benchmark runs here or in an environment of its own: it needs an older transformers than this package does.
"""

import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download

from mmaudio_hf.config import Recipe
from mmaudio_hf.evaluation import av_bench_job
from mmaudio_hf.evaluation.metrics import FILES, METRICS, TRUTH_FILES, Score, score_caches
from mmaudio_hf.evaluation.results import digest, gather_results, on_main, read_key, write_key
from mmaudio_hf.evaluation.samples import HeldOutItems
from mmaudio_hf.files import read_json, replacing, write_text
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.video import sparse_frames
from mmaudio_hf.schema import SYNC_TOKENS_PER_SEGMENT, RunError, split_hub_id
from mmaudio_hf.weights import CLAP_FILE

SYNCHFORMER_FILE = "synchformer_state_dict.pth"
SET_UP = "`mmaudio-hf weights av-bench --env av-bench-env`"
INSTALL = f"{SET_UP}, then set evaluation.av_bench_python=av-bench-env/bin/python"
# setuptools 81 has no pkg_resources, which ImageBind imports; torchaudio 2.9 reads no WAV file without torchcodec and
# FFmpeg; transformers 5 has lost functions that Synchformer imports.
REQUIREMENTS = (
    *("setuptools<81", "torch<2.9", "torchaudio<2.9", "torchvision<0.24", "transformers<5"),
    "av_bench @ git+https://github.com/hkchengrex/av-benchmark",
)
_LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LINES_SHOWN = 3  # of what it printed last
_PRINTED = "; it printed last: "
_LOG_BYTES = 4_000_000
_REPEATS = 10_000  # lines that were printed before, without a new one: av-benchmark's readers retry without end
FRAME_PERIOD = 2.0  # s between the frames that ImageBind sees


class JobError(RunError):
    """A job failed; `kind` is "import", "audio" or "": what it could not do."""

    def __init__(self, text: str, kind: str = ""):
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class AvBench:
    """Where av-benchmark is, and its settings."""

    python: str  # interpreter; "": that of this process
    weights_dir: Path  # holds CLAP_FILE and SYNCHFORMER_FILE
    batch_size: int = 32
    stall_minutes: float = 10.0  # without anything new in what it prints, after which it is ended

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "AvBench":
        """As `recipe.evaluation` says."""
        settings = recipe.evaluation
        folder = Path(settings.av_bench_weights or recipe.encoders.weights_dir)
        return cls(settings.av_bench_python, folder, settings.av_bench_batch_size, settings.av_bench_stall_minutes)

    def problem(self) -> str | None:
        """Why it cannot be used, with the way out; None when it can.

        Imports it and reads an audio file with it, which takes some seconds.
        """
        if self.python and not (Path(self.python).is_file() and os.access(self.python, os.X_OK)):
            return f"evaluation.av_bench_python {self.python} is not a program: install av-benchmark by {INSTALL}"
        try:
            self.run({"action": "check"}, None)
        except JobError as error:
            if error.kind == "import":
                return f"av-benchmark cannot be imported ({error}): install it by {INSTALL}"
            if error.kind == "audio":
                return f"av-benchmark cannot read audio files ({error}): install 'torch<2.9' and 'torchaudio<2.9' there"
            reason = str(error).partition(_PRINTED)[0]
            return f"av-benchmark is installed, but needs the network once ({reason}): fetch what it loads by {SET_UP}"
        except RunError as error:
            return f"av-benchmark cannot be imported ({error}): install it by {INSTALL}"
        missing = [name for name in (SYNCHFORMER_FILE, CLAP_FILE) if not (self.weights_dir / name).is_file()]
        if missing:
            command = f"`mmaudio-hf weights download {' '.join(missing)} --dir {self.weights_dir}`"
            return f"av-benchmark needs {' and '.join(missing)} in {self.weights_dir}: fetch with {command}"
        return None

    def extract(
        self, audio_dir: Path, cache_dir: Path, *, duration: float, device: torch.device, **kinds: bool
    ) -> dict[str, str]:
        """Write the caches of every file in `audio_dir` to `cache_dir`; return those that were not written, and why.

        kinds: video, clap, aesthetics, for features of ImageBind and Synchformer, of CLAP, of Audiobox aesthetics too.
        What an earlier, killed call wrote stays.
        RunError, with the last lines that it printed, when it fails or dies as a whole.
        """
        job: dict[str, Any] = {"action": "extract", "audio_path": str(audio_dir.resolve())}
        job |= {"skip_video_related": not kinds["video"], "skip_clap": not kinds["clap"]}
        job["aesthetics"] = kinds.get("aesthetics", False)
        failed, otherwise = {}, "av-benchmark ended without an error, but did not write it"
        before = set(cache_dir.glob("*.pth"))
        try:
            failed = self.features(job, cache_dir, duration, device)
        except RunError as error:
            if before == set(cache_dir.glob("*.pth")):
                raise
            otherwise = str(error)  # it died after some of them
        missing = [name for name in feature_files(**kinds) if not (cache_dir / name).is_file()]
        return {name: failed.get(name, otherwise) for name in missing}

    def features(self, job: dict[str, Any], cache_dir: Path, duration: float, device: torch.device) -> dict[str, str]:
        """Run a job that writes caches; returns the files that it could not write, and why."""
        cuda = device.type == "cuda"
        job |= {
            "output_path": str(cache_dir.resolve()),
            "audio_length": duration,
            "batch_size": self.batch_size,
            "num_workers": min(4, len(os.sched_getaffinity(0))) if cuda else 0,
            "device": "cuda" if cuda else "cpu",
            "clap": str((self.weights_dir / CLAP_FILE).resolve()),
            "synchformer": str((self.weights_dir / SYNCHFORMER_FILE).resolve()),
        }
        cache_dir.mkdir(parents=True, exist_ok=True)
        return self.run(job, device, cache_dir.with_name(f"{cache_dir.name}.log")).get("failed", {})

    def run(self, job: dict[str, Any], device: torch.device | None, log: Path | None = None) -> dict[str, Any]:
        """Do a job of `av_bench_job` in a process of its own; its output goes to `log`. RunError when it fails."""
        with tempfile.TemporaryDirectory() as scratch:
            job_file, result_file = Path(scratch) / "job.json", Path(scratch) / "result.json"
            job_file.write_text(json.dumps(job | {"parent": os.getpid()}))
            words = [self.python or sys.executable, av_bench_job.__file__, str(job_file), str(result_file)]
            how, last = _watched(words, _environment(device, not self.python), log, self.stall_minutes)
            result = read_json(result_file) or {"error": f"its process {how} without a result"}
        if "error" in result:
            raise JobError(result["error"] + (_PRINTED + " | ".join(last) if last else ""), result.get("kind", ""))
        return result["ok"]


def set_up(env: Path, weights_dir: Path, log: Callable[[str], None] = print) -> list[str]:
    """Make an environment for av-benchmark, let one process fetch what its networks load, and extract one second.

    What is there already is kept. Returns what does not work, and why; ValueError where it cannot be installed.
    """
    python = env / "bin" / "python"
    commands = [] if python.is_file() else [[sys.executable, "-m", "venv", str(env)]]
    for words in (*commands, [str(python), "-m", "pip", "install", *REQUIREMENTS]):
        log(shlex.join(words))
        if subprocess.run(words).returncode:
            raise ValueError(f"`{shlex.join(words)}` failed: what it printed says why; run this again afterwards")
    if not shutil.which("wget"):
        log("warning: wget is not on the PATH: av-benchmark fetches PANNs with it")
    bench = AvBench(str(python), weights_dir, batch_size=2)
    if problem := bench.problem():
        return [problem]
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "audio").mkdir()
        for number in range(2):
            noise = torch.rand(16000, generator=torch.Generator().manual_seed(number)) - 0.5
            write_audio(Path(scratch) / "audio" / f"{number}.wav", noise, 16000)
        log("fetching weights, and extracting one second")
        cache, kinds = Path(scratch) / "cache", {"video": True, "clap": True}
        failed = bench.extract(Path(scratch) / "audio", cache, duration=1.0, device=torch.device("cpu"), **kinds)
        for name in feature_files(**kinds):
            log(f"{name}: {failed.get(name, 'ok')}")
    return [f"{name}: {reason}" for name, reason in failed.items()]


def feature_files(video: bool, clap: bool, aesthetics: bool = False) -> list[str]:
    """Names of the files that extraction writes."""
    enabled = {"ib": video, "desync": video, "clap": clap, "aesthetics": aesthetics}
    return list(dict.fromkeys(FILES[name] for name, (family, *_) in METRICS.items() if enabled.get(family, True)))


def _truth_files(family: str) -> list[str]:
    """Caches of video or text that a family of scores is computed with."""
    return [TRUTH_FILES[FILES[name]] for name, (kind, *_) in METRICS.items() if kind == family]


def _environment(device: torch.device | None, same: bool) -> dict[str, str]:
    """Variables without those of a launcher, and of this environment unless it is the `same`; one GPU is visible."""
    kept = {name: value for name, value in os.environ.items() if name not in (*_LAUNCHER, "PYTHONPATH", "PYTHONHOME")}
    if same:
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if device is None or device.type != "cuda":
        return kept | {"CUDA_VISIBLE_DEVICES": ""}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    index = device.index or 0
    return kept | {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}


def _watched(words: list[str], env: dict[str, str], log: Path | None, minutes: float) -> tuple[str, list[str]]:
    """Run a program with nothing to read on its stdin; return how it ended, and the last lines it printed.

    What it prints goes to `log`, every line once, so that a loop of errors does not fill the disk. It is ended with its
    children when nothing new is printed for `minutes`, or the same lines again and again.
    """
    pipe, pipes = subprocess.PIPE, {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    try:  # a session of its own: a Ctrl-C in the terminal reaches this process alone, which ends the other
        process = subprocess.Popen(words, stdout=pipe, env=env, start_new_session=True, **pipes)  # type: ignore
    except OSError as error:  # as a text file without a shebang
        raise RunError(f"{words[0]} cannot be run: {error.strerror or error}") from error
    seen: set[int] = set()
    last: deque[bytes] = deque(maxlen=_LINES_SHOWN)
    rest, repeats, done, stalled, progress = b"", 0, False, "", time.monotonic()
    try:
        with process.stdout as output, open(log or os.devnull, "wb") as file:
            while not (done or stalled):
                if select.select([output], [], [], 0.2)[0]:
                    data = os.read(output.fileno(), 1 << 16)
                    done = not data
                else:
                    data, done = b"", process.poll() is not None
                # Progress bars end with \r; the last line may have no end.
                *lines, rest = (rest + (b"\n" if done else data)).replace(b"\r", b"\n").split(b"\n")
                for line in filter(None, map(bytes.strip, lines)):
                    last.append(line)
                    repeats += 1
                    if hash(line) not in seen:
                        seen.add(hash(line))
                        repeats, progress = 0, time.monotonic()
                        file.write(line + b"\n" if file.tell() < _LOG_BYTES else b"")
                file.flush()
                if repeats > _REPEATS:
                    stalled = "printed the same lines again and again"
                elif time.monotonic() - progress > 60 * minutes:
                    stalled = f"made no progress for {minutes:g} minutes"
        if not stalled:
            with suppress(subprocess.TimeoutExpired):  # one that closes its output and stays is ended
                process.wait(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    ended = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
    shown = ["".join(c for c in line.decode(errors="replace") if c.isprintable())[:200] for line in last]
    return f"was ended, since it {stalled}," if stalled else ended, shown


def merge_caches(
    folders: Sequence[Path], into: Path, files: Collection[str], ids: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Merge the caches of several folders, in the order of `ids`.

    Returns the ids that each file lacks, and the files that could not be merged, with the reason.
    """
    into.mkdir(parents=True, exist_ok=True)
    lacking: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    for name in files:
        features: dict[str, Any] = {}
        try:
            for folder in folders:
                features |= torch.load(folder / name, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can break the reader anywhere
            failed[name] = f"{folder / name}, which av-benchmark wrote, cannot be read: {error}"
            continue
        lacking[name] = [item_id for item_id in ids if item_id not in features]
        with replacing(into / name) as incomplete:
            torch.save({item_id: features[item_id] for item_id in ids if item_id in features}, incomplete)
    return lacking, failed


# --- The published scores of a split ----------------------------------------------------------------------------------


AV_BENCH = "av-benchmark"  # in `not_computed`
NO_FEATURES = "av-benchmark gave no features"


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
        if not {"fd", "kl", "is", "kad"} & set(self.metrics) or self.problem or self.source:
            return None
        return on_main(lambda: None if read_key(self.folder) == self._key else self.folder / "clips")

    def scores(self, ids: Sequence[str], work: Path) -> tuple[dict[str, Score], dict[str, str]]:
        """The scores of `work`/clips/ID.wav, and what is missing, and why.

        A library that fails costs its scores and no more.
        """
        if not self.metrics:
            return {}, {}
        try:
            scores, lacking = self._scores(ids, work)
        except RunError as error:
            scores, lacking = {}, {AV_BENCH: str(error)}
        known = lacking == {AV_BENCH: self.problem}  # logged before
        if PartialState().is_main_process and lacking and not known:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in lacking.items() if name != AV_BENCH)
            what = "evaluation.metrics" if AV_BENCH in lacking else ", ".join(lacking)
            print(f"warning: {what} of {self.split} are left out ({lacking.get(AV_BENCH, reasons)})", file=sys.stderr)
        return scores, lacking

    def _scores(self, ids: Sequence[str], work: Path) -> tuple[dict[str, Score], dict[str, str]]:
        if self.problem is not None:
            raise RunError(self.problem)
        if not ids:
            raise RunError("there is no audio to score")
        true_clips = self.truth_dir()
        truth = on_main(lambda: truth_caches(self.source)) if self.source else self.folder / "cache"
        failed = self._truth_of_stores(truth, true_clips, ids) if not self.source else {}
        families, lacking = on_main(lambda: self._families(truth, failed))
        if not families:
            return {}, lacking
        kinds = {"video": bool({"ib", "desync"} & set(families))}
        kinds |= {kind: kind in families for kind in ("clap", "aesthetics")}
        extract = partial(self._extract, work / "clips", kinds)
        cache, files = work / "cache", feature_files(**kinds)
        missing, broken = _extract_shared(cache, ids, files, read_key(work) or "", extract)
        scores, not_computed = on_main(lambda: self._compare(truth, cache, families, missing, failed | broken))
        return scores, lacking | not_computed

    def _families(self, truth: Path, failed: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """Families of scores that the truth allows, and why it does not others."""
        lacking: dict[str, str] = {}
        for family in ("ib", "desync", "clap"):
            absent = [name for name in _truth_files(family) if not (truth / name).is_file()]
            if family in self.metrics and absent:
                where, key = self.source or "what the stores give", f"evaluation.truth.{self.split}"
                why = "".join(f" ({failed[name]})" for name in absent[:1] if name in failed)
                ways = f"name caches with it in {key}" + (", or videos in evaluation.videos" if family == "ib" else "")
                lacking[family] = f"{where} has no {', '.join(absent)}{why}: {ways}"
        return [family for family in self.metrics if family not in lacking], lacking

    def _truth_of_stores(self, truth: Path, clips: Path | None, ids: Sequence[str]) -> dict[str, str]:
        """Write the features of the true audio, where `clips` are there, and of what the stores and videos give.

        Returns the files that could not be written, and why.
        """
        failed: dict[str, str] = {}
        audio_alone = {"video": False, "clap": False}
        if clips is not None:
            extract = partial(self._extract, clips, audio_alone)
            failed = _extract_shared(truth, ids, feature_files(**audio_alone), self._key, extract)[1]
        complete = clips is not None and not failed
        videos, text = self.recipe.evaluation.videos, self._extract_text
        if "clap" in self.metrics:
            failed |= _extract_shared(truth, ids, _truth_files("clap"), f"text {self._key}", text)[1]
        if "ib" in self.metrics and videos:
            key = f"video {videos} {self._key}"
            failed |= _extract_shared(truth, ids, _truth_files("ib"), key, self._extract_video)[1]
        on_main(lambda: self._complete_truth(truth, ids, complete))
        return failed

    def _complete_truth(self, truth: Path, ids: Sequence[str], complete: bool) -> None:
        """Add the sync features of the stores; record whose true audio has features now, and delete the audio."""
        if "desync" in self.metrics and self.recipe.encoders.kind != "toy":  # whose are not Synchformer's
            features = {i: self.items.of(i).request.sync_features for i in ids}
            shape = (-1, SYNC_TOKENS_PER_SEGMENT)
            cache = {i: tokens.unflatten(0, shape) for i, tokens in features.items() if tokens is not None}
            if cache:
                truth.mkdir(parents=True, exist_ok=True)
                torch.save(cache, truth / "synchformer_video.pth")
        if complete:
            shutil.rmtree(self.folder / "clips")
            if list(ids) == self.items.ids:
                write_key(self.folder, self._key)

    def _extract(self, clips: Path, kinds: Mapping[str, bool], share: Path, ids: Sequence[str]) -> dict[str, str]:
        """Extract the features of some clips to `share`/cache. The extractor takes whole folders, so links make one."""
        shutil.rmtree(share / "audio", ignore_errors=True)
        (share / "audio").mkdir(parents=True)
        for item_id in ids:
            (share / "audio" / f"{item_id}.wav").symlink_to((clips / f"{item_id}.wav").resolve())
        duration, device = self.recipe.model.duration, PartialState().device
        return self.av_bench.extract(share / "audio", share / "cache", duration=duration, device=device, **kinds)

    def _extract_text(self, share: Path, ids: Sequence[str]) -> dict[str, str]:
        """CLAP features of the captions of some items."""
        share.mkdir(parents=True, exist_ok=True)
        (share / "captions.json").write_text(json.dumps({i: self.items.of(i).caption for i in ids}))
        return self._condition({"action": "text", "captions": str(share.resolve() / "captions.json")}, share, "clap")

    def _extract_video(self, share: Path, ids: Sequence[str]) -> dict[str, str]:
        """ImageBind features of the videos of some items; a video that is missing or cannot be read is left out."""
        (share / "frames").mkdir(parents=True, exist_ok=True)
        count = int(self.recipe.model.duration / FRAME_PERIOD)
        for item_id in ids:
            path = Path(self.recipe.evaluation.videos) / f"{item_id}.mp4"
            try:
                torch.save(sparse_frames(path, FRAME_PERIOD, count), share / "frames" / f"{item_id}.pt")
            except MediaError as error:
                print(f"warning: {error}", file=sys.stderr)
        return self._condition({"action": "video", "frames": str(share.resolve() / "frames")}, share, "ib")

    def _condition(self, job: dict[str, Any], share: Path, family: str) -> dict[str, str]:
        try:
            return self.av_bench.features(job, share / "cache", self.recipe.model.duration, PartialState().device)
        except RunError as error:  # costs these scores alone
            return dict.fromkeys(_truth_files(family), str(error))

    def _compare(
        self,
        truth: Path,
        cache: Path,
        families: Sequence[str],
        missing: Mapping[str, Sequence[str]],
        failed: Mapping[str, str],
    ) -> tuple[dict[str, Score], dict[str, str]]:
        """Scores, with the clips that have no features among the dropped ones, and what could not be computed."""
        sync_weights = self.av_bench.weights_dir / SYNCHFORMER_FILE if "desync" in families else None
        options: Any = {"sync_weights": sync_weights, "device": PartialState().device, "families": families}
        truth = cache if set(families) == {"aesthetics"} else truth  # which needs none
        try:
            scores = score_caches(truth, cache, **options)
        except ValueError as error:
            raise RunError(f"{error}{''.join(f'; {name}: {why}' for name, why in failed.items())}") from error
        for name, score in scores.items():
            if lost := missing.get(FILES[name]):
                scores[name] = replace(score, dropped={**score.dropped, NO_FEATURES: list(lost)})
        return dict(scores), {name: failed.get(FILES[name], why) for name, why in scores.not_computed.items()}


def _extract_shared(
    cache: Path, ids: Sequence[str], files: Sequence[str], key: str, extract: Callable[[Path, Sequence[str]], dict]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Let each process `extract` (folder, ids) its share of `ids`, and merge them in `cache`.

    What was written for the same `key` and ids is used again: an evaluation that was killed continues.
    Returns ids without features, and failures, by file.
    """
    state, key = PartialState(), digest({"key": key, "files": list(files)}, *ids)
    folder = cache.with_name(f"shares_{key[:8]}")
    record = cache / f"{folder.name}.json"
    if known := on_main(lambda: read_json(record)):
        return known, {}
    mine = ids[state.process_index :: state.num_processes]
    share = folder / f"{state.process_index}_of_{state.num_processes}"
    outcomes = gather_results(lambda: extract(share, mine) if mine else {})
    failed = {name: why for outcome in outcomes for name, why in outcome.items()}

    def merge() -> tuple[dict[str, list[str]], dict[str, str]]:
        for name in failed:  # of an earlier evaluation
            (cache / name).unlink(missing_ok=True)
        folders = sorted(folder.glob(f"*_of_{state.num_processes}/cache"))
        missing, damaged = merge_caches(folders, cache, [name for name in files if name not in failed], ids)
        if not failed | damaged:
            write_text(record, json.dumps(missing))
        shutil.rmtree(folder, ignore_errors=True)
        return missing, failed | damaged

    return on_main(merge)


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
