"""What makes training larger or faster trains the same model: checkpointed activations, compiled blocks, version 2."""

import copy
import json
import os
import shutil

import pytest
import torch
import yaml
from toy_stores import MODEL, recipe_tree, write_store

from mmaudio_hf import MMAudio
from mmaudio_hf.bench.training import random_batch
from mmaudio_hf.cli import main
from mmaudio_hf.config import FlowConfig, ModelConfig, load_recipe, variant_config
from mmaudio_hf.schema import RunError
from mmaudio_hf.training.distributed import allow_tf32, compile_blocks, should_compile
from mmaudio_hf.training.step import flow_step, make_objective

SIZES = {name: value for name, value in MODEL.items() if name != "variant"}


@pytest.fixture(scope="module")
def network() -> MMAudio:
    """A small network whose output is not zero."""
    torch.manual_seed(0)
    config = variant_config("small_16k", **SIZES | {"depth": 4, "fused_depth": 2})
    made = MMAudio(config).train()
    made.set_latent_statistics(torch.zeros(20), torch.ones(20))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer"):
                parameter.normal_(std=0.05)
    return made


def loss_and_gradients(network: MMAudio, saved: dict | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of one step; `saved` takes the bytes of every distinct tensor kept for the backward pass."""

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if saved is not None:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    network.zero_grad(set_to_none=True)
    batch = random_batch(network.config, 4)
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = flow_step(network, batch, FlowConfig(), network.latent_mean, network.latent_std).loss.mean()
    if saved is not None:
        for pointer in parameters & saved.keys():
            del saved[pointer]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def test_checkpointed_activations_give_the_same_bits_in_less_memory(network):
    torch.manual_seed(1)
    whole: dict[int, int] = {}
    loss, gradients = loss_and_gradients(network, whole)
    again = copy.deepcopy(network)
    again.activation_checkpointing = True
    torch.manual_seed(1)
    kept: dict[int, int] = {}
    other_loss, other_gradients = loss_and_gradients(again, kept)
    assert torch.equal(loss, other_loss) and gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name
    assert sum(kept.values()) < 0.5 * sum(whole.values())


@pytest.mark.slow
def test_compiled_blocks_train_the_same_model_up_to_rounding(network):
    """Minutes where the compiler starts cold."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no C++ compiler, which torch.compile needs on processors")
    torch.manual_seed(1)
    loss, gradients = loss_and_gradients(network)
    compiled = copy.deepcopy(network)
    assert compile_blocks(compiled, print, required=True)
    torch.manual_seed(1)
    other_loss, other_gradients = loss_and_gradients(compiled)
    assert compiled.state_dict().keys() == network.state_dict().keys()
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        distance = (other_gradients[name] - gradient).norm()
        assert distance <= 1e-4 * gradient.norm() + 1e-7, name


def test_where_the_compiler_fails_auto_goes_on_and_on_does_not(network, monkeypatch, tmp_path, capsys):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config.cpp, "cxx", (str(tmp_path / "no_such_compiler"),))
    with pytest.raises(RunError, match=r"set training\.compile=off"):
        compile_blocks(network, print, required=True)
    assert not compile_blocks(network, print)
    assert "torch.compile does not work here, training runs without it: " in capsys.readouterr().out
    assert [should_compile(mode, torch.device("cpu")) for mode in ("auto", "on", "off")] == [False, True, False]
    assert [should_compile(mode, torch.device("cuda")) for mode in ("auto", "on", "off")] == [True, True, False]


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set(allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    allow_tf32(allowed)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed and torch.backends.cudnn.allow_tf32 is allowed
    allow_tf32(before)


# --- version 2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("independent", "both"), [(True, 0.04), (False, 0.2)])
def test_clip_and_sync_are_dropped_on_their_own(independent, both):
    """Marginal probabilities are those of the recipe, and the joint one is their product only when independent."""
    size = 4000
    batch = random_batch(ModelConfig(duration=0.64, text_tokens=1, text_dim=1, clip_dim=1, sync_dim=1), size)
    flow = FlowConfig(condition_dropout=0.2, independent_video_dropout=independent)
    objective = make_objective(batch, flow, torch.zeros(1, 1, 20), torch.ones(1, 1, 20))
    tolerance = 4 * (0.2 * 0.8 / size) ** 0.5
    for missing in (objective.clip_missing, objective.sync_missing, objective.text_missing):
        assert missing.float().mean().item() == pytest.approx(0.2, abs=tolerance)
    joint = (objective.clip_missing & objective.sync_missing).float().mean().item()
    assert joint == pytest.approx(both, abs=tolerance)


def test_a_network_of_version_2_learns(tmp_path):
    """The recipe of large_44k_v2 with a small network of that version: its loss falls."""
    published = load_recipe("recipes/large_44k_v2.yaml")
    assert published.flow.independent_video_dropout and published.model.v2
    write_store(tmp_path / "videos", 24, mode="44k")
    tree = recipe_tree(tmp_path, steps=30, batch_size=8, log_every=10, validate_every=100, checkpoint_every=100)
    tree["model"] = MODEL | {"variant": "large_44k_v2"}
    tree["data"] = {"train": [{"path": str(tmp_path / "videos")}], "validation": []}
    tree["flow"] = {"independent_video_dropout": True}
    tree["optim"] = {"learning_rate": 2e-3, "warmup_steps": 2, "schedule": "constant"}
    path = tmp_path / "v2.yaml"
    path.write_text(yaml.safe_dump(tree | {"name": "v2"}))
    assert main(["train", str(path)]) == 0
    losses = [
        json.loads(line)["train/loss"] for line in (tmp_path / "output/v2/metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.9 * losses[0]
    trained = MMAudio.from_pretrained(tmp_path / "output/v2/last/pretrained_model")
    with torch.device("meta"):
        released = MMAudio.from_variant("large_44k_v2", depth=2, fused_depth=1)
    assert trained.config.v2 and trained.state_dict().keys() == released.state_dict().keys()
