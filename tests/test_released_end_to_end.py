"""Released weights from files to one training step: files of released names and shapes, name-seeded values.

The full size is slow: CLIP ViT-H/14 takes 65 TFLOP for the frames of one video. The fast test goes the same way with
the released Synchformer and VAE on 0.64 s of each file, and with a CLIP model of the released widths of features and
one layer. Media are those of the folder MMAUDIO_HF_EXAMPLES, if it is set, else synthesised.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from released_files import clip_state, clip_weight, write_clip_folder, write_ext_weights, write_open_clip
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from mmaudio_hf.cli import main
from mmaudio_hf.config import EncoderConfig, load_recipe
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.data.tools import verify
from mmaudio_hf.features.autoencoder import MelSpectrogram, MelVAE
from mmaudio_hf.features.clip import ClipEncoder, ClipTokenizer, clip_config
from mmaudio_hf.features.encoders import SYNC_FILE, VAE_FILES, _sync_batch, load_encoders
from mmaudio_hf.features.synchformer import SynchformerVisual, segment_frames
from mmaudio_hf.media.audio import read_waveform
from mmaudio_hf.media.video import read_video
from mmaudio_hf.schema import column_shapes, sequence_lengths

ROOT = Path(__file__).parent.parent
VIDEOS = 2  # and as many audio files


def write_recipe(folder: Path, mode: str, media: dict[str, Path], clip: Path, **model) -> Path:
    """The published recipe of the small network on these media, cut down to one step."""
    variant = f"small_{mode}"
    features = folder / f"features_{mode}"
    tree = {
        "base": str(ROOT / "recipes" / f"{variant}.yaml"),
        "name": variant,
        "output_dir": str(folder / "output"),
        "model": {"variant": variant, **model},
        "encoders": {"weights_dir": str(folder / "ext_weights"), "clip": str(clip), "device": "cpu"},
        "extraction": {
            "output_dir": str(features),
            "shard_size": 1,
            "videos": [{"name": "videos", "media_dir": str(media["videos"]), "list": str(media["video_list"])}],
            "audios": [{"name": "audios", "media_dir": str(media["audios"]), "list": str(media["audio_list"])}],
        },
        "data": {
            "train": [{"path": str(features / name)} for name in ("videos", "audios")],
            "validation": [],
            "test": [],
        },
        "samples": {"every": 0},
        "evaluation": {"every": 0, "after_training": False},
        "training": {"steps": 1, "batch_size": 2, "mixed_precision": "no", "log_every": 1, "trackers": []},
    }
    path = folder / f"{variant}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def find_media(folder: Path, example: Path, rows: int) -> dict[str, Path]:
    """So many videos and audio files of MMAUDIO_HF_EXAMPLES, or of the synthesised ones where it is not set."""
    names = {"videos": "videos", "audios": "audios", "video_list": "train.tsv", "audio_list": "audios.tsv"}
    if "MMAUDIO_HF_EXAMPLES" in os.environ:
        example = Path(os.environ["MMAUDIO_HF_EXAMPLES"]) / "training"
        names = {"videos": "example_videos", "audios": "example_audios"}
        names |= {"video_list": "example_video.tsv", "audio_list": "example_audio.tsv"}
    media = {}
    for name, file in names.items():
        media[name] = example / file
        if name.endswith("list"):
            media[name] = folder / file
            media[name].write_text("".join((example / file).read_text().splitlines(keepends=True)[: rows + 1]))
    return media


def check_stores(folder: Path, mode: str, rows: int, duration: float = 8.0) -> dict[str, FeatureStore]:
    """Both stores are whole, finite and of the published shapes; nothing was rejected."""
    stores = {}
    for name in ("videos", "audios"):
        path = folder / f"features_{mode}" / name
        assert verify(path).ok
        store = stores[name] = FeatureStore.open(path)
        values = store.read(range(len(store)))
        shapes = column_shapes(mode, duration, video=name == "videos")
        assert {column: tuple(value.shape[1:]) for column, value in values.items()} == shapes
        assert all(value.isfinite().all() and value.std() > 0 for value in values.values())
    assert len(stores["videos"]) == rows and len(stores["audios"]) >= rows
    rejects = (folder / f"features_{mode}" / "videos.rejects.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in rejects} <= {"folder"}  # files beside the list; no listed item
    return stores


def check_step(folder: Path, mode: str) -> None:
    """One step was made, and a network was left."""
    run = folder / "output" / f"small_{mode}"
    losses = [json.loads(line).get("train/loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [np.isfinite(loss) for loss in losses if loss is not None] == [True]
    assert not (run / "skipped.jsonl").exists()
    assert (run / "last").resolve().name == "step_1"
    assert (run / "last" / "pretrained_model" / "model.safetensors").is_file()


# --- small -------------------------------------------------------------------------------------------------------

SHORT = 0.64  # s, one segment of Synchformer


@pytest.fixture(scope="module")
def small(example_media, tmp_path_factory) -> Path:
    """A folder in which a video and an audio file have gone all the way, by the commands a user types."""
    folder = tmp_path_factory.mktemp("small")
    media = find_media(folder, example_media(), rows=1)
    config = clip_config(1, 1)
    vision = config.vision_config
    vision.hidden_size, vision.intermediate_size, vision.num_attention_heads = 64, 128, 2
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in CLIPModel(config).state_dict().items()}
    state = {name: clip_weight(name, shape) for name, shape in shapes.items()}
    write_open_clip(folder / "open_clip", state)
    clip = write_clip_folder(folder / "clip", config, state)
    write_ext_weights(folder / "ext_weights", "16k", vocoder=True)
    sizes = {"hidden_dim": 64, "num_heads": 1, "depth": 2, "fused_depth": 1, "duration": SHORT}
    recipe = write_recipe(folder, "16k", media, clip, **sizes)
    for command in ("partition", "extract-video", "extract-audio", "train"):
        assert main([command, str(recipe)]) == 0
    return folder


def load(folder: Path, components: tuple[str, ...], clip: str | Path = "", precision: str = "fp32"):
    """Released encoders of 0.64 s."""
    config = EncoderConfig("released", str(folder / "ext_weights"), str(clip or folder / "clip"), precision)
    return load_encoders(config, "16k", components, duration=SHORT)


def test_files_to_one_step(small):
    """The features are those of the networks by themselves, given the frames of `read_video`."""
    stores = check_stores(small, "16k", rows=1, duration=SHORT)
    check_step(small, "16k")
    store = stores["videos"]
    values = {name: value[0] for name, value in store.read([0]).items()}
    videos = load_recipe(small / "small_16k.yaml").extraction.videos[0].media_dir
    clip = read_video(Path(videos) / f"{store.ids[0]}.mp4", duration=SHORT)
    network = ClipEncoder.from_pretrained(small / "clip")
    tokens = ClipTokenizer.from_files(small / "clip")(store.captions)
    torch.testing.assert_close(values["clip_features"], network.encode_images(clip.clip_frames))
    torch.testing.assert_close(values["text_features"], network.encode_text(tokens)[0])
    synchformer = SynchformerVisual().load_released(small / "ext_weights" / SYNC_FILE)
    expected = synchformer(segment_frames(clip.sync_frames)[None])[0]
    torch.testing.assert_close(values["sync_features"], expected, atol=1e-4, rtol=1e-4)
    vae = MelVAE("16k").load_released(small / "ext_weights" / VAE_FILES["16k"])
    mean, std = vae.encode(MelSpectrogram("16k")(clip.audio[None])[:, :, :40])
    torch.testing.assert_close(values["mean"], mean[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values["std"], std[0], atol=1e-4, rtol=1e-4)


def test_a_batch_gives_what_single_items_give(small):
    """Up to rounding; and the passes of Synchformer and CLIP, which are smaller than the batch, keep the order."""
    encoders, draw = load(small, ("clip", "text", "latent")), torch.Generator().manual_seed(0)
    shallow = SynchformerVisual(segment_batch=2, depth=1).to_empty(device="cpu")
    for tensor in (*shallow.parameters(), *shallow.buffers()):
        tensor.data.normal_(std=0.05, generator=draw)
    encoders = replace(encoders, networks={**encoders.networks, "sync": lambda frames: _sync_batch(shallow, frames)})
    frames = torch.randint(0, 256, (3, 16, 3, 384, 384), dtype=torch.uint8, generator=draw)
    waveform = 0.1 * torch.randn(3, sequence_lengths("16k", SHORT).audio_samples, generator=draw)
    small_frames = frames[..., :224, :224]
    for encode, inputs in (
        (encoders.encode_clip, frames[:, :7]),
        (encoders.encode_sync, small_frames),
        (encoders.encode_text, ["a dog", "do", "a cat at a dog"]),
        (lambda waveform: torch.cat(encoders.encode_audio(waveform), dim=2), waveform),
    ):
        batch, single = encode(inputs), torch.cat([encode(inputs[i : i + 1]) for i in range(3)])
        assert batch.shape == single.shape and not torch.allclose(batch[0], batch[1], atol=1e-3)
        difference = (batch - single).abs().max() / single.std()
        print(f"{tuple(batch.shape)}: {difference:.1e}")
        assert difference < 1e-4


def test_the_trained_model_generates_audio_from_text(small):
    words = ["--run", str(small / "output" / "small_16k"), "--prompt", "a dog", "--steps", "1", "--device", "cpu"]
    assert main(["generate", *words, "--out", str(small / "dog.wav")]) == 0
    waveform, rate = read_waveform(small / "dog.wav")
    assert rate == 16_000 and len(waveform) == sequence_lengths("16k", SHORT).audio_samples
    assert waveform.std() > 0


def test_every_form_of_the_clip_weights_is_the_same_model(small, monkeypatch):
    """A folder, a Hub id in the cache, and an open_clip checkpoint: the same features and the same fingerprint."""
    cached = small / "hub" / "models--nobody--clip"
    snapshot = cached / "snapshots" / ("0" * 40)
    if not snapshot.exists():
        shutil.copytree(small / "clip", snapshot)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(small / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = CLIPConfig.from_pretrained(small / "clip")
    monkeypatch.setattr("mmaudio_hf.features.clip.clip_config", lambda: config)  # else that of 32 and 24 layers
    frames = torch.randint(0, 256, (1, 5, 3, 384, 384), dtype=torch.uint8)
    components = ("clip", "text")
    first = load(small, components)
    assert first.fingerprints["clip"]["id"] == "clip"
    for clip in ("nobody/clip", small / "open_clip" / "open_clip_pytorch_model.bin"):
        other = load(small, components, clip)
        assert torch.equal(other.encode_clip(frames), first.encode_clip(frames))
        assert torch.equal(other.encode_text(["a dog"]), first.encode_text(["a dog"]))
        assert other.fingerprints["clip"]["fingerprint"] == first.fingerprints["clip"]["fingerprint"]
    half = load(small, components, precision="bf16")
    torch.testing.assert_close(half.encode_clip(frames), first.encode_clip(frames), atol=0.02, rtol=0)
    assert half.fingerprints["clip"]["fingerprint"] != first.fingerprints["clip"]["fingerprint"]
    state = load_file(small / "clip" / "model.safetensors")
    shutil.copytree(small / "clip", small / "changed", dirs_exist_ok=True)
    save_file(state | {"logit_scale": state["logit_scale"] + 1}, small / "changed" / "model.safetensors")
    changed = load(small, ("text",), small / "changed").fingerprints["text"]
    assert changed["fingerprint"] != first.fingerprints["text"]["fingerprint"]


# --- full size ---------------------------------------------------------------------------------------------------


LAYERS = (32, 24)  # of images and of text
MEASURED = """
import re, sys
from mmaudio_hf.cli import main
code = main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def timed(*words: str) -> None:
    """Run `mmaudio-hf` in a process of its own; print its seconds and its peak memory."""
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout.split()[-1]) * 1024 / 1e9
    print(f"{words[0]} {Path(words[1]).stem}: {time.monotonic() - began:.0f} s, peak {peak:.2f} GB", flush=True)


