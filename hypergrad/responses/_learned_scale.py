"""A perturbation scale σ that is learned with the hyperparameters, inside bounds and with an entropy bonus.

    σ = clip(exp(log_scale), low, high)
    L_out'(φ, (λ, log σ)) = E_ε L_out(φ, λ + σε) − τ Σᵢ log(σᵢ √(2πe))

The perturbed outer loss prefers a small σ, the entropy term a large one. The optimum is the size of the region around λ
in which the response is accurate.

Reference: MacKay et al., Self-tuning networks, arXiv 1903.03088.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad import tree, validate
from hypergrad.types import Array, Hyperparams, PyTree

__all__ = ["HyperparamsWithScale", "LearnedScale", "clip_scale", "drop_scale", "entropy_bonus", "learned_scale"]

_ENTROPY_OF_ONE = 0.5 * math.log(2 * math.pi * math.e)


class LearnedScale(NamedTuple):
    """A perturbation scale that is learned with the hyperparameters.

    Attributes:
      entropy: τ ≥ 0, weight of the entropy in the outer loss.
      low: lower bound of σ.
      high: upper bound of σ.
    """

    entropy: float
    low: float
    high: float


class HyperparamsWithScale(NamedTuple):
    """Hyperparameters with learned perturbation scales: what a problem with ``learned_scale`` takes as λ.

    Attributes:
      hyperparams: unconstrained hyperparameters.
      log_scale: tree prefix of ``hyperparams``: log σ, one number per subtree, leaf or entry.
    """

    hyperparams: Hyperparams
    log_scale: PyTree


def learned_scale(entropy: float = 1e-3, low: float = 0.05, high: float = 1.5) -> LearnedScale:
    """Return a learned scale for ``perturbed``: the hyperparameters become a ``HyperparamsWithScale``.

    σ = clip(exp(log_scale), low, high). At a bound, a gradient that would move ``log_scale`` further out is replaced by
    zero. The outer loss is reduced by τ Σ log(σᵢ √(2πe)), the sum over all entries of the hyperparameters. The outer
    optimizer sets the rate at which σ changes: if σ falls too early, raise ``low``.

    Args:
      entropy: τ. With 0, σ falls to ``low``; large values drive it to ``high``. Usual values are 1e-5 to 1e-3.
      low: > 0.
      high: > ``low``. At σ = 2, hypergradients of logistic hyperparameters have been observed to change sign.

    Returns:
      A ``LearnedScale``.

    Raises:
      TypeError: an argument is not a number.
      ValueError: τ < 0, or bounds out of order.

    >>> learned_scale(entropy=1e-4).high
    1.5

    Reference: MacKay et al., arXiv 1903.03088.
    """
    validate.number("entropy", entropy, low=0.0)
    validate.number("low", low, low=0.0, strict=True)
    validate.number("high", high, low=float(low), strict=True)
    return LearnedScale(entropy, low, high)


def drop_scale(hyperparams: Any, learned: LearnedScale | None) -> Hyperparams:
    """Return the hyperparameters without the learned scale; refuse a missing scale, and one where none is learned."""
    with_scale = isinstance(hyperparams, HyperparamsWithScale)
    if learned is None and with_scale:
        wanted, got = "hyperparams without a scale, because the scale is fixed", "a HyperparamsWithScale"
        fix = "Pass its field hyperparams alone, or use perturbed(..., scale=hg.responses.learned_scale())."
        raise TypeError(validate.message(wanted, got, fix))
    if learned is not None and not with_scale:
        wanted, got = "a HyperparamsWithScale, because the scale is learned", type(hyperparams).__name__
        fix = "Pass hg.responses.HyperparamsWithScale(hyperparams, log_scale)."
        raise TypeError(validate.message(wanted, got, fix))
    return hyperparams if learned is None else hyperparams.hyperparams


def clip_scale(hyperparams: Any, learned: LearnedScale | None) -> Any:
    """Return the hyperparameters with log σ inside its bounds.

    The clip is the identity to a gradient, except one whose descent step would leave the bounds: that one becomes zero.
    """
    center = drop_scale(hyperparams, learned)
    if learned is None:
        return center
    low, high = math.log(learned.low), math.log(learned.high)

    @jax.custom_vjp
    def clip(log_scale: Array) -> Array:
        return jnp.clip(log_scale, low, high)

    def backward(log_scale: Array, cotangent: Array) -> tuple[Array]:
        outwards = ((log_scale >= high) & (cotangent < 0)) | ((log_scale <= low) & (cotangent > 0))
        return (jnp.where(outwards, 0.0, cotangent),)

    clip.defvjp(lambda log_scale: (clip(log_scale), log_scale), backward)
    return HyperparamsWithScale(center, jax.tree.map(lambda s: clip(jnp.asarray(s)), hyperparams.log_scale))


def entropy_bonus(hyperparams: HyperparamsWithScale, learned: LearnedScale) -> Array:
    """Return τ Σᵢ log(σᵢ √(2πe)) over all entries of the hyperparameters."""
    found = validate.by_prefix("perturbed", "log_scale", *hyperparams, of="hyperparams")
    terms = [jnp.sum(jnp.broadcast_to(s, jnp.shape(h)) + _ENTROPY_OF_ONE) for _, h, s in found]
    total = tree.total(terms)
    return jnp.asarray(learned.entropy, total.dtype) * total
