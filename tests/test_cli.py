"""The command line as a user meets it: every step of the quick start on a handful of clips, and mistakes on the way."""

import contextlib
import errno
import fcntl
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import av
import pytest
import yaml
from forked import Command, resize_disk, wait_until
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mmaudio_hf.cli import main, parse
from mmaudio_hf.config import load_recipe, model_config, to_dict
from mmaudio_hf.files import locked
from mmaudio_hf.schema import RunError

ROOT = Path(__file__).parent.parent


class Result(NamedTuple):
    """What a command printed."""

    stdout: str
    stderr: str


class Terminal(io.StringIO):
    """One on which progress bars are shown."""

    def isatty(self) -> bool:
        return True


def run(*words: str, cwd: Path, code: int = 0) -> Result:
    """Run `mmaudio-hf` in this process (importing torch again takes longer than most commands) in folder `cwd`."""
    output, errors = io.StringIO(), Terminal()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        returned = main(words)
    assert returned == code, output.getvalue() + errors.getvalue()
    return Result(output.getvalue(), errors.getvalue())


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder in which the quick start has been run in its short form, with a still smaller network."""
    folder = tmp_path_factory.mktemp("project")
    tree = to_dict(load_recipe(ROOT / "recipes" / "example_short.yaml"))
    tree["model"] = {"variant": "small_16k", "hidden_dim": 64, "num_heads": 1, "depth": 2, "fused_depth": 1}
    tree["training"] |= {"steps": 2, "batch_size": 2, "log_every": 1, "validate_every": 2, "checkpoint_every": 2}
    tree["sampling"] |= {"num_steps": 2}
    (folder / "short.yaml").write_text(yaml.safe_dump(tree | {"name": "short"}))
    run("example-media", "output/example_short-media", "--small", cwd=folder)
    run("extract-video", "short.yaml", cwd=folder)
    failed = run("extract-audio", "short.yaml", cwd=folder, code=2)
    assert "run `mmaudio-hf partition short.yaml` first" in failed.stderr
    run("partition", "short.yaml", cwd=folder)
    run("extract-audio", "short.yaml", cwd=folder)
    run("train", "short.yaml", cwd=folder)
    return folder


def test_stores_verify(project):
    for name in ("video_train", "video_val", "video_test", "audio_train"):
        result = run("verify", f"output/example_short-features/{name}", cwd=project)
        assert result.stdout.strip().endswith("ok")
    file = project / "output/example_short-features/video_test/mean.memmap"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert "checksum" in run("verify", "output/example_short-features/video_test", cwd=project, code=1).stdout
    content[100] ^= 1
    file.write_bytes(content)


def test_rows_encoded_again_are_those_of_their_files(project, tmp_path):
    features, media = "output/example_short-features", project / "output/example_short-media"
    encoded_again = {}
    for name, kind, columns in (("video_test", "videos", 5), ("audio_train", "audios", 3)):
        arguments = ("verify", f"{features}/{name}", "--sample", "2", "--media", str(media / kind))
        lines = run(*arguments, cwd=project).stdout.splitlines()
        expected = ": 2 rows encoded again, relative difference at most 0"
        encoded_again[name] = [line for line in lines if expected in line]
        assert len(encoded_again[name]) == columns and lines[-1].endswith("ok")
    manifest = json.loads((project / features / "video_test.manifest.json").read_text())
    assert manifest["preprocessing"]["alignment"] == "timestamps" and manifest["preprocessing"]["normalize_audio"]
    # The same in the compact layout, with the recipe's encoders and text alone.
    compact = str(tmp_path / "audio_train")
    run("store", "convert", f"{features}/audio_train", compact, "--layout", "compact", cwd=project)
    info = json.loads(run("store", "inspect", compact, "--json", cwd=project).stdout)
    assert info["layout"] == "compact" and info["bytes"] < 0.6 * info["reference_bytes"]
    assert info["columns"]["text_features"]["records"] == info["distinct_captions"] < info["rows"]
    assert "audio_train: " in run("store", "inspect", compact, cwd=project).stdout
    run("store", "verify", compact, "--sample", "3", "--recipe", "short.yaml", cwd=project)
    # One file under the name of another.
    ids = [line.split("\t")[0] for line in (project / features / "video_test.tsv").read_text().splitlines()[1:]]
    for item_id, other in zip(ids, [*ids[1:], ids[0]], strict=True):
        (tmp_path / f"{item_id}.mp4").symlink_to(media / "videos" / f"{other}.mp4")
    result = run("verify", f"{features}/video_test", "--sample", "1", "--media", str(tmp_path), cwd=project, code=1)
    assert "clip_features of row" in result.stdout and "are not those of its file" in result.stdout
    failed = run("extract-audio", "short.yaml", "extraction.layout=compact", cwd=project, code=2)
    assert "has the layout reference" in failed.stderr and "mmaudio-hf store convert" in failed.stderr


def test_long_commands_show_their_progress(project, tmp_path):
    store, out = "output/example_short-features/video_test", str(tmp_path / "out")
    for words, unit in (
        (("verify", store), "B/s"),
        (("store", "convert", store, out, "--layout", "compact"), "row/s"),
        (("store", "subset", store, f"{out}_rows", "--rows", "0:1"), "row/s"),
        (("export", "output/short", "--out", f"{out}_reference"), "file/s"),
        (("report", "--run", "output/short", "--clips", "1"), "clip/s"),
    ):
        errors = run(*words, cwd=project).stderr
        assert "0%|" in errors and ("?" + unit in errors or unit in errors), words


def test_dry_run_knows_the_rows(project):
    derived = yaml.safe_load(run("train", "short.yaml", "--dry-run", cwd=project).stdout)["derived"]
    assert derived["steps_per_epoch"] == derived["rows_per_epoch"] / 2
    assert derived["lengths"] == {"latent": 250, "clip": 64, "sync": 192, "sync_frames": 200, "audio_samples": 128000}
    derived = yaml.safe_load(run("train", "short.yaml", "data.train.1.path=no/store", "--dry-run", cwd=project).stdout)
    assert derived["derived"]["rows_per_epoch"] == "unknown: no store at no/store"


def test_dry_run_compares_stores_with_the_recipe(project):
    result = run("train", "short.yaml", "--dry-run", "model.variant=small_44k", cwd=project, code=2)
    assert "mean" in result.stderr and "small_44k" in result.stderr


def test_a_run_says_what_it_trains_and_where_it_is(project):
    lines = run("train", "short.yaml", "name=words", cwd=project).stdout.splitlines()
    assert lines[0].startswith("words: all weights, initially random, on video_train ")
    assert lines[-4].startswith("finished at step 2: weights are in output/words/last/pretrained_model")
    assert lines[-2].strip() == "look:    mmaudio-hf report --run output/words"


def test_generate_writes_audio_and_video(project):
    video = sorted((project / "output/example_short-media/videos").glob("*.mp4"))[0]
    options = ("--run", "output/short", "--video", str(video), "--steps", "2")
    run("generate", *options, "--prompt", "a ball", "--out", "made/with_audio.mp4", cwd=project)
    run(
        "generate", "--run", "output/short", "--prompt", "a bell", "--steps", "1", "--out", "made/text.wav", cwd=project
    )
    with av.open(str(project / "made" / "with_audio.mp4")) as result:
        assert {stream.type for stream in result.streams} == {"video", "audio"}
    with av.open(str(project / "made" / "text.wav")) as result:
        assert result.streams.audio[0].rate == 16000
        assert sum(frame.samples for frame in result.decode(audio=0)) == 128000


def test_report_ends_with_the_summary(project):
    events = "output/example_short-media/events.json"
    result = run("report", "--run", "output/short", "--events", events, "--clips", "1", "--started", "0", cwd=project)
    assert (project / "output/short/report/index.html").stat().st_size > 10_000
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("summary ")
    summary = json.loads(last.removeprefix("summary "))
    names = {"f1_right", "f1_shuffled", "val_loss_first", "val_loss_last", "steps_per_s", "peak_mem_gb", "seconds"}
    assert names <= summary.keys()
    assert all(isinstance(summary[name], (int, float)) for name in names)


def test_bench_step_measures_and_prints_json(project, monkeypatch):
    network = model_config(
        {"variant": "small_16k", "hidden_dim": 64, "num_heads": 1, "depth": 2, "fused_depth": 1}, "a toy network"
    )
    monkeypatch.setattr("mmaudio_hf.cli.training.variant_config", lambda variant: network)
    options = ("--variant", "small_16k", "--batch-size", "1", "--json", "--rounds", "1", "--precision", "fp32")
    figures = json.loads(run("bench", "step", *options, cwd=project).stdout)
    assert 0 < figures["fp32_step_tflop"] < 0.03
    assert 0 < figures["fp32_step_of_matmul"] < 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--run", "x", "--out", "a.wav"], "give --video, --image, --prompt, --folder or --list"),
        (["generate", "--run", "x", "--prompt", "p", "--out", "a.mp4"], "choose a .wav or .flac name"),
        (["train", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["verify", "gone", "--media", "x"], "give --sample N as well"),
        (["store", "subset", "gone", "new"], "Give --rows, --ids or --match"),
        (["store", "inspect", "gone"], "no feature store at gone"),
        (["report", "--run", "nowhere"], "nowhere is not a run folder"),
        (["partition", str(ROOT / "recipes/small_16k.yaml"), "extraction.audios=[]"], "nothing under extraction"),
        (["train", str(ROOT / "recipes" / "example.yaml"), "data.train=[]"], "names no feature store"),
        (["train", str(ROOT / "recipes" / "example.yaml"), "data.train=[{path: gone}]"], "gone"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_sentence(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (None, 0),
        (ValueError("a mistake"), 2),
        (RunError("a fault"), 1),
        (ConnectionError("no network"), 1),
        (OSError(errno.ENOSPC, "No space left on device", "file"), 1),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 1),
        (OSError(errno.ENOTDIR, "Not a directory", "file"), 2),
        (OSError(errno.EROFS, "Read-only file system", ".file.12.part"), 2),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1),  # of a connection: of stdout it is 141
        (ModuleNotFoundError("no module", name="torch"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_codes_are_those_of_the_page(end, code, monkeypatch, capsys):
    """128 + n after a signal: tests/test_training_guard.py."""

    def command(_):
        if end is not None:
            raise end

    monkeypatch.setattr("mmaudio_hf.cli.hub._weights_list", command)
    assert main(["weights", "list"]) == code
    assert len(capsys.readouterr().err.splitlines()) == (code != 0)
    assert f"\n| {code} | " in (ROOT / "docs" / "troubleshooting.md").read_text()


def test_a_file_in_the_way_of_a_folder_is_named(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    Path("afile").touch()
    for words in (
        ["evaluate", "output/short", "--out"],
        ["export", "output/short", "--out"],
        ["prepare", "table", "t.csv", "--out"],
    ):
        Path("t.csv").write_text("id,text\na,b\n")
        assert main([*words, "afile/below/it"]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: (/.*/)?afile is a file[:;] (name|give) a folder.*\n", error), error


def test_streams_that_are_closed_full_or_not_read(tmp_path):
    """Quietly where nobody reads (as `| head -1`), else with a sentence; a file never gets the place of stderr."""
    for end, code, message in (
        ("list | :", 141, ""),
        ("list > /dev/full", 1, "No space left on device"),
        ("nonsense <&- >&- 2>&-", 2, ""),
    ):
        script = f"set -o pipefail; {sys.executable} -m mmaudio_hf.cli weights {end}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code and len(done.stderr.splitlines()) == bool(message) and message in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_as_ctrl_c_does(project, tmp_path, number):
    words = ("export", "output/short", "--out", str(tmp_path))
    with Command(*words, cwd=project, freeze=("torch.save", 2)) as process:
        wait_until((tmp_path / "short_last.pth").exists, process)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert process.output()[1].splitlines()[-1] == f"interrupted by {number.name}: run the same command again"
    assert [path.name for path in tmp_path.iterdir()] == ["short_last.pth"]


def export_to_a_small_disk(folder: Path) -> int:
    resize_disk(folder, "1m")
    code = main(["export", "output/short", "--out", str(folder / "out")])
    print(sorted(path.name for path in (folder / "out").iterdir()))
    return code


def test_an_export_to_a_full_disk_names_the_file(project, tmp_path):
    done = Command(export_to_a_small_disk, tmp_path, cwd=project, own_mounts=True).result()
    expected = f"error: {tmp_path}/out/short_last.pth: No space left on device: free some space and run the same"
    assert done.returncode == 1 and expected in done.stderr and done.stdout.endswith("[]\n"), done


def test_paths_of_options_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    options = parse(["generate", "--run", "x", "--prompt", "p", "--out=~/a.wav", "--folder=$SCRATCH/b"])
    assert (options.out, options.folder) == (Path("/home/me/a.wav"), Path("/scratch/b"))


def test_torchrun_gets_the_sentence(monkeypatch, tmp_path, capsys):
    """It shows the message of a process below its own traceback."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["train", "nowhere.yaml"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert "error: no recipe at nowhere.yaml" in ChildFailedError("train.py", {0: failure}).format_msg()


def test_an_error_without_a_reason_from_the_system_keeps_its_text(monkeypatch, tmp_path):
    """As some libraries raise them: OSError("text") has no errno, and its strerror is None."""

    def flock(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    message = "no locks here: extraction needs a file system with working locks"
    with pytest.raises(OSError, match=message), locked(tmp_path / "lock"):
        pass
