"""L-BFGS with a zoom line search: the solver for smooth inner losses of any size.

    w' = w − t P ∇L,     P from the last m pairs of steps and changes of the gradient,   t by strong Wolfe conditions

It is optax's, with a stopping rule. Reference: Liu & Nocedal, On the limited memory BFGS method for large scale
optimization, 1989; Nocedal & Wright, Numerical Optimization, 2nd ed. 2006, ch. 3.5.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import tree, validate
from hypergrad.inner_solvers._base import InnerProblem, InnerSolution, InnerSolver, refuse_residual, repeat, status_of
from hypergrad.types import Array, Params, PyTree

__all__ = ["lbfgs"]


class _Loop(NamedTuple):
    params: Params
    state: PyTree
    value: Array
    slope: Params
    norm: Array
    num_steps: Array
    num_gradients: Array
    stalled: Array
    finite: Array


def lbfgs(max_steps: int = 500, *, memory_size: int = 10, max_linesearch_steps: int = 20) -> InnerSolver:
    """Minimise the inner loss by L-BFGS until ‖∇_w L_in‖ ≤ tolerance.

    Args:
      max_steps: steps of one solve, ≥ 1.
      memory_size: m ≥ 1, pairs that the approximation of H⁻¹ is made of. Memory: 2m copies of the weights.
      max_linesearch_steps: gradients of one line search, ≥ 1.

    Returns:
      An ``InnerSolver``. It starts from the weights of the last solve; the pairs are new in every solve, because those
      of other hyperparameters mix two losses. ``STALLED`` where a line search no longer moves the weights: the rounding
      of the dtype (in float32 ‖∇L‖ of about 1e-6 of its terms), or a kink.

    Raises:
      ValueError, TypeError: a number out of its range; at ``solve``, a problem with a residual: its solution is no
        minimum of the inner loss. Use ``newton_cg``, or ``proximal``.

    Valid for an inner loss that is smooth and bounded below.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = hg.inner_solvers.InnerProblem(lambda w: jnp.sum(jnp.cosh(w - 1.0)), None, ())
    >>> solver = lbfgs()
    >>> found = solver.solve(inner, jnp.zeros(2), solver.init(jnp.zeros(2)), 1e-3)
    >>> bool(found.residual_norm <= 1e-3), hg.inner_solvers.InnerStatus(int(found.status)).name
    (True, 'CONVERGED')
    """
    for name, value in (
        ("max_steps", max_steps),
        ("memory_size", memory_size),
        ("max_linesearch_steps", max_linesearch_steps),
    ):
        validate.positive_int(name, value)
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps, initial_guess_strategy="one")
    optimizer = optax.lbfgs(memory_size=memory_size, linesearch=search)

    def solve(inner: InnerProblem, params: Params, _state: PyTree, tolerance: Any) -> InnerSolution:
        refuse_residual("lbfgs", inner)
        wide = tree.promote(params)
        dtype = tree.wider(*(leaf.dtype for leaf in jax.tree.leaves(wide)))
        loss = lambda w: inner.loss(w).astype(dtype)  # noqa: E731
        value_and_slope = jax.value_and_grad(loss)

        def step(at: _Loop) -> _Loop:
            given = {"value": at.value, "grad": at.slope, "value_fn": loss}
            made: Any = optimizer.update(at.slope, at.state, at.params, **given)
            updates, state = made
            params = optax.apply_updates(at.params, updates)
            searched = state[-1]
            # The search keeps value and gradient of its last point, which is the new one unless it failed.
            kept = jnp.isfinite(searched.value) & (searched.learning_rate > 0)
            value, slope = lax.cond(
                kept, lambda _: (searched.value, searched.grad), lambda w: _typed(value_and_slope(w), at), params
            )
            finite = jnp.isfinite(value) & tree.all_finite((params, slope))
            moved = tree.max_abs(updates) > 0
            better = (value < at.value) | (tree.norm(slope) < at.norm)
            spent = at.num_gradients + searched.info.num_linesearch_steps + jnp.where(kept, 0, 1)
            new = _Loop(
                params,
                state,
                value,
                slope,
                tree.norm(slope).astype(at.norm.dtype),
                at.num_steps + 1,
                spent.astype(jnp.int32),
                ~(moved & better),
                finite,
            )
            back = at._replace(
                num_steps=new.num_steps, num_gradients=new.num_gradients, stalled=new.stalled, finite=finite
            )
            return optax.tree.where(finite & moved & better, new, back)

        value, slope = value_and_slope(wide)
        norm = tree.norm(slope)
        none = jnp.zeros((), jnp.int32)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        start = _Loop(wide, optimizer.init(wide), value, slope, norm, none, none + 1, jnp.zeros_like(finite), finite)
        end = repeat(step, start, tolerance, max_steps)
        status = status_of(end.norm, tolerance, stalled=end.stalled, finite=end.finite)
        return InnerSolution(tree.match_dtypes(end.params, params), (), end.norm, end.num_gradients, none, status)

    return InnerSolver(lambda _: (), solve)


def _typed(found: tuple[Array, Params], at: _Loop) -> tuple[Array, Params]:
    return tree.match_dtypes(found, (at.value, at.slope))
