"""Order of the samples, their division among processes, their random inputs, and mixtures of stores."""

from collections import Counter

import numpy as np
import pytest
import torch
from data_stores import AUDIO_SHAPES, MODEL, SHAPES, make_store

from mmaudio_hf.config import EncoderConfig, ExtractionConfig, StoreConfig, VideoSource
from mmaudio_hf.data.mixture import Mixture, open_mixture
from mmaudio_hf.data.sampler import (
    Draws,
    dataset_indices,
    permutation,
    process_sample_indices,
    sample_noise,
    sample_noise_for_ids,
    validation_indices,
)


def test_the_order_never_changes():
    assert permutation(14159265, 0, 8).tolist() == [0, 1, 6, 2, 7, 3, 5, 4]
    assert permutation(14159265, 1, 8).tolist() == [3, 6, 0, 4, 1, 2, 7, 5]


def test_an_epoch_is_a_permutation_of_its_own():
    orders = [permutation(seed, epoch, 1000) for seed in (1, 2) for epoch in (0, 1)]
    for i, order in enumerate(orders):
        assert sorted(order.tolist()) == list(range(1000))
        assert all((order == other).mean() < 0.02 for other in orders[:i])
    with pytest.raises(ValueError, match="read-only"):
        orders[0][0] = 1


def test_an_order_is_without_trend():
    order = permutation(3, 0, 10_000)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05


def test_steps_run_through_the_epochs_without_gap():
    seen = np.concatenate([dataset_indices(4, step, np.arange(8), 8, 30) for step in range(15)])  # 4 epochs of 30
    for epoch in range(4):
        assert seen[epoch * 30 : (epoch + 1) * 30].tolist() == (30 * epoch + permutation(4, epoch, 30)).tolist()
    big = dataset_indices(4, 1, np.arange(100), 100, 30)  # a step may be longer than an epoch
    assert Counter((big % 30).tolist()).most_common()[-1][1] == 2


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (4, 1), (1, 4), (2, 2), (4, 2)])
def test_processes_and_accumulation_divide_a_step_without_changing_it(world, accumulation):
    whole = dataset_indices(4, 3, np.arange(16), 16, 50)
    indices = np.full(16, -1)
    for rank in range(world):
        shares = process_sample_indices(16, world, rank, accumulation)
        assert [len(share) for share in shares] == [16 // world // accumulation] * accumulation
        for share in shares:
            assert (indices[share] == -1).all()
            indices[share] = dataset_indices(4, 3, share, 16, 50)
    assert indices.tolist() == whole.tolist()


def test_a_batch_that_does_not_split_is_an_error():
    with pytest.raises(ValueError, match="batch size 10 does not split over 2 processes x 2 accumulation steps"):
        process_sample_indices(10, 2, 0, 2)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_validation_counts_every_row_once_and_keeps_processes_in_step(world):
    shares = [list(validation_indices(11, 2, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    seen = [index for share in shares for indices, valid in share for index in indices[valid].tolist()]
    assert sorted(seen) == list(range(11))
    assert all(len(indices) == 2 and indices.max() < 11 for share in shares for indices, _ in share)
    assert [indices.tolist() for indices, _ in shares[0]][:2] == [[0, 1], [2 * world, 2 * world + 1]]


# --- mixtures ----------------------------------------------------------------------------------------------------


def test_each_row_is_visited_as_often_as_its_store_repeats(tmp_path):
    video, audio = make_store(tmp_path / "v", 5), make_store(tmp_path / "a", 3, AUDIO_SHAPES)
    mixture = Mixture([(video, 2), (audio, 4)], MODEL)
    assert len(mixture) == 2 * 5 + 4 * 3 and mixture.latent_shape == (5, 4)
    seen = np.concatenate([dataset_indices(0, step, np.arange(11), 11, 22) for step in range(2)])
    visits = Counter(zip(*(array.tolist() for array in mixture.locate(seen)), strict=True))
    assert visits == {**{(0, row): 2 for row in range(5)}, **{(1, row): 4 for row in range(3)}}


def test_statistics_come_from_the_first_store_with_video(tmp_path):
    audio = make_store(tmp_path / "a", 3, AUDIO_SHAPES, seed=1)
    first, second = make_store(tmp_path / "v", 5, seed=2), make_store(tmp_path / "w", 5, seed=3)
    assert Mixture([(audio, 1), (first, 1), (second, 1)]).latent_statistics() is first.latent_statistics()
    assert Mixture([(audio, 1)]).latent_statistics() is audio.latent_statistics()


def test_a_recipe_names_the_stores(tmp_path):
    make_store(tmp_path / "v", 5)
    assert len(open_mixture([StoreConfig(str(tmp_path / "v"), repeats=3)], MODEL)) == 15
    with pytest.raises(ValueError, match=r"no feature store at .*absent"):
        open_mixture([StoreConfig(str(tmp_path / "absent"))])
    with pytest.raises(ValueError, match="names no store"):
        open_mixture([])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"mode": "44k"}, "v has mode '16k', .*w has '44k'"),
        ({"duration": 10.0}, "v has duration 8.0, .*w has 10.0"),
        ({"normalisation": "peak"}, "v has normalisation 'none', .*w has 'peak'"),
        ({"encoders": {"clip": {"id": "toy", "fingerprint": "c2"}}}, "v has encoder clip .*c1.*w has .*c2"),
        ({"encoders": {"clip": {"id": "toy", "fingerprint": "tensors c1"}}}, "of files and not of tensors again"),
        ({"shapes": {**SHAPES, "clip_features": (6, 9)}}, r"v has clip_features as .*\(6, 8\).*w as .*\(6, 9\)"),
        ({"layout": "compact"}, "v has clip_features as float32 .*w as bfloat16 .*`mmaudio-hf store convert .*w .*"),
    ],
)
def test_stores_that_disagree_are_named(metadata, message, tmp_path):
    first = make_store(tmp_path / "v", 2, normalisation="none")
    second = make_store(tmp_path / "w", 2, **{"normalisation": "none"} | metadata)
    with pytest.raises(ValueError, match=message):
        Mixture([(first, 1), (second, 1)])


