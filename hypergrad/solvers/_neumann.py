"""Truncated Neumann series: K damped fixed-point steps towards A⁻¹ b.

    x = α Σ_{k=0}^{K−1} (I − αA)ᵏ b           residual b − A x = (I − αA)ᴷ b

Use it for networks in training: every term is one Hessian product, memory does not grow with K, mild indefiniteness
does not stop it, and K terms equal K unrolled steps of gradient descent with rate α at the optimum, without the
memory. Few terms give the right direction with too small a norm: pair it with a scale-free outer optimizer (Adam).

Reference: Lorraine, Vicol & Duvenaud, Optimizing millions of hyperparameters by implicit differentiation,
arXiv 1911.02590.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.solvers._base import LinearSolver, ScaledSystem, Solution, Status, assemble, divide, iterate, normalized
from hypergrad.types import Array, PyTree

__all__ = ["neumann"]

_FIRST_POWER_STEPS, _WARM_POWER_STEPS = 12, 2
_EXPLORE = 0.1  # how much of b is mixed into the warm direction, so that a new top eigenvector is found
_DIVERGED = 1e3  # a residual that grew this far only grows: ‖(I − αA)ᵏ b‖ is log-convex in k


class NeumannState(NamedTuple):
    """What the next solve needs to choose its own step.

    Attributes:
      direction: tree like b, unit norm, close to the eigenvector of A's largest |eigenvalue|; zeros at first.
    """

    direction: PyTree


def neumann(
    num_terms: int, step_size: float | None = None, *, damping: float = 0.0, unroll: int | bool = 1
) -> LinearSolver:
    """Approximate A⁻¹ b by K terms of the Neumann series.

    x = α Σ_{k=0}^{K−1} (I − αA)ᵏ b, at K products with A; the last product gives the residual.

    Args:
      num_terms: K ≥ 1, the number of terms. Only a solve with a ``tolerance`` stops earlier, where it is met.
      step_size: α > 0, in units of 1/A. None: 1/λ̂, λ̂ an estimate of A's largest |eigenvalue| by power
        iterations, 12 products at the first solve and 2 at each later one, which start from the direction in the
        solver's state and so follow an A that changes. λ̂ ≤ |λ|max; the series converges while the estimate is
        above half of it, and a solve that overshoots hands its residual, by then the top eigenvector, to the next.
      damping: δ ≥ 0 adds δI to A. Makes an indefinite A usable if δ exceeds its most negative eigenvalue.
      unroll: True or an int for a scan so unrolled (convolutions on CPU); 1 is a loop that stops early.

    Returns:
      A ``LinearSolver``. ``num_products`` counts terms and power iterations. ``CONVERGED`` means a residual of at most
      1e-5 (or ``tolerance``), that of the last term, which does not contain the rounding of x (about ε κ).
      Where the residual passes 1000 the series ends with status ``DIVERGED``.

    Raises:
      ValueError: ``num_terms`` < 1, ``step_size`` ≤ 0, ``damping`` < 0.
      TypeError: one of them is not a number.

    Valid when 0 < α λ < 2 for every eigenvalue λ of A + δI that b touches.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> solver = neumann(num_terms=3, step_size=0.5)
    >>> b = jnp.array([1.0])
    >>> x, _, info = solver.solve(hg.solvers.LinearSystem(lambda v: v), b, solver.init(b))    # 0.5 (1 + 0.5 + 0.25)
    >>> float(x[0]), float(info.residual)
    (0.875, 0.125)

    Reference: Lorraine, Vicol & Duvenaud, arXiv 1911.02590.
    """
    validate.positive_int("num_terms", num_terms)
    validate.unroll(unroll)
    if step_size is not None:
        validate.number("step_size", step_size, low=0.0, strict=True)

    def init(b_like: PyTree) -> PyTree:
        return () if step_size is not None else NeumannState(tree.promoted_zeros_like(b_like))

    def solve_scaled(scaled: ScaledSystem, state: PyTree) -> Solution:
        power = None if step_size is not None else _power(scaled, state.direction, unroll)
        alpha = step_size if power is None else divide(1.0, power.top)
        total = _series(scaled, alpha, num_terms, unroll)
        num_products = total.num_products
        if power is not None:
            num_products += power.num_products
            missed = total.overshot & jnp.isfinite(total.residual) & (total.residual > 1.0)
            last = normalized(total.term, total.residual * scaled.size)
            state = NeumannState(optax.tree.where(missed, last, power.direction))
        status = jnp.where(total.residual > _DIVERGED, Status.DIVERGED, Status.TRUNCATED)
        return Solution(total.x, state, num_products, total.term, total.residual, status)

    return assemble(init, solve_scaled, damping=damping)


class _Sum(NamedTuple):
    term: PyTree
    x: PyTree
    num_products: Array
    residual: Array
    overshot: Array
    done: Array


def _series(scaled: ScaledSystem, alpha: Any, num_terms: int, unroll: int | bool) -> _Sum:
    matvec, b, size, limit, _ = scaled
    stop = -1.0 if limit is None else limit  # −1: take all terms

    def step(c: _Sum) -> _Sum:
        x = tree.add_scaled(c.x, alpha, c.term)
        term = tree.add_scaled(c.term, -alpha, matvec(c.term))
        residual = divide(tree.norm(term), size)
        # Past α λ = 2 a term turns round at each step; along negative curvature it grows without turning.
        overshot = tree.vdot(term, c.term) < 0
        done = ~(residual <= _DIVERGED) | (residual <= stop)
        return _Sum(term, x, c.num_products + 1, residual, overshot, done)

    one = jnp.ones_like(size)
    done = (size == 0) | (stop >= one)
    start = _Sum(b, tree.promoted_zeros_like(b), jnp.zeros((), jnp.int32), one, jnp.array(False), done)
    return iterate(step, start, length=num_terms, unroll=unroll)


class _Power(NamedTuple):
    direction: PyTree
    top: Array
    num_products: Array
    done: Array


def _power(scaled: ScaledSystem, direction: PyTree, unroll: int | bool) -> _Power:
    """Return a unit vector and ‖A v‖ at the last one: at most |λ|max, and growing from step to step."""
    cold = tree.norm(direction) == 0
    steps = jnp.where(cold, _FIRST_POWER_STEPS, _WARM_POWER_STEPS)
    mixed = tree.add_scaled(direction, _EXPLORE, normalized(scaled.b, scaled.size))
    size = tree.norm(mixed)

    def step(c: _Power) -> _Power:
        image = scaled.matvec(c.direction)
        top = tree.scaled_norm(image)
        usable = jnp.isfinite(top) & (top > 0)
        moved = optax.tree.where(usable, normalized(image, top), c.direction)
        return _Power(moved, jnp.where(usable, top, 0.0), c.num_products + 1, ~usable | (c.num_products + 1 >= steps))

    start = _Power(normalized(mixed, size), jnp.zeros_like(size), jnp.zeros((), jnp.int32), size == 0)
    return iterate(step, start, length=_FIRST_POWER_STEPS, unroll=unroll)
