"""Problems small enough to solve: how low the outer loss gets, for how many gradients, Hessian products and seconds.

    python benchmarks/quality/minimize.py [--quick] [--only "ridge,ijcnn1"] [--seeds 5] [--merge]

Problems, each with a training and a validation set:

    ridge           least squares, 60 features, 100 + 100 examples drawn, one decay
    logistic        l2-logistic regression on the words of two of the 20 newsgroups, one decay
    ijcnn1          l2-logistic regression, 35,000 + 14,990 examples, 22 features, a decay per feature
    elastic net     scikit-learn's diabetes data, two strengths, five folds
    data cleaning   softmax regression on 1,000 digits, 40 % of the labels wrong, a weight per example, 400 clean digits

``HYPERGRAD_DATA`` names the folder of 20 newsgroups and ijcnn1; without it their stand-ins are drawn. Methods of
``hg.minimize`` start at the same λ. Random search, TPE (Optuna) and the grid draw from, or cover, the same box, and
start every solve from the last solution. SOBA, BO-REP and F²SA take 2,000 steps on all examples with a rate of 1/λmax.
The gap is that of the outer loss at exactly solved weights to the lowest that any method, or 100 steps of L-BFGS at
small tolerances, found. In float64. Writes ``minimize.json`` and ``minimize.md``.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import KFold

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

TOLERANCE, EVALUATIONS, GRID = 1e-7, 50, 100
INNER = hg.inner_solvers.lbfgs()
PROBLEMS = "ridge", "logistic", "ijcnn1", "elastic net", "data cleaning"


class Task(NamedTuple):
    """A problem to minimise; λ lies in the box [low, high] of unconstrained values."""

    problem: hg.BilevelProblem
    variables: hg.BilevelParams
    inner_batch: Any
    outer_batch: Any
    low: float
    high: float
    inner_solver: hg.inner_solvers.InnerSolver
    joint: bool = True  # whether SOBA, BO-REP and F²SA apply: not with a residual


class Row(NamedTuple):
    """What a method ended with, and what it spent."""

    hyperparams: Any
    gradients: int
    products: int
    seconds: float
    first_seconds: float
    note: str = ""


def _logistic(w: jax.Array, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))


def _squares(w: jax.Array, batch: Any) -> jax.Array:
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


@functools.cache  # one problem for all seeds, so that it compiles once
def _regularised(loss: Callable[..., jax.Array]) -> hg.BilevelProblem:
    def inner(w: Any, decay: Any, batch: Any, key: Any) -> jax.Array:
        return loss(w, batch) + hg.penalties.l2(w, decay)

    problem = hg.BilevelProblem(inner, lambda w, decay, batch, key: loss(w, batch))
    return hg.reparameterize(problem, hg.bijectors.exp())


def ridge(seed: int, quick: bool) -> Task:
    """Return least squares with one decay."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, 60)) * np.geomspace(1.0, 0.1, 60)
    y = x @ rng.normal(size=60) + rng.normal(size=200)
    problem = _regularised(_squares)
    train, valid = (x[:100], y[:100]), (x[100:], y[100:])
    return _task(problem, 60, jnp.array(-2.0), train, valid, -10.0, 5.0)


def logistic(seed: int, quick: bool) -> Task:
    """Return l2-logistic regression on text with one decay."""
    rng = np.random.default_rng(seed)
    path = Path(os.environ.get("HYPERGRAD_DATA", "")) / "20news" / "20news_counts.npz"
    if path.exists():
        import scipy.sparse  # type: ignore[import-untyped]

        file = np.load(path)
        csr = [file[f"train_{name}"] for name in ("counts", "indices", "indptr")]
        counts = scipy.sparse.csr_matrix(tuple(csr), (len(file["train_y"]), int(file["shape"][0])))
        chosen = np.flatnonzero(np.isin(file["train_y"], (1, 5)))
        counts, y = counts[chosen], np.where(file["train_y"][chosen] == 1, 1.0, -1.0)
        words = np.argsort(-np.asarray((counts > 0).sum(axis=0)).ravel(), kind="stable")[: 100 if quick else 2000]
        x = np.log1p(counts[:, words].toarray().astype(float))
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    else:
        x = (rng.random((1000, 300)) < 0.05) * rng.exponential(size=(1000, 300))
        y = np.sign(x @ rng.normal(size=300) + 0.5 * rng.normal(size=1000))
    order = rng.permutation(len(y))
    x, y, half = x[order], y[order], len(y) // 2
    problem = _regularised(_logistic)
    return _task(problem, x.shape[1], jnp.array(-4.0), (x[:half], y[:half]), (x[half:], y[half:]), -14.0, 2.0)


