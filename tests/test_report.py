"""The page of a run: its structure, its content, and that it loads nothing from outside."""

import base64
import contextlib
import io
import itertools
import json
import shutil
import time
from html.parser import HTMLParser

import av
import numpy as np
import pytest
import torch
import yaml
from forked import PATIENCE
from test_demo import browser  # noqa: F401
from toy_stores import MODEL, write_store

from mmaudio_hf.config import EncoderConfig, load_recipe, save_recipe, to_dict
from mmaudio_hf.evaluation.samples import read_items
from mmaudio_hf.media.container import probe
from mmaudio_hf.media.example import read_events
from mmaudio_hf.media.video import read_video
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.pages import Curve, encode_png, frequency_ticks, line_chart, report
from mmaudio_hf.pages.report import ReportClip, report_run, run_summary, write_report

EVIL = '<script>alert(1)</script> "a" & b'


class Page(HTMLParser):
    """All tags with their attributes, the visible text, and scripts and styles apart."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.raw, self.open = [], "", {"script": [], "style": []}, []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)
        else:
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run_dir(tmp_path):
    """A run folder with what the training loop writes, without weights."""
    run = tmp_path / "my <run>"
    run.mkdir()
    bins = {f"loss_t_{k / 10:.1f}": 1.5 - k / 20 for k in range(10)}
    entries = [{"step": 0, "val/loss": 2.0} | {f"val/{k}": v + 1 for k, v in bins.items()}]
    for step in range(1, 7):
        entries.append({"step": step, "train/loss": 2 - step / 5, "train/learning_rate": 1e-4 * step})
        if step % 3 == 0:
            scores = {f"{kind}/{k}": v / step for kind in ("val", "val_ema") for k, v in bins.items()}
            entries.append({"step": step, "val/loss": 2 - step / 4, "val_ema/loss": 1.9 - step / 4, **scores})
    entries.append({"step": 6, "train/loss": float("nan")})
    lines = [json.dumps(entry) for entry in entries] + ['{"step": 7, "tra']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    speed = {"speed/steps_per_second": 2.0, "speed/samples_per_second": 8.0, "speed/peak_memory_gb": 0.5}
    (run / "speed.jsonl").write_text(json.dumps({"step": 6, **speed}) + "\n")
    return run


def clicks(times, seconds=2.0, rate=16000) -> torch.Tensor:
    waveform = torch.zeros(int(seconds * rate))
    noise = torch.randn(800, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 0, 800)
    for start in times:
        waveform[int(start * rate) :][:800] = noise
    return waveform


def content(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2], validate=True)


@pytest.fixture
def page(run_dir, media):
    """The report of three clips: with a video and events, with audio alone, with a video that is gone."""
    events = (0.4, 1.2)
    clips = [
        ReportClip("a", EVIL, clicks((0.4, 0.8)), 16000, clicks(events), media / "videos/test_00_ball.mp4", 0, events),
        ReportClip("b", "no frames", clicks((0.5,), rate=44100), 44100),
        ReportClip("c", "lost", clicks((0.5,)), 16000, None, media / "videos/none.mp4"),
    ]
    timing = {"onset_f1": 0.5, "onset_f1_shuffled": 0.25, "onset_clips": 3, "onset_f1_true_latents": 1.0}
    path = write_report(run_dir, clips, timing=timing)
    assert path == run_dir / "report" / "index.html" and [p.name for p in path.parent.iterdir()] == ["index.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_curves_have_every_point_that_is_finite(page):
    curves = {line["data-series"]: len(line["points"].split()) for line in page.all("polyline")}
    assert curves == {
        "train/loss": 6,
        "val/loss": 3,
        "val_ema/loss": 2,
        "train/learning_rate": 6,
        "val/loss_t_*:0": 10,
        "val/loss_t_*:6": 10,
        "val_ema/loss_t_*:6": 10,
    }


def test_axes_have_units_and_players_their_length(page):
    assert {"mean squared error", "t: 0 is noise, 1 is data", "step"} <= set(page.text.replace("\n", "|").split("|"))
    assert page.text.count("8.0 s") == 0 and page.text.count("2.0 s") >= 3
    labels = [tops for name, tops in frequency_ticks(16000)]
    assert [name for name, _ in frequency_ticks(44100)][-1] == "16 kHz"
    assert labels == sorted(labels, key=lambda top: -float(top.rstrip("%"))) and len(labels) == 4


def test_the_page_names_the_step_that_each_score_would_choose(run_dir):
    lines = [{"step": s, "val_ema/loss": 2 - s, "eval/onset_f1": f, "eval/log_mel_distance": 9 - f} for s, f in
             ((1, 0.5), (2, 0.75), (3, 0.25))]  # fmt: skip
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = " ".join(Page(write_report(run_dir, [], heading="test split: 3 clips").read_text()).text.split())
    page = Page(write_report(run_dir, []).read_text())
    rings = [tags for tags in page.all("circle") if tags["class"] == "ring"]
    assert len(rings) == 3 and page.text.count("the best:") == 3 and "the best: 0.75 at 2" in page.text
    assert "val_ema/loss3-1" in text.replace(" ", "") and "eval/onset_f120.75" in text.replace(" ", "")
    assert "eval/log_mel_distance28.25" in text.replace(" ", "") and "test split: 3 clips" in text


def wait_for(shown, condition: str) -> None:
    """Until a condition in JavaScript holds; the policy of the page forbids playwright's own waiting."""
    end = time.monotonic() + PATIENCE
    while not shown.evaluate(condition):
        assert time.monotonic() < end, condition
        shown.wait_for_timeout(50)


