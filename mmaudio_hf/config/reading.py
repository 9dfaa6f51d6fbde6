"""Read recipes: YAML with bases, overrides from the command line, and messages that name key, file and nearest name."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mmaudio_hf.config.settings import VARIANTS, ModelConfig, Recipe, RecipeError, nearest

COMMAND_LINE = "the command line"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, with its bases, then apply `key.sub=value` overrides.

    Raises RecipeError (a ValueError) naming the key, the file and the nearest valid name. Imports nothing heavy.
    """
    origins: dict[str, str] = {}
    tree = _read_with_bases(Path(path), origins, ())
    # A variant brings its own sizes, so it comes before sizes that are named beside it.
    for override in sorted(overrides, key=lambda text: not text.startswith("model.variant=")):
        _apply_override(tree, override, origins)
    tree.setdefault("name", Path(path).stem)
    return _build(Recipe, tree, "", origins, str(path))


def model_config(fields: Mapping[str, Any], source: str | Path) -> ModelConfig:
    """Configuration of a network from plain values, checked as in a recipe; `source` names their file in messages."""
    return _build(ModelConfig, dict(fields), "", {}, str(source))


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dict of a configuration, as it goes into YAML or JSON."""
    plain = dataclasses.asdict(config)
    return _listed(plain)


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe; `load_recipe` on the result gives the same recipe."""
    Path(path).write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True))


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read_with_bases(path: Path, origins: dict[str, str], seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}{f' (base of {seen[-1]})' if seen else ''}")
    if path.resolve() in seen:
        raise RecipeError(f"{path}: the bases form a circle: {' -> '.join(p.name for p in (*seen, path.resolve()))}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this file holds {_kind(tree)}")
    base = tree.pop("base", None)
    merged: dict[str, Any] = {}
    if base is not None:
        if not isinstance(base, str):
            raise RecipeError(f"{path}: base must be a file name, not {_kind(base)}")
        merged = _read_with_bases(path.parent / base, origins, (*seen, path.resolve()))
        merged.pop("name", None)  # an experiment never inherits the run folder of its base
    _merge(merged, tree, "", str(path), origins)
    return merged


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key written twice in one mapping, which plain YAML resolves silently."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _merge(into: dict[str, Any], tree: Mapping, prefix: str, origin: str, origins: dict[str, str]) -> None:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        origins[path] = origin
        # A new variant brings its own sizes: sizes that a base set for its variant must not survive.
        if path == "model.variant" and into.get("variant") != value:
            into.clear()
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(
                into[key],
                dict(sorted(value.items(), key=lambda item: item[0] != "variant")),
                f"{path}.",
                origin,
                origins,
            )
        else:
            into[key] = value


def _apply_override(tree: dict[str, Any], override: str, origins: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r} is not of the form key.sub=value")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not valid YAML: {error}") from error
    parts = key.split(".")
    for index, part in reversed(list(enumerate(parts))):
        if part.isdigit():  # data.train.0.repeats=3 changes one entry of a list that the recipe has
            return _override_entry(tree, parts, index, value, override, origins)
    for part in reversed(parts):
        value = {part: value}
    _merge(tree, value, "", COMMAND_LINE, origins)
    return None


def _override_entry(tree, parts, index, value, override, origins) -> None:
    node: Any = tree
    for part in parts[: index + 1]:
        try:
            node = node[int(part)] if part.isdigit() else node[part]
        except (KeyError, IndexError, TypeError):
            raise RecipeError(
                f"override {override!r}: the recipe has no entry {'.'.join(parts[: index + 1])}"
            ) from None
    rest = parts[index + 1 :]
    if not rest or not isinstance(node, dict):
        raise RecipeError(
            f"override {override!r}: name a key of the entry, as in {'.'.join(parts[: index + 1])}.key=value"
        )
    for part in reversed(rest):
        value = {part: value}
    _merge(node, value, ".".join(parts[: index + 1]) + ".", COMMAND_LINE, origins)


