"""The largest |eigenvalue| by power iteration, for solvers that need a step size.

    v ← M⁻¹A v / ‖M⁻¹A v‖;   λ̂ = ‖M⁻¹A v‖

The direction is kept from solve to solve, so that a step or two follow a matrix that changes.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from hypergrad import tree
from hypergrad.solvers._base import ScaledSystem, iterate, normalized
from hypergrad.types import Array, MatVec, PyTree

__all__ = ["Power", "iterate_power"]

_FIRST_STEPS = 12
_EXPLORE = 0.1  # how much of b is mixed into the warm direction, so that a new top eigenvector is found


class Power(NamedTuple):
    """A unit vector, λ̂, and the number of products so far."""

    direction: PyTree
    top: Array
    num_products: Array
    done: Array


def iterate_power(
    scaled: ScaledSystem,
    direction: PyTree,
    *,
    warm_steps: int,
    unroll: int | bool,
    precondition: MatVec = lambda v: v,
) -> Power:
    """Return a unit vector and ‖M⁻¹A v‖ at the last one: for M = I at most |λ|max, and growing from step to step.

    It takes 12 products where ``direction`` is zero, and ``warm_steps`` elsewhere.
    """
    cold = tree.norm(direction) == 0
    steps = jnp.where(cold, _FIRST_STEPS, warm_steps)
    mixed = tree.add_scaled(direction, _EXPLORE, normalized(scaled.b, scaled.size))
    size = tree.norm(mixed)

    def step(c: Power) -> Power:
        image = precondition(scaled.matvec(c.direction))
        top = tree.scaled_norm(image)
        usable = jnp.isfinite(top) & (top > 0)
        moved = optax.tree.where(usable, normalized(image, top), c.direction)
        return Power(moved, jnp.where(usable, top, 0.0), c.num_products + 1, ~usable | (c.num_products + 1 >= steps))

    start = Power(normalized(mixed, size), jnp.zeros_like(size), jnp.zeros((), jnp.int32), size == 0)
    return iterate(step, start, length=_FIRST_STEPS, unroll=unroll)
