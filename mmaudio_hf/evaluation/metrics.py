"""The published metrics: formulas on arrays of features, Synchformer's offsets, and scores of cached features.

av-benchmark saves one file per extractor, a dictionary from ids to tensors. docs/evaluation.md names the scores.
"""

import math
import mmap
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import compress
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from scipy.linalg import solve_triangular, sqrtm
from scipy.spatial.distance import cdist
from scipy.special import log_softmax
from torch import Tensor, nn

from mmaudio_hf.schema import SYNC_DIM, checked
from mmaudio_hf.weights import load_state, load_strict

SYNC_CLASSES = np.linspace(-2, 2, 21, dtype=np.float32)  # s
_SHUFFLE_SEED = 2020
_OFFSET_BATCH = 8  # pairs of 8 s at once, of 2 x 198 tokens: 16 are 2 % slower, being larger than the caches


# --- Formulas ---------------------------------------------------------------------------------------------------------


@checked
def frechet_distance(predicted: ArrayLike, reference: ArrayLike) -> float:
    """Frechet distance of two Gaussians fitted to rows (n, d) (Heusel et al. 2017), covariances with n - 1.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); -1 when the root has an imaginary part above 1e-3, as the published
    metric does.
    """
    return _frechet(predicted, reference)[0]


def _frechet(predicted: ArrayLike, reference: ArrayLike) -> tuple[float, list[np.ndarray]]:
    """The distance, and what each row of both sides changes it by: its derivative by the weight of the row, times n.

    With L L' = C1 and Q S Q' = L' C2 L, the trace of the root is that of S^(1/2). The derivative by C1 is 1 - T, where
    T = L'^-1 Q S^(1/2) Q' L^-1 is the optimal transport from one Gaussian to the other, and by C2 it is 1 - T^-1.
    """
    rows = _sides(predicted, reference)
    means = [r.mean(0) for r in rows]
    covariances = [np.atleast_2d(np.cov(r, rowvar=False)) for r in rows]
    factor, inverse, regular = _factor(covariances[0])
    values, vectors = np.linalg.eigh(factor.T @ covariances[1] @ factor)
    values = values.clip(0)
    # Of full ranks the root is real, and its trace that of the symmetric problem: 2 s instead of 60 at d 2048.
    trace = float(np.sqrt(values).sum()) if regular and values[0] > 0 else _root_trace(*covariances)
    if trace < 0:
        return -1.0, []
    difference = means[0] - means[1]
    value = float(difference @ difference + sum(np.trace(c) for c in covariances) - 2 * trace)
    roots = np.sqrt(np.sqrt(values))
    scale = np.divide(1.0, roots, out=np.zeros_like(roots), where=values > 1e-10 * values.max(initial=0))
    maps = (roots[:, None] * (vectors.T @ inverse), scale[:, None] * (vectors.T @ factor.T))
    changes = []
    for r, mean, sign, to_other in zip(rows, means, (2, -2), maps, strict=True):
        centred = (r - mean).astype(np.float32, copy=False)
        moved = centred @ to_other.T.astype(np.float32)
        change = np.einsum("nd,nd->n", centred, centred) - np.einsum("nd,nd->n", moved, moved)
        change = change + sign * (centred @ difference.astype(np.float32))
        changes.append(change - change.mean())
    return value, changes


