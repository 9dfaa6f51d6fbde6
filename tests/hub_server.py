"""A Hub of one's own on loopback, in a process of its own, for huggingface_hub as it is (through HF_ENDPOINT).

    python tests/hub_server.py FOLDER [--port N]

Model and dataset repositories: create, whoami, info, refs, history, tree, paths-info, preupload, LFS (one PUT),
NDJSON commits with compare-and-swap on the parent, resolve with ranges, cards, tokens. Xet is not
offered: set HF_HUB_DISABLE_XET=1. Everything lies in FOLDER, so that a killed server can be started again:

    tokens.json                  {token: {"name": user, "role": "write" or "read"}}
    blobs/SHA256                 content of all files;  uploads/: what is on its way
    repos/KIND/OWNER/NAME/       repo.json, refs/BRANCH (a commit), commits/SHA.json (parent, message, files)
    requests.jsonl               one line per request: method, path, range, status, user, bytes of the body that arrived

Large files are served by redirection to another host name (`localhost`), where a token must not follow.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"  # may write as USER
USER = "tester"
PIECE = 64 * 1024
LARGE = (".safetensors", ".bin", ".memmap", ".parquet", ".arrow", ".flac", ".wav", ".mp4")
PAGE = 3  # entries of a tree or history per answer, so that clients must turn pages
KINDS = ("models", "datasets")


# --- repositories on disk ------------------------------------------------------------------------------------------


@dataclass
class Repository:
    """One repository in the folder of a server."""

    root: Path  # of the server
    kind: str  # "models" or "datasets"
    name: str  # owner/name

    @property
    def folder(self) -> Path:
        return self.root / "repos" / self.kind / self.name

    def create(self, private: bool) -> None:
        (self.folder / "commits").mkdir(parents=True)
        (self.folder / "refs").mkdir()
        self.write("main", {}, "initial commit", parent=None)
        write_text(self.folder / "repo.json", json.dumps({"private": private}))

    @property
    def exists(self) -> bool:
        return (self.folder / "repo.json").is_file()

    @property
    def private(self) -> bool:
        return json.loads((self.folder / "repo.json").read_text())["private"]

    def resolve(self, revision: str) -> str | None:
        """Commit of a branch, or of itself."""
        branch = self.folder / "refs" / quote(revision, safe="")
        if branch.is_file():
            return branch.read_text()
        return revision if (self.folder / "commits" / f"{revision}.json").is_file() else None

    def commit(self, sha: str) -> dict:
        return json.loads((self.folder / "commits" / f"{sha}.json").read_text())

    def history(self, sha: str | None) -> Iterator[dict]:
        while sha:
            commit = self.commit(sha)
            yield {"id": sha, **commit}
            sha = commit["parent"]

    def write(self, branch: str, files: dict, message: str, parent: str | None, description: str = "") -> str:
        """A commit in which the repository holds `files`: path -> {"sha256", "size", "oid", "lfs"}."""
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record = {"parent": parent, "message": message, "description": description, "date": date, "files": files}
        text = json.dumps(record)
        sha = hashlib.sha1(text.encode()).hexdigest()
        write_text(self.folder / "commits" / f"{sha}.json", text)
        write_text(self.folder / "refs" / quote(branch, safe=""), sha)
        return sha

    def add(self, files: Mapping[str, bytes], message: str = "added by hand", branch: str = "main") -> str:
        """A commit that changes or adds files, under whatever names; returns its sha."""
        parent = self.resolve(branch)
        kept = self.commit(parent)["files"] if parent else {}
        added = {path: keep_blob(self.root, content, is_large(path, content)) for path, content in files.items()}
        return self.write(branch, kept | added, message, parent)


def is_large(path: str, sample: bytes, size: int | None = None) -> bool:
    """Whether the Hub stores such a file apart from git."""
    return path.endswith(LARGE) or b"\0" in sample or (len(sample) if size is None else size) > 10_000_000


def keep_blob(root: Path, content: bytes, large: bool) -> dict:
    sha256 = hashlib.sha256(content).hexdigest()
    (root / "blobs").mkdir(exist_ok=True)
    write_bytes(root / "blobs" / sha256, content)
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"sha256": sha256, "size": len(content), "oid": oid, "lfs": large}


def write_bytes(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    partial.write_bytes(content)
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


# --- the server ----------------------------------------------------------------------------------------------------


class HttpError(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Dropped(Exception):
    """The connection ends here."""


class Server(ThreadingHTTPServer):
    """Holds what requests share."""

    daemon_threads = True

    def __init__(self, root: Path, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = f"http://localhost:{self.server_address[1]}"
        self.lock, self.log_lock, self.faults = threading.Lock(), threading.Lock(), []
        for name in ("blobs", "uploads", "repos"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, address)

    def fault(self, request: str) -> dict:
        """The first fault that concerns `METHOD /path` and is not used up."""
        with self.lock:
            for fault in self.faults:
                if re.search(fault["match"], request) and fault.get("times", -1) != 0:
                    fault["times"] = fault.get("times", -1) - 1
                    return fault
        return {}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def handle_request(self):
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        self.raw_route, self.status, self.arrived, self.user, self.body = url.path, 0, 0, None, None
        self.is_logged = False
        self.fault = self.server.fault(f"{self.command} {self.route}")
        try:
            if self.fault.get("status"):
                self.read_body()
                raise HttpError(self.fault["status"], "this is a fault on purpose")
            self.answer()
        except HttpError as error:
            with contextlib.suppress(Dropped, ConnectionError):
                self.read_body()
            errors = {"error": error.message, "errors": [{"message": error.message}]}
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self.send(json.dumps(errors).encode(), error.status, headers)
        except Dropped:
            self.close_connection = True
        finally:
            self.note()

    def note(self):
        """Log the request, once."""
        if self.is_logged:
            return
        self.is_logged = True
        line = {"method": self.command, "path": self.route, "range": self.headers.get("Range"), "status": self.status}
        line |= {"user": self.user, "with_token": "Authorization" in self.headers, "arrived": self.arrived}
        with self.server.log_lock, open(self.server.root / "requests.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")

    # --- bodies -----------------------------------------------------------------------------------------------------

    def pieces(self) -> Iterator[bytes]:
        """The body, of known length or in chunks, with the faults that concern it."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                yield from self.read_pieces(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield from self.read_pieces(int(self.headers.get("Content-Length") or 0))
        self.body = b""

    def read_pieces(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self.rfile.read1(min(PIECE, length))
            if not piece:
                raise Dropped
            length -= len(piece)
            self.arrived += len(piece)
            self.meter(self.arrived, len(piece), "drop_upload_after")
            yield piece

    def read_body(self) -> bytes:
        if self.body is None:
            self.body = b"".join(self.pieces())
        return self.body

    def meter(self, total: int, piece: int, drop: str) -> None:
        """Slow down or break off as a fault says."""
        if rate := self.fault.get("bytes_per_second"):
            time.sleep(piece / rate)
        if drop in self.fault and total >= self.fault[drop]:
            raise Dropped

    def json_body(self) -> dict:
        return json.loads(self.read_body() or b"{}")

    def send(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None, length: int | None = None):
        self.read_body()  # the next request of this connection begins after it
        self.status = status
        end = time.monotonic() + self.fault.get("delay", 0)
        while time.monotonic() < end and self.fault in self.server.faults:
            time.sleep(0.01)
        self.note()  # before the answer: who has it may ask at once what was requested
        self.send_response(status)
        headers = {"Content-Type": "application/json"} | dict(headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.write_pieces(body)

    def write_pieces(self, body: bytes):
        sent = 0
        limit = self.fault.get("drop_download_after", len(body))
        for start in range(0, min(limit, len(body)), PIECE):
            piece = body[start : min(start + PIECE, limit)]
            self.wfile.write(piece)
            sent += len(piece)
            if rate := self.fault.get("bytes_per_second"):
                time.sleep(len(piece) / rate)
        if sent < len(body):
            self.wfile.flush()
            time.sleep(0.05)  # until what was sent has arrived: a reset discards it
            raise Dropped

    def send_json(self, value, headers: Mapping[str, str] | None = None):
        self.send(json.dumps(value).encode(), headers=headers)

    def send_page(self, entries: list, size: int = PAGE):
        """The part of `entries` that `cursor` asks for, with the address of the next one."""
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {"X-Total-Count": str(len(entries))}
        if start + size < len(entries):
            query = urlencode({k: v[0] for k, v in self.query.items()} | {"cursor": str(start + size)})
            headers["Link"] = f'<{self.server.url}{self.raw_route}?{query}>; rel="next"'
        self.send_json(entries[start : start + size], headers)

    # --- who may do what --------------------------------------------------------------------------------------------

    def authenticate(self) -> dict:
        """Account of the token, or an empty one without token."""
        header = self.headers.get("Authorization", "")
        if not header:
            return {}
        tokens = json.loads((self.server.root / "tokens.json").read_text())
        account = tokens.get(header.removeprefix("Bearer "))
        if account is None:
            raise HttpError(401, "Invalid credentials in Authorization header")
        self.user = account["name"]
        return account

    def writer(self, owner: str) -> dict:
        account = self.authenticate()
        if not account:
            raise HttpError(401, "Invalid username or password.")
        if account["role"] != "write":
            raise HttpError(403, "Forbidden: you must use a write token to upload to a repository.")
        if account["name"] != owner:
            raise HttpError(403, f'You don\'t have the rights to write under the namespace "{owner}".')
        return account

    def repository(self, kind: str, name: str, write: bool = False) -> Repository:
        repo = Repository(self.server.root, kind, name)
        account = self.authenticate()
        hidden = repo.exists and repo.private and account.get("name") != name.partition("/")[0]
        if not repo.exists or hidden:
            raise HttpError(404 if account else 401, "Repository not found", "RepoNotFound")
        if write:
            self.writer(name.partition("/")[0])
        return repo

    def revision(self, repo: Repository, revision: str) -> str:
        sha = repo.resolve(unquote(revision))
        if sha is None:
            raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # --- routes -----------------------------------------------------------------------------------------------------

    def answer(self):
        path = self.raw_route
        if path == "/_faults":
            self.server.faults = self.json_body()
            return self.send_json({})
        if path == "/api/whoami-v2":
            return self.whoami()
        if path == "/api/repos/create":
            return self.create()
        if path == "/api/validate-yaml":
            return self.validate_yaml()
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.+))?", path):
            return self.api(match[1], match[2], match[3] or "revision/main")
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path):
            return self.lfs(self.repository("datasets" if match[1] else "models", match[2], write=True), match[3])
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = self.repository("datasets" if match[1] else "models", match[2])
            return self.resolve(repo, match[3], unquote(match[4]))
        if match := re.fullmatch(r"/storage/([0-9a-f]{64})", path):
            return self.storage(match[1])
        raise HttpError(404, f"no such page: {path}")

    def whoami(self):
        account = self.authenticate()
        if not account:
            raise HttpError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": account["role"]}
        auth = {"type": "access_token", "accessToken": token}
        self.send_json({"type": "user", "id": "1", "name": account["name"], "orgs": [], "auth": auth})

    def create(self):
        request = self.json_body()
        owner = request.get("organization") or self.authenticate().get("name", "")
        account = self.writer(owner)
        kind = request.get("type", "model") + "s"
        repo = Repository(self.server.root, kind, f"{account['name']}/{request['name']}")
        url = f"{self.server.url}/{'datasets/' if kind == 'datasets' else ''}{repo.name}"
        with self.server.lock:
            if repo.exists:
                conflict = {"error": "You already created this model repo", "url": url}
                return self.send(json.dumps(conflict).encode(), 409)
            repo.create(private=request.get("visibility") == "private" or bool(request.get("private")))
        return self.send_json({"url": url, "id": "1", "name": repo.name})

    def validate_yaml(self):
        """What the Hub checks of a card: that the opening is YAML, and a few names in it."""
        import yaml

        content = self.json_body()["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---\r?(\n|$)", content, re.DOTALL)
        errors = []
        try:
            card = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            card, errors = {}, [f"not valid YAML: {error}"]
        if not isinstance(card, dict):
            card, errors = {}, ["metadata must be a mapping"]
        for name, value in card.items():
            plain = value if isinstance(value, list) else [value]
            if name in ("license", "library_name", "pipeline_tag") and not isinstance(value, str):
                errors.append(f'"{name}" must be a string')
            if name in ("tags", "datasets", "base_model") and not all(isinstance(v, str) for v in plain):
                errors.append(f'"{name}" must be an array of strings')
            if name == "license" and isinstance(value, str) and not re.fullmatch(r"[a-z0-9.-]+", value):
                errors.append('"license" must be one of the known licences')
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        body = {"errors": [{"message": e} for e in errors], "warnings": warnings}
        self.send(json.dumps(body).encode(), 400 if errors else 200)

    def api(self, kind: str, name: str, rest: str):
        action, _, tail = rest.partition("/")
        revision, _, below = tail.partition("/")
        repo = self.repository(kind, name, write=action in ("commit", "preupload", "branch"))
        if action == "refs":
            refs = [(unquote(p.name), p.read_text()) for p in sorted((repo.folder / "refs").glob("[!.]*"))]
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in refs]
            return self.send_json({"branches": branches, "tags": [], "converts": []})
        if action == "branch":
            start = self.revision(repo, self.json_body().get("startingPoint") or "main")
            write_text(repo.folder / "refs" / revision, start)
            return self.send_json({})
        sha = self.revision(repo, revision or "main")
        if action == "commit":
            return self.commit(repo, unquote(revision))
        files = repo.commit(sha)["files"]
        if action == "revision":
            return self.info(repo, sha, files)
        if action == "commits":
            keys = ("id", "date")
            log = [{k: c[k] for k in keys} | {"title": c["message"]} for c in repo.history(sha)]
            texts = [c["description"] for c in repo.history(sha)]
            user = [{"user": name.partition("/")[0]}]
            return self.send_page([c | {"message": t, "authors": user} for c, t in zip(log, texts, strict=True)])
        if action == "tree":
            return self.tree(files, unquote(below))
        if action == "paths-info":
            request = parse_qs(self.read_body().decode())["paths"]
            return self.send_json([entry(path, files[path]) for path in request if path in files])
        if action == "preupload":
            return self.preupload(files)
        raise HttpError(404, f"no such page: {rest}")

    def info(self, repo: Repository, sha: str, files: dict):
        siblings = [{"rfilename": path} for path in files]
        if self.query.get("blobs"):
            for item in siblings:
                file = entry(item["rfilename"], files[item["rfilename"]])
                item |= {"size": file["size"], "blobId": file["oid"], "lfs": file.get("lfs")}
        date = repo.commit(sha)["date"]
        info = {"_id": "1", "id": repo.name, "sha": sha, "private": repo.private, "gated": False, "disabled": False}
        info |= {"lastModified": date, "createdAt": date, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        self.send_json(info)

    def tree(self, files: dict, below: str):
        inside = {p: f for p, f in files.items() if not below or p.startswith(f"{below}/")}
        if below and not inside:
            raise HttpError(404, f"{below} does not exist", "EntryNotFound")
        entries, folders = [], set()
        for path, file in sorted(inside.items()):
            rest = path.removeprefix(f"{below}/") if below else path
            parents = rest.split("/")[:-1]
            recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
            for depth in range(1, len(parents) + 1 if recursive else min(2, len(parents) + 1)):
                folders.add("/".join([*([below] if below else []), *parents[:depth]]))
            if recursive or not parents:
                entries.append(entry(path, file))
        directories = [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in sorted(folders)]
        self.send_page(directories + entries)

    def preupload(self, files: dict):
        answers = []
        for file in self.json_body()["files"]:
            large = is_large(file["path"], base64.b64decode(file["sample"]), file["size"])
            known = files.get(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if known:
                answer["oid"] = known["sha256"] if known["lfs"] else known["oid"]
            answers.append(answer)
        self.send_json({"files": answers})

    # --- large files ------------------------------------------------------------------------------------------------

    def lfs(self, repo: Repository, action: str):
        batch = self.json_body()
        if action == "verify":
            path = self.server.root / "blobs" / batch["oid"]
            if not path.is_file() or path.stat().st_size != batch["size"]:
                raise HttpError(404, "the object is not there")
            return self.send_json({})
        prefix = "datasets/" if repo.kind == "datasets" else ""
        verify = f"{self.server.url}/{prefix}{repo.name}.git/info/lfs/objects/verify"
        objects = []
        for item in batch["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not (self.server.root / "blobs" / item["oid"]).is_file():
                href = f"{self.server.storage}/storage/{item['oid']}?signature=once"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(answer)
        return self.send_json({"transfer": "basic", "objects": objects})

    def storage(self, oid: str):
        blob, uploads = self.server.root / "blobs" / oid, self.server.root / "uploads"
        if self.command in ("GET", "HEAD"):
            return self.send_range(blob.read_bytes())
        partial = uploads / f"{oid}.{secrets.token_hex(4)}.partial"
        digest = hashlib.sha256()
        with open(partial, "wb", buffering=0) as file:
            for piece in self.pieces():
                file.write(piece)
                digest.update(piece)
        if digest.hexdigest() != oid:
            partial.unlink()
            raise HttpError(400, "the content is not what its checksum says")
        partial.replace(blob)
        return self.send(b"", headers={"ETag": f'"{digest.hexdigest()[:32]}"'})

    def resolve(self, repo: Repository, revision: str, path: str):
        sha = self.revision(repo, revision)
        file = repo.commit(sha)["files"].get(path)
        if file is None:
            raise HttpError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not file["lfs"]:
            content = (self.server.root / "blobs" / file["sha256"]).read_bytes()
            return self.send_range(content, headers | {"ETag": f'"{file["oid"]}"'})
        headers |= {"X-Linked-Size": str(file["size"]), "X-Linked-ETag": f'"{file["sha256"]}"'}
        headers["Location"] = f"{self.server.storage}/storage/{file['sha256']}?signature=once"
        return self.send(b"", 302, headers)

    def send_range(self, content: bytes, headers: Mapping[str, str] | None = None):
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match or self.fault.get("ignore_range"):
            return self.send(content, headers=headers, length=len(content))
        start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            return self.send(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
        piece = content[start : end + 1]
        headers = dict(headers or {}) | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        return self.send(piece, 206, headers, length=len(piece))

    # --- commits ----------------------------------------------------------------------------------------------------

    def commit(self, repo: Repository, branch: str):
        lines = [json.loads(line) for line in self.read_body().splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.server.lock:
            parent = repo.resolve(branch)
            if header.get("parentCommit") not in (None, parent):
                raise HttpError(412, "A commit has happened since. Please refresh and try again.")
            files = repo.commit(parent)["files"]
            for line in lines:
                self.apply(files, line["key"], line["value"])
            sha = repo.write(branch, files, header["summary"], parent, header.get("description", ""))
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo.name}/commit/{sha}"}
        self.send_json(answer | {"hookOutput": ""})

    def apply(self, files: dict, key: str, value: dict):
        path = value.get("path", "")
        if key == "file":
            files[path] = keep_blob(self.server.root, base64.b64decode(value["content"]), large=False)
        elif key == "lfsFile":
            blob = self.server.root / "blobs" / value["oid"]
            if not blob.is_file():
                raise HttpError(400, f"{path}: the object {value['oid']} was not uploaded")
            oid = hashlib.sha1(f"pointer {value['oid']}".encode()).hexdigest()
            files[path] = {"sha256": value["oid"], "size": blob.stat().st_size, "oid": oid, "lfs": True}
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HttpError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            for name in [n for n in files if n.startswith(path.rstrip("/") + "/")]:
                del files[name]


def entry(path: str, file: dict) -> dict:
    """A file in listings."""
    result = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
    if file["lfs"]:
        result["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 134}
    return result


# --- for tests -----------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """A server in a process of its own; use it in `with`. The port stays the same over `kill` and `start`."""

    root: Path
    port: int = 0
    tokens: Mapping[str, str] = field(default_factory=dict)  # further ones: token -> "user:write" or "user:read"
    process: subprocess.Popen | None = None

    def __enter__(self) -> "Hub":
        self.root.mkdir(parents=True, exist_ok=True)
        accounts = {TOKEN: f"{USER}:write", **self.tokens}
        table = {t: dict(zip(("name", "role"), text.split(":"), strict=True)) for t, text in accounts.items()}
        write_text(self.root / "tokens.json", json.dumps(table))
        self.start()
        return self

    def __exit__(self, *_):
        self.kill()

    def start(self) -> None:
        """Start, or start again; returns when requests are answered."""
        words = [sys.executable, __file__, str(self.root), "--port", str(self.port)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        """End it as a power cut would; connections to it are refused from then on."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables for a process that is to use this Hub; its cache and login are in `home`."""
        hidden = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_CACHE")
        kept = {name: value for name, value in os.environ.items() if name.upper() not in hidden}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}
        return kept | ({"HF_TOKEN": token} if token else {})

    def use_here(self, monkeypatch, home: Path, token: str | None = TOKEN) -> None:
        """Let huggingface_hub in this process, which has read its variables already, use this Hub without pauses."""
        from huggingface_hub import constants

        for name, value in self.environment(home, token).items():
            monkeypatch.setenv(name, value)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        values = {"ENDPOINT": self.url, "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_DISABLE_XET": True}
        values |= {"HF_TOKEN_PATH": str(home / "token"), "HF_STORED_TOKENS_PATH": str(home / "stored_tokens")}
        values |= {"HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}"}
        values |= {"HF_HUB_OFFLINE": False, "HF_HOME": str(home)}
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        for module in ("utils._http", "file_download"):  # its pauses between attempts
            monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda seconds: None))

    def faults(self, *faults: Mapping) -> None:
        """Replace the faults. Each has `match` (a pattern for "METHOD /path"), maybe `times`, and what happens:

        `status` (an answer), `delay` (s, or until the faults are replaced), `bytes_per_second`, `drop_upload_after` or
        `drop_download_after` (bytes), `ignore_range`.
        """
        request = urllib.request.Request(f"{self.url}/_faults", json.dumps(faults).encode(), method="POST")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()

    def requests(self, pattern: str = "") -> list[dict]:
        """Requests that have been answered, of those whose "METHOD /path" has the pattern."""
        log = self.root / "requests.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line for line in lines if re.search(pattern, f"{line['method']} {line['path']}")]

    def repository(self, name: str, kind: str = "models") -> Repository:
        """A repository on the server's disk."""
        return Repository(self.root, kind, name)

    def files(self, name: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        """What a repository holds; nothing when it does not exist."""
        repo = self.repository(name, kind)
        sha = repo.resolve(revision)
        files = repo.commit(sha)["files"] if sha else {}
        return {path: (self.root / "blobs" / file["sha256"]).read_bytes() for path, file in files.items()}

    def messages(self, name: str, kind: str = "models", revision: str = "main") -> list[str]:
        """Subjects of its commits, newest first."""
        repo = self.repository(name, kind)
        return [commit["message"] for commit in repo.history(repo.resolve(revision))]

    def uploading(self) -> int:
        """Bytes of objects that are on their way."""
        size = 0
        for path in (self.root / "uploads").glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):  # complete, and renamed, since it was listed
                size += path.stat().st_size
        return size


def main() -> None:
    """Serve until killed; the first line on stdout is the port."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0, help="0: chosen by the system")
    options = parser.parse_args()
    server = Server(options.folder, options.port)
    threading.Thread(target=end_with_parent, args=[os.getppid()], daemon=True).start()
    print(server.server_address[1], flush=True)
    server.serve_forever(poll_interval=0.05)


def end_with_parent(parent: int) -> None:
    """A test that is killed takes its server with it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    main()
