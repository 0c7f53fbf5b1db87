"""Optimizers whose settings are learned: as hyperparameters of an unroll, or online by the optimizer itself."""

from hypergrad.optimizers._differentiable import (
    add_decayed_weights,
    clip_by_block_rms,
    clip_by_global_norm,
    normalize_by_update_norm,
    scale_by_learning_rate,
    schedule,
)
from hypergrad.optimizers._hypergradient_descent import (
    HypergradientDescentState,
    RateRule,
    additive,
    clipped,
    hypergradient_descent,
    multiplicative,
)

__all__ = [
    "HypergradientDescentState",
    "RateRule",
    "add_decayed_weights",
    "additive",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clipped",
    "hypergradient_descent",
    "multiplicative",
    "normalize_by_update_norm",
    "scale_by_learning_rate",
    "schedule",
]
