"""The demo page: the real server process with a run that was trained, and a real browser from upload to playback."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
import yaml
from forked import PATIENCE
from odd_media import code_image
from peft import LoraConfig, get_peft_model
from PIL import Image
from toy_stores import recipe_tree, write_store
from training_runs import environment, train

from mmaudio_hf import MMAudio, MMAudioPipeline
from mmaudio_hf.cli import main
from mmaudio_hf.media.audio import read_waveform
from mmaudio_hf.pages import demo

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def run(media, tmp_path_factory):
    """A run of two steps, in a folder with a space; its recipe names the test videos of the example media."""
    folder = tmp_path_factory.mktemp("a run")
    tree = recipe_tree(folder, steps=2, checkpoint_every=2)
    tree["encoders"]["weights_dir"] = str(media)
    tree["data"]["test"] = [{"path": str(write_store(folder / "tested", 2))}]
    source = {"name": "tested", "media_dir": str(media / "videos"), "list": str(media / "test.tsv")}
    tree["extraction"] = {"videos": [source]}
    recipe = folder / "toy.yaml"
    recipe.write_text(yaml.safe_dump(tree | {"name": "toy"}))
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    return folder / "output" / "toy"


@contextlib.contextmanager
def served(run: Path, scratch: Path, *options: str):
    """`mmaudio-hf demo` as a process of its own; gives its first lines up to the address. Nothing of it stays."""
    scratch.mkdir()
    words = [sys.executable, "-u", "-m", "mmaudio_hf.cli", "demo", str(run), "--device", "cpu", *options]
    variables = environment() | {"TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(sys.path)}
    log = scratch.with_name(f"{scratch.name}.log")  # a pipe that nobody reads would be full at some time
    with open(log, "w") as errors:
        process = subprocess.Popen(words, env=variables, text=True, stdout=subprocess.PIPE, stderr=errors)
    try:
        lines = [process.stdout.readline()]
        while lines[-1] and "http://" not in lines[-1]:
            lines.append(process.stdout.readline())
        yield lines
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    errors = log.read_text()
    # Each file that is not opened, and each address that is not fetched, is logged with a traceback; nothing else is.
    rejected = [errors.count(f"{name}:") for name in ("gradio.exceptions.InvalidPathError", "HTTPException: 403")]
    assert errors.count("Traceback") == sum(rejected), errors
    assert process.returncode == 0, errors
    assert not [path for path in scratch.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory):
    """An adapter for the run, which changes much."""
    path = tmp_path_factory.mktemp("adapters") / "bells"
    network = MMAudio.from_pretrained(run / "last" / "pretrained_model")
    wrapped = get_peft_model(network, LoraConfig(r=2, target_modules=["qkv", "linear1"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.3)
    wrapped.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def address(run, adapter, tmp_path_factory):
    """Of the page of the run, where the port that was requested is taken."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        scratch = tmp_path_factory.mktemp("served") / "tmp"
        adapters = ("--lora", str(adapter), "--lora-scale", "0.5")
        with served(run, scratch, "--port", str(taken), "--max-upload-mb", "1", *adapters) as lines:
            assert lines[0] == f"port {taken} is taken\n"
            yield lines[1].split()[0]


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page in a fresh profile; at the end, no request of it may have gone to another address."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    urls, faults = [], []
    page.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name="Generate").wait_for()
    yield page
    context.close()
    assert len(urls) > 10 and not faults, faults
    elsewhere = [url for url in urls if not url.removeprefix("blob:").startswith((f"{address}/", "data:"))]
    assert not elsewhere


def set_number(page, label: str, value: float) -> None:
    page.get_by_label(f"number input for {label}").fill(str(value))
    page.keyboard.press("Tab")


def number(page, label: str) -> float:
    return float(page.get_by_label(f"number input for {label}").input_value())


def wait_for_number(page, label: str, value: float) -> None:
    page.wait_for_function(f"""document.querySelector('[aria-label="number input for {label}"]').value == {value}""")


def wait_until(page, player, condition: str) -> None:
    """`condition` is JavaScript about a media element `e`."""
    page.wait_for_function(f"e => {condition}", arg=player.element_handle())


