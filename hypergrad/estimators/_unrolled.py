"""Unrolled differentiation: the best response is K optimizer steps, differentiated as a program.

    w_{i+1}, s_{i+1} = Φ_i(w_i, s_i, λ)            dL_out(w_K, λ)/dλ  by reverse or forward mode through Φ

Use it for hyperparameters that act through the optimizer (rates, schedules, momenta, decoupled decay), for few steps
of fine-tuning, and wherever the inner problem is not solved. It is exact for the K steps of the window and blind to
what comes after: with short windows, learned rates are too small (short-horizon bias, arXiv 1803.02021).

Reference: Maclaurin, Duvenaud & Adams, arXiv 1502.03492; Franceschi et al., arXiv 1703.01785 (both modes); Shaban et
al., arXiv 1810.10667 (truncation); Kemaev et al., arXiv 2505.00793 (mixed mode).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import data, dataflow, tree, validate
from hypergrad.estimators import _probe
from hypergrad.estimators._modes import UnrollMode, carried, paired, reverse
from hypergrad.estimators._paths import check_gradient_paths, check_outer_path, direct_path, refuse_solve_batch
from hypergrad.estimators._protocol import Estimate, Estimator
from hypergrad.problem import BilevelProblem, check_problem
from hypergrad.training import Context, Trained, outer_loss_fn, resolve_optimizer, train
from hypergrad.types import Array, Hyperparams, Params, PyTree

__all__ = ["ForwardInfo", "unrolled"]


class ForwardInfo(NamedTuple):
    """What persistent forward mode knows of itself.

    Attributes:
      tangent_norm: scalar, ‖d(w, s)/dλ‖ over all hyperparameters. Where it grows by a constant factor per window,
        training is chaotic and the hypergradient says nothing: give ``hg.forward`` a ``horizon``.
      age: int32 scalar, inner steps since it started at zero. 0: it was not finite, and starts at zero again; the
        hypergradient is then NaN.
    """

    tangent_norm: Array
    age: Array


class _Tangents(NamedTuple):
    """Of persistent forward mode: d(w, s)/dλ, each floating leaf with a leading axis of hyperparameters."""

    rows: list[Array]
    age: Array


def unrolled(problem: BilevelProblem, mode: UnrollMode | None = None) -> Estimator:
    """Differentiate the outer loss through the inner steps of a window.

    dL_out(w_K(λ), λ)/dλ where w_K is reached by K steps of the inner optimizer, which may be a function of λ.

    Args:
      problem: losses differentiable in weights and hyperparameters; the inner one twice.
      mode: ``hg.reverse()`` (the default) or ``hg.forward()``.

    Returns:
      An ``Estimator`` that needs an inner optimizer: an optax transformation, or a function from the
      constrained hyperparameters to one. K is the leading axis of ``inner_batch``. An ``inner_state`` of None is a
      fresh one, whose dependence on λ is differentiated, too; a given one counts as independent. The estimate carries
      the weights and optimizer state that the window reached, without a second forward pass. It has no state and
      no info, except with ``hg.forward(persistent=True)``: the tangents, and a ``ForwardInfo``.

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

    if mode.persistent:
        return _persistent(problem, mode)

    def init(_: Context) -> tuple[PyTree, PyTree]:
        return (), ()

    def differentiate(ctx: Context) -> tuple[Trained, tuple[Array, Hyperparams, Any]]:
        def run_window(hyperparams: Hyperparams) -> Trained:
            reached = _run_window(ctx, mode, hyperparams)
            # The outer loss does not see these: no tangent of theirs, finite or not, may count.
            apart = jax.lax.stop_gradient((reached.inner_state, reached.inner_loss))
            return reached._replace(inner_state=apart[0], inner_loss=apart[1])

        def outer_loss(hyperparams: Hyperparams, reached: Trained) -> tuple[Array, Any]:
            return outer_loss_fn(ctx._replace(at=reached))(reached.params, hyperparams)

        (value, aux), reached, hypergrad = mode.value_and_grad(run_window, outer_loss, ctx.hyperparams)
        return reached, (value, hypergrad, aux)

    def train_window(state: PyTree, ctx: Context) -> tuple[Trained, PyTree, Any]:
        _check_optimizer(ctx, mode)
        if ctx.due is False:
            return train(ctx, unroll=mode.unroll), state, ()
        outer = outer_loss_fn(ctx)
        check_outer_path("unrolled", lambda w: outer(w, ctx.hyperparams)[0], ctx.start.params)
        _check_paths(ctx, mode)
        if ctx.due is True:
            reached, tape = differentiate(ctx)
            return reached, state, tape
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: differentiate(ctx)[1]))
        reached, tape = jax.lax.cond(
            ctx.due, lambda: differentiate(ctx), lambda: (train(ctx, unroll=mode.unroll), blank)
        )
        return reached, state, tape

    def estimate(state: PyTree, ctx: Context) -> Estimate:
        refuse_solve_batch("unrolled", ctx)
        value, hypergrad, aux = ctx.tape
        return Estimate(value, hypergrad, state, (), aux)

    def best_response(ctx: Context) -> Params:
        _check_optimizer(ctx, mode)
        length = data.window_length(ctx.inner_batches)
        if mode.truncate is not None and mode.truncate < length:
            fix = "The derivative in the first weights would be zero: choose a window of the steps that count."
            got = f"truncate={mode.truncate} for {length} steps"
            raise ValueError(validate.message("best_response of an unroll that is differentiated whole", got, fix))
        # Plain autodiff: the mixed rule has no forward mode, which products of an outer solver take.
        return _run_window(ctx, mode._replace(mixed=False), ctx.hyperparams).params

    return Estimator(problem, init, estimate, train=train_window, best_response=best_response)


