"""Few-shot learning: an initialisation from which a few steps on a handful of images learn new classes.

    w_τ(λ) = K steps of SGD on the support images of task τ, from λ       min_λ  mean_τ  CE(w_τ(λ); query images of τ)

    python -m experiments.few_shot [--ways 5] [--shots 1] [--minutes 10] [--seeds 1] [--quick]

Omniglot (964 classes to learn from, each with its rotations by 90°, 659 others to be judged on, 28 × 28 pixels) where
``$HYPERGRAD_DATA/omniglot`` has it, else classes of random strokes. Rows:

    MAML               ``hg.best_response(hg.unrolled(...))``, its steps differentiated
    first-order MAML   the same, with the steps as constants
    Meta-SGD           the same, with a learned rate per weight
    iMAML              ``hg.best_response(hg.implicit(...))`` of CE + ½ρ‖w − λ‖², five products of CG; the rate of its
                       16 inner steps falls, because a learned start may be too curved for a constant one
    nearest neighbour  of pixels, by Euclidean distance

The network has four convolutions of 3 × 3 with stride 2 (8, 32, 32 and 32 channels), each with normalisation by the
statistics of the batch, as in MAML: the queries of a task are normalised together, so the prediction for one depends on
the others. Tasks are batched by ``vmap``. A convolution is written as nine shifted copies and a matrix product: with
weights of its own for each task ``lax.conv`` becomes a grouped convolution, which is slow on CPUs. The outer rate falls
to zero by a cosine over the time that is given. The curve is the accuracy on 60 tasks of classes that are not learned
from, the final figure that on 400 others; nothing is chosen by them. Writes ``few_shot.json``, ``.md`` and ``.png``.

Reference: Finn et al., arXiv 1703.03400 (MAML); Rajeswaran et al., arXiv 1909.04630 (iMAML); Li et al., arXiv
1707.09835 (Meta-SGD).
"""

import argparse
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import hypergrad as hg
from experiments.common import results

SIDE, QUERIES, JUDGED_QUERIES, OUTER_RATE = 28, 3, 15, 2e-3
PUBLISHED = {  # Omniglot, one shot, by ways
    "MAML": {5: 0.987, 20: 0.958},
    "first-order MAML": {5: 0.983, 20: 0.894},
    "Meta-SGD": {5: 0.9953, 20: 0.9593},
    "iMAML": {5: 0.9916, 20: 0.9446},
}
Weights = dict[str, Any]
Task = tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Size(NamedTuple):
    """How large it is: channels of the last three layers, tasks of an outer step, of a look and of the final figure."""

    width: int = 32
    tasks: int = 16
    look: int = 60
    final: int = 400


class Row(NamedTuple):
    """A method: adaptation of λ to a batch of images, its inner steps when trained and when judged."""

    adapt: Callable[..., Weights]
    steps: int
    judged_steps: int


def omniglot() -> tuple[np.ndarray, np.ndarray] | None:
    """Return images of background and evaluation classes, uint8 (class, drawing, 28, 28); None without the file."""
    path = Path(os.environ.get("HYPERGRAD_DATA", "")) / "omniglot" / "omniglot_105_packed.npz"
    if not path.exists():
        return None
    file = np.load(path)
    images = np.unpackbits(file["images_packed"], axis=-1, count=105)
    ink = np.where(images.mean() > 0.5, 1 - images, images)
    small = [jax.image.resize(jnp.asarray(part, jnp.float32), (20, SIDE, SIDE), "linear") for part in ink]
    found = np.stack([np.round(255 * np.asarray(part)).astype(np.uint8) for part in small])
    return found[~file["class_is_evaluation"]], found[file["class_is_evaluation"]]


