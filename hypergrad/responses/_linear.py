"""Linear responses over any pytree of weights: a dense, low-rank or row-gated Jacobian, zero displacement at λ.

    w(λ) = θ + J (E(λ) − E(c)),      J dense, or J = U A with r columns
    w(λ) = θ + (V (E(λ) − E(c))) ⊙ W₁        one gate an output unit (the last axis of each array)

The centre c is the current λ, so θ always are the weights to deploy. Dense costs n times the weights; low rank r times;
gates about once. For a quadratic inner loss and σ → 0 the dense response learns dw*/dλ exactly.

Reference: Lorraine & Duvenaud, arXiv 1802.09419; Bae & Grosse, Delta-STN, arXiv 2010.13514.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hypergrad import validate
from hypergrad.responses._base import Encoding, Response, as_encoding, checked, flat, same_size
from hypergrad.types import Array, Hyperparams, Key, Params, PyTree


class LinearParams(NamedTuple):
    """What a linear response learns.

    Attributes:
      params: weights θ at the centre.
      basis: tree like ``params``; each leaf (r, *shape): columns of the Jacobian, zero at first.
      mixing: (m, r), from the encoded hyperparameters to the columns; () for a dense Jacobian, where r = m.
    """

    params: Params
    basis: PyTree
    mixing: Any

    def weights_at(self, _hyperparams: Hyperparams, /) -> Params:
        """Return θ: the response is zero at the centre."""
        return self.params


class GatedParams(NamedTuple):
    """What a row-gated response learns.

    Attributes:
      params: weights θ at the centre.
      direction: tree like ``params``: W₁.
      gate: tree like ``params``; each leaf (m, features), features the last axis: V, zero at first.
    """

    params: Params
    direction: PyTree
    gate: PyTree

    def weights_at(self, _hyperparams: Hyperparams, /) -> Params:
        """Return θ: the response is zero at the centre."""
        return self.params


def linear(rank: int | None = None, *, encoding: Encoding | None = None) -> Response:
    """Return a centred linear response, dense or of low rank.

    w(λ) = θ + J (E(λ) − E(c)); J = 0 at first. With ``rank`` r, J = U A: U zero and A Gaussian at first.

    Args:
      rank: r ≥ 1, or None for a dense Jacobian (n · number of weights: for few hyperparameters).
      encoding: E, e.g. ``magnitude_invariant(low, high)``; None for λ itself.

    Returns:
      A ``Response`` over ``LinearParams``.

    Raises:
      TypeError: ``rank`` is not an int, ``encoding`` not an ``Encoding``.
      ValueError: ``rank`` < 1.

    Right near the centre; a rank below that of dw*/dλ finds its best subspace by training.

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
        size = _encoded_size(encoding, hyperparams)
        columns = rank or size
        basis = jax.tree.map(lambda w: jnp.zeros((columns, *jnp.shape(w)), jnp.asarray(w).dtype), params)
        mixing: Any = ()
        if rank is not None:
            mixing = jax.random.normal(validate.required_key(key), (size, rank)) / math.sqrt(size)
        return LinearParams(jax.tree.map(jnp.copy, params), basis, mixing)

    def apply(response_params: LinearParams, hyperparams: Hyperparams, center: Hyperparams | None = None) -> Params:
        params, basis, mixing = checked("linear", response_params, LinearParams)
        weight = _displacement(encoding, hyperparams, center)
        rows = jnp.shape(jax.tree.leaves(basis)[0] if isinstance(mixing, tuple) else mixing)[0]
        same_size("linear", weight.size, rows)
        weight = weight if isinstance(mixing, tuple) else weight @ mixing
        return jax.tree.map(lambda w, u: w + jnp.tensordot(weight.astype(u.dtype), u, 1), params, basis)

    return Response(init, apply)


def gated(*, encoding: Encoding | None = None) -> Response:
    """Return a centred response with one gate an output unit, as in self-tuning networks, in the space of weights.

    w(λ) = θ + (V (E(λ) − E(c))) ⊙ W₁ on the last axis of each array. V = 0 at first; W₁ is drawn with variance one over
    the fan-in, and is all ones for vectors and scalars.

    Args:
      encoding: E, e.g. ``magnitude_invariant(low, high)``; None for λ itself.

    Returns:
      A ``Response`` over ``GatedParams``.

    Raises:
      TypeError: ``encoding`` is not an ``Encoding``.

    Right near the centre, where dw*/dλ is close to a direction an output unit. It acts on weights, so decays and
    weight drop may be tuned; one perturbation a batch.

    >>> import jax.numpy as jnp
    >>> start = gated().init(0, {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, jnp.zeros(5))
    >>> start.gate["kernel"].shape, start.direction["kernel"].shape
    ((5, 3), (4, 3))

    Reference: MacKay et al., arXiv 1903.03088; Bae & Grosse, arXiv 2010.13514.
    """
    encoding = as_encoding(encoding)

    def init(key: Key, params: Params, hyperparams: Hyperparams) -> GatedParams:
        size = _encoded_size(encoding, hyperparams)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(validate.required_key(key), len(leaves))
        direction = [_direction(k, jnp.asarray(w)) for k, w in zip(keys, leaves, strict=True)]
        gate = jax.tree.map(lambda w: jnp.zeros((size, *jnp.shape(w)[-1:]), jnp.asarray(w).dtype), params)
        return GatedParams(jax.tree.map(jnp.copy, params), jax.tree.unflatten(structure, direction), gate)

    def apply(response_params: GatedParams, hyperparams: Hyperparams, center: Hyperparams | None = None) -> Params:
        params, direction, gate = checked("gated", response_params, GatedParams)
        weight = _displacement(encoding, hyperparams, center)
        same_size("gated", weight.size, jnp.shape(jax.tree.leaves(gate)[0])[0])
        return jax.tree.map(lambda w, d, v: w + (weight.astype(v.dtype) @ v) * d, params, direction, gate)

    return Response(init, apply)


def _encoded_size(encoding: Encoding, hyperparams: Hyperparams) -> int:
    vector = flat(hyperparams)
    encoding.check(vector)
    return int(jax.eval_shape(encoding.encode, vector).size)


def _displacement(encoding: Encoding, hyperparams: Hyperparams, center: Hyperparams | None) -> Array:
    center = lax.stop_gradient(hyperparams) if center is None else center
    return encoding.encode(flat(hyperparams)) - encoding.encode(flat(center))


def _direction(key: Array, weight: Array) -> Array:
    if weight.ndim < 2:
        return jnp.ones_like(weight)
    fan_in = weight.size // weight.shape[-1]
    return jax.random.normal(key, weight.shape, weight.dtype) / math.sqrt(max(fan_in, 1))
