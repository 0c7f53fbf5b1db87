"""Hypergradients by TorchOpt, for ``peer_accuracy.py``; runs in an environment with TorchOpt and PyTorch.

    python benchmarks/quality/_peer_torchopt.py problems.npz

The documented ways: ``torchopt.diff.implicit.custom_root`` around a function that returns the inner solution, with a
linear solver ``solve``; ``torchopt.MetaSGD`` for unrolled steps.
"""

import functools
import importlib
from typing import Any

import _peer
from _peer_torch import Linear, inner_loss, outer_loss, torch

torchopt: Any = importlib.import_module("torchopt")


def implicit(problem: _peer.Problem, solve: Any = None) -> tuple[Any, str]:
    """Differentiate implicitly at the exact solution."""
    optimality = torch.func.grad(functools.partial(inner_loss, problem))  # (weights, logs) -> gradient in the weights

    @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)  # type: ignore[untyped-decorator]
    def solution(weights: Any, logs: Any) -> Any:
        return weights

    logs = torch.tensor(problem.logs, requires_grad=True)
    loss = outer_loss(problem, solution(torch.tensor(problem.weights), logs))
    return torch.autograd.grad(loss, logs)[0].numpy(), ""


def neumann(problem: _peer.Problem, budget: int) -> tuple[Any, str]:
    """Differentiate implicitly by ``solve_inv(ns=True)``, which sums one term more than it takes products."""
    return implicit(problem, torchopt.linear_solve.solve_inv(ns=True, maxiter=budget, alpha=problem.step))


def unrolled(problem: _peer.Problem, steps: int) -> tuple[Any, str]:
    """Differentiate through gradient steps of ``MetaSGD``."""
    model, logs = Linear(0 * problem.weights), torch.tensor(problem.logs, requires_grad=True)
    optimizer = torchopt.MetaSGD(model, lr=problem.step)
    for _ in range(steps):
        optimizer.step(inner_loss(problem, model.weight, logs))
    return torch.autograd.grad(outer_loss(problem, model.weight), logs)[0].numpy(), ""


def methods() -> dict[str, _peer.Method]:
    """Return the methods that TorchOpt has."""
    conjugate, normal = torchopt.linear_solve.solve_cg, torchopt.linear_solve.solve_normal_cg
    stop, budget = {"rtol": _peer.TOLERANCE}, _peer.NORMAL_BUDGET
    return {
        **{_peer.cg(k): functools.partial(implicit, solve=conjugate(maxiter=k, **stop)) for k in _peer.CG_BUDGETS},
        _peer.normal_cg(budget): functools.partial(implicit, solve=normal(maxiter=budget, **stop)),
        **{_peer.neumann(k): functools.partial(neumann, budget=k) for k in _peer.NEUMANN_BUDGETS},
        **{_peer.unroll(k): functools.partial(unrolled, steps=k) for k in _peer.UNROLL_BUDGETS},
        "default": implicit,  # solve_normal_cg to a residual of 1e-5, at most 10 (64 + 10) steps on digits
    }


if __name__ == "__main__":
    _peer.main(methods(), ("torchopt", "torch"))
