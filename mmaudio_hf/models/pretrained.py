"""Where a trained network is: a folder of a run, or the Hub."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from mmaudio_hf.hub_client import api, hub_errors
from mmaudio_hf.models.card import CARD_FILE
from mmaudio_hf.models.network import CONFIG_FILE, WEIGHTS_FILE
from mmaudio_hf.schema import split_hub_id

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
