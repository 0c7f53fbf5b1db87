"""Problems small enough to solve: how low the outer loss gets, for how many gradients, Hessian products and seconds.

    python benchmarks/quality/minimize.py [--quick] [--only "ridge; ijcnn1"] [--seeds 5] [--merge] [--environments DIR]

Problems, each with a training and a validation set:

    ridge            least squares, 60 features, 100 + 100 examples drawn, one decay
    logistic         l2-logistic regression on 2,000 words of two of the 20 newsgroups, one decay
    ijcnn1, one      l2-logistic regression, 35,000 + 14,990 examples, 22 features, one decay
    elastic net      scikit-learn's diabetes data, two strengths, five folds
    ijcnn1           as above, a decay per feature
    data cleaning    softmax regression on 1,000 digits, 40 % of labels wrong, a weight per example, 400 clean digits
    words            l2-logistic regression on 4,000 documents of 20 newsgroups (comp.* or not), sparse, a decay per
                     word (130,107) above 5e-5; at most 15 outer steps and points, timed with compilation

``HYPERGRAD_DATA`` names the folder of 20 newsgroups and ijcnn1; without it their stand-ins are drawn. Methods of
``hg.minimize`` start at the same λ. Random search, TPE (Optuna) and the grid draw from, or cover, the same box, and
start every solve from the last solution; from 100 hyperparameters on TPE searches one value for all. SOBA, BO-REP and
F²SA train on all examples with a rate of 1/λmax; of three outer rates the best counts, and the others cost nothing.
JAXopt (inner and outer LBFGS, implicit differentiation) runs in an environment of its own, made in ``--environments``
where there is none; it does not count gradients.

A path is the best λ that a method had after so much cost, a gradient of the inner loss costing 1 and a product 2; its
outer loss is that at weights solved to 1e-7 anew. The gap is to the lowest that any method, or 100 steps of L-BFGS at
small tolerances, found. In float64. Writes ``minimize.json``, ``minimize.md`` and ``minimize.png``.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import peer_accuracy
import scipy.sparse  # type: ignore[import-untyped]
from jax.experimental import sparse
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import KFold

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

TOLERANCE, EVALUATIONS, GRID = 1e-7, 50, 100
INNER = hg.inner_solvers.lbfgs()
PROBLEMS = "ridge", "logistic", "ijcnn1, one", "elastic net", "ijcnn1", "data cleaning", "words"
OUTER_RATES = 0.1, 0.03, 0.01
CHECKPOINTS = 20
PEER, PEER_SECONDS = "JAXopt", 180.0


class Task(NamedTuple):
    """A problem to minimise; λ lies in the box [low, high] of unconstrained values."""

    problem: hg.BilevelProblem
    variables: hg.BilevelParams
    inner_batch: Any
    outer_batch: Any
    low: float
    high: float
    inner_solver: hg.inner_solvers.InnerSolver
    joint_steps: int = 2000  # of SOBA, BO-REP and F²SA; 0 where they do not apply: a problem with a residual
    peer: str = ""  # how JAXopt's script knows the losses; "" where it does not
    fresh: bool = False  # whether each seed is another problem to compile
    large: bool = False  # at most 15 outer steps and points of a search, each timed once, with compilation


class Stop(NamedTuple):
    """The best λ that a method had, and what it had spent by then."""

    hyperparams: Any
    gradients: int | None
    products: int | None


class Run(NamedTuple):
    """What a method did."""

    path: list[Stop]
    seconds: float
    first_seconds: float | None = None
    note: str = ""


def _logistic(w: jax.Array, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))


def _squares(w: jax.Array, batch: Any) -> jax.Array:
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


@functools.cache  # one problem for all seeds, so that it compiles once
def _regularised(loss: Callable[..., jax.Array], least: float = 0.0) -> hg.BilevelProblem:
    def inner(w: Any, decay: Any, batch: Any, key: Any) -> jax.Array:
        return loss(w, batch) + hg.penalties.l2(w, least + decay)

    problem = hg.BilevelProblem(inner, lambda w, decay, batch, key: loss(w, batch))
    return hg.reparameterize(problem, hg.bijectors.exp())


def ridge(seed: int, quick: bool) -> Task:
    """Return least squares with one decay."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, 60)) * np.geomspace(1.0, 0.1, 60)
    y = x @ rng.normal(size=60) + rng.normal(size=200)
    problem = _regularised(_squares)
    train, valid = (x[:100], y[:100]), (x[100:], y[100:])
    return _task(problem, 60, jnp.array(-2.0), train, valid, -10.0, 5.0, peer="ridge")


