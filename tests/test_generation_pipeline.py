"""The pipeline as users of Hugging Face pipelines call it: lists, frames, seeds, steps, dtypes, adapters, threads."""

import ast
import inspect
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hub_server import TOKEN, USER, Hub
from odd_media import Odd, code_image, steady, write_odd
from peft import LoraConfig, get_peft_model
from PIL import Image
from published import SIZES, write_network
from safetensors.torch import load_file, save_file

from mmaudio_hf import MMAudio, MMAudioPipeline
from mmaudio_hf.cli import main
from mmaudio_hf.config import EncoderConfig
from mmaudio_hf.generation import Generated, Request, save_generated
from mmaudio_hf.media.video import array_windows, read_windows

RATE = 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("run"))


@pytest.fixture
def pipeline(folder):
    pipeline = MMAudioPipeline.from_pretrained(folder, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def video(folder):
    return folder / "source.mp4"


@pytest.fixture(scope="module")
def frames():
    """30 frames of 96 x 80 pixels, at 25 Hz."""
    return np.stack([code_image(number, 96, 80) for number in range(30)])


def close(a: Generated, b: Generated) -> bool:
    return a.latent.shape == b.latent.shape and torch.allclose(a.latent, b.latent, atol=1e-4)


def test_lists_give_one_audio_for_each_entry(pipeline, video):
    results = pipeline(prompt=["a bell", "a dog"], negative_prompt="hum", num_inference_steps=2, batch_size=2)
    requests = [Request(prompt=text, negative_prompt="hum") for text in ("a bell", "a dog")]
    for result, expected in zip(results, pipeline.generate(requests, num_steps=2), strict=True):
        assert close(result, expected) and result.key == expected.key and result.seed == 0
    mixed = pipeline([video, None], ["a bell", None], duration=[1.0, 0.8], seed=[3, np.int64(4)], num_steps=2)
    assert [len(result.latent) for result in mixed] == [32, 25] and [result.seed for result in mixed] == [3, 4]
    assert close(mixed[0], pipeline(video, "a bell", duration=1.0, seed=3, num_steps=2))
    assert isinstance(pipeline(prompt=["a bell"], num_steps=1), list)
    for wrong in ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, {"prompt": []}, {"prompt": ["a", "b"], "seed": [1, None]}):
        with pytest.raises(ValueError, match=r"seed|prompt"):
            pipeline(**wrong)


