"""Hyperparameters tuned by JAXopt, for ``minimize.py``; runs in an environment with JAXopt alone.

    python benchmarks/quality/_peer_jaxopt_minimize.py problem.npz

The documented way: the outer LBFGS differentiates the outer loss of the inner LBFGS, whose ``run`` is differentiable by
implicit differentiation. The inner solve starts from the weights given each time: ``run`` has no place for a warm start
inside of a loss.
"""

import importlib
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)
jaxopt: Any = importlib.import_module("jaxopt")
INNER_STEPS, INNER_TOLERANCE, OUTER_STEPS, OUTER_TOLERANCE = 2000, 1e-7, 50, 1e-5


def squares(w: Any, x: Any, y: Any) -> Any:
    """Return half the mean squared error."""
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def logistic(w: Any, x: Any, y: Any) -> Any:
    """Return the mean logistic loss; labels are -1 and 1."""
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))


def cross_entropies(w: Any, x: Any, y: Any) -> Any:
    """Return the cross-entropy of each example."""
    logits = x @ w
    return jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]


def main() -> None:
    """Read the problem named on the command line, tune it twice, print JSON."""
    file = np.load(sys.argv[1])
    kind, (params, start, x, y, valid_x, valid_y) = str(file["kind"]), [jnp.asarray(file[f"arr_{i}"]) for i in range(6)]

    def inner(w: Any, h: Any) -> Any:
        if kind == "data cleaning":
            return jnp.mean(jax.nn.sigmoid(h) * cross_entropies(w, x, y)) + 0.5 * 1e-3 * jnp.sum(w**2)
        return {"ridge": squares, "logistic": logistic}[kind](w, x, y) + 0.5 * jnp.sum(jnp.exp(h) * w**2)

    def outer(h: Any) -> Any:
        solver = jaxopt.LBFGS(fun=inner, maxiter=INNER_STEPS, tol=INNER_TOLERANCE)
        w = solver.run(params, h).params
        if kind == "data cleaning":
            return cross_entropies(w, valid_x, valid_y).mean()
        return {"ridge": squares, "logistic": logistic}[kind](w, valid_x, valid_y)

    run, times = jax.jit(jaxopt.LBFGS(fun=outer, maxiter=OUTER_STEPS, tol=OUTER_TOLERANCE).run), []
    for _ in range(2):
        begun = time.perf_counter()
        found = jax.block_until_ready(run(start))
        times.append(time.perf_counter() - begun)
    steps = int(found.state.iter_num)
    figures = {"hyperparams": np.asarray(found.params).tolist(), "steps": steps}
    print(json.dumps({**figures, "seconds": times[1], "first_seconds": times[0]}))


if __name__ == "__main__":
    main()
