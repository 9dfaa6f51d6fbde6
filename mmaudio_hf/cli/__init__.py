"""The command line, and the only place where the components are put together: parse, build, connect, run.

Recipes are read and checked before anything heavy is imported, so a typing error costs a fraction of a second.
"""

import argparse
import contextlib
import errno
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from mmaudio_hf.cli import generation, hub, media, store, training
from mmaudio_hf.schema import RunError

COMMANDS = (  # in the order of --help
    *(training.add_example_command, media.add_audit_commands, media.add_commands, store.add_commands),
    *(training.add_commands, training.add_run_commands, hub.add_commands, generation.add_commands),
    *(generation.add_evaluation_commands, hub.add_weight_commands, training.add_bench_commands),
)

EXAMPLES = {  # command -> arguments, for its --help
    "audit": "recipes/example.yaml",
    "bench": "loader --rows 500",
    "bench curation": "--seeds 0 --json",
    "bench durations": "--rounds 3 --json",
    "bench extract": "--rounds 1",
    "bench generate": "--variant small_16k --batch-size 1 --sampling-only",
    "bench finetune": "--methods full_replay lora_replay --rounds 3 --json",
    "bench loader": "--store output/example-features/video_train --batch-size 16",
    "bench remote": "--rows 300 --rounds 1 --json",
    "bench scaling": "--variant small_16k --batch-size 1",
    "bench scores": "--rounds 1 --json",
    "bench step": "--variant small_16k --batch-size 1 --precision fp32",
    "demo": "output/example --port 7860",
    "doctor": "recipes/small_16k.yaml --processes 2",
    "ema": "output/example --sigma-rel 0.1 --out output/example-0.1",
    "evaluate": "output/example output/other --split test",
    "example": "--short",
    "example-media": "output/example-media --small",
    "export": "output/small_16k --out output/reference",
    "extract-audio": "recipes/example.yaml",
    "extract-video": "recipes/example.yaml extraction.num_proc=2",
    "generate": "--run output/example --video in.mp4 --prompt 'a bouncing ball' --out out.mp4",
    "import": "ckpt_last.pth --recipe recipes/small_16k.yaml --run output/imported",
    "prepare": "folder my_clips --out data/sets --share val=0.1",
    "partition": "recipes/example.yaml",
    "pull": "owner/name --to output/name",
    "push": "output/example owner/name --dry-run",
    "replay-step": "output/example 200",
    "report": "--run output/example --events output/example-media/events.json",
    "store": "inspect output/example-features/video_train",
    "store audit": "output/example-features/video_train --ok-ids ok.txt",
    "store convert": "output/example-features/video_train output/compact --layout compact",
    "store inspect": "output/example-features/video_train",
    "store merge": "output/a output/b --out output/both",
    "store pull": "owner/name output/features/train",
    "store push": "output/example-features/video_train owner/name --dry-run",
    "store subset": "output/example-features/video_train output/balls --match ball",
    "store verify": "output/example-features/video_train",
    "train": "recipes/example.yaml training.steps=100",
    "verify": "output/example-features/video_train --sample 20 --media output/example-media/videos",
    "weights": "list",
    "weights av-bench": "--env av-bench-env",
    "weights convert": "ext_weights/mmaudio_small_16k.pth output/small_16k",
    "weights download": "--for recipes/small_16k.yaml",
    "weights list": "--dir ext_weights",
    "weights verify": "--dir ext_weights",
}


