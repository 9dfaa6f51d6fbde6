"""Name-seeded inputs and weights, access to the golden files beside this module, and guidance in its plain form.

A golden file holds the outputs of the reference implementation for inputs and weights that both sides can make
from names alone, so no trained weights are needed. Every array comes from `normal(name, shape, seed)`.
"""

import csv
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from mmaudio_hf.models.blocks import Conditions
from mmaudio_hf.models.flow import guided_velocity
from mmaudio_hf.models.network import MMAudio

GOLDEN = Path(__file__).parent / "golden"
WEIGHT_SEED = 1001
INPUT_SEED = 2002
MEDIA_SEED = 20250101

_SPREADS = {"empty_string_feat", "empty_clip_feat", "empty_sync_feat", "sync_pos_emb"}
_SPREADS |= {"cls_token", "pos_embed", "temp_embed"}


def normal(name: str, shape, seed: int = INPUT_SEED) -> np.ndarray:
    """Standard normal float32 array that depends on nothing but its name, shape and seed."""
    generator = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))
    return np.asarray(generator.standard_normal(tuple(shape), dtype=np.float32), dtype=np.float32)


def tensor(name: str, shape, seed: int = INPUT_SEED) -> torch.Tensor:
    """`normal` as a tensor."""
    return torch.from_numpy(normal(name, shape, seed))


def weight(name: str, shape, seed: int = WEIGHT_SEED) -> np.ndarray | None:
    """Value of the tensor called `name` in a name-seeded state dict; None for constants, which keep theirs."""
    f = np.float32
    leaf = name.split(".")[-1]
    if leaf in ("data_mean", "data_std", "filter"):
        return None
    x = normal(name, shape, seed)
    if leaf == "latent_mean":
        return f(0.3) * x
    if leaf == "latent_std":
        return f(0.8) * np.exp(f(0.2) * x)
    if leaf in _SPREADS:
        return f(0.5) * x
    if leaf == "weight_g":
        gain = 1.1 if name.startswith("ups.") else 0.25 if name.startswith("conv_post") else 0.5
        return f(gain) * np.abs(1 + f(0.1) * x)
    if leaf in ("alpha", "beta"):
        return f(0.3) * x
    if leaf == "learnable_gain":
        return f(0.1) * x
    if leaf in ("bias", "in_proj_bias"):
        return f(0.02) * x
    if len(shape) == 1:
        return 1 + f(0.1) * x
    x /= f(math.sqrt(np.prod(shape[1:])))
    return x


def listed_shapes(listing: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released state dict, from `state_dict_keys/<listing>.tsv`."""
    with open(GOLDEN / "state_dict_keys" / f"{listing}.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    parse = lambda text: () if text == "scalar" else tuple(int(n) for n in text.split("x"))  # noqa: E731
    return {row["name"]: parse(row["shape"]) for row in rows}


def state_dict(listing: str, prefix: str = "", seed: int = WEIGHT_SEED) -> dict[str, torch.Tensor]:
    """Name-seeded state dict with the names and shapes of `listing`; constants are left out.

    `prefix` is put before each name when its value is drawn, not in the returned keys.
    """
    values = {name: weight(prefix + name, shape, seed) for name, shape in listed_shapes(listing).items()}
    return {name: torch.from_numpy(np.asarray(value)) for name, value in values.items() if value is not None}


def golden(case: str) -> dict[str, np.ndarray]:
    """Arrays of one golden file, without pickle; `meta` is parsed from JSON."""
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    if "meta" in arrays:
        arrays["meta"] = json.loads(str(arrays["meta"]))
    return arrays


def relative_error(ours, arrays: dict[str, np.ndarray], key: str) -> float:
    """Relative L2 distance of `ours` from golden array `key`, stored whole or as a strided slice."""
    ours = np.asarray(ours.detach().cpu() if isinstance(ours, torch.Tensor) else ours, dtype=np.float64)
    if key in arrays:
        theirs = arrays[key]
        assert ours.shape == theirs.shape, f"{key}: shape {ours.shape}, golden has {theirs.shape}"
    else:
        assert ours.shape == tuple(arrays[f"{key}.shape"]), f"{key}: shape {ours.shape}"
        theirs = arrays[f"{key}.slice"]
        ours = ours.ravel()[:: int(arrays[f"{key}.stride"])]
    theirs = theirs.astype(np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def plain_guided_velocity(
    model: MMAudio,
    latent: torch.Tensor,
    t: torch.Tensor,
    conditions: Conditions,
    unconditional: Conditions,
    guidance_scale: float,
) -> torch.Tensor:
    """Velocity with guidance by two passes of the model: what `models.sampling` must agree with."""
    conditional = model.predict_velocity(latent, t, conditions)
    if guidance_scale < 1:
        return conditional
    return guided_velocity(conditional, model.predict_velocity(latent, t, unconditional), guidance_scale)
