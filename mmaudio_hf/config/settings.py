"""Recipes: one YAML file per experiment, read into a tree of frozen, strictly typed dataclasses.

A recipe may name another one with `base:` and changes only what differs; `section.key=value` on the command line
changes it once more. A key nobody knows, a value of the wrong type or out of range, and settings that exclude each
other are all refused here, naming the key, the file it came from and the nearest valid name, before torch is imported.
"""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from mmaudio_hf.schema import (
    CLIP_DIM,
    HUB_PREFIX,
    SYNC_DIM,
    TEXT_DIM,
    TEXT_TOKENS,
    AuditVerdict,
    audio_mode,
    sequence_lengths,
    split_hub_id,
)

RELEASED_LICENSE = "cc-by-nc-4.0"  # of the released networks, as the Hub names it


class RecipeError(ValueError):
    """A mistake in a recipe or an override; the message names the key, the file and the way out."""


def nearest(name: str, options) -> str:
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    listing = f"valid: {', '.join(sorted(options))}"
    return f"did you mean {close[0]!r}? ({listing})" if close else listing


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# `strict` runs the `validate_*` methods; it does not look at the types of frozen classes: `_convert` does, wherever
# plain values are read.
@strict
@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a flow network (spec networks, section 2.1). `variant` fills in a released network's sizes."""

    variant: str = "small_16k"
    mode: Literal["16k", "44k"] = "16k"
    hidden_dim: int = 448
    num_heads: int = 7
    depth: int = 12  # joint + fused blocks
    fused_depth: int = 8
    v2: bool = False
    clip_dim: int = CLIP_DIM
    sync_dim: int = SYNC_DIM
    text_dim: int = TEXT_DIM
    text_tokens: int = TEXT_TOKENS
    duration: float = 8.0  # seconds; default lengths are derived from it
    latent_channels: int = 0  # 0: the mode's own
    latent_length: int = 0  # 0: derived from duration, likewise the next two
    clip_length: int = 0
    sync_length: int = 0

    def __post_init__(self):
        lengths = sequence_lengths(self.mode, self.duration)
        derived = {
            "latent_channels": audio_mode(self.mode).latent_channels,
            "latent_length": lengths.latent,
            "clip_length": lengths.clip,
            "sync_length": lengths.sync,
        }
        for name, value in derived.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)

    def validate_sizes(self):
        """The arithmetic that the layers rely on."""
        _require(self.hidden_dim > 0 and self.num_heads > 0, "model.hidden_dim and model.num_heads must be positive")
        _require(
            self.hidden_dim % self.num_heads == 0 and (self.hidden_dim // self.num_heads) % 2 == 0,
            f"model.hidden_dim {self.hidden_dim} must be an even multiple of model.num_heads {self.num_heads}",
        )
        _require(
            0 <= self.fused_depth < self.depth,
            f"model.fused_depth {self.fused_depth} must be at least 0 and less than model.depth {self.depth}",
        )
        _require(self.sync_length % 8 == 0, f"model.sync_length {self.sync_length} must be a multiple of 8")
        for name in ("clip_dim", "sync_dim", "text_dim", "text_tokens", "latent_length", "clip_length"):
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
    """Configuration of a released network, with `changes` to single fields. ValueError for an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown model variant {variant!r}: {nearest(variant, VARIANTS)}")
    return ModelConfig(**{"variant": variant, **VARIANTS[variant], **changes})


@strict
@dataclass(frozen=True)
class EncoderConfig:
    """The frozen networks that make features and turn latents into sound."""

    kind: Literal["released", "toy"] = "released"
    weights_dir: str = "ext_weights"  # released: where the published files are; toy: where the fitted codec is kept
    clip: str = "apple/DFN5B-CLIP-ViT-H-14-384"  # Hub id, folder of transformers files, or open_clip checkpoint
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"


@strict
@dataclass(frozen=True)
class VideoSource:
    """A folder of videos and the TSV (`id`, `label`) that lists the ones to use; becomes the store `name`."""

    name: str
    media_dir: str
    list: str
    normalize_audio: bool = True


@strict
@dataclass(frozen=True)
class AudioSource:
    """A folder of recordings, their captions (TSV `id`, `caption`) and clips; becomes the store `name`."""

    name: str
    media_dir: str
    list: str
    clips: str = ""  # clips.tsv; written by `mmaudio-hf partition`; empty: beside the store


@strict
@dataclass(frozen=True)
class ExtractionConfig:
    """What to extract, from where, and how."""

    output_dir: str = "output/features"
    videos: tuple[VideoSource, ...] = ()
    audios: tuple[AudioSource, ...] = ()
    alignment: Literal["timestamps", "reference"] = "timestamps"
    layout: Literal["reference", "compact"] = "reference"  # compact: bf16 CLIP and text features, each text once
    sync_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 only in the compact layout
    batch_size: int = 16
    num_proc: int = 1
    shard_size: int = 512
    audit: str = ""  # table of an audit; items with a verdict of `reject` are left out. Empty: none is used
    reject: tuple[AuditVerdict, ...] = ("leakage", "duplicate_content", "still", "silent")

    def validate_sizes(self):
        """Positive sizes, one name per store."""
        for name in ("batch_size", "num_proc", "shard_size"):
            _require(getattr(self, name) >= 1, f"extraction.{name} must be at least 1")
        _require(
            self.layout == "compact" or self.sync_dtype == "float32",
            "extraction.sync_dtype bfloat16 needs extraction.layout compact",
        )
        names = [source.name for source in (*self.videos, *self.audios)]
        twice = {name for name in names if names.count(name) > 1}
        _require(not twice, f"extraction: two sources are called {', '.join(sorted(twice))}; store names must differ")


@strict
@dataclass(frozen=True)
class StoreConfig:
    """One feature store of a mixture: every row is visited `repeats` times per epoch; 0.5 is a half of them."""

    path: str
    repeats: float = 1.0

    def validate_repeats(self):
        """Some visits."""
        _require(self.repeats > 0, f"data: repeats of {self.path} must be positive, not {self.repeats}")


@strict
@dataclass(frozen=True)
class DataConfig:
    """The mixture that is trained on, and what is held out."""

    train: tuple[StoreConfig, ...] = ()
    validation: tuple[StoreConfig, ...] = ()
    test: tuple[StoreConfig, ...] = ()
    prefetch_batches: int = 2
    read_threads: int = 4

    def validate_sizes(self):
        """Threads and buffers."""
        _require(self.prefetch_batches >= 1, "data.prefetch_batches must be at least 1")
        _require(self.read_threads >= 1, "data.read_threads must be at least 1")


@strict
@dataclass(frozen=True)
class FlowConfig:
    """Flow matching objective (spec networks, section 3 and 4)."""

    min_sigma: float = 0.0
    time_mean: float = 0.0  # t = sigmoid(time_scale * z + time_mean)
    time_scale: float = 1.0
    condition_dropout: float = 0.1  # probability, for video and for text on their own
    independent_video_dropout: bool = False  # v2: CLIP and sync features are dropped on their own, not together

    def validate_ranges(self):
        """Probabilities and scales."""
        _require(0 <= self.condition_dropout <= 1, "flow.condition_dropout is a probability: between 0 and 1")
        _require(0 <= self.min_sigma < 1, "flow.min_sigma must be at least 0 and less than 1")
        _require(self.time_scale > 0, "flow.time_scale must be positive")


@strict
@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. Milestones count from the end of the warm-up (spec networks, section 4)."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 1e-6
    max_grad_norm: float = 1.0
    schedule: Literal["step", "constant", "poly"] = "step"
    warmup_steps: int = 1000
    milestones: tuple[int, ...] = (240_000, 270_000)
    gamma: float = 0.1

    def validate_ranges(self):
        """Signs and order."""
        _require(self.learning_rate > 0, "optim.learning_rate must be positive")
        _require(self.eps > 0 and self.weight_decay >= 0, "optim.eps must be positive, optim.weight_decay at least 0")
        _require(all(0 <= b < 1 for b in self.betas), "optim.betas must be at least 0 and less than 1")
        _require(self.max_grad_norm > 0, "optim.max_grad_norm must be positive")
        _require(self.warmup_steps >= 0, "optim.warmup_steps must be at least 0")
        _require(list(self.milestones) == sorted(self.milestones), "optim.milestones must be in rising order")


@strict
@dataclass(frozen=True)
class EmaConfig:
    """Post-hoc EMA (Karras et al. 2024, section 3): two profiles, snapshots, synthesis at `sigma_rel`."""

    sigma_rels: tuple[float, ...] = (0.05, 0.1)
    update_every: int = 1
    snapshot_every: int = 5000
    start: int = 0
    sigma_rel: float = 0.05  # of the weights that are validated, published and used for generation

    def validate_ranges(self):
        """Widths for which the profile exists."""
        _require(len(self.sigma_rels) >= 1, "ema.sigma_rels must name at least one profile")
        for sigma in (*self.sigma_rels, self.sigma_rel):
            _require(0 < sigma < 0.28, f"ema: sigma_rel {sigma} must be between 0 and 0.28")
        _require(self.update_every >= 1 and self.snapshot_every >= 1, "ema.update_every and snapshot_every: at least 1")
        _require(self.start >= 0, "ema.start must be at least 0")


@strict
@dataclass(frozen=True)
class EarlyStoppingConfig:
    """When a run ends before its last step: `patience` validations in a row without a score better by `min_delta`."""

    metric: str = "val_ema/loss"  # a name of metrics.jsonl that validation writes; lower is better
    patience: int = 0  # 0: never
    min_delta: float = 0.0

    def validate_ranges(self):
        """Signs."""
        _require(self.patience >= 0, "training.early_stopping.patience must be at least 0")
        _require(
            self.metric.startswith(("val/", "val_ema/")),
            f"training.early_stopping.metric {self.metric!r} must be a score of validation: val/... or val_ema/...",
        )
        _require(self.min_delta >= 0, "training.early_stopping.min_delta must be at least 0")


@strict
@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch, precision and rhythm of a run. A step is one optimizer update."""

    steps: int = 300_000
    batch_size: int = 512  # over all processes and accumulation
    accumulation_steps: int = 1
    mixed_precision: Literal["no", "bf16"] = "bf16"
    tf32: bool = True  # float32 products with TF32 inputs on CUDA; elsewhere nothing
    activation_checkpointing: bool = False  # blocks run once more in the backward pass, instead of keeping activations
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the blocks; auto: on CUDA, where it works
    log_every: int = 50
    validate_every: int = 5000
    # Scored beside the whole: what the conditions are reduced to, and how many items of the split each of them sees.
    validation_combinations: tuple[Literal["video_text", "video", "text", "none"], ...] = (
        "video_text",
        "video",
        "text",
        "none",
    )
    validation_items: int = 512
    checkpoint_every: int = 10_000
    keep_checkpoints: int = 3  # the newest ones; besides them those of steps that keep_every divides, and the best
    keep_every: int = 0  # 0: none
    best_metric: str = ""  # a name of metrics.jsonl, as val_ema/loss; empty: none is kept as the best
    best_mode: Literal["min", "max"] = "min"
    max_skipped_steps: int = 10  # non-finite steps in a row before the run stops
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)

    def validate_ranges(self):
        """Positive counts; the batch splits evenly over accumulation."""
        names = ("steps", "batch_size", "accumulation_steps", "log_every", "validate_every", "checkpoint_every")
        for name in (*names, "keep_checkpoints", "max_skipped_steps", "validation_items"):
            _require(getattr(self, name) >= 1, f"training.{name} must be at least 1")
        chosen = self.validation_combinations
        _require(len(set(chosen)) == len(chosen), "training.validation_combinations names one twice")
        _require(self.keep_every >= 0, "training.keep_every must be at least 0")
        _require(
            self.batch_size % self.accumulation_steps == 0,
            f"training.batch_size {self.batch_size} must be a multiple of training.accumulation_steps"
            f" {self.accumulation_steps}",
        )


