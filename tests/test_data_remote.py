"""Stores on a Hub on loopback that are trained from without being pulled: same numbers, a cap, killed anywhere."""

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from data_stores import make_store, random_values
from forked import IMPORTED, PATIENCE, Command, run_together, wait_until
from hub_server import Hub
from huggingface_hub import constants
from toy_stores import MODEL, recipe_tree, write_codec, write_store
from training_runs import TINY, finished, last_step, run_dir, same_bytes

from mmaudio_hf.cli import main
from mmaudio_hf.data.mixture import Mixture
from mmaudio_hf.data.remote import NEVER, Entries, NextUse, RemoteStore, Seat, Share, divide
from mmaudio_hf.data.sampler import dataset_indices
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.files import write_text
from mmaudio_hf.hub.stores import connect

STEPS, EVERY = 24, 2
LEAST = 24  # rows of two stores of 40 that a cache has
WAIT = f"data.connection_wait={PATIENCE}"  # a loaded machine answers late
DELAY = {"match": "GET /storage", "delay": 0.05}  # of every request for rows


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server with stores for training, and small ones in both layouts; they were pushed from the folder beside it."""
    root = tmp_path_factory.mktemp("remote")
    write_store(root / "videos", 80)
    write_store(root / "audios", 8, video=False, seed=1)
    write_store(root / "held_out", 5, seed=2)
    make_store(root / "plain", 40)
    make_store(root / "texts", 40, layout="compact", seed=1)
    with Hub(root / "hub") as server, pytest.MonkeyPatch.context() as patch:
        server.use_here(patch, root / "home")
        for name, size in (("videos", 4), ("held_out", 4), ("plain", 0.002), ("texts", 0.002)):
            words = ["store", "push", str(root / name), f"tester/{name}", "--part-size", str(size)]
            assert main(words) == 0
        yield server


def size_of(*folders: Path) -> int:
    """Bytes on the disk of everything in folders, some of which may go meanwhile."""
    sizes = []
    for path in (path for folder in folders for path in folder.rglob("*")):
        try:
            sizes.append(path.lstat().st_blocks * 512)
        except FileNotFoundError:
            continue
    return sum(sizes)


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Sizes of a folder, looked at all the time."""
    sizes, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            sizes.append(size_of(folder))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield sizes
    finally:
        done.set()
        watching.join()


def write_recipes(here: Path, folder: Path, cap: float) -> tuple[Path, Path]:
    """The same run over stores of this machine, and over those on the Hub, except the audios."""
    tree = recipe_tree(here, steps=STEPS, batch_size=2, checkpoint_every=EVERY, log_every=4, validate_every=12)
    tree["model"], tree["output_dir"] = MODEL | TINY, str(folder / "output")
    tree["data"]["prefetch_batches"] = 1
    paths = []
    for name in ("local", "remote"):
        if name == "remote":
            tree["data"]["train"][0] = {"path": "hub://tester/videos"}
            tree["data"]["validation"] = [{"path": "hub://tester/held_out"}]
            tree["data"] |= {"cache_dir": str(folder / "cache"), "cache_gb": cap / 1e9, "connection_wait": 20}
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(tree | {"name": name}))
    return paths[0], paths[1]


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_and_a_quarter_of_the_store_train_the_same_model(hub, here, tmp_path, capsys, kills):
    """50 ms a request; the disk is looked at all the time; it is killed at each checkpoint, with rows read ahead.

    Another store is pushed there meanwhile: a run that names its commit does not see it, one without is not resumed.
    """
    cap = (size_of(here / "videos") + size_of(here / "held_out")) / 4
    local, remote = write_recipes(here, tmp_path, cap)
    finished(local)
    hub.faults(DELAY)
    commit = hub.repository("tester/videos", "datasets").resolve("main")
    words = ["train", str(remote), f"data.train.0.path=hub://tester/videos@{commit}", WAIT]
    with watched(tmp_path / "cache") as sizes:
        try:
            for kill in range(1, kills + 1):
                # It takes one step more than those to its next checkpoint, however late the signal comes.
                freeze = ("mmaudio_hf.training.loop.Run.update", EVERY + 2)
                with Command(*words, env=hub.environment(tmp_path / "home"), freeze=freeze) as process:
                    wait_until(lambda: last_step(remote) >= kill * EVERY, process)  # noqa: B023
                    if kill == kills:
                        assert main(["store", "push", str(here / "held_out"), "tester/videos"]) == 0
                    process.kill()
                    assert process.wait() == -signal.SIGKILL
            assert last_step(remote) == kills * EVERY
            assert main(words[:2]) == 2
            error = capsys.readouterr().err
            assert "was trained with other settings, data" in error
            assert "+ data.train.0 (hub://tester/videos): 5 rows" in error
            result = Command(*words, env=hub.environment(tmp_path / "home")).result()
        finally:
            main(["store", "push", str(here / "videos"), "tester/videos"])
    assert result.returncode == 0, result.stderr
    same_bytes(remote, local)
    assert 0.8 * cap < max(sizes) <= cap
    assert not [line for line in hub.requests("GET /storage") if line["with_token"]]


