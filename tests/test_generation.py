"""Generation with a tiny network and toy encoders: conditions, noise, lengths, files, refusals."""

import dataclasses
import json
from dataclasses import asdict
from functools import partial

import av
import numpy as np
import pytest
import torch
import yaml
from golden_data import golden, state_dict, tensor
from odd_media import Odd, steady, write_odd

from mmaudio_hf import generation
from mmaudio_hf.cli.training import write_encoder_files
from mmaudio_hf.config import EncoderConfig, ExtractionConfig, Recipe, load_recipe
from mmaudio_hf.features.encoders import fit_toy_codec, load_encoders
from mmaudio_hf.generation import MMAudioPipeline, Request, save_generated, starting_noise
from mmaudio_hf.media.audio import read_waveform
from mmaudio_hf.media.video import read_video
from mmaudio_hf.models import pretrained
from mmaudio_hf.models.flow import sample_adaptive, sample_euler
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import column_shapes

SIZES = {"hidden_dim": 64, "num_heads": 1, "depth": 2, "fused_depth": 1, "duration": 1.0}


@pytest.fixture(scope="module")
def media(example_media):
    folder = example_media()
    fit_toy_codec(folder, "16k", sorted((folder / "videos").glob("*.mp4")))
    return folder


@pytest.fixture(scope="module")
def config(media):
    return EncoderConfig(kind="toy", weights_dir=str(media))


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = MMAudio.from_variant("small_16k", **SIZES)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.startswith("latent_"):  # an untrained network ignores its conditions
                parameter.add_(0.05 * torch.randn_like(parameter))
    network.set_latent_statistics(torch.full((20,), 0.1), torch.full((20,), 0.5))
    return network


@pytest.fixture
def pipeline(network, config):
    return MMAudioPipeline(network, config)


@pytest.fixture
def video(media):
    return media / "videos" / "test_00_ball.mp4"


