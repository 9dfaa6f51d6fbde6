"""A folder as a run publishes it: a tiny network of 1 s with toy encoders, its biases not zero."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from odd_media import Odd, steady, write_odd

from mmaudio_hf import MMAudio
from mmaudio_hf.config import EncoderConfig
from mmaudio_hf.features.encoders import fit_toy_codec

SIZES = {"hidden_dim": 64, "num_heads": 1, "depth": 2, "fused_depth": 1, "duration": 1.0}


def small_network() -> MMAudio:
    """The network alone."""
    torch.manual_seed(0)
    network = MMAudio.from_variant("small_16k", **SIZES)
    with torch.no_grad():
        for parameter in network.parameters():  # an untrained model ignores its conditions
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.set_latent_statistics(torch.full((20,), 0.1), torch.full((20,), 0.5))
    return network


def write_network(folder: Path) -> Path:
    """Write the files into `folder`, with `source.mp4`, whose audio the codec is fitted to; return the folder."""
    small_network().save_pretrained(folder)
    (folder / "encoders.json").write_text(json.dumps(asdict(EncoderConfig(kind="toy", weights_dir="/nowhere"))))
    source = write_odd(folder / "source.mp4", Odd(steady(1), audio_seconds=12.0))
    fit_toy_codec(folder, "16k", [source])
    return folder