def test_two_processes_of_a_run_share_a_cache(hub, here, tmp_path):
    """Both fetch into it and replace rows of it, within its cap, and train what two processes train from the disk."""
    cap, few = size_of(here / "videos") / 2, ["data.validation=[]", f"training.checkpoint_every={STEPS}", WAIT]
    local, remote = write_recipes(here, tmp_path, cap)
    environment = hub.environment(tmp_path / "home")
    with watched(tmp_path / "cache") as sizes:
        for recipe in (local, remote):
            done = run_together(2, "train", str(recipe), *few, cwd=tmp_path, env=environment)
            assert done.returncode == 0, done.stderr
    same_bytes(remote, local)
    assert 0.8 * cap < max(sizes) <= cap


@pytest.mark.slow  # half a minute; the kills of a training stay
def test_processes_that_are_killed_share_a_cache(hub, here, tmp_path):
    """They are killed and started again while they fetch, hold and replace rows of one cache; no row is ever wrong."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, "forked"])
    cap = smallest_cap(tmp_path / "cache")
    hub.faults({"match": "GET /storage", "delay": 0.005})

    def start(seed: int) -> multiprocessing.Process:
        arguments = (hub.environment(tmp_path / "home"), tmp_path / "cache", cap, seed)
        process = context.Process(target=read_at_random, args=arguments, daemon=True)
        process.start()
        return process

    def written(seed: int, end: str) -> str:
        file = tmp_path / f"{seed}.{end}"
        wait_until(lambda: file.exists() or (tmp_path / f"{seed}.answer").exists())
        return file.read_text() if file.exists() else (tmp_path / f"{seed}.answer").read_text()

    running = [start(seed) for seed in range(3)]
    for seed in range(6):
        assert written(seed, "ready") == "ready"
        running[0].kill()
        running[0].join()
        running = [*running[1:], start(seed + 3)]
    assert [written(seed, "answer") for seed in range(6, 9)] == ["right"] * 3
    assert size_of(tmp_path / "cache") <= cap


SMALL = {"hub://tester/plain": 1.0, "hub://tester/texts": 1.0}


def smallest_cap(cache: Path) -> int:
    """Bytes with which the cache holds `LEAST` rows of each small store, and hardly more."""
    low, high = 0, 1_000_000
    while high - low > 4000:
        middle = (low + high) // 2
        try:
            with connect(SMALL, cache, middle, least=LEAST):
                high = middle
        except ValueError:
            low = middle
    return high


def read_at_random(environment: dict, cache: Path, cap: int, seed: int) -> None:
    """Write whether batches of random rows of both small stores are what was written into the stores."""
    os.environ.update(environment)
    importlib.reload(constants)  # read when the process that this one was forked from began
    torch.set_num_threads(1)
    try:
        answer = compare_at_random(cache, cap, seed)
    except BaseException:
        answer = traceback.format_exc()
    write_text(cache.parent / f"{seed}.answer", answer)


def compare_at_random(cache: Path, cap: int, seed: int) -> str:
    generator, answer = np.random.default_rng(seed), "right"
    with connect(SMALL, cache, cap, connections=8, processes=3, least=LEAST):
        stores = [FeatureStore.open(source) for source in SMALL]
        assert all(LEAST <= store.entries[0] < 40 for store in stores)
        for number in range(40):
            for index, store in enumerate(stores):
                rows = generator.choice(40, 4)
                with closing(Held(store, rows)) as held:
                    expected = random_values(40, seed=index)
                    for name, values in held.values.items():
                        if not torch.equal(values, expected[name][rows].to(values.dtype)):
                            answer = f"{name} of rows {rows} is wrong"
            if number == 5:
                write_text(cache.parent / f"{seed}.ready", "ready")
    return answer


class Held:
    """Rows of a store as the loader reads them."""

    def __init__(self, store: RemoteStore, rows: np.ndarray):
        self.lease = store.hold(rows)
        try:
            self.lease.wait()
        except ConnectionError:
            self.close()
            raise
        self.values = {}
        for name, column in store.columns.items():
            self.values[name] = torch.empty((len(rows), *column.shape), dtype=column.dtype)
            store.read_into(name, rows, self.values[name])

    def close(self) -> None:
        self.lease.release()


def test_a_lost_hub_is_waited_for(hub, here, tmp_path, capsys):
    _, remote = write_recipes(here, tmp_path, 1e9)
    environment = hub.environment(tmp_path / "home")
    before = len(hub.requests("GET /storage"))  # some rows come, the others are asked for and never answered
    hub.faults({"match": "GET /storage", "times": 60}, {"match": "GET /storage", "delay": PATIENCE})
    with Command("train", str(remote), "training.steps=12", env=environment) as process:
        wait_until(lambda: len(hub.requests("GET /storage")) >= before + 60, process)
        hub.kill()
        try:
            wait_until(lambda: "it is tried again for 20 s" in process.output()[1], process)
        finally:
            hub.start()
        assert process.wait() == 0, process.output()
        assert re.search(r"tester/videos answers again", process.output()[1])
    # Where it does not come again, the run ends with a sentence, and resumes.
    hub.faults({"match": "GET /(storage|datasets/.*/columns)", "status": 503})
    for file in (tmp_path / "cache").glob("*/*/*.entries"):
        file.unlink()  # the rows are not there
    words = ["train", str(remote), "training.steps=13", "data.connection_wait=1"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert re.search(r"error: Hub dataset tester/\w+ cannot be reached .* columns/\w+/0.*\.bin .* 1 s", error)
    hub.faults()
    assert main(words) == 0 and last_step(remote) == 13


# --- what cannot work is said before training ------------------------------------------------------------------------


def test_mistakes_end_before_training(hub, here, tmp_path, capsys):
    _, remote = write_recipes(here, tmp_path, 1e9)
    first = "data.train.0.path"
    assert main(["train", str(remote), f"{first}=hub://tester/nothing"]) == 2
    assert "tester/nothing is not there, or private" in capsys.readouterr().err
    assert main(["train", str(remote), f"{first}=hub://tester"]) == 2
    assert "'tester' is not a repository of the Hub" in capsys.readouterr().err
    assert main(["train", str(remote), f"{first}=hub://tester/videos@nowhere"]) == 2
    assert "has no such revision" in capsys.readouterr().err
    assert main(["train", str(remote), "data.cache_gb=0.003"]) == 2
    assert re.search(r"data.cache_gb is 0.003: .* take .*; raise it", capsys.readouterr().err)
    with connect({"hub://tester/plain": 1.0}, tmp_path / "other", 1e9):
        for status in (401, 403, 404):
            hub.faults({"match": "GET /storage", "status": status})
            with pytest.raises(ValueError, match="Hub dataset tester/plain"):
                Held(FeatureStore.open("hub://tester/plain"), np.arange(4))
    hub.faults({"match": "GET /storage", "ignore_range": True})
    assert main(["train", str(remote)]) == 2
    assert re.search(r"sends all of columns/\w+/.*\.bin \(status 200\)", capsys.readouterr().err)
    hub.faults()
    index = json.loads(hub.files("tester/plain", "datasets")["store.json"])
    for column in index["columns"].values():
        column.pop("checksums", None)
    repo = hub.repository("tester/older", "datasets")
    repo.create(private=False)
    repo.add({**hub.files("tester/plain", "datasets"), "store.json": json.dumps(index).encode()})
    assert main(["store", "inspect", "hub://tester/older"]) == 2
    assert "lacks checksums of the records of clip_features, mean" in capsys.readouterr().err
    assert not (run_dir(remote) / "checkpoints").exists()


def turn(blobs: list[Path]) -> None:
    """Their bytes, the last one first."""
    for blob in blobs:
        blob.write_bytes(blob.read_bytes()[::-1])


def test_records_that_are_not_what_was_pushed_are_not_used(hub, here, tmp_path):
    """A checksum that a record does not have: fetched twice, and then an error that names it."""
    files = hub.files("tester/plain", "datasets")
    index = json.loads(files["store.json"])
    name = index["columns"]["std"]["checksums"]["file"]
    spoiled = files[name][:-16] + bytes(16)
    index["columns"]["std"]["checksums"]["sha256"] = hashlib.sha256(spoiled).hexdigest()
    repo = hub.repository("tester/wrong", "datasets")
    repo.create(private=False)
    repo.add({**files, name: spoiled, "store.json": json.dumps(index).encode()})
    with connect({"hub://tester/wrong": 1.0}, tmp_path / "cache", 1e9):
        store = FeatureStore.open("hub://tester/wrong")
        assert torch.equal(Held(store, np.arange(39)).values["std"], random_values(40)["std"][:39])
        for _ in range(2):  # what has failed is not there afterwards
            with pytest.raises(ConnectionError, match=r"record 39 of std came twice with another checksum"):
                Held(store, np.array([39]))
        with pytest.raises(ValueError, match="pull it first"):
            store.to_dataset()
        chunks = [files[chunk["file"]] for chunk in index["columns"]["mean"]["parts"]]
        blobs = [blob for blob in (hub.root / "blobs").iterdir() if blob.read_bytes() in chunks]
        turn(blobs)  # what is served changes beneath the commit
        assert torch.equal(Held(store, np.arange(4)).values["mean"], random_values(40)["mean"][:4]), "they are here"
        with pytest.raises(ConnectionError, match=r"record \d+ of mean came twice with another checksum"):
            store.read(np.arange(40))
        turn(blobs)


def test_after_a_power_cut_rows_are_verified_again(hub, here, tmp_path):
    """A boot with another number; one row whose page never reached the disk comes again, the others do not."""
    for number in range(2):
        before = len(hub.requests("GET /storage"))
        with connect({"hub://tester/plain": 1.0}, tmp_path / "cache", 1e9):
            store = FeatureStore.open("hub://tester/plain")
            values = Held(store, np.arange(40)).values
            assert all(torch.equal(values[name], expected) for name, expected in random_values(40).items())
            entry = int(store.tables()["rows"].entry_of[7])
            path, size = store.path, store.columns["std"].row_bytes
            store.close()
        if number == 0:
            header = np.memmap(path / "rows.entries", np.int64, "r+", 0, 8)
            header[3] += 1
            header.flush()
            with open(path / "std.memmap", "r+b") as file:
                file.seek(entry * size)
                file.write(bytes(size))
    assert len(hub.requests("GET /storage")) - before == 1


ON_A_SMALL_DISK = """
import sys
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.files import write_text
from mmaudio_hf.hub.stores import connect
import numpy as np
try:
    with connect({"hub://tester/videos": 1.0}, sys.argv[1] + "/cache", 1e9):
        FeatureStore.open("hub://tester/videos").hold(np.arange(4))
