"""Unrolled differentiation: the best response is K optimizer steps, differentiated as the program that they are.

    w_{i+1}, s_{i+1} = Φ_i(w_i, s_i, λ)            dL_out(w_K, λ)/dλ  by reverse or forward mode through Φ

Use it for hyperparameters that act through the optimizer (rates, schedules, momenta, decoupled decay), for few steps
of fine-tuning, and wherever the inner problem is not solved. It is exact for the K steps of the window and blind to
what comes after: with short windows, learned rates are too small (short-horizon bias, arXiv 1803.02021).

Reference: Maclaurin, Duvenaud & Adams, arXiv 1502.03492; Franceschi et al., arXiv 1703.01785 (both modes); Shaban et
al., arXiv 1810.10667 (truncation); Kemaev et al., arXiv 2505.00793 (mixed mode).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import _checks, _probe, _tree
from hypergrad._problem import (
    BilevelParams,
    BilevelProblem,
    check_model_state,
    check_problem,
    check_variables,
    evaluate_outer,
    inner_gradient,
)
from hypergrad._rollout import (
    Rollout,
    Window,
    checkpoint_interval,
    make_window,
    resolve_optimizer,
    rollout,
    split_keys,
    split_window,
)
from hypergrad._types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree
from hypergrad.estimators._base import Estimate, HypergradEstimator, describe_estimate, refuse_zeros

Respond: TypeAlias = Callable[[Hyperparams], Rollout]
Judge: TypeAlias = Callable[[Hyperparams, Rollout], tuple[Array, Any]]

_MOST_FORWARD = 1_000


class UnrollMode(NamedTuple):
    """How an unroll is differentiated: made by ``hg.reverse`` or ``hg.forward``.

    Attributes:
      value_and_grad: ``(respond, judge, λ) -> ((value, aux), reached, gradient)`` of λ ↦ judge(λ, respond(λ)), where
        ``respond`` gives what the window reached and ``judge`` the outer loss ``(value, aux)`` there.
      is_reverse: whether it differentiates in reverse, so that checkpoints and the mixed mode apply.
      checkpoint_every: steps between checkpoints; None for the default of the window's length, infinite for none.
      truncate: differentiate the window's last steps only, this many; None for all.
      mixed: exploit the Hessian's symmetry in the backward pass of a step.
      unroll: of the scan over steps.
    """

    value_and_grad: Callable[[Respond, Judge, Hyperparams], tuple[tuple[Array, Any], Rollout, Hyperparams]]
    is_reverse: bool
    checkpoint_every: float | None
    truncate: int | None
    mixed: bool
    unroll: int | bool


def reverse(
    checkpoint_every: float | None = None, truncate: int | None = None, *, mixed: bool = True, unroll: int | bool = 1
) -> UnrollMode:
    """Differentiate an unroll in reverse: for any number of hyperparameters.

    Cost: 3 to 4 forward unrolls, one more with two levels of checkpoints. Memory, in copies of weights and optimizer
    state: K with a checkpoint a step, K/c + c with one every c.

    Args:
      checkpoint_every: c ≥ 1, steps between checkpoints. ``None``: each step, and from K = 50 on about every √K, two
        levels. ``math.inf``: none, every intermediate of every step is kept.
      truncate: T ≥ 1: only the last T steps of the window are differentiated, the others taken without. The
        hypergradient is then biased, by little where the inner loss is strongly convex along the way, and exactly
        zero for what acts in the first K − T steps alone. ``None``, or T ≥ K: all.
      mixed: take the derivative of a step's gradient by one ``jvp`` and one reverse pass, by the Hessian's symmetry,
        instead of reverse over reverse. Same values, less memory and time; ``False`` leaves all to JAX's autodiff,
        as models with ``custom_vjp`` operations get in any case.
      unroll: of the scan over steps; on CPU a network with convolutions wants ``True`` and a short window.

    Returns:
      An ``UnrollMode``, for ``hg.unrolled(problem, mode=...)``.

    Raises:
      ValueError: a number below 1.
      TypeError: something that is not a number.

    >>> reverse(checkpoint_every=10).checkpoint_every
    10

    Reference: Shaban et al., arXiv 1810.10667; Kemaev et al., arXiv 2505.00793.
    """
    if checkpoint_every is not None and checkpoint_every != math.inf:
        _checks.positive_int("checkpoint_every", checkpoint_every)
    if truncate is not None:
        _checks.positive_int("truncate", truncate)
    _checks.flag("mixed", mixed)
    _checks.unroll(unroll)
    return UnrollMode(_reverse_value_and_grad, True, checkpoint_every, truncate, mixed, unroll)


def forward(*, unroll: int | bool = 1) -> UnrollMode:
    """Differentiate an unroll forward, by tangents carried along: for few hyperparameters and long windows.

    Cost and memory: about one forward unroll and one copy of weights and optimizer state a hyperparameter, whatever K.

    Args:
      unroll: of the scan over steps.

    Returns:
      An ``UnrollMode``, for ``hg.unrolled(problem, mode=...)``; it refuses more than 1,000 hyperparameters.

    >>> forward().is_reverse
    False

    Reference: Franceschi et al., arXiv 1703.01785.
    """
    _checks.unroll(unroll)
    return UnrollMode(_forward_value_and_grad, False, math.inf, None, False, unroll)


def unrolled(problem: BilevelProblem, mode: UnrollMode | None = None) -> HypergradEstimator:
    """Differentiate the outer loss through the inner steps of a window.

    dL_out(w_K(λ), λ)/dλ where w_K is reached by K steps of the inner optimizer, which may be a function of λ.

    Args:
      problem: losses differentiable in weights and hyperparameters; the inner one twice.
      mode: ``hg.reverse()`` (the default) or ``hg.forward()``.

    Returns:
      A ``HypergradEstimator`` that needs an inner optimizer: an optax transformation, or a function from the
      constrained hyperparameters to one. K is the leading axis of ``inner_batch``. The estimate carries the weights
      and optimizer state that the window reached, without a second forward pass.

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
        raise TypeError(_checks.message("mode to be an UnrollMode", _checks.describe(mode), fix))

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
        _check_optimizer(problem, mode, inner_optimizer, variables)
        keys = split_keys(_checks.as_key(key))
        start = Rollout(params, inner_state, check_model_state(problem, model_state))
        window = make_window(inner_batch, keys.inner)

        def respond(hyperparams: Hyperparams) -> Rollout:
            return _passage(problem, mode, inner_optimizer, start, window, hyperparams)

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
        variables = BilevelParams(params, hyperparams)
        _check_optimizer(problem, mode, inner_optimizer, variables)
        optimizer = resolve_optimizer(inner_optimizer, problem.constrain(hyperparams))
        start = Rollout(params, optimizer.init(params), check_model_state(problem, model_state))
        window = make_window(inner_batch, split_keys(key).inner)
        # Plain autodiff: the mixed rule has no forward mode, which products of an outer solver take.
        return _passage(problem, mode._replace(mixed=False), inner_optimizer, start, window, hyperparams).params

    return HypergradEstimator(problem, lambda _variables: (), estimate, needs_rollout=True, respond=respond)


