"""Preconditioners: M ≈ A whose inverse is cheap, so that M⁻¹A has fewer distinct eigenvalues than A.

    jacobi()       M = D + δI                                        D = ``system.diagonal()``
    nystrom(m)     M = D + δI + Y (SᵀY)⁺ Yᵀ,   Y = (A − D) S         S: m random directions

``cg`` and ``neumann`` take one as ``preconditioner=``; ``recycled_cg`` makes its own from past directions.

Reference: Frangella, Tropp & Udell, Randomized Nyström preconditioning, arXiv 2110.02820.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import validate
from hypergrad.solvers import _block
from hypergrad.solvers._base import LinearSystem, Preconditioner, at_most_once, shifted_diagonal
from hypergrad.types import Array, MatVec, PyTree

__all__ = ["Preconditioner", "jacobi", "nystrom"]


def jacobi() -> Preconditioner:
    """Divide by the diagonal: M = D + δI.

    Returns:
      A ``Preconditioner`` without a state, which takes no product. D is ``system.diagonal()``: with
      ``hg.implicit(problem, solver, diagonal=...)`` an approximate diagonal of the inner Hessian. If each weight has
      its own decay, use the decays as this diagonal. A few large decays then no longer slow down the solve.

    Raises:
      ValueError: at a solve, a system without a diagonal.

    Valid when D approximates the diagonal of A, or the part of A that varies most from weight to weight. Entries of D +
    δ that are smaller than the rounding error are set to the size of the rounding error.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> d, b = jnp.array([1.0, 10.0, 100.0]), jnp.ones(3)
    >>> solver = hg.solvers.cg(1, preconditioner=jacobi())
    >>> x, _, info = solver.solve(hg.solvers.LinearSystem(lambda v: d * v, diagonal=lambda: d), b, solver.init(b))
    >>> [round(float(v), 2) for v in x]
    [1.0, 0.1, 0.01]

    Reference: Saad, Iterative methods for sparse linear systems, 2003, section 10.2.
    """

    def prepare(
        system: LinearSystem, b_like: PyTree, damping: Array, largest: Array, state: PyTree
    ) -> tuple[MatVec, PyTree, Array]:
        diagonal = shifted_diagonal(system, b_like, damping, largest)
        if diagonal is None:
            fix = (
                "Pass hg.implicit(problem, solver, diagonal=lambda params, hyperparams: ...), e.g. the weights' decays."
            )
            raise ValueError(validate.message("a system with a diagonal for jacobi()", "none", fix))
        return lambda r: _block.over(r, diagonal), state, jnp.zeros((), jnp.int32)

    return Preconditioner(lambda _: (), prepare)


class NystromState(NamedTuple):
    """What ``nystrom`` keeps from solve to solve.

    Attributes:
      basis: tree like b with a leading axis m, random directions S.
      products: (A − D) S.
      age: int32 scalar, solves since they were made; 0 at first.
    """

    basis: PyTree
    products: PyTree
    age: Array


def nystrom(rank: int, *, every: int = 10) -> Preconditioner:
    """Approximate A − D by ``rank`` products with random directions: M = D + δI + (A−D)S (Sᵀ(A−D)S)⁺ Sᵀ(A−D).

    Args:
      rank: m ≥ 1, the number of directions. Memory: 3m vectors during a solve, 2m between solves.
      every: make it anew at every n-th solve, from m products with A, which come on top of the solver's own.

    Returns:
      A ``Preconditioner``. D is ``system.diagonal()``, or 0 where none is known.

    Raises:
      ValueError: ``rank`` or ``every`` < 1; at a solve, a system without a random key.
      TypeError: they are not integers.

    Valid when A − D is close to positive semidefinite and has few large eigenvalues. Directions along which it is
    negative are left out.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> d, b = jnp.array([1000.0, 1.0, 1.0, 1.0]), jnp.ones(4)
    >>> solver = hg.solvers.cg(2, preconditioner=nystrom(1))
    >>> system = hg.solvers.LinearSystem(lambda v: d * v, key=jax.random.key(0))
    >>> _, _, info = solver.solve(system, b, solver.init(b))
    >>> int(info.num_products)
    3

    Reference: Frangella, Tropp & Udell, arXiv 2110.02820.
    """
    validate.positive_int("rank", rank)
    validate.positive_int("every", every)

    def init(b_like: PyTree) -> NystromState:
        block = _block.zeros(b_like, rank)
        return NystromState(block, jax.tree.map(jnp.copy, block), jnp.zeros((), jnp.int32))

    def prepare(
        system: LinearSystem, b_like: PyTree, damping: Array, largest: Array, state: NystromState
    ) -> tuple[MatVec, NystromState, Array]:
        if system.key is None:
            fix = "Pass a random key to the driver, e.g. key=jax.random.key(0)."
            raise ValueError(validate.message("a random key for nystrom", "key=None", fix))
        due, key = state.age % every == 0, jax.random.fold_in(system.key, rank)
        own, diagonal = system.diagonal(), shifted_diagonal(system, b_like, damping, largest)

        def make(_: Any) -> tuple[NystromState, Array]:
            # A clone: this loop has one round at most, which checks for reused keys do not know.
            basis = optax.tree.random_like(jax.random.clone(key), state.basis, sampler=jax.random.normal)
            products = lax.map(lambda v: optax.tree.cast_like(system.matvec(v), b_like), basis)
            if own is not None:
                products = jax.tree.map(lambda a, s, d: a - d.astype(s.dtype) * s, products, basis, own)
            return NystromState(basis, products, state.age), jnp.asarray(rank, jnp.int32)

        made, count = at_most_once(due, make, (state, jnp.zeros((), jnp.int32)), unroll=1)
        apply = _block.low_rank_inverse(made.basis, made.products, diagonal, damping)
        return apply, made._replace(age=made.age + 1), count

    return Preconditioner(init, prepare)
