"""Commands from media to feature stores."""

import argparse
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaudio_hf.cli.hub import Add
from mmaudio_hf.config import AudioSource, EncoderConfig, Recipe, VideoSource, load_recipe

if TYPE_CHECKING:
    from mmaudio_hf.evaluation.offsets import Clips, Comparison
    from mmaudio_hf.files import Share
    from mmaudio_hf.media.audit import AuditReport, AuditSource, Limits, Sync
    from mmaudio_hf.sources import LeftOut, Prepared


def add_commands(add: Add) -> None:
    """`example-media`, `prepare`, `partition`, `extract-video` and `extract-audio`."""

    def example_media(options: argparse.Namespace) -> None:
        from mmaudio_hf.media.example import write_example_media

        write_example_media(options.directory, seed=options.seed, small=options.small)
        print(f"example media: {options.directory}")

    media = add("example-media", example_media, "write the synthesised example videos, audio files and captions")
    media.add_argument("directory", metavar="DIR", type=Path)
    media.add_argument("--seed", type=int, default=0)
    media.add_argument("--small", action="store_true", help="a handful of clips, for a quick trial")
    prepare = add("prepare", _prepare, "make media lists of official annotations, captioned folders and tables")
    prepare.add_argument("kind", choices=("vggsound", "audiocaps", "wavcaps", "clotho", "folder", "table", "dataset"))
    prepare.add_argument("source", metavar="SOURCE", help="annotation file, folder, or what load_dataset reads")
    prepare.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the lists")
    prepare.add_argument("--name", default="", help="of the list (default: that of the data set, folder or table)")
    prepare.add_argument("--media", metavar="DIR", type=Path, help="folder of the media: count what is missing")
    prepare.add_argument("--split", default="train", help="of a data set")
    prepare.add_argument("--media-column", default="", help="of a data set, whose media are written to --media")
    help_text = "as val=0.05: of the train ids"
    prepare.add_argument("--share", metavar="SPLIT=X", action="append", default=[], help=help_text)
    prepare.add_argument("--id-column", default="", help="of a table or data set: file names")
    prepare.add_argument("--text-column", default="", help="of a table or data set: captions")
    partition = "cut the audio files and long videos of a recipe into clips (writes clips.tsv)"
    for name, function, help_text in (
        ("partition", _partition, partition),
        ("extract-video", partial(_extract, "videos"), "make the feature stores of a recipe's videos"),
        ("extract-audio", partial(_extract, "audios"), "make the feature stores of a recipe's audio files"),
    ):
        command = add(name, function, help_text, recipe=True)
        add_share(command)
        if function is not _partition:
            command.add_argument("--clean", action="store_true", help="remove the shards of complete stores")


def add_share(command: argparse.ArgumentParser) -> None:
    """Options of `share_of_process`."""
    command.add_argument("--shard-index", type=int, metavar="I", help="make every N-th shard, from the I-th (0 ...) on")
    command.add_argument("--num-shards", type=int, metavar="N", help="number of processes that divide the shards")


def _prepare(options: argparse.Namespace) -> None:
    try:
        shares = {split: float(share) for split, share in (text.split("=") for text in options.share)}
    except ValueError:
        raise ValueError(f"--share {' '.join(options.share)}: write SPLIT=X, as val=0.05") from None
    from mmaudio_hf.sources import prepare

    media = options.media or (Path(options.source) if options.kind == "folder" else None)
    how: dict[str, Any] = {name: getattr(options, name) for name in ("name", "split", "media_column")}
    how |= {"media": media, "shares": shares, "columns": (options.id_column, options.text_column)}
    lists, left_out = prepare(options.kind, options.source, options.out, **how)
    _print_prepared(lists, left_out, media)


def _print_prepared(lists: "Sequence[Prepared]", left_out: "LeftOut", media: Path | None) -> None:
    for prepared in lists:
        missing = f", {prepared.missing} of their files missing from {media}" if prepared.missing else ""
        missing = f", all files in {media}" if prepared.missing == 0 else missing
        print(f"{prepared.path}: {prepared.rows} rows{missing}")
    for reason, rows in left_out.items():
        print(f"left out: {len(rows)} {reason}, the first: {rows[0]}")


