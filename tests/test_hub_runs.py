"""Runs that travel to a Hub and back: pushed by hand and while they train, pulled, resumed; and what is in the way."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from forked import PATIENCE, Command, resize_disk, run_together, together, wait_until
from hub_server import TOKEN, USER, Hub
from safetensors.torch import load_file
from sharded import save_sharded
from toy_stores import MODEL, recipe_tree
from training_runs import environment, gated_program, run_dir, same_bytes, train

from mmaudio_hf import MMAudio, MMAudioPipeline, hub_client
from mmaudio_hf.cli import main
from mmaudio_hf.cli.hub import fetch_run, find_for_push
from mmaudio_hf.config import HubConfig, load_recipe
from mmaudio_hf.hub import runs
from mmaudio_hf.hub.cards import add_card
from mmaudio_hf.hub.runs import CheckpointSync, check_repository, local_step
from mmaudio_hf.models.pretrained import find_pretrained
from mmaudio_hf.training import resume as lock
from mmaudio_hf.training.checkpoint import TrainingState, load_training_state
from mmaudio_hf.training.finetune import read_pretrained
from mmaudio_hf.training.resume import RunLock

NAME = f"{USER}/run"
STEPS, EVERY = 20, 4
READER = "hf_thisonemayonlyread00000000"
PUBLISHED = {"config.json", "model.safetensors", "weights.json", "encoders.json", "README.md"}


def write_recipe(folder: Path, name: str = "run") -> Path:
    """Snapshots of two EMA profiles, from which the final weights are synthesised; everything is in one run."""
    tree = recipe_tree(folder, steps=STEPS, checkpoint_every=EVERY, validate_every=12) | {"name": name}
    tree["model"] = MODEL | {"hidden_dim": 16}
    tree["ema"] = {"snapshot_every": EVERY, "sigma_rel": 0.08}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("runs"), "undisturbed")
    result = train(recipe, processes=2)
    assert result.returncode == 0, result.stderr
    return recipe


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub", tokens={READER: f"{USER}:read"}) as hub:
        hub.use_here(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def run(undisturbed, tmp_path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(run_dir(undisturbed), tmp_path / "output" / "run", symlinks=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def error_of(capsys, *words: object, code: int = 2) -> str:
    """The one sentence with which a command ends."""
    assert main([str(word) for word in words]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and TOKEN not in error, error
    return error


# --- by hand --------------------------------------------------------------------------------------------------------


def test_a_push_sends_what_the_repository_lacks(hub, run, capsys):
    assert main(["push", str(run), NAME, "--training-state", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "a push creates it" in output and "optimizer.safetensors" in output and "dry run" in output
    assert not hub.repository(NAME).exists
    assert main(["push", str(run), NAME]) == 0
    assert set(hub.files(NAME)) == PUBLISHED and hub.repository(NAME).private
    assert f"{hub.url}/{NAME}: commit " in capsys.readouterr().out
    assert main(["push", str(run), NAME, "--training-state"]) == 0
    assert hub.messages(NAME) == [
        f"Step {STEPS}: weights and training state",
        f"Step {STEPS}: weights",
        "initial commit",
    ]
    capsys.readouterr()
    assert main(["push", str(run), NAME, "--training-state"]) == 0
    assert "0 bytes in 0 files" in capsys.readouterr().out and len(hub.messages(NAME)) == 3


@pytest.fixture
def pulled(hub, run, tmp_path, monkeypatch) -> Path:
    """The run as it comes back from the Hub, in other/run of the working directory."""
    assert main(["push", str(run), NAME]) == 0
    assert main(["push", str(run), NAME, "--training-state"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["pull", NAME, "--to", "other/run"]) == 0
    return Path("other/run")


def first_commit(hub: Hub) -> str:
    """The one before the newest: the weights without training state."""
    return next(hub.repository(NAME).history(hub.repository(NAME).resolve("main")))["parent"]


def test_a_pulled_run_has_the_files_of_the_pushed_one(hub, run, pulled, capsys):
    files = files_of(pulled)
    local = {n: c for n, c in files_of(run).items() if f"step_{STEPS}/" in n or n.startswith("ema/")}
    local |= {n: (run / n).read_bytes() for n in ("config.yaml", "metrics.jsonl")}
    card = f"checkpoints/step_{STEPS}/pretrained_model/README.md"  # made for the repository when it is pushed
    assert files.pop(card) == hub.files(NAME)["README.md"] and local.pop(card)
    assert files == local and (pulled / "last").resolve().name == f"step_{STEPS}"
    assert list(Path("other").iterdir()) == [pulled]
    capsys.readouterr()
    assert main(["pull", NAME, "--to", "third/run", "--dry-run"]) == 0
    assert f"run at step {STEPS}" in capsys.readouterr().out and not Path("third").exists()
    assert main(["pull", f"{NAME}@{first_commit(hub)}", "--to", "network"]) == 0
    assert set(files_of(Path("network"))) == PUBLISHED
    assert main(["push", "network", f"{USER}/second"]) == 0
    assert set(hub.files(f"{USER}/second")) == PUBLISHED


def test_every_reader_takes_what_was_pushed(hub, run, pulled, monkeypatch):
    assert main(["pull", f"{NAME}@{first_commit(hub)}", "--to", "network"]) == 0
    expected = MMAudio.from_pretrained(run / "last" / "pretrained_model").state_dict()
    for source in (NAME, f"{NAME}@{first_commit(hub)}", "network", "other/run"):
        assert len(read_pretrained(source)[1]) > 10
        weights = MMAudioPipeline.from_pretrained(source, device="cpu").model.state_dict()
        assert all(weights[name].equal(value) for name, value in expected.items())
    assert MMAudio.from_pretrained(NAME).config == MMAudio.from_pretrained("network").config
    with pytest.raises(ValueError, match="is not there, or private"):
        MMAudio.from_pretrained(f"{USER}/none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert MMAudio.from_pretrained(find_pretrained(NAME)).config.hidden_dim == 16  # the cache is enough


def test_a_pull_leaves_a_folder_in_use_or_with_other_content_alone(hub, pulled, capsys, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_TIMEOUT", 0)
    with RunLock(pulled, print) as held:
        held.acquire()
        assert "is being trained by another launch" in error_of(capsys, "pull", NAME, "--to", pulled)
    assert "nothing is pulled" in error_of(capsys, "pull", NAME, "--to", pulled)
    Path("network").mkdir()
    Path("network/mine").touch()
    assert "is not empty" in error_of(capsys, "pull", NAME, "--to", "network")


def test_links_of_a_hub_cache_are_pushed_as_the_files_they_point_at(hub, run, tmp_path, capsys):
    """A snapshot of the cache holds relative links into blobs/ beside it."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (run / "last" / "pretrained_model").iterdir():
        shutil.copy(file, blobs / f"blob_{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob_{file.name}")
    assert main(["push", str(snapshot), NAME]) == 0
    assert set(hub.files(NAME)) == PUBLISHED
    assert hub.files(NAME)["model.safetensors"] == (blobs / "blob_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("broken", [Path.unlink, lambda file: (file.unlink(), file.symlink_to("gone"))])
def test_a_push_without_configuration_or_weights_is_an_error(hub, run, capsys, name, broken):
    (run / "last/pretrained_model/README.md").unlink()
    broken(run / "last/pretrained_model" / name)
    assert f"has no {name}: nothing can be pushed" in error_of(capsys, "push", run, NAME)
    assert error_of(capsys, "push", run / "last/pretrained_model", NAME)
    assert not hub.repository(NAME).exists


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "window.safetensors"])
def test_a_damaged_training_state_is_not_pushed(hub, run, tmp_path, capsys, name):
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    file = copy / "last" / "training_state" / name
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main(["push", str(copy), "tester/damaged", "--training-state"]) == 2
    assert name in capsys.readouterr().err and not hub.repository("tester/damaged").exists
    assert main(["push", str(copy), "tester/damaged", "--dry-run"]) == 0  # weights alone are whole


