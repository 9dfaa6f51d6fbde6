"""Folders and Hub repositories of trained models: config.json, model.safetensors and a card.

`PretrainedModel` gives the model its `from_pretrained`, `save_pretrained`, `push_to_hub` and `load_released`.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from mmaudio_hf.config import RELEASED_LICENSE, ModelConfig, is_released, model_config, read_json, to_dict
from mmaudio_hf.hub_client import (
    CARD_FILE,
    card_section,
    check_file_names,
    compose_card,
    download_card,
    hub_errors,
    merge_cards,
)
from mmaudio_hf.schema import audio_mode, split_hub_id
from mmaudio_hf.weights import check_state, load_state

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ENCODERS_FILE = "encoders.json"
# What is downloaded from the Hub; a model repository may hold more.
PUBLISHED_FILES = (
    *(CONFIG_FILE, WEIGHTS_FILE, "weights.json", ENCODERS_FILE, CARD_FILE),
    *("toy_codec_16k.safetensors", "toy_codec_44k.safetensors"),
)
# Tensors that early released files hold although they follow from the configuration.
DERIVED_TENSORS = ("latent_rot", "clip_rot", "t_embed.freqs")
_HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
PLACEHOLDER = "USER/NAME"  # the repository id in a card until it is pushed
RELEASED = "hkchengrex/MMAudio"  # the released models on the Hub
TAGS = ("mmaudio", "video-to-audio", "audio-generation", "flow-matching")


class PretrainedModel(nn.Module, ModelHubMixin, library_name="mmaudio_hf", pipeline_tag="text-to-audio"):
    """A module made from a `config`, with what reads and writes its folders, Hub repositories and released files."""

    config: ModelConfig
    card: str | None = None  # of the folder or repository the model was loaded from
    released = False  # the weights are those of a released file

    def load_released(self, source: str | Path | Mapping[str, torch.Tensor]) -> Self:
        """Load a released `mmaudio_*.pth`, the `weights` of a training checkpoint, safetensors, or a state dict.

        Strict, except for the derived tensors of early files; parameters stay trainable. Returns self.
        """
        state = load_state(source, key="weights")
        self._load({name: value for name, value in state.items() if name not in DERIVED_TENSORS}, source)
        return self

    def _load(self, state: Mapping[str, torch.Tensor], source: Any) -> None:
        check_state(state, self.state_dict(), source)
        self.load_state_dict(state)
        self.released = is_released(source)

    @classmethod
    def from_config_and_state(cls, config: ModelConfig, state: Mapping[str, torch.Tensor], source: Any) -> Self:
        """Build without initialising, then copy the tensors of `state`; messages name `source` as their origin."""
        with torch.device("meta"):
            model = cls(config)
        check_state(state, model.state_dict(), source)  # before memory is taken for sizes that the file does not have
        model.to_empty(device="cpu")
        model._load(state, source)
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / CONFIG_FILE).write_text(json.dumps(to_dict(self.config), indent=2) + "\n")
        state = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        save_file(state, save_directory / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, map_location: str = "cpu", **options: Any
    ) -> Self:
        """Load a folder written by `save_pretrained`, or a repository on the Hub with `options` of `hf_hub_download`.

        ValueError naming the file that is missing, damaged, or does not fit. (The method of `ModelHubMixin` would read
        the configuration without these checks.)
        """
        if unknown := sorted(set(options) - set(_HUB_OPTIONS)):
            known = ", ".join(("map_location", *_HUB_OPTIONS))
            raise ValueError(f"from_pretrained does not know {', '.join(unknown)}; it takes {known}")
        source = str(pretrained_model_name_or_path)
        config_path, weights_path, card = _local_files(source) or _hub_files(source, options)
        model = cls.from_config_and_state(read_model_config(config_path), load_state(weights_path), weights_path)
        model.card = card
        return model.to(map_location).eval()

    def push_to_hub(self, repo_id: str, *, token: str | None = None, branch: str | None = None, **options: Any) -> str:
        """Like `ModelHubMixin.push_to_hub`, but what people wrote into the card of the repository is kept."""
        card = {"repo_id": repo_id, "existing": download_card(repo_id, token=token, revision=branch)}
        return super().push_to_hub(repo_id, token=token, branch=branch, model_card_kwargs=card, **options)

    def generate_model_card(self, repo_id: str = PLACEHOLDER, existing: str | None = None) -> ModelCard:
        """The card the model was loaded with, else one of its sizes; see `hub_client.merge_cards` for `existing`."""
        card = self.card or network_card(self.config, released=self.released)
        return ModelCard(merge_cards(existing, readdress(card, repo_id)), ignore_metadata_errors=True)


def _local_files(source: str) -> tuple[Path, Path, str | None] | None:
    """Files of config and weights, and the card, in a folder; None when `source` is no folder."""
    folder = Path(source)
    if not folder.is_dir():
        return None
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: it is not a saved MMAudio model")
    card = folder / CARD_FILE
    return folder / CONFIG_FILE, folder / WEIGHTS_FILE, card.read_text(encoding="utf-8") if card.is_file() else None


def _hub_files(repo_id: str, given: Mapping[str, Any]) -> tuple[Path, Path, str | None]:
    """As `_local_files`, downloaded from the Hub or its cache with the options of `from_pretrained`."""
    options = dict(given)
    if not options.get("local_files_only"):
        check_file_names(repo_id, options.get("revision"), options.get("token"))
    with hub_errors(repo_id):
        config = Path(hf_hub_download(repo_id, CONFIG_FILE, **options))
        options["revision"] = config.parent.name  # its commit: another push may come between the downloads
        weights = Path(hf_hub_download(repo_id, WEIGHTS_FILE, **options))
        try:
            card = Path(hf_hub_download(repo_id, CARD_FILE, **options)).read_text(encoding="utf-8")
        except EntryNotFoundError:  # no card, or none in the cache of a machine that is offline
            card = None
    return config, weights, card


def read_model_config(path: str | Path) -> ModelConfig:
    """Read a `config.json` written by `save_pretrained`; ValueError naming the file and key when it does not fit."""
    return model_config(read_json(path), path)


def find_pretrained(source: str | os.PathLike, *, revision: str | None = None) -> Path:
    """Folder with config.json and model.safetensors: of a run, a checkpoint, itself, or downloaded from the Hub.

    On the Hub it is owner/name[@revision], or `revision` names that. ValueError naming what is missing, and
    ConnectionError when the Hub cannot be reached and its cache does not hold the model.
    """
    folder = Path(source)
    if folder.is_dir():
        for candidate in (folder, folder / "pretrained_model", folder / "last" / "pretrained_model"):
            if (candidate / CONFIG_FILE).is_file() and (candidate / WEIGHTS_FILE).is_file():
                return candidate
        raise ValueError(
            f"{folder} holds no trained network: give a run folder with a checkpoint, a checkpoint,"
            f" or a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    if folder.is_absolute() or str(source).startswith(".") or str(source).partition("@")[0].count("/") != 1:
        raise ValueError(f"{source} is neither a folder nor a Hub id (owner/name)")
    if folder.parent.is_dir():
        raise ValueError(f"{source}: no such run folder ({folder.parent} is a folder, so the Hub was not searched)")
    repo, named = split_hub_id(str(source))
    if revision and named:
        raise ValueError(f"{source} names a revision, and revision={revision} is another: give one of them")
    check_file_names(repo, revision or named)
    with hub_errors(repo):
        downloaded = Path(snapshot_download(repo, revision=revision or named, allow_patterns=list(PUBLISHED_FILES)))
    if not all((downloaded / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        raise ValueError(f"Hub repository {repo} holds no network: it has no {CONFIG_FILE} and {WEIGHTS_FILE}")
    return downloaded


# --- the card of a model of which only its sizes are known -----------------------------------------------------------


def network_card(config: ModelConfig, repo_id: str = PLACEHOLDER, released: bool = False) -> str:
    """Card of a model of which only its sizes are known, and whether its weights are released ones."""
    data = ModelCardData(
        library_name="mmaudio_hf",
        pipeline_tag="text-to-audio",
        license=RELEASED_LICENSE if released else None,
        base_model=RELEASED if released else None,
        tags=list(TAGS),
    )
    licence = "Its weights are those of the MMAudio release, CC-BY-NC 4.0." if released else "Licence: not stated."
    return compose_card(data, f"# MMAudio\n\n{describe_network(config)}\n\n{usage(repo_id)}\n{licence}")


def describe_network(config: ModelConfig) -> str:
    """One paragraph on what a model is."""
    rate = audio_mode(config.mode).sample_rate / 1000
    return (
        "An [MMAudio](https://arxiv.org/abs/2412.15322) flow matching model: audio for a video, a text, or both."
        f" It generates {config.duration:g} s of mono audio at {rate:g} kHz; {config.depth} blocks of width"
        f" {config.hidden_dim} (variant `{config.variant}`)."
    )


def usage(repo_id: str) -> str:
    """How a model of a repository is used: from Python, and on the command line."""
    return f"""## Use

```python
from mmaudio_hf import MMAudioPipeline
from mmaudio_hf.generation.pipeline import save_generated

pipeline = MMAudioPipeline.from_pretrained("{repo_id}")
result = pipeline(video="clip.mp4", prompt="a dog barks")
save_generated(result, "clip_with_audio.mp4", video="clip.mp4")
```

```bash
mmaudio-hf generate --run {repo_id} --video clip.mp4 --prompt "a dog barks" --out clip_with_audio.mp4
```
"""


def readdress(card: str, repo_id: str) -> str:
    """`card` with `repo_id` in its section on usage, in place of the repository that this names."""
    section = card_section(card)
    named = re.search(r"^mmaudio-hf generate --run (\S+)", section[1], re.MULTILINE) if section else None
    if section is None or named is None:
        return card
    return card[: section.start()] + section[0].replace(named[1], repo_id) + card[section.end() :]
