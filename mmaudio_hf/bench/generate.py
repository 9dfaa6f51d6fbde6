"""`mmaudio-hf bench generate`: guided sampling against two plain passes a step, and what the other stages take."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

from mmaudio_hf.bench import emulates_bf16, synchronize
from mmaudio_hf.bench.extract import make_clip, randomised
from mmaudio_hf.config import ModelConfig, variant_config
from mmaudio_hf.features import autoencoder, clip, synchformer, vocoder
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.mux import write_video_with_audio
from mmaudio_hf.media.video import read_video
from mmaudio_hf.models.flow import guided_velocity
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.sampling import GuidedVelocity, winograd_convolutions
from mmaudio_hf.schema import (
    CLIP_PIXELS,
    LATENT_STRIDE,
    SYNC_TOKENS_PER_SEGMENT,
    TEXT_TOKENS,
    audio_mode,
    sequence_lengths,
)

STEPS, GUIDANCE = 25, 4.5
# Where bf16 is emulated, which is some hundred times slower
SMALL_BF16: dict[str, Any] = {"depth": 2, "fused_depth": 1, "duration": 1.0}
CLIP_LAYERS, CLIP_SHARE = (4, 3), 8  # image and text layers that are measured, and the factor to all of them
DECODED_SHARE = 10  # one in so many latents of a clip is decoded, and its time multiplied


def generate(
    variant: str = "small_16k",
    rounds: int = 3,
    precisions: Sequence[str] = ("fp32", "bf16"),
    batch_sizes: Sequence[int] = (1, 8),
    stages: bool = True,
) -> dict[str, float | str]:
    """Seconds per clip of 25 guided steps by `GuidedVelocity` and by plain passes, and of every other stage.

    The plain steps use conditions that are projected once, too, and evaluate the model twice. One step of each is
    measured in turn and multiplied, and what is prepared before the first step is added. Weights and features are
    random, which does not change their cost.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, float | str] = {"variant": variant, "device": device.type, "threads": torch.get_num_threads()}
    for precision in precisions:
        emulated = precision == "bf16" and emulates_bf16(device)
        model = _random_model(variant_config(variant, **(SMALL_BF16 if emulated else {}))).to(device)
        size = f"{model.config.duration:g} s, {model.config.depth} blocks"
        figures[f"{precision}_size"] = size + (" (bf16 is emulated here)" if emulated else "")
        for batch_size in batch_sizes:
            measured = _sampling(model, batch_size, precision, 1 if emulated else rounds)
            figures |= {f"{precision}_batch_{batch_size}_{name}": value for name, value in measured.items()}
    if stages:
        figures |= _stages(variant, device, rounds)
    return figures


@torch.no_grad()
def _random_model(config: ModelConfig) -> MMAudio:
    torch.manual_seed(0)
    model = MMAudio(config).eval()
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@torch.inference_mode()
def _sampling(model: MMAudio, batch_size: int, precision: str, rounds: int) -> dict[str, float]:
    config, device = model.config, model.empty_clip_feat.device
    shapes = (
        (config.clip_length, config.clip_dim),
        (config.sync_length, config.sync_dim),
        (config.text_tokens, config.text_dim),
        (config.latent_length, config.latent_channels),
    )
    *features, latent = (torch.randn(batch_size, *shape, device=device) for shape in shapes)
    t_B = torch.full((batch_size,), 0.5, device=device)
    velocities: dict[str, torch.Tensor] = {}
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        conditions, unconditional = model.preprocess_conditions(*features), model.empty_conditions(batch_size)
        began = time.perf_counter()
        ours = GuidedVelocity(model, conditions, unconditional, GUIDANCE)
        with winograd_convolutions(model, precision):
            synchronize(device)
            prepared = (time.perf_counter() - began) / batch_size

        def plain_step() -> None:
            branches = [model.predict_velocity(latent, t_B, given) for given in (conditions, unconditional)]
            velocities["plain"] = guided_velocity(branches[0], branches[1], GUIDANCE).float()

        def our_step() -> None:
            velocities["ours"] = ours(latent, t_B)

        for number in range(rounds + (rounds > 1)):  # the first is a warm-up
            plain = _seconds(plain_step, device)
            with winograd_convolutions(model, precision):
                our = _seconds(our_step, device)
            if number or rounds == 1:
                seconds["plain"].append(plain)
                seconds["ours"].append(our)
    plain, our = (STEPS * statistics.median(seconds[name]) / batch_size for name in ("plain", "ours"))
    our += prepared
    difference = (velocities["ours"] - velocities["plain"]).norm() / velocities["plain"].norm()
    return {
        "plain_seconds": plain,
        "ours_seconds": our,
        "plain_of_ours": plain / our,
        "prepare_share": prepared / our,
        "relative_difference": float(difference),
    }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def _stages(variant: str, device: torch.device, rounds: int) -> dict[str, float | str]:
    """Seconds per clip, batch 1 in float32, of reading, the encoders, the decoders and writing."""
    config = variant_config(variant)
    figures: dict[str, float | str] = {
        "stages_measured": f"CLIP with 1/{CLIP_SHARE} of its layers on one image, one Synchformer segment, "
        f"1/{DECODED_SHARE} of the latents; multiplied to a clip",
    }
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, run, times in _stage_runs(config.mode, config.latent_length, device, Path(folder)):
            run()  # a warm-up
            figures[f"stage_{name}_seconds"] = times * statistics.median(_seconds(run, device) for _ in range(rounds))
    return figures


def _stage_runs(mode: str, latents: int, device: torch.device, folder: Path) -> Iterator[tuple[str, Callable, float]]:
    """Name, something to run, and how many times of it a clip takes. One network is held at a time."""
    rate, lengths = audio_mode(mode), sequence_lengths(mode)
    video = make_clip(folder / "clip.mp4")
    yield "read", lambda: read_video(video, mode=mode, as_uint8=True, video_only=True), 1
    with torch.device("meta"):
        network: Any = CLIPModel(clip.clip_config(*CLIP_LAYERS))
    randomised(network, device)
    network = clip.ClipEncoder(network)
    image = torch.rand(1, 3, CLIP_PIXELS, CLIP_PIXELS, device=device)
    yield "encode_clip", lambda: network.encode_images(image), CLIP_SHARE * lengths.clip
    tokens = torch.zeros(1, TEXT_TOKENS, dtype=torch.long, device=device)
    yield "encode_text", lambda: network.encode_text(tokens), CLIP_SHARE
    network = None  # 0.5 GB
    network = randomised(synchformer.SynchformerVisual(), device)
    segment = torch.randn(1, 1, *synchformer.SEGMENT_SHAPE, device=device)
    yield "encode_sync", lambda: network(segment), lengths.sync // SYNC_TOKENS_PER_SEGMENT
    latent = torch.randn(1, max(1, latents // DECODED_SHARE), rate.latent_channels, device=device)
    share = latents / latent.shape[1]
    network = randomised(autoencoder.MelVAE(mode), device)
    yield "decode_latent", lambda: network.decode(latent), share
    mel = torch.randn(1, rate.mel_bins, LATENT_STRIDE * latent.shape[1], device=device)
    network = randomised(vocoder.Vocoder(mode), device)
    yield "vocoder", lambda: network(mel), share
    waveform = 0.1 * torch.randn(latents * LATENT_STRIDE * rate.mel_hop, device="cpu")
    yield "write_flac", lambda: write_audio(folder / "out.flac", waveform, rate.sample_rate), 1
    yield "write_mp4", lambda: write_video_with_audio(video, waveform, rate.sample_rate, folder / "out.mp4"), 1
