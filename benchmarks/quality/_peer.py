"""What ``peer_accuracy.py`` and its child scripts share: problems in a file, methods by name, rows of errors.

A child script runs in the environment of one library: it may import numpy and that library, and never hypergrad.

    python benchmarks/quality/_peer_jaxopt.py problems.npz     # prints rows as JSON on its last line
"""

import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CG_BUDGETS, NEUMANN_BUDGETS, UNROLL_BUDGETS, NORMAL_BUDGET = (10, 20, 50), (20, 100), (100, 1000), 50
TOLERANCE = 1e-12  # relative residual at which conjugate gradients may stop before the budget


class Problem(NamedTuple):
    """A bilevel problem with one log decay per weight, and its hypergradient.

    inner  ½‖x w − y‖² (ridge) or the mean cross-entropy of x w (softmax), + ½ Σ exp(logs) w²
    outer  the same on the validation data, without decays

    Attributes:
      name: with the condition number.
      kind: "ridge" or "softmax".
      x, y, valid_x, valid_y: data; labels are integers.
      logs: log decays, shaped like the weights.
      weights: the inner solution.
      exact: the hypergradient in the log decays.
      step: 1/λmax of the inner Hessian at the solution.
      condition: its condition number.
    """

    name: str
    kind: str
    x: np.ndarray
    y: np.ndarray
    valid_x: np.ndarray
    valid_y: np.ndarray
    logs: np.ndarray
    weights: np.ndarray
    exact: np.ndarray
    step: float
    condition: float


# A method returns the hypergradient and what the library itself says of it: "" where it says nothing.
Method = Callable[[Problem], tuple[Any, str]]


def cg(budget: int) -> str:
    """Return the name of conjugate gradients with so many products."""
    return f"CG {budget}"


def normal_cg(budget: int) -> str:
    """Return the name of conjugate gradients on the normal equations; a step takes two products."""
    return f"normal-equation CG {budget}"


def neumann(budget: int) -> str:
    """Return the name of the Neumann series with step 1/λmax."""
    return f"Neumann {budget}"


def unroll(budget: int) -> str:
    """Return the name of reverse mode through gradient steps of 1/λmax from zero weights."""
    return f"unroll {budget}"


def save(path: Path, problems: Sequence[Problem]) -> None:
    """Write problems to an .npz file."""
    fields = [(f"{i}/{key}", value) for i, problem in enumerate(problems) for key, value in problem._asdict().items()]
    arrays: dict[str, Any] = {key: np.asarray(value) for key, value in fields}
    np.savez(path, **arrays)


def load(path: Path) -> list[Problem]:
    """Read problems from an .npz file."""
    with np.load(path) as file:
        count = len({key.split("/")[0] for key in file.files})
        found = [{key: file[f"{i}/{key}"] for key in Problem._fields} for i in range(count)]
    return [
        Problem(**{key: value if value.ndim or key == "weights" else value.item() for key, value in fields.items()})
        for fields in found
    ]


def rows(problems: Sequence[Problem], methods: dict[str, Method], ignored: Sequence[str] = ()) -> dict[str, Any]:
    """Return ``{problem: {method: row}}``; a row has an error and what was reported, or why the method failed.

    Args:
      problems: what to differentiate.
      methods: by name.
      ignored: names of further warning categories that do not tell about accuracy.
    """
    quiet = {"DeprecationWarning", "PendingDeprecationWarning", "FutureWarning", *ignored}
    found: dict[str, Any] = {}
    for problem in problems:
        for name, method in methods.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    hypergrad, reported = method(problem)
                    difference = np.asarray(hypergrad, float).reshape(-1) - problem.exact.reshape(-1)
                    error = float(np.linalg.norm(difference) / np.linalg.norm(problem.exact))
                    row = {"error": error if np.isfinite(error) else None, "reported": reported}
                except Exception as failure:
                    row = {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0]}
            said = {str(w.message).splitlines()[0] for w in caught if w.category.__name__ not in quiet}
            found.setdefault(problem.name, {})[name] = {**row, **({"warnings": sorted(said)} if said else {})}
    return found


def main(methods: dict[str, Method], distributions: Sequence[str]) -> None:
    """Read the problems' file named on the command line, run every method, print JSON."""
    found = rows(load(Path(sys.argv[1])), methods)
    print(json.dumps({"versions": {d: importlib.metadata.version(d) for d in distributions}, "rows": found}))
