"""Fixtures that several files share."""

import ctypes
import gc
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmaudio_hf.features.encoders import fit_toy_codec
from mmaudio_hf.media.example import write_example_media

LONG_FILES = (  # noqa: SIM905
    "models_network features_shards training_distributed training_resume training_checkpointer training_guard"
    " training_loop hub_runs evaluation_av_bench hub_stores data_remote evaluation_offsets evaluation_run demo cli"
    " generation_files bench wheel evaluation_samples training_finetune released_end_to_end training_launch"
).split()

MEMORY_GB = 8  # of the process of a test

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """The files that take minutes come first, the longest before the others, so that all workers end together."""
    order = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(order)))


@pytest.fixture(autouse=sys.platform == "linux", scope="module")
def freed_memory():
    """What the tests of a file allocated goes back to the system: the C library would keep up to 10 GB of it."""
    yield
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=sys.platform == "linux")
def memory_limit(request):
    """Two workers share the machine: beyond its memory the kernel kills one of them, in whatever test it is."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    yield
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024 / 1e9
    assert peak < MEMORY_GB or request.node.get_closest_marker("slow"), f"{peak:.1f} GB: too much for a test"


@pytest.fixture(scope="session")
def example_media(tmp_path_factory) -> Callable[[], Path]:
    """Makes a folder of small example media of one's own; they are synthesised once and copied."""
    original = write_example_media(tmp_path_factory.mktemp("example") / "media", small=True)
    return lambda: Path(shutil.copytree(original, tmp_path_factory.mktemp("media") / "example"))


@pytest.fixture(scope="session")
def fitted_media(example_media) -> Path:
    """A folder of example media with a toy codec that is fitted to their audio: nobody changes it."""
    folder = example_media()
    fit_toy_codec(folder, "16k", sorted((folder / "videos").glob("*.mp4")))
    return folder


@pytest.fixture(scope="module")
def media(fitted_media, tmp_path_factory) -> Path:
    """The same for the tests of a file alone."""
    return Path(shutil.copytree(fitted_media, tmp_path_factory.mktemp("fitted") / "example"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """Recipe of a finished run of 12 steps in one process, for others to compare with: nobody changes its folder.

    Recipes that are written beside it share its stores; `training_runs` reads what it left.
    """
    from toy_stores import write_recipe
    from training_runs import finished

    return finished(write_recipe(tmp_path_factory.mktemp("finished"), "finished"))


@pytest.fixture(scope="session")
def poisoned_run(tmp_path_factory) -> Path:
    """The same of 40 steps of a smaller model on a store with a row whose values overflow; see `poisoned_recipe`."""
    from training_runs import finished, poisoned_recipe

    return finished(poisoned_recipe(tmp_path_factory.mktemp("poisoned"), "undisturbed"))


@pytest.fixture
def here(hub, monkeypatch, tmp_path) -> Path:
    """The folder beside the `hub` of a file, whose stores were pushed from there; this process uses the server."""
    hub.use_here(monkeypatch, tmp_path / "home")
    hub.faults()
    return hub.root.parent
