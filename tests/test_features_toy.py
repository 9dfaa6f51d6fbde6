"""The toy encoders carry what they say, and the encoders are built from what is there."""

from dataclasses import replace

import mir_eval
import numpy as np
import pytest
import torch
from scipy.signal import find_peaks

from mmaudio_hf.config import EncoderConfig
from mmaudio_hf.features import encoders as encoders_module
from mmaudio_hf.features import toy
from mmaudio_hf.features.autoencoder import MelSpectrogram
from mmaudio_hf.features.encoders import fit_toy_codec, load_encoders, pick_device
from mmaudio_hf.features.toy import toy_codec_file
from mmaudio_hf.media.audio import read_waveform, resample, write_audio
from mmaudio_hf.media.example import read_events
from mmaudio_hf.media.video import normalize_frames, read_video
from mmaudio_hf.schema import column_shapes, sequence_lengths

RATES = {"16k": 16_000, "44k": 44_100}


@pytest.fixture(scope="module")
def example(example_media):
    return example_media()


@pytest.fixture(scope="module")
def videos(example):
    """id -> (VideoClip with uint8 frames, event times within it)."""
    events = read_events(example / "events.json")
    paths = sorted((example / "videos").glob("*.mp4"))
    return {
        path.stem: (read_video(path, as_uint8=True), [t for t in events[path.stem].times if t < 7.9]) for path in paths
    }


def held_out(videos):
    return [item for name, item in videos.items() if not name.startswith("train")]


# --- frames ------------------------------------------------------------------------------------------------------


def frame_of_token() -> np.ndarray:
    """First frame of each of the 192 tokens."""
    token = np.arange(192)
    return token // 8 * 8 + token % 8 * 2


def event_tokens(times) -> np.ndarray:
    """(192,) 1 where one of the token's two frames is that of an event."""
    first = frame_of_token()
    return np.array([any(f <= round(t * 25) < f + 2 for t in times) for f in first], dtype=np.float64)


