"""Models whose layers can be self-tuned, in 64 bit, their per-example weights by definition, and the training loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hypergrad import responses
from hypergrad.responses.layers import displaced_weights

F64 = {"param_dtype": jnp.float64}


class Mlp(nn.Module):
    """Dense, then DenseGeneral with two output axes."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 3), **F64)(nn.tanh(nn.Dense(7, **F64)(x)))


class Cnn(nn.Module):
    """Strides, groups, no bias."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, **F64)(x))
        x = nn.Conv(4, (3, 3), feature_group_count=2, use_bias=False, **F64)(x)
        return nn.Dense(3, **F64)(x.reshape(x.shape[0], -1))


class Block(nn.Module):
    """A transformer block."""

    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, **F64)(nn.LayerNorm(**F64)(x))
        return x + nn.Dense(8, **F64)(nn.gelu(nn.Dense(16, **F64)(y)))


class Transformer(nn.Module):
    """Tied embeddings, one block as it is and one rematerialized."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8, **F64)
        return embed.attend(nn.remat(Block)()(Block()(embed(ids))))


class Recurrent(nn.Module):
    """A recurrent network over a scan."""

    cell: type

    @nn.compact
    def __call__(self, ids):
        return nn.Dense(11, **F64)(nn.RNN(self.cell(6, **F64))(nn.Embed(11, 8, **F64)(ids)))


class Normalized(nn.Module):
    """BatchNorm between two layers."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, **F64)(nn.Dense(5, **F64)(x))
        return nn.Dense(3, **F64)(nn.relu(x))


class NnxModel(nnx.Module):
    """Convolution, attention, a list of layers, a tied embedding, dropout, in NNX."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs, **F64)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs, **F64), nnx.Linear(4, 6, use_bias=False, rngs=rngs, **F64)])
        self.attention = nnx.MultiHeadAttention(2, 6, 4, decode=False, rngs=rngs, **F64)
        self.embed = nnx.Embed(7, 6, rngs=rngs, **F64)

    def __call__(self, x):
        x = nnx.relu(self.conv(x)).reshape(x.shape[0], -1, 4)
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return self.embed.attend(x + self.attention(x)).mean(1)


CELLS = (nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell, nn.MGUCell)
MODELS = {
    "mlp": (Mlp(), "vectors"),
    "cnn": (Cnn(), "images"),
    "transformer": (Transformer(), "tokens"),
    **{cell.__name__: (Recurrent(cell), "tokens") for cell in CELLS},
}


def inputs(kind, size=5):
    """Return a batch of vectors, images or tokens."""
    key = jax.random.key(3)
    if kind == "tokens":
        return jax.random.randint(key, (size, 4), 0, 11)
    return jax.random.normal(key, (size, 4) if kind == "vectors" else (size, 6, 6, 2))


def outputs_by_definition(apply, params, layers, displacement, x):
    """Return outputs with every example run through weights of its own: W₀ + (V h̃) ⊙ W₁."""
    one = lambda d, example: apply(displaced_weights(params, layers, d), example[None])[0]  # noqa: E731
    return jax.vmap(one)(displacement, x)


def train_response(problem, start, h, batch, rates, *, steps):
    """Return response parameters after training them at fixed hyperparameters, by Adam with rates that fall to zero."""
    optimizer = optax.partition(
        {part: optax.adam(optax.cosine_decay_schedule(rate, steps)) for part, rate in rates.items()},
        responses.optimizer_labels,
    )

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            grads = jax.grad(problem.inner_loss)(params, h, batch, key)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    return train(start)
