import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import GOLDEN, golden, relative_error, state_dict, tensor
from refusals import check_refusals

from mmaudio_hf.features.vocoder import (
    DILATIONS,
    GENERATORS,
    RESIDUAL_KERNELS,
    WIDTH,
    SnakeBeta,
    Vocoder,
    low_pass_filter,
)
from mmaudio_hf.schema import audio_mode


def small_state(mode="44k", width=64):
    """Released-style state dict of a generator that starts with `width` channels."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in Vocoder(mode, width).state_dict().items():
        draw = torch.randn(value.shape, generator=generator)
        if name.endswith(".weight"):
            state |= {f"{name}_g": draw[:, :1, :1].abs(), f"{name}_v": draw}
        else:
            state[name] = 0.1 * draw
    return state


@pytest.mark.parametrize(("mode", "scale", "offset"), [("16k", 1, -2), ("44k", 2, -5)])
def test_waveform_matches_golden(mode, scale, offset):
    arrays = golden(f"vocoder_{mode}")
    vocoder = Vocoder(mode).load_released({"generator": state_dict(f"bigvgan_{mode}"), "optimizer": {}})
    mel = scale * tensor(f"vocoder_{mode}/mel", (1, vocoder.mode.mel_bins, 32)) + offset
    waveform = vocoder(mel)
    assert waveform.shape == (1, 32 * vocoder.mode.mel_hop)
    assert relative_error(waveform[:, None], arrays, "wave") < 1e-4
    saturated = (waveform.abs() >= 1).float().mean().item()
    assert saturated == pytest.approx(arrays["saturated_fraction"].item(), abs=1e-3)


def test_filter_matches_golden():
    assert np.abs(low_pass_filter().numpy() - golden("vocoder_16k")["mid.filter"].ravel()).max() < 1e-7


def test_settings_are_those_published_with_the_44k_vocoder():
    published = json.loads((GOLDEN / "bigvgan_44k_config.json").read_text())
    generator, mode = GENERATORS["44k"], audio_mode("44k")
    assert list(generator.upsample_rates) == published["upsample_rates"]
    assert list(generator.upsample_kernels) == published["upsample_kernel_sizes"]
    assert list(RESIDUAL_KERNELS) == published["resblock_kernel_sizes"]
    assert [list(DILATIONS)] * 3 == published["resblock_dilation_sizes"]
    assert (WIDTH, mode.mel_bins) == (published["upsample_initial_channel"], published["num_mels"])
    assert (mode.mel_hop, mode.sample_rate) == (published["hop_size"], published["sampling_rate"])
    assert generator.final_tanh == published["use_tanh_at_final"]
    assert generator.final_bias == published["use_bias_at_final"]


@pytest.mark.parametrize("length", [1, 5, 16, 37])
def test_activation_equals_transposed_and_strided_convolution(length):
    vocoder = Vocoder("44k", 64).load_released(small_state())
    activation, x = vocoder.resblocks[0].activations[0], torch.randn(2, 32, length)
    taps = low_pass_filter().expand(32, 1, -1)
    doubled = 2 * F.conv_transpose1d(F.pad(x, (5, 5), mode="replicate"), taps, stride=2, groups=32)[..., 15:-15]
    bent = F.pad(activation.act(doubled), (5, 6), mode="replicate")
    torch.testing.assert_close(activation(x), F.conv1d(bent, taps, stride=2, groups=32), rtol=1e-5, atol=1e-5)


def test_snake_beta_is_its_formula():
    snake, x = SnakeBeta(2), torch.linspace(-3, 3, 8).reshape(1, 2, 4)
    snake.alpha.data, snake.beta.data = torch.tensor([0.2, -0.4]), torch.tensor([-0.3, 0.1])
    expected = x + torch.sin(snake.alpha.exp()[:, None] * x) ** 2 / snake.beta.exp()[:, None]
    with torch.no_grad():
        torch.testing.assert_close(snake(x), expected)


def test_stored_filters_are_checked():
    state = small_state()
    name = "resblocks.2.activations.1.downsample.lowpass.filter"
    Vocoder("44k", 64).load_released(state | {name: low_pass_filter().view(1, 1, 12)})
    for wrong in (torch.ones(1, 1, 12), torch.ones(1, 1, 6)):
        with pytest.raises(ValueError, match=f"{name} is another filter"):
            Vocoder("44k", 64).load_released(state | {name: wrong})


def test_every_wrong_file_raises(tmp_path, capsys):
    check_refusals(Vocoder("44k", 64).load_released, small_state(), "ups.1.0.weight_g", tmp_path, capsys)


def test_the_other_vocoder_raises():
    with pytest.raises(ValueError, match=r"conv_post\.bias is missing"):
        Vocoder("16k", 64).load_released(small_state())


def test_wrong_mel_raises():
    with pytest.raises(ValueError, match=r"give \(batch, 128, frames\)"):
        Vocoder("44k", 64).load_released(small_state())(torch.zeros(1, 80, 4))
