"""Hyperparameters of problems small enough to solve: every step is taken at an inner solution.

    w_k = w*(λ_k) to a tolerance,  q_k to a tolerance,  λ_{k+1} from dL_out/dλ by the method

``minimize`` is to ``bilevel`` what ``scipy.optimize.minimize`` is to a training loop: it takes a problem and returns
tuned hyperparameters, the weights that belong to them, and why it stopped.
"""

import enum
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hypergrad import data, inner_solvers, methods, tree, validate
from hypergrad.drivers import _phases
from hypergrad.estimators import Estimator, implicit
from hypergrad.inner_solvers import InnerProblem, InnerSolver, InnerStatus
from hypergrad.methods import Method, Oracle, Point
from hypergrad.methods._bounds import estimated_bounds
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    check_model_state,
    check_problem,
    check_variables,
    refuse_response,
)
from hypergrad.solvers import LinearSolver, Status, cg, gmres
from hypergrad.training import Context, Trained, inner_loss_fn, outer_loss_fn, residual_fn, split_keys
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree

__all__ = ["History", "MinimizeResult", "MinimizeStatus", "minimize"]

_FAR = 8.0  # e⁸ is 3,000 times a decay of 1
_SYMMETRIC = cg(500, warm_start=True)
_ASYMMETRIC = gmres(500, 50, warm_start=True)


class MinimizeStatus(enum.IntEnum):
    """Why ``minimize`` stopped.

    Attributes:
      CONVERGED: ‖dL_out/dλ‖ ≤ ``tol`` at a solved point.
      MAX_STEPS: the steps ran out.
      NO_STEP: the method's steps became too small to change the outer loss.
      INNER_SOLVER: ‖dL_out/dλ‖ ≤ ``tol``, but the inner solve there did not reach its tolerance.
      LINEAR_SOLVER: ‖dL_out/dλ‖ ≤ ``tol``, but the linear solve there did not reach its tolerance.
      NOT_FINITE: a loss at the start, or a hypergradient, is NaN or infinite.
      CALLBACK: ``callback`` raised ``StopIteration``.
      RUNNING: it goes on, in a result that ``callback`` is called with.
    """

    RUNNING = -1
    CONVERGED = 0
    MAX_STEPS = 1
    NO_STEP = 2
    INNER_SOLVER = 3
    LINEAR_SOLVER = 4
    NOT_FINITE = 5
    CALLBACK = 6


class History(NamedTuple):
    """What happened, one entry per outer step. Under ``vmap`` and ``jit`` entries after the last step are NaN or 0.

    Attributes:
      outer_loss: where the method stands after the step.
      hypergrad_norm: ‖dL_out/dλ‖ there.
      inner_gradient_norm: ‖∇_w L_in‖ there, or the norm of the problem's residual.
      num_gradients: gradients of the inner loss (or residuals) in this step, with those of line searches.
      num_products: products with the Hessian in this step, and one mixed product per hypergradient.
      tolerance: on ‖∇_w L_in‖ in this step.
      step_size: of the method, for the step that led to the hyperparameters tried; 0 at first.
      accepted: whether they were accepted.
      error_bound: on the error of the hypergradient there, by ``hg.methods.maid``; NaN: the method has none.
    """

    outer_loss: Array
    hypergrad_norm: Array
    inner_gradient_norm: Array
    num_gradients: Array
    num_products: Array
    tolerance: Array
    step_size: Array
    accepted: Array
    error_bound: Array


class MinimizeResult(NamedTuple):
    """The result of ``minimize``. ``print`` shows the message.

    Attributes:
      params: the inner solution at ``hyperparams``.
      hyperparams: the final λ if converged, otherwise the accepted one with the lowest outer loss; unconstrained.
      value: scalar, the outer loss at ``params``, with the prior of the problem. It differs from that at the solution
        as far as the inner residual and the method's tolerance allow.
      converged: bool scalar, ‖dL_out/dλ‖ ≤ ``tol`` at a solved point.
      status: int32 scalar, a ``MinimizeStatus``.
      num_steps: int32 scalar, outer steps taken.
      history: a ``History``.
      inner_status: int32 scalar, an ``hg.inner_solvers.InnerStatus``: how the last inner solve that counts ended.
      linear_status: int32 scalar, an ``hg.solvers.Status``, likewise.
    """

    params: Params
    hyperparams: Hyperparams
    value: Array
    converged: Array
    status: Array
    num_steps: Array
    history: History
    inner_status: Array
    linear_status: Array

    @property
    def message(self) -> str:
        """Why it stopped, and what to do; of a batch of results one line each."""
        if np.ndim(self.status) > 0:
            rows = [jax.tree.map(lambda leaf, i=i: leaf[i], self).message for i in range(len(self.status))]
            return "\n".join(rows)
        return _message(self)

    def __str__(self) -> str:
        """Return the message."""
        return self.message


