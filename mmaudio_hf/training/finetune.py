"""Fine-tuning: which weights a run starts from, which parameters are frozen, and LoRA adapters.

An adapter (LoRA, Hu et al. 2021, arXiv 2106.09685, and its kin) is injected by peft and trained in place of the model.
What is published has it merged, so that nothing else needs peft; checkpoints hold `adapter/` besides, in its format.
"""

import difflib
import fnmatch
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from mmaudio_hf.config import FinetuneConfig, LoraConfig, ModelConfig, Recipe, read_json
from mmaudio_hf.models import pretrained
from mmaudio_hf.models.blocks import ChannelLastConv1d
from mmaudio_hf.models.convert import check_sizes
from mmaudio_hf.models.network import FROZEN_TENSORS, MMAudio
from mmaudio_hf.schema import RunError
from mmaudio_hf.training.checkpoint import list_checkpoints
from mmaudio_hf.weights import save_tensors

# Short names in finetune.freeze for everything that one condition passes through on its own.
STREAMS = {
    "text": ("text_input_proj", "text_cond_proj", "joint_blocks.*.text_block"),
    "clip": ("clip_input_proj", "clip_cond_proj", "empty_clip_feat", "joint_blocks.*.clip_block"),
    "sync": ("sync_input_proj", "sync_pos_emb", "empty_sync_feat"),
}
# The CLIP and text streams of the last joint block have only qkv and modulation.
LORA_TARGETS = {
    "qkv": r".*_blocks\..*attn\.qkv",
    "proj": r".*_blocks\..*linear1",
    "mlp": r".*_blocks\..*ffn\.w[123]",
    "modulation": r".*adaLN_modulation\.1",
    "inputs": r"(audio|clip|sync|text)_input_proj\..*",
    "conditions": r"(clip_cond_proj|text_cond_proj|global_cond_mlp)(\..*)?",
    "output": r"final_layer\.conv",
}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = pretrained.ADAPTER_FILES
_PEFT_PREFIX = "base_model.model."
# In training `X.lora_A.default.weight` and `X.lora_magnitude_vector.default.weight`; files have no adapter name.
_FACTOR = re.compile(
    r"(?P<layer>.+)\.(?:lora_(?P<kind>[AB])(?:\.default)?\.weight|(?P<pissa>pissa_[AB])"
    r"|lora_(?P<dora>magnitude_vector)(?:\.default)?(?:\.weight)?)"
)


def initial_model(
    recipe: Recipe,
    latent_statistics: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    empty_text: Callable[[], torch.Tensor],
) -> MMAudio:
    """The model that a run starts with: weights loaded or random, parameters frozen, adapters in place.

    `latent_statistics` and `empty_text` compute those of the data; pretrained weights keep their own unless the recipe
    says otherwise. When the run has a checkpoint, its weights will replace all of this and `finetune.init_from` is not
    read. Random weights depend on torch's generator. ValueError where the weights do not fit the recipe.
    """
    settings = recipe.finetune
    resumed = recipe.resume == "auto" and list_checkpoints(recipe.run_dir)
    if settings.init_from and not resumed:
        config, state, source = read_pretrained(settings.init_from)
        check_encoders(Path(source).parent / pretrained.ENCODERS_FILE, recipe.encoders.kind)
        model = trainable_model(recipe, config, state, source)
    else:
        model = MMAudio(recipe.model)
    from_scratch = not settings.init_from
    if from_scratch or (settings.latent_statistics == "recompute" and not resumed):
        model.set_latent_statistics(*latent_statistics())
    if from_scratch or (settings.empty_text == "recompute" and not resumed):
        model.set_empty_text(empty_text())
    return set_trainable(model, settings)


def trainable_model(recipe: Recipe, config: ModelConfig, state: Mapping[str, torch.Tensor], source: Any) -> MMAudio:
    """The recipe's model with weights of the sizes `config`; ValueError naming `source` where they do not fit."""
    check_sizes(config, recipe.model, source)
    model = MMAudio.from_config_and_state(recipe.model, without_derived(state), source)
    for name in ("latent_mean", "latent_std"):
        if not getattr(model, name).isfinite().all():
            raise ValueError(f"{source} has a {name} that is not finite: nothing can be trained with it")
    return model