def _newsgroups() -> tuple[Any, np.ndarray] | None:
    """Return counts (sparse) and classes of the training documents, where the file exists."""
    path = Path(os.environ.get("HYPERGRAD_DATA", "")) / "20news" / "20news_counts.npz"
    if not path.exists():
        return None
    file = np.load(path)
    csr = [file[f"train_{name}"] for name in ("counts", "indices", "indptr")]
    return scipy.sparse.csr_matrix(tuple(csr), (len(file["train_y"]), int(file["shape"][0]))), file["train_y"]


def _rows_of_norm_one(counts: Any) -> Any:
    x = counts.astype(float).log1p()
    return scipy.sparse.diags(1.0 / np.maximum(scipy.sparse.linalg.norm(x, axis=1), 1e-9)) @ x


def logistic(seed: int, quick: bool) -> Task:
    """Return l2-logistic regression on text with one decay."""
    rng, found = np.random.default_rng(seed), _newsgroups()
    if found is not None:
        counts, y = found
        chosen = np.flatnonzero(np.isin(y, (1, 5)))
        counts, y = counts[chosen], np.where(y[chosen] == 1, 1.0, -1.0)
        words = np.argsort(-np.asarray((counts > 0).sum(axis=0)).ravel(), kind="stable")[: 100 if quick else 2000]
        x = _rows_of_norm_one(counts[:, words]).toarray()
    else:
        x = (rng.random((1000, 300)) < 0.05) * rng.exponential(size=(1000, 300))
        y = np.sign(x @ rng.normal(size=300) + 0.5 * rng.normal(size=1000))
    order = rng.permutation(len(y))
    x, y, half = x[order], y[order], len(y) // 2
    problem = _regularised(_logistic)
    train, valid = (x[:half], y[:half]), (x[half:], y[half:])
    return _task(problem, x.shape[1], jnp.array(-4.0), train, valid, -14.0, 2.0, peer="logistic")


def words(seed: int, quick: bool) -> Task:
    """Return l2-logistic regression on text with a decay per word, the features sparse."""
    rng, found = np.random.default_rng(seed), _newsgroups()
    if found is not None:
        counts, y = found[0], np.where((found[1] >= 1) & (found[1] <= 5), 1.0, -1.0)
    else:
        counts = scipy.sparse.random(4000, 100_000, 1e-3, "csr", rng=np.random.default_rng(0))
        y = np.sign(counts @ np.random.default_rng(1).normal(size=100_000) + 0.1 * rng.normal(size=4000))
    order = rng.permutation(len(y))[: 200 if quick else 4000]
    counts = counts[:, ::100] if quick else counts
    x, y, half = _rows_of_norm_one(counts[order]).tocsr(), y[order], len(order) // 2
    train, valid = (sparse.BCOO.from_scipy_sparse(part) for part in (x[:half], x[half:]))
    size = x.shape[1]
    start = hg.BilevelParams(jnp.zeros(size), jnp.full(size, -8.0))
    batches = (train, jnp.asarray(y[:half])), (valid, jnp.asarray(y[half:]))
    # Each seed has other numbers of entries: other shapes to compile.
    problem, solver = _regularised(_logistic, 5e-5), hg.inner_solvers.newton_cg()
    return Task(problem, start, *batches, -10.0, 2.0, solver, joint_steps=200, fresh=True, large=True)


def ijcnn1(seed: int, quick: bool, one: bool = False) -> Task:
    """Return l2-logistic regression with a decay per feature, or one."""
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
    start = jnp.asarray(np.random.default_rng(seed).uniform(-8.0, -4.0, () if one else 22))
    train, valid = (x[:cut], y[:cut]), (x[cut:], y[cut:])
    return _task(_regularised(_logistic), 22, start, train, valid, -14.0, 2.0, peer="logistic")


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
    return Task(problem, start, data, data, -10.0, 0.0, hg.inner_solvers.proximal(prox), joint_steps=0, fresh=True)


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
    return Task(problem, start, train, valid, -3.0, 3.0, INNER, peer="data cleaning")


