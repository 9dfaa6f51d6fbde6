"""Whether the audio of a clip belongs to its frames, and how late it is, for every clip of a set.

    OUT.sync.jsonl  one line per clip: what it was measured on (size, time, checksum, settings), and its figures

With released encoders Synchformer says it: its probabilities of 21 offsets. With toy ones it is the correlation of
motion and onsets. Either gives an offset and a fit, and gives them for any frames and any audio; so the frames of a
clip are compared with the audio of `OTHERS` other clips too, which cannot belong to it. The share of these that fits as
well as its own is the `chance` of a clip: no fit has to mean the same for two methods, or for two sets.

Clips are compared within blocks of the list, of which each has every n-th: clips of one video lie beside each other,
and their audio may be alike. A block is measured by one process and written as a whole; a rerun skips those whose clips
are as they were.
"""

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmaudio_hf.config import EncoderConfig
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.evaluation.av_bench import FRAME_PERIOD, SYNCHFORMER_FILE, AvBench
from mmaudio_hf.evaluation.metrics import SEGMENTS, SYNC_CLASSES, OffsetHead
from mmaudio_hf.features import toy
from mmaudio_hf.features.autoencoder import MelSpectrogram
from mmaudio_hf.features.encoders import check_encoders, fingerprints, load_encoders, pick_device
from mmaudio_hf.files import Share, hash_of, hash_once, locked, sha256_of
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.audit import AuditSource, Item, Limits, items_of
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.lists import read_video_clips
from mmaudio_hf.media.measure import SILENT_DBFS
from mmaudio_hf.media.video import read_video, sparse_frames
from mmaudio_hf.schema import (
    MEAN,
    SYNC_FEATURES,
    SYNC_FPS,
    SYNC_TOKENS_PER_SEGMENT,
    RunError,
    audio_mode,
    sequence_lengths,
)

VERSION = 1  # of the figures: raise it when the same clip gives others
SECONDS = 8.0  # of a clip that are compared: with 4 s, of four events, one right clip in eight looked unrelated
BLOCK = 64  # clips, or extraction.shard_size if that is less
OTHERS = 16  # audio of other clips for every video
_LEAST_BLOCK, _RELEASED_BLOCK = 10, 256  # av-benchmark loads its networks for each block
_GRID = 100  # values per second of the toy signals; the peak is refined between them
_SEARCH = 2.0  # s either way, as Synchformer's classes
_SMOOTH = np.bartlett(7)[1:-1] / np.bartlett(7).sum()  # 30 ms either way: less than a frame of 25 fps
_LEAST_MOTION, _LEAST_SOUND = 0.4, 0.01  # of toy signals; still videos gave up to 0.26, moving ones 0.61 and more
# Of toy signals without an event that could be related: the deviation of the rises of motion over their mean (pans 1.7,
# events 2.4 and more), the largest rise of the spectrum over their median (noise 2, hums 3.6, events 6 and more).
_STEADY_MOTION, _STEADY_SOUND = 2.0, 4.0
_STILL = 0.1  # of the usual variation in the block, of Synchformer's features
_FROZEN = 0.05  # variation in time of their own spread: all clips of a block may be still

Figures = dict[str, Any]
"""sync_offset, sync_fit, sync_chance, clap_score, imagebind_score of the audit's table; moves, steady or problem."""


class Loaded(NamedTuple):
    """A clip as it is compared."""

    sync_features: Tensor  # (S, 768)
    mel: Tensor | None  # (bins, frames), with toy encoders
    waveform: Tensor | None  # (samples,), where av-benchmark hears it


