"""Unrolled differentiation: the best response is K optimizer steps, differentiated as the program that they are.

    w_{i+1}, s_{i+1} = Φ_i(w_i, s_i, λ)            dL_out(w_K, λ)/dλ  by reverse or forward mode through Φ

Use it for hyperparameters that act through the optimizer (rates, schedules, momenta, decoupled decay), for few steps
of fine-tuning, and wherever the inner problem is not solved. It is exact for the K steps of the window and blind to
what comes after: with short windows, learned rates are too small (short-horizon bias, arXiv 1803.02021).

Reference: Maclaurin, Duvenaud & Adams, arXiv 1502.03492; Franceschi et al., arXiv 1703.01785 (both modes); Shaban et
al., arXiv 1810.10667 (truncation); Kemaev et al., arXiv 2505.00793 (mixed mode).
"""

import math
from typing import Any

import jax

from hypergrad import dataflow, tree, validate
from hypergrad.estimators import _probe
from hypergrad.estimators._base import Estimate, HypergradEstimator, describe_estimate, refuse_zeros
from hypergrad.estimators._modes import Judge, UnrollMode, reverse
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    check_model_state,
    check_problem,
    check_variables,
    evaluate_outer,
    inner_gradient,
)
from hypergrad.training import (
    Rollout,
    Window,
    checkpoint_interval,
    make_window,
    resolve_optimizer,
    rollout,
    split_keys,
    split_window,
)
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree


def unrolled(problem: BilevelProblem, mode: UnrollMode | None = None) -> HypergradEstimator:
    """Differentiate the outer loss through the inner steps of a window.

    dL_out(w_K(λ), λ)/dλ where w_K is reached by K steps of the inner optimizer, which may be a function of λ.

    Args:
      problem: losses differentiable in weights and hyperparameters; the inner one twice.
      mode: ``hg.reverse()`` (the default) or ``hg.forward()``.

    Returns:
      A ``HypergradEstimator`` that needs an inner optimizer: an optax transformation, or a function from the
      constrained hyperparameters to one. K is the leading axis of ``inner_batch``. An ``inner_state`` of None is a
      fresh one, whose dependence on λ is differentiated, too; a given one counts as independent. The estimate carries
      the weights and optimizer state that the window reached, without a second forward pass.

    Raises:
      TypeError: wrong ``problem`` or ``mode``.
      ValueError: at ``estimate``, no inner optimizer; one whose update has no finite derivative at a zero gradient
        (Adam without ``eps_root``), or no reverse-mode one; a hyperparameter leaf that enters neither the steps nor the
        outer loss, and so would get zero; with ``forward``, more than 1,000 hyperparameters.

    Exact, to rounding, for these K steps from these weights, which count as independent of λ. Through an optimizer
    that takes signs (lion) the loss's gradient has no derivative: only what acts on the update itself has one.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * (w**2).sum(), lambda w, h, b, k: w.sum())
    >>> fn = hg.hypergrad(hg.unrolled(problem), inner_optimizer=lambda rate: optax.sgd(rate))
    >>> float(fn(jnp.ones(1), jnp.array(0.5), jnp.arange(2), (), key=None))  # d(1 − rate)²/d rate
    -1.0

    Reference: Maclaurin, Duvenaud & Adams, arXiv 1502.03492; Franceschi et al., arXiv 1703.01785.
    """
    check_problem(problem)
    mode = reverse() if mode is None else mode
    if not isinstance(mode, UnrollMode):
        fix = "Pass mode=hg.reverse() or mode=hg.forward()."
        raise TypeError(validate.message("mode to be an UnrollMode", validate.describe(mode), fix))

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
        params, hyperparams = check_variables(variables)
        keys = split_keys(validate.as_key(key))
        start = Rollout(params, inner_state, check_model_state(problem, model_state))
        window = make_window(inner_batch, keys.inner)
        _check_optimizer(problem, mode, inner_optimizer, variables, window)

        def respond(hyperparams: Hyperparams) -> Rollout:
            reached = _passage(problem, mode, inner_optimizer, start, window, hyperparams)
            # The outer loss does not see the optimizer's state: no tangent of it, finite or not, may count.
            return reached._replace(inner_state=jax.lax.stop_gradient(reached.inner_state))

        def judge(hyperparams: Hyperparams, reached: Rollout) -> tuple[Array, Any]:
            at = BilevelParams(reached.params, hyperparams)
            result = evaluate_outer(problem, at, outer_batch, keys.outer, reached.model_state)
            return result.value, result.aux

        _refuse_unseen(problem, mode, inner_optimizer, start, window, hyperparams, judge)
        (value, aux), reached, gradient = mode.value_and_grad(respond, judge, hyperparams)
        info = describe_estimate(value, gradient, aux=aux)
        return Estimate(
            value, gradient, reached.params, reached.inner_state, estimator_state, reached.model_state, info
        )

    def respond(
        params: Params,
        hyperparams: Hyperparams,
        inner_batch: Batch,
        *,
        key: Array | None,
        inner_optimizer: Any = None,
        model_state: ModelState = None,
    ) -> Params:
        start = Rollout(params, None, check_model_state(problem, model_state))
        window = make_window(inner_batch, split_keys(key).inner)
        _check_optimizer(problem, mode, inner_optimizer, BilevelParams(params, hyperparams), window)
        if mode.truncate is not None and mode.truncate < len(window.numbers):
            fix = "The derivative in the first weights would be zero: choose a window of the steps that count."
            got = f"truncate={mode.truncate} for {len(window.numbers)} steps"
            raise ValueError(validate.message("best_response of an unroll that is differentiated whole", got, fix))
        # Plain autodiff: the mixed rule has no forward mode, which products of an outer solver take.
        return _passage(problem, mode._replace(mixed=False), inner_optimizer, start, window, hyperparams).params

    return HypergradEstimator(
        problem, lambda _variables: (), estimate, needs_rollout=True, respond=respond, unroll=mode.unroll
    )


