"""Compare learned decays with their rivals at one currency, on one seed.

The currency is one gradient of the training loss on one training batch. A Hessian product counts 2, the mixed
product 2, another gradient its share of examples. A grid counts all its points together, retraining counts the
search before it. Everything is chosen on the validation split; ``test`` is read once, for a finished run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import datasets
from experiments.weight_decay import fixed_decay
from experiments.weight_decay.fixed_decay import Run, Settings

GRID_POINTS = 10
EQUAL_GRID, FULL_GRID = "grid of 10, equal total budget", "grid of 10, full budget each"
RIVAL_ON_BOTH = "train + validation, grid's best"
_PRODUCTS = 4  # per outer step: three of the default solver, and the mixed product

Learn = Callable[[str, Any, Any, datasets.Splits, jax.Array], Run]


class Outcome(NamedTuple):
    """One method on one seed.

    Attributes:
      run: weights, decays and the way there.
      hyperparams: how many were chosen.
      gradients: spent, with the search for the decays.
      test_loss: cross-entropy in nats.
      test_error: share of wrong labels.
    """

    run: Run
    hyperparams: int
    gradients: float
    test_loss: float
    test_error: float


def compare(
    learn: Learn, tools: fixed_decay.Tools, settings: Settings, splits: datasets.Splits, *, seed: int
) -> dict[str, Outcome]:
    """Return every method's outcome, by the name of its row."""
    # The rbg generator compiles three times faster than the default one.
    first, second, batches = jax.random.split(jax.random.key(seed, impl="rbg"), 3)
    params, fresh = (tools.init(key, splits.train.x) for key in (first, second))
    budget = learning_cost(settings, splits, settings.steps)
    outcomes, here = {}, f"seed {seed}"

    def note(name: str, run: Run, hyperparams: int, gradients: float) -> Run:
        loss, error = tools.judge(run.params, splits.test)
        outcomes[name] = Outcome(run, hyperparams, gradients, float(loss), float(error))
        return run

    none = tools.train(f"{here}/no decay", params, 0.0, splits, settings.steps, batches)
    note("no decay", none, 0, settings.steps)
    for name, steps in grid_steps(budget, settings).items():
        decays = np.geomspace(settings.low, settings.high, GRID_POINTS).tolist()
        runs = [tools.train(f"{here}/{name}/{c:.1e}", params, c, splits, steps, batches) for c in decays]
        best = note(name, min(runs, key=lambda run: run.curve[-1][1]), 1, GRID_POINTS * steps)
        grid_cost = GRID_POINTS * steps

    joined = splits._replace(train=jax.tree.map(lambda *parts: jnp.concatenate(parts), splits.train, splits.valid))
    rival = tools.train(f"{here}/{RIVAL_ON_BOTH}", params, best.decay, joined, round(budget), batches)
    price = gradient_cost(settings, joined.train, splits)
    note(RIVAL_ON_BOTH, rival, 1, grid_cost + price * round(budget))

    starts = {
        "per layer": {layer: jnp.zeros(()) for layer in params},
        "per weight": jax.tree.map(jnp.zeros_like, params),
    }
    for name, hyperparams in starts.items():
        count = sum(leaf.size for leaf in jax.tree.leaves(hyperparams))
        joint, retrained = f"{name}, jointly trained", f"{name}, retrained"
        learned = note(joint, learn(f"{here}/{joint}", params, hyperparams, splits, batches), count, budget)
        again = tools.train(f"{here}/{retrained}", fresh, learned.decay, splits, settings.steps, batches)
        note(retrained, again, count, budget + settings.steps)
    return outcomes


def total_cost(settings: Settings, splits: datasets.Splits) -> float:
    """Return the training steps and their equivalents in one comparison, for a progress bar."""
    budget = learning_cost(settings, splits, settings.steps)
    grids = sum(GRID_POINTS * steps for steps in grid_steps(budget, settings).values())
    return 3 * settings.steps + 3 * budget + grids


def grid_steps(budget: float, settings: Settings) -> dict[str, int]:
    """Return the steps that each point of each grid gets."""
    return {EQUAL_GRID: max(int(budget / GRID_POINTS), 1)} | ({FULL_GRID: round(budget)} if settings.full_grid else {})


def learning_cost(settings: Settings, splits: datasets.Splits, steps: int) -> float:
    """Return what the first ``steps`` of a learning run cost, in gradients."""
    outer_steps = sum(bool(settings.due(n)) for n in range(1, steps + 1))
    return steps + 2 * _PRODUCTS * outer_steps + outer_steps * gradient_cost(settings, splits.valid, splits)


def gradient_cost(settings: Settings, split: datasets.Split, splits: datasets.Splits) -> float:
    """Return the cost of a gradient on ``split`` in units of one on the training split, by examples."""
    return min(len(split.y), settings.batch) / min(len(splits.train.y), settings.batch)