def test_a_dry_run_needs_no_hub(hub, run, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(run), NAME, "--training-state", "--dry-run"]) == 0
    output = capsys.readouterr()
    assert "HF_HUB_OFFLINE is set: the files are shown as for an empty repository" in output.err
    assert f"step {STEPS} to {NAME}: " in output.out and "model.safetensors" in output.out
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        find_for_push(NAME, dry_run=False)


def test_older_never_replaces_newer(hub, run, capsys):
    assert main(["push", str(run), NAME]) == 0
    before = hub.files(NAME)
    assert f"holds step {STEPS}" in error_of(capsys, "push", run / "checkpoints" / f"step_{STEPS - EVERY}", NAME)
    assert hub.files(NAME) == before
    hub.repository(f"{USER}/foreign").create(private=False)
    hub.repository(f"{USER}/foreign").add({"config.json": b"{}", "model.safetensors": b"theirs"})
    assert "that no run pushed" in error_of(capsys, "push", run, f"{USER}/foreign")
    assert hub.files(f"{USER}/foreign")["model.safetensors"] == b"theirs"


def test_wrong_arguments_tokens_and_networks_are_one_sentence(hub, run, tmp_path, capsys, monkeypatch):
    assert "to which repository?" in error_of(capsys, "push", run)
    assert "is not a repository of the Hub" in error_of(capsys, "push", run, "just-a-name")
    assert "go to the main branch" in error_of(capsys, "push", run, f"{NAME}@v1")
    assert "neither a run folder" in error_of(capsys, "push", tmp_path, NAME)
    assert "does not allow it" in error_of(capsys, "push", run, "somebody/else")
    assert "is not there, or private to others" in error_of(capsys, "pull", f"{USER}/none")
    hub.repository(NAME).create(private=True)
    assert "holds no network" in error_of(capsys, "pull", NAME)
    assert "no such revision" in error_of(capsys, "pull", f"{NAME}@v9")
    assert "is not there, or private to others" in error_of(
        capsys, "generate", "--run", f"{USER}/none", "--prompt", "a", "--out", "a.wav"
    )
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "a write token" in error_of(capsys, "push", run, NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_nobodyknowsthisone")
    for words in (("push", run, NAME), ("pull", NAME)):
        error = error_of(capsys, *words)
        assert "does not know this token: run `hf auth login`" in error and "nobodyknows" not in error
    monkeypatch.delenv("HF_TOKEN")
    assert "without a token: run `hf auth login`" in error_of(capsys, "push", run, NAME)
    assert "is not there, or private" in error_of(capsys, "pull", NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for words in (("push", run, NAME), ("pull", NAME), ("generate", "--run", NAME, "--prompt", "a", "--out", "a.wav")):
        assert "HF_HUB_OFFLINE is set" in error_of(capsys, *words, code=1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.kill()
    assert "cannot be reached" in error_of(capsys, "pull", NAME, code=1)
    assert "cannot be reached" in error_of(capsys, "push", run, NAME, code=1)
    assert not (tmp_path / "output" / "run.hub").exists()


def test_slices_travel_and_those_of_other_processes_go(hub, run, tmp_path, monkeypatch):
    """A training state as processes under FSDP share it out, of three and then of two; what is left reads as whole."""
    monkeypatch.chdir(tmp_path)
    whole = load_training_state(run / "last")
    tensors = {group: dict(values) for group, values in whole.tensors.items()}
    names = {group: [name for name, value in tensors[group].items() if value.ndim] for group in ("model", "ema")}
    kept = shutil.copytree(run / "last" / "pretrained_model", tmp_path / "kept")
    for count in (3, 2):
        state = TrainingState(STEPS, tensors, {**whole.metadata, "processes": count})
        save_sharded(run, state, names, count, lambda folder: shutil.copytree(kept, folder, dirs_exist_ok=True))
        assert main(["push", str(run), NAME, "--training-state"]) == 0
        there = {name for name in hub.files(NAME) if "rank" in name}
        assert there == {f"training_state/{g}.rank_{r}_of_{count}.safetensors" for g in names for r in range(count)}
        # One that belongs to no state.json stays where it is.
        hub.repository(NAME).add({"training_state/ema.rank_0_of_9.safetensors": b"old"})
        assert main(["pull", NAME, "--to", f"new_{count}"]) == 0
        pulled = Path(f"new_{count}", "last")
        assert not (pulled / "training_state" / "ema.rank_0_of_9.safetensors").exists()
        for group, values in load_training_state(pulled).tensors.items():
            assert set(values) == set(tensors[group])
            assert all(torch.equal(value, tensors[group][name]) for name, value in values.items())
    # A state that lacks one of its slices is none.
    repository, commit = hub.repository(NAME), hub.repository(NAME).resolve("main")
    files = repository.commit(commit)["files"]
    del files["training_state/ema.rank_1_of_2.safetensors"]
    repository.write("main", files, "removed by hand", commit)
    assert main(["pull", NAME, "--to", "network"]) == 0
    assert set(files_of(Path("network"))) >= PUBLISHED and not Path("network/checkpoints").exists()


@pytest.mark.parametrize(
    "state", [b"[" * 100_000, b"[]", b'{"step": "4"}', b'{"step": -1}', b'{"step": 1' + b"0" * 300 + b"}"]
)
def test_a_damaged_state_on_the_hub_is_one_sentence(hub, run, tmp_path, capsys, monkeypatch, state):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(run), NAME, "--training-state"]) == 0
    hub.repository(NAME).add({"training_state/state.json": state})
    assert "state.json" in error_of(capsys, "pull", NAME, "--to", "new") and not Path("new").exists()
    hub.repository(NAME).add({"weights.json": state})
    assert "weights.json" in error_of(capsys, "push", run, NAME)


HOSTILE = ("../x", "a/../../x", "/etc/x", "C:\\x", "training_state\\x", "a\nb", "training_state/ema/../../../x", "./x")


@pytest.mark.parametrize("name", HOSTILE)
def test_unsafe_file_names_are_rejected(hub, run, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(run), NAME, "--training-state"]) == 0
    hub.repository(NAME).add({name: b"bad"})
    assert "is no plain name: nothing was fetched" in error_of(capsys, "pull", NAME, "--to", "new/run")
    words = ("generate", "--run", NAME, "--prompt", "a", "--out", "a.wav")
    assert "is no plain name: nothing was fetched" in error_of(capsys, *words)
    with pytest.raises(ValueError, match="is no plain name: nothing was fetched"):
        MMAudio.from_pretrained(NAME)
    with pytest.raises(ValueError, match="is no plain name: nothing was fetched"):
        read_pretrained(NAME)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not Path("new").exists()


