"""The gradient check: an estimator's hypergradient compared with finite differences on the user's own problem.

    ⟨hypergrad, d⟩   against   [φ(λ + hd) − φ(λ − hd)] / 2h,      extrapolated from h and h/2 (Richardson)

    φ(λ) = L_out(w_K(λ), λ)  for estimators that differentiate steps: the window is run again
    φ(λ) = L_out(w*(λ), λ)   for all others: the inner problem is solved again, to rounding, from the weights given;
                             of a problem with a residual, r(w*(λ), λ) = 0 in place of the minimum

Neither differentiates anything in λ. Two step sizes tell how far the difference quotient itself can be trusted.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import data, dataflow, tree, validate
from hypergrad.diagnostics import _differences, _kinks
from hypergrad.diagnostics._base import Alignment, align, digits, flat, readable, table, teller, unknowns
from hypergrad.diagnostics._differences import Budget, Direction, Reference
from hypergrad.drivers import one_estimate, solves_in
from hypergrad.estimators import Estimate, Estimator
from hypergrad.problem import BilevelParams, check_model_state, check_variables
from hypergrad.solvers import SolveInfo, Status
from hypergrad.training import Context, Trained, inner_loss_fn, outer_loss_fn, residual_fn, split_keys
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params

__all__ = ["HypergradCheck", "check_hypergrad"]

_STEPS = (1e-3, 1e-5, 1e-7, 3e-2)  # in float64: until a difference is certain and agrees
_WIDE_STEPS = (1e-2, 3e-2, 1e-1)  # where the losses compute in less
_PASSED, _FAILED, _INCONCLUSIVE = "passed", "FAILED", "inconclusive"
_BROKEN = 3.0  # the residual from which the guard skips a step: such a solve is a failure
_UNSOLVED = "not at a solution of the inner problem"
_KINKED = "at a kink of the inner loss"


_SMALL = 0.3  # of the gradient's norm: a leaf that may be too small to be judged by itself


class HypergradCheck(NamedTuple):
    """The verdict of a gradient check. ``str()`` of it is a report.

    Attributes:
      verdict: "passed": every direction agrees within ``rtol``. "not at a solution of the inner problem": the estimate
        is wrong at the weights given, and right at the solution. "at a kink of the inner loss": see ``kinks``.
        "inconclusive": some differences are too uncertain to judge, and no other one disagrees. "FAILED" otherwise.
      reasons: why it did not pass, most certain first; empty if passed.
      rows: one ``Direction`` for each leaf, and one more of random signs for each leaf of more than one number. Of more
        than four leaves two come first in which all move together; what the time does not reach is left out.
      rtol: the tolerance asked for.
      step: the widest h of those taken, by which a leaf was moved relative to its root mean square.
      dtype: of the lowest precision in which the losses compute.
      note: why not in float64, and how many leaves were moved one by one, where that is to be said; empty otherwise.
      outer_loss: at the weights of the estimate.
      inner_gradient_norm: ‖∇_w L_in‖ there, over the weights that are trained, on the batch and with the key that the
        linear solve sees; of a problem with a residual ‖residual‖.
      error_at_optimum: the largest error of an estimate at the inner optimum instead; NaN where there is none.
      residual: of the estimate's linear solve; NaN without one.
      solver_cosine: where the estimate's linear solve stopped early or is damped, the cosine of its hypergradient with
        that of a converged, undamped solve. The rows then judge the latter: few products are no failure. NaN elsewhere.
      solver_error: ‖a − b‖/‖b‖ of the same two.
      kinks: how many weights of a leaf are at a kink of the inner loss (|w|, a norm at 0), by the leaf's path. Such a
        weight stays at its kink when λ moves, and ``hg.implicit`` moves it. Looked for where a difference is uncertain,
        since Newton's method ends at a kink; empty otherwise.
    """

    verdict: str
    reasons: tuple[str, ...]
    rows: tuple[Direction, ...]
    rtol: float
    step: float
    dtype: str
    note: str
    outer_loss: float
    inner_gradient_norm: float
    error_at_optimum: float
    residual: float
    solver_cosine: float = math.nan
    solver_error: float = math.nan
    kinks: Mapping[str, int] = MappingProxyType({})

    @property
    def passed(self) -> bool:
        """Whether the verdict is "passed"."""
        return self.verdict == _PASSED

    def __str__(self) -> str:
        """Return verdict, table and reasons; of a direction that is not certain its ± and no error."""
        head = f"hypergradient check: {self.verdict} (tolerance {self.rtol:g}, step {self.step:g}, {self.dtype})"
        lines: list[tuple[str, ...]] = [("hyperparameters", "direction", "estimated", "measured", "±", "error")]
        for row in self.rows:
            measured = row.measured if row.uncertainty < 1 else math.nan
            error = row.error if row.uncertainty <= self.rtol else math.nan
            figures = row.estimated, measured, row.uncertainty, error
            lines.append((readable(row.leaf) or "hyperparams", row.kind, *map(digits, figures)))
        note = f"\n{self.note}" if self.note else ""
        return f"{head}{note}\n{table(lines)}{self._solver()}" + "".join(f"\n- {reason}" for reason in self.reasons)

    def _solver(self) -> str:
        if math.isnan(self.solver_cosine):
            return ""
        figures = f"cosine {digits(self.solver_cosine)}, error {digits(self.solver_error)}"
        return (
            '\n"estimated" is by a converged, undamped solve. The estimator\'s own hypergradient beside it, with its '
            f"products and damping: {figures} (residual {digits(self.residual)})"
        )


def check_hypergrad(
    estimator: Estimator,
    variables: BilevelParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    key: Key,
    inner_optimizer: Any = None,
    model_state: ModelState = None,
    rtol: float = 1e-2,
    step: float | None = None,
    max_seconds: float = 60.0,
    progress: Callable[[str], Any] | None = None,
) -> HypergradCheck:
    """Compare a hypergradient with directional finite differences, on the user's own problem, and say why it fails.

    Two directions per leaf of the hyperparameters: along the estimate, which tells its length, and random signs, which
    every entry enters. ⟨hypergrad, d⟩ is compared with [φ(λ + hd) − φ(λ − hd)]/2h, φ the outer loss after the window's
    steps (estimators that differentiate them) or at the inner optimum, found again by Newton's method (all others; for
    a learned response that of the problem over plain weights). Of a problem with a residual (``hg.with_residual``) the
    solution of r(w, λ) = 0 takes the place of the optimum, found again by fixed-point steps w − r(w, λ) and, where they
    are better, Newton's.

    Where the linear solve of ``hg.implicit`` stops early or is damped, as by default, the hypergradient of a converged,
    undamped solve is judged, and the report says how far the estimator's own is from it.

    Args:
      estimator: with any problem small enough to be solved again eight times per leaf; first take a smaller batch. All
        solves together take at most 40,000 Hessian products, the first, from the weights given, a fifth of them.
      variables: where. For ``hg.implicit`` at weights that solve the inner problem on ``inner_batch`` with the dropout
        mask that the key gives: elsewhere the verdict says so, with the error that is left at the optimum.
      inner_batch: with an ``inner_optimizer``, leaves have a window axis.
      outer_batch: of the outer loss.
      key: of the losses, or None.
      inner_optimizer: as for ``hg.value_and_hypergrad``.
      model_state: of a stateful problem.
      rtol: the error up to which a direction agrees.
      max_seconds: after which no further solve begins; what was measured by then is judged. ``math.inf`` for no limit.
      progress: called with a line of text as the check goes on, e.g. ``print``.
      step: h; None: 1e-3, and where the difference is uncertain or disagrees 1e-5, 1e-7, then 3e-2; where the losses
        compute in less than float64 1e-2, 3e-2, 1e-1.

    Returns:
      A ``HypergradCheck`` of Python numbers; ``print`` it. Everything is computed in float64, floating-point leaves
      cast to it, as far as the losses do not cast them down; in the leaves' own dtypes where the losses raise in
      float64 or draw other random numbers there (masks of ``jax.random.bernoulli`` depend on the dtype).

    Raises:
      TypeError: no estimator, or variables that are no ``BilevelParams``.
      ValueError: what the estimator itself refuses; ``rtol`` or ``step`` not positive.

    Valid when φ is smooth within the steps: where a kink (ReLU) or a basin's edge is nearer than 1e-7, differences of
    two step sizes disagree, and the check is inconclusive. A random direction sees an error in one of a leaf's n like
    entries divided by √n: a pass is no proof for single entries of large leaves. Where the inner loss is random, w* is
    that of the key's draw; a learned response follows the mean over draws, and is not judged. A saddle that Newton's
    method starts at passes. An inner loss with |w| or the norm of a group, whose solution is at that kink, is named as
    such; one with kinks made by data (a hinge of margins, absolute errors, ReLUs), at which no Newton step is possible,
    is inconclusive.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: jnp.sum(0.5 * jnp.exp(h) * w**2 - w)                  # w* = exp(-h)
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w))
    >>> at = hg.BilevelParams(jnp.exp(-jnp.array([0.0, 2.0])), jnp.array([0.0, 2.0]))
    >>> check_hypergrad(hg.implicit(problem, hg.solvers.cg(5)), at, (), (), key=None).passed
    True
    >>> few = check_hypergrad(hg.implicit(problem, hg.solvers.neumann(2, 0.1)), at, (), (), key=None)
    >>> few.passed, round(few.solver_cosine, 3), round(few.solver_error, 2)
    (True, 0.9, 0.8)

    Reference: Pedregosa, arXiv 1602.02355 (the derivative that is checked).
    """
    if not isinstance(estimator, Estimator):
        fix = "Pass e.g. hg.implicit(problem, hg.solvers.neumann(20))."
        raise TypeError(validate.message("an Estimator", validate.describe(estimator), fix))
    check_variables(variables)
    validate.number("rtol", rtol, low=0.0, strict=True)
    if max_seconds != math.inf:
        validate.number("max_seconds", max_seconds, low=0.0, strict=True)
    say = teller(progress)
    if step is not None:
        validate.number("step", step, low=0.0, strict=True)
    model_state = check_model_state(estimator.problem, model_state)
    given = variables, inner_batch, outer_batch, validate.as_key(key), model_state
    if any(tree.is_traced(leaf) for leaf in jax.tree.leaves(given)):
        fix = "Call check_hypergrad outside jax.jit and other transformations: it compiles what it needs itself."
        raise TypeError(validate.message("arrays to check at", "traced values", fix))
    budget = Budget(time.perf_counter() + max_seconds, say)
    case = _Case(estimator, inner_optimizer, given, budget)
    budget.say("the estimate")
    own = _values(case)
    try:
        with jax.enable_x64(True):
            wide = case.in_float64()
            if _same(own, _values(wide), variables):
                return _check(wide, rtol, step, "")
            note = "not in float64: the losses draw other random numbers there"
    except Exception as error:  # what a model fixed to float32 raises; what is wrong in itself raises again below
        note = f"not in float64: there they raise {type(error).__name__}: {str(error).splitlines()[0]:.120}"
    return _check(case, rtol, step, note)


class _Case(NamedTuple):
    """What is checked, and where: ``given`` is variables, inner batch, outer batch, key, model state."""

    estimator: Estimator
    inner_optimizer: Any
    given: tuple[BilevelParams, Batch, Batch, Array | None, ModelState]
    budget: Budget

    def in_float64(self) -> "_Case":
        def cast(leaf: Any) -> Any:
            return jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

        return self._replace(given=jax.tree.map(cast, self.given))

    def context(self, at: Trained | None = None) -> Context:
        """Return what the estimate knows: before its inner steps, or after them where ``at`` is what they reached."""
        (params, hyperparams), inner_batch, outer_batch, key, model_state = self.given
        batches = data.one_step(inner_batch) if self.inner_optimizer is None else inner_batch
        start = Trained(params, None, model_state)
        ends = start, at or start, batches, outer_batch, split_keys(key), self.inner_optimizer
        return Context(self.estimator.problem, hyperparams, *ends)


def _check(case: _Case, rtol: float, step: float | None, note: str) -> HypergradCheck:
    estimate, at = one_estimate(case.estimator, case.inner_optimizer)(*case.given)
    own, own_solve = estimate, next(iter(solves_in(estimate.info)), None)
    residual, of_solver = math.nan, Alignment(math.nan, math.nan, math.nan)
    if own_solve is not None:
        residual = float(own_solve.residual)
        if case.estimator.reference is not None and _approximates(own_solve):
            case = case._replace(estimator=case.estimator.reference())
            estimate, at = one_estimate(case.estimator, case.inner_optimizer)(*case.given)
            of_solver = align(own.hypergrad, estimate.hypergrad)
    response = case.estimator.problem.response
    ctx, gradient = case.context(at), estimate.hypergrad
    if case.estimator.train is not None:
        reference = _differences.rolled_out(ctx, case.budget)
    elif response is None or response.weights is None:
        reference = _differences.resolved(ctx, unknowns(case.estimator, ctx), case.budget)
    else:
        plain = at._replace(params=response.weights(at.params, ctx.hyperparams))
        center, gradient = response.base_hyperparams(ctx.hyperparams), response.base_hyperparams(gradient)
        over_plain = ctx._replace(problem=response.base_problem, hyperparams=center, at=plain)
        reference = _differences.resolved(over_plain, budget=case.budget)

    estimates, solve = [gradient], next(iter(solves_in(estimate.info)), None)
    optimum = reference.optimum
    if optimum is not None and optimum.converged and response is None:
        there = _estimate_at(case.estimator, ctx, at._replace(params=optimum.params))
        estimates, solve = [gradient, there.hypergrad], next(iter(solves_in(there.info)), None)

    precision = dataflow.working_precision(functools.partial(_losses, ctx), (at.params, ctx.hyperparams))
    steps = (_STEPS if precision == jnp.float64 else _WIDE_STEPS) if step is None else (step,)
    epsilon = float(jnp.finfo(precision).eps)
    measured = _differences.measure(reference, estimates, steps, rtol=rtol, epsilon=epsilon)
    rows, *others = [[_differences.direction(each, *pair, rtol) for pair in measured] for each in estimates]
    errors = [row.error for there in others for row in there if row.uncertainty <= rtol]
    count, one_by_one = len(jax.tree.leaves(ctx.hyperparams)), len({row.leaf for row in rows} - {_differences.ALL})
    if one_by_one < count and rows and rows[0].leaf == _differences.ALL:
        note = _noted(
            note, f"{one_by_one} of {count} leaves were moved one by one before the time was over, all of them together"
        )
    slope = _condition(case, ctx)
    found = HypergradCheck(
        verdict=_PASSED,
        reasons=(),
        rows=tuple(rows),
        rtol=rtol,
        step=max((difference.step for _, difference in measured), default=0.0),
        dtype=str(precision),
        note=note,
        outer_loss=float(estimate.value),
        inner_gradient_norm=float(np.linalg.norm(slope)),
        error_at_optimum=max(errors, default=math.nan),
        residual=residual,
        solver_cosine=of_solver.cosine,
        solver_error=of_solver.error,
    )
    lost = _lost_in_rounding(found.rows, gradient, rtol)
    if lost:
        small = f"{len(lost)} leaves have too small a derivative to be judged one by one; all together agree"
        found = found._replace(note=_noted(found.note, small))
    judged = [row for row in found.rows if row.leaf not in lost]
    agrees = all(row.error <= rtol and row.uncertainty <= rtol for row in judged) and flat(gradient).any()
    if agrees and of_solver.cosine <= 0:
        reason = (
            f"the estimator's own solve turns the hypergradient (cosine {digits(of_solver.cosine)}, residual "
            f"{digits(residual)}): more products or damping, or train longer. A converged solve is right"
        )
        return found._replace(verdict=_FAILED, reasons=(reason,))
    if agrees:
        return found
    return _explained(case, ctx, reference, found, flat(gradient), slope, solve)


def _noted(*notes: str) -> str:
    return "\n".join(filter(None, notes))


def _lost_in_rounding(rows: Sequence[Direction], gradient: Hyperparams, rtol: float) -> set[str]:
    """Return the leaves of uncertain rows that are a small part of a gradient that agrees along all leaves together."""
    together = [row for row in rows if row.leaf == _differences.ALL]
    if not together or any(not (row.error <= rtol and row.uncertainty <= rtol) for row in together):
        return set()
    norms = {
        name: float(np.linalg.norm(np.asarray(leaf, np.float64)))
        for name, leaf in zip(tree.leaf_names(gradient), jax.tree.leaves(gradient), strict=True)
    }
    whole = math.hypot(*norms.values())
    return {row.leaf for row in rows if not row.uncertainty <= rtol and norms.get(row.leaf, whole) < _SMALL * whole}


def _estimate_at(estimator: Estimator, ctx: Context, at: Trained) -> Estimate:
    """Return the estimate at other weights, with the optimizer of ``ctx``, which tells what is frozen; no steps."""

    def run(at: Trained) -> Estimate:
        there = ctx._replace(start=at, at=at)
        return estimator.estimate(estimator.init(there)[0], there)

    return jax.jit(run)(at)


def _approximates(solve: SolveInfo) -> bool:
    """Return whether a solve stopped early, or is damped, on purpose: not where it broke down.

    A solver of the user's own, which tells no products, is judged itself.
    """
    status = Status(int(solve.status))
    if float(solve.residual) > _BROKEN or int(solve.num_products) < 0:
        return False
    return status == Status.TRUNCATED or (status == Status.CONVERGED and float(solve.damping) > 0)


class _Reason(NamedTuple):
    """A row of the table of reasons; no row below one that ``ends`` it counts."""

    holds: bool
    text: str
    verdict: str = _FAILED
    ends: bool = True


def _explained(
    case: _Case,
    ctx: Context,
    reference: Reference,
    found: HypergradCheck,
    gradient: np.ndarray,
    slope: np.ndarray,
    solve: SolveInfo | None,
) -> HypergradCheck:
    """Return a check that did not pass, with verdict and reasons; ``solve`` is that at the optimum if there is one."""
    rtol, key, response = found.rtol, ctx.keys.solve, case.estimator.problem.response is not None
    other = ctx if key is None else ctx._replace(keys=ctx.keys._replace(solve=jax.random.fold_in(key, 1)))
    again, redrawn = (float(np.nan_to_num(align(_condition(case, where), slope).error)) for where in (ctx, other))
    noise = f"another key changes its gradient by {digits(redrawn)} of its norm"
    noisy = key is not None and redrawn > 1e-6
    vague = [row for row in found.rows if not row.uncertainty <= rtol]
    wrong = max((row.error for row in found.rows if row.uncertainty <= rtol < row.error), default=0.0)
    residual, status = (0.0, "") if solve is None else (float(solve.residual), Status(int(solve.status)).name)
    stopped = "a residual that was not measured" if math.isnan(residual) else f"residual {digits(residual)}"
    broken = residual > 1 or status in ("DIVERGED", "NOT_FINITE") or (status == "INDEFINITE" and residual > rtol)
    norm, there = digits(found.inner_gradient_norm), found.error_at_optimum
    solved, has_residual = there <= rtol, ctx.problem.residual is not None
    if vague and reference.optimum is not None and not (response or has_residual):
        at, epsilon = ctx.at.params, float(jnp.finfo(found.dtype).eps)
        marks = unknowns(case.estimator, ctx)
        kinks = _kinks.weights_at_kinks(
            lambda w: inner_loss_fn(ctx)(tree.filled(marks, w, at), ctx.hyperparams), tree.selected(marks, at), epsilon
        )
        found = found._replace(kinks=kinks)
    outer_slope = jax.jit(jax.grad(lambda w: outer_loss_fn(ctx)(w, ctx.hyperparams)[0]))
    nearby = jax.tree.map(lambda w: w + 0.01 * (1 + jnp.abs(w)), ctx.at.params)
    # A loss at its minimum has a slope nearby; one that does not use the weights has none there either.
    still = not bool(gradient.any()) and all(abs(row.measured) < 1e-8 for row in found.rows)
    still = bool(still and not flat(outer_slope(ctx.at.params)).any() and flat(outer_slope(nearby)).any())
    reasons = [  # most certain first; from "broke down" on, a difference that can be trusted disagrees
        _Reason(bool(found.kinks), _kinked(found.kinks), _KINKED, ends=not wrong),
        _Reason(
            not np.isfinite(gradient).all(),
            "the estimate is not finite: look for inf or NaN in the losses and in their derivatives",
        ),
        _Reason(
            still and not response,
            "inconclusive: the hypergradient is zero here, and so are the differences and ∂L_out/∂w: λ is stationary. "
            "Check at other hyperparameters",
            _INCONCLUSIVE,
        ),
        _Reason(
            not (gradient.any() or response),
            "every entry of the hypergradient is zero: the outer loss does not use the weights that it is given, or "
            "not differentiably; or no hyperparameter has an effect here (dead units, a saturated bijector)",
        ),
        _Reason(
            again > 1e-6,
            "the inner loss is no function of its arguments: with the same key its gradient changed by "
            f"{digits(again)} of its norm. Draw all random numbers from the key that the loss is given",
            ends=False,
        ),
        _Reason(
            response and noisy,
            f"inconclusive: the inner loss is random ({noise}), and a response follows the mean over draws where "
            "this check solves for one. Check without the noise",
            _INCONCLUSIVE,
        ),
        _Reason(
            bool(vague),
            _uncertain(vague, reference, found.dtype, has_residual=has_residual),
            _INCONCLUSIVE,
            ends=not wrong,
        ),
        _Reason(
            broken,
            f"the linear solve broke down ({status}, residual {digits(residual)}): H is singular or indefinite here, "
            "or the step size too large (see diagnostics.extreme_eigenvalues). Give the solver damping, or the loss a "
            "decay",
        ),
        _Reason(
            there <= 0.5 * wrong,
            "the inner problem is not solved at these weights, with this batch and key: "
            f"‖{'residual' if has_residual else '∇_w L_in'}‖ = {norm}. At its "
            f"solution {'the estimate is right' if solved else 'more is wrong'} (error {digits(there)}). Train "
            "longer, or check there",
            _UNSOLVED if solved else _FAILED,
            ends=solved,
        ),
        _Reason(
            not residual <= rtol,
            f"the linear solve stopped at {stopped}: more terms or steps, or a larger step size (see "
            "diagnostics.extreme_eigenvalues). Few terms have the right direction and too small a norm",
        ),
        _Reason(
            response,
            "the response has not learned the best response: train it longer, or on perturbations of another scale",
        ),
        _Reason(
            noisy,
            f"the inner loss is random ({noise}): do all products of a solve and the mixed product share one key, "
            "keys.solve? Fresh masks are another matrix each",
            ends=False,
        ),
        _Reason(
            case.estimator.train is not None,
            "not the derivative of these steps: a truncated unroll, a stop_gradient, or a wrong custom derivative",
        ),
        _Reason(
            True,
            "not explained by residual or weights: a stop_gradient or a custom derivative in a loss, or the estimator",
        ),
    ]
    held = [reason for reason in reasons if reason.holds]
    held = held[: next(i for i, reason in enumerate(held) if reason.ends) + 1]
    verdict = _FAILED if any(reason.verdict == _FAILED for reason in held) else held[-1].verdict
    return found._replace(verdict=verdict, reasons=tuple(reason.text for reason in held))


def _values(case: _Case) -> np.ndarray:
    """Return both losses at the point given, where random numbers enter them, and a residual's norm."""
    ctx = case.context()
    if ctx.keys.inner is None:
        return np.zeros(())
    return np.array(jax.jit(functools.partial(_losses, ctx))(case.given[0]), np.float64)


