"""Train MMAudio, video and text to synchronised audio, in the Hugging Face ecosystem."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmaudio_hf.config import load_recipe
    from mmaudio_hf.data.store import FeatureStore
    from mmaudio_hf.generation.pipeline import MMAudioPipeline
    from mmaudio_hf.models.network import MMAudio

__all__ = ["FeatureStore", "MMAudio", "MMAudioPipeline", "load_recipe"]

_HOMES = {
    "MMAudio": "mmaudio_hf.models.network",
    "MMAudioPipeline": "mmaudio_hf.generation.pipeline",
    "FeatureStore": "mmaudio_hf.data.store",
    "load_recipe": "mmaudio_hf.config",
}


def __getattr__(name: str) -> Any:
    # Found on first use: reading a recipe must not import torch, nor training the media libraries.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
