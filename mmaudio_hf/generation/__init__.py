"""Generation of audio from video, images and text: what is requested, how it is checked, and the results."""

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import wave
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmaudio_hf.config import EncoderConfig, load_recipe
from mmaudio_hf.features.encoders import check_encoders, encoder_files
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.mux import VIDEO_FORMATS, write_video_with_audio
from mmaudio_hf.media.video import ALIGNMENTS, check_frames
from mmaudio_hf.models.pretrained import ENCODERS_FILE
from mmaudio_hf.schema import MODES, SequenceLengths

RECIPE_FILE = "config.yaml"  # of a run folder
SOLVERS = ("euler", "adaptive")
# Features take 0.2 MB and conditions up to 0.6 MB for a second of audio: an hour needs about 3 GB.
MAX_SECONDS = 3600.0
MAX_STEPS = 10_000
SEEDS = (-(2**63), 2**64 - 1)  # as torch.manual_seed has them
# Weights stay float32; this is the precision in which torch.autocast computes.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Frame = np.ndarray | torch.Tensor | Image.Image
Media = str | os.PathLike | Frame | Sequence[Frame]
"""A file, or frames: (frames, height, width, 3) or (frames, 3, height, width), uint8 or floats in [0, 1], or a list of
frames, also of PIL images; an image has no first axis"""


