"""A page to try a trained model: a video, an image or a text in, audio out, with its spectrogram. Needs `[demo]`.

Everything the page shows comes from this process, so it works offline. One request runs at a time; uploads and results
lie in a temporary folder that is removed with the process.
"""

import contextlib
import errno
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException

from mmaudio_hf.config import load_recipe, read_json
from mmaudio_hf.generation import RECIPE_FILE, Request, save_with_note
from mmaudio_hf.generation.pipeline import MMAudioPipeline
from mmaudio_hf.media.container import MediaError, probe
from mmaudio_hf.media.lists import find_video, read_media_list
from mmaudio_hf.media.video import video_seconds
from mmaudio_hf.models.pretrained import find_pretrained
from mmaudio_hf.pages import decibels, render, spectrogram_figure

MAX_VIDEO_SECONDS = 600.0  # of an upload; the audio is shorter
MAX_FRAME_SIZE = 4096, 2304  # pixels; what counts is their product
MIN_SECONDS, MAX_SECONDS = 0.7, 30.0  # of audio
MAX_EXAMPLES = 6
KEEP_SECONDS = 3600  # how long an upload and a result stay on disk
MAX_SEED = 9999  # of the slider, and of the seeds that are drawn
MESSAGE_SECONDS = 10  # how long an error stays on the page
_MAX_SIZE = "x".join(map(str, MAX_FRAME_SIZE))
_HEIGHT = 320  # of the videos, in pixels

