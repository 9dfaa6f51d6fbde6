"""Small feature stores and recipes for tests of training: one second of audio, a model of a few thousand weights."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mmaudio_hf.data.store import StoreWriter
from mmaudio_hf.features.toy import ToyMelCodec
from mmaudio_hf.schema import column_shapes

MODEL = {"variant": "small_16k", "hidden_dim": 64, "num_heads": 1, "depth": 2, "fused_depth": 1, "duration": 1.0}


def write_store(
    path: Path, rows: int, *, video: bool = True, seed: int = 0, duration: float = 1.0, mode: str = "16k"
) -> Path:
    """A store of random features whose latents depend on their sync features, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    shapes = column_shapes(mode, duration, video=video)
    values = {n: generator.standard_normal((rows, *s), dtype=np.float32) for n, s in shapes.items()}
    values["std"] = np.full_like(values["std"], 0.1)
    if video:
        lengths = shapes["mean"][0], shapes["sync_features"][0]
        nearest = np.arange(lengths[0]) * lengths[1] // lengths[0]
        values["mean"] = values["sync_features"][:, nearest, : shapes["mean"][1]] * 2 + 1
    ids = [f"{path.name}_{i:04d}" for i in range(rows)]
    encoders = {"toy": {"id": "random", "fingerprint": "0"}}
    with StoreWriter(path, shapes, rows, mode=mode, duration=duration, encoders=encoders) as writer:
        writer.write(0, ids, [f"caption {i}" for i in range(rows)], {n: torch.from_numpy(v) for n, v in values.items()})
    return path


def write_codec(folder: Path, seed: int = 0) -> None:
    """A toy codec of 16 kHz that is fitted to noise."""
    mels = [torch.randn(80, 64, generator=torch.Generator().manual_seed(seed + i)) for i in range(8)]
    (folder / "toy_codec_16k.safetensors").write_bytes(ToyMelCodec.fit("16k", mels).to_bytes())


def recipe_tree(folder: Path, **training: Any) -> dict[str, Any]:
    """Recipe over a video store of 24 rows, an audio store of 8 (twice) and a validation store of 5."""
    if not (folder / "videos").exists():
        write_store(folder / "videos", 24)
        write_store(folder / "audios", 8, video=False, seed=1)
        write_store(folder / "held_out", 5, seed=2)
    settings = {
        "steps": 12,
        "batch_size": 4,
        "mixed_precision": "no",
        "log_every": 3,
        "validate_every": 6,
        "checkpoint_every": 4,
        "trackers": [],
    }
    return {
        "name": "run",
        "seed": 7,
        "output_dir": str(folder / "output"),
        "model": MODEL,
        "encoders": {"kind": "toy", "weights_dir": str(folder)},
        "data": {
            "train": [{"path": str(folder / "videos")}, {"path": str(folder / "audios"), "repeats": 2}],
            "validation": [{"path": str(folder / "held_out")}],
        },
        "optim": {"learning_rate": 1e-3, "warmup_steps": 2, "milestones": [6]},
        "ema": {"snapshot_every": 4},
        "training": settings | training,
    }


def write_recipe(folder: Path, name: str = "run", **training: Any) -> Path:
    """Write `recipe_tree` as NAME.yaml. A run of this name is removed, for a test that is run once more."""
    shutil.rmtree(folder / "output" / name, ignore_errors=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(folder, **training) | {"name": name}))
    return path
