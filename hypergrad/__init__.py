"""hypergrad: gradient-based hyperparameter optimization for JAX, behind one optax interface."""

from hypergrad import bijectors, diagnostics, hyper, optimizers, penalties, responses, solvers
from hypergrad._bilevel import BilevelState, bilevel
from hypergrad._functional import best_response, hypergrad, value_and_hypergrad
from hypergrad._modes import UnrollMode, forward, reverse
from hypergrad._problem import BilevelParams, BilevelProblem, reparameterize
from hypergrad._types import IndexedBatch
from hypergrad.bijectors import Bijector, constrain, unconstrain
from hypergrad.estimators import (
    Estimate,
    EvaluationInfo,
    HypergradEstimator,
    HypergradInfo,
    direct,
    implicit,
    unrolled,
)
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
    "hyper",
    "implicit",
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
