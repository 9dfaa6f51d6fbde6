"""Clip lists of audio files and media lists with captions, as people and pandas write them."""

import csv

import pytest
import torch
from golden_data import GOLDEN

from mmaudio_hf.config import AudioSource
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.lists import (
    Clip,
    MediaFolder,
    MediaItem,
    find_audio_file,
    find_video,
    partition,
    read_clips,
    read_media_list,
    write_clips,
)


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
    minute = partition(60 * 16_000, 16_000, max_clips=0)
    assert len(minute) == 7 and minute[0][0] == 0 and 60 * 16_000 - minute[-1][1] < 7
    assert len(partition(60 * 16_000, 16_000)) == 5 and len(partition(60 * 16_000, 16_000, max_clips=2)) == 2


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
    assert [(file["file"], file["reason"]) for file in report.ignored] == [
        *(("b.wav", "ignored"), ("notes.txt", "ignored")),
    ]
    clips = read_clips(tmp_path / "clips.tsv")
    assert (report.clips, clips[0]) == (len(clips), Clip("a 1_0", "a 1", 0, 64_800))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["audios", "clips.tsv"]
    assert find_audio_file(folder, "b").name == "b.flac" and find_audio_file(folder, "a 1").suffix == ".wav"
    with pytest.raises(MediaError) as caught:
        find_audio_file(folder, "c")
    assert caught.value.reason == "not_found"
    with pytest.raises(ValueError, match="plain name"):
        find_audio_file(folder, "../b")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"media")
    return folder


# (files, kind, id, the file it is or a part of the message)
FOUND = [
    (["A.MP4"], "video", "A", "A.MP4"),
    (["a.ts", "a.WMV"], "video", "a", "a.ts"),
    *[([f"a.{ending}"], "video", "a", f"a.{ending}") for ending in ("ts", "flv", "3gp", "mpg", "wmv")],
    *[([f"a.{ending}"], "audio", "a", f"a.{ending}") for ending in ("webm", "mka", "mp4", "WAV")],
    (["a.wav", "a.FLAC", "a.mp3"], "audio", "a", "a.FLAC"),
    (["cafe\u0301.mp4"], "video", "caf\u00e9", "cafe\u0301.mp4"),
    (["caf\u00e9.mp4"], "video", "cafe\u0301", "caf\u00e9.mp4"),
    (["caf\u00e9.mp4", "cafe\u0301.mp4"], "video", "cafe\u0301", "cafe\u0301.mp4"),
    ([" day in Porto.mp3"], "audio", "day in Porto", " day in Porto.mp3"),
    (["x/y/a.mp4"], "video", "a", "x/y/a.mp4"),
    (["a.mkv", "x/a.mp4"], "video", "a", "a.mkv"),
    (["a.mp4", "a.mkv"], "video", "a.mkv", "a.mkv"),
    (["a.mp4.mp4", "a.mp4"], "video", "a.mp4", "a.mp4.mp4"),
    ([".a.mp4", ".x/a.mp4"], "video", "a", "no file 'a' with an ending of .mp4 .mkv"),
    (["x/a.mp4", "y/a.mp4"], "video", "a", "'a' may be x/a.mp4 and y/a.mp4; rename one of them"),
    (["Abc.mp4"], "video", "abc", "there is 'Abc.mp4': rename it or the id"),
    (["YTID_30.mp4"], "video", "YTID_000030", "there is 'YTID_30.mp4'"),
    (["a.mp3"], "audio", "a.wav", "there is 'a.mp3'"),
    (["a.txt"], "video", "a", "there is 'a.txt'"),
    (["a.flac"], "video", "a", "there is 'a.flac': it is for a list of extraction.audios"),
    (["a.avi"], "audio", "a", "there is 'a.avi': it is for a list of extraction.videos"),
]


@pytest.mark.parametrize(("files", "kind", "item_id", "expected"), FOUND)
def test_the_file_of_an_id(files, kind, item_id, expected, tmp_path):
    folder = touch(tmp_path, *files)
    try:
        result = str(MediaFolder(folder, kind).find(item_id).relative_to(folder))
    except MediaError as error:
        assert error.reason == "not_found" and expected in str(error)
    else:
        assert result == expected
        assert str((find_video if kind == "video" else find_audio_file)(folder, item_id)) == str(folder / expected)


def test_a_folder_names_what_is_not_listed(tmp_path):
    folder = touch(tmp_path, "a.mp4", "cafe\u0301.mp4", "x/c.MKV", "c.txt", "d.mp4", ".hidden.mp4")
    (folder / "loop").symlink_to(folder)
    media = MediaFolder(folder, "video")
    assert [path.name for path in media.unlisted(["a", "caf\u00e9", "c.mkv"])] == ["d.mp4"]
    assert [path.name for path in media.others] == ["c.txt"]
    with pytest.raises(ValueError, match="no such folder"):
        MediaFolder(folder / "nothing", "video")


