"""Identity in place of the inverse Hessian, adapted by the optimizer (SAMA): two gradients per outer step.

    D = −∂update/∂gradient of the inner optimizer,     v = Dᵀ ∂L_out/∂w,     ε = step max(1, ‖w‖)/‖v‖
    dL_out/dλ ≈ ∂_λ L_out − [∂_λ L_in(w + εv) − ∂_λ L_in(w − εv)]/2ε

It is the derivative of one more training step, by central differences: for SGD with rate α, D is α times the identity;
for Adam it is one rate per weight. No second derivative is taken, and no copy of the weights is kept. The direction is
right where one step says what many steps do; the norm is too small, so use an outer optimizer that normalises (Adam).

Reference: Choe et al., Making scalable meta learning practical, arXiv 2310.05674; without an optimizer it is the
difference quotient of Liu, Simonyan & Yang, DARTS, arXiv 1806.09055.
"""

import jax
import jax.numpy as jnp

from hypergrad import dataflow, tree, validate
from hypergrad.estimators._paths import check_first_order_paths, refuse_solve_batch
from hypergrad.estimators._protocol import Estimate, Estimator
from hypergrad.problem import BilevelProblem, check_problem, refuse_residual, refuse_response
from hypergrad.training import Context, inner_loss_fn, outer_loss_fn, resolve_optimizer, update_with
from hypergrad.types import Params, PyTree

__all__ = ["sama"]


def sama(problem: BilevelProblem, *, step: float = 0.01) -> Estimator:
    """Differentiate one training step, with the optimizer's own scaling, by first derivatives alone.

    dL_out/dλ ≈ ∂_λ L_out − [∂_λ L_in(w + εv) − ∂_λ L_in(w − εv)]/2ε, v = Dᵀ ∂L_out/∂w, ε = step max(1, ‖w‖)/‖v‖.

    Args:
      problem: over plain weights, without a residual.
      step: > 0, the distance ‖εv‖ by which the weights move for the difference, relative to ‖w‖, or to 1 where ‖w‖ is
        smaller. In float32 1e-3 or more.

    Returns:
      An ``Estimator`` without state and info. Per estimate: two gradients of each loss, and one update of the inner
      optimizer. Without an inner optimizer, in a functional call, D is the identity.

    Raises:
      TypeError: no ``BilevelProblem``.
      ValueError: ``step`` ≤ 0; a problem with a residual or a response; at an estimate, an outer loss that does not
        depend on the weights, a hyperparameter leaf that enters neither loss (a learning rate, for instance), or an
        optimizer whose update has no derivative in the gradient: one that takes signs (``optax.lion``).

    Valid as the derivative of one step from here. As a hypergradient of the solution it is a rough approximation: it
    has the rate of the optimizer where H⁻¹ should be. A weight whose gradient is 0 and whose update has no derivative
    there (Adam, second moment 0) counts as fixed; where this leaves no weight, the hypergradient is NaN.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * ((w - h) ** 2).sum(), lambda w, h, b, k: (w**2).sum())
    >>> grad = hg.hypergrad(sama(problem))(jnp.ones(1), jnp.ones(1), (), (), key=None)
    >>> round(float(grad[0]), 3)
    2.0

    Reference: Choe et al., arXiv 2310.05674.
    """
    check_problem(problem)
    refuse_response("sama", problem)
    refuse_residual("sama", problem)
    validate.number("step", step, low=0.0, strict=True)

    def init(_: Context) -> tuple[PyTree, PyTree]:
        return (), ()

    def estimate(state: PyTree, ctx: Context) -> Estimate:
        refuse_solve_batch("sama", ctx)
        outer, inner = outer_loss_fn(ctx), inner_loss_fn(ctx)
        params, hyperparams = ctx.at.params, ctx.hyperparams
        check_first_order_paths("sama", ctx)
        (value, aux), (slope, direct) = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)(params, hyperparams)
        direction = tree.promote(_through_optimizer(ctx, slope))
        norm = tree.scaled_norm(direction)
        none = norm == 0
        epsilon = jnp.where(none, 0.0, step * jnp.maximum(1.0, tree.norm(params)) / jnp.where(none, 1.0, norm))
        wide, wide_hyperparams = tree.promote((params, hyperparams))  # a small move is below the rounding of bfloat16

        def slope_at(distance: jax.Array) -> PyTree:
            return jax.grad(inner, argnums=1)(tree.add_scaled(wide, distance, direction), wide_hyperparams)

        ahead, behind = slope_at(epsilon), slope_at(-epsilon)
        # No weight has a derivative of its update (Adam at second moment 0, optax.MultiSteps between its steps).
        width = jnp.where(none, jnp.where(tree.scaled_norm(slope) == 0, 1.0, jnp.nan), 2 * epsilon)
        hypergrad = jax.tree.map(lambda d, a, b: d - ((a - b) / width).astype(d.dtype), direct, ahead, behind)
        return Estimate(value, hypergrad, state, (), aux)

    unchecked = (
        "It is that of one optimizer step. Check hg.implicit(problem) here, which proves losses, keys and batches; "
        "then compare the two with hg.diagnostics.compare."
    )
    return Estimator(problem, init, estimate, unchecked=unchecked)


def _through_optimizer(ctx: Context, slope: Params) -> Params:
    """Return Dᵀ ∂L_out/∂w, D = −∂update/∂gradient at the next step; ∂L_out/∂w without an optimizer."""
    if ctx.inner_optimizer is None:
        return slope
    params = ctx.at.params
    optimizer = resolve_optimizer(ctx.inner_optimizer, ctx.problem.constrain(ctx.hyperparams))
    gradient = jax.grad(lambda w: inner_loss_fn(ctx)(w, ctx.hyperparams))(params)

    def update(gradient: Params) -> Params:
        return update_with("inner_optimizer", optimizer, gradient, ctx.at.inner_state, params)[0]

    updates, pull_back = jax.vjp(update, gradient)
    through = lambda s: pull_back(tree.match_dtypes(s, updates))[0]  # noqa: E731
    if len(dataflow.independent_leaves(through, slope)) == len(jax.tree.leaves(slope)):
        fix = "Its sama hypergradient would be zero by construction: train with another one, or use hg.implicit."
        got = "one that takes signs, or moves no weight"
        raise ValueError(validate.message("an inner optimizer whose update has a derivative", got, fix))
    fixed = lambda g, d: jnp.where((g == 0) & ~jnp.isfinite(d), 0.0, -d)  # noqa: E731
    return jax.tree.map(fixed, gradient, through(slope))
