"""The shape of the package: how many modules, how long, and that README and docs/design.md know them all."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from mmaudio_hf.training.resume import CODE

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mmaudio_hf"
MODULES = sorted(PACKAGE.rglob("*.py"))

MAX_MODULES = 93
MAX_FUNCTION_LINES = 60
SMALL_LINES = 60  # a module below this that a single other one imports is a seam, or part of the other


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def importers() -> dict[str, set[str]]:
    """Module -> modules that import it, both as paths below the package."""
    users = defaultdict(set)
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmaudio_hf"):
                for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    file = ROOT / (module.replace(".", "/") + ".py")
                    if file.is_file() and file != path:
                        users[name_of(file)].add(name_of(path))
    return users


def test_there_are_few_modules():
    assert len(MODULES) <= MAX_MODULES, f"{len(MODULES)} modules: merge what is one thought"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_can_be_read_at_once(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION_LINES}
    assert not long, f"longer than {MAX_FUNCTION_LINES} lines: {long}"


def test_a_small_module_with_one_importer_is_a_seam():
    seams = (ROOT / "docs" / "design.md").read_text().split("## Seams")[1].split("\n## ")[0]
    for path, users in importers().items():
        if len((PACKAGE / path).read_text().splitlines()) < SMALL_LINES and len(users) == 1:
            assert f"`{path}`" in seams, f"{path} is imported by {users} alone: merge them, or say why it is apart"


def test_the_readme_names_every_module():
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("\n## ")[0]
    names = set(re.findall(r"[\w/]+\.py", tree))
    missing = [name_of(path) for path in MODULES if path.name not in names and not path.name.startswith("__")]
    assert not missing, f"README's tree does not name {missing}"
    known = {path.name for path in MODULES} | {"train.py"}
    assert not {name.rpartition("/")[2] for name in names} - known, "README's tree names modules that are gone"


def test_the_loop_stays_legible():
    """Its limits are those of a page that is read top to bottom."""
    path = PACKAGE / "training" / "loop.py"
    tree = ast.parse(path.read_text())
    statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in statements for alias in node.names}
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    attributes = {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}
    assert len(path.read_text().splitlines()) <= 400
    assert len(imported) <= 50, sorted(imported)
    assert len(attributes) <= 15, sorted(attributes)


def test_the_modules_of_which_a_run_keeps_hashes_exist():
    assert not [name for name in CODE if not (PACKAGE / name).is_file()]
