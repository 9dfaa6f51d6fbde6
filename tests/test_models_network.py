"""The flow model against figures of the reference implementation, with name-seeded weights."""

import json

import pytest
import torch
from golden_data import (
    GOLDEN,
    golden,
    listed_shapes,
    plain_guided_velocity,
    relative_error,
    state_dict,
    tensor,
)

from mmaudio_hf.config import ModelConfig, variant_config
from mmaudio_hf.models.blocks import TimestepEmbedder, rotary_table, upsample_sync
from mmaudio_hf.models.flow import sample_adaptive, sample_euler
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.sampling import GuidedVelocity, prepared_convolutions
from mmaudio_hf.schema import sequence_lengths

INIT_TABLE = GOLDEN / "init_small_16k.tsv"
VARIANTS = ("small_16k", "small_44k", "medium_44k", "large_44k", "large_44k_v2")


@pytest.fixture(scope="module")
def model(variant) -> MMAudio:
    """A name-seeded model. All tests of a variant run before the next: the largest takes 4 GB."""
    state = state_dict(f"flow_{variant}")
    with torch.device("meta"):
        model = MMAudio.from_variant(variant)
    model.to_empty(device="cpu").load_state_dict(state, assign=True)
    return model.eval()


def of_variants(*variants: str):
    """Run the test for each of these; the models of a module scope are made and freed one after the other."""
    return pytest.mark.parametrize("variant", variants, scope="module")


def inputs(case: str, batch: int, lengths) -> dict[str, torch.Tensor]:
    latent, clip, sync, channels = lengths
    return {
        "latent": tensor(f"{case}/latent", (batch, latent, channels)),
        "clip": tensor(f"{case}/clip_f", (batch, clip, 1024)) + tensor(f"{case}/clip_f_common", (batch, 1, 1024)),
        "sync": tensor(f"{case}/sync_f", (batch, sync, 768)),
        "text": tensor(f"{case}/text_f", (batch, 77, 1024)) + tensor(f"{case}/text_f_common", (batch, 1, 1024)),
        "negative": tensor(f"{case}/negative_text_f", (batch, 77, 1024)),
    }


def default_lengths(variant: str):
    config = variant_config(variant)
    return config.latent_length, config.clip_length, config.sync_length, config.latent_channels


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_has_the_released_names_and_shapes(variant):
    with torch.device("meta"):
        model = MMAudio.from_variant(variant)
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert ours == listed_shapes(f"flow_{variant}")


@of_variants(*VARIANTS)
@torch.no_grad()
def test_velocity(variant, model):
    case = f"flow_forward_{variant}"
    arrays, x = golden(case), inputs(case, 2, default_lengths(variant))
    velocity = model(x["latent"], x["clip"], x["sync"], x["text"], torch.from_numpy(arrays["t"]))
    assert relative_error(velocity, arrays, "flow") < (1e-3 if variant == "large_44k_v2" else 1e-4)


@of_variants("small_16k", "small_44k", "large_44k_v2")
@torch.no_grad()
def test_conditions(variant, model):
    case = f"flow_conditions_{variant}"
    arrays, x = golden(case), inputs(case, 2, default_lengths(variant))
    groups = {
        "cond": model.preprocess_conditions(x["clip"], x["sync"], x["text"]),
        "empty": model.empty_conditions(2),
        "empty_neg": model.empty_conditions(2, negative_text_features=x["negative"]),
    }
    for group, conditions in groups.items():
        for name, ours in zip(("clip_f", "sync_f", "text_f", "clip_f_c", "text_f_c"), conditions, strict=True):
            assert relative_error(ours, arrays, f"{group}.{name}") < 2e-5, (group, name)


@of_variants("small_16k", "small_44k")
@torch.no_grad()
def test_sampling(variant, model):
    """As the pipeline samples: `test_models_sampling` compares its velocities with those of two plain passes."""
    case = f"flow_sample_{variant}"
    arrays, x = golden(case), inputs(case, 1, default_lengths(variant))
    conditions, empty = model.preprocess_conditions(x["clip"], x["sync"], x["text"]), model.empty_conditions(1)
    velocity, entering = GuidedVelocity(model, conditions, empty, 4.5), []

    def guided(latent, t):
        entering.append(latent)
        return velocity(latent, t)

    with prepared_convolutions(model, "fp32"):
        result = sample_euler(guided, x["latent"], 25)
    for step in (1, 5, 13):
        assert relative_error(entering[step], arrays, f"x_step{step:02d}") < 2e-4
    assert relative_error(result, arrays, "x1") < 2e-4


