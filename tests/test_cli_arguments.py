"""Commands and public functions with wrong arguments: one sentence, never a traceback; and the examples of --help."""

import argparse
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from toy_stores import recipe_tree, write_recipe

import mmaudio_hf
from mmaudio_hf import cli
from mmaudio_hf.config import variant_config
from mmaudio_hf.data import tools
from mmaudio_hf.evaluation import evaluate_caches, frechet_distance
from mmaudio_hf.features.autoencoder import MelVAE
from mmaudio_hf.features.toy import ToyMelCodec
from mmaudio_hf.interop import export_run
from mmaudio_hf.media.example import read_events
from mmaudio_hf.media.lists import partition
from mmaudio_hf.media.video import read_video
from mmaudio_hf.models.convert import convert_file
from mmaudio_hf.models.flow import sample_euler
from mmaudio_hf.schema import sequence_lengths
from mmaudio_hf.training.ema import synthesize

ROOT = Path(__file__).parent.parent
# Arguments that work, except for the one that a test replaces; nothing is called new/.
RUN, STORE, RECIPE = "output/run", "videos", "run.yaml"
ARGUMENTS = {
    **dict.fromkeys(("audit", "extract-audio", "extract-video", "partition"), RECIPE),
    **dict.fromkeys(("store inspect", "store verify", "verify"), STORE),
    **dict.fromkeys(("bench extract", "bench generate", "bench scaling", "bench step", "weights verify"), "--rounds 1"),
    "bench finetune": "--methods nothing",
    "bench loader": f"--rounds 1 --store {STORE} --batch-size 2",
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


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_can_be_typed(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*name.split(), "--help"])
    assert stopped.value.code == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"example: mmaudio-hf {name}")
    cli.parse(shlex.split(last.removeprefix("example: mmaudio-hf ")))
    assert name in cli.EXAMPLES


# Called with a path of each wrong kind.
READERS = {
    "load_recipe": lambda path: mmaudio_hf.load_recipe(path),
    "FeatureStore.open": lambda path: mmaudio_hf.FeatureStore.open(path),
    "MMAudio.from_pretrained": lambda path: mmaudio_hf.MMAudio.from_pretrained(path),
    "MMAudioPipeline.from_pretrained": lambda path: mmaudio_hf.MMAudioPipeline.from_pretrained(path),
    "MelVAE.load_released": lambda path: MelVAE("16k").load_released(path),
    "read_video": read_video,
    "read_events": read_events,
    "evaluate_caches": lambda path: evaluate_caches(path, path),
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
        (lambda: sample_euler(lambda x, t: x, torch.zeros(1, 2, 3), 1.5), "whole number of at least 1, not 1.5"),
        (lambda: frechet_distance(torch.zeros(3, 4), torch.zeros(3, 5)), "4|5"),
        (lambda: synthesize([], 0.1, 5), "snapshot"),
    ],
)
def test_public_functions_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
