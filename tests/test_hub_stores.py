"""Feature stores on a Hub on loopback: whole and in part, killed on the way, damaged, hostile, on a full disk."""

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from data_stores import make_store
from forked import PATIENCE, Command, fill_disk, resize_disk, wait_until
from hub_server import TOKEN, Hub, Repository
from huggingface_hub import DatasetCard
from toy_stores import recipe_tree, write_store

from mmaudio_hf.cli import main, parse
from mmaudio_hf.data.layout import write_offsets
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.data.tools import subset, verify
from mmaudio_hf.hub.stores import THREADS, plan_pull, pull_store

CHUNK = 2048  # bytes: a store of 50 rows has about twenty chunks
LAYOUTS = ("reference", "compact")
BESIDE = (".tsv", ".manifest.json", ".offsets.json")  # the last one of the compact store alone


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server with a store in each layout, pushed from the folder beside it."""
    root = tmp_path_factory.mktemp("stores")
    with Hub(root / "hub") as server, pytest.MonkeyPatch.context() as patch:
        server.use_here(patch, root / "home")
        for seed, layout in enumerate(LAYOUTS):
            make_store(root / layout, 50, layout=layout, seed=seed, counts={"corrected": 3} if seed else {})
            write_offsets(root / layout, {f"compact_{row:03d}": row / 7 for row in (5, 20, 49)} if seed else {})
            assert push(root / layout, layout, "--license", "cc-by-4.0", "--source", "me/clips") == 0
        yield server


def push(store: Path, name: str, *options: str) -> int:
    return main(["store", "push", str(store), f"tester/{name}", "--part-size", str(CHUNK / 2**20), *options])


def pull(name: str, target: Path, *options: str) -> int:
    return main(["store", "pull", f"tester/{name}", str(target), *options])


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store, by its name without that of the store."""
    files = [*sorted(store.rglob("*")), *(store.with_name(store.name + end) for end in BESIDE)]
    return {file.name.removeprefix(store.name): file.read_bytes() for file in files if file.is_file()}


def sent(hub: Hub) -> list[dict]:
    return hub.requests("PUT /storage")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_store_goes_there_and_back(hub, here, tmp_path, layout, capsys):
    assert pull(layout, tmp_path / "back") == 0
    assert content(tmp_path / "back") == content(here / layout)
    assert verify(tmp_path / "back").ok
    names = {"back", *(f"back{end}" for end in BESIDE if layout == "compact" or "offsets" not in end)}
    assert {path.name for path in tmp_path.iterdir() if path.name != "home"} == names
    assert not any(line["with_token"] for line in hub.requests("GET /storage"))
    # Once more nothing is sent, and no commit is made.
    before, puts = hub.messages(f"tester/{layout}", "datasets"), len(sent(hub))
    assert push(here / layout, layout) == 0
    assert hub.messages(f"tester/{layout}", "datasets") == before and len(sent(hub)) == puts
    assert "0 bytes in 0 chunks" in capsys.readouterr().out
    assert pull(layout, tmp_path / "back") == 2
    assert f"{tmp_path / 'back'} exists: choose another name" in capsys.readouterr().err


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", ["7:31", ":1", "44:"])
def test_rows_are_those_of_a_subset(here, tmp_path, layout, rows):
    assert main(["store", "subset", str(here / layout), str(tmp_path / "wanted"), "--rows", rows]) == 0
    assert pull(layout, tmp_path / "some", "--rows", rows) == 0
    assert content(tmp_path / "some") == content(tmp_path / "wanted")
    assert verify(tmp_path / "some").ok
    with FeatureStore.open(tmp_path / "some") as some:  # what shifted audio there is goes along
        late = content(tmp_path / "some").get(".offsets.json", b"{}")
        assert (
            some.manifest["counts"].get("corrected", 0)
            == len(json.loads(late))
            == sum(some.ids.count(f"compact_{row:03d}") for row in (5, 20, 49))
        )


def test_shared_texts_of_some_rows_come_once(hub, here, tmp_path):
    """Rows that share texts, out of their order: only the texts they have are fetched."""
    store = make_store(tmp_path / "plain", 40)
    rows = [3, 3, 9, 1, 3, 30, 31, 32, 9, 0, 38, 38, 2, 1]
    main(["store", "convert", str(store.path), str(tmp_path / "compact"), "--layout", "compact"])
    subset(tmp_path / "compact", tmp_path / "texts", rows).close()
    assert push(tmp_path / "texts", "texts") == 0
    assert main(["store", "subset", str(tmp_path / "texts"), str(tmp_path / "wanted"), "--rows", "4:9"]) == 0
    before = len(hub.requests("GET /datasets/tester/texts/resolve/.*/text_features/"))
    assert pull("texts", tmp_path / "some", "--rows", "4:9") == 0
    assert content(tmp_path / "some") == content(tmp_path / "wanted")
    with FeatureStore.open(tmp_path / "some") as some:
        assert some.contents.texts == 5
    assert before == 0


