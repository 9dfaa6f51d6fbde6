"""TensorBoard, wandb and trackio through accelerate: which are there, and sound for those that play it."""

import importlib.util
from collections.abc import Sequence

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

    players = {
        f"{kind}/{s.name}": wandb.Audio(s.waveform.numpy(), sample_rate=s.sample_rate, caption=s.caption)
        for s in sounds
    }
    run.log(players, step=step)


def _to_trackio(run, kind: str, sounds: Sequence[Sound], step: int) -> None:
    import trackio

    players = {
        # Whole numbers stay as they are; trackio makes every sound of floats as loud as can be.
        f"{kind}/{s.name}": trackio.Audio(
            (s.waveform.clamp(-1, 1) * 32767).short().numpy(), sample_rate=s.sample_rate, caption=s.caption
        )
        for s in sounds
    }
    run.log(players, step=step)
