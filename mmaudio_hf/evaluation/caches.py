"""The published scores of cached features, as av-benchmark saves them: one file per extractor, ids to tensors."""

import math
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmaudio_hf.evaluation.desync import OffsetHead
from mmaudio_hf.evaluation.metrics import (
    clean_id,
    desync_score,
    frechet_distance,
    inception_score,
    kl_divergence,
    mean_cosine,
)

NO_PARTNER = "no ground truth of this id"
NOT_FINITE = "features that are not finite"
TRUTH_NOT_FINITE = "ground truth whose features are not finite"
COMPLEX_ROOT = "the matrix root is complex, for which the published metric gives -1"
FAMILIES = ("fd", "kl", "is", "ib", "desync", "clap")  # as in evaluation.metrics
_OFFSET_BATCH = 16
_IDS_SHOWN = 20  # of those that were dropped for one reason

_FAMILY = {"FD": "fd", "KL": "kl", "ISC": "is"}  # by the opening of a name

# Unit of each published score, and which values are better.
UNITS = {
    "FD-VGG": ("squared distance of features", "lower"),
    "FD-PANN": ("squared distance of features", "lower"),
    "FD-PASST": ("squared distance of features", "lower"),
    "KL-PANNS-softmax": ("nats", "lower"),
    "KL-PASST-softmax": ("nats", "lower"),
    "ISC-PANNS-mean": ("classes", "higher"),
    "ISC-PANNS-std": ("classes", ""),
    "ISC-PASST-mean": ("classes", "higher"),
    "ISC-PASST-std": ("classes", ""),
    "IB-Score": ("cosine", "higher"),
    "LAION-CLAP-Score": ("cosine", "higher"),
    "MS-CLAP-Score": ("cosine", "higher"),
    "DeSync": ("s", "lower"),
}