# Errors of the system: what to do about them, and the code, 2 where another path or permission is the way out.
WAYS_OUT = {
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), ("name a folder", 2)),
    **dict.fromkeys((errno.EACCES, errno.EPERM), ("change its permissions, or name another path", 2)),
    errno.EROFS: ("name a path on another disk", 2),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ("free some space and run the same command again", 1)),
    errno.EISDIR: ("name a file", 2),
    errno.ENAMETOOLONG: ("choose a shorter name", 2),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mmaudio-hf`; returns the exit code.

    A user's mistake ends with one sentence on stderr and code 2; a fault of the machine or the data with code 1; signal
    n with code 128 + n: Ctrl-C 130. Where the reader of the output is gone (`| head -1`) it is 141, without a word.
    """
    while (unused := os.open(os.devnull, os.O_RDWR)) <= 2:  # a file must not get the number of a closed stderr, on
        pass  # which libraries print
    os.close(unused)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    try:
        try:
            return _run(arguments)
        finally:  # of --help too
            sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:
            _print_error(f"stdout: {error.strerror}", 1)
        for descriptor in (1, 2) if error.errno == errno.EPIPE else (1,):  # what they still hold goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        return 128 + signal.SIGPIPE if error.errno == errno.EPIPE else 1


def _run(arguments: Sequence[str] | None) -> int:
    options, ended_by = parse(arguments), [int(signal.SIGINT)]
    # Left at once, for the process that is killed and cannot say anything; any other end replaces it.
    training.leave_for_launcher("killed, perhaps for want of memory: the same command continues from what is saved")
    try:
        # Processes that wait for each other do so in C code, where no handler runs: the system ends them.
        alone = "WORLD_SIZE" not in os.environ and options.command is not training._train
        with _interrupting(*(signal.SIGTERM, signal.SIGHUP) * alone, last=ended_by):
            return options.command(options) or 0
    except ValueError as error:
        way = ": does this shell have a locale without UTF-8? set PYTHONUTF8=1" * isinstance(error, UnicodeEncodeError)
        return _print_error(f"{error}{way}", 2)
    except OSError as error:
        poll = select.poll()
        for descriptor in (1, 2):
            poll.register(descriptor, 0)
        if error.errno == errno.EPIPE and any(event & select.POLLERR for _, event in poll.poll(0)):
            raise  # nobody reads stdout or stderr; else it is a connection of the command
        return _print_error(*_system_error(error))
    except RunError as error:
        return _print_error(str(error), 1)
    except KeyboardInterrupt as interrupt:
        way, [number] = str(interrupt) or "run the same command again", ended_by
        what = "interrupted" if number == signal.SIGINT else f"interrupted by {signal.Signals(number).name}"
        with contextlib.suppress(OSError):  # of a terminal that was closed
            print(message := f"{what}: {way}", file=sys.stderr)
        training.leave_for_launcher(message)
        return 128 + number
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mmaudio_hf"):
            raise
        return _print_error(f"{error.name} is not installed for {sys.executable}: activate .venv, `pip install .`", 2)
    except Exception as error:  # a fault of ours: its traceback is wanted, and the launcher's is not
        # What a full disk is to safetensors, which is not imported for every command.
        if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):
            return _print_error(f"tensors could not be written: {error}", 1)
        training.leave_for_launcher(f"{type(error).__name__}: {error}")
        raise


@contextlib.contextmanager
def _interrupting(*numbers: int, last: list[int]) -> Iterator[None]:
    """Signals that interrupt as Ctrl-C does, so that nothing is left half-written, unless they are ignored (nohup)."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        last[:] = [number]
        raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    handled = [number for number in numbers if ours and signal.getsignal(number) is signal.SIG_DFL]
    with contextlib.ExitStack() as stack:
        for number in handled:
            stack.callback(signal.signal, number, signal.signal(number, interrupt))
        yield


def _system_error(error: OSError) -> tuple[str, int]:
    """Message and exit code of an error of the system."""
    way, code = WAYS_OUT.get(error.errno or 0, ("", 1))
    if not way:
        return str(error), code
    path, reason = Path(os.fsdecode(error.filename or "")), str(error.strerror)
    path = path.parent if path.name.startswith(".") else path  # of a file that is written aside
    if error.errno in (errno.EEXIST, errno.ENOTDIR):  # the system names what is wanted, and not what is in its way
        file = next((each for each in (path, *path.parents) if each.is_file()), path)
        return f"{file} is a file: name a folder", code
    reason += f": {way}" * ("; " not in reason)  # others have said what to do
    return f"{path}: {reason}" if error.filename else reason, code


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run `train.py RECIPE [key=value ...] [--dry-run]`."""
    return main(["train", *(sys.argv[1:] if arguments is None else arguments)])


def _print_error(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    training.leave_for_launcher(f"error: {message}")
    return code


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; overrides may stand before and after options, which argparse alone does not take."""
    parser = _build_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        setting = re.match(r"--?([a-z_]+(\.\w+)*=.*)", unknown[0]) if hasattr(options, "overrides") else None
        hint = f"; a setting has no dashes: {setting[1]}" if setting else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _path(text: str) -> Path:
    """A path with `~` and variables, which a shell leaves in --out=~/x; "" would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a path must not be empty")
    return Path(os.path.expandvars(text)).expanduser()


def _expand_paths(parser: argparse.ArgumentParser) -> None:
    """Let the options of all commands that are paths be read by `_path`."""
    for action in parser._actions:
        action.type = _path if action.type is Path else action.type
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _expand_paths(command)


class _Parser(argparse.ArgumentParser):
    """A parser whose --help ends with the example of its command."""

    def format_help(self) -> str:
        """The usual help and the example, which is not wrapped: it is there to be copied."""
        command = self.prog.removeprefix("mmaudio-hf").strip()
        arguments = f"{command} {EXAMPLES[command]}" if command else "example --short"
        return f"{super().format_help()}\nexample: mmaudio-hf {arguments}\n"


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mmaudio-hf", description="Train MMAudio: from media to a published model.")
    with contextlib.suppress(PackageNotFoundError):  # where it is found by PYTHONPATH alone
        parser.add_argument("--version", action="version", version=f"mmaudio-hf {version('mmaudio-hf')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_commands in COMMANDS:
        add_commands(hub.adder(commands))
    _expand_paths(parser)
    return parser
