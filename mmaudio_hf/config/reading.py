"""Read recipes: YAML files with bases, overrides from the command line, errors that name key, file and nearest key."""

import copy
import dataclasses
import difflib
import json
import math
import os
import re
import reprlib
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from mmaudio_hf.config.settings import VARIANTS, ModelConfig, Recipe, RecipeError, limit_words, nearest
from mmaudio_hf.schema import checked

COMMAND_LINE = "the command line"
_MERGE = "tag:yaml.org,2002:merge"

# Options of the reference implementation that people bring along, and ours: for messages alone.
REFERENCE_OPTIONS = (
    {"exp_id": "name", "vgg_oversample_rate": "data.train[].repeats", "ac_oversample_rate": "data.train[].repeats"}
    | {"num_iterations": "training.steps", "batch_size": "training.batch_size", "amp": "training.mixed_precision"}
    | {"weights": "finetune.init_from", "checkpoint": "resume", "num_workers": "data.read_threads"}
    | {"linear_warmup_steps": "optim.warmup_steps", "lr_schedule": "optim.schedule"}
    | {"lr_schedule_steps": "optim.milestones", "lr_schedule_gamma": "optim.gamma"}
    | {"clip_grad_norm": "optim.max_grad_norm", "null_condition_probability": "flow.condition_dropout"}
    | {"cfg_strength": "sampling.guidance_scale", "sampling.mean": "flow.time_mean"}
    | {"sampling.scale": "flow.time_scale", "sampling.min_sigma": "flow.min_sigma"}
    | {"sampling.method": "sampling.solver", "ema.checkpoint_every": "ema.snapshot_every"}
    | {"ema.default_output_sigma": "ema.sigma_rel", "log_text_interval": "training.log_every"}
    | {"val_interval": "training.validate_every", "eval_interval": "evaluation.every"}
    | {"eval_batch_size": "sampling.batch_size", "save_weights_interval": "training.checkpoint_every"}
    | {"save_checkpoint_interval": "training.checkpoint_every", "save_copy_iterations": "training.keep_every"}
)


