"""Commands and public functions with wrong arguments: one sentence, never a traceback; and the examples of --help."""

import argparse
import contextlib
import importlib
import inspect
import math
import pkgutil
import shlex
import shutil
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest
import torch
from toy_stores import MODEL, recipe_tree, write_recipe

import mmaudio_hf
from mmaudio_hf import cli, config, evaluation
from mmaudio_hf.config import (
    VARIANTS,
    ModelConfig,
    OptimConfig,
    TrainingConfig,
    config_of_duration,
    micro_batch_size,
    model_config,
    samples_per_step,
    variant_config,
)
from mmaudio_hf.data import tools
from mmaudio_hf.data.store import StoreWriter
from mmaudio_hf.features.autoencoder import MelSpectrogram, MelVAE
from mmaudio_hf.features.clip import ClipEncoder
from mmaudio_hf.features.toy import ToyMelCodec
from mmaudio_hf.features.vocoder import Vocoder
from mmaudio_hf.interop import export_run
from mmaudio_hf.media.example import read_events
from mmaudio_hf.media.lists import partition
from mmaudio_hf.media.video import read_video
from mmaudio_hf.models import flow
from mmaudio_hf.models.convert import convert_file
from mmaudio_hf.models.flow import sample_euler
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import audio_mode, checked, column_shapes, sequence_lengths
from mmaudio_hf.training.ema import synthesize, update
from mmaudio_hf.training.optim import learning_rate
from mmaudio_hf.weights import load_state

ROOT = Path(__file__).parent.parent
# Arguments that work, except for the one that a test replaces; nothing is called new/.
RUN, STORE, RECIPE = "output/run", "videos", "run.yaml"
ARGUMENTS = {
    **dict.fromkeys(("audit", "extract-audio", "extract-video", "partition"), RECIPE),
    **dict.fromkeys(("store inspect", "store verify", "verify"), STORE),
    **dict.fromkeys(("bench extract", "bench generate", "bench scaling", "bench step", "weights verify"), "--rounds 1"),
    "bench curation": "--seeds nothing",
    "bench durations": "--rounds 0",
    "bench finetune": "--methods nothing",
    "bench loader": f"--rounds 1 --store {STORE} --batch-size 2",
    "bench remote": "--rounds 0",
    "bench scores": "--rounds 0",
    "demo": "new/run --port 0",
    "doctor": f"{RECIPE} --quick",
    "ema": f"{RUN} --sigma-rel 0.1 --out new/ema",
    "evaluate": f"{RUN} --out new/scores",
    "example": "training.steps=0",
    "example-media": "empty --small",
    "export": f"{RUN} --out new/export",
    "generate": f"--run {RUN} --prompt a --out new/a.wav --steps 1 --duration 1",
    "import": f"new/file.pth --recipe {RECIPE} --run new/imported",
    "prepare": "folder . --out new/lists",
    "pull": "me/name --dry-run",
    "push": f"{RUN} me/name --dry-run",
    "replay-step": f"{RUN} 1",
    "report": f"--run {RUN}",
    "store audit": f"{STORE} --out new/audit.parquet",
    "store convert": f"{STORE} new/compact --layout compact",
    "store merge": f"{STORE} --out new/merged",
    "store pull": "me/name new/pulled --dry-run",
    "store push": f"{STORE} me/name --dry-run",
    "store subset": f"{STORE} new/rows --rows 0:1",
    "train": f"{RECIPE} --dry-run",
    "weights av-bench": "",
    "weights convert": "new/file.pth new/network",
    "weights download": "nothing --dir new/weights",
    "weights list": "",
}
NUMBERS = ("-1", "nan", "x", "1e300", "99999999999999999999", "")
PATHS = ("gone", "a_folder", "empty", "binary", "text.txt", "list.json", "x" * 300, "\x01")


def leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Parsers of the commands below."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for group in groups for each in group.choices.values() for leaf in leaves(each)] or [parser]


