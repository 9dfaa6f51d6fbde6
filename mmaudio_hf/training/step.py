"""From a batch to the loss of every sample: one function for training and validation (MMAudio, arXiv 2412.15322).

Shapes: B samples, N latent tokens, C latent channels; Bv of the samples have video.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from mmaudio_hf.config import FlowConfig
from mmaudio_hf.data.loader import Batch
from mmaudio_hf.models.flow import flow_loss, interpolate, sample_time, velocity_target
from mmaudio_hf.schema import checked


class Objective(NamedTuple):
    """Inputs of the model and its target."""

    latent: torch.Tensor  # (B, N, C), x_t
    t: torch.Tensor  # (B,)
    target: torch.Tensor  # (B, N, C), velocity
    clip_missing: torch.Tensor  # (B,) bool: absent or dropped
    sync_missing: torch.Tensor
    text_missing: torch.Tensor


class StepResult(NamedTuple):
    """Per-sample losses and their times, both (B,), float32."""

    loss: torch.Tensor
    t: torch.Tensor


@checked
def make_objective(batch: Batch, flow: FlowConfig, latent_mean: torch.Tensor, latent_std: torch.Tensor) -> Objective:
    """Noise, time, path and condition dropout of a batch; all randomness is in `batch.noise`.

    The VAE latent is sampled again at every visit: the store holds its distribution (mean, std) and not a sample.
    """
    noise = batch.noise
    x1_BNC = (batch.mean + batch.std * noise.latent_noise - latent_mean) / latent_std
    t_B = sample_time(noise.z, flow.time_mean, flow.time_scale)
    dropout = flow.condition_dropout
    # Video and text are dropped independently, for classifier-free guidance (Ho & Salimans 2022, algorithm 1).
    # MMAudio drops CLIP and sync features together; the option drops each by its own number.
    if flow.independent_video_dropout:
        drop_clip, drop_sync = noise.drop_clip < dropout, noise.drop_sync < dropout
    else:
        drop_clip = drop_sync = noise.drop_video < dropout
    return Objective(
        latent=interpolate(noise.x0, x1_BNC, t_B, flow.min_sigma),
        t=t_B,
        target=velocity_target(noise.x0, x1_BNC, flow.min_sigma),
        clip_missing=~batch.has_video | drop_clip,
        sync_missing=~batch.has_video | drop_sync,
        text_missing=~batch.has_text | (noise.drop_text < dropout),
    )


def expand_video_rows(features: torch.Tensor, video_rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """(Bv, ...) features of the samples that have video to (B, ...), zero elsewhere.

    Done on the device, so that zeros are not copied to it. `video_rows` (Bv,) are rows of the batch.
    """
    if features.shape[0] == batch_size:
        return features
    return features.new_zeros(batch_size, *features.shape[1:]).index_copy_(0, video_rows, features)


@checked
def flow_step(
    forward: Callable[..., torch.Tensor],
    batch: Batch,
    flow: FlowConfig,
    latent_mean: torch.Tensor,
    latent_std: torch.Tensor,
) -> StepResult:
    """Flow-matching loss of every sample of the batch under `forward` (an `MMAudio`, wrapped by DDP or not)."""
    batch_size = batch.mean.shape[0]
    objective = make_objective(batch, flow, latent_mean, latent_std)
    velocity_BNC = forward(
        objective.latent,
        expand_video_rows(batch.clip_features, batch.video_rows, batch_size),
        expand_video_rows(batch.sync_features, batch.video_rows, batch_size),
        batch.text_features,
        objective.t,
        clip_missing=objective.clip_missing,
        sync_missing=objective.sync_missing,
        text_missing=objective.text_missing,
    )
    return StepResult(flow_loss(velocity_BNC, objective.target), objective.t)