def test_only_known_files_are_written_and_nothing_is_run(hub, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(run), NAME, "--training-state"]) == 0
    unknown = (
        "modeling.py",
        "pytorch_model.bin",
        "training_state/model.pt",
        "toy_codec_/x.safetensors",
        "extra/config.json",
    )
    unknown += ("training_state/ema/sigma_0.1_step_1.safetensors.py", ".gitattributes", "toy_codec_48k.safetensors")
    hub.repository(NAME).add(dict.fromkeys(unknown, b"raise SystemExit('run')"))
    assert main(["pull", NAME, "--to", "new"]) == 0
    assert "left on the Hub: 7 files" in capsys.readouterr().out
    find_pretrained(NAME)
    paths = {request["path"] for request in hub.requests("resolve")}
    assert not any(path.endswith(name) for path in paths for name in unknown if name != "extra/config.json")
    written = {p.name for folder in ("new", "home") for p in Path(folder).rglob("*") if p.is_file()}
    assert not written & {Path(name).name for name in unknown if name != "extra/config.json"}


def test_downloads_that_break_off_are_taken_up(hub, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(run), NAME, "--training-state"]) == 0
    hub.faults({"match": "GET /storage/", "drop_download_after": 1000})
    error_of(capsys, "pull", NAME, "--to", "new", code=1)
    assert not Path("new").exists() and Path("new.hub").is_dir()
    hub.faults({"match": "GET /storage/", "drop_download_after": 1000, "times": 2})
    assert main(["pull", NAME, "--to", "new"]) == 0
    assert (Path("new/last/training_state/model.safetensors")).read_bytes() == (
        run / "last" / "training_state" / "model.safetensors"
    ).read_bytes()
    # A file that is damaged where the Hub keeps it is not taken for right.
    sha256 = hub.repository(NAME).commit(hub.repository(NAME).resolve("main"))["files"]["model.safetensors"]["sha256"]
    blob = hub.root / "blobs" / sha256
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert "model.safetensors arrived damaged" in error_of(capsys, "pull", NAME, "--to", "second", code=1)
    assert not Path("second").exists()


