"""Any other linear solver behind this library's protocol.

    x = solve(matvec, b, x0)           residual ‖b − A x‖/‖b‖ measured here, by one product

Use it for ``jax.scipy.sparse.linalg``, lineax, or a preconditioned solver of your own.
"""

from collections.abc import Callable

import optax

from hypergrad import tree, validate
from hypergrad.solvers._base import LinearSolver, ScaledSystem, Solution, WarmStart, assemble, normalized
from hypergrad.types import MatVec, PyTree

__all__ = ["from_callable"]


def from_callable(
    solve: Callable[[MatVec, PyTree, PyTree], PyTree],
    rtol: float = 1e-5,
    *,
    damping: float = 0.0,
    warm_start: bool = False,
) -> LinearSolver:
    """Wrap ``solve(matvec, b, x0) -> x``.

    Args:
      solve: a traceable function on trees. ``b`` comes scaled by a power of two; ``x0`` is zero, or with
        ``warm_start`` the last solution.
      rtol: relative residual up to which the solve counts as converged; give ``solve`` its own tolerance.
      damping: δ ≥ 0; ``matvec`` is then v ↦ A v + δ v.
      warm_start: keep the last finite solution in the state and pass it as ``x0``.

    Returns:
      A ``LinearSolver``; ``num_products`` is −1 (not known). The residual is measured, by one more product.

    Raises:
      TypeError: ``solve`` is not callable.
      ValueError: x has another structure than b, for instance because ``solve`` returns ``(x, info)``.

    Valid when ``solve`` is; ``residual`` tells.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> gmres = from_callable(lambda A, b, x0: jax.scipy.sparse.linalg.gmres(A, b, x0)[0])
    >>> b = jnp.array([1.0, 2.0])
    >>> x, _, info = gmres.solve(hg.solvers.LinearSystem(lambda v: 2.0 * v), b, gmres.init(b))
    >>> [round(float(v), 5) for v in x]
    [0.5, 1.0]

    Reference: none; the residual is by definition.
    """
    if not callable(solve):
        fix = "Pass a function (matvec, b, x0) -> x."
        raise TypeError(validate.message("solve to be callable", validate.describe(solve), fix))

    def init(b_like: PyTree) -> PyTree:
        return WarmStart(tree.promoted_zeros_like(b_like)) if warm_start else ()

    def solve_scaled(scaled: ScaledSystem, state: PyTree) -> Solution:
        b, size = scaled.b, scaled.size
        start = tree.scale(state.solution, size) if warm_start else tree.promoted_zeros_like(b)
        x = solve(scaled.matvec, b, start)
        validate.same_structure("the solution x of the wrapped solver", x, "b", b)
        x = optax.tree.cast_like(x, b)
        if warm_start:
            state = WarmStart(normalized(optax.tree.where(tree.all_finite(x), x, start), size))
        return Solution(x, state, -1, *scaled.measure(x))

    return assemble(init, solve_scaled, damping=damping, rtol=rtol)
