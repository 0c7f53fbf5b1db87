"""The protocol of a response: weights as a learned function of the hyperparameters.

    w(λ) = apply(φ, λ; c),    φ ← SGD on E_ε L_in(w(λ + σε), λ + σε),    dL_out/dλ by autodiff through w(λ)

A response is two pure functions. Its parameters φ replace the weights as the inner variable: a pytree with a field
``params`` (the weights at the centre c, or those that an offset is added to) and fields for the learned response.

Reference: MacKay et al., Self-tuning networks, arXiv 1903.03088; Lorraine & Duvenaud, arXiv 1802.09419.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from hypergrad import data, tree, validate
from hypergrad.problem import BilevelProblem, check_model_state, check_problem, check_variables
from hypergrad.responses._learned_scale import HyperparamsWithScale
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree

__all__ = [
    "Encoding",
    "Response",
    "ResponseParams",
    "as_encoding",
    "broadcast_per_example",
    "check_response_params",
    "check_size",
    "deployable_params",
    "flat",
    "init",
    "optimizer_labels",
    "refuse_plain_problem",
]


class Response(NamedTuple):
    """A parametric best response, as pure functions.

    Attributes:
      init: ``init(key, params, hyperparams) -> response_params``: starts from given weights and copies them.
      apply: ``apply(response_params, hyperparams, center=None) -> params``: the weights at ``hyperparams``. A centred
        response adds nothing at ``center``, by default ``stop_gradient(hyperparams)``.
    """

    init: Callable[[Key, Params, Hyperparams], PyTree]
    apply: Callable[..., Params]


class Encoding(NamedTuple):
    """A map from the flat hyperparameters to the input of a response.

    Attributes:
      encode: ``encode(vector) -> vector``: shape (n,) to (m,).
      check: ``check(vector)`` raises if concrete flat hyperparameters are outside the domain of the encoding.
    """

    encode: Callable[[Array], Array]
    check: Callable[[Array], None]


@runtime_checkable
class ResponseParams(Protocol):
    """The parameters of a response that can compute the weights without further arguments."""

    def deployable_params(self, hyperparams: Hyperparams, /) -> Params:
        """Return the plain weights at ``hyperparams``, the centre."""
        ...


def init(
    problem: BilevelProblem,
    key: Key,
    params: Params,
    hyperparams: Hyperparams,
    batch: Batch = None,
    *,
    model_state: ModelState = None,
) -> PyTree:
    """Return the initial response parameters of a problem over a response: its inner variable.

    At the centre they give the weights ``params``, for centred responses exactly.

    Args:
      problem: made by ``with_response`` or ``self_tuning``, perturbed or not.
      key: an int or a ``jax.random.key``.
      params: the weights to start from, e.g. a model's own initialisation.
      hyperparams: the initial unconstrained hyperparameters; a ``HyperparamsWithScale`` if the scale is learned.
      batch: a training batch. ``self_tuning`` traces the inner loss with it to find the layers (nothing is computed);
        other responses need none.
      model_state: for a stateful problem.

    Returns:
      Response parameters. They share no buffer with ``params``.

    Raises:
      TypeError: ``problem`` is not a ``BilevelProblem``; trees that are not floating-point.
      ValueError: a problem without a response; a missing batch or model state; no layer to tune.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> loss = lambda w, h, batch, key: ((w - h) ** 2).sum()
    >>> problem = hg.responses.with_response(hg.BilevelProblem(loss, loss), hg.responses.linear())
    >>> start = hg.responses.init(problem, 0, jnp.ones(3), jnp.zeros(2))
    >>> start.params.tolist(), start.basis.shape
    ([1.0, 1.0, 1.0], (2, 3))

    Reference: the response's.
    """
    check_problem(problem)
    if problem.response is None:
        refuse_plain_problem()
    validate.floating_leaves("params", params)
    validate.floating_leaves("hyperparams", hyperparams)
    state = check_model_state(problem, model_state)
    first = problem.response.init(validate.as_key(key), params, hyperparams, data.gathered(batch), state)
    return tree.unalias(tree.strip_weak_types(first), params, hyperparams)


def deployable_params(variables: Any) -> Params:
    """Return plain weights of the original model at the current hyperparameters, for serving.

    w(λ) with λ as the centre: for centred responses the field ``params``, for others θ plus the response's offset.

    Args:
      variables: ``BilevelParams(response_params, hyperparams)``.

    Returns:
      A tree like the original ``params``.

    Raises:
      TypeError: ``variables`` is not a ``BilevelParams``, or its params are not those of a response of this library.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> first = hg.responses.linear().init(0, jnp.ones(2), jnp.zeros(1))
    >>> hg.responses.deployable_params(hg.BilevelParams(first, jnp.zeros(1))).tolist()
    [1.0, 1.0]

    Reference: MacKay et al., arXiv 1903.03088; Bae & Grosse, arXiv 2010.13514.
    """
    params, hyperparams = check_variables(variables)
    if not isinstance(params, ResponseParams):
        fix = "For a response of your own call its apply(response_params, hyperparams)."
        raise TypeError(validate.message("params made by hg.responses", validate.describe(params), fix))
    hyperparams = hyperparams.hyperparams if isinstance(hyperparams, HyperparamsWithScale) else hyperparams
    return params.deployable_params(hyperparams)


def optimizer_labels(response_params: PyTree) -> PyTree:
    """Return ``"weights"`` for leaves of the field ``params``, ``"response"`` for others: for ``optax.partition``.

    A response needs its own optimizer: its learning rate differs from that of the weights by orders of magnitude, and
    its gradient should be clipped.

    Args:
      response_params: of any response of this library.

    Returns:
      A tree like ``response_params`` with strings as leaves.

    Raises:
      TypeError: the tree does not hold the parameters of a response.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> own = {"weights": optax.adam(1e-3), "response": optax.adam(1e-2)}
    >>> optimizer = optax.partition(own, hg.responses.optimizer_labels)
    >>> state = optimizer.init(hg.responses.linear().init(0, jnp.ones(2), jnp.zeros(1)))

    Reference: Bae & Grosse, arXiv 2010.13514.
    """
    if not isinstance(response_params, ResponseParams):
        fix = "Pass hg.responses.optimizer_labels itself to optax.partition, over response parameters."
        raise TypeError(validate.message("params made by hg.responses", validate.describe(response_params), fix))
    label = lambda path, _: "weights" if jax.tree_util.keystr(path[:1]) == ".params" else "response"  # noqa: E731
    return jax.tree.map_with_path(label, response_params)


def flat(hyperparams: Hyperparams) -> Array:
    """Return all hyperparameters as one vector (n,) in the widest of their dtypes, at least float32."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(hyperparams)]
    dtype = tree.wider(*(leaf.dtype for leaf in leaves))
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])