def test_frames_are_as_good_as_their_file(pipeline, frames, tmp_path):
    """A lossless file of these frames, arrays with the colours first or last, and floats give the same."""
    with av.open(str(tmp_path / "lossless.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE, width=96, height=80, pix_fmt="bgr0")
        coded = (av.VideoFrame.from_ndarray(image, format="rgb24") for image in frames)
        container.mux([packet for frame in (*coded, None) for packet in stream.encode(frame)])
    size = {"mode": "16k", "duration": 0.8}
    first = torch.from_numpy(frames).movedim(-1, 1)
    for given in (frames, first, first.float() / 255, frames.astype(np.float64) / 255):
        read = read_windows(tmp_path / "lossless.mkv", [0, 0.32], **size)
        for ours, theirs in zip(array_windows(given, RATE, [0, 0.32], **size), read, strict=True):
            assert torch.equal(ours.clip_frames, theirs.clip_frames)
            assert torch.equal(ours.sync_frames, theirs.sync_frames)
    result = pipeline(frames, "a bell", frame_rate=RATE, num_steps=2)
    images = [Image.fromarray(frame) for frame in frames]
    for listed in (images, list(frames), list(first), [images[0], *first[1:].movedim(1, -1)]):  # of one video
        assert close(pipeline(listed, "a bell", frame_rate=RATE, num_steps=2), result)
    assert [len(one.latent) for one in pipeline([images, frames], frame_rate=RATE, num_steps=1)] == [38, 38]
    assert close(result, pipeline(tmp_path / "lossless.mkv", "a bell", num_steps=2)) and len(result.latent) == 38
    slow = pipeline([frames, frames], frame_rate=[RATE, 10], num_steps=1)
    assert [len(one.latent) for one in slow] == [38, 94]
    longer = pipeline(frames, frame_rate=RATE, duration=5.0, num_steps=1)
    assert longer.note.startswith("1.20 s long, as its video is")
    stills = (frames[0], first[0], first[0].half() / 255, images[0])
    still = [pipeline(image=image, num_steps=2) for image in stills]
    assert all(close(still[0], other) for other in still)
    assert all(close(still[0], one) for one in pipeline(image=images[:1] * 2, num_steps=2, seed=[0, 0])[:1])
    assert not close(still[0], pipeline(image=frames[0][::-1].copy(), num_steps=2))


def test_seeds_are_drawn_and_returned(pipeline):
    drawn = [pipeline(prompt="a bell", num_steps=1, seed=None) for _ in range(2)]
    assert drawn[0].seed != drawn[1].seed and not close(*drawn)
    assert close(drawn[0], pipeline(prompt="a bell", num_steps=1, seed=drawn[0].seed))
    generator = torch.Generator().manual_seed(7)
    first, second = (pipeline(prompt="a bell", num_steps=1, generator=generator) for _ in range(2))
    again = pipeline(prompt="a bell", num_steps=1, generator=torch.Generator().manual_seed(7))
    assert close(first, again) and not close(first, second)
    several = pipeline(prompt="a bell", num_steps=1, generator=[torch.Generator().manual_seed(n) for n in (7, 8)])
    assert several[0].seed == first.seed != several[1].seed
    for wrong in ({"generator": generator, "seed": 3}, {"generator": 7}):
        with pytest.raises(ValueError, match="generator"):
            pipeline(prompt="a bell", **wrong)


def test_steps_call_back_and_show_a_bar(pipeline, capsys):
    calls = []

    def keep(caller, step, t, values):
        calls.append((caller is pipeline, step, t, tuple(values["latents"].shape)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 1 else None

    ended = pipeline(prompt=["a", "b"], num_inference_steps=2, callback_on_step_end=keep)
    assert calls == [(True, 0, 0.5, (2, 32, 20)), (True, 1, 1.0, (2, 32, 20))]
    inputs = {"callback_on_step_end_tensor_inputs": ["latents"]}
    pipeline(num_steps=1, callback_on_step_end=lambda pipe, i, t, callback_kwargs: callback_kwargs, **inputs)
    assert torch.equal(ended[0].latent, pipeline.model.unnormalize(torch.zeros(1, 32, 20))[0].detach())
    with pytest.raises(ValueError, match=r"callback_on_step_end must return latents of the shape \(1, 32, 20\)"):
        pipeline(num_steps=1, callback_on_step_end=lambda *_: {"latents": None})
    with pytest.raises(ValueError, match="callback_on_step_end needs the solver euler"):
        pipeline(solver="adaptive", callback_on_step_end=keep)
    assert "step" not in capsys.readouterr().err
    pipeline.set_progress_bar_config(desc="sampling")
    pipeline(num_steps=3)
    assert "sampling" in (shown := capsys.readouterr().err) and "3/3" in shown


def test_threads_share_a_pipeline_and_pipelines_a_network(pipeline):
    """A web server: videos of several lengths at once, each as when it is alone."""
    other = MMAudioPipeline(pipeline.model, pipeline._source)
    other.set_progress_bar_config(disable=True)
    durations = [0.8, 1.0, 1.5, 2.6] * 3
    alone = {d: pipeline(prompt="a dog", duration=d, num_steps=4) for d in set(durations)}

    def one(index: int) -> Generated:
        return (pipeline, other)[index % 2](prompt="a dog", duration=durations[index], num_steps=4)

    # With as many threads of torch as here, which sums in another order with others: a loader that ran in this process
    # before sets the number that new threads have.
    same = {"initializer": torch.set_num_threads, "initargs": (torch.get_num_threads(),)}
    with ThreadPoolExecutor(4, **same) as threads:
        for duration, result in zip(durations, threads.map(one, range(len(durations))), strict=True):
            assert torch.equal(result.latent, alone[duration].latent), duration
            assert torch.equal(result.waveform, alone[duration].waveform), duration


def test_dtypes_and_devices_as_other_pipelines_have_them(folder, pipeline, monkeypatch):
    def run(one: MMAudioPipeline) -> torch.Tensor:
        one.set_progress_bar_config(disable=True)
        return one(prompt="a bell", num_steps=4).latent

    exact, load = run(pipeline), MMAudioPipeline.from_pretrained
    half = {name: run(load(folder, device="cpu", precision=name)) for name in ("bf16", "fp16")}
    for precision, named in (("bf16", torch.bfloat16), ("fp16", "float16")):
        for option in ("dtype", "torch_dtype"):
            assert torch.equal(run(load(folder, device=None, **{option: named})), half[precision])
        assert 1e-5 < (half[precision] - exact).abs().max() < 0.1
    assert torch.equal(run(pipeline.to("cpu", torch.bfloat16)), half["bf16"]) and pipeline.dtype == torch.bfloat16
    assert torch.equal(run(pipeline.to(dtype="float32", device="cpu")), exact)
    for wrong in ({"dtype": torch.int8}, {"torch_dtype": "half-ish"}, {"dtype": torch.float16, "precision": "bf16"}):
        with pytest.raises(ValueError, match="dtype"):
            load(folder, device="cpu", **wrong)
    for device in ("cuda", "cuda:0", "0", 0, "mps", "meta", "cuda:x", "None", "gpu"):
        for move in (pipeline.to, lambda device: load(folder, device=device)):
            with pytest.raises(ValueError, match="device"):
                move(device)
    with pytest.raises(ValueError, match="one device and one dtype"):
        pipeline.to("cpu", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="only cuda:0 to cuda:1"):
        pipeline.to(2)


def test_compiled_blocks_give_the_same_audio(folder, pipeline, adapters, monkeypatch):
    expected = pipeline(prompt="a bell", num_steps=2)
    compiled = MMAudioPipeline.from_pretrained(folder, device="cpu").compile()
    compiled.set_progress_bar_config(disable=True)
    assert close(compiled(prompt="a bell", num_steps=2), expected) and "cpu, compiled" in repr(compiled)
    assert all(block._compiled_call_impl is not None for block in compiled.model.blocks)
    for one in (compiled, pipeline):  # weights change in place, and nothing is compiled again
        one.load_lora_weights(next(iter(adapters)))
    assert close(compiled(prompt="a bell", num_steps=2), pipeline(prompt="a bell", num_steps=2))
    assert not close(pipeline(prompt="a bell", num_steps=2), expected)
    monkeypatch.setattr(torch, "compile", lambda function: function.missing)
    with pytest.raises(ValueError, match="compile does not work here"):
        pipeline.compile()


def test_negative_text_features_replace_the_negative_prompt(pipeline):
    hum, bell = pipeline._encoders("text").encode_text(["hum", "a bell"])
    expected = pipeline(prompt="a bell", negative_prompt="hum", num_steps=2)
    assert close(pipeline(text_features=bell, negative_text_features=hum, num_steps=2), expected)
    assert close(pipeline(prompt="a bell", negative_text_features=[hum, None], num_steps=2)[0], expected)
    assert not close(pipeline(prompt="a bell", num_steps=2), expected)


def test_results_can_be_read_and_played(pipeline):
    result = pipeline(prompt="<b>", num_steps=1)
    assert repr(result) == "Generated(1.02 s at 16000 Hz, latent (32, 20), key='0', seed=0)"
    page = result._repr_html_()
    assert page.startswith('<figure><audio controls src="data:audio/wav;base64,UklGR') and "&#x27;0&#x27;" in page
    assert np.array_equal(result.audios[0], result.waveform.numpy()) and len(result.audios) == 1
    several = pipeline(prompt=["a", "b"], num_steps=1)
    assert several._repr_html_().count("<audio controls") == 2
    assert [audio.shape for audio in several.audios] == [(16384,)] * 2
    text = repr(pipeline)
    assert "network: small_16k, 1.8 M parameters, 1 s at 16000 Hz" in text and "loaded: decode, clip" in text


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Adapters that peft wrote: plain LoRA, rsLoRA and DoRA, each with the state that peft merges them to."""
    merged = {}
    for number, kind in enumerate(({}, {"use_rslora": True}, {"use_dora": True})):
        network = MMAudio.from_pretrained(folder)
        targets = [n for n, _ in network.named_modules() if n.endswith(("attn.qkv", "linear1", "ffn.w1", "ffn.w2"))]
        wrapped = get_peft_model(network, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **kind))
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        path = tmp_path_factory.mktemp("adapter")
        wrapped.save_pretrained(path)
        merged[path] = wrapped.merge_and_unload().state_dict()
    return merged


def test_adapters_are_merged_scaled_and_unloaded(pipeline, adapters):
    before = {name: value.clone() for name, value in pipeline.model.state_dict().items()}
    fingerprint = pipeline.fingerprint(Request(prompt="a"))
    for number, (path, expected) in enumerate(adapters.items()):
        pipeline.load_lora_weights(path)
        for name, value in pipeline.model.state_dict().items():
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
        pipeline.set_adapters([])
        assert pipeline.adapters == {} and f"adapter_{number}" in pipeline._loaded_adapters
    assert pipeline.fingerprint(Request(prompt="a")) == fingerprint
    pipeline.set_adapters(["adapter_0", "adapter_1"], [0.5, 2.0])
    assert pipeline.fingerprint(Request(prompt="a")) != fingerprint and "adapter_1 x 2" in repr(pipeline)
    plain, rank_stable = list(adapters.values())[:2]
    for name, value in pipeline.model.state_dict().items():
        both = before[name] + 0.5 * (plain[name] - before[name]) + 2 * (rank_stable[name] - before[name])
        torch.testing.assert_close(value, both, atol=1e-5, rtol=0)
    pipeline.unload_lora_weights()
    assert all(torch.equal(value, before[name]) for name, value in pipeline.model.state_dict().items())
    assert sum(parameter.requires_grad for parameter in pipeline.model.parameters()) > 50


def test_adapters_that_do_not_fit_leave_the_pipeline_as_it_was(pipeline, adapters, tmp_path):
    network = MMAudio.from_variant("small_16k", **SIZES | {"hidden_dim": 128, "num_heads": 2})
    other = get_peft_model(network, LoraConfig(r=2, target_modules=["qkv"]))
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "run" / "last" / "adapter").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run/last/adapter" / name).write_bytes((next(iter(adapters)) / name).read_bytes())
    pipeline.load_lora_weights(tmp_path / "run", 0.5, "mine")
    before = {name: value.clone() for name, value in pipeline.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{tmp_path / 'other'}: the adapter does not fit"):
        pipeline.load_lora_weights(tmp_path / "other")
    state = load_file(tmp_path / "run/last/adapter/adapter_model.safetensors")
    for name, changed in (
        ("short", dict(list(state.items())[2:])),
        ("long", state | {"x.lora_A.weight": torch.ones(1)}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_bytes(
            (next(iter(adapters)) / "adapter_config.json").read_bytes()
        )
        save_file(changed, tmp_path / name / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="configuration and its tensors differ in"):
            pipeline.load_lora_weights(tmp_path / name)
    (tmp_path / "run/last/adapter/adapter_config.json").write_text("{")
    for wrong, words in (
        (lambda: pipeline.load_lora_weights(tmp_path / "run", 0.5, "again"), r"adapter_config\.json is not valid JSON"),
        (lambda: pipeline.load_lora_weights(tmp_path / "none"), "neither a folder nor a Hub id"),
        (lambda: pipeline.load_lora_weights(tmp_path), "holds no adapter"),
        (lambda: pipeline.load_lora_weights(tmp_path / "other", "much"), "scale must be a number"),
        (lambda: pipeline.load_lora_weights(tmp_path / "other", 1.0, "mine"), "adapter_name 'mine' is taken"),
        (lambda: pipeline.set_adapters("yours"), "adapter_names: 'yours' is not loaded; loaded: mine"),
        (lambda: pipeline.set_adapters(["mine"], [1.0, 2.0]), "adapter_weights has 2 numbers for 1"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    assert pipeline.adapters == {"mine": 0.5}
    assert all(torch.equal(value, before[name]) for name, value in pipeline.model.state_dict().items())


def test_a_pipeline_is_saved_and_loaded(folder, adapters, tmp_path):
    """As pipelines of diffusers: the folder alone gives the same audio, with the adapters that were set."""
    pipeline = MMAudioPipeline.from_pretrained(folder, alignment="reference")
    plain = pipeline(prompt="a bell", num_steps=2, progress=False)
    pipeline.load_lora_weights(next(iter(adapters)), 0.8, "bells")
    expected = pipeline(folder / "source.mp4", "a bell", num_steps=2, progress=False)
    pipeline.save_pretrained(tmp_path / "saved")
    names = ["README.md", "config.json", "encoders.json", "model.safetensors", "toy_codec_16k.safetensors"]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == names
    assert "Merged into these weights: bells x 0.8." in (tmp_path / "saved" / "README.md").read_text()
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    again = MMAudioPipeline.from_pretrained(moved)
    assert again.alignment == "reference" and again.adapters == {}
    result = again(folder / "source.mp4", "a bell", num_steps=2, progress=False)
    assert torch.equal(result.waveform, expected.waveform) and torch.equal(result.latent, expected.latent)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(moved)  # over what is there, and then to where it was loaded from
    MMAudioPipeline.from_pretrained(moved).save_pretrained(moved)
    last = MMAudioPipeline.from_pretrained(moved)(prompt="a bell", num_steps=2, progress=False)
    assert torch.equal(last.waveform, plain.waveform) and "bells" not in (moved / "README.md").read_text()
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", 3):
        with pytest.raises(ValueError, match=r"is a file, not a folder|save_directory must be"):
            pipeline.save_pretrained(wrong)


def test_encoder_files_are_named_or_copied(folder, tmp_path):
    """Those of a release: by their paths, or beside the weights, where they are found again."""
    encoders = EncoderConfig(weights_dir=str(tmp_path / "ext"), clip="me/clip")
    pipeline = MMAudioPipeline(MMAudio.from_pretrained(folder), encoders)
    pipeline.save_pretrained(tmp_path / "named")
    assert MMAudioPipeline.from_pretrained(tmp_path / "named")._source == encoders
    with pytest.raises(ValueError, match=r"synchformer_state_dict\.pth is missing"):
        pipeline.save_pretrained(tmp_path / "copied", copy_encoders=True)
    assert not (tmp_path / "copied").exists()
    (tmp_path / "ext").mkdir()
    for name in ("synchformer_state_dict.pth", "v1-16.pth", "best_netG.pt"):
        (tmp_path / "ext" / name).write_bytes(name.encode())
    pipeline.save_pretrained(tmp_path / "copied", copy_encoders=True)
    assert (tmp_path / "copied" / "best_netG.pt").read_bytes() == b"best_netG.pt"
    loaded = MMAudioPipeline.from_pretrained(tmp_path / "copied")._source
    assert (loaded.weights_dir, loaded.clip) == (str(tmp_path / "copied"), "me/clip")


def test_the_command_takes_adapters_seeds_and_devices(folder, adapters, tmp_path, capsys):
    def run(*words, code=0):
        command = ["generate", "--run", folder, "--prompt", "a", "--steps", "1", "--out", tmp_path / "a.wav", *words]
        assert main([str(word) for word in command]) == code
        output = capsys.readouterr()
        return output.out if code == 0 else output.err.strip().splitlines()[-1]

    plain, other = list(adapters)[:2]
    sizes = {}
    for words in ((), ("--lora", plain), ("--lora", plain, "--lora-scale", "0.5"), ("--lora", plain, "--lora", other)):
        run(*words)
        sizes[words] = (tmp_path / "a.wav").read_bytes()
    assert len(set(sizes.values())) == 4
    assert "--lora-scale 2 times" in run("--lora", plain, "--lora-scale", "1", "--lora-scale", "2", code=2)
    assert "seed " in run("--seed", "random") and "seed " not in run("--seed", "3")
    for device in ("cuda:0", "mps", "0", "None", "meta"):
        assert run("--device", device, code=2).startswith("error: device '")
    assert "duration: 1e+09 s is longer than the 3600 s that are gen" in run("--duration", "1e9", code=2)
    assert run("--duration", "0.5", code=2).startswith("error: duration 0.5 s is shorter")
    assert "window" in run("--window", "1e9", code=2) and "seed" in run("--seed", str(2**70), code=2)


# --- wrong arguments -------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
WRONG = {
    "video": (3, "", "nowhere.mp4", [[np.zeros((9, 9, 3), np.uint8)]], np.zeros((9, 9)), torch.zeros(2, 9, 9, 4)),
    "prompt": (3, b"a", [3], [["a"]], torch.zeros(3)),
    "negative_prompt": (3, ["a", 4]),
    "image": (3, "nowhere.png", np.zeros((2, 9, 9, 3)), np.full((9, 9, 3), 2.0), np.zeros((9, 9, 3), np.int64)),
    "duration": ("5", NAN, -1, 0, 0.3, 1e9, INF, True, [1.0, "x"]),
    "window": ("5", NAN, -1, 0.3, 1e9, True),
    "num_inference_steps": (0, -1, 2.5, "25", True, 10**9, NAN),
    "num_steps": (0, 2.5, "25"),
    "guidance_scale": (-1, NAN, INF, "4.5", True, None),
    "seed": (1.5, "1", 2**70, -(2**70), True, [1.5]),
    "generator": (3, "cpu", [None]),
    "solver": ("heun", None, 3),
    "batch_size": (0, 1.5, "8", True),
    "text_features": (3, torch.zeros(7, 1024), torch.zeros(77, 1024, dtype=torch.int64), np.zeros((77, 1024))),
    "negative_text_features": (3, torch.zeros(77, 3)),
    "callback_on_step_end": (3, "print"),
    "frame_rate": (25, [25.0]),
    "callback_on_step_end_tensor_inputs": (["prompt_embeds"], None, 3),
    "progress": (None, 1, "yes"),
    "on_reject": (3, "print"),
    "output_type": ("np",),
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_every_wrong_argument_is_named(pipeline, name, value, monkeypatch):
    monkeypatch.setattr(MMAudioPipeline, "_sample", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError) as caught:
        pipeline(**{name: value})
    assert name in str(caught.value) or str(value) in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


JUNK = (
    *(-1, NAN, INF, 10**30, b"x", {}, object(), [[]], [None], ["x", 3], np.zeros(3), torch.zeros(2, 2)),
    *(torch.full((77, 1024), NAN), Image.new("RGB", (8, 8)), [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))]),
)
TAKES = {"seed": (-1,), "callback_on_step_end": (), "device": (), "adapter_weights": (-1,), "scale": (-1,)}
TAKES |= {"image": (JUNK[-2], JUNK[-1], [None]), "video": ([None],), "prompt": ([None],), "negative_prompt": ([None],)}
TAKES |= dict.fromkeys(("duration", "frame_rate", "text_features", "negative_text_features"), ([None],))


def arguments(pipeline, folder):
    """(name of an argument, function of a value for it) of everything that the pipeline offers."""
    for name in (
        inspect.signature(pipeline.__call__).parameters.keys() | inspect.signature(pipeline.generate).parameters
    ):
        if name not in ("options", "requests"):
            yield name, lambda value, name=name: pipeline(**{name: value})
    load = partial(MMAudioPipeline.from_pretrained, folder)
    for name in ("device", "encoders", "precision", "alignment", "torch_dtype", "dtype", "revision", "subfolder"):
        yield name, lambda value, name=name: load(**{"device": "cpu"} | {name: value})
    for name in ("token", "cache_dir", "local_files_only", "force_download"):
        yield name, lambda value, name=name: load(device="cpu", **{name: value})
    for name in ("model", "encoders", "precision", "alignment"):
        given = {"model": pipeline.model, "encoders": pipeline._source}
        yield name, lambda value, name=name, given=given: MMAudioPipeline(**given | {name: value})
    for name in ("key", "clip_features", "sync_features"):
        yield name, lambda value, name=name: pipeline.generate([Request(**{name: value})])
    yield "source", MMAudioPipeline.from_pretrained
    yield "device", pipeline.to
    yield "dtype", lambda value: pipeline.to(dtype=value)
    yield "source", pipeline.load_lora_weights
    yield "scale", lambda value: pipeline.load_lora_weights(folder, value)
    yield "adapter_name", lambda value: pipeline.load_lora_weights(folder, adapter_name=value)
    yield "adapter_names", pipeline.set_adapters
    yield "adapter_weights", lambda value: pipeline.set_adapters([], value)
    yield "latent", pipeline.decode
    yield "request", pipeline.fingerprint
    yield "requests", pipeline.generate
    yield "colour of the bar", lambda value: pipeline.set_progress_bar_config(**{"colour of the bar": value})


def test_nothing_that_is_given_ends_in_a_traceback(pipeline, folder, monkeypatch):
    """Every argument of every function with values of wrong kinds, shapes and sizes: one sentence that names it."""
    monkeypatch.setattr(MMAudioPipeline, "_sample", lambda *_: 1 / 0)
    faults, before, count = [], repr(pipeline), 0
    for name, call in arguments(pipeline, folder):
        for value in JUNK:
            if any(value is one or (isinstance(value, int | list) and value == one) for one in TAKES.get(name, ())):
                continue
            count += 1
            try:
                call(value)
                faults.append((name, value, "is taken"))
            except ValueError as error:
                if name not in str(error) or "\n" in str(error) or len(str(error)) > 300:
                    faults.append((name, value, error))
            except Exception as error:
                faults.append((name, value, error))
    assert not faults, "\n".join(f"{name}={str(value)[:60]}: {problem!r}" for name, value, problem in faults)
    assert count > 500 and repr(pipeline) == before


@pytest.mark.parametrize("rate", [None, 0, -1, NAN, "25", True, [25, "x"]])
def test_frames_need_a_rate(pipeline, frames, rate):
    with pytest.raises(ValueError, match="frame_rate"):
        pipeline([frames, frames] if isinstance(rate, list) else frames, frame_rate=rate)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_map": "auto"}, "device_map.*choose the device by device="),
        ({"variant": "fp16", "use_safetensors": True}, "does not know use_safetensors, variant"),
        ({"subfolder": "ema"}, "ema holds no trained network"),
        ({"subfolder": "../x"}, "subfolder"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"alignment": "left"}, "alignment 'left'"),
        ({"encoders": "toy"}, "encoders"),
        ({"torch_dtype": 3}, "torch_dtype must be .*, not 3"),
    ],
)
def test_every_wrong_argument_of_from_pretrained_is_named(folder, options, words):
    with pytest.raises(ValueError, match=words):
        MMAudioPipeline.from_pretrained(folder, **{"device": "cpu"} | options)
    local = {"token": "hf_x", "cache_dir": "cache", "local_files_only": True, "revision": "main"}
    assert MMAudioPipeline.from_pretrained(folder, device="cpu", **local).sample_rate == 16000


def test_arguments_of_the_hub_are_honoured(folder, adapters, pipeline, tmp_path, monkeypatch):
    """A private repository with a network in a folder of its own, an adapter, and released weights alone."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}
    adapter = {path.name: path.read_bytes() for path in next(iter(adapters)).iterdir()}
    with Hub(tmp_path / "hub") as hub:
        hub.use_here(monkeypatch, tmp_path / "home", token=None)
        run = {f"adapter/{n}": c for n, c in adapter.items()}  # as a run is pushed
        for name, content in (("net", {f"ema/{n}": c for n, c in files.items()}), ("lora", adapter), ("run", run)):
            hub.repository(f"{USER}/{name}").create(private=True)
            hub.repository(f"{USER}/{name}").add(content)
        hub.repository(f"{USER}/released").create(private=False)
        hub.repository(f"{USER}/released").add({"weights/mmaudio_small_16k.pth": b"", "ext_weights/v1-16.pth": b""})
        load = partial(MMAudioPipeline.from_pretrained, f"{USER}/net", device="cpu", cache_dir=tmp_path / "cache")
        for wrong, words in (
            ({"subfolder": "ema"}, "is not there, or private"),
            ({"token": TOKEN}, "holds no network: it has no config.json"),
            ({"token": TOKEN, "subfolder": "raw"}, "folder raw, holds no network"),
            ({"token": TOKEN, "subfolder": "ema", "revision": "v9"}, "no such revision"),
            ({"local_files_only": True, "subfolder": "ema"}, "cannot be reached"),
        ):
            with pytest.raises((ValueError, ConnectionError), match=words):
                load(**wrong)
        loaded = load(token=TOKEN, subfolder="ema", revision="main")
        loaded.load_lora_weights(f"{USER}/lora", 0.5, token=TOKEN, cache_dir=tmp_path / "cache")
        loaded.load_lora_weights(f"{USER}/run", 0.5, "of a run", token=TOKEN, cache_dir=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) and not list((tmp_path / "home").rglob("*.safetensors"))
        with pytest.raises(
            ValueError, match=r"weights/mmaudio_small_16k\.pth: fetch one by `hf download .* weights conv"
        ):
            MMAudioPipeline.from_pretrained(f"{USER}/released", device="cpu")
    offline = load(local_files_only=True, subfolder="ema")  # the server is gone
    assert close(offline(num_steps=1, progress=False), pipeline(num_steps=1))
    assert not close(loaded(num_steps=1, progress=False), pipeline(num_steps=1))


def test_a_file_of_released_weights_is_a_source(folder, pipeline, tmp_path):
    file = tmp_path / "mmaudio_fp32.pth"
    torch.save(pipeline.model.state_dict(), file)
    loaded = MMAudioPipeline.from_pretrained(file, device="cpu", encoders=pipeline._source)
    assert loaded.model.config.duration == 8.0 and loaded.alignment == "timestamps"
    short = {"duration": 1.0, "window": 1.0, "num_steps": 1}
    assert torch.equal(loaded(**short, progress=False).latent, pipeline(**short).latent)
    with pytest.raises(ValueError, match="is a file, for which subfolder is without meaning"):
        MMAudio.from_pretrained(file, subfolder="x")
    with pytest.raises(ValueError, match=r"call model\.float"):
        MMAudioPipeline(MMAudio.from_pretrained(folder).bfloat16(), pipeline._source)


def test_a_result_never_replaces_its_source(pipeline, video, tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(video.read_bytes())
    (tmp_path / "link.mp4").symlink_to(clip)
    os.link(clip, tmp_path / "hard.mp4")
    result = pipeline(clip, num_steps=1)
    for name in ("clip.mp4", "link.mp4", "hard.mp4", "../" + tmp_path.name + "/clip.mp4"):
        with pytest.raises(ValueError, match="is the video itself, whose audio would be lost"):
            save_generated(result, tmp_path / name, video=clip)
    assert clip.read_bytes() == video.read_bytes()
    for arguments, words in (
        ((result.waveform, tmp_path / "a.wav"), "result must be"),
        (([result], tmp_path / "a.wav"), "result must be"),
        ((result, 3), "out_path must be"),
        ((result, ""), "out_path must be"),
        ((result, tmp_path), "is a folder"),
        ((result, tmp_path / "a.mp4", np.zeros((2, 8, 8, 3))), "video must be a file"),
        ((result, tmp_path / "a.mp4", tmp_path / "none.mp4"), r"none\.mp4"),
        ((result, tmp_path / "a.ogg"), r"\.wav or \.flac"),
    ):
        with pytest.raises(ValueError, match=words):
            save_generated(*arguments)


def test_other_files_of_a_folder_are_generated_or_named(folder, tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    write_odd(source / "cam.ts", Odd(steady(0.8), codec="mpeg2video", audio_seconds=None))
    write_odd(source / "anim.gif", Odd(steady(0.8, 10), codec="gif", pix_fmt="rgb8", audio_seconds=None))
    (source / "notes.txt").write_text("a note")
    words = ("generate", "--run", folder, "--folder", source, "--out", tmp_path / "out", "--steps", "1")
    assert main([*map(str, words), "--format", "mkv"]) == 0
    printed = capsys.readouterr()
    assert "1 other files are left out: notes.txt" in printed.out and "2 of 2 generated" in printed.out
    assert {path.name for path in (tmp_path / "out").glob("*.mkv")} == {"cam.mkv", "anim.mkv"}
    assert main([*map(str, words), "--seed", "random"]) == 2 and "seed: give a number" in capsys.readouterr().err


def test_the_code_of_the_docs_runs_as_a_notebook(folder, tmp_path, monkeypatch):
    """All python blocks of docs/generation.md, in order; a cell's last expression is shown as IPython shows it."""
    page = (Path(__file__).parent.parent / "docs" / "generation.md").read_text()
    cells = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "example").symlink_to(folder)
    for name in ("clip.mp4", "dog.mp4"):
        write_odd(tmp_path / name, Odd(steady(1)))
    monkeypatch.chdir(tmp_path)
    names, shown = {}, []
    for cell in cells:
        body = ast.parse(cell).body
        last = [body.pop()] if isinstance(body[-1], ast.Expr) else []
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        shown += [eval(compile(ast.Expression(node.value), "cell", "eval"), names) for node in last]
    assert repr(shown[0]).startswith("MMAudioPipeline(") and "<audio" in shown[1]._repr_html_()
    assert len(names["levels"]) == 10 and names["result"].seconds == pytest.approx(2, abs=0.05)
    assert (tmp_path / "with_audio.mp4").is_file() and [result.seed for result in names["results"]] == [3, 4]
