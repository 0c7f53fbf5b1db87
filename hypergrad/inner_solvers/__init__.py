"""Solvers of the inner problem for ``hg.minimize``: each to a tolerance on ‖residual‖, with a warm start."""

from hypergrad.inner_solvers._base import InnerProblem, InnerSolution, InnerSolver, InnerStatus
from hypergrad.inner_solvers._gradient import gradient
from hypergrad.inner_solvers._lbfgs import lbfgs
from hypergrad.inner_solvers._newton_cg import newton_cg
from hypergrad.inner_solvers._proximal import proximal

__all__ = [
    "InnerProblem",
    "InnerSolution",
    "InnerSolver",
    "InnerStatus",
    "gradient",
    "lbfgs",
    "newton_cg",
    "proximal",
]