def test_pages_are_read_and_heard_in_a_browser(browser, page, run_dir):  # noqa: F811
    """Wide and narrow, light and dark: nothing hangs over, text has contrast, players a length; a switch plays on."""
    contrast = """() => {
      const rgb = text => text.match(/[\\d.]+/g).map(Number);
      const light = c => c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const behind = e => { const c = rgb(getComputedStyle(e).backgroundColor);
        return c.length == 4 && c[3] == 0 ? (e.parentElement ? behind(e.parentElement) : [255, 255, 255]) : c };
      return [...document.querySelectorAll("h1, h2, h3, p, dt, dd, td, th, figcaption, button, .note, .seconds, li")]
        .map(e => { const pair = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => a - b);
          return (pair[1] + 0.05) / (pair[0] + 0.05) }).reduce((a, b) => Math.min(a, b)) }"""
    for width, scheme in itertools.product((1400, 400), ("light", "dark")):
        size = {"width": width, "height": 900}
        with contextlib.closing(browser.new_page(viewport=size, color_scheme=scheme)) as shown:
            shown.goto((run_dir / "report" / "index.html").as_uri())
            assert shown.evaluate("document.documentElement.scrollWidth") <= width and shown.evaluate(contrast) >= 4.5
            players = "[...document.querySelectorAll('video, audio')]"
            wait_for(shown, f"{players}.every(e => e.duration > 1.9 && e.duration < 2.2)")
    first, second = (f"document.querySelectorAll('article video')[{i}]" for i in (0, 1))
    with contextlib.closing(browser.new_page()) as shown:
        shown.goto((run_dir / "report" / "index.html").as_uri())
        shown.evaluate(f"{first}.muted = {second}.muted = true; {first}.play()")
        wait_for(shown, f"{first}.currentTime > 0.5")
        shown.get_by_role("button", name="Switch A | B").click()
        wait_for(shown, f"{first}.paused && {second}.currentTime > 0.5 && !{second}.error")
        assert shown.evaluate("document.querySelector('.switch').dataset.now") == "Ground truth"


def test_cards_of_several_players_have_a_switch(page):
    cards = [tags for tags in page.all("button") if tags.get("class") == "switch"]
    assert len(cards) == 1  # the other cards have one player


def test_the_video_has_the_generated_audio_and_its_own_frames(page):
    assert len(page.all("video")) == 2 and len(page.all("audio")) == 2 and len(page.all("article")) == 3
    with av.open(io.BytesIO(content(page.all("video")[0]["src"]))) as container:
        frames = sum(1 for _ in container.decode(video=0))
        container.seek(0)
        samples = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    assert abs(frames - 50) <= 3
    loud = np.abs(samples).reshape(-1, 64).max(1) > 0.1
    assert np.flatnonzero(loud)[0] * 64 / 16000 == pytest.approx(0.4, abs=0.05)
    with av.open(io.BytesIO(content(page.all("audio")[0]["src"]))) as container:
        assert container.streams.audio[0].rate == 44100


