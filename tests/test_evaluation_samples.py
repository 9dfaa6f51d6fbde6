"""Samples during training: whole runs of `train.py` on small stores, on one and two processes, killed on the way."""

import base64
import json
import math
import re
import signal
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from forked import Command, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import Page
from toy_stores import recipe_tree, write_codec, write_store
from training_runs import environment, metrics, run_dir, start, train

from mmaudio_hf.cli import main
from mmaudio_hf.config import config_of_duration, load_recipe
from mmaudio_hf.evaluation import samples as samples_module
from mmaudio_hf.evaluation.onsets import clip_scores
from mmaudio_hf.evaluation.run import SplitEvaluator
from mmaudio_hf.evaluation.samples import SampleEvaluator, read_items
from mmaudio_hf.features.encoders import load_encoders
from mmaudio_hf.generation.pipeline import MMAudioPipeline
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.pages.report import write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Stores, and a codec fitted to noise."""
    folder = tmp_path_factory.mktemp("samples")
    recipe_tree(folder)
    write_codec(folder)
    return folder


def write_recipe(folder: Path, name: str, **training) -> Path:
    tree = recipe_tree(folder, steps=4, validate_every=4, checkpoint_every=2, log_every=2, **training)
    tree |= {"name": name, "samples": {"every": 2, "items": 3}, "sampling": {"num_steps": 2}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    recipe = write_recipe(folder, "finished", trackers=["tensorboard"])
    assert main(["train", str(recipe)]) == 0
    return recipe


def samples(recipe: Path) -> dict[str, bytes]:
    """Every file below samples/, by its path there."""
    root = run_dir(recipe) / "samples"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def waveform(content: bytes, folder: Path) -> np.ndarray:
    (folder / "audio.wav").write_bytes(content)
    with av.open(str(folder / "audio.wav")) as container:
        return np.concatenate([f.to_ndarray().reshape(-1) for f in container.decode(audio=0)]) / 32768


def test_samples_scores_and_trackers(finished, tmp_path):
    recipe, files = load_recipe(finished), samples(finished)
    items = read_items(recipe.data.validation, 3, spread=True)
    ids = [item.item_id for item in items]
    assert ids == ["held_out_0000", "held_out_0001", "held_out_0003"]
    names = {f"{name}/{i}.wav" for name in ("reference", "step_2", "step_4") for i in ids}
    assert set(files) == names | {"step_2/samples.json", "step_4/samples.json"}

    # What is heard at the last step is what the published weights make of the features, from the same noise.
    pipeline = MMAudioPipeline.from_pretrained(run_dir(finished), device="cpu")
    results = pipeline.generate([item.request for item in items], num_steps=2, seed=recipe.seed)
    expected = [result.waveform.numpy() for result in results][1]
    assert waveform(files[f"step_4/{ids[1]}.wav"], tmp_path) == pytest.approx(expected.clip(-1, 1), abs=1e-3)
    reference = pipeline.decode(items[1].latent)
    assert waveform(files[f"reference/{ids[1]}.wav"], tmp_path) == pytest.approx(reference.clamp(-1, 1), abs=1e-3)
    rows = json.loads(files["step_4/samples.json"])
    assert [(row["id"], row["caption"]) for row in rows] == [(i.item_id, i.caption) for i in items]
    assert rows[1]["scores"] == pytest.approx(clip_scores(expected, reference, 16000), rel=1e-3, abs=1e-3)
    logged = {line["step"]: line for line in metrics(finished) if "eval/log_mel_distance" in line}
    assert sorted(logged) == [2, 4]
    every = {name for row in rows for name in row["scores"]}  # without onsets on both sides there is no onset score
    means = {name: np.mean([row["scores"][name] for row in rows if name in row["scores"]]) for name in every}
    assert {name: logged[4][f"eval/{name}"] for name in means} == pytest.approx(means)

    events = EventAccumulator(str(run_dir(finished) / "trackers" / "finished"), size_guidance={"audio": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "val_ema/loss", "eval/log_mel_distance", "speed/model_flop_utilisation"} <= set(
        tags["scalars"]
    )
    for line in metrics(finished):
        for name in line.keys() - {"step"}:
            logged_values = {event.step: event.value for event in events.Scalars(name)}
            assert logged_values[line["step"]] == pytest.approx(line[name], rel=1e-5), name
    assert set(tags["audio"]) == {f"eval/{i}" for i in ids}
    heard = events.Audio(f"eval/{ids[1]}")
    assert [event.step for event in heard] == [2, 4] and heard[0].sample_rate == 16000
    assert waveform(heard[1].encoded_audio_string, tmp_path) == pytest.approx(expected.clip(-1, 1), abs=1e-3)


def test_items_of_each_duration_are_generated_in_one_piece(folder, tmp_path):
    """As by a network that is set to that duration; and scores that know one duration alone are refused."""
    write_store(tmp_path / "long", 2, duration=2.0, seed=8)
    held_out = [{"path": str(folder / "held_out")}, {"path": str(tmp_path / "long")}]
    tree = recipe_tree(folder) | {"name": "each", "output_dir": str(tmp_path / "output")}
    tree["data"] |= {"validation": held_out}
    tree |= {"samples": {"every": 2, "items": 1}, "sampling": {"num_steps": 2}}
    (tmp_path / "each.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "each.yaml")
    torch.manual_seed(0)
    model = MMAudio(recipe.model).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.set_latent_statistics(torch.zeros(20), torch.ones(20))
    result = SampleEvaluator(recipe).run(model, 2, {})
    assert [sample.name for sample in result.samples] == ["held_out_0000", "long_0000"]
    assert [len(sample.waveform) for sample in result.samples] == [16384, 32256]
    rows = json.loads((run_dir(tmp_path / "each.yaml") / "samples/step_2/samples.json").read_text())
    assert [row.get("duration") for row in rows] == [None, 2.0] and all(row["scores"] for row in rows)
    longer = MMAudio(config_of_duration(recipe.model, 2.0)).eval()
    longer.load_state_dict(model.state_dict())
    encoders = load_encoders(recipe.encoders, "16k", ("decode",), device="cpu")
    request = read_items(recipe.data.validation[1:], 1)[0].request
    [alone] = MMAudioPipeline(longer, encoders, precision="fp32").generate([request], num_steps=2, seed=recipe.seed)
    torch.testing.assert_close(result.samples[1].waveform, alone.waveform, atol=1e-4, rtol=1e-3)
    assert model.latent_length == 32
    with pytest.raises(ValueError, match=r"has clips of 2 s, and evaluation\.metrics compares clips of .* alone, 1 s"):
        SplitEvaluator(load_recipe(tmp_path / "each.yaml", ["evaluation.metrics=[fd]"]), "validation")
    assert len(SplitEvaluator(recipe, "validation").items) == 7


def test_a_fine_tuned_run_samples_its_base_and_what_the_user_names(finished, folder, example_media):
    """Step 0 is the base; prompts and videos of the user's own have audio and no scores, and are on the page."""
    video = min((example_media() / "videos").glob("test_*.mp4"))
    recipe = write_recipe(folder, "own")
    own = [f"samples.videos=[{video}]", "samples.prompts=[a dog barks, rain]", "samples.items=1"]
    own += [f"finetune.init_from={run_dir(finished)}", "training.steps=2", "optim.learning_rate=0.01"]
    assert main(["train", str(recipe), *own]) == 0
    files = samples(recipe)
    ids = ["held_out_0000", "prompt_1", "prompt_2", video.stem]
    expected = {f"step_{step}/{i}.wav" for step in (0, 2) for i in ids} | {"reference/held_out_0000.wav"}
    assert set(files) == expected | {"step_0/samples.json", "step_2/samples.json"}
    rows = json.loads(files["step_0/samples.json"])
    assert [(row["id"], row["caption"], "scores" in row) for row in rows] == [
        ("held_out_0000", rows[0]["caption"], True), ("prompt_1", "a dog barks", False), ("prompt_2", "rain", False),
        (video.stem, video.stem, False),
    ]  # fmt: skip
    start, last, base = (
        waveform(content, folder)
        for content in (
            *(files[f"step_{s}/held_out_0000.wav"] for s in (0, 2)),
            samples(finished)["step_4/held_out_0000.wav"],
        )
    )
    # The same item, weights and noise as the last step of the base, in a batch of another size: the phases of an
    # untrained network's spectrum magnify its rounding.
    assert np.mean(abs(start - base) < 1e-2) > 0.9 > np.mean(abs(last - base) < 1e-2)
    assert files["step_0/prompt_1.wav"] != files["step_0/prompt_2.wav"]
    assert [line["step"] for line in metrics(recipe) if "eval/log_mel_distance" in line] == [0, 2]
    page = Page(write_report(run_dir(recipe), []).read_text())
    assert "Step 0 (base)" in page.text and "a dog barks" in page.text
    labels = [tag["aria-label"] for tag in page.all("video")]  # its frames with the audio of each step
    assert labels == [f"Step 0 (base), {video.stem}", f"Step 2, {video.stem}"]
    held_out = folder / "held_out_0000.mp4"
    held_out.write_bytes(video.read_bytes())
    with pytest.raises(ValueError, match="held_out_0000: rename the file"):
        SampleEvaluator(load_recipe(recipe, [f"samples.videos=[{held_out}]"]))


