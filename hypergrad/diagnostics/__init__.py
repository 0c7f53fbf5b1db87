"""Whether to trust a hypergradient and what was learned by it: checks, comparisons, the retraining test, pictures."""

from hypergrad.diagnostics._check import HypergradCheck, check_hypergrad
from hypergrad.diagnostics._compare import Agreement, Comparison, HorizonBias, compare, horizon_bias
from hypergrad.diagnostics._differences import Direction
from hypergrad.diagnostics._logging import progress, scalars
from hypergrad.diagnostics._optimum import solve_inner
from hypergrad.diagnostics._plots import plot_comparison, plot_solver, plot_trajectories
from hypergrad.diagnostics._retrain import Retrained, retrain
from hypergrad.diagnostics._solvers import SolverComparison, SolverRow, compare_solvers
from hypergrad.diagnostics._spectrum import Spectrum, extreme_eigenvalues
from hypergrad.inner_solvers._newton_cg import Optimum

__all__ = [
    "Agreement",
    "Comparison",
    "Direction",
    "HorizonBias",
    "HypergradCheck",
    "Optimum",
    "Retrained",
    "SolverComparison",
    "SolverRow",
    "Spectrum",
    "check_hypergrad",
    "compare",
    "compare_solvers",
    "extreme_eigenvalues",
    "horizon_bias",
    "plot_comparison",
    "plot_solver",
    "plot_trajectories",
    "progress",
    "retrain",
    "scalars",
    "solve_inner",
]
