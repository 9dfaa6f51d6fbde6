"""A page to try a trained network: a video and/or a text in, its sound to hear and see. Needs the extra `demo`.

Everything the page shows comes from this process, so it works without a network. One sound is made at a time; what is
uploaded and made lies in a temporary folder that goes away with the process.
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

import gradio as gr
import uvicorn
from fastapi import FastAPI

from mmaudio_hf.config import load_recipe
from mmaudio_hf.generation.pipeline import RECIPE_FILE, Generated, MMAudioPipeline, Request, save_and_tell
from mmaudio_hf.media.lists import find_video, read_media_list
from mmaudio_hf.media.video import probe, video_seconds
from mmaudio_hf.pages.plots import data_uri, decibels, spectrogram_image

MAX_VIDEO_SECONDS = 600.0  # of an upload; the sound is shorter
MAX_PICTURE = 4096, 2304  # pixels; what counts is their product
SHORTEST, MAX_SECONDS = 0.7, 30.0  # of sound
SHOWN_EXAMPLES = 6
KEEP_SECONDS = 3600  # how long an upload and a result stay on disk
_MAX_SIZE = "x".join(map(str, MAX_PICTURE))
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
    say: Callable[[str], None] = print,
) -> None:
    """Show the page of a run folder or Hub id at `host` until Ctrl-C or SIGTERM; `say` gets its address.

    Another port is chosen when `port` is taken. ValueError for a RUN without network, and a host that is not here.
    """
    if max_upload_mb <= 0:
        raise ValueError(f"--max-upload-mb must be more than 0, not {max_upload_mb:g}")
    pipeline = MMAudioPipeline.from_pretrained(run, device=device)
    # Generates nothing, and so opens no video: files of the encoders that a visitor may need are looked for.
    pipeline.generate([Request(video="any", prompt="a sound")], on_reject=lambda *_: None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder goes in any case
    with _listen(host, port) as listener, tempfile.TemporaryDirectory(prefix="mmaudio-demo-") as folder:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "page")
        page = build_page(pipeline, run, Path(folder) / "made", max_upload_mb)
        app = gr.mount_gradio_app(
            FastAPI(),
            page,
            path="/",
            footer_links=[],
            run_history=False,
            show_error=False,  # of our own faults the page shows that there was one; the terminal has the rest
            max_file_size=round(max_upload_mb * 2**20),
            ssr_mode=False,
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=_STYLE,
        )
        actual = listener.getsockname()[1]
        listener.listen()  # who comes before the server is up has to wait, no more
        if port not in (0, actual):
            say(f"port {port} is taken")
        say(f"http://{f'[{host}]' if ':' in host else host}:{actual} shows {run}; Ctrl-C ends it")
        # Pages hold connections open: these must not keep the server from ending, nor be logged as errors when cut.
        ending = {"timeout_graceful_shutdown": 1, "log_level": "critical"}
        server = uvicorn.Server(uvicorn.Config(app, headers=[("Content-Security-Policy", _POLICY)], **ending))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def build_page(pipeline: MMAudioPipeline, run: str | os.PathLike, made: Path, max_upload_mb: float = 200) -> gr.Blocks:
    """The page of a pipeline. `run` gives the title and, by its recipe, examples; results are written to `made`."""
    trained = pipeline.network.config.duration
    longest = max(MAX_SECONDS, trained)
    name = Path(run).resolve().name if Path(run).is_dir() else str(run)
    with gr.Blocks(title=f"{name}: demo", analytics_enabled=False, delete_cache=(60, KEEP_SECONDS)) as page:
        limits = f"{max_upload_mb:g} MB, {MAX_VIDEO_SECONDS / 60:g} minutes and {_MAX_SIZE} pixels"
        gr.Markdown(f"# {name}\nMakes the sound of a video, of a text, or of both. Videos: up to {limits}.")
        with gr.Row():
            with gr.Column():
                video = gr.Video(label="Video", sources=["upload"], height=_HEIGHT)
                prompt = gr.Textbox(label="Prompt", placeholder="what is to be heard")
                negative = gr.Textbox(label="Negative prompt", placeholder="what is not to be heard")
                with gr.Row():
                    duration = gr.Slider(SHORTEST, longest, trained, step=0.1, label="Seconds", min_width=220)
                    steps = gr.Slider(1, 100, 25, step=1, label="Steps", min_width=220)
                with gr.Row():
                    guidance = gr.Slider(0, 10, 4.5, step=0.1, label="Guidance", min_width=220)
                    seed = gr.Slider(0, 9999, 0, step=1, label="Seed", min_width=220)
                button = gr.Button("Make sound", variant="primary")
            with gr.Column():
                shown = gr.Video(label="Video with its new sound", interactive=False, height=_HEIGHT)
                sound = gr.Audio(label="Sound", interactive=False, buttons=["download"])
                picture = gr.HTML(label="Spectrogram", show_label=True, container=True, visible=False)
        if examples := _examples(run):
            gr.Examples(examples, [video, prompt], examples_per_page=SHOWN_EXAMPLES)
        video.change(lambda path: _usable_seconds(path, longest), video, duration)
        button.click(
            lambda *values: _answer(pipeline, made, *values),
            [video, prompt, negative, duration, steps, guidance, seed],
            [shown, sound, picture],
            concurrency_limit=1,
        )
    return page


@contextlib.contextmanager
def _told(path: str | None) -> Iterator[None]:
    """A user's mistake becomes a sentence on the page, with the name of the file in place of where it lies here."""
    try:
        yield
    except ValueError as error:
        text = str(error) if path is None else str(error).replace(str(path), Path(path).name)
        raise gr.Error(escape(text), duration=None, print_exception=False) from None