def _same(own: np.ndarray, wide: np.ndarray, variables: BilevelParams) -> bool:
    """Return whether the losses are the same but for rounding: they draw the same random numbers."""
    coarsest = max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(variables))
    return bool(np.allclose(own, wide, rtol=max(1e-5, 20 * coarsest), atol=1e-6, equal_nan=True))


def _losses(ctx: Context, at: tuple[Params, Hyperparams]) -> tuple[Array, ...]:
    """Return both losses, and the norm of a residual."""
    losses = inner_loss_fn(ctx)(*at), outer_loss_fn(ctx)(*at)[0]
    return losses if ctx.problem.residual is None else (*losses, tree.norm(residual_fn(ctx)(*at)))


def _condition(case: _Case, ctx: Context) -> np.ndarray:
    """Return what is zero at the inner solution, ∇_w L_in or the residual, traced anew at every call."""
    fn = jax.grad(inner_loss_fn(ctx)) if ctx.problem.residual is None else residual_fn(ctx)
    found = jax.jit(fn)(ctx.at.params, ctx.hyperparams)
    return flat(tree.selected(unknowns(case.estimator, ctx), found))


def _kinked(kinks: Mapping[str, int]) -> str:
    """Say where the kinks are and what to do; "" where there are none."""
    where = " and ".join(f"{count} of {readable(leaf) or 'the weights'}" for leaf, count in kinks.items())
    return (
        f"weights are at a kink of the inner loss ({where}; |w| or a norm at 0): they stay there when λ moves, and "
        "hg.implicit moves them. Leave the term with the kink out of the inner loss, and give its prox to "
        "hg.with_residual(problem, hg.residuals.proximal_gradient(problem, prox, step_size))"
    )