@of_variants("small_16k", "small_44k")
@torch.no_grad()
def test_statistics_of_the_latents(variant, model):
    arrays = golden(f"flow_sample_{variant}")
    result = torch.from_numpy(arrays["x1"])
    kept = result.clone()
    assert relative_error(model.unnormalize(result), arrays, "x1_unnormalized") < 2e-4
    assert torch.equal(result, kept)  # not in place
    assert torch.allclose(model.normalize(model.unnormalize(result)), result, atol=1e-5)


@of_variants("small_16k", "small_44k")
@torch.no_grad()
def test_sampling_without_guidance_and_with_a_negative_prompt(variant, model):
    case = f"flow_sample_{variant}"
    arrays, x = golden(case), inputs(case, 1, default_lengths(variant))
    conditions = model.preprocess_conditions(x["clip"], x["sync"], x["text"])
    empty, negative = model.empty_conditions(1), model.empty_conditions(1, x["negative"])
    plain = sample_euler(lambda y, t: plain_guided_velocity(model, y, t, conditions, empty, 0.5), x["latent"], 2)
    assert relative_error(plain, arrays, "x1_2steps_nocfg") < 2e-4
    other = sample_euler(lambda y, t: plain_guided_velocity(model, y, t, conditions, negative, 4.5), x["latent"], 2)
    assert relative_error(other, arrays, "x1_2steps_negative") < 2e-4


@of_variants("small_16k", "small_44k")
@torch.no_grad()
def test_other_durations(variant, model):
    case, config = f"flow_seqlen_{variant}", variant_config(variant)
    arrays = golden(case)
    try:
        for seconds in (4.0, 10.0):
            lengths = sequence_lengths(config.mode, seconds)
            model.set_lengths(lengths.latent, lengths.clip, lengths.sync)
            sizes = (lengths.latent, lengths.clip, lengths.sync, config.latent_channels)
            x = {}
            for name, shape in (
                ("latent", (1, sizes[0], sizes[3])),
                ("clip_f", (1, sizes[1], 1024)),
                ("sync_f", (1, sizes[2], 768)),
                ("text_f", (1, 77, 1024)),
            ):
                x[name] = tensor(f"{case}/{seconds}/{name}", shape)
                if name in ("clip_f", "text_f"):
                    x[name] = x[name] + tensor(f"{case}/{seconds}/{name}_common", (1, 1, 1024))
            velocity = model(x["latent"], x["clip_f"], x["sync_f"], x["text_f"], torch.tensor([0.137]))
            assert relative_error(velocity, arrays, f"flow_{seconds}s") < 1e-4
    finally:
        model.set_lengths(config.latent_length, config.clip_length, config.sync_length)


def test_rotary_and_timestep_tables():
    arrays = golden("rope_tables")

    def matrices(length, scale=1.0):
        cosines, signed_sines = rotary_table(length, 64, scale)
        cos, sin = cosines[:, ::2], signed_sines[:, 1::2]
        return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)[None]

    for tag, latent, clip in (("16k", 250, 64), ("44k", 345, 64), ("44k_10s", 431, 80)):
        assert relative_error(matrices(latent), arrays, f"latent_rot_{tag}") < 2e-5
        assert relative_error(matrices(clip, latent / clip), arrays, f"clip_rot_{tag}") < 2e-5
    t = torch.tensor([0.137, 0.804])
    for dim, version in ((448, "v1"), (896, "v1"), (896, "v2")):
        embedder = TimestepEmbedder(dim, v2=version == "v2")
        embedder.mlp = torch.nn.Identity()
        assert relative_error(embedder.freqs, arrays, f"freqs_{dim}_{version}") < 5e-7
        tolerance = 1e-3 if version == "v2" else 1e-6
        assert relative_error(embedder(t), arrays, f"temb_{dim}_{version}") < tolerance


def test_sync_rows_follow_float32_ties():
    for key, rows in golden("sync_upsample_index").items():
        if key == "meta" or key.endswith(".stats"):
            continue
        source, target = (int(n) for n in key.split("_to_"))
        positions = torch.arange(source, dtype=torch.float32).view(1, source, 1)
        assert upsample_sync(positions, target).flatten().long().tolist() == rows.tolist(), key


def test_sequence_lengths():
    arrays = golden("sequence_lengths")
    for mode in ("16k", "44k"):
        for seconds, row in zip(arrays["f64.durations"], arrays[f"lengths_{mode}"], strict=True):
            ours = sequence_lengths(mode, float(seconds))
            assert [ours.latent, ours.clip, ours.sync, ours.audio_samples] == row.tolist()


