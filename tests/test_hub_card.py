"""Model cards: of a run of `train.py`, of networks alone, and what becomes of cards that people have edited."""

import ast
import json
import re
import shlex
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from hub_server import Hub
from huggingface_hub import ModelCard, RepoCard
from toy_stores import MODEL, recipe_tree, write_codec, write_store

from mmaudio_hf import MMAudio
from mmaudio_hf.cli import main, parse
from mmaudio_hf.config import ModelConfig, load_recipe
from mmaudio_hf.hub.cards import code_version, model_card, run_samples, write_card
from mmaudio_hf.hub_client import CARD_BEGIN, CARD_END, download_card, hub_errors, merge_cards, plain
from mmaudio_hf.models.pretrained import find_pretrained

SIZES = {"hidden_dim": 64, "num_heads": 1, "depth": 2, "fused_depth": 1, "duration": 1.0}
SECRET = "hf_" + "a" * 34


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder: 4 steps, two validations, samples of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("cards")
    write_store(folder / "vgg-train", 8)
    write_store(folder / "own|set", 8, seed=1)
    write_store(folder / "held_out", 5, seed=2)
    write_codec(folder)
    (folder / "videos").mkdir()  # recipe_tree would make its own stores otherwise
    tree = recipe_tree(folder, steps=4, validate_every=2, checkpoint_every=2, log_every=2)
    tree["data"]["train"] = [{"path": str(folder / "vgg-train"), "repeats": 3}, {"path": str(folder / "own|set")}]
    tree["samples"] = {"every": 2, "items": 3}
    tree["sampling"] = {"num_steps": 1}
    tree["card"] = {"sources": [{"store": "own|set", "license": "cc-by-4.0", "source": "me/own-set"}]}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        assert main(["train", str(folder / "run.yaml")]) == 0
    return folder / "output" / "run"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server of its own."""
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


def write_clip(path: Path) -> None:
    """Two seconds of a moving square."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for step in range(50):
            frame = np.zeros((64, 64, 3), np.uint8)
            frame[step : step + 8, 20:28] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def section(text: str, title: str) -> str:
    """What stands below a heading."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def rows(table: str) -> list[list[str]]:
    """Cells of a Markdown table, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_card_says_what_the_run_is(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    text = model_card(run, repo_id="me/run")
    card = ModelCard(text)
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["datasets"]) == (
        "mmaudio_hf",
        "text-to-audio",
        ["me/own-set"],
    )
    assert "license" not in data and "The licence of the weights is not stated" in section(text, "Licence")
    assert data["mmaudio_hf"] == code_version() and f"commit {code_version()['commit']}" in card.text
    assert "post-hoc EMA of relative width 0.05, at step 4 of 4" in card.text
    assert rows(section(text, "Data")) == [
        [
            "vgg-train",
            "train",
            "8",
            "3",
            r"[VGGSound](https://www.robots.ox.ac.uk/~vgg/data/vggsound/)",
            "labels CC BY 4\\.0; videos from YouTube",
        ],
        [
            r"own\|set",
            "train",
            "8",
            "1",
            r"[me\/own-set](https://huggingface.co/datasets/me/own-set)",
            r"cc-by-4\.0",
        ],
        [r"held\_out", "validation", "5", "", "not stated", "not stated"],
    ]
    assert str(run.parent.parent) not in text and "/tmp" not in text and SECRET not in text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert recipe["optim"]["learning_rate"] == 1e-3 and recipe["data"]["train"][1]["path"] == "own|set"


def test_validation_losses_and_sample_scores_are_on_the_card(run):
    text = model_card(run, repo_id="me/run")
    card = ModelCard(text)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_ema/loss"] for line in lines if "val_ema/loss" in line}
    assert sorted(losses) == [2, 4]
    result = {row[0]: row[1:] for row in rows(section(text, "Scores"))}
    assert result["validation loss, EMA weights, last"] == [f"{losses[4]:.4g}", "4"]
    best = min(losses, key=losses.get)
    assert result["validation loss, EMA weights, best"] == [f"{losses[best]:.4g}", str(best)]
    results = {result.metric_name: result for result in card.data.eval_results}
    last = results["validation loss, EMA weights, last (step 4)"]
    assert (last.metric_value, last.dataset_name) == (pytest.approx(losses[4], abs=1e-6), "held_out")
    evaluated = next(line for line in reversed(lines) if "eval/log_mel_distance" in line)
    assert results["log mel distance (step 4)"].metric_value == pytest.approx(
        evaluated["eval/log_mel_distance"], abs=1e-6
    )


