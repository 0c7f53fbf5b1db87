"""Hypergradients without a training loop: the functional form of an estimator.

    hypergrad(estimator)(w, λ, inner_batch, outer_batch, key=key)  =  dL_out/dλ
    best_response(estimator)(w, λ, inner_batch, key=key)           =  w*, with dw*/dλ by the estimator

Use it in a notebook, in a test, or in an outer loop of your own. Each function compiles itself once per shape of its
arguments, and may be called inside ``jax.jit``, ``jax.vmap`` and other functions of this library.
"""

from collections.abc import Callable
from typing import Any

import jax

from hypergrad import data, tree, validate
from hypergrad.drivers import _guard, _phases
from hypergrad.drivers._guard import Guard, HypergradInfo
from hypergrad.estimators import Estimate, Estimator
from hypergrad.problem import BilevelParams, check_model_state, check_variables
from hypergrad.training import INIT, Context, Trained, inner_loss_fn, resolve_optimizer, split_keys
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree

__all__ = ["best_response", "compiled", "hypergrad", "one_estimate", "value_and_hypergrad"]


def value_and_hypergrad(
    estimator: Estimator,
    inner_optimizer: Any = None,
    *,
    guard: Guard | None = _guard.guard(),  # noqa: B008
) -> Callable[..., tuple[tuple[Array, Hyperparams], HypergradInfo]]:
    """Return a function that gives outer loss, hypergradient and info.

    ``fn(params, hyperparams, inner_batch, outer_batch, *, key, state=None, solve_batch=None, model_state=None)
    -> ((value, hypergrad), info)``

    Args:
      estimator: e.g. ``hg.implicit(problem, hg.solvers.cg(50))``.
      inner_optimizer: None: everything is evaluated at ``params``. An optax transformation, or a function of the
        constrained hyperparameters that returns one: leaves of ``inner_batch`` have a window axis K, and K steps from a
        fresh optimizer state are taken first.
      guard: decides ``info.skip_reason``. Where it skips, ``info.state`` is the given state (for a bad solve the new
        one, if finite), and the hypergradient is returned as it is: apply it only where ``info.skipped`` is False.

    Returns:
      The function. ``info.state`` is the estimator's state: pass it as ``state=`` to the next call for a warm start;
      None is a fresh one. ``solve_batch`` is the batch of ``implicit``'s linear solve and mixed product in place of
      ``inner_batch``, larger for instance, or ``hg.FreshBatches``. ``info.aux`` is the outer loss's aux. Calls with and
      without a state run one compiled program.

    Raises:
      TypeError: ``estimator`` is not an ``Estimator``.
      ValueError: an estimator that differentiates inner steps, without an ``inner_optimizer``; at the call, a state of
        another estimator or of other weights.

    Warns ``hg.OverfittingWarning`` where there is no prior and there are more than ten hyperparameters per example of
    the outer batch, or more than one where the batch is an ``hg.IndexedBatch``, which knows the size of its data.

    Valid under the estimator's assumption at ``params``; for ``implicit`` that ∇_w L_in = 0 there.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * ((w - h) ** 2).sum(), lambda w, h, b, k: (w**2).sum())
    >>> fn = value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(5)))
    >>> (value, grad), info = fn(jnp.array([3.0]), jnp.array([3.0]), (), (), key=None)
    >>> float(value), float(grad[0]), bool(info.solver.converged)
    (9.0, 6.0, True)

    Reference: the estimator's.
    """
    init, run = compiled(estimator, inner_optimizer, guard)

    def fn(
        params: Params,
        hyperparams: Hyperparams,
        inner_batch: Batch,
        outer_batch: Batch,
        *,
        key: Key,
        state: PyTree = None,
        solve_batch: Batch = None,
        model_state: ModelState = None,
    ) -> tuple[tuple[Array, Hyperparams], HypergradInfo]:
        variables, model_state = _checked(estimator, params, hyperparams, model_state)
        typed_key = validate.as_key(key)
        if state is None:
            state = init(variables, typed_key, model_state)
        else:
            like = jax.eval_shape(init, variables, typed_key, model_state)
            fix = "Pass info.state of an earlier call of the same function, or None."
            validate.same_structure("state", state, "a fresh one", like, dtypes=True, fix=fix)
            state = tree.placed_like(state, like)
        result, _, info = run(variables, inner_batch, outer_batch, typed_key, state, model_state, solve_batch)
        return (result.value, result.hypergrad), info

    return fn


