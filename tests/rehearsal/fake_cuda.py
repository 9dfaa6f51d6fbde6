"""A CUDA device without hardware: fake tensors on "cuda", and counters of what a real device would have done.

    from fake_cuda import FakeCuda  # before torch: it loads stand-ins for the driver
    with FakeCuda() as device:
        ...  # tensors made here have shapes, strides and a device, and no memory

Mixing devices raises as on hardware. `device.counts` holds kernels, bytes, FLOPs, live and peak memory and an estimate
of the time on an H100; `device.syncs` where the host would wait; `device.attention` the kernels torch would choose.
"""

import collections
import contextlib
import ctypes
import gc
import itertools
import subprocess
import sys
import tempfile
import traceback
import types
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

assert "torch" not in sys.modules, "import fake_cuda before torch"


def _load_driver() -> ctypes.CDLL:
    """Build and load the two stubs; the last one has `pretend(count)`."""
    here, folder = Path(__file__).parent, Path(tempfile.mkdtemp())
    for name, options in (("no_driver", ["-Wl,-soname,libcuda.so.1"]), ("no_context", [])):
        command = ["g++", "-shared", "-fPIC", *options, "-o", folder / f"{name}.so", here / f"{name}.cpp"]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(folder / f"{name}.so"), ctypes.RTLD_GLOBAL)
    return library


_DRIVER = _load_driver()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

aten = torch.ops.aten
PACKAGE = "/mmaudio_hf/"

# An H100 SXM: dense bf16 and TF32, HBM3; of these, what well-tuned kernels reach.
_PEAK = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 494e12}
_PRODUCT_SHARE, _ATTENTION_SHARE, _BANDWIDTH, _LAUNCH = 0.7, 0.45, 0.85 * 3.35e12, 2e-6

# fmt: off
_QUERIES = {
    "device", "layout", "dtype", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_contiguous",
    "size", "stride", "numel", "dim",
}
_ALLOCATIONS = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}
_VIEWS = {
    "detach", "view", "_unsafe_view", "transpose", "permute", "unbind", "select", "slice", "split",
    "split_with_sizes", "expand", "t", "unsqueeze", "squeeze", "as_strided", "alias", "_reshape_alias",
    "lift_fresh", "unfold", "chunk", "view_as", "narrow", "unsafe_split",
}
# fmt: on


def caller(limit: int = 2) -> str:
    """Innermost lines of the package on the stack."""
    frames = [f for f in reversed(traceback.extract_stack()) if PACKAGE in f.filename]
    return " < ".join(f"{f.filename.split(PACKAGE)[1]}:{f.name}" for f in frames[:limit]) or "outside the package"