def _task(
    problem: hg.BilevelProblem,
    size: int,
    start: jax.Array,
    train: Any,
    valid: Any,
    low: float,
    high: float,
    peer: str,
) -> Task:
    train, valid = (tuple(jnp.asarray(part) for part in split) for split in (train, valid))
    return Task(problem, hg.BilevelParams(jnp.zeros(size), start), train, valid, low, high, INNER, peer=peer)


def by_minimize(task: Task, method: hg.methods.Method, max_steps: int, *, repeats: int = 1, tol: float = 1e-5) -> Run:
    """Run ``hg.minimize`` step by step for the path, and ``repeats`` times as a whole: the first compiles.

    With 0 repeats the seconds are those of the run step by step, with compilation.
    """
    options = {"method": method, "inner_solver": task.inner_solver, "max_steps": max_steps, "tol": tol}
    given = task.problem, task.variables, task.inner_batch, task.outer_batch
    path, times = [], []

    def callback(result: hg.MinimizeResult) -> None:
        spent = int(np.sum(result.history.num_gradients)), int(np.sum(result.history.num_products))
        path.append(Stop(result.hyperparams, *spent))

    begun = time.perf_counter()
    found = hg.minimize(*given, **options, callback=callback)  # type: ignore[arg-type]
    alone = time.perf_counter() - begun
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(hg.minimize(*given, **options))  # type: ignore[arg-type]
        times.append(time.perf_counter() - begun)
    note = found.message.partition(":")[0]
    return Run(path, times[-1] if times else alone, times[0] if repeats > 1 else None, note)


Evaluate = Callable[..., tuple[float, Any, int, int]]


def evaluator(task: Task) -> Evaluate:
    """Return ``evaluate(hyperparams, params) -> (outer loss, solution, gradients, products)``, to a small tolerance."""
    problem, solver = task.problem, task.inner_solver

    @jax.jit
    def run(h: Any, w: Any, inner_batch: Any, outer_batch: Any) -> Any:
        residual = None
        if problem.residual is not None:
            residual = lambda w: problem.residual(w, h, inner_batch, None)  # noqa: E731
        inner = hg.inner_solvers.InnerProblem(
            lambda w: problem.inner_loss(w, h, inner_batch, None), residual, problem.constrain(h)
        )
        found = solver.solve(inner, w, solver.init(w), TOLERANCE)
        value = problem.outer_loss(found.params, h, outer_batch, None)
        return value, found.params, found.num_gradients, found.num_products

    def evaluate(h: Any, w: Any) -> tuple[float, Any, int, int]:
        value, params, gradients, products = run(h, w, task.inner_batch, task.outer_batch)
        return float(value), params, int(gradients), int(products)

    return evaluate


def by_search(task: Task, name: str, evaluate: Evaluate, seed: int, evaluations: int) -> Run:
    """Search the box by random points, TPE, or a grid of one hyperparameter."""
    shape = np.shape(task.variables.hyperparams)
    drawn_shape = () if name == "TPE" and np.prod(shape) > 100 else shape
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    rng, points = np.random.default_rng(seed), iter(np.linspace(task.low, task.high, evaluations))
    params, best, gradients, products = task.variables.params, np.inf, 0, 0
    path, trial, begun = [], None, time.perf_counter()
    for _ in range(evaluations):
        if name == "grid of 100":
            drawn = np.asarray(next(points))
        elif name == "random search":
            drawn = rng.uniform(task.low, task.high, shape)
        else:
            trial = study.ask()
            count = int(np.prod(drawn_shape))
            drawn = np.asarray([trial.suggest_float(str(i), task.low, task.high) for i in range(count)])
        h = jnp.broadcast_to(jnp.asarray(drawn).reshape(drawn_shape), shape)
        value, params, more, extra = evaluate(h, params)
        gradients, products = gradients + more, products + extra
        if trial is not None:
            study.tell(trial, value)
        if value < best:
            best = value
            path.append(Stop(h, gradients, products))
    path.append(Stop(path[-1].hyperparams, gradients, products))
    return Run(path, time.perf_counter() - begun)