def strokes(seed: int, classes: int, drawings: int = 20) -> np.ndarray:
    """Return classes of two random quadratic curves, each drawn several times with moved points."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0.1, 0.9, (classes, 1, 2, 3, 1, 2)) + 0.08 * rng.normal(size=(classes, drawings, 2, 3, 1, 2))
    t = np.linspace(0.0, 1.0, 12)[:, None]
    curve = (1 - t) ** 2 * points[:, :, :, 0] + 2 * t * (1 - t) * points[:, :, :, 1] + t**2 * points[:, :, :, 2]
    pixels = (np.stack(np.meshgrid(*[np.arange(SIDE)] * 2), -1).reshape(-1, 1, 2) + 0.5) / SIDE
    draw = lambda c: np.exp(-((pixels - c.reshape(-1, 2)) ** 2).sum(-1).min(-1) / (2 * 0.03**2))  # noqa: E731
    images = np.stack([[draw(c) for c in of_class] for of_class in curve.astype(np.float32)])
    return np.round(255 * images.reshape(classes, drawings, SIDE, SIDE)).astype(np.uint8)


def patches(x: jax.Array) -> jax.Array:
    """Return the 3 × 3 neighbourhood of every second pixel."""
    size = (x.shape[1] + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [x[:, i : i + 2 * size - 1 : 2, j : j + 2 * size - 1 : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


def logits(weights: Weights, images: jax.Array) -> jax.Array:
    """Return those of a batch of images, normalised over the batch."""
    x = images[..., None]
    for layer in weights["layers"]:
        x = patches(x) @ layer["kernel"]
        x = (x - x.mean((0, 1, 2))) * jax.lax.rsqrt(x.var((0, 1, 2)) + 1e-3)
        x = jax.nn.relu(layer["scale"] * x + layer["shift"])
    return x.reshape(len(x), -1) @ weights["out"] + weights["bias"]


def fresh(key: jax.Array, width: int, ways: int) -> Weights:
    """Return new weights."""
    sizes = itertools.pairwise((1, width // 4, width, width, width))
    layers = [
        {"kernel": np.sqrt(2 / (9 * n)) * jax.random.normal(k, (9 * n, m)), "scale": jnp.ones(m), "shift": jnp.zeros(m)}
        for k, (n, m) in zip(jax.random.split(key, 4), sizes, strict=True)
    ]
    return {"layers": layers, "out": jnp.zeros((4 * width, ways)), "bias": jnp.zeros(ways)}


def loss(weights: Weights, h: Any, batch: tuple[jax.Array, jax.Array], key: Any) -> jax.Array:
    """Return the cross-entropy of a batch."""
    del h, key
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits(weights, batch[0]), batch[1]).mean()


def setting(ways: int) -> tuple[float, int]:
    """Return the rate and the number of inner steps of MAML in its paper."""
    return (0.4, 1) if ways < 20 else (0.1, 5)


def moving_along(adapt: Callable[..., Weights]) -> Callable[..., Weights]:
    """Return the adaptation whose steps count as constant: the weights that it reaches move along with the start."""

    def fn(start: Weights, *args: Any, **kwargs: Any) -> Weights:
        steps = optax.tree.sub(adapt(start, *args, **kwargs), start)
        return optax.tree.add(start, jax.lax.stop_gradient(steps))

    return fn


def methods(loss: Callable[..., jax.Array], rate: float, steps: int, rho: float = 2.0) -> dict[str, Row]:
    """Return the rows of learned initialisations. λ is ``{"start": weights, "rates": a rate per weight}``."""

    def near(weights: Weights, h: Any, batch: Any, key: Any) -> jax.Array:
        distance = optax.tree.norm(optax.tree.sub(weights, h["start"]), squared=True)
        return loss(weights, h, batch, key) + 0.5 * rho * distance

    task, proximal = hg.BilevelProblem(loss, loss), hg.BilevelProblem(near, loss)
    sgd, falling = optax.sgd(rate), optax.sgd(optax.cosine_decay_schedule(0.2, 16))
    rates = lambda h: hg.optimizers.scale_by_learning_rate(h["rates"])  # noqa: E731
    unrolled = functools.partial(hg.best_response, hg.unrolled(task))
    return {
        "MAML": Row(unrolled(sgd), steps, 3 * steps),
        "first-order MAML": Row(moving_along(unrolled(sgd)), steps, 3 * steps),
        "Meta-SGD": Row(unrolled(rates), steps, steps),
        "iMAML": Row(hg.best_response(hg.implicit(proximal, hg.solvers.cg(5)), falling), 16, 16),
    }


def draw_task(images: jax.Array, ways: int, shots: int, queries: int, key: jax.Array) -> Task:
    """Return support and query images, with labels."""
    of_classes, of_drawings = jax.random.split(key)
    classes = jax.lax.top_k(jax.random.uniform(of_classes, (len(images),)), ways)[1]
    order = jnp.argsort(jax.random.uniform(of_drawings, (ways, images.shape[1])))[:, : shots + queries]
    found, labels = images[classes[:, None], order] / jnp.float32(255), jnp.indices(order.shape)[0]
    parts = [(x[:, :shots], x[:, shots:]) for x in (found, labels)]
    support, query = (tuple(x.reshape(-1, *x.shape[2:]) for x in side) for side in zip(*parts, strict=True))
    return support, query


def adapted(row: Row, h: Any, support: tuple[jax.Array, jax.Array], steps: int) -> Weights:
    """Return the weights of a task: every step sees all support images."""
    rows = jnp.broadcast_to(jnp.arange(len(support[1])), (steps, len(support[1])))
    return row.adapt(h["start"], h, hg.IndexedBatch(support, rows), key=None)


def meta_loss(row: Row, h: Any, tasks: Task) -> jax.Array:
    """Return the mean over tasks of the query loss after adaptation."""
    return jax.vmap(lambda support, query: loss(adapted(row, h, support, row.steps), None, query, None))(*tasks).mean()


def accuracies(row: Row, h: Any, tasks: Task) -> jax.Array:
    """Return the accuracy on each task's query images."""

    def of_task(task: Task) -> jax.Array:
        (support, (x, y)) = task
        return jnp.mean(logits(adapted(row, h, support, row.judged_steps), x).argmax(-1) == y)

    return jax.lax.map(of_task, tasks, batch_size=10)


