"""The published metrics: formulas on arrays of features, Synchformer's offsets, and scores of cached features.

av-benchmark saves one file per extractor, a dictionary from ids to tensors. docs/evaluation.md names the scores.
"""

import math
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from scipy.linalg import sqrtm
from scipy.special import log_softmax
from torch import Tensor, nn

from mmaudio_hf.schema import SYNC_DIM
from mmaudio_hf.weights import load_state, load_strict

SYNC_CLASSES = np.linspace(-2, 2, 21, dtype=np.float32)  # s
_SHUFFLE_SEED = 2020
_OFFSET_BATCH = 16  # pairs of 8 s at once: 14 segments of both sides are 200 tokens


# --- Formulas ---------------------------------------------------------------------------------------------------------


def frechet_distance(predicted: ArrayLike, reference: ArrayLike) -> float:
    """Frechet distance of two Gaussians fitted to rows (n, d) (Heusel et al. 2017), covariances with n - 1.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); -1 when the root has an imaginary part above 1e-3, as the published
    metric does.
    """
    rows = [np.asarray(values) for values in (predicted, reference)]
    if any(r.ndim != 2 or len(r) < 2 for r in rows) or rows[0].shape[1] != rows[1].shape[1]:
        raise ValueError(f"two sets of at least two rows of one width are needed, not {rows[0].shape}, {rows[1].shape}")
    means = [r.mean(0) for r in rows]
    covariances = [np.atleast_2d(np.cov(r, rowvar=False)) for r in rows]
    root = sqrtm(covariances[0] @ covariances[1])
    if not np.isfinite(root).all():  # a singular product
        offset = 1e-6 * np.eye(len(means[0]))
        root = sqrtm((covariances[0] + offset) @ (covariances[1] + offset))
    if np.iscomplexobj(root):
        if np.abs(np.diagonal(root).imag).max() > 1e-3:
            return -1.0
        root = root.real
    difference = means[0] - means[1]
    traces = sum(np.trace(covariance) for covariance in covariances)
    return float(difference @ difference + traces - 2 * np.trace(root))


