"""Extraction at scale: many processes in one folder, batches, full disks, kills at any moment, many damaged files."""

import contextlib
import ctypes
import dataclasses
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import faulty_media
import numpy as np
import pytest
import torch
import yaml
from extraction import extract, toy_recipe
from forked import Command, resize_disk, run_together, wait_until
from odd_media import Odd, steady, truncate, write_odd
from training_runs import environment

from mmaudio_hf.cli import main
from mmaudio_hf.config import AudioSource, EncoderConfig, VideoSource
from mmaudio_hf.data.store import FeatureStore, StoreWriter
from mmaudio_hf.features import shards
from mmaudio_hf.features.encoders import fit_toy_codec, load_encoders
from mmaudio_hf.files import RESUME_HINT, Share, locked
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.schema import RunError
from mmaudio_hf.training.logs import peak_memory_gb

RATE, SECONDS = 16_000, 0.7
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folder with a toy codec."""
    folder = tmp_path_factory.mktemp("weights")
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal(8 * RATE).astype(np.float32))
    write_audio(folder / "noise.wav", 0.1 * noise, RATE)
    fit_toy_codec(folder, "16k", [folder / "noise.wav"])
    return folder


class AudioFiles:
    """A folder of short audio files, one clip and caption each, and ways to extract it."""

    def __init__(self, folder: Path, names, captions=None):
        self.folder = folder
        folder.mkdir(parents=True)
        noise = torch.from_numpy(np.random.default_rng(0).standard_normal(RATE).astype(np.float32))
        write_audio(folder.with_suffix(".wav"), 0.1 * noise, RATE)
        for name in names:
            os.link(folder.with_suffix(".wav"), folder / f"{name}.wav")
        captions = captions or {name: f"the noise {name}" for name in names}
        self.captions, self.clips = folder / "captions.tsv", folder / "clips.tsv"
        self.captions.write_text("id\tcaption\n" + "".join(f"{n}\t{text}\n" for n, text in captions.items()))
        rows = "".join(f"{name}_0\t{name}\t0\t{RATE}\n" for name in names)
        self.clips.write_text("id\tname\tstart_sample\tend_sample\n" + rows)

    def extract(self, out, weights, *, share=None, problems=None, open_writer=StoreWriter, **changes):
        recipe = toy_recipe(out, weights, duration=SECONDS, **({"shard_size": 4, "batch_size": 3} | changes))
        source = AudioSource("s", str(self.folder), str(self.captions), str(self.clips))
        return extract(recipe, source, open_writer, problems, share)

    def recipe(self, path: Path, out, weights, **changes) -> Path:
        """The same as a recipe."""
        extraction = {"output_dir": str(out), "shard_size": 4, "batch_size": 3} | changes
        source = {"name": "s", "media_dir": str(self.folder), "list": str(self.captions), "clips": str(self.clips)}
        tree = {
            "name": "run",
            "model": {"variant": "small_16k", "duration": SECONDS},
            "encoders": {"kind": "toy", "weights_dir": str(weights), "device": "cpu"},
            "extraction": extraction | {"audios": [source]},
        }
        path.write_text(yaml.safe_dump(tree))
        return path


def content(folder) -> dict[str, bytes]:
    """Every byte of the store, of the shards and of the rejects."""
    paths = [p for p in Path(folder).rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def left_over(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).rglob("*") if ".part" in path.name)


@pytest.fixture
def watched(monkeypatch):
    """Encoders whose results depend on the size of the batch; notes the captions of each. `limits`: of the memory."""
    seen = Namespace(batches=[], limits={}, stop_after=None)

    def load(*arguments, **keywords):
        encoders = load_encoders(*arguments, **keywords)

        def watch(component, network, inputs):
            if len(inputs) > seen.limits.get(component, 1000):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if component == "text":
                seen.batches.append([caption.split()[-1] for caption in inputs])
                if len(seen.batches) == seen.stop_after:
                    raise KeyboardInterrupt
                return network(inputs) + 0.01 * len(inputs)
            mean, std = network(inputs)
            return mean + 0.01 * len(inputs), std

        networks = {name: functools.partial(watch, name, network) for name, network in encoders.networks.items()}
        return dataclasses.replace(encoders, networks=networks)

    monkeypatch.setattr(shards, "load_encoders", load)
    return seen


class Namespace:
    def __init__(self, **values):
        self.__dict__.update(values)


def test_batches_follow_from_the_list_alone(weights, watched, tmp_path):
    """So neither shares, nor an interruption, nor what is wrong in other shards changes a byte."""
    media = AudioFiles(tmp_path / "media", [f"n{i:02d}" for i in range(11)])
    for name in ("n01", "n09"):
        os.unlink(media.folder / f"{name}.wav")
        (media.folder / f"{name}.wav").write_text("no audio")
    report = media.extract(tmp_path / "whole", weights)
    assert (report.shards, report.accepted, report.rejected, report.pending_shards) == (3, 9, 2, 0)
    assert watched.batches == [["n00", "n02"], ["n03"], ["n04", "n05", "n06"], ["n07"], ["n08", "n10"]]
    whole = content(tmp_path / "whole")

    for index in (2, 0, 1):
        report = media.extract(tmp_path / "shares", weights, share=Share(index, 3))
        assert (report.pending_shards == 0) == (index == 1) == (tmp_path / "shares" / "s").exists()
    assert content(tmp_path / "shares") == whole

    watched.batches.clear()
    watched.stop_after = 4
    with pytest.raises(KeyboardInterrupt, match=f"s: {RESUME_HINT}"):
        media.extract(tmp_path / "stopped", weights)
    assert not left_over(tmp_path / "stopped")
    watched.stop_after = None
    assert media.extract(tmp_path / "stopped", weights).reused_shards == 1
    assert len(watched.batches) == 4 + 3  # the fourth one is made again, with the batch before it that was complete
    assert content(tmp_path / "stopped") == whole

    os.unlink(media.folder / "n09.wav")
    os.link(media.folder / "n00.wav", media.folder / "n09.wav")
    watched.batches.clear()
    assert media.extract(tmp_path / "whole", weights).reused_shards == 2
    assert watched.batches == [["n08", "n09", "n10"]]


def test_a_caption_is_encoded_once_in_a_batch(weights, watched, tmp_path):
    """Its rows have the same text, and each row that of its own caption."""
    names = [f"n{i}" for i in range(6)]
    captions = dict(zip(names, ["a dog", "a cat", "a dog", "a dog", "a dog", "a bird"], strict=True))
    report = AudioFiles(tmp_path / "media", names, captions).extract(tmp_path / "out", weights, shard_size=6)
    assert watched.batches == [["dog", "cat"], ["dog", "bird"]]
    texts = FeatureStore.open(report.store_path).read(range(6))["text_features"]
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[3], texts[4])
    encoders = load_encoders(EncoderConfig("toy", str(weights)), "16k", ("text",))
    assert torch.equal(texts, encoders.encode_text(list(captions.values())) + 0.02)


def test_out_of_memory_halves_the_batch(weights, watched, tmp_path):
    """The same halves, whether this process met the limit in an earlier shard or not."""
    media = AudioFiles(tmp_path / "media", [f"n{i}" for i in range(14)])
    watched.limits["text"] = 3
    settings = {"shard_size": 9, "batch_size": 8}
    report = media.extract(tmp_path / "whole", weights, **settings)
    assert report.reduced == {"text": 3}
    assert "batch size reduced after out-of-memory (text 3)" in str(report)
    assert [len(batch) for batch in watched.batches] == [2, 2, 2, 2, 1, 3, 2]
    metadata = json.loads((tmp_path / "whole" / "s.shards" / "shard_00000.json").read_text())
    assert (metadata["batch_size"], metadata["halved"]) == (8, {"text": 2})
    for index in (1, 0):
        media.extract(tmp_path / "shares", weights, share=Share(index, 2), **settings)
    assert content(tmp_path / "shares") == content(tmp_path / "whole")

    watched.limits["latent"] = 0
    with pytest.raises(
        RunError, match=r"the latent encoder is out of memory on cpu for a single item \(CUDA out of mem"
    ):
        media.extract(tmp_path / "none", weights, **settings)
    assert not left_over(tmp_path / "none")
    watched.limits.clear()
    assert media.extract(tmp_path / "none", weights, **settings).accepted == 14


def test_two_runs_at_once_share_the_work(weights, watched, tmp_path):
    """Each shard is made once, both return with the store, and it is the usual one."""
    media = AudioFiles(tmp_path / "media", [f"n{i}" for i in range(40)])
    media.extract(tmp_path / "one", weights)
    once = sorted(watched.batches)
    watched.batches.clear()
    reports = []
    runs = [threading.Thread(target=lambda: reports.append(media.extract(tmp_path / "two", weights))) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [report.accepted for report in reports] == [40, 40]
    assert sorted(watched.batches) == once
    assert content(tmp_path / "two") == content(tmp_path / "one")
    shutil.rmtree(tmp_path / "two" / "s")
    with locked(tmp_path / "two" / "s.shards" / "shard_00000.lock"):  # as for a moment after a shard is complete
        runs[0] = threading.Thread(target=lambda: reports.append(media.extract(tmp_path / "two", weights)))
        runs[0].start()
        wait_until(lambda: (tmp_path / "two" / "s.partial").exists())
    runs[0].join()
    assert len(reports) == 3 and content(tmp_path / "two") == content(tmp_path / "one")


def test_a_run_of_another_list_is_noticed_before_it_mixes(weights, tmp_path):
    media = AudioFiles(tmp_path / "media", [f"n{i}" for i in range(8)])
    before = media.captions.read_text()

    def other_run(*arguments, **keywords):
        media.captions.write_text(before.replace("noise", "hum"))
        report = media.extract(tmp_path / "out", weights, share=Share(1, 2))
        assert (report.reused_shards, report.pending_shards) == (0, 1)
        return StoreWriter(*arguments, **keywords)

    with pytest.raises(RunError, match="another run with other settings, list or media makes these shards again"):
        media.extract(tmp_path / "out", weights, open_writer=other_run)
    assert not (tmp_path / "out" / "s").exists() and not left_over(tmp_path / "out")
    assert media.extract(tmp_path / "out", weights).reused_shards == 1
    assert FeatureStore.open(tmp_path / "out" / "s").captions == [f"the hum n{i}" for i in range(8)]


def test_a_shard_that_was_damaged_never_gets_into_a_store(weights, tmp_path):
    """One bit of the disk, anywhere in the file: the next run names it and the one after it makes it again."""
    media, out = AudioFiles(tmp_path / "media", [f"n{i}" for i in range(8)]), tmp_path / "out"
    media.extract(out, weights)
    whole, arrow = content(out), out / "s.shards" / "shard_00001.arrow"
    data, draw = arrow.read_bytes(), random.Random(0)
    for offset in (3, len(data) - 5, draw.randrange(len(data)), draw.randrange(len(data))):
        shutil.rmtree(out / "s")
        arrow.write_bytes(data[:offset] + bytes([data[offset] ^ 16]) + data[offset + 1 :])
        with pytest.raises(RunError, match=r"shard_00001\.arrow is not what was written .*makes this shard again"):
            media.extract(out, weights)
        assert not (out / "s").exists() and not left_over(out)
        assert media.extract(out, weights).reused_shards == 1
        assert content(out) == whole


# --- faults of real processes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(weights, tmp_path_factory) -> tuple[AudioFiles, dict[str, bytes]]:
    """48 files, one of them broken, and what their extraction writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    media = AudioFiles(folder / "media", [f"n{i:02d}" for i in range(48)])
    os.unlink(media.folder / "n05.wav")
    (media.folder / "n05.wav").write_text("broken")
    media.extract(folder / "whole", weights)
    return media, content(folder / "whole")


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_the_store_is_the_same(undisturbed, weights, tmp_path, seed):
    (media, expected), out = undisturbed, tmp_path / "out"
    command = ("extract-audio", str(media.recipe(tmp_path / "out.yaml", out, weights)))
    expected_store = {name: data for name, data in expected.items() if "shards" not in name}
    records, stages = out / "s.shards", Counter()
    moment = random.Random(seed)
    records.mkdir(parents=True)
    for attempt in range(8):
        before = len(list(records.glob("*.json")))
        with contextlib.ExitStack() as stack:
            if attempt < 4:  # while the next shard is made; the last one is kept from it
                stack.enter_context(locked(records / "shard_00011.lock"))
            process = stack.enter_context(Command(*command))
            if attempt < 4:
                wait_until(lambda: len(list(records.glob("*.json"))) > min(before, 10), process)  # noqa: B023
                time.sleep(moment.uniform(0, 0.08))
            else:  # in the export
                wait_until(lambda: (out / "s.partial").exists() or process.poll() is not None)  # noqa: B023
                time.sleep(moment.uniform(0, 0.03))
            process.kill()
        stages["complete" if (out / "s").exists() else "export" if (out / "s.partial").exists() else "shards"] += 1
        if (out / "s").exists():  # then it is whole; without it the next run exports again
            assert {name: data for name, data in content(out).items() if "shards" not in name} == expected_store
            shutil.rmtree(out / "s")
    assert stages["shards"] and stages["export"] + stages["complete"], stages
    kept = {path: path.stat().st_mtime_ns for path in records.glob("shard_*.json")}
    assert Command(*command).result().returncode == 0
    assert content(out) == expected and not left_over(out)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert len((out / "s.rejects.jsonl").read_text().splitlines()) + len(FeatureStore.open(out / "s")) == 48


