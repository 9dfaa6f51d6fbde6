"""Log files of JSON lines that outlive a full disk and a killed run."""

import importlib.util
import json
import os
import re
import tempfile
import time
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from mmaudio_hf.config import Recipe
from mmaudio_hf.schema import AudioSample
from mmaudio_hf.training.memory import training_flops


class JsonLines:
    """A log file to which lines are added. While they cannot be written they wait in memory; `warn` is told once."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path, self.warn = path, warn
        self._waiting: list[dict] = []
        self._warned = False

    def append(self, entry: dict) -> None:
        """Add one line, and those that wait."""
        self._waiting.append(entry)
        try:
            self.flush()
        except OSError as error:
            if not self._warned:
                self.warn(f"{error}; its lines wait in memory")
            self._warned = True

    @property
    def waiting(self) -> bool:
        """Whether there are lines that could not be written yet."""
        return bool(self._waiting)

    def flush(self) -> None:
        """Write what waits. OSError naming the file when that fails; the file then ends where it did before."""
        if not self._waiting:
            return
        text = "".join(json.dumps(entry) + "\n" for entry in self._waiting)
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if file.write(text.encode()) < len(text.encode()):
                    file.truncate(end)
                    raise OSError("the disk is full")
        except OSError as error:
            raise OSError(f"{self.path} could not be written ({error})") from error
        self._waiting, self._warned = [], False


def truncate_lines(path: Path, keep: Callable[[dict], bool]) -> list[dict]:
    """Drop the lines of a log that a killed run wrote after its last checkpoint; return the others."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break  # a line cut short by the kill
        if keep(entry):
            kept.append(entry)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    partial.replace(path)
    return kept


# --- What a run costs while it runs: speed, waiting for data, use of the device, memory, time left -------------------


# Part of the device's name -> dense bf16 FLOP/s with float32 sums, from the makers' data sheets. First match counts.
PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250": 181e12,  # of one of its two dies, which is what a process has
}
_MEASURED_SIZE = {"cpu": 512, "cuda": 4096}
_MEASURING_SECONDS = 0.2


class Peak(NamedTuple):
    """Most FLOP/s that one device can do, and how that is known."""

    flops_per_second: float
    measured: bool


def device_peak(device: torch.device, mixed_precision: str) -> Peak:
    """From the table for bf16 on a known GPU; or else the best of a few square matrix products, timed for 0.2 s."""
    if device.type == "cuda" and mixed_precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for part, rate in PEAK_BF16.items():
            if part.replace(" ", "") in name.replace(" ", "").replace("-", ""):
                return Peak(rate, False)
    size = _MEASURED_SIZE.get(device.type, 1024)
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < _MEASURING_SECONDS:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number waits for the device
        best = min(best, time.perf_counter() - started)
    return Peak(2.0 * size**3 / best, True)


class Progress:
    """Counts steps, and every now and then says what they cost; means and maxima are over all processes."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, first_step: int):
        self.peak = device_peak(accelerator.device, recipe.training.mixed_precision)
        self._accelerator, self._training = accelerator, recipe.training
        self._flops = training_flops(recipe.model)
        self._first_step, self._began = first_step, time.perf_counter()
        self.steps, self.seconds = 0, 0.0  # since the start, without validation, saving and the like
        self._told = (0, 0.0)

    def add(self, seconds: float) -> None:
        """Note one step that took `seconds`."""
        self.steps += 1
        self.seconds += seconds

    @property
    def steps_per_second(self) -> float:
        """Since the start."""
        return self.steps / max(self.seconds, 1e-9)

    def figures(self, step: int, wait_seconds: float) -> dict[str, float]:
        """What the steps since the last call cost, `step` being done; every process calls it.

        wait_seconds: how long this process waited for data meanwhile.
        """
        steps, seconds = self.steps - self._told[0], max(self.seconds - self._told[1], 1e-9)
        self._told = self.steps, self.seconds
        own = [seconds, wait_seconds / seconds, self.peak.flops_per_second, peak_memory_gb(self._accelerator.device)]
        seconds, wait, peak, memory = self._accelerator.gather(
            torch.tensor([own], dtype=torch.float64, device=self._accelerator.device)
        ).T
        samples = steps / seconds.mean().item() * self._training.batch_size
        elapsed = time.perf_counter() - self._began
        return {
            "speed/steps_per_second": samples / self._training.batch_size,
            "speed/samples_per_second": samples,
            "speed/data_wait": wait.mean().item(),
            "speed/model_flop_utilisation": samples * self._flops / peak.sum().item(),
            "speed/peak_memory_gb": memory.max().item(),
            "speed/seconds_left": elapsed / (step - self._first_step) * (self._training.steps - step),
        }


def in_short(figures: dict[str, float]) -> dict[str, str]:
    """The figures as they stand in the progress line, which has the time left on its own."""
    return {
        "samples/s": f"{figures['speed/samples_per_second']:.3g}",
        "wait": f"{figures['speed/data_wait']:.0%}",
        "mfu": f"{figures['speed/model_flop_utilisation']:.0%}",
        "mem": f"{figures['speed/peak_memory_gb']:.1f}G",
    }


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held: on the accelerator, or resident on the host when there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Not getrusage, which counts what the program that started this one held.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def check_trackers(trackers: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not installed: accelerate would leave it out without a word."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"training.trackers names {name}, which is not installed: run `pip install {name}`")


def log_audio(accelerator: Accelerator, kind: str, sounds: Sequence[AudioSample], step: int) -> None:
    """Give every tracker of the main process the sounds, as "KIND/NAME"."""
    if not (sounds and accelerator.is_main_process):
        return
    for tracker in accelerator.trackers:
        log = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "trackio": _to_trackio}[tracker.name]
        log(tracker.tracker, kind, sounds, step)


def _to_tensorboard(writer, kind: str, sounds: Sequence[AudioSample], step: int) -> None:
    for sound in sounds:
        writer.add_audio(f"{kind}/{sound.name}", sound.waveform[None], step, sample_rate=sound.sample_rate)
    writer.flush()


def _to_wandb(run, kind: str, sounds: Sequence[AudioSample], step: int) -> None:
    import wandb

    _log_files(run, wandb.Audio, kind, sounds, step)


def _to_trackio(run, kind: str, sounds: Sequence[AudioSample], step: int) -> None:
    import trackio

    _log_files(run, trackio.Audio, kind, sounds, step)


def _log_files(run, player: Callable, kind: str, sounds: Sequence[AudioSample], step: int) -> None:
    """Both take arrays too, but wandb needs another package for them, and trackio makes each as loud as can be."""
    with tempfile.TemporaryDirectory() as folder:
        players = {}
        for number, sound in enumerate(sounds):
            path = str(Path(folder) / f"{number}.wav")
            with wave.open(path, "wb") as file:
                file.setparams((1, 2, sound.sample_rate, 0, "NONE", ""))
                file.writeframes((sound.waveform.clamp(-1, 1) * 32767).short().numpy().tobytes())
            players[f"{kind}/{sound.name}"] = player(path, caption=sound.caption)
        run.log(players, step=step)  # copies the files