def kl_divergence(predicted: ArrayLike, reference: ArrayLike, activation: str = "softmax") -> float:
    """Mean over rows of KL(reference || predicted) for logits (n, classes).

    activation "sigmoid" takes every class as its own probability, without its complement, as the published code does.
    """
    q, p = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (predicted, reference))
    if p.shape != q.shape or p.ndim != 2 or not len(p):
        shapes = f"{tuple(q.shape)}, {tuple(p.shape)}"
        raise ValueError(f"logits of both sides must have one shape (n, classes), not {shapes}")
    logs = {"softmax": lambda x: x.log_softmax(1), "sigmoid": torch.nn.functional.logsigmoid}
    if activation not in logs:
        raise ValueError(f"activation {activation!r}: use softmax or sigmoid")
    log_q, log_p = logs[activation](q), logs[activation](p)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def inception_score(logits: ArrayLike, splits: int = 10, shuffle: bool = True) -> tuple[float, float]:
    """Mean and population standard deviation over splits of exp E KL(p || mean p) for logits (n, classes).

    (Salimans et al. 2016.) Rows are shuffled with a fixed seed; fewer rows than splits give NaN.
    """
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    if len(log_p) < splits:
        return math.nan, math.nan
    if shuffle:
        log_p = log_p[np.random.RandomState(_SHUFFLE_SEED).permutation(len(log_p))]
    scores = []
    for k in range(splits):
        log_split = log_p[k * len(log_p) // splits : (k + 1) * len(log_p) // splits]
        p = np.exp(log_split)
        scores.append(np.exp((p * (log_split - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    predicted: ArrayLike, reference: ArrayLike, subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """KID: mean and population standard deviation, over random subsets, of the squared MMD of rows (n, d).

    Binkowski et al. 2018: kernel (x y / d + 1)^3, without bias. The subsets have `size` rows of each side, at most as
    many as the smaller one has, and are drawn with a fixed seed. Published beside the others, not in their tables.
    """
    predicted, reference = (np.asarray(rows, np.float64) for rows in (predicted, reference))
    if min(len(predicted), len(reference)) < 2 or predicted.shape[1:] != reference.shape[1:]:
        raise ValueError(f"give at least two rows of one width, not {predicted.shape} and {reference.shape}")
    size, generator = min(size, len(predicted), len(reference)), np.random.RandomState(_SHUFFLE_SEED)
    distances = []
    for _ in range(subsets):
        x, y = (rows[generator.choice(len(rows), size, replace=False)] for rows in (predicted, reference))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum(kernel.sum() - np.trace(kernel) for kernel in (xx, yy)) / (size * (size - 1))
        distances.append(within - 2 * xy.mean())
    return float(np.mean(distances)), float(np.std(distances))


def mean_cosine(a: ArrayLike, b: ArrayLike) -> float:
    """Mean cosine of paired rows (n, d)."""
    x, y = (torch.as_tensor(np.asarray(rows), dtype=torch.float64) for rows in (a, b))
    return float(torch.cosine_similarity(x, y, dim=1).mean())


def desync_score(classes: ArrayLike) -> float:
    """DeSync in seconds: mean absolute offset that Synchformer predicts, from class indices (n, 2) in 0..20.

    A pair has two, of its first and of its last 14 segments; the classes are 21 offsets from -2 to 2 s.
    """
    return float(np.abs(SYNC_CLASSES[np.asarray(classes, int)]).mean(dtype=np.float64))


def clean_id(item_id: str) -> str:
    """The id a prediction is paired by: names of 30, 20 or 21 characters have counters, which are cut off."""
    return {30: item_id[10:28], 20: item_id[:18], 21: item_id[1:19]}.get(len(item_id), item_id)


# --- Synchformer's estimate of how early audio or video is, for DeSync ------------------------------------------------

# Iashin et al., Synchformer, arXiv 2401.16423, section 3: the segment features of both sides, projected and normalised,
# make one sequence behind a token whose output is classified. Parameters have the released names.
CLASSES = 21
SEGMENTS = 14  # classified at once: about 4.8 s
VIDEO_TOKENS, AUDIO_TOKENS = 8, 6  # of a segment
DEPTH, HEADS = 3, 8


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(SYNC_DIM, SYNC_DIM) for _ in range(4))

    def forward(self, x_BND: Tensor) -> Tensor:
        heads = (layer(x_BND).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(SYNC_DIM), nn.LayerNorm(SYNC_DIM)
        self.attn = _Attention()
        self.mlp = nn.Sequential(nn.Linear(SYNC_DIM, 4 * SYNC_DIM), nn.GELU(), nn.Linear(4 * SYNC_DIM, SYNC_DIM))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.ln1(x_BND))
        return x_BND + self.mlp(self.ln2(x_BND))


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tokens = 2 + SEGMENTS * (VIDEO_TOKENS + AUDIO_TOKENS)
        self.pos_emb = nn.Parameter(torch.empty(1, tokens, SYNC_DIM))


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vis_in_lnorm, self.aud_in_lnorm = nn.LayerNorm(SYNC_DIM), nn.LayerNorm(SYNC_DIM)
        self.OFF_tok, self.MOD_tok = (nn.Parameter(torch.empty(1, 1, SYNC_DIM)) for _ in range(2))
        self.pos_emb_cfg = _Positions()
        self.blocks = nn.Sequential(*(_Block() for _ in range(DEPTH)))
        self.ln_f = nn.LayerNorm(SYNC_DIM)
        self.off_head = nn.Linear(SYNC_DIM, CLASSES)

    def forward(self, video_BND: Tensor, audio_BND: Tensor) -> Tensor:
        offset, separator = (token.expand(len(video_BND), -1, -1) for token in (self.OFF_tok, self.MOD_tok))
        tokens = [offset, self.vis_in_lnorm(video_BND), separator, self.aud_in_lnorm(audio_BND)]
        x_BND = self.blocks(torch.cat(tokens, dim=1) + self.pos_emb_cfg.pos_emb)  # N = 1 + 14 * 8 + 1 + 14 * 6 = 198
        return self.off_head(self.ln_f(x_BND[:, 0]))


class OffsetHead(nn.Module):
    """Synchformer behind its two encoders, frozen; without storage before `load_released`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.vproj, self.aproj = nn.Linear(SYNC_DIM, SYNC_DIM), nn.Linear(SYNC_DIM, SYNC_DIM)
            self.transformer = _Transformer()
        self.requires_grad_(False).eval()

    def load_released(self, source: str | PathLike | dict[str, Tensor]) -> "OffsetHead":
        """Load these tensors of `synchformer_state_dict.pth`. Returns self; ValueError where they do not fit."""
        prefixes = ("vproj.", "aproj.", "transformer.")
        state = {name: value for name, value in load_state(source).items() if name.startswith(prefixes)}
        return load_strict(self, state, source)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        """Logits (B, 21) of features (B, 14, 8, 768) and (B, 14, 6, 768)."""
        return self.transformer(self.vproj(video).flatten(1, 2), self.aproj(audio).flatten(1, 2))

    @torch.inference_mode()
    def classes(self, video: Tensor, audio: Tensor) -> Tensor:
        """Class indices (B, 2) of the first and of the last 14 segments of (B, segments, 8 or 6, 768)."""
        sides = (video, VIDEO_TOKENS), (audio, AUDIO_TOKENS)
        if any(x.ndim != 4 or x.shape[1] < SEGMENTS or x.shape[2:] != (tokens, SYNC_DIM) for x, tokens in sides):
            raise ValueError(
                f"Synchformer features of {tuple(video.shape)} and {tuple(audio.shape)}: (n, segments, tokens, 768)"
                f" with {VIDEO_TOKENS} and {AUDIO_TOKENS} tokens and at least {SEGMENTS} segments (4.8 s) are needed"
            )
        device = self.vproj.weight.device
        ends = (slice(None, SEGMENTS), slice(-SEGMENTS, None))
        logits = [self(*(x[:, end].to(device, torch.float32) for x, _ in sides)) for end in ends]
        return torch.stack([end.argmax(1).cpu() for end in logits], dim=1)


# --- Scores of cached features ----------------------------------------------------------------------------------------


FAMILIES = ("fd", "kl", "is", "ib", "desync", "clap")  # as in evaluation.metrics
NO_PARTNER = "no ground truth of this id"
NOT_FINITE = "features that are not finite"
TRUTH_NOT_FINITE = "ground truth whose features are not finite"
COMPLEX_ROOT = "the matrix root is complex, for which the published metric gives -1"
_IDS_SHOWN = 20  # of those that were dropped for one reason

# Published name -> family, unit, and which values are better.
_DISTANCE = ("fd", "squared distance of features", "lower")
METRICS = {
    "FD-VGG": _DISTANCE,
    "FD-PANN": _DISTANCE,
    "FD-PASST": _DISTANCE,
    "KL-PANNS-softmax": ("kl", "nats", "lower"),
    "KL-PASST-softmax": ("kl", "nats", "lower"),
    "ISC-PANNS-mean": ("is", "classes", "higher"),
    "ISC-PANNS-std": ("is", "classes", ""),
    "ISC-PASST-mean": ("is", "classes", "higher"),
    "ISC-PASST-std": ("is", "classes", ""),
    "IB-Score": ("ib", "cosine", "higher"),
    "LAION-CLAP-Score": ("clap", "cosine", "higher"),
    "MS-CLAP-Score": ("clap", "cosine", "higher"),
    "DeSync": ("desync", "s", "lower"),
}


@dataclass(frozen=True)
class Score:
    """One figure and what it was computed from."""

    value: float  # NaN where there was too little to compute it from
    unit: str
    better: str  # "lower", "higher", "zero" (signed differences), or "" for standard deviations
    used: int  # predictions that entered
    dropped: Mapping[str, Sequence[str]] = field(default_factory=dict)  # reason -> ids
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for a figure that is not finite, and the first ids of each reason."""
        value = self.value if math.isfinite(self.value) else None
        plain = {"value": value, "unit": self.unit, "better": self.better, "used": self.used}
        return plain | {"dropped": dropped_json(self.dropped)} | ({"note": self.note} if self.note else {})


def dropped_json(dropped: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Dropped ids by reason as plain values: how many, and the first ones."""
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
    """The published scores of cached features in two folders, by their published names.

    Files that neither side has are left out, and so are scores of files that only the ground truth may have (video and
    text). A prediction is paired with the ground truth of its id, or else of its `clean_id`. paired=False compares
    distributions only. DeSync needs `sync_weights` (synchformer_state_dict.pth), or what its network predicted:
    `desync_classes`, prediction id -> class indices of `desync_score`. families: which scores to compute.
    ValueError when a folder has no cache, one side lacks a file of the other, or a file cannot be read.
    """
    caches = _Caches(Path(gt_dir), Path(pred_dir))
    scores = _audio_scores(caches, paired, families)
    scores = {name: score for name, score in scores.items() if METRICS[name][0] in families}
    return scores | (_condition_scores(caches, families, desync_classes, sync_weights, device) if paired else {})


def evaluate_caches(
    gt_dir: str | PathLike,
    pred_dir: str | PathLike,
    *,
    paired: bool = True,
    desync_classes: Mapping[str, Sequence[int]] | None = None,
    **options: Any,
) -> dict[str, float | int]:
    """`score_caches` as plain numbers: NAME, and beside it "NAME/used" and "NAME/dropped", counts of predictions."""
    flat: dict[str, float | int] = {}
    for name, score in score_caches(gt_dir, pred_dir, paired=paired, desync_classes=desync_classes, **options).items():
        dropped = sum(map(len, score.dropped.values()))
        flat |= {name: score.value, f"{name}/used": score.used, f"{name}/dropped": dropped}
    return flat


class _Features:
    """Features of one side by id, in order, with the ids that were dropped."""

    def __init__(self, by_id: Mapping[str, Any], dropped: Mapping[str, list[str]] | None = None):
        self.by_id = by_id
        self.dropped = {reason: ids for reason, ids in (dropped or {}).items() if ids}

    def stacked(self) -> np.ndarray:
        return np.stack(list(self.by_id.values()))

    def entry(self, key: str) -> "_Features":
        """One entry of features that are dicts."""
        return _Features({item_id: value[key] for item_id, value in self.by_id.items()}, self.dropped)


class _Caches:
    """The cache files of both folders."""

    def __init__(self, gt_dir: Path, pred_dir: Path):
        self.gt_dir, self.pred_dir = gt_dir, pred_dir
        for folder in (gt_dir, pred_dir):
            if not any(folder.glob("*.pth")):
                raise ValueError(f"{folder} holds no cached features (*.pth)")

    def read(self, name: str, gt_name: str = "") -> tuple[_Features, _Features] | None:
        """Features of predictions and ground truth; None when the ground truth has none, or neither has."""
        gt, pred = self.gt_dir / (gt_name or name), self.pred_dir / name
        if not gt.is_file() and (gt_name or not pred.is_file()):
            return None
        return _read_cache(pred, gt, NOT_FINITE), _read_cache(gt, pred, TRUTH_NOT_FINITE)

    def pair(self, predicted: _Features, reference: _Features) -> tuple[_Features, _Features]:
        """Both sides of the ids that have a partner, in the order of the predictions."""
        truth, invalid = reference.by_id, set(reference.dropped.get(TRUTH_NOT_FINITE, ()))
        partners = {i: i if i in truth or i in invalid else clean_id(i) for i in predicted.by_id}
        common = [i for i, partner in partners.items() if partner in truth]
        if not common:
            raise ValueError(f"{self.pred_dir} and {self.gt_dir} have no id in common")
        alone = [i for i in partners if partners[i] not in truth]
        dropped = predicted.dropped | {
            NO_PARTNER: [i for i in alone if partners[i] not in invalid],
            TRUTH_NOT_FINITE: [i for i in alone if partners[i] in invalid],
        }
        ours = _Features({i: predicted.by_id[i] for i in common}, dropped)
        return ours, _Features({i: truth[partners[i]] for i in common})


def _read_cache(path: Path, partner: Path, reason: str) -> _Features:
    """Features by id; those that are not finite are dropped for `reason`."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, but there is {partner}: extract the features of both sides")
    try:
        # Memory-mapped where the format allows: the features of a published test set take 9 GB.
        cache = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can break the reader anywhere
        raise ValueError(f"{path} cannot be read as a cache of features: extract it again") from error
    if not isinstance(cache, dict) or not cache:
        raise ValueError(f"{path} must be a dictionary from ids to features: extract it again")
    try:
        invalid = {item_id for item_id, value in cache.items() if not _finite(value)}
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds entries that are not features: extract it again") from error
    by_id = {str(item_id): value for item_id, value in cache.items() if item_id not in invalid}
    return _Features(by_id, {reason: sorted(map(str, invalid))})


def _finite(value: Any) -> bool:
    tensors = value.values() if isinstance(value, Mapping) else [value]
    return all(bool(torch.isfinite(torch.as_tensor(tensor)).all()) for tensor in tensors)


def _audio_scores(caches: _Caches, paired: bool, families: Collection[str]) -> dict[str, Score]:
    """Scores that compare audio with audio: those of `families`, and others from the same files."""
    scores: dict[str, Score] = {}
    distances, logits = "fd" in families, bool({"kl", "is"} & set(families))
    if distances and (sides := caches.read("vggish_features.pth")):
        scores |= _distance("FD-VGG", *sides, np.concatenate)
    if (distances or logits) and (sides := caches.read("pann_features.pth")):
        scores |= _pann_scores(*sides, paired, families)
    if distances and (sides := caches.read("passt_features_embed.pth")):
        scores |= _distance("FD-PASST", *(caches.pair(*sides) if paired else sides), np.stack)
    if logits and (sides := caches.read("passt_logits.pth")):
        predicted, reference = caches.pair(*sides) if paired else sides
        if paired:
            scores |= _divergence("KL-PASST-softmax", predicted, reference)
        scores |= _inception("ISC-PASST", predicted)
    return scores


def _condition_scores(
    caches: _Caches,
    families: Collection[str],
    desync_classes: Mapping[str, Sequence[int]] | None,
    sync_weights: str | PathLike | None,
    device: str | torch.device,
) -> dict[str, Score]:
    """Scores that compare audio with its video or its text."""
    scores: dict[str, Score] = {}
    for name, pred_file, gt_file in (
        ("IB-Score", "imagebind_audio.pth", "imagebind_video.pth"),
        ("LAION-CLAP-Score", "clap_laion_audio.pth", "clap_laion_text.pth"),
        ("MS-CLAP-Score", "clap_ms_audio.pth", "clap_ms_text.pth"),
    ):
        if METRICS[name][0] in families and (sides := caches.read(pred_file, gt_file)):
            predicted, reference = caches.pair(*sides)
            scores |= _scored(name, mean_cosine(predicted.stacked(), reference.stacked()), predicted)
    if "desync" not in families:
        return scores
    if desync_classes:
        scores |= _scored("DeSync", desync_score(list(desync_classes.values())), _Features(desync_classes))
    elif sync_weights is not None and (sides := caches.read("synchformer_audio.pth", "synchformer_video.pth")):
        predicted, reference = caches.pair(*sides)
        head = OffsetHead().load_released(sync_weights).to(device)
        video, audio = list(reference.by_id.values()), list(predicted.by_id.values())
        batches = [slice(i, i + _OFFSET_BATCH) for i in range(0, len(video), _OFFSET_BATCH)]
        classes = [head.classes(torch.stack(video[batch]), torch.stack(audio[batch])) for batch in batches]
        scores |= _scored("DeSync", desync_score(torch.cat(classes).numpy()), predicted)
    return scores


def _distance(
    name: str, predicted: _Features, reference: _Features, join: Callable[[list[np.ndarray]], np.ndarray]
) -> dict[str, Score]:
    predicted = _Features(predicted.by_id, predicted.dropped | reference.dropped)
    if not predicted.by_id or not reference.by_id:
        return _scored(name, math.nan, predicted)
    rows = [join([np.asarray(row) for row in side.by_id.values()]) for side in (predicted, reference)]
    value = frechet_distance(*rows) if min(map(len, rows)) > 1 else math.nan
    return _scored(name, value, predicted, COMPLEX_ROOT if value == -1.0 else "")


def _pann_scores(
    predicted: _Features, reference: _Features, paired: bool, families: Collection[str]
) -> dict[str, Score]:
    """FD and IS use all ids of each side; KL only ids that are equal, without `clean_id`."""
    scores: dict[str, Score] = {}
    if "fd" in families:  # the root of a matrix of 2048 rows takes a while
        scores |= _distance("FD-PANN", predicted.entry("2048"), reference.entry("2048"), np.stack)
    logits, truth = predicted.entry("logits"), reference.entry("logits").by_id
    if paired:
        common = [item_id for item_id in logits.by_id if item_id in truth]
        alone = [item_id for item_id in logits.by_id if item_id not in truth]
        equal = _Features({i: logits.by_id[i] for i in common}, logits.dropped | {NO_PARTNER: alone})
        scores |= _divergence("KL-PANNS-softmax", equal, _Features({i: truth[i] for i in common}))
    return scores | _inception("ISC-PANNS", logits)


def _divergence(name: str, predicted: _Features, reference: _Features) -> dict[str, Score]:
    value = kl_divergence(predicted.stacked(), reference.stacked()) if predicted.by_id else math.nan
    return _scored(name, value, predicted)


def _inception(name: str, logits: _Features) -> dict[str, Score]:
    mean, std = inception_score(logits.stacked()) if logits.by_id else (math.nan, math.nan)
    note = "" if math.isfinite(mean) else "fewer than 10 clips"
    return _scored(f"{name}-mean", mean, logits, note) | _scored(f"{name}-std", std, logits, note)


def _scored(name: str, value: float, predicted: _Features, note: str = "") -> dict[str, Score]:
    _, unit, better = METRICS[name]
    return {name: Score(value, unit, better, len(predicted.by_id), predicted.dropped, note)}
