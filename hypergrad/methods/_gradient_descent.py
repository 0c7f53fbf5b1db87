"""Any optax optimizer on λ, along hypergradients at inner solutions of a fixed tolerance."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from hypergrad import tree, validate
from hypergrad.methods._base import Method, MethodStep, Oracle, Point
from hypergrad.types import Array, Hyperparams, PyTree

__all__ = ["gradient_descent"]


class DescentState(NamedTuple):
    """What the method keeps.

    Attributes:
      candidate: λ that the next step takes.
      optimizer: the optimizer's state.
      length: scalar, ‖λ' − λ‖ of the step that led there.
    """

    candidate: Hyperparams
    optimizer: PyTree
    length: Array


def gradient_descent(optimizer: Any, tolerance: float = 1e-5) -> Method:
    """Take steps of an optax optimizer on λ, each from a new inner solution.

    Args:
      optimizer: an optax transformation that needs only gradients, state and parameters: ``optax.adam(0.1)``.
      tolerance: > 0, of every inner and linear solve, absolute.

    Returns:
      A ``Method`` for ``hg.minimize``. Every step is accepted; ``minimize`` returns the best point. ``step_size`` in
      the history is the length ‖λ' − λ‖.

    Raises:
      TypeError: ``optimizer`` is not an optax transformation.
      ValueError: ``tolerance`` ≤ 0.

    Valid where the optimizer's rate fits the outer loss; ``hoag`` finds its own.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum((w - h) ** 2)
    >>> outer = lambda w, h, batch, key: 0.5 * jnp.sum((w - 3.0) ** 2)
    >>> at = hg.BilevelParams(jnp.zeros(1), jnp.zeros(1))
    >>> found = hg.minimize(hg.BilevelProblem(inner, outer), at, (), (), method=gradient_descent(optax.sgd(1.0)))
    >>> bool(found.converged), round(float(found.hyperparams[0]), 2), int(found.num_steps)
    (True, 3.0, 2)
    """
    tx = validate.transformation("optimizer", optimizer)
    validate.number("tolerance", tolerance, low=0.0, strict=True)

    def init(point: Point) -> DescentState:
        state = tree.strip_weak_types(tx.init(point.hyperparams))
        return DescentState(point.hyperparams, state, jnp.zeros((), point.value.dtype))

    def step(oracle: Oracle, point: Point, state: DescentState) -> MethodStep:
        dtype = point.value.dtype
        new = oracle.differentiate(oracle.solve(state.candidate, point, tolerance), tolerance)
        updates, kept = tx.update(new.hypergrad, state.optimizer, new.hyperparams)
        candidate = tree.match_dtypes(optax.apply_updates(new.hyperparams, updates), state.candidate)
        length = tree.norm(updates).astype(dtype)
        new_state = DescentState(candidate, tree.match_dtypes(kept, state.optimizer), length)
        finite = jnp.isfinite(new.value) & tree.all_finite(new.hypergrad)
        return MethodStep(new, new_state, jnp.asarray(tolerance, dtype), state.length, finite, ~finite)

    return Method(init, step)
