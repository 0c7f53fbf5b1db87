"""Names for what flows through the library: pytrees, losses, batches, linear maps.

The aliases say what a pytree stands for; JAX checks nothing about them at run time.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

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


class Loss(Protocol):
    """``loss(params, hyperparams, batch, key[, model_state]) -> scalar``, with ``aux`` where declared."""

    def __call__(
        self, params: Params, hyperparams: Hyperparams, batch: Batch, key: Any, /, *model_state: ModelState
    ) -> Any:
        """Return the scalar, or ``(scalar, extra)`` for ``has_aux`` and ``stateful`` problems."""
        ...
