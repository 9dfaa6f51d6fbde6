"""Saved models whose configuration is damaged, absurd, or does not fit: one sentence with the name of the file."""

import json

import pytest

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


def test_unknown_options_are_not_swallowed(saved):
    folder, text = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="does not know subfolder; it takes map_location, revision"):
        MMAudio.from_pretrained(folder, subfolder="ema")
    assert find_pretrained(folder) == folder and MMAudio.from_pretrained(folder).config.hidden_dim == 64


def test_a_damaged_description_of_encoders_is_named(tmp_path):
    (tmp_path / "encoders.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"encoders\.json is not valid JSON"):
        check_encoders(tmp_path / "encoders.json", "toy")
