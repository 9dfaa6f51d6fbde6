"""Generation with a tiny model and toy encoders: conditions, noise, lengths, windows, files, errors."""

import dataclasses
import itertools
import json
import math
from dataclasses import asdict
from functools import partial

import av
import numpy as np
import pytest
import torch
import yaml
from golden_data import golden, plain_guided_velocity, state_dict, tensor
from odd_media import Odd, code_image, steady, truncate, write_odd
from published import SIZES, small_network

from mmaudio_hf.cli.hub import write_encoder_files
from mmaudio_hf.config import EncoderConfig, ExtractionConfig, Recipe, load_recipe
from mmaudio_hf.features.encoders import load_encoders
from mmaudio_hf.generation.pipeline import MMAudioPipeline, Request, save_generated, starting_noise
from mmaudio_hf.generation.windows import decode_chunks, window_starts
from mmaudio_hf.media.audio import read_waveform
from mmaudio_hf.media.video import read_image, read_video
from mmaudio_hf.models import pretrained
from mmaudio_hf.models.flow import sample_adaptive, sample_euler
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.sampling import GuidedVelocity, prepared_convolutions
from mmaudio_hf.schema import column_shapes


@pytest.fixture(scope="module")
def config(media):
    return EncoderConfig(kind="toy", weights_dir=str(media))


@pytest.fixture
def model():
    return small_network()


@pytest.fixture
def pipeline(model, config):
    return MMAudioPipeline(model, config)


@pytest.fixture
def video(media):
    return media / "videos" / "test_00_ball.mp4"


