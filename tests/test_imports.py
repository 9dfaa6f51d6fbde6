"""Who may import whom: the table of docs/design.md, walked over the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mmaudio_hf"

# Part of the package -> parts it may import, besides itself. `cli` puts everything together; nobody imports it.
ALLOWED = {
    "schema": set(),
    "hub_client": set(),
    "config": {"schema"},
    "weights": {"schema", "config", "hub_client"},
    "media": {"schema", "config"},
    "features": {"schema", "config", "weights", "media"},
    "data": {"schema", "config"},
    "models": {"schema", "config", "weights", "hub_client"},
    "training": {"schema", "config", "weights", "data", "models"},
    "generation": {"schema", "config", "weights", "media", "features", "models"},
    "evaluation": {"schema", "config", "weights", "data", "media", "features", "models", "generation"},
    # Of data, what opens stores: see below.
    "hub": {"schema", "config", "weights", "hub_client", "data", "models"},
    "interop": {"schema", "config", "weights", "models", "training"},
    "pages": {"schema", "config", "data", "media", "features", "models", "generation", "evaluation"},
    "bench": {"schema", "config", "media", "features", "data", "models", "training", "generation"},
    "doctor": {"schema", "config", "data", "features", "models", "training", "evaluation", "hub", "weights"},
    "cli": None,
    "__init__": None,
}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmaudio_hf":
            assert node.level == 0
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mmaudio_hf.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_table(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} is not in the table: say what it may import"
    if ALLOWED[part] is not None:
        assert imported_parts(path) <= ALLOWED[part] | {part}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("mmaudio_hf", ["torch", "numpy"]),
        ("mmaudio_hf.config", ["torch", "numpy"]),
        ("mmaudio_hf.training.loop", ["av", "torchaudio", "transformers", "datasets"]),
        ("mmaudio_hf.media.video", ["transformers", "datasets", "tensordict"]),
        ("mmaudio_hf.hub", ["mmaudio_hf.data.loader", "mmaudio_hf.training", "av", "transformers"]),
    ],
)
def test_what_a_module_must_not_load(module, unwanted):
    program = f"import sys, {module}; print([m for m in {unwanted} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_public_names_are_there():
    import mmaudio_hf

    for name in mmaudio_hf.__all__:
        assert getattr(mmaudio_hf, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = mmaudio_hf.Nothing