def _factor(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """L with L L' = covariance, its inverse (of singular ones the pseudo-inverse), and whether it has full rank."""
    try:
        factor = np.linalg.cholesky(covariance)
        return factor, solve_triangular(factor, np.eye(len(factor)), lower=True), True
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        kept = values > 1e-10 * values.max(initial=0)
        roots = np.sqrt(values[kept])
        return vectors[:, kept] * roots, (vectors[:, kept] / roots).T, False


def _root_trace(first: np.ndarray, second: np.ndarray) -> float:
    """Trace of the root of the product as the published metric computes it; -1 for a complex root."""
    root = sqrtm(first @ second)
    if not np.isfinite(root).all():  # a singular product
        offset = 1e-6 * np.eye(len(first))
        root = sqrtm((first + offset) @ (second + offset))
    if np.iscomplexobj(root):
        if np.abs(np.diagonal(root).imag).max() > 1e-3:
            return -1.0
        root = root.real
    return float(np.trace(root))


@checked
def kl_divergence(predicted: ArrayLike, reference: ArrayLike, activation: str = "softmax") -> float:
    """Mean over rows of KL(reference || predicted) for logits (n, classes).

    activation "sigmoid" takes every class as its own probability, without its complement, as the published code does.
    """
    if any(np.asarray(x).dtype.kind not in "fiu" for x in (predicted, reference)):
        raise ValueError("logits must be numbers")
    q, p = (torch.as_tensor(np.asarray(x)) for x in (predicted, reference))
    if p.shape != q.shape or p.ndim != 2 or not len(p):
        shapes = f"{tuple(q.shape)}, {tuple(p.shape)}"
        raise ValueError(f"logits of both sides must have one shape (n, classes), not {shapes}")
    logs = {"softmax": lambda x: x.log_softmax(1), "sigmoid": torch.nn.functional.logsigmoid}
    if activation not in logs:
        raise ValueError(f"activation {activation!r}: use softmax or sigmoid")
    return float(_divergences(q, p, logs[activation]).mean())


def _divergences(q: Tensor, p: Tensor, log: Callable[[Tensor], Tensor] = lambda x: x.log_softmax(1)) -> Tensor:
    """KL of each row, in float64, 1,000 rows at a time."""
    chunks = zip(q.split(1000), p.split(1000), strict=True)
    pairs = ((log(a.double()), log(b.double())) for a, b in chunks)
    return torch.cat([(log_p.exp() * (log_p - log_q)).sum(1) for log_q, log_p in pairs])


@checked
def inception_score(logits: ArrayLike, splits: int = 10, shuffle: bool = True) -> tuple[float, float]:
    """Mean and population standard deviation over splits of exp E KL(p || mean p) for logits (n, classes).

    (Salimans et al. 2016.) Rows are shuffled with a fixed seed; fewer rows than splits give NaN.
    """
    if splits < 1 or np.ndim(logits) != 2:
        raise ValueError(f"logits must be (n, classes) and splits at least 1, not {np.shape(logits)} and {splits}")
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


@checked
def kernel_distance(
    predicted: ArrayLike, reference: ArrayLike, subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """KID: mean and population standard deviation, over random subsets, of the squared MMD of rows (n, d).

    Binkowski et al. 2018: kernel (x y / d + 1)^3, without bias. The subsets have `size` rows of each side, at most as
    many as the smaller one has, and are drawn with a fixed seed. Computed in the type of the rows, as published: the
    terms are near 1, so float32 rows give 1e-7 of that, which is 2e-5 of a distance of 0.001.
    """
    predicted, reference = _sides(predicted, reference)
    size, generator = min(size, len(predicted), len(reference)), np.random.RandomState(_SHUFFLE_SEED)
    distances = []
    for _ in range(subsets):
        x, y = (rows[generator.choice(len(rows), size, replace=False)] for rows in (predicted, reference))
        distances.append(_unbiased_mmd(*((a @ b.T * (1 / a.shape[1]) + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))))
    return float(np.mean(distances)), float(np.std(distances))


@checked
def kernel_audio_distance(predicted: ArrayLike, reference: ArrayLike) -> float:
    """KAD of rows (n, d): 100 times the squared MMD, without bias, so that small sets can be compared.

    Chung et al. 2025, arXiv 2502.15602: kernel exp(-|x - y|^2 / 2 s^2), s the median distance within the reference.
    """
    return _kernel_audio(predicted, reference)[0]


def _kernel_audio(predicted: ArrayLike, reference: ArrayLike) -> tuple[float, list[np.ndarray]]:
    """The distance, and what each row of both sides changes it by, to first order, as `_frechet`; s stays as it is."""
    x, y = (rows.astype(np.float64) for rows in _sides(predicted, reference))

    def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if a.shape[1] < 16:
            return cdist(a, b, "sqeuclidean")
        return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T, 0)  # by one product

    squares = [squared_distances(a, b) for a, b in ((x, x), (y, y), (x, y))]
    width = np.median(squares[1][np.triu_indices(len(y), 1)])
    if not width > 0:
        raise ValueError("half of the reference features are equal: there is no kernel width")
    xx, yy, xy = (np.exp(square / (-2 * width)) for square in squares)
    changes = []
    for own, across in ((xx, xy.mean(1)), (yy, xy.mean(0))):
        change = 200 * ((own.sum(1) - np.diagonal(own)) / (len(own) - 1) - across)
        changes.append(change - change.mean())
    return 100 * _unbiased_mmd(xx, yy, xy), changes


def _sides(predicted: ArrayLike, reference: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(rows) for rows in (predicted, reference))
    if any(side.ndim != 2 or len(side) < 2 for side in (x, y)) or x.shape[1] != y.shape[1]:
        raise ValueError(f"give at least two rows of one width, not {x.shape} and {y.shape}")
    return x, y


def _unbiased_mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    """Squared MMD of kernel matrices without their diagonals (Gretton et al. 2012, eq. 3)."""
    sums = [(k.sum(1) - np.diagonal(k)).sum() for k in (xx, yy)]
    n, m = xy.shape
    # Of equal sizes in the order of the published sums, which in float32 is seen in the sixth digit.
    within = (sums[0] + sums[1]) / (n * (n - 1)) if n == m else sums[0] / (n * (n - 1)) + sums[1] / (m * (m - 1))
    return float(within - 2 * xy.sum(0).sum() / xy.size)


@checked
def mean_cosine(a: ArrayLike, b: ArrayLike) -> float:
    """Mean cosine of paired rows (n, d)."""
    return float(_cosines(a, b).mean())


def _cosines(a: ArrayLike, b: ArrayLike) -> Tensor:
    x, y = (torch.as_tensor(np.asarray(rows), dtype=torch.float64) for rows in (a, b))
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"features of both sides must have one shape (n, d), not {tuple(x.shape)}, {tuple(y.shape)}")
    return torch.cosine_similarity(x, y, dim=1)


