"""Anybody else's linear solver behind this library's protocol.

    x = solve(matvec, b, x0)           residual ‖b − A x‖/‖b‖ measured here, by one product

Use it for ``jax.scipy.sparse.linalg``, lineax, or a preconditioned solver of one's own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.solvers._base import LinearSolver, assemble, normalized
from hypergrad.types import Array, MatVec, PyTree


class ForeignState(NamedTuple):
    """What the next solve may start from.

    Attributes:
      solution: tree like b, the last finite x for b scaled to unit norm; zeros at first.
    """

    solution: PyTree


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
      warm_start: keep the last solution in the state and pass it as ``x0``.

    Returns:
      A ``LinearSolver``; ``num_steps`` is −1 (not known). Where x is not finite: ``x0`` instead, and
      ``converged=False``.

    Raises:
      TypeError: ``solve`` is not callable.
      ValueError: x has another structure than b, for instance because ``solve`` returns ``(x, info)``.

    Right as far as ``solve`` is; ``residual`` tells.

    >>> import jax, jax.numpy as jnp
    >>> gmres = from_callable(lambda A, b, x0: jax.scipy.sparse.linalg.gmres(A, b, x0)[0])
    >>> b = jnp.array([1.0, 2.0])
    >>> x, _, info = gmres.solve(lambda v: 2.0 * v, b, gmres.init(b))
    >>> [round(float(v), 5) for v in x]
    [0.5, 1.0]

    Reference: none; the residual is by definition.
    """
    if not callable(solve):
        fix = "Pass a function (matvec, b, x0) -> x."
        raise TypeError(validate.message("solve to be callable", validate.describe(solve), fix))

    def init(b_like: PyTree) -> PyTree:
        return ForeignState(tree.promoted_zeros_like(b_like)) if warm_start else ()

    def solve_scaled(matvec: MatVec, b: PyTree, size: Array, state: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
        start = tree.promoted_zeros_like(b)
        if isinstance(state, ForeignState):
            start = tree.scale(state.solution, size)
        answer = solve(matvec, b, start)
        validate.same_structure("the solution x of the wrapped solver", answer, "b", b)
        answer = optax.tree.cast_like(answer, b)
        finite = tree.all_finite(answer)
        solution = optax.tree.where(finite, answer, start)
        residual = tree.norm(tree.add_scaled(b, -1.0, matvec(solution)))
        residual = jnp.where(finite, residual, jnp.inf)
        kept = ForeignState(normalized(solution, size)) if warm_start else ()
        return solution, kept, jnp.asarray(-1, jnp.int32), residual

    return assemble(init, solve_scaled, damping=damping, rtol=rtol)
