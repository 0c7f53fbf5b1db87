"""Compare linear solvers on the system that a problem's own hypergradient asks for.

    (H + δI) q = ∂L_out/∂w           each solver beside a converged solve with the same δ

Two questions are answered apart: how far a solver is from the solution of its own, damped system (cosine and norm ratio
of its hypergradient), and how far that solution is from the undamped one (the damping's cosine). Where H is indefinite
or nearly singular, as in the middle of training, no undamped solve converges: the least damped one that does takes its
place.

Reference: Lorraine, Vicol & Duvenaud, arXiv 1911.02590 (a comparison of inversion methods).
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import data, dataflow, tree, validate
from hypergrad.diagnostics._base import Alignment, align, digits, flat, table, teller, unknowns
from hypergrad.diagnostics._spectrum import extreme_eigenvalues
from hypergrad.drivers import compiled
from hypergrad.estimators import implicit
from hypergrad.problem import BilevelParams, BilevelProblem, check_model_state, check_problem, check_variables
from hypergrad.solvers import (
    LinearSolver,
    Status,
    cg,
    dense,
    gmres,
    identity,
    neumann,
    preconditioners,
    recycled_cg,
    richardson,
)
from hypergrad.training import Context, Trained, inner_loss_fn, residual_fn, split_keys
from hypergrad.types import Batch, Hyperparams, Key, ModelState, Params, PyTree

__all__ = ["SolverComparison", "SolverRow", "catalogue", "compare_solvers"]

_NUM_SOLVES = 5
_GOOD = 0.95  # the cosine from which a direction counts as good
_FEW = 3000  # unknowns up to which the reference is a factorisation
_MANY = 500  # products of an iteration for the reference
_RATIOS = 1e-3, 1e-2, 3e-2, 0.1, 0.3  # of δ and the largest curvature, tried in turn where H is not positive definite


class SolverRow(NamedTuple):
    """One solver on the problem's system, after five solves of it, so that warm starts count.

    Attributes:
      name: of the solver.
      status: of the last solve, a ``hg.solvers.Status``.
      num_products: of the last solve; −1 where not known.
      residual: ‖b − (H + δI) q‖/‖b‖; NaN where not measured.
      damping: δ.
      reference_damping: damping of the converged solve that the row is compared with. It is δ where a solve with δ
        converges, else that of the least damped solve that converges; NaN where none does.
      cosine: of its hypergradient with that of the converged solve.
      norm_ratio: its norm over that of the converged one.
      first_cosine: the cosine after the first solve, without a warm start.
      damping_cosine: cosine between two converged hypergradients: one solved with ``reference_damping``, and one solved
        with the smallest damping for which any converged solve was found (0 if H is positive definite). It is 1 if
        ``reference_damping`` does not change the direction.
      milliseconds: per hypergradient, the median of the solves after the first.
      mebibytes: scratch memory of the compiled hypergradient; NaN where the device does not tell.
    """

    name: str
    status: Status
    num_products: int
    residual: float
    damping: float
    reference_damping: float
    cosine: float
    norm_ratio: float
    first_cosine: float
    damping_cosine: float
    milliseconds: float
    mebibytes: float


class SolverComparison(NamedTuple):
    """Solvers compared on one system. ``str()`` of it is a table, with a sentence of advice.

    Attributes:
      rows: one ``SolverRow`` per solver, in the order given.
      advice: what follows from the numbers.
    """

    rows: tuple[SolverRow, ...]
    advice: str

    def __str__(self) -> str:
        """Return the rows as a table, and the advice."""
        head = ["solver", "products", "residual", "δ", "reference δ", "cosine", "norm ratio", "first cosine"]
        lines = [[*head, "cosine of damping", "ms", "MiB", "status"]]
        for row in self.rows:
            numbers = row[3:10]
            spent = "-" if row.num_products < 0 else str(row.num_products)
            cost = f"{row.milliseconds:.1f}", digits(row.mebibytes)
            lines.append([row.name, spent, *map(digits, numbers), *cost, row.status.name])
        legend = (
            "reference δ: of the converged solve beside which a row is put; first cosine: of the first solve, without "
            "a warm start; cosine of damping: of that solve with the least damped one"
        )
        return f"{table(lines)}\n{legend}\n{self.advice}"


def catalogue(*, diagonal: bool = False) -> dict[str, LinearSolver]:
    """Return the solvers that ``compare_solvers`` tries on a symmetric system, by name.

    Args:
      diagonal: whether the system has a diagonal, which more of them use then.
    """
    found = {
        "identity()": identity(),
        "neumann(5)": neumann(5),
        "neumann(20)": neumann(20),
        "cg(3), the default": cg(3, relative_damping=0.01, warm_start=True),
        "cg(10, relative_damping=0.01)": cg(10, relative_damping=0.01, warm_start=True),
        "cg(20)": cg(20),
        "cg(50)": cg(50),
        "cg(10, relative_damping=0.1)": cg(10, relative_damping=0.1, warm_start=True),
        "richardson(1, momentum=0.7)": richardson(1, momentum=0.7),
        "recycled_cg(5, 10)": recycled_cg(5, 10),
    }
    if diagonal:
        found["cg(20, jacobi())"] = cg(20, preconditioner=preconditioners.jacobi())
        found["neumann(20, jacobi())"] = neumann(20, preconditioner=preconditioners.jacobi())
    return found


def compare_solvers(
    problem: BilevelProblem,
    variables: BilevelParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    key: Key,
    solvers: Mapping[str, LinearSolver] | None = None,
    diagonal: Callable[[Params, Hyperparams], PyTree] | None = None,
    trainable: PyTree = None,
    model_state: ModelState = None,
    progress: Callable[[str], Any] | None = None,
) -> SolverComparison:
    """Run every solver on the linear system of a problem's own hypergradient, beside converged solves.

    Args:
      problem: as for ``hg.implicit``.
      variables: where. Take weights from the middle of training, where the solver will work.
      inner_batch: one batch of the inner loss.
      outer_batch: of the outer loss.
      key: of the losses, the same for all solves, or None.
      solvers: which, by name. None: a catalogue of ten, and two more with a ``diagonal``; two ``gmres`` where the
        problem has a residual.
      diagonal: as for ``hg.implicit``.
      trainable: as for ``hg.implicit``.
      model_state: of a stateful problem.
      progress: called with a line of text before each solver, e.g. ``print``.

    Returns:
      A ``SolverComparison``; ``print`` it. Where no reference converged, figures are NaN, printed as -.

    Raises:
      TypeError: ``solvers`` is not a dict of ``LinearSolver``.
      ValueError: as for ``hg.value_and_hypergrad``.

    Valid for this point and this batch. Here, all five solves of a warm-started solver use the same linear system.
    During training the system changes between solves, so a warm start helps less: expect an accuracy there between the
    value in ``first_cosine`` (no warm start) and the value in ``cosine`` (last solve). The reference is a factorisation
    for up to 3,000 weights, and an iteration of up to 500 products beyond. If H is not positive definite, the exact
    solution is not useful for training. The reference is then a damped solve. The damping is 0.001, 0.01, 0.03, 0.1 or
    0.3 times the largest curvature: the smallest value with which the solve converges. In the middle of training a low
    cosine need not mean a bad result.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum(jnp.exp(h) * w**2 - 2 * w)           # w* = exp(-h)
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w))
    >>> at = hg.BilevelParams(jnp.exp(-jnp.array([0.0, 1.0])), jnp.array([0.0, 1.0]))
    >>> found = compare_solvers(problem, at, (), (), key=None, solvers={"cg(2)": hg.solvers.cg(2)})
    >>> round(found.rows[0].cosine, 4), found.rows[0].num_products
    (1.0, 2)

    Reference: Lorraine, Vicol & Duvenaud, arXiv 1911.02590.
    """
    check_problem(problem)
    check_variables(variables)
    model_state = check_model_state(problem, model_state)
    symmetric = problem.residual is None
    if solvers is None:
        chosen = (
            catalogue(diagonal=diagonal is not None)
            if symmetric
            else {"gmres(50, 25)": gmres(50, 25), "gmres(10, 10)": gmres(10, 10)}
        )
    else:
        chosen = dict(solvers) if isinstance(solvers, Mapping) else {}
    named = all(isinstance(name, str) and isinstance(solver, LinearSolver) for name, solver in chosen.items())
    if not chosen or not named:
        fix = 'Pass e.g. {"cg(10)": hg.solvers.cg(10)}.'
        raise TypeError(validate.message("solvers as a dict of LinearSolvers by name", validate.describe(solvers), fix))
    given, say = (variables, inner_batch, outer_batch, validate.as_key(key), model_state), teller(progress)
    at, keys = Trained(variables.params, None, model_state), split_keys(given[3])
    ctx = Context(problem, variables.hyperparams, at, at, data.one_step(inner_batch), outer_batch, keys, None)
    marks = unknowns(implicit(problem, trainable=trainable), ctx)
    fn = inner_loss_fn(ctx) if symmetric else residual_fn(ctx)
    precision = dataflow.working_precision(lambda w: fn(w, variables.hyperparams), variables.params)
    enough = max(1e-3, 4 * float(jnp.finfo(precision).eps))  # a loss in bfloat16 bounds what a residual can be
    size = sum(leaf.size for leaf in jax.tree.leaves(tree.selected(marks, variables.params)))

    def estimator(solver: LinearSolver) -> Any:
        return implicit(problem, solver, diagonal=diagonal, trainable=trainable)

    def converged(solver: LinearSolver) -> _Reference | None:
        hypergrad, info, _, _ = _repeat(estimator(solver), 1, *given)
        finite = bool(np.isfinite(flat(hypergrad[0])).all())
        return _Reference(hypergrad[0], float(info.damping)) if finite and float(info.residual) <= enough else None

    def reference(damping: float) -> _Reference | None:
        if not symmetric:
            return converged(dense() if size <= _FEW else gmres(_MANY, 100, 1e-5))
        # CG stops where H + δI is not positive definite: its exact solution is then far from what training follows.
        found, info, _, _ = _repeat(estimator(cg(_MANY, 1e-5, damping=damping)), 1, *given)
        definite = Status(int(info.status)) in (Status.CONVERGED, Status.TRUNCATED)
        if definite and size <= _FEW:
            return converged(dense(damping=damping))
        return _Reference(found[0], damping) if definite and float(info.residual) <= enough else None

    say("the converged, undamped solve")
    least, ratio = reference(0.0), 0.0
    if least is None and symmetric:
        seen = extreme_eigenvalues(problem, variables, inner_batch, key=key, num_steps=20, model_state=model_state)
        for higher in _RATIOS:
            damping = higher * max(float(seen.largest), -float(seen.smallest))
            if least is None and damping > -float(seen.smallest):
                say(f"a converged solve, damped by {higher:g} of the largest curvature")
                least, ratio = reference(damping), higher
    truths = {0.0: least}
    rows = []
    for name, solver in chosen.items():
        say(name)
        found, info, times, memory = _repeat(estimator(solver), _NUM_SOLVES, *given)
        damping = float(info.damping)
        if damping not in truths:
            say(f"the converged solve with δ = {digits(damping)}")
            truths[damping] = reference(damping)
        truth = truths[damping] or least
        if truth is None or least is None:
            last = first = Alignment(math.nan, math.nan, math.nan)
            of_reference = of_damping = math.nan
        else:
            last, first = align(found[-1], truth.hypergrad), align(found[0], truth.hypergrad)
            of_reference, of_damping = truth.damping, align(truth.hypergrad, least.hypergrad).cosine
        rows.append(
            SolverRow(
                name,
                Status(int(info.status)),
                int(info.num_products),
                float(info.residual),
                damping,
                of_reference,
                last.cosine,
                last.norm_ratio,
                first.cosine,
                of_damping,
                1e3 * float(np.median(times)),
                memory,
            )
        )
    return SolverComparison(tuple(rows), _advice(rows, least, ratio))


class _Reference(NamedTuple):
    """A converged solve."""

    hypergrad: Hyperparams
    damping: float


def _repeat(
    estimator: Any,
    count: int,
    variables: BilevelParams,
    inner_batch: Batch,
    outer_batch: Batch,
    key: Any,
    model_state: ModelState,
) -> tuple[list[Hyperparams], Any, list[float], float]:
    """Return the hypergradients of ``count`` solves, the last solve's info, seconds of each but the first, and MiB."""
    init, run = compiled(estimator)
    state = init(variables, key, model_state)
    step = jax.jit(run).lower(variables, inner_batch, outer_batch, key, state, model_state).compile()
    found: list[Hyperparams] = []
    times: list[float] = []
    info: Any = None
    for _ in range(count):
        start = time.perf_counter()
        estimate = jax.block_until_ready(step(variables, inner_batch, outer_batch, key, state, model_state))[0]
        times.append(time.perf_counter() - start)
        state, info = estimate.state, estimate.info
        found.append(estimate.hypergrad)
    analysis = step.memory_analysis()
    memory = math.nan if analysis is None else analysis.temp_size_in_bytes / 2**20
    return found, info, times[1:] or times, memory


