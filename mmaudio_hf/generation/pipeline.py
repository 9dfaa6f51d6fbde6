"""Video, image and/or text to audio: `MMAudioPipeline`.

pipeline = MMAudioPipeline.from_pretrained("output/run")
result = pipeline("dog.mp4", prompt="a dog barks")
save_generated(result, "dog_with_audio.mp4", video="dog.mp4")
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmaudio_hf.config import EncoderConfig, load_recipe
from mmaudio_hf.features.encoders import (
    PRECISIONS,
    Encoders,
    check_encoders,
    decoder_fingerprint,
    fingerprints,
    load_encoders,
    pick_device,
)
from mmaudio_hf.features.toy import toy_codec_file
from mmaudio_hf.generation.windows import (
    WindowSchedule,
    cross_fade,
    decode_chunks,
    latent_seconds,
    read_ahead,
    schedule_windows,
)
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.container import probe
from mmaudio_hf.media.mux import VIDEO_FORMATS, write_video_with_audio
from mmaudio_hf.media.video import ALIGNMENTS, VideoClip, read_image, read_windows, video_seconds
from mmaudio_hf.models.flow import VelocityFunction, sample_adaptive, sample_euler
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.pretrained import ENCODERS_FILE, find_pretrained
from mmaudio_hf.models.sampling import GuidedVelocity, winograd_convolutions
from mmaudio_hf.schema import (
    CLIP_FEATURES,
    LATENT_STRIDE,
    MODES,
    SYNC_FEATURES,
    TEXT_FEATURES,
    SequenceLengths,
    audio_mode,
    sequence_lengths,
)

RECIPE_FILE = "config.yaml"  # of a run folder
SOLVERS = ("euler", "adaptive")
_CLIPS_AHEAD = 4  # read while the model works; 58 MB each


@dataclass(frozen=True)
class Request:
    """One audio to generate. For what is not given, the model uses its learned empty features.

    Features, as in a row of a feature store, replace `video`, `image` and `prompt` and need no encoder.
    """

    key: str = ""  # the noise depends on it and the seed alone; empty: the index in the list
    video: str | os.PathLike | None = None
    image: str | os.PathLike | None = None  # a still image, seen all the time; it has no sync features
    prompt: str = ""
    negative_prompt: str = ""  # what the audio should not be like
    duration: float | None = None  # s, in place of that of the call
    seed: int | None = None  # in place of that of the call
    clip_features: torch.Tensor | None = None  # (T, 1024)
    sync_features: torch.Tensor | None = None  # (S, 768)
    text_features: torch.Tensor | None = None  # (77, 1024)

    @property
    def components(self) -> set[str]:
        """The encoders and decoders it needs."""
        visual = self.video is not None or self.image is not None
        needed = {
            "decode": True,
            "clip": visual and self.clip_features is None,
            "sync": self.video is not None and self.sync_features is None,
            "text": bool((self.prompt and self.text_features is None) or self.negative_prompt),
        }
        return {name for name, is_needed in needed.items() if is_needed}


@dataclass(frozen=True)
class Generated:
    """One generated audio, on the CPU."""

    waveform: torch.Tensor  # (samples,) float32 in [-1, 1]
    sample_rate: int  # Hz
    latent: torch.Tensor  # (N, C) float32, not normalised: the input of the decoder
    key: str = ""
    note: str = ""  # how the audio differs from the request, and why


OnReject = Callable[[Request, Exception], None]


@dataclass(frozen=True)
class _Options:
    """What all items of one call have in common; ValueError for wrong values."""

    lengths: SequenceLengths  # of a window
    window: float
    duration: float | None
    num_steps: int
    guidance_scale: float
    seed: int
    solver: str

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {self.num_steps}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be 0 or more, not {self.guidance_scale}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r}: use one of {', '.join(SOLVERS)}")


@dataclass
class _Item:
    """A request in progress: its windows, and their features so far."""

    request: Request
    schedule: WindowSchedule = dataclasses.field(init=False)
    note: str = ""
    problem: Exception | None = None
    features: list[tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=list)  # CLIP and sync


class MMAudioPipeline:
    """A flow model with its encoders and decoder. Encoders are loaded when a request first needs them."""

    def __init__(
        self,
        model: MMAudio,
        encoders: EncoderConfig | Encoders,
        *,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        alignment: str = "timestamps",
    ):
        """`model` is moved to `device` (None: stays on its own) and put into evaluation mode.

        encoders: how to load them, or loaded ones with the components that will be needed. precision: of the model.
        alignment: how `read_video` aligns frames; should be that of the features the model was trained on.
        """
        for name, value, valid in (("precision", precision, PRECISIONS), ("alignment", alignment, ALIGNMENTS)):
            if value not in valid:
                raise ValueError(f"{name} {value!r}: use one of {', '.join(valid)}")
        if not (torch.isfinite(model.latent_mean).all() and torch.isfinite(model.latent_std).all()):
            raise ValueError("the model has no latent statistics: train it, or load a trained one")
        if isinstance(encoders, Encoders) and encoders.mode != model.config.mode:
            raise ValueError(f"the encoders are of mode {encoders.mode}, the model of {model.config.mode}")
        self.device = model.latent_mean.device if device is None else pick_device(device)
        self.model = model.to(self.device).eval()
        self.precision, self.alignment = precision, alignment
        self._source = encoders
        self._loaded: dict[str, Encoders] = {}
        self._model_hash = ""

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

        encoders, alignment: in place of those saved with the model, as when the encoder files are elsewhere on this
        machine ("timestamps" where no alignment is saved).
        ValueError naming what is missing; the weights of the encoders are looked for when they are needed.
        """
        folder = find_pretrained(source, revision=revision)
        if encoders is None or alignment is None:
            saved_encoders, saved_alignment = _read_encoders(folder)
            encoders, alignment = encoders or saved_encoders, alignment or saved_alignment
        model, device = MMAudio.from_pretrained(folder), pick_device(device)
        return cls(model, encoders, device=device, precision=precision, alignment=alignment)

    @property
    def mode(self) -> str:
        """Audio mode of the model, "16k" or "44k"."""
        return self.model.config.mode

    @property
    def sample_rate(self) -> int:
        """Hz of generated waveforms."""
        return audio_mode(self.mode).sample_rate

    def __call__(
        self,
        video: str | os.PathLike | None = None,
        prompt: str = "",
        negative_prompt: str = "",
        *,
        image: str | os.PathLike | None = None,
        **options: Any,
    ) -> Generated:
        """Generate audio for one video or image, one caption, both or neither; see `generate` for the options."""
        request = Request(video=video, image=image, prompt=prompt, negative_prompt=negative_prompt)
        with contextlib.closing(self.generate([request], **options)) as results:
            return next(results)

    def generate(
        self,
        requests: Sequence[Request],
        batch_size: int = 8,
        *,
        duration: float | None = None,
        window: float | None = None,
        num_steps: int = 25,
        guidance_scale: float = 4.5,
        seed: int = 0,
        solver: str = "euler",
        on_reject: OnReject | None = None,
    ) -> Generator[Generated, None, None]:
        """Generate one audio per request, in order, `batch_size` at a time; requests of the same length are batched.

        duration: seconds; None is that of the video, and without one the length the model was trained for. Audio is
        never longer than its video: `Generated.note` says where that shortens it. window: seconds, None is the trained
        length; longer audio is generated in windows of that length, which overlap by a quarter and are blended at each
        step. guidance_scale: below 1 turns guidance off.
        The starting noise depends on the seed and the key of a request alone, not on batches or order.
        Wrong settings, unreadable files and missing weights raise ValueError here, before the model runs. With
        `on_reject`, files are opened when their turn comes only, and a request that fails is passed to it.
        """
        requests = [dataclasses.replace(r, key=r.key or str(index)) for index, r in enumerate(requests)]
        for number in (seed, *(request.seed for request in requests if request.seed is not None)):
            if not isinstance(number, Integral):  # 1.5 would count as 1
                raise ValueError(f"seed must be a whole number, not {number!r}")
        options = _Options(*self._window(window), duration, num_steps, guidance_scale, seed, solver)
        if duration is not None:
            _lengths(self.mode, duration)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self._check_components(requests)
        if on_reject is None:
            for request in requests:
                self._schedule(request, options)
        return self._generate(requests, batch_size, options, on_reject)

    def decode(self, latent_NC: torch.Tensor) -> torch.Tensor:
        """Waveform (samples,), on the CPU, of one latent (N, C) that is not normalised, as feature stores hold them."""
        return self._encoders("decode").decode_latent(latent_NC[None])[0].float().cpu()

    def fingerprint(self, request: Request) -> dict[str, Any]:
        """What the audio of a request depends on beside itself: hashes of weights, precision, alignment.

        The model is hashed once: it must not change between two calls.
        """
        config = self._source.config if isinstance(self._source, Encoders) else self._source
        components = sorted(request.components - {"decode"})
        result: dict[str, Any] = {
            component: entry["fingerprint"] for component, entry in fingerprints(config, self.mode, components).items()
        }
        result["decode"] = decoder_fingerprint(config, self.mode)
        if request.video is not None:
            result["alignment"] = self.alignment
        if not self._model_hash:
            self._model_hash = _hash_of_state(self.model)
        return result | {"network": self._model_hash, "precision": self.precision}

    # --- before the model runs ---------------------------------------------------------------------------------------

    def _window(self, window: float | None) -> tuple[SequenceLengths, float]:
        """Lengths and seconds of a window."""
        config = self.model.config
        seconds = config.duration if window is None else window
        lengths = _lengths(self.mode, seconds)
        if seconds == config.duration:  # a model may be built with lengths of its own
            own = {"latent": config.latent_length, "clip": config.clip_length, "sync": config.sync_length}
            lengths = dataclasses.replace(lengths, **own)
        return lengths, seconds

    def _check_components(self, requests: Sequence[Request]) -> None:
        """ValueError for encoders that will be needed and are missing."""
        components = {"decode"}.union(*(request.components for request in requests))
        if isinstance(self._source, EncoderConfig):
            check_encoders(self._source, self.mode, sorted(components))
        elif missing := components - set(self._source.networks):
            raise ValueError(f"these requests need encoders that were not loaded: {', '.join(sorted(missing))}")

    def _schedule(self, request: Request, options: _Options) -> tuple[WindowSchedule, str]:
        """Windows of a request, and a note where they are shorter than requested; ValueError for a wrong request."""
        duration = options.duration if request.duration is None else request.duration
        seconds, note = options.window if duration is None else duration, ""
        if request.video is not None and request.image is not None:
            raise ValueError(f"item {request.key} has a video and an image: give one of them")
        if request.image is not None and "video" not in probe(request.image):
            raise ValueError(f"{request.image} is not an image")
        if request.video is not None:
            if "video" not in probe(request.video):
                raise ValueError(f"{request.video} has no video frames: give a video, or only a prompt")
            available = video_seconds(request.video)
            if duration is not None and available < duration:
                note = f"{available:.2f} s long, as its video is, not the requested {duration:g} s"
            seconds = available if duration is None else min(available, duration)
        _lengths(self.mode, seconds, request.video)
        schedule = schedule_windows(self.mode, seconds, options.window, options.lengths)
        self._check_features(request, schedule)
        return schedule, note

    def _check_features(self, request: Request, schedule: WindowSchedule) -> None:
        config = self.model.config
        shapes = {
            CLIP_FEATURES: (schedule.lengths.clip, config.clip_dim),
            SYNC_FEATURES: (schedule.lengths.sync, config.sync_dim),
            TEXT_FEATURES: (config.text_tokens, config.text_dim),
        }
        for name, shape in shapes.items():
            features = getattr(request, name)
            if features is None:
                continue
            if tuple(features.shape) != shape:
                shape_given = tuple(features.shape)
                raise ValueError(f"{name} of item {request.key} are {shape_given}, this duration needs {shape}")
            if name != TEXT_FEATURES and len(schedule.starts) > 1:
                raise ValueError(f"{name} of item {request.key} are those of one window: use a shorter duration")

    # --- from requests to features -----------------------------------------------------------------------------------

    def _generate(
        self, requests: Sequence[Request], batch_size: int, options: _Options, on_reject: OnReject | None
    ) -> Generator[Generated, None, None]:
        """Items with the same schedule are batched; one of several windows fills the batches alone."""
        batch: list[_Item] = []
        for item in self._encoded(requests, options, on_reject):
            if batch and batch[0].schedule != item.schedule:
                yield from self._generate_batch(batch, batch_size, options)
                batch = []
            batch.append(item)
            if len(batch) == batch_size or len(item.schedule.starts) > 1:
                yield from self._generate_batch(batch, batch_size, options)
                batch = []
        if batch:
            yield from self._generate_batch(batch, batch_size, options)

    def _encoded(self, requests: Sequence[Request], options: _Options, on_reject: OnReject | None) -> Iterator[_Item]:
        """Items with the features of all their windows; what cannot be read is rejected or raised."""
        with contextlib.closing(read_ahead(self._read(requests, options), _CLIPS_AHEAD)) as windows:
            for item, clip in windows:
                if item.problem is None:
                    item.features.append(self._visual_features(item, clip))
                    del clip  # 58 MB
                    if len(item.features) == len(item.schedule.starts):
                        yield item
                elif on_reject is None:
                    raise item.problem
                else:
                    on_reject(item.request, item.problem)

    def _read(self, requests: Sequence[Request], options: _Options) -> Iterator[tuple[_Item, VideoClip | None]]:
        """Each item with the frames of each of its windows, in order; or once, with the problem it has."""
        for request in requests:
            item = _Item(request)
            try:
                item.schedule, item.note = self._schedule(request, options)
                clips: Any = [None] * len(item.schedule.starts)
                if request.video is not None and (request.clip_features is None or request.sync_features is None):
                    starts = [start * latent_seconds(self.mode) for start in item.schedule.starts]
                    seconds, alignment = item.schedule.duration, self.alignment
                    clips = read_windows(request.video, starts, mode=self.mode, duration=seconds, alignment=alignment)
                elif request.image is not None and request.clip_features is None:
                    clips = [read_image(request.image)] * len(item.schedule.starts)
                for clip in clips:
                    yield item, clip
                    del clip
            except ValueError as problem:
                item.problem = problem
                yield item, None

    @torch.inference_mode()
    def _visual_features(self, item: _Item, clip: VideoClip | None) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP (T, 1024) and sync (S, 768) features of one window, with the empty ones where nothing is given."""
        lengths, request = item.schedule.lengths, item.request
        clip_f, sync_f = request.clip_features, request.sync_features
        if clip is not None and clip_f is None:
            # A still image is encoded once, and its features are repeated for all times.
            clip_f = self._encoders("clip").encode_clip(clip.clip_frames[None])[0].expand(lengths.clip, -1)
        if clip is not None and sync_f is None and request.video is not None:
            sync_f = self._encoders("sync").encode_sync(clip.sync_frames[None])[0]
        clip_f = self.model.empty_clip_feat.expand(lengths.clip, -1) if clip_f is None else clip_f
        sync_f = self.model.empty_sync_feat.expand(lengths.sync, -1) if sync_f is None else sync_f
        return clip_f.to(self.device, torch.float32), sync_f.to(self.device, torch.float32)

    def _text_features(self, prompt: str, features: torch.Tensor | None = None) -> torch.Tensor:
        """`features`, or those of a prompt, (77, 1024); without text, those of the empty string in training."""
        if features is None:
            features = self._encoders("text").encode_text([prompt])[0] if prompt else self.model.empty_string_feat
        return features.to(self.device, torch.float32)

    def _encoders(self, component: str) -> Encoders:
        """Encoders with `component`, loaded at the first use. One CLIP network encodes images and text."""
        if isinstance(self._source, Encoders):
            return self._source
        group = ("clip", "text") if component in ("clip", "text") else (component,)
        if group[0] not in self._loaded:
            self._loaded[group[0]] = load_encoders(self._source, self.mode, group, device=self.device)
        return self._loaded[group[0]]

    # --- from features to audio --------------------------------------------------------------------------------------

    def _generate_batch(self, batch: Sequence[_Item], batch_size: int, options: _Options) -> Iterator[Generated]:
        # Not around the loop: between two results the model has the lengths that its owner set.
        with _lengths_set(self.model, batch[0].schedule.lengths):
            latents, waveforms = self._sample(batch, batch_size, options)
        for item, latent, waveform in zip(batch, latents, waveforms, strict=True):
            yield Generated(waveform, self.sample_rate, latent, item.request.key, item.note)

    @torch.inference_mode()
    def _sample(self, batch: Sequence[_Item], batch_size: int, options: _Options) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, N, C) and waveforms (B, samples), on the CPU, of items with the same schedule.

        Each item has one window, or there is one item, whose windows go through the model `batch_size` at a time.
        """
        model, schedule, decoder = self.model, batch[0].schedule, self._encoders("decode")
        shape = (schedule.latent, model.config.latent_channels)
        requests = [item.request for item in batch]
        seeds = [options.seed if request.seed is None else request.seed for request in requests]
        x0_BNC = torch.stack([starting_noise(s, r.key, shape) for s, r in zip(seeds, requests, strict=True)])
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        with autocast, winograd_convolutions(model, self.precision):
            velocity: VelocityFunction
            if len(schedule.starts) == 1:
                velocity = self._velocity(batch, range(1), options)
            else:
                velocity = self._blended_velocity(batch[0], batch_size, options)
            if options.solver == "euler":
                x1_BNC = sample_euler(velocity, x0_BNC.to(self.device), options.num_steps)
            else:
                x1_BNC = sample_adaptive(velocity, x0_BNC.to(self.device))
        latent_BNC = model.unnormalize(x1_BNC.float())
        if len(schedule.starts) == 1:
            return latent_BNC.cpu(), decoder.decode_latent(latent_BNC).float().cpu()
        samples_per_latent = audio_mode(self.mode).mel_hop * LATENT_STRIDE
        waveform = decode_chunks(decoder.decode_latent, latent_BNC[0], schedule.lengths.latent, samples_per_latent)
        return latent_BNC.cpu(), waveform[None]

    def _velocity(self, items: Sequence[_Item], windows: Sequence[int], options: _Options) -> GuidedVelocity:
        """Guided velocity of the given windows of each item, a batch of items x windows."""
        features = [item.features[index] for item in items for index in windows]
        clip, sync = (torch.stack(column) for column in zip(*features, strict=True))
        requests = [item.request for item in items]
        text = torch.stack([self._text_features(r.prompt, r.text_features) for r in requests])
        conditions = self.model.preprocess_conditions(clip, sync, text.repeat_interleave(len(windows), 0))
        negative = None
        if any(request.negative_prompt for request in requests):
            negative = torch.stack([self._text_features(request.negative_prompt) for request in requests])
            negative = negative.repeat_interleave(len(windows), 0)
        unconditional = self.model.empty_conditions(len(features), negative)
        return GuidedVelocity(self.model, conditions, unconditional, options.guidance_scale)

    def _blended_velocity(self, item: _Item, batch_size: int, options: _Options) -> VelocityFunction:
        """Velocity function (1, M, C) of a long latent: that of its windows, cross-faded where they overlap.

        Since this happens at every step, the windows agree where they overlap (MultiDiffusion, arXiv 2302.08113).
        """
        starts, size = item.schedule.starts, item.schedule.lengths.latent
        chunks = [range(first, min(first + batch_size, len(starts))) for first in range(0, len(starts), batch_size)]
        velocities = [self._velocity([item], chunk, options) for chunk in chunks]
        item.features.clear()  # they are in the conditions now
        weights = [cross_fade(starts, size, index)[:, None].to(self.device) for index in range(len(starts))]
        total_M1 = torch.zeros(item.schedule.latent, 1, device=self.device)
        for start, weight in zip(starts, weights, strict=True):
            total_M1[start : start + size] += weight

        def velocity(latent_BMC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
            blended = torch.zeros_like(latent_BMC)
            for chunk, window_velocity in zip(chunks, velocities, strict=True):
                windows = torch.cat([latent_BMC[:, starts[i] : starts[i] + size] for i in chunk])  # (chunk, N, C)
                for i, v_NC in zip(chunk, window_velocity(windows, t_B.expand(len(chunk))), strict=True):
                    blended[0, starts[i] : starts[i] + size] += weights[i] * v_NC
            return blended / total_M1

        return velocity


def save_generated(result: Generated, out_path: str | os.PathLike, video: str | os.PathLike | None = None) -> Path:
    """Write `.wav` or `.flac`, or `.mp4` or `.mkv` with the frames of `video`; return the path.

    ValueError for another suffix or a video without frames.
    """
    save_with_note(result, out_path, video)
    return Path(out_path)


def save_with_note(result: Generated, out_path: str | os.PathLike, video: str | os.PathLike | None = None) -> str:
    """As `save_generated`; returns "", or a note that the video stream could not be copied and was re-encoded."""
    out_path = Path(out_path)
    suffix = out_path.suffix.lower()
    if suffix not in VIDEO_FORMATS:
        write_audio(out_path, result.waveform, result.sample_rate)
    elif video is None:
        raise ValueError(f"{out_path}: an {suffix} needs a video to take the frames from; else write .wav or .flac")
    elif not write_video_with_audio(video, result.waveform, result.sample_rate, out_path):
        other = "" if suffix == ".mkv" else "; .mkv may hold it"
        return f"video re-encoded as H.264, since {suffix} cannot hold the codec of {Path(video).name}{other}"
    return ""


def starting_noise(seed: int, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal x0 of `shape`, float32: a function of the seed and the item's key alone (Philox 4x64)."""
    words = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in ("generation", key)]
    generator = np.random.Philox(
        key=np.array([seed % 2**64, words[0]], np.uint64), counter=np.array([0, 0, words[1], 0], np.uint64)
    )
    return torch.from_numpy(np.random.Generator(generator).standard_normal(shape, dtype=np.float32))


def _read_encoders(folder: Path) -> tuple[EncoderConfig, str]:
    """The encoders and the alignment that were saved with a model.

    A toy codec beside the weights is preferred to the folder it was fitted in. Paths that were not saved are those of
    the recipe while the folder is part of its run, else the defaults.
    """
    path = folder / ENCODERS_FILE
    if not path.is_file():
        return EncoderConfig(), ALIGNMENTS[0]
    try:
        saved = dict(json.loads(path.read_text()))
        alignment = saved.pop("alignment", ALIGNMENTS[0])  # earlier versions did not save it
        if alignment not in ALIGNMENTS:
            raise ValueError(f"alignment {alignment!r}: use one of {', '.join(ALIGNMENTS)}")
        if not {"weights_dir", "clip"} <= set(saved):
            saved = _paths_of_run(folder) | saved
        config = EncoderConfig(**saved)
        check_encoders(config, "16k", ())  # values of kind and precision
    except Exception as error:
        raise ValueError(f"{path} does not describe encoders: {error.__cause__ or error}") from error
    if config.kind == "toy" and any(toy_codec_file(folder, mode).is_file() for mode in MODES):
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


@contextlib.contextmanager
def _lengths_set(model: MMAudio, lengths: SequenceLengths) -> Iterator[None]:
    """The model set to `lengths`, and back. Outside inference mode: its tables must stay usable for training."""
    before = model.latent_length, model.clip_length, model.sync_length
    during = lengths.latent, lengths.clip, lengths.sync
    if during != before:
        model.set_lengths(*during)
    try:
        yield
    finally:
        if during != before:
            model.set_lengths(*before)


def _lengths(mode: str, seconds: float, video: str | os.PathLike | None = None) -> SequenceLengths:
    """Lengths for a duration; ValueError, naming `video`, if it is too short or not finite."""
    if not 0 < seconds < float("inf"):
        raise ValueError(f"durations and windows must be positive and finite, not {seconds} s")
    try:
        return sequence_lengths(mode, seconds)
    except ValueError as error:
        raise ValueError(f"{video}: {error}") from None if video is not None else error


def _hash_of_state(model: MMAudio) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
