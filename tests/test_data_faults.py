"""Faults of disks, processes and hands: each ends in the right store or in a clear refusal."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_stores import AUDIO_SHAPES, METADATA, SHAPES, make_store, random_values
from forked import Command, fill_disk, resize_disk

from mmaudio_hf.cli import main
from mmaudio_hf.data.store import FeatureStore, StoreWriter
from mmaudio_hf.data.tools import convert, relative_difference, verify
from mmaudio_hf.features.toy import text_features
from mmaudio_hf.schema import RunError

IDS, CAPTIONS = [f"id_{row}" for row in range(12)], [f"bark number {row % 5}" for row in range(12)]


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("layout", ["reference", "compact"])
def test_every_flipped_bit_and_every_truncation_is_a_problem(layout, tmp_path):
    path = tmp_path / "s"
    make_store(path, 4, layout=layout)
    assert verify(path).ok
    numbers = random.Random(0)
    for file in sorted((*path.iterdir(), tmp_path / "s.tsv", tmp_path / "s.manifest.json")):
        whole = file.read_bytes()
        for _ in range(12):
            offset, bit = numbers.randrange(len(whole)), 1 << numbers.randrange(8)
            file.write_bytes(whole[:offset] + bytes([whole[offset] ^ bit]) + whole[offset + 1 :])
            report = verify(path)
            assert not report.ok, f"{file.name}: bit {bit} of byte {offset} ({whole[offset : offset + 20]})"
            assert any(str(tmp_path) in problem for problem in report.problems)
        for name in ("checksum", "captions_sha256") if file.suffix == ".json" and file.parent == tmp_path else ():
            file.write_bytes(whole.replace(name.encode(), b"x" + name.encode()[1:]))
            assert not verify(path).ok, name
        for size in (0, len(whole) // 2, len(whole) - 2):  # the last newline of the table may go
            file.write_bytes(whole[:size])
            assert not verify(path).ok, (file.name, size)
        file.write_bytes(whole)
    assert verify(path).ok


def test_a_text_index_out_of_range_does_not_open(tmp_path):
    make_store(tmp_path / "s", 4, AUDIO_SHAPES, layout="compact")
    (tmp_path / "s" / "text_index.memmap").write_bytes(np.array([0, 1, 2, 4], "<i4").tobytes())
    with pytest.raises(ValueError, match=r"text_index\.memmap names text 0 to 4, there are 4"):
        FeatureStore.open(tmp_path / "s")


def test_repeated_ids_are_a_note(tmp_path):
    with StoreWriter(tmp_path / "s", AUDIO_SHAPES, 3, **METADATA) as writer:
        writer.write(0, ["a", "b", "a"], [""] * 3, random_values(3, AUDIO_SHAPES))
    report = verify(tmp_path / "s")
    assert report.ok and report.notes == ("1 rows repeat an id; the first is 'a' in rows 0, 2",)


# --- captions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def captioned(tmp_path) -> Path:
    """A store of 12 rows whose text features are those of its captions, by the toy encoder."""
    shapes = {**AUDIO_SHAPES, "text_features": (77, 1024)}
    values = random_values(12, shapes) | {"text_features": text_features(CAPTIONS)}
    with StoreWriter(tmp_path / "s", shapes, 12, **METADATA) as writer:
        writer.write(0, IDS, CAPTIONS, values)
    return tmp_path / "s"


def encode(item_id: str, caption: str) -> dict[str, torch.Tensor]:
    return {"text_features": text_features([caption])[0]}


@pytest.mark.parametrize("shift", [1, -1])
def test_captions_shifted_by_one_row_are_a_problem(shift, captioned):
    assert verify(captioned, sample=12, reencode=encode).notes[0].startswith("text_features: 12 rows encoded again")
    table = captioned.with_suffix(".tsv")
    header, *lines = table.read_text().splitlines()
    captions = [line.split("\t")[1] for line in lines]
    moved = [f"{IDS[row]}\t{captions[(row + shift) % 12]}" for row in range(12)]
    table.write_text("\n".join([header, *moved, ""]))
    with pytest.raises(ValueError, match=r"s\.tsv does not hold the captions .* \(changed or shifted since\)"):
        FeatureStore.open(captioned)
    captioned.with_name("s.manifest.json").unlink()  # as the reference implementation leaves it
    assert verify(captioned).ok  # nothing there to compare with
    report = verify(captioned, sample=4, reencode=encode)
    assert len(report.problems) == 4
    pointing = [f"of the caption of row {row - shift}: captions are shifted" for row in range(12)]
    assert sum(any(text in problem for text in pointing) for problem in report.problems) >= 3


def test_rows_that_cannot_be_encoded_again_are_problems(captioned):
    def gone(item_id, caption):
        raise RunError(f"{item_id}.mp4: no such file")

    report = verify(captioned, sample=2, reencode=gone)
    assert len(report.problems) == 2 and "cannot be encoded again: id_" in report.problems[0]
    known = iter([encode("", "another bark")])
    report = verify(captioned, sample=1, reencode=lambda *row: next(known, None) or gone(*row))
    assert len(report.problems) == 1 and "are not those of its caption" in report.problems[0]  # neighbours are gone
    assert relative_difference(torch.ones(2, 3), torch.ones(3, 2)) == float("inf")


# --- kills -------------------------------------------------------------------------------------------------------


def write_slowly(path: Path, ticks) -> None:
    values = random_values(12)
    with StoreWriter(path, SHAPES, 12, **METADATA, layout="compact") as writer:
        for row in range(12):
            writer.write(
                row, IDS[row : row + 1], CAPTIONS[row : row + 1], {n: v[row : row + 1] for n, v in values.items()}
            )
            os.write(ticks, b".")


def in_child(function, *arguments) -> int:
    """Run a function in a process of its own; returns its id."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def check_remains(folder: Path, path: Path, whole: dict[str, bytes]) -> bool:
    """After a kill the store is complete, or does not open; the names beside it are nothing but remains."""
    complete = path.exists()
    assert verify(path).ok == complete and set(os.listdir(folder)) <= {"s", "s.tsv", "s.manifest.json", "s.partial"}
    assert not complete or content(folder) == whole
    return complete


