"""The client of the Hub: huggingface_hub with timeouts, its errors in one sentence, and the cards of repositories.

Tokens, endpoint, cache and offline mode are those that users of huggingface_hub know.
"""

import contextlib
import errno
import functools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import httpx2
import yaml
from huggingface_hub import CardData, HfApi, RepoCard, get_session, get_token, hf_hub_download, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

TIMEOUT = 60  # s without a byte; huggingface_hub itself waits for ever in most calls
CARD_FILE = "README.md"
LOGIN = "run `hf auth login`, or set HF_TOKEN"


def api() -> HfApi:
    """The client. From its first use on, no request of this process waits for ever."""
    _limit_all()
    return HfApi(library_name="mmaudio_hf")


@functools.cache
def _limit_all() -> None:
    hooks = get_session().event_hooks["request"]  # huggingface_hub's own, such as for offline mode

    def client() -> httpx2.Client:
        return httpx2.Client(event_hooks={"request": [*hooks, _limit_waiting]}, follow_redirects=True)

    set_client_factory(client)


def _limit_waiting(request: httpx2.Request) -> None:
    limits = request.extensions.get("timeout", {})
    kinds = ("connect", "read", "write", "pool")
    request.extensions = {**request.extensions, "timeout": {k: limits.get(k) or TIMEOUT for k in kinds}}


@contextlib.contextmanager
def hub_errors(repo: str, kind: str = "model") -> Iterator[None]:
    """Turns what goes wrong with `repo` into one sentence.

    A fault that may pass (no connection, a server that fails, a commit that came first) becomes a ConnectionError, what
    the user has to mend a ValueError; a fault of the disk stays an OSError.
    """
    try:
        yield
    except (TypeError, AttributeError, LookupError, AssertionError):
        raise  # a bug of ours
    except Exception as error:
        raise _explain(error, f"Hub repository {repo}" if kind == "model" else f"Hub {kind} {repo}") from error


def _explain(error: Exception, where: str) -> Exception:
    causes = list(_causes(error))
    answer = next((e for e in causes if isinstance(e, HfHubHTTPError)), None)
    if answer is not None:
        return _explain_answer(answer, where)
    if any(isinstance(e, OfflineModeIsEnabled) for e in causes):
        return ConnectionError(f"{where} is not asked: HF_HUB_OFFLINE is set")
    if any(isinstance(e, LocalTokenNotFoundError) for e in causes):
        return ValueError(f"{where} asks for a token: {LOGIN}")
    disk = next((e for e in causes if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)), None)
    if disk is not None:
        return OSError(
            disk.errno, f"{where} cannot be fetched: {disk.strerror}; free some space and run the same command again"
        )
    if isinstance(error, ValueError):
        return ValueError(f"{where}: {one_line(error)}")
    if isinstance(error, OSError) and error.errno and not _of_network(error):
        return OSError(error.errno, f"{where}: {one_line(error)}")
    return ConnectionError(f"{where} cannot be reached ({one_line(causes[-1])})")


def _explain_answer(error: HfHubHTTPError, where: str) -> Exception:
    status = error.response.status_code if error.response is not None else 0
    answer = one_line(error.server_message or error)
    if status == 412:
        return ConnectionError(f"{where}: another commit came first")
    if status in (408, 429) or status >= 500:
        return ConnectionError(f"{where} cannot be reached (the server answers {status})")
    by_kind = {  # a gated repository is one that is not found, too
        RevisionNotFoundError: " has no such revision: see its branches and commits on the Hub",
        GatedRepoError: f" is gated: ask for access on its page, then {LOGIN}",
        EntryNotFoundError: f" has no such file ({answer})",
        RepositoryNotFoundError: f" is not there, or private to others: check its name, or {LOGIN}",
    }
    by_status = {
        401: f": the Hub does not know this token: {LOGIN}",
        403: f": this token does not allow it ({answer}): use one that may write there; {LOGIN}",
    }
    kind = next((kind for kind in by_kind if isinstance(error, kind)), None)
    problem = by_kind[kind] if kind else by_status.get(status, f": the Hub refuses ({status}: {answer})")
    return ValueError(where + problem)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _of_network(error: OSError) -> bool:
    return isinstance(error, (ConnectionError, TimeoutError)) or error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)


def one_line(error: object) -> str:
    """First line of a message without what must not be shown: queries of addresses, which are signed, and tokens."""
    text = str(getattr(error, "reason", "") or error).strip().splitlines()
    line = re.sub(r"\?\S+", "", text[0] if text else type(error).__name__)
    token = get_token()
    line = line.replace(token, "***") if token else line
    return re.sub(r"\bhf_\w{8,}", "hf_***", line)


def check_name(name: str, repo: str) -> str:
    """Return the name of a file in a repository; ValueError for what could leave a folder, as ../x, /x or C:\\x."""
    steps = PurePosixPath(name).parts
    unsafe = name != "/".join(steps) or ".." in steps or name.startswith("/") or re.search(r"[\x00-\x1f\x7f\\:]", name)
    if unsafe or not steps:
        raise ValueError(f"Hub repository {repo} lists a file {name!r}, which is no plain name: nothing was fetched")
    return name


