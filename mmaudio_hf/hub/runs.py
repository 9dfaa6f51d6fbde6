"""Runs on the Hub: which files of a run are pushed, also while it trains, and how they become a run folder again.

    config.json, model.safetensors and others    of pretrained_model/
    adapter/                                     of runs with finetune.lora
    training_state/                              of the checkpoint, full or in shards, and config.yaml, metrics.jsonl,
                                                 skipped.jsonl and ema/ of the run

A push is one commit, so readers see one checkpoint and never a mixture of two. A pull writes nothing but these names.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

from mmaudio_hf.config import HubConfig, read_json, read_json_lines
from mmaudio_hf.files import readable, sha256_of
from mmaudio_hf.hub import (
    RepoContents,
    changed_files,
    check_token,
    commit_files,
    ensure_repository,
    fetch,
    fetch_json,
    find_contents,
    read_contents,
)
from mmaudio_hf.models.pretrained import CONFIG_FILE, PUBLISHED_FILES, WEIGHTS_FILE
from mmaudio_hf.schema import LOCK_FILE, RunError
from mmaudio_hf.weights import check_file

STATE = "training_state"
TENSOR_FILES = ("model", "optimizer", "ema", "window")
STATE_FILES = (f"{STATE}/state.json", *(f"{STATE}/{name}.safetensors" for name in TENSOR_FILES))
RUN_FILES = ("config.yaml", "metrics.jsonl", "skipped.jsonl")  # of the run folder
ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
SNAPSHOT = re.compile(rf"{STATE}/ema/sigma_[0-9.e-]{{1,20}}_step_\d{{9,12}}\.safetensors")
SHARD = re.compile(rf"{STATE}/({'|'.join(TENSOR_FILES)})\.rank_\d{{1,6}}_of_\d{{1,6}}\.safetensors")
SAMPLE = re.compile(r"samples/(reference/)?[^/]+\.wav")
_KNOWN = {*PUBLISHED_FILES, *ADAPTER_FILES, *STATE_FILES, *(f"{STATE}/{name}" for name in RUN_FILES)}


def is_known(name: str) -> bool:
    """Whether a file of a repository belongs to a run."""
    return name in _KNOWN or any(pattern.fullmatch(name) for pattern in (SNAPSHOT, SHARD))


# --- the step ------------------------------------------------------------------------------------------------------


def local_step(run_dir: Path) -> int | None:
    """Step of the newest checkpoint of a run; None without any. Folders of incomplete ones have a suffix."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step_*")]
    return max((int(name[5:]) for name in names if re.fullmatch(r"step_\d+", name)), default=None)


def _is_step(value: Any) -> bool:
    """Whether a value from the Hub can be a step: it becomes part of file names, which have at most 12 digits."""
    return type(value) is int and 0 <= value < 10**12


def remote_step(contents: RepoContents) -> int | None:
    """Step of what a repository holds; None when it holds no model.

    ValueError when it holds one that does not say its step, so that nobody's other model is replaced.
    """
    states = [fetch_json(contents, name) for name in ("weights.json", f"{STATE}/state.json")]
    steps = [state["step"] for state in states if _is_step(state.get("step"))]
    if not steps and (WEIGHTS_FILE in contents.files or CONFIG_FILE in contents.files):
        what = "holds a network that no run pushed (weights.json names no step)"
        raise ValueError(f"Hub repository {contents.repo} {what}: name another repository")
    return max(steps, default=None)


# --- push ----------------------------------------------------------------------------------------------------------


