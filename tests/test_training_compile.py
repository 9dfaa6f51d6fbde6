"""What makes training larger or faster trains the same model: activation checkpointing, compiled blocks, TF32."""

import copy
import os
import shutil
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._dynamo.testing import CompileCounter
from toy_stores import MODEL

from mmaudio_hf import MMAudio
from mmaudio_hf.bench.training import random_batch
from mmaudio_hf.config import FlowConfig, Recipe, TrainingConfig, config_of_duration, variant_config
from mmaudio_hf.models import blocks
from mmaudio_hf.schema import RunError
from mmaudio_hf.training import distributed
from mmaudio_hf.training.distributed import allow_tf32, compile_blocks, configure_model, should_compile
from mmaudio_hf.training.memory import MemoryEstimate
from mmaudio_hf.training.step import flow_step

SIZES = {name: value for name, value in MODEL.items() if name != "variant"}


@pytest.fixture(scope="module")
def model() -> MMAudio:
    """A small model whose output is not zero."""
    torch.manual_seed(0)
    model = MMAudio(variant_config("small_16k", **SIZES | {"depth": 4, "fused_depth": 2})).train()
    model.set_latent_statistics(torch.zeros(20), torch.ones(20))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer"):
                parameter.normal_(std=0.05)
    return model


def loss_and_gradients(model: MMAudio) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Of one step, always with the same noise; and the bytes that autograd keeps of it, parameters aside."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    batch = random_batch(model.config, 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = flow_step(model, batch, FlowConfig(), model.latent_mean, model.latent_std).loss.mean()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = sum(size for pointer, size in sizes.items() if pointer not in parameters)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, kept


def test_activation_checkpointing_gives_the_same_bits_in_less_memory(model):
    loss, gradients, kept = loss_and_gradients(model)
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing = True
    other_loss, other_gradients, kept_less = loss_and_gradients(checkpointed)
    assert torch.equal(loss, other_loss) and gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name
    assert kept_less < 0.5 * kept  # the rest is of the projections before the blocks


@pytest.mark.parametrize("recomputed", [False, True])
def test_transformed_weights_are_kept_as_the_estimate_says(model, monkeypatch, recomputed):
    """Between forward and backward of a step, and none without gradients; with checkpointing one block's at a time."""
    references, most, transform = [], [], blocks.winograd_weight

    def noting(weight: torch.Tensor) -> torch.Tensor:
        references.append(weakref.ref(value := transform(weight)))
        most.append(kept())
        return value

    def kept() -> int:
        return sum(value.nbytes for each in references if (value := each()) is not None)

    monkeypatch.setattr(blocks, "winograd_weight", noting)
    training = TrainingConfig(mixed_precision="no", activation_checkpointing=recomputed)
    estimate = MemoryEstimate(Recipe("x", model=model.config, training=training), lambda: MMAudio(model.config))
    network = copy.deepcopy(model)
    network.activation_checkpointing = recomputed
    batch = random_batch(model.config, 2)
    # Latents need no gradients; the last layer's weight is freed before the first block is recomputed.
    others = [model.audio_input_proj[0], *[model.final_layer.conv] * recomputed]
    at_most = estimate.transformed - sum(layer.weight.nbytes * 8 // 7 for layer in others)
    with torch.no_grad():
        flow_step(network, batch, FlowConfig(), network.latent_mean, network.latent_std)
    assert len(references) > 20 and kept() == 0 and max(most) < 0.2 * estimate.transformed
    flow_step(network, batch, FlowConfig(), network.latent_mean, network.latent_std).loss.mean().backward()
    assert max(most) == at_most and kept() == 0


@pytest.mark.slow
def test_compiled_blocks_train_the_same_model_up_to_rounding(model):
    """Minutes where the compiler starts cold."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no C++ compiler, which torch.compile needs on processors")
    loss, gradients, _ = loss_and_gradients(model)
    compiled = copy.deepcopy(model)
    assert compile_blocks(compiled, print, required=True)
    other_loss, other_gradients, _ = loss_and_gradients(compiled)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        distance = (other_gradients[name] - gradient).norm()
        assert distance <= 1e-4 * gradient.norm() + 1e-7, name


def test_durations_share_what_is_compiled(model):
    """At most one graph for each kind of block and duration, and none when a duration comes again."""
    counter = CompileCounter()
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    for block in compiled.blocks:
        block.compile(backend=counter)
    graphs = []
    for duration in (1.0, 2.0, 1.5, 1.0):
        config = config_of_duration(model.config, duration)
        losses = []
        for network in (model, compiled):
            network.set_lengths(config.latent_length, config.clip_length, config.sync_length)
            batch = random_batch(config, round(4 / duration))
            losses.append(flow_step(network, batch, FlowConfig(), network.latent_mean, network.latent_std).loss)
        losses[1].sum().backward()
        graphs.append(counter.frame_count)
    kinds = 3  # joint blocks, the last of them, fused blocks
    assert graphs[0] == kinds and graphs[2] <= 3 * kinds and graphs[3] == graphs[2], graphs
    assert losses[1].shape == (4,) and losses[1].isfinite().all()
    model.set_lengths(config.latent_length, config.clip_length, config.sync_length)  # as it was
    torch._dynamo.reset()


def test_where_the_compiler_fails_auto_continues_and_on_does_not(model, monkeypatch, tmp_path, capsys):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config.cpp, "cxx", (str(tmp_path / "no_such_compiler"),))
    with pytest.raises(RunError, match=r"set training\.compile=off"):
        compile_blocks(model, print, required=True)
    assert not compile_blocks(model, print)
    assert "torch.compile does not work here, training runs without it: " in capsys.readouterr().out
    assert [should_compile(mode, torch.device("cpu")) for mode in ("auto", "on", "off")] == [False, True, False]
    assert [should_compile(mode, torch.device("cuda")) for mode in ("auto", "on", "off")] == [True, True, False]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_compilation_is_tried_under_the_autocast_of_training(model, monkeypatch, mixed_precision):
    """A compiler that fails in bf16 alone would otherwise fail in the first step."""
    tried = []
    monkeypatch.setattr(distributed, "probe_compile", lambda _: tried.append(torch.is_autocast_enabled("cpu")))
    training = TrainingConfig(compile="on", mixed_precision=mixed_precision)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    compiled = configure_model(copy.deepcopy(model), training, accelerator)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert tried == [mixed_precision == "bf16"]
    assert all(block._compiled_call_impl is not None for block in compiled.blocks)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set(allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    allow_tf32(allowed)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed and torch.backends.cudnn.allow_tf32 is allowed
    allow_tf32(before)