@strict
@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in the transformer blocks (Hu et al. 2021), trained in place of the network; needs peft."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    dropout: float = 0.0
    targets: tuple[Literal["qkv", "proj", "mlp"], ...] = ("qkv", "proj", "mlp")

    def validate_ranges(self):
        """Sizes, and something to adapt."""
        _require(self.rank >= 0, "finetune.lora.rank must be at least 0")
        _require(self.alpha > 0, "finetune.lora.alpha must be positive")
        _require(0 <= self.dropout < 1, "finetune.lora.dropout must be at least 0 and less than 1")
        _require(len(self.targets) > 0, "finetune.lora.targets must name at least one of qkv, proj, mlp")


@strict
@dataclass(frozen=True)
class FinetuneConfig:
    """Training that starts from trained weights, and which part of them it changes."""

    # A pretrained_model or run folder, an adapter folder, a released file, or a Hub id; empty: from random weights.
    init_from: str = ""
    latent_statistics: Literal["keep", "recompute"] = "keep"  # those of the weights, or of the stores
    empty_text: Literal["keep", "recompute"] = "keep"  # likewise the features of the empty caption
    freeze: tuple[str, ...] = ()  # opening parts of parameter names, as fused_blocks.0-3; or text, clip, sync
    lora: LoraConfig = field(default_factory=LoraConfig)

    def validate_start(self):
        """Settings that need a trained start."""
        _require(
            bool(self.init_from) or not (self.lora.rank or self.freeze),
            "finetune.freeze and finetune.lora keep weights as they are: name the trained ones in finetune.init_from",
        )


