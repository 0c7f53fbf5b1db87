"""A learning rate for each of 1,000 steps, by gradients of the whole run, against tuned cosines and short windows.

    w_{t+1} = w_t − e^{λ_t} m_t,   t < T = 1000;       min_λ  L_valid(w_T(λ)),   outer Adam on dL_valid/dλ

A network of 2,410 weights (64-32-10, tanh) trains on 1,000 digits, SGD with momentum 0.9, batches of 20. A run is its
first weights and its order of batches.

    python -m experiments.metagradient.schedule [--seeds 5] [--quick] [--out experiments/results]

    one run                 ``hg.metagradient`` of one run, from a constant rate
    one run, from cosine    the same, from the cosine that a grid of 24 × 12 finds on this run
    fresh runs              ``hg.metagradient`` of a new run at every outer step, from a constant rate
    windows of 10           one run; the rates of 10 steps lower the validation loss right after them (``hg.unrolled``)
    cosine, one run         linear warm-up and cosine to 0; peak and warm-up by the least validation loss of this run
    cosine, four runs       the same by the mean of four runs
    start                   the constant rate from which learned rows start

Every learned row has 60 outer steps; its rate of Adam is the best of three on another seed. A grid has as many training
runs as a row learned from a constant rate costs, or more. Losses on all 400 validation and on all test images, after
the run that the schedule was chosen on and after 16 runs with other first weights and orders. Writes
``metagradient_schedule.json``, ``.md`` and ``.png``.

Reference: Engstrom et al., arXiv 2503.13751; Wu et al., Understanding short-horizon bias, arXiv 1803.02021.
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

WINDOW, BATCH, HIDDEN, TRAIN, START = 10, 20, 32, 1000, 0.03
OUTER_RATES = 0.03, 0.1, 0.3
LEARNED = "one run", "one run, from cosine", "fresh runs", "windows of 10"
CHOSEN_ON_A_RUN = "one run", "one run, from cosine", "windows of 10", "cosine, one run"
Weights = dict[str, jax.Array]


class Size(NamedTuple):
    """Inner and outer steps; peaks and warm-ups of the grids on one run, on four, and for a start; judging runs."""

    steps: int = 1000
    outer_steps: int = 60
    grid: tuple[int, int] = (32, 24)
    grid_of_four: tuple[int, int] = (24, 8)
    grid_of_start: tuple[int, int] = (24, 12)
    runs: int = 16


QUICK = Size(100, 10, (6, 2), (3, 1), (6, 2), 2)


def fresh(key: jax.Array) -> Weights:
    """Return the first weights of a run."""
    keys = jax.random.split(jax.random.fold_in(key, 1))
    draw = lambda key, a, b: jax.random.normal(key, (a, b)) / np.sqrt(a)  # noqa: E731
    hidden = {"w0": draw(keys[0], 64, HIDDEN), "b0": jnp.zeros(HIDDEN)}
    return hidden | {"w1": draw(keys[1], HIDDEN, 10), "b1": jnp.zeros(10)}


def batch_of(train: Split, key: jax.Array) -> Split:
    """Return the batch of a step."""
    rows = jax.random.randint(key, (BATCH,), 0, len(train.y))
    return jax.tree.map(lambda x: x[rows], train)


def loss(weights: Weights, _log_rates: Any, batch: Split, _key: Any) -> jax.Array:
    """Return the cross-entropy, the mean over the batch."""
    logits = jnp.tanh(batch.x @ weights["w0"] + weights["b0"]) @ weights["w1"] + weights["b1"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()


def drawn_loss(weights: Weights, log_rates: Any, train: Split, key: jax.Array) -> jax.Array:
    """Return the loss on the batch that the key draws: one compiled run serves every order."""
    return loss(weights, log_rates, batch_of(train, key), None)


def optimizer(log_rates: jax.Array) -> optax.GradientTransformation:
    """Return SGD with momentum, a rate for each step."""
    return optax.sgd(lambda count: jnp.exp(log_rates[count]), momentum=0.9)


def cosine(point: jax.Array, steps: int) -> jax.Array:
    """Return the logarithms of rates that rise for a share of the steps and fall by a cosine."""
    peak, warm_up = point
    part = (jnp.arange(steps) + 0.5) / steps
    rise = part / jnp.maximum(warm_up, 0.5 / steps)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * (part - warm_up) / (1 - warm_up)))
    return jnp.log(peak * jnp.where(part < warm_up, rise, fall))


def batches(train: Split, key: jax.Array, steps: int) -> Split:
    """Return those of all steps, the same as ``hg.metagradient`` draws with this key."""
    of_steps = jax.random.split(key, 5)[0]
    return jax.vmap(lambda i: batch_of(train, jax.random.fold_in(of_steps, i)))(jnp.arange(steps))


@jax.jit
def judge(log_rates: jax.Array, key: jax.Array, data: Splits) -> jax.Array:
    """Return training, validation and test loss after the run of this key."""
    tx, weights = optimizer(log_rates), fresh(key)

    def step(carry: Any, batch: Split) -> Any:
        weights, state = carry
        updates, state = tx.update(jax.grad(loss)(weights, None, batch, None), state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (weights, tx.init(weights)), batches(data.train, key, len(log_rates)))
    return jnp.stack([loss(weights, None, split, None) for split in data])


@jax.jit
def judge_many(log_rates: jax.Array, keys: jax.Array, data: Splits) -> jax.Array:
    """Return the losses, means over runs."""
    return jax.vmap(lambda key: judge(log_rates, key, data))(keys).mean(0)


@functools.partial(jax.jit, static_argnums=(2, 3))
def grid(keys: jax.Array, data: Splits, steps: int, size: tuple[int, int]) -> jax.Array:
    """Return the peak and the warm-up of the least validation loss, the mean over runs."""
    axes = jnp.geomspace(0.01, 1.0, size[0]), jnp.linspace(0.0, 0.5, size[1])
    points = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    losses = jax.lax.map(lambda p: judge_many(cosine(p, steps), keys, data)[1], points, batch_size=12)
    return points[jnp.nanargmin(losses)]


@jax.jit
def window_gradient(log_rates: jax.Array, key: jax.Array, data: Splits) -> tuple[jax.Array, jax.Array]:
    """Return the validation loss at the end of a run, and of each rate the derivative of that after its window."""
    tx = hg.bilevel(
        hg.unrolled(hg.BilevelProblem(loss, loss)),
        inner_optimizer=optimizer,
        outer_optimizer=optax.identity(),
        window=WINDOW,
    )
    start = hg.BilevelParams(fresh(key), log_rates)

    def step(carry: Any, batch: Split) -> Any:
        variables, state, total = carry
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=data.valid)
        weights = optax.apply_updates(variables.params, updates.params)
        return (variables._replace(params=weights), state, total + updates.hyperparams), None

    cut = jax.tree.map(lambda x: x.reshape(-1, WINDOW, *x.shape[1:]), batches(data.train, key, len(log_rates)))
    (variables, _, total), _ = jax.lax.scan(step, (start, tx.init(start), jnp.zeros_like(log_rates)), cut)
    return loss(variables.params, None, data.valid, None), total


class Learner:
    """The learned rows on the data of one seed; the metagradient is compiled once."""

    def __init__(self, seed: int, size: Size) -> None:
        self.size, self.data, self.key = size, load("digits", seed, TRAIN), jax.random.key(seed)
        problem = hg.BilevelProblem(drawn_loss, loss)
        self.settings: dict[str, Any] = {
            "batch_at": lambda _: self.data.train,
            "num_steps": size.steps,
            "segment": size.steps // 10,
            "store": hg.stores.device(10),
        }
        self.gradient = hg.metagradient(problem, optimizer, **self.settings)
        self.plan = hg.metagradient_plan(problem, optimizer, **self.settings)

    def start(self, name: str) -> jax.Array:
        """Return the first schedule."""
        if name == "one run, from cosine":
            return self.cosine(name)
        return jnp.full(self.size.steps, np.log(START))

    def cosine(self, name: str) -> jax.Array:
        """Return the best of a grid."""
        if name == "cosine, four runs":
            keys = jax.vmap(lambda i: jax.random.fold_in(self.key, 1000 + i))(jnp.arange(4))
            return cosine(grid(keys, self.data, self.size.steps, self.size.grid_of_four), self.size.steps)
        size = self.size.grid if name == "cosine, one run" else self.size.grid_of_start
        return cosine(grid(self.key[None], self.data, self.size.steps, size), self.size.steps)

    def learn(self, name: str, outer_rate: float) -> tuple[jax.Array, dict[str, Any]]:
        """Return the schedule after all outer steps, and what was seen on the way."""
        log_rates = self.start(name)
        tx = optax.adam(optax.cosine_decay_schedule(outer_rate, self.size.outer_steps))
        state: Any = tx.init(log_rates)
        seen: dict[str, Any] = {"values": [], "norms": [], "skipped": 0}
        for number in range(self.size.outer_steps):
            key = jax.random.fold_in(self.key, 10_000 + number) if name == "fresh runs" else self.key
            if name == "windows of 10":
                value, gradient = window_gradient(log_rates, key, self.data)
            else:
                (value, gradient), info = self.gradient(fresh(key), log_rates, self.data.valid, key=key)
                seen["norms"].append(info.cotangent_norms.tolist())
            seen["values"].append(float(value))
            if not bool(jnp.isfinite(gradient).all()):
                seen["skipped"] += 1
                continue
            updates, state = tx.update(gradient, state)
            log_rates = jnp.asarray(optax.apply_updates(log_rates, updates))
        return log_rates, seen | {"norms": [seen["norms"][0], seen["norms"][-1]] if seen["norms"] else []}

    def judge(self, name: str, log_rates: jax.Array) -> dict[str, list[float]]:
        """Return training, validation and test losses: after the run chosen on, and after others."""
        keys = jax.vmap(lambda i: jax.random.fold_in(self.key, 100_000 + i))(jnp.arange(self.size.runs))
        own = judge(log_rates, self.key, self.data).tolist() if name in (*CHOSEN_ON_A_RUN, "start") else []
        return {"own": own, "other": judge_many(log_rates, keys, self.data).tolist()}


def tune(size: Size) -> dict[str, dict[float, float]]:
    """Return the validation loss that judges a learned row, for every rate of Adam, on a seed that is not reported."""
    learner, found = Learner(1000, size), {}
    for name in LEARNED:
        part = "other" if name == "fresh runs" else "own"
        losses = [learner.judge(name, learner.learn(name, rate)[0])[part][1] for rate in OUTER_RATES]
        found[name] = {rate: float(np.nan_to_num(x, nan=np.inf)) for rate, x in zip(OUTER_RATES, losses, strict=True)}
    return found


def run(seeds: int, size: Size) -> dict[str, Any]:
    """Return the record: of each row the seeds' losses, and the first seed's schedule."""
    tuning = tune(size)
    rows: dict[str, Any] = {
        name: {"own": [], "other": []} for name in (*LEARNED, "cosine, one run", "cosine, four runs")
    }
    rows["start"] = {"own": [], "other": []}
    cost = 0.0
    for seed in range(seeds):
        begun, learner = time.perf_counter(), Learner(seed, size)
        for name, row in rows.items():
            if name in LEARNED:
                rate = min(tuning[name], key=tuning[name].__getitem__)
                log_rates, seen = learner.learn(name, rate)
                row["outer_rate"], row["skipped"] = rate, row.get("skipped", 0) + seen["skipped"]
                if seed == 0:
                    row |= {"values": seen["values"], "norms": seen["norms"]}
                if name != "windows of 10":
                    row.setdefault("growth", []).append(seen["norms"][-1])
            else:
                log_rates = learner.start(name) if name == "start" else learner.cosine(name)
            if seed == 0:
                row["schedule"] = [float(f"{rate:.4g}") for rate in np.exp(log_rates)]
            for part, losses in learner.judge(name, log_rates).items():
                row[part].append(losses)
        if seed == 0:
            key = learner.key
            plan = learner.plan(fresh(key), learner.start("start"), learner.data.valid, key=key)
            cost = plan.forward_equivalents / plan.num_segments
        print(f"seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
    return {"size": size._asdict(), "rows": rows, "tuning": tuning, "runs_per_metagradient": cost}


def training_runs(record: dict[str, Any], name: str) -> str:
    """Return the cost of a row, in training runs."""
    size = Size(**record["size"])
    cosines = {"cosine, one run": np.prod(size.grid), "cosine, four runs": 4 * np.prod(size.grid_of_four)}
    if name in cosines:
        return f"{cosines[name]:,}"
    runs = size.outer_steps * record["runs_per_metagradient"]
    runs += np.prod(size.grid_of_start) if name == "one run, from cosine" else 0
    return {"start": "0", "windows of 10": ""}.get(name, f"{runs:,.0f}")


def report(record: dict[str, Any]) -> str:
    """Return the tables."""

    def spread(values: Any) -> str:
        error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        return f"{np.mean(values):.4f}{error}"

    rows = record["rows"]
    head = ("schedule", "training runs", "this run: validation", "test", "other runs: validation", "test")
    lines = [head, ("---",) * len(head)]
    for name, row in rows.items():
        own = np.asarray([losses for losses in row["own"] if losses]).reshape(-1, 3)
        shown = [spread(own[:, part]) if len(own) else "" for part in (1, 2)]
        shown += [spread(np.asarray(row["other"])[:, part]) for part in (1, 2)]
        lines.append((name, training_runs(record, name), *shown))
    count = len(rows["start"]["other"])

    def below(name: str, rival: str, part: str, loss: int) -> str:
        lower = sum(a[loss] < b[loss] for a, b in zip(rows[name][part], rows[rival][part], strict=True))
        return f"{lower} of {count}"

    growth = {name: np.asarray(row["growth"]) for name, row in rows.items() if "growth" in row}
    tuned = [("rate of Adam", *(f"{rate:g}" for rate in OUTER_RATES)), ("---",) * (1 + len(OUTER_RATES))]
    tuned += [(name, *(f"{loss:.4f}" for loss in losses.values())) for name, losses in record["tuning"].items()]
    runs = Size(**record["size"]).runs
    return "\n".join(
        [
            "# A learning rate for each step of a whole run",
            "",
            f"Losses after {record['size']['steps']:,} steps, mean ± standard error over {count} seeds. This run: the "
            f"one that the schedule was chosen on. Other runs: {runs} with other first weights and orders of batches.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            "Seeds on which the learned schedule is below a cosine:",
            "",
            f"- one run, cosine of one run, that run: validation {below('one run', 'cosine, one run', 'own', 1)}, "
            f"test {below('one run', 'cosine, one run', 'own', 2)}",
            f"- one run, cosine of one run, other runs: validation {below('one run', 'cosine, one run', 'other', 1)}, "
            f"test {below('one run', 'cosine, one run', 'other', 2)}",
            "- one run, cosine of four runs, other runs: "
            f"validation {below('one run', 'cosine, four runs', 'other', 1)}, "
            f"test {below('one run', 'cosine, four runs', 'other', 2)}",
            "- fresh runs, cosine of four runs, other runs: "
            f"validation {below('fresh runs', 'cosine, four runs', 'other', 1)}, "
            f"test {below('fresh runs', 'cosine, four runs', 'other', 2)}",
            "",
            f"A metagradient costs {record['runs_per_metagradient']:.1f} training runs. Norm of the cotangent at the "
            "start of the run to that at its end, at the last outer step, geometric mean over seeds: "
            + ", ".join(f"{name} {np.exp(np.log(g[:, 0] / g[:, -1]).mean()):.2g}" for name, g in growth.items())
            + f". Skipped outer steps: {sum(row.get('skipped', 0) for row in rows.values())}.",
            "",
            "Validation loss by the rate of Adam, on the seed that chooses it:",
            "",
            *(f"| {' | '.join(line)} |" for line in tuned),
            "",
        ]
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the schedules and cotangents of the first seed, and the losses of all."""
    rows, steps = record["rows"], record["size"]["steps"]
    figure = Figure(figsize=(11.0, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    block = max(1, steps // 50)
    for place, (name, row) in enumerate(rows.items()):
        rates = np.exp(np.log(np.maximum(row["schedule"], 1e-6)).reshape(-1, block).mean(1))
        left.semilogy((np.arange(len(rates)) + 0.5) * block, rates, lw=1.3, color=f"C{place}", label=name)
        for part, mark in (("own", "o"), ("other", "x")):
            valid = [losses[1] for losses in row[part] if losses]
            middle.plot(valid, [place] * len(valid), mark, ms=4, color=f"C{place}")
        if row.get("norms"):
            norms = row["norms"][-1]
            right.semilogy(np.linspace(0, steps, len(norms)), norms, lw=1.3, color=f"C{place}")
    left.set(xlabel="step", ylabel=f"rate, geometric mean of {block}", ylim=(1e-4, 3.0))
    middle.set(xlabel="validation loss, by seed")
    middle.set_title("o: this run, x: other runs", fontsize="medium")
    middle.set_yticks(range(len(rows)), list(rows))
    middle.invert_yaxis()
    right.set(xlabel="step", ylabel="norm of the cotangent, last outer step")
    figure.legend(fontsize="small", loc="outside upper center", ncols=7, frameon=False)
    figure.savefig(path, dpi=95, pil_kwargs={"optimize": True})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few and short runs: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results")
    args = parser.parse_args(argv)
    record = run(args.seeds, QUICK if args.quick else Size())
    results.write(args.out, "metagradient_schedule", record, report(record), draw)
    print(report(record))
    return record


if __name__ == "__main__":
    main()
