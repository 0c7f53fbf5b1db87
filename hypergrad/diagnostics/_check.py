"""The gradient check: an estimator's hypergradient beside finite differences on the user's own problem.

    ⟨hypergrad, d⟩   against   [φ(λ + hd) − φ(λ − hd)] / 2h,      extrapolated from h and h/2 (Richardson)

    φ(λ) = L_out(w_K(λ), λ)  for methods that differentiate steps: the window is run again
    φ(λ) = L_out(w*(λ), λ)   for all others: the inner problem is solved again, to rounding, from the weights given

Neither differentiates anything in λ. Two step sizes tell how far the difference quotient itself can be trusted.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import data, dataflow, tree, validate
from hypergrad.diagnostics import _differences
from hypergrad.diagnostics._base import Direction, HypergradCheck, align, digits, readable
from hypergrad.drivers._functional import estimator_function
from hypergrad.estimators import Estimate, HypergradEstimator
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    check_model_state,
    check_variables,
    evaluate_inner,
    evaluate_outer,
)
from hypergrad.solvers import SolveInfo
from hypergrad.training import split_keys
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree

_STEPS, _WIDE_STEPS = (1e-3, 1e-5, 3e-2), (1e-2, 3e-2, 1e-1)  # in float64, or less: until differences can be trusted
_FLOOR = 1e-3  # of the whole hypergradient's norm: what a leaf's error is measured against at the least


def check_hypergrad(
    estimator: HypergradEstimator,
    variables: BilevelParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    key: Key,
    inner_optimizer: Any = None,
    model_state: ModelState = None,
    rtol: float = 1e-2,
    step: float | None = None,
) -> HypergradCheck:
    """Compare a hypergradient with directional finite differences, on the user's own problem, and say why it fails.

    For every leaf of the hyperparameters two directions: along the estimate, which tells its length, and random signs,
    which every entry enters. ⟨hypergrad, d⟩ stands against [φ(λ + hd) − φ(λ − hd)]/2h, φ the outer loss after the
    window's steps (methods that differentiate them) or at the inner optimum, found again by Newton's method (all
    others; for a learned response that of the problem over plain weights).

    Args:
      estimator: with any problem small enough to be solved again, eight times a leaf. Take a smaller batch first.
      variables: where. For ``hg.implicit`` at weights that solve the inner problem on ``inner_batch`` with the dropout
        mask that the key gives: elsewhere the check fails and says so, with the error that is left at the optimum.
      inner_batch: with an ``inner_optimizer``, leaves carry a window axis.
      outer_batch: of the outer loss.
      key: of the losses, or None.
      inner_optimizer: as for ``hg.value_and_hypergrad``.
      model_state: of a stateful problem.
      rtol: the error up to which a direction agrees.
      step: h; None: 1e-3, and where differences are not smooth enough 1e-5, then 3e-2; in float32 1e-2, 3e-2, 1e-1.

    Returns:
      A ``HypergradCheck`` of Python numbers; ``print`` it. Everything is computed in float64, floating-point leaves
      cast to it, as far as the losses do not cast them down; in the leaves' own dtypes where the losses raise in
      float64 or draw other random numbers there (masks of ``jax.random.bernoulli`` depend on the dtype).

    Raises:
      TypeError: no estimator, or variables that are no ``BilevelParams``.
      ValueError: what the estimator itself refuses; ``rtol`` or ``step`` not positive.

    Right where φ is smooth: across the kinks of ReLUs, or a basin's edge, differences of two step sizes disagree, and
    the check fails as inconclusive. A random direction sees an error in one of a leaf's n like entries divided by √n: a
    pass is no proof for single entries of large leaves. Where the inner loss is random, w* is that of the key's draw; a
    learned response follows the mean over draws, and is not judged. A saddle that Newton's method starts at passes.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: jnp.sum(0.5 * jnp.exp(h) * w**2 - w)                  # w* = exp(-h)
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w))
    >>> at = hg.BilevelParams(jnp.exp(-jnp.array([0.0, 2.0])), jnp.array([0.0, 2.0]))
    >>> check_hypergrad(hg.implicit(problem, hg.solvers.cg(5)), at, (), (), key=None).passed
    True
    >>> print(check_hypergrad(hg.implicit(problem, hg.solvers.neumann(2)), at, (), (), key=None).reasons[0][:34])
    the linear solve stopped at residu

    Reference: Pedregosa, arXiv 1602.02355 (the derivative that is checked).
    """
    if not isinstance(estimator, HypergradEstimator):
        fix = "Pass e.g. hg.implicit(problem, hg.solvers.neumann(20))."
        raise TypeError(validate.message("a HypergradEstimator", validate.describe(estimator), fix))
    check_variables(variables)
    validate.number("rtol", rtol, low=0.0, strict=True)
    if step is not None:
        validate.number("step", step, low=0.0, strict=True)
    case = _Case(estimator, inner_optimizer, variables, inner_batch, outer_batch, validate.as_key(key), model_state)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(case[2:])):
        fix = "Call check_hypergrad outside jax.jit and other transformations: it compiles what it needs itself."
        raise TypeError(validate.message("arrays to check at", "traced values", fix))
    own = _values(case)
    try:
        with jax.enable_x64(True):
            wide = case.in_float64()
            if _same(own, _values(wide), variables):
                return _judged(wide, rtol, step, "")
            note = "the losses draw other random numbers in float64"
    except Exception as error:  # what a model fixed to float32 raises; what is wrong in itself raises again below
        note = f"in float64 they raise {type(error).__name__}: {str(error).splitlines()[0]:.120}"
    return _judged(case, rtol, step, note)


class _Case(NamedTuple):
    """What is checked, and where."""

    estimator: HypergradEstimator
    inner_optimizer: Any
    variables: BilevelParams
    inner_batch: Batch
    outer_batch: Batch
    key: Array | None
    model_state: ModelState

    @property
    def problem(self) -> BilevelProblem:
        return self.estimator.problem

    def in_float64(self) -> "_Case":
        def cast(leaf: Any) -> Any:
            return jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

        names = "variables", "inner_batch", "outer_batch", "model_state"
        return self._replace(**{name: jax.tree.map(cast, getattr(self, name)) for name in names})


def _judged(case: _Case, rtol: float, step: float | None, note: str) -> HypergradCheck:
    model_state = check_model_state(case.problem, case.model_state)
    estimate_fn = jax.jit(estimator_function(case.estimator, case.inner_optimizer))
    estimate = estimate_fn(case.variables, case.inner_batch, case.outer_batch, case.key, case.model_state)
    at = BilevelParams(estimate.params, case.variables.hyperparams)
    last = case.inner_batch if case.inner_optimizer is None else data.take(case.inner_batch, -1)
    problem, keys, view = case.problem, split_keys(case.key), case.problem.response
    read: Callable[[PyTree], PyTree] = lambda x: x  # noqa: E731
    if case.estimator.needs_rollout:
        where = case.variables.params, case.inner_batch, case.outer_batch
        options: dict[str, Any] = {"inner_optimizer": case.inner_optimizer, "model_state": model_state}
        reference = _differences.rolled_out(problem, *where, keys=keys, **options)
    else:
        here = at
        if view is not None and view.weights is not None:
            problem, read = view.base_problem, view.base_hyperparams
            here = BilevelParams(view.weights(*at), read(at.hyperparams))
        options = {"keys": keys, "model_state": estimate.model_state}
        reference = _differences.resolved(problem, here, last, case.outer_batch, **options)

    base, gradient = read(at.hyperparams), read(estimate.hypergrad)
    along = _differences.probes(gradient)
    precision = dataflow.working_precision(functools.partial(_losses, case, last, estimate.model_state), at)
    steps = _STEPS if precision == jnp.float64 else _WIDE_STEPS
    usual = _usual(gradient)
    floor = _FLOOR * float(np.linalg.norm(usual))
    measured = _differences.measure(
        reference.value_at,
        base,
        along,
        steps if step is None else (step,),
        epsilon=float(jnp.finfo(precision).eps),
        enough=lambda probe, found: found.uncertainty <= rtol * max(usual[probe.place], abs(found.slope), floor),
    )
    rows = _rows(gradient, along, measured, rtol)
    solver = estimate.info.solver
    found = HypergradCheck(
        passed=all(row.error <= rtol and row.uncertainty <= rtol for row in rows),
        reasons=(),
        rows=rows,
        rtol=rtol,
        step=max((one.step for one in measured), default=0.0),
        dtype=str(precision),
        note=note,
        outer_loss=float(estimate.value),
        inner_gradient_norm=float(tree.norm(_slope(case, at, last, estimate.model_state, keys.solve))),
        error_at_optimum=float("nan"),
        residual=float(solver.residual) if isinstance(solver, SolveInfo) else float("nan"),
    )
    if found.passed:
        return found
    there = None
    if reference.optimum is not None and view is None:
        solved = at._replace(params=reference.optimum.params)
        state = estimate.model_state if problem.stateful else None
        there = jax.jit(estimator_function(case.estimator, None))(solved, last, case.outer_batch, case.key, state)
        rows = _rows(there.hypergrad, along, measured, rtol)
        found = found._replace(error_at_optimum=max(row.error for row in rows))
    return found._replace(reasons=tuple(_reasons(case, found, at, last, estimate, there)))


def _usual(gradient: Hyperparams) -> list[float]:
    """Return ‖gradient‖ of each leaf: about the derivative along random signs, no more than that along it."""
    return [float(np.linalg.norm(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(gradient)]


def _rows(
    gradient: Hyperparams, along: list[_differences.Probe], measured: list[_differences.Difference], rtol: float
) -> tuple[Direction, ...]:
    usual, found = _usual(gradient), []
    for probe, (slope, uncertainty, _) in zip(along, measured, strict=True):
        estimated = _differences.derivative(gradient, probe)
        size = np.nan_to_num([usual[probe.place], abs(estimated), abs(slope)]).max()
        if not uncertainty <= rtol * size:  # too small a leaf to be judged by itself: by its share of the whole
            size = max(size, np.nan_to_num(_FLOOR * np.linalg.norm(usual)))
        apart = [float(x / size) if size > 0 else float(x) for x in (uncertainty, abs(estimated - slope))]
        found.append(Direction(probe.leaf, probe.kind, estimated, slope, *apart))
    return tuple(found)


def _values(case: _Case) -> np.ndarray:
    """Return both losses at the point given, where random numbers enter them."""
    if case.key is None:
        return np.zeros(2)
    batch = case.inner_batch if case.inner_optimizer is None else data.take(case.inner_batch, 0)
    model_state = check_model_state(case.problem, case.model_state)
    return np.array(jax.jit(functools.partial(_losses, case, batch, model_state))(case.variables), np.float64)


def _same(own: np.ndarray, wide: np.ndarray, variables: BilevelParams) -> bool:
    """Return whether the losses are the same but for rounding: they draw the same random numbers."""
    coarsest = max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(variables))
    return bool(np.allclose(own, wide, rtol=max(1e-5, 20 * coarsest), atol=1e-6, equal_nan=True))


def _inner(case: _Case, batch: Batch, model_state: ModelState, key: Array | None, at: BilevelParams) -> Array:
    return evaluate_inner(case.problem, at, batch, key, model_state).value


def _losses(case: _Case, batch: Batch, model_state: ModelState, at: BilevelParams) -> tuple[Array, Array]:
    keys = split_keys(case.key)
    outer = evaluate_outer(case.problem, at, case.outer_batch, keys.outer, model_state).value
    return _inner(case, batch, model_state, keys.solve, at), outer


def _slope(case: _Case, at: BilevelParams, batch: Batch, model_state: ModelState, key: Array | None) -> Params:
    """Return ∇_w L_in, traced anew at every call."""
    inner = functools.partial(_inner, case, batch, model_state, key)
    return tree.promote(jax.jit(jax.grad(lambda at: inner(at)))(at).params)


def _reasons(
    case: _Case, found: HypergradCheck, at: BilevelParams, last: Batch, estimate: Estimate, there: Estimate | None
) -> Iterator[str]:
    """Yield why a check failed, most certain first."""
    rtol, key = found.rtol, split_keys(case.key).solve
    if not tree.all_finite(estimate.hypergrad):
        yield "the estimate is not finite: look for inf or NaN in the losses and in their derivatives"
        return
    slopes = [_slope(case, at, last, estimate.model_state, key) for _ in range(2)]
    if align(*slopes).error > 1e-6:
        yield (
            f"the inner loss is no function of its arguments: with the same key its gradient changed by "
            f"{digits(align(*slopes).error)} of its norm. Draw all random numbers from the key that the loss is given"
        )
    other = None if key is None else _slope(case, at, last, estimate.model_state, jax.random.fold_in(key, 1))
    change = 0.0 if other is None else np.nan_to_num(align(other, slopes[0]).error)
    if case.problem.response is not None and change > 1e-6:
        yield (
            f"inconclusive: the inner loss is random (another key changes its gradient by {digits(change)} of its "
            "norm), and a response follows the mean over draws where this check solves for one. Check without the noise"
        )
        return
    vague = [row for row in found.rows if not row.uncertainty <= rtol]
    if vague:
        yield _inconclusive(max(vague, key=lambda row: np.nan_to_num(row.uncertainty, nan=np.inf)), found.dtype)
    wrong = [row.error for row in found.rows if row.uncertainty <= rtol and not row.error <= rtol]
    if not wrong:
        return
    solver, explained = estimate.info.solver if there is None else there.info.solver, False
    residual = float(solver.residual) if isinstance(solver, SolveInfo) else 0.0
    if not residual < 1:
        yield (
            f"the linear solve broke down (residual {digits(residual)}): H is singular or indefinite here, or the step "
            "size too large (see diagnostics.extreme_eigenvalues). Give the solver damping, or the loss a decay"
        )
        return
    if there is not None and not found.error_at_optimum > 0.5 * max(wrong):
        explained = found.error_at_optimum <= rtol
        left = "the estimate is right" if explained else "more is wrong"
        yield (
            f"the inner problem is not solved at these weights, with this batch and key: ‖∇_w L_in‖ = "
            f"{digits(found.inner_gradient_norm)}. At its solution {left} (error {digits(found.error_at_optimum)}). "
            "Train longer, or check there"
        )
    if not explained and residual > rtol:
        explained = True
        yield (
            f"the linear solve stopped at residual {digits(residual)}: more terms or steps, or a larger step size (see "
            "diagnostics.extreme_eigenvalues). Few terms have the right direction and too small a norm"
        )
    if explained:
        return
    if case.problem.response is not None:
        yield "the response has not learned the best response: train it longer, or on perturbations of another scale"
        return
    if change > 1e-6:
        yield (
            f"the inner loss is random (another key changes its gradient by {digits(change)} of its norm): do all "
            "products of a solve and the mixed product share one key, keys.solve? Fresh masks are another matrix each"
        )
    yield (
        "not the derivative of these steps: a truncated unroll, a stop_gradient, or a custom derivative that is wrong"
        if case.estimator.needs_rollout
        else "not explained by residual or weights: a stop_gradient or a custom derivative in a loss, or the estimator"
    )


def _inconclusive(worst: Direction, dtype: str) -> str:
    """Say why a difference cannot be trusted."""
    cause = (
        "a kink (ReLU), an unbounded loss, or a step that leaves the losses' domain: try a smooth activation, more "
        "decay, a bijector, or another step"
    )
    if dtype != "float64":
        cause = f"the losses compute in {dtype}, whose rounding does it, or {cause}"
    if np.isnan(worst.uncertainty):
        return f"inconclusive: near these {readable(worst.leaf)} no inner solution was found to rounding, for {cause}"
    change = digits(worst.uncertainty)
    return f"inconclusive for {readable(worst.leaf)}: its difference quotient is uncertain by {change}, for {cause}"
