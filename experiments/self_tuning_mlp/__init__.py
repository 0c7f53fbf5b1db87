"""Tune five hyperparameters of an MLP in one training run, through which nothing differentiates: by self-tuning.

    train:  weights  ← Adam on CE(net(noise and dropout at r(λ)); labels smoothed at r(λ))
            response ← Adam on the same at r(λ + σε), one ε an example, linear in the response        (Delta-STN)
    every few steps:  λ ← Adam on CE(net without noise; validation batch), through the response

λ: three dropout rates, the input's noise, label smoothing. The model is an ordinary Flax module; what makes it tune
itself is in ``self_tune``. The table also has none of them, their first and their last values, held fixed for as many
gradients. The lowest validation loss of a run chooses its weights; the test split is read once, at the end.

    python -m experiments.self_tuning_mlp                                            # scikit-learn digits
    HYPERGRAD_DATA=... python -m experiments.self_tuning_mlp --data fashion_mnist

Reference: Bae & Grosse, Delta-STN, arXiv 2010.13514; MacKay et al., Self-tuning networks, arXiv 1903.03088.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax

import hypergrad as hg
from experiments.common import datasets, progress
from experiments.self_tuning_mlp import run
from experiments.self_tuning_mlp.report import NONE, START, STOP, TUNED, Run, draw, table
from hypergrad.noise import HyperDropout, gaussian_noise, smooth_labels


class MLP(nn.Module):
    """Two hidden layers, dropout before every layer; its rates are variables of the collection "hyper"."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return logits (n, classes)."""
        x = nn.relu(nn.Dense(self.hidden)(HyperDropout(name="input")(x, deterministic=not train)))
        x = nn.relu(nn.Dense(self.hidden)(HyperDropout(name="hidden_1")(x, deterministic=not train)))
        return nn.Dense(datasets.NUM_CLASSES)(HyperDropout(name="hidden_2")(x, deterministic=not train))


class Settings(NamedTuple):
    """How long and how fast. Chosen on Fashion-MNIST with seeds 100 to 102, that are not reported."""

    hidden: int = 128
    steps: int = 2000  # inner steps of a run that tunes itself
    batch: int = 64
    rate: float = 1e-3  # Adam's, for the weights
    response_rate: float = 3e-3
    outer_rate: float = 0.03
    outer_batch: int = 64
    scale: float = 1.0  # σ, in units of λ
    every: int = 5  # inner steps an outer step
    warmup: int = 200  # inner steps before the first outer one
    looks: int = 60  # at the validation loss, in a run
    begin: float = 0.25  # first values, as a share of their interval

    def gradients(self, steps: int, inner: int = 3) -> int:
        """Return the cost of a run that tunes itself: 3 gradients an inner step, 2 of its own batch an outer one."""
        outer = max(0, steps // self.every - self.warmup // self.every)
        return inner * steps + -(-2 * outer * self.outer_batch // self.batch)


RATES = {place: {"rate": 0.8} for place in ("input", "hidden_1", "hidden_2")}  # as the collection "hyper" has them
HIGH = {"dropout": RATES, "noise": 0.5, "smoothing": 0.2}
BOUNDS = jax.tree.map(lambda high: hg.bijectors.interval(0.0, high), HIGH)


def make_problem(model: MLP) -> hg.BilevelProblem:
    """Return both losses, over constrained hyperparameters like ``HIGH``: one number each, or one an example."""

    def train_loss(params: Any, hyperparams: Any, batch: datasets.Split, key: jax.Array) -> jax.Array:
        noise_key, mask_key = jax.random.split(key)
        x = gaussian_noise(noise_key, batch.x, hyperparams["noise"])
        variables = {"params": params, "hyper": hyperparams["dropout"]}
        logits = model.apply(variables, x, train=True, rngs={"dropout": mask_key})
        targets = smooth_labels(batch.y, datasets.NUM_CLASSES, hyperparams["smoothing"])
        return optax.softmax_cross_entropy(logits, targets).mean()

    def valid_loss(params: Any, _hyperparams: Any, batch: datasets.Split, _key: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch.x, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()

    return hg.BilevelProblem(train_loss, valid_loss)


def self_tune(problem: hg.BilevelProblem, settings: Settings, variant: Any = None) -> tuple[hg.BilevelProblem, Any]:
    """Return the problem with layers that respond to the hyperparameters, and the optimizer of everything."""
    problem = hg.reparameterize(problem, BOUNDS)
    problem = hg.responses.self_tuning(problem, variant=variant or hg.responses.delta_stn(), per_example=True)
    problem = hg.responses.perturbed(problem, scale=settings.scale)
    inner = {"weights": optax.adam(settings.rate), "response": optax.adam(settings.response_rate)}
    tx = hg.bilevel(
        hg.direct(problem),
        inner_optimizer=optax.partition(inner, hg.responses.optimizer_labels),
        outer_optimizer=optax.adam(settings.outer_rate),
        every=lambda n: (n > settings.warmup) & (n % settings.every == 0),
    )
    return problem, tx


def compare(name: str, settings: Settings, seed: int, shown: progress.Progress) -> dict[str, Run]:
    """Run every method once, from the same weights; return the runs by name."""
    splits, key, model = datasets.load(name, seed), jax.random.key(seed), MLP(settings.hidden)
    plain = make_problem(model)
    tuned, tx = self_tune(plain, settings)
    params = jax.jit(lambda key, x: model.init(key, x, train=False)["params"])(key, splits.train.x[:1])
    begin = jax.tree.map(lambda high: settings.begin * high, HIGH)
    hyperparams = hg.unconstrain(BOUNDS, begin)
    response = hg.responses.init(tuned, key, params, hyperparams, datasets.draw(splits.train, settings.batch, key))
    variables = hg.BilevelParams(response, hyperparams)
    begin_tuning, tuning = run.tuning_itself(tuned, model, tx, (settings.batch, settings.outer_batch))
    begin_fixed, fixed = run.held_fixed(plain, model, optax.adam(settings.rate), settings.batch)
    cost, here = settings.gradients(settings.steps), f"seed {seed}"
    rest, tuned_at = (settings.looks, cost, shown), begin_tuning(variables, key)
    found = {TUNED: run.follow(f"{here}/{TUNED}", tuning, tuned_at, splits, key, settings.steps, *rest)}
    fixed_at = {NONE: jax.tree.map(lambda _: 0.0, HIGH), START: begin, STOP: found[TUNED].values[-1]}
    for which, values in fixed_at.items():
        found[which] = run.follow(f"{here}/{which}", fixed, begin_fixed(params, values), splits, key, cost, *rest)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the comparison, print the table, draw the picture; return the table's rows by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion_mnist"], default="digits")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the first weights and all noise")
    parser.add_argument("--steps", type=int, default=Settings().steps, help="inner steps of the run that tunes itself")
    parser.add_argument("--hidden", type=int, default=Settings().hidden, help="width of both hidden layers")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for self_tuning_mlp.png")
    progress.add_argument(parser)
    args = parser.parse_args(argv)
    settings = Settings(steps=args.steps, hidden=args.hidden, warmup=args.steps // 10)
    with progress.progress(4 * settings.looks, unit="look", log=args.log) as shown:
        runs = compare(args.data, settings, args.seed, shown)
    picture = args.out / "self_tuning_mlp.png"
    draw(runs, f"an MLP that tunes itself ({args.data})", picture)
    results = {which: one.row() for which, one in runs.items()}
    print(f"\n{table(results)}\n\npicture: {picture}")
    return results
