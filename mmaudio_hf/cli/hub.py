"""Commands for runs on the Hub, released weights and checkpoints of the reference; what connects training with it."""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaudio_hf.config import HubConfig, Recipe, load_recipe, samples_per_step
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
    from mmaudio_hf.hub.runs import STATE, find_source, plan_push, push, staged, table

    run_dir = find_source(options.run)[1]
    has_recipe = run_dir is not None and (run_dir / "config.yaml").is_file()
    hub = load_recipe(run_dir / "config.yaml").hub if run_dir and has_recipe else HubConfig()
    if not (options.repo or hub.repo_id):
        raise ValueError(f"to which repository? `mmaudio-hf push {options.run} owner/name`")
    repo = repository_of(options.repo or hub.repo_id)
    from mmaudio_hf.files import readable
    from mmaudio_hf.hub import RepoContents, ensure_repository, read_contents
    from mmaudio_hf.hub.cards import add_card, run_samples

    what = list(dict.fromkeys([*hub.push, *([STATE] if options.training_state else [])]))
    with staged(options.run, what) as (folder, step):
        samples = options.samples or hub.samples
        own = run_dir is not None and (folder / "config.json").is_file() and run_samples(run_dir, folder)
        if own and not samples:
            print("samples of the run and their captions are not pushed: --samples or hub.samples=true pushes them")
        elif own and not (options.yes or options.dry_run) and sys.stdin.isatty():
            question = f"send {len(own)} items of your data to {repo}, generated and true audio with captions? [y/N] "
            if input(question).strip().lower() not in ("y", "yes"):
                raise ValueError("nothing is sent: push without --samples, and with hub.samples=false in the recipe")
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
            raise ValueError(f"{repo} holds step {plan.before}, newer than {step} of {options.run}: nothing is sent")
        if plan.removed:
            print(f"of an earlier push, and removed: {', '.join(plan.removed)}")
        size = readable(sum(plan.files[name] for name in plan.changed))
        print(f"step {step} to {repo}: {size} in {len(plan.changed)} files{', dry run' if options.dry_run else ''}")
        if not options.dry_run:
            print(f"{contents.url}: commit {push(plan)}")


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


def _pull(options: argparse.Namespace) -> None:
    repo, revision = split_hub_id(options.repo.removeprefix(HUB_PREFIX))
    from mmaudio_hf.files import readable
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


# --- released weights, and checkpoints of the reference implementation ------------------------------------------------


def add_weight_commands(add: Add) -> None:
    """`weights` with its commands, `import` and `export`."""
    parser = add("weights", None, "list, download, verify and convert released weights")
    add_one = adder(parser.add_subparsers(required=True, metavar="COMMAND"))
    listing = add_one("list", _weights_list, "what is released, under which licence, and what of it is here")
    download = add_one("download", _weights_download, "fetch released files; licences and sizes are shown first")
    download.add_argument("names", metavar="NAME", nargs="*", help="names of `weights list`, or all")
    download.add_argument("--for", dest="for_recipe", metavar="RECIPE", help="everything that a recipe reads")
    download.add_argument("--force", action="store_true", help="fetch again what is already there")
    verify = add_one("verify", _weights_verify, "compare files with their published checksums, or read them")
    verify.add_argument("names", metavar="NAME", nargs="*", help="default: whatever is there")
    av_bench = add_one("av-bench", _weights_av_bench, "make av-benchmark's environment, fetch its weights and try it")
    av_bench.add_argument("--env", type=Path, default=Path("av-bench-env"), help="its folder (default: %(default)s)")
    for command in (listing, download, verify, av_bench):
        command.add_argument("--dir", type=Path, help="folder of weights (default: the recipe's, or ext_weights)")
    convert = add_one("convert", _weights_convert, "make a pretrained_model folder of a flow network")
    convert.add_argument("file", metavar="FILE", type=Path, help="released file")
    convert.add_argument("out", metavar="OUT", type=Path, help="new folder; for other networks NAME.safetensors")
    convert.add_argument("--variant", help="network that it must be (default: recognised)")
    importing = add("import", _import, "convert a checkpoint of the reference implementation to a run folder")
    importing.add_argument("file", metavar="FILE", type=Path, help="training checkpoint or flow network, .pth")
    importing.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    importing.add_argument("--recipe", required=True, help="recipe to continue with")
    importing.add_argument("--run", required=True, type=Path, help="new run folder")
    importing.add_argument("--snapshots", type=Path, help="folder of its EMA snapshots, 0.5000.pt and so on")
    exporting = add("export", _export, "write a run as files of the reference implementation")
    exporting.add_argument("run", metavar="RUN", type=Path, help="run folder, or pretrained_model folder")
    exporting.add_argument("--out", required=True, type=Path, help="folder for the files")
    exporting.add_argument(
        "--safetensors", action="store_true", help="one file of bf16 weights, as for ComfyUI, and one of the adapter"
    )
    exporting.add_argument("--step", type=int, help="checkpoint to take (default: the newest)")


