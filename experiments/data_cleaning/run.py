"""Train networks from scratch on given examples at given weights: what learned weights are judged by.

    w ← Adam(∇ mean λᵢ CEᵢ(w) + c w),    over a batch drawn from the examples with λᵢ > 0

Each is trained at every decay c of a grid at once, and taken at the decay and the step with the lowest validation loss.
Where the validation examples are trained on as well, both are those of the same training without them; where nothing
else is, those that serve each half of them best when the other half is trained on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import hypergrad as hg
from experiments.common import datasets
from experiments.common.datasets import Split

DECAYS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_LOOKS = 20


class Settings(NamedTuple):
    """How much data, how long and how fast."""

    train: int
    valid: int  # clean examples: all that the hypergradient sees
    hidden: int
    seeds: int
    noise: float = 0.4  # share of wrong labels
    steps: int = 2000  # of training weights along; from scratch half as many
    batch: int = 250
    every: int = 5  # steps of training an outer step, after a warm-up of a twentieth of all steps
    rate: float = 3e-3
    decay: float = 3e-3  # where weights are jointly trained; one of DECAYS
    outer_rate: float = 0.1
    look: int = 100

    @property
    def look_fixed(self) -> int:
        """Steps between two of the looks at a training from scratch."""
        return max(1, self.steps // (2 * _LOOKS))

    @property
    def steps_fixed(self) -> int:
        """Steps of a training from scratch."""
        return _LOOKS * self.look_fixed


class Data(NamedTuple):
    """Examples to train on, of which ``wrong`` says whether the label is, clean ones to validate on, and the test."""

    train: Split
    wrong: np.ndarray
    valid: Split
    test: Split


class Fitted(NamedTuple):
    """Weights and validation losses of a training from scratch: leaves (looks, decays, …)."""

    params: Any
    losses: jax.Array


Losses: TypeAlias = Callable[[Any, Split], tuple[jax.Array, jax.Array]]
"""``losses(params, split) -> (cross-entropies, whether wrong)``, one of each an example."""


class Tools(NamedTuple):
    """What a comparison calls, compiled once for all seeds.

    Attributes:
      losses: compiled ones.
      init: ``init(key, split) -> params``.
      judge: ``judge(params, split) -> (cross-entropy, error)``.
      fit: ``fit(params, data, weights, judged, key) -> Fitted``; ``weights`` has the training examples before the
        validation examples, and ``judged`` one number a validation example: its weight in the validation loss.
    """

    losses: Losses
    init: Callable[[jax.Array, Split], Any]
    judge: Callable[[Any, Split], tuple[jax.Array, jax.Array]]
    fit: Callable[[Any, Data, Any, Any, jax.Array], Fitted]


def load(name: str, settings: Settings, seed: int) -> Data:
    """Return data of one seed; a wrong label is any of the other classes."""
    splits, rng = datasets.load(name, seed, settings.train), np.random.default_rng(seed)
    wrong = rng.random(settings.train) < settings.noise
    shift = np.where(wrong, rng.integers(1, datasets.NUM_CLASSES, settings.train), 0)
    noisy = splits.train._replace(y=(splits.train.y + shift) % datasets.NUM_CLASSES)
    chosen = rng.permutation(len(splits.valid.y))[: settings.valid]
    return Data(noisy, wrong, jax.tree.map(lambda leaf: leaf[chosen], splits.valid), splits.test)


def make_tools(model: Any, settings: Settings) -> Tools:
    """Build the tools for a Flax ``model``."""
    optimizer, decays = optax.adam(settings.rate), jnp.array(DECAYS)

    def losses(params: Any, split: Split) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, split.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, split.y), logits.argmax(-1) != split.y

    @jax.jit
    def fit(params: Any, data: Data, weights: Any, judged: Any, key: jax.Array) -> Fitted:
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts), data.train, data.valid)
        order, count = jnp.argsort(weights <= 0), (weights > 0).sum()  # those to draw from come first

        def step(i: jax.Array, at: tuple[Any, Any]) -> Any:
            drawn = order[jax.random.randint(jax.random.fold_in(key, i), (settings.batch,), 0, count)]
            batch = Split(both.x[drawn], both.y[drawn])

            def at_decay(params: Any, state: Any, decay: jax.Array) -> Any:
                loss = lambda w: (weights[drawn] * losses(w, batch)[0]).mean() + hg.penalties.l2(w, decay)  # noqa: E731
                updates, state = optimizer.update(jax.grad(loss)(params), state)
                return optax.apply_updates(params, updates), state

            return jax.vmap(at_decay)(*at, decays)

        def look(at: Any, n: jax.Array) -> tuple[Any, Fitted]:
            at = lax.fori_loop(n * settings.look_fixed, (n + 1) * settings.look_fixed, step, at)
            each = jax.vmap(lambda w: losses(w, data.valid)[0] @ judged / judged.sum())(at[0])
            return at, Fitted(at[0], each)

        start = jax.tree.map(lambda w: jnp.stack([w] * len(DECAYS)), params)
        return lax.scan(look, (start, jax.vmap(optimizer.init)(start)), jnp.arange(_LOOKS))[1]

    judge = jax.jit(lambda params, split: tuple(each.mean() for each in losses(params, split)))
    return Tools(jax.jit(losses), jax.jit(lambda key, split: model.init(key, split.x[:1])["params"]), judge, fit)