def test_spectrograms_and_marks_follow_the_time(page):
    images = page.all("img")
    assert len(images) == 4 and all(image["alt"] for image in images)
    with av.open(io.BytesIO(content(images[0]["src"]))) as container:
        pixels = next(container.decode(video=0)).to_ndarray(format="gray")
    assert pixels.shape == (80, 125)
    assert np.argmax(pixels.mean(0) > 60) / 125 == pytest.approx(0.2, abs=0.03)  # the first click at 0.4 s of 2
    marks = [(i["class"], i["style"]) for i in page.all("i") if i["class"] != "playhead"]
    assert marks[:2] == [("event", "left:20.00%"), ("event", "left:60.00%")]
    assert sum(kind == "event" for kind, _ in marks) == 4


def test_figures_are_on_the_page(page):
    assert "onset F1 0.50 (precision 0.50, recall 0.50)" in page.text and "onset F1 1.00" in page.text
    for figure in ("0.50", "0.25", "2.000", "0.400", "0.50 GB", "6 steps"):
        assert figure in page.text, figure


def test_page_is_safe_and_alone(run_dir, media):
    clip = ReportClip(EVIL, EVIL, clicks((0.4,)), 16000, video=media / "videos/test_01_lamp.mp4", scores={EVIL: 1.0})
    text = write_report(run_dir, [clip]).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1 and "alert(1)" not in "".join(page.raw["script"])
    assert EVIL in page.text and "my <run>" in page.text
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "data", "poster", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy and "http" not in policy
    assert page.all("html")[0]["lang"] and any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert all(video["aria-label"] for video in page.all("video"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))


def test_page_of_a_run_that_has_logged_nothing(tmp_path):
    page = Page(write_report(tmp_path, []).read_text())
    assert page.text.count("Nothing was logged.") == 3 and "No clips" in page.text


def test_summary(run_dir):
    summary = run_summary(run_dir)
    assert summary["steps"] == 6 and summary["run"] == "my <run>"
    assert [summary[f"val_loss_{n}"] for n in ("first", "last", "last_ema")] == pytest.approx([2.0, 0.5, 0.4])
    assert summary["steps_per_second"] == 2 and summary["peak_memory_gb"] == 0.5


def test_png():
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    palette = np.stack([np.arange(256), np.zeros(256), 255 - np.arange(256)], 1).astype(np.uint8)
    with av.open(io.BytesIO(encode_png(pixels, palette))) as container:
        decoded = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(decoded, palette[pixels])


def test_charts_of_odd_values():
    for points in ([(0, 1.0)], [(0, 0.0), (1, 0.0)], [(5, -1e-7), (9, 3e-7)], [(0, 1e9), (1, 2e9)]):
        chart = line_chart("a", "x", [Curve("n", "n", "a", points)])
        (line,) = Page(chart).all("polyline")
        pixels = [float(v) for point in line["points"].split() for v in point.split(",")]
        assert len(pixels) == 2 * len(points) and all(0 <= v <= 400 for v in pixels)


