"""Guided sampling with shared work gives the numbers of the plain way."""

import pytest
import torch
import torch.nn.functional as F

from mmaudio_hf.models.blocks import ChannelLastConv1d, convolve, transform_weight
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.sampling import GuidedVelocity, fast_convolutions


@pytest.mark.parametrize("length", [1, 4, 6, 250])
def test_convolution_over_three_tokens(length):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 24, generator=generator)
    weight = torch.randn(40, 24, 3, generator=generator) / 8
    bias = torch.randn(40, generator=generator)
    exact = F.conv1d(x.double().transpose(1, 2), weight.double(), bias.double(), padding=1).transpose(1, 2)
    made = convolve(x, transform_weight(weight), bias)
    assert made.shape == exact.shape
    torch.testing.assert_close(made.double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(convolve(x, transform_weight(weight), None).double(), exact - bias, atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=["small_16k", "large_44k_v2"])
def network(request):
    torch.manual_seed(0)
    network = MMAudio.from_variant(request.param, hidden_dim=64, num_heads=1, depth=3, fused_depth=2).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def conditions_of(network, batch, negative):
    config = network.config
    features = (
        torch.randn(batch, config.clip_length, config.clip_dim),
        torch.randn(batch, config.sync_length, config.sync_dim),
        torch.randn(batch, config.text_tokens, config.text_dim),
    )
    text = torch.randn(batch, config.text_tokens, config.text_dim) if negative else None
    return network.preprocess_conditions(*features), network.empty_conditions(batch, text)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("scale", [4.5, 1.0, 0.5])
def test_guided_velocity(network, scale, negative):
    with torch.inference_mode():
        conditions, empty = conditions_of(network, 3, negative)
        x, t = torch.randn(3, network.latent_length, network.config.latent_channels), torch.full((3,), 0.4)
        plain = network.predict_guided_velocity(x, t, conditions, empty, scale)
        ours = GuidedVelocity(network, conditions, empty, scale)
        assert (ours(x, t) - plain).norm() < 2e-6 * plain.norm()
        with fast_convolutions(network, "fp32"):
            assert (ours(x, t) - plain).norm() < 2e-5 * plain.norm()
            assert (network.predict_guided_velocity(x, t, conditions, empty, scale) - plain).norm() > 0


def test_what_is_the_same_is_computed_once(network):
    """One row per sync token and sample; of nothing, one per place in a segment and a few at the ends."""
    with torch.inference_mode():
        rows = GuidedVelocity(network, *conditions_of(network, 4, negative=False), 4.5).row_sync
    at_most = 4 * network.config.sync_length + 40
    assert 4 * network.config.sync_length < len(rows) <= at_most < 2 * 4 * network.latent_length


def test_fast_convolutions_end_with_their_context(network):
    before = set(network.state_dict())
    maps = [m for m in network.modules() if isinstance(m, ChannelLastConv1d)]
    with fast_convolutions(network, "fp32"):
        used = [m for m in maps if m.transformed is not None]
        assert used and {m.kernel_size for m in used} == {(3,)} and set(network.state_dict()) == before
        assert network.audio_input_proj[0].transformed is None
    with fast_convolutions(network, "bf16"):
        assert all(m.transformed is None for m in maps)
    with pytest.raises(RuntimeError, match="inside"), fast_convolutions(network, "fp32"):
        raise RuntimeError("inside")
    assert all(m.transformed is None for m in maps)
