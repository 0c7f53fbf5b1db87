"""Linear solvers for A x = b with A given by its products, one idea per file."""

from hypergrad.solvers import preconditioners
from hypergrad.solvers._base import LinearSolver, LinearSystem, SolveInfo, Status
from hypergrad.solvers._cg import cg
from hypergrad.solvers._dense import dense
from hypergrad.solvers._from_callable import from_callable
from hypergrad.solvers._gmres import gmres
from hypergrad.solvers._identity import identity
from hypergrad.solvers._neumann import neumann
from hypergrad.solvers._recycled_cg import recycled_cg
from hypergrad.solvers._richardson import richardson

__all__ = [
    "LinearSolver",
    "LinearSystem",
    "SolveInfo",
    "Status",
    "cg",
    "dense",
    "from_callable",
    "gmres",
    "identity",
    "neumann",
    "preconditioners",
    "recycled_cg",
    "richardson",
]