def ijcnn1(seed: int, quick: bool) -> Task:
    """Return l2-logistic regression with a decay per feature."""
    path = Path(os.environ.get("HYPERGRAD_DATA", "")) / "ijcnn1" / "ijcnn1.npz"
    if path.exists():
        file = np.load(path)
        x, y = (np.asarray(file[name], float) for name in ("x", "y"))
    else:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(49_990, 22)) * rng.uniform(0.1, 1.0, 22)
        y = np.sign(x @ rng.normal(size=22) + rng.normal(size=len(x)) - 1.0)
    if quick:
        x, y = x[::50], y[::50]
    cut = int(len(y) * 0.7001)
    start = jnp.asarray(np.random.default_rng(seed).uniform(-8.0, -4.0, 22))
    return _task(_regularised(_logistic), 22, start, (x[:cut], y[:cut]), (x[cut:], y[cut:]), -14.0, 2.0)


def elastic_net(seed: int, quick: bool) -> Task:
    """Return the elastic net by cross-validation."""
    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    folds = list(KFold(5, shuffle=True, random_state=seed).split(x))
    error = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)  # noqa: E731

    def prox(w: Any, strength: Any, step_size: Any) -> Any:
        shrunk = jnp.sign(w) * jnp.maximum(jnp.abs(w) - step_size * strength[0], 0.0)
        return shrunk / (1.0 + step_size * strength[1])

    smooth = hg.BilevelProblem(lambda w, h, b, k: 0.5 * error(w, b), lambda w, h, b, k: error(w, b))
    step = 1.0 / float(np.linalg.eigvalsh(x.T @ x / len(x))[-1])
    problem = hg.with_residual(smooth, hg.residuals.proximal_gradient(smooth, prox, step))
    problem = hg.cross_validation(hg.reparameterize(problem, hg.bijectors.exp()), folds)
    start = hg.BilevelParams(jnp.zeros((5, x.shape[1])), jnp.array([-3.0, -3.0]))
    data = jnp.asarray(x), jnp.asarray(y)
    return Task(problem, start, data, data, -10.0, 0.0, hg.inner_solvers.proximal(prox), joint=False)


@functools.cache
def _cleaning() -> hg.BilevelProblem:
    losses = lambda w, b: optax.losses.softmax_cross_entropy_with_integer_labels(b[0] @ w, b[1])  # noqa: E731
    problem = hg.BilevelProblem(
        lambda w, h, b, k: jnp.mean(h[b[2]] * losses(w, b)) + hg.penalties.l2(w, 1e-3),
        lambda w, h, b, k: losses(w, b).mean(),
    )
    return hg.reparameterize(problem, hg.bijectors.sigmoid())


def data_cleaning(seed: int, quick: bool) -> Task:
    """Return softmax regression with a weight per example."""
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    x, y, count = images[order] / 16.0, labels[order], 100 if quick else 1000
    noisy = np.where(rng.random(count) < 0.4, (y[:count] + rng.integers(1, 10, count)) % 10, y[:count])
    problem = _cleaning()
    train = jnp.asarray(x[:count]), jnp.asarray(noisy), jnp.arange(count)
    valid = jnp.asarray(x[-400:]), jnp.asarray(y[-400:])
    start = hg.BilevelParams(jnp.zeros((64, 10)), jnp.zeros(count))
    return Task(problem, start, train, valid, -3.0, 3.0, INNER)


def _task(
    problem: hg.BilevelProblem, size: int, start: jax.Array, train: Any, valid: Any, low: float, high: float
) -> Task:
    train, valid = (tuple(jnp.asarray(part) for part in split) for split in (train, valid))
    return Task(problem, hg.BilevelParams(jnp.zeros(size), start), train, valid, low, high, INNER)


def by_minimize(task: Task, method: hg.methods.Method, max_steps: int, tol: float = 1e-5) -> tuple[Row, Any]:
    """Run ``hg.minimize`` twice: the first compiles."""
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        found = hg.minimize(
            task.problem,
            task.variables,
            task.inner_batch,
            task.outer_batch,
            method=method,
            inner_solver=task.inner_solver,
            max_steps=max_steps,
            tol=tol,
        )
        jax.block_until_ready(found)
        times.append(time.perf_counter() - begun)
    spent = int(np.sum(found.history.num_gradients)), int(np.sum(found.history.num_products))
    return Row(found.hyperparams, *spent, times[1], times[0], found.message.partition(":")[0]), found.history


