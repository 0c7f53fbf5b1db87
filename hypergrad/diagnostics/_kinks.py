"""Kinks of a loss at its solution: the jump of its gradient from one side of the weights to the other.

    j(ε) = ∇f(w + εσ) − ∇f(w − εσ),   σ random signs         f smooth:                2ε ∇²f σ + O(ε³)
                                                             |wᵢ| or a norm at 0:     jᵢ(ε) = σᵢ·jump + O(ε)
    k(ε) = 2 j(ε) − j(2ε)                                    f smooth: O(ε³);  a kink: kᵢ(ε) = σᵢ·jump + O(ε³)

A weight is at a kink where |wᵢ| < ε, kᵢ(ε) is most of jᵢ(ε), kᵢ(ε) ≈ kᵢ(2ε), and f rises to both sides of wᵢ, for
every σ. A solver with a finite step leaves its weights at a distance from their kink, and the jump shows once ε exceeds
that distance: ε is tried from a quarter of the weights' size down to where rounding begins.

Kinks that data make (ReLUs of a network, hinges of margins, absolute errors) cross directions of many weights, at
weights of any size. Their jumps have the sign of another sum for every σ, not that of σᵢ. They are not looked for:
there are some near any weights of a network, and most of them do not matter.

Reference: Richardson, The approximate arithmetical solution by finite differences, 1911.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hypergrad import tree
from hypergrad.types import Array, Params

__all__ = ["weights_at_kinks"]

_SIZES = 0.5 ** np.arange(21)  # 4ε relative to the weights' root mean square, down to 1e-6
_ABOVE_ROUNDING = 1000.0  # times the precision of the loss: below, rounding of the gradient looks like a jump
_DIRECTIONS = 16  # of the jumps of ReLUs along one of them half have the sign of a kink
_MOST, _EQUAL, _STEEP = 0.5, 0.25, 0.1  # |k| ≥ ½|j|, |k(ε) − k(2ε)| ≤ ¼|k|, and |∇f| ≥ |k|/10


def weights_at_kinks(fn: Callable[[Params], Array], params: Params, epsilon: float) -> dict[str, int]:
    """Return how many weights of each leaf are at a kink of ``fn``, by the paths of leaves that have some.

    ``epsilon`` is the precision in which ``fn`` computes. Empty where it leaves no room between the weights' size and
    rounding, as bfloat16. A bend narrower than ε, at whose bottom the gradient is zero, is smooth, not a kink: away
    from the smallest ε only weights with a gradient count.
    """
    sizes = _SIZES[_ABOVE_ROUNDING * epsilon <= _SIZES]
    if len(sizes) < 3:
        return {}
    found = jax.jit(functools.partial(_found, fn))(tree.promote(params), jnp.asarray(sizes, tree.wider(jnp.float32)))
    counts = {name: int(leaf.sum()) for name, leaf in zip(tree.leaf_names(params), found, strict=True)}
    return {name: count for name, count in counts.items() if count}


def _found(fn: Callable[[Params], Array], params: Params, sizes: Array) -> list[Array]:
    """Return bools like the leaves of ``params``."""
    leaves, structure = jax.tree.flatten(params)
    count = sum(leaf.size for leaf in leaves)
    overall = tree.norm(params) / jnp.sqrt(count)
    # A leaf of zeros moves by what is usual elsewhere, and a tree of zeros by 1.
    widths = [jnp.maximum(jnp.linalg.norm(jnp.ravel(leaf)) / jnp.sqrt(max(leaf.size, 1)), overall) for leaf in leaves]
    widths = [jnp.where(width > 0, width, 1.0) for width in widths]
    here = jax.tree.leaves(jax.grad(fn)(params))

    def gradient(signs: list[Array], size: Array) -> list[Array]:
        moved = [w + (size * width).astype(w.dtype) * s for w, width, s in zip(leaves, widths, signs, strict=True)]
        return jax.tree.leaves(jax.grad(fn)(jax.tree.unflatten(structure, moved)))

    def narrower(signs: list[Array], wider: Any, size: Array) -> tuple[Any, list[Array]]:
        last, last_jumps = wider
        above, below = gradient(signs, size), gradient(signs, -size)
        changes = [sign * (a - b) for sign, a, b in zip(signs, above, below, strict=True)]
        jumps = [2 * new - old for new, old in zip(changes, last, strict=True)]
        found = []
        at = zip(leaves, widths, signs, here, above, below, changes, jumps, last_jumps, strict=True)
        for w, width, sign, g, a, b, j, k, old in at:
            rises = (sign * a > 0) & (sign * b < 0)
            jump = (k >= _MOST * j) & (jnp.abs(k - old) <= _EQUAL * k)
            steep = ~(jnp.abs(g) < _STEEP * k) | (size == sizes[-1])  # the gradient of a norm at 0 is NaN
            found.append((jnp.abs(w) < size * width) & rises & jump & steep)
        return (changes, jumps), found

    def along(held: list[Array], key: Array) -> tuple[list[Array], None]:
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(k, w.shape, w.dtype) for k, w in zip(keys, leaves, strict=True)]
        unknown = [jnp.full_like(w, jnp.nan) for w in leaves]
        _, found = lax.scan(functools.partial(narrower, signs), (unknown, unknown), sizes)
        return [old & new for old, new in zip(held, found, strict=True)], None

    everywhere = [jnp.ones((len(sizes), *w.shape), bool) for w in leaves]
    held, _ = lax.scan(along, everywhere, jax.random.split(jax.random.key(0), _DIRECTIONS))
    return [jnp.any(leaf, axis=0) for leaf in held]
