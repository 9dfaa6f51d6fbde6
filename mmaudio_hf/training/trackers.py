"""TensorBoard, wandb and trackio through accelerate: which are there, and sound for those that play it."""

import importlib.util
import tempfile
import wave
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator

from mmaudio_hf.schema import Sound


def check_trackers(trackers: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not installed: accelerate would leave it out without a word."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"training.trackers names {name}, which is not installed: run `pip install {name}`")


def log_sounds(accelerator: Accelerator, kind: str, sounds: Sequence[Sound], step: int) -> None:
    """Give every tracker of the main process the sounds, as "KIND/NAME"."""
    if not (sounds and accelerator.is_main_process):
        return
    for tracker in accelerator.trackers:
        log = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "trackio": _to_trackio}[tracker.name]
        log(tracker.tracker, kind, sounds, step)


def _to_tensorboard(writer, kind: str, sounds: Sequence[Sound], step: int) -> None:
    for sound in sounds:
        writer.add_audio(f"{kind}/{sound.name}", sound.waveform[None], step, sample_rate=sound.sample_rate)
    writer.flush()


def _to_wandb(run, kind: str, sounds: Sequence[Sound], step: int) -> None:
    import wandb

    _log_files(run, wandb.Audio, kind, sounds, step)


def _to_trackio(run, kind: str, sounds: Sequence[Sound], step: int) -> None:
    import trackio

    _log_files(run, trackio.Audio, kind, sounds, step)


def _log_files(run, player: Callable, kind: str, sounds: Sequence[Sound], step: int) -> None:
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
