"""Random numbers as pure functions of seed, stream, step and slot, or of an item's id."""

import numpy as np
import pytest
import torch

from mmaudio_hf.data.noise import Draws, sample_noise, sample_noise_for_ids

SHAPE = (5, 4)
NAMES = tuple(Draws.__dataclass_fields__)
UNIFORM = [name for name in NAMES if name.startswith("drop_")]


def same(ours: Draws, theirs: Draws, rows=slice(None)) -> bool:
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)[rows]) for name in NAMES)


def test_the_first_values_never_change():
    noise = sample_noise(14159265, "train", 7, [3], SHAPE)
    values = {name: getattr(noise, name).flatten()[:3].tolist() for name in NAMES}
    expected = {
        "latent_noise": [-0.300658, 0.249616, -2.800779],
        "z": [-0.140952],
        "x0": [-0.959979, -0.693903, 0.276892],
        "drop_video": [0.176264],
        "drop_clip": [0.588574],
        "drop_sync": [0.174245],
        "drop_text": [0.748104],
    }
    assert values == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    noise = sample_noise_for_ids(14159265, ["0B4dYTMsgHA_000130"], SHAPE)
    assert [noise.z.item(), noise.x0[0, 0, 0].item()] == pytest.approx([0.45241, -1.269276], abs=1e-6)


def test_shapes_types_and_memory():
    noise = sample_noise(1, "train", 0, range(3), SHAPE)
    for name in NAMES:
        value = getattr(noise, name)
        assert value.dtype == torch.float32 and value.is_contiguous(), name
        assert value.shape == ((3, *SHAPE) if name in ("latent_noise", "x0") else (3,)), name
    assert sample_noise(1, "train", 0, [], SHAPE).x0.shape == (0, *SHAPE)


@pytest.mark.parametrize("shape", [SHAPE, (1, 1), (7, 3), (13, 5), (250, 20)])
def test_a_sample_has_the_same_numbers_in_any_batch(shape):
    """Bit for bit, although vector units compute the ends of an array otherwise than its middle."""
    whole = sample_noise(5, "train", 9, range(16), shape)
    assert same(sample_noise(5, "train", 9, [11, 2, 2], shape), whole, [11, 2, 2])
    for first in range(15):
        assert same(sample_noise(5, "train", 9, [first], shape), whole, [first])
        assert same(sample_noise(5, "train", 9, range(first, 16), shape), whole, slice(first, 16))


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_number(threads):
    before = torch.get_num_threads()
    one, many = [], []
    try:
        for count, noise in ((1, one), (threads, many)):
            torch.set_num_threads(count)
            noise.append(sample_noise(5, "train", 9, range(33), (251, 19)))  # large enough to be divided
    finally:
        torch.set_num_threads(before)
    assert same(one[0], many[0])


def test_an_item_has_the_same_numbers_in_any_batch():
    ids = ["a", "b", "c"]
    whole = sample_noise_for_ids(5, ids, SHAPE)
    assert same(sample_noise_for_ids(5, ["c", "a"], SHAPE), whole, [2, 0])
    assert sample_noise_for_ids(5, [f"clip_{i:04d}" for i in range(100)], SHAPE).z.unique().numel() == 100


def test_tails_are_those_of_the_normal_distribution():
    noise = sample_noise(3, "train", 0, range(400), (250, 20))
    for values in (noise.latent_noise, noise.x0):
        for bound, expected in ((1, 0.317311), (3, 2.69980e-3), (4, 6.33425e-5)):
            count = int((values.abs() > bound).sum())
            mean = expected * values.numel()
            assert abs(count - mean) < 5 * mean**0.5, (bound, count, mean)
        assert values.abs().max() < 6.7


@pytest.mark.parametrize("changes", [{"seed": 6}, {"stream": "other"}, {"step": 10}, {"sample_indices": [12]}])
def test_every_argument_changes_every_number(changes):
    first = {"seed": 5, "stream": "train", "step": 9, "sample_indices": [11], "latent_shape": SHAPE}
    ours, theirs = sample_noise(**first), sample_noise(**{**first, **changes})
    assert not any((getattr(ours, name) == getattr(theirs, name)).any() for name in NAMES)


def test_step_and_sample_index_are_not_interchangeable():
    assert not torch.equal(sample_noise(5, "train", 1, [2], SHAPE).z, sample_noise(5, "train", 2, [1], SHAPE).z)


def test_times_and_drops_do_not_depend_on_the_latent_length():
    short, long = (sample_noise(5, "train", 3, range(4), (length, 4)) for length in (5, 50))
    assert all(torch.equal(getattr(short, name), getattr(long, name)) for name in ["z", *UNIFORM])


def test_distributions_and_independence():
    noise = sample_noise(3, "train", 0, range(4000), (10, 4))
    columns = {name: getattr(noise, name).flatten(1).double() for name in ("latent_noise", "x0")}
    columns |= {name: getattr(noise, name).double()[:, None] for name in ["z", *UNIFORM]}
    for name, values in columns.items():
        mean, var = (0.5, 1 / 12) if name in UNIFORM else (0.0, 1.0)
        allowed = 5 / values.numel() ** 0.5
        assert abs(values.mean() - mean) < allowed * var**0.5, name
        assert abs(values.var() / var - 1) < 2 * allowed, name
        if name in UNIFORM:
            assert values.min() >= 0 and values.max() < 1
    joined = torch.cat(list(columns.values()), dim=1)
    correlation = np.corrcoef(joined.numpy(), rowvar=False) - np.eye(joined.shape[1])
    assert np.abs(correlation).max() < 5.5 / 4000**0.5
    neighbours = np.corrcoef(joined[1:].flatten(), joined[:-1].flatten())[0, 1]
    assert abs(neighbours) < 5 / joined.numel() ** 0.5 + 0.03  # the uniforms' common mean gives a little
