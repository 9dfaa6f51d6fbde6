"""Objective, optimizer steps, learning rates and EMA against figures of the reference implementation."""

import numpy as np
import pytest
import torch
from golden_data import golden, normal, relative_error, state_dict, tensor
from safetensors.torch import load_file
from toy_stores import write_recipe

from mmaudio_hf.bench.training import random_batch
from mmaudio_hf.cli import main
from mmaudio_hf.config import FlowConfig, ModelConfig, OptimConfig
from mmaudio_hf.data.loader import Batch
from mmaudio_hf.data.sampler import Draws
from mmaudio_hf.models.blocks import fill_missing
from mmaudio_hf.models.flow import flow_loss
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training import ema
from mmaudio_hf.training.optim import build_optimizer, clip_gradients, learning_rate, step_unless_nonfinite
from mmaudio_hf.training.step import flow_step, make_objective

SMALL_DIMS = ModelConfig(
    hidden_dim=128,
    num_heads=2,
    depth=4,
    fused_depth=2,
    clip_dim=32,
    sync_dim=24,
    text_dim=40,
    text_tokens=12,
    latent_length=50,
    clip_length=16,
    sync_length=48,
)
FULL_DIMS = ModelConfig(hidden_dim=128, num_heads=2, depth=4, fused_depth=2)


def batch_of(features: dict[str, torch.Tensor], noise: Draws, has_video=None, has_text=None) -> Batch:
    size = len(features["mean"])
    has_video = torch.ones(size, dtype=torch.bool) if has_video is None else has_video
    rows = has_video.nonzero()[:, 0]
    return Batch(
        step=0,
        mean=features["mean"],
        std=features["std"],
        text_features=features["text"],
        clip_features=features["clip"][rows],
        sync_features=features["sync"][rows],
        video_rows=rows,
        has_video=has_video,
        has_text=torch.ones(size, dtype=torch.bool) if has_text is None else has_text,
        source=torch.zeros(size, dtype=torch.int64),
        valid=torch.ones(size, dtype=torch.bool),
        ids=[str(i) for i in range(size)],
        noise=noise,
    )


def noise_of(latent, z, x0, video, text) -> Draws:
    unused = torch.full_like(z, float("nan"))
    return Draws(latent_noise=latent, z=z, x0=x0, drop_video=video, drop_clip=unused, drop_sync=unused, drop_text=text)


def names_under(arrays, prefix: str) -> list[str]:
    """Every array has a `.stats` entry, whether it is stored whole or as a slice."""
    names = [
        k.removeprefix(prefix).removesuffix(".stats") for k in arrays if k.startswith(prefix) and k.endswith(".stats")
    ]
    assert names
    return names


@pytest.mark.parametrize(("group", "dropout", "mean", "scale"), [("a", 0.4, 0.0, 1.0), ("b", 0.1, 0.3, 0.7)])
def test_objective(group, dropout, mean, scale):
    arrays, case = golden("train_objective"), "train_objective"
    network = MMAudio.from_config_and_state(SMALL_DIMS, state_dict("flow_tiny_small_dims"), case)
    features = {
        "mean": tensor(f"{case}/a_mean", (8, 50, 20)),
        "std": torch.exp(0.5 * tensor(f"{case}/a_logstd", (8, 50, 20)) - 1),
        "clip": tensor(f"{case}/clip_f", (8, 16, 32)),
        "sync": tensor(f"{case}/sync_f", (8, 48, 24)),
        "text": tensor(f"{case}/text_f", (8, 12, 40)),
    }
    stored = {n: torch.from_numpy(arrays[f"{group}.draw_{n}"]) for n in ("latent", "t", "x0", "video", "text")}
    batch = batch_of(features, noise_of(stored["latent"], stored["t"], stored["x0"], stored["video"], stored["text"]))
    flow = FlowConfig(condition_dropout=dropout, time_mean=mean, time_scale=scale)
    objective = make_objective(batch, flow, network.latent_mean, network.latent_std)
    loss = flow_loss(tensor(f"{case}/predicted_v", (8, 50, 20)), objective.target)
    ours = {
        "t": objective.t,
        "x_t": objective.latent,
        "target": objective.target,
        "loss": loss,
        "mean_loss": loss.mean(),
        "x1": objective.target + stored["x0"],
        "clip_f": fill_missing(features["clip"], objective.clip_missing, network.empty_clip_feat),
        "sync_f": fill_missing(features["sync"], objective.sync_missing, network.empty_sync_feat),
        "text_f": fill_missing(features["text"], objective.text_missing, network.empty_string_feat),
    }
    for name, value in ours.items():
        assert relative_error(value, arrays, f"{group}.{name}") < 1e-5, name
    assert objective.text_missing.tolist() == (stored["text"] < dropout).tolist()


