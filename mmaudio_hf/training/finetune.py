"""Fine-tuning: which weights a run starts from, which parameters are frozen, and LoRA adapters.

An adapter (LoRA, Hu et al. 2021, arXiv 2106.09685) is injected by peft and trained in place of the model. What is
published has it merged, so that nothing else needs peft; checkpoints hold `adapter/` besides, in peft's format.
"""

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from mmaudio_hf.config import FinetuneConfig, LoraConfig, ModelConfig, Recipe, read_json
from mmaudio_hf.models.convert import check_sizes
from mmaudio_hf.models.network import FROZEN_TENSORS, MMAudio
from mmaudio_hf.models.pretrained import DERIVED_TENSORS, ENCODERS_FILE, read_network
from mmaudio_hf.training.checkpoint import list_checkpoints
from mmaudio_hf.weights import load_state

# Short names in finetune.freeze for everything that one condition passes through on its own.
STREAMS = {
    "text": ("text_input_proj", "text_cond_proj", "joint_blocks.*.text_block"),
    "clip": ("clip_input_proj", "clip_cond_proj", "empty_clip_feat", "joint_blocks.*.clip_block"),
    "sync": ("sync_input_proj", "sync_pos_emb", "empty_sync_feat"),
}
# Layers of a transformer block; the CLIP and text streams of the last joint block have only the first.
LORA_TARGETS = {"qkv": r"attn\.qkv", "proj": r"linear1", "mlp": r"ffn\.w[123]"}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


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
        check_encoders(Path(source).parent / ENCODERS_FILE, recipe.encoders.kind)
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
    return {name: value for name, value in state.items() if name not in DERIVED_TENSORS}


def check_encoders(path: Path, kind: str) -> None:
    """ValueError where weights were trained with other encoders: toy features only have the same shapes."""
    if path.is_file() and (trained := read_json(path).get("kind", kind)) != kind:
        raise ValueError(f"{path}: the weights were trained with {trained} encoders, the recipe has {kind} ones")


def read_pretrained(source: str) -> tuple[ModelConfig, dict[str, torch.Tensor], Path]:
    """Configuration and tensors of pretrained weights, and their file; see `FinetuneConfig.init_from`.

    ValueError naming what is missing or does not fit.
    """
    if (Path(source) / ADAPTER_CONFIG).is_file():
        return read_adapter(Path(source))
    return read_network(source)


# --- Frozen parameters -----------------------------------------------------------------------------------------------


def set_trainable(model: MMAudio, settings: FinetuneConfig) -> MMAudio:
    """Freeze what `settings` say and add the adapter; returns the model. ValueError when nothing is left to train."""
    freeze(model, settings.freeze)
    if settings.lora.rank:
        add_adapter(model, settings.lora)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("finetune.freeze leaves nothing to train: take a pattern out")
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
    return len(prefix) <= len(name) and all(_matches(*pair) for pair in zip(name, prefix, strict=False))


