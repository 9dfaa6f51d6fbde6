"""Synthesised example media: short videos of visible events with their audio, and audio files with captions.

The set is small, made from a seed by numpy alone, and needs no download, yet it has what the real task has:
frames show which audio is right (four kinds of event) and when it happens (irregular times). Every event falls on
a frame of the 25 fps video, and its audio starts at that frame's presentation time.

    DIR/videos/*.mp4               H.264 + AAC, 128x96, 25 fps, 8.4-9.4 s, all splits in one folder
    DIR/{train,val,test}.tsv       id, label
    DIR/audios/*.flac, audios.tsv  20-22 s, id, caption
    DIR/events.json                id -> kind and event times in seconds, for every video and audio file
"""

import csv
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from scipy.signal import lfilter

from mmaudio_hf.files import add_path_to_oserror
from mmaudio_hf.media.audio import audio_frame, write_audio

FPS = 25
WIDTH, HEIGHT = 128, 96
SPLITS = {"train": 56, "val": 8, "test": 12}
AUDIO_FILES = 12
SMALL_SPLITS = {"train": 8, "val": 2, "test": 2}
SMALL_AUDIO_FILES = 3

_Y, _X = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
_COLOURS = {
    "red": (210, 50, 45),
    "green": (60, 170, 70),
    "blue": (60, 90, 210),
    "yellow": (220, 190, 50),
    "orange": (230, 130, 40),
    "purple": (150, 70, 180),
}
_FLASH = (255, 250, 225)


@dataclass(frozen=True)
class Events:
    """What happens in one file: the kind of event and the times of its onsets in seconds, ascending."""

    kind: str
    times: tuple[float, ...]


@dataclass(frozen=True)
class _Style:
    """Everything that varies between two videos of one kind."""

    colour: tuple[int, int, int]
    background: np.ndarray  # (H, W, 3) float32, 0..255
    size: float  # about 1
    shift: float  # -1..1, horizontal position
    drift: float  # -1..1, slow sideways motion


@dataclass(frozen=True)
class _AudioFault:
    """What is wrong or hard about the audio and the frames of a video."""

    offset: float = 0.0  # s that it is late
    kind: str = ""  # of another schedule; empty: that of the frames
    noise: float = 6e-4
    hard: bool = False
    still: bool = False  # the frames do not move


@dataclass(frozen=True)
class _Moment:
    phase: float  # 0 at the last event, 1 at the next
    gap: float  # seconds between the two
    since: int  # frames since the last event; 0 is the frame of the event
    time: float  # seconds from the start


@dataclass(frozen=True)
class _Kind:
    synthesize: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    draw: Callable[[np.ndarray, _Style, _Moment], None] | None = None  # None: in audio files only
    delays: tuple[float, ...] = (0.0,)  # s from what is seen to what is heard; several: it is heard as often


