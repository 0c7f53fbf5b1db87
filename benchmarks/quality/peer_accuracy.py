"""Accuracy of hypergradients by JAXopt, TorchOpt, Betty and higher beside this library's, at equal budgets.

    python benchmarks/quality/peer_accuracy.py [--quick] [--environments DIR [--install]]

Run it to see how far a method's truncation takes a hypergradient from the exact one, and whether the library tells.

Problems in float64, one log decay per weight, the hypergradient taken at the exact inner solution (an unroll starts
at zero weights): ridge regression with 100 features and a decaying spectrum, at condition numbers 10, 773 and 1e5 of
the inner Hessian; softmax regression on digits. The reference is a dense solve, in numpy. A row is
‖a − b‖/‖b‖, b the reference.

``DIR`` has a virtual environment per library, named as in ``PEERS``, in lower case; ``--install`` makes the missing
ones. Each library runs in a process of its own, by a script ``_peer_*.py`` that does not import this library. Without
``--environments`` only this library runs. Writes ``peer_accuracy.json`` and ``peer_accuracy.md``.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import _peer
import harness
import tasks

CONDITIONS = 10.0, 773.0, 1e5
OURS = "hypergrad"
RECYCLED_RANK = 50


class Peer(NamedTuple):
    """A library to compare with.

    Attributes:
      script: beside this file.
      requirements: arguments of ``pip install``.
      note: what a reader of the table must know: of the installation, and what its source does where it is far off.
    """

    script: str
    requirements: tuple[str, ...]
    note: str = ""


_NORMAL = "default: CG on the normal equations until their relative residual is 1e-5, at most 10 steps per "
PEERS = {
    "JAXopt": Peer(
        "_peer_jaxopt.py", ("jaxopt==0.8.5", f"jax=={importlib.metadata.version('jax')}"), _NORMAL + "weight"
    ),
    "TorchOpt": Peer(
        "_peer_torchopt.py",
        ("torchopt==0.7.3", "torch==2.13.0", "numpy"),
        _NORMAL + "weight of a vector, and for a matrix per row and column, so 740 for 64 x 10 weights",
    ),
    "Betty": Peer(
        "_peer_betty.py",
        ("--ignore-requires-python", "betty-ml==0.2.1", "torch==2.13.0", "numpy"),
        'declared for Python below 3.11, installed with --ignore-requires-python; default: type="darts", the identity '
        "in place of the inverse Hessian; its CG adds the old residual, not the new one, to the next direction "
        "(betty/hypergradient/cg.py); its IterativeProblem replaces the optimizer and then reads the parameters of the "
        "original one",
    ),
    "higher": Peer("_peer_higher.py", ("higher==0.2.1", "torch==2.13.0", "numpy"), "unrolls only"),
}


def ridge(condition: float, size: int, seed: int = 0) -> _peer.Problem:
    """Return ridge regression: eigenvalues of xᵀx from 1 to 1e-8, log decays within ±1 of a mean that sets κ."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(size, size)))
    roots = np.sqrt(np.geomspace(1.0, 1e-8, size))
    x = roots[:, None] * rotation.T
    truth = rng.normal(size=size)
    y = x @ truth + 0.1 * rng.normal(size=size)
    valid_x = rng.normal(size=(size // 2, size)) @ (rotation * roots) @ rotation.T / np.sqrt(size / 2)
    valid_y = valid_x @ truth + 0.1 * rng.normal(size=size // 2)
    spread = rng.uniform(-1.0, 1.0, size)

    def hessian(mean: float) -> np.ndarray:
        return x.T @ x + np.diag(np.exp(mean + spread))

    low, high = -30.0, np.log(0.5)  # the condition number falls with the mean
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.linalg.cond(hessian(middle)) > condition else (low, middle)
    found = hessian(low)
    weights = np.linalg.solve(found, x.T @ y)
    slope = valid_x.T @ (valid_x @ weights - valid_y)
    data = (x, y, valid_x, valid_y)
    return _problem("ridge", "ridge", data, low + spread, weights, found, slope)


def softmax(quick: bool, seed: int = 1) -> _peer.Problem:
    """Return softmax regression on digits, the inner solution by Newton's method."""
    rng = np.random.default_rng(seed)
    splits = [
        (np.asarray(s.x, float)[:, :: 4 if quick else 1], np.asarray(s.y, np.int64))
        for s in tasks.weight_decay(0).splits
    ]
    (x, y), (valid_x, valid_y) = splits[:2]
    logs = rng.uniform(np.log(1e-4), np.log(1e-1), (x.shape[1], tasks.CLASSES))
    decays, size = np.exp(logs), logs.size

    def slope(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x.T @ (_probabilities(x @ weights) - np.eye(tasks.CLASSES)[y]) / len(x)

    def hessian(weights: np.ndarray) -> np.ndarray:
        p = _probabilities(x @ weights)
        blocks = np.einsum("nc,cd->ncd", p, np.eye(tasks.CLASSES)) - np.einsum("nc,nd->ncd", p, p)
        data = np.einsum("ni,nj,ncd->icjd", x, x, blocks, optimize=True).reshape(size, size) / len(x)
        return data + np.diag(decays.reshape(-1))

    weights = np.zeros(logs.shape)
    for _ in range(50):
        gradient = slope(weights, x, y) + decays * weights
        if np.linalg.norm(gradient) < 1e-13:
            break
        weights = weights - np.linalg.solve(hessian(weights), gradient.reshape(-1)).reshape(logs.shape)
    data = (x, y, valid_x, valid_y)
    return _problem("softmax, digits", "softmax", data, logs, weights, hessian(weights), slope(weights, *splits[1]))


def _probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _problem(
    name: str, kind: str, data: Any, logs: np.ndarray, weights: np.ndarray, hessian: np.ndarray, slope: np.ndarray
) -> _peer.Problem:
    """Return the problem with its hypergradient −exp(logs) w ⊙ H⁻¹ ∂L_out/∂w."""
    values = np.linalg.eigvalsh(hessian)
    solved = np.linalg.solve(hessian, slope.reshape(-1)).reshape(logs.shape)
    condition = float(values[-1] / values[0])
    exact = -np.exp(logs) * weights * solved
    name, step = f"{name}, κ = {condition:.4g}".replace("e+0", "e"), 1.0 / float(values[-1])
    x, y, valid_x, valid_y = data
    return _peer.Problem(name, kind, x, y, valid_x, valid_y, logs, weights, exact, step, condition)


def _losses(problem: _peer.Problem) -> hg.BilevelProblem:
    def data(weights: jax.Array, x: Any, y: Any) -> jax.Array:
        if problem.kind == "ridge":
            return 0.5 * jnp.sum((x @ weights - y) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(x @ weights, jnp.asarray(y)).mean()

    def inner(weights: jax.Array, logs: jax.Array, _batch: Any, _key: Any) -> jax.Array:
        return data(weights, problem.x, problem.y) + 0.5 * jnp.sum(jnp.exp(logs) * weights**2)

    def outer(weights: jax.Array, _logs: jax.Array, _batch: Any, _key: Any) -> jax.Array:
        return data(weights, problem.valid_x, problem.valid_y)

    return hg.BilevelProblem(inner, outer)


def implicit(problem: _peer.Problem, solver: hg.LinearSolver | None = None, diagonal: bool = False) -> tuple[Any, str]:
    """Return the hypergradient by a solver from a fresh state, and what its info says."""
    given = {"diagonal": lambda _params, logs: jnp.exp(logs)} if diagonal else {}
    fn = hg.value_and_hypergrad(hg.implicit(_losses(problem), solver, **given))
    at = jnp.asarray(problem.weights), jnp.asarray(problem.logs)
    (_, found), info = fn(*at, (), (), key=jax.random.key(0))
    status = hg.solvers.Status(int(info.solver.status)).name
    return found, f"{status}, {float(info.solver.undamped_residual):.0e}"


def neumann(problem: _peer.Problem, budget: int) -> tuple[Any, str]:
    """Return the hypergradient by the Neumann series with the step that the peers get."""
    return implicit(problem, hg.solvers.neumann(budget, problem.step))


def unrolled(problem: _peer.Problem, steps: int) -> tuple[Any, str]:
    """Return the hypergradient through gradient steps."""
    fn = hg.hypergrad(hg.unrolled(_losses(problem)), inner_optimizer=optax.sgd(problem.step))
    start = jnp.zeros(problem.weights.shape), jnp.asarray(problem.logs)
    return fn(*start, jnp.arange(steps), (), key=jax.random.key(0)), ""


def own_methods(quick: bool) -> dict[str, _peer.Method]:
    """Return this library's methods; those that peers have come first. With ``quick`` the smallest budgets alone."""
    solvers, jacobi, tolerance = hg.solvers, hg.preconditioners.jacobi(), _peer.TOLERANCE
    of, few = functools.partial, 1 if quick else None
    cgs, terms, steps = _peer.CG_BUDGETS[:few], _peer.NEUMANN_BUDGETS[:few], _peer.UNROLL_BUDGETS[:few]
    return {
        **{_peer.cg(k): of(implicit, solver=solvers.cg(k, tolerance)) for k in cgs},
        **{_peer.neumann(k): of(neumann, budget=k) for k in terms},
        **{_peer.unroll(k): of(unrolled, steps=k) for k in steps},
        "default": implicit,  # three damped products, warm from the second outer step on: for weights in training
        "CG 100 to 1e-5, recommended at a solution": of(implicit, solver=solvers.cg(100)),
        **{
            f"CG {k}, decays as preconditioner": of(
                implicit, solver=solvers.cg(k, tolerance, preconditioner=jacobi), diagonal=True
            )
            for k in cgs
        },
        **{
            f"recycled CG {k}, first solve": of(
                implicit, solver=solvers.recycled_cg(k, RECYCLED_RANK, tolerance), diagonal=True
            )
            for k in cgs
        },
        **{f"{_peer.neumann(k)}, own step": of(implicit, solver=solvers.neumann(k)) for k in terms},
    }


def interpreter(environments: Path, name: str) -> Path:
    """Return the interpreter of a library's environment, whether it exists or not."""
    folder = environments / name.lower()
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def install(environments: Path, name: str, requirements: Sequence[str] = ()) -> str:
    """Make a library's environment, of the requirements in ``PEERS`` or of others; return why it failed, or ""."""
    folder = environments / name.lower()
    made = _run([sys.executable, "-m", "venv", str(folder)])
    reason = made or _run(
        [str(interpreter(environments, name)), "-m", "pip", "install", *(requirements or PEERS[name].requirements)]
    )
    if reason:
        shutil.rmtree(folder, ignore_errors=True)
    return reason


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else last_line(done.stderr)


def last_line(text: str) -> str:
    """Return the last line that says something, without addresses and paths."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"\S+://\S+|(?<![\w.])/\S+", "…", lines[-1])[:200] if lines else "no message"


def environment() -> dict[str, str]:
    """Return the environment variables for another interpreter: none of those that point Python here."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def ask(
    environments: Path, name: str, problems: Path, make: bool, script: str = "", seconds: float | None = None
) -> dict[str, Any]:
    """Return what a library's script, or another one, prints within so many seconds; or why it says nothing."""
    python, peer = interpreter(environments, name), PEERS[name]
    if not python.exists():
        reason = install(environments, name) if make else "no environment"
        if reason:
            return {"failed": f"not installed: {reason}"}
    path = Path(__file__).resolve().parent / (script or peer.script)
    clean = {**environment(), "JAX_PLATFORMS": "cpu"}
    try:
        command = [str(python), str(path), str(problems)]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer in {seconds:.0f} s"}
    if done.returncode:
        return {"failed": last_line(done.stderr)}
    return {**json.loads(done.stdout.splitlines()[-1]), **({"note": peer.note} if peer.note else {})}


def report(record: dict[str, Any]) -> str:
    """Return the record as Markdown: methods against libraries, a table per problem."""
    ran = {name: found for name, found in record["libraries"].items() if "rows" in found}
    parts = ["# Accuracy of hypergradients by several libraries", _legend()]
    for problem, about in record["problems"].items():
        names = list(dict.fromkeys(m for found in [ran[OURS], *ran.values()] for m in found["rows"][problem]))
        table = [("method", *ran, f"{OURS} reports")]
        for method in sorted(names, key=_order):
            cells = [_cell(found["rows"][problem].get(method)) for found in ran.values()]
            table.append((method, *cells, ran[OURS]["rows"][problem].get(method, {}).get("reported", "")))
        parts += [f"## {problem}, {about['weights']} decays", _table(table)]
    parts += ["\n".join(["## Libraries", "", *(_about(*item) for item in record["libraries"].items())])]
    where = harness.where(record["machine"], ("cpu", "cores", "python", "numpy", "date"))
    return "\n\n".join([*parts, where]) + "\n"


def _legend() -> str:
    return (
        "Relative error of the hypergradient; – where a library has no such method. A number is the budget, used up "
        "unless a residual of 1e-12 is met: products "
        "with the Hessian (two a step for normal-equation CG, one more term than products for the peers' Neumann "
        "series), or gradient steps from zero. The step of Neumann and unroll is 1/λmax, given. Last column: the "
        "status of the linear solve and its residual ‖b − Ax‖/‖b‖, without damping."
    )


def _order(method: str) -> tuple[int, str]:
    families = (
        "CG 10",
        "CG 20",
        "CG 50",
        "normal",
        "Neumann 20",
        "Neumann 100",
        "unroll 100",
        "unroll 1000",
        "default",
    )
    exact = [i for i, family in enumerate(families) if method == family or (family == "normal" and family in method)]
    return (exact[0], "") if exact else (len(families), "")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if "failed" in row:
        return "fails"
    return "not finite" if row["error"] is None else f"{row['error']:.1e}"


def _about(name: str, found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"- {name}: {found['failed']}."
    said = [", ".join(f"{k} {v}" for k, v in found["versions"].items()), *([found["note"]] if "note" in found else [])]
    rows = [(method, row) for rows in found["rows"].values() for method, row in rows.items()]
    failed: dict[str, dict[str, None]] = {}
    for method, row in rows:
        if "failed" in row:
            failed.setdefault(row["failed"], {})[method] = None
    said += [f"{' and '.join(methods)} fail with {reason}" for reason, methods in failed.items()]
    warned = list(dict.fromkeys(w for _, row in rows for w in row.get("warnings", [])))
    found_rows = [row for _, row in rows if "error" in row]
    reports = sum(bool(row["reported"]) for row in found_rows)
    said.append(f"status or residual reported for {reports} of {len(found_rows)} hypergradients")
    said.append(f"warns: {'; '.join(warned)}" if warned else "warns of nothing")
    return f"- {name}: {'; '.join(said)}."


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], tuple("---" for _ in rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny problems, this library alone: does it run?")
    parser.add_argument("--environments", type=Path, help="folder with a virtual environment per library")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    args = parser.parse_args(argv)
    if args.install and args.environments is None:
        parser.error("--install needs --environments")
    size = 20 if args.quick else 100
    problems = [ridge(c, size) for c in CONDITIONS[: 1 if args.quick else None]] + [softmax(args.quick)]
    libraries: dict[str, Any] = {}
    with jax.enable_x64(True):
        found = _peer.rows(problems, own_methods(args.quick), ignored=("OverfittingWarning",))
    libraries[OURS] = {"versions": {n: importlib.metadata.version(n) for n in ("hypergrad-jax", "jax")}, "rows": found}
    if args.environments is not None and not args.quick:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "problems.npz"
            _peer.save(path, problems)
            for name in PEERS:
                libraries[name] = ask(args.environments, name, path, args.install)
                print(_about(name, libraries[name]), flush=True)
    about = {p.name: {"condition": round(p.condition, 3), "weights": p.logs.size} for p in problems}
    record = {**harness.circumstances(1), "problems": about, "libraries": libraries}
    harness.write(args.out, "peer_accuracy", record, report(record))
    return record


if __name__ == "__main__":
    main()
