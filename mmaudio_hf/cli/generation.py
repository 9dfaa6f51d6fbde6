"""Commands that generate sound and look at it."""

import contextlib
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from mmaudio_hf.cli.data import share_of_process

SUMMARY_NAMES = {
    "onset_f1": "f1_right",
    "onset_f1_shuffled": "f1_shuffled",
    "steps_per_second": "steps_per_s",
    "peak_memory_gb": "peak_mem_gb",
}

ENDINGS = ("mp4", "mkv", "wav", "flac")  # of results


def add_commands(add) -> None:
    """Add them by `add(name, function, help, recipe=False)`, which returns the parser of one command."""
    generate = add("generate", _generate, "make sound for videos, still pictures and texts")
    generate.add_argument("--run", required=True, help="run folder, pretrained_model folder or Hub id")
    generate.add_argument("--video", type=Path, help="video to make sound for")
    generate.add_argument("--image", type=Path, help="still picture to make sound for")
    generate.add_argument("--folder", type=Path, help="videos and pictures to make sound for, or those of --list")
    generate.add_argument(
        "--list", type=Path, help="TSV: id, and video, image, prompt, negative_prompt, duration, seed"
    )
    generate.add_argument("--prompt", default="", help="what is to be heard")
    generate.add_argument("--negative-prompt", default="", help="what is not to be heard")
    generate.add_argument(
        "--out", required=True, type=Path, help="result: .wav, .flac, or .mp4 or .mkv with --video; of many, a folder"
    )
    generate.add_argument(
        "--format", choices=("mp4", "mkv", "wav", "flac"), default="mp4", help="of many (default mp4)"
    )
    generate.add_argument("--duration", type=float, help="seconds; default: the whole video, else as trained")
    generate.add_argument("--window", type=float, help="longest piece made at once, in seconds; default: as trained")
    generate.add_argument("--steps", type=int, default=25, help="Euler steps (default 25)")
    generate.add_argument("--guidance-scale", type=float, default=4.5, help="default 4.5")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--batch-size", type=int, default=8, help="clips or windows made at once (default 8)")
    generate.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")
    generate.add_argument("--device", default="auto")
    rules = ("timestamps", "reference")
    generate.add_argument("--alignment", choices=rules, help="how pictures are read; default: as for training")
    generate.add_argument("--shard-index", type=int, metavar="I", help="make every N-th item, from the I-th (0 ...) on")
    generate.add_argument("--num-shards", type=int, metavar="N", help="number of shares the items are dealt out in")

    demo = add("demo", _demo, "a page to try a run: video and text in, sound to hear and see")
    demo.add_argument("run", metavar="RUN", help="run folder, pretrained_model folder or Hub id")
    demo.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)"
    )
    demo.add_argument("--port", type=int, default=7860, help="default 7860, or a free one when it is taken")
    demo.add_argument("--max-upload-mb", type=float, default=200, help="largest upload in MB (default 200)")
    demo.add_argument("--device", default="auto")

    report = add("report", _report, "generate the test split of a run, score it and write report/index.html")
    report.add_argument("--run", required=True, type=Path, help="run folder")
    report.add_argument("--events", type=Path, help="events.json of example media: adds onset scores")
    report.add_argument("--clips", type=int, default=6, help="clips shown on the page (default 6)")
    report.add_argument("--started", type=float, help="time in s since the epoch that `seconds` counts from")