@strict
@dataclass(frozen=True)
class SamplingConfig:
    """How latents are drawn from a trained network."""

    num_steps: int = 25
    guidance_scale: float = 4.5
    solver: Literal["euler", "adaptive"] = "euler"
    batch_size: int = 8

    def validate_ranges(self):
        """Positive counts."""
        _require(self.num_steps >= 1 and self.batch_size >= 1, "sampling.num_steps and batch_size must be at least 1")
        _require(self.guidance_scale >= 0, "sampling.guidance_scale must be at least 0")


@strict
@dataclass(frozen=True)
class SamplesConfig:
    """Held-out items that are made audible during training, as `sampling` says and always from the same noise."""

    every: int = 0  # steps, and after the last one; 0: never
    items: int = 4  # at even distances over the split
    split: Literal["validation", "test"] = "validation"

    def validate_ranges(self):
        """Counts."""
        _require(self.every >= 0, "samples.every must be at least 0")
        _require(self.items >= 1, "samples.items must be at least 1")


@strict
@dataclass(frozen=True)
class CardSource:
    """What a model card says of the media behind a feature store, which is named by the last part of its path."""

    store: str
    license: str = ""
    source: str = ""  # a dataset of the Hub (owner/name), an address, or words


@strict
@dataclass(frozen=True)
class CardConfig:
    """What a model card cannot know from the run."""

    license: str = ""  # of the weights, as the Hub names it: apache-2.0; empty: what follows from their start
    sources: tuple[CardSource, ...] = ()

    def validate_names(self):
        """A licence the Hub could know, one entry per store."""
        _require(
            bool(re.fullmatch(r"([a-z0-9][a-z0-9.+-]*)?", self.license)),
            f"card.license {self.license!r} must be a licence as the Hub names it, for example apache-2.0 or cc-by-4.0",
        )
        names = [source.store for source in self.sources]
        twice = {name for name in names if names.count(name) > 1}
        _require(not twice, f"card.sources: {', '.join(sorted(twice))} stands there twice")
        secret = [s.store for s in self.sources if re.search(r"://[^/]*@|hf_\w{20}", f"{s.source} {s.license}")]
        _require(not secret, f"card.sources: the entry of {', '.join(secret)} holds a password or token: take it out")


