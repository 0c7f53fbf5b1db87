"""Learn a learning rate for every step of training, by differentiating through the whole run.

    inner:  w_K(α) = K steps of momentum SGD from a random start, step i at rate αᵢ, minibatches in random order
    outer:  min_α  E CE(w_K(α); validation split), over starts and orders      Adam on the hypergradient, log rates

The table also has the best constant rate and the best cosine of small grids, and the best of a wide grid over peak,
warm-up and final rate that may spend as many gradients as learning does: on a problem this small, a strong rival to
one learned rate per step. So rates are learned one per step and array of weights too, where no grid follows. All train
for K steps, are chosen on the validation split, and are judged on starts and orders that none was chosen on; the test
split is read once, at the end. A schedule gains most over a constant rate in short runs with small batches; with
``--steps 200 --batch 25`` expect less. Settings are chosen for digits: Fashion-MNIST takes them as they are.

    python -m experiments.learning_rate                                            # scikit-learn digits
    HYPERGRAD_DATA=... python -m experiments.learning_rate --data fashion_mnist

Reference: Maclaurin, Duvenaud & Adams, Gradient-based hyperparameter optimization through reversible learning,
arXiv 1502.03492.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments.common import datasets, progress
from experiments.learning_rate import fixed_schedule, report
from experiments.learning_rate.fixed_schedule import PRICE, Runs, Settings
from experiments.learning_rate.report import CONSTANT, COSINE, LEARNED, LEARNED_EACH, WIDE, Outcome

# Chosen on digits, on seeds 10 to 13, which are not reported, by the validation loss of runs held out.
DEFAULTS = Settings()
LOOKS = 20  # points of a loss curve


def outer_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Return Adam on clipped hypergradients, at a rate that ebbs away so that their noise averages out."""
    rate = optax.cosine_decay_schedule(settings.outer_rate, settings.outer_steps)
    return optax.chain(optax.clip_by_global_norm(settings.clip), optax.adam(rate))


@functools.partial(jax.jit, static_argnums=0)
def outer_step(settings: Settings, log_rates: Any, state: Any, runs: Runs, splits: datasets.Splits) -> Any:
    """Improve the schedule by the mean hypergradient over the runs that have a finite one."""
    problem = hg.reparameterize(fixed_schedule.make_problem(settings), hg.bijectors.exp())
    # K copies of so small a network fit: with one checkpoint a step there is no third forward pass.
    estimator = hg.unrolled(problem, hg.reverse(checkpoint_every=1))
    hypergrad_fn = hg.value_and_hypergrad(estimator, fixed_schedule.inner_optimizer)

    def one(run: Runs) -> tuple[jax.Array, Any, jax.Array]:
        batches = hg.IndexedBatch(splits.train, run.indices)
        (loss, gradient), info = hypergrad_fn(run.params, log_rates, batches, splits.valid, key=None)
        return loss, gradient, info.skipped

    losses, gradients, skipped = jax.vmap(one)(runs)
    kept = jnp.maximum(1, (~skipped).sum())
    gradient = jax.tree.map(lambda each: jnp.where(skipped[:, None], 0.0, each).sum(0) / kept, gradients)
    updates, state = outer_optimizer(settings).update(gradient, state, log_rates)
    figures = {"outer_loss": losses.mean(), "hypergrad_norm": optax.tree.norm(gradient), "skipped": skipped.sum()}
    return optax.apply_updates(log_rates, updates), state, figures


def learn(
    settings: Settings, name: str, like: Any, splits: datasets.Splits, key: jax.Array, shown: progress.Progress
) -> Any:
    """Return learned rates: (K,) for each leaf of ``like``; the run is shown by its name."""
    start = jax.tree.map(lambda _: jnp.full(settings.steps, settings.start), like)
    log_rates = hg.unconstrain(hg.bijectors.exp(), start)
    state = outer_optimizer(settings).init(log_rates)
    shown.bar.set_description(name)
    for step in range(settings.outer_steps):
        runs = fixed_schedule.draw(settings, settings.runs, splits.train.x, jax.random.fold_in(key, step))
        log_rates, state, figures = outer_step(settings, log_rates, state, runs, splits)
        shown.look(name, step + 1, advance=settings.runs * PRICE * settings.steps, **figures)
    return jax.tree.map(np.asarray, hg.constrain(hg.bijectors.exp(), log_rates))


