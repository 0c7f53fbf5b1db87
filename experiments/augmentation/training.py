"""Train a classifier with an augmentation that stays or is learned: settings, data, steps, early stopping.

    w ← Adam(∇ CE(w; a batch of the first images of ``pool``, augmented) + c w),    its rate decaying by a cosine

A run keeps what it had at the lowest loss on ``held``, the part of the validation split that no gradient sees.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import hypergrad as hg
from experiments.common import datasets
from experiments.common.datasets import Split
from experiments.common.progress import chunks


class Settings(NamedTuple):
    """How long and how fast."""

    train: int  # images
    valid: int  # images of the validation split that the outer loss sees
    hidden: int
    steps: int
    batch: int
    decay: float
    outer_rate: float
    rate: float = 1e-3  # of the classifier; both decay by a cosine
    every: int = 10  # steps an outer step, after a warm-up of a tenth of all steps
    look: int = 50  # steps between two looks at the loss on ``held``
    seeds: int = 3

    def due(self, n: Any) -> Any:
        """Return whether an outer step follows inner step ``n``, counted from 1."""
        return (n > self.steps // 10) & (n % self.every == 0)

    def learning_cost(self) -> float:
        """Return the cost of a learning run in gradients; the four products of an outer step count 2 each."""
        outer_steps = sum(bool(self.due(n)) for n in range(1, self.steps + 1))
        return self.steps + 2 * 4 * outer_steps + outer_steps * self.valid / self.batch

    def optimizer(self) -> optax.GradientTransformation:
        """Return the classifier's."""
        return optax.adam(optax.cosine_decay_schedule(self.rate, self.steps))


class Data(NamedTuple):
    """``pool`` is the training images, then ``valid``; ``held`` is what is left of the validation split."""

    pool: Split
    valid: Split
    held: Split
    test: Split


class Run(NamedTuple):
    """A training run at its lowest loss on ``held``, and (steps so far, that loss) on the way."""

    loss: float
    variables: hg.BilevelParams
    curve: list[tuple[int, float]]


class Training(NamedTuple):
    """How to train.

    Attributes:
      settings: how long.
      init: ``init(variables, key) -> state``.
      advance: ``advance((variables, state), start, stop, data, images, key) -> (variables, state)``.
    """

    settings: Settings
    init: Callable[..., Any]
    advance: Callable[..., Any]


def load(name: str, settings: Settings, seed: int) -> Data:
    """Cut the splits of a data set."""
    train, valid, test = datasets.load(name, seed, settings.train)
    seen, held = (Split(*(x[part] for x in valid)) for part in (slice(settings.valid), slice(settings.valid, None)))
    return Data(Split(*(jnp.concatenate(pair) for pair in zip(train, seen, strict=True))), seen, held, test)


def fixed(problem: hg.BilevelProblem, settings: Settings) -> Training:
    """Return the training of weights at hyperparameters that stay."""
    optimizer = settings.optimizer()

    @jax.jit
    def advance(at: Any, start: int, stop: int, data: Data, images: int, key: jax.Array) -> Any:
        def step(i: jax.Array, at: Any) -> Any:
            (variables, state), keys = at, jax.random.split(jax.random.fold_in(key, i))
            gradient = jax.grad(problem.inner_loss)(*variables, draw(data.pool, images, settings, keys[0]), keys[1])
            updates, state = optimizer.update(gradient, state)
            return variables._replace(params=optax.apply_updates(variables.params, updates)), state

        return lax.fori_loop(start, stop, step, at)

    return Training(settings, lambda variables, _key: optimizer.init(variables.params), advance)


def draw(pool: Split, images: Any, settings: Settings, key: jax.Array) -> Split:
    """Return a batch of the pool's first ``images``, with replacement."""
    index = jax.random.randint(key, (settings.batch,), 0, images)
    return Split(pool.x[index], pool.y[index])


def run(
    training: Training,
    variables: hg.BilevelParams,
    data: Data,
    images: int,
    key: jax.Array,
    observe: Callable[..., float],
) -> Run:
    """Train on so many images; ``observe(params, start, stop, info) -> loss`` is called at every look."""
    state, curve, best = training.init(variables, key), list[tuple[int, float]](), (float("inf"), variables)
    for start, stop in chunks(training.settings.steps, training.settings.look):
        variables, state = training.advance((variables, state), start, stop, data, images, key)
        loss = observe(variables.params, stop - start, stop, getattr(state, "info", None))
        curve.append((stop, loss))
        best = min(best, (loss, variables), key=lambda one: one[0])
    return Run(*best, curve)