COMMANDS = {leaf.prog.removeprefix("mmaudio-hf "): leaf for leaf in leaves(cli._build_parser())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small run, and files of wrong kinds."""
    folder = tmp_path_factory.mktemp("arguments")
    mels = [torch.randn(80, 64, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    recipe_tree(folder)
    (folder / "toy_codec_16k.safetensors").write_bytes(ToyMelCodec.fit("16k", mels).to_bytes())
    recipe = write_recipe(folder, steps=2, batch_size=2, validate_every=2, checkpoint_every=2)
    assert cli.main(["train", str(recipe)]) == 0
    (folder / "a_folder").mkdir()
    for name, content in (("empty", b""), ("binary", bytes(range(256))), ("text.txt", b"text"), ("list.json", b"[1]")):
        (folder / name).write_bytes(content)
    return folder


def wrong_values(action: argparse.Action) -> tuple[str, ...]:
    if action.choices:
        return ("nonsense",)
    number = action.type in (int, float, cli.training._count) or action.metavar == "N"
    return NUMBERS if number else ("novalue", "training.steps=-1", "x=1") if action.dest == "overrides" else PATHS


def wrong_lines(name: str) -> list[list[str]]:
    """The arguments of a command with one of them replaced."""
    parser, words = COMMANDS[name], shlex.split(ARGUMENTS[name])
    by_option = {option: action for action in parser._actions for option in action.option_strings}
    positionals = [action for action in parser._actions if not action.option_strings]
    free = [i for i, word in enumerate(words) if word not in by_option and (i == 0 or words[i - 1] not in by_option)]
    if name == "example-media":  # any other folder would be filled
        return [["empty", "--small"], ["text.txt/new"], ["x" * 300], ["new/media", "--seed", "x"]]
    if name == "weights av-bench":  # anything else makes an environment
        return [["--no-such-option"], ["x"]]
    lines = [[*words, "--no-such-option"]]
    for i, action in enumerate(positionals):
        at = free[i] if i < len(free) else len(words)
        lines += [[*words[:at], value, *words[at + 1 :]] for value in wrong_values(action)]
    for action in {id(a): a for a in by_option.values() if a.nargs != 0 and a.dest != "help"}.values():
        option = action.option_strings[-1]
        at = words.index(option) if option in words else len(words)
        lines += [[*words[:at], *words[at + 2 :], option, value] for value in wrong_values(action)]
    return lines


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_arguments_end_with_one_sentence(folder, name, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    codes, before = set(), {path.name for path in folder.iterdir()}
    for words in wrong_lines(name):
        try:
            code = cli.main([*name.split(), *words])
        except SystemExit as stopped:  # of argparse
            code = stopped.code
        errors = capsys.readouterr().err.strip().splitlines()
        codes.add(code)
        assert code in (0, 1, 2) and not any("Traceback" in line for line in errors), words
        if code == 2:
            assert errors and "error: " in errors[-1] and sum("error: " in line for line in errors) == 1, (
                words,
                errors,
            )
        for path in [*(folder / "a_folder").iterdir(), *(p for p in folder.iterdir() if p.name not in before)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert 2 in codes


# Called with a path of each wrong kind.
READERS = {
    "load_recipe": lambda path: mmaudio_hf.load_recipe(path),
    "FeatureStore.open": lambda path: mmaudio_hf.FeatureStore.open(path),
    "MMAudio.from_pretrained": lambda path: mmaudio_hf.MMAudio.from_pretrained(path),
    "MMAudioPipeline.from_pretrained": lambda path: mmaudio_hf.MMAudioPipeline.from_pretrained(path),
    "MelVAE.load_released": lambda path: MelVAE("16k").load_released(path),
    "read_video": read_video,
    "read_events": read_events,
    "evaluate_caches": lambda path: evaluation.evaluate_caches(path, path),
    "describe": tools.describe,
    "convert": lambda path: tools.convert(path, "new", "compact"),
    "merge": lambda path: tools.merge([path], "new"),
    "convert_file": lambda path: convert_file(path, "new"),
    "export_run": lambda path: export_run(Path(path), Path("new")),
}


@pytest.mark.parametrize("name", READERS)
def test_readers_name_a_path_that_is_wrong(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in ("gone", "a_folder", "empty", "binary", "text.txt", "list.json", "x" * 300):
        with pytest.raises((ValueError, OSError), match=path[:20]):
            READERS[name](path)


def public_calls(folder: Path) -> dict:
    """Callables of the names that others rely on, each with arguments that it takes."""
    sizes = MODEL | {"mode": "16k"}
    network = MMAudio(ModelConfig(**{**VARIANTS["small_16k"], **sizes}))
    network.set_latent_statistics(torch.zeros(20), torch.ones(20))
    config, times = network.config, torch.zeros(2)
    latent = torch.zeros(2, network.latent_length, 20)
    clip, sync = torch.zeros(2, network.clip_length, 1024), torch.zeros(2, config.sync_length, 768)
    text, rows = torch.zeros(2, 77, 1024), torch.zeros(4, 3).numpy()
    conditions = network.preprocess_conditions(clip, sync, text)
    gone, waveform, onsets = folder / "gone", torch.zeros(1, 16_000), [0.5, 1.0]
    store, training = mmaudio_hf.FeatureStore.open(folder / "videos"), TrainingConfig()
    calls = [
        (mmaudio_hf.load_recipe, {"path": folder / "run.yaml", "overrides": []}),
        (mmaudio_hf.FeatureStore.open, {"path": folder / "videos"}),
        (store.read, {"indices": [0], "columns": ["mean"]}),
        (mmaudio_hf.FeatureStore.from_dataset, {"dataset": None, "path": gone}),
        (
            StoreWriter,
            {"path": gone, "shapes": column_shapes("16k", 1.0, video=True), "num_rows": 3}
            | {"mode": "16k", "duration": 1.0, "encoders": {}},
        ),
        (MMAudio, {"config": config}),
        (MMAudio.from_variant, {"variant": "small"}),
        (MMAudio.from_pretrained, {"pretrained_model_name_or_path": gone}),
        (MMAudio.push_to_hub, {"self": network, "repo_id": 3}),
        (network.save_pretrained, {"save_directory": folder / "text.txt"}),
        (network.preprocess_conditions, {"clip_features": clip, "sync_features": sync, "text_features": text}),
        (network.empty_conditions, {"batch": 2, "negative_text_features": text}),
        (network.predict_velocity, {"latent_BNC": latent, "t_B": times, "conditions": conditions}),
        (
            network.set_lengths,
            {"latent": network.latent_length, "clip": network.clip_length} | {"sync": config.sync_length},
        ),
        (network.normalize, {"latent_BNC": latent}),
        (network.unnormalize, {"latent_BNC": latent}),
        (flow.interpolate, {"x0": latent, "x1": latent, "t": times, "min_sigma": 0.0}),
        (flow.velocity_target, {"x0": latent, "x1": latent, "min_sigma": 0.0}),
        (flow.flow_loss, {"velocity": latent, "target": latent}),
        (flow.sample_time, {"z_B": times, "mean": 0.0, "scale": 1.0}),
        (flow.sample_euler, {"velocity_fn": lambda x, t: x, "x0": latent, "num_steps": 2, "min_sigma": 0.0}),
        (MelSpectrogram, {"mode": "16k"}),
        (MelSpectrogram("16k").forward, {"waveform": waveform}),
        (MelVAE, {"mode": "16k"}),
        (Vocoder, {"mode": "44k"}),
        (load_state, {"source": gone}),
        (ClipEncoder.from_pretrained, {"name": 3}),
        (read_video, {"path": gone, "mode": "16k", "duration": 1.0, "start": 0.0, "alignment": "timestamps"}),
        (partition, {"num_samples": 200_000, "sample_rate": 16_000}),
        (variant_config, {"variant": "small_16k"}),
        (model_config, {"plain": {}, "source": gone}),
        (micro_batch_size, {"training": training, "world_size": 1}),
        (samples_per_step, {"training": training, "latent_length": 250}),
        (config_of_duration, {"model": config, "duration": 2.0}),
        *((s, {f.name: "x" if f.default is MISSING else f.default for f in fields(s)}) for s in SECTIONS),
        (audio_mode, {"name": "16k"}),
        (sequence_lengths, {"mode": "16k", "duration": 8.0}),
        (update, {"ema_weights": [latent], "weights": [latent], "step": 1, "gamma": 1.0, "update_every": 1}),
        (synthesize, {"snapshots": [], "sigma_rel": 0.1, "step": 1}),
        (learning_rate, {"step": 1, "config": OptimConfig(), "total_steps": 10}),
        (evaluation.frechet_distance, {"predicted": rows, "reference": rows}),
        (evaluation.kl_divergence, {"predicted": rows, "reference": rows, "activation": "softmax"}),
        (evaluation.inception_score, {"logits": rows, "splits": 2}),
        (evaluation.kernel_distance, {"predicted": rows, "reference": rows, "subsets": 2, "size": 2}),
        (evaluation.kernel_audio_distance, {"predicted": rows, "reference": rows}),
        (evaluation.mean_cosine, {"a": rows, "b": rows}),
        (evaluation.desync_score, {"classes": [[0, 20]]}),
        (evaluation.clean_id, {"item_id": "a"}),
        (evaluation.onset_times, {"waveform": waveform[0], "sample_rate": 16_000}),
        (evaluation.onset_f1, {"predicted": onsets, "reference": onsets, "tolerance": 0.1}),
        (evaluation.onset_scores, {"detected": [rows[:, 0]] * 2, "events": [onsets, onsets], "duration": 2.0}),
        (evaluation.shuffled_pairing, {"n": 3, "seed": 0}),
        (evaluation.waveform_scores, {"predicted": waveform[0], "reference": waveform[0], "sample_rate": 16_000}),
        (evaluation.evaluate_caches, {"gt_dir": gone, "pred_dir": gone}),
        (evaluation.score_caches, {"gt_dir": gone, "pred_dir": gone}),
        (mmaudio_hf.MMAudioPipeline.from_pretrained, {"source": gone, "device": "cpu", "precision": "fp32"}),
    ]
    return {getattr(call, "__qualname__", type(call).__name__): (call, options) for call, options in calls}


# Sections of a recipe: their fields are checked when one is made, as in a recipe.
SECTIONS = [value for name in config.__all__ if is_dataclass(value := getattr(config, name))]
# Public callables that are not called with wrong arguments here, and why.
ELSEWHERE = {
    "MMAudioPipeline.from_pretrained": "with all of the pipeline in test_generation_pipeline",
    "MMAudioPipeline.save_pretrained": "there as well",
    **dict.fromkeys(("flow_step", "make_objective", "Score"), "of batches and results, which the package makes itself"),
    **dict.fromkeys(("is_released", "to_dict", "save_recipe", "read_json", "read_json_lines"), "take what is known"),
    **dict.fromkeys(("MMAudioPipeline", "FeatureStore"), "made by from_pretrained and open"),
}


def public_names() -> set[str]:
    """What is exported by a package, and every callable whose arguments are checked: a new one is among them."""
    names = set(config.__all__) | set(evaluation.__all__) | set(mmaudio_hf.__all__)
    names = {name for name in names if any(callable(getattr(m, name, None)) for m in (config, evaluation, mmaudio_hf))}
    code = checked(print_nothing).__code__
    for module in pkgutil.walk_packages(mmaudio_hf.__path__, "mmaudio_hf."):
        if module.name.endswith(("__main__", "av_bench_job")):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if getattr(value, "__module__", "") == module.name:
                members = vars(value).values() if inspect.isclass(value) else (value,)
                functions = (getattr(member, "__func__", member) for member in members)
                names |= {f.__qualname__ for f in functions if getattr(f, "__code__", None) is code}
    return {name.removesuffix(".__init__") for name in names}


def print_nothing() -> None:
    """Something to check."""


def test_no_public_callable_is_forgotten(folder):
    """One of a new name needs arguments above, or a reason here."""
    walked = set(public_calls(folder))
    assert not (missing := public_names() - walked - set(ELSEWHERE)), missing
    assert set(ELSEWHERE) <= public_names() and len(walked) > 70


def wrong_arguments(value: object) -> list:
    """Values of other kinds than `value`: none of them means anything in its place."""
    anything = [None, b"x", {}, object()]
    if isinstance(value, Path):
        return [*anything, 3, 1.5, "", " ", [], "x" * 300, "gone", "empty", "binary"]
    if isinstance(value, torch.Tensor):
        return [*anything, 3, "x", [], torch.zeros(0), torch.zeros(3, 1, 7, 2)]
    if isinstance(value, int | float):
        return [*anything, "x", "", math.nan, [], True, 10**30, torch.zeros(2)]
    return [*anything, "nonsense", 1.5]


def test_every_public_callable_names_a_wrong_argument(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    problems, errors = [], 0
    for name, (call, options) in public_calls(folder).items():
        for key, value in options.items():
            for wrong in wrong_arguments(value):
                try:
                    call(**options | {key: wrong})
                except (ValueError, ConnectionError) as error:
                    errors += 1
                    if len(str(error).splitlines()) > 3 or not str(error):
                        problems.append(f"{name}({key}={repr(wrong)[:30]}): {error}")
                except Exception as error:
                    problems.append(f"{name}({key}={repr(wrong)[:30]}): {type(error).__name__}: {error}")
    assert not problems, "\n".join(problems)
    assert errors > 500


GENERATE = f"generate --run {RUN} --prompt a --duration 1 --steps 1 --out new/a.wav"
DAMAGED = {  # file of a run -> a command that reads it
    "config.yaml": f"replay-step {RUN} 1",
    "last/pretrained_model/config.json": GENERATE,
    "last/pretrained_model/encoders.json": GENERATE,
    "last/pretrained_model/model.safetensors": GENERATE,
    "last/pretrained_model/weights.json": f"evaluate {RUN} --split validation --out new/scores",
    "last/training_state/state.json": f"push {RUN} me/name --dry-run --training-state",
}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_file_of_a_run_is_named(folder, file, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    whole = Path(RUN, file).read_bytes()
    try:
        for content in (b"", whole[: len(whole) // 2], b"[1, 2]", b'"x"', b"[" * 100_000, bytes(range(256))):
            Path(RUN, file).write_bytes(content)
            assert cli.main(shlex.split(DAMAGED[file])) == 2, content[:20]
            error = capsys.readouterr().err
            assert Path(file).name in error and error.count("error: ") == 1, error
    finally:
        Path(RUN, file).write_bytes(whole)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["train", RUN], f"no recipe at {RUN}; that of a run is {RUN}/config.yaml"),
        (
            ["train", RECIPE, "--training.steps=5"],
            "arguments: --training.steps=5; a setting has no dashes: training.steps=5",
        ),
        (["train", RECIPE, "name=parent", "data.train=[{path: .}]"], "name one in it: audios, held_out, videos"),
    ],
)
def test_what_people_type_instead_has_a_hint(folder, words, hint, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with contextlib.suppress(SystemExit):
        assert cli.main(words) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("words", [["ema", RUN, "--sigma-rel", "0.1", "--out", ""], ["report", "--run", " "]])
def test_an_empty_path_is_not_the_current_folder(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2 and "a path must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: variant_config("small"), "unknown model variant 'small'"),
        (lambda: variant_config(None), "unknown model variant None"),
        (lambda: variant_config("small_16k", hidden=64), r"unknown key model\.hidden: did you mean 'hidden_dim'"),
        (lambda: variant_config("small_16k", num_heads=0), "num_heads must be at least 1"),
        (lambda: variant_config("small_16k", duration=float("nan")), "duration must be more than 0"),
        (lambda: mmaudio_hf.MMAudio.from_variant("x"), "unknown model variant 'x'"),
        (lambda: MelVAE("48k"), "48k"),
        (lambda: sequence_lengths("48k", 8.0), "48k"),
        (lambda: sequence_lengths("16k", -1.0), "-1"),
        (lambda: partition(-1, 16_000), "-1 samples at 16000 Hz are no audio"),
        (lambda: partition(16_000, 0), "at 0 Hz are no audio"),
        (lambda: sample_euler(lambda x, t: x, torch.zeros(1, 2, 3), 1.5), "num_steps must be a whole number, not 1.5"),
        (lambda: evaluation.frechet_distance(torch.zeros(3, 4), torch.zeros(3, 5)), "4|5"),
        (lambda: synthesize([], 0.1, 5), "snapshot"),
    ],
)
def test_public_functions_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