def test_columns_and_only_what_they_need(hub, here, tmp_path, capsys):
    before = len(hub.requests())
    assert pull("compact", tmp_path / "audio", "--columns", "text_features,std,mean", "--rows", "10:12") == 0
    with FeatureStore.open(tmp_path / "audio") as some, FeatureStore.open(here / "compact") as whole:
        assert list(some.columns) == ["mean", "std", "text_features"] and some.ids == whole.ids[10:12]
        for name in some.columns:
            assert some.read([0, 1], [name])[name].equal(whole.read([10, 11], [name])[name])
        assert some.manifest["counts"] == {"chosen": 2, "of": 50}
    assert verify(tmp_path / "audio").ok
    requests = [line["path"] for line in hub.requests()[before:] if "/columns/" in line["path"]]
    assert len(requests) == 4 and not [path for path in requests if "sync" in path or "clip" in path]
    assert pull("compact", tmp_path / "all", "--columns", "mean,std") == 0
    with FeatureStore.open(tmp_path / "all") as some, FeatureStore.open(here / "compact") as whole:
        assert some.manifest["latent_statistics"] == whole.manifest["latent_statistics"]
        assert some.manifest["columns"]["mean"] == whole.manifest["columns"]["mean"]
    capsys.readouterr()
    for options, message in (
        (["--columns", "text_features"], "a store needs the columns mean and std"),
        (["--columns", "mean,std,clip_features"], "clip_features and sync_features come together"),
        (["--columns", "mean,std,audio"], "has no column audio; it has mean, std"),
        (["--rows", "50:"], "rows 0 to 49: none of them is chosen"),
    ):
        assert pull("compact", tmp_path / "none", *options) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("none*"))


