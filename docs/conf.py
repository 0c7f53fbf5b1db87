"""Sphinx: ``sphinx-build -W docs docs/_build``, after ``pip install -e ".[docs]"``."""

import ast
import pathlib
import re
import shutil
from typing import Any

import hypergrad

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The notebook of the examples is the first page to read; it is executed in the build.
shutil.copy(ROOT / "examples" / "quickstart.ipynb", ROOT / "docs" / "getting_started.ipynb")


def messages() -> str:
    """Return the page of all error messages: what was expected, and what to do, from the calls in the source."""

    def text(node: ast.expr, names: dict[str, ast.expr]) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part, names) for part in node.values)
        if isinstance(node, ast.Name) and node.id in names:
            return text(names[node.id], {})
        return "…"

    rows = set()
    for path in sorted((ROOT / "hypergrad").rglob("*.py")):
        for scope in ast.walk(ast.parse(path.read_text())):
            if not isinstance(scope, ast.FunctionDef):
                continue
            assigned = [node for node in ast.walk(scope) if isinstance(node, ast.Assign)]
            for node in ast.walk(scope):
                if (
                    not isinstance(node, ast.Call)
                    or ast.unparse(node.func) != "validate.message"
                    or len(node.args) != 3
                ):
                    continue
                names: dict[str, ast.expr] = {}
                for before in sorted(assigned, key=lambda a: a.lineno):  # the last assignment before the call counts
                    if before.lineno <= node.lineno:
                        target, value = before.targets[0], before.value
                        both = (
                            zip(target.elts, value.elts, strict=False)
                            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                            else [(target, value)]
                        )
                        names |= {t.id: v for t, v in both if isinstance(t, ast.Name)}
                expected, fix = text(node.args[0], names), text(node.args[2], names)
                if expected != "…":
                    rows.add((expected.replace("|", "¦"), fix.replace("|", "¦")))
    lines = "\n".join(f"| {expected} | {fix} |" for expected, fix in sorted(rows))
    head = "# All messages\n\nFrom the source of this version; … stands for a value."
    return f"{head}\n\n| expected | what to do |\n|---|---|\n{lines}\n"


(ROOT / "docs" / "messages.md").write_text("---\norphan: true\n---\n\n" + messages())

project, author, release = "hypergrad", "The hypergrad authors", hypergrad.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns, templates_path = ["_build", "_templates"], ["_templates"]
html_theme, html_title, html_show_copyright = "furo", "hypergrad", False
html_static_path, html_css_files = ["_static"], ["wide.css"]
napoleon_custom_sections = ["Returns", "Yields"]  # sentences: what stands before a colon is no type
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode, nb_execution_timeout, nb_execution_raise_on_error = "force", 120, True
nb_execution_excludepatterns = ["guides/*.md", "results.md", "optimizers.md"]
autosummary_generate, autodoc_typehints = True, "none"
autodoc_default_options = {"members": False, "undoc-members": False}
napoleon_use_ivar, napoleon_use_rtype = True, False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
suppress_warnings = ["config.cache"]


def in_repository(_app: Any, name: str, source: list[str]) -> None:
    """Name files outside of this folder instead of linking to them: they are no pages of the site."""
    root = "../" * (name.count("/") + 1)
    text = source[0].replace(f"]({root}docs/", f"]({root[3:]}")  # from the notebook, which lies in examples/
    source[0] = re.sub(rf"\[([^]\n]+)\]\({re.escape(root)}([^)\s]+)\)", r"\1 (`\2` in the repository)", text)


def without_substitutions(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Escape the bars of |w| in docstrings, which reStructuredText takes for substitutions."""
    for place, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = line.split("``")  # every other one is a literal
            parts[::2] = [part.replace("|", "\\|") for part in parts[::2]]
            lines[place] = "``".join(parts)


def setup(app: Any) -> None:
    """Connect both."""
    app.connect("source-read", in_repository)
    app.connect("autodoc-process-docstring", without_substitutions)
