"""Constrained hyperparameters: smooth one-to-one maps from all of R to an interval of it.

    constrained = forward(λ)          λ = inverse(constrained)

Optimizers step in the unconstrained λ; losses receive the constrained value. A bijector acts on arrays,
elementwise; ``constrain`` and ``unconstrain`` spread one bijector, or a tree prefix of them, over a tree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import _checks, _tree
from hypergrad._types import Array, PyTree


class Bijector(NamedTuple):
    """A smooth elementwise bijection.

    Attributes:
      forward: unconstrained array ↦ constrained array of the same shape and dtype.
      inverse: constrained array ↦ unconstrained array; not finite outside the constrained set.
    """

    forward: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


def constrain(bijectors: PyTree, tree: PyTree) -> PyTree:
    """Map unconstrained hyperparameters to the values that the losses see.

    Args:
      bijectors: one ``Bijector``, or a tree prefix of them.
      tree: unconstrained hyperparameters.

    Returns:
      A tree like ``tree``.

    Raises:
      TypeError: something in ``bijectors`` is not a ``Bijector``.
      ValueError: ``bijectors`` is not a prefix of ``tree``.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> hg.constrain(hg.bijectors.exp(), {"decay": jnp.zeros(2)})["decay"].tolist()
    [1.0, 1.0]
    """
    return _spread("constrain", bijectors, tree, lambda b, _, x: b.forward(jnp.asarray(x)))


def unconstrain(bijectors: PyTree, tree: PyTree) -> PyTree:
    """Map constrained values to unconstrained hyperparameters, the inverse of ``constrain``.

    Args:
      bijectors: one ``Bijector``, or a tree prefix of them.
      tree: constrained values, floats or floating-point arrays.

    Returns:
      A tree like ``tree`` of strongly typed arrays.

    Raises:
      TypeError: as for ``constrain``, or a leaf that is not of a floating dtype.
      ValueError: as for ``constrain``, or a value outside (or at the rim of) the constrained set. Under
        ``jit`` values cannot be looked at: there such a value gives a result that is not finite.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> hg.unconstrain(hg.bijectors.exp(), {"decay": jnp.ones(2)})["decay"].tolist()
    [0.0, 0.0]
    """

    def inverse(bijector: Bijector, name: str, x: Any) -> Array:
        _checks.floating_leaves(f"hyperparams (at {name})", x)
        value = bijector.inverse(_tree.strip_weak_types(x))
        if not isinstance(value, jax.core.Tracer) and not np.all(np.isfinite(value)):
            at = np.asarray(x)[~np.isfinite(np.asarray(value))].ravel()[0]
            fix = "Move it inside the open interval that the bijector maps to."
            raise ValueError(_checks.message(f"hyperparams leaf {name} inside the bijector's range", f"{at:g}", fix))
        return value

    return _spread("unconstrain", bijectors, tree, inverse)


def check_bijectors(name: str, bijectors: PyTree) -> None:
    """Refuse a tree that holds something else than ``Bijector`` values."""
    for bijector in jax.tree.leaves(bijectors, is_leaf=_is_bijector):
        if not _is_bijector(bijector):
            got, fix = _checks.describe(bijector), "Call it: hg.bijectors.exp() with parentheses."
            raise TypeError(f"{name}: " + _checks.message("bijectors to be Bijector values", got, fix))


def _is_bijector(value: Any) -> bool:
    return isinstance(value, Bijector)  # a leaf here, though a NamedTuple is a pytree to JAX


def _spread(name: str, bijectors: PyTree, tree: PyTree, apply: Callable[[Bijector, str, Any], Array]) -> PyTree:
    check_bijectors(name, bijectors)
    names = jax.tree.unflatten(jax.tree.structure(tree), _tree.leaf_names(tree))
    try:
        one_a_leaf = jax.tree.map(lambda b, sub: jax.tree.map(lambda _: b, sub), bijectors, names, is_leaf=_is_bijector)
    except ValueError as error:
        structure = jax.tree.structure(jax.tree.map(lambda _: 0, bijectors, is_leaf=_is_bijector))
        wanted, got = "bijectors to be a tree prefix of the hyperparameters", f"{structure} for {names}"
        raise ValueError(f"{name}: " + _checks.message(wanted, got, "Pass one bijector or a prefix.")) from error
    return jax.tree.map(apply, one_a_leaf, names, tree, is_leaf=_is_bijector)