def test_a_writer_killed_anywhere_leaves_nothing_that_opens_and_the_next_takes_over(tmp_path):
    ready, ticks = os.pipe()
    write_slowly(tmp_path / "whole" / "s", ticks)
    os.read(ready, 100)
    whole, numbers, finished = content(tmp_path / "whole"), random.Random(1), 0
    for kill in range(14):
        folder = tmp_path / f"run_{kill % 3}"  # several kills in a row on the same remains
        process = in_child(write_slowly, folder / "s", ticks)
        for _ in range(numbers.randrange(13)):
            os.read(ready, 1)
        time.sleep(numbers.random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        os.write(ticks, b".")  # so that the next line does not wait
        os.read(ready, 100)
        if folder.exists() and check_remains(folder, folder / "s", whole):
            finished += 1
            shutil.rmtree(folder)
    assert finished < 14
    for folder in tmp_path.glob("run_*"):
        write_slowly(folder / "s", ticks)
        assert content(folder) == whole
    os.close(ready), os.close(ticks)


def test_a_conversion_killed_anywhere_leaves_the_source_and_can_be_repeated(tmp_path):
    source = tmp_path / "source" / "s"
    make_store(source, 2000)
    before = content(tmp_path / "source")
    start = time.monotonic()
    convert(source, tmp_path / "whole" / "s", "compact").close()
    seconds, whole, numbers = time.monotonic() - start, content(tmp_path / "whole"), random.Random(2)
    for kill in range(6):
        folder = tmp_path / f"run_{kill}"
        process = in_child(convert, source, folder / "s", "compact")
        process.join(numbers.random() * seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if folder.exists() and check_remains(folder, folder / "s", whole):
            continue
        convert(source, folder / "s", "compact").close()
        assert content(folder) == whole
    assert content(tmp_path / "source") == before


# --- a full disk -------------------------------------------------------------------------------------------------


def fill_and_run(small: Path, folder: Path) -> None:
    """With less and less room on `small`, write, convert and merge: all of it or nothing. In a process of its own."""
    resize_disk(small, "1m")
    before, steps, failed, written = content(folder), 0, 0, 0
    commands = [
        ["store", "convert", str(folder / "a"), str(small / "x"), "--layout", "compact"],
        ["store", "merge", str(folder / "b"), str(folder / "c"), "--out", str(small / "x")],
        ["store", "subset", str(folder / "b"), str(small / "x"), "--match", "caption 1"],
    ]
    for free in range(0, 96 * 1024, 8 * 1024):
        fill_disk(small, free)
        for command in commands:
            steps += 1
            code = main(command)
            names = set(os.listdir(small)) - {"filler"}
            if code == 0:
                written += 1
                assert names == {"x", "x.tsv", "x.manifest.json"} and verify(small / "x").ok
                for name in ("x.tsv", "x.manifest.json"):
                    (small / name).unlink()
                shutil.rmtree(small / "x")
            else:
                failed += 1
                assert code == 1 and names == set(), (command, code, names)
        (small / "filler").unlink()
    assert content(folder) == before
    print("outcomes", steps, failed, written)


def test_a_full_disk_leaves_nothing_half_done(tmp_path):
    small, folder = tmp_path / "small", tmp_path / "sources"
    small.mkdir()
    make_store(folder / "a", 30)
    make_store(folder / "b", 15, layout="compact")
    make_store(folder / "c", 15, layout="compact", seed=1)
    done = Command(fill_and_run, small, folder, own_mounts=True).result()
    assert done.returncode == 0, done.stdout + done.stderr
    steps, failed, written = map(int, done.stdout.split("outcomes")[1].split())
    assert steps == 36 and failed >= 6 and written >= 6
    for line in done.stderr.splitlines():
        assert ("No space left on device" in line and str(small / "x") in line) or "the store needs" in line, line
