"""The gradient check: an estimator's hypergradient compared with finite differences on the user's own problem.

    ⟨hypergrad, d⟩   against   [φ(λ + hd) − φ(λ − hd)] / 2h,      extrapolated from h and h/2 (Richardson)

    φ(λ) = L_out(w_K(λ), λ)  for estimators that differentiate steps: the window is run again
    φ(λ) = L_out(w*(λ), λ)   for all others: the inner problem is solved again, to rounding, from the weights given;
                             for a problem with a residual, w*(λ) solves r(w, λ) = 0 and is not a minimum
    φ(λ) = L_out(w, λ) − ⟨q, ∇_w L_in(w, λ)⟩    for ``implicit`` with more than 2,000 weights: its formula at given w,
                             with its own solution q of H q = ∂L_out/∂w, whose residual is measured too

None of them differentiates anything in λ. Two step sizes tell how far the difference quotient itself can be trusted.
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
from hypergrad.diagnostics import _differences, _float64, _kinks, _linearized
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
_ENDS = {
    "CONVERGED": "converged",
    "TRUNCATED": "used all its products",
    "INDEFINITE": "stopped at negative curvature",
}
_FOR_DIFFERENCES = 20.0  # seconds
_FEW_WEIGHTS = 2000  # up to here the inner problem is solved again


class HypergradCheck(NamedTuple):
    """The verdict of a gradient check. ``str()`` of it is a report.

    Attributes:
      verdict: "passed": every direction agrees within ``rtol``. "not at a solution of the inner problem": the estimate
        is wrong at the weights given, and right at the solution. "at a kink of the inner loss": see ``kinks``.
        "inconclusive": some differences are too uncertain to judge, and no other one disagrees. "FAILED" otherwise.
      reasons: why it did not pass, most certain first; empty if passed.
      rows: one ``Direction`` for each leaf, and one more of random signs for each leaf of more than one number. With
        more than four leaves, the first two rows are for directions in which all leaves are moved together; the rows
        for single leaves follow. Rows that were not measured within the time limit are omitted.
      rtol: the tolerance asked for.
      step: the largest step size h that was used. A leaf is moved by h times its root mean square.
      dtype: of the lowest precision in which the losses compute during the check.
      note: remarks, if there are any, else empty: what was compared and at which weights; why the check did not run in
        float64; what a lower precision changes; how many leaves were moved one by one.
      outer_loss: at the weights of the estimate.
      inner_gradient_norm: ‖∇_w L_in‖ there, over the weights that are trained, on the batch and with the key that the
        linear solve sees; of a problem with a residual ‖residual‖.
      error_at_optimum: the largest error of an estimate at the inner optimum instead; NaN where there is none.
      residual: of the estimate's linear solve; NaN without one.
      solver_cosine: where the estimate's linear solve stopped early or is damped, the cosine of its hypergradient with
        that of a converged, undamped solve. The rows then judge the latter: few products are no failure. NaN elsewhere,
        and with more than 2,000 weights.
      solver_error: ‖a − b‖/‖b‖ of the same two.
      kinks: how many weights of a leaf are at a kink of the inner loss (|w|, a norm at 0), by the leaf's path. Such a
        weight stays at its kink when λ moves, and ``hg.implicit`` moves it. Kinks are searched for
        if a difference is uncertain, and always with more than 2,000 weights. Empty if there are none.
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
        legend = (
            "\nalong: the direction of the estimate; random: random signs; ± (uncertainty of measured), error: relative"
        )
        reasons = "".join(f"\n- {reason}" for reason in self.reasons)
        return f"{head}{note}\n{table(lines)}{legend}{self._solver()}{reasons}"

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

    With more than 2,000 weights ``hg.implicit`` is checked at the weights given, without another solution: the formula
    ∂L_out/∂λ − (∂²L_in/∂w∂λ)ᵀ q by differences in λ, with the estimator's own solution q of H q = ∂L_out/∂w; the
    residual of q, measured anew, against what the solve claims; and both losses' gradients by differences of the
    losses. A pass then means that losses, keys, batches, bijectors and derivative rules are right. It does not say that
    the weights solve the inner problem.

    Args:
      estimator: with any problem. Where the inner problem is solved again, all solves together take at most 40,000
        Hessian products, the first, from the weights given, a fifth of them.
      variables: where. For ``hg.implicit`` with at most 2,000 weights at weights that solve the inner problem on
        ``inner_batch`` with the dropout mask that the key gives (``solve_inner``): elsewhere the verdict says so, with
        the error that is left at the optimum.
      inner_batch: with an ``inner_optimizer``, leaves have a window axis.
      outer_batch: of the outer loss.
      key: of the losses, or None.
      inner_optimizer: as for ``hg.value_and_hypergrad``.
      model_state: of a stateful problem.
      rtol: the error up to which a direction agrees.
      max_seconds: after which no further solve begins; what was measured by then is judged. ``math.inf`` for no limit.
        With more than 2,000 weights differences take at most 20 s more, if compilation was longer than that.
      progress: called with a line of text as the check goes on, e.g. ``print``.
      step: h; None: 1e-3, and where the difference is uncertain or disagrees 1e-5, 1e-7, then 3e-2; where not all is
        computed in float64 1e-2, 3e-2, 1e-1.

    Returns:
      A ``HypergradCheck`` of Python numbers; ``print`` it. Everything is computed in float64: the losses are traced in
      their own dtypes, so that their random numbers are those of training, and each operation then runs in float64,
      also where a model casts to float32 or bfloat16. In the leaves' own dtypes where that fails; the report says so.

    Raises:
      TypeError: no estimator, or variables that are no ``BilevelParams``.
      ValueError: what the estimator itself refuses; ``rtol`` or ``step`` not positive; an estimator that is biased or
        random by construction (``first_order``, ``sama``, ``evolution``), or a ``partition``.

    Valid when φ is smooth within the steps: where a kink (ReLU) or a basin's edge is nearer than 1e-7, differences of
    two step sizes disagree, and the check is inconclusive. A random direction sees an error in one of a leaf's n like
    entries divided by √n: a pass is no proof for single entries of large leaves. Where the inner loss is random, w* is
    that of the key's draw; a learned response follows the mean over draws, and is not judged. If the given weights are
    at a saddle point, Newton's method stays there and the check passes. An inner loss with |w| or the norm of a group,
    whose solution is at that kink, is named as such; one with kinks made by data (a hinge of margins, absolute errors,
    ReLUs), at which no Newton step is possible, is inconclusive.

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
    if estimator.unchecked:
        wanted = "an estimator whose hypergradient equals differences of the outer loss"
        raise ValueError(validate.message(wanted, "one that does not by construction", estimator.unchecked))
    check_variables(variables)
    validate.number("rtol", rtol, low=0.0, strict=True)
    if max_seconds != math.inf:
        validate.number("max_seconds", max_seconds, low=0.0, strict=True)
    say = teller(progress)
    if step is not None:
        validate.number("step", step, low=0.0, strict=True)
    model_state = check_model_state(estimator.problem, model_state)
    inner_batch, outer_batch = jax.tree.map(_as_jax, (inner_batch, outer_batch))
    given = variables, inner_batch, outer_batch, validate.as_key(key), model_state
    if any(tree.is_traced(leaf) for leaf in jax.tree.leaves(given)):
        fix = "Call check_hypergrad outside jax.jit and other transformations: it compiles what it needs itself."
        raise TypeError(validate.message("arrays to check at", "traced values", fix))
    budget = Budget(time.perf_counter() + max_seconds, say)
    case = _Case(estimator, inner_optimizer, given, budget, x64=jnp.result_type(float) == jnp.float64)
    budget.say("the estimate")
    own, again = _values(case), _values(case)  # traced anew: a loss's own random numbers are others
    if not np.allclose(own, again, rtol=1e-6, equal_nan=True):
        return _random(_check(case, rtol, step, ""), own, again)
    precision = _precision(case)
    rounded = functools.partial(_rounding, case, precision)
    try:
        wide = case.in_float64()
        with jax.enable_x64(True):
            values = _values(wide)
            same = np.allclose(own, values, rtol=max(1e-4, 50 * float(jnp.finfo(precision).eps)), equal_nan=True)
            found = _check(wide, rtol, step, "", rounded) if same else None
        if found is not None and (found.verdict != _FAILED or _agree(case, wide)):
            return found
        what = "the losses have other values there"
        if found is not None:
            what = "the estimate is another there. Does the estimator take its losses from ctx.problem?"
        note = f"not in float64: {what}"
    except Exception as error:  # what is wrong in itself raises again below
        note = f"not in float64: there they raise {type(error).__name__}: {str(error).splitlines()[0]:.200}"
    return _check(case, rtol, step, note)


