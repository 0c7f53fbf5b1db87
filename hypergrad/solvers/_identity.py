"""No inverse at all: A⁻¹ is replaced by I (the T1–T2 hypergradient).

    x = b

Use it as the cheapest baseline: correct up to scale where the Hessian is close to a multiple of I, biased otherwise.

Reference: Luketina, Berglund, Greff & Raiko, Scalable gradient-based tuning of continuous regularization
hyperparameters, arXiv 1511.06727.
"""

import jax.numpy as jnp

from hypergrad.solvers._base import LinearSolver, Solution, assemble


def identity() -> LinearSolver:
    """Return b itself: x = b, the first Neumann term with step 1, without a product with A.

    Returns:
      A ``LinearSolver`` whose residual is not measured: NaN, with status ``TRUNCATED``.

    Valid when A = I; often a descent direction otherwise.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> b = jnp.array([3.0])
    >>> x, _, info = identity().solve(hg.solvers.LinearSystem(lambda v: 0.5 * v), b, ())
    >>> float(x[0]), int(info.num_products), float(info.residual)
    (3.0, 0, nan)

    Reference: Luketina et al., arXiv 1511.06727.
    """
    return assemble(lambda _: (), lambda scaled, state: Solution(scaled.b, state, 0, None, jnp.nan))
