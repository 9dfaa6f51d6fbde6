"""Whether a recipe is that of a checkpoint: stores are known by what they hold, wherever they lie."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from toy_stores import recipe_tree, write_store

from mmaudio_hf.config import Recipe, load_recipe, to_dict
from mmaudio_hf.data.mixture import open_mixture
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.training.checkpoint import TrainingState
from mmaudio_hf.training.resume import check_same_run


def with_stores(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe with the stores of `folder`."""
    stores = tuple(replace(store, path=str(folder / Path(store.path).name)) for store in recipe.data.train)
    return replace(recipe, data=replace(recipe.data, train=stores))


def hashes(recipe: Recipe) -> list[str | None]:
    mixture = open_mixture(recipe.data.train, recipe.model)
    found = [store.content_hash for store in mixture.stores]
    mixture.close()
    return found


def test_stores_may_move_and_not_change(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(tmp_path / "here")))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    state = TrainingState(4, {}, {"recipe": to_dict(recipe), "stores": hashes(recipe)})
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved, said = with_stores(recipe, tmp_path / "there"), []
    check_same_run(moved, hashes(moved), state, False, said.append)
    assert said == []
    other = replace(moved, seed=8)
    with pytest.raises(ValueError, match=r"- seed: 7\n  \+ seed: 8$"):
        check_same_run(other, hashes(other), state, False, said.append)
    repeats = tuple(replace(store, repeats=3.0) for store in moved.data.train)
    other = replace(moved, data=replace(moved.data, train=repeats))
    with pytest.raises(ValueError, match=r"\+ data\.train: .*'repeats': 3\.0"):
        check_same_run(other, hashes(other), state, False, said.append)

    for path in (tmp_path / "there").glob("audios*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_store(tmp_path / "there" / "audios", 8, video=False, seed=5)
    with pytest.raises(ValueError, match=r"put them back.*\n  - data\.train: .*here.*\n  \+ data\.train: .*there"):
        check_same_run(moved, hashes(moved), state, False, said.append)
    before = TrainingState(4, {}, {"recipe": to_dict(recipe)})  # of a checkpoint that does not know its stores
    moved = with_stores(recipe, tmp_path / "other")
    with pytest.raises(ValueError, match=r"\+ data\.train"):
        check_same_run(moved, hashes(recipe), before, False, said.append)


def test_a_store_without_a_manifest_is_known_by_its_path_alone(tmp_path):
    write_store(tmp_path / "a", 3)
    assert len(FeatureStore.open(tmp_path / "a").content_hash) == 64
    (tmp_path / "a.manifest.json").unlink()
    assert FeatureStore.open(tmp_path / "a").content_hash is None
