"""Guided sampling with shared work gives the numbers of two plain passes."""

import copy
from functools import partialmethod
from unittest import mock

import pytest
import torch
from golden_data import plain_guided_velocity
from torch import nn

from mmaudio_hf.models.blocks import ChannelLastConv1d, Conditions
from mmaudio_hf.models.flow import sample_euler
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.sampling import GuidedVelocity, _distinct_tokens, prepared_convolutions


@pytest.fixture(scope="module", params=["small_16k", "large_44k_v2"])
def model(request):
    torch.manual_seed(0)
    model = MMAudio.from_variant(request.param, hidden_dim=64, num_heads=1, depth=3, fused_depth=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def conditions_of(model: MMAudio, batch: int, negative: bool) -> tuple[Conditions, Conditions]:
    config = model.config
    features = (
        torch.randn(batch, model.clip_length, config.clip_dim),
        torch.randn(batch, model.sync_length, config.sync_dim),
        torch.randn(batch, config.text_tokens, config.text_dim),
    )
    text = torch.randn(batch, config.text_tokens, config.text_dim) if negative else None
    return model.preprocess_conditions(*features), model.empty_conditions(batch, text)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("scale", [4.5, 1.0, 0.5])
def test_guided_velocity(model, scale, negative):
    with torch.inference_mode():
        conditions, unconditional = conditions_of(model, 3, negative)
        x, t = torch.randn(3, model.latent_length, model.config.latent_channels), torch.full((3,), 0.4)
        plain = plain_guided_velocity(model, x, t, conditions, unconditional, scale)
        ours = GuidedVelocity(model, conditions, unconditional, scale)
        assert (ours(x, t) - plain).norm() < 2e-6 * plain.norm()
        with prepared_convolutions(model, "fp32"):
            assert (ours(x, t) - plain).norm() < 2e-6 * plain.norm()


@pytest.mark.parametrize("lengths", [(32, 8, 16), (40, 8, 24), (50, 8, 32), (125, 32, 88), (20, 8, 48)])
def test_modulations_are_computed_for_distinct_tokens(model, lengths):
    """One row a sync token where features are given, 24 at most where they are empty; each token finds its own."""
    config = model.config
    try:
        model.set_lengths(*lengths)
        with torch.inference_mode():
            conditions, unconditional = conditions_of(model, 2, negative=False)
        for branch, repeats in ((conditions, False), (unconditional, True)):
            first, index = _distinct_tokens(model, torch.device("cpu"), repeats)
            torch.testing.assert_close(branch.sync[:, first][:, index], branch.sync, atol=1e-5, rtol=0)
            at_most = 24 if repeats and lengths[2] <= lengths[0] else lengths[2]
            assert len(first) == min(at_most, lengths[2])
    finally:
        model.set_lengths(config.latent_length, config.clip_length, config.sync_length)


def test_transformed_weights_are_those_of_the_context(model):
    """Every step uses them, and none afterwards, when the weights may change again."""
    before = set(model.state_dict())
    maps = [m for m in model.modules() if isinstance(m, ChannelLastConv1d)]

    def transformed() -> list[ChannelLastConv1d]:
        return [m for m in maps if m.transformed is not None]

    with prepared_convolutions(model, "fp32"):
        assert {m.kernel_size for m in transformed()} == {(3,), (7,)} and set(model.state_dict()) == before
        layer, x = model.final_layer.conv, torch.randn(1, 9, 64)
        expected = layer(x)
        layer.transformed = 2 * layer.transformed
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (expected - layer.bias))
    assert not transformed()
    with prepared_convolutions(model, "bf16"):
        assert not transformed() and all(m.rounded is None for m in maps), "nothing is rounded without autocast"
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with prepared_convolutions(model, "bf16"):
            rounded = {m for m in maps if m.rounded is not None}
            assert not transformed() and {m.kernel_size for m in rounded} == {(3,), (7,)} and layer in rounded
            torch.testing.assert_close(layer(x), expected)
            layer.rounded = 2 * layer.rounded
            torch.testing.assert_close(layer(x) - layer.bias, 2 * (expected - layer.bias), atol=0.02, rtol=0.02)
    assert all(m.rounded is None for m in maps)
    with pytest.raises(RuntimeError, match="inside"), prepared_convolutions(model, "fp32"):
        raise RuntimeError("inside")
    assert not transformed()


def test_compiled_sampling_is_that_of_eager(model):
    """Steps, batches and lengths share a few graphs, and Winograd's convolutions stay out of the compiled blocks."""
    compiled, lengths = copy.deepcopy(model), (model.latent_length, model.clip_length, model.sync_length)
    with mock.patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager")):
        compiled.compile_blocks()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        for batch, latent, clip, sync in ((1, *lengths), (2, *lengths), (2, 40, 8, 24), (3, 125, 32, 88)):
            for network in (model, compiled):
                network.set_lengths(latent, clip, sync)
            with torch.inference_mode():
                conditions = conditions_of(model, batch, negative=False)
                x0 = torch.randn(batch, latent, model.config.latent_channels)
                eager = sample_euler(GuidedVelocity(model, *conditions, 4.5), x0, num_steps=3)
                with prepared_convolutions(compiled, "fp32"):
                    ours = sample_euler(GuidedVelocity(compiled, *conditions, 4.5), x0, num_steps=3)
            assert (ours - eager).norm() < 1e-5 * eager.norm()
        counters = torch._dynamo.utils.counters
        assert 0 < counters["stats"]["unique_graphs"] <= 16 and not counters["graph_break"]
    finally:
        model.set_lengths(*lengths)
        torch._dynamo.reset()
