"""Penalty method without second derivatives (F²SA): a second copy of the weights trains on L_in + L_out/σ.

    w  ← optimizer on L_in                      w_σ ← optimizer on L_in + L_out/σ         on the same batches and keys
    dL_out/dλ ≈ ∂_λ L_out(w_σ) + σ [∂_λ L_in(w_σ) − ∂_λ L_in(w)]                          error O(1/σ)

Use it where second derivatives do not exist or do not fit into memory: the cost is one more training run, one more copy
of weights and optimizer state, and first derivatives. The penalty σ multiplies the rounding of a difference of two
gradients: in float32 it pays up to about 1,000.

Reference: Kwon, Kwon, Wright & Nowak, A fully first-order method for stochastic bilevel optimization, arXiv 2301.10945.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.estimators._paths import check_first_order_paths, refuse_solve_batch
from hypergrad.estimators._protocol import Estimate, Estimator
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    check_problem,
    evaluate_inner,
    evaluate_outer,
    refuse_residual,
    refuse_response,
)
from hypergrad.training import Context, Trained, inner_loss_fn, outer_loss_fn, train
from hypergrad.types import Array, Batch, Hyperparams, ModelState, Params

__all__ = ["FirstOrderInfo", "first_order"]


class FirstOrderInfo(NamedTuple):
    """What the last estimate used.

    Attributes:
      penalty: scalar, σ.
      distance: scalar, ‖w_σ − w‖/‖w‖. It falls as 1/σ; below 1e-5 in float32 the estimate is mostly rounding.
      num_restarts: int32 scalar, how often the copy was not finite and started again from the weights.
    """

    penalty: Array
    distance: Array
    num_restarts: Array


class _State(NamedTuple):
    copy: Trained
    num_calls: Array
    num_restarts: Array


def first_order(problem: BilevelProblem, *, penalty: float | Callable[[Array], Array], num_steps: int = 1) -> Estimator:
    """Estimate the hypergradient from two copies of the weights, with first derivatives alone.

    dL_out/dλ ≈ ∂_λ L_out(w_σ) + σ [∂_λ L_in(w_σ) − ∂_λ L_in(w)], w_σ trained on L_in + L_out/σ beside w.

    Args:
      problem: over plain weights, without a residual.
      penalty: σ > 0, or ``call -> σ``, an optax schedule of the calls so far, for a penalty that grows, for example
        from 10 to 1,000. A larger σ has a smaller bias, and makes w_σ − w harder to tell from rounding.
      num_steps: how often the copy trains on the batches of a call, ≥ 1. More let it follow faster changes of λ.

    Returns:
      An ``Estimator`` whose state holds the copy: as much memory as the weights and the optimizer's state. It needs an
      inner optimizer, which trains the copy too, and an outer batch on every call. Its info is a ``FirstOrderInfo``.

    Raises:
      TypeError: no ``BilevelProblem``.
      ValueError: ``penalty`` ≤ 0 or ``num_steps`` < 1; a problem with a residual or a response; at a call, no inner
        optimizer or outer batch, an outer loss that does not depend on the weights, or a hyperparameter leaf that
        enters neither loss: a learning rate, for instance.

    Valid where both copies are near their minima: on a strongly convex inner loss the error is O(1/σ) there. On
    mini-batches both copies see the same ones, so that most of the noise cancels.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * ((w - h) ** 2).sum(), lambda w, h, b, k: (w**2).sum())
    >>> estimator = first_order(problem, penalty=100.0)
    >>> steps = hg.IndexedBatch((), jnp.arange(40))                              # 40 steps of a loss without data
    >>> grad = hg.hypergrad(estimator, optax.sgd(0.5))(jnp.zeros(1), jnp.ones(1), steps, (), key=None)
    >>> round(float(grad[0]), 2)                                                 # exact: 2 λ
    1.96

    Reference: Kwon et al., arXiv 2301.10945.
    """
    check_problem(problem)
    refuse_response("first_order", problem)
    refuse_residual("first_order", problem)
    if not callable(penalty):
        validate.number("penalty", penalty, low=0.0, strict=True)
    validate.positive_int("num_steps", num_steps)

    def sigma_of(num_calls: Array) -> Array:
        return jnp.asarray(penalty(num_calls) if callable(penalty) else penalty, float)

    def init(ctx: Context) -> tuple[_State, FirstOrderInfo]:
        none = jnp.zeros((), jnp.int32)
        copy = jax.tree.map(jnp.copy, ctx.start._replace(inner_loss=jnp.zeros(())))
        return _State(copy, none, none), FirstOrderInfo(sigma_of(none), jnp.zeros((), float), none)

    def advance(state: _State, ctx: Context) -> _State:
        outer_loss_fn(ctx)  # refuses a call without an outer batch
        sigma = sigma_of(state.num_calls)

        def loss(
            params: Params, hyperparams: Hyperparams, batch: Batch, key: Array | None, model_state: ModelState
        ) -> tuple[Array, ModelState]:
            at = BilevelParams(params, hyperparams)
            inner = evaluate_inner(ctx.problem, at, batch, key, model_state)
            outer = evaluate_outer(ctx.problem, at, ctx.outer_batch, ctx.keys.outer, model_state).value
            return inner.value + (outer / sigma).astype(inner.value.dtype), inner.model_state

        copy = state.copy
        for _ in range(num_steps):
            copy = train(ctx, start=copy, loss=loss)
        copy = tree.match_dtypes(copy, state.copy)
        finite = jnp.isfinite(tree.norm(copy.params)) & tree.all_finite(copy.model_state)
        fresh = ctx.at._replace(inner_loss=jnp.zeros_like(copy.inner_loss))
        copy = optax.tree.where(finite, copy, tree.match_dtypes(fresh, state.copy))
        return _State(copy, state.num_calls + 1, state.num_restarts + jnp.where(finite, 0, 1))

    def estimate(state: _State, ctx: Context) -> Estimate:
        refuse_solve_batch("first_order", ctx)
        sigma, copy = sigma_of(jnp.maximum(state.num_calls - 1, 0)), state.copy
        outer, inner, there = outer_loss_fn(ctx), inner_loss_fn(ctx), ctx._replace(at=copy)
        outer_there, inner_there = outer_loss_fn(there), inner_loss_fn(there)
        check_first_order_paths("first_order", ctx)
        value, aux = outer(ctx.at.params, ctx.hyperparams)
        direct = jax.grad(lambda h: outer_there(copy.params, h)[0])(ctx.hyperparams)
        penalised = jax.grad(lambda h: inner_there(copy.params, h) - inner(ctx.at.params, h))(ctx.hyperparams)
        factor = jnp.where(sigma > 0, sigma, jnp.nan)  # a schedule may give anything
        hypergrad = jax.tree.map(lambda d, p: d + factor.astype(p.dtype) * p, direct, penalised)
        apart = tree.norm(optax.tree.sub(tree.promote(copy.params), tree.promote(ctx.at.params)))
        size = tree.norm(ctx.at.params)
        distance = (apart / jnp.where(size > 0, size, 1.0)).astype(sigma.dtype)
        return Estimate(value, hypergrad, state, FirstOrderInfo(sigma, distance, state.num_restarts), aux)

    unchecked = (
        "Its error is O(1/penalty). Check hg.implicit(problem) here, which proves losses, keys and batches; then "
        "compare the two with hg.diagnostics.compare."
    )
    return Estimator(problem, init, estimate, advance=advance, unchecked=unchecked)