def write_full_weights(folder: Path) -> None:
    """All files at full size, 10 GB; CLIP in both of its forms."""
    state = clip_state(*LAYERS)
    write_clip_folder(folder / "clip", clip_config(*LAYERS), state)
    write_open_clip(folder / "open_clip", state)
    for mode in ("16k", "44k"):
        write_ext_weights(folder / "ext_weights", mode)


@pytest.fixture(scope="module")
def full(example_media, tmp_path_factory):
    """Extraction and one step at full size, by mode: 16k takes CLIP from transformers files, 44k from open_clip."""
    folder = tmp_path_factory.mktemp("full")
    media = find_media(folder, example_media(), rows=VIDEOS)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # whose memory is free afterwards
        pool.submit(write_full_weights, folder).result()
    clips = {"16k": folder / "clip", "44k": folder / "open_clip" / "open_clip_pytorch_model.bin"}

    @cache
    def extract(mode: str) -> dict[str, FeatureStore]:
        recipe = write_recipe(folder, mode, media, clips[mode])
        for command in ("partition", "extract-video", "extract-audio"):
            timed(command, str(recipe))
        stores = check_stores(folder, mode, rows=VIDEOS)
        timed("train", str(recipe))
        check_step(folder, mode)
        return stores

    return extract


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_files_to_one_step_at_full_size(full, mode):
    for name, store in full(mode).items():
        values = store.read(range(len(store)))
        print(mode, name, {column: (tuple(v.shape), round(float(v.std()), 4)) for column, v in values.items()})


@pytest.mark.slow
def test_both_forms_of_the_clip_weights_give_the_same_features(full):
    """Frames and captions are the same in both modes, so only the form of the weights differs."""
    ours, theirs = (full(mode)["videos"].read(range(VIDEOS)) for mode in ("16k", "44k"))
    for column in ("clip_features", "text_features", "sync_features"):
        print(column, "largest difference", float((ours[column] - theirs[column]).abs().max()))
        torch.testing.assert_close(ours[column], theirs[column])