def _usable_seconds(path: str | None, longest: float):
    """Seconds of sound to begin with for a video: its length, at most `longest`. Refuses what cannot be used."""
    with _told(path):
        return gr.skip() if path is None else min(longest, _check_video(path))


def _check_video(path: str) -> float:
    """Length in s of the pictures, down to a tenth; ValueError for a file without, or beyond the limits of the page."""
    facts = probe(path)
    if "video" not in facts:
        raise ValueError(f"{path} has no pictures: give a video, or only a prompt")
    width, height = facts["video"]["width"], facts["video"]["height"]
    if width * height > math.prod(MAX_PICTURE):
        raise ValueError(
            f"{path} has pictures of {width}x{height}, this page takes up to {_MAX_SIZE}: make them smaller"
        )
    seconds = video_seconds(path)
    if seconds > MAX_VIDEO_SECONDS:
        raise ValueError(f"{path} is {seconds:.0f} s long, this page takes {MAX_VIDEO_SECONDS:.0f} s: cut it")
    return int(10 * seconds) / 10


def _answer(pipeline: MMAudioPipeline, made: Path, video, prompt, negative, duration, steps, guidance, seed):
    """What the page shows: the video with its new sound, the sound, and its spectrogram."""
    with _told(video):
        if video is None and not prompt.strip():
            raise ValueError("There is nothing to go by: choose a video, write a prompt, or both")
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
        )
        # The page has copies of the results before, since one sound is made at a time.
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        sound, shown = made / "sound.wav", None if video is None else made / "video.mp4"
        notes = [result.note, save_and_tell(result, sound), shown and save_and_tell(result, shown, video)]
    picture = _spectrogram(result) + "".join(f"<p>{escape(note)}</p>" for note in notes if note)
    return gr.update(value=shown, visible=shown is not None), str(sound), gr.update(value=picture, visible=True)


def _spectrogram(result: Generated) -> str:
    """Mel spectrogram of a sound as HTML, with the seconds below."""
    level = decibels(result.waveform, result.sample_rate)
    seconds = len(result.waveform) / result.sample_rate
    image = data_uri("image/png", spectrogram_image(level, float(level.max())))
    marks = "".join(f"<span>{seconds * k / 4:.1f}{' s' if k == 4 else ''}</span>" for k in range(5))
    return (
        f'<figure class="spectrogram"><img src="{image}" alt="Mel spectrogram of the sound, {seconds:.1f} s">'
        f'<div class="seconds" aria-hidden="true">{marks}</div></figure>'
    )


def _examples(run: str | os.PathLike) -> list[list[str]]:
    """[path, caption] of the first test videos of a run that are still where its recipe has them."""
    recipe_file = Path(run) / RECIPE_FILE
    if not recipe_file.is_file():
        return []
    recipe = load_recipe(recipe_file)
    tested = {Path(store.path).name for store in recipe.data.test}
    found = []
    for source in recipe.extraction.videos:
        if source.name in tested and Path(source.list).is_file():
            items = read_media_list(source.list)
            found += [[str(find_video(source.media_dir, item.id)), item.caption] for item in items]
    return [example for example in found if Path(example[0]).is_file()][:SHOWN_EXAMPLES]


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
