"""Equinox: the weights of a module, and the module that some weights make.

    params, combine = hg.integrations.equinox.partition(model)
    loss(params, hyperparams, batch, key) = ... combine(params)(x) ...

Equinox modules are pytrees of arrays, functions and settings. Losses of a problem take the arrays alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad import tree
from hypergrad.types import Params, PyTree

__all__ = ["partition"]


def partition(model: Any, trainable: PyTree = True) -> tuple[Params, Callable[[Params], Any]]:
    """Split a module into its floating-point arrays and the rest.

    Args:
      model: an ``equinox.Module``, or any pytree.
      trainable: tree prefix of bools over ``model``: False leaves a part out of the weights.

    Returns:
      ``(params, combine)``: ``params`` has the structure of ``model`` with None in place of what is not trained;
      ``combine(params)`` is the module with these arrays.

    Raises:
      ValueError: ``trainable`` is no tree prefix of ``model``.

    Valid for modules without shared arrays: a shared array is two weights here, as in Equinox. Call
    ``equinox.nn.inference_mode(combine(params))`` in the outer loss where the module has dropout.

    >>> import jax.numpy as jnp
    >>> from hypergrad.integrations.equinox import partition
    >>> params, combine = partition({"w": jnp.ones(2), "activation": jnp.tanh, "size": 2})
    >>> params["activation"], combine(params)["size"]
    (None, 2)
    """
    marks = jax.tree.map(
        lambda leaf, mark: mark and isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact),
        model,
        jax.tree.broadcast(trainable, model),
    )
    return tree.selected(marks, model), lambda params: tree.filled(marks, params, model)