@checked
def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, with its bases, then apply `key.sub=value` overrides.

    Raises RecipeError (a ValueError) naming the key, the file and the nearest valid name. Imports nothing heavy.
    """
    reader = _Reader(str(path))
    tree = reader.read(Path(path))
    # A variant brings its own sizes, so it comes before sizes that are named beside it.
    for override in sorted(overrides, key=lambda text: not text.startswith("model.variant=")):
        reader.override(tree, override)
    tree.setdefault("name", Path(path).stem)
    return reader.build(Recipe, tree, "")


@checked
def model_config(plain: Mapping[str, Any], source: str | Path) -> ModelConfig:
    """Configuration of a network from plain values, checked as in a recipe; `source` names their file in messages."""
    return _Reader(str(source)).build(ModelConfig, dict(plain), "")


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The JSON object, or the list of them, in a file that may be damaged or of others; ValueError naming the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # brackets nested a thousand times end the recursion
        raise ValueError(f"{path} is not valid JSON ({error}): it is damaged, get it again") from error
    wrong = isinstance(content, list) and any(not isinstance(entry, dict) for entry in content)
    if type(content) is not kind or wrong:
        expected = "object" if kind is dict else "list of objects"
        raise ValueError(f"{path} holds no JSON {expected}, but a {type(content).__name__}: get it again")
    return content


def read_json_lines(path: str | Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Entries of a log with one JSON object and its `step` per line ([] without the file), and the lines without.

    A kill cuts the last line short; a damaged disk may change any.
    """
    entries, damaged = [], []
    for line in Path(path).read_bytes().splitlines() if Path(path).is_file() else []:
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or type(entry.get("step")) is not int:
                raise ValueError("no entry")
            entries.append(entry)
        except (ValueError, RecursionError):
            damaged.append(line)
    return entries, damaged


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dict of a configuration, as it goes into YAML or JSON: lists in place of tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe; `load_recipe` on the result gives the same recipe."""
    text = yaml.dump(to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars, where `no`, `off` and 12:30 are text, 1e-4 is a number and 016 is 16; keys may not repeat."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  those of YAML 1.1 are left behind


class _Dumper(yaml.SafeDumper):
    """Quotes text that one of the two versions of YAML takes for something else."""

    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012


_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[\da-fA-F]+", [*"-+0123456789"]),
    ("float", rf"{_NUMBER.pattern}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+.0123456789"]),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    own: dict[Any, Any] = {}
    merged: dict[Any, Any] = {}  # of several mappings the first has precedence: some versions of PyYAML take the last
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(None, None, "<< needs a mapping", source.start_mark)
                merged = loader.construct_object(source, deep=True) | merged
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable) or key in own:
            problem = "is given twice" if isinstance(key, Hashable) else "must be text"
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} {problem}", node.start_mark)
        own[key] = loader.construct_object(value_node, deep=True)
    return {**merged, **own}


_BASES = {"0o": 0, "0x": 0}  # by the prefix of a number; of others 10, whatever zeros it begins with
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value, _BASES.get(node.value[:2], 10)))
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


# --- From YAML to settings --------------------------------------------------------------------------------------------


class _Reader:
    """Builds settings from plain values and knows for messages which file, or the command line, set a key."""

    def __init__(self, file: str):
        self.file = file
        self.origins: dict[str, str] = {}  # key -> file

    def origin(self, path: str) -> str:
        """The file that set the key `path`, or else the section it is in."""
        while path not in self.origins and "." in path:
            path = path.rpartition(".")[0]
        return self.origins.get(path, self.file)

    def error(self, path: str, problem: str) -> RecipeError:
        return RecipeError(f"{self.origin(path)}: {path}{problem}")

    def read(self, path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
        """Plain values of a file on top of those of its bases; `above`: the files whose base it is."""
        if not path.is_file():
            hint = "; the recipe comes before the overrides, as recipes/small_16k.yaml" if "=" in str(path) else ""
            hint = f"; that of a run is {path}/config.yaml" if (path / "config.yaml").is_file() else hint
            raise RecipeError(f"no recipe at {path}{f' (base of {above[-1]})' if above else hint}")
        if path.resolve() in above:
            names = " -> ".join(p.name for p in (*above, path))
            raise RecipeError(f"{path}: the bases form a circle: {names}")
        try:
            tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # of bytes, and numbers of too many digits
            raise RecipeError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(tree, dict):
            raise RecipeError(f"{path}: a recipe is a mapping of sections, this file holds {_kind(tree)}")
        merged: dict[str, Any] = {}
        if "base" in tree:
            if not isinstance(base := tree.pop("base"), str):
                raise RecipeError(f"{path}: base must be a file name, not {_kind(base)}")
            merged = self.read(path.parent / _expanded(base, f"{path}: base"), (*above, path.resolve()))
            merged.pop("name", None)  # an experiment never inherits the run folder of its base
        self.merge(merged, tree, "", str(path))
        return merged

    def override(self, tree: dict[str, Any], override: str) -> None:
        """Apply `key.sub=value`; `key.0.sub` or `key[0].sub` is an entry of a list, or a new one behind the last."""
        key, equals, text = override.partition("=")
        names = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
        if not equals or not all(names):
            raise RecipeError(f"override {override!r} is not of the form key.sub=value")
        if re.search(r"[\[\]]|.\+$|\.append$", ".".join(names)):
            raise RecipeError(f"override {override!r}: entries are KEY[0] and so on; that after the last is new")
        try:
            value = yaml.load(text.strip(), Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"override {override[:100]!r}: the value is not valid YAML: {error}") from error
        for name in reversed(names):
            value = {name: value}
        self.merge(tree, value, "", COMMAND_LINE)

    def merge(self, into: Any, tree: Mapping[str, Any], prefix: str, origin: str) -> None:
        """Set the keys of `tree` in `into`, a mapping, or from the command line a list; `prefix` is their section."""
        for key, value in sorted(tree.items(), key=lambda item: item[0] != "variant"):
            path = f"{prefix}{key}"
            self.origins[path] = origin
            # A new variant brings its own sizes: sizes that a base set for its variant must not survive.
            if path == "model.variant" and into.get("variant") != value:
                into.clear()
            index: Any = key
            if isinstance(into, list):
                if int(key) > len(into):
                    raise RecipeError(f"{origin}: the recipe has no entry {path}: the list has {len(into)}, from 0")
                index = int(key)
                into += [None] * (index == len(into))
            elif index not in into and origin == COMMAND_LINE and isinstance(value, dict):
                defaults = (key.default for key in all_keys() if key.path == path and isinstance(key.default, tuple))
                into[index] = list(next(defaults, ())) if _is_entry(value) else {}
            old = into[index] if isinstance(into, list) else into.get(index)
            if isinstance(value, dict) and (isinstance(old, dict) or (isinstance(old, list) and _is_entry(value))):
                into[index] = copy.copy(old)  # an alias (`*name`) is the same object in several places
                self.merge(into[index], value, f"{path}.", origin)
            else:
                into[index] = value

    def build(self, cls: Any, tree: Any, prefix: str) -> Any:
        section = prefix.rstrip(".")
        if not isinstance(tree, dict):
            is_variant = cls is ModelConfig and str(tree) in VARIANTS
            hint = f": write model.variant={tree}" if is_variant else _entry_hint(cls, tree)
            raise self.error(section, f" must be a mapping of keys, not {_kind(tree)}{hint}")
        fields, hints = {field.name: field for field in dataclasses.fields(cls)}, get_type_hints(cls)
        for key in tree:
            if key not in fields:
                path = f"{prefix}{key}"
                raise RecipeError(f"{self.origin(path)}: unknown key {path}: {_nearest_key(path, list(fields))}")
        for name, field in fields.items():
            reason = field.metadata.get("needed", "") if tree else ""
            if name not in tree and (reason or field.default is field.default_factory is dataclasses.MISSING):
                raise RecipeError(f"{self.origin(section)}: {prefix}{name} is missing{reason and f': {reason}'}")
        if cls is ModelConfig:  # sizes are on top of those of the variant
            variant = tree.get("variant", "small_16k")
            if not isinstance(variant, str) or variant not in VARIANTS:
                raise self.error("model.variant", f": unknown variant {variant!r}: {nearest(str(variant), VARIANTS)}")
            tree = {"variant": variant, **VARIANTS[variant], **tree}
        values = {}
        for key, value in tree.items():
            values[key] = self.convert(hints[key], value, f"{prefix}{key}")
            if fields[key].metadata.get("path"):
                where, value = f"{self.origin(f'{prefix}{key}')}: {prefix}{key}", values[key]
                many = isinstance(value, tuple)
                values[key] = tuple(_expanded(v, where) for v in value) if many else _expanded(value, where)
        try:
            return cls(**values)
        except ValueError as error:
            # An entry of a list has a key of its own: data.train.0.repeats.
            text = str(error).replace(f"{cls.key}.", prefix, 1) if cls.key else str(error)
            named = [name for name in re.findall(r"[a-z_]+(?:\.\w+)*", text) if name in self.origins]
            raise RecipeError(f"{self.origin(named[0] if named else section)}: {text}") from None

    def convert(self, hint: Any, value: Any, path: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return self.build(hint, value, f"{path}.")
        if get_origin(hint) is tuple:  # of any length, where the last argument is an ellipsis
            args = get_args(hint)
            if not isinstance(value, list | tuple):
                words = "" if isinstance(value, dict) or value is None else f": write [{_bare(value)}]"
                words = _entry_hint(args[0], value, "[]") if dataclasses.is_dataclass(args[0]) else words
                raise self.error(path, f" must be a list, not {_short(value)} ({_kind(value)}){words}")
            if args[-1] is not Ellipsis and len(value) != len(args):
                raise self.error(path, f" must have {len(args)} entries, not {len(value)}")
            return tuple(self.convert(args[0], entry, f"{path}.{i}") for i, entry in enumerate(value))
        if get_origin(hint) is Literal:
            options = get_args(hint)
            flag = _FLAGS.get(str(value).lower())
            if flag is not None and value not in options:  # YAML 1.1 has true and false for them, and tools write it
                value = next((word for word in (("on",) if flag else ("off", "no")) if word in options), value)
            if value not in options:
                raise self.error(path, f": {_short(value)} is not allowed: {nearest(str(value), map(str, options))}")
            return value
        if hint is bool and isinstance(value, str):
            value = _FLAGS.get(value.lower(), value)
        if hint is float and type(value) is int:
            return float(value)
        if hint is int and isinstance(value, float) and value.is_integer():
            return int(value)  # 3e5
        if type(value) is not hint or (hint is float and not math.isfinite(value)):  # `is`: a bool is an int
            quotes = ": put it in quotes" if hint is str and not isinstance(value, dict | list) else ""
            if hint in (int, float) and isinstance(value, str) and _NUMBER.fullmatch(value):
                quotes = ": leave out the quotes"
            raise self.error(path, f" must be {_TYPES[hint]}, not {_short(value)} ({_kind(value)}){quotes}")
        return value


def _entry_hint(cls: Any, value: Any, brackets: str = "") -> str:
    """How the list, or entry of one, is written in whose place there is text: what an entry needs is most often it."""
    names = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    entry = ", ".join(f"{name}: {_bare(value) if len(names) == 1 else '...'}" for name in names)
    return f": write {brackets[:1]}{{{entry}}}{brackets[1:]}" if names and isinstance(value, str) else ""


def _is_entry(value: Any) -> bool:
    """Whether the keys of an override are indices of a list."""
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)


def _expanded(path: str, where: str) -> str:
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~"):
        raise RecipeError(f"{where}: {path!r} names a user that this machine does not have: write the path")
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise RecipeError(f"{where}: the environment variable in {path!r} is not set: {unset[0]}")
    return expanded


def _nearest_key(path: str, names: Sequence[str]) -> str:
    """Nearest name in the same section, or else the full path of such a key in another section."""
    path = path.lstrip("+~-")  # prefixes of hydra, and of options
    if path == "base":
        return "a recipe names its base in its file"
    if path in {key.path for key in all_keys()}:
        return f"write {path.rpartition('.')[2]}: below {path.rpartition('.')[0]}:"
    if path == "example_train":
        return "the quick start is a recipe of its own, recipes/example.yaml"
    if path in REFERENCE_OPTIONS:
        return f"here it is called {REFERENCE_OPTIONS[path]}"
    key = path.rpartition(".")[2]
    if not difflib.get_close_matches(key, names, n=1, cutoff=0.75):
        elsewhere = [known.path for known in all_keys() if known.path.rpartition(".")[2] == key]
        if elsewhere:
            return f"did you mean {' or '.join(elsewhere)}?"
    return nearest(key, names)


# As YAML 1.1 has them, and people write them, whatever their case.
_FLAGS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


_REPR = reprlib.Repr()  # of values that may be large: aliases of aliases make millions of entries in a few lines
_REPR.maxstring, _REPR.maxother, _REPR.maxlevel = 200, 200, 3
_short = _REPR.repr


def _bare(value: Any) -> str:
    """The same without quotes."""
    return _short(value).strip("'")


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "true/false"}
    return names.get(type(value), type(value).__name__)


# --- The keys, for documentation --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe, for documentation; entries of lists have paths as `data.train[].path`."""

    path: str
    section: type
    hint: Any
    default: Any  # MISSING: the key must be given
    metadata: Mapping[str, Any]


