"""Conjugate gradients: the best x in the Krylov space of b, for a positive definite A.

    p = r = b;  repeat:  a = r·r / p·Ap;  x += a p;  r' = r − a Ap;  p = r' + (r'·r'/r·r) p

Use three warm, relatively damped products for networks in training (``cg(3, relative_damping=0.01,
warm_start=True)``), and as many undamped ones as it takes near a minimum: it needs √κ products where the Neumann
series needs κ, κ the condition number. A is never squared (no normal equations).

The damping is relative to the matrix: δ = ρ λ̂, with λ̂ the largest |p·Ap|/p·p of recent solves. The damping suppresses
eigenvectors of A with eigenvalues below δ. A few products cannot resolve these eigenvectors, and they change from batch
to batch.

A step counts if p·(A + δI)p > max(δ/10, 10 ε λ̂) p·p, with ε the machine epsilon. Curvature below that is negative or
rounding; in a singular A, a step along it is 1/ε times too long.

Reference: Hestenes & Stiefel, Methods of conjugate gradients for solving linear systems, 1952; for
hypergradients Pedregosa, Hyperparameter optimization with approximate gradient, arXiv 1602.02355.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import tree, validate
from hypergrad.solvers import _krylov
from hypergrad.solvers._base import (
    LinearSolver,
    Preconditioner,
    ScaledSystem,
    Solution,
    assemble,
    check_preconditioner,
    normalized,
    refuse_asymmetric,
)
from hypergrad.types import PyTree

__all__ = ["cg"]


class CGState(NamedTuple):
    """What the next solve starts from; () in place of what the settings do not need.

    Attributes:
      solution: tree like b, the last x divided by ‖b‖; zeros at first.
      largest: scalar, λ̂; 0 at first.
      preconditioner: the preconditioner's state.
    """

    solution: PyTree
    largest: PyTree
    preconditioner: PyTree


def cg(
    max_products: int,
    rtol: float = 1e-5,
    *,
    damping: float = 0.0,
    relative_damping: float = 0.0,
    warm_start: bool = False,
    preconditioner: Preconditioner | None = None,
    reorthogonalize: bool = False,
    unroll: int | bool = 1,
) -> LinearSolver:
    """Solve (A + δI) x = b by conjugate gradients, until ‖b − (A + δI) x‖ ≤ rtol·‖b‖.

    ``cg(3, relative_damping=0.01, warm_start=True)`` is the default of ``hg.implicit``: three products per outer step.

    Args:
      max_products: largest number of products with A, ≥ 1, one per step; those not needed cost nothing. A
        preconditioner's set-up comes on top.
      rtol: relative residual at which to stop, ≥ 0 (0: take all products). float32 reaches about 1e-6.
      damping: constant part of δ, ≥ 0.
      relative_damping: ρ ≥ 0, adds ρ λ̂ to δ, with λ̂ the largest |p·Ap|/p·p of recent solves, which fades by a tenth
        per solve. The first solve has no earlier λ̂, so it uses |p·Ap|/p·p of its first search direction. Modes of A
        below λ̂/100 are more than half damped at ρ = 0.01: right for joint training, wrong where the exact
        hypergradient is wanted.
      warm_start: start from the previous solution x, unless it is worse than 0 in both norms: ‖b − (A + δI) x‖ above
        3 ‖b‖, and ½ xᵀ(A + δI)x above bᵀx. Measuring that takes one of ``max_products``, which must be at least 2; the
        first solve does without.
      preconditioner: from ``hg.preconditioners``, or None. With ``relative_damping`` the first solve takes one product
        to find λ̂.
      reorthogonalize: make each direction conjugate to all directions before, not to the last alone. Two to five digits
        more from 50 products on, where rounding spoils the recurrence. Memory: 2 ``max_products`` vectors.
      unroll: True or an int for a scan so unrolled, in which steps after convergence are paid for
        (convolutions on CPU); 1 is a loop that stops early.

    Returns:
      A ``LinearSolver``. x is the last accepted iterate: CG minimises ½ xᵀ(A+δI)x − bᵀx, which never grows from step to
      step, while its residual may. If the curvature is not positive, the solver stops with status ``INDEFINITE``. If
      this happens at the first step, x is the starting point: 0, or the previous solution with ``warm_start``.
      ``residual`` is the recurrence's. If the estimated rounding error of this value is larger than both the value
      itself and ``rtol`` (for example with a large condition number κ in float32), the solver computes ‖b − (A + δI) x‖
      directly. This needs one extra product, on top of ``max_products``. For up to five products with
      ``relative_damping`` ≥ 0.01 no product is spent on
      that: ``residual`` is then at least the bound of its error, K ε/ρ, which is 4e-5 for the default in float32.

    Raises:
      ValueError: ``max_products`` < 1, or < 2 with ``warm_start`` or with both ``relative_damping`` and a
        preconditioner; a negative ``rtol`` or damping; at ``solve``, a system that is not symmetric, or a
        preconditioner that lacks something.
      TypeError: an argument of the wrong type.

    Valid when A + δI is symmetric positive definite, or semidefinite with b in its range. Elsewhere iterates
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
    validate.number("relative_damping", relative_damping, low=0.0)
    validate.flag("warm_start", warm_start)
    validate.flag("reorthogonalize", reorthogonalize)
    check_preconditioner(preconditioner)
    validate.unroll(unroll)
    if warm_start and max_products < 2:
        fix = "A warm start takes one product itself: pass max_products=2 or more."
        raise ValueError(validate.message("max_products to be at least 2 with warm_start", str(max_products), fix))

    if relative_damping > 0 and preconditioner is not None and max_products < 2:
        fix = "The first solve takes one product to find the scale of the damping: pass max_products=2 or more."
        wanted = "max_products of at least 2 with relative_damping and a preconditioner"
        raise ValueError(validate.message(wanted, str(max_products), fix))
    stateless = not (warm_start or relative_damping > 0 or preconditioner)

    def init(b_like: PyTree) -> PyTree:
        zeros = tree.promoted_zeros_like(b_like)
        scalar = jnp.zeros((), tree.wider(*(x.dtype for x in jax.tree.leaves(zeros))))
        state = CGState(
            zeros if warm_start else (),
            scalar if relative_damping > 0 else (),
            () if preconditioner is None else preconditioner.init(b_like),
        )
        return () if stateless else state

    def solve_scaled(scaled: ScaledSystem, state: PyTree) -> Solution:
        refuse_asymmetric("cg", scaled)
        stop = rtol if scaled.limit is None else scaled.limit
        zero, spent, extra = jnp.zeros_like(scaled.size), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        largest = state.largest if relative_damping > 0 else zero
        precondition, kept = None, ()
        if preconditioner is not None:
            if relative_damping > 0:
                largest, spent = _krylov.first_scale(scaled, largest, unroll=unroll)
            total = damping + relative_damping * largest
            given = scaled.system, scaled.b, total, largest, state.preconditioner
            precondition, kept, extra = preconditioner.prepare(*given)
        final, residual = _krylov.run(
            scaled,
            tree.scale(state.solution, scaled.size) if warm_start else None,
            max_products=max_products,
            stop=stop,
            damping=jnp.where(largest > 0, relative_damping * largest, -1.0) if relative_damping > 0 else zero,
            ratio=relative_damping,
            constant=damping,
            largest=_krylov.FADE * largest,
            num_products=spent,
            precondition=precondition,
            keep=reorthogonalize,
            unroll=unroll,
        )
        solution, scale = normalized(final.x, scaled.size) if warm_start else (), final.largest
        state = () if stateless else CGState(solution, scale if relative_damping > 0 else (), kept)
        used = jnp.maximum(final.damping, 0.0)
        count = final.num_products + extra
        return Solution(final.x, state, count, final.remainder, residual, final.status, used)

    return assemble(init, solve_scaled, damping=damping, rtol=rtol)
