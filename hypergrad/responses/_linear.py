"""Linear responses over any pytree of weights: a dense, low-rank or row-gated Jacobian, zero displacement at λ.

    w(λ) = θ + J (E(λ) − E(c)),      J dense, or J = U A with r columns
    w(λ) = θ + (V (E(λ) − E(c))) ⊙ W₁        one gate per output unit (the last axis of each array)

The centre c is the current λ, so θ are always the weights to deploy. The memory of a dense Jacobian is n times that of
the weights, of rank r about r times, of gates about once. For a quadratic inner loss and σ → 0 the dense response
learns dw*/dλ exactly.

Reference: Lorraine & Duvenaud, arXiv 1802.09419; Bae & Grosse, Delta-STN, arXiv 2010.13514.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hypergrad import validate
from hypergrad.responses._base import Encoding, Response, as_encoding, check_response_params, check_size, flat
from hypergrad.types import Array, Hyperparams, Key, Params, PyTree

__all__ = ["GatedParams", "LinearParams", "gated", "linear"]


class LinearParams(NamedTuple):
    """The parameters of a linear response.

    Attributes:
      params: weights θ at the centre.
      basis: tree like ``params``; each leaf ``(r, *shape)``: columns of the Jacobian, initially zero.
      mixing: (m, r), from the encoded hyperparameters to the columns; () for a dense Jacobian, where r = m.
    """

    params: Params
    basis: PyTree
    mixing: Any

    def deployable_params(self, _hyperparams: Hyperparams, /) -> Params:
        """Return θ: the response is zero at the centre."""
        return self.params


class GatedParams(NamedTuple):
    """The parameters of a row-gated response.

    Attributes:
      params: weights θ at the centre.
      direction: tree like ``params``: W₁.
      gate: tree like ``params``; each leaf (m, features), features the last axis: V, initially zero.
    """

    params: Params
    direction: PyTree
    gate: PyTree

    def deployable_params(self, _hyperparams: Hyperparams, /) -> Params:
        """Return θ: the response is zero at the centre."""
        return self.params


def linear(rank: int | None = None, *, encoding: Encoding | None = None) -> Response:
    """Return a centred linear response, dense or of low rank.

    w(λ) = θ + J (E(λ) − E(c)), initially J = 0. With ``rank`` r, J = U A, initially U = 0 and A Gaussian.

    Args:
      rank: r ≥ 1, or None for a dense Jacobian (n times as many numbers as weights: for few hyperparameters).
      encoding: E, e.g. ``magnitude_invariant(low, high)``; None for λ itself.

    Returns:
      A ``Response`` over ``LinearParams``.

    Raises:
      TypeError: ``rank`` is not an int, ``encoding`` not an ``Encoding``.
      ValueError: ``rank`` < 1.

    Valid near the centre; with a rank below that of dw*/dλ, training finds the best subspace.

    >>> import jax.numpy as jnp
    >>> response = linear(rank=2)
    >>> start = response.init(0, {"w": jnp.ones((4, 3))}, jnp.zeros(5))
    >>> start.basis["w"].shape, start.mixing.shape
    ((2, 4, 3), (5, 2))

    Reference: Lorraine & Duvenaud, arXiv 1802.09419.
    """
    if rank is not None:
        rank = validate.positive_int("rank", rank)
    encoding = as_encoding(encoding)

    def init(key: Key, params: Params, hyperparams: Hyperparams) -> LinearParams:
        encoded = _encoded(encoding, hyperparams)
        columns = rank or encoded.size
        basis = jax.tree.map(lambda w: jnp.zeros((columns, *jnp.shape(w)), jnp.asarray(w).dtype), params)
        mixing: Any = ()
        if rank is not None:
            key = validate.required_key(key)
            mixing = jax.random.normal(key, (encoded.size, rank), encoded.dtype) / math.sqrt(encoded.size)
        return LinearParams(jax.tree.map(jnp.copy, params), basis, mixing)

    def apply(response_params: LinearParams, hyperparams: Hyperparams, center: Hyperparams | None = None) -> Params:
        params, basis, mixing = check_response_params("linear", response_params, LinearParams)
        columns = _displacement(encoding, hyperparams, center)
        dense = isinstance(mixing, tuple)
        check_size("linear", columns.size, jnp.shape(jax.tree.leaves(basis)[0] if dense else mixing)[0])
        columns = columns if dense else columns @ mixing.astype(columns.dtype)
        return jax.tree.map(lambda w, u: w + jnp.tensordot(columns.astype(u.dtype), u, 1), params, basis)

    return Response(init, apply)


def gated(*, encoding: Encoding | None = None) -> Response:
    """Return a centred response with one gate per output unit, as in self-tuning networks, in the space of weights.

    w(λ) = θ + (V (E(λ) − E(c))) ⊙ W₁ on the last axis of each array. Initially V = 0, and W₁ is Gaussian with variance
    1 / fan-in, or all ones for vectors and scalars.

    Args:
      encoding: E, e.g. ``magnitude_invariant(low, high)``; None for λ itself.

    Returns:
      A ``Response`` over ``GatedParams``.

    Raises:
      TypeError: ``encoding`` is not an ``Encoding``.

    Valid near the centre, when dw*/dλ is close to one direction per output unit. The response acts on weights, so it
    can tune decays and weight drop, with one perturbation per batch.

    >>> import jax.numpy as jnp
    >>> start = gated().init(0, {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, jnp.zeros(5))
    >>> start.gate["kernel"].shape, start.direction["kernel"].shape
    ((5, 3), (4, 3))

    Reference: MacKay et al., arXiv 1903.03088; Bae & Grosse, arXiv 2010.13514.
    """
    encoding = as_encoding(encoding)

    def init(key: Key, params: Params, hyperparams: Hyperparams) -> GatedParams:
        size = _encoded(encoding, hyperparams).size
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(validate.required_key(key), len(leaves))
        direction = [_direction(k, jnp.asarray(w)) for k, w in zip(keys, leaves, strict=True)]
        gate = jax.tree.map(lambda w: jnp.zeros((size, *jnp.shape(w)[-1:]), jnp.asarray(w).dtype), params)
        return GatedParams(jax.tree.map(jnp.copy, params), jax.tree.unflatten(structure, direction), gate)

    def apply(response_params: GatedParams, hyperparams: Hyperparams, center: Hyperparams | None = None) -> Params:
        params, direction, gate = check_response_params("gated", response_params, GatedParams)
        moved = _displacement(encoding, hyperparams, center)
        check_size("gated", moved.size, jnp.shape(jax.tree.leaves(gate)[0])[0])

        def displaced(weight: Array, direction: Array, gate: Array) -> Array:
            gates = jnp.tensordot(moved.astype(gate.dtype), gate, 1)
            return weight + jnp.broadcast_to(gates, direction.shape) * direction

        return jax.tree.map(displaced, params, direction, gate)

    return Response(init, apply)


def _encoded(encoding: Encoding, hyperparams: Hyperparams) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of the encoded hyperparameters, which are checked."""
    vector = flat(hyperparams)
    encoding.check(vector)
    return jax.eval_shape(encoding.encode, vector)


def _displacement(encoding: Encoding, hyperparams: Hyperparams, center: Hyperparams | None) -> Array:
    center = lax.stop_gradient(hyperparams) if center is None else center
    return encoding.encode(flat(hyperparams)) - encoding.encode(flat(center))


def _direction(key: Array, weight: Array) -> Array:
    if weight.ndim < 2:
        return jnp.ones_like(weight)
    fan_in = weight.size // weight.shape[-1]
    return jax.random.normal(key, weight.shape, weight.dtype) / math.sqrt(max(fan_in, 1))
