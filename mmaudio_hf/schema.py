"""The contract between the stages: rates, lengths, feature columns and identifiers.

Shape legend, used in names (`latent_BNC`) and docstrings everywhere:

    B batch      N latent length     T CLIP frames     S sync tokens     L text tokens (77)
    C latent channels                D hidden size     H attention heads
"""

import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
LOCK_FILE = "lock"  # in a run folder: locked by the launch that trains it

CLIP_FPS = 8
SYNC_FPS = 25
SYNC_SEGMENT_FRAMES = 16
SYNC_HOP_FRAMES = 8
SYNC_TOKENS_PER_SEGMENT = 8  # 16 frames, temporal stride 2
LATENT_STRIDE = 2  # mel frames per latent frame

CLIP_PIXELS = 384
SYNC_PIXELS = 224

CLIP_DIM = 1024
SYNC_DIM = 768
TEXT_DIM = 1024
TEXT_TOKENS = 77

# Column names of a feature store; the reference implementation uses the same ones.
MEAN = "mean"
STD = "std"
CLIP_FEATURES = "clip_features"
SYNC_FEATURES = "sync_features"
TEXT_FEATURES = "text_features"
VIDEO_COLUMNS = (MEAN, STD, CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES)
AUDIO_COLUMNS = (MEAN, STD, TEXT_FEATURES)

# Verdicts of an audit on a listed item, the most serious first.
_Unusable = Literal["not_found", "unreadable", "no_video", "no_audio", "leakage", "duplicate_id", "duplicate_content"]
_Misleading = Literal["unrelated", "offset", "still", "silent", "damaged", "too_short", "too_long", "odd_duration"]
_Doubtful = Literal["start_gap", "audio_drift", "clipped", "caption_mismatch", "frames_mismatch", "variable_frame_rate"]
_Odd = Literal["audio_tracks", "hdr", "interlaced", "non_square_pixels", "empty_caption", "duplicate_caption"]
AuditVerdict = Literal[_Unusable, _Misleading, _Doubtful, _Odd]


class RunError(RuntimeError):
    """Work cannot continue, and the user's input is not the cause; the message says why and what to do."""


@dataclass(frozen=True)
class AudioSample:
    """Audio to be listened to."""

    name: str  # a plain file name, see `check_id`
    caption: str
    waveform: "torch.Tensor"  # (samples,) float32 in [-1, 1], on the CPU
    sample_rate: int  # Hz


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluator: scores for the log, and audio to listen to."""

    scores: dict[str, float]
    samples: list[AudioSample]


@dataclass(frozen=True)
class AudioMode:
    """One of the two published audio settings (MMAudio, arXiv 2412.15322, section 4.1; docs/media.md)."""

    name: str
    sample_rate: int  # Hz
    mel_hop: int  # samples
    mel_window: int  # samples, also the FFT size
    mel_bins: int
    mel_fmax: int  # Hz
    latent_channels: int


MODES = {
    "16k": AudioMode("16k", 16_000, 256, 1024, 80, 8_000, 20),
    "44k": AudioMode("44k", 44_100, 512, 2048, 128, 22_050, 40),
}

# --- Arguments of what others call -----------------------------------------------------------------------------------

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, with a ValueError that names an argument which is not of its annotated type, NaN, or no path.

    For what other programs call: an operator of torch would end with an error of its own about what it was handed.
    """
    signature, hints = inspect.signature(function), cache(lambda: get_type_hints(function))

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        for name, value in signature.bind(*args, **options).arguments.items():
            known = name in hints() and not str(signature.parameters[name]).startswith("*")
            if known:
                require_type(value, hints()[name], f"{function.__qualname__}: {name}")
            # The suffix of a name is the shape: see the legend at the top.
            if (axes := re.search("_([A-Z]+)$", name)) and value.ndim != len(axes[1]):
                raise ValueError(f"{function.__qualname__}: {name} must have axes {axes[1]}, not {tuple(value.shape)}")
        return function(*args, **options)

    return call


