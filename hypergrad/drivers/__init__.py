"""Drivers run an estimator: behind one optax transformation, or as a function."""

from hypergrad.drivers._bilevel import BilevelState, bilevel
from hypergrad.drivers._functional import best_response, hypergrad, value_and_hypergrad

__all__ = ["BilevelState", "best_response", "bilevel", "hypergrad", "value_and_hypergrad"]