def _write_datasets(sources: Sequence[VideoSource | AudioSource]) -> None:
    """Media and lists of the sources that name a data set, where they are not there yet."""
    if any(source.dataset.path for source in sources):
        from mmaudio_hf.sources import write_dataset

        for source in sources:
            if written := write_dataset(source):
                _print_prepared([written[0]], written[1], Path(source.media_dir))


def _partition(options: argparse.Namespace) -> None:
    from mmaudio_hf.media.lists import check_sources

    recipe, share = load_recipe(options.recipe, options.overrides), share_of_process(options)
    sources: list[VideoSource | AudioSource] = [s for s in recipe.extraction.videos if s.max_clips != 1]
    sources += recipe.extraction.audios
    if not sources:
        raise ValueError(f"recipe {recipe.name} names nothing under extraction.audios, and all videos have max_clips 1")
    _write_datasets(sources)
    check_sources(recipe.extraction, lists=False)
    for source in sources:
        _write_clips(recipe, source, share)


def _write_clips(recipe: Recipe, source: VideoSource | AudioSource, share: "Share", needed: bool = True) -> None:
    from mmaudio_hf.files import write_text
    from mmaudio_hf.media.lists import audio_clip_seconds, write_clips

    extraction, duration = recipe.extraction, recipe.clip_seconds(source)
    path = extraction.clips_path(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    shards_dir = Path(extraction.shards_dir or extraction.output_dir) / f"{source.name}.shards"
    how: dict[str, Any] = {"shard_size": extraction.shard_size, "share": share, "workers": extraction.num_proc}
    report = write_clips(source, path, duration=duration, shards_dir=shards_dir, progress=True, **how)
    if report.pending_shards:
        complete = report.shards - report.pending_shards
        print(f"{path}: {complete} of {report.shards} shards complete; the last one to finish writes it")
        return
    rejects = path.with_suffix(".rejects.jsonl")
    lines = [json.dumps(reject, ensure_ascii=False) + "\n" for reject in report.rejects + report.ignored]
    write_text(rejects, "".join(lines))
    if not report.clips:
        path.unlink(missing_ok=True)
        if not needed:
            return
        least = "a track of frames"
        if isinstance(source, AudioSource):
            least = f"{audio_clip_seconds(source, duration)} s of audio"
        raise ValueError(
            f"{source.media_dir}: no file gives a clip, each needs {least} at least;"
            f" {rejects} says what is wrong with each of {len(report.rejects)}"
        )
    left_out = f"{len(report.rejects)} files rejected, {len(report.ignored)} other files ignored"
    print(f"{path}: {report.clips} clips, {left_out}{f', see {rejects}' if lines else ''}")


def _cut_videos(recipe: Recipe, source: VideoSource, share: "Share", needed: bool = True) -> None:
    """Write the clip list of a source; media that are in a list of before are not read again."""
    from mmaudio_hf.media.lists import check_sources

    _write_datasets([source])
    check_sources(replace(recipe.extraction, videos=(source,), audios=()), lists=False)
    _write_clips(recipe, source, share, needed)


def _check_clips(recipe: Recipe, sources: Sequence[VideoSource | AudioSource], recipe_path: str) -> None:
    for source in sources:
        cut = isinstance(source, AudioSource) or source.max_clips != 1
        if cut and not (clips := recipe.extraction.clips_path(source)).is_file():
            raise ValueError(f"{clips} is missing: run `mmaudio-hf partition {recipe_path}` first")


def _all_sources(recipe: Recipe) -> list[VideoSource | AudioSource]:
    return [*recipe.extraction.videos, *recipe.extraction.audios]


def _check_layouts(recipe: Recipe) -> None:
    """ValueError when a store of the recipe is there in another layout."""
    from mmaudio_hf.data.store import FeatureStore
    from mmaudio_hf.data.tools import layout_of

    layout, dtype = recipe.extraction.layout, recipe.extraction.sync_dtype
    paths = [Path(recipe.extraction.output_dir) / source.name for source in _all_sources(recipe)]
    for path in filter(Path.exists, paths):
        with FeatureStore.open(path) as store:
            has, has_dtype = layout_of(store)
            if has != layout or (store.has_video and has_dtype != dtype):
                convert = f"mmaudio-hf store convert {path} {path}_{layout} --layout {layout} --sync-dtype {dtype}"
                raise ValueError(
                    f"{path} has the layout {has} (sync {has_dtype}), the recipe asks for {layout} (sync {dtype}):"
                    f" convert it (`{convert}`) or remove the store and run the same command: the shards are kept"
                )


def share_of_process(options: argparse.Namespace) -> "Share":
    """The share of the work that the options name, else the launcher's environment, else the whole."""
    from mmaudio_hf.files import Share

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


def _extract(kind: str, options: argparse.Namespace) -> None:
    """The sources of a kind: "videos" or "audios"."""
    recipe, share = load_recipe(options.recipe, options.overrides), share_of_process(options)
    sources: Sequence[VideoSource | AudioSource] = getattr(recipe.extraction, kind)
    if not sources:
        raise ValueError(f"recipe {recipe.name} names nothing under extraction.{kind}")
    from mmaudio_hf.media.lists import check_sources

    for source in sources if share.count == 1 else ():
        if isinstance(source, VideoSource) and source.max_clips == 0 and not source.clips:
            _cut_videos(recipe, source, share)
    _check_clips(recipe, sources, options.recipe)
    _write_datasets(_all_sources(recipe))
    check_sources(recipe.extraction)  # all of them, before hours of work on the first
    problems = [audit_problems(recipe, source, options.recipe) for source in sources]
    offsets: list[Mapping[str, float] | None] = [None] * len(sources)
    if recipe.extraction.correct_offset and kind == "videos":
        from mmaudio_hf.media.audit import known_offsets

        how = {"renew": f"mmaudio-hf audit {options.recipe}"}
        offsets = [known_offsets(recipe.extraction.audit, _audit_source(recipe, each), **how) for each in sources]
    _check_layouts(recipe)
    from mmaudio_hf.data.store import StoreWriter
    from mmaudio_hf.features.extract import extract_audio, extract_video

    open_writer = partial(StoreWriter, layout=recipe.extraction.layout, sync_dtype=recipe.extraction.sync_dtype)

    for source, known, late in zip(sources, problems, offsets, strict=True):
        given: dict[str, Any] = {"problems": known, "share": share, "clean": options.clean}
        if isinstance(source, VideoSource):
            extract_video(recipe, source, open_writer, offsets=late, **given)
        else:
            extract_audio(recipe, source, open_writer, **given)


# --- The command that looks at media before any feature is made, and what extraction takes from it -------------------


def add_audit_commands(add: Add) -> None:
    """`audit`."""
    command = add("audit", _audit, "look for what is wrong with media, before any feature is made of them")
    command.add_argument("recipe", metavar="RECIPE", nargs="?", help="audit all lists of extraction.videos and .audios")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    command.add_argument("--videos", metavar="DIR", type=Path, help="without a recipe: folder of videos")
    command.add_argument("--audios", metavar="DIR", type=Path, help="without a recipe: folder of audio files")
    command.add_argument("--list", metavar="TSV", type=Path, help="without a recipe: list of the ids in the folder")
    command.add_argument("--against", metavar="TSV", type=Path, help="list of held-out ids, for leakage")
    command.add_argument("--against-media", metavar="DIR", type=Path, help="their folder, if it is another one")
    help_text = "the table; by default audit.parquet beside the features of the recipe"
    command.add_argument("--out", metavar="FILE", type=Path, help=help_text)
    command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes, one per core")
    command.add_argument("--duration", type=float, default=8.0, help="without a recipe: seconds of a clip")
    add_sync_options(command)
    command.add_argument("--sync", action="store_true", help="also compare the audio of every video with its frames")
    help_text = "seconds that are compared (8, or the recipe's if it is longer)"
    command.add_argument("--sync-duration", type=float, metavar="S", help=help_text)
    for name, text in _LIMITS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=float, help=text)


