"""Train a network at weight decays that are held fixed, with a progress bar: what learned decays are judged by.

    w ← Adam(∇ CE(w; a batch of the training split) + c ⊙ w)

One compilation serves no decay, one decay, one per layer and one per weight, since decays are spread over the weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import hypergrad as hg
from experiments.common import datasets, progress
from experiments.common.progress import chunks


class Settings(NamedTuple):
    """How long and how fast."""

    hidden: int
    steps: int  # inner steps of a learning run
    batch: int  # examples a gradient; a smaller split is used whole
    outer_rate: float
    every: int  # inner steps an outer step, after a warm-up of a tenth of all steps
    seeds: int
    full_grid: bool = True  # also a grid of which every point gets the budget of a learning run
    inner_rate: float = 1e-3
    look: int = 50  # steps between two looks at the validation loss
    low: float = 1e-5  # bounds of a decay; learning starts at their geometric mean
    high: float = 1.0

    def due(self, n: Any) -> Any:
        """Return whether an outer step follows inner step ``n``, counted from 1."""
        return (n > self.steps // 10) & (n % self.every == 0)


class Run(NamedTuple):
    """One training run: where it ended, and (gradients spent so far, validation loss) on the way."""

    params: Any
    decay: Any
    curve: list[tuple[float, float]]


class Tools(NamedTuple):
    """What a comparison calls, compiled once for all seeds.

    Attributes:
      init: ``init(key, x) -> params``.
      judge: ``judge(params, split) -> (cross-entropy, error)``.
      observe: ``observe(run, step, params, splits, spent, info=None) -> validation loss``; shows and logs it as that of
        the run of that name.
      train: ``train(run, params, decay, splits, steps, key) -> Run``; ``decay`` is a tree prefix of ``params``.
    """

    init: Callable[[jax.Array, jax.Array], Any]
    judge: Callable[[Any, datasets.Split], tuple[jax.Array, jax.Array]]
    observe: Callable[..., float]
    train: Callable[[str, Any, Any, datasets.Splits, int, jax.Array], Run]


def make_tools(model: Any, problem: hg.BilevelProblem, settings: Settings, shown: progress.Progress) -> Tools:
    """Build the tools for a Flax ``model`` and a ``problem`` whose hyperparameters are decays."""
    optimizer = optax.adam(settings.inner_rate)

    @jax.jit
    def judge(params: Any, split: datasets.Split) -> tuple[jax.Array, jax.Array]:
        wrong = model.apply({"params": params}, split.x).argmax(-1) != split.y
        return problem.outer_loss(params, (), split, None), wrong.mean()

    @jax.jit
    def advance(
        params: Any, state: Any, decay: Any, train: datasets.Split, key: jax.Array, start: int, stop: int
    ) -> Any:
        def step(i: jax.Array, at: tuple[Any, Any]) -> tuple[Any, Any]:
            params, state = at
            batch = datasets.draw(train, settings.batch, jax.random.fold_in(key, i))
            updates, state = optimizer.update(jax.grad(problem.inner_loss)(params, decay, batch, None), state)
            return optax.apply_updates(params, updates), state

        return lax.fori_loop(start, stop, step, (params, state))

    @jax.jit
    def init(key: jax.Array, x: jax.Array) -> Any:
        return model.init(key, x[:1])["params"]

    def observe(run: str, step: int, params: Any, splits: datasets.Splits, spent: float, info: Any = None) -> float:
        loss = float(judge(params, splits.valid)[0])
        shown.look(run, step, info, advance=spent, loss=loss)
        return loss

    def train(run: str, params: Any, decay: Any, splits: datasets.Splits, steps: int, key: jax.Array) -> Run:
        each = jax.tree.map(lambda c, below: jax.tree.map(lambda w: jnp.full_like(w, c), below), decay, params)
        state, curve = optimizer.init(params), []
        for start, stop in chunks(steps, settings.look):
            params, state = advance(params, state, each, splits.train, key, start, stop)
            curve.append((float(stop), observe(run, stop, params, splits, stop - start)))
        return Run(params, decay, curve)

    return Tools(init, judge, observe, train)
