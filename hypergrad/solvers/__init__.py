"""Linear solvers for A x = b with A given by its products, one idea per file."""

from hypergrad.solvers._base import LinearSolver, LinearSystem, SolveInfo, Status
from hypergrad.solvers._cg import cg
from hypergrad.solvers._dense import dense
from hypergrad.solvers._from_callable import from_callable
from hypergrad.solvers._identity import identity
from hypergrad.solvers._neumann import neumann

__all__ = ["LinearSolver", "LinearSystem", "SolveInfo", "Status", "cg", "dense", "from_callable", "identity", "neumann"]
