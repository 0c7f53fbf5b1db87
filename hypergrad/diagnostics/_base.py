"""What diagnostics share: how two hypergradients compare, tables, and numbers as text.

    cosine = ⟨a, b⟩ / ‖a‖‖b‖        norm ratio = ‖a‖ / ‖b‖        error = ‖a − b‖ / ‖b‖

A NaN stands for what cannot be said; a table shows it as a dash.
"""

from collections.abc import Sequence
from typing import NamedTuple

import optax

from hypergrad import tree
from hypergrad.types import Hyperparams


class Alignment(NamedTuple):
    """How one hypergradient stands to another: b, the better one.

    Attributes:
      cosine: ⟨a, b⟩/‖a‖‖b‖; NaN where one of them is zero or not finite.
      norm_ratio: ‖a‖/‖b‖; NaN where b is zero.
      error: ‖a − b‖/‖b‖; NaN where b is zero.
    """

    cosine: float
    norm_ratio: float
    error: float


class Direction(NamedTuple):
    """One directional derivative, by both routes.

    Attributes:
      leaf: path of the hyperparameter leaf that moves.
      kind: "along" the estimate, or "random" signs.
      estimated: ⟨hypergrad, d⟩.
      measured: by finite differences.
      uncertainty: of ``measured``, relative as ``error`` is: what halving the step changed, or rounding may have.
      error: |estimated − measured| over the size that the derivative has in such a direction.
    """

    leaf: str
    kind: str
    estimated: float
    measured: float
    uncertainty: float
    error: float


class HypergradCheck(NamedTuple):
    """The verdict of a gradient check. ``str()`` of it is a report.

    Attributes:
      passed: whether every direction agrees within ``rtol``, by differences that can be trusted that far.
      reasons: why not, most certain first; empty if passed.
      rows: one ``Direction`` for each leaf, and one more of random signs for each leaf of more than one number.
      rtol: the tolerance asked for.
      step: the widest h of those taken, by which a leaf was moved relative to its root mean square.
      dtype: of the lowest precision in which the losses computed.
      note: why not in float64, where it was possible to say; empty otherwise.
      outer_loss: at the weights of the estimate.
      inner_gradient_norm: ‖∇_w L_in‖ there, on the batch and with the key that the linear solve sees.
      error_at_optimum: the largest error of an estimate at the inner optimum instead; NaN where none was needed.
      residual: of the estimate's linear solve; NaN without one.
    """

    passed: bool
    reasons: tuple[str, ...]
    rows: tuple[Direction, ...]
    rtol: float
    step: float
    dtype: str
    note: str
    outer_loss: float
    inner_gradient_norm: float
    error_at_optimum: float
    residual: float

    def __str__(self) -> str:
        """Return verdict, table and reasons."""
        verdict = "passed" if self.passed else "FAILED"
        head = f"hypergradient check {verdict}: tolerance {self.rtol:g}, step {self.step:g}, {self.dtype}"
        lines: list[tuple[str, ...]] = [("hyperparameters", "direction", "estimated", "measured", "±", "error")]
        lines += [(readable(row.leaf), row.kind, *map(digits, row[2:])) for row in self.rows]
        head += f" ({self.note})" if self.note else ""
        reasons = "".join(f"\n- {reason}" for reason in self.reasons)
        return f"{head}\n{table(lines)}{reasons}"


def align(a: Hyperparams, b: Hyperparams) -> Alignment:
    """Return how ``a`` stands to ``b``, over all leaves together."""
    a, b = tree.promote(a), tree.promote(b)
    of_a, of_b = float(tree.norm(a)), float(tree.norm(b))
    apart = float(tree.norm(optax.tree.sub(a, b)))
    product = float(tree.vdot(a, b))
    return Alignment(
        product / (of_a * of_b) if of_a * of_b > 0 else float("nan"),
        of_a / of_b if of_b > 0 else float("nan"),
        apart / of_b if of_b > 0 else float("nan"),
    )


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as text: the first line is a head, the first column flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([text[0].rstrip(), "-" * len(text[0]), *text[1:]])


def digits(value: float) -> str:
    """Return a number in four significant digits, and a dash for NaN."""
    return "-" if value != value else f"{float(value):.4g}"


def readable(path: str) -> str:
    """Return a leaf's path without brackets: ``['dense']['kernel']`` as ``dense.kernel``."""
    return path.replace("']['", ".").strip("[]'").strip(".") or path
