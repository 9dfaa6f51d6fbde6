"""Video, picture and/or text to sound: `MMAudioPipeline`.

pipeline = MMAudioPipeline.from_pretrained("output/run")
result = pipeline("dog.mp4", prompt="a dog barks")
save_generated(result, "dog_with_sound.mp4", video="dog.mp4")
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmaudio_hf.config import EncoderConfig, load_recipe
from mmaudio_hf.features.encoders import (
    Encoders,
    check_encoders,
    decoder_fingerprint,
    fingerprints,
    load_encoders,
    pick_device,
)
from mmaudio_hf.features.toy import toy_codec_file
from mmaudio_hf.generation.windows import (
    Plan,
    cross_fade,
    decode_pieces,
    latent_seconds,
    plan_windows,
    read_ahead,
)
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.container import probe
from mmaudio_hf.media.mux import VIDEO_FORMATS, write_video_with_audio
from mmaudio_hf.media.video import ALIGNMENTS, VideoClip, read_image, read_windows, video_seconds
from mmaudio_hf.models.flow import sample_adaptive, sample_euler
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.pretrained import ENCODERS_FILE, find_pretrained
from mmaudio_hf.models.sampling import GuidedVelocity, winograd_convolutions
from mmaudio_hf.schema import (
    CLIP_FEATURES,
    LATENT_STRIDE,
    SYNC_FEATURES,
    TEXT_FEATURES,
    SequenceLengths,
    audio_mode,
    sequence_lengths,
)

RECIPE_FILE = "config.yaml"  # of a run folder
SOLVERS = ("euler", "adaptive")
PRECISIONS = ("fp32", "bf16")
_CLIPS_AHEAD = 4  # read while the network works; 58 MB each


@dataclass(frozen=True)
class Request:
    """One sound to generate. What is not given counts as missing: the network then uses its learned empty features.

    Features, as in a row of a feature store, stand in for `video`, `image` and `prompt` and need no encoder.
    """

    key: str = ""  # the noise depends on it and the seed alone; empty: the place in the list
    video: str | os.PathLike | None = None
    image: str | os.PathLike | None = None  # a still picture, seen all the time; what moves when is left open
    prompt: str = ""
    negative_prompt: str = ""  # what the sound should not be like
    duration: float | None = None  # s, in place of that of the call
    seed: int | None = None  # in place of that of the call
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
    note: str = ""  # where the sound is not what was asked for: in what, and why


@dataclass(frozen=True)
class _Settings:
    """What all items of one call share."""

    lengths: SequenceLengths  # of a window
    duration: float | None
    window: float
    num_steps: int
    guidance_scale: float
    seed: int
    solver: str


@dataclass
class _Item:
    """A request on its way: how it is made, and the features of its windows as far as they are there."""

    request: Request
    plan: Plan | None = None
    note: str = ""
    problem: Exception | None = None
    features: list[tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=list)  # CLIP and sync


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
        self._network_hash = ""

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
        image: str | os.PathLike | None = None,
        **options,
    ) -> Generated:
        """Generate the sound of one video or picture, one caption, both or neither; see `generate` for the options."""
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
        on_reject: Callable[[Request, Exception], None] | None = None,
    ) -> Iterator[Generated]:
        """Generate one sound per request, in order, `batch_size` at a time; those of the same length go together.

        duration: seconds; None is the whole of a video, and without one the length the network was trained for. A
        sound is never longer than its video: then `Generated.note` says so. window: seconds, None is the trained
        length; longer sounds are made in windows of that length, which overlap by a quarter and share each step.
        guidance_scale: below 1 turns guidance off.
        The starting noise of an item depends on its seed and its key alone: batches and order do not change a sound.
        Wrong settings, unreadable files and missing weights raise ValueError here, before any network runs. With
        `on_reject`, files are looked at when their turn comes only, and an item that cannot be made is handed to it.
        """
        requests = [dataclasses.replace(r, key=r.key or str(place)) for place, r in enumerate(requests)]
        settings = self._settings(duration, window, num_steps, guidance_scale, seed, solver)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self._check_parts(requests)
        if on_reject is None:
            for request in requests:
                self._plan(request, settings)
        return self._generate(requests, batch_size, settings, on_reject)

    def decode(self, latent_NC: torch.Tensor) -> torch.Tensor:
        """Waveform (samples,), on the CPU, of one latent (N, C) that is not normalised, as feature stores hold them."""
        return self._encoders("decode").decode_latent(latent_NC[None])[0].float().cpu()

    def _settings(self, duration, window, num_steps, guidance_scale, seed, solver) -> _Settings:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {num_steps}")
        if not 0 <= guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be 0 or more, not {guidance_scale}")
        if solver not in SOLVERS:
            raise ValueError(f"solver {solver!r}: use one of {', '.join(SOLVERS)}")
        config = self.network.config
        trained = window is None or window == config.duration
        window = config.duration if trained else window
        if duration is not None:
            _lengths(config.mode, duration)
        lengths = _lengths(config.mode, window)
        if trained:  # a network may be made with lengths of its own
            own = {"latent": config.latent_length, "clip": config.clip_length, "sync": config.sync_length}
            lengths = dataclasses.replace(lengths, **own)
        return _Settings(lengths, duration, window, num_steps, guidance_scale, seed, solver)

    def fingerprint(self, request: Request) -> dict[str, Any]:
        """What makes the sound of a request beside itself: hashes of weights, precision, how pictures are read.

        The network is hashed once: it must not change between two calls.
        """
        config = self._source.config if isinstance(self._source, Encoders) else self._source
        parts, mode = sorted(_parts(request) - {"decode"}), self.network.config.mode
        made_by = {part: print_["fingerprint"] for part, print_ in fingerprints(config, mode, parts).items()}
        made_by["decode"] = decoder_fingerprint(config, mode)
        if request.video is not None:
            made_by["alignment"] = self.alignment
        if not self._network_hash:
            self._network_hash = _hash_of_state(self.network)
        return made_by | {"network": self._network_hash, "precision": self.precision}

    def _check_parts(self, requests: Sequence[Request]) -> None:
        """ValueError for encoders that will be needed and are not there."""
        parts = {"decode"}.union(*(_parts(request) for request in requests))
        if isinstance(self._source, Encoders):
            if missing := parts - set(self._source.networks):
                raise ValueError(f"these requests need encoders that were not loaded: {', '.join(sorted(missing))}")
        else:
            check_encoders(self._source, self.network.config.mode, sorted(parts))

    def _plan(self, request: Request, settings: _Settings) -> tuple[Plan, str]:
        """How a request is made, and a note if not as it was asked for; ValueError if it cannot be."""
        asked = settings.duration if request.duration is None else request.duration
        seconds, note = settings.window if asked is None else asked, ""
        if request.video is not None and request.image is not None:
            raise ValueError(f"item {request.key} has a video and a picture: give one of them")
        if request.image is not None and "video" not in probe(request.image):
            raise ValueError(f"{request.image} is no picture")
        if request.video is not None:
            if "video" not in probe(request.video):
                raise ValueError(f"{request.video} has no pictures: give a video, or only a prompt")
            have = video_seconds(request.video)
            if asked is not None and have < asked:
                note = f"{have:.2f} s long, as its video is, where {asked:g} s were asked for"
            if asked is None or have < asked:
                seconds = have
        _lengths(self.network.config.mode, seconds, request.video)
        plan = plan_windows(self.network.config.mode, seconds, settings.window, settings.lengths)
        self._check_features(request, plan)
        return plan, note

    def _check_features(self, request: Request, plan: Plan) -> None:
        config = self.network.config
        shapes = {
            CLIP_FEATURES: (plan.lengths.clip, config.clip_dim),
            SYNC_FEATURES: (plan.lengths.sync, config.sync_dim),
            TEXT_FEATURES: (config.text_tokens, config.text_dim),
        }
        for name, shape in shapes.items():
            features = getattr(request, name)
            if features is not None and tuple(features.shape) != shape:
                raise ValueError(
                    f"{name} of item {request.key} are {tuple(features.shape)}, this duration needs {shape}"
                )
            if features is not None and name != TEXT_FEATURES and len(plan.starts) > 1:
                raise ValueError(f"{name} of item {request.key} are those of one window: ask for a shorter duration")

    def _generate(self, requests, batch_size: int, settings: _Settings, on_reject) -> Iterator[Generated]:
        group: list[_Item] = []
        with contextlib.closing(read_ahead(self._read(requests, settings), _CLIPS_AHEAD)) as pieces:
            for item, clip in pieces:
                if item.problem is not None:
                    if on_reject is None:
                        raise item.problem
                    on_reject(item.request, item.problem)
                    continue
                item.features.append(self._picture_features(item, clip))
                del clip
                if len(item.features) < len(item.plan.starts):
                    continue
                alone = len(item.plan.starts) > 1
                if group and (alone or group[0].plan != item.plan):
                    yield from self._made(group, batch_size, settings)
                    group = []
                group.append(item)
                if alone or len(group) == batch_size:
                    yield from self._made(group, batch_size, settings)
                    group = []
        if group:
            yield from self._made(group, batch_size, settings)

    def _read(self, requests: Sequence[Request], settings: _Settings) -> Iterator[tuple[_Item, VideoClip | None]]:
        """Each request with the pictures of each of its windows, in order; or once, with the problem it has."""
        mode = self.network.config.mode
        for request in requests:
            item = _Item(request)
            try:
                item.plan, item.note = self._plan(request, settings)
                if request.video is not None and (request.clip_features is None or request.sync_features is None):
                    starts = [start * latent_seconds(mode) for start in item.plan.starts]
                    how = {"mode": mode, "duration": item.plan.duration, "alignment": self.alignment}
                    clips = read_windows(request.video, starts, **how)
                elif request.image is not None and request.clip_features is None:
                    clips = [read_image(request.image)] * len(item.plan.starts)
                else:
                    clips = [None] * len(item.plan.starts)
                for clip in clips:
                    yield item, clip
                    del clip
            except ValueError as problem:
                item.problem = problem
                yield item, None

    def _made(self, group: Sequence[_Item], batch_size: int, settings: _Settings) -> Iterator[Generated]:
        # Not around the loop: between two results the network belongs to the caller again.
        with _lengths_set(self.network, group[0].plan.lengths):
            latents, waveforms = self._batch(group, batch_size, settings)
        for item, latent, waveform in zip(group, latents, waveforms, strict=True):
            yield Generated(waveform, self.sample_rate, latent, item.request.key, item.note)

    @torch.inference_mode()
    def _batch(self, group: Sequence[_Item], batch_size: int, settings: _Settings):
        """Latents (N, C) and waveforms (samples,), on the CPU, of items with the same plan.

        Each item has one window, or there is one item, whose windows go through the network `batch_size` at a time.
        """
        network, plan = self.network, group[0].plan
        shape = (plan.latent, network.config.latent_channels)
        x0 = torch.stack([self._noise(item.request, settings, shape) for item in group]).to(self.device)
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        with autocast, winograd_convolutions(network, self.precision):
            if len(plan.starts) == 1:
                velocity = self._velocity(group, range(1), settings)
            else:
                velocity = self._windows_velocity(group[0], batch_size, settings)
            if settings.solver == "euler":
                x1 = sample_euler(velocity, x0, settings.num_steps)
            else:
                x1 = sample_adaptive(velocity, x0)
        latent_BNC = network.unnormalize(x1.float())
        if len(plan.starts) == 1:
            waveforms = self._encoders("decode").decode_latent(latent_BNC).float().cpu()
        else:
            size = (plan.lengths.latent, audio_mode(network.config.mode).mel_hop * LATENT_STRIDE)
            waveforms = [decode_pieces(self._encoders("decode").decode_latent, latent_BNC[0], *size)]
        return latent_BNC.cpu(), waveforms

    def _noise(self, request: Request, settings: _Settings, shape: tuple[int, int]) -> torch.Tensor:
        return starting_noise(settings.seed if request.seed is None else request.seed, request.key, shape)

    def _velocity(self, items: Sequence[_Item], windows: Sequence[int], settings: _Settings) -> GuidedVelocity:
        """Of some windows of each of some items."""
        features = [item.features[number] for item in items for number in windows]
        clip, sync = (torch.stack(column) for column in zip(*features, strict=True))
        requests = [item.request for item in items]
        text = torch.stack([self._request_text(request) for request in requests])
        negative = self._negative_text(requests)
        conditions = self.network.preprocess_conditions(clip, sync, text.repeat_interleave(len(windows), 0))
        negative = None if negative is None else negative.repeat_interleave(len(windows), 0)
        empty = self.network.empty_conditions(len(features), negative)
        return GuidedVelocity(self.network, conditions, empty, settings.guidance_scale)

    def _windows_velocity(self, item: _Item, batch_size: int, settings: _Settings):
        """Velocity function (1, M, C) of a long latent: that of its windows, cross-faded where they overlap.

        So at every step the windows agree on what they share (Bar-Tal et al. 2023, MultiDiffusion).
        """
        starts, size = item.plan.starts, item.plan.lengths.latent
        places = range(len(starts))
        chunks = [places[first : first + batch_size] for first in places[::batch_size]]
        parts = [self._velocity([item], chunk, settings) for chunk in chunks]
        item.features.clear()  # they are in the conditions now
        weights = [cross_fade(starts, size, place)[:, None].to(self.device) for place in places]
        total = torch.zeros(item.plan.latent, 1, device=self.device)
        for start, weight in zip(starts, weights, strict=True):
            total[start : start + size] += weight

        def velocity(latent_BNC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
            blended = torch.zeros_like(latent_BNC)
            for chunk, part in zip(chunks, parts, strict=True):
                windows = torch.cat([latent_BNC[:, starts[p] : starts[p] + size] for p in chunk])
                for place, found in zip(chunk, part(windows, t_B.expand(len(chunk))), strict=True):
                    blended[0, starts[place] : starts[place] + size] += weights[place] * found
            return blended / total

        return velocity

    @torch.inference_mode()
    def _picture_features(self, item: _Item, clip: VideoClip | None) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP (T, 1024) and sync (S, 768) features of one window, with the empty ones where nothing is given."""
        network, lengths, request = self.network, item.plan.lengths, item.request
        clip_f, sync_f = request.clip_features, request.sync_features
        if clip is not None and clip_f is None:
            # A still picture is encoded once and stands for all times.
            clip_f = self._encoders("clip").encode_clip(clip.clip_frames[None])[0].expand(lengths.clip, -1)
        if clip is not None and sync_f is None and request.video is not None:
            sync_f = self._encoders("sync").encode_sync(clip.sync_frames[None])[0]
        clip_f = network.empty_clip_feat.expand(lengths.clip, -1) if clip_f is None else clip_f
        sync_f = network.empty_sync_feat.expand(lengths.sync, -1) if sync_f is None else sync_f
        return clip_f.to(self.device, torch.float32), sync_f.to(self.device, torch.float32)

    def _request_text(self, request: Request) -> torch.Tensor:
        features = self._text(request.prompt) if request.text_features is None else request.text_features
        return features.to(self.device, torch.float32)

    def _text(self, prompt: str) -> torch.Tensor:
        """Text features (77, 1024); of no text, those the network was trained with."""
        if not prompt:
            return self.network.empty_string_feat
        return self._encoders("text").encode_text([prompt])[0]

    def _negative_text(self, requests: Sequence[Request]) -> torch.Tensor | None:
        if not any(request.negative_prompt for request in requests):
            return None
        return torch.stack([self._text(request.negative_prompt).to(self.device) for request in requests])

    def _encoders(self, part: str) -> Encoders:
        """Encoders that hold `part`, loaded at the first use. Pictures and text share one network."""
        if isinstance(self._source, Encoders):
            return self._source
        group = ("clip", "text") if part in ("clip", "text") else (part,)
        if group[0] not in self._loaded:
            self._loaded[group[0]] = load_encoders(self._source, self.network.config.mode, group, device=self.device)
        return self._loaded[group[0]]