def nearest(tasks: Task) -> jax.Array:
    """Return the accuracy of the label of the nearest support image."""
    (x, y), (at, of) = tasks
    flat = lambda images: images.reshape(*images.shape[:2], 1, -1)  # noqa: E731
    of_task = lambda task: jnp.linalg.norm(task[0] - task[1].swapaxes(0, 1), axis=-1).argmin(-1)  # noqa: E731
    found = jax.lax.map(of_task, (flat(at), flat(x)))
    return jnp.mean(jnp.take_along_axis(y, found, axis=1) == of, axis=1)


def draw_tasks(images: jax.Array, ways: int, shots: int, queries: int, key: jax.Array, count: int) -> Task:
    """Return tasks, stacked."""
    return jax.vmap(lambda key: draw_task(images, ways, shots, queries, key))(jax.random.split(key, count))


def clocks() -> tuple[float, float]:
    """Return seconds of wall time and of CPU time of this process."""
    return time.perf_counter(), time.process_time()


def learn(row: Row, seed: int, data: Any, ways: int, shots: int, size: Size, seconds: float) -> dict[str, Any]:
    """Return what is recorded of one run: curve, accuracy on the final tasks, its standard error, steps and seconds."""
    train, test = data
    of_weights, of_training, of_curve, of_final = jax.random.split(jax.random.key(seed), 4)
    start = fresh(of_weights, size.width, ways)
    h: Any = {"start": start, "rates": jax.tree.map(lambda w: jnp.full_like(w, setting(ways)[0]), start)}
    tx = optax.scale_by_adam()
    judged = functools.partial(draw_tasks, test, ways, shots, JUDGED_QUERIES)
    judge = jax.jit(functools.partial(accuracies, row))

    @jax.jit
    def step(h: Any, state: Any, count: jax.Array, outer_rate: jax.Array, train: jax.Array) -> Any:
        tasks = draw_tasks(train, ways, shots, QUERIES, jax.random.fold_in(of_training, count), size.tasks)
        value, grads = jax.value_and_grad(lambda h: meta_loss(row, h, tasks))(h)
        updates, state = tx.update(grads, state, h)
        return optax.apply_updates(h, optax.tree.scale(-outer_rate, updates)), state, value

    tasks, state, count, spent, begun, used = judged(of_curve, size.look), tx.init(h), 0, 0.0, *clocks()
    curve, due = [(0.0, 0, float(judge(h, tasks).mean()))], 0.0
    while spent < seconds:
        outer_rate = OUTER_RATE * 0.5 * (1 + np.cos(np.pi * spent / seconds))
        h, state, value = step(h, state, count, outer_rate, train)
        value, count, spent = float(value), count + 1, time.perf_counter() - begun
        if spent >= min(due, seconds):
            curve.append((round(spent, 1), count, float(judge(h, tasks).mean())))
            print(f"{spent:6.0f} s, {count} steps: loss {value:.3f}, accuracy {curve[-1][2]:.3f}", flush=True)
            due = spent + seconds / 20
    wall, cpu = (now - then for now, then in zip(clocks(), (begun, used), strict=True))
    of_tasks = judge(h, judged(of_final, size.final))
    error = float(of_tasks.std()) / size.final**0.5
    times = {"seconds": wall, "cpu_seconds": cpu, "load": os.getloadavg()[2]}
    return {"curve": curve, "accuracy": float(of_tasks.mean()), "error": error, "steps": count, **times}


