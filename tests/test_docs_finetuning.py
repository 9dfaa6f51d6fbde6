"""Every command of docs/finetuning.md, in its order, on a dozen short clips, toy encoders and a small network."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from mmaudio_hf import MMAudio
from mmaudio_hf.cli import main
from mmaudio_hf.cli.hub import write_encoder_files
from mmaudio_hf.config import load_recipe

ROOT = Path(__file__).parent.parent
SMALL = """
model: {variant: small_16k, hidden_dim: 64, num_heads: 1, depth: 2, fused_depth: 1, duration: 1.6}
encoders: {kind: toy, weights_dir: data/own}
training: {mixed_precision: "no", trackers: []}
sampling: {num_steps: 2}
"""
# Steps of the recipe -> those of the test.
FEWER = {
    "steps: 1040": "steps: 4",
    "batch_size: 16": "batch_size: 4",
    "every: 52": "every: 2",
    "every: 104": "every: 2",
}


def commands() -> list[list[str]]:
    text = (ROOT / "docs" / "finetuning.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch, example_media) -> Path:
    """Clips with captions, the recipes made small, and a base with random weights in place of the released one."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_clips", "recipes", "ext_weights"):
        (tmp_path / name).mkdir()
    lines = ["file_name,caption"]
    for number, video in enumerate(sorted((example_media() / "videos").glob("*.mp4")), 1):
        shutil.copyfile(video, f"my_clips/c{number:02d}.mp4")
        lines.append(f"c{number:02d}.mp4,the zorbo horn {video.stem}")
    shutil.copyfile("my_clips/c01.mp4", "street.mp4")
    Path("my_clips/captions.csv").write_text("\n".join(lines) + "\n")
    shutil.copyfile(ROOT / "recipes" / "lora_own.yaml", "recipes/lora_own.yaml")
    own = (ROOT / "recipes" / "finetune_own.yaml").read_text()
    for published, fewer in FEWER.items():
        assert published in own
        own = own.replace(published, fewer)
    Path("recipes/finetune_own.yaml").write_text(own)
    Path("recipes/small_16k.yaml").write_text(SMALL)
    recipe = load_recipe("recipes/lora_own.yaml")
    torch.manual_seed(0)
    network = MMAudio(recipe.model)
    for parameter in network.parameters():  # the last layer starts as zero, and then no adapter gets a gradient
        torch.nn.init.normal_(parameter, std=0.02)
    network.set_latent_statistics(torch.zeros(20), torch.ones(20))
    torch.save(network.state_dict(), "ext_weights/mmaudio_small_16k.pth")
    network.save_pretrained("base")
    write_encoder_files(recipe, tmp_path / "base")
    return tmp_path


def test_the_commands_of_the_page(folder, capsys, monkeypatch):
    """Downloads are left out: the network and toy formulas of the test take their place."""
    done = []
    for words in commands():
        if words[1:3] in (["weights", "download"], ["bench", "finetune"]):  # the latter: tests/test_bench_learning.py
            continue
        if words[0] != "mmaudio-hf":  # accelerate launch ... train.py RECIPE, python train.py RECIPE
            words = ["mmaudio-hf", "train", *words[words.index("train.py") + 1 :]]
        if "ext_weights/mmaudio_small_16k.pth" in words:  # the file says nothing of toy encoders
            shutil.copyfile("data/own/toy_codec_16k.safetensors", "base/toy_codec_16k.safetensors")
            words = ["base" if word.startswith("ext_weights") else word for word in words]
        code = main(words[1:])
        printed = capsys.readouterr()
        # No GPU of 12 GB is needed to count; the quick check of a toy recipe has nothing to fail on.
        assert code == 0, (words, printed.out[-2000:], printed.err[-2000:])
        done.append((" ".join(words[1:3]), printed.out))
    text = dict(done)
    assert "it fits 12 GB" in next(out for name, out in done if name == "doctor recipes/lora_own.yaml")
    assert "own_train 100%" in text["train recipes/lora_own.yaml"]
    assert "lora_own/last/adapter" not in text and (folder / "output/lora_own/last/adapter/README.md").is_file()
    card = (folder / "output/lora_own/last/adapter/README.md").read_text()
    assert "A LoRA adapter of rank 8" in card and "mmaudio_small_16k.pth" in card and "license: cc-by-nc-4.0" in card
    card = (folder / "output/lora_own/last/pretrained_model/README.md").read_text()
    assert "Trained: a LoRA adapter of rank 8, which is merged into these weights, and alone in `adapter/`" in card
    steps = {path.name for path in (folder / "output/lora_own/samples").iterdir()}
    assert {"step_0", "step_2", "step_4", "reference"} <= steps
    assert (folder / "horn.mp4").is_file() and (folder / "horn.wav").is_file()
    assert {path.name for path in (folder / "exported").iterdir()} == {
        "lora_own_bf16.safetensors", "lora_own_lora.safetensors",
    }  # fmt: skip
    page = (folder / "output/lora_own/report/index.html").read_text()
    assert "Step 0 (base)" in page and "validation split:" in page and "the zorbo horn" in page
