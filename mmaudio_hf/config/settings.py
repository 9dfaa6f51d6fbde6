"""The settings of an experiment: a tree of frozen dataclasses, every field with its description and its limits.

`reading` generates docs/settings.md, `train.py --help-settings` and recipes/schema.json from the descriptions. Nothing
here imports torch: a mistake in a recipe is reported before anything heavy is loaded.
"""

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

from mmaudio_hf import schema

__all__ = ["RELEASED_LICENSE", "VARIANTS", "AudioSource", "DataConfig", "DatasetConfig", "EarlyStoppingConfig"]
__all__ += ["EmaConfig", "EncoderConfig", "ExtractionConfig", "FinetuneConfig", "FlowConfig", "HubConfig", "LoraConfig"]
__all__ += ["ModelConfig", "OptimConfig", "Recipe", "SamplingConfig", "StoreConfig", "TrainingConfig", "VideoSource"]
__all__ += ["config_of_duration", "is_released", "micro_batch_size", "samples_per_step", "variant_config"]

RELEASED_LICENSE = "cc-by-nc-4.0"  # of the released networks, as the Hub names it

Combination = Literal["video_text", "video", "text", "none"]
Metric = Literal["fd", "kl", "is", "ib", "desync", "clap", "kad", "aesthetics"]
Pushed = Literal["pretrained_model", "training_state"]
Target = Literal["qkv", "proj", "mlp", "modulation", "inputs", "conditions", "output"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
_ALL: tuple[Combination, ...] = ("video_text", "video", "text", "none")
_REJECT: tuple[schema.AuditVerdict, ...] = ("leakage", "duplicate_content", "still", "silent")
_MULTIPLE = 8  # samples
_SECRET = r"://[^/]*@|hf_\w{20}"
_CLIP = "apple/DFN5B-CLIP-ViT-H-14-384"

# A configuration from the Hub may hold any number: larger ones would take all memory before the weights are compared.
MAX_WIDTH, MAX_TOKENS = 2**16, 2**20

# Limits of `setting`: words of the message, comparison, JSON schema keyword.
LIMITS = {
    "least": ("at least", operator.ge, "minimum"),
    "above": ("more than", operator.gt, "exclusiveMinimum"),
    "most": ("at most", operator.le, "maximum"),
    "below": ("less than", operator.lt, "exclusiveMaximum"),
}


class RecipeError(ValueError):
    """A mistake in a recipe or an override; the message names the key, the file and the way out."""


def nearest(name: str, options: Iterable[str]) -> str:
    """The option that `name` may be meant for, and all of them, for an error message."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    valid = f"valid: {', '.join(options)}"
    return f"did you mean {close[0]!r}? ({valid})" if close else valid


def setting(
    default: Any,
    description: str,
    *,
    path: bool = False,
    unique: bool = False,
    nonempty: bool = False,
    needed: str = "",
    **limits: float,
) -> Any:
    """A field with its description; `default` MISSING for a required one.

    path: `~` and environment variables are expanded. unique: of lists. nonempty: of lists and text. needed: why the
    key may not be left out of a section that is written. limits: `LIMITS`, of the number or of every number of a list.
    """
    metadata = {"path": path, "unique": unique, "nonempty": nonempty, "needed": needed, "limits": limits}
    return field(default=default, metadata={"description": description, **metadata})


def limit_words(limits: dict[str, float]) -> str:
    """`limits` as in messages and docs: "at least 0 and less than 1"."""
    return " and ".join(f"{LIMITS[name][0]} {limit}" for name, limit in limits.items())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)  # of a section: they never change


def _repeated(names: Iterable[Any]) -> list[Any]:
    names = list(names)
    return sorted({name for name in names if names.count(name) > 1})


@dataclass(frozen=True)
class Settings:
    """Base of the sections. Construction checks the limits of the fields, then `check`; ValueError names the key."""

    key: ClassVar[str] = ""  # of the section in a recipe

    def _check_types(self) -> None:
        """Lists become tuples, and paths text."""
        for item in fields(self):
            value, hint = getattr(self, item.name), _hints(type(self))[item.name]
            converted = tuple(value) if isinstance(value, list) else value
            converted = str(value) if isinstance(value, Path) and item.metadata.get("path") else converted
            if converted is not value:
                object.__setattr__(self, item.name, converted)
            if type(converted) is not hint:  # numbers of any size are compared with their limits
                schema.require_type(converted, hint, f"{self.key}.{item.name}".lstrip("."))

    def __post_init__(self) -> None:
        self._check_types()
        for item in fields(self):
            value, path = getattr(self, item.name), f"{self.key}.{item.name}".lstrip(".")
            limits = item.metadata.get("limits", {})
            for number in value if isinstance(value, tuple) else (value,):
                if not all(LIMITS[name][1](number, limit) for name, limit in limits.items()):
                    raise ValueError(f"{path} must be {limit_words(limits)}, not {number!r}")
            if item.metadata.get("nonempty"):
                _require(bool(value), f"{path} must not be empty")
            if item.metadata.get("path") and item.default != "":  # as a path, "" is the current folder
                paths = value if isinstance(value, tuple) else (value,)
                _require(all(text.strip() for text in paths), f"{path} must not be empty")
            if item.metadata.get("unique"):
                _require(not _repeated(value), f"{path} names {', '.join(map(str, _repeated(value)))} twice")
        self.check()

    def check(self) -> None:
        """What the fields require of each other."""


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Sizes of the flow network; `variant` fills in those of a released one (MMAudio, arXiv 2412.15322, table 1)."""

    key = "model"
    variant: str = setting("small_16k", "released network whose sizes are the defaults of the keys below")
    mode: Literal["16k", "44k"] = setting("16k", "sample rate: 16 kHz or 44.1 kHz")
    hidden_dim: int = setting(448, "width of the transformer", least=1, most=MAX_WIDTH)
    num_heads: int = setting(7, "attention heads", least=1)
    depth: int = setting(12, "joint and fused blocks together", least=1, most=256)
    fused_depth: int = setting(8, "fused blocks, which see the audio tokens alone", least=0)
    v2: bool = setting(False, "the large_44k_v2 network: other condition projections and time embedding")
    clip_dim: int = setting(schema.CLIP_DIM, "width of CLIP image features", least=1, most=MAX_WIDTH)
    sync_dim: int = setting(schema.SYNC_DIM, "width of Synchformer features", least=1, most=MAX_WIDTH)
    text_dim: int = setting(schema.TEXT_DIM, "width of CLIP text features", least=1, most=MAX_WIDTH)
    text_tokens: int = setting(schema.TEXT_TOKENS, "tokens of a caption", least=1, most=MAX_WIDTH)
    duration: float = setting(8.0, "seconds of a clip; the lengths below follow from it")
    latent_channels: int = setting(0, "channels of the latents; 0: those of the mode", most=MAX_WIDTH)
    latent_length: int = setting(0, "latent frames; 0: from duration, likewise the next two", most=MAX_TOKENS)
    clip_length: int = setting(0, "frames with CLIP features", most=MAX_TOKENS)
    sync_length: int = setting(0, "Synchformer tokens", most=MAX_TOKENS)

    def __post_init__(self) -> None:
        self._check_types()
        # Before lengths are computed, which overflow.
        _require(0 < self.duration <= 3600, f"model.duration must be more than 0 and at most 3600, not {self.duration}")
        lengths = schema.sequence_lengths(self.mode, self.duration)
        derived = {"latent_channels": schema.audio_mode(self.mode).latent_channels, "latent_length": lengths.latent}
        derived |= {"clip_length": lengths.clip, "sync_length": lengths.sync}
        for name, value in derived.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        super().__post_init__()

    def check(self) -> None:
        """The arithmetic that the layers rely on."""
        message = f"model.hidden_dim {self.hidden_dim} must be an even multiple of model.num_heads {self.num_heads}"
        _require(self.hidden_dim % (2 * self.num_heads) == 0, message)
        message = f"model.fused_depth {self.fused_depth} must be less than model.depth {self.depth}"
        _require(self.fused_depth < self.depth, message)
        _require(self.sync_length % 8 == 0, f"model.sync_length {self.sync_length} must be a multiple of 8")
        for name in ("latent_channels", "latent_length", "clip_length", "sync_length"):
            _require(getattr(self, name) > 0, f"model.{name} must be positive")

    @property
    def joint_depth(self) -> int:
        """Number of joint blocks."""
        return self.depth - self.fused_depth


_SMALL = {"hidden_dim": 448, "num_heads": 7, "depth": 12, "fused_depth": 8}
_MEDIUM = {"hidden_dim": 896, "num_heads": 14, "depth": 12, "fused_depth": 8}
_LARGE = {"hidden_dim": 896, "num_heads": 14, "depth": 21, "fused_depth": 14}
VARIANTS: dict[str, dict[str, Any]] = {
    "small_16k": {"mode": "16k", **_SMALL},
    "small_44k": {"mode": "44k", **_SMALL},
    "medium_44k": {"mode": "44k", **_MEDIUM},
    "large_44k": {"mode": "44k", **_LARGE},
    "large_44k_v2": {"mode": "44k", **_LARGE, "v2": True},
}


def is_released(source: Any) -> bool:
    """Whether a path has the name of a released network, as `ext_weights/mmaudio_small_16k.pth`."""
    names = "|".join(VARIANTS)
    return isinstance(source, (str, Path)) and bool(re.fullmatch(rf"mmaudio_({names})(\.\w+)?", Path(source).name))


def variant_config(variant: str, **changes: Any) -> ModelConfig:
    """Configuration of a released network, with `changes` to single fields. ValueError for unknown names."""
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(f"unknown model variant {variant!r}: {nearest(str(variant), VARIANTS)}")
    if unknown := next((name for name in changes if name not in ModelConfig.__dataclass_fields__), None):
        raise ValueError(f"unknown key model.{unknown}: {nearest(unknown, ModelConfig.__dataclass_fields__)}")
    return ModelConfig(**{"variant": variant, **VARIANTS[variant], **changes})


@schema.checked
def config_of_duration(model: ModelConfig, duration: float) -> ModelConfig:
    """The same network set to clips of another duration; with its own duration, the lengths that it was given."""
    if duration == model.duration:
        return model
    return replace(model, duration=duration, latent_length=0, clip_length=0, sync_length=0)


@dataclass(frozen=True)
class EncoderConfig(Settings):
    """The frozen networks that make features and decode latents."""

    key = "encoders"
    kind: Literal["released", "toy"] = setting("released", "the published networks, or formulas for tests and examples")
    weights_dir: str = setting("ext_weights", "folder of published files, or of the fitted toy codec", path=True)
    clip: str = setting(_CLIP, "Hub id, folder of transformers files, or open_clip checkpoint", path=True)
    precision: Literal["fp32", "bf16"] = setting("fp32", "number type of CLIP and Synchformer")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class DatasetConfig(Settings):
    """A data set that the media and the list of a source are written from."""

    key = "dataset"
    path: str = setting("", "Hub id, folder, or BUILDER:FILES as in webdataset:clips/*.tar; empty: none", path=True)
    name: str = setting("", "configuration of a data set that has several")
    revision: str = setting("", "branch, tag or commit on the Hub; empty: the newest")
    split: str = setting("train", "split to use")
    streaming: bool = setting(True, "read files as they come; false: download them first, to the cache of the Hub")
    media_column: str = setting("", "column of the media; empty: the first of videos or audio")
    id_column: str = setting("", "column of file names; empty: the names of the media, __key__ of a WebDataset")
    text_column: str = setting("", "column of captions; empty: caption, text, label, description or txt")

    def check(self) -> None:
        """A path where anything else is set."""
        changed = [item.name for item in fields(self) if getattr(self, item.name) != item.default]
        _require(bool(self.path) or not changed, f"dataset.path is missing beside {', '.join(changed)}")
        _require(not re.search(_SECRET, self.path), "dataset.path holds a password or token: remove it")


@dataclass(frozen=True)
class MediaSource(Settings):
    """A folder of media files of which one feature store is made."""

    name: str = setting(MISSING, "name of the store")
    media_dir: str = setting(MISSING, "folder of the files; those of a data set are written to it", path=True)
    list: str = setting(MISSING, "TSV of the files to use: id, label of videos; id, caption of audio files", path=True)
    dataset: DatasetConfig = field(default=DatasetConfig(), kw_only=True)


@dataclass(frozen=True)
class VideoSource(MediaSource):
    """A folder of videos of which one feature store is made."""

    key = "extraction.videos"
    normalize_audio: bool = setting(True, "scale the audio to a peak of 0.95")
    max_clips: int = setting(1, "clips of each video, evenly spread; 0: all that fit; 1: its first seconds", least=0)
    clips: str = setting("", "list of the clips of long videos; empty: beside the store", path=True)
    duration: float = setting(0.0, "seconds of its clips; 0: model.duration", least=0, most=3600)


@dataclass(frozen=True)
class AudioSource(MediaSource):
    """A folder of audio files of which one feature store is made."""

    key = "extraction.audios"
    clips: str = setting("", "clips.tsv, which `mmaudio-hf partition` writes; empty: beside the store", path=True)
    captions: Literal["all", "last", "first"] = setting("all", "which captions of a file with several make rows")
    duration: float = setting(0.0, "seconds of its clips, 0.1 less than is cut; 0: model.duration", least=0, most=3600)
    max_clips: int = setting(5, "clips of each file, evenly spread, as published; 0: all that fit", least=0)


@dataclass(frozen=True)
class ExtractionConfig(Settings):
    """What features are extracted from, and how."""

    key = "extraction"
    output_dir: str = setting("output/features", "folder of the feature stores", path=True)
    videos: tuple[VideoSource, ...] = setting((), "folders of videos, one store each")
    audios: tuple[AudioSource, ...] = setting((), "folders of audio files, one store each")
    shards_dir: str = setting("", "folder of the intermediate shards; empty: output_dir", path=True)
    alignment: Literal["timestamps", "reference"] = setting(
        "timestamps", "frames by their timestamps, or by number as in the reference code"
    )
    layout: Literal["reference", "compact"] = setting(
        "reference", "of the stores; compact: CLIP and text features in bfloat16, each text once"
    )
    sync_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of Synchformer features; bfloat16 in the compact layout only"
    )
    batch_size: int = setting(16, "clips per forward pass of an encoder", least=1)
    num_proc: int = setting(1, "processes that decode media", least=1)
    shard_size: int = setting(512, "items of a shard, which is redone when it was interrupted", least=1)
    audit: str = setting("", "table that `mmaudio-hf audit` wrote; empty: nothing is left out by it", path=True)
    reject: tuple[schema.AuditVerdict, ...] = setting(_REJECT, "verdicts of the audit that leave an item out")
    correct_offset: bool = setting(
        False, "shift the audio of videos with the verdict offset by what the audit found; needs audit --sync"
    )

    def clips_path(self, source: VideoSource | AudioSource) -> Path:
        """The clip list of a source: named in the recipe, or beside its store."""
        return Path(source.clips or Path(self.output_dir) / f"{source.name}.clips.tsv")

    def check(self) -> None:
        """One name per store, and a number type that the layout has."""
        fits = self.layout == "compact" or self.sync_dtype == "float32"
        _require(fits, "extraction.sync_dtype bfloat16 needs extraction.layout compact")
        timestamps, corrects = self.alignment == "timestamps", self.correct_offset
        message = "extraction.videos.max_clips needs extraction.alignment timestamps"
        whole = all(source.max_clips == 1 for source in self.videos)
        _require(timestamps or whole, f"{message}: the reference reads no later clips")
        message = "extraction.correct_offset needs extraction.audit, the table of `mmaudio-hf audit --sync`, and"
        _require(not corrects or (bool(self.audit) and timestamps), f"{message} extraction.alignment timestamps")
        message = "extraction.correct_offset shifts what extraction.reject offset leaves out: choose one of the two"
        _require(not corrects or "offset" not in self.reject, message)
        sources: list[VideoSource | AudioSource] = [*self.videos, *self.audios]
        twice = ", ".join(_repeated(source.name for source in sources))
        _require(not twice, f"extraction: two sources are called {twice}; store names must differ")
        written = {source.list for source in sources if source.dataset.path}
        shared = ", ".join(written.intersection(_repeated(source.list for source in sources)))
        _require(not shared, f"extraction: two sources have the list {shared}, which is written from a data set")