def _generate(options) -> None:
    if options.folder is not None or options.list is not None:
        _generate_many(options)
        return
    if options.video is None and options.image is None and not options.prompt:
        raise ValueError("nothing to go by: give --video, --image, --prompt, --folder or --list")
    if options.out.suffix.lower() in (".mp4", ".mkv") and options.video is None:
        raise ValueError("--out is a video, but no --video is given: choose a .wav or .flac name")
    if options.out.suffix.lower() not in (".mp4", ".mkv", ".wav", ".flac"):
        raise ValueError(
            f"--out {options.out}: choose a name that ends with .wav or .flac, or .mp4 or .mkv for a video"
        )
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder: give the name of a file")
    media = [path for path in (options.video, options.image) if path is not None and path.exists()]
    if options.out.exists() and any(path.samefile(options.out) for path in media):
        raise ValueError(f"--out {options.out} is what sound is made for: choose another name, to keep it")
    from mmaudio_hf.generation import Request, save_and_tell
    from mmaudio_hf.generation.files import check_out_dir

    check_out_dir(options.out.parent)
    pipeline = _pipeline(options)
    pictures = {"video": options.video, "image": options.image}
    request = Request(prompt=options.prompt, negative_prompt=options.negative_prompt, **pictures)
    with contextlib.closing(pipeline.generate([request], options.batch_size, **_sampling(options))) as results:
        result = next(results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    notes = [result.note, save_and_tell(result, options.out, video=options.video)]
    seconds = len(result.waveform) / result.sample_rate
    print("; ".join([f"{options.out}: {seconds:.2f} s at {result.sample_rate} Hz", *filter(None, notes)]))


def _demo(options) -> None:
    if find_spec("gradio") is None:
        raise ValueError("the demo page needs gradio: run `pip install 'mmaudio-hf[demo]'`")
    from mmaudio_hf.demo import serve

    serve(
        options.run,
        host=options.host,
        port=options.port,
        max_upload_mb=options.max_upload_mb,
        device=options.device,
    )
    sys.stdout.flush()
    os._exit(0)  # a sound that is just being made by a thread is not waited for


def _generate_many(options) -> None:
    if options.video is not None or options.image is not None:
        raise ValueError("--video and --image are for one result: leave them out with --folder and --list")
    if options.list is not None and (options.prompt or options.negative_prompt):
        raise ValueError("with --list, texts are given in its columns prompt and negative_prompt")
    share = share_of_process(options)
    from mmaudio_hf.generation.files import check_out_dir, generate_files, read_folder, read_list

    if options.list is not None:
        entries = read_list(options.list, options.folder)
    else:
        entries = read_folder(options.folder, options.prompt, options.negative_prompt)
    check_out_dir(options.out, entries)  # before the network is loaded
    report = generate_files(
        _pipeline(options, share.local_rank),
        entries,
        options.out,
        ending=f".{options.format}",
        batch_size=options.batch_size,
        share=share,
        **_sampling(options),
    )
    print(report)
    if report.listed and report.rejected == report.listed:
        raise ValueError(f"all {report.listed} items were rejected; {report.rejects_path} says why")


def _pipeline(options, local_rank: int = 0):
    from mmaudio_hf.features.encoders import pick_device
    from mmaudio_hf.generation import MMAudioPipeline

    device, how = pick_device(options.device, local_rank), {"precision": options.precision}
    return MMAudioPipeline.from_pretrained(options.run, device=device, alignment=options.alignment, **how)


def _sampling(options) -> dict:
    return {
        "duration": options.duration,
        "window": options.window,
        "num_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
    }


def _report(options) -> None:
    from mmaudio_hf.report import report_run

    figures = report_run(options.run, events=options.events, shown=options.clips, started=options.started)
    print(f"report: {options.run / 'report' / 'index.html'}")
    if "onset_f1" in figures:
        right, shuffled = figures["onset_f1"], figures["onset_f1_shuffled"]
        print(f"onset F1 (+-100 ms): {right:.3f} with the right videos, {shuffled:.3f} with shuffled ones")
    if "val_loss_first" in figures:
        print(f"validation loss: {figures['val_loss_first']:.4f} first, {figures['val_loss_last']:.4f} last")
    if "steps_per_second" in figures:
        print(f"training: {figures['steps_per_second']:.2f} steps/s, peak memory {figures['peak_memory_gb']:.2f} GB")
    print("summary " + json.dumps({SUMMARY_NAMES.get(name, name): value for name, value in figures.items()}))
