"""Write docs/settings.md and recipes/schema.json from the descriptions of the settings."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mmaudio_hf.config import Recipe
from mmaudio_hf.config.reading import all_keys, default_words, value_words
from mmaudio_hf.config.settings import LIMITS

ROOT = Path(__file__).parent.parent
INTRODUCTION = """\
Every key of a recipe, as `python train.py --help-settings` prints them. `python docs/settings.py` writes this page
and recipes/schema.json from the descriptions in `mmaudio_hf/config/settings.py`.

- `base: FILE` takes the settings of another recipe, relative to this one, and changes what differs.
- `section.key=value` on the command line changes a key once more; `data.train[0].repeats=2` that of an entry of a
  list, and `data.train[2].path=DIR` adds an entry behind the last. Otherwise lists are replaced as a whole.
- In paths `~` and environment variables (`$SCRATCH/features`) are expanded.
- YAML is read by the rules of version 1.2: `no` and `off` are text where a setting takes text, 1e-4 is a number and
  016 is 16.
- Editors with the YAML language server complete and check keys below
  `# yaml-language-server: $schema=schema.json`, as the recipes have it."""


def settings_page() -> str:
    """docs/settings.md."""
    lines = ["# Settings", "", INTRODUCTION, ""]
    for section, group in itertools.groupby(all_keys(), lambda key: key.path.rpartition(".")[0]):
        keys = list(group)
        description = (keys[0].section.__doc__ or "").partition("\n")[0]
        lines += [f"## {section or 'The recipe'}", "", description, "", "| key | values | default | meaning |"]
        lines += ["|---|---|---|---|"]
        for key in keys:
            cells = (f"`{key.path}`", value_words(key), default_words(key), key.metadata["description"])
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def json_schema(cls: Any = Recipe) -> dict[str, Any]:
    """JSON schema of a recipe, or of one of its sections, for editors."""
    properties, hints = {}, get_type_hints(cls)
    for field in dataclasses.fields(cls):
        properties[field.name] = _schema_of(hints[field.name], field.metadata)
    schema = {"type": "object", "description": cls.__doc__, "properties": properties, "additionalProperties": False}
    if cls is Recipe:  # whose name has a default of its own
        properties["base"] = {"type": "string", "description": "recipe whose settings this one changes"}
        return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Recipe of mmaudio-hf"} | schema
    required = [field.name for field in dataclasses.fields(cls) if field.default is field.default_factory]
    return schema | ({"required": required} if required else {})


def _schema_of(hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    if dataclasses.is_dataclass(hint):
        return json_schema(hint)
    described = {"description": metadata["description"]} if "description" in metadata else {}
    if get_origin(hint) is Literal:
        return described | {"enum": list(get_args(hint))}
    if get_origin(hint) is tuple:
        entry, *rest = get_args(hint)
        schema = described | {"type": "array", "items": _schema_of(entry, {"limits": metadata["limits"]})}
        if rest != [Ellipsis]:
            schema |= {"minItems": len(rest) + 1, "maxItems": len(rest) + 1}
        return schema | ({"uniqueItems": True} if metadata["unique"] else {})
    names = {int: "integer", float: "number", str: "string", bool: "boolean"}
    return (
        described
        | {"type": names[hint]}
        | {LIMITS[name][2]: limit for name, limit in metadata.get("limits", {}).items()}
    )


def generated_files() -> list[tuple[Path, str]]:
    """Each file and its content."""
    schema = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    return [(ROOT / "docs" / "settings.md", settings_page()), (ROOT / "recipes" / "schema.json", schema)]


if __name__ == "__main__":
    for path, content in generated_files():
        path.write_text(content)
