"""`mmaudio-hf bench generate`: guided sampling against two plain forwards per step, and what the other stages take."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import CLIPModel

from mmaudio_hf.bench import emulates_bf16, wait_for
from mmaudio_hf.bench.extract import make_clip, randomised
from mmaudio_hf.config import variant_config
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
SMALL_BF16 = {"depth": 2, "fused_depth": 1, "duration": 1.0}  # where it is emulated, some hundred times slower
CLIP_LAYERS, CLIP_SHARE = (4, 3), 8  # of the picture and text towers that are measured, and what they are multiplied by
DECODED_SHARE = 10  # of a clip's latents, one in so many is decoded and multiplied


def generate(
    variant: str = "small_16k",
    rounds: int = 3,
    precisions: Sequence[str] = ("fp32", "bf16"),
    batch_sizes: Sequence[int] = (1, 8),
    stages: bool = True,
) -> dict[str, float | str]:
    """Seconds per clip of 25 guided steps, of ours and of the plain loop, and of every other stage.

    The plain loop projects the conditions once, as ours does, and evaluates the network twice per step. Of both, one
    step is measured, in turn, and multiplied; what ours prepares before the first step is measured as well. Weights and
    features are random, which does not change their cost.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, float | str] = {"variant": variant, "device": device.type, "threads": torch.get_num_threads()}
    for precision in precisions:
        small = precision == "bf16" and emulates_bf16(device)
        changes = SMALL_BF16 if small else {}
        network = _network(variant, changes, device)
        seconds = f"{network.config.duration:g} s, {network.config.depth} blocks"
        figures[f"{precision}_size"] = seconds + (" (bf16 is emulated here)" if small else "")
        for batch_size in batch_sizes:
            found = _sampling(network, batch_size, precision, 1 if small else rounds)
            figures |= {f"{precision}_batch_{batch_size}_{name}": value for name, value in found.items()}
    if stages:
        figures |= _stages(variant, device, rounds)
    return figures


def _network(variant: str, changes: dict, device: torch.device) -> MMAudio:
    torch.manual_seed(0)
    network = MMAudio(variant_config(variant, **changes)).to(device).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


@torch.inference_mode()
def _sampling(network: MMAudio, batch_size: int, precision: str, rounds: int) -> dict[str, float]:
    config, device = network.config, network.empty_clip_feat.device
    shapes = (config.clip_length, config.clip_dim), (config.sync_length, config.sync_dim)
    features = [torch.randn(batch_size, *s, device=device) for s in (*shapes, (config.text_tokens, config.text_dim))]
    latent = torch.randn(batch_size, config.latent_length, config.latent_channels, device=device)
    t_B = torch.full((batch_size,), 0.5, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        conditions, empty = network.preprocess_conditions(*features), network.empty_conditions(batch_size)
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            ours = GuidedVelocity(network, conditions, empty, GUIDANCE)
            stack.enter_context(winograd_convolutions(network, precision))
            wait_for(device)
            prepared = time.perf_counter() - began
        results: dict[str, torch.Tensor] = {}

        def plain_step() -> None:
            branches = [network.predict_velocity(latent, t_B, given) for given in (conditions, empty)]
            results["plain"] = guided_velocity(*branches, GUIDANCE).float()

        def our_step() -> None:
            results["ours"] = ours(latent, t_B)

        times: dict[str, list[float]] = {"plain": [], "ours": []}
        for number in range(rounds + 1 if rounds > 1 else 1):
            plain = _seconds(plain_step, device)
            with winograd_convolutions(network, precision):
                our = _seconds(our_step, device)
            if number or rounds == 1:
                times["plain"].append(plain)
                times["ours"].append(our)
    plain, our = (STEPS * statistics.median(times[name]) / batch_size for name in ("plain", "ours"))
    our += prepared / batch_size
    difference = (results["ours"] - results["plain"]).norm() / results["plain"].norm()
    return {
        "plain_seconds": plain,
        "ours_seconds": our,
        "plain_of_ours": plain / our,
        "prepare_share": prepared / batch_size / our,
        "relative_difference": float(difference),
    }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    began = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - began


def _stages(variant: str, device: torch.device, rounds: int) -> dict[str, float | str]:
    """Seconds per clip, batch 1 in float32, of reading, the encoders, the decoders and writing."""
    config = variant_config(variant)
    figures: dict[str, float | str] = {
        "stages_measured": f"CLIP with 1/{CLIP_SHARE} of its layers on one picture, one Synchformer segment, "
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
        model = CLIPModel(clip.clip_config(*CLIP_LAYERS))
    network = clip.ClipEncoder(randomised(model, device))
    picture = torch.rand(1, 3, CLIP_PIXELS, CLIP_PIXELS, device=device)
    yield "encode_clip", lambda: network.encode_images(picture), CLIP_SHARE * lengths.clip
    tokens = torch.zeros(1, TEXT_TOKENS, dtype=torch.long, device=device)
    yield "encode_text", lambda: network.encode_text(tokens), CLIP_SHARE
    network = model = None  # 0.5 GB
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