def test_whole_optimisation_steps():
    """Missing modalities, dropping, loss, clipping and AdamW over three steps."""
    arrays, case = golden("train_steps"), "train_steps"
    network = MMAudio.from_config_and_state(FULL_DIMS, state_dict("flow_tiny_full_dims"), case).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = build_optimizer(network, OptimConfig())
    flow = FlowConfig(condition_dropout=0.3)
    has_video = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)
    has_text = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    generator = torch.Generator().manual_seed(777)
    for k in range(3):
        features = {
            "mean": tensor(f"{case}/step{k}/a_mean", (6, 250, 20)),
            "std": torch.exp(0.5 * tensor(f"{case}/step{k}/a_logstd", (6, 250, 20)) - 1),
            "clip": tensor(f"{case}/step{k}/clip_f", (6, 64, 1024)),
            "sync": tensor(f"{case}/step{k}/sync_f", (6, 192, 768)),
            "text": tensor(f"{case}/step{k}/text_f", (6, 77, 1024)),
        }
        # In the order of the reference: latent noise, z, x0, video, text.
        latent = torch.randn(6, 250, 20, generator=generator)
        z = torch.randn(6, generator=generator)
        x0 = torch.randn(6, 250, 20, generator=generator)
        video, text = torch.rand(6, generator=generator), torch.rand(6, generator=generator)
        assert relative_error(video, {"v": arrays["draw_video"][k]}, "v") < 1e-6
        batch = batch_of(features, noise_of(latent, z, x0, video, text), has_video, has_text)
        result = flow_step(network, batch, flow, network.latent_mean, network.latent_std)
        optimizer.zero_grad(set_to_none=True)
        result.loss.mean().backward()
        if k == 0:
            gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
            for key in names_under(arrays, "grad1."):
                assert relative_error(gradients[key], arrays, f"grad1.{key}") < 2e-4, key
        norm = clip_gradients(network.parameters(), 1.0)
        step_unless_nonfinite(optimizer, ~torch.isfinite(norm))
        assert relative_error(result.loss, {"loss": arrays["loss"][k]}, "loss") < 2e-5
        assert relative_error(result.t, {"t": arrays["t"][k]}, "t") < 1e-6
        assert norm.item() == pytest.approx(arrays["grad_norm"][k], rel=1e-4)
    for name in names_under(arrays, "delta3."):
        assert relative_error(network.state_dict()[name] - before[name], arrays, f"delta3.{name}") < 1e-2, name


def test_a_skipped_step_changes_nothing():
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 4)
    optimizer = build_optimizer(network, OptimConfig(learning_rate=0.1))

    def step(scale, found_inf):
        network(torch.ones(2, 4) * scale).square().sum().backward()
        step_unless_nonfinite(optimizer, torch.tensor(found_inf))
        optimizer.zero_grad(set_to_none=True)

    step(1.0, False)
    kept = [p.clone() for p in network.parameters()]
    moments = [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]
    step(float("nan"), True)
    assert all(torch.equal(a, b) for a, b in zip(kept, network.parameters(), strict=True))
    for was, state in zip(moments, optimizer.state.values(), strict=True):
        assert all(torch.equal(was[key], state[key]) for key in was)
    step(1.0, False)
    assert not torch.equal(kept[0], network.weight)


