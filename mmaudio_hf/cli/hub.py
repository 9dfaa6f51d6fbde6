"""Commands that exchange runs with the Hub, and what connects training with it."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaudio_hf.config import HubConfig, Recipe, load_recipe, micro_batch_size
from mmaudio_hf.schema import HUB_PREFIX, LOCK_FILE, PROCESS_TIMEOUT, RunError, split_hub_id

if TYPE_CHECKING:  # these load torch, which --help does without
    from accelerate import PartialState

    from mmaudio_hf.hub import RepoContents
    from mmaudio_hf.training.resume import RunLock


Add = Callable[..., argparse.ArgumentParser]  # add(name, function, help, recipe=False): the parser of one command


def adder(commands: Any) -> Add:
    """What adds a command to those of a parser (what its `add_subparsers` returned)."""

    def add(
        name: str, function: Callable[[argparse.Namespace], int | None] | None, help_text: str, recipe: bool = False
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(command=function)
        if recipe:
            command.add_argument("recipe", metavar="RECIPE", help="recipe file, as recipes/example.yaml")
            command.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
        return command

    return add


def add_commands(add: Add) -> None:
    """`push` and `pull`."""
    push = add("push", _push, "push the newest checkpoint of a run to the Hub, in one commit")
    push.add_argument("run", type=Path, metavar="RUN", help="run folder, checkpoint or pretrained_model folder")
    push.add_argument("repo", nargs="?", metavar="REPO", help="owner/name (default: hub.repo_id of the run's recipe)")
    push.add_argument("--training-state", action="store_true", help="also push what resuming needs")
    push.add_argument("--samples", action="store_true", help="also push audio samples, true audio and their captions")
    push.add_argument("--yes", action="store_true", help="send them without asking, where a terminal could answer")
    push.add_argument("--public", action="store_true", help="a repository that is created is public (default: private)")
    push.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")

    pull = add("pull", _pull, "pull a run or a model from the Hub")
    pull.add_argument("repo", metavar="REPO[@REVISION]", help="owner/name, with a branch, tag or commit after @")
    pull.add_argument("--to", type=Path, metavar="DIR", help="new folder, or run folder (default: output/NAME)")
    pull.add_argument("--dry-run", action="store_true", help="show what would be fetched, and fetch nothing")


def log(message: str) -> None:
    """Print to stderr: stdout is for results."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a warning to stderr."""
    log(f"warning: {message}")


def repository_of(text: str) -> str:
    """`owner/name` to push to; ValueError for anything else."""
    repo, revision = split_hub_id(text)
    if revision:
        raise ValueError(f"{text}: pushes go to the main branch, leave out @{revision}")
    return repo


def _push(options: argparse.Namespace) -> None:
    hub = _hub_settings(options.run)
    if not (options.repo or hub.repo_id):
        raise ValueError(f"to which repository? `mmaudio-hf push {options.run} owner/name`")
    repo = repository_of(options.repo or hub.repo_id)
    from mmaudio_hf.hub import RepoContents, ensure_repository, read_contents, readable
    from mmaudio_hf.hub.cards import add_card, run_samples
    from mmaudio_hf.hub.runs import STATE, find_source, plan_push, push, staged, table

    what = list(dict.fromkeys([*hub.push, *([STATE] if options.training_state else [])]))
    with staged(options.run, what) as (folder, step):
        run_dir, samples = find_source(options.run)[1], options.samples or hub.samples
        own = run_dir is not None and (folder / "config.json").is_file() and run_samples(run_dir, folder)
        if own and not samples:
            print("samples of the run and their captions are not pushed: --samples or hub.samples=true pushes them")
        elif own and not (options.yes or options.dry_run):
            _ask(f"send {len(own)} items of your data to {repo}, generated and true audio with captions?")
        if options.dry_run:
            contents = find_for_push(repo, dry_run=True) or RepoContents(repo, "", {})
        else:
            ensure_repository(repo, private=hub.private and not options.public)
            contents = read_contents(repo)
        add_card(folder, run_dir, repo, contents.commit or None, samples)
        plan = plan_push(folder, repo, step, contents)
        notes = {name: "to send" if name in plan.changed else "already there" for name in plan.files}
        print(table(list(plan.files.items()), notes))
        if plan.outdated:
            raise ValueError(
                f"{repo} holds step {plan.before}, newer than step {step} of {options.run}: nothing is sent"
            )
        if plan.removed:
            print(f"of an earlier push, and removed: {', '.join(plan.removed)}")
        size = readable(sum(plan.files[name] for name in plan.changed))
        print(f"step {step} to {repo}: {size} in {len(plan.changed)} files{', dry run' if options.dry_run else ''}")
        if not options.dry_run:
            print(f"{contents.url}: commit {push(plan)}")


