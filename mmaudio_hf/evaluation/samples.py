"""Held-out items: rows of feature stores, and the audio that a network generates from their features.

`SampleEvaluator` generates a few of them again and again while the network is trained.
"""

import json
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from mmaudio_hf.config import Recipe, SamplingConfig, StoreConfig
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.evaluation.onsets import clip_scores
from mmaudio_hf.features.encoders import check_encoders, load_encoders
from mmaudio_hf.generation.pipeline import Generated, MMAudioPipeline, Request
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.video import read_video
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.schema import CLIP_FEATURES, MEAN, SYNC_FEATURES, TEXT_FEATURES, AudioSample, Evaluation, check_id


@dataclass(frozen=True)
class HeldOutItem:
    """One row of a store: what a network is given for it, and the true latent (N, C)."""

    item_id: str
    caption: str
    request: Request
    latent: torch.Tensor  # (0, C) where there is no truth
    store: str  # name of the store; empty: none
    duration: float | None = None  # s; None: that of the model


class HeldOutItems(Sequence[HeldOutItem]):
    """The first `limit` rows of the stores one after the other, or with `spread` as many, evenly spaced; 0: all.

    With `spread` a duration that would have no row has its first one besides.
    Items are read on access: the features of a test set fill memory. The first row of an id counts; `repeated` has the
    ids of the others. ValueError for a store that cannot be opened.
    """

    def __init__(self, sources: Sequence[StoreConfig], limit: int = 0, spread: bool = False):
        self._stores = [FeatureStore.open(source.path) for source in sources]
        rows = [(store, row) for store in self._stores for row in range(len(store))]
        count = min(limit, len(rows)) if limit else len(rows)
        selected = [rows[i * len(rows) // count if spread else i] for i in range(count)]
        first = {store.duration: (store, 0) for store in reversed(self._stores)}
        missing = first.keys() - {store.duration for store, _ in selected}
        selected += [pair for duration, pair in first.items() if spread and duration in missing]
        chosen: dict[str, tuple[FeatureStore, int]] = {}
        self.repeated: list[str] = []
        for store, row in selected:
            item_id = check_id(store.ids[row], f"{store.path}.tsv")
            if item_id in chosen:
                self.repeated.append(item_id)
            chosen.setdefault(item_id, (store, row))
        self.ids, self._rows = list(chosen), chosen
        self.paths = [store.path for store in self._stores]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> HeldOutItem:  # type: ignore[override]  # no slices: nobody needs them
        return self.of(self.ids[index])

    def of(self, item_id: str) -> HeldOutItem:
        """The item of an id."""
        store, row = self._rows[item_id]
        columns = {name: column[0].float() for name, column in store.read([row]).items()}
        names = (CLIP_FEATURES, SYNC_FEATURES, TEXT_FEATURES)
        request = Request(key=item_id, **{name: columns.get(name) for name in names})  # type: ignore[arg-type]
        return HeldOutItem(item_id, store.captions[row], request, columns[MEAN], store.path.name, store.duration)

    @property
    def durations(self) -> set[float]:
        """Seconds of the clips of the stores, as far as they are known."""
        return {store.duration for store in self._stores if store.duration is not None}

    def close(self) -> None:
        """Close the stores; items that were read stay valid."""
        for store in self._stores:
            store.close()


def read_items(sources: Sequence[StoreConfig], limit: int, spread: bool = False) -> list[HeldOutItem]:
    """A few `HeldOutItems`, all read. ValueError for a store that cannot be opened."""
    with closing(HeldOutItems(sources, limit, spread)) as items:
        return list(items)


def own_items(recipe: Recipe, taken: Collection[str]) -> list[HeldOutItem]:
    """`samples.prompts` and `samples.videos` as items without a truth: prompt_1, ... and the names of the videos.

    Their features are computed here, once. ValueError for a video that cannot be read, or whose name is `taken`.
    """
    prompts, videos = recipe.samples.prompts, [Path(path) for path in recipe.samples.videos]
    requests = [Request(f"prompt_{i}", prompt=text) for i, text in enumerate(prompts, 1)]
    requests += [Request(check_id(path.stem, "samples.videos"), video=path) for path in videos]
    keys = [request.key for request in requests]
    if twice := sorted({key for key in keys if key in taken or keys.count(key) > 1}):
        raise ValueError(f"samples: two items would be called {', '.join(twice)}: rename the file in samples.videos")
    components = [name for name, used in (("text", prompts), ("clip", videos), ("sync", videos)) if used]
    if not components:
        return []
    check_encoders(recipe.encoders, recipe.model.mode, components)
    encoders = load_encoders(recipe.encoders, recipe.model.mode, components)
    items = []
    for request in requests:
        if request.video is None:
            features = {"text_features": encoders.encode_text([request.prompt])}
        else:
            settings: dict[str, Any] = {"duration": recipe.model.duration, "alignment": recipe.extraction.alignment}
            clip = read_video(str(request.video), mode=recipe.model.mode, as_uint8=True, **settings)
            features = {"clip_features": encoders.encode_clip(clip.clip_frames[None])}
            features |= {"sync_features": encoders.encode_sync(clip.sync_frames[None])}
        given: Any = {name: batch[0].cpu() for name, batch in features.items()}
        caption = request.prompt or request.key
        nothing = torch.empty(0, recipe.model.latent_channels)
        items.append(HeldOutItem(request.key, caption, Request(request.key, **given), nothing, ""))
    return items


def generate_items(
    pipeline: MMAudioPipeline, items: Iterable[HeldOutItem], sampling: SamplingConfig, seed: int
) -> Iterator[tuple[HeldOutItem, Generated]]:
    """Each item with the audio generated from its features, as `sampling` says; the noise depends on `seed` and the id.

    Each is generated in one piece of its own duration. Items are read a batch at a time.
    """
    how = {name: getattr(sampling, name) for name in ("batch_size", "num_steps", "guidance_scale", "solver")}
    for duration, of_duration in groupby(items, key=lambda item: item.duration):
        window = None if duration == pipeline.model.config.duration else duration
        while batch := list(islice(of_duration, sampling.batch_size)):
            results = pipeline.generate([item.request for item in batch], window=window, seed=seed, **how)
            yield from zip(batch, results, strict=True)


def decoding_pipeline(recipe: Recipe, model: MMAudio) -> MMAudioPipeline:
    """A pipeline for features from stores: `model` and the decoder, which is loaded for it."""
    encoders = load_encoders(recipe.encoders, recipe.model.mode, ("decode",), device=model.latent_mean.device)
    return MMAudioPipeline(model, encoders, precision=recipe.generation_settings["precision"])


# --- Samples during training ------------------------------------------------------------------------------------------


SAMPLES_FILE = "samples.json"
REFERENCE = "reference"


class SampleEvaluator:
    """What the training loop runs every `recipe.samples.every` steps; each process generates its share.

    ValueError when a file of the decoder is missing, or a store.
    """

    name, long = "eval", False

    def __init__(self, recipe: Recipe):
        self.every, self.at_start = recipe.samples.every, bool(recipe.finetune.init_from)
        self._recipe = recipe
        check_encoders(recipe.encoders, recipe.model.mode, ("decode",))
        self._items = read_items(getattr(recipe.data, recipe.samples.split), recipe.samples.items, spread=True)
        self._items += own_items(recipe, {item.item_id for item in self._items})
        self._references: dict[str, torch.Tensor] = {}  # item id -> decoded true latent

    def run(self, model: MMAudio, step: int, weights: Mapping[str, Any]) -> Evaluation:
        """Generate, score and write the items with `model`; every process calls it and has all results.

        Samples that are not finite, as from a run that diverges, are left out; the scores are then NaN.
        """
        state = PartialState()
        items = self._items[state.process_index :: state.num_processes]
        results = {item_id: result for item_id, *result in gather_object(self._generate(model, items))}
        rows: list[dict[str, Any]] = []
        samples: list[AudioSample] = []
        for item in self._items:
            waveform, reference, rate = results[item.item_id]
            row: dict[str, Any] = {"id": item.item_id, "caption": item.caption}
            if item.duration not in (None, self._recipe.model.duration):
                row["duration"] = item.duration
            if reference is not None:
                self._references[item.item_id] = reference
                row["scores"] = clip_scores(waveform, reference, rate)
            rows.append(row)
            samples.append(AudioSample(item.item_id, item.caption, waveform, rate))
        invalid = {sample.name for sample in samples if not sample.waveform.isfinite().all()}
        samples = [sample for sample in samples if sample.name not in invalid]
        if state.is_main_process:
            if invalid:
                problem = f"samples of step {step} are left out, having values that are not finite numbers"
                print(f"warning: {problem}: {', '.join(sorted(invalid))}", file=sys.stderr)
            try:
                self._write(step, samples, [row for row in rows if row["id"] not in invalid])
            except OSError as error:  # a full disk must not end a run; its scores are logged all the same
                print(f"warning: the samples of step {step} could not be written ({error})", file=sys.stderr)
        values: dict[str, list[float]] = {}
        for name, value in (pair for row in rows for pair in row.get("scores", {}).items()):
            values.setdefault(name, []).append(value)
        return Evaluation({name: float(np.mean(each)) for name, each in values.items()}, samples)

    def _generate(self, model: MMAudio, items: Sequence[HeldOutItem]) -> list[tuple]:
        """(id, waveform, true waveform or None, sample rate) of each item."""
        if not items:
            return []
        pipeline, results = decoding_pipeline(self._recipe, model), []
        for item, result in generate_items(pipeline, items, self._recipe.sampling, self._recipe.seed):
            reference = self._references.get(item.item_id)
            if reference is None and len(item.latent):
                reference = pipeline.decode(item.latent.to(pipeline.device))
            results.append((item.item_id, result.waveform, reference, result.sample_rate))
        return results

    def _write(self, step: int, samples: Sequence[AudioSample], rows: Sequence[dict[str, Any]]) -> None:
        folder = self._recipe.run_dir / "samples"
        true = [(s, self._references[s.name]) for s in samples if s.name in self._references]
        references = [AudioSample(s.name, s.caption, waveform, s.sample_rate) for s, waveform in true]
        _write_folder(folder / REFERENCE, references, None)
        _write_folder(folder / f"step_{step}", samples, rows)


def _write_folder(folder: Path, samples: Sequence[AudioSample], rows: Sequence[dict[str, Any]] | None) -> None:
    """Write the samples and their scores beside `folder`, then rename."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for sample in samples:
        write_audio(partial / f"{sample.name}.wav", sample.waveform, sample.sample_rate)
    if rows is not None:
        (partial / SAMPLES_FILE).write_text(json.dumps(list(rows), indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # from the same step, before the run was resumed
    os.rename(partial, folder)
