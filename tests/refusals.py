"""The ways in which a released weight file can be wrong, tried on one `load_released`."""

import pickle

import pytest
import torch


class Code:
    """Prints when it is unpickled."""

    MARK = "code was run"

    def __reduce__(self):
        return print, (self.MARK,)


def check_refusals(load, state: dict[str, torch.Tensor], name: str, folder, capsys) -> None:
    """`load(source)` takes `state` from a file and refuses each spoiled form, naming the fault and the file."""
    path = folder / "weights.pth"

    def rejected(spoiled, message: str):
        torch.save(spoiled, path)
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)

    torch.save(state, path)
    load(path)
    whole = path.read_bytes()
    rejected({key: value for key, value in state.items() if key != name}, f"{name} is missing")
    rejected(state | {"stray": torch.zeros(1)}, "stray is not expected")
    rejected(state | {name: torch.zeros(3, 1, 2)}, rf"{name} has shape \(3, 1, 2\)")
    rejected(state | {name: state[name].double()}, f"{name} is torch.float64, not torch.float32")
    rejected(state | {name: 1.5}, "not tensors")
    rejected([1, 2], "holds a list")
    rejected(state | {name: Code()}, "would run code")
    for content, message in ((whole[: len(whole) // 2], "damaged"), (b"", "damaged"), (b"<html>", "damaged")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(path)
    path.write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(ValueError, match="refused"):
        load(path)
    with pytest.raises(ValueError, match="mmaudio-hf weights download"):
        load(folder / "absent.pth")
    with pytest.raises(ValueError, match=r"the given state dict (does not fit|is not a flow network)"):
        load({f"{key}_x": value for key, value in state.items()})
    assert Code.MARK not in capsys.readouterr().out
