"""Images that teach a network in 500 steps, by the gradient through all of them, against short unrolls and real images.

    inner:  w_T(X) = 500 steps of SGD on CE(w; n images X per class, labels fixed)
    outer:  min_X  CE(w_T(X); 1,000 digits), in batches of 200

    python -m experiments.metagradient.distillation [--seeds 3] [--per-class 1] [--quick] [--out experiments/results]

    through 500 steps              ``hg.metagradient``, new first weights at every outer step
    through 500, one start         the same from the same first weights each time
    through 20                     ``hg.unrolled``, new first weights at every outer step; the same count of inner steps
    through 20, 5 × the rate       the same, at five times the rate of SGD: as far as 100 steps go
    random images                  n real images per class, ten draws
    class means, or k-means        the means of n clusters per class
    all images                     the 1,000 digits, full batches

Points start as real images. The rate of Adam is the best of three by the accuracy on the 1,000 images after 500 steps,
on another seed with one image per class. Judged by ten new first weights, trained on the points: accuracy on test
images after 10 to 2,000 steps. Writes ``metagradient_distillation.json``, ``.md`` and ``.png``.

Reference: Wang et al., Dataset distillation, arXiv 1811.10959.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.cluster import KMeans

import hypergrad as hg
from experiments.common import results
from experiments.common.datasets import Split, Splits, load
from experiments.common.datasets import draw as drawn

HIDDEN, TRAIN, STEPS, STARTS, DRAWS = 32, 1000, 500, 10, 10
MARKS = 0, 10, 20, 50, 100, 200, 500, 1000, 2000
OUTER_RATES = 0.01, 0.03, 0.1
OUTER_BATCH = 200
INNER = optax.sgd(0.02, momentum=0.9)
Weights = dict[str, jax.Array]


class Row(NamedTuple):
    """How many inner steps are differentiated, and the rate of SGD in them."""

    length: int = STEPS
    rate: float = 0.02


ROWS = {
    "through 500 steps": Row(),
    "through 500, one start": Row(),
    "through 20": Row(20),
    "through 20, 5 × the rate": Row(20, 0.1),
}


class Size(NamedTuple):
    """Outer steps through 500 inner ones, and images per class."""

    outer_steps: int = 240
    per_class: tuple[int, ...] = (1,)


QUICK = Size(4)


def fresh(key: jax.Array) -> Weights:
    """Return new weights."""
    keys = jax.random.split(key)
    draw = lambda key, a, b: jax.random.normal(key, (a, b)) / np.sqrt(a)  # noqa: E731
    hidden = {"w0": draw(keys[0], 64, HIDDEN), "b0": jnp.zeros(HIDDEN)}
    return hidden | {"w1": draw(keys[1], HIDDEN, 10), "b1": jnp.zeros(10)}


def predict(weights: Weights, x: jax.Array) -> jax.Array:
    """Return logits."""
    return jnp.tanh(x @ weights["w0"] + weights["b0"]) @ weights["w1"] + weights["b1"]


def cross_entropy(weights: Weights, batch: Split) -> jax.Array:
    """Return the mean over the batch."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(predict(weights, batch.x), batch.y).mean()


def labelled(points: jax.Array) -> Split:
    """Return the points with their labels: 0 … 9, 0 … 9, …"""
    return Split(points, jnp.arange(len(points)) % 10)


PROBLEM = hg.BilevelProblem(
    lambda weights, points, _batch, _key: cross_entropy(weights, labelled(points)),
    lambda weights, _points, batch, _key: cross_entropy(weights, batch),
)
METAGRADIENT = hg.metagradient(
    PROBLEM, INNER, batch_at=lambda _: (), num_steps=STEPS, segment=50, store=hg.stores.device(10)
)


def distil(name: str, size: Size, outer_rate: float, points: jax.Array, train: Split, key: jax.Array) -> jax.Array:
    """Return the points after all outer steps."""
    if ROWS[name].length < STEPS:
        outer_steps = size.outer_steps * STEPS // ROWS[name].length
        return distil_short(ROWS[name], outer_steps, outer_rate, points, train, key)
    tx = optax.adam(optax.cosine_decay_schedule(outer_rate, size.outer_steps))
    state: Any = tx.init(points)
    for number in range(size.outer_steps):
        start = key if name == "through 500, one start" else jax.random.fold_in(key, number)
        batch = drawn(train, OUTER_BATCH, jax.random.fold_in(key, number))
        (_, gradient), info = METAGRADIENT(fresh(start), points, batch, key=None)
        assert info.status == hg.MetagradientStatus.FINISHED, info.status
        updates, state = tx.update(gradient, state)
        points = jnp.asarray(optax.apply_updates(points, updates))
    return points


