"""`mmaudio-hf store`: inspect, verify and rewrite feature stores, and copy them to and from the Hub."""

import argparse
import contextlib
import json
import os
import re
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaudio_hf.cli.hub import Add, adder, find_for_push, repository_of
from mmaudio_hf.cli.media import SYNC_LIMITS, add_sync_options, limits_of, measure_sync, share_of_process, show_audit
from mmaudio_hf.config import EncoderConfig, Recipe, load_recipe
from mmaudio_hf.schema import HUB_PREFIX, RunError, split_hub_id

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from mmaudio_hf.data.store import FeatureStore

HUB_HELP = "store, or hub://owner/name[@revision]"


def add_commands(add: Add) -> None:
    """`store` with its commands, and `verify`."""
    group = add("store", None, "inspect, verify, convert, merge, push, pull feature stores, take rows of one")
    add_store = adder(group.add_subparsers(required=True, metavar="WHAT"))
    inspect = add_store("inspect", _inspect, "what a store holds: rows, columns, bytes, captions, encoders")
    inspect.add_argument("store", metavar="STORE", type=_path_or_hub, help=HUB_HELP)
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    help_text = "check a feature store: sizes, checksums, ids, captions, non-finite values, and rows encoded again"
    for command in (add_store("verify", _verify, help_text), add("verify", _verify, help_text)):
        command.add_argument("store", metavar="STORE", type=_path_or_hub, help=HUB_HELP)
        command.add_argument("--sample", type=int, default=0, metavar="N", help="encode N rows again and compare")
        command.add_argument("--seed", type=int, default=0, help="which rows are chosen (default 0)")
        command.add_argument("--media", type=Path, metavar="DIR", help="with --sample: compare media too")
        command.add_argument("--recipe", help="recipe of the extraction; default: what the manifest says")

    audit = add_store("audit", _audit, "compare the audio of every row with its frames, without media")
    audit.add_argument("store", metavar="STORE", type=_on_this_machine)
    audit.add_argument("--out", metavar="FILE", type=Path, help="the table (default STORE.audit.parquet)")
    audit.add_argument("--ok-ids", metavar="FILE", type=Path, help="ids of the rows that are ok, for subset --ids")
    audit.add_argument("--recipe", help="recipe of the extraction; default: what the manifest says")
    add_sync_options(audit)

    convert = add_store("convert", _convert, "write a store in another layout")
    convert.add_argument("source", metavar="SOURCE", type=_on_this_machine)
    convert.add_argument("target", metavar="TARGET", type=Path)
    convert.add_argument("--layout", choices=("reference", "compact"), required=True)
    convert.add_argument("--sync-dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")

    merge = add_store("merge", _merge, "write several stores as one")
    merge.add_argument("sources", metavar="SOURCE", type=_on_this_machine, nargs="+")
    merge.add_argument("--out", metavar="TARGET", type=Path, required=True)
    merge.add_argument("--skip-duplicates", action="store_true", help="of a repeated id keep the first row")

    subset = add_store("subset", _subset, "write some rows of a store as a new one; rows that meet all conditions")
    subset.add_argument("source", metavar="SOURCE", type=_on_this_machine)
    subset.add_argument("target", metavar="TARGET", type=Path)
    subset.add_argument("--rows", type=_row_range, metavar="A:B", help="rows A to B - 1")
    subset.add_argument("--ids", type=Path, metavar="FILE", help="text file, one id a line")
    subset.add_argument("--match", metavar="REGEX", help="rows whose caption contains this expression")

    push = add_store("push", _push, "upload a store to a dataset repository of the Hub; run again to resume")
    push.add_argument("store", metavar="STORE", type=_on_this_machine)
    push.add_argument("repo", metavar="REPO", help="owner/name; created when it does not exist")
    push.add_argument("--license", default="", help="of the media, as the Hub names it, for the card")
    push.add_argument("--source", default="", help="what the store was made of: a dataset, a URL, words")
    push.add_argument("--public", action="store_true", help="a new repository is public (default: private)")
    push.add_argument("--part-size", type=float, default=512.0, metavar="MB", help="of one file there (default 512)")
    push.add_argument("--dry-run", action="store_true", help="show what would be uploaded, and upload nothing")

    pull = add_store("pull", _pull, "download a store, or some rows or columns of it; run again to resume")
    pull.add_argument("repo", metavar="REPO[@REVISION]", help="owner/name, with a branch, tag or commit after @")
    pull.add_argument("target", metavar="DIR", type=Path, help="folder of the new store")
    pull.add_argument("--columns", metavar="A,B", help="only these; mean and std belong to every store")
    pull.add_argument("--rows", type=_row_range, metavar="A:B", default=slice(None), help="rows A to B - 1")
    pull.add_argument("--dry-run", action="store_true", help="show what would be downloaded, and download no column")


