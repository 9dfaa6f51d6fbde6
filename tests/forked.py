"""`mmaudio-hf` in processes of its own that start within milliseconds: forked from one that has imported everything."""

import ctypes
import importlib
import itertools
import multiprocessing
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from huggingface_hub import constants
from torch.distributed import TCPStore

from mmaudio_hf.cli import main

IMPORTED = (
    *("mmaudio_hf.training.loop", "mmaudio_hf.features.extract", "mmaudio_hf.evaluation.run"),
    *("mmaudio_hf.generation.files", "mmaudio_hf.hub.stores", "torch._dynamo"),
)


PATIENCE = 600  # s: nothing takes that long, on no machine; what waits longer waits in vain


class Command:
    """A command that runs, with the names of `subprocess.Popen`; as a context, it does not outlive its block.

    words: of `mmaudio-hf`, or a function or Python program and its arguments. With `freeze`, a function and a number,
    that call of the function does not begin before a signal comes: a process is where a test wants it, however slow the
    machine is. With `own_mounts` it may mount file systems, which no other process sees: small disks that fill up.
    """

    def __init__(
        self,
        *words: str | Callable,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        freeze: tuple[str, int] | None = None,
        own_mounts: bool = False,
    ):
        if own_mounts and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
            pytest.skip("this system does not let a test mount a small disk: `unshare -rm` is refused")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED, __name__])
        self.words, self._logs = words, tempfile.TemporaryDirectory()
        self._paths = [Path(self._logs.name) / name for name in ("stdout", "stderr")]
        arguments = (words, cwd or Path.cwd(), dict(env or os.environ), self._paths, freeze, own_mounts)
        self._process = context.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def poll(self) -> int | None:
        """Exit code as `subprocess` has it, None while it runs."""
        return self._process.exitcode

    returncode = property(poll)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        self._process.join(timeout)
        assert self.poll() is not None, f"it still runs: {self.output()}"
        return self.poll()

    def output(self) -> tuple[str, str]:
        """What it has printed to stdout and stderr so far."""
        return tuple(path.read_text() if path.exists() else "" for path in self._paths)

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        self.wait(timeout)
        return self.output()

    def result(self) -> CompletedProcess:
        """Wait for its end, however it ends."""
        with self:
            return CompletedProcess(self.words, self.wait(), *self.output())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.join()
        self._logs.cleanup()


def wait_until(condition: Callable[[], object], process: "subprocess.Popen | Command | None" = None) -> None:
    """Wait for a moment, perhaps one in the life of a process, which must not end before."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if process is not None and process.poll() is not None:
            assert condition(), process.communicate()
            return
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def resize_disk(folder: Path, size: str | int) -> None:
    """In a process with `own_mounts`: mount a file system of this size there, or change that of the one mounted."""
    change = "remount," * os.path.ismount(folder)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{change}size={size}", "tmpfs", str(folder)], check=True)


def fill_disk(folder: Path, free: int) -> None:
    """Leave so many bytes of a file system, by a file in `folder`, `filler`."""
    filler = os.open(folder / "filler", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    disk = os.statvfs(folder)
    os.posix_fallocate(filler, 0, disk.f_bavail * disk.f_frsize - free or 1)
    os.close(filler)


@contextmanager
def together(processes: int, *words: str | Callable, cwd: Path, env: Mapping[str, str]) -> Iterator[list[Command]]:
    """Processes of one run that find each other as torch's launcher has it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "ACCELERATE_USE_CPU": "true"}
    ranks = [{name: str(rank) for name in ("RANK", "LOCAL_RANK")} for rank in range(processes)]
    with ExitStack() as stack:
        yield [stack.enter_context(Command(*words, cwd=cwd, env=env | shared | rank)) for rank in ranks]


def run_together(processes: int, *words: str | Callable, cwd: Path, env: Mapping[str, str]) -> CompletedProcess:
    """The same until they end; the code is the first that is not 0."""
    with together(processes, *words, cwd=cwd, env=env) as group:
        codes = [process.wait() for process in group]
        texts = ["".join(stream) for stream in zip(*(process.output() for process in group), strict=True)]
    return CompletedProcess(words, next(filter(None, codes), 0), *texts)


def _run(
    words: tuple[str | Callable, ...],
    cwd: Path,
    env: dict[str, str],
    outputs: list[Path],
    freeze: tuple[str, int] | None,
    own_mounts: bool,
) -> None:
    multiprocessing.current_process().daemon = False  # it may have workers of its own
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.setsid()  # a group of its own: signals of a terminal go to its workers too
    os.chdir(cwd)
    os.environ.clear()  # what others had when the first process was forked
    os.environ |= env
    importlib.reload(constants)  # the Hub and the cache that the variables name
    torch.set_num_threads(1)
    if own_mounts:
        _own_mounts()
    if freeze:
        _freeze(*freeze)
    if callable(words[0]):
        sys.exit(words[0](*words[1:]))
    if words[0].endswith(".py"):
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
        sys.exit()
    sys.exit(main(words))


def _own_mounts() -> None:
    """What `unshare --map-root-user --mount` does, in this process, which has one thread."""
    maps = {"uid_map": f"0 {os.getuid()} 1", "setgroups": "deny", "gid_map": f"0 {os.getgid()} 1"}
    namespaces = 0x10000000 | 0x00020000  # CLONE_NEWUSER, CLONE_NEWNS: os.unshare is of Python 3.12
    assert ctypes.CDLL(None, use_errno=True).unshare(namespaces) == 0, os.strerror(ctypes.get_errno())
    for name, text in maps.items():
        Path("/proc/self", name).write_text(text)


def _freeze(target: str, call: int) -> None:
    owner, _, name = target.rpartition(".")
    owner, calls = pkgutil.resolve_name(owner), itertools.count(1)
    function = getattr(owner, name)

    def frozen(*arguments, **keywords):
        if next(calls) == call:
            time.sleep(PATIENCE)
        return function(*arguments, **keywords)

    setattr(owner, name, frozen)