class Counts:
    """What has run since the last `reset`; live memory is kept over it.

    Memory of each stream is counted apart, as the caching allocator keeps it: what one frees no other can take.
    """

    def __init__(self):
        self.live: dict[int, tuple[int, int]] = {}  # by storage: bytes, stream
        self.live_bytes: collections.Counter = collections.Counter()  # by stream
        self.stream = 0
        self.reset()

    def reset(self) -> None:
        self.kernels = self.bytes = self.flops = self.pinned_bytes = 0
        self.seconds = 0.0
        self.peaks = self.live_bytes.copy()
        self.by_op: collections.Counter = collections.Counter()  # seconds of the estimate

    @property
    def peak_bytes(self) -> int:
        return self.peaks.total()

    def allocate(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            self.live[storage._cdata] = 0, self.stream
            self.resize(storage)
            weakref.finalize(storage, self._free, storage._cdata)

    def resize(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.live:
            before, stream = self.live[storage._cdata]
            size = -(-storage.nbytes() // 512) * 512  # as CUDA's caching allocator rounds
            self.live[storage._cdata] = size, stream
            self.live_bytes[stream] += size - before
            self.peaks[stream] = max(self.peaks[stream], self.live_bytes[stream])

    def _free(self, key: int) -> None:
        size, stream = self.live.pop(key, (0, 0))
        self.live_bytes[stream] -= size

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a pinned tensor; torch rounds each up to a power of two."""
        self.pinned_bytes += 1 << max(0, tensor.nbytes - 1).bit_length()
        return tensor

    @contextlib.contextmanager
    def on_stream(self, stream: "_Stream") -> Iterator[None]:
        before, self.stream = self.stream, stream.stream_id
        yield
        self.stream = before


class _Observer(TorchDispatchMode):
    """Counts every op, and answers with a stand-in where the host asks for values that do not exist."""

    def __init__(self, device: "FakeCuda"):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(kind.__name__ == "DTensor" for kind in types_):
            return NotImplemented  # comes again with its local tensors
        name = func._overloadpacket.__name__
        fake = any(isinstance(t, FakeTensor) for t in tree_iter((args, kwargs)))
        if fake and (answer := self._host_value(name, args)) is not None:
            return answer[0]
        if name in _QUERIES:
            return func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            self._note_transfer(name, args, kwargs)
        result = func(*args, **kwargs)
        self._count(func, name, args, kwargs, result)
        return result

    def _host_value(self, name: str, args: Sequence) -> tuple | None:
        """A stand-in, in a tuple, for what needs the data of a tensor; the host would wait for it."""
        x = args[0] if args else None
        if name == "_pin_memory":
            return (x,)
        if name == "is_pinned":
            return (True,)
        if name == "_local_scalar_dense":
            answer = True if x.dtype == torch.bool else 0.5 if x.dtype.is_floating_point else 0
        elif name == "nonzero":
            answer = x.new_empty((x.numel(), x.dim()), dtype=torch.int64)
        elif name == "equal":
            answer = True
        elif name in ("unique_dim", "_unique2", "unique_consecutive"):
            index = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
            answer = (x.clone(), index, torch.empty(0, dtype=torch.int64, device=x.device))
        else:
            return None
        if x.device.type == "cuda":
            self.device.syncs[f"{name} in {caller(1)}"] += 1
        return (answer,)

    def _note_transfer(self, name: str, args: Sequence, kwargs: dict) -> None:
        source = args[0] if name == "_to_copy" else args[1]
        target = torch.device(kwargs.get("device") or source.device) if name == "_to_copy" else args[0].device
        waits = not (kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2]))
        if waits and source.device.type != target.type and "cuda" in (source.device.type, target.type):
            self.device.syncs[f"copy {source.device.type} to {target.type} in {caller(1)}"] += 1

    def _count(self, func, name: str, args: Sequence, kwargs: dict, result) -> None:
        counts = self.device.counts
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_iter(result) if isinstance(t, torch.Tensor)]
        if not any(t.device.type == "cuda" for t in inputs + outputs):
            return
        known = {t.untyped_storage()._cdata for t in inputs}
        for tensor in outputs:
            if tensor.device.type == "cuda":
                counts.allocate(tensor)
        fresh = [t for t in outputs if t.untyped_storage()._cdata not in known]
        mutates = func._schema.is_mutable
        if name in _VIEWS or name in _ALLOCATIONS or (outputs and not fresh and not mutates):
            return
        written = fresh if not mutates or name.startswith("_foreach") else [*fresh, *outputs]
        moved = sum(t.numel() * t.element_size() for t in [*inputs, *written])
        if name == "convolution" and not args[0].is_contiguous():
            moved += 2 * args[0].numel() * args[0].element_size()  # torch transposes a 3-D input first
        flops = flops_of(name, args, outputs)
        rate = _PEAK.get(outputs[0].dtype if outputs else torch.float32, 60e12) * _PRODUCT_SHARE
        if "scaled_dot_product" in name:
            rate = _PEAK[torch.bfloat16] * _ATTENTION_SHARE
        launches = max(1, len(outputs) // 100) if name.startswith(("_foreach", "_fused")) else 1
        seconds = max(moved / _BANDWIDTH, flops / rate, _LAUNCH * launches)
        counts.kernels += 1
        counts.bytes += moved
        counts.flops += flops
        counts.seconds += seconds
        counts.by_op[name] += seconds


def flops_of(name: str, args: Sequence, outputs: Sequence[torch.Tensor]) -> int:
    """Floating-point operations of products, convolutions and attention: two for each multiplication."""
    if name in ("mm", "bmm"):
        return 2 * args[0].numel() * args[1].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2 * args[1].numel() * args[2].shape[-1]
    if name == "convolution":
        return 2 * outputs[0].numel() * args[1][0].numel()
    if name == "convolution_backward":
        return 2 * args[0].numel() * args[2][0].numel() * sum(map(bool, args[-1][:2]))
    if "scaled_dot_product" in name:
        backward = "backward" in name
        q, k = args[1:3] if backward else args[:2]
        return (10 if backward else 4) * q.shape[:3].numel() * k.shape[2] * q.shape[3]
    return 0


class _Event:
    def __init__(self, device: "FakeCuda"):
        self._device = device

    def record(self, stream=None) -> None: ...

    def wait(self, stream=None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._device.syncs[f"event.synchronize in {caller(1)}"] += 1


class _Stream:
    device_index = cuda_stream = priority = 0
    device_type = 1

    def __init__(self, device: "FakeCuda", stream_id: int = 0):
        self._device, self.stream_id = device, stream_id
        self.device = torch.device("cuda", 0)

    def record_event(self, event=None) -> _Event:
        return event or _Event(self._device)

    def wait_event(self, event) -> None: ...

    def wait_stream(self, stream) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._device.syncs[f"stream.synchronize in {caller(1)}"] += 1

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_) -> None: ...


def _apply(module: torch.nn.Module, fn, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` with new parameters: torch's own swaps fake tensors in place, which weak references forbid."""
    if recurse:
        for child in module.children():
            child._apply(fn)
    with torch.no_grad():
        for key, value in module._parameters.items():
            if value is not None and (new := fn(value)) is not value:
                module._parameters[key] = torch.nn.Parameter(new.detach(), value.requires_grad)
        for key, value in module._buffers.items():
            if value is not None:
                module._buffers[key] = fn(value)
    return module


class FakeCuda:
    """The context in which "cuda" exists; `devices` and `memory` are those of the pretended machine."""

    def __init__(self, devices: int = 1, memory: int = 80 << 30):
        self.devices, self.memory = devices, memory
        self.counts = Counts()
        self.syncs: collections.Counter = collections.Counter()
        self.attention: collections.Counter = collections.Counter()  # (kernel, reason it is not a fused one) -> calls

    def reset(self) -> None:
        """Count from here."""
        gc.collect()
        self.counts.reset()
        self.syncs.clear()
        self.attention.clear()

    def _scaled_dot_product_attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        """Choose the kernel by torch's conditions: fused ones take bf16, and a last stride of 1 in all three."""
        if q.device.type != "cuda":
            return self._real_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (t.to(torch.get_autocast_dtype("cuda")) if t.dtype == torch.float32 else t for t in (q, k, v))
        strides = [t.stride(-1) for t in (q, k, v)]
        half, dense = q.dtype in (torch.float16, torch.bfloat16), strides == [1, 1, 1]
        kernel = "math" if not dense else "flash" if half and attn_mask is None else "efficient"
        self.attention[kernel, "" if dense else f"last strides {strides} in {caller(1)}"] += 1
        with torch.autocast("cuda", enabled=False):
            if kernel == "math":
                return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]
            if kernel == "flash":
                return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
            gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
            arguments = (q, k, v, attn_mask, gradient, dropout_p, is_causal)
            return aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]

    def _patches(self) -> dict[str, object]:
        properties = types.SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=self.memory, multi_processor_count=132
        )
        stream, resize, empty = _Stream(self), torch.UntypedStorage.resize_, torch.empty
        stream_ids = itertools.count(1)
        self._real_attention = F.scaled_dot_product_attention

        def resize_(storage, size):  # how FSDP frees what it has gathered
            result = resize(storage, size)
            self.counts.resize(storage)
            return result

        def layout_of(x, weight, backend):
            channels_last = (
                x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            )
            return torch.channels_last if channels_last else torch.contiguous_format

        def empty_(*sizes, pin_memory=False, **options):
            tensor = empty(*sizes, **options)
            return self.counts.pin(tensor) if pin_memory else tensor

        def synchronize(device=None):
            self.syncs[f"cuda.synchronize in {caller(1)}"] += 1

        nothing = lambda *_, **__: None  # noqa: E731
        cuda = {
            "is_available": lambda: True,
            "device_count": lambda: self.devices,
            "current_device": lambda: 0,
            "is_initialized": lambda: True,
            "get_device_name": lambda device=None: properties.name,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_properties": lambda device=None: properties,
            "is_bf16_supported": lambda including_emulation=True: True,
            "mem_get_info": lambda device=None: (self.memory, self.memory),
            "max_memory_allocated": lambda device=None: self.counts.peak_bytes,
            "synchronize": synchronize,
            "current_stream": lambda device=None: stream,
            "default_stream": lambda device=None: stream,
            "Stream": lambda *_, **__: _Stream(self, next(stream_ids)),
            "Event": lambda *_, **__: _Event(self),
            "stream": self.counts.on_stream,
            "get_rng_state": lambda device="cuda": torch.empty(16, dtype=torch.uint8),
            "amp.common.amp_definitely_not_available": lambda: False,
        }
        for name in (
            "_lazy_init",
            "set_device",
            "reset_peak_memory_stats",
            "empty_cache",
            "manual_seed",
            "manual_seed_all",
            "set_rng_state",
        ):
            cuda[name] = nothing
        return {f"torch.cuda.{name}": value for name, value in cuda.items()} | {
            "torch.accelerator.is_available": lambda: True,
            "torch.accelerator.device_count": lambda: self.devices,
            "torch.nn.Module._apply": _apply,
            "torch._subclasses.fake_tensor.FakeTensorMode.avoid_device_init": property(lambda mode: True),
            "torch.UntypedStorage.resize_": resize_,
            "torch._C._select_conv_backend": lambda *_, **__: torch._C._ConvBackend.Cudnn,
            "torch._C._conv_determine_backend_memory_format": layout_of,
            "torch.nn.functional.scaled_dot_product_attention": self._scaled_dot_product_attention,
            "torch.empty": empty_,
            "torch.Tensor.pin_memory": lambda tensor, *_, **__: tensor,
            "torch.Tensor.record_stream": nothing,
        }

    def __enter__(self) -> "FakeCuda":
        self._stack = contextlib.ExitStack()
        _DRIVER.pretend(0)
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _DRIVER.pretend(127)  # as many as the guard of fake tensors says there are
        for target, value in self._patches().items():
            self._stack.enter_context(mock.patch(target, new=value))
        self._stack.enter_context(_Observer(self))
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)