def _path_or_hub(text: str) -> Path | str:
    return text if text.startswith(HUB_PREFIX) else Path(os.path.expandvars(text)).expanduser()


def _on_this_machine(text: str) -> Path:
    if text.startswith(HUB_PREFIX):
        raise argparse.ArgumentTypeError(f"{text} is not on this machine: pull it first, with `mmaudio-hf store pull`")
    return Path(os.path.expandvars(text)).expanduser()


@contextlib.contextmanager
def _connected(store: Path | str) -> Iterator[None]:
    """Within it a store on the Hub can be opened; what is fetched of it is not kept."""
    if isinstance(store, Path):
        yield
        return
    from mmaudio_hf.hub.stores import connect

    with tempfile.TemporaryDirectory() as folder, connect({store: 1.0}, folder, shutil.disk_usage(folder).free):
        yield


def _inspect(options: Namespace) -> None:
    from mmaudio_hf.data.tools import describe

    with _connected(options.store):
        info = describe(options.store)
    if options.json:
        print(json.dumps(info, ensure_ascii=False))
        return
    size, share = info["bytes"] / 1e9, info["bytes"] / info["reference_bytes"]
    print(f"{info['path']}: {info['rows']} rows, {info['layout']} layout, {size:.3g} GB", end="")
    print(f", {share:.1%} of the reference layout" if info["layout"] != "reference" else "")
    for name, column in info["columns"].items():
        shape = "x".join(map(str, column["shape"])) or "1"
        count, gigabytes = column["records"], column["bytes"] / 1e9
        print(f"  {name:14} {column['dtype']:9} {shape:10} {count:>9} rows {gigabytes:9.3g} GB")
    print(f"  {info['distinct_captions']} different captions, {info['repeated_ids']} rows repeat an id")
    if info["captions_with_several_texts"]:
        print(f"  {info['captions_with_several_texts']} captions have several text features: try verify --sample")
    if not info["manifest"]:
        print("  no manifest: encoders and preprocessing are not known")
    else:
        for key in ("mode", "duration", "normalisation", "preprocessing", "counts"):
            print(f"  {key}: {json.dumps(info[key])}")
        for name, encoder in info["encoders"].items():
            print(f"  encoder {name}: {encoder.get('id')} {str(encoder.get('fingerprint'))[:16]}")
        statistics = info["latent_statistics"]
        ranges = (f"{key} {min(values):.3f} to {max(values):.3f}" for key, values in statistics.items())
        print(f"  latent channels: {', '.join(ranges)}")
    for item_id, caption in info["first_rows"]:
        print(f"  {item_id}: {caption}")


