"""Accelerated proximal gradients (FISTA) with restarts: constraints, and penalties with kinks.

    w' = prox_λ(y − t ∇L_in(y), t),     y' = w' + (θ − 1)/θ' (w' − w),     θ' = (1 + √(1 + 4θ²))/2

t shrinks until L_in(w') ≤ L_in(y) + ⟨∇L_in(y), w' − y⟩ + ‖w' − y‖²/(2t), and grows a little from step to step. Where
⟨y − w', w' − w⟩ > 0 the momentum points uphill, and θ returns to 1.

Reference: Beck & Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009; O'Donoghue & Candès, Adaptive
restart for accelerated gradient schemes, arXiv 1204.3982.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import tree, validate
from hypergrad.inner_solvers._base import InnerProblem, InnerSolution, InnerSolver, ended, repeat
from hypergrad.types import Array, Hyperparams, Params

__all__ = ["proximal"]

_LOOK = 5  # steps between two looks at the residual, which costs a gradient
_GROWTH = 1.05
_SMALLEST = 1e-12  # a step size at which the search gives up


class _Loop(NamedTuple):
    params: Params
    ahead: Params
    theta: Array
    step_size: Array
    norm: Array
    num_steps: Array
    num_gradients: Array
    stalled: Array
    finite: Array


def proximal(prox: Callable[[Params, Hyperparams, Any], Params], max_steps: int = 5000) -> InnerSolver:
    """Minimise L_in + Ω_λ by accelerated proximal gradients until ‖residual‖ ≤ tolerance.

    Args:
      prox: ``prox(params, hyperparams, step_size) -> params``, argmin_u Ω_λ(u) + ‖u − w‖²/(2 step_size), as for
        ``hg.residuals.proximal_gradient``, but with the constrained hyperparameters of the whole problem. A projection
        is a prox: ``lambda w, h, step: jnp.clip(w, 0, h)``.
      max_steps: steps of one solve, ≥ 1.

    Returns:
      An ``InnerSolver`` whose state is its step size t. The residual is measured every five steps.

    Raises:
      TypeError: ``prox`` is not callable.
      ValueError: ``max_steps`` < 1; at ``solve``, a problem without a residual: the hypergradient needs it too.

    Valid for a convex, smooth L_in and a convex Ω_λ; without convexity it ends at a stationary point, if at all.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> soft = lambda w, h, step: jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * h, 0.0)
    >>> data = jnp.array([3.0, 0.5])
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * jnp.sum((w - data) ** 2), lambda w, h, b, k: jnp.sum(w))
    >>> residual = hg.residuals.proximal_gradient(problem, soft, 1.0)
    >>> inner = hg.inner_solvers.InnerProblem(
    ...     lambda w: problem.inner_loss(w, 1.0, (), None), lambda w: residual(w, 1.0, (), None), 1.0)
    >>> solver = proximal(soft)
    >>> found = solver.solve(inner, jnp.zeros(2), solver.init(jnp.zeros(2)), 1e-6)
    >>> [round(float(w), 5) for w in found.params]
    [2.0, 0.0]
    """
    if not callable(prox):
        fix = "Pass prox(params, hyperparams, step_size) -> params."
        raise TypeError(validate.message("prox to be callable", validate.describe(prox), fix))
    validate.positive_int("max_steps", max_steps)

    def init(params: Params) -> Array:
        return jnp.ones((), tree.wider(*(leaf.dtype for leaf in jax.tree.leaves(params))))

    def solve(inner: InnerProblem, params: Params, state: Array, tolerance: Any) -> InnerSolution:
        if inner.residual is None:
            fix = "Pass hg.with_residual(problem, hg.residuals.proximal_gradient(problem, prox, step_size))."
            raise ValueError(validate.message("a problem with a residual for proximal", "one without", fix))
        residual, wide = inner.residual, tree.promote(params)
        dtype = tree.wider(*(leaf.dtype for leaf in jax.tree.leaves(wide)))
        loss = lambda w: inner.loss(w).astype(dtype)  # noqa: E731
        value_and_slope = jax.value_and_grad(loss)

        def search(at: _Loop) -> tuple[Params, Array, Array, Array]:
            value, slope = value_and_slope(at.ahead)
            rounding = 10 * jnp.finfo(at.norm.dtype).eps * jnp.abs(value)

            def moved(size: Array) -> Params:
                after = prox(tree.add_scaled(at.ahead, -size, slope), inner.hyperparams, size)
                validate.same_structure("what prox returns", after, "params", at.ahead)
                return tree.match_dtypes(after, at.ahead)

            def too_long(trial: tuple[Params, Array, Array]) -> Array:
                params, size, _ = trial
                change = optax.tree.sub(params, at.ahead)
                model = value + tree.vdot(slope, change) + tree.vdot(change, change) / (2 * size)
                return ~(loss(params) <= model + rounding) & (size > _SMALLEST)

            def shorter(trial: tuple[Params, Array, Array]) -> tuple[Params, Array, Array]:
                size = trial[1] / 2
                return moved(size), size, trial[2] + 1

            first = moved(at.step_size), at.step_size, jnp.ones((), jnp.int32)
            params, size, count = lax.while_loop(too_long, shorter, first)
            return params, size, count, jnp.isfinite(value)

        def step(at: _Loop) -> _Loop:
            params, size, count, finite = search(at)
            change = optax.tree.sub(params, at.params)
            uphill = tree.vdot(optax.tree.sub(at.ahead, params), change) > 0
            theta = jnp.where(uphill, 1.0, (1 + jnp.sqrt(1 + 4 * at.theta**2)) / 2)
            share = jnp.where(uphill, 0.0, (at.theta - 1) / theta)
            looks = (at.num_steps + 1) % _LOOK == 0
            norm = lax.cond(looks, lambda w: tree.norm(residual(w)).astype(at.norm.dtype), lambda _: at.norm, params)
            finite &= tree.all_finite(params) & jnp.isfinite(norm)
            still = ~(tree.max_abs(change) > 0) & looks
            new = _Loop(
                params,
                tree.add_scaled(params, share, change),
                theta,
                size * _GROWTH,
                norm,
                at.num_steps + 1,
                at.num_gradients + count + looks.astype(jnp.int32),
                still | ~(size > _SMALLEST),
                finite,
            )
            back = at._replace(num_steps=new.num_steps, num_gradients=new.num_gradients, finite=finite)
            return optax.tree.where(finite, new, back)

        norm = tree.norm(residual(wide))
        none, finite = jnp.zeros((), jnp.int32), jnp.isfinite(norm)
        one = jnp.ones((), norm.dtype)
        start = _Loop(wide, wide, one, state.astype(norm.dtype), norm, none, none + 1, jnp.array(False), finite)
        end = repeat(step, start, tolerance, max_steps)
        norm = tree.norm(residual(end.params))
        kept = jnp.where(end.finite, end.step_size, one).astype(state.dtype)
        counts = {"num_gradients": end.num_gradients + 1, "num_products": none}
        return ended(inner, end.params, params, kept, norm, tolerance, **counts, stalled=end.stalled, finite=end.finite)

    return InnerSolver(init, solve)
