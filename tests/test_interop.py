"""Checkpoints of the reference implementation, written in its layout, to run folders and back."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from forked import Command
from golden_data import GOLDEN
from safetensors.torch import load_file
from toy_stores import write_recipe

from mmaudio_hf.cli import main
from mmaudio_hf.config import ModelConfig, load_recipe
from mmaudio_hf.data.loader import training_batches
from mmaudio_hf.data.mixture import open_mixture
from mmaudio_hf.data.sampler import process_sample_indices
from mmaudio_hf.interop import _optimizer_and_scheduler, export_run
from mmaudio_hf.models.convert import reference_order, trainable
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.training.ema import PostHocEMA
from mmaudio_hf.training.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from mmaudio_hf.training.step import flow_step

ROOT = Path(__file__).parent.parent
STEPS = 5  # updates in the checkpoint


class Trained:
    """A small network after some updates on the toy stores, with everything in memory as the reference has it."""

    def __init__(self, recipe, steps: int):
        self.recipe, self.mixture = recipe, open_mixture(recipe.data.train, recipe.model)
        torch.manual_seed(3)
        self.network = MMAudio(recipe.model)
        self.network.set_latent_statistics(*self.mixture.latent_statistics())
        self.network.set_empty_text(torch.randn(77, 1024))
        self.optimizer = build_optimizer(self.network, recipe.optim)
        self.ema = PostHocEMA(self.network, recipe.ema.sigma_rels)
        self.step = 0
        self.train(steps)

    def train(self, steps: int) -> None:
        mean, std = self.network.latent_mean.clone(), self.network.latent_std.clone()
        settings = self.recipe.training
        with training_batches(
            self.mixture,
            seed=self.recipe.seed,
            global_batch=settings.batch_size,
            sample_indices=process_sample_indices(settings.batch_size, world_size=1, rank=0),
            start_step=self.step,
            num_steps=steps,
            prefetch=1,
            threads=1,
            device=torch.device("cpu"),
        ) as loader:
            for (batch,) in loader:
                set_learning_rate(self.optimizer, learning_rate(self.step, self.recipe.optim, settings.steps))
                self.optimizer.zero_grad(set_to_none=True)
                loss = flow_step(self.network, batch, self.recipe.flow, mean, std).loss
                (loss.sum() * (1 / settings.batch_size)).backward()
                clip_gradients(self.network.parameters(), self.recipe.optim.max_grad_norm)
                self.optimizer.step()
                self.ema.update()
                self.step += 1

    def checkpoint(self) -> dict:
        """What the reference would save inside the iteration that made the last update."""
        weights = self.network.state_dict()
        names = reference_order(weights)
        parameters = dict(self.network.named_parameters())
        state = {i: dict(self.optimizer.state[parameters[name]]) for i, name in enumerate(trainable(names))}
        group = {k: v for k, v in self.optimizer.state_dict()["param_groups"][0].items() if k != "params"}
        group |= {"initial_lr": self.recipe.optim.learning_rate, "params": list(range(len(state)))}
        ema = {}
        for i, profile in enumerate(self.ema.profiles.values()):
            ema[f"ema_models.{i}._extra_state"] = {"initted": True, "step": self.step}
            ema |= {f"ema_models.{i}.ema_model.{name}": profile[name].clone() for name in names}
        scheduler = {"_milestones": [2], "last_epoch": self.step, "_schedulers": [{"milestones": Counter({6: 1})}]}
        return {
            "it": self.step - 1,
            "weights": {name: weights[name].clone() for name in names},
            "optimizer": {"state": state, "param_groups": [group]},
            "scheduler": scheduler,
            "ema": ema,
        }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are in the same order as in the processes, which have one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("interop"), "run", steps=STEPS + 2, checkpoint_every=100)


@pytest.fixture(scope="module")
def trained(recipe_file) -> Trained:
    return Trained(load_recipe(recipe_file), STEPS)


@pytest.fixture(scope="module")
def checkpoint(trained, recipe_file) -> dict:
    torch.save(trained.checkpoint(), recipe_file.parent / "exp_ckpt_last.pth")
    return torch.load(recipe_file.parent / "exp_ckpt_last.pth", weights_only=True)


@pytest.fixture(scope="module")
def imported(checkpoint, recipe_file) -> Path:
    return import_file(recipe_file.parent / "exp_ckpt_last.pth", recipe_file, "imported")


def import_file(file: Path, recipe_file: Path, name: str, *more: str) -> Path:
    run = recipe_file.parent / "output" / name
    assert main(["import", str(file), "--recipe", str(recipe_file), "--run", str(run), *more]) == 0
    return run


def import_error(content, recipe_file: Path, capsys, *more: str) -> str:
    """The one sentence with which the import of a file fails; nothing is written."""
    file, run = recipe_file.parent / "not_fitting.pth", recipe_file.parent / "output" / "not_fitting"
    torch.save(content, file)
    assert main(["import", str(file), "--recipe", str(recipe_file), "--run", str(run), *more]) == 2
    assert not run.exists()
    message = capsys.readouterr().err
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    return message


def tensors(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "training_state" / f"{name}.safetensors")


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def same_content(ours, theirs, path: str = "") -> None:
    """Equal nested content, tensors by their bits; every type has to agree."""
    assert type(ours) is type(theirs), path
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), path
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), path
        for key in ours:
            same_content(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            same_content(a, b, f"{path}.{i}")
    else:
        assert ours == theirs, path


def test_a_checkpoint_becomes_a_run_folder_bit_by_bit(imported, trained, recipe_file):
    assert (imported / "last").resolve().name == f"step_{STEPS}"
    assert same(tensors(imported, "model"), dict(trained.network.state_dict()))
    assert same(tensors(imported, "ema"), trained.ema.tensors())
    moments = tensors(imported, "optimizer")
    parameters = {name: p for name, p in trained.network.named_parameters() if p.requires_grad}
    assert len(moments) == 3 * len(parameters)
    for name, parameter in parameters.items():
        for kind, value in trained.optimizer.state[parameter].items():
            assert torch.equal(moments[f"{kind}.{name}"], value), (kind, name)
    record = json.loads((imported / "last" / "training_state" / "state.json").read_text())
    assert record["facts"]["ema_step"] == STEPS and record["facts"]["skipped"] == 0
    assert load_recipe(imported / "config.yaml").run_dir == imported
    assert torch.equal(
        MMAudio.from_pretrained(imported / "last" / "pretrained_model").final_layer.conv.weight,
        trained.ema.profiles[0.05]["final_layer.conv.weight"],
    )
    assert tensors(imported, "window")["sums"].tolist() == [0] * 7


def test_training_continues_as_in_memory(checkpoint, trained, recipe_file):
    """The same batches follow, so two updates by the loop equal two more in memory, in every bit."""
    run = import_file(recipe_file.parent / "exp_ckpt_last.pth", recipe_file, "continued")
    result = Command("train", str(run / "config.yaml"), cwd=run).result()
    assert result.returncode == 0, result.stderr
    assert (run / "last").resolve().name == f"step_{STEPS + 2}"
    further = Trained(load_recipe(recipe_file), STEPS + 2)
    assert same(tensors(run, "model"), dict(further.network.state_dict()))
    assert same(tensors(run, "ema"), further.ema.tensors())
    moved = tensors(run, "model")["final_layer.conv.weight"] - trained.network.final_layer.conv.weight
    assert moved.abs().max() > 1e-4
    moments = tensors(run, "optimizer")
    assert {int(value) for key, value in moments.items() if key.startswith("step.")} == {STEPS + 2}


def test_there_and_back_is_the_same(imported, checkpoint, recipe_file, tmp_path):
    export_run(imported, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["imported_ckpt_last.pth", "imported_ema_final.pth", "imported_last.pth"]
    back = torch.load(tmp_path / "out" / "imported_ckpt_last.pth", weights_only=True)
    assert list(back) == ["it", "weights", "optimizer", "scheduler", "ema"]
    for key in ("it", "weights", "ema"):
        same_content(back[key], checkpoint[key], key)
    same_content(back["optimizer"]["state"], checkpoint["optimizer"]["state"])
    assert back["optimizer"]["param_groups"][0]["params"] == checkpoint["optimizer"]["param_groups"][0]["params"]
    same_content(torch.load(tmp_path / "out" / "imported_last.pth", weights_only=True), checkpoint["weights"])

    again = import_file(tmp_path / "out" / "imported_ckpt_last.pth", recipe_file, "again")
    for name in ("model", "optimizer", "ema", "window"):
        file = Path("last") / "training_state" / f"{name}.safetensors"
        assert (again / file).read_bytes() == (imported / file).read_bytes(), name
    file = Path("last") / "pretrained_model" / "model.safetensors"
    assert (again / file).read_bytes() == (imported / file).read_bytes()


def test_layout_is_that_of_the_reference(imported, tmp_path):
    export_run(imported, tmp_path)
    content = torch.load(tmp_path / "imported_ckpt_last.pth", weights_only=True)
    layout = json.loads((GOLDEN / "state_dict_keys" / "training_checkpoint_layout.json").read_text())
    theirs = layout["training_checkpoint"]
    assert list(content) == list(theirs)
    group, expected = content["optimizer"]["param_groups"][0], theirs["optimizer"]["param_groups"][0]
    assert set(group) == set(expected) and group["fused"] is True
    assert list(content["optimizer"]["state"][0]) == list(theirs["optimizer"]["state"]["0"])
    assert set(content["scheduler"]) == set(theirs["scheduler"])
    for ours, its in zip(content["scheduler"]["_schedulers"], theirs["scheduler"]["_schedulers"], strict=True):
        assert set(ours) == set(its)
    assert content["ema"]["ema_models.1._extra_state"] == {"initted": True, "step": STEPS}


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 8, 12])
def test_scheduler_state_is_what_steps_leave(steps, recipe_file):
    recipe = load_recipe(recipe_file, ["optim.warmup_steps=3", "optim.milestones=[4, 6]"])
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=recipe.optim.learning_rate)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (i + 1) / 4)
    later = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 6], 0.1)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, later], [3])
    for _ in range(steps):
        optimizer.step()
        both.step()
    ours, theirs = _optimizer_and_scheduler(recipe, steps, 1)[1], both.state_dict()

    def plain(state):
        return {k: v for k, v in state.items() if k not in ("_last_lr", "_schedulers")}

    assert plain(ours) == plain(theirs)
    assert ours["_last_lr"] == pytest.approx(theirs["_last_lr"])
    for a, b in zip(ours["_schedulers"], theirs["_schedulers"], strict=True):
        assert plain(a) == plain(b) and a["_last_lr"] == pytest.approx(b["_last_lr"])


def write_weights(trained, path: Path) -> Path:
    torch.save(dict(trained.network.state_dict()), path)
    return path


def test_snapshots_come_along_and_go_back(trained, checkpoint, recipe_file, tmp_path, capsys):
    (tmp_path / "ema").mkdir()
    names = reference_order(trained.network.state_dict())
    for i, profile in enumerate(trained.ema.profiles.values()):
        for step, factor in ((2, 0.5), (STEPS, 1.0)):
            content = {"_extra_state": {"initted": True, "step": step}}
            content |= {f"ema_model.{name}": profile[name] * factor for name in names}
            torch.save(content, tmp_path / "ema" / f"{i}.{step}.pt")
    file = recipe_file.parent / "exp_ckpt_last.pth"
    later = tmp_path / "ema" / f"0.{STEPS + 1}.pt"
    later.write_bytes((tmp_path / "ema" / f"0.{STEPS}.pt").read_bytes())
    options = ["--run", str(tmp_path / "none"), "--snapshots", str(later.parent)]
    shutil.copytree(later.parent, tmp_path / "wrong")
    (tmp_path / "wrong" / "0.2.pt").rename(tmp_path / "wrong" / "0.3.pt")
    for words, message in (
        ([*options[:3], str(tmp_path / "wrong")], "0.3.pt is of update 2, not of 3 as it is called"),
        ([*options], f"{later.parent} holds only snapshots of updates after 0"),
    ):
        source = file if "wrong" in words[-1] else write_weights(trained, tmp_path / "weights.pth")
        assert main(["import", str(source), "--recipe", str(recipe_file), *words]) == 2
        assert message in capsys.readouterr().err
    run = import_file(file, recipe_file, "snapshots", "--snapshots", str(tmp_path / "ema"))
    output = "".join(capsys.readouterr())
    assert f"snapshots of later updates than {STEPS}, that of {file}, are left out: {later.name}" in output
    later.unlink()
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    files = sorted(path.name for path in (tmp_path / "ema").iterdir())
    assert sorted(path.name for path in (tmp_path / "out" / "ema").iterdir()) == files and len(files) == 4
    for name in files:
        ours, theirs = (torch.load(tmp_path / f / name, weights_only=True) for f in ("out/ema", "ema"))
        same_content(ours, theirs)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2  # nothing is overwritten


def test_weights_alone_start_at_step_0(checkpoint, trained, recipe_file):
    file = recipe_file.parent / "mmaudio_tiny.pth"
    torch.save(checkpoint["weights"] | {"latent_rot": torch.ones(3)}, file)
    run = import_file(file, recipe_file, "weights")
    assert (run / "last").resolve().name == "step_0"
    assert same(tensors(run, "model"), dict(trained.network.state_dict()))
    assert tensors(run, "optimizer") == {}
    assert torch.equal(tensors(run, "ema")["1.t_embed.mlp.0.bias"], checkpoint["weights"]["t_embed.mlp.0.bias"])


def test_steps_are_updates_and_not_iterations(checkpoint, recipe_file, capsys):
    """After a resume the reference has made more updates than `it` says; the schedule follows the updates."""
    file = recipe_file.parent / "resumed.pth"
    torch.save(checkpoint | {"it": 2}, file)
    assert (import_file(file, recipe_file, "resumed") / "last").resolve().name == f"step_{STEPS}"
    later = checkpoint | {"scheduler": {"last_epoch": STEPS + 1}}
    torch.save(later, file)
    run = import_file(file, recipe_file, "skipped_step")
    record = json.loads((run / "last" / "training_state" / "state.json").read_text())
    assert record["step"] == STEPS + 1 and record["facts"]["skipped"] == 1
    message = import_error(checkpoint | {"scheduler": {"last_epoch": STEPS - 1}}, recipe_file, capsys)
    assert f"made {STEPS - 1} steps, its optimizer {STEPS}" in message
    assert f"has {STEPS} updates" in import_error(checkpoint, recipe_file, capsys, "training.steps=4")


def test_other_settings_are_logged(checkpoint, recipe_file, capsys):
    file = recipe_file.parent / "exp_ckpt_last.pth"
    import_file(file, recipe_file, "other_settings", "optim.eps=1e-8")
    assert "note: the file was trained with eps 1e-06, the recipe says 1e-08" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "message", "override"),
    [
        ("", "has model.hidden_dim 64, the recipe 128", "model.hidden_dim=128"),
        ("weight missing", "final_layer.conv.bias is missing", ""),
        ("weights sorted", "not in their original order", ""),
        ("statistics", "latent_std that is not finite", ""),
        ("moments missing", "its optimizer has", ""),
        ("moments shifted", "does not fit the network", ""),
        ("", "EMA profiles", "ema.sigma_rels=[0.05]"),
        ("EMA weight missing", "latent_mean is missing", ""),
        ("EMA counters", "different counters", ""),
        ("scheduler", "is not a training checkpoint of the reference", ""),
        ("moments of another kind", "is not a training checkpoint of the reference", ""),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(fault, message, override, checkpoint, recipe_file, capsys):
    weights, optimizer, ema = checkpoint["weights"], checkpoint["optimizer"], checkpoint["ema"]
    moments = list(optimizer["state"].values())
    changes = {
        "": {},
        "weight missing": {"weights": {n: v for n, v in weights.items() if "conv.bias" not in n}},
        "weights sorted": {"weights": {name: weights[name] for name in sorted(weights)}},
        "statistics": {"weights": weights | {"latent_std": weights["latent_std"] * float("nan")}},
        "moments missing": {"optimizer": optimizer | {"state": dict(enumerate(moments[1:], 1))}},
        "moments shifted": {"optimizer": optimizer | {"state": dict(enumerate([*moments[1:], moments[0]]))}},
        "EMA weight missing": {"ema": {n: v for n, v in ema.items() if not n.endswith("1.ema_model.latent_mean")}},
        "EMA counters": {"ema": ema | {f"ema_models.{i}._extra_state": {"step": 4 + i} for i in range(2)}},
        "scheduler": {"scheduler": {"last_epoch": [STEPS]}},
        "moments of another kind": {"optimizer": optimizer | {"state": dict.fromkeys(range(len(moments)), 1.0)}},
    }[fault]
    assert message in import_error(checkpoint | changes, recipe_file, capsys, *([override] if override else []))


def test_an_import_needs_a_new_folder(checkpoint, recipe_file, imported, capsys):
    file = recipe_file.parent / "exp_ckpt_last.pth"
    assert main(["import", str(file), "--recipe", str(recipe_file), "--run", str(imported)]) == 2
    assert "holds checkpoints" in capsys.readouterr().err


def test_a_network_without_a_run_is_exported_as_its_weights(tmp_path, capsys):
    words = ["export", str(tmp_path / "mine"), "--out", str(tmp_path / "out")]
    (tmp_path / "mine").mkdir()
    assert main(words) == 2 and "mine holds no trained network" in capsys.readouterr().err
    network = MMAudio(ModelConfig(hidden_dim=64, num_heads=1, depth=3, fused_depth=1))
    network.save_pretrained(tmp_path / "mine")
    assert main([*words, "--step", "4"]) == 2 and "has no step 4" in capsys.readouterr().err
    assert main(words) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "out" / "mine.pth")
    exported = torch.load(tmp_path / "out" / "mine.pth", weights_only=True)
    assert list(exported) == reference_order(network.state_dict())
    assert all(torch.equal(exported[n], v) or v.isnan().any() for n, v in network.state_dict().items())