def test_workers_end_with_a_killed_run_and_the_next_one_resumes(weights, tmp_path):
    """Real command, two worker processes: SIGKILL, then Ctrl-C, then to the end."""
    media = AudioFiles(tmp_path / "media", [f"n{i:02d}" for i in range(96)])
    out, mark = tmp_path / "out", f"MARK={tmp_path}"
    recipe = media.recipe(tmp_path / "r.yaml", out, weights, num_proc=2)

    def start_and_wait_for(more):
        before = len(list(out.glob("s.shards/*.json")))
        process = Command("extract-audio", str(recipe), env=environment(MARK=str(tmp_path)))
        wait_until(lambda: len(list(out.glob("s.shards/*.json"))) > before + more, process)
        return process

    (out / "s.shards").mkdir(parents=True)
    with locked(out / "s.shards" / "shard_00023.lock"):  # the last one is kept from them
        process = start_and_wait_for(1)
        process.kill()
        process.communicate()
        wait_until(lambda: not processes_with(mark))
        process = start_and_wait_for(1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate()
    assert process.returncode == 130
    lines = [line for line in re.split(r"[\r\n]+", errors) if line.strip() and "/96 [" not in line]
    assert lines == [f"interrupted: s: {RESUME_HINT}"], errors
    wait_until(lambda: not processes_with(mark))
    kept = len(list(out.glob("s.shards/*.json")))
    assert 0 < kept < 24
    report = media.extract(out, weights)
    assert report.reused_shards >= kept and report.accepted == 96
    media.extract(tmp_path / "whole", weights)
    assert content(out) == content(tmp_path / "whole")


def processes_with(setting: str) -> list[str]:
    """Processes that have `setting` in their environment: a killed run's workers, for as long as they live."""
    processes = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as file:
            processes += [entry] * (setting.encode() in file.read().split(b"\0"))
    return processes


def test_a_launch_gives_each_process_its_share(weights, tmp_path):
    media = AudioFiles(tmp_path / "media", [f"n{i}" for i in range(16)])
    recipe = media.recipe(tmp_path / "r.yaml", tmp_path / "out", weights)
    done = run_together(2, "extract-audio", str(recipe), cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    media.extract(tmp_path / "one", weights)
    assert content(tmp_path / "out") == content(tmp_path / "one")
    assert re.search(r"s: [234] of 4 shards complete|s: 16 of 16 in", done.stdout + done.stderr)


def test_shares_come_from_options_or_the_launcher(weights, tmp_path, monkeypatch, capsys):
    media = AudioFiles(tmp_path / "media", [f"n{i}" for i in range(8)])
    command = ["extract-audio", str(media.recipe(tmp_path / "r.yaml", tmp_path / "out", weights))]
    shard_files = lambda: sorted(path.name for path in tmp_path.glob("out/s.shards/*.json"))  # noqa: E731
    assert main([*command, "--shard-index", "1", "--num-shards", "2"]) == 0
    assert shard_files() == ["shard_00001.json"]
    assert "s: 1 of 2 shards complete" in capsys.readouterr().out
    assert main([*command, "--shard-index", "2"]) == 2
    assert main([*command, "--shard-index", "2", "--num-shards", "2"]) == 2
    errors = capsys.readouterr().err
    assert "go together" in errors and "shard index 2 of 2" in errors
    monkeypatch.setenv("RANK", "0")
    assert main(command) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 0
    assert shard_files()[:2] == ["shard_00000.json", "shard_00001.json"]
    assert (tmp_path / "out" / "s").is_dir()


def extract_to_disks(folder: Path, recipe: Path, copy: Path) -> None:
    """Runs in a process of its own: too small for the shards, then for the store, then large enough."""
    # As where other processes fill the disk meanwhile: there seems to be enough space.
    shutil.disk_usage = lambda _: Namespace(total=10**12, used=0, free=10**12)
    ends = []
    for size in ("3m", "7m", "40m"):
        resize_disk(folder, size)
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(["extract-audio", str(recipe)])
        names = [name for _, folders, files in os.walk(folder) for name in folders + files]
        ends.append([code, errors.getvalue().splitlines()[-1:], sorted(names)])
    shutil.copytree(folder, copy)
    print(json.dumps(ends))


def test_a_full_disk_ends_with_one_sentence_and_a_larger_one_resumes(weights, tmp_path):
    media, folder = AudioFiles(tmp_path / "media", [f"n{i:02d}" for i in range(16)]), tmp_path / "small"
    folder.mkdir()
    arguments = (folder, media.recipe(tmp_path / "r.yaml", folder / "out", weights), tmp_path / "copy")
    done = Command(extract_to_disks, *arguments, own_mounts=True).result()
    assert done.returncode == 0, done.stderr
    first, second, last = json.loads(done.stdout.splitlines()[-1])
    hint = f"free some space; {RESUME_HINT}"
    for (code, errors, names), file, kept in (
        (first, "out/s.shards/shard_00002.arrow", 2),
        (second, "out/s.partial/text_features.memmap", 4),
    ):
        assert code == 1
        assert hint in errors[0] and "No space left on device" in errors[0] and str(folder / file) in errors[0], errors
        assert [name for name in names if name.endswith(".json") and "shard" in name] == [
            f"shard_{number:05d}.json" for number in range(kept)
        ]
        assert sum(name.endswith(".arrow") for name in names) == kept
        assert not [name for name in names if ".part" in name or name == "s"]
    assert last[0] == 0
    media.extract(tmp_path / "whole", weights)
    assert content(tmp_path / "copy" / "out") == content(tmp_path / "whole")


# --- many items --------------------------------------------------------------------------------------------------


def faults(folder: Path, good: Path) -> dict[str, tuple]:
    """Ways to break an audio file: name -> (what takes the place of its path, stage and reason of the reject)."""
    noise = 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    write_audio(folder / "good.flac", noise, RATE)
    truncate(folder / "good.flac", folder / "cut.flac", 0.7)
    write_audio(folder / "silent.wav", torch.zeros(RATE), RATE)
    write_audio(folder / "short.wav", noise[: RATE // 2], RATE)
    write_odd(folder / "mute.mp4", Odd(frame_times=steady(0.5), audio_seconds=None))
    (folder / "text.wav").write_text("this is no audio\n" * 50)
    (folder / "empty.wav").touch()
    return {
        "not_found": (lambda path: None, "list", "not_found"),
        "folder": (lambda path: path.mkdir(), "list", "not_found"),
        "text": (lambda path: os.link(folder / "text.wav", path), "read", "unreadable"),
        "empty": (lambda path: os.link(folder / "empty.wav", path), "read", "unreadable"),
        "cut": (lambda path: os.link(folder / "cut.flac", path.with_suffix(".flac")), "read", "decode_error"),
        "silent": (lambda path: os.link(folder / "silent.wav", path), "read", "silent"),
        "short": (lambda path: os.link(folder / "short.wav", path), "read", "clip_out_of_range"),
        "mute": (lambda path: os.link(folder / "mute.mp4", path.with_suffix(".m4a")), "read", "no_audio"),
        "no_caption": (lambda path: os.link(good, path), "list", "no_caption"),
        "audit": (lambda path: os.link(good, path), "audit", "clipped"),
    }


def test_of_many_items_every_broken_one_is_named(weights, tmp_path):
    """10 % broken in ten ways: accepted and rejected add up to the listed ones, and each reason is right."""
    names = [f"item_{i:04d}" for i in range(300)]
    random.Random(0).shuffle(names)
    media = AudioFiles(tmp_path / "media", names)
    ways = faults(tmp_path, media.folder / f"{names[-1]}.wav")
    broken = dict(zip(names[:30], [*ways] * 3, strict=True))
    for name, way in broken.items():
        path = media.folder / f"{name}.wav"
        path.unlink()
        ways[way][0](path)
    lines = media.captions.read_text().splitlines(keepends=True)
    kept = [line for line in lines if broken.get(line.split("\t")[0]) != "no_caption"]
    media.captions.write_text("".join(kept))
    problems = {name: ("clipped", "too loud") for name, way in broken.items() if way == "audit"}
    report = media.extract(tmp_path / "out", weights, shard_size=128, batch_size=64, problems=problems)
    rejects = [json.loads(line) for line in report.rejects_path.read_text().splitlines()]
    assert (report.listed, report.accepted, report.rejected, report.missing) == (300, 270, 30, 6)
    by_id = {reject["id"].removesuffix("_0"): (reject["stage"], reject["reason"]) for reject in rejects}
    assert by_id == {name: ways[way][1:] for name, way in broken.items()}
    assert all(reject["message"] for reject in rejects)
    store = FeatureStore.open(report.store_path)
    assert store.ids == [f"{name}_0" for name in names if name not in broken]
    assert store.captions == [f"the noise {name}" for name in names if name not in broken]
    shutil.rmtree(tmp_path / "out")


def check_outcome(outcome: dict, count: int) -> None:
    """Accepted and rejected items are the listed ones, each for the reason that it was made with."""
    accepted, expected = outcome["accepted"], outcome["expected"]
    assert len(accepted) + len(outcome["rejected"]) == len(expected) == outcome["listed"] == count
    assert sorted(accepted) == sorted(item for item, reason in expected.items() if not reason)
    assert outcome["rejected"] == {item: reason for item, reason in expected.items() if reason}


def test_sixty_items_with_every_kind_of_fault(tmp_path):
    outcome = faulty_media.run(tmp_path, 60)
    check_outcome(outcome, 60)
    assert outcome["partition"] == {"decode_error": 5, "audio_too_short": 1}


@pytest.mark.slow
def test_two_thousand_items_with_every_kind_of_fault_take_no_more_memory(tmp_path):
    def run(count: int) -> float:
        program = ROOT / "tests" / "faulty_media.py"
        command = [sys.executable, str(program), str(tmp_path / str(count)), str(count)]
        variables = environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
        outcome = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=variables).stdout)
        check_outcome(outcome, count)
        return outcome["peak_mb"]

    few, many = run(200), run(2000)
    print(f"peak memory: {few:.0f} MB with 200 items, {many:.0f} MB with 2000")
    # 1.09 and 1.15 GB were measured, 1.12 and 1.36 before shards gave back what they leave: more draws of the largest
    # batch. The frames of all would be more than 4 GB.
    assert many < few + 150, (few, many)


def print_peak(folder: Path, weights: Path, count: int) -> None:
    """Runs in a process of its own."""
    ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: no free heaps
    (folder / "list.tsv").write_text("id\tlabel\n" + "".join(f"clip_{i}\ta clip\n" for i in range(count)))
    recipe = toy_recipe(folder / "out", weights, duration=2.0, shard_size=6, batch_size=3)
    extract(recipe, VideoSource(f"s{count}", str(folder), str(folder / "list.tsv")))
    print(1e3 * peak_memory_gb(torch.device("cpu")))


def test_memory_does_not_grow_with_the_number_of_videos(weights, tmp_path):
    clip = write_odd(tmp_path / "clip_0.mp4", Odd(frame_times=steady(2.4), audio_seconds=2.5, size=(960, 540)))
    for number in range(1, 18):
        os.link(clip, tmp_path / f"clip_{number}.mp4")

    results = [Command(print_peak, tmp_path, weights, count).result() for count in (6, 18)]
    few, many = (float(result.stdout.split()[-1]) for result in results)
    assert many < few + 100, (few, many)  # the frames of 12 more videos take 200 MB