def pull_to_a_small_disk(disk: Path, size: int) -> None:
    """Runs in a process of its own: first there is too little space."""
    resize_disk(disk, size)
    os.chdir(disk)
    outcomes = [main(["pull", NAME, "--to", "new"]), *os.listdir()]
    resize_disk(disk, "100m")
    print("outcomes", *outcomes, main(["pull", NAME, "--to", "new"]), *os.listdir())


def test_a_full_disk_is_an_error_and_a_pull_resumes_with_more_space(hub, run, tmp_path):
    assert main(["push", str(run), NAME, "--training-state"]) == 0
    (disk := tmp_path / "disk").mkdir()
    size = sum(len(content) for content in hub.files(NAME).values()) // 2
    variables = hub.environment(tmp_path / "home")
    done = Command(pull_to_a_small_disk, disk, size, env=variables, own_mounts=True).result()
    assert done.stdout.endswith("outcomes 1 new.hub 0 new\n"), done
    assert "left" in done.stderr and "are needed: free some space" in done.stderr and "Traceback" not in done.stderr


# --- while it trains ------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    return [run / "checkpoints" / f"step_{step}" for step in (STEPS - 2 * EVERY, STEPS - EVERY, STEPS)]


def steps_pushed(hub: Hub) -> list[int]:
    """Steps of the commits, oldest first."""
    messages = hub.messages(NAME) if hub.repository(NAME).exists else []
    return [int(m.split(":")[0].removeprefix("Step ")) for m in reversed(messages) if m.startswith("Step ")]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(runs, "MIN_PAUSE", 0.05)


def test_an_outage_is_survived_and_the_newest_is_pushed(hub, run, quick):
    messages: list[str] = []
    settings = HubConfig(repo_id=NAME, push=("pretrained_model", "training_state"))
    check_repository(settings, run.with_name("new"), False, messages.append)
    newest = checkpoints(run)[-1]
    expected = files_of(newest / "pretrained_model") | {
        f"training_state/{name}": content for name, content in files_of(newest / "training_state").items()
    }
    hub.kill()
    with CheckpointSync(settings, run, messages.append) as pushing:
        for checkpoint in checkpoints(run):
            pushing.announce(checkpoint)  # returns, although nothing can be pushed
            shutil.rmtree(checkpoint)  # as retention may
        wait_until(lambda: pushing.failures >= 2)
        wait_until(lambda: [p.name for p in (run / "hub").glob("*")] == [f"step_{STEPS}_3"])  # and no more disk is held
        hub.start()
        wait_until(lambda: pushing.pushed == STEPS)
    assert steps_pushed(hub) == [STEPS] and not (run / "hub").exists()
    assert expected.items() <= hub.files(NAME).items()
    failed = [line for line in messages if "pushing failed" in line]
    assert len(failed) == 1 and "cannot be reached" in failed[0] and "it is retried" in failed[0]
    assert f"step {STEPS} is on the Hub: {NAME}, after" in messages[-1]


