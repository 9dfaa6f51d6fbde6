"""Held-out items: rows of feature stores, read one by one, and the sound that a network makes of their features."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from mmaudio_hf.config import Recipe, SamplingConfig, StoreConfig
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.evaluation import waveform_scores
from mmaudio_hf.features.encoders import check_encoders, load_encoders
from mmaudio_hf.generation.pipeline import Generated, MMAudioPipeline, Request
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import CLIP_FEATURES, MEAN, SYNC_FEATURES, TEXT_FEATURES, AudioSample, Evaluation, check_id


@dataclass(frozen=True)
class HeldOutItem:
    """One row of a store: what a network is given for it, and the latent (N, C) of its true sound."""

    item_id: str
    caption: str
    request: Request
    latent: torch.Tensor
    store: str  # name of the store


class HeldOutItems(Sequence):
    """The first `limit` rows of the stores one after the other, or with `spread` as many at even distances; 0: all.

    A sequence of `HeldOutItem`s that are read when they are asked for: the features of a test set fill memory. The
    first row of an id counts; `repeated` has the ids of the others. ValueError for a store that cannot be opened.
    """

    def __init__(self, sources: Sequence[StoreConfig], limit: int = 0, spread: bool = False):
        self._stores = [FeatureStore.open(source.path) for source in sources]
        rows = [(store, row) for store in self._stores for row in range(len(store))]
        count = min(limit, len(rows)) if limit else len(rows)
        chosen: dict[str, tuple[FeatureStore, int]] = {}
        self.repeated: list[str] = []
        for store, row in (rows[i * len(rows) // count if spread else i] for i in range(count)):
            item_id = check_id(store.ids[row], f"{store.path}.tsv")
            if item_id in chosen:
                self.repeated.append(item_id)
            chosen.setdefault(item_id, (store, row))
        self.ids, self._rows = list(chosen), list(chosen.values())
        self._places = {item_id: place for place, item_id in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> HeldOutItem:
        store, row = self._rows[place]
        values = {name: column[0].float() for name, column in store.read([row]).items()}
        features = {name: values.get(name) for name in (CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES)}
        request = Request(key=self.ids[place], **features)
        return HeldOutItem(self.ids[place], store.captions[row], request, values[MEAN], store.path.name)

    def of(self, item_id: str) -> HeldOutItem:
        """The item of an id."""
        return self[self._places[item_id]]

    def close(self) -> None:
        """Close the stores; what was read stays."""
        for store in self._stores:
            store.close()


def read_items(sources: Sequence[StoreConfig], limit: int, spread: bool = False) -> list[HeldOutItem]:
    """A few `HeldOutItems`, all read. ValueError for a store that cannot be opened."""
    items = HeldOutItems(sources, limit, spread)
    found = list(items)
    items.close()
    return found


def generate_items(
    pipeline: MMAudioPipeline, items: Iterable[HeldOutItem], sampling: SamplingConfig, seed: int
) -> Iterator[tuple[HeldOutItem, Generated]]:
    """Each item with the sound of its features, as `sampling` says; the noise depends on `seed` and the id alone.

    Items are taken a batch at a time.
    """
    items = iter(items)
    while batch := list(islice(items, sampling.batch_size)):
        results = pipeline.generate(
            [item.request for item in batch],
            sampling.batch_size,
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            solver=sampling.solver,
            seed=seed,
        )
        yield from zip(batch, results, strict=True)


# --- Sound of a few held-out items, made again and again while a network is trained ----------------------------------


SAMPLES_FILE = "samples.json"
REFERENCE = "reference"


class SampleEvaluator:
    """What the training loop runs every `recipe.samples.every` steps; each process makes its share of the sounds.

    ValueError when a file of the decoder is missing, or a store.
    """

    name, long = "eval", False

    def __init__(self, recipe: Recipe):
        self.every = recipe.samples.every
        self._recipe = recipe
        check_encoders(recipe.encoders, recipe.model.mode, ("decode",))
        self._items = read_items(getattr(recipe.data, recipe.samples.split), recipe.samples.items, spread=True)
        self._references: dict[str, torch.Tensor] = {}

    def run(self, model: MMAudio, step: int, weights: Mapping[str, Any]) -> Evaluation:
        """Generate, score and write the items with `model`; every process calls it and has all results.

        A sound that is not finite, as of a run that diverges, is left out of the sounds; its scores say so.
        """
        state = PartialState()
        share = self._items[state.process_index :: state.num_processes]
        made = {item_id: found for item_id, *found in gather_object(self._generate(model, share))}
        rows, sounds = [], []
        for item in self._items:
            waveform, self._references[item.item_id], rate = made[item.item_id]
            scores = waveform_scores(waveform, self._references[item.item_id], rate)
            rows.append({"id": item.item_id, "caption": item.caption, "scores": scores})
            sounds.append(AudioSample(item.item_id, item.caption, waveform, rate))
        bad = {sound.name for sound in sounds if not sound.waveform.isfinite().all()}
        sounds = [sound for sound in sounds if sound.name not in bad]
        if state.is_main_process:
            if bad:
                told = f"samples of step {step} are left out, having values that are not finite numbers"
                print(f"warning: {told}: {', '.join(sorted(bad))}", file=sys.stderr)
            try:
                self._write(step, sounds, [row for row in rows if row["id"] not in bad])
            except OSError as error:  # a full disk must not end a run; its scores are logged all the same
                print(f"warning: the samples of step {step} could not be written ({error})", file=sys.stderr)
        means = {name: float(np.mean([row["scores"][name] for row in rows])) for name in rows[0]["scores"]}
        return Evaluation(means, sounds)

    def _generate(self, model: MMAudio, share: Sequence[HeldOutItem]) -> list[tuple]:
        """(id, waveform, true waveform, sample rate) of each item of `share`. The decoder is held meanwhile only."""
        if not share:
            return []
        recipe, device = self._recipe, model.latent_mean.device
        encoders = load_encoders(recipe.encoders, recipe.model.mode, ("decode",), device=device)
        precision = "bf16" if recipe.training.mixed_precision == "bf16" else "fp32"
        pipeline = MMAudioPipeline(model, encoders, precision=precision)
        found = []
        for item, result in generate_items(pipeline, share, recipe.sampling, recipe.seed):
            known = self._references.get(item.item_id)
            true = pipeline.decode(item.latent.to(device)) if known is None else known
            found.append((item.item_id, result.waveform, true, result.sample_rate))
        return found

    def _write(self, step: int, sounds: Sequence[AudioSample], rows: Sequence[dict]) -> None:
        folder = self._recipe.run_dir / "samples"
        true = [AudioSample(s.name, s.caption, self._references[s.name], s.sample_rate) for s in sounds]
        _write_folder(folder / REFERENCE, true, None)
        _write_folder(folder / f"step_{step}", sounds, rows)


def _write_folder(folder: Path, sounds: Sequence[AudioSample], rows: Sequence[dict] | None) -> None:
    """Write the sounds and their scores beside `folder`, then put them in its place."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for sound in sounds:
        write_audio(partial / f"{sound.name}.wav", sound.waveform, sound.sample_rate)
    if rows is not None:
        (partial / SAMPLES_FILE).write_text(json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # of the same step, made before the run was taken up again
    os.rename(partial, folder)