@dataclass(frozen=True)
class StoreConfig(Settings):
    """A feature store and its weight in the mixture."""

    key = "data"
    path: str = setting(MISSING, "feature store: the path without an ending, or hub://owner/name", path=True)
    repeats: float = setting(1.0, "visits of every row per epoch; 0.5: half of the rows in each epoch", above=0)


@dataclass(frozen=True)
class DataConfig(Settings):
    """The mixture that is trained on, the held-out stores, and how they are read."""

    key = "data"
    train: tuple[StoreConfig, ...] = setting((), "stores of the training mixture")
    validation: tuple[StoreConfig, ...] = setting((), "stores of the validation split")
    test: tuple[StoreConfig, ...] = setting((), "stores of the test split")
    prefetch_batches: int = setting(2, "batches that are read ahead", least=1)
    read_threads: int = setting(4, "threads that read batches and draw their noise, at most one a core", least=1)
    cache_dir: str = setting("output/cache", "folder of what is fetched of stores on the Hub", path=True)
    cache_gb: float = setting(50.0, "that folder never has more, in 10^9 bytes", above=0)
    connections: int = setting(64, "requests of a process that the Hub answers at once", least=1, most=1024)
    connection_wait: int = setting(600, "s, at most, that a lost connection to these stores is waited for", least=0)

    def on_hub(self, splits: Sequence[str] = ("train", "validation", "test")) -> dict[str, float]:
        """Stores of these splits that are on the Hub, with their repeats."""
        stores = [store for split in reversed(splits) for store in getattr(self, split)]  # train counts
        return {store.path: store.repeats for store in stores if store.path.startswith(schema.HUB_PREFIX)}

    def check(self) -> None:
        """Names of stores on the Hub."""
        for source in self.on_hub():
            schema.split_hub_id(source.removeprefix(schema.HUB_PREFIX))