class _Run(NamedTuple):
    point: Point
    best: Point
    state: PyTree
    history: History
    num_steps: Array
    status: Array


def minimize(
    problem: BilevelProblem,
    variables: BilevelParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    method: Method = methods.hoag(),  # noqa: B008
    inner_solver: InnerSolver = inner_solvers.lbfgs(),  # noqa: B008
    linear_solver: LinearSolver | None = None,
    max_steps: int = 50,
    tol: float = 1e-3,
    key: Key = None,
    model_state: ModelState = None,
    callback: Callable[[MinimizeResult], Any] | None = None,
) -> MinimizeResult:
    """Minimise the outer loss over λ, each step at an inner solution: min_λ L_out(w*(λ), λ).

    Args:
      problem: an inner loss that can be solved to a tolerance: convex ones, small networks; or with a residual.
      variables: where to start: weights, and unconstrained λ.
      inner_batch: the data of the inner loss, all of it.
      outer_batch: the data of the outer loss, all of it.
      method: from ``hg.methods``: how λ moves, and the tolerances.
      inner_solver: from ``hg.inner_solvers``.
      linear_solver: from ``hg.solvers``; None: ``cg(500, warm_start=True)``, or ``gmres(500, 50, warm_start=True)`` for
        a problem with a residual. It solves to the method's tolerance.
      max_steps: outer steps, ≥ 1. A rejected step counts.
      tol: ≥ 0, ‖dL_out/dλ‖ at which to stop.
      key: of the losses, as for ``hg.value_and_hypergrad``; fixed for the whole run.
      model_state: of a stateful problem; held fixed.
      callback: called with the ``MinimizeResult`` so far after every step. If it raises ``StopIteration``, the run ends
        with that result; any other exception passes through: keep the last result that it was called with.

    Returns:
      A ``MinimizeResult``. Without ``callback`` the whole run is one compiled program; it may be jitted, and vmapped
      over data, starts and keys: all problems run until the last one ends. It compiles for about 10 seconds, once for
      the same problem, method and solvers (the same objects: build them once) and the same shapes. The same arguments
      give the same bits.

    Raises:
      TypeError: an argument of another kind.
      ValueError: a number out of its range; as ``hg.implicit`` for hyperparameters that do not enter the inner loss.

    Valid where the inner problem has one solution near the start, H is invertible there, and w*(λ) is differentiable.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (40, 5))
    >>> y = x[:, 0] + 0.5 * jax.random.normal(jax.random.key(1), (40,))
    >>> error = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    >>> train = lambda w, log_decay, batch, key: error(w, batch) + hg.penalties.l2(w, jnp.exp(log_decay))
    >>> problem = hg.BilevelProblem(train, lambda w, log_decay, batch, key: error(w, batch))
    >>> found = minimize(problem, hg.BilevelParams(jnp.zeros(5), jnp.array(0.0)), (x[:20], y[:20]), (x[20:], y[20:]))
    >>> bool(found.converged), found.message.partition(":")[0]
    (True, 'converged')

    Reference: Pedregosa, arXiv 1602.02355.
    """
    check_problem(problem)
    refuse_response("minimize", problem)
    variables = check_variables(variables)
    _check_kind("method", method, Method, "hg.methods.hoag()")
    _check_kind("inner_solver", inner_solver, InnerSolver, "hg.inner_solvers.lbfgs()")
    if linear_solver is not None:
        _check_kind("linear_solver", linear_solver, LinearSolver, "hg.solvers.cg(500, warm_start=True)")
    validate.positive_int("max_steps", max_steps)
    validate.number("tol", tol, low=0.0)
    if not (callback is None or callable(callback)):
        fix = "Pass callback(result), or None."
        raise TypeError(validate.message("callback to be callable", validate.describe(callback), fix))
    model_state = check_model_state(problem, model_state)
    given = variables, inner_batch, outer_batch, validate.as_key(key), model_state, tol
    start, whole, one = _programs(problem, method, inner_solver, linear_solver, max_steps)
    if callback is None:
        return _trimmed(whole(*given))
    run = start(*given)
    while int(run.status) == MinimizeStatus.RUNNING:
        run = one(run, *given)
        try:
            callback(_trimmed(_result(run)))
        except StopIteration:
            run = run._replace(status=jnp.asarray(MinimizeStatus.CALLBACK, jnp.int32))
    return _trimmed(_result(run))


