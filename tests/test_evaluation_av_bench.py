"""av-benchmark: features extracted in an environment of its own, by a fake of it, and its failures."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate import PartialState
from fake_av_bench import FakeAvBench, fork_jobs
from forked import Command, run_together, wait_until
from golden_data import normal
from hub_server import TOKEN, USER, Hub
from huggingface_hub import HfApi
from toy_stores import recipe_tree, write_codec, write_store
from training_runs import environment, run_dir

from mmaudio_hf.cli import main
from mmaudio_hf.config import load_recipe
from mmaudio_hf.doctor import CHECKS, Launch, examine
from mmaudio_hf.evaluation import av_bench, score_caches
from mmaudio_hf.evaluation.av_bench import (
    CLAP_FILE,
    SYNCHFORMER_FILE,
    AvBench,
    PublishedScores,
    check_truth,
    merge_caches,
    truth_caches,
)
from mmaudio_hf.evaluation.results import read_scores
from mmaudio_hf.evaluation.run import SplitEvaluator, _store_hash
from mmaudio_hf.features.encoders import decoder_fingerprint
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import RunError

CPU = torch.device("cpu")
IDS = [f"test_{i:04d}" for i in range(12)]


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> FakeAvBench:
    return FakeAvBench(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def habits(tmp_path_factory) -> FakeAvBench:
    return FakeAvBench(tmp_path_factory.mktemp("habits"), networks=True)


@pytest.fixture
def own_interpreter() -> None:
    """For tests whose jobs are run by the interpreter of the environment, as those of users are."""


@pytest.fixture(autouse=True)
def behaves(fake, habits, request, monkeypatch):
    if "own_interpreter" not in request.fixturenames:
        fork_jobs(monkeypatch)
    yield
    fake.misbehave("")
    habits.misbehave("")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, fake) -> Path:
    """A recipe that asks for published scores, and a network beside it that was not trained."""
    folder = tmp_path_factory.mktemp("published")
    tree = recipe_tree(folder)
    write_store(folder / "test", len(IDS), seed=3)
    write_codec(folder)
    for name in (CLAP_FILE, SYNCHFORMER_FILE):
        (folder / name).write_bytes(b"weights")
    tree |= {"name": "published", "sampling": {"num_steps": 1, "batch_size": 4}}
    metrics = ["fd", "kl", "is", "clap"]
    tree |= {"evaluation": {"metrics": metrics, "av_bench_python": str(fake.python), "keep_clips": True}}
    tree["data"]["test"] = [{"path": str(folder / "test")}]
    path = folder / "published.yaml"
    path.write_text(yaml.safe_dump(tree))
    torch.manual_seed(0)
    network = MMAudio(load_recipe(path).model)
    network.latent_mean.fill_(0.0)
    network.latent_std.fill_(1.0)
    network.save_pretrained(folder / "network")
    return path


@pytest.fixture(scope="module")
def extracted(fake, tmp_path_factory) -> Path:
    """A folder with two audio files."""
    folder = tmp_path_factory.mktemp("extracted")
    (folder / "audio").mkdir()
    for item_id in IDS[:2]:
        write_audio(folder / "audio" / f"{item_id}.wav", torch.from_numpy(0.1 * normal(item_id, (16000,))), 16000)
    return folder


def bench(fake, folder: Path, **options) -> AvBench:
    for name in (CLAP_FILE, SYNCHFORMER_FILE):
        (folder / name).write_bytes(b"weights")
    return AvBench(str(fake.python), folder, **options)


def test_extraction_in_another_environment(own_interpreter, fake, extracted, capfd):
    bench_here = bench(fake, extracted)
    assert bench_here.problem() is None
    bench_here.extract(extracted / "audio", extracted / "cache", duration=1.0, device=CPU, video=False, clap=True)
    names = (
        "pann_features",
        "vggish_features",
        "passt_features_embed",
        "passt_logits",
        "clap_laion_audio",
        "clap_ms_audio",
    )
    assert {path.name for path in (extracted / "cache").iterdir()} == {f"{name}.pth" for name in names}
    for name in names:
        assert list(torch.load(extracted / "cache" / f"{name}.pth", weights_only=True)) == IDS[:2]
    assert "loading 1.0 cpu" in (extracted / "cache.log").read_text(errors="replace")
    assert capfd.readouterr().out == ""  # what it prints goes to the log


def test_every_way_to_fail_has_a_message(fake, extracted):
    bench_here = bench(fake, extracted)

    def run():
        return bench_here.extract(
            extracted / "audio", extracted / "lost", duration=1.0, device=CPU, video=True, clap=False
        )

    for misdeed, message in (
        ("raise", r"RuntimeError: CUDA out of memory; it printed last: .*RuntimeError: CUDA out of memory"),
        ("die", r"ended by signal 9 without a result; it printed last: .*\{not json\}"),
        ("import", r"ImportError: cannot import name 'find_pruneable"),
    ):
        fake.misbehave(misdeed)
        with pytest.raises(RunError, match=message):
            run()
    assert "install it by `mmaudio-hf weights av-bench --env av-bench-env`" in bench_here.problem()
    fake.misbehave("forget")  # costs this file alone
    assert run() == {"passt_logits.pth": "av-benchmark ended without an error, but did not write it"}
    fake.misbehave("")
    (extracted / CLAP_FILE).unlink()
    assert f"`mmaudio-hf weights download {CLAP_FILE} --dir {extracted}`" in bench_here.problem()
    with pytest.raises(RunError, match=f"FileNotFoundError: .*{CLAP_FILE}"):
        run()
    assert "is not a program" in AvBench(str(extracted / "python"), extracted).problem()
    assert "is not a program" in AvBench(str(extracted), extracted).problem()
    (extracted / "text").write_bytes(b"\0")
    (extracted / "text").chmod(0o755)
    assert (
        f"{extracted / 'text'} cannot be run: Exec format error"
        in AvBench(str(extracted / "text"), extracted).problem()
    )
    assert "ModuleNotFoundError: No module named 'av_bench'" in AvBench(sys.executable, extracted).problem()
    assert "No module named 'av_bench'" in AvBench("", extracted).problem()  # in this process


def test_each_network_fails_on_its_own(habits, extracted, tmp_path, monkeypatch):
    """With batches of one, a file that is too short for Synchformer, one that is none, and a question of torch.hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    audio = shutil.copytree(extracted / "audio", tmp_path / "audio")
    write_audio(audio / "short.wav", torch.zeros(8000), 16000)
    (audio / "none.wav").write_bytes(b"no audio")
    here, caches = bench(habits, tmp_path, batch_size=1), tmp_path / "cache"
    options = {"duration": 1.0, "device": CPU, "video": True, "clap": True}
    habits.misbehave("network")
    failed = here.extract(audio, caches, **options)
    assert len(failed) == 1, (failed, (tmp_path / "cache.log").read_text())
    (reason,) = failed.values()
    assert list(failed) == ["imagebind_audio.pth"] and "URLError" in reason and "name resolution" in reason
    features = {path.stem: torch.load(path, weights_only=True) for path in caches.glob("*.pth")}
    assert len(features) == 7 and list(features["synchformer_audio"]) == IDS[:2]
    for name, shape in (("clap_ms_audio", (7,)), ("vggish_features", (8, 4)), ("passt_logits", (527,))):
        assert {i: tuple(v.shape) for i, v in features[name].items()} == dict.fromkeys(["short", *IDS[:2]], shape)
    assert "none.wav cannot be read: Error" in (log := tmp_path / "cache.log").read_text()
    # Afterwards only what is missing is made, and the same stretch of a file is taken again.
    habits.misbehave("")
    assert here.extract(audio, caches, **options) == {} and "panns" not in log.read_text()
    assert here.extract(audio, tmp_path / "again", **options) == {}
    again = torch.load(tmp_path / "again" / "clap_ms_audio.pth", weights_only=True)
    assert all(torch.equal(again[i], value) for i, value in features["clap_ms_audio"].items())