@pytest.mark.parametrize(
    "fault",
    [
        {"match": "POST .*/commit/", "status": 500, "times": 2},
        {"match": "POST .*/batch", "status": 503, "times": 8},
        {"match": "PUT /storage", "drop_upload_after": 1000, "times": 9},
        {"match": "GET /api/models/tester/run$", "delay": 4, "times": 2},  # longer than the limit on waiting
        {"match": "POST .*/commit/", "status": 412, "times": 1},
    ],
    ids=lambda fault: f"{fault['match'].split('/')[-1] or 'commit'}",
)
def test_faults_of_the_server_pass(hub, run, quick, monkeypatch, fault):
    if "delay" in fault:  # the others may wait for a slow machine
        monkeypatch.setattr(hub_client, "TIMEOUT", 2.0)
    monkeypatch.setattr(runs, "WAIT_LOG_EVERY", 0.1)
    messages: list[str] = []
    with CheckpointSync(HubConfig(repo_id=NAME), run, messages.append) as pushing:
        check_repository(pushing.hub, run.with_name("new"), False, messages.append)
        hub.faults(fault)
        pushing.announce(checkpoints(run)[-1])
    assert steps_pushed(hub) == [STEPS], messages
    assert any("pushing failed" in line for line in messages)
    expected = {p.name: p.read_bytes() for p in (run / "last" / "pretrained_model").iterdir()}
    assert hub.files(NAME) == expected


def test_a_killed_server_leaves_the_checkpoint_before(hub, run, quick):
    """Readers see one checkpoint as a whole, also while and after an upload breaks off."""
    messages: list[str] = []
    settings = HubConfig(repo_id=NAME, push=("pretrained_model", "training_state"))
    with CheckpointSync(settings, run, messages.append) as pushing:
        check_repository(settings, run.with_name("new"), False, messages.append)
        pushing.announce(checkpoints(run)[0])
        wait_until(lambda: pushing.pushed is not None)
        whole = hub.files(NAME)
        hub.faults({"match": "PUT /storage", "bytes_per_second": 100_000})
        pushing.announce(checkpoints(run)[1])
        wait_until(lambda: hub.uploading() > 0)
        pushing.announce(checkpoints(run)[2])
        assert hub.files(NAME) == whole
        hub.kill()
        assert hub.files(NAME) == whole
        hub.start()
    assert steps_pushed(hub)[0] == STEPS - 2 * EVERY and steps_pushed(hub)[-1] == STEPS
    state = {p.name: p.read_bytes() for p in (run / "last" / "training_state").iterdir()}
    there = hub.files(NAME)
    assert {name: there[f"training_state/{name}"] for name in state} == state


def test_every_is_a_distance_of_steps_and_the_last_one_is_pushed(hub, run, quick):
    messages: list[str] = []
    with CheckpointSync(HubConfig(repo_id=NAME, every=2 * EVERY + 1), run, messages.append) as pushing:
        check_repository(pushing.hub, run.with_name("new"), False, messages.append)
        for checkpoint in checkpoints(run):
            pushing.announce(checkpoint)
            wait_until(lambda: pushing.pushed is not None)
    assert steps_pushed(hub) == [STEPS - 2 * EVERY, STEPS]
    # Older than what is there: not pushed, with a warning.
    (run / "last").unlink()
    with CheckpointSync(HubConfig(repo_id=NAME), run, messages.append) as pushing:
        pushing.announce(checkpoints(run)[0])
    assert steps_pushed(hub) == [STEPS - 2 * EVERY, STEPS] and "which is newer" in messages[-1]


def test_the_end_waits_no_longer_than_hub_wait(hub, run, quick):
    messages: list[str] = []
    hub.kill()
    began = time.monotonic()
    with CheckpointSync(HubConfig(repo_id=NAME, wait=3, push=("training_state",)), run, messages.append):
        pass
    assert 2.5 < time.monotonic() - began < 60
    assert f"`mmaudio-hf push {run} {NAME}` with --training-state pushes it later" in messages[-1]
    assert any("waiting for up to" in line for line in messages)


