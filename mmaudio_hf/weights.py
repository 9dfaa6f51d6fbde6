"""Released weights: the catalogue of files with their licences, download and verification, and safe reading.

The names below the folder of weights are those of the reference implementation, so that its `ext_weights/` and
`weights/` can be used as they are. Files of the MMAudio release are fetched over HTTP, the others from the Hugging Face
Hub. Nothing is ever unpickled.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import httpx2
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from mmaudio_hf.config import Recipe
from mmaudio_hf.files import sha256_of
from mmaudio_hf.hub_client import api, hub_errors, one_line
from mmaudio_hf.schema import checked

RELEASE_URL = "https://github.com/hkchengrex/MMAudio/releases/download/v0.1"
RELEASE_VARIABLE = "MMAUDIO_RELEASE_URL"  # address of a mirror of the release
ATTEMPTS = 5
PAUSE = 1.0  # s before the second attempt, doubled for each further one
TIMEOUT = 30  # s without a byte

NON_COMMERCIAL = "CC-BY-NC 4.0"
MIT = "MIT"
APPLE = "Apple research licence"
CC0 = "CC0 1.0"

Check = Callable[[Path], object]  # raises ValueError for a file that is not what it should be


@dataclass(frozen=True)
class Weight:
    """One released file, or a model of the Hub."""

    path: str  # below the folder of weights; also its name
    what: str
    licence: str
    size: str = ""  # as published
    md5: str = ""  # where published
    repo: str = ""  # on the Hub; without one, the file is part of the release
    file: str = ""  # its path in the repository; "" for a model, which is kept in the cache of the Hub

    @property
    def is_hub_model(self) -> bool:
        """Whether this is a model in the cache of the Hub, not a file below the folder of weights."""
        return bool(self.repo) and not self.file

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        if self.repo:
            return f"Hub {self.repo}" + (f", {self.file}" if self.file else "")
        return self.url

    @property
    def url(self) -> str:
        """Address of a file of the release."""
        return f"{os.environ.get(RELEASE_VARIABLE, RELEASE_URL).rstrip('/')}/{self.path}"


def _flow(variant: str, size: str, md5: str) -> Weight:
    name = f"mmaudio_{variant}.pth"
    return Weight(name, "flow network", NON_COMMERCIAL, size, md5, "hkchengrex/MMAudio", f"weights/{name}")


BIGVGAN, _GENERATOR = "bigvgan_v2_44khz_128band_512x", "bigvgan_generator.pt"
CLAP_FILE = "music_speech_audioset_epoch_15_esc_89.98.pt"
CLIP = Weight("clip", "CLIP, frames and text", APPLE, "3.9G", repo="apple/DFN5B-CLIP-ViT-H-14-384")
CATALOGUE = (
    _flow("small_16k", "601M", "af93cde404179f58e3919ac085b8033b"),
    _flow("small_44k", "601M", "babd74c884783d13701ea2820a5f5b6d"),
    _flow("medium_44k", "2.4G", "5a56b6665e45a1e65ada534defa903d0"),
    _flow("large_44k", "3.9G", "fed96c325a6785b85ce75ae1aafd2673"),
    _flow("large_44k_v2", "3.9G", "01ad4464f049b2d7efdaa4c1a59b8dfe"),
    Weight("v1-16.pth", "mel VAE, 16 kHz", NON_COMMERCIAL, "655M", "69f56803f59a549a1a507c93859fd4d7"),
    Weight("v1-44.pth", "mel VAE, 44.1 kHz", NON_COMMERCIAL, "1.2G", "fab020275fa44c6589820ce025191600"),
    Weight("best_netG.pt", "vocoder, 16 kHz (BigVGAN)", MIT, "429M", "eeaf372a38a9c31c362120aba2dde292"),
    Weight(f"{BIGVGAN}/{_GENERATOR}", "vocoder, 44.1 kHz (BigVGAN-v2)", MIT, repo=f"nvidia/{BIGVGAN}", file=_GENERATOR),
    Weight(f"{BIGVGAN}/config.json", "its settings", MIT, "small", repo=f"nvidia/{BIGVGAN}", file="config.json"),
    Weight("synchformer_state_dict.pth", "sync features", MIT, "907M", "5b2f5594b0730f70e41e549b7c94390c"),
    Weight("empty_string.pth", 'CLIP text features of ""', APPLE, "small"),
    CLIP,
    Weight(CLAP_FILE, "LAION-CLAP, for evaluation", CC0, repo="lukewys/laion_clap", file=CLAP_FILE),
)
CLIP_PATTERNS = ("config.json", "vocab.json", "merges.txt", "tokenizer.json")


# --- choosing ------------------------------------------------------------------------------------------------------


def find(names: Iterable[str]) -> list[Weight]:
    """Entries of the catalogue by name, file name, that without its ending, or folder; "all" for every one.

    ValueError naming the nearest entry for a name that is unknown.
    """
    chosen: dict[Weight, None] = {}
    spellings = (str, os.path.basename, lambda path: Path(path).stem, os.path.dirname)
    for name in names:
        matching = ([weight for weight in CATALOGUE if spelling(weight.path) == name] for spelling in spellings)
        weights = CATALOGUE if name == "all" else next(filter(None, matching), None)
        if weights is None:
            close = difflib.get_close_matches(name, [weight.path for weight in CATALOGUE], n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "`mmaudio-hf weights list` shows what there is"
            raise ValueError(f"there is no released file {name!r}: {hint}")
        chosen |= dict.fromkeys(weights)
    return list(chosen)


def needed(recipe: Recipe) -> list[Weight]:
    """What extraction, training, generation and evaluation with `recipe` read; toy encoders read nothing."""
    scored = find([CLAP_FILE, "synchformer_state_dict.pth"]) if recipe.evaluation.metrics else []
    if recipe.encoders.kind == "toy":
        return scored
    audio = {"16k": ("v1-16.pth", "best_netG.pt"), "44k": ("v1-44.pth", f"{BIGVGAN}/bigvgan_generator.pt")}
    weights = find([*audio[recipe.model.mode], "synchformer_state_dict.pth", "empty_string.pth"])
    start = Path(recipe.finetune.init_from).name
    weights += [weight for weight in CATALOGUE if weight.file.startswith("weights/") and weight.path == start]
    weights += [CLIP] if recipe.encoders.clip == CLIP.repo else []
    return list(dict.fromkeys([*weights, *scored]))


def locate(weight: Weight, folder: Path) -> Path | None:
    """Where `weight` is, None when it is absent: below `folder`, in the `weights/` beside it, where the reference keeps
    flow networks, or in the cache of the Hub.
    """
    if weight.is_hub_model:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(weight.repo, "config.json")
        cached = list(Path(config).parent.iterdir()) if isinstance(config, str) else []
        return next((file.parent for file in cached if file.suffix in (".safetensors", ".bin")), None)
    paths = [folder / weight.path]
    if weight.file.startswith("weights/"):
        paths.append(folder.resolve().parent / weight.file)
    return next((path for path in paths if path.is_file()), None)


def command(weight: Weight, folder: Path, force: bool = False) -> str:
    """The command that fetches `weight` into `folder`."""
    return f"`mmaudio-hf weights download {weight.path} --dir {folder}{' --force' if force else ''}`"


def table(folder: Path) -> str:
    """The catalogue as lines of text, with what is in `folder`."""
    rows = [("name", "present", "size", "licence", "what", "source")]
    for weight in CATALOGUE:
        present = "yes" if locate(weight, folder) else "partly" if _partial(folder / weight.path).exists() else "no"
        rows.append((weight.path, present, weight.size or "-", weight.licence, weight.what, weight.source))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# --- verifying -----------------------------------------------------------------------------------------------------


def problem_of(weight: Weight, folder: Path, checks: Mapping[str, Check]) -> str | None:
    """What is wrong with `weight` in `folder`, with the command that fetches it; None when it is right.

    Checked by MD5 where it is published, else by `checks[weight.path]`, which reads the file; a model of the Hub by the
    SHA-256 under which its cache keeps it.
    """
    path = locate(weight, folder)
    if path is None:
        return f"{weight.path} is missing: fetch it with {command(weight, folder)}"
    try:
        _check(weight, path, checks)
    except ValueError as error:
        return f"{error}: fetch it again with {command(weight, folder, force=True)}"
    return None


def _check(weight: Weight, path: Path, checks: Mapping[str, Check]) -> None:
    for file in sorted(path.iterdir()) if weight.is_hub_model else ():
        name = file.resolve().name  # of the blob: SHA-256 of large files
        if re.fullmatch("[0-9a-f]{64}", name) and sha256_of(file) != name:
            raise ValueError(f"{file} is damaged: its sha256 is not {name}")
    if weight.md5:
        with open(path, "rb") as content:
            md5 = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != weight.md5:
            raise ValueError(f"{path} is damaged: its md5 is {md5}, not {weight.md5}")
    elif weight.path in checks:
        checks[weight.path](path)


# --- downloading ---------------------------------------------------------------------------------------------------


def download(
    weights: Sequence[Weight],
    folder: Path,
    checks: Mapping[str, Check] | None = None,
    force: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Fetch what is missing or damaged of `weights` into `folder`; first log licences, sizes and their sum.

    A file is checked before it gets its name, so a file with its name is a right one. Lost connections are resumed, and
    so are files of the release where an earlier call stopped. `force` fetches what is present, too. ValueError, in one
    sentence, where a server cannot be reached, does not have the file or sends another one, and where the disk is too
    small.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    checks, missing = checks or {}, list[Weight]()
    for weight in weights:
        path = None if force else locate(weight, folder)
        try:
            if path is not None:
                _check(weight, path, checks)
                log(f"{weight.path}: already there, {path}")
        except ValueError as error:
            log(f"{error}; it is fetched again")
            path = None
        missing += [weight] if path is None else []
    sizes = {weight: _server_size(weight) for weight in missing}
    for weight, size in sizes.items():
        log(f"{weight.path}: {_readable(size)}, {weight.licence}, {weight.source}")
    if not missing:
        return
    log(f"total: {_readable(sum(sizes.values()))} in {len(missing)} file{'s' * (len(missing) > 1)}")
    needs: dict[Path, int] = {}
    for weight, size in sizes.items():
        target = (Path(HF_HUB_CACHE) if weight.is_hub_model else folder).resolve()
        existing = next(path for path in (target, *target.parents) if path.exists())
        partial = _partial(folder / weight.path)
        needs[existing] = needs.get(existing, 0) + size - (partial.stat().st_size if partial.is_file() else 0)
    for existing, need in needs.items():
        if need > (free := shutil.disk_usage(existing).free):
            left = f"{existing} has {_readable(free)} left, {_readable(need)} are needed"
            raise ValueError(f"{left}: free some space, or choose another --dir")
    for weight, size in sizes.items():
        _download(weight, size, folder, checks, force)
        log(f"{weight.path}: done")


def _readable(size: int) -> str:
    return f"{size:,} bytes" + (f" ({size / 1e9:.2f} GB)" if size >= 1e7 else "") if size else "size unknown"


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _download(weight: Weight, size: int, folder: Path, checks: Mapping[str, Check], force: bool) -> None:
    if weight.is_hub_model:
        for name in _model_files(weight):
            _from_hub(weight, name, None, force)
        return
    target = folder / weight.path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, staging = _partial(target), folder / f".hub-{target.name}"
    if weight.repo:
        try:
            _from_hub(weight, weight.file, staging, force).replace(partial)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    else:
        _from_url(weight.url, partial, size)
    try:
        _check(weight, partial, checks)
    except ValueError as error:
        partial.unlink()
        raise ValueError(f"{weight.source} sent another file than the released one, it is dropped: {error}") from error
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)
    _tag_file(partial).unlink(missing_ok=True)


def _server_size(weight: Weight) -> int:
    if not weight.repo:
        try:
            with _client() as client:
                return int(_checked(client.head(weight.url)).headers.get("Content-Length") or 0)
        except (OSError, httpx2.HTTPError) as error:
            way = f"check the connection, or name a mirror in {RELEASE_VARIABLE}"
            raise ValueError(f"{weight.url} cannot be reached ({one_line(error)}): {way}") from error
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    names = _model_files(weight) if weight.is_hub_model else [weight.file]
    with hub_errors(weight.repo):
        return sum(get_hf_file_metadata(hf_hub_url(weight.repo, name)).size or 0 for name in names)


# --- from the Hub --------------------------------------------------------------------------------------------------


def _model_files(weight: Weight) -> list[str]:
    """Files that transformers reads of a model: safetensors, or else pickled weights of tensors alone."""
    with hub_errors(weight.repo):
        names = api().list_repo_files(weight.repo)
    shards = [name for name in names if re.fullmatch(r"model[\w.-]*\.safetensors(\.index\.json)?", name)]
    shards = shards or [name for name in names if re.fullmatch(r"pytorch_model[\w.-]*\.bin(\.index\.json)?", name)]
    if not shards:
        raise ValueError(f"Hub repository {weight.repo} holds no weights for transformers")
    return [name for name in names if name in CLIP_PATTERNS] + shards


def _from_hub(weight: Weight, name: str, staging: Path | None, force: bool) -> Path:
    """Fetch one file into `staging`, or into the cache of the Hub.

    The client resumes lost connections by itself, but keeps nothing of a call that was ended.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(weight.repo):
        return Path(hf_hub_download(weight.repo, name, local_dir=staging, force_download=force))