def _ask(question: str) -> None:
    """ValueError unless whoever sits at the terminal says yes; where there is none, the switch has said it."""
    if sys.stdin.isatty() and input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("nothing is sent: push without --samples, and with hub.samples=false in the recipe")


def find_for_push(repo: str, dry_run: bool, kind: str = "model") -> "RepoContents | None":
    """What a repository holds. None, with a message: it does not exist, or the Hub cannot be reached by a dry run."""
    from mmaudio_hf.hub import find_contents

    try:
        contents = find_contents(repo, kind=kind)
    except ConnectionError as error:
        if not dry_run:
            raise
        warn(f"{error}: the files are shown as for an empty repository")
        return None
    if contents is None:
        print(f"{repo} does not exist, or is hidden from this token: a push creates it")
    return contents


def _hub_settings(run: Path) -> HubConfig:
    """Those of the recipe of a run, or the defaults."""
    from mmaudio_hf.hub.runs import find_source

    _, run_dir = find_source(run)
    if run_dir is not None and (run_dir / "config.yaml").is_file():
        return load_recipe(run_dir / "config.yaml").hub
    return HubConfig()


def _pull(options: argparse.Namespace) -> None:
    repo, revision = split_hub_id(options.repo.removeprefix(HUB_PREFIX))
    from mmaudio_hf.hub import readable
    from mmaudio_hf.hub.runs import plan_pull, pull, table
    from mmaudio_hf.training.resume import RunLock

    target = options.to or Path("output") / repo.partition("/")[2]
    plan = plan_pull(repo, revision)
    print(table([(name, plan.contents.files[name].size) for name in plan.names]))
    if plan.others:
        print(f"left on the Hub: {len(plan.others)} files that do not belong to a run")
    kind = f"run at step {plan.step}" if plan.has_state else "network"
    print(f"{kind}, {readable(plan.size)} in {len(plan.names)} files to {target}{', dry run' * options.dry_run}")
    if not options.dry_run:
        with RunLock(target, warn) as lock:
            if (target / LOCK_FILE).exists():  # without the file nobody has begun to train here
                lock.acquire()
            pull(plan, target, log)
        print(f"{target}: {kind} of {plan.contents.repo}@{plan.contents.commit[:12]}")


# --- training ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hub_stores(recipe: Recipe, splits: Sequence[str] = ("train", "validation", "test")) -> Iterator[None]:
    """Within it the stores of these splits that are on the Hub can be opened; see `hub.stores.connect`."""
    data = recipe.data
    if not (sources := data.on_hub(splits)):
        yield
        return
    from mmaudio_hf.data.remote import rows_needed
    from mmaudio_hf.hub.stores import connect

    processes, passes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), recipe.training.accumulation_steps
    size = micro_batch_size(recipe.training, int(os.environ.get("WORLD_SIZE", "1")), recipe.model.latent_length)
    least = rows_needed(size, max(data.prefetch_batches, passes), processes)
    settings: dict[str, Any] = {"connections": data.connections, "patience": data.connection_wait, "least": least}
    with connect(sources, data.cache_dir, data.cache_gb * 1e9, processes=processes, log=warn, **settings):
        yield


def resolve_resume(recipe: Recipe) -> Recipe:
    """The recipe with `resume` on the Hub replaced by the run folder, into which `hub_session` has fetched it."""
    return replace(recipe, resume="auto") if recipe.resume.startswith(HUB_PREFIX) else recipe


