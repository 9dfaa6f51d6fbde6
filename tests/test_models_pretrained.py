"""Saved models whose configuration is damaged, absurd, or does not fit: one sentence with the name of the file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mmaudio_hf import MMAudio
from mmaudio_hf.config import ModelConfig
from mmaudio_hf.models.pretrained import find_pretrained
from mmaudio_hf.training.finetune import check_encoders, read_pretrained

SIZES = {"hidden_dim": 64, "num_heads": 1, "depth": 2, "fused_depth": 1, "duration": 1.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    MMAudio(ModelConfig(**SIZES)).save_pretrained(folder)
    return folder, (folder / "config.json").read_text()


def check_one_sentence(folder, text: bytes, name: str) -> None:
    """Every reader of a folder rejects it, naming the file `name`."""
    (folder / "config.json").write_bytes(text)
    for read in (MMAudio.from_pretrained, lambda source: MMAudio.from_config_and_state(*read_pretrained(str(source)))):
        with pytest.raises(ValueError) as caught:
            read(folder)
        assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", '{"hidden_dim": 6', "[" * 200_000, '{"a":' * 200_000, "[]", "null", "3", "NaN", b"\xff\xfe{"]
)
def test_a_damaged_configuration_is_named(saved, text):
    check_one_sentence(saved[0], text if isinstance(text, bytes) else text.encode(), "config.json")


@pytest.mark.parametrize(
    "change",
    [
        *({"hidden_dim": value} for value in (10**9, -64, 64.5, "64", [64], {"a": 1}, None, True)),
        *({"duration": value} for value in (1e300, float("inf"), float("nan"), -1, 0)),
        {"depth": 10**9},
        {"num_heads": 0},
        {"latent_length": 10**12},
        {"clip_length": -5},
        {"text_tokens": 10**9},
        {"mode": ["16k"]},
        {"variant": {"x": []}},
        {"surprise": 1},
    ],
    ids=str,
)
def test_absurd_values_are_named_before_memory_is_taken(saved, change):
    folder, text = saved
    check_one_sentence(folder, json.dumps(json.loads(text) | change).encode(), "config.json")


def test_sizes_of_other_weights_are_compared_before_memory_is_taken(saved):
    folder, text = saved
    check_one_sentence(folder, json.dumps(json.loads(text) | {"hidden_dim": 32768}).encode(), "model.safetensors")


def test_options_are_honoured_or_named(saved):
    folder, text = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="does not know device_map, dtype; it takes map_location, revision"):
        MMAudio.from_pretrained(folder, device_map="auto", dtype="auto")
    with pytest.raises(ValueError, match="ema holds no trained network"):
        MMAudio.from_pretrained(folder, subfolder="ema")
    for away in ("../elsewhere", "/etc"):
        with pytest.raises(ValueError, match="must be a folder inside"):
            MMAudio.from_pretrained(folder, subfolder=away)
    for nothing in (None, "", 3):
        with pytest.raises(ValueError, match=f"not {nothing!r}"):
            MMAudio.from_pretrained(nothing)
    with pytest.raises(ValueError, match="map_location 'nowhere'"):
        MMAudio.from_pretrained(folder, map_location="nowhere")
    assert find_pretrained(folder) == folder
    assert MMAudio.from_pretrained(folder.parent, subfolder=folder.name).config.hidden_dim == 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32_from_every_form(tmp_path, dtype):
    network = MMAudio(ModelConfig(**SIZES))
    network.save_pretrained(tmp_path / "saved")
    half = {name: value.to(dtype) for name, value in network.state_dict().items()}
    for file in ("saved/model.safetensors", "mmaudio_small_fp16.safetensors"):
        save_file(half, tmp_path / file)
    torch.save({"weights": half}, tmp_path / "trained.pth")
    sources = ("saved", "mmaudio_small_fp16.safetensors", "trained.pth")
    loaded = [MMAudio.from_pretrained(tmp_path / source) for source in sources]
    loaded += [MMAudio.from_config_and_state(*read_pretrained(str(tmp_path / source))) for source in sources]
    loaded += [MMAudio(ModelConfig(**SIZES)).load_released(half)]
    for name, value in half.items():
        for other in loaded:
            assert other.state_dict()[name].dtype == torch.float32
            assert torch.equal(other.state_dict()[name].nan_to_num(), value.float().nan_to_num()), name


def test_a_run_folder_is_read_and_released_weights_alone_are_named(tmp_path):
    network = MMAudio(ModelConfig(**SIZES))
    network.save_pretrained(tmp_path / "run" / "last" / "pretrained_model")
    assert MMAudio.from_pretrained(tmp_path / "run").config == network.config
    (tmp_path / "MMAudio" / "weights").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "MMAudio" / "weights" / "mmaudio_tiny.pth")
    with pytest.raises(ValueError, match=r"but weights/mmaudio_tiny.pth: give that file, .* `mmaudio-hf weights conv"):
        MMAudio.from_pretrained(tmp_path / "MMAudio")
    assert MMAudio.from_pretrained(tmp_path / "MMAudio/weights/mmaudio_tiny.pth").config.hidden_dim == 64


def test_a_damaged_description_of_encoders_is_named(tmp_path):
    (tmp_path / "encoders.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"encoders\.json is not valid JSON"):
        check_encoders(tmp_path / "encoders.json", "toy")