def all_keys(cls: Any = Recipe, prefix: str = "") -> list[Key]:
    """Every key of a section and of the sections in it, in the order of the classes."""
    keys, hints = [], get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            keys += all_keys(hint, f"{path}.")
            continue
        keys.append(Key(path, cls, hint, field.default, field.metadata))
        if get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0]):
            keys += all_keys(get_args(hint)[0], f"{path}[].")
    return keys


def settings_text() -> str:
    """Every setting for the terminal (`--help-settings`)."""
    lines = []
    for key in all_keys():
        lines.append(f"{key.path}: {value_words(key)} (default: {default_words(key)})")
        lines += textwrap.wrap(key.metadata["description"], 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def value_words(key: Key) -> str:
    """Type and limits of a key."""

    def words(hint: Any) -> str:
        options = get_args(hint)
        if get_origin(hint) is Literal:
            return f"{', '.join(map(str, options[:-1]))} or {options[-1]}"
        if get_origin(hint) is tuple:
            return f"list of {'entries' if dataclasses.is_dataclass(options[0]) else words(options[0])}"
        return _TYPES[hint].removeprefix("a ")

    limits = limit_words(key.metadata["limits"])
    return f"{words(key.hint)}{limits and f', {limits}'}"


def default_words(key: Key) -> str:
    """Default of a key, as in YAML."""
    return "none" if key.default is dataclasses.MISSING else json.dumps(key.default, ensure_ascii=False)
