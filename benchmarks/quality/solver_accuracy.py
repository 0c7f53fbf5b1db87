"""How close a linear solver comes, against the products with the Hessian that it takes.

    python benchmarks/quality/solver_accuracy.py [--quick] [--only "trajectories,one shot"] [--merge]

1. Along an outer trajectory: ridge regression in float64, 100 features, a log decay per feature that moves by
   Adam(0.05) on the exact hypergradient; each outer step solves a new system from the last solver state. The error is
   that of the hypergradient, ‖a − b‖/‖b‖, the geometric mean of the second half of 60 outer steps. Spectra of the
   Hessian of the data: decaying from 1 to 1e-8, flat in the logarithm, ten outliers over a bulk.
2. One solve from nothing, in float64, each weight with its own decay, known as the diagonal: logistic regression on 20
   newsgroups (a sparse stand-in where ``HYPERGRAD_DATA`` is not set), softmax regression on digits.
3. Networks: an MLP of 8,970 weights on digits, trained for 100, 1,000 and 10,000 steps of Adam, in float32; cosine of
   the hypergradient with that of a converged solve, both damped by λmax/1000.
4. ``hg.diagnostics.compare_solvers`` on an MLP of 100,000 weights after 300 steps: its table, and its seconds.

Writes ``solver_accuracy.json`` and ``solver_accuracy.md``.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
import tasks

SIZE, OUTER_STEPS = 100, 60
JACOBI = hg.preconditioners.jacobi()
# spectrum, its condition number with the first decays, products per outer step, target of recycled_cg
TRAJECTORIES = [
    ("decaying", 773, 10, 1e-6),
    ("decaying", 1e5, 20, 2e-3),
    ("flat", 400, 10, 6e-3),
    ("flat", 45_000, 50, 1e-3),
    ("outliers", 500, 10, 1e-5),
    ("outliers", 63_000, 20, 1e-6),
]
BUDGETS = 5, 10, 20, 50
PARTS = "trajectories", "one shot", "networks", "comparison"


def spectrum(name: str, condition: float) -> np.ndarray:
    """Return the eigenvalues of the data's Hessian."""
    if name == "decaying":
        return np.geomspace(1.0, 1e-8, SIZE)
    if name == "flat":
        return np.geomspace(1.0, 1.0 / condition, SIZE)
    bulk = np.linspace(0.5, 1.5, SIZE - 10) * (2e-3 if condition < 1000 else 2e-5)
    return np.concatenate([np.geomspace(1.0, 0.3, 10), bulk])


