"""The commands of docs/data.md, as they stand there, on ten rows of each official set and on a folder of clips."""

import contextlib
import csv
import json
import math
import re
import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from odd_media import Odd, steady, write_odd

from mmaudio_hf.cli import main
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.schema import column_shapes
from mmaudio_hf.sources import Row, _split_of

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "data.md").read_text()
# Toy encoders, short clips and a small network in place of what takes days.
TOY = {
    "model": {"variant": "small_16k", "duration": 2.0, "hidden_dim": 64, "num_heads": 1, "depth": 2, "fused_depth": 1},
    "encoders": {"kind": "toy", "weights_dir": "data/toy", "device": "cpu"},
    "optim": {"schedule": "constant", "warmup_steps": 1},
    "ema": {"snapshot_every": 2},
    "training": {"steps": 2, "batch_size": 4, "mixed_precision": "no", "checkpoint_every": 2, "validate_every": 2},
    "samples": {"every": 0},
    "evaluation": {"every": 0, "after_training": False},
    "finetune": {"init_from": ""},
}


def run_section(title: str, folder: Path, recipe: str, capsys) -> str:
    """All commands of a section of the page, in a folder where the recipe is a toy one; what they printed."""
    (folder / "recipes").mkdir()
    toy = TOY | {"base": str(ROOT / "recipes" / recipe), "name": "toy"}
    (folder / "recipes" / recipe).write_text(yaml.safe_dump(toy))
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    blocks = "".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines()]
    with contextlib.chdir(folder):
        for words in commands:
            words = ["train", *words[words.index("train.py") + 1 :]] if "train.py" in words else words[1:]
            assert main(words) == 0 or words[0] == "doctor", words
    return capsys.readouterr().out