def row(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = column_shapes("16k", 1.0)
    names = ("clip_features", "sync_features", "text_features")
    return {name: torch.randn(shapes[name], generator=generator) for name in names}


def test_video_and_prompt(pipeline, video):
    result = pipeline(video, "a red ball", duration=1.0, num_steps=2)
    assert result.waveform.shape == (16384,) and result.waveform.dtype == torch.float32
    assert result.sample_rate == 16000 and result.latent.shape == (32, 20)
    assert result.waveform.abs().max() <= 1 and torch.isfinite(result.waveform).all()
    same = pipeline(video, "a red ball", duration=1.0, num_steps=2)
    assert torch.equal(result.latent, same.latent)
    for other in (pipeline(video, duration=1.0, num_steps=2), pipeline(prompt="a red ball", num_steps=2)):
        assert not torch.allclose(result.latent, other.latent, atol=1e-4)
    for changed in ({"seed": 1}, {"negative_prompt": "hum"}, {"guidance_scale": 1.0}, {"guidance_scale": 0.5}):
        other = pipeline(video, "a red ball", duration=1.0, num_steps=2, **changed)
        assert not torch.allclose(result.latent, other.latent, atol=1e-4), changed


def test_latent_is_the_formula(pipeline, model, media, video):
    result = pipeline(video, "a red ball", "hum", duration=1.0, num_steps=3, guidance_scale=3.0, seed=5)
    encoders = load_encoders(EncoderConfig("toy", str(media)), "16k")
    frames = read_video(video, duration=1.0, video_only=True)
    with torch.inference_mode():
        conditions = model.preprocess_conditions(
            encoders.encode_clip(frames.clip_frames[None]),
            encoders.encode_sync(frames.sync_frames[None]),
            encoders.encode_text(["a red ball"]),
        )
        empty = model.empty_conditions(1, encoders.encode_text(["hum"]))
        x0 = starting_noise(5, "0", (32, 20))[None]
        x1 = sample_euler(lambda x, t: plain_guided_velocity(model, x, t, conditions, empty, 3.0), x0, 3)
        latent = model.unnormalize(x1)
        assert torch.allclose(result.latent, latent[0], atol=2e-5)
    # The toy decoder magnifies rounding, so the waveform is compared for the very same latent.
    assert torch.equal(encoders.decode_latent(result.latent[None])[0], result.waveform)
    assert torch.equal(pipeline.decode(result.latent), result.waveform)


@pytest.mark.slow
def test_guidance_of_the_golden_model():
    """Both branches as one batch against the recorded two steps with negative text."""
    model, case = MMAudio.from_variant("small_16k").load_released(state_dict("flow_small_16k")), "flow_sample_small_16k"
    shapes = {
        "latent": (1, 250, 20),
        "clip_f": (1, 64, 1024),
        "sync_f": (1, 192, 768),
        "text_f": (1, 77, 1024),
        "negative_text_f": (1, 77, 1024),
    }
    x = {name: tensor(f"{case}/{name}", shape) for name, shape in shapes.items()}
    for name in ("clip_f", "text_f"):
        x[name] = x[name] + tensor(f"{case}/{name}_common", (1, 1, 1024))
    with torch.inference_mode():
        conditions = model.preprocess_conditions(x["clip_f"], x["sync_f"], x["text_f"])
        velocity = GuidedVelocity(model, conditions, model.empty_conditions(1, x["negative_text_f"]), 4.5)
        with prepared_convolutions(model, "fp32"):
            ours = sample_euler(velocity, x["latent"], 2).numpy()
    theirs = golden(case)["x1_2steps_negative"]
    assert np.linalg.norm(ours - theirs) < 2e-4 * np.linalg.norm(theirs)


def test_batches_and_order_do_not_change_a_result(pipeline):
    requests = [Request(key=f"clip {i}", **row(i)) for i in range(5)]
    requests[1] = dataclasses.replace(requests[1], negative_prompt="hum")
    requests[2] = dataclasses.replace(requests[2], clip_features=None, sync_features=None)
    requests[3] = dataclasses.replace(requests[3], text_features=None)
    whole = {r.key: r.latent for r in pipeline.generate(requests, 5, num_steps=2)}
    single = {r.key: r.latent for r in pipeline.generate(requests[::-1], 2, num_steps=2)}
    assert list(whole) == [f"clip {i}" for i in range(5)] and set(single) == set(whole)
    for key, latent in whole.items():
        assert torch.allclose(latent, single[key], atol=1e-4), key
    assert len({round(float(latent.sum()), 3) for latent in whole.values()}) == 5


def test_features_are_as_good_as_media(pipeline, media, video):
    encoders = load_encoders(EncoderConfig("toy", str(media)), "16k", ("clip", "sync", "text"))
    frames = read_video(video, duration=1.0, as_uint8=True, video_only=True)
    stored = Request(
        clip_features=encoders.encode_clip(frames.clip_frames[None])[0],
        sync_features=encoders.encode_sync(frames.sync_frames[None])[0],
        text_features=encoders.encode_text(["a red ball"])[0].bfloat16().float(),
    )
    result = next(pipeline.generate([stored], num_steps=2))
    assert torch.allclose(result.latent, pipeline(video, "a red ball", duration=1.0, num_steps=2).latent, atol=1e-2)


def test_starting_noise():
    noise = starting_noise(3, "a", (250, 20))
    assert noise.shape == (250, 20) and noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert torch.equal(noise, starting_noise(3, "a", (250, 20)))
    for other in (starting_noise(4, "a", (250, 20)), starting_noise(3, "b", (250, 20))):
        assert not torch.isclose(noise, other).any(1).all()


def test_other_durations_leave_the_network_as_it_was(pipeline, model, video):
    requests = [Request(video=video), Request(prompt="a lamp")]
    results = pipeline.generate(requests, 1, duration=2.0, window=2.0, num_steps=1)
    assert next(results).waveform.shape == (63 * 512,)
    assert (model.latent_length, model.clip_length, model.sync_length) == (32, 8, 16)  # between two results too
    assert next(results).latent.shape == (63, 20)
    # The tables made on the way must not be inference tensors: a model may be trained on.
    x = {name: value[None] for name, value in row(0).items()}
    model.train()(torch.randn(1, 32, 20), *x.values(), torch.tensor([0.5])).sum().backward()


def test_adaptive_solver_and_bf16(pipeline, model, config, monkeypatch):
    rough_solver = partial(sample_adaptive, rtol=1e-3, atol=1e-3)  # 10 s less
    monkeypatch.setattr("mmaudio_hf.generation.pipeline.sample_adaptive", rough_solver)
    options = {"prompt": "a lamp", "guidance_scale": 0}
    exact, fine = pipeline(**options, solver="adaptive").latent, pipeline(**options, num_steps=40).latent
    assert torch.allclose(exact, fine, atol=0.05) and not torch.allclose(exact, pipeline(**options, num_steps=1).latent)
    rough = MMAudioPipeline(model, config, precision="bf16")(**options, num_steps=40).latent
    assert rough.dtype == torch.float32 and not torch.equal(rough, fine) and torch.allclose(rough, fine, atol=0.1)


@pytest.fixture
def published(model, media, tmp_path):
    """A run folder with one checkpoint, as the training loop leaves it."""
    folder = tmp_path / "run" / "checkpoints" / "step_7" / "pretrained_model"
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    elsewhere = EncoderConfig(kind="toy", weights_dir="/nowhere")
    (folder / "encoders.json").write_text(json.dumps(asdict(elsewhere)))
    (folder / "toy_codec_16k.safetensors").write_bytes((media / "toy_codec_16k.safetensors").read_bytes())
    (tmp_path / "run" / "last").symlink_to("checkpoints/step_7", target_is_directory=True)
    return tmp_path / "run"


def test_from_pretrained(published, pipeline):
    expected = pipeline(prompt="a lamp", num_steps=1).latent
    for source in (published, str(published), published / "last", published / "checkpoints/step_7/pretrained_model"):
        loaded = MMAudioPipeline.from_pretrained(source, device="cpu")
        assert torch.equal(loaded(prompt="a lamp", num_steps=1).latent, expected)


def test_encoders_that_were_not_saved_are_those_of_the_run_or_the_defaults(published, media, monkeypatch):
    folder = published / "last" / "pretrained_model"
    (folder / "toy_codec_16k.safetensors").unlink()
    (published / "config.yaml").write_text(
        yaml.safe_dump({"name": "run", "encoders": {"kind": "toy", "weights_dir": str(media)}})
    )
    recipe = load_recipe(published / "config.yaml")
    write_encoder_files(recipe, folder)
    assert json.loads((folder / "encoders.json").read_text()) == {
        "kind": "toy",
        "precision": "fp32",
        "alignment": "timestamps",
        "clip": EncoderConfig().clip,
    }
    assert (folder / "toy_codec_16k.safetensors").is_file()
    (folder / "toy_codec_16k.safetensors").unlink()
    MMAudioPipeline.from_pretrained(published, device="cpu")(prompt="a lamp", num_steps=1)
    (published / "config.yaml").unlink()
    monkeypatch.chdir(published)
    with pytest.raises(ValueError, match=r"ext_weights/toy_codec_16k\.safetensors is missing"):
        MMAudioPipeline.from_pretrained(published, device="cpu")(prompt="a lamp", num_steps=1)


@pytest.mark.parametrize(
    ("weights_dir", "clip", "expected"),
    [
        ("/home/someone/weights", "~/clip", {}),
        ("weights", "/home/someone/clip.pt", {"weights_dir": "weights"}),
        ("weights", "someone/clip", {"weights_dir": "weights", "clip": "someone/clip"}),
    ],
)
def test_paths_of_this_machine_are_not_published(weights_dir, clip, expected, tmp_path):
    encoders = EncoderConfig(weights_dir=weights_dir, clip=clip, precision="bf16", device="cuda:1")
    write_encoder_files(Recipe("r", encoders=encoders), tmp_path)
    saved = json.loads((tmp_path / "encoders.json").read_text())
    assert saved == {"kind": "released", "precision": "bf16", "alignment": "timestamps", **expected}


def test_frames_are_aligned_as_for_training(published, model, config, tmp_path):
    """A rotated file is upright in one alignment and lies in the other, so its results differ."""
    odd = Odd(steady(1.5), audio_seconds=None, rotation=90)
    video = write_odd(tmp_path / "rotated.mp4", odd)
    latents = {
        rule: MMAudioPipeline(model, config, alignment=rule)(video, duration=1.0, num_steps=1).latent
        for rule in ("timestamps", "reference")
    }
    assert not torch.allclose(*latents.values(), atol=1e-4)
    folder = published / "last" / "pretrained_model"
    for saved, given, expected in (
        ("reference", None, "reference"),
        ("timestamps", None, "timestamps"),
        ("reference", "timestamps", "timestamps"),
    ):
        recipe = Recipe("r", encoders=config, extraction=ExtractionConfig(alignment=saved))
        write_encoder_files(recipe, folder)
        pipeline = MMAudioPipeline.from_pretrained(published, device="cpu", alignment=given)
        assert pipeline.alignment == expected
        assert torch.equal(pipeline(video, duration=1.0, num_steps=1).latent, latents[expected])


def test_a_mistyped_run_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: pytest.fail("the Hub was searched"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "example").mkdir(parents=True)
    with pytest.raises(ValueError, match="output/exampel: no such run folder"):
        MMAudioPipeline.from_pretrained("output/exampel")


def test_from_the_hub(published, monkeypatch):
    folder = published / "last" / "pretrained_model"
    used = {}
    monkeypatch.setattr(pretrained, "snapshot_download", lambda repo, **options: used.update(options) or str(folder))
    assert MMAudioPipeline.from_pretrained("someone/toy", device="cpu").sample_rate == 16000
    assert "model.safetensors" in used["allow_patterns"] and "*" not in used["allow_patterns"]


def test_save_generated(pipeline, video, tmp_path):
    result = pipeline(video, duration=1.0, num_steps=1)
    for ending in (".wav", ".flac"):
        samples, rate = read_waveform(save_generated(result, tmp_path / f"a{ending}"))
        assert rate == 16000 and torch.allclose(samples, result.waveform, atol=1e-4)
    with av.open(str(save_generated(result, tmp_path / "a.mp4", video))) as container:
        assert len(container.streams.video) == len(container.streams.audio) == 1
    with pytest.raises(ValueError, match=r"an \.mp4 needs a video"):
        save_generated(result, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"\.wav or \.flac"):
        save_generated(result, tmp_path / "a.ogg")


def test_wrong_requests_are_named_before_the_model_runs(pipeline, tmp_path, video, monkeypatch):
    monkeypatch.setattr(GuidedVelocity, "__call__", lambda *_: pytest.fail("the model ran"))
    audio_file = next((video.parent.parent / "audios").glob("*.flac"))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    wrong = row(0) | {"sync_features": torch.zeros(8, 768)}
    for requests, words in (
        ([Request(), Request(video=tmp_path / "none.mp4")], "none.mp4: no such file"),
        ([Request(video=tmp_path / "broken.mp4")], "broken.mp4"),
        ([Request(video=audio_file)], "no video frames"),
        ([Request(image=audio_file)], "is not an image"),
        ([Request(video=video, image=video)], "a video and an image"),
        ([Request(key="x", **wrong)], r"sync_features of item x are \(8, 768\), this duration needs \(16, 768\)"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline.generate(requests)


def test_encoders_that_are_missing_or_do_not_fit_are_named(model, config, tmp_path, video):
    loaded = load_encoders(EncoderConfig("toy", str(config.weights_dir)), "16k", ("decode",))
    with pytest.raises(ValueError, match="not loaded: clip, sync, text"):
        MMAudioPipeline(model, loaded)(video, "a ball")
    with pytest.raises(ValueError, match=r"toy_codec_16k\.safetensors is missing"):
        MMAudioPipeline(model, EncoderConfig(kind="toy", weights_dir=str(tmp_path)))()
    with pytest.raises(ValueError, match=r"v1-16\.pth is missing"):
        MMAudioPipeline(model, EncoderConfig(weights_dir=str(tmp_path)))(video)
    with pytest.raises(ValueError, match="no latent statistics"):
        MMAudioPipeline(MMAudio.from_variant("small_16k", **SIZES), config)
    other = MMAudio.from_variant("small_44k", **SIZES)
    other.set_latent_statistics(torch.zeros(40), torch.ones(40))
    with pytest.raises(ValueError, match="of mode 16k, the model of 44k"):
        MMAudioPipeline(other, loaded)


def test_folders_without_a_model_are_named(published, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, words in ((tmp_path / "empty", "no trained network"), (tmp_path / "x", "neither"), ("x", "neither")):
        with pytest.raises(ValueError, match=words):
            MMAudioPipeline.from_pretrained(source)
    for text in ('{"kind": "own"}', '{"sort": "toy"}', '{"alignment": "left"}', "{"):
        (published / "last/pretrained_model/encoders.json").write_text(text)
        with pytest.raises(ValueError, match=r"encoders\.json does not describe"):
            MMAudioPipeline.from_pretrained(published)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """2.6 s of changing frames without audio."""
    return write_odd(tmp_path_factory.mktemp("scene") / "scene.mp4", Odd(steady(2.6), audio_seconds=None))


def test_windows_of_a_long_video_are_blended(pipeline, model, config, scene):
    """Against plain code: at every step the velocity of each window, faded linearly where they overlap."""
    result = pipeline(scene, "a red ball", num_steps=2, seed=3)
    length = math.ceil(2.6 * 31.25)
    assert result.latent.shape == (length, 20) and result.waveform.shape == (length * 512,) and not result.note
    starts = window_starts(length, 32, 0.25)
    assert starts == (0, 24, 48, 50)
    encoders = load_encoders(EncoderConfig("toy", str(config.weights_dir)), "16k")
    conditions = []
    for start in starts:
        frames = read_video(scene, duration=1.0, start=start * 512 / 16_000, video_only=True)
        features = (encoders.encode_clip(frames.clip_frames[None]), encoders.encode_sync(frames.sync_frames[None]))
        conditions.append(model.preprocess_conditions(*features, encoders.encode_text(["a red ball"])))
    weights = [torch.ones(32, 1) for _ in starts]
    for before, after in itertools.pairwise(range(4)):
        overlap = 32 - (starts[after] - starts[before])
        ramp = ((torch.arange(overlap) + 0.5) / overlap)[:, None]
        weights[before][32 - overlap :] *= 1 - ramp
        weights[after][:overlap] *= ramp

    @torch.no_grad()
    def velocity(x, t):
        blended, total = torch.zeros_like(x), torch.zeros(length, 1)
        for start, condition, weight in zip(starts, conditions, weights, strict=True):
            window = x[:, start : start + 32]
            empty = model.empty_conditions(1)
            blended[0, start : start + 32] += weight * plain_guided_velocity(model, window, t, condition, empty, 4.5)[0]
            total[start : start + 32] += weight
        return blended / total

    expected = model.unnormalize(sample_euler(velocity, starting_noise(3, "0", (length, 20))[None], 2))[0]
    torch.testing.assert_close(result.latent, expected.detach(), atol=5e-5, rtol=0)
    for batch_size in (1, 3):
        request = Request(key="0", video=scene, prompt="a red ball", seed=3)
        again = next(pipeline.generate([request], batch_size, num_steps=2))
        torch.testing.assert_close(again.latent, result.latent, atol=5e-5, rtol=0)


def test_decoded_pieces_join_without_clicks(pipeline):
    """A piece of another phase than its neighbour would jump; the joins are as smooth as the rest."""
    rate, hop = 16_000, 512

    def decode(latent_BNC):  # the first channel is the time of each latent: a tone that is wrong near the edges
        time = latent_BNC[:, :, :1] + torch.arange(hop) / rate
        tone = torch.sin(2 * math.pi * 440 * time).flatten(1)
        tone[:, : 4 * hop] = 1
        tone[:, -4 * hop :] = -1
        return tone

    latent = (torch.arange(200) * hop / rate)[:, None].expand(-1, 20)
    waveform = decode_chunks(decode, latent, 64, hop)
    assert waveform.shape == (200 * hop,)
    inner = slice(4 * hop, -4 * hop)
    tone = torch.sin(2 * math.pi * 440 * torch.arange(200 * hop) / rate)
    torch.testing.assert_close(waveform[inner], tone[inner], atol=1e-2, rtol=0)
    # And with the real decoder: no step between samples is larger at a join than within the pieces.
    latent = torch.cumsum(0.1 * torch.randn(100, 20, generator=torch.Generator().manual_seed(0)), 0)
    decoder = pipeline._encoders("decode")
    pieces = decode_chunks(decoder.decode_latent, latent, 32, hop)
    whole = decoder.decode_latent(latent[None])[0]
    assert pieces.diff().abs().max() < 1.5 * whole.diff().abs().max()


def test_audio_is_not_longer_than_its_video(pipeline, tmp_path):
    short = write_odd(tmp_path / "short.mp4", Odd(steady(0.8), audio_seconds=None))
    whole = pipeline(short, num_steps=1)
    assert whole.latent.shape == (25, 20) and not whole.note
    longer = pipeline(short, num_steps=1, duration=5.0)
    assert (
        torch.equal(longer.latent, whole.latent)
        and longer.note == "0.80 s long, as its video is, not the requested 5 s"
    )
    tiny = write_odd(tmp_path / "tiny.mp4", Odd(steady(0.4), audio_seconds=None))
    with pytest.raises(ValueError, match=r"tiny\.mp4: duration 0\.4 s is shorter than one sync segment"):
        pipeline(tiny, num_steps=1)


def test_a_still_image_is_seen_all_the_time(pipeline, config, tmp_path):
    for name, codec in (("a.png", "png"), ("a.jpg", "mjpeg")):
        with av.open(str(tmp_path / name), "w", format="image2") as container:
            stream = container.add_stream(
                codec, width=160, height=96, pix_fmt="rgb24" if codec == "png" else "yuvj420p"
            )
            image = av.VideoFrame.from_ndarray(code_image(5, 160, 96), format="rgb24")
            container.mux([*stream.encode(image.reformat(format=stream.pix_fmt)), *stream.encode(None)])
    encoders = load_encoders(EncoderConfig("toy", str(config.weights_dir)), "16k", ("clip",))
    clip = encoders.encode_clip(read_image(tmp_path / "a.png").clip_frames[None])[0].expand(8, -1)
    expected = next(pipeline.generate([Request(clip_features=clip, prompt="a bell")], num_steps=2)).latent
    result = pipeline(image=tmp_path / "a.png", prompt="a bell", num_steps=2).latent
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(result, pipeline(prompt="a bell", num_steps=2).latent, atol=1e-3)
    assert torch.allclose(result, pipeline(image=tmp_path / "a.jpg", prompt="a bell", num_steps=2).latent, atol=0.3)
    longer = pipeline(image=tmp_path / "a.png", num_steps=1, duration=1.5)
    assert longer.latent.shape == (47, 20)


def test_seeds_and_durations_of_items(pipeline, scene):
    """Batches of 1 and 8, an order of its own, items of other lengths between: the same results."""
    requests = [Request(key="a", seed=7, **row(0)), Request(key="b", prompt="x", duration=0.8)]
    requests += [Request(key="c", **row(1))]
    requests += [Request(key="d", video=scene), Request(key="e", seed=7, prompt="x"), Request(key="f", prompt="x")]
    whole = list(pipeline.generate(requests, 8, num_steps=2))
    assert [result.key for result in whole] == list("abcdef")
    assert [len(result.latent) for result in whole] == [32, 25, 32, 82, 32, 32]
    single = {result.key: result for result in pipeline.generate(requests[::-1], 1, num_steps=2)}
    for result in whole:
        assert torch.allclose(result.latent, single[result.key].latent, atol=1e-4), result.key
        # The toy decoder magnifies rounding.
        assert (result.waveform - single[result.key].waveform).norm() < 0.1 * result.waveform.norm(), result.key
    assert not torch.allclose(whole[4].latent, whole[5].latent, atol=0.01)
    assert torch.equal(starting_noise(7, "d", (82, 20))[:32], starting_noise(7, "d", (32, 20)))


def test_items_that_fail_are_passed_to_on_reject(pipeline, scene, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    damaged = truncate(scene, tmp_path / "damaged.mp4", 0.5)
    requests = [Request(key=p.name, video=p) for p in (tmp_path / "broken.mp4", scene, damaged, tmp_path / "gone.mp4")]
    rejected = {}
    results = list(pipeline.generate(requests, num_steps=1, on_reject=lambda r, e: rejected.update({r.key: e.reason})))
    assert [result.key for result in results] == ["scene.mp4"]
    assert rejected == {"broken.mp4": "unreadable", "damaged.mp4": "unreadable", "gone.mp4": "not_found"}