# --- from a URL: huggingface_hub.http_get resumes without asking whether the file is still the same -----------------


def _client() -> httpx2.Client:
    # The bytes as they are: a compressed answer could not be resumed.
    return httpx2.Client(follow_redirects=True, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"})


def _checked(response: httpx2.Response) -> httpx2.Response:
    """The response if it is a success; ValueError where trying again is of no use, OSError where it may help."""
    status = response.status_code
    if status in (408, 429) or status >= 500:
        raise ConnectionError(f"the server answers {status}")
    if status >= 400:
        way = f"check {RELEASE_VARIABLE} if it is set"
        raise ValueError(f"{response.request.url} cannot be had, the server answers {status}: {way}")
    return response


def _tag_file(partial: Path) -> Path:
    """Holds the ETag of the version that the partial file is of."""
    return partial.with_name(partial.name + ".etag")


def _from_url(url: str, partial: Path, size: int) -> None:
    for attempt in range(ATTEMPTS):
        try:
            return _resume(url, partial, size)
        except (ConnectionError, TimeoutError, httpx2.HTTPError) as error:
            last = error
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE * 2**attempt)
    have = partial.stat().st_size if partial.exists() else 0
    raise ValueError(
        f"{url} broke off {ATTEMPTS} times, last at {have:,} of {size:,} bytes ({one_line(last)}):"
        " run the same command again to resume"
    )