@checked
def desync_score(classes: ArrayLike) -> float:
    """DeSync in seconds: mean absolute offset that Synchformer predicts, from class indices (n, 2) in 0..20.

    A pair has two, of its first and of its last 14 segments; the classes are 21 offsets from -2 to 2 s.
    """
    indices = np.asarray(classes)
    if indices.dtype.kind not in "iu" or not indices.size or indices.min() < 0 or indices.max() >= CLASSES:
        raise ValueError(f"classes must be indices from 0 to {CLASSES - 1}, not {repr(classes)[:80]}")
    return float(np.abs(SYNC_CLASSES[indices]).mean(dtype=np.float64))


@checked
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

    def of_first(self, x_BND: Tensor) -> Tensor:
        """The first token of the output, (B, D): q (K x) = (q K) x and mean of V x = V (mean of x), so that neither
        keys nor values of the others are made. The bias of keys is the same for each x: softmax does not see it.
        """
        key, value = (layer.weight.view(HEADS, -1, SYNC_DIM) for layer in (self.key, self.value))
        q_BHC = self.query(x_BND[:, 0]).unflatten(1, (HEADS, -1))
        weights_BHN = (torch.einsum("bhc,hcd->bhd", q_BHC, key) @ x_BND.mT * q_BHC.shape[2] ** -0.5).softmax(2)
        mixed_BHC = torch.einsum("bhd,hcd->bhc", weights_BHN @ x_BND, value)
        return self.proj(mixed_BHC.flatten(1) + self.value.bias)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(SYNC_DIM), nn.LayerNorm(SYNC_DIM)
        self.attn = _Attention()
        self.mlp = nn.Sequential(nn.Linear(SYNC_DIM, 4 * SYNC_DIM), nn.GELU(), nn.Linear(4 * SYNC_DIM, SYNC_DIM))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.ln1(x_BND))
        return x_BND + self.mlp(self.ln2(x_BND))

    def of_first(self, x_BND: Tensor) -> Tensor:
        """The first token of the output, (B, D)."""
        x_BD = x_BND[:, 0] + self.attn.of_first(self.ln1(x_BND))
        return x_BD + self.mlp(self.ln2(x_BD))


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vis_in_lnorm, self.aud_in_lnorm = nn.LayerNorm(SYNC_DIM), nn.LayerNorm(SYNC_DIM)
        self.OFF_tok, self.MOD_tok = (nn.Parameter(torch.empty(1, 1, SYNC_DIM)) for _ in range(2))
        tokens = 2 + SEGMENTS * (VIDEO_TOKENS + AUDIO_TOKENS)
        self.pos_emb_cfg = nn.ParameterDict({"pos_emb": torch.empty(1, tokens, SYNC_DIM)})
        self.blocks = nn.Sequential(*(_Block() for _ in range(DEPTH)))
        self.ln_f = nn.LayerNorm(SYNC_DIM)
        self.off_head = nn.Linear(SYNC_DIM, CLASSES)

    def forward(self, video_BND: Tensor, audio_BND: Tensor) -> Tensor:
        offset, separator = (token.expand(len(video_BND), -1, -1) for token in (self.OFF_tok, self.MOD_tok))
        tokens = [offset, self.vis_in_lnorm(video_BND), separator, self.aud_in_lnorm(audio_BND)]
        x_BND = torch.cat(tokens, dim=1) + self.pos_emb_cfg["pos_emb"]  # N = 1 + 14 * 8 + 1 + 14 * 6 = 198
        *blocks, last = self.blocks
        for block in blocks:
            x_BND = block(x_BND)
        # The rest of the last block is never read: a third of all.
        return self.off_head(self.ln_f(last.of_first(x_BND)))  # type: ignore[operator]  # a _Block


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


FAMILIES = ("fd", "kl", "is", "ib", "desync", "clap")  # of av-benchmark's own evaluation
NO_PARTNER = "no ground truth of this id"
NOT_FINITE = "features that are not finite"
TRUTH_NOT_FINITE = "ground truth whose features are not finite"
WRONG_SHAPE = "features of another shape"
TRUTH_WRONG_SHAPE = "ground truth whose features have another shape"
TOO_SHORT = f"fewer than {SEGMENTS} segments of Synchformer (4.8 s)"
COMPLEX_ROOT = "the matrix root is complex, for which the published metric gives -1"
_IDS_SHOWN = 20  # of those that were dropped for one reason
_KERNEL_ROWS = 5000  # of a side that a kernel distance takes: three matrices of 200 MB
_ROWS_PER_COLUMN = 10  # below them a Frechet distance is mostly bias, which falls with 1 / rows (arXiv 1911.07023)

