"""The inner solution to rounding: Newton's method with a Krylov solver, for small problems and for checks.

    minimize   w ← w − t q,              (∇²f) q = ∇f by CG until its residual is 1e-4 or curvature ends,
                                         t halved until f falls enough
    root       w ← w − q or w − r(w),    (∂r/∂w) q = r by GMRES, whichever of the two has the smaller residual

Estimators never solve the inner problem; what they claim about its solution is judged at solutions found here. The
method needs a few tens of steps where first-order training needs many thousands, and reaches the rounding of the dtype.

Reference: Nocedal & Wright, Numerical Optimization, 2nd ed. 2006, ch. 7.1; Qi & Sun, A nonsmooth version of Newton's
method, Mathematical Programming 58, 1993 (``root`` where a projection or a prox has kinks).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import curvature, data, dataflow, solvers, tree, validate
from hypergrad.diagnostics._base import digits, unknowns
from hypergrad.estimators import implicit
from hypergrad.problem import BilevelParams, BilevelProblem, check_model_state, check_problem, check_variables
from hypergrad.training import Context, Trained, inner_loss_fn, residual_fn, split_keys
from hypergrad.types import Array, Batch, Key, ModelState, Params, PyTree

__all__ = ["Optimum", "minimize", "root", "solve_inner"]

_ENOUGH = 1e-4  # of the decrease that the slope promises
_HALVINGS = 40
_STALLS = 3  # steps without progress after which a kink is what is left


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
      converged: bool scalar, True if decrement² ≤ ε^1.25 (1 + |f|), or for ``root`` decrement² ≤ ε^1.25 (1 + ‖w‖)². In
        float64 the distance to the solution is then about 1e-10. ε is that of the dtype in which the function computes,
        whatever it returns.
    """

    params: Params
    decrement: Array
    gradient_norm: Array
    num_steps: Array
    num_products: Array
    converged: Array

    def __str__(self) -> str:
        """Return what was reached, without the weights."""
        end = "converged" if self.converged else "not converged: more products, or more decay in the loss"
        return (
            f"inner problem {end}: gradient norm {digits(float(self.gradient_norm))} after {int(self.num_steps)} steps "
            f"and {int(self.num_products):,} Hessian products"
        )


def solve_inner(
    problem: BilevelProblem,
    variables: BilevelParams,
    inner_batch: Batch,
    *,
    key: Key = None,
    model_state: ModelState = None,
    trainable: PyTree = None,
    max_products: int = 40_000,
) -> Optimum:
    """Solve the inner problem, w*(λ) = argmin_w L_in(w, λ), or r(w*, λ) = 0 of a problem with a residual.

    Newton's method with CG, from the weights given, until ∇f is zero to rounding. For checks and for small problems:
    ``hg.implicit`` is exact at w*, and ``check_hypergrad`` passes there.

    Args:
      problem: its inner loss, or its residual.
      variables: where to start, and λ.
      inner_batch: the batch on which the loss is taken, all the data for instance.
      key: of the losses, as for ``hg.value_and_hypergrad``: with a key, the dropout mask that it gives.
      model_state: of a stateful problem; held fixed.
      trainable: as for ``hg.implicit``.
      max_products: Hessian products after which no further step begins.

    Returns:
      An ``Optimum``: ``params`` in the dtypes of the weights, and ``converged``.

    Raises:
      TypeError: no ``BilevelProblem`` or ``BilevelParams``.
      ValueError: ``max_products`` < 1; as ``hg.implicit`` for ``trainable``.

    Valid for a smooth inner loss near a minimum; at a kink (|w|) it stalls with ``converged=False``. From weights where
    H is indefinite it may take many products. Pure: may be jitted.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum(jnp.exp(h) * w**2 - 2 * w)           # w* = exp(-h)
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w))
    >>> found = hg.diagnostics.solve_inner(problem, hg.BilevelParams(jnp.zeros(2), jnp.zeros(2)), ())
    >>> found.params.tolist(), bool(found.converged)
    ([1.0, 1.0], True)
    >>> print(str(found).partition(":")[0])
    inner problem converged

    Reference: Nocedal & Wright, Numerical Optimization, 2nd ed. 2006, ch. 7.1.
    """
    check_problem(problem)
    params, hyperparams = check_variables(variables)
    validate.positive_int("max_products", max_products)
    at = Trained(params, None, check_model_state(problem, model_state))
    keys = split_keys(validate.as_key(key))
    ctx = Context(problem, hyperparams, at, at, data.one_step(inner_batch), None, keys, None)
    marks = unknowns(implicit(problem, trainable=trainable), ctx)
    start = tree.selected(marks, params)

    def full(solved: Params) -> Params:
        return tree.filled(marks, solved, params)

    if problem.residual is None:
        loss = inner_loss_fn(ctx)
        found = minimize(lambda w: loss(full(w), hyperparams), start, max_products=max_products)
    else:
        residual = residual_fn(ctx)
        found = root(lambda w: tree.selected(marks, residual(full(w), hyperparams)), start, max_products=max_products)
    return found._replace(params=tree.match_dtypes(full(found.params), params))