def _resume(url: str, partial: Path, size: int) -> None:
    tag_file = _tag_file(partial)
    tag = tag_file.read_text() if tag_file.exists() else ""
    have = partial.stat().st_size if partial.exists() else 0
    if not tag or have >= size > 0:
        have = 0  # what is there may be of another version
    headers = {"Range": f"bytes={have}-", "If-Range": tag} if have else {}
    with _client() as client, client.stream("GET", url, headers=headers) as response:
        _checked(response)
        resumed = response.status_code == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise ConnectionError("the server sent another range than the requested one")
        if not resumed:  # another version, or a server without ranges
            have, tag = 0, response.headers.get("ETag", "")
            # A weak tag does not promise the same bytes, so nothing can be resumed with it.
            tag_file.write_text("" if tag.startswith("W/") else tag)
        total, name = have + int(response.headers.get("Content-Length") or 0), partial.name.removesuffix(".partial")
        bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=name, dynamic_ncols=True)
        with open(partial, "r+b" if have else "wb") as file, bar:
            file.seek(have)
            for chunk in response.iter_raw():
                try:
                    file.write(chunk)
                except OSError as error:
                    raise ValueError(f"{partial} cannot be written ({error.strerror or error})") from error
                bar.update(len(chunk))


# --- Reading of released weight files --------------------------------------------------------------------------------