# Published name -> family, unit, which values are better, and the file of the predictions.
_DISTANCE, _KERNEL = ("fd", "squared distance of features", "lower"), ("kad", "100 squared MMD", "lower")
_KL, _IS, _DEVIATION = ("kl", "nats", "lower"), ("is", "classes", "higher"), ("is", "classes", "")
_PANN, _EMBEDDING, _LOGITS = "pann_features.pth", "passt_features_embed.pth", "passt_logits.pth"
PANN_KEYS = ("2048", "logits")  # of an item
AESTHETICS, _AXES = "audiobox_aesthetics.pth", ("CE", "CU", "PC", "PQ")  # of the predictions alone
_METRICS = {
    "FD-VGG": (*_DISTANCE, "vggish_features.pth"),
    "FD-PANN": (*_DISTANCE, _PANN),
    "FD-PASST": (*_DISTANCE, _EMBEDDING),
    "KL-PANNS-softmax": (*_KL, _PANN),
    "KL-PASST-softmax": (*_KL, _LOGITS),
    "ISC-PANNS-mean": (*_IS, _PANN),
    "ISC-PANNS-std": (*_DEVIATION, _PANN),
    "ISC-PASST-mean": (*_IS, _LOGITS),
    "ISC-PASST-std": (*_DEVIATION, _LOGITS),
    "IB-Score": ("ib", "cosine", "higher", "imagebind_audio.pth"),
    "LAION-CLAP-Score": ("clap", "cosine", "higher", "clap_laion_audio.pth"),
    "MS-CLAP-Score": ("clap", "cosine", "higher", "clap_ms_audio.pth"),
    "DeSync": ("desync", "s", "lower", "synchformer_audio.pth"),
    "KAD-PANN": (*_KERNEL, _PANN),
    "KAD-PASST": (*_KERNEL, _EMBEDDING),
    **{f"AES-{axis}": ("aesthetics", "1 to 10", "" if axis == "PC" else "higher", AESTHETICS) for axis in _AXES},
}
METRICS = {name: metric[:3] for name, metric in _METRICS.items()}
FILES = {name: metric[3] for name, metric in _METRICS.items()}
# Files of the ground truth that have another name than those of the predictions.
TRUTH_FILES = {
    "imagebind_audio.pth": "imagebind_video.pth",
    "clap_laion_audio.pth": "clap_laion_text.pth",
    "clap_ms_audio.pth": "clap_ms_text.pth",
    "synchformer_audio.pth": "synchformer_video.pth",
}


@dataclass(frozen=True)
class Score:
    """One figure and what it was computed from."""

    value: float  # NaN where there was too little to compute it from
    unit: str
    better: str  # "lower", "higher", "zero" (signed differences), or "" for standard deviations
    used: int  # predictions that entered
    dropped: Mapping[str, Sequence[str]] = field(default_factory=dict)  # reason -> ids
    note: str = ""  # why the figure is none to compare
    warning: str = ""  # what to know when it is compared
    items: Mapping[str, float] = field(default_factory=dict)  # id -> its contribution: their mean is the value
    interval: tuple[float, float] | None = None  # 95 %, by `results.intervals`

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for a figure that is not finite, and the first ids of each reason."""
        value = self.value if math.isfinite(self.value) else None
        plain: dict[str, Any] = {"value": value, "unit": self.unit, "better": self.better, "used": self.used}
        plain |= {"interval": list(self.interval)} if self.interval else {}
        texts = {"note": self.note, "warning": self.warning}
        return plain | {"dropped": dropped_json(self.dropped)} | {name: text for name, text in texts.items() if text}


class Scores(dict[str, Score]):
    """Scores by name; `not_computed` has those that could not be computed, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.not_computed: dict[str, str] = {}


