"""Hypergradients without a training loop: the functional form of an estimator.

    hypergrad(estimator)(w, λ, inner_batch, outer_batch, key=key)  =  dL_out/dλ
    best_response(estimator)(w, λ, inner_batch, key=key)           =  w*, with dw*/dλ by the estimator

Use it in a notebook, in a test, or in an outer loop of one's own. Nothing is compiled here: wrap the result
in ``jax.jit``, as one does with ``jax.value_and_grad``.
"""

from collections.abc import Callable
from typing import Any

import jax

from hypergrad import validate
from hypergrad.estimators import Estimate, EvaluationInfo, HypergradEstimator
from hypergrad.problem import BilevelParams, check_model_state, check_variables
from hypergrad.training import resolve_optimizer
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params


def value_and_hypergrad(
    estimator: HypergradEstimator, inner_optimizer: Any = None
) -> Callable[..., tuple[tuple[Array, Hyperparams], EvaluationInfo]]:
    """Return a function that gives outer loss, hypergradient and info.

    ``fn(params, hyperparams, inner_batch, outer_batch, *, key, model_state=None) -> ((value, hypergrad), info)``

    Args:
      estimator: e.g. ``hg.implicit(problem, hg.solvers.cg(50))``.
      inner_optimizer: None: everything is evaluated at ``params``. An optax transformation: leaves of
        ``inner_batch`` carry a window axis K, and K steps from a fresh optimizer state are taken first.

    Returns:
      The function. ``info`` is an ``EvaluationInfo``: ``info.aux`` is the outer loss's aux, ``info.skipped`` says
      that value or hypergradient is not finite.

    Raises:
      TypeError: ``estimator`` is not a ``HypergradEstimator``.
      ValueError: an estimator that differentiates inner steps, without an ``inner_optimizer``.

    Right under the estimator's assumption at ``params``; for ``implicit`` that ∇_w L_in = 0 there.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * ((w - h) ** 2).sum(), lambda w, h, b, k: (w**2).sum())
    >>> fn = value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(5)))
    >>> (value, grad), info = fn(jnp.array([3.0]), jnp.array([3.0]), (), (), key=None)
    >>> float(value), float(grad[0]), bool(info.solver.converged)
    (9.0, 6.0, True)

    Reference: the estimator's.
    """
    estimate = estimator_function(estimator, inner_optimizer)

    def fn(
        params: Params,
        hyperparams: Hyperparams,
        inner_batch: Batch,
        outer_batch: Batch,
        *,
        key: Key,
        model_state: ModelState = None,
    ) -> tuple[tuple[Array, Hyperparams], EvaluationInfo]:
        result = estimate(BilevelParams(params, hyperparams), inner_batch, outer_batch, key, model_state)
        return (result.value, result.hypergrad), result.info

    return fn


def hypergrad(estimator: HypergradEstimator, inner_optimizer: Any = None) -> Callable[..., Hyperparams]:
    """Return a function that gives the hypergradient alone, as ``jax.grad`` does beside ``jax.value_and_grad``.

    ``fn(params, hyperparams, inner_batch, outer_batch, *, key, model_state=None) -> hypergrad``

    Args:
      estimator: as for ``value_and_hypergrad``.
      inner_optimizer: as for ``value_and_hypergrad``.

    Returns:
      The function; its result is a tree like the hyperparameters. It carries no status: where a solve may
      fail, use ``value_and_hypergrad`` and read its info.

    Raises:
      TypeError: as for ``value_and_hypergrad``.
      ValueError: as for ``value_and_hypergrad``.

    Right under the estimator's assumption at ``params``.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * ((w - h) ** 2).sum(), lambda w, h, b, k: (w**2).sum())
    >>> grad = hypergrad(hg.implicit(problem, hg.solvers.cg(5)))(jnp.ones(1), jnp.ones(1), (), (), key=None)
    >>> grad.tolist()
    [2.0]

    Reference: the estimator's.
    """
    with_info = value_and_hypergrad(estimator, inner_optimizer)

    def fn(
        params: Params,
        hyperparams: Hyperparams,
        inner_batch: Batch,
        outer_batch: Batch,
        *,
        key: Key,
        model_state: ModelState = None,
    ) -> Hyperparams:
        (_, gradient), _ = with_info(params, hyperparams, inner_batch, outer_batch, key=key, model_state=model_state)
        return gradient

    return fn


