"""`mmaudio-hf store`: look at feature stores, check them, and make new ones of them."""

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from mmaudio_hf.cli.hub import find_for_push
from mmaudio_hf.config import AudioSource, EncoderConfig, Recipe, VideoSource, load_recipe
from mmaudio_hf.schema import split_hub_id


def add_commands(add) -> None:
    """Add them by `add(name, function, help, recipe=False)`, which returns the parser of one command."""
    parts = add(
        "store", None, "inspect, verify, convert, merge, push, pull feature stores, take rows of one"
    ).add_subparsers(required=True, metavar="WHAT")

    def part(name, function, help_text):
        command = parts.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(command=function)
        return command

    inspect = part("inspect", _inspect, "what a store holds: rows, columns, bytes, captions, encoders")
    inspect.add_argument("store", metavar="STORE", type=Path)
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    help_text = "check a feature store: sizes, checksums, ids, captions, non-finite values, and rows made anew"
    for command in (part("verify", _verify, help_text), add("verify", _verify, help_text)):
        command.add_argument("store", metavar="STORE", type=Path)
        command.add_argument("--sample", type=int, default=0, metavar="N", help="make N rows anew and compare")
        command.add_argument("--seed", type=int, default=0, help="which rows are drawn (default 0)")
        command.add_argument("--media", type=Path, metavar="DIR", help="with --sample: compare media too")
        command.add_argument("--recipe", help="recipe of the extraction; default: what the manifest says")

    convert = part("convert", _convert, "write a store in another layout")
    convert.add_argument("source", metavar="SOURCE", type=Path)
    convert.add_argument("target", metavar="TARGET", type=Path)
    convert.add_argument("--layout", choices=("reference", "compact"), required=True)
    convert.add_argument("--sync-dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")

    merge = part("merge", _merge, "write several stores as one")
    merge.add_argument("sources", metavar="SOURCE", type=Path, nargs="+")
    merge.add_argument("--out", metavar="TARGET", type=Path, required=True)
    merge.add_argument("--skip-duplicates", action="store_true", help="of an id that stands twice keep the first row")

    subset = part("subset", _subset, "write some rows of a store as a new one; of several conditions all must hold")
    subset.add_argument("source", metavar="SOURCE", type=Path)
    subset.add_argument("target", metavar="TARGET", type=Path)
    subset.add_argument("--rows", type=_row_range, metavar="A:B", help="rows A to B - 1")
    subset.add_argument("--ids", type=Path, metavar="FILE", help="text file, one id a line")
    subset.add_argument("--match", metavar="REGEX", help="rows whose caption contains this expression")

    push = part("push", _push, "send a store to a dataset repository of the Hub, in parts; the same command goes on")
    push.add_argument("store", metavar="STORE", type=Path)
    push.add_argument("repo", metavar="REPO", help="owner/name; it is made when there is none")
    push.add_argument("--license", default="", help="of the media, as the Hub names it, for the card")
    push.add_argument("--source", default="", help="what the store was made of: a dataset, an address, words")
    push.add_argument("--public", action="store_true", help="a repository that is made is public (default: private)")
    push.add_argument("--part-size", type=float, default=512.0, metavar="MB", help="of one file there (default 512)")
    push.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")

    pull = part("pull", _pull, "fetch a store, or a part of one, from the Hub; the same command goes on")
    pull.add_argument("repo", metavar="REPO[@REVISION]", help="owner/name, with a branch, tag or commit after @")
    pull.add_argument("target", metavar="DIR", type=Path, help="folder of the new store")
    pull.add_argument("--columns", metavar="A,B", help="only these; mean and std belong to every store")
    pull.add_argument("--rows", type=_row_range, metavar="A:B", default=slice(None), help="rows A to B - 1")
    pull.add_argument("--dry-run", action="store_true", help="show what would be fetched, and fetch no column")


