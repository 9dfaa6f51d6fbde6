"""Official annotation files, folders and tables become media lists, and what is left out is counted."""

import gzip
import json
from pathlib import Path

import pytest

from mmaudio_hf.cli import main
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
    assert "vgg-train.tsv: 2 rows, 1 of their files missing from" in printed


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


def test_files_of_one_stem_keep_their_endings_and_a_link_its_name(tmp_path, capsys):
    for name in ("c.mp4", "c.MOV", "a/d.mp4", "b/d.mp4", "e.mp4"):
        (tmp_path / "real" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "real" / name).touch()
    names = ("c.mp4", "c.MOV", "a/d.mp4", "b/d.mp4", "e.mp4", "e.mp4")
    (tmp_path / "real" / "captions.csv").write_text("file_name,caption\n" + "".join(f"{n},of {n}\n" for n in names))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    lists = prepare(tmp_path, "folder", tmp_path / "link")
    ids = ["c.mp4", "c.MOV", "d.mp4", "e", "e"]
    assert lists == {
        "link": [(item, text) for item, text in zip(ids, map("of {}".format, names[:3] + names[4:]), strict=True)]
    }
    output = capsys.readouterr().out
    assert "with the name of another file: rename it, the first: " in output and "line 5: 'd.mp4'" in output


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("clip,words\na.mp4,hello\n", [], "no column file_name or id or path"),
        ("file_name;caption\na.mp4;hello, you\n", [], "its columns are separated by ';': save it with commas"),
        ("file_name,caption\na.mp4\n", [], "line 2: 1 fields, the header has 2"),
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
    (tmp_path / "t.tsv").write_text("\n\nclip\twords\tsplit\na.b.mp4\thello\ttrain\nNA\tyes\tval\n")
    lists = prepare(tmp_path, "table", tmp_path / "t.tsv", "--id-column", "clip", "--text-column", "words")
    assert lists == {"t-train": [("a.b", "hello")], "t-val": [("NA", "yes")]}


CSV, TABLE = "youtube_id,start_time,caption\n", "file_name,caption\n"
MALFORMED = [  # kind, name of the file, its content, what the message says after the name of the file
    ("vggsound", "v.csv", "a,one,dog,train\n", ", line 1: start 'one' is not a number of seconds"),
    ("vggsound", "v.csv", "a,1,dog,train\nb,-3,dog,train\n", ", line 2: start '-3'"),
    ("vggsound", "v.csv", "a,inf,dog,train\n", ", line 1: start 'inf'"),
    ("vggsound", "v.csv", ",1,dog,train\n", ", line 1: has no YouTube id"),
    ("vggsound", "v.csv", "a,1,dog,trian\n", ", line 1: split 'trian' is neither train nor test"),
    ("vggsound", "v.csv", "a,1,dogs, cats,train\n", ", line 1: 5 fields, the header has 4"),
    ("vggsound", "v.csv", 'a,1,"dog,train\nb,1,cat,train\n', ", line 1: a field begins with a quote here that nothing"),
    ("vggsound", "v.csv", 'a,1,x,train\nb,1,"dog,train\nc,2,cat,train\nd,3,"hen",train\n', ", line 2: "),
    ("vggsound", "v.csv", "", ": no row can be used: it has none"),
    ("audiocaps", "a.csv", CSV + "a,,dog\n", ", line 2: start '' is not a number"),
    ("audiocaps", "a.csv", "youtube_id,caption\na,b\n", ": no column start_time; it has youtube_id, caption"),
    ("audiocaps", "a.csv", CSV + 'a,1,"dog\nb,1,a cat, a hen"\n', ", line 2: a field begins with a quote"),
    ("audiocaps", "a.csv", b"youtube_id\xff,x\n", ": is not UTF-8 text"),
    ("clotho", "c.csv", "file_name,file_name,caption_1\na,b,c\n", ": column 'file_name' is there more than once"),
    ("wavcaps", "w.json", '{"data": [{"id": "1", "caption": "x"}, {"id": "2"}]}', ", data[1]: has no id and caption"),
    ("wavcaps", "w.json", '{"data": [{"id": "1", "caption": {"a": 1}}]}', ", data[0]: its caption is {'a': 1}, not"),
    ("wavcaps", "w.json", '{"data": [{"id": null, "caption": "x"}]}', ", data[0]: has no id and caption"),
    ("wavcaps", "w.json", '{"rows": []}', ": has no list 'data'"),
    ("wavcaps", "w.json", '{"data": [', ": is not JSON (Expecting value: line 1 column 11"),
    ("wavcaps", "w.json", "[" * 100_000, ": is not JSON ("),
    ("table", "t.jsonl", '{"id": "a", "text": "b"}\n\n["a"]\n', ", line 3: holds a list, not an object"),
    ("table", "t.jsonl", '{"id": "a", "text": "b"}\n{"id": "c"}\n', ", line 2: no column caption or text or"),
    ("table", "t.jsonl", '{"id": "a", "text": true}\n', ", line 1: its caption is True, not text"),
    ("table", "t.jsonl", b"\xff", ": is not UTF-8 text"),
    ("table", "t.csv", TABLE + "a.mp4,\n", ": no row can be used: 1 without a caption, the first: "),
    ("table", "t.csv", "file_name,caption,split\na.mp4,x,../up\n", ", line 2"),
    ("table", "t.xlsx", "", ": a table is a .csv, .tsv or .jsonl file"),
    ("table", "none.csv", None, ": no such file"),
    ("table", "folder.csv", Path, ": is a folder; give a file"),
    ("table", "t.csv", "\n", ": is empty: its first line must name the columns"),
    (
        "table",
        "t.csv",
        b"PK\x03\x04\x14\0",
        ": is an Excel workbook or another zip archive: save the sheet as CSV UTF-8",
    ),
    ("table", "t.csv", b"\xd0\xcf\x11\xe0\xa1", ": is a workbook of an old Excel: save the sheet as CSV UTF-8"),
    ("table", "t.csv", b"PAR1\x15\x04", ": is a parquet file: give it to `mmaudio-hf prepare dataset parquet:FILE`"),
    ("vggsound", "v.csv", gzip.compress(b"a,1,dog,train\n"), ": is compressed: unpack it first"),
    ("table", "t.jsonl", b"\x28\xb5\x2f\xfd", ": is compressed: unpack it first"),
    ("wavcaps", "w.json", b" \n<!DOCTYPE html>", ": is a page of the web or XML: download the file itself"),
    (
        "table",
        "t.tsv",
        b"version https://git-lfs.github.com/spec/v1\n",
        ": is the pointer of a file in Git LFS: fetch it",
    ),
    ("audiocaps", "a.csv", CSV.encode("utf-16"), ": is UTF-16, not UTF-8 text: save it as UTF-8"),
    ("audiocaps", "a.csv", CSV.encode("utf-16-le"), ": has NUL bytes; write the file again, as UTF-8 text"),
    ("table", "t.csv", "file_name|caption\na.mp4|hello\n", ": its columns are separated by '|'"),
    ("table", "t.csv", ",file_name,words\n0,a.mp4,x\n", ", line 2: no column caption or text or label"),
    ("table", "t.csv", "sep=,\nfile_name,caption\na.mp4,x\n", ", line 2: no column file_name or id"),
    ("table", "t.jsonl", '{"id": "a", "text": NaN}\n', ": no row can be used: 1 without a caption, the first: "),
    ("folder", "metadata.csv", "name,caption\na,b\n", ", line 2: no column file_name or id"),
]


