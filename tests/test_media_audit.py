"""Audits of real files: every verdict on the file it is for and on no other, the same table however it came about."""

import base64
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from odd_media import Odd, overwrite_packet, read_codes, remux, retime_audio, steady, truncate, write_odd
from PIL import Image

from mmaudio_hf.cli import main
from mmaudio_hf.cli import media as command
from mmaudio_hf.config import ExtractionConfig
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.media import audit as module
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.audit import HARMLESS, OF_SYNC, SCHEMA, VERDICTS, AuditSource, Limits, audit, known_problems
from mmaudio_hf.pages.audit import MEANING, write_page

ROOT = Path(__file__).parent.parent
DURATION = 2.0  # s of a clip here
NAMES = iter(range(1000))


def odd(seconds=2.4, **changes) -> Odd:
    """A plain video, whose frames and audio no other one has."""
    number = next(NAMES)
    usual = {"frame_times": steady(seconds), "audio_seconds": 2.4, "gain": 1 - 0.01 * number, "rate": 16_000}
    return Odd(**(usual | {"layout": "mono", "size": (96 + 4 * number, 96)} | changes))


# Two frames of 40 ms, one of 200 ms, over and over.
UNEVEN = tuple(Fraction(7 * n, 25) + Fraction(k, 25) for n in range(9) for k in (0, 1, 2))
VIDEOS = {
    "good": odd(),
    "another": odd(),
    "ntsc": odd(2.4, frame_times=steady(2.4, Fraction(30_000, 1001)), frame_rate=Fraction(30_000, 1001)),
    "still": odd(still=True),
    "silent": odd(silent=True),
    "clipped": odd(gain=100.0),
    "mute": odd(audio_seconds=None),
    "short": odd(1.5, audio_seconds=1.5),
    "audio_stops": odd(4.0, audio_seconds=2.2),
    "long": odd(6.0, audio_seconds=6.0),
    "late_audio": odd(audio_start=0.3),
    "late_frames": odd(frame_times=steady(2.2, start=Fraction(1, 4))),
    "uneven": odd(frame_times=UNEVEN),
    "dubbed": odd(audio_tracks=2),
    "pq": odd(hdr=True),
    "fields": odd(options=(("flags", "+ildct+ilme"),)),
    "anamorphic": odd(pixel_aspect=Fraction(4, 3)),
    "uncaptioned": odd(),
}
EXPECTED = {
    "good": set(),
    "another": set(),
    "ntsc": set(),
    "still": {"still"},
    "silent": {"silent"},
    "clipped": {"clipped"},
    "mute": {"no_audio"},
    "short": {"too_short"},
    "audio_stops": {"odd_duration"},
    "long": {"too_long"},
    "late_audio": {"start_gap"},
    "late_frames": {"start_gap"},
    "uneven": {"variable_frame_rate"},
    "dubbed": {"audio_tracks"},
    "pq": {"hdr"},
    "fields": {"interlaced"},
    "anamorphic": {"non_square_pixels"},
    "uncaptioned": {"empty_caption"},
    "drifting": {"audio_drift"},
    "image": {"unreadable"},
    "LOUD": set(),
    "copy": {"duplicate_content"},
    "remuxed": {"duplicate_content"},
    "held_remuxed": {"leakage"},
    "held_id": {"leakage"},
    "text": {"unreadable"},
    "empty": {"unreadable"},
    "cut": {"damaged", "too_short", "odd_duration"},
    "spoiled": {"damaged"},
    "absent": {"not_found"},
    "silent_too": {"silent"},
    "audio_only": {"no_video"},
    "talk_1": {"duplicate_caption"},
    "talk_2": {"duplicate_caption"},
    "twice": {"duplicate_id"},
}
AUDIO_FILES = {
    "tone": set(),
    "captioned_twice": set(),
    "quiet": {"silent"},
    "brief": {"too_short"},
    "loud": {"clipped"},
    "truncated": {"damaged"},
    "UPPER": set(),
    "of_good": {"duplicate_content", "too_short"},  # the audio track of a video
    "gone": {"not_found"},
}
LIMITS = Limits(max_duration=5.0)


