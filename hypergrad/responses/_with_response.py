"""A problem whose inner variable is a response: the losses at the weights that it gives.

    L'(φ, λ) = L(apply(φ, λ), λ)

Reference: Lorraine & Duvenaud, Stochastic hyperparameter optimization through hypernetworks, arXiv 1802.09419.
"""

import dataclasses
import functools
from typing import Any

from jax import lax

from hypergrad import validate
from hypergrad.problem import BilevelProblem, ResponseSpec, check_problem, refuse_response
from hypergrad.responses._base import Response
from hypergrad.types import Array, Batch, Hyperparams, Loss, ModelState, Params, PyTree


def with_response(problem: BilevelProblem, response: Response) -> BilevelProblem:
    """Return the problem over a response's parameters: both losses at the weights that it gives.

    L'(φ, λ) = L(apply(φ, λ, center), λ), centre ``stop_gradient(λ)``: a centred response has the value of its
    ``params`` and the derivative of the response in λ.

    Args:
      problem: over plain weights, reparameterized before if at all.
      response: e.g. ``hg.responses.linear()``.

    Returns:
      A ``BilevelProblem`` for ``hg.direct``. Without ``perturbed`` around it a response learns nothing: perturb it.

    Raises:
      TypeError: wrong ``problem`` or ``response``.
      ValueError: a problem that has a response or is perturbed.

    Right where the response is flexible enough to hold the best response near λ, and trained: the hypergradient's
    error is that of its Jacobian.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> loss = lambda w, h, batch, key: ((w - h) ** 2).sum()
    >>> response = hg.responses.linear()
    >>> problem = with_response(hg.BilevelProblem(loss, loss), response)
    >>> start = response.init(0, jnp.ones(2), jnp.zeros(2))
    >>> float(problem.inner_loss(start, jnp.zeros(2), None, None))
    2.0

    Reference: Lorraine & Duvenaud, arXiv 1802.09419.
    """
    check_problem(problem)
    if not isinstance(response, Response):
        fix = "Pass e.g. hg.responses.linear(), or hg.responses.Response(init, apply)."
        raise TypeError(validate.message("response to be a Response", validate.describe(response), fix))
    refuse_response("with_response", problem)

    def at_response(loss: Loss, center: Hyperparams | None = None) -> Loss:
        @functools.wraps(loss)
        def of_response(response_params: PyTree, hyperparams: Hyperparams, *args: Any, **kwargs: Any) -> Any:
            around = lax.stop_gradient(hyperparams) if center is None else center
            return loss(response.apply(response_params, hyperparams, around), hyperparams, *args, **kwargs)

        return of_response

    def start(key: Array, params: Params, hyperparams: Hyperparams, _batch: Batch, _state: ModelState) -> PyTree:
        return response.init(key, params, hyperparams)

    view = ResponseSpec(
        init=start,
        weights=lambda response_params, hyperparams: response.apply(
            response_params, hyperparams, lax.stop_gradient(hyperparams)
        ),
        losses_at=lambda center: (at_response(problem.inner_loss, center), at_response(problem.outer_loss, center)),
        base_problem=problem,
    )
    inner, outer = at_response(problem.inner_loss), at_response(problem.outer_loss)
    return dataclasses.replace(problem, inner_loss=inner, outer_loss=outer, response=view)