@pytest.mark.parametrize("status", [401, 403])
def test_the_end_does_not_wait_for_a_token_that_may_not_write(hub, run, quick, status):
    messages: list[str] = []
    check_repository(HubConfig(repo_id=NAME), run.with_name("new"), False, messages.append)
    hub.faults({"match": "POST .*/(preupload|commit)/", "status": status, "times": 10_000})
    began = time.monotonic()
    with CheckpointSync(HubConfig(repo_id=NAME, wait=PATIENCE), run, messages.append) as pushing:
        pushing.announce(checkpoints(run)[-1])
        wait_until(lambda: pushing.failures >= 2)  # while training a new token may come
    assert time.monotonic() - began < PATIENCE / 2 and f"`mmaudio-hf push {run} {NAME}` pushes it later" in messages[-1]
    assert any("hf auth login" in line for line in messages) and not any("waiting" in line for line in messages)
    hub.faults()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_the_last_push(hub, run, quick, number):
    """SIGTERM of a launcher, and Ctrl-C."""
    messages: list[str] = []

    def log(message: str) -> None:
        messages.append(message)
        if "waiting for up to" in message:
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()

    hub.kill()
    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with CheckpointSync(HubConfig(repo_id=NAME, wait=PATIENCE), run, log):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < PATIENCE / 2 and "pushes it later" in messages[-1]


def test_in_offline_mode_nothing_is_pushed(hub, run, quick, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_repository(HubConfig(repo_id=NAME), run, False, messages.append)
    assert "HF_HUB_OFFLINE is set: training begins, and nothing is pushed during this run" in messages.pop()
    with CheckpointSync(HubConfig(repo_id=NAME), run, messages.append) as pushing:
        pushing.announce(checkpoints(run)[-1])
        assert not (run / "hub").exists()
    assert messages == [f"warning: step {STEPS} is not on the Hub: `mmaudio-hf push {run} {NAME}` pushes it later"]


def test_a_step_that_is_saved_again_is_pushed_again(hub, run, quick):
    """With the scores that came in between."""
    messages: list[str] = []
    settings = HubConfig(repo_id=NAME, every=EVERY, push=("training_state",))
    check_repository(settings, run.with_name("new"), False, messages.append)
    with CheckpointSync(settings, run, messages.append) as pushing:
        pushing.announce(checkpoints(run)[-1])
        wait_until(lambda: pushing.pushed == STEPS)
        with open(run / "metrics.jsonl", "a") as log:
            log.write(json.dumps({"step": STEPS, "eval/score": 1.0}) + "\n")
        pushing.announce(checkpoints(run)[-1])
    assert steps_pushed(hub) == [STEPS, STEPS] and not [line for line in messages if "warning" in line]
    assert hub.files(NAME)["training_state/metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()


def test_files_that_somebody_removed_are_not_taken_for_pushed(hub, run, quick):
    messages: list[str] = []
    hub.kill()
    with CheckpointSync(HubConfig(repo_id=NAME), run, messages.append) as pushing:
        pushing.announce(checkpoints(run)[-1])
        wait_until(lambda: pushing.failures)
        shutil.rmtree(run / "hub")
        hub.start()
        wait_until(lambda: "somebody removed its files" in messages[-1])
        assert pushing.pushed is None
    assert steps_pushed(hub) == [STEPS] and "model.safetensors" in hub.files(NAME)


def test_a_card_goes_along_and_cannot_hurt(hub, run, quick):
    messages: list[str] = []
    check_repository(HubConfig(repo_id=NAME), run.with_name("new"), False, messages.append)

    def card(run_dir: Path, folder: Path, commit: str) -> None:
        assert run_dir == run
        (folder / "README.md").unlink()
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")

    with CheckpointSync(HubConfig(repo_id=NAME), run, messages.append, card):
        pass
    assert hub.files(NAME)["README.md"].endswith(b"# Mine\n")
    assert b"# Mine" not in (run / "last" / "pretrained_model" / "README.md").read_bytes()

    def broken(*_) -> None:
        raise KeyError("nothing")

    with CheckpointSync(HubConfig(repo_id=f"{USER}/b"), run, messages.append, broken) as pushing:
        check_repository(pushing.hub, run.with_name("new"), False, messages.append)
    assert "README.md" not in hub.files(f"{USER}/b") and "model.safetensors" in hub.files(f"{USER}/b")
    assert any("cannot be written (KeyError" in line for line in messages)


def test_an_edit_of_the_card_during_a_push_is_kept(hub, run, quick):
    """The owner writes into the card after it was read: the push is retried with what is there then."""
    messages: list[str] = []
    assert main(["push", str(run), NAME]) == 0
    edited = hub.files(NAME)["README.md"] + b"\n## Notes\n\nTrained in the dark.\n"

    def card(run_dir: Path, folder: Path, commit: str) -> None:
        add_card(folder, run_dir, NAME, commit)
        if hub.files(NAME)["README.md"] != edited:
            hub.repository(NAME).add({"README.md": edited})

    settings = HubConfig(repo_id=NAME, push=("pretrained_model", "training_state"))
    with CheckpointSync(settings, run, messages.append, card) as pushing:
        pushing.announce(checkpoints(run)[-1])
    assert any("another commit came first" in line for line in messages), messages
    assert pushing.pushed == STEPS and b"Trained in the dark." in hub.files(NAME)["README.md"]


def test_what_is_looked_at_before_training(hub, run, tmp_path, monkeypatch):
    warnings: list[str] = []
    look = lambda repo, folder, resumes=False: check_repository(  # noqa: E731
        HubConfig(repo_id=repo), folder, resumes, warnings.append
    )
    with pytest.raises(ValueError, match="does not allow it"):
        look("somebody/else", run)
    look(NAME, run)
    assert hub.repository(NAME).private
    assert main(["push", str(run), NAME]) == 0
    with pytest.raises(ValueError, match=rf"holds step {STEPS}, .* begin at step 0: .*finetune\.init_from={NAME}"):
        look(NAME, tmp_path / "new")
    assert main(["push", str(run), NAME, "--training-state"]) == 0
    with pytest.raises(ValueError, match=rf"holds step {STEPS}, .* begin at step 0: .*resume=hub://{NAME}"):
        look(NAME, tmp_path / "new")
    look(NAME, tmp_path / "new", resumes=True)
    assert warnings == []
    older = tmp_path / "older" / "checkpoints" / "step_4"
    older.mkdir(parents=True)
    look(NAME, tmp_path / "older")
    assert "nothing is pushed until it is ahead" in warnings.pop()
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(ValueError, match="a write token"):
        look(NAME, run)
    monkeypatch.setenv("HF_TOKEN", "hf_nobodyknowsthisone")
    with pytest.raises(ValueError, match="does not know this token"):
        look(NAME, run)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="without a token"):
        look(NAME, run)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.kill()
    look(NAME, run)
    assert "cannot be reached" in warnings.pop() and warnings == []


# --- the whole ------------------------------------------------------------------------------------------------------


def test_a_run_that_lost_its_hub_and_its_machine_ends_as_an_undisturbed_one(undisturbed, tmp_path):
    """The server dies in the middle of an upload and comes back, the machine is lost, and another one with nothing but

    the recipe and the stores resumes from the Hub.
    """
    settings = [f"hub.repo_id={NAME}", "hub.push=[pretrained_model, training_state]", f"resume=hub://{NAME}"]
    recipes = [tmp_path / name / "run.yaml" for name in ("first", "second")]
    for recipe in recipes:
        recipe.parent.mkdir()
        tree = yaml.safe_load(undisturbed.read_text()) | {"name": "run", "output_dir": "output"}
        recipe.write_text(yaml.safe_dump(tree))
    with Hub(tmp_path / "hub") as hub:
        variables = hub.environment(tmp_path / "home")
        gates = {EVERY + 1: tmp_path / "go", 2 * EVERY + 1: tmp_path / "never"}
        words = gated_program(gates, recipes[0], *settings)
        with together(2, *words, cwd=recipes[0].parent, env=variables) as group:  # its end: the machine is lost
            process = group[0]
            wait_until(lambda: steps_pushed(hub) == [EVERY], process)
            hub.faults({"match": "PUT /storage", "bytes_per_second": 50_000})
            gates[EVERY + 1].touch()
            wait_until(lambda: hub.uploading() > 0, process)
            hub.kill()
            hub.start()
            wait_until(lambda: steps_pushed(hub) == [EVERY, 2 * EVERY], process)
            output = "".join(process.output())
        assert f"{NAME} holds no training state yet: output/run begins at step 0" in output
        step = 2 * EVERY
        done = run_together(2, "train", str(recipes[1]), *settings, cwd=recipes[1].parent, env=variables)
        assert done.returncode == 0, done.stderr
        assert f"resumes from step {step} of {NAME}" in done.stderr and f"from step {step} to" in done.stdout
        check_same_end(undisturbed, recipes[1], hub)
        # Nowhere is the token: not in what was printed, logged, kept, or pushed.
        kept = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "tokens.json"]
        assert len(kept) > 50 and not [p for p in kept if TOKEN.encode() in p.read_bytes()]
        assert TOKEN not in output + done.stdout + done.stderr