def test_weights_are_fetched_by_one_process_at_a_time(own_interpreter, habits, extracted, tmp_path, monkeypatch):
    """Two processes that need the same weights at once, as ranks do; the second one finds them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    habits.misbehave("fetch")
    here, options = bench(habits, tmp_path), {"duration": 1.0, "device": CPU, "video": False, "clap": False}
    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path / "first", tmp_path / "second"]
        ranks = [pool.submit(here.extract, extracted / "audio", folder, **options) for folder in folders]
        assert [rank.result() for rank in ranks] == [{}, {}]
    assert habits.fetches.read_text().split() == ["begin", "end"] * 2
    assert (tmp_path / "mmaudio_hf" / "av_bench" / "vggish.fetched").exists()
    habits.fetches.unlink()


@pytest.mark.parametrize("left", ["Cnn14_mAP=0.431.pth", "Cnn14_16k_mAP=0.438.pth"])
def test_weights_of_panns_that_wget_did_not_finish_are_fetched_again(left, habits, extracted, tmp_path, monkeypatch):
    """It was ended within the first file, so that the second is missing, or within the second."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "audioldm_eval" / "ckpt"
    folder.mkdir(parents=True)
    (folder / "Cnn14_mAP=0.431.pth").write_bytes(b"whole, but never read")
    torch.save({"model": torch.ones(1000)}, folder / "whole", _use_new_zipfile_serialization=False)
    (folder / left).write_bytes(cut := (folder / "whole").read_bytes()[:3000])
    habits.misbehave("panns")
    here, options = bench(habits, tmp_path), {"duration": 1.0, "device": CPU, "video": False, "clap": False}
    assert here.extract(extracted / "audio", tmp_path / "cache", **options) == {}
    assert "panns: fetched again, since a file of it is missing or damaged" in (tmp_path / "cache.log").read_text()
    assert torch.load(folder / "Cnn14_16k_mAP=0.438.pth", weights_only=True) == {"model": {}}
    assert (folder / left).with_suffix(".damaged").read_bytes() == cut
    assert here.extract(extracted / "audio", tmp_path / "again", **options) == {}
    assert "fetched again" not in (tmp_path / "again.log").read_text()


