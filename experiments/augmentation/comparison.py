"""Compare a learned augmentation with its rivals on one seed, all with the same classifier, optimizer and steps.

The decay is the same too, but for the best of several decays without augmentation and its row on all images. Strengths
and decays of a grid are chosen by the loss that stops a run early. ``test`` is read once, for what was chosen.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hypergrad as hg
from experiments.augmentation.training import Data, Run, Settings, Training, run
from experiments.common.datasets import Split

NONE, DECAYS, HAND = "no augmentation", "no augmentation, best of 3 decays", "by hand, best of 5 strengths"
START, JOINT, RETRAINED = "network as it starts", "learned network, jointly trained", "learned network, retrained"
NONE_ON_MORE, HAND_ON_MORE, LEARNED_ON_MORE = (
    f"{name}, on train + valid" for name in ("none", "by hand", "learned network")
)
STRENGTHS, DECAY_FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0), (1.0, 0.3, 3.0)
RUNS = len(STRENGTHS) + len(DECAY_FACTORS) + 6  # a seed


class Outcome(NamedTuple):
    """A row on one seed: its run, images trained on, gradients with those of the search, scores (nats, share)."""

    run: Run
    images: int
    gradients: float
    test_loss: float
    test_error: float


class Tools(NamedTuple):
    """What a comparison calls, compiled once for all seeds.

    Attributes:
      weights: ``weights(key, x) -> params`` of the classifier.
      network: ``network(key, x, key) -> hyperparams``, the first weights of the network.
      judge: ``judge(params, split) -> (cross-entropy, share of wrong answers)``.
      look: that of ``progress``.
      learn: trains the classifier and the network.
      fixed: trains the classifier alone, with a network.
      by_hand: trains the classifier alone, with the recipe at a strength and a decay.
    """

    weights: Callable[..., Any]
    network: Callable[..., Any]
    judge: Callable[[Any, Split], tuple[jax.Array, jax.Array]]
    look: Callable[..., None]
    learn: Training
    fixed: Training
    by_hand: Training


def compare(tools: Tools, settings: Settings, data: Data, *, seed: int) -> dict[str, Outcome]:
    """Return every row's outcome by its name."""
    # The rbg generator compiles three times faster than the default one.
    *keys, batches = jax.random.split(jax.random.key(seed, impl="rbg"), 4)
    x, few, more, steps = data.pool.x[:1], settings.train, len(data.pool.y), settings.steps
    (params, fresh), network = (tools.weights(key, x) for key in keys[:2]), tools.network(keys[2], x, keys[2])
    outcomes: dict[str, Outcome] = {}

    def train(name: str, training: Training, hyperparams: Any, images: int = few, params: Any = params) -> Run:
        def observe(params: Any, taken: int, step: int, info: Any) -> float:
            loss = float(tools.judge(params, data.held)[0])
            tools.look(f"seed {seed}/{name}", step, info, advance=taken, loss=loss)
            return loss

        return run(training, hg.BilevelParams(params, hyperparams), data, images, batches, observe)

    def recipes(name: str, strengths: Sequence[Any], decays: Sequence[Any], images: int = few) -> list[Run]:
        pairs = [{"strength": jnp.float32(s), "decay": jnp.float32(d)} for s in strengths for d in decays]
        return [train(name, tools.by_hand, pair, images) for pair in pairs]

    def note(name: str, runs: Sequence[Run], gradients: float, images: int = few) -> Any:
        best = min(runs, key=lambda one: one.loss)
        loss, error = tools.judge(best.variables.params, data.test)
        outcomes[name] = Outcome(best, images, gradients + len(runs) * steps, float(loss), float(error))
        return best.variables.hyperparams

    decays = [factor * settings.decay for factor in DECAY_FACTORS]
    none, by_hand = recipes(NONE, [0.0], decays), recipes(HAND, STRENGTHS, decays[:1])
    note(NONE, none[:1], 0)
    best_decay, best_strength = note(DECAYS, none, 0)["decay"], note(HAND, by_hand, 0)["strength"]
    note(START, [train(START, tools.fixed, network)], 0)
    search = settings.learning_cost()
    learned = note(JOINT, [train(JOINT, tools.learn, network)], search - steps)
    note(RETRAINED, [train(RETRAINED, tools.fixed, learned, params=fresh)], search)
    note(NONE_ON_MORE, recipes(NONE_ON_MORE, [0.0], [best_decay], more), len(none) * steps, more)
    note(HAND_ON_MORE, recipes(HAND_ON_MORE, [best_strength], decays[:1], more), len(by_hand) * steps, more)
    note(LEARNED_ON_MORE, [train(LEARNED_ON_MORE, tools.fixed, learned, more)], search, more)
    return outcomes