def trajectory(name: str, condition: float, solver: hg.LinearSolver, seed: int = 0) -> dict[str, float]:
    """Return the steady-state error of a solver along an outer trajectory, and its products."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    values = spectrum(name, condition)
    data_hessian = jnp.asarray(rotation @ np.diag(values) @ rotation.T)
    truth = rng.normal(size=SIZE)
    right = data_hessian @ truth + 0.1 * jnp.asarray(rotation @ (np.sqrt(values) * rng.normal(size=SIZE)))
    features = jnp.asarray(rng.normal(size=(SIZE // 2, SIZE)) @ (rotation * np.sqrt(values)) @ rotation.T)
    features /= np.sqrt(SIZE / 2)
    targets = features @ truth + 0.1 * jnp.asarray(rng.normal(size=SIZE // 2))

    def valid_loss(w: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((features @ w - targets) ** 2)

    tx, logs = optax.adam(0.05), jnp.full(SIZE, -np.log(condition - 1.0))

    @jax.jit
    def step(logs: jax.Array, outer: Any, state: Any) -> Any:
        decay = jnp.exp(logs)
        hessian = data_hessian + jnp.diag(decay)
        weights = jnp.linalg.solve(hessian, right)
        slope = jax.grad(valid_loss)(weights)
        system = hg.LinearSystem(lambda v: hessian @ v, key=jax.random.key(0), diagonal=lambda: decay)
        found, state, info = solver.solve(system, slope, state)
        exact = decay * weights * jnp.linalg.solve(hessian, slope)
        error = jnp.linalg.norm(decay * weights * found - exact) / jnp.linalg.norm(exact)
        updates, outer = tx.update(-exact, outer)
        return logs + updates, outer, state, error, info.num_products

    outer, state, errors = tx.init(logs), solver.init(logs), []
    for _ in range(OUTER_STEPS):
        logs, outer, state, error, products = step(logs, outer, state)
        errors.append(max(float(error), 1e-16))
    return {"error": float(np.exp(np.mean(np.log(errors[OUTER_STEPS // 2 :])))), "products": int(products)}


def trajectories(quick: bool) -> list[dict[str, Any]]:
    """Run every solver on every trajectory."""
    found = []
    for name, condition, products, target in TRAJECTORIES[: 1 if quick else None]:
        solvers = {
            "neumann": hg.solvers.neumann(products),
            "cg": hg.solvers.cg(products, 0.0),
            "warm cg": hg.solvers.cg(products, 0.0, warm_start=True),
            "warm cg, jacobi": hg.solvers.cg(products, 0.0, warm_start=True, preconditioner=JACOBI),
            "recycled_cg, rank 20": hg.solvers.recycled_cg(products, 20, 0.0),
            "recycled_cg, rank 50": hg.solvers.recycled_cg(products, 50, 0.0),
        }
        rows = {solver: trajectory(name, condition, s) for solver, s in solvers.items()}
        found.append({"spectrum": name, "condition": condition, "products": products, "target": target, "rows": rows})
        print(f"{name}, κ = {condition:g}: " + ", ".join(f"{k} {v['error']:.1e}" for k, v in rows.items()), flush=True)
    return found


def newsgroups(quick: bool) -> tuple[Any, Any, str]:
    """Return features (n, d) and labels in {0, 1}: two of the 20 newsgroups, or a sparse stand-in."""
    root, rng = os.environ.get("HYPERGRAD_DATA"), np.random.default_rng(0)
    path = Path(root or "") / "20news" / "20news_counts.npz"
    size = 200 if quick else 2000
    if root is None or not path.exists() or quick:
        counts = rng.poisson(0.05 * rng.pareto(1.5, size=size), size=(400 if quick else 1000, size)).astype(float)
        return _normalized(counts), (counts @ rng.normal(size=size) > 0).astype(float), "a sparse stand-in"
    import scipy.sparse  # type: ignore[import-untyped]

    with np.load(path) as file:
        shape = len(file["train_y"]), int(file["shape"][0])
        parts = file["train_counts"].astype(float), file["train_indices"], file["train_indptr"]
        matrix, labels = scipy.sparse.csr_matrix(parts, shape), file["train_y"]
    rows = np.flatnonzero(labels < 2)
    part = matrix[rows]
    columns = np.argsort(-np.asarray((part > 0).sum(0)).ravel())[:size]
    return _normalized(part[:, columns].toarray().astype(float)), (labels[rows] == 1).astype(float), "20 newsgroups"


def _normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def one_shot(quick: bool) -> list[dict[str, Any]]:
    """Solve once from a fresh state, by budget of products."""
    x, y, source = newsgroups(quick)
    rng = np.random.default_rng(1)
    decay = jnp.asarray(np.exp(rng.uniform(np.log(1e-5), np.log(1e-1), x.shape[1])))
    half = len(x) // 2
    train, valid = (jnp.asarray(x[:half]), jnp.asarray(y[:half])), (jnp.asarray(x[half:]), jnp.asarray(y[half:]))

    def logistic(w: jax.Array, batch: Any) -> jax.Array:
        return optax.losses.sigmoid_binary_cross_entropy(batch[0] @ w, batch[1]).mean()

    systems = [(f"logistic regression, {source}", _system(logistic, train, valid, decay, jnp.zeros(x.shape[1])))]
    digits = tasks.weight_decay(0).splits
    labels = [jax.nn.one_hot(split.y, 10, dtype=float) for split in digits[:2]]
    parts = [(split.x.astype(float), label) for split, label in zip(digits[:2], labels, strict=True)]

    def softmax(w: jax.Array, batch: Any) -> jax.Array:
        return optax.losses.softmax_cross_entropy(batch[0] @ w.reshape(64, 10), batch[1]).mean()

    some = jnp.asarray(np.exp(rng.uniform(np.log(1e-4), np.log(1e-1), 640)))
    systems.append(("softmax regression, digits", _system(softmax, parts[0], parts[1], some, jnp.zeros(640))))
    found = []
    for name, (hessian, slope, diagonal) in systems:
        exact = jnp.linalg.solve(hessian, slope)
        rows: dict[str, Any] = {}
        for budget in BUDGETS[: 2 if quick else None]:
            for solver, s in {
                "cg": hg.solvers.cg(budget, 0.0),
                "cg, jacobi": hg.solvers.cg(budget, 0.0, preconditioner=JACOBI),
                "cg, jacobi, reorthogonalized": hg.solvers.cg(budget, 0.0, preconditioner=JACOBI, reorthogonalize=True),
                "cg, nystrom(10)": hg.solvers.cg(budget, 0.0, preconditioner=hg.preconditioners.nystrom(10)),
            }.items():
                system = hg.LinearSystem(lambda v: hessian @ v, key=jax.random.key(0), diagonal=lambda: diagonal)  # noqa: B023
                x_found, _, info = jax.jit(lambda b, s=s, system=system: s.solve(system, b, s.init(b)))(slope)
                error = float(jnp.linalg.norm(x_found - exact) / jnp.linalg.norm(exact))
                rows.setdefault(solver, {})[str(budget)] = {"error": error, "products": int(info.num_products)}
        condition = float(np.linalg.cond(np.asarray(hessian)))
        found.append({"system": name, "unknowns": len(slope), "condition": condition, "rows": rows})
        print(f"{name}, κ = {condition:.0f}: " + "; ".join(f"{k} {_errors(v)}" for k, v in rows.items()), flush=True)
    return found


def _errors(row: dict[str, Any]) -> str:
    return " / ".join(f"{v['error']:.1e}" for v in row.values())


def _system(loss: Any, train: Any, valid: Any, decay: jax.Array, start: jax.Array) -> tuple[Any, Any, Any]:
    """Return Hessian, right-hand side and diagonal at the optimum, which Newton's method finds."""
    objective = jax.jit(lambda w: loss(w, train) + 0.5 * jnp.sum(decay * w**2))
    gradient, hessian = jax.jit(jax.grad(objective)), jax.jit(jax.hessian(objective))
    for _ in range(30):
        start = start - jnp.linalg.solve(hessian(start), gradient(start))
    return hessian(start), jax.grad(loss)(start, valid), decay


