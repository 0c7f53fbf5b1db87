"""Conjugate gradients: the best x in the Krylov space of b, for a positive definite A.

    p = r = b;  repeat:  a = r·r / p·Ap;  x += a p;  r' = r − a Ap;  p = r' + (r'·r'/r·r) p

Use it near a minimum, or with ``damping`` that makes A positive definite: it needs √κ products where the
Neumann series needs κ, κ the condition number. Where p·Ap ≤ 0 the matrix is not positive definite: the
iteration stops there, keeps its x, and says so. A is never squared (no normal equations).

Reference: Hestenes & Stiefel, Methods of conjugate gradients for solving linear systems, 1952; for
hypergradients Pedregosa, Hyperparameter optimization with approximate gradient, arXiv 1602.02355.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import tree, validate
from hypergrad.solvers._base import LinearSolver, assemble, iterate, normalized
from hypergrad.types import Array, MatVec, PyTree


class CGState(NamedTuple):
    """What the next solve may start from.

    Attributes:
      solution: tree like b, the last x for b scaled to unit norm; zeros at first.
    """

    solution: PyTree


def cg(
    max_steps: int, rtol: float = 1e-5, damping: float = 0.0, *, warm_start: bool = False, unroll: int | bool = 1
) -> LinearSolver:
    """Solve A x = b by conjugate gradients, until ‖b − A x‖ ≤ rtol·‖b‖.

    Args:
      max_steps: largest number of steps, ≥ 1; each is one product with A, and steps not needed cost nothing.
      rtol: relative residual at which to stop, ≥ 0 (0: all steps). In float32 below about 1e-6 is idle.
      damping: δ ≥ 0, solves (A + δI) x = b.
      warm_start: start from the previous solution, for one product more; the state then holds it.
      unroll: True or an int for a scan so unrolled, in which steps after convergence are paid for
        (convolutions on CPU); 1 is a loop that stops early.

    Returns:
      A ``LinearSolver``. ``residual`` is the recurrence's ‖r‖; where rounding may have moved it away from
      ‖b − A x‖ by more than itself or ``rtol`` (large κ in float32), one more product measures it.
      ``converged`` says residual ≤ rtol. At non-positive curvature, at the first step x = 0.

    Raises:
      ValueError: ``max_steps`` < 1, ``rtol`` < 0, ``damping`` < 0.
      TypeError: one of them is not a number.

    Right if A is symmetric positive definite.

    >>> import jax.numpy as jnp
    >>> solver = cg(max_steps=10)
    >>> b = jnp.array([2.0, 2.0])
    >>> x, _, info = solver.solve(lambda v: 4.0 * v, b, solver.init(b))
    >>> round(float(x[0]), 5), int(info.num_steps)
    (0.5, 1)

    Reference: Pedregosa, arXiv 1602.02355.
    """
    validate.positive_int("max_steps", max_steps)
    validate.unroll(unroll)

    def init(b_like: PyTree) -> PyTree:
        return CGState(tree.promoted_zeros_like(b_like)) if warm_start else ()

    def solve_scaled(matvec: MatVec, b: PyTree, size: Array, state: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
        start = _start(matvec, b, size, state, rtol)
        final = iterate(lambda c: _step(matvec, c, rtol * size), start, length=max_steps, unroll=unroll)
        kept = CGState(normalized(final.solution, size)) if warm_start else ()
        return final.solution, kept, final.num_steps, _verified(matvec, b, final, rtol * size)

    return assemble(init, solve_scaled, damping=damping, rtol=rtol)


class _Krylov(NamedTuple):
    solution: PyTree
    remainder: PyTree
    direction: PyTree
    remainder_sq: Array
    direction_sq: Array
    stiffest: Array  # largest Rayleigh quotient seen: a lower bound of ‖A‖
    num_steps: Array
    done: Array


def _start(matvec: MatVec, b: PyTree, size: Array, state: PyTree, rtol: float) -> _Krylov:
    solution, remainder, square = tree.promoted_zeros_like(b), b, size * size
    if isinstance(state, CGState):
        guess = tree.scale(state.solution, size)
        left = tree.add_scaled(b, -1.0, matvec(guess))
        better = tree.vdot(left, left) < square
        solution, remainder = optax.tree.where(better, (guess, left), (solution, b))
        square = tree.vdot(remainder, remainder)
    zero = jnp.zeros_like(size)
    done = _small(square, rtol * size)
    return _Krylov(solution, remainder, remainder, square, square, zero, jnp.zeros((), jnp.int32), done)


def _step(matvec: MatVec, c: _Krylov, tolerance: Array) -> _Krylov:
    image = matvec(c.direction)
    curvature = tree.vdot(c.direction, image)
    length = c.remainder_sq / jnp.where(curvature > 0, curvature, 1.0)
    # At a breakdown the step has length 0: x stays, and what is NaN in the remainder is never used.
    sound = (curvature > 0) & jnp.isfinite(length * jnp.sqrt(c.direction_sq))
    length = jnp.where(sound, length, 0.0)
    solution = tree.add_scaled(c.solution, length, c.direction)
    remainder = tree.add_scaled(c.remainder, -length, image)
    size = jnp.where(sound, tree.vdot(remainder, remainder), c.remainder_sq)
    ratio = size / c.remainder_sq
    return _Krylov(
        solution,
        remainder,
        tree.add_scaled(remainder, ratio, c.direction),
        size,
        size + ratio * ratio * c.direction_sq,  # new remainder ⟂ old direction
        jnp.maximum(c.stiffest, jnp.where(sound, curvature / c.direction_sq, 0.0)),
        c.num_steps + 1,
        ~sound | ~jnp.isfinite(size) | _small(size, tolerance),
    )


def _verified(matvec: MatVec, b: PyTree, final: _Krylov, tolerance: Array) -> Array:
    """Return ‖b − A x‖, by one more product only where rounding may have spoilt the recurrence.

    The two drift apart by at most about (steps)·ε·‖A‖·max‖x‖ (Greenbaum 1997), and ‖x‖ grows with the steps.
    """
    residual = jnp.sqrt(final.remainder_sq)
    epsilon = jnp.finfo(residual.dtype).eps
    drift = final.num_steps.astype(residual.dtype) * epsilon * final.stiffest * tree.norm(final.solution)

    def measure() -> Array:
        return tree.norm(tree.add_scaled(b, -1.0, matvec(final.solution)))

    return lax.cond(drift > jnp.maximum(residual, tolerance), measure, lambda: residual)


def _small(square: Array, tolerance: Array) -> Array:
    return (jnp.sqrt(square) <= tolerance) | (square == 0)