@dataclass(frozen=True)
class Score:
    """One figure and what it was made of."""

    value: float  # NaN where there was too little to compute it from
    unit: str
    better: str  # "lower", "higher", "zero" (signed differences), or "" for spreads
    used: int  # predictions that entered
    dropped: Mapping[str, Sequence[str]] = field(default_factory=dict)  # reason -> ids
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for a figure that is not finite, and the first ids of each reason."""
        value = self.value if math.isfinite(self.value) else None
        found = {"value": value, "unit": self.unit, "better": self.better, "used": self.used}
        found["dropped"] = listed(self.dropped)
        return found | ({"note": self.note} if self.note else {})


def listed(dropped: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """What was dropped, by reason, as plain values: how many, and the first ids."""
    return [{"reason": reason, "count": len(ids), "ids": list(ids[:_IDS_SHOWN])} for reason, ids in dropped.items()]


def score_caches(
    gt_dir: str | PathLike,
    pred_dir: str | PathLike,
    *,
    paired: bool = True,
    desync_classes: Mapping[str, Sequence[int]] | None = None,
    sync_weights: str | PathLike | None = None,
    device: str | torch.device = "cpu",
    families: Collection[str] = FAMILIES,
) -> dict[str, Score]:
    """The published scores of cached features in two folders (spec media, section 6), by their published names.

    Files are dicts id -> tensor; those that neither side has are left out, and so are scores of files that only the
    ground truth may have (pictures and texts). A prediction is paired with the ground truth of its id, or else of its
    id without the counters that `clean_id` cuts off. paired=False compares distributions only.
    DeSync needs `sync_weights` (synchformer_state_dict.pth), or what its network said: `desync_classes`, prediction id
    -> class indices of `desync_score`. families: which scores are wanted, out of FAMILIES.
    ValueError when a folder has no cache, one side lacks a file of the other, or a file cannot be read.
    """
    caches = _Caches(Path(gt_dir), Path(pred_dir))
    scores = _sound_scores(caches, paired, families)
    wanted = {name: score for name, score in scores.items() if _FAMILY[name.partition("-")[0]] in families}
    return wanted | (_condition_scores(caches, families, desync_classes, sync_weights, device) if paired else {})


def _sound_scores(caches: "_Caches", paired: bool, families: Collection[str]) -> dict[str, Score]:
    """Scores that compare sounds with sounds; of `families`, and others from the same files."""
    scores: dict[str, Score] = {}
    distances, logits = "fd" in families, bool({"kl", "is"} & set(families))
    if distances and (sides := caches.sides("vggish_features.pth")):
        scores |= _distance("FD-VGG", *sides, lambda rows: np.concatenate(rows))
    if (distances or logits) and (sides := caches.sides("pann_features.pth")):
        scores |= _pann_scores(*sides, paired, families)
    if distances and (sides := caches.sides("passt_features_embed.pth")):
        scores |= _distance("FD-PASST", *(caches.pair(*sides) if paired else sides), np.stack)
    if logits and (sides := caches.sides("passt_logits.pth")):
        predicted, reference = caches.pair(*sides) if paired else sides
        if paired:
            scores |= _divergence("KL-PASST-softmax", predicted, reference)
        scores |= _inception("ISC-PASST", predicted)
    return scores


def _condition_scores(caches: "_Caches", families, desync_classes, sync_weights, device) -> dict[str, Score]:
    """Scores that compare each sound with its pictures or its text."""
    scores: dict[str, Score] = {}
    for family, name, pred_file, gt_file in (
        ("ib", "IB-Score", "imagebind_audio.pth", "imagebind_video.pth"),
        ("clap", "LAION-CLAP-Score", "clap_laion_audio.pth", "clap_laion_text.pth"),
        ("clap", "MS-CLAP-Score", "clap_ms_audio.pth", "clap_ms_text.pth"),
    ):
        if family in families and (sides := caches.sides(pred_file, gt_file)):
            predicted, reference = caches.pair(*sides)
            scores |= _scored(name, mean_cosine(np.stack(predicted.rows), np.stack(reference.rows)), predicted)
    if "desync" not in families:
        return scores
    if desync_classes:
        scores |= _scored("DeSync", desync_score(list(desync_classes.values())), _Side(desync_classes))
    elif sync_weights is not None and (sides := caches.sides("synchformer_audio.pth", "synchformer_video.pth")):
        predicted, reference = caches.pair(*sides)
        classes = _offset_classes(predicted.rows, reference.rows, sync_weights, device)
        scores |= _scored("DeSync", desync_score(classes), predicted)
    return scores


def evaluate_caches(
    gt_dir, pred_dir, *, paired: bool = True, desync_classes: Mapping[str, Sequence[int]] | None = None, **options
) -> dict[str, float | int]:
    """`score_caches` as plain numbers: NAME, and beside it "NAME/used" and "NAME/dropped", counts of predictions."""
    scores = score_caches(gt_dir, pred_dir, paired=paired, desync_classes=desync_classes, **options)
    flat: dict[str, float | int] = {}
    for name, score in scores.items():
        flat[name] = score.value
        flat[f"{name}/used"] = score.used
        flat[f"{name}/dropped"] = sum(map(len, score.dropped.values()))
    return flat


class _Side:
    """Features of one side by id, in order, with what was dropped on the way."""

    def __init__(self, values: Mapping[str, Any], dropped: Mapping[str, list[str]] | None = None):
        self.values = values
        self.dropped = {reason: ids for reason, ids in (dropped or {}).items() if ids}

    @property
    def rows(self) -> list[Any]:
        return list(self.values.values())

    def of(self, key: str) -> "_Side":
        """One entry of features that are dicts."""
        return _Side({item_id: value[key] for item_id, value in self.values.items()}, self.dropped)


class _Caches:
    """The cache files of both folders."""

    def __init__(self, gt_dir: Path, pred_dir: Path):
        self.gt_dir, self.pred_dir = gt_dir, pred_dir
        for folder in (gt_dir, pred_dir):
            if not any(folder.glob("*.pth")):
                raise ValueError(f"{folder} holds no cached features (*.pth)")

    def sides(self, name: str, gt_name: str = "") -> tuple[_Side, _Side] | None:
        """Prediction's and ground truth's features; None when the ground truth has none, or no side has."""
        gt, pred = self.gt_dir / (gt_name or name), self.pred_dir / name
        if not gt.is_file() and (gt_name or not pred.is_file()):
            return None
        return _read_cache(pred, gt, NOT_FINITE), _read_cache(gt, pred, TRUTH_NOT_FINITE)

    def pair(self, predicted: _Side, reference: _Side) -> tuple[_Side, _Side]:
        """Both sides of the ids that have a partner, in the order of the predictions."""
        truth, spoiled = reference.values, set(reference.dropped.get(TRUTH_NOT_FINITE, ()))
        partners = {i: i if i in truth or i in spoiled else clean_id(i) for i in predicted.values}
        common = [i for i, partner in partners.items() if partner in truth]
        if not common:
            raise ValueError(f"{self.pred_dir} and {self.gt_dir} have no id in common")
        alone = [i for i in partners if partners[i] not in truth]
        dropped = predicted.dropped | {
            NO_PARTNER: [i for i in alone if partners[i] not in spoiled],
            TRUTH_NOT_FINITE: [i for i in alone if partners[i] in spoiled],
        }
        values = {i: predicted.values[i] for i in common}
        return _Side(values, dropped), _Side({i: truth[partners[i]] for i in common})


def _read_cache(path: Path, partner: Path, reason: str) -> _Side:
    """Features by id; those that are not finite are dropped for `reason`."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, but there is {partner}: extract the features of both sides")
    try:
        # Mapped where the format allows: the features of a published test set take 9 GB.
        cache = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can break the reader anywhere
        raise ValueError(f"{path} cannot be read as a cache of features; extract it anew") from error
    if not isinstance(cache, dict) or not cache:
        raise ValueError(f"{path} must be a dictionary from ids to features; extract it anew")
    try:
        bad = {item_id for item_id, value in cache.items() if not _finite(value)}
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds entries that are not features; extract it anew") from error
    values = {str(item_id): value for item_id, value in cache.items() if item_id not in bad}
    return _Side(values, {reason: sorted(map(str, bad))})


