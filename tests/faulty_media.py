"""Any number of listed media, 5 % of them of each kind of fault that people's data have; also a program.

`python tests/faulty_media.py FOLDER COUNT` makes, cuts and extracts them with toy encoders, and prints as JSON what
is to be expected, what came, and the peak of memory.
"""

import json
import os
import shutil
import sys
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from extraction import extract, toy_recipe
from odd_media import Odd, joined_audio, overwrite_packet, remux, retime_audio, steady, truncate, write_odd
from PIL import Image

from mmaudio_hf.config import AudioSource, VideoSource
from mmaudio_hf.media.lists import write_clips
from mmaudio_hf.training.logs import peak_memory_gb

SHARE = 20  # one item in so many of each kind
RATE = 48_000
PLAIN = Odd(steady(1.4), audio_seconds=1.4, rate=RATE, layout="mono", size=(64, 48))
KEY = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": 32 * "a", "encryption_kid": 32 * "b"}

# Kind -> what becomes of the item: "" accepted, or the reason of its reject.
VIDEOS = {
    **dict.fromkeys(["joined", "lost", "drifting", "dubbed", "shouting", "decomposed", "nested", "with_ending"], ""),
    "encrypted": "decode_error",
    "image": "unreadable",
    "error_page": "unreadable",
    "truncated": "unreadable",
    "damaged": "decode_error",
    "mute": "no_audio",
    "silent": "silent",
    "short": "video_too_short",
    "absent": "not_found",
    "twice": "not_found",
}
AUDIO = {
    **dict.fromkeys(["zeros_tail.mp3", "tagged.mp3", "shouting.WAV", "best.webm", " outer space.flac"], ""),
    **dict.fromkeys(["bit.flac", "cut.mp3", "lost_page.opus", "zeroed_end.opus", "cut.wav", "brief.flac"], "no_clip"),
    "absent": "no_clip",
    "uncaptioned.flac": "no_caption",
}


def video_templates(folder: Path) -> dict[str, Path]:
    """A file of each kind; those that differ by their names alone are plain."""
    folder.mkdir(parents=True)
    plain = write_odd(folder / "plain.mp4", PLAIN)
    lose = lambda number, time: None if number in (20, 21, 22) else time  # noqa: E731
    slower = lambda number, time: time * Fraction(103, 100)  # noqa: E731
    files = {
        "joined": joined_audio(folder / "joined.mp4", 1.4, 0.2, RATE),
        "lost": retime_audio(plain, folder / "lost.mp4", lose),
        "drifting": retime_audio(plain, folder / "drifting.mp4", slower),
        "encrypted": remux(plain, folder / "encrypted.mp4", **KEY),
        "truncated": truncate(plain, folder / "truncated.mp4", 0.7),
        "damaged": overwrite_packet(plain, folder / "damaged.mp4", "audio", 0.5),
    }
    changes = {
        "dubbed": {"audio_tracks": 2},
        "mute": {"audio_seconds": None},
        "silent": {"silent": True},
        "short": {"frame_times": steady(0.5)},
    }
    for name, change in changes.items():
        files[name] = write_odd(folder / f"{name}.mp4", Odd(**{**vars(PLAIN), **change}))
    files["image"], files["error_page"] = folder / "image.mp4", folder / "error_page.mp4"
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(files["image"], "JPEG")
    files["error_page"].write_text("<html>404</html>\n" * 50)
    return {kind: files.get(kind, plain) for kind in VIDEOS} | {"good": plain}


