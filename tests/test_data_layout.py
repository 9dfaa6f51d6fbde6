"""The compact layout: its size, its bytes, and that training under bf16 autocast cannot tell it from the other."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_stores import AUDIO_SHAPES, METADATA, SHAPES, make_store, random_values
from toy_stores import MODEL

from mmaudio_hf.config import FlowConfig, variant_config
from mmaudio_hf.data.layout import Contents, layout_columns
from mmaudio_hf.data.loader import training_batches, validation_batches
from mmaudio_hf.data.mixture import Mixture, samples_per_epoch
from mmaudio_hf.data.sampler import dataset_indices, process_sample_indices
from mmaudio_hf.data.store import FeatureStore, StoreWriter
from mmaudio_hf.data.tools import convert, merge, subset, verify
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import column_shapes
from mmaudio_hf.training.step import flow_step

TEXT_OF_ROW = [3, 0, 0, 1, 3, 2, 1, 0, 3]  # which of four captions a row has


def write(path: Path, order=((0, 9),), shapes=SHAPES, **settings) -> dict[str, torch.Tensor]:
    """A store of 9 rows with four different captions, its rows written in the given blocks."""
    values = random_values(9, shapes)
    values["text_features"] = values["text_features"][TEXT_OF_ROW]
    ids, captions = [f"id_{row}" for row in range(9)], [f"caption {text}" for text in TEXT_OF_ROW]
    with StoreWriter(path, shapes, 9, **METADATA, **settings) as writer:
        for first, last in order:
            block = {name: value[first:last] for name, value in values.items()}
            writer.write(first, ids[first:last], captions[first:last], block)
    return values


def same_bytes(first: Path, second: Path) -> None:
    """Two stores are the same byte for byte."""
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    pairs = [(first / name, second / name) for name in names]
    pairs += [
        (first.with_name(first.name + end), second.with_name(second.name + end)) for end in (".tsv", ".manifest.json")
    ]
    for one, other in pairs:
        assert one.read_bytes() == other.read_bytes(), one


# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", ["float32", "bfloat16"])
def test_compact_rows_are_the_rounded_rows_whatever_order_they_came_in(sync, tmp_path):
    settings = {"layout": "compact", "sync_dtype": sync}
    values = write(tmp_path / "a", **settings)
    write(tmp_path / "b", ((6, 9), (0, 1), (2, 6), (1, 2)), **settings)
    same_bytes(tmp_path / "a", tmp_path / "b")
    store = FeatureStore.open(tmp_path / "a")
    assert store.layout == store.manifest["layout"] == "compact" and store.contents.texts == 4
    assert store.text_index.tolist() == [0, 1, 1, 2, 0, 3, 2, 1, 0]  # texts in the order of their first rows
    kept = {"mean", "std"} | ({"sync_features"} if sync == "float32" else set())
    rows = [8, 0, 3, 3, 5]
    for name, value in store.read(rows).items():
        expected = values[name][rows] if name in kept else values[name][rows].bfloat16()
        assert value.dtype == expected.dtype and torch.equal(value, expected), name
    texts = torch.cat([block for _, block in store.blocks("text_features")])
    assert len(texts) == 4 and torch.equal(texts[store.text_index], values["text_features"].bfloat16())
    assert verify(tmp_path / "a").ok


def test_conversion_both_ways(tmp_path):
    values = write(tmp_path / "reference")
    convert(tmp_path / "reference", tmp_path / "compact", "compact", "bfloat16")
    back = convert(tmp_path / "compact", tmp_path / "back", "reference")
    convert(tmp_path / "back", tmp_path / "again", "compact", "bfloat16")
    same_bytes(tmp_path / "compact", tmp_path / "again")
    write(tmp_path / "written", layout="compact", sync_dtype="bfloat16")
    same_bytes(tmp_path / "compact", tmp_path / "written")
    convert(tmp_path / "reference", tmp_path / "copy", "reference")
    same_bytes(tmp_path / "reference", tmp_path / "copy")
    rounded = {n: v if n in ("mean", "std") else v.bfloat16().float() for n, v in values.items()}
    assert all(torch.equal(value, rounded[name]) for name, value in back.read(range(9)).items())


def test_a_caption_with_two_kinds_of_text_loses_nothing(tmp_path):
    values = random_values(3, AUDIO_SHAPES)
    with StoreWriter(tmp_path / "s", AUDIO_SHAPES, 3, **METADATA) as writer:
        writer.write(0, ["a", "b", "c"], ["same"] * 3, values)
    compact = convert(tmp_path / "s", tmp_path / "c", "compact")
    assert compact.contents.texts == 3
    assert torch.equal(compact.read([0, 1, 2])["text_features"], values["text_features"].bfloat16())


def test_size_of_the_published_mix():
    """VGGSound (180,000 rows, 310 labels) and the five audio sets (379,543 rows), 16 kHz; docs/stores.md has the table.

    With bf16 sync features 45.1 % if no two rows of the audio sets share a caption; every shared one saves 158 kB.
    Their clips do: up to five of one audio file have its caption. At 44.1 kHz 63 % may differ for less than 45 %.
    """
    video, audio = 180_000, 379_543

    def size(mode, layout, sync, texts) -> int:
        total = 0
        for rows, different, with_video in ((video, 310, True), (audio, texts, False)):
            columns = layout_columns(column_shapes(mode, video=with_video), layout, sync)
            total += Contents(rows, columns, different if layout == "compact" else None).size
        return total

    for mode, all_differ, halves in (("16k", 0.4513, 0.3664), ("44k", 0.5065, 0.4301)):
        whole = size(mode, "reference", "float32", 0)
        assert size(mode, "compact", "bfloat16", audio) / whole == pytest.approx(all_differ, abs=1e-4)
        assert size(mode, "compact", "bfloat16", audio // 2) / whole == pytest.approx(halves, abs=1e-4)
    for mode, different in (("16k", 0.992), ("44k", 0.63)):
        below, whole = round(different * audio), size(mode, "reference", "float32", 0)
        assert size(mode, "compact", "bfloat16", below) < 0.45 * whole
        assert size(mode, "compact", "bfloat16", round(below + 0.001 * audio)) > 0.45 * whole
    whole = size("16k", "reference", "float32", 0)
    assert size("16k", "compact", "float32", audio // 2) > 0.45 * whole  # CLIP and text alone do not reach it


# --- training ----------------------------------------------------------------------------------------------------

TINY = {**MODEL, "hidden_dim": 32}


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Path:
    """Reference stores of real shapes, one with and one without video, and compact copies of them."""
    folder = tmp_path_factory.mktemp("copies")
    for name, video in (("video", True), ("audio", False)):
        shapes = column_shapes("16k", 1.0, video=video)
        values = random_values(4, shapes)
        values["text_features"][3] = values["text_features"][1]
        metadata = {"mode": "16k", "duration": 1.0, "encoders": {}}
        with StoreWriter(folder / name, shapes, 4, **metadata) as writer:
            writer.write(0, [f"{name}_{row}" for row in range(4)], ["a", "b", "c", "b"], values)
        for sync in ("float32", "bfloat16"):
            convert(folder / name, folder / f"{name}_{sync}", "compact", sync).close()
    return folder


def losses_and_gradients(folder: Path, ending: str, v2: bool, autocast: bool) -> list[torch.Tensor]:
    """Losses of two training batches and one validation batch, and all gradients, of a tiny network."""
    torch.manual_seed(0)
    config = variant_config(
        "large_44k_v2" if v2 else "small_16k", **{k: v for k, v in TINY.items() if k != "variant"}, mode="16k"
    )
    network = MMAudio(config)
    with torch.no_grad():
        for parameter in network.parameters():  # some are zero at the start and would hide what comes before them
            parameter.normal_(std=0.05)
    network.latent_mean.data.fill_(0.0), network.latent_std.data.fill_(1.0)
    mixture = Mixture([(FeatureStore.open(folder / f"{name}{ending}"), 1) for name in ("video", "audio")], config)
    flow, losses = FlowConfig(condition_dropout=0.4, independent_video_dropout=v2), []
    settings = {
        "seed": 5,
        "global_batch": 4,
        "sample_indices": process_sample_indices(4, 1, 0),
        "start_step": 0,
        "num_steps": 2,
    }
    with (
        training_batches(mixture, **settings, threads=1) as loader,
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        for (batch,) in loader:
            loss = flow_step(network, batch, flow, network.latent_mean, network.latent_std).loss
            loss.mean().backward()
            losses.append(loss.detach())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for batch in validation_batches(mixture, seed=5, batch_size=8, threads=1):
            losses.append(flow_step(network, batch, flow, network.latent_mean, network.latent_std).loss)
    mixture.close()
    gradients = [p.grad for p in network.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    assert network.empty_clip_feat.grad.abs().sum() > 0
    return losses + gradients


@pytest.mark.parametrize("v2", [False, True])
def test_training_under_bf16_autocast_cannot_distinguish_the_layouts(copies, v2):
    reference = losses_and_gradients(copies, "", v2, autocast=True)
    compact = losses_and_gradients(copies, "_float32", v2, autocast=True)
    assert all(torch.equal(one, other) for one, other in zip(reference, compact, strict=True))
    # bf16 sync features are rounded before the position embedding is added, and then once more: close, not equal.
    rounded = losses_and_gradients(copies, "_bfloat16", v2, autocast=True)
    assert not torch.equal(rounded[0], reference[0])
    torch.testing.assert_close(rounded[0], reference[0], rtol=2e-2, atol=2e-2)


def test_training_in_float32_takes_both_layouts(copies):
    reference = losses_and_gradients(copies, "", False, autocast=False)
    compact = losses_and_gradients(copies, "_bfloat16", False, autocast=False)
    assert not torch.equal(compact[0], reference[0])
    torch.testing.assert_close(compact[0], reference[0], rtol=2e-2, atol=2e-2)


# --- merge, subset -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["reference", "compact"])
def test_merge_and_subset_keep_rows_texts_and_statistics(layout, tmp_path):
    write(tmp_path / "whole", layout=layout)
    subset(tmp_path / "whole", tmp_path / "first", range(4))
    last = subset(tmp_path / "whole", tmp_path / "last", range(4, 9))
    assert last.ids == [f"id_{row}" for row in range(4, 9)] and last.layout == layout
    assert last.manifest["counts"] == {"chosen": 5, "of": 9} and verify(last.path).ok
    merged = merge([tmp_path / "first", tmp_path / "last"], tmp_path / "merged")
    whole = FeatureStore.open(tmp_path / "whole")
    assert merged.manifest | {"counts": {}} == whole.manifest and verify(merged.path).ok
    assert all(torch.equal(value, whole.read(range(9))[name]) for name, value in merged.read(range(9)).items())
    shuffled = subset(tmp_path / "whole", tmp_path / "shuffled", [7, 0, 3])
    assert shuffled.ids == ["id_7", "id_0", "id_3"] and shuffled.captions == ["caption 0", "caption 3", "caption 1"]
    assert torch.equal(shuffled.read([0])["text_features"], whole.read([7])["text_features"])


def test_merge_refuses_what_does_not_belong_together(tmp_path):
    make_store(tmp_path / "a", 3, preprocessing={"alignment": "timestamps"}, counts={"accepted": 3})
    other = {
        "b": ({"encoders": {"clip": {"id": "toy", "fingerprint": "c2"}}}, "a has encoder clip .*c1.*b has .*c2"),
        "c": ({"preprocessing": {"alignment": "reference"}}, "a has preprocessing .*timestamps.*c has .*reference"),
        "d": ({"layout": "compact"}, "a has clip_features as float32.*d as bfloat16.*store convert"),
        "e": ({"shapes": AUDIO_SHAPES}, "a has the columns .*e has mean, std, text_features"),
    }
    for name, (metadata, message) in other.items():
        make_store(tmp_path / name, 2, **metadata)
        with pytest.raises(ValueError, match=message):
            merge([tmp_path / "a", tmp_path / name], tmp_path / "out")
    subset(tmp_path / "a", tmp_path / "f", [2, 1])
    with pytest.raises(ValueError, match=r"'a_002' is in row 2 of .*a and in row 0 of .*f.*--skip-duplicates"):
        merge([tmp_path / "a", tmp_path / "f"], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    merged = merge([tmp_path / "f", tmp_path / "a"], tmp_path / "out", skip_duplicates=True)
    assert merged.ids == ["a_002", "a_001", "a_000"] and merged.manifest["counts"]["skipped_duplicates"] == 2


# --- fractional repeats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [0.5, 0.3, 1.0, 2.5, 0.01])
def test_fractional_repeats_visit_every_row_equally_often(repeats, tmp_path):
    stores = [make_store(tmp_path / "v", 10), make_store(tmp_path / "a", 7, AUDIO_SHAPES)]
    mixture, epochs = Mixture(list(zip(stores, (repeats, 1), strict=True)), seed=3), 12
    samples = samples_per_epoch(10, repeats)
    assert len(mixture) == samples + 7
    seen = dataset_indices(3, 0, np.arange(len(mixture) * epochs), len(mixture) * epochs, len(mixture))
    source, rows = mixture.locate(seen)
    for epoch in range(epochs):
        chosen = slice(epoch * len(mixture), (epoch + 1) * len(mixture))
        assert Counter(source[chosen].tolist()) == {0: samples, 1: 7}
        visits = np.bincount(rows[chosen][source[chosen] == 0], minlength=10)
        assert repeats == 2.5 or visits.max() <= 1
        visits = np.bincount(rows[: chosen.stop][source[: chosen.stop] == 0], minlength=10)
        assert visits.max() - visits.min() <= 1  # counted from the start, at the end of every epoch
    if repeats == 0.5:  # two epochs are a whole; halves are drawn again
        halves = [frozenset(rows[e * 12 : e * 12 + 12][source[e * 12 : e * 12 + 12] == 0].tolist()) for e in range(12)]
        assert len(set(halves)) > 2
    again = mixture.locate(seen[40:50])
    assert again[1].tolist() == rows[40:50].tolist()  # no state: any part of the order can be asked for
