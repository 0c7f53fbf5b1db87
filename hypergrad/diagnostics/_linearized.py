"""The implicit function theorem's formula, part by part, at the weights given: where no solution can be computed again.

    hypergrad = ∂L_out/∂λ − (∂c/∂λ)ᵀ q,    (∂c/∂w)ᵀ q = b = ∂L_out/∂w,     c = ∇_w L_in, or a residual

    φ(λ) = L_out(w, λ) − ⟨q, c(w, λ)⟩      at fixed w and q has the hypergradient as its derivative
    ‖b − (∂c/∂w)ᵀ q‖/‖b‖                   tells whether q solves the system of these weights, this batch and this key

q is the solution that the estimator itself computed. To read it out, c is replaced by c + μ, with μ as an additional
hyperparameter: at μ = 0 the estimator's hypergradient with respect to μ is −q. What it costs is an estimate and a few
gradients, whatever the number of weights.

Reference: Lorraine, Vicol & Duvenaud, arXiv 1911.02590 (the formula).
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from hypergrad import tree
from hypergrad.diagnostics import _differences
from hypergrad.diagnostics._differences import Budget, Direction, Reference
from hypergrad.drivers import one_estimate, solves_in
from hypergrad.estimators import Estimate, Estimator
from hypergrad.problem import BilevelParams, BilevelProblem, OverfittingWarning
from hypergrad.solvers import SolveInfo
from hypergrad.training import Context, Trained, inner_loss_fn, outer_loss_fn, residual_fn
from hypergrad.types import Array, Hyperparams, Params, PyTree

__all__ = ["Parts", "Solution", "linearized", "measured_residual", "parts", "rule_error", "with_solution"]


class Solution(NamedTuple):
    """An estimate and the solution of its linear system.

    Attributes:
      estimate: of the problem itself.
      at: where it was made.
      solution: q, like the weights that are solved for, None in place of the others.
      solve: its ``SolveInfo``; None where the estimator has none.
    """

    estimate: Estimate
    at: Trained
    solution: Params
    solve: SolveInfo | None


def with_solution(estimator: Estimator, inner_optimizer: Any, given: Sequence[Any], marks: PyTree) -> Solution:
    """Return the estimate, and q as the hypergradient of a shift μ of the inner gradient; ``marks``: the unknowns."""
    (params, hyperparams), *rest = given
    shift = tree.selected(marks, jax.tree.map(jnp.zeros_like, params))
    shifted = estimator._replace(problem=_shifted(estimator.problem, marks))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverfittingWarning)  # which would count μ
        estimate, at = one_estimate(shifted, inner_optimizer)(BilevelParams(params, (hyperparams, shift)), *rest)
    hypergrad, of_shift = estimate.hypergrad
    solution = jax.tree.map(jnp.negative, of_shift)
    return Solution(estimate._replace(hypergrad=hypergrad), at, solution, next(iter(solves_in(estimate.info)), None))


def _shifted(problem: BilevelProblem, marks: PyTree) -> BilevelProblem:
    """Return the problem over (λ, μ) whose inner gradient, or residual, is c(w, λ) + μ."""

    def inner_loss(params: Params, both: tuple[Hyperparams, Params], *rest: Any) -> Any:
        found = problem.inner_loss(params, both[0], *rest)
        value, *others = found if problem.stateful or problem.has_aux else (found,)
        value = value + tree.vdot(tree.selected(marks, params), both[1])
        return (value, *others) if others else value

    def outer_loss(params: Params, both: tuple[Hyperparams, Params], *rest: Any) -> Any:
        return problem.outer_loss(params, both[0], *rest)

    def residual(params: Params, both: tuple[Hyperparams, Params], *rest: Any) -> Params:
        found = of(params, both[0], *rest)
        return tree.filled(marks, optax.tree.add(tree.selected(marks, found), both[1]), found)

    prior, of = problem.prior, cast(Any, problem.residual)
    return dataclasses.replace(
        problem,
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        constrain=lambda both: problem.constrain(both[0]),
        prior=None if prior is None else lambda both: prior(both[0]),
        residual=None if problem.residual is None else residual,
    )


class Parts(NamedTuple):
    """The functions of the formula, each compiled once, over the weights that are solved for.

    Attributes:
      condition: (w, λ) ↦ c.
      outer: (w, λ) ↦ L_out.
      weights: w as given.
      hyperparams: λ.
      transposed: (w, q) ↦ (∂c/∂w)ᵀ q.
    """

    condition: Callable[[Params, Hyperparams], Params]
    outer: Callable[[Params, Hyperparams], Array]
    weights: Params
    hyperparams: Hyperparams
    transposed: Callable[[Params, Params], Params]


def parts(ctx: Context, marks: PyTree) -> Parts:
    """Return the parts of the formula; ``marks`` tells which weights are solved for."""
    everything, loss, outer_loss = ctx.at.params, inner_loss_fn(ctx), outer_loss_fn(ctx)

    def inner(w: Params, hyperparams: Hyperparams) -> Array:
        return loss(tree.filled(marks, w, everything), hyperparams)

    def outer(w: Params, hyperparams: Hyperparams) -> Array:
        return outer_loss(tree.filled(marks, w, everything), hyperparams)[0]

    condition: Any = jax.grad(inner)
    if ctx.problem.residual is not None:
        residual = residual_fn(ctx)
        condition = lambda w, hyperparams: tree.selected(  # noqa: E731
            marks, residual(tree.filled(marks, w, everything), hyperparams)
        )
    transposed = jax.jit(lambda w, q: jax.vjp(lambda w: condition(w, ctx.hyperparams), w)[1](q)[0])
    weights = tree.selected(marks, everything)
    return Parts(jax.jit(condition), jax.jit(outer), weights, ctx.hyperparams, transposed)


def linearized(of: Parts, solution: Params, budget: Budget) -> Reference:
    """Return φ(λ) = L_out(w, λ) − ⟨q, c(w, λ)⟩ at the weights given."""

    def value(hyperparams: Hyperparams) -> Array:
        return of.outer(of.weights, hyperparams) - tree.vdot(solution, of.condition(of.weights, hyperparams))

    return _differences.of_function(value, of.hyperparams, budget)


def measured_residual(of: Parts, solution: Params, damping: float) -> float:
    """Return ‖b − (∂c/∂w)ᵀ q − δq‖/‖b‖, 0 where b = 0, inf where q is not finite."""
    right = jax.jit(jax.grad(of.outer))(of.weights, of.hyperparams)
    size, product = float(tree.norm(right)), of.transposed(of.weights, solution)
    rest = float(tree.norm(jax.tree.map(lambda b, p, q: b - p - damping * q, right, product, solution)))
    if size == 0:
        return 0.0
    return rest / size if math.isfinite(rest) else math.inf


def rule_error(
    fn: Callable[[Params], Array],
    gradient: Params,
    params: Params,
    marks: PyTree,
    steps: Sequence[float],
    *,
    rtol: float,
    epsilon: float,
) -> Direction | None:
    """Compare ``gradient``, that of ``fn``, with differences of ``fn`` along random signs on the marked leaves.

    None without marked leaves. They differ where a custom derivative rule or ``stop_gradient`` makes the gradient
    another function's.
    """
    probe = _differences.together(params, marks)
    if probe is None:
        return None
    reference = _differences.of_function(jax.jit(fn), params, Budget())
    ((_, found),) = _differences.measure(reference, [gradient], steps, rtol=rtol, epsilon=epsilon, probes=[probe])
    return _differences.direction(gradient, probe, found, rtol)
