"""The client of the Hub: huggingface_hub, with limits on waiting, and its errors in one sentence.

Tokens, endpoint, cache and offline mode are those that users of huggingface_hub know.
"""

import contextlib
import errno
import functools
import re
from collections.abc import Iterator

import httpx2
from huggingface_hub import HfApi, get_session, get_token, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

TIMEOUT = 60  # s without a byte; huggingface_hub itself waits for ever in most calls
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
        return OSError(disk.errno, f"{where} cannot be fetched: {disk.strerror}; make room, the same command goes on")
    if isinstance(error, ValueError):
        return ValueError(f"{where}: {one_line(error)}")
    if isinstance(error, OSError) and error.errno and not _of_network(error):
        return OSError(error.errno, f"{where}: {one_line(error)}")
    return ConnectionError(f"{where} cannot be reached ({one_line(causes[-1])})")


def _explain_answer(error: HfHubHTTPError, where: str) -> Exception:
    status = error.response.status_code if error.response is not None else 0
    said = one_line(error.server_message or error)
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{where} has no such revision: see its branches and commits on the Hub")
    if isinstance(error, GatedRepoError):
        return ValueError(f"{where} is gated: ask for access on its page, then {LOGIN}")
    if isinstance(error, EntryNotFoundError):
        return ValueError(f"{where} has no such file ({said})")
    if isinstance(error, RepositoryNotFoundError):
        return ValueError(f"{where} is not there, or private to others: check its name, or {LOGIN}")
    if status == 401:
        return ValueError(f"{where}: the Hub does not know this token: {LOGIN}")
    if status == 403:
        return ValueError(f"{where}: this token does not allow it ({said}): use one that may write there; {LOGIN}")
    if status == 412:
        return ConnectionError(f"{where}: another commit came first")
    if status in (408, 429) or status >= 500:
        return ConnectionError(f"{where} cannot be reached (the server answers {status})")
    return ValueError(f"{where}: the Hub refuses ({status}: {said})")


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
