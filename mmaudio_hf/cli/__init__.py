"""The command line, and the only place where the components are put together: parse, build, connect, run.

Recipes are read and checked before anything heavy is imported, so a typing error costs a fraction of a second.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from mmaudio_hf.cli import generation, hub, media, store, training, weights
from mmaudio_hf.schema import RunError

COMMANDS = (  # in the order of --help
    *(media.add_audit_commands, media.add_commands, store.add_commands, training.add_commands),
    *(training.add_run_commands, hub.add_commands, generation.add_commands, generation.add_evaluation_commands),
    *(weights.add_commands, training.add_bench_commands),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mmaudio-hf`; returns the exit code.

    A user's mistake ends with one sentence on stderr and code 2; a fault of the machine or the data with code 1;
    Ctrl-C with code 130.
    """
    options = parse(arguments)
    try:
        return options.command(options) or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}" if interrupt.args else "interrupted", file=sys.stderr)
        return 130


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run `train.py RECIPE [key=value ...] [--dry-run]`."""
    return main(["train", *(sys.argv[1:] if arguments is None else arguments)])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; overrides may stand before and after options, which argparse alone does not take."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmaudio-hf", description="Train MMAudio: from media to a published model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, function: Callable[[argparse.Namespace], int | None], help_text: str, recipe: bool = False
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(command=function)
        if recipe:
            command.add_argument("recipe", metavar="RECIPE", help="recipe file, as recipes/example.yaml")
            command.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
        return command

    for add_commands in COMMANDS:
        add_commands(add)
    return parser