def test_learning_rate_schedule():
    arrays = golden("lr_schedule")
    short = {"warmup_steps": 10, "milestones": (30, 40)}
    for schedule in ("step", "constant", "poly"):
        theirs = arrays[f"f64.short_{schedule}"]
        config = OptimConfig(schedule=schedule, **short)
        ours = [learning_rate(i, config, 50) for i in range(len(theirs))]
        assert np.allclose(ours, theirs, rtol=1e-12, atol=0), schedule
    ours = [learning_rate(int(i), OptimConfig(), 300_000) for i in arrays["full_at"]]
    assert np.allclose(ours, arrays["f64.full_lr"], rtol=1e-12, atol=0)


class ToyModule(torch.nn.Module):
    """The toy network of the EMA figures."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3, 4))
        self.b = torch.nn.Parameter(torch.zeros(4))
        self.c = torch.nn.Parameter(torch.tensor([1.0, -2.0]), requires_grad=False)

    def set_weights(self, k: int, total: int) -> None:
        for name in ("w", "b"):
            parameter = getattr(self, name)
            a, b, noise = (normal(f"ema_posthoc/{name}_{s}", parameter.shape) for s in ("a", "b", f"n{k}"))
            value = a + np.float32(k / total) * b + np.float32(0.1) * noise
            parameter.data.copy_(torch.from_numpy(value))


@pytest.mark.parametrize(
    ("prefix", "update_every", "corrected"), [("", 1, True), ("every2.", 2, True), ("nocorr.", 1, False)]
)
def test_ema_updates_and_synthesis(prefix, update_every, corrected):
    arrays, sigmas = golden("ema_posthoc"), (0.05, 0.1)
    module, gammas = ToyModule(), [ema.exponent(s) for s in (0.05, 0.1)]
    profiles = [{n: p.detach().clone() for n, p in module.named_parameters()} for _ in sigmas]
    snapshots, checked = [], 0
    for k in range(1, 61):
        module.set_weights(k, 60)
        weights = [p.detach() for p in module.parameters()]
        for i, gamma in enumerate(gammas):
            ema.update(list(profiles[i].values()), weights, k, gamma, update_every, corrected)
            for name in ("w", "b"):
                if f"{prefix}ema{i}_step{k}.{name}" in arrays:
                    checked += 1
                    assert relative_error(profiles[i][name], arrays, f"{prefix}ema{i}_step{k}.{name}") < 2e-6
        if k % 10 == 0:
            copies = [{n: v.clone() for n, v in profile.items()} for profile in profiles]
            snapshots += [ema.Snapshot(s, k, copy) for s, copy in zip(sigmas, copies, strict=True)]
    snapshots.sort(key=lambda s: (s.sigma_rel, s.step))
    for key in arrays:
        if key.startswith(f"{prefix}synth_s") and not key.endswith(".stats"):
            sigma, step_name = key.removeprefix(f"{prefix}synth_s").split("_step")
            step, name = step_name.split(".")
            ours = ema.synthesize(snapshots, float(sigma), int(step))[name]
            assert relative_error(ours, arrays, key) < 1e-5, key
            checked += 1
    assert checked >= 14


def test_tracked_profiles_are_updated_every_so_often():
    """`PostHocEMA` with `update_every` 2 against the reference: calls 2, 4, ... change nothing."""
    arrays, module, checked = golden("ema_posthoc"), ToyModule(), 0
    tracked = ema.PostHocEMA(module, (0.05, 0.1), update_every=2)
    for k in range(1, 61):
        module.set_weights(k, 60)
        tracked.update()
        for i, profile in enumerate(tracked.profiles.values()):
            for name in ("w", "b"):
                if f"every2.ema{i}_step{k}.{name}" in arrays:
                    checked += 1
                    assert relative_error(profile[name], arrays, f"every2.ema{i}_step{k}.{name}") < 2e-6
    assert checked >= 4 and tracked.step == 60


def test_a_recipe_sets_how_often_the_ema_is_updated(tmp_path):
    """EMA weights in the checkpoints of a run: steps 2 and 4 change nothing, step 3 follows the formula for q = 2."""
    recipe = write_recipe(tmp_path, steps=4, checkpoint_every=1, keep_checkpoints=9)
    assert main(["train", str(recipe), "ema.update_every=2"]) == 0
    states = [tmp_path / "output" / "run" / "checkpoints" / f"step_{k}" / "training_state" for k in range(1, 5)]
    weights, profiles = ([load_file(state / f"{name}.safetensors") for state in states] for name in ("model", "ema"))
    name = "final_layer.conv.weight"
    for i, gamma in enumerate((16.97219857, 6.93720394)):
        first, second, third, fourth = (profile[f"{i}.{name}"] for profile in profiles)
        assert torch.equal(first, weights[0][name]) and torch.equal(second, first) and torch.equal(fourth, third)
        beta = ((1 - 1 / 4) * (1 - 1 / 6)) ** (1 + gamma)  # the square of the geometric mean of steps 3 and 5
        torch.testing.assert_close(third, first + (1 - beta) * (weights[2][name] - first), rtol=1e-5, atol=1e-8)
        assert not torch.equal(third, first)


def test_ema_exponents_decays_and_weights():
    arrays, sigmas = golden("ema_posthoc"), (0.05, 0.1)
    gammas = [ema.exponent(s) for s in sigmas]
    assert np.allclose(gammas, arrays["f64.gammas"], rtol=1e-10)
    for i, gamma in enumerate(gammas):
        ours = [ema.decay(k, gamma) for k in range(1, 61)]
        assert np.allclose(ours, arrays["f64.beta_after"][:, i], rtol=1e-10)
    steps = [*range(10, 61, 10)] * 2
    for key in (key for key in arrays if key.startswith("f64.solve_step") and not key.endswith(".stats")):
        for row, sigma in zip(arrays[key], (0.05, 0.08, 0.15), strict=True):
            ours = ema.synthesis_weights(steps, [0.05] * 6 + [0.1] * 6, sigma, int(key.removeprefix("f64.solve_step")))
            assert np.allclose(ours, row, atol=1e-6), (key, sigma)


def test_snapshots_on_disk_synthesise_as_in_memory(tmp_path):
    module = ToyModule()
    tracked = ema.PostHocEMA(module, (0.05, 0.1))
    for k in range(1, 21):
        module.set_weights(k, 60)
        tracked.update()
        if k % 10 == 0:
            tracked.save_snapshots(tmp_path)
    snapshots = ema.find_snapshots(tmp_path)
    assert [(s.sigma_rel, s.step) for s in snapshots] == [(0.05, 10), (0.05, 20), (0.1, 10), (0.1, 20)]
    exact = ema.synthesize(snapshots, 0.05)
    assert all(torch.allclose(exact[n], t, atol=1e-6) for n, t in tracked.profiles[0.05].items())
    other = ema.synthesize(snapshots, 0.15, frozen={"c": module.c})
    assert torch.equal(other["c"], module.c)
    assert not torch.allclose(ema.synthesize(snapshots, 0.15)["c"], module.c, rtol=1e-3)
    with pytest.raises(ValueError, match="no EMA snapshot"):
        ema.synthesize([], 0.05)


@pytest.mark.parametrize(("independent", "both"), [(True, 0.04), (False, 0.2)])
def test_clip_and_sync_are_dropped_on_their_own(independent, both):
    """Marginal probabilities are those of the recipe, and the joint one is their product only when independent."""
    size = 4000
    batch = random_batch(ModelConfig(duration=0.64, text_tokens=1, text_dim=1, clip_dim=1, sync_dim=1), size)
    flow = FlowConfig(condition_dropout=0.2, independent_video_dropout=independent)
    objective = make_objective(batch, flow, torch.zeros(1, 1, 20), torch.ones(1, 1, 20))
    tolerance = 4 * (0.2 * 0.8 / size) ** 0.5
    for missing in (objective.clip_missing, objective.sync_missing, objective.text_missing):
        assert missing.float().mean().item() == pytest.approx(0.2, abs=tolerance)
    joint = (objective.clip_missing & objective.sync_missing).float().mean().item()
    assert joint == pytest.approx(both, abs=tolerance)
