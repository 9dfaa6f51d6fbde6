"""Pushing checkpoints to the Hub while a run trains, beside it and never in its way."""

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

from mmaudio_hf.config import HubConfig
from mmaudio_hf.hub.repository import check_token, ensure_repository, find_contents, read_contents
from mmaudio_hf.hub.runs import STATE_FILES, local_step, plan_push, push, remote_step, stage
from mmaudio_hf.schema import RunError

PAUSE = 1.0  # s before a failed push is tried again, doubled for each further time
LONGEST_PAUSE = 300.0
TOLD_EVERY = 60.0  # s between two lines about waiting at the end

Say = Callable[[str], None]
WriteCard = Callable[[Path, Path, str], None]


def check_repository(hub: HubConfig, run_dir: Path, resumes_from_hub: bool, warn: Say, make: bool = True) -> None:
    """Look before training whether pushes will be taken: token, repository, and what it holds.

    ValueError saying what to do. A Hub that cannot be reached is a warning alone: pushing is tried all along. With
    `make` the repository is made unless it exists; without, nothing is changed there, and its absence is no fault.
    """
    repo = hub.repo_id
    try:
        if make:
            ensure_repository(repo, hub.private)
        else:
            check_token(repo)
        contents = read_contents(repo) if make else find_contents(repo)
        there, here = None if contents is None else remote_step(contents), local_step(run_dir)
    except ConnectionError as error:
        nothing = "nothing is pushed during this run" if is_offline_mode() else "pushing is tried all along"
        warn(f"{error}: training begins, and {nothing}")
        return
    if there is not None and here is None and not resumes_from_hub:
        way = f"go on from there with resume=hub://{repo}"
        if not set(STATE_FILES) <= set(contents.files):
            way = f"it has no training state to go on from, finetune.init_from={repo} starts from its weights"
        raise ValueError(
            f"Hub repository {repo} holds step {there}, and {run_dir} would begin at step 0: {way}, or name another"
            " hub.repo_id"
        )
    if there is not None and here is not None and there > here:
        warn(f"Hub repository {repo} holds step {there}, {run_dir} step {here}: nothing is pushed until it is ahead")