except OSError as error:
    print(error)
"""


def test_a_full_disk_shows_before_the_first_batch(hub, here, tmp_path):
    (tmp_path / "small").mkdir()
    start = ["unshare", "-m", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*start, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system: unshare -m --map-root-user is refused")
    mount = 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"'
    program = [sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path / "small")]
    command = [*start, "sh", "-c", mount, str(tmp_path / "small"), *program]
    done = subprocess.run(command, capture_output=True, text=True, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"the cache needs [\d.]+ [kM]B, the disk has [\d.]+ [kM]B: lower data\.cache_gb: '.*/videos'", done.stdout
    )


def test_look_and_check(hub, here, tmp_path, capsys):
    assert main(["store", "inspect", "hub://tester/texts", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["rows"], info["layout"]) == (40, "compact") and info["path"].startswith("hub://tester/texts@")
    for name in ("plain", "texts"):
        assert main(["store", "verify", f"hub://tester/{name}"]) == 0
        assert re.search(rf"hub://tester/{name}@\w+: 40 rows, ok", capsys.readouterr().out)
    assert main(["store", "verify", "hub://tester/plain", "--sample", "1", "--media", str(tmp_path)]) == 2
    for command in ("convert", "subset"):
        with pytest.raises(SystemExit):
            main(["store", command, "hub://tester/plain", str(tmp_path / "new")])
        assert "hub://tester/plain is not on this machine: pull it first" in capsys.readouterr().err
    with FeatureStore.open(here / "plain") as local, connect({"hub://tester/plain": 1.0}, tmp_path / "c", 1e9):
        assert local.identity == FeatureStore.open("hub://tester/plain").identity
    with pytest.raises(ValueError, match=r"open within `mmaudio_hf.hub.stores.connect`"):
        FeatureStore.open("hub://tester/plain")


def test_every_command_reads_stores_on_the_hub(hub, here, tmp_path, capsys):
    """Those that read a run, and the doctor, which continues where a store is missing or the cache too small."""
    write_codec(here)
    remote = write_recipes(here, tmp_path, 1e7)[1]
    tree = yaml.safe_load(remote.read_text()) | {"sampling": {"num_steps": 1}}
    tree["data"]["test"] = tree["data"]["validation"]
    remote.write_text(yaml.safe_dump(tree))
    run = str(run_dir(remote))
    assert main(["train", str(remote), "training.steps=2", "training.validate_every=2"]) == 0
    assert main(["replay-step", run, "1"]) == 0 and "step 1: loss" in capsys.readouterr().out
    assert main(["evaluate", run]) == 0 and "5 of 5 items" in capsys.readouterr().out
    assert main(["report", "--run", run, "--clips", "1"]) == 0 and Path(run, "report", "index.html").is_file()
    main(["doctor", str(remote)])
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"network .* MB/s in the first epoch, .* data.cache_gb 0.01 holds \d+% of hub://tester/videos", text
    )
    assert "64 connections bring" in text
    changes = ["data.train.1.path=hub://tester/gone", "data.test.0.path=hub://tester/gone"]
    for words, failed, message in (
        (changes, {"data.train"}, "tester/gone is not there, or private"),
        (["data.cache_gb=0.003"], {"data.train", "data.validation"}, "raise it, or train with smaller batches"),
        (["--processes", "64"], {"batch", "data.train", "data.validation"}, "data.cache_gb is 0.01"),
    ):
        assert main(["doctor", str(remote), "--quick", *words]) == 1
        text = capsys.readouterr().out
        assert set(re.findall(r"^FAIL +(\S+)", text, re.MULTILINE)) == failed and message in " ".join(text.split())
        assert re.search("^warn +data.test", text, re.MULTILINE) and "of these must be fixed first" in text
    hub.faults({"match": "GET /api", "status": 503})
    assert main(["doctor", str(remote), "--quick"]) == 1 and "cannot be reached" in capsys.readouterr().out


# --- which rows are kept -------------------------------------------------------------------------------------------


def test_the_cap_is_divided_by_visits():
    large, small = Share(1000, 100, 5.0), Share(1000, 100)
    assert divide(60_000, [large, small]) == pytest.approx([500, 100], abs=2)
    assert divide(300_000, [large, small]) == [1000, 1000]
    assert divide(140_000, [large, small]) == pytest.approx([1000, 400], abs=2)
    assert divide(60_000, [large, Share(20, 100), Share(0, 14)], least=40) == [580, 20, 0]
    assert divide(1000, [large, small], least=8) == [0, 0]
    for cap in range(1000, 300_000, 7001):
        assert sum(n * s.size for n, s in zip(divide(cap, [large, small], 3), (large, small), strict=True)) <= cap


def test_the_next_use_is_where_the_order_has_the_row_again(tmp_path):
    stores = [(make_store(tmp_path / "a", 13), 2), (make_store(tmp_path / "b", 9, seed=1), 0.5)]
    mixture, batch = Mixture(stores, seed=3), 5

    def order(step: int) -> np.ndarray:
        return dataset_indices(3, step, np.arange(batch), batch, len(mixture))

    steps = -(-len(mixture) // batch)
    next_use = NextUse(mixture, order, steps)
    located = [[list(map(int, pair)) for pair in zip(*mixture.locate(order(step)), strict=True)] for step in range(60)]
    for step in range(20):
        for store, row in located[step]:
            later = [other for other in range(step + 1, 60) if [store, row] in located[other]]
            answer = int(next_use(step, store, np.array([row]))[0])
            window_end = step - step % steps + 2 * steps
            assert answer == (later[0] if later and later[0] < window_end else NEVER)


def test_a_cache_of_a_quarter_has_a_quarter_of_the_rows(tmp_path):
    """The furthest next use goes first; of the least recently used one only c^2 / 2 would be there."""
    rows, kept, batch = 400, 100, 4
    store = make_store(tmp_path / "store", rows)
    mixture = Mixture([(store, 1)])

    def order(step: int) -> np.ndarray:
        return dataset_indices(0, step, np.arange(batch), batch, rows)

    entries = Entries(tmp_path, "rows", store.columns, rows, kept, Seat(tmp_path))
    next_use, hits = NextUse(mixture, order, rows // batch), 0
    for step in range(5 * rows // batch):
        used = np.sort(mixture.locate(order(step))[1])
        chosen, state = entries.acquire(used, next_use(step, 0, used))
        entries.finish(chosen, ready=True)
        entries.release(chosen)
        hits += int((state == 2).sum()) if step >= rows // batch else 0
    assert hits / (4 * rows) == pytest.approx(kept / rows, abs=0.02)
    held, _ = entries.acquire(np.arange(96), np.arange(96))
    entries.finish(held, ready=True)
    assert entries.acquire(np.arange(200, 205), np.arange(5)) is None, "four are not held by anybody"
    others, _ = entries.acquire(np.arange(200, 204), np.arange(4))
    assert not {*others.tolist()} & {*held.tolist()}
