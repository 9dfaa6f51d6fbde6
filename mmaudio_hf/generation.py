"""Video and/or text to sound: `MMAudioPipeline`.

pipeline = MMAudioPipeline.from_pretrained("output/run")
result = pipeline("dog.mp4", prompt="a dog barks")
save_generated(result, "dog_with_sound.mp4", video="dog.mp4")
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmaudio_hf.config import EncoderConfig, load_recipe
from mmaudio_hf.features.encoders import Encoders, check_encoders, load_encoders, pick_device, toy_codec_file
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.video import ALIGNMENTS, probe, read_video, write_video_with_audio
from mmaudio_hf.models.conditioning import Conditions
from mmaudio_hf.models.flow import guided_velocity, sample_adaptive, sample_euler
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.pretrained import ENCODERS_FILE, find_pretrained
from mmaudio_hf.schema import CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES, SequenceLengths, audio_mode, sequence_lengths

RECIPE_FILE = "config.yaml"  # of a run folder
SOLVERS = ("euler", "adaptive")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Request:
    """One sound to generate. What is not given counts as missing: the network then uses its learned empty features.

    Features, as in a row of a feature store, stand in for `video` and `prompt` and need no encoder.
    """

    key: str = ""  # the noise depends on it and the seed alone; empty: the place in the list
    video: str | os.PathLike | None = None
    prompt: str = ""
    negative_prompt: str = ""  # what the sound should not be like
    clip_features: torch.Tensor | None = None  # (T, 1024)
    sync_features: torch.Tensor | None = None  # (S, 768)
    text_features: torch.Tensor | None = None  # (77, 1024)


@dataclass(frozen=True)
class Generated:
    """One generated sound, on the CPU."""

    waveform: torch.Tensor  # (samples,) float32 in [-1, 1]
    sample_rate: int  # Hz
    latent: torch.Tensor  # (N, C) float32, not normalised: what the decoder took
    key: str = ""


@dataclass(frozen=True)
class _Settings:
    """What all items of one call share."""

    lengths: SequenceLengths
    duration: float
    num_steps: int
    guidance_scale: float
    seed: int
    solver: str


class MMAudioPipeline:
    """A flow network with its encoders and decoder. Encoders are loaded when a request first needs them."""

    def __init__(
        self,
        network: MMAudio,
        encoders: EncoderConfig | Encoders,
        *,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        alignment: str = "timestamps",
    ):
        """`network` is moved to `device` (None: stays where it is) and put into evaluation mode.

        encoders: how to load them, or ready ones with the parts that will be needed. precision: of the network.
        alignment: the rules by which `read_video` reads pictures; those of the features it was trained on.
        """
        for name, value, options in (("precision", precision, PRECISIONS), ("alignment", alignment, ALIGNMENTS)):
            if value not in options:
                raise ValueError(f"{name} {value!r}: use one of {', '.join(options)}")
        if not (torch.isfinite(network.latent_mean).all() and torch.isfinite(network.latent_std).all()):
            raise ValueError("the network has no latent statistics: train it, or load a trained one")
        if isinstance(encoders, Encoders) and encoders.mode != network.config.mode:
            raise ValueError(f"the encoders are of mode {encoders.mode}, the network of {network.config.mode}")
        self.device = network.latent_mean.device if device is None else pick_device(device)
        self.network = network.to(self.device).eval()
        self.precision = precision
        self.alignment = alignment
        self._source = encoders
        self._loaded: dict[str, Encoders] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        device: str | torch.device = "auto",
        encoders: EncoderConfig | Encoders | None = None,
        precision: str = "fp32",
        alignment: str | None = None,
        revision: str | None = None,
    ) -> "MMAudioPipeline":
        """Load from a run folder (its last checkpoint), a checkpoint, a `pretrained_model` folder or a Hub id.

        encoders: in place of those noted at training, as when their files are elsewhere on this machine; alignment: in
        place of the noted one ("timestamps" where none is).
        ValueError naming what is missing; the weights of the encoders are looked for when they are needed.
        """
        folder = find_pretrained(source, revision=revision)
        noted, noted_alignment = (encoders, None) if encoders and alignment else _read_encoders(folder)
        return cls(
            MMAudio.from_pretrained(folder),
            encoders or noted,
            device=pick_device(device),
            precision=precision,
            alignment=alignment or noted_alignment,
        )

    @property
    def sample_rate(self) -> int:
        """Hz of generated waveforms."""
        return audio_mode(self.network.config.mode).sample_rate

    def __call__(
        self,
        video: str | os.PathLike | None = None,
        prompt: str = "",
        negative_prompt: str = "",
        *,
        duration: float | None = None,
        num_steps: int = 25,
        guidance_scale: float = 4.5,
        seed: int = 0,
        solver: str = "euler",
    ) -> Generated:
        """Generate the sound of one video, one caption, both or neither; see `generate`."""
        request = Request(video=video, prompt=prompt, negative_prompt=negative_prompt)
        options = {"num_steps": num_steps, "guidance_scale": guidance_scale, "seed": seed, "solver": solver}
        return next(self.generate([request], duration=duration, **options))

    def generate(
        self,
        requests: Sequence[Request],
        batch_size: int = 8,
        *,
        duration: float | None = None,
        num_steps: int = 25,
        guidance_scale: float = 4.5,
        seed: int = 0,
        solver: str = "euler",
    ) -> Iterator[Generated]:
        """Generate one sound per request, in order, `batch_size` at a time.

        duration: seconds; None is the length the network was trained for. guidance_scale: below 1 turns guidance off.
        The starting noise of an item depends on `seed` and its key alone: batches and order do not change a sound.
        Wrong settings, unreadable videos and missing weights raise ValueError here, before any network runs.
        """
        requests = [dataclasses.replace(r, key=r.key or str(place)) for place, r in enumerate(requests)]
        settings = self._settings(duration, num_steps, guidance_scale, seed, solver)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self._check(requests, settings)
        return self._generate(requests, batch_size, settings)

    def decode(self, latent_NC: torch.Tensor) -> torch.Tensor:
        """Waveform (samples,), on the CPU, of one latent (N, C) that is not normalised, as feature stores hold them."""
        return self._encoders("decode").decode_latent(latent_NC[None])[0].float().cpu()

    def _settings(self, duration, num_steps, guidance_scale, seed, solver) -> _Settings:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {num_steps}")
        if not 0 <= guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be 0 or more, not {guidance_scale}")
        if solver not in SOLVERS:
            raise ValueError(f"solver {solver!r}: use one of {', '.join(SOLVERS)}")
        config = self.network.config
        lengths = sequence_lengths(config.mode, config.duration if duration is None else duration)
        if duration is None:  # a network may be made with lengths of its own
            own = {"latent": config.latent_length, "clip": config.clip_length, "sync": config.sync_length}
            lengths, duration = dataclasses.replace(lengths, **own), config.duration
        return _Settings(lengths, duration, num_steps, guidance_scale, seed, solver)

    def _check(self, requests: Sequence[Request], settings: _Settings) -> None:
        parts = {"decode"}
        for request in requests:
            self._check_features(request, settings.lengths)
            if request.video is not None and "video" not in probe(request.video):
                raise ValueError(f"{request.video} has no pictures: give a video, or only a prompt")
            if request.video is not None:
                parts |= {"clip"} if request.clip_features is None else set()
                parts |= {"sync"} if request.sync_features is None else set()
            if (request.prompt and request.text_features is None) or request.negative_prompt:
                parts.add("text")
        if isinstance(self._source, Encoders):
            if missing := parts - set(self._source.networks):
                raise ValueError(f"these requests need encoders that were not loaded: {', '.join(sorted(missing))}")
        else:
            check_encoders(**_encoder_options(self._source), mode=self.network.config.mode, parts=sorted(parts))

    def _check_features(self, request: Request, lengths: SequenceLengths) -> None:
        config = self.network.config
        shapes = {
            CLIP_FEATURES: (lengths.clip, config.clip_dim),
            SYNC_FEATURES: (lengths.sync, config.sync_dim),
            TEXT_FEATURES: (config.text_tokens, config.text_dim),
        }
        for name, shape in shapes.items():
            features = getattr(request, name)
            if features is not None and tuple(features.shape) != shape:
                raise ValueError(
                    f"{name} of item {request.key} are {tuple(features.shape)}, this duration needs {shape}"
                )

    def _generate(self, requests: Sequence[Request], batch_size: int, settings: _Settings) -> Iterator[Generated]:
        for first in range(0, len(requests), batch_size):
            batch = requests[first : first + batch_size]
            # Not around the loop: between two results the network belongs to the caller again.
            with _lengths_set(self.network, settings.lengths):
                latent_BNC, waveforms = self._batch(batch, settings)
            for request, latent, waveform in zip(batch, latent_BNC, waveforms, strict=True):
                yield Generated(waveform, self.sample_rate, latent, request.key)

    @torch.inference_mode()
    def _batch(self, batch: Sequence[Request], settings: _Settings) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, N, C) and waveforms (B, samples) of one batch, on the CPU."""
        features = self._features(batch, settings.duration)
        negative = self._negative_text(batch)
        network = self.network
        shape = (settings.lengths.latent, network.config.latent_channels)
        x0 = torch.stack([starting_noise(settings.seed, request.key, shape) for request in batch]).to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            conditions = network.preprocess_conditions(*features)
            empty = network.empty_conditions(len(batch), negative)
            velocity = guided_velocity_function(network, conditions, empty, settings.guidance_scale)
            if settings.solver == "euler":
                x1 = sample_euler(velocity, x0, settings.num_steps)
            else:
                x1 = sample_adaptive(velocity, x0)
        latent_BNC = network.unnormalize(x1.float())
        waveforms = self._encoders("decode").decode_latent(latent_BNC)
        return latent_BNC.cpu(), waveforms.float().cpu()

    def _features(self, batch: Sequence[Request], duration: float) -> list[torch.Tensor]:
        """CLIP, sync and text features of a batch, with the empty ones where nothing is given."""
        network, mode = self.network, self.network.config.mode
        rows = []
        for request in batch:
            clip, sync = request.clip_features, request.sync_features
            if request.video is not None and (clip is None or sync is None):
                how = {"alignment": self.alignment, "as_uint8": True, "pictures_only": True}
                frames = read_video(request.video, mode=mode, duration=duration, **how)
                # One video at a time: its pictures are a batch of their own.
                if clip is None:
                    clip = self._encoders("clip").encode_clip(frames.clip_frames[None])[0]
                if sync is None:
                    sync = self._encoders("sync").encode_sync(frames.sync_frames[None])[0]
            clip = network.empty_clip_feat.expand(network.clip_length, -1) if clip is None else clip
            sync = network.empty_sync_feat.expand(network.sync_length, -1) if sync is None else sync
            text = self._text(request.prompt) if request.text_features is None else request.text_features
            rows.append([f.to(self.device, torch.float32) for f in (clip, sync, text)])
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _text(self, prompt: str) -> torch.Tensor:
        """Text features (77, 1024); of no text, those the network was trained with."""
        if not prompt:
            return self.network.empty_string_feat
        return self._encoders("text").encode_text([prompt])[0]

    def _negative_text(self, batch: Sequence[Request]) -> torch.Tensor | None:
        if not any(request.negative_prompt for request in batch):
            return None
        return torch.stack([self._text(request.negative_prompt).to(self.device) for request in batch])

    def _encoders(self, part: str) -> Encoders:
        """Encoders that hold `part`, loaded at the first use. Pictures and text share one network."""
        if isinstance(self._source, Encoders):
            return self._source
        group = ("clip", "text") if part in ("clip", "text") else (part,)
        if group[0] not in self._loaded:
            options = _encoder_options(self._source) | {"device": self.device, "parts": group}
            self._loaded[group[0]] = load_encoders(mode=self.network.config.mode, **options)
        return self._loaded[group[0]]


