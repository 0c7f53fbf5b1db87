"""Flax layers that are linear in their weights, run a second time with other weights and a gate an example."""

from hypergrad.responses.layers._base import (
    Found,
    LayerResponse,
    Run,
    active,
    displaced_weights,
    untuned,
    weights_by_path,
)
from hypergrad.responses.layers._linen import intercepted
from hypergrad.responses.layers._nnx import self_tunable

__all__ = [
    "Found",
    "LayerResponse",
    "Run",
    "active",
    "displaced_weights",
    "intercepted",
    "self_tunable",
    "untuned",
    "weights_by_path",
]
