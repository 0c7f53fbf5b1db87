"""Adapters to training loops of other libraries.

flax       ``TrainState``: Flax's own, with hyperparameters
nnx        ``problem`` and ``Optimizer``: modules with batch statistics and dropout
equinox    ``partition``: the weights of a module
"""

from hypergrad.integrations import equinox, flax, nnx

__all__ = ["equinox", "flax", "nnx"]