def test_dry_runs_move_nothing(hub, here, tmp_path, capsys, monkeypatch):
    before, refs = len(sent(hub)), hub.messages("tester/compact", "datasets")
    store = make_store(tmp_path / "other", 50, layout="compact", seed=7)
    assert push(store.path, "compact", "--dry-run") == 0
    assert push(store.path, "nowhere", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "28.2 kB in 16 chunks to tester/nowhere, dry run" in text and "a push creates it" in text
    assert not hub.repository("tester/nowhere", "datasets").exists
    with monkeypatch.context() as patch:  # nor does one of a push need the Hub
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert push(store.path, "compact", "--dry-run") == 0
        assert "28.2 kB in 16 chunks to tester/compact, dry run" in capsys.readouterr().out
    assert pull("compact", tmp_path / "dry", "--rows", "0:25", "--dry-run") == 0
    assert "rows 0 to 24 of 50, 14.1 kB to" in capsys.readouterr().out
    assert not list(tmp_path.glob("dry*"))
    assert len(sent(hub)) == before and hub.messages("tester/compact", "datasets") == refs


def large_files(hub: Hub, repo: str) -> set[str]:
    """Files that the Hub keeps apart from git: chunks, and checksums with an early zero byte."""
    files = hub.files(repo, "datasets")
    return {
        n for n, content in files.items() if n.endswith(".bin") or (n.endswith(".sha256") and b"\0" in content[:512])
    }


def test_a_new_version_replaces_the_old_one(hub, here, tmp_path):
    """Parts with the same content stay, others go with the commit that names the new ones."""
    store = make_store(tmp_path / "store", 50)
    assert push(store.path, "versions") == 0
    first = hub.repository("tester/versions", "datasets").resolve("main")
    main(["store", "subset", str(store.path), str(tmp_path / "short"), "--rows", "0:30"])
    before, old = len(sent(hub)), large_files(hub, "tester/versions")
    assert push(tmp_path / "short", "versions") == 0
    new = large_files(hub, "tester/versions") - old
    assert len([name for name in new if name.endswith(".bin")]) == 3, "the chunks that end earlier"
    assert len(sent(hub)) - before == len(new)
    assert pull("versions", tmp_path / "new") == 0 and pull(f"versions@{first}", tmp_path / "old") == 0
    assert content(tmp_path / "new") == content(tmp_path / "short") and content(tmp_path / "old") == content(store.path)
    chunks = [name for name in hub.files("tester/versions", "datasets") if name.endswith(".bin")]
    assert len(chunks) == 14


# --- killed on the way -------------------------------------------------------------------------------------------


def killed(hub: Hub, home: Path, words: list[str], reached) -> None:
    """Run a command beside this process and kill it as soon as `reached()`."""
    with Command("store", *words, env=hub.environment(home)) as process:
        wait_until(reached, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL


def test_a_killed_push_sends_nothing_twice(hub, here, tmp_path):
    store = make_store(tmp_path / "store", 50, seed=3)
    before = len(sent(hub))
    hub.faults({"match": "PUT /storage", "times": 7}, {"match": "PUT /storage", "delay": PATIENCE})
    words = ["push", str(store.path), "tester/killed", "--part-size", str(CHUNK / 2**20)]
    killed(hub, tmp_path / "home", words, lambda: len(sent(hub)) >= before + 7)
    assert "store.json" not in hub.files("tester/killed", "datasets")
    assert pull("killed", tmp_path / "early") == 2
    hub.faults()
    assert push(store.path, "killed") == 0
    put = [line["path"] for line in sent(hub)[before:] if line["status"] == 200]
    assert len(put) == len(set(put)) == len(large_files(hub, "tester/killed"))
    assert pull("killed", tmp_path / "back") == 0 and content(tmp_path / "back") == content(store.path)


def fetched(hub: Hub, before: int) -> tuple[int, int]:
    """Different blocks requested since request `before`, and requests for a block that was requested already."""
    requests = [(line["path"], line["range"]) for line in hub.requests("GET /storage")[before:]]
    return len(set(requests)), len(requests) - len(set(requests))


def test_a_killed_pull_fetches_nothing_twice(hub, here, tmp_path):
    before = len(hub.requests("GET /storage"))
    hub.faults({"match": "GET /storage", "times": 8}, {"match": "GET /storage", "delay": PATIENCE})
    words = ["pull", "tester/reference", str(tmp_path / "back")]
    killed(hub, tmp_path / "home", words, lambda: len(hub.requests("GET /storage")) >= before + 8)
    hub.faults()
    assert not (tmp_path / "back").exists() and (tmp_path / "back.pull").is_dir()
    assert pull("reference", tmp_path / "back") == 0
    assert content(tmp_path / "back") == content(here / "reference") and not (tmp_path / "back.pull").exists()
    blocks, again = fetched(hub, before)
    assert blocks == 20 and again <= THREADS


def test_an_interrupted_pull_of_rows_goes_on(hub, here, tmp_path):
    """Only the blocks that the rows cut are fetched once more: there is no checksum of a part of a block."""
    before, done = len(hub.requests("GET /storage")), []

    def interrupt(count: int) -> None:
        done.append(count)
        if len(done) == 8:
            raise KeyboardInterrupt

    plan = plan_pull("tester/reference", tmp_path / "some", rows=slice(5, 45))
    with pytest.raises(KeyboardInterrupt):
        pull_store(plan, tmp_path / "some", progress=interrupt)
    assert pull("reference", tmp_path / "some", "--rows", "5:45") == 0
    assert main(["store", "subset", str(here / "reference"), str(tmp_path / "wanted"), "--rows", "5:45"]) == 0
    assert content(tmp_path / "some") == content(tmp_path / "wanted")
    blocks, again = fetched(hub, before)
    assert blocks >= 15 and again <= THREADS + 3


def test_a_lost_connection_and_a_missing_token(hub, here, tmp_path, monkeypatch, capsys):
    hub.faults({"match": "GET /storage", "status": 404, "times": 1})
    assert pull("reference", tmp_path / "back") == 2
    hub.faults({"match": "GET /storage", "drop_download_after": 100, "times": 2})  # tried again at once
    assert pull("reference", tmp_path / "back") == 0
    assert content(tmp_path / "back") == content(here / "reference")
    capsys.readouterr()
    for token, message in (("hf_" + "x" * 30, "does not know this token"), (None, "without a token")):
        hub.use_here(monkeypatch, tmp_path / "nobody", token)
        assert push(here / "reference", "mine") == 2
        text = capsys.readouterr()
        assert message in text.err and "hf auth login" in text.err
        assert TOKEN not in text.err + text.out and "x" * 30 not in text.err + text.out
    hub.use_here(monkeypatch, tmp_path / "home")
    assert pull("unknown", tmp_path / "x") == 2
    assert "tester/unknown is not there, or private" in capsys.readouterr().err


# --- what cannot be trusted --------------------------------------------------------------------------------------


# What is done to the index of a good repository and the first chunk of its column mean, or the file that is replaced,
# and the error. ELSEWHERE: names that would leave the folder, or are those of other files.
ELSEWHERE = ("../../../etc/x", "columns/mean/../../x.bin", "meta.json")
NAME = r"malformed .*is no name of a chunk"
STRANGER = {"../evil": {"bytes": 1, "sha256": "0" * 64}}
FAULTS = {
    **{name: (lambda index, mean, chunk, name=name: chunk.update(file=name), NAME) for name in ELSEWHERE},
    "other column": (
        lambda index, mean, chunk: mean.update(parts=index["columns"]["std"]["parts"]),
        "is not there, or misplaced",
    ),
    "lost chunk": (
        lambda index, mean, chunk: chunk.update(file=chunk["file"].replace("00000", "00009")),
        "is not there, or misplaced",
    ),
    "huge": (
        lambda index, mean, chunk: chunk.update(records=10**15),
        "the chunks of mean have 1000000000000025 records, not 50",
    ),
    "huge blocks": (
        lambda index, mean, chunk: mean.update(
            block_records=10**12, parts=[one | {"blocks": one["blocks"][:1]} for one in mean["parts"]]
        ),
        "too large to be held in memory",
    ),
    "negative": (lambda index, mean, chunk: chunk.update(records=-1), "has -1 records"),
    "words": (lambda index, mean, chunk: chunk.update(records="50"), "has '50' records"),
    "version": (
        lambda index, mean, chunk: index.update(version=99),
        r"version 99 is not known here \(2\); update mmaudio_hf",
    ),
    "no checksums": (lambda index, mean, chunk: chunk.update(blocks=[None]), "has no checksums"),
    "stranger": (lambda index, mean, chunk: index["files"].update(STRANGER), "malformed"),
    "more columns": (lambda index, mean, chunk: index["columns"].update({"../evil": mean}), "lists the columns"),
    "no mapping": (lambda index, mean, chunk: index.update(columns=[]), "malformed"),
    "wrong checksum": (
        lambda index, mean, chunk: chunk.update(sha256="0" * 64),
        r"other content than store\.json says",
    ),
    "truncated": (b"short", r"has 5 bytes, or other content than store\.json says"),
    "other content": (b"other" * 400, r"other content than store\.json says"),
    "table.tsv": (b"id\tlabel\n", r"table\.tsv is not that of store\.json"),
    "store.json": (b"{", r"store\.json is not valid JSON"),
}


@pytest.fixture
def spoiled(hub, here) -> tuple[Repository, dict[str, bytes], dict]:
    """A repository to which each test adds faults, the files of a good one, and its index."""
    repo, files = hub.repository("tester/spoiled", "datasets"), hub.files("tester/reference", "datasets")
    if not repo.exists:
        repo.create(private=False)
    repo.add(files)
    return repo, files, json.loads(files["store.json"])


@pytest.mark.parametrize("how", FAULTS)
def test_spoiled_repositories_are_rejected(spoiled, tmp_path, capsys, how):
    (repo, _, index), (change, message) = spoiled, FAULTS[how]
    chunk = index["columns"]["mean"]["parts"][0]
    if callable(change):
        change(index, index["columns"]["mean"], chunk)
        repo.add({"store.json": json.dumps(index).encode()})
    else:
        repo.add({how if "." in how else chunk["file"]: change})
    assert pull("spoiled", tmp_path / "x") == 2
    assert re.search(message, capsys.readouterr().err) and not list(tmp_path.glob("x*"))


def test_a_block_that_is_not_what_the_index_says_is_not_kept(spoiled, here, tmp_path, capsys):
    """In a chunk that is: found when it arrives."""
    repo, files, index = spoiled
    index["columns"]["std"]["parts"][1]["blocks"][0] = "0" * 64
    repo.add({"store.json": json.dumps(index).encode()})
    assert pull("spoiled", tmp_path / "x") == 1
    assert re.search(r"std/00001\..*\.bin are not what store\.json says", capsys.readouterr().err)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.tsv").exists()
    repo.add(files)
    assert pull("spoiled", tmp_path / "x") == 0 and content(tmp_path / "x") == content(here / "reference")


def test_names_that_would_leave_the_folder_and_other_repositories_are_rejected(hub, spoiled, tmp_path, capsys):
    hub.repository("tester/evil", "datasets").create(private=False)
    hub.repository("tester/evil", "datasets").add({**spoiled[1], "../evil": b"x"})
    assert pull("evil", tmp_path / "y") == 2 and "no plain name" in capsys.readouterr().err
    hub.repository("tester/empty", "datasets").create(private=False)
    assert pull("empty", tmp_path / "y") == 2 and "holds no feature store" in capsys.readouterr().err
    assert not list(tmp_path.glob("y*")) and not (tmp_path.parent / "evil").exists()


def test_a_damaged_store_is_not_sent(hub, here, tmp_path, capsys):
    store = make_store(tmp_path / "store", 50)
    file = tmp_path / "store" / "std.memmap"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert push(store.path, "damaged") == 2
    assert f"{file} is not what was exported" in capsys.readouterr().err
    assert not hub.repository("tester/damaged", "datasets").exists


def pull_to_a_small_disk(small: Path) -> None:
    """Runs in a process of its own: too little space, less than there seems to be, and enough."""
    resize_disk(small, "2m")
    fill_disk(small, 160_000)
    words = ["store", "pull", "tester/large", str(small / "x")]
    assert main(words) == 1
    real, shutil.disk_usage = shutil.disk_usage, lambda _: SimpleNamespace(total=10**12, used=0, free=10**12)
    assert main(words) == 1 and not (small / "x").exists()
    print("got", sum(f.stat().st_size for f in (small / "x.pull/store").iterdir()))
    shutil.disk_usage = real
    (small / "filler").unlink()
    assert main(words) == 0
    assert sorted(os.listdir(small)) == ["x", "x.manifest.json", "x.tsv"]


def test_a_full_disk_loses_nothing(hub, here, tmp_path):
    store = make_store(tmp_path / "large", 900)
    assert main(["store", "push", str(store.path), "tester/large", "--part-size", "0.02"]) == 0
    (small := tmp_path / "small").mkdir()
    before = len(hub.requests("GET /storage"))
    done = Command(pull_to_a_small_disk, small, env=hub.environment(tmp_path / "home"), own_mounts=True).result()
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert re.search(r"x\.pull needs .* more, the disk has .*: free some space, or choose columns or rows", first)
    assert re.search(r"/x\.pull/store/\w+\.memmap: No space left on device: free some space", second)
    assert int(done.stdout.split("got ")[1].split()[0]) > 50_000
    blocks, again = fetched(hub, before)
    assert blocks == 36 and again <= THREADS


# --- what it is for ----------------------------------------------------------------------------------------------


def test_a_pulled_store_trains(hub, here, tmp_path):
    write_store(tmp_path / "videos", 8)
    assert push(tmp_path / "videos", "videos", "--part-size", "0.1") == 0
    assert pull("videos", tmp_path / "elsewhere" / "pulled") == 0
    tree = recipe_tree(tmp_path / "elsewhere", steps=2)
    tree["data"] = {"train": [{"path": str(tmp_path / "elsewhere" / "pulled")}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", str(tmp_path / "r.yaml")]) == 0
    assert (tmp_path / "elsewhere/output/run/last/pretrained_model/model.safetensors").is_file()


def test_the_card_of_a_store(hub, here):
    text = hub.files("tester/compact", "datasets")["README.md"].decode()
    card = DatasetCard(text)
    card.validate()  # the server looks at it as the Hub does
    data = card.data.to_dict()
    assert (data["license"], data["size_categories"], data["pretty_name"]) == ("cc-by-4.0", ["n<1K"], "compact")
    for line in (
        "- Made from: [me\\/clips](https://huggingface.co/datasets/me/clips)",
        "- Rows: 50, 50 different captions; compact layout",
        "| `clip_features` | bfloat16 | 6 x 8 | 50 | 0.0 |",
        "| clip | toy | c1 |",
        "- `offsets.json`: the seconds by which the audio of 3 clips was shifted to fit its frames",
    ):
        assert line in text
    commands = re.findall(r"^mmaudio-hf (.*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        options = parse(shlex.split(command))
        assert getattr(options, "repo", "tester/compact") == "tester/compact"
    assert str(here) not in text and TOKEN not in text
    # What its owner changed stays; license and source are those of the first push.
    edited = text.replace("---\n\n<!--", "---\n\nBy hand.\n\n<!--").replace("license: cc-by-4.0", "license: cc0-1.0")
    hub.repository("tester/compact", "datasets").add({"README.md": edited.encode()})
    assert push(here / "compact", "compact") == 0
    again = hub.files("tester/compact", "datasets")["README.md"].decode()
    assert "By hand." in again and "license: cc0-1.0" in again and r"Licence of the media: cc0-1\.0" in again
    assert "me\\/clips" in again