def _matches(component: str, pattern: str) -> bool:
    if bounds := re.fullmatch(r"(\d+)-(\d+)", pattern):
        return component.isdigit() and int(bounds[1]) <= int(component) <= int(bounds[2])
    return fnmatch.fnmatchcase(component, pattern)


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    prefixes = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
    close = difflib.get_close_matches(pattern, [*STREAMS, *sorted(prefixes)], n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"valid: {', '.join([*STREAMS, *sorted({name.split('.')[0] for name in names})])}, and modules inside them"


# --- LoRA adapters ---------------------------------------------------------------------------------------------------


def add_adapter(model: MMAudio, lora: LoraConfig) -> None:
    """Inject an adapter into the layers of the blocks that `lora.targets` names and that are not frozen.

    Everything else is frozen. B is zero at first, so the model's output is unchanged. ValueError without peft or
    targets.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise ValueError("finetune.lora needs peft: run `pip install 'mmaudio-hf[lora]'`") from None

    targets = re.compile(rf"(joint_blocks|fused_blocks)\..*\b({'|'.join(LORA_TARGETS[t] for t in lora.targets)})")
    chosen = [n for n, m in model.named_modules() if targets.fullmatch(n) and m.weight.requires_grad]
    if not chosen:
        raise ValueError("finetune.lora.targets names only frozen layers: nothing is left to adapt")
    # peft's annotation says int for alpha; it only divides by the rank.
    config = PeftConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=chosen)  # type: ignore[arg-type]
    inject_adapter_in_model(config, model)


def merge_adapter(state: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Tensors of a model with an adapter as those of the model alone, `W + scale * B A` (section 4.1 of the paper).

    Names are the released ones afterwards. On tensors and not by peft on modules, because checkpoints are written by a
    thread from copies. A: (r, in[, kernel]), B: (out, r[, 1]); convolutions have their kernel in A.
    """
    factors = {(m[1], m[2]): value for name, value in state.items() if (m := _FACTOR.fullmatch(name))}
    merged = {n.replace(".base_layer.", "."): v for n, v in state.items() if not _FACTOR.fullmatch(n)}
    for (layer, kind), b in factors.items():
        if kind == "B":
            weight = merged[f"{layer}.weight"]
            update = torch.einsum("or,r...->o...", b.flatten(1), factors[layer, "A"])
            merged[f"{layer}.weight"] = weight + update.to(weight.device) * scale
    return merged


def published_state(state: Mapping[str, torch.Tensor], lora: LoraConfig) -> dict[str, torch.Tensor]:
    """The tensors of a model that is trained with these settings, under the released names: adapters are merged."""
    return merge_adapter(state, lora.alpha / lora.rank) if lora.rank else dict(state)


def save_adapter(state: Mapping[str, torch.Tensor], recipe: Recipe, folder: Path) -> None:
    """Write the adapter in `state` (tensors of a model with one) in peft's format, naming the weights it belongs to.

    An absolute path of those is left out, since the folder is meant to be published.
    """
    lora, base = recipe.finetune.lora, recipe.finetune.init_from
    factors = {m: value for name, value in state.items() if (m := _FACTOR.fullmatch(name))}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None if Path(base).expanduser().is_absolute() else base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted({m[1] for m in factors}),
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    tensors = {f"{_PEFT_PREFIX}{m[1]}.lora_{m[2]}.weight": v.detach().cpu().contiguous() for m, v in factors.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Path]:
    """Configuration and tensors of the model with the adapter in `folder` merged into the weights it names.

    ValueError where these are not named, or the adapter is of another kind than plain LoRA.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = read_json(path)
        scale, base = config["lora_alpha"] / config["r"], config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not the configuration of a LoRA adapter ({error!r})") from error
    kinds = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    other = [name for name in kinds if config.get(name)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if config.get("peft_type") != "LORA" or other:
        raise ValueError(
            f"{path}: only plain LoRA can be merged here, not {', '.join(other) or config.get('peft_type')}"
        )
    if not base:
        raise ValueError(f"{path} does not name its weights: put them into base_model_name_or_path")
    model_config, state, _ = read_pretrained(base)
    factors = {n.removeprefix(_PEFT_PREFIX): v for n, v in load_state(folder / ADAPTER_WEIGHTS).items()}
    for name, value in factors.items():
        match = _FACTOR.fullmatch(name)
        weight = state.get(f"{match[1]}.weight") if match else None
        side = 0 if match and match[2] == "B" else 1  # B has the outputs of the weight, A its inputs
        if weight is None or value.shape[side] != weight.shape[side]:
            raise ValueError(f"{folder / ADAPTER_WEIGHTS}: {name} does not fit the weights of {base}")
    return model_config, merge_adapter(state | factors, scale), folder / ADAPTER_WEIGHTS


def seed_dropout(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Make an adapter's dropout in one forward pass a function of these numbers, so that a resumed run repeats it.

    The masks depend on how a batch is split: with dropout, other process counts train another (equally good) model.
    """
    digest = hashlib.sha256(f"dropout {seed} {step} {micro_batch} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
