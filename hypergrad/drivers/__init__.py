"""Drivers run an estimator: behind one optax transformation, or as a function."""

from hypergrad.drivers._bilevel import BilevelState, BilevelTransformation, bilevel, check_bilevel
from hypergrad.drivers._functional import best_response, compiled, hypergrad, one_estimate, value_and_hypergrad
from hypergrad.drivers._guard import Guard, HypergradInfo, SkipReason, guard, solves_in
from hypergrad.drivers._metagradient import MetagradientInfo, MetagradientStatus, metagradient
from hypergrad.drivers._minimize import History, MinimizeResult, MinimizeStatus, minimize
from hypergrad.drivers._plan import Advice, MemoryPlan, MetagradientPlan, metagradient_plan, plan

__all__ = [
    "Advice",
    "BilevelState",
    "BilevelTransformation",
    "Guard",
    "History",
    "HypergradInfo",
    "MemoryPlan",
    "MetagradientInfo",
    "MetagradientPlan",
    "MetagradientStatus",
    "MinimizeResult",
    "MinimizeStatus",
    "SkipReason",
    "best_response",
    "bilevel",
    "check_bilevel",
    "compiled",
    "guard",
    "hypergrad",
    "metagradient",
    "metagradient_plan",
    "minimize",
    "one_estimate",
    "plan",
    "solves_in",
    "value_and_hypergrad",
]
