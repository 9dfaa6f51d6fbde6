"""A page to try a trained model: a video and/or a text in, audio out, as a player and a spectrogram. Needs `[demo]`.

Everything the page shows comes from this process, so it works offline. One request runs at a time; uploads and results
lie in a temporary folder that is removed with the process.
"""

import contextlib
import errno
import math
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from mmaudio_hf.config import load_recipe
from mmaudio_hf.generation.pipeline import RECIPE_FILE, Generated, MMAudioPipeline, Request, save_with_note
from mmaudio_hf.media.container import MediaError, probe
from mmaudio_hf.media.lists import find_video, read_media_list
from mmaudio_hf.media.video import video_seconds
from mmaudio_hf.pages import data_uri, decibels, render, spectrogram_image

MAX_VIDEO_SECONDS = 600.0  # of an upload; the audio is shorter
MAX_FRAME_SIZE = 4096, 2304  # pixels; what counts is their product
MIN_SECONDS, MAX_SECONDS = 0.7, 30.0  # of audio
MAX_EXAMPLES = 6
KEEP_SECONDS = 3600  # how long an upload and a result stay on disk
_MAX_SIZE = "x".join(map(str, MAX_FRAME_SIZE))
_HEIGHT = 320  # of the videos, in pixels

# Whatever a component may want from elsewhere, the browser does not fetch it.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_STYLE = """
footer, button[aria-label="Trim video to selection"] { display: none !important; }
.spectrogram { margin: 24px 0 0; }
.spectrogram img { display: block; width: 100%; height: 150px; border-radius: 4px; }
.spectrogram .seconds { display: flex; justify-content: space-between; font-size: .75rem; opacity: .7; }
"""


def serve(
    run: str | os.PathLike,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload_mb: float = 200,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> None:
    """Show the page of a run folder or Hub id at `host` until Ctrl-C or SIGTERM; `log` gets its address.

    Another port is chosen when `port` is taken. ValueError for a RUN without weights, or a host that is not this one.
    """
    if max_upload_mb <= 0:
        raise ValueError(f"--max-upload-mb must be more than 0, not {max_upload_mb:g}")
    pipeline = MMAudioPipeline.from_pretrained(run, device=device)
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
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=_STYLE,
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
        server = uvicorn.Server(config)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def build_page(
    pipeline: MMAudioPipeline, run: str | os.PathLike, out_dir: Path, max_upload_mb: float = 200
) -> gr.Blocks:
    """The page of a pipeline. `run` gives the title and, by its recipe, examples; results are written to `out_dir`."""
    trained = pipeline.model.config.duration
    longest = max(MAX_SECONDS, trained)
    name = Path(run).resolve().name if Path(run).is_dir() else str(run)
    with gr.Blocks(title=f"{name}: demo", analytics_enabled=False, delete_cache=(60, KEEP_SECONDS)) as page:
        limits = f"{max_upload_mb:g} MB, {MAX_VIDEO_SECONDS / 60:g} minutes and {_MAX_SIZE} pixels"
        gr.Markdown(f"# {name}\nGenerates audio for a video, a text, or both. Videos: up to {limits}.")
        with gr.Row():
            with gr.Column():
                video = gr.Video(label="Video", sources=["upload"], height=_HEIGHT)
                prompt = gr.Textbox(label="Prompt", placeholder="what should be heard")
                negative = gr.Textbox(label="Negative prompt", placeholder="what should not be heard")
                with gr.Row():
                    duration = gr.Slider(MIN_SECONDS, longest, trained, step=0.1, label="Seconds", min_width=220)
                    steps = gr.Slider(1, 100, 25, step=1, label="Steps", min_width=220)
                with gr.Row():
                    guidance = gr.Slider(0, 10, 4.5, step=0.1, label="Guidance", min_width=220)
                    seed = gr.Slider(0, 9999, 0, step=1, label="Seed", min_width=220)
                button = gr.Button("Generate", variant="primary")
            with gr.Column():
                video_out = gr.Video(label="Video with generated audio", interactive=False, height=_HEIGHT)
                audio_out = gr.Audio(label="Audio", interactive=False, buttons=["download"])
                image_out = gr.HTML(label="Spectrogram", show_label=True, container=True, visible=False)
        if examples := _examples(run):
            gr.Examples(examples, [video, prompt], examples_per_page=MAX_EXAMPLES)
        video.change(lambda path: _usable_seconds(path, longest), video, duration, api_name="check_video")
        button.click(
            lambda *values: _generate(pipeline, out_dir, *values),
            [video, prompt, negative, duration, steps, guidance, seed],
            [video_out, audio_out, image_out],
            concurrency_limit=1,
            api_name="generate",
        )
    return page


@contextlib.contextmanager
def _gradio_errors(path: str | None) -> Iterator[None]:
    """A ValueError becomes a message on the page, with the file's name in place of its path on this machine."""
    try:
        yield
    except ValueError as error:
        text = str(error) if path is None else str(error).replace(str(path), Path(path).name)
        raise gr.Error(escape(text), duration=None, print_exception=False) from None


