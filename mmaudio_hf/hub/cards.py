"""The cards of runs and feature stores on the Hub, made from their files.

`write_card` writes the model card beside the weights whenever they are saved; `model_card` makes it again for a push,
with the scores and samples that exist by then. What only the machine of the training knows (its code, and the licence
of the weights the run started from) is read from the metadata of the first.
"""

import contextlib
import functools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, DatasetCardData, EvalResult, ModelCardData, RepoCard, try_to_load_from_cache
from jinja2 import Environment, PackageLoader, StrictUndefined

import mmaudio_hf
from mmaudio_hf.config import RELEASED_LICENSE, Recipe, is_released, load_recipe, read_json, read_json_lines, to_dict
from mmaudio_hf.data.layout import read_meta
from mmaudio_hf.data.tools import describe
from mmaudio_hf.hub_client import (
    CARD_FILE,
    card_metadata,
    compose_card,
    download_card,
    hub_errors,
    hub_id,
    linked,
    merge_cards,
    plain,
)
from mmaudio_hf.models.pretrained import (
    CONFIG_FILE,
    PLACEHOLDER,
    RELEASED,
    TAGS,
    WEIGHTS_FILE,
    describe_network,
    find_pretrained,
    network_card,
    read_model_config,
    readdress,
    usage,
)
from mmaudio_hf.schema import AUDIO_COLUMNS, check_id
from mmaudio_hf.weights import needed

MAX_SAMPLES = 4  # in a repository: 8 s of 44.1 kHz are 0.7 MB, and so is the true audio beside them
NOT_STATED = "not stated"
_WAVCAPS, _ACADEMIC = "https://github.com/XinhaoMei/WavCaps", "captions academic use only; audio"
_VGGSOUND = ("VGGSound", "https://www.robots.ox.ac.uk/~vgg/data/vggsound/", "labels CC BY 4.0; videos from YouTube")
_CLOTHO = "captions non-commercial (Tampere University); audio Creative Commons, per file"
# Store of the published recipes -> what it is made from, where that is, licence: of captions and audio each.
PUBLISHED_SETS = dict.fromkeys(("vgg-train", "vgg-val", "vgg-test"), _VGGSOUND) | {
    "audiocaps": ("AudioCaps", "https://audiocaps.github.io/", "captions MIT; audio from YouTube"),
    "audioset_sl": ("AudioSet SL of WavCaps", _WAVCAPS, f"{_ACADEMIC} from YouTube"),
    "freesound": ("FreeSound of WavCaps", _WAVCAPS, f"{_ACADEMIC} Creative Commons, per file"),
    "bbcsound": ("BBC Sound Effects of WavCaps", _WAVCAPS, f"{_ACADEMIC} RemArc, non-commercial"),
    "clotho": ("Clotho", "https://zenodo.org/records/4783391", _CLOTHO),
}


@dataclass(frozen=True)
class Start:
    """What a run started from: a model on the Hub ("": none known), its licence ("": not known), its usual name."""

    base_model: str = ""
    license: str = ""
    name: str = ""

    @property
    def released(self) -> bool:
        """Whether the weights come from the released ones, directly or not; their licence then applies."""
        return self.base_model == RELEASED or self.license == RELEASED_LICENSE


@dataclass(frozen=True)
class CardSample:
    """An audio sample of the card. `files`: path in the repository -> file, of the generated and the true audio."""

    item_id: str
    caption: str
    files: dict[str, Path]


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("mmaudio_hf.hub"),
        autoescape=False,  # Markdown and not HTML: texts from files pass `plain`, which escapes both
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "json": json.dumps}
    return environment


def _compose(template: str, data: CardData, **values: Any) -> str:
    return compose_card(data, _templates().get_template(f"{template}.md.jinja").render(**values))


def _metadata(recipe: Recipe, start: Start, **more: Any) -> tuple[ModelCardData, str]:
    """Metadata of a card of a run's weights, and one sentence on their licence."""
    licence, reason = _license(recipe, start)
    more |= {"license": licence, "base_model": start.base_model or None, "model_name": recipe.name}
    return ModelCardData(pipeline_tag="text-to-audio", **more), reason


