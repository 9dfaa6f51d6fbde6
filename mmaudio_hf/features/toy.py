"""Toy encoders: fixed formulas in place of the released networks, for trying everything out without a download.

None of them is a neural network or has seen data, except the mel codec, a principal component analysis of the
example's own audio. They have the shapes and rates of the real ones and carry only what each docstring says; a model
trained on them is of use for the example alone. Recipes choose them by `encoders.kind: toy`.
"""

import hashlib
import math
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from mmaudio_hf import schema
from mmaudio_hf.features.autoencoder import mel_filter_bank

VERSION = 2  # part of the fingerprints: raise it whenever a formula below changes

CLIP_GRID, SYNC_GRID = 12, 28  # cells per side
MOTION_GRID = 7
AMOUNTS, CLOCK = 6, 8  # numbers for the motion in a frame, and for the time of a segment
CONTEXT_WEIGHT = 0.7  # of the words so far, in a row of text features
WORD = re.compile(r"[^\W_]+|[^\w\s]")

LATENT_STD = 0.05  # of every latent channel, which themselves have variances near 1
DYNAMIC_RANGE = 3.5  # decades below the loudest mel value; what is quieter counts as silence
GRIFFIN_LIM_STEPS, SPECTRUM_STEPS, SPECTRUM_EPS = 32, 30, 1e-8


def toy_codec_file(weights_dir: str | os.PathLike, mode: str) -> Path:
    """Where the fitted codec of toy recipes is."""
    return Path(weights_dir) / f"toy_codec_{schema.audio_mode(mode).name}.safetensors"


def clip_features(frames: Tensor) -> Tensor:
    """Unit-length features (T, 1024) of frames (T, 3, 384, 384), uint8 or in [0, 1]; carries only their thumbnails.

    12 x 12 mean colours, the contrast in the same cells, and mean and spread of the colours, projected at random.
    """
    cells = _thumbnails(frames, 2 * CLIP_GRID, 0, 255)
    small = F.avg_pool2d(cells, 2)
    contrast = (F.avg_pool2d(cells.square(), 2) - small.square()).clamp(min=0).mean(1).add(1e-6).sqrt()
    overall = torch.cat([small.mean((2, 3)), small.std((2, 3))], dim=1)
    described = torch.cat([(small - 0.5).flatten(1), 2 * contrast.flatten(1), 4 * overall], dim=1)
    return F.normalize(described @ _projection("clip", described.shape[1], schema.CLIP_DIM, described.device), dim=1)


def sync_features(frames: Tensor) -> Tensor:
    """Features (S, 768) of frames (F, 3, 224, 224), uint8 or in [-1, 1]; carries only where and when light changes.

    One token for two frames in the layout of Synchformer: segments of 16 frames, one every 8, 8 tokens each. A token
    has the changes of its own two frames in a 7 x 7 grid, the amount, sign and suddenness of change in every frame of
    its segment, and the start time of the segment.
    """
    luma = _thumbnails(frames, SYNC_GRID, 127.5, 127.5).mean(1, keepdim=True) / 2
    change = torch.diff(luma, dim=0, prepend=luma[:1])
    sudden = torch.diff(change, dim=0, prepend=change[:1])
    # Relative to the usual change in this clip, so that dark and bright, big and small scenes are alike.
    usual = change.square().mean().sqrt() + 1e-3
    change, sudden = change / usual, sudden / usual
    local = torch.cat([F.adaptive_avg_pool2d(change, MOTION_GRID), F.adaptive_avg_pool2d(change.abs(), MOTION_GRID)], 1)
    axes, height = (1, 2, 3), torch.linspace(1, -1, change.shape[2], device=change.device)
    upward = 4 * (change.mean((1, 3)) * height).mean(1)  # motion of light: the first moment along the height
    means = [change.abs().mean(axes), change.mean(axes), sudden.abs().mean(axes), change.amax(axes) / 4]
    amount = torch.stack([*means, upward, torch.diff(upward, prepend=change.new_zeros(1))], dim=1)
    # The amounts are few and tell most; without this the many cells of the grid would drown them.
    amount = amount.asinh()
    amount = amount / (amount.std(0) + 0.02)
    frame_values = (local.flatten(1).asinh(), amount)  # each to (segments, 16, features)
    segments = [
        values.unfold(0, schema.SYNC_SEGMENT_FRAMES, schema.SYNC_HOP_FRAMES).transpose(1, 2) for values in frame_values
    ]
    own = segments[0].unflatten(1, (-1, 2)).flatten(2)
    own_amount = segments[1].unflatten(1, (-1, 2)).flatten(2)
    count, tokens = own.shape[:2]
    around = segments[1].flatten(1)[:, None].expand(count, tokens, -1)
    begin = torch.arange(count, device=frames.device, dtype=torch.float32) * schema.SYNC_HOP_FRAMES / 25
    angle = begin[:, None] * math.pi / torch.tensor([1.0, 2.0, 4.0, 8.0], device=frames.device)
    clock = torch.cat([angle.sin(), angle.cos()], dim=1)[:, None].expand(count, tokens, -1)
    described = torch.cat([own / 2, 2 * own_amount, around, clock], dim=2).flatten(0, 1)
    return described @ _projection("sync", described.shape[1], schema.SYNC_DIM, described.device)


