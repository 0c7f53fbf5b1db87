"""Smooth maps from unconstrained to constrained hyperparameters, elementwise."""

from hypergrad.bijectors._base import Bijector, constrain, unconstrain
from hypergrad.bijectors._elementwise import exp, identity, interval, sigmoid, softplus

__all__ = ["Bijector", "constrain", "exp", "identity", "interval", "sigmoid", "softplus", "unconstrain"]
