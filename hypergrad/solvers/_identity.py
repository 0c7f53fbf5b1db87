"""No inverse at all: A⁻¹ is replaced by I (the T1–T2 hypergradient).

    x = b

Use it as the cheapest baseline: right up to scale where the Hessian is close to a multiple of I, biased
otherwise. Its residual shows how far it is from a solution.

Reference: Luketina, Berglund, Greff & Raiko, Scalable gradient-based tuning of continuous regularization
hyperparameters, arXiv 1511.06727.
"""

import jax.numpy as jnp

from hypergrad import tree
from hypergrad.solvers._base import LinearSolver, assemble, no_state
from hypergrad.types import Array, MatVec, PyTree


def identity() -> LinearSolver:
    """Return b itself: x = b, the first Neumann term with step 1.

    Costs one product with A, which serves ``residual`` = ‖b − A b‖/‖b‖ alone; compiled code that does not
    use the residual does not compute it.

    Returns:
      A ``LinearSolver``; ``num_steps`` 0, ``converged`` says residual < 1.

    Right only if A = I; a descent direction more often than that.

    >>> import jax.numpy as jnp
    >>> b = jnp.array([3.0])
    >>> x, _, info = identity().solve(lambda v: 0.5 * v, b, ())
    >>> float(x[0]), float(info.residual)
    (3.0, 0.5)

    Reference: Luketina et al., arXiv 1511.06727.
    """

    def solve_scaled(matvec: MatVec, b: PyTree, size: Array, state: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
        remainder = tree.norm(tree.add_scaled(b, -1.0, matvec(b)))
        return b, state, jnp.zeros_like(size, jnp.int32), remainder

    return assemble(no_state, solve_scaled)
