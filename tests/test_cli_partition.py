"""`mmaudio-hf partition`: clip lists of audio files and of long videos, by one process or several."""

import json
import os
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from extraction import extract, toy_recipe
from odd_media import Odd, steady, write_odd
from toy_stores import MODEL

from mmaudio_hf.cli import main
from mmaudio_hf.config import VideoSource, load_recipe
from mmaudio_hf.data.mixture import open_mixture
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.features.encoders import load_encoders
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.lists import partition_video, read_clips, read_video_clips, write_clips
from mmaudio_hf.media.video import read_video

ROOT = Path(__file__).parent.parent


def write_recipe(folder):
    source = {"name": "noises", "media_dir": str(folder / "media"), "list": str(folder / "captions.tsv")}
    tree = {"name": "noises", "extraction": {"output_dir": str(folder / "out"), "audios": [source], "num_proc": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (folder / "media").mkdir()
    return str(folder / "recipe.yaml")


def test_partition_accounts_for_every_file(tmp_path, capsys):
    recipe, media = write_recipe(tmp_path), tmp_path / "media"
    write_audio(media / "long.flac", torch.rand(8000 * 17), 8000)
    write_audio(media / "short.flac", torch.rand(8000 * 8), 8000)
    (media / "broken.wav").write_text("no audio")
    (media / "notes.txt").write_text("not media")
    assert main(["partition", recipe]) == 0
    clips, rejects = tmp_path / "out" / "noises.clips.tsv", tmp_path / "out" / "noises.clips.rejects.jsonl"
    printed = capsys.readouterr()
    assert f"{clips}: 2 clips, 2 files rejected, 1 other files ignored, see {rejects}" in printed.out
    assert "3/3" in printed.err  # the bar
    assert [clip.id for clip in read_clips(clips)] == ["long_0", "long_1"]
    lines = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(line["file"], line["reason"]) for line in lines] == [
        ("broken.wav", "unreadable"),
        ("short.flac", "audio_too_short"),
        ("notes.txt", "ignored"),
    ]
    (media / "broken.wav").unlink()
    (media / "notes.txt").unlink()
    (media / "short.flac").unlink()
    assert main(["partition", recipe]) == 0
    assert rejects.read_text() == "" and "rejects.jsonl" not in capsys.readouterr().out
    write_audio(media / "long.flac", torch.rand(8000 * 60), 8000)
    counts = {"": 5, "extraction.audios.0.max_clips=0": 7}  # as published, and a take of a minute as a whole
    for change, count in counts.items():
        assert main(["partition", recipe, *filter(None, [change])]) == 0 and len(read_clips(clips)) == count


def test_no_clip_at_all_is_an_error(tmp_path, capsys):
    recipe, media = write_recipe(tmp_path), tmp_path / "media"
    write_audio(media / "short.flac", torch.rand(8000 * 8), 8000)
    assert main(["partition", recipe]) == 2
    error = capsys.readouterr().err
    assert f"{media}: no file gives a clip" in error and "8.1 s" in error
    assert not (tmp_path / "out" / "noises.clips.tsv").exists()
    assert "audio_too_short" in (tmp_path / "out" / "noises.clips.rejects.jsonl").read_text()


def test_processes_divide_the_work_and_a_rerun_reads_only_what_changed(tmp_path, capsys, monkeypatch):
    recipe, media = write_recipe(tmp_path), tmp_path / "media"
    for i in range(5):
        write_audio(media / f"n{i}.wav", torch.rand(8000 * 9), 8000)
    command, clips = ["partition", recipe, "extraction.shard_size=2"], tmp_path / "out" / "noises.clips.tsv"
    assert main([*command, "--shard-index", "0", "--num-shards", "2"]) == 0
    assert "2 of 3 shards complete" in capsys.readouterr().out and not clips.exists()
    assert main([*command, "--shard-index", "1", "--num-shards", "2"]) == 0
    assert "5 clips, 0 files rejected" in capsys.readouterr().out
    expected = clips.read_text()
    read = []
    monkeypatch.setattr(
        "mmaudio_hf.media.lists.count_samples", lambda path: read.append(path.name) or (8000 * 17, 8000)
    )
    clips.unlink()
    assert main(command) == 0 and clips.read_text() == expected and not read
    os.utime(media / "n4.wav", ns=(1, 1))
    assert main(command) == 0 and read == ["n4.wav"]
    assert [clip.id for clip in read_clips(clips)][-2:] == ["n4_0", "n4_1"]


def test_long_videos_give_several_rows(tmp_path):
    """Each row is the clip from its start on; a short video and one that changed since have one, or are rejected."""
    media = tmp_path / "videos"
    media.mkdir()
    times = steady(4.5)
    write_odd(media / "long.mp4", Odd(frame_times=times, audio_seconds=4.5))
    write_odd(media / "short.mp4", Odd(frame_times=steady(1.2), audio_seconds=1.2))
    (media / "broken.mp4").write_text("no video")
    (tmp_path / "list.tsv").write_text("id\tlabel\nlong\ta\nshort\tb\nbroken\tc\n")
    source = VideoSource("s", str(media), str(tmp_path / "list.tsv"), max_clips=3)
    recipe = toy_recipe(tmp_path / "out", tmp_path / "out", duration=1.0)
    clips = recipe.extraction.clips_path(source)
    with pytest.raises(ValueError, match=r"s\.clips\.tsv: no such clip list"):
        extract(recipe, source)
    (tmp_path / "out").mkdir()
    report = write_clips(source, clips, duration=1.0)
    assert clips.read_text().splitlines()[1:] == [
        "long_0\tlong\t0.0", "long_1\tlong\t1.69", "long_2\tlong\t3.38", "short_0\tshort\t0.0",
    ]  # fmt: skip
    assert [(reject["file"], reject["reason"]) for reject in report.rejects] == [("broken.mp4", "unreadable")]
    report = extract(recipe, source)
    store = FeatureStore.open(report.store_path)
    assert store.ids == ["long_0", "long_1", "long_2", "short_0"] and store.captions == ["a", "a", "a", "b"]
    assert (report.listed, report.rejected) == (5, 1)
    clip = read_video(media / "long.mp4", start=1.69, duration=1.0)
    encoders = load_encoders(recipe.encoders, "16k", ("clip", "latent"), duration=1.0)
    assert main(["verify", str(report.store_path), "--sample", "4", "--media", str(media)]) == 0
    row = store.read([1])
    torch.testing.assert_close(row["clip_features"], encoders.encode_clip(clip.clip_frames[None]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(row["mean"], encoders.encode_audio(clip.audio[None])[0], atol=1e-4, rtol=1e-4)


def test_starts_of_long_videos():
    assert partition_video(7.0, 8.0, 5) == [0.0] and partition_video(16.0, 8.0, 5) == [0.0]
    assert partition_video(16.1, 8.0, 5) == [0.0, 8.0]
    starts = partition_video(3600.0, 8.0, 10)
    assert len(starts) == 10 and starts[-1] == pytest.approx(3600 - 8.1) and starts == sorted(starts)
    assert len(partition_video(60.0, 8.0, 0)) == 7 and partition_video(9.0, 8.0, 0) == [0.0]


def test_a_folder_with_a_long_take_gives_all_its_clips(tmp_path, monkeypatch, capsys):
    """By the recipe for a folder of one's own, without a command besides extraction; a short video keeps its name, and
    one whose name another file has its ending."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_clips").mkdir()
    slow = tuple(Fraction(i, 5) for i in range(128))
    write_odd(tmp_path / "my_clips" / "take.mp4", Odd(frame_times=slow, audio_seconds=25.6))
    write_odd(tmp_path / "my_clips" / "short.mp4", Odd(frame_times=slow[:46], audio_seconds=9.2))
    write_odd(tmp_path / "my_clips" / "short.mkv", Odd(frame_times=slow[:46], audio_seconds=9.2))
    (tmp_path / "my_clips" / "captions.csv").write_text(
        "file_name,caption\ntake.mp4,a horn\nshort.mp4,a bell\nshort.mkv,a gong\n"
    )
    assert main(["prepare", "folder", "my_clips", "--out", "data/sets"]) == 0
    changes = ["encoders.kind=toy", "encoders.weights_dir=data/own", "encoders.device=cpu"]
    sources = "[{name: own_train, media_dir: my_clips, list: data/sets/my_clips.tsv, max_clips: 0}]"
    own = load_recipe(ROOT / "recipes" / "finetune_own.yaml").extraction.videos
    assert [source.max_clips for source in own] == [0, 0]  # as here
    words = ["extract-video", str(ROOT / "recipes" / "finetune_own.yaml"), *changes, f"extraction.videos={sources}"]
    assert main(words) == 0
    assert "own_train.clips.tsv: 5 clips, 0 files rejected" in capsys.readouterr().out
    with FeatureStore.open("data/own/own_train") as store:
        assert store.ids == ["take_0", "take_1", "take_2", "short.mp4", "short.mkv"]
        assert store.captions == ["a horn"] * 3 + ["a bell", "a gong"]
        first, *others = store.read(range(3))["clip_features"]
    assert first.shape == (64, 1024) and not any(torch.allclose(first, other) for other in others)
    assert [row.start for row in read_video_clips("data/own/own_train.clips.tsv")] == [0.0, 8.75, 17.5, 0.0, 0.0]
    (tmp_path / "data" / "own" / "own_train.clips.tsv").unlink()
    assert main([*words, "--shard-index", "0", "--num-shards", "2"]) == 2
    assert "own_train.clips.tsv is missing: run `mmaudio-hf partition" in capsys.readouterr().err


def test_one_recipe_extracts_clips_of_several_durations(tmp_path):
    (tmp_path / "audios").mkdir()
    write_odd(tmp_path / "long.mp4", Odd(frame_times=steady(7.0), audio_seconds=7.0))
    noise = torch.rand(8000 * 9, generator=torch.Generator().manual_seed(0)) - 0.5
    write_audio(tmp_path / "audios" / "noise.wav", noise, 8000)
    (tmp_path / "list.tsv").write_text("id\tlabel\nlong\ta\n")
    (tmp_path / "captions.tsv").write_text("id\tcaption\nnoise\tb\n")
    videos = {"media_dir": str(tmp_path), "list": str(tmp_path / "list.tsv"), "max_clips": 0}
    audios = {"media_dir": str(tmp_path / "audios"), "list": str(tmp_path / "captions.tsv"), "duration": 2.0}
    tree = {
        "model": MODEL | {"duration": 1.0},
        "encoders": {"kind": "toy", "weights_dir": str(tmp_path / "out"), "device": "cpu"},
        "extraction": {
            "output_dir": str(tmp_path / "out"),
            "videos": [videos | {"name": "one"}, videos | {"name": "two", "duration": 2.0}],
            "audios": [audios | {"name": "noises"}],
        },
        "data": {"train": [{"path": str(tmp_path / "out" / name)} for name in ("one", "two", "noises")]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert [main([command, str(path)]) for command in ("partition", "extract-video", "extract-audio")] == [0, 0, 0]
    recipe = load_recipe(path)
    expected = (recipe.model, recipe.encoders, recipe.seed, recipe.extraction)
    mixture = open_mixture(recipe.data.train, *expected)
    buckets = [(bucket.duration, len(bucket.stores), bucket.samples) for bucket in mixture.buckets]
    assert buckets == [(1, 1, 6), (2, 2, 7)]
    assert mixture.stores[2].ids == [f"noise_{i}" for i in range(4)]  # of 2.1 s, in 9 s
    with FeatureStore.open(tmp_path / "out" / "two") as store:
        assert store.read([0])["clip_features"].shape == (1, 16, 1024) and store.ids == [f"long_{i}" for i in range(3)]
    assert main(["verify", str(tmp_path / "out" / "two"), "--sample", "2", "--media", str(tmp_path)]) == 0
    assert main(["audit", str(path), "extraction.videos.0.duration=8"]) == 0  # too long for the file, 2 s are not
    table = pq.read_table(tmp_path / "out" / "audit.parquet").to_pylist()
    short = {row["source"]: row["verdicts"] for row in table}
    assert "too_short" in short["one"] and "too_short" not in [*short["two"], *short["noises"]]
    with pytest.raises(ValueError, match=r"two was made with duration 2\.0, the recipe's extraction has 3\.0"):
        changed = load_recipe(path, ["extraction.videos.1.duration=3"])
        open_mixture(changed.data.train, changed.model, extraction=changed.extraction)
