"""Commands from media to feature stores."""

import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

from mmaudio_hf.cli.audit import audit_problems
from mmaudio_hf.config import Recipe, load_recipe


def add_commands(add) -> None:
    """Add them by `add(name, function, help, recipe=False)`, which returns the parser of one command."""
    media = add("example-media", _example_media, "write the synthesised example videos, recordings and captions")
    media.add_argument("directory", metavar="DIR", type=Path)
    media.add_argument("--seed", type=int, default=0)
    media.add_argument("--small", action="store_true", help="a handful of clips, for a quick trial")
    add("partition", _partition, "cut the recordings of a recipe into clips (writes clips.tsv)", recipe=True)
    for kind, function, media_of in (("video", _extract_video, "videos"), ("audio", _extract_audio, "recordings")):
        extract = add(f"extract-{kind}", function, f"make the feature stores of a recipe's {media_of}", recipe=True)
        extract.add_argument(
            "--shard-index", type=int, metavar="I", help="make every N-th shard, from the I-th (0 ...) on"
        )
        extract.add_argument("--num-shards", type=int, metavar="N", help="number of shares the shards are dealt out in")


def _example_media(options) -> None:
    from mmaudio_hf.media.example import write_example_media

    write_example_media(options.directory, seed=options.seed, small=options.small)
    print(f"example media: {options.directory}")


def _partition(options) -> None:
    from mmaudio_hf.media.clips import write_clips

    recipe = load_recipe(options.recipe, options.overrides)
    for source in _sources(recipe, "audios"):
        path = clips_path(recipe, source)
        rejects = path.with_suffix(".rejects.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        report = write_clips(source.media_dir, path, workers=recipe.extraction.num_proc, progress=True)
        rejects.write_text("".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in report.rejects))
        if not report.clips:
            path.unlink()
            raise ValueError(
                f"{source.media_dir}: no recording gives a clip, each needs 8.1 s of sound at least;"
                f" {rejects} says what is wrong with each of {len(report.rejects)}"
            )
        left_out = f", see {rejects}" if report.rejects else ""
        print(
            f"{path}: {len(report.clips)} clips, {len(report.rejects)} recordings rejected{left_out};"
            f" {len(report.ignored)} other files ignored"
        )


def clips_path(recipe: Recipe, source) -> Path:
    """The clips.tsv of an audio source: named in the recipe, or beside its store."""
    return Path(source.clips or Path(recipe.extraction.output_dir) / f"{source.name}.clips.tsv")


def _sources(recipe: Recipe, kind: str):
    sources = getattr(recipe.extraction, kind)
    if not sources:
        raise ValueError(f"recipe {recipe.name} names nothing under extraction.{kind}")
    return sources


def _encoder_options(recipe: Recipe) -> dict:
    return asdict(recipe.encoders)


def _open_writer(recipe: Recipe):
    """`StoreWriter` for the layout of the recipe; ValueError when a store of the recipe is there in another one."""
    from mmaudio_hf.data.rewrite import layout_of
    from mmaudio_hf.data.store import FeatureStore, StoreWriter

    wanted = (recipe.extraction.layout, recipe.extraction.sync_dtype)
    for source in (*recipe.extraction.videos, *recipe.extraction.audios):
        path = Path(recipe.extraction.output_dir) / source.name
        if not path.exists():
            continue
        with FeatureStore.open(path) as store:
            found = layout_of(store)
            if found[0] != wanted[0] or (store.has_video and found[1] != wanted[1]):
                options = f"--layout {wanted[0]} --sync-dtype {wanted[1]}"
                raise ValueError(
                    f"{path} has the layout {found[0]} (sync {found[1]}), the recipe asks for {wanted[0]} (sync"
                    f" {wanted[1]}): `mmaudio-hf store convert {path} {path}_{wanted[0]} {options}` writes it anew, or"
                    " remove the store and run the same command: the shards are kept"
                )
    return partial(StoreWriter, layout=wanted[0], sync_dtype=wanted[1])


def share_of_process(options):
    """The share of the work that the options name, else the launcher's environment, else the whole."""
    from mmaudio_hf.features.extract import Share

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, world, local_rank, local_world = (int(os.environ[name]) if name in os.environ else None for name in names)
    except ValueError as error:
        raise ValueError(f"the launcher's {', '.join(names)} must be whole numbers ({error})") from None
    index, count, source = options.shard_index, options.num_shards, "--shard-index and --num-shards"
    if index is None and count is None:
        index, count, source = rank, world, "RANK and WORLD_SIZE in the environment"
    if (index is None) != (count is None):
        raise ValueError(f"{source} go together: give both or neither")
    local_rank = local_rank or 0
    return Share(index or 0, 1 if count is None else count, local_rank, local_world or local_rank + 1)


def _extraction_options(recipe: Recipe, options) -> dict:
    extraction = recipe.extraction
    return {
        "share": share_of_process(options),
        "output_dir": Path(extraction.output_dir),
        "encoders": _encoder_options(recipe),
        "mode": recipe.model.mode,
        "duration": recipe.model.duration,
        "batch_size": extraction.batch_size,
        "num_proc": extraction.num_proc,
        "shard_size": extraction.shard_size,
        "open_writer": _open_writer(recipe),
    }


def _extract_video(options) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    sources = _sources(recipe, "videos")
    from mmaudio_hf.features.extract import extract_video

    for source in sources:
        extract_video(
            source.name,
            source.media_dir,
            source.list,
            alignment=recipe.extraction.alignment,
            normalize_audio=source.normalize_audio,
            problems=audit_problems(recipe, source, options.recipe),
            **_extraction_options(recipe, options),
        )


def _extract_audio(options) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    sources = _sources(recipe, "audios")
    for source in sources:
        if not clips_path(recipe, source).is_file():
            raise ValueError(
                f"{clips_path(recipe, source)} is missing: run `mmaudio-hf partition {options.recipe}` first"
            )
    from mmaudio_hf.features.extract import extract_audio

    for source in sources:
        extract_audio(
            source.name,
            source.media_dir,
            source.list,
            clips_path(recipe, source),
            problems=audit_problems(recipe, source, options.recipe),
            **_extraction_options(recipe, options),
        )
