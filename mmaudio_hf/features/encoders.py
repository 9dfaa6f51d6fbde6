"""The frozen encoders and decoders of one audio mode, built in one place for extraction and for generation."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mmaudio_hf.features import toy
from mmaudio_hf.features.mel import MelSpectrogram
from mmaudio_hf.features.toy import toy_codec_file
from mmaudio_hf.media.audio import SILENCE, peak_of, read_waveform, resample
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.schema import LATENT_STRIDE, audio_mode, sequence_lengths

PARTS = ("clip", "sync", "text", "latent", "decode")
KINDS = ("released", "toy")
PRECISIONS = ("fp32", "bf16")

VAE_FILES = {"16k": "v1-16.pth", "44k": "v1-44.pth"}
VOCODER_FILES = {"16k": "best_netG.pt", "44k": "bigvgan_v2_44khz_128band_512x/bigvgan_generator.pt"}
SYNC_FILE = "synchformer_state_dict.pth"
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"

_FIT_SECONDS = 1500  # of sound; more does not change the components
_FIT_PEAK = 0.95


@dataclass(frozen=True)
class Encoders:
    """The networks that were asked for, ready on `device`; made by `load_encoders`.

    All results are float32 on `device`. Pictures are uint8 straight from `read_video(as_uint8=True)`, or floats in the
    ranges of `VideoClip`.
    """

    kind: str
    mode: str
    duration: float
    device: torch.device
    precision: str
    networks: dict[str, Callable]  # part -> function of a batch; "text" takes captions, the others take tensors
    weights_dir: Path
    clip: str

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """`fingerprints` of the loaded parts; read from the files at the first use."""
        where = {"weights_dir": self.weights_dir, "clip": self.clip, "precision": self.precision}
        return fingerprints(self.kind, self.mode, **where, parts=tuple(self.networks))

    @property
    def sample_rate(self) -> int:
        """Hz of waveforms that go in and come out."""
        return audio_mode(self.mode).sample_rate

    @torch.no_grad()
    def encode_clip(self, frames: torch.Tensor) -> torch.Tensor:
        """CLIP features (B, T, 1024) of pictures (B, T, 3, 384, 384)."""
        with self._precision():
            return self._network("clip")(frames.to(self.device)).float()

    @torch.no_grad()
    def encode_sync(self, frames: torch.Tensor) -> torch.Tensor:
        """Sync features (B, S, 768) of 25 fps pictures (B, F, 3, 224, 224)."""
        with self._precision():
            return self._network("sync")(frames.to(self.device)).float()

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> torch.Tensor:
        """Text features (B, 77, 1024)."""
        if isinstance(captions, str):
            raise ValueError("give a list of captions, not one string")
        with self._precision():
            return self._network("text")(list(captions)).float().to(self.device)

    @torch.no_grad()
    def encode_audio(self, waveform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latent, each (B, N, C), of waveforms (B, samples).

        `sequence_lengths(mode, duration).audio_samples` samples give the lengths of the schema.
        """
        return self._network("latent")(waveform.to(self.device))

    @torch.no_grad()
    def decode_latent(self, latent_BNC: torch.Tensor) -> torch.Tensor:
        """Waveforms (B, 2 N hop) in [-1, 1] of latents (B, N, C) that are not normalised."""
        return self._network("decode")(latent_BNC.to(self.device, torch.float32))

    def _network(self, part: str) -> Callable:
        if part not in self.networks:
            raise ValueError(f"the part {part!r} was not loaded: name it in `parts` of load_encoders")
        return self.networks[part]

    def _precision(self):
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def load_encoders(
    kind: str,
    mode: str,
    *,
    weights_dir: str | os.PathLike,
    clip: str,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    parts: Sequence[str] = PARTS,
    duration: float = 8.0,
) -> Encoders:
    """Build the wanted `parts` on `device` ("auto": CUDA if there is any).

    kind "released": the published files below `weights_dir`, and `clip`, a Hub id, a folder of transformers files or
    an open_clip checkpoint. kind "toy": the fixed formulas of `features.toy` and the codec that `fit_toy_codec` left
    in `weights_dir`. precision "bf16" is for the picture and text encoders; the sound is always float32.

    Raises ValueError naming the missing file, before any network is built.
    """
    check_encoders(kind, mode, weights_dir=weights_dir, clip=clip, precision=precision, parts=parts)
    sequence_lengths(mode, duration)
    device = pick_device(device)
    build = _toy_networks if kind == "toy" else _released_networks
    networks = build(mode, Path(weights_dir), clip, device, tuple(parts))
    return Encoders(kind, mode, duration, device, precision, networks, Path(weights_dir), clip)


