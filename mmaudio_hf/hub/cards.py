"""The model card of a run: what is known of the network, from the files of its run folder.

`write_card` puts it beside the weights whenever they are saved; `model_card` makes it once more for a push, with the
scores and samples there are by then. What only the machine knows that trained (its code, and under which licence the
weights stand that it started from) is read from the metadata of the first.
"""

import functools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData, RepoCard, try_to_load_from_cache

import mmaudio_hf
from mmaudio_hf.config import RELEASED_LICENSE, Recipe, is_released, load_recipe, to_dict
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
from mmaudio_hf.schema import check_id
from mmaudio_hf.weights import needed

SAMPLES_SHOWN = 4  # sounds that go into a repository: 8 s of 44.1 kHz are 0.7 MB, and so is the true one beside it
NOT_STATED = "not stated"
_WAVCAPS = "https://github.com/XinhaoMei/WavCaps"
_VGGSOUND = (
    "VGGSound",
    "https://www.robots.ox.ac.uk/~vgg/data/vggsound/",
    "labels CC BY 4.0; videos from YouTube",
)
# Store of the published recipes -> what it is made of, where that is, licence. Sounds and their captions differ in it.
PUBLISHED_SETS = {
    **dict.fromkeys(("vgg-train", "vgg-val", "vgg-test"), _VGGSOUND),
    "audiocaps": ("AudioCaps", "https://audiocaps.github.io/", "captions MIT; sounds from YouTube"),
    "audioset_sl": ("AudioSet SL of WavCaps", _WAVCAPS, "captions academic use only; sounds from YouTube"),
    "freesound": (
        "FreeSound of WavCaps",
        _WAVCAPS,
        "captions academic use only; sounds Creative Commons, each its own",
    ),
    "bbcsound": ("BBC Sound Effects of WavCaps", _WAVCAPS, "captions academic use only; sounds RemArc, non-commercial"),
    "clotho": (
        "Clotho",
        "https://zenodo.org/records/4783391",
        "captions non-commercial (Tampere University); sounds Creative Commons, each its own",
    ),
}


@dataclass(frozen=True)
class Start:
    """What a run started from: a model on the Hub ("": none known), its licence ("": not known), how people call it."""

    base_model: str = ""
    license: str = ""
    name: str = ""

    @property
    def released(self) -> bool:
        """Whether the weights come from the released ones, directly or not; their licence then goes on."""
        return self.base_model == RELEASED or self.license == RELEASED_LICENSE


@dataclass(frozen=True)
class CardSample:
    """A sound of the card. `files`: path in the repository -> file, of what was generated and of the true sound."""

    item_id: str
    caption: str
    files: dict[str, Path]