def check_same_end(undisturbed: Path, resumed: Path, hub: Hub) -> None:
    """The run folders of both recipes have the same bytes, and so has the repository."""
    shutil.copytree(run_dir(resumed), run_dir(undisturbed).with_name("second"), symlinks=True)
    same_bytes(undisturbed, undisturbed.with_name("second.yaml"))
    for theirs in (run_dir(undisturbed) / "ema").iterdir():  # the order of their metadata is left to chance
        ours, expected = load_file(run_dir(resumed) / "ema" / theirs.name), load_file(theirs)
        assert ours.keys() == expected.keys() and all(ours[name].equal(expected[name]) for name in expected)
    assert steps_pushed(hub)[-1] == STEPS and steps_pushed(hub) == sorted(steps_pushed(hub))
    remote = hub.files(NAME)
    for name in ("model", "optimizer", "ema", "window"):
        file = f"training_state/{name}.safetensors"
        assert remote[file] == (run_dir(undisturbed) / "last" / file).read_bytes()
    assert remote["training_state/metrics.jsonl"] == (run_dir(undisturbed) / "metrics.jsonl").read_bytes()


def test_a_signal_leaves_all_processes_waiting_for_the_last_push(hub, undisturbed, tmp_path):
    """A launcher would kill the first one, which pushes, as soon as another has ended."""
    recipe = write_recipe(undisturbed.parent, "stopped")
    words = ["train", str(recipe), "training.steps=100000", f"training.checkpoint_every={EVERY}", f"hub.repo_id={NAME}"]
    hub.faults({"match": "POST .*/commit/", "delay": PATIENCE})
    env = environment() | hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
    with together(2, *words, cwd=recipe.parent, env=env) as group:
        wait_until(lambda: (run_dir(recipe) / "last").exists(), group[0])
        group[1].send_signal(signal.SIGTERM)
        wait_until(lambda: "is being pushed to" in group[0].output()[1], group[0])
        assert [process.poll() for process in group] == [None, None], [process.output() for process in group]
        hub.faults()
        assert [process.wait() for process in group] == [143, 143]
    assert steps_pushed(hub)[-1] == local_step(run_dir(recipe)) and not (run_dir(recipe) / "hub").exists()


