"""Extraction from real media to real stores: the same result in every way of getting there, and every error named."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
import yaml
from extraction import extract, toy_recipe

from mmaudio_hf.cli import main
from mmaudio_hf.config import AudioSource, EncoderConfig, VideoSource
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.data.tools import verify
from mmaudio_hf.features import shards
from mmaudio_hf.features.encoders import fit_toy_codec, load_encoders
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.lists import read_clips, write_clips
from mmaudio_hf.media.video import read_video

DURATION = 1.0  # s; short, so that the tests are


@pytest.fixture(scope="module")
def example(example_media):
    folder = example_media()
    write_clips(AudioSource("a", str(folder / "audios"), str(folder / "audios.tsv")), folder / "clips.tsv")
    return folder


@pytest.fixture(scope="module")
def weights(example, tmp_path_factory):
    """Folder with the toy codec, which the first extraction fits."""
    folder = tmp_path_factory.mktemp("weights")
    report = extract(toy_recipe(folder / "out", folder), videos(example, "val"))
    assert (folder / "toy_codec_16k.safetensors").is_file()
    assert report.accepted == report.listed == 2
    return folder


def videos(example, split: str, **changes) -> VideoSource:
    """The videos of a split of the example media."""
    return replace(VideoSource(split, str(example / "videos"), str(example / f"{split}.tsv")), **changes)


def write_list(path, rows, column="label"):
    path.write_text(f"id\t{column}\n" + "".join(f"{item_id}\t{caption}\n" for item_id, caption in rows))
    return path


def content(folder, name) -> dict[str, bytes]:
    """Everything of a store, by file name."""
    paths = [*(folder / name).iterdir(), folder / f"{name}.tsv", folder / f"{name}.manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def shard_times(folder, name) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / f"{name}.shards").glob("shard_*.json")}


def rejects_of(report, of_folder: bool = False) -> list[dict]:
    """Rejects of the list; of_folder: those behind them, files of the folder that are in no list."""
    lines = [json.loads(line) for line in report.rejects_path.read_text().splitlines()]
    return [line for line in lines if (line["stage"] == "folder") == of_folder]


@pytest.fixture(scope="module")
def train(example, weights, tmp_path_factory):
    """Store of the training videos, made in one go."""
    folder = tmp_path_factory.mktemp("train")
    extract(toy_recipe(folder, weights), videos(example, "train"))
    return folder


def test_a_store_holds_the_features_of_each_row_in_list_order(example, weights, train):
    store = FeatureStore.open(train / "train")
    listed = [line.split("\t") for line in (example / "train.tsv").read_text().splitlines()[1:]]
    assert [store.ids, store.captions] == [[row[0] for row in listed], [row[1] for row in listed]]
    assert verify(train / "train").ok
    encoders = load_encoders(EncoderConfig("toy", str(weights)), "16k", duration=DURATION)
    clip = read_video(example / "videos" / f"{store.ids[4]}.mp4", duration=DURATION)
    row = store.read([4])
    for name, value in (
        ("clip_features", encoders.encode_clip(clip.clip_frames[None])),
        ("text_features", encoders.encode_text([store.captions[4]])),
        ("mean", encoders.encode_audio(clip.audio[None])[0]),
    ):
        torch.testing.assert_close(row[name], value, atol=1e-4, rtol=1e-4)
    assert store.manifest["counts"] == {"listed": 8, "accepted": 8, "rejected": 0}
    assert store.manifest["encoders"] == encoders.fingerprints
    assert store.manifest["normalisation"] == {"audio_peak": 0.95}


def test_processes_shards_and_batches_do_not_change_the_store(example, weights, train, tmp_path):
    recipe = toy_recipe(tmp_path, weights, num_proc=2, shard_size=5, batch_size=16)
    report = extract(recipe, videos(example, "train"))
    assert (report.shards, report.reused_shards) == (2, 0)
    assert content(tmp_path, "train") == content(train, "train")


def test_only_changed_shards_are_extracted_again(example, weights, tmp_path):
    media, out = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(example / "videos", media)
    rows = [tuple(line.split("\t")) for line in (example / "train.tsv").read_text().splitlines()[1:]][:4]

    def run(rows, weights=weights, **changes):
        source = VideoSource("train", str(media), str(write_list(tmp_path / "list.tsv", rows)), **changes)
        return extract(toy_recipe(out, weights, shard_size=1), source)

    assert run(rows).reused_shards == 0
    times, first = shard_times(out, "train"), content(out, "train")
    assert run(rows).reused_shards == 4
    assert (shard_times(out, "train"), content(out, "train")) == (times, first)
    # a caption
    changed = [*rows[:2], (rows[2][0], "something else"), rows[3]]
    assert run(changed).reused_shards == 3
    assert FeatureStore.open(out / "train").captions[2] == "something else"
    # a file
    os.utime(media / f"{rows[1][0]}.mp4", ns=(1, 1))
    assert run(changed).reused_shards == 3
    # a shorter list: what is left over goes
    assert run(changed[:2]).reused_shards == 2
    assert len(shard_times(out, "train")) == 2
    assert len(FeatureStore.open(out / "train")) == 2
    # a setting and the encoder
    assert run(changed[:2], normalize_audio=False).reused_shards == 0
    other = shutil.copytree(weights, tmp_path / "other", ignore=shutil.ignore_patterns("out"))
    codec = load_encoders(EncoderConfig("toy", str(weights)), "16k").fingerprints["latent"]
    fit_toy_codec(other, "16k", [media / f"{rows[0][0]}.mp4"])
    assert run(changed[:2], weights=other).reused_shards == 0
    assert FeatureStore.open(out / "train").manifest["encoders"]["latent"] != codec
    # a damaged shard, when it is needed again
    shutil.rmtree(out / "train")
    (out / "train.shards" / "shard_00001.arrow").write_bytes(b"")
    assert run(changed[:2], weights=other).reused_shards == 1


def write_silent_copy(source, path, *, audio_stream):
    """The frames of `source` with silence, or without an audio stream."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        video = old.streams.video[0]
        stream = new.add_stream_from_template(video)
        audio = new.add_stream("aac", rate=44_100, layout="mono") if audio_stream else None
        packets = [packet for packet in old.demux(video) if packet.size]
        for packet in packets:
            packet.stream = stream
            new.mux(packet)
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 44_100 * 8), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44_100, 0
            new.mux([*audio.encode(frame), *audio.encode(None)])


