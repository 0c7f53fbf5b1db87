"""Learning-rate schedules from short windows, with and without the bias of a short horizon.

    w_{t+1} = w_t − α_t m_t,   log α_t = (1 − s_t) a + s_t b,   s_t = ⌊t/K⌋ / (T/K − 1),   T = 300, K = 10

A small network trains on digits for T steps of SGD with momentum, on batches of 8. The hyperparameters are a and b, the
logarithms of the first and the last rate. On such batches a small rate lowers the loss at once and a large one pays
later, so an estimate that sees no further than its window learns rates that fall too fast.

    python -m experiments.short_horizon [--seeds 5] [--quick] [--out experiments/results]

Rows, with equal budgets counted in gradients of the training loss on a batch:

    PES                  ``hg.evolution(persistent=True, horizon=T)``, windows of K      2 pairs + 1 per step
    persistent forward   ``hg.forward(persistent=True, horizon=T)``, windows of K        1 + 2 per hyperparameter
    truncated ES         ``hg.evolution``, windows of K                                  2 pairs + 1
    truncated reverse    ``hg.unrolled``, windows of K                                   4
    whole run, reverse   ``hg.unrolled``, windows of T                                   5: two levels of checkpoints
    grid                 17 × 17 values of (a, b), two runs each                         1
    start                the constant rate from which the learned rows start

The learned rows lower the validation loss at the end of each window, on batches of 100 that the budget does not count;
the weights start afresh after T steps. The rate of Adam, which falls by a cosine, is the best of five for each row on
five other seeds. The grid takes the least validation loss after T steps. A schedule is judged by fresh weights and
fresh batches: the losses on all validation and on all test examples after T steps, means of 16 runs. Writes
``short_horizon.json``, ``.md`` and ``.png``.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import hypergrad as hg
from experiments.common import results
from experiments.common.datasets import Split, Splits, load

STEPS, WINDOW, BATCH, OUTER_BATCH, HIDDEN = 300, 10, 8, 100, 16
PAIRS, SIGMA, START = 4, 0.1, 0.005
OUTER_RATES = 0.001, 0.003, 0.01, 0.03, 0.1
Weights = dict[str, jax.Array]


def fresh(key: jax.Array) -> Weights:
    """Return new weights."""
    keys = jax.random.split(key)
    draw = lambda key, a, b: np.sqrt(2 / a) * jax.random.normal(key, (a, b))  # noqa: E731
    hidden = {"w0": draw(keys[0], 64, HIDDEN), "b0": jnp.zeros(HIDDEN)}
    return hidden | {"w1": draw(keys[1], HIDDEN, 10), "b1": jnp.zeros(10)}


def cross_entropy(weights: Weights, batch: Split) -> jax.Array:
    """Return the mean over the batch."""
    logits = jax.nn.relu(batch.x @ weights["w0"] + weights["b0"]) @ weights["w1"] + weights["b1"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()


def optimizer(log_rates: jax.Array) -> optax.GradientTransformation:
    """Return SGD with momentum, whose rate goes from the first to the last, the same for each step of a window."""

    def rate(count: jax.Array) -> jax.Array:
        part = (count // WINDOW) / (STEPS // WINDOW - 1)
        return jnp.exp((1 - part) * log_rates[0] + part * log_rates[1])

    return optax.sgd(rate, momentum=0.9)


class Row(NamedTuple):
    """An estimator, its window, and the gradients that count for an inner step."""

    estimator: hg.Estimator
    window: int
    cost: int


def loss(weights: Weights, log_rates: jax.Array, batch: Split, key: Any) -> jax.Array:
    """Return the loss in the form that a problem takes."""
    del log_rates, key
    return cross_entropy(weights, batch)


PROBLEM = hg.BilevelProblem(loss, loss)
EVOLUTION = functools.partial(hg.evolution, PROBLEM, sigma=SIGMA, num_pairs=PAIRS)
ROWS = {
    "PES": Row(EVOLUTION(persistent=True, horizon=STEPS), WINDOW, 2 * PAIRS + 1),
    "persistent forward": Row(hg.unrolled(PROBLEM, hg.forward(persistent=True, horizon=STEPS)), WINDOW, 5),
    "truncated ES": Row(EVOLUTION(), WINDOW, 2 * PAIRS + 1),
    "truncated reverse": Row(hg.unrolled(PROBLEM), WINDOW, 4),
    "whole run, reverse": Row(hg.unrolled(PROBLEM), STEPS, 5),
}


class Size(NamedTuple):
    """How large it is: the budget in gradients, values of a and of b, runs of a judgement, seeds to choose rates on."""

    budget: int = 180_000
    grid: int = 17
    runs: int = 16
    tuning_seeds: int = 5
    rows: tuple[str, ...] = tuple(ROWS)


QUICK = Size(6_000, 3, 2, 1, ("PES", "truncated reverse"))


def outer_steps(name: str, size: Size) -> int:
    """Return how many the budget pays."""
    return size.budget // (ROWS[name].cost * ROWS[name].window)


@functools.partial(jax.jit, static_argnums=(0, 1))
def learn(name: str, size: Size, outer_rate: float, key: jax.Array, data: Splits) -> tuple[jax.Array, jax.Array]:
    """Return the logarithms of the rates after every outer step, and the number of skipped steps."""
    row, steps = ROWS[name], outer_steps(name, size)
    of_driver, of_data = jax.random.split(key)
    schedule = optax.cosine_decay_schedule(1.0, steps, 0.05)
    tx = hg.bilevel(
        row.estimator,
        inner_optimizer=optimizer,
        outer_optimizer=optax.adam(lambda count: outer_rate * schedule(count)),
        window=row.window,
        key=of_driver,
    )
    start = hg.BilevelParams(fresh(of_data), jnp.full(2, np.log(START)))
    blank = tx.init(start)

    def step(carry: Any, count: jax.Array) -> Any:
        variables, state = carry
        of_weights, of_rows, of_outer = jax.random.split(jax.random.fold_in(of_data, count), 3)
        begins = count % (STEPS // row.window) == 0
        weights = optax.tree.where(begins, fresh(of_weights), variables.params)
        state = state._replace(inner=optax.tree.where(begins, blank.inner, state.inner))
        inner = jax.random.randint(of_rows, (row.window, BATCH), 0, len(data.train.y))
        outer = jax.random.randint(of_outer, (OUTER_BATCH,), 0, len(data.valid.y))
        batches = {
            "inner_batch": hg.IndexedBatch(data.train, inner),
            "outer_batch": jax.tree.map(lambda x: x[outer], data.valid),
        }
        variables = hg.BilevelParams(weights, variables.hyperparams)
        updates, state = tx.update(None, state, variables, **batches)
        variables = optax.apply_updates(variables, updates)
        return (variables, state), variables.hyperparams

    (_, state), path = jax.lax.scan(step, (start, blank), jnp.arange(steps))
    return path, state.info.num_skipped


@functools.partial(jax.jit, static_argnums=3)
def judge(log_rates: jax.Array, key: jax.Array, data: Splits, runs: int) -> tuple[jax.Array, jax.Array]:
    """Return the validation and the test loss after a training of T steps, the means over runs from fresh weights."""
    tx = optimizer(log_rates)

    def run(key: jax.Array) -> Any:
        begin, order = jax.random.split(key)
        weights = fresh(begin)

        def step(carry: Any, rows: jax.Array) -> Any:
            weights, state = carry
            grads = jax.grad(cross_entropy)(weights, jax.tree.map(lambda x: x[rows], data.train))
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(weights, updates), state), None

        rows = jax.random.randint(order, (STEPS, BATCH), 0, len(data.train.y))
        (weights, _), _ = jax.lax.scan(step, (weights, tx.init(weights)), rows)
        return cross_entropy(weights, data.valid), cross_entropy(weights, data.test)

    return jax.tree.map(jnp.mean, jax.vmap(run)(jax.random.split(key, runs)))


@functools.partial(jax.jit, static_argnums=2)
def grid(key: jax.Array, data: Splits, size: Size) -> tuple[jax.Array, jax.Array]:
    """Return the points, and the validation loss after T steps at each, the mean of two runs."""
    axes = jnp.linspace(np.log(1e-3), 0.0, size.grid), jnp.linspace(np.log(1e-4), 0.0, size.grid)
    points = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    return points, jax.lax.map(lambda point: judge(point, key, data, 2)[0], points)


def mean_losses(name: str, size: Size) -> dict[float, float]:
    """Return the validation loss for every outer rate, the mean over seeds that the result does not use."""
    losses: dict[float, list[float]] = {rate: [] for rate in OUTER_RATES}
    for seed in range(size.tuning_seeds):
        of_learning, of_judge = jax.random.split(jax.random.key(seed))
        data = load("digits", seed, 1000)
        for rate, found in losses.items():
            end = learn(name, size, rate, of_learning, data)[0][-1]
            found.append(float(judge(end, of_judge, data, size.runs)[0]))
    return {rate: float(np.nan_to_num(np.mean(found), nan=np.inf)) for rate, found in losses.items()}


def run(seeds: int, size: Size) -> dict[str, Any]:
    """Return the record: of each row the seeds' schedules and losses."""
    found: dict[str, Any] = {}
    map_of_losses: dict[str, Any] = {}
    for name in (*size.rows, "grid", "start"):
        begun = time.perf_counter()
        row: dict[str, Any] = {"rates": [], "valid": [], "test": [], "skipped": 0, "gradients": size.budget}
        if name in ROWS:
            tuning = mean_losses(name, size)
            row |= {
                "outer_steps": outer_steps(name, size),
                "tuning": tuning,
                "outer_rate": min(OUTER_RATES, key=tuning.__getitem__),
            }
        for seed in range(size.tuning_seeds, size.tuning_seeds + seeds):
            of_learning, of_judge = jax.random.split(jax.random.key(seed))
            data = load("digits", seed, 1000)
            if name in ROWS:
                path, skipped = learn(name, size, row["outer_rate"], of_learning, data)
                end, row["skipped"] = path[-1], row["skipped"] + int(skipped)
                if seed == size.tuning_seeds:
                    row["path"] = np.exp(np.asarray(path[:: max(1, len(path) // 50)])).round(5).tolist()
            elif name == "grid":
                points, losses = grid(of_learning, data, size)
                end, row["gradients"] = points[jnp.nanargmin(losses)], 2 * STEPS * len(points)
                if seed == size.tuning_seeds:
                    shown = np.exp(points).round(6), np.asarray(losses, float).round(4)
                    map_of_losses = dict(zip(("points", "losses"), (x.tolist() for x in shown), strict=True))
            else:
                end, row["gradients"] = jnp.full(2, np.log(START)), 0
            valid, test = judge(end, of_judge, data, size.runs)
            row["rates"].append(np.exp(end).tolist())
            row["valid"].append(float(valid))
            row["test"].append(float(test))
        found[name] = row
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    return {"rows": found, "grid": map_of_losses}


def report(record: dict[str, Any]) -> str:
    """Return the table."""

    def spread(values: Sequence[float]) -> str:
        error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{error}"

    head = ("schedule", "outer steps", "gradients", "first rate", "last rate", "validation loss", "test loss")
    lines = [head, ("---",) * len(head)]
    for name, row in record["rows"].items():
        rates = np.exp(np.log(row["rates"]).mean(axis=0))
        steps = f"{row['outer_steps']:,}" if "outer_steps" in row else ""
        shown = [f"{rate:.2g}" for rate in rates]
        lines.append((name, steps, f"{row['gradients']:,}", *shown, spread(row["valid"]), spread(row["test"])))
    rows = record["rows"]
    ratios = np.asarray(rows["PES"]["valid"]) / np.asarray(rows["truncated reverse"]["valid"])
    ratio = np.mean(rows["PES"]["valid"]) / np.mean(rows["truncated reverse"]["valid"])
    tuned = [(name, row) for name, row in rows.items() if "tuning" in row]
    chosen = [("rate of Adam", *(f"{rate:g}" for rate in OUTER_RATES)), ("---",) * (1 + len(OUTER_RATES))]
    chosen += [(name, *(f"{loss:.3f}" for loss in row["tuning"].values())) for name, row in tuned]
    return "\n".join(
        [
            "# Schedules without the bias of short windows",
            "",
            f"Losses after {STEPS} steps, mean ± standard error over {len(ratios)} seeds; rates: geometric means.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"Validation loss of PES to that of truncated reverse: {ratio:.3f}; "
            f"by seed {ratios.min():.3f} to {ratios.max():.3f}.",
            f"Skipped outer steps: {sum(row['skipped'] for row in rows.values())}.",
            "",
            "Validation loss by the rate of Adam, on the seeds that choose it:",
            "",
            *(f"| {' | '.join(line)} |" for line in chosen),
            "",
        ]
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw where the rows go, over the losses of the grid, first seed; and losses of all seeds."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    points, losses = np.asarray(record["grid"]["points"]), np.asarray(record["grid"]["losses"])
    side = round(len(losses) ** 0.5)
    a, b, z = (x.reshape(side, side) for x in (*points.T, np.nan_to_num(losses, nan=10.0).clip(0.0, 2.5)))
    shades = left.contourf(a, b, z, levels=np.geomspace(0.2, 2.5, 12), cmap="Greys", extend="both")
    figure.colorbar(shades, ax=left, format="%.2f", label="validation loss after a run")
    for place, (name, row) in enumerate(record["rows"].items()):
        right.plot(row["valid"], [place] * len(row["valid"]), "o", ms=4, color=f"C{place}")
        if "path" in row:
            left.plot(*np.asarray(row["path"]).T, lw=1.5, color=f"C{place}", label=name)
            left.plot(*row["rates"][0], "o", color=f"C{place}")
    left.set(xscale="log", yscale="log", xlabel="first rate", ylabel="last rate", xlim=(1e-3, 1.0), ylim=(1e-4, 1.0))
    figure.legend(fontsize="small", loc="outside upper center", ncols=5, frameon=False)
    right.set(xlabel="validation loss after a run, by seed")
    right.set_yticks(range(len(record["rows"])), list(record["rows"]))
    right.invert_yaxis()
    figure.savefig(path, dpi=95, pil_kwargs={"optimize": True})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rows, few steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    record = run(args.seeds, QUICK if args.quick else Size())
    results.write(args.out, "short_horizon", record, report(record), draw)
    print(report(record))
    return record


if __name__ == "__main__":
    main()