def hypergrad(estimator: Estimator, inner_optimizer: Any = None) -> Callable[..., Hyperparams]:
    """Return a function that gives the hypergradient alone, as ``jax.grad`` does beside ``jax.value_and_grad``.

    ``fn(params, hyperparams, inner_batch, outer_batch, *, key, solve_batch=None, model_state=None) -> hypergrad``

    Args:
      estimator: as for ``value_and_hypergrad``.
      inner_optimizer: as for ``value_and_hypergrad``.

    Returns:
      The function; its result is a tree like the hyperparameters. It carries no status: where a solve may
      fail, use ``value_and_hypergrad`` and read its info.

    Raises:
      TypeError: as for ``value_and_hypergrad``.
      ValueError: as for ``value_and_hypergrad``.

    Valid under the estimator's assumption at ``params``.

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
        solve_batch: Batch = None,
        model_state: ModelState = None,
    ) -> Hyperparams:
        given = {"key": key, "solve_batch": solve_batch, "model_state": model_state}
        (_, gradient), _ = with_info(params, hyperparams, inner_batch, outer_batch, **given)
        return gradient

    return fn


def best_response(estimator: Estimator, inner_optimizer: Any = None) -> Callable[..., Params]:
    """Return the inner solution as a differentiable function of the hyperparameters: for nested problems.

    ``fn(params, hyperparams, inner_batch, *, key, model_state=None) -> params``

    ``implicit`` returns ``params`` as they are, with derivative −H⁻¹ ∂²L_in/∂w∂λ in the hyperparameters and zero in
    ``params``. ``unrolled`` runs the window from a fresh optimizer state and returns the weights that it reaches,
    differentiable in both. ``direct`` applies the response: of response parameters it returns the model's weights,
    differentiable in both (with an optimizer, which trains the response first, in the hyperparameters). Call it inside
    a loss of another problem. For two training stages, the outer loss calls it: the call does the fine-tuning, and the
    outer loss is evaluated at the weights that it returns. For three levels, the inner loss calls it: the call solves
    the lowest level. You can differentiate the function with ``jax.grad``, ``jax.jvp`` and their compositions, and use
    it inside other ``hg`` functions. For ``hg.unrolled``, only ``checkpoint_every`` and ``unroll`` of the ``mode`` have
    an effect. A ``mode`` with ``truncate`` smaller than the window is an error. Unlike in an estimate, a hyperparameter
    that has no effect is not refused: its derivative is zero.

    Args:
      estimator: ``hg.implicit(...)``, ``hg.unrolled(...)`` or ``hg.direct(...)``.
      inner_optimizer: as for ``value_and_hypergrad``; with ``implicit`` steps are taken first, undifferentiated.

    Returns:
      The function. It carries no status; where a solve gives nothing finite, derivatives are NaN.

    Raises:
      TypeError: ``estimator`` is not an ``Estimator``, or has no response of its own.
      ValueError: as for ``value_and_hypergrad``.

    Valid under the estimator's assumption: for ``implicit`` that ∇_w L_in = 0 at ``params`` and that the solver has
    converged; second derivatives take its solution as exact. A stateful problem's reached model state is not returned.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> inner = lambda w, a, batch, key: 0.5 * a * w**2 - w                                # w*(a) = 1/a
    >>> fn = best_response(hg.implicit(hg.BilevelProblem(inner, inner), hg.solvers.cg(3)))
    >>> response = lambda a: fn(jnp.array(0.5), a, (), key=None)
    >>> [float(f(jnp.array(2.0))) for f in (response, jax.grad(response), jax.grad(jax.grad(response)))]
    [0.5, -0.25, 0.25]

    Reference: Raghu et al., arXiv 2111.01754 (two stages); Blondel et al., arXiv 2105.15183.
    """
    _check(estimator, inner_optimizer, None)
    response = estimator.best_response
    if response is None:
        fix = "Use hg.implicit, hg.unrolled or hg.direct: a method that only estimates a gradient has no response."
        raise TypeError(validate.message("an estimator with a differentiable best response", "one without", fix))

    @_phases.compile_once
    def run(
        params: Params, hyperparams: Hyperparams, inner_batch: Batch, key: Array | None, model_state: ModelState
    ) -> Params:
        start = Trained(params, None if inner_optimizer is not None else (), model_state)
        return response(_context(estimator, inner_optimizer, None, hyperparams, start, inner_batch, None, key))

    def fn(
        params: Params, hyperparams: Hyperparams, inner_batch: Batch, *, key: Key, model_state: ModelState = None
    ) -> Params:
        validate.floating_leaves("params", params)
        if jax.tree.leaves(hyperparams):
            validate.floating_leaves("hyperparams", hyperparams)
        model_state = check_model_state(estimator.problem, model_state)
        return run(params, hyperparams, inner_batch, validate.as_key(key), model_state)

    return fn


def one_estimate(estimator: Estimator, inner_optimizer: Any = None) -> Callable[..., tuple[Estimate, Trained]]:
    """Return ``(variables, inner_batch, outer_batch, key, model_state) -> (Estimate, Trained)``, for diagnostics.

    ``Trained`` is where the estimate was made. The estimator's state is fresh.
    """
    init, run = compiled(estimator, inner_optimizer, None)

    def fn(
        variables: BilevelParams, inner_batch: Batch, outer_batch: Batch, key: Key, model_state: ModelState = None
    ) -> tuple[Estimate, Trained]:
        variables, model_state = _checked(estimator, *variables, model_state)
        typed_key = validate.as_key(key)
        state = init(variables, typed_key, model_state)
        result, at, _ = run(variables, inner_batch, outer_batch, typed_key, state, model_state)
        return result, at

    return fn


def compiled(estimator: Estimator, inner_optimizer: Any = None, guard: Guard | None = None) -> tuple[Any, Any]:
    """Return the compiled ``init`` and call of an estimator, for diagnostics.

    ``init(variables, key, model_state) -> state``, and ``call(variables, inner_batch, outer_batch, key, state,
    model_state) -> (Estimate, Trained, HypergradInfo)``; keys are typed.
    """
    _check(estimator, inner_optimizer, guard)
    trains = inner_optimizer is not None

    @jax.jit
    def init(variables: BilevelParams, key: Array | None, model_state: ModelState) -> PyTree:
        constrained = estimator.problem.constrain(variables.hyperparams)
        inner_state = resolve_optimizer(inner_optimizer, constrained).init(variables.params) if trains else ()
        start = Trained(variables.params, inner_state, model_state)
        init_key = None if key is None else jax.random.fold_in(key, INIT)
        ctx = _context(estimator, inner_optimizer, guard, variables.hyperparams, start, None, None, init_key)
        return tree.strip_weak_types(_phases.first_state(estimator, ctx)[0])

    @_phases.compile_once
    def run(
        variables: BilevelParams,
        inner_batch: Batch,
        outer_batch: Batch,
        key: Array | None,
        state: PyTree,
        model_state: ModelState,
        solve_batch: Batch = None,
    ) -> tuple[Estimate, Trained, HypergradInfo]:
        start = Trained(variables.params, None if trains else (), model_state)
        ctx = _context(estimator, inner_optimizer, guard, variables.hyperparams, start, inner_batch, outer_batch, key)
        ctx = ctx._replace(solve_batch=solve_batch)
        advanced, ctx, _, lost = _phases.train_and_advance(estimator, guard, state, ctx)
        if not trains and tree.refuses_nan():
            loss = inner_loss_fn(ctx)(variables.params, variables.hyperparams)
            ctx = ctx._replace(at=ctx.at._replace(inner_loss=loss))
        result = _phases.estimate(estimator, advanced, ctx)
        info = _guard.settle(guard, result, advanced, ctx.at.inner_loss, lost=lost)
        return result, ctx.at._replace(inner_loss=info.inner_loss), info

    return init, run


def _context(
    estimator: Estimator,
    inner_optimizer: Any,
    guard: Guard | None,
    hyperparams: Hyperparams,
    start: Trained,
    inner_batch: Batch,
    outer_batch: Batch,
    key: Array | None,
) -> Context:
    batches = inner_batch if inner_optimizer is not None or inner_batch is None else data.one_step(inner_batch)
    ends = start, start, batches, outer_batch, split_keys(key), inner_optimizer
    return Context(estimator.problem, hyperparams, *ends, guarded=guard is not None and guard.inner)


def _check(estimator: Any, inner_optimizer: Any, guard: Any) -> None:
    _phases.check_estimator(estimator, guard)
    if estimator.train is not None and inner_optimizer is None:
        fix = "Pass inner_optimizer=optax.sgd(...), and batches with a leading window axis."
        wanted = "an inner_optimizer for an estimator that differentiates inner steps"
        raise ValueError(validate.message(wanted, "None", fix))


def _checked(
    estimator: Estimator, params: Params, hyperparams: Hyperparams, model_state: ModelState
) -> tuple[BilevelParams, ModelState]:
    variables = check_variables(BilevelParams(params, hyperparams))
    return variables, check_model_state(estimator.problem, model_state)
