"""The protocol of a response: weights as a learned function of the hyperparameters.

    w(λ) = apply(φ, λ; c),    φ ← SGD on E_ε L_in(w(λ + σε), λ + σε),    dL_out/dλ by autodiff through w(λ)

A response is two pure functions; what it learns, φ, takes the place of the weights as the inner variable. φ is plain
data with a field ``params`` (the weights at the centre c, or those that an offset is added to) and others that hold
what the response learns beside.

Reference: MacKay et al., Self-tuning networks, arXiv 1903.03088; Lorraine & Duvenaud, arXiv 1802.09419.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from hypergrad import data, tree, validate
from hypergrad.problem import BilevelProblem, check_model_state, check_problem, check_variables
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree


class Response(NamedTuple):
    """A parametric best response, as pure functions.

    Attributes:
      init: ``init(key, params, hyperparams) -> response_params``: starts from given weights, aliases nothing.
      apply: ``apply(response_params, hyperparams, center=None) -> params``: the weights that the response gives for
        ``hyperparams``. A centred response is zero at ``center``, by default ``stop_gradient(hyperparams)``.
    """

    init: Callable[[Key, Params, Hyperparams], PyTree]
    apply: Callable[..., Params]


class Encoding(NamedTuple):
    """A map of the flat hyperparameters to the input of a response.

    Attributes:
      encode: ``encode(vector) -> vector``: shape (n,) to (m,).
      check: raises where concrete hyperparameters, flat, are outside what the encoding is for.
    """

    encode: Callable[[Array], Array]
    check: Callable[[Array], None]


class Perturbed(NamedTuple):
    """Hyperparameters with learned perturbation scales: what a problem with ``learned_scale`` takes as λ.

    Attributes:
      hyperparams: unconstrained hyperparameters.
      log_scale: tree prefix of ``hyperparams``: log σ, one number a subtree, a leaf or an entry.
    """

    hyperparams: Hyperparams
    log_scale: PyTree


@runtime_checkable
class ResponseParams(Protocol):
    """What a response learns, of a kind that knows its weights without further arguments."""

    def weights_at(self, hyperparams: Hyperparams, /) -> Params:
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
    """Return the first response parameters of a problem over a response: its inner variable.

    At the centre they give the weights ``params``, for centred responses exactly.

    Args:
      problem: made by ``with_response`` or ``self_tuning``, perturbed or not.
      key: an int or a ``jax.random.key``.
      params: the weights to start from, e.g. a model's own initialisation.
      hyperparams: the first unconstrained hyperparameters, a ``Perturbed`` where the scale is learned.
      batch: a training batch; ``self_tuning`` looks with it for the layers that the inner loss runs (nothing is
        computed). Others need none.
      model_state: of a stateful problem.

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
        fix = "Apply hg.responses.with_response or hg.responses.self_tuning first."
        raise ValueError(validate.message("a problem over a response", "one over plain weights", fix))
    validate.floating_leaves("params", params)
    validate.floating_leaves("hyperparams", hyperparams)
    state = check_model_state(problem, model_state)
    first = problem.response.init(validate.as_key(key), params, hyperparams, data.gathered(batch), state)
    return tree.unalias(tree.strip_weak_types(first), params, hyperparams)


def weights_at(variables: Any) -> Params:
    """Return plain weights of the original model at the current hyperparameters, for serving.

    w(λ) at λ = the centre: for centred responses the field ``params``, for others θ with the response applied.

    Args:
      variables: ``BilevelParams(response_params, hyperparams)``.

    Returns:
      A tree like the original ``params``.

    Raises:
      TypeError: ``variables`` is not a ``BilevelParams``, or its params are no response parameters of this library.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> first = hg.responses.linear().init(0, jnp.ones(2), jnp.zeros(1))
    >>> hg.responses.weights_at(hg.BilevelParams(first, jnp.zeros(1))).tolist()
    [1.0, 1.0]

    Reference: MacKay et al., arXiv 1903.03088; Bae & Grosse, arXiv 2010.13514.
    """
    params, hyperparams = check_variables(variables)
    if not isinstance(params, ResponseParams):
        fix = "For a response of your own call its apply(response_params, hyperparams)."
        raise TypeError(validate.message("params made by hg.responses", validate.describe(params), fix))
    hyperparams = hyperparams.hyperparams if isinstance(hyperparams, Perturbed) else hyperparams
    return params.weights_at(hyperparams)


