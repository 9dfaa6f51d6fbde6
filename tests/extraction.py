"""Extraction with toy encoders, as tests call it."""

from collections.abc import Mapping
from pathlib import Path

from mmaudio_hf.config import AudioSource, EncoderConfig, ExtractionConfig, Recipe, VideoSource, variant_config
from mmaudio_hf.data.store import StoreWriter
from mmaudio_hf.features.extract import ExtractionReport, extract_audio, extract_video
from mmaudio_hf.files import Share


def toy_recipe(output_dir: Path, weights: Path, *, mode: str = "16k", duration: float = 1.0, **extraction) -> Recipe:
    """A recipe of short clips and small shards, without sources."""
    return Recipe(
        "run",
        model=variant_config(f"small_{mode}", duration=duration),
        encoders=EncoderConfig("toy", str(weights), device="cpu"),
        extraction=ExtractionConfig(str(output_dir), **({"shard_size": 3, "batch_size": 2} | extraction)),
    )


def extract(
    recipe: Recipe,
    source: VideoSource | AudioSource,
    open_writer=StoreWriter,
    problems: Mapping[str, tuple[str, str]] | None = None,
    share: Share | None = None,
    **options,
) -> ExtractionReport:
    """Either kind of extraction, by default without progress bars."""
    run = extract_video if isinstance(source, VideoSource) else extract_audio
    return run(
        recipe, source, open_writer, problems=problems, share=share or Share(), **({"progress": False} | options)
    )
