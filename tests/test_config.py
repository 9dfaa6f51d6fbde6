"""Recipes: every mistake is an error with the key, the file and a way out, before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest
import yaml

from mmaudio_hf.config import TrainingConfig, load_recipe, micro_batch_size, save_recipe, to_dict, variant_config
from mmaudio_hf.config.reading import REFERENCE_OPTIONS, all_keys, settings_text

ROOT = Path(__file__).parent.parent
SCRIPT = run_path(str(ROOT / "docs" / "settings.py"))


def test_options_of_the_reference_implementation_name_ours():
    known = {key.path for key in all_keys()}
    assert set(REFERENCE_OPTIONS.values()) <= known and not set(REFERENCE_OPTIONS) & known
    with pytest.raises(ValueError, match=r"no recipe at exp_id=mine; the recipe comes before the overrides"):
        load_recipe("exp_id=mine")


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
    ("vgg_oversample_rate=5", r"unknown key vgg_oversample_rate: here it is called data\.train\[\]\.repeats"),
    ("exp_id=mine", r"unknown key exp_id: here it is called name"),
    ("+ema.checkpoint_every=1", r"unknown key \+ema: did you mean 'ema'"),
    ("ema.checkpoint_every=1", r"unknown key ema\.checkpoint_every: here it is called ema\.snapshot_every"),
    ("+example_train=True", r"the quick start is a recipe of its own, recipes/example\.yaml"),
    ("model=large_44k_v2", r"model must be a mapping of keys, not text: write model\.variant=large_44k_v2"),
    ("trainin.steps=1", r"unknown key trainin: did you mean 'training'"),
    ("optim.learning_rate=fast", r"optim\.learning_rate must be a number, not 'fast' \(text\)"),
    ("optim.learning_rate=-1", r"optim\.learning_rate must be more than 0, not -1"),
    ("optim.learning_rate=.nan", r"optim\.learning_rate must be a number"),
    ("optim.betas=[0.9]", r"optim\.betas must have 2 entries, not 1"),
    ("optim.betas=[0.9, 1.5]", r"optim\.betas must be at least 0 and less than 1"),
    ("optim.milestones=[5, 3]", r"optim\.milestones must be in rising order"),
    ("training.batch_size=2.5", r"training\.batch_size must be a whole number, not 2\.5"),
    ("training.batch_size=true", r"training\.batch_size must be a whole number"),
    ("training.accumulation_steps=3", r"batch_size 512 must be a multiple of training\.accumulation_steps 3"),
    ("training.mixed_precision=fp8", r"training\.mixed_precision: 'fp8' is not allowed: valid: bf16, no"),
    ("training=3", r"training must be a mapping of keys"),
    ("flow.condition_dropout=1.1", r"flow\.condition_dropout must be at least 0 and at most 1"),
    ("ema.sigma_rel=0.5", r"ema\.sigma_rel must be more than 0 and less than 0\.28, not 0\.5"),
    ("model.variant=small16k", r"unknown variant 'small16k': did you mean 'small_16k'"),
    ("model.num_heads=3", r"hidden_dim 448 must be an even multiple of model\.num_heads 3"),
    ("model.fused_depth=12", r"fused_depth 12 must be less than model\.depth 12"),
    ("model.duration=0.1", r"shorter than one sync segment"),
    ("card.licence=mit", r"unknown key card\.licence: did you mean 'license'"),
    ("card.license=My own", r"card\.license 'My own' must be a licence as the Hub names it"),
    (
        "extraction.videos=[{name: a, media_dir: m, list: l, dataset: {path: 'parquet:https://me:pw@h/x'}}]",
        r"extraction\.videos\.0\.dataset\.path holds a password or token",
    ),
    (
        "extraction.videos=[{name: a, media_dir: m, list: l, dataset: {path: o/n}}, {name: b, media_dir: m, list: l}]",
        r"two sources have the list l, which is written from a data set",
    ),
    ("card.sources=[{store: a}, {store: a}]", r"card\.sources names a twice"),
    ("card.sources=[{store: a, source: 'https://me:word@host/a'}]", r"the entry of a holds a password or token"),
    ("ema.start=300000", r"ema\.start 300000 must be less than training\.steps 300000"),
    ("model.variant=[1]", r"unknown variant \[1\]"),
    ("name=../up", r"must be a plain folder name"),
    ("data.train.3.path=x", r"the recipe has no entry data\.train\.3: the list has 2"),
    ("data.train.path=x", r"data\.train must be a list, not \{'path': 'x'\}"),
    ("data.train[0]=x", r"data\.train\.0 must be a mapping of keys, not text: write \{path: x\}$"),
    ("data.train.0.pth=x", r"unknown key data\.train\.0\.pth: did you mean 'path'"),
    ("data.train.0.repeats=0", r"the command line: data\.train\.0\.repeats must be more than 0, not 0"),
    ("data.train=a", r"data\.train must be a list, not 'a' \(text\): write \[\{path: a\}\]$"),
    ("data.train=[a, b]", r"data\.train\.0 must be a mapping of keys, not text: write \{path: a\}$"),
    ("extraction.videos=a", r"write \[\{name: \.\.\., media_dir: \.\.\., list: \.\.\.\}\]$"),
    ("data.train={}", r"data\.train must be a list"),
    ("novalue", r"not of the form key\.sub=value"),
    ("optim.eps=" + 5000 * "[", r"not valid YAML: maximum recursion"),
    ("seed=9223372036854775808", r"seed must be at least 0 and at most 9223372036854775807"),
    ("training.tracker_project=", r"tracker_project must be text"),
    ("training.tracker_project=''", r"tracker_project must not be empty"),
    ("optim.eps=[", r"not valid YAML"),
    ("hub.repo=me/run", r"unknown key hub\.repo: did you mean 'repo_id'"),
    ("hub.repo_id=run", r"'run' is not a repository of the Hub: write owner/name"),
    ("hub.repo_id=../run", r"is not a repository of the Hub"),
    ("hub.repo_id=me/run@v1", r"hub\.repo_id me/run@v1 must be owner/name: pushes go to the main branch"),
    ("hub.push=[]", r"hub\.push must not be empty"),
    ("hub.push=[weights]", r"hub\.push\.0: 'weights' is not allowed"),
    ("hub.push=[training_state, training_state]", r"hub\.push names training_state twice"),
    ("hub.every=-1", r"hub\.every must be at least 0, not -1"),
    ("resume=maybe", r"resume 'maybe' is not allowed: use auto, never or hub://owner/name\[@revision\]"),
    ("resume=hub://run", r"'run' is not a repository of the Hub: write owner/name"),
    ("resume=hub://me/run@../x", r"is not a repository of the Hub"),
    ("evaluation.evry=5", r"unknown key evaluation\.evry: did you mean 'every'"),
    ("evaluation.every=5", r"evaluation\.every needs data\.validation, which names no store"),
    ("evaluation.after_training=true", r"after_training needs data\.test.* to false"),
    ("evaluation.items=-1", r"evaluation\.items must be at least 0"),
    ("evaluation.av_bench_batch_size=0", r"evaluation\.av_bench_batch_size must be at least 1"),
    ("evaluation.metrics=[fad]", r"'fad' is not allowed: did you mean 'fd'|'fad' is not allowed: valid"),
    ("evaluation.metrics=[fd, fd]", r"evaluation\.metrics names fd twice"),
    ("evaluation.truth.tset=x", r"unknown key evaluation\.truth\.tset: did you mean 'test'"),
    ("data.train[-1].path=x", r"entries are KEY\[0\] and so on; that after the last is new"),
    ("data.train+={path: x}", r"entries are KEY\[0\]"),
    ("data.train.append={path: x}", r"entries are KEY\[0\]"),
    ("data.train[a].path=x", r"entries are KEY\[0\]"),
    ("data.train..path=x", r"not of the form key\.sub=value"),
    ("training.=3", r"not of the form key\.sub=value"),
    ("training.steps='3'", r"must be a whole number, not '3' \(text\): leave out the quotes"),
    ("optim.learning_rate='1e-4'", r"must be a number, not '1e-4' \(text\): leave out the quotes"),
    ("training.steps=null", r"training\.steps must be a whole number, not None \(nothing\)"),
    ("training.steps=1__0", r"training\.steps must be a whole number, not '1__0'"),
    ("training.steps=" + 5000 * "9", r"the value is not valid YAML: Exceeds the limit"),
    ("training.steps=1,000", r"training\.steps must be a whole number, not '1,000'"),
    ("optim=null", r"optim must be a mapping of keys, not nothing"),
    ("optim.betas=0.9,0.95", r"optim\.betas must be a list, not '0\.9,0\.95' \(text\): write \[0\.9,0\.95\]"),
    ("optim.betas[2]=0.9", r"optim\.betas must have 2 entries, not 3"),
    ("training.trackers=wandb", r"must be a list, not 'wandb' \(text\): write \[wandb\]"),
    ("base=x.yaml", r"unknown key base: a recipe names its base in its file"),
    ("output_dir=''", r"output_dir must not be empty"),
    ("data.train[0].path=''", r"data\.train\.0\.path must not be empty"),
    ("samples.videos=[a.mp4, '']", r"samples\.videos must not be empty"),
    ("output_dir=~nobody-is-called-this/x", r"names a user that this machine does not have"),
    ("training={<<: [1]}", r"<< needs a mapping"),
    ("training={[a]: 1}", r"key \['a'\] must be text"),
    ("data.train.0.path=@x", r"not valid YAML: while scanning"),
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


def test_paths_are_expanded(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "child.yaml").write_text("base: ~/mine.yaml\noutput_dir: ~/runs\nfinetune: {init_from: owner/name}\n")
    loaded = load_recipe(
        tmp_path / "child.yaml", ["data.train.0.path=${SCRATCH}/a", "evaluation.truth.test=$SCRATCH/b"]
    )
    assert loaded.run_dir == tmp_path / "runs" / "child" and loaded.finetune.init_from == "owner/name"
    assert (loaded.data.train[0].path, loaded.evaluation.truth.test) == ("/scratch/a", "/scratch/b")
    with pytest.raises(ValueError, match=r"weights_dir: the environment variable in '\$NOWHERE/x' is not set"):
        load_recipe(recipe, ["encoders.weights_dir=$NOWHERE/x"])


def test_adapters_need_a_rank(recipe):
    words = ["finetune.init_from=output/base", "finetune.lora.alpha=32"]
    with pytest.raises(ValueError, match=r"finetune\.lora\.rank is missing: else the whole network"):
        load_recipe(recipe, words)
    assert load_recipe(recipe, [*words, "finetune.lora.rank=4"]).finetune.lora.alpha == 32


def test_every_key_is_described_and_the_page_is_current():
    keys = all_keys()
    assert len({key.path for key in keys}) == len(keys) > 120
    for key in keys:
        assert len(key.metadata.get("description", "")) > 5, f"{key.path} has no description"
        assert f"| `{key.path}` |" in SCRIPT["settings_page"]() and f"{key.path}: " in settings_text()
    for path, content in SCRIPT["generated_files"]():
        assert path.read_text() == content, f"{path.name} is out of date: run `python docs/settings.py`"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_schema_knows_the_keys_of_the_recipes(path):
    def check(schema: dict, value: object, where: str) -> None:
        if isinstance(value, dict):
            assert value.keys() <= schema["properties"].keys(), where
            assert set(schema.get("required", ())) <= value.keys(), where
            for key, entry in value.items():
                check(schema["properties"][key], entry, f"{where}.{key}")
        elif isinstance(value, list):
            for entry in value:
                check(schema["items"], entry, where)
        elif "enum" in schema:
            assert value in schema["enum"], where
        else:
            kinds = {"integer": int, "number": (int, float), "string": str, "boolean": bool}
            assert isinstance(value, kinds[schema["type"]]), where
            assert not isinstance(value, int | float) or value >= schema.get("minimum", value), where

    schema = SCRIPT["json_schema"]()
    assert "# yaml-language-server: $schema=schema.json" in path.read_text()
    check(schema, yaml.safe_load(path.read_text()), "")
    with pytest.raises(AssertionError):
        check(schema, {"optim": {"lerning_rate": 1}}, "")


def test_a_run_that_resumes_from_its_repository_pushes_its_state(recipe):
    words = ["resume=hub://me/run", "hub.repo_id=me/run"]
    with pytest.raises(ValueError, match=r"needs what is not pushed: set hub\.push=\[pretrained_model,"):
        load_recipe(recipe, words)
    assert load_recipe(recipe, [*words, "hub.push=[training_state]"]).resume == "hub://me/run"


def test_released_weights_keep_their_licence(recipe):
    start = "finetune.init_from=elsewhere/mmaudio_small_16k.pth"
    assert load_recipe(recipe, [start, "card.license=cc-by-nc-4.0"]).card.license == "cc-by-nc-4.0"
    with pytest.raises(ValueError, match=r"card\.license mit: the run starts from released weights"):
        load_recipe(recipe, [start, "card.license=mit"])


YAML = [
    ("training.compile=off", "training.compile", "off"),
    ("training.compile=on", "training.compile", "on"),
    ("training.mixed_precision=no", "training.mixed_precision", "no"),
    ("training.tf32=no", "training.tf32", False),
    ("training.tf32=on", "training.tf32", True),
    ("training.steps=3e5", "training.steps", 300_000),
    ("training.steps=016", "training.steps", 16),
    ("training.steps=0x10", "training.steps", 16),
    ("training.steps=300_000", "training.steps", 300_000),
    ("optim.learning_rate=1e-4", "optim.learning_rate", 1e-4),
    ("optim.learning_rate=1", "optim.learning_rate", 1.0),
    ("training={<<: {batch_size: 4, steps: 5}, steps: 7}", "training.steps", 7),
    ("training={<<: {batch_size: 4, steps: 5}, steps: 7}", "training.batch_size", 4),
    ("data.train[0].repeats=3", "data.train.0.repeats", 3.0),
    ("data.train[2].path=c", "data.train.2.path", "c"),
    ("data.train[0]={repeats: 2}", "data.train.0.path", "a"),
    ("data.test[0].path=c", "data.test.0.path", "c"),
    ("training.trackers[0]=wandb", "training.trackers.0", "wandb"),
    ("seed=9223372036854775807", "seed", 2**63 - 1),
    ("optim.milestones=[5, 10]", "optim.milestones.1", 10),
    ("training.tf32=Off", "training.tf32", False),
    ("training.tf32=YES", "training.tf32", True),
    ("training.compile=ON", "training.compile", "on"),
    ("training.mixed_precision=No", "training.mixed_precision", "no"),
    ("training.steps=1.5e3", "training.steps", 1500),
    ("optim.learning_rate=+.5", "optim.learning_rate", 0.5),
    (" training.steps = 7", "training.steps", 7),
    ("training={<<: [{steps: 5}, {steps: 6, batch_size: 4}]}", "training.steps", 5),  # the first, as YAML has it
    ("training={<<: [{steps: 5}, {steps: 6, batch_size: 4}]}", "training.batch_size", 4),
    ("optim.betas[1]=0.99", "optim.betas.0", 0.9),  # of the default
    ("optim.betas[1]=0.99", "optim.betas.1", 0.99),
    ("data.train.0.path=a=b", "data.train.0.path", "a=b"),
]


@pytest.mark.parametrize(("override", "key", "value"), YAML)
def test_yaml_is_read_as_people_write_it(recipe, override, key, value):
    node = to_dict(load_recipe(recipe, [override]))
    for name in key.split("."):
        node = node[int(name)] if isinstance(node, list) else node[name]
    assert node == value and type(node) is type(value)


def test_a_mistake_in_a_base_names_the_base(recipe, tmp_path):
    (tmp_path / "child.yaml").write_text("base: mine.yaml\ntraining: {steps: 5}\n")
    recipe.write_text("optim: {lerning_rate: 1}\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: unknown key optim\.lerning_rate"):
        load_recipe(tmp_path / "child.yaml")


def test_bases_are_inherited_and_changed(recipe, tmp_path):
    (tmp_path / "child.yaml").write_text("base: mine.yaml\noptim: {weight_decay: 0.1}\n")
    (tmp_path / "grandchild.yaml").write_text("base: child.yaml\nmodel: {variant: large_44k_v2}\n")
    loaded = load_recipe(tmp_path / "grandchild.yaml", ["data.train.1.repeats=5", "training.mixed_precision=no"])
    assert loaded.name == "grandchild"
    assert (loaded.optim.learning_rate, loaded.optim.weight_decay) == (1e-4, 0.1)
    assert loaded.model == variant_config("large_44k_v2")
    assert [store.repeats for store in loaded.data.train] == [1, 5]
    assert loaded.training.mixed_precision == "no"


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


FILES = [
    (b"\xef\xbb\xbftraining: {steps: 3}\r\n", ""),  # BOM and CRLF
    (b"---\ntraining: {steps: 3}\n...\n", ""),
    ("training: {steps: 3}\n".encode("utf-16"), "is not valid YAML: 'utf-8' codec can't decode"),
    (b"training:\n\tsteps: 3\n", r"is not valid YAML: while scanning .*\n.*'\\t' that cannot start"),
    (b"training:\n", "training must be a mapping of keys, not nothing"),
    (b"data:\n  train:\n", r"data\.train must be a list, not None \(nothing\)"),
    (b"# nothing\n", "this file holds nothing"),
    (b"base:\n", "base must be a file name, not nothing"),
    (b"training.steps: 3\n", r"unknown key training\.steps: write steps: below training:"),
    (b"training: &t {early_stopping: *t}\n", "recursive"),
    (b"a: 1\n---\nb: 2\n", "expected a single document"),
    (b"name: !env X\n", "could not determine a constructor"),
    (b"name: \xff\n", "codec can't decode"),
    (b"optim: {learning_rate: [" + b"9" * 5000 + b"]}\n", "Exceeds the limit"),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_files_as_editors_and_tools_leave_them(recipe, content, message):
    recipe.write_bytes(content)
    if message:
        with pytest.raises(ValueError, match=message) as error:
            load_recipe(recipe)
        assert "mine.yaml" in str(error.value)
    else:
        assert load_recipe(recipe).training.steps == 3


def test_aliases_share_nothing_with_an_override_and_do_not_fill_the_memory(recipe):
    recipe.write_text("data: {train: &t [{path: a}], validation: *t}\n")
    data = load_recipe(recipe, ["data.validation.0.path=b"]).data
    assert (data.train[0].path, data.validation[0].path) == ("a", "b")
    levels = [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    recipe.write_text("\n".join(["optim:\n  learning_rate:", "  - &a0 [x]", *(f"  {level}" for level in levels), ""]))
    with pytest.raises(ValueError, match=r"learning_rate must be a number, not \[\[") as error:
        load_recipe(recipe)
    assert len(str(error.value)) < 20_000


def test_saved_recipes_come_back_the_same(recipe, tmp_path):
    loaded = load_recipe(
        recipe, ["training.mixed_precision=no", "name='007'", "card.sources=[{store: a, source: '1e5'}]"]
    )
    save_recipe(loaded, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == loaded
    assert loaded.name == "007"


def test_an_uneven_batch_is_an_error_with_the_next_even_ones():
    assert micro_batch_size(TrainingConfig(batch_size=12, accumulation_steps=2), 3) == 2
    with pytest.raises(ValueError, match=r"batch_size 10 does not split over 3 processes x 2 .*: use 6 or 12"):
        micro_batch_size(TrainingConfig(batch_size=10, accumulation_steps=2), 3)


def test_an_error_imports_nothing_heavy(recipe):
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