def test_initial_values_follow_the_published_laws():
    torch.manual_seed(0)
    state = MMAudio.from_variant("small_16k").state_dict()
    for line in (row.split("\t") for row in INIT_TABLE.read_text().splitlines()[1:]):
        name, _, trainable, law, parameter, spread = line[:6]
        value = state[name]
        assert bool(int(trainable)) == (name not in ("latent_mean", "latent_std", "empty_string_feat"))
        if law == "zero":
            assert not value.any(), name
        elif law == "one":
            assert (value == 1).all(), name
        elif law == "nan":
            assert value.isnan().all(), name
        else:
            bound = float(parameter) if law == "uniform" else 7 * float(parameter)
            assert value.abs().max() <= bound, name
            tolerance = 5 / value.numel() ** 0.5  # five standard errors of a standard deviation
            assert value.std().item() == pytest.approx(float(spread), rel=2 * tolerance), name


@torch.no_grad()
def test_untrained_network_outputs_zero_and_adaptive_solver_keeps_the_noise():
    model = MMAudio(ModelConfig(hidden_dim=64, num_heads=1, depth=3, fused_depth=1))
    x = inputs("untrained", 2, (250, 64, 192, 20))
    velocity = model(x["latent"], x["clip"], x["sync"], x["text"], torch.tensor([0.2, 0.9]))
    assert not velocity.any()
    conditions = model.preprocess_conditions(x["clip"], x["sync"], x["text"])
    sampled = sample_adaptive(lambda y, t: model.predict_velocity(y, t, conditions), x["latent"])
    assert torch.allclose(sampled, x["latent"], atol=1e-6)


def test_adaptive_solver_agrees_with_many_euler_steps():
    x0 = torch.linspace(-1, 1, 20, dtype=torch.float64).view(1, 10, 2)
    exact = x0 * torch.exp(torch.tensor(-0.5, dtype=torch.float64))  # dx/dt = -t x
    assert torch.allclose(sample_adaptive(lambda x, t: -t.view(-1, 1, 1) * x, x0), exact, rtol=1e-6)
    assert torch.allclose(sample_euler(lambda x, t: -t.view(-1, 1, 1) * x, x0, 2000), exact, rtol=1e-3)


@torch.no_grad()
def test_save_and_load_keep_every_number(tmp_path):
    config = ModelConfig(hidden_dim=64, num_heads=1, depth=3, fused_depth=1, v2=True, duration=4.0)
    model = MMAudio(config).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path)
    loaded = MMAudio.from_pretrained(tmp_path)
    assert loaded.config == config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    t, batch = torch.tensor([0.3]), inputs("saved", 1, (125, 32, 88, 20))
    arguments = (batch["latent"], batch["clip"], batch["sync"], batch["text"], t)
    assert torch.equal(loaded(*arguments), model(*arguments))


def test_damaged_saved_models_are_rejected_by_name(tmp_path):
    model = MMAudio(ModelConfig(hidden_dim=64, num_heads=1, depth=3, fused_depth=1))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_dim": 128, "num_heads": 2}))
    with pytest.raises(ValueError, match="shape"):
        MMAudio.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hiden_dim": 64}))
    with pytest.raises(ValueError, match=r"config\.json.*hiden_dim"):
        MMAudio.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        MMAudio.from_pretrained(tmp_path)


@torch.no_grad()
def test_derived_tensors_of_early_files_are_dropped():
    state = state_dict("flow_small_16k") | {"latent_rot": torch.zeros(1), "t_embed.freqs": torch.zeros(1)}
    model = MMAudio.from_variant("small_16k").load_released(state)
    assert torch.equal(model.t_embed.freqs, model.t_embed.frequencies())
    with pytest.raises(ValueError, match="stranger"):
        model.load_released(state | {"stranger": torch.zeros(1)})


@torch.no_grad()
def test_bf16_module_stays_near_float32():
    """The published model cast to bf16 is 2.7e-2 away from float32; rotary tables must stay float32."""
    torch.manual_seed(0)
    model = MMAudio(ModelConfig(hidden_dim=64, num_heads=1, depth=3, fused_depth=1, duration=1.0)).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.05)
    x = inputs("bf16", 2, (32, 8, 16, 20))
    arguments = [x["latent"], x["clip"], x["sync"], x["text"], torch.tensor([0.137, 0.804])]
    exact = model(*arguments)
    model = model.to(torch.bfloat16)
    assert model._latent_table.dtype == torch.float32
    assert model.t_embed.freqs.dtype == torch.bfloat16
    ours = model(*(a.bfloat16() for a in arguments)).float()
    assert 1e-4 < ((ours - exact).norm() / exact.norm()) < 5e-2


@of_variants("small_16k")
def test_wrong_shapes_are_named(model):
    x = inputs("wrong", 1, (250, 64, 192, 20))
    with pytest.raises(ValueError, match=r"clip_features.*64.*\(1, 63, 1024\)"):
        model.preprocess_conditions(x["clip"][:, :63], x["sync"], x["text"])
    with pytest.raises(ValueError, match="multiple of 8"):
        model.set_lengths(250, 64, 190)