@dataclass(frozen=True)
class Comparison:
    """What is compared, by which networks. relevance: also CLAP and ImageBind, by av-benchmark."""

    config: EncoderConfig
    mode: str
    seconds: float
    av_bench: AvBench
    relevance: bool = False
    share: Share = field(default_factory=Share)
    batch_size: int = 16
    shard_size: int = BLOCK

    def __post_init__(self) -> None:
        """ValueError where something is missing, before any work."""
        sequence_lengths(self.mode, self.seconds)
        if not self.is_toy and self.seconds < (SEGMENTS + 1) * 8 / SYNC_FPS:
            raise ValueError(f"Synchformer compares 4.8 s or more, not {self.seconds:g} s")
        if (self.relevance or not self.is_toy) and (problem := self.av_bench.problem()):
            what = "clap_score and imagebind_score are" if self.is_toy else "offsets by Synchformer are"
            raise ValueError(f"{what} measured by av-benchmark: {problem}")
        check_encoders(self.config, self.mode, ["sync"])

    @property
    def is_toy(self) -> bool:
        """Whether the encoders are toy ones."""
        return self.config.kind == "toy"

    @property
    def block(self) -> int:
        """Clips that are compared with each other."""
        return max(_LEAST_BLOCK, min(self.shard_size, BLOCK if self.is_toy else _RELEASED_BLOCK))

    @property
    def hears(self) -> bool:
        """Whether waveforms are needed."""
        return self.relevance or not self.is_toy

    @cached_property
    def device(self) -> torch.device:
        """Of this process."""
        return pick_device(self.config.device, self.share.local_rank)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything but the clip that its figures depend on."""
        encoder = fingerprints(self.config, self.mode, ("sync",))["sync"]
        known = {"version": VERSION, "mode": self.mode, "seconds": self.seconds, "encoder": encoder}
        return known | {"relevance": self.relevance}


class MediaClips:
    """The videos of some lists, or the clips of them."""

    def __init__(
        self,
        sources: Sequence[AuditSource],
        comparison: Comparison,
        alignment: str = "timestamps",
        duration: float = SECONDS,
    ):
        """duration: seconds of a clip, where its source has none."""
        self.comparison, self.alignment = comparison, alignment
        listed = [item for source in sources if source.kind == "video" for item in items_of(source)]
        self.items: list[Item] = list({(item.source.name, item.clip): item for item in listed}.values())
        self.names = [(item.source.name, item.clip) for item in self.items]
        self.captions = [" ".join(item.captions) for item in self.items]
        self.videos: list[Path | None] = [Path(item.path) for item in self.items]
        self.files = [item.path for item in self.items]
        self.settings = comparison.settings | {"alignment": alignment}
        self.starts = []  # of the seconds that are compared: around a clip that is shorter, within what all clips cover
        for item in self.items:
            more = comparison.seconds - (item.source.seconds or duration)
            self.starts.append(max(0.0, min(item.start - max(0.0, more) / 2, max(item.starts) - more)))

    def stamp(self, index: int) -> dict[str, Any]:
        """What the clip is now."""
        key, start, path = self.items[index].key, self.starts[index], Path(self.items[index].path)
        known = {"file": list(key or ()), "sha256": hash_once(sha256_of, path) if key else ""}
        return known | ({"start": start} if start else {})

    def is_current(self, index: int, line: Mapping[str, Any]) -> bool:
        """Whether a line is of this file; one with another time is read again for its checksum."""
        if line.get("start", 0.0) != self.starts[index]:
            return False
        key = self.items[index].key
        return line.get("file") == list(key or ()) or self.stamp(index)["sha256"] == line.get("sha256")

    @cached_property
    def _networks(self) -> tuple[Any, MelSpectrogram]:
        c = self.comparison
        encoders = load_encoders(c.config, c.mode, ["sync"], device=c.device, duration=c.seconds)
        return encoders, MelSpectrogram(c.mode)

    def load(self, indices: Sequence[int]) -> Iterable[Loaded | str]:
        """Read and encode them, the next batch while one is encoded; the message of what cannot be read."""
        size, (encoders, spectrogram) = self.comparison.batch_size, self._networks
        batches = [indices[first : first + size] for first in range(0, len(indices), size)]
        threads = max(1, len(os.sched_getaffinity(0)) // self.comparison.share.local_count)
        with ThreadPoolExecutor(threads) as pool:
            reading = [pool.submit(self._read, index) for index in batches[0]]
            for number in range(len(batches)):
                following = batches[number + 1] if number + 1 < len(batches) else ()
                read = [future.result() for future in reading]
                reading = [pool.submit(self._read, index) for index in following]
                frames = [clip.sync_frames for clip in read if not isinstance(clip, str)]
                features = iter(encoders.encode_sync(torch.stack(frames)).cpu() if frames else ())
                for clip in read:
                    if isinstance(clip, str):
                        yield clip
                        continue
                    mel = spectrogram(clip.audio[None])[0] if self.comparison.is_toy else None
                    yield Loaded(next(features), mel, clip.audio if self.comparison.hears else None)

    def _read(self, index: int) -> Any:
        c, path = self.comparison, self.items[index].path
        how: dict[str, Any] = {"mode": c.mode, "duration": c.seconds, "alignment": self.alignment}
        try:
            return read_video(path, start=self.starts[index], as_uint8=True, **how)
        except MediaError as error:
            return str(error).removeprefix(f"{path}: ")


class StoreClips:
    """The rows of a finished feature store, whose latents are decoded."""

    def __init__(self, store: FeatureStore, comparison: Comparison):
        if not store.has_video:
            raise ValueError(f"{store.path} has no {SYNC_FEATURES}: there are no frames to compare its audio with")
        self.store, self.comparison = store, comparison
        self.names = [(store.path.name, item_id) for item_id in store.ids]
        listed = store.path.with_name(f"{store.path.name}.clips.tsv")  # as extraction left it
        of_clip = {clip.id: clip.name for clip in read_video_clips(listed)} if listed.is_file() else {}
        self.files = [of_clip.get(item_id, item_id) for item_id in store.ids]
        self.captions, c = store.captions, comparison
        self.videos: list[Path | None] = [None] * len(store)
        self.starts = [0.0] * len(store)
        self._encoders = load_encoders(c.config, c.mode, ["decode"], device=c.device, duration=c.seconds)
        self.settings = c.settings | {"store": store.content_hash}

    def stamp(self, index: int) -> dict[str, Any]:
        """The row; the settings have the content of the store."""
        return {"file": [index]}

    def is_current(self, index: int, line: Mapping[str, Any]) -> bool:
        """Whether a line is of this row."""
        return line.get("file") == [index]

    def load(self, indices: Sequence[int]) -> Iterable[Loaded | str]:
        """Rows, with their latents decoded."""
        c = self.comparison
        codec = toy.ToyMelCodec.load(c.mode, toy.toy_codec_file(c.config.weights_dir, c.mode)) if c.is_toy else None
        for index in indices:
            row = self.store.read([index], [MEAN, SYNC_FEATURES])
            latent = row[MEAN].float()
            mel = codec.decode(latent)[0] if codec else None
            waveform = self._encoders.decode_latent(latent)[0].cpu() if c.hears else None
            yield Loaded(row[SYNC_FEATURES][0].float(), mel, waveform)


Clips = MediaClips | StoreClips

# --- The two methods -------------------------------------------------------------------------------------------------


class _Motion:
    """Toy encoders: onsets of motion against onsets of audio, correlated at every lag.

    The fit is the largest normalised correlation within `_SEARCH`, the offset its place, refined by a parabola.
    """

    def __init__(self, comparison: Comparison):
        rate = audio_mode(comparison.mode)
        # The flux of a mel frame is largest when an attack is a sixth of the window before its centre.
        self.first = (rate.mel_hop / 2 + rate.mel_window / 6) / rate.sample_rate
        self.mel_rate = rate.sample_rate / rate.mel_hop
        self.size = int(comparison.seconds * _GRID)
        self.lags = int(min(_SEARCH, comparison.seconds / 3) * _GRID)
        self.floor = toy.DYNAMIC_RANGE * (1 if comparison.mode == "16k" else np.log(10))

    def signals(self, clip: Loaded) -> tuple[Any, Any, Figures]:
        """Frames and audio as rises on one grid, of unit length, whether there is anything in both, and no event."""
        amount, change = toy.motion(clip.sync_features)
        mel = clip.mel
        assert mel is not None, "toy encoders come with mels"
        mel = mel.clamp(min=float(mel.max()) - self.floor)
        flux = torch.diff(mel, dim=1, prepend=mel[:, :1]).clamp(min=0).mean(0)
        motion = torch.diff(amount, prepend=amount[:1]).clamp(min=0)
        known: Figures = {"moves": float(change) >= _LEAST_MOTION and float(flux.std()) >= _LEAST_SOUND}
        moved, heard = motion[2:], flux[3:-3]  # without the ends of the tracks
        steady = moved.std() < _STEADY_MOTION * moved.mean() or heard.max() < _STEADY_SOUND * heard.median()
        known |= {"steady": True} if steady or _half_empty(moved) or _half_empty(heard) else {}
        return self._unit(motion, SYNC_FPS, 0.0), self._unit(flux, self.mel_rate, self.first), known

    def _unit(self, values: Tensor, rate: float, first: float) -> np.ndarray:
        numbers = values.numpy()
        on_grid = np.interp(np.arange(self.size) / _GRID, first + np.arange(len(numbers)) / rate, numbers)
        rises = np.convolve(np.maximum(on_grid - np.median(on_grid), 0), _SMOOTH, "same")
        rises -= rises.mean()
        return rises / (np.linalg.norm(rises) + 1e-9)

    def compare(self, videos: Sequence[np.ndarray], audios: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Offsets (s, positive: the audio is late) and fits of pairs."""
        spectra = [np.fft.rfft(np.stack(side), 2 * self.size) for side in (videos, audios)]
        lagged = np.fft.irfft(spectra[1] * spectra[0].conj())
        lagged = np.concatenate([lagged[:, -self.lags :], lagged[:, : self.lags + 1]], axis=1)
        best = lagged.argmax(1).clip(1, 2 * self.lags - 1)
        before, at, after = (lagged[np.arange(len(best)), best + k] for k in (-1, 0, 1))
        curve = before - 2 * at + after
        between = np.where(curve < 0, (before - after) / (2 * np.where(curve < 0, curve, -1)), 0).clip(-1, 1)
        return (best - self.lags + between) / _GRID, lagged.max(1)


