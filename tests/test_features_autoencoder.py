import numpy as np
import pytest
import torch
from golden_data import golden, relative_error, state_dict, tensor
from refusals import check_refusals
from released_files import data_statistics

from mmaudio_hf.features.autoencoder import MelSpectrogram, MelVAE, flops, mel_filter_bank


def small_state(mode="16k"):
    """Released-style state dict of a network of width 8."""
    vae, generator = MelVAE(mode, width=8), torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in vae.state_dict().items()}
    return state | {f"{half}.learnable_gain": torch.tensor(0.1) for half in ("encoder", "decoder")}


# Drawing the 300 million values of the larger network takes most of 15 s.
@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_encode_and_decode_match_golden(mode):
    arrays, statistics = golden(f"vae_{mode}"), data_statistics(mode)
    vae = MelVAE(mode).load_released(state_dict(f"vae_{mode}") | statistics)
    bins, channels = vae.mode.mel_bins, vae.mode.latent_channels
    mel = tensor(f"vae_{mode}/mel", (2, bins, 64)) * statistics["data_std"] + statistics["data_mean"]
    mean, std = vae.encode(mel)
    assert mean.shape == std.shape == (2, 32, channels)
    assert relative_error(mean.mT, arrays, "mean") < 1e-4
    assert relative_error(std.mT, arrays, "std") < 1e-4
    assert relative_error(2 * std.mT.log(), arrays, "logvar") < 1e-4
    eps = tensor(f"vae_{mode}/eps", (2, channels, 32))
    assert relative_error(mean.mT + std.mT * eps, arrays, "sample") < 1e-4
    mel = vae.decode(tensor(f"vae_{mode}/z", (2, channels, 32)).mT)
    assert relative_error(mel, arrays, "decoded") < 1e-4
    weight = vae.state_dict()["encoder.down.1.block.0.conv1.weight"]
    assert relative_error(weight, arrays, "mid.weight_after_norm.encoder.down.1.block.0.conv1") < 1e-6


def test_odd_mel_frame_is_dropped_and_batch_rows_are_independent():
    vae, mel = MelVAE("16k", width=8).load_released(small_state()), torch.randn(2, 80, 21)
    mean, std = vae.encode(mel)
    assert mean.shape == (2, 10, 20) and vae.decode(mean).shape == (2, 80, 20) and (std > 0).all()
    torch.testing.assert_close(mean[1:], vae.encode(mel[1:])[0])


def test_loaded_network_is_frozen_and_leaves_the_given_state_alone():
    state = small_state()
    before = {name: value.clone() for name, value in state.items()}
    vae = MelVAE("16k", width=8).load_released(state)
    assert not any(p.requires_grad for p in vae.parameters()) and not vae.training
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_folded_state_is_not_taken_for_a_released_one():
    vae = MelVAE("16k", width=8).load_released(small_state())
    with pytest.raises(ValueError, match=r"encoder\.learnable_gain is missing"):
        vae.load_released(vae.state_dict())


def test_every_wrong_file_raises(tmp_path, capsys):
    load = MelVAE("16k", width=8).load_released
    check_refusals(load, small_state(), "encoder.learnable_gain", tmp_path, capsys)
    check_refusals(load, small_state(), "decoder.up.0.block.1.conv1.weight", tmp_path, capsys)


def test_weights_of_the_other_mode_raise():
    with pytest.raises(ValueError, match=r"data_mean has shape \(1, 128, 1\), not \(1, 80, 1\)"):
        MelVAE("16k", width=8).load_released(small_state("44k"))


def test_wrong_shapes_raise():
    vae = MelVAE("16k", width=8).load_released(small_state())
    with pytest.raises(ValueError, match="give \\(batch, 80"):
        vae.encode(torch.zeros(1, 128, 20))
    with pytest.raises(ValueError, match="give \\(batch, length, 20\\)"):
        vae.decode(torch.zeros(1, 20, 10))


def test_flops():
    encode, decode = flops("16k", 500)
    assert encode == pytest.approx(37.65e9, rel=1e-3) and decode == pytest.approx(52.57e9, rel=1e-3)
    assert flops("16k", 1000)[0] > 2 * encode  # attention grows with the square


MODES = ("16k", "44k")


@pytest.mark.parametrize("mode", MODES)
def test_mel_matches_golden(mode):
    arrays = golden(f"mel_{mode}")
    mel = MelSpectrogram(mode)(torch.from_numpy(arrays["waveform"]))
    assert relative_error(mel, arrays, "mel") < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_filter_bank_and_window_match_golden(mode):
    arrays, bank = golden(f"mel_{mode}"), mel_filter_bank(mode)
    assert relative_error(bank.double().sum(1), arrays, "mel_basis_rowsum") < 1e-6
    assert relative_error(bank.max(1).values, arrays, "mel_basis_peak") < 1e-6
    assert np.array_equal(bank.argmax(1), arrays["mel_basis_argmax"])
    assert relative_error(MelSpectrogram(mode).window, arrays, "window") < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_frames_are_whole_hops_and_batch_rows_are_independent(mode):
    mel = MelSpectrogram(mode)
    hop, waveform = (
        mel.mode.mel_hop,
        torch.randn(3, 8 * mel.mode.mel_hop - 1, generator=torch.Generator().manual_seed(0)),
    )
    both = mel(waveform)
    assert both.shape == (3, mel.mode.mel_bins, waveform.shape[1] // hop)
    torch.testing.assert_close(both[1:2], mel(waveform[1:2]), rtol=1e-6, atol=1e-6)


def test_samples_beyond_full_scale_are_clipped():
    mel, loud = MelSpectrogram("16k"), 3 * torch.sin(torch.arange(4000) / 5)[None]
    torch.testing.assert_close(mel(loud), mel(loud.clamp(-1, 1)), rtol=0, atol=0)


def test_autocast_does_not_lower_the_precision():
    arrays = golden("mel_44k")
    with torch.autocast("cpu", torch.bfloat16):
        mel = MelSpectrogram("44k")(torch.from_numpy(arrays["waveform"]))
    assert mel.dtype == torch.float32 and relative_error(mel, arrays, "mel") < 1e-5


@pytest.mark.parametrize("shape", [(16000,), (1, 1, 16000), (1, 384)])
def test_wrong_waveform_shapes_raise(shape):
    with pytest.raises(ValueError, match="more than 384 samples"):
        MelSpectrogram("16k")(torch.zeros(shape))