def labels(response_params: PyTree) -> PyTree:
    """Return ``"weights"`` for the field ``params`` and ``"response"`` for the others: for ``optax.partition``.

    A response wants an optimizer of its own: its rate is far from the weights', and it should be clipped.

    Args:
      response_params: of any response of this library.

    Returns:
      A tree prefix of ``response_params`` with strings as leaves.

    Raises:
      TypeError: the tree is no response's.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> tx = optax.partition({"weights": optax.adam(1e-3), "response": optax.adam(1e-2)}, hg.responses.labels)
    >>> state = tx.init(hg.responses.linear().init(0, jnp.ones(2), jnp.zeros(1)))

    Reference: Bae & Grosse, arXiv 2010.13514.
    """
    if not isinstance(response_params, ResponseParams):
        fix = "Pass hg.responses.labels itself to optax.partition, over response parameters."
        raise TypeError(validate.message("params made by hg.responses", validate.describe(response_params), fix))
    marks = {name: "weights" if name == "params" else "response" for name in _fields(response_params)}
    if isinstance(response_params, tuple):
        return type(response_params)(**marks)
    return dataclasses.replace(response_params, **marks)  # type: ignore[type-var]


def flat(hyperparams: Hyperparams) -> Array:
    """Return all hyperparameters as one vector (n,), in at least float32, leaf after leaf."""
    leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(tree.promote(hyperparams))]
    return jnp.concatenate(leaves)


def as_encoding(encoding: Encoding | None) -> Encoding:
    """Return ``encoding``, checked; None is the identity."""
    if encoding is None:
        return _IDENTITY
    if not isinstance(encoding, Encoding):
        fix = "Pass e.g. hg.responses.magnitude_invariant(low, high), or None."
        raise TypeError(validate.message("encoding to be an Encoding", validate.describe(encoding), fix))
    return encoding


_IDENTITY = Encoding(encode=lambda vector: vector, check=lambda _: None)


def marks_of(per_example: PyTree, hyperparams: Hyperparams) -> PyTree:
    """Return a bool for every hyperparameter leaf: does it take one value an example."""
    try:
        return jax.tree.map(lambda mark, sub: jax.tree.map(lambda _: mark, sub), per_example, hyperparams)
    except (ValueError, TypeError) as error:
        got = f"{jax.tree.structure(per_example)} for {jax.tree.structure(hyperparams)}"
        fix = "Pass True, False, or the hyperparameters' structure with bools in place of subtrees."
        raise ValueError(validate.message("per_example to be a tree prefix of hyperparams", got, fix)) from error


def same_size(name: str, got: int, want: int) -> None:
    """Refuse hyperparameters of another number than a response was made for."""
    if got != want:
        fix = "Make response parameters anew (hg.responses.init) for other hyperparameters."
        raise ValueError(validate.message(f"{want} hyperparameters, which the {name} response has", str(got), fix))


def checked(name: str, response_params: Any, kind: type) -> Any:
    """Refuse response parameters of another response."""
    if not isinstance(response_params, kind):
        fix = "Pass what this response's init returned, or hg.responses.init(problem, key, params, hyperparams)."
        raise TypeError(
            validate.message(f"{name} response parameters", validate.describe(type(response_params).__name__), fix)
        )
    return response_params


def _fields(params: Any) -> list[str]:
    if isinstance(params, tuple):
        return list(params._fields)  # type: ignore[attr-defined]
    return [f.name for f in dataclasses.fields(params) if f.metadata.get("pytree_node", True)]
