"""The elementwise bijectors: which one for which hyperparameter.

    identity       R → R             weights of a network, any sign
    exp            R → (0, ∞)        scales that span decades: decays, rates, noise levels
    softplus       R → (0, ∞)        positive values near 1, gentler than exp for large λ
    sigmoid        R → (0, 1)        probabilities, dropout rates, example weights
    interval(a, b) R → (a, b)        anything bounded, e.g. a log decay kept where Neumann converges

Compose by reparameterizing twice: ``reparameterize(reparameterize(p, exp()), interval(log lo, log hi))``
learns a decay between lo and hi on a log scale.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import logit

from hypergrad import _checks
from hypergrad._types import Array
from hypergrad.bijectors._base import Bijector


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
    _checks.number("low", low, low=-jnp.inf)
    _checks.number("high", high, low=float(low), strict=True)

    def forward(x: Array) -> Array:
        return low + (high - low) * jax.nn.sigmoid(x)

    def inverse(y: Array) -> Array:
        return logit((y - low) / (high - low))

    return Bijector(forward, inverse)
