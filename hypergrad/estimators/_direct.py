"""The hypergradient by autodiff of a learned best response: hyper-training, self-tuning networks.

    φ ← SGD on E_ε L_in(w_φ(λ + σε), λ + σε),        dL_out/dλ = ∂L_out/∂λ + (∂w_φ/∂λ)ᵀ ∂L_out/∂w

The inner variable is what a response learns (``hg.responses``), so that one ordinary gradient of the outer loss is the
hypergradient: no linear solve, no unroll, and memory that does not grow with steps. It also reaches hyperparameters
without a derivative (dropout rates, cutout sizes): the response learns their effect from perturbations.

Reference: Lorraine & Duvenaud, arXiv 1802.09419; MacKay et al., Self-tuning networks, arXiv 1903.03088.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad import data, dataflow, validate
from hypergrad.estimators._paths import check_gradient_paths, check_outer_path, direct_path, refuse_solve_batch
from hypergrad.estimators._protocol import Estimate, Estimator, train_first
from hypergrad.problem import BilevelParams, BilevelProblem, check_problem, evaluate_inner, evaluate_outer
from hypergrad.training import Context, outer_loss_fn
from hypergrad.types import Array, Hyperparams, Params, PyTree

__all__ = ["direct"]


def direct(problem: BilevelProblem) -> Estimator:
    """Differentiate the outer loss through a learned response.

    dL_out/dλ = ∂L_out/∂λ + (∂w_φ/∂λ)ᵀ ∂L_out/∂w: one gradient of ``problem.outer_loss`` in λ at fixed φ.

    Args:
      problem: its weights are a function of the hyperparameters: made by ``hg.responses.with_response`` or
        ``self_tuning``, and trained under ``perturbed``; or losses that hold such a function themselves.

    Returns:
      An ``Estimator`` without state and info. ``hg.best_response`` of it applies the response.

    Raises:
      TypeError: wrong ``problem``.
      ValueError: in a driver that trains, a response without ``perturbed`` or ``sampled``, which nothing would train;
        at an estimate, an outer loss that does not depend on the weights, or a hyperparameter leaf that enters neither
        the inner loss, by which a response would learn it, nor the outer loss: a learning rate, for instance.

    Valid as far as the response has learned dw*/dλ: its Jacobian is that of a response trained on perturbations of
    some scale, so let it train before λ moves (``every``), and move λ slower than it learns.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: ((w - h) ** 2).sum(), lambda w, h, b, k: (w ** 2).sum())
    >>> problem = hg.responses.with_response(problem, hg.responses.linear())
    >>> learned = hg.responses.LinearParams(jnp.ones(1), jnp.ones((1, 1)), ())                # w(λ) = 1 + (λ − c)
    >>> float(hg.hypergrad(direct(problem))(learned, jnp.ones(1), (), (), key=None)[0])
    2.0

    Reference: MacKay et al., arXiv 1903.03088; Lorraine & Duvenaud, arXiv 1802.09419.
    """
    check_problem(problem)

    def init(ctx: Context) -> tuple[PyTree, PyTree]:
        response = ctx.problem.response
        if ctx.inner_optimizer is not None and response is not None and response.losses_at is not None:
            fix = (
                "Wrap it: hg.responses.perturbed(problem, scale=0.5), or hg.responses.sampled. At the current "
                "hyperparameters alone a response learns no derivative."
            )
            raise ValueError(validate.message("a response that training perturbs", "one that nothing trains", fix))
        return (), ()

    def estimate(state: PyTree, ctx: Context) -> Estimate:
        refuse_solve_batch("direct", ctx)
        outer = outer_loss_fn(ctx)
        _check_paths(ctx)
        gradient = jax.value_and_grad(lambda h: outer(ctx.at.params, h), has_aux=True)
        (value, aux), hypergrad = gradient(ctx.hyperparams)
        return Estimate(value, hypergrad, state, (), aux)

    def best_response(ctx: Context) -> Params:
        response = ctx.problem.response
        if response is None or response.weights is None:
            fix = "Apply hg.responses.with_response or hg.responses.self_tuning to the problem."
            raise ValueError(validate.message("a problem with a response, for its weights", "one without", fix))
        return response.weights(train_first(ctx).at.params, ctx.hyperparams)

    return Estimator(problem, init, estimate, best_response=best_response)


def _check_paths(ctx: Context) -> None:
    """Refuse an outer loss that ignores the weights, and leaves that enter neither loss over plain weights.

    No response can have learned such leaves. Without a batch to evaluate the inner loss on (``()``, None), and for
    losses that hold a response of their own, only those leaves are refused that the outer loss does not depend on.
    """
    params, hyperparams, batch = ctx.at.params, ctx.hyperparams, data.take(ctx.inner_batches, -1)
    response, key, model_state = ctx.problem.response, ctx.keys.outer, ctx.at.model_state
    outer = outer_loss_fn(ctx)
    check_outer_path("direct", lambda w: outer(w, hyperparams)[0], params)
    if response is None or response.weights is None or not jax.tree.leaves(data.gathered(batch)):
        everything = range(len(jax.tree.leaves(hyperparams)))
        return check_gradient_paths("direct", hyperparams, everything, direct_path(ctx, params))
    base, center = dataclasses.replace(response.base_problem, prior=None), response.base_hyperparams(hyperparams)
    weights = jax.eval_shape(response.weights, params, hyperparams)

    def losses(values: tuple[Hyperparams, Params]) -> Array:
        at = BilevelParams(values[1], values[0])
        # The outer loss alone is evaluated: without a key for it, the inner one is still traced with some key.
        inner_key = jax.random.key(0) if key is None else key
        inner = evaluate_inner(base, at, batch, inner_key, model_state).value
        return jnp.stack([inner, evaluate_outer(base, at, ctx.outer_batch, key, model_state).value])

    count, total = len(jax.tree.leaves(center)), len(jax.tree.leaves((center, weights)))
    depends = dataflow.dependence(losses, (center, weights))
    unseen = [i for i in range(count) if not depends([i == j for j in range(total)])[0]]
    return check_gradient_paths("direct", center, unseen, _nothing)


def _nothing(_: Any) -> Array:
    return jnp.zeros(())