def test_what_wins_when_both_have_something(hub, undisturbed, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fetch(name: str, repo: str = NAME, **settings) -> str:
        recipe = load_recipe(undisturbed, [f"name={name}", "output_dir=output", f"resume=hub://{repo}"])
        fetch_run(replace(recipe, hub=HubConfig(**settings)))
        return capsys.readouterr().err

    with pytest.raises(ValueError, match="is not there, or private"):
        fetch("new")
    assert "begins at step 0" in fetch("new", repo_id=NAME, push=("training_state",))
    assert main(["push", str(run), NAME]) == 0
    with pytest.raises(ValueError, match=r"has no training state, only a network: name it in finetune\.init_from"):
        fetch("new")
    assert main(["push", str(run), NAME, "--training-state"]) == 0
    assert f"output/run has step {STEPS}, hub://{NAME} step {STEPS}: it resumes from its own step {STEPS}" in fetch(
        "run"
    )
    (run / "last").unlink()
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS}")
    kept = files_of(run / "checkpoints")
    assert f"output/run resumes from step {STEPS} of {NAME}@" in fetch("run")
    assert kept.items() <= files_of(run / "checkpoints").items() and (run / "last").resolve().name == f"step_{STEPS}"
    assert f"output/new resumes from step {STEPS}" in fetch("new", f"{NAME}@main")
    with pytest.raises(ValueError, match="no such revision"):
        fetch("other", f"{NAME}@v3")
    # A launch holds the folder already; one that was killed had fetched some files of the run.
    for name, names in (("held", ["lock"]), ("cut_short", ["config.yaml", "metrics.jsonl"])):
        Path("output", name).mkdir()
        for file in names:
            shutil.copy(run / file, Path("output", name))
        assert f"output/{name} resumes from step {STEPS}" in fetch(name)
    hub.kill()
    assert f"Connection refused): output/run resumes from its own step {STEPS}" in fetch("run")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        fetch("other")


def test_a_pull_that_is_killed_anywhere_can_be_repeated(hub, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(run), NAME, "--training-state"]) == 0

    def killed(source: Path, target: Path) -> None:
        """The first one gets its place."""
        if Path("new/ema").is_dir():
            raise KeyboardInterrupt
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)

    with monkeypatch.context() as patch:
        patch.setattr("mmaudio_hf.hub.runs._move", killed)
        assert main(["pull", NAME, "--to", "new"]) == 130
    assert main(["pull", NAME, "--to", "new"]) == 0 and local_step(Path("new")) == STEPS


def test_a_network_alone_is_not_gone_on_from_at_step_0(hub, undisturbed, run, capsys):
    assert main(["push", str(run), NAME]) == 0
    words = ["name=alone", f"resume=hub://{NAME}", f"hub.repo_id={NAME}"]
    state = "hub.push=[pretrained_model, training_state]"
    error = error_of(capsys, "train", undisturbed, *words, state)
    assert f"holds step {STEPS}" in error and f"finetune.init_from={NAME} starts from its weights" in error
    assert steps_pushed(hub) == [STEPS]


def test_another_run_in_the_folder_is_not_mixed_with_the_pulled_one(hub, run, tmp_path, capsys):
    assert main(["push", str(run), NAME, "--training-state"]) == 0
    for step in (STEPS, STEPS - EVERY):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")
    log = run / "metrics.jsonl"
    same = log.read_text()
    log.write_text(same.replace('"train/loss": ', '"train/loss": 1', 1))
    before = files_of(run)
    assert "holds another run" in error_of(capsys, "pull", NAME, "--to", run)
    assert files_of(run) == before
    log.write_text(same)
    assert main(["pull", NAME, "--to", str(run)]) == 0
    assert json.loads((run / "last" / "training_state" / "state.json").read_text())["step"] == STEPS
    assert local_step(run) == STEPS
