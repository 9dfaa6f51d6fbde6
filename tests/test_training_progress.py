"""What a run says of its cost: operations by formula, memory before it is allocated."""

import subprocess
import sys

import pytest
import torch
from test_training_loop import environment
from torch.utils.flop_counter import FlopCounterMode
from toy_stores import MODEL

from mmaudio_hf.config import FinetuneConfig, ModelConfig, Recipe, TrainingConfig, variant_config
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training.finetune import set_trainable
from mmaudio_hf.training.logs import device_peak
from mmaudio_hf.training.memory import MemoryEstimate, forward_flops, training_flops


def inputs(config: ModelConfig) -> list[torch.Tensor]:
    shapes = [(config.latent_length, config.latent_channels), (config.clip_length, config.clip_dim)]
    shapes += [(config.sync_length, config.sync_dim), (config.text_tokens, config.text_dim)]
    return [*(torch.randn(1, *shape, device="meta") for shape in shapes), torch.rand(1, device="meta")]


@pytest.mark.parametrize("config", [ModelConfig(**MODEL), variant_config("small_16k"), variant_config("large_44k_v2")])
def test_operations_are_those_that_torch_counts(config):
    with torch.device("meta"):
        network = MMAudio(config)
    with FlopCounterMode(display=False) as counter:
        velocity = network(*inputs(config))
        assert counter.get_total_flops() == forward_flops(config)
        velocity.sum().backward()
    # The backward pass leaves out gradients of inputs, which count in small networks only.
    assert counter.get_total_flops() == pytest.approx(training_flops(config), rel=0.05 if config.depth == 2 else 0.01)


def test_the_peak_of_an_unknown_device_is_measured():
    peak = device_peak(torch.device("cpu"), "no")
    assert peak.measured and 1e8 < peak.flops_per_second < 1e14


MEASURE = """
import torch
from mmaudio_hf.bench.training import random_batch
from mmaudio_hf.config import Recipe, TrainingConfig, variant_config
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training.ema import PostHocEMA
from mmaudio_hf.training.memory import MemoryEstimate
from mmaudio_hf.training.optim import build_optimizer
from mmaudio_hf.training.logs import peak_memory_gb
from mmaudio_hf.training.step import flow_step

def recipe(batch, **model):
    config = variant_config("small_16k", num_heads=2, **model)
    return Recipe(name="x", model=config, training=TrainingConfig(batch_size=batch, mixed_precision="no"))

def train(recipe):
    network = MMAudio(recipe.model)
    network.set_latent_statistics(torch.zeros(20), torch.ones(20))
    optimizer, ema = build_optimizer(network, recipe.optim), PostHocEMA(network, recipe.ema.sigma_rels)
    batch = random_batch(recipe.model, recipe.training.batch_size)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        flow_step(network, batch, recipe.flow, network.latent_mean, network.latent_std).loss.mean().backward()
        optimizer.step()
        ema.update()
    return int(peak_memory_gb(torch.device("cpu")) * 1e9)

before = train(recipe(1, hidden_dim=32, depth=2, fused_depth=1, duration=1.0))  # what libraries take
real = recipe(6, hidden_dim=128, depth=6, fused_depth=3)
sizes = MemoryEstimate(real, lambda: MMAudio(real.model)).on_device(1, 1)
print(train(real) - before, sum(sizes.values()))
"""


def test_memory_is_estimated_as_it_is_used():
    """Parameters, optimizer and averages are as much as the activations here."""
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    measured, estimated = (int(word) for word in result.stdout.split())
    assert estimated / 1.3 < measured < estimated * 1.3


def test_memory_of_other_ways_to_train():
    """Sharing out divides what is kept, recomputing makes activations few, and nothing is kept of frozen tensors."""

    def estimate(**changes):
        recipe = Recipe(name="x", model=variant_config("small_16k"), **changes)
        return MemoryEstimate(recipe, lambda: set_trainable(MMAudio(recipe.model), recipe.finetune)).on_device

    plain = estimate()
    alone, shared = plain(8, 1), plain(8, 1, fsdp=True)
    assert alone["optimizer"] == 8 * shared["optimizer"] and alone["parameters"] > 3 * shared["parameters"]
    assert alone["activations"] == shared["activations"] and not shared["kept gradients"]
    assert plain(8, 2)["activations"] == pytest.approx(alone["activations"] / 2, rel=0.1)
    recomputing = estimate(training=TrainingConfig(activation_checkpointing=True))(8, 1)
    assert 0.1 < recomputing["activations"] / alone["activations"] < 0.5
    frozen = estimate(finetune=FinetuneConfig(init_from="x", freeze=("fused_blocks", "joint_blocks")))(8, 1)
    assert frozen["EMA"] < alone["EMA"] / 2 and frozen["optimizer"] < alone["optimizer"] / 2
