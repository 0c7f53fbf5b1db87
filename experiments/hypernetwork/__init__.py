"""Learn thousands of weight decays by hyper-training: a hypernetwork learns the weights as a function of them.

    local:   φ ← Adam on mean over ε of CE(w_φ(λ + σε); train) + ½ Σᵢ cᵢ wᵢ²,   c at λ + σε       10 steps, then
             λ ← Adam on CE(w_φ(λ); validation), one gradient through w_φ                          1 step
    global:  the same with λ ~ p in place of λ + σε, for one single decay: w_φ then holds on the whole range

w_φ(λ) = θ + h_φ(λ) are the weights of a softmax regression. For a decay per input or per weight h_φ is linear with a
bottleneck of 10: it learns few directions of λ, those that move the weights most. All of the (small) training split is
one batch, since the noise of smaller ones would hide what a perturbation of a single decay does.

The table also has the first decay held fixed, the best single decay of a grid, and every learned decay held fixed in
training from scratch. Budgets differ: the table counts gradients. Read the retrained rows for what the decays are
worth: weights that were trained under perturbations are regularised by these too. The test split is read once.

    python -m experiments.hypernetwork                                            # scikit-learn digits
    HYPERGRAD_DATA=... python -m experiments.hypernetwork --data mnist            # 7,850 decays

Reference: Lorraine & Duvenaud, Stochastic hyperparameter optimization through hypernetworks, arXiv 1802.09419.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments.common import datasets, progress
from experiments.hypernetwork import report, run
from experiments.hypernetwork.report import EACH, GLOBAL, GRID, START
from experiments.hypernetwork.run import Settings


def make_problem() -> hg.BilevelProblem:
    """Return both losses. Decays are one number, or a tree like the weights with one per input or one per weight."""

    def cross_entropy(params: Any, split: datasets.Split) -> jax.Array:
        logits = split.x @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, split.y).mean()

    def train_loss(params: Any, decay: Any, split: datasets.Split, _key: Any) -> jax.Array:
        return cross_entropy(params, split) + hg.penalties.l2(params, decay)

    def valid_loss(params: Any, _decay: Any, split: datasets.Split, _key: Any) -> jax.Array:
        return cross_entropy(params, split)

    return hg.BilevelProblem(train_loss, valid_loss)


def local(problem: hg.BilevelProblem, settings: Settings) -> hg.BilevelProblem:
    """Put a hypernetwork of rank 10 in, small at first so that it is soon led by what it learns; train it around λ."""
    small = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
    module = lambda size: nn.Sequential([nn.Dense(10, kernel_init=small), nn.Dense(size, kernel_init=small)])  # noqa: E731
    problem = hg.responses.with_response(problem, hg.responses.hypernetwork(module))
    return hg.responses.perturbed(problem, scale=settings.scale, num_samples=settings.samples)


def anywhere(problem: hg.BilevelProblem, settings: Settings) -> hg.BilevelProblem:
    """Put a hypernetwork with 50 hidden units in; train it on uniform log decays: λ ~ Logistic, seen through tanh."""
    unit = hg.responses.Encoding(lambda h: jnp.tanh(h / 2), lambda _: None)
    module = lambda size: nn.Sequential([nn.Dense(50), nn.relu, nn.Dense(size)])  # noqa: E731
    problem = hg.responses.with_response(problem, hg.responses.hypernetwork(module, encoding=unit))
    draw = lambda key, h: jax.random.logistic(key, h.shape)  # noqa: E731
    return hg.responses.sampled(problem, draw, num_samples=settings.samples)


def compare(settings: Settings, splits: datasets.Splits, seed: int, shown: progress.Progress) -> dict[str, Any]:
    """Train everything on one seed's splits; return the runs by name, the grid's under ``GRID``."""
    plain, (low, high) = make_problem(), (math.log(settings.low), math.log(settings.high))
    unconstrained = hg.reparameterize(hg.reparameterize(plain, hg.bijectors.exp()), hg.bijectors.interval(low, high))
    classes, inputs = datasets.NUM_CLASSES, splits.train.x.shape[1]
    params = {"kernel": jnp.zeros((inputs, classes)), "bias": jnp.zeros(classes)}
    train, here = run.with_fixed_decay(plain, settings, shown), f"seed {seed}"

    def learn(name: str, problem: hg.BilevelProblem, hyperparams: Any) -> run.Run:
        rates = {"weights": settings.rate, "response": settings.response_rate}
        inner = {name: run.falling_adam(rate, settings.steps) for name, rate in rates.items()}
        tx = hg.bilevel(
            hg.direct(problem),
            inner_optimizer=optax.partition(inner, hg.responses.optimizer_labels),
            outer_optimizer=run.falling_adam(settings.outer_rate, settings.steps // settings.every),
            every=lambda n: (n > settings.steps // 5) & (n % settings.every == 0),
            key=seed,
        )
        variables = hg.BilevelParams(hg.responses.init(problem, seed, params, hyperparams), hyperparams)
        return run.with_learned_decay(f"{here}/{name}", problem, tx, variables, splits, settings, seed, shown)

    starts = {
        GLOBAL: (anywhere, jnp.zeros(())),
        EACH[0]: (local, {"kernel": jnp.zeros((inputs, 1)), "bias": jnp.zeros(())}),
        EACH[1]: (local, jax.tree.map(jnp.zeros_like, params)),
    }
    decays = np.geomspace(settings.low, settings.high, settings.grid)
    runs: dict[str, Any] = {GRID: [train(f"{here}/{GRID}/{c:.1e}", params, c, splits) for c in decays]}
    runs[START] = train(f"{here}/{START}", params, math.sqrt(settings.low * settings.high), splits)
    for name, (transform, hyperparams) in starts.items():
        runs[name], again = learn(name, transform(unconstrained, settings), hyperparams), report.retrained(name)
        runs[again] = train(f"{here}/{again}", params, runs[name].decay, splits)
    return runs


def main(argv: Sequence[str] | None = None) -> report.Results:
    """Run the comparison, print the table, draw the picture; return the table's rows by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--seeds", type=int, help="runs, each with its own split and initialisation")
    parser.add_argument("--steps", type=int, help="inner steps of every run")
    parser.add_argument("--grid", type=int, help="single decays to compare with")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for hypernetwork.png")
    progress.add_argument(parser)
    args = parser.parse_args(argv)
    given = {name: vars(args)[name] for name in ("seeds", "steps", "grid") if vars(args)[name] is not None}
    settings = Settings()._replace(**given)
    outcomes = []
    total = settings.seeds * settings.steps * (settings.grid + 4 + 3 * settings.samples)
    with progress.progress(total, unit="gradient", log=args.log, unit_scale=True) as shown:
        for seed in range(settings.seeds):
            splits = datasets.load(args.data, seed)
            runs = compare(settings, splits, seed, shown)
            outcomes.append(report.measure(runs, splits, settings))
    results, picture = report.collect(outcomes), args.out / "hypernetwork.png"
    title = f"{results[EACH[1]]['hyperparams']:,} weight decays learned by a hypernetwork ({args.data}, first seed)"
    report.draw(outcomes[0], title, picture)
    print(f"\n{report.table(results)}\n\npicture: {picture}")
    return results