def write_csv(path: Path, rows: Sequence[Sequence]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_noise(path: Path, seed: int) -> None:
    """An audio file that is long enough for a clip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_audio(path, torch.rand(73_000, generator=torch.Generator().manual_seed(seed)) - 0.5, 8000)


def write_videos(folder: Path, names: Sequence[str]) -> None:
    """Videos that differ: an audit names copies."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        write_odd(folder / name, Odd(steady(2.5, start=0), gain=1 - number / 50, size=(96, 64 + 2 * number)))


def write_official_sets(folder: Path) -> None:
    """Ten rows of each, as the files have them, and media for nine rows of each set."""
    ids = [f"vid{i:05d}_-" for i in range(3000)]
    held_out = [i for i in ids if _split_of(Row(f"{i}_000030", "x"), {"val": 0.011}) == "val"][:2]
    train = ["NA", *[i for i in ids if i not in held_out][:5], *held_out]
    rows = [(i, 30, "playing tennis, outside", "train") for i in train] + [(i, 30, "dog", "test") for i in ids[-2:]]
    write_csv(folder / "vggsound.csv", rows)
    write_videos(folder / "data/vggsound/videos", [f"{row[0]}_000030.mp4" for row in rows if row[0] != train[1]])
    rows = [(i, f"yt{i}", 10 * i, f"A dog barks {i} times") for i in range(10)]
    write_csv(folder / "audiocaps/train.csv", [("audiocap_id", "youtube_id", "start_time", "caption"), *rows])
    for number in range(9):
        write_noise(folder / f"data/audiocaps/yt{number}_{10 * number:06d}.wav", number)
    sets = [("as", "audioset_sl", "Yas"), ("bbc", "bbcsound", "bbc"), ("fsd", "freesound", "18"), ("sb", "none", "7")]
    (folder / "WavCaps/json_files/x").mkdir(parents=True)
    for seed, (short, name, prefix) in enumerate(sets):
        data = [{"id": f"{prefix}{i}{'.wav' * (short == 'as')}", "caption": f"{name} {i}"} for i in range(10)]
        (folder / f"WavCaps/json_files/x/{short}_final.json").write_text(json.dumps({"num": 10, "data": data}))
        for number in range(2 if short != "sb" else 0):
            write_noise(folder / f"data/{name}/{prefix}{number}.flac", 100 + 10 * seed + number)
    rows = [(f"Bell {i}.wav", *(f"bell {i} rings, {word}" for word in "abcde")) for i in range(2)]
    write_csv(
        folder / "clotho_captions_development.csv", [("file_name", *(f"caption_{i}" for i in range(1, 6))), *rows]
    )
    for number in range(2):
        write_noise(folder / f"data/clotho/Bell {number}.wav", 200 + number)


def test_the_published_mix(tmp_path, capsys):
    write_official_sets(tmp_path)
    printed = run_section("The published mix", tmp_path, "small_16k.yaml", capsys)
    lists, features = tmp_path / "data/sets", tmp_path / "data/features_16k"
    assert "data/sets/vgg-train.tsv: 6 rows, 1 of their files missing from data/vggsound/videos" in printed
    assert "data/sets/audiocaps.tsv: 10 rows, 1 of their files missing from data/audiocaps" in printed
    assert "data/sets/freesound.tsv: 10 rows, 8 of their files missing from data" in printed
    assert "NA_000030\tplaying tennis, outside\n" in (lists / "vgg-train.tsv").read_text()
    assert not (lists / "soundbible.tsv").exists() and len(list(lists.glob("*.tsv"))) == 8
    rows = {}
    for path in features.glob("*.manifest.json"):
        with FeatureStore.open(features / path.name.removesuffix(".manifest.json")) as store:
            rows[store.path.name] = len(store)
    audios = {"audiocaps": 9, "audioset_sl": 2, "bbcsound": 2, "freesound": 2, "clotho": 10}
    assert rows == {"vgg-train": 5, "vgg-val": 2, "vgg-test": 2, **audios}
    rejects = [json.loads(line) for line in (features / "vgg-train.rejects.jsonl").open()]
    assert [(line["id"], line["reason"]) for line in rejects] == [("vid00000_-_000030", "not_found")]
    assert not list(features.glob("*.shards")) and (features / "audit.html").is_file()
    assert (tmp_path / "output/toy/checkpoints/step_2").is_dir()


def test_a_folder_of_clips(tmp_path, capsys):
    folder = tmp_path / "data/own/videos"
    names = [f"c{i:02d}.mp4" for i in range(1, 13)]
    write_videos(folder, names)
    write_csv(folder / "captions.csv", [("file_name", "caption"), *((name, f"clip {name}") for name in names)])
    write_csv(tmp_path / "clips.csv", [("clip", "words"), ("a.mp4", "of a")])
    (tmp_path / "tars").mkdir()
    (tmp_path / "c01.txt").write_text("of the first")
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        for file in (folder / "c01.mp4", tmp_path / "c01.txt"):
            tar.add(file, file.name)
    printed = run_section("A folder of 40 clips", tmp_path, "finetune_small_16k.yaml", capsys)
    stores = [FeatureStore.open(tmp_path / f"data/features_16k/own-{split}") for split in ("train", "val")]
    assert sorted(item_id for store in stores for item_id in store.ids) == [f"c{i:02d}" for i in range(1, 13)]
    assert (tmp_path / "data/tars/c01.mp4").read_bytes() == (folder / "c01.mp4").read_bytes()
    assert (tmp_path / "data/sets/tars.tsv").read_text() == "id\tcaption\nc01\tof the first\n"
    assert "own-train.tsv: " in printed and "all files in data/own/videos" in printed
    assert (tmp_path / "output/toy/checkpoints/step_2").is_dir()


def test_sizes_of_the_page_are_those_of_the_shapes():
    rows = re.findall(r"^\|.*\| (?:about )?([\d,]+)(?: videos)? \| ([\d.]+) GB \| ([\d.]+) GB \|$", PAGE, re.MULTILINE)
    assert len(rows) == 6
    sizes = {}
    for mode, column in (("16k", 1), ("44k", 2)):
        for number, row in enumerate(rows):
            size = 4 * sum(map(math.prod, column_shapes(mode, video=number == 0).values()))
            sizes[mode, number] = size
            assert f"{int(row[0].replace(',', '')) * size / 1e9:.1f}" == row[column]
    samples = 5 * 180_000, 379_543
    step = 512 * (samples[0] * sizes["16k", 0] + samples[1] * sizes["16k", 1]) / sum(samples)
    assert f"a step of 512 reads {step / 1e9:.2f} GB" in PAGE
    assert f"{40 * sizes['16k', 0] / 1e6:.0f} MB" in PAGE
