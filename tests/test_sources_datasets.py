"""Data sets as sources of a recipe: whatever `datasets` reads gives the features that files give."""

import json
import shutil
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import datasets
import pytest
import torch
import yaml
from hub_server import TOKEN, Hub
from huggingface_hub import HfFileSystem
from odd_media import Odd, joined_audio, remux, retime_audio, steady, truncate, write_odd

from mmaudio_hf.cli import main
from mmaudio_hf.config import DatasetConfig, VideoSource
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.media.audio import audio_frame, write_audio
from mmaudio_hf.media.lists import read_media_list
from mmaudio_hf.sources import write_dataset

FORMS = ["folder", "parquet", "binary", "webdataset", "hub", "hub downloaded"]
RAW = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def write_compressed(path: Path, codec: str, waveform: torch.Tensor, rate: int = 44_100) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = audio_frame(waveform, rate, "fltp")
        frame.pts = 0
        container.mux([*stream.encode(frame), *stream.encode(None)])


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Videos and audio files of several kinds, a damaged one each, and the stores that the files themselves give."""
    folder = tmp_path_factory.mktemp("media")
    videos, audios = folder / "videos", folder / "audios"
    videos.mkdir()
    audios.mkdir()
    write_odd(videos / "plain.mp4", Odd(steady(2.5)))
    write_odd(videos / "late.mkv", Odd(steady(2.5), audio_start=0.3))
    write_odd(videos / "rotated.MOV", Odd(steady(2.5), size=(96, 64), rotation=90))
    write_odd(videos / "short.mp4", Odd(steady(0.5)))
    shutil.move(joined_audio(folder / "joined.mp4", 2.5, 0.5, 44_100), videos)
    for ending in ("ts", "flv", "3gp", "mkv", "m2ts"):
        remux(videos / "plain.mp4", videos / f"in_{ending}.{ending}")
    truncate(videos / "plain.mp4", videos / "damaged.mp4", 0.5)
    noise = torch.rand(9 * 44_100, generator=torch.Generator().manual_seed(0)) - 0.5
    write_audio(audios / "a.wav", noise, 44_100)
    write_audio(audios / "b.flac", noise * 0.1, 44_100)
    write_compressed(audios / "c.mp3", "libmp3lame", noise)
    write_compressed(audios / "d.ogg", "libopus", noise, 48_000)
    codecs = {"m4a": "aac", "aac": "aac", "opus": "libopus", "webm": "libopus", "mka": "libopus", "mp4": "aac"}
    for ending, codec in codecs.items():
        write_compressed(audios / f"e_{ending}.{ending}", codec, noise, 48_000)
    retime_audio(audios / "e_mka.mka", audios / "paused.mka", lambda _, time: time + (time >= 3))
    for name in ("e_aac.aac", "c.mp3"):
        (audios / f"tail_{name}").write_bytes((audios / name).read_bytes() + bytes(3000))
    write_audio(audios / "shouting.FLAC", noise, 44_100)
    truncate(audios / "a.wav", audios / "damaged.wav", 0.5)
    for kind in (videos, audios):
        rows = [f"{path.stem}\tof {path.stem}" for path in sorted(kind.iterdir())]
        (folder / f"{kind.name}.tsv").write_text("id\tcaption\n" + "\n".join(rows) + "\n")
    extract(folder, folder, **{kind: {"list": str(folder / f"{kind}.tsv")} for kind in ("videos", "audios")})
    return folder


def extract(folder: Path, weights: Path, code: int = 0, **sources: dict) -> None:
    """All stores of a recipe in `folder`, by the commands. sources: name of the store -> settings of its source."""
    entries = {name: [{"name": name, "media_dir": str(folder / name), **source}] for name, source in sources.items()}
    tree = {
        "model": {"variant": "small_16k", "duration": 2.0},
        "encoders": {"kind": "toy", "weights_dir": str(weights), "device": "cpu"},
        "extraction": {"output_dir": str(folder / "out"), "shard_size": 2, "batch_size": 2, **entries},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    for command in ["extract-video"] + ["partition", "extract-audio"] * ("audios" in sources):
        assert main([command, str(folder / "recipe.yaml")]) == code, command


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A Hub on loopback, for `datasets` too, which has read its variables already."""
    with Hub(tmp_path / "hub") as server:
        server.use_here(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "home"))
        HfFileSystem.clear_instance_cache()
        yield server
        HfFileSystem.clear_instance_cache()


