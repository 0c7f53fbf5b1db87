"""Learn one weight decay for every weight of a network, by implicit differentiation.

    inner:  w*(c) = argmin_w  CE(w; training split) + ½ Σᵢ cᵢ wᵢ²        Adam
    outer:  min_c  CE(w*(c); validation split)                           Adam on the implicit hypergradient

The table also has no decay, the best single decay of a grid, one learned decay per layer, retraining from scratch with
the learned decays held fixed, and training on train + validation; the test split is read once, at the end.

    python -m experiments.weight_decay                                            # scikit-learn digits
    HYPERGRAD_DATA=... python -m experiments.weight_decay --data fashion_mnist    # 1.9 million hyperparameters

Reference: Lorraine, Vicol & Duvenaud, Optimizing millions of hyperparameters by implicit differentiation,
arXiv 1911.02590.
"""

import argparse
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
from jax import lax

import hypergrad as hg
from experiments.common import datasets, progress
from experiments.common.progress import chunks
from experiments.weight_decay import comparison, fixed_decay, report
from experiments.weight_decay.fixed_decay import Run, Settings


class MLP(nn.Module):
    """Two hidden layers of the same width."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (n, classes)."""
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(datasets.NUM_CLASSES)(x)


# Digits, and the outer steps of Fashion-MNIST: chosen for one decay per weight on other seeds, by the loss on a quarter
# of the validation split that was kept from the hypergradient. The rest of Fashion-MNIST is chosen for a short run.
DEFAULTS = {
    "digits": Settings(hidden=64, steps=1000, batch=1000, outer_rate=0.01, every=10, seeds=3),
    "fashion_mnist": Settings(hidden=1024, steps=500, batch=250, outer_rate=0.05, every=5, seeds=1, full_grid=False),
}


def make_problem(model: MLP) -> hg.BilevelProblem:
    """Return both losses. Decays are one number, one number per layer or one number per weight."""

    def cross_entropy(params: Any, batch: datasets.Split) -> jax.Array:
        logits = model.apply({"params": params}, batch.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()

    def train_loss(params: Any, decay: Any, batch: datasets.Split, _key: Any) -> jax.Array:
        return cross_entropy(params, batch) + hg.penalties.l2(params, decay)

    def valid_loss(params: Any, _decay: Any, batch: datasets.Split, _key: Any) -> jax.Array:
        return cross_entropy(params, batch)

    return hg.BilevelProblem(train_loss, valid_loss)


def make_learner(problem: hg.BilevelProblem, settings: Settings, observe: Callable[..., float]) -> comparison.Learn:
    """Return ``learn(run, params, hyperparams, splits, key)``, which trains weights and decays together."""
    log_interval = hg.bijectors.interval(math.log(settings.low), math.log(settings.high))
    problem = hg.reparameterize(hg.reparameterize(problem, hg.bijectors.exp()), log_interval)
    tx = hg.bilevel(
        hg.implicit(problem),
        inner_optimizer=optax.adam(settings.inner_rate),
        outer_optimizer=optax.adam(settings.outer_rate),
        every=settings.due,
    )

    @jax.jit
    def advance(variables: Any, state: Any, splits: datasets.Splits, key: jax.Array, start: int, stop: int) -> Any:
        def step(i: jax.Array, at: tuple[Any, Any]) -> tuple[Any, Any]:
            variables, state = at
            inner_key, outer_key = jax.random.split(jax.random.fold_in(key, i))
            train_batch = datasets.draw(splits.train, settings.batch, inner_key)
            valid_batch = datasets.draw(splits.valid, settings.batch, outer_key)
            updates, state = tx.update(None, state, variables, inner_batch=train_batch, outer_batch=valid_batch)
            return optax.apply_updates(variables, updates), state

        return lax.fori_loop(start, stop, step, (variables, state))

    def learn(run: str, params: Any, hyperparams: Any, splits: datasets.Splits, key: jax.Array) -> Run:
        variables = hg.BilevelParams(params, hyperparams)
        state, curve, spent = tx.init(variables), [], 0.0
        for start, stop in chunks(settings.steps, settings.look):
            variables, state = advance(variables, state, splits, key, start, stop)
            before, spent = spent, comparison.learning_cost(settings, splits, stop)
            curve.append((spent, observe(run, stop, variables.params, splits, spent - before, state.info)))
        return Run(variables.params, problem.constrain(variables.hyperparams), curve)

    return learn


def main(argv: Sequence[str] | None = None) -> report.Results:
    """Run the comparison, print the table, draw the picture; return the table's rows by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DEFAULTS), default="digits")
    parser.add_argument("--seeds", type=int, help="runs, each with its own split and initialisation")
    parser.add_argument("--steps", type=int, help="inner steps of a learning run")
    parser.add_argument("--hidden", type=int, help="width of both hidden layers")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for weight_decay.png")
    progress.add_argument(parser)
    args = parser.parse_args(argv)
    given = {name: vars(args)[name] for name in ("seeds", "steps", "hidden") if vars(args)[name] is not None}
    settings = DEFAULTS[args.data]._replace(**given)

    model = MLP(settings.hidden)
    problem = make_problem(model)
    # More decays than validation images, on purpose: the retrained rows show what was learned and what overfitted.
    warnings.simplefilter("ignore", hg.OverfittingWarning)
    outcomes = []
    with progress.progress(settings.seeds, unit="gradient", log=args.log, unit_scale=True) as shown:
        tools = fixed_decay.make_tools(model, problem, settings, shown)
        learn = make_learner(problem, settings, tools.observe)
        for seed in range(settings.seeds):
            splits = datasets.load(args.data, seed)
            shown.bar.total = round(settings.seeds * comparison.total_cost(settings, splits))
            outcomes.append(comparison.compare(learn, tools, settings, splits, seed=seed))
    results = report.collect(outcomes)
    picture = args.out / "weight_decay.png"
    title = (
        f"{results['per weight, jointly trained']['hyperparams']:,} learned weight decays, one per weight ({args.data})"
    )
    report.draw(outcomes, settings, title, picture)
    print(f"\n{report.table(results)}\n\n{report.summary(results)}\n\npicture: {picture}")
    return results