def without_derived(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` without the tensors that early released files carry and the model computes."""
    return {name: value for name, value in state.items() if name not in pretrained.DERIVED_TENSORS}


def check_encoders(path: Path, kind: str) -> None:
    """ValueError where weights were trained with other encoders: toy features only have the same shapes."""
    if path.is_file() and (trained := read_json(path).get("kind", kind)) != kind:
        raise ValueError(f"{path}: the weights were trained with {trained} encoders, the recipe has {kind} ones")


def read_pretrained(source: str) -> tuple[ModelConfig, dict[str, torch.Tensor], Path]:
    """Configuration and tensors of pretrained weights, and their file; see `FinetuneConfig.init_from`.

    ValueError naming what is missing or does not fit.
    """
    if (Path(source) / ADAPTER_CONFIG).is_file():
        return merged_adapter(Path(source))
    return pretrained.read_network(source)


# --- Frozen parameters -----------------------------------------------------------------------------------------------


def set_trainable(model: MMAudio, settings: FinetuneConfig) -> MMAudio:
    """Freeze what `settings` say and add the adapter; returns the model. ValueError when nothing is left to train."""
    freeze(model, settings.freeze)
    if settings.lora.rank:
        add_adapter(model, settings.lora)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("finetune.freeze leaves nothing to train: take a pattern out")
    if settings.frozen_dtype == "bfloat16":
        for module in model.modules():  # norms, biases and embeddings are small, and not cast by autocast
            if isinstance(module, (nn.Linear, nn.Conv1d)) and not module.weight.requires_grad:
                module.weight.data = module.weight.data.to(torch.bfloat16)
    return model


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters that `patterns` match.

    A pattern is a prefix of names, cut at dots: `fused_blocks`, `joint_blocks.0-3` (a range of numbers, ends included),
    `joint_blocks.*.clip_block.attn`; or text, clip or sync, for what one condition passes through on its own.
    ValueError, with the nearest names, where a pattern matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        prefixes = [prefix.split(".") for prefix in STREAMS.get(pattern, (pattern,))]
        chosen = {name for name in names if any(_has_prefix(name.split("."), prefix) for prefix in prefixes)}
        if not chosen:
            raise ValueError(f"finetune.freeze: no parameter is called {pattern!r}: {_suggestion(pattern, names)}")
        for name in chosen:
            model.get_parameter(name).requires_grad_(False)


def frozen_parameters(model: nn.Module) -> list[str]:
    """Parameters that this run freezes, without the three that no run trains: those are in the EMA all the same."""
    return [n for n, p in model.named_parameters() if not p.requires_grad and n not in FROZEN_TENSORS]


def _has_prefix(name: Sequence[str], prefix: Sequence[str]) -> bool:
    def matches(component: str, pattern: str) -> bool:
        if bounds := re.fullmatch(r"(\d+)-(\d+)", pattern):
            return component.isdigit() and int(bounds[1]) <= int(component) <= int(bounds[2])
        return fnmatch.fnmatchcase(component, pattern)

    return len(prefix) <= len(name) and all(map(matches, name, prefix))


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    prefixes = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
    close = difflib.get_close_matches(pattern, [*STREAMS, *sorted(prefixes)], n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"valid: {', '.join([*STREAMS, *sorted({name.split('.')[0] for name in names})])}, and modules inside them"


# --- LoRA adapters ---------------------------------------------------------------------------------------------------


def add_adapter(model: MMAudio, lora: LoraConfig) -> None:
    """Inject an adapter into the layers that `lora.targets` names and that are not frozen.

    Everything else is frozen. The model's output is unchanged at first. ValueError without peft or targets.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise ValueError("finetune.lora needs peft: run `pip install 'mmaudio-hf[lora]'`") from None

    targets = re.compile("|".join(LORA_TARGETS[t] for t in lora.targets))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d)) and targets.fullmatch(n)}
    if not any(m.weight.requires_grad for m in layers.values()):
        raise ValueError("finetune.lora.targets names only frozen layers: nothing is left to adapt")
    ranks = {name: lora.rank for name, module in layers.items() if module.weight.requires_grad}
    for pattern, _, rank in (entry.rpartition("=") for entry in lora.rank_pattern):
        if not (chosen := [name for name in ranks if _has_prefix(name.split("."), pattern.split("."))]):
            problem = f"no adapted layer is called {pattern!r}: {_suggestion(pattern, list(ranks))}"
            raise ValueError(f"finetune.lora.rank_pattern: {problem}")
        ranks |= dict.fromkeys(chosen, int(rank))
    ranks = {name: rank for name, rank in ranks.items() if rank}
    if not ranks:
        raise ValueError("finetune.lora.rank_pattern leaves no layer an adapter: give one a rank above 0")
    init: Any = True if lora.init in ("default", "pissa") else lora.init
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft's annotation says int; it only divides by the rank
        lora_dropout=lora.dropout,
        target_modules=list(ranks),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != lora.rank},
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=init,
    )
    # peft moves each new layer to the model, where it is already; fake tensors, of which memory is counted, cannot be.
    with patch.object(nn.Module, "to", lambda module, *_, **__: module):
        inject_adapter_in_model(config, model)
    for name in ranks:
        layer: Any = model.get_submodule(name)
        if lora.init == "pissa":
            _start_from_singular_vectors(layer)
        if lora.dora and isinstance(layer.base_layer, ChannelLastConv1d):
            magnitude = layer.lora_magnitude_vector["default"]
            magnitude.__class__ = _channel_last(type(magnitude))


@torch.no_grad()
def _start_from_singular_vectors(layer: Any) -> None:
    """PiSSA (Meng et al. 2024, arXiv 2404.02948, equations 2 to 4): s B A is the largest part of W, W keeps the rest.

    Not by peft, which takes no convolutions; these are matrices (out, in * kernel) here. A and B are kept as they were,
    since what has been learned is the difference.
    """
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight, scale = layer.base_layer.weight, layer.scaling["default"]
    if not weight.is_meta:  # when parameters are only counted
        u, s, v = torch.linalg.svd(weight.flatten(1).float(), full_matrices=False)
        root, rank = (s[: len(a)] / scale).sqrt(), len(a)
        a.copy_((root[:, None] * v[:rank]).view_as(a))
        b.copy_((u[:, :rank] * root).view_as(b))
        weight.sub_(_update(a, b) * scale)
    layer.register_buffer("pissa_A", a.detach().clone())
    layer.register_buffer("pissa_B", b.detach().clone())


def _channel_last(magnitude: type) -> type:
    """peft's DoRA of a convolution for outputs (B, N, out), where peft has (B, out, N); files stay the same."""

    class ChannelLastDora(magnitude):
        def get_weight_norm(self, *arguments: Any, **named: Any) -> torch.Tensor:
            return super().get_weight_norm(*arguments, **named).transpose(1, 2)

        def forward(
            self, x: torch.Tensor, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any, **_: Any
        ) -> torch.Tensor:
            # Equation 5 of the paper, the norm a constant of the gradient (section 4.3); peft adds the base's output.
            update = _update(lora_A.weight, lora_B.weight).view_as(base_layer.weight)
            norm = (base_layer.weight + scaling * update).flatten(1).norm(dim=1)
            ratio = self.weight.flatten() / norm.detach()
            plain = base_layer(x) if base_layer.bias is None else base_layer(x) - base_layer.bias
            return (ratio - 1) * plain + ratio * scaling * lora_B(lora_A(x))

    return ChannelLastDora


def _update(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """B A of factors (r, in[, kernel]) and (out, r[, 1]): convolutions have their kernel in A."""
    return torch.einsum("or,r...->o...", b.flatten(1), a)


def _group_factors(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        if match := _FACTOR.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["kind"] or match["pissa"] or match["dora"]] = value
    return layers


def merge_adapter(state: Mapping[str, torch.Tensor], alpha: float, rslora: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of a model with an adapter as those of the model alone, `W + s B A` (section 4.1 of the paper).

    s is alpha / r, or alpha / sqrt(r); of DoRA each output is scaled to its magnitude. Names are the released ones
    afterwards. On tensors and not by peft on modules, because checkpoints are written by a thread from copies.
    """
    merged = {n.replace(".base_layer.", "."): v for n, v in state.items() if not _FACTOR.fullmatch(n)}
    for layer, factors in _group_factors(state).items():
        weight, rank = merged[f"{layer}.weight"], len(factors["A"])
        update = _update(factors["A"], factors["B"]) * (alpha / (math.sqrt(rank) if rslora else rank))
        weight = weight + update.to(weight.device)
        if (magnitude := factors.get("magnitude_vector")) is not None:
            shape = (-1,) + (1,) * (weight.ndim - 1)
            weight = weight * (magnitude.to(weight.device).flatten() / weight.flatten(1).norm(dim=1)).view(shape)
        merged[f"{layer}.weight"] = weight
    return merged


def published_state(state: Mapping[str, torch.Tensor], lora: LoraConfig) -> dict[str, torch.Tensor]:
    """The tensors of a model that is trained with these settings, under the released names: adapters are merged."""
    merged = merge_adapter(state, lora.alpha, lora.rslora) if lora.rank else state
    return {name: value.float() for name, value in merged.items()}  # frozen ones may be in bfloat16


def save_adapter(state: Mapping[str, torch.Tensor], recipe: Recipe, folder: Path) -> None:
    """Write the adapter in `state` (tensors of a model with one) in peft's format, naming the weights it belongs to.

    An absolute path of those is left out, since the folder is meant to be published. What PiSSA has learned is the
    difference of two products, which is an adapter of twice the rank for the weights as they were.
    """
    lora, base, layers = recipe.finetune.lora, recipe.finetune.init_from, _group_factors(state)
    growth = 2 if lora.init == "pissa" else 1
    for factors in layers.values() if lora.init == "pissa" else ():
        factors["A"] = torch.cat([factors["A"], factors.pop("pissa_A")])
        factors["B"] = torch.cat([factors["B"], -factors.pop("pissa_B")], dim=1)
    ranks = {layer: len(factors["A"]) for layer, factors in layers.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None if Path(base).expanduser().is_absolute() else base,
        "r": lora.rank * growth,
        "lora_alpha": lora.alpha * (math.sqrt(growth) if lora.rslora else growth),
        "lora_dropout": lora.dropout,
        "target_modules": sorted(layers),
        "rank_pattern": {layer: rank for layer, rank in ranks.items() if rank != lora.rank * growth},
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude_vector": "lora_magnitude_vector"}
    tensors: dict[str, torch.Tensor] = {}
    for layer, factors in layers.items():
        named = {f"{_PEFT_PREFIX}{layer}.{names[kind]}": value for kind, value in factors.items()}
        tensors |= {name: value.detach().cpu().contiguous() for name, value in named.items()}
    save_tensors(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def comfyui_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter in `folder` under the keys of ComfyUI's loader of LoRA, whose scale is alpha / rank."""
    adapter, tensors = pretrained.read_adapter(folder), dict[str, torch.Tensor]()
    for layer, factors in _group_factors(adapter.state).items():
        name, rank = f"diffusion_model.{layer.removeprefix(_PEFT_PREFIX)}", len(factors["A"])
        alpha = adapter.config.lora_alpha * (math.sqrt(rank) if adapter.config.use_rslora else 1)
        tensors |= {f"{name}.lora_A.weight": factors["A"], f"{name}.lora_B.weight": factors["B"]}
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
        if "magnitude_vector" in factors:
            tensors[f"{name}.dora_scale"] = factors["magnitude_vector"].flatten()[:, None].contiguous()
    return tensors


def check_effect(folder: Path) -> None:
    """RunError when no layer of the adapter in `folder` changes anything: B A is zero, as at the start."""
    layers = _group_factors(pretrained.read_adapter(folder).state)
    if not any(_update(f["A"], f["B"]).norm() > 1e-6 * f["A"].norm() * f["B"].norm() for f in layers.values()):
        raise RunError(
            f"{folder}: the adapter has no effect, B is zero in all {len(layers)} layers: the run trained nothing."
            " Raise optim.learning_rate or training.steps, and look for skipped steps in metrics.jsonl"
        )


def merged_adapter(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Path]:
    """Configuration and tensors of the model with the adapter in `folder` merged into the weights it names.

    ValueError where these are not named, or the adapter does not fit them.
    """
    adapter = pretrained.read_adapter(folder)
    if not (base := adapter.config.base_model_name_or_path):
        raise ValueError(f"{folder / ADAPTER_CONFIG} does not name its weights: put them into base_model_name_or_path")
    config, state, source = read_pretrained(base)
    model = MMAudio.from_config_and_state(config, state, source)
    pretrained.merge_adapters(model, [(adapter, 1.0)], {})
    return config, model.state_dict(), folder / ADAPTER_WEIGHTS


def seed_dropout(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Make an adapter's dropout in one forward pass a function of these numbers, so that a resumed run repeats it.

    The masks depend on how a batch is split: with dropout, other process counts train another (equally good) model.
    """
    digest = hashlib.sha256(f"dropout {seed} {step} {micro_batch} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