def networks(quick: bool) -> list[dict[str, Any]]:
    """Compare hypergradients on a network in training, with a converged solve of the same damping."""
    task = tasks.weight_decay(0)
    train, valid, _ = task.splits
    inner, found = optax.adam(1e-3), []
    hidden = task.problem

    @jax.jit
    def advance(params: Any, state: Any, steps: jax.Array) -> Any:
        def step(_: Any, at: Any) -> Any:
            grads = jax.grad(hidden.inner_loss)(at[0], task.variables.hyperparams, train, None)
            updates, state = inner.update(grads, at[1], at[0])
            return optax.apply_updates(at[0], updates), state

        return lax.fori_loop(0, steps, step, (params, state))

    params, state, done = task.variables.params, inner.init(task.variables.params), 0
    for steps in (100,) if quick else (100, 1000, 10_000):
        params, state = advance(params, state, jnp.asarray(steps - done))
        done = steps
        at = hg.BilevelParams(params, task.variables.hyperparams)
        seen = hg.diagnostics.extreme_eigenvalues(hidden, at, train, key=jax.random.key(0))
        damping = float(seen.largest) / 1000

        def hypergrad(solver: hg.LinearSolver, diagonal: Any = None, at: hg.BilevelParams = at) -> Any:
            known = lambda _params, decay: decay if diagonal is None else diagonal  # noqa: E731
            fn = hg.hypergrad(hg.implicit(hidden, solver, diagonal=known))
            return ravel_pytree(fn(*at, train, valid, key=jax.random.key(0)))[0]

        # Adam's √v in the place of a diagonal, with the largest entry that H has: a preconditioner from the optimizer.
        roots = jax.tree.map(jnp.sqrt, optax.tree.get(state, "nu"))
        scale = float(seen.largest) / max(float(jnp.max(leaf)) for leaf in jax.tree.leaves(roots))
        second_moment = optax.tree.scale(scale, roots)

        exact = hypergrad(hg.solvers.cg(2000, 1e-6, damping=damping))
        rows: dict[str, Any] = {}
        for budget in BUDGETS[: 2 if quick else None]:
            jacobi = hg.solvers.cg(budget, 0.0, damping=damping, preconditioner=JACOBI)
            nystrom = hg.solvers.cg(budget, 0.0, damping=damping, preconditioner=hg.preconditioners.nystrom(5))
            for name, solver, diagonal in (
                ("neumann", hg.solvers.neumann(budget, damping=damping), None),
                ("cg", hg.solvers.cg(budget, 0.0, damping=damping), None),
                ("cg, jacobi", jacobi, None),
                ("cg, jacobi of Adam's √v", jacobi, second_moment),
                ("cg, nystrom(5)", nystrom, None),
            ):
                other = hypergrad(solver, diagonal)
                cosine = float(other @ exact / jnp.linalg.norm(other) / jnp.linalg.norm(exact))
                rows.setdefault(name, {})[str(budget)] = round(cosine, 4)
        found.append({"steps": steps, "damping": damping, "rows": rows})
        print(f"after {steps} steps: {rows}", flush=True)
    return found


def comparison(quick: bool) -> dict[str, Any]:
    """Run ``compare_solvers`` as a user would, and time it."""
    task = tasks.weight_decay(0, model=tasks.MLP(8 if quick else 280))
    (train, valid, _), (params, decay) = task.splits, task.variables
    inner = optax.adam(1e-3)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = inner.update(jax.grad(task.problem.inner_loss)(params, decay, train, None), state, params)
        return optax.apply_updates(params, updates), state

    state = inner.init(params)
    for _ in range(10 if quick else 300):
        params, state = step(params, state)
    start = time.perf_counter()
    solvers = {"cg(3)": hg.solvers.cg(3)} if quick else None
    at = hg.BilevelParams(params, decay)
    found = hg.diagnostics.compare_solvers(task.problem, at, train, valid, key=None, solvers=solvers)
    seconds, weights = time.perf_counter() - start, sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{found}\n{seconds:.0f} s for {weights} weights", flush=True)
    return {"weights": weights, "seconds": round(seconds, 1), "table": str(found)}


def report(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    parts = ["# Accuracy of linear solvers against products"]
    for found in record.get("trajectories", []):
        head = f"## Trajectory: {found['spectrum']} spectrum, κ = {found['condition']:g}, {found['products']} products"
        rows: list[tuple[str, ...]] = [("solver", "error", "target", "")]
        for name, row in found["rows"].items():
            aimed = name.startswith("recycled_cg, rank 50")
            met = "met" if row["error"] <= found["target"] else "**missed**"
            rows.append((name, f"{row['error']:.1e}", f"≤ {found['target']:g}" if aimed else "", met if aimed else ""))
        parts += [head, _table(rows)]
    for found in record.get("one shot", []):
        budgets = list(next(iter(found["rows"].values())))
        head = f"## One solve: {found['system']}, {found['unknowns']} unknowns, κ = {found['condition']:.0f}"
        rows = [("solver", *(f"{b} products" for b in budgets))]
        rows += [(name, *(f"{row[b]['error']:.1e}" for b in budgets)) for name, row in found["rows"].items()]
        parts += [head, "Relative error of the solution; Nyström's ten set-up products come on top.", _table(rows)]
    for found in record.get("networks", []):
        budgets = list(next(iter(found["rows"].values())))
        rows = [("solver", *(f"{b} products" for b in budgets))]
        rows += [(name, *(f"{row[b]:.3f}" for b in budgets)) for name, row in found["rows"].items()]
        parts += [f"## MLP on digits after {found['steps']} steps: cosine of the hypergradient", _table(rows)]
    if "comparison" in record:
        found = record["comparison"]
        parts += [
            f"## `compare_solvers` on an MLP of {found['weights']:,} weights: {found['seconds']:.0f} s",
            f"```text\n{found['table']}\n```",
        ]
    return "\n\n".join([*parts, harness.where(record["machine"])]) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], tuple("---" for _ in rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one of each kind, small: does it run?")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with a comma between")
    parser.add_argument("--merge", action="store_true", help="keep the other parts of the file that is there")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    args = parser.parse_args(argv)
    record: dict[str, Any] = {**harness.circumstances(1)}
    if args.merge:
        record = {**json.loads((args.out / "solver_accuracy.json").read_text()), **record}
    for part in args.only.split(","):
        if part in ("networks", "comparison"):
            record[part] = {"networks": networks, "comparison": comparison}[part](args.quick)
        else:
            with jax.enable_x64(True):
                record[part] = {"trajectories": trajectories, "one shot": one_shot}[part](args.quick)
        harness.write(args.out, "solver_accuracy", record, report(record))
    return record


if __name__ == "__main__":
    main()