def evaluator(task: Task) -> Callable[..., tuple[float, Any, int, int]]:
    """Return ``evaluate(hyperparams, params) -> (outer loss, solution, gradients, products)``, to a small tolerance."""
    problem, solver = task.problem, task.inner_solver

    @jax.jit
    def run(h: Any, w: Any) -> Any:
        residual = None
        if problem.residual is not None:
            residual = lambda w: problem.residual(w, h, task.inner_batch, None)  # noqa: E731
        inner = hg.inner_solvers.InnerProblem(
            lambda w: problem.inner_loss(w, h, task.inner_batch, None), residual, problem.constrain(h)
        )
        found = solver.solve(inner, w, solver.init(w), TOLERANCE)
        value = problem.outer_loss(found.params, h, task.outer_batch, None)
        return value, found.params, found.num_gradients, found.num_products

    def evaluate(h: Any, w: Any) -> tuple[float, Any, int, int]:
        value, params, gradients, products = run(h, w)
        return float(value), params, int(gradients), int(products)

    return evaluate


def by_search(task: Task, name: str, seed: int, evaluations: int) -> Row:
    """Search the box by random points, TPE, or a grid of one hyperparameter."""
    evaluate, start = evaluator(task), task.variables
    leaves = np.shape(start.hyperparams)
    evaluate(start.hyperparams, start.params)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler: Any = optuna.samplers.TPESampler(seed=seed)
    if name == "random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    study = optuna.create_study(sampler=sampler)
    points = iter(np.linspace(task.low, task.high, evaluations)) if name == "grid" else None
    params, best, gradients, products, begun = start.params, (np.inf, start.hyperparams), 0, 0, time.perf_counter()
    for _ in range(evaluations):
        trial = None
        if points is None:
            trial = study.ask()
            drawn = [trial.suggest_float(str(i), task.low, task.high) for i in range(int(np.prod(leaves)))]
            h = jnp.asarray(drawn).reshape(leaves)
        else:
            h = jnp.full(leaves, next(points))
        value, params, more, extra = evaluate(h, params)
        gradients, products = gradients + more, products + extra
        if trial is not None:
            study.tell(trial, value)
        if value < best[0]:
            best = value, h
    return Row(best[1], gradients, products, time.perf_counter() - begun, 0.0)


