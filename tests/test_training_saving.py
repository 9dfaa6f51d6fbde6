"""Copies beside training: every kind of tensor, one copy of what occurs twice, and the same memory each time."""

import torch

from mmaudio_hf.training.checkpointer import HostCopy


def test_copies_of_any_tensor_hold_until_the_next():
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 5, generator=draw)
    group = {
        "matrix": matrix,
        "transposed": torch.randn(4, 3, generator=draw).T,  # its memory has another order
        "half": torch.randn(7, generator=draw).bfloat16(),
        "flags": torch.tensor([True, False]),
        "step": torch.tensor(3),
        "none": torch.empty(0),
        "trained": torch.nn.Parameter(torch.randn(3, generator=draw)),
    }
    copy = HostCopy()
    copy.reserve({"model": group, "ema": {"same": matrix}})
    places = None
    for _ in range(2):
        taken, event = copy.copy({"model": group, "ema": {"same": matrix}})
        assert event is None and taken["ema"]["same"] is taken["model"]["matrix"]
        expected = {name: tensor.detach().clone() for name, tensor in group.items()}
        with torch.no_grad():
            for tensor in group.values():
                tensor.zero_()
        for name, tensor in expected.items():
            assert torch.equal(taken["model"][name], tensor) and taken["model"][name].dtype == tensor.dtype
        assert places in (None, [tensor.data_ptr() for tensor in taken["model"].values()])
        places = [tensor.data_ptr() for tensor in taken["model"].values()]
        matrix.add_(1)
