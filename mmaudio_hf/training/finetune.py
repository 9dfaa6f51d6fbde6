"""Training that starts from trained weights: where they come from, which part of them is trained, and adapters.

A low-rank adapter (LoRA, Hu et al. 2021) is put into the network by peft and trained in place of it; what is published
has the adapter merged, so that nothing else needs peft. Checkpoints hold `adapter/` besides, in peft's own format.
"""

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mmaudio_hf.config import FinetuneConfig, LoraConfig, ModelConfig, Recipe
from mmaudio_hf.models.convert import check_sizes, infer_config
from mmaudio_hf.models.network import FROZEN_TENSORS, MMAudio
from mmaudio_hf.models.pretrained import (
    CONFIG_FILE,
    DERIVED_TENSORS,
    ENCODERS_FILE,
    WEIGHTS_FILE,
    find_pretrained,
    read_model_config,
)
from mmaudio_hf.training.checkpoint import list_checkpoints
from mmaudio_hf.weights import load_state

# Short names in finetune.freeze for everything that one condition passes through on its own.
STREAMS = {
    "text": ("text_input_proj", "text_cond_proj", "joint_blocks.*.text_block"),
    "clip": ("clip_input_proj", "clip_cond_proj", "empty_clip_feat", "joint_blocks.*.clip_block"),
    "sync": ("sync_input_proj", "sync_pos_emb", "empty_sync_feat"),
}
# Maps inside a transformer block; the CLIP and text streams of the last joint block have only the first.
LORA_TARGETS = {"qkv": r"attn\.qkv", "proj": r"linear1", "mlp": r"ffn\.w[123]"}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX, _PEFT_NAME = "base_model.model.", "default"
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def initial_model(
    recipe: Recipe,
    latent_statistics: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    empty_text: Callable[[], torch.Tensor],
) -> MMAudio:
    """The network that a run starts with, its trained and frozen parts marked and adapters in place.

    `latent_statistics` and `empty_text` give those of the data; trained weights keep their own unless the recipe says
    otherwise. When the run has a checkpoint, its weights will replace all of this and `finetune.init_from` is not read.
    Random weights depend on torch's generator. ValueError where the start does not fit the recipe.
    """
    settings = recipe.finetune
    resumed = recipe.resume == "auto" and list_checkpoints(recipe.run_dir)
    if settings.init_from and not resumed:
        network = _load_start(recipe)
    else:
        network = MMAudio(recipe.model)
    fresh = not settings.init_from
    if fresh or (settings.latent_statistics == "recompute" and not resumed):
        network.set_latent_statistics(*latent_statistics())
    if fresh or (settings.empty_text == "recompute" and not resumed):
        network.set_empty_text(empty_text())
    return set_trainable(network, settings)


def _load_start(recipe: Recipe) -> MMAudio:
    config, state, source = read_pretrained(recipe.finetune.init_from)
    check_sizes(config, recipe.model, source)
    _check_encoders(Path(source).parent / ENCODERS_FILE, recipe.encoders.kind)
    network = MMAudio.from_config_and_state(recipe.model, state, source)
    for name in ("latent_mean", "latent_std"):
        if not getattr(network, name).isfinite().all():
            raise ValueError(f"{source} has a {name} that is not finite: nothing can be trained with it")
    return network


def _check_encoders(path: Path, kind: str) -> None:
    """The features of a toy and of released encoders have the same shapes and nothing else in common."""
    if path.is_file() and (noted := json.loads(path.read_text()).get("kind", kind)) != kind:
        raise ValueError(f"{path}: the weights were trained with {noted} encoders, the recipe has {kind} ones")


