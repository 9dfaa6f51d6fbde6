"""The published metrics on rows of features (spec media, section 6): the formulas alone, on plain arrays."""

import numpy as np
import torch
from scipy.linalg import sqrtm
from scipy.special import log_softmax

_SPLITS = 10
_SHUFFLE_SEED = 2020
SYNC_CLASSES = np.linspace(-2, 2, 21, dtype=np.float32)  # s


def frechet_distance(predicted, reference) -> float:
    """Frechet distance of two Gaussians fitted to rows (n, d) (Heusel et al. 2017), covariances with n - 1.

    -1 when the matrix root has an imaginary part above 1e-3, as the published metric does.
    """
    rows = [np.asarray(values) for values in (predicted, reference)]
    if any(r.ndim != 2 or len(r) < 2 for r in rows) or rows[0].shape[1] != rows[1].shape[1]:
        raise ValueError(f"two sets of at least two rows of one width are needed, not {rows[0].shape}, {rows[1].shape}")
    means = [r.mean(0) for r in rows]
    covariances = [np.atleast_2d(np.cov(r, rowvar=False)) for r in rows]
    root = sqrtm(covariances[0] @ covariances[1])
    if not np.isfinite(root).all():
        offset = 1e-6 * np.eye(len(means[0]))
        root = sqrtm((covariances[0] + offset) @ (covariances[1] + offset))
    if np.iscomplexobj(root):
        if np.abs(np.diagonal(root).imag).max() > 1e-3:
            return -1.0
        root = root.real
    difference = means[0] - means[1]
    traces = sum(np.trace(covariance) for covariance in covariances)
    return float(difference @ difference + traces - 2 * np.trace(root))


def kl_divergence(predicted, reference, activation: str = "softmax") -> float:
    """Mean over rows of KL(reference || predicted) for logits (n, classes).

    activation "sigmoid" takes every class as its own probability, without its complement, as the published code does.
    """
    q, p = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (predicted, reference))
    if p.shape != q.shape or p.ndim != 2 or not len(p):
        raise ValueError(
            f"logits of both sides must have one shape (n, classes), not {tuple(q.shape)}, {tuple(p.shape)}"
        )
    logs = {"softmax": lambda x: x.log_softmax(1), "sigmoid": torch.nn.functional.logsigmoid}
    if activation not in logs:
        raise ValueError(f"activation {activation!r}: use softmax or sigmoid")
    log_q, log_p = logs[activation](q), logs[activation](p)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def inception_score(logits, splits: int = _SPLITS, shuffle: bool = True) -> tuple[float, float]:
    """Mean and population standard deviation over splits of exp E KL(p || mean p) for logits (n, classes).

    (Salimans et al. 2016.) Rows are shuffled with a fixed seed; fewer rows than splits give NaN.
    """
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    if len(log_p) < splits:
        return float("nan"), float("nan")
    if shuffle:
        log_p = log_p[np.random.RandomState(_SHUFFLE_SEED).permutation(len(log_p))]
    scores = []
    for k in range(splits):
        part = log_p[k * len(log_p) // splits : (k + 1) * len(log_p) // splits]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(predicted, reference, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """KID: mean and population standard deviation, over random subsets, of the squared MMD of rows (n, d).

    Binkowski et al. 2018: kernel (x y / d + 1)^3, without bias. The subsets have `size` rows of each side, at most as
    many as the smaller one has, and are drawn with a fixed seed. Published beside the others, not part of their tables.
    """
    predicted, reference = (np.asarray(rows, np.float64) for rows in (predicted, reference))
    if min(len(predicted), len(reference)) < 2 or predicted.shape[1:] != reference.shape[1:]:
        raise ValueError(f"give at least two rows of one width, not {predicted.shape} and {reference.shape}")
    size, draw = min(size, len(predicted), len(reference)), np.random.RandomState(_SHUFFLE_SEED)
    distances = []
    for _ in range(subsets):
        x, y = (rows[draw.choice(len(rows), size, replace=False)] for rows in (predicted, reference))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        inside = sum(kernel.sum() - np.trace(kernel) for kernel in (xx, yy)) / (size * (size - 1))
        distances.append(inside - 2 * xy.mean())
    return float(np.mean(distances)), float(np.std(distances))


def mean_cosine(a, b) -> float:
    """Mean cosine of paired rows (n, d)."""
    a, b = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (a, b))
    return float(torch.cosine_similarity(a, b, dim=1).mean())


def desync_score(classes) -> float:
    """DeSync in seconds: mean size of the offsets that Synchformer predicts, from class indices (n, 2) in 0..20.

    A pair is judged by its first and by its last 14 segments; the classes are 21 offsets from -2 to 2 s.
    """
    return float(np.abs(SYNC_CLASSES[np.asarray(classes, int)]).mean(dtype=np.float64))


def clean_id(item_id: str) -> str:
    """The id a prediction is paired by: names of 30, 20 or 21 characters carry counters that are cut off."""
    return {30: item_id[10:28], 20: item_id[:18], 21: item_id[1:19]}.get(len(item_id), item_id)