def stage(source: Path, run_dir: Path | None, what: Sequence[str], folder: Path) -> Path:
    """Put the files of a checkpoint into `folder` as the repository will have them; return it.

    They are hard links where the file system can, since checkpoints never change but old ones are removed; logs end
    with the checkpoint. `source` is a checkpoint folder of `run_dir`; without `run_dir`, a pretrained_model folder.
    ValueError when the model or the training state is not complete: a push of nothing must not look like a success.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if run_dir is None:
        _link_known(source, partial, "")
    elif "pretrained_model" in what:
        _link_known(source / "pretrained_model", partial, "")
        _link_known(source / "adapter", partial, "adapter/")
    needed = [CONFIG_FILE, WEIGHTS_FILE] if run_dir is None or "pretrained_model" in what else []
    if run_dir is not None and STATE in what:
        _link_known(source / STATE, partial, f"{STATE}/")
        _link_known(run_dir / "ema", partial, f"{STATE}/ema/")
        shutil.copyfile(run_dir / "config.yaml", partial / STATE / "config.yaml")
        # metrics.jsonl counts finished steps from 1, skipped.jsonl names steps from 0.
        for name, last in (("metrics.jsonl", source_step(source)), ("skipped.jsonl", source_step(source) - 1)):
            if (run_dir / name).is_file():
                lines = _log_lines(run_dir / name, last)
                (partial / STATE / name).write_text("".join(f"{line}\n" for line in lines))
        needed.append(f"{STATE}/state.json")
    if missing := [name for name in needed if not (partial / name).is_file()]:
        raise ValueError(f"{source} has no {', '.join(missing)}: nothing can be pushed")
    shutil.rmtree(folder, ignore_errors=True)
    return partial.rename(folder)


def _link_known(source: Path, target: Path, prefix: str) -> None:
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        if is_known(prefix + path.name) and path.is_file():
            staged_file = target / prefix / path.name
            staged_file.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.resolve(), staged_file)  # the cache of the Hub holds relative links, which end elsewhere
            except OSError:  # a file system without hard links, or another one
                shutil.copy2(path, staged_file)


def _log_lines(path: Path, last: float = math.inf) -> list[str]:
    """Lines of a log up to step `last`, as they were written; without damaged ones and one that is being written."""
    return [json.dumps(entry) for entry in read_json_lines(path)[0] if entry["step"] <= last]


@dataclass(frozen=True)
class Push:
    """What pushing a staged folder means."""

    contents: RepoContents
    step: int
    before: int | None  # step that the repository holds
    folder: Path
    files: dict[str, int]  # name -> bytes
    changed: list[str]
    removed: list[str]  # shards of another number of processes, in no state.json any more, and samples of other weights

    @property
    def outdated(self) -> bool:
        """Whether the repository is ahead."""
        return self.before is not None and self.before > self.step


def plan_push(folder: Path, repo: str, step: int, contents: RepoContents | None = None) -> Push:
    """Compare a staged folder with what `repo` holds (or with `contents`, when that is known)."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    contents = read_contents(repo) if contents is None else contents
    replaced = [SHARD] * (f"{STATE}/state.json" in files) + [SAMPLE] * (CONFIG_FILE in files)
    removed = [n for n in contents.files if n not in files and any(pattern.fullmatch(n) for pattern in replaced)]
    return Push(contents, step, remote_step(contents), folder, files, changed_files(folder, files, contents), removed)


def push(plan: Push) -> str:
    """Send what changed, in one commit; return the commit. The caller has checked that the repository is not ahead."""
    if not (plan.changed or plan.removed):
        return plan.contents.commit
    state = " and training state" if any(name.startswith(f"{STATE}/") for name in plan.changed) else ""
    return commit_files(plan.contents, plan.folder, plan.changed, f"Step {plan.step}: weights{state}", plan.removed)


def find_source(run: Path) -> tuple[Path, Path | None]:
    """Checkpoint (or pretrained_model folder) that `run` means, and the run folder it belongs to, if any.

    ValueError where there is nothing to push.
    """
    run = run.resolve()
    if (run / "checkpoints").is_dir() or (run / "last").exists():
        if not (run / "last").exists():
            raise ValueError(f"{run} has no checkpoint yet: nothing can be pushed")
        return (run / "last").resolve(), run
    if run.parent.name == "checkpoints" and (run / "pretrained_model").is_dir():
        return run, run.parent.parent
    for folder in (run, run / "pretrained_model"):
        if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            return folder, None
    raise ValueError(f"{run} is neither a run folder nor a checkpoint nor a pretrained_model folder")


def source_step(source: Path) -> int:
    """Step of a checkpoint or pretrained_model folder. ValueError when it does not say."""
    if re.fullmatch(r"step_\d+", source.name):
        return int(source.name[5:])
    try:
        return int(read_json(source / "weights.json")["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source / 'weights.json'} does not name the step of these weights ({error})") from error


@contextlib.contextmanager
def staged(run: Path, what: Sequence[str]) -> Iterator[tuple[Path, int]]:
    """The newest checkpoint of `run` (or a pretrained_model folder), staged beside it, and its step."""
    source, run_dir = find_source(run)
    if run_dir is None and STATE in what:
        raise ValueError(f"{run} has no training state: push a run folder, or leave out --training-state")
    with tempfile.TemporaryDirectory(prefix="hub_push_", dir=run_dir or source.parent) as scratch:
        folder = stage(source, run_dir, what, Path(scratch) / "files")
        state = folder / STATE
        try:
            for path in sorted(folder.rglob("*.safetensors")):
                check_file(path)
            checksums = read_json(state / "state.json").get("sha256") if STATE in what else {}
            if not isinstance(checksums, dict):
                raise ValueError(f"{state / 'state.json'} is damaged: it has no checksums")
            for name, checksum in checksums.items():
                if not (state / name).is_file() or sha256_of(state / name) != checksum:
                    raise ValueError(f"{state / name} is missing or damaged (its checksum differs): nothing is pushed")
            yield folder, source_step(source)
        except ValueError as error:  # it names what was staged
            raise ValueError(str(error).replace(str(folder), str(run))) from None


# --- pull ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pull:
    """What pulling a repository means."""

    contents: RepoContents
    names: list[str]  # files that are fetched
    others: list[str]  # files that do not belong to a run and are not fetched
    step: int | None  # an int with has_state
    has_state: bool

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.contents.files[name].size for name in self.names)


