"""Implicit differentiation: the best response's derivative from the implicit function theorem.

    ∇_w L_in(w*(λ), λ) = 0   ⇒   dw*/dλ = −H⁻¹ ∂²L_in/∂w∂λ,      H = ∂²L_in/∂w²
    dL_out/dλ = ∂L_out/∂λ − (∂²L_in/∂w∂λ)ᵀ q,                    H q = ∂L_out/∂w

Use it for hyperparameters that enter the inner loss, however many: memory does not grow with training steps,
and the cost is one linear solve with Hessian products. It cannot see what acts through the optimizer alone.

Reference: Lorraine, Vicol & Duvenaud, Optimizing millions of hyperparameters by implicit differentiation,
arXiv 1911.02590; Pedregosa, arXiv 1602.02355.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hypergrad import curvature, dataflow, tree, validate
from hypergrad.estimators._base import (
    Estimate,
    HypergradEstimator,
    describe_estimate,
    end_of_window,
    refuse_zeros,
)
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    check_model_state,
    check_problem,
    check_variables,
    evaluate_inner,
    evaluate_outer,
    inner_gradient,
)
from hypergrad.solvers import LinearSolver, SolveInfo
from hypergrad.training import Rollout, split_keys
from hypergrad.types import Array, Batch, Hyperparams, Key, MatVec, ModelState, Params, PyTree


def implicit(problem: BilevelProblem, solver: LinearSolver) -> HypergradEstimator:
    """Differentiate through the inner optimum by the implicit function theorem.

    dL_out/dλ = ∂L_out/∂λ − (∂²L_in/∂w∂λ)ᵀ q with H q = ∂L_out/∂w solved by ``solver``.

    Args:
      problem: inner loss twice differentiable in the weights.
      solver: ``hg.solvers.neumann(20)`` for networks in training, ``hg.solvers.cg(50)`` near a minimum,
        ``hg.solvers.dense()`` as the oracle.

    Returns:
      A ``HypergradEstimator``. In a window, H and the mixed product are taken on its last batch. Every product
      of a solve shares one batch, one random key and one model state.

    Raises:
      TypeError: wrong ``problem`` or ``solver``; at ``estimate``, an inner optimizer that is a function of the
        hyperparameters.
      ValueError: at ``estimate``, a hyperparameter leaf that enters neither ∇_w L_in nor the outer loss, and
        so would get zero: a learning rate, for instance.

    Right where ∇_w L_in = 0 and H is invertible; with ``info.solver.residual`` small. Away from the optimum it
    is the derivative that the optimum would have if H and the mixed product were as they are here. A zero by
    construction is found by following data, not values: a leaf multiplied by 0 passes. Where the solve's
    residual is not finite (a slope or Hessian with NaN) the hypergradient is NaN and ``info.skipped`` is True.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: jnp.sum(0.5 * jnp.exp(h) * w ** 2 - w)      # w* = exp(-h)
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w))
    >>> hypergrad_fn = hg.hypergrad(hg.implicit(problem, hg.solvers.cg(5)))
    >>> float(hypergrad_fn(jnp.ones(1), jnp.zeros(1), (), (), key=None)[0])
    -1.0

    Reference: Lorraine, Vicol & Duvenaud, arXiv 1911.02590.
    """
    check_problem(problem)
    if not isinstance(solver, LinearSolver):
        got, fix = validate.describe(solver), "Pass e.g. solver=hg.solvers.neumann(num_terms=20)."
        raise TypeError(validate.message("solver to be a LinearSolver", got, fix))

    def init(variables: BilevelParams) -> PyTree:
        return tree.strip_weak_types(solver.init(check_variables(variables).params))

    def estimate(
        variables: BilevelParams,
        inner_state: PyTree,
        estimator_state: PyTree,
        inner_batch: Batch,
        outer_batch: Batch,
        *,
        key: Key,
        inner_optimizer: Any = None,
        model_state: ModelState = None,
    ) -> Estimate:
        check_variables(variables)
        model_state = check_model_state(problem, model_state)
        keys = split_keys(validate.as_key(key))
        if inner_optimizer is not None:
            start = Rollout(variables.params, inner_state, model_state)
            window = inner_batch, keys.inner, inner_optimizer
            reached, inner_batch = end_of_window(problem, start, variables.hyperparams, *window)
            params, inner_state, model_state = reached
            variables = BilevelParams(params, variables.hyperparams)

        def inner(params: Params, hyperparams: Hyperparams) -> Array:
            at = BilevelParams(params, hyperparams)
            return evaluate_inner(problem, at, inner_batch, keys.solve, model_state).value

        def outer(params: Params, hyperparams: Hyperparams) -> tuple[Array, Any]:
            at = BilevelParams(params, hyperparams)
            result = evaluate_outer(problem, at, outer_batch, keys.outer, model_state)
            return result.value, result.aux

        _refuse_unseen(inner, outer, variables)
        (value, aux), (slope, direct) = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)(*variables)
        product = curvature.hvp(lambda w: inner(w, variables.hyperparams), variables.params)
        solution, estimator_state, solve_info = solver.solve(product, slope, estimator_state)
        indirect = curvature.mixed_vjp(inner, *variables)(solution)
        hypergrad = jax.tree.map(lambda d, i: d - i, direct, indirect)
        # Where slope or Hessian is not finite the solver hands back a finite x, often 0, with residual inf: what
        # would look like a zero must not pass as one.
        sound = jnp.isfinite(solve_info.residual)
        hypergrad = jax.tree.map(lambda g: jnp.where(sound, g, jnp.nan), hypergrad)
        info = describe_estimate(value, hypergrad, solver=solve_info, aux=aux)
        return Estimate(value, hypergrad, variables.params, inner_state, estimator_state, model_state, info)

    def respond(
        params: Params,
        hyperparams: Hyperparams,
        inner_batch: Batch,
        *,
        key: Array | None,
        inner_optimizer: Any = None,
        model_state: ModelState = None,
    ) -> Params:
        model_state = check_model_state(problem, model_state)
        keys, params = split_keys(key), lax.stop_gradient(params)
        if inner_optimizer is not None:
            start, window = Rollout(params, None, model_state), (inner_batch, keys.inner, inner_optimizer)
            reached, inner_batch = end_of_window(problem, start, lax.stop_gradient(hyperparams), *window)
            params, _, model_state = reached

        def slope(params: Params) -> Params:
            return inner_gradient(problem, hyperparams)(params, inner_batch, keys.solve, model_state)[0]

        def solve(matvec: MatVec, b: PyTree) -> PyTree:
            wide = tree.promote(b)
            product = lambda v: tree.promote(matvec(optax.tree.cast_like(v, b)))  # noqa: E731
            x, _, info = solver.solve(product, wide, solver.init(wide))
            sound = jnp.isfinite(info.residual)
            return optax.tree.cast_like(jax.tree.map(lambda leaf: jnp.where(sound, leaf, jnp.nan), x), b)

        def tangent_solve(product: MatVec, b: PyTree) -> PyTree:
            return lax.custom_linear_solve(product, b, solve, symmetric=True)

        return lax.custom_root(slope, params, lambda _slope, params: params, tangent_solve)

    blank = SolveInfo(jnp.zeros((), jnp.int32), jnp.zeros((), float), jnp.array(False))
    return HypergradEstimator(problem, init, estimate, needs_rollout=False, solver_info=blank, respond=respond)


def _refuse_unseen(inner: Any, outer: Any, variables: BilevelParams) -> None:
    """Refuse leaves with a zero mixed derivative and a zero direct one, both by construction."""
    params, hyperparams = variables
    unmixed = dataflow.independent_leaves(curvature.mixed_vjp(inner, params, hyperparams), tree.promote(params))
    refuse_zeros("implicit", hyperparams, unmixed, lambda h: outer(params, h)[0])
