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
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download

from mmaudio_hf.config import Recipe
from mmaudio_hf.evaluation import av_bench_job
from mmaudio_hf.evaluation.metrics import AESTHETICS, FILES, Score, score_caches
from mmaudio_hf.evaluation.results import digest, gather_results, on_main, read_key, write_key
from mmaudio_hf.evaluation.samples import HeldOutItems
from mmaudio_hf.files import write_text
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

# Caches of features of audio, by the metrics that read them.
_BASE_FILES = ("pann_features.pth", "vggish_features.pth", "passt_features_embed.pth", "passt_logits.pth")
_VIDEO_FILES = ("imagebind_audio.pth", "synchformer_audio.pth")
_CLAP_FILES = ("clap_laion_audio.pth", "clap_ms_audio.pth")
_TEXT_TRUTH, _VIDEO_TRUTH = ("clap_laion_text.pth", "clap_ms_text.pth"), ("imagebind_video.pth",)
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
        self,
        audio_dir: Path,
        cache_dir: Path,
        *,
        duration: float,
        device: torch.device,
        video: bool,
        clap: bool,
        aesthetics: bool = False,
    ) -> dict[str, str]:
        """Write the caches of every file in `audio_dir` to `cache_dir`; return those that were not written, and why.

        video, clap, aesthetics: also features of ImageBind and Synchformer, of CLAP, of Audiobox aesthetics. What an
        earlier, killed call wrote stays.
        RunError, with the last lines that it printed, when it fails or dies as a whole.
        """
        job = {"action": "extract", "audio_path": str(audio_dir.resolve())}
        kinds = {"skip_video_related": not video, "skip_clap": not clap, "aesthetics": aesthetics}
        failed, otherwise = {}, "av-benchmark ended without an error, but did not write it"
        before = set(cache_dir.glob("*.pth"))
        try:
            failed = self.features(job | kinds, cache_dir, duration, device)
        except RunError as error:
            if before == set(cache_dir.glob("*.pth")):
                raise
            otherwise = str(error)  # it died after some of them
        missing = [name for name in feature_files(video, clap, aesthetics) if not (cache_dir / name).is_file()]
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
            try:
                result = json.loads(result_file.read_text())
            except (OSError, ValueError):
                result = {"error": f"its process {how} without a result"}
        if "error" in result:
            raise JobError(f"{result['error']}{_last_lines(last)}", result.get("kind", ""))
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
            raise ValueError(
                f"`{shlex.join(words)}` failed: what it printed says why; run this command again afterwards"
            )
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
    more = [*(_VIDEO_FILES if video else ()), *(_CLAP_FILES if clap else ())]
    return [*_BASE_FILES, *more, *([AESTHETICS] if aesthetics else ())]


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


def _watched(words: list[str], env: dict[str, str], log: Path | None, minutes: float) -> tuple[str, list[bytes]]:
    """Run a program with nothing to read on its stdin; return how it ended, and the last lines it printed.

    It is ended with its children when nothing new is printed for `minutes`, or the same lines again and again.
    """
    try:
        # A session of its own: a Ctrl-C in the terminal reaches this process alone, which ends the other.
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    except OSError as error:  # as a text file without a shebang
        raise RunError(f"{words[0]} cannot be run: {error.strerror or error}") from error
    output = _Output(log)
    try:
        with process.stdout as pipe:  # type: ignore[union-attr]  # it is a pipe, as asked
            stalled = _follow(process, pipe.fileno(), output, minutes)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        output.close()
    ended = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"was ended, since it {stalled}," if stalled else ended, list(output.last)


class _Output:
    """What a program prints, to a file: every line once, so that a loop of errors does not fill the disk."""

    def __init__(self, log: Path | None):
        self._file = open(log or os.devnull, "wb")  # noqa: SIM115  # closed by `close`
        self._seen: set[int] = set()
        self._rest, self.repeats, self._size = b"", 0, 0
        self.last: deque[bytes] = deque(maxlen=_LINES_SHOWN)

    def add(self, data: bytes) -> bool:
        """Whether there is a line among them that is new."""
        *lines, self._rest = (self._rest + data.replace(b"\r", b"\n")).split(b"\n")  # progress bars end with \r
        new = False
        for line in filter(None, map(bytes.strip, lines)):
            self.last.append(line)
            if hash(line) in self._seen:
                self.repeats += 1
                continue
            self._seen.add(hash(line))
            new, self.repeats = True, 0
            if self._size < _LOG_BYTES:
                self._file.write(line + b"\n")
                self._size += len(line) + 1
        self._file.flush()
        return new

    def close(self) -> None:
        self.add(b"\n")
        self._file.close()


def _follow(process: subprocess.Popen, pipe: int, output: _Output, minutes: float) -> str:
    """Read what a process prints until it ends, or until it makes no progress: why, then."""
    progress = time.monotonic()
    while True:
        readable, _, _ = select.select([pipe], [], [], 0.2)
        if readable:
            data = os.read(pipe, 1 << 16)
            if not data:
                with suppress(subprocess.TimeoutExpired):  # one that closes its output and stays is ended
                    process.wait(timeout=60)
                return ""
            if output.add(data):
                progress = time.monotonic()
        elif process.poll() is not None:
            return ""
        if output.repeats > _REPEATS:
            return "printed the same lines again and again"
        if time.monotonic() - progress > 60 * minutes:
            return f"made no progress for {minutes:g} minutes"


