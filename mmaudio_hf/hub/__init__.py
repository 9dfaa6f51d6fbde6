"""One repository of the Hub: what it holds, changing it in one commit, and downloading files of it.

Errors are those of `hub_errors`: ConnectionError for what may pass, ValueError for what the user has to correct.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from mmaudio_hf.config import read_json
from mmaudio_hf.files import hash_once, readable, sha256_of
from mmaudio_hf.hub_client import LOGIN, api, check_name, hub_errors

MAX_JSON_BYTES = 10_000_000  # of a file that is read as JSON; a store.json of 1 TB has about 9 MB


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository."""

    size: int
    sha256: str  # of a file that the Hub keeps apart from git, else empty
    git_sha1: str  # of its blob; meaningless beside a sha256


@dataclass(frozen=True)
class RepoContents:
    """The files of a repository at one commit."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]
    kind: str = "model"  # or "dataset"

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"Hub {'repository' if self.kind == 'model' else self.kind} {self.repo}"

    @property
    def url(self) -> str:
        """Address of its page."""
        return f"{api().endpoint}/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.repo}"


# --- reading ---------------------------------------------------------------------------------------------------------


def read_contents(repo: str, revision: str | None = None, kind: str = "model") -> RepoContents:
    """Files of `repo` at a branch, tag or commit (None: the newest). ValueError or ConnectionError, see `hub_errors`.

    ValueError for file names that could leave a folder; nothing of such a repository is downloaded.
    """
    with hub_errors(repo, kind):
        info = api().repo_info(repo, revision=revision, repo_type=kind)
        entries = list(api().list_repo_tree(repo, recursive=True, revision=info.sha, repo_type=kind))
    files = {}
    for entry in entries:
        if isinstance(entry, RepoFile):
            check_name(entry.path, repo)
            files[entry.path] = RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else "", entry.blob_id)
    return RepoContents(repo, info.sha or "", files, kind)


def find_contents(repo: str, revision: str | None = None, kind: str = "model") -> RepoContents | None:
    """As `read_contents`; None where there is no such repository, or it is hidden from this token."""
    try:
        return read_contents(repo, revision, kind)
    except ValueError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError) and not isinstance(error.__cause__, GatedRepoError):
            return None
        raise


def fetch_json(contents: RepoContents, name: str) -> dict[str, Any]:
    """A small JSON object of a repository; {} where it has no such file. ValueError for anything else."""
    if name not in contents.files:
        return {}
    if contents.files[name].size > MAX_JSON_BYTES:
        raise ValueError(f"{contents.label}: {name} is too large for what it should be")
    with tempfile.TemporaryDirectory() as folder, hub_errors(contents.repo, contents.kind):
        path = hf_hub_download(contents.repo, name, repo_type=contents.kind, revision=contents.commit, local_dir=folder)
        try:
            return read_json(path)
        except ValueError as error:
            raise ValueError(str(error).replace(path, name)) from error


# --- writing ---------------------------------------------------------------------------------------------------------


def check_token(repo: str) -> None:
    """Check without changing anything that there is a token that may write; ValueError with the way out."""
    if get_token() is None:
        raise ValueError(f"Hub repository {repo} cannot be written without a token: {LOGIN}")
    with hub_errors(repo):
        role = api().whoami().get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(f"Hub repository {repo}: this token may only read: use one that may write there; {LOGIN}")


def ensure_repository(repo: str, private: bool, kind: str = "model") -> None:
    """Create `repo` unless it exists; ValueError where this token may not write there."""
    if get_token() is None:
        raise ValueError(f"Hub repository {repo} cannot be written without a token: {LOGIN}")
    with hub_errors(repo, kind):
        api().create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        # Only who may write is told how a file would be sent; nothing is uploaded.
        api().preupload_lfs_files(repo, [CommitOperationAdd("weights.json", b"{}")], repo_type=kind)


def is_same(local: Path | bytes, remote: RemoteFile) -> bool:
    """Whether a local file, or bytes, have the content of a file on the Hub."""
    size = len(local) if isinstance(local, bytes) else local.stat().st_size
    if size != remote.size:
        return False
    if remote.sha256:
        digest = hashlib.sha256(local).hexdigest() if isinstance(local, bytes) else hash_once(sha256_of, local)
        return digest == remote.sha256
    content = local if isinstance(local, bytes) else local.read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + content).hexdigest() == remote.git_sha1


def changed_files(folder: Path, names: Iterable[str], contents: RepoContents) -> list[str]:
    """Names of files of `folder` that the repository lacks, or has with other content."""
    files = contents.files
    return [name for name in names if name not in files or not is_same(folder / name, files[name])]


def commit_files(
    contents: RepoContents, folder: Path, names: Sequence[str], message: str, removed: Sequence[str] = ()
) -> str:
    """Add, replace or remove files of `folder`, all in one commit on top of `contents`; return the commit.

    ConnectionError when another commit came first. A call after an interruption does not send files again that arrived.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(name) for name in removed]
    for name in names:
        add = CommitOperationAdd(name, str(folder / name))
        add.upload_info.sha256 = bytes.fromhex(hash_once(sha256_of, folder / name))
        operations.append(add)
    return create_commit(contents.repo, operations, message, contents.kind, contents.commit)


def create_commit(
    repo: str, operations: Sequence[Any], message: str, kind: str = "model", parent: str | None = None
) -> str:
    """`HfApi.create_commit` under `hub_errors`; returns the commit."""
    with hub_errors(repo, kind):
        info = api().create_commit(repo, list(operations), repo_type=kind, commit_message=message, parent_commit=parent)
    return info.oid


# --- downloading -----------------------------------------------------------------------------------------------------


def fetch(contents: RepoContents, names: Sequence[str], folder: Path) -> None:
    """Download `names` into `folder` and verify them; files of an earlier call are not downloaded again.

    OSError when the disk is too small or full, ConnectionError or ValueError from `hub_errors`.
    """
    files = contents.files
    folder.mkdir(parents=True, exist_ok=True)
    missing = [n for n in names if not (folder / n).is_file() or not is_same(folder / n, files[n])]
    size, free = sum(files[n].size for n in missing), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{folder} has {readable(free)} left, {readable(size)} are needed: free some space")
    for name in missing:
        (folder / name).unlink(missing_ok=True)  # huggingface_hub would take a damaged one for downloaded
    if not missing:
        return
    with hub_errors(contents.repo, contents.kind):
        snapshot_download(
            contents.repo, repo_type=contents.kind, revision=contents.commit, local_dir=folder, allow_patterns=missing
        )
    for name in missing:
        if not (folder / name).is_file():
            raise ConnectionError(f"{contents.repo}: {name} did not arrive: the same command fetches it again")
        if not is_same(folder / name, files[name]):
            (folder / name).unlink()
            raise ConnectionError(f"{contents.repo}: {name} arrived damaged: the same command fetches it again")