def dropped_json(dropped: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Dropped ids by reason as plain values: how many, and the first ones."""
    return [{"reason": reason, "count": len(ids), "ids": list(ids[:_IDS_SHOWN])} for reason, ids in dropped.items()]


@checked
def score_caches(
    gt_dir: str | PathLike,
    pred_dir: str | PathLike,
    *,
    paired: bool = True,
    desync_classes: Mapping[str, Sequence[int]] | None = None,
    sync_weights: str | PathLike | None = None,
    device: str | torch.device = "cpu",
    families: Collection[str] = FAMILIES,
    ids: Collection[str] | None = None,
) -> Scores:
    """The published scores of cached features in two folders, by their published names.

    Files that neither side has are left out, and so are scores of files that only the ground truth may have (video and
    text). A prediction is paired with the ground truth of its id, or else of its `clean_id`. paired=False compares
    distributions only. DeSync needs `sync_weights` (synchformer_state_dict.pth), or what its network predicted:
    `desync_classes`, prediction id -> class indices of `desync_score`. families: which scores to compute, also
    "kad" and "aesthetics". ids: predictions to compare, with their ground truth; None: all, with all of it.
    A file that one side lacks, or that cannot be read, costs its own scores; `not_computed` has the reason.
    ValueError when a folder has no cache, or no score can be computed.
    """
    caches, scores = _Caches(Path(gt_dir), Path(pred_dir), ids), Scores()
    for file in dict.fromkeys(FILES.values()):  # one file of each side is in memory at a time
        for name in [name for name in METRICS if FILES[name] == file and METRICS[name][0] in families]:
            try:
                if name != "DeSync" and (paired or METRICS[name][0] not in ("kl", "ib", "clap")):
                    scores |= _score(name, caches, paired)
                elif name == "DeSync" and paired and desync_classes:
                    classes = np.asarray(list(desync_classes.values()))
                    scores |= _offset_scores(_Features(list(desync_classes), [], {}), classes)
                elif name == "DeSync" and paired and sync_weights is not None:
                    scores |= _desync(caches, sync_weights, device)
            except ValueError as error:
                scores.not_computed[name] = str(error)
    if not scores and scores.not_computed:
        raise ValueError(next(iter(scores.not_computed.values())))
    return scores


@checked
def evaluate_caches(gt_dir: str | PathLike, pred_dir: str | PathLike, **options: Any) -> dict[str, float | int]:
    """`score_caches` as plain numbers: NAME, and beside it "NAME/used" and "NAME/dropped", counts of predictions.

    Scores that could not be computed are absent, with a warning. options: those of `score_caches`.
    """
    scores = score_caches(gt_dir, pred_dir, **options)
    for name, reason in scores.not_computed.items():
        warnings.warn(f"{name} is left out: {reason}", stacklevel=2)
    flat: dict[str, float | int] = {}
    for name, score in scores.items():
        dropped = sum(map(len, score.dropped.values()))
        flat |= {name: score.value, f"{name}/used": score.used, f"{name}/dropped": dropped}
    return flat


@dataclass
class _Features:
    """Features of one side: rows (n, d) of `ids`, or of VGGish, which has several rows of each id, `counts` rows."""

    ids: list[str]
    rows: Any  # array, or for what is too large for memory a list of tensors
    dropped: dict[str, list[str]]
    counts: np.ndarray | None = None

    def take(self, ids: Sequence[str], dropped: dict[str, list[str]] | None = None) -> "_Features":
        """Those of `ids`, in their order."""
        dropped = self.dropped if dropped is None else dropped
        if list(ids) == self.ids:
            return replace(self, dropped=dropped)
        index = {item_id: i for i, item_id in enumerate(self.ids)}
        order = [index[item_id] for item_id in ids]
        rows = self.rows[order] if isinstance(self.rows, np.ndarray) else [self.rows[i] for i in order]
        return _Features(list(ids), rows, dropped)


class _Caches:
    """The cache files of both folders."""

    def __init__(self, gt_dir: Path, pred_dir: Path, ids: Collection[str] | None):
        self.gt_dir, self.pred_dir = gt_dir, pred_dir
        self._ids = None if ids is None else {*ids, *map(clean_id, ids)}
        for folder in (gt_dir, pred_dir):
            if not any(folder.glob("*.pth")):
                raise ValueError(f"{folder} holds no cached features (*.pth)")
        self._name = ""  # of the file whose sides, by key, are in memory
        self._sides: tuple[dict[str, _Features], dict[str, _Features]] = {}, {}

    def read(self, name: str, key: str = "") -> tuple[_Features, _Features] | None:
        """Features of predictions and ground truth (`key` of those that are dicts); None when neither has any, or the
        ground truth none of video or text.
        """
        other = TRUTH_FILES.get(name)
        gt, pred = self.gt_dir / (other or name), self.pred_dir / name
        gt = pred if name == AESTHETICS else gt
        if not gt.is_file() and (other or not pred.is_file()):
            return None
        if self._name != name:
            self._name, self._sides = "", ({}, {})  # freed before the next is read
            ours = _read_cache(pred, gt, NOT_FINITE, WRONG_SHAPE, self._ids)
            theirs = _read_cache(gt, pred, TRUTH_NOT_FINITE, TRUTH_WRONG_SHAPE, self._ids)
            for sides in zip(ours.values(), theirs.values(), strict=True):
                widths = {np.shape(side.rows)[1:] for side in sides if isinstance(side.rows, np.ndarray)}
                if len(widths) > 1:
                    raise ValueError(f"{pred} and {gt} are of different networks: their features are {sorted(widths)}")
            self._name, self._sides = name, (ours, theirs)
        return self._sides[0][key], self._sides[1][key]

    def pair(self, predicted: _Features, reference: _Features) -> tuple[_Features, _Features]:
        """Both sides of the ids that have a partner, in the order of the predictions."""
        truth = set(reference.ids)
        invalid = {item_id: reason for reason, ids in reference.dropped.items() for item_id in ids}
        partners = {i: i if i in truth or i in invalid else clean_id(i) for i in predicted.ids}
        common = [i for i, partner in partners.items() if partner in truth]
        if not common:
            raise ValueError(f"{self.pred_dir} and {self.gt_dir} have no id in common")
        dropped = dict(predicted.dropped)
        for item_id, partner in partners.items():
            if partner not in truth:
                dropped.setdefault(invalid.get(partner, NO_PARTNER), []).append(item_id)
        return predicted.take(common, dropped), reference.take([partners[i] for i in common], {})


def _read_cache(
    path: Path, partner: Path, not_finite: str, wrong_shape: str, ids: Collection[str] | None = None
) -> dict[str, _Features]:
    """Features by key ("" where there are none) and id, of `ids` alone where they are given; those that are not finite,
    or of another shape than most, are dropped for these reasons.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing, but there is {partner}: extract the features of both sides")
    try:
        cache = read_tensors(path)
    except Exception as error:  # a damaged file can break the reader anywhere
        raise ValueError(f"{path} cannot be read as a cache of features: extract it again") from error
    if not isinstance(cache, dict) or not cache:
        raise ValueError(f"{path} must be a dictionary from ids to features: extract it again")
    cache = {str(i): value for i, value in cache.items() if ids is None or str(i) in ids}
    features = {}
    try:
        for key in PANN_KEYS if path.name == _PANN else ("",):
            values = {i: torch.as_tensor(value[key] if key else value) for i, value in cache.items()}
            features[key] = _stack(values, path.name, not_finite, wrong_shape)
    except (TypeError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(f"{path} holds entries that are not features: extract it again") from error
    return features


def read_tensors(path: Path) -> Any:
    """What torch.load(path, weights_only=True, mmap=True) returns, of plain dictionaries of tensors faster.

    It takes 60 us a tensor: for the 240,000 of 15,000 items as long as all scores. Anything else is left to it.
    """
    if not zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True)
    with suppress(LookupError, TypeError, ValueError, RuntimeError):
        records = torch._C.PyTorchFileReader(str(path))
        if sys.byteorder.encode() == records.get_record("byteorder"):
            with open(path, "rb") as file:  # private pages, as torch.load maps: torch takes no buffer that is read-only
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return _run_opcodes(records.get_record("data.pkl"), partial(_mapped, buffer, records))
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _mapped(buffer: mmap.mmap, records: Any, storage: tuple, start: int, *layout: Any) -> Tensor:
    """A tensor of a file that torch.save wrote."""
    kind, dtype, key, device, numel = storage
    span = _span(*layout[:2])
    if kind != "storage" or device != "cpu" or layout[2:] != (False, {}) or not span or start + span > numel:
        raise ValueError("not a plain tensor")
    offset = records.get_record_offset(f"data/{key}") + start * dtype.itemsize
    flat = torch.frombuffer(buffer, dtype=dtype, count=span, offset=offset)
    return flat if layout[1] == (1,) else flat.as_strided(*layout[:2])


@cache
def _span(shape: tuple, stride: tuple) -> int:
    """Elements from the first to the last; 0 for none."""
    return 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


_TENSOR, _HOOKS = "torch._utils\n_rebuild_tensor_v2\n", "collections\nOrderedDict\n"
_GLOBALS: dict[bytes, Any] = {name.encode(): name for name in (_TENSOR, _HOOKS)}
_GLOBALS |= {b"torch\nFloatStorage\n": torch.float32, b"torch\nDoubleStorage\n": torch.float64}
_GLOBALS |= {b"torch\nHalfStorage\n": torch.float16, b"torch\nBFloat16Storage\n": torch.bfloat16}


_INTEGERS = {0x4B: 1, 0x4D: 2, 0x4A: 4}  # opcode -> bytes of its number


def _run_opcodes(code: bytes, tensor: Callable[..., Tensor]) -> Any:
    """The dictionary that these opcodes of pickle's protocol 2 describe; nothing but `tensor` is ever called.

    LookupError, TypeError or ValueError for opcodes that a dictionary of tensors does not have.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    at = len(b"\x80\x02")
    while (op := code[at]) != 0x2E:  # STOP; the frequent ones come first
        at += 1
        if op == 0x72:  # LONG_BINPUT
            memo[int.from_bytes(code[at : at + 4], "little")] = stack[-1]
            at += 4
        elif op == 0x68:  # BINGET
            stack.append(memo[code[at]])
            at += 1
        elif op in _INTEGERS:  # BININT1, BININT2, BININT
            size = _INTEGERS[op]
            stack.append(int.from_bytes(code[at : at + size], "little", signed=size == 4))
            at += size
        elif op == 0x28:  # MARK
            marks.append(len(stack))
        elif op == 0x74:  # TUPLE
            start = marks.pop()
            stack[start:] = [tuple(stack[start:])]
        elif 0x85 <= op <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
            stack[0x84 - op :] = [tuple(stack[0x84 - op :])]
        elif op in (0x29, 0x89, 0x7D):  # EMPTY_TUPLE, NEWFALSE, EMPTY_DICT
            stack.append({} if op == 0x7D else () if op == 0x29 else False)
        elif op == 0x58:  # BINUNICODE
            size = int.from_bytes(code[at : at + 4], "little")
            at += 4 + size
            stack.append(code[at - size : at].decode())
        elif op == 0x52:  # REDUCE: a function and its arguments
            arguments, name = stack.pop(), stack.pop()
            stack.append(tensor(*arguments) if name == _TENSOR else {_HOOKS: {}}[name])
        elif op == 0x51:  # BINPERSID: the tuple on top is a storage
            pass
        elif op == 0x71:  # BINPUT
            memo[code[at]] = stack[-1]
            at += 1
        elif op == 0x6A:  # LONG_BINGET
            stack.append(memo[int.from_bytes(code[at : at + 4], "little")])
            at += 4
        elif op in (0x75, 0x73):  # SETITEMS, SETITEM
            start = marks.pop() if op == 0x75 else len(stack) - 2
            values = stack[start:]
            del stack[start:]
            stack[-1].update(zip(values[::2], values[1::2], strict=True))
        else:  # GLOBAL
            end = code.index(b"\n", code.index(b"\n", at) + 1) + 1
            stack.append({0x63: _GLOBALS}[op][code[at:end]])
            at = end
    (result,) = stack
    return result


def _stack(values: dict[str, Tensor], name: str, not_finite: str, wrong_shape: str) -> _Features:
    """One array of features. Dimensions of size 1 are dropped: (1, d) is (d,)."""
    several, wide = name.startswith("vggish"), name.startswith("synchformer")
    trimmed = {i: _trimmed(v, 4 if wide else 2 if several else 1, wide) for i, v in values.items()}
    shapes = {i: tuple(v.shape[several or wide :]) for i, v in trimmed.items() if v is not None}
    usual = Counter(shapes.values()).most_common(1)
    if not usual:
        raise TypeError("none has the dimensions of features")
    kept = [i for i, shape in shapes.items() if shape == usual[0][0]]
    dropped = {wrong_shape: sorted(set(values) - set(kept))} if len(kept) < len(values) else {}
    rows = [v for i in kept if (v := trimmed[i]) is not None]
    counts = np.array([len(row) for row in rows]) if several else None
    if wide:  # 1 MB of each pair: they stay in their file
        finite = np.array([bool(row.isfinite().all()) for row in rows])
        array: Any = [row for row, good in zip(rows, finite, strict=True) if good]
    else:
        kind = torch.float64 if any(row.dtype == torch.float64 for row in rows) else torch.float32
        array = (torch.cat if several else torch.stack)([row.to(kind) for row in rows]).numpy()
        finite = np.isfinite(array).all(1)
        if counts is not None:
            by_row, finite = finite, np.logical_and.reduceat(finite, np.r_[0, counts.cumsum()[:-1]])
            by_row[:] = finite.repeat(counts)
            array, counts = (array, counts) if finite.all() else (array[by_row], counts[finite])
        elif not finite.all():
            array = array[finite]
    if not finite.all():
        dropped[not_finite] = sorted(i for i, good in zip(kept, finite, strict=True) if not good)
    return _Features([i for i, good in zip(kept, finite, strict=True) if good], array, dropped, counts)


def _trimmed(value: Tensor, dimensions: int, wide: bool) -> Tensor | None:
    """`value` with as many dimensions, None where it has others."""
    if wide:
        return value if value.ndim == dimensions - 1 else None
    if value.ndim != dimensions:
        value = value.squeeze()
        if dimensions == 2 and value.ndim == 1:
            value = value[None]
    return value if value.ndim == dimensions and value.numel() else None


def _score(name: str, caches: _Caches, paired: bool) -> dict[str, Score]:
    """One score; {} where there are no files for it."""
    family, file = METRICS[name][0], FILES[name]
    key = "" if file != _PANN else "logits" if family in ("kl", "is") else "2048"
    sides = caches.read(file, key)
    if sides is None or name.endswith("-std"):
        return {}
    predicted, reference = sides
    if file == _PANN and family == "kl":  # only ids that are equal, without `clean_id`
        truth = set(reference.ids)
        alone = [i for i in predicted.ids if i not in truth]
        ids = [i for i in predicted.ids if i in truth]
        dropped = predicted.dropped | ({NO_PARTNER: alone} if alone else {})
        predicted, reference = predicted.take(ids, dropped), reference.take(ids)
    elif family in ("ib", "clap") or (paired and file in (_EMBEDDING, _LOGITS)):
        predicted, reference = caches.pair(predicted, reference)
    elif family in ("fd", "kad"):
        predicted = replace(predicted, dropped=predicted.dropped | reference.dropped)
    if family in ("fd", "kad"):
        return _distance(name, predicted, reference)
    if family == "is":
        return _inception(name, predicted)
    if family == "aesthetics":
        return _scored(name, predicted, predicted.rows[:, _AXES.index(name[-2:])])
    ours, theirs = torch.from_numpy(predicted.rows), torch.from_numpy(reference.rows)
    items = _divergences(ours, theirs) if family == "kl" else _cosines(ours, theirs)
    return _scored(name, predicted, items.numpy())


def _scored(
    name: str, predicted: _Features, items: np.ndarray, value: float | None = None, note: str = "", warning: str = ""
) -> dict[str, Score]:
    """The score with these contributions of its items, and with their mean unless a `value` is given."""
    _, unit, better = METRICS[name]
    if value is None:
        value = float(items.mean()) if len(items) else math.nan
    by_id = dict(zip(predicted.ids, items.tolist(), strict=True)) if len(items) else {}
    dropped = {reason: ids for reason, ids in predicted.dropped.items() if ids}
    return {name: Score(value, unit, better, len(predicted.ids), dropped, note, warning, by_id)}


def _distance(name: str, predicted: _Features, reference: _Features) -> dict[str, Score]:
    """A Frechet or a kernel distance, with what each item changes it by: its prediction, and the truth of its id."""
    kernel, sides, warning = METRICS[name][0] == "kad", [predicted, reference], ""
    rows, columns = min(len(side.rows) for side in sides), np.shape(predicted.rows)[1:]
    if rows < 2:
        return _scored(name, predicted, np.empty(0), math.nan)
    if kernel and max(len(side.rows) for side in sides) > _KERNEL_ROWS:
        # The same rows of sets of one size, so that pairs stay pairs.
        orders = [np.random.RandomState(_SHUFFLE_SEED).permutation(len(side.rows)) for side in sides]
        chosen = [np.sort(order[:_KERNEL_ROWS]) for order in orders]
        sides = [side.take([side.ids[i] for i in rows_of]) for side, rows_of in zip(sides, chosen, strict=True)]
        warning = f"of {_KERNEL_ROWS:,} random items"
    elif not kernel and rows < _ROWS_PER_COLUMN * columns[0]:
        warning = f"{rows:,} rows of {columns[0]} columns: biased upwards, compare equal numbers of items only"
    value, changes = (_kernel_audio if kernel else _frechet)(*(side.rows for side in sides))
    if value == -1.0 and not changes:
        return _scored(name, predicted, np.empty(0), value, COMPLEX_ROOT)
    by_side = []
    for side, change in zip(sides, changes, strict=True):
        if side.counts is not None:  # an item changes it by what all of its rows do
            change = np.add.reduceat(change, np.r_[0, side.counts.cumsum()[:-1]]) / side.counts.mean()
        by_side.append(change)
    partners = dict(zip(sides[1].ids, by_side[1], strict=True))
    both = by_side[0] + np.array([partners.get(i, partners.get(clean_id(i), 0.0)) for i in sides[0].ids])
    items = dict(zip(sides[0].ids, (value + both - both.mean()).tolist(), strict=True))
    (score,) = _scored(name, predicted, np.empty(0), value, warning=warning).values()
    return {name: replace(score, items=items)}


def _inception(name: str, predicted: _Features) -> dict[str, Score]:
    """Mean and deviation over ten splits; the contributions are those to the score of all rows at once."""
    mean, std = inception_score(predicted.rows) if predicted.ids else (math.nan, math.nan)
    deviation, none = name.replace("-mean", "-std"), np.empty(0)
    if not math.isfinite(mean):
        values = {name: mean, deviation: std}.items()
        return {n: _scored(n, predicted, none, value, "fewer than 10 clips")[n] for n, value in values}
    log_p = log_softmax(np.asarray(predicted.rows, np.float64), axis=1)
    p = np.exp(log_p)
    divergence = (p * log_p).sum(1) - p @ np.log(p.mean(0))
    change = math.exp(divergence.mean()) * (divergence - divergence.mean())
    return _scored(name, predicted, mean + change, mean) | _scored(deviation, predicted, none, std)


def _desync(caches: _Caches, sync_weights: str | PathLike, device: str | torch.device) -> dict[str, Score]:
    if (sides := caches.read("synchformer_audio.pth")) is None:
        return {}
    predicted, reference = caches.pair(*sides)
    long = [min(len(a), len(b)) >= SEGMENTS for a, b in zip(predicted.rows, reference.rows, strict=True)]
    if not any(long):
        raise ValueError(f"no pair has Synchformer features of at least {SEGMENTS} segments (4.8 s)")
    short = [i for i, is_long in zip(predicted.ids, long, strict=True) if not is_long]
    dropped = predicted.dropped | ({TOO_SHORT: short} if short else {})
    predicted = predicted.take(list(compress(predicted.ids, long)), dropped)
    reference = reference.take(list(compress(reference.ids, long)))
    head = OffsetHead().load_released(sync_weights).to(device)
    batches = []
    # Lengths differ where clips do; the ends that are compared are of one length.
    for i in range(0, len(predicted.ids), _OFFSET_BATCH):
        rows = (side.rows[i : i + _OFFSET_BATCH] for side in (reference, predicted))
        ends = ([torch.cat([value[:SEGMENTS], value[-SEGMENTS:]]) for value in values] for values in rows)
        batches.append(head.classes(*map(torch.stack, ends)))  # (n, 2 x 14, tokens, width) each
    return _offset_scores(predicted, torch.cat(batches).numpy())


def _offset_scores(predicted: _Features, classes: np.ndarray) -> dict[str, Score]:
    """The score of class indices (n, 2), with the mean absolute offset of each pair."""
    value = desync_score(classes)
    return _scored("DeSync", predicted, np.abs(SYNC_CLASSES[classes]).astype(np.float64).mean(1), value)
