"""Where a trained network is: a folder of a run, or the Hub."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCardData, RepoCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mmaudio_hf.config import RELEASED_LICENSE, ModelConfig
from mmaudio_hf.hub_client import api, hub_errors
from mmaudio_hf.schema import audio_mode, split_hub_id

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
ENCODERS_FILE = "encoders.json"
# What is fetched from the Hub; a model repository may hold more.
PUBLISHED_FILES = (
    *(CONFIG_FILE, WEIGHTS_FILE, "weights.json", ENCODERS_FILE, CARD_FILE),
    *("toy_codec_16k.safetensors", "toy_codec_44k.safetensors"),
)


def find_pretrained(source: str | os.PathLike, *, revision: str | None = None) -> Path:
    """Folder with config.json and model.safetensors: of a run, a checkpoint, itself, or fetched from the Hub.

    On the Hub it is owner/name[@revision], or `revision` names that. ValueError naming what is missing, and
    ConnectionError when the Hub cannot be reached and its cache does not hold the network.
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
        raise ValueError(f"{source}: no such run folder ({folder.parent} is a folder here, so the Hub was not asked)")
    repo, named = split_hub_id(str(source))
    if revision and named:
        raise ValueError(f"{source} names a revision, and another one is asked for: {revision}")
    api()  # sets the limits on waiting
    with hub_errors(repo):
        fetched = Path(snapshot_download(repo, revision=revision or named, allow_patterns=list(PUBLISHED_FILES)))
    if not all((fetched / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        raise ValueError(f"Hub repository {repo} holds no network: it has no {CONFIG_FILE} and {WEIGHTS_FILE}")
    return fetched


# --- Cards of repositories on the Hub --------------------------------------------------------------------------------


OPEN = "<!-- mmaudio_hf: this part is written anew with every push; what stands outside of it is kept -->"
CLOSE = "<!-- mmaudio_hf: end -->"
PLACEHOLDER = "USER/NAME"  # stands for the id of a repository until there is one
RELEASED = "hkchengrex/MMAudio"  # the released networks on the Hub
TAGS = ("mmaudio", "video-to-audio", "audio-generation", "flow-matching")
# How the card begins that huggingface_hub writes by default.
_DEFAULT_CARD = "This model has been pushed to the Hub using the [PytorchModelHubMixin]"
_SPECIAL = re.compile(r"([!#$%&*+./:<=>@\[\\\]^_`{|}~])")


def plain(text: str, limit: int = 200) -> str:
    """Words that come from files, as one line of Markdown in which nothing has a meaning; cut at `limit` characters."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return _SPECIAL.sub(r"\\\1", words if len(words) <= limit else f"{words[: limit - 1]}…")


def hub_id(source: str) -> str:
    """`source` when it has the form of a repository on the Hub, else nothing."""
    return source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""


def linked(source: str) -> str:
    """A dataset of the Hub or an address as a link, other words as they are."""
    url = f"https://huggingface.co/datasets/{source}" if hub_id(source) else source
    return f"[{plain(source)}]({url})" if re.fullmatch(r"https?://[\w./~%?=&#:+-]+", url) else plain(source)


def compose(data: CardData, body: str) -> str:
    """A card: metadata, then `body` between the marks."""
    return f"---\n{data.to_yaml()}\n---\n\n{OPEN}\n\n{body.strip()}\n\n{CLOSE}\n"


def merge(existing: str | None, new: str) -> str:
    """`new`, a card of `compose`, with what the owners of the repository wrote into the `existing` one.

    Of the metadata, keys that `new` has are replaced, tags and datasets joined, results of other models kept. Of the
    text, the part between the marks is replaced; where there is none, ours comes after theirs. ValueError when the
    metadata of the existing card cannot be read.
    """
    if existing is None:
        return new
    try:
        theirs, ours = RepoCard(existing), RepoCard(new)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of {CARD_FILE} on the Hub cannot be read ({error}): mend it there") from error
    data = {**theirs.data.to_dict(), **ours.data.to_dict()}
    for key in ("tags", "datasets"):
        both = [*_as_list(theirs.data.get(key)), *_as_list(ours.data.get(key))]
        if both:
            data[key] = list(dict.fromkeys(both))
    results = _as_list(ours.data.get("model-index"))
    names = [result["name"] for result in results]
    results += [r for r in _as_list(theirs.data.get("model-index")) if _name(r) not in names]
    if results:
        data["model-index"] = results
    section = new[new.index(OPEN) : new.index(CLOSE) + len(CLOSE)]
    before, found, rest = theirs.text.partition(OPEN)
    _, closed, after = rest.partition(CLOSE)
    if found and closed:
        text = before + section + after
    elif theirs.text.strip() and not theirs.text.strip().startswith(_DEFAULT_CARD):
        text = f"{theirs.text.rstrip()}\n\n{section}\n"
    else:
        text = f"\n{section}\n"
    return f"---\n{CardData(**data).to_yaml()}\n---\n{text}"


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _name(result: Any) -> Any:
    return result.get("name") if isinstance(result, dict) else None


def readdress(card: str, repo_id: str) -> str:
    """`card` for another repository: what our part of it says of the use names `repo_id`."""
    before, opened, rest = card.partition(OPEN)
    ours, closed, after = rest.partition(CLOSE)
    named = re.search(r"^mmaudio-hf generate --run (\S+)", ours, re.MULTILINE)
    return before + opened + (ours.replace(named[1], repo_id) if named else ours) + closed + after


def card_metadata(file: Path) -> dict[str, Any]:
    """Metadata of the card in a file; nothing when there is none or it cannot be read."""
    try:
        return RepoCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def download_card(repo_id: str, repo_type: str = "model", **options: Any) -> str | None:
    """Card that a repository on the Hub has now; None when there is no such repository, or no card in it.

    Errors are those of huggingface_hub; a copy in the cache, which may be older, does not do.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = hf_hub_download(repo_id, CARD_FILE, repo_type=repo_type, local_dir=folder, **options)
        except LocalEntryNotFoundError:  # it could not be asked for, which is one of the next by its class
            raise
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        return Path(file).read_text(encoding="utf-8")


def usage(repo_id: str) -> str:
    """How a network of a repository is used: from Python, and on the command line."""
    return f"""## Use

```python
from mmaudio_hf import MMAudioPipeline
from mmaudio_hf.generation.pipeline import save_generated

pipeline = MMAudioPipeline.from_pretrained("{repo_id}")
sound = pipeline(video="clip.mp4", prompt="a dog barks")
save_generated(sound, "clip_with_sound.mp4", video="clip.mp4")
```

```bash
mmaudio-hf generate --run {repo_id} --video clip.mp4 --prompt "a dog barks" --out clip_with_sound.mp4
```
"""


def network_card(config: ModelConfig, repo_id: str = PLACEHOLDER, released: bool = False) -> str:
    """Card of a network of which only its sizes are known, and whether its weights are released ones."""
    data = ModelCardData(
        library_name="mmaudio_hf",
        pipeline_tag="text-to-audio",
        license=RELEASED_LICENSE if released else None,
        base_model=RELEASED if released else None,
        tags=list(TAGS),
    )
    licence = "Its weights are those of the MMAudio release, CC-BY-NC 4.0." if released else "Licence: not stated."
    return compose(data, f"# MMAudio\n\n{describe_network(config)}\n\n{usage(repo_id)}\n{licence}")


def describe_network(config: ModelConfig) -> str:
    """One paragraph on what a network is."""
    rate = audio_mode(config.mode).sample_rate / 1000
    return (
        "An [MMAudio](https://arxiv.org/abs/2412.15322) flow network: sound for a video, a text, or both."
        f" It makes {config.duration:g} s of mono sound at {rate:g} kHz; {config.depth} blocks of width"
        f" {config.hidden_dim} (variant `{config.variant}`)."
    )
