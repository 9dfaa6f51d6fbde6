"""Many reads at once: the bytes of single ones, and every way in which they may fail."""

import multiprocessing
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mmaudio_hf.data import reads
from mmaudio_hf.data.reads import read_records, runs

needs_submit = pytest.mark.skipif(not reads._AVAILABLE, reason="io_submit is used on Linux x86-64 alone")
SIZE = 1000  # of a record: not a multiple of a page


@pytest.fixture
def file(tmp_path):
    """700 records, more than are submitted at once."""
    path = tmp_path / "x.memmap"
    path.write_bytes(np.random.default_rng(0).bytes(700 * SIZE))
    with open(path, "rb", buffering=0) as file:
        yield file


def check(file, records, places) -> None:
    """What is read is there, and nothing else was written."""
    target = np.full((max(places, default=-1) + 2, SIZE), 7, np.uint8)
    expected = target.copy()
    expected[places] = np.fromfile(file.name, np.uint8).reshape(-1, SIZE)[records]
    read_records(file, np.array(records), SIZE, memoryview(target).cast("B"), np.array(places))
    np.testing.assert_array_equal(target, expected)


def orders() -> dict[str, tuple]:
    shuffled = np.random.default_rng(1).permutation(700)
    return {
        "one": ([3], [2]),
        "two": ([3, 0], [0, 1]),
        "again": ([5, 5, 5], [2, 0, 4]),
        "in order": (list(range(700)), list(range(700))),
        "in order, elsewhere": (list(range(300)), shuffled[:300].tolist()),
        "random": (shuffled.tolist(), shuffled[::-1].tolist()),
    }


@pytest.mark.parametrize("way", [pytest.param("submit", marks=needs_submit), "preadv"])
@pytest.mark.parametrize("order", list(orders()))
def test_records_go_where_they_should(file, monkeypatch, way, order):
    if way == "preadv":
        monkeypatch.setattr(reads, "_AVAILABLE", False)
    elif len(orders()[order][0]) > 1:
        monkeypatch.setattr(os, "preadv", None)
    check(file, *orders()[order])


@needs_submit
@pytest.mark.parametrize("failing", ["_SETUP", "_SUBMIT"])
def test_a_system_that_refuses_is_read_otherwise(file, monkeypatch, failing):
    """As in a container without these calls, and when all places of the machine are taken."""
    monkeypatch.setattr(reads, "_contexts", [])
    monkeypatch.setattr(reads, failing, 100_000)  # no such call: ENOSYS
    check(file, *orders()["random"])


@needs_submit
def test_a_file_that_became_shorter_is_named(file):
    os.truncate(file.name, 600 * SIZE + 10)
    target = memoryview(bytearray(700 * SIZE))
    with pytest.raises(OSError, match=rf"{re.escape(file.name)} ends before byte 600010"):
        read_records(file, np.arange(700), SIZE, target, np.arange(700))
    with pytest.raises(OSError, match=r"reading byte 0: Bad file"), open(file.name, "wb") as unreadable:
        read_records(unreadable, np.arange(2), SIZE, target, np.arange(2))


@pytest.mark.parametrize("places", [[0, 3], [-1, 0]])
def test_nothing_is_written_outside_the_target(file, places):
    target = memoryview(bytearray(3 * SIZE + 10))
    with pytest.raises(IndexError, match=r"room for 3 records, asked for -?\d to \d"):
        read_records(file, np.arange(2), SIZE, target, np.array(places))
    assert not any(target)


@needs_submit
def test_threads_share_what_the_kernel_gives_and_leave_nothing(file, monkeypatch):
    monkeypatch.setattr(reads, "_contexts", [])
    for _ in range(20):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: check(file, *orders()["random"]), range(8)))
    assert 1 <= len(reads._contexts) <= 4  # and not one for each of the threads


def _read_in_child(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        check(file, *orders()["random"])
        assert len(reads._contexts) == 1  # its own


@needs_submit
def test_a_forked_process_reads_too(file):
    check(file, *orders()["random"])
    process = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(file.name,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_runs_of_records():
    assert list(runs(np.array([4, 5, 6, 1, 2, 9]))) == [(4, 0, 3), (1, 3, 5), (9, 5, 6)]
    assert [last - first for _, first, last in runs(np.arange(2500))] == [1024, 1024, 452]  # IOV_MAX


def test_the_layout_of_the_kernel():
    """linux/aio_abi.h: 64 and 32 bytes, and where the fields are."""
    assert reads._READ.itemsize == 64 and reads._EVENT.itemsize == 32
    offsets = {name: reads._READ.fields[name][1] for name in ("opcode", "file", "address", "bytes", "offset")}
    assert offsets == {"opcode": 16, "file": 20, "address": 24, "bytes": 32, "offset": 40}
