"""What diagnostics share: how two hypergradients compare, tables, and numbers as text.

    cosine = ⟨a, b⟩ / ‖a‖‖b‖        norm ratio = ‖a‖ / ‖b‖        error = ‖a − b‖ / ‖b‖

A NaN stands for what cannot be said; a table shows it as a dash.
"""

from collections.abc import Sequence
from typing import NamedTuple

import optax

from hypergrad import _tree
from hypergrad._types import Hyperparams


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


def align(a: Hyperparams, b: Hyperparams) -> Alignment:
    """Return how ``a`` stands to ``b``, over all leaves together."""
    a, b = _tree.promote(a), _tree.promote(b)
    of_a, of_b = float(_tree.norm(a)), float(_tree.norm(b))
    apart = float(_tree.norm(optax.tree.sub(a, b)))
    product = float(_tree.vdot(a, b))
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