def as_encoding(encoding: Encoding | None) -> Encoding:
    """Return ``encoding``, checked; None is the identity."""
    if encoding is None:
        return Encoding(encode=lambda vector: vector, check=lambda _: None)
    if not isinstance(encoding, Encoding):
        fix = "Pass e.g. hg.responses.magnitude_invariant(low, high), or None."
        raise TypeError(validate.message("encoding to be an Encoding", validate.describe(encoding), fix))
    return encoding


def broadcast_per_example(per_example: PyTree, hyperparams: Hyperparams) -> PyTree:
    """Return a bool for each hyperparameter leaf: whether it takes one value per example."""
    try:
        return jax.tree.broadcast(per_example, hyperparams)
    except ValueError as error:
        got = f"{jax.tree.structure(per_example)} for {jax.tree.structure(hyperparams)}"
        fix = "Pass True, False, or the hyperparameters' structure with bools in place of subtrees."
        raise ValueError(validate.message("per_example to be a tree prefix of hyperparams", got, fix)) from error


def check_size(name: str, hyperparams_size: int, response_size: int) -> None:
    """Refuse hyperparameters of another number than the response was made for."""
    if hyperparams_size != response_size:
        fix = "Make new response parameters with hg.responses.init for these hyperparameters."
        wanted = f"hyperparams with {response_size} entries, for which the {name} response was made"
        raise ValueError(validate.message(wanted, str(hyperparams_size), fix))


def check_response_params(name: str, response_params: Any, kind: type) -> Any:
    """Return the response parameters if they are of the named response."""
    if not isinstance(response_params, kind):
        wanted, got = f"{name} response parameters ({kind.__name__})", type(response_params).__name__
        fix = "Start from hg.responses.init(problem, key, params, hyperparams, batch)."
        raise TypeError(validate.message(wanted, got, fix))
    return response_params


def refuse_plain_problem(*_: Any) -> NoReturn:
    """Refuse a problem over plain weights where response parameters are asked for."""
    fix = "Apply hg.responses.with_response or hg.responses.self_tuning first."
    raise ValueError(validate.message("a problem over a response", "one over plain weights", fix))
