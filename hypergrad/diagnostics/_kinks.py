"""Kinks of a loss at its solution: the jump of its gradient from one side of the weights to the other.

    j(ε) = ∇f(w + εσ) − ∇f(w − εσ),   σ random signs         f smooth:                2ε ∇²f σ + O(ε³)
                                                             |wᵢ| or a norm at 0:     jᵢ(ε) = σᵢ·jump + O(ε)
    k(ε) = 2 j(ε) − j(2ε)                                    f smooth: O(ε³);  a kink: kᵢ(ε) = σᵢ·jump + O(ε³)

A weight is at a kink where |wᵢ| < ε, kᵢ(ε) is most of jᵢ(ε), kᵢ(ε) ≈ kᵢ(2ε), and f rises to both sides of wᵢ, for
every σ. A solver with a finite step leaves its weights at a distance from their kink, and the jump shows once ε exceeds
that distance: ε is tried from a quarter of the weights' size down to where rounding begins. Weights found this way are
then set to 0, where the jump of a kink is there for the smallest ε too, and that of a narrow bend is not.

Kinks that data make (ReLUs of a network, hinges of margins, absolute errors) cross directions of many weights, at
weights of any size. Their jumps have the sign of another sum for every σ, not that of σᵢ. They are not looked for:
there are some near any weights of a network, and most of them do not matter.

Reference: Richardson, The approximate arithmetical solution by finite differences, 1911.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import tree
from hypergrad.diagnostics._base import flat
from hypergrad.diagnostics._differences import Budget
from hypergrad.types import Params

__all__ = ["weights_at_kinks"]

_SIZES = 0.5 ** np.arange(21)  # 4ε relative to the weights' root mean square, down to 1e-6
_ABOVE_ROUNDING = 1000.0  # times the precision of the loss: below, rounding of the gradient looks like a jump
_DIRECTIONS = 16  # of the jumps of ReLUs along one of them half have the sign of a kink
_MOST, _EQUAL, _STEEP = 0.5, 0.25, 0.1  # |k| ≥ ½|j|, |k(ε) − k(2ε)| ≤ ¼|k|, and |∇f| ≥ |k|/10


def weights_at_kinks(
    gradient: Callable[[Params], Params],
    params: Params,
    epsilon: float,
    budget: Budget = Budget(),  # noqa: B008
) -> dict[str, int] | None:
    """Return how many weights of each leaf are at a kink of the loss, by the paths of leaves that have some.

    ``gradient`` is that of the loss, compiled; ``epsilon`` the precision in which it computes. A bend narrower than ε,
    at whose bottom the gradient is zero, is smooth, not a kink: away from the smallest ε only weights with a gradient
    count. None where the search did not end: the precision leaves no room between the weights' size and rounding, as
    bfloat16, or the time was over.
    """
    sizes = _SIZES[_ABOVE_ROUNDING * epsilon <= _SIZES]
    if len(sizes) < 3:
        return None
    leaves, structure = jax.tree.flatten(tree.promote(params))
    places = np.cumsum([leaf.size for leaf in leaves])[:-1]
    overall = float(np.linalg.norm(flat(params))) / math.sqrt(max(sum(leaf.size for leaf in leaves), 1))
    # A leaf of zeros moves by what is usual elsewhere, and a tree of zeros by 1.
    spreads = [float(np.linalg.norm(flat(leaf))) / math.sqrt(max(leaf.size, 1)) for leaf in leaves]
    width = np.concatenate(
        [np.full(w.size, max(spread, overall) or 1.0) for w, spread in zip(leaves, spreads, strict=True)]
    )
    weights = flat(leaves)

    def gradient_at(vector: np.ndarray) -> np.ndarray:
        rows = zip(np.split(vector, places), leaves, strict=True)
        return flat(
            gradient(jax.tree.unflatten(structure, [jnp.asarray(x.reshape(w.shape), w.dtype) for x, w in rows]))
        )

    def along_all(weights: np.ndarray, sizes: np.ndarray) -> np.ndarray | None:
        here, rng = gradient_at(weights), np.random.default_rng(0)
        held = np.ones((len(sizes), len(weights)), bool)
        for _ in range(_DIRECTIONS):
            if not budget.seconds_left():
                return None
            held &= _along(gradient_at, weights, here, width, sizes, rng.choice([-1.0, 1.0], len(weights)))
            if not held.any():  # as a rule after a few
                break
        return held

    held = along_all(weights, sizes)
    if held is None:
        return None
    found = held.any(axis=0)
    if found.any():
        held = along_all(np.where(found, 0.0, weights), sizes[-3:])
        if held is None:
            return None
        found &= held[-1]
    counts = [int(leaf.sum()) for leaf in np.split(found, places)]
    return {name: count for name, count in zip(tree.leaf_names(params), counts, strict=True) if count}


def _along(
    gradient: Callable[[np.ndarray], np.ndarray],
    weights: np.ndarray,
    here: np.ndarray,
    width: np.ndarray,
    sizes: np.ndarray,
    signs: np.ndarray,
) -> np.ndarray:
    """Return which weights look as if they were at a kink, along one direction: bools (sizes, weights)."""
    last = last_jumps = np.full(len(weights), np.nan)
    found = []
    for size in sizes:
        above, below = gradient(weights + size * width * signs), gradient(weights - size * width * signs)
        changes = signs * (above - below)
        jumps = 2 * changes - last
        rises = (signs * above > 0) & (signs * below < 0)
        jump = (jumps >= _MOST * changes) & (np.abs(jumps - last_jumps) <= _EQUAL * jumps)
        steep = ~(np.abs(here) < _STEEP * jumps) | (size == sizes[-1])  # the gradient of a norm at 0 is NaN
        found.append((np.abs(weights) < size * width) & rises & jump & steep)
        last, last_jumps = changes, jumps
    return np.array(found)