def test_clips_of_files_in_subfolders(tmp_path):
    folder = tmp_path / "audios"
    for name in ("x/a.WAV", "y/b.wav", "z/b.wav", " c .flac"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_audio((folder / name).with_suffix(".part.wav"), torch.rand(8000 * 9), 8000)
        (folder / name).with_suffix(".part.wav").rename(folder / name)
    report = write_clips(audios(folder), tmp_path / "clips.tsv")
    assert [clip.name for clip in read_clips(tmp_path / "clips.tsv")] == ["c", "a"]
    assert [(reject["file"], reject["reason"]) for reject in report.rejects] == [
        *(("y/b.wav", "not_found"), ("z/b.wav", "not_found")),
    ]
    assert all("may be y/b.wav and z/b.wav" in reject["message"] for reject in report.rejects)


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


def test_an_unclosed_quote_names_its_own_line(tmp_path):
    """The reader notices it 131,072 characters later."""
    rows = [f"id{n}\t{'word ' * 5}\n" for n in range(6000)]
    rows[499] = 'id499\t"word\n'
    with pytest.raises(ValueError, match=r"a\.tsv, line 501: a field begins with a quote here that nothing ends"):
        read_media_list(write(tmp_path / "a.tsv", "id\tlabel\n" + "".join(rows)))


def test_columns_in_any_case_and_ids_without_outer_white_space(tmp_path):
    path = write(tmp_path / "a.tsv", "ID\tLabel\n typical day \t b \n")
    assert read_media_list(path) == [MediaItem("typical day", " b ", 2)]
    with pytest.raises(ValueError, match="line 3: id 'a' is already on line 2"):
        read_media_list(write(path, "id\tlabel\na\tb\na \tc\n"))


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
    frame[["label", "id"]].to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    assert read_media_list(tmp_path / "a.tsv") == items


@pytest.mark.parametrize(
    "text",
    [
        "﻿id\tlabel\na\tb\n",
        "id\tlabel\r\na\tb\r\n",
        "id\tlabel\ra\tb\r",
        "id\tlabel\na\tb",
        "id\tlabel\n\na\tb\n\n",
        "id\tlabel\na\tb\n \n\t\n",
        '"id"\t"label"\n"a"\t"b"\n',
        "label\tsplit\tid\nb\ttrain\ta\n",
    ],
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
        ("id,label\na,b\n", "separated by tabs; `mmaudio-hf prepare` makes lists of csv files"),
        ("a.mp4\ta dog\nb.mp4\ta cat\n", r"no column 'id'; it has \['a.mp4', 'a dog'\]; `mmaudio-hf prepare` makes"),
        ("name\tlabel\na\tb\n", "no column 'id'"),
        ("id\tlabel\tlabel\na\tb\tc\n", "more than once"),
        ("id\tlabel\na\tb\tc\n", "line 2: 3 fields, the header has 2"),
        ("id\tlabel\na\n", "line 2: 1 fields"),
        ('id\tlabel\na\t"open\nb\tc\n', "line 2: a field begins with a quote here that nothing ends"),
        ('id\tlabel\nz\ty\na\t"b\nc\td\ne\tf"\ng\th\n', r"line 3: a field .* ends on line 5, with 2 rows in it"),
        ('id\tlabel\na\t"b\nc\td"\n', "line 2: a field begins with a quote here and ends on line 3"),
        (
            'id\tlabel\tx\na\t"b\tx\nc\td"\tx\n',
            "line 2: a field begins with a quote .* on line 3, with 1 rows",
        ),
        ('label\tid\n"b\ta\nd"\tc\n', "line 2: a field begins with a quote .* on line 3, with 1 rows"),
        ('id\tlabel\na\t"b\nc\t5" pipe\n', "line 2"),
        ("id\tlabel\na\tb\0c\n", "line 2: has a NUL byte"),
        ("\0i\0d\0\t\0l\0a", "has NUL bytes"),
        ("id\tlabel\na\t" + "b" * 200_000, r"line 2: a field is too long .*; shorten it"),
        ("id\tlabel\ncaf\u00e9\tb\ncafe\u0301\tc\n", "line 3: id 'cafe\u0301' is already on line 2"),
        ('id\tlabel\na\t"x" y\n', "line 2"),
        ("id\tlabel\n../a\tb\n", "line 2"),
        ("id\tlabel\n\tb\n", "line 2"),
    ],
)
def test_bad_lists(text, message, tmp_path):
    path = write(tmp_path / "a.tsv", text)
    with pytest.raises(ValueError, match=message) as caught:
        read_media_list(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_media_list(write(tmp_path / "a.tsv", "id\tlabel\na\tcaf\u00e9\n", "latin-1"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_media_list(write(tmp_path / "a.tsv", "id\tlabel\na\tb\n", "utf-16"))
    with pytest.raises(ValueError, match=r"a.tsv: is a document: export its rows as UTF-8 text"):
        read_media_list(write(tmp_path / "a.tsv", "%PDF-1.7\n"))
    with pytest.raises(ValueError, match="no such file"):
        read_media_list(tmp_path / "nothing.tsv")
