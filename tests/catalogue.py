"""Every estimator and every linear solver, a row each: a new one inherits all contract tests by its row."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

import hypergrad as hg


class EstimatorRow(NamedTuple):
    """An estimator under the contract tests; ``rounding`` is by how much two compilations of it may differ."""

    name: str
    make: Callable[[hg.BilevelProblem], hg.Estimator]
    rounding: float = 1e-6
    trains: bool = False  # whether it takes inner steps of its own in an estimate


class SolverRow(NamedTuple):
    """A linear solver under the contract tests; ``rtol`` is what it reaches on a well-conditioned system."""

    name: str
    make: Callable[[], hg.LinearSolver]  # gives the same solver each time, so that tests share what is compiled
    rtol: float | None  # None: not a solver of the system
    keeps_state: bool


def _row(name: str, make: Callable[[], hg.LinearSolver], rtol: float | None, *, keeps_state: bool = False) -> SolverRow:
    return SolverRow(name, functools.cache(make), rtol, keeps_state)


def _foreign(matvec: Any, b: Any, x0: Any) -> Any:
    return jax.scipy.sparse.linalg.cg(matvec, b, x0, maxiter=50)[0]


SOLVERS = [
    _row("neumann", lambda: hg.solvers.neumann(400, 0.1), 1e-5),
    _row("neumann_auto", lambda: hg.solvers.neumann(400), 1e-5, keeps_state=True),
    _row("neumann_unrolled", lambda: hg.solvers.neumann(200, 0.2, unroll=4), 1e-5),
    _row("cg", lambda: hg.solvers.cg(50, 1e-6), 1e-5),
    _row("cg_warm", lambda: hg.solvers.cg(50, 1e-6, warm_start=True), 1e-5, keeps_state=True),
    _row("cg_unrolled", lambda: hg.solvers.cg(8, 1e-6, unroll=2), 1e-5),
    _row("cg_default", lambda: hg.solvers.cg(3, relative_damping=0.01, warm_start=True), None, keeps_state=True),
    _row("cg_kept", lambda: hg.solvers.cg(12, 1e-6, reorthogonalize=True), 1e-5),
    _row("recycled_cg", lambda: hg.solvers.recycled_cg(12, 4, 1e-6), 1e-5, keeps_state=True),
    _row("richardson", lambda: hg.solvers.richardson(300), 1e-5, keeps_state=True),
    _row("richardson_heavy", lambda: hg.solvers.richardson(200, momentum=0.5), 1e-5, keeps_state=True),
    _row("gmres", lambda: hg.solvers.gmres(50, 10, 1e-6), 1e-5),
    _row("gmres_warm", lambda: hg.solvers.gmres(50, 10, 1e-6, warm_start=True), 1e-5, keeps_state=True),
    _row("identity", lambda: hg.solvers.identity(), None),
    _row("dense", lambda: hg.solvers.dense(), 1e-5),
    _row("foreign", lambda: hg.solvers.from_callable(_foreign), 1e-4),
    _row("foreign_warm", lambda: hg.solvers.from_callable(_foreign, warm_start=True), 1e-4, keeps_state=True),
]

_HYPERNETWORK = hg.responses.hypernetwork(lambda size: nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(size)]))


def _learned(problem: hg.BilevelProblem, response: hg.responses.Response) -> hg.Estimator:
    return hg.direct(hg.responses.perturbed(hg.responses.with_response(problem, response), scale=0.1))


def _self_tuned(problem: hg.BilevelProblem, variant: hg.responses.SelfTuningVariant) -> hg.Estimator:
    tuned = hg.responses.self_tuning(problem, variant=variant, per_example=False)  # decays act on weights: one a batch
    return hg.direct(hg.responses.perturbed(tuned, scale=0.1))


def _parted(problem: hg.BilevelProblem) -> hg.Estimator:
    """Return ``implicit`` for the first leaf of the hyperparameters, ``sama`` for the others."""

    def labels(hyperparams: Any) -> Any:
        leaves, structure = jax.tree.flatten(hyperparams)
        return jax.tree.unflatten(structure, ["first", *["others"] * (len(leaves) - 1)])

    return hg.partition({"first": hg.implicit(problem), "others": hg.sama(problem)}, labels)


ESTIMATORS = [
    EstimatorRow("implicit", hg.implicit),
    EstimatorRow("implicit_neumann", lambda problem: hg.implicit(problem, hg.solvers.neumann(10))),
    EstimatorRow("implicit_cg", lambda problem: hg.implicit(problem, hg.solvers.cg(10, damping=0.1, warm_start=True))),
    EstimatorRow("implicit_dense", lambda problem: hg.implicit(problem, hg.solvers.dense(damping=0.1))),
    EstimatorRow("unrolled", hg.unrolled),
    EstimatorRow("unrolled_truncated", lambda problem: hg.unrolled(problem, hg.reverse(truncate=2, mixed=False))),
    EstimatorRow("unrolled_forward", lambda problem: hg.unrolled(problem, hg.forward())),
    # A difference of two gradients, at weights that a few steps have hardly moved apart.
    EstimatorRow("first_order", lambda problem: hg.first_order(problem, penalty=0.01), rounding=2e-5),
    EstimatorRow("sama", hg.sama),
    # Its tangents of decays that hardly count are rounding, which Adam outside blows up.
    EstimatorRow(
        "unrolled_persistent", lambda problem: hg.unrolled(problem, hg.forward(persistent=True)), rounding=5e-4
    ),
    # Differences of two losses that are nearly equal, over σ.
    EstimatorRow(
        "evolution", lambda problem: hg.evolution(problem, sigma=0.1, num_pairs=4), rounding=1e-3, trains=True
    ),
    EstimatorRow(
        "evolution_persistent",
        lambda problem: hg.evolution(problem, sigma=0.1, num_pairs=4, persistent=True),
        rounding=1e-3,
    ),
    EstimatorRow("partition", _parted),
    EstimatorRow("direct_gated", lambda problem: _learned(problem, hg.responses.gated())),
    EstimatorRow("direct_hypernetwork", lambda problem: _learned(problem, _HYPERNETWORK)),
    EstimatorRow("direct_delta_stn", lambda problem: _self_tuned(problem, hg.responses.delta_stn())),
]
