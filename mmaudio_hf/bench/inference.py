"""Benchmarks without training: `bench extract` (reading, encoders), `bench generate` (guided sampling, decoders) and
`bench scores` (published scores of cached features).

Reading is compared with one pass over the file per stream, encoders with a matrix product of the same precision,
sampling with a plain loop that evaluates the model twice per step.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchaudio.functional import resample
from transformers import CLIPModel

from mmaudio_hf.bench import Timed, compare, emulates_bf16, in_turn, median_rates, seconds, synchronize, time_matmul
from mmaudio_hf.config import ModelConfig, variant_config
from mmaudio_hf.evaluation.metrics import AUDIO_TOKENS, PANN_KEYS, SEGMENTS, TRUTH_FILES, VIDEO_TOKENS, OffsetHead
from mmaudio_hf.features import autoencoder, clip, synchformer, vocoder
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.mux import write_video_with_audio
from mmaudio_hf.media.video import read_video
from mmaudio_hf.models.flow import guided_velocity
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.sampling import GuidedVelocity, prepared_convolutions
from mmaudio_hf.schema import (
    CLIP_FPS,
    CLIP_PIXELS,
    LATENT_STRIDE,
    SYNC_DIM,
    SYNC_FPS,
    SYNC_PIXELS,
    SYNC_TOKENS_PER_SEGMENT,
    TEXT_TOKENS,
    audio_mode,
    sequence_lengths,
)

SECONDS, SIZE, FPS = 10, (1280, 720), 30  # of the clip that is made when none is given
SMALL_DEPTH, SMALL_FRAMES = 1, 64  # of bf16 where it is emulated, some hundred times slower
Module = TypeVar("Module", bound=torch.nn.Module)

MEMORY_COUNTS = (4, 16, 32)  # videos whose extraction is compared in peak memory, in shards of 4


def extract(video: Path | None = None, rounds: int = 3, mode: str = "16k") -> dict[str, float | str]:
    """Videos per second of decoding and preprocessing, GFLOP/s of the encoders, peak memory over few and many.

    The straightforward way decodes the file once per stream, frames through an fps filter, and resizes frame by frame;
    it gives the same frames. Both ways read as many files at once as there are cores, as extraction does,
    and each file with one thread. The encoders have random weights, which does not change their cost.
    """
    with tempfile.TemporaryDirectory() as folder:
        video = video or make_clip(Path(folder) / "clip.mp4")
        ways = [lambda: read_video(video, mode=mode, as_uint8=True), lambda: plain_read(video, mode)]
        cores = len(os.sched_getaffinity(0))
        (ours, plain), (our_work, plain_work) = _times(ways, cores, rounds).tolist()
        figures: dict[str, float | str] = {
            "video": video.name,
            "files_at_once": cores,
            "ours_videos_s": cores / ours,
            "straightforward_videos_s": cores / plain,
            "ratio": plain / ours,
            "ratio_of_processor_time": plain_work / our_work,
        }
        for count in MEMORY_COUNTS:
            figures[f"peak_memory_gb_{count}_videos"] = _peak_of_extraction(
                video, Path(folder) / str(count), count, mode
            )
    return figures | _encoder_rates(mode, rounds)


def extract_against(
    other: Path, video: Path | None = None, rounds: int = 3, mode: str = "16k"
) -> dict[str, float | str]:
    """Videos per second of reading, by this package and by that of the checkout `other`, by `compare`.

    Both read as many files at once as there are cores.
    """
    with tempfile.TemporaryDirectory() as folder:
        video, cores = video or make_clip(Path(folder) / "clip.mp4"), len(os.sched_getaffinity(0))
        times = compare(other, _READER, [str(video.resolve()), mode, str(cores)], rounds)
        (ours, our_work), (theirs, their_work) = np.median(times, axis=1).tolist()
    return {
        "video": video.name,
        "files_at_once": cores,
        "ours_videos_s": cores / ours,
        "other_videos_s": cores / theirs,
        "ratio": theirs / ours,
        "ratio_of_processor_time": their_work / our_work,
    }


# It prints seconds and processor time of reading once for each line that it is sent.
_READER = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
import torch
from mmaudio_hf.media.video import read_video
video, mode, copies = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
with ThreadPoolExecutor(copies) as pool:
    for line in sys.stdin:
        began, busy = time.perf_counter(), time.process_time()
        for future in [pool.submit(read_video, video, mode=mode, as_uint8=True) for _ in range(copies)]:
            future.result()
        print(time.perf_counter() - began, time.process_time() - busy, flush=True)
"""