def plan_pull(repo: str, revision: str | None) -> Pull:
    """What `repo` offers. ValueError when it holds neither a model nor a training state, or unsafe file names."""
    contents = read_contents(repo, revision)
    names = sorted(name for name in contents.files if is_known(name))
    others = sorted(set(contents.files) - set(names) - {".gitattributes"})
    # The training state consists of the shards that its state.json lists, others are stale.
    listed = fetch_json(contents, f"{STATE}/state.json").get("sha256")
    state = {*STATE_FILES, *(f"{STATE}/{name}" for name in (listed if isinstance(listed, dict) else ()))}
    has_state = state <= set(names)
    names = [name for name in names if not SHARD.fullmatch(name) or name in state]
    if not has_state and not {CONFIG_FILE, WEIGHTS_FILE} <= set(names):
        raise ValueError(f"Hub repository {repo} holds no network: it has no {CONFIG_FILE} and {WEIGHTS_FILE}")
    step = fetch_json(contents, f"{STATE}/state.json" if has_state else "weights.json").get("step")
    if has_state and not _is_step(step):
        raise ValueError(f"Hub repository {repo}: {STATE}/state.json names no step")
    return Pull(contents, names, others, step, has_state)


def pull(plan: Pull, target: Path, log: Callable[[str], None]) -> None:
    """Make a run folder of a training state, or a pretrained_model folder of a model alone.

    Files arrive beside `target` (TARGET.hub) and are verified before anything is installed; after an interruption the
    same call resumes there. ValueError when `target` holds something else, or another run.
    """
    staging = target.with_name(f"{target.name}.hub")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        # A launch that fetches has locked its folder already; one that was killed may have left an incomplete run.
        is_run = any((target / name).exists() for name in ("checkpoints", "config.yaml", LOCK_FILE))
        if not plan.has_state or not is_run:
            raise ValueError(f"{target} exists and is not empty: choose another folder")
        have, step = local_step(target), plan.step
        if have is not None and step is not None and step <= have:
            raise ValueError(f"{target} has step {have} already, {plan.contents.repo} step {step}: nothing is pulled")
    log(f"{plan.contents.repo}: {readable(plan.size)} in {len(plan.names)} files, commit {plan.contents.commit[:12]}")
    fetch(plan.contents, plan.names, staging)
    files = target.with_name(f"{target.name}.hub.files")
    shutil.rmtree(files, ignore_errors=True)
    for name in plan.names:
        _move(staging / name, files / name)
    if plan.has_state:
        _install_run(files, target, plan.step)
    else:
        if target.exists():
            target.rmdir()
        files.rename(target)
    shutil.rmtree(files, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)


def _install_run(files: Path, run_dir: Path, step: int | None) -> None:
    """Move the files of a run into place, the checkpoint last: it is what makes the run resumable.

    ValueError unless what this folder has logged up to its checkpoint is how the pulled run began.
    """
    state, local, have = files / STATE, run_dir / "metrics.jsonl", local_step(run_dir)
    if have is not None and local.is_file() and (state / local.name).is_file():
        ours = _log_lines(local, have)
        if _log_lines(state / local.name)[: len(ours)] != ours:
            raise ValueError(f"{run_dir} holds another run (its metrics.jsonl differs): give it another name or folder")
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)  # after a kill, the next call knows the run by it
    for path in sorted((state / "ema").glob("*")):
        _move(path, run_dir / "ema" / path.name)
    for name in RUN_FILES:
        if (state / name).is_file():
            _move(state / name, run_dir / name)
    shutil.rmtree(state / "ema", ignore_errors=True)
    partial = run_dir / "checkpoints" / f"step_{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state.rename(partial / STATE)
    if (files / "adapter").is_dir():
        (files / "adapter").rename(partial / "adapter")
    files.rename(partial / "pretrained_model")
    partial.rename(partial.with_suffix(""))
    link = run_dir / "last.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("checkpoints") / f"step_{step}", target_is_directory=True)
    link.replace(run_dir / "last")


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)


