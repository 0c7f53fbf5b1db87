"""The law: layers without cycles, everything public documented, nothing private of others.

    L0  types, tree, validate, data, dataflow, curvature                    in this order
    L1  bijectors, penalties, priors, optimizers, noise
    L2  problem, then training, residuals, folds
    L3  solvers/, then inner_solvers/, methods/
    L4  estimators/, responses/
    L5  drivers/
    L6  diagnostics/, integrations/

A module imports lower layers and any module of its own folder; the imports form no cycle. A file's length is free.
"""

import ast
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import hypergrad as hg
from hypergrad import (
    bijectors,
    diagnostics,
    inner_solvers,
    integrations,
    methods,
    noise,
    optimizers,
    penalties,
    priors,
    responses,
    solvers,
)

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "hypergrad"
LAYERS = {
    "_installation": 0.0,
    "types": 0.0,
    "tree": 0.1,
    "validate": 0.2,
    "data": 0.3,
    "dataflow": 0.4,
    "curvature": 0.5,
    "lanczos": 0.5,
    "bijectors": 1,
    "noise": 1,
    "optimizers": 1,
    "penalties": 1,
    "priors": 1,
    "problem": 2.0,
    "folds": 2.1,
    "stores": 0.3,
    "residuals": 2.1,
    "training": 2.1,
    "solvers": 3.0,
    "inner_solvers": 3.1,
    "methods": 3.2,
    "estimators": 4,
    "responses": 4,
    "drivers": 5,
    "diagnostics": 6,
    "integrations": 6,
}
COMPUTES = {
    *("cg", "dense", "neumann", "l1", "l2", "implicit", "unrolled", "reverse", "forward", "best_response", "bilevel"),
    *("clip_by_global_norm", "clip_by_block_rms", "normalize_by_update_norm"),
    *("add_decayed_weights", "scale_by_learning_rate", "schedule", "direct", "with_response", "perturbed", "sampled"),
    *(
        "self_tuning",
        "self_tunable",
        "linear",
        "gated",
        "hypernetwork",
        "magnitude_invariant",
        "init",
        "deployable_params",
    ),
    *(
        "minimize",
        "metagradient",
        "metagradient_plan",
        "plan",
        "hoag",
        "evolution",
        "learned",
        "per_parameter_mlp",
        "hypergradient_descent",
        "multiplicative",
        "additive",
        "clipped",
    ),
    *("check_hypergrad", "compare", "extreme_eigenvalues", "horizon_bias", "retrain"),
}
EXTRAS = {"_plots.py": "matplotlib", "_logging.py": "tqdm"}  # imported where they are asked for, not with the library
FILES = sorted(PACKAGE.rglob("*.py"))
names = lambda f: str(f.relative_to(ROOT))  # noqa: E731


def imports(path):
    """Return every imported module's dotted name; a name imported from a package counts as a module where it is one."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [part if is_module(part) else node.module for part in parts]
    return found


def is_module(dotted):
    """Return whether a dotted name is a module of this library."""
    path = ROOT.joinpath(*dotted.split("."))
    return dotted.startswith("hypergrad.") and (path.with_suffix(".py").exists() or path.is_dir())


def place(path):
    """Return the top-level name under ``hypergrad/`` that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=names)
def test_imports_go_down(path):
    if path == PACKAGE / "__init__.py":
        return
    own = place(path)
    for module in imports(path):
        if module.startswith("hypergrad."):
            target = module.split(".")[1]
            assert target == own or LAYERS[target] < LAYERS[own], f"{path}: {module} is not below"


def test_imports_form_no_cycle():
    """A package stands for its ``__init__``: what imports the package imports that."""
    dotted = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
    edges = {name: {m for m in imports(f) if m in dotted and m != name} for name, f in dotted.items()}
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, f"cycle: {' -> '.join([*trail, name])}"
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in dotted:
        visit(name, [])


def test_every_place_has_a_layer():
    assert {place(f) for f in FILES} == {*LAYERS, "__init__"}