def _audit(options: Namespace) -> None:
    from mmaudio_hf.data.store import FeatureStore
    from mmaudio_hf.evaluation.av_bench import AvBench
    from mmaudio_hf.evaluation.offsets import Comparison, StoreClips
    from mmaudio_hf.files import locked, write_text
    from mmaudio_hf.media.audit import audit_store, check_table
    from mmaudio_hf.pages.audit import write_page

    recipe, limits = load_recipe(options.recipe) if options.recipe else None, limits_of(options, SYNC_LIMITS)
    table = options.out or options.store.with_name(f"{options.store.name}.audit.parquet")
    check_table(table)
    with FeatureStore.open(options.store) as store:
        config, mode, duration = _encoders_of(store, recipe, options.store)
        _check_fingerprints(store.path, store.manifest or {}, config, mode, ("sync", "latent"))
        bench = AvBench.from_recipe(recipe) if recipe else AvBench("", Path(config.weights_dir))
        comparison = Comparison(config, mode, duration, bench, options.relevance, share_of_process(options))
        figures = measure_sync(StoreClips(store, comparison), comparison, table)
        captions = dict(zip(store.ids, store.captions, strict=True))
    if figures is None:
        return
    if options.relevance:
        print("imagebind_score is not measured: it needs the media, by `mmaudio-hf audit --relevance`")
    with locked(table.with_suffix(".lock")):
        report = audit_store(options.store, captions, table, limits, figures)
        page = write_page(table, table.with_suffix(".html"))
        if options.ok_ids:
            bad = set(report.bad_ids)
            write_text(options.ok_ids, "".join(f"{item_id}\n" for item_id in captions if item_id not in bad))
    show_audit(report, page, "rows compared")


def _check_fingerprints(path: Path, manifest: Mapping, config: EncoderConfig, mode: str, components: Sequence) -> None:
    """ValueError where an encoder is missing here, or is another one than that of the store."""
    from mmaudio_hf.features.encoders import check_encoders, fingerprints

    check_encoders(config, mode, components)
    for name, encoder in fingerprints(config, mode, components).items():
        stored = manifest.get("encoders", {}).get(name, encoder)
        if stored.get("fingerprint") != encoder["fingerprint"]:
            raise ValueError(f"{path} was made with {name} {stored}, here it is {encoder}: give --recipe, its recipe")


def _encoders_of(store: "FeatureStore", recipe: Recipe | None, path: Path) -> tuple[EncoderConfig, str, float]:
    """Encoders, mode and duration of a store, by its manifest or else the recipe; weights at their default paths."""
    manifest = store.manifest or {}
    mode = manifest.get("mode") or (recipe.model.mode if recipe else None)
    duration = manifest.get("duration") or (recipe.model.duration if recipe else None)
    if mode is None or duration is None or (recipe is None and not manifest.get("encoders")):
        raise ValueError(f"{path} does not say what made it: give --recipe, the recipe of the extraction")
    ids = [str(encoder.get("id")) for encoder in manifest.get("encoders", {}).values()]
    config = EncoderConfig(precision="bf16" if any(name.endswith("(bf16)") for name in ids) else "fp32")
    if any(name.startswith("toy_") for name in ids):
        config = EncoderConfig(kind="toy", weights_dir=str(path.parent))
    return recipe.encoders if recipe else config, mode, duration


def _convert(options: Namespace) -> None:
    from mmaudio_hf.data.tools import convert

    _print_summary(convert(options.source, options.target, options.layout, options.sync_dtype))


def _merge(options: Namespace) -> None:
    from mmaudio_hf.data.tools import merge

    _print_summary(merge(options.sources, options.out, skip_duplicates=options.skip_duplicates))


def _subset(options: Namespace) -> None:
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
            ids = set(options.ids.read_text(encoding="utf-8").split("\n")) - {""}
            if absent := sorted(ids - set(store.ids)):
                raise ValueError(f"{options.ids}: {len(absent)} ids are not in {store.path}, the first: {absent[0]!r}")
            rows = [row for row in rows if store.ids[row] in ids]
        rows = [row for row in rows if pattern.search(store.captions[row])]
    _print_summary(subset(options.source, options.target, rows))


def _row_range(text: str) -> slice:
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B")
    return slice(*(int(number) if number else None for number in match.groups()))


def _print_summary(store: "FeatureStore") -> None:
    print(f"{store.path}: {len(store)} rows, {store.layout} layout, {store.contents.size / 1e9:.3g} GB")
    store.close()


# --- the Hub -----------------------------------------------------------------------------------------------------


