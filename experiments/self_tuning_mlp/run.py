"""Train at hyperparameters that are held fixed or that tune themselves, look by look: for ``self_tuning_mlp.py``."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax import lax

import hypergrad as hg
from experiments.common import datasets, progress
from experiments.self_tuning_mlp.report import Run


class Look(NamedTuple):
    """What is seen of a run between two pieces of it.

    Attributes:
      steps: inner steps so far.
      loss: validation loss of the weights.
      params: plain weights of the model.
      values: constrained hyperparameters.
      info: of the last outer step; None where there are none.
    """

    steps: int
    loss: float
    params: Any
    values: Any
    info: hg.HypergradInfo | None


class Trainer(NamedTuple):
    """A way to train, compiled once for all runs.

    Attributes:
      advance: ``advance(at, splits, key, start, stop) -> at``: inner steps ``start`` to ``stop``.
      read: ``read(at) -> (params, values, info)``: plain weights, constrained hyperparameters, the last outer step's.
      judge: ``judge(params, split) -> (cross-entropy, error)``.
    """

    advance: Callable[..., Any]
    read: Callable[[Any], tuple[Any, Any, Any]]
    judge: Callable[[Any, datasets.Split], tuple[jax.Array, jax.Array]]

    def looks(self, at: Any, splits: datasets.Splits, key: jax.Array, stops: Iterable[int]) -> Iterator[Look]:
        """Train up to each number of steps in ``stops``, and look there."""
        start = 0
        for stop in stops:
            at = self.advance(at, splits, key, start, stop)
            params, values, info = self.read(at)
            yield Look(stop, float(self.judge(params, splits.valid)[0]), params, values, info)
            start = stop


def follow(
    name: str,
    trainer: Trainer,
    at: Any,
    splits: datasets.Splits,
    key: jax.Array,
    steps: int,
    looks: int,
    gradients: int,
    shown: progress.Progress,
) -> Run:
    """Train for so many steps, which cost so many gradients; show every look, and return what was seen."""
    seen, losses = [], []
    for look in trainer.looks(at, splits, key, [steps * (i + 1) // looks for i in range(looks)]):
        losses.append(look.loss)
        if look.loss == min(losses):
            best = look.params
        seen.append(look)
        shown.look(name, look.steps, look.info, loss=look.loss)
    spent = [gradients * look.steps // steps for look in seen]
    loss, error = trainer.judge(best, splits.test)
    return Run(spent, losses, [look.values for look in seen], (float(loss), float(error)))


def held_fixed(
    problem: hg.BilevelProblem, model: Any, optimizer: Any, batch: int
) -> tuple[Callable[..., Any], Trainer]:
    """Return ``start(params, values)`` and a trainer that minimises the inner loss at given constrained values."""

    def step(at: Any, train_batch: datasets.Split, _valid: datasets.Split, key: jax.Array) -> Any:
        params, state, values = at
        updates, state = optimizer.update(jax.grad(problem.inner_loss)(params, values, train_batch, key), state, params)
        return optax.apply_updates(params, updates), state, values

    def start(params: Any, values: Any) -> Any:
        return params, optimizer.init(params), jax.tree.map(jax.numpy.float32, values)

    return start, Trainer(_loop(step, batch, batch), lambda at: (at[0], at[2], None), _judge(model))


def tuning_itself(
    problem: hg.BilevelProblem, model: Any, tx: Any, sizes: Sequence[int]
) -> tuple[Callable[..., Any], Trainer]:
    """Return ``start(variables, key)`` and a trainer of a problem over a response; ``sizes`` of both batches."""

    def step(at: Any, train_batch: datasets.Split, valid_batch: datasets.Split, _key: jax.Array) -> Any:
        variables, state = at
        updates, state = tx.update(None, state, variables, inner_batch=train_batch, outer_batch=valid_batch)
        return optax.apply_updates(variables, updates), state

    def start(variables: hg.BilevelParams, key: jax.Array) -> Any:
        # The transformation is shared between runs, so that it compiles once; their noise is not.
        return variables, tx.init(variables)._replace(key=jax.random.key_data(key))

    def read(at: Any) -> tuple[Any, Any, Any]:
        return hg.responses.deployable_params(at[0]), problem.constrain(at[0].hyperparams), at[1].info

    return start, Trainer(_loop(step, *sizes), jax.jit(read), _judge(model))


def _loop(step: Callable[..., Any], batch: int, outer_batch: int) -> Callable[..., Any]:
    @jax.jit
    def advance(at: Any, splits: datasets.Splits, key: jax.Array, start: int, stop: int) -> Any:
        def body(i: jax.Array, at: Any) -> Any:
            inner_key, outer_key, noise_key = jax.random.split(jax.random.fold_in(key, i), 3)
            train_batch = datasets.draw(splits.train, batch, inner_key)
            return step(at, train_batch, datasets.draw(splits.valid, outer_batch, outer_key), noise_key)

        return lax.fori_loop(start, stop, body, at)

    return advance


def _judge(model: Any) -> Callable[..., Any]:
    @jax.jit
    def judge(params: Any, split: datasets.Split) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, split.x, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.y)
        return losses.mean(), (logits.argmax(-1) != split.y).mean()

    return judge