SHOWN_PROBLEMS = 4
HALVES = (torch.float16, torch.bfloat16)
Source = str | PathLike | Mapping[str, torch.Tensor]  # a file of weights, or a state dict
Module = TypeVar("Module", bound=nn.Module)


def describe(source: Source) -> str:
    """Origin of a state dict for messages."""
    return "the given state dict" if isinstance(source, Mapping) else str(source)


def read_file(source: str | PathLike) -> Any:
    """Content of a weight file, whatever its form: tensors on the CPU in dicts, lists or alone, and plain values.

    ValueError naming the file when it is absent, damaged, or a pickle that would run code.
    """
    path = Path(source)
    if not path.is_file():
        way = "fetch released weights with `mmaudio-hf weights download`"
        raise ValueError(f"{path} is not a file: correct the path, or {way}")
    try:
        if path.suffix == ".safetensors":
            check_file(path)
            return load_file(path)
        # Only the zip format of torch.save can be memory-mapped; older files are read into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        reason = "it is damaged or not a file of weights: download it again"
        if "global" in str(error).lower():
            reason = "it is a pickle that would run code, which is never done: use a file of tensors alone"
        raise ValueError(f"{path} is refused: {reason}") from None  # torch's message recommends to run the code
    except OSError:
        raise
    except Exception as error:  # other bytes make torch's unpickler fail in any way: IndexError, struct.error, ...
        raise ValueError(f"{path} is damaged or not a file of weights: download it again ({error})") from error