def _build(cls: type, tree: Any, prefix: str, origins: dict[str, str], file: str) -> Any:
    """Make dataclass `cls` from a mapping, checking every name and type on the way."""
    where = _origin(prefix.rstrip("."), origins, file)
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: {prefix.rstrip('.')} must be a mapping of keys, not {_kind(tree)}")
    hints = get_type_hints(cls)
    for key in tree:
        if key not in hints:
            where = origins.get(f"{prefix}{key}", where)
            raise RecipeError(f"{where}: unknown key {prefix}{key}: {_nearest_key(str(key), hints, prefix)}")
    values = {}
    if cls is ModelConfig:
        tree = _with_variant(tree, origins, file)
    for key, value in tree.items():
        values[key] = _convert(hints[key], value, f"{prefix}{key}", origins, file)
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    for name in required:
        if name not in values:
            raise RecipeError(f"{where}: {prefix}{name} is missing")
    try:
        return cls(**values)
    except Exception as error:  # strict wraps the message of a failed check in its own error class
        cause = error.__cause__ or error
        names = re.findall(r"[a-z_]+\.[a-z_]+", str(cause))
        origin = next((origins[name] for name in names if name in origins), where)
        raise RecipeError(f"{origin}: {str(cause).strip()}") from None


def _with_variant(tree: dict[str, Any], origins: dict[str, str], file: str) -> dict[str, Any]:
    variant = tree.get("variant", "small_16k")
    if not isinstance(variant, str) or variant not in VARIANTS:
        where = _origin("model.variant", origins, file)
        raise RecipeError(f"{where}: model.variant: unknown variant {variant!r}: {nearest(str(variant), VARIANTS)}")
    return {"variant": variant, **VARIANTS[variant], **tree}


def _convert(hint: Any, value: Any, path: str, origins: dict[str, str], file: str) -> Any:
    where = f"{_origin(path, origins, file)}: {path}"
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{path}.", origins, file)
    if get_origin(hint) is tuple:
        return _convert_tuple(get_args(hint), value, path, origins, file)
    if get_origin(hint) is Literal:
        if value is False and "no" in get_args(hint):
            return "no"  # YAML 1.1 reads a bare `no` as false
        if value not in get_args(hint):
            options = [str(option) for option in get_args(hint)]
            raise RecipeError(f"{where}: {value!r} is not allowed: {nearest(str(value), options)}")
        return value
    if get_origin(hint) in (Union, UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        return _convert(next(a for a in get_args(hint) if a is not type(None)), value, path, origins, file)
    if hint is float:
        return _to_float(value, where)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not hint:  # `is`: a bool is an int to isinstance
        raise RecipeError(f"{where} must be {_wanted(hint)}, not {value!r} ({_kind(value)})")
    return value


def _to_float(value: Any, where: str) -> float:
    # PyYAML follows YAML 1.1, where 1e-4 (no dot) is a string.
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        raise RecipeError(f"{where} must be a number, not {value!r} ({_kind(value)})")
    return float(value)


def _convert_tuple(args: tuple, value: Any, path: str, origins: dict[str, str], file: str) -> tuple:
    where = f"{_origin(path, origins, file)}: {path}"
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"{where} must be a list, not {value!r} ({_kind(value)})")
    if args[-1] is not Ellipsis and len(value) != len(args):
        raise RecipeError(f"{where} must have {len(args)} entries, not {len(value)}")
    hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
    return tuple(
        _convert(h, v, f"{path}.{i}", origins, file) for i, (h, v) in enumerate(zip(hints, value, strict=True))
    )


def _origin(path: str, origins: dict[str, str], file: str) -> str:
    while path not in origins and "." in path:
        path = path.rpartition(".")[0]
    return origins.get(path, file)


def _nearest_key(key: str, hints: Mapping, prefix: str) -> str:
    """Nearest name in the same section, or else the full path of such a key in another section."""
    if difflib.get_close_matches(key, list(hints), n=1, cutoff=0.75):
        return nearest(key, hints)
    elsewhere = [path for path in _all_keys(Recipe) if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return nearest(key, hints)


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    found = []
    for name, hint in get_type_hints(cls).items():
        found += _all_keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [f"{prefix}{name}"]
    return found


def _wanted(hint: Any) -> str:
    names = {int: "a whole number", str: "text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "true/false"}
    return names.get(type(value), type(value).__name__)
