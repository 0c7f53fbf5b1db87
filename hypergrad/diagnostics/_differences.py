"""Finite differences of the outer loss, for checks: by a route that differentiates nothing in the hyperparameters.

    φ(λ) = L_out(w_K(λ), λ)   a window of K steps is run again                         ``rolled_out``
    φ(λ) = L_out(w*(λ), λ)    the inner problem is solved again, to rounding           ``resolved``

    D(h) = [φ(λ + hd) − φ(λ − hd)]/2h;     dφ along d = (4 D(h/2) − D(h))/3 + O(h⁴),   of which D tells the accuracy

Reference: Richardson, The approximate arithmetical solution by finite differences, 1911.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import tree
from hypergrad.diagnostics._base import flat, readable
from hypergrad.inner_solvers import _newton_cg
from hypergrad.training import Context, inner_loss_fn, outer_loss_fn, residual_fn, train
from hypergrad.types import Array, Hyperparams, Params, PyTree

__all__ = ["ALL", "MAX_PRODUCTS", "Budget", "Difference", "Direction", "Probe", "Reference"]
__all__ += ["direction", "measure", "of_function", "resolved", "rolled_out", "together"]

_SMALLEST = 1e-6  # root mean square of a leaf: below, rounding of φ would drown its differences
_FLOOR = 1e-3  # of the whole gradient's norm: what a leaf's error is measured against at the least
ALL = "all leaves together"
_MANY = 4  # leaves from which on they are moved together first, so that a short check says something of each
MAX_PRODUCTS = 40_000
"""Products with the Hessian, or with ∂r/∂w, that the solves of one check may take: for 10,000 weights some minutes."""
_FIRST_SHARE = 0.2  # of them for the first solve, from the weights given


class Reference(NamedTuple):
    """φ, and what it was made at.

    Attributes:
      value_at: ``value_at(λ, guess) -> (φ, w)``, w the inner solution; φ is NaN where none was found. ``guess`` is
        None, or ``(w', t)``, the solution at a λ' with λ = λ₀ + t(λ' − λ₀): the search starts at w₀ + t(w' − w₀).
      hyperparams: λ at which the check is made.
      optimum: the inner solution there; None for a window of steps.
      products_left: ``products_left() -> int``, Hessian products that are left to ``value_at``.
      budget: of time.
    """

    value_at: Callable[[Hyperparams, tuple[Params, float] | None], tuple[float, Params]]
    hyperparams: Hyperparams
    optimum: _newton_cg.Optimum | None
    products_left: Callable[[], int]
    budget: "Budget"


class Budget(NamedTuple):
    """How long a check may take, and whom it tells.

    Attributes:
      deadline: of ``time.perf_counter()``.
      say: called with a line of text.
    """

    deadline: float = math.inf
    say: Callable[[str], Any] = lambda _: None

    def seconds_left(self) -> float:
        """Return the seconds that are left; 0 where there are none."""
        return max(self.deadline - time.perf_counter(), 0.0)

    def with_at_least(self, seconds: float) -> "Budget":
        """Return a budget with that many seconds left, or more."""
        return self._replace(deadline=max(self.deadline, time.perf_counter() + seconds))


class Probe(NamedTuple):
    """A direction in which one leaf of the hyperparameters moves, or all of them together.

    Attributes:
      leaf: path of the leaf; ``ALL`` for all.
      kind: "along" a gradient, or "random" signs.
      directions: by the place of a leaf that moves: an array like it, entries of magnitude ≤ 1.
    """

    leaf: str
    kind: str
    directions: dict[int, np.ndarray]


class Direction(NamedTuple):
    """One directional derivative, by both routes.

    Attributes:
      leaf: path of the hyperparameter leaf that moves.
      kind: "along" the estimate, or "random" signs.
      estimated: ⟨hypergrad, d⟩.
      measured: by finite differences.
      uncertainty: of ``measured``, relative as ``error`` is: the change when the step is halved, or rounding.
      error: |estimated − measured| over the size that the derivative has in such a direction.
    """

    leaf: str
    kind: str
    estimated: float
    measured: float
    uncertainty: float
    error: float


class Difference(NamedTuple):
    """A derivative by central differences.

    Attributes:
      slope: extrapolated from h and h/2; NaN where φ is not available.
      uncertainty: the change of the quotient when h is halved, or what rounding of φ may change; NaN with ``slope``.
      step: h, relative to the leaf's root mean square.
    """

    slope: float
    uncertainty: float
    step: float


def rolled_out(ctx: Context, budget: Budget = Budget()) -> Reference:  # noqa: B008
    """Return φ(λ) after the window's steps from ``ctx.start``."""

    @jax.jit
    def run(hyperparams: Hyperparams) -> Array:
        at = train(ctx, hyperparams=hyperparams)
        return outer_loss_fn(ctx._replace(at=at))(at.params, hyperparams)[0]

    return of_function(run, ctx.hyperparams, budget)


def of_function(fn: Callable[[Hyperparams], Array], at: Hyperparams, budget: Budget) -> Reference:
    """Return a function of λ alone as a reference."""

    def value_at(hyperparams: Hyperparams, _guess: Any) -> tuple[float, Params]:
        return (float(fn(hyperparams)) if budget.seconds_left() else math.nan), ()

    return Reference(value_at, at, None, lambda: MAX_PRODUCTS, budget)


def resolved(ctx: Context, unknowns: PyTree = True, budget: Budget = Budget()) -> Reference:  # noqa: B008
    """Return φ(λ) at the inner solution: sought from the weights ``ctx.at``, and from there for other λ.

    ``unknowns`` is a tree prefix of bools: the other weights stay where they are. What a product takes is measured in
    one step, and what the time left allows bounds the products.
    """
    marks = jax.tree.broadcast(unknowns, ctx.at.params)
    outer = outer_loss_fn(ctx)
    # A minimum of the inner loss, or what a residual has in its place.
    search: Any = _newton_cg.newton if ctx.problem.residual is None else _newton_cg.root
    fn: Any = inner_loss_fn(ctx) if ctx.problem.residual is None else residual_fn(ctx)

    @jax.jit
    def solve(
        base: Params, guess: Params, ratio: float, hyperparams: Hyperparams, max_products: int
    ) -> tuple[_newton_cg.Optimum, Array]:
        start = jax.tree.map(lambda w, g: w + jnp.asarray(ratio, w.dtype) * (g - w), base, guess)

        def restricted(solved: Params) -> Any:
            result = fn(tree.filled(marks, solved, base), hyperparams)
            return result if ctx.problem.residual is None else tree.selected(marks, result)

        found = search(restricted, tree.selected(marks, start), max_products=max_products)
        found = found._replace(params=tree.filled(marks, found.params, base))
        return found, outer(found.params, hyperparams)[0]

    first, pace = tree.promote(ctx.at.params), 0.0

    def timed(*args: Any) -> tuple[_newton_cg.Optimum, Array]:
        nonlocal pace
        begin = time.perf_counter()
        found, value = jax.block_until_ready(solve(*args))
        pace = (time.perf_counter() - begin) / max(int(found.num_products), 1)
        return found, value

    def affordable(limit: int, share: float = 1.0) -> int:
        seconds = share * budget.seconds_left()
        return limit if pace == 0 or seconds == math.inf else min(limit, int(seconds / pace))

    budget.say("solving the inner problem")
    if budget.deadline < math.inf:
        solve(first, first, 0.0, ctx.hyperparams, 0)  # compiles, takes no step
        timed(first, first, 0.0, ctx.hyperparams, 1)
    limit = max(affordable(int(_FIRST_SHARE * MAX_PRODUCTS), 0.5), 1)
    optimum, _ = timed(first, first, 0.0, ctx.hyperparams, limit)
    exhausted = not optimum.converged and int(optimum.num_products) >= limit
    left = 0 if exhausted else MAX_PRODUCTS - int(optimum.num_products)

    def value_at(hyperparams: Hyperparams, guess: tuple[Params, float] | None) -> tuple[float, Params]:
        nonlocal left
        allowed = affordable(left) if budget.seconds_left() else 0
        if allowed <= 0 or not optimum.converged:
            return math.nan, optimum.params
        found, value = timed(optimum.params, *(guess or (optimum.params, 0.0)), hyperparams, allowed)
        left -= int(found.num_products)
        return (float(value) if found.converged else math.nan), found.params

    return Reference(value_at, ctx.hyperparams, optimum, lambda: left, budget)


def measure(
    reference: Reference,
    estimates: Sequence[Hyperparams],
    steps: Sequence[float],
    *,
    rtol: float,
    epsilon: float,
    probes: Sequence[Probe] | None = None,
) -> list[tuple[Probe, Difference]]:
    """Return the derivative of φ along ``probes``, or along all leaves, each by the first of ``steps`` that will do.

    A difference will do if it is certain within ``rtol`` and agrees with one of the ``estimates``. Where none does: of
    those that are certain, or else of all, the one of least uncertainty. Of two that differ by more than both allow,
    the wider has crossed a kink or reached another basin. Steps are relative to the root mean square of the leaf that
    moves (1e-6 at the least), absolute where that is 0; φ rounds in a precision of ``epsilon``.

    Of many leaves all are moved together first. What the time does not reach after that is left out.
    """
    given, structure = jax.tree.flatten(reference.hyperparams)
    leaves = [jnp.asarray(np.asarray(leaf), leaf.dtype) for leaf in given]  # no weak types: one program for all probes
    center, _ = reference.value_at(jax.tree.unflatten(structure, leaves), None)
    probes, measured = probes or _probes(reference.hyperparams, estimates[0]), []

    def moved(probe: Probe, distance: float) -> Hyperparams:
        new = list(leaves)
        for place, along in probe.directions.items():
            new[place] = jnp.asarray(np.asarray(new[place], np.float64) + distance * along, new[place].dtype)
        return jax.tree.unflatten(structure, new)

    def difference(probe: Probe, step: float) -> Difference:
        length = step * max(_spread(leaves[place]) for place in probe.directions)
        first, found = reference.value_at(moved(probe, length), None)
        others = [reference.value_at(moved(probe, t * length), (found, t))[0] for t in (-1.0, 0.5, -0.5)]
        wide, narrow = (first - others[0]) / (2 * length), (others[1] - others[2]) / length
        rounding = 2 * epsilon * max(map(abs, (first, *others))) / length
        # One-sided quotients differ by O(h) where φ is smooth, by the jump of its slope where λ itself is at a kink.
        bend, nearer = (first + others[0] - 2 * center) / length, 2 * (others[1] + others[2] - 2 * center) / length
        kink = abs(nearer) if abs(nearer) > max(0.75 * abs(bend), 8 * rounding) else 0.0
        uncertainty = float(np.max([abs(narrow - wide), rounding, kink]))
        return Difference((4 * narrow - wide) / 3, uncertainty, step)

    def best(probe: Probe) -> Difference:
        found = difference(probe, steps[0])
        for step in steps[1:]:
            rows = [direction(estimate, probe, found, rtol) for estimate in estimates]
            if rows[0].uncertainty <= rtol and (step > found.step or any(row.error <= rtol for row in rows)):
                break
            new = difference(probe, step)
            if abs(new.slope - found.slope) > 3 * (new.uncertainty + found.uncertainty):
                better = step < found.step and direction(estimates[0], probe, new, rtol).uncertainty <= rtol
            else:
                better = new.uncertainty < found.uncertainty
            if better or math.isnan(found.uncertainty):
                found = new
        return found

    for number, probe in enumerate(probes, start=1):
        name = readable(probe.leaf) or "hyperparams"
        reference.budget.say(f"difference {number} of {len(probes)}: {name}, {probe.kind}")
        found = best(probe)
        cut_off = math.isnan(found.uncertainty) and not reference.budget.seconds_left()
        if cut_off and probe.leaf != ALL and probes[0].leaf == ALL:
            break
        measured.append((probe, found))
    return measured


def direction(gradient: Hyperparams, probe: Probe, measured: Difference, rtol: float) -> Direction:
    """Compare ⟨gradient, d⟩ with the measured derivative.

    Both errors are relative to the norm of the leaf's gradient, about the derivative along random signs and at least
    that along the gradient. A leaf so small that this leaves it uncertain is judged by its share of the whole.
    """
    leaves = jax.tree.leaves(gradient)
    moving = {place: np.asarray(leaves[place], np.float64) for place in probe.directions}
    estimated = float(sum((leaf * probe.directions[place]).sum() for place, leaf in moving.items()))
    # The norm along random signs: of one leaf ‖g‖, of leaves that move by different lengths that of the products.
    tops = {place: np.abs(along).max(initial=0.0) for place, along in probe.directions.items()}
    norm = np.sqrt(sum((tops[place] * np.linalg.norm(leaf)) ** 2 for place, leaf in moving.items()))
    size = float(np.nan_to_num([norm, abs(estimated), abs(measured.slope)]).max())
    if not measured.uncertainty <= rtol * size:
        size = max(size, float(np.nan_to_num(_FLOOR * np.linalg.norm(flat(gradient)))))
    uncertainty, error = (x / size if size > 0 else x for x in (measured.uncertainty, abs(estimated - measured.slope)))
    return Direction(probe.leaf, probe.kind, estimated, measured.slope, uncertainty, error)


def _spread(leaf: Any) -> float:
    """Return the root mean square of a leaf, 1 for a leaf of zeros: what steps are relative to."""
    values = np.asarray(leaf, np.float64)
    spread = float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
    return max(spread, _SMALLEST) if spread else 1.0


def _probes(hyperparams: Hyperparams, gradient: Hyperparams) -> list[Probe]:
    """Return two directions per leaf: along ``gradient``, and random signs, which every entry enters.

    Of many leaves two more come first, in which each leaf moves in proportion to its own size.
    """
    rng = np.random.default_rng(0)
    found: list[Probe] = []
    for place, (name, leaf) in enumerate(zip(tree.leaf_names(gradient), jax.tree.leaves(gradient), strict=True)):
        slope = np.asarray(leaf, np.float64)
        top = np.abs(slope).max(initial=0.0)
        along = slope / top if 0 < top < np.inf else np.ones(slope.shape)
        random = Probe(name, "random", {place: rng.choice([-1.0, 1.0], slope.shape)})
        found += (Probe(name, "along", {place: along}), random)[: min(slope.size, 2)]
    spreads = [_spread(leaf) for leaf in jax.tree.leaves(hyperparams)]
    if len(spreads) <= _MANY:
        return found
    joint = []
    for kind in ("along", "random"):
        each = {place: d for probe in found if probe.kind == kind for place, d in probe.directions.items()}
        signs = {} if kind == "along" else dict.fromkeys(range(len(spreads)), 1.0)
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(gradient)]
        filled = {place: each.get(place, rng.choice([-1.0, 1.0], shapes[place])) for place in {**each, **signs}}
        joint.append(_joint(kind, filled, spreads))
    return [*joint, *found]


def together(values: PyTree, marks: PyTree) -> Probe | None:
    """Return random signs on the marked leaves of ``values``, in proportion to their sizes; None without any."""
    rng, leaves = np.random.default_rng(0), jax.tree.leaves(values)
    moving = [place for place, mark in enumerate(jax.tree.leaves(marks)) if mark]
    signs = {place: rng.choice([-1.0, 1.0], np.shape(leaves[place])) for place in moving}
    return _joint("random", signs, [_spread(leaf) for leaf in leaves]) if moving else None


def _joint(kind: str, directions: dict[int, np.ndarray], spreads: list[float]) -> Probe:
    """Return the probe in which leaves move in proportion to their sizes."""
    largest = max(spreads[place] for place in directions)
    return Probe(ALL, kind, {place: along * (spreads[place] / largest) for place, along in directions.items()})