def jointly(task: Task, name: str, steps: int, rate: float) -> Row:
    """Train weights and hyperparameters together; products and gradients are counted by what a step takes."""
    sigma = 100.0
    estimator = {
        "SOBA": lambda: hg.implicit(task.problem, hg.solvers.richardson(1)),
        "BO-REP": lambda: hg.implicit(task.problem, hg.solvers.richardson(1)),
        "F²SA": lambda: hg.first_order(task.problem, penalty=sigma),
    }[name]()
    outer: Any = optax.adam(0.05)
    if name == "BO-REP":
        outer = optax.chain(
            optax.ema(0.9, debias=False),
            hg.optimizers.normalize_by_update_norm(eps=1e-30),
            optax.scale_by_learning_rate(optax.exponential_decay(0.3, steps // 4, 0.5)),
        )
    tx = hg.bilevel(estimator, inner_optimizer=optax.sgd(rate), outer_optimizer=outer)

    @jax.jit
    def run(variables: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            variables, state = carry
            updates, state = tx.update(
                None, state, variables, inner_batch=task.inner_batch, outer_batch=task.outer_batch
            )
            return (optax.apply_updates(variables, updates), state), None

        return jax.lax.scan(step, (variables, tx.init(variables)), length=steps)[0][0]

    times = []
    for _ in range(2):
        begun = time.perf_counter()
        found = jax.block_until_ready(run(task.variables))
        times.append(time.perf_counter() - begun)
    products = 3 * steps if name != "F²SA" else 0  # one for x, one for its step, one mixed
    return Row(found.hyperparams, (3 if name == "F²SA" else 1) * steps, products, times[1], times[0])


LONGEST = hg.methods.lbfgs(1e-9)


@functools.cache
def _methods() -> dict[str, tuple[hg.methods.Method, int]]:
    """Return the methods, with their largest number of steps."""
    return {
        "HOAG": (hg.methods.hoag(), 100),
        "HOAG, exact tolerances": (hg.methods.hoag(lambda _: TOLERANCE), 100),
        "MAID, uncertified": (hg.methods.maid(uncertified=True), 100),
        "L-BFGS": (hg.methods.lbfgs(TOLERANCE), 50),
        "gradient descent: Adam(0.3)": (hg.methods.gradient_descent(optax.adam(0.3), TOLERANCE), 50),
    }


def largest_eigenvalue(task: Task) -> float:
    """Return λmax of the inner Hessian at the start."""
    batches = task.problem, task.variables, task.inner_batch
    return float(hg.diagnostics.extreme_eigenvalues(*batches, key=None, num_steps=20).largest)


def measured(name: str, seed: int, quick: bool) -> dict[str, Any]:
    """Return the rows of one problem and seed."""
    make = {
        "ridge": ridge,
        "logistic": logistic,
        "ijcnn1": ijcnn1,
        "elastic net": elastic_net,
        "data cleaning": data_cleaning,
    }[name]
    task = make(seed, quick)
    size, evaluations = int(np.size(task.variables.hyperparams)), 5 if quick else EVALUATIONS
    rows, histories = {}, {}
    for method, (made, steps) in _methods().items():
        rows[method], histories[method] = by_minimize(task, made, 3 if quick else steps)
        print(name, seed, method, rows[method][1:], flush=True)
    longest, _ = by_minimize(task, LONGEST, 5 if quick else 100, 1e-9)
    if size == 1:
        rows["grid of 100"] = by_search(task, "grid", seed, 10 if quick else GRID)
    rows["random search"] = by_search(task, "random", seed, evaluations)
    rows["TPE"] = by_search(task, "TPE", seed, evaluations)
    if task.joint:
        rate, steps = 1.0 / largest_eigenvalue(task), 10 if quick else 2000
        for method in ("SOBA", "BO-REP", "F²SA"):
            rows[method] = jointly(task, method, steps, rate)
            print(name, seed, method, rows[method][1:], flush=True)
    evaluate = evaluator(task)
    values = {method: evaluate(row.hyperparams, task.variables.params)[0] for method, row in rows.items()}
    best = min(*values.values(), evaluate(longest.hyperparams, task.variables.params)[0])
    found = {}
    for method, row in rows.items():
        found[method] = row._asdict() | {"gap": values[method] / best - 1, "value": values[method]}
        del found[method]["hyperparams"]
        if method in histories:
            history = histories[method]
            values_then = np.asarray(history.outer_loss)
            cost = np.cumsum(history.num_gradients + 2 * history.num_products)
            near = np.flatnonzero(values_then <= 1.01 * best)
            found[method]["steps to 1 %"] = int(near[0]) + 1 if len(near) else None
            found[method]["gradients to 1 %"] = int(np.sum(history.num_gradients[: near[0] + 1])) if len(near) else None
            found[method]["cost to 1 %"] = int(cost[near[0]]) if len(near) else None
    return {"best": best, "hyperparameters": size, "rows": found}


def report(record: dict[str, Any]) -> str:
    """Return the tables."""
    lines = ["# hg.minimize beside other methods", "", ABOUT, ""]
    for name, seeds in record["problems"].items():
        first = next(iter(seeds.values()))
        lines += [f"## {name}", "", f"{first['hyperparameters']} hyperparameters, {len(seeds)} seeds.", ""]
        lines += ["| method | gap, % | steps to 1 % | gradients | products | seconds | first call, seconds | ended |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for method in first["rows"]:
            rows = [seed["rows"][method] for seed in seeds.values()]
            gaps = [100 * row["gap"] for row in rows]
            near = [row.get("steps to 1 %") for row in rows]
            steps = "–" if None in near else f"{np.median(near):.0f}"
            ended = ", ".join(sorted({row["note"] for row in rows if row["note"]}))
            figures = [np.median([row[key] for row in rows]) for key in ("gradients", "products")]
            seconds = [np.median([row[key] for row in rows]) for key in ("seconds", "first_seconds")]
            shown = f"{np.median(gaps):.2f} ({min(gaps):.2f} to {max(gaps):.2f})"
            lines.append(
                f"| {method} | {shown} | {steps} | {figures[0]:,.0f} | {figures[1]:,.0f} | {seconds[0]:.2f} | "
                f"{f'{seconds[1]:.1f}' if seconds[1] else '–'} | {ended} |"
            )
        lines.append("")
    machine = record["machine"]
    lines.append(f"cpu {machine['cpu']}, cores {machine['cores']}, jax {machine['jax']}, date {machine['date']}.")
    return "\n".join(lines) + "\n"


ABOUT = """Medians over seeds, in float64. The gap (with the lowest and the highest) is that of the outer loss, at
exactly solved weights, to the lowest that was found. Seconds are those of a second call; a "first call" compiles, but
for seeds after the first. `python benchmarks/quality/minimize.py` describes the problems and writes this file."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ridge alone, few steps: does it run?")
    parser.add_argument("--only", default=",".join(PROBLEMS), help="problems, with a comma between")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    parser.add_argument("--merge", action="store_true", help="keep the other problems that the file has")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    kept = args.out / "minimize.json"
    problems = json.loads(kept.read_text())["problems"] if args.merge and kept.exists() else {}
    for name in ["ridge"] if args.quick else args.only.split(","):
        problems[name] = {
            str(seed): measured(name, seed, args.quick) for seed in range(1 if args.quick else args.seeds)
        }
        record = {**harness.circumstances(1), "problems": harness.in_order(problems, PROBLEMS)}
        harness.write(args.out, "minimize", record, report(record))
    return record


if __name__ == "__main__":
    main()
