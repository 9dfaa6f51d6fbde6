"""Folders and Hub repositories of trained models: config.json, model.safetensors and a card.

`PretrainedModel` gives the model its `from_pretrained`, `save_pretrained`, `push_to_hub` and `load_released`.
"""

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from torch import nn

from mmaudio_hf.config import (
    RELEASED_LICENSE,
    EncoderConfig,
    ModelConfig,
    is_released,
    model_config,
    read_json,
    to_dict,
)
from mmaudio_hf.hub_client import (
    CARD_FILE,
    card_section,
    check_file_names,
    compose_card,
    download_card,
    hub_errors,
    merge_cards,
)
from mmaudio_hf.schema import audio_mode, checked, split_hub_id
from mmaudio_hf.weights import check_state, load_state, save_tensors

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
WEIGHTS_ENDINGS = (".pth", ".pt", ".safetensors")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # peft's names
_HUB_OPTIONS: dict[str, Any] = {  # with their kinds, as in huggingface_hub
    "revision": str | None,
    "subfolder": str | None,
    "cache_dir": str | os.PathLike | None,
    "force_download": bool | None,
    "local_files_only": bool | None,
    "token": str | bool | None,
}
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

    @checked
    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Like `ModelHubMixin.save_pretrained`: write config.json, model.safetensors and a card into a folder."""
        if Path(save_directory).is_file():
            raise ValueError(f"{save_directory} is a file, not a folder to save to")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / CONFIG_FILE).write_text(json.dumps(to_dict(self.config), indent=2) + "\n")
        save_tensors(self.state_dict(), save_directory / WEIGHTS_FILE, {"format": "pt"})

    @classmethod
    @checked
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, map_location: str = "cpu", **options: Any
    ) -> Self:
        """Load a run folder, a folder written by `save_pretrained`, a file of released weights, or a Hub repository.

        options: revision, subfolder, token, cache_dir, local_files_only and force_download, as in huggingface_hub.
        ValueError naming the file that is missing, damaged, or does not fit. (The method of `ModelHubMixin` would read
        the configuration without these checks.)
        """
        check_hub_options(options, ("map_location",))
        config, state, path = read_network(pretrained_model_name_or_path, **options)
        model = cls.from_config_and_state(config, state, path)
        card = path.with_name(CARD_FILE)
        if path.with_name(CONFIG_FILE).is_file() and card.is_file():  # else the card is not that of this file
            model.card = card.read_text(encoding="utf-8")
        try:
            return model.to(map_location).eval()
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(f"map_location {map_location!r}: {str(error).splitlines()[0]}") from None

    @checked
    def push_to_hub(self, repo_id: str, *, token: str | None = None, branch: str | None = None, **options: Any) -> str:
        """Like `ModelHubMixin.push_to_hub`, but what people wrote into the card of the repository is kept."""
        with hub_errors(repo_id):
            card = {"repo_id": repo_id, "existing": download_card(repo_id, token=token, revision=branch)}
            return super().push_to_hub(repo_id, token=token, branch=branch, model_card_kwargs=card, **options)

    def generate_model_card(self, repo_id: str = PLACEHOLDER, existing: str | None = None) -> ModelCard:
        """The card the model was loaded with, else one of its sizes; see `hub_client.merge_cards` for `existing`."""
        card = self.card or network_card(self.config, released=self.released)
        return ModelCard(merge_cards(existing, readdress(card, repo_id)), ignore_metadata_errors=True)


def read_model_config(path: str | Path) -> ModelConfig:
    """Read a `config.json` written by `save_pretrained`; ValueError naming the file and key when it does not fit."""
    return model_config(read_json(path), path)


def write_encoders(folder: Path, encoders: EncoderConfig, alignment: str, paths: Iterable[str]) -> None:
    """Write the file of a folder that says how its features are made; `paths`: settings of places that it names too."""
    content = {name: getattr(encoders, name) for name in ("kind", "precision", *paths)} | {"alignment": alignment}
    (folder / ENCODERS_FILE).write_text(json.dumps(content, indent=1) + "\n")


def check_hub_options(options: Mapping[str, Any], others: Sequence[str] = ()) -> None:
    """ValueError for options that are neither in `others` nor of those that say what is downloaded, and how."""
    if unknown := sorted(set(options) - set(_HUB_OPTIONS)):
        hint = "; choose the device by device=" if "device_map" in unknown and "device" in others else ""
        known = ", ".join((*others, *_HUB_OPTIONS))
        raise ValueError(f"from_pretrained does not know {', '.join(unknown)}; it takes {known}{hint}")
    for name, value in options.items():
        if not isinstance(value, _HUB_OPTIONS[name]):
            raise ValueError(f"{name} must be {_HUB_OPTIONS[name]}, not a {type(value).__name__}")


def read_network(source: str | os.PathLike, **options: Any) -> tuple[ModelConfig, dict[str, torch.Tensor], Path]:
    """Configuration, tensors and file of a network: what `find_pretrained` takes, or a file of released weights.

    ValueError naming what is missing or does not fit.
    """
    if not is_weights_file(source):
        folder = find_pretrained(source, **options)
        return read_model_config(folder / CONFIG_FILE), load_state(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE
    from mmaudio_hf.models.convert import infer_config  # it imports the network, which imports this module

    if given := [name for name, value in options.items() if value]:
        raise ValueError(f"{source} is a file, for which {', '.join(given)} is without meaning: leave it out")
    state = {name: value for name, value in load_state(source, key="weights").items() if name not in DERIVED_TENSORS}
    return infer_config(state, source), state, Path(source)


def is_weights_file(source: str | os.PathLike) -> bool:
    """Whether `source` is a file, or is called as a file of weights is."""
    return isinstance(source, str | os.PathLike) and (Path(source).is_file() or Path(source).suffix in WEIGHTS_ENDINGS)


def find_pretrained(
    source: str | os.PathLike, *, revision: str | None = None, subfolder: str = "", **options: Any
) -> Path:
    """Folder with config.json and model.safetensors: of a run, a checkpoint, itself, or downloaded from the Hub.

    On the Hub it is owner/name[@revision], or `revision` names that; `options` are those of `snapshot_download`.
    ValueError naming what is missing, and ConnectionError when the Hub cannot be reached and its cache does not hold
    the model.
    """
    folder = _check_source(source, subfolder)
    if Path(source).is_dir():
        for candidate in (folder, folder / "pretrained_model", folder / "last" / "pretrained_model"):
            if (candidate / CONFIG_FILE).is_file() and (candidate / WEIGHTS_FILE).is_file():
                return candidate
        names = [str(path.relative_to(folder)) for path in (*folder.glob("*.*"), *folder.glob("weights/*.*"))]
        raise ValueError(f"{folder} holds no trained network: {_what_is_missing(names)}")
    path, names = _download(str(source), revision, subfolder, PUBLISHED_FILES, options)
    if not all((path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        missing = _what_is_missing(names, f"fetch one by `hf download {source} FILE` and ")
        where = f", folder {subfolder}," if subfolder else ""
        raise ValueError(f"Hub repository {source}{where} holds no network: {missing}")
    return path


def hub_config(source: str) -> tuple[ModelConfig, Path]:
    """Configuration of a network on the Hub and its file, without the weights; ValueError as `find_pretrained`."""
    folder, names = _download(source, None, "", (CONFIG_FILE, ENCODERS_FILE), {})
    if not (file := folder / CONFIG_FILE).is_file():
        raise ValueError(f"Hub repository {source} holds no network: {_what_is_missing(names)}")
    return read_model_config(file), file


def _check_source(source: Any, subfolder: str | None) -> Path:
    """The folder that the two name, if it is one here; ValueError for what is no name."""
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise ValueError(f"source: give a folder or a Hub id (owner/name), not {' '.join(repr(source).split())[:60]}")
    inside = PurePosixPath(subfolder or ".")
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"subfolder {subfolder!r} must be a folder inside {source}")
    return Path(source) / inside


def _download(
    source: str, revision: str | None, subfolder: str, patterns: Sequence[str], options: Mapping[str, Any]
) -> tuple[Path, list[str]]:
    """A folder with those of the `patterns` files that a repository has, and the names of all its files."""
    parent = Path(source).parent
    if Path(source).is_absolute() or source.startswith(".") or source.partition("@")[0].count("/") != 1:
        raise ValueError(f"{source} is neither a folder nor a Hub id (owner/name)")
    if parent.is_dir():
        raise ValueError(f"{source}: no such run folder ({parent} is a folder, so the Hub was not searched)")
    repo, named = split_hub_id(source)
    if revision and named:
        raise ValueError(f"{source} names a revision, and revision={revision} is another: give one of them")
    offline = options.get("local_files_only")
    names = [] if offline else check_file_names(repo, revision or named, options.get("token"))
    files = [f"{subfolder}/{name}" if subfolder else name for name in patterns]
    with hub_errors(repo):
        path = Path(snapshot_download(repo, revision=revision or named, allow_patterns=files, **options))
    return path / (subfolder or ""), names


def _what_is_missing(names: Iterable[str], fetch: str = "") -> str:
    """Second half of a message on a folder with files called `names`; released weights alone can be converted."""
    files = sorted(name for name in names if PurePosixPath(name).suffix in WEIGHTS_ENDINGS)
    text = f"it has no {CONFIG_FILE} and {WEIGHTS_FILE}"
    if not files or WEIGHTS_FILE in files:
        return f"{text}; give a run folder with a checkpoint, a checkpoint, or a folder with these two"
    listed = f"{', '.join(files[:5])}{' ...' if len(files) > 5 else ''}"
    return f"{text}, but {listed}: {fetch}give that file, or convert it by `mmaudio-hf weights convert FILE FOLDER`"


# --- adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """An adapter as peft writes it, read from `folder`."""

    folder: Path
    config: Any  # PeftConfig
    state: dict[str, torch.Tensor]


def read_adapter(
    source: str | os.PathLike, *, revision: str | None = None, subfolder: str = "", **options: Any
) -> Adapter:
    """An adapter of a folder, a run or a checkpoint, or downloaded as by `find_pretrained`.

    ValueError naming what is missing or damaged, and without peft.
    """
    try:
        from peft import PeftConfig
    except ImportError:
        raise ValueError("adapters need peft: run `pip install 'mmaudio-hf[lora]'`") from None
    folder = _check_source(source, subfolder)
    candidates = [folder, folder / "adapter", folder / "last" / "adapter"]
    if not Path(source).is_dir():
        files = [*ADAPTER_FILES, *(f"adapter/{name}" for name in ADAPTER_FILES)]  # a run is pushed with the latter
        root, _ = _download(str(source), revision, subfolder, files, options)
        candidates = [root, root / "adapter"]
    complete = [path for path in candidates if all((path / name).is_file() for name in ADAPTER_FILES)]
    if not complete:
        raise ValueError(f"{source} holds no adapter: it has no {' and '.join(ADAPTER_FILES)}")
    config, weights = (complete[0] / name for name in ADAPTER_FILES)
    read_json(config)
    try:
        return Adapter(complete[0], PeftConfig.from_pretrained(str(complete[0])), load_state(weights))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{config} is not the configuration of an adapter ({error})") from error


@torch.no_grad()
def merge_adapters(
    model: nn.Module, adapters: Sequence[tuple[Adapter, float]], originals: dict[str, torch.Tensor]
) -> None:
    """Merge adapters, each with a scale, into the weights of `model`, in place of those that are merged now.

    `originals` keeps the weights without adapters by name, on the CPU, from one call to the next: to subtract what was
    added would leave rounding. ValueError naming the folder of an adapter that does not fit.
    """
    for name, value in originals.items():
        model.get_parameter(name).copy_(value)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for adapter, scale in adapters:
        try:
            _merge_adapter(model, adapter, scale, originals)
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trainable)


def _merge_adapter(model: nn.Module, adapter: Adapter, scale: float, originals: dict[str, torch.Tensor]) -> None:
    from peft import PeftModel, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    wrapped: Any = None
    try:
        wrapped = PeftModel(model, copy.deepcopy(adapter.config))
        result: Any = set_peft_model_state_dict(wrapped, adapter.state)
        layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        missing = [name for name in result.missing_keys if "lora_" in name]
        if result.unexpected_keys or missing or not layers:
            differences = sorted([*result.unexpected_keys, *missing])[:2]
            raise ValueError(f"its configuration and its tensors differ in {', '.join(differences) or 'all layers'}")
        for name, layer in layers.items():
            originals.setdefault(f"{name}.weight", layer.get_base_layer().weight.detach().cpu().clone())
            layer.set_scale("default", scale)
        wrapped.merge_and_unload()
    except Exception as error:  # peft raises what torch and its own checks raise
        if wrapped is not None:
            wrapped.unload()
        reason = str(error).strip().splitlines()
        raise ValueError(f"{adapter.folder}: the adapter does not fit: {(reason or [repr(error)])[0]}") from error


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
