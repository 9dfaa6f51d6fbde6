"""av-benchmark as the extractor of features (https://github.com/hkchengrex/av-benchmark), here or in an environment
of its own: it needs an older transformers than this package does.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmaudio_hf.config import Recipe
from mmaudio_hf.evaluation import av_bench_job
from mmaudio_hf.schema import RunError

CLAP_FILE = "music_speech_audioset_epoch_15_esc_89.98.pt"
SYNCHFORMER_FILE = "synchformer_state_dict.pth"
INSTALL = (
    "`git clone https://github.com/hkchengrex/av-benchmark && python -m venv av-bench-env &&"
    " av-bench-env/bin/pip install ./av-benchmark 'transformers<5'`, then set"
    " evaluation.av_bench_python=av-bench-env/bin/python"
)
_LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LINES_SHOWN = 3  # of what it printed last

# Files that it writes of sounds, by the metrics that read them.
_BASE_FILES = ("pann_features.pth", "vggish_features.pth", "passt_features_embed.pth", "passt_logits.pth")
_VIDEO_FILES = ("imagebind_audio.pth", "synchformer_audio.pth")
_CLAP_FILES = ("clap_laion_audio.pth", "clap_ms_audio.pth")


@dataclass(frozen=True)
class AvBench:
    """Where av-benchmark is, and how it is to work."""

    python: str  # interpreter; "": this process
    weights_dir: Path  # holds CLAP_FILE and SYNCHFORMER_FILE
    batch_size: int = 32

    @classmethod
    def of(cls, recipe: Recipe) -> "AvBench":
        """As `recipe.evaluation` says."""
        settings = recipe.evaluation
        return cls(settings.av_bench_python, Path(recipe.encoders.weights_dir), settings.av_bench_batch_size)

    def problem(self) -> str | None:
        """Why it cannot be used, with the way out; None when it can. Imports it, which takes some seconds."""
        if self.python and not (Path(self.python).is_file() and os.access(self.python, os.X_OK)):
            return f"evaluation.av_bench_python {self.python} is no program: install av-benchmark by {INSTALL}"
        try:
            self._do({"action": "check"}, None)
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
        """Write the caches of every sound in `audio_dir` to `cache_dir`.

        video, clap: also what ImageBind and Synchformer, and CLAP, say of them. RunError, with the last lines that it
        printed, when it fails, dies or leaves a file out.
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
        self._do(job, device, cache_dir.with_name(f"{cache_dir.name}.log"))
        missing = [name for name in feature_files(video, clap) if not (cache_dir / name).is_file()]
        if missing:
            raise RunError(f"av-benchmark ended without an error, but wrote no {', '.join(missing)}")

    def _do(self, job: dict[str, Any], device: torch.device | None, log: Path | None = None) -> None:
        if self.python:
            _run_elsewhere(self.python, job, device, log)
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):
                av_bench_job.run(job)
        except (Exception, SystemExit) as error:  # whatever its libraries raise
            raise RunError(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}") from error


def feature_files(video: bool, clap: bool) -> list[str]:
    """Names of the files that extraction writes."""
    return [*_BASE_FILES, *(_VIDEO_FILES if video else ()), *(_CLAP_FILES if clap else ())]


def _run_elsewhere(python: str, job: dict[str, Any], device: torch.device | None, log: Path | None) -> None:
    """Run the job by another interpreter; what it prints goes to `log`. RunError when it fails."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        job_file, result_file = Path(scratch) / "job.json", Path(scratch) / "result.json"
        job_file.write_text(json.dumps(job | {"parent": os.getpid()}))
        log = log or Path(scratch) / "log"
        with open(log, "wb") as output:
            # A session of its own: a Ctrl-C in the terminal is for this process, which ends the other if it must.
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
                raise RunError(f"{python} cannot be run: {error.strerror}") from error
        try:
            result = json.loads(result_file.read_text())
        except (OSError, ValueError):
            how = f"by signal {-ended.returncode}" if ended.returncode < 0 else f"with code {ended.returncode}"
            result = {"error": f"its process ended {how} without a result"}
        if "error" in result:
            raise RunError(f"{result['error']}{_last_lines(log)}")


def _environment(device: torch.device | None) -> dict[str, str]:
    """Variables without those of a launcher and of this environment; only the GPU of this process is to be seen."""
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


def merge_caches(parts: Sequence[Path], into: Path, files: Collection[str], ids: Sequence[str]) -> list[str]:
    """Put the caches of several folders together, in the order of `ids`; return the ids that any file lacks.

    RunError for a file that cannot be read.
    """
    into.mkdir(parents=True, exist_ok=True)
    lacking: set[str] = set()
    for name in files:
        found: dict[str, Any] = {}
        for part in parts:
            try:
                found |= torch.load(part / name, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file can break the reader anywhere
                raise RunError(f"{part / name}, which av-benchmark wrote, cannot be read: {error}") from error
        lacking |= set(ids) - set(found)
        partial = into / f"{name}.partial"
        torch.save({item_id: found[item_id] for item_id in ids if item_id in found}, partial)
        partial.replace(into / name)
    return sorted(lacking)
