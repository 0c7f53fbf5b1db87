"""L-BFGS with a zoom line search: the solver for smooth inner losses of any size.

    w' = w − t P ∇L,     P from the last m pairs of steps and changes of the gradient,   t by strong Wolfe conditions

Both are optax's. Where the search finds no lower loss, because changes of the loss are below the rounding of the dtype,
steps of length t = 1 follow, and the weights with the smallest ‖∇L‖ are returned.

Reference: Liu & Nocedal, On the limited memory BFGS method for large scale optimization, 1989; Nocedal & Wright,
Numerical Optimization, 2nd ed. 2006, ch. 3.5.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import tree, validate
from hypergrad.inner_solvers._base import InnerProblem, InnerSolution, InnerSolver, ended, refuse_residual, repeat
from hypergrad.types import Array, Params, PyTree

__all__ = ["lbfgs"]

_MISSES = 5  # steps in a row without a smaller gradient, at the end


class _Loop(NamedTuple):
    params: Params
    memory: PyTree
    search: PyTree
    value: Array
    slope: Params
    norm: Array
    num_steps: Array
    num_gradients: Array
    searching: Array
    best: tuple[Params, Array]
    misses: Array
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
      of other hyperparameters mix two losses. ``STALLED`` where no step lowers the loss or ‖∇L‖ any more: the rounding
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
    inverse = optax.scale_by_lbfgs(memory_size)

    def solve(inner: InnerProblem, params: Params, _state: PyTree, tolerance: Any) -> InnerSolution:
        refuse_residual("lbfgs", inner)
        wide = tree.promote(params)
        dtype = tree.wider(*(leaf.dtype for leaf in jax.tree.leaves(wide)))
        loss = lambda w: inner.loss(w).astype(dtype)  # noqa: E731
        value_and_slope, same = jax.value_and_grad(loss), 100 * jnp.finfo(dtype).eps

        def searched_step(at: _Loop, down: Params) -> tuple[_Loop, Array]:
            """Search along ``down``; return the new point, and whether it has a lower loss or gradient."""
            given = {"value": at.value, "grad": at.slope, "value_fn": loss}
            made: Any = search.update(down, at.search, at.params, **given)
            updates, searched = made
            params = optax.apply_updates(at.params, updates)
            # The search keeps value and gradient of its last point, which is the new one unless it failed.
            kept = jnp.isfinite(searched.value) & (searched.learning_rate > 0)
            value, slope = lax.cond(
                kept, lambda _: (searched.value, searched.grad), lambda w: _typed(value_and_slope(w), at), params
            )
            better = (tree.max_abs(updates) > 0) & ((value < at.value) | (tree.norm(slope) < at.norm))
            spent = at.num_gradients + searched.info.num_linesearch_steps + jnp.where(kept, 0, 1)
            new = at._replace(params=params, search=searched, value=value, slope=slope, num_gradients=spent)
            return tree.match_dtypes(new, at), better

        def unit_step(at: _Loop, down: Params) -> tuple[_Loop, Array]:
            """Take ``down`` as it is; return the new point, and whether to go on from there."""
            params = optax.apply_updates(at.params, down)
            value, slope = _typed(value_and_slope(params), at)
            new = at._replace(params=params, value=value, slope=slope, num_gradients=at.num_gradients + 1)
            near = (tree.norm(slope) < 10 * at.best[1]) & (value <= at.value + same * jnp.abs(at.value))
            return new, near & (at.misses < _MISSES)

        def step(at: _Loop) -> _Loop:
            made: Any = inverse.update(at.slope, at.memory, at.params)
            direction, memory = made
            down = tree.scale(direction, -1.0)
            new, better = lax.cond(at.searching, searched_step, unit_step, at, down)
            # A unit step that the loss overflows on is no failure of the loss: it ends the solve where it is.
            finite = (jnp.isfinite(new.value) & tree.all_finite((new.params, new.slope))) | ~at.searching
            better &= jnp.isfinite(new.value) & tree.all_finite(new.slope)
            new = new._replace(
                memory=tree.match_dtypes(memory, at.memory), norm=tree.norm(new.slope).astype(at.norm.dtype)
            )
            searching = at.searching
            at = optax.tree.where(better, new, at._replace(num_gradients=new.num_gradients))
            record = at.norm < at.best[1]
            return at._replace(
                num_steps=at.num_steps + 1,
                searching=searching & better,
                best=optax.tree.where(searching | record, (at.params, at.norm), at.best),
                misses=jnp.where(searching | record, 0, at.misses + 1),
                stalled=~(better | searching),
                finite=finite,
            )

        value, slope = value_and_slope(wide)
        norm = tree.norm(slope)
        none = jnp.zeros((), jnp.int32)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        no = jnp.zeros_like(finite)
        start = _Loop(
            wide,
            inverse.init(wide),
            search.init(wide),
            value,
            slope,
            norm,
            none,
            none + 1,
            ~no,
            (wide, norm),
            none,
            no,
            finite,
        )
        end = repeat(step, start, tolerance, max_steps)
        solved, norm = end.best
        counts = {"num_gradients": end.num_gradients, "num_products": none}
        return ended(inner, solved, params, (), norm, tolerance, **counts, stalled=end.stalled, finite=end.finite)

    return InnerSolver(lambda _: (), solve)


def _typed(found: tuple[Array, Params], at: _Loop) -> tuple[Array, Params]:
    return tree.match_dtypes(found, (at.value, at.slope))
