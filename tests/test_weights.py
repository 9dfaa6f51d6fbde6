"""Released weights: fetched from a real server on loopback, verified, converted."""

import hashlib
import json
import os
import subprocess
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import Command
from refusals import Code
from safetensors.torch import load_file

from mmaudio_hf import MMAudio, hub_client, weights
from mmaudio_hf.config import ModelConfig, load_recipe
from mmaudio_hf.features.clip import load_empty_text
from mmaudio_hf.features.encoders import SYNC_FILE, VAE_FILES, VOCODER_FILES
from mmaudio_hf.models.convert import convert_file
from mmaudio_hf.weights import CLIP, Weight

CONTENT = bytes(range(256)) * 20_000  # 5 MB, several chunks
MD5 = hashlib.md5(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_thisisasecret"


class Handler(BaseHTTPRequestHandler):
    """Files by path, with ETag and ranges; `server.cut` says after how many bytes answers break off."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body: bool):
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/") and "/tree/" in path:
            repo = path.split("/tree/")[0].removeprefix("/api/models/")
            names = [p.split("/resolve/main/")[1] for p in self.server.files if p.startswith(f"/{repo}/resolve/main/")]
            listing = [{"type": "file", "path": name, "oid": "0" * 40, "size": 1} for name in names]
            return self.send(json.dumps(listing).encode(), with_body)
        if path in self.server.moved:
            return self.send(b"", with_body, status=302, extra={"Location": self.server.moved[path]})
        body = self.server.files.get(path.replace(f"/resolve/{COMMIT}/", "/resolve/main/"))
        if body is None:
            return self.send(b"Not Found", with_body, status=404, extra={"X-Error-Code": "EntryNotFound"})
        if self.server.broken:
            return self.send(b"sorry", with_body, status=503)
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        extra = {"ETag": self.server.tag or tag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, requested = 0, self.headers.get("Range", "")
        if requested.startswith("bytes=") and self.headers.get("If-Range", extra["ETag"]) == extra["ETag"]:
            start = int(requested.removeprefix("bytes=").partition("-")[0])
            extra["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send(body[start:], with_body, status=206 if start else 200, extra=extra)

    def send(self, body: bytes, with_body: bool, status: int = 200, extra=()):
        self.send_response(status)
        for name, value in dict(extra).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(max(len(body), self.server.claim)))
        self.end_headers()
        if not with_body:
            return
        cut = self.server.cut.pop(0) if self.server.cut and status in (200, 206) else None
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.cut, server.tag = {}, [], [], None
    server.broken, server.claim, server.moved = False, 0, {}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(weights.RELEASE_VARIABLE, f"{server.url}/v0.1/")
    monkeypatch.setattr(weights, "PAUSE", 0.0)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def a_weight(server, content: bytes = CONTENT, md5: str = MD5) -> Weight:
    server.files["/v0.1/a.pth"] = content
    return Weight("a.pth", "a network", "some licence", md5=md5)


def fetch(weight: Weight, folder: Path, **options) -> list[str]:
    lines: list[str] = []
    weights.download([weight], folder, log=lines.append, **options)
    return lines


def bodies(server) -> list[str | None]:
    """Ranges of the requests for content."""
    return [ranges for method, _, ranges in server.requests if method == "GET"]


def run(server, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """`mmaudio-hf weights ...` with this server as the Hub and as the release."""
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": SECRET,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
    }
    result = Command("weights", *arguments, cwd=folder, env=environment).result()
    assert SECRET not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result


# --- files of the release -------------------------------------------------------------------------------------------


def test_licence_and_size_come_first_and_the_file_lands_under_its_name(server, tmp_path):
    lines = fetch(a_weight(server), tmp_path / "new")
    assert "5,120,000 bytes" in lines[0] and "some licence" in lines[0] and server.url in lines[0]
    assert "total" in lines[1]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.pth"]
    assert (tmp_path / "new" / "a.pth").read_bytes() == CONTENT
    server.requests.clear()
    assert "already there" in fetch(a_weight(server), tmp_path / "new")[0]
    assert server.requests == []


def test_a_lost_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.cut = [2_000_000, 1_000_000]
    fetch(a_weight(server), tmp_path)
    assert (tmp_path / "a.pth").read_bytes() == CONTENT
    assert bodies(server) == [None, "bytes=2000000-", "bytes=3000000-"]


def test_storage_elsewhere_is_followed(server, tmp_path):
    """A release answers with the signed address of a storage; ranges must go there, too."""
    weight = a_weight(server)
    server.files["/storage/1"] = server.files.pop("/v0.1/a.pth")
    server.moved["/v0.1/a.pth"] = f"{server.url.replace('127.0.0.1', 'localhost')}/storage/1?signature=abc"
    lines = []
    server.cut = [3_000_000]
    weights.download([weight], tmp_path, log=lines.append)
    assert (tmp_path / "a.pth").read_bytes() == CONTENT and "5,120,000 bytes" in lines[0]
    assert [ranges for _, path, ranges in server.requests if path == "/storage/1"][-1] == "bytes=3000000-"


def test_a_later_call_goes_on_but_not_with_another_version(server, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "ATTEMPTS", 1)
    weight = a_weight(server)
    server.cut = [2_000_000]
    with pytest.raises(ValueError, match=r"broke off .* 2,000,000 of 5,120,000 bytes.*again to resume"):
        fetch(weight, tmp_path)
    server.requests.clear()
    fetch(weight, tmp_path)
    assert bodies(server) == ["bytes=2000000-"] and (tmp_path / "a.pth").read_bytes() == CONTENT

    (tmp_path / "a.pth").unlink()
    server.cut = [2_000_000]
    with pytest.raises(ValueError, match="broke off"):
        fetch(weight, tmp_path)
    other = CONTENT[::-1]
    newer = a_weight(server, other, hashlib.md5(other).hexdigest())
    fetch(newer, tmp_path)
    assert (tmp_path / "a.pth").read_bytes() == other


def test_weak_tags_promise_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "ATTEMPTS", 2)
    server.tag = 'W/"1"'
    server.cut = [2_000_000]
    fetch(a_weight(server), tmp_path)
    assert bodies(server) == [None, None] and (tmp_path / "a.pth").read_bytes() == CONTENT


def test_wrong_content_is_dropped(server, tmp_path):
    weight = a_weight(server, b"<html>moved</html>")
    with pytest.raises(ValueError, match=r"sent another file than the released one.*its md5 is"):
        fetch(weight, tmp_path)
    assert not (tmp_path / "a.pth").exists() and not (tmp_path / "a.pth.partial").exists()


def test_a_damaged_file_is_named_and_fetched_again(server, tmp_path):
    weight = a_weight(server)
    (tmp_path / "a.pth").write_bytes(CONTENT[:-1])
    problem = weights.problem_of(weight, tmp_path, {})
    assert "damaged" in problem and f"`mmaudio-hf weights download a.pth --dir {tmp_path} --force`" in problem
    assert "is damaged" in fetch(weight, tmp_path)[0]
    assert weights.problem_of(weight, tmp_path, {}) is None


def test_answers_of_servers_become_one_sentence(server, tmp_path, monkeypatch):
    absent = Weight("b.pth", "", "")
    with pytest.raises(ValueError, match=r"b\.pth cannot be had, the server answers 404: check MMAUDIO_RELEASE_URL"):
        fetch(absent, tmp_path)
    server.broken = True
    with pytest.raises(ValueError, match=r"cannot be reached .*503"):
        fetch(a_weight(server), tmp_path)
    monkeypatch.setenv(weights.RELEASE_VARIABLE, "http://127.0.0.1:9/none")
    with pytest.raises(ValueError, match=r"cannot be reached \(.*refused"):
        fetch(absent, tmp_path)


def test_a_full_disk_is_seen_before(server, tmp_path):
    server.claim = 10**16
    with pytest.raises(ValueError, match=r"left, 10,000,000,000,000,000 bytes .* are needed"):
        fetch(a_weight(server), tmp_path)
    assert bodies(server) == []


def test_reading_stands_in_for_a_checksum(server, tmp_path):
    weight = a_weight(server, md5="")
    seen = []
    fetch(weight, tmp_path, checks={"a.pth": lambda path: seen.append(path.read_bytes() == CONTENT)})
    assert seen == [True]

    def fail(path):
        raise ValueError("names do not fit")

    with pytest.raises(ValueError, match="names do not fit"):
        fetch(weight, tmp_path, force=True, checks={"a.pth": fail})
    assert "names do not fit" in weights.problem_of(weight, tmp_path, {"a.pth": fail})


# --- the Hub, and the command line ----------------------------------------------------------------------------------


def test_files_and_models_of_the_hub(server, tmp_path):
    settings = json.dumps({"upsample_rates": [8, 4, 2, 2, 2, 2]}).encode()
    server.files[f"/nvidia/{weights.BIGVGAN}/resolve/main/config.json"] = settings
    for name in ("config.json", "model.safetensors", "vocab.json", "open_clip_pytorch_model.bin"):
        server.files[f"/{CLIP.repo}/resolve/main/{name}"] = name.encode()
    result = run(server, "download", f"{weights.BIGVGAN}/config.json", "clip", "--dir", "w", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "MIT" in result.stdout and "Apple" in result.stdout and "total" in result.stdout
    landed = [p.relative_to(tmp_path / "w") for p in (tmp_path / "w").rglob("*") if p.is_file()]
    assert landed == [Path(weights.BIGVGAN) / "config.json"]
    assert (tmp_path / "w" / landed[0]).read_bytes() == settings
    snapshot = next((tmp_path / "hf" / "hub").glob("models--apple*/snapshots/*"))
    assert sorted(p.name for p in snapshot.iterdir()) == ["config.json", "model.safetensors", "vocab.json"]

    result = run(server, "verify", "--dir", "w", folder=tmp_path)
    assert result.returncode == 0 and result.stdout.count(": ok") == 2, result.stdout
    (snapshot / "model.safetensors").resolve().write_bytes(b"spoiled")
    result = run(server, "verify", "clip", "--dir", "w", folder=tmp_path)
    assert result.returncode == 1 and "damaged" in result.stdout
    assert Counter(run(server, "list", "--dir", "w", folder=tmp_path).stdout.split())["yes"] == 2


def test_a_repository_that_is_not_there(server, tmp_path):
    result = run(server, "download", "mmaudio_small_16k", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: Hub repository hkchengrex/MMAudio")
    assert len(result.stderr.splitlines()) == 1


def test_another_file_on_the_hub_is_dropped(server, tmp_path):
    """Also after a lost connection, which the client of the Hub resumes."""
    server.files["/hkchengrex/MMAudio/resolve/main/weights/mmaudio_small_16k.pth"] = CONTENT
    server.cut = [2_000_000]
    result = run(server, "download", "mmaudio_small_16k", "--dir", "w", folder=tmp_path)
    assert result.returncode == 2 and f"its md5 is {MD5}" in result.stderr
    assert server.cut == [] and list((tmp_path / "w").iterdir()) == []


def test_command_line_fetches_and_refuses(server, tmp_path):
    torch.save([torch.ones(77, 1024)], tmp_path / "empty.pth")
    server.files["/v0.1/empty_string.pth"] = (tmp_path / "empty.pth").read_bytes()
    server.files["/v0.1/v1-16.pth"] = b"not it"
    result = run(server, "download", "empty_string", "v1-16", "--dir", "w", folder=tmp_path)
    assert result.returncode == 2 and "sent another file" in result.stderr
    assert load_empty_text(tmp_path / "w" / "empty_string.pth").shape == (77, 1024)
    result = run(server, "verify", "v1-16", "--dir", "w", folder=tmp_path)
    assert result.returncode == 1
    assert "`mmaudio-hf weights download v1-16.pth --dir w`" in result.stdout
    result = run(server, "download", folder=tmp_path)
    assert result.returncode == 2 and "--for RECIPE" in result.stderr


# --- the catalogue --------------------------------------------------------------------------------------------------


def test_names_and_needs_are_those_of_the_encoders():
    root = Path(__file__).parent.parent
    recipe = load_recipe(root / "recipes" / "small_16k.yaml")
    for mode in ("16k", "44k"):
        variant = {"16k": "small_16k", "44k": "large_44k_v2"}[mode]
        chosen = load_recipe(root / "recipes" / "small_16k.yaml", [f"model.variant={variant}"])
        names = {weight.path for weight in weights.needed(chosen)}
        assert names == {VAE_FILES[mode], VOCODER_FILES[mode], SYNC_FILE, "empty_string.pth", "clip"}
    tuned = weights.needed(load_recipe(root / "recipes" / "finetune_small_16k.yaml"))
    assert {w.path for w in tuned} - {w.path for w in weights.needed(recipe)} == {"mmaudio_small_16k.pth"}
    assert recipe.encoders.clip == CLIP.repo
    assert weights.needed(load_recipe(root / "recipes" / "example.yaml")) == []
    assert weights.find(["v1-16"]) == weights.find(["v1-16.pth"]) and len(weights.find(["all"])) == 14
    assert len(weights.find([weights.BIGVGAN])) == 2
    with pytest.raises(ValueError, match=r"did you mean v1-16\.pth"):
        weights.find(["v1-61.pth"])


def test_flow_networks_are_located_where_the_reference_keeps_them(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "mmaudio_small_16k.pth").write_bytes(b"")
    path = weights.locate(weights.find(["mmaudio_small_16k"])[0], tmp_path / "ext_weights")
    assert path == tmp_path / "weights" / "mmaudio_small_16k.pth"


# --- converting -----------------------------------------------------------------------------------------------------


def test_a_flow_network_becomes_a_pretrained_model(tmp_path):
    network = MMAudio(ModelConfig(hidden_dim=64, num_heads=1, depth=3, fused_depth=1))
    network.set_latent_statistics(torch.zeros(20), torch.ones(20))
    state = network.state_dict()
    torch.save(state | {"latent_rot": torch.ones(2)}, tmp_path / "tiny.pth")
    assert "small_16k" in convert_file(tmp_path / "tiny.pth", tmp_path / "out")
    loaded = MMAudio.from_pretrained(tmp_path / "out")
    assert loaded.config == network.config
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(ValueError, match="exists"):
        convert_file(tmp_path / "tiny.pth", tmp_path / "out")
    with pytest.raises(ValueError, match="is not small_16k: hidden_dim is 64, not 448"):
        convert_file(tmp_path / "tiny.pth", tmp_path / "b", "small_16k")
    torch.save({n: v for n, v in state.items() if n != "t_embed.mlp.0.bias"}, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"less\.pth does not fit this network: t_embed\.mlp\.0\.bias is missing"):
        convert_file(tmp_path / "less.pth", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_other_files_become_safetensors(tmp_path):
    shared = torch.arange(4.0)
    torch.save({"generator": {"a": shared, "b": shared[:2]}, "step": 3}, tmp_path / "net.pt")
    convert_file(tmp_path / "net.pt", tmp_path / "net.safetensors")
    assert load_file(tmp_path / "net.safetensors")["b"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"ending \.safetensors"):
        convert_file(tmp_path / "net.pt", tmp_path / "folder")
    torch.save({"a": Code()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="would run code"):
        convert_file(tmp_path / "code.pt", tmp_path / "c.safetensors")


# --- the empty caption ----------------------------------------------------------------------------------------------


def test_features_of_the_empty_caption(tmp_path, capsys):
    path, features = tmp_path / "empty_string.pth", torch.randn(77, 1024)
    for form in (features, [features], (features, None), features[None]):
        torch.save(form, path)
        assert torch.equal(load_empty_text(path), features)
    wrong = {
        r"shape \(77, 768\)": torch.ones(77, 768),
        "holds a dict": {"a": features},
        "holds a list": [],
        "not finite": torch.full((77, 1024), float("nan")),
        "torch.int64": torch.ones(77, 1024, dtype=torch.int64),
        "would run code": [Code()],
    }
    for message, value in wrong.items():
        torch.save(value, path)
        with pytest.raises(ValueError, match=message) as caught:
            load_empty_text(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="mmaudio-hf weights download"):
        load_empty_text(tmp_path / "absent.pth")
    assert Code.MARK not in capsys.readouterr().out


def test_addresses_in_messages_carry_no_signature():
    error = SimpleNamespace(reason="https://cdn.example/x?token=abc was lost\nmore")
    assert hub_client.one_line(error) == "https://cdn.example/x was lost"
