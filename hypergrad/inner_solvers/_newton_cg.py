"""Newton's method with a Krylov solver: few steps, many products, down to rounding.

    newton   w ← w − t q,              (∇²f) q = ∇f by CG until its residual is small or curvature ends,
                                       t halved until f falls enough
    root     w ← w − q or w − r(w),    (∂r/∂w) q = r by GMRES, whichever of the two has the smaller residual

It needs a few tens of steps where first-order training needs many thousands. ``newton_cg`` stops at a tolerance;
without one both functions reach the rounding of the dtype, for the solutions at which claims are judged.

Reference: Nocedal & Wright, Numerical Optimization, 2nd ed. 2006, ch. 7.1; Qi & Sun, A nonsmooth version of Newton's
method, Mathematical Programming 58, 1993 (``root`` where a projection or a prox has kinks).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import curvature, dataflow, solvers, tree, validate
from hypergrad.inner_solvers._base import InnerProblem, InnerSolution, InnerSolver, ended
from hypergrad.types import Array, Params, PyTree

__all__ = ["Optimum", "newton", "newton_cg", "root"]

_ENOUGH = 1e-4  # of the decrease that the slope promises
_HALVINGS = 40
_STALLS = 3  # steps without progress after which a kink is what is left
_FORCING = 0.5  # largest relative residual of a step's solve, where there is a tolerance


class Optimum(NamedTuple):
    """Where Newton's method ended.

    Attributes:
      params: tree like the weights, at the lowest decrement seen (``root``: the last); where converged, one step
        further.
      decrement: scalar, √(∇fᵀ H⁻¹ ∇f) there, before that step: the distance to the minimum in the norm of its Hessian;
        of ``root`` ‖q‖, the distance to the solution.
      gradient_norm: scalar, ‖∇f‖ there, before that step; of ``root`` ‖r‖.
      num_steps: int32 scalar, steps taken.
      num_products: int32 scalar, products with the Hessian, or with ∂r/∂w, of all steps together.
      num_gradients: int32 scalar, gradients, values of the line search and residuals.
      converged: bool scalar, True if decrement² ≤ ε^1.25 (1 + |f|), or for ``root`` decrement² ≤ ε^1.25 (1 + ‖w‖)². In
        float64 the distance to the solution is then about 1e-10. ε is that of the dtype in which the function computes,
        whatever it returns.
    """

    params: Params
    decrement: Array
    gradient_norm: Array
    num_steps: Array
    num_products: Array
    num_gradients: Array
    converged: Array

    def __str__(self) -> str:
        """Return what was reached, without the weights."""
        end = "converged" if self.converged else "not converged: more products, or more decay in the loss"
        return (
            f"inner problem {end}: gradient norm {float(self.gradient_norm):.4g} after {int(self.num_steps)} steps "
            f"and {int(self.num_products):,} Hessian products"
        )


def newton_cg(max_steps: int = 100, *, max_products: int = 20_000) -> InnerSolver:
    """Solve the inner problem by Newton's method with a Krylov solver, until ‖residual‖ ≤ tolerance.

    Args:
      max_steps: steps of one solve, ≥ 1.
      max_products: Hessian products of one solve after which no further step begins; one step takes at most 500.

    Returns:
      An ``InnerSolver``. With a minimum CG solves for the step, with a residual (``hg.with_residual``) GMRES.
      ``STALLED`` at the rounding of the dtype, at a kink, or where the products ran out.

    Raises:
      ValueError, TypeError: a number out of its range.

    Valid for smooth losses, and near a solution for residuals. Few gradients, more products: right where a product is
    cheap (few weights) or the tolerance small; ``lbfgs`` is cheaper for a loose tolerance.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = hg.inner_solvers.InnerProblem(lambda w: jnp.sum(jnp.cosh(w - 1.0)), None, ())
    >>> solver = newton_cg()
    >>> found = solver.solve(inner, jnp.zeros(2), solver.init(jnp.zeros(2)), 1e-4)
    >>> bool(found.residual_norm <= 1e-4), hg.inner_solvers.InnerStatus(int(found.status)).name
    (True, 'CONVERGED')
    """
    validate.positive_int("max_steps", max_steps)
    validate.positive_int("max_products", max_products)

    def solve(inner: InnerProblem, params: Params, _state: PyTree, tolerance: Any) -> InnerSolution:
        options: dict[str, Any] = {"tolerance": tolerance, "max_steps": max_steps, "max_products": max_products}
        if inner.residual is None:
            found = newton(inner.loss, params, **options)
        else:
            found = root(inner.residual, params, **options)
        norm = found.gradient_norm
        finite = jnp.isfinite(norm) & tree.all_finite(found.params)
        solved = optax.tree.where(finite, found.params, tree.promote(params))
        counts = {"num_gradients": found.num_gradients, "num_products": found.num_products}
        stalled = found.num_steps < max_steps
        return ended(inner, solved, params, (), norm, tolerance, **counts, stalled=stalled, finite=finite)

    return InnerSolver(lambda _: (), solve)


class _At(NamedTuple):
    params: Params
    value: Array
    slope: Params
    best: Optimum
    stalled: Array
    done: Array


def newton(
    fn: Callable[[Params], Array],
    params: Params,
    *,
    tolerance: Any = None,
    max_steps: int = 60,
    max_products: int | Array = 40_000,
) -> Optimum:
    """Minimize ``fn`` from ``params`` to ‖∇f‖ ≤ ``tolerance``, or to rounding, as far as ``max_steps`` steps go.

    With a tolerance the solve of a step stops at a residual of min(½, √(‖∇f‖/‖∇f₀‖)) ‖∇f‖, else at 1e-4 ‖∇f‖. No step
    begins after ``max_products`` Hessian products; one step takes at most 500. A direction of negative curvature ends
    CG early, and the step goes along what CG has by then, or along −∇f. Valid as a local minimum near ``params`` when
    ``fn`` is smooth; at a kink it stalls, with ``converged=False``.
    """
    wide = tree.promote(params)
    dtype = tree.wider(*(leaf.dtype for leaf in jax.tree.leaves(wide)))
    epsilon = jnp.finfo(dataflow.working_precision(fn, wide)).eps
    size = sum(leaf.size for leaf in jax.tree.leaves(wide))
    solver = solvers.cg(max_products=min(2 * size, 500), rtol=1e-4)

    def step(at: _At) -> _At:
        slope, norm = at.slope, tree.norm(at.slope).astype(dtype)
        enough = None
        if tolerance is not None:
            share = jnp.minimum(_FORCING, jnp.sqrt(norm / first))
            enough = jnp.maximum(share * norm, 0.5 * jnp.asarray(tolerance, dtype))
        system = solvers.LinearSystem(curvature.hvp(fn, at.params))
        solution, _, info = solver.solve(system, slope, (), tolerance=enough)
        usable = tree.vdot(solution, slope) > 0
        direction = jax.tree.map(lambda q, g: jnp.where(usable, q, g), solution, slope)
        square = tree.vdot(direction, slope).astype(dtype)
        length, value, count = _backtrack(fn, at, direction, square, epsilon)
        moved = jax.tree.map(lambda w, d: w - length.astype(w.dtype) * d, at.params, direction)

        decrement = jnp.sqrt(square)
        better = decrement < 0.5 * at.best.decrement
        small = square <= epsilon**1.25 * (1 + jnp.abs(at.value))
        here = at.best._replace(
            params=optax.tree.where(small, moved, at.params),
            decrement=decrement,
            gradient_norm=norm,
            converged=small,
        )
        best = optax.tree.where(decrement < at.best.decrement, here, at.best)
        spent = at.best.num_products + info.num_products
        best = best._replace(
            num_steps=at.best.num_steps + 1, num_products=spent, num_gradients=at.best.num_gradients + count + 1
        )
        next_slope = jax.grad(fn)(moved)
        # Far from a minimum the decrement may rest while the value falls: only where both rest is it over.
        rests = ~better & (at.value - value <= 10 * epsilon * (1 + jnp.abs(at.value)))
        stalled = jnp.where(rests, at.stalled + 1, 0)
        done = small | (length == 0) | ~jnp.isfinite(square) | (stalled >= _STALLS)
        if tolerance is not None:
            left = tree.norm(next_slope).astype(dtype)
            reached = left <= tolerance
            there = best._replace(params=moved, gradient_norm=left, converged=reached)
            best, done = optax.tree.where(reached | small, there, best), done | reached
        done |= (best.num_steps >= max_steps) | (spent >= max_products)
        return _At(moved, value, next_slope, best, stalled, done)

    infinite, none = jnp.array(jnp.inf, dtype), jnp.zeros((), jnp.int32)
    value, slope = jax.value_and_grad(fn)(wide)
    value, first = jnp.asarray(value, dtype), tree.norm(slope).astype(dtype)
    reached = jnp.array(False) if tolerance is None else first <= tolerance
    best = Optimum(wide, infinite, first, none, none, none + 1, reached)
    start = _At(wide, value, slope, best, none, reached | ~jnp.isfinite(value))
    return lax.while_loop(lambda at: ~at.done, step, tree.strip_weak_types(start)).best


def root(
    residual: Callable[[Params], Params],
    params: Params,
    *,
    tolerance: Any = None,
    max_steps: int = 200,
    max_products: int | Array = 40_000,
) -> Optimum:
    """Solve r(w) = 0 from ``params`` to ‖r‖ ≤ ``tolerance``, or to rounding, as far as ``max_steps`` steps go.

    Each step takes w − q, Newton's, or w − r(w), which is the fixed-point, projected-gradient or proximal-gradient step
    of ``hg.residuals``, whichever has the smaller residual: at least as fast as a contraction, and in a few steps near
    a solution. No step begins after ``max_products`` products with ∂r/∂w; one step takes at most 500.
    """
    wide = tree.promote(params)
    dtype = tree.wider(*(leaf.dtype for leaf in jax.tree.leaves(wide)))
    epsilon = jnp.finfo(dataflow.working_precision(residual, wide)).eps
    size = sum(leaf.size for leaf in jax.tree.leaves(wide))
    solver = solvers.gmres(min(2 * size + 2, 500), min(size, 100), rtol=1e-4)

    def of(params: Params) -> tuple[Params, Array]:
        value = tree.promote(residual(params))
        return value, tree.norm(value).astype(dtype)

    def step(at: tuple[Optimum, Params, Array]) -> tuple[Optimum, Params, Array]:
        here, value, _ = at
        system = solvers.LinearSystem(curvature.residual_jvp(residual, here.params), symmetric=False)
        solution, _, info = solver.solve(system, value, ())
        newton, plain = optax.tree.sub(here.params, solution), optax.tree.sub(here.params, value)
        (of_newton, newton_norm), (of_plain, plain_norm) = of(newton), of(plain)
        # A residual that is not finite is no better than any: comparisons with NaN are false.
        nearer = newton_norm <= jnp.where(jnp.isfinite(plain_norm), plain_norm, jnp.inf)
        length = tree.norm(solution).astype(dtype)
        solved = (info.residual <= 1e-2) & (length <= epsilon**0.625 * (1 + tree.norm(here.params)))
        solved = (solved | (here.gradient_norm == 0)) & jnp.isfinite(length)
        spent = here.num_products + info.num_products
        norm = jnp.where(nearer, newton_norm, plain_norm)
        new = Optimum(
            params=optax.tree.where(solved | nearer, newton, plain),
            decrement=length,
            gradient_norm=jnp.where(solved, here.gradient_norm, norm),
            num_steps=here.num_steps + 1,
            num_products=spent,
            num_gradients=here.num_gradients + 2,
            converged=solved,
        )
        if tolerance is not None:
            solved |= norm <= tolerance
            new = new._replace(gradient_norm=norm, converged=solved)
        done = solved | ~jnp.isfinite(norm) | (new.num_steps >= max_steps) | (spent >= max_products)
        return new, optax.tree.where(nearer, of_newton, of_plain), done

    value, norm = of(wide)
    none = jnp.zeros((), jnp.int32)
    reached = jnp.array(False) if tolerance is None else norm <= tolerance
    start = Optimum(wide, jnp.array(jnp.inf, dtype), norm, none, none, none + 1, reached)
    return lax.while_loop(lambda at: ~at[2], step, (start, value, reached | ~jnp.isfinite(norm)))[0]


def _backtrack(
    fn: Callable[[Params], Array], at: _At, direction: Params, square: Array, epsilon: Any
) -> tuple[Array, Array, Array]:
    """Return the first of 1, ½, ¼, … at which ``fn`` falls enough, its value there, and how many were tried; or 0."""
    slack = 10 * epsilon * (1 + jnp.abs(at.value))

    def value_at(length: Array) -> Array:
        moved = jax.tree.map(lambda w, d: w - length.astype(w.dtype) * d, at.params, direction)
        return jnp.asarray(fn(moved), at.value.dtype)

    def rejected(trial: tuple[Array, Array, Array]) -> Array:
        length, value, count = trial
        return ~(value <= at.value - _ENOUGH * length * square + slack) & (count < _HALVINGS)

    def halve(trial: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        length = trial[0] / 2
        return length, value_at(length), trial[2] + 1

    untried = jnp.full_like(at.value, 2.0), jnp.full_like(at.value, jnp.inf), jnp.zeros((), jnp.int32)
    length, value, count = lax.while_loop(rejected, halve, untried)
    failed = count >= _HALVINGS
    return jnp.where(failed, 0.0, length).astype(at.value.dtype), jnp.where(failed, at.value, value), count