def _as_jax(leaf: Any) -> Any:
    """Return a NumPy array as a JAX array, with the integers of the user's setting also where float64 is enabled."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf


class _Case(NamedTuple):
    """What is checked, and where: ``given`` is variables, inner batch, outer batch, key, model state."""

    estimator: Estimator
    inner_optimizer: Any
    given: tuple[BilevelParams, Batch, Batch, Array | None, ModelState]
    budget: Budget
    x64: bool  # whether the user has enabled float64

    def in_float64(self) -> "_Case":
        """Return the same case with float64 arrays, but for the batches."""
        variables, inner_batch, outer_batch, key, model_state = self.given
        problem = _float64.problem_in_float64(self.estimator.problem, *variables, model_state, x64=self.x64)
        with jax.enable_x64(True):
            at, state = _float64.to_float64(variables), _float64.to_float64(model_state)
        wide = self._replace(estimator=self.estimator._replace(problem=problem))
        return wide._replace(given=(at, inner_batch, outer_batch, key, state))

    def is_large(self) -> bool:
        """Whether the inner problem has too many weights to be solved again, and its formula is checked."""
        estimator, ctx = self.estimator, self.context()
        if estimator.train is not None or estimator.unknowns is None or estimator.problem.response is not None:
            return False
        return _count(unknowns(estimator, ctx), ctx) > _FEW_WEIGHTS

    def context(self, at: Trained | None = None) -> Context:
        """Return what the estimate knows: before its inner steps, or after them where ``at`` is what they reached."""
        (params, hyperparams), inner_batch, outer_batch, key, model_state = self.given
        batches = data.one_step(inner_batch) if self.inner_optimizer is None else inner_batch
        start = Trained(params, None, model_state)
        ends = start, at or start, batches, outer_batch, split_keys(key), self.inner_optimizer
        return Context(self.estimator.problem, hyperparams, *ends)


def _rounding(case: _Case, precision: Any, exact: Hyperparams) -> str:
    """Say how far the estimate in a precision lower than float32 is from the ``exact`` one, if there is time."""
    if jnp.finfo(precision).bits >= 32 or not case.budget.seconds_left():
        return ""
    case.budget.say(f"the estimate in {precision}")
    with jax.enable_x64(case.x64):
        own, _ = one_estimate(case.estimator, case.inner_optimizer)(*case.given)
    far = align(own.hypergrad, exact)
    return (
        f"the losses compute in {precision}: there the hypergradient differs from the checked one in float64 "
        f"by {digits(far.error)} of its norm (cosine {digits(far.cosine)})"
    )


def _check(
    case: _Case,
    rtol: float,
    step: float | None,
    note: str,
    rounded: Callable[[Hyperparams], str] = lambda _: "",
    *,
    resolve: bool = False,
) -> HypergradCheck:
    if case.is_large() and not resolve:
        return _check_linearized(case, rtol, step, note, rounded)
    estimate, at = one_estimate(case.estimator, case.inner_optimizer)(*case.given)
    own, own_solve = estimate, next(iter(solves_in(estimate.info)), None)
    residual, of_solver = math.nan, Alignment(math.nan, math.nan, math.nan)
    if own_solve is not None:
        residual = float(own_solve.residual)
        if case.estimator.reference is not None and _approximates(own_solve):
            case = case._replace(estimator=case.estimator.reference()._replace(problem=case.estimator.problem))
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

    precision, steps, epsilon = _resolution(case, step)
    measured = _differences.measure(reference, estimates, steps, rtol=rtol, epsilon=epsilon)
    rows, *others = [[_differences.direction(each, *pair, rtol) for pair in measured] for each in estimates]
    errors = [row.error for there in others for row in there if row.uncertainty <= rtol]
    slope = _condition(case, ctx)
    found, judged = _compared(measured, rows, gradient, rtol, (note, rounded(own.hypergrad), _cut_off(rows, ctx)))
    found = found._replace(
        dtype=precision,
        outer_loss=float(estimate.value),
        inner_gradient_norm=float(np.linalg.norm(slope)),
        error_at_optimum=max(errors, default=math.nan),
        residual=residual,
        solver_cosine=of_solver.cosine,
        solver_error=of_solver.error,
    )
    agrees = all(row.error <= rtol and row.uncertainty <= rtol for row in judged) and flat(gradient).any()
    skipped = _skipped(residual)
    if agrees and of_solver.cosine <= 0 and not residual > _BROKEN:
        reason = (
            f"the estimator's own solve turns the hypergradient (cosine {digits(of_solver.cosine)}, residual "
            f"{digits(residual)}): more products or damping, or train longer. A converged solve is right"
        )
        return found._replace(verdict=_FAILED, reasons=(reason,))
    if agrees:
        poor = f"the estimator's own solve has a residual of {digits(residual)}{skipped}" if skipped else ""
        return found._replace(note=_noted(found.note, poor))
    return _explained(case, ctx, reference, found, flat(gradient), slope, solve, flat(own.hypergrad))


def _check_linearized(
    case: _Case, rtol: float, step: float | None, note: str, rounded: Callable[[Hyperparams], str]
) -> HypergradCheck:
    """Check the formula of the implicit function theorem at the weights given."""
    before = case.context()
    marks = unknowns(case.estimator, before)
    try:
        found = _linearized.with_solution(case.estimator, case.inner_optimizer, case.given, marks)
    except Exception:
        one_estimate(case.estimator, case.inner_optimizer)(*case.given)  # refuses in the user's own names
        # An estimator of the user's own, which reads the hyperparameters: it cannot be asked for q.
        return _check(case, rtol, step, note, rounded, resolve=True)
    ctx, gradient, solve = case.context(found.at), found.estimate.hypergrad, found.solve
    claimed, damping = (math.nan, 0.0) if solve is None else (float(solve.residual), float(solve.damping))
    status = "" if solve is None else Status(int(solve.status)).name
    precision, steps, epsilon = _resolution(case, step)
    case.budget.say("the residual of its linear solve")
    parts = _linearized.parts(ctx, marks)
    residual = _linearized.measured_residual(parts, found.solution, damping)
    slope = flat(parts.condition(parts.weights, ctx.hyperparams))
    # Compiled, a difference takes milliseconds: however long the compilation took, some are measured.
    budget = case.budget.with_at_least(_FOR_DIFFERENCES)
    reference = _linearized.linearized(parts, found.solution, budget)
    measured = _differences.measure(reference, [gradient], steps, rtol=rtol, epsilon=epsilon)
    rows = [_differences.direction(gradient, *pair, rtol) for pair in measured]
    where = (
        f"{_count(marks, ctx):,} weights: the formula of the implicit function theorem was compared at the weights "
        f"given, where ‖{_name(ctx)}‖ = {digits(float(np.linalg.norm(slope)))} (0 at a solution). Its linear solve "
        f"{_ENDS.get(status, 'ended')}, with a residual of {digits(residual)}"
    )
    where += _skipped(residual)
    notes = where, note, rounded(gradient), _cut_off(rows, ctx)
    check, judged = _compared(measured, rows, gradient, rtol, notes)
    check = check._replace(
        dtype=precision,
        outer_loss=float(found.estimate.value),
        inner_gradient_norm=float(np.linalg.norm(slope)),
        residual=residual,
    )
    case.budget.say("the gradient of the inner gradient along q")
    along = lambda w: tree.vdot(found.solution, parts.condition(w, ctx.hyperparams))  # noqa: E731
    second = _linearized.rule_error(
        along,
        parts.transposed(parts.weights, found.solution),
        parts.weights,
        jax.tree.map(lambda _: True, parts.weights),
        steps,
        rtol=rtol,
        epsilon=epsilon,
    )
    vague = [row for row in judged if not row.uncertainty <= rtol]
    wrong = [row for row in judged if row.uncertainty <= rtol < row.error]
    entries, kinks = flat(gradient), dict[str, int]()
    if ctx.problem.residual is None:
        case.budget.say("kinks of the inner loss")
        condition = lambda w: parts.condition(w, ctx.hyperparams)  # noqa: E731
        searched = _kinks.weights_at_kinks(condition, parts.weights, epsilon, budget)
        if searched is None:
            cause = f"rounding in {precision} hides them" if budget.seconds_left() else "pass a larger max_seconds"
            unsearched = f"The search for weights at kinks of the inner loss did not end: {cause}"
            check = check._replace(note=_noted(check.note, unsearched))
        kinks = searched or kinks
    # In lower precision an ill-conditioned solve loses its residual to rounding.
    differs = precision == "float64" and math.isfinite(claimed) and abs(residual - claimed) > rtol * max(1.0, claimed)
    unreported = solve is None or int(solve.num_products) < 0  # a solver of the user's own: no approximation on purpose
    reasons = [
        _Reason(bool(kinks), _kinked(kinks), _KINKED),
        _not_finite(entries),
        _Reason(
            not entries.any(),
            "every entry of the hypergradient is zero: no hyperparameter has an effect here (dead units, a saturated "
            "bijector), or the outer loss does not use the weights",
        ),
        *_wrong_rules(ctx, steps, epsilon, rtol, budget),
        _wrong_rule(f"{_name(ctx)} along q", second, rtol),
        _broke_down(status, residual, rtol, in_training=bool(flat(found.solution).any())),
        _Reason(
            differs,
            f"the estimate solves another system: its solve claims a residual of {digits(claimed)}, and with this "
            f"{_name(ctx)} it is {digits(residual)}. Look for another batch, key or model state, a sign or a factor",
            ends=False,
        ),
        _Reason(
            unreported and not differs and not residual <= rtol,
            f"the linear solve stopped at a residual of {digits(residual)}: more terms or steps, or another solver",
            ends=False,
        ),
        _Reason(
            bool(wrong),
            "the hypergradient is not ∂L_out/∂λ − (∂²L_in/∂w∂λ)ᵀ q with its own q: a stop_gradient or a custom "
            "derivative in a loss, a bijector that is applied twice or not at all, or the estimator",
            ends=False,
        ),
        _Reason(bool(vague), _uncertain(vague, reference, precision, has_residual=False), _INCONCLUSIVE),
    ]
    return _judged(check._replace(kinks=kinks), reasons)


def _noted(*notes: str) -> str:
    return "\n".join(filter(None, notes))


def _compared(
    measured: Sequence[tuple[Any, Any]],
    rows: Sequence[Direction],
    gradient: Hyperparams,
    rtol: float,
    notes: Sequence[str],
) -> tuple[HypergradCheck, list[Direction]]:
    """Return a passed check of ``rows``, and those to judge: all but the leaves that are lost in rounding."""
    lost = _lost_in_rounding(rows, gradient, rtol)
    small = (
        f"{len(lost)} leaves have too small a derivative to be judged one by one; all together agree" if lost else ""
    )
    found = HypergradCheck(
        verdict=_PASSED,
        reasons=(),
        rows=tuple(rows),
        rtol=rtol,
        step=max((difference.step for _, difference in measured), default=0.0),
        dtype="",
        note=_noted(*notes, small),
        outer_loss=math.nan,
        inner_gradient_norm=math.nan,
        error_at_optimum=math.nan,
        residual=math.nan,
    )
    return found, [row for row in rows if row.leaf not in lost]


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


def _skipped(residual: float) -> str:
    if not residual > _BROKEN:
        return ""
    return f". The guard skips steps above {_BROKEN:g}: pass a larger solve_batch, or give the solver more damping"


def _approximates(solve: SolveInfo) -> bool:
    """Return whether a solve stopped early, or is damped, on purpose.

    A solver of the user's own, which tells no products, is judged itself.
    """
    status = Status(int(solve.status))
    if int(solve.num_products) < 0:
        return False
    return status == Status.TRUNCATED or (status == Status.CONVERGED and float(solve.damping) > 0)


def _agree(case: _Case, wide: _Case) -> bool:
    """Return whether the estimate is the same in float64: an estimator with losses of its own has other masks there."""
    if case.given[3] is None or case.estimator.estimate.__module__.startswith("hypergrad."):
        return True
    own, _ = one_estimate(case.estimator, case.inner_optimizer)(*case.given)
    with jax.enable_x64(True):
        exact, _ = one_estimate(wide.estimator, wide.inner_optimizer)(*wide.given)
    return not align(own.hypergrad, exact.hypergrad).error > 0.1


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
    own: np.ndarray,
) -> HypergradCheck:
    """Return a check that did not pass, with verdict and reasons.

    ``solve`` is that at the optimum if there is one, ``own`` the hypergradient by the estimator's own solver.
    """
    rtol, key, response = found.rtol, ctx.keys.solve, case.estimator.problem.response is not None
    other = ctx if key is None else ctx._replace(keys=ctx.keys._replace(solve=jax.random.fold_in(key, 1)))
    redrawn = float(np.nan_to_num(align(_condition(case, other), slope).error))
    noise = f"another key changes its gradient by {digits(redrawn)} of its norm"
    noisy = key is not None and redrawn > 1e-6
    vague = [row for row in found.rows if not row.uncertainty <= rtol]
    wrong = max((row.error for row in found.rows if row.uncertainty <= rtol < row.error), default=0.0)
    residual, status = (0.0, "") if solve is None else (float(solve.residual), Status(int(solve.status)).name)
    stopped = "a residual that was not measured" if math.isnan(residual) else f"residual {digits(residual)}"
    norm, there = digits(found.inner_gradient_norm), found.error_at_optimum
    solved, has_residual = there <= rtol, ctx.problem.residual is not None
    if vague and reference.optimum is not None and not (response or has_residual):
        at, epsilon = ctx.at.params, float(jnp.finfo(found.dtype).eps)
        marks = unknowns(case.estimator, ctx)
        gradient_at = jax.grad(lambda w: inner_loss_fn(ctx)(tree.filled(marks, w, at), ctx.hyperparams))
        kinks = _kinks.weights_at_kinks(jax.jit(gradient_at), tree.selected(marks, at), epsilon)
        found = found._replace(kinks=kinks or {})
    outer_slope = jax.jit(jax.grad(lambda w: outer_loss_fn(ctx)(w, ctx.hyperparams)[0]))
    nearby = jax.tree.map(lambda w: w + 0.01 * (1 + jnp.abs(w)), ctx.at.params)
    # A loss at its minimum has a slope nearby; one that does not use the weights has none there either.
    still = not bool(gradient.any()) and all(abs(row.measured) < 1e-8 for row in found.rows)
    still = bool(still and not flat(outer_slope(ctx.at.params)).any() and flat(outer_slope(nearby)).any())
    reasons = [  # most certain first; from "broke down" on, a difference that can be trusted disagrees
        _Reason(bool(found.kinks), _kinked(found.kinks), _KINKED, ends=not wrong),
        _Reason(
            bool(np.isfinite(own).all() and not np.isfinite(gradient).all()),
            "inconclusive: H is singular at these weights (no decay, dead units). There is no converged solve, and no "
            "unique inner solution: add a decay to the inner loss",
            _INCONCLUSIVE,
        ),
        _not_finite(gradient),
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
        *_wrong_rules(ctx, *_resolution(case, None)[1:], rtol, case.budget),
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
        _broke_down(status, residual, rtol),
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
    return _judged(found, reasons)


def _judged(found: HypergradCheck, reasons: Sequence[_Reason]) -> HypergradCheck:
    """Return the check with the reasons that hold, down to the first that ends the table; passed if there is none."""
    held = [reason for reason in reasons if reason.holds]
    held = held[: next((i for i, reason in enumerate(held) if reason.ends), len(held)) + 1]
    failed = any(reason.verdict == _FAILED for reason in held)
    verdict = _FAILED if failed else held[-1].verdict if held else _PASSED
    return found._replace(verdict=verdict, reasons=tuple(reason.text for reason in held))


def _not_finite(gradient: np.ndarray) -> _Reason:
    return _Reason(
        not np.isfinite(gradient).all(),
        "the estimate is not finite: look for inf or NaN in the losses and in their derivatives",
    )


def _random(found: HypergradCheck, first: np.ndarray, second: np.ndarray) -> HypergradCheck:
    """Return a failed check: the losses are random beside their key, and any agreement is by chance."""
    place = int(np.argmax(np.abs(first - second)))
    name = ("inner loss", "outer loss", "norm of the residual")[place]
    reason = (
        f"the {name} is no function of its arguments: with the same key it is {first[place]:.9g} and "
        f"{second[place]:.9g}. Draw all random numbers from the key that the loss is given"
    )
    return found._replace(verdict=_FAILED, reasons=(reason, *found.reasons))


def _broke_down(status: str, residual: float, rtol: float, *, in_training: bool = False) -> _Reason:
    """``in_training``: H may be indefinite, and a solve that stopped there is used if the guard lets it pass."""
    return _Reason(
        (residual > 1 and not in_training)
        or status in ("DIVERGED", "NOT_FINITE")
        or (status == "INDEFINITE" and residual > rtol and not in_training),
        f"the linear solve broke down ({status}, residual {digits(residual)}): H is singular or indefinite here, "
        "or the step size too large (see diagnostics.extreme_eigenvalues). Give the solver damping, or the loss a "
        "decay",
    )


def _wrong_rules(ctx: Context, steps: Sequence[float], epsilon: float, rtol: float, budget: Budget) -> list[_Reason]:
    """Return one row for each loss: does its gradient in the weights agree with differences of the loss?

    Not along leaves that do not train: where the inner loss has no gradient, e.g. frozen by ``stop_gradient``.
    """
    inner, outer = inner_loss_fn(ctx), outer_loss_fn(ctx)
    losses = {"inner": lambda w: inner(w, ctx.hyperparams), "outer": lambda w: outer(w, ctx.hyperparams)[0]}
    if ctx.problem.residual is not None:
        del losses["inner"]
    gradients = {name: jax.jit(jax.grad(loss))(ctx.at.params) for name, loss in losses.items()}
    marks = jax.tree.map(lambda _: True, ctx.at.params)
    if "inner" in gradients:
        marks = jax.tree.map(lambda g: bool(jnp.any(g)), gradients["inner"])
    rows = []
    for name, loss in losses.items():
        budget.say(f"the gradient of the {name} loss")
        row = _linearized.rule_error(loss, gradients[name], ctx.at.params, marks, steps, rtol=rtol, epsilon=epsilon)
        rows.append(_wrong_rule(f"the {name} loss", row, rtol))
    return rows


def _wrong_rule(name: str, row: Direction | None, rtol: float) -> _Reason:
    wrong = row is not None and row.uncertainty <= rtol < row.error
    figures = "" if row is None else f"{digits(row.estimated)}, by differences {digits(row.measured)}"
    return _Reason(
        wrong,
        f"jax.grad of {name} in the weights is not its derivative: along random signs {figures}. Look for a custom "
        "derivative rule or a stop_gradient. A straight-through estimator is one: if it is meant, the hypergradient "
        "follows its rule",
        ends=False,
    )


def _cut_off(rows: Sequence[Direction], ctx: Context) -> str:
    """Say how many leaves the time reached, where that is not all of them."""
    count, one_by_one = len(jax.tree.leaves(ctx.hyperparams)), len({row.leaf for row in rows} - {_differences.ALL})
    if one_by_one == count or not rows or rows[0].leaf != _differences.ALL:
        return ""
    return f"{one_by_one} of {count} leaves were moved one by one before the time was over, all of them together"


def _name(ctx: Context) -> str:
    return "∇_w L_in" if ctx.problem.residual is None else "residual"


def _count(marks: Any, ctx: Context) -> int:
    """Return how many weights the inner problem solves for."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree.selected(marks, ctx.at.params)))