# Whatever a component may want from elsewhere, the browser does not fetch it.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def serve(
    run: str | os.PathLike,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload_mb: float = 200,
    device: str = "auto",
    adapters: Mapping[str, float] | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Show the page of a run folder or Hub id at `host` until Ctrl-C or SIGTERM; `log` gets its address.

    adapters: folder or Hub id, and scale, of each that a visitor can choose. Another port is chosen when `port` is
    taken. ValueError for a RUN without weights, or a host that is not this one.
    """
    if max_upload_mb <= 0:
        raise ValueError(f"--max-upload-mb must be more than 0, not {max_upload_mb:g}")
    pipeline = MMAudioPipeline.from_pretrained(run, device=device)
    names = [Path(source).resolve().name if Path(source).is_dir() else source for source in adapters or ()]
    for name, (source, scale) in zip(names, (adapters or {}).items(), strict=True):  # two may be called "adapter"
        pipeline.load_lora_weights(source, scale, source if names.count(name) > 1 else name)
    # The generator is not consumed, so no video is opened: this checks the encoder files that a visitor may need.
    pipeline.generate([Request(video="any", prompt="any")], on_reject=lambda *_: None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder is removed in any case
    with _listen(host, port) as listener, tempfile.TemporaryDirectory(prefix="mmaudio-demo-") as folder:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "page")
        page = build_page(pipeline, run, Path(folder) / "results", max_upload_mb)
        # gradio checks that inputs were uploaded only in pages that were launched, not in mounted ones: without this,
        # a request may name any file of the machine and see its frames.
        page.has_launched = True
        # Nor may it name an address: gradio would fetch it.
        gr.processing_utils.async_ssrf_protected_download = gr.routes.secure_url_stream_response = _reject_address
        app = gr.mount_gradio_app(
            FastAPI(),
            page,
            path="/",
            footer_links=[],
            run_history=False,
            show_error=False,  # of our own bugs the page shows that there was one; the terminal has the traceback
            max_file_size=round(max_upload_mb * 2**20),
            allowed_paths=[path for path, _ in _examples(run)],
            ssr_mode=False,
            theme=_theme(),
            css=render("demo.css"),
        )
        actual = listener.getsockname()[1]
        listener.listen()  # early visitors wait in its queue instead of being turned away
        if port not in (0, actual):
            log(f"port {port} is taken")
        log(f"http://{f'[{host}]' if ':' in host else host}:{actual} shows {run}; Ctrl-C ends it")
        config = uvicorn.Config(
            app,
            headers=[("Content-Security-Policy", _POLICY)],
            # Pages keep connections open: these must not keep the server from ending, nor be logged as errors when cut.
            timeout_graceful_shutdown=1,
            log_level="critical",
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def build_page(
    pipeline: MMAudioPipeline, run: str | os.PathLike, out_dir: Path, max_upload_mb: float = 200
) -> gr.Blocks:
    """The page of a pipeline. `run` gives the title and, by its recipe, examples; results are written to `out_dir`."""
    trained = pipeline.model.config.duration
    longest = max(MAX_SECONDS, trained)
    name = Path(run).resolve().name if Path(run).is_dir() else str(run)
    with gr.Blocks(title=f"{name}: demo", analytics_enabled=False, delete_cache=(60, KEEP_SECONDS)) as page:
        limits = f"{max_upload_mb:g} MB, {MAX_VIDEO_SECONDS / 60:g} minutes and {_MAX_SIZE} pixels"
        gr.Markdown(f"# {name}\nGenerates audio for a video, an image, a text, or both. Videos: up to {limits}.")
        gr.HTML("<br>".join(map(escape, _details(pipeline, run))), elem_classes="details")
        with gr.Row():
            with gr.Column():
                with gr.Tab("Video"):
                    video = gr.Video(label="Video", sources=["upload"], height=_HEIGHT)
                with gr.Tab("Image"):
                    image = gr.Image(label="Image", sources=["upload"], height=_HEIGHT, type="filepath")
                    # As it was uploaded: what is no image becomes a message of ours.
                    image.preprocess = lambda file: file and file.path  # type: ignore
                prompt = gr.Textbox(label="Prompt", placeholder="what should be heard")
                negative = gr.Textbox(label="Negative prompt", placeholder="what should not be heard")
                with gr.Row():
                    duration = gr.Slider(MIN_SECONDS, longest, trained, step=0.1, label="Seconds", min_width=220)
                    steps = gr.Slider(1, 100, 25, step=1, label="Steps", min_width=220)
                with gr.Row():
                    guidance = gr.Slider(0, 10, 4.5, step=0.1, label="Guidance", min_width=220)
                    seed = gr.Slider(0, MAX_SEED, 0, step=1, label="Seed", min_width=220)
                random = gr.Checkbox(label="Random seed: drawn for each audio, and then shown")
                names = list(pipeline.adapters)
                chosen = gr.CheckboxGroup(names, value=names, label="Adapters", visible=bool(names))
                button = gr.Button("Generate", variant="primary")
            with gr.Column():
                video_out = gr.Video(label="Video with generated audio", interactive=False, height=_HEIGHT)
                audio_out = gr.Audio(label="Audio", interactive=False, buttons=["download"])
                image_out = gr.HTML(label="Spectrogram", show_label=True, container=True, visible=False)
        if examples := _examples(run):
            gr.Examples(examples, [video, prompt], examples_per_page=MAX_EXAMPLES)
        video.change(lambda path: _usable_seconds(path, longest), video, duration, api_name="check_video")
        scales = dict(pipeline.adapters)

        def generate(progress: gr.Progress = gr.Progress(), *values: Any) -> tuple:  # noqa: B008  # as gradio finds it
            *inputs, adapters = values
            with _gradio_errors(*inputs[:2]):
                pipeline.set_adapters(adapters, [scales[adapter] for adapter in adapters])
                return _generate(pipeline, out_dir, progress, *inputs)

        button.click(
            generate,
            [video, image, prompt, negative, duration, steps, guidance, seed, random, chosen],
            [video_out, audio_out, image_out, seed],
            concurrency_limit=1,
            api_name="generate",
        )
    return page


def _theme() -> gr.themes.Base:
    """Fonts of the system; placeholders and boxes that are seen on their background, light and dark."""
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    light, dark = "*neutral_500", "*neutral_400"
    theme.set(input_placeholder_color=light, input_placeholder_color_dark=dark)
    return theme.set(checkbox_border_color=light, checkbox_border_color_dark=dark)


def _details(pipeline: MMAudioPipeline, run: str | os.PathLike) -> list[str]:
    """Lines on the network: sizes, which weights of which step, what it was fine-tuned from, adapters."""
    lines = [pipeline.network]
    with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
        weights = read_json(find_pretrained(run) / "weights.json")
        width = "" if weights["sigma_rel"] is None else f" (sigma_rel {weights['sigma_rel']:g})"
        lines.append(f"step {weights['step']:,}, {weights['weights'].replace('ema', 'EMA')} weights{width}")
    if (recipe_file := Path(run) / RECIPE_FILE).is_file():
        settings = load_recipe(recipe_file).finetune
        kind = f"LoRA of rank {settings.lora.rank} on" if settings.lora.rank else "all weights from"
        lines += [f"fine-tuned: {kind} {settings.init_from}"] if settings.init_from else []
    adapters = ", ".join(f"{name} x {scale:g}" for name, scale in pipeline.adapters.items())
    return lines + ([f"adapters: {adapters}"] if adapters else [])


async def _reject_address(url: str, *_: Any, **__: Any) -> Any:
    raise HTTPException(403, "a request may name an upload, not an address")


@contextlib.contextmanager
def _gradio_errors(*paths: str | None) -> Iterator[None]:
    """A ValueError becomes a message on the page, with the names of files in place of their paths on this machine."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for path in filter(None, paths):
            text = text.replace(str(path), Path(path).name)
        raise gr.Error(escape(text), duration=MESSAGE_SECONDS, print_exception=False) from None


