"""Feature stores as `datasets.Dataset` and back: the same numbers, ids, captions and manifest."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from data_stores import AUDIO_SHAPES, SHAPES, make_store

from mmaudio_hf.data.layout import manifest_file
from mmaudio_hf.data.store import FeatureStore

KNOWN = {"preprocessing": {"alignment": "reference"}, "normalisation": {"audio_peak": 0.95}, "inputs_hash": "of media"}
LAYOUTS = [{}, {"layout": "compact"}, {"layout": "compact", "sync_dtype": "bfloat16"}]
CASES = [(SHAPES, layout) for layout in LAYOUTS] + [(AUDIO_SHAPES, layout) for layout in LAYOUTS[:2]]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def files(store: Path) -> dict[str, bytes]:
    """The files of a store, without what its manifest says of the extraction alone."""
    content = {path.name: path.read_bytes() for path in store.iterdir()}
    manifest = json.loads(manifest_file(store).read_text())
    manifest = {key: value for key, value in manifest.items() if key not in ("counts", "made_of", "checksum")}
    return content | {"table": store.with_name(f"{store.name}.tsv").read_bytes(), "manifest": manifest}


@pytest.mark.parametrize(("shapes", "layout"), CASES)
def test_there_and_back(tmp_path, shapes, layout):
    store = make_store(tmp_path / "a", 9, shapes, **KNOWN, **layout)
    dataset = store.to_dataset()
    assert dataset["id"][:] == store.ids and dataset["caption"][:] == store.captions
    for name, values in store.read(range(9)).items():
        assert np.array_equal(np.asarray(dataset.with_format("numpy")[name][:]), values.float().numpy())
    dataset.save_to_disk(tmp_path / "saved")
    for number, ours in enumerate((dataset, datasets.load_from_disk(tmp_path / "saved"))):
        back = FeatureStore.from_dataset(ours, tmp_path / f"b{number}")
        assert files(back.path) == files(store.path) and back.manifest["counts"] == {}
    later = dataset.filter(lambda row: row["id"] > "a_004").select([3, 0, 1])
    chosen = FeatureStore.from_dataset(later, tmp_path / "c")
    assert chosen.ids == ["a_008", "a_005", "a_006"] and chosen.layout == store.layout
    assert all(torch.equal(value, store.read([8, 5, 6])[name]) for name, value in chosen.read(range(3)).items())


def test_a_mapped_dataset_takes_no_copy_and_outlives_the_store(tmp_path):
    with make_store(tmp_path / "a", 9) as store:
        datasets_of_it = [store.to_dataset() for _ in range(2)]
    addresses = [data.data["mean"].chunk(0).buffers()[-1].address for data in datasets_of_it]
    assert addresses[0] == addresses[1] and len({data._fingerprint for data in datasets_of_it}) == 1
    assert np.asarray(datasets_of_it[0][4]["mean"], np.float32).shape == SHAPES["mean"]
    manifest_file(tmp_path / "a").unlink()  # as stores of the reference implementation
    with FeatureStore.open(tmp_path / "a") as plain_store:
        back = FeatureStore.from_dataset(plain_store.to_dataset(), tmp_path / "b")
    assert back.manifest["mode"] is None and back.manifest["encoders"] == {}


def plain(**columns) -> datasets.Dataset:
    """Two rows of audio features, made by hand."""
    rows = {name: np.zeros((2, *shape), np.float32).tolist() for name, shape in AUDIO_SHAPES.items()}
    return datasets.Dataset.from_dict({"id": ["a", "b"], "caption": ["x", "y"]} | rows | columns)


def test_the_example_of_the_page(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "stores.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace('"ball"', '"caption 3"')
    make_store(tmp_path / "output/example-features/video_train", 9)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["store"].ids == ["video_train_003"] and names["store"].path.name == "balls_again"


UNKNOWN = {"mode": None, "duration": None, "encoders": None}


def test_a_plain_dataset(tmp_path):
    columns = {"mean": np.arange(40.0).reshape(2, 5, 4).tolist(), "score": [1, 2]}
    store = FeatureStore.from_dataset(plain(**columns), tmp_path / "a", **UNKNOWN)
    assert torch.equal(store.read([1])["mean"][0], torch.arange(20.0, 40).view(5, 4)) and store.manifest["mode"] is None
    arrays = plain().cast_column("mean", datasets.Array2D((5, 4), "float32"))
    known = {"mode": "16k", "duration": 8.0, "encoders": {"clip": {"id": "x", "fingerprint": "y"}}}
    assert FeatureStore.from_dataset(arrays, tmp_path / "b", **known).manifest["mode"] == "16k"


ROW = np.zeros((5, 4)).tolist()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"mean": [ROW, ROW[:4]]}, "column mean: rows differ in shape"),
        ({"mean": [ROW, None]}, "column mean: rows differ in shape, or some have no values"),
        ({"mean": [ROW, [[None] * 4] * 5]}, "column mean: some values are missing"),
        ({"mean": [ROW, [[float("nan")] * 4] * 5]}, "mean of id 'b' has values not finite"),
        ({"id": ["a", "../b"]}, "id '../b' is not a plain name"),
        ({"id": ["a", None]}, "column id: some values are missing"),
        ({"caption": ["a", None]}, "column caption: some values are missing"),
    ],
)
def test_mistakes_of_a_dataset_are_named(tmp_path, columns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FeatureStore.from_dataset(plain(**columns), tmp_path / "a", **UNKNOWN)
    assert not list(tmp_path.glob("a*"))


def test_missing_metadata_columns_and_rows_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not say mode, duration, encoders of its features"):
        FeatureStore.from_dataset(plain(), tmp_path / "a")
    with pytest.raises(ValueError, match="has no column std; it has"):
        FeatureStore.from_dataset(plain().remove_columns("std"), tmp_path / "a", **UNKNOWN)
    with pytest.raises(ValueError, match="has no rows"):
        FeatureStore.from_dataset(plain().select([]), tmp_path / "a", **UNKNOWN)
