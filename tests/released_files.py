"""Weight files of released names, forms and shapes with name-seeded values, for tests that start from files."""

import csv
import gzip
import json
import math
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from golden_data import GOLDEN, MEDIA_SEED, normal, state_dict, tensor
from safetensors.torch import save_file
from transformers import CLIPConfig

from mmaudio_hf.features import clip
from mmaudio_hf.features.encoders import BPE_FILE, SYNC_FILE, VAE_FILES, VOCODER_FILES

EMPTY_TEXT_FILE = "empty_string.pth"


def write_ext_weights(folder: Path, mode: str, *, vocoder: bool = False) -> None:
    """What extraction and training read below `encoders.weights_dir`, at full size; with what generation reads, too.

    The file of Synchformer has an audio encoder, too, which must be ignored.
    """
    (folder / VOCODER_FILES[mode]).parent.mkdir(parents=True, exist_ok=True)
    torch.save(state_dict(f"vae_{mode}") | data_statistics(mode), folder / VAE_FILES[mode])
    if vocoder:
        torch.save({"generator": state_dict(f"bigvgan_{mode}")}, folder / VOCODER_FILES[mode])
    if not (folder / SYNC_FILE).exists():
        unused = {"afeat_extractor.norm.weight": torch.ones(768)}
        torch.save(state_dict("synchformer_visual") | unused, folder / SYNC_FILE)
    torch.save(tensor(EMPTY_TEXT_FILE, (1, 77, 1024)), folder / EMPTY_TEXT_FILE)


def data_statistics(mode: str) -> dict[str, torch.Tensor]:
    """The constants of a released VAE."""
    stats = json.loads((GOLDEN / "vae_stats.json").read_text())[mode]
    return {name: torch.tensor(stats[name]).reshape(1, -1, 1) for name in ("data_mean", "data_std")}


def write_clip_folder(folder: Path, config: CLIPConfig, state: dict[str, torch.Tensor]) -> Path:
    """A CLIP model as a folder of transformers files, with its tokenizer."""
    folder.mkdir(parents=True)
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    merges = [" ".join(pair) for pair in synthetic_merges()]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    symbols = clip._byte_symbols()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return folder


def write_open_clip(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """The same model as an open_clip checkpoint, with open_clip's table of merges beside it; returns the checkpoint."""
    folder.mkdir(parents=True)
    torch.save(open_clip_names(state), folder / "open_clip_pytorch_model.bin")
    write_merge_list(folder / BPE_FILE)
    return folder / "open_clip_pytorch_model.bin"


def write_merge_list(path: Path) -> Path:
    """A list of merges as open_clip ships it."""
    lines = ["#version: made by a test", *(" ".join(pair) for pair in synthetic_merges()), "un used", ""]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def synthetic_merges() -> list[tuple[str, str]]:
    """As many merges as the real table has: a few that matter, then pairs of rare byte symbols."""
    merges = [("d", "o"), ("do", "g</w>"), ("c", "a"), ("ca", "t</w>"), ("a", "t</w>")]
    rare = clip._byte_symbols()[150:]
    pairs = product(rare, [*rare, *(symbol + "</w>" for symbol in rare)])
    triples = ((a + b, c) for a, b, c in product(rare, repeat=3))
    filler = chain(pairs, triples)
    return merges + [next(filler) for _ in range(clip.MERGES - len(merges))]


def clip_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Value of one tensor of CLIP, by its name in transformers."""
    x = normal(name, shape, MEDIA_SEED)
    if len(shape) >= 2:
        return torch.from_numpy(x / np.float32(math.sqrt(np.prod(shape[1:]))))
    if len(shape) == 1 and name.endswith(".weight"):
        return torch.from_numpy(1 + np.float32(0.1) * x)
    return torch.from_numpy(np.asarray(np.float32(0.02) * x))


def clip_state(vision_layers: int, text_layers: int) -> dict[str, torch.Tensor]:
    """Name-seeded state dict of DFN5B ViT-H/14 with so many layers, names of transformers."""
    state = {}
    for name, row in listed_clip_names().items():
        layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else -1
        if layer < (vision_layers if name.startswith("vision") else text_layers):
            state[name] = clip_weight(name, tuple(int(n) for n in row["shape"].split("x") if n))
    return state


def listed_clip_names() -> dict[str, dict[str, str]]:
    """Rows of the listing of names by the name of transformers."""
    with open(GOLDEN / "media_clip_names.tsv", newline="") as file:
        return {row["transformers_name"]: row for row in csv.DictReader(file, delimiter="\t")}


def open_clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of transformers in open_clip's names, put together by the listing."""
    renamed, thirds, rows = {}, {}, listed_clip_names()
    for name, value in state.items():
        how, theirs = rows[name]["how"], rows[name]["open_clip_name"]
        if how.startswith("rows"):
            thirds.setdefault(theirs, {})[how] = value
        else:
            renamed[theirs] = value.T.contiguous() if how == "transpose" else value
    return renamed | {name: torch.cat([rows[f"rows {i}/3"] for i in range(3)]) for name, rows in thirds.items()}
