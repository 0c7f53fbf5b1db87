"""Compare ways of pre-training by what fine-tuning makes of them: data, long fine-tuning, rivals, one look at test.

Every network is fine-tuned for longer than the outer loss does it. How long to pre-train and to fine-tune, and at
which rate where it is not learned, is chosen by validation loss; ``test`` is read once, for what was chosen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from sklearn.metrics import roc_auc_score

import hypergrad as hg
from experiments.common import datasets
from experiments.common.datasets import Split

NOISE, TUNING, VALID = 0.4, 50, 150
NONE, EQUAL, ORACLE = "no pre-training", "equal weights", "wrong labels left out (oracle)"
JOINT, RETRAINED = "learned weights, jointly trained", "learned weights, retrained"
_RATES = np.geomspace(0.003, 1.0, 6)
_FIRST_RATE, LONGEST = 0.1, 100  # without pre-training, fine-tuning may take ten times as many steps
_JOINED_RATE, _JOINED_STEPS = 0.2, 200
_CERTAIN = 20.0  # a logit whose sigmoid is 1 to rounding


class Data(NamedTuple):
    """Digits cut into four; ``wrong`` says of each example of ``pool`` whether its label is."""

    pool: Split
    wrong: np.ndarray
    tuning: Split
    valid: Split
    test: Split


class Outcome(NamedTuple):
    """One way of pre-training on one seed.

    Attributes:
      valid_loss: cross-entropy in nats after fine-tuning.
      test_loss: likewise.
      test_error: share of wrong answers.
      joined_error: likewise, where fine-tuning has the validation examples too and nothing says when to stop.
      auc: of telling right labels from wrong ones by the learned weights; NaN for others.
      weights: the learned ones, one an example of the pool; None for others.
      wrong: which of these have a wrong label.
    """

    valid_loss: float
    test_loss: float
    test_error: float
    joined_error: float
    auc: float
    weights: Any
    wrong: np.ndarray


class Tools(NamedTuple):
    """What a comparison calls, compiled once for all seeds.

    Attributes:
      fine_tune: ``fine_tune(params, data, rates, longest) -> (validation loss, params)`` at the best rate and step.
      test: ``test(pre-trained params, what fine_tune returned, data, learned weights) -> Outcome``.
    """

    fine_tune: Callable[..., tuple[jax.Array, Any]]
    test: Callable[..., Outcome]


Losses: TypeAlias = Callable[[Any, Split], tuple[jax.Array, jax.Array]]
"""``losses(params, split) -> (cross-entropies, whether wrong)``, one of each an example."""


def load(pool_size: int, seed: int) -> Data:
    """Return the digits, with wrong labels for a share of the pool."""
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *datasets.load("digits", seed))
    columns = zip(*(jnp.split(leaf, np.cumsum([pool_size, TUNING, VALID])) for leaf in whole), strict=True)
    pool, tuning, valid, test = (Split(*column) for column in columns)
    rng = np.random.default_rng(seed)
    wrong = rng.random(pool_size) < NOISE
    shift = np.where(wrong, rng.integers(1, datasets.NUM_CLASSES, pool_size), 0)
    return Data(pool._replace(y=(pool.y + shift) % datasets.NUM_CLASSES), wrong, tuning, valid, test)


def make_tools(losses: Losses) -> Tools:
    """Build the tools for a network by its losses."""

    @jax.jit
    def fine_tune(params: Any, data: Data, rates: jax.Array, longest: int) -> tuple[jax.Array, Any]:
        def step(at: tuple[Any, Any], rate: jax.Array) -> tuple[Any, Any]:
            now = losses(at[0], data.valid)[0].mean(), at[0]
            best = jax.tree.map(lambda a, b: jnp.where(now[0] < at[1][0], a, b), now, at[1])
            return _descend(losses, at[0], data.tuning, rate), best

        def at_rate(rate: jax.Array) -> tuple[jax.Array, Any]:
            start = params, (jnp.array(jnp.inf), params)
            return lax.fori_loop(0, longest + 1, lambda _, at: step(at, rate), start)[1]

        each = lax.map(at_rate, rates)
        return jax.tree.map(lambda leaf: leaf[each[0].argmin()], each)

    @jax.jit
    def scores(params: Any, tuned: Any, data: Data) -> list[jax.Array]:
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts), data.tuning, data.valid)
        step = lambda _, params: _descend(losses, params, both, _JOINED_RATE)  # noqa: E731
        joined = lax.fori_loop(0, _JOINED_STEPS, step, params)
        (cross_entropies, wrong), (_, joined_wrong) = losses(tuned, data.test), losses(joined, data.test)
        return [cross_entropies.mean(), wrong.mean(), joined_wrong.mean()]

    def test(params: Any, tuned: tuple[jax.Array, Any], data: Data, learned: Any = None) -> Outcome:
        auc = float("nan") if learned is None else float(roc_auc_score(~data.wrong, learned))
        loss, error, joined = map(float, scores(params, tuned[1], data))
        return Outcome(float(tuned[0]), loss, error, joined, auc, learned, data.wrong)

    return Tools(fine_tune, test)


def compare(
    init: Callable[..., Any], pretrain: Callable[..., Any], tools: Tools, pool_size: int, *, seed: int
) -> dict[str, Outcome]:
    """Return each way's outcome by the name of its row; ``init`` and ``pretrain`` are the network's."""
    # The rbg generator compiles three times faster than the default one.
    first, second, key = jax.random.split(jax.random.key(seed, impl="rbg"), 3)
    data, rates, here = load(pool_size, seed), jnp.asarray(_RATES), f"seed {seed}"
    params, fresh = (init(key, data.pool.x[:1])["params"] for key in (first, second))
    even = {"weights": jnp.zeros(len(data.wrong)), "rate": jnp.array(np.log(_FIRST_RATE), jnp.float32)}
    oracle = even | {"weights": jnp.asarray(np.where(data.wrong, -_CERTAIN, _CERTAIN), jnp.float32)}

    outcomes = {NONE: tools.test(params, tools.fine_tune(params, data, rates, 10 * LONGEST), data)}
    equal, tuned = pretrain(f"{here}/{EQUAL}", hg.BilevelParams(params, even), data, key, rates)
    outcomes[EQUAL] = tools.test(equal.params, tuned, data)
    learned, tuned = pretrain(f"{here}/{JOINT}", hg.BilevelParams(params, even), data, key)
    weights = np.asarray(jax.nn.sigmoid(learned.hyperparams["weights"]))
    outcomes[JOINT] = tools.test(learned.params, tuned, data, weights)
    rate = jnp.exp(learned.hyperparams["rate"])[None]
    again, tuned = pretrain(f"{here}/{RETRAINED}", hg.BilevelParams(fresh, learned.hyperparams), data, key, rate)
    outcomes[RETRAINED] = tools.test(again.params, tuned, data, weights)
    ideal, tuned = pretrain(f"{here}/{ORACLE}", hg.BilevelParams(params, oracle), data, key, rates)
    return outcomes | {ORACLE: tools.test(ideal.params, tuned, data)}


def _descend(losses: Losses, params: Any, split: Split, rate: Any) -> Any:
    gradient = jax.grad(lambda params: losses(params, split)[0].mean())(params)
    return jax.tree.map(lambda w, g: w - rate * g, params, gradient)