def test_aesthetics_where_their_package_is_installed(habits, extracted, tmp_path):
    here, cache = bench(habits, tmp_path), tmp_path / "cache"
    options = {"duration": 1.0, "device": CPU, "video": False, "clap": False, "aesthetics": True}
    assert here.extract(extracted / "audio", cache, **options) == {}
    scores = score_caches(cache, cache, families=("aesthetics", "kl"))
    features = torch.load(cache / "audiobox_aesthetics.pth", weights_only=True)
    assert {f"AES-{axis}" for axis in ("CE", "CU", "PC", "PQ")} < set(scores) and set(features) == set(IDS[:2])
    assert scores["AES-PQ"].value == pytest.approx(np.mean([float(v[3]) for v in features.values()]))
    package = habits.site / "audiobox_aesthetics"
    package.rename(package.with_name("elsewhere"))
    failed = here.extract(extracted / "audio", tmp_path / "without", **options)
    package.with_name("elsewhere").rename(package)
    assert failed == {"audiobox_aesthetics.pth": "ModuleNotFoundError: No module named 'audiobox_aesthetics'"}


def test_features_of_captions_and_videos(habits, tmp_path):
    """Without torio, whose reader of videos is not needed."""
    here, cache = bench(habits, tmp_path), tmp_path / "cache"
    (tmp_path / "captions.json").write_text('{"a": "a dog", "b": "rain"}')
    (tmp_path / "frames").mkdir()
    torch.save(torch.full((4, 3, 8, 8), 51, dtype=torch.uint8), tmp_path / "frames" / "a.pt")
    for job in ({"action": "text", "captions": "captions.json"}, {"action": "video", "frames": "frames"}):
        job = {name: str(tmp_path / text) if name != "action" else text for name, text in job.items()}
        assert here.features(job, cache, 8.0, CPU) == {}
    for name, width in (("clap_laion_text", 6), ("clap_ms_text", 7)):
        features = torch.load(cache / f"{name}.pth", weights_only=True)
        assert {i: v.tolist() for i, v in features.items()} == {"a": [5.0] * width, "b": [4.0] * width}
    features = torch.load(cache / "imagebind_video.pth", weights_only=True)
    assert {i: v.tolist() for i, v in features.items()} == {"a": pytest.approx([0.2] * 5)}


