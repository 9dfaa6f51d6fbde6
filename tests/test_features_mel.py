import numpy as np
import pytest
import torch
from golden_data import golden, relative_error

from mmaudio_hf.features.mel import MelSpectrogram, mel_filter_bank

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
