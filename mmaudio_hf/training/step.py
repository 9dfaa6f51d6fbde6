"""From a batch to the loss of every sample: one function for training and validation (spec networks, section 4)."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from mmaudio_hf.config import FlowConfig
from mmaudio_hf.data.loader import Batch
from mmaudio_hf.models.flow import flow_loss, interpolate, sample_time, velocity_target


class Objective(NamedTuple):
    """What the network sees and should answer."""

    latent: torch.Tensor  # (B, N, C), x_t
    t: torch.Tensor  # (B,)
    target: torch.Tensor  # (B, N, C)
    clip_missing: torch.Tensor  # (B,) bool: absent or dropped
    sync_missing: torch.Tensor
    text_missing: torch.Tensor


class StepResult(NamedTuple):
    """Per-sample losses and the times they were taken at, both (B,), float32."""

    loss: torch.Tensor
    t: torch.Tensor


def make_objective(batch: Batch, flow: FlowConfig, latent_mean: torch.Tensor, latent_std: torch.Tensor) -> Objective:
    """Noise, time, path and condition dropping of a batch; all randomness is in `batch.draws`.

    A fresh VAE sample is drawn at every visit, because the store holds the latent's distribution and not a sample.
    """
    draws = batch.draws
    x1 = (batch.mean + batch.std * draws.latent_noise - latent_mean) / latent_std
    t = sample_time(draws.z, flow.time_mean, flow.time_scale)
    drop = flow.condition_dropout
    if flow.independent_video_dropout:
        drop_clip, drop_sync = draws.drop_clip < drop, draws.drop_sync < drop
    else:
        drop_clip = drop_sync = draws.drop_video < drop
    return Objective(
        latent=interpolate(draws.x0, x1, t, flow.min_sigma),
        t=t,
        target=velocity_target(draws.x0, x1, flow.min_sigma),
        clip_missing=~batch.has_video | drop_clip,
        sync_missing=~batch.has_video | drop_sync,
        text_missing=~batch.has_text | (draws.drop_text < drop),
    )


def spread_video_rows(features: torch.Tensor, video_rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """(Bv, ...) features of the samples that have video as (B, ...), zero elsewhere; made on the device."""
    if features.shape[0] == batch_size:
        return features
    return features.new_zeros(batch_size, *features.shape[1:]).index_copy_(0, video_rows, features)


def flow_step(
    forward: Callable[..., torch.Tensor],
    batch: Batch,
    flow: FlowConfig,
    latent_mean: torch.Tensor,
    latent_std: torch.Tensor,
) -> StepResult:
    """Loss of every sample of the batch under `forward` (an `MMAudio`, wrapped or not)."""
    size = batch.mean.shape[0]
    objective = make_objective(batch, flow, latent_mean, latent_std)
    velocity = forward(
        objective.latent,
        spread_video_rows(batch.clip_features, batch.video_rows, size),
        spread_video_rows(batch.sync_features, batch.video_rows, size),
        batch.text_features,
        objective.t,
        clip_missing=objective.clip_missing,
        sync_missing=objective.sync_missing,
        text_missing=objective.text_missing,
    )
    return StepResult(flow_loss(velocity, objective.target), objective.t)