def read_pretrained(source: str) -> tuple[ModelConfig, dict[str, torch.Tensor], Path]:
    """Configuration and tensors of trained weights, and the file they are in; see `FinetuneConfig.init_from`.

    ValueError naming what is missing or does not fit.
    """
    path = Path(source)
    if path.is_file() or path.suffix in (".pth", ".pt", ".safetensors"):
        state = {n: t for n, t in load_state(path, key="weights").items() if n not in DERIVED_TENSORS}
        return infer_config(state, path), state, path
    if (path / ADAPTER_CONFIG).is_file():
        return read_adapter(path)
    folder = find_pretrained(source)
    return read_model_config(folder / CONFIG_FILE), load_state(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE


# --- frozen parts --------------------------------------------------------------------------------------------------


def set_trainable(network: MMAudio, settings: FinetuneConfig) -> MMAudio:
    """Freeze what `settings` say and add the adapter; returns the network. ValueError when nothing is left to train."""
    freeze(network, settings.freeze)
    if settings.lora.rank:
        add_adapter(network, settings.lora)
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError("finetune.freeze leaves nothing to train: take a pattern out")
    return network


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Exempt the parameters that `patterns` name from training.

    A pattern is the opening part of names, cut at dots: `fused_blocks`, `joint_blocks.0-3` (a range of numbers, ends
    included), `joint_blocks.*.clip_block.attn`; or text, clip or sync, for what one condition passes through on its
    own. ValueError, with the nearest names, where a pattern names nothing.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        parts = [p.split(".") for p in STREAMS.get(pattern, (pattern,))]
        chosen = {name for name in names if any(_opens(wanted, name.split(".")) for wanted in parts)}
        if not chosen:
            raise ValueError(f"finetune.freeze: no parameter is called {pattern!r}: {_nearest_part(pattern, names)}")
        for name in chosen:
            network.get_parameter(name).requires_grad_(False)


def frozen_parameters(network: nn.Module) -> list[str]:
    """Parameters that this run does not train; without the three that no run trains, which averages always hold."""
    return [n for n, p in network.named_parameters() if not p.requires_grad and n not in FROZEN_TENSORS]


def _opens(wanted: Sequence[str], name: Sequence[str]) -> bool:
    return len(wanted) <= len(name) and all(_matches(w, part) for w, part in zip(wanted, name, strict=False))


def _matches(wanted: str, part: str) -> bool:
    if bounds := re.fullmatch(r"(\d+)-(\d+)", wanted):
        return part.isdigit() and int(bounds[1]) <= int(part) <= int(bounds[2])
    return fnmatch.fnmatchcase(part, wanted)


def _nearest_part(pattern: str, names: Sequence[str]) -> str:
    openings = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
    close = difflib.get_close_matches(pattern, [*STREAMS, *sorted(openings)], n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"valid: {', '.join([*STREAMS, *sorted({name.split('.')[0] for name in names})])}, and parts of them"


# --- adapters ------------------------------------------------------------------------------------------------------


def add_adapter(network: MMAudio, lora: LoraConfig) -> None:
    """Put a low-rank adapter beside the maps of the transformer blocks that `lora.targets` names and that are trained.

    Everything else is frozen. The output of the network is unchanged at first. ValueError without peft or targets.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise ValueError("finetune.lora needs peft: run `pip install 'mmaudio-hf[lora]'`") from None

    wanted = re.compile(rf"(joint_blocks|fused_blocks)\..*\b({'|'.join(LORA_TARGETS[t] for t in lora.targets)})")
    chosen = [n for n, m in network.named_modules() if wanted.fullmatch(n) and m.weight.requires_grad]
    if not chosen:
        raise ValueError("finetune.lora.targets names only frozen parts: nothing is left to adapt")
    config = PeftConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=chosen)
    inject_adapter_in_model(config, network)


def merge_adapter(state: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Tensors of a network with an adapter as those of the network alone: `W + scale * B A`.

    Convolutions have the kernel in A, and a kernel of 1 in B. Names are the released ones afterwards.
    """
    factors = {(m[1], m[2]): value for name, value in state.items() if (m := _FACTOR.fullmatch(name))}
    merged = {n.replace(".base_layer.", "."): v for n, v in state.items() if not _FACTOR.fullmatch(n)}
    for (layer, kind), b in factors.items():
        if kind == "B":
            weight = merged[f"{layer}.weight"]
            change = torch.einsum("or,r...->o...", b.flatten(1), factors[layer, "A"])
            merged[f"{layer}.weight"] = weight + change.to(weight.device) * scale
    return merged


def published_state(state: Mapping[str, torch.Tensor], lora: LoraConfig) -> dict[str, torch.Tensor]:
    """The tensors of a network that is trained with these settings, under the released names: adapters are merged."""
    return merge_adapter(state, lora.alpha / lora.rank) if lora.rank else dict(state)


def save_adapter(state: Mapping[str, torch.Tensor], recipe: Recipe, folder: Path) -> None:
    """Write the adapter in `state` (tensors of a network with one) as peft does, naming the weights it belongs to.

    An absolute path of those is left out, since the folder is meant to be published.
    """
    lora, base = recipe.finetune.lora, recipe.finetune.init_from
    factors = {m: value for name, value in state.items() if (m := _FACTOR.fullmatch(name))}
    layers = sorted({m[1] for m in factors})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None if Path(base).expanduser().is_absolute() else base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": layers,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    tensors = {f"{_PEFT_PREFIX}{m[1]}.lora_{m[2]}.weight": v.detach().cpu().contiguous() for m, v in factors.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Path]:
    """Configuration and tensors of the network with the adapter in `folder` merged into the weights it names.

    ValueError where these are not named, or the adapter is of another kind than plain LoRA.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text())
        scale, base = config["lora_alpha"] / config["r"], config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not the configuration of a LoRA adapter ({error!r})") from error
    kinds = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    odd = [name for name in kinds if config.get(name)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if config.get("peft_type") != "LORA" or odd:
        raise ValueError(f"{path}: only plain LoRA can be merged here, not {', '.join(odd) or config.get('peft_type')}")
    if not base:
        raise ValueError(f"{path} does not name its weights: put them into base_model_name_or_path")
    model, state, _ = read_pretrained(base)
    added = {n.removeprefix(_PEFT_PREFIX): v for n, v in load_state(folder / ADAPTER_WEIGHTS).items()}
    for name, value in added.items():
        match = _FACTOR.fullmatch(name)
        weight = state.get(f"{match[1]}.weight") if match else None
        side = (0, 0) if match and match[2] == "B" else (1, 1)
        if weight is None or value.shape[side[0]] != weight.shape[side[1]]:
            raise ValueError(f"{folder / ADAPTER_WEIGHTS}: {name} does not fit the weights of {base}")
    return model, merge_adapter(state | added, scale), folder / ADAPTER_WEIGHTS


def seed_dropout(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Make the dropout of an adapter in one forward pass a function of these numbers, so that a resumed run repeats it.

    The masks depend on how a batch is divided: with dropout, other process counts train another (equally good) model.
    """
    digest = hashlib.sha256(f"dropout {seed} {step} {micro_batch} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
