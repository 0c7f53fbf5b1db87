"""Train a softmax regression: at decays that are held fixed, or with decays and hypernetwork together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import hypergrad as hg
from experiments.common import datasets, progress


class Settings(NamedTuple):
    """How long and how fast.

    σ, samples and the response (its rate, where it starts) are chosen by how well its hypergradient agrees with an
    implicit one, on seed 100 of MNIST, which nothing else uses; the rest is not tuned.
    """

    steps: int = 3000  # inner steps of every run
    seeds: int = 3
    rate: float = 3e-3  # Adam's, for θ and for weights without a hypernetwork; all rates fall to zero like a cosine
    response_rate: float = 1e-3
    outer_rate: float = 0.02
    outer_batch: int = 2000
    every: int = 10  # inner steps an outer step, after a warm-up of a fifth of all steps
    scale: float = 0.25  # σ
    samples: int = 10  # of λ, a step
    low: float = 1e-6  # bounds of a decay; learning starts at their geometric mean
    high: float = 1.0
    grid: int = 13
    looks: int = 20


class Run(NamedTuple):
    """Where a run ended, what it cost, and where it was on the way.

    Attributes:
      params: plain weights.
      decay: the decays that they belong to.
      gradients: of the training loss at one set of weights.
      history: (step, weights, decays) at every look; empty for fixed decays.
      variables: hypernetwork and λ; None for fixed decays.
    """

    params: Any
    decay: Any
    gradients: int
    history: list[tuple[int, Any, Any]]
    variables: Any = None


def falling_adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Return Adam with a rate that falls to zero like a cosine."""
    return optax.adam(optax.cosine_decay_schedule(rate, max(steps, 1)))


def with_fixed_decay(plain: hg.BilevelProblem, settings: Settings, shown: progress.Progress) -> Callable[..., Run]:
    """Return ``train(run, params, decay, splits) -> Run``, compiled once: decays are spread over the weights."""
    tx = falling_adam(settings.rate, settings.steps)

    @jax.jit
    def advance(params: Any, decay: Any, train: datasets.Split) -> Any:
        def step(_: jax.Array, at: tuple[Any, Any]) -> tuple[Any, Any]:
            params, state = at
            updates, state = tx.update(jax.grad(plain.inner_loss)(params, decay, train, None), state)
            return optax.apply_updates(params, updates), state

        return lax.fori_loop(0, settings.steps, step, (params, tx.init(params)))[0]

    def train(run: str, params: Any, decay: Any, splits: datasets.Splits) -> Run:
        below = lambda c, tree: jax.tree.map(lambda w: jnp.broadcast_to(jnp.asarray(c, w.dtype), w.shape), tree)  # noqa: E731
        params = jax.block_until_ready(advance(params, jax.tree.map(below, decay, params), splits.train))
        loss = plain.outer_loss(params, decay, splits.valid, None)
        shown.look(run, settings.steps, advance=settings.steps, loss=loss)
        return Run(params, decay, settings.steps, [])

    return train


def with_learned_decay(
    run: str,
    problem: hg.BilevelProblem,
    tx: optax.GradientTransformationExtraArgs,
    variables: hg.BilevelParams,
    splits: datasets.Splits,
    settings: Settings,
    seed: int,
    shown: progress.Progress,
) -> Run:
    """Take all steps of ``tx``; the training split is one batch, validation batches are drawn."""

    @jax.jit
    def advance(variables: Any, state: Any, splits: datasets.Splits, start: int, stop: int) -> Any:
        def step(i: jax.Array, at: tuple[Any, Any]) -> tuple[Any, Any]:
            variables, state = at
            valid = datasets.draw(splits.valid, settings.outer_batch, jax.random.fold_in(jax.random.key(seed), i))
            updates, state = tx.update(None, state, variables, inner_batch=splits.train, outer_batch=valid)
            return optax.apply_updates(variables, updates), state

        return lax.fori_loop(start, stop, step, (variables, state))

    state, history = tx.init(variables), []
    for look in range(settings.looks):
        start, stop = (settings.steps * at // settings.looks for at in (look, look + 1))
        variables, state = jax.block_until_ready(advance(variables, state, splits, start, stop))
        history.append((stop, hg.responses.deployable_params(variables), problem.constrain(variables.hyperparams)))
        loss = problem.outer_loss(*variables, splits.valid, None)
        shown.look(run, stop, state.info, advance=(stop - start) * settings.samples, loss=loss)
    return Run(*history[-1][1:], settings.steps * settings.samples, history, variables)