def audio_templates(folder: Path) -> dict[str, Path]:
    """A file of each kind, 9 s of noise, "brief" 5 s."""
    folder.mkdir(parents=True)
    noise = 0.1 * torch.randn(9 * RATE, generator=torch.Generator().manual_seed(0)).numpy()
    files = {kind: folder / kind.strip() for kind in (*AUDIO, "good.flac") if kind != "absent"}
    codecs = {"mp3": ("libmp3lame", "fltp"), "wav": ("pcm_s16le", "s16"), "webm": ("libopus", "flt")}
    codecs |= {"flac": ("flac", "s16"), "opus": ("libopus", "flt")}
    for kind, path in files.items():
        codec, sample_format = codecs[path.suffix[1:].lower()]
        waveform = noise[: 5 * RATE] if kind == "brief.flac" else noise
        waveform = (waveform * 32767).astype(np.int16) if sample_format == "s16" else waveform
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=RATE, layout="mono")
            frame = av.AudioFrame.from_ndarray(waveform[None], format=sample_format, layout="mono")
            frame.sample_rate, frame.pts = RATE, 0
            container.mux([*stream.encode(frame), *stream.encode(None)])
    data = {kind: path.read_bytes() for kind, path in files.items()}
    middle, page = len(data["bit.flac"]) // 2, data["zeroed_end.opus"].rindex(b"OggS") + 60
    half, opus = data["bit.flac"], data["lost_page.opus"]
    spoiled = {
        "zeros_tail.mp3": data["zeros_tail.mp3"] + bytes(5000),
        "tagged.mp3": data["tagged.mp3"] + b"TAG" + bytes(125),
        "bit.flac": half[:middle] + bytes([half[middle] ^ 4]) + half[middle + 1 :],
        "cut.mp3": data["cut.mp3"][: len(data["cut.mp3"]) * 4 // 5],
        "cut.wav": data["cut.wav"][: len(data["cut.wav"]) // 2],
        "lost_page.opus": opus[: len(opus) // 2] + bytes(100) + opus[len(opus) // 2 + 100 :],
        "zeroed_end.opus": data["zeroed_end.opus"][:page] + bytes(len(data["zeroed_end.opus"]) - page),
    }
    for kind, content in spoiled.items():
        files[kind].write_bytes(content)
    return files


def kinds_of(count: int, kinds: dict[str, str], good: str) -> list[str]:
    """One item in `SHARE` of each kind, the others good."""
    order = [*kinds, *[good] * (SHARE - len(kinds))]
    return [order[number % SHARE] for number in range(count)]


def make_videos(folder: Path, count: int) -> tuple[VideoSource, dict[str, str]]:
    """A folder of links to the templates, its list, and the expected reason of each id ("": accepted)."""
    media, files, expected = folder / "videos", video_templates(folder / "video_templates"), {}
    for name in ("a", "b"):
        (media / name).mkdir(parents=True)
    for number, kind in enumerate(kinds_of(count, VIDEOS, "good")):
        item = unicodedata.normalize("NFC", f"cafe\u0301 {number}") if kind == "decomposed" else f"{kind}_{number}"
        names = {
            "shouting": [f"{item}.MP4"],
            "decomposed": [unicodedata.normalize("NFD", f"{item}.mp4")],
            "nested": [f"a/{item}.mp4"],
            "twice": [f"a/{item}.mp4", f"b/{item}.mp4"],
            "absent": [],
        }.get(kind, [f"{item}.mp4"])
        for name in names:
            os.link(files[kind], media / name)
        expected[f"{item}.mp4" if kind == "with_ending" else item] = VIDEOS.get(kind, "")
    rows = "".join(f"{item}\tvideo {number}\n" for number, item in enumerate(expected))
    (folder / "videos.tsv").write_text("\ufeffid\tlabel\n" + rows, encoding="utf-8")
    return VideoSource("videos", str(media), str(folder / "videos.tsv")), expected


def make_audio(folder: Path, count: int) -> tuple[AudioSource, dict[str, str]]:
    """As `make_videos`; the id of an accepted row is that of its only clip."""
    media, files, expected, lines = folder / "audio", audio_templates(folder / "audio_templates"), {}, []
    media.mkdir()
    for number, kind in enumerate(kinds_of(count, AUDIO, "good.flac")):
        stem, ending = os.path.splitext(kind)
        name = f"{stem}_{number}"
        if kind != "absent":
            os.link(files[kind], media / f"{name}{ending}")
        reason = AUDIO.get(kind, "")
        expected[name.strip() if reason == "no_clip" else f"{name.strip()}_0"] = reason
        if kind != "uncaptioned.flac":
            lines.append(f"{name}\tcaption {number}\r\n")
    (folder / "audio.tsv").write_text("ID\tcaption\r\n" + "".join(lines), newline="")
    source = AudioSource("audio", str(media), str(folder / "audio.tsv"), str(folder / "audio.clips.tsv"))
    return source, expected


def run(folder: Path, count: int) -> dict:
    """Make `count` items, three fifths of them videos, and extract them; expected and actual reasons by id."""
    recipe = toy_recipe(folder / "out", folder, duration=1.0, shard_size=64, batch_size=8)
    outcome: dict = {"expected": {}, "rejected": {}, "accepted": [], "listed": 0}
    videos, expected = make_videos(folder, count * 3 // 5)
    audio, expected_audio = make_audio(folder, count - count * 3 // 5)
    cut = write_clips(audio, audio.clips, workers=1)
    outcome["partition"] = dict(Counter(reject["reason"] for reject in cut.rejects))
    for source, reasons in ((videos, expected), (audio, expected_audio)):
        report = extract(recipe, source)
        outcome["expected"] |= reasons
        outcome["listed"] += report.listed
        lines = [json.loads(line) for line in report.rejects_path.read_text().splitlines()]
        outcome["rejected"] |= {line["id"]: line["reason"] for line in lines if line["stage"] != "folder"}
        table = (folder / "out" / f"{source.name}.tsv").read_text().splitlines()[1:]
        outcome["accepted"] += [line.split("\t")[0] for line in table]
    return outcome | {"peak_mb": 1e3 * peak_memory_gb(torch.device("cpu"))}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(run(folder, int(sys.argv[2]))))