def table(files: Sequence[tuple[str, int]], note: dict[str, str] | None = None) -> str:
    """Names and sizes as lines of text, with a word on each."""
    width = max((len(name) for name, _ in files), default=0)
    lines = [f"{name:{width}}  {readable(size):>10}  {(note or {}).get(name, '')}".rstrip() for name, size in files]
    return "\n".join(lines)


# --- pushes beside training ---------------------------------------------------------------------------------------

MIN_PAUSE = 1.0  # s before a failed push is retried, doubled with each failure
MAX_PAUSE = 300.0
WAIT_LOG_EVERY = 60.0  # s between two messages about waiting at the end

Log = Callable[[str], None]
WriteCard = Callable[[Path, Path, str], None]


def check_repository(hub: HubConfig, run_dir: Path, resumes_from_hub: bool, warn: Log, create: bool = True) -> None:
    """Check before training that pushes will be accepted: token, repository, and what it holds.

    ValueError with the way out. A Hub that cannot be reached is only a warning: pushes are retried all along. With
    `create` the repository is created unless it exists; without, nothing is changed, and its absence is no error.
    """
    repo = hub.repo_id
    try:
        if create:
            ensure_repository(repo, hub.private)
        else:
            check_token(repo)
        contents = read_contents(repo) if create else find_contents(repo)
        remote, local = None if contents is None else remote_step(contents), local_step(run_dir)
    except ConnectionError as error:
        effect = "nothing is pushed during this run" if is_offline_mode() else "pushes are retried all along"
        warn(f"{error}: training begins, and {effect}")
        return
    if contents is None or remote is None:
        return
    if local is None and not resumes_from_hub:
        remedy = f"resume from it with resume=hub://{repo}, or name another hub.repo_id"
        if not set(STATE_FILES) <= set(contents.files):
            remedy = f"it has no training state: finetune.init_from={repo} starts from its weights, or name another"
        raise ValueError(f"Hub repository {repo} holds step {remote}, {run_dir} would begin at step 0: {remedy}")
    if local is not None and remote > local:
        warn(f"Hub repository {repo} holds step {remote}, {run_dir} step {local}: nothing is pushed until it is ahead")