def model_card(
    run_dir: str | Path,
    *,
    pretrained: str | Path | None = None,
    repo_id: str = PLACEHOLDER,
    existing: str | None = None,
    samples: bool = False,
) -> str:
    """The card of the newest checkpoint of a run, for the repository `repo_id`.

    pretrained: the `pretrained_model` folder of another checkpoint of the run. existing: the card that is there; what
    others wrote is kept (`merge_cards`). samples: with captions of the user's data and links to audio, see
    `run_samples`. ValueError for a folder that is no run, or has no checkpoint, and for an existing card whose metadata
    cannot be read.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no config.yaml")
    recipe, folder = load_recipe(run_dir / "config.yaml"), find_pretrained(pretrained or run_dir)
    known, shown = card_metadata(folder / CARD_FILE), run_samples(run_dir, folder) if samples else []
    return merge_cards(existing, _card(recipe, run_dir, folder, known, known.get("mmaudio_hf"), repo_id, shown))


def write_card(recipe: Recipe, folder: Path, start: str = "") -> None:
    """Write the card of the model in `folder`, a `pretrained_model` of the run of `recipe`.

    start: the file that the run was imported from, where the recipe does not name it.
    """
    known = card_metadata(recipe.run_dir / "last" / "pretrained_model" / CARD_FILE)
    if start:
        known = {"base_model": RELEASED, "license": RELEASED_LICENSE} if is_released(start) else {}
    text = _card(recipe, recipe.run_dir, folder, known, code_version(), PLACEHOLDER, ())
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    adapter = folder.with_name("adapter")
    if (adapter / "adapter_config.json").is_file():
        (adapter / CARD_FILE).write_text(_adapter_card(recipe, adapter, _start(recipe, known)), encoding="utf-8")


def _adapter_card(recipe: Recipe, folder: Path, start: Start) -> str:
    """The card of an adapter folder: what it is, the base it needs, and how it is used."""
    config = read_json(folder / "adapter_config.json")
    data, reason = _metadata(recipe, start, library_name="peft", tags=[*TAGS, "lora"])
    return _compose(
        "adapter_card",
        data,
        name=recipe.name,
        kind="DoRA" if config["use_dora"] else "LoRA",
        ranks=sorted({config["r"], *config["rank_pattern"].values()}),
        layers=len(config["target_modules"]),
        variant=recipe.model.variant,
        base=start.name or Path(recipe.finetune.init_from).name,
        licence_reason=reason,
    )


def add_card(folder: Path, run_dir: Path | None, repo_id: str, commit: str | None, samples: bool = False) -> None:
    """Write the card of the model in `folder`, before these files go to `repo_id`; with `samples` also what it links.

    What people wrote into the card that is there at `commit` is kept; None: there is no repository yet. run_dir: the
    run of the model; None: its own card is used. Without weights in `folder` nothing happens. ConnectionError or
    ValueError from `hub_errors` and `model_card`.
    """
    card = folder / CARD_FILE
    if not (folder / WEIGHTS_FILE).is_file():
        return
    existing = None
    if commit is not None:
        with hub_errors(repo_id):
            existing = download_card(repo_id, revision=commit)
    if run_dir is not None:
        text = model_card(run_dir, pretrained=folder, repo_id=repo_id, existing=existing, samples=samples)
        for sample in run_samples(run_dir, folder) if samples else ():
            for name, file in sample.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / name)
    elif card.is_file():
        text = merge_cards(existing, readdress(card.read_text(encoding="utf-8"), repo_id))
    else:
        text = merge_cards(existing, network_card(read_model_config(folder / CONFIG_FILE), repo_id))
    card.unlink(missing_ok=True)  # it may be a link to that of the checkpoint
    card.write_text(text, encoding="utf-8")


def run_samples(run_dir: str | Path, pretrained: str | Path | None = None) -> list[CardSample]:
    """The newest samples of a run, at or before the step of its newest checkpoint (or that of `pretrained`).

    [] where it has none. ValueError for an id that is no plain name.
    """
    run_dir = Path(run_dir)
    until = _weights(find_pretrained(pretrained or run_dir)).get("step", math.inf)
    folders = {int(f.name[5:]): f for f in run_dir.glob("samples/step_*") if re.fullmatch(r"step_\d+", f.name)}
    steps = [step for step in folders if step <= until]
    if not steps:
        return []
    folder, samples = folders[max(steps)], []
    # Prompts and videos of the user's own, which have no true audio to score against, come first.
    for row in sorted(read_json(folder / "samples.json", list), key=lambda row: "scores" in row)[:MAX_SAMPLES]:
        item_id = check_id(row["id"], str(folder / "samples.json"))
        sources = {"samples": folder, "samples/reference": run_dir / "samples/reference"}
        files = {f"{name}/{item_id}.wav": source / f"{item_id}.wav" for name, source in sources.items()}
        samples.append(CardSample(item_id, row["caption"], {n: f for n, f in files.items() if f.is_file()}))
    return samples


@functools.cache
def code_version() -> dict[str, str]:
    """Version of this package, and the commit when it is used out of a checkout."""
    root = Path(mmaudio_hf.__file__).parent.parent
    try:
        code = {"version": version("mmaudio-hf")}
    except PackageNotFoundError:  # a checkout that is used without being installed
        code = {"version": "unknown"}
    git = ["git", "-C", str(root)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no checkout, or no git: the version has to do
        if (root / ".git").exists():
            commands = ([*git, "rev-parse", "HEAD"], [*git, "status", "--porcelain", "--", "mmaudio_hf"])
            options: Any = {"capture_output": True, "text": True, "check": True, "timeout": 20}
            commit, changes = (subprocess.run(words, **options).stdout.strip() for words in commands)
            code["commit"] = commit + (" with changes" if changes else "")
    return code


# --- where weights come from -----------------------------------------------------------------------------------------


def _start(recipe: Recipe, known: Mapping[str, Any]) -> Start:
    """What the recipe names as its start; if that is nothing or gone, what the card of the run says (`known`)."""
    source = recipe.finetune.init_from
    try:
        start = _look_up(source) if source else None
    except (OSError, ValueError):
        start = None
    if start is None and known.get("base_model"):
        start = Start(str(known["base_model"]), str(known.get("license") or ""))
    if start is None and hub_id(source) and not Path(source).parent.is_dir():
        start = Start(source, "", source)
    return start or Start(name=Path(source).name)


def _look_up(source: str, depth: int = 0) -> Start | None:
    """What local files say of trained weights; None: nothing. ValueError or OSError for a damaged folder."""
    path = Path(source)
    if is_released(path):
        return Start(RELEASED, RELEASED_LICENSE, path.name)
    adapter = path / "adapter_config.json"
    if adapter.is_file() and depth < 5:
        return _look_up(read_json(adapter).get("base_model_name_or_path") or "", depth + 1)
    if path.is_dir():
        metadata = card_metadata(find_pretrained(path) / CARD_FILE)
        base = metadata.get("base_model")
        return Start(base if isinstance(base, str) else "", str(metadata.get("license") or ""), path.resolve().name)
    repo_id, _, revision = source.removeprefix("hub://").partition("@")
    card = try_to_load_from_cache(repo_id, CARD_FILE, revision=revision or None) if hub_id(repo_id) else None
    if not isinstance(card, str):
        return None
    metadata = card_metadata(Path(card))
    released = RELEASED in str(metadata.get("base_model"))
    return Start(repo_id, RELEASED_LICENSE if released else str(metadata.get("license") or ""), repo_id)


def _license(recipe: Recipe, start: Start) -> tuple[str | None, str]:
    """The licence by its name on the Hub (None: not stated), and one sentence why."""
    if start.released:
        origin = f"`{start.name}`" if start.name else start.base_model
        return RELEASED_LICENSE, (
            f"CC-BY-NC 4.0. Training started from {origin}, and with it from MMAudio's released weights, which are"
            " under this licence."
        )
    if recipe.card.license:
        return recipe.card.license, f"{plain(recipe.card.license)}, as the author of the run states."
    if start.license:
        return start.license, f"{plain(start.license)}, the licence of the weights it started from."
    if recipe.encoders.kind == "released":
        return RELEASED_LICENSE, (
            "CC-BY-NC 4.0. The weights were trained from scratch, but on latents of MMAudio's released VAE, which is"
            " under this licence and which they need to generate audio."
        )
    return None, f"The licence of the weights is {NOT_STATED}."


# --- the sections of the card ----------------------------------------------------------------------------------------


def _card(
    recipe: Recipe,
    run_dir: Path,
    folder: Path,
    known: Mapping[str, Any],
    code: Any,
    repo_id: str,
    samples: Sequence[CardSample],
) -> str:
    weights, start, settings = _weights(folder), _start(recipe, known), _settings(recipe)
    step = weights.get("step", recipe.training.steps)
    scores = [*_logged_scores(run_dir / "metrics.jsonl", step), *_evaluated(run_dir / "evaluation", weights, recipe)]
    scores = list({score.title: score for score in scores}.values())  # training and `evaluate` may compute the same
    sources = {hub_id(source.source) for source in recipe.card.sources} - {"", None}
    results = [_result(recipe, score) for score in scores]
    more = {"datasets": sorted(sources) or None, "eval_results": results or None, "mmaudio_hf": code}
    data, reason = _metadata(recipe, start, library_name="mmaudio_hf", tags=list(TAGS), **more)
    return _compose(
        "model_card",
        data,
        recipe=recipe,
        network=describe_network(recipe.model),
        sigma_rel=weights["sigma_rel"] if weights.get("weights") == "ema" else None,
        step=step,
        start=start,
        usage=usage(repo_id),
        weights=needed(recipe),
        stores=list(_store_rows(recipe)),
        scores=scores,
        samples=samples,
        licence_reason=reason,
        encoder_licences=dict.fromkeys(f"{weight.what}: {weight.licence}" for weight in needed(recipe)),
        settings=settings,
        # Longer than any run of backticks in the settings, so that nothing in them ends the block.
        fence="`" * max(3, 1 + max(map(len, re.findall(r"`+", settings)), default=0)),
        code=code,
    )


def _weights(folder: Path) -> dict[str, Any]:
    """Content of weights.json; {} for a folder without, as those of converted files."""
    file = folder / "weights.json"
    return read_json(file) if file.is_file() else {}


def _store_rows(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """Cells of the table of stores, as Markdown."""
    for split in ("train", "validation", "test"):
        for store in getattr(recipe.data, split):
            name = Path(store.path).name
            try:
                rows = str(read_meta(Path(store.path)).rows)
            except (OSError, ValueError):
                rows = "?"  # the store is on another machine
            visits = f"{store.repeats:g}" if split == "train" else ""
            origin = _published_origin(name)
            if source := next((source for source in recipe.card.sources if source.store == name), None):
                origin = linked(source.source) or NOT_STATED, plain(source.license) or NOT_STATED
            yield plain(name), split, rows, visits, *origin


def _published_origin(name: str) -> tuple[str, str]:
    """What a store was made from and its licence, in Markdown, as known of published sets."""
    if name not in PUBLISHED_SETS:
        return NOT_STATED, NOT_STATED
    title, url, licence = PUBLISHED_SETS[name]
    return f"[{plain(title)}]({url})", plain(licence)


@dataclass(frozen=True)
class _Score:
    """A figure of metrics.jsonl or of an evaluation, at `step`."""

    name: str
    title: str
    value: float
    step: int
    unit: str = ""

    @property
    def split(self) -> str:
        """The split that was scored; empty: that of the samples."""
        kind = self.name.partition("/")[0]
        return {"val": "validation", "val_ema": "validation"}.get(kind, kind.partition("_")[2])


def _logged_scores(file: Path, until: int) -> list[_Score]:
    """Last and best validation loss up to a step, and the last scores of evaluators."""
    series: dict[str, list[tuple[float, int]]] = {}
    for entry in read_json_lines(file)[0]:
        for name, value in entry.items():
            if name != "step" and entry["step"] <= until and value is not None and math.isfinite(value):
                series.setdefault(name, []).append((value, entry["step"]))
    scores = []
    for name, title in (("val_ema/loss", "validation loss, EMA weights"), ("val/loss", "validation loss")):
        if points := series.get(name):
            scores += [_Score(name, f"{title}, last", *points[-1]), _Score(name, f"{title}, best", *min(points))]
    evaluated = [name for name in series if not name.startswith(("train/", "val/", "val_ema/"))]
    return scores + [_Score(name, _score_title(name), *series[name][-1]) for name in evaluated]


def _score_title(name: str) -> str:
    kind, _, score = name.partition("/")
    split = kind.partition("_")[2]
    return score.replace("_", " ") + (f", {split} split" if split else "")


def _evaluated(folder: Path, weights: Mapping[str, Any], recipe: Recipe) -> list[_Score]:
    """Scores of exactly these weights with the settings of `recipe`, by `mmaudio-hf evaluate` or the end of training.

    Damaged files are ignored.
    """
    scores = []
    for split in ("validation", "test"):
        try:
            content = json.loads((folder / f"{split}_step_{weights.get('step')}.json").read_text(encoding="utf-8"))
            if any(content["weights"].get(key) != weights.get(key) for key in ("weights", "sigma_rel", "step")):
                continue
            if content["settings"] != recipe.generation_settings:
                continue
            for score, entry in content["scores"].items():
                if isinstance(entry["value"], (int, float)):  # null: there was too little to compute it from
                    name = f"eval_{split}/{score}"
                    scores.append(_Score(name, _score_title(name), entry["value"], weights["step"], entry["unit"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return scores


def _result(recipe: Recipe, score: _Score) -> EvalResult:
    split = score.split or recipe.samples.split
    stores = "+".join(Path(store.path).name for store in getattr(recipe.data, split)) or split
    metric: Any = {"metric_type": score.name.partition("/")[2], "metric_name": f"{score.title} (step {score.step})"}
    data: Any = {"dataset_name": stores, "dataset_type": stores, "dataset_split": split}
    return EvalResult(task_type="text-to-audio", metric_value=round(score.value, 6), **metric, **data)


def _settings(recipe: Recipe) -> str:
    """The recipe as YAML, without what belongs to a machine or is said elsewhere in the card."""
    tree = to_dict(recipe)
    for key in ("output_dir", "resume", "extraction", "card", "hub"):
        tree.pop(key, None)
    tree["encoders"].pop("weights_dir")
    for split in ("train", "validation", "test"):
        tree["data"][split] = [{**store, "path": Path(store["path"]).name} for store in tree["data"][split]]
    return yaml.safe_dump(_without_paths(tree), sort_keys=False, allow_unicode=True).rstrip("\n")


def _without_paths(value: Any) -> Any:
    """Plain values with paths of one machine reduced to their last component."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or value.count("/") > 1):
        return Path(value).name
    return value