def _weights_dir(options: argparse.Namespace, recipe: Recipe | None = None) -> Path:
    return options.dir or Path(recipe.encoders.weights_dir if recipe else "ext_weights")


def _weights_list(options: argparse.Namespace) -> None:
    from mmaudio_hf import weights

    print(weights.table(_weights_dir(options)))


def _weights_download(options: argparse.Namespace) -> None:
    from mmaudio_hf import weights

    recipe = load_recipe(options.for_recipe) if options.for_recipe else None
    chosen = weights.find(options.names)
    if recipe is not None:
        chosen += [weight for weight in weights.needed(recipe) if weight not in chosen]
        if recipe.encoders.kind == "toy":
            print(f"{options.for_recipe} has toy encoders, which need no released weights")
    elif not chosen:
        names = " ".join(weight.path for weight in weights.CATALOGUE)
        raise ValueError(f"say what to download: `--for RECIPE`, `all`, or some of {names}")
    weights.download(chosen, _weights_dir(options, recipe), weight_checks(), options.force)


def _weights_verify(options: argparse.Namespace) -> int:
    from mmaudio_hf import weights

    folder, bad = _weights_dir(options), 0
    chosen = weights.find(options.names) or [w for w in weights.CATALOGUE if weights.locate(w, folder)]
    for weight in chosen:
        problem = weights.problem_of(weight, folder, weight_checks())
        bad += problem is not None
        print(problem or f"{weight.path}: ok", flush=True)
    if not chosen:
        print(f"{folder} holds no released weights: `mmaudio-hf weights list` shows what there is")
    return 1 if bad else 0


def _weights_av_bench(options: argparse.Namespace) -> int:
    from mmaudio_hf import weights
    from mmaudio_hf.evaluation.av_bench import SYNCHFORMER_FILE, set_up

    folder = _weights_dir(options)
    weights.download(weights.find([SYNCHFORMER_FILE, weights.CLAP_FILE]), folder, weight_checks())
    problems = set_up(options.env, folder)
    for problem in problems:
        print(f"does not work yet: {problem}")
    print(f"evaluation.av_bench_python={options.env / 'bin' / 'python'}")
    return 1 if problems else 0


def _weights_convert(options: argparse.Namespace) -> None:
    from mmaudio_hf.models.convert import convert_file

    print(convert_file(options.file, options.out, options.variant))


def _import(options: argparse.Namespace) -> None:
    folder = [f"name={json.dumps(options.run.name)}", f"output_dir={json.dumps(str(options.run.parent))}"]
    recipe = load_recipe(options.recipe, [*options.overrides, *folder])
    from mmaudio_hf.interop import import_checkpoint

    result = import_checkpoint(
        options.file, recipe, options.snapshots, lambda folder: write_extras(recipe, folder, str(options.file))
    )
    for note in result.notes:
        print(f"note: {note}")
    print(f"{result.folder}: step {result.step}")
    print(f"continue with: accelerate launch train.py {options.run / 'config.yaml'}")


def _export(options: argparse.Namespace) -> None:
    from mmaudio_hf.interop import export_run, export_safetensors

    write = export_safetensors if options.safetensors else export_run
    for path in write(options.run, options.out, options.step):
        print(path)