def add_sync_options(command: argparse.ArgumentParser) -> None:
    """Options of every audit that compares audio and frames."""
    help_text = "also CLAP of the captions and ImageBind of the frames: av-benchmark"
    command.add_argument("--relevance", action="store_true", help=help_text)
    add_share(command)
    for name, text in SYNC_LIMITS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=float, help=text)


SYNC_LIMITS = {
    "max_offset": "offset: the audio is more seconds late or early (0.2)",
    "max_chance": "unrelated: a larger share of the audio of other clips fits as well (0.01)",
    "min_clap": "caption_mismatch: audio and caption have a lower cosine by CLAP (0)",
    "min_imagebind": "frames_mismatch: audio and frames have a lower cosine by ImageBind (0)",
}
# Limits of `media.audit.Limits`, which is not imported for a --help; a test holds the two together.
_LIMITS = {
    "max_still": "still: this share of the sampled frames, or more, is like the one before (0.85)",
    "max_silent": "silent: this share of the audio, or more, is below -60 dBFS (0.95)",
    "max_clipped": "clipped: a larger share of the samples is at full scale (0.005)",
    "max_uneven": "variable_frame_rate: a larger share of the intervals is not the usual one (0.02)",
    "max_start_gap": "start_gap: more seconds between the starts of frames and audio (0.1)",
    "max_drift": "audio_drift: timestamps and samples of the audio differ by more seconds (0.04)",
    "max_duration": "too_long: a video lasts more seconds (60)",
    "max_difference": "odd_duration: lengths of tracks and container differ by more seconds (1)",
}