def _finite(value: Any) -> bool:
    tensors = value.values() if isinstance(value, Mapping) else [value]
    return all(bool(torch.isfinite(torch.as_tensor(tensor)).all()) for tensor in tensors)


def _distance(name: str, predicted: _Side, reference: _Side, joined) -> dict[str, Score]:
    predicted = _Side(predicted.values, predicted.dropped | reference.dropped)
    if not predicted.values or not reference.values:
        return _scored(name, math.nan, predicted)
    rows = [np.asarray(joined([np.asarray(row) for row in side.rows])) for side in (predicted, reference)]
    value = frechet_distance(*rows) if min(map(len, rows)) > 1 else math.nan
    return _scored(name, value, predicted, COMPLEX_ROOT if value == -1.0 else "")


def _pann_scores(predicted: _Side, reference: _Side, paired: bool, families: Collection[str]) -> dict[str, Score]:
    """FD and IS use all ids of each side; KL only ids that are equal, without the cleaning of `clean_id`."""
    scores: dict[str, Score] = {}
    if "fd" in families:  # the root of a matrix of 2048 rows takes a while
        scores |= _distance("FD-PANN", predicted.of("2048"), reference.of("2048"), np.stack)
    logits, truth = predicted.of("logits"), reference.of("logits").values
    if paired:
        common = [item_id for item_id in logits.values if item_id in truth]
        alone = [item_id for item_id in logits.values if item_id not in truth]
        equal = _Side({i: logits.values[i] for i in common}, logits.dropped | {NO_PARTNER: alone})
        scores |= _divergence("KL-PANNS-softmax", equal, _Side({i: truth[i] for i in common}))
    return scores | _inception("ISC-PANNS", logits)


def _divergence(name: str, predicted: _Side, reference: _Side) -> dict[str, Score]:
    if not predicted.values:
        return _scored(name, math.nan, predicted)
    return _scored(name, kl_divergence(np.stack(predicted.rows), np.stack(reference.rows)), predicted)


def _inception(name: str, logits: _Side) -> dict[str, Score]:
    mean, std = inception_score(np.stack(logits.rows)) if logits.values else (math.nan, math.nan)
    note = "" if math.isfinite(mean) else "fewer than 10 sounds"
    return _scored(f"{name}-mean", mean, logits, note) | _scored(f"{name}-std", std, logits, note)


def _scored(name: str, value: float, predicted: _Side, note: str = "") -> dict[str, Score]:
    unit, better = UNITS[name]
    return {name: Score(value, unit, better, len(predicted.values), predicted.dropped, note)}


def _offset_classes(audio: Sequence, video: Sequence, weights: str | PathLike, device) -> np.ndarray:
    """Class indices (n, 2) of paired Synchformer features."""
    head = OffsetHead().load_released(weights).to(device)
    parts = [head.classes(*sides) for sides in _batches(video, audio)]
    return torch.cat(parts).numpy()


def _batches(video: Sequence, audio: Sequence) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    for first in range(0, len(video), _OFFSET_BATCH):
        part = slice(first, first + _OFFSET_BATCH)
        yield torch.stack(list(video[part])), torch.stack(list(audio[part]))
