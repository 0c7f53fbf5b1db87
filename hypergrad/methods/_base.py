"""The protocol of an outer method for ``hg.minimize``: how λ moves, and how exact the solves must be.

One step asks the oracle for a point at other hyperparameters (an inner solve to a tolerance), and for the hypergradient
there (a linear solve to a tolerance). What was solved at the last point starts the next solve.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from hypergrad.types import Array, Hyperparams, Params, PyTree

__all__ = ["Method", "MethodStep", "Oracle", "Point"]


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
    num_gradients: Array
    num_products: Array


class Oracle(NamedTuple):
    """What a method may ask. Tolerances are absolute, and may be traced.

    Attributes:
      solve: ``solve(hyperparams, point, tolerance) -> Point``: the inner solution at other hyperparameters, started
        from that of ``point``, and the outer loss there. The counts go on from those of ``point``.
      differentiate: ``differentiate(point, tolerance) -> Point``: with the hypergradient, its linear solve from that of
        ``point``.
    """

    solve: Callable[[Hyperparams, Point, Any], Point]
    differentiate: Callable[[Point, Any], Point]


class MethodStep(NamedTuple):
    """The result of a step.

    Attributes:
      point: where the method stands: the last one accepted, with the counts of all solves.
      state: of the method.
      tolerance: scalar, on the inner residual of this step.
      step_size: scalar, of the step that led to the hyperparameters tried; 0 at first.
      accepted: bool scalar, whether they were accepted.
      stopped: bool scalar, whether the method cannot go on: its steps are too small to change anything.
    """

    point: Point
    state: PyTree
    tolerance: Array
    step_size: Array
    accepted: Array
    stopped: Array


class Method(NamedTuple):
    """A method, as two pure functions.

    Attributes:
      init: ``init(point) -> state``; of ``point`` nothing is known yet but λ and weights.
      step: ``step(oracle, point, state) -> MethodStep``. The first step evaluates the point that it is given.
    """

    init: Callable[[Point], PyTree]
    step: Callable[[Oracle, Point, PyTree], MethodStep]
