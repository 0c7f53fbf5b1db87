"""Names for what flows through the library: pytrees, losses, batches, linear maps.

The aliases say what a pytree stands for; JAX checks nothing about them at run time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

Params: TypeAlias = PyTree
"""Weights w: a pytree of floating-point arrays, the inner variable."""

Hyperparams: TypeAlias = PyTree
"""Unconstrained hyperparameters λ: a pytree of floating-point arrays, the outer variable."""

Batch: TypeAlias = PyTree
"""What a loss takes as data. With a window, every leaf carries a leading axis K; see ``IndexedBatch`` too."""

ModelState: TypeAlias = PyTree
"""Non-differentiated model variables, such as running batch statistics."""

Key: TypeAlias = Array | int | None
"""A typed ``jax.random.key``, an integer seed, or None where no loss draws random numbers."""

MatVec: TypeAlias = Callable[[PyTree], PyTree]
"""A linear map v ↦ A v on pytrees shaped like the right-hand side."""


class IndexedBatch(NamedTuple):
    """A batch given by where it lies in data on the device: ``leaf[indices]`` for every leaf of ``data``.

    Stands for a batch, or for any subtree of one, wherever the library takes one (inner or outer); the loss sees the
    gathered examples. A window of K steps then holds K·B indices instead of K·B examples, which are gathered in each
    step, and again where a checkpointed step is computed again.

    Attributes:
      data: a pytree of arrays with a common leading axis of N examples; no window axis.
      indices: integers in 0 … N−1: shape (B,) for one batch, (K, B) for a window; () and (K,) where an entry of
        ``data`` is itself a batch. One out of range is clamped, as JAX does.

    >>> import jax.numpy as jnp
    >>> batches = IndexedBatch((jnp.zeros((60, 4)), jnp.zeros(60)), jnp.arange(30).reshape(3, 10))  # K = 3, B = 10
    """

    data: PyTree
    indices: Array


class Loss(Protocol):
    """``loss(params, hyperparams, batch, key[, model_state]) -> scalar``, with ``aux`` where declared."""

    def __call__(
        self, params: Params, hyperparams: Hyperparams, batch: Batch, key: Any, /, *model_state: ModelState
    ) -> Any:
        """Return the scalar, or ``(scalar, extra)`` for ``has_aux`` and ``stateful`` problems."""
        ...
