"""Train a small network at rates that are held fixed, and choose the best of a grid: what learned rates are judged by.

    w_{i+1} = w_i − αᵢ m_i,   m_i = 0.9 m_{i−1} + ∇ CE(w_i; batch i)          i = 0 … K−1, from a random start

A schedule is judged by means over many such runs, which share nothing but the data.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments.common import datasets
from experiments.common.progress import Progress

MOMENTUM = 0.9
POINTS = 10  # of a small grid
PRICE = 4  # of a hypergradient, in training runs: the upper end of what hg.reverse states for a checkpoint a step
WARMUPS, FINALS = (0.0, 0.05, 0.1, 0.2, 0.3), (0.0, 0.01, 0.1, 1.0)  # of the wide grid: shares of the run, of the peak


class Settings(NamedTuple):
    """How long and how fast. Hashable: what is compiled is compiled for one of these."""

    seeds: int = 3
    hidden: int = 32
    steps: int = 100  # K, of every training run
    batch: int = 10
    outer_steps: int = 200
    outer_rate: float = 0.05
    clip: float = 0.05  # of a hypergradient's norm: one run near divergence would outweigh all others
    runs: int = 8  # fresh starts and orders that an outer step averages over
    start: float = 0.03  # the rate of every step that learning starts at
    low: float = 0.01  # bounds of a grid's peak rates
    high: float = 1.0
    chosen_on: int = 16  # runs by which a grid chooses
    held_out: int = 32  # runs on which all are judged
    valid: int = 1000  # examples of the validation split at most


class Runs(NamedTuple):
    """Training runs to be.

    Attributes:
      params: where each starts, leaves (runs, …).
      indices: its minibatches in the training split, int32 (runs, K, batch).
    """

    params: Any
    indices: jax.Array


def network(settings: Settings) -> nn.Module:
    """Return a perceptron with one hidden layer."""
    return nn.Sequential([nn.Dense(settings.hidden), nn.relu, nn.Dense(datasets.NUM_CLASSES)])


def make_problem(settings: Settings) -> hg.BilevelProblem:
    """Return both losses: one function of different data, which rates do not enter."""
    model = network(settings)

    def cross_entropy(params: Any, _rates: Any, batch: datasets.Split, _key: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, batch.x), batch.y).mean()

    return hg.BilevelProblem(cross_entropy, cross_entropy)


def inner_optimizer(rates: Any) -> optax.GradientTransformation:
    """Return momentum SGD at rates (K,), or a tree of them: one per step, or one per step and array of weights."""
    schedule = hg.optimizers.schedule(rates)
    return optax.chain(optax.trace(MOMENTUM), hg.optimizers.scale_by_learning_rate(schedule))


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw(settings: Settings, count: int, x: jax.Array, key: jax.Array) -> Runs:
    """Draw ``count`` starts and orders; every epoch goes through all examples ``x`` in a new order."""
    starts, orders = jax.random.split(key)
    params = jax.vmap(lambda key: network(settings).init(key, x[:1]))(jax.random.split(starts, count))
    used = settings.steps * settings.batch
    epochs = jax.random.uniform(orders, (count, -(-used // len(x)), len(x))).argsort()
    indices = epochs.reshape(count, -1)[:, :used].reshape(count, settings.steps, settings.batch)
    return Runs(params, indices)


@functools.partial(jax.jit, static_argnums=0)
def judge(settings: Settings, rates: Any, runs: Runs, train: datasets.Split, split: datasets.Split) -> Any:
    """Return cross-entropy and error on ``split`` at the end of training at ``rates``, means over runs."""
    problem = make_problem(settings)
    response = hg.best_response(hg.unrolled(problem), inner_optimizer)

    def one(run: Runs) -> tuple[jax.Array, jax.Array]:
        params = response(run.params, rates, hg.IndexedBatch(train, run.indices), key=None)
        logits: Any = network(settings).apply(params, split.x)
        return problem.outer_loss(params, rates, split, None), (logits.argmax(-1) != split.y).mean()

    return jax.tree.map(jnp.mean, jax.vmap(one)(runs))


def best(
    settings: Settings, name: str, grid: Sequence[np.ndarray], runs: Runs, splits: datasets.Splits, shown: Progress
) -> np.ndarray:
    """Return the candidate with the lowest validation loss, each shown under the name; one that diverges is none."""
    judged = []
    shown.bar.set_description(name)
    for number, rates in enumerate(grid, start=1):
        loss = float(judge(settings, rates, runs, splits.train, splits.valid)[0])
        shown.look(name, number, advance=settings.chosen_on * settings.steps, loss=loss)
        judged.append((loss, rates))
    return min(judged, key=lambda pair: np.nan_to_num(pair[0], nan=np.inf))[1]


def constants(settings: Settings) -> list[np.ndarray]:
    """Return the small grid of constant rates."""
    return [np.full(settings.steps, peak, np.float32) for peak in _peaks(settings, POINTS)]


def cosines(settings: Settings) -> list[np.ndarray]:
    """Return the small grid of cosines from a peak to zero."""
    return [cosine(settings.steps, peak) for peak in _peaks(settings, POINTS)]


def wide_grid(settings: Settings, points: int) -> list[np.ndarray]:
    """Return about ``points`` schedules: peak × warm-up × final rate, where final = peak is constant."""
    peaks = _peaks(settings, max(round(points / (len(WARMUPS) * len(FINALS))), 2))
    return [cosine(settings.steps, *chosen) for chosen in itertools.product(peaks, WARMUPS, FINALS)]


def cosine(steps: int, peak: float, warmup: float = 0.0, final: float = 0.0) -> np.ndarray:
    """Return rates that rise linearly over a share of the run, then fall by half a cosine to a share of the peak."""
    rising = round(warmup * steps)
    up = np.arange(1, rising + 1) / (rising + 1)
    down = final + (1 - final) * 0.5 * (1 + np.cos(np.pi * np.arange(steps - rising) / (steps - rising)))
    return (peak * np.concatenate([up, down])).astype(np.float32)


def _peaks(settings: Settings, count: int) -> list[float]:
    return np.geomspace(settings.low, settings.high, count).tolist()
