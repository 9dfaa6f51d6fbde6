"""Steps of the real training loop, one at a time, over stores that are made for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from mmaudio_hf.bench.loader import make_stores
from mmaudio_hf.bench.measure import wait_for
from mmaudio_hf.config import DataConfig, ModelConfig, Recipe, StoreConfig, TrainingConfig
from mmaudio_hf.data.dataset import open_mixture
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training.loop import Run, make_accelerator

STEPS = 1_000_000  # more than are measured
ROWS = 64  # of the store: it stays in the page cache, as reading is measured by `bench loader`


def bench_recipe(config: ModelConfig, batch_size: int, mixed_precision: str, folder: Path) -> Recipe:
    """A recipe over random features, which are made in `folder` unless they are there."""
    if not (folder / "features").exists():
        make_stores(folder / "features", ROWS, 0.0, config)
    training = TrainingConfig(steps=STEPS, batch_size=batch_size, mixed_precision=mixed_precision, trackers=())
    stores = (StoreConfig(str(folder / "features" / "video")),)
    return Recipe("bench", output_dir=str(folder), model=config, data=DataConfig(train=stores), training=training)


@contextmanager
def training_loop(recipe: Recipe) -> Iterator[tuple[Run, Callable[[], None]]]:
    """A run that has begun, and what makes its next step, as `Run.go` does between two log lines, and waits for it."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of a run with another precision in this process
    accelerator = make_accelerator(recipe)
    network = MMAudio(recipe.model)
    channels = recipe.model.latent_channels
    network.set_latent_statistics(torch.zeros(channels), torch.ones(channels))
    mixture = open_mixture(recipe.data.train, recipe.model)
    run = Run(recipe, network, mixture, None, (), lambda folder: None, accelerator)
    run.prepare()
    with run.loader(STEPS) as loader:

        def step() -> None:
            run.update(next(loader))
            run.guard.check()
            wait_for(run.device)

        yield run, step
    mixture.close()
