"""The published rules, number for number, on real and awkward files.

The files are not part of this repository. Point MMAUDIO_HF_EXAMPLES at a folder with `training/example_videos`,
`training/example_audios` and `nasty` to run these; the rules themselves are tested in test_media_video.py.
"""

import hashlib
import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from golden_data import GOLDEN, golden
from odd_media import read_codes

from mmaudio_hf.config import AudioSource
from mmaudio_hf.media.audio import mono_samples, read_audio_clip
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.lists import read_clips, write_clips
from mmaudio_hf.media.video import RgbConverter, read_video

EXAMPLES = Path(os.environ.get("MMAUDIO_HF_EXAMPLES", ""))
pytestmark = pytest.mark.skipif(
    "MMAUDIO_HF_EXAMPLES" not in os.environ, reason="MMAUDIO_HF_EXAMPLES does not name the folder of example media"
)

VIDEOS = ("0B4dYTMsgHA_000130", "F8Zt3mYlOqU_000094")
NASTY = json.loads((GOLDEN / "media_nasty.json").read_text())

RAW = ("n", "ch", "head", "strided")

# What the default alignment makes of each awkward file; docs/media.md says why.
DEFAULT_REASONS = {
    "damaged_bytes": "decode_error",
    "no_audio": "no_audio",
    "short_audio": "audio_too_short",
    "short_video": "video_too_short",
    "silent": "silent",
    "truncated_mid": "decode_error",
    "truncated_no_index": "no_audio",
}
# Accepted in both alignments, with other arrays: an offset between the tracks, or a rotation.
DIFFERENT = {"audio_late", "video_late", "rotated"}


@pytest.fixture(scope="module")
def arrays():
    return {name: golden(name) for name in ("media_nasty", "media_video", "media_audio")}


def check_audio(audio, arrays, key):
    for name, values in (("head", audio[:256]), ("strided", audio[::101]), ("tail", audio[-256:])):
        assert np.abs(values.numpy() - arrays[f"{key}/{name}"]).max() < 2e-6, (key, name)
    assert len(audio) == arrays[f"{key}/n"]


def check_frames(clip, arrays, key):
    for name, frames, step in (("clip", clip.clip_frames, 16), ("sync", clip.sync_frames, 40)):
        mean = frames.double().mean((2, 3)).numpy()
        assert np.abs(mean - arrays[f"{key}/{name}/mean"]).max() < 1e-6, (key, name)
        pooled = torch.nn.functional.adaptive_avg_pool2d(frames[::step].double(), 12).numpy()
        theirs = arrays[f"{key}/{name}/pool12"]
        assert np.abs(pooled - theirs).max() < 1e-6, (key, name)


@pytest.mark.parametrize("mode", ["16k", "44k"])
@pytest.mark.parametrize("case", NASTY)
def test_awkward_files(case, mode, arrays):
    theirs, path = arrays["media_nasty"], EXAMPLES / "nasty" / f"{case}.mp4"
    if not NASTY[case][f"{mode}_accepted"]:
        with pytest.raises(MediaError):
            read_video(path, mode=mode, alignment="reference")
        return
    clip = read_video(path, mode=mode, alignment="reference")
    check_audio(clip.audio, theirs, f"{case}/{mode}")
    if case == "long":  # the published reader loses the first 8 s of frames; ours are the first 8 s
        assert read_codes(clip.clip_frames)[:2] == [0, 2]
        return
    check_frames(clip, theirs, case)
    if f"{case}/clip/source_frame" in theirs:
        assert read_codes(clip.clip_frames) == theirs[f"{case}/clip/source_frame"].tolist()


@pytest.mark.parametrize("case", NASTY)
def test_awkward_files_by_default(case):
    path = EXAMPLES / "nasty" / f"{case}.mp4"
    if case in DEFAULT_REASONS:
        with pytest.raises(MediaError) as caught:
            read_video(path)
        assert caught.value.reason == DEFAULT_REASONS[case]
        return
    ours = read_video(path)
    if not NASTY[case]["16k_accepted"]:
        assert case in ("exact_8s", "truncated_tail")
        return
    reference = read_video(path, alignment="reference")
    same = all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))
    assert same == (case not in DIFFERENT)


