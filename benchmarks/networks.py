"""The inner problems that the benchmarks measure: cross-entropy of a small network plus one decay a weight.

    L_in(w, λ) = cross-entropy(w, training batch) + ½ Σ exp(λᵢ) wᵢ²
    L_out(w)   = cross-entropy(w, validation batch)

Data are random, of the real thing's shapes: a product with the Hessian costs the same whatever it is taken at. The
decays are strong enough that the Hessian is positive definite at the initial weights, so that conjugate gradients
take every step they are given.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


class Network(NamedTuple):
    """One problem of the benchmark.

    Attributes:
      name: as ``--only`` takes it.
      cross_entropy: ``(params, batch) -> scalar``, without the penalty.
      params: weights.
      log_decays: tree like ``params``.
      window: ten training batches, stacked along a leading axis.
      outer_batch: one validation batch.
      unroll: of the solvers' loops; True where the loop around a convolution would cost more than the products.
    """

    name: str
    cross_entropy: Callable[[Tree, Tree], jax.Array]
    params: Tree
    log_decays: Tree
    window: Tree
    outer_batch: Tree
    unroll: int | bool

    @property
    def inner_batch(self) -> Tree:
        """One training batch."""
        return jax.tree.map(lambda x: x[0], self.window)

    @property
    def num_weights(self) -> int:
        """Number of weights, and of hyperparameters."""
        return sum(int(x.size) for x in jax.tree.leaves(self.params))


class Scale(NamedTuple):
    """How large to make an MLP: the real thing, or enough to see that the script runs."""

    inputs: int = 784
    batch: int = 256


def build(name: str, scale: Scale | None = None) -> Network:
    """Return the network called ``name``: ``mlp64``, ``mlp256``, ``mlp1024``, ``cnn``, ``transformer`` or ``deep``."""
    scale = scale or Scale()
    if name.startswith("mlp"):
        return _mlp(int(name.removeprefix("mlp")), scale)
    return {"cnn": _cnn, "transformer": _transformer, "deep": _deep}[name]()


def _mlp(width: int, scale: Scale) -> Network:
    rng = np.random.default_rng(0)
    sizes = (scale.inputs, width, width, 10)
    params = {
        f"layer{i}": {
            "kernel": jnp.asarray(rng.normal(size=(a, b)) * np.sqrt(2 / a), jnp.float32),
            "bias": jnp.zeros(b, jnp.float32),
        }
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }

    def logits(params: Tree, x: jax.Array) -> jax.Array:
        for i in range(3):
            layer = params[f"layer{i}"]
            x = x @ layer["kernel"] + layer["bias"]
            x = jax.nn.relu(x) if i < 2 else x
        return x

    def draw(*lead: int) -> Tree:
        return _float(rng, *lead, scale.inputs), _labels(rng, 10, *lead)

    batches = draw(10, scale.batch), draw(scale.batch)
    return _network(f"mlp{width}", logits, params, batches, decay=3.0, unroll=1)


class _ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (16, 32):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def _cnn() -> Network:
    rng = np.random.default_rng(0)
    module = _ConvNet()
    shape = (64, 28, 28, 1)
    batches = (_float(rng, 10, *shape), _labels(rng, 10, 10, 64)), (_float(rng, *shape), _labels(rng, 10, 64))
    params = module.init(jax.random.key(0), batches[1][0])
    return _network("cnn", module.apply, params, batches, decay=6.0, unroll=True)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, mask=nn.make_causal_mask(x[..., 0]))
        y = nn.LayerNorm()(x)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(y)))


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return _Block()(x), None


class LanguageModel(nn.Module):
    """A causal transformer over tokens."""

    vocabulary: int
    width: int
    layers: int = 2
    scanned: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return logits (n, t, vocabulary)."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (tokens.shape[-1], self.width))
        if self.scanned:
            axes: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(nn.remat(_Layer, prevent_cse=False), length=self.layers, **axes)()(x, None)
        else:
            for _ in range(self.layers):
                x = _Block()(x)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def _transformer() -> Network:
    return _language("transformer", LanguageModel(64, 64), (16, 32))


def _deep() -> Network:
    """A scan over layers that are computed again in the backward pass, with long sequences: few weights, much else."""
    return _language("deep", LanguageModel(64, 64, layers=8, scanned=True), (8, 64))


def _language(name: str, module: LanguageModel, shape: tuple[int, int]) -> Network:
    rng = np.random.default_rng(0)

    def draw(*lead: int) -> Tree:
        return tuple(_labels(rng, module.vocabulary, *lead, *shape) for _ in range(2))

    batches = draw(10), draw()
    params = module.init(jax.random.key(0), batches[1][0])
    return _network(name, module.apply, params, batches, decay=15.0, unroll=1)


def _network(
    name: str,
    logits: Callable[..., Any],
    params: Tree,
    batches: tuple[Tree, Tree],
    *,
    decay: float,
    unroll: int | bool,
) -> Network:
    def cross_entropy(params: Tree, batch: Tree) -> jax.Array:
        inputs, labels = batch
        log_probabilities = jax.nn.log_softmax(logits(params, inputs))
        return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1))

    log_decays = jax.tree.map(lambda x: jnp.full_like(x, np.log(decay)), params)
    return Network(name, cross_entropy, params, log_decays, batches[0], batches[1], unroll)


def _float(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _labels(rng: np.random.Generator, classes: int, *shape: int) -> jax.Array:
    return jnp.asarray(rng.integers(0, classes, size=shape), jnp.int32)
