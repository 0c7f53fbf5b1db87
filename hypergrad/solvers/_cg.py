"""Conjugate gradients: the best x in the Krylov space of b, for a positive definite A.

    p = r = b;  repeat:  a = r·r / p·Ap;  x += a p;  r' = r − a Ap;  p = r' + (r'·r'/r·r) p

Use it near a minimum, or with ``damping`` that makes A positive definite: it needs √κ products where the
Neumann series needs κ, κ the condition number. A is never squared (no normal equations).

A step counts if p·Ap > 10 ε λ̂ p·p, with ε the machine epsilon and λ̂ the largest |p·Ap|/p·p of the solve so far.
Curvature below that is negative or rounding; in a singular A, a step along it is 1/ε times too long.

Reference: Hestenes & Stiefel, Methods of conjugate gradients for solving linear systems, 1952; for
hypergradients Pedregosa, Hyperparameter optimization with approximate gradient, arXiv 1602.02355.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import tree, validate
from hypergrad.solvers._base import (
    LinearSolver,
    ScaledSystem,
    Solution,
    Status,
    WarmStart,
    assemble,
    divide,
    iterate,
    normalized,
)
from hypergrad.types import Array, PyTree

__all__ = ["cg"]


def cg(
    max_products: int, rtol: float = 1e-5, *, damping: float = 0.0, warm_start: bool = False, unroll: int | bool = 1
) -> LinearSolver:
    """Solve A x = b by conjugate gradients, until ‖b − A x‖ ≤ rtol·‖b‖.

    Args:
      max_products: largest number of products with A, ≥ 1, one per step; those not needed cost nothing.
      rtol: relative residual at which to stop, ≥ 0 (0: take all products). float32 reaches about 1e-6.
      damping: δ ≥ 0, solves (A + δI) x = b.
      warm_start: start from the previous solution, if its residual is below ‖b‖. Measuring that takes one of
        ``max_products``, which must be at least 2; the first solve does without.
      unroll: True or an int for a scan so unrolled, in which steps after convergence are paid for
        (convolutions on CPU); 1 is a loop that stops early.

    Returns:
      A ``LinearSolver``. x is the last accepted iterate: CG minimises ½ xᵀAx − bᵀx, and its residual may grow on the
      way. At non-positive curvature the status is ``INDEFINITE``; x is 0 if that is the first step. ``residual`` is the
      recurrence's; where rounding may have moved it away from ‖b − A x‖ by more than itself or ``rtol`` (large κ in
      float32), one product on top of ``max_products`` measures it.

    Raises:
      ValueError: ``max_products`` < 1, or < 2 with ``warm_start``; ``rtol`` < 0; ``damping`` < 0; at ``solve``, a
        system that is not symmetric.
      TypeError: one of them is not a number.

    Valid when A is symmetric positive definite, or semidefinite with b in its range. Elsewhere iterates
    may grow before the solve stops: add damping.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> solver = cg(max_products=10)
    >>> b = jnp.array([2.0, 2.0])
    >>> x, _, info = solver.solve(hg.solvers.LinearSystem(lambda v: 4.0 * v), b, solver.init(b))
    >>> round(float(x[0]), 5), int(info.num_products)
    (0.5, 1)

    Reference: Pedregosa, arXiv 1602.02355.
    """
    validate.positive_int("max_products", max_products)
    validate.unroll(unroll)
    if warm_start and max_products < 2:
        fix = "A warm start takes one product itself: pass max_products=2 or more."
        raise ValueError(validate.message("max_products to be at least 2 with warm_start", str(max_products), fix))

    def init(b_like: PyTree) -> PyTree:
        return WarmStart(tree.promoted_zeros_like(b_like)) if warm_start else ()

    def solve_scaled(scaled: ScaledSystem, state: PyTree) -> Solution:
        if not scaled.system.symmetric:
            fix = "Use solvers.dense, or solvers.from_callable with jax.scipy.sparse.linalg.gmres or bicgstab."
            raise ValueError(validate.message("a symmetric system for cg", "symmetric=False", fix))
        stop = rtol if scaled.limit is None else scaled.limit
        start = _start(scaled, tree.scale(state.solution, scaled.size) if warm_start else None, stop)
        final = iterate(lambda c: _step(scaled, c, stop), start, length=max_products, unroll=unroll)
        remainder, residual, num_products = _verified(scaled, final, stop, unroll=unroll)
        kept = WarmStart(normalized(final.x, scaled.size)) if warm_start else ()
        return Solution(final.x, kept, num_products, remainder, residual, final.status)

    return assemble(init, solve_scaled, damping=damping, rtol=rtol)


class _Krylov(NamedTuple):
    x: PyTree
    remainder: PyTree
    direction: PyTree
    remainder_sq: Array
    direction_sq: Array
    stiffest: Array  # λ̂, a lower bound of ‖A‖
    num_products: Array
    status: Array
    trial: Array  # the next product measures a warm start
    done: Array


def _start(scaled: ScaledSystem, guess: PyTree | None, stop: Any) -> _Krylov:
    b, size = scaled.b, scaled.size
    square, direction, direction_sq, trial = size * size, b, size * size, jnp.array(False)
    if guess is not None:
        guess_sq = tree.vdot(guess, guess)
        trial = (guess_sq > 0) & jnp.isfinite(guess_sq)
        direction, direction_sq = optax.tree.where(trial, (guess, guess_sq), (b, square))
    zero, status = jnp.zeros((), jnp.int32), jnp.asarray(Status.TRUNCATED, jnp.int32)
    done = (size == 0) | (~trial & (stop >= 1.0))
    x, stiffest = tree.promoted_zeros_like(b), jnp.zeros_like(size)
    return _Krylov(x, b, direction, square, direction_sq, stiffest, zero, status, trial, done)


def _step(scaled: ScaledSystem, c: _Krylov, stop: Any) -> _Krylov:
    image = scaled.matvec(c.direction)
    curvature = tree.vdot(c.direction, image)
    rayleigh = divide(curvature, c.direction_sq)
    stiffest = jnp.maximum(c.stiffest, jnp.abs(rayleigh))
    # A warm start is tried as a step of length 1 from 0, after which the iteration begins anew.
    length = jnp.where(c.trial, 1.0, divide(c.remainder_sq, curvature))
    finite = jnp.isfinite(curvature) & jnp.isfinite(length * jnp.sqrt(c.direction_sq))
    accepted = finite & (c.trial | (rayleigh > 10 * _epsilon(c.x) * stiffest))
    length = jnp.where(accepted, length, 0.0)
    left = tree.add_scaled(c.remainder, -length, image)
    square = tree.vdot(left, left)
    dropped = c.trial & ~(square < c.remainder_sq)
    length, square = jnp.where(dropped, 0.0, length), jnp.where(dropped, c.remainder_sq, square)
    remainder = tree.add_scaled(c.remainder, -length, image)
    ratio = jnp.where(c.trial, 0.0, divide(square, c.remainder_sq))
    # A square that underflows would make the next quotients meaningless.
    small = (divide(jnp.sqrt(square), scaled.size) <= stop) | (square <= jnp.finfo(square.dtype).tiny / _epsilon(c.x))
    return _Krylov(
        tree.add_scaled(c.x, length, c.direction),
        remainder,
        tree.add_scaled(remainder, ratio, c.direction),
        square,
        square + ratio * ratio * c.direction_sq,  # new remainder ⟂ old direction
        stiffest,
        c.num_products + 1,
        jnp.where(accepted, c.status, jnp.where(finite, Status.INDEFINITE, Status.NOT_FINITE)),
        jnp.zeros_like(c.trial),
        ~accepted | ~jnp.isfinite(square) | small,
    )


def _verified(scaled: ScaledSystem, final: _Krylov, stop: Any, *, unroll: int | bool) -> tuple[PyTree, Array, Array]:
    """Return b − A x, its relative norm and the number of products: one more where the recurrence may be wrong.

    The two drift apart by at most about (steps)·ε·‖A‖·max‖x‖ (Greenbaum 1997), and ‖x‖ grows with the steps.
    """
    residual = divide(jnp.sqrt(final.remainder_sq), scaled.size)
    rounding = final.num_products.astype(residual.dtype) * _epsilon(final.x)
    drift = rounding * divide(tree.norm(tree.scale(final.x, final.stiffest)), scaled.size)
    needed = drift > jnp.maximum(residual, stop)
    start = final.remainder, residual, final.num_products, needed

    def again(c: tuple[PyTree, Array, Array, Array]) -> tuple[PyTree, Array, Array, Array]:
        return *scaled.measure(final.x), c[2] + 1, jnp.zeros_like(needed)

    if unroll is not True and unroll == 1:  # a loop of one round, which ``vmap`` does not run for all
        return lax.while_loop(lambda c: c[3], again, start)[:3]
    return lax.cond(needed, again, lambda c: c, start)[:3]


def _epsilon(x: PyTree) -> float:
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(x))