def test_from_upload_to_playback(page, run, adapter, media, tmp_path):
    video = media / "videos" / "test_00_ball.mp4"
    assert number(page, "Seconds") == 1  # as trained
    page.locator("input[type=file]").first.set_input_files(video)
    wait_for_number(page, "Seconds", 9.4)  # of the video
    page.get_by_label("Prompt", exact=True).fill("a ball")
    page.get_by_label("Negative prompt").fill("hum")
    for label, value in (("Seconds", 2), ("Steps", 3), ("Guidance", 3), ("Seed", 7)):
        set_number(page, label, value)
    page.get_by_role("button", name="Generate").click()

    image = page.get_by_alt_text("Mel spectrogram, 2.0 s")
    image.wait_for()
    assert image.evaluate("e => e.complete && e.naturalWidth") > 100 and image.bounding_box()["width"] > 300
    assert page.locator(".spectrogram + .seconds").inner_text().split() == ["0", "s", "1", "2"]
    assert page.locator(".spectrogram b").first.inner_text() == "500 Hz"

    audio = page.locator("audio[src^='blob:']")
    wait_until(page, audio, "e.duration > 1.9 && e.duration < 2.1")
    page.get_by_role("button", name="Play").last.click()
    wait_until(page, audio, "e.currentTime > 0.3 && !e.error")
    shown = page.get_by_test_id("Video with generated audio-player")
    wait_until(page, shown, "e.videoWidth > 0 && Math.abs(e.duration - 2) < 0.2")
    shown.evaluate("e => { e.muted = true; return e.play() }")
    wait_until(page, shown, "e.currentTime > 0.3 && e.webkitAudioDecodedByteCount > 0")

    with page.expect_download() as download:
        page.get_by_test_id("download-link").last.click()
    download.value.save_as(tmp_path / "audio.wav")
    options = {"duration": 2.0, "num_steps": 3, "guidance_scale": 3.0, "seed": 7}
    pipeline = MMAudioPipeline.from_pretrained(run, device="cpu").load_lora_weights(adapter, 0.5)
    expected = pipeline(video, "a ball", "hum", **options)
    waveform, rate = read_waveform(tmp_path / "audio.wav")
    assert rate == 16000 and torch.allclose(waveform, expected.waveform, atol=1e-3)


def message_on(page, words: str):
    """The message that holds `words`, once it is on the page."""
    message = page.get_by_test_id("toast-body").filter(has_text=words)
    message.first.wait_for()
    assert "Traceback" not in page.content()
    return message.first.inner_text()


def generated(page, tmp_path) -> torch.Tensor:
    """The audio that the page makes now; the one before is waited away."""
    image = page.locator(".spectrogram img")
    before = image.get_attribute("src") if image.count() else ""
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function(
        "before => ![undefined, before].includes(document.querySelector('.spectrogram img')?.src)", arg=before
    )
    with page.expect_download() as download:
        page.get_by_test_id("download-link").last.click()
    download.value.save_as(tmp_path / "audio.wav")
    return read_waveform(tmp_path / "audio.wav")[0]


def test_an_image_a_random_seed_and_adapters(page, run, adapter, tmp_path):
    details = page.locator(".prose.details").inner_text()
    assert "small_16k" in details and "step 2, EMA weights" in details and "adapters: bells x 0.5" in details
    page.get_by_role("tab", name="Image").click()
    image = Image.fromarray(code_image(3, 96, 80))
    image.save(tmp_path / "still.png")
    page.locator("input[type=file]").last.set_input_files(tmp_path / "still.png")
    page.locator("img[src*='still.png']").first.wait_for()
    page.get_by_label("bells").uncheck()
    set_number(page, "Steps", 2)
    plain = generated(page, tmp_path)
    settings = {"image": image, "duration": 1.0, "num_steps": 2}
    pipeline = MMAudioPipeline.from_pretrained(run, device="cpu")
    assert torch.allclose(plain, pipeline(**settings, seed=0).waveform, atol=1e-3)
    page.get_by_label("bells").check()
    page.get_by_label("Random seed").check()
    adapted = generated(page, tmp_path)
    drawn = int(number(page, "Seed"))
    assert not torch.allclose(adapted, pipeline(**settings, seed=drawn).waveform, atol=1e-3)
    pipeline.load_lora_weights(adapter, 0.5)
    assert torch.allclose(adapted, pipeline(**settings, seed=drawn).waveform, atol=1e-3)


def test_the_page_shows_each_step(page):
    page.get_by_label("Prompt", exact=True).fill("a ball")
    set_number(page, "Seconds", 4)  # in windows
    set_number(page, "Steps", 100)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile(r"\b\d+/100 steps")).first.wait_for()
    page.get_by_alt_text("Mel spectrogram, 4.0 s").wait_for(timeout=60_000)


