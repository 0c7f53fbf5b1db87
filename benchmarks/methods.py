"""Every method on one problem: what a hypergradient costs, what memory it takes, and how good it is.

    python benchmarks/methods.py [--quick] [--only mlp256,mlp1024] [--rounds 9] [--out DIR] [--merge]

Cost: one log decay a weight of a 784-H-H-10 network (``networks.py``), candidates taking turns (``harness.py``); the
unit is one gradient of the training loss. ``unrolled`` takes its K training steps with it; forward mode has one decay
for all weights. Memory is the compiled function's scratch, in copies of the weights. Learned responses cost at every
training step: ``self_tuning_cost.py`` measures them.

Goodness: softmax regression on 500 of scikit-learn's digits with one decay a weight, solved to rounding;
hypergradients beside the exact one by ``hg.diagnostics.compare``. ``unrolled`` starts at the solution, and the default
solver from that of three earlier solves. The condition
number of the problem is written with it: a harder one wants more terms. Writes ``methods.json`` and ``methods.md``,
from which the table of README is made (``methods_report.py``).
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import handwritten
import harness
import jax
import jax.numpy as jnp
import methods_report as report
import networks
import numpy as np
import optax
from candidates import Candidate, compile_candidate, library_problem
from networks import Network, Tree
from sklearn.datasets import load_digits

import hypergrad as hg
from hypergrad.inner_solvers._newton_cg import newton

NETWORKS = ("mlp256", "mlp1024")
UNIT = "gradient"
DECAY = 1e-2  # of the solved problem


def cost_candidates(network: Network) -> dict[str, Candidate]:
    """Return the unit and every method's hypergradient, compiled."""
    problem, step = library_problem(network), round(1.0 / handwritten.stiffness(network), 5)
    at = network.params, network.log_decays
    data = network.inner_batch, network.outer_batch
    found = {UNIT: compile_candidate(jax.grad(problem.inner_loss), *at, network.inner_batch, None)}

    def add(name: str, estimator: hg.Estimator, *arguments: Tree, optimizer: Any = None) -> None:
        fn = functools.partial(hg.value_and_hypergrad(estimator, optimizer), key=None)
        found[name] = compile_candidate(fn, *arguments)

    solvers = {"identity": hg.solvers.identity(), "cg 10": hg.solvers.cg(10, rtol=0.0)}
    solvers |= {f"neumann {k}": hg.solvers.neumann(k, step) for k in (5, 10, 20)}
    for name, solver in solvers.items():
        add(f"implicit, {name}", hg.implicit(problem, solver), *at, *data)
    default = hg.value_and_hypergrad(hg.implicit(problem))
    state = default(*at, *data, key=None)[1].state
    warm = lambda state, *rest: default(*rest, key=None, state=state)  # noqa: E731
    found["implicit, default"] = compile_candidate(warm, state, *at, *data)
    sgd = optax.sgd(step)
    for length in (10, 50):
        window = jax.tree.map(lambda x, k=length: x[jnp.arange(k) % len(x)], network.window)
        add(f"unrolled {length}, reverse", hg.unrolled(problem), *at, window, network.outer_batch, optimizer=sgd)
        if length == 10:
            one = jax.tree.leaves(network.log_decays)[0].reshape(-1)[0]
            forward = hg.unrolled(problem, hg.forward())
            add("unrolled 10, forward", forward, network.params, one, window, network.outer_batch, optimizer=sgd)
    return found


def measure_cost(network: Network, rounds: int, min_ms: float) -> dict[str, Any]:
    """Return every candidate's timing in gradients, and its scratch in copies of the weights."""
    found = cost_candidates(network)
    timings = harness.interleave({n: c.thunk() for n, c in found.items()}, rounds=rounds, min_ms=min_ms)
    weights = sum(x.nbytes for x in jax.tree.leaves(network.params)) / 2**20
    entries = {}
    for name, timing in timings.items():
        scratch = harness.scratch_mib(found[name].compiled)
        entries[name] = {
            **timing.record(),
            "in_gradients": round(harness.ratio(timings, name, UNIT), 3),
            "scratch_copies": round(scratch / weights, 2),
        }
    return {**harness.circumstances(rounds), "weights": network.num_weights, "candidates": entries}


