"""Intervals of scores, and which of several runs is called best."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mmaudio_hf.evaluation import frechet_distance, kernel_audio_distance, kernel_distance, score_caches
from mmaudio_hf.evaluation.metrics import Score, _divergences, _frechet, _kernel_audio
from mmaudio_hf.evaluation.results import (
    best_of,
    category_scores,
    ids_json,
    interval,
    of_common_items,
    read_categories,
    read_clips,
    resampled_means,
    with_intervals,
)


def test_intervals_are_those_of_the_mean():
    """Of a large sample: mean +- 1.96 deviations / root n; each score over the items that it has."""
    values = np.random.default_rng(0).standard_normal(4000) + 2
    items = {f"id{i}": float(v) for i, v in enumerate(values)}
    half = dict(list(items.items())[:2000])
    scores = {name: Score(1.0, "", "lower", len(i), items=i) for name, i in (("all", items), ("half", half))}
    scored = with_intervals(scores | {"none": Score(1.0, "", "lower", 3)})
    for name, own in (("all", values), ("half", values[:2000])):
        margin = 1.96 * own.std() / np.sqrt(len(own))
        expected = own.mean() - margin, own.mean() + margin
        assert scored[name].interval == pytest.approx(expected, abs=0.1 * margin)
        assert scored[name].to_json()["interval"] == list(scored[name].interval)
    assert scored["none"].interval is None and "interval" not in scored["none"].to_json()


def test_best_means_beyond_the_interval_of_the_paired_difference():
    generator = np.random.default_rng(1)
    common = generator.standard_normal(200)  # items differ far more than runs do
    runs = [common + offset + 0.05 * generator.standard_normal(200) for offset in (0.0, 0.02, 0.0)]
    columns = [{f"id{i}": float(v) for i, v in enumerate(run)} for run in runs]
    assert best_of(columns[:2], lambda mean: mean) == 0 and best_of(columns[:2], lambda mean: -mean) == 1
    assert best_of([columns[0], columns[2]], lambda mean: mean) is None
    assert best_of([columns[0], {"other": 1.0}], lambda mean: mean) is None


def test_contributions_of_items_move_as_the_distance_does():
    """Leaving out a row changes the distance by its contribution, to first order; in both sets, also of low rank."""
    generator = np.random.default_rng(2)
    predicted, reference = generator.standard_normal((4000, 6)) * 1.5 + 0.3, generator.standard_normal((4000, 6))
    for rank in (6, 4):
        x, y = predicted.copy(), reference.copy()
        x[:, rank:], y[:, rank:] = 0.0, 0.0
        value, changes = _frechet(x, y)
        for side, change in enumerate(changes):
            sets = [[x, y], [x, y]]
            for row in (0, 7):
                sets[side][side] = np.delete((x, y)[side], row, axis=0)
                left_out = frechet_distance(*sets[side])
                assert (value - left_out) * 4000 == pytest.approx(change[row], rel=0.02, abs=0.02)


def test_contributions_to_the_kernel_distance():
    generator = np.random.default_rng(5)
    sides = [generator.standard_normal((400, 6)) * 1.5 + 0.3, generator.standard_normal((400, 6))]
    value, changes = _kernel_audio(*sides)
    assert value == kernel_audio_distance(*sides)
    x, y = sides
    for row in (0, 7, 9):
        left_out = kernel_audio_distance(np.delete(x, row, axis=0), y)
        assert (value - left_out) * 400 == pytest.approx(changes[0][row], rel=0.02, abs=0.1)
    # The kernel has the width of the reference, so its rows are left out of the mean distances alone.
    width = np.median([np.linalg.norm(p - q) for i, p in enumerate(y) for q in y[i + 1 :]])
    kernel = lambda p, rows: np.exp(-(np.linalg.norm(p - rows, axis=1) ** 2) / (2 * width**2))  # noqa: E731
    expected = np.array([200 * ((kernel(p, y).sum() - 1) / 399 - kernel(p, x).mean()) for p in y])
    assert changes[1] == pytest.approx(expected - expected.mean(), abs=1e-9)


def test_kernel_distances_equal_second_implementations():
    generator = np.random.default_rng(3)
    x, y = generator.standard_normal((60, 24)) + 0.1, generator.standard_normal((50, 24))
    total = lambda kernel, a, b: sum(kernel(p, q) for p in a for q in b)  # noqa: E731

    def mmd(kernel, a, b):
        own = [(total(kernel, s, s) - sum(kernel(p, p) for p in s)) / (len(s) * (len(s) - 1)) for s in (a, b)]
        return sum(own) - 2 * total(kernel, a, b) / (len(a) * len(b))

    pairs = [np.linalg.norm(p - q) for i, p in enumerate(y) for q in y[i + 1 :]]
    width = np.median(pairs)
    gaussian = mmd(lambda p, q: np.exp(-(np.linalg.norm(p - q) ** 2) / (2 * width**2)), x, y)
    assert kernel_audio_distance(x, y) == pytest.approx(100 * gaussian, rel=1e-6)
    x = x[:50]
    cubic = mmd(lambda p, q: (p @ q / 24 + 1) ** 3, x, y)
    assert kernel_distance(x, y, subsets=1) == pytest.approx((cubic, 0.0), rel=1e-6)
    with pytest.raises(ValueError, match="no kernel width"):
        kernel_audio_distance(x, np.zeros((9, 24)))


def evaluated(folder: Path, first: int, kept: bool) -> dict:
    """Content of a file of scores of 40 items from the `first` on, and what lies beside it."""
    generator, ids = np.random.default_rng(first), [f"id{i:02d}" for i in range(first, first + 40)]
    for side in ("test_truth/cache", "test/cache"):
        (folder / side).mkdir(parents=True)
        rows = {i: torch.from_numpy(np.random.default_rng([int(i[2:]), len(side)]).standard_normal(4)) for i in ids}
        torch.save(rows, folder / side / "passt_features_embed.pth")
    scores = with_intervals(
        score_caches(folder / "test_truth/cache", folder / "test/cache", families=("fd",))
        | {"onset_f1": Score(0.5, "share", "higher", 40, items=dict(zip(ids, generator.random(40), strict=True)))}
    )
    lines = [{"id": i, **{name: score.items[i] for name, score in scores.items()}} for i in ids]
    (folder / "test.clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not kept:
        shutil.rmtree(folder / "test")
    header = {"run": folder.name, "split": "test", "step": None, "truth": "true latents, decoded", "ids": ids_json(ids)}
    return header | {
        "items": {"listed": 40, "scored": 40, "dropped": []},
        "not_computed": {},
        "categories": {"rain": {}},
        "scores": {name: score.to_json() for name, score in scores.items()},
        "clips": str(folder / "test.clips.jsonl"),
    }


def test_scores_of_different_items_are_computed_again_over_the_common_ones(tmp_path):
    contents = [evaluated(tmp_path / name, first, kept) for name, first, kept in (("a", 0, True), ("b", 10, False))]
    first, second = of_common_items(contents)
    ids = [f"id{i:02d}" for i in range(10, 40)]
    assert first["ids"] == second["ids"] == ids_json(ids) and first["categories"] == {}
    rows = [[np.random.default_rng([i, len(side)]).standard_normal(4) for i in range(10, 40)] for side in SIDES]
    assert first["scores"]["FD-PASST"]["value"] == pytest.approx(frechet_distance(*rows), rel=1e-9)
    assert first["scores"]["FD-PASST"]["used"] == 30 and "interval" in first["scores"]["FD-PASST"]
    assert "FD-PASST" not in second["scores"] and "evaluation.keep_clips" in second["not_computed"]["FD-PASST"]
    own = [read_clips({"clips": content["clips"]}) for content in contents]
    for content, clips in zip((first, second), own, strict=True):
        mean = content["scores"]["onset_f1"]
        assert (mean["value"], mean["used"]) == (pytest.approx(np.mean([clips[i]["onset_f1"] for i in ids])), 30)
        assert list(read_clips(content)) == ids and mean["value"] != 0.5
    assert of_common_items([first, second]) == [first, second]
    for change in ({"truth": "elsewhere"}, {"split": "validation"}):  # nothing to compare
        others = [contents[0], contents[1] | change]
        assert of_common_items(others) == others


SIDES = ("test/cache", "test_truth/cache")


@pytest.mark.slow
@pytest.mark.parametrize("score", ["mean", "kl", "fd", "kad"])
def test_intervals_cover_the_truth(score, capsys):
    """In 95 +- 2 % of 500 simulations of 300 items."""
    generator, covered = np.random.default_rng(4), 0
    population = 3 * generator.standard_normal((200_000, 8)), 3 * generator.standard_normal((200_000, 8))
    kl = _divergences(*map(torch.from_numpy, population)).numpy()
    scale = np.array([1.5, 0.5])
    for _ in range(500):
        if score == "fd":  # of Gaussians of known means and deviations
            x, y = generator.standard_normal((2000, 2)) * scale + 1.0, generator.standard_normal((2000, 2))
            value, changes = _frechet(x, y)
            items, truth = value + sum(changes), 2.0 + np.square(scale - 1).sum()
        elif score == "kad":  # of the same, by the Gaussian integrals of its kernel of the width that it took
            x, y = generator.standard_normal((300, 2)) * scale + 1.0, generator.standard_normal((300, 2))
            value, changes = _kernel_audio(x, y)
            width = np.median(np.linalg.norm(y[:, None] - y, axis=-1)[np.triu_indices(300, 1)]) ** 2
            within = lambda spread, w=width: np.prod(np.sqrt(w / (w + spread)))  # noqa: E731
            across = within(scale**2 + 1) * np.exp(-0.5 * np.sum(1 / (width + scale**2 + 1)))
            items, truth = value + sum(changes), 100 * (within(2 * scale**2) + within(2.0 * np.ones(2)) - 2 * across)
        else:
            all_items = generator.exponential(size=300) if score == "mean" else generator.choice(kl, 300)
            items, truth = all_items, 1.0 if score == "mean" else kl.mean()
        low, high = interval(resampled_means(items[:, None], seed=int(generator.integers(1 << 30))))
        covered += bool(low[0] <= truth <= high[0])
    with capsys.disabled():
        print(f"\n{score}: covered in {covered / 5:.1f} % of 500 simulations")
    assert 465 <= covered <= 485


def test_scores_per_category_and_of_aligned_items(tmp_path):
    vggsounder, foleybench, other = (tmp_path / f"{name}.csv" for name in ("vggsounder", "foleybench", "other"))
    rows = ["a,dog,A,False,False,False", "a,rain,AV,False,False,False", "b,dog,AV,True,False,False", "c,rain,A,,,"]
    head = "video_id,label,modality,background_music,static_image,voice_over"
    vggsounder.write_text("\n".join([head, *rows]))
    foleybench.write_text("key,caption,ucs_category\n1,a door,DOORS\n2,a bell,BELLS\n")
    groups = read_categories(vggsounder)
    assert groups == {"aligned": {"a"}, "dog": {"a", "b"}, "rain": {"a", "c"}}
    assert read_categories(foleybench) == {"aligned": {"1", "2"}, "DOORS": {"1"}, "BELLS": {"2"}}
    scores = {name: Score(2.0, "", "lower", 3, items={"a": 1.0, "b": 2.0, "c": 3.0}) for name in ("DeSync", "FD-VGG")}
    results = category_scores(scores, groups | {"absent": {"z"}})
    assert {group: each["DeSync"]["value"] for group, each in results.items()} == {"aligned": 1, "dog": 1.5, "rain": 2}
    assert results["dog"]["DeSync"]["used"] == 2 and set(results["dog"]) == {"DeSync"}  # a distance is no mean
    other.write_text("name,caption\nx,y\n")
    with pytest.raises(ValueError, match=r"other\.csv has the columns name, caption: one of video_id"):
        read_categories(other)
    with pytest.raises(ValueError, match=r"nowhere\.csv cannot be read"):
        read_categories(tmp_path / "nowhere.csv")