def _passage(
    problem: BilevelProblem,
    mode: UnrollMode,
    inner_optimizer: Any,
    start: Rollout,
    window: Window,
    hyperparams: Hyperparams,
) -> Rollout:
    """Take the window's steps, the last ``mode.truncate`` differentiably; from a fresh state where it is None."""

    def steps(hyperparams: Hyperparams, start: Rollout, window: Window) -> Rollout:
        length = len(window.numbers)
        every = mode.checkpoint_every if mode.checkpoint_every is not None else checkpoint_interval(length)
        gradient = inner_gradient(problem, hyperparams, mixed=mode.mixed)
        optimizer = resolve_optimizer(inner_optimizer, problem.constrain(hyperparams))
        if start.inner_state is None:
            start = start._replace(inner_state=optimizer.init(start.params))
        return rollout(gradient, optimizer, start, window, unroll=mode.unroll, checkpoint_every=every)

    length = len(window.numbers)
    if mode.truncate is None or mode.truncate >= length:
        return steps(hyperparams, start, window)
    head, tail = split_window(window, length - mode.truncate)
    fixed = jax.lax.stop_gradient((hyperparams, start))
    plain = mode._replace(mixed=False, checkpoint_every=math.inf, truncate=None)
    before = jax.lax.stop_gradient(_passage(problem, plain, inner_optimizer, fixed[1], head, fixed[0]))
    return steps(hyperparams, before, tail)


def _check_optimizer(
    problem: BilevelProblem, mode: UnrollMode, inner_optimizer: Any, at: BilevelParams, window: Window
) -> None:
    if inner_optimizer is None:
        fix = "Pass inner_optimizer=optax.sgd(...), and batches with a leading window axis."
        raise ValueError(validate.message("an inner_optimizer for unrolled differentiation", "None", fix))
    make = lambda h: resolve_optimizer(inner_optimizer, problem.constrain(h))  # noqa: E731
    make(at.hyperparams)
    steps = len(window.numbers)
    _probe.check_differentiable(make, at.params, at.hyperparams, steps=steps, reverse=mode.is_reverse)


def _refuse_unseen(
    problem: BilevelProblem,
    mode: UnrollMode,
    inner_optimizer: Any,
    start: Rollout,
    window: Window,
    hyperparams: Hyperparams,
    judge: Judge,
) -> None:
    """Refuse leaves with no way into the steps that are differentiated, and none into the outer loss directly.

    What a cotangent of the weights reaches through one step backward is followed until it reaches nothing new.
    """
    first, _ = split_window(window, 1)
    given = start.inner_state is not None

    def initial(hyperparams: Hyperparams) -> PyTree:
        return resolve_optimizer(inner_optimizer, problem.constrain(hyperparams)).init(start.params)

    if not given:
        start = start._replace(inner_state=initial(hyperparams))
    floats, restore = tree.split_floating(start)

    def step(floats: list[Array], hyperparams: Hyperparams) -> list[Array]:
        plain = mode._replace(truncate=None, checkpoint_every=math.inf)
        reached = _passage(problem, plain, inner_optimizer, restore(floats), first, hyperparams)
        return tree.split_floating(reached)[0]

    reaches = dataflow.dependence(lambda ct: jax.vjp(step, floats, hyperparams)[1](ct), floats)
    weights, state, model_state = (len(tree.split_floating(part)[0]) for part in start)
    carried = [True] * weights + [False] * state + [problem.stateful] * model_state
    seen = [False] * len(jax.tree.leaves(hyperparams))
    length = len(window.numbers)
    differentiated = min(length, mode.truncate or length)
    for _ in range(differentiated):
        found = reaches(carried)
        seen = _either(seen, found[len(carried) :])
        before, carried = carried, _either(carried, found[: len(carried)])
        if carried == before:
            break
    if not given and differentiated == length:
        of_state = tree.split_floating(start.inner_state)[0]
        begins = dataflow.dependence(
            lambda ct: jax.vjp(lambda h: tree.split_floating(initial(h))[0], hyperparams)[1](ct), of_state
        )
        seen = _either(seen, begins(carried[weights : weights + state]))
    unseen = [i for i, mark in enumerate(seen) if not mark]
    refuse_zeros("unrolled", hyperparams, unseen, lambda h: judge(h, start)[0])


def _either(first: list[bool], second: list[bool]) -> list[bool]:
    return [a or b for a, b in zip(first, second, strict=True)]