_CHECKSUM = re.compile(rb'"sha256":"([^"]{64})"')  # in the header of a safetensors file, of tensors there is none


def write_safetensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """`save_file` of safetensors, which gives new files mode 0600, with the mode that the umask gives others."""
    path.touch()
    mode = path.stat().st_mode
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    save_file(contiguous, path, dict(metadata) if metadata else None)
    path.chmod(mode)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum of itself, in `metadata`: SHA-256 of the file with zeros in its place.

    The same tensors make the same bytes: safetensors alone writes metadata in random order.
    """
    zeros = "0" * 64
    write_safetensors(tensors, path, {**metadata, "sha256": zeros})
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, path
        file.seek(8)
        file.write(text.ljust(size))
        file.seek(0)
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(8 + text.index(f'"sha256":"{zeros}"'.encode()) + len('"sha256":"'))
        file.write(checksum.encode())


def check_file(path: Path) -> None:
    """ValueError naming a safetensors file that is not what `save_tensors` wrote. One of others is not checked."""
    with open(path, "rb") as file:
        start = file.read(8)
        start += file.read(min(int.from_bytes(start, "little"), 100_000_000))  # as long as safetensors lets it be
        if not (match := _CHECKSUM.search(start)):
            return
        digest = hashlib.sha256(start[: match.start(1)] + b"0" * 64 + start[match.end(1) :])
        while block := file.read(1 << 24):
            digest.update(block)
    if digest.hexdigest().encode() != match[1]:
        raise ValueError(f"{path} is damaged: it is not what was written (its checksum differs)")


@checked
def load_state(
    source: Source, *, prefix: str = "", key: str | None = None, keep_dtype: bool = False
) -> dict[str, torch.Tensor]:
    """Return the named tensors of a released file (`.safetensors`, else torch.save), or of a dict like it.

    `key` is the entry that holds the state dict in files with several entries; `prefix` selects names and is removed
    from them. A source without the key, or without any name with the prefix, is taken as the bare state dict. Tensors
    of files are memory-mapped where the format allows, so that large files open at once. float16 and bfloat16 become
    float32, in which every network here is built, unless `keep_dtype`. Raises ValueError for anything else than a
    readable file of tensors; pickled code is never run.
    """
    state = source if isinstance(source, Mapping) else read_file(source)
    if key is not None and isinstance(state, Mapping) and key in state:
        state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"{describe(source)} holds a {type(state).__name__}, not named tensors")
    state = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)} or dict(state)
    if others := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"{describe(source)} holds entries that are not tensors, as {others[:SHOWN_PROBLEMS]}")
    return {n: value.float() if value.dtype in HALVES and not keep_dtype else value for n, value in state.items()}


def check_state(state: Mapping, expected: Mapping, source: Source) -> None:
    """Raise one ValueError that names the first missing, unexpected or misshapen tensors of `state`.

    `expected` maps names to tensors (of any device, also meta) with the right shape and dtype.
    """
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not expected" for name in state if name not in expected]
    for name in (name for name in expected if name in state):
        ours, theirs = expected[name], state[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name} has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
        elif ours.dtype != theirs.dtype:
            problems.append(f"{name} is {theirs.dtype}, not {ours.dtype}")
    if problems:
        more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        listed = "; ".join(problems[:SHOWN_PROBLEMS])
        raise ValueError(f"{describe(source)} does not fit this network: {listed}{more}")


def load_strict(module: Module, state: Mapping, source: Source) -> Module:
    """Put `state` into `module`, frozen and in evaluation mode, after `check_state`; returns `module`.

    A module built on the meta device takes the tensors as they are, without a copy: it shares their memory.
    `source` is what `load_state` was given and only names the origin in messages.
    """
    own = module.state_dict()
    check_state(state, own, source)
    placed = {name: value if own[name].is_meta else value.to(own[name].device) for name, value in state.items()}
    module.load_state_dict(placed, assign=True)
    return module.requires_grad_(False).eval()