def _peak_of_extraction(video: Path, folder: Path, count: int, mode: str) -> float:
    """Peak resident GB of a new process that extracts `count` copies of `video` with toy encoders."""
    (folder / "videos").mkdir(parents=True)
    names = [f"clip_{index}" for index in range(count)]
    for name in names:
        (folder / "videos" / f"{name}{video.suffix}").symlink_to(video.resolve())
    (folder / "list.tsv").write_text("id\tlabel\n" + "".join(f"{name}\ta clip\n" for name in names))
    command = [sys.executable, "-c", _EXTRACTION, str(folder), mode]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(printed.split()[-1]) * 1024 / 1e9


_EXTRACTION = """
import re, sys
from mmaudio_hf.config import EncoderConfig, ExtractionConfig, Recipe, VideoSource, variant_config
from mmaudio_hf.data.store import StoreWriter
from mmaudio_hf.features.extract import extract_video
folder, mode = sys.argv[1:]
recipe = Recipe("bench", model=variant_config(f"small_{mode}"), encoders=EncoderConfig("toy", folder, device="cpu"),
                extraction=ExtractionConfig(folder, shard_size=4))
extract_video(recipe, VideoSource("store", f"{folder}/videos", f"{folder}/list.tsv"), StoreWriter, progress=False)
# Not ru_maxrss, which starts at the size of the parent process.
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


def _times(ways: Sequence[Callable[[], object]], copies: int, rounds: int) -> np.ndarray:
    """(2, ways): median seconds of each way, `copies` at once, and of processor time; in turn, after a warm-up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(copies) as pool:

        def measure(way: Callable[[], object]) -> tuple[float, float]:
            began, busy = time.perf_counter(), time.process_time()
            for future in [pool.submit(way) for _ in range(copies)]:
                future.result()
            return time.perf_counter() - began, time.process_time() - busy

        times = in_turn([partial(measure, way) for way in ways], rounds)
    torch.set_num_threads(threads)
    return np.median(times, axis=1).T


def make_clip(path: Path) -> Path:
    """Moving stripes with noise and a tone: H.264 and AAC, as large as real clips are."""
    width, height = SIZE
    noise = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "23"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=44_100, layout="stereo")
        grain = noise.integers(0, 40, (height, width, 3), dtype=np.uint8)
        stripes = (np.arange(width) % 200).astype(np.uint8)[None, :, None]
        for index in range(SECONDS * FPS):
            image = np.roll(stripes, 7 * index, axis=1) + np.roll(grain, 13 * index, axis=0)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        tone = 0.5 * np.sin(np.arange(SECONDS * 44_100) * (2 * np.pi * 440 / 44_100)).astype(np.float32)
        for start in range(0, len(tone), 1024):
            samples = np.ascontiguousarray(np.stack([tone[start : start + 1024]] * 2))
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44_100, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