def _inspect(options) -> None:
    from mmaudio_hf.data.tools import describe

    facts = describe(options.store)
    if options.json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    size, share = facts["bytes"] / 1e9, facts["bytes"] / facts["reference_bytes"]
    print(f"{facts['path']}: {facts['rows']} rows, {facts['layout']} layout, {size:.3g} GB", end="")
    print(f", {share:.1%} of the reference layout" if facts["layout"] != "reference" else "")
    for name, column in facts["columns"].items():
        shape = "x".join(map(str, column["shape"])) or "1"
        count, gigabytes = column["records"], column["bytes"] / 1e9
        print(f"  {name:14} {column['dtype']:9} {shape:10} {count:>9} records {gigabytes:9.3g} GB")
    print(f"  {facts['distinct_captions']} different captions, {facts['repeated_ids']} rows repeat an id")
    if facts["captions_with_several_texts"]:
        print(f"  {facts['captions_with_several_texts']} captions have several text features: try verify --sample")
    if not facts["manifest"]:
        print("  no manifest: encoders and preprocessing are not known")
    else:
        for key in ("mode", "duration", "normalisation", "preprocessing", "counts"):
            print(f"  {key}: {json.dumps(facts[key])}")
        for name, encoder in facts["encoders"].items():
            print(f"  encoder {name}: {encoder.get('id')} {str(encoder.get('fingerprint'))[:16]}")
        statistics = facts["latent_statistics"]
        ranges = (f"{key} {min(values):.3f} to {max(values):.3f}" for key, values in statistics.items())
        print(f"  latent channels: {', '.join(ranges)}")
    for item_id, caption in facts["first_rows"]:
        print(f"  {item_id}: {caption}")


def _convert(options) -> None:
    from mmaudio_hf.data.tools import convert

    _tell(convert(options.source, options.target, options.layout, options.sync_dtype))


def _merge(options) -> None:
    from mmaudio_hf.data.tools import merge

    _tell(merge(options.sources, options.out, skip_duplicates=options.skip_duplicates))


def _subset(options) -> None:
    if options.rows is None and options.ids is None and options.match is None:
        raise ValueError("which rows? Give --rows, --ids or --match")
    try:
        pattern = re.compile(options.match or "")
    except re.error as error:
        raise ValueError(f"--match {options.match!r} is not a regular expression: {error}") from error
    from mmaudio_hf.data.store import FeatureStore
    from mmaudio_hf.data.tools import subset

    with FeatureStore.open(options.source) as store:
        rows = range(len(store)) if options.rows is None else range(len(store))[options.rows]
        if options.ids is not None:
            wanted = set(options.ids.read_text(encoding="utf-8").split("\n")) - {""}
            if absent := sorted(wanted - set(store.ids)):
                raise ValueError(f"{options.ids}: {len(absent)} ids are not in {store.path}, the first: {absent[0]!r}")
            rows = [row for row in rows if store.ids[row] in wanted]
        rows = [row for row in rows if pattern.search(store.captions[row])]
    _tell(subset(options.source, options.target, rows))


def _row_range(text: str) -> slice:
    found = re.fullmatch(r"(\d*):(\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B")
    return slice(*(int(number) if number else None for number in found.groups()))


def _tell(store) -> None:
    print(f"{store.path}: {len(store)} rows, {store.layout} layout, {store.contents.size / 1e9:.3g} GB")
    store.close()


# --- the Hub -----------------------------------------------------------------------------------------------------


def _push(options) -> None:
    if options.license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", options.license):
        raise ValueError(f"--license {options.license!r}: give it as the Hub names it, for example cc-by-4.0")
    repo, revision = split_hub_id(options.repo)
    if revision:
        raise ValueError(f"{repo}@{revision}: pushes go to the main branch, leave out @{revision}")
    from mmaudio_hf.hub.repository import RepoContents, readable
    from mmaudio_hf.hub.stores import plan_push, push_store

    contents = find_for_push(repo, options.dry_run, "dataset")
    size = sum(file.stat().st_size for file in options.store.glob("*.memmap"))
    with _bar("reading", size) as bar:
        chunk_bytes, card = int(options.part_size * 2**20), {"license": options.license, "source": options.source}
        plan = plan_push(options.store, repo, contents, chunk_bytes=chunk_bytes, progress=bar.update, **card)
    for name, stored in plan.columns.items():
        size = readable(stored.records * stored.column.row_bytes)
        new = sum(chunk.file in plan.missing for chunk in stored.chunks)
        print(f"  {name:14} {size:>10} in {len(stored.chunks)} chunks, {new} to send")
    print(f"{readable(plan.size)} in {len(plan.missing)} chunks to {repo}{', dry run' * options.dry_run}")
    if not options.dry_run:
        with _bar("sending", plan.size) as bar:
            commit = push_store(plan, repo, private=not options.public, progress=bar.update)
        print(f"{RepoContents(repo, commit, {}, 'dataset').url}: commit {commit}")


