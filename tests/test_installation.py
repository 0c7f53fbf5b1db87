"""A package of the same name over ours is named on import."""

import pathlib
import shutil
import subprocess
import sys

import hypergrad
from hypergrad._installation import foreign_files

PACKAGE = pathlib.Path(hypergrad.__file__).parent


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