@functools.lru_cache(maxsize=8)
def _programs(
    problem: BilevelProblem,
    method: Method,
    inner_solver: InnerSolver,
    linear_solver: LinearSolver | None,
    max_steps: int,
) -> tuple[Callable[..., _Run], Callable[..., MinimizeResult], Callable[..., _Run]]:
    """Return three compiled functions: the start, the whole run, one step."""
    solver = linear_solver or (_SYMMETRIC if problem.residual is None else _ASYMMETRIC)
    estimator = implicit(problem, solver)

    def context(variables: BilevelParams, *given: Any) -> Context:
        inner_batch, outer_batch, key, model_state = given
        at = Trained(variables.params, (), model_state)
        batches = data.one_step(inner_batch)
        return Context(problem, variables.hyperparams, at, at, batches, outer_batch, split_keys(key), None)

    def start(variables: BilevelParams, *given: Any) -> _Run:
        point = _first_point(estimator, inner_solver, context(variables, *given[:-1]))
        none = jnp.zeros((), jnp.int32)
        return tree.strip_weak_types(
            _Run(
                point,
                point,
                method.init(point),
                _blank(point, max_steps),
                none,
                jnp.full_like(none, MinimizeStatus.RUNNING),
            )
        )

    def advance(run: _Run, variables: BilevelParams, *given: Any) -> _Run:
        oracle = _oracle(estimator, inner_solver, context(variables, *given[:-1]))
        made = method.step(oracle, run.point, run.state)
        point = _phases.same_form("the method's point after a step", made.point, run.point)
        size, tol = tree.norm(point.hypergrad), given[-1]
        row = History(
            point.value,
            size,
            point.inner_residual,
            point.num_gradients - run.point.num_gradients,
            point.num_products - run.point.num_products,
            made.tolerance,
            made.step_size,
            made.accepted,
            jnp.asarray(made.error_bound, size.dtype),
        )
        history = jax.tree.map(lambda all, new: all.at[run.num_steps].set(new.astype(all.dtype)), run.history, row)
        finite = jnp.isfinite(point.value) & jnp.isfinite(size)
        better = made.accepted & finite & ~(point.value >= run.best.value)
        best = optax.tree.where(better, point, run.best)
        num_steps = run.num_steps + 1
        small = made.accepted & (size <= tol) & ~(row.error_bound > tol)
        unbounded = small & jnp.isnan(row.error_bound)  # a bound on the error counts more than how solves ended
        cases = [
            (~finite, MinimizeStatus.NOT_FINITE),
            (unbounded & (point.inner_status != InnerStatus.CONVERGED), MinimizeStatus.INNER_SOLVER),
            (unbounded & (point.linear_status != Status.CONVERGED), MinimizeStatus.LINEAR_SOLVER),
            (small, MinimizeStatus.CONVERGED),
            (made.stopped, MinimizeStatus.NO_STEP),
            (num_steps >= max_steps, MinimizeStatus.MAX_STEPS),
        ]
        status = jnp.asarray(MinimizeStatus.RUNNING, jnp.int32)
        for holds, code in reversed(cases):  # the first counts
            status = jnp.where(holds, jnp.asarray(code, jnp.int32), status)
        return _Run(
            point,
            best,
            _phases.same_form("the method's state after a step", made.state, run.state),
            history,
            num_steps,
            status,
        )

    def whole(*given: Any) -> MinimizeResult:
        run = lax.while_loop(
            lambda run: run.status == MinimizeStatus.RUNNING, lambda run: advance(run, *given), start(*given)
        )
        return _result(run)

    return _phases.compile_once(start), _phases.compile_once(whole), _phases.compile_once(advance)