def run(args: argparse.Namespace, minutes: float, size: Size, kept: dict[str, Any]) -> dict[str, Any]:
    """Return the record, with the rows that are kept from an earlier one."""
    ways, shots = args.ways, args.shots
    data = omniglot()
    name = "random strokes" if data is None else "Omniglot"
    learned, judged = (strokes(0, 200), strokes(1, 50)) if data is None else data
    turned = jnp.concatenate([jnp.asarray(np.rot90(learned, turn, (2, 3))) for turn in range(4)])
    split = turned, jnp.asarray(judged)
    tasks = draw_tasks(split[1], ways, shots, JUDGED_QUERIES, jax.random.key(0), size.final)
    record: dict[str, Any] = {"data": name, "ways": ways, "shots": shots, "cores": os.cpu_count(), **size._asdict()}
    record |= {"nearest": float(nearest(tasks).mean()), "rows": kept}
    rows = methods(loss, *setting(ways))
    for row in args.methods:
        print(f"{row}, load {os.getloadavg()[0]:.1f}", flush=True)
        found = [learn(rows[row], seed, split, ways, shots, size, 60 * minutes) for seed in range(args.seeds)]
        record["rows"][row] = found
        write(record, args.out)
    return record


def report(record: dict[str, Any]) -> str:
    """Return the table."""
    published = record["data"] == "Omniglot" and record["shots"] == 1
    head = ("method", "outer steps", "minutes", "CPU minutes", "accuracy, %", "published, %")
    lines = [head, ("---",) * len(head), ("nearest neighbour", "", "", "", f"{100 * record['nearest']:.1f}", "")]
    for name, runs in record["rows"].items():
        figures = ("steps", "seconds", "cpu_seconds", "accuracy")
        steps, seconds, cpu, reached = (np.mean([r[figure] for r in runs]) for figure in figures)
        of_seeds = [r["accuracy"] for r in runs]
        error = np.std(of_seeds, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else runs[0]["error"]
        known = PUBLISHED[name].get(record["ways"]) if published else None
        shown = "" if known is None else f"{100 * known:.1f}"
        found = f"{100 * reached:.1f} ± {100 * error:.1f}"
        lines.append((name, f"{steps:,.0f}", f"{seconds / 60:.1f}", f"{cpu / 60:.1f}", found, shown))
    seeds = max((len(runs) for runs in record["rows"].values()), default=0)
    spread = f"over {seeds} seeds" if seeds > 1 else f"over {record['final']} tasks, one seed"
    load = max(r["load"] for runs in record["rows"].values() for r in runs)
    return "\n".join(
        [
            f"# Few-shot learning: {record['data']}, {record['ways']}-way {record['shots']}-shot",
            "",
            f"Accuracy on classes that were not learned from, mean ± standard error {spread}. Minutes of wall time,",
            f"with compilation, on {record['cores']} cores (load average up to {load:.1f}).",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
        ]
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw accuracy over minutes and over outer steps, beside the published figure of MAML."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (name, runs) in enumerate(record["rows"].items()):
        for number, found in enumerate(runs):
            seconds, steps, reached = np.asarray(found["curve"]).T
            label = name if number == 0 else None
            left.plot(seconds / 60, reached, color=f"C{place}", label=label)
            right.plot(steps, reached, color=f"C{place}")
    known = PUBLISHED["MAML"].get(record["ways"]) if record["data"] == "Omniglot" and record["shots"] == 1 else None
    for axis in (left, right):
        axis.axhline(record["nearest"], ls=":", color="k", label="nearest neighbour" if axis is left else None)
        if known is not None:
            axis.axhline(known, ls="--", color="k", label="MAML, published" if axis is left else None)
    left.set(xlabel="minutes", ylabel="accuracy on new classes")
    right.set(xlabel="outer steps")
    figure.legend(fontsize="small", loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(path, dpi=95, pil_kwargs={"optimize": True})


def write(record: dict[str, Any], out: Path) -> None:
    """Write the files."""
    results.write(out, "few_shot", record, report(record), draw)


def rows_of(file: Path, ways: int, shots: int) -> dict[str, Any]:
    """Return the rows of an earlier run of the same task."""
    before = json.loads(file.read_text())
    if (before["ways"], before["shots"]) != (ways, shots):
        got = f"{before['ways']}-way {before['shots']}-shot rows in {file.name}"
        raise ValueError(f"--merge: expected {ways}-way {shots}-shot rows; got {got}. Write to another folder (--out).")
    return before["rows"]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10, help="of each method")
    parser.add_argument("--methods", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps of each: does it run?")
    parser.add_argument("--merge", action="store_true", help="keep the rows of other methods from the file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    size = Size(4, 2, 4, 4) if args.quick else Size()
    kept = rows_of(args.out / "few_shot.json", args.ways, args.shots) if args.merge else {}
    record = run(args, 0.02 if args.quick else args.minutes, size, kept)
    print(report(record))
    return record


if __name__ == "__main__":
    main()