def write_example_media(directory: str | os.PathLike, seed: int = 0, *, small: bool = False) -> Path:
    """Write the example set below `directory` and return it; the same seed gives the same bytes on one machine.

    76 videos (56 train, 8 val, 12 test) and 12 audio files, about 8 MB, 25 s of one core;
    `small=True` gives 8 + 2 + 2 videos and 3 audio files for tests. Files of an earlier call are replaced.
    """
    directory, events, rows = Path(directory), dict[str, Events](), list[tuple[str, str]]()
    (directory / "audios").mkdir(parents=True, exist_ok=True)
    for index, (split, count) in enumerate((SMALL_SPLITS if small else SPLITS).items()):
        events |= _write_split(directory, split, [_SEEN[number % len(_SEEN)] for number in range(count)], [seed, index])
    heard = [name for name in _KINDS if name not in WITHHELD]
    for number in range(SMALL_AUDIO_FILES if small else AUDIO_FILES):
        name, rng = heard[number % len(heard)], np.random.default_rng([seed, len(SPLITS), number])
        item_id, rate = f"recording_{number:02d}_{name}", (44_100, 32_000)[number % 2]
        num_frames = int(rng.integers(20 * FPS, 22 * FPS))
        times = tuple(frame / FPS for frame in _schedule(num_frames, rng)[1:-1])
        track = _audio_track(name, times, num_frames * rate // FPS, rate, rng, noise=0)
        write_audio(directory / "audios" / f"{item_id}.flac", torch.from_numpy(track), rate)
        caption = _CAPTIONS[name][int(rng.integers(len(_CAPTIONS[name])))]
        rows.append((item_id, caption.format(colour=list(_COLOURS)[int(rng.integers(len(_COLOURS)))])))
        events[item_id] = Events(name, times)
    _write_tsv(directory / "audios.tsv", ("id", "caption"), rows)
    return _write_events(directory, events)


def write_withheld_media(directory: str | os.PathLike, kind: str, splits: Mapping[str, int], seed: int = 0) -> Path:
    """Write videos of a kind that `write_example_media` has not, to try what fine-tuning learns; return `directory`.

    kind: one of `WITHHELD`. It is seen, heard and timed as no other: it is heard some tenths of a second after it is
    seen. splits: name -> number of videos. The layout is that of `write_example_media`, without audio files.
    """
    directory, events = Path(directory), dict[str, Events]()
    for index, (split, count) in enumerate(splits.items(), len(SPLITS) + 1):
        events |= _write_split(directory, split, [kind] * count, [seed, index])
    return _write_events(directory, events)


def write_faulty_media(
    directory: str | os.PathLike, splits: Mapping[str, int], *, share: float = 0.3, hard: bool = True, seed: int = 0
) -> Path:
    """Write videos of the kinds of `write_example_media`, some of them with a wrong audio; return `directory`.

    share: of the first split, the others are as they should be. Half of these have their audio 0.2 to 1 s early or
    late, the others that of another schedule and kind. hard: noise in frames and audio, one event from off-screen to
    three of the video, one in seven that is not heard, and one video in ten that does not move, whatever is heard.
    `faults.json` is id -> {"fault": "", "offset", "unrelated" or "still", "offset": seconds that the audio is late}.
    """
    directory, faults, events = Path(directory), dict[str, dict[str, Any]](), dict[str, Events]()
    for index, (split, count) in enumerate(splits.items()):
        rng, audios = np.random.default_rng([seed, 2 * len(SPLITS), index]), []
        wrong = rng.permutation(count)[: 0 if index else round(share * count)].tolist()
        for number in range(count):
            fault = "" if number not in wrong else ("offset", "unrelated")[wrong.index(number) % 2]
            audio = _AudioFault(
                float(rng.uniform(0.2, 1) * rng.choice([-1, 1])) if fault == "offset" else 0.0,
                str(rng.choice(_SEEN)) if fault == "unrelated" else "",
                float(rng.choice([6e-4, 0.01, 0.03])) if hard else 6e-4,
                hard,
                hard and not fault and number % 7 == 3,
            )
            audios.append(audio)
            fault = fault or ("still" if audio.still else "")
            faults[f"{split}_{number:03d}"] = {"fault": fault, "offset": audio.offset}
        kinds = [_SEEN[number % len(_SEEN)] for number in range(count)]
        events |= _write_split(directory, split, kinds, [seed, 2 * len(SPLITS), index], audios)
    (directory / "faults.json").write_text(json.dumps(faults, indent=1) + "\n", encoding="utf-8")
    return _write_events(directory, events)


def read_events(path: str | os.PathLike) -> dict[str, Events]:
    """Read `events.json`: id -> `Events`, for the videos and the audio files. ValueError for another file."""
    try:
        listing = json.loads(Path(path).read_text(encoding="utf-8"))
        return {item_id: Events(entry["kind"], tuple(entry["times"])) for item_id, entry in listing.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the events.json of example media ({type(error).__name__}: {error})") from error


def _write_split(
    directory: Path, split: str, kinds: Sequence[str], seed: Sequence[int], audios: "Sequence[_AudioFault]" = ()
) -> dict[str, Events]:
    """Write one video of each of `kinds` and their list; their events by id. Names of faulty ones have no kind."""
    rows, events = [], {}
    (directory / "videos").mkdir(parents=True, exist_ok=True)
    for number, kind in enumerate(kinds):
        item_id = f"{split}_{number:03d}" if audios else f"{split}_{number:02d}_{kind}"
        rng, audio = np.random.default_rng([*seed, number]), audios[number] if audios else _AudioFault()
        caption, times = _write_video(directory / "videos" / f"{item_id}.mp4", kind, number, rng, audio)
        rows.append((item_id, caption))
        events[item_id] = Events(kind, times)
    _write_tsv(directory / f"{split}.tsv", ("id", "label"), rows)
    return events


def _write_events(directory: Path, events: Mapping[str, Events]) -> Path:
    listing = {item_id: {"kind": e.kind, "times": e.times} for item_id, e in events.items()}
    (directory / "events.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    return directory


def _write_video(
    path: Path, kind: str, number: int, rng: np.random.Generator, audio: _AudioFault
) -> tuple[str, tuple[float, ...]]:
    num_frames = int(rng.integers(210, 236))
    schedule = _schedule(num_frames, rng)
    name, (top, bottom) = list(_COLOURS)[int(rng.integers(len(_COLOURS)))], rng.uniform(25, 110, (2, 3))
    slope = (_Y / HEIGHT)[..., None]
    wave = 8 * np.sin(_X * rng.uniform(0.03, 0.2) + _Y * rng.uniform(0.03, 0.2) + rng.uniform(0, 6))
    background = (top * (1 - slope) + bottom * slope + wave[..., None]).astype(np.float32)
    style = _Style(_COLOURS[name], background, *(float(x) for x in rng.uniform((0.85, -1, -1), (1.2, 1, 1))))
    rate = (44_100, 48_000)[number // 4 % 2]
    heard = [frame / FPS + delay for frame in schedule[1:-1] for delay in _KINDS[kind].delays]
    times = tuple(round(time, 6) for time in heard if time < num_frames / FPS)
    heard = [frame / FPS for frame in _schedule(num_frames, rng)[1:-1]] if audio.kind else list(times)
    heard = [time + audio.offset for time in heard if 0 <= time + audio.offset < num_frames / FPS - 0.1]
    if audio.hard:
        heard = [time for time in heard if rng.random() > 1 / 7]
    mono = _audio_track(audio.kind or kind, heard, num_frames * rate // FPS, rate, rng, audio.noise)
    if audio.hard:
        others = rng.uniform(0, num_frames / FPS - 0.1, len(heard) // 3)
        mono += _audio_track(str(rng.choice(["clap", "drop"])), others, mono.size, rate, rng, 0.0) * 0.5
    balance = float(rng.uniform(0.5, 1))
    channels = np.stack([mono, mono * balance]) if number // 8 % 2 == 0 else mono[None]
    _write_mp4(path, _draw_frames(kind, style, schedule, num_frames, audio, rng), channels, rate)
    caption = _CAPTIONS[kind][int(rng.integers(len(_CAPTIONS[kind])))]
    return caption.format(colour=name), times


def _schedule(num_frames: int, rng: np.random.Generator) -> list[int]:
    """Frame numbers of the events, 0.5-1.5 s apart, between one silent event before and one after the video."""
    frames = [int(rng.integers(8, 20))]
    while (following := frames[-1] + int(rng.integers(13, 38))) < num_frames - 12:
        frames.append(following)
    return [frames[0] - int(rng.integers(28, 38)), *frames, max(following, num_frames + 4)]


# Frames. A shape is a region of the image and its coverage there: 0..1, with a soft edge one pixel wide.
_Shape = tuple[tuple[slice, slice], np.ndarray]


def _draw_frames(
    kind: str, style: _Style, schedule: list[int], num_frames: int, audio: _AudioFault, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) uint8 of one video; of a hard one with noise, the first again and again if still."""
    last, draw, strength = 0, _KINDS[kind].draw, float(rng.uniform(0, 6)) if audio.hard else 0.0
    assert draw is not None, "the kind is seen"
    for frame in range(num_frames):
        if not (audio.still and frame):
            last += schedule[last + 1] <= frame
            gap, since = schedule[last + 1] - schedule[last], frame - schedule[last]
            image = style.background.copy()
            draw(image, style, _Moment(since / gap, gap / FPS, since, frame / FPS))
            drawn = np.clip(image, 0, 255).astype(np.uint8)
        if audio.hard:
            noise = strength * rng.standard_normal(drawn.shape, np.float32)
            yield np.clip(drawn + noise, 0, 255).astype(np.uint8)
        else:
            yield drawn


def _box(x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
    rows, columns = (max(0, int(y0) - 2), max(0, int(y1) + 3)), (max(0, int(x0) - 2), max(0, int(x1) + 3))
    return slice(*rows), slice(*columns)


def _ellipse(x: float, y: float, rx: float, ry: float) -> _Shape:
    box = _box(x - rx, y - ry, x + rx, y + ry)
    distance = np.sqrt(((_X[box] - x) / rx) ** 2 + ((_Y[box] - y) / ry) ** 2)
    return box, np.clip((1 - distance) * min(rx, ry) + 0.5, 0, 1)


def _bar(x0: float, y0: float, x1: float, y1: float, radius: float) -> _Shape:
    """Segment from (x0, y0) to (x1, y1) with round ends."""
    box = _box(min(x0, x1) - radius, min(y0, y1) - radius, max(x0, x1) + radius, max(y0, y1) + radius)
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((_X[box] - x0) * dx + (_Y[box] - y0) * dy) / (dx * dx + dy * dy + 1e-6), 0, 1)
    distance = np.sqrt((_X[box] - x0 - along * dx) ** 2 + (_Y[box] - y0 - along * dy) ** 2)
    return box, np.clip(radius - distance + 0.5, 0, 1)


def _paint(image: np.ndarray, shape: _Shape, colour: Sequence[float] | np.ndarray, opacity: float = 1.0) -> None:
    box, mask = shape
    if opacity > 0.01:
        image[box] += opacity * mask[..., None] * (np.asarray(colour, np.float32) - image[box])


def _flash(moment: _Moment) -> float:
    """Strength of the light of an impact: 1 in the frame of the event, gone after about five."""
    return math.exp(-moment.since / 1.3)


def _draw_ball(image: np.ndarray, style: _Style, moment: _Moment) -> None:
    """A ball in free flight between two impacts; the longer the gap the higher it rises."""
    floor, radius = 82, 9 * style.size
    height = min(58.0, 14 + 26 * moment.gap**2) * 4 * moment.phase * (1 - moment.phase)
    squash = 0.45 * max(0.0, 1 - moment.since / 2) if moment.since < 2 else 0.0
    x = 64 + 22 * style.shift + 20 * math.sin(0.5 * moment.time + 3 * style.drift)
    y = floor - radius * (1 - squash) - height
    image[floor:] *= 0.55
    _paint(image, _ellipse(x, floor + 3, radius * 1.2, 2.5), (10, 10, 10), 0.5)
    dust = _flash(moment)
    for side in (-1, 1):
        _paint(image, _ellipse(x + side * (radius + 6 + 3 * moment.since), floor - 3, 8, 4), _FLASH, dust)
    _paint(image, _ellipse(x, y, radius * (1 + squash), radius * (1 - squash)), style.colour)
    _paint(image, _ellipse(x - radius / 3, y - radius / 3, radius / 4, radius / 4), (255, 255, 255), 0.6)


def _draw_lamp(image: np.ndarray, style: _Style, moment: _Moment) -> None:
    """A hanging signal lamp that sways a little and flashes."""
    glow = _flash(moment)
    x = 64 + 26 * style.shift + 5 * math.sin(1.7 * moment.time + 3 * style.drift)
    y, radius = 44, 13 * style.size
    if glow > 0.01:
        image += 70 * glow * np.exp(-((_X - x) ** 2 + (_Y - y) ** 2) / 2500)[..., None]
    _paint(image, _bar(64 + 26 * style.shift, 0, x, y - radius, 1), (20, 20, 20))
    _paint(image, _ellipse(x, y, radius + 2, radius + 2), (25, 25, 25))
    dim = 0.45 * np.asarray(style.colour, np.float32)
    _paint(image, _ellipse(x, y, radius, radius), dim + glow * (np.asarray(_FLASH) - dim))


def _draw_pendulum(image: np.ndarray, style: _Style, moment: _Moment) -> None:
    """A pendulum that swings away from a bell and comes back to strike it."""
    side = 1 if style.drift > 0 else -1
    pivot_x, length = 64 + 14 * style.shift, 58 * style.size
    angle = side * (0.5 * math.cos(2 * math.pi * moment.phase) - 0.05)
    struck = side * 0.45
    bell_x, bell_y = pivot_x + length * math.sin(struck) + side * 15, 4 + length * math.cos(struck)
    ring = _flash(moment)
    shake = 2.5 * side * ring
    _paint(image, _ellipse(bell_x, bell_y, 24, 24), _FLASH, ring)
    _paint(image, _ellipse(bell_x + shake, bell_y, 9, 11), (175, 145, 60))
    _paint(image, _bar(bell_x + shake - 11, bell_y + 11, bell_x + shake + 11, bell_y + 11, 2), (140, 115, 45))
    bob = pivot_x + length * math.sin(angle), 4 + length * math.cos(angle)
    _paint(image, _bar(pivot_x, 4, *bob, 1.2), (15, 15, 15))
    _paint(image, _ellipse(*bob, 8 * style.size, 8 * style.size), style.colour)


def _draw_hammer(image: np.ndarray, style: _Style, moment: _Moment) -> None:
    """A hammer that is lifted slowly and falls fast onto an anvil, with sparks."""
    side = 1 if style.drift > 0 else -1
    x, y = 64 + 18 * style.shift, 70
    lift = min(1.25, 0.5 + 0.7 * moment.gap) * math.sin(math.pi * moment.phase**2.5)
    pivot_x, pivot_y, length = x - side * 46 * style.size, y - 8, 46 * style.size
    head = pivot_x + side * length * math.cos(lift), pivot_y - length * math.sin(lift)
    _paint(image, _bar(x - 15, y + 6, x + 15, y + 6, 6), (70, 72, 78))
    _paint(image, _bar(x, y + 12, x, HEIGHT, 8), (55, 57, 62))
    sparks = _flash(moment)
    for n in range(7):
        reach = 10 + 7 * moment.since + 3 * (n % 3)
        spark = x + reach * math.cos(0.45 * n + 0.2), y - reach * math.sin(0.45 * n + 0.2)
        _paint(image, _ellipse(*spark, 3, 3), (255, 225, 120), sparks)
    _paint(image, _ellipse(x, y, 16, 8), _FLASH, sparks)
    _paint(image, _bar(pivot_x, pivot_y, *head, 2), (120, 85, 50))
    across = 7 * math.sin(lift) * side, 7 * math.cos(lift)
    ends = head[0] - across[0], head[1] - across[1], head[0] + across[0], head[1] + across[1]
    _paint(image, _bar(*ends, 5), style.colour)


def _draw_storm(image: np.ndarray, style: _Style, moment: _Moment) -> None:
    """A cloud over a hill; lightning strikes the hill, a different bolt each time."""
    light = _flash(moment)
    x = 64 + 24 * style.shift + 8 * math.sin(0.4 * moment.time + 3 * style.drift)
    image += 60 * light
    _paint(image, _ellipse(64 + 24 * style.shift, 108, 60, 30), 0.5 * np.asarray(style.colour, np.float32))
    bends = np.random.default_rng(round(1000 * moment.gap)).uniform(-12, 12, 4)
    points = [(x, 26.0), *((x + bend, 36.0 + 10 * i) for i, bend in enumerate(bends)), (x, 80.0)]
    for start, end in itertools.pairwise(points):
        _paint(image, _bar(*start, *end, 2), _FLASH, light)
    for side in (-1, 0, 1):
        _paint(image, _ellipse(x + 18 * side, 20 - 4 * (side == 0), 20 * style.size, 11), (90, 92, 105))


def _draw_frog(image: np.ndarray, style: _Style, moment: _Moment) -> None:
    """A frog on a leaf that blows up its throat, and lets it go down slowly."""
    swollen = math.exp(-moment.since / 8)
    x, y = 64 + 24 * style.shift + 3 * math.sin(1.1 * moment.time + 3 * style.drift), 62
    _paint(image, _ellipse(x, y + 16, 34, 5), (40, 90, 45))
    _paint(image, _ellipse(x, y, 22 * style.size, 14), style.colour)
    for side in (-1, 1):
        _paint(image, _ellipse(x + 12 * side, y - 14, 5, 5), style.colour)
        _paint(image, _ellipse(x + 12 * side, y - 15, 2, 2), (15, 15, 15))
    _paint(image, _ellipse(x, y + 7, 6 + 14 * swollen, 4 + 11 * swollen), (235, 225, 190))


# Audio. Each takes times t (samples,) in seconds from the onset, a pitch factor and a generator. All start at full
# strength: a noise burst for the attack, then a body that falls below -25 dB within half a second.


def _burst(t: np.ndarray, decay: float, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(t.size) * np.exp(-t / decay)


def _partials(t: np.ndarray, frequencies: Sequence[float], decays: Sequence[float]) -> np.ndarray:
    partials = [np.sin(2 * np.pi * f * t) * np.exp(-t / d) for f, d in zip(frequencies, decays, strict=True)]
    return np.sum(partials, axis=0)


def _thump(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    glide = 2 * np.pi * pitch * (150 * t - 100 * 0.05 * np.exp(-t / 0.05))  # 250 Hz falling to 150 Hz
    return np.sin(glide - glide[0]) * np.exp(-t / 0.08) + 0.35 * _burst(t, 0.006, rng)


def _beep(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    held = np.minimum(1, np.exp(-(t - 0.12) / 0.03))
    tone = np.sin(2 * np.pi * 1400 * pitch * t) + np.sin(2 * np.pi * 4200 * pitch * t) / 3
    return 0.7 * tone * held + 0.4 * _burst(t, 0.003, rng)


def _bell(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    body = _partials(t, [620 * pitch, 1711 * pitch, 3348 * pitch], [0.16, 0.11, 0.07])
    return 0.5 * body + 0.3 * _burst(t, 0.004, rng)


def _clank(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    body = _partials(t, [2150 * pitch, 3270 * pitch, 4790 * pitch, 6120 * pitch], [0.05, 0.04, 0.04, 0.03])
    return 0.3 * body + 0.45 * _burst(t, 0.022, rng)


def _clap(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    return _burst(t, 0.03, rng) * (0.4 + 0.6 * np.cos(2 * np.pi * 1500 * pitch * t))


def _drop(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    return np.sin(2 * np.pi * pitch * (500 * t + 4000 * t**2)) * np.exp(-t / 0.05) + 0.2 * _burst(t, 0.003, rng)


def _thunder(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A crack, and a rumble below some hundred Hz: noise through a filter of one pole."""
    rumble = lfilter([1.0], [1.0, -math.exp(-2 * math.pi * 220 * pitch * t[1])], rng.standard_normal(t.size))
    return 0.12 * rumble * np.exp(-t / 0.14) + 0.25 * _burst(t, 0.012, rng)


def _croak(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """Pulses at 70 Hz of a resonance at 900 Hz, for a tenth of a second."""
    pulses = np.exp(-np.mod(t, 1 / (70 * pitch)) / 0.004)
    held = np.minimum(1, np.exp(-(t - 0.09) / 0.02))
    voice = np.sin(2 * np.pi * 900 * pitch * t) + 0.5 * np.sin(2 * np.pi * 2300 * pitch * t)
    return held * (0.6 * pulses * voice + 0.1 * rng.standard_normal(t.size))


_KINDS = {
    "ball": _Kind(_thump, _draw_ball),
    "lamp": _Kind(_beep, _draw_lamp),
    "pendulum": _Kind(_bell, _draw_pendulum),
    "hammer": _Kind(_clank, _draw_hammer),
    "clap": _Kind(_clap),
    "drop": _Kind(_drop),
    "storm": _Kind(_thunder, _draw_storm, (0.16,)),
    "frog": _Kind(_croak, _draw_frog, (0.2, 0.4)),
}
WITHHELD = ("storm", "frog")  # in no set of `write_example_media`
_SEEN = [name for name, kind in _KINDS.items() if kind.draw and name not in WITHHELD]
_CAPTIONS = {
    "ball": (
        *("a {colour} ball bouncing on the floor", "a rubber ball hits the floor with a dull thump"),
        "{colour} ball bouncing, deep thuds",
    ),
    "lamp": (
        *("a {colour} lamp flashing with an electronic beep", "a signal light flashes and beeps"),
        "{colour} warning light, beeping",
    ),
    "pendulum": (
        *("a {colour} pendulum striking a bell", "a bell rings when the pendulum hits it"),
        "{colour} pendulum swings, bell ringing",
    ),
    "hammer": (
        *("a {colour} hammer striking an anvil", "hammering on metal, sharp clanks and sparks"),
        "{colour} hammer hits iron, metallic clank",
    ),
    "clap": ("slow hand claps", "a person clapping now and then"),
    "drop": ("water dripping into a bucket", "single water drops"),
    "storm": ("lightning over a {colour} hill, thunder", "a thunderstorm, thunder cracks and rumbles"),
    "frog": ("a {colour} frog croaking on a leaf", "{colour} frog blows up its throat and croaks"),
}


def _audio_track(
    kind: str, times: Iterable[float], num_samples: int, rate: int, rng: np.random.Generator, noise: float = 6e-4
) -> np.ndarray:
    """One channel (num_samples,) float32 with the kind's audio at every time, peak 0.8, over quiet noise."""
    track = np.zeros(num_samples)
    pitch = float(rng.uniform(0.9, 1.1))
    for time in times:
        onset = round(time * rate)
        t = np.arange(min(round(0.8 * rate), num_samples - onset)) / rate
        track[onset : onset + t.size] += rng.uniform(0.7, 1.0) * _KINDS[kind].synthesize(t, pitch, rng)
    track *= 0.8 / max(np.abs(track).max(), 1e-9)
    return (track + noise * rng.standard_normal(num_samples)).astype(np.float32)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], channels: np.ndarray, rate: int) -> None:
    with add_path_to_oserror(path), av.open(str(path), "w", format="mp4") as container:
        # One thread: with more, x264 may not give the same bytes twice.
        options = {"preset": "veryfast", "crf": "27", "threads": "1"}
        size: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "pix_fmt": "yuv420p"}
        video = container.add_stream("libx264", rate=FPS, options=options, **size)
        samples = audio_frame(torch.from_numpy(channels), rate, "fltp")
        # The fast coder: the default one takes longer than all the rest of this file.
        options = {"aac_coder": "fast"}
        audio = container.add_stream(
            "aac", rate=rate, options=options, layout=samples.layout.name, bit_rate=24_000 * len(channels)
        )
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        container.mux(audio.encode(samples))
        container.mux(audio.encode(None))


def _write_tsv(path: Path, columns: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
