"""A problem whose inner variable is a response: the losses at the weights that the response gives.

    L'(φ, λ) = L(apply(φ, λ), λ)

Reference: Lorraine & Duvenaud, Stochastic hyperparameter optimization through hypernetworks, arXiv 1802.09419.
"""

import dataclasses
import functools
from typing import Any

from jax import lax

from hypergrad import validate
from hypergrad.problem import BilevelProblem, ResponseSpec, check_problem, refuse_residual, refuse_response
from hypergrad.responses._base import Response
from hypergrad.types import Array, Batch, Hyperparams, Loss, ModelState, Params, PyTree

__all__ = ["with_response"]


def with_response(problem: BilevelProblem, response: Response) -> BilevelProblem:
    """Return the problem over a response's parameters: both losses at the weights that it gives.

    L'(φ, λ) = L(apply(φ, λ, center), λ) with the centre ``stop_gradient(λ)``: for a centred response the value is the
    loss at its ``params``, and the derivative in λ includes that of the response.

    Args:
      problem: over plain weights; apply ``reparameterize`` before.
      response: e.g. ``hg.responses.linear()``.

    Returns:
      A ``BilevelProblem`` for ``hg.direct``. Apply ``perturbed`` or ``sampled`` to it: otherwise nothing trains the
      response.

    Raises:
      TypeError: wrong ``problem`` or ``response``.
      ValueError: a problem that has a response or is perturbed.

    Valid when the response is flexible enough to represent the best response near λ, and trained: the error of the
    hypergradient is that of the response's Jacobian.

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
    refuse_residual("with_response", problem)

    def weights(response_params: PyTree, hyperparams: Hyperparams) -> Params:
        return response.apply(response_params, hyperparams, lax.stop_gradient(hyperparams))

    def at_response(loss: Loss, center: Hyperparams | None = None) -> Loss:
        @functools.wraps(loss)
        def of_response(response_params: PyTree, hyperparams: Hyperparams, *args: Any, **kwargs: Any) -> Any:
            around = lax.stop_gradient(hyperparams) if center is None else center
            return loss(response.apply(response_params, hyperparams, around), hyperparams, *args, **kwargs)

        return of_response

    def losses_at(center: Hyperparams | None) -> tuple[Loss, Loss]:
        return at_response(problem.inner_loss, center), at_response(problem.outer_loss, center)

    def start(key: Array, params: Params, hyperparams: Hyperparams, _batch: Batch, _state: ModelState) -> PyTree:
        return response.init(key, params, hyperparams)

    spec = ResponseSpec(init=start, weights=weights, losses_at=losses_at, base_problem=problem)
    inner, outer = losses_at(None)
    return dataclasses.replace(problem, inner_loss=inner, outer_loss=outer, response=spec)