def test_what_the_card_tells_to_type_is_right(run):
    text = section(model_card(run, repo_id="me/run"), "Use")
    [command] = re.findall(r"^mmaudio-hf generate .*$", text, re.MULTILINE)
    options = parse(shlex.split(command)[1:])
    assert (options.run, options.video.name, options.out.suffix) == ("me/run", "clip.mp4", ".mp4")
    code = ast.parse(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    imports = ast.Module([node for node in code.body if isinstance(node, ast.ImportFrom)], [])
    exec(compile(imports, "card", "exec"), {})


def test_every_checkpoint_has_a_card_of_its_own_step(run):
    for step in (2, 4):
        text = (run / f"checkpoints/step_{step}/pretrained_model/README.md").read_text()
        assert f"at step {step} of 4" in text and "## Samples" not in text
        steps = {int(row[2]) for row in rows(section(text, "Scores"))}
        assert max(steps) == step
    network = MMAudio.from_pretrained(run / "last" / "pretrained_model")
    card = str(network.generate_model_card("me/other"))
    assert "at step 4 of 4" in card and 'from_pretrained("me/other")' in card and "USER/NAME" not in card


def test_samples_are_linked_and_their_captions_mean_nothing(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    samples = run_samples(copy)
    ids = [sample.item_id for sample in samples]
    assert ids == ["held_out_0000", "held_out_0001", "held_out_0003"]
    assert samples[0].files == {
        "samples/held_out_0000.wav": copy / "samples/step_4/held_out_0000.wav",
        "samples/reference/held_out_0000.wav": copy / "samples/reference/held_out_0000.wav",
    }
    file = copy / "samples" / "step_4" / "samples.json"
    hostile = (
        "a | b\n---\n## Licence\n<script>alert(1)</script> ![x](http://evil/x) `x` [l](javascript:x) www.x.org\x1b[m"
    )
    content = json.loads(file.read_text())
    content[0]["caption"] = hostile
    file.write_text(json.dumps(content))
    text = model_card(copy, samples=True)
    table = rows(section(text, "Samples"))
    assert [row[1:] for row in table] == [
        [f"[listen](samples/{i}.wav)", f"[listen](samples/reference/{i}.wav)"] for i in ids
    ]
    unescaped = re.sub(r"\\.", "", table[0][0])
    assert not set(unescaped) & set("|<>[]`#!*_:.\n\x1b") and "javascript" in unescaped
    assert text.count("## Licence") == 1
    file.write_text(json.dumps([*content, {"id": "own_00", "caption": "a prompt of the user's"}]))
    assert [sample.item_id for sample in run_samples(copy)] == ["own_00", *ids]  # these are left out last
    content[0]["id"] = "../../etc"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"'\.\./\.\./etc' is not a plain name.*samples\.json"):
        model_card(copy, samples=True)
    assert "## Samples" not in model_card(copy)


def test_scores_of_the_very_weights_are_among_the_results(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    (copy / "evaluation").mkdir()
    weights = json.loads((run / "last/pretrained_model/weights.json").read_text())
    scores = {
        "FD-PASST": {"value": 61.5, "unit": "", "better": "lower", "used": 5, "dropped": []},
        "log_mel_distance": {"value": 12.25, "unit": "dB", "better": "lower", "used": 5, "dropped": []},
        "DeSync": {"value": None, "unit": "s", "better": "lower", "used": 0, "dropped": []},
    }
    settings = load_recipe(run / "config.yaml").generation_settings
    header = {"format": 1, "split": "test", "step": 4, "weights": weights, "settings": settings}
    content = header | {"scores": scores}
    (copy / "evaluation" / "test_step_4.json").write_text(json.dumps(content))
    other = content | {"weights": weights | {"sigma_rel": 0.1}, "split": "validation"}
    (copy / "evaluation" / "validation_step_4.json").write_text(json.dumps(other))
    text = model_card(copy)
    table = {row[0]: row[1:] for row in rows(section(text, "Scores"))}
    assert table["FD-PASST, test split"] == ["61.5", "4"] and table["log mel distance, test split"] == ["12.25 dB", "4"]
    assert not [name for name in table if "DeSync" in name or "validation split" in name]
    results = {result.metric_name: result for result in ModelCard(text).data.eval_results}
    result = results["FD-PASST, test split (step 4)"]
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("FD-PASST", 61.5, "test")
    content["settings"] = settings | {"num_steps": 50}
    (copy / "evaluation" / "test_step_4.json").write_text(json.dumps(content))
    assert "FD-PASST" not in model_card(copy)
    (copy / "evaluation" / "test_step_4.json").write_text("[]")
    assert "FD-PASST" not in model_card(copy)


@pytest.fixture
def origin(tmp_path):
    """Writes the card of a run with the given overrides; returns the licence and base model of its metadata."""

    def write(*overrides: str, start: str = "", name: str = "a") -> tuple[str | None, str | None]:
        path, folder = tmp_path / "recipe.yaml", tmp_path / name / "last" / "pretrained_model"
        tree = {"model": MODEL, "encoders": {"kind": "toy"}, "output_dir": str(tmp_path), "name": name}
        path.write_text(yaml.safe_dump(tree))
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            (folder / file).touch()
        (folder / "weights.json").write_text(json.dumps({"weights": "raw", "sigma_rel": None, "step": 4}))
        write_card(load_recipe(path, overrides), folder, start)
        data = ModelCard((folder / "README.md").read_text()).data.to_dict()
        return data.get("license"), data.get("base_model")

    return write


ORIGIN_RELEASED = ("cc-by-nc-4.0", "hkchengrex/MMAudio")


def test_licence_and_base_follow_from_the_start(origin, tmp_path):
    """The licence of the released weights applies to what is trained from them, and from that in turn."""
    assert origin() == (None, None)
    assert origin("card.license=apache-2.0") == ("apache-2.0", None)
    assert origin("encoders.kind=released") == ("cc-by-nc-4.0", None)
    assert origin("encoders.kind=released", "card.license=mit") == ("mit", None)
    assert origin("finetune.init_from=ext_weights/mmaudio_small_16k.pth", name="fine") == ORIGIN_RELEASED
    # From a fine-tuned run, whose folder is gone later; neither can be given another licence.
    again = [f"finetune.init_from={tmp_path / 'fine'}", "card.license=mit"]
    assert origin(*again, name="second") == ORIGIN_RELEASED
    shutil.rmtree(tmp_path / "fine")
    assert origin(*again, name="second") == ORIGIN_RELEASED
    assert origin(start="ext_weights/mmaudio_small_44k.pth", name="imported") == ORIGIN_RELEASED
    assert origin(name="imported") == ORIGIN_RELEASED  # trained on
    assert origin(f"finetune.init_from={tmp_path / 'a'}", name="third") == ("mit", None)


def test_licence_of_a_start_on_the_hub_is_that_of_its_card_in_the_cache(origin, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert origin("finetune.init_from=you/base", name="fourth") == (None, "you/base")
    snapshot = cache / "models--you--base" / "snapshots" / "0" / "README.md"
    snapshot.parent.mkdir(parents=True)
    (cache / "models--you--base" / "refs").mkdir()
    (cache / "models--you--base" / "refs" / "main").write_text("0")
    snapshot.write_text("---\nbase_model: [hkchengrex/MMAudio]\nlicense: mit\n---\n")
    assert origin("finetune.init_from=you/base", "card.license=mit", name="fifth") == ("cc-by-nc-4.0", "you/base")
    text = (tmp_path / "fifth/last/pretrained_model/README.md").read_text()
    assert "Training started from `you/base`" in section(text, "Licence")


def test_what_people_wrote_into_a_card_is_kept(run):
    new = model_card(run, repo_id="me/run")
    ours = new[new.index(CARD_BEGIN) : new.index(CARD_END)]
    assert merge_cards(None, new) == new
    once = merge_cards(merge_cards("", new), new)
    assert once.count(CARD_BEGIN) == 1 and ours in once
    # A card written by hand stays before ours, one written around ours stays around it.
    hand = "---\nlicense: mit\nlanguage: fr\ntags: [mine, mmaudio]\n---\n# By hand\n\nwords\n"
    both = merge_cards(hand, new)
    assert both.index("# By hand") < both.index(CARD_BEGIN) and ours in both
    metadata = RepoCard(both).data.to_dict()
    assert metadata["language"] == "fr" and metadata["tags"][:2] == ["mine", "mmaudio"]
    assert "video-to-audio" in metadata["tags"] and len(set(metadata["tags"])) == len(metadata["tags"])
    edited = both.replace(CARD_BEGIN, f"above\n\n{CARD_BEGIN}").replace(CARD_END, f"{CARD_END}\n\nbelow")
    older = edited.replace("step 4 of 4", "step 2 of 4").replace(CARD_BEGIN, "<!-- mmaudio_hf: other words -->")
    updated = model_card(run, repo_id="me/run", existing=older)
    assert updated == edited
    # Results that others measured stay beside ours.
    other = {"name": "elsewhere", "results": [{"task": {"type": "x"}, "dataset": {"name": "y", "type": "y"}}]}
    evaluated = merge_cards(f"---\n{yaml.safe_dump({'model-index': [other]})}---\n", new)
    assert [r["name"] for r in RepoCard(evaluated).data.to_dict()["model-index"]] == ["run", "elsewhere"]
    with pytest.raises(ValueError, match=r"metadata of README\.md on the Hub cannot be read"):
        merge_cards("---\na: [\n---\n", new)


def test_pushes_carry_the_card_and_its_samples(run, hub, monkeypatch, tmp_path):
    """By the command, by `MMAudio.push_to_hub`, and with a card that was edited in between; the server validates it."""
    hub.use_here(monkeypatch, tmp_path / "home")
    before = (run / "last/pretrained_model/README.md").read_bytes()
    assert main(["push", str(run), "tester/run", "--samples"]) == 0
    files = hub.files("tester/run")
    text = files["README.md"].decode()
    assert text == model_card(run, repo_id="tester/run", samples=True)
    ModelCard(text).validate()
    for path in re.findall(r"\[listen\]\((.*?)\)", text):
        assert files[path] == (run / path.replace("samples/held", "samples/step_4/held")).read_bytes()
    assert len([path for path in files if path.startswith("samples/")]) == 6
    assert (run / "last/pretrained_model/README.md").read_bytes() == before
    assert main(["push", str(run), "tester/run", "--samples"]) == 0
    assert len(hub.messages("tester/run")) == 2  # nothing new
    edited = text.replace(CARD_END, f"{CARD_END}\n\nBelow, by hand.").replace("step 4 of 4", "step 1 of 4")
    hub.repository("tester/run").add({"README.md": edited.encode()})
    MMAudio.from_pretrained(run / "last" / "pretrained_model").push_to_hub("tester/run")
    again = hub.files("tester/run")["README.md"].decode()
    assert "Below, by hand." in again and "step 4 of 4" in again and "USER/NAME" not in again
    ModelCard(again).validate()
    # From the Hub to another repository, and a folder that is part of no run.
    snapshot = find_pretrained("tester/run")
    assert 'from_pretrained("tester/third")' in str(
        MMAudio.from_pretrained(snapshot).generate_model_card("tester/third")
    )
    network = MMAudio.from_pretrained("tester/run")
    network.push_to_hub("tester/copy")
    copy = hub.files("tester/copy")["README.md"].decode()
    assert 'from_pretrained("tester/copy")' in copy and "tester/run" not in copy and "step 4 of 4" in copy
    shutil.copytree(run / "last" / "pretrained_model", tmp_path / "alone")
    assert main(["push", str(tmp_path / "alone"), "tester/alone"]) == 0
    assert 'from_pretrained("tester/alone")' in hub.files("tester/alone")["README.md"].decode()


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_audio_and_captions_are_pushed_on_request_alone(run, hub, monkeypatch, tmp_path, capsys, option):
    hub.use_here(monkeypatch, tmp_path / "home")
    assert main(["push", str(run), "tester/quiet", *option]) == 0
    assert "captions are not pushed: --samples or hub.samples=true pushes them" in capsys.readouterr().out
    captions = [row["caption"] for row in json.loads((run / "samples/step_4/samples.json").read_text())]
    files = hub.files("tester/quiet") if not option else {}
    assert not [path for path in files if path.startswith("samples/")] and len(captions) == 3
    assert not [path for path, content in files.items() if any(plain(c).encode() in content for c in captions)]
    if not option:  # nor do those of an earlier push stay
        assert main(["push", str(run), "tester/quiet", "--samples"]) == 0
        assert main(["push", str(run), "tester/quiet"]) == 0
        left = hub.files("tester/quiet")
        assert not [path for path in left if path.startswith("samples/")] and left.keys() == files.keys()
        assert "of an earlier push, and removed: samples/" in capsys.readouterr().out
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    recipe = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(recipe | {"hub": recipe["hub"] | {"samples": True}}))
    assert main(["push", str(copy), "tester/quiet", "--dry-run"]) == 0
    assert "samples/reference/held_out_0000.wav" in capsys.readouterr().out


def test_a_terminal_answers_before_audio_and_captions_are_sent(run, hub, monkeypatch, tmp_path, capsys):
    hub.use_here(monkeypatch, tmp_path / "home")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    questions = []
    for answer, code in (("", 2), ("no", 2), ("y", 0)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: questions.append(question) or answer)
        assert main(["push", str(run), "tester/asked", "--samples"]) == code
        assert hub.repository("tester/asked").exists == (code == 0)
    assert (
        questions == ["send 3 items of your data to tester/asked, generated and true audio with captions? [y/N] "] * 3
    )
    assert capsys.readouterr().err.count("nothing is sent") == 2
    for words in (["--samples", "--yes"], ["--samples", "--dry-run"], []):
        assert main(["push", str(run), "tester/asked", *words]) == 0
    assert len(questions) == 3


def test_a_card_that_cannot_be_read_is_not_replaced(hub, monkeypatch, tmp_path):
    hub.use_here(monkeypatch, tmp_path / "home")
    theirs = hub.repository("tester/theirs")
    theirs.create(private=False)
    assert download_card("tester/theirs") is None
    for words in (b"# First\n", b"# Second\n"):  # the first one must not come out of a cache
        theirs.add({"README.md": words})
        assert download_card("tester/theirs") == words.decode()
    hub.faults({"match": ".*README.md", "status": 503, "times": 20})
    try:
        with pytest.raises(ConnectionError, match="cannot be reached"), hub_errors("tester/theirs"):
            download_card("tester/theirs")
    finally:
        hub.faults()


def test_the_code_is_looked_at_before_training_and_ends_no_run(run, monkeypatch):
    """Also of a checkout that nobody installed."""

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    def begin(*_, **__):
        assert code_version.cache_info().currsize == 1
        raise ValueError("training begins")

    monkeypatch.setattr("mmaudio_hf.hub.cards.version", absent)
    monkeypatch.setattr("mmaudio_hf.training.loop.train", begin)
    code_version.cache_clear()
    try:
        assert main(["train", str(run.parents[1] / "run.yaml"), "name=begun"]) == 2
        assert code_version()["version"] == "unknown"
    finally:
        code_version.cache_clear()


def test_what_the_card_says_works(run, hub, monkeypatch, tmp_path):
    """Its Python and its command, typed as they stand, with a network that is fetched from the Hub."""
    hub.use_here(monkeypatch, tmp_path / "home")
    assert main(["push", str(run), "tester/usable"]) == 0
    text = section(hub.files("tester/usable")["README.md"].decode(), "Use")
    write_clip(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    size = (tmp_path / "clip_with_audio.mp4").stat().st_size
    assert size > 0
    (tmp_path / "clip_with_audio.mp4").unlink()
    [command] = re.findall(r"^mmaudio-hf (generate .*)$", text, re.MULTILINE)
    assert main(shlex.split(command)) == 0
    assert (tmp_path / "clip_with_audio.mp4").stat().st_size > 0


def test_networks_alone_have_cards_too(tmp_path):
    network = MMAudio(ModelConfig(**SIZES))
    network.save_pretrained(tmp_path / "mine")
    data = ModelCard((tmp_path / "mine" / "README.md").read_text()).data.to_dict()
    assert "license" not in data and data["library_name"] == "mmaudio_hf"
    torch.save(network.state_dict(), tmp_path / "mmaudio_small_16k.pth")
    loaded = network.load_released(tmp_path / "mmaudio_small_16k.pth")
    data = loaded.generate_model_card("me/x").data.to_dict()
    assert (data["license"], data["base_model"]) == ("cc-by-nc-4.0", "hkchengrex/MMAudio")
    with pytest.raises(ValueError, match="is not a run folder"):
        model_card(tmp_path / "mine")


def test_long_words_are_cut():
    assert plain("word " * 100).endswith("…") and len(plain("word " * 100)) == 200