def write_form(form: str, folder: Path, kind: str, target: Path, hub: Hub) -> dict:
    """The media of a folder as a data set, and the `dataset` section of a source."""
    files = sorted((folder / kind).iterdir())
    singular, captions = kind[:-1], [f"of {path.stem}" for path in files]
    rows = [f"{path.name},{caption}" for path, caption in zip(files, captions, strict=True)]
    metadata = "file_name,caption\n" + "\n".join(rows)
    if form == "folder":
        shutil.copytree(folder / kind, target / f"set of {kind}")
        (target / f"set of {kind}" / "metadata.csv").write_text(metadata)
        return {"path": str(target / f"set of {kind}")}
    if form.startswith("hub"):
        repository = hub.repository(f"tester/{kind}", "datasets")
        repository.create(private=True)
        repository.add({path.name: path.read_bytes() for path in files} | {"metadata.csv": metadata.encode()})
        return {"path": f"tester/{kind}", "streaming": form == "hub"}
    if form == "webdataset":
        with tarfile.open(target / f"{kind}.tar", "w") as tar:
            for path, caption in zip(files, captions, strict=True):
                (target / "x.json").write_text(json.dumps({"caption": caption}))
                tar.add(path, f"{path.stem}.{singular}")  # one column for all endings
                tar.add(target / "x.json", f"{path.stem}.json")
        return {"path": f"webdataset:{target / kind}.tar", "media_column": singular}
    values = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    columns = {"words": captions, singular: values}
    features = {"words": datasets.Value("string"), singular: RAW}
    if form == "binary":  # bytes alone, so names are in a column of their own
        columns |= {singular: [value["bytes"] for value in values], "clip": [path.stem for path in files]}
        features |= {singular: datasets.Value("binary"), "clip": datasets.Value("string")}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.to_parquet(target / f"{kind}.parquet")
    names = {"text_column": "words"} | ({"id_column": "clip"} if form == "binary" else {})
    return {"path": f"parquet:{target / kind}.parquet", "streaming": form == "binary", **names}


@pytest.mark.parametrize("form", FORMS)
def test_features_are_those_of_the_files(media, tmp_path, form, hub):
    sources = {
        kind: {"list": str(tmp_path / f"lists/{kind}.tsv"), "dataset": write_form(form, media, kind, tmp_path, hub)}
        for kind in ("videos", "audios")
    }
    extract(tmp_path, media, **sources)
    for kind, accepted in (("videos", 9), ("audios", 14)):
        with FeatureStore.open(media / "out" / kind) as ours, FeatureStore.open(tmp_path / "out" / kind) as theirs:
            assert len(ours) == len(theirs) >= accepted
            order = [theirs.ids.index(item_id) for item_id in ours.ids]
            assert [theirs.captions[row] for row in order] == ours.captions
            expected, values = ours.read(range(len(ours))), theirs.read(order)
            assert expected.keys() == values.keys()
            assert all(torch.equal(expected[name], values[name]) for name in expected)
        rejects = [
            {line["id"]: line["reason"] for line in map(json.loads, (out / f"{kind}.rejects.jsonl").open())}
            for out in (media / "out", tmp_path / "out")
        ]
        assert rejects[0] == rejects[1] and "damaged" in rejects[0]


def write_parquet(path: Path, contents: list[bytes], **columns: list) -> str:
    """A parquet file with bytes of videos; returns how a recipe names it."""
    values = {"video": [{"bytes": content, "path": None} for content in contents], **columns}
    features = {"video": RAW} | {name: datasets.Value("string") for name in columns}
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).to_parquet(path)
    return f"parquet:{path}"


