"""Scores of generated sound: event timing, sound statistics, and the published metrics on cached features.

Everything takes plain arrays or files; the networks behind the cached features are not needed here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from scipy.linalg import sqrtm
from scipy.ndimage import maximum_filter1d, uniform_filter1d
from scipy.signal import stft
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.special import log_softmax

# --- event timing --------------------------------------------------------------------------------------------------

_ONSET_HOP = 0.01  # s
_ONSET_WINDOW = 0.04  # s
_ONSET_BANDS = 40
_ONSET_RANGE = 45.0  # dB below the loudest band value; what is quieter counts as silence
_ONSET_RISE = 3  # hops over which a rise is measured
_ONSET_CONTEXT = 0.25  # s on each side, for the mean that a rise must exceed
_ONSET_APART = 0.15  # s between two onsets
_ONSET_STRENGTH = 0.4  # of the strongest rises of the clip
_ONSET_LEAST = 3.0  # dB averaged over the bands; the least that counts as a rise at all
_SILENCE_DBFS = -70.0


def onset_times(waveform, sample_rate: int) -> np.ndarray:
    """Times in seconds, ascending, at which sounds begin in `waveform` (samples,).

    Spectral flux on mel bands in decibels (Bello et al. 2005): rises over 30 ms are added over the bands, and a
    local maximum counts that exceeds the mean around it and 0.4 of the strongest rises in the clip. Levels are
    relative to the clip's own, so loudness does not matter; a clip below -70 dBFS has no onsets.
    """
    flux, hop = _spectral_flux(np.asarray(waveform, np.float64), sample_rate)
    if not flux.size:
        return np.zeros(0)
    # The mean of the strongest few, not the strongest: one loud click must not hide the events.
    strongest = np.sort(flux)[-max(3, flux.size // 100) :].mean()
    context = uniform_filter1d(flux, 2 * round(_ONSET_CONTEXT / hop) + 1, mode="nearest")
    threshold = np.maximum(context + _ONSET_STRENGTH * strongest / 2, max(_ONSET_STRENGTH * strongest, _ONSET_LEAST))
    peak = flux == maximum_filter1d(flux, 2 * round(_ONSET_APART / hop) + 1, mode="constant")
    # A rise is strongest in the hop whose windows reach half their length into the sound.
    return np.flatnonzero(peak & (flux > threshold)) * hop + _ONSET_WINDOW / 2


def _spectral_flux(samples: np.ndarray, sample_rate: int) -> tuple[np.ndarray, float]:
    """Mean rise over the bands in dB, per hop, and the hop in seconds. Entry i is about sounds that begin at i hops."""
    hop, window = round(_ONSET_HOP * sample_rate), round(_ONSET_WINDOW * sample_rate)
    if samples.ndim != 1:
        raise ValueError(f"a waveform must be (samples,), not {samples.shape}")
    if samples.size < window or np.abs(samples).max() < 10 ** (_SILENCE_DBFS / 20):
        return np.zeros(0), hop / sample_rate
    spectrum = stft(samples, sample_rate, nperseg=window, noverlap=window - hop, boundary="even", padded=False)[2]
    power = _mel_bank(window // 2 + 1, sample_rate) @ np.abs(spectrum) ** 2
    level = 10 * np.log10(power / power.max() + 1e-12).clip(min=-_ONSET_RANGE)
    # Entry i compares the level just after i hops with that just before.
    padded = np.pad(level, ((0, 0), (_ONSET_RISE // 2, _ONSET_RISE - _ONSET_RISE // 2)), mode="edge")
    rise = padded[:, _ONSET_RISE:] - padded[:, :-_ONSET_RISE]
    whole = (samples.size - window // 2) // hop - 1  # the rest compares windows that are cut off by the end
    return np.maximum(rise, 0).mean(0)[:whole], hop / sample_rate


def _mel_bank(bins: int, sample_rate: int, bands: int = _ONSET_BANDS) -> np.ndarray:
    bank = torchaudio.functional.melscale_fbanks(bins, 50.0, min(8000.0, sample_rate / 2), bands, sample_rate)
    return bank.T.double().numpy()


def onset_f1(predicted, reference, tolerance: float = 0.1) -> tuple[float, float, float]:
    """Precision, recall and F1 of onset times in seconds, at most `tolerance` apart and matched one to one.

    The matching is the largest possible one, as in the MIREX onset task; all three are 0 when either side is empty.
    """
    predicted, reference = np.sort(np.asarray(predicted, float)), np.sort(np.asarray(reference, float))
    if not predicted.size or not reference.size:
        return 0.0, 0.0, 0.0
    near = (predicted >= reference[:, None] - tolerance) & (predicted <= reference[:, None] + tolerance)
    matched = int((maximum_bipartite_matching(csr_array(near)) >= 0).sum())
    precision, recall = matched / predicted.size, matched / reference.size
    return precision, recall, 2 * matched / (predicted.size + reference.size)


def onset_scores(
    detected: Sequence[np.ndarray], events: Sequence[Sequence[float]], *, duration: float, tolerance=0.1, seed: int = 0
) -> dict[str, float]:
    """Means over clips of the agreement between detected onsets and the clips' event times, both in seconds.

    Events from `duration` on do not count. "f1_shuffled" is the control: the same sounds against the events of other
    clips, averaged over ten pairings; NaN where no pairing exists. "clips" is how many were scored.
    """
    inside = [[time for time in times if time < duration] for times in events]
    right = [onset_f1(d, e, tolerance) for d, e in zip(detected, inside, strict=True)]
    try:
        orders = [shuffled_pairing(len(inside), seed + k, inside) for k in range(10)]
        shuffled = float(
            np.mean([onset_f1(detected[i], inside[j], tolerance)[2] for o in orders for i, j in enumerate(o)])
        )
    except ValueError:
        shuffled = float("nan")
    precision, recall, f1 = np.mean(right, axis=0) if right else (float("nan"),) * 3
    means = {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    return {**means, "f1_shuffled": shuffled, "clips": len(right)}


def shuffled_pairing(n: int, seed: int = 0, events: Sequence[Sequence[float]] | None = None) -> np.ndarray:
    """A permutation (n,) that leaves no index in its place: partners for a control without the right pairs.

    With `events`, the event times of each clip, partners also differ in them. ValueError when there is no such pairing
    (n < 2, or most clips have the same events).
    """
    keys = list(range(n)) if events is None else [tuple(times) for times in events]
    if n != len(keys):
        raise ValueError(f"{len(keys)} lists of events were given for {n} clips")
    generator = np.random.default_rng(seed)
    for _ in range(1000):  # one draw in e succeeds
        order = generator.permutation(n)
        if n and all(i != j and keys[i] != keys[j] for i, j in enumerate(order)):
            return order
    raise ValueError(
        f"{n} clips cannot be paired with others that differ: at least two with different events are needed"
    )


# --- statistics of sound -------------------------------------------------------------------------------------------

_SCORE_WINDOW, _SCORE_HOP, _SCORE_BANDS = 0.064, 0.016, 80  # s, s


def waveform_scores(predicted, reference, sample_rate: int) -> dict[str, float]:
    """How far a sound is from the true one, both (samples,); the longer is cut to the length of the shorter.

    "log_mel_distance": root mean square over time and 80 mel bands in dB, both clipped 80 dB below the louder one's
    maximum. "loudness_difference": RMS levels in dB. "centroid_difference" in octaves and "flatness_difference" in dB
    compare the mean power spectra. "envelope_correlation": Pearson's, of the levels in dB over time (0 if one is
    constant). Signed differences are predicted minus reference.
    """
    pair = [np.asarray(waveform, np.float64).reshape(-1) for waveform in (predicted, reference)]
    length, window = min(samples.size for samples in pair), round(_SCORE_WINDOW * sample_rate)
    if length < window:
        raise ValueError(f"{length} samples are too few to compare: at least {window} are needed")
    hop = round(_SCORE_HOP * sample_rate)
    spectra = [
        np.abs(stft(samples[:length], sample_rate, nperseg=window, noverlap=window - hop)[2]) ** 2 for samples in pair
    ]
    bank = _mel_bank(window // 2 + 1, sample_rate, _SCORE_BANDS)
    mels = [bank @ power for power in spectra]
    floor = max(max(mel.max() for mel in mels) * 1e-8, 1e-20)
    levels = [10 * np.log10(np.maximum(mel, floor)) for mel in mels]
    envelopes = [10 * np.log10(np.maximum(mel.sum(0), floor)) for mel in mels]
    rms = [10 * np.log10(np.mean(samples[:length] ** 2) + 1e-12) for samples in pair]
    centroid, flatness = zip(*(_spectrum_shape(power.mean(1), sample_rate) for power in spectra), strict=True)
    steady = min(envelope.std() for envelope in envelopes) < 1e-9
    return {
        "log_mel_distance": float(np.sqrt(np.mean((levels[0] - levels[1]) ** 2))),
        "loudness_difference": float(rms[0] - rms[1]),
        "centroid_difference": float(np.log2(centroid[0] / centroid[1])),
        "flatness_difference": float(flatness[0] - flatness[1]),
        "envelope_correlation": 0.0 if steady else float(np.corrcoef(envelopes)[0, 1]),
    }


def _spectrum_shape(power: np.ndarray, sample_rate: int) -> tuple[float, float]:
    """Centroid in Hz and flatness (geometric over arithmetic mean) in dB of a power spectrum; DC is left out."""
    power = power[1:] + 1e-20
    frequencies = np.arange(1, power.size + 1) * sample_rate / (2 * power.size)
    flatness = 10 * (np.log10(power).mean() - np.log10(power.mean()))
    return float(frequencies @ power / power.sum()), float(flatness)


# --- published metrics on cached features (spec media, section 6) --------------------------------------------------

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


def evaluate_caches(
    gt_dir, pred_dir, *, paired: bool = True, desync_classes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, float | int]:
    """The published scores of cached features in two folders (spec media, section 6), by their published names.

    Files are dicts id -> tensor as av-benchmark saves them; those that neither side has are left out. paired=False
    compares distributions only. desync_classes: prediction id -> the two class indices of `desync_score`.
    Beside each score NAME, "NAME/used" and "NAME/dropped" count the predictions that entered and that had no partner.
    ValueError when a folder has no cache, one side lacks a file of the other, or a file cannot be read.
    """
    caches = _Caches(Path(gt_dir), Path(pred_dir), paired)
    scores: dict[str, float | int] = {}
    if both := caches.both("vggish_features.pth"):
        scores |= _scored("FD-VGG", frechet_distance(*(np.concatenate(_rows(side)) for side in both)), len(both[0]))
    if both := caches.both("pann_features.pth"):
        scores |= _pann_scores(*both, paired)
    if both := caches.both("passt_features_embed.pth"):
        pairs, dropped = caches.pairs(*both)
        sides = _columns(pairs) if paired else [_rows(side) for side in both]
        scores |= _scored("FD-PASST", frechet_distance(*sides), len(sides[0]), dropped)
    if both := caches.both("passt_logits.pth"):
        pairs, dropped = caches.pairs(*both)
        if paired:
            scores |= _scored("KL-PASST-softmax", kl_divergence(*_columns(pairs)), len(pairs), dropped)
        logits = _columns(pairs)[0] if paired else _rows(both[0])
        scores |= _inception("ISC-PASST", logits, dropped)
    if not paired:
        return scores
    for name, pred_file, gt_file in (
        ("IB-Score", "imagebind_audio.pth", "imagebind_video.pth"),
        ("LAION-CLAP-Score", "clap_laion_audio.pth", "clap_laion_text.pth"),
        ("MS-CLAP-Score", "clap_ms_audio.pth", "clap_ms_text.pth"),
    ):
        if both := caches.both(pred_file, gt_file):
            pairs, dropped = caches.pairs(*both)
            scores |= _scored(name, mean_cosine(*_columns(pairs)), len(pairs), dropped)
    if desync_classes:
        scores |= _scored("DeSync", desync_score(list(desync_classes.values())), len(desync_classes))
    return scores


class _Caches:
    """The cache files of both folders."""

    def __init__(self, gt_dir: Path, pred_dir: Path, paired: bool):
        self.gt_dir, self.pred_dir, self.paired = gt_dir, pred_dir, paired
        for folder in (gt_dir, pred_dir):
            if not any(folder.glob("*.pth")):
                raise ValueError(f"{folder} holds no cached features (*.pth)")

    def both(self, name: str, gt_name: str = "") -> tuple[dict, dict] | None:
        """Prediction's and ground truth's cache; None when the ground truth has none, or no side has."""
        gt, pred = self.gt_dir / (gt_name or name), self.pred_dir / name
        if not gt.is_file() and (gt_name or not pred.is_file()):
            return None
        return _read_cache(pred, gt), _read_cache(gt, pred)

    def pairs(self, predicted: dict, reference: dict) -> tuple[list[tuple[Any, Any]], int]:
        """Values of ids that both have, in the order of the predictions, and how many predictions had no partner."""
        pairs = [(v, reference[clean_id(k)]) for k, v in predicted.items() if clean_id(k) in reference]
        if not self.paired:
            return [], 0
        if not pairs:
            raise ValueError(f"{self.pred_dir} and {self.gt_dir} have no id in common")
        return pairs, len(predicted) - len(pairs)


def _read_cache(path: Path, partner: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is missing, but there is {partner}: extract the features of both sides")
    try:
        cache = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can break the reader anywhere
        raise ValueError(f"{path} cannot be read as a cache of features; extract it anew") from error
    if not isinstance(cache, dict) or not cache:
        raise ValueError(f"{path} must be a dictionary from ids to features; extract it anew")
    return cache


def _rows(cache: Mapping[str, Any]) -> list[np.ndarray]:
    return [np.asarray(value) for value in cache.values()]


def _columns(pairs: Sequence[tuple[Any, Any]]) -> list[np.ndarray]:
    return [np.stack([np.asarray(value) for value in column]) for column in zip(*pairs, strict=True)]


def _pann_scores(predicted: dict, reference: dict, paired: bool) -> dict[str, float | int]:
    """FD and IS use all ids of each side; KL only ids that are equal, without the cleaning of `clean_id`."""
    embeddings = [np.stack([np.asarray(v["2048"]) for v in side.values()]) for side in (predicted, reference)]
    scores = _scored("FD-PANN", frechet_distance(*embeddings), len(predicted))
    if paired:
        common = [(v["logits"], reference[k]["logits"]) for k, v in predicted.items() if k in reference]
        value = kl_divergence(*_columns(common)) if common else float("nan")
        scores |= _scored("KL-PANNS-softmax", value, len(common), len(predicted) - len(common))
    return scores | _inception("ISC-PANNS", [np.asarray(v["logits"]) for v in predicted.values()])


def _inception(name: str, logits, dropped: int = 0) -> dict[str, float | int]:
    mean, std = inception_score(np.stack(logits))
    return {f"{name}-mean": mean, f"{name}-std": std, f"{name}/used": len(logits), f"{name}/dropped": dropped}


def _scored(name: str, value: float, used: int, dropped: int = 0) -> dict[str, float | int]:
    return {name: value, f"{name}/used": used, f"{name}/dropped": dropped}
