"""The guard: one outer step is taken whole or not at all, whatever the method.

    skip, the first reason counts:    L_out, L_in not finite;  a solve diverged or has residual > max_residual;
                                      dL_out/dλ, the new λ, the new outer state, the estimator's state not finite

On a skip the hyperparameters and the outer optimizer's state keep their values. The estimator's state is that after
``advance``; a skip for the solve keeps the new solver state where it is finite, because undoing it would repeat the
same cold solve at the next outer step.
"""

import enum
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.estimators import Estimate
from hypergrad.solvers import SolveInfo, Status
from hypergrad.training import is_known
from hypergrad.types import Array, PyTree

__all__ = [
    "Guard",
    "HypergradInfo",
    "SkipReason",
    "guard",
    "settle",
    "solves_in",
]


class SkipReason(enum.IntEnum):
    """Why an outer step was skipped: ``hg.SkipReason(int(info.skip_reason)).name``. The first that holds counts.

    Attributes:
      NONE: it was taken.
      OUTER_LOSS: the outer loss is not finite: a bad outer batch, or weights that are not finite already.
      INNER_LOSS: the inner loss of the last inner step is not finite. It is unknown, and not looked at, where
        gradients are given without ``value=``.
      SOLVE: a linear solve diverged, is not finite, or has a residual above ``max_residual``.
      HYPERGRAD: the hypergradient is not finite.
      HYPERPARAMS: the outer step changes a finite hyperparameter entry to NaN or inf.
      OUTER_STATE: an entry of the new state of the outer optimizer is not finite, and was.
      ESTIMATOR_STATE: an entry of the new state of the estimator is not finite, and was.
      NO_OUTER_BATCH: a step was due under ``jit``, and ``outer_batch`` was None.
    """

    NONE = 0
    OUTER_LOSS = 1
    INNER_LOSS = 2
    SOLVE = 3
    HYPERGRAD = 4
    HYPERPARAMS = 5
    OUTER_STATE = 6
    ESTIMATOR_STATE = 7
    NO_OUTER_BATCH = 8


class Guard(NamedTuple):
    """When an outer step is skipped. Made by ``hg.guard``.

    Attributes:
      max_residual: largest relative residual of a linear solve whose outer step is taken.
      inner: whether inner steps that are not finite are dropped, too.
    """

    max_residual: float
    inner: bool


class HypergradInfo(NamedTuple):
    """Diagnostics of the last outer step that was due, for logging. Structure and dtypes are fixed.

    Attributes:
      step: int32 scalar, the number (from 1) of the ``update`` call that made it; −1 before the first, and in
        functional calls.
      outer_loss: scalar, the outer loss at the trained weights.
      inner_loss: scalar, the inner loss of the last inner step; NaN where it is unknown: with given gradients (unless
        ``update`` got ``value=``), and in functional calls without an optimizer.
      hypergrad_norm: scalar, Euclidean norm of the hypergradient over all leaves.
      skip_reason: int32 scalar, a ``SkipReason``: 0 where the step was taken.
      num_skipped: int32 scalar, outer steps skipped so far.
      method: diagnostics of the estimator; the ``SolveInfo`` for ``implicit``.
      state: the estimator's state for the next call, of functional calls; () in ``bilevel``.
      aux: what the outer loss returned as aux, of functional calls; () in ``bilevel`` and without ``has_aux``.
    """

    step: Array
    outer_loss: Array
    inner_loss: Array
    hypergrad_norm: Array
    skip_reason: Array
    num_skipped: Array
    method: PyTree
    state: PyTree = ()
    aux: Any = ()

    @property
    def skipped(self) -> Array:
        """Whether the outer step was skipped: bool scalar."""
        return self.skip_reason > 0

    @property
    def solver(self) -> Any:
        """The first ``SolveInfo`` in ``method``; () for methods without a linear solve."""
        return next(iter(solves_in(self.method)), ())


