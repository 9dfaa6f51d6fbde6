"""Many positional reads by one system call.

`os.preadv` gives up the interpreter lock and takes it again for every record, and threads that do so every few
microseconds wait for each other more than for memory. `io_submit` of Linux (man 2 io_submit) takes a list of reads;
of files in the page cache it makes them one after the other before it returns. Where it cannot be had (another system
or processor, a container that forbids it, no room in fs.aio-max-nr), and where a read falls short, `preadv` does the
same and says what is wrong.
"""

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

_MAX_BUFFERS = 1024  # IOV_MAX of Linux: buffers of one preadv
_MAX_READS = 256  # of one io_submit; a machine has 65,536 for all processes (fs.aio-max-nr)

# struct iocb and struct io_event of linux/aio_abi.h, little-endian
_READ = np.dtype(
    [
        *(("data", "u8"), ("key", "u4"), ("rw_flags", "u4"), ("opcode", "u2"), ("priority", "i2"), ("file", "u4")),
        *(("address", "u8"), ("bytes", "u8"), ("offset", "i8"), ("reserved", "u8"), ("flags", "u4"), ("eventfd", "u4")),
    ]
)
_EVENT = np.dtype([("data", "u8"), ("read", "u8"), ("result", "i8"), ("result2", "i8")])
_SETUP, _EVENTS, _SUBMIT = 206, 208, 209  # numbers of the calls on x86-64
_AVAILABLE = sys.platform == "linux" and platform.machine() == "x86_64"


def read_records(file: BinaryIO, records: np.ndarray, size: int, target: memoryview, places: np.ndarray) -> None:
    """Put record `records[i]` of `size` bytes of an unbuffered file at record `places[i]` of `target`.

    Releases the interpreter lock. OSError naming the file when bytes are missing or cannot be read; IndexError for a
    place outside `target`.
    """
    if len(places) and (places.min() < 0 or (places.max() + 1) * size > len(target)):
        raise IndexError(f"there is room for {len(target) // size} records, asked for {places.min()} to {places.max()}")
    if _AVAILABLE and len(records) > 1:
        address = np.frombuffer(target, np.uint8).ctypes.data
        offsets, addresses = records * size, address + places * size
        for first in range(0, len(records), _MAX_READS):
            part = slice(first, first + _MAX_READS)
            if not _submit(file.fileno(), offsets[part], addresses[part], size):
                break
        else:
            return
    _read_one_by_one(file, records, size, target, places)


def _read_one_by_one(file: BinaryIO, records: np.ndarray, size: int, target: memoryview, places: np.ndarray) -> None:
    """`read_records` by preadv; records that follow each other in the file are one call, wherever they go."""
    parts = [target[place : place + size] for place in (places * size).tolist()]
    for record, first, last in runs(records):
        read_at(file, record * size, parts[first:last])


def runs(records: np.ndarray) -> Iterable[tuple[int, int, int]]:
    """What follows each other in at least one record: (record, first, last), where records[first:last] are a run.

    None is longer than what one preadv reads.
    """
    apart = records[1:] != records[:-1] + 1
    apart[_MAX_BUFFERS - 1 :: _MAX_BUFFERS] = True
    firsts = [0, *(np.flatnonzero(apart) + 1).tolist()]
    return zip(records[firsts].tolist(), firsts, [*firsts[1:], len(records)], strict=True)


def read_at(file: BinaryIO, offset: int, parts: list[memoryview]) -> None:
    """Fill `parts` one after the other from byte `offset` on. OSError naming the file when bytes are missing."""
    while parts:
        try:
            count = os.preadv(file.fileno(), parts, offset)
        except OSError as error:
            raise OSError(error.errno, f"reading byte {offset}: {error.strerror}", str(file.name)) from error
        if count == 0:
            raise OSError(f"{file.name} ends before byte {offset}: it became shorter since the store was opened")
        offset += count
        while parts and count >= len(parts[0]):
            count -= len(parts[0])
            parts = parts[1:]
        if count:  # the system may deliver less than asked for
            parts = [parts[0][count:], *parts[1:]]


# --- io_submit ---------------------------------------------------------------------------------------------------


class _Context:
    """The kernel's place for reads that were submitted, and ours for what became of them. OSError: there is none."""

    def __init__(self):
        self.id = ctypes.c_long(0)
        self.events = np.zeros(_MAX_READS, _EVENT)
        _call(_SETUP, _MAX_READS, ctypes.addressof(self.id))


_contexts: list[_Context] = []  # that nobody uses: as many as threads ever read at once, kept until the process ends
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_contexts.clear)  # they belong to the parent

if _AVAILABLE:
    _syscall = ctypes.CDLL(None, use_errno=True).syscall  # releases the interpreter lock
    _syscall.restype, _syscall.argtypes = ctypes.c_long, [ctypes.c_long] * 6


def _call(number: int, *arguments: int) -> int:
    """The result of a system call; OSError with its number otherwise."""
    result = _syscall(number, *arguments, *[0] * (5 - len(arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), "system call failed")
    return result


def _submit(file: int, offsets: np.ndarray, addresses: np.ndarray, size: int) -> bool:
    """Read `size` bytes from each offset to each address, at most `_MAX_READS`; whether all of it was read."""
    try:
        context = _contexts.pop() if _contexts else _Context()
    except (OSError, IndexError):  # IndexError: another thread was quicker
        return False
    count, submitted = len(offsets), 0
    reads = np.zeros(count, _READ)  # opcode 0 is a read
    reads["file"], reads["address"], reads["bytes"], reads["offset"] = file, addresses, size, offsets
    pointers = reads.ctypes.data + _READ.itemsize * np.arange(count)
    try:
        submitted = _call(_SUBMIT, context.id.value, count, pointers.ctypes.data)
    except OSError:
        return False
    finally:
        _wait(context, submitted)  # nothing is written to these addresses after we return
        _contexts.append(context)
    return submitted == count and bool((context.events["result"][:count] == size).all())


def _wait(context: _Context, count: int) -> None:
    """Until so many reads are done; their events are in `context`."""
    done = 0
    while done < count:
        left, room = count - done, context.events[done:].ctypes.data
        try:
            done += _call(_EVENTS, context.id.value, left, left, room)
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