@functools.cache  # one program for all rates and seeds
def _joint_program(problem: hg.BilevelProblem, name: str, steps: int, chunk: int) -> tuple[Any, Any]:
    """Return ``init(variables, rates)`` and ``run(variables, state, batches, rates)``, which takes ``chunk`` steps."""

    def transformation(rates: Any, size: int) -> Any:
        inner_rate, outer_rate = rates
        estimator: hg.Estimator = hg.implicit(problem, hg.solvers.richardson(1))
        outer: Any = optax.adam(outer_rate)
        if name == "F²SA":
            estimator = hg.first_order(problem, penalty=100.0)
        if name == "BO-REP":
            halved = lambda count: -np.sqrt(size) * outer_rate * 0.5 ** (count / max(1, steps // 4))  # noqa: E731
            outer = optax.chain(
                optax.ema(0.9, debias=False),
                hg.optimizers.normalize_by_update_norm(eps=1e-30),
                optax.scale_by_schedule(halved),
            )
        return hg.bilevel(estimator, inner_optimizer=optax.sgd(inner_rate), outer_optimizer=outer)

    @jax.jit
    def init(variables: Any, rates: Any) -> Any:
        return transformation(rates, np.size(variables.hyperparams)).init(variables)

    @jax.jit
    def run(variables: Any, state: Any, batches: Any, rates: Any) -> Any:
        tx = transformation(rates, np.size(variables.hyperparams))

        def step(carry: Any, _: Any) -> Any:
            variables, state = carry
            updates, state = tx.update(None, state, variables, inner_batch=batches[0], outer_batch=batches[1])
            return (optax.apply_updates(variables, updates), state), None

        return jax.lax.scan(step, (variables, state), length=chunk)[0]

    return init, run


def jointly(task: Task, name: str, steps: int, inner_rate: float, outer_rate: float) -> Run:
    """Train weights and hyperparameters together; products and gradients are counted by what a step takes."""
    chunk = max(1, steps // CHECKPOINTS)
    init, run = _joint_program(task.problem, name, steps, chunk)
    batches, rates = (task.inner_batch, task.outer_batch), (jnp.asarray(inner_rate), jnp.asarray(outer_rate))
    cost = (3, 0) if name == "F²SA" else (1, 3)  # one product for the residual, one for its step, one mixed
    variables, path = task.variables, []
    state = init(variables, rates)
    jax.block_until_ready(run(variables, state, batches, rates))
    begun = time.perf_counter()
    for index in range(1, steps // chunk + 1):
        variables, state = run(variables, state, batches, rates)
        path.append(Stop(variables.hyperparams, *(part * index * chunk for part in cost)))
    jax.block_until_ready(variables)
    return Run(path, time.perf_counter() - begun, note=f"outer rate {outer_rate}")


def by_jaxopt(task: Task, environments: Path) -> Run:
    """Ask JAXopt in its own environment; the note says why it did not answer."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = [task.variables.params, task.variables.hyperparams, *task.inner_batch[:2], *task.outer_batch[:2]]
        path = Path(folder) / "problem.npz"
        np.savez(path, *[np.asarray(part) for part in arrays], kind=task.peer)
        found = peer_accuracy.ask(
            environments, PEER, path, make=True, script="_peer_jaxopt_minimize.py", seconds=PEER_SECONDS
        )
    if "failed" in found:
        return Run([], 0.0, note=found["failed"])
    stop = Stop(jnp.asarray(found["hyperparams"]), None, None)
    return Run([stop], found["seconds"], found["first_seconds"], f"{found['steps']} steps")


LONGEST = hg.methods.lbfgs(1e-9)
HOAG = hg.methods.hoag()
EXACT = hg.methods.hoag(lambda _: TOLERANCE)


@functools.cache
def _methods() -> dict[str, tuple[hg.methods.Method, int]]:
    """Return the methods, with their largest number of steps."""
    return {
        "HOAG": (HOAG, 100),
        "HOAG, exact tolerances": (EXACT, 100),
        "MAID, uncertified": (hg.methods.maid(uncertified=True), 100),
        "L-BFGS": (hg.methods.lbfgs(TOLERANCE), 50),
        "gradient descent: Adam(0.3)": (hg.methods.gradient_descent(optax.adam(0.3), TOLERANCE), 50),
    }


def largest_eigenvalue(task: Task) -> float:
    """Return λmax of the inner Hessian at the start."""
    batches = task.problem, task.variables, task.inner_batch
    return float(hg.diagnostics.extreme_eigenvalues(*batches, key=None, num_steps=20).largest)


def made(name: str, seed: int, quick: bool) -> Task:
    """Return a problem by name."""
    if name == "ijcnn1, one":
        return ijcnn1(seed, quick, one=True)
    makers = (ridge, logistic, elastic_net, ijcnn1, data_cleaning, words)
    return {maker.__name__.replace("_", " "): maker for maker in makers}[name](seed, quick)


def measured(name: str, seed: int, quick: bool, environments: Path | None) -> dict[str, Any]:
    """Return the rows of one problem and seed."""
    task = made(name, seed, quick)
    size, evaluate = int(np.size(task.variables.hyperparams)), evaluator(task)
    evaluations = 5 if quick else 15 if task.large else 50
    repeats = 0 if task.large else 2 if seed == 0 or task.fresh else 1
    runs: dict[str, Run] = {}

    def done(method: str, run: Run) -> None:
        runs[method] = run
        print(name, seed, method, f"{run.seconds:.2f} s", run.note, flush=True)

    for method, (of, steps) in _methods().items():
        done(method, by_minimize(task, of, 3 if quick else min(steps, 15 if task.large else steps), repeats=repeats))
    longest = by_minimize(task, LONGEST, 5 if quick else 30 if task.large else 100, repeats=0, tol=1e-9)
    evaluate(jnp.asarray(np.asarray(task.variables.hyperparams)), task.variables.params)  # compiles
    for method in [*(["grid of 100"] if size == 1 else []), "random search", "TPE"]:
        points = 100 if method == "grid of 100" and not quick else evaluations
        done(method, by_search(task, method, evaluate, seed, points))
    if task.joint_steps:
        inner_rate, steps = 1.0 / largest_eigenvalue(task), 20 if quick else task.joint_steps
        for method in ("SOBA", "BO-REP", "F²SA"):
            tried = [jointly(task, method, steps, inner_rate, rate) for rate in OUTER_RATES[: 1 if quick else None]]
            ends = [evaluate(run.path[-1].hyperparams, task.variables.params)[0] for run in tried]
            done(method, tried[int(np.argmin(np.nan_to_num(ends, nan=np.inf)))])
    if environments is not None and task.peer:
        done(PEER, by_jaxopt(task, environments))
    runs = {method: run._replace(path=_thinned(run.path)) for method, run in runs.items()}
    curves = {method: _losses(evaluate, task, run.path) for method, run in runs.items()}
    best = min(*(min(curve, default=np.inf) for curve in curves.values()), *_losses(evaluate, task, longest.path[-1:]))
    rows = {method: _row(run, curves[method], best) for method, run in runs.items()}
    found = {"best": best, "hyperparameters": size, "rows": rows}
    if size == 1:
        found["starts"] = [_from_start(task, evaluate, share, min(curves["grid of 100"]), quick) for share in STARTS]
    return found


def _thinned(path: list[Stop]) -> list[Stop]:
    """Return at most about 25 stops: the first ten, then ever fewer, and the last."""
    kept = sorted({*range(min(10, len(path))), *np.geomspace(1, max(1, len(path)), 25).astype(int) - 1})
    return [path[place] for place in kept if place < len(path)]


def _losses(evaluate: Evaluate, task: Task, path: Sequence[Stop]) -> list[float]:
    """Return the outer loss at exact weights of each stop."""
    params, found = task.variables.params, []
    for stop in path:
        value, solved, _, _ = evaluate(stop.hyperparams, params)
        params = solved if np.isfinite(value) else params
        found.append(value)
    return found


def _row(run: Run, losses: list[float], best: float) -> dict[str, Any]:
    gaps = [float(gap) for gap in np.minimum.accumulate(np.asarray(losses)) / best - 1] if losses else []
    last = run.path[-1] if run.path else Stop(None, None, None)
    found = {
        "gap": gaps[-1] if gaps else None,
        "gradients": last.gradients,
        "products": last.products,
        "seconds": run.seconds,
        "first_seconds": run.first_seconds,
        "note": run.note,
        "curve": [[_cost(stop), gap] for stop, gap in zip(run.path, gaps, strict=True)],
    }
    for share in (0.01, 0.001) if last.gradients is not None else ():
        near = [index for index, gap in enumerate(gaps) if gap <= share]
        found[f"cost to {100 * share:g} %"] = _cost(run.path[near[0]]) if near else None
    return found


def _cost(stop: Stop) -> int | None:
    return None if stop.gradients is None or stop.products is None else stop.gradients + 2 * stop.products


STARTS = 0.25, 0.5, 0.75  # of the box


def _from_start(task: Task, evaluate: Evaluate, share: float, grid: float, quick: bool) -> dict[str, Any]:
    """Return what HOAG needs to come within 1 % of the grid, and what it would need with exact tolerances."""
    start = jnp.full_like(task.variables.hyperparams, task.low + share * (task.high - task.low))
    task = task._replace(variables=task.variables._replace(hyperparams=start))
    found: dict[str, Any] = {"start": float(start)}
    for name, method in {"hoag": HOAG, "exact": EXACT}.items():
        run = by_minimize(task, method, 2 if quick else 50, repeats=0)
        near = [i for i, value in enumerate(_losses(evaluate, task, run.path)) if value <= 1.01 * grid]
        found[name] = {
            "steps": near[0] + 1 if near else None,
            "gradients": run.path[near[0]].gradients if near else None,
            "cost": _cost(run.path[near[0]]) if near else None,
        }
    return found


def report(record: dict[str, Any]) -> str:
    """Return the tables."""
    lines = ["# hg.minimize beside other methods", "", ABOUT, "", "![gap against cost and time](minimize.png)", ""]
    for name, seeds in record["problems"].items():
        first = next(iter(seeds.values()))
        lines += [f"## {name}", "", f"{first['hyperparameters']:,} hyperparameters, {len(seeds)} seeds.", ""]
        head = "method", "gap, %", "cost to 1 %", "cost to 0.1 %", "gradients", "products", "seconds"
        lines += ["| " + " | ".join([*head, "first call, seconds", "ended"]) + " |", "|" + " --- |" * 9]
        for method in first["rows"]:
            rows = [seed["rows"][method] for seed in seeds.values()]
            gaps = [100 * row["gap"] for row in rows if row["gap"] is not None]
            shown = f"{np.median(gaps):.3g} ({min(gaps):.2g} to {max(gaps):.2g})" if gaps else "–"
            ended = ", ".join(sorted({row["note"] for row in rows if row["note"]}))
            of = [
                *("cost to 1 %", "cost to 0.1 %"),
                *("gradients", "products", "seconds", "first_seconds"),
            ]
            cells = [_median([row.get(key) for row in rows], "seconds" in key) for key in of]
            lines.append("| " + " | ".join([method, shown, *cells, ended]) + " |")
        lines += ["", *_starts(seeds)]
    lines.append(harness.where(record["machine"]))
    return "\n".join(lines) + "\n"


def _median(values: list[Any], seconds: bool) -> str:
    """Return the median; with how many seeds got there, where not all did."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    shown = f"{np.median(known):.2f}" if seconds else f"{np.median(known):,.0f}"
    return shown if seconds or len(known) == len(values) else f"{shown} ({len(known)} of {len(values)})"


def _starts(seeds: dict[str, Any]) -> list[str]:
    """Return the lines on HOAG from three starts."""
    found = [start for seed in seeds.values() for start in seed.get("starts", [])]
    if not found:
        return []
    lines = ["HOAG to 1 % above the best of the grid, medians over seeds:", ""]
    lines += [
        "| start | steps | gradients | with exact tolerances | ratio, largest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for place in range(len(STARTS)):
        rows = [seed["starts"][place] for seed in seeds.values()]
        both = [(row["hoag"]["gradients"], row["exact"]["gradients"]) for row in rows]
        ratios = [one / other for one, other in both if one is not None and other]
        ratio = f"{np.median(ratios):.2f}, {max(ratios):.2f}" if ratios else "–"
        cells = [
            f"{np.median([row['start'] for row in rows]):.1f}",
            _median([row["hoag"]["steps"] for row in rows], False),
            *(_median([pair[i] for pair in both], False) for i in (0, 1)),
            ratio,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


ABOUT = """Medians over seeds, in float64. The gap (with the lowest and the highest) is that of the outer loss, at
exactly solved weights, to the lowest that was found. Cost is gradients + 2 × products until the gap is below 1 % or
0.1 %; "(3 of 5)": three seeds of five got there. Seconds are those of a second call; a "first call" compiles.
`python benchmarks/quality/minimize.py` describes the problems and methods, and writes this file."""


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the gap against cost, and against time, a row per problem: medians over seeds."""
    problems = record["problems"]
    figure = Figure(figsize=(11.0, 3.2 * len(problems)), layout="constrained")
    axes = figure.subplots(len(problems), 2, squeeze=False, sharey="row")
    colors: dict[str, str] = {}
    for row, (name, seeds) in zip(axes, problems.items(), strict=True):
        for method in next(iter(seeds.values()))["rows"]:
            color = colors.setdefault(method, f"C{len(colors)}" if len(colors) < 10 else "k")
            runs = [seed["rows"][method] for seed in seeds.values()]
            runs = [run for run in runs if run["curve"]]
            if not runs:
                continue
            if runs[0]["gradients"] is None:  # its cost is not known
                at = np.median([[run["seconds"], run["gap"]] for run in runs], axis=0)
                row[1].loglog(at[0], max(at[1], 1e-6), "x", color=color, label=method)
                continue
            ends = [run["curve"][-1][0] for run in runs]
            costs = np.geomspace(max(min(run["curve"][0][0] for run in runs), 1), np.median(ends), 60)
            rows = [_at_costs(run["curve"], costs) for run in runs]
            middle, low, high = (np.maximum(np.quantile(rows, q, axis=0), 1e-6) for q in (0.5, 0.0, 1.0))
            seconds = costs * np.median([run["seconds"] / end for run, end in zip(runs, ends, strict=True)])
            for axis, x in zip(row, (costs, seconds), strict=True):
                axis.loglog(x, middle, color=color, label=method, lw=1.5)
                axis.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
        row[0].set(title=f"{name}: {next(iter(seeds.values()))['hyperparameters']:,} hyperparameters")
        row[0].set(xlabel="gradients + 2 × products", ylabel="outer loss / lowest − 1")
        row[1].set(xlabel="seconds, compiled")
    handles = {text: line for row in axes for line, text in zip(*row[1].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def _at_costs(curve: list[list[float]], costs: np.ndarray) -> np.ndarray:
    """Return the gap reached at each cost: that of the last stop before it, and of the first one where none is."""
    spent, gaps = np.asarray(curve).T
    return gaps[np.maximum(np.searchsorted(spent, costs, side="right") - 1, 0)]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ridge alone, few steps: does it run?")
    parser.add_argument("--only", default="; ".join(PROBLEMS), help="problems, with a semicolon between")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    parser.add_argument("--merge", action="store_true", help="keep the other problems that the file has")
    parser.add_argument(
        "--environments", type=Path, help="folder of JAXopt's environment; without it JAXopt has no row"
    )
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    kept = args.out / "minimize.json"
    problems = json.loads(kept.read_text())["problems"] if args.merge and kept.exists() else {}
    record: dict[str, Any] = {}
    for name in ["ridge"] if args.quick else args.only.split("; "):
        problems[name] = {}
        for seed in range(1 if args.quick else args.seeds):
            problems[name][str(seed)] = measured(name, seed, args.quick, args.environments)
            record = {**harness.circumstances(1), "problems": harness.in_order(problems, PROBLEMS)}
            harness.write(args.out, "minimize", record, report(record))
    draw(record, args.out / "minimize.png")
    return record


if __name__ == "__main__":
    main()
