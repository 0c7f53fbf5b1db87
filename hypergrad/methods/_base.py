"""The protocol of an outer method for ``hg.minimize``: how λ moves, and how exact the solves must be.

One step asks the oracle for a point at other hyperparameters (an inner solve to a tolerance), and for the hypergradient
there (a linear solve to a tolerance). What was solved at the last point starts the next solve.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import tree
from hypergrad.types import Array, Hyperparams, Params, PyTree

__all__ = ["Bounds", "Method", "MethodStep", "Oracle", "Point", "attempt", "first_rate"]


class Point(NamedTuple):
    """Hyperparameters, and what is known there.

    Attributes:
      hyperparams: λ, unconstrained.
      params: the inner solution, to a tolerance.
      inner_state: state of the inner solver.
      linear_state: state of the linear solver.
      value: scalar, the outer loss; NaN before the first solve.
      hypergrad: tree like λ, dL_out/dλ; zeros where ``differentiate`` was not called.
      inner_residual: scalar, ‖∇_w L_in‖, or the norm of the problem's residual.
      inner_status: int32 scalar, an ``hg.inner_solvers.InnerStatus``.
      linear_status: int32 scalar, an ``hg.solvers.Status``.
      linear_residual: scalar, ‖Hq − ∂L_out/∂w‖/‖∂L_out/∂w‖ of the last linear solve, without damping.
      num_gradients: int32 scalar, gradients of the inner loss (or residuals) so far.
      num_products: int32 scalar, products with the Hessian so far, and one mixed product per hypergradient.
    """

    hyperparams: Hyperparams
    params: Params
    inner_state: PyTree
    linear_state: PyTree
    value: Array
    hypergrad: Hyperparams
    inner_residual: Array
    inner_status: Array
    linear_status: Array
    linear_residual: Array
    num_gradients: Array
    num_products: Array


class Bounds(NamedTuple):
    """Bounds on derivatives of both losses near a solution, by which errors of solves become errors of a hypergradient.

    Attributes:
      strong_convexity: μ > 0, below all eigenvalues of H.
      outer_smoothness: L_g, above all |eigenvalues| of ∂²L_out/∂w².
      mixed_norm: B ≥ ‖∂²L_in/∂w∂λ‖.
      hessian_lipschitz: Lipschitz constant of H in w; 0 where L_in is quadratic in w.
      mixed_lipschitz: Lipschitz constant of ∂²L_in/∂w∂λ in w.
    """

    strong_convexity: Any
    outer_smoothness: Any
    mixed_norm: Any
    hessian_lipschitz: Any
    mixed_lipschitz: Any


class Oracle(NamedTuple):
    """What a method may ask. Tolerances are absolute, and may be traced.

    Attributes:
      solve: ``solve(hyperparams, point, tolerance) -> Point``: the inner solution at other hyperparameters, started
        from that of ``point``, and the outer loss there. The counts go on from those of ``point``.
      differentiate: ``differentiate(point, tolerance) -> Point``: with the hypergradient, its linear solve from that of
        ``point``.
      outer_slope: ``outer_slope(point) -> scalar``, ‖∂L_out/∂w‖ there.
      estimate_bounds: ``estimate_bounds(point) -> (Bounds, num_products)``: from products at that point, not proven.
    """

    solve: Callable[[Hyperparams, Point, Any], Point]
    differentiate: Callable[[Point, Any], Point]
    outer_slope: Callable[[Point], Array]
    estimate_bounds: Callable[[Point], tuple[Bounds, Array]]


class MethodStep(NamedTuple):
    """The result of a step.

    Attributes:
      point: where the method stands: the last one accepted, with the counts of all solves.
      state: of the method.
      tolerance: scalar, on the inner residual of this step.
      step_size: scalar, of the step that led to the hyperparameters tried; 0 at first.
      accepted: bool scalar, whether they were accepted.
      stopped: bool scalar, whether the method cannot go on: its steps are too small to change anything.
      error_bound: scalar, bound on the error of the hypergradient at ``point``; NaN: the method has none.
    """

    point: Point
    state: PyTree
    tolerance: Array
    step_size: Array
    accepted: Array
    stopped: Array
    error_bound: Any = math.nan


class Method(NamedTuple):
    """A method, as two pure functions.

    Attributes:
      init: ``init(point) -> state``; of ``point`` nothing is known yet but λ and weights.
      step: ``step(oracle, point, state) -> MethodStep``. The first step evaluates the point that it is given.
    """

    init: Callable[[Point], PyTree]
    step: Callable[[Oracle, Point, PyTree], MethodStep]


def attempt(
    oracle: Oracle,
    point: Point,
    candidate: Hyperparams,
    tolerance: Any,
    allowed: Callable[[Point], Array],
    *,
    first: Array,
    linear_tolerance: Any = None,
) -> tuple[Point, Point, Array]:
    """Solve at ``candidate``; where that is allowed, differentiate there and stay; else go back to ``point``.

    ``first``: there is nothing to go back to. Returns the solution tried, where the method stands, with the counts of
    all solves, and whether the candidate was accepted.
    """
    trial = oracle.solve(candidate, point, tolerance)
    exactness = tolerance if linear_tolerance is None else linear_tolerance
    tried = jnp.isfinite(trial.value) & (first | allowed(trial))
    new = lax.cond(tried, lambda at: oracle.differentiate(at, exactness), lambda at: at, trial)
    accepted = tried & (first | tree.all_finite(new.hypergrad))
    back = point._replace(num_gradients=new.num_gradients, num_products=new.num_products)
    return trial, optax.tree.where(accepted, new, back), accepted


def first_rate(point: Point) -> Array:
    """Return the rate for which a step along the hypergradient has the length √dim λ; 0 where there is none."""
    size = tree.norm(point.hypergrad)
    dim = sum(leaf.size for leaf in jax.tree.leaves(point.hyperparams))
    usable = size > 0
    return jnp.where(usable, math.sqrt(dim) / jnp.where(usable, size, 1.0), 0.0)
