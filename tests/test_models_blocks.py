"""Layers and blocks of the flow model: fast forms that must agree with the plain ones, and what keeps them fast."""

from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from mmaudio_hf.models import blocks
from mmaudio_hf.models.blocks import (
    POINTS,
    ChannelLastConv1d,
    GatedMLP,
    JointBlock,
    ModulatedBlock,
    convolve,
    rotary_table,
    winograd_weight,
)

DIM, HEADS = 128, 2


class OpLog(TorchDispatchMode):
    """Names of all operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def random_block(kind: str) -> nn.Module:
    """A block with nothing left at zero. Kinds: fused, joint, last (joint)."""
    torch.manual_seed(0)
    block = ModulatedBlock(DIM, HEADS, 3) if kind == "fused" else JointBlock(DIM, HEADS, pre_only=kind == "last")
    for parameter in block.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return block


def block_inputs(kind: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    latent, clip, text, condition = (torch.randn(batch, n, DIM).to(dtype) for n in (24, 8, 7, 24))
    tables = [rotary_table(24, DIM // HEADS), rotary_table(8, DIM // HEADS, 3.0)]
    if kind == "fused":
        return [latent, condition, tables[0]]
    return [latent, clip, text, condition, torch.randn(batch, 1, DIM).to(dtype), *tables]


def latents_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def plain_convolution(x: torch.Tensor, layer: nn.Conv1d) -> torch.Tensor:
    bias, margin = layer.bias, layer.kernel_size[0] // 2
    return F.conv1d(x.transpose(1, 2), layer.weight, bias, padding=margin).transpose(1, 2)


def convolution(kernel_size: int, in_dim: int, out_dim: int, bias: bool = True) -> ChannelLastConv1d:
    torch.manual_seed(kernel_size)
    return ChannelLastConv1d(in_dim, out_dim, kernel_size, padding=kernel_size // 2, bias=bias)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(2, 1), (1, 2), (2, 5), (1, 8), (3, 13)])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_convolution_is_that_of_torch(kernel_size, batch, length, compiling, monkeypatch):
    """Forward and all gradients: Winograd's on a CPU, and what compilers and other devices take."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    layer = convolution(kernel_size, 5, 6).double()
    x, weights = (torch.randn(batch, n, length, dtype=torch.double).mT for n in (5, 6))  # not contiguous
    inputs = (x.requires_grad_(), layer.weight, layer.bias)
    plain, ours = plain_convolution(x, layer), layer(x)
    torch.testing.assert_close(ours, plain)
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), inputs), expected)
    assert not compiling or "Winograd" not in type(ours.grad_fn).__name__
    assert kernel_size in POINTS or "Winograd" not in type(ours.grad_fn).__name__


@pytest.mark.parametrize(("kernel_size", "error"), [(3, 1.5e-6), (7, 3e-6)])
def test_few_products_keep_the_digits_of_float32(kernel_size, error):
    """Twice the errors that the choice of points says; the plain form has 0.2e-6, and 0.4e-6 of the weight."""
    layer = convolution(kernel_size, 256, 320, bias=False)
    x, direction = torch.randn(2, 61, 256, requires_grad=True), torch.randn(2, 61, 320)
    ours = layer(x)
    assert "Winograd" in type(ours.grad_fn).__name__
    values = (ours, *torch.autograd.grad((ours * direction).sum(), (x, layer.weight)))
    x = x.detach().double().requires_grad_()
    exact = plain_convolution(x, layer.double())
    expected = (exact, *torch.autograd.grad((exact * direction).sum(), (x, layer.weight)))
    for name, value, precise in zip(("output", "inputs", "weight"), values, expected, strict=True):
        assert (value - precise).norm() < error * precise.norm(), name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("kernel_size", "length"), [(3, 2), (3, 13), (7, 13)])
def test_convolutions_of_one_input_are_those_of_each(kernel_size, length, frozen):
    layers = [convolution(kernel_size, 5, 6, bias).double() for bias in (True, False)]
    nn.init.normal_(layers[1].weight)  # not that of the other
    layers[0].weight.requires_grad_(not frozen)
    x = torch.randn(2, length, 5, dtype=torch.double, requires_grad=True)
    inputs = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    ours, plain = convolve(x, *layers), [plain_convolution(x, layer) for layer in layers]
    torch.testing.assert_close(list(ours), plain)
    gradients = [torch.autograd.grad((a.sin() * b).sum(), inputs) for a, b in (ours, plain)]
    torch.testing.assert_close(*gradients)


def double_by_global_hook(layer: nn.Module) -> None:
    nn.modules.module.register_module_forward_hook(lambda called, _, y: 2 * y if called is layer else None)


ATTACHED = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda *call: 2 * call[2]),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda _, inputs: 2 * inputs[0]),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda _, grads, __: (2 * grads[0],)),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda _, grads: (2 * grads[0],)),
    "global hook": double_by_global_hook,
    "forward": lambda layer: setattr(layer, "forward", lambda x, f=layer.forward: 2 * f(x)),  # so does accelerate
    "compiled": lambda layer: setattr(layer, "_compiled_call_impl", lambda x, f=layer.forward: 2 * f(x)),
    "weight norm": lambda layer: nn.utils.weight_norm(layer).weight_g.data.mul_(2),
    "parametrization": lambda layer: weight_norm(layer).parametrizations.weight.original0.data.mul_(2),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")  # old, and still in use