def _uncertain(vague: list[Direction], reference: Reference, dtype: str, *, has_residual: bool) -> str:
    """Say why differences cannot be trusted; "" where all can be."""
    if not vague:
        return ""
    cause = (
        "for a kink (ReLU, hinge, absolute error), an unbounded loss, or a step that leaves the losses' domain: try a "
        "smooth activation or loss, more decay, a bijector, or another step; or give the condition that the solution "
        "meets at a kink to hg.with_residual"
    )
    if dtype != "float64":
        cause = f"for the rounding of {dtype}, in which the losses compute, or {cause}"
    if reference.products_left() <= 0:
        cause = "the limit of a check: take fewer weights or examples, or more decay, or train longer"
    if not reference.budget.seconds_left():
        cause = "the time given to the check: pass a larger max_seconds, or take fewer weights or examples"
    worst = max(vague, key=lambda row: np.nan_to_num(row.uncertainty, nan=np.inf))
    leaf, optimum = readable(worst.leaf) or "hyperparams", reference.optimum
    if has_residual and optimum is not None and not optimum.converged:
        if reference.products_left() > 0:
            cause = (
                "and no solution to rounding: is w − residual a step towards the solution (check sign and step size), "
                "and do these weights lie near one?"
            )
        reached = f"‖residual‖ = {digits(float(optimum.gradient_norm))} after {int(optimum.num_steps)} steps"
        return f"inconclusive: the iteration w ← w − residual did not converge, {reached}, {cause}"
    if optimum is not None and not optimum.converged:
        spent = f"{int(optimum.num_products):,} Hessian products"
        return f"inconclusive: from these weights {spent} led to no inner solution to rounding, {cause}"
    if math.isnan(worst.uncertainty):
        return f"inconclusive: near this {leaf} φ is not finite or no inner solution was found, {cause}"
    change = digits(worst.uncertainty)
    return f"inconclusive for {leaf}: its difference quotient is uncertain by {change} of its size, {cause}"
