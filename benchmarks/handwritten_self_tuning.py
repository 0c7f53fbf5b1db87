"""The training steps of ``self_tuning_cost.py`` written by hand in plain JAX: what the library's are measured beside.

    y = W₀ x + b₀ + (V h̃) ⊙ (W₁ x) + (C h̃) ⊙ b₁        a row h̃ an example

for a multi-layer perceptron with dropout before every layer, noise on the input and smoothed labels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any
NUM_CLASSES = 10


def init(key: jax.Array, sizes: Sequence[int], number: int, gate_std: float) -> tuple[Tree, Tree]:
    """Return weights and response of an MLP for so many hyperparameters."""
    weights, response = [], []
    for fan_in, fan_out, k in zip(sizes[:-1], sizes[1:], jax.random.split(key, len(sizes) - 1), strict=True):
        keys = jax.random.split(k, 4)
        draw = jax.nn.initializers.lecun_normal()
        weights.append({"w": draw(keys[0], (fan_in, fan_out)), "b": jnp.zeros(fan_out)})
        gates = {
            name: gate_std * jax.random.normal(k, (number, fan_out)) for name, k in zip("vc", keys[2:], strict=True)
        }
        response.append({"w": draw(keys[1], (fan_in, fan_out)), "b": jnp.zeros(fan_out), **gates})
    return weights, response


def plain_loss(high: jax.Array) -> Callable[..., jax.Array]:
    """Return ``loss(weights, hyperparams, batch, key)`` at the values of the unconstrained ``hyperparams``."""

    def loss(weights: Tree, hyperparams: jax.Array, batch: Any, key: jax.Array) -> jax.Array:
        values = jnp.broadcast_to(high * jax.nn.sigmoid(hyperparams), (len(batch.y), len(high)))
        return _cross_entropy(_network(weights, None, None, batch.x, values, key), batch.y, values)

    return loss


def stn_loss(high: jax.Array, scale: float) -> Callable[..., jax.Array]:
    """Return ``loss((weights, response), hyperparams, batch, key)`` of an STN."""

    def loss(params: Tree, hyperparams: jax.Array, batch: Any, key: jax.Array) -> jax.Array:
        noise_key, mask_key = jax.random.split(key)
        moved = hyperparams + scale * jax.random.normal(noise_key, (len(batch.y), len(high)))
        values = high * jax.nn.sigmoid(moved)
        return _cross_entropy(_network(params[0], params[1], moved, batch.x, values, mask_key), batch.y, values)

    return loss


def delta_stn_loss(high: jax.Array, scale: float) -> Callable[..., jax.Array]:
    """Return ``loss((weights, response), hyperparams, batch, key)`` of a linearised Delta-STN."""

    def loss(params: Tree, hyperparams: jax.Array, batch: Any, key: jax.Array) -> jax.Array:
        weights, response = params
        noise_key, mask_key = jax.random.split(key)
        noise = scale * jax.random.normal(noise_key, (len(batch.y), len(high)))
        held, values = jax.lax.stop_gradient(weights), high * jax.nn.sigmoid(hyperparams + noise)

        def outputs(moved: jax.Array) -> jax.Array:
            return _network(held, response, moved, batch.x, values, mask_key)

        at, slope = jax.jvp(outputs, (jnp.zeros_like(noise),), (noise,))
        of_weights = plain_loss(high)(weights, hyperparams, batch, mask_key)
        return of_weights + _cross_entropy(jax.lax.stop_gradient(at) + slope, batch.y, values)

    return loss


def step(loss: Callable[..., jax.Array], optimizer: Any) -> Callable[..., Any]:
    """Return ``step(params, state, hyperparams, batch, key) -> (params, state)``."""

    def one(params: Tree, state: Any, hyperparams: jax.Array, batch: Any, key: jax.Array) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(params, hyperparams, batch, key), state, params)
        return optax.apply_updates(params, updates), state

    return one


def _network(weights: Tree, response: Tree, moved: Any, x: jax.Array, values: jax.Array, key: jax.Array) -> jax.Array:
    """Run the network at per-example ``values``: a dropout rate a layer, then the noise's scale, then smoothing."""
    noise_key, *keys = jax.random.split(key, 1 + len(weights))
    x = x + values[:, len(weights), None] * jax.random.normal(noise_key, x.shape)
    for place, (layer, k) in enumerate(zip(weights, keys, strict=True)):
        keep = 1 - values[:, place, None]
        x = x * jnp.where(jax.random.uniform(k, x.shape) < keep, 1 / keep, 0)
        y = x @ layer["w"] + layer["b"]
        if response is not None:
            own = response[place]
            y = y + (moved @ own["v"]) * (x @ own["w"]) + (moved @ own["c"]) * own["b"]
        x = jax.nn.relu(y) if place < len(weights) - 1 else y
    return x


def _cross_entropy(logits: jax.Array, labels: jax.Array, values: jax.Array) -> jax.Array:
    rate = values[:, -1:]
    targets = (1 - rate) * jax.nn.one_hot(labels, NUM_CLASSES) + rate / NUM_CLASSES
    return optax.softmax_cross_entropy(logits, targets).mean()