def _pull(options) -> None:
    repo, revision = split_hub_id(options.repo)
    from mmaudio_hf.hub.repository import readable
    from mmaudio_hf.hub.stores import check_free, plan_pull, pull_store

    check_free(options.target)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / options.target.name if options.dry_run else options.target
        columns = None if options.columns is None else options.columns.split(",")
        plan = plan_pull(repo, place, revision=revision, columns=columns, rows=options.rows)
    for name, size in plan.sizes.items():
        print(f"  {name:14} {readable(size):>10}")
    size = readable(sum(plan.sizes.values()))
    print(f"rows {plan.rows.start} to {plan.rows.stop - 1} of {plan.whole.rows}, {size}", end="")
    print(f" to {options.target}{', dry run' * options.dry_run}")
    if not options.dry_run:
        with _bar("fetching", sum(plan.sizes.values())) as bar:
            store = pull_store(plan, options.target, progress=bar.update)
        _tell(store)


def _bar(what: str, size: int):
    from huggingface_hub.utils import disable_progress_bars
    from tqdm import tqdm

    disable_progress_bars()  # its own would come once for every part
    return tqdm(desc=what, total=size, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)


# --- verify ------------------------------------------------------------------------------------------------------


def _verify(options) -> int:
    if (options.media or options.recipe) and not options.sample:
        raise ValueError("--media and --recipe say how rows are made anew: give --sample N as well")
    from mmaudio_hf.data.tools import verify

    reencode = _reencoder(options) if options.sample else None
    report = verify(options.store, sample=options.sample, reencode=reencode, seed=options.seed)
    for line in (*report.problems, *report.notes):
        print(line)
    print(f"{report.path}: {report.rows} rows, {'ok' if report.ok else f'{len(report.problems)} problems'}")
    return 0 if report.ok else 1


def _reencoder(options) -> Callable:
    """Makes a row anew: its text, and with --media what its file gives, as the manifest or else the recipe says."""
    from mmaudio_hf.data.store import FeatureStore
    from mmaudio_hf.features.encoders import check_encoders, fingerprints, load_encoders

    recipe = load_recipe(options.recipe) if options.recipe else None
    with FeatureStore.open(options.store) as store:
        manifest, video = store.manifest or {}, store.has_video
        if not store.has_text and options.media is None:
            raise ValueError(f"{store.path} has no text features: give --media to compare the rest")
    if recipe is None and not manifest.get("encoders"):
        raise ValueError(f"{options.store} does not say what made it: give --recipe, the recipe of the extraction")
    mode = manifest.get("mode") or (recipe.model.mode if recipe else None)
    duration = manifest.get("duration") or (recipe.model.duration if recipe else None)
    config = recipe.encoders if recipe else _encoders_of(manifest, options.store)
    components = ["text"] if options.media is None else [*(["clip", "sync"] if video else []), "text", "latent"]
    check_encoders(config, mode, components)
    for name, facts in fingerprints(config, mode, components).items():
        made = manifest.get("encoders", {}).get(name, facts)
        if made.get("fingerprint") != facts["fingerprint"]:
            raise ValueError(
                f"{options.store} was made with {name} {made}, these are {facts}: give --recipe with encoders of then"
            )
    encoders = load_encoders(config, mode, components, duration=duration)
    read = _reader(options, recipe, manifest, mode, duration, video) if options.media else lambda item_id: {}

    def reencode(item_id: str, caption: str) -> dict:
        return {"text_features": encoders.encode_text([caption])[0], **_features(encoders, read(item_id))}

    return reencode