def _first_point(estimator: Estimator, inner_solver: InnerSolver, ctx: Context) -> Point:
    params, hyperparams = ctx.at.params, ctx.hyperparams
    outer = jax.eval_shape(lambda: outer_loss_fn(ctx)(params, hyperparams)[0])
    dtype = tree.wider(outer.dtype, *(leaf.dtype for leaf in jax.tree.leaves((params, hyperparams))))
    unknown, none = jnp.full((), jnp.nan, dtype), jnp.zeros((), jnp.int32)
    return Point(
        hyperparams=hyperparams,
        params=params,
        inner_state=inner_solver.init(params),
        linear_state=_phases.first_state(estimator, ctx)[0],
        value=unknown,
        hypergrad=optax.tree.zeros_like(hyperparams),
        inner_residual=unknown,
        inner_status=none + InnerStatus.MAX_STEPS,
        linear_status=none + Status.TRUNCATED,
        linear_residual=unknown,
        num_gradients=none,
        num_products=none,
    )


def _oracle(estimator: Estimator, inner_solver: InnerSolver, ctx: Context) -> Oracle:
    """Return the two questions that a method may ask, on the data of a call."""
    loss, outer = inner_loss_fn(ctx), outer_loss_fn(ctx)

    def solve(hyperparams: Hyperparams, point: Point, tolerance: Any) -> Point:
        residual = None
        if ctx.problem.residual is not None:
            residual = lambda w: residual_fn(ctx)(w, hyperparams)  # noqa: E731
        inner = InnerProblem(lambda w: loss(w, hyperparams), residual, ctx.problem.constrain(hyperparams))
        found = inner_solver.solve(inner, point.params, point.inner_state, tolerance)
        value, _ = outer(found.params, hyperparams)
        value = jnp.where(found.status == InnerStatus.NOT_FINITE, jnp.nan, value)
        new = point._replace(
            hyperparams=hyperparams,
            params=found.params,
            inner_state=found.state,
            value=value,
            inner_residual=found.residual_norm,
            inner_status=found.status,
            num_gradients=point.num_gradients + found.num_gradients,
            num_products=point.num_products + found.num_products,
        )
        return _phases.same_form("the point", new, point)

    def differentiate(point: Point, tolerance: Any) -> Point:
        at = ctx.at._replace(params=point.params)
        here = ctx._replace(hyperparams=point.hyperparams, start=at, at=at, tolerance=tolerance)
        found = _phases.estimate(estimator, point.linear_state, here)
        new = point._replace(
            linear_state=found.state,
            hypergrad=found.hypergrad,
            linear_status=found.info.status,
            linear_residual=found.info.undamped_residual,
            num_products=point.num_products + jnp.maximum(found.info.num_products, 0) + 1,
        )
        return _phases.same_form("the point", new, point)

    def outer_slope(point: Point) -> Array:
        return tree.norm(jax.grad(lambda w: outer(w, point.hyperparams)[0])(point.params)).astype(point.value.dtype)

    def bounds(point: Point) -> tuple[methods.Bounds, Array]:
        value = lambda w, h: outer(w, h)[0]  # noqa: E731
        return estimated_bounds(loss, value, point.params, point.hyperparams)

    return Oracle(solve, differentiate, outer_slope, bounds)


def _blank(point: Point, max_steps: int) -> History:
    unknown, none = jnp.full(max_steps, jnp.nan, point.value.dtype), jnp.zeros(max_steps, jnp.int32)
    return History(unknown, unknown, unknown, none, none, unknown, unknown, jnp.zeros(max_steps, bool), unknown)


def _result(run: _Run) -> MinimizeResult:
    converged = run.status == MinimizeStatus.CONVERGED
    point = optax.tree.where(converged | ~jnp.isfinite(run.best.value), run.point, run.best)
    return MinimizeResult(
        point.params,
        point.hyperparams,
        point.value,
        converged,
        run.status,
        run.num_steps,
        run.history,
        run.point.inner_status,
        run.point.linear_status,
    )