def write_rows(path: Path, rows, column="label") -> Path:
    path.write_text(f"id\t{column}\n" + "".join(f"{item_id}\t{caption}\n" for item_id, caption in rows))
    return path


def noise(seconds: float, seed: int, level: float = 0.1) -> torch.Tensor:
    return level * torch.randn(round(16_000 * seconds), generator=torch.Generator().manual_seed(seed))


def write_videos(folder: Path, videos: Path, held: Path) -> None:
    """The files of `EXPECTED`, and the held-out ones that some of them are copies of."""
    options = {"movflags": "faststart"}  # the index first, so that a file cut off can be opened
    for name, what in VIDEOS.items():
        write_odd(videos / f"{name}.mp4", what, options)
    good = videos / "good.mp4"
    shutil.copy(good, videos / "copy.mp4")
    remux(good, videos / "remuxed.mkv")
    write_odd(held / "elsewhere.mp4", odd())
    remux(held / "elsewhere.mp4", videos / "held_remuxed.mkv")
    for name in ("held_id", "talk_1", "talk_2", "twice"):
        write_odd(videos / f"{name}.mp4", odd())
    write_odd(held / "held_id.mp4", odd())
    write_odd(videos / "silent_too.mp4", odd(silent=True))
    (videos / "text.mp4").write_text("<html>404</html>\n" * 50)
    (videos / "empty.mp4").write_bytes(b"")
    truncate(write_odd(folder / "whole.mp4", odd(), options), videos / "cut.mp4", 0.6)
    overwrite_packet(write_odd(folder / "audio.mp4", odd(), options), videos / "spoiled.mp4", "audio", 1.0)
    slower = lambda number, time: time * Fraction(102, 100)  # noqa: E731
    retime_audio(write_odd(folder / "steady.mp4", odd()), videos / "drifting.mp4", slower)
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(videos / "image.mp4", "JPEG")
    write_odd(folder / "loud.mp4", odd()).rename(videos / "LOUD.MP4")
    write_audio(videos / "audio_only.wav", noise(3, 0), 16_000)
    os.rename(videos / "audio_only.wav", videos / "audio_only.mp4")


def write_audios(folder: Path, audios: Path, good: Path) -> None:
    """The files of `AUDIO_FILES`; good: a video whose audio track is one of them."""
    write_audio(audios / "tone.flac", noise(9, 1), 16_000)
    write_audio(audios / "captioned_twice.wav", noise(9, 2), 16_000)
    write_audio(audios / "quiet.wav", torch.zeros(9 * 16_000), 16_000)
    write_audio(audios / "brief.flac", noise(8, 3), 16_000)
    write_audio(audios / "loud.flac", noise(9, 4, level=10.0), 16_000)
    truncate(write_audio_file(folder / "all.wav", noise(14, 5)), audios / "truncated.wav", 0.7)
    write_audio_file(folder / "upper.wav", noise(9, 6)).rename(audios / "UPPER.WAV")
    _audio_of(good, audios / "of_good.m4a")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[AuditSource]:
    """A list of videos, one of audio files and one of held-out videos, with something wrong in every way."""
    folder = tmp_path_factory.mktemp("media")
    videos, held, audios = (folder / name for name in ("videos", "held", "audios"))
    for path in (videos, held, audios):
        path.mkdir()
    write_videos(folder, videos, held)
    write_audios(folder, audios, videos / "good.mp4")
    caption = {"talk_1": "a talk", "talk_2": "a talk", "uncaptioned": " "}
    rows = [(name, caption.get(name, name)) for name in EXPECTED if name != "twice"]
    captions = [("tone", "a tone"), ("captioned_twice", "a"), *((name, name) for name in list(AUDIO_FILES)[2:])]
    return [
        AuditSource("v", "video", videos, write_rows(folder / "v.tsv", [*rows, ("twice", "1"), ("twice", "2")])),
        AuditSource(
            "a", "audio", audios, write_rows(folder / "a.tsv", [*captions, ("captioned_twice", "b")], "caption")
        ),
        AuditSource(
            "h", "video", held, write_rows(folder / "h.tsv", [("elsewhere", "e"), ("held_id", "h")]), False, True
        ),
    ]