def _passage(
    problem: BilevelProblem,
    mode: UnrollMode,
    inner_optimizer: Any,
    start: Rollout,
    window: Window,
    hyperparams: Hyperparams,
) -> Rollout:
    """Take the window's steps, differentiably in the last ``mode.truncate`` of them."""

    def steps(hyperparams: Hyperparams, start: Rollout, window: Window) -> Rollout:
        length = len(window.numbers)
        every = mode.checkpoint_every if mode.checkpoint_every is not None else checkpoint_interval(length)
        gradient = inner_gradient(problem, hyperparams, mixed=mode.mixed)
        optimizer = resolve_optimizer(inner_optimizer, problem.constrain(hyperparams))
        return rollout(gradient, optimizer, start, window, unroll=mode.unroll, checkpoint_every=every)

    length = len(window.numbers)
    if mode.truncate is None or mode.truncate >= length:
        return steps(hyperparams, start, window)
    head, tail = split_window(window, length - mode.truncate)
    fixed = jax.lax.stop_gradient(hyperparams)
    return steps(hyperparams, jax.lax.stop_gradient(steps(fixed, jax.lax.stop_gradient(start), head)), tail)


def _reverse_value_and_grad(respond: Respond, judge: Judge, hyperparams: Hyperparams) -> Any:
    def outcome(hyperparams: Hyperparams) -> tuple[Array, tuple[Rollout, Any]]:
        reached = respond(hyperparams)
        value, aux = judge(hyperparams, reached)
        return value, (reached, aux)

    (value, (reached, aux)), gradient = jax.value_and_grad(outcome, has_aux=True)(hyperparams)
    return (value, aux), reached, gradient


