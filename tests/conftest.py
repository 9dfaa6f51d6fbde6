"""Fixtures that several files share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmaudio_hf.media.example import write_example_media

LONG_FILES = (
    *("test_models_network.py", "test_features_shards.py", "test_training_checkpoint.py", "test_training_parallel.py"),
    *("test_training_loop.py", "test_hub_runs.py", "test_evaluation_av_bench.py", "test_hub_stores.py"),
    *("test_evaluation_run.py", "test_demo.py", "test_cli.py", "test_generation_files.py"),
)


def pytest_collection_modifyitems(items):
    """The files that take minutes come first, the longest before the others, so that all workers end together."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def example_media(tmp_path_factory) -> Callable[[], Path]:
    """Makes a folder of small example media of one's own; they are synthesised once and copied."""
    original = write_example_media(tmp_path_factory.mktemp("example") / "media", small=True)
    return lambda: Path(shutil.copytree(original, tmp_path_factory.mktemp("media") / "example"))
