"""Audio for folders and lists: what is generated, kept, generated again and rejected."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import av
import pytest
from forked import Command, wait_until
from odd_media import Odd, code_image, steady, truncate, write_odd
from published import write_network

from mmaudio_hf.cli import main
from mmaudio_hf.files import read_json, write_text
from mmaudio_hf.generation.files import generate_files, read_folder, read_list
from mmaudio_hf.generation.pipeline import MMAudioPipeline
from mmaudio_hf.media.audio import read_waveform
from mmaudio_hf.media.container import probe
from mmaudio_hf.models.sampling import GuidedVelocity

OPTIONS = ("--steps", "2", "--device", "cpu", "--batch-size", "3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("run"))


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    write_odd(folder / "a.mp4", Odd(steady(1.2)))
    write_odd(folder / "b.webm", Odd(steady(0.8), codec="libvpx", audio_seconds=None))
    truncate(folder / "a.mp4", folder / "half.mp4", 0.3)
    with av.open(str(folder / "c.png"), "w", format="image2") as container:
        stream = container.add_stream("png", width=96, height=96)
        stream.pix_fmt = "rgb24"
        frame = av.VideoFrame.from_ndarray(code_image(9, 96, 96), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    (folder / "a.jpg").write_bytes(b"the same name as a video")
    (folder / "notes.txt").write_text("not listed")
    return folder


def generate(*words, code: int = 0) -> None:
    assert main(["generate", *map(str, words)]) == code


def rejects_of(folder) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert all(set(line) == {"id", "stage", "reason", "message"} for line in lines)
    return {line["id"]: f"{line['stage']} {line['reason']}" for line in lines}


def test_names_that_are_no_text_are_rejected_and_written(tmp_path):
    for name in (b"good.mp4", b"bad\xff.mp4", b"new\nline.mp4"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    problems = {entry.id: entry.problem and entry.problem[2] for entry in read_folder(tmp_path)}
    assert problems["good"] is None and "has control characters" in problems["new\nline"]
    assert problems["bad\udcff"].startswith("id 'bad\\udcff' has bytes that are not UTF-8")
    write_text(tmp_path / "rejects.json", json.dumps(problems, ensure_ascii=False))
    assert read_json(tmp_path / "rejects.json") == problems


def test_results_of_a_folder_are_kept(run, media, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = ("--run", run, "--folder", media, "--prompt", "a bell", "--out", out, *OPTIONS)
    generate(*words)
    assert f"{out}: 3 of 5 generated, 2 rejected" in capsys.readouterr().out
    assert rejects_of(out) == {"a.jpg": "list duplicate_id", "half": "read unreadable"}
    assert {p.name for p in out.iterdir()} == {
        *("a.mp4", "a.json", "b.mp4", "b.json", "c.wav", "c.json", "rejects.jsonl"),
    }
    assert probe(out / "a.mp4")["audio"]["duration"] == pytest.approx(1.2, abs=0.03)
    record = json.loads((out / "b.json").read_text())
    assert "re-encoded as H.264" in record["notes"][0] and record["request"]["prompt"] == "a bell"

    # Nothing is made again of the same; a prompt, a file or a missing result makes its item new.
    (out / ".a.mp4.77.part").write_text("left by a run that was killed")
    with monkeypatch.context() as patch:
        patch.setattr(GuidedVelocity, "__call__", lambda *_: pytest.fail("the model ran"))
        generate(*words)
    assert "0 of 5 generated, 3 kept, 2 rejected" in capsys.readouterr().out
    (out / "c.wav").write_bytes((out / "c.wav").read_bytes()[:-100])
    os.utime(media / "a.mp4", ns=(0, 0))
    generate(*words)
    assert "2 of 5 generated, 1 kept" in capsys.readouterr().out and not (out / ".a.mp4.77.part").exists()
    generate(*words, "--seed", "5")
    assert "3 of 5 generated, 2 rejected" in capsys.readouterr().out


def test_a_list_and_its_shares(run, media, tmp_path, capsys):
    rows = ["id\tvideo\tcaption\tnegative_prompt\tduration\tseed\tnotes", "v\ta.mp4\ta bell\thum\t0.8\t3\tx"]
    rows += [
        "t\t\ta drum\t\t\t\t",
        "u\t\ta drum\t\t\t7\t",
        "w\tgone.mp4\t\t\t\t\t",
        "n\t\t\t\t\t\t",
        "p\t../media/b.webm\t\t\t9\t\t",
    ]
    (media / "list.tsv").write_text("\n".join(rows) + "\n")
    words = ("--run", run, "--list", media / "list.tsv", "--format", "flac", *OPTIONS)
    generate(*words, "--out", tmp_path / "whole")
    assert "4 of 6 generated, 2 rejected" in (printed := capsys.readouterr()).out
    assert rejects_of(tmp_path / "whole") == {"w": "list not_found", "n": "list nothing_given"}
    assert "0.80 s long, as its video is, not the requested 9 s" in printed.out + printed.err
    for index in range(2):
        generate(*words, "--out", tmp_path / "shared", "--shard-index", index, "--num-shards", 2)
    names = {path.name for path in (tmp_path / "shared").iterdir()}
    assert {"rejects.0-2.jsonl", "rejects.1-2.jsonl", "v.flac", "t.flac", "u.flac", "p.flac"} <= names
    lengths = {}
    for name in ("v", "t", "u", "p"):
        one, two = (read_waveform(tmp_path / folder / f"{name}.flac")[0] for folder in ("whole", "shared"))
        assert (one - two).norm() < 0.1 * one.norm(), name  # the toy decoder magnifies rounding
        lengths[name] = len(one) / 16_000
    assert lengths == pytest.approx({"v": 0.8, "t": 1.024, "u": 1.024, "p": 0.8})
    waveforms = [read_waveform(tmp_path / "whole" / f"{name}.flac")[0] for name in ("t", "u")]
    assert (waveforms[0] - waveforms[1]).norm() > 0.3 * waveforms[0].norm()


def test_lists_that_cannot_be_meant(media, tmp_path):
    for text, words in (
        ("id\tprompt\n../up\tx\n", r"not a plain name.*list\.tsv, line 2"),
        ("id\tprompt\na\tx\na\ty\n", "already on line 2"),
        ("id\tprompt\tseed\na\tx\t1.5\n", "seed '1.5' is not a whole number"),
        ("id\tprompt\tduration\na\tx\tlong\n", "line 2: duration 'long' is not a number"),
        ("id\tprompt\tnegativ_prompt\na\tx\ty\n", "rename it 'negative_prompt'"),
        ("id\tprompt\tcaption\na\tx\ty\n", "caption and prompt"),
        ("id\tseed\na\t1\n", "nothing to generate from"),
        ("name\tprompt\na\tx\n", "no column 'id'"),
    ):
        (tmp_path / "list.tsv").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_list(tmp_path / "list.tsv")
    (tmp_path / "list.tsv").write_text("id\tlabel\na\tx\nz\ty\n")
    by_id = read_list(tmp_path / "list.tsv", media)
    assert by_id[0].request.video == media / "a.mp4" and by_id[0].request.prompt == "x"
    assert [entry.problem and entry.problem[1] for entry in by_id] == [None, "not_found"]
    with pytest.raises(ValueError, match="no videos or images"):
        read_folder(tmp_path)


def test_mistakes_cost_nothing(run, media, tmp_path, capsys):
    out = tmp_path / "out"
    folder = ("--run", run, "--folder", media, "--out", out)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a.mp4").symlink_to(media / "a.mp4")
    (tmp_path / "folder.wav").mkdir()
    (media / "by_id.tsv").write_text("id\tprompt\na\ta bell\n")
    before = {path: path.read_bytes() for path in media.iterdir()}
    for words, message in (
        ((*folder, "--video", media / "a.mp4"), "are for one result"),
        ((*folder, "--steps", "0"), "num_steps"),
        ((*folder, "--duration", "-1"), "positive"),
        ((*folder, "--shard-index", "1"), "go together"),
        (("--run", run, "--folder", tmp_path / "gone", "--out", out), "no such folder"),
        (("--run", run, "--prompt", "x", "--out", tmp_path / "a.ogg"), "ends with .wav or .flac"),
        (("--run", run, "--list", media / "a.mp4", "--out", out), "UTF-8"),
        (("--run", run, "--folder", media, "--out", media), "holds media of the list"),
        (("--run", run, "--folder", linked, "--out", media), "holds media of the list"),
        (("--run", run, "--list", media / "by_id.tsv", "--folder", media, "--out", media), "holds media"),
        (("--run", run, "--video", media / "a.mp4", "--out", linked / "a.mp4"), "choose another name, to keep it"),
        # The network, which is not there, would be missed next.
        (("--run", "nowhere", "--folder", media, "--out", media / "notes.txt" / "out"), "notes.txt is a file"),
        (("--run", "nowhere", "--prompt", "x", "--out", media / "notes.txt" / "a.wav"), "notes.txt is a file"),
        (("--run", "nowhere", "--prompt", "x", "--out", tmp_path / "folder.wav"), "folder.wav is a folder"),
    ):
        generate(*words, code=2)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and len(error.strip().splitlines()) == 1
    assert not out.exists() and {path: path.read_bytes() for path in media.iterdir()} == before
    generate("--run", "nowhere", "--folder", media, "--out", "/proc/no/such", code=1)  # nobody can write there
    assert capsys.readouterr().err.rstrip().endswith(": '/proc'")
    for path in list(media.iterdir()):
        path.unlink()
    (media / "x.mp4").write_text("no video")
    generate(*folder, code=2)
    assert "all 1 items were rejected" in capsys.readouterr().err


def test_audio_that_is_not_finite_is_rejected(run, tmp_path, capsys, monkeypatch):
    generate_batch = MMAudioPipeline._generate_batch

    def one_diverges(*args):
        for result in generate_batch(*args):
            yield replace(result, waveform=result.waveform * math.nan) if result.key == "a" else result

    monkeypatch.setattr(MMAudioPipeline, "_generate_batch", one_diverges)
    (tmp_path / "list.tsv").write_text("id\tprompt\na\ta bell\nb\ta bell\n")
    generate("--run", run, "--list", tmp_path / "list.tsv", "--out", tmp_path / "out", *OPTIONS)
    assert "1 of 2 generated, 1 rejected" in capsys.readouterr().out
    assert rejects_of(tmp_path / "out") == {"a": "write bad_sound"} and (tmp_path / "out" / "b.wav").exists()


def test_media_that_change_or_go_meanwhile(run, media, tmp_path, capsys, monkeypatch):
    generate_batch, out = MMAudioPipeline._generate_batch, tmp_path / "out"
    (media / "half.mp4").unlink()

    def after_reading(pipeline, batch, options):
        keys = [item.request.key for item in batch]  # others may be read later
        if "a" in keys:
            os.utime(media / "a.mp4", ns=(0, 0))
        if "b" in keys:
            (media / "b.webm").unlink()
        yield from generate_batch(pipeline, batch, options)

    words = ("--run", run, "--folder", media, "--out", out, "--format", "wav", *OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(MMAudioPipeline, "_generate_batch", after_reading)
        generate(*words)
    assert "3 of 4 generated, 1 rejected" in capsys.readouterr().out  # of what was read, though it is gone
    generate(*words)
    assert "1 of 3 generated, 1 kept" in capsys.readouterr().out  # the file that changed may not be what was read
    entries = read_folder(media)
    (media / "a.mp4").unlink()
    report = generate_files(MMAudioPipeline.from_pretrained(run), entries, out, ending=".wav", num_steps=2)
    assert (report.generated, report.kept, report.rejected) == (1, 0, 2)
    assert rejects_of(out) == {"a.jpg": "list duplicate_id", "a": "list not_found"}


def test_weights_that_are_gone_are_named(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    (tmp_path / "list.tsv").write_text("id\tprompt\na\ta bell\n")
    words = ("--run", run, "--list", tmp_path / "list.tsv", "--out", tmp_path / "out", *OPTIONS)
    generate(*words)
    (run / "toy_codec_16k.safetensors").unlink()
    capsys.readouterr()
    generate(*words, code=2)
    assert "toy_codec_16k.safetensors is missing" in capsys.readouterr().err


def test_ctrl_c_ends_with_one_line_and_the_rest_follows(run, tmp_path, capsys):
    rows = ["id\tprompt\n", *(f"item_{n:03}\ta bell {n}\n" for n in range(400))]
    (tmp_path / "list.tsv").write_text("".join(rows))
    words = ["generate", "--run", str(run), "--list", str(tmp_path / "list.tsv"), "--out", str(tmp_path / "out")]
    words += ["--steps", "8", "--device", "cpu", "--batch-size", "2"]
    with Command(*words) as process:
        wait_until((tmp_path / "out" / "item_001.json").exists, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    last = errors.strip().splitlines()[-1]
    assert "interrupted: " in last and "of 400 are complete" in last and "Traceback" not in errors
    complete = {path.stem for path in (tmp_path / "out").glob("*.json")}
    assert {f"{name}.wav" for name in complete} == {path.name for path in (tmp_path / "out").glob("*.wav")}
    assert 2 <= len(complete) < 400
    (tmp_path / "list.tsv").write_text(
        "id\tprompt\n" + "".join(f"item_{n:03}\ta bell {n}\n" for n in range(len(complete) + 2))
    )
    assert main(words) == 0
    assert f"2 of {len(complete) + 2} generated, {len(complete)} kept" in capsys.readouterr().out
