"""A learned optimizer: meta-trained on one small network, tried on wider and deeper ones and on other images.

    uᵢ = −s dᵢ exp(s mᵢ),  (d, m) = MLP_θ(features of weight i)         min_θ  log training loss, every 20 of 200 steps

    python -m experiments.learned_optimizer [--episodes 200] [--seeds 5] [--quick] [--out experiments/results]

θ is meta-trained on a 64-32-10 network and 1,000 of scikit-learn's digits: by truncated reverse mode, ``hg.unrolled``,
over windows of 20 steps, and by persistent evolution, ``hg.evolution``, whose particles live for 200 steps. The two
differ in one line, and in the rate of the outer Adam: for each the better of 3e-3 and 1e-2 on other seeds. An episode
is 200 steps from fresh weights; evolution has 8 pairs and half as many episodes.

Then each optimizer takes 200 steps on batches of 64, from fresh weights: on that task, on a network of 8 × its width,
on one of three hidden layers, and on Fashion-MNIST where ``HYPERGRAD_DATA`` has it. "μP" divides the updates of hidden
and output matrices by the number of their inputs, relative to that of meta-training; at the width of meta-training it
is the same optimizer, so both have one θ. Beside Adam with a constant rate and with a cosine decay to zero, the best of
9 rates on these very seeds, and with the constant rate that is best on the first task. Losses are those of all training
images, at the end and as a mean over the run. Writes ``learned_optimizer.json``, ``.md`` and ``.png``.
"""

import argparse
import functools
import os
import platform
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import hypergrad as hg
from experiments.common import results
from experiments.common.datasets import Split, load

LIFE, BATCH, WINDOW, PAIRS, WIDTH, EVERY = 200, 64, 20, 8, 32, 10
RATES = np.geomspace(1e-3, 1e-1, 9)
NETWORK = hg.optimizers.per_parameter_mlp(8, step=0.1, mu_scaled=True)
Weights = dict[str, jax.Array]


class Setting(NamedTuple):
    """Of an optimizer, adam or learned: (rate, whether it decays), or θ; and widths by which updates are divided."""

    own: Any
    widths: dict[str, float]


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


def meta_train(how: str, data: Split, episodes: int, seed: int = 0) -> tuple[Any, np.ndarray]:
    """Return θ, and the log training loss after each window, an episode per row."""
    inner = lambda weights, _theta, batch, _key: cross_entropy(weights, batch)  # noqa: E731
    outer = lambda weights, _theta, batch, _key: jnp.log(cross_entropy(weights, batch))  # noqa: E731
    problem = hg.BilevelProblem(inner, outer)
    if how == "unrolled":
        estimator, rate = hg.unrolled(problem), 1e-2
    else:
        estimator, rate = hg.evolution(problem, sigma=0.03, num_pairs=PAIRS, persistent=True, horizon=LIFE), 3e-3
    sizes, windows = (64, WIDTH, 10), LIFE // WINDOW
    schedule = optax.cosine_decay_schedule(rate, episodes * windows, 0.03)
    tx = hg.bilevel(
        estimator,
        inner_optimizer=lambda theta: hg.optimizers.learned(NETWORK.apply, theta),
        outer_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        window=WINDOW,
        key=seed,
    )
    root, begin = jax.random.split(jax.random.key(seed))
    variables = hg.BilevelParams(fresh(sizes, begin), NETWORK.init(seed))
    state = tx.init(variables)
    blank = state.inner

    def window(carry: Any, key: jax.Array) -> Any:
        variables, state = carry
        rows = jax.random.randint(key, (WINDOW + 4, BATCH), 0, len(data.y))
        seen = jax.tree.map(lambda x: x[rows[WINDOW:].ravel()], data)
        batches = hg.IndexedBatch(data, rows[:WINDOW])
        updates, state = tx.update(None, state, variables, inner_batch=batches, outer_batch=seen)
        return (optax.apply_updates(variables, updates), state), state.info.outer_loss

    @jax.jit
    def episode(variables: Any, state: Any, key: jax.Array) -> Any:
        begin, order = jax.random.split(key)
        start = variables._replace(params=fresh(sizes, begin)), state._replace(inner=blank)
        return jax.lax.scan(window, start, jax.random.split(order, windows))

    losses = []
    for key in jax.random.split(root, episodes):
        (variables, state), found = episode(variables, state, key)
        losses.append(np.asarray(found))
    if int(state.info.num_skipped):
        print(f"{how}: {int(state.info.num_skipped)} outer steps skipped")
    return variables.hyperparams, np.stack(losses)