def check_file_names(repo: str, revision: str | None = None, token: str | bool | None = None) -> list[str]:
    """Names of the files of a model repository; ValueError when one could leave a folder: nothing may be downloaded.

    Without connection there is nothing to check: what is in the cache was checked when it was downloaded.
    """
    with contextlib.suppress(ConnectionError), hub_errors(repo):
        # As short as huggingface_hub waits before it takes a file from the cache.
        info = api().model_info(repo, revision=revision, token=token, timeout=10)
        return [check_name(file.rfilename, repo) for file in info.siblings or ()]
    return []


# --- cards -----------------------------------------------------------------------------------------------------------

CARD_BEGIN = "<!-- mmaudio_hf: every push replaces this section; text outside of it is kept -->"
CARD_END = "<!-- mmaudio_hf: end -->"
# The words of the first mark may differ: earlier versions wrote others.
_SECTION = re.compile(r"<!-- mmaudio_hf: (?!end -->).*?-->(.*?)<!-- mmaudio_hf: end -->", re.DOTALL)
# Beginning of the card that huggingface_hub writes by default.
_DEFAULT_CARD = "This model has been pushed to the Hub using the [PytorchModelHubMixin]"
_MARKDOWN = re.compile(r"([!#$%&*+./:<=>@\[\\\]^_`{|}~])")


def compose_card(data: CardData, body: str) -> str:
    """A card: metadata, then `body` between the marks."""
    return f"---\n{data.to_yaml()}\n---\n\n{CARD_BEGIN}\n\n{body.strip()}\n\n{CARD_END}\n"


def card_section(card: str) -> re.Match | None:
    """The section of a card that a push replaces, with its marks; group 1 is the text between them."""
    return _SECTION.search(card)


def merge_cards(existing: str | None, new: str) -> str:
    """`new`, a card of `compose_card`, with what the owners of the repository wrote into the `existing` one.

    Metadata: keys of `new` replace existing ones, tags and datasets are joined, results of other models kept. Text:
    the section between the marks is replaced; without marks, `new` is appended. ValueError when the metadata of the
    existing card cannot be read.
    """
    if existing is None:
        return new
    try:
        theirs, ours = RepoCard(existing), RepoCard(new)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of {CARD_FILE} on the Hub cannot be read ({error}): correct it") from error
    data = {**theirs.data.to_dict(), **ours.data.to_dict()}
    for key in ("tags", "datasets"):
        joined = [*_as_list(theirs.data.get(key)), *_as_list(ours.data.get(key))]
        if joined:
            data[key] = list(dict.fromkeys(joined))
    results = _as_list(ours.data.get("model-index"))
    names = [result["name"] for result in results]
    for result in _as_list(theirs.data.get("model-index")):
        if not isinstance(result, dict) or result.get("name") not in names:
            results.append(result)
    if results:
        data["model-index"] = results
    written, replaced = card_section(new), card_section(theirs.text)
    section = written[0] if written else ours.text.strip()  # a card that was not composed here has no marks
    if replaced:
        text = theirs.text[: replaced.start()] + section + theirs.text[replaced.end() :]
    elif theirs.text.strip() and not theirs.text.strip().startswith(_DEFAULT_CARD):
        text = f"{theirs.text.rstrip()}\n\n{section}\n"
    else:
        text = f"\n{section}\n"
    return f"---\n{CardData(**data).to_yaml()}\n---\n{text}"


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def card_metadata(file: Path) -> dict[str, Any]:
    """Metadata of the card in a file; {} when there is none or it cannot be read."""
    try:
        return RepoCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def download_card(repo_id: str, repo_type: str = "model", **options: Any) -> str | None:
    """Current card of a repository on the Hub; None when there is no such repository, or no card in it.

    Errors are those of huggingface_hub. The cache is not used: its copy may be older.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = hf_hub_download(repo_id, CARD_FILE, repo_type=repo_type, local_dir=folder, **options)
        except LocalEntryNotFoundError:  # the Hub could not be asked; it is a subclass of the next one
            raise
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        return Path(file).read_text(encoding="utf-8")


def plain(text: str, limit: int = 200) -> str:
    """Text from files as one line of Markdown, every special character escaped; cut at `limit` characters."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return _MARKDOWN.sub(r"\\\1", words if len(words) <= limit else f"{words[: limit - 1]}…")


def hub_id(source: str) -> str:
    """`source` when it has the form of a repository on the Hub, else ""."""
    return source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""


def linked(source: str) -> str:
    """A dataset of the Hub or a URL as a link, other text as it is."""
    url = f"https://huggingface.co/datasets/{source}" if hub_id(source) else source
    return f"[{plain(source)}]({url})" if re.fullmatch(r"https?://[\w./~%?=&#:+-]+", url) else plain(source)
