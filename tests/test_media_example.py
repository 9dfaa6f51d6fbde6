"""The synthesised example set: the event is seen and heard at the same moment, and a seed gives the same bytes."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mmaudio_hf.evaluation.onsets import onset_f1, onset_times
from mmaudio_hf.media import example
from mmaudio_hf.media.audio import read_waveform
from mmaudio_hf.media.container import probe
from mmaudio_hf.media.example import SMALL_AUDIO_FILES, SMALL_SPLITS, read_events, write_example_media
from mmaudio_hf.media.lists import partition, read_media_list
from mmaudio_hf.media.video import read_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_example_media(tmp_path_factory.mktemp("example") / "media", seed=3, small=True)


@pytest.fixture(scope="module")
def events(folder):
    return read_events(folder / "events.json")


@dataclass(frozen=True)
class Seen:
    """The first 8 s of one video: audio at 16 kHz, and of each 25 fps frame its change and its brightest point."""

    audio: torch.Tensor
    change: torch.Tensor  # mean difference from the frame before, levels; 0 for the first
    brightest: torch.Tensor  # levels


@pytest.fixture(scope="module")
def videos(folder):
    """id -> Seen, for every video."""
    seen = {}
    for path in sorted((folder / "videos").iterdir()):
        clip = read_video(path, as_uint8=True)
        frames = clip.sync_frames[:, :, ::2, ::2].short()
        change = torch.nn.functional.pad((frames[1:] - frames[:-1]).abs().float().mean((1, 2, 3)), (1, 0))
        seen[path.stem] = Seen(clip.audio, change, frames.float().mean(1).amax((1, 2)))
    return seen


def digests(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_lists_name_every_file(folder, events):
    listed = []
    for split, count in SMALL_SPLITS.items():
        items = read_media_list(folder / f"{split}.tsv")
        assert len(items) == count and all(item.caption for item in items)
        listed += [item.id for item in items]
    assert sorted(listed) == sorted(path.stem for path in (folder / "videos").iterdir())
    audio_files = read_media_list(folder / "audios.tsv", "caption")
    assert len(audio_files) == SMALL_AUDIO_FILES
    assert sorted(item.id for item in audio_files) == sorted(path.stem for path in (folder / "audios").iterdir())
    assert set(events) == {*listed, *(item.id for item in audio_files)}
    assert {events[item_id].kind for item_id in listed} == {"ball", "lamp", "pendulum", "hammer"}


def test_same_seed_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "SMALL_SPLITS", {"train": 2, "val": 0, "test": 0})
    monkeypatch.setattr(example, "SMALL_AUDIO_FILES", 1)
    first, again = digests(folder), digests(write_example_media(tmp_path / "again", seed=3, small=True))
    media = [name for name in again if name.endswith((".mp4", ".flac"))]
    assert len(media) == 3 and all(again[name] == first[name] for name in media)
    other = digests(write_example_media(tmp_path / "other", seed=4, small=True))
    assert not {other[name] for name in media} & set(first.values())


def test_times_are_irregular_and_on_frames(events):
    gaps = np.concatenate([np.diff(e.times) for e in events.values()])
    assert gaps.min() >= 0.5 and gaps.max() <= 1.5 and gaps.std() > 0.2
    assert all(abs(time * 25 - round(time * 25)) < 1e-9 for e in events.values() for time in e.times)


def test_videos_serve_both_modes(folder):
    for path in (folder / "videos").iterdir():
        stated = probe(path)
        assert stated["video"]["frame_rate"] == "25" and 8.05 < stated["video"]["duration"] < 10
        assert stated["audio"]["duration"] > 353_280 / 44_100


def onset(waveform, rate, time):
    """Seconds from `time` to the first sample within 30 ms that is a quarter as loud as the loudest there."""
    begin = max(0, round((time - 0.03) * rate))
    near = waveform[begin : round((time + 0.03) * rate)].abs()
    return (int((near > near.max() / 4).nonzero()[0]) + begin) / rate - time


def test_audio_starts_at_the_event(folder, videos, events):
    for item_id, clip in videos.items():
        for time in events[item_id].times:
            if time < 7.9:
                assert abs(onset(clip.audio, 16_000, time)) < 0.004, (item_id, time)
    for path in (folder / "audios").iterdir():
        waveform, rate = read_waveform(path)
        assert len(partition(len(waveform), rate)) >= 2
        for time in events[path.stem].times:
            assert abs(onset(waveform, rate, time)) < 0.002, (path.stem, time)


def test_audio_dies_away_before_the_next_event(videos, events):
    for item_id, clip in videos.items():
        for time in events[item_id].times:
            if time < 7.4:
                begin = round(time * 16_000)
                loud = clip.audio[begin : begin + 1600].square().mean()
                rest = clip.audio[begin + 6400 : begin + 7600].square().mean()
                assert rest < 0.02 * loud, (item_id, time)


def test_event_is_seen_in_its_own_frame(videos, events):
    """The frame of an event differs most from the one before, among those 0.2 s around, and it is bright."""
    for item_id, clip in videos.items():
        for time in events[item_id].times:
            frame = round(time * 25)
            if 6 <= frame <= 193:
                assert int(clip.change[frame - 5 : frame + 6].argmax()) == 5, (item_id, time)
                assert clip.brightest[frame] > 190, (item_id, time)


def test_kinds_differ_in_their_spectrum(videos, events):
    """The mean spectrum after an onset tells the kind: nearest neighbour among the other videos."""
    spectra = {}
    for item_id, clip in videos.items():
        starts = [round(time * 16_000) for time in events[item_id].times if time < 7.5]
        power = torch.stack([torch.fft.rfft(clip.audio[s + 400 : s + 2448]).abs() for s in starts]).mean(0)
        bands = torch.stack([band.mean() for band in power.chunk(64)]).sqrt()
        spectra[item_id] = bands / bands.norm()
    for item_id, spectrum in spectra.items():
        others = {other: float(spectrum @ s) for other, s in spectra.items() if other != item_id}
        assert events[max(others, key=others.get)].kind == events[item_id].kind, item_id


@pytest.mark.parametrize(("kind", "delay"), [("storm", 0.16), ("frog", 0.2)])
def test_a_withheld_kind_is_heard_later_than_it_is_seen(folder, kind, delay, tmp_path):
    """No kind of the example set is delayed, so what a network learned from that set places these events wrongly."""
    assert not any(kind in path.name for path in folder.rglob("*"))
    media = example.write_withheld_media(tmp_path / "media", kind, {"train": 1, "test": 2}, seed=1)
    assert {path.name for path in media.iterdir()} == {"videos", "train.tsv", "test.tsv", "events.json"}
    events = read_events(media / "events.json")
    assert [item.id for item in read_media_list(media / "test.tsv")] == [f"test_{i:02d}_{kind}" for i in range(2)]
    for name, expected in events.items():
        clip = read_video(media / "videos" / f"{name}.mp4", as_uint8=True)
        heard = onset_times(clip.audio, 16000)
        times = [time for time in expected.times if time < 7.9]
        assert onset_f1(heard, times)[2] > 0.9
        frames = clip.sync_frames[:, :, ::4, ::4].float()
        change = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))
        seen = [(i + 1) / 25 for i in range(1, len(change) - 1) if change[i] == change[max(0, i - 6) : i + 7].max()]
        assert onset_f1(seen, times)[2] < 0.4 and onset_f1([s + delay for s in seen], times)[1] > 0.4
