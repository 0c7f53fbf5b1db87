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
from hypergrad.solvers._base import (
    DIVERGED,
    LinearSolver,
    Preconditioner,
    ScaledSystem,
    Solution,
    Status,
    assemble,
    check_preconditioner,
    divide,
    iterate,
    normalized,
)
from hypergrad.solvers._power import iterate_power
from hypergrad.types import Array, MatVec, PyTree

__all__ = ["neumann"]

_WARM_POWER_STEPS = 2


class NeumannState(NamedTuple):
    """What the next solve needs; () in place of what the settings do not need.

    Attributes:
      direction: tree like b, unit norm, close to the eigenvector of the largest |eigenvalue|; zeros at first.
      preconditioner: the preconditioner's state.
    """

    direction: PyTree
    preconditioner: PyTree


def neumann(
    num_terms: int,
    step_size: float | None = None,
    *,
    damping: float = 0.0,
    preconditioner: Preconditioner | None = None,
    unroll: int | bool = 1,
) -> LinearSolver:
    """Approximate A⁻¹ b by K terms of the Neumann series.

    x = α Σ_{k=0}^{K−1} (I − αA)ᵏ b, at K products with A; the last product gives the residual. With a preconditioner M
    it is α Σ (I − αM⁻¹A)ᵏ M⁻¹b, and α is in units of 1/(M⁻¹A).

    Args:
      num_terms: K ≥ 1, the number of terms. Only a solve with a ``tolerance`` stops earlier, where it is met.
      step_size: α > 0, in units of 1/A. None: 1/λ̂, λ̂ an estimate of A's largest |eigenvalue| by power
        iterations, 12 products at the first solve and 2 at each later one, which start from the direction in the
        solver's state and so follow an A that changes. λ̂ is at most |λ|max. The series converges if λ̂ is larger than
        |λ|max/2. If the estimate is too small and the series diverges, its residual points along the eigenvector of the
        largest |eigenvalue|; the next solve starts the power iteration from this residual.
      damping: δ ≥ 0 adds δI to A. Makes an indefinite A usable if δ exceeds its most negative eigenvalue.
      preconditioner: from ``hg.preconditioners``, or None. With a preconditioner, set ``step_size`` to None or to a
        value close to 1.
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
    check_preconditioner(preconditioner)

    stateless = step_size is not None and preconditioner is None

    def init(b_like: PyTree) -> PyTree:
        direction = () if step_size is not None else tree.promoted_zeros_like(b_like)
        kept = () if preconditioner is None else preconditioner.init(b_like)
        return () if stateless else NeumannState(direction, kept)

    def solve_scaled(scaled: ScaledSystem, state: PyTree) -> Solution:
        precondition: MatVec = _unpreconditioned
        kept, spent = (), jnp.zeros((), jnp.int32)
        if preconditioner is not None:
            fixed, unknown = jnp.asarray(damping, scaled.size.dtype), jnp.zeros_like(scaled.size)
            given = scaled.system, scaled.b, fixed, unknown, state.preconditioner
            precondition, kept, spent = preconditioner.prepare(*given)
        if step_size is not None:
            total = _series(scaled, step_size, num_terms, unroll, precondition)
            state = () if stateless else NeumannState((), kept)
        else:
            power = iterate_power(
                scaled, state.direction, warm_steps=_WARM_POWER_STEPS, unroll=unroll, precondition=precondition
            )
            total = _series(scaled, divide(1.0, power.top), num_terms, unroll, precondition)
            spent += power.num_products
            missed = total.overshot & jnp.isfinite(total.residual) & (total.residual > 1.0)
            last = normalized(total.term, total.residual * scaled.size)
            state = NeumannState(optax.tree.where(missed, last, power.direction), kept)
        status = jnp.where(total.residual > DIVERGED, Status.DIVERGED, Status.TRUNCATED)
        return Solution(total.x, state, total.num_products + spent, total.term, total.residual, status)

    return assemble(init, solve_scaled, damping=damping, averages=True)


def _unpreconditioned(remainder: PyTree) -> PyTree:
    return remainder


class _Sum(NamedTuple):
    term: PyTree
    x: PyTree
    num_products: Array
    residual: Array
    overshot: Array
    done: Array


def _series(scaled: ScaledSystem, alpha: Any, num_terms: int, unroll: int | bool, precondition: MatVec) -> _Sum:
    b, size, limit = scaled.b, scaled.size, scaled.limit
    stop = -1.0 if limit is None else limit  # −1: take all terms

    def step(c: _Sum) -> _Sum:
        move = precondition(c.term)
        x = tree.add_scaled(c.x, alpha, move)
        term = tree.add_scaled(c.term, -alpha, scaled.product(c.num_products, move))
        residual = divide(tree.norm(term), size)
        # Past α λ = 2 a term turns round at each step; along negative curvature it grows without turning.
        overshot = tree.vdot(term, c.term) < 0
        done = ~(residual <= DIVERGED) | (residual <= stop)
        return _Sum(term, x, c.num_products + 1, residual, overshot, done)

    one = jnp.ones_like(size)
    done = (size == 0) | (stop >= one)
    start = _Sum(b, tree.promoted_zeros_like(b), jnp.zeros((), jnp.int32), one, jnp.array(False), done)
    return iterate(step, start, length=num_terms, unroll=unroll)
