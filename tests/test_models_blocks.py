"""Layers and blocks of the flow model: fast forms that must agree with the plain ones, and what keeps them fast."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmaudio_hf.models.blocks import ChannelLastConv1d, JointBlock, ModulatedBlock, rotary_table

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


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_convolution_is_that_of_torch(kernel_size, length, compiling, monkeypatch):
    """Forward and all gradients: Winograd's and the product on a CPU, and what compilers and other devices take."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(kernel_size)
    layer = ChannelLastConv1d(5, 6, kernel_size, padding=kernel_size // 2).double()
    x = torch.randn(2, length, 5, dtype=torch.double, requires_grad=True)
    inputs, weights = (x, layer.weight, layer.bias), torch.randn(2, length, 6, dtype=torch.double)
    plain = F.conv1d(x.transpose(1, 2), layer.weight, layer.bias, padding=kernel_size // 2).transpose(1, 2)
    ours = layer(x)
    torch.testing.assert_close(ours, plain)
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), inputs), expected)


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