class CheckpointSync:
    """Pushes checkpoints of a run to `hub.repo_id` in a thread, the newest one first; use it in `with`.

    `announce` takes a finished checkpoint and returns at once: its files are linked into RUN/hub/, so that they outlive
    the removal of old checkpoints. A push that fails is reported once and retried, with pauses that double up to five
    minutes, until it succeeds or a newer checkpoint replaces it. What is pushed is never older than what is there.
    Leaving `with` waits for the last checkpoint, at most `hub.wait` seconds, and not at all when only the user can
    correct what is wrong (a token without access). `write_card` may add a README.md to the files of a push (arguments:
    the run folder, the folder of the files, and the parent commit of the push, so that no edit is lost); a card that
    fails does not stop the push.
    """

    def __init__(self, hub: HubConfig, run_dir: Path, log: Log, write_card: WriteCard | None = None) -> None:
        self.hub, self.run_dir, self.log, self.write_card = hub, run_dir, log, write_card
        self.pushed: int | None = None  # step of the last push that is finished
        self.failures = 0  # in a row
        self._staged_step: int | None = None  # of the last checkpoint
        self._stage_count = 0
        self._pending: Path | None = None  # staged and not being pushed
        self._ending = False
        self._last_warning = ""
        self._ended = threading.Event()  # after Ctrl-C in join() a running thread looks ended (bpo-45274)
        self._changed = threading.Condition()
        # A daemon: a run that ends, or a second Ctrl-C, does not wait for a network.
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)

    def __enter__(self) -> "CheckpointSync":
        shutil.rmtree(self.run_dir / "hub", ignore_errors=True)  # of a run that was killed
        # huggingface_hub's bars and notes on retries would break the progress bar of the steps.
        self._restore = (are_progress_bars_disabled(), logging.get_verbosity())
        disable_progress_bars()
        logging.set_verbosity_error()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, RunError):
            self._finish()
        were_disabled, verbosity = self._restore
        if not were_disabled:
            enable_progress_bars()
        logging.set_verbosity(verbosity)
        shutil.rmtree(self.run_dir / "hub", ignore_errors=True)

    # --- in the thread that writes checkpoints ----------------------------------------------------------------------

    def announce(self, checkpoint: Path) -> None:
        """Stage a finished checkpoint, unless it is less than `hub.every` steps after the last staged one.

        One that was staged and is saved once more, with scores it did not have, is staged again. Nothing happens in
        offline mode.
        """
        step, last = int(checkpoint.name.removeprefix("step_")), self._staged_step
        if (last is None or step == last or step - last >= self.hub.every) and not is_offline_mode():
            self._stage(checkpoint, step)

    def _stage(self, checkpoint: Path, step: int) -> None:
        self._stage_count += 1
        target = self.run_dir / "hub" / f"step_{step}_{self._stage_count}"  # this step may be being pushed
        try:
            folder = stage(checkpoint, self.run_dir, self.hub.push, target)
        except (OSError, ValueError) as error:
            self._warn(f"step {step} is not pushed: its files cannot be staged ({error})")
            return
        with self._changed:
            self._staged_step, replaced, self._pending = step, self._pending, folder
            self._changed.notify_all()
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)

    # --- in the thread that pushes ----------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._ending)
                folder, self._pending = self._pending, None
            if folder is None:
                break
            try:
                self._push(folder)
            except Exception as error:  # training continues whatever it is
                self._failed(folder, error)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        self._ended.set()

    def _push(self, folder: Path) -> None:
        step, repo = int(folder.name.split("_")[1]), self.hub.repo_id
        if not any(path.is_file() for path in folder.rglob("*")):
            self._warn(f"step {step} is not pushed: somebody removed its files from {folder.parent}")
            self._staged_step = None  # the next checkpoint is due, or this one at the end
            return
        if self.failures:
            ensure_repository(repo, self.hub.private)  # the run may have begun without network
        contents = read_contents(repo)
        try:
            if self.write_card is not None:
                self.write_card(self.run_dir, folder, contents.commit)
        except ConnectionError:
            raise  # the push is retried, with its card
        except Exception as error:
            (folder / "README.md").unlink(missing_ok=True)
            self._warn(f"the card of {repo} cannot be written ({type(error).__name__}: {error})")
        plan = plan_push(folder, repo, step, contents)
        if plan.outdated:
            self._warn(f"{repo} holds step {plan.before}, which is newer than step {step}: it is not pushed")
        else:
            push(plan)
            again = f", after {self.failures} failed attempts" if self.failures else ""
            self.log(f"step {step} is on the Hub: {repo}{again}")
        self.pushed, self.failures = step, 0

    def _failed(self, folder: Path, error: Exception) -> None:
        known = isinstance(error, (OSError, ValueError))
        self._warn(f"pushing failed: {error if known else f'{type(error).__name__}: {error}'}; it is retried")
        self.failures += 1
        with self._changed:
            newer, ending = self._pending is not None, self._ending
            if ending and not newer and isinstance(error, ValueError):
                return  # a token or repository that only the user can correct: waiting does not help
            if not newer:
                self._pending = folder
            # A new checkpoint does not cut it short: that does not end an outage. The end of the run does.
            pause = min(MIN_PAUSE * 2 ** (self.failures - 1), MAX_PAUSE)
            self._changed.wait_for(lambda: self._ending != ending, timeout=pause)
        if newer:
            shutil.rmtree(folder, ignore_errors=True)

    def _warn(self, message: str) -> None:
        """Log what went wrong, once."""
        if message != self._last_warning:
            self.log(f"warning: {message}")
        self._last_warning = message

    # --- the end ----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Push the newest checkpoint and wait for it, as long as the recipe allows."""
        repo, last = self.hub.repo_id, self.run_dir / "last"
        step = int(last.resolve().name.removeprefix("step_")) if last.exists() else None
        if step is not None and (self._staged_step is None or step > self._staged_step) and not is_offline_mode():
            self._stage(last.resolve(), step)
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        later = f"`mmaudio-hf push {self.run_dir} {repo}`"
        later += " with --training-state" if "training_state" in self.hub.push else ""
        start = logged = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
            # SIGTERM, of a launcher or a scheduler, ends the wait as Ctrl-C does.
            stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
            self._ended.wait(min(2.0, self.hub.wait))
            while not self._ended.is_set() and (left := start + self.hub.wait - time.monotonic()) > 0:
                if logged == start or time.monotonic() - logged > WAIT_LOG_EVERY:
                    message = f"step {step} is being pushed to {repo}, Ctrl-C leaves it to {later}"
                    self.log(f"{message}; waiting for up to {left:.0f} s")
                    logged = time.monotonic()
                self._ended.wait(min(1.0, left))
        if step is not None and not (self._ended.is_set() and self.pushed == step):
            self.log(f"warning: step {step} is not on the Hub: {later} pushes it later")
