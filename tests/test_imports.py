"""Who may import whom: the table of docs/design.md, walked over the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mmaudio_hf"

TABLE = re.compile(r"^\| ([\w, .]+) \| (.+?) \|$", re.MULTILINE)


def read_table() -> dict[str, set[str] | None]:
    """Package or module -> those it may import besides itself; None: everything. From docs/design.md."""
    section = (ROOT / "docs" / "design.md").read_text().split("## Imports")[1].split("\n## ")[0]
    rows = {}
    for names, allowed in TABLE.findall(section):
        packages = set(re.findall(r"\w+", re.sub(r"\(.*?\)", "", allowed)))
        rows |= dict.fromkeys(names.split(", "), None if "everything" in packages else packages - {"nothing"})
    return rows


ALLOWED = read_table() | {"__init__": None}


def package_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmaudio_hf":
            assert node.level == 0
            names = node.module.split(".")
            packages |= {names[1]} if len(names) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            packages |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mmaudio_hf.")}
    return packages


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_table(path):
    package = package_of(path)
    assert package in ALLOWED, f"{package} is not in the table of docs/design.md: say what it may import"
    if ALLOWED[package] is not None:
        assert imported_packages(path) <= ALLOWED[package] | {package}


@pytest.mark.parametrize(
    "imports",
    [
        {  # one after the other in one process
            "mmaudio_hf, mmaudio_hf.config": ["torch", "numpy"],
            "mmaudio_hf.hub": ["mmaudio_hf.data.loader", "mmaudio_hf.training", "av", "transformers"],
            "mmaudio_hf.training.loop": ["av", "torchaudio", "transformers", "datasets"],
        },
        {
            "mmaudio_hf.media.video, mmaudio_hf.media.lists, mmaudio_hf.media.example": [
                *("transformers", "datasets", "tensordict", "accelerate"),
            ],
        },
    ],
    ids=["training", "media"],
)
def test_what_a_module_must_not_load(imports):
    program = "import sys\n" + "\n".join(
        f"import {modules}; print('{modules}', [m for m in {unwanted} if m in sys.modules])"
        for modules, unwanted in imports.items()
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines() == [f"{modules} []" for modules in imports], result.stdout + result.stderr


def test_public_names_are_there():
    import mmaudio_hf

    for name in mmaudio_hf.__all__:
        assert getattr(mmaudio_hf, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = mmaudio_hf.Nothing