def guard(max_residual: float = 3.0, *, inner: bool = False) -> Guard:
    """Skip outer steps that would spoil the hyperparameters.

    A step is skipped, counted in ``info.num_skipped`` and named in ``info.skip_reason`` where the outer loss, the inner
    loss, the hypergradient, the new hyperparameters or the new states are not finite, or a linear solve diverged, is
    not finite or has ‖b − Ax‖/‖b‖ > ``max_residual``. A residual that was not measured (NaN) passes.

    Args:
      max_residual: > 0; ``math.inf`` for no limit. Residuals above 1 are normal for a few CG products: CG minimises
        the error in another norm.
      inner: drop inner steps, too, whose loss, gradient or model state is not finite. Costs about a tenth of a short
        step; ``optax.apply_if_finite`` around the inner optimizer does as much for gradients. If ``unrolled``
        differentiates a window in reverse mode, a dropped step makes the hypergradient NaN, because NaN times a zero
        cotangent is NaN. The outer step is then skipped.

    Returns:
      A ``Guard``, for ``hg.bilevel(..., guard=...)``; ``guard=None`` there takes every step.

    Raises:
      TypeError: an argument of the wrong kind.
      ValueError: ``max_residual`` ≤ 0.

    >>> guard(max_residual=1.0).inner
    False
    """
    if max_residual != math.inf:
        validate.number("max_residual", max_residual, low=0.0, strict=True)
    validate.flag("inner", inner)
    return Guard(float(max_residual), inner)


def solves_in(info: PyTree) -> list[SolveInfo]:
    """Return every ``SolveInfo`` in a method's info."""
    leaves = jax.tree.leaves(info, is_leaf=lambda x: isinstance(x, SolveInfo))
    return [leaf for leaf in leaves if isinstance(leaf, SolveInfo)]


def settle(
    guard: Guard | None,
    estimate: Estimate,
    advanced: PyTree,
    inner_loss: Any,
    *,
    lost: Array,
    number: Any = -1,
    num_skipped: Any = 0,
    changes: Sequence[tuple[SkipReason, PyTree, PyTree]] = (),
) -> HypergradInfo:
    """Return the info of an outer step: whether it is taken, and the estimator's state that is kept.

    Args:
      guard: None takes every step.
      estimate: what the estimator returned.
      advanced: the estimator's state after ``advance``.
      inner_loss: of the last inner step; a Python NaN where it is unknown.
      lost: whether the state had to return to the call's start.
      number: of the ``update`` call.
      num_skipped: outer steps skipped before.
      changes: (reason, new, old) of what the step would change: a reason where ``new`` is newly not finite.
    """
    size, reason, kept = tree.scaled_norm(estimate.hypergrad), jnp.zeros((), jnp.int32), estimate.state
    if guard is not None:
        state_lost = tree.newly_bad(estimate.state, advanced)
        reasons = [
            (SkipReason.OUTER_LOSS, ~jnp.isfinite(estimate.value)),
            (SkipReason.INNER_LOSS, ~jnp.isfinite(inner_loss) if is_known(inner_loss) else False),
            (SkipReason.SOLVE, _bad_solve(guard, estimate.info)),
            (SkipReason.HYPERGRAD, ~jnp.isfinite(size)),
            *((reason, tree.newly_bad(new, old)) for reason, new, old in changes),
            (SkipReason.ESTIMATOR_STATE, lost | state_lost),
        ]
        for code, holds in reversed(reasons):  # the first counts
            reason = jnp.where(holds, jnp.array(code, jnp.int32), reason)
        keeps = (reason == SkipReason.NONE) | ((reason == SkipReason.SOLVE) & ~state_lost)
        kept = optax.tree.where(keeps, estimate.state, advanced)
    float_type = jnp.zeros((), float).dtype
    value, inner_loss, size = (jnp.asarray(x, float_type) for x in (estimate.value, inner_loss, size))
    number, num_skipped = jnp.asarray(number, jnp.int32), jnp.asarray(num_skipped, jnp.int32)
    num_skipped = num_skipped + (reason > 0).astype(jnp.int32)
    losses = value, inner_loss, size
    return HypergradInfo(number, *losses, reason, num_skipped, estimate.info, kept, estimate.aux)


def _bad_solve(guard: Guard, info: PyTree) -> Array:
    bad = jnp.array(False)
    for solve in solves_in(info):
        bad_status = (solve.status == Status.DIVERGED) | (solve.status == Status.NOT_FINITE)
        bad = bad | jnp.any(bad_status) | jnp.any(solve.residual > guard.max_residual)
    return bad
