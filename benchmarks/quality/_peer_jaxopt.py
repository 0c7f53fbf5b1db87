"""Hypergradients by JAXopt, for ``peer_accuracy.py``; runs in an environment with JAXopt alone.

    python benchmarks/quality/_peer_jaxopt.py problems.npz

The documented way: a solver's ``run`` is differentiable in its arguments, by implicit differentiation with the linear
solver ``implicit_diff_solve``, or with ``implicit_diff=False`` through its iterations.
"""

import functools
import importlib
from typing import Any

import _peer
import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)
jaxopt: Any = importlib.import_module("jaxopt")


def loss(kind: str, weights: Any, x: Any, y: Any) -> Any:
    """Return the loss without decays."""
    if kind == "ridge":
        return 0.5 * jnp.sum((x @ weights - y) ** 2)
    logits = x @ weights
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0])


def hypergradient(problem: _peer.Problem, start: Any, **options: Any) -> tuple[Any, str]:
    """Differentiate the outer loss of ``GradientDescent.run``; ``OptStep.state`` says nothing of the linear solve."""
    train, valid = (jnp.asarray(problem.x), jnp.asarray(problem.y)), (problem.valid_x, jnp.asarray(problem.valid_y))

    def inner(weights: Any, logs: Any) -> Any:
        return loss(problem.kind, weights, *train) + 0.5 * jnp.sum(jnp.exp(logs) * weights**2)

    solver = jaxopt.GradientDescent(fun=inner, **options)
    return jax.grad(lambda logs: loss(problem.kind, solver.run(start, logs).params, *valid))(problem.logs), ""


def implicit(problem: _peer.Problem, solve: Any = None) -> tuple[Any, str]:
    """Differentiate implicitly at the exact solution, where ``run`` takes no step worth the name."""
    options = {} if solve is None else {"implicit_diff_solve": solve}
    return hypergradient(problem, jnp.asarray(problem.weights), **options)


def unrolled(problem: _peer.Problem, steps: int) -> tuple[Any, str]:
    """Differentiate through plain gradient steps, none left out."""
    options = {"maxiter": steps, "stepsize": problem.step, "acceleration": False, "tol": 0.0, "implicit_diff": False}
    return hypergradient(problem, jnp.zeros(problem.weights.shape), **options)


def methods() -> dict[str, _peer.Method]:
    """Return the methods that JAXopt has; it has no Neumann series."""
    conjugate, normal = jaxopt.linear_solve.solve_cg, jaxopt.linear_solve.solve_normal_cg
    budget, stop = _peer.NORMAL_BUDGET, {"tol": _peer.TOLERANCE}
    return {
        **{
            _peer.cg(k): functools.partial(implicit, solve=functools.partial(conjugate, maxiter=k, **stop))
            for k in _peer.CG_BUDGETS
        },
        _peer.normal_cg(budget): functools.partial(implicit, solve=functools.partial(normal, maxiter=budget, **stop)),
        **{_peer.unroll(k): functools.partial(unrolled, steps=k) for k in _peer.UNROLL_BUDGETS},
        "default": implicit,  # solve_normal_cg to a residual of 1e-5 of the normal equations, at most 10 n steps
    }


if __name__ == "__main__":
    _peer.main(methods(), ("jaxopt", "jax"))
