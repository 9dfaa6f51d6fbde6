"""The card of a feature store on the Hub."""

import json
from pathlib import Path

from huggingface_hub import DatasetCardData, RepoCard

from mmaudio_hf.data.inspect import describe
from mmaudio_hf.hub.card import NOT_STATED, PUBLISHED_SETS
from mmaudio_hf.models.card import compose, linked, plain

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
        f"- Made of: {what or NOT_STATED}\n- Licence of the media: {licence}\n" + _facts(facts),
        f"## Columns\n\n{_column_table(facts)}",
        f"## Encoders\n\n{_encoders(facts)}",
        _usage(repo_id, name, facts),
    ]
    return compose(data, "\n\n".join(parts))


def told(card: str | None) -> dict[str, str]:
    """License and source that a card of before states."""
    data = RepoCard(card, ignore_metadata_errors=True).data.to_dict() if card else {}
    ours = data.get("mmaudio_hf")
    stated = {"license": data.get("license"), "source": ours.get("source") if isinstance(ours, dict) else None}
    return {key: value for key, value in stated.items() if isinstance(value, str)}


def _facts(facts: dict) -> str:
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