def test_what_cannot_be_used_says_what_to_do(habits, extracted, tmp_path):
    here = bench(habits, tmp_path)
    assert here.problem() is None
    for misdeed, reason in (
        ("wheel", r"cannot read audio files .*TorchCodec is required.*: install 'torch<2.9' and 'torchaudio<2.9'"),
        ("offline", r"is installed, but needs the network once .*roberta-base.*`mmaudio-hf weights av-bench"),
        ("tokenizer", r"is installed, but needs the network once .*a tokenizer.*`mmaudio-hf weights av-bench"),
    ):
        habits.misbehave(misdeed)
        assert re.search(reason, here.problem()) and "TypeError" not in here.problem(), here.problem()
    habits.misbehave("wheel")
    options = {"duration": 1.0, "device": CPU, "video": False, "clap": False}
    for reason in here.extract(extracted / "audio", tmp_path / "cache", **options).values():
        assert "none of 2 audio files could be read: ImportError: TorchCodec" in reason


def test_a_stalled_extraction_is_ended(fake, extracted):
    """Endless retries, and nothing at all."""
    options = {"duration": 1.0, "device": CPU, "video": False, "clap": False}
    for misdeed, minutes, reason in (
        ("retry", 10, "printed the same lines again and again, without a result; it printed last: .*TorchCodec"),
        ("sleep", 0.05, "made no progress for 0.05 minutes"),
    ):
        fake.misbehave(misdeed)
        here = bench(fake, extracted, stall_minutes=minutes)
        with pytest.raises(RunError, match=reason):
            here.extract(extracted / "audio", extracted / "stalled", **options)
        assert (extracted / "stalled.log").stat().st_size < 1000  # each line once
    fake.misbehave("")
    here = bench(fake, extracted)
    assert here.extract(extracted / "audio", extracted / "one", **options | {"clap": True}) == {}


def test_extraction_ends_with_its_parent_process(fake, recipe, tmp_path):
    fake.misbehave("sleep")
    words = ["evaluate", str(recipe.parent / "network"), "--recipe", str(recipe), "--out", str(tmp_path)]
    with Command(*words, env=environment()) as process:
        wait_until(lambda: fake.pid_file.exists() and fake.pid_file.read_text(), process)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.output()
    with contextlib.suppress(psutil.NoSuchProcess):
        extractor = psutil.Process(int(fake.pid_file.read_text()))
        wait_until(lambda: not extractor.is_running() or extractor.status() == psutil.STATUS_ZOMBIE)


def test_in_this_process_where_it_imports(fake, extracted, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(fake.site))
    bench_here = AvBench("", bench(fake, extracted).weights_dir)
    bench_here.extract(extracted / "audio", extracted / "here", duration=1.0, device=CPU, video=False, clap=False)
    there = torch.load(extracted / "here" / "passt_logits.pth", weights_only=True)
    assert set(there) == set(IDS[:2]) and "loading" not in capfd.readouterr().out
    for name in [name for name in sys.modules if name.partition(".")[0] == "av_bench"]:
        monkeypatch.delitem(sys.modules, name)


def evaluate(recipe: Path, out: Path, *words: str) -> dict:
    assert main(["evaluate", str(recipe.parent / "network"), "--recipe", str(recipe), "--out", str(out), *words]) == 0
    return read_scores(out / "test.json")


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    """Results of one process."""
    out = tmp_path_factory.mktemp("alone")
    evaluate(recipe, out)
    return out