def test_a_linear_readout_of_the_sync_tokens_finds_the_events_of_unseen_videos(videos):
    def tokens(clip):
        return toy.sync_features(clip.sync_frames).numpy().astype(np.float64)

    train = [(tokens(clip), event_tokens(times)) for name, (clip, times) in videos.items() if name.startswith("train")]
    x, y = (np.concatenate(values) for values in zip(*train, strict=True))
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(768), x.T @ (y - y.mean()))
    hits = total = 0
    for clip, times in held_out(videos):
        strength = np.full(100, -np.inf)
        np.maximum.at(strength, frame_of_token() // 2, tokens(clip) @ weights)
        peaks, _ = find_peaks(strength[: frame_of_token().max() // 2 + 1], distance=4)
        best = peaks[np.argsort(-strength[peaks])][: len(times)]
        hits += sum(np.abs(best - round(t * 25) // 2).min() <= 1 for t in times)
        total += len(times)
    assert total > 20
    assert hits / total >= 0.95


def test_sync_tokens_of_a_still_video_show_no_event():
    still = torch.full((32, 3, 224, 224), 90, dtype=torch.uint8)
    flash = still.clone()
    flash[13] += 60
    quiet, loud = toy.sync_features(still), toy.sync_features(flash)
    moved = (loud - quiet).square().sum(1)
    first_segment = moved[:8]
    assert first_segment.argmax() in (6, 7)  # frames 12-13, 14-15: the flash comes and goes
    assert quiet.shape == (24, 768)
    # A still scene says only when its segment is.
    assert torch.equal(quiet[0], quiet[7])


def test_frames_may_be_bytes_or_floats(videos):
    clip, _ = next(iter(videos.values()))
    clip_floats, sync_floats = normalize_frames(clip.clip_frames[:4], clip.sync_frames[:32])
    torch.testing.assert_close(toy.clip_features(clip.clip_frames[:4]), toy.clip_features(clip_floats))
    # Cells that hardly change differ by rounding, relative to the usual change.
    torch.testing.assert_close(
        toy.sync_features(clip.sync_frames[:32]), toy.sync_features(sync_floats), atol=0.02, rtol=0
    )


def test_clip_features_have_unit_length_and_differ_between_scenes(videos):
    features = torch.stack([toy.clip_features(clip.clip_frames[:16]) for clip, _ in videos.values()])
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(videos), 16))
    centre = features.mean(1)
    distance = torch.cdist(features.flatten(0, 1), centre)
    assert (distance.argmin(1) == torch.arange(len(videos)).repeat_interleave(16)).float().mean() > 0.95


# --- captions ----------------------------------------------------------------------------------------------------


def test_text_features_depend_on_words_and_order():
    captions = ["a red ball bouncing", "a blue ball bouncing", "a ball red bouncing", "Water dripping!", ""]
    rows = toy.text_features(captions)
    assert rows.shape == (5, 77, 1024)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(5, 77))
    assert torch.equal(rows, toy.text_features(captions))
    pooled = torch.nn.functional.normalize(rows.mean(1), dim=1)
    similar = pooled @ pooled.T
    assert similar[0, 1] > similar[0, 3]  # shared words
    assert (rows[0] - rows[2]).norm() > 0.5  # order
    assert (rows[4] - rows[0]).norm() > 1  # no words
    assert torch.equal(rows[:1], toy.text_features(["A red  BALL bouncing"]))


def test_long_captions_are_cut():
    rows = toy.text_features([" ".join(f"w{n}" for n in range(75)), " ".join(f"w{n}" for n in range(200))])
    assert torch.equal(rows[0], rows[1])


# --- audio -------------------------------------------------------------------------------------------------------


def test_of_a_long_file_the_codec_is_fitted_to_the_beginning(tmp_path, monkeypatch):
    """So that an hour of audio is not in memory."""
    noise = 0.1 * torch.randn(30 * 16_000, generator=torch.Generator().manual_seed(0))
    write_audio(tmp_path / "long.flac", noise, 16_000)
    monkeypatch.setattr(encoders_module, "_FIT_FILE_SECONDS", 9)
    waveform, rate = read_waveform(tmp_path / "long.flac", 9)
    assert rate == 16_000 and 9 <= len(waveform) / rate < 9.5
    write_audio(tmp_path / "short.flac", waveform * 32768 / 32767, rate)  # the same integers
    assert torch.equal(read_waveform(tmp_path / "short.flac")[0], waveform)
    files = [fit_toy_codec(tmp_path / name, "16k", [tmp_path / f"{name}.flac"]) for name in ("long", "short")]
    assert files[0].read_bytes() == files[1].read_bytes()


def waveform_of(path, mode):
    waveform, rate = read_waveform(path)
    waveform = resample(waveform / waveform.abs().max() * 0.95, rate, RATES[mode])
    return waveform[: sequence_lengths(mode).audio_samples]


def onsets(waveform, rate) -> np.ndarray:
    """Times at which the energy rises by more than a factor of 2.2 within 20 ms."""
    step = rate // 200
    samples = waveform.double().numpy()
    energy = np.sqrt(np.add.reduceat(samples**2, np.arange(0, len(samples), step)) / step)
    level = np.log(energy + 0.01 * energy.max())
    peaks, _ = find_peaks(level[4:] - level[:-4], height=0.8, distance=50)
    return (peaks + 3) / 200


@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_audio_keeps_its_events_through_codec_and_vocoder(example, mode, tmp_path):
    events = read_events(example / "events.json")
    paths = sorted((example / "videos").glob("*.mp4"))
    train, test = [p for p in paths if p.stem.startswith("train")], [p for p in paths if not p.stem.startswith("train")]
    fit_toy_codec(tmp_path, mode, train)
    encoders = load_encoders(EncoderConfig("toy", str(tmp_path)), mode, ("latent", "decode"))
    scores = []
    for path in test if mode == "16k" else test[:2]:
        waveform = waveform_of(path, mode)
        mean, std = encoders.encode_audio(waveform[None])
        assert tuple(mean.shape[1:]) == tuple(std.shape[1:]) == column_shapes(mode)["mean"]
        decoded = encoders.decode_latent(mean)
        assert decoded.shape == (1, len(waveform))
        assert decoded.abs().max() <= 1
        times = np.array([t for t in events[path.stem].times if t < 7.9])
        scores.append(mir_eval.onset.f_measure(times, onsets(decoded[0], RATES[mode]), window=0.03)[0])
    assert np.mean(scores) >= 0.95
    assert encoders.sample_rate == RATES[mode]


def test_latents_keep_the_distances_of_mels_and_the_file_is_the_codec(example, tmp_path):
    paths = sorted((example / "videos").glob("train*.mp4"))
    mels = [MelSpectrogram("16k")(waveform_of(path, "16k")[None])[0] for path in paths]
    codec = toy.ToyMelCodec.fit("16k", mels)
    mean, _ = codec.encode(torch.stack(mels))
    torch.testing.assert_close(mean.mean((0, 1)), torch.zeros(20), atol=1e-3, rtol=0)
    torch.testing.assert_close(mean.std((0, 1)), torch.ones(20), atol=0.35, rtol=0)
    assert mean.square().mean().item() == pytest.approx(1, abs=1e-2)
    decoded = codec.decode(mean)
    linear = lambda latent: (latent * codec.tensors["scale"]) @ codec.tensors["basis"].T  # noqa: E731, decode, not clamped
    shift = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)) / 10
    moved = (linear(mean + shift) - linear(mean)).square().sum()
    assert moved.item() == pytest.approx((shift * codec.tensors["scale"]).square().sum().item(), rel=1e-4)
    audible = torch.stack(mels).clamp(min=codec.tensors["floor"])
    assert (decoded - audible).square().mean() < 0.1 * audible.var()
    (tmp_path / "codec.safetensors").write_bytes(codec.to_bytes())
    loaded = toy.ToyMelCodec.load("16k", tmp_path / "codec.safetensors")
    assert torch.equal(loaded.decode(mean), decoded)
    with pytest.raises(ValueError, match="not a toy codec of mode 44k"):
        toy.ToyMelCodec.load("44k", tmp_path / "codec.safetensors")
    (tmp_path / "codec.safetensors").write_bytes(codec.to_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        toy.ToyMelCodec.load("16k", tmp_path / "codec.safetensors")
    with pytest.raises(ValueError, match="more than 160 latent frames"):
        toy.ToyMelCodec.fit("16k", [mels[0][:, :200]])


@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_a_click_stays_where_it_is(mode):
    waveform = torch.zeros(1, sequence_lengths(mode, 2.0).audio_samples)
    start = RATES[mode]
    waveform[0, start : start + 20] = 0.9
    decoded = toy.mel_to_waveform(MelSpectrogram(mode)(waveform), mode)
    assert decoded.shape == waveform.shape
    centre = (decoded.square() * torch.arange(decoded.shape[1])).sum() / decoded.square().sum()
    assert abs(float(centre) - start - 10) < 0.005 * RATES[mode]


# --- building them -----------------------------------------------------------------------------------------------


def test_fitting_skips_bad_files_and_is_reproducible(example, tmp_path):
    paths = sorted((example / "videos").glob("train*.mp4"))[:2]
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    first = fit_toy_codec(tmp_path / "a", "16k", paths).read_bytes()
    assert fit_toy_codec(tmp_path / "b", "16k", [broken, *paths]).read_bytes() == first
    with pytest.raises(ValueError, match="none of 1 files has usable audio"):
        fit_toy_codec(tmp_path / "c", "16k", [broken])
    one = load_encoders(EncoderConfig("toy", str(tmp_path / "a")), "16k").fingerprints
    assert set(one) == {"clip", "sync", "text", "latent"}
    fit_toy_codec(tmp_path / "a", "16k", paths[:1])
    other = load_encoders(EncoderConfig("toy", str(tmp_path / "a")), "16k").fingerprints
    assert one["latent"] != other["latent"]
    assert one["sync"] == other["sync"]


def test_missing_files_and_wrong_settings_are_named(tmp_path):
    toy, released = (EncoderConfig(kind, str(tmp_path), "nobody/nothing") for kind in ("toy", "released"))
    with pytest.raises(ValueError, match=f"{toy_codec_file(tmp_path, '16k')} is missing: `mmaudio-hf extract-video`"):
        load_encoders(toy, "16k")
    load_encoders(toy, "16k", ("clip", "sync", "text"))  # needs no codec
    for component, mode, file in (
        ("sync", "16k", "synchformer_state_dict.pth"),
        ("latent", "16k", "v1-16.pth"),
        ("latent", "44k", "v1-44.pth"),
    ):
        with pytest.raises(ValueError, match=f"{file} is missing: .*mmaudio-hf weights download"):
            load_encoders(released, mode, (component,))
    (tmp_path / "v1-44.pth").touch()
    with pytest.raises(ValueError, match=r"bigvgan_generator\.pt is missing"):
        load_encoders(released, "44k", ("decode",))
    with pytest.raises(ValueError, match=r"encoders.kind 'real': use one of released, toy"):
        load_encoders(replace(toy, kind="real"), "16k")
    with pytest.raises(ValueError, match=r"encoders.precision 'fp16'"):
        load_encoders(replace(toy, precision="fp16"), "16k")
    with pytest.raises(ValueError, match="unknown components speech"):
        load_encoders(toy, "16k", ("speech",))
    with pytest.raises(ValueError, match="'text' was not loaded"):
        load_encoders(toy, "16k", ("clip",)).encode_text(["a"])
    with pytest.raises(ValueError, match="list of captions"):
        load_encoders(toy, "16k", ("text",)).encode_text("a")
    with pytest.raises(ValueError, match="is not known to torch"):
        pick_device("abacus")