def _half_empty(rises: Tensor) -> bool:
    """Whether one half or more, in one piece, is without an event: the rest has too few to be told from others."""
    events = (rises >= 0.2 * rises.max()).nonzero().flatten().tolist()
    return max(later - event for event, later in itertools.pairwise([0, *events, len(rises)])) > len(rises) / 2


class _Synchformer:
    """Released encoders: the mean of the probabilities that Synchformer gives for the two ends of a clip.

    The fit is the probability of the largest class and its neighbours, the offset their mean. Its classes say how much
    earlier the audio is than the frames.
    """

    def __init__(self, comparison: Comparison):
        path = comparison.av_bench.weights_dir / SYNCHFORMER_FILE
        self.head, self.device = OffsetHead().load_released(path).to(comparison.device), comparison.device

    def compare(self, videos: Sequence[Tensor], audios: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Offsets (s, positive: the audio is late) and fits of pairs."""
        offsets, fits = [], []
        for first in range(0, len(videos), BLOCK):
            pairs = slice(first, first + BLOCK)
            probabilities = self._probabilities(videos[pairs], audios[pairs])
            best = probabilities.argmax(1)
            near = np.abs(np.arange(len(SYNC_CLASSES)) - best[:, None]) <= 1
            fits.append((probabilities * near).sum(1))
            offsets.append(-(probabilities * near) @ SYNC_CLASSES / fits[-1])
        return np.concatenate(offsets), np.concatenate(fits)

    @torch.inference_mode()
    def _probabilities(self, videos: Sequence[Tensor], audios: Sequence[Tensor]) -> np.ndarray:
        sides = [torch.stack(list(side)).to(self.device) for side in (videos, audios)]
        ends = (slice(None, SEGMENTS), slice(-SEGMENTS, None))
        logits = torch.stack([self.head(*(side[:, end] for side in sides)) for end in ends])
        return logits.softmax(2).mean(0).double().cpu().numpy()


def _still(videos: Sequence[Tensor]) -> list[bool]:
    """Whether features of Synchformer vary far less in time than is usual among these, or hardly at all."""
    variation = [float(video.std(0).mean()) for video in videos]
    least = [max(_STILL * float(np.median(variation)), _FROZEN * float(video.std())) for video in videos]
    return [value < limit for value, limit in zip(variation, least, strict=True)]


def _silent(waveform: Tensor, rate: int) -> bool:
    """Whether no more than a twentieth of its blocks of 50 ms can be heard, as the verdict `silent` has it."""
    blocks = waveform[: len(waveform) // (rate // 20) * (rate // 20)].unflatten(0, (-1, rate // 20))
    return float((blocks.square().mean(1) < 10 ** (SILENT_DBFS / 10)).float().mean()) >= Limits().max_silent


# --- Blocks of clips -------------------------------------------------------------------------------------------------


def measure(clips: Clips, comparison: Comparison, path: Path, *, progress: bool = True) -> int:
    """Append to `path` the lines of the blocks that this process has to measure; returns the clips still pending.

    Blocks whose lines are all there are skipped; `comparison.share` says which are this process's.
    """
    method: Any = (_Motion if comparison.is_toy else _Synchformer)(comparison)
    blocks, settings = blocks_of(len(clips.names), comparison.block), hash_of(dict(clips.settings))
    share = comparison.share
    pending = _pending(clips, blocks, path, settings)
    with tqdm(total=len(clips.names), desc="sync", unit="clip", disable=not progress) as bar:
        bar.update(len(clips.names) - sum(map(len, pending.values())))
        for number in range(share.index, len(blocks), share.count):
            if number in pending:
                figures = _figures_of_block(clips, comparison, method, blocks[number])
                _append(path, clips, blocks[number], figures, settings)
                bar.update(len(blocks[number]))
    return sum(map(len, _pending(clips, blocks, path, settings).values()))


def blocks_of(count: int, size: int) -> list[range]:
    """Even blocks of about `size`, so that none has too few others to compare with."""
    number = max(1, round(count / size))
    return [range(first, count, number) for first in range(min(number, count))]


def _pending(clips: Clips, blocks: Sequence[range], path: Path, settings: str) -> dict[int, range]:
    lines = read_lines(path)

    def known(index: int) -> bool:
        line = lines.get(clips.names[index], {})
        return line.get("settings") == settings and clips.is_current(index, line)

    return {number: block for number, block in enumerate(blocks) if not all(map(known, block))}


def read_lines(path: Path) -> dict[tuple[str, str], Figures]:
    """(source, clip) -> its last line; a line that a kill cut off is left out."""
    lines: dict[tuple[str, str], Figures] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
            lines[line["source"], line["id"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def _append(path: Path, clips: Clips, block: range, figures: Sequence[Figures], settings: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ""
    for index, values in zip(block, figures, strict=True):
        source, item_id = clips.names[index]
        line = {"source": source, "id": item_id, "settings": settings, **clips.stamp(index), **values}
        text += json.dumps(line, ensure_ascii=False) + "\n"
    with locked(path.with_suffix(".lock")), open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")  # after a line that was cut off
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _figures_of_block(clips: Clips, comparison: Comparison, method: Any, block: range) -> list[Figures]:
    results: list[Figures] = []
    with tempfile.TemporaryDirectory() as scratch:
        heard = _Heard(Path(scratch), clips, comparison)
        videos, audios, at, quiet = [], [], [], []
        for number, (index, clip) in enumerate(zip(block, clips.load(block), strict=True)):
            results.append({"problem": clip} if isinstance(clip, str) else {})
            if isinstance(clip, str):
                continue
            heard.add(index, clip)
            at.append(number)
            if comparison.is_toy:
                video, audio, results[-1] = method.signals(clip)
                audios.append(audio)
            else:
                video = clip.sync_features.unflatten(0, (-1, SYNC_TOKENS_PER_SEGMENT))
                assert clip.waveform is not None, "released encoders come with waveforms"
                quiet.append(_silent(clip.waveform, audio_mode(comparison.mode).sample_rate))
            videos.append(video)
        caches = heard.features([block[k] for k in at]) if at else {}
    if not comparison.is_toy and at:
        for k, still, silent in zip(at, _still(videos), quiet, strict=True):
            results[k]["moves"] = not (still or silent)
        audios = [caches["synchformer_audio"].get(block[k]) for k in at]
    _compare(method, videos, audios, [clips.files[block[k]] for k in at], [results[k] for k in at])
    for k in at:
        results[k] |= {name: _cosine(caches, block[k], *pair) for name, pair in _RELEVANCE.items() if caches}
    return results


def _compare(method: Any, videos: list, audios: list, files: Sequence[str], results: Sequence[Figures]) -> None:
    """Fill in offset, fit and fits of others, which are clips of other files.

    A clip that stands still, or that was not heard, has none of its own.
    """
    usable = [n for n, each in enumerate(results) if each.get("moves") and audios[n] is not None]
    count, pairs = len(usable), [(a, a) for a in usable]
    for n, a in enumerate(usable):
        following = (usable[(n + step) % count] for step in range(1, count))
        pairs += [(a, b) for b in itertools.islice((b for b in following if files[b] != files[a]), OTHERS)]
    if not pairs:
        return
    offsets, fits = method.compare([videos[a] for a, _ in pairs], [audios[b] for _, b in pairs])
    for (a, b), offset, fit in zip(pairs, offsets, fits, strict=True):
        if a == b:
            results[a] |= {"sync_offset": round(float(offset), 4), "sync_fit": round(float(fit), 4), "others": []}
        else:
            results[a]["others"].append(round(float(fit), 4))


# --- What av-benchmark hears and sees --------------------------------------------------------------------------------

_RELEVANCE = {
    "clap_score": ("clap_laion_audio", "clap_laion_text"),
    "imagebind_score": ("imagebind_audio", "imagebind_video"),
}


class _Heard:
    """Caches of a block by av-benchmark: its waveforms as files, with captions and videos where relevance is asked."""

    def __init__(self, folder: Path, clips: Clips, comparison: Comparison):
        self.folder, self.clips, self.comparison = folder, clips, comparison
        for name in ("audio", "frames"):
            (folder / name).mkdir()

    def add(self, index: int, clip: Loaded) -> None:
        """Write its files."""
        c = self.comparison
        if clip.waveform is not None:
            write_audio(self.folder / "audio" / f"{index}.wav", clip.waveform, audio_mode(c.mode).sample_rate)
        if c.relevance and (path := self.clips.videos[index]) is not None:
            with contextlib.suppress(MediaError):  # fewer frames than the clip's own, which were read: no score
                frames = sparse_frames(path, FRAME_PERIOD, int(c.seconds / FRAME_PERIOD), self.clips.starts[index])
                torch.save(frames, self.folder / "frames" / f"{index}.pt")

    def features(self, indices: Sequence[int]) -> dict[str, dict[int, Tensor]]:
        """Name of a cache -> index of a clip -> its features. RunError for a cache that could not be made."""
        c, cache = self.comparison, self.folder / "cache"
        if not c.hears:
            return {}
        audio, size, names = self.folder / "audio", c.seconds, [] if c.is_toy else ["synchformer_audio"]
        seen = any((self.folder / "frames").iterdir())
        names += ["clap_laion_audio"] * c.relevance + ["imagebind_audio"] * seen
        _check_caches(
            c.av_bench.extract(audio, cache, duration=size, device=c.device, video=True, clap=c.relevance), names
        )
        if c.relevance:
            captions = self.folder / "captions.json"
            captions.write_text(json.dumps({str(index): self.clips.captions[index] for index in indices}))
            jobs = {"clap_laion_text": {"action": "text", "captions": str(captions)}}
            if seen:
                jobs["imagebind_video"] = {"action": "video", "frames": str(self.folder / "frames")}
            for name, job in jobs.items():
                _check_caches(c.av_bench.features(job, cache, size, c.device), [name])
        names += [name for pair in _RELEVANCE.values() for name in pair]
        return {name: self._read(cache / f"{name}.pth") for name in sorted(set(names))}

    def _read(self, path: Path) -> dict[int, Tensor]:
        values = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {}
        return {int(name): value.float() for name, value in values.items() if bool(value.isfinite().all())}


def _check_caches(failed: Mapping[str, str], names: Sequence[str]) -> None:
    if lost := [f"{name} ({failed[f'{name}.pth']})" for name in names if f"{name}.pth" in failed]:
        raise RunError(f"av-benchmark did not make {', '.join(lost)}; the same command continues afterwards")


def _cosine(caches: Mapping[str, Mapping[int, Tensor]], index: int, first: str, second: str) -> float | None:
    a, b = (caches[name].get(index) for name in (first, second))
    if a is None or b is None:
        return None
    return round(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)), 4)


# --- Figures of the set ----------------------------------------------------------------------------------------------


def figures_of(clips: Clips, path: Path) -> dict[tuple[str, str], Figures]:
    """(source, clip) -> figures of every clip that `measure` has written, with the chance among all of them."""
    names = set(clips.names)
    lines = {name: line for name, line in read_lines(path).items() if name in names}
    others = np.sort([fit for line in lines.values() for fit in line.get("others", ())])
    for line in lines.values():
        line["least_chance"] = 1 / (1 + len(others))  # a lower limit would call every clip unrelated
        line["sync_seconds"] = clips.comparison.seconds
        if "sync_fit" in line:
            as_good = len(others) - np.searchsorted(others, line["sync_fit"])
            line["sync_chance"] = (1 + int(as_good)) / (1 + len(others))
    return lines