def _usable_seconds(path: str | None, longest: float) -> Any:
    """Seconds of audio to propose for a video: its length, at most `longest`. gr.Error for what cannot be used."""
    with _gradio_errors(path):
        return gr.skip() if path is None else min(longest, _check_video(path))


def _check_size(path: str, otherwise: str) -> None:
    """ValueError for a file without frames, in the words of `otherwise`, or with frames beyond the limit."""
    if (stream := probe(path).get("video")) is None:
        raise ValueError(f"{path} {otherwise}")
    width, height = stream["width"], stream["height"]
    if width * height > math.prod(MAX_FRAME_SIZE):
        raise ValueError(f"{path} has frames of {width}x{height}, the limit is {_MAX_SIZE}: scale it down")


def _check_video(path: str) -> float:
    """Length of a video in s, down to a tenth; ValueError for a file without frames, or beyond the limits."""
    _check_size(path, "has no video frames: give a video, or only a prompt")
    seconds = video_seconds(path)
    if seconds > MAX_VIDEO_SECONDS:
        raise ValueError(f"{path} is {seconds:.0f} s long, the limit is {MAX_VIDEO_SECONDS:.0f} s: cut it")
    return int(10 * seconds) / 10


def _generate(pipeline: MMAudioPipeline, out_dir: Path, progress: Callable, *inputs: Any) -> tuple[Any, str, Any, int]:
    """What the page shows: the video with generated audio, the audio, its spectrogram, the seed that was used."""
    video, image, prompt, negative, duration, steps, guidance, seed, random = inputs
    if video is None and image is None and not prompt.strip():
        raise ValueError("Nothing to generate from: choose a video or an image, write a prompt, or both")
    if video is not None and image is not None:
        raise ValueError("There is a video and an image: remove one of them")
    if video is not None:
        _check_video(video)
    if image is not None:
        _check_size(image, "is not an image")
    on_step = lambda _, step, *__: progress((step + 1, int(steps)), desc="Generating", unit="steps")  # noqa: E731
    sampling: Any = {"num_steps": int(steps), "guidance_scale": guidance, "duration": duration, "progress": False}
    sampling["seed"] = secrets.randbelow(MAX_SEED + 1) if random else int(seed)
    texts = prompt.strip(), negative.strip()
    result = pipeline(video, *texts, image=image, callback_on_step_end=on_step, **sampling)
    # One request runs at a time, and gradio has copied the results of the one before.
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    audio_file, video_file = out_dir / "audio.wav", None if video is None else out_dir / "video.mp4"
    notes = [result.note, save_with_note(result, audio_file)]
    if video_file is not None:
        notes.append(save_with_note(result, video_file, video))
    level = decibels(result.waveform, result.sample_rate)
    figure = spectrogram_figure(level, float(level.max()), result.seconds, result.sample_rate)
    image_html = render("demo_spectrogram.html.jinja", figure=figure, notes=list(filter(None, notes)))
    spectrogram = gr.update(value=image_html, visible=True)
    return gr.update(value=video_file, visible=video is not None), str(audio_file), spectrogram, result.seed or 0


def _examples(run: str | os.PathLike) -> list[list[str]]:
    """[path, caption] of the first test videos of a run that are still where its recipe has them."""
    if not (recipe_file := Path(run) / RECIPE_FILE).is_file():
        return []
    recipe, examples = load_recipe(recipe_file), []
    test_stores = {Path(store.path).name for store in recipe.data.test}
    sources = [source for source in recipe.extraction.videos if source.name in test_stores]
    for source in sources:
        for item in read_media_list(source.list) if Path(source.list).is_file() else ():
            with contextlib.suppress(MediaError, ValueError):
                examples.append([str(find_video(source.media_dir, item.id).absolute()), item.caption])
            if len(examples) == MAX_EXAMPLES:
                return examples
    return examples


def _listen(host: str, port: int) -> socket.socket:
    """A socket at `host` and `port`, or at a port of the system's choice when that one is taken; ValueError."""
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            listener.bind((host, 0))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: {error}") from None
    return listener
