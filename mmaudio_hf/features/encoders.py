"""The frozen encoders and decoders of one audio mode, loaded in one place for extraction and for generation."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmaudio_hf.config import EncoderConfig
from mmaudio_hf.features import toy
from mmaudio_hf.features.autoencoder import MelSpectrogram
from mmaudio_hf.features.toy import toy_codec_file
from mmaudio_hf.files import hash_once, replacing, sha256_of
from mmaudio_hf.media.audio import SILENCE, read_waveform, resample
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.schema import LATENT_STRIDE, audio_mode, sequence_lengths

COMPONENTS = ("clip", "sync", "text", "latent", "decode")

VAE_FILES = {"16k": "v1-16.pth", "44k": "v1-44.pth"}
VOCODER_FILES = {"16k": "best_netG.pt", "44k": "bigvgan_v2_44khz_128band_512x/bigvgan_generator.pt"}
SYNC_FILE = "synchformer_state_dict.pth"
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"

_FIT_SECONDS = 1500  # of audio; more does not change the principal components
_FIT_FILE_SECONDS = 300  # of one file, whose waveform is in memory as a whole
_FIT_PEAK = 0.95

Networks = dict[str, Callable[..., Any]]
"""Component -> function of a batch: "text" takes captions, the others take tensors."""


@dataclass(frozen=True)
class Encoders:
    """The loaded networks, ready on `device`; made by `load_encoders`.

    All results are float32 on `device`. Frames are uint8 straight from `read_video(as_uint8=True)`, or floats in the
    ranges of `VideoClip`.
    """

    config: EncoderConfig
    mode: str
    duration: float
    device: torch.device
    networks: Networks

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """`fingerprints` of the loaded components; read from the files at the first use."""
        return fingerprints(self.config, self.mode, tuple(self.networks))

    @property
    def sample_rate(self) -> int:
        """Hz of waveforms that go in and come out."""
        return audio_mode(self.mode).sample_rate

    @torch.no_grad()
    def encode_clip(self, frames: Tensor) -> Tensor:
        """CLIP features (B, T, 1024) of 8 fps frames (B, T, 3, 384, 384)."""
        return self._features("clip", _to_device(frames, self.device))

    @torch.no_grad()
    def encode_sync(self, frames: Tensor) -> Tensor:
        """Sync features (B, S, 768) of 25 fps frames (B, F, 3, 224, 224)."""
        return self._features("sync", _to_device(frames, self.device))

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Text features (B, 77, 1024)."""
        if isinstance(captions, str):
            raise ValueError("give a list of captions, not one string")
        return self._features("text", list(captions)).to(self.device)

    @torch.no_grad()
    def encode_audio(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent, each (B, N, C), of waveforms (B, samples).

        `sequence_lengths(mode, duration).audio_samples` samples give the lengths of the schema.
        """
        return self._network("latent")(_to_device(waveform, self.device))

    @torch.no_grad()
    def decode_latent(self, latent_BNC: Tensor) -> Tensor:
        """Waveforms (B, 2 N hop) in [-1, 1] of latents (B, N, C) that are not normalised."""
        return self._network("decode")(latent_BNC.to(self.device, torch.float32))

    def _features(self, component: str, inputs: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self._network(component)(inputs).float()

    def _network(self, component: str) -> Callable[..., Any]:
        if component not in self.networks:
            raise ValueError(f"the component {component!r} was not loaded: name it in `components` of load_encoders")
        return self.networks[component]


def load_encoders(
    config: EncoderConfig,
    mode: str,
    components: Sequence[str] = COMPONENTS,
    *,
    device: str | torch.device | None = None,
    duration: float = 8.0,
) -> Encoders:
    """Build `components` on `device` (None: `config.device`).

    kind "released": the published files below `weights_dir`, and `clip`, a Hub id, a folder of transformers files or
    an open_clip checkpoint. kind "toy": the fixed formulas of `features.toy` and the codec that `fit_toy_codec` wrote
    to `weights_dir`. precision "bf16" applies to the image and text encoders; audio is always float32.

    Raises ValueError naming the missing file, before any network is built.
    """
    check_encoders(config, mode, components)
    sequence_lengths(mode, duration)
    device = pick_device(config.device if device is None else device)
    build = _toy_networks if config.kind == "toy" else _released_networks
    networks = build(config, mode, device, set(components))
    return Encoders(config, mode, duration, device, {name: networks[name] for name in components})


def pick_device(device: str | int | torch.device | None, rank: int = 0) -> torch.device:
    """The device called `device`; "auto", None and "cuda" are the CUDA device of process `rank`, "auto" else the CPU.

    A number N is cuda:N. ValueError for a device that this machine does not have; none is initialised, so that
    processes can still be forked.
    """
    name = "auto" if device is None else f"cuda:{device}" if str(device).isdecimal() else str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        known = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name[:60]!r} is not known to torch: use auto, cpu, cuda, cuda:N or mps") from None
    if known.type == "cpu":
        return known
    backend = getattr(torch, known.type, None)  # torch.cuda, torch.mps, torch.xpu; "meta" and "vulkan" have none
    count = backend.device_count() if backend is not None and backend.is_available() else 0
    if (known.index or 0) >= count:
        there = f"only {known.type}:0 to {known.type}:{count - 1}" if count else f"no {known.type} device"
        raise ValueError(f"device {name!r}: torch finds {there} on this machine, use auto or cpu")
    return torch.device("cuda", rank % count) if name == "cuda" else known


def check_encoders(config: EncoderConfig, mode: str, components: Sequence[str] = COMPONENTS) -> None:
    """Raise ValueError for a wrong setting or a missing file; reads nothing."""
    audio_mode(mode)
    if unknown := sorted(set(components) - set(COMPONENTS)):
        raise ValueError(f"unknown components {', '.join(unknown)}: there are {', '.join(COMPONENTS)}")
    for file in (file for component in components for file in encoder_files(config, mode, component)):
        if not file.is_file():
            hint = "fetch it with `mmaudio-hf weights download` or set encoders.weights_dir"
            if config.kind == "toy":
                hint = "`mmaudio-hf extract-video` (or extract-audio) fits it to a recipe's media"
            raise ValueError(f"{file} is missing: {hint}")


def encoder_files(config: EncoderConfig, mode: str, component: str) -> list[Path]:
    """The files of a component below `weights_dir`; CLIP, for "clip" and "text", has a place of its own."""
    if config.kind == "toy":
        return [toy_codec_file(config.weights_dir, mode)] if component in ("latent", "decode") else []
    names = {"sync": [SYNC_FILE], "latent": [VAE_FILES[mode]], "decode": [VAE_FILES[mode], VOCODER_FILES[mode]]}
    return [Path(config.weights_dir) / name for name in names.get(component, [])]


# --- Fingerprints: what made a feature, for manifests and for comparing ----------------------------------------------


def fingerprints(config: EncoderConfig, mode: str, components: Sequence[str] = COMPONENTS) -> dict[str, dict[str, str]]:
    """What made the features: component -> {"id", "fingerprint"}, for people and for comparing.

    The fingerprint depends on the content of the weights and the precision, not on where they are. Reads each file once
    per process. "decode" makes no features and is left out.
    """
    result = {}
    for component in components:
        if component == "decode":
            continue
        files = encoder_files(config, mode, component)
        if config.kind == "toy":
            name, content = f"toy_{component}", " ".join([f"version {toy.VERSION}", *map(_file_hash, files)])
        elif component in ("clip", "text"):
            # A hash of the tensors: the same for a Hub id, a folder and an open_clip checkpoint.
            from mmaudio_hf.features.clip import hash_tensors, weight_files

            name = Path(config.clip).name if Path(config.clip).exists() else config.clip
            content = "tensors " + hash_once(hash_tensors, *weight_files(config.clip))
        else:
            name, content = files[0].name, " ".join(map(_file_hash, files))
        if config.kind == "released" and component != "latent" and config.precision != "fp32":
            name, content = (f"{text} ({config.precision})" for text in (name, content))
        result[component] = {"id": name, "fingerprint": content}
    return result


def decoder_fingerprint(config: EncoderConfig, mode: str) -> str:
    """A hash of the files that decode latents to audio; reads each once per process."""
    version = [f"toy version {toy.VERSION}"] if config.kind == "toy" else []
    return " ".join([*version, *map(_file_hash, encoder_files(config, mode, "decode"))])


_file_hash = partial(hash_once, sha256_of)


# --- Building the networks -------------------------------------------------------------------------------------------


def _toy_networks(config: EncoderConfig, mode: str, device: torch.device, components: set[str]) -> Networks:
    # One by one: they are cheap, and so their results do not depend on the batch by a single bit.
    networks: Networks = {
        "clip": lambda frames: torch.stack([toy.clip_features(video) for video in frames]),
        "sync": lambda frames: torch.stack([toy.sync_features(video) for video in frames]),
        "text": toy.text_features,
    }
    if {"latent", "decode"} & components:
        codec = toy.ToyMelCodec.load(mode, toy_codec_file(config.weights_dir, mode)).to(device)
        spectrogram = MelSpectrogram(mode).to(device)
        networks["latent"] = lambda waveforms: tuple(
            torch.cat(values)
            for values in zip(*(codec.encode(_even(spectrogram(wave[None]))) for wave in waveforms), strict=True)
        )
        networks["decode"] = lambda latent_BNC: toy.mel_to_waveform(codec.decode(latent_BNC), mode)
    return networks


def _released_networks(config: EncoderConfig, mode: str, device: torch.device, components: set[str]) -> Networks:
    networks: Networks = {}
    weights_dir, clip = Path(config.weights_dir), config.clip
    if {"clip", "text"} & components:
        # Here, not above: transformers takes seconds to import and toy recipes do not need it.
        from mmaudio_hf.features.clip import ClipEncoder, ClipTokenizer

        source = Path(clip)
        encoder = ClipEncoder.from_open_clip(source) if source.is_file() else ClipEncoder.from_pretrained(clip)
        encoder = encoder.to(device)
        networks["clip"] = lambda frames: _clip_batch(encoder, frames)
        if "text" in components:
            table = source.parent / BPE_FILE  # belongs into the folder of an open_clip checkpoint
            beside = table if table.is_file() else table.parent
            tokenizer = ClipTokenizer.from_files(beside if source.is_file() else clip)
            networks["text"] = lambda captions: encoder.encode_text(_to_device(tokenizer(captions), device))
    if "sync" in components:
        from mmaudio_hf.features.synchformer import SynchformerVisual

        synchformer = SynchformerVisual().load_released(weights_dir / SYNC_FILE).to(device)
        networks["sync"] = lambda frames: _sync_batch(synchformer, frames)
    if {"latent", "decode"} & components:
        from mmaudio_hf.features.autoencoder import MelVAE

        vae = MelVAE(mode).load_released(weights_dir / VAE_FILES[mode]).to(device)
        spectrogram = MelSpectrogram(mode).to(device)
        networks["latent"] = lambda waveform: vae.encode(_even(spectrogram(waveform)))
    if "decode" in components:
        from mmaudio_hf.features.vocoder import Vocoder

        vocoder = Vocoder(mode).load_released(weights_dir / VOCODER_FILES[mode]).to(device)
        networks["decode"] = lambda latent_BNC: vocoder(vae.decode(latent_BNC))
    return networks


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """To CUDA from pinned memory, so that the host does not wait and prepares what follows."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _clip_batch(encoder: Any, frames: Tensor) -> Tensor:
    """(B, T, 3, 384, 384) -> (B, T, 1024). Few frames at a time become floats: those of a batch would be gigabytes."""
    batches = frames.flatten(0, 1).split(encoder.batch_size)
    features = [encoder.encode_images(_floats(batch, signed=False)) for batch in batches]
    return torch.cat(features).unflatten(0, frames.shape[:2])


def _sync_batch(synchformer: Any, frames: Tensor) -> Tensor:
    """(B, F, 3, 224, 224) -> (B, S, 768). Segments of different videos share a pass; few at a time become floats."""
    from mmaudio_hf.features.synchformer import segment_frames

    segments = [segment for video in frames for segment in segment_frames(video)]  # views
    size = synchformer.segment_batch
    batches = (torch.stack(segments[first : first + size]) for first in range(0, len(segments), size))
    tokens = torch.cat([synchformer(_floats(batch, signed=True)[None])[0] for batch in batches])
    return tokens.unflatten(0, (len(frames), -1))


def _floats(frames: Tensor, signed: bool) -> Tensor:
    if frames.dtype != torch.uint8:
        return frames
    unit = frames.float().div_(255)
    return unit.sub_(0.5).div_(0.5) if signed else unit


def _even(mel: Tensor) -> Tensor:
    """Mel (B, bins, frames) without an odd last frame."""
    return mel[:, :, : mel.shape[2] // LATENT_STRIDE * LATENT_STRIDE]


# --- Fitting the toy codec -------------------------------------------------------------------------------------------


def fit_toy_codec(weights_dir: str | os.PathLike, mode: str, media: Sequence[str | os.PathLike]) -> Path:
    """Fit the toy codec to the audio of `media` (videos or audio files, in this order) and return its file.

    Up to 25 minutes are used, 5 of each file; files that cannot be read are skipped. An existing codec is replaced.
    ValueError when no file has usable audio.
    """
    mels, seconds, spectrogram = [], 0.0, MelSpectrogram(mode)
    for path in media:
        with contextlib.suppress(MediaError):
            waveform, rate = read_waveform(path, _FIT_FILE_SECONDS)
            peak = float(waveform.abs().max())
            if not SILENCE <= peak < math.inf or len(waveform) < rate:
                continue  # less than a second of audio, or samples that are not finite
            waveform = resample(waveform / peak * _FIT_PEAK, rate, spectrogram.mode.sample_rate)
            mels.append(_even(spectrogram(waveform[None]))[0])  # (bins, frames)
            seconds += mels[-1].shape[1] * spectrogram.mode.mel_hop / spectrogram.mode.sample_rate
        if seconds > _FIT_SECONDS:
            break
    if not mels:
        raise ValueError(f"the toy codec cannot be fitted: none of {len(media)} files has usable audio")
    file = toy_codec_file(weights_dir, mode)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_bytes(toy.ToyMelCodec.fit(mode, mels).to_bytes())
    return file
