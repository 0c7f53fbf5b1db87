"""A learned optimizer: meta-trained on one small network, tried on wider and deeper ones and on other images.

    uᵢ = −s dᵢ exp(s mᵢ),  (d, m) = MLP_θ(features of weight i)         min_θ  training loss during 200 steps

    python -m experiments.learned_optimizer [--steps 1000] [--seeds 5] [--quick] [--out experiments/results]

θ is meta-trained on a 64-32-10 network and scikit-learn's digits: by persistent evolution (``hg.evolution``), whose
particles live for 200 steps, and by truncated reverse mode (``hg.unrolled``) over windows of 20 steps. Each of the two
with the standard and with the μLO parametrization, in which updates of hidden and output matrices are divided by the
relative number of their inputs. Meta-training ends after equal time in gradients of the network.

Then each optimizer takes 200 steps, from fresh weights and with fresh batches: on that network, one of 8 × its width,
one with three hidden layers, and on Fashion-MNIST where ``HYPERGRAD_DATA`` has it. Beside Adam, with the best of 13
constant rates on the first network, and with the best on each. A row is the training loss at the end, the mean over
seeds. Writes ``learned_optimizer.json``, ``.md`` and ``.png``.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import hypergrad as hg
from experiments.common.datasets import Split, load

LIFE, BATCH, WINDOW, PAIRS, WIDTH = 200, 64, 20, 8, 32
RATES = np.geomspace(1e-4, 1e-1, 13)
Weights = dict[str, jax.Array]


def fresh(sizes: Sequence[int], key: jax.Array) -> Weights:
    """Return weights of a network with these layer sizes."""
    keys = jax.random.split(key, len(sizes) - 1)
    weights = {f"w{i}": np.sqrt(2 / a) * jax.random.normal(keys[i], (a, b)) for i, (a, b) in enumerate(pairwise(sizes))}
    return weights | {f"b{i}": jnp.zeros(b) for i, b in enumerate(sizes[1:])}


def cross_entropy(weights: Weights, batch: Split) -> jax.Array:
    """Return the mean over the batch."""
    x, layers = batch.x, len(weights) // 2
    for i in range(layers):
        x = x @ weights[f"w{i}"] + weights[f"b{i}"]
        x = jax.nn.relu(x) if i < layers - 1 else x
    return optax.losses.softmax_cross_entropy_with_integer_labels(x, batch.y).mean()


def relative_widths(sizes: Sequence[int]) -> dict[str, float]:
    """Return how many inputs each matrix has, relative to the network of meta-training; 1 for the first, and biases."""
    widths = dict.fromkeys([f"b{i}" for i in range(len(sizes) - 1)], 1.0) | {"w0": 1.0}
    return widths | {f"w{i}": sizes[i] / WIDTH for i in range(1, len(sizes) - 1)}


def meta_train(network: hg.optimizers.PerParameterMLP, how: str, data: Split, outer_steps: int) -> tuple[Any, Any]:
    """Return θ, and the training loss at every outer step."""
    sizes = 64, WIDTH, 10
    loss = lambda weights, _theta, batch, _key: cross_entropy(weights, batch)  # noqa: E731
    problem = hg.BilevelProblem(loss, loss)
    if how == "evolution":
        estimator = hg.evolution(problem, sigma=0.01, num_pairs=PAIRS, persistent=True, horizon=LIFE)
    else:
        estimator = hg.unrolled(problem)
        outer_steps *= 2 * PAIRS // 4  # a window in reverse mode takes about four times as long as forward
    schedule = optax.cosine_decay_schedule(3e-3, outer_steps, 0.1)
    tx = hg.bilevel(
        estimator,
        inner_optimizer=lambda theta: hg.optimizers.learned(network.apply, theta),
        outer_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        window=WINDOW,
        key=0,
    )
    start = hg.BilevelParams(fresh(sizes, jax.random.key(0)), network.init(1))
    blank = tx.init(start)

    @jax.jit
    def step(carry: Any, count: jax.Array) -> Any:
        variables, state = carry
        key = jax.random.fold_in(jax.random.key(2), count)
        begins = count % (LIFE // WINDOW) == 0  # of an episode, for the weights that train at θ itself
        weights = optax.tree.where(begins, fresh(sizes, key), variables.params)
        state = state._replace(inner=optax.tree.where(begins, blank.inner, state.inner))
        rows = jax.random.randint(key, (WINDOW, BATCH), 0, len(data.y))
        outer = jax.tree.map(lambda x: x[jax.random.randint(key, (4 * BATCH,), 0, len(data.y))], data)
        variables = hg.BilevelParams(weights, variables.hyperparams)
        updates, state = tx.update(None, state, variables, inner_batch=hg.IndexedBatch(data, rows), outer_batch=outer)
        return (optax.apply_updates(variables, updates), state), (state.info.outer_loss, state.info.num_skipped)

    (variables, _), (losses, skipped) = jax.lax.scan(step, (start, blank), jnp.arange(outer_steps))
    if int(skipped[-1]):
        print(f"{int(skipped[-1])} outer steps skipped")
    return variables.hyperparams, losses


@functools.partial(jax.jit, static_argnums=(0, 1))
def curve(make: Callable[[Any], Any], sizes: Sequence[int], setting: Any, data: Split, key: jax.Array) -> jax.Array:
    """Return the training loss over 200 steps, on four batches' worth of examples each time."""
    begin, order = jax.random.split(key)
    weights, tx = fresh(sizes, begin), make(setting)

    def step(carry: Any, key: jax.Array) -> Any:
        weights, state = carry
        drawn = jax.random.randint(key, (BATCH,), 0, len(data.y))
        grads = jax.grad(cross_entropy)(weights, jax.tree.map(lambda x: x[drawn], data))
        updates, state = tx.update(grads, state, weights)
        new = optax.apply_updates(weights, updates)
        seen = jax.tree.map(lambda x: x[: 8 * BATCH], data)
        return (new, state), cross_entropy(new, seen)

    return jax.lax.scan(step, (weights, tx.init(weights)), jax.random.split(order, LIFE))[1]


