"""Audio against frames: what is found among synthesised faults, by media and by store, and its use in extraction."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fake_av_bench import FakeAvBench
from forked import Command

from mmaudio_hf.cli import main
from mmaudio_hf.config import EncoderConfig, load_recipe
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.evaluation import offsets as module
from mmaudio_hf.evaluation.av_bench import SYNCHFORMER_FILE, AvBench
from mmaudio_hf.evaluation.metrics import SYNC_CLASSES
from mmaudio_hf.files import sha256_of
from mmaudio_hf.media.audit import OF_SYNC, AuditSource, Limits, known_offsets, known_problems, sync_status
from mmaudio_hf.media.example import FPS, _write_mp4, write_faulty_media
from mmaudio_hf.media.video import read_video
from mmaudio_hf.pages.report import _video_and_audio
from mmaudio_hf.weights import CLAP_FILE

CLIPS = 20


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """Clips of which three have their audio early or late, three that of another, two do not move."""
    return write_faulty_media(tmp_path_factory.mktemp("faulty"), {"train": CLIPS}, seed=1)


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """A file of one content is decoded once, however often it is read in this process."""
    read, known = module.MediaClips._read, {}

    def once(clips, index):
        key = sha256_of(Path(clips.items[index].path)), clips.starts[index], clips.comparison.seconds
        if key not in known:
            known[key] = read(clips, index)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.MediaClips, "_read", once)
        yield


def write_recipe(folder: Path, media: Path, **extraction) -> Path:
    videos = [{"name": "train", "media_dir": str(media / "videos"), "list": str(media / "train.tsv")}]
    encoders = {"kind": "toy", "weights_dir": str(folder), "device": "cpu"}
    tree = {"encoders": encoders, "extraction": {"output_dir": str(folder), "videos": videos, **extraction}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def audited(faulty, tmp_path_factory) -> Path:
    """The recipe of a folder with an audit of these clips."""
    recipe = write_recipe(tmp_path_factory.mktemp("audited"), faulty)
    assert main(["audit", str(recipe), "--sync", "--workers", "1"]) == 0
    return recipe


def rows_of(table: Path) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(table).to_pylist()}


def faults_of(media: Path) -> dict[str, dict]:
    return json.loads((media / "faults.json").read_text())


def assert_verdicts(rows: dict[str, dict], faults: dict[str, dict]) -> None:
    assert len(rows) == CLIPS and {fault["fault"] for fault in faults.values()} == {"", "offset", "unrelated", "still"}
    for item_id, fault in faults.items():
        row, kind = rows[item_id], fault["fault"]
        assert row["sync"] == {"": "related", "still": "unknown"}.get(kind, kind), item_id
        assert OF_SYNC & set(row["verdicts"]) == ({kind} if kind in OF_SYNC else set())
        if kind in ("", "offset"):
            assert row["sync_offset"] == pytest.approx(fault["offset"], abs=0.04)
            assert row["sync_chance"] < 0.01 < 0.2 < row["sync_fit"] <= 1
        if kind == "unrelated":
            assert row["sync_chance"] > 0.01


def test_other_audio_and_offsets_among_media(audited, faulty):
    rows, faults = rows_of(audited.with_name("audit.parquet")), faults_of(faulty)
    assert_verdicts(rows, faults)
    late = next(i for i, fault in faults.items() if fault["fault"] == "offset")
    direction = "late" if faults[late]["offset"] > 0 else "early"
    (reason,) = [r for v, r in zip(rows[late]["verdicts"], rows[late]["reasons"], strict=True) if v == "offset"]
    assert reason.startswith(f"the audio is {abs(rows[late]['sync_offset']):.3f} s {direction}; 0.")
    page = audited.with_name("audit.html").read_text()
    for title in ("Audio after what is seen", "Fit of audio and frames", "Audio of other clips that fits as well"):
        assert f"<figcaption>{title}" in page
    for verdict in ("unrelated", "offset"):
        section = page.split(f'<h3 id="{verdict}">')[1].split("<h3")[0]
        for item_id in (i for i, fault in faults.items() if fault["fault"] == verdict):
            assert f"<bdi>{item_id}</bdi>" in section and f'videos/{item_id}.mp4"></video>' in section
    assert "3 offset, 3 unrelated, 2 unknown" in page and "not compared with captions and frames" in page


def test_a_rerun_measures_only_what_has_changed(audited, faulty, tmp_path, monkeypatch, capsys):
    media, read = shutil.copytree(faulty, tmp_path / "media"), []
    recipe = write_recipe(tmp_path, media, shard_size=10)
    one = module.MediaClips._read
    monkeypatch.setattr(module.MediaClips, "_read", lambda self, index: read.append(index) or one(self, index))
    words = ["audit", str(recipe), "--sync", "--workers", "1", "--num-shards", "2", "--shard-index"]
    assert main([*words, "1"]) == 0
    even, odd = list(range(0, 20, 2)), list(range(1, 20, 2))
    assert "10 clips are still to be measured" in capsys.readouterr().out and read == odd
    assert not (tmp_path / "audit.parquet").exists()
    lines = tmp_path / "audit.sync.jsonl"
    lines.write_bytes(lines.read_bytes()[:-40])  # as a kill leaves it: the block of this line is measured again
    assert main([*words, "1"]) == 0 and read[10:] == odd
    assert main([*words, "0"]) == 0 and read[20:] == even
    table = rows_of(tmp_path / "audit.parquet")
    assert_verdicts(table, faults_of(faulty))
    for path in (media / "videos").iterdir():
        os.utime(path, ns=(1, 1))  # the same content
    assert main(words[:5]) == 0 and len(read) == 30
    shutil.copy(media / "videos" / "train_000.mp4", media / "videos" / "train_001.mp4")
    assert main([*words[:5], "--max-chance", "0.02"]) == 0 and read[30:] == odd
    few = media / "few.tsv"
    few.write_text("".join((media / "train.tsv").read_text().splitlines(keepends=True)[:4]))
    words = [*words[:2], f"extraction.videos.0.list={few}", *words[2:5]]
    assert main([*words, "--sync-duration", "4"]) == 0 and read[40:] == [0, 1, 2], "other settings are other figures"
    assert {row["sync_seconds"] for row in rows_of(tmp_path / "audit.parquet").values()} == {4.0}


def test_two_processes_divide_the_blocks(audited, faulty, tmp_path):
    recipe = write_recipe(tmp_path, faulty, shard_size=10)
    shutil.copy(audited.with_name("audit.sqlite"), tmp_path)  # the figures of the files
    environment = os.environ | {"WORLD_SIZE": "2"}
    words = ("audit", str(recipe), "--sync", "--workers", "1")
    both = [Command(*words, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert_verdicts(rows_of(tmp_path / "audit.parquet"), faults_of(faulty))
    lines = [json.loads(line) for line in (tmp_path / "audit.sync.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == sorted(faults_of(faulty)), "each clip was measured once"


def test_extraction_leaves_out_and_corrects(audited, faulty, tmp_path, capsys):
    table, faults, kept, few = audited.with_name("audit.parquet"), {}, {}, faulty / "eight.tsv"
    for item_id, fault in faults_of(faulty).items():  # three late or early, two of another, three as they should be
        kept[fault["fault"]] = kept.get(fault["fault"], 0) + 1
        if kept[fault["fault"]] <= {"offset": 3, "unrelated": 2, "": 3}.get(fault["fault"], 0):
            faults[item_id] = fault
    header, *lines = (faulty / "train.tsv").read_text().splitlines(keepends=True)
    few.write_text(header + "".join(line for line in lines if line.split("\t")[0] in faults))
    rows, settings = rows_of(table), {"videos.0.list": few, "audit": table, "output_dir": tmp_path, "batch_size": 4}
    changes = [f"extraction.{name}={value}" for name, value in settings.items()]
    words = ["extract-video", str(audited), "model.duration=2.0", f"encoders.weights_dir={tmp_path}", *changes]
    assert main([*words, "extraction.reject=[unrelated]", "extraction.correct_offset=true"]) == 0
    kinds = {kind: {i for i, fault in faults.items() if fault["fault"] == kind} for kind in ("offset", "unrelated")}
    rejects = [json.loads(line) for line in (tmp_path / "train.rejects.jsonl").read_text().splitlines()]
    rejects = [line for line in rejects if line["reason"] != "unlisted"]
    assert {line["id"]: line["reason"] for line in rejects} == dict.fromkeys(kinds["unrelated"], "unrelated")
    assert all("of the audio of other clips fits its frames as well" in line["message"] for line in rejects)
    offsets = json.loads((tmp_path / "train.offsets.json").read_text())
    assert offsets == {item_id: rows[item_id]["sync_offset"] for item_id in kinds["offset"]}
    with FeatureStore.open(tmp_path / "train") as store:
        assert store.manifest["counts"] == {"listed": 8, "accepted": 6, "rejected": 2, "corrected": 3}
        assert set(store.ids) == set(faults) - kinds["unrelated"]
    verify = ["store", "verify", str(tmp_path / "train"), "--sample", "6", "--media", str(faulty / "videos")]
    assert main(verify) == 0, "rows are encoded again from the shifted audio"
    shifted = load_recipe(audited, ["model.duration=2.0", *changes])
    for item_id, offset in offsets.items():
        seen = _video_and_audio(SimpleNamespace(item_id=item_id, store="train", duration=2.0), shifted, True)
        path = faulty / "videos" / f"{item_id}.mp4"
        assert seen[:2] == (path, max(0.0, -offset)), "the report shows and compares the same"
        assert torch.equal(seen[2], read_video(path, duration=2.0, audio_offset=offset).audio)
    os.truncate(tmp_path / "train.offsets.json", 20)
    assert main(verify) == 2 and "offsets.json is missing or damaged" in capsys.readouterr().err
    assert main([*words, "extraction.reject=[unrelated, offset]"]) == 0, "another table of rejects is another store"
    with FeatureStore.open(tmp_path / "train") as store:
        assert "corrected" not in store.manifest["counts"] and len(store) == 3
    assert not (tmp_path / "train.offsets.json").exists()


def test_tables_of_earlier_versions_and_without_sync(audited, faulty, tmp_path, capsys):
    table, old = audited.with_name("audit.parquet"), tmp_path / "old.parquet"
    source = AuditSource("train", "video", faulty / "videos", faulty / "train.tsv")
    pq.write_table(pq.read_table(table).drop_columns(["clip", "start", "sync_unknown"]), old)
    assert known_offsets(old, source, renew="x") == known_offsets(table, source, renew="x")
    problems = known_problems(old, source, ["unrelated"], renew="x")
    assert len(problems) == 3 and problems == known_problems(table, source, ["unrelated"], renew="x")
    words = ["extract-video", str(audited), f"extraction.audit={table}", f"extraction.output_dir={tmp_path}"]
    shutil.copy(table, tmp_path / "plain.parquet")
    assert main(["audit", str(audited), "--out", str(tmp_path / "plain.parquet"), "--workers", "1"]) == 0
    capsys.readouterr()
    for changes, message in (
        (["extraction.reject=[unrelated]"], "reject names unrelated, but it was made without --sync; renew it with"),
        (["extraction.correct_offset=true"], "correct_offset is set, but it was made without --sync"),
    ):
        assert main([*words, f"extraction.audit={tmp_path / 'plain.parquet'}", *changes]) == 2
        assert message in capsys.readouterr().err
    assert main([*words, "extraction.correct_offset=true", "extraction.reject=[offset]"]) == 2
    assert "choose one of the two" in capsys.readouterr().err
    assert main([*words, "extraction.correct_offset=true", "extraction.audit=''"]) == 2
    assert "correct_offset needs extraction.audit" in capsys.readouterr().err


def join(paths: list[Path], path: Path, still: bool) -> None:
    """A video of the first 8 s of each, and a little more; of the first of them a still frame in silence if `still`."""
    clips = [read_video(each, as_uint8=True) for each in paths]
    frames, audio = torch.cat([clip.sync_frames for clip in clips]), torch.cat([clip.audio for clip in clips])
    if still:
        frames[: 8 * FPS], audio[: 8 * 16000] = frames[0].clone(), 0.0
    frames, audio = torch.cat([frames, frames[-4:]]), torch.nn.functional.pad(audio, (0, 2560))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_mp4(path, iter(frames[:, :, ::2, ::2].permute(0, 2, 3, 1).contiguous().numpy()), audio[None].numpy(), 16000)


def test_every_clip_of_a_long_video_is_audited(faulty, tmp_path, capsys):
    """Verdicts, rejects and corrections are of clips: a fault of a later one is found, and leaves the others alone."""
    faults, lines, kinds = faults_of(faulty), ["id\tlabel\n"], {}
    right, late, other = ([i for i, f in faults.items() if f["fault"] == k] for k in ("", "offset", "unrelated"))
    takes = [(right[0], late[0], right[1]), (right[2], other[0], right[3]), (right[4], late[1], right[5])]
    for n, ids in enumerate([*takes, (right[6], other[1])]):
        join([faulty / "videos" / f"{i}.mp4" for i in ids], tmp_path / "media" / "videos" / f"take{n}.mp4", n == 2)
        lines.append(f"take{n}\tthing {n}\n")
        kinds |= {f"take{n}_{k}": faults[i] for k, i in enumerate(ids)}
    kinds["take2_0"] = {"fault": "still"}
    (tmp_path / "media" / "train.tsv").write_text("".join(lines))
    recipe, use = write_recipe(tmp_path, tmp_path / "media"), f"extraction.audit={tmp_path / 'audit.parquet'}"
    words = [str(recipe), "extraction.videos.0.max_clips=0"]
    assert main(["audit", *words, "--sync", "--num-shards", "2", "--shard-index", "0"]) == 2
    assert "train.clips.tsv is missing: run `mmaudio-hf partition" in capsys.readouterr().err
    assert main(["audit", *words, "--sync", "--workers", "1", "--max-chance", "0.02"]) == 0
    rows = {row["clip"]: row for row in pq.read_table(tmp_path / "audit.parquet").to_pylist()}
    status = {name: {"": "related", "still": "unknown"}.get(f["fault"], f["fault"]) for name, f in kinds.items()}
    assert {name: row["sync"] for name, row in rows.items()} == status
    verdicts = {name: row["verdicts"] for name, row in rows.items() if row["verdicts"]}
    assert verdicts.pop("take2_0") == ["still", "silent"], "of its first clip alone"
    assert verdicts == {name: [s] for name, s in status.items() if s in OF_SYNC}
    lines = map(json.loads, (tmp_path / "audit.sync.jsonl").read_text().splitlines())
    others = {line["id"]: len(line["others"]) for line in lines if "others" in line}
    assert {name[:5]: count for name, count in others.items()} == {"take0": 7, "take1": 7, "take2": 8, "take3": 8}
    late = {name: f["offset"] for name, f in kinds.items() if f["fault"] == "offset"}
    assert {name: rows[name]["sync_offset"] for name in late} == pytest.approx(late, abs=0.04)
    page = (tmp_path / "audit.html").read_text()
    assert f'videos/take0.mp4#t={rows["take0_1"]["start"]:g}"></video>' in page and "<bdi>take1_1</bdi>" in page
    correct = [use, "extraction.correct_offset=true", "extraction.reject=[unrelated, still]"]
    assert main(["extract-video", *words, *correct]) == 0
    rejects = [json.loads(line) for line in (tmp_path / "train.rejects.jsonl").read_text().splitlines()]
    left_out = {"take1_1": "unrelated", "take3_1": "unrelated", "take2_0": "still"}
    assert {line["id"]: line["reason"] for line in rejects} == left_out
    assert json.loads((tmp_path / "train.offsets.json").read_text()) == {n: rows[n]["sync_offset"] for n in late}
    assert main(["extract-video", *words, *correct, "model.duration=4"]) == 2, "other clips"
    assert "listed files or clips are new or have changed" in capsys.readouterr().err


def test_audio_is_read_from_where_it_belongs(faulty):
    path, options = faulty / "videos" / "train_000.mp4", {"duration": 4.0, "as_uint8": True, "normalize_audio": False}
    plain, later = read_video(path, **options), read_video(path, start=0.52, **options)
    late, early = (read_video(path, audio_offset=offset, **options) for offset in (0.52, -0.52))
    assert torch.equal(late.sync_frames, plain.sync_frames) and torch.equal(late.audio, later.audio)
    assert torch.equal(early.clip_frames, later.clip_frames) and torch.equal(early.audio, plain.audio)
    for offset, alignment in ((float("nan"), "timestamps"), (0.1, "reference")):
        with pytest.raises(ValueError, match="audio_offset"):
            read_video(path, audio_offset=offset, alignment=alignment)


def test_without_an_event_no_relation_is_denied(tmp_path, monkeypatch):
    """Steady motion or audio, and clips of which a half is empty, are unknown, not unrelated; a fit still counts."""
    method = module._Motion(module.Comparison(EncoderConfig(kind="toy"), "16k", 8.0, AvBench("", tmp_path)))
    random, every = torch.Generator().manual_seed(0), torch.arange(200) % 25 < 2
    clicks = torch.arange(128_000) % 16_000 < 400
    noise = torch.randn(128_000, generator=random)
    pan, half = 4 + torch.rand(200, generator=random), torch.arange(200) > 101
    for amount, waveform, steady in (
        (5.0 * every, clicks * noise, False),
        (pan, clicks * noise, True),
        (5.0 * every, 0.1 * noise, True),
        (5.0 * every * half, clicks * noise, True),
        (5.0 * every, clicks * noise * (torch.arange(128_000) > 65_000), True),
    ):
        monkeypatch.setattr(module.toy, "motion", lambda features, amount=amount: (amount, torch.tensor(1.0)))
        mel = module.MelSpectrogram("16k")(waveform[None])[0]
        *_, known = method.signals(module.Loaded(torch.zeros(0), mel, None))
        assert known == ({"moves": True, "steady": True} if steady else {"moves": True})
        heard = known | {"sync_chance": 0.5, "least_chance": 0.001, "sync_offset": 0.1}
        assert sync_status(heard, Limits())[0] == ("unknown" if steady else "unrelated")
        assert sync_status(heard | {"sync_chance": 0.001}, Limits()) == ("related", "")


def test_a_finished_store_needs_no_media(audited, faulty, tmp_path, capsys):
    """The same verdicts of the sync features and latents alone, the ids that are ok, and what has no frames."""
    recipe, faults = write_recipe(tmp_path, faulty), faults_of(faulty)
    assert main(["extract-video", str(recipe)]) == 0
    store, ids = tmp_path / "train", tmp_path / "ok.txt"
    assert main(["store", "audit", str(store), "--ok-ids", str(ids)]) == 0
    output = capsys.readouterr().out
    assert "14 of 20 items are ok" in output and "clap_score and imagebind_score are not measured" in output
    assert_verdicts(rows_of(tmp_path / "train.audit.parquet"), faults)
    right = [item_id for item_id in faults if faults[item_id]["fault"] not in OF_SYNC]
    assert ids.read_text().split() == right
    assert main(["store", "subset", str(store), str(tmp_path / "clean"), "--ids", str(ids)]) == 0
    assert main(["store", "audit", str(tmp_path / "clean"), "--max-offset", "0.001"]) == 0
    rows = rows_of(tmp_path / "clean.audit.parquet")
    assert {row["sync"] for row in rows.values()} == {"related", "offset", "unknown"} and list(rows) == right
    (tmp_path / "few.txt").write_text("\n".join(right[:5]))
    assert main(["store", "subset", str(store), str(tmp_path / "few"), "--ids", str(tmp_path / "few.txt")]) == 0
    assert main(["store", "audit", str(tmp_path / "few")]) == 0
    rows = rows_of(tmp_path / "few.audit.parquet")
    assert {row["sync"] for row in rows.values()} == {"unknown"}, "20 comparisons cannot show a chance of 1 %"
    assert main(["store", "audit", str(tmp_path / "absent")]) == 2 and "absent" in capsys.readouterr().err


def test_relevance_needs_av_benchmark(faulty, tmp_path, capsys):
    fake = FakeAvBench(tmp_path / "fake", networks=True)
    for name in (SYNCHFORMER_FILE, CLAP_FILE):
        (tmp_path / name).write_bytes(b"weights")
    few = faulty / "few.tsv"
    few.write_text("".join((faulty / "train.tsv").read_text().splitlines(keepends=True)[:5]))
    recipe = write_recipe(tmp_path, faulty)
    words = ["audit", str(recipe), f"extraction.videos.0.list={few}", "--relevance", "--workers", "1"]
    assert main([*words, f"evaluation.av_bench_python={tmp_path / 'python'}"]) == 2
    message = capsys.readouterr().err
    assert (
        "clap_score and imagebind_score are measured by av-benchmark" in message and "install av-benchmark" in message
    )
    options = [f"evaluation.av_bench_python={fake.python}", f"evaluation.av_bench_weights={tmp_path}"]
    (tmp_path / CLAP_FILE).write_bytes(b"others")
    assert main([*words, *options]) == 1
    assert "av-benchmark did not make clap_laion_audio (AssertionError" in capsys.readouterr().err
    (tmp_path / CLAP_FILE).write_bytes(b"weights")
    assert main([*words, *options, "--min-clap", "1.01"]) == 0
    rows = rows_of(tmp_path / "audit.parquet").values()
    assert all(-1 <= row[name] <= 1 for row in rows for name in ("clap_score", "imagebind_score"))
    assert all("caption_mismatch" in row["verdicts"] for row in rows)
    assert "less than 1.01" in (tmp_path / "audit.html").read_text()


def test_offsets_by_synchformer(tmp_path):
    """Its classes say how early the audio is; the offset is the mean of the largest and its neighbours."""
    method = object.__new__(module._Synchformer)
    method.device, logits = torch.device("cpu"), torch.full((2, 21), -9.0)
    logits[0, [13, 14]], logits[1, 3] = torch.tensor([1.0, 1.0]), 4.0
    method.head = lambda video, audio: logits[: len(video)]
    clips = [torch.zeros(24, 8, 768)] * 2, [torch.zeros(24, 6, 768)] * 2
    offsets, fits = method.compare(*clips)
    assert offsets == pytest.approx([-(SYNC_CLASSES[13] + SYNC_CLASSES[14]) / 2, -SYNC_CLASSES[3]], abs=1e-3)
    assert fits == pytest.approx([1, 1], abs=1e-2) and offsets[0] < 0 < offsets[1]
    still = torch.randn(8, 768).expand(24, 8, 768)
    assert module._still([still, still + 0.01 * torch.randn(24, 8, 768)]) == [True, True], "the usual is still"
    quiet = 1e-4 * torch.randn(16000)
    assert module._silent(quiet, 16000) and not module._silent(quiet + (torch.arange(16000) < 2000), 16000)
    varied = torch.randn(24, 8, 768, generator=torch.Generator().manual_seed(0))
    assert module._still([varied, varied * 0.01, varied]) == [False, True, False]
    with pytest.raises(ValueError, match=r"Synchformer compares 4\.8 s or more, not 4 s"):
        module.Comparison(EncoderConfig(), "16k", 4.0, AvBench("", tmp_path))
    with pytest.raises(ValueError, match="offsets by Synchformer are measured by av-benchmark"):
        module.Comparison(EncoderConfig(), "16k", 8.0, AvBench(str(tmp_path / "none"), tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-chance", "0.1"], "--max-chance has no effect without --sync"),
        (["--num-shards", "2"], "--num-shards has no effect without --sync"),
        (["--max-offset", "0"], "--max-offset has no effect without --sync"),
        (["--sync", "--num-shards", "2"], "give both or neither"),
        (["--sync", "--sync-duration", "0.1"], "shorter than one sync segment"),
        (["--sync", "--max-offset", "-1"], "max_offset must be 0 or more"),
        (["--sync", "--out", "x.txt"], "the table of an audit is a .parquet file"),
    ],
)
def test_wrong_arguments(audited, words, message, capsys):
    assert main(["audit", str(audited), "--out", str(audited.with_name("x.parquet")), *words]) == 2
    assert message in capsys.readouterr().err
