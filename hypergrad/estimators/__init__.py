"""Hypergradient estimators: one method a file."""

from hypergrad.estimators._base import Estimate, EvaluationInfo, HypergradEstimator, HypergradInfo
from hypergrad.estimators._direct import direct
from hypergrad.estimators._implicit import implicit
from hypergrad.estimators._unrolled import unrolled

__all__ = [
    "Estimate",
    "EvaluationInfo",
    "HypergradEstimator",
    "HypergradInfo",
    "direct",
    "implicit",
    "unrolled",
]