def save_generated(result: Generated, out_path: str | os.PathLike, video: str | os.PathLike | None = None) -> Path:
    """Write `.wav` or `.flac`, or `.mp4` with the sound under the pictures of `video`; return the path.

    ValueError for another ending or an mp4 without video.
    """
    out_path = Path(out_path)
    if out_path.suffix.lower() != ".mp4":
        write_audio(out_path, result.waveform, result.sample_rate)
    elif video is None:
        raise ValueError(
            f"{out_path}: an .mp4 needs the video whose pictures it shows; without one, write .wav or .flac"
        )
    else:
        write_video_with_audio(video, result.waveform, result.sample_rate, out_path)
    return out_path


def starting_noise(seed: int, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal x0 of `shape`, float32: a function of the seed and the item's key alone (Philox 4x64)."""
    words = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in ("generation", key)]
    generator = np.random.Philox(
        key=np.array([seed % 2**64, words[0]], np.uint64), counter=np.array([0, 0, words[1], 0], np.uint64)
    )
    return torch.from_numpy(np.random.Generator(generator).standard_normal(shape, dtype=np.float32))


def guided_velocity_function(network: MMAudio, conditions: Conditions, empty: Conditions, guidance_scale: float):
    """Velocity function for a sampler: both sides of guidance go through the network as one batch of 2B.

    Equal to `MMAudio.predict_guided_velocity` up to float rounding; a scale below 1 evaluates one side only.
    """
    if guidance_scale < 1:
        return lambda latent_BNC, t_B: network.predict_velocity(latent_BNC, t_B, conditions).float()
    both = Conditions(*(torch.cat(pair) for pair in zip(conditions, empty, strict=True)))

    def velocity(latent_BNC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        sides = network.predict_velocity(latent_BNC.repeat(2, 1, 1), t_B.repeat(2), both)
        return guided_velocity(*sides.float().chunk(2), guidance_scale)

    return velocity


def _read_encoders(folder: Path) -> tuple[EncoderConfig, str]:
    """The encoders and the alignment noted at training; a toy codec beside the weights goes before the folder it was
    fitted in.

    Paths that were not noted are those of the recipe while the folder is part of its run, else the usual ones.
    """
    path = folder / ENCODERS_FILE
    if not path.is_file():
        return EncoderConfig(), ALIGNMENTS[0]
    try:
        noted = dict(json.loads(path.read_text()))
        alignment = noted.pop("alignment", ALIGNMENTS[0])  # not noted by earlier versions
        if alignment not in ALIGNMENTS:
            raise ValueError(f"alignment {alignment!r}: use one of {', '.join(ALIGNMENTS)}")
        paths = {} if {"weights_dir", "clip"} <= set(noted) else _paths_of_run(folder)
        config = EncoderConfig(**(paths | noted))
        check_encoders(**_encoder_options(config), mode="16k", parts=())  # names of kind and precision
    except Exception as error:
        raise ValueError(f"{path} does not describe encoders: {error.__cause__ or error}") from error
    codecs = [toy_codec_file(folder, mode) for mode in ("16k", "44k")]
    if config.kind == "toy" and any(codec.is_file() for codec in codecs):
        config = dataclasses.replace(config, weights_dir=str(folder))
    return config, alignment


def _paths_of_run(folder: Path) -> dict[str, str]:
    """Where the recipe of RUN/checkpoints/step_N/pretrained_model has its encoders; {} when `folder` is elsewhere."""
    checkpoints = folder.resolve().parent.parent
    recipe = checkpoints.parent / RECIPE_FILE
    if checkpoints.name != "checkpoints" or not recipe.is_file():
        return {}
    encoders = load_recipe(recipe).encoders
    return {"weights_dir": encoders.weights_dir, "clip": encoders.clip}


def _encoder_options(config: EncoderConfig) -> dict[str, str]:
    """Arguments of `load_encoders` and `check_encoders`; the device is the pipeline's own."""
    return {name: getattr(config, name) for name in ("kind", "weights_dir", "clip", "precision")}


@contextlib.contextmanager
def _lengths_set(network: MMAudio, lengths: SequenceLengths):
    """The network set to `lengths`, and back. Outside inference mode: its tables must stay usable for training."""
    before = network.latent_length, network.clip_length, network.sync_length
    wanted = lengths.latent, lengths.clip, lengths.sync
    if wanted != before:
        network.set_lengths(*wanted)
    try:
        yield
    finally:
        if wanted != before:
            network.set_lengths(*before)
