"""Type aliases: pytrees, losses, batches, linear maps.

An alias says what a pytree stands for. Nothing checks it at run time.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

__all__ = ["Array", "Batch", "Hyperparams", "Key", "Loss", "MatVec", "ModelState", "Params", "PyTree"]

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

Params: TypeAlias = PyTree
"""Weights w: a pytree of floating-point arrays, the inner variable."""

Hyperparams: TypeAlias = PyTree
"""Unconstrained hyperparameters λ: a pytree of floating-point arrays, the outer variable."""

Batch: TypeAlias = PyTree
"""The data of a loss. With a window, every leaf has a leading axis K; see ``IndexedBatch`` too."""

ModelState: TypeAlias = PyTree
"""Non-differentiated model variables, such as running batch statistics."""

Key: TypeAlias = Array | int | None
"""A typed ``jax.random.key``, an integer seed, or None where no loss draws random numbers."""

MatVec: TypeAlias = Callable[[PyTree], PyTree]
"""A linear map v ↦ A v on pytrees shaped like the right-hand side."""

Loss: TypeAlias = Callable[..., Any]
"""``loss(params, hyperparams, batch, key[, model_state]) -> scalar``, with model state and aux where declared."""
