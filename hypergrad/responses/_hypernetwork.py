"""Hypernetworks: any Flax module from the hyperparameters to the weights.

    w(λ) = θ + h_φ(E(λ))                                 one output for all D weights: (m,) ↦ (D,)
    w(λ) = θ + [h_φ(E(λ), e₁), h_φ(E(λ), e₂), …]         chunks, each with a learned embedding e_c

The response is global if it is trained on λ from a distribution (``sampled``), local if it is trained around the
current λ (``perturbed``). With one output the last layer has (last hidden width) × D weights: use a bottleneck, or
chunks.

Reference: Lorraine & Duvenaud, Stochastic hyperparameter optimization through hypernetworks, arXiv 1802.09419; Ortiz et
al., Magnitude invariant parametrizations, arXiv 2304.07645 (θ separate from h, and the encoding).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from hypergrad import tree, validate
from hypergrad.responses._base import Encoding, Response, as_encoding, check_response_params, check_size, flat
from hypergrad.types import Array, Hyperparams, Key, Params, PyTree

__all__ = ["HypernetworkParams", "hypernetwork", "magnitude_invariant"]


@dataclasses.dataclass(frozen=True)
class _Network:
    """The static part of a hypernetwork: how its variables become weights."""

    module: nn.Module
    chunk_size: int | None
    encoding: Encoding
    num_hyperparams: int


@flax.struct.dataclass
class HypernetworkParams:
    """The parameters of a hypernetwork.

    Attributes:
      params: θ, to which the network's output is added.
      variables: φ, the module's own weights.
      embeddings: (chunks, embedding size), one row per chunk; () without chunks.
      network: the static part, not a leaf.
    """

    params: Params
    variables: PyTree
    embeddings: Any
    network: Any = flax.struct.field(pytree_node=False)

    def deployable_params(self, hyperparams: Hyperparams, /) -> Params:
        """Return θ + h_φ(E(λ))."""
        return _weights(self, hyperparams)


def hypernetwork(
    module: nn.Module | Callable[[int], nn.Module],
    *,
    chunk_size: int | None = None,
    embedding_size: int = 8,
    encoding: Encoding | None = None,
) -> Response:
    """Return the response w(λ) = θ + h_φ(E(λ)), h_φ any Flax module.

    The module takes the flat hyperparameters (n,), encoded to (m,), and returns all D weights, (D,). With chunks it
    takes them concatenated with a learned embedding, (m + embedding_size,), returns (chunk_size,), and runs once per
    chunk. Initially θ are the given weights; to keep w(λ) = θ there, initialise the last layer at zero
    (``kernel_init=nn.initializers.zeros``).

    Args:
      module: a Linen module without dropout or state, or ``size -> module`` for one with ``size`` outputs.
      chunk_size: outputs per call, for large D; None: D.
      embedding_size: size of a chunk's embedding.
      encoding: E, e.g. ``magnitude_invariant(low, high)``; None for λ itself.

    Returns:
      A ``Response`` over ``HypernetworkParams``. It is not centred: ``apply`` ignores ``center``.

    Raises:
      TypeError: ``module`` is not a Linen module, nor a function that returns one.
      ValueError: sizes < 1; from ``init``, a module whose output has another size.

    Valid when h_φ can represent w*(λ) where it is trained. ReLU units that are inactive at λ (all are, at λ = 0 with
    zero biases) make the hypergradient zero: use another nonlinearity, or none.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> response = hypernetwork(lambda size: nn.Sequential([nn.Dense(10), nn.tanh, nn.Dense(size)]))
    >>> start = response.init(0, {"w": jnp.ones((4, 3))}, jnp.zeros(5))
    >>> response.apply(start, jnp.zeros(5))["w"].shape
    (4, 3)

    Reference: Lorraine & Duvenaud, arXiv 1802.09419; Ortiz et al., arXiv 2304.07645.
    """
    if not callable(module) or isinstance(module, nnx.Module):
        fix = "Pass a Linen module, or e.g. lambda size: nn.Dense(size)."
        raise TypeError(validate.message("module to be a flax.linen.Module", validate.describe(module), fix))
    if chunk_size is not None:
        chunk_size = validate.positive_int("chunk_size", chunk_size)
    embedding_size = validate.positive_int("embedding_size", embedding_size)
    encoding = as_encoding(encoding)

    def init(key: Key, params: Params, hyperparams: Hyperparams) -> HypernetworkParams:
        validate.floating_leaves("params", params)
        size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
        network_key, embedding_key = jax.random.split(validate.required_key(key))
        made = module if isinstance(module, nn.Module) else module(chunk_size or size)
        if not isinstance(made, nn.Module):
            fix = "Return e.g. nn.Dense(size)."
            raise TypeError(validate.message("module(size) to be a flax.linen.Module", validate.describe(made), fix))
        vector = flat(hyperparams)
        encoding.check(vector)
        network = _Network(made, chunk_size, encoding, vector.size)
        inputs = encoding.encode(vector)
        embeddings: Any = ()
        if chunk_size is not None:
            embeddings = jax.random.normal(embedding_key, (math.ceil(size / chunk_size), embedding_size), inputs.dtype)
            inputs = jnp.concatenate([inputs, embeddings[0]])
        output, variables = made.init_with_output(network_key, inputs)
        if jnp.shape(output) != (chunk_size or size,):
            wanted = f"the module to return {chunk_size or size} weights, shape {(chunk_size or size,)}"
            fix = "Give its last layer that many outputs, or pass a function size -> module."
            raise ValueError(validate.message(wanted, f"shape {jnp.shape(output)}", fix))
        if set(variables) != {"params"}:
            fix = "Use a module without batch statistics or other state."
            raise ValueError(validate.message("a module with params alone", ", ".join(variables) or "none", fix))
        return HypernetworkParams(jax.tree.map(jnp.copy, params), variables["params"], embeddings, network)

    def apply(
        response_params: HypernetworkParams, hyperparams: Hyperparams, center: Hyperparams | None = None
    ) -> Params:
        del center  # a hypernetwork has no centre
        return _weights(check_response_params("hypernetwork", response_params, HypernetworkParams), hyperparams)

    return Response(init, apply)


def magnitude_invariant(low: Any, high: Any) -> Encoding:
    """Return the encoding E(γ) = [cos(πγ/2), sin(πγ/2)] of γ = (λ − low)/(high − low), of constant norm √n.

    A response with input λ has outputs proportional to |λ|, so its training steps are large where |λ| is; with input E
    they are not. Outside [low, high], where the response is not trained, the norm stays constant, and E is one-to-one
    for −1 < γ < 3.

    Args:
      low: one number, or an array (n,) with one number per entry of the flat hyperparameters.
      high: like ``low``, and above it.

    Returns:
      An ``Encoding`` for ``linear``, ``gated`` or ``hypernetwork``.

    Raises:
      ValueError: ``low`` is not below ``high``; from a response's ``init``, hyperparameters outside [low, high], or of
        another number than ``low`` and ``high``.

    >>> import jax.numpy as jnp
    >>> magnitude_invariant(-4.0, 4.0).encode(jnp.array([-4.0, 4.0])).round(3).tolist()
    [1.0, -0.0, 0.0, 1.0]

    Reference: Ortiz et al., arXiv 2304.07645.
    """
    low, high = jnp.asarray(low, float), jnp.asarray(high, float)
    if not bool(jnp.all(jnp.isfinite(low) & jnp.isfinite(high) & (low < high))):
        raise ValueError(validate.message("low < high, both finite", f"{low} and {high}", "Give the range of λ."))

    def check(vector: Array) -> None:
        for name, bound in (("low", low), ("high", high)):
            if bound.shape not in ((), vector.shape):
                fix = "Pass one number, or one per entry of the flat hyperparameters."
                raise ValueError(validate.message(f"{name} of shape () or {vector.shape}", f"shape {bound.shape}", fix))
        if tree.is_traced(vector):
            return
        if not bool(jnp.all((vector >= low.astype(vector.dtype)) & (vector <= high.astype(vector.dtype)))):
            got = f"{float(vector.min()):g} … {float(vector.max()):g}"
            fix = "Widen the range, or start inside it."
            raise ValueError(validate.message(f"hyperparameters inside [{low}, {high}]", got, fix))

    def encode(vector: Array) -> Array:
        gamma = (vector - low.astype(vector.dtype)) / (high - low).astype(vector.dtype)
        angle = 0.5 * jnp.pi * gamma
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)])

    return Encoding(encode, check)


def _weights(response_params: HypernetworkParams, hyperparams: Hyperparams) -> Params:
    network = response_params.network
    vector = flat(hyperparams)
    check_size("hypernetwork", vector.size, network.num_hyperparams)
    inputs = network.encoding.encode(vector)
    run = lambda x: network.module.apply({"params": response_params.variables}, x)  # noqa: E731
    if network.chunk_size is None:
        output = run(inputs)
    else:
        output = jax.vmap(lambda e: run(jnp.concatenate([inputs, e])))(response_params.embeddings).ravel()
    leaves, structure = jax.tree.flatten(response_params.params)
    moved, begin = [], 0
    for leaf in leaves:
        part = output[begin : begin + leaf.size].reshape(leaf.shape)
        moved.append(leaf + part.astype(leaf.dtype))
        begin += leaf.size
    return jax.tree.unflatten(structure, moved)
