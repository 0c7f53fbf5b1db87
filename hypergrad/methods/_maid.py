"""MAID: descent with proven decrease, and solves as inexact as the proofs allow.

    e = ‖∇_w L_in‖/μ ≥ ‖w − w*‖,      δ = ‖Hq − ∂L_out/∂w‖,      G = ‖∂L_out/∂w‖,      ‖q‖ ≤ (G + δ)/μ
    ω = L_M ‖q‖ e + (B + L_M e)/μ · (δ + (L_H ‖q‖ + L_g) e)                error of the hypergradient z is at most ω

    ω > (1 − η)‖z‖                                                         solve both more exactly
    λ' = λ − αz;   U(λ') − L(λ) + ηα‖z‖² ≤ 0                               accept, α ← 1¼α
    else, if U − L_out at λ and λ' are the smaller part of α‖z‖²           α ← ½α
    else                                                                   solve both more exactly

Tolerances change by the factor that the failed test asks for, at most 100; after an accepted step they become larger by
what its tests leave, at most 4.

U and L are L_out(w) ± (Ge + ½L_g e²), which hold L_out(w*(λ)) between them. L_H, L_M are the Lipschitz constants of H
and of M = ∂²L_in/∂w∂λ in w, B = ‖M‖. Every accepted step lowers the true outer loss, if the constants are right.

Reference: Salehi, Mukherjee, Roberts & Ehrhardt, An adaptively inexact first-order method for bilevel optimization with
application to hyperparameter learning, arXiv 2308.10098. There, tolerances change by fixed factors, and a failed test
of decrease always shortens the step first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import tree, validate
from hypergrad.inner_solvers import InnerStatus
from hypergrad.methods._base import Bounds, Method, MethodStep, Oracle, Point, attempt, first_rate
from hypergrad.types import Array, Hyperparams

__all__ = ["maid"]

_ETA = 1e-4
_SMALL_PART = 0.1  # of α‖z‖², which the bounds on both losses may take
_MOST_FAILURES = 40  # refinements and rejections in a row


class MAIDState(NamedTuple):
    """What MAID keeps.

    Attributes:
      candidate: λ that the next step tries; that of the point itself where its solves must become more exact.
      step_size: scalar, α of that step; 0 before the first hypergradient.
      searching: bool scalar, whether the hypergradient at the point is exact enough for a step.
      tolerance: scalar, ε on ‖w − w*‖.
      linear_tolerance: scalar, on δ.
      bounds: the constants in use.
      num_steps: int32 scalar.
      failures: int32 scalar, refinements and rejections in a row.
    """

    candidate: Hyperparams
    step_size: Array
    searching: Array
    tolerance: Array
    linear_tolerance: Array
    bounds: Bounds
    num_steps: Array
    failures: Array


def maid(
    strong_convexity: float | Callable[[Hyperparams], Any] | None = None,
    *,
    outer_smoothness: float | Callable[[Hyperparams], Any] | None = None,
    mixed_norm: float | Callable[[Hyperparams], Any] | None = None,
    hessian_lipschitz: float | Callable[[Hyperparams], Any] | None = None,
    mixed_lipschitz: float | Callable[[Hyperparams], Any] | None = None,
    tolerance: float = 0.1,
    uncertified: bool = False,
) -> Method:
    """Descend with steps that provably lower the outer loss, and choose all tolerances and step sizes by those proofs.

    Args:
      strong_convexity: μ > 0, below all eigenvalues of the inner Hessian: a number, or a function of the unconstrained
        hyperparameters, e.g. ``lambda log_decay: jnp.exp(log_decay).min()``. None: see ``uncertified``.
      outer_smoothness: L_g, above all |eigenvalues| of ∂²L_out/∂w².
      mixed_norm: B, above ‖∂²L_in/∂w∂λ‖, λ unconstrained.
      hessian_lipschitz: Lipschitz constant of the inner Hessian in w; 0 where the inner loss is quadratic in w.
      mixed_lipschitz: Lipschitz constant of ∂²L_in/∂w∂λ in w; for ½ Σ e^λ w² with a decay each, the largest e^λ.
      tolerance: ε > 0, where to begin, on ‖w − w*‖ and on the linear residual. It adapts: within wide limits it changes
        the cost alone.
      uncertified: constants that are None are estimated at each point from products with the Hessian (about 40, in
        ``num_products``). Nothing is proven then: say so by True.

    Returns:
      A ``Method`` for ``hg.minimize``. A step is a solve at new hyperparameters, accepted or not, or a more exact one
      at the same (``step_size`` 0): give ``max_steps`` room. ``history.error_bound`` is ω; ``minimize`` has converged
      where both ‖z‖ and ω are at most ``tol``, so that the true hypergradient is at most 2 ``tol``.

    Raises:
      TypeError, ValueError: a constant that is negative, or None without ``uncertified=True``; ``tolerance`` ≤ 0.

    Valid where μ bounds the Hessian at the weights met, the others hold near the solutions, and ∂L_out/∂λ does not
    depend on w. For networks there is no such μ. Wrong constants are not detected: with a μ that is too large, a start
    far from its solution can end the run. Estimates are those of a minimum of the inner loss, not of a residual.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum((w - h) ** 2)
    >>> outer = lambda w, h, batch, key: 0.5 * jnp.sum((w - 3.0) ** 2)
    >>> at = hg.BilevelParams(jnp.zeros(1), jnp.zeros(1))
    >>> exact = maid(1.0, outer_smoothness=1.0, mixed_norm=1.0, hessian_lipschitz=0.0, mixed_lipschitz=0.0)
    >>> found = hg.minimize(hg.BilevelProblem(inner, outer), at, (), (), method=exact)
    >>> bool(found.converged), round(float(found.hyperparams[0]), 2)
    (True, 3.0)

    Reference: Salehi et al., arXiv 2308.10098.
    """
    given = Bounds(strong_convexity, outer_smoothness, mixed_norm, hessian_lipschitz, mixed_lipschitz)
    validate.flag("uncertified", uncertified)
    validate.number("tolerance", tolerance, low=0.0, strict=True)
    for name, constant in given._asdict().items():
        if constant is None and not uncertified:
            fix = "Pass it, or uncertified=True: then it is estimated, and no decrease is proven."
            raise ValueError(validate.message(f"{name}, a bound that the certificates use", "None", fix))
        if constant is not None and not callable(constant):
            validate.number(name, constant, low=0.0, strict=name == "strong_convexity")
    some = any(constant is None for constant in given)

    def bounds_at(hyperparams: Hyperparams, estimated: Bounds) -> Bounds:
        def value(name: str, constant: Any, estimate: Any) -> Any:
            made: Any = constant(hyperparams) if callable(constant) else constant
            if constant is not None and jnp.ndim(made) != 0:
                fix = "Reduce it, e.g. jnp.exp(log_decay).min()."
                raise ValueError(validate.message(f"{name} to be a scalar", f"shape {jnp.shape(made)}", fix))
            return jnp.asarray(estimate if constant is None else made, estimate.dtype)

        return Bounds(*map(value, Bounds._fields, given, estimated))

    def estimate(oracle: Oracle, point: Point, known: Bounds) -> tuple[Bounds, Point]:
        if not some:
            return known, point
        found, spent = oracle.estimate_bounds(point)
        return tree.match_dtypes(found, known), point._replace(num_products=point.num_products + spent)

    def init(point: Point) -> MAIDState:
        dtype = point.value.dtype
        zero, one, none = jnp.zeros((), dtype), jnp.ones((), dtype), jnp.zeros((), jnp.int32)
        start, bounds = jnp.asarray(tolerance, dtype), Bounds(*[one] * len(given))
        return MAIDState(point.hyperparams, zero, jnp.array(False), start, start, bounds, none, none)

    def step(oracle: Oracle, point: Point, state: MAIDState) -> MethodStep:
        dtype, first = point.value.dtype, state.num_steps == 0
        known = state.bounds  # at first 1 each, where they are estimated

        def error_in_value(at: Point, slope: Array) -> Array:
            """Return the bound on |L_out(w) − L_out(w*)|, G = ``slope``."""
            here = bounds_at(at.hyperparams, known)
            apart = at.inner_residual / here.strong_convexity
            bound = slope * apart + 0.5 * here.outer_smoothness * apart**2
            return jnp.where(here.strong_convexity > 0, bound, jnp.inf)

        slope_here = oracle.outer_slope(point)
        blur_here = error_in_value(point, slope_here)
        slope_squared = (state.step_size * tree.vdot(point.hypergrad, point.hypergrad)).astype(dtype)  # α‖z‖²

        def falls(trial: Point, blurred: Array) -> Array:
            return trial.value - point.value + blurred + _ETA * slope_squared <= 0

        def allowed(trial: Point) -> Array:
            blurred = error_in_value(trial, oracle.outer_slope(trial)) + blur_here
            return ~state.searching | falls(trial, blurred)

        exactness = state.tolerance * jnp.maximum(bounds_at(state.candidate, known).strong_convexity, 0.0)
        trial, new, accepted = attempt(
            oracle, point, state.candidate, exactness, allowed, first=first, linear_tolerance=state.linear_tolerance
        )
        bounds, new = lax.cond(accepted, lambda at: estimate(oracle, at, known), lambda at: (known, at), new)
        slope_there = oracle.outer_slope(trial)
        blurred = error_in_value(trial, slope_there) + blur_here
        here, slope = bounds_at(new.hyperparams, bounds), jnp.where(accepted, slope_there, slope_here)
        apart = new.inner_residual / here.strong_convexity
        linear = new.linear_residual * slope
        adjoint = (slope + linear) / here.strong_convexity
        omega = here.mixed_lipschitz * adjoint * apart + (
            (here.mixed_norm + here.mixed_lipschitz * apart)
            / here.strong_convexity
            * (linear + (here.hessian_lipschitz * adjoint + here.outer_smoothness) * apart)
        )
        omega = jnp.where(here.strong_convexity > 0, omega, jnp.inf).astype(dtype)
        size = tree.norm(new.hypergrad)
        exact = omega <= (1 - _ETA) * size

        moved = accepted & state.searching
        in_value = jnp.where(state.searching, _SMALL_PART * slope_squared / blurred, jnp.inf)  # > 1: exact enough
        in_slope = jnp.where(accepted, 0.5 * size / omega, jnp.inf)
        room = jnp.nan_to_num(jnp.minimum(in_value, in_slope), nan=0.0).astype(dtype)
        too_long = ~accepted & ((in_value >= 1) | ~jnp.isfinite(trial.value) | falls(trial, blurred) | ~state.searching)
        searching = jnp.where(accepted, exact, too_long)
        grown = jnp.where(moved, 1.25, jnp.where(too_long, 0.5, 1.0)) * state.step_size
        step_size = jnp.where(state.step_size == 0, first_rate(new), grown).astype(dtype)
        factor = jnp.where(too_long, 1.0, jnp.where(moved & exact, jnp.clip(0.25 * room, 1.0, 4.0), 1.0))
        factor = jnp.where(searching, factor, jnp.clip(room, 0.01, 0.5)).astype(dtype)
        rate = jnp.where(searching, step_size, 0.0)
        failures = jnp.where(moved & exact, 0, state.failures + 1)
        new_state = MAIDState(
            jax.tree.map(lambda h, z: h - rate.astype(h.dtype) * z, new.hyperparams, new.hypergrad),
            step_size,
            searching,
            state.tolerance * factor,
            state.linear_tolerance * factor,
            optax.tree.where(accepted, bounds, known),
            state.num_steps + 1,
            failures,
        )
        taken = jnp.where(state.searching, state.step_size, 0.0)
        no_more = ~searching & (new.inner_status == InnerStatus.STALLED)  # the rounding of the dtype
        stopped = no_more | (failures >= _MOST_FAILURES) | (first & ~accepted)
        return MethodStep(new, new_state, exactness, taken, accepted, stopped, omega)

    return Method(init, step)
