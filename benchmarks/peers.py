"""The same hypergradients by other libraries, where they are installed: none is needed to run a benchmark."""

import importlib
import importlib.metadata
from typing import Any

import jax
import optax
from handwritten import Step, inner_loss
from networks import Network, Tree


def jaxopt_unroll(network: Network, optimizer: optax.GradientTransformation, steps: int) -> Step:
    """Return ``(params, log_decays, batch, outer_batch) -> (value, hypergradient)`` by jaxopt's unrolled solver.

    Its ``run`` takes every step on the same batch. jaxopt is archived; version 0.8.5 is its last.

    Raises:
      ImportError: it is not installed.
    """
    jaxopt: Any = importlib.import_module("jaxopt")
    options = {"maxiter": steps, "tol": 0.0, "implicit_diff": False, "unroll": True, "jit": True}
    solver = jaxopt.OptaxSolver(fun=inner_loss(network), opt=optimizer, **options)

    def fn(params: Tree, log_decays: Tree, batch: Tree, outer_batch: Tree) -> tuple[jax.Array, Tree]:
        def outer(log_decays: Tree) -> jax.Array:
            return network.cross_entropy(solver.run(params, log_decays, batch).params, outer_batch)

        return jax.value_and_grad(outer)(log_decays)

    return fn


def version(name: str) -> str:
    """Return the installed version of a distribution; empty where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