def _persistent(problem: BilevelProblem, mode: UnrollMode) -> Estimator:
    """Return the estimator that carries d(w, s)/dλ in its state."""

    def parts(at: Trained) -> Trained:
        return at._replace(inner_loss=())

    def init(ctx: Context) -> tuple[_Tangents, ForwardInfo]:
        count = sum(jnp.size(leaf) for leaf in jax.tree.leaves(ctx.hyperparams))
        floats, _ = tree.split_floating(parts(ctx.start))
        zeros = [jnp.broadcast_to(jnp.zeros_like(leaf), (count, *leaf.shape)) for leaf in floats]
        none = jnp.zeros((), jnp.int32)
        return _Tangents(zeros, none), ForwardInfo(tree.norm(zeros), none)

    def train_window(state: _Tangents, ctx: Context) -> tuple[Trained, _Tangents, Any]:
        _check_optimizer(ctx, mode)
        if ctx.due is not False:
            outer = outer_loss_fn(ctx)
            check_outer_path("unrolled", lambda w: outer(w, ctx.hyperparams)[0], ctx.start.params)
            _check_paths(ctx, mode)
        alone = ctx.start.inner_state is None  # a functional call: nothing is known of what was before these weights
        floats, restore = tree.split_floating(parts(ctx.start))

        def run_window(hyperparams: Hyperparams, *floats: list[Array]) -> tuple[Trained, Array]:
            start = restore(*floats)._replace(inner_loss=ctx.start.inner_loss) if floats else ctx.start
            reached = train(ctx, start=start, hyperparams=hyperparams, unroll=mode.unroll)
            return parts(reached), jax.lax.stop_gradient(reached.inner_loss)

        age = jnp.zeros((), jnp.int32)
        if alone:  # a fresh optimizer state is made in the window, and may depend on λ
            rows, (reached, inner_loss) = carried(run_window, ctx.hyperparams)
        else:
            again = jnp.array(False) if mode.horizon is None else state.age >= mode.horizon
            rows = [jnp.where(again, jnp.zeros_like(x), x) for x in state.rows]
            rows, (reached, inner_loss) = carried(run_window, ctx.hyperparams, floats, rows)
            age = jnp.where(again, 0, state.age)
        rows = rows[: len(state.rows)]
        finite = jnp.isfinite(tree.norm(rows))
        rows = [jnp.where(finite, x, jnp.zeros_like(x)) for x in rows]
        age = jnp.where(finite, age + data.window_length(ctx.inner_batches), 0).astype(jnp.int32)
        return reached._replace(inner_loss=inner_loss), _Tangents(rows, age), ()

    def estimate(state: _Tangents, ctx: Context) -> Estimate:
        refuse_solve_batch("unrolled", ctx)

        def outer_loss(hyperparams: Hyperparams, reached: Trained) -> tuple[Array, Any]:
            at = reached._replace(inner_state=ctx.at.inner_state, inner_loss=ctx.at.inner_loss)
            return outer_loss_fn(ctx._replace(at=at))(at.params, hyperparams)

        (value, aux), hypergrad = paired(state.rows, parts(ctx.at), outer_loss, ctx.hyperparams)
        hypergrad = jax.tree.map(lambda g: jnp.where(state.age > 0, g, jnp.full_like(g, jnp.nan)), hypergrad)
        info = ForwardInfo(tree.norm(state.rows), state.age)
        return Estimate(value, hypergrad, state, info, aux)

    of_one_window = unrolled(problem, mode._replace(persistent=False, horizon=None))
    return of_one_window._replace(init=init, estimate=estimate, train=train_window)