class _At(NamedTuple):
    params: Params
    value: Array
    best: Optimum
    stalled: Array
    done: Array


def minimize(
    fn: Callable[[Params], Array], params: Params, *, max_steps: int = 60, max_products: int | Array = 40_000
) -> Optimum:
    """Minimize ``fn`` from ``params`` to rounding, as far as ``max_steps`` Newton steps go.

    No step begins after ``max_products`` Hessian products; one step takes at most 500. A direction of negative
    curvature ends CG early, and the step goes along what CG has by then, or along −∇f. Valid as a local minimum near
    ``params`` when ``fn`` is smooth; at a kink it stalls, with ``converged=False``.
    """
    wide = tree.promote(params)
    dtype = tree.wider(*(leaf.dtype for leaf in jax.tree.leaves(wide)))
    epsilon = jnp.finfo(dataflow.working_precision(fn, wide)).eps
    size = sum(leaf.size for leaf in jax.tree.leaves(wide))
    solver = solvers.cg(max_products=min(2 * size, 500), rtol=1e-4)

    def step(at: _At) -> _At:
        slope = jax.grad(fn)(at.params)
        solution, _, info = solver.solve(solvers.LinearSystem(curvature.hvp(fn, at.params)), slope, ())
        usable = tree.vdot(solution, slope) > 0
        direction = jax.tree.map(lambda q, g: jnp.where(usable, q, g), solution, slope)
        square = tree.vdot(direction, slope).astype(dtype)
        length, value = _backtrack(fn, at, direction, square, epsilon)
        moved = jax.tree.map(lambda w, d: w - length.astype(w.dtype) * d, at.params, direction)

        decrement = jnp.sqrt(square)
        better = decrement < 0.5 * at.best.decrement
        small = square <= epsilon**1.25 * (1 + jnp.abs(at.value))
        here = at.best._replace(
            params=optax.tree.where(small, moved, at.params),
            decrement=decrement,
            gradient_norm=tree.norm(slope).astype(dtype),
            converged=small,
        )
        best = optax.tree.where(decrement < at.best.decrement, here, at.best)
        spent = at.best.num_products + info.num_products
        best = best._replace(num_steps=at.best.num_steps + 1, num_products=spent)
        # Far from a minimum the decrement may rest while the value falls: only where both rest is it over.
        rests = ~better & (at.value - value <= 10 * epsilon * (1 + jnp.abs(at.value)))
        stalled = jnp.where(rests, at.stalled + 1, 0)
        done = small | (length == 0) | ~jnp.isfinite(square) | (stalled >= _STALLS)
        return _At(moved, value, best, stalled, done | (best.num_steps >= max_steps) | (spent >= max_products))

    infinite, none = jnp.array(jnp.inf, dtype), jnp.zeros((), jnp.int32)
    value = jnp.asarray(fn(wide), dtype)
    best = Optimum(wide, infinite, infinite, none, none, jnp.array(False))
    start = _At(wide, value, best, none, ~jnp.isfinite(value))
    return lax.while_loop(lambda at: ~at.done, step, start).best


def root(
    residual: Callable[[Params], Params], params: Params, *, max_steps: int = 200, max_products: int | Array = 40_000
) -> Optimum:
    """Solve r(w) = 0 from ``params`` to rounding, as far as ``max_steps`` steps go.

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
            converged=solved,
        )
        done = solved | ~jnp.isfinite(norm) | (new.num_steps >= max_steps) | (spent >= max_products)
        return new, optax.tree.where(nearer, of_newton, of_plain), done

    value, norm = of(wide)
    none = jnp.zeros((), jnp.int32)
    start = Optimum(wide, jnp.array(jnp.inf, dtype), norm, none, none, jnp.array(False))
    return lax.while_loop(lambda at: ~at[2], step, (start, value, ~jnp.isfinite(norm)))[0]


def _backtrack(
    fn: Callable[[Params], Array], at: _At, direction: Params, square: Array, epsilon: Any
) -> tuple[Array, Array]:
    """Return the first of 1, ½, ¼, … at which ``fn`` falls enough, up to its rounding, and its value there; or 0."""
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
    return jnp.where(failed, 0.0, length).astype(at.value.dtype), jnp.where(failed, at.value, value)
