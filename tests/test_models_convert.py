"""Which released network a state dict is, and the order of its tensors."""

import itertools

import pytest
import torch
from golden_data import listed_shapes
from refusals import check_refusals

from mmaudio_hf import MMAudio
from mmaudio_hf.config import VARIANTS, ModelConfig, variant_config
from mmaudio_hf.models.convert import (
    infer_config,
    is_flow_state,
    read_released,
    reference_order,
    trainable,
    write_pretrained,
)


def listed(listing: str) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in listed_shapes(listing).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_released_network_is_recognised(variant):
    assert infer_config(listed(f"flow_{variant}"), "file") == variant_config(variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_is_that_of_the_released_files(variant):
    with torch.device("meta"):
        ours = list(MMAudio.from_variant(variant).state_dict())
    released = list(listed_shapes(f"flow_{variant}"))
    assert reference_order(ours) == released == reference_order(released)
    assert ours != released  # or else the order needs no function
    assert set(released) - set(trainable(released)) == {"latent_mean", "latent_std", "empty_string_feat"}


def test_other_sizes_are_written_out():
    config = infer_config(listed("flow_tiny_full_dims"), "file")
    assert config == ModelConfig(hidden_dim=128, num_heads=2, depth=4, fused_depth=2)
    with torch.device("meta"):
        state = MMAudio(variant_config("large_44k_v2", depth=3, fused_depth=0)).state_dict()
    config = infer_config(state, "file")
    assert (config.variant, config.depth, config.fused_depth, config.v2) == ("large_44k_v2", 3, 0, True)


def test_other_files_are_no_flow_networks():
    assert is_flow_state(listed("flow_small_16k")) and not is_flow_state(listed("vae_16k"))
    with pytest.raises(ValueError, match=r"vae\.pth is not a flow network"):
        infer_config(listed("vae_16k"), "vae.pth")
    odd = listed("flow_small_16k") | {"audio_input_proj.0.weight": torch.empty(448, 21, 7, device="meta")}
    with pytest.raises(ValueError, match=r"odd\.pth is not a flow network"):
        infer_config(odd, "odd.pth")


def test_every_wrong_flow_network_is_rejected(tmp_path, capsys):
    """As `mmaudio-hf weights convert` and `finetune.init_from` read it: by its names, its sizes inferred."""
    state = MMAudio(ModelConfig(hidden_dim=64, num_heads=1, depth=3, fused_depth=1)).state_dict()
    numbers = itertools.count()

    def load(source):
        return write_pretrained(read_released(source), tmp_path / f"out_{next(numbers)}", source)

    check_refusals(load, state, "t_embed.mlp.0.bias", tmp_path, capsys)
    assert [folder.name for folder in tmp_path.glob("out_*")] == ["out_0"]
