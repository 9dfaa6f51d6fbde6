"""Published metrics against recorded values of av-benchmark, and faulty caches."""

import json
import math

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, MEDIA_SEED, normal

from mmaudio_hf.evaluation import (
    clean_id,
    desync_score,
    evaluate_caches,
    frechet_distance,
    inception_score,
    kernel_audio_distance,
    kernel_distance,
    kl_divergence,
    mean_cosine,
    score_caches,
)
from mmaudio_hf.evaluation.metrics import OffsetHead, _Block, read_tensors

RECORDED = json.loads((GOLDEN / "media_metrics.json").read_text())
DIRECT, CACHES = RECORDED["direct"], RECORDED["evaluate"]


def arr(name: str, *shape: int) -> np.ndarray:
    return normal(name, shape, MEDIA_SEED)


FD_SIZES = {"a": (500, 400, 16), "b": (600, 600, 64), "c": (300, 250, 128), "rank_deficient": (40, 40, 64)}


@pytest.mark.parametrize(("tag", "sizes"), [*FD_SIZES.items(), ("small", (12, 9, 8))])
def test_frechet_distance(tag, sizes):
    n1, n2, d = sizes
    predicted = (arr(f"fd/{tag}/pred", n1, d) * (1 + 0.5 * np.arange(d) / d) + 0.2).astype(np.float32)
    reference = arr(f"fd/{tag}/gt", n2, d)
    tolerance = 1e-5 if tag == "rank_deficient" else 1e-6
    assert frechet_distance(predicted, reference) == pytest.approx(DIRECT[f"fd/{tag}"], rel=tolerance)
    assert frechet_distance(reference, predicted) == pytest.approx(DIRECT[f"fd/{tag}/swapped"], rel=tolerance)
    assert frechet_distance(predicted, predicted) == pytest.approx(DIRECT[f"fd/{tag}/self"], abs=1e-4)


def test_other_direct_values():
    for tag, shape in (("a", (64, 527)), ("b", (7, 10))):
        predicted, reference = 2 * arr(f"kl/{tag}/pred", *shape), 2 * arr(f"kl/{tag}/gt", *shape)
        for kind in ("softmax", "sigmoid"):
            assert kl_divergence(predicted, reference, kind) == pytest.approx(DIRECT[f"kl/{tag}/{kind}"], rel=1e-5)
    for tag, n, c, splits in (("a", 100, 527, 10), ("b", 25, 40, 10), ("c", 33, 12, 4)):
        for shuffle in (True, False):
            ours, key = (
                inception_score(2 * arr(f"isc/{tag}", n, c), splits, shuffle),
                f"isc/{tag}/shuffle{int(shuffle)}",
            )
            assert ours == pytest.approx((DIRECT[f"{key}/mean"], DIRECT[f"{key}/std"]), rel=1e-5)
    for tag, n1, n2, d, size in (("a", 120, 90, 32, 50), ("b", 40, 30, 8, 1000)):
        sides = arr(f"kid/{tag}/1", n1, d) + np.float32(0.1), arr(f"kid/{tag}/2", n2, d)
        expected = (DIRECT[f"kid/{tag}/mean"], DIRECT[f"kid/{tag}/std"])
        # Recorded of float32 rows in float32: terms near 1 whose mean is 0.001. In float64 that mean is 2e-5 of it off.
        assert kernel_distance(*sides, subsets=20, size=size) == pytest.approx(expected, rel=1e-6)
        exact = kernel_distance(*(side.astype(np.float64) for side in sides), subsets=20, size=size)
        assert exact == pytest.approx(expected, rel=3e-5)
    assert np.isnan(inception_score(np.zeros((9, 4)))).all()
    a, b = arr("cos/a", 20, 1024), arr("cos/b", 20, 1024)
    assert mean_cosine(a + 0.5 * b, b) == pytest.approx(DIRECT["cosine_mean"], rel=1e-5)
    for bad in ((np.zeros((1, 3)), np.zeros((5, 3))), (np.zeros((5, 3)), np.zeros((5, 4)))):
        with pytest.raises(ValueError, match="at least two rows"):
            frechet_distance(*bad)
    with pytest.raises(ValueError, match="one shape"):
        kl_divergence(np.zeros((2, 3)), np.zeros((3, 3)))


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """The caches of the recorded evaluation, without the Synchformer ones."""

    def t(kind, shape, item_id, side):
        return torch.from_numpy(arr(f"{side}/{kind}/{item_id}", *np.atleast_1d(shape)))

    folder, dims = tmp_path_factory.mktemp("caches"), RECORDED["dims"]
    for side, ids in (("gt", CACHES["ids"]), ("pred", CACHES["pred_ids"])):
        files = {
            "pann_features.pth": lambda i, s: {k: a * t(k, dims[k], i, s) for k, a in (("2048", 1), ("logits", 2))},
            "vggish_features.pth": lambda i, s: t("vgg", dims["vgg"], i, s),
            "passt_features_embed.pth": lambda i, s: t("passt", dims["passt"], i, s),
            "passt_logits.pth": lambda i, s: 2 * t("passt_logits", dims["passt_logits"], i, s),
        }
        for kind, file, weight in (("ib", "imagebind", 0.3), ("laion", "clap_laion", 0.5), ("ms", "clap_ms", 0.5)):
            if side == "gt":
                name = f"{file}_{'video' if kind == 'ib' else 'text'}.pth"
                files[name] = lambda i, s, kind=kind: t(kind, dims[kind], i, "gt")
            else:
                files[f"{file}_audio.pth"] = lambda i, s, kind=kind, weight=weight: (
                    t(kind, dims[kind], i, "pred") + weight * t(kind, dims[kind], i, "gt")
                )
        (folder / side).mkdir()
        for name, make in files.items():
            torch.save({i: make(i, side) for i in ids}, folder / side / name)
    return folder