def motion(sync_features: Tensor) -> tuple[Tensor, Tensor]:
    """What `sync_features` (S, 768) say of motion: its amount in every frame (F,), and the size () of local changes.

    The projection is undone, which loses nothing: 312 numbers became 768. Amounts are relative to the clip; the size is
    near 0 where no more changes than noise, and 0.6 to 1 where anything moves.
    """
    cells, amounts = 4 * MOTION_GRID**2, 2 * AMOUNTS
    inputs = cells + amounts + schema.SYNC_SEGMENT_FRAMES * AMOUNTS + CLOCK
    described = sync_features @ _inverse("sync", inputs, schema.SYNC_DIM)
    local = (2 * described[:, :cells]).sinh().unflatten(1, (2, 2, -1))[:, :, 1]  # (S, 2 frames, cells) of magnitudes
    amount = described[:, cells : cells + amounts].unflatten(1, (2, AMOUNTS))[..., 0] / 2
    segments = amount.unflatten(0, (-1, schema.SYNC_SEGMENT_FRAMES // 2))  # half of each is in the one before
    frames = [segments[0].flatten(), segments[1:, schema.SYNC_HOP_FRAMES // 2 :].flatten()]
    return torch.cat(frames), local.square().mean().sqrt()


@lru_cache(maxsize=2)
def _inverse(name: str, inputs: int, outputs: int) -> Tensor:
    return torch.linalg.pinv(_projection(name, inputs, outputs, torch.device("cpu")))


def _thumbnails(frames: Tensor, cells: int, zero: float, one: float) -> Tensor:
    """Mean colours (T, 3, cells, cells) of every second row and column; bytes `zero` and `zero + one` become 0 and 1.

    In small batches, since the floats of a whole clip do not fit any cache.
    """
    batches = []
    for batch in frames[..., ::2, ::2].split(8):
        small = F.avg_pool2d(batch.float(), batch.shape[-1] // cells)
        batches.append((small - zero) / one if frames.dtype == torch.uint8 else small)
    return torch.cat(batches)


def text_features(captions: Sequence[str]) -> Tensor:
    """Unit-length rows (B, 77, 1024); carries only which words a caption has, and their order.

    Row i is the hashed vector of token i (start, words, end, then padding) and of the words up to there, as the later
    rows of a causal text encoder know the earlier ones. Words that differ at all have nothing in common.
    """
    rows = []
    for caption in captions:
        words = WORD.findall(caption.lower())[: schema.TEXT_TOKENS - 2]
        tokens = ["<start>", *words, "<end>"]
        tokens += ["<padding>"] * (schema.TEXT_TOKENS - len(tokens))
        vectors = torch.stack([_word_vector(token) for token in tokens])
        is_word = torch.zeros(schema.TEXT_TOKENS, 1)
        is_word[1 : 1 + len(words)] = 1
        so_far = (vectors * is_word).cumsum(0) / is_word.cumsum(0).clamp(min=1).sqrt()
        positions = torch.stack([_word_vector(f"<place {position}>") for position in range(schema.TEXT_TOKENS)])
        rows.append(F.normalize(vectors + CONTEXT_WEIGHT * so_far + 0.2 * positions, dim=1))
    return torch.stack(rows)


@lru_cache(maxsize=100_000)
def _word_vector(word: str) -> Tensor:
    return F.normalize(_normal(f"word {word}", (schema.TEXT_DIM,)), dim=0)


@lru_cache(maxsize=8)
def _projection(name: str, inputs: int, outputs: int, device: torch.device) -> Tensor:
    return (_normal(f"projection {name}", (inputs, outputs)) / math.sqrt(inputs)).to(device)


def _normal(name: str, shape: tuple[int, ...]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32))


class ToyMelCodec:
    """Mel spectrograms to latents by principal components of patches of two frames; a linear map, nothing learned.

    Has the rates and channels of the mel VAE of `mode`. It carries the spectral envelope in steps of two mel frames, as
    far as the components reach. The components are spread over the channels by an orthonormal cosine transform, so that
    the channels have mean 0 and variances near 1 while distances remain those of mel spectrograms: a network that
    normalises every channel would otherwise spend most of its loss on components that are hardly heard.
    """

    def __init__(self, mode: str, tensors: dict[str, Tensor]):
        self.mode = schema.audio_mode(mode)
        self.tensors = tensors  # floor (), mean (2 bins,), basis (2 bins, C), scale ()

    @classmethod
    def fit(cls, mode: str, mels: Sequence[Tensor]) -> "ToyMelCodec":
        """Codec of log-mel spectrograms, each (bins, frames); the same ones give the same codec."""
        from scipy.fft import dct

        rate = schema.audio_mode(mode)
        size = schema.LATENT_STRIDE * rate.mel_bins
        decade = 1.0 if mode == "16k" else math.log(10)  # of `MelSpectrogram(mode)`
        floor = max(float(mel.max()) for mel in mels) - DYNAMIC_RANGE * decade
        patches = torch.cat([_patches(mel[None].clamp(min=floor)).flatten(0, 1) for mel in mels]).double()
        if len(patches) <= size:
            raise ValueError(f"a toy codec needs more than {size} latent frames of audio, {len(patches)} were given")
        mean = patches.mean(0)
        variance, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        order = torch.arange(size - 1, size - 1 - rate.latent_channels, -1)
        basis = vectors[:, order]
        signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        spread = torch.from_numpy(dct(np.eye(rate.latent_channels), norm="ortho", axis=0))
        scale = variance[order].mean().clamp(min=1e-6).sqrt()
        tensors = {"floor": torch.tensor(floor), "mean": mean, "basis": (basis * signs) @ spread, "scale": scale}
        return cls(mode, {name: value.float().contiguous() for name, value in tensors.items()})

    @classmethod
    def load(cls, mode: str, path: str | Path) -> "ToyMelCodec":
        """Codec from a file of `to_bytes`; ValueError when it is of another mode or damaged."""
        try:
            tensors = load_file(path)
        except Exception as error:
            way = "remove it, it is fitted again by `mmaudio-hf extract-video`"
            raise ValueError(f"{path} is damaged: {way}") from error
        rate = schema.audio_mode(mode)
        size, channels = schema.LATENT_STRIDE * rate.mel_bins, rate.latent_channels
        shapes = {"floor": (), "mean": (size,), "basis": (size, channels), "scale": ()}
        if {name: tuple(value.shape) for name, value in tensors.items()} != shapes:
            raise ValueError(f"{path} is not a toy codec of mode {mode}: remove it, it is fitted again by extraction")
        return cls(mode, tensors)

    def to_bytes(self) -> bytes:
        """Content of a safetensors file."""
        return save(self.tensors)

    def to(self, device: torch.device | str) -> "ToyMelCodec":
        """The codec on another device."""
        return ToyMelCodec(self.mode.name, {name: value.to(device) for name, value in self.tensors.items()})

    def encode(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (B, N, C), of mel (B, bins, 2N)."""
        floor, mean, basis, scale = (self.tensors[name] for name in ("floor", "mean", "basis", "scale"))
        latent_BNC = (_patches(mel.clamp(min=floor)) - mean) @ basis / scale
        return latent_BNC, torch.full_like(latent_BNC, LATENT_STD)

    def decode(self, latent_BNC: Tensor) -> Tensor:
        """Mel (B, bins, 2N) of latents (B, N, C)."""
        floor, mean, basis, scale = (self.tensors[name] for name in ("floor", "mean", "basis", "scale"))
        patches = (latent_BNC.float() * scale) @ basis.T + mean
        return patches.unflatten(2, (schema.LATENT_STRIDE, -1)).flatten(1, 2).transpose(1, 2).clamp(min=floor)


def _patches(mel: Tensor) -> Tensor:
    """(B, bins, 2N) -> (B, N, 2 bins)."""
    return mel.transpose(1, 2).unflatten(1, (-1, schema.LATENT_STRIDE)).flatten(2)


def mel_to_waveform(mel: Tensor, mode: str) -> Tensor:
    """Waveform (B, frames * hop) in [-1, 1] of log-mel (B, bins, frames), with phases by Griffin and Lim (1984).

    Events keep their time: frame i of `MelSpectrogram` is centred half a hop after sample i * hop, frame i of
    GriffinLim on it, so the spectrogram is extended by a frame at both ends and half a hop cut off.
    """
    from torchaudio.transforms import GriffinLim

    rate = schema.audio_mode(mode)
    loudness = (10**mel if mode == "16k" else mel.exp()).clamp(max=1e3)
    magnitude = _linear_spectrum(loudness, mel_filter_bank(mode).to(mel.device))
    vocoder = GriffinLim(
        rate.mel_window, GRIFFIN_LIM_STEPS, hop_length=rate.mel_hop, power=1.0, rand_init=False, momentum=0.9
    ).to(mel.device)
    waveform = vocoder(F.pad(magnitude, (1, 1), mode="replicate"))
    start = rate.mel_hop // 2
    return waveform[:, start : start + mel.shape[2] * rate.mel_hop].clamp(-1, 1)


def _linear_spectrum(mel: Tensor, filter_bank: Tensor) -> Tensor:
    """Magnitudes (B, frequencies, frames) >= 0 that give `mel` (B, bins, frames) >= 0.

    Multiplicative updates of the Kullback-Leibler divergence (Lee and Seung 2001, theorem 2). Least squares go
    negative beside strong lines, and what is then cut off is heard as echoes between the events.
    """
    weight = filter_bank.sum(0)[:, None] + SPECTRUM_EPS
    spectrum = filter_bank.T @ mel + SPECTRUM_EPS
    for _ in range(SPECTRUM_STEPS):
        spectrum = spectrum * (filter_bank.T @ (mel / (filter_bank @ spectrum + SPECTRUM_EPS))) / weight
    return spectrum