def extract_videos(folder: Path, weights: Path, code: int = 0, **dataset) -> None:
    """`extract-video` of a data set."""
    extract(folder, weights, code, videos={"list": str(folder / "list.tsv"), "dataset": dataset})


@pytest.fixture
def clips(media) -> list[bytes]:
    return [path.read_bytes() for path in sorted((media / "videos").glob("[lpr]*"))]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"media_column": "film"}, "has no column 'film': it has video, caption, name"),
        ({"id_column": "file"}, "has no column 'file': it has video, caption, name"),
        ({"text_column": "words"}, "has no column 'words': it has video, caption, name"),
        ({"split": "valid"}, "split 'valid', cannot be read: Bad split: valid. Available splits: ['train']"),
        ({"path": "parquet:none.parquet"}, "none.parquet"),
        ({"path": "parkett:x"}, "'parkett:x'"),
        ({"path": __file__}, f"{__file__} is a file: write BUILDER:{__file__}"),
        ({"path": "pandas:x.pkl"}, "files of pandas are pickles"),
        ({"path": "", "split": "val"}, "dataset.path is missing beside split"),
        ({"path": "tester/none"}, "'tester/none', split 'train', cannot be read: Dataset 'tester/none' doesn't exist"),
    ],
)
def test_mistakes_are_named(clips, tmp_path, capsys, hub, dataset, message):
    path = write_parquet(tmp_path / "a.parquet", clips[:1], caption=["x"], name=["n"])
    extract_videos(tmp_path, tmp_path, 2, **({"path": path, "split": "train"} | dataset))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "list.tsv").exists() and not (tmp_path / "out").exists()