def run(outer_steps: int, seeds: int) -> dict[str, Any]:
    """Meta-train, then try every optimizer on every task; return losses over steps, seed by seed."""
    digits = load("digits", 0, 1000).train
    networks = {
        "standard": hg.optimizers.per_parameter_mlp(16, step=0.01),
        "μLO": hg.optimizers.per_parameter_mlp(16, step=0.1, mu_scaled=True),
    }
    settings, meta = {}, {}
    for name, network in networks.items():
        for how in ("evolution", "unrolled"):
            begun = time.perf_counter()
            theta, losses = meta_train(network, how, digits, outer_steps)
            row = f"learned by {how}, {name}"
            settings[row], meta[row] = theta, np.asarray(losses, float).tolist()
            print(f"{row}: meta-trained in {time.perf_counter() - begun:.0f} s", flush=True)
    tasks = {
        "meta-training": ((64, WIDTH, 10), digits),
        "8 × width": ((64, 8 * WIDTH, 10), digits),
        "three hidden layers": ((64, WIDTH, WIDTH, WIDTH, 10), digits),
    }
    if (Path(os.environ.get("HYPERGRAD_DATA", "-")) / "fashion_mnist").exists():
        tasks["Fashion-MNIST"] = ((784, WIDTH, 10), load("fashion_mnist", 0).train)
    keys = jax.random.split(jax.random.key(10), seeds)
    found: dict[str, Any] = {}
    tuned = 0.0
    for task, (sizes, data) in tasks.items():
        over = functools.partial(_curves, sizes=sizes, data=data, keys=keys)
        of_rates = {float(rate): over(optax.adam, rate) for rate in RATES}
        best = min(of_rates, key=lambda rate: np.nan_to_num(of_rates[rate][:, -20:].mean(), nan=np.inf))
        tuned = tuned or best
        rows = {"Adam, best rate here": of_rates[best], "Adam, best rate of meta-training": of_rates[tuned]}
        for row, theta in settings.items():
            widths = relative_widths(sizes) if "μLO" in row else 1.0
            apply = networks[row.rpartition(", ")[2]].apply
            rows[row] = over(functools.partial(_learned, apply, _Frozen(widths)), theta)
        found[task] = {name: values.tolist() for name, values in rows.items()} | {"rate": best}
    return {"tasks": found, "meta": meta}


def _curves(make: Callable[[Any], Any], setting: Any, *, sizes: Sequence[int], data: Split, keys: Any) -> np.ndarray:
    return np.asarray(jax.vmap(lambda key: curve(make, sizes, setting, data, key))(keys))


class _Frozen:
    """Widths as a static argument: equal by identity."""

    def __init__(self, widths: Any) -> None:
        self.widths = widths


def _learned(apply: Any, frozen: _Frozen, theta: Any) -> Any:
    return hg.optimizers.learned(apply, theta, widths=frozen.widths)


def report(record: dict[str, Any]) -> str:
    """Return the table."""
    tasks = record["tasks"]
    names = [name for name in next(iter(tasks.values())) if name != "rate"]
    lines = ["# A learned optimizer beside Adam", "", "Training loss after 200 steps, mean ± deviation over seeds.", ""]
    lines += ["| optimizer | " + " | ".join(tasks) + " |", "|" + " --- |" * (1 + len(tasks))]
    for name in names:
        cells = []
        for task in tasks.values():
            ends = np.asarray(task[name])[:, -20:].mean(axis=1)
            cells.append(f"{ends.mean():.4f} ± {ends.std():.4f}")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    rates = ", ".join(f"{name} {task['rate']:.2g}" for name, task in tasks.items())
    return "\n".join([*lines, "", f"Best rates of Adam: {rates}.", ""])


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the loss over steps, a panel per task."""
    tasks = record["tasks"]
    figure = Figure(figsize=(3.4 * len(tasks), 3.4), layout="constrained")
    for axis, (title, task) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        for name, values in task.items():
            if name != "rate":
                axis.semilogy(np.asarray(values).mean(axis=0), label=name, lw=1.2)
        axis.set(title=title, xlabel="step")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="outer steps of evolution")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    record = run(10 if args.quick else args.steps, 2 if args.quick else args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "learned_optimizer.json").write_text(json.dumps(record, indent=None) + "\n")
    (args.out / "learned_optimizer.md").write_text(report(record))
    draw(record, args.out / "learned_optimizer.png")
    print(report(record))
    return record


if __name__ == "__main__":
    main()