@pytest.mark.parametrize("path", FILES, ids=names)
def test_files_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_library_does_not_import_what_only_pictures_and_bars_need():
    code = "import sys, hypergrad; assert not {'matplotlib', 'tqdm', 'equinox'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", FILES, ids=names)
def test_library_manners(path):
    """No prints, no configuration, no private modules, core dependencies only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print"
        if isinstance(node, ast.Attribute):
            assert not (node.attr == "config" and isinstance(node.value, ast.Name) and node.value.id == "jax")
    for module in imports(path):
        assert "._src" not in module
        if module.split(".")[0] == EXTRAS.get(path.name):
            continue
        assert module.split(".")[0] in {"hypergrad", "jax", "optax", "flax", "numpy", "collections"} | {
            "dataclasses",
            "enum",
            "functools",
            "math",
            "contextlib",
            "hashlib",
            "json",
            "os",
            "re",
            "shutil",
            "importlib",
            "inspect",
            "itertools",
            "pathlib",
            "threading",
            "time",
            "types",
            "typing",
            "warnings",
            "weakref",
        }
        assert module.split(".")[0] != "chex"


def public():
    """Return every public name of the library with its object."""
    found = {f"hg.{name}": getattr(hg, name) for name in hg.__all__}
    for module in (
        bijectors,
        diagnostics,
        inner_solvers,
        methods,
        responses,
        solvers,
        *(getattr(integrations, n) for n in integrations.__all__),
    ):
        found |= {f"{module.__name__}.{name}": getattr(module, name) for name in module.__all__}
    found |= {f"hg.penalties.{name}": getattr(penalties, name) for name in ("l1", "l2")}
    found |= {f"hg.priors.{name}": getattr(priors, name) for name in priors.__all__}
    found |= {f"hg.optimizers.{name}": getattr(optimizers, name) for name in optimizers.__all__}
    found |= {f"hg.noise.{name}": getattr(noise, name) for name in dir(noise) if _is_own(getattr(noise, name), noise)}
    return found


def _is_own(thing, module):
    return getattr(thing, "__module__", None) == module.__name__ and not thing.__name__.startswith("_")


@pytest.mark.parametrize("name", public())
def test_public_names_are_documented(name):
    thing = public()[name]
    doc = thing.__doc__
    assert doc
    assert len(doc.splitlines()[0]) > 10
    if isinstance(thing, type) and hasattr(thing, "_fields"):
        assert "Attributes:" in doc
        for field in thing._fields:
            assert re.search(rf"^\s*{field}: ", doc, re.M), f"{name}.{field} has no description"
    elif callable(thing) and not isinstance(thing, type):
        assert ">>>" in doc, f"{name} has no example"
        computes = name.split(".")[-1] in COMPUTES
        for part in ["Args:", "Returns:", "Reference"] if computes else []:
            assert part in doc, f"{name} has no {part}"
        examples = [line for line in doc.splitlines() if line.strip().startswith((">>>", "..."))]
        assert len(examples) <= 10


def test_every_test_of_the_law_would_notice():
    """The helpers see what they look for."""
    assert "hypergrad.solvers" in imports(PACKAGE / "__init__.py")
    assert place(PACKAGE / "solvers" / "_cg.py") == "solvers"
    assert "hg.bilevel" in public()


def test_the_version_is_one():
    assert hg.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_the_readme_command():
    """The command that the README gives for the tests is taken from the README, not written again."""
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script
    assert "pytest" not in script.replace("# ", "")


def test_no_private_jax_anywhere():
    ours = [
        f
        for folder in ("hypergrad", "tests", "examples", "experiments", "benchmarks")
        for f in (ROOT / folder).rglob("*.py")
    ]
    offending = [f for f in ours if re.search(r"^\s*(from|import) jax\._src", f.read_text(), re.M)]
    assert offending == []
    assert tuple(int(p) for p in jax.__version__.split(".")[:2]) >= (0, 9)
