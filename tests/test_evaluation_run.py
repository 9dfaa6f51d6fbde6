"""Whole evaluations of small runs: in the training loop, alone, killed on the way."""

import base64
import hashlib
import json
import math
import re
import shutil
import signal
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import yaml
from forked import Command, wait_until
from hub_server import USER, Hub
from test_report import Page
from toy_stores import recipe_tree, write_codec
from training_runs import environment, metrics, run_dir, start

from mmaudio_hf.cli import main
from mmaudio_hf.config import StoreConfig, load_recipe
from mmaudio_hf.evaluation.onsets import NO_ONSETS, clip_scores, mean_scores
from mmaudio_hf.evaluation.results import best_of, find_scores, read_clips, read_scores
from mmaudio_hf.evaluation.run import NOT_FINITE, SplitEvaluator, network_hash
from mmaudio_hf.evaluation.samples import HeldOutItems
from mmaudio_hf.generation.pipeline import MMAudioPipeline
from mmaudio_hf.media.audio import read_waveform, write_audio
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.pages.report import write_comparison, write_report
from mmaudio_hf.training.logs import RunLog


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Stores, and a codec fitted to noise."""
    folder = tmp_path_factory.mktemp("evaluation")
    recipe_tree(folder)
    write_codec(folder)
    return folder


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """A run that was evaluated on its way and after it."""
    tree = recipe_tree(folder, steps=4, validate_every=4, checkpoint_every=2, log_every=2)
    tree |= {"name": "finished", "sampling": {"num_steps": 1, "batch_size": 2}}
    tree |= {"evaluation": {"every": 2, "after_training": True, "items": 6}}
    tree["data"]["test"] = [{"path": str(folder / "videos")}]
    recipe = folder / "finished.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    assert main(["train", str(recipe)]) == 0
    return recipe


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run without its results."""
    shutil.copytree(run_dir(finished), tmp_path / "copy", symlinks=True)
    shutil.rmtree(tmp_path / "copy" / "evaluation")
    return tmp_path / "copy"


def evaluate(*words) -> int:
    return main(["evaluate", *map(str, words)])