def model_card(
    run_dir: str | Path,
    *,
    pretrained: str | Path | None = None,
    repo_id: str = PLACEHOLDER,
    existing: str | None = None,
) -> str:
    """The card of the newest checkpoint of a run, for the repository `repo_id`.

    pretrained: the `pretrained_model` folder of another checkpoint of the run. existing: the card that is there; what
    does not come from here is kept (`merge_cards`). ValueError for a folder that is no run, or has no checkpoint,
    and for an existing card whose metadata cannot be read.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no config.yaml")
    recipe, folder = load_recipe(run_dir / "config.yaml"), find_pretrained(pretrained or run_dir)
    noted, samples = card_metadata(folder / CARD_FILE), run_samples(run_dir, folder)
    return merge_cards(existing, _card(recipe, run_dir, folder, noted, noted.get("mmaudio_hf"), repo_id, samples))


def write_card(recipe: Recipe, folder: Path, start: str = "") -> None:
    """Write the card of the network in `folder`, a `pretrained_model` of the run of `recipe`.

    start: the file the run was imported from, where the recipe does not tell.
    """
    noted = card_metadata(recipe.run_dir / "last" / "pretrained_model" / CARD_FILE)
    if start:
        noted = {"base_model": RELEASED, "license": RELEASED_LICENSE} if is_released(start) else {}
    text = _card(recipe, recipe.run_dir, folder, noted, code_version(), PLACEHOLDER, ())
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def add_card(folder: Path, run_dir: Path | None, repo_id: str, commit: str | None = None) -> None:
    """Put the card of the network in `folder` there, and the sounds it links, before these files go to `repo_id`.

    What people wrote into the card that is there at `commit` (None: now) is kept. run_dir: the run of the network;
    None: its own card has to do. Nothing happens where there is no network. ConnectionError or ValueError as of
    `hub_errors` and `model_card`.
    """
    card = folder / CARD_FILE
    if not (folder / WEIGHTS_FILE).is_file():
        return
    with hub_errors(repo_id):
        existing = download_card(repo_id, revision=commit)
    if run_dir is not None:
        text = model_card(run_dir, pretrained=folder, repo_id=repo_id, existing=existing)
        for place, file in ((p, f) for sample in run_samples(run_dir, folder) for p, f in sample.files.items()):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / place)
    elif card.is_file():
        text = merge_cards(existing, readdress(card.read_text(encoding="utf-8"), repo_id))
    else:
        text = merge_cards(existing, network_card(read_model_config(folder / CONFIG_FILE), repo_id))
    card.unlink(missing_ok=True)  # it may be a link to that of the checkpoint
    card.write_text(text, encoding="utf-8")


def run_samples(run_dir: str | Path, pretrained: str | Path | None = None) -> list[CardSample]:
    """The sounds that a run made last, at or before the step of its newest checkpoint (or that of `pretrained`).

    None where it made none. ValueError for an id that is no plain name.
    """
    run_dir = Path(run_dir)
    until = _weights(find_pretrained(pretrained or run_dir)).get("step", math.inf)
    folders = {int(f.name[5:]): f for f in run_dir.glob("samples/step_*") if re.fullmatch(r"step_\d+", f.name)}
    steps = [step for step in folders if step <= until]
    if not steps:
        return []
    folder, found = folders[max(steps)], []
    for row in json.loads((folder / "samples.json").read_text(encoding="utf-8"))[:SAMPLES_SHOWN]:
        item_id = check_id(row["id"], str(folder / "samples.json"))
        places = {f"samples/{item_id}.wav": folder, f"samples/reference/{item_id}.wav": run_dir / "samples/reference"}
        files = {place: source / f"{item_id}.wav" for place, source in places.items()}
        found.append(CardSample(item_id, row["caption"], {p: f for p, f in files.items() if f.is_file()}))
    return found


@functools.cache
def code_version() -> dict[str, str]:
    """Version of this package, and the commit when it is used out of a checkout."""
    root = Path(mmaudio_hf.__file__).parent.parent
    try:
        facts = {"version": version("mmaudio-hf")}
    except PackageNotFoundError:  # a checkout that is used without being installed
        facts = {"version": "unknown"}
    if (root / ".git").exists():
        try:
            facts["commit"] = _git(root, "rev-parse", "HEAD")
            if _git(root, "status", "--porcelain", "--", "mmaudio_hf"):
                facts["commit"] += " with changes"
        except (OSError, subprocess.SubprocessError):  # no git here: the version has to do
            pass
    return facts


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


# --- where weights come from -----------------------------------------------------------------------------------------


def _start(recipe: Recipe, noted: Mapping[str, Any]) -> Start:
    """What the recipe names as its start; where that is nothing or gone, what the card of the run has `noted`."""
    source = recipe.finetune.init_from
    try:
        known = _look_up(source) if source else None
    except (OSError, ValueError):
        known = None
    if known is None and noted.get("base_model"):
        known = Start(str(noted["base_model"]), str(noted.get("license") or ""))
    if known is None and hub_id(source) and not Path(source).parent.is_dir():
        known = Start(source, "", source)
    return known or Start(name=Path(source).name)


def _look_up(source: str, depth: int = 0) -> Start | None:
    """What can be found out here about trained weights; None: nothing. ValueError or OSError for a damaged folder."""
    path = Path(source)
    if is_released(path):
        return Start(RELEASED, RELEASED_LICENSE, path.name)
    adapter = path / "adapter_config.json"
    if adapter.is_file() and depth < 5:
        return _look_up(json.loads(adapter.read_text()).get("base_model_name_or_path") or "", depth + 1)
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
    """The licence as the Hub names it (None: not stated), and one sentence why."""
    if start.released:
        begun = f"`{start.name}`" if start.name else start.base_model
        return RELEASED_LICENSE, (
            f"CC-BY-NC 4.0. Training started from {begun}, and with it from MMAudio's released weights, which are"
            " under this licence."
        )
    if recipe.card.license:
        return recipe.card.license, f"{plain(recipe.card.license)}, as the author of the run states."
    if start.license:
        return start.license, f"{plain(start.license)}, the licence of the weights it started from."
    if recipe.encoders.kind == "released":
        return RELEASED_LICENSE, (
            "CC-BY-NC 4.0. The weights were trained from scratch, but on latents of MMAudio's released VAE, which is"
            " under this licence and which they need to make sound."
        )
    return None, f"The licence of the weights is {NOT_STATED}."


# --- the parts of the card -------------------------------------------------------------------------------------------


def _card(
    recipe: Recipe,
    run_dir: Path,
    folder: Path,
    noted: Mapping[str, Any],
    code: Any,
    repo_id: str,
    samples: Sequence[CardSample],
) -> str:
    weights, start = _weights(folder), _start(recipe, noted)
    licence, reason = _license(recipe, start)
    step = weights.get("step", recipe.training.steps)
    scores = [*_scores(run_dir / "metrics.jsonl", step), *_evaluated(run_dir / "evaluation", weights, recipe)]
    scores = list({score.what: score for score in scores}.values())  # the loop and the command score alike
    sources = [hub_id(source.source) for source in recipe.card.sources]
    data = ModelCardData(
        library_name="mmaudio_hf",
        pipeline_tag="text-to-audio",
        license=licence,
        base_model=start.base_model or None,
        datasets=sorted({source for source in sources if source}) or None,
        tags=list(TAGS),
        model_name=recipe.name,
        eval_results=[_result(recipe, score) for score in scores] or None,
        mmaudio_hf=code,
    )
    parts = [
        f"# {plain(recipe.name)}",
        describe_network(recipe.model),
        _facts(recipe, weights, step, start),
        usage(repo_id),
        _needs(recipe),
        f"## Data\n\n{_data_table(recipe)}",
        f"## Scores\n\n{_score_table(scores)}" if scores else "",
        f"## Samples\n\n{_sample_table(samples)}" if samples else "",
        f"## Licence\n\n{reason}{_encoder_licences(recipe)}",
        f"## Recipe\n\n{_recipe_block(recipe)}",
        f"Made with {_code_words(code)}.",
    ]
    return compose_card(data, "\n\n".join(part.strip() for part in parts if part))


def _weights(folder: Path) -> dict[str, Any]:
    """What weights.json says; nothing of a folder that has none, as those of converted files."""
    file = folder / "weights.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _facts(recipe: Recipe, weights: Mapping[str, Any], step: int, start: Start) -> str:
    kind = "raw weights"
    if weights.get("weights") == "ema":
        kind = f"post-hoc EMA of relative width {weights['sigma_rel']:g}"
    training = recipe.training
    lines = [
        f"- Weights: {kind}, as of step {step} of {training.steps} ({training.batch_size} samples each)",
        f"- Started from: {plain(start.name or start.base_model or 'random weights')}",
        f"- Encoders: {recipe.encoders.kind}; precision of training: {training.mixed_precision}",
    ]
    if recipe.encoders.kind == "toy":
        lines.append("- Toy encoders are those of the quick start: nobody should expect good sound of them")
    return "\n".join(lines)


def _needs(recipe: Recipe) -> str:
    names = [weight.path for weight in needed(recipe) if weight.what != "flow network"]
    if not names:
        return "Install `mmaudio_hf` first. The repository holds all that is needed."
    return (
        "Install `mmaudio_hf` first, and get the encoders and decoders once:\n\n"
        f"```bash\nmmaudio-hf weights download {' '.join(names)}\n```"
    )


def _data_table(recipe: Recipe) -> str:
    rows = []
    for split in ("train", "validation", "test"):
        for store in getattr(recipe.data, split):
            name = Path(store.path).name
            what, licence = _source(recipe, name)
            visits = f"{store.repeats:g}" if split == "train" else ""
            rows.append((plain(name), split, _row_count(store.path), visits, what, licence))
    head = "| store | split | rows | visits per epoch | source | licence |\n|---|---|---|---|---|---|\n"
    note = "\n\nLicences are as stated by their authors when this was written; those of single sounds may differ."
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows) + note


def _source(recipe: Recipe, name: str) -> tuple[str, str]:
    """What a store was made of and its licence, in Markdown: as the recipe says, else as is known of published sets."""
    for source in recipe.card.sources:
        if source.store == name:
            return linked(source.source) or NOT_STATED, plain(source.license) or NOT_STATED
    if name in PUBLISHED_SETS:
        what, url, licence = PUBLISHED_SETS[name]
        return f"[{plain(what)}]({url})", plain(licence)
    return NOT_STATED, NOT_STATED


def _row_count(path: str) -> str:
    try:
        return str(read_meta(Path(path)).rows)
    except (OSError, ValueError):
        return "?"  # the store is on another machine


@dataclass(frozen=True)
class _Score:
    """A number of metrics.jsonl. `what` says it in words, `step` is when."""

    name: str
    what: str
    value: float
    step: int
    unit: str = ""

    @property
    def split(self) -> str:
        """What was scored; empty: what the samples are of."""
        kind = self.name.partition("/")[0]
        return {"val": "validation", "val_ema": "validation"}.get(kind, kind.partition("_")[2])


def _scores(file: Path, until: int) -> list[_Score]:
    """First, last and best validation loss up to a step, and the last scores of evaluators."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break  # being written
    found: dict[str, list[tuple[float, int]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and line["step"] <= until and math.isfinite(value):
                found.setdefault(name, []).append((value, line["step"]))
    scores = []
    for name, words in (("val_ema/loss", "validation loss, averaged weights"), ("val/loss", "validation loss")):
        if series := found.get(name):
            best = min(series)
            scores += [_Score(name, f"{words}, last", *series[-1]), _Score(name, f"{words}, best", *best)]
    judged = [name for name in found if not name.startswith(("train/", "val/", "val_ema/"))]
    return scores + [_Score(name, _in_words(name), *found[name][-1]) for name in judged]


def _in_words(name: str) -> str:
    kind, _, score = name.partition("/")
    split = kind.partition("_")[2]
    return score.replace("_", " ") + (f", {split} split" if split else "")


def _evaluated(folder: Path, weights: Mapping[str, Any], recipe: Recipe) -> list[_Score]:
    """What `mmaudio-hf evaluate` or the end of training found of the very weights, with the settings of `recipe`.

    Damaged files are passed over.
    """
    scores = []
    for split in ("validation", "test"):
        try:
            content = json.loads((folder / f"{split}_step_{weights.get('step')}.json").read_text(encoding="utf-8"))
            if any(content["weights"].get(key) != weights.get(key) for key in ("weights", "sigma_rel", "step")):
                continue
            if content["settings"] != recipe.generation_settings:
                continue
            for name, found in content["scores"].items():
                if isinstance(found["value"], (int, float)):  # null: there was too little to compute it from
                    name = f"eval_{split}/{name}"
                    scores.append(_Score(name, _in_words(name), found["value"], weights["step"], found["unit"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return scores


def _result(recipe: Recipe, score: _Score) -> EvalResult:
    split = score.split or recipe.samples.split
    stores = "+".join(Path(store.path).name for store in getattr(recipe.data, split)) or split
    return EvalResult(
        task_type="text-to-audio",
        dataset_name=stores,
        dataset_type=stores,
        dataset_split=split,
        metric_type=score.name.partition("/")[2],
        metric_value=round(score.value, 6),
        metric_name=f"{score.what} (step {score.step})",
    )


def _score_table(scores: Sequence[_Score]) -> str:
    rows = [
        f"| {plain(score.what)} | {score.value:.4g} {plain(score.unit)}".rstrip() + f" | {score.step} |"
        for score in scores
    ]
    return "\n".join(("| score | value | step |", "|---|---|---|", *rows))


def _sample_table(samples: Sequence[CardSample]) -> str:
    rows = []
    for sample in samples:
        links = {path.count("/"): f"[listen]({quote(path)})" for path in sample.files}
        rows.append(f"| {plain(sample.caption)} | {links.get(1, '')} | {links.get(2, '')} |")
    table = ("| held-out caption | generated | true sound, decoded |", "|---|---|---|", *rows)
    return "\n".join(table)


def _encoder_licences(recipe: Recipe) -> str:
    if recipe.encoders.kind == "toy":
        return ""
    listed = dict.fromkeys(f"{weight.what}: {weight.licence}" for weight in needed(recipe))
    return f"\n\nWhat it works with has licences of its own. {'; '.join(plain(words) for words in listed)}."


def _recipe_block(recipe: Recipe) -> str:
    tree = to_dict(recipe)
    for place in ("output_dir", "resume", "extraction", "card", "hub"):  # of a machine, or said elsewhere in the card
        tree.pop(place, None)
    tree["encoders"].pop("weights_dir")
    for split in ("train", "validation", "test"):
        tree["data"][split] = [{**store, "path": Path(store["path"]).name} for store in tree["data"][split]]
    text = yaml.safe_dump(_without_paths(tree), sort_keys=False, allow_unicode=True)
    # Longer than any run of backticks in it: nothing ends the block early.
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return (
        "<details><summary>All settings; stores by name, without the paths of the machine</summary>\n\n"
        f"{fence}yaml\n{text}{fence}\n\n</details>"
    )


def _without_paths(value: Any) -> Any:
    """Plain values with paths that hold for one machine cut down to their last part."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or value.count("/") > 1):
        return Path(value).name
    return value


def _code_words(code: Any) -> str:
    facts = code if isinstance(code, dict) else {}
    commit = f", commit {plain(str(facts['commit']))}" if "commit" in facts else ""
    return f"mmaudio_hf {plain(str(facts.get('version', 'of an unknown version')))}{commit}"


# --- The card of a feature store on the Hub --------------------------------------------------------------------------


_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def store_card(path: str | Path, repo_id: str, *, license: str = "", source: str = "") -> str:
    """The card of the store at `path`. license, source: of the media it was made of; empty: as known of its name.

    Raises what `FeatureStore.open` raises.
    """
    facts = describe(path)
    name = Path(path).name
    data = DatasetCardData(
        license=license or None,
        task_categories=["text-to-audio"],
        tags=["mmaudio", "mmaudio_hf", "feature-store", "audio-features"],
        size_categories=[next((label for limit, label in _SIZES if facts["rows"] < limit), "n>10M")],
        pretty_name=name,
        configs=[{"config_name": "captions", "data_files": "table.tsv"}],  # for the page of the repository
        mmaudio_hf={"source": source} if source else None,
    )
    known = PUBLISHED_SETS.get(name)
    what = linked(source) if source or not known else f"[{plain(known[0])}]({known[1]})"
    licence = plain(license) or (plain(known[2]) if known else NOT_STATED)
    parts = [
        f"# {plain(name)}",
        "Features for training [MMAudio](https://arxiv.org/abs/2412.15322) networks with `mmaudio_hf`: latents of"
        " sounds, and what frozen encoders make of the videos and captions that go with them. No media are in it.",
        f"- Made of: {what or NOT_STATED}\n- Licence of the media: {licence}\n" + _store_metadata(facts),
        f"## Columns\n\n{_column_table(facts)}",
        f"## Encoders\n\n{_encoders(facts)}",
        _usage(repo_id, name, facts),
    ]
    return compose_card(data, "\n\n".join(parts))


def told(card: str | None) -> dict[str, str]:
    """License and source that a card of before states."""
    data = RepoCard(card, ignore_metadata_errors=True).data.to_dict() if card else {}
    ours = data.get("mmaudio_hf")
    stated = {"license": data.get("license"), "source": ours.get("source") if isinstance(ours, dict) else None}
    return {key: value for key, value in stated.items() if isinstance(value, str)}


def _store_metadata(facts: dict) -> str:
    lines = [f"- Rows: {facts['rows']}, {facts['distinct_captions']} different captions; {facts['layout']} layout"]
    if facts["mode"]:
        lines.append(f"- Sound: mode {plain(facts['mode'])}, {facts['duration']} s")
    for key in ("normalisation", "preprocessing", "counts"):
        if facts[key]:
            lines.append(f"- {key.capitalize()}: {plain(json.dumps(facts[key]))}")
    return "\n".join(lines)


def _column_table(facts: dict) -> str:
    rows = []
    for name, column in facts["columns"].items():
        shape = " x ".join(map(str, column["shape"])) or "1"
        rows.append(f"| `{name}` | {column['dtype']} | {shape} | {column['records']} | {column['bytes'] / 1e6:.1f} |")
    return "\n".join(("| column | type | shape of a record | records | MB |", "|---|---|---|---|---|", *rows))


def _encoders(facts: dict) -> str:
    if not facts["encoders"]:
        return "Not known: the store has no record of them."
    rows = [
        f"| {plain(name)} | {plain(str(encoder.get('id')))} | {plain(str(encoder.get('fingerprint')))} |"
        for name, encoder in facts["encoders"].items()
    ]
    note = (
        "\n\nA store trains only with others whose fingerprints are the same. The encoders have licences of their own."
    )
    return "\n".join(("| encoder | id | fingerprint |", "|---|---|---|", *rows)) + note


def _usage(repo_id: str, name: str, facts: dict) -> str:
    some = ",".join(column for column in facts["columns"] if column in ("mean", "std", "text_features"))
    return f"""## Use

Pull all of it, some of its columns, or some of its rows; every piece is checked as it arrives.

```bash
mmaudio-hf store pull {repo_id} data/{name}
mmaudio-hf store pull {repo_id} data/{name}_sound --columns {some}
mmaudio-hf store pull {repo_id} data/{name}_start --rows 0:{min(10, facts["rows"])}
mmaudio-hf verify data/{name}
```

Then name it in a recipe:

```yaml
data:
  train:
    - {{path: data/{name}}}
```"""
