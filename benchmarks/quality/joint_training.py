"""What a solver is worth in joint training: validation, test and retrained test loss, and what it costs.

    python benchmarks/quality/joint_training.py [--quick] [--only "weight decay,transformer"] [--seeds 5] [--merge]

Weights and hyperparameters train together by ``hg.bilevel``, an outer step every 10 inner steps, on the tasks of
``tasks.py``; every solver has the same steps, batches and keys. "Retrained" trains new weights with the learned
hyperparameters held fixed. The cost of a hypergradient is measured in gradients of the training loss, in turns with
them. Writes ``joint_training.json`` and ``joint_training.md``.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import lax

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
import tasks

EVERY = 10
SOLVERS: dict[str, hg.LinearSolver | None] = {
    "default: cg(3), ρ = 0.01": None,
    "cg(2), ρ = 0.01": hg.solvers.cg(2, relative_damping=0.01, warm_start=True),
    "cg(5), ρ = 0.01": hg.solvers.cg(5, relative_damping=0.01, warm_start=True),
    "cg(10), ρ = 0.01": hg.solvers.cg(10, relative_damping=0.01, warm_start=True),
    "cg(3), ρ = 0.03": hg.solvers.cg(3, relative_damping=0.03, warm_start=True),
    "cg(10), no damping": hg.solvers.cg(10),
    "neumann(10)": hg.solvers.neumann(10),
    "SOBA: richardson(1)": hg.solvers.richardson(1),
    "richardson(3), β = 0.8": hg.solvers.richardson(3, momentum=0.8),
    "recycled_cg(3, 10), ρ = 0.01": hg.solvers.recycled_cg(3, 10, relative_damping=0.01),
    "identity": hg.solvers.identity(),
}
ALWAYS = "default: cg(3), ρ = 0.01", "neumann(10)", "SOBA: richardson(1)"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files, print the tables; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one task, two solvers, a few steps: does it run?")
    parser.add_argument("--only", default=";".join(tasks.TASKS), help="tasks, with a semicolon between")
    parser.add_argument("--solvers", default=";".join(SOLVERS), help="solvers, with a semicolon between")
    parser.add_argument(
        "--seeds", type=int, default=5, help="of the default, Neumann and SOBA; at most 3 of the others"
    )
    parser.add_argument("--merge", action="store_true", help="keep what the file has of other tasks and solvers")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    args = parser.parse_args(argv)
    names, solvers, seeds = args.only.split(";"), args.solvers.split(";"), args.seeds
    if args.quick:
        names, solvers, seeds = ["weight decay"], list(ALWAYS[:2]), 1
    path = args.out / "joint_training.json"
    record: dict[str, Any] = json.loads(path.read_text()) if args.merge and path.exists() else {"tasks": {}}
    for name in names:
        known = record["tasks"].get(name, {}).get("solvers", {}) if args.merge else {}
        record["tasks"][name] = {**harness.circumstances(seeds), "solvers": known}
        for solver in solvers:
            count = seeds if solver in ALWAYS else min(seeds, 3)
            found = run(name, SOLVERS[solver], count, steps=30 if args.quick else None)
            record["tasks"][name]["solvers"][solver] = found
            print(f"{name}; {solver}: {summary(found)}", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "joint_training.md").write_text(report(record))
    return record


def run(name: str, solver: hg.LinearSolver | None, seeds: int, steps: int | None = None) -> dict[str, Any]:
    """Return what a solver reached on a task: one entry per seed."""
    found: dict[str, list[float]] = {"valid": [], "test": [], "error": [], "retrained": [], "retrained_error": []}
    cost = skipped = 0.0
    for seed in range(seeds):
        task = tasks.TASKS[name](seed)
        task = task._replace(steps=steps or task.steps)
        tx = hg.bilevel(
            hg.implicit(task.problem, solver),
            inner_optimizer=optax.adam(task.rates[0]),
            outer_optimizer=optax.adam(task.rates[1]),
            every=EVERY,
            key=jax.random.key(seed),
        )
        variables, state = train(task, tx, seed)
        skipped += int(state.info.num_skipped) / seeds
        _, valid, test = task.splits
        loss, error = task.error(variables.params, test)
        again = retrain(task, variables.hyperparams, seed + 100)
        new_loss, new_error = task.error(again, test)
        for key, value in (
            ("valid", task.error(variables.params, valid)[0]),
            ("test", loss),
            ("error", error),
            ("retrained", new_loss),
            ("retrained_error", new_error),
        ):
            found[key].append(round(float(value), 5))
        if seed == 0:
            cost = in_gradients(task, solver, variables, rounds=3 if steps else 9)
    return {**found, "gradients": round(cost, 2), "skipped": round(skipped, 1)}


def train(task: tasks.Task, tx: Any, seed: int) -> tuple[hg.BilevelParams, Any]:
    """Train weights and hyperparameters together."""
    train_split, valid, _ = task.splits

    @jax.jit
    def run(variables: hg.BilevelParams, state: Any) -> Any:
        def step(i: jax.Array, at: Any) -> Any:
            variables, state = at
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed + 7), i))
            batches = {
                "inner_batch": tasks.draw(train_split, task.batch, keys[0]),
                "outer_batch": tasks.draw(valid, task.batch, keys[1]),
            }
            updates, state = tx.update(None, state, variables, **batches)
            return optax.apply_updates(variables, updates), state

        return lax.fori_loop(0, task.steps, step, (variables, state))

    return run(task.variables, tx.init(task.variables))


def retrain(task: tasks.Task, hyperparams: Any, seed: int) -> Any:
    """Train new weights with the hyperparameters held fixed."""
    train_split, inner = task.splits[0], optax.adam(task.rates[0])
    shuffled = jax.tree.map(
        lambda w, key: jax.random.permutation(key, w.reshape(-1)).reshape(w.shape),
        task.variables.params,
        optax.tree.split_key_like(jax.random.key(seed), task.variables.params),
    )

    @jax.jit
    def run(params: Any) -> Any:
        def step(i: jax.Array, at: Any) -> Any:
            params, state = at
            drawn, noise = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
            batch = tasks.draw(train_split, task.batch, drawn)
            grads = jax.grad(task.problem.inner_loss)(params, hyperparams, batch, noise)
            updates, state = inner.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return lax.fori_loop(0, task.steps, step, (params, inner.init(params)))[0]

    return run(shuffled)


def in_gradients(task: tasks.Task, solver: hg.LinearSolver | None, variables: hg.BilevelParams, rounds: int) -> float:
    """Return the time of a hypergradient over that of a gradient of the training loss, both compiled, in turns."""
    key, (train_split, valid, _) = jax.random.key(0), task.splits
    batches = tasks.draw(train_split, task.batch, key), tasks.draw(valid, task.batch, key)
    fn = hg.value_and_hypergrad(hg.implicit(task.problem, solver))
    _, info = fn(*variables, *batches, key=key)
    whole = jax.jit(lambda state: fn(*variables, *batches, key=key, state=state))
    gradient = jax.jit(jax.grad(task.problem.inner_loss))
    timings = harness.interleave(
        {
            "hypergradient": lambda: jax.block_until_ready(whole(info.state)),
            "gradient": lambda: jax.block_until_ready(gradient(*variables, batches[0], key)),
        },
        rounds=rounds,
    )
    pairs = zip(timings["hypergradient"].cpu_ms, timings["gradient"].cpu_ms, strict=True)
    return statistics.median(a / b for a, b in pairs)


def summary(found: dict[str, Any]) -> str:
    """Return one solver's figures as a line."""
    parts = [f"{key} {mean_and_error(found[key])}" for key in ("valid", "test", "retrained")]
    return ", ".join([*parts, f"{found['gradients']} gradients", f"{found['skipped']} skipped"])


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean of the seeds and its standard error."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {float(np.std(values, ddof=1)) / len(values) ** 0.5:.4f}"


def report(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    parts = ["# Solvers in joint training", (__doc__ or "").split("\n\n")[2].replace("\n", " ")]
    head = (
        "solver",
        "validation",
        "test",
        "test error %",
        "retrained test",
        "cost in gradients",
        "steps skipped",
        "seeds",
    )
    for name, found in record["tasks"].items():
        rows = [head, tuple("---" for _ in head)]
        for solver, v in found["solvers"].items():
            losses = [mean_and_error(v[key]) for key in ("valid", "test")]
            error = f"{100 * float(np.mean(v['error'])):.2f}"
            cost = f"{v['gradients']:.1f}", f"{v['skipped']:.1f}", str(len(v["test"]))
            rows.append((solver, *losses, error, mean_and_error(v["retrained"]), *cost))
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts += [f"## {name}", table, harness.where(found["machine"])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
