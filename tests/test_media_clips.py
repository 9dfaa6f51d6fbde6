"""Clip lists of audio files and media lists with captions, as people and pandas write them."""

import csv
import subprocess
import sys

import pytest
import torch
from golden_data import GOLDEN

from mmaudio_hf.config import AudioSource
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.lists import Clip, MediaItem, find_audio_file, partition, read_clips, read_media_list, write_clips


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def audios(folder) -> AudioSource:
    return AudioSource("s", str(folder), "captions.tsv")


def test_partition():
    with open(GOLDEN / "media_partition.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 40
    for row in rows:
        starts = [int(start) for start in row["starts"].split(",") if start]
        length = int(row["segment_length"])
        expected = [(start, start + length) for start in starts]
        assert partition(int(row["num_samples"]), int(row["sample_rate"])) == expected
    assert partition(89_302, 11_025) == []  # 89302.5 samples are 8.1 s
    assert partition(89_303, 11_025) == [(0, 89_302)]
    assert partition(0, 16_000) == []


def test_clip_list_of_a_folder(tmp_path):
    folder = tmp_path / "audios"
    folder.mkdir()
    audio = torch.rand(8000 * 20)
    write_audio(folder / "b.flac", audio, 8000)
    write_audio(folder / "b.wav", audio[:100], 8000)  # the flac wins
    write_audio(folder / "a 1.wav", audio[: 8000 * 9], 8000)
    write_audio(folder / "brief.wav", audio[: 8000 * 8], 8000)
    (folder / "broken.mp3").write_text("no audio")
    (folder / "notes.txt").write_text("not media")
    (folder / "sub").mkdir()
    report = write_clips(audios(folder), tmp_path / "clips.tsv", workers=2)
    assert (tmp_path / "clips.tsv").read_text() == (
        "id\tname\tstart_sample\tend_sample\na 1_0\ta 1\t0\t64800\nb_0\tb\t0\t64800\nb_1\tb\t95200\t160000\n"
    )
    assert [(reject["file"], reject["reason"]) for reject in report.rejects] == [
        ("brief.wav", "audio_too_short"),
        ("broken.mp3", "unreadable"),
    ]
    assert report.ignored == ["b.wav", "notes.txt", "sub"]
    clips = read_clips(tmp_path / "clips.tsv")
    assert (report.clips, clips[0]) == (len(clips), Clip("a 1_0", "a 1", 0, 64_800))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["audios", "clips.tsv"]
    assert find_audio_file(folder, "b").name == "b.flac" and find_audio_file(folder, "a 1").suffix == ".wav"
    with pytest.raises(MediaError) as caught:
        find_audio_file(folder, "c")
    assert caught.value.reason == "not_found"
    with pytest.raises(ValueError, match="plain name"):
        find_audio_file(folder, "../b")


def test_folders_without_audio_files(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        write_clips(audios(tmp_path / "nothing"), tmp_path / "clips.tsv")
    with pytest.raises(ValueError, match=r"\.flac"):
        write_clips(audios(tmp_path), tmp_path / "clips.tsv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("../x\ta\t0\t10", "line 3.*|.*line 3"),
        ("x\t../a\t0\t10", "plain name"),
        ("x\ta\t0.0\t10", "whole numbers"),
        ("x\ta\t10\t10", "not a clip"),
        ("x\ta\t-1\t10", "not a clip"),
        ("first\ta\t0\t10", "already on line 2"),
        ("x\ta\t0", "3 fields, the header has 4"),
    ],
)
def test_bad_rows_of_a_clip_list(row, message, tmp_path):
    path = write(tmp_path / "clips.tsv", f"id\tname\tstart_sample\tend_sample\nfirst\ta\t0\t10\n{row}\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_clips(path)
    assert f"{path}, line 3" in str(caught.value)


def test_everything_stays_text(tmp_path):
    path = write(tmp_path / "a.tsv", "id\tlabel\n00008\tNA\n1e5\tnull\nx\t\n-y_1\t None \n")
    assert read_media_list(path) == [
        MediaItem("00008", "NA", 2),
        MediaItem("1e5", "null", 3),
        MediaItem("x", "", 4),
        MediaItem("-y_1", " None ", 5),
    ]


def test_quoting_as_pandas_writes_it(tmp_path):
    captions = ['a "quoted" word', "tab\there", "two\nlines", "plain", "'single'", "a, b", 'ends "so"', "snow ❄"]
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": [f"v{n}" for n in range(len(captions))], "label": captions})
    frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    items = read_media_list(tmp_path / "a.tsv")
    assert [item.caption for item in items] == captions
    assert [item.row for item in items] == [2, 3, 4, 6, 7, 8, 9, 10]  # the third caption takes two lines


@pytest.mark.parametrize(
    "text", ["﻿id\tlabel\na\tb\n", "id\tlabel\r\na\tb\r\n", "id\tlabel\na\tb", "id\tlabel\n\na\tb\n\n"]
)
def test_byte_order_mark_line_endings_and_blank_lines(text, tmp_path):
    assert [(item.id, item.caption) for item in read_media_list(write(tmp_path / "a.tsv", text))] == [("a", "b")]


def test_label_and_caption_stand_for_each_other(tmp_path):
    video = write(tmp_path / "v.tsv", "id\tcaption\na\tb\n")
    audio = write(tmp_path / "a.tsv", "label\tid\tsplit\nb\ta\ttest\n")
    assert read_media_list(video)[0].caption == read_media_list(audio, "caption")[0].caption == "b"
    both = write(tmp_path / "b.tsv", "id\tlabel\tcaption\na\tl\tc\n")
    assert (read_media_list(both)[0].caption, read_media_list(both, "caption")[0].caption) == ("l", "c")


def test_repeated_ids(tmp_path):
    path = write(tmp_path / "a.tsv", "id\tlabel\na\tone\nb\ttwo\na\tthree\n")
    with pytest.raises(ValueError, match=r"line 4: id 'a' is already on line 2"):
        read_media_list(path)
    assert [item.caption for item in read_media_list(path, "caption")] == ["one", "two", "three"]
    assert len(read_media_list(path, unique_ids=False)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("id\tlabel\n", "no rows"),
        ("id\tlable\na\tb\n", r"no column 'label' or 'caption'; it has \['id', 'lable'\]; rename 'lable'\?"),
        ("id,label\na,b\n", "separated by tabs"),
        ("name\tlabel\na\tb\n", "no column 'id'"),
        ("id\tlabel\tlabel\na\tb\tc\n", "more than once"),
        ("id\tlabel\na\tb\tc\n", "line 2: 3 fields, the header has 2"),
        ("id\tlabel\na\n", "line 2: 1 fields"),
        ('id\tlabel\na\t"open\nb\tc\n', "unexpected end of data"),
        ('id\tlabel\na\t"x" y\n', "line 2"),
        ("id\tlabel\n../a\tb\n", "line 2"),
        ("id\tlabel\n\tb\n", "line 2"),
        ("id\tlabel\na \tb\n", "line 2"),
    ],
)
def test_bad_lists(text, message, tmp_path):
    path = write(tmp_path / "a.tsv", text)
    with pytest.raises(ValueError, match=message) as caught:
        read_media_list(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_media_list(write(tmp_path / "a.tsv", "id\tlabel\na\tb\n", "utf-16"))
    with pytest.raises(ValueError, match="no such file"):
        read_media_list(tmp_path / "nothing.tsv")


def test_media_loads_no_training_libraries():
    code = "import sys, mmaudio_hf.media.video, mmaudio_hf.media.lists, mmaudio_hf.media.example;"
    code += "print([m for m in ('datasets', 'transformers', 'tensordict', 'accelerate') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