def row(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = column_shapes("16k", 1.0)
    names = ("clip_features", "sync_features", "text_features")
    return {name: torch.randn(shapes[name], generator=generator) for name in names}


def test_video_and_prompt(pipeline, video):
    result = pipeline(video, "a red ball", num_steps=2)
    assert result.waveform.shape == (16384,) and result.waveform.dtype == torch.float32
    assert result.sample_rate == 16000 and result.latent.shape == (32, 20)
    assert result.waveform.abs().max() <= 1 and torch.isfinite(result.waveform).all()
    same = pipeline(video, "a red ball", num_steps=2)
    assert torch.equal(result.latent, same.latent)
    for other in (pipeline(video, num_steps=2), pipeline(prompt="a red ball", num_steps=2)):
        assert not torch.allclose(result.latent, other.latent, atol=1e-4)
    for changed in ({"seed": 1}, {"negative_prompt": "hum"}, {"guidance_scale": 1.0}, {"guidance_scale": 0.5}):
        other = pipeline(video, "a red ball", num_steps=2, **changed)
        assert not torch.allclose(result.latent, other.latent, atol=1e-4), changed


def test_latent_is_the_formula(pipeline, network, media, video):
    result = pipeline(video, "a red ball", "hum", num_steps=3, guidance_scale=3.0, seed=5)
    encoders = load_encoders("toy", "16k", weights_dir=media, clip="")
    frames = read_video(video, duration=1.0, pictures_only=True)
    with torch.inference_mode():
        conditions = network.preprocess_conditions(
            encoders.encode_clip(frames.clip_frames[None]),
            encoders.encode_sync(frames.sync_frames[None]),
            encoders.encode_text(["a red ball"]),
        )
        empty = network.empty_conditions(1, encoders.encode_text(["hum"]))
        x0 = starting_noise(5, "0", (32, 20))[None]
        x1 = sample_euler(lambda x, t: network.predict_guided_velocity(x, t, conditions, empty, 3.0), x0, 3)
        latent = network.unnormalize(x1)
        assert torch.allclose(result.latent, latent[0], atol=2e-5)
    # The toy decoder magnifies rounding, so the sound is compared for the very same latent.
    assert torch.equal(encoders.decode_latent(result.latent[None])[0], result.waveform)
    assert torch.equal(pipeline.decode(result.latent), result.waveform)


@pytest.mark.slow
def test_guidance_of_the_golden_network():
    """Both sides as one batch against the recorded two steps with negative text."""
    network, case = (
        MMAudio.from_variant("small_16k").load_released(state_dict("flow_small_16k")),
        "flow_sample_small_16k",
    )
    x = {
        name: tensor(f"{case}/{name}", shape)
        for name, shape in {
            "latent": (1, 250, 20),
            "clip_f": (1, 64, 1024),
            "sync_f": (1, 192, 768),
            "text_f": (1, 77, 1024),
            "negative_text_f": (1, 77, 1024),
        }.items()
    }
    for name in ("clip_f", "text_f"):
        x[name] = x[name] + tensor(f"{case}/{name}_common", (1, 1, 1024))
    with torch.inference_mode():
        conditions = network.preprocess_conditions(x["clip_f"], x["sync_f"], x["text_f"])
        empty = network.empty_conditions(1, x["negative_text_f"])
        velocity = generation.guided_velocity_function(network, conditions, empty, 4.5)
        ours = sample_euler(velocity, x["latent"], 2).numpy()
    theirs = golden(case)["x1_2steps_negative"]
    assert np.linalg.norm(ours - theirs) < 2e-4 * np.linalg.norm(theirs)


def test_batches_and_order_do_not_change_a_sound(pipeline):
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
    encoders = load_encoders("toy", "16k", weights_dir=media, clip="", parts=("clip", "sync", "text"))
    frames = read_video(video, duration=1.0, as_uint8=True, pictures_only=True)
    stored = Request(
        clip_features=encoders.encode_clip(frames.clip_frames[None])[0],
        sync_features=encoders.encode_sync(frames.sync_frames[None])[0],
        text_features=encoders.encode_text(["a red ball"])[0].bfloat16().float(),
    )
    result = next(pipeline.generate([stored], num_steps=2))
    assert torch.allclose(result.latent, pipeline(video, "a red ball", num_steps=2).latent, atol=1e-2)


def test_starting_noise():
    noise = starting_noise(3, "a", (250, 20))
    assert noise.shape == (250, 20) and noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert torch.equal(noise, starting_noise(3, "a", (250, 20)))
    for other in (starting_noise(4, "a", (250, 20)), starting_noise(3, "b", (250, 20))):
        assert not torch.isclose(noise, other).any(1).all()


def test_other_durations_leave_the_network_as_it_was(pipeline, network, video):
    requests = [Request(video=video), Request(prompt="a lamp")]
    results = pipeline.generate(requests, 1, duration=2.0, num_steps=1)
    assert next(results).waveform.shape == (63 * 512,)
    assert (network.latent_length, network.clip_length, network.sync_length) == (32, 8, 16)  # between two results too
    assert next(results).latent.shape == (63, 20)
    # The tables made on the way must not be inference tensors: a network may be trained on.
    x = {name: value[None] for name, value in row(0).items()}
    network.train()(torch.randn(1, 32, 20), *x.values(), torch.tensor([0.5])).sum().backward()


def test_adaptive_solver_and_bf16(pipeline, network, config, monkeypatch):
    monkeypatch.setattr(generation, "sample_adaptive", partial(sample_adaptive, rtol=1e-3, atol=1e-3))  # 10 s less
    options = {"prompt": "a lamp", "guidance_scale": 0}
    exact, fine = pipeline(**options, solver="adaptive").latent, pipeline(**options, num_steps=40).latent
    assert torch.allclose(exact, fine, atol=0.05) and not torch.allclose(exact, pipeline(**options, num_steps=1).latent)
    rough = MMAudioPipeline(network, config, precision="bf16")(**options, num_steps=40).latent
    assert rough.dtype == torch.float32 and not torch.equal(rough, fine) and torch.allclose(rough, fine, atol=0.1)


@pytest.fixture
def published(network, media, tmp_path):
    """A run folder with one checkpoint, as the training loop leaves it."""
    folder = tmp_path / "run" / "checkpoints" / "step_7" / "pretrained_model"
    folder.mkdir(parents=True)
    network.save_pretrained(folder)
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


def test_encoders_that_were_not_noted_are_those_of_the_run_or_the_usual_ones(published, media, monkeypatch):
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


def test_paths_of_this_machine_are_not_published(tmp_path):
    for weights_dir, clip, expected in (
        ("/home/someone/weights", "~/clip", {}),
        ("weights", "/home/someone/clip.pt", {"weights_dir": "weights"}),
        ("weights", "someone/clip", {"weights_dir": "weights", "clip": "someone/clip"}),
    ):
        encoders = EncoderConfig(weights_dir=weights_dir, clip=clip, precision="bf16", device="cuda:1")
        write_encoder_files(Recipe("r", encoders=encoders), tmp_path)
        noted = json.loads((tmp_path / "encoders.json").read_text())
        assert noted == {"kind": "released", "precision": "bf16", "alignment": "timestamps", **expected}


def test_pictures_are_read_as_for_training(published, network, config, tmp_path):
    """A rotated file is upright in one alignment and lies in the other, so its sounds differ."""
    odd = Odd(steady(1.5), sound_seconds=None, rotation=90)
    video = write_odd(tmp_path / "rotated.mp4", odd)
    sounds = {
        rule: MMAudioPipeline(network, config, alignment=rule)(video, num_steps=1).latent
        for rule in ("timestamps", "reference")
    }
    assert not torch.allclose(*sounds.values(), atol=1e-4)
    folder = published / "last" / "pretrained_model"
    for noted, asked, expected in (
        ("reference", None, "reference"),
        ("timestamps", None, "timestamps"),
        ("reference", "timestamps", "timestamps"),
    ):
        recipe = Recipe("r", encoders=config, extraction=ExtractionConfig(alignment=noted))
        write_encoder_files(recipe, folder)
        pipeline = MMAudioPipeline.from_pretrained(published, device="cpu", alignment=asked)
        assert pipeline.alignment == expected
        assert torch.equal(pipeline(video, num_steps=1).latent, sounds[expected])


def test_a_mistyped_run_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "example").mkdir(parents=True)
    with pytest.raises(ValueError, match="output/exampel: no such run folder"):
        MMAudioPipeline.from_pretrained("output/exampel")