@pytest.mark.parametrize("video_id", VIDEOS)
def test_real_videos(video_id, arrays):
    path = EXAMPLES / "training" / "example_videos" / f"{video_id}.mp4"
    for mode in ("16k", "44k"):
        for normalize in (True, False):
            clip = read_video(path, mode=mode, alignment="reference", normalize_audio=normalize)
            check_audio(clip.audio, arrays["media_audio"], f"{video_id}/{mode}/norm{int(normalize)}")
    theirs = arrays["media_video"]
    for name, frames in (("clip", clip.clip_frames), ("sync", clip.sync_frames)):
        assert tuple(frames.shape) == tuple(theirs[f"{video_id}/{name}/shape"])
        assert np.abs(frames.double().mean((2, 3)).numpy() - theirs[f"{video_id}/{name}/mean"]).max() < 1e-6
        crop = frames[::16, :, 100:116, 100:116].numpy()
        assert np.abs(crop - theirs[f"{video_id}/{name}/crop"]).max() < 1e-6
        pooled = torch.nn.functional.adaptive_avg_pool2d(frames[::4].double(), 12).numpy()
        assert np.abs(pooled - theirs[f"{video_id}/{name}/pool12"]).max() < 1e-6
    default = read_video(path, mode="44k", normalize_audio=False)
    assert all(torch.equal(a, b) for a, b in zip(default, clip, strict=True))


@pytest.mark.parametrize("video_id", VIDEOS)
def test_conversion_to_rgb(video_id, arrays):
    """Every shown frame, byte for byte."""
    stored = [arrays["media_video"][f"{video_id}/{name}/raw_sha256"].tolist() for name in ("clip", "sync")]
    shown = {*stored[0], *stored[1]}
    to_rgb, ours = RgbConverter(rotate=False), set()
    with av.open(str(EXAMPLES / "training" / "example_videos" / f"{video_id}.mp4")) as container:
        for frame in container.decode(video=0):
            ours.add(hashlib.sha256(to_rgb(frame).tobytes()).hexdigest())
    assert shown <= ours


@pytest.mark.parametrize("video_id", VIDEOS)
def test_decoded_audio(video_id, arrays):
    """Before channels are mixed; AAC decoders differ in the last bits."""
    theirs, chunks = {name: arrays["media_audio"][f"{video_id}/raw/{name}"] for name in RAW}, []
    with av.open(str(EXAMPLES / "training" / "example_videos" / f"{video_id}.mp4")) as container:
        for frame in container.decode(audio=0):
            chunks.append(frame.to_ndarray())
            np.testing.assert_allclose(mono_samples(frame), chunks[-1].mean(0), atol=1e-7)
    audio = np.concatenate(chunks, axis=1).T
    assert audio.shape == (theirs["n"], theirs["ch"])
    assert np.abs(audio[:512] - theirs["head"]).max() < 2e-6
    assert np.abs(audio[::997] - theirs["strided"]).max() < 2e-6


def test_audio_files(tmp_path, arrays):
    folder = EXAMPLES / "training" / "example_audios"
    report = write_clips(AudioSource("a", str(folder), "captions.tsv"), tmp_path / "clips.tsv")
    assert (tmp_path / "clips.tsv").read_bytes() == (GOLDEN / "media_clips.tsv").read_bytes()
    assert not report.rejects and not report.ignored
    for clip in read_clips(tmp_path / "clips.tsv"):
        for mode in ("16k", "44k"):
            path = folder / f"{clip.name}.flac"
            audio = read_audio_clip(path, mode=mode, start_sample=clip.start_sample, end_sample=clip.end_sample)
            check_audio(audio, arrays["media_audio"], f"{clip.id}/{mode}/norm1")