def weight_checks() -> dict[str, Callable[[Path], object]]:
    """File -> check by loading it into its network, for released files without a published checksum."""
    from mmaudio_hf.features.clip import load_empty_text
    from mmaudio_hf.features.vocoder import Vocoder
    from mmaudio_hf.weights import BIGVGAN

    def vocoder_settings(path: Path) -> None:
        try:
            rates = json.loads(path.read_text())["upsample_rates"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the configuration of a vocoder ({error!r})") from error
        if rates != [8, 4, 2, 2, 2, 2]:
            raise ValueError(f"{path} belongs to another vocoder: its upsample_rates are {rates}")

    return {
        f"{BIGVGAN}/bigvgan_generator.pt": lambda path: Vocoder("44k").load_released(path),
        f"{BIGVGAN}/config.json": vocoder_settings,
        "empty_string.pth": load_empty_text,
    }


def write_extras(recipe: Recipe, folder: Path, start: str = "") -> None:
    """Add encoder files and the model card to a `pretrained_model` folder; start: the file a run was imported from."""
    from mmaudio_hf.hub.cards import write_card

    write_encoder_files(recipe, folder)
    write_card(recipe, folder, start)


def write_encoder_files(recipe: Recipe, folder: Path) -> None:
    """Write encoders.json: encoders and frame alignment, which generation needs; and the fitted codec of toy encoders.

    The folder is meant to be published, so paths that hold for this machine alone stay out of it.
    """
    from mmaudio_hf.models.pretrained import write_encoders

    encoders = recipe.encoders
    paths = {"weights_dir": encoders.weights_dir, "clip": encoders.clip}
    relative = [name for name, path in paths.items() if not path.startswith("~") and not Path(path).is_absolute()]
    write_encoders(folder, encoders, recipe.extraction.alignment, relative)
    if encoders.kind == "toy":
        from mmaudio_hf.features.toy import toy_codec_file

        codec = toy_codec_file(encoders.weights_dir, recipe.model.mode)
        if codec.is_file():  # absent when only the store of another machine is here
            shutil.copyfile(codec, folder / codec.name)


# --- training ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hub_stores(
    recipe: Recipe, splits: Sequence[str] = ("train", "validation", "test"), launch: tuple[int, int] | None = None
) -> Iterator[None]:
    """Within it the stores of these splits that are on the Hub can be opened; see `hub.stores.connect`.

    launch: processes of this machine, and of all, of a launch that is only checked: what is wrong with a store is
    raised when it is opened. None: those of the environment.
    """
    data = recipe.data
    if not (sources := data.on_hub(splits)):
        yield
        return
    from mmaudio_hf.data.remote import rows_needed
    from mmaudio_hf.hub.stores import connect

    processes, world = launch or (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    passes = recipe.training.accumulation_steps
    size = -(-samples_per_step(recipe.training, recipe.model.latent_length) // (world * passes))
    least = rows_needed(size, max(data.prefetch_batches, passes), processes)
    settings: dict[str, Any] = {"connections": data.connections, "patience": data.connection_wait, "least": least}
    settings |= {"processes": processes, "log": warn, "late": launch is not None}
    with connect(sources, data.cache_dir, data.cache_gb * 1e9, **settings):
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
    from mmaudio_hf.hub.runs import CheckpointSync

    log = lambda message: tqdm.write(message, file=sys.stderr)  # noqa: E731

    def card(run_dir: Path, folder: Path, commit: str) -> None:
        add_card(folder, run_dir, recipe.hub.repo_id, commit, recipe.hub.samples)

    with CheckpointSync(recipe.hub, recipe.run_dir, log, card) as sync:
        yield sync.announce


def _prepare(recipe: Recipe, process: "PartialState", lock: "RunLock") -> None:
    """Check and fetch in the first process; if that fails it raises, and the others exit without a message."""
    from accelerate.utils import broadcast_object_list

    from mmaudio_hf.hub.runs import check_repository
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