def write_audio_file(path: Path, waveform: torch.Tensor) -> Path:
    write_audio(path, waveform, 16_000)
    return path


def _audio_of(source: Path, path: Path) -> None:
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.audio[0])
        for packet in old.demux(old.streams.audio[0]):
            if packet.size:
                packet.stream = stream
                new.mux(packet)


@pytest.fixture(scope="module")
def table(sources, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "audit.parquet"
    report = run(sources, path)
    assert report.listed == len(pq.read_table(path)) == len(EXPECTED) + 1 + len(AUDIO_FILES) + 2
    return path


def run(sources, path, **options):
    return audit(sources, path, duration=DURATION, limits=LIMITS, progress=False, **({"workers": 2} | options))


def rows_of(path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def verdicts_of(row: dict) -> dict[str, str]:
    return dict(zip(row["verdicts"], row["reasons"], strict=True))


def test_every_verdict_is_given_to_its_file_and_to_no_other(table):
    rows = rows_of(table)
    verdicts: dict[str, dict] = {"v": {}, "a": {}, "h": {}}
    for row in rows:
        verdicts[row["source"]][row["id"]] = set(row["verdicts"])
        assert row["ok"] == (set(row["verdicts"]) <= set(HARMLESS))
        assert len(row["reasons"]) == len(row["verdicts"]) and all(row["reasons"])
        assert row["verdicts"] == sorted(row["verdicts"], key=VERDICTS.index)
    assert verdicts["v"] == EXPECTED
    assert verdicts["a"] == AUDIO_FILES
    assert verdicts["h"] == {"elsewhere": set(), "held_id": set()}
    assert set().union(*EXPECTED.values()) == set(VERDICTS) - OF_SYNC, "a verdict that no file shows"
    reasons = {(row["id"], verdict): reason for row in rows for verdict, reason in verdicts_of(row).items()}
    assert reasons["copy", "duplicate_content"] == "the same file as 'good' of v"
    assert reasons["remuxed", "duplicate_content"] == "the same frames as 'good' of v"
    assert reasons["of_good", "duplicate_content"] == "the same audio as 'good' of v"
    assert reasons["held_remuxed", "leakage"] == "the same frames as 'elsewhere' of h, held out"
    assert reasons["held_id", "leakage"] == "the id is held out in h"
    assert "begins 0.250 s before" in reasons["late_frames", "start_gap"]
    first, second = [row for row in rows if row["id"] == "twice"]
    assert (first["verdicts"], second["verdicts"]) == ([], ["duplicate_id"])


def test_the_table_says_what_the_files_hold(table, sources):
    rows = {(row["source"], row["id"]): row for row in rows_of(table)}
    good, ntsc, tone = rows["v", "good"], rows["v", "ntsc"], rows["a", "tone"]
    assert [field.name for field in pq.read_schema(table)] == SCHEMA.names
    expected = {"fps": 25, "frames": 60, "width": 96, "height": 96, "rotation": 0, "video_codec": "h264", "row": 2}
    expected |= {"audio_codec": "aac", "sample_rate": 16_000, "channels": 1, "start_gap": 0, "still_fraction": 0}
    assert {name: good[name] for name in expected} == expected
    assert good["duration"] == pytest.approx(2.4, abs=0.001) and 0.4 < good["peak"] < 0.9
    assert ntsc["fps"] == pytest.approx(29.97, abs=0.01) and not ntsc["variable_frame_rate"]
    assert rows["v", "late_audio"]["start_gap"] == pytest.approx(0.3, abs=0.08)  # less the priming of AAC
    assert rows["v", "uneven"]["uneven_intervals"] == pytest.approx(8 / 26, abs=1e-6)
    assert tone["level_dbfs"] == pytest.approx(-20, abs=0.1) and tone["duration"] == 9 and tone["fps"] is None
    assert rows["a", "captioned_twice"]["captions"] == ["a", "b"]
    sha = subprocess.run(["sha256sum", good["path"]], capture_output=True, text=True, check=True).stdout.split()[0]
    assert good["file_sha256"] == sha
    remuxed = rows["v", "remuxed"]
    assert remuxed["file_sha256"] != sha and remuxed["video_hash"] == good["video_hash"]
    settings = json.loads(pq.read_schema(table).metadata[b"mmaudio_hf.audit"])
    assert settings["limits"] == dataclasses.asdict(LIMITS) and len(settings["sources"]) == 3


KILLED = """
import json, os, signal, sys
from mmaudio_hf.media import audit as module
def keep(self, item, figures, keep=module._Measures.keep, kept=[]):
    kept.append(item)
    keep(self, item, figures)
    if len(kept) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    module._Measures.keep, module._COMMIT_SECONDS = keep, 0
    sources = [module.AuditSource(*source) for source in json.loads(sys.argv[1])]
    module.audit(sources, sys.argv[2], duration=float(sys.argv[3]), workers=2)
"""


def test_killed_and_run_again_gives_the_same_table(table, sources, tmp_path):
    path, program = tmp_path / "audit.parquet", tmp_path / "killed.py"
    program.write_text(KILLED)
    given = json.dumps([list(vars(source).values()) for source in sources], default=str)
    words, environment = [sys.executable, program, given, path, str(DURATION)], os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE)
    _, errors = killed.communicate()  # until the workers, who hold the pipe too, have ended with it
    assert killed.returncode == -signal.SIGKILL, errors
    assert not path.exists()
    report = run(sources, path)
    files = len({row["path"] for row in rows_of(path) if row["bytes"] is not None})
    assert 0 < report.measured <= files - 11
    assert path.read_bytes() == table.read_bytes()
    # What does not open is tried once more, the rest is known; a file that changes is measured, and told from the old.
    assert run(sources, path, workers=1).measured == 3
    assert path.read_bytes() == table.read_bytes()


class Deadly(ProcessPoolExecutor):
    """Its process ends at once when it is to read another.mp4, as decoders do on a file made to crash them."""

    def submit(self, function, path, *rest):
        if path.endswith("another.mp4"):
            return super().submit(os._exit, 1)
        return super().submit(function, path, *rest)


def test_a_file_that_crashes_the_decoder_takes_no_other_along(table, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ProcessPoolExecutor", Deadly)
    run(sources, tmp_path / "audit.parquet", workers=3)
    for old, new in zip(rows_of(table), rows_of(tmp_path / "audit.parquet"), strict=True):
        if new["id"] == "another":
            assert verdicts_of(new) == {"unreadable": "the decoder crashes on it"}
        else:
            assert new == old
    monkeypatch.undo()
    assert run(sources, tmp_path / "audit.parquet").measured == 4
    assert (tmp_path / "audit.parquet").read_bytes() == table.read_bytes()


class Page(HTMLParser):
    """Tags, texts and addresses of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.texts, self.addresses = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_hostile_names_as_text(tmp_path, table):
    evil, caption = "<script>alert(1)<&", "\u202e</li><img src=x onerror=alert(2)> \"'&amp; <b>"
    (tmp_path / "media").mkdir()
    (tmp_path / f"media/{evil}.mp4").write_text("no video")
    source = AuditSource("<i>", "video", tmp_path / "media", write_rows(tmp_path / "l.tsv", [(evil, "c"), ("b", "c")]))
    text = source.list.read_text().replace(f"{evil}\tc", f'{evil}\t"{caption.replace(chr(34), 2 * chr(34))}"')
    source.list.write_text(text)
    run([source], tmp_path / "audit.parquet", workers=1)
    page = Page(write_page(tmp_path / "audit.parquet", tmp_path / "audit.html"))
    items = Page(tmp_path / "audit_items" / "1.html")
    for shown in (page, items):
        assert {evil, caption, "<i>"} <= set(shown.texts)
        assert not {"script", "img", "i", "link", "iframe"} & set(shown.tags)
    name = quote(f"{evil}.mp4")
    assert page.addresses == [
        *("audit_items/1.html", "#not_found", "#unreadable"),
        *(f"media/{name}", f"media/{name}"),
    ]
    assert {address for address in items.addresses if "media" in address} == {f"../media/{name}"}
    write_rows(source.list, [("../../x", "c")])
    with pytest.raises(ValueError, match=r"not a plain name.*l\.tsv, line 2"):
        run([source], tmp_path / "other.parquet")
    assert not (tmp_path / "other.parquet").exists()


def test_the_pages_show_and_play_every_item(table, tmp_path):
    """Frames as one image and a player with a link relative to the page; copies beside what they are copies of."""
    rows = rows_of(table)
    page = Page(write_page(table, tmp_path / "whole.html"))
    items = Page(tmp_path / "whole_items" / "1.html")
    assert set(VERDICTS) <= set(page.texts) and page.tags.count("svg") == 9 and page.tags.count("details") == 2
    assert {"seconds", "share", "dBFS", "frames per second"} <= set(page.texts), "units"
    kinds = {"video": "video", "audio": "audio"}
    for kind, tag in kinds.items():
        assert items.tags.count(tag) == sum(row["kind"] == kind and row["bytes"] is not None for row in rows)
    assert items.tags.count("img") == sum(bool(row["thumbnails"]) for row in rows) > 20
    for address in (a for a in items.addresses if a.startswith("..") and not a.endswith(".html")):
        assert (tmp_path / "whole_items" / unquote(address)).is_file()
    copies = [row for row in rows if row["copy_of"] is not None]
    assert {(row["id"], rows[row["copy_of"]]["id"]) for row in copies} == {
        *(("copy", "good"), ("remuxed", "good"), ("of_good", "good"), ("held_remuxed", "elsewhere")),
    }
    text = (tmp_path / "whole.html").read_text()
    assert text.count('class="pair"') == len(copies)
    thumbnails = {row["id"]: row["thumbnails"] for row in rows}
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(thumbnails["good"]))))
    assert strip.shape == (80, 4 * 80, 3)
    codes = [
        read_codes(torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255)[0] for image in np.split(strip, 4, 1)
    ]
    assert codes[0] == 0 and codes == sorted(codes) and 12 <= codes[1] <= 18, "the first frame of each quarter"


def test_extraction_leaves_out_what_the_audit_rejects(tmp_path, example_media, capsys):
    """Through the commands: held-out items that leak, a still copy, the counts, and a table that is out of date."""
    media = example_media()
    good = sorted(path.stem for path in (media / "videos").glob("train*.mp4"))[:3]
    write_odd(media / "videos" / "frozen.mp4", odd(still=True))
    shutil.copy(media / "videos" / f"{good[2]}.mp4", media / "videos" / "held.mp4")
    listed = write_rows(media / "few.tsv", [(name, name) for name in (*good, "frozen")])
    held = write_rows(media / "held.tsv", [("held", "h")])
    out = tmp_path / "features"
    videos = [{"name": path.stem, "media_dir": str(media / "videos"), "list": str(path)} for path in (listed, held)]
    tree = {
        "model": {"duration": DURATION},
        "encoders": {"kind": "toy", "weights_dir": str(out)},
        "extraction": {"output_dir": str(out), "videos": videos},
        "data": {"train": [{"path": str(out / "few")}], "validation": [{"path": str(out / "held")}]},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    use = f"extraction.audit={out / 'audit.parquet'}"
    assert main(["extract-video", str(recipe), use]) == 2
    assert f"no such audit; make it with `mmaudio-hf audit {recipe}`" in capsys.readouterr().err
    assert main(["audit", str(recipe), "--workers", "1"]) == 0
    output = capsys.readouterr().out
    assert "1 leakage" in output and "3 of 5 items are ok" in output and (out / "audit.html").is_file()
    assert f"extraction leaves out leakage, still when it is given {use}\n" in output
    assert main(["extract-video", str(recipe), use]) == 0
    rejects = [json.loads(line) for line in (out / "few.rejects.jsonl").read_text().splitlines()]
    others = {path.stem for path in (media / "videos").iterdir()} - {*good, "frozen", "held"}
    assert {(r["id"], r["stage"], r["reason"]) for r in rejects} == {
        *((good[2], "audit", "leakage"), ("frozen", "audit", "still")),
        *((name, "folder", "unlisted") for name in others),  # and not what the other list of the folder names
    }
    counts = FeatureStore.open(out / "few").manifest["counts"]
    assert counts == {"listed": 4, "accepted": 2, "rejected": 2}
    assert FeatureStore.open(out / "held").ids == ["held"]
    assert main(["extract-video", str(recipe), use, "extraction.reject=[leekage]"]) == 2
    assert "leakage" in capsys.readouterr().err
    os.utime(media / "videos" / f"{good[0]}.mp4", ns=(1, 1))
    assert main(["extract-video", str(recipe), use]) == 2
    message = capsys.readouterr().err
    assert f"{good[0]}.mp4; renew it with `mmaudio-hf audit {recipe}`" in message and "1 listed files" in message


def test_lists_without_a_recipe(sources, tmp_path, capsys):
    videos, _, held = sources
    out = tmp_path / "some" / "found.parquet"
    few = write_rows(tmp_path / "few.tsv", [("good", "a"), ("held_id", "b"), ("held_remuxed", "c")])
    words = ["audit", "--videos", str(videos.media_dir), "--list", str(few), "--out", str(out), "--workers", "1"]
    against = ["--against", str(held.list), "--against-media", str(held.media_dir)]
    assert main([*words, *against, "--duration", "2", "--max-clipped", "1"]) == 0
    assert {(row["source"], row["id"]): row["verdicts"] for row in rows_of(out)} == {
        ("few", "good"): [], ("few", "held_id"): ["leakage"], ("few", "held_remuxed"): ["leakage"],
        ("h", "elsewhere"): [], ("h", "held_id"): [],
    }  # fmt: skip
    capsys.readouterr()
    for wrong, message in (
        (["audit"], "give a recipe, or one of"),
        ([*words, "--max-still", "-1"], "max_still must be 0 or more"),
        ([*words, "--workers", "0"], "workers 0 must be at least 1"),
        ([*words, "--against-media", "x"], "needs --against"),
        ([*words[:-3], "x.txt"], r"is a .parquet file"),
        (["audit", "recipes/example.yaml", "--list", "x"], "--list is for an audit without a recipe"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
    out.with_suffix(".sqlite").write_text("damaged " * 1000)
    assert main(words) == 1
    assert "delete it" in capsys.readouterr().err
    out.write_text("no table")
    with pytest.raises(ValueError, match="is no audit table"):
        known_problems(out, videos, ("still",), renew="x")


def test_long_videos_none_of_which_gives_a_clip(tmp_path):
    """Extraction ends with an error there; the audit says what is wrong with each."""
    (tmp_path / "a.mp4").write_text("no video")
    videos = [{"name": "s", "media_dir": str(tmp_path), "list": str(write_rows(tmp_path / "l.tsv", [("a", "x")]))}]
    videos[0]["max_clips"] = 0
    tree = {"encoders": {"kind": "toy"}, "extraction": {"output_dir": str(tmp_path / "out"), "videos": videos}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["audit", str(tmp_path / "recipe.yaml"), "--workers", "1"]) == 0
    assert [(row["clip"], row["verdicts"]) for row in rows_of(tmp_path / "out" / "audit.parquet")] == [
        ("a", ["unreadable"])
    ]


def test_names_and_limits_stand_together():
    assert set(MEANING) == set(VERDICTS)
    assert set(ExtractionConfig().reject) <= set(VERDICTS) and not set(ExtractionConfig().reject) & set(HARMLESS)
    limits = {**command._LIMITS, **command.SYNC_LIMITS}
    assert set(limits) == {field.name for field in dataclasses.fields(Limits)}
    for name, value in dataclasses.asdict(Limits()).items():
        assert f"({value:g})" in limits[name]
    assert np.isfinite(list(dataclasses.asdict(Limits()).values())).all()
