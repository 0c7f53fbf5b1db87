"""Priors on hyperparameters, which keep many of them from fitting the noise of a validation set.

    normal(m, s)(λ)    = ½ Σᵢ ((λᵢ − mᵢ) / s)²              λ stays near m, e.g. near its start
    shared_mean(s)(λ)  = ½ Σ_leaf Σᵢ ((λᵢ − mean λ_leaf) / s)²    the entries of a leaf stay near each other

A prior is −log p(λ) up to a constant. ``hg.with_prior(problem, prior, num_examples=N)`` adds it, divided by N, to the
outer loss. Scales are in units of the hyperparameters that it receives: for a log decay, s = 1 lets a decay differ by
a factor of about e.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad import tree, validate
from hypergrad.types import Array, Hyperparams, PyTree

__all__ = ["normal", "shared_mean"]


def normal(mean: PyTree, scale: Any = 1.0) -> Callable[[Hyperparams], Array]:
    """Return the prior λᵢ ~ N(meanᵢ, scale²): ½ Σᵢ ((λᵢ − meanᵢ) / scale)².

    Args:
      mean: a tree like the hyperparameters, e.g. those at the start; or a tree prefix of it, such as one number.
      scale: the standard deviation, > 0: a number.

    Returns:
      ``prior(hyperparams) -> scalar``.

    Raises:
      ValueError: ``scale`` ≤ 0; at a call, ``mean`` is not a prefix of the hyperparameters or does not broadcast.

    >>> import jax.numpy as jnp
    >>> float(normal(1.0, scale=2.0)({"a": jnp.array([1.0, 5.0])}))
    2.0

    Reference: MacKay, Comparison of approximate methods for handling hyperparameters, Neural Computation 11, 1999.
    """
    validate.number("scale", scale, low=0.0, strict=True)

    def prior(hyperparams: Hyperparams) -> Array:
        terms = []
        for _, value, center in validate.by_prefix("priors.normal", "mean", hyperparams, mean, of="hyperparams"):
            value = tree.promote(value)
            terms.append(0.5 * jnp.sum(((value - jnp.asarray(center, value.dtype)) / scale) ** 2))
        return tree.total(terms)

    return prior


def shared_mean(scale: Any = 1.0) -> Callable[[Hyperparams], Array]:
    """Return the prior λᵢ ~ N(μ, scale²) with a free mean μ per leaf: ½ Σ_leaf Σᵢ ((λᵢ − mean λ_leaf) / scale)².

    It holds the entries of a leaf near their mean, and leaves the mean free. With one leaf of hyperparameters per layer
    this is a shared mean per layer.

    Args:
      scale: the standard deviation within a leaf, > 0: a number.

    Returns:
      ``prior(hyperparams) -> scalar``.

    Raises:
      ValueError: ``scale`` ≤ 0.

    >>> import jax.numpy as jnp
    >>> float(shared_mean(1.0)({"layer": jnp.array([1.0, 3.0]), "other": jnp.array(7.0)}))
    1.0

    Reference: Gelman & Hill, Data analysis using regression and multilevel/hierarchical models, 2007.
    """
    validate.number("scale", scale, low=0.0, strict=True)

    def prior(hyperparams: Hyperparams) -> Array:
        leaves = [tree.promote(leaf) for leaf in jax.tree.leaves(hyperparams)]
        return tree.total([0.5 * jnp.sum(((leaf - jnp.mean(leaf)) / scale) ** 2) for leaf in leaves])

    return prior
