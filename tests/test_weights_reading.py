import os

import pytest
import torch
from refusals import check_refusals
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mmaudio_hf.weights import check_state, load_state, load_strict, save_tensors

STATE = {"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(3)}


def load(source):
    return load_strict(nn.Linear(2, 3), load_state(source), source)


def test_every_wrong_file_raises(tmp_path, capsys):
    check_refusals(load, STATE, "weight", tmp_path, capsys)


def test_safetensors_and_both_torch_formats_are_read(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "a.pt")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pt", "old.pt"):
        state = load_state(tmp_path / name)
        assert state.keys() == STATE.keys() and torch.equal(state["weight"], STATE["weight"])


def test_damaged_safetensors_raises(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00notjson")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        load_state(tmp_path / "a.safetensors")


def test_a_file_knows_each_of_its_bytes(tmp_path):
    path, metadata = tmp_path / "a.safetensors", {"step": "8", "sigma_rel": "0.05", "format": "pt"}
    written = set()
    for _ in range(8):  # safetensors alone has three keys in any of six orders
        save_tensors(STATE, path, metadata)
        written.add(path.read_bytes())
    [whole] = written
    assert all(torch.equal(value, STATE[name]) for name, value in load_state(path).items())
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) != [] and metadata.items() <= file.metadata().items()
    key = range(whole.index(b'"sha256"'), whole.index(b'"sha256"') + len('"sha256":"'))
    for position in set(range(len(whole))) - set(key):  # without its key there is no checksum, and no tensor differs
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
            load_state(path)
    for length in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
            load_state(path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_who_may_read_a_file_follows_from_the_umask(tmp_path, umask, mode):
    """Safetensors alone writes files for their owner, and a group could not share its runs."""
    before = os.umask(umask)
    try:
        save_tensors(STATE, tmp_path / "a.safetensors", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


def test_prefix_and_key_select_tensors():
    whole = {"generator": {f"net.{name}": value for name, value in STATE.items()} | {"other": torch.ones(1)}}
    assert load_state(whole, key="generator", prefix="net.").keys() == STATE.keys()
    assert load_state(STATE, key="generator", prefix="net.").keys() == STATE.keys()


def test_meta_modules_take_the_tensors_without_copy_and_are_frozen():
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    module = load_strict(module, STATE, STATE)
    assert module.weight.data_ptr() == STATE["weight"].data_ptr()
    assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_only_the_first_problems_are_listed():
    with pytest.raises(ValueError, match="a0 is missing; a1 is missing; a2 is missing; a3 is missing; and 6 more"):
        check_state({}, {f"a{i}": torch.ones(1) for i in range(10)}, "file")
