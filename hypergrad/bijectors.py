"""Constrained hyperparameters: smooth one-to-one maps from all of R to an interval of it.

    constrained = forward(λ)          λ = inverse(constrained)

    identity       R → R             weights of a network, any sign
    exp            R → (0, ∞)        scales that span decades: decays, rates, noise levels
    softplus       R → (0, ∞)        positive values near 1, gentler than exp for large λ
    sigmoid        R → (0, 1)        probabilities, dropout rates, example weights
    interval(a, b) R → (a, b)        bounded values, e.g. a log decay kept where Neumann converges

Compose by reparameterizing twice: ``reparameterize(reparameterize(p, exp()), interval(log lo, log hi))``
learns a decay between lo and hi on a log scale.

Optimizers step in the unconstrained λ; losses receive the constrained value. A bijector acts on arrays,
elementwise; ``constrain`` and ``unconstrain`` spread one bijector, or a tree prefix of them, over a tree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logit

from hypergrad import tree, validate
from hypergrad.types import Array, PyTree

__all__ = ["Bijector", "constrain", "exp", "identity", "interval", "sigmoid", "softplus", "unconstrain"]


class Bijector(NamedTuple):
    """A smooth elementwise bijection.

    Attributes:
      forward: unconstrained array ↦ constrained array of the same shape and dtype.
      inverse: constrained array ↦ unconstrained array; not finite outside the constrained set.
    """

    forward: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


def constrain(bijectors: PyTree, values: PyTree) -> PyTree:
    """Map unconstrained hyperparameters to the values that the losses see.

    Args:
      bijectors: one ``Bijector``, or a tree prefix of them.
      values: unconstrained hyperparameters.

    Returns:
      A tree like ``values``.

    Raises:
      TypeError: something in ``bijectors`` is not a ``Bijector``.
      ValueError: ``bijectors`` is not a prefix of ``values``.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> hg.constrain(hg.bijectors.exp(), {"decay": jnp.zeros(2)})["decay"].tolist()
    [1.0, 1.0]
    """
    return _spread("constrain", bijectors, values, lambda b, _, x: b.forward(jnp.asarray(x)))


def unconstrain(bijectors: PyTree, values: PyTree) -> PyTree:
    """Map constrained values to unconstrained hyperparameters, the inverse of ``constrain``.

    Args:
      bijectors: one ``Bijector``, or a tree prefix of them.
      values: constrained values, floats or floating-point arrays.

    Returns:
      A tree like ``values`` of strongly typed arrays.

    Raises:
      TypeError: as for ``constrain``, or a leaf that is not of a floating dtype.
      ValueError: as for ``constrain``, or a value outside (or at the rim of) the constrained set. Under
        ``jit`` values cannot be looked at: there such a value gives a result that is not finite.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> hg.unconstrain(hg.bijectors.exp(), {"decay": jnp.ones(2)})["decay"].tolist()
    [0.0, 0.0]
    """

    def inverse(bijector: Bijector, name: str, x: Any) -> Array:
        validate.floating_leaves(f"hyperparams (at {name})", x)
        value = bijector.inverse(tree.strip_weak_types(x))
        if not tree.is_traced(value) and not np.all(np.isfinite(value)):
            at = np.asarray(x)[~np.isfinite(np.asarray(value))].ravel()[0]
            fix = "Move it inside the open interval that the bijector maps to."
            raise ValueError(
                validate.message(
                    f"hyperparams{f' leaf {name}' * bool(name)} inside the bijector's range", f"{at:g}", fix
                )
            )
        return value

    return _spread("unconstrain", bijectors, values, inverse)


def check_bijectors(name: str, bijectors: PyTree) -> None:
    """Refuse a tree that holds something else than ``Bijector`` values."""
    for bijector in jax.tree.leaves(bijectors, is_leaf=_is_bijector):
        if not _is_bijector(bijector):
            got, fix = validate.describe(bijector), "Call it: hg.bijectors.exp() with parentheses."
            raise TypeError(f"{name}: " + validate.message("bijectors to be Bijector values", got, fix))


def _is_bijector(value: Any) -> bool:
    return isinstance(value, Bijector)  # a leaf here, though a NamedTuple is a pytree to JAX


def _spread(name: str, bijectors: PyTree, values: PyTree, apply: Callable[[Bijector, str, Any], Array]) -> PyTree:
    check_bijectors(name, bijectors)
    names = jax.tree.unflatten(jax.tree.structure(values), tree.leaf_names(values))
    try:
        one_a_leaf = jax.tree.map(lambda b, sub: jax.tree.map(lambda _: b, sub), bijectors, names, is_leaf=_is_bijector)
    except ValueError as error:
        structure = jax.tree.structure(jax.tree.map(lambda _: 0, bijectors, is_leaf=_is_bijector))
        wanted, got = "bijectors to be a tree prefix of the hyperparameters", f"{structure} for {names}"
        raise ValueError(f"{name}: " + validate.message(wanted, got, "Pass one bijector or a prefix.")) from error
    return jax.tree.map(apply, one_a_leaf, names, values, is_leaf=_is_bijector)


def identity() -> Bijector:
    """Leave a hyperparameter as it is: x = λ.

    >>> identity().forward(2.0)
    2.0
    """
    return Bijector(lambda x: x, lambda y: y)


def exp() -> Bijector:
    """Learn a positive number by its logarithm: x = exp λ, so λ = log x.

    A step in λ is a relative change of x: right for scales that span decades. Overflows above λ = 88 in
    float32; ``interval`` bounds it.

    >>> round(float(exp().inverse(1e-3)), 4)
    -6.9078
    """
    return Bijector(jnp.exp, jnp.log)


def softplus() -> Bijector:
    """Learn a positive number by x = log(1 + exp λ), so λ = x + log(1 − exp(−x)).

    Linear for large λ, exponential for very negative λ.

    >>> round(float(softplus().forward(0.0)), 4)
    0.6931
    """
    return Bijector(jax.nn.softplus, lambda y: y + jnp.log(-jnp.expm1(-y)))


def sigmoid() -> Bijector:
    """Learn a number in (0, 1): x = 1 / (1 + exp(−λ)), so λ = log(x / (1 − x)).

    Its slope vanishes far from λ = 0: start inside, not at the rim.

    >>> float(sigmoid().forward(0.0))
    0.5
    """
    return Bijector(jax.nn.sigmoid, logit)


def interval(low: float, high: float) -> Bijector:
    """Learn a number in (low, high): x = low + (high − low)·sigmoid(λ).

    Args:
      low: lower end, finite.
      high: upper end, finite, above ``low``.

    Raises:
      ValueError: ``low`` is not below ``high``, or one is not finite.

    >>> float(interval(-10.0, 2.0).forward(0.0))
    -4.0
    """
    validate.number("low", low, low=-jnp.inf)
    validate.number("high", high, low=float(low), strict=True)

    def forward(x: Array) -> Array:
        return low + (high - low) * jax.nn.sigmoid(x)

    def inverse(y: Array) -> Array:
        return logit((y - low) / (high - low))

    return Bijector(forward, inverse)
