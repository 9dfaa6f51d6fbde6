"""Recipes: every mistake is refused with the key, the file and a way out, before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmaudio_hf.config import TrainingConfig, load_recipe, micro_batch_size, save_recipe, to_dict, variant_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: {variant: small_16k}\noptim: {learning_rate: 1e-4}\ndata: {train: [{path: a}, {path: b}]}\n"
    )
    return path


MISTAKES = [
    ("optim.lerning_rate=1", r"unknown key optim\.lerning_rate: did you mean 'learning_rate'"),
    ("training.learning_rate=1", r"unknown key training\.learning_rate: did you mean optim\.learning_rate"),
    ("trainin.steps=1", r"unknown key trainin: did you mean 'training'"),
    ("optim.learning_rate=fast", r"optim\.learning_rate must be a number, not 'fast' \(text\)"),
    ("optim.learning_rate=-1", r"optim\.learning_rate must be positive"),
    ("optim.learning_rate=.nan", r"optim\.learning_rate must be a number"),
    ("optim.betas=[0.9]", r"optim\.betas must have 2 entries, not 1"),
    ("optim.betas=[0.9, 1.5]", r"optim\.betas must be at least 0 and less than 1"),
    ("optim.milestones=[5, 3]", r"optim\.milestones must be in rising order"),
    ("training.batch_size=2.5", r"training\.batch_size must be a whole number, not 2\.5"),
    ("training.batch_size=true", r"training\.batch_size must be a whole number"),
    ("training.accumulation_steps=3", r"batch_size 512 must be a multiple of training\.accumulation_steps 3"),
    ("training.mixed_precision=fp8", r"training\.mixed_precision: 'fp8' is not allowed: valid: bf16, no"),
    ("training=3", r"training must be a mapping of keys"),
    ("flow.condition_dropout=1.1", r"flow\.condition_dropout is a probability"),
    ("ema.sigma_rel=0.5", r"sigma_rel 0\.5 must be between 0 and 0\.28"),
    ("model.variant=small16k", r"unknown variant 'small16k': did you mean 'small_16k'"),
    ("model.num_heads=3", r"hidden_dim 448 must be an even multiple of model\.num_heads 3"),
    ("model.fused_depth=12", r"fused_depth 12 must be at least 0 and less than model\.depth 12"),
    ("model.duration=0.1", r"shorter than one sync segment"),
    ("card.licence=mit", r"unknown key card\.licence: did you mean 'license'"),
    ("card.license=My own", r"card\.license 'My own' must be a licence as the Hub names it"),
    ("card.sources=[{store: a}, {store: a}]", r"card\.sources: a stands there twice"),
    ("card.sources=[{store: a, source: 'https://me:word@host/a'}]", r"the entry of a holds a password or token"),
    ("ema.start=300000", r"ema\.start 300000 must be less than training\.steps 300000"),
    ("model.variant=[1]", r"unknown variant \[1\]"),
    ("name=../up", r"must be a plain folder name"),
    ("data.train.2.path=x", r"the recipe has no entry data\.train\.2"),
    ("data.train.0.pth=x", r"unknown key data\.train\.0\.pth: did you mean 'path'"),
    ("data.train.0.repeats=0", r"repeats of a must be positive"),
    ("data.train=a", r"data\.train must be a list"),
    ("novalue", r"not of the form key\.sub=value"),
    ("optim.eps=[", r"not valid YAML"),
    ("hub.repo=me/run", r"unknown key hub\.repo: did you mean 'repo_id'"),
    ("hub.repo_id=run", r"'run' is not a repository of the Hub: write owner/name"),
    ("hub.repo_id=../run", r"is not a repository of the Hub"),
    ("hub.repo_id=me/run@v1", r"hub\.repo_id me/run@v1 must be owner/name: pushes go to the main branch"),
    ("hub.push=[]", r"hub\.push must name pretrained_model, training_state or both"),
    ("hub.push=[weights]", r"hub\.push\.0: 'weights' is not allowed"),
    ("hub.push=[training_state, training_state]", r"hub\.push names one twice"),
    ("hub.every=-1", r"hub\.every and hub\.wait must be at least 0"),
    ("resume=maybe", r"resume 'maybe' is not allowed: use auto, never or hub://owner/name\[@revision\]"),
    ("resume=hub://run", r"'run' is not a repository of the Hub: write owner/name"),
    ("resume=hub://me/run@../x", r"is not a repository of the Hub"),
    ("evaluation.evry=5", r"unknown key evaluation\.evry: did you mean 'every'"),
    ("evaluation.every=5", r"evaluation\.every asks for sound of data\.validation, which names no store"),
    ("evaluation.after_training=true", r"after_training asks for sound of data\.test.* to false"),
    ("evaluation.items=-1", r"evaluation\.items must be at least 0"),
    ("evaluation.av_bench_batch_size=0", r"evaluation\.av_bench_batch_size must be at least 1"),
    ("evaluation.metrics=[fad]", r"'fad' is not allowed: did you mean 'fd'|'fad' is not allowed: valid"),
    ("evaluation.metrics=[fd, fd]", r"evaluation\.metrics names one twice"),
    ("evaluation.truth.tset=x", r"unknown key evaluation\.truth\.tset: did you mean 'test'"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_mistakes_on_the_command_line(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe, [override])


@pytest.mark.parametrize(("override", "message"), [m for m in MISTAKES if m[0].startswith("optim.l")])
def test_mistakes_in_a_file_name_the_file(recipe, override, message):
    key, value = override.split("=")
    recipe.write_text(f"{key.split('.')[0]}: {{{key.split('.')[1]}: {value}}}\n")
    with pytest.raises(ValueError, match=rf"{recipe.name}.*{message}"):
        load_recipe(recipe)


def test_a_run_that_goes_on_from_its_repository_pushes_its_state(recipe):
    words = ["resume=hub://me/run", "hub.repo_id=me/run"]
    with pytest.raises(ValueError, match=r"needs what is not pushed: set hub\.push=\[pretrained_model,"):
        load_recipe(recipe, words)
    assert load_recipe(recipe, [*words, "hub.push=[training_state]"]).resume == "hub://me/run"


def test_what_is_made_of_released_weights_keeps_their_licence(recipe):
    start = "finetune.init_from=elsewhere/mmaudio_small_16k.pth"
    assert load_recipe(recipe, [start, "card.license=cc-by-nc-4.0"]).card.license == "cc-by-nc-4.0"
    with pytest.raises(ValueError, match=r"card\.license mit: the run starts from released weights"):
        load_recipe(recipe, [start, "card.license=mit"])


def test_a_mistake_in_a_base_names_the_base(recipe, tmp_path):
    (tmp_path / "child.yaml").write_text("base: mine.yaml\ntraining: {steps: 5}\n")
    recipe.write_text("optim: {lerning_rate: 1}\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: unknown key optim\.lerning_rate"):
        load_recipe(tmp_path / "child.yaml")


def test_bases_are_inherited_and_changed(recipe, tmp_path):
    (tmp_path / "child.yaml").write_text("base: mine.yaml\noptim: {weight_decay: 0.1}\n")
    (tmp_path / "grandchild.yaml").write_text("base: child.yaml\nmodel: {variant: large_44k_v2}\n")
    made = load_recipe(tmp_path / "grandchild.yaml", ["data.train.1.repeats=5", "training.mixed_precision=no"])
    assert made.name == "grandchild"
    assert (made.optim.learning_rate, made.optim.weight_decay) == (1e-4, 0.1)
    assert made.model == variant_config("large_44k_v2")
    assert [store.repeats for store in made.data.train] == [1, 5]
    assert made.training.mixed_precision == "no"


def test_a_new_variant_drops_the_sizes_of_the_old_one(recipe, tmp_path):
    recipe.write_text("model: {variant: small_16k, hidden_dim: 128, num_heads: 2}\n")
    assert load_recipe(recipe).model.hidden_dim == 128
    assert load_recipe(recipe, ["model.variant=medium_44k"]).model.hidden_dim == 896
    overrides = ["model.hidden_dim=64", "model.num_heads=1", "model.variant=small_44k"]  # in any order
    assert load_recipe(recipe, overrides).model == variant_config("small_44k", hidden_dim=64, num_heads=1)


def test_circles_missing_files_and_double_keys(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match="circle"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(ValueError, match=r"no recipe at .*nowhere\.yaml \(base of .*c\.yaml\)"):
        load_recipe(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ValueError, match="'seed' is given twice"):
        load_recipe(tmp_path / "d.yaml")
    (tmp_path / "e.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="mapping"):
        load_recipe(tmp_path / "e.yaml")


def test_saved_recipes_come_back_the_same(recipe, tmp_path):
    made = load_recipe(recipe, ["training.mixed_precision=no", "name='007'"])
    save_recipe(made, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == made
    assert made.name == "007"


def test_uneven_batches_are_refused_with_the_next_even_ones():
    assert micro_batch_size(TrainingConfig(batch_size=12, accumulation_steps=2), 3) == 2
    with pytest.raises(ValueError, match=r"batch_size 10 does not split over 3 processes x 2 .*: use 6 or 12"):
        micro_batch_size(TrainingConfig(batch_size=10, accumulation_steps=2), 3)


def test_a_refusal_imports_nothing_heavy(recipe):
    program = (
        "import sys; from mmaudio_hf.cli import main; code = main(['train', sys.argv[1], 'optim.lr=1']);"
        "print(code, [m for m in ('torch', 'numpy', 'datasets', 'transformers', 'av') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program, str(recipe)], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "2 []", result.stderr
    assert "unknown key optim.lr" in result.stderr


def test_every_field_survives_plain_text(recipe):
    tree = to_dict(load_recipe(recipe))
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree
