"""``hg.minimize`` beside scikit-learn's searches: cross-validated loss, test loss and seconds, on the same folds.

    python benchmarks/quality/scikit_learn.py [--quick] [--only "elastic net; groups"] [--seeds 5] [--merge]

    elastic net            diabetes data; ElasticNetCV (100 strengths × 7 ratios) and minimize, two strengths
    logistic regression    breast cancer data; LogisticRegressionCV (10 and 100 values of C) and minimize, one decay
    groups                 least squares, 200 features in 3, 10, 30 and 100 groups, a penalty per group, 300 examples;
                           GridSearchCV (3 groups: 7³ points; more: one penalty for all groups, 50 points), TPE
                           (Optuna, 100 points), random search (100 points) and minimize

Five folds; the outer loss is the mean over folds. Every method is fitted on all training data with what it chose, and
tested on data that it has not seen: a quarter of the real data, 5,000 drawn examples of the groups. Rivals solve ridge
regression by Cholesky factors; they are given their folds' matrices XᵀX, so that a point costs little. Seconds are
those of a whole call; of ``minimize`` also without compilation (a second call). In float64, on one thread where
``n_jobs`` can be chosen. Writes ``scikit_learn.json`` and ``scikit_learn.md``.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optuna
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNetCV, LogisticRegressionCV
from sklearn.model_selection import GridSearchCV, KFold

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

PROBLEMS = "elastic net", "logistic regression", "groups 3", "groups 10", "groups 30", "groups 100"
POINTS, FEATURES, EXAMPLES = 100, 200, 300
LOW, HIGH = 1e-4, 1e2  # of penalties, for every method
Data = tuple[np.ndarray, np.ndarray]


def _standardised(data: Data, seed: int) -> tuple[Data, Data]:
    """Return (train, test), the features with the mean and deviation of the training part removed."""
    x, y = data
    order = np.random.default_rng(seed).permutation(len(y))
    cut = 3 * len(y) // 4
    mean, deviation = x[order[:cut]].mean(0), x[order[:cut]].std(0)
    x = (x - mean) / deviation
    return (x[order[:cut]], y[order[:cut]]), (x[order[cut:]], y[order[cut:]])


def _minimized(problem: hg.BilevelProblem, start: hg.BilevelParams, data: Data, **options: Any) -> Any:
    """Return the result at a small tolerance, the seconds of the first call and those of the second."""
    options = {"tol": 1e-5, **options}
    times, batch = [], tuple(jnp.asarray(part) for part in data)
    for _ in range(2):
        begun = time.perf_counter()
        found = jax.block_until_ready(hg.minimize(problem, start, batch, batch, **options))
        times.append(time.perf_counter() - begun)
    return found, *times


def _row(loss: Any, test: Any, seconds: float, first: float | None = None, note: str = "") -> dict[str, Any]:
    return {"cv": float(loss), "test": float(test), "seconds": seconds, "first_seconds": first, "note": note}


def elastic_net(seed: int, quick: bool) -> dict[str, Any]:
    """Return the rows of the elastic net; losses are mean squared errors over the variance of the training targets."""
    train, test = _standardised(load_diabetes(return_X_y=True), seed)
    mean, deviation = train[1].mean(), train[1].std()
    (x, y), (test_x, test_y) = ((part[0], (part[1] - mean) / deviation) for part in (train, test))
    folds = list(KFold(5, shuffle=True, random_state=seed).split(x))
    begun = time.perf_counter()
    ratios = [0.1, 0.5, 0.9] if quick else [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = ElasticNetCV(l1_ratio=ratios, cv=folds, fit_intercept=False, alphas=100).fit(x, y)
    seconds = time.perf_counter() - begun
    loss = found.mse_path_.mean(axis=-1).min()
    error = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)  # noqa: E731
    rows = {"ElasticNetCV": _row(loss, error(found.coef_, (test_x, test_y)), seconds)}

    def prox(w: Any, strength: Any, step_size: Any) -> Any:
        shrunk = jnp.sign(w) * jnp.maximum(jnp.abs(w) - step_size * strength[0], 0.0)
        return shrunk / (1.0 + step_size * strength[1])

    smooth = hg.BilevelProblem(lambda w, h, b, k: 0.5 * error(w, b), lambda w, h, b, k: error(w, b))
    step = 1.0 / float(np.linalg.eigvalsh(x.T @ x / len(x))[-1])
    of_one = hg.with_residual(smooth, hg.residuals.proximal_gradient(smooth, prox, step))
    of_one = hg.reparameterize(of_one, hg.bijectors.exp())
    start = hg.BilevelParams(jnp.zeros((5, x.shape[1])), jnp.array([-3.0, -3.0]))
    inner = hg.inner_solvers.proximal(prox)
    best, first, second = _minimized(hg.cross_validation(of_one, folds), start, (x, y), inner_solver=inner)
    refit = hg.diagnostics.solve_inner(of_one, hg.BilevelParams(best.params[0], best.hyperparams), (x, y)).params
    note = best.message.partition(":")[0]
    return rows | {"minimize": _row(best.value, error(refit, (test_x, test_y)), second, first, note)}


def logistic_regression(seed: int, quick: bool) -> dict[str, Any]:
    """Return the rows of l2-logistic regression; losses are mean log losses."""
    x, y = load_breast_cancer(return_X_y=True)
    (x, y), (test_x, test_y) = _standardised((x, np.where(y == 1, 1.0, -1.0)), seed)
    x, test_x = (np.concatenate([part, np.ones((len(part), 1))], axis=1) for part in (x, test_x))
    folds = list(KFold(5, shuffle=True, random_state=seed).split(x))
    loss = lambda w, batch: jnp.mean(jnp.logaddexp(0.0, -batch[1] * (batch[0] @ w)))  # noqa: E731
    rows = {}
    for count in (10,) if quick else (10, 100):
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of attributes that change in later versions
            options = {"scoring": "neg_log_loss", "fit_intercept": False, "tol": 1e-6, "max_iter": 1000}
            found = LogisticRegressionCV(Cs=count, cv=folds, **options).fit(x, y)
        seconds = time.perf_counter() - begun
        scores = np.asarray(next(iter(found.scores_.values())) if isinstance(found.scores_, dict) else found.scores_)
        value = -scores.reshape(len(folds), -1).mean(axis=0).max()
        rows[f"LogisticRegressionCV, {count} values"] = _row(value, loss(found.coef_[0], (test_x, test_y)), seconds)

    def inner(w: Any, h: Any, batch: Any, key: Any) -> Any:
        return loss(w, batch) + hg.penalties.l2(w, h)

    # scikit-learn's C: mean loss + ‖w‖²/(2 C n), its grid from C = 1e-4 to 1e4
    of_one = hg.BilevelProblem(inner, lambda w, h, batch, key: loss(w, batch))
    of_one = hg.reparameterize(of_one, hg.bijectors.exp())
    start = hg.BilevelParams(jnp.zeros((5, x.shape[1])), jnp.log(1.0 / len(y)))
    best, first, second = _minimized(hg.cross_validation(of_one, folds), start, (x, y))
    refit = hg.diagnostics.solve_inner(of_one, hg.BilevelParams(jnp.zeros(x.shape[1]), best.hyperparams), (x, y)).params
    note = best.message.partition(":")[0]
    return rows | {"minimize": _row(best.value, loss(refit, (test_x, test_y)), second, first, note)}


class GroupRidge(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Least squares with a penalty per group: scikit-learn's interface for ``GridSearchCV``."""

    def __init__(self, groups: Any = None, a: float = 1.0, b: float | None = None, c: float | None = None) -> None:
        self.groups, self.a, self.b, self.c = groups, a, b, c

    def fit(self, x: np.ndarray, y: np.ndarray) -> "GroupRidge":
        """Solve the normal equations."""
        penalties = np.asarray([self.a if value is None else value for value in (self.a, self.b, self.c)])
        per_feature = penalties[self.groups] if self.groups is not None else np.full(x.shape[1], self.a)
        self.coef_ = _ridge(x.T @ x / len(y), x.T @ y / len(y), per_feature)
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return x w."""
        return x @ self.coef_


def _ridge(gram: np.ndarray, moments: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.solve(gram + np.diag(penalties), moments))


def group_penalties(count: int, seed: int, quick: bool) -> dict[str, Any]:
    """Return the rows of least squares with a penalty per group; losses are mean squared errors."""
    rng = np.random.default_rng(seed)
    groups = np.arange(FEATURES) * count // FEATURES
    scales = 10.0 ** rng.uniform(-2.0, 0.0, count)  # of the true weights, a group at a time
    w_true = scales[groups] * rng.normal(size=FEATURES)

    def draw(examples: int) -> Data:
        x = rng.normal(size=(examples, FEATURES))
        return x, x @ w_true + rng.normal(size=examples)

    (x, y), test = draw(EXAMPLES), draw(5000)
    folds = list(KFold(5, shuffle=True, random_state=seed).split(x))
    parts = [(x[rows].T @ x[rows] / len(rows), x[rows].T @ y[rows] / len(rows), x[v], y[v]) for rows, v in folds]
    whole = x.T @ x / len(y), x.T @ y / len(y)

    def cv(penalties: np.ndarray) -> float:
        errors = [np.mean((vx @ _ridge(gram, at, penalties[groups]) - vy) ** 2) for gram, at, vx, vy in parts]
        return float(np.mean(errors))

    def tested(penalties: np.ndarray) -> float:
        return float(np.mean((test[0] @ _ridge(*whole, penalties[groups]) - test[1]) ** 2))

    rows = {"GridSearchCV": _grid(count, groups, (x, y), folds, tested, quick)}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name, sampler in {
        "TPE": optuna.samplers.TPESampler(seed=seed),
        "random search": optuna.samplers.RandomSampler(seed=seed),
    }.items():
        begun, study = time.perf_counter(), optuna.create_study(sampler=sampler)
        for _ in range(5 if quick else POINTS):
            trial = study.ask()
            drawn = [trial.suggest_float(str(group), LOW, HIGH, log=True) for group in range(count)]
            study.tell(trial, cv(np.asarray(drawn)))
        seconds = time.perf_counter() - begun
        chosen = np.asarray([study.best_params[str(group)] for group in range(count)])
        rows[name] = _row(study.best_value, tested(chosen), seconds, note=f"{len(study.trials)} points")

    error = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)  # noqa: E731

    def inner(w: Any, h: Any, batch: Any, key: Any) -> Any:
        return 0.5 * error(w, batch) + hg.penalties.l2(w, h[groups])

    bijector = hg.bijectors.interval(LOW, HIGH)
    problem = hg.reparameterize(hg.BilevelProblem(inner, lambda w, h, b, k: error(w, b)), bijector)
    of_folds = hg.cross_validation(problem, folds)
    start = hg.BilevelParams(jnp.zeros((5, FEATURES)), hg.unconstrain(bijector, jnp.ones(count)))
    methods = {"minimize, HOAG": hg.methods.hoag(), "minimize, L-BFGS": hg.methods.lbfgs(1e-5)}
    for name, method in methods.items():
        best, first, second = _minimized(of_folds, start, (x, y), method=method)
        chosen, note = np.asarray(problem.constrain(best.hyperparams)), best.message.partition(":")[0]
        rows[name] = _row(cv(chosen), tested(chosen), second, first, note)
    return rows


def _grid(
    count: int,
    groups: np.ndarray,
    data: Data,
    folds: Any,
    tested: Callable[[np.ndarray], float],
    quick: bool,
) -> dict[str, Any]:
    each = count == 3
    values = np.geomspace(LOW, HIGH, (2 if quick else 7) if each else 50)
    grid = dict.fromkeys(("a", "b", "c") if each else ("a",), values)
    search = GridSearchCV(GroupRidge(groups if each else None), grid, scoring="neg_mean_squared_error", cv=folds)
    begun = time.perf_counter()
    search.fit(*data)
    seconds, best = time.perf_counter() - begun, search.best_params_
    chosen = np.asarray([best["a"], best["b"], best["c"]]) if each else np.full(count, best["a"])
    note = f"{len(values) ** len(grid)} points" + ("" if each else ", one penalty")
    return _row(-search.best_score_, tested(chosen), seconds, note=note)


def measured(name: str, seed: int, quick: bool) -> dict[str, Any]:
    """Return the rows of one problem and seed."""
    if name.startswith("groups "):
        return group_penalties(int(name.removeprefix("groups ")), seed, quick)
    return {"elastic net": elastic_net, "logistic regression": logistic_regression}[name](seed, quick)


def report(record: dict[str, Any]) -> str:
    """Return the tables."""
    lines = ["# hg.minimize beside scikit-learn's searches", "", ABOUT, ""]
    for name, seeds in record["problems"].items():
        lines += [f"## {name}", "", f"{len(seeds)} seeds.", ""]
        lines += ["| method | cross-validated loss | test loss | seconds | first call, seconds | |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for method in next(iter(seeds.values())):
            rows = [seed[method] for seed in seeds.values()]
            cv, test = (np.mean([row[key] for row in rows]) for key in ("cv", "test"))
            seconds = np.median([row["seconds"] for row in rows])
            first = [row["first_seconds"] for row in rows if row["first_seconds"] is not None]
            notes = ", ".join(sorted({row["note"] for row in rows if row["note"]}))
            compiled = f"{max(first):.1f}" if first else "–"
            lines.append(f"| {method} | {cv:.4f} | {test:.4f} | {seconds:.2f} | {compiled} | {notes} |")
        lines.append("")
    lines.append(harness.where(record["machine"]))
    return "\n".join(lines) + "\n"


ABOUT = """Means over seeds, on the same five folds; seconds are medians. Test loss: fitted on all training data with
the penalties chosen. Seconds of `minimize` are those of a second call with the same objects; the first call compiles
(the longest is shown). `python benchmarks/quality/scikit_learn.py` describes the problems and writes this file."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, three problems, small searches: does it run?")
    parser.add_argument("--only", default="; ".join(PROBLEMS), help="problems, with a semicolon between")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    parser.add_argument("--merge", action="store_true", help="keep the other problems that the file has")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    kept = args.out / "scikit_learn.json"
    problems = json.loads(kept.read_text())["problems"] if args.merge and kept.exists() else {}
    record: dict[str, Any] = {}
    for name in PROBLEMS[:3] if args.quick else args.only.split("; "):
        problems[name] = {
            str(seed): measured(name, seed, args.quick) for seed in range(1 if args.quick else args.seeds)
        }
        for seed, rows in problems[name].items():
            shown = {method: f"{row['cv']:.4f} {row['test']:.4f} {row['seconds']:.2f}" for method, row in rows.items()}
            print(name, seed, shown, flush=True)
        record = {**harness.circumstances(1), "problems": harness.in_order(problems, PROBLEMS)}
        harness.write(args.out, "scikit_learn", record, report(record))
    return record


if __name__ == "__main__":
    main()
