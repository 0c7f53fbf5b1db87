"""Finite differences of the outer loss, for checks: by a route that differentiates nothing in the hyperparameters.

    φ(λ) = L_out(w_K(λ), λ)   a window of K steps is run again                         ``rolled_out``
    φ(λ) = L_out(w*(λ), λ)    the inner problem is solved again, to rounding           ``resolved``

    D(h) = [φ(λ + hd) − φ(λ − hd)]/2h;     dφ along d = (4 D(h/2) − D(h))/3 + O(h⁴),   of which D tells the accuracy

Reference: Richardson, The approximate arithmetical solution by finite differences, 1911.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import tree
from hypergrad.diagnostics import _optimum
from hypergrad.problem import BilevelParams, BilevelProblem, evaluate_inner, evaluate_outer, inner_gradient
from hypergrad.training import CallKeys, Rollout, make_window, resolve_optimizer, rollout
from hypergrad.types import Array, Batch, Hyperparams, ModelState, Params, PyTree

_SMALLEST = 1e-6  # root mean square of a leaf: below, rounding of φ would drown its differences


class Reference(NamedTuple):
    """φ, and what it was made at.

    Attributes:
      value_at: ``value_at(λ) -> (φ, sound)``.
      optimum: the inner solution at the given λ; None for a window of steps.
    """

    value_at: Callable[[Hyperparams], tuple[Array, Array]]
    optimum: _optimum.Optimum | None


class Probe(NamedTuple):
    """A direction in which one leaf of the hyperparameters moves.

    Attributes:
      place: of the leaf among all.
      leaf: its path.
      kind: "along" a gradient, or "random" signs.
      direction: array like the leaf, entries of magnitude ≤ 1.
    """

    place: int
    leaf: str
    kind: str
    direction: np.ndarray


class Difference(NamedTuple):
    """A derivative by central differences.

    Attributes:
      slope: extrapolated from h and h/2; NaN where φ is not finite or its inner problem could not be solved.
      uncertainty: what halving h changed in the quotient, or what rounding of φ may have; NaN with ``slope``.
      step: h, relative to the leaf's root mean square.
    """

    slope: float
    uncertainty: float
    step: float


def rolled_out(
    problem: BilevelProblem,
    params: Params,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    keys: CallKeys,
    inner_optimizer: Any,
    model_state: ModelState,
) -> Reference:
    """Return φ(λ) after the window's steps from ``params`` and a fresh optimizer state."""
    window = make_window(inner_batch, keys.inner)

    @jax.jit
    def value_at(hyperparams: Hyperparams) -> tuple[Array, Array]:
        optimizer = resolve_optimizer(inner_optimizer, problem.constrain(hyperparams))
        start = Rollout(params, optimizer.init(params), model_state)
        reached = rollout(inner_gradient(problem, hyperparams), optimizer, start, window)
        at = BilevelParams(reached.params, hyperparams)
        value = evaluate_outer(problem, at, outer_batch, keys.outer, reached.model_state).value
        return value, jnp.isfinite(value)

    return Reference(value_at, None)


def resolved(
    problem: BilevelProblem,
    at: BilevelParams,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    keys: CallKeys,
    model_state: ModelState,
) -> Reference:
    """Return φ(λ) at the inner optimum: sought from the weights given, and from there for other λ."""

    @jax.jit
    def solve(start: Params, hyperparams: Hyperparams) -> _optimum.Optimum:
        def inner(params: Params) -> Array:
            here = BilevelParams(params, hyperparams)
            return evaluate_inner(problem, here, inner_batch, keys.solve, model_state).value

        return _optimum.minimize(inner, start)

    @jax.jit
    def outer(params: Params, hyperparams: Hyperparams) -> Array:
        here = BilevelParams(params, hyperparams)
        return evaluate_outer(problem, here, outer_batch, keys.outer, model_state).value

    optimum = solve(*at)

    def value_at(hyperparams: Hyperparams) -> tuple[Array, Array]:
        found = solve(optimum.params, hyperparams)
        return outer(found.params, hyperparams), found.converged

    return Reference(value_at, optimum)


def probes(gradient: Hyperparams) -> list[Probe]:
    """Return two directions a leaf: along ``gradient``, and random signs, which every entry enters."""
    rng = np.random.default_rng(0)
    found: list[Probe] = []
    for place, (name, leaf) in enumerate(zip(tree.leaf_names(gradient), jax.tree.leaves(gradient), strict=True)):
        slope = np.asarray(leaf, np.float64)
        top = np.abs(slope).max(initial=0.0)
        along = slope / top if 0 < top < np.inf else np.ones(slope.shape)
        both = Probe(place, name, "along", along), Probe(place, name, "random", rng.choice([-1.0, 1.0], slope.shape))
        found += both[: min(slope.size, 2)]
    return found


def measure(
    value_at: Callable[[Hyperparams], tuple[Array, Array]],
    hyperparams: Hyperparams,
    along: Sequence[Probe],
    steps: Sequence[float],
    *,
    epsilon: float,
    enough: Callable[[Probe, Difference], bool],
) -> list[Difference]:
    """Return the derivative of φ along each direction, by the first of ``steps`` whose difference is good ``enough``.

    Where none is, by the one of least uncertainty. Steps are relative to the root mean square of the leaf that moves
    (1e-6 at the least), absolute where that is 0; φ rounds in a precision of ``epsilon``.
    """
    leaves, structure = jax.tree.flatten(hyperparams)

    def quotient(probe: Probe, length: float) -> tuple[float, float]:
        values = []
        for signed in (length, -length):
            moved: list[Any] = list(leaves)
            moved[probe.place] = jnp.asarray(leaves[probe.place] + signed * probe.direction, leaves[probe.place].dtype)
            value, sound = value_at(jax.tree.unflatten(structure, moved))
            values.append(float(value) if sound else float("nan"))
        return (values[0] - values[1]) / (2 * length), epsilon * max(map(abs, values)) / length

    def difference(probe: Probe, step: float) -> Difference:
        spread = float(jnp.sqrt(jnp.mean(jnp.square(leaves[probe.place]))))
        length = step * (max(spread, _SMALLEST) if spread else 1.0)
        (wide, _), (narrow, rounding) = quotient(probe, length), quotient(probe, length / 2)
        return Difference((4 * narrow - wide) / 3, float(np.maximum(abs(narrow - wide), rounding)), step)

    def best(probe: Probe) -> Difference:
        found = difference(probe, steps[0])
        for step in steps[1:]:
            if enough(probe, found):
                break
            new = difference(probe, step)
            # A wider step that disagrees by more than both allow has reached another basin, or beyond a kink.
            elsewhere = step > found.step and abs(new.slope - found.slope) > 3 * (new.uncertainty + found.uncertainty)
            if np.isnan(found.uncertainty) or (new.uncertainty < found.uncertainty and not elsewhere):
                found = new
        return found

    return [best(probe) for probe in along]


def derivative(gradient: Hyperparams, probe: Probe) -> float:
    """Return ⟨gradient, d⟩."""
    leaf: PyTree = jax.tree.leaves(gradient)[probe.place]
    return float((np.asarray(leaf, np.float64) * probe.direction).sum())
