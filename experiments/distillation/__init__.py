"""Distil digits into three learned points, and ask whether the points or the weights hold what was learned.

    inner:  w_T(λ) = T steps of SGD on CE(net(x_j), softmax(y_j)), over three points (x_j, y_j) = λ, images and labels
    outer:  min_λ  CE(w_T(λ); a thousand training images)           unrolled, Adam on the hypergradient

Warm start: a few inner steps from the weights of the outer step before, as joint training does. Cold start: all inner
steps from fresh weights at every outer step. ``hg.diagnostics.retrain`` tests both: the accuracy of the jointly trained
weights is compared with that of weights trained from scratch on the three points as they ended. Points that change can
teach a network ten classes one after the other; what it remembers of that is in the weights, not in the last points.

    python -m experiments.distillation

Reference: Vicol et al., On implicit bias in overparameterized bilevel optimization, arXiv 2212.14032.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import hypergrad as hg
from experiments.common import datasets, progress
from experiments.common.progress import chunks
from experiments.distillation import report

POINTS, TRAIN = 3, 1_000  # learned points, and images of digits that judge them
WARM, COLD = "warm start", "cold start"


class Settings(NamedTuple):
    """How long and how fast; nothing was searched for."""

    seeds: int = 3
    steps: int = 3000  # outer steps
    window: int = 10  # inner steps to an outer one, warm
    restart: int = 100  # T, inner steps to an outer one, cold, and to a retrained start
    rate: float = 0.5
    outer_rate: float = 0.01
    look: int = 250


def predict(params: Any, x: jax.Array) -> jax.Array:
    """Return logits (n, classes) of softmax regression."""
    return x @ params["kernel"] + params["bias"]


def init(key: jax.Array) -> Any:
    """Return fresh weights."""
    kernel = 0.01 * jax.random.normal(key, (64, datasets.NUM_CLASSES))
    return {"kernel": kernel, "bias": jnp.zeros(datasets.NUM_CLASSES)}


def inner_loss(params: Any, points: Any, _batch: Any, _key: Any) -> jax.Array:
    """Return the cross-entropy on the learned points."""
    return optax.softmax_cross_entropy(predict(params, points["x"]), jax.nn.softmax(points["y"])).mean()


def outer_loss(params: Any, _points: Any, batch: datasets.Split, _key: Any) -> jax.Array:
    """Return the cross-entropy on real images."""
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, batch.x), batch.y).mean()


def accuracy(params: Any, batch: datasets.Split) -> jax.Array:
    """Return the share of right answers."""
    return (predict(params, batch.x).argmax(-1) == batch.y).mean()


PROBLEM = hg.BilevelProblem(inner_loss, outer_loss)


def distil(how: str, settings: Settings, train: datasets.Split, seed: int, shown: Any) -> hg.BilevelParams:
    """Return the weights and points that ``settings.steps`` outer steps end with."""
    length = settings.window if how == WARM else settings.restart
    tx = hg.bilevel(
        hg.unrolled(PROBLEM),
        inner_optimizer=optax.sgd(settings.rate),
        outer_optimizer=optax.adam(settings.outer_rate),
        window=length,
    )
    batches = hg.IndexedBatch((), jnp.arange(length))  # the inner problem's data are hyperparameters: batches are empty

    @jax.jit
    def advance(at: Any, start: int, stop: int, key: jax.Array) -> Any:
        def step(i: jax.Array, at: tuple[Any, Any]) -> tuple[Any, Any]:
            variables, state = at
            if how == COLD:
                variables = variables._replace(params=init(jax.random.fold_in(key, i)))
            updates, state = tx.update(None, state, variables, inner_batch=batches, outer_batch=train)
            return optax.apply_updates(variables, updates), state

        return lax.fori_loop(start, stop, step, at)

    key = jax.random.key(seed)
    points = {"x": train.x[:POINTS], "y": jnp.zeros((POINTS, datasets.NUM_CLASSES))}
    variables = hg.BilevelParams(init(key), jax.tree.map(jnp.copy, points))
    at = variables, tx.init(variables)
    for start, stop in chunks(settings.steps, settings.look):
        at = advance(at, start, stop, key)
        shown.look(f"seed {seed}/{how}", stop, at[1].info, advance=stop - start)
    return at[0]


def main(argv: Sequence[str] | None = None) -> dict[str, list[hg.diagnostics.Retrained]]:
    """Distil warm and cold, retrain both, print the table, draw the picture; return each seed's tests by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=Settings().seeds, help="cuts of the digits, and first weights")
    parser.add_argument("--steps", type=int, default=Settings().steps, help="outer steps")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for distillation.png")
    progress.add_argument(parser)
    args = parser.parse_args(argv)
    settings = Settings(seeds=args.seeds, steps=args.steps)
    results: dict[str, list[hg.diagnostics.Retrained]] = {WARM: [], COLD: []}
    points: dict[str, np.ndarray] = {}
    with progress.progress(2 * settings.seeds * settings.steps, unit="outer step", log=args.log) as shown:
        for seed in range(settings.seeds):
            splits = datasets.load("digits", seed, train=TRAIN)
            for how, tests in results.items():
                found = distil(how, settings, splits.train, seed, shown)
                points.setdefault(how, np.asarray(found.hyperparams["x"]))
                length = settings.steps * settings.window if how == WARM else settings.restart
                options = {"inner_optimizer": optax.sgd(settings.rate), "num_steps": length, "key": seed}
                tests.append(hg.diagnostics.retrain(PROBLEM, found, init, (), splits.test, score=accuracy, **options))
    report.draw(results, points, args.out / "distillation.png")
    print(f"\n{report.table(results)}")
    print(f"\nretraining after the last warm run:\n{results[WARM][-1]}\n\npicture: {args.out / 'distillation.png'}")
    return results
