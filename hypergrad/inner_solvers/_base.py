"""The protocol of an inner solver: how w*(λ) is reached, to a tolerance on the residual of the inner problem.

    ‖r(w, λ)‖ ≤ tolerance,      r = ∇_w L_in(w, λ), or the residual of ``hg.with_residual``

A solver sees the inner problem at fixed hyperparameters, batch and key, and starts from the weights and the state that
the last solve left. The tolerance may be traced: another one compiles nothing.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hypergrad import tree, validate
from hypergrad.types import Array, Hyperparams, Params, PyTree

__all__ = ["InnerProblem", "InnerSolution", "InnerSolver", "InnerStatus", "ended", "refuse_residual", "repeat"]


class InnerStatus(enum.IntEnum):
    """How an inner solve ended.

    Attributes:
      CONVERGED: ‖residual‖ ≤ tolerance.
      MAX_STEPS: the steps ran out.
      STALLED: a step changed nothing any more: the rounding of the dtype, a kink, or no direction of descent.
      NOT_FINITE: the loss or its gradient became NaN or infinite; the weights are the last finite ones.
    """

    CONVERGED = 0
    MAX_STEPS = 1
    STALLED = 2
    NOT_FINITE = 3


class InnerProblem(NamedTuple):
    """The inner problem at fixed hyperparameters. It holds functions: close over it under ``jit``.

    Attributes:
      loss: ``loss(params) -> scalar``, L_in.
      residual: None where the solution is a minimum of ``loss``; else ``residual(params) -> tree like params``.
      hyperparams: constrained hyperparameters, as the losses see them.
    """

    loss: Callable[[Params], Array]
    residual: Callable[[Params], Params] | None
    hyperparams: Hyperparams

    def condition(self, params: Params) -> Params:
        """Return what is zero at the solution: the residual, or the gradient of the loss."""
        return jax.grad(self.loss)(params) if self.residual is None else self.residual(params)


class InnerSolution(NamedTuple):
    """Where an inner solve ended.

    Attributes:
      params: tree like the weights, in their dtypes.
      state: the solver's state for the next solve.
      residual_norm: scalar, ‖residual‖ at ``params``.
      num_gradients: int32 scalar, gradients of the inner loss (or residuals), with those of line searches.
      num_products: int32 scalar, products with the Hessian (or with ∂r/∂w).
      status: int32 scalar, an ``InnerStatus``.
    """

    params: Params
    state: PyTree
    residual_norm: Array
    num_gradients: Array
    num_products: Array
    status: Array


class InnerSolver(NamedTuple):
    """A solver of the inner problem, as two pure functions.

    Attributes:
      init: ``init(params) -> state``, a pytree of arrays.
      solve: ``solve(inner, params, state, tolerance) -> InnerSolution`` from ``params``; ``tolerance`` is absolute, on
        ‖residual‖, and may be traced.
    """

    init: Callable[[Params], PyTree]
    solve: Callable[[InnerProblem, Params, PyTree, Any], InnerSolution]


def _status_of(norm: Array, tolerance: Any, *, stalled: Array, finite: Array) -> Array:
    """Return the ``InnerStatus`` of a solve that ended."""
    status = jnp.where(stalled, InnerStatus.STALLED, InnerStatus.MAX_STEPS)
    status = jnp.where(norm <= tolerance, InnerStatus.CONVERGED, status)
    return jnp.where(finite, status, InnerStatus.NOT_FINITE).astype(jnp.int32)


def ended(
    inner: InnerProblem,
    solved: Params,
    params: Params,
    state: PyTree,
    norm: Array,
    tolerance: Any,
    *,
    num_gradients: Array,
    num_products: Array,
    stalled: Array,
    finite: Array,
) -> InnerSolution:
    """Return the solution in the dtypes of ``params``; where that rounds it, with the residual of what is left."""
    rounded = tree.match_dtypes(solved, params)
    if _narrowed(rounded, solved):
        norm = tree.norm(inner.condition(tree.promote(rounded))).astype(norm.dtype)
        num_gradients, stalled = num_gradients + 1, stalled | (norm > tolerance)
    status = _status_of(norm, tolerance, stalled=stalled, finite=finite)
    return InnerSolution(rounded, state, norm, num_gradients, num_products, status)


def _narrowed(rounded: Params, solved: Params) -> bool:
    pairs = zip(jax.tree.leaves(rounded), jax.tree.leaves(solved), strict=True)
    return any(r.dtype != s.dtype for r, s in pairs)


def repeat(step: Callable[[Any], Any], start: Any, tolerance: Any, max_steps: int) -> Any:
    """Apply ``step`` until ``norm`` ≤ tolerance, or it stalls, is not finite, or the steps run out."""
    going = lambda at: ~(at.norm <= tolerance) & ~at.stalled & at.finite & (at.num_steps < max_steps)  # noqa: E731
    return lax.while_loop(going, step, tree.strip_weak_types(start))


def refuse_residual(name: str, inner: InnerProblem) -> None:
    """Refuse a problem with a residual, in a solver that minimises the loss."""
    if inner.residual is not None:
        fix = "Use hg.inner_solvers.proximal(prox) for constraints and penalties with kinks, newton_cg() elsewhere."
        raise ValueError(validate.message(f"a problem without a residual for {name}", "one with a residual", fix))
