"""No inverse at all: A⁻¹ is replaced by I (the T1–T2 hypergradient).

    x = b

Use it as the cheapest baseline: correct up to scale where the Hessian is close to a multiple of I, biased otherwise.

Reference: Luketina, Berglund, Greff & Raiko, Scalable gradient-based tuning of continuous regularization
hyperparameters, arXiv 1511.06727.
"""

import jax.numpy as jnp

from hypergrad import tree
from hypergrad.solvers._base import LinearSolver, ScaledSystem, Solution, assemble
from hypergrad.types import PyTree

__all__ = ["identity"]


def identity() -> LinearSolver:
    """Return b itself: x = b, the first Neumann term with step 1, without a product with A.

    Returns:
      A ``LinearSolver`` whose residual is not measured: NaN, with status ``TRUNCATED``. Under
      ``jax_debug_nans``, which stops at a NaN, it is measured by one product.

    Valid when A = I; often a descent direction otherwise.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> b = jnp.array([3.0])
    >>> x, _, info = identity().solve(hg.solvers.LinearSystem(lambda v: 0.5 * v), b, ())
    >>> float(x[0]), int(info.num_products), float(info.residual)
    (3.0, 0, nan)

    Reference: Luketina et al., arXiv 1511.06727.
    """

    def solve_scaled(scaled: ScaledSystem, state: PyTree) -> Solution:
        if tree.refuses_nan():
            return Solution(scaled.b, state, 1, *scaled.measure(scaled.b))
        return Solution(scaled.b, state, 0, None, jnp.nan)

    return assemble(lambda _: (), solve_scaled)
