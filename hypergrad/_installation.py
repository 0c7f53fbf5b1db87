"""Is this folder ours alone? Another distribution, PyPI's ``hypergrad``, installs a package of the same name.

Whichever was installed last replaces files of the other. Importing this module names what it finds.
"""

import contextlib
import importlib.metadata
import pathlib
import warnings

__all__ = ["foreign_files"]

_OURS = {
    *(
        "__init__",
        "_installation",
        "bijectors",
        "curvature",
        "lanczos",
        "data",
        "dataflow",
        "folds",
        "noise",
        "optimizers",
        "penalties",
    ),
    *("priors", "problem", "residuals", "stores", "training", "tree", "types", "validate"),
    *(
        "diagnostics",
        "drivers",
        "estimators",
        "inner_solvers",
        "integrations",
        "methods",
        "responses",
        "solvers",
    ),
}


def foreign_files(folder: pathlib.Path) -> list[str]:
    """Return the modules and packages in ``folder`` that are not of this library."""
    modules = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    return sorted(path.name for path in modules if path.stem not in _OURS)


def _warn() -> None:
    found = [f"the files {', '.join(foreign)}"] if (foreign := foreign_files(pathlib.Path(__file__).parent)) else []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found.append(f"the distribution hypergrad {importlib.metadata.version('hypergrad')}")
    if found:
        warnings.warn(
            f"Another package named hypergrad is installed over hypergrad-jax: found {' and '.join(found)}. Its files "
            "may replace ours. Run: pip uninstall -y hypergrad hypergrad-jax, then install hypergrad-jax again.",
            RuntimeWarning,
            stacklevel=3,
        )


_warn()