@dataclass(frozen=True)
class FlowConfig(Settings):
    """The flow matching objective (MMAudio, arXiv 2412.15322, section 3.1)."""

    key = "flow"
    min_sigma: float = setting(0.0, "noise that remains at t = 1", least=0, below=1)
    time_mean: float = setting(0.0, "m of t = sigmoid(m + s z), z standard normal (Esser et al. 2024, section 3.1)")
    time_scale: float = setting(1.0, "s of the same", above=0)
    condition_dropout: float = setting(0.1, "probability of dropping the video, and the text", least=0, most=1)
    independent_video_dropout: bool = setting(False, "drop CLIP and Synchformer features independently (v2)")


@dataclass(frozen=True)
class OptimConfig(Settings):
    """AdamW and the schedule of its learning rate."""

    key = "optim"
    learning_rate: float = setting(1e-4, "after the warm-up", above=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "decay of the two moments", least=0, below=1)
    eps: float = setting(1e-6, "epsilon of AdamW", above=0)
    weight_decay: float = setting(1e-6, "decoupled weight decay", least=0)
    max_grad_norm: float = setting(1.0, "norm to which gradients are clipped", above=0)
    moments: Literal["float32", "8bit"] = setting("float32", "type of the two moments; 8bit needs bitsandbytes")
    schedule: Literal["step", "constant", "poly"] = setting(
        "step", "times gamma at milestones, constant, or to 0 as (1 - step / steps)^0.9"
    )
    warmup_steps: int = setting(1000, "steps of linear warm-up", least=0)
    milestones: tuple[int, ...] = setting((240_000, 270_000), "steps of schedule step, from the end of the warm-up")
    gamma: float = setting(0.1, "factor at each milestone")

    def check(self) -> None:
        """Milestones in order."""
        _require(list(self.milestones) == sorted(self.milestones), "optim.milestones must be in rising order")


