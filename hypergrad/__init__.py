"""hypergrad: gradient-based hyperparameter optimization for JAX, behind one optax interface."""

from hypergrad import bijectors, diagnostics, noise, optimizers, penalties, responses, solvers
from hypergrad.bijectors import Bijector, constrain, unconstrain
from hypergrad.data import IndexedBatch
from hypergrad.drivers import BilevelState, best_response, bilevel, hypergrad, value_and_hypergrad
from hypergrad.estimators import (
    Estimate,
    EvaluationInfo,
    HypergradEstimator,
    HypergradInfo,
    direct,
    implicit,
    unrolled,
)
from hypergrad.estimators._modes import UnrollMode, forward, reverse
from hypergrad.problem import BilevelParams, BilevelProblem, reparameterize
from hypergrad.solvers import LinearSolver, SolveInfo

__version__ = "0.1.0"

__all__ = [
    # the problem
    "BilevelParams",
    "BilevelProblem",
    "IndexedBatch",
    "reparameterize",
    # constrained hyperparameters
    "Bijector",
    "bijectors",
    "constrain",
    "penalties",
    "unconstrain",
    # estimators, linear solvers, ways through an unroll, pieces of inner optimizers
    "Estimate",
    "EvaluationInfo",
    "HypergradEstimator",
    "HypergradInfo",
    "LinearSolver",
    "SolveInfo",
    "UnrollMode",
    "diagnostics",
    "direct",
    "forward",
    "implicit",
    "noise",
    "optimizers",
    "responses",
    "reverse",
    "solvers",
    "unrolled",
    # how to use one
    "BilevelState",
    "best_response",
    "bilevel",
    "hypergrad",
    "value_and_hypergrad",
]
