"""One repository of the Hub: what it holds, changing it in one commit, and fetching files of it.

Errors are those of `hub_errors`: ConnectionError for what may pass, ValueError for what the user has to mend.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from mmaudio_hf.hub_client import LOGIN, api, hub_errors


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository."""

    size: int
    sha256: str  # of a file that the Hub keeps apart from git, else empty
    git_sha1: str  # of its blob; meaningless beside a sha256


@dataclass(frozen=True)
class Contents:
    """What a repository holds at one commit."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]
    kind: str = "model"  # or "dataset"


@dataclass(frozen=True)
class Upload:
    """A file that a repository is to hold."""

    name: str  # in the repository
    path: Path

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size


# --- what it holds -------------------------------------------------------------------------------------------------


def read_contents(repo: str, revision: str | None = None, kind: str = "model") -> Contents:
    """Files of `repo` at a branch, tag or commit (None: the newest). ValueError or ConnectionError, see `hub_errors`.

    ValueError for names that could leave a folder; nothing of such a repository is fetched.
    """
    with hub_errors(repo, kind):
        info = api().repo_info(repo, revision=revision, repo_type=kind)
        listed = list(api().list_repo_tree(repo, recursive=True, revision=info.sha, repo_type=kind))
    files = {}
    for entry in listed:
        if isinstance(entry, RepoFile):
            check_name(entry.path, repo)
            files[entry.path] = RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else "", entry.blob_id)
    return Contents(repo, info.sha, files, kind)


def find_contents(repo: str, revision: str | None = None, kind: str = "model") -> Contents | None:
    """As `read_contents`; None where there is no such repository, or it is hidden from this token."""
    try:
        return read_contents(repo, revision, kind)
    except ValueError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError) and not isinstance(error.__cause__, GatedRepoError):
            return None
        raise


def check_name(name: str, repo: str) -> str:
    """Return the name of a file in a repository; ValueError for what could leave a folder, as ../x, /x or C:\\x."""
    parts = PurePosixPath(name).parts
    odd = name != "/".join(parts) or ".." in parts or name.startswith("/") or re.search(r"[\x00-\x1f\x7f\\:]", name)
    if odd or not parts:
        raise ValueError(f"Hub repository {repo} lists a file {name!r}, which is no plain name: nothing was fetched")
    return name


def read_json(contents: Contents, name: str) -> dict[str, Any]:
    """A small JSON object of a repository; an empty one where it has no such file. ValueError for another thing."""
    if name not in contents.files:
        return {}
    if contents.files[name].size > 10_000_000:
        raise ValueError(f"Hub repository {contents.repo}: {name} is too large for what it should be")
    with tempfile.TemporaryDirectory() as folder, hub_errors(contents.repo, contents.kind):
        place = hf_hub_download(
            contents.repo, name, repo_type=contents.kind, revision=contents.commit, local_dir=folder
        )
        try:
            value = json.loads(Path(place).read_text())
        except ValueError as error:
            raise ValueError(f"{name} is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"{name} does not hold a JSON object")
        return value


# --- changing it ---------------------------------------------------------------------------------------------------


def check_token(repo: str) -> None:
    """See that there is a token for writing to `repo`, changing nothing; ValueError saying what to do."""
    if get_token() is None:
        raise ValueError(f"Hub repository {repo} cannot be written without a token: {LOGIN}")
    with hub_errors(repo):
        role = api().whoami().get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(f"Hub repository {repo}: this token may only read: use one that may write there; {LOGIN}")


def ensure_repository(repo: str, private: bool, kind: str = "model") -> None:
    """Make `repo` unless it exists, and see that this token may write there; ValueError where it may not."""
    if get_token() is None:
        raise ValueError(f"Hub repository {repo} cannot be written without a token: {LOGIN}")
    with hub_errors(repo, kind):
        api().create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        # Asks how a file would be sent, which only those who may write are told; nothing is uploaded.
        api().preupload_lfs_files(repo, [CommitOperationAdd("weights.json", b"{}")], repo_type=kind)


_digests: dict[tuple, str] = {}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read once as long as it does not change."""
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        with open(path, "rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def is_same(path: Path, remote: RemoteFile) -> bool:
    """Whether a local file has the content of one on the Hub."""
    if path.stat().st_size != remote.size:
        return False
    if remote.sha256:
        return sha256_of(path) == remote.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.git_sha1


def changed(uploads: Iterable[Upload], contents: Contents | None) -> list[Upload]:
    """Those of `uploads` that the repository (None: there is none yet) lacks, or has with another content."""
    files = contents.files if contents else {}
    return [u for u in uploads if u.name not in files or not is_same(u.path, files[u.name])]


def commit(contents: Contents, uploads: Sequence[Upload], message: str, removed: Sequence[str] = ()) -> str:
    """Add, replace or remove files, all in one commit after `contents`; return the commit.

    ConnectionError when another commit came first. A call that was interrupted does not send again what has arrived.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(name) for name in removed]
    for upload in uploads:
        operations.append(CommitOperationAdd(upload.name, str(upload.path)))
        operations[-1].upload_info.sha256 = bytes.fromhex(sha256_of(upload.path))
    with hub_errors(contents.repo, contents.kind):
        info = api().create_commit(
            contents.repo,
            operations,
            repo_type=contents.kind,
            commit_message=message,
            parent_commit=contents.commit,
        )
    return info.oid


# --- fetching ------------------------------------------------------------------------------------------------------


def fetch(contents: Contents, names: Sequence[str], folder: Path) -> None:
    """Download `names` into `folder` and verify them; what is there from an earlier call is not fetched again.

    OSError when the disk is too small or full, ConnectionError or ValueError as of `hub_errors`.
    """
    files = contents.files
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [n for n in names if not (folder / n).is_file() or not is_same(folder / n, files[n])]
    size, free = sum(files[n].size for n in wanted), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{folder} has {readable(free)} left, {readable(size)} are needed: make room")
    for name in wanted:
        (folder / name).unlink(missing_ok=True)  # a damaged one would be taken for fetched
    if not wanted:
        return
    with hub_errors(contents.repo, contents.kind):
        snapshot_download(
            contents.repo,
            repo_type=contents.kind,
            revision=contents.commit,
            local_dir=folder,
            allow_patterns=wanted,
        )
    for name in wanted:
        if not (folder / name).is_file():
            raise ConnectionError(f"{contents.repo}: {name} did not arrive: the same command fetches it again")
        if not is_same(folder / name, files[name]):
            (folder / name).unlink()
            raise ConnectionError(f"{contents.repo}: {name} arrived damaged: the same command fetches it again")


def readable(size: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