def _last_lines(lines: Sequence[bytes]) -> str:
    shown = ["".join(c for c in line.decode(errors="replace") if c.isprintable())[:200] for line in lines]
    return _PRINTED + " | ".join(shown) if shown else ""


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
        partial = into / f"{name}.partial"
        torch.save({item_id: features[item_id] for item_id in ids if item_id in features}, partial)
        partial.replace(into / name)
    return lacking, failed


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
        kinds = {"video": bool({"ib", "desync"} & set(families)), "clap": "clap" in families}
        kinds["aesthetics"] = "aesthetics" in families
        shares = _Shares(work / "cache", ids, feature_files(**kinds), read_key(work) or "")
        missing, broken = shares.make(lambda share, mine: self._extract(work / "clips", share, mine, kinds))
        scores, not_computed = on_main(lambda: self._compare(truth, work / "cache", families, missing, failed | broken))
        return scores, lacking | not_computed

    def _families(self, truth: Path, failed: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """Families of scores that the truth allows, and why it does not others."""
        names = {path.name for path in truth.glob("*.pth")}
        lacking: dict[str, str] = {}
        for family, files in _TRUTH_FILES.items():
            absent = [name for name in files if name not in names]
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
            shares = _Shares(truth, ids, feature_files(**audio_alone), self._key)
            _, failed = shares.make(lambda share, mine: self._extract(clips, share, mine, audio_alone))
        complete = clips is not None and not failed
        if "clap" in self.metrics:
            shares = _Shares(truth, ids, _TEXT_TRUTH, f"text {self._key}")
            failed |= shares.make(self._extract_text)[1]
        if "ib" in self.metrics and (videos := self.recipe.evaluation.videos):
            shares = _Shares(truth, ids, _VIDEO_TRUTH, f"video {videos} {self._key}")
            failed |= shares.make(self._extract_video)[1]
        on_main(lambda: self._complete_truth(truth, ids, complete))
        return failed

    def _complete_truth(self, truth: Path, ids: Sequence[str], complete: bool) -> None:
        """Add the sync features of the stores; record whose true audio has features now, and delete the audio.

        Sync features of stores are Synchformer's, unless they are toy ones.
        """
        if "desync" in self.metrics and self.recipe.encoders.kind != "toy":
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

    def _extract(self, clips: Path, share: Path, ids: Sequence[str], kinds: Mapping[str, bool]) -> dict[str, str]:
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
        return self._condition(
            {"action": "text", "captions": str(share.resolve() / "captions.json")}, share, _TEXT_TRUTH
        )

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
        return self._condition({"action": "video", "frames": str(share.resolve() / "frames")}, share, _VIDEO_TRUTH)

    def _condition(self, job: dict[str, Any], share: Path, files: Sequence[str]) -> dict[str, str]:
        try:
            return self.av_bench.features(job, share / "cache", self.recipe.model.duration, PartialState().device)
        except RunError as error:  # costs these scores alone
            return dict.fromkeys(files, str(error))

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
        device = PartialState().device
        truth = cache if set(families) == {"aesthetics"} else truth  # which needs none
        try:
            scores = score_caches(truth, cache, sync_weights=sync_weights, device=device, families=families)
        except ValueError as error:
            raise RunError(f"{error}{''.join(f'; {name}: {why}' for name, why in failed.items())}") from error
        for name, score in scores.items():
            if lost := missing.get(FILES[name]):
                scores[name] = replace(score, dropped={**score.dropped, NO_FEATURES: list(lost)})
        return dict(scores), {name: failed.get(FILES[name], why) for name, why in scores.not_computed.items()}


class _Shares:
    """Caches that all processes make together: each those of its share of `ids`, which are then merged in `cache`.

    What was written for the same `key` and ids is used again: an evaluation that was killed continues.
    """

    def __init__(self, cache: Path, ids: Sequence[str], files: Sequence[str], key: str):
        self.cache, self.ids, self.files = cache, ids, files
        self.key = digest({"key": key, "files": list(files)}, *ids)
        self.folder = cache.with_name(f"shares_{self.key[:8]}")

    def make(
        self, extract: Callable[[Path, Sequence[str]], dict[str, str]]
    ) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Let each process `extract` (folder, ids) its share. Returns ids without features, and failures, by file."""
        state, record = PartialState(), self.cache / f"{self.folder.name}.json"
        if known := on_main(lambda: _read_json(record) if record.is_file() else None):
            return known, {}
        mine = self.ids[state.process_index :: state.num_processes]
        share = self.folder / f"{state.process_index}_of_{state.num_processes}"
        outcomes = gather_results(lambda: extract(share, mine) if mine else {})
        failed = {name: why for outcome in outcomes for name, why in outcome.items()}
        return on_main(lambda: self._merge(record, failed))

    def _merge(self, record: Path, failed: dict[str, str]) -> tuple[dict[str, list[str]], dict[str, str]]:
        folders = sorted(self.folder.glob(f"*_of_{PartialState().num_processes}/cache"))
        rest = [name for name in self.files if name not in failed]
        for name in failed:  # of an earlier evaluation
            (self.cache / name).unlink(missing_ok=True)
        missing, damaged = merge_caches(folders, self.cache, rest, self.ids)
        failed |= damaged
        if not failed:
            write_text(record, json.dumps(missing))
        shutil.rmtree(self.folder, ignore_errors=True)
        return missing, failed


def _read_json(path: Path) -> Any:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


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