def _audit(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
    _check(options)
    from mmaudio_hf.files import locked
    from mmaudio_hf.media.audit import AuditSource, audit, check_table
    from mmaudio_hf.pages.audit import write_page

    sync: Sync | None = None
    limits = limits_of(options, {**_LIMITS, **SYNC_LIMITS})
    if recipe is None:
        kind, folder = ("video", options.videos) if options.videos else ("audio", options.audios)
        name, held_out = (path.stem.strip() or "list" if path else "" for path in (options.list, options.against))
        sources = [AuditSource(name, kind, folder, options.list)]
        if options.against:
            other = held_out if held_out != name else f"{held_out}_held_out"
            media = options.against_media or folder
            sources.append(AuditSource(other, kind, media, options.against, trains=False, held_out=True))
        duration, table = options.duration, Path("audit.parquet")
    else:
        sources, duration = _recipe_sources(recipe, options), recipe.model.duration
        table = Path(recipe.extraction.audit or Path(recipe.extraction.output_dir) / "audit.parquet")
    table = options.out or table
    check_table(table)
    table.parent.mkdir(parents=True, exist_ok=True)
    if options.sync or options.relevance:
        sync = _sync_of_media(options, recipe, sources, duration, table)
        if sync is None:
            return
    with locked(table.with_suffix(".lock")):  # of several processes the last one comes here, or two at once
        report = audit(sources, table, duration=duration, limits=limits, workers=options.workers, sync=sync)
        page = write_page(table, table.with_suffix(".html"))
    show_audit(report, page, "files measured")
    use = recipe.extraction if recipe else None
    if use and not use.audit and (rejected := [verdict for verdict in use.reject if verdict in report.counts]):
        given = f"extraction.audit={shlex.quote(str(table))}"
        print(f"extraction leaves out {', '.join(rejected)} when it is given {given}")


def show_audit(report: "AuditReport", page: Path, measured: str) -> None:
    """What an audit has found, in a few lines."""
    for verdict, count in report.counts.items():
        print(f"{count:8} {verdict}")
    print(
        f"{report.ok} of {report.listed} items are ok; {report.measured} {measured} in {report.seconds:.1f} s;"
        f" {report.table} has each, {page} shows the worst"
    )


def limits_of(options: argparse.Namespace, names: Mapping[str, str]) -> "Limits":
    """`Limits` of the options that were given."""
    from mmaudio_hf.media.audit import Limits

    return Limits(**{name: getattr(options, name) for name in names if getattr(options, name) is not None})


def _sync_of_media(
    options: argparse.Namespace, recipe: Recipe | None, sources: "Sequence[AuditSource]", duration: float, table: Path
) -> "Sync | None":
    from mmaudio_hf.evaluation.av_bench import AvBench
    from mmaudio_hf.evaluation.offsets import SECONDS, Comparison, MediaClips

    if not any(source.kind == "video" for source in sources):
        raise ValueError("--sync compares audio with frames, and there is no list of videos")
    config = recipe.encoders if recipe else EncoderConfig()
    comparison = Comparison(
        config,
        recipe.model.mode if recipe else "16k",
        options.sync_duration or max(SECONDS, duration),
        AvBench.from_recipe(recipe) if recipe else AvBench("", Path(config.weights_dir)),
        options.relevance,
        share_of_process(options),
        *((recipe.extraction.batch_size, recipe.extraction.shard_size) if recipe else ()),
    )
    alignment = recipe.extraction.alignment if recipe else "timestamps"
    return measure_sync(MediaClips(sources, comparison, alignment, duration), comparison, table)


def measure_sync(clips: "Clips", comparison: "Comparison", table: Path) -> "Sync | None":
    """Figures of audio against frames; None, and a line that says so, while other processes have some to measure."""
    from mmaudio_hf.evaluation.offsets import figures_of, measure

    lines = table.with_suffix(".sync.jsonl")
    if pending := measure(clips, comparison, lines):
        print(f"{lines}: {pending} clips are still to be measured; the process that ends last writes {table}")
        return None
    if not comparison.relevance:
        print("clap_score and imagebind_score are not measured: they need --relevance, and av-benchmark")
    return figures_of(clips, lines)


def _check(options: argparse.Namespace) -> None:
    if not (options.sync or options.relevance):
        names = (*SYNC_LIMITS, "sync_duration", "shard_index", "num_shards")
        if extra := [name for name in names if getattr(options, name) is not None]:
            raise ValueError(f"--{extra[0].replace('_', '-')} has no effect without --sync")
    folders = [folder for folder in (options.videos, options.audios) if folder is not None]
    if options.recipe:
        names = ("videos", "audios", "list", "against", "against_media")
        if extra := [name for name in names if getattr(options, name) is not None]:
            option = f"--{extra[0].replace('_', '-')}"
            raise ValueError(f"{option} is for an audit without a recipe; the lists of a recipe are in it")
    elif len(folders) != 1 or options.list is None:
        raise ValueError("give a recipe, or one of --videos DIR and --audios DIR with --list TSV")
    elif options.against_media and not options.against:
        raise ValueError("--against-media needs --against, the list of the held-out ids")


def _recipe_sources(recipe: Recipe, options: argparse.Namespace) -> "list[AuditSource]":
    """Every source; those whose store is named in data.validation or data.test are held out.

    Long videos of which several clips are made are cut first, as by `partition`, which several processes need.
    """
    from mmaudio_hf.files import Share

    extraction, data = recipe.extraction, recipe.data
    if not extraction.videos and not extraction.audios:
        raise ValueError(f"recipe {recipe.name} names nothing under extraction.videos and extraction.audios")
    held = {Path(store.path).resolve() for store in (*data.validation, *data.test)}
    trained = {Path(store.path).resolve() for store in data.train}
    sources = []
    _write_datasets(_all_sources(recipe))
    share = share_of_process(options) if options.sync or options.relevance else None
    for video in extraction.videos if share is None or share.count == 1 else ():
        ours = video.max_clips == 0 and not video.clips
        if video.max_clips != 1 and (ours or not extraction.clips_path(video).is_file()):
            _cut_videos(recipe, video, Share(), needed=False)  # the table says what is wrong where none gives a clip
    if share and share.count > 1:
        _check_clips(recipe, extraction.videos, options.recipe)
    for source in _all_sources(recipe):
        store = (Path(extraction.output_dir) / source.name).resolve()
        held_out, trains = store in held, store in trained or store not in held
        sources.append(replace(_audit_source(recipe, source), trains=trains, held_out=held_out))
    return sources


def _audit_source(recipe: Recipe, source: VideoSource | AudioSource) -> "AuditSource":
    from mmaudio_hf.media.audit import AuditSource

    kind = "video" if isinstance(source, VideoSource) else "audio"
    listed = AuditSource(source.name, kind, source.media_dir, source.list, seconds=source.duration)
    cut = isinstance(source, VideoSource) and source.max_clips != 1
    return replace(listed, clips=recipe.extraction.clips_path(source)) if cut else listed


def audit_problems(
    recipe: Recipe, source: VideoSource | AudioSource, recipe_path: str
) -> Mapping[str, tuple[str, str]] | None:
    """Clip -> (verdict, message) of what extraction leaves out of `source` by `extraction.audit`; None without one."""
    if not recipe.extraction.audit:
        return None
    from mmaudio_hf.media.audit import known_problems

    how, listed = {"renew": f"mmaudio-hf audit {recipe_path}"}, _audit_source(recipe, source)
    return known_problems(recipe.extraction.audit, listed, recipe.extraction.reject, **how)