def best_response(estimator: HypergradEstimator, inner_optimizer: Any = None) -> Callable[..., Params]:
    """Return the inner solution as a differentiable function of the hyperparameters: what stages and levels nest by.

    ``fn(params, hyperparams, inner_batch, *, key, model_state=None) -> params``

    ``implicit`` returns ``params`` as they are, with derivative −H⁻¹ ∂²L_in/∂w∂λ in the hyperparameters and zero in
    ``params``. ``unrolled`` runs the window from a fresh optimizer state and returns the weights that it reaches,
    differentiable in both. ``direct`` applies the response: of response parameters it returns the model's weights,
    differentiable in both (with an optimizer, which trains the response first, in the hyperparameters). Call it inside
    the loss of another problem: two stages are an outer loss that fine-tunes, three levels an inner loss that holds a
    response. ``jax.grad``, ``jax.jvp``, their compositions and ``hg`` calls go through; of an unroll's ``mode`` only
    ``checkpoint_every`` and ``unroll`` matter here, and it may not truncate.
    Unlike in an estimate, a hyperparameter that has no effect is not refused: its derivative is zero.

    Args:
      estimator: ``hg.implicit(...)``, ``hg.unrolled(...)`` or ``hg.direct(...)``.
      inner_optimizer: as for ``value_and_hypergrad``; with ``implicit`` steps are taken first, undifferentiated.

    Returns:
      The function. It carries no status; where a solve gives nothing finite, derivatives are NaN.

    Raises:
      TypeError: ``estimator`` is not a ``HypergradEstimator``, or has no response of its own.
      ValueError: as for ``value_and_hypergrad``.

    Right under the estimator's assumption: for ``implicit`` that ∇_w L_in = 0 at ``params`` and that the solver has
    converged; second derivatives take its solution as exact. A stateful problem's reached model state is not returned.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> inner = lambda w, a, batch, key: 0.5 * a * w**2 - w                                # w*(a) = 1/a
    >>> fn = best_response(hg.implicit(hg.BilevelProblem(inner, inner), hg.solvers.cg(3)))
    >>> response = lambda a: fn(jnp.array(0.5), a, (), key=None)
    >>> [float(f(jnp.array(2.0))) for f in (response, jax.grad(response), jax.grad(jax.grad(response)))]
    [0.5, -0.25, 0.25]

    Reference: Raghu et al., arXiv 2111.01754 (two stages); Blondel et al., arXiv 2105.15183.
    """
    _check_estimator(estimator, inner_optimizer)
    respond = estimator.respond
    if respond is None:
        fix = (
            "Use hg.implicit or hg.unrolled: a method that only estimates a gradient has no response to differentiate."
        )
        raise TypeError(validate.message("an estimator with a differentiable response", "one without", fix))

    def fn(
        params: Params, hyperparams: Hyperparams, inner_batch: Batch, *, key: Key, model_state: ModelState = None
    ) -> Params:
        validate.floating_leaves("params", params)
        if jax.tree.leaves(hyperparams):
            validate.floating_leaves("hyperparams", hyperparams)
        options = {"inner_optimizer": inner_optimizer, "model_state": model_state}
        return respond(params, hyperparams, inner_batch, key=validate.as_key(key), **options)

    return fn


def _check_estimator(estimator: Any, inner_optimizer: Any) -> None:
    if not isinstance(estimator, HypergradEstimator):
        fix = "Pass e.g. hg.implicit(problem, hg.solvers.cg(50))."
        raise TypeError(validate.message("a HypergradEstimator", validate.describe(estimator), fix))
    if estimator.needs_rollout and inner_optimizer is None:
        fix = "Pass inner_optimizer=optax.sgd(...), and batches with a leading window axis."
        raise ValueError(
            validate.message("an inner_optimizer for an estimator that differentiates inner steps", "None", fix)
        )


def estimator_function(estimator: HypergradEstimator, inner_optimizer: Any) -> Callable[..., Estimate]:
    """Return ``(variables, inner_batch, outer_batch, key, model_state) -> Estimate``, with fresh states."""
    _check_estimator(estimator, inner_optimizer)
    problem = estimator.problem

    def estimate(variables: BilevelParams, inner_batch: Batch, outer_batch: Batch, key: Any, state: Any) -> Estimate:
        check_variables(variables)
        inner_state: Any = None if estimator.needs_rollout else ()
        if inner_optimizer is not None and not estimator.needs_rollout:
            optimizer = resolve_optimizer(inner_optimizer, problem.constrain(variables.hyperparams))
            inner_state = optimizer.init(variables.params)
        return estimator.estimate(
            variables,
            inner_state,
            estimator.init(variables),
            inner_batch,
            outer_batch,
            key=validate.as_key(key),
            inner_optimizer=inner_optimizer,
            model_state=check_model_state(problem, state),
        )

    return estimate