def _push(options: Namespace) -> None:
    if options.license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", options.license):
        raise ValueError(f"--license {options.license!r}: give it as the Hub names it, for example cc-by-4.0")
    if not 0 < options.part_size < 1e6:
        raise ValueError(f"--part-size {options.part_size:g} must be more than 0 and less than 1e6 MB")
    repo = repository_of(options.repo)
    from mmaudio_hf.files import readable
    from mmaudio_hf.hub import RepoContents
    from mmaudio_hf.hub.stores import plan_push, push_store

    contents = find_for_push(repo, options.dry_run, "dataset")
    size = sum(file.stat().st_size for file in options.store.glob("*.memmap"))
    with _bar("reading", size) as bar:
        chunk_bytes, card = int(options.part_size * 2**20), {"license": options.license, "source": options.source}
        plan = plan_push(options.store, repo, contents, chunk_bytes=chunk_bytes, progress=bar.update, **card)
    for name, stored in plan.columns.items():
        bytes_of_column = readable(stored.records * stored.column.row_bytes)
        new = sum(chunk.file in plan.missing for chunk in stored.chunks)
        print(f"  {name:14} {bytes_of_column:>10} in {len(stored.chunks)} chunks, {new} to send")
    print(f"{readable(plan.size)} in {len(plan.missing)} chunks to {repo}{', dry run' * options.dry_run}")
    if not options.dry_run:
        with _bar("sending", plan.size) as bar:
            commit = push_store(plan, repo, private=not options.public, progress=bar.update)
        print(f"{RepoContents(repo, commit, {}, 'dataset').url}: commit {commit}")


def _pull(options: Namespace) -> None:
    repo, revision = split_hub_id(options.repo)
    from mmaudio_hf.files import readable
    from mmaudio_hf.hub.stores import check_free, plan_pull, pull_store

    check_free(options.target)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / options.target.name if options.dry_run else options.target
        columns = None if options.columns is None else options.columns.split(",")
        plan = plan_pull(repo, target, revision=revision, columns=columns, rows=options.rows)
    for name, size in plan.sizes.items():
        print(f"  {name:14} {readable(size):>10}")
    size = sum(plan.sizes.values())
    print(f"rows {plan.rows.start} to {plan.rows.stop - 1} of {plan.whole.rows}, {readable(size)}", end="")
    print(f" to {options.target}{', dry run' * options.dry_run}")
    if not options.dry_run:
        with _bar("fetching", size) as bar:
            store = pull_store(plan, options.target, progress=bar.update)
        _print_summary(store)


def _bar(description: str, size: int) -> "tqdm":
    from huggingface_hub.utils import disable_progress_bars
    from tqdm import tqdm

    disable_progress_bars()  # its own would appear once for every chunk
    return tqdm(desc=description, total=size, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)


# --- verify ------------------------------------------------------------------------------------------------------


def _verify(options: Namespace) -> int:
    if (options.media or options.recipe) and not options.sample:
        raise ValueError("--media and --recipe say how rows are encoded again: give --sample N as well")
    if isinstance(options.store, str) and (options.media or options.recipe):
        raise ValueError(f"--media and --recipe are for stores on this machine: pull {options.store} first")
    from mmaudio_hf.data.tools import verify

    with _connected(options.store):
        reencode = _reencoder(options) if options.sample else None
        report = verify(options.store, sample=options.sample, reencode=reencode, seed=options.seed)
    for line in (*report.problems, *report.notes):
        print(line)
    print(f"{report.path}: {report.rows} rows, {'ok' if report.ok else f'{len(report.problems)} problems'}")
    return 0 if report.ok else 1