@dataclass(frozen=True)
class EmaConfig(Settings):
    """Post-hoc EMA (Karras et al. 2024, arXiv 2312.02696, section 3)."""

    key = "ema"
    # The profile of exponent 0, the widest one, has a width of 1 / (2 sqrt 3) = 0.289.
    sigma_rels: tuple[float, ...] = setting((0.05, 0.1), "widths that are kept", nonempty=True, above=0, below=0.28)
    update_every: int = setting(1, "steps between updates of the EMA weights", least=1)
    snapshot_every: int = setting(5000, "steps between snapshots, from which any other width is synthesised", least=1)
    start: int = setting(0, "step of the first update", least=0)
    sigma_rel: float = setting(0.05, "width that is validated, published and generates", above=0, below=0.28)


@dataclass(frozen=True)
class EarlyStoppingConfig(Settings):
    """When a run ends before its last step."""

    key = "training.early_stopping"
    metric: str = setting("val_ema/loss", "score of validation in metrics.jsonl; lower is better")
    patience: int = setting(0, "validations in a row without improvement before the run ends; 0: never", least=0)
    min_delta: float = setting(0.0, "least improvement", least=0)

    def check(self) -> None:
        """A score that validation computes."""
        message = f"{self.key}.metric {self.metric!r} must be a score of validation: val/... or val_ema/..."
        _require(self.metric.startswith(("val/", "val_ema/")), message)


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """Length, batch, precision, validation and checkpoints of a run. A step is one optimizer update."""

    key = "training"
    steps: int = setting(300_000, "optimizer updates", least=1)
    batch_size: int = setting(512, "samples per step, over all processes and accumulation; 0: batch_tokens", least=0)
    batch_tokens: int = setting(
        0, "latents per step, in place of batch_size: a step of short clips has more of them; 0: batch_size", least=0
    )
    batch_size_multiple: int = setting(
        _MULTIPLE, "what batch_tokens gives is rounded down to a multiple of this many samples", least=1
    )
    accumulation_steps: int = setting(1, "forward and backward passes per step", least=1)
    mixed_precision: Literal["no", "bf16"] = setting("bf16", "autocast of the forward pass; weights stay float32")
    tf32: bool = setting(True, "float32 products with inputs rounded to TF32; CUDA only")
    activation_checkpointing: bool = setting(False, "recompute the activations of blocks in the backward pass")
    compile: Literal["auto", "on", "off"] = setting("auto", "torch.compile of the blocks; auto: on CUDA if it works")
    log_every: int = setting(50, "steps between lines of metrics.jsonl", least=1)
    validate_every: int = setting(5000, "steps between validations", least=1)
    validation_combinations: tuple[Combination, ...] = setting(_ALL, "conditions also validated alone", unique=True)
    validation_items: int = setting(512, "items of each of these combinations", least=1)
    checkpoint_every: int = setting(10_000, "steps between checkpoints", least=1)
    keep_checkpoints: int = setting(3, "newest checkpoints that are kept; besides them the next two", least=1)
    keep_every: int = setting(0, "keep checkpoints of steps that this divides; 0: none", least=0)
    best_metric: str = setting("", "name in metrics.jsonl whose best checkpoint is kept, as val_ema/loss; empty: none")
    best_mode: Literal["min", "max"] = setting("min", "whether low or high values of best_metric are better")
    max_skipped_steps: int = setting(10, "non-finite steps in a row after which the run stops", least=1)
    trackers: tuple[Tracker, ...] = setting(("tensorboard",), "trackers beside metrics.jsonl", unique=True)
    tracker_project: str = setting("mmaudio", "project of wandb and trackio in which the run appears", nonempty=True)
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()

    def check(self) -> None:
        """One size of the batch, which splits evenly over accumulation."""
        size, tokens, passes = self.batch_size, self.batch_tokens, self.accumulation_steps
        message = "one of them gives the size of a step, set the other to 0"
        message = f"training.batch_size {size} and training.batch_tokens {tokens}: {message}"
        _require(bool(size) != bool(tokens), message)
        message = f"training.batch_size {size} must be a multiple of training.accumulation_steps {passes}"
        _require(size % passes == 0, message)
        message = f"training.batch_size_multiple {self.batch_size_multiple} has no effect with training.batch_size"
        message += ": leave it out, or set training.batch_size=0 and training.batch_tokens"
        _require(not size or self.batch_size_multiple == _MULTIPLE, message)


