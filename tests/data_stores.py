"""Small feature stores for the tests of `mmaudio_hf.data`."""

from pathlib import Path

import torch

from mmaudio_hf.config import ModelConfig
from mmaudio_hf.data.store import FeatureStore, StoreWriter

METADATA = {"mode": "16k", "duration": 8.0, "encoders": {"clip": {"id": "toy", "fingerprint": "c1"}}}
SHAPES = {
    "mean": (5, 4),
    "std": (5, 4),
    "clip_features": (6, 8),
    "sync_features": (16, 3),
    "text_features": (7, 8),
}
AUDIO_SHAPES = {name: SHAPES[name] for name in ("mean", "std", "text_features")}
# The sizes above, as a model would ask for them.
MODEL = ModelConfig(
    latent_length=5,
    latent_channels=4,
    clip_length=6,
    clip_dim=8,
    sync_length=16,
    sync_dim=3,
    text_tokens=7,
    text_dim=8,
)


def random_values(rows: int, shapes=SHAPES, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random rows of every column."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, *shape, generator=generator) for name, shape in shapes.items()}


def make_store(path: Path, rows: int, shapes=SHAPES, seed: int = 0, **metadata) -> FeatureStore:
    """A store of random rows with ids `<name>_<row>`."""
    with StoreWriter(path, shapes, rows, **{**METADATA, **metadata}) as writer:
        ids = [f"{path.name}_{row:03d}" for row in range(rows)]
        writer.write(0, ids, [f"caption {row}" for row in range(rows)], random_values(rows, shapes, seed))
    return FeatureStore.open(path)