def _reencoder(options: Namespace) -> "Callable[[str, str], dict[str, torch.Tensor]]":
    """Encodes a row again: its text, and with --media its file, as the manifest or else the recipe says."""
    from mmaudio_hf.data.store import FeatureStore
    from mmaudio_hf.features.encoders import load_encoders
    from mmaudio_hf.media.container import MediaError

    recipe = load_recipe(options.recipe) if options.recipe else None
    with FeatureStore.open(options.store) as store:
        manifest, has_video = store.manifest or {}, store.has_video
        config, mode, duration = _encoders_of(store, recipe, options.store)
        if not store.has_text and options.media is None:
            raise ValueError(f"{store.path} has no text features: give --media to compare the rest")
    components = ["text"] if options.media is None else [*(["clip", "sync"] if has_video else []), "text", "latent"]
    _check_fingerprints(options.store, manifest, config, mode, components)
    encoders = load_encoders(config, mode, components, duration=duration)
    make_reader = _video_reader if has_video else _audio_reader
    read = make_reader(options, recipe, manifest, {"mode": mode, "duration": duration}) if options.media else None

    def reencode(item_id: str, caption: str) -> "dict[str, torch.Tensor]":
        features = {"text_features": encoders.encode_text([caption])[0]}
        if read is None:
            return features
        try:
            clip = read(item_id)
        except MediaError as error:
            raise RunError(str(error)) from error
        mean, std = encoders.encode_audio((clip.audio if has_video else clip)[None])
        features |= {"mean": mean[0], "std": std[0]}
        if has_video:
            features["clip_features"] = encoders.encode_clip(clip.clip_frames[None])[0]
            features["sync_features"] = encoders.encode_sync(clip.sync_frames[None])[0]
        return features

    return reencode


def _source_of(options: Namespace, recipe: Recipe | None, sources: Sequence) -> tuple[Any, Path]:
    """The source of the recipe that the store was made of, None without one, and its clip list."""
    source = next((source for source in sources if source.name == options.store.name), None)
    if recipe is None or source is None:
        return None, options.store.with_name(f"{options.store.name}.clips.tsv")
    return source, recipe.extraction.clips_path(source)


def _video_reader(
    options: Namespace, recipe: Recipe | None, manifest: Mapping[str, Any], settings: dict[str, Any]
) -> Callable[[str], Any]:
    from mmaudio_hf.files import read_json
    from mmaudio_hf.media.lists import VideoStart, find_video, read_video_clips
    from mmaudio_hf.media.video import read_video

    source, clips_file = _source_of(options, recipe, recipe.extraction.videos if recipe else ())
    if isinstance(stored := manifest.get("preprocessing"), dict):
        settings |= {name: stored[name] for name in ("alignment", "normalize_audio")}
    elif recipe is not None and source is not None:
        settings |= {"alignment": recipe.extraction.alignment, "normalize_audio": source.normalize_audio}
    else:
        way = "give --recipe with a source of its name"
        raise ValueError(f"{options.store} does not say how its videos were read: {way}")
    clips = {clip.id: clip for clip in read_video_clips(clips_file)} if clips_file.is_file() else {}  # of long videos
    offsets_file = Path(f"{options.store}.offsets.json")
    late, corrected = read_json(offsets_file), (manifest.get("counts") or {}).get("corrected", 0)
    if len(late) != corrected:
        raise ValueError(
            f"{offsets_file} is missing or damaged: it says by how much extraction shifted the audio of {corrected}"
            " rows; copy it from where the store was made"
        )

    def read(item_id: str) -> Any:
        listed = clips.get(item_id, VideoStart(item_id, item_id, 0.0))
        times = {"start": listed.start, "audio_offset": late.get(item_id, 0.0)}
        return read_video(find_video(options.media, listed.name), as_uint8=True, **times, **settings)

    return read


def _audio_reader(
    options: Namespace, recipe: Recipe | None, manifest: Mapping[str, Any], settings: dict[str, Any]
) -> Callable[[str], Any]:
    """Reads the waveform of a row; MediaError, RunError where the clip list does not have it."""
    from mmaudio_hf.media.audio import read_audio_clip
    from mmaudio_hf.media.lists import find_audio_file, read_clips

    _, clips_file = _source_of(options, recipe, recipe.extraction.audios if recipe else ())
    if not clips_file.is_file():
        raise ValueError(f"{clips_file} is missing: it says which samples of an audio file a row is; give --recipe")
    clips = {clip.id: clip for clip in read_clips(clips_file)}

    def read(item_id: str) -> Any:
        clip = clips.get(item_id) or clips.get(item_id.rpartition(".")[0])  # ID.2: the clip with its second caption
        if clip is None:
            raise RunError(f"{clips_file} has no clip {item_id!r}")
        span = settings | {"start_sample": clip.start_sample, "end_sample": clip.end_sample}
        return read_audio_clip(find_audio_file(options.media, clip.name), **span)

    return read