def _run_window(ctx: Context, mode: UnrollMode, hyperparams: Hyperparams) -> Trained:
    """Take the window's steps, the last ``mode.truncate`` differentiably."""
    length, start, tail = data.window_length(ctx.inner_batches), ctx.start, None
    if mode.truncate is not None and mode.truncate < length:
        head, tail = slice(length - mode.truncate), slice(length - mode.truncate, None)
        fixed, start = jax.lax.stop_gradient((hyperparams, start))
        start = train(ctx, start=start, hyperparams=fixed, steps=head, unroll=mode.unroll)
        length = mode.truncate
    options: dict[str, Any] = {"mixed": mode.mixed, "checkpoint_every": mode.interval(length), "unroll": mode.unroll}
    return train(ctx, start=start, hyperparams=hyperparams, steps=tail, **options)


def _check_optimizer(ctx: Context, mode: UnrollMode) -> None:
    def make(hyperparams: Hyperparams) -> Any:
        return resolve_optimizer(ctx.inner_optimizer, ctx.problem.constrain(hyperparams))

    if ctx.inner_optimizer is None:
        fix = "Pass inner_optimizer=optax.sgd(...), and batches with a leading window axis."
        raise ValueError(validate.message("an inner_optimizer for unrolled differentiation", "None", fix))
    make(ctx.hyperparams)
    steps, key = data.window_length(ctx.inner_batches), (ctx.inner_optimizer, ctx.problem.constrain)
    _probe.check_differentiable(
        make, ctx.start.params, ctx.hyperparams, steps=steps, reverse=mode.is_reverse, cache_key=key
    )


def _check_paths(ctx: Context, mode: UnrollMode) -> None:
    """Refuse leaves with no path into the steps that are differentiated, and none into the outer loss directly.

    What a cotangent of the weights reaches through one step backward is followed until it reaches nothing new.
    """
    start, hyperparams, given = ctx.start, ctx.hyperparams, ctx.start.inner_state is not None

    def initial(hyperparams: Hyperparams) -> PyTree:
        return resolve_optimizer(ctx.inner_optimizer, ctx.problem.constrain(hyperparams)).init(start.params)

    if not given:
        start = start._replace(inner_state=initial(hyperparams))
    floats, restore = tree.split_floating(start._replace(inner_loss=()))

    def step(floats: list[Array], hyperparams: Hyperparams) -> list[Array]:
        at = restore(floats)
        reached = train(ctx, start=at, hyperparams=hyperparams, steps=slice(1), mixed=mode.mixed)
        return tree.split_floating(reached._replace(inner_loss=()))[0]

    reaches = dataflow.dependence(lambda ct: jax.vjp(step, floats, hyperparams)[1](ct), floats)
    weights, state, model_state = (len(tree.split_floating(part)[0]) for part in start[:3])
    carried = [True] * weights + [False] * state + [ctx.problem.stateful] * model_state
    seen = [False] * len(jax.tree.leaves(hyperparams))
    length = data.window_length(ctx.inner_batches)
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
    check_gradient_paths("unrolled", hyperparams, unseen, direct_path(ctx, start.params))


def _either(first: list[bool], second: list[bool]) -> list[bool]:
    return [a or b for a, b in zip(first, second, strict=True)]
