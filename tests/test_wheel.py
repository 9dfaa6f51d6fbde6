"""The package as pip installs it: without the repository, in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Interpreter of an environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("mmaudio_hf", "recipes", "accelerate_configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    libraries = Path(sys.prefix) / "lib" / site.parent.name / "site-packages"
    (site / "libraries.pth").write_text(f"{libraries}\n")  # its own .pth files, of an editable install, are not read
    return folder / "env" / "bin" / "python"


def run(python: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([str(python), *words], cwd=cwd, env=variables, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_the_wheel_has_recipes_and_launch_configs(python, tmp_path):
    program = "import mmaudio_hf, pathlib; print(pathlib.Path(mmaudio_hf.__file__).parent)"
    package = Path(run(python, "-c", program, cwd=tmp_path).stdout.strip())
    assert not package.is_relative_to(ROOT)
    for folder in ("recipes", "accelerate_configs"):
        assert {path.name for path in (package / folder).iterdir()} == {path.name for path in (ROOT / folder).iterdir()}
    assert "mmaudio-hf 0." in run(python, "-m", "mmaudio_hf.cli", "--version", cwd=tmp_path).stdout


def test_the_example_runs_in_an_empty_folder(python, tmp_path):
    folder = tmp_path / "a folder"  # with a space
    folder.mkdir()
    short = ["training.steps=2", "training.batch_size=2", "sampling.num_steps=1", "training.validate_every=2"]
    result = run(python, "-m", "mmaudio_hf.cli", "example", "--short", *short, cwd=folder)
    assert "$ accelerate launch --config_file accelerate_configs/cpu.yaml -m mmaudio_hf.train" in result.stdout
    summary = json.loads(result.stdout.strip().splitlines()[-1].removeprefix("summary "))
    assert summary["val_loss_last"] > 0
    assert (folder / "output/example_short/report/index.html").is_file()
    assert (folder / "output/example_short/samples/first.mp4").stat().st_size > 1000