def _encoders_of(manifest: dict, store: Path) -> EncoderConfig:
    """Encoders as the manifest names them, at their usual places."""
    ids = [str(facts.get("id")) for facts in manifest["encoders"].values()]
    if any(name.startswith("toy_") for name in ids):
        return EncoderConfig(kind="toy", weights_dir=str(store.parent))
    return EncoderConfig(precision="bf16" if any(name.endswith("(bf16)") for name in ids) else "fp32")


def _features(encoders, media: dict) -> dict:
    features = {}
    if "audio" in media:
        mean, std = encoders.encode_audio(media["audio"][None])
        features |= {"mean": mean[0], "std": std[0]}
    if "clip_frames" in media:
        features["clip_features"] = encoders.encode_clip(media["clip_frames"][None])[0]
        features["sync_features"] = encoders.encode_sync(media["sync_frames"][None])[0]
    return features


def _reader(options, recipe: Recipe | None, manifest: dict, mode: str, duration: float, video: bool) -> Callable:
    """What the encoders are given for the id of a row; RunError when its file is gone or cannot be read."""
    if video:
        return _video_reader(options, recipe, manifest, mode, duration)
    return _recording_reader(options, recipe, mode, duration)


def _source(options, recipe: Recipe | None, kind: str):
    sources = getattr(recipe.extraction, kind) if recipe else ()
    return next((source for source in sources if source.name == options.store.name), None)


def _video_reader(options, recipe: Recipe | None, manifest: dict, mode: str, duration: float) -> Callable:
    from mmaudio_hf.media.container import MediaError
    from mmaudio_hf.media.lists import VideoStart, find_video, read_video_clips
    from mmaudio_hf.media.video import read_video
    from mmaudio_hf.schema import RunError

    settings = manifest.get("preprocessing")
    source = _source(options, recipe, "videos")
    if isinstance(settings, dict):
        chosen = {name: settings[name] for name in ("alignment", "normalize_audio")}
    elif source is not None:
        chosen = {"alignment": recipe.extraction.alignment, "normalize_audio": source.normalize_audio}
    else:
        raise ValueError(
            f"{options.store} does not say how its videos were read: give --recipe with a source of its name"
        )

    listed = _clip_list(options, recipe, source)
    clips = {clip.id: clip for clip in read_video_clips(listed)} if listed.is_file() else {}  # of long videos

    def read(item_id: str) -> dict:
        known = clips.get(item_id, VideoStart(item_id, item_id, 0.0))
        try:
            path = find_video(options.media, known.name)
            clip = read_video(path, start=known.start, mode=mode, duration=duration, as_uint8=True, **chosen)
        except MediaError as error:
            raise RunError(str(error)) from error
        return {"audio": clip.audio, "clip_frames": clip.clip_frames, "sync_frames": clip.sync_frames}

    return read


def _clip_list(options, recipe: Recipe | None, source: VideoSource | AudioSource | None) -> Path:
    """The clips.tsv of the recipe, or the one beside the store."""
    if recipe is not None and source is not None:
        return recipe.extraction.clips_path(source)
    return options.store.with_name(f"{options.store.name}.clips.tsv")


def _recording_reader(options, recipe: Recipe | None, mode: str, duration: float) -> Callable:
    from mmaudio_hf.media.audio import cut_audio_clip, read_waveform
    from mmaudio_hf.media.container import MediaError
    from mmaudio_hf.media.lists import find_audio_file, read_clips
    from mmaudio_hf.schema import RunError

    source = _source(options, recipe, "audios")
    listed = _clip_list(options, recipe, source)
    if not listed.is_file():
        raise ValueError(f"{listed} is missing: it says which part of a recording a row is; give --recipe")
    clips = {clip.id: clip for clip in read_clips(listed)}

    def read(item_id: str) -> dict:
        clip = clips.get(item_id) or clips.get(item_id.rpartition(".")[0])  # ID.2: the clip with its second caption
        if clip is None:
            raise RunError(f"{listed} has no clip {item_id!r}")
        try:
            path = find_audio_file(options.media, clip.name)
            waveform, rate = read_waveform(path)
            span = {"start_sample": clip.start_sample, "end_sample": clip.end_sample}
            return {"audio": cut_audio_clip(waveform, rate, mode=mode, duration=duration, source=str(path), **span)}
        except MediaError as error:
            raise RunError(str(error)) from error

    return read
