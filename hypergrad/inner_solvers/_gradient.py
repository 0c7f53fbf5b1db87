"""First-order training to a tolerance: any optax optimizer.

Its state stays warm from solve to solve. Use it where a training loop with that optimizer exists; ``lbfgs`` needs fewer
gradients on smooth problems.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.inner_solvers._base import InnerProblem, InnerSolution, InnerSolver, ended, refuse_residual, repeat
from hypergrad.types import Array, Params, PyTree

__all__ = ["gradient"]


class _Loop(NamedTuple):
    params: Params
    state: PyTree
    slope: Params
    norm: Array
    num_steps: Array
    stalled: Array
    finite: Array


def gradient(optimizer: Any, max_steps: int = 10_000) -> InnerSolver:
    """Take steps of an optax optimizer until ‖∇_w L_in‖ ≤ tolerance.

    Args:
      optimizer: an optax transformation that needs only gradients, state and weights: ``optax.sgd(0.1, momentum=0.9)``,
        ``optax.adam(1e-2)``.
      max_steps: steps of one solve, ≥ 1.

    Returns:
      An ``InnerSolver`` whose state is the optimizer's. ``STALLED`` where a step changes no weight.

    Raises:
      TypeError: ``optimizer`` is not an optax transformation.
      ValueError: ``max_steps`` < 1; at ``solve``, a problem with a residual: use ``proximal`` or ``newton_cg``.

    Valid where the optimizer converges at its rate: with a constant rate Adam stops short of a small tolerance.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> inner = hg.inner_solvers.InnerProblem(lambda w: 0.5 * jnp.sum((w - 1.0) ** 2), None, ())
    >>> solver = gradient(optax.sgd(0.5))
    >>> found = solver.solve(inner, jnp.zeros(1), solver.init(jnp.zeros(1)), 0.1)
    >>> found.params.tolist(), int(found.num_gradients)
    ([0.9375], 5)
    """
    tx = validate.transformation("optimizer", optimizer)
    validate.positive_int("max_steps", max_steps)

    def init(params: Params) -> PyTree:
        return tree.strip_weak_types(tx.init(tree.promote(params)))

    def solve(inner: InnerProblem, params: Params, state: PyTree, tolerance: Any) -> InnerSolution:
        refuse_residual("gradient", inner)
        slope_of = jax.grad(inner.loss)

        def step(at: _Loop) -> _Loop:
            updates, state = tx.update(at.slope, at.state, at.params)
            params = optax.apply_updates(at.params, updates)
            slope = tree.match_dtypes(slope_of(params), at.slope)
            finite = tree.all_finite((params, slope))
            norm, still = tree.norm(slope).astype(at.norm.dtype), tree.max_abs(optax.tree.sub(params, at.params)) == 0
            new = _Loop(params, tree.match_dtypes(state, at.state), slope, norm, at.num_steps + 1, still, finite)
            back = at._replace(num_steps=new.num_steps, stalled=still, finite=finite)
            return optax.tree.where(finite, new, back)

        wide = tree.promote(params)
        slope = slope_of(wide)
        norm, none = tree.norm(slope), jnp.zeros((), jnp.int32)
        start = _Loop(wide, state, slope, norm, none, jnp.array(False), jnp.isfinite(norm))
        end = repeat(step, start, tolerance, max_steps)
        counts = {"num_gradients": end.num_steps + 1, "num_products": none}
        return ended(
            inner, end.params, params, end.state, end.norm, tolerance, **counts, stalled=end.stalled, finite=end.finite
        )

    return InnerSolver(init, solve)