@pytest.mark.parametrize("name", ["w1", "w3"])
@pytest.mark.parametrize("attached", ATTACHED)
def test_what_is_attached_to_a_map_of_a_gated_mlp_counts(attached, name, monkeypatch):
    """`w1` and `w3` share what depends on their input only where to call them is to convolve."""
    monkeypatch.setattr(nn.modules.module, "_global_forward_hooks", OrderedDict())
    torch.manual_seed(0)
    mlp, x = GatedMLP(4, 3, multiple_of=8).double(), torch.randn(2, 9, 4, dtype=torch.double, requires_grad=True)
    calls, shared = [], blocks.convolve
    monkeypatch.setattr(blocks, "convolve", lambda x, *layers: calls.append(len(layers)) or shared(x, *layers))
    direction, before = torch.randn(2, 9, 4, dtype=torch.double), mlp(x)
    assert calls == [2, 1]
    ATTACHED[attached](getattr(mlp, name))
    ours, separate = mlp(x), mlp.w2(F.silu(mlp.w1(x)) * mlp.w3(x))
    torch.testing.assert_close(ours, separate)
    gradients = [torch.autograd.grad((y * direction).sum(), x)[0] for y in (ours, separate, before)]
    torch.testing.assert_close(*gradients[:2])
    assert not torch.allclose(gradients[0], gradients[2])


@pytest.mark.parametrize("of_x", [False, True])
@pytest.mark.parametrize("of_weights", [False, True])
def test_the_backward_pass_keeps_what_it_needs(of_x, of_weights):
    """Transformed weights for the gradient of the input, the input for that of the weights, and no second copy."""
    layers = [convolution(3, 8, 12, bias=False).requires_grad_(of_weights) for _ in range(2)]
    x, kept = torch.randn(2, 13, 8, requires_grad=of_x), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        output = sum(convolve(x, *layers))
    assert [t.shape for t in kept] == [(2, 13, 8)] * of_weights + [(6, 12, 8)] * 2 * of_x
    assert output.requires_grad == (of_x or of_weights)


def test_transformed_weights_give_the_same_convolution():
    layer, x = convolution(3, 24, 40), torch.randn(2, 250, 24)
    plain = layer(x)
    layer.transformed = winograd_weight(layer.weight.detach())
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fused", "joint", "last"])
def test_attention_is_fused(kind, dtype, monkeypatch):
    """A last stride other than 1 sends queries, keys or values to the slow path, with N x N matrices in float32."""
    strides, attention = [], F.scaled_dot_product_attention

    def logged(*tensors: torch.Tensor) -> torch.Tensor:
        strides.extend(tensor.stride(-1) for tensor in tensors)
        return attention(*tensors)

    monkeypatch.setattr(F, "scaled_dot_product_attention", logged)
    with OpLog() as log, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        latents_of(random_block(kind)(*block_inputs(kind))).float().sum().backward()
    assert strides == [1, 1, 1]
    assert not {"_safe_softmax", "_softmax"} & log.names
    assert {name for name in log.names if name.startswith("_scaled_dot_product_flash")}


@pytest.mark.parametrize("kind", ["fused", "joint"])
def test_an_adapter_instead_of_the_projection_changes_nothing_else(kind):
    """peft wraps `qkv`, whose outputs then come in the order of the released files."""
    block = random_block(kind)
    expected = latents_of(block(*block_inputs(kind)))
    stream = block if kind == "fused" else block.latent_block
    stream.attn.qkv = nn.Sequential(stream.attn.qkv)
    torch.testing.assert_close(latents_of(block(*block_inputs(kind))), expected)


@pytest.mark.parametrize("kind", ["fused", "joint", "last"])
def test_blocks_trace_without_graph_breaks(kind):
    """Under the autocast of training, as `torch.compile` traces them, with fused attention."""
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        explained = torch._dynamo.explain(random_block(kind))(*block_inputs(kind))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    torch._dynamo.reset()


@pytest.fixture
def new_graphs(monkeypatch) -> Iterator[Callable[..., int]]:
    """How many graphs a call of a function makes the compiler trace."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def count(function: Callable[..., object], *args: object) -> int:
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        function(*args)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] - before

    yield count
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "lora"), [("fused", False), ("fused", True), ("joint", True)])
def test_recompilations_are_bounded(kind, lora, new_graphs):
    """Blocks of one kind share what is compiled; batch sizes, a validation pass and other lengths add a few graphs.

    torch gives a function up after 8 graphs, and runs it uncompiled from then on.
    """
    blocks = [random_block(kind) for _ in range(2)]
    for block in blocks:
        if lora:
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["qkv", "w1"]), block)  # linear maps, convolutions
        block.compile(backend="eager")  # traced as for any other; only kernels are not made

    def run(batch: int, train: bool = True, length: int = 24) -> None:
        tensors = [x[:, :length] for x in block_inputs(kind, batch)]
        streams = (tensors.pop(0),) if kind == "fused" else tuple(tensors.pop(0) for _ in range(3))
        with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16):
            for block in blocks:
                block.train(train)
                output = block(*streams, *tensors)
                streams = (output,) if kind == "fused" else output
        if train:
            streams[0].float().sum().backward()

    counts = [new_graphs(run, *args) for args in ((2,), (2,), (3,), (5,), (3, False), (2, False))]
    counts += [new_graphs(run, 4, True, length) for length in (24, 16, 12, 8)]
    assert counts[0] and not counts[1], counts
    assert sum(counts) <= 8 and not any(counts[-2:]), counts