def test_what_cannot_be_used_is_one_sentence_on_the_page(page, media, tmp_path):
    page.get_by_role("button", name="Generate").click()
    message_on(page, "Nothing to generate from: choose a video or an image, write a prompt, or both")
    page.get_by_test_id("toast-body").first.wait_for(state="detached", timeout=60_000)  # it goes by itself
    assert page.get_by_text("Error", exact=True).locator("visible=true").count() == 0  # nothing lies over the seed
    set_number(page, "Seed", 3)
    page.get_by_role("tab", name="Image").click()
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.locator("input[type=file]").last.set_input_files(tmp_path / "broken.png")
    page.locator("img[src*='broken.png']").first.wait_for(state="attached")
    page.get_by_role("button", name="Generate").click()
    assert str(tmp_path.parent) not in message_on(page, "broken.png: ")
    page.reload()
    (tmp_path / "large.mp4").write_bytes(bytes(2**20 + 1))
    page.locator("input[type=file]").first.set_input_files(tmp_path / "large.mp4")
    assert "large.mp4" in message_on(page, "maximum allowed size")
    page.reload()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.mp4")
    assert str(tmp_path.parent) not in message_on(page, "broken.mp4: cannot be opened as media")
    page.get_by_role("button", name="Generate").click()
    message_on(page, "broken.mp4: cannot be opened as media")


def test_an_example_is_picked_and_a_text_is_enough(page):
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.get_by_text("blue warning light").click()
    page.wait_for_function("document.querySelector('textarea, input[type=text]').value.startsWith('blue warning')")
    wait_for_number(page, "Seconds", 9.4)
    page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
    set_number(page, "Seconds", 1)
    set_number(page, "Steps", 1)
    page.get_by_role("button", name="Generate").click()
    page.get_by_alt_text("Mel spectrogram, 1.0 s").wait_for()
    assert not page.get_by_test_id("Video with generated audio-player").is_visible()


