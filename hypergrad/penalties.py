"""Penalties whose coefficients are hyperparameters: one number, one per layer, one per leaf, or one per weight.

    l2(w, c) = ½ Σᵢ cᵢ wᵢ²            gradient cᵢ wᵢ, Hessian diag(c)
    l1(w, c) = Σᵢ cᵢ (√(wᵢ² + s²) − s)    smoothed: twice differentiable, |wᵢ| for |wᵢ| ≫ s

Put the penalty into the *inner* loss: implicit differentiation sees no decay that an optimizer applies
(``optax.adamw``). Coefficients are the constrained, non-negative values; learn them through
``reparameterize(problem, bijectors.exp())`` or another positive bijector.
"""

from collections.abc import Callable

import jax.numpy as jnp

from hypergrad import tree, validate
from hypergrad.types import Array, Params, PyTree

__all__ = ["l1", "l2"]


def l2(params: Params, coefficients: PyTree) -> Array:
    """Return the ridge penalty ½ Σ cᵢ wᵢ².

    Args:
      params: weights, any pytree of arrays.
      coefficients: a tree prefix of ``params``. Each of its leaves is a scalar, which then holds for every
        weight below it, or an array that broadcasts to the weight's shape (in particular one number per weight).

    Returns:
      A scalar in ``promote_types(leaf dtypes, float32)``. With non-negative coefficients it is convex.

    Raises:
      ValueError: ``coefficients`` is not a prefix of ``params``, or a shape does not broadcast to its weight's.

    >>> import jax.numpy as jnp
    >>> float(l2({"a": jnp.array([1., 2.]), "b": jnp.array(3.)}, {"a": jnp.array([2., 1.]), "b": 2.}))
    12.0

    Reference: Krogh & Hertz, A simple weight decay can improve generalization, NIPS 1991.
    """
    return _weighted_sum("penalties.l2", lambda w: 0.5 * w * w, params, coefficients)


def l1(params: Params, coefficients: PyTree, *, smoothing: float = 1e-3) -> Array:
    """Return the smoothed lasso penalty Σ cᵢ (√(wᵢ² + s²) − s).

    Its curvature at zero is cᵢ/s: a small ``smoothing`` makes linear solves with the Hessian harder.

    Args:
      params: weights, any pytree of arrays.
      coefficients: a tree prefix of ``params``, as for ``l2``.
      smoothing: s > 0, the width around zero in which |w| is rounded, in units of the weights.

    Returns:
      A scalar in ``promote_types(leaf dtypes, float32)``, at most Σ cᵢ|wᵢ| and at least Σ cᵢ(|wᵢ| − s).

    Raises:
      ValueError: ``smoothing`` ≤ 0, or as for ``l2``.

    >>> import jax.numpy as jnp
    >>> round(float(l1(jnp.array([3., -4.]), 1., smoothing=1e-6)), 4)
    7.0

    Reference: Schmidt, Fung & Rosales, Fast optimization methods for L1 regularization, ECML 2007.
    """
    validate.number("smoothing", smoothing, low=0.0, strict=True)
    return _weighted_sum("penalties.l1", lambda w: jnp.sqrt(w * w + smoothing**2) - smoothing, params, coefficients)


def _weighted_sum(name: str, elementwise: Callable[[Array], Array], params: Params, coefficients: PyTree) -> Array:
    terms = []
    for _, weight, coefficient in validate.by_prefix(name, "coefficients", params, coefficients):
        values = elementwise(tree.promote(weight))
        # A Python number leaves the weight's dtype; an array may widen it.
        dtype = values.dtype if isinstance(coefficient, int | float) else tree.wider(values.dtype, coefficient.dtype)
        values, c = values.astype(dtype), jnp.asarray(coefficient, dtype)
        terms.append(c * jnp.sum(values) if c.ndim == 0 else jnp.sum(c * values))
    return tree.total(terms)
