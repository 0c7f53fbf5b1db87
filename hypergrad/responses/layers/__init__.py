"""Flax layers that are linear in their weights, run a second time with other weights and one gate per example."""

from hypergrad.responses.layers._base import (
    LayerInfo,
    LayerResponse,
    Run,
    active,
    disable_self_tuning,
    displaced_weights,
    weights_by_path,
)
from hypergrad.responses.layers._linen import intercepted
from hypergrad.responses.layers._nnx import self_tunable

__all__ = [
    "LayerInfo",
    "LayerResponse",
    "Run",
    "active",
    "disable_self_tuning",
    "displaced_weights",
    "intercepted",
    "self_tunable",
    "weights_by_path",
]