@dataclass(frozen=True)
class LoraConfig(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), trained alone; needs peft."""

    key = "finetune.lora"
    rank: int = setting(0, "rank of the adapters; 0: none", least=0, needed="else the whole network is trained")
    alpha: float = setting(16.0, "the output of an adapter is scaled by alpha / rank", above=0)
    dropout: float = setting(0.0, "dropout before the adapters", least=0, below=1)
    targets: tuple[Target, ...] = setting(("qkv", "proj", "mlp"), "layers that get an adapter", nonempty=True)
    rank_pattern: tuple[str, ...] = setting((), "other ranks, as fused_blocks.0-3=4: the last that matches; 0: none")
    rslora: bool = setting(False, "scale by alpha / sqrt(rank), for high ranks (Kalajdzievski 2023, arXiv 2312.03732)")
    dora: bool = setting(False, "train the norm of each output apart (Liu et al. 2024, arXiv 2402.09353)")
    init: Literal["default", "gaussian", "orthogonal", "pissa"] = setting(
        "default", "of the adapters, as peft calls them; pissa: the largest singular values (arXiv 2404.02948)"
    )

    def check(self) -> None:
        """Patterns with a rank, and what goes together."""
        bad = [entry for entry in self.rank_pattern if not re.fullmatch(r"[\w.*?-]+=\d+", entry)]
        _require(not bad, f"finetune.lora.rank_pattern: {', '.join(bad)} must be PATTERN=RANK, as fused_blocks.*.ffn=4")
        _require(not (self.dora and self.init == "pissa"), "finetune.lora.dora needs an init other than pissa")


@dataclass(frozen=True)
class FinetuneConfig(Settings):
    """Training that starts from trained weights, and which of them it changes."""

    key = "finetune"
    init_from: str = setting("", "run, pretrained_model or adapter folder, released file, or Hub id", path=True)
    latent_statistics: Literal["keep", "recompute"] = setting(
        "keep", "statistics of the latents: from the weights, or from the stores"
    )
    empty_text: Literal["keep", "recompute"] = setting(
        "keep", "features of the empty caption: from the weights, or from the encoders"
    )
    freeze: tuple[str, ...] = setting((), "prefixes of parameters, as fused_blocks.0-3, or text, clip, sync")
    frozen_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of frozen linear maps and convolutions; bfloat16 needs training.mixed_precision: bf16"
    )
    lora: LoraConfig = LoraConfig()

    def check(self) -> None:
        """Frozen weights must be trained ones."""
        freezes = bool(self.lora.rank or self.freeze)
        message = "finetune.freeze and finetune.lora keep weights as they are: name the trained ones in"
        _require(bool(self.init_from) or not freezes, f"{message} finetune.init_from")
        message = "finetune.frozen_dtype has no effect without finetune.freeze or finetune.lora: leave it out"
        _require(freezes or self.frozen_dtype == "float32", message)


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """How a trained network generates, in samples and evaluations."""

    key = "sampling"
    num_steps: int = setting(25, "Euler steps", least=1)
    guidance_scale: float = setting(4.5, "of classifier-free guidance", least=0)
    solver: Literal["euler", "adaptive"] = setting("euler", "Euler steps, or an adaptive ODE solver (dopri5)")
    batch_size: int = setting(8, "clips that are generated at once", least=1)


@dataclass(frozen=True)
class SamplesConfig(Settings):
    """Held-out items that are generated during training, always from the same noise."""

    key = "samples"
    every: int = setting(0, "steps between samples, which are also made after the last step; 0: never", least=0)
    items: int = setting(4, "items, evenly spaced over the split, and one of each duration at least", least=1)
    split: Literal["validation", "test"] = setting("validation", "split of the items")
    prompts: tuple[str, ...] = setting((), "texts of your own that are generated beside the items", unique=True)
    videos: tuple[str, ...] = setting((), "videos of your own, likewise, without a text", unique=True, path=True)


@dataclass(frozen=True)
class CardSource(Settings):
    """What a model card says of the media behind a feature store."""

    key = "card.sources"
    store: str = setting(MISSING, "store: the last component of its path")
    license: str = setting("", "licence of the media")
    source: str = setting("", "where they come from: a dataset of the Hub (owner/name), an address, or words")


@dataclass(frozen=True)
class CardConfig(Settings):
    """What a model card cannot know from the run."""

    key = "card"
    license: str = setting("", "of the weights, as the Hub names it: apache-2.0; empty: that of the initial weights")
    sources: tuple[CardSource, ...] = setting((), "media behind the stores")

    def check(self) -> None:
        """A licence that the Hub could know, one entry per store, no secrets."""
        known = bool(re.fullmatch(r"([a-z0-9][a-z0-9.+-]*)?", self.license))
        example = "for example apache-2.0 or cc-by-4.0"
        _require(known, f"card.license {self.license!r} must be a licence as the Hub names it, {example}")
        twice = _repeated(source.store for source in self.sources)
        _require(not twice, f"card.sources names {', '.join(twice)} twice")
        secret = [s.store for s in self.sources if re.search(_SECRET, f"{s.source} {s.license}")]
        _require(not secret, f"card.sources: the entry of {', '.join(secret)} holds a password or token: remove it")


@dataclass(frozen=True)
class HubConfig(Settings):
    """A repository of the Hugging Face Hub to which checkpoints are pushed during training."""

    key = "hub"
    repo_id: str = setting("", "owner/name; empty: nothing is pushed")
    private: bool = setting(True, "visibility of a repository that is created; an existing one keeps its own")
    every: int = setting(0, "least steps between pushes; 0: every checkpoint; the last is always pushed", least=0)
    push: tuple[Pushed, ...] = setting(("pretrained_model",), "folders of a checkpoint", unique=True, nonempty=True)
    samples: bool = setting(False, "push the newest audio samples, the true audio and their captions, too")
    wait: int = setting(1800, "seconds to wait at the end of a run for the last push, at most", least=0)

    def check(self) -> None:
        """A repository without a revision."""
        if self.repo_id:
            _, revision = schema.split_hub_id(self.repo_id)
            _require(revision is None, f"hub.repo_id {self.repo_id} must be owner/name: pushes go to the main branch")


@dataclass(frozen=True)
class TruthConfig(Settings):
    """Features of the ground truth, in av-benchmark's caches (*.pth): a folder, or OWNER/NAME[/FOLDER] on the Hub."""

    key = "evaluation.truth"
    validation: str = setting("", "of the validation split; empty: extracted from the true latents, decoded", path=True)
    test: str = setting("", "of the test split; empty: likewise", path=True)


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Scores of a whole split: its audio is generated as `sampling` says and compared with the ground truth."""

    key = "evaluation"
    every: int = setting(0, "steps between evaluations, which also follow the last step; 0: never", least=0)
    split: Literal["validation", "test"] = setting("validation", "split that is evaluated during training")
    items: int = setting(0, "items, evenly spaced over the split, and one of each duration at least; 0: all", least=0)
    after_training: bool = setting(False, "score data.test with the published weights after the last step")
    metrics: tuple[Metric, ...] = setting((), "published scores beside the built-in; need av-benchmark", unique=True)
    av_bench_python: str = setting("", "interpreter of av-benchmark's environment; empty: this one", path=True)
    av_bench_batch_size: int = setting(32, "clips per forward pass of av-benchmark", least=1)
    av_bench_weights: str = setting("", "folder of av-benchmark's own weights; empty: encoders.weights_dir", path=True)
    av_bench_stall_minutes: float = setting(10.0, "minutes without progress after which av-benchmark is ended", above=0)
    videos: str = setting("", "folder of the videos ID.mp4, for `ib` without caches; empty: none", path=True)
    categories: str = setting("", "VGGSounder's or FoleyBench's CSV, for scores per category; empty: none", path=True)
    truth: TruthConfig = TruthConfig()
    keep_clips: bool = setting(False, "keep the generated audio and its features after they were scored")
    extra: tuple[str, ...] = setting((), "own evaluators, as module:Class; see docs/evaluation.md", unique=True)

    def check(self) -> None:
        """The form of the names; they are imported when training begins."""
        for name in self.extra:
            pattern = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
            _require(bool(re.fullmatch(pattern, name)), f"evaluation.extra: {name!r} is not of the form module:Class")


@dataclass(frozen=True)
class Recipe(Settings):
    """Everything one experiment consists of, except the hardware."""

    name: str = setting(MISSING, "of the experiment and its run folder; default: the name of the file")
    seed: int = setting(14159265, "of all randomness", least=0, most=2**63 - 1)
    output_dir: str = setting("output", "folder of the run folders", path=True)
    resume: str = setting("auto", "auto: from the newest checkpoint here; never; or hub://owner/name[@revision]")
    model: ModelConfig = ModelConfig()
    encoders: EncoderConfig = EncoderConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    data: DataConfig = DataConfig()
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    training: TrainingConfig = TrainingConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    sampling: SamplingConfig = SamplingConfig()
    samples: SamplesConfig = SamplesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    card: CardConfig = CardConfig()
    hub: HubConfig = HubConfig()

    def check(self) -> None:
        """What concerns more than one section."""
        if self.resume.startswith(schema.HUB_PREFIX):
            schema.split_hub_id(self.resume.removeprefix(schema.HUB_PREFIX))
        else:
            message = f"resume {self.resume!r} is not allowed: use auto, never or hub://owner/name[@revision]"
            _require(self.resume in ("auto", "never"), message)
        _require(
            self.resume != f"{schema.HUB_PREFIX}{self.hub.repo_id}" or "training_state" in self.hub.push,
            f"resume={self.resume} needs what is not pushed: set hub.push=[pretrained_model,training_state]",
        )
        plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name)
        _require(bool(plain), f"name {self.name!r} must be a plain folder name")
        message = f"ema.start {self.ema.start} must be less than training.steps {self.training.steps}"
        _require(self.ema.start < self.training.steps, message)
        message = "finetune.frozen_dtype=bfloat16 needs training.mixed_precision=bf16, which computes in that type"
        _require(self.training.mixed_precision == "bf16" or self.finetune.frozen_dtype == "float32", message)
        for key, split in self._splits_by_key().items():
            way = f"name one, or set {key} to {'false' if key.endswith('training') else 0}"
            _require(bool(getattr(self.data, split)), f"{key} needs data.{split}, which names no store: {way}")
        kind = self.training.best_metric.partition("/")[0]
        keys = {"eval": "samples.every", "eval_validation": "evaluation.every", "eval_test": "evaluation.every"}
        if kind in keys and not self.evaluation.extra:  # an evaluator of the user's own may have any name
            computed = {"eval" if k == "samples.every" else f"eval_{s}" for k, s in self._splits_by_key().items()}
            message = f"training.best_metric {self.training.best_metric} is never computed: set {keys[kind]} above 0"
            _require(kind in computed, f"{message}, or name a score that begins with val_ema/")
        _require(
            self.card.license in ("", RELEASED_LICENSE) or not is_released(self.finetune.init_from),
            f"card.license {self.card.license}: the run starts from released weights, which are {RELEASED_LICENSE}, and"
            " so is what is made from them: leave it out",
        )

    def _splits_by_key(self) -> dict[str, str]:
        """Key that requests generated audio -> split that it is generated for."""
        splits: dict[str, str] = {"samples.every": self.samples.split} if self.samples.every else {}
        splits |= {"evaluation.every": self.evaluation.split} if self.evaluation.every else {}
        return splits | ({"evaluation.after_training": "test"} if self.evaluation.after_training else {})

    def clip_seconds(self, source: VideoSource | AudioSource) -> float:
        """Duration of the clips of a source of `extraction`."""
        return source.duration or self.model.duration

    @property
    def generated_splits(self) -> set[str]:
        """Splits for which audio is generated during or after training, which needs a decoder."""
        return set(self._splits_by_key().values())

    @property
    def generation_settings(self) -> dict[str, Any]:
        """What generated audio depends on besides weights, decoder and stores; files of scores record it."""
        sampling, precision = self.sampling, "bf16" if self.training.mixed_precision == "bf16" else "fp32"
        how = {name: getattr(sampling, name) for name in ("num_steps", "guidance_scale", "solver")}
        how |= {"seed": self.seed, "precision": precision}
        return how | {"mode": self.model.mode, "duration": self.model.duration}

    @property
    def run_dir(self) -> Path:
        """Folder that holds everything of this run."""
        return Path(self.output_dir) / self.name


@schema.checked
def samples_per_step(training: TrainingConfig, latent_length: int) -> int:
    """Samples of a step whose clips have so many latents; it depends on the recipe alone, not on the processes."""
    if training.batch_size:
        return training.batch_size
    multiple = training.batch_size_multiple
    if not (size := training.batch_tokens // latent_length // multiple * multiple):
        raise RecipeError(
            f"training.batch_tokens {training.batch_tokens} holds no {multiple} clips of {latent_length} latents:"
            f" use {multiple * latent_length} or more, or lower training.batch_size_multiple"
        )
    return size


@schema.checked
def micro_batch_size(training: TrainingConfig, world_size: int, latent_length: int = 0) -> int:
    """Samples per process and forward pass. ValueError when the batch does not split evenly; nothing is truncated.

    latent_length: latents of the clips, which training.batch_tokens needs.
    """
    passes = world_size * training.accumulation_steps
    size = samples_per_step(training, latent_length)
    if size % passes:
        near = size // passes * passes or passes
        what, way = f"training.batch_size {size}", f"use {near} or {near + passes}"
        if training.batch_tokens:
            what = f"training.batch_tokens {training.batch_tokens} gives {size} samples of {latent_length} latents,"
            way = f"set training.batch_size_multiple to a multiple of {passes}"
            what += " which"
        raise RecipeError(
            f"{what} does not split over {world_size} processes x {training.accumulation_steps} accumulation steps:"
            f" {way}"
        )
    return size // passes
