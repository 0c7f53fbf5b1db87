"""What the diagnostics share: how two hypergradients compare, tables, and numbers as text.

    cosine = ⟨a, b⟩ / ‖a‖‖b‖        norm ratio = ‖a‖ / ‖b‖        error = ‖a − b‖ / ‖b‖

NaN: not available, printed as -.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hypergrad import validate
from hypergrad.estimators import Estimator
from hypergrad.training import Context
from hypergrad.types import PyTree

__all__ = ["Alignment", "align", "digits", "flat", "readable", "table", "teller", "unknowns"]


class Alignment(NamedTuple):
    """Compares a hypergradient a with the reference b.

    Attributes:
      cosine: ⟨a, b⟩/‖a‖‖b‖; NaN where one of them is zero or not finite.
      norm_ratio: ‖a‖/‖b‖; NaN where b is zero.
      error: ‖a − b‖/‖b‖; NaN where b is zero.
    """

    cosine: float
    norm_ratio: float
    error: float


def align(a: PyTree, b: PyTree) -> Alignment:
    """Compare ``a`` with the reference ``b``, over all leaves together."""
    a, b = flat(a), flat(b)
    of_a, of_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    cosine = float(a @ b) / of_a / of_b if of_a > 0 and of_b > 0 else math.nan
    if not of_b > 0:
        return Alignment(cosine, math.nan, math.nan)
    return Alignment(cosine, of_a / of_b, float(np.linalg.norm(a - b)) / of_b)


def flat(values: PyTree) -> np.ndarray:
    """Return all numbers of a tree as one vector in float64, where squares of 1e-20 and 1e20 are numbers too."""
    leaves = [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(values)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as text: the first line is a head, the first column flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([text[0].rstrip(), "-" * len(text[0]), *text[1:]])


def digits(value: float) -> str:
    """Return a number in four significant digits, and - for NaN."""
    return "-" if value != value else f"{float(value):.4g}"


def readable(path: str) -> str:
    """Return a leaf's path without brackets: ``['dense']['kernel']`` and NNX's ``….value`` as ``dense.kernel``."""
    return path.removesuffix(".value").translate(str.maketrans("[", ".", "]'")).strip(".") or path


def teller(progress: Callable[[str], Any] | None) -> Callable[[str], Any]:
    """Return ``progress``, which gets a line of text at each stage of a diagnostic, or a function that ignores it."""
    if not (progress is None or callable(progress)):
        fix = "Pass progress=print."
        raise TypeError(validate.message("progress as a function of a line of text", validate.describe(progress), fix))
    return progress or (lambda _: None)


def unknowns(estimator: Estimator, ctx: Context) -> PyTree:
    """Return which weights the inner problem solves for: a tree of bools like the weights."""
    marks = True if estimator.unknowns is None else estimator.unknowns(ctx)
    return jax.tree.broadcast(marks, ctx.at.params)
