"""The benchmark of curation on a few clips and steps: what it counts, and what the two stores hold."""

import json
import shutil

from mmaudio_hf.bench import curation as bench
from mmaudio_hf.cli import main
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.media.example import write_faulty_media


def test_both_stores_are_trained_on(tmp_path, monkeypatch, capsys):
    media = write_faulty_media(tmp_path / "media", {"train": 16, "val": 1, "test": 2}, hard=False)
    shutil.copytree(media, tmp_path / "detection")
    faults = json.loads((media / "faults.json").read_text())
    faults |= {f"{split}_{n:03d}": {"fault": "still"} for split, n in (("val", 0), ("test", 0), ("test", 1))}
    assert sum(fault["fault"] == "unrelated" for fault in faults.values()) == 2
    shown = {item_id: fault for item_id, fault in faults.items() if item_id.startswith("train")}
    shown["train_999"] = {"fault": "still"}  # one that is not measured: nothing is known of it
    (tmp_path / "detection" / "faults.json").write_text(json.dumps(shown))
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(bench, "compared", lambda *a, one=bench.compared: {("train", "train_999"): {}} | one(*a))
    assert main(["bench", "curation", "--folder", str(tmp_path), "--seeds", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["unrelated_found"] == figures["offset_within_40_ms"] == 1 and figures["false_alarms"] == 0
    assert figures["clips_unrelated"] == 2 and figures["clips_offset"] == 3 and figures["clips_right"] == 11
    assert figures["gain_f1"] == figures["cleaned_f1"] - figures["dirty_f1"]
    counts = {arm: FeatureStore.open(tmp_path / "features" / f"{arm}_train").manifest["counts"] for arm in bench.ARMS}
    assert counts["dirty"] == {"listed": 16, "accepted": 16, "rejected": 0}
    assert counts["cleaned"] == {"listed": 16, "accepted": 14, "rejected": 2, "corrected": 3}
