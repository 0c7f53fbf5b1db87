"""hypergrad: gradient-based hyperparameter optimization for JAX, behind one optax interface."""

from hypergrad import bijectors, penalties, solvers
from hypergrad._bilevel import BilevelState, bilevel
from hypergrad._functional import hypergrad, value_and_hypergrad
from hypergrad._problem import BilevelParams, BilevelProblem, reparameterize
from hypergrad.bijectors import Bijector, constrain, unconstrain
from hypergrad.estimators import Estimate, EvaluationInfo, HypergradEstimator, HypergradInfo, implicit
from hypergrad.solvers import LinearSolver, SolveInfo

__version__ = "0.1.0"

__all__ = [
    # the problem
    "BilevelParams",
    "BilevelProblem",
    "reparameterize",
    # constrained hyperparameters
    "Bijector",
    "bijectors",
    "constrain",
    "penalties",
    "unconstrain",
    # estimators and their linear solvers
    "Estimate",
    "EvaluationInfo",
    "HypergradEstimator",
    "HypergradInfo",
    "LinearSolver",
    "SolveInfo",
    "implicit",
    "solvers",
    # how to use one
    "BilevelState",
    "bilevel",
    "hypergrad",
    "value_and_hypergrad",
]
