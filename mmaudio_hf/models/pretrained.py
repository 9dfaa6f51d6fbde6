"""Where a trained network is: a folder of a run, or the Hub."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from mmaudio_hf.models.card import CARD_FILE
from mmaudio_hf.models.network import CONFIG_FILE, WEIGHTS_FILE

ENCODERS_FILE = "encoders.json"
# What is fetched from the Hub; a model repository may hold more.
PUBLISHED_FILES = (CONFIG_FILE, WEIGHTS_FILE, "weights.json", ENCODERS_FILE, "toy_codec_*.safetensors", CARD_FILE)


def find_pretrained(source: str | os.PathLike, *, revision: str | None = None) -> Path:
    """Folder with config.json and model.safetensors: of a run, a checkpoint, itself, or fetched from the Hub."""
    folder = Path(source)
    if folder.is_dir():
        for candidate in (folder, folder / "pretrained_model", folder / "last" / "pretrained_model"):
            if (candidate / CONFIG_FILE).is_file() and (candidate / WEIGHTS_FILE).is_file():
                return candidate
        raise ValueError(
            f"{folder} holds no trained network: give a run folder with a checkpoint, a checkpoint,"
            f" or a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    if folder.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise ValueError(f"{source} is neither a folder nor a Hub id (owner/name)")
    if folder.parent.is_dir():
        raise ValueError(f"{source}: no such run folder ({folder.parent} is a folder here, so the Hub was not asked)")
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(PUBLISHED_FILES)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is no folder here, and cannot be fetched from the Hub: {error}") from error