@strict
@dataclass(frozen=True)
class HubConfig:
    """A repository of the Hugging Face Hub to which checkpoints are pushed while a run trains."""

    repo_id: str = ""  # owner/name; empty: nothing is pushed
    private: bool = True  # of a repository that is made; one that exists stays as it is
    every: int = 0  # least number of steps between two pushes, 0: every checkpoint; the last one is always pushed
    push: tuple[Literal["pretrained_model", "training_state"], ...] = ("pretrained_model",)
    wait: int = 1800  # s, at most, at the end of a run for the last push

    def validate_whole(self):
        """A repository without revision, and something to push."""
        if self.repo_id:
            _, revision = split_hub_id(self.repo_id)
            _require(revision is None, f"hub.repo_id {self.repo_id} must be owner/name: pushes go to the main branch")
        _require(self.every >= 0 and self.wait >= 0, "hub.every and hub.wait must be at least 0")
        _require(bool(self.push), "hub.push must name pretrained_model, training_state or both")
        _require(len(set(self.push)) == len(self.push), "hub.push names one twice")


@strict
@dataclass(frozen=True)
class TruthConfig:
    """Features of the true sound, pictures and texts of each split, in av-benchmark's caches (*.pth).

    A folder, or OWNER/NAME[/FOLDER] of a data set on the Hub. Empty: made of the true latents, decoded.
    """

    validation: str = ""
    test: str = ""