@contextlib.contextmanager
def hub_session(recipe: Recipe, lock: "RunLock") -> Iterator[Callable[[Path], None]]:
    """Fetch the run that `resume` names, check `hub`, and push while the body trains.

    Yields the function that the loop calls with each checkpoint. Every process of a launch enters; the first one does
    the work, with `lock`, which it acquires before anything else. ValueError when another launch has it, or the run,
    the token or the repository are not usable.
    """
    if not (recipe.resume.startswith(HUB_PREFIX) or recipe.hub.repo_id):
        yield lambda folder: None
        return
    import torch
    from accelerate import PartialState

    process = PartialState(cpu=not torch.accelerator.is_available(), timeout=PROCESS_TIMEOUT)
    _prepare(recipe, process, lock)
    if not (process.is_main_process and recipe.hub.repo_id):
        failure = None
        try:
            yield lambda folder: None
        except RunError as error:
            failure = error
        if not process.is_main_process and recipe.hub.repo_id:
            # A launcher stops all processes once one has ended with a code: the first one is still to push.
            lock.wait_for_release(recipe.hub.wait + 60)
        if failure is not None:
            raise failure
        return
    from tqdm import tqdm

    from mmaudio_hf.hub.cards import add_card
    from mmaudio_hf.hub.sync import CheckpointSync

    log = lambda message: tqdm.write(message, file=sys.stderr)  # noqa: E731

    def card(run_dir: Path, folder: Path, commit: str) -> None:
        add_card(folder, run_dir, recipe.hub.repo_id, commit, recipe.hub.samples)

    with CheckpointSync(recipe.hub, recipe.run_dir, log, card) as sync:
        yield sync.announce


def _prepare(recipe: Recipe, process: "PartialState", lock: "RunLock") -> None:
    """Check and fetch in the first process; if that fails it raises, and the others exit without a message."""
    from accelerate.utils import broadcast_object_list

    from mmaudio_hf.hub.sync import check_repository
    from mmaudio_hf.training.distributed import check_visible_everywhere

    failure, code = None, [0]
    if process.is_main_process:
        try:
            recipe.run_dir.mkdir(parents=True, exist_ok=True)  # a folder that does not exist cannot be locked
            lock.acquire()
            if recipe.resume.startswith(HUB_PREFIX):
                fetch_run(recipe)
            if recipe.hub.repo_id:
                check_repository(recipe.hub, recipe.run_dir, False, warn)
        except (ValueError, OSError) as error:
            failure, code = error, [2 if isinstance(error, ValueError) else 1]
    if process.num_processes > 1:
        broadcast_object_list(code)  # the others wait here
    if failure is not None:
        raise failure
    if code[0]:
        raise SystemExit(code[0])
    if recipe.resume.startswith(HUB_PREFIX) and process.num_processes > 1:
        check_visible_everywhere(recipe.run_dir / "last" / "training_state" / "state.json")


def fetch_run(recipe: Recipe) -> None:
    """Fetch the run that `resume` names into the run folder, unless that is at the same step or further.

    ValueError when there is nothing to resume from, or the folder holds another run; ConnectionError when the Hub
    cannot be reached and the folder has no checkpoint.
    """
    from mmaudio_hf.hub import find_contents
    from mmaudio_hf.hub.runs import STATE_FILES, local_step, plan_pull, pull

    repo, revision = split_hub_id(recipe.resume.removeprefix(HUB_PREFIX))
    have = local_step(recipe.run_dir)
    try:
        contents = find_contents(repo, revision)
        has_no_state = contents is None or not set(STATE_FILES) <= set(contents.files)
        if has_no_state and have is None and recipe.hub.repo_id == repo and revision is None:
            log(f"{repo} holds no training state yet: {recipe.run_dir} begins at step 0")
            return
        plan = plan_pull(repo, revision)
    except ConnectionError as error:
        if have is None:
            raise
        warn(f"{error}: {recipe.run_dir} resumes from its own step {have}")
        return
    if plan.step is None or not plan.has_state:
        raise ValueError(f"Hub repository {repo} has no training state, only a network: name it in finetune.init_from")
    if have is not None and have >= plan.step:
        log(f"{recipe.run_dir} has step {have}, {recipe.resume} step {plan.step}: it resumes from its own step {have}")
        return
    pull(plan, recipe.run_dir, log)
    log(f"{recipe.run_dir} resumes from step {plan.step} of {repo}@{plan.contents.commit[:12]}")