def adam(setting: Setting) -> optax.GradientTransformation:
    """Return Adam at a rate, constant or with a cosine decay to zero."""
    rate, decays = setting.own
    tx = optax.adam(lambda count: rate * jnp.where(decays, (1 + jnp.cos(jnp.pi * count / LIFE)) / 2, 1.0))
    return optax.chain(tx, optax.stateless(lambda updates, _: jax.tree.map(jnp.divide, updates, setting.widths)))


def learned(setting: Setting) -> optax.GradientTransformation:
    """Return the learned optimizer with θ."""
    return hg.optimizers.learned(NETWORK.apply, setting.own, widths=setting.widths)


@functools.partial(jax.jit, static_argnums=(0, 1))
def curves(make: Callable[[Any], Any], sizes: Sequence[int], settings: Any, data: Split, keys: jax.Array) -> jax.Array:
    """Return training losses on all of ``data``, (settings, seeds, points): every 10 steps of 200."""

    def run(setting: Any, key: jax.Array) -> jax.Array:
        begin, order = jax.random.split(key)
        weights, tx = fresh(sizes, begin), make(setting)

        def step(carry: Any, rows: jax.Array) -> Any:
            weights, state = carry
            grads = jax.grad(cross_entropy)(weights, jax.tree.map(lambda x: x[rows], data))
            updates, state = tx.update(grads, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        def point(carry: Any, rows: jax.Array) -> Any:
            carry = jax.lax.scan(step, carry, rows)[0]
            return carry, cross_entropy(carry[0], data)

        rows = jax.random.randint(order, (LIFE // EVERY, EVERY, BATCH), 0, len(data.y))
        return jax.lax.scan(point, (weights, tx.init(weights)), rows)[1]

    return jax.lax.map(lambda setting: jax.vmap(lambda key: run(setting, key))(keys), settings)


def timed(make: Callable[[Any], Any], sizes: Sequence[int], settings: list[Setting], data: Split, keys: Any) -> Any:
    """Return ``curves``, and CPU microseconds of a step."""
    stacked = jax.tree.map(lambda *x: jnp.array(x), *settings)
    compiled = curves.lower(make, sizes, stacked, data, keys).compile()
    begun = time.process_time()
    found = np.asarray(compiled(stacked, data, keys))
    return found, 1e6 * (time.process_time() - begun) / (len(settings) * len(keys) * LIFE)


def compare(
    thetas: dict[str, Any], sizes: Sequence[int], data: Split, keys: Any, tuned: float | None
) -> dict[str, Any]:
    """Return losses (seeds, points) of every optimizer on a task; ``tuned`` is Adam's rate on the first one."""
    plain = dict.fromkeys(relative_widths(sizes), 1.0)
    widths = {"": plain} | ({", μP": relative_widths(sizes)} if relative_widths(sizes) != plain else {})
    grid = [Setting((float(rate), decays), plain) for decays in (False, True) for rate in RATES]
    moved = [Setting((tuned or 0.0, False), divide) for divide in widths.values()]
    of_adam, adam_time = timed(adam, sizes, grid + moved, data, keys)
    ends = np.nan_to_num(of_adam[:, :, -1].mean(axis=1), nan=np.inf)
    constant, cosine = ends[: len(RATES)].argmin(), len(RATES) + ends[len(RATES) : len(grid)].argmin()
    rows = {"Adam, best constant rate": of_adam[constant], "Adam, cosine, best rate": of_adam[cosine]}
    rates = {"constant": grid[constant].own[0], "cosine": grid[cosine].own[0]}
    if tuned:
        rows |= {f"Adam, rate of meta-training{n}": x for n, x in zip(widths, of_adam[len(grid) :], strict=True)}
    names = {f"learned, {how}{n}": Setting(theta, w) for how, theta in thetas.items() for n, w in widths.items()}
    found, learned_time = timed(learned, sizes, list(names.values()), data, keys)
    rows |= dict(zip(names, found, strict=True))
    losses = {name: [[float(f"{x:.4g}") for x in seed] for seed in row] for name, row in rows.items()}
    return {"losses": losses, "rates": rates, "microseconds": {"Adam": adam_time, "learned": learned_time}}


def run(episodes: int, seeds: int, *, quick: bool = False) -> dict[str, Any]:
    """Meta-train, then try every optimizer on every task."""
    digits = load("digits", 0, 1000).train
    thetas, meta = {}, {}
    for how, number in {"unrolled": episodes, "evolution": episodes // 2}.items():
        begun = time.process_time()
        thetas[how], losses = meta_train(how, digits, number)
        ends = [float(f"{x:.4g}") for x in losses.mean(axis=1)]
        meta[how] = {"episodes": number, "cpu_seconds": time.process_time() - begun, "log_losses": ends}
        print(f"{how}: {number} episodes, {meta[how]['cpu_seconds']:.0f} CPU seconds", flush=True)
    tasks: dict[str, tuple[tuple[int, ...], Split]] = {
        "meta-training": ((64, WIDTH, 10), digits),
        "8 × width": ((64, 8 * WIDTH, 10), digits),
    }
    if not quick:
        tasks["three hidden layers"] = (64, WIDTH, WIDTH, WIDTH, 10), digits
        if (Path(os.environ.get("HYPERGRAD_DATA", "-")) / "fashion_mnist").exists():
            tasks["Fashion-MNIST"] = (784, WIDTH, 10), load("fashion_mnist", 0).train
    keys = jax.random.split(jax.random.key(1000), seeds)
    found: dict[str, Any] = {}
    tuned = None
    for task, (sizes, data) in tasks.items():
        found[task] = compare(thetas, sizes, data, keys, tuned)
        tuned = tuned or found[task]["rates"]["constant"]
        print(f"{task}: {time.process_time():.0f} CPU seconds so far", flush=True)
    where = f"python {platform.python_version()}, jax {jax.__version__}"
    return {"circumstances": where, "cpu_seconds": time.process_time(), "meta": meta, "tasks": found}


def report(record: dict[str, Any]) -> str:
    """Return the tables."""
    tasks, meta = record["tasks"], record["meta"]
    names = dict.fromkeys(name for task in tasks.values() for name in task["losses"])
    lines = ["# A learned optimizer beside Adam"]
    for title, part in {"after 200 steps": slice(-1, None), "as a mean over the run": slice(None)}.items():
        lines += ["", f"Training loss {title}, mean ± standard deviation over seeds:", ""]
        lines += ["| optimizer | " + " | ".join(tasks) + " |", "|" + " --- |" * (1 + len(tasks))]
        for name in names:
            of_seeds = [
                np.asarray(task["losses"].get(name, [[np.nan]]))[:, part].mean(axis=1) for task in tasks.values()
            ]
            cells = [f"{x.mean():.4f} ± {x.std():.4f}" if np.isfinite(x).all() else "" for x in of_seeds]
            lines.append("| " + " | ".join([name, *cells]) + " |")
    lines.append("")
    for task, of_task in tasks.items():
        rates = ", ".join(f"{kind} {rate:.2g}" for kind, rate in of_task["rates"].items())
        times = ", ".join(f"{name} {value:.0f}" for name, value in of_task["microseconds"].items())
        lines.append(f"- {task}: Adam's best rates {rates}; CPU microseconds of a step {times}.")
    trained = "; ".join(
        f"{how} {x['episodes']} episodes, {x['cpu_seconds']:.0f} CPU seconds" for how, x in meta.items()
    )
    lines += [
        "",
        f"Meta-training: {trained}. All: {record['cpu_seconds']:.0f} CPU seconds, {record['circumstances']}.",
        "",
    ]
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the mean loss over steps, a panel per task."""
    tasks = record["tasks"]
    names = dict.fromkeys(name for task in tasks.values() for name in task["losses"])
    figure = Figure(figsize=(3.0 * len(tasks), 3.6), layout="constrained")
    handles: dict[str, Any] = {}
    for axis, (title, task) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        for name, values in task["losses"].items():
            colour, mean = f"C{list(names).index(name)}", np.asarray(values).mean(axis=0)
            handles[name] = axis.semilogy(EVERY * (1 + np.arange(len(mean))), mean, colour, label=name, lw=1.2)[0]
        axis.set(title=title, xlabel="step")
    figure.axes[0].set_ylabel("training loss")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=95, pil_kwargs={"optimize": True})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=200, help="of unrolled; evolution takes half as many")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few episodes, two tasks: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    args = parser.parse_args(argv)
    record = run(12 if args.quick else args.episodes, 2 if args.quick else args.seeds, quick=args.quick)
    results.write(args.out, "learned_optimizer", record, report(record), draw)
    print(report(record))
    return record


if __name__ == "__main__":
    main()