def require_type(value: Any, hint: Any, what: str) -> None:
    """ValueError unless `value`, which is `what` in the message, is of the type `hint`."""
    if not _fits(value, hint):
        if get_origin(hint) is Literal:
            raise ValueError(f"{what} {value!r}: use one of {', '.join(map(str, get_args(hint)))}")
        words = re.sub(r"\w+\.|<class '|'>", "", str(hint))
        words = "an array of numbers" if "_SupportsArray" in words else words
        words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}.get(words, words)
        given = " ".join(repr(value).split())[:80]  # a tensor is shown on several lines
        raise ValueError(f"{what} must be {words}, not {given}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`; of a list the first entry counts, and NaN is no number."""
    kind, entries = get_origin(hint) or hint, get_args(hint)
    if "_SupportsArray" in str(hint):  # ArrayLike: numpy is not imported for its name alone
        return sys.modules["numpy"].asarray(value).dtype.kind in "biuf"
    if kind in (Union, UnionType):
        fits = any(_fits(value, entry) for entry in entries)
        if {Path, os.PathLike} & set(entries) and isinstance(value, str):
            return fits and bool(value.strip()) and all(len(os.fsencode(name)) < 256 for name in Path(value).parts)
        return fits
    if kind is Literal:
        return value in entries
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and abs(value) < 2**63 and value == value  # not NaN
    if kind is Any or not isinstance(kind, type):  # a type variable
        return True
    if kind is tuple:
        types = entries[:1] * len(value) if isinstance(value, tuple) and entries[-1] is Ellipsis else entries
        return isinstance(value, tuple) and len(value) == len(types) and all(map(_fits, value, types))
    if kind is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and (not value or _fits(value[0], entries[0]))
    return isinstance(value, kind)


@checked
def audio_mode(name: str) -> AudioMode:
    """Return the audio mode called `name` ("16k" or "44k"); ValueError for any other name."""
    if name not in MODES:
        raise ValueError(f"unknown audio mode {name!r}: use one of {', '.join(MODES)}")
    return MODES[name]


@dataclass(frozen=True)
class SequenceLengths:
    """Token counts of one clip, and the exact audio length that yields them."""

    latent: int  # N
    clip: int  # T, also the number of frames at 8 fps
    sync: int  # S
    sync_frames: int  # frames read at 25 fps
    audio_samples: int


@checked
def sequence_lengths(mode: str, duration: float = 8.0) -> SequenceLengths:
    """Lengths of a clip of `duration` seconds. ValueError when it is too short for one sync segment (0.64 s).

    Double arithmetic, evaluated left to right as in the reference: other orders move the ceilings at some durations.
    """
    rate = audio_mode(mode)
    latent = math.ceil(duration * rate.sample_rate / rate.mel_hop / LATENT_STRIDE)
    segments = math.floor((duration * SYNC_FPS - SYNC_SEGMENT_FRAMES) / SYNC_HOP_FRAMES) + 1
    if segments < 1:
        raise ValueError(f"duration {duration} s is shorter than one sync segment of 0.64 s")
    return SequenceLengths(
        latent=latent,
        clip=int(duration * CLIP_FPS),
        sync=segments * SYNC_TOKENS_PER_SEGMENT,
        sync_frames=int(duration * SYNC_FPS),
        audio_samples=latent * rate.mel_hop * LATENT_STRIDE,
    )


def duration_of(mode: str, latent: int, clip: int = 0, sync: int = 0) -> float | None:
    """The roundest number of seconds that gives these lengths (0: any); None: there is none of three decimals."""
    rate = audio_mode(mode)
    frame = (
        rate.mel_hop * LATENT_STRIDE / rate.sample_rate
    )  # s of a latent: N of them are more than N - 1 and at most N
    for tenth in (1, 10, 100, 1000):
        for number in range(int(latent * frame * tenth + 1e-6), int((latent - 1) * frame * tenth), -1):
            with suppress(ValueError):  # shorter than a sync segment
                lengths = sequence_lengths(mode, number / tenth)
                if (lengths.latent, clip or lengths.clip, sync or lengths.sync) == (latent, lengths.clip, lengths.sync):
                    return number / tenth
    return None


def column_shapes(mode: str, duration: float = 8.0, *, video: bool = True) -> dict[str, tuple[int, int]]:
    """Shape of one row of every stored column: `{"mean": (N, C), ...}`, in storage order."""
    lengths = sequence_lengths(mode, duration)
    latent = (lengths.latent, audio_mode(mode).latent_channels)
    shapes = {
        MEAN: latent,
        STD: latent,
        CLIP_FEATURES: (lengths.clip, CLIP_DIM),
        SYNC_FEATURES: (lengths.sync, SYNC_DIM),
        TEXT_FEATURES: (TEXT_TOKENS, TEXT_DIM),
    }
    return {name: shapes[name] for name in (VIDEO_COLUMNS if video else AUDIO_COLUMNS)}


def check_id(item_id: str, source: str = "") -> str:
    """Return `item_id` when it is a plain file name; ValueError otherwise.

    Ids come from downloaded files and end up in paths, so `..`, separators, control characters and over-long names are
    rejected before anything is opened. `source` names the file and row in the message.
    """
    where = f" ({source})" if source else ""
    if not item_id or item_id != item_id.strip():
        raise ValueError(f"id {item_id!r} is empty or has outer white space{where}")
    if item_id in (".", "..") or PurePosixPath(item_id).name != item_id or "\\" in item_id:
        raise ValueError(f"id {item_id!r} is not a plain name: separators and '..' are not allowed{where}")
    if any("\ud800" <= c <= "\udfff" for c in item_id):  # how Python reads such bytes of a file system
        raise ValueError(f"id {item_id!r} has bytes that are not UTF-8{ascii(where)[1:-1]}")
    if any(ord(c) < 32 or ord(c) == 127 for c in item_id) or len(item_id.encode()) > 200:
        raise ValueError(f"id {item_id!r} has control characters or more than 200 bytes{where}")
    return item_id


# How long processes wait for each other: one may fetch gigabytes or compute scores alone meanwhile. When one dies, the
# launcher ends them all long before this.
PROCESS_TIMEOUT = timedelta(hours=6)

HUB_PREFIX = "hub://"  # prefix of a Hub repository where a folder could be meant
_HUB_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"


def split_hub_id(text: str) -> tuple[str, str | None]:
    """Repository and revision (None: the newest) of `owner/name[@revision]`; ValueError for anything else.

    A revision is a branch, a tag or a commit.
    """
    repo, at, revision = text.partition("@")
    name = re.fullmatch(rf"{_HUB_NAME}/{_HUB_NAME}", repo) and not re.search(r"--|\.\.", repo)
    if not name or (at and not re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9_./-]*[A-Za-z0-9_])?", revision)):
        raise ValueError(f"{text!r} is not a repository of the Hub: write owner/name or owner/name@revision")
    return repo, revision or None
