"""What a step costs: operations against a formula, memory before it is allocated against what it takes."""

import subprocess
import sys

import pytest
from toy_stores import MODEL
from training_runs import environment

from mmaudio_hf.config import FinetuneConfig, ModelConfig, Recipe, TrainingConfig, variant_config
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training import memory
from mmaudio_hf.training.finetune import set_trainable
from mmaudio_hf.training.memory import MemoryEstimate, training_flops

# --- Operations ------------------------------------------------------------------------------------------------------


def product(tokens: int, inputs: int, outputs: int, kernel_size: int = 1) -> int:
    return 2 * tokens * inputs * outputs * kernel_size


def gated(tokens: int, dim: int, kernel_size: int = 1) -> int:
    hidden = -(-int(8 * dim / 3) // 256) * 256
    return 3 * product(tokens, dim, hidden, kernel_size)


def stream(tokens: int, conditions: int, dim: int, kernel_size: int, pre_only: bool = False) -> int:
    """Queries, keys, values and modulation of one stream, and unless `pre_only` output map and feed-forward."""
    total = product(tokens, dim, 3 * dim) + product(conditions, dim, (2 if pre_only else 6) * dim)
    return total if pre_only else total + product(tokens, dim, dim, kernel_size) + gated(tokens, dim, kernel_size)


def forward_operations(config: ModelConfig) -> int:
    """Products, convolutions and attention of one sample, from the sizes of the layers."""
    dim, latent, clip, text = config.hidden_dim, config.latent_length, config.clip_length, config.text_tokens
    total = product(latent, config.latent_channels, dim, 7) + gated(latent, dim, 7)
    total += product(config.sync_length, config.sync_dim, dim, 7) + gated(config.sync_length, dim, 3)
    total += product(clip, config.clip_dim, dim) + gated(clip, dim, 3)
    total += product(text, config.text_dim, dim) + gated(text, dim)
    total += product(1, dim if config.v2 else 256, dim) + 3 * product(1, dim, dim) + gated(1, dim)  # time, global
    for number in range(config.joint_depth):
        last = number == config.joint_depth - 1
        total += stream(latent, latent, dim, 3) + stream(clip, 1, dim, 3, last) + stream(text, 1, dim, 1, last)
        total += 2 * product(latent + clip + text, latent + clip + text, dim)
    total += config.fused_depth * (stream(latent, latent, dim, 3) + 2 * product(latent, latent, dim))
    return total + product(1, dim, 2 * dim) + product(latent, dim, config.latent_channels, 7)


@pytest.mark.parametrize("config", [ModelConfig(**MODEL), variant_config("small_16k"), variant_config("large_44k_v2")])
def test_operations_are_those_of_the_layers(config):
    assert training_flops(config) == 3 * forward_operations(config)


# --- Memory ----------------------------------------------------------------------------------------------------------


def estimate(**changes) -> MemoryEstimate:
    recipe = Recipe(name="x", model=variant_config("small_16k", depth=4, fused_depth=2), **changes)
    return MemoryEstimate(recipe, lambda: set_trainable(MMAudio(recipe.model), recipe.finetune))


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
    model = MMAudio(recipe.model)
    model.set_latent_statistics(torch.zeros(20), torch.ones(20))
    optimizer, ema = build_optimizer(model, recipe.optim), PostHocEMA(model, recipe.ema.sigma_rels)
    batch = random_batch(recipe.model, recipe.training.batch_size)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        flow_step(model, batch, recipe.flow, model.latent_mean, model.latent_std).loss.mean().backward()
        optimizer.step()
        ema.update()
    return int(peak_memory_gb(torch.device("cpu")) * 1e9)

before = train(recipe(1, hidden_dim=32, depth=2, fused_depth=1, duration=1.0))  # what libraries take
real = recipe(6, hidden_dim=128, depth=6, fused_depth=3)
sizes = MemoryEstimate(real, lambda: MMAudio(real.model)).on_device(1, 1)
print(train(real) - before, sum(sizes.values()))
"""


def test_memory_is_estimated_as_it_is_used():
    """Parameters, moments and EMA weights are as much as the activations here; a CPU computes a little otherwise."""
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    measured, estimated = (int(word) for word in result.stdout.split())
    assert estimated / 1.3 < measured < estimated * 1.3


def test_a_trace_serves_every_batch_size(monkeypatch):
    """What a trace at one batch size says of others is what a trace at theirs says."""
    at_prime = estimate().on_device(1, 1)
    monkeypatch.setattr(memory, "TRACED_BATCH", 257)
    assert estimate().on_device(1, 1) == at_prime


def test_sharding_divides_what_is_kept():
    plain = estimate().on_device
    ddp, fsdp = plain(8, 1), plain(8, 1, fsdp=True)
    assert ddp["optimizer"] == 8 * fsdp["optimizer"] and ddp["EMA"] == 8 * fsdp["EMA"]
    assert ddp["gradients"] == ddp["parameters"] - 4 * 78_888 == 8 * fsdp["gradients"]
    assert fsdp["activations"] == pytest.approx(ddp["activations"], rel=0.01)


def test_host_memory_is_that_of_the_copy_and_the_buffers():
    memory = estimate(training=TrainingConfig(batch_size=16))
    alone = memory.on_host(1, 1, 1)
    copied = memory.checkpoint - 4 * memory.parameters  # which publishes some of it again
    assert copied <= alone["checkpoint copy"] < 1.2 * copied, "full blocks, and the last rounded up"
    assert memory.on_host(2, 2, 1)["batches"] == memory.on_host(2, 1, 1)["batches"] / 2 == alone["batches"] / 2
    for machines in (1, 2):
        sharded = memory.on_host(4, machines, 1, fsdp=True)["checkpoint copy"] - 4 * memory.parameters
        assert copied / machines <= sharded < 2 * copied / machines, "every process rounds up its own"


def test_smaller_passes_recomputing_and_freezing_take_less():
    plain = estimate().on_device(8, 1)
    assert estimate().on_device(8, 2)["activations"] == pytest.approx(plain["activations"] / 2, rel=0.1)
    recomputing = estimate(training=TrainingConfig(activation_checkpointing=True)).on_device(8, 1)
    assert 0.1 < recomputing["activations"] / plain["activations"] < 0.7
    frozen = estimate(finetune=FinetuneConfig(init_from="x", freeze=("fused_blocks", "joint_blocks"))).on_device(8, 1)
    assert frozen["EMA"] < plain["EMA"] / 2 and frozen["optimizer"] < plain["optimizer"] / 2
