"""Fine-tuning: pretrained weights, frozen parameters, adapters, other durations; early stopping."""

import csv
import json
import math
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from golden_data import GOLDEN
from safetensors.torch import load_file
from toy_stores import MODEL, recipe_tree, write_store

from mmaudio_hf import MMAudio
from mmaudio_hf.cli import main
from mmaudio_hf.config import FinetuneConfig, LoraConfig, Recipe, load_recipe, variant_config
from mmaudio_hf.interop import export_run
from mmaudio_hf.training.finetune import (
    add_adapter,
    comfyui_adapter,
    freeze,
    published_state,
    read_pretrained,
    save_adapter,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with stores and a trained model: `output/base`, and `released.pth` like a released file."""
    folder = tmp_path_factory.mktemp("finetune")
    assert train(folder, "base", steps=4) == 0
    network = MMAudio.from_pretrained(folder / "output" / "base" / "last" / "pretrained_model")
    torch.save(network.state_dict(), folder / "released.pth")
    return folder


def write(folder: Path, name: str, finetune: dict | None = None, model: dict | None = None, **training) -> Path:
    tree = recipe_tree(folder, **training) | {"name": name, "finetune": finetune or {}}
    tree["model"] = MODEL | (model or {})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(folder: Path, name: str, finetune: dict | None = None, overrides=(), **training) -> int:
    return main(["train", str(write(folder, name, finetune, **training)), *overrides])


def last(folder: Path, name: str) -> Path:
    return folder / "output" / name / "last"


def model_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(last(folder, name) / "pretrained_model" / "model.safetensors")


def random_inputs(config) -> tuple[torch.Tensor, ...]:
    lengths = ((config.latent_length, 20), (config.clip_length, 1024), (config.sync_length, 768), (77, 1024))
    return *(torch.randn(2, *length) for length in lengths), torch.rand(2)


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("start", ["output/base", "output/base/last/pretrained_model", "released.pth"])
def test_weights_statistics_and_empty_text_come_from_init_from(base, start):
    config, state, source = read_pretrained(str(base / start))
    assert source.exists() and config.hidden_dim == 64
    expected = load_file(last(base, "base") / "pretrained_model" / "model.safetensors")
    assert changed(expected, state) == set()


def test_statistics_are_kept_or_recomputed(base):
    write_store(base / "own", 8, seed=5)
    own = [f"data.train=[{{path: {base / 'own'}}}]"]
    before = model_tensors(base, "base")
    statistics = {"latent_mean", "latent_std"}
    assert train(base, "kept", {"init_from": str(base / "released.pth")}, own, steps=1) == 0
    moved = changed(before, model_tensors(base, "kept"))
    assert not moved & {*statistics, "empty_string_feat"} and "final_layer.conv.weight" in moved
    again = {"init_from": str(base / "released.pth"), "latent_statistics": "recompute"}
    assert train(base, "recomputed", again, own, steps=1) == 0
    assert statistics <= changed(before, model_tensors(base, "recomputed"))


def test_the_first_step_sees_the_pretrained_weights(base):
    """Validation before the first step is that of the weights given, not of an untrained model."""
    assert train(base, "first", {"init_from": str(base / "output" / "base")}, steps=1) == 0
    lines = [json.loads(line) for line in (base / "output" / "first" / "metrics.jsonl").read_text().splitlines()]
    of_base = [json.loads(line) for line in (base / "output" / "base" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["val/loss"] == pytest.approx(of_base[-1]["val_ema/loss"], rel=1e-6)
    assert lines[0]["val/loss"] != of_base[0]["val/loss"]


@pytest.mark.parametrize(
    ("finetune", "model", "message"),
    [
        ({"init_from": "released.pth"}, {"hidden_dim": 128, "num_heads": 2}, "released.pth has model.hidden_dim 64"),
        ({"init_from": "nothing.pth"}, {}, "nothing.pth is not a file"),
        ({"init_from": "."}, {}, "holds no trained network"),
        ({"init_from": "released.pth", "freeze": ["fused_block"]}, {}, "did you mean fused_blocks"),
        (
            {"init_from": "released.pth", "freeze": ["joint_blocks.3-9"]},
            {},
            "no parameter is called 'joint_blocks.3-9'",
        ),
        ({"init_from": "released.pth", "freeze": ["*"]}, {}, "leaves nothing to train"),
        ({"freeze": ["text"]}, {}, "name the trained ones in finetune.init_from"),
        ({"init_from": "released.pth", "lora": {"rank": 2, "targets": ["quv"]}}, {}, "did you mean 'qkv'"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_errors(base, capsys, finetune, model, message):
    if "init_from" in finetune:
        finetune = finetune | {"init_from": str(base / finetune["init_from"])}
    assert main(["train", str(write(base, "not_fitting", finetune, model))]) == 2
    assert message in capsys.readouterr().err
    assert not (base / "output" / "not_fitting").exists()


def test_weights_that_cannot_be_trained_are_errors(base, capsys):
    spoiled = torch.load(base / "released.pth", weights_only=True) | {"latent_std": torch.full((1, 1, 20), math.nan)}
    torch.save(spoiled, base / "spoiled.pth")
    assert main(["train", str(write(base, "not_fitting", {"init_from": str(base / "spoiled.pth")}))]) == 2
    assert "latent_std that is not finite" in capsys.readouterr().err
    recipe = write(base, "not_fitting", {"init_from": str(base / "output/base")})
    assert main(["train", str(recipe), "encoders.kind=released"]) == 2
    assert "trained with toy encoders" in capsys.readouterr().err
    assert not (base / "output" / "not_fitting").exists()


def test_frozen_parameters_stay_and_have_neither_moments_nor_ema(base):
    settings = {"init_from": str(base / "released.pth"), "freeze": ["text", "fused_blocks.0-5", "t_embed.mlp.*.bias"]}
    assert train(base, "frozen", settings, steps=2) == 0
    moved = changed(model_tensors(base, "base"), model_tensors(base, "frozen"))
    frozen = ("text_", "fused_blocks.", "joint_blocks.0.text_block", "t_embed.mlp.0.bias", "t_embed.mlp.2.bias")
    assert moved and not {name for name in moved if name.startswith(frozen)}
    assert {"t_embed.mlp.0.weight", "joint_blocks.0.latent_block.attn.qkv.weight", "clip_cond_proj.bias"} <= moved
    training_state = last(base, "frozen") / "training_state"
    for file in ("optimizer", "ema"):
        names = [n.split(".", 1)[1] for n in load_file(training_state / f"{file}.safetensors")]
        assert names and not [name for name in names if name.startswith(frozen)]


def test_freeze_patterns():
    with torch.device("meta"):
        network = MMAudio(variant_config("small_16k"))
    freeze(network, ["joint_blocks.0-2", "fused_blocks.*.attn", "sync"])
    frozen = {n for n, p in network.named_parameters() if not p.requires_grad}
    assert {"joint_blocks.2.clip_block.ffn.w1.weight", "fused_blocks.7.attn.qkv.bias", "sync_pos_emb"} <= frozen
    assert not frozen & {"joint_blocks.3.clip_block.attn.qkv.weight", "fused_blocks.0.linear1.weight"}


# --- Adapters --------------------------------------------------------------------------------------------------------

ADAPTED = {"lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1}}


@pytest.fixture(scope="module")
def adapted(base) -> Path:
    """The base with an adapter trained for four steps, in `output/adapted`."""
    assert train(base, "adapted", ADAPTED | {"init_from": str(base / "released.pth")}, steps=4, checkpoint_every=2) == 0
    return base


def test_an_adapter_merges_as_peft_merges_it_and_loads_there(adapted):
    """The published model, our merge of the adapter folder, and peft's own reading of it are one model."""
    from peft import PeftModel

    folder = last(adapted, "adapted")
    published = model_tensors(adapted, "adapted")
    moved = changed(model_tensors(adapted, "base"), published)
    layers = json.loads((folder / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert moved == {f"{layer}.weight" for layer in layers}
    assert {"fused_blocks.0.ffn.w2", "joint_blocks.0.text_block.attn.qkv"} <= set(layers)

    start = MMAudio.from_pretrained(last(adapted, "base") / "pretrained_model")
    merged = PeftModel.from_pretrained(start, folder / "adapter").merge_and_unload()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, published[name], rtol=1e-5, atol=1e-7)

    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None  # an absolute path is not published
    with pytest.raises(ValueError, match="does not name its weights"):
        read_pretrained(str(folder / "adapter"))
    settings["base_model_name_or_path"] = str(adapted / "released.pth")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert changed(published, read_pretrained(str(folder / "adapter"))[1]) == set()
    size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 0.2 * (folder / "pretrained_model" / "model.safetensors").stat().st_size


def test_an_export_of_an_adapter_has_merged_weights_and_nothing_to_resume(adapted, tmp_path, capsys):
    paths = export_run(adapted / "output" / "adapted", tmp_path)
    assert sorted(path.name for path in paths) == ["adapted_ema_final.pth", "adapted_last.pth"]
    assert "only a part of the network is trained" in capsys.readouterr().out
    published = model_tensors(adapted, "adapted")
    assert changed(published, torch.load(tmp_path / "adapted_ema_final.pth", weights_only=True)) == set()
    assert torch.load(tmp_path / "adapted_last.pth", weights_only=True).keys() == published.keys()


def assert_equal_to_scale(ours: torch.Tensor, theirs: torch.Tensor, within: float = 1e-5) -> None:
    """As a share of the largest value: float32 alone leaves up to 8e-6 here, against float64."""
    assert (ours - theirs).abs().max() <= within * theirs.abs().max()


def test_names_and_shapes_of_adapter_files(tmp_path):
    """Those of small_16k with DoRA of rank 4, for peft and for ComfyUI, are the golden ones."""
    lora = LoraConfig(rank=4, alpha=8.0, dora=True, rslora=True)
    with torch.device("meta"):
        network = MMAudio(variant_config("small_16k"))
        add_adapter(network, lora)
    state = {name: torch.zeros(value.shape) for name, value in network.state_dict().items() if ".lora_" in name}
    finetune = FinetuneConfig(init_from="owner/base", lora=lora)
    save_adapter(state, Recipe("golden", finetune=finetune), tmp_path / "adapter")
    files = {"peft": load_file(tmp_path / "adapter" / "adapter_model.safetensors")}
    files["comfyui"] = comfyui_adapter(tmp_path / "adapter")
    with open(GOLDEN / "state_dict_keys" / "adapter_small_16k.tsv", newline="") as file:
        expected = [tuple(row) for row in csv.reader(file, delimiter="\t")]
    shapes = [(kind, n, "x".join(map(str, v.shape))) for kind, tensors in files.items() for n, v in tensors.items()]
    assert sorted(shapes) == sorted(expected[1:]) and len(shapes) > 300
    assert files["comfyui"]["diffusion_model.fused_blocks.0.linear1.alpha"] == 8 * 4**0.5


def test_an_adapter_without_effect_is_an_error_at_the_end(base, capsys):
    """B stays zero where no step was taken: one that is not finite, or a rate that rounds to nothing."""
    settings = {"init_from": str(base / "released.pth"), "lora": {"rank": 2}}
    assert train(base, "idle", settings, ["optim.learning_rate=1e-45", "optim.warmup_steps=0"], steps=1) == 1
    error = capsys.readouterr().err
    assert "the adapter has no effect, B is zero in all" in error and "Raise optim.learning_rate" in error


def test_an_export_to_safetensors_is_the_published_model(adapted, tmp_path):
    """In bfloat16 under the released names; the adapter's file changes the base as training did."""
    assert main(["export", str(adapted / "output" / "adapted"), "--out", str(tmp_path), "--safetensors"]) == 0
    published, merged = model_tensors(adapted, "adapted"), load_file(tmp_path / "adapted_bf16.safetensors")
    assert {name: value.to(torch.bfloat16) for name, value in published.items()}.keys() == merged.keys()
    assert all(torch.equal(merged[name], value.to(torch.bfloat16)) for name, value in published.items())
    lora, before = load_file(tmp_path / "adapted_lora.safetensors"), model_tensors(adapted, "base")
    layers = {name.removeprefix("diffusion_model.").rpartition(".")[0] for name in lora if name.endswith(".alpha")}
    assert {f"{layer}.weight" for layer in layers} == changed(before, published)
    for layer in layers:
        a, b, alpha = (lora[f"diffusion_model.{layer}.{kind}"] for kind in ("lora_A.weight", "lora_B.weight", "alpha"))
        update = (b.flatten(1) @ a.flatten(1)).view_as(before[f"{layer}.weight"]) * alpha / len(a)
        torch.testing.assert_close(
            before[f"{layer}.weight"] + update, published[f"{layer}.weight"], rtol=1e-5, atol=1e-6
        )
    assert main(["export", str(adapted / "output" / "adapted"), "--out", str(tmp_path), "--safetensors"]) == 2


KINDS = {
    "rslora": {"rslora": True, "rank_pattern": ["fused_blocks.0=1", "joint_blocks.0.*.ffn=0"]},
    "dora": {"dora": True, "rslora": True},
    "pissa": {"init": "pissa", "targets": ["qkv", "mlp", "modulation", "inputs", "conditions", "output"]},
    "gaussian": {"init": "gaussian", "dropout": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_what_peft_makes_of_its_files(base, kind):
    """What training computes, what is published, peft's reading of adapter/ and ours of it are one model."""
    from peft import PeftModel

    settings = {"init_from": str(base / "released.pth"), "lora": {"rank": 2, "alpha": 4.0} | KINDS[kind]}
    assert train(base, kind, settings, ["optim.learning_rate=0.01", "ema.sigma_rels=[0.2]"], steps=3) == 0
    published, folder = model_tensors(base, kind), last(base, kind) / "adapter"
    start = MMAudio.from_pretrained(last(base, "base") / "pretrained_model").eval()
    config = start.config
    inputs = random_inputs(config)
    with torch.no_grad():
        before = start(*inputs)
        merged = PeftModel.from_pretrained(start, folder).merge_and_unload()
        for name, value in merged.state_dict().items():
            torch.testing.assert_close(value, published[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(merged(*inputs), before, atol=1e-3)
    content = json.loads((folder / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = str(base / "released.pth")
    (folder / "adapter_config.json").write_text(json.dumps(content))
    for name, value in read_pretrained(str(folder))[1].items():
        torch.testing.assert_close(value, published[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_an_adapter_starts_as_the_base_and_trains_as_its_merged_model(kind):
    torch.manual_seed(0)
    network = MMAudio(variant_config("small_16k", **{k: v for k, v in MODEL.items() if k != "variant"})).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    config, lora = network.config, LoraConfig(**{"rank": 2, "alpha": 4.0, **KINDS.get(kind, {}), "dropout": 0.0})
    inputs = random_inputs(config)
    with torch.no_grad():
        plain = network(*inputs)
        add_adapter(network, lora)
        rounding = 2e-5 if kind == "pissa" else 1e-5  # it takes its product out of the weights: 1.5e-5 in float32
        assert_equal_to_scale(network(*inputs), plain, rounding)
        for parameter in (p for p in network.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        adapted = network(*inputs)
        merged = MMAudio.from_config_and_state(config, published_state(network.state_dict(), lora), "merged").eval()
        assert not torch.allclose(adapted, plain, atol=1e-2)
        assert_equal_to_scale(merged(*inputs), adapted, rounding)
    network.train()
    network(*inputs).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())


def test_an_adapter_that_is_stopped_resumes_with_the_same_bytes(adapted):
    """Also with dropout, whose masks depend on the step; the pretrained file is not needed any more."""
    moved = adapted / "moved.pth"
    moved.write_bytes((adapted / "released.pth").read_bytes())
    settings = ADAPTED | {"init_from": str(moved)}
    assert train(adapted, "resumed", settings, steps=4, checkpoint_every=2, overrides=["training.steps=2"]) == 0
    moved.unlink()
    assert train(adapted, "resumed", settings, steps=4, checkpoint_every=2) == 0
    assert_same_bytes(adapted, "resumed", "adapted")


def assert_same_bytes(folder: Path, first: str, second: str) -> None:
    for file in ("training_state/model", "training_state/ema", "training_state/optimizer", "pretrained_model/model"):
        ours, theirs = (last(folder, name) / f"{file}.safetensors" for name in (first, second))
        assert ours.read_bytes() == theirs.read_bytes(), file


@pytest.fixture
def other_precision() -> Iterator[None]:
    """accelerate keeps the precision of the first run of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_frozen_weights_in_bfloat16_train_resume_and_are_published_in_float32(base, other_precision, capsys):
    settings = {"init_from": str(base / "released.pth"), "frozen_dtype": "bfloat16", "lora": {"rank": 2, "dora": True}}
    bf16 = ["training.mixed_precision=bf16", "optim.learning_rate=0.01"]
    assert train(base, "half", settings, bf16, steps=4, checkpoint_every=2) == 0
    assert train(base, "half_again", settings, [*bf16, "training.steps=2"], steps=4, checkpoint_every=2) == 0
    assert train(base, "half_again", settings, bf16, steps=4, checkpoint_every=2) == 0
    assert_same_bytes(base, "half", "half_again")
    state, published = (
        load_file(last(base, "half") / "training_state" / "model.safetensors"),
        model_tensors(base, "half"),
    )
    halved = {name for name, value in state.items() if value.dtype == torch.bfloat16}
    assert {"fused_blocks.0.ffn.w1.base_layer.weight", "t_embed.mlp.0.weight"} <= halved
    assert not any(name.endswith((".bias", "norm.weight")) or ".lora_" in name for name in halved)
    assert all(value.dtype == torch.float32 for value in published.values())
    before = model_tensors(base, "base")
    torch.testing.assert_close(published["t_embed.mlp.0.weight"], before["t_embed.mlp.0.weight"].bfloat16().float())
    assert train(base, "refused", settings) == 2 and "needs training.mixed_precision=bf16" in capsys.readouterr().err
    full = {"init_from": str(base / "released.pth"), "frozen_dtype": "bfloat16"}
    assert train(base, "refused", full, bf16) == 2 and "frozen_dtype has no effect" in capsys.readouterr().err


def test_moments_of_8_bits_resume_with_the_same_bytes_or_are_an_error(base, capsys):
    settings, eight = {"init_from": str(base / "released.pth")}, ["optim.moments=8bit", "optim.learning_rate=0.01"]
    if find_spec("bitsandbytes") is None:
        assert train(base, "eight", settings, eight) == 2
        assert "optim.moments=8bit needs bitsandbytes: run `pip install" in capsys.readouterr().err
        pytest.skip("bitsandbytes is not installed: only the error was tested")
    assert train(base, "eight", settings, eight, steps=4, checkpoint_every=2) == 0
    assert train(base, "eight_again", settings, [*eight, "training.steps=2"], steps=4, checkpoint_every=2) == 0
    assert train(base, "eight_again", settings, eight, steps=4, checkpoint_every=2) == 0
    assert_same_bytes(base, "eight", "eight_again")
    moments = load_file(last(base, "eight") / "training_state" / "optimizer.safetensors")
    assert moments["state1.fused_blocks.0.ffn.w1.weight"].dtype == torch.uint8
    assert moments["step.fused_blocks.0.ffn.w1.weight"] == 4
    paths = export_run(base / "output" / "eight", base / "exported_eight")
    assert [path.name for path in paths if "ckpt" in path.name] == []
    assert "moments of 8 bits cannot be resumed there" in capsys.readouterr().out


# --- Other durations -------------------------------------------------------------------------------------------------


def test_a_shorter_duration_is_trained_from_a_longer_checkpoint(base, capsys):
    path = write(base, "shorter", {"init_from": str(base / "released.pth")}, {"duration": 0.8}, steps=2)
    stores = [f"data.train=[{{path: {base / 'short'}}}]", f"data.validation=[{{path: {base / 'short'}}}]"]
    assert main(["train", str(path)]) == 2
    assert "has duration 1.0, model small_16k expects 0.8: set model.duration" in capsys.readouterr().err
    write_store(base / "short", 6, duration=0.8)
    assert main(["train", str(path), *stores]) == 0
    network = MMAudio.from_pretrained(last(base, "shorter") / "pretrained_model")
    assert (network.latent_length, network.clip_length, network.sync_length) == (25, 6, 8)
    assert load_recipe(base / "output" / "shorter" / "config.yaml").model.duration == 0.8
    longer = MMAudio.from_pretrained(last(base, "base") / "pretrained_model")
    longer.set_lengths(25, 6, 8)
    assert torch.equal(longer._clip_table, network._clip_table)
    assert changed(longer.state_dict(), network.state_dict())


# --- Early stopping --------------------------------------------------------------------------------------------------


def test_a_run_that_no_longer_improves_ends_and_stays_ended(base, capsys):
    """An improvement by 100 never comes; a run that is killed before its end ends alike."""
    stopping = {"metric": "val/loss", "patience": 2, "min_delta": 100.0}
    settings = {"steps": 12, "validate_every": 2, "early_stopping": stopping, "checkpoint_every": 3}
    assert train(base, "early", None, **settings) == 0
    out = capsys.readouterr().out
    assert "step 4: val/loss no longer improves, it was best at step 0" in out
    assert last(base, "early").resolve().name == "step_4"
    assert train(base, "early", None, **settings) == 0
    assert last(base, "early").resolve().name == "step_4"
    killed = base / "output" / "killed"
    shutil.copytree(base / "output" / "early", killed, symlinks=True)  # killed before its last checkpoint was there
    shutil.rmtree(killed / "checkpoints" / "step_4")
    assert train(base, "killed", None, **settings) == 0
    assert last(base, "killed").resolve().name == "step_4"
    for file in ("last/training_state/model.safetensors", "last/pretrained_model/model.safetensors", "metrics.jsonl"):
        assert (base / "output" / "early" / file).read_bytes() == (killed / file).read_bytes()
    assert train(base, "typo", None, **(settings | {"early_stopping": stopping | {"metric": "val/los"}})) == 2
    assert "did you mean val/loss?" in capsys.readouterr().err
