"""Fine-tuning and curation on worlds of a few clips and steps: what they compare is what they say."""

import json
import shutil

import pytest

from mmaudio_hf.bench import learning as bench
from mmaudio_hf.cli import main
from mmaudio_hf.config import read_json_lines
from mmaudio_hf.data.store import FeatureStore
from mmaudio_hf.media.example import write_example_media, write_faulty_media


def test_the_base_is_trained_once_and_every_method_starts_from_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "write_example_media", lambda folder: write_example_media(folder, small=True))
    monkeypatch.setattr(bench, "CLIPS", {"train": 3, "val": 1, "test": 2})
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(bench, "BASE_STEPS", 4)
    words = ["bench", "finetune", "--folder", str(tmp_path), "--kind", "frog", "--rounds", "1", "--json"]
    assert main([*words, "--methods", "full_replay"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    base = tmp_path / "runs" / "base" / "last" / "pretrained_model" / "model.safetensors"
    content, written = base.read_bytes(), base.stat().st_mtime_ns
    assert main([*words, "--methods", "lora", "dora_replay"]) == 0
    figures |= json.loads(capsys.readouterr().out.splitlines()[-1])
    assert base.read_bytes() == content and base.stat().st_mtime_ns == written  # not trained again
    for method in ("full_replay", "lora", "dora_replay"):
        lines = read_json_lines(tmp_path / "runs" / f"frog-{method}-0" / "metrics.jsonl")[0]
        change = lines[-1]["val_ema/loss_old_test"] - lines[0]["val/loss_old_test"]
        assert figures[f"{method}_old_loss_change"] == pytest.approx(change) != 0
        assert 0 <= figures[f"{method}_new_f1"] <= 1 and figures[f"{method}_new_log_mel_distance"] > 0
    first = [
        read_json_lines(tmp_path / "runs" / f"frog-{m}-0" / "metrics.jsonl")[0][0] for m in ("lora", "dora_replay")
    ]
    assert first[0] == first[1]  # both are the base, on the same clips and noise
    assert figures["full_replay_parameters_share"] == pytest.approx(1, abs=0.05)
    assert figures["lora_parameters_share"] < figures["dora_replay_parameters_share"] < 0.04
    assert main([*words, "--methods", "lore"]) == 2 and "did you mean 'lora'" in capsys.readouterr().err


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