def _advice(rows: list[SolverRow], least: _Reference | None, ratio: float) -> str:
    known = [row for row in rows if row.cosine == row.cosine]
    good = [row for row in known if row.cosine >= _GOOD]
    if any(row.status == Status.NOT_FINITE for row in rows):
        return "The Hessian or the outer slope is not finite at these weights: no solver can be judged."
    if least is None:
        return (
            "No reference converged, with or without damping, and no solver can be judged: H is nearly singular or far "
            "from positive definite here. Compare again at weights that were trained for longer, or with a decay in "
            "the inner loss."
        )
    if not flat(least.hypergrad).any():
        return "The hypergradient of the reference is zero here: there is no direction to compare with."
    damping = (
        f"A solve converges from a damping of {ratio:g} times the largest curvature on: try "
        f"hg.solvers.cg(10, relative_damping={ratio:g}, warm_start=True)."
    )
    if not known:
        return f"Every solver returned a hypergradient of zero: H is not positive definite here. {damping}"
    best = max(known, key=lambda row: row.cosine)
    if not good:
        closest = f"{best.name} comes closest ({digits(best.cosine)})"
        fix = f"H is not positive definite here. {damping}" if ratio else "Allow more products."
        return f"No solver reaches a cosine of {_GOOD}: {closest}. {fix}"
    cheapest = min(good, key=lambda row: (_products(row), -row.cosine))
    text = (
        f"{cheapest.name} has a cosine of at least {_GOOD} from the fewest products: {digits(cheapest.cosine)}, "
        f"{_spent(cheapest)}"
    )
    if best is not cheapest:
        text += f"; {best.name} is the closest: {digits(best.cosine)}, {_spent(best)}"
    if not 0.5 < cheapest.norm_ratio < 2:
        text += (
            f". Its length is {digits(cheapest.norm_ratio)} times the exact one: take an outer optimizer that ignores "
            "scale, such as Adam"
        )
    others = [row for row in known if row.reference_damping != row.damping]
    if others:
        text += (
            ". H is indefinite or nearly singular here: solvers of less damping are compared with a solve damped by "
            f"δ = {digits(others[0].reference_damping)}"
        )
    if cheapest.damping_cosine < _GOOD:
        text += (
            f". Its damping turns the hypergradient (cosine {digits(cheapest.damping_cosine)} with the least damped "
            "one): fine for training, not as a reference"
        )
    return text + "."


def _products(row: SolverRow) -> float:
    return math.inf if row.num_products < 0 else row.num_products


def _spent(row: SolverRow) -> str:
    return f"{row.milliseconds:.1f} ms" if row.num_products < 0 else f"{row.num_products} products"