@strict
@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of a whole split: its sound is made as `sampling` says and compared with the true one."""

    every: int = 0  # steps, and after the last one; 0: never
    split: Literal["validation", "test"] = "validation"
    items: int = 0  # at even distances over the split; 0: all
    after_training: bool = False  # score data.test with the published weights when training is over
    # Published scores beside those that need no networks; they need av-benchmark. Empty: none.
    metrics: tuple[Literal["fd", "kl", "is", "ib", "desync", "clap"], ...] = ()
    av_bench_python: str = ""  # interpreter of the environment that av-benchmark is installed in; empty: this one
    av_bench_batch_size: int = 32
    truth: TruthConfig = field(default_factory=TruthConfig)
    keep_clips: bool = False  # sounds and features stay after they were scored

    def validate_ranges(self):
        """Counts."""
        for name in ("every", "items"):
            _require(getattr(self, name) >= 0, f"evaluation.{name} must be at least 0")
        _require(self.av_bench_batch_size >= 1, "evaluation.av_bench_batch_size must be at least 1")
        _require(len(set(self.metrics)) == len(self.metrics), "evaluation.metrics names one twice")


@strict
@dataclass(frozen=True)
class Recipe:
    """Everything one experiment is made of, except the hardware."""

    name: str
    seed: int = 14159265
    output_dir: str = "output"
    resume: str = "auto"  # auto, never, or hub://owner/name[@revision]
    model: ModelConfig = field(default_factory=ModelConfig)
    encoders: EncoderConfig = field(default_factory=EncoderConfig)
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    card: CardConfig = field(default_factory=CardConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def validate_resume(self):
        """One of the words, or a repository."""
        if self.resume.startswith(HUB_PREFIX):
            split_hub_id(self.resume.removeprefix(HUB_PREFIX))
        else:
            message = f"resume {self.resume!r} is not allowed: use auto, never or hub://owner/name[@revision]"
            _require(self.resume in ("auto", "never"), message)
        if self.resume == f"{HUB_PREFIX}{self.hub.repo_id}":
            message = f"resume={self.resume} needs what is not pushed: set hub.push=[pretrained_model,training_state]"
            _require("training_state" in self.hub.push, message)

    def validate_whole(self):
        """What concerns more than one section."""
        _require(
            bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name)), f"name {self.name!r} must be a plain folder name"
        )
        _require(self.seed >= 0, "seed must be at least 0")
        _require(
            self.ema.start < self.training.steps,
            f"ema.start {self.ema.start} must be less than training.steps {self.training.steps}",
        )
        for key, split in self._wanted_splits().items():
            _require(
                bool(getattr(self.data, split)),
                f"{key} asks for sound of data.{split}, which names no store: name one, or set {key} to"
                f" {'false' if key.endswith('training') else 0}",
            )
        _require(
            self.card.license in ("", RELEASED_LICENSE) or not is_released(self.finetune.init_from),
            f"card.license {self.card.license}: the run starts from released weights, which are {RELEASED_LICENSE}, and"
            " so is what is made of them: leave it out",
        )

    def _wanted_splits(self) -> dict[str, str]:
        """Setting that asks for generated sound -> the split that it is made of."""
        wanted = {"samples.every": self.samples.split} if self.samples.every else {}
        wanted |= {"evaluation.every": self.evaluation.split} if self.evaluation.every else {}
        return wanted | ({"evaluation.after_training": "test"} if self.evaluation.after_training else {})

    @property
    def generated_splits(self) -> set[str]:
        """Splits whose sound is made while training, or after it, which takes a decoder."""
        return set(self._wanted_splits().values())

    @property
    def generation_settings(self) -> dict[str, Any]:
        """What the sound of an evaluation depends on besides weights, decoder and stores; files of scores note it."""
        return {
            "num_steps": self.sampling.num_steps,
            "guidance_scale": self.sampling.guidance_scale,
            "solver": self.sampling.solver,
            "seed": self.seed,
            "precision": "bf16" if self.training.mixed_precision == "bf16" else "fp32",
            "mode": self.model.mode,
            "duration": self.model.duration,
        }

    @property
    def run_dir(self) -> Path:
        """Folder that holds everything of this run."""
        return Path(self.output_dir) / self.name


def micro_batch_size(training: TrainingConfig, world_size: int) -> int:
    """Samples per process and forward pass. ValueError when the batch does not split evenly; nothing is truncated."""
    parts = world_size * training.accumulation_steps
    if training.batch_size % parts:
        near = training.batch_size // parts * parts or parts
        raise RecipeError(
            f"training.batch_size {training.batch_size} does not split over {world_size} processes x"
            f" {training.accumulation_steps} accumulation steps: use {near} or {near + parts}"
        )
    return training.batch_size // parts
