"""Hypergradients by higher, for ``peer_accuracy.py``; runs in an environment with higher and PyTorch.

    python benchmarks/quality/_peer_higher.py problems.npz

The documented way: ``higher.innerloop_ctx`` with a differentiable copy of ``torch.optim.SGD``. It only unrolls.
"""

import functools
import importlib
from typing import Any

import _peer
from _peer_torch import Linear, inner_loss, outer_loss, torch

higher: Any = importlib.import_module("higher")


def unrolled(problem: _peer.Problem, steps: int) -> tuple[Any, str]:
    """Differentiate through gradient steps."""
    model, logs = Linear(0 * problem.weights), torch.tensor(problem.logs, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.step)
    with higher.innerloop_ctx(model, optimizer) as (functional, differentiable):
        for _ in range(steps):
            differentiable.step(inner_loss(problem, functional.weight, logs))
        return torch.autograd.grad(outer_loss(problem, functional.weight), logs)[0].numpy(), ""


if __name__ == "__main__":
    _peer.main(
        {_peer.unroll(k): functools.partial(unrolled, steps=k) for k in _peer.UNROLL_BUDGETS}, ("higher", "torch")
    )
