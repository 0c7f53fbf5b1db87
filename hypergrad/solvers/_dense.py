"""The oracle: write A down, one column a product, and factorise it.

    A = [matvec(e₁) … matvec(eₙ)]           x = A⁻¹ b by LU with partial pivoting

Use it to check the other solvers on problems of up to some thousand weights. n products, n² memory. This is
the one solver that ravels its vectors.
"""

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from hypergrad import tree, validate
from hypergrad.solvers._base import LinearSolver, assemble, no_state
from hypergrad.types import Array, MatVec, PyTree

_LARGEST = 10_000


def dense(rtol: float = 1e-5, *, damping: float = 0.0) -> LinearSolver:
    """Solve A x = b directly, A materialised.

    Args:
      rtol: relative residual up to which the solve counts as converged.
      damping: δ ≥ 0, solves (A + δI) x = b.

    Returns:
      A ``LinearSolver``; ``num_steps`` is n. For a singular A, where the solution is not finite: x = 0 and
      ``converged=False``.

    Raises:
      ValueError: more than 10,000 unknowns (n² memory), ``rtol`` < 0, ``damping`` < 0.

    Right for any invertible A, symmetric or not, definite or not.

    >>> import jax.numpy as jnp
    >>> b = jnp.array([2.0, 3.0])
    >>> x, _, _ = dense().solve(lambda v: jnp.array([2.0, -1.0]) * v, b, ())
    >>> [round(float(v), 6) for v in x]
    [1.0, -3.0]

    Reference: Golub & Van Loan, Matrix Computations, 3.4.
    """

    def solve_scaled(matvec: MatVec, b: PyTree, _: Array, state: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
        flat, unravel = ravel_pytree(b)
        if flat.size > _LARGEST:
            fix = "Use solvers.cg or solvers.neumann, which need no matrix."
            raise ValueError(validate.message(f"at most {_LARGEST} unknowns for dense", str(flat.size), fix))

        def column(e: Array) -> Array:
            return ravel_pytree(matvec(unravel(e)))[0]

        columns = jax.lax.map(column, jnp.eye(flat.size, dtype=flat.dtype), batch_size=min(64, flat.size))
        solution = unravel(jnp.linalg.solve(columns.T, flat))
        solution = optax.tree.where(tree.all_finite(solution), solution, tree.promoted_zeros_like(b))
        residual = tree.norm(tree.add_scaled(b, -1.0, matvec(solution)))
        return solution, state, jnp.asarray(flat.size, jnp.int32), residual

    return assemble(no_state, solve_scaled, damping=damping, rtol=rtol)