def test_without_a_network(tmp_path, capsys, hub, monkeypatch):
    hub.kill()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    extract_videos(tmp_path, tmp_path, 2, path="tester/clips")
    assert "error: data set 'tester/clips', split 'train', cannot be read: " in capsys.readouterr().err


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of every file of a folder."""
    stats = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def test_a_second_run_reads_nothing_again(clips, media, tmp_path, capsys):
    path = write_parquet(tmp_path / "a.parquet", clips, caption=["a", "b", "c"], id=["a", "b.mp4", "x/c.mp4"])
    extract_videos(tmp_path, media, path=path, id_column="id")
    assert "list.tsv: 3 rows, all files in" in capsys.readouterr().out
    assert (tmp_path / "list.tsv").read_text() == "id\tlabel\na\ta\nb\tb\nc\tc\n"
    files, store = state(tmp_path / "videos"), state(tmp_path / "out" / "videos")
    extract_videos(tmp_path, media, path=path, id_column="id")
    assert "list.tsv" not in capsys.readouterr().out and files == state(tmp_path / "videos")
    shutil.rmtree(tmp_path / "videos")  # files written again have their time, so the store is known
    extract_videos(tmp_path, media, path=path, id_column="id")
    assert {k: v[1:] for k, v in files.items()} == {k: v[1:] for k, v in state(tmp_path / "videos").items()}
    assert store == state(tmp_path / "out" / "videos")
    write_parquet(tmp_path / "a.parquet", clips[:2], caption=["a", "new"], id=["a", "b"])
    extract_videos(tmp_path, media, path=path, id_column="id")
    with FeatureStore.open(tmp_path / "out" / "videos") as changed:
        assert (changed.ids, changed.captions) == (["a", "b"], ["a", "new"])
    write_parquet(tmp_path / "a.parquet", clips[::-1][:1], caption=["a"], id=["a"])
    extract_videos(tmp_path, media, 2, path=path, id_column="id")
    assert f"{tmp_path / 'videos' / 'a.mp4'} exists and is another file" in capsys.readouterr().err


def test_rows_that_cannot_be_used_are_named(clips, media, tmp_path, capsys):
    ids = ["good", "../../up", "a/b", " out ", "", None, "twice", "twice", "empty", "gone"]
    contents = [clips[0]] * 6 + [clips[0], clips[1], clips[2], None]
    captions = ["yes"] * 8 + ["", "x"]
    path = write_parquet(tmp_path / "in" / "a.parquet", contents, caption=captions, id=ids)
    folder = tmp_path / "in" / "work"
    folder.mkdir()
    extract_videos(folder, media, path=path, id_column="id")
    assert sorted(path.name for path in (folder / "videos").iterdir()) == ["good.mp4", "twice.mp4"]
    assert not list(tmp_path.glob("up*")) and not list((tmp_path / "in").glob("up*"))
    printed = capsys.readouterr().out
    for line in (
        f"list.tsv: 2 rows, all files in {folder / 'videos'}",
        f"left out: 5 with a name that cannot be an id, the first: id '../../up' is not a plain name: separators and"
        f" '..' are not allowed (data set {path!r}, row 1)",
        f"left out: 1 with the id of another file, the first: data set {path!r}, row 7: 'twice'",
        f"left out: 1 without a caption, the first: data set {path!r}, row 8: 'empty'",
        f"left out: 1 without media, the first: data set {path!r}, row 9: 'gone'",
    ):
        assert line in printed
    left_out = json.loads((folder / "list.dataset.json").read_text())["left_out"]
    assert sum(map(len, left_out.values())) == 8 and len(left_out["with a name that cannot be an id"]) == 5


def test_files_of_others_are_not_replaced(clips, media, tmp_path, capsys):
    path = write_parquet(tmp_path / "a.parquet", clips[:1], caption=["a"])
    (tmp_path / "list.tsv").write_text("id\tlabel\nmine\tx\n")
    extract_videos(tmp_path, media, 2, path=path)
    assert "list.tsv exists and was not written from a data set" in capsys.readouterr().err
    (tmp_path / "list.tsv").unlink()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "000000.mp4").write_text("mine")
    extract_videos(tmp_path, media, 2, path=path)
    assert "000000.mp4 exists and is another file: choose another folder" in capsys.readouterr().err
    assert (tmp_path / "videos" / "000000.mp4").read_text() == "mine" and not (tmp_path / "list.tsv").exists()


def test_a_data_set_of_the_hub_reads_no_file_of_this_machine(clips, media, tmp_path, capsys, hub):
    (tmp_path / "own.mp4").write_bytes(clips[0])
    paths = [str(tmp_path / "own.mp4"), "file://" + str(tmp_path / "own.mp4"), "http://127.0.0.1:9/x.mp4", "own.mp4"]
    values = [{"bytes": None, "path": path} for path in paths] + [{"bytes": clips[0], "path": "good.mp4"}]
    features = datasets.Features({"video": RAW, "caption": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"video": values, "caption": ["x"] * 5}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    repository = hub.repository("tester/set", "datasets")
    repository.create(private=False)
    repository.add({"train.parquet": (tmp_path / "a.parquet").read_bytes()})
    extract_videos(tmp_path, media, path="tester/set")
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["good.mp4"]
    assert "left out: 4 without media" in capsys.readouterr().out


def test_a_broken_download_is_resumed(media, tmp_path, capsys, hub, monkeypatch):
    section = write_form("hub", media, "videos", tmp_path, hub)
    source = {"list": str(tmp_path / "list.tsv"), "dataset": section}
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.faults({"match": r"GET .*/plain\.mp4", "status": 500})
    extract(tmp_path, media, 2, videos=source)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: data set 'tester/videos', split 'train', row ") and TOKEN not in error
    assert not (tmp_path / "list.tsv").exists()
    before = state(tmp_path / "videos")
    assert before and "plain.mp4" not in before
    hub.faults()
    with ThreadPoolExecutor() as pool:  # as two shares of an extraction: one writes, the other waits
        config = VideoSource("v", str(tmp_path / "videos"), source["list"], dataset=DatasetConfig(section["path"]))
        written = list(pool.map(write_dataset, [config] * 2))
    assert written.count(None) == 1 and before.items() <= state(tmp_path / "videos").items()
    assert len(read_media_list(tmp_path / "list.tsv")) == len(list((media / "videos").iterdir()))
