"""The reference solver: write A down, one column per product, and factorise it.

    A = [matvec(e₁) … matvec(eₙ)]           x = A⁻¹ b by LU with partial pivoting

Use it to check the other solvers on problems of up to some thousand weights. n products, n² memory. This is
the one solver that ravels its vectors.
"""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hypergrad import tree, validate
from hypergrad.solvers._base import LinearSolver, ScaledSystem, Solution, assemble, divide
from hypergrad.types import Array, PyTree

__all__ = ["dense"]

_LARGEST = 10_000


def dense(rtol: float = 1e-5, *, damping: float = 0.0) -> LinearSolver:
    """Solve A x = b directly, A materialised.

    Args:
      rtol: relative residual up to which the solve counts as converged.
      damping: δ ≥ 0, solves (A + δI) x = b.

    Returns:
      A ``LinearSolver``; ``num_products`` is n. For a singular A, where the solution is not finite, x is 0 and the
      status ``NOT_FINITE``.

    Raises:
      ValueError: more than 10,000 unknowns (n² memory), ``rtol`` < 0, ``damping`` < 0.

    Valid when A is invertible, symmetric or not, definite or not.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> b = jnp.array([2.0, 3.0])
    >>> x, _, _ = dense().solve(hg.solvers.LinearSystem(lambda v: jnp.array([2.0, -1.0]) * v), b, ())
    >>> [round(float(v), 6) for v in x]
    [1.0, -3.0]

    Reference: Golub & Van Loan, Matrix Computations, 3.4.
    """

    def solve_scaled(scaled: ScaledSystem, state: PyTree) -> Solution:
        like = jax.eval_shape(lambda: scaled.b)
        flat, parts = ravel_pytree(tree.replicated(scaled.b))
        if flat.size > _LARGEST:
            fix = "Use solvers.cg or solvers.neumann, which need no matrix."
            raise ValueError(validate.message(f"at most {_LARGEST} unknowns for dense", str(flat.size), fix))

        def unravel(vector: Array) -> PyTree:
            return tree.placed_like(parts(vector), like)

        def column(e: Array) -> Array:
            return ravel_pytree(tree.replicated(scaled.matvec(unravel(e))))[0]

        matrix = jax.lax.map(column, jnp.eye(flat.size, dtype=flat.dtype), batch_size=min(64, flat.size)).T
        x = jnp.linalg.solve(matrix, flat)
        remainder = flat - jnp.matmul(matrix, x, precision="highest")
        residual = divide(jnp.linalg.norm(remainder), scaled.size)
        return Solution(unravel(x), state, flat.size, unravel(remainder), residual)

    return assemble(lambda _: (), solve_scaled, damping=damping, rtol=rtol)
