"""Conjugate gradients that keep a subspace of past directions, for a sequence of similar systems.

    M = D + δI + (A − D)S (Sᵀ(A − D)S)⁺ Sᵀ(A − D)       S: m directions, with (A − D)S, from earlier solves
    x by conjugate gradients preconditioned with M, from the last solution
    S ← the m largest Ritz vectors of A − D relative to D + δI in span [S, new directions]

Use it where the same hypergradient is asked for again and again while A changes little: convex problems, full
batches, an accurate hypergradient for few products. A known diagonal D may change at will: only A − D is kept.

Reference: Parks, de Sturler, Mackey, Johnson & Maiti, Recycling Krylov subspaces for sequences of linear systems, 2006;
Frangella, Tropp & Udell, Randomized Nyström preconditioning, arXiv 2110.02820.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.solvers import _block, _krylov
from hypergrad.solvers._base import (
    LinearSolver,
    ScaledSystem,
    Solution,
    assemble,
    normalized,
    refuse_asymmetric,
    shifted_diagonal,
)
from hypergrad.types import Array, PyTree

__all__ = ["recycled_cg"]


class RecycledState(NamedTuple):
    """What the next solve starts from.

    Attributes:
      solution: tree like b, the last x divided by ‖b‖; zeros at first.
      basis: tree like b with a leading axis m: S. Zeros where there is no direction yet.
      products: the same, (A − D) S.
      largest: scalar, λ̂; 0 at first.
    """

    solution: PyTree
    basis: PyTree
    products: PyTree
    largest: Array


def recycled_cg(
    max_products: int, rank: int, rtol: float = 1e-12, *, relative_damping: float = 0.0, unroll: int | bool = 1
) -> LinearSolver:
    """Solve (A + δI) x = b by conjugate gradients that deflate with a subspace of past directions.

    Args:
      max_products: K ≥ 2, largest number of products with A per solve. The first measures the warm start.
      rank: m ≥ 1, dimension of the subspace kept. Memory: 2m vectors between solves, and about
        3m + 2K more during one.
        Arithmetic per solve, besides the products: about 8 (m + K)² operations per unknown, in matrix products.
      rtol: relative residual at which to stop.
      relative_damping: ρ ≥ 0, δ = ρ λ̂, as for ``cg``. The first solve takes one product to find λ̂.
      unroll: True or an int for a scan so unrolled (convolutions on CPU); 1 is a loop that stops early.

    Returns:
      A ``LinearSolver``, always warm: it starts from the previous solution, if its residual is below 3 ‖b‖. Its status
      is as for ``cg``. Where the system has a ``diagonal`` (``hg.implicit(..., diagonal=...)``), only A − D is kept, so
      that decays which change from step to step do no harm.

    Raises:
      ValueError: ``max_products`` < 2, ``rank`` < 1, ``rtol`` or ``relative_damping`` < 0; at ``solve``, a system that
        is not symmetric.
      TypeError: an argument of the wrong type.

    Valid when A + δI is symmetric positive definite. A − D should change little from solve to solve, as on full
    batches near an inner solution: what is kept is then up to date. On mini-batches use ``cg``.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> solver, b = recycled_cg(3, rank=8), jnp.ones(8)
    >>> system, state = hg.solvers.LinearSystem(lambda v: jnp.arange(1.0, 9.0) ** 2 * v), solver.init(b)
    >>> solve = jax.jit(lambda state: solver.solve(system, b, state))
    >>> for _ in range(8):
    ...     x, state, info = solve(state)
    >>> bool(info.residual < 1e-3)
    True

    Reference: Parks et al., Recycling Krylov subspaces for sequences of linear systems, 2006.
    """
    validate.positive_int("max_products", max_products)
    validate.positive_int("rank", rank)
    validate.number("relative_damping", relative_damping, low=0.0)
    validate.unroll(unroll)
    if max_products < 2:
        fix = "The warm start takes one product itself: pass max_products=2 or more."
        raise ValueError(validate.message("max_products of at least 2", str(max_products), fix))

    def init(b_like: PyTree) -> RecycledState:
        zeros = tree.promoted_zeros_like(b_like)
        one, other = (_block.zeros(b_like, rank) for _ in range(2))
        return RecycledState(zeros, one, other, jnp.zeros((), tree.wider(*(x.dtype for x in jax.tree.leaves(zeros)))))

    def solve_scaled(scaled: ScaledSystem, state: RecycledState) -> Solution:
        refuse_asymmetric("recycled_cg", scaled)
        stop = rtol if scaled.limit is None else scaled.limit
        largest, spent = state.largest, jnp.zeros((), jnp.int32)
        if relative_damping > 0:
            largest, spent = _krylov.first_scale(scaled, largest, unroll=unroll)
        damping = relative_damping * largest
        own = scaled.system.diagonal()
        shifted = shifted_diagonal(scaled.system, scaled.b, damping, largest)
        final, residual = _krylov.run(
            scaled,
            tree.scale(state.solution, scaled.size),
            max_products=max_products,
            stop=stop,
            damping=damping,
            ratio=relative_damping,
            constant=0.0,
            largest=_krylov.FADE * largest,
            num_products=spent,
            precondition=_block.low_rank_inverse(state.basis, state.products, shifted, damping),
            keep=True,
            unroll=unroll,
        )
        assert final.kept is not None
        directions, images, _ = final.kept
        images = tree.add_scaled(images, -damping, directions)
        if own is not None:
            images = jax.tree.map(lambda a, p, d: a - d.astype(p.dtype) * p, images, directions, own)
        both = lambda p, q: jax.tree.map(lambda x, y: jnp.concatenate([x, y]), p, q)  # noqa: E731
        basis, products = _block.ritz(both(state.basis, directions), both(state.products, images), shifted, rank)
        usable = tree.all_finite((basis, products))
        basis, products = optax.tree.where(usable, (basis, products), (state.basis, state.products))
        kept = RecycledState(normalized(final.x, scaled.size), basis, products, final.largest)
        return Solution(final.x, kept, final.num_products, final.remainder, residual, final.status, damping)

    return assemble(init, solve_scaled, rtol=rtol)