def plain_read(path: Path, mode: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two passes over the video and one over the audio, each frame resized on its own.

    uint8 frames (T, 3, 384, 384) and (F, 3, 224, 224), and the waveform in its full length, without normalisation.
    """
    lengths = sequence_lengths(mode)
    frames, resize_clip = [], partial(F.interpolate, size=(CLIP_PIXELS, CLIP_PIXELS), mode="bicubic", antialias=True)
    for fps, count, resize in ((CLIP_FPS, lengths.clip, resize_clip), (SYNC_FPS, lengths.sync_frames, _resize_sync)):
        frames.append(torch.cat([resize(frame) for frame in _plain_frames(path, fps, count)]))
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        samples = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1).mean(0)
    options = {"lowpass_filter_width": 64, "rolloff": 0.9475937167399596, "beta": 14.769656459379492}
    target = audio_mode(mode).sample_rate
    waveform = resample(torch.from_numpy(samples), rate, target, resampling_method="sinc_interp_kaiser", **options)
    return frames[0], frames[1], waveform


def _plain_frames(path: Path, fps: int, count: int) -> list[torch.Tensor]:
    frames: list[torch.Tensor] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        graph = av.filter.Graph()
        graph.threads = 1
        source, sink = graph.add_buffer(template=stream, time_base=stream.time_base), graph.add("buffersink")
        graph.link_nodes(source, graph.add("fps", str(fps)), graph.add("format", "pix_fmts=rgb24"), sink).configure()
        for frame in container.decode(stream):
            graph.vpush(frame)
            while True:
                try:
                    frames.append(torch.from_numpy(graph.vpull().to_ndarray()).permute(2, 0, 1)[None])
                except (BlockingIOError, av.EOFError):
                    break
            if len(frames) >= count:
                break
    return frames[:count]


def _resize_sync(frame: torch.Tensor) -> torch.Tensor:
    height, width = frame.shape[2:]
    size = (
        (SYNC_PIXELS, SYNC_PIXELS * width // height) if height < width else (SYNC_PIXELS * height // width, SYNC_PIXELS)
    )
    resized = F.interpolate(frame, size, mode="bicubic", antialias=True)
    top, left = (size[0] - SYNC_PIXELS) // 2, (size[1] - SYNC_PIXELS) // 2
    return resized[..., top : top + SYNC_PIXELS, left : left + SYNC_PIXELS]


def _encoder_rates(mode: str, rounds: int) -> dict[str, float | str]:
    """Synchformer and the VAE encoder, fp32 and bf16, each beside a matrix product of the same precision.

    One segment and one clip; where the processor emulates bf16, that is measured once, with SMALL_DEPTH of the blocks
    and SMALL_FRAMES of the spectrogram.
    """
    frames = 2 * sequence_lengths(mode).latent
    figures: dict[str, float | str] = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        small = dtype == torch.bfloat16 and emulates_bf16(torch.device("cpu"))
        sizes = (SMALL_DEPTH, SMALL_FRAMES) if small else (synchformer.DEPTH, frames)
        figures[f"{precision}_size"] = f"{sizes[0]} Synchformer blocks, {sizes[1]} mel frames"
        for name, run, flops in _encoder_runs(mode, *sizes):
            timed: list[Timed] = [time_matmul(torch.device("cpu"), dtype), (partial(_autocast, run, dtype), flops)]
            matmul, rate = median_rates(timed, 1 if small else rounds)
            figures[f"{name}_{precision}_gflop_s"] = rate / 1e9
            figures[f"{name}_{precision}_of_matmul"] = rate / matmul
    return figures


def _autocast(run: Callable[[], object], dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        run()


def _encoder_runs(mode: str, depth: int, frames: int) -> Iterator[tuple[str, Callable[[], object], float]]:
    """Name, something to run, and its operations: Synchformer of `depth` on a segment, the VAE encoder on `frames`."""
    network = randomised(synchformer.SynchformerVisual(depth=depth))
    segment = torch.randn(1, 1, *synchformer.SEGMENT_SHAPE)
    yield "synchformer", lambda: network(segment), synchformer.flops(depth=depth)
    vae = randomised(autoencoder.MelVAE(mode))
    mel = torch.randn(1, vae.mode.mel_bins, frames)
    yield "vae_encode", lambda: vae.encode(mel), autoencoder.flops(mode, frames)[0]


def randomised(network: Module, device: torch.device | str = "cpu") -> Module:
    """The network with random weights on `device`; its cost is that of the real ones."""
    network = network.to_empty(device=device)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02).abs_()
        else:
            tensor.data.zero_()
    return network


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
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        conditions, unconditional = model.preprocess_conditions(*features), model.empty_conditions(batch_size)
        began = time.perf_counter()
        ours = GuidedVelocity(model, conditions, unconditional, GUIDANCE)
        with prepared_convolutions(model, precision):
            synchronize(device)
            prepared = (time.perf_counter() - began) / batch_size

        def plain_step() -> None:
            branches = [model.predict_velocity(latent, t_B, given) for given in (conditions, unconditional)]
            velocities["plain"] = guided_velocity(branches[0], branches[1], GUIDANCE).float()

        def our_step() -> None:
            velocities["ours"] = ours(latent, t_B)

        def our_seconds() -> float:
            with prepared_convolutions(model, precision):
                return _seconds(our_step, device)

        measures: list[Callable[[], float]] = [partial(_seconds, plain_step, device), our_seconds]
        times = in_turn(measures, rounds, warm_up=int(rounds > 1))
    plain, our = (STEPS * statistics.median(each) / batch_size for each in times)
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
    def completed() -> None:
        run()
        synchronize(device)

    synchronize(device)
    return seconds(completed)


def _stages(variant: str, device: torch.device, rounds: int) -> dict[str, float | str]:
    """Seconds per clip, batch 1 in float32, of reading, the encoders, the decoders and writing."""
    config = variant_config(variant)
    figures: dict[str, float | str] = {
        "stages_measured": f"CLIP with 1/{CLIP_SHARE} of its layers on one image, one Synchformer segment, "
        f"1/{DECODED_SHARE} of the latents; multiplied to a clip"
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


# --- `mmaudio-hf bench scores`: published scores of cached features ---------------------------------------------------


# File of the predictions -> shapes of the features of an item.
_CACHES: dict[str, tuple[tuple[int, ...], ...]] = {
    "pann_features.pth": ((2048,), (527,)),
    "vggish_features.pth": ((8, 128),),
    "passt_features_embed.pth": ((768,),),
    "passt_logits.pth": ((527,),),
    "imagebind_audio.pth": ((1024,),),
    "clap_laion_audio.pth": ((512,),),
    "clap_ms_audio.pth": ((1024,),),
}
PAIRS = 8  # of one batch of DeSync


def scores(items: int, rounds: int = 3, folder: Path | None = None) -> dict[str, float]:
    """Seconds, processor time and peak memory of all scores of `items` random items but DeSync, with their intervals,
    in a process of its own; seconds of DeSync for a pair of 8 s, and its operations against a matrix product.

    folder: for the caches, 31 kB an item and side; they are used again. By default a temporary one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        make_caches(folder or Path(scratch), items)
        words = [sys.executable, "-c", _SCORING, str(folder or scratch)]
        runs = [json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout) for _ in range(rounds)]
    head = randomised(OffsetHead())
    video, audio = (torch.randn(PAIRS, 2 * SEGMENTS, tokens, SYNC_DIM) for tokens in (VIDEO_TOKENS, AUDIO_TOKENS))
    with FlopCounterMode(display=False) as counter:
        head.classes(video, audio)
    work = float(counter.get_total_flops())
    timed = [(lambda: head.classes(video, audio), work), time_matmul(torch.device("cpu"), torch.float32)]
    ours, matmul = median_rates(timed, rounds)
    return {
        "items": items,
        **{name: statistics.median(run[name] for run in runs) for name in runs[0]},
        "desync_seconds_a_pair": work / PAIRS / ours,
        "desync_gflop_s": ours / 1e9,
        "desync_of_matmul": ours / matmul,
    }


def make_caches(folder: Path, items: int) -> None:
    """Write caches of as many random items to `folder`/gt and `folder`/pred; files that are there are kept."""
    generator = torch.Generator().manual_seed(0)
    for side in ("gt", "pred"):
        (folder / side).mkdir(parents=True, exist_ok=True)
        for name, shapes in _CACHES.items():
            path = folder / side / (TRUTH_FILES.get(name, name) if side == "gt" else name)
            if path.is_file():
                continue
            cache: dict[str, Any] = {}
            for number in range(items):
                rows = [torch.randn(shape, generator=generator) for shape in shapes]
                cache[f"item_{number:09d}"] = rows[0] if len(rows) == 1 else dict(zip(PANN_KEYS, rows, strict=True))
            torch.save(cache, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)


_SCORING = """
import json, re, sys, time
began, worked = time.perf_counter(), time.process_time()
from mmaudio_hf.evaluation import score_caches
from mmaudio_hf.evaluation.results import with_intervals
count = len(with_intervals(score_caches(sys.argv[1] + "/gt", sys.argv[1] + "/pred")))
times = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - worked}
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024 / 1e9
print(json.dumps({"scores": count, **times, "peak_gb": peak}))
"""
