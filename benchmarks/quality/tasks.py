"""Joint-training tasks on scikit-learn's digits: small enough to run a solver on five seeds in a minute.

    weight decay      one log decay per weight, full batches or batches of 50
    data cleaning     one weight per training example, a share of the training labels wrong
    augmentation      the strength of noise on each pixel
    transformer       one log decay per weight of a transformer that reads an image row by row

Each has 500 training, 400 validation and 897 test images; inner and outer optimizer are Adam.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import hypergrad as hg

TRAIN, VALID, CLASSES = 500, 400, 10


class Split(NamedTuple):
    """Images (n, 64) in [0, 1], labels (n,), and the examples' places in the training set (n,)."""

    x: jax.Array
    y: jax.Array
    place: jax.Array


class Task(NamedTuple):
    """A task for one seed.

    Attributes:
      problem: over unconstrained hyperparameters.
      variables: where a run starts.
      splits: train, valid, test.
      error: ``error(params, split) -> (cross-entropy, share of errors)``.
      batch: examples per inner batch.
      steps: inner steps of a run; an outer step every 10.
      rates: of the inner and of the outer Adam.
    """

    problem: hg.BilevelProblem
    variables: hg.BilevelParams
    splits: tuple[Split, Split, Split]
    error: Callable[[Any, Split], tuple[jax.Array, jax.Array]]
    batch: int
    steps: int
    rates: tuple[float, float]


class MLP(nn.Module):
    """Two hidden layers of the same width."""

    hidden: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (n, 10)."""
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(CLASSES)(x)


class Transformer(nn.Module):
    """One block over the 8 rows of an image, width 32, 4 heads."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (n, 10)."""
        rows = nn.Dense(32)(x.reshape(-1, 8, 8))
        rows = rows + self.param("position", nn.initializers.normal(0.1), (8, 32))
        rows = rows + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(rows))
        rows = rows + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(rows))))
        return nn.Dense(CLASSES)(nn.LayerNorm()(rows).mean(1))


def weight_decay(seed: int, *, batch: int = TRAIN, model: nn.Module | None = None) -> Task:
    """One decay per weight between 1e-5 and 1, starting at 1e-3."""
    model, splits = model or MLP(), digits(seed)
    bounded = hg.bijectors.interval(float(np.log(1e-5)), 0.0)

    def inner(params: Any, decay: Any, drawn: Split, _key: Any) -> jax.Array:
        return _cross_entropy(model, params, drawn) + hg.penalties.l2(params, decay)

    def outer(params: Any, _decay: Any, drawn: Split, _key: Any) -> jax.Array:
        return _cross_entropy(model, params, drawn)

    problem = hg.reparameterize(hg.reparameterize(hg.BilevelProblem(inner, outer), hg.bijectors.exp()), bounded)
    params = model.init(jax.random.key(seed), splits[0].x[:1])["params"]
    logs = jax.tree.map(lambda w: jnp.full_like(w, np.log(1e-3)), params)
    variables = hg.BilevelParams(params, hg.unconstrain(bounded, logs))
    return Task(problem, variables, splits, _error(model), batch, 900, (1e-3, 3e-2))


def data_cleaning(seed: int, *, noise: float = 0.4) -> Task:
    """One weight σ(λ) per training example; ``noise`` of the training labels are drawn anew."""
    model, (train, valid, test) = MLP(), digits(seed)
    rng = np.random.default_rng(seed + 1000)
    wrong = rng.permutation(TRAIN)[: round(noise * TRAIN)]
    train = train._replace(y=train.y.at[wrong].set(jnp.asarray(rng.integers(0, CLASSES, len(wrong)))))

    def inner(params: Any, weights: Any, drawn: Split, _key: Any) -> jax.Array:
        logits = model.apply({"params": params}, drawn.x)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, drawn.y)
        return jnp.mean(weights[drawn.place] * losses) + hg.penalties.l2(params, 1e-3)

    def outer(params: Any, _weights: Any, drawn: Split, _key: Any) -> jax.Array:
        return _cross_entropy(model, params, drawn)

    problem = hg.reparameterize(hg.BilevelProblem(inner, outer), hg.bijectors.sigmoid())
    params = model.init(jax.random.key(seed), train.x[:1])["params"]
    return Task(
        problem,
        hg.BilevelParams(params, jnp.zeros(TRAIN)),
        (train, valid, test),
        _error(model),
        TRAIN,
        900,
        (1e-3, 0.1),
    )


def augmentation(seed: int) -> Task:
    """The standard deviation of Gaussian noise on each pixel of the training images, starting at 0.05."""
    model, splits = MLP(), digits(seed)

    def inner(params: Any, scale: Any, drawn: Split, key: Any) -> jax.Array:
        noise = jax.random.normal(key, drawn.x.shape)
        return _cross_entropy(model, params, drawn._replace(x=drawn.x + scale * noise)) + hg.penalties.l2(params, 1e-4)

    def outer(params: Any, _scale: Any, drawn: Split, _key: Any) -> jax.Array:
        return _cross_entropy(model, params, drawn)

    problem = hg.reparameterize(hg.BilevelProblem(inner, outer), hg.bijectors.softplus())
    params = model.init(jax.random.key(seed), splits[0].x[:1])["params"]
    scale = hg.unconstrain(hg.bijectors.softplus(), jnp.full(64, 0.05))
    return Task(problem, hg.BilevelParams(params, scale), splits, _error(model), TRAIN, 900, (1e-3, 3e-2))


TASKS: dict[str, Callable[[int], Task]] = {
    "weight decay": weight_decay,
    "weight decay, batches of 50": lambda seed: weight_decay(seed, batch=50),
    "data cleaning, 20 % noise": lambda seed: data_cleaning(seed, noise=0.2),
    "data cleaning, 40 % noise": lambda seed: data_cleaning(seed, noise=0.4),
    "data cleaning, 60 % noise": lambda seed: data_cleaning(seed, noise=0.6),
    "augmentation": augmentation,
    "transformer": lambda seed: weight_decay(seed, batch=100, model=Transformer())._replace(steps=600),
}


def draw(split: Split, size: int, key: jax.Array) -> Split:
    """Return ``size`` random examples, or the whole split where it is not larger."""
    if size >= len(split.y):
        return split
    chosen = jax.random.choice(key, len(split.y), (size,), replace=False)
    return jax.tree.map(lambda leaf: leaf[chosen], split)


def digits(seed: int, train: int = TRAIN, valid: int = VALID) -> tuple[Split, Split, Split]:
    """Return training, validation and test images."""
    x, y = load_digits(return_X_y=True)
    order = np.split(np.random.default_rng(seed).permutation(len(y)), [train, train + valid])
    first, second, third = (
        Split(jnp.asarray(x[at] / 16.0, jnp.float32), jnp.asarray(y[at], jnp.int32), jnp.arange(len(at)))
        for at in order
    )
    return first, second, third


def _cross_entropy(model: nn.Module, params: Any, split: Split) -> jax.Array:
    logits = model.apply({"params": params}, split.x)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, split.y).mean()


def _error(model: nn.Module) -> Callable[[Any, Split], tuple[jax.Array, jax.Array]]:
    def error(params: Any, split: Split) -> tuple[jax.Array, jax.Array]:
        logits = jnp.asarray(model.apply({"params": params}, split.x))
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, split.y).mean()
        return loss, jnp.mean(logits.argmax(-1) != split.y)

    return error
