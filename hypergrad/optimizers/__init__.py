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
from hypergrad.optimizers._learned import LearnedState, PerParameterMLP, learned, per_parameter_mlp

__all__ = [
    "HypergradientDescentState",
    "LearnedState",
    "PerParameterMLP",
    "RateRule",
    "add_decayed_weights",
    "additive",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clipped",
    "hypergradient_descent",
    "learned",
    "multiplicative",
    "normalize_by_update_norm",
    "per_parameter_mlp",
    "scale_by_learning_rate",
    "schedule",
]