def _trimmed(result: MinimizeResult) -> MinimizeResult:
    """Drop the history's entries after the last step, where the number of steps is known."""
    if tree.is_traced(result.num_steps):
        return result
    count = int(result.num_steps)
    # On the host: a slice of a device array is a program of its own for each count.
    return result._replace(history=jax.tree.map(lambda entries: np.asarray(entries)[:count], result.history))


def _check_kind(name: str, value: Any, kind: type, example: str) -> None:
    if not isinstance(value, kind):
        got, fix = validate.describe(value), f"Pass e.g. {name}={example}."
        raise TypeError(validate.message(f"{name} to be of type {kind.__name__}", got, fix))


def _message(result: MinimizeResult) -> str:
    history, count = result.history, int(result.num_steps)
    last = count - 1
    size, residual, tolerance = (
        float(of[last]) if count else math.nan
        for of in (history.hypergrad_norm, history.inner_gradient_norm, history.tolerance)
    )
    spent = f"{int(np.sum(history.num_gradients)):,} gradients, {int(np.sum(history.num_products)):,} products"
    inner, linear = InnerStatus(int(result.inner_status)).name, Status(int(result.linear_status)).name
    solved = inner == InnerStatus.CONVERGED.name
    bound = float(history.error_bound[last]) if count else math.nan
    uncertain = "" if math.isnan(bound) else f" The bound on the error of the hypergradient there is {bound:.2g}."
    wider = "" if np.asarray(result.value).dtype == np.float64 else ", or enable float64"
    at_once = (
        ""
        if count > 1
        else (
            " That is at the hyperparameters given. If this is a surprise: the weights given may meet the first "
            "tolerance of the method already (pass a smaller one), or the losses do not depend on the hyperparameters "
            "there."
        )
    )
    left = uncertain + (
        ""
        if solved
        else f" The last inner solve ended with {inner}, at a residual of {residual:.2g} for a tolerance of "
        f"{tolerance:.2g}: give inner_solver more steps, take another one, or give the method a larger "
        f"tolerance{wider}."
    )
    # Of what this process holds: to fetch the rest, all processes would have to ask for the message.
    shards = [s.data for x in jax.tree.leaves(result.hyperparams) for s in jnp.asarray(x).addressable_shards]
    farthest = max((float(np.max(np.abs(shard), initial=0.0)) for shard in shards), default=0)
    far = (
        f" An unconstrained hyperparameter is at ±{farthest:.2g}: if it runs off, the outer loss is flat there; bound "
        "it by hg.bijectors.interval, or add a prior (hg.with_prior)."
        if farthest > _FAR
        else ""
    )
    left += far
    bad = "The hypergradient" if np.isfinite(float(result.value)) else "The inner or the outer loss"
    at = f"‖dL_out/dλ‖ = {size:.2g} after {count} steps ({spent}), at ‖∇L_in‖ = {residual:.2g}"
    return {
        MinimizeStatus.CONVERGED: f"converged: {at}.{at_once}{far}",
        MinimizeStatus.MAX_STEPS: f"max_steps reached: {at}. Pass a larger max_steps, or a larger tol.{left}",
        MinimizeStatus.NO_STEP: f"no step: {at}. No step was found that lowers the outer loss for certain. Solve more "
        f"exactly (a smaller tolerance of the method){wider}, or pass a larger tol. Where the outer loss has a kink "
        f"(lasso, hinge), it may be the minimum.{left}",
        MinimizeStatus.INNER_SOLVER: f"inner solver: {at}, but the weights there are not solved.{left}",
        MinimizeStatus.LINEAR_SOLVER: f"linear solver: {at}, but its linear solve ended with {linear}: pass a "
        f"linear_solver with more products or with damping, or the method a larger tolerance.{far}",
        MinimizeStatus.NOT_FINITE: f"not finite: {at}. {bad} is NaN or infinite (inner solve "
        f"{inner}, linear solve {linear}): start from other hyperparameters, or bound them by hg.bijectors.interval.",
        MinimizeStatus.RUNNING: f"running: {at}.",
        MinimizeStatus.CALLBACK: f"stopped by the callback: {at}.",
    }[MinimizeStatus(int(result.status))]
