"""`mmaudio-hf doctor` on small recipes: nothing wrong, and many faults at once, each with its way out."""

import importlib.util
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from hub_server import TOKEN, USER, Hub
from toy_stores import recipe_tree, write_codec, write_recipe, write_store

from mmaudio_hf.cli import main
from mmaudio_hf.config import load_recipe, to_dict
from mmaudio_hf.data.mixture import Mixture, open_mixture
from mmaudio_hf.doctor import CHECKS, TIGHT, Launch, available_memory, examine, fitting_settings, measure_reading
from mmaudio_hf.models.network import MMAudio

READER = "hf_thisonemayonlyread00000000"


@pytest.fixture(autouse=True)
def own_configuration(tmp_path, monkeypatch):
    """File of the user's own configuration of accelerate, which is not there yet."""
    path = tmp_path / "default_config.yaml"
    for module in ("mmaudio_hf.doctor", "accelerate.commands.launch", "accelerate.commands.config.config_args"):
        monkeypatch.setattr(f"{module}.default_config_file", str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stores, and a codec fitted to noise."""
    folder = tmp_path_factory.mktemp("doctor")
    recipe_tree(folder)
    write_codec(folder)
    return folder


def doctor(capsys, *words: str) -> tuple[int, dict[str, str], str]:
    """Exit code, the level of every subject (the worst of its lines), and the text with its lines joined."""
    code = main(["doctor", *words])
    text = capsys.readouterr().out
    levels: dict[str, str] = {}
    for line in text.splitlines():
        level, subject = line[:4].strip(), line[6:24].split("  ")[0].strip()
        if level in ("ok", "warn", "FAIL") and levels.get(subject) != "FAIL":
            levels[subject] = level
    return code, levels, " ".join(text.split())


def test_a_good_recipe_has_no_faults(folder, capsys):
    recipe = write_recipe(folder, "good", trackers=["tensorboard"])
    code, levels, text = doctor(capsys, str(recipe), "samples.every=2", "--processes", "2")
    # How fast random rows come depends on who else uses the disk at this moment.
    assert code == 0 and {level for subject, level in levels.items() if subject != "reading"} == {"ok"}, text
    subjects = [
        "software",
        "device",
        "launch",
        "batch",
        "run folder",
        "data.train",
        "data.validation",
        "data.test",
        "weights",
    ]
    assert list(levels) == [*subjects, "tracker", "memory", "host memory", "disk space", "speed", "reading"]
    assert "videos 24 rows (60%), audios 8 rows (40%); 40 an epoch" in text and text.endswith("good: ready to train")
    assert "transformed weights" in text, "of float32 convolutions on a CPU"
    assert not (folder / "output").exists()


def test_every_fault_says_what_to_do(folder, capsys, tmp_path, monkeypatch):
    opened, closed, close = [], [], Mixture.close
    monkeypatch.setattr("mmaudio_hf.doctor.open_mixture", lambda *a: opened.append(open_mixture(*a)) or opened[-1])
    monkeypatch.setattr(Mixture, "close", lambda mixture: closed.append(mixture) or close(mixture))
    for store in ("videos", "audios", "held_out"):
        shutil.copytree(folder / store, tmp_path / store)
        for file in (f"{store}.tsv", f"{store}.manifest.json"):
            shutil.copy(folder / file, tmp_path / file)
    means = np.memmap(tmp_path / "videos" / "mean.memmap", dtype=np.float32, mode="r+")
    means[5 * (means.size // 24)] = np.nan
    means.flush()
    # About 2 MB of activations a sample, and 0.8 MB of features: too much for one pass, not for several.
    batch_size = int(available_memory() / 1.5e6) // 64 * 64
    recipe = write_recipe(tmp_path, "bad", batch_size=batch_size, steps=100_000_000)
    # A run that has been here, and was faster than any disk.
    (tmp_path / "output" / "bad").mkdir(parents=True)
    (tmp_path / "output" / "bad" / "speed.jsonl").write_text(json.dumps({"speed/samples_per_second": 1e9}) + "\n{")
    changes = ("samples.every=2", "ema.snapshot_every=1", "data.test=[{path: nowhere}]")
    code, levels, text = doctor(capsys, str(recipe), *changes)
    assert code == 1 and text.endswith("bad: 4 of these must be fixed first"), text
    failed = {name for name, level in levels.items() if level == "FAIL"}
    assert failed == {"data.train", "memory", "host memory", "disk space"}
    assert {name for name, level in levels.items() if level == "warn"} == {"data.test", "weights"}
    assert "mean of row 5 (videos_0005) is not finite; `mmaudio-hf verify" in text
    assert {id(mixture) for mixture in opened} == {id(mixture) for mixture in closed}
    assert "toy_codec_16k.safetensors is missing" in text and "set training.accumulation_steps=" in text
    assert "raise ema.snapshot_every" in text

    repaired = "data.train=[{path: held_out}]".replace("held_out", str(tmp_path / "held_out"))
    code, levels, text = doctor(capsys, str(recipe), *changes, repaired, "training.batch_size=4", "training.steps=10")
    assert levels["weights"] == "FAIL" and levels["reading"] == "warn" and levels["disk space"] == "ok", text
    assert "as the run had it last" in text and "it will wait 100% of the time" in text


def test_a_wrong_launch(folder, capsys, monkeypatch):
    recipe = write_recipe(folder, "wrong", batch_size=4)
    code, levels, text = doctor(capsys, str(recipe), "--processes", "3", "--quick", "data.validation=[]")
    assert code == 1 and levels["batch"] == "FAIL" and levels["data.validation"] == "warn"
    assert "batch_size 4 does not split over 3 processes" in text and "memory" not in levels
    _, levels, text = doctor(capsys, str(recipe), "--machines", "2", "--processes", "2", "--quick")
    assert levels["batch"] == "ok" and "4 = processes 4 x passes 1 x samples 1" in text
    code, levels, _ = doctor(capsys, str(recipe), "--machines", "2", "--processes", "3", "--quick")
    assert code == 1 and levels["batch"] == "FAIL" and levels["device"] == "ok"
    assert main(["doctor", str(recipe), "--machines", "0"]) == 2
    assert "--machines must be at least 1, not 0" in capsys.readouterr().err
    with monkeypatch.context() as without:  # as where the extra is not installed
        without.setattr(importlib.util, "find_spec", lambda name: None)
        code, levels, text = doctor(capsys, str(recipe), "--quick", "training.trackers=[wandb]")
    assert levels["tracker"] == "FAIL" and "pip install wandb" in text
    (folder / "output" / "wrong" / "checkpoints" / "step_4").mkdir(parents=True)
    code, levels, text = doctor(capsys, str(recipe), "--quick", "--processes", "3", "resume=never")
    assert levels["run folder"] == "FAIL" and "or resume=auto" in text
    state = folder / "output" / "wrong" / "checkpoints" / "step_4" / "training_state" / "state.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"step": 1, "facts": {"recipe": to_dict(load_recipe(recipe)), "depends_on": {}}}))
    _, levels, text = doctor(capsys, str(recipe), "--quick")
    assert levels["resume"] == "ok", text
    code, levels, text = doctor(capsys, str(recipe), "--quick", "optim.eps=0.1")
    assert (code, levels["resume"]) == (1, "FAIL") and "+ optim.eps: 0.1" in text and "--allow-changes" in text


def test_what_is_left_in_a_shell_is_seen_before_the_launch(folder, capsys, monkeypatch):
    recipe = str(write_recipe(folder, "shell", batch_size=4))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    code, levels, text = doctor(capsys, recipe, "--quick")
    assert (code, levels["launch"]) == (0, "warn") and "the recipe has training.accumulation_steps=1" in text
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    code, levels, text = doctor(capsys, recipe, "--quick")
    assert (code, levels["launch"]) == (1, "FAIL") and "or unset ACCELERATE_USE_DEEPSPEED" in text


OWN = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": False, "num_machines": 1}
OWN |= {"num_processes": 1, "machine_rank": 0, "debug": False, "mixed_precision": "no"}
# The launcher ends with a traceback of its own.
UNLAUNCHED = (
    ({"mixed_precision": "fp8"}, "FP8 is not available"),
    ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}, "DEEPSPEED is not supported"),
    ({"distributed_type": "XLA"}, "XLA is not supported"),
    ({"distributed_type": "FSDP", "nonsense": 1}, "had unknown keys (['nonsense'])"),
)


@pytest.mark.parametrize(
    ("settings", "finding"),
    [
        ({}, ""),
        ({"mixed_precision": "fp16"}, "ACCELERATE_MIXED_PRECISION=fp16 of the launch is not used"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "ACCELERATE_DYNAMO_BACKEND=inductor of the launch"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, "FSDP is supported in version 2 alone"),
        ({"distributed_type": "MULTI_CPU", "num_processes": 2}, "asked for several processes but started one"),
        ({"num_machines": 2}, "you need to specify the main process IP"),
        *UNLAUNCHED,
    ],
)
def test_the_users_own_configuration_of_accelerate_is_looked_at(folder, own_configuration, settings, finding):
    own_configuration.write_text(yaml.safe_dump(OWN | settings))
    launch = Launch(load_recipe(write_recipe(folder, "own", batch_size=4)), quick=True)
    findings = list(examine(launch, {"launch": CHECKS["launch"]}))
    assert findings[0] == ("ok", "launch", "nothing in the environment changes the recipe")
    notes = [f"`accelerate launch` without --config_file reads {own_configuration}: "] * bool(finding)
    assert [f.message[: len(n)] for f, n in zip(findings[1:], notes, strict=True)] == notes, findings
    assert all(f.level == "warn" and finding in f.message for f in findings[1:]), findings
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ


@pytest.mark.parametrize(("settings", "finding"), UNLAUNCHED)
def test_such_a_launcher_ends_before_training(own_configuration, settings, finding, tmp_path):
    """The launcher ends before it starts a script, so that training itself has no say."""
    own_configuration.write_text(yaml.safe_dump(OWN | settings))
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'started')!r}, 'w')")
    with pytest.raises((ImportError, RuntimeError, ValueError)):
        launch_command(launch_command_parser().parse_args([str(script)]))
    assert not (tmp_path / "started").exists()


def test_every_missing_store_and_folder_is_named(folder, capsys):
    recipe = write_recipe(folder, "missing", batch_size=4)
    changes = ["data.train=[{path: nowhere}, {path: elsewhere}]", "training.steps=1000000000"]
    changes += ["extraction.videos=[{name: nowhere, media_dir: no_media, list: no.tsv}]", "training.batch_size=64"]
    code, levels, text = doctor(capsys, str(recipe), *changes, "--processes", "1")
    assert code == 1 and levels["data.train"] == "FAIL" and levels["media"] == "warn"
    assert "no feature store at nowhere" in text and "no feature store at elsewhere" in text
    assert "extraction.videos nowhere: media_dir no_media is not a folder" in text
    (folder / "stray.tsv").write_text('id\tlabel\na\t"b\nc\td"\n')
    changes[2] = f"extraction.audios=[{{name: stray, media_dir: {folder}, list: {folder / 'stray.tsv'}}}]"
    _, levels, text = doctor(capsys, str(recipe), *changes, "--processes", "1")
    assert levels["media"] == "warn" and "stray.tsv, line 2: a field begins with a quote here" in text
    assert levels["speed"] == "warn" and "lower training.steps" in text


def test_released_weights_that_training_needs_are_checked(folder, capsys):
    recipe = write_recipe(folder, "released", batch_size=4)
    words = ("encoders.kind=released", f"encoders.weights_dir={folder}", "--quick", "--processes", "3")
    _, levels, text = doctor(capsys, str(recipe), *words)
    assert levels["data.train"] == "ok" and levels["weights"] == "FAIL"  # of toy encoders that have no names
    lines = {name: f"{name} is missing" in text for name in ("empty_string.pth", "v1-16.pth", "clip")}
    assert all(lines.values())
    assert text.count("(training does without") == 4 and text.count("mmaudio-hf weights download") == 1


def test_what_training_starts_from_is_read(folder, capsys):
    recipe, subject = write_recipe(folder, "start", batch_size=4), "initial weights"
    config = load_recipe(recipe).model
    for name, sizes in (("fits", config), ("wide", replace(config, hidden_dim=128))):
        MMAudio(sizes).save_pretrained(folder / name)
    words = (str(recipe), "--quick", "--processes", "1")
    for start, level, message in (
        ("fits", "ok", "variant small_16k"),
        ("wide", "FAIL", "has model.hidden_dim 128, the recipe 64"),
        ("mmaudio_small_16k.pth", "FAIL", "is not a file: correct the path"),
        ("absent", "FAIL", "neither a folder nor a Hub id"),
    ):
        code, levels, text = doctor(capsys, *words, f"finetune.init_from={folder / start}")
        assert (levels[subject], code) == (level, int(level == "FAIL")) and message in text, text
    assert subject not in doctor(capsys, *words)[1]


def test_memory_is_that_of_the_duration_that_takes_most(folder, capsys):
    write_store(folder / "longer", 8, duration=2.0)
    recipe = write_recipe(folder, "durations", batch_size=0, batch_tokens=256, batch_size_multiple=2)
    changes = (f"data.train.2.path={folder / 'longer'}", "samples.every=2", "--quick")
    one_size = ("training.batch_size=4", "training.batch_tokens=0", "training.batch_size_multiple=8")
    code, levels, text = doctor(capsys, str(recipe), *changes, "--processes", "2")
    assert code == 0 and set(levels.values()) == {"ok"}, text
    assert "videos (1 s) 24 rows (50%), audios (1 s) 8 rows (33%), longer (2 s) 8 rows (17%); 48 an epoch" in text
    assert "48 an epoch: 83% of 1 s, 17% of 2 s" in text and "a device, for clips of 1 s (" in text
    assert "8 of 1 s in 71% of the steps = processes 2 x passes 1 x samples 4" in text
    assert "4 of 2 s in 29% of the steps = processes 2 x passes 1 x samples 2" in text
    code, levels, text = doctor(capsys, str(recipe), *changes, *one_size)
    assert code == 0 and "a device, for clips of 2 s (" in text  # as many clips of 1 s have half as many latents
    code, levels, text = doctor(capsys, str(recipe), *changes, "--processes", "4")
    assert code == 0 and "4 of 2 s in 29% of the steps = processes 4 x passes 1 x samples 1" in text
    code, levels, text = doctor(capsys, str(recipe), *changes, "--processes", "3")
    assert code == 1 and levels["batch"] == "FAIL" and "memory" not in levels
    assert "gives 8 samples of 32 latents, which does not split over 3 processes" in text
    assert main(["train", str(recipe), changes[0], "--dry-run"]) == 0
    derived = yaml.safe_load(capsys.readouterr().out)["derived"]
    assert derived["batch"]["2 s"]["global"] == 4 and derived["batch"]["1 s"]["per_process_and_pass"] == 8
    assert derived["steps_per_epoch"] == 7.0 and derived["epochs"] == round(12 / 7, 2)


def test_reading_is_measured(folder):
    recipe = load_recipe(write_recipe(folder, "reading"))
    mixture = open_mixture(recipe.data.train, recipe.model)
    samples, size = measure_reading(mixture, threads=2, limit=0.1)
    video, audio = (sum(c.row_bytes for c in store.columns.values()) for store in mixture.stores)
    assert audio < size / samples < video


def test_the_hub_is_checked_and_not_changed(folder, capsys, tmp_path, monkeypatch):
    recipe = str(write_recipe(folder, "published"))
    with Hub(tmp_path / "hub", tokens={READER: f"{USER}:read"}) as hub:
        hub.use_here(monkeypatch, tmp_path / "home")
        code, levels, text = doctor(capsys, recipe, f"hub.repo_id={USER}/new", "--quick")
        assert (code, levels["Hub"]) == (0, "ok"), text
        assert not hub.repository(f"{USER}/new").exists and not hub.requests("repos/create")
        code, levels, text = doctor(capsys, recipe, f"resume=hub://{USER}/gone", f"hub.repo_id={USER}/new", "--quick")
        assert (code, levels["resume"]) == (1, "FAIL") and f"{USER}/gone is not there" in text
        monkeypatch.setenv("HF_TOKEN", READER)
        code, levels, text = doctor(capsys, recipe, f"hub.repo_id={USER}/new", "--quick")
        assert (code, levels["Hub"]) == (1, "FAIL") and "this token may only read" in text and READER not in text
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        MMAudio(load_recipe(recipe).model).save_pretrained(tmp_path / "net")
        start = (recipe, f"finetune.init_from={USER}/net", "--quick")
        assert f"{USER}/net is not there" in doctor(capsys, *start)[2]
        hub.repository(f"{USER}/net").create(private=True)
        hub.repository(f"{USER}/net").add({file.name: file.read_bytes() for file in (tmp_path / "net").iterdir()})
        code, levels, text = doctor(capsys, *start)
        assert (code, levels["initial weights"]) == (0, "ok") and not list((tmp_path / "home").rglob("*.safetensors"))
    code, levels, text = doctor(capsys, recipe, f"hub.repo_id={USER}/new", "--quick")  # no server any more
    assert (code, levels["Hub"]) == (0, "warn") and "cannot be reached" in text


def test_the_doctor_names_settings_with_which_a_recipe_fits(capsys):
    """What it proposes fits by its own count; an adapter needs less than all weights, and nothing makes 2 GB enough."""
    words = ["doctor", "recipes/lora_own.yaml", "model.depth=4", "model.fused_depth=2", "training.batch_size=64"]
    assert main([*words, "--fits", "80GB"]) == 0 and "it fits 80 GB" in capsys.readouterr().out
    assert main([*words, "--fits", "4GB"]) == 0
    settings = re.search(r" with ([\w.=]+)$", capsys.readouterr().out.strip())[1]
    assert settings.startswith("training.accumulation_steps=")
    assert main([*words, settings, "--fits", "4GB"]) == 0 and "it fits 4 GB" in capsys.readouterr().out
    assert main([*words, "--fits", "1.1GB"]) == 1 and "take a smaller model" in capsys.readouterr().out


def test_fitting_settings_fit_and_more_memory_never_needs_more_of_them():
    """Over a ladder of sizes; with the proposed settings the recipe fits as it is, below the size by a margin."""
    sizes = ["model.hidden_dim=64", "model.num_heads=1", "model.depth=2", "model.fused_depth=1"]
    words = [*sizes, "training.batch_size=64"]
    recipe, costs = load_recipe("recipes/lora_own.yaml", words), []
    for size in (0.75e9, 1.15e9, 1.3e9, 2.5e9):  # the first is less than CUDA alone takes
        text, fits = fitting_settings(recipe, size)
        settings = re.findall(r"[a-z]+\.\w+=\w+", text) if fits else []
        accumulation = [int(number) for number in re.findall(r"accumulation_steps=(\d+)", text)]
        costs.append((not fits, len(settings), accumulation))
        if not fits:
            assert "no accumulation" in text and "fits 0.75 GB: take a smaller model" in text
            continue
        again, fits = fitting_settings(load_recipe("recipes/lora_own.yaml", [*words, *settings]), size)
        assert fits and "as it is; it fits" in again
        assert float(re.search(r"about ([\d.]+) GB", again)[1]) * 1e9 <= TIGHT * size * 1.01  # of rounding
    assert costs == sorted(costs, reverse=True) and [cost[0] for cost in costs] == [True, False, False, False]
    assert costs[1] > costs[2] > costs[3] == (False, 0, [])
    text, fits = fitting_settings(load_recipe("recipes/finetune_own.yaml", words), 0.75e9, processes=2)
    assert not fits and "train an adapter: finetune.lora.rank=8" in text