def _precision(case: _Case) -> Any:
    """Return the dtype of lowest precision in which the losses compute."""
    return dataflow.working_precision(functools.partial(_losses, case.context()), case.given[0])


def _resolution(case: _Case, step: float | None) -> tuple[str, Sequence[float], float]:
    """Return the precision in which the losses compute, the steps that fit it, and its machine epsilon."""
    precision = _precision(case)
    steps = (_STEPS if precision == jnp.float64 else _WIDE_STEPS) if step is None else (step,)
    return str(precision), steps, float(jnp.finfo(precision).eps)


def _values(case: _Case) -> np.ndarray:
    """Return both losses at the point given, and a residual's norm."""
    return np.array(jax.jit(functools.partial(_losses, case.context()))(case.given[0]), np.float64)


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
        "for a kink (ReLU, hinge, absolute error, a whole number of steps), an unbounded loss, or a step that leaves "
        "the losses' domain: try other values, a smooth activation or loss, more decay, a bijector, another step; or "
        "give the condition that the solution meets at a kink to hg.with_residual"
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
    if math.isnan(worst.uncertainty) and not reference.budget.seconds_left():
        return f"inconclusive: the time was over before {leaf} was measured. Pass a larger max_seconds"
    if math.isnan(worst.uncertainty):
        return f"inconclusive: near this {leaf} φ is not finite or no inner solution was found, {cause}"
    change = digits(worst.uncertainty)
    return f"inconclusive for {leaf}: its difference quotient is uncertain by {change} of its size, {cause}"