def test_published_scores_of_a_split(alone):
    content = read_scores(alone / "test.json")
    assert content["weights"] == {"weights": "not stated", "sigma_rel": None} and content["step"] is None
    names = {"FD-VGG", "FD-PANN", "FD-PASST", "KL-PANNS-softmax", "KL-PASST-softmax"}
    names |= {f"ISC-{net}-{kind}" for net in ("PANNS", "PASST") for kind in ("mean", "std")}
    published = {name: score for name, score in content["scores"].items() if name[0].isupper()}
    assert set(published) == names and len(content["scores"]) == len(names) + 8
    assert all(score["used"] == len(IDS) and not score["dropped"] for score in published.values())
    assert set(content["not_computed"]) == {"clap"} and "clap_laion_text.pth" in content["not_computed"]["clap"]
    # They are those of the caches that remain: of the true audio, decoded, and of the generated audio.
    again = score_caches(alone / "test_truth" / "cache", alone / "test" / "cache")
    assert {name: again[name].value for name in names} == pytest.approx({n: s["value"] for n, s in published.items()})
    for folder in (alone / "test", alone / "test_truth"):
        assert list(torch.load(folder / "cache" / "passt_logits.pth", weights_only=True)) == IDS
        assert not (folder / "parts").exists()


def evaluate_with_forks(*words: str) -> int:
    """Runs in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        fork_jobs(patch)
        return main(words)


def test_two_processes_give_the_same_scores(recipe, alone, tmp_path):
    words = ["evaluate", str(recipe.parent / "network"), "--recipe", str(recipe), "--out", str(tmp_path)]
    result = run_together(2, evaluate_with_forks, *words, cwd=tmp_path, env=environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("network, test") == 2  # the title, and a note of what is not computed
    ours, theirs = (read_scores(folder / "test.json") for folder in (tmp_path, alone))
    assert ours["items"] == theirs["items"] and ours["key"] == theirs["key"]
    for name, score in theirs["scores"].items():
        assert ours["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-3, abs=1e-3), name


def test_published_truth_is_used_as_it_is(recipe, alone, tmp_path, monkeypatch):
    """Caches of a benchmark in a folder: other ids, other files, and nothing is extracted from the true audio."""
    truth = tmp_path / "truth"
    truth.mkdir()
    for file in (alone / "test_truth" / "cache").glob("p*.pth"):
        values = torch.load(file, weights_only=True)
        values["other"] = values.pop(IDS[0])
        torch.save(values, truth / file.name)
    torch.save({i: torch.from_numpy(normal(i, (6,))) for i in IDS[1:]}, truth / "clap_laion_text.pth")
    torch.save({i: torch.from_numpy(normal(i, (7,))) for i in IDS[1:]}, truth / "clap_ms_text.pth")
    (tmp_path / "out").mkdir()
    subprocess.run(["cp", "-r", alone / "test", tmp_path / "out" / "test"], check=True)
    words = ["evaluation.metrics=[kl, clap]", f"evaluation.truth.test={truth}"]
    content = evaluate(recipe, tmp_path / "out", *words)
    assert content["truth"] == str(truth) and content["not_computed"] == {}
    names = {"KL-PANNS-softmax", "KL-PASST-softmax", "LAION-CLAP-Score", "MS-CLAP-Score"}
    assert {name for name in content["scores"] if name[0].isupper()} == names
    for name in names:
        score = content["scores"][name]
        assert score["used"] == len(IDS) - 1
        assert score["dropped"] == [{"reason": "no ground truth of this id", "count": 1, "ids": [IDS[0]]}]
    assert not (tmp_path / "out" / "test_truth").exists()
    # Caches that are added afterwards are used: what could not be computed without them is not returned again.
    (truth / "clap_ms_text.pth").rename(tmp_path / "clap_ms_text.pth")
    assert set(evaluate(recipe, tmp_path / "out", *words)["not_computed"]) == {"clap"}
    (tmp_path / "clap_ms_text.pth").rename(truth / "clap_ms_text.pth")
    assert evaluate(recipe, tmp_path / "out", *words)["not_computed"] == {}
    assert truth_caches(str(truth)) == truth
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for wrong, message in (
        ("nowhere", "neither a folder nor a dataset"),
        (str(tmp_path / "typo"), "neither a folder nor a dataset"),
        ("here/cachs/vggsound-test", "neither a folder nor a dataset"),
        ("some one/name", "not a repository of the Hub"),
        (str(tmp_path), "holds no cached"),
    ):
        with pytest.raises(ValueError, match=message):
            truth_caches(wrong)


def test_failures_cost_the_published_scores_alone(recipe, fake, tmp_path, capsys):
    for misdeed, warning, reason in (
        (
            "import",
            "warning: evaluation.metrics are left out, the other scores are computed: av-benchmark cannot",
            "cannot",
        ),
        ("die", "warning: evaluation.metrics of test are left out (its process ended by signal 9", "signal 9"),
    ):
        fake.misbehave(misdeed)
        content = evaluate(recipe, tmp_path)
        assert not any(name[0].isupper() for name in content["scores"]) and len(content["scores"]) == 8
        assert reason in content["not_computed"]["av-benchmark"]
        output = capsys.readouterr()
        assert output.err.count("warning") == 1 and warning in output.err and "no av-benchmark:" in output.out
    fake.misbehave("skip")
    content = evaluate(recipe, tmp_path)
    score = content["scores"]["KL-PASST-softmax"]
    assert score["used"] == len(IDS) - 1
    assert {"reason": "av-benchmark gave no features", "count": 1, "ids": [IDS[0]]} in score["dropped"]


def test_a_kill_while_scoring_keeps_the_features_of_the_predictions(recipe, fake, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(av_bench, "score_caches", die)
        evaluate(recipe, tmp_path)
    PartialState._reset_state()
    features = {path: path.stat().st_mtime_ns for path in (tmp_path / "test" / "cache").glob("*.pth")}
    assert len(features) == 4 and not (tmp_path / "test.json").exists()
    fake.misbehave("die")  # an extraction would fail
    content = evaluate(recipe, tmp_path, "evaluation.metrics=[fd, kl, is]", "evaluation.keep_clips=true")
    assert content["scores"]["KL-PASST-softmax"]["used"] == len(IDS) and content["not_computed"] == {}
    assert {path: path.stat().st_mtime_ns for path in features} == features


def test_av_benchmark_does_not_look_beside_toy_weights(recipe, tmp_path, capsys):
    """The codec of a toy run is in its pretrained_model; Synchformer and CLAP are where the recipe says."""
    network = shutil.copytree(recipe.parent / "network", tmp_path / "pretrained_model")
    shutil.copy(recipe.parent / "toy_codec_16k.safetensors", network)
    words = ["--recipe", str(recipe), "--out", str(tmp_path / "out"), f"encoders.weights_dir={tmp_path / 'elsewhere'}"]
    assert main(["evaluate", str(network), *words]) == 0
    error = capsys.readouterr().err
    assert f"in {tmp_path / 'elsewhere'}: fetch" in error and "pretrained_model" not in error


def test_training_warns_once_and_continues(recipe, fake, capsys):
    fake.misbehave("import")
    words = ["training.steps=2", "training.validate_every=2", "evaluation.every=2", "evaluation.after_training=true"]
    assert main(["train", str(recipe), *words, "evaluation.items=2"]) == 0
    assert capsys.readouterr().err.count("av-benchmark cannot be imported") == 1
    for split in ("validation", "test"):
        assert "av-benchmark" in read_scores(run_dir(recipe) / "evaluation" / f"{split}_step_2.json")["not_computed"]


def test_a_wrong_truth_is_an_error_before_anything_is_generated(recipe, tmp_path, capsys):
    words = [f"evaluation.truth.test={tmp_path}", "evaluation.after_training=true", "name=wrong_truth"]
    source = ["evaluate", str(recipe.parent / "network"), "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    for command in (["train", str(recipe)], source):
        assert main([*command, *words]) == 2
        assert f"evaluation.truth.test: {tmp_path} holds no cached features" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (recipe.parent / "output" / "wrong_truth" / "last").exists()


def test_a_damaged_key_of_the_true_audio_is_ignored(recipe, alone, tmp_path):
    """As a full disk left it; a complete one says that its features were extracted."""
    shutil.copytree(alone / "test_truth", tmp_path / "test_truth")
    evaluator = SplitEvaluator(load_recipe(recipe), "test", folder=tmp_path)
    decoder = decoder_fingerprint(evaluator.recipe.encoders, evaluator.recipe.model.mode)
    truth_key = {"decoder": decoder, "stores": list(map(_store_hash, evaluator.items.paths))}
    published = PublishedScores(evaluator.recipe, "test", tmp_path, evaluator.items, truth_key, None)
    assert published.truth_dir() is None
    (tmp_path / "test_truth" / "key.json").write_bytes(b"")
    assert published.truth_dir() == tmp_path / "test_truth" / "clips"


def test_doctor_says_it_before(recipe, fake):
    def findings(*overrides):
        checks = {name: check for name, check in CHECKS.items() if name.startswith(("av-benchmark", "evaluation"))}
        return list(examine(Launch(load_recipe(recipe, overrides)), checks))

    scored = "evaluation.after_training=true"
    assert [finding.level for finding in findings(scored)] == ["ok"]
    fake.misbehave("import")
    (finding,) = findings(scored)
    assert finding.level == "warn" and "`mmaudio-hf weights av-bench" in finding.message
    assert [f.level for f in findings(scored, "evaluation.truth.test=nowhere")] == ["warn", "FAIL"]
    assert "holds no cached" in findings(scored, f"evaluation.truth.test={recipe.parent / 'test'}")[1].message
    assert [f.level for f in findings(scored, "evaluation.truth.test=someone/caches/test")] == ["warn", "warn"]
    assert findings() == []


def test_caches_are_merged_in_the_order_of_the_split(tmp_path):
    for share, ids in (("0", ("b", "d")), ("1", ("a",))):
        (tmp_path / share).mkdir()
        torch.save({i: torch.ones(1) for i in ids}, tmp_path / share / "x.pth")
    assert merge_caches([tmp_path / "0", tmp_path / "1"], tmp_path / "all", ["x.pth"], ["a", "b", "c", "d"]) == (
        {"x.pth": ["c"]},
        {},
    )
    assert list(torch.load(tmp_path / "all" / "x.pth", weights_only=True)) == ["a", "b", "d"]
    (tmp_path / "1" / "x.pth").write_bytes(b"rubbish")
    lacking, failed = merge_caches([tmp_path / "0", tmp_path / "1"], tmp_path / "all", ["x.pth"], ["a"])
    assert lacking == {} and "1/x.pth, which av-benchmark wrote, cannot be read" in failed["x.pth"]


def test_truth_from_the_hub(recipe, tmp_path, monkeypatch):
    with Hub(tmp_path / "hub") as hub:
        hub.use_here(monkeypatch, tmp_path / "home")
        name, file = f"{USER}/results", tmp_path / "passt_logits.pth"
        torch.save({"a": torch.ones(3)}, file)
        HfApi().create_repo(name, repo_type="dataset")
        for file_name in ("vggsound/test/passt_logits.pth", "vggsound/test/audio.tar", "other.pth"):
            HfApi().upload_file(path_or_fileobj=file, path_in_repo=file_name, repo_id=name, repo_type="dataset")
        folder = truth_caches(f"{name}/vggsound/test")
        assert [path.name for path in folder.iterdir()] == ["passt_logits.pth"]
        assert torch.load(folder / "passt_logits.pth", weights_only=True)["a"].sum() == 3
        assert [path.name for path in truth_caches(name).glob("*.pth")] == ["other.pth"]
        with pytest.raises(ValueError, match=f"{name}/nothing holds no cached features"):
            truth_caches(f"{name}/nothing")
        with pytest.raises(ValueError, match="cannot be fetched from the Hub") as caught:
            truth_caches(f"{USER}/missing")
        assert TOKEN not in str(caught.value)
        warnings = []
        missing = load_recipe(recipe, [f"evaluation.truth.test={USER}/missing"])
        check_truth(missing, ["test"], "av-benchmark is broken", warnings.append)
        assert warnings == []  # what cannot be used is not fetched
        check_truth(missing, ["test"], None, warnings.append)
        assert len(warnings) == 1 and "cannot be fetched from the Hub" in warnings[0] and TOKEN not in warnings[0]