@dataclass(frozen=True)
class Request:
    """One audio to generate. For what is not given, the model uses its learned empty features.

    Features, as in a row of a feature store, replace `video`, `image` and the two prompts, and need no encoder.
    """

    key: str = ""  # the noise depends on it and the seed alone; empty: the index in the list
    video: Media | None = None
    image: Media | None = None  # a still image, seen all the time; it has no sync features
    prompt: str = ""
    negative_prompt: str = ""  # what the audio should not be like
    duration: float | None = None  # s, in place of that of the call
    seed: int | None = None  # in place of that of the call
    clip_features: torch.Tensor | None = None  # (T, 1024)
    sync_features: torch.Tensor | None = None  # (S, 768)
    text_features: torch.Tensor | None = None  # (77, 1024)
    negative_text_features: torch.Tensor | None = None  # (77, 1024)
    frame_rate: float | None = None  # Hz, of a `video` that is given as frames

    def __post_init__(self) -> None:
        """Frames become one array; ValueError for those of a list that differ in size or kind."""
        if isinstance(self.image, Image.Image):
            object.__setattr__(self, "image", _array(self.image))
        if is_frames(self.video):
            listed: Any = self.video
            frames = [_array(frame) for frame in listed]
            if len(kinds := {(tuple(frame.shape), frame.dtype) for frame in frames}) > 1:
                raise ValueError(f"video: its frames have different shapes or kinds: {sorted(map(str, kinds))[:2]}")
            object.__setattr__(self, "video", torch.stack(frames))

    @property
    def components(self) -> set[str]:
        """The encoders and decoders it needs."""
        visual = self.video is not None or self.image is not None
        texts = ((self.prompt, self.text_features), (self.negative_prompt, self.negative_text_features))
        needed = {
            "decode": True,
            "clip": visual and self.clip_features is None,
            "sync": self.video is not None and self.sync_features is None,
            "text": any(text and features is None for text, features in texts),
        }
        return {name for name, is_needed in needed.items() if is_needed}

    @property
    def file(self) -> str | os.PathLike | None:
        """The file of its video or image, if it has one."""
        media = self.image if self.video is None else self.video
        return media if isinstance(media, str | os.PathLike) else None

    @property
    def video_seconds(self) -> float:
        """Length of a video that is given as frames."""
        assert isinstance(self.video, np.ndarray | torch.Tensor) and self.frame_rate
        return len(self.video) / self.frame_rate

    def check(self) -> None:
        """ValueError naming what is of another kind than it should be; files are not opened."""
        where = f" of item {self.key}" if isinstance(self.key, str) and self.key else ""
        for name in ("key", "prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}{where} must be text, not {described(getattr(self, name))}")
        for name in ("clip_features", "sync_features", "text_features", "negative_text_features"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                raise ValueError(f"{name}{where} must be a tensor of floats, not {described(value)}")
            if value is not None and not value.isfinite().all():
                raise ValueError(f"{name}{where} has values that are not finite numbers")
        if self.video is not None and self.image is not None:
            raise ValueError(f"item {self.key} has a video and an image: give one of them")
        for name, frames in (("video", self.video), ("image", self.image)):
            if isinstance(frames, np.ndarray | torch.Tensor):
                check_frames(frames, f"{name}{where}", still=name == "image")
            elif frames is not None and not (isinstance(frames, str | os.PathLike) and str(frames)):
                kinds = "a file, or frames as an array, a tensor or PIL images; several of them are a list"
                raise ValueError(f"{name}{where} must be {kinds}, not {described(frames)}")
        if isinstance(self.video, np.ndarray | torch.Tensor):
            check_number(f"frame_rate{where} (Hz, of a video that is given as frames)", self.frame_rate, 1e-3, 1000.0)
        elif self.frame_rate is not None:
            raise ValueError(f"frame_rate{where} is for a video that is given as frames; a file has its own")
        if self.duration is not None:
            check_number(f"duration{where}", self.duration)
        if self.seed is not None:
            check_number(f"seed{where}", self.seed, *SEEDS, whole=True)


def is_frames(value: Any) -> bool:
    """Whether this is a list of the frames of one video, rather than one of videos."""
    kinds, arrays = Image.Image | np.ndarray | torch.Tensor, np.ndarray | torch.Tensor
    frames = isinstance(value, list | tuple) and all(isinstance(frame, kinds) for frame in value)
    return frames and bool(value) and all(frame.ndim == 3 for frame in value if isinstance(frame, arrays))


def _array(frame: Frame) -> torch.Tensor:
    return torch.as_tensor(np.array(frame.convert("RGB")) if isinstance(frame, Image.Image) else frame)


def requests_of(given: Mapping[str, Any]) -> tuple[list[Request], bool]:
    """Requests of arguments that are values for one item or lists with one for each, and whether there is a list.

    ValueError naming lists of different lengths.
    """
    given = {name: value for name, value in given.items() if value is not None}
    lists = {name: value for name, value in given.items() if isinstance(value, list | tuple)}
    if is_frames(lists.get("video")):
        del lists["video"]
    lengths = {name: len(value) for name, value in lists.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"lists must have one entry for each audio, and as many as each other: {counts}")
    for name, values in lists.items():
        if name == "seed" and None in values:
            raise ValueError("seed: a list has a whole number for each audio; None alone draws one for all")
        if name in ("prompt", "negative_prompt"):
            lists[name] = ["" if value is None else value for value in values]
    count = next(iter(lengths.values()), 1)
    rows = [{name: lists[name][i] if name in lists else value for name, value in given.items()} for i in range(count)]
    return [Request(**row) for row in rows], bool(lists)


def check_number(name: str, value: Any, low: float | None = None, high: float = math.inf, whole: bool = False) -> None:
    """ValueError that names it unless it is a (whole) number from `low` to `high`."""
    # True would count as 1, and 1.5 steps or seeds as 1.
    kind: Any = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, not {described(value)}")
    if low is not None and not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, not {value}")


def check_choice(name: str, value: Any, valid: Iterable[str]) -> None:
    """ValueError that names it unless it is one of the valid texts."""
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{name} {described(value)}: use one of {', '.join(valid)}")


def described(value: Any) -> str:
    """A wrong value for a message; arrays by their shape."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"a {type(value).__name__} {value.dtype} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


@dataclass(frozen=True)
class Options:
    """What all items of one call have in common; ValueError for wrong values."""

    lengths: SequenceLengths  # of a window
    window: float
    duration: float | None
    num_steps: int
    guidance_scale: float
    solver: str
    batch_size: int
    callback: Any = None  # on_step_end
    progress: bool = False
    on_reject: Any = None

    def __post_init__(self) -> None:
        check_number("guidance_scale", self.guidance_scale, 0, 1e6)
        check_number("batch_size", self.batch_size, 1, 2**31, whole=True)
        check_choice("solver", self.solver, SOLVERS)
        if not isinstance(self.progress, bool):
            raise ValueError(f"progress must be true or false, not {described(self.progress)}")
        for name, function in (("callback_on_step_end", self.callback), ("on_reject", self.on_reject)):
            if function is not None and not callable(function):
                raise ValueError(f"{name} must be a function, not {described(function)}")
        if self.callback is not None and self.solver != "euler":
            raise ValueError(f"callback_on_step_end needs the solver euler: {self.solver} has no steps of its own")


@dataclass(frozen=True, repr=False)
class Generated:
    """One generated audio, on the CPU."""

    waveform: torch.Tensor  # (samples,) float32 in [-1, 1]
    sample_rate: int  # Hz
    latent: torch.Tensor  # (N, C) float32, not normalised: the input of the decoder
    key: str = ""
    note: str = ""  # how the audio differs from the request, and why
    seed: int | None = None  # that was used: with it, the same request gives the same audio

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return len(self.waveform) / self.sample_rate

    @property
    def audios(self) -> list[np.ndarray]:
        """The waveform as the pipelines of diffusers return it: a list of arrays (samples,)."""
        return [self.waveform.numpy()]

    def __repr__(self) -> str:
        """One line, without the samples."""
        note = f", note={self.note!r}" if self.note else ""
        what = f"{self.seconds:.2f} s at {self.sample_rate} Hz, latent {tuple(self.latent.shape)}"
        return f"Generated({what}, key={self.key!r}, seed={self.seed}{note})"

    def _repr_html_(self) -> str:
        """A player, for notebooks."""
        content, samples = io.BytesIO(), self.waveform.nan_to_num().clamp(-1, 1) * 32767
        with wave.open(content, "wb") as file:
            file.setparams((1, 2, self.sample_rate, 0, "NONE", "not compressed"))
            file.writeframes(samples.round().numpy().astype("<i2").tobytes())
        data = base64.b64encode(content.getvalue()).decode()
        player = f'<audio controls src="data:audio/wav;base64,{data}"></audio>'
        return f"<figure>{player}<figcaption>{escape(repr(self))}</figcaption></figure>"


class GeneratedList(list[Generated]):
    """Results of a call with lists."""

    @property
    def audios(self) -> list[np.ndarray]:
        """All waveforms, (samples,) each."""
        return [result.waveform.numpy() for result in self]

    def _repr_html_(self) -> str:
        """Players, for notebooks."""
        return "".join(result._repr_html_() for result in self)


def save_generated(result: Generated, out_path: str | os.PathLike, video: Media | None = None) -> Path:
    """Write `.wav` or `.flac`, or `.mp4` or `.mkv` with the frames of the file `video`; return the path.

    ValueError for another suffix, a video without frames, and a path that is `video` itself, whose audio would be lost.
    """
    save_with_note(result, out_path, video)
    return Path(out_path)


def save_with_note(result: Generated, out_path: str | os.PathLike, video: Media | None = None) -> str:
    """As `save_generated`; returns "", or a note that the video stream could not be copied and was re-encoded."""
    if not isinstance(result, Generated):
        raise ValueError(f"result must be what the pipeline returned for one item, not {described(result)}")
    if not isinstance(out_path, str | os.PathLike) or not str(out_path):
        raise ValueError(f"out_path must be a file, not {described(out_path)}")
    if video is not None and not isinstance(video, str | os.PathLike):
        raise ValueError(f"video must be a file, whose frames are copied, not {described(video)}")
    out_path = Path(out_path)
    if out_path.is_dir():
        raise ValueError(f"{out_path} is a folder: give the name of a file")
    if video is not None and out_path.exists() and os.path.exists(video) and out_path.samefile(video):
        raise ValueError(f"{out_path} is the video itself, whose audio would be lost: choose another name")
    suffix, audio = out_path.suffix.lower(), (result.waveform, result.sample_rate)
    if suffix not in VIDEO_FORMATS:
        write_audio(out_path, *audio)
    elif video is None:
        raise ValueError(f"{out_path}: an {suffix} needs a video to take the frames from; else write .wav or .flac")
    elif not write_video_with_audio(video, *audio, out_path):
        other = "" if suffix == ".mkv" else "; .mkv may hold it"
        return f"video re-encoded as H.264, since {suffix} cannot hold the codec of {Path(video).name}{other}"
    return ""


def starting_noise(seed: int, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal x0 of `shape`, float32: a function of the seed and the item's key alone (Philox 4x64)."""
    words = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in ("generation", key)]
    state, counter = (np.array(each, np.uint64) for each in ([int(seed) % 2**64, words[0]], [0, 0, words[1], 0]))
    philox = np.random.Philox(key=state, counter=counter)
    return torch.from_numpy(np.random.Generator(philox).standard_normal(shape, dtype=np.float32))


