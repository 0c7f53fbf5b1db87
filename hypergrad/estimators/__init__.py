"""Hypergradient estimators, one method per file, and what a new one is written with."""

from hypergrad.estimators._direct import direct
from hypergrad.estimators._evolution import EvolutionInfo, centered_ranks, evolution
from hypergrad.estimators._first_order import FirstOrderInfo, first_order
from hypergrad.estimators._implicit import implicit
from hypergrad.estimators._modes import UnrollMode, forward, least_memory, reverse
from hypergrad.estimators._partition import partition
from hypergrad.estimators._protocol import Estimate, Estimator
from hypergrad.estimators._sama import sama
from hypergrad.estimators._unrolled import ForwardInfo, unrolled

__all__ = [
    "Estimate",
    "Estimator",
    "EvolutionInfo",
    "FirstOrderInfo",
    "ForwardInfo",
    "UnrollMode",
    "centered_ranks",
    "direct",
    "evolution",
    "first_order",
    "forward",
    "implicit",
    "least_memory",
    "partition",
    "reverse",
    "sama",
    "unrolled",
]