@pytest.mark.parametrize("encoders", [{"vae": {}}, {"clip": {"id": "the same elsewhere", "fingerprint": "c1"}}])
def test_stores_of_other_encoders_or_of_the_same_weights_agree(encoders, tmp_path):
    first, second = make_store(tmp_path / "v", 2), make_store(tmp_path / "w", 2, AUDIO_SHAPES, encoders=encoders)
    assert len(Mixture([(first, 1), (second, 1)], MODEL)) == 4


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"shapes": {**SHAPES, "sync_features": (8, 3)}}, r"sync_features has shape \(8, 3\), .* expects \(16, 3\)"),
        ({"mode": "44k"}, "v has mode '44k', model small_16k expects '16k'"),
        ({"duration": 9.0}, "v has duration 9.0, model small_16k expects 8.0"),
    ],
)
def test_stores_that_do_not_fit_the_model_are_an_error(metadata, message, tmp_path):
    store = make_store(tmp_path / "v", 2, **metadata)
    with pytest.raises(ValueError, match=message):
        Mixture([(store, 1)], MODEL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "toy"}, "v was made with the released encoder net, .*encoders.kind toy"),
        ({"precision": "bf16"}, "v was made with the encoder net in fp32, .*set encoders.precision=fp32"),
    ],
)
def test_stores_of_other_encoders_than_the_recipes_are_an_error(changes, message, tmp_path):
    store = make_store(tmp_path / "v", 2, encoders={"clip": {"id": "net", "fingerprint": "c1"}})
    assert len(Mixture([(store, 1)], encoders=EncoderConfig())) == 2
    with pytest.raises(ValueError, match=message):
        Mixture([(store, 1)], encoders=EncoderConfig(**changes))
    half = make_store(tmp_path / "h", 2, encoders={"clip": {"id": "net (bf16)", "fingerprint": "c1 (bf16)"}})
    assert len(Mixture([(half, 1)], encoders=EncoderConfig(precision="bf16"))) == 2
    with pytest.raises(ValueError, match=r"h was made with the encoder net \(bf16\) in bf16"):
        Mixture([(half, 1)], encoders=EncoderConfig())


def test_a_store_extracted_with_other_settings_of_the_same_recipe_is_an_error(tmp_path):
    """Where the recipe extracts the store itself; other stores only have to agree with each other."""
    settings = {"version": 1, "alignment": "timestamps", "normalize_audio": True}
    make_store(tmp_path / "v", 2, preprocessing=settings)

    def opened(name: str = "v", alignment: str = "timestamps", normalize_audio: bool = True) -> int:
        source = VideoSource(name, "videos", "list.tsv", normalize_audio)
        extraction = ExtractionConfig(str(tmp_path), (source,), alignment=alignment)
        return len(open_mixture([StoreConfig(str(tmp_path / "v"))], extraction=extraction))

    assert opened() == opened("other", "reference", False) == 2
    with pytest.raises(ValueError, match=r"v was made with alignment 'timestamps', .* 'reference'.*extract-video"):
        opened(alignment="reference")
    with pytest.raises(ValueError, match=r"v was made with normalize_audio True, .* False"):
        opened(normalize_audio=False)


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
