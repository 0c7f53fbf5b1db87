"""The hypergradient by autodiff of a learned best response: hyper-training, self-tuning networks.

    φ ← SGD on E_ε L_in(w_φ(λ + σε), λ + σε),        dL_out/dλ = ∂L_out/∂λ + (∂w_φ/∂λ)ᵀ ∂L_out/∂w

The inner variable is what a response learns (``hg.responses``), so that one ordinary gradient of the outer loss is the
hypergradient: no linear solve, no unroll, memory that does not grow with steps. It also reaches hyperparameters through
which nothing differentiates (dropout rates, cutout sizes): the response learns their effect from perturbations.

Reference: Lorraine & Duvenaud, arXiv 1802.09419; MacKay et al., Self-tuning networks, arXiv 1903.03088.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hypergrad import dataflow, validate
from hypergrad.estimators._base import (
    Estimate,
    HypergradEstimator,
    describe_estimate,
    end_of_window,
    refuse_zeros,
)
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    check_model_state,
    check_problem,
    check_variables,
    evaluate_inner,
    evaluate_outer,
)
from hypergrad.training import Rollout, split_keys
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree


def direct(problem: BilevelProblem) -> HypergradEstimator:
    """Differentiate the outer loss through a learned response.

    dL_out/dλ = ∂L_out/∂λ + (∂w_φ/∂λ)ᵀ ∂L_out/∂w: one gradient of ``problem.outer_loss`` in λ at fixed φ.

    Args:
      problem: its weights are a function of the hyperparameters: made by ``hg.responses.with_response`` or
        ``self_tuning``, and trained under ``perturbed``; or losses that hold such a function themselves.

    Returns:
      A ``HypergradEstimator``. ``hg.best_response`` of it applies the response.

    Raises:
      TypeError: wrong ``problem``; at ``estimate``, an inner optimizer that is a function of the hyperparameters.
      ValueError: at ``estimate``, a hyperparameter leaf that enters neither the inner loss, by which a response would
        learn it, nor the outer loss: a learning rate, for instance.

    Right as far as the response has learned dw*/dλ: its Jacobian is that of a response trained on perturbations of
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

    def init(variables: BilevelParams) -> PyTree:
        check_variables(variables)
        return ()

    def estimate(
        variables: BilevelParams,
        inner_state: PyTree,
        estimator_state: PyTree,
        inner_batch: Batch,
        outer_batch: Batch,
        *,
        key: Key,
        inner_optimizer: Any = None,
        model_state: ModelState = None,
    ) -> Estimate:
        check_variables(variables)
        model_state = check_model_state(problem, model_state)
        keys = split_keys(validate.as_key(key))
        if inner_optimizer is not None:
            start = Rollout(variables.params, inner_state, model_state)
            window = inner_batch, keys.inner, inner_optimizer
            reached, inner_batch = end_of_window(problem, start, variables.hyperparams, *window)
            params, inner_state, model_state = reached
            variables = BilevelParams(params, variables.hyperparams)
        params, hyperparams = variables

        def outer(hyperparams: Hyperparams) -> tuple[Array, Any]:
            at = BilevelParams(params, hyperparams)
            result = evaluate_outer(problem, at, outer_batch, keys.outer, model_state)
            return result.value, result.aux

        _refuse_unseen(problem, variables, inner_batch, outer_batch, keys.outer, model_state)
        (value, aux), hypergrad = jax.value_and_grad(outer, has_aux=True)(hyperparams)
        info = describe_estimate(value, hypergrad, aux=aux)
        return Estimate(value, hypergrad, params, inner_state, estimator_state, model_state, info)

    def respond(
        params: Params,
        hyperparams: Hyperparams,
        inner_batch: Batch,
        *,
        key: Array | None,
        inner_optimizer: Any = None,
        model_state: ModelState = None,
    ) -> Params:
        if problem.response is None or problem.response.weights is None:
            fix = "Apply hg.responses.with_response or hg.responses.self_tuning to the problem."
            raise ValueError(validate.message("a problem with a response, for its weights", "one without", fix))
        if inner_optimizer is not None:
            start = Rollout(params, None, check_model_state(problem, model_state))
            window = inner_batch, split_keys(key).inner, inner_optimizer
            reached, _ = end_of_window(problem, start, lax.stop_gradient(hyperparams), *window)
            params = lax.stop_gradient(reached.params)
        return problem.response.weights(params, hyperparams)

    return HypergradEstimator(problem, init, estimate, needs_rollout=False, respond=respond)


def _refuse_unseen(
    problem: BilevelProblem,
    variables: BilevelParams,
    inner_batch: Batch,
    outer_batch: Batch,
    key: Array | None,
    model_state: ModelState,
) -> None:
    """Refuse leaves that enter neither loss over plain weights: no response can have learned them.

    Without a batch to look at the inner loss with (``()``, None), and for losses that hold a response of their own,
    only those leaves are refused that the outer loss does not depend on in any way.
    """
    params, hyperparams = variables
    view = problem.response
    if view is None or view.weights is None or not jax.tree.leaves(inner_batch):
        outer = lambda h: evaluate_outer(problem, BilevelParams(params, h), outer_batch, key, model_state).value  # noqa: E731
        return refuse_zeros("direct", hyperparams, list(range(len(jax.tree.leaves(hyperparams)))), outer)
    plain, center = view.base_problem, view.base_hyperparams(hyperparams)
    weights = jax.eval_shape(view.weights, params, hyperparams)

    def losses(values: tuple[Hyperparams, Params]) -> Array:
        at = BilevelParams(values[1], values[0])
        # The outer loss alone is evaluated: without a key for it, the inner one is still looked at with some key.
        inner_key = jax.random.key(0) if key is None else key
        inner = evaluate_inner(plain, at, inner_batch, inner_key, model_state).value
        return jnp.stack([inner, evaluate_outer(plain, at, outer_batch, key, model_state).value])

    count, total = len(jax.tree.leaves(center)), len(jax.tree.leaves((center, weights)))
    depends = dataflow.dependence(losses, (center, weights))
    unseen = [i for i in range(count) if not depends([i == j for j in range(total)])[0]]
    return refuse_zeros("direct", center, unseen, lambda _: jnp.zeros(()))
