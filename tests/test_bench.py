"""What the benchmarks compare is the same work, and they measure what they say."""

import json
import multiprocessing
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from toy_stores import MODEL

from mmaudio_hf.bench import inference
from mmaudio_hf.bench.inference import plain_read
from mmaudio_hf.bench.training import _receive, compare_step, durations, loop_overhead, scaling, step
from mmaudio_hf.cli import main
from mmaudio_hf.config import model_config, variant_config
from mmaudio_hf.media.video import read_video
from mmaudio_hf.schema import RunError
from mmaudio_hf.training.ema import PostHocEMA

ROOT = Path(__file__).parent.parent
TINY = model_config(MODEL | {"hidden_dim": 32}, "test")


def test_the_straightforward_reading_gives_the_same(example_media):
    video = sorted((example_media() / "videos").glob("*.mp4"))[0]
    clip_frames, sync_frames, audio = plain_read(video, "16k")
    clip = read_video(video, as_uint8=True, normalize_audio=False)
    assert torch.equal(clip_frames, clip.clip_frames)
    assert torch.equal(sync_frames, clip.sync_frames)
    torch.testing.assert_close(audio[: len(clip.audio)], clip.audio, atol=1e-5, rtol=0)


def test_the_reader_is_measured_in_turn_with_that_of_another_checkout(example_media, tmp_path, capsys):
    video = sorted((example_media() / "videos").glob("*.mp4"))[0]
    command = ["bench", "extract", "--json", "--rounds", "1", "--video", str(video), "--against"]
    assert main([*command, str(Path(inference.__file__).parents[2])]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ratio"] > 0
    assert figures["ratio"] == pytest.approx(figures["ours_videos_s"] / figures["other_videos_s"])
    assert main([*command, str(tmp_path)]) == 2 and "no checkout of this repository" in capsys.readouterr().err


def test_emulated_bf16_is_measured_at_a_small_size(monkeypatch):
    monkeypatch.setattr(inference.synchformer, "DEPTH", 2)  # of fp32, to be quick
    monkeypatch.setattr(inference, "emulates_bf16", lambda _: True)
    figures = inference._encoder_rates("16k", rounds=1)
    assert figures["fp32_size"] == "2 Synchformer blocks, 500 mel frames"
    assert figures["bf16_size"] == "1 Synchformer blocks, 64 mel frames"
    rates = [value for name, value in figures.items() if name.endswith(("gflop_s", "of_matmul"))]
    assert len(rates) == 8 and all(value > 0 for value in rates)


def test_the_overhead_of_the_loop_is_what_it_adds_to_a_step(monkeypatch):
    figures = step(TINY, 2, 1, ["fp32"])
    assert 0 < figures["fp32_ema_share"] < 1 and figures["fp32_loop_overhead"] > -0.9
    monkeypatch.setattr(PostHocEMA, "update", lambda self: time.sleep(1))
    assert loop_overhead(TINY, 2, "fp32", 1) > 1.5


def test_the_step_is_compared_with_that_of_another_checkout(tmp_path):
    """The other is one before `bench.training`, which has the function in `bench.step`."""
    with pytest.raises(ValueError, match="no checkout of this repository; make one"):
        compare_step(TINY, tmp_path, 2, 2)
    bench = tmp_path / "mmaudio_hf" / "bench"
    bench.mkdir(parents=True)
    for module in (bench.parent / "__init__.py", bench / "__init__.py", bench / "step.py"):
        module.write_text("import time\ndef _train_step(*_):\n    return (lambda: time.sleep(1), 0), None\n")
    (bench.parent / "config.py").write_text("ModelConfig = dict\n")
    figures = compare_step(TINY, tmp_path, 2, 1)
    assert figures["fp32_throughput_of_other"] > 1 and figures["fp32_other_step_seconds"] > 1


def test_a_mixture_of_durations_is_compared_with_each_alone():
    figures = durations(TINY, (1.0, 2.0), 130, 1)
    assert (figures["samples_of_1s"], figures["samples_of_2s"]) == (4, 2)
    assert figures["tokens_per_second_2s"] > 0 and figures["of_1s_alone"] > 0
    low, high = sorted((figures["of_1s_alone"], figures["of_2s_alone"]))
    assert low <= figures["of_one_length"] <= high


def test_two_processes_are_compared_with_one():
    figures = scaling(TINY, 2, 1)
    ratio = figures["one_process_step_seconds"] / figures["two_processes_step_seconds"]
    assert figures["weak_scaling_efficiency"] == ratio > 0 and figures["machine_efficiency"] > 0
    assert not multiprocessing.active_children()


def test_a_process_that_ends_is_noticed():
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(RunError, match="a process has ended too early"):
        _receive(ours)


@pytest.mark.parametrize(
    "words", [["step", "--rounds", "0"], ["scaling", "--batch-size", "-1"], ["step", "--rounds=x"]]
)
def test_counts_that_measure_nothing_are_errors(words, capsys):
    with pytest.raises(SystemExit) as ending:
        main(["bench", *words])
    assert ending.value.code == 2 and "is not a whole number from 1 to 1000000" in capsys.readouterr().err


def test_both_ways_of_sampling_are_the_same_work():
    network = inference._random_model(variant_config("small_16k", hidden_dim=64, num_heads=1, **inference.SMALL_BF16))
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.05)):
        figures = inference._sampling(network, 2, precision, rounds=2)
        assert 0 < figures["relative_difference"] < tolerance, precision
        assert figures["plain_of_ours"] == figures["plain_seconds"] / figures["ours_seconds"]
        assert 0 < figures["prepare_share"] < 1


def test_every_stage_of_generation_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(inference.clip, "clip_config", partial(inference.clip.clip_config, 1, 1))
    monkeypatch.setattr(inference, "CLIP_LAYERS", ())
    shallow = partial(inference.synchformer.SynchformerVisual, depth=1)
    monkeypatch.setattr(inference.synchformer, "SynchformerVisual", shallow)
    monkeypatch.setattr(inference.vocoder, "Vocoder", partial(inference.vocoder.Vocoder, width=64))
    monkeypatch.setattr(inference, "SIZE", (128, 72))
    times = {}
    with torch.inference_mode():
        for name, run, count in inference._stage_runs("16k", 250, torch.device("cpu"), tmp_path):
            run()
            times[name] = count
    assert times == {
        "read": 1,
        "encode_clip": 8 * 64,
        "encode_text": 8,
        "encode_sync": 24,
        "decode_latent": 10,
        "vocoder": 10,
        "write_flac": 1,
        "write_mp4": 1,
    }
    assert (tmp_path / "out.mp4").stat().st_size > 10_000


def test_scores_of_random_caches_are_measured(tmp_path, monkeypatch, capsys):
    """Of small features: a matrix root of 2,048 columns, of which 40 rows have need, takes a minute."""
    small = {name: tuple((*shape[:-1], 5) for shape in shapes) for name, shapes in inference._CACHES.items()}
    monkeypatch.setattr(inference, "_CACHES", small)
    monkeypatch.setattr(inference, "PAIRS", 1)
    command = ["bench", "scores", "--json", "--rounds", "1", "--items", "40", "--folder", str(tmp_path)]
    assert main(command) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["items"], figures["scores"]) == (40, 12)  # all but DeSync
    assert 0 < figures["peak_gb"] < 2 and figures["seconds"] > 0 and figures["processor_seconds"] > 0
    assert figures["desync_of_matmul"] > 0 and figures["desync_seconds_a_pair"] > 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
    inference.make_caches(tmp_path, 40)
    assert len(written) == 14 and written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