def pick_device(device: str | torch.device, rank: int = 0) -> torch.device:
    """The device called `device`; "auto" and "cuda" are the CUDA device of process `rank`, "auto" else the CPU."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("encoders.device is cuda, but torch finds no CUDA device: use auto or cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"encoders.device {device!r} is not known to torch: use auto, cpu or cuda") from error


def check_encoders(
    kind: str, mode: str, *, weights_dir, clip: str, precision: str = "fp32", parts: Sequence[str] = PARTS
) -> None:
    """Raise ValueError for a wrong setting or a file that is not there; reads nothing."""
    audio_mode(mode)
    for name, value, options in (("kind", kind, KINDS), ("precision", precision, PRECISIONS)):
        if value not in options:
            raise ValueError(f"encoders.{name} {value!r}: use one of {', '.join(options)}")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"unknown parts {', '.join(unknown)}: there are {', '.join(PARTS)}")
    if kind == "toy" and {"latent", "decode"} & set(parts) and not toy_codec_file(weights_dir, mode).is_file():
        raise ValueError(
            f"{toy_codec_file(weights_dir, mode)} is missing:"
            " `mmaudio-hf extract-video` (or extract-audio) fits it to a recipe's media"
        )
    if kind == "released":
        for part in parts:
            for file in _released_files(part, mode, Path(weights_dir)):
                if not file.is_file():
                    raise ValueError(
                        f"{file} is missing: fetch it with `mmaudio-hf weights download` or set encoders.weights_dir"
                    )


def fingerprints(
    kind: str, mode: str, *, weights_dir, clip: str, precision: str = "fp32", parts: Sequence[str] = PARTS
) -> dict[str, dict[str, str]]:
    """What made the features: part -> {"id", "fingerprint"}, for people and for comparing.

    The fingerprint depends on the content of the weights and the precision, not on where they are. Reads each file once
    per process. "decode" makes no features and is left out.
    """
    prints = {}
    for part in parts:
        if part == "decode":
            continue
        if kind == "toy":
            name, content = f"toy_{part}", f"version {toy.VERSION}"
            if part == "latent":
                content += " " + _file_hash(toy_codec_file(weights_dir, mode))
        elif part in ("clip", "text"):
            name, content = _clip_print(clip)
        else:
            files = _released_files(part, mode, Path(weights_dir))
            name, content = files[0].name, " ".join(_file_hash(file) for file in files)
        if kind == "released" and part != "latent" and precision != "fp32":
            name, content = (f"{text} ({precision})" for text in (name, content))
        prints[part] = {"id": name, "fingerprint": content}
    return prints


def decoder_fingerprint(kind: str, mode: str, *, weights_dir) -> str:
    """A hash of the files that make sound of latents; reads each once per process."""
    files = _released_files("decode", mode, Path(weights_dir))
    if kind == "toy":
        files = [toy_codec_file(weights_dir, mode)]
    return " ".join([f"toy version {toy.VERSION}"] * (kind == "toy") + [_file_hash(file) for file in files])


def fit_toy_codec(weights_dir: str | os.PathLike, mode: str, media: Sequence[str | os.PathLike]) -> Path:
    """Fit the toy codec to the sound of `media` (videos or recordings, in this order) and return its file.

    Up to 25 minutes are used; files that cannot be read are passed over. An existing codec is replaced.
    ValueError when there is no usable sound.
    """
    mels, seconds, spectrogram = [], 0.0, MelSpectrogram(mode)
    for path in media:
        with contextlib.suppress(MediaError):
            mels.append(_fitting_mel(path, mode, spectrogram))
            seconds += mels[-1].shape[1] * spectrogram.mode.mel_hop / spectrogram.mode.sample_rate
        if seconds > _FIT_SECONDS:
            break
    if not mels:
        raise ValueError(f"the toy codec cannot be fitted: none of {len(media)} files has usable sound")
    file = toy_codec_file(weights_dir, mode)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    partial.write_bytes(toy.ToyMelCodec.fit(mode, mels).to_bytes())
    os.replace(partial, file)
    return file


def _fitting_mel(path, mode: str, spectrogram: MelSpectrogram) -> torch.Tensor:
    waveform, rate = read_waveform(path)
    peak = peak_of(waveform, str(path))
    if peak < SILENCE or len(waveform) < rate:
        raise MediaError("silent", f"{path}: has less than a second of sound")
    waveform = resample(waveform / peak * _FIT_PEAK, rate, spectrogram.mode.sample_rate)
    mel = spectrogram(waveform[None])[0]
    return mel[:, : mel.shape[1] // LATENT_STRIDE * LATENT_STRIDE]


def _toy_networks(mode: str, weights_dir: Path, clip: str, device: torch.device, parts) -> dict[str, Callable]:
    # One by one: they are cheap, and so their results do not depend on the batch by a single bit.
    networks = {
        "clip": lambda frames: torch.stack([toy.clip_features(pictures) for pictures in frames]),
        "sync": lambda frames: torch.stack([toy.sync_features(pictures) for pictures in frames]),
        "text": toy.text_features,
    }
    if {"latent", "decode"} & set(parts):
        codec = toy.ToyMelCodec.load(mode, toy_codec_file(weights_dir, mode)).to(device)
        spectrogram = MelSpectrogram(mode).to(device)
        networks["latent"] = lambda waveforms: tuple(
            torch.cat(values)
            for values in zip(*(codec.encode(_even(spectrogram(wave[None]))) for wave in waveforms), strict=True)
        )
        networks["decode"] = lambda latent_BNC: toy.mel_to_waveform(codec.decode(latent_BNC), mode)
    return {part: networks[part] for part in parts}


def _released_networks(mode: str, weights_dir: Path, clip: str, device: torch.device, parts) -> dict[str, Callable]:
    networks: dict[str, Callable] = {}
    if {"clip", "text"} & set(parts):
        # Here, not above: transformers takes seconds to import and toy recipes do not need it.
        from mmaudio_hf.features.clip import ClipEncoder, ClipTokenizer

        source = Path(clip)
        encoder = ClipEncoder.from_open_clip(source) if source.is_file() else ClipEncoder.from_pretrained(clip)
        encoder = encoder.to(device)
        networks["clip"] = lambda frames: _clip_batch(encoder, frames)
        if "text" in parts:
            tokenizer = ClipTokenizer.from_files(_tokenizer_source(clip))
            networks["text"] = lambda captions: encoder.encode_text(tokenizer(captions).to(device))
    if "sync" in parts:
        from mmaudio_hf.features.synchformer import SynchformerVisual

        synchformer = SynchformerVisual().load_released(weights_dir / SYNC_FILE).to(device)
        networks["sync"] = lambda frames: _sync_batch(synchformer, frames)
    if {"latent", "decode"} & set(parts):
        from mmaudio_hf.features.autoencoder import MelVAE

        vae = MelVAE(mode).load_released(weights_dir / VAE_FILES[mode]).to(device)
        spectrogram = MelSpectrogram(mode).to(device)
        networks["latent"] = lambda waveform: vae.encode(_even(spectrogram(waveform)))
    if "decode" in parts:
        from mmaudio_hf.features.vocoder import Vocoder

        vocoder = Vocoder(mode).load_released(weights_dir / VOCODER_FILES[mode]).to(device)
        networks["decode"] = lambda latent_BNC: vocoder(vae.decode(latent_BNC))
    return {part: networks[part] for part in parts}


def _clip_batch(encoder, frames: torch.Tensor) -> torch.Tensor:
    """(B, T, 1024). Few pictures at a time become floats: those of a whole batch would be gigabytes."""
    pictures = frames.flatten(0, 1).split(encoder.batch_size)
    features = [encoder.encode_images(_floats(part, signed=False)) for part in pictures]
    return torch.cat(features).unflatten(0, frames.shape[:2])


def _sync_batch(synchformer, frames: torch.Tensor) -> torch.Tensor:
    """(B, S, 768). Segments of different videos share a pass; few at a time become floats."""
    from mmaudio_hf.features.synchformer import segment_frames

    segments = [segment for pictures in frames for segment in segment_frames(pictures)]  # views
    size = synchformer.segment_batch
    batches = (torch.stack(segments[first : first + size]) for first in range(0, len(segments), size))
    tokens = torch.cat([synchformer(_floats(batch, signed=True)[None])[0] for batch in batches])
    return tokens.unflatten(0, (len(frames), -1))


def _floats(frames: torch.Tensor, signed: bool) -> torch.Tensor:
    """Finish uint8 pictures as `normalize_frames` does: to [-1, 1] when `signed`, else to [0, 1]."""
    if frames.dtype != torch.uint8:
        return frames
    unit = frames.float().div_(255)
    return unit.sub_(0.5).div_(0.5) if signed else unit


def _even(mel: torch.Tensor) -> torch.Tensor:
    return mel[:, :, : mel.shape[2] // LATENT_STRIDE * LATENT_STRIDE]


def _released_files(part: str, mode: str, weights_dir: Path) -> list[Path]:
    vae, vocoder = weights_dir / VAE_FILES[mode], weights_dir / VOCODER_FILES[mode]
    return {"sync": [weights_dir / SYNC_FILE], "latent": [vae], "decode": [vae, vocoder]}.get(part, [])


def _tokenizer_source(clip: str) -> str | Path:
    """The byte-pair table belongs into the folder of an open_clip checkpoint."""
    if not Path(clip).is_file():
        return clip
    table = Path(clip).parent / BPE_FILE
    return table if table.is_file() else table.parent


def _clip_print(clip: str) -> tuple[str, str]:
    """Name of a CLIP model, and a hash of its tensors: the same for a Hub id, a folder and an open_clip checkpoint."""
    from mmaudio_hf.features.clip import hash_tensors, weight_files

    files = weight_files(clip)
    name = Path(clip).name if Path(clip).exists() else clip
    return name, "tensors " + _hash_once(tuple(files), hash_tensors)


_HASHES: dict[tuple, str] = {}  # of this process, by path, size and time of change


def _hash_once(files: tuple[Path, ...], hash_files: Callable[[tuple[Path, ...]], str]) -> str:
    facts = [(file.resolve(), file.stat()) for file in files]
    key = tuple((path, fact.st_size, fact.st_mtime_ns) for path, fact in facts)
    if key not in _HASHES:
        _HASHES[key] = hash_files(files)
    return _HASHES[key]


def _file_hash(file: Path) -> str:
    def sha256(files: tuple[Path, ...]) -> str:
        with open(files[0], "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    return _hash_once((file,), sha256)