def _usable_seconds(path: str | None, longest: float) -> Any:
    """Seconds of audio to propose for a video: its length, at most `longest`. gr.Error for what cannot be used."""
    with _gradio_errors(path):
        return gr.skip() if path is None else min(longest, _check_video(path))


def _check_video(path: str) -> float:
    """Length of a video in s, down to a tenth; ValueError for a file without frames, or beyond the limits."""
    stream = probe(path).get("video")
    if stream is None:
        raise ValueError(f"{path} has no video frames: give a video, or only a prompt")
    width, height = stream["width"], stream["height"]
    if width * height > math.prod(MAX_FRAME_SIZE):
        raise ValueError(f"{path} has frames of {width}x{height}, the limit is {_MAX_SIZE}: scale it down")
    seconds = video_seconds(path)
    if seconds > MAX_VIDEO_SECONDS:
        raise ValueError(f"{path} is {seconds:.0f} s long, the limit is {MAX_VIDEO_SECONDS:.0f} s: cut it")
    return int(10 * seconds) / 10


def _generate(
    pipeline: MMAudioPipeline,
    out_dir: Path,
    video: str | None,
    prompt: str,
    negative: str,
    duration: float,
    steps: float,
    guidance: float,
    seed: float,
) -> tuple[Any, str, Any]:
    """What the page shows: the video with generated audio, the audio, and its spectrogram."""
    with _gradio_errors(video):
        if video is None and not prompt.strip():
            raise ValueError("Nothing to generate from: choose a video, write a prompt, or both")
        if video is not None:
            _check_video(video)
        result = pipeline(
            video,
            prompt.strip(),
            negative.strip(),
            duration=duration,
            num_steps=int(steps),
            guidance_scale=guidance,
            seed=int(seed),
            progress=False,
        )
        # One request runs at a time, and gradio has copied the results of the one before.
        shutil.rmtree(out_dir, ignore_errors=True)
        out_dir.mkdir(parents=True)
        audio_file, video_file = out_dir / "audio.wav", None if video is None else out_dir / "video.mp4"
        notes = [result.note, save_with_note(result, audio_file)]
        if video_file is not None:
            notes.append(save_with_note(result, video_file, video))
    image = _spectrogram(result, [note for note in notes if note])
    return gr.update(value=video_file, visible=video is not None), str(audio_file), gr.update(value=image, visible=True)


def _spectrogram(result: Generated, notes: list[str]) -> str:
    """Mel spectrogram of a result as HTML, with the seconds and notes below."""
    level = decibels(result.waveform, result.sample_rate)
    image = data_uri("image/png", spectrogram_image(level, float(level.max())))
    seconds = len(result.waveform) / result.sample_rate
    return render("demo_spectrogram.html.jinja", image=image, seconds=seconds, notes=notes)


def _examples(run: str | os.PathLike) -> list[list[str]]:
    """[path, caption] of the first test videos of a run that are still where its recipe has them."""
    recipe_file = Path(run) / RECIPE_FILE
    if not recipe_file.is_file():
        return []
    recipe = load_recipe(recipe_file)
    test_stores = {Path(store.path).name for store in recipe.data.test}
    examples = []
    for source in recipe.extraction.videos:
        if source.name in test_stores and Path(source.list).is_file():
            for item in read_media_list(source.list):
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