def solved_problem() -> tuple[hg.BilevelProblem, hg.BilevelParams, Tree, Tree]:
    """Return softmax regression with a log decay a weight, in float64, at its solution, and both batches."""
    x, y = load_digits(return_X_y=True)
    x, order = jnp.asarray(x / 16.0), np.random.default_rng(0).permutation(len(y))
    batches = [(x[part], jnp.asarray(y[part])) for part in (order[:500], order[500:1000])]

    def cross_entropy(params: Tree, batch: Tree) -> jax.Array:
        logits = batch[0] @ params["kernel"] + params["bias"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def train_loss(params: Tree, decays: Tree, batch: Tree, _: Any) -> jax.Array:
        return cross_entropy(params, batch) + hg.penalties.l2(params, decays)

    problem = hg.BilevelProblem(train_loss, lambda params, _h, batch, _k: cross_entropy(params, batch))
    problem = hg.reparameterize(problem, hg.bijectors.exp())
    params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    log_decays = jax.tree.map(lambda w: jnp.full_like(w, math.log(DECAY)), params)
    solve = jax.jit(lambda w: newton(lambda w: problem.inner_loss(w, log_decays, batches[0], None), w))
    solved = solve(params)
    if not solved.converged:
        raise ValueError("the inner problem was not solved to rounding: no hypergradient is exact here")
    return problem, hg.BilevelParams(solved.params, log_decays), batches[0], batches[1]


def measure_goodness(quick: bool) -> dict[str, Any]:
    """Return how every method's hypergradient stands to the exact one, at a solved problem."""
    with jax.enable_x64(True):
        problem, at, inner_batch, outer_batch = solved_problem()
        spectrum = hg.diagnostics.extreme_eigenvalues(problem, at, inner_batch, key=None, num_steps=100)
        step = float(spectrum.safe_step)

        def unrolled(length: int) -> Any:
            window = jax.tree.map(lambda x: jnp.broadcast_to(x, (length, *x.shape)), inner_batch)
            fn = hg.value_and_hypergrad(hg.unrolled(problem), optax.sgd(step))
            return lambda w, h, _batch, valid, *, key, model_state: fn(
                w, h, window, valid, key=key, model_state=model_state
            )

        default = hg.value_and_hypergrad(hg.implicit(problem))

        def warm(*arguments: Any, **keywords: Any) -> Any:
            state = None
            for _ in range(3):
                state = default(*arguments, **keywords, state=state)[1].state
            return default(*arguments, **keywords, state=state)

        terms, lengths, steps = ((5,), (10,), (10,)) if quick else ((5, 10, 20, 100), (10, 50), (10, 50))
        methods: dict[str, Any] = {"implicit, identity": hg.implicit(problem, hg.solvers.identity())}
        methods["implicit, default"] = warm
        methods |= {f"implicit, neumann {k}": hg.implicit(problem, hg.solvers.neumann(k, step)) for k in terms}
        methods |= {f"implicit, cg {k}": hg.implicit(problem, hg.solvers.cg(k, rtol=0.0)) for k in steps}
        methods |= {f"unrolled {k}, reverse": unrolled(k) for k in lengths}
        oracle = hg.implicit(problem, hg.solvers.dense())
        found = hg.diagnostics.compare(methods, oracle, at, inner_batch, outer_batch, key=None)
    rows = {row.name: {"cosine": round(row.cosine, 4), "norm_ratio": round(row.norm_ratio, 4)} for row in found.rows}
    condition = float(spectrum.largest) / float(spectrum.smallest)
    return {"condition": round(condition, 1), "step": round(step, 4), "decay": DECAY, "methods": rows}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and write its results."""
    args = harness.arguments(__doc__ or "", NETWORKS, Path(__file__).parent / "results").parse_args(argv)
    jax.config.update("jax_disable_most_optimizations", args.quick)  # most of a quick run is compilation
    record: dict[str, Any] = {"quick": args.quick, "networks": {}, "goodness": {}}
    if args.merge:
        record = harness.merged(args.out, "methods", record)
    record["goodness"] = measure_goodness(args.quick)
    rounds, min_ms = (3, 5.0) if args.quick else (args.rounds, 60.0)
    scale = networks.Scale(inputs=32, batch=16) if args.quick else networks.Scale()
    for name in ["mlp64"] if args.quick else args.only.split(","):
        print(f"{name} ...", flush=True)
        found = measure_cost(networks.build(name, scale), rounds, min_ms)
        record["networks"] = harness.in_order({**record["networks"], name: found}, ("mlp64", *NETWORKS))
        harness.write(args.out, "methods", record, report.methods(record))
    print(report.methods(record))
    return record


if __name__ == "__main__":
    main()