# --- the card of a feature store -------------------------------------------------------------------------------------


_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def store_card(path: str | Path, repo_id: str, *, license: str = "", source: str = "") -> str:
    """The card of the store at `path`. license, source: of its media; empty: as known by its name.

    Raises what `FeatureStore.open` raises.
    """
    store, name = describe(path), Path(path).name
    data = DatasetCardData(
        license=license or None,
        task_categories=["text-to-audio"],
        tags=["mmaudio", "mmaudio_hf", "feature-store", "audio-features"],
        size_categories=[next((label for limit, label in _SIZES if store["rows"] < limit), "n>10M")],
        pretty_name=name,
        configs=[{"config_name": "captions", "data_files": "table.tsv"}],  # for the page of the repository
        mmaudio_hf={"source": source} if source else None,
    )
    known_origin, known_licence = _published_origin(name)
    return _compose(
        "store_card",
        data,
        store=store,
        name=name,
        repo_id=repo_id,
        origin=linked(source) if source else known_origin,
        licence=plain(license) or known_licence,
        audio_columns=[column for column in store["columns"] if column in AUDIO_COLUMNS],
    )


def stated_origin(card: str | None) -> dict[str, str]:
    """License and source that an earlier card states."""
    data = RepoCard(card, ignore_metadata_errors=True).data.to_dict() if card else {}
    ours = data.get("mmaudio_hf")
    stated = {"license": data.get("license"), "source": ours.get("source") if isinstance(ours, dict) else None}
    return {key: value for key, value in stated.items() if isinstance(value, str)}