def test_trackers_of_other_packages_get_scores_and_audio(folder, tmp_path):
    """Without a network: wandb writes its own log, trackio a database."""
    for name in ("wandb", "trackio"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'mmaudio-hf[{name}]'")
    recipe = write_recipe(folder, "tracked", trackers=["wandb", "trackio"])
    settings = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "TRACKIO_DIR": str(tmp_path / "trackio")}
    words = ["train", str(recipe), "training.steps=2"]
    result = Command(*words, env=environment() | settings, cwd=tmp_path).result()
    assert result.returncode == 0, result.stderr
    logged = {"train/loss", "val_ema/loss", "eval/log_mel_distance", "speed/samples_per_second"}
    [run] = (run_dir(recipe) / "trackers" / "wandb").glob("offline-run-*")
    [log] = run.glob("*.wandb")
    assert all(metric.encode() in log.read_bytes() for metric in logged)
    with closing(sqlite3.connect(tmp_path / "trackio" / "mmaudio.db")) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics")]
    assert logged <= {metric for row in rows for metric in row}
    ours = [path.read_bytes() for path in (run_dir(recipe) / "samples" / "step_2").glob("*.wav")]
    written = sorted(waveform(content, tmp_path).tolist() for content in ours)
    for files in (
        (run / "files" / "media" / "audio" / "eval").glob("held_out_000*_2_*.wav"),
        (tmp_path / "trackio" / "media").rglob("*.wav"),
    ):
        heard = sorted(waveform(path.read_bytes(), tmp_path).tolist() for path in files)
        assert len(heard) == 3 and np.allclose(heard, written, atol=1e-3)


