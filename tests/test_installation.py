"""A package of the same name over ours is named on import; the source distribution is complete."""

import pathlib
import shutil
import subprocess
import sys
import tarfile

import hypergrad
from hypergrad._installation import foreign_files

PACKAGE = pathlib.Path(hypergrad.__file__).parent
ROOT = pathlib.Path(__file__).parents[1]


def test_our_own_folder_holds_nothing_foreign():
    assert foreign_files(PACKAGE) == []


def test_foreign_files_are_named_on_import(tmp_path):
    """The files of PyPI's ``hypergrad`` that do not replace one of ours, and one that does."""
    copy = tmp_path / "hypergrad"
    shutil.copytree(PACKAGE, copy)
    for name in ("approx_hypergrad.py", "solver.py", "utils.py"):
        (copy / name).write_text("")
    (copy / "optimizers.py").write_text("import torch_is_not_here\n")
    code = "import warnings; warnings.simplefilter('error'); import hypergrad"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "found the files approx_hypergrad.py, solver.py, utils.py" in found.stderr
    assert "pip uninstall -y hypergrad hypergrad-jax" in found.stderr


def test_the_source_distribution_is_complete(tmp_path):
    """It holds every file of the repository that its own tests, examples and benchmarks read."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("hypergrad_jax-*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    assert {path for path in repository() if path not in held} <= {".gitignore"}


def repository():
    """Return the tracked files; in an unpacked source distribution, all files."""
    if (ROOT / ".git").exists():
        found = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
        return [name for name in found.stdout.splitlines() if (ROOT / name).exists()]
    made = {"__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache", ".mypy_cache", "PKG-INFO"}
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [path.as_posix() for path in files if not made & set(path.parts)]