@functools.partial(jax.jit, static_argnums=(0, 1))
def distil_short(
    row: Row, outer_steps: int, outer_rate: Any, points: jax.Array, train: Split, key: jax.Array
) -> jax.Array:
    """Return the points after outer steps through few inner ones."""
    schedule = optax.cosine_decay_schedule(1.0, outer_steps)
    tx = optax.adam(lambda count: outer_rate * schedule(count))
    gradient_of = hg.value_and_hypergrad(hg.unrolled(PROBLEM), optax.sgd(row.rate, momentum=0.9))
    batches = hg.IndexedBatch((), jnp.arange(row.length))

    def step(carry: Any, number: jax.Array) -> Any:
        points, state = carry
        start = jax.random.fold_in(key, number)
        batch = drawn(train, OUTER_BATCH, start)
        (_, gradient), _ = gradient_of(fresh(start), points, batches, batch, key=None)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(points, updates), state), None

    return jax.lax.scan(step, (points, tx.init(points)), jnp.arange(outer_steps))[0][0]


@jax.jit
def judge(batch: Split, judges: Split, key: jax.Array) -> jax.Array:
    """Return the accuracy at each of ``MARKS``, the mean over starts."""

    def step(_: Any, carry: Any) -> Any:
        weights, state = carry
        updates, state = INNER.update(jax.grad(cross_entropy)(weights, batch), state)
        return optax.apply_updates(weights, updates), state

    def curve(key: jax.Array) -> jax.Array:
        weights = fresh(key)
        carry, found = (weights, INNER.init(weights)), []
        for start, stop in itertools.pairwise((0, *MARKS)):
            carry = jax.lax.fori_loop(start, stop, step, carry)
            found.append((predict(carry[0], judges.x).argmax(-1) == judges.y).mean())
        return jnp.stack(found)

    return jax.vmap(curve)(jax.random.split(key, STARTS)).mean(0)


def real_images(train: Split, per_class: int, rng: np.random.Generator) -> jax.Array:
    """Return so many of each class, in the order of ``labelled``."""
    y = np.asarray(train.y)
    chosen = np.stack([rng.choice(np.flatnonzero(y == label), per_class, replace=False) for label in range(10)])
    return train.x[chosen.T.ravel()]


def cluster_means(train: Split, per_class: int, seed: int) -> jax.Array:
    """Return the means of the clusters of each class."""
    x, y = np.asarray(train.x), np.asarray(train.y)
    fits = [KMeans(per_class, n_init=10, random_state=seed).fit(x[y == label]) for label in range(10)]
    return jnp.asarray(np.stack([fit.cluster_centers_ for fit in fits], axis=1).reshape(-1, x.shape[1]))


def tune(size: Size) -> dict[str, dict[float, float]]:
    """Return for every rate of Adam the accuracy on the training images, on a seed that is not reported."""
    key, train = jax.random.key(1000), load("digits", 1000, TRAIN).train
    points = real_images(train, 1, np.random.default_rng(1000))
    found: dict[str, dict[float, float]] = {}
    for name in ROWS:
        if name == "through 500, one start":  # at the rate of the row before
            continue
        found[name] = {}
        for rate in OUTER_RATES:
            learned = distil(name, size, rate, points, train, key)
            found[name][rate] = float(judge(labelled(learned), train, jax.random.key(2000))[MARKS.index(STEPS)])
    return found


def run_seed(seed: int, size: Size, per_class: int, tuning: dict[str, dict[float, float]]) -> dict[str, Any]:
    """Return of each row the accuracies, and the points that were learned."""
    data: Splits = load("digits", seed, TRAIN)
    rng, key, of_judge = np.random.default_rng(seed), jax.random.key(seed), jax.random.key(500 + seed)
    first = real_images(data.train, per_class, rng)
    points: dict[str, jax.Array] = {}
    for name in ROWS:
        if name == "through 500, one start" and per_class > 1:
            continue
        rates = tuning.get(name, tuning["through 500 steps"])
        points[name] = distil(name, size, max(rates, key=rates.__getitem__), first, data.train, key)
    points["class means" if per_class == 1 else "k-means"] = cluster_means(data.train, per_class, seed)
    curves = {name: judge(labelled(x), data.test, of_judge) for name, x in points.items()}
    draws = [labelled(real_images(data.train, per_class, rng)) for _ in range(DRAWS)]
    curves["random images"] = jnp.mean(jnp.stack([judge(x, data.test, of_judge) for x in draws]), 0)
    curves["all images"] = judge(data.train, data.test, of_judge)
    return {"curves": {name: curve.tolist() for name, curve in curves.items()}, "points": points}