def test_own_evaluators_of_the_docs(folder, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    (code,) = [block for block in page.split("```python\n") if block.startswith("# my_scores.py")]
    (tmp_path / "my_scores.py").write_text(code.split("```")[0])
    recipe = write_recipe(folder, "own_evaluators", trackers=[])
    monkeypatch.chdir(tmp_path)
    settings = ["evaluation.extra=[my_scores:Silence]", "training.best_metric=silence/share", "samples.every=0"]
    assert main(["train", str(recipe), *settings]) == 0
    scores = {line["step"]: line["silence/share"] for line in metrics(recipe) if "silence/share" in line}
    assert scores.keys() == {4} and 0 <= scores[4] <= 1 and (run_dir(recipe) / "best").exists()
    (tmp_path / "wrong.py").write_text("class Bare:\n    def __init__(self, recipe): ...\nclass Odd(Bare): name = 3\n")
    capsys.readouterr()
    for name, message in (
        ("nowhere:Class", "nowhere:Class: ModuleNotFoundError"),
        ("my_scores:Gone", "has no attribute 'Gone'"),
        ("wrong:Bare", "has no attribute 'name'"),
        ("wrong:Odd", "has no attribute 'run'|it needs name"),
        ("my_scores", "'my_scores' is not of the form module:Class"),
    ):
        assert main(["train", str(recipe), f"evaluation.extra=['{name}']", "name=refused"]) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1 and re.search(message, errors[0]) and "evaluation.extra" in errors[0], errors
    assert not run_dir(recipe).with_name("refused").exists() or not list(
        run_dir(recipe).with_name("refused").glob("c*")
    )


def test_the_report_lets_one_hear_them(finished):
    page = Page(write_report(run_dir(finished), []).read_text())
    players = page.all("audio")
    assert len(players) == 9 and "2 steps were sampled" in page.text and len(page.all("article")) == 3
    files = samples(finished)
    players_audio = [base64.b64decode(player["src"].partition("base64,")[2]) for player in players[:3]]
    assert players_audio == [files[f"{name}/held_out_0000.wav"] for name in ("reference", "step_2", "step_4")]
    (curve,) = [line for line in page.all("polyline") if line["data-series"] == "eval/log_mel_distance"]
    assert len(curve["points"].split()) == 2


def test_two_processes_share_the_items(finished):
    recipe = write_recipe(finished.parent, "shared")
    result = train(recipe, processes=2)
    assert result.returncode == 0, result.stderr
    assert samples(recipe).keys() == samples(finished).keys()
    for ours, theirs in zip(metrics(recipe), metrics(finished), strict=True):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-2, abs=1e-2)


