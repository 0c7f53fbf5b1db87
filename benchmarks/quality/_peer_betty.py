"""Hypergradients by Betty, for ``peer_accuracy.py``; runs in an environment with betty-ml and PyTorch.

    python benchmarks/quality/_peer_betty.py problems.npz

The documented way: an ``Engine`` over two problems, whose inner ``Config`` names the method. The inner learning rate
is 0, so that the hypergradient is taken at the exact solution; ``grad_callback`` reads it before the outer step.
"""

import contextlib
import functools
import importlib
import io
from typing import Any

import _peer
from _peer_torch import Decays, Linear, inner_loss, outer_loss, torch

configs: Any = importlib.import_module("betty.configs")
engine: Any = importlib.import_module("betty.engine")
problems: Any = importlib.import_module("betty.problems")


def run(problem: _peer.Problem, base: Any, inner_config: Any, outer_config: Any, steps: int, rate: float) -> Any:
    """Take ``steps`` inner steps and an outer step; return the hypergradient of the latter."""
    found: list[Any] = []
    start = problem.weights if rate == 0 else 0 * problem.weights

    def weights_of(inner: Any) -> Any:
        return inner.params[0] if inner.params is not None else inner.module.weight

    class Inner(base):  # type: ignore[misc]
        params = None

        def training_step(self, _batch: Any) -> Any:
            return inner_loss(problem, weights_of(self), self.outer())

    class Outer(problems.ImplicitProblem):  # type: ignore[misc]
        def training_step(self, _batch: Any) -> Any:
            return outer_loss(problem, weights_of(self.inner))

        def grad_callback(self) -> None:
            found.append(self.module.logs.grad.detach().clone())

    def make(kind: Any, name: str, config: Any, module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=rate if name == "inner" else 0.0)
        batches = [(torch.zeros(1),)]
        return kind(name=name, config=config, module=module, optimizer=optimizer, train_data_loader=batches)

    inner = make(Inner, "inner", inner_config, Linear(start))
    outer = make(Outer, "outer", outer_config, Decays(problem.logs))
    dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    with contextlib.redirect_stdout(io.StringIO()):
        options = configs.EngineConfig(train_iters=steps, strategy="cpu")
        engine.Engine(problems=[outer, inner], config=options, dependencies=dependencies).run()
    return found[-1].numpy()


def implicit(problem: _peer.Problem, **options: Any) -> tuple[Any, str]:
    """Differentiate implicitly at the exact solution."""
    # The outer ``retain_graph=True`` is that of Betty's own examples: without it the outer graph is freed too early.
    outer = configs.Config(retain_graph=True)
    return run(problem, problems.ImplicitProblem, configs.Config(**options), outer, 1, 0.0), ""


def neumann(problem: _peer.Problem, budget: int) -> tuple[Any, str]:
    """Differentiate by the Neumann series, which sums one term more than it takes products."""
    return implicit(problem, type="neumann", neumann_iterations=budget, neumann_alpha=problem.step)


def unrolled(problem: _peer.Problem, steps: int) -> tuple[Any, str]:
    """Differentiate through inner steps by ``IterativeProblem``, with ``first_order=False`` as it asks for."""
    inner = configs.Config(unroll_steps=steps)
    outer = configs.Config(first_order=False, retain_graph=True)
    return run(problem, problems.IterativeProblem, inner, outer, steps, problem.step), ""


def methods() -> dict[str, _peer.Method]:
    """Return the methods that Betty has."""
    return {
        **{_peer.cg(k): functools.partial(implicit, type="cg", cg_iterations=k) for k in _peer.CG_BUDGETS},
        **{_peer.neumann(k): functools.partial(neumann, budget=k) for k in _peer.NEUMANN_BUDGETS},
        **{_peer.unroll(k): functools.partial(unrolled, steps=k) for k in _peer.UNROLL_BUDGETS},
        "default": implicit,  # type="darts": H⁻¹ replaced by the identity, the mixed product by a difference quotient
    }


if __name__ == "__main__":
    _peer.main(methods(), ("betty-ml", "torch"))
