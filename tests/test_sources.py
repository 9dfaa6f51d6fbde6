"""Official annotation files, folders and tables become media lists, and what is left out is counted."""

import json
import tarfile

import datasets
import pytest
import torch

from mmaudio_hf.cli import main
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.lists import read_media_list


def prepare(tmp_path, *words) -> dict[str, list[tuple[str, str]]]:
    """`mmaudio-hf prepare`: the rows of every list, by its name."""
    out = tmp_path / "lists"
    assert main(["prepare", *map(str, words), "--out", str(out)]) == 0
    lists = {path.stem: read_media_list(path, "caption") for path in sorted(out.glob("*.tsv"))}
    return {name: [(item.id, item.caption) for item in items] for name, items in lists.items()}


def test_vggsound(tmp_path, capsys):
    file = tmp_path / "vggsound.csv"
    file.write_text('---g-f_I2yQ,1,people marching,train\nNA,30,"tennis, with comma",train\n--x,185,waterfall,test\n')
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "---g-f_I2yQ_000001.MP4").touch()
    lists = prepare(tmp_path, "vggsound", file, "--media", tmp_path / "videos")
    assert lists == {
        "vgg-test": [("--x_000185", "waterfall")],
        "vgg-train": [("---g-f_I2yQ_000001", "people marching"), ("NA_000030", "tennis, with comma")],
    }
    printed = capsys.readouterr().out
    assert "vgg-train.tsv: 2 rows, 1 of its files are not in" in printed


def test_audiocaps_and_clotho(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("audiocap_id,youtube_id,start_time,caption\n1,r1nicOVtvkQ,130,A woman talks\n")
    lists = prepare(tmp_path, "audiocaps", tmp_path / "a.csv")
    assert lists == {"audiocaps": [("r1nicOVtvkQ_000130", "A woman talks")]}
    names = ",".join(f"caption_{i}" for i in range(1, 6))
    (tmp_path / "c.csv").write_text(f'file_name,{names}\nA B.wav,a,b,c,d,\n" bad.wav",a,b,c,d,e\n')
    lists = prepare(tmp_path, "clotho", tmp_path / "c.csv", "--name", "own")
    assert lists["own"] == [("A B", text) for text in "abcd"]
    printed = capsys.readouterr().out
    assert "left out: 1 without a caption" in printed and "left out: 5 with a name that cannot be an id" in printed
    assert main(["prepare", "clotho", str(tmp_path / "a.csv"), "--out", str(tmp_path)]) == 2
    assert "no column file_name, caption_1; it has audiocap_id" in capsys.readouterr().err


def test_wavcaps(tmp_path):
    """Every set is a list of its own, SoundBible none."""
    for name, item in (("as_final", "Y--1.wav"), ("bbc_final", "7"), ("fsd_final", "180913"), ("sb_final", "3")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": [{"id": item, "caption": f"of {name}"}]}))
    assert prepare(tmp_path, "wavcaps", tmp_path) == {
        "audioset_sl": [("Y--1", "of as_final")],
        "bbcsound": [("7", "of bbc_final")],
        "freesound": [("180913", "of fsd_final")],
    }


def test_a_folder_is_split_by_shares_that_do_not_move(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    lines = [json.dumps({"file_name": f"c{i:02d}.mp4", "text": f"clip {i}"}) for i in range(40)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    lists = prepare(tmp_path, "folder", folder, "--share", "val=0.2", "--share", "test=0.2")
    assert sorted(lists) == ["clips-test", "clips-train", "clips-val"]
    assert sum(map(len, lists.values())) == 40 and 3 <= len(lists["clips-val"]) <= 14
    (folder / "metadata.jsonl").write_text("\n".join(lines[::-1][:20]))
    fewer = prepare(tmp_path, "folder", folder, "--share", "val=0.2", "--share", "test=0.2")
    assert all(set(fewer[name]) <= set(lists[name]) for name in lists)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("clip,words\na.mp4,hello\n", [], "no column file_name or id or path"),
        ("file_name,caption\na.mp4\n", [], "line 2: not as many fields as columns"),
        ("file_name,caption\n../a/..,x\n", [], "no row can be used"),
        ("file_name,caption\na,x\n", ["--share", "val=2"], "must each be above 0"),
        ("file_name,caption\na,x\n", ["--share", "val"], "write SPLIT=X"),
        ("file_name,caption\na,x\n", ["--media", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_in_tables_are_named(tmp_path, capsys, text, words, message):
    (tmp_path / "t.csv").write_text(text)
    assert main(["prepare", "table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "lists"), *words]) == 2
    assert message in capsys.readouterr().err


def test_columns_of_a_table_may_be_named(tmp_path):
    (tmp_path / "t.tsv").write_text("clip\twords\tsplit\na.b.mp4\thello\ttrain\nNA\tyes\tval\n")
    lists = prepare(tmp_path, "table", tmp_path / "t.tsv", "--id-column", "clip", "--text-column", "words")
    assert lists == {"t-train": [("a.b", "hello")], "t-val": [("NA", "yes")]}


@pytest.mark.parametrize("form", ["folder", "parquet", "webdataset"])
def test_a_data_set_gives_the_same_files(tmp_path, form):
    """Whatever `load_dataset` reads; so features are those of the files."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a", "b"):
        write_audio(folder / f"{name}.wav", torch.rand(1000), 8000)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    source = str(folder)
    if form == "folder":
        (folder / "metadata.csv").write_text("file_name,caption\na.wav,of a\nb.wav,of b\n")
    elif form == "parquet":
        raw = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        rows = {"audio": [{"bytes": content, "path": name} for name, content in contents.items()]}
        rows["caption"] = [f"of {name[0]}" for name in contents]
        features = datasets.Features({"audio": raw, "caption": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "clips.parquet")
        source = f"parquet:{tmp_path / 'clips.parquet'}"
    else:
        with tarfile.open(tmp_path / "clips.tar", "w") as tar:
            for name in sorted(contents):
                (folder / f"{name[0]}.json").write_text(json.dumps({"caption": f"of {name[0]}"}))
                tar.add(folder / name, name)
                tar.add(folder / f"{name[0]}.json", f"{name[0]}.json")
        source = f"webdataset:{tmp_path / 'clips.tar'}"
    for _ in range(2):
        lists = prepare(tmp_path, "dataset", source, "--media", tmp_path / "media")
        assert {name: sorted(rows) for name, rows in lists.items()} == {"clips": [("a", "of a"), ("b", "of b")]}
        assert {path.name: path.read_bytes() for path in (tmp_path / "media").iterdir()} == contents


def test_a_data_set_that_cannot_be_read_is_named(tmp_path, capsys):
    words = ["prepare", "dataset", f"parquet:{tmp_path / 'none.parquet'}", "--out", str(tmp_path)]
    assert main(words) == 2 and "give the folder" in capsys.readouterr().err
    assert main([*words, "--media", str(tmp_path / "media")]) == 2
    assert "none.parquet', split 'train', cannot be read" in capsys.readouterr().err
