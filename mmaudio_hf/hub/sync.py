"""Pushing checkpoints to the Hub while a run trains, in a thread that training never waits for."""

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

from mmaudio_hf.config import HubConfig
from mmaudio_hf.hub import check_token, ensure_repository, find_contents, read_contents
from mmaudio_hf.hub.runs import STATE_FILES, local_step, plan_push, push, remote_step, stage
from mmaudio_hf.schema import RunError

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