def test_a_run_killed_between_samples_leaves_no_half_of_them(finished):
    """Killed as soon as a sample of step 4 is there, and resumed."""
    recipe = write_recipe(finished.parent, "killed")
    second = 2 * 3 + 3 + 2  # after those of step 2, and the references of both steps
    with start(recipe, freeze=("mmaudio_hf.evaluation.samples.write_audio", second)) as process:
        wait_until(lambda: list(run_dir(recipe).glob("samples/step_4*/*.wav")), process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    before = samples(recipe)
    assert all(before[name] == content for name, content in samples(finished).items() if name.startswith("step_2/"))
    assert main(["train", str(recipe)]) == 0
    assert samples(recipe) == samples(finished)
    assert (run_dir(recipe) / "metrics.jsonl").read_bytes() == (run_dir(finished) / "metrics.jsonl").read_bytes()


def test_what_is_missing_is_an_error_before_training(finished):
    recipe = load_recipe(finished, ["encoders.weights_dir=nowhere"])
    with pytest.raises(ValueError, match=r"toy_codec_16k\.safetensors is missing"):
        SampleEvaluator(recipe)
    with pytest.raises(ValueError, match=r"data\.test, which names no store"):
        load_recipe(finished, ["samples.split=test"])
    for metric, key in (("eval/onset_f1", "samples"), ("eval_validation/FD-PASST", "evaluation")):
        with pytest.raises(ValueError, match=f"best_metric {metric} is never computed: set {key}.every above 0"):
            load_recipe(finished, [f"training.best_metric={metric}", "samples.every=0"])
    settings = ["samples.every=0", "evaluation.every=2", "evaluation.split=validation"]
    load_recipe(finished, [*settings, "training.best_metric=eval_validation/FD-PASST"])


def test_a_sample_that_is_not_finite_ends_nothing(finished, monkeypatch, capsys):
    generate = samples_module.generate_items

    def one_diverges(*args):
        for number, (item, result) in enumerate(generate(*args)):
            yield item, replace(result, waveform=result.waveform * math.nan) if number == 0 else result

    monkeypatch.setattr(samples_module, "generate_items", one_diverges)
    evaluator = SampleEvaluator(load_recipe(finished, ["name=diverged"]))
    result = evaluator.run(MMAudio.from_pretrained(run_dir(finished) / "last" / "pretrained_model"), 2, {})
    folder = finished.parent / "output" / "diverged" / "samples" / "step_2"
    first, *others = (item.item_id for item in evaluator._items)
    assert (
        f"samples of step 2 are left out, having values that are not finite numbers: {first}" in capsys.readouterr().err
    )
    assert [sample.name for sample in result.samples] == others and math.isnan(result.scores["log_mel_distance"])
    assert {path.name for path in folder.iterdir()} == {"samples.json", *(f"{name}.wav" for name in others)}
    assert [row["id"] for row in json.loads((folder / "samples.json").read_text())] == others