@pytest.mark.parametrize(("kind", "name", "content", "message"), MALFORMED)
def test_malformed_annotations_are_named_with_their_row(tmp_path, capsys, kind, name, content, message):
    file = tmp_path / name
    if content is Path:
        file.mkdir()
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = tmp_path if kind == "folder" else file
    assert main(["prepare", kind, str(source), "--out", str(tmp_path / "lists")]) == 2
    captured = capsys.readouterr()
    assert f"{file}{message}" in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "lists").exists() and not (tmp_path / "up.tsv").exists()


def test_the_first_row_left_out_is_named(tmp_path, capsys):
    """Nothing, `null` and a second row of a video; several captions in a list are rows of their own."""
    (tmp_path / "v.csv").write_text("a,1,dog,train\na,1,cat,test\nb,1, ,train\n")
    assert prepare(tmp_path, "vggsound", tmp_path / "v.csv") == {"vgg-train": [("a_000001", "dog")]}
    printed = capsys.readouterr().out
    assert f"left out: 1 with the id of an earlier row, the first: {tmp_path}/v.csv, line 2: 'a_000001'" in printed
    lines = [
        '{"id": 7, "caption": ["one", "two", null]}',
        '{"id": null, "caption": "x"}',
        '{"id": "b", "caption": null}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    lists = prepare(tmp_path, "table", tmp_path / "t.jsonl", "--share", "val=0.5")
    assert [row for name, rows in lists.items() if name != "vgg-train" for row in rows] == [("7", "one"), ("7", "two")]
    printed = capsys.readouterr().out
    assert "left out: 2 without a caption" in printed and "left out: 1 with a name that cannot be an id" in printed


@pytest.mark.parametrize("words", [["--name", "../up"], ["--share", "../../up=0.5"], ["--share", "=0.5"]])
def test_lists_stay_in_their_folder(tmp_path, capsys, words):
    rows = [f"clip{i}.mp4,x" for i in range(20)]
    (tmp_path / "t.csv").write_text("file_name,caption\n" + "\n".join(rows))
    assert main(["prepare", "table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "in" / "lists"), *words]) == 2
    error = capsys.readouterr().err
    assert ("is not a plain name" in error or "id '' is empty" in error) and not (tmp_path / "in").exists()