def with_seed(request: Request, key: str, seed: int) -> Request:
    """The request with a key and a seed of its own, where it has none."""
    own_key, own_seed = request.key, request.seed  # checked later: they may be of any kind
    key = key if isinstance(own_key, str) and own_key == "" else own_key
    return dataclasses.replace(request, key=key, seed=seed if own_seed is None else own_seed)


def draw_seed(generator: Any) -> int:
    """A seed that a torch.Generator draws; ValueError for anything else."""
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, or a list of them, not {described(generator)}")
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


def precision_of(name: str, dtype: torch.dtype | str | None) -> str:
    """Name in DTYPES of a dtype, or of its name as in "float16"; "" for None and "auto"."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return ""
    named = DTYPES.get(dtype, getattr(torch, dtype, None)) if isinstance(dtype, str) else dtype
    if names := [precision for precision, known in DTYPES.items() if named is known]:
        return names[0]
    raise ValueError(f"{name} {described(dtype)}: use one of {', '.join(map(str, DTYPES.values()))}")


def read_encoders(folder: Path | None) -> tuple[EncoderConfig, str]:
    """The encoders and the alignment that were saved with a model; the defaults without a folder.

    Encoder files beside the weights are preferred to those of the folder that is named. Paths that were not saved are
    those of the recipe while the folder is part of its run, else the defaults.
    """
    path = None if folder is None else folder / ENCODERS_FILE
    if folder is None or path is None or not path.is_file():
        return EncoderConfig(), ALIGNMENTS[0]
    try:
        saved = dict(json.loads(path.read_text()))
        alignment = saved.pop("alignment", ALIGNMENTS[0])  # earlier versions did not save it
        if alignment not in ALIGNMENTS:
            raise ValueError(f"alignment {alignment!r}: use one of {', '.join(ALIGNMENTS)}")
        checkpoints = folder.resolve().parent.parent  # of RUN/checkpoints/step_N/pretrained_model
        recipe = checkpoints.parent / RECIPE_FILE
        if not {"weights_dir", "clip"} <= set(saved) and checkpoints.name == "checkpoints" and recipe.is_file():
            encoders = load_recipe(recipe).encoders
            saved = {"weights_dir": encoders.weights_dir, "clip": encoders.clip} | saved
        config = EncoderConfig(**saved)
        check_encoders(config, "16k", ())  # values of kind and precision
    except Exception as error:
        raise ValueError(f"{path} does not describe encoders: {error.__cause__ or error}") from error
    beside = dataclasses.replace(config, weights_dir=str(folder))
    complete = any(all(file.is_file() for file in files_to_copy(beside, mode)) for mode in MODES)
    return beside if complete else config, alignment


def files_to_copy(config: EncoderConfig, mode: str) -> list[Path]:
    """Encoder files that may lie beside the weights of a model; CLIP has a place of its own."""
    return [file for component in ("sync", "latent", "decode") for file in encoder_files(config, mode, component)]