def save_generated(result: Generated, out_path: str | os.PathLike, video: str | os.PathLike | None = None) -> Path:
    """Write `.wav` or `.flac`, or `.mp4` or `.mkv` with the sound under the pictures of `video`; return the path.

    ValueError for another ending or a video without pictures to show.
    """
    save_and_tell(result, out_path, video)
    return Path(out_path)


def save_and_tell(result: Generated, out_path: str | os.PathLike, video: str | os.PathLike | None = None) -> str:
    """As `save_generated`; returns "", or that the pictures could not be copied and were encoded anew."""
    out_path = Path(out_path)
    ending = out_path.suffix.lower()
    if ending not in VIDEO_FORMATS:
        write_audio(out_path, result.waveform, result.sample_rate)
    elif video is None:
        raise ValueError(
            f"{out_path}: an {ending} needs the video whose pictures it shows; without one, write .wav or .flac"
        )
    elif not write_video_with_audio(video, result.waveform, result.sample_rate, out_path):
        other = "" if ending == ".mkv" else "; an .mkv may take them"
        return f"pictures encoded anew as H.264, since {ending} does not take those of {Path(video).name}{other}"
    return ""


def starting_noise(seed: int, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal x0 of `shape`, float32: a function of the seed and the item's key alone (Philox 4x64)."""
    words = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in ("generation", key)]
    generator = np.random.Philox(
        key=np.array([seed % 2**64, words[0]], np.uint64), counter=np.array([0, 0, words[1], 0], np.uint64)
    )
    return torch.from_numpy(np.random.Generator(generator).standard_normal(shape, dtype=np.float32))


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
        check_encoders(config, "16k", ())  # names of kind and precision
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


def _lengths(mode: str, seconds: float, video: str | os.PathLike | None = None) -> SequenceLengths:
    """Lengths of a sound; ValueError if none can be so short or so long."""
    if not 0 < seconds < float("inf"):
        raise ValueError(f"durations and windows must be positive and finite, not {seconds} s")
    try:
        return sequence_lengths(mode, seconds)
    except ValueError as error:
        raise ValueError(f"{video}: {error}") from None if video is not None else error


def _parts(request: Request) -> set[str]:
    """The encoders and decoders that a request needs."""
    parts = {"decode"}
    if (request.video is not None or request.image is not None) and request.clip_features is None:
        parts.add("clip")
    if request.video is not None and request.sync_features is None:
        parts.add("sync")
    if (request.prompt and request.text_features is None) or request.negative_prompt:
        parts.add("text")
    return parts


def _hash_of_state(network: MMAudio) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