def test_evaluate_caches(caches):
    common = [i for i in CACHES["pred_ids"] if i in CACHES["ids"]]
    classes = dict(zip(common, CACHES["desync_top_classes"], strict=True))
    for paired, expected in ((True, CACHES["paired"]), (False, CACHES["unpaired"])):
        ours = evaluate_caches(caches / "gt", caches / "pred", paired=paired, desync_classes=classes)
        names = {name for name in ours if "/" not in name}
        assert names == set(expected)
        for name in names:
            tolerance = 1e-6 if name.startswith("FD") else 1e-5
            assert ours[name] == pytest.approx(expected[name], rel=tolerance), (name, paired)
        assert (ours["FD-PANN/used"], ours["FD-PANN/dropped"]) == (35, 0)
        used = (34, 1) if paired else (35, 0)
        assert (ours["FD-PASST/used"], ours["FD-PASST/dropped"]) == used
    assert desync_score(CACHES["desync_top_classes"]) == pytest.approx(CACHES["desync_recomputed"], rel=1e-6)


def test_clean_ids():
    for name, cleaned in CACHES["clean_names"].items():
        assert clean_id(name) == cleaned


class _Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_bad_caches(tmp_path, capsys):
    gt, pred = tmp_path / "gt", tmp_path / "pred"
    gt.mkdir(), pred.mkdir()
    with pytest.raises(ValueError, match="gt holds no cached features"):
        evaluate_caches(gt, pred)
    values = {f"id{i}": torch.randn(4) for i in range(12)}
    torch.save(values, gt / "passt_features_embed.pth")
    torch.save(values, pred / "passt_logits.pth")
    with pytest.raises(ValueError, match=r"pred/passt_features_embed\.pth is missing"):
        evaluate_caches(gt, pred)
    torch.save({f"other{i}": v for i, v in enumerate(values.values())}, pred / "passt_features_embed.pth")
    with pytest.raises(ValueError, match="no id in common"):
        evaluate_caches(gt, pred)
    (pred / "passt_features_embed.pth").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="cannot be read"):
        evaluate_caches(gt, pred)
    torch.save({"id0": _Evil()}, pred / "passt_features_embed.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        evaluate_caches(gt, pred)
    assert "unpickled" not in capsys.readouterr().out
    torch.save([1], pred / "passt_features_embed.pth")
    with pytest.raises(ValueError, match="must be a dictionary"):
        evaluate_caches(gt, pred)


def test_caches_are_read_as_torch_reads_them(tmp_path, monkeypatch):
    """Dictionaries of plain tensors by a reader of our own, all else by torch.load; neither runs what a file names."""
    rows = torch.randn(2100, 3, 4, generator=torch.Generator().manual_seed(0))
    own = {
        "one batch": {f"id{i}": rows[i] for i in range(len(rows))},
        "several types": {str(d): rows[1].to(d) for d in (torch.float64, torch.float16, torch.bfloat16)},
        "numbers": {7: rows[7].clone(), 300: rows[8].clone(), 70_000: rows[9].clone()},
        "two a clip": {f"id{i}": {"2048": rows[i, 0].clone(), "logits": rows[i, 1].clone()} for i in range(300)},
        "views": {"t": rows[3].T, "steps": rows[4, :, ::2], "scalar": rows[0, 0, 0]},
    }
    others = {
        "empty": {"a": torch.empty(0, 3)},
        "gradients": {"a": torch.ones(2, requires_grad=True)},
        "list": [rows[0]],
        "integers": {"a": torch.arange(3)},
    }
    loaded = {}
    for name, cache in {**own, **others}.items():
        torch.save(cache, tmp_path / name)
        loaded[name] = torch.load(tmp_path / name, weights_only=True)
    torch.save(own["views"], tmp_path / "legacy", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(tmp_path / "legacy")["t"], rows[3].T)
    for name in others:
        torch.testing.assert_close(read_tensors(tmp_path / name), loaded[name], rtol=0, atol=0)
    monkeypatch.setattr(torch, "load", None)
    for name in own:
        read = read_tensors(tmp_path / name)
        assert list(read) == list(loaded[name])
        torch.testing.assert_close(read, loaded[name], rtol=0, atol=0)
    for bad in ({"id0": _Evil()}, {"id0": rows[0], "id1": print}):
        torch.save(bad, tmp_path / "evil")
        with pytest.raises(TypeError, match="NoneType"):  # it is left to torch.load
            read_tensors(tmp_path / "evil")


def test_pairing_by_cleaned_ids(tmp_path):
    """A prediction named with a counter is paired with its clip, except for PANNs, which need equal ids."""
    ids = [f"abcdefghijk_{i:06d}-0" for i in range(12)]
    for side, names in (("gt", [i[:18] for i in ids]), ("pred", ids)):
        (tmp_path / side).mkdir()
        values = {name: torch.from_numpy(arr(f"clean/{side}/{i}", 6)) for i, name in enumerate(names)}
        torch.save(values, tmp_path / side / "passt_logits.pth")
        torch.save({k: {"2048": v, "logits": v} for k, v in values.items()}, tmp_path / side / "pann_features.pth")
    scores = evaluate_caches(tmp_path / "gt", tmp_path / "pred")
    assert (scores["KL-PASST-softmax/used"], scores["KL-PASST-softmax/dropped"]) == (12, 0)
    assert (scores["KL-PANNS-softmax/used"], scores["KL-PANNS-softmax/dropped"]) == (0, 12)
    assert np.isnan(scores["KL-PANNS-softmax"])


def sync_features(item_id: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Video and audio features of one id of the recorded evaluation."""
    one = lambda kind, shape, side: arr(f"{side}/{kind}/{item_id}", *shape)  # noqa: E731
    video = 2 * one("syncv0", (1, 1, 768), "gt") + one("syncv", (24, 8, 768), "gt")
    audio = 2 * one("synca0", (1, 1, 768), "pred") + one("synca", (24, 6, 768), "pred")
    return torch.from_numpy(video), torch.from_numpy(audio)


@pytest.fixture(scope="module")
def sync_weights(tmp_path_factory):
    """A file with the name-seeded head behind the recorded classes, and with a tensor of another part."""
    state = {"afeat_extractor.stray": torch.zeros(1)}
    for name, own in OffsetHead().state_dict().items():
        value = arr(name, *own.shape)
        if own.ndim > 1:
            value = value / np.float32(math.sqrt(np.prod(own.shape[1:])))
        else:
            value = 1 + np.float32(0.1) * value if name.endswith(".weight") else np.float32(0.02) * value
        state[name] = torch.from_numpy(value)
    assert len(state) - 1 == CACHES["sync_tensors_seeded"]
    path = tmp_path_factory.mktemp("sync") / "synchformer_state_dict.pth"
    torch.save(state, path)
    return path


def test_desync_from_cached_features(tmp_path, sync_weights):
    """The classes of the reference's own head, of ids whose two ends differ and of some others."""
    common = [i for i in CACHES["pred_ids"] if i in CACHES["ids"]]
    recorded = dict(zip(common, CACHES["desync_top_classes"], strict=True))
    chosen = [i for i in common if recorded[i][0] != recorded[i][1]] + common[:2]
    features = {i: sync_features(i) for i in chosen}
    head = OffsetHead().load_released(sync_weights)
    classes = head.classes(*(torch.stack(side) for side in zip(*features.values(), strict=True)))
    assert classes.tolist() == [recorded[i] for i in chosen] and len(chosen) == 4
    for side, which in (("gt", 0), ("pred", 1)):
        (tmp_path / side).mkdir()
        names = {"gt": "synchformer_video.pth", "pred": "synchformer_audio.pth"}
        torch.save({i: features[i][which] for i in chosen[:2]}, tmp_path / side / names[side])
    score = score_caches(tmp_path / "gt", tmp_path / "pred", sync_weights=sync_weights)["DeSync"]
    assert score.value == pytest.approx(desync_score([recorded[i] for i in chosen[:2]]))
    assert (score.unit, score.better, score.used) == ("s", "lower", 2)
    with pytest.raises(ValueError, match="at least 14 segments"):
        head.classes(torch.zeros(1, 9, 8, 768), torch.zeros(1, 9, 6, 768))
    with pytest.raises(ValueError, match=r"vproj\.weight is missing"):
        OffsetHead().load_released({"transformer.OFF_tok": torch.zeros(1, 1, 768)})


def test_the_token_that_is_classified_is_the_first_of_the_whole_block():
    torch.manual_seed(0)
    block, x_BND = _Block(), 3 * torch.randn(2, 9, 768)
    with torch.no_grad():
        for layer in (block.attn.query, block.attn.key, block.attn.value):
            layer.weight *= 3  # attention that is not even
            layer.bias.normal_()
        torch.testing.assert_close(block.of_first(x_BND), block(x_BND)[:, 0], rtol=1e-4, atol=1e-5)


def test_what_was_dropped_and_why(tmp_path):
    ids = [f"clip{i:02d}" for i in range(14)]
    for side in ("gt", "pred"):
        (tmp_path / side).mkdir()
        values = {i: torch.from_numpy(arr(f"drop/{side}/{i}", 6)) for i in ids}
        if side == "pred":
            values["clip00"][2] = math.nan
            values["stranger"] = values["clip05"]
        else:
            values["clip01"][0] = math.inf
        for name in ("passt_features_embed.pth", "passt_logits.pth"):
            torch.save(values, tmp_path / side / name)
    reasons = {
        "features that are not finite": ["clip00"],
        "no ground truth of this id": ["stranger"],
        "ground truth whose features are not finite": ["clip01"],
    }
    scores = score_caches(tmp_path / "gt", tmp_path / "pred")
    assert set(scores) == {"FD-PASST", "KL-PASST-softmax", "ISC-PASST-mean", "ISC-PASST-std"}
    for score in scores.values():
        assert score.used == 12 and score.dropped == reasons and math.isfinite(score.value)
    plain = scores["KL-PASST-softmax"].to_json()
    assert plain["unit"] == "nats" and {r["reason"]: (r["count"], r["ids"]) for r in plain["dropped"]} == {
        reason: (1, ids) for reason, ids in reasons.items()
    }
    # Without pairs every finite prediction counts, and every finite ground truth.
    alone = score_caches(tmp_path / "gt", tmp_path / "pred", paired=False)["FD-PASST"]
    assert alone.used == 14 and set(alone.dropped) == set(reasons) - {"no ground truth of this id"}


def test_too_few_clips_give_null_and_a_complex_root_minus_one(tmp_path):
    for side in ("gt", "pred"):
        (tmp_path / side).mkdir()
        for name in ("passt_features_embed.pth", "passt_logits.pth"):
            torch.save({"only": torch.ones(4)}, tmp_path / side / name)
    scores = score_caches(tmp_path / "gt", tmp_path / "pred")
    plain = {name: score.to_json() for name, score in scores.items()}
    assert plain["FD-PASST"]["value"] is None and plain["ISC-PASST-mean"]["note"] == "fewer than 10 clips"
    assert json.loads(json.dumps(plain, allow_nan=False))["KL-PASST-softmax"]["value"] == 0.0
    # Fewer rows than columns, and large ones: rounding makes eigenvalues of the product negative.
    assert frechet_distance(1e6 * arr("complex/a", 5, 40), 1e6 * arr("complex/b", 5, 40)) == -1.0


def test_equal_ids_are_partners_whatever_their_length(tmp_path):
    """Names of 20 characters of one's own, which `clean_id` would cut."""
    values = {f"abcdefghijklmnop_{i:03d}": torch.from_numpy(arr(f"long/{i}", 5)) for i in range(10)}
    for side in ("gt", "pred"):
        (tmp_path / side).mkdir()
        torch.save(values, tmp_path / side / "passt_logits.pth", _use_new_zipfile_serialization=side == "gt")
    score = score_caches(tmp_path / "gt", tmp_path / "pred")["KL-PASST-softmax"]
    assert (score.used, score.dropped, score.value) == (10, {}, 0.0)


def test_a_faulty_file_costs_its_own_scores(tmp_path):
    """No common ids, a truncated file, another width, and clips that are too short for DeSync; shapes and bfloat16."""
    ids = [f"clip{i:02d}" for i in range(14)]
    for side in ("gt", "pred"):
        (tmp_path / side).mkdir()
        rows = {i: torch.from_numpy(arr(f"fault/{side}/{i}", 6)) for i in ids}
        torch.save(rows, tmp_path / side / "passt_logits.pth")
        other = rows if side == "gt" else {f"other_{i}": row for i, row in rows.items()}
        torch.save(other, tmp_path / side / "passt_features_embed.pth")
        torch.save({i: row[None].repeat(3, 1) for i, row in rows.items()}, tmp_path / side / "vggish_features.pth")
        torch.save(
            {i: {"2048": r, "logits": r[: 6 - (side == "gt")]} for i, r in rows.items()},
            tmp_path / side / "pann_features.pth",
        )
        video = {i: row.bfloat16()[None] for i, row in rows.items()} | (
            {"clip00": torch.ones(4)} if side == "gt" else {}
        )
        torch.save(video, tmp_path / side / ("imagebind_video.pth" if side == "gt" else "imagebind_audio.pth"))
        torch.save(
            {i: torch.ones(9, 8 - 2 * (side == "pred"), 768) for i in ids[:2]},
            tmp_path / side / f"synchformer_{'video' if side == 'gt' else 'audio'}.pth",
        )
    file = tmp_path / "gt" / "vggish_features.pth"
    file.write_bytes(file.read_bytes()[:1000])
    scores = score_caches(tmp_path / "gt", tmp_path / "pred", sync_weights="nowhere")
    assert set(scores) == {"KL-PASST-softmax", "ISC-PASST-mean", "ISC-PASST-std", "IB-Score"}
    reasons = {"FD-VGG": "cannot be read", "FD-PASST": "no id in common", "DeSync": "at least 14 segments"}
    reasons |= dict.fromkeys(
        ("FD-PANN", "KL-PANNS-softmax", "ISC-PANNS-mean", "ISC-PANNS-std"), "of different networks"
    )
    for name, reason in reasons.items():
        assert reason in scores.not_computed[name], name
    assert set(scores.not_computed) == set(reasons)
    pairs = [np.stack([arr(f"fault/{side}/{i}", 6) for i in ids[1:]]) for side in ("gt", "pred")]
    assert scores["IB-Score"].value == pytest.approx(mean_cosine(*pairs), abs=5e-3)
    assert scores["IB-Score"].dropped == {"ground truth whose features have another shape": ["clip00"]}
    with pytest.warns(UserWarning, match="DeSync is left out: no pair"):
        evaluate_caches(tmp_path / "gt", tmp_path / "pred", families=("desync", "kl"), sync_weights="nowhere")


def test_kernel_audio_distance_of_caches_and_warnings_of_few_rows(tmp_path):
    for side in ("gt", "pred"):
        (tmp_path / side).mkdir()
        rows = {f"clip{i:02d}": torch.from_numpy(arr(f"kad/{side}/{i}", 6)) for i in range(30)}
        torch.save(rows, tmp_path / side / "passt_features_embed.pth")
    scores = score_caches(tmp_path / "gt", tmp_path / "pred", families=("fd", "kad"))
    x, y = (np.stack([arr(f"kad/{side}/{i}", 6) for i in range(30)]) for side in ("pred", "gt"))
    assert scores["KAD-PASST"].value == pytest.approx(kernel_audio_distance(x, y), rel=1e-6)
    assert np.mean(list(scores["KAD-PASST"].items.values())) == pytest.approx(scores["KAD-PASST"].value)
    assert len(scores["KAD-PASST"].items) == 30
    assert "30 rows of 6 columns: biased upwards" in scores["FD-PASST"].to_json()["warning"]
    contributions = list(scores["FD-PASST"].items.values())
    assert np.mean(contributions) == pytest.approx(scores["FD-PASST"].value) and np.std(contributions) > 0