def _forward_value_and_grad(respond: Respond, judge: Judge, hyperparams: Hyperparams) -> Any:
    """Carry one tangent a hyperparameter through the window; then pair them all with the outer loss's slope."""
    leaves, structure = jax.tree.flatten(hyperparams)
    count = sum(leaf.size for leaf in leaves)
    if count > _MOST_FORWARD:
        fix = "Each costs a forward unroll here: use mode=hg.reverse()."
        raise ValueError(
            _checks.message(f"at most {_MOST_FORWARD:,} hyperparameters in forward mode", f"{count:,}", fix)
        )
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    rows = jnp.split(jnp.eye(count), ends, axis=1)
    basis = [row.reshape(count, *x.shape).astype(x.dtype) for row, x in zip(rows, leaves, strict=True)]

    def along(direction: list[Array]) -> tuple[list[Array], Rollout]:
        def floating(hyperparams: Hyperparams) -> tuple[list[Array], Rollout]:
            reached = respond(hyperparams)
            return _tree.split_floating(reached)[0], reached

        tangent = jax.tree.unflatten(structure, direction)
        _, tangents, reached = jax.jvp(floating, (hyperparams,), (tangent,), has_aux=True)
        return tangents, reached

    tangents, reached = jax.vmap(along, out_axes=(0, None))(basis)
    floats, restore = _tree.split_floating(reached)
    judged = jax.value_and_grad(lambda h, floats: judge(h, restore(floats)), argnums=(0, 1), has_aux=True)
    (value, aux), (direct, slopes) = judged(hyperparams, floats)
    indirect = jax.vmap(lambda tangents: _tree.vdot(tangents, slopes))(tangents)
    parts = [part.reshape(x.shape).astype(x.dtype) for part, x in zip(jnp.split(indirect, ends), leaves, strict=True)]
    return (value, aux), reached, jax.tree.map(jnp.add, direct, jax.tree.unflatten(structure, parts))


def _check_optimizer(problem: BilevelProblem, mode: UnrollMode, inner_optimizer: Any, at: BilevelParams) -> None:
    if inner_optimizer is None:
        fix = "Pass inner_optimizer=optax.sgd(...), and batches with a leading window axis."
        raise ValueError(_checks.message("an inner_optimizer for unrolled differentiation", "None", fix))
    resolve_optimizer(inner_optimizer, problem.constrain(at.hyperparams))
    make = lambda h: resolve_optimizer(inner_optimizer, problem.constrain(h))  # noqa: E731
    _probe.check_differentiable(make, at.params, at.hyperparams, reverse=mode.is_reverse)


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
    floats, restore = _tree.split_floating(start)

    def step(floats: list[Array], hyperparams: Hyperparams) -> list[Array]:
        plain = mode._replace(truncate=None, checkpoint_every=math.inf)
        reached = _passage(problem, plain, inner_optimizer, restore(floats), first, hyperparams)
        return _tree.split_floating(reached)[0]

    reaches = _checks.dependence(lambda ct: jax.vjp(step, floats, hyperparams)[1](ct), floats)
    weights, state, model_state = (len(_tree.split_floating(part)[0]) for part in start)
    carried = [True] * weights + [False] * state + [problem.stateful] * model_state
    seen = [False] * len(jax.tree.leaves(hyperparams))
    length = len(window.numbers)
    for _ in range(min(length, mode.truncate or length)):
        found = reaches(carried)
        seen = [a or b for a, b in zip(seen, found[len(carried) :], strict=True)]
        before, carried = carried, [a or b for a, b in zip(carried, found, strict=False)]
        if carried == before:
            break
    unseen = [i for i, mark in enumerate(seen) if not mark]
    if unseen:
        value = jax.eval_shape(lambda h: judge(h, start)[0], hyperparams)
        direct = _checks.independent_leaves(
            lambda ct: jax.vjp(lambda h: judge(h, start)[0], hyperparams)[1](ct)[0], value
        )
        refuse_zeros("unrolled", hyperparams, unseen, direct)
