"""Validation losses: what each combination of conditions means, fixed times, the same figures on 1 and 2 processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from forked import run_together
from toy_stores import recipe_tree, write_store
from training_runs import environment

from mmaudio_hf.config import Recipe, load_recipe, save_recipe
from mmaudio_hf.data.mixture import open_mixture
from mmaudio_hf.data.sampler import sample_noise_for_ids
from mmaudio_hf.models.flow import flow_loss, interpolate, sample_time, velocity_target
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training.validation import Validator, hash_order, stratified_normals


def network_of(recipe: Recipe) -> MMAudio:
    """A model whose output depends on every input: that of an untrained one is zero."""
    network = MMAudio(recipe.model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    network.set_latent_statistics(torch.full((20,), 0.5), torch.full((20,), 2.0))
    return network.eval()


def scores_of(recipe_path: str | Path) -> dict[str, float]:
    """What `Validator` computes for `network_of`; run by every process."""
    recipe = load_recipe(recipe_path)
    network = network_of(recipe)
    validator = Validator(open_mixture(recipe.data.validation, recipe.model), recipe, Accelerator(cpu=True))
    return validator.scores(network, network.latent_mean, network.latent_std)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    """Five items with video and three without are held out, three of all are scored under each combination."""
    folder = tmp_path_factory.mktemp("validation")
    tree = recipe_tree(folder, validation_items=6)
    write_store(folder / "audio_only", 3, video=False, seed=5)
    tree["data"]["validation"].append({"path": str(folder / "audio_only")})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_each_combination_is_what_its_name_says(recipe_file):
    scores, recipe = scores_of(recipe_file), load_recipe(recipe_file)
    network = network_of(recipe)
    mixture = open_mixture(recipe.data.validation, recipe.model)
    order = hash_order(recipe.seed, [i for store in mixture.stores for i in store.ids])
    z = dict(zip(order, stratified_normals(recipe.seed, order), strict=True))
    chosen = {order[i * 8 // 6] for i in range(6)}
    losses: dict[str, list[float]] = {}
    for store in mixture.stores:
        for row, item_id in enumerate(store.ids):
            values, noise = store.read([row]), sample_noise_for_ids(recipe.seed, [item_id], mixture.latent_shape)
            x1 = (values["mean"] + values["std"] * noise.latent_noise - 0.5) / 2.0
            t = sample_time(torch.tensor([z[item_id]]).float(), 0.0, 1.0)
            for name in ("video_text", "video", "text", "none"):
                keeps = name.split("_")
                if item_id not in chosen or ("video" in keeps and not store.has_video):
                    continue
                clip, sync, text = network.empty_clip_feat, network.empty_sync_feat, network.empty_string_feat
                clip, sync = clip.expand(1, network.clip_length, -1), sync.expand(1, network.sync_length, -1)
                with torch.no_grad():
                    velocity = network(
                        interpolate(noise.x0, x1, t, 0.0),
                        values["clip_features"] if "video" in keeps else clip,
                        values["sync_features"] if "video" in keeps else sync,
                        values["text_features"] if "text" in keeps else text[None],
                        t,
                    )
                losses.setdefault(name, []).append(flow_loss(velocity, velocity_target(noise.x0, x1, 0.0)).item())
    expected = {f"loss_{name}": np.mean(values) for name, values in losses.items()}
    assert len(losses["none"]) == 6 and len(losses["video"]) < 6
    assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 6) for value in expected.values()}) == 4
    assert {"loss", "loss_held_out", "loss_audio_only"} < scores.keys()
    assert scores["loss"] == pytest.approx((5 * scores["loss_held_out"] + 3 * scores["loss_audio_only"]) / 8)


def test_two_processes_find_the_same_scores(recipe_file, tmp_path):
    program = tmp_path / "score.py"
    program.write_text(
        "import json, os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_training_validation import scores_of\n"
        "scores = scores_of(sys.argv[1])\n"
        "open(f'{sys.argv[2]}/{os.environ[\"RANK\"]}.json', 'w').write(json.dumps(scores))\n"
        "import torch; torch.distributed.destroy_process_group()\n"  # its threads do not outlive the interpreter
    )
    result = run_together(2, str(program), str(recipe_file), str(tmp_path), cwd=tmp_path, env=environment())
    assert result.returncode == 0, result.stderr
    alone = scores_of(recipe_file)
    for rank in range(2):
        scores = json.loads((tmp_path / f"{rank}.json").read_text())
        assert scores.keys() == alone.keys()
        assert list(scores.values()) == pytest.approx(list(alone.values()), rel=1e-6)


def test_times_cover_the_distribution_evenly_and_belong_to_the_ids():
    ids = [f"item_{i}" for i in range(40)]
    order = hash_order(1, ids)
    assert order == hash_order(1, reversed(ids)) != hash_order(2, ids) and sorted(order) == sorted(ids)
    uniform = torch.special.ndtr(torch.tensor(stratified_normals(1, order), dtype=torch.float64))
    assert (uniform * 40).long().tolist() == list(range(40))


def test_two_scores_of_one_name_are_an_error(recipe_file):
    recipe = load_recipe(recipe_file)
    write_store(recipe_file.parent / "text", 2)
    path = recipe_file.parent / "twice.yaml"
    save_recipe(recipe, path)
    with pytest.raises(ValueError, match="loss_text would be the name of two scores"):
        recipe = load_recipe(path, [f"data.validation.0.path={recipe_file.parent / 'text'}"])
        Validator(open_mixture(recipe.data.validation, recipe.model), recipe, Accelerator(cpu=True))
    with pytest.raises(ValueError, match=r"validation_combinations.*names .* twice"):
        load_recipe(path, ["training.validation_combinations=[text, text]"])