def call(address: str, endpoint: str, values: list) -> str:
    """The events with which the page's API answers a call, without a browser."""
    body = json.dumps({"data": values}).encode()
    request = urllib.request.Request(
        f"{address}/gradio_api/call/{endpoint}", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{address}/gradio_api/call/{endpoint}/{event}", timeout=PATIENCE) as response:
        return response.read().decode()


def upload(address: str, file: Path) -> str:
    """The path on the server of a file that a visitor uploads."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n\r\n'
    body = head.encode() + file.read_bytes() + b"\r\n--x--\r\n"
    types = {"Content-Type": "multipart/form-data; boundary=x"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/upload", body, types)) as response:
        return json.load(response)[0]


def calls_with(file: dict, settings: list) -> list[tuple[str, list]]:
    """Every endpoint and place in which a request may name a file."""
    return [("check_video", [file]), ("generate", [file, None, *settings]), ("generate", [None, file, *settings])]


def test_a_request_can_name_uploads_alone(address, media, tmp_path):
    """No file of the machine is opened, copied or told to exist; an upload is used, and so is an example once shown."""
    secret = Path(shutil.copy(media / "videos" / "test_00_ball.mp4", tmp_path / "secret.mp4"))
    example = media / "videos" / "test_01_lamp.mp4"
    settings = ["", "", 1, 1, 1, 0, False, []]
    with urllib.request.urlopen(f"{address}/gradio_api/info") as response:
        endpoints = [name.strip("/") for name in json.load(response)["named_endpoints"]]
    assert {"check_video", "generate"} <= set(endpoints)
    link = tmp_path / "link.mp4"
    link.symlink_to(secret)
    files = (secret, link, tmp_path / "absent.mp4", example, "/etc/passwd", tmp_path / "../../etc/passwd")
    for path in (*files, f"file://{secret}"):
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        for endpoint, values in calls_with(file, settings):
            answer = call(address, endpoint, values)
            assert "event: error" in answer and "event: complete" not in answer and str(path) not in answer, answer
    for path in (secret, "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
    uploaded = {"path": upload(address, secret), "meta": {"_type": "gradio.FileData"}}
    assert "9.4" in call(address, "check_video", [uploaded])
    beyond = {"path": f"{uploaded['path']}/../../../../{secret}", "meta": {"_type": "gradio.FileData"}}
    assert "event: error" in call(address, "check_video", [beyond])
    remote = {"path": uploaded["path"], "url": f"file://{secret}", "meta": {"_type": "gradio.FileData"}}
    assert "9.4" in call(address, "check_video", [remote])  # the path counts, and it was uploaded
    answer = call(address, "generate", [uploaded, None, *settings])
    assert "event: complete" in answer and "video.mp4" in answer


def test_no_address_is_fetched_and_no_folder_is_listed(address, media, tmp_path):
    """Neither services of the machine nor others are reached through the page; uploads of others are not listed."""
    reached = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            reached.append(self.path)
            self.send_response(200)
            self.end_headers()

    settings, kind = ["", "", 1, 1, 1, 0, False, []], {"meta": {"_type": "gradio.FileData"}}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        local = f"http://127.0.0.1:{server.server_port}/clip.mp4"
        for url in (local, local.replace("127.0.0.1", "2130706433"), f"{address}/x.mp4"):
            for more in ({}, {"url": url}, {"is_stream": True}):
                for endpoint, values in calls_with({"path": url, **kind, **more}, settings):
                    answer = call(address, endpoint, values)
                    assert "event: error" in answer and "event: complete" not in answer, (url, more, answer)
            for route in (f"file={url}", f"proxy={url}", f"file={quote(url, safe='')}"):
                with pytest.raises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(f"{address}/gradio_api/{route}", timeout=60)
                assert caught.value.code in (400, 403, 404), (route, caught.value)
        server.shutdown()
    assert not reached
    theirs = Path(upload(address, Path(shutil.copy(media / "videos" / "test_01_lamp.mp4", tmp_path / "theirs.mp4"))))
    for path in (theirs.parent, theirs.parent.parent, theirs.parent / "*", theirs.parent.parent.parent / "results"):
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
        assert "event: error" in call(address, "check_video", [{"path": str(path), **kind}])


def test_limits_of_a_video(media, monkeypatch):
    video = media / "videos" / "test_00_ball.mp4"
    assert demo._usable_seconds(str(video), 8.0) == 8.0
    assert demo._usable_seconds(str(video), 60.0) == pytest.approx(9.4, abs=0.11)
    for name, value, words in (
        ("MAX_VIDEO_SECONDS", 5.0, "test_00_ball.mp4 is 9 s long, the limit is 5 s: cut it"),
        ("MAX_FRAME_SIZE", (10, 10), "has frames of .*x.*: scale it down"),
    ):
        with monkeypatch.context() as patch, pytest.raises(demo.gr.Error, match=words) as caught:
            patch.setattr(demo, name, value)
            demo._usable_seconds(str(video), 8.0)
        assert str(media) not in str(caught.value)
    audio_file = next((media / "audios").glob("*.flac"))
    with pytest.raises(demo.gr.Error, match="has no video frames"):
        demo._usable_seconds(str(audio_file), 8.0)


def test_refusals_come_before_the_page(run, tmp_path, capsys, monkeypatch):
    bare = Path(shutil.copytree(run / "last" / "pretrained_model", tmp_path / "bare"))
    (bare / "toy_codec_16k.safetensors").unlink()
    (bare / "encoders.json").write_text(json.dumps({"kind": "toy", "weights_dir": str(tmp_path)}))
    sounding = Path(shutil.copytree(bare, tmp_path / "sounding"))  # has all that a text needs, but not a video
    (sounding / "encoders.json").write_text(json.dumps({"kind": "released", "weights_dir": str(tmp_path)}))
    for name in ("v1-16.pth", "best_netG.pt"):
        (tmp_path / name).touch()
    for words, message in (
        ([str(tmp_path)], "holds no trained network"),
        ([str(tmp_path / "nothing")], "neither a folder nor a Hub id"),
        ([str(bare)], "toy_codec_16k.safetensors is missing"),
        ([str(sounding), "--device", "cpu"], "synchformer_state_dict.pth is missing"),
        ([str(run), "--host", "203.0.113.1"], "--host 203.0.113.1 --port 7860"),
        ([str(run), "--port", "99999"], "--port 99999"),
        ([str(run), "--max-upload-mb", "0"], "--max-upload-mb must be more than 0"),
    ):
        assert main(["demo", *words]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(run)]) == 2
    assert "pip install 'mmaudio-hf[demo]'" in capsys.readouterr().err
