"""What a run costs while it runs: speed, waiting for data, use of the device, memory, time left."""

import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from mmaudio_hf.config import Recipe
from mmaudio_hf.models.flops import training_flops

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
