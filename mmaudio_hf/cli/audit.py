"""The command that looks at media before any feature is made, and what extraction takes from it."""

import os
from collections.abc import Mapping
from pathlib import Path

from mmaudio_hf.config import AudioSource, Recipe, VideoSource, load_recipe


def add_commands(add) -> None:
    """Add them by `add(name, function, help, recipe=False)`, which returns the parser of one command."""
    command = add("audit", _audit, "look for what is wrong with media, before any feature is made of them")
    command.add_argument("recipe", metavar="RECIPE", nargs="?", help="audit all lists of extraction.videos and .audios")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    command.add_argument("--videos", metavar="DIR", type=Path, help="without a recipe: folder of videos")
    command.add_argument("--audios", metavar="DIR", type=Path, help="without a recipe: folder of recordings")
    command.add_argument("--list", metavar="TSV", type=Path, help="without a recipe: list of the ids in the folder")
    command.add_argument("--against", metavar="TSV", type=Path, help="list of held-out ids, for leakage")
    command.add_argument("--against-media", metavar="DIR", type=Path, help="their folder, if it is another one")
    command.add_argument(
        "--out", metavar="FILE", type=Path, help="the table; by default audit.parquet beside the features of the recipe"
    )
    command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes, one per core")
    command.add_argument("--duration", type=float, default=8.0, help="without a recipe: seconds of a clip")
    for name, text in _LIMITS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=float, help=text)


# Limits of `media.audit.Limits`, which is not imported for a --help; a test holds the two together.
_LIMITS = {
    "max_still": "still: this share of the sampled pictures, or more, is like the one before (0.85)",
    "max_silent": "silent: this share of the sound, or more, is below -60 dBFS (0.95)",
    "max_clipped": "clipped: a larger share of the samples is at full scale (0.005)",
    "max_uneven": "variable_frame_rate: a larger share of the intervals is not the usual one (0.02)",
    "max_start_gap": "start_gap: more seconds between the starts of pictures and sound (0.1)",
    "max_duration": "too_long: a video lasts more seconds (60)",
    "max_difference": "odd_duration: lengths of tracks and container differ by more seconds (1)",
}


def _audit(options) -> None:
    recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
    _check(options)
    from mmaudio_hf.media.audit import AuditSource, Limits, audit
    from mmaudio_hf.media.audit_page import write_page

    given = {name: getattr(options, name) for name in _LIMITS if getattr(options, name) is not None}
    if recipe is None:
        sources, duration, table = _given_sources(options, AuditSource), options.duration, Path("audit.parquet")
    else:
        sources, duration, table = _recipe_sources(recipe, AuditSource), recipe.model.duration, _table(recipe)
    table = options.out or table
    report = audit(sources, table, duration=duration, limits=Limits(**given), workers=options.workers)
    page = write_page(table, table.with_suffix(".html"))
    for verdict, count in report.counts.items():
        print(f"{count:8} {verdict}")
    print(
        f"{report.ok} of {report.listed} items are ok; {report.measured} files measured in {report.seconds:.1f} s;"
        f" {table} has each, {page} shows the worst"
    )


def _check(options) -> None:
    folders = [folder for folder in (options.videos, options.audios) if folder is not None]
    if options.recipe:
        extra = [name for name in ("videos", "audios", "list", "against", "against_media") if getattr(options, name)]
        if extra:
            option = f"--{extra[0].replace('_', '-')}"
            raise ValueError(f"{option} is for an audit without a recipe; the lists of a recipe are in it")
    elif len(folders) != 1 or options.list is None:
        raise ValueError("give a recipe, or one of --videos DIR and --audios DIR with --list TSV")
    elif options.against_media and not options.against:
        raise ValueError("--against-media needs --against, the list of the held-out ids")


def _given_sources(options, make) -> list:
    kind, folder = ("video", options.videos) if options.videos else ("audio", options.audios)
    name = _plain(options.list.stem)
    sources = [make(name, kind, folder, options.list)]
    if options.against:
        other = _plain(options.against.stem)
        other = other if other != name else f"{other}_held_out"
        sources.append(make(other, kind, options.against_media or folder, options.against, trains=False, held_out=True))
    return sources


def _plain(name: str) -> str:
    return name.strip() or "list"


def _recipe_sources(recipe: Recipe, make) -> list:
    """Every source; those whose store is named in data.validation or data.test are held out."""
    extraction, data = recipe.extraction, recipe.data
    if not extraction.videos and not extraction.audios:
        raise ValueError(f"recipe {recipe.name} names nothing under extraction.videos and extraction.audios")
    held = {Path(store.path).resolve() for store in (*data.validation, *data.test)}
    trained = {Path(store.path).resolve() for store in data.train}
    sources = []
    for source in (*extraction.videos, *extraction.audios):
        store = (Path(extraction.output_dir) / source.name).resolve()
        held_out, trains = store in held, store in trained or store not in held
        kind = "video" if isinstance(source, VideoSource) else "audio"
        sources.append(make(source.name, kind, source.media_dir, source.list, trains, held_out))
    return sources


def _table(recipe: Recipe) -> Path:
    return Path(recipe.extraction.audit or Path(recipe.extraction.output_dir) / "audit.parquet")


def audit_problems(
    recipe: Recipe, source: VideoSource | AudioSource, recipe_path: str
) -> Mapping[str, tuple[str, str]] | None:
    """id -> (verdict, message) of what extraction leaves out of `source` by `extraction.audit`; None without one."""
    if not recipe.extraction.audit:
        return None
    from mmaudio_hf.media.audit import AuditSource, known_problems

    kind = "video" if isinstance(source, VideoSource) else "audio"
    return known_problems(
        recipe.extraction.audit,
        AuditSource(source.name, kind, source.media_dir, source.list),
        recipe.extraction.reject,
        renew=f"mmaudio-hf audit {recipe_path}",
    )