def test_true_audio_is_read_as_extraction_reads_it(tmp_path, media, monkeypatch):
    calls = []
    monkeypatch.setattr(report, "read_video", lambda path, **how: calls.append(how) or read_video(path, **how))
    for name in ("loud", "asis"):
        write_store(tmp_path / name, 2)
        (tmp_path / f"{name}.tsv").write_text("id\tcaption\ntest_00_ball\ta\nelsewhere\tb\n")
        (tmp_path / f"{name}.manifest.json").unlink()
    source = {"media_dir": str(media / "videos"), "list": "x.tsv"}
    rows = "test_00_ball\ttest_00_ball.mp4\t0.5\n"  # a clip of a longer video
    (tmp_path / "asis.clips.tsv").write_text(f"id\tname\tstart\n{rows}")
    cut = {"max_clips": 0}
    tree = {
        "model": MODEL,
        "extraction": {
            "output_dir": str(tmp_path),
            "videos": [{"name": "loud", **source}, {"name": "asis", "normalize_audio": False, **source, **cut}],
        },
        "data": {"test": [{"path": str(tmp_path / name)} for name in ("loud", "asis")]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "run.yaml")
    items = [item for store in recipe.data.test for item in read_items([store], 2)]
    read = [report._video_and_audio(item, recipe, with_audio=True) for item in items]
    videos, starts, waveforms = zip(*read, strict=True)
    settings = [(how["alignment"], how["normalize_audio"], how["start"]) for how in calls]
    assert settings == [("timestamps", True, 0.0), ("timestamps", False, 0.5)]
    path = media / "videos" / "test_00_ball.mp4"
    assert videos == (path, None, path, None) and starts == (0, 0, 0.5, 0)
    assert [waveform is None for waveform in waveforms] == [False, True, False, True]
    assert not torch.equal(waveforms[0], waveforms[2])
    # The page shows that part of the video, smaller where it would be too large.
    monkeypatch.setattr(report, "MEDIA_LIMIT", 0)
    monkeypatch.setattr(report, "MAX_HEIGHT", 72)
    wave, expected = clicks((0.4,)), read_video(path, start=0.5, duration=1.6).clip_frames
    (tmp_path / "part.mp4").write_bytes(content(report._media(path, wave, 16000, tmp_path, 0.5)))
    shown = read_video(tmp_path / "part.mp4", duration=1.6).clip_frames
    moved = read_video(path, start=0.375, duration=1.6).clip_frames - expected  # by a frame of 8 fps
    assert (shown - expected).square().mean() < moved.square().mean() / 4
    assert probe(tmp_path / "part.mp4")["video"]["height"] == 72
    assert report._media(path, wave, 16000, tmp_path, 99.0).startswith("data:audio/wav")


@pytest.fixture
def toy_run(tmp_path, media):
    """The recipe of a run that has only begun: its test store has two videos of the example and one that is gone."""
    store = write_store(tmp_path / "held_out", 3)
    names = ["test_00_ball", "test_01_lamp", "elsewhere"]
    (tmp_path / "held_out.tsv").write_text("id\tcaption\n" + "".join(f"{name}\tcaption of {name}\n" for name in names))
    (tmp_path / "held_out.manifest.json").unlink()  # its hash of the ids no longer fits
    tree = {
        "model": MODEL,
        "output_dir": str(tmp_path),
        "encoders": to_dict(EncoderConfig(kind="toy", weights_dir=str(tmp_path))),
        "extraction": {"videos": [{"name": "held_out", "media_dir": str(media / "videos"), "list": "x.tsv"}]},
        "data": {"test": [{"path": str(store)}]},
        "sampling": {"num_steps": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "run.yaml")
    (recipe.run_dir / "last" / "pretrained_model").mkdir(parents=True)
    return recipe


def test_report_of_a_run_without_recipe_or_weights(toy_run):
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        report_run(toy_run.run_dir)
    save_recipe(toy_run, toy_run.run_dir / "config.yaml")
    with pytest.raises(ValueError, match="no trained network"):
        report_run(toy_run.run_dir)


def test_report_of_a_run(toy_run, media):
    """From a run folder to generated clips: toy features of one second, a network of a few thousand weights."""
    run, folder = toy_run.run_dir, toy_run.run_dir / "last" / "pretrained_model"
    save_recipe(toy_run, run / "config.yaml")
    network = MMAudio(toy_run.model)
    network.set_latent_statistics(torch.zeros(20), torch.ones(20))
    network.save_pretrained(folder)
    shutil.copy(media / "toy_codec_16k.safetensors", folder)
    (folder / "encoders.json").write_text(json.dumps(to_dict(toy_run.encoders)))
    (folder / "weights.json").write_text(json.dumps({"weights": "ema", "sigma_rel": 0.05, "step": 4}))

    summary = report_run(run, events=media / "events.json", shown=2, device="cpu", started=0.0)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["generated_clips"] == 3 and summary["onset_clips"] == 2 and summary["seconds"] > 1e9
    assert 0 <= summary["onset_f1"] <= 1 and summary["sigma_rel"] == 0.05
    page = Page((run / "report" / "index.html").read_text())
    assert len(page.all("article")) == 2 and len(page.all("video")) == 4
    assert "caption of test_01_lamp" in page.text and "EMA" in page.text and "step 4" in page.text
    events = read_events(media / "events.json")
    inside = sum(t < 1 for name in ("test_00_ball", "test_01_lamp") for t in events[name].times)
    assert sum(i["class"] == "event" for i in page.all("i")) == 2 * inside > 0