def test_each_bad_file_is_rejected_with_its_reason(example, weights, tmp_path):
    media, (good, other) = tmp_path / "videos", sorted((example / "videos").glob("train*.mp4"))[:2]
    media.mkdir()
    shutil.copy(good, media / "good.mp4")
    shutil.copy(other, media / "other.mp4")
    (media / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (media / "text.mp4").write_text("this is no video\n" * 100)
    write_silent_copy(good, media / "mute.mp4", audio_stream=False)
    write_silent_copy(good, media / "silent.mp4", audio_stream=True)
    (media / "folder.mp4").mkdir()
    names = ["absent", "good", "cut", "text", "mute", "other", "silent", "folder"]
    table = write_list(tmp_path / "list.tsv", [(name, f"caption of {name}") for name in names])
    recipe, source = toy_recipe(tmp_path / "out", weights), VideoSource("bad", str(media), str(table))
    report = extract(recipe, source)
    rejects = rejects_of(report)
    assert (report.listed, report.accepted, report.rejected, report.missing) == (8, 2, 6, 2)
    reasons = {reject["id"]: (reject["stage"], reject["reason"]) for reject in rejects}
    assert list(reasons) == [name for name in names if name not in ("good", "other")]
    assert reasons["absent"] == reasons["folder"] == ("list", "not_found")
    assert reasons["text"] == reasons["cut"] == ("read", "unreadable")
    assert reasons["mute"] == ("read", "no_audio")
    assert reasons["silent"] == ("read", "silent")
    assert all(reject["message"] and isinstance(reject["facts"], dict) for reject in rejects)
    assert FeatureStore.open(report.store_path).ids == ["good", "other"]
    before = report.rejects_path.read_bytes()
    again = extract(recipe, source)
    assert (again.rejected, again.rejects_path.read_bytes()) == (6, before)
    report.rejects_path.write_bytes(before[:-9])
    with pytest.raises(ValueError, match=r"rejects\.jsonl is damaged .*: remove it"):
        extract(recipe, source)


def test_problems_of_an_audit_are_rejects_of_their_own_stage(example, weights, tmp_path):
    """The files are not opened; other problems make the shard again and the same ones keep it."""
    first, second = sorted(path.stem for path in (example / "videos").glob("train*.mp4"))[:2]
    table = write_list(tmp_path / "list.tsv", [(first, "a"), (second, "b"), ("gone", "c")])
    known = {
        first: ("still", "it does not move"),
        "gone": ("still", "neither"),
        "unlisted": ("silent", "not in the list"),
    }

    def run(problems):
        return extract(toy_recipe(tmp_path, weights), videos(example, "s", list=str(table)), problems=problems)

    report = run(known)
    assert (report.listed, report.accepted, report.rejected, report.missing) == (3, 1, 2, 1)
    moved, gone = rejects_of(report)
    assert (moved["id"], moved["stage"], moved["reason"]) == (first, "audit", "still")
    assert (moved["message"], gone["id"], gone["stage"]) == ("it does not move", "gone", "list")
    assert run(known).reused_shards == 1
    assert run({first: ("silent", "no audio")}).reused_shards == 0
    assert (run(None).accepted, run({}).reused_shards) == (2, 1)
    write_clips(AudioSource("a", str(example / "audios"), "captions.tsv"), tmp_path / "clips.tsv")
    source = AudioSource("a", str(example / "audios"), str(example / "audios.tsv"), str(tmp_path / "clips.tsv"))
    problems = {read_clips(tmp_path / "clips.tsv")[0].name: ("silent", "nothing is heard")}
    report = extract(toy_recipe(tmp_path, weights), source, problems=problems)
    assert {(r["stage"], r["reason"]) for r in rejects_of(report)} == {("audit", "silent")}
    assert report.rejected == 2 and report.accepted + report.rejected == report.listed


def test_audio_files_give_a_row_for_each_clip_and_caption(example, weights, tmp_path):
    media = tmp_path / "audios"
    media.mkdir()
    for path in (example / "audios").glob("*.flac"):
        shutil.copy(path, media / f"{path.stem[:12]}.flac")
    write_audio(media / "quiet.wav", torch.zeros(9 * 16_000), 16_000)
    write_clips(AudioSource("a", str(media), "captions.tsv"), tmp_path / "clips.tsv")
    with open(tmp_path / "clips.tsv", "a") as file:
        file.write("gone_0\tgone\t0\t400000\nrecording_00_9\trecording_00\t900000\t99000000\n")
    captions = [("recording_00", "one"), ("recording_01", "two"), ("recording_00", "three"), ("recording_00", "one")]
    # A listed file may have no clip, and the name of a clip of another file.
    others = [("quiet", "none"), ("gone", "lost"), ("brief", "a"), ("brief", "b"), ("recording_00_0", "c")]
    table = write_list(tmp_path / "captions.tsv", [*captions, *others], "caption")
    source = AudioSource("audio", str(media), str(table), str(tmp_path / "clips.tsv"))
    report = extract(toy_recipe(tmp_path / "out", weights, shard_size=2), source)
    store = FeatureStore.open(report.store_path)
    assert store.ids == [
        "recording_00_0", "recording_00_0.2", "recording_00_1", "recording_00_1.2", "recording_01_0", "recording_01_1",
    ]  # fmt: skip
    assert store.captions == ["one", "three", "one", "three", "two", "two"]
    assert list(store.columns) == ["mean", "std", "text_features"]
    values = store.read(range(6))
    assert torch.equal(values["mean"][0], values["mean"][1])
    assert not torch.equal(values["text_features"][0], values["text_features"][1])
    assert not torch.equal(values["mean"][0], values["mean"][2])
    reasons = Counter(reject["reason"] for reject in rejects_of(report))
    assert reasons == {"silent": 1, "no_caption": 2, "not_found": 1, "clip_out_of_range": 2, "no_clip": 2}
    assert report.listed == report.accepted + report.rejected == 14


def test_a_file_without_a_clip_is_rejected_with_the_reason_of_partition(example, weights, tmp_path, capsys):
    media = tmp_path / "audios"
    media.mkdir()
    shutil.copy(next((example / "audios").glob("*.flac")), media / "good.flac")
    write_audio(media / "brief.wav", torch.ones(16_000), 16_000)
    write_list(tmp_path / "list.tsv", [("good", "a"), ("brief.wav", "b"), ("later", "c")], "caption")
    tree = {
        "model": {"duration": DURATION},
        "encoders": {"kind": "toy", "weights_dir": str(weights)},
        "extraction": {
            "output_dir": str(tmp_path / "out"),
            "audios": [{"name": "s", "media_dir": str(media), "list": str(tmp_path / "list.tsv")}],
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["partition", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["extract-audio", str(tmp_path / "recipe.yaml")]) == 0
    rejects = [json.loads(line) for line in (tmp_path / "out" / "s.rejects.jsonl").read_text().splitlines()]
    assert [(reject["id"], reject["reason"]) for reject in rejects] == [("brief", "no_clip"), ("later", "no_clip")]
    brief, later = (reject["message"] for reject in rejects)
    assert "has no clip of 'brief'; " in brief and "1.000 s of audio, 8.1 s needed" in brief
    assert "it is absent, or newer than the list" in later


def test_shards_of_an_earlier_version_are_extracted_again(example, weights, tmp_path):
    """Audio lies elsewhere since version 2 where a file has holes, but not in the published alignment."""
    versions = {}
    for alignment in ("timestamps", "reference"):
        recipe = toy_recipe(tmp_path / alignment, weights, alignment=alignment)
        extract(recipe, videos(example, "val"))
        manifest = FeatureStore.open(tmp_path / alignment / "val").manifest
        versions[alignment] = manifest["preprocessing"]["version"]
        assert verify(tmp_path / alignment / "val").ok
    assert versions == {"timestamps": 2, "reference": 1}
    before = content(tmp_path / "timestamps", "val")
    manifest_file = tmp_path / "timestamps" / "val.manifest.json"
    manifest_file.write_text(manifest_file.read_text().replace('"made_of": "', '"made_of": "1'))
    for path in (tmp_path / "timestamps" / "val.shards").glob("*.json"):
        path.write_text(path.read_text().replace('"key": "', '"key": "1'))  # as version 1 had another
    assert extract(toy_recipe(tmp_path / "timestamps", weights), videos(example, "val")).reused_shards == 0
    assert content(tmp_path / "timestamps", "val") == before


@pytest.mark.parametrize(("captions", "expected"), [("all", "abc"), ("first", "ac"), ("last", "bc")])
def test_captions_of_a_file_with_several(captions, expected, example, weights, tmp_path, capsys):
    media = tmp_path / "audios"
    media.mkdir()
    for name, path in zip(("x", "y"), sorted((example / "audios").glob("*.flac")), strict=False):
        shutil.copy(path, media / f"{name}.flac")
    table = write_list(tmp_path / "captions.tsv", [("x", "a"), ("x.flac", "b"), (" y", "c")], "caption")
    source = AudioSource("audio", str(media), str(table), str(tmp_path / "clips.tsv"), captions)
    write_clips(source, tmp_path / "clips.tsv")
    report = extract(toy_recipe(tmp_path / "out", weights), source, progress=True)
    clips = [clip.id for clip in read_clips(tmp_path / "clips.tsv")]
    store = FeatureStore.open(report.store_path)
    assert sorted(set(store.captions)) == list(expected) and (store.ids == clips) == (captions != "all")
    explained = f"audio: {len(store.ids)} rows of {len(clips)} clips" in capsys.readouterr().out
    assert explained == (captions == "all"), "one line says why there are more rows than clips"


def test_files_of_a_folder_that_no_list_names(example, weights, tmp_path):
    media = tmp_path / "videos"
    (media / "more").mkdir(parents=True)
    good, other = sorted((example / "videos").glob("train*.mp4"))[:2]
    for name in ("A.MP4", "cafe\u0301.mp4", "more/b.mp4", "of_val.mp4"):
        shutil.copy(good, media / name)
    (media / "notes.txt").write_text("x")
    table = write_list(media / "list.tsv", [("A", "a"), ("caf\u00e9", "e"), ("b.mp4", "c")])
    source = VideoSource("own", str(media), str(table))
    val = VideoSource("val", str(media), str(write_list(tmp_path / "val.tsv", [("of_val", "v")])))
    recipe = toy_recipe(media / "out", weights, videos=(source, val))
    shutil.copy(other, media / "more" / "new.mp4")
    report = extract(recipe, source)
    assert (report.accepted, report.rejected) == (3, 0) and rejects_of(report) == []
    assert FeatureStore.open(report.store_path).ids == ["A", "caf\u00e9", "b.mp4"]
    assert [(line["id"], line["reason"]) for line in rejects_of(report, of_folder=True)] == [
        *(("new", "unlisted"), ("notes", "ignored")),
    ]


def test_the_users_mistakes_are_named_before_any_work(example, weights, tmp_path):
    out = tmp_path / "out"

    def check(message, recipe=None, **changes):
        with pytest.raises(ValueError, match=message):
            extract(recipe or toy_recipe(out, weights), videos(example, "val", **changes))

    def a_list(*rows) -> str:
        return str(write_list(tmp_path / "list.tsv", rows))

    check("no such folder", media_dir=str(tmp_path / "nowhere"))
    check("no such file", list=str(tmp_path / "nowhere.tsv"))
    check("not a plain name.*line 2", list=a_list(("../../x", "c")))
    check("already on line 2", list=a_list(("a", "c"), ("a", "d")))
    check("none of 2 items can be used.*no such file", list=a_list(("a", "c"), ("b", "d")))
    check("not a plain name", name="../s")
    check("has a dot", name="a.b")
    check("output_dir must be a folder", toy_recipe(example / "val.tsv", weights))
    with pytest.raises(ValueError, match="alignment 'sideways': use one of timestamps, reference"):
        toy_recipe(out, weights, alignment="sideways")
    with pytest.raises(ValueError, match="shard_size must be at least 1"):
        toy_recipe(out, weights, shard_size=0)
    with pytest.raises(ValueError, match=r"model.mode '8k': use one of 16k, 44k"):
        replace(toy_recipe(out, weights).model, mode="8k")
    released = EncoderConfig("released", str(tmp_path), "x", device="cpu")
    check(r"synchformer_state_dict\.pth is missing", replace(toy_recipe(out, weights), encoders=released))
    assert not out.exists()
    (out / "val").mkdir(parents=True)
    check("exists and was not made by extraction")
    with pytest.raises(ValueError, match="no such clip list; make it with `mmaudio-hf partition`"):
        extract(toy_recipe(out, weights), AudioSource("a", str(example / "audios"), str(example / "audios.tsv")))


def test_shards_of_a_complete_store_may_be_deleted(example, weights, tmp_path, monkeypatch):
    """The manifest says what the store was made of, so it is not made again; and the shards may be on another disk."""
    recipe = toy_recipe(tmp_path / "out", weights, shards_dir=str(tmp_path / "scratch"))
    first = extract(recipe, videos(example, "val"))
    assert (tmp_path / "scratch" / "val.shards" / "shard_00000.arrow").is_file()
    before = content(tmp_path / "out", "val")
    shutil.rmtree(tmp_path / "scratch")
    monkeypatch.setattr(shards, "load_encoders", None)  # nothing is encoded
    again = extract(recipe, videos(example, "val"))
    assert replace(again, seconds=0.0) == replace(first, reused_shards=first.shards, seconds=0.0)
    assert content(tmp_path / "out", "val") == before and not (tmp_path / "scratch").exists()
    monkeypatch.undo()
    changed = extract(recipe, videos(example, "val", normalize_audio=False), clean=True)
    assert (changed.reused_shards, content(tmp_path / "out", "val") == before) == (0, False)
    assert not (tmp_path / "scratch" / "val.shards").exists()


def test_every_list_of_a_recipe_is_read_before_the_first_file(example, weights, tmp_path, capsys):
    recipe = {
        "name": "run",
        "model": {"variant": "small_16k", "duration": 2.0},
        "encoders": {"kind": "toy", "weights_dir": str(weights), "device": "cpu"},
        "extraction": {
            "output_dir": str(tmp_path / "out"),
            "videos": [
                {"name": "val", "media_dir": str(example / "videos"), "list": str(example / "val.tsv")},
                {"name": "own", "media_dir": str(tmp_path / "nowhere"), "list": "own-val.tsv"},
            ],
            "audios": [{"name": "a", "media_dir": str(example / "audios"), "list": "captions.tsv"}],
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for command in ("extract-video", "partition"):
        assert main([command, str(tmp_path / "recipe.yaml")]) == 2
        error = capsys.readouterr().err
        assert "nowhere: no such folder" in error
        for file in ("own-val.tsv", "captions.tsv"):
            assert (f"{file}: no such file" in error) == (command == "extract-video")
    assert not (tmp_path / "out").exists()


def test_nothing_usable_is_an_error_without_a_store(weights, tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    table = write_list(tmp_path / "list.tsv", [("a", "c"), ("b", "d")])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"all 2 items were rejected \(.*not_found 1.*bad\.rejects\.jsonl"):
            extract(toy_recipe(tmp_path / "out", weights), VideoSource("bad", str(tmp_path), str(table)))
        assert not (tmp_path / "out" / "bad").exists()
        assert len((tmp_path / "out" / "bad.rejects.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_is_seen_before_the_work(example, weights, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"\d\.\d kB are needed .* 1\.0 kB are free; free some space"):
        extract(toy_recipe(tmp_path / "out", weights), videos(example, "val"))
    assert not list((tmp_path / "out").rglob("shard_*"))
