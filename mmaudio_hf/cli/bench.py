"""`mmaudio-hf bench`: what takes how long, against what the machine can do."""

import argparse
import json
from pathlib import Path


def add_commands(add) -> None:
    """Add it by `add(name, function, help, recipe=False)`, which returns the parser of one command."""
    parser = add("bench", None, "measure a part against what the machine can do")
    parts = parser.add_subparsers(required=True, metavar="PART")

    def part(name, function, help_text):
        command = parts.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(command=lambda options: _show(function(options), options.json))
        command.add_argument("--rounds", type=_count, default=3, help="repetitions; the median counts (default 3)")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        return command

    step = part("step", _step, "training steps against a matrix product, what the loop adds, and checkpoints")
    step.add_argument("--variant", default="small_16k", help="network (default small_16k)")
    step.add_argument("--batch-size", type=_count, default=4, help="samples (default 4)")
    step.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both", help="default both")
    step.add_argument(
        "--checkpoint", action=argparse.BooleanOptionalAction, default=True, help="save some to a temporary folder"
    )
    scaling = part("scaling", _scaling, "two processes with one thread each against one: weak scaling")
    scaling.add_argument("--variant", default="small_16k", help="network (default small_16k)")
    scaling.add_argument("--batch-size", type=_count, default=4, help="samples per process (default 4)")
    scaling.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    extract = part("extract", _extract, "decoding and encoders")
    extract.add_argument("--video", type=Path, help="video to read (default: one of 720p is made)")
    generate = part("generate", _generate, "guided sampling against two forwards per step, and the other stages")
    generate.add_argument("--variant", default="small_16k", help="network (default small_16k)")
    generate.add_argument("--batch-size", type=_count, nargs="+", default=[1, 8], help="clips at once (default 1 8)")
    generate.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both", help="default both")
    generate.add_argument("--sampling-only", action="store_true", help="leave out reading, encoders, decoders, writing")
    loader = part("loader", _loader, "batches from feature stores against a DataLoader and memcpy")
    loader.add_argument("--store", type=Path, nargs="+", default=[], help="feature stores to read (default: made)")
    loader.add_argument("--rows", type=int, default=2000, help="rows of stores that are made (default 2000, 2 GB)")
    loader.add_argument("--batch-size", type=_count, default=64, help="samples (default 64)")
    loader.add_argument("--audio-share", type=float, help="rows without video (default: as in the published mix, 0.3)")
    loader.add_argument("--threads", type=int, default=4, help="data.read_threads (default 4)")
    loader.add_argument("--sweep", action="store_true", help="also 1,000 to 1,000,000 rows, in files of holes")


def _count(text: str) -> int:
    """A whole number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _step(options) -> dict:
    from mmaudio_hf.bench.checkpoint import checkpoint
    from mmaudio_hf.bench.step import step
    from mmaudio_hf.config import variant_config

    config = variant_config(options.variant)
    precisions = ("fp32", "bf16") if options.precision == "both" else (options.precision,)
    figures = step(config, options.batch_size, options.rounds, precisions)
    if options.checkpoint:
        figures |= checkpoint(config, options.rounds)
        stall, seconds = figures["checkpoint_stall_seconds"], figures[f"{precisions[0]}_step_seconds"]
        figures["checkpoint_stall_in_steps"] = stall / seconds
    return figures


def _scaling(options) -> dict:
    from mmaudio_hf.bench.scaling import scaling
    from mmaudio_hf.config import variant_config

    precision = "bf16" if options.precision == "bf16" else "no"
    return scaling(variant_config(options.variant), options.batch_size, options.rounds, precision)


def _extract(options) -> dict:
    from mmaudio_hf.bench.extract import extract

    return extract(options.video, options.rounds)


def _generate(options) -> dict:
    from mmaudio_hf.bench.generate import generate

    precisions = ("fp32", "bf16") if options.precision == "both" else (options.precision,)
    return generate(options.variant, options.rounds, precisions, options.batch_size, not options.sampling_only)


def _loader(options) -> dict:
    from mmaudio_hf.bench.loader import AUDIO_SHARE, loader

    share = AUDIO_SHARE if options.audio_share is None else options.audio_share
    return loader(
        options.store, options.rows, options.batch_size, share, options.rounds, options.threads, sweep=options.sweep
    )


def _show(figures: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:36} {value:.4g}" if isinstance(value, float) else f"{name:36} {value}")
