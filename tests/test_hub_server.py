"""The Hub of the tests itself, used by huggingface_hub as it is."""

import hashlib
from pathlib import Path

import pytest
from hub_server import TOKEN, USER, Hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

LARGE = bytes(range(256)) * 2_000  # half a megabyte: several parts
NAME = f"{USER}/run"
READER = "hf_thisonemayonlyread00000000"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub", multipart_bytes=200_000, tokens={READER: "reader:read"}) as hub:
        hub.use_here(monkeypatch, tmp_path / "home")
        yield hub


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_repositories_and_their_files(hub, tmp_path, kind):
    api = HfApi()
    assert api.whoami()["name"] == USER
    api.create_repo(NAME, repo_type=kind, private=True)
    api.create_repo(NAME, repo_type=kind, exist_ok=True)
    assert api.repo_info(NAME, repo_type=kind).private
    files = {"README.md": b"---\nlicense: mit\n---\n", "a/b.txt": b"text", "a/c/x.safetensors": LARGE, "d.txt": b""}
    first = api.create_commit(
        NAME, [add(p, c) for p, c in files.items()], repo_type=kind, commit_message="one", commit_description="more"
    )
    second = api.create_commit(
        NAME, [CommitOperationDelete("d.txt"), add("a/b.txt", b"new")], repo_type=kind, commit_message="two"
    )
    assert hub.files(NAME, f"{kind}s")["a/c/x.safetensors"] == LARGE
    assert sorted(api.list_repo_files(NAME, repo_type=kind)) == ["README.md", "a/b.txt", "a/c/x.safetensors"]
    [info] = api.get_paths_info(NAME, ["a/c/x.safetensors", "none"], repo_type=kind)
    assert (info.size, info.lfs.sha256) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
    commits = api.list_repo_commits(NAME, repo_type=kind)
    assert [c.title for c in commits] == ["two", "one", "initial commit"] and commits[0].commit_id == second.oid
    old = snapshot_download(NAME, repo_type=kind, revision=first.oid, local_dir=tmp_path / "old")
    assert old == str(tmp_path / "old") and (tmp_path / "old" / "d.txt").read_bytes() == b""
    cached = hf_hub_download(NAME, "a/c/x.safetensors", repo_type=kind)
    assert Path(cached).read_bytes() == LARGE
    storage = hub.requests("/storage/")
    assert storage and not any(request["with_token"] for request in storage)
    assert len([r for r in storage if r["method"] == "PUT"]) == 3  # parts


def test_errors_have_the_codes_of_the_hub(hub, monkeypatch):
    api = HfApi()
    api.create_repo(NAME, private=True)
    sha = api.repo_info(NAME).sha
    api.create_commit(NAME, [add("a", b"1")], commit_message="one", parent_commit=sha)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(NAME, [add("a", b"2")], commit_message="two", parent_commit=sha)
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(NAME, revision="nowhere")
    with pytest.raises(ValueError, match='"license" must be'):
        api.create_commit(NAME, [add("README.md", b"---\nlicense: My Own\n---\n")], commit_message="card")
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info(f"{USER}/none")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("somebody/else")
    with pytest.raises(RepositoryNotFoundError):  # private to others
        HfApi(token=READER).repo_info(NAME)
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=READER).create_repo("reader/a")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()


def test_faults_and_restarts(hub, tmp_path, monkeypatch):
    api = HfApi()
    api.create_repo(NAME)
    hub.faults({"match": "POST .*/commit/", "status": 503, "times": 1})
    with pytest.raises(HfHubHTTPError, match="503"):
        api.create_commit(NAME, [add("x.bin", LARGE)], commit_message="one")
    api.create_commit(NAME, [add("x.bin", LARGE)], commit_message="one")
    hub.kill()
    with pytest.raises(Exception, match=r"refused|connect"):
        api.whoami()
    hub.start()
    assert hub.files(NAME) == {"x.bin": LARGE} and api.whoami()["name"] == USER
    hub.faults({"match": "GET /storage/", "drop_download_after": 100_000, "times": 1})
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    path = hf_hub_download(NAME, "x.bin", local_dir=tmp_path / "here")
    assert Path(path).read_bytes() == LARGE
    assert [r["range"] for r in hub.requests("GET /storage/")] == [None, "bytes=100000-"]
    hub.faults({"match": "PUT /storage/", "drop_upload_after": 100_000, "times": 1})
    api.create_commit(NAME, [add("y.bin", LARGE[::-1])], commit_message="two")
    assert hub.files(NAME)["y.bin"] == LARGE[::-1]
    assert TOKEN not in (hub.root / "requests.jsonl").read_text()