def compare(settings: Settings, splits: datasets.Splits, seed: int, shown: progress.Progress) -> dict[str, Outcome]:
    """Return every method's outcome on one seed, by the name of its row."""
    # The rbg generator compiles three times faster than the default one.
    drawing, learning, subset = jax.random.split(jax.random.key(seed, impl="rbg"), 3)
    splits = splits._replace(valid=datasets.draw(splits.valid, settings.valid, subset))
    runs = fixed_schedule.draw(settings, settings.chosen_on + settings.held_out, splits.train.x, drawing)
    seen, unseen = (
        jax.tree.map(lambda x, part=part: x[part], runs)
        for part in (slice(settings.chosen_on), slice(settings.chosen_on, None))
    )
    budget = settings.outer_steps * settings.runs * PRICE * settings.steps
    points = budget // (settings.chosen_on * settings.steps)
    grids = {
        CONSTANT: fixed_schedule.constants(settings),
        COSINE: fixed_schedule.cosines(settings),
        WIDE: fixed_schedule.wide_grid(settings, points),
    }
    prices = {name: len(grid) * settings.chosen_on * settings.steps for name, grid in grids.items()}
    shown.bar.total = settings.seeds * (sum(prices.values()) + 2 * budget)
    found = {}
    for name, grid in grids.items():
        found[name] = (fixed_schedule.best(settings, f"seed {seed}/{name}", grid, seen, splits, shown), prices[name])
    for name, like in {LEARNED: 0, LEARNED_EACH: runs.params}.items():
        found[name] = (learn(settings, f"seed {seed}/{name}", like, splits, learning, shown), budget)

    def outcome(rates: Any, gradients: int) -> Outcome:
        # One structure for all methods: one compilation.
        each = jax.tree.map(lambda _: rates, runs.params) if isinstance(rates, np.ndarray) else rates

        def loss(stop: float) -> float:
            # A rate of zero leaves the weights where they are: the loss of a run that stops early.
            cut = jax.tree.map(lambda x: np.where(np.arange(settings.steps) < stop, x, np.float32(0)), each)
            return float(fixed_schedule.judge(settings, cut, unseen, splits.train, splits.valid)[0])

        curve = [(stop, loss(stop)) for stop in np.linspace(0, settings.steps, LOOKS + 1).round().tolist()]
        test_loss, test_error = fixed_schedule.judge(settings, each, unseen, splits.train, splits.test)
        return Outcome(rates, gradients, curve, float(test_loss), float(test_error))

    return {name: outcome(*each) for name, each in found.items()}


def main(argv: Sequence[str] | None = None) -> report.Results:
    """Run the comparison, print the table, draw the picture; return the table's rows by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion_mnist"], default="digits")
    parser.add_argument("--seeds", type=int, help="runs of the comparison, each with its own split")
    parser.add_argument("--steps", type=int, help="K, steps of every training run")
    parser.add_argument("--batch", type=int, help="examples a step")
    parser.add_argument("--outer-steps", type=int, help="steps of learning")
    parser.add_argument("--hidden", type=int, help="width of the hidden layer")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for learning_rate.png")
    progress.add_argument(parser)
    args = parser.parse_args(argv)
    settings = DEFAULTS._replace(**{k: v for k, v in vars(args).items() if k in Settings._fields and v is not None})
    with progress.progress(settings.seeds, unit="gradient", log=args.log, unit_scale=True) as shown:
        outcomes = [compare(settings, datasets.load(args.data, seed), seed, shown) for seed in range(settings.seeds)]
    results = report.collect(outcomes)
    picture = args.out / "learning_rate.png"
    report.draw(outcomes, f"{settings.steps} learned learning rates, one per step ({args.data})", picture)
    print(f"\n{report.table(results)}\n\n{report.summary(results)}\n\npicture: {picture}")
    return results
