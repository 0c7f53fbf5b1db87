"""Sphinx: ``sphinx-build -W docs docs/_build``, after ``pip install -e ".[docs]"``."""

import pathlib
import shutil

import hypergrad

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The notebook of the examples is the first page to read; it is executed in the build.
shutil.copy(ROOT / "examples" / "quickstart.ipynb", ROOT / "docs" / "getting_started.ipynb")

project, author, release = "hypergrad", "The hypergrad authors", hypergrad.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", "hypergrad"
html_static_path: list[str] = []
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode, nb_execution_timeout, nb_execution_raise_on_error = "force", 120, True
nb_execution_excludepatterns = ["recipes.md", "results.md", "optimizers.md"]
autosummary_generate, autodoc_typehints = True, "none"
autodoc_default_options = {"members": False, "undoc-members": False}
napoleon_use_ivar, napoleon_use_rtype = True, False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
suppress_warnings = ["config.cache"]