def test_from_the_hub(published, monkeypatch):
    folder = published / "last" / "pretrained_model"
    asked = {}
    monkeypatch.setattr(pretrained, "snapshot_download", lambda repo, **options: asked.update(options) or str(folder))
    assert MMAudioPipeline.from_pretrained("someone/toy", device="cpu").sample_rate == 16000
    assert "model.safetensors" in asked["allow_patterns"] and "*" not in asked["allow_patterns"]


def test_save_generated(pipeline, video, tmp_path):
    result = pipeline(video, num_steps=1)
    for ending in (".wav", ".flac"):
        samples, rate = read_waveform(save_generated(result, tmp_path / f"a{ending}"))
        assert rate == 16000 and torch.allclose(samples, result.waveform, atol=1e-4)
    with av.open(str(save_generated(result, tmp_path / "a.mp4", video))) as container:
        assert len(container.streams.video) == len(container.streams.audio) == 1
    with pytest.raises(ValueError, match=r"an \.mp4 needs the video"):
        save_generated(result, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"\.wav or \.flac"):
        save_generated(result, tmp_path / "a.ogg")


def test_refusals_come_first(pipeline, network, config, published, tmp_path, video, monkeypatch):
    monkeypatch.setattr(MMAudio, "predict_velocity", lambda *_: pytest.fail("the network ran"))
    recording = next((video.parent.parent / "audios").glob("*.flac"))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    wrong = row(0) | {"sync_features": torch.zeros(8, 768)}
    for requests, options, words in (
        ([Request(), Request(video=tmp_path / "none.mp4")], {}, "none.mp4: no such file"),
        ([Request(video=tmp_path / "broken.mp4")], {}, "broken.mp4"),
        ([Request(video=recording)], {}, "no pictures"),
        ([Request(key="x", **wrong)], {}, r"sync_features of item x are \(8, 768\), this duration needs \(16, 768\)"),
        ([Request()], {"duration": 0.3}, "0.3 s is shorter"),
        ([Request()], {"num_steps": 0}, "num_steps"),
        ([Request()], {"batch_size": 0}, "batch_size"),
        ([Request()], {"guidance_scale": float("nan")}, "guidance_scale"),
        ([Request()], {"solver": "heun"}, "euler, adaptive"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline.generate(requests, **options)  # before the first result is asked for
    with pytest.raises(ValueError, match="shorter duration"):
        pipeline(video, duration=30.0)
    ready = load_encoders("toy", "16k", weights_dir=config.weights_dir, clip="", parts=("decode",))
    with pytest.raises(ValueError, match="not loaded: clip, sync, text"):
        MMAudioPipeline(network, ready)(video, "a ball")
    with pytest.raises(ValueError, match=r"toy_codec_16k\.safetensors is missing"):
        MMAudioPipeline(network, EncoderConfig(kind="toy", weights_dir=str(tmp_path)))()
    with pytest.raises(ValueError, match=r"v1-16\.pth is missing"):
        MMAudioPipeline(network, EncoderConfig(weights_dir=str(tmp_path)))(video)
    with pytest.raises(ValueError, match="no latent statistics"):
        MMAudioPipeline(MMAudio.from_variant("small_16k", **SIZES), config)
    with pytest.raises(ValueError, match="of mode 16k, the network of 44k"):
        other = MMAudio.from_variant("small_44k", **SIZES)
        other.set_latent_statistics(torch.zeros(40), torch.ones(40))
        MMAudioPipeline(other, ready)
    for source, words in ((tmp_path, "no trained network"), (tmp_path / "x", "neither"), ("nothing", "neither")):
        with pytest.raises(ValueError, match=words):
            MMAudioPipeline.from_pretrained(source)
    for text in ('{"kind": "own"}', '{"sort": "toy"}', '{"alignment": "left"}', "{"):
        (published / "last/pretrained_model/encoders.json").write_text(text)
        with pytest.raises(ValueError, match=r"encoders\.json does not describe"):
            MMAudioPipeline.from_pretrained(published)