@contextlib.contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, of a launcher or a scheduler, ends the body as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class CheckpointSync:
    """Pushes checkpoints of a run to `hub.repo_id` in a thread, the newest one first; use it in `with`.

    `announce` takes a finished checkpoint and returns at once: its files are linked into RUN/hub/, so that they outlive
    the removal of old checkpoints. A push that fails is told once and tried again, with pauses that double up to five
    minutes, until it succeeds or a newer checkpoint takes its place. What is pushed is never older than what is there.
    Leaving `with` waits for the last checkpoint, at most `hub.wait` seconds. `write_card` may add a README.md to the
    files of a push (it is given the run folder, theirs, and the commit that the push follows, so that no edit is lost);
    a card that fails does not stop the push.
    """

    def __init__(self, hub: HubConfig, run_dir: Path, say: Say, write_card: WriteCard | None = None) -> None:
        self.hub, self.run_dir, self.say, self.write_card = hub, run_dir, say, write_card
        self.pushed: int | None = None  # step of the last push that is done with
        self.failures = 0  # in a row
        self._taken: int | None = None  # step of the last checkpoint that was staged
        self._staged = 0  # how many were
        self._waiting: Path | None = None  # staged and not being pushed
        self._ending = False
        self._told = ""
        self._ended = threading.Event()  # a join that Ctrl-C interrupts leaves a thread that looks ended (bpo-45274)
        self._changed = threading.Condition()
        # A daemon: a run that ends, or a second Ctrl-C, does not wait for a network.
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)

    def __enter__(self) -> "CheckpointSync":
        shutil.rmtree(self.run_dir / "hub", ignore_errors=True)  # of a run that was killed
        # Its bars and notes on retries would break up the bar of the steps; what matters is said here.
        self._restore = (are_progress_bars_disabled(), logging.get_verbosity())
        disable_progress_bars()
        logging.set_verbosity_error()
        self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None or issubclass(kind, RunError):
            self._finish()
        were_disabled, verbosity = self._restore
        if not were_disabled:
            enable_progress_bars()
        logging.set_verbosity(verbosity)
        shutil.rmtree(self.run_dir / "hub", ignore_errors=True)

    # --- in the thread that writes checkpoints ----------------------------------------------------------------------

    def announce(self, checkpoint: Path) -> None:
        """Take a finished checkpoint, unless it comes less than `hub.every` steps after the last one taken.

        One that was taken and is saved once more, with the scores it had not, is taken again. In offline mode nothing
        is.
        """
        step = int(checkpoint.name.removeprefix("step_"))
        due = self._taken is None or step == self._taken or step - self._taken >= self.hub.every
        if due and not is_offline_mode():
            self._take(checkpoint, step)

    def _take(self, checkpoint: Path, step: int) -> None:
        self._staged += 1
        place = self.run_dir / "hub" / f"step_{step}_{self._staged}"  # the step may be on its way already
        try:
            folder = stage(checkpoint, self.run_dir, self.hub.push, place)
        except (OSError, ValueError) as error:
            self._tell(f"step {step} is not pushed: its files cannot be held ({error})")
            return
        with self._changed:
            self._taken, passed_over, self._waiting = step, self._waiting, folder
            self._changed.notify_all()
        if passed_over is not None:
            shutil.rmtree(passed_over, ignore_errors=True)

    # --- in the thread that pushes ----------------------------------------------------------------------------------

    def _work(self) -> None:
        while (folder := self._next()) is not None:
            try:
                self._push(folder)
            except Exception as error:  # whatever it is, training goes on
                self._failed(folder, error)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        self._ended.set()

    def _next(self) -> Path | None:
        """The newest checkpoint that waits; None when there is none and the run has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._ending)
            folder, self._waiting = self._waiting, None
            return folder

    def _push(self, folder: Path) -> None:
        step, repo = int(folder.name.split("_")[1]), self.hub.repo_id
        if not any(path.is_file() for path in folder.rglob("*")):
            self._tell(f"step {step} is not pushed: somebody removed its files from {folder.parent}")
            self._taken = None  # the next checkpoint is due, or this one at the end
            return
        if self.failures:
            ensure_repository(repo, self.hub.private)  # the run may have begun without network
        contents = read_contents(repo)
        if self.write_card is not None:
            self._add_card(folder, contents.commit)
        plan = plan_push(folder, repo, step, contents)
        if plan.outdated:
            self._tell(f"{repo} holds step {plan.before}, which is newer than step {step}: it is not pushed")
        else:
            push(plan)
            again = f", after {self.failures} failed attempts" if self.failures else ""
            self.say(f"step {step} is on the Hub: {repo}{again}")
        self.pushed, self.failures = step, 0

    def _add_card(self, folder: Path, commit: str) -> None:
        try:
            self.write_card(self.run_dir, folder, commit)
        except ConnectionError:
            raise  # so that the push is tried again, with its card
        except Exception as error:
            (folder / "README.md").unlink(missing_ok=True)
            self._tell(f"the card of {self.hub.repo_id} cannot be written ({type(error).__name__}: {error})")

    def _failed(self, folder: Path, error: Exception) -> None:
        known = isinstance(error, (OSError, ValueError))
        self._tell(f"pushing failed: {error if known else f'{type(error).__name__}: {error}'}; it is tried again")
        self.failures += 1
        with self._changed:
            newer = self._waiting is not None
            if not newer:
                self._waiting = folder
            ending = self._ending
            # Not cut short by checkpoints: an outage is not over because the run goes on. The end is a reason to try.
            pause = min(PAUSE * 2 ** (self.failures - 1), LONGEST_PAUSE)
            self._changed.wait_for(lambda: self._ending != ending, timeout=pause)
        if newer:
            shutil.rmtree(folder, ignore_errors=True)

    def _tell(self, message: str) -> None:
        """Say what went wrong, once."""
        if message != self._told:
            self.say(f"warning: {message}")
        self._told = message

    # --- the end ----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Push the newest checkpoint and wait for it, as long as the recipe allows."""
        repo, last = self.hub.repo_id, self.run_dir / "last"
        step = int(last.resolve().name.removeprefix("step_")) if last.exists() else None
        if step is not None and (self._taken is None or step > self._taken) and not is_offline_mode():
            self._take(last.resolve(), step)
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        later = f"`mmaudio-hf push {self.run_dir} {repo}`" + (
            " with --training-state" if "training_state" in self.hub.push else ""
        )
        with contextlib.suppress(KeyboardInterrupt), _terminated_as_by_ctrl_c():
            self._wait(self.hub.wait, f"step {step} is being pushed to {repo}, Ctrl-C leaves it to {later}")
        if step is not None and not (self._ended.is_set() and self.pushed == step):
            self.say(f"warning: step {step} is not on the Hub: {later} pushes it later")

    def _wait(self, limit: float, message: str) -> None:
        began = told = time.monotonic()
        self._ended.wait(min(2.0, limit))
        while not self._ended.is_set() and (left := began + limit - time.monotonic()) > 0:
            if told == began or time.monotonic() - told > TOLD_EVERY:
                self.say(f"{message}; waiting for up to {left:.0f} s")
                told = time.monotonic()
            self._ended.wait(min(1.0, left))