def test_scores_on_the_way_and_after_it(finished, tmp_path):
    folder = run_dir(finished) / "evaluation"
    assert [(c["split"], c["step"]) for c in find_scores(run_dir(finished))] == [
        ("test", 4), ("validation", 2), ("validation", 4),
    ]  # fmt: skip
    names = {f"{split}_step_{step}.{end}" for split, step in (("validation", 2), ("validation", 4), ("test", 4))
             for end in ("json", "clips.jsonl")}  # fmt: skip
    assert {path.name for path in folder.iterdir() if path.is_file()} == names
    kept = {name.replace("clips.jsonl", "audio") for name in names if name.endswith("l")}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == kept  # the other audio is gone
    content = read_scores(folder / "test_step_4.json")
    assert content["weights"] == {"weights": "ema", "sigma_rel": 0.05, "step": 4} and content["run"] == "finished"
    assert content["items"] == {"listed": 6, "scored": 6, "dropped": []}
    for step in (2, 4):
        (line,) = [e for e in metrics(finished) if e["step"] == step and "eval_validation/onset_f1" in e]
        scores = read_scores(folder / f"validation_step_{step}.json")["scores"]
        assert {f"eval_validation/{n}": s["value"] for n, s in scores.items()} == {
            k: line[k] for k in line if k != "step"
        }
    assert any("eval_test/log_mel_distance" in line for line in metrics(finished))

    # The scores are those of what the published weights make of the features, as heard from a file.
    recipe = load_recipe(finished)
    item = HeldOutItems(recipe.data.test, 6, spread=True)[3]
    pipeline = MMAudioPipeline.from_pretrained(run_dir(finished), device="cpu")
    (result,) = pipeline.generate([item.request], num_steps=1, seed=recipe.seed)
    write_audio(tmp_path / "made.wav", result.waveform, result.sample_rate)
    heard, rate = read_waveform(tmp_path / "made.wav")
    lines = [json.loads(line) for line in (folder / "test_step_4.clips.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line.pop("id") == item.item_id]
    assert line == pytest.approx(clip_scores(heard, pipeline.decode(item.latent), rate), rel=1e-2, abs=1e-2)
    mean = content["scores"]["log_mel_distance"]
    assert (mean["unit"], mean["better"], mean["used"]) == ("dB", "lower", 6)
    assert mean["value"] == pytest.approx(np.mean([line["log_mel_distance"] for line in lines]))


def test_report_and_page_show_them(finished, run, capsys):
    page = Page(write_report(run_dir(finished), []).read_text())
    assert len(page.all("table")) == 2 and "finished, test, step 4" in page.text  # scores, and what would be best
    content = find_scores(run_dir(finished), "test")[0]
    assert f"{content['scores']['onset_f1']['value']:.4g}" in page.text
    checkpoint = run_dir(finished) / "checkpoints" / "step_2"
    assert evaluate(run_dir(finished), checkpoint, "--page", run / "both.html") == 0
    text = capsys.readouterr().out
    assert "finished, test, step 4" in text and "finished, test, step 2" in text and "log_mel_distance [dB]" in text
    page = Page((run / "both.html").read_text())
    assert len(page.all("th")) == 3 + 8 and "EMA (sigma_rel 0.05)" in page.text
    files = [run_dir(finished) / "evaluation" / f"test_step_{step}.clips.jsonl" for step in (4, 2)]
    clips = [read_clips({"clips": file}) for file in files]
    cells = [cell.get("class") for cell in page.all("td")]
    for row, name, sign in ((0, "log_mel_distance", 1), (-2, "onset_f1", -1)):
        columns = [{i: clip[name] for i, clip in each.items() if name in clip} for each in clips]
        best = best_of(columns, lambda means, sign=sign: sign * means)
        assert cells[row : row + 2 or None] == ["best" if column == best else None for column in (0, 1)]
    assert "95 %: " in page.text and "nothing is called best" not in page.text
    # Of other items the common ones are compared; without any, the table says so and marks nothing.
    assert evaluate(run, "evaluation.items=2", "--out", run / "few") == 0
    files = [next((run / "few").glob("test_step_4*.clips.jsonl")), files[0]]
    contents = [read_scores(str(f).replace(".clips.jsonl", ".json")) | {"clips": str(f)} for f in files]
    assert contents[0]["ids"]["count"] == 2 and contents[0]["stores"] == ["videos"]
    page = Page(write_comparison(contents, run / "other.html").read_text())
    assert "over the 2 items that all have, of 2 and 6" in page.text and "nothing is called best" not in page.text
    both = contents[0]["scores"]["log_mel_distance"]["value"]
    assert page.text.count(f"{both:.4g}") == 2  # the same weights, so the same score of the same items
    contents[1]["truth"] = "elsewhere"
    page = Page(write_comparison(contents, run / "other.html").read_text())
    assert "nothing is called best" in page.text and not any(cell.get("class") for cell in page.all("td"))


def test_the_page_plays_the_same_items_beside_the_scores(finished, run, tmp_path):
    """By links that hold when run and page are moved together; categories have rows of their own."""
    (tmp_path / "list.csv").write_text("key,ucs_category\nvideos_0000,DOORS\nvideos_0004,BELLS\nvideos_0008,BELLS\n")
    words = [run, run / "checkpoints" / "step_2", f"evaluation.categories={tmp_path / 'list.csv'}"]
    assert evaluate(*words, "--page", run / "pages" / "both page.html") == 0
    moved = (run.rename(tmp_path / "moved run")) / "pages"
    text = (moved / "both page.html").read_text()
    page = Page(text)
    links = [player["src"] for player in page.all("audio")]
    assert len(links) == 6 * 3 and len(page.all("article")) == 6 and len(page.all("button")) == 6
    assert not any(link.startswith(("/", "file:", "data:", "http")) for link in links)
    waveforms = [read_waveform((moved / unquote(link)).resolve())[0] for link in links]
    assert all(len(waveform) > 15000 for waveform in waveforms)
    truth, last, earlier = waveforms[:3]
    assert not torch.equal(last, earlier) and not torch.equal(truth, last)
    script = hashlib.sha256(page.raw["script"][0].encode()).digest()
    policy = next(tag["content"] for tag in page.all("meta") if "http-equiv" in tag)
    assert base64.b64encode(script).decode() in policy and "media-src 'self' file:" in policy
    assert "log_mel_distance, BELLS" in page.text and "log_mel_distance, aligned" in page.text
    assert page.text.count("2 used; 95 %: ") >= 2  # of two evaluations


def test_a_network_of_the_hub_generates_and_is_scored(finished, run, tmp_path, capsys, monkeypatch):
    name, file = f"{USER}/network", tmp_path / "audio.wav"
    with Hub(tmp_path / "hub") as hub:
        hub.use_here(monkeypatch, tmp_path / "home")
        assert main(["push", str(run), name]) == 0
        assert main(["generate", "--run", name, "--prompt", "a ball", "--steps", "1", "--out", str(file)]) == 0
        assert evaluate(name, "--recipe", finished, "--out", tmp_path / "scores", "evaluation.items=2") == 0
    text = capsys.readouterr().out
    waveform, rate = read_waveform(file)
    assert rate == 16000 and waveform.abs().max() > 0 and "tester--network, test, step 4" in text
    (scores,) = (tmp_path / "scores").glob("test_step_4_*.json")  # of other items than the recipe's
    content = read_scores(scores)
    assert content["run"] == "tester--network" and content["items"]["scored"] == 2
    # The toy codec came from the Hub with the weights: the local run alone generates the same audio.
    assert main(["generate", "--run", str(run), "--prompt", "a ball", "--steps", "1", "--out", f"{file}.wav"]) == 0
    assert torch.equal(read_waveform(f"{file}.wav")[0], waveform)


def test_an_evaluation_that_was_killed_resumes(finished, run, capsys):
    """What was generated before a kill is scored afterwards, as it was; other settings generate everything again."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("items: 6", "items: 0"))
    clips = run / "evaluation" / "test_step_4" / "clips"
    frozen = ("mmaudio_hf.evaluation.run.write_audio", 5)
    with Command("evaluate", str(run), "sampling.batch_size=1", cwd=run, freeze=frozen) as process:
        wait_until(lambda: len(list(clips.glob("*.wav"))) >= 4, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in clips.glob("*.wav")}
    assert len(before) == 4 and not (run / "evaluation" / "test_step_4.json").exists()

    silent = sorted(before)[0]  # marked, to see that it is used as it is
    write_audio(silent, torch.zeros(16000), 16000)
    config.write_text(config.read_text().replace("items: 0", "items: 6"))
    assert evaluate(run, "evaluation.keep_clips=true") == 0
    ours, theirs = (read_scores(r / "evaluation" / "test_step_4.json") for r in (run, run_dir(finished)))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != silent)
    lines = (run / "evaluation" / "test_step_4.clips.jsonl").read_text().splitlines()
    loudness = {line["id"]: line["loudness_difference"] for line in map(json.loads, lines)}
    assert len(loudness) == 6 and loudness[silent.stem] < -50
    assert ours["scores"]["loudness_difference"]["value"] < theirs["scores"]["loudness_difference"]["value"] - 5

    config.write_text(re.sub(r"^seed: \d+", "seed: 8", config.read_text(), flags=re.M))
    assert evaluate(run, "evaluation.keep_clips=true") == 0
    assert len(list(clips.glob("*.wav"))) == 6 and silent.stat().st_size > 0
    again = read_scores(run / "evaluation" / "test_step_4.json")
    assert again["settings"]["seed"] == 8 and again["key"] != ours["key"]
    assert again["scores"]["loudness_difference"]["value"] > -5
    written = clips.stat().st_mtime_ns
    assert evaluate(run, "evaluation.keep_clips=true") == 0  # nothing is generated twice
    assert clips.stat().st_mtime_ns == written
    capsys.readouterr()


def test_another_codec_generates_everything_again(finished, tmp_path):
    network = MMAudio.from_pretrained(run_dir(finished) / "last" / "pretrained_model")
    clips, contents, heard = tmp_path / "scores" / "test_step_4" / "clips", [], []
    for seed in (0, 9):
        write_codec(tmp_path, seed)
        changes = ["evaluation.items=1", "evaluation.keep_clips=true", f"encoders.weights_dir={tmp_path}"]
        evaluator = SplitEvaluator(load_recipe(finished, changes), "test", folder=tmp_path / "scores")
        contents.append(evaluator.evaluate(network, 4, {"weights": "raw"}))
        (file,) = clips.iterdir()
        heard.append(read_waveform(file)[0])
    assert contents[0]["key"] != contents[1]["key"] and contents[0]["scores"] != contents[1]["scores"]
    assert not torch.equal(*heard)


def test_other_settings_weights_and_runs_keep_their_own_files(finished, run, tmp_path, capsys):
    few = ["sampling.num_steps=2", "evaluation.items=1"]
    shutil.copytree(run_dir(finished) / "evaluation", run / "evaluation")
    trained = (run / "evaluation" / "test_step_4.json").read_bytes()
    assert evaluate(run, *few) == 0
    ema = shutil.copytree(run / "last" / "pretrained_model", run / "ema_0.1" / "pretrained_model").parent
    weights = ema / "pretrained_model" / "weights.json"
    weights.write_text(json.dumps({"weights": "ema", "sigma_rel": 0.1, "step": 4}))
    assert evaluate(ema) == 0
    assert (run / "evaluation" / "test_step_4.json").read_bytes() == trained
    others = [read_scores(path) for path in (run / "evaluation").glob("test_step_4_*.json")]
    assert sorted((c["settings"]["num_steps"], c["weights"]["sigma_rel"]) for c in others) == [(1, 0.1), (2, 0.05)]
    assert [c["weights"]["sigma_rel"] for c in find_scores(run, "test") if c["step"] == 4] == [0.05]  # the run's own

    other = shutil.copytree(run, tmp_path / "other" / "copy", symlinks=True)
    capsys.readouterr()
    assert evaluate(run, other, "--out", tmp_path / "both", *few) == 0
    text = capsys.readouterr().out
    assert "copy, test, step 4" in text and "copy-2, test, step 4" in text
    assert [len(list((tmp_path / "both" / name).glob("*_step_4_*.json"))) for name in ("copy", "copy-2")] == [1, 1]


WAITS = """
import sys
from torch.distributed import destroy_process_group, distributed_c10d
from accelerate.state import AcceleratorState, PartialState
from mmaudio_hf.cli import main
from mmaudio_hf.cli.hub import hub_session
from mmaudio_hf.config import load_recipe
from mmaudio_hf.training.resume import RunLock
from mmaudio_hf.training.distributed import make_accelerator
run, recipe = sys.argv[1:]
def hub():
    wanted = load_recipe(recipe, ["name=waits", "resume=hub://no/such"])
    try:
        with RunLock(wanted.run_dir, print) as lock, hub_session(wanted, lock):
            pass
    except (ConnectionError, OSError, ValueError):
        pass
train, evaluate = lambda: make_accelerator(load_recipe(recipe)), lambda: main(["evaluate", run, "model.hidden_dim=128"])
for join in (train, evaluate, hub):
    join()
    print(distributed_c10d._get_default_group()._get_backend(PartialState().device).options._timeout)
    destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
"""


def test_processes_wait_for_what_the_first_one_does_alone(finished, run, tmp_path):
    """Nobody gives up after the ten minutes of NCCL while features are fetched or scores computed."""
    launched = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    program = tmp_path / "waits.py"
    program.write_text(WAITS)
    result = Command(str(program), str(run), str(finished), env=environment() | launched).result()
    assert result.stdout.split() == ["6:00:00"] * 3, result.stderr


def unfinished(checkpoint: Path) -> list[str]:
    return json.loads((checkpoint / "training_state" / "state.json").read_text())["facts"]["to_evaluate"]


def test_training_killed_in_an_evaluation_resumes_it(finished):
    recipe = finished.with_name("killed.yaml")
    recipe.write_text(finished.read_text().replace("name: finished", "name: killed"))
    clips = run_dir(recipe) / "evaluation" / "validation_step_2" / "clips"
    checkpoint = run_dir(recipe) / "checkpoints" / "step_2"
    with start(recipe, "evaluation.keep_clips=true", freeze=("mmaudio_hf.evaluation.run.write_audio", 3)) as process:
        wait_until(lambda: checkpoint.exists() and list(clips.glob("*.wav")), process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in clips.glob("*.wav")}
    assert before and "eval_validation" not in (run_dir(recipe) / "metrics.jsonl").read_text()
    assert json.loads((checkpoint / "training_state" / "state.json").read_text())["facts"]["to_evaluate"] == [
        "eval_validation"
    ]
    assert main(["train", str(recipe), "evaluation.keep_clips=true"]) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for ours, theirs in zip(metrics(recipe), metrics(finished), strict=True):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-2, abs=1e-2)
    last = run_dir(recipe) / "last"
    assert last.resolve().name == "step_4"
    assert unfinished(last) == []


class Killed(BaseException):
    """The end of a process: nothing that looks after errors takes it for one."""


def test_what_was_scored_before_a_kill_counts_afterwards(finished, monkeypatch):
    """Killed between the scores of two evaluators, and between those of the last one and the last checkpoint."""
    recipes = [finished.with_name(f"{name}.yaml") for name in ("whole", "cut")]
    for recipe in recipes:
        recipe.write_text(finished.read_text().replace("name: finished", f"name: {recipe.stem}"))
    settings = ["samples.every=2", "samples.items=1", "evaluation.items=2"]
    settings += ["training.best_metric=eval/log_mel_distance", "training.best_mode=min"]
    assert main(["train", str(recipes[0]), *settings]) == 0

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SplitEvaluator, "run", die)
        main(["train", str(recipes[1]), *settings])
    cut = run_dir(recipes[1])
    assert unfinished(cut / "last") == ["eval", "eval_validation"]
    audio = RunLog.audio
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunLog, "audio", lambda *a: die() if a[1] == "eval_test" and a[3] == 4 else audio(*a))
        main(["train", str(recipes[1]), *settings])
    assert unfinished(cut / "last")
    assert main(["train", str(recipes[1]), *settings]) == 0
    whole = run_dir(recipes[0])
    assert [(r / "best").resolve().name for r in (cut, whole)] == ["step_2"] * 2
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (cut / "last").resolve().name == "step_4" and unfinished(cut / "last") == []


def test_what_cannot_be_scored_is_dropped_with_a_reason(finished, tmp_path):
    recipe = load_recipe(finished, ["evaluation.keep_clips=true"])
    evaluator = SplitEvaluator(recipe, "validation", folder=tmp_path)
    network = MMAudio.from_pretrained(run_dir(finished) / "last" / "pretrained_model")
    weights = {"weights": "raw", "sigma_rel": None, "step": 9}
    first = evaluator.items.ids[0]
    whole = evaluator.evaluate(network, 9, weights)
    clip = tmp_path / "validation_step_9" / "clips" / f"{first}.wav"
    clip.write_bytes(b"no audio")
    (tmp_path / "validation_step_9.json").unlink()
    content = evaluator.evaluate(network, 9, weights)
    (entry,) = content["items"]["dropped"]
    assert entry == {"reason": "a clip that cannot be read", "count": 1, "ids": [first]} and not clip.exists()
    assert content["scores"]["log_mel_distance"]["used"] == len(evaluator.items) - 1
    again = evaluator.evaluate(network, 9, weights)[
        "scores"
    ]  # these are not returned again: the clip is generated again
    for name, score in whole["scores"].items():  # made in another batch
        assert again[name]["value"] == pytest.approx(score["value"], rel=1e-2, abs=1e-2), name

    with torch.no_grad():
        network.final_layer.conv.bias.fill_(math.nan)
    content = evaluator.evaluate(network, 9, weights)
    assert content["items"]["scored"] == 0 and content["items"]["dropped"][0]["reason"] == NOT_FINITE
    assert all(score["value"] is None for score in content["scores"].values())
    assert evaluator.run(network, 9, weights).scores == {}


def test_a_full_disk_costs_the_evaluation_and_not_the_run(finished, tmp_path, capsys):
    """A file where the folder of the results belongs: what a full disk or a wrong mode does."""
    (tmp_path / "taken").write_text("")
    evaluator = SplitEvaluator(load_recipe(finished), "validation", folder=tmp_path / "taken")
    network = MMAudio.from_pretrained(run_dir(finished) / "last" / "pretrained_model")
    assert evaluator.run(network, 3, {"weights": "raw"}).scores == {}
    assert "warning: the evaluation of step 3 was given up" in capsys.readouterr().err


def test_silence_has_no_onset_to_score():
    noise = np.random.default_rng(0).standard_normal(16000) * 0.1
    noise[:8000] *= 0.001  # a burst
    clips = {"both": clip_scores(np.zeros(16000), np.zeros(16000), 16000), "one": clip_scores(noise, noise, 16000)}
    assert "onset_f1" not in clips["both"] and "onset_f1" in clip_scores(np.zeros(16000), noise, 16000)
    score = mean_scores(clips, {})["onset_f1"]
    assert score.used == 1 and score.dropped == {NO_ONSETS: ["both"]}
    assert mean_scores({}, {"why": ["a"]})["log_mel_distance"].to_json()["value"] is None


def test_rows_of_one_id_count_once(folder):
    items = HeldOutItems([StoreConfig(str(folder / "held_out"))] * 2)
    assert len(items) == 5 and items.repeated == items.ids
    assert items.of(items.ids[2]).latent.equal(items[2].latent)


def test_mistakes_are_errors_before_anything_runs(run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["nowhere/run"], "part of no run folder: correct it, or give the --recipe"),
        ([run, "data.test=[]", "evaluation.after_training=false"], "data.test names no store"),
        ([run, "evaluation.itms=3"], "did you mean 'items'"),
        (["evaluation.items=3"], "name at least one run folder"),
        ([run, "encoders.weights_dir=nowhere", "data.test=[{path: nowhere}]"], "nowhere"),
        ([run, "model.hidden_dim=128"], "has other sizes than the recipe"),
    ):
        assert evaluate(*words) == 2, words
        assert message in capsys.readouterr().err, words
    assert not (run / "evaluation").exists()


def test_the_hash_tells_networks_apart(finished):
    network = MMAudio.from_pretrained(run_dir(finished) / "last" / "pretrained_model")
    before = network_hash(network)
    assert before == network_hash(MMAudio.from_pretrained(run_dir(finished) / "last" / "pretrained_model"))
    with torch.no_grad():
        network.final_layer.conv.bias[0] += 1e-6
    assert network_hash(network) != before