def run(seeds: int, size: Size) -> dict[str, Any]:
    """Return the record."""
    tuning = tune(size)
    record: dict[str, Any] = {"size": size._asdict(), "tuning": tuning, "curves": {}, "points": {}}
    for per_class, seed in itertools.product(size.per_class, range(seeds)):
        begun = time.perf_counter()
        found = run_seed(seed, size, per_class, tuning)
        rows = record["curves"].setdefault(str(per_class), {name: [] for name in found["curves"]})
        for name, curve in found["curves"].items():
            rows[name].append([round(x, 4) for x in curve])
        if seed == 0 and per_class == 1:
            record["points"] = {name: np.asarray(x, float).round(2).tolist() for name, x in found["points"].items()}
        print(f"{per_class} per class, seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
    return record


def report(record: dict[str, Any]) -> str:
    """Return the tables."""

    def spread(values: Any) -> str:
        error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{error}"

    lines = []
    for per_class, rows in record["curves"].items():
        count = len(rows["all images"])
        lines += [
            f"Test accuracy by the number of training steps, {per_class} per class, mean ± standard error over {count} "
            f"seeds of means over {STARTS} new starts:",
            "",
        ]
        head = ("points", *(f"{mark:,} steps" for mark in MARKS[1:]))
        table = [head, ("---",) * len(head)]
        for name, curves in rows.items():
            table.append((name, *(spread(np.asarray(curves)[:, place]) for place in range(1, len(MARKS)))))
        lines += [*(f"| {' | '.join(line)} |" for line in table), ""]
    tuned = [("rate of Adam", *(f"{rate:g}" for rate in OUTER_RATES)), ("---",) * (1 + len(OUTER_RATES))]
    tuned += [(name, *(f"{x:.3f}" for x in found.values())) for name, found in record["tuning"].items()]
    steps = record["size"]["outer_steps"]
    return "\n".join(
        [
            "# Images that teach in 500 steps",
            "",
            f"{steps:,} outer steps through 500 inner ones, {steps * 25:,} through 20.",
            "",
            *lines,
            f"Accuracy on the {TRAIN:,} images after {STEPS} steps, by the rate of Adam, on the seed that chooses it:",
            "",
            *(f"| {' | '.join(line)} |" for line in tuned),
            "",
        ]
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the accuracies over steps, and the points of the first seed, one per class."""
    figure = Figure(figsize=(11.0, 3.6), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(3, 2))
    left, right = parts
    panels = left.subplots(1, len(record["curves"]), sharey=True, squeeze=False)[0]
    for panel, (per_class, rows) in zip(panels, record["curves"].items(), strict=True):
        for place, (name, curves) in enumerate(rows.items()):
            panel.semilogx(MARKS[1:], np.mean(curves, axis=0)[1:], "o-", ms=3, lw=1.3, color=f"C{place}", label=name)
        panel.axvline(STEPS, color="0.8", zorder=0)
        panel.set(xlabel=f"training steps, {per_class} per class", ylim=(0.3, 1.0))
    panels[0].set_ylabel("test accuracy")
    panels[0].legend(fontsize="x-small")
    images = right.subplots(len(record["points"]), 10)
    for row, (name, points) in zip(images, record["points"].items(), strict=True):
        for axes, image in zip(row, np.asarray(points), strict=True):
            axes.imshow(image.reshape(8, 8), cmap="gray_r")
            axes.set(xticks=[], yticks=[])
        row[0].set_title(name, fontsize="x-small", loc="left").set_in_layout(False)
    figure.savefig(path, dpi=95, pil_kwargs={"optimize": True})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per-class", type=int, nargs="+", default=[1], help="images per class")
    parser.add_argument("--quick", action="store_true", help="few outer steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else Size()
    record = run(args.seeds, size._replace(per_class=tuple(args.per_class)))
    results.write(args.out, "metagradient_distillation", record, report(record), draw)
    print(report(record))
    return record


if __name__ == "__main__":
    main()
