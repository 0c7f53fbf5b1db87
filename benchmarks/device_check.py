"""One run on one accelerator, in under eight minutes: is it right there, how fast, and how many bytes per weight?

    python benchmarks/device_check.py [--sizes 10,100,1000] [--out DIR]       # sizes in millions of weights
    JAX_PLATFORMS=cpu python benchmarks/device_check.py --quick

1. Correctness: hypergradients by ``implicit`` with each solver, ``unrolled`` and ``direct``, on the device in its
   default precision, beside the CPU's float32 (both in this process; on a CPU alone the rows compare it with itself).
2. Metagradient: 200 Adam steps of an MLP in segments of 20, one log decay per weight. Error beside the CPU;
   milliseconds per step, forward and in reverse; seconds and bytes of ``hg.metagradient_plan`` beside those measured.
   The bytes measured are the peak of this process so far.
3. Speed: an MLP with one log decay per weight; a plain Adam step, the joint step of the default solver with an outer
   step every 10, a hypergradient; per second, and over the plain step. Bytes per weight of the joint step's memory,
   with the outer Adam's first moment in float32 and in bfloat16.
4. Precision: the default solver's hypergradient with TF32 matrix products and with a loss in bfloat16, beside float32.

It prints tables and writes ``device_check.json``. It needs nothing but this repository; data are random numbers.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

EVERY, BATCH, TOLERANCE = 10, 256, 2e-2
SOLVERS = {
    "implicit, default": None,
    "implicit, cg(10)": hg.solvers.cg(10, damping=0.1),
    "implicit, recycled_cg(5, 5)": hg.solvers.recycled_cg(5, 5, relative_damping=0.01),
    "implicit, richardson(3)": hg.solvers.richardson(3),
    "implicit, neumann(10)": hg.solvers.neumann(10),
    "implicit, gmres(10, 9)": hg.solvers.gmres(10, 9),
    "implicit, identity": hg.solvers.identity(),
}


class MLP(nn.Module):
    """Two hidden layers."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (n, 10)."""
        for _ in range(2):
            x = nn.tanh(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def make_problem(width: int, inputs: int, compute: Any = jnp.float32) -> tuple[hg.BilevelProblem, Callable[[], Any]]:
    """Return losses with one log decay per weight, and a function that makes variables and a batch on the device."""
    model = MLP(width)

    def cross_entropy(params: Any, batch: Any) -> jax.Array:
        low = jax.tree.map(lambda w: w.astype(compute), params)
        logits = model.apply({"params": low}, batch[0].astype(compute)).astype(jnp.float32)  # type: ignore[union-attr]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    problem = hg.reparameterize(
        hg.BilevelProblem(
            lambda w, decay, batch, _key: cross_entropy(w, batch) + hg.penalties.l2(w, decay),
            lambda w, _decay, batch, _key: cross_entropy(w, batch),
        ),
        hg.bijectors.exp(),
    )

    @jax.jit
    def make() -> Any:
        keys = jax.random.split(jax.random.key(0), 3)
        params = model.init(keys[0], jnp.zeros((1, inputs)))["params"]
        batch = jax.random.normal(keys[1], (BATCH, inputs)), jax.random.randint(keys[2], (BATCH,), 0, 10)
        return hg.BilevelParams(params, jax.tree.map(lambda w: jnp.full_like(w, -6.0), params)), batch

    return problem, make


def correctness() -> list[dict[str, Any]]:
    """Compare hypergradients on the device with the CPU's."""
    problem, make = make_problem(32, 16)
    given = jax.tree.map(np.asarray, make())
    methods: dict[str, Callable[..., Any]] = {
        name: hg.hypergrad(hg.implicit(problem, solver)) for name, solver in SOLVERS.items()
    }
    unrolled = hg.hypergrad(hg.unrolled(problem), optax.adam(1e-2, eps_root=1e-8))
    methods["unrolled, 4 steps"] = lambda w, h, inner, outer, key: unrolled(
        w, h, jax.tree.map(lambda x: jnp.stack([x] * 4), inner), outer, key=key
    )
    learned = hg.responses.perturbed(hg.responses.with_response(problem, hg.responses.gated()), scale=0.1)
    direct = hg.hypergrad(hg.direct(learned))

    def best_response(w: Any, h: Any, inner: Any, outer: Any, key: Any) -> Any:
        response = jax.tree.map(lambda leaf: leaf + 0.01, hg.responses.init(learned, 1, w, h, inner))
        return direct(response, h, inner, outer, key=key)

    methods["direct, gated response"] = best_response
    rows = []
    for name, method in methods.items():
        found = {}
        for place in (jax.devices()[0], jax.local_devices(backend="cpu")[0]):
            with jax.default_device(place):
                (params, decay), batch = jax.device_put(given, place)
                grads = method(params, decay, batch, batch, key=jax.random.key(2))
                found[place] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
        here, cpu = found[jax.devices()[0]], found[jax.local_devices(backend="cpu")[0]]
        error = float(np.linalg.norm(here - cpu) / np.linalg.norm(cpu))
        rows.append({"method": name, "error": error, "right": error <= TOLERANCE})
    return rows


def metagradient(steps: int, segment: int, width: int) -> dict[str, Any]:
    """Differentiate a whole run on the device and on the CPU, and compare it with its plan."""
    problem, make = make_problem(width, width // 2)
    rng = np.random.default_rng(0)
    given = jax.tree.map(np.asarray, make())
    inputs, labels = rng.normal(size=(1024, width // 2)).astype(np.float32), rng.integers(0, 10, 1024)
    rows = rng.integers(0, 1024, (steps, BATCH))

    def batch_at(step: jax.Array) -> hg.IndexedBatch:
        return hg.IndexedBatch((jnp.asarray(inputs), jnp.asarray(labels)), jnp.asarray(rows)[step])

    rule = optax.adam(1e-3, eps_root=1e-8)
    settings: dict[str, Any] = {"batch_at": batch_at, "num_steps": steps, "segment": segment}
    settings["store"] = hg.stores.host(4)
    found = {}
    for place in dict.fromkeys((jax.local_devices(backend="cpu")[0], jax.devices()[0])):
        with jax.default_device(place):
            (params, decay), valid = jax.device_put(given, place)
            fn = hg.metagradient(problem, rule, **settings)
            fn(params, decay, valid, key=None)
            (_, grads), info = fn(params, decay, valid, key=None)
            found[place.platform] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
    memory = place.memory_stats()  # None on a CPU
    with jax.default_device(place):
        plan = hg.metagradient_plan(problem, rule, **settings)(params, decay, valid, key=None)
    here, cpu = found[place.platform], found["cpu"]
    error = float(np.linalg.norm(here - cpu) / np.linalg.norm(cpu))
    return {
        "weights": here.size,
        "steps": steps,
        "segment": segment,
        "status": info.status.name,
        "error": error,
        "right": error <= TOLERANCE,
        "forward_ms_per_step": 1e3 * plan.forward_seconds / segment,
        "reverse_ms_per_step": 1e3 * plan.reverse_seconds / segment,
        "seconds": info.seconds,
        "planned_seconds": plan.seconds,
        "peak_bytes": memory["peak_bytes_in_use"] if memory else None,
        "planned_bytes": plan.device_bytes,
    }


def speed(millions: float, rounds: int, moments: Any) -> dict[str, Any]:
    """Time a plain step, a joint step and a hypergradient at a number of weights."""
    width = max(8, round((-1034 + (1034**2 + 4e6 * millions) ** 0.5) / 2))
    problem, make = make_problem(width, 1024 if millions >= 1 else 64)
    variables, batch = make()
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables.params))
    outer = optax.adam(1e-2, mu_dtype=moments)
    tx = hg.bilevel(hg.implicit(problem), inner_optimizer=optax.adam(1e-3), outer_optimizer=outer, every=EVERY)
    state = tx.init(variables)

    def joint(variables: Any, state: Any) -> Any:
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=batch)
        return optax.apply_updates(variables, updates), state

    inner = optax.adam(1e-3)

    def plain(params: Any, state: Any, decay: Any) -> Any:
        grads = jax.grad(problem.inner_loss)(params, decay, batch, None)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start_plain = variables.params, inner.init(variables.params), variables.hyperparams
    steps = jax.jit(plain, donate_argnums=(0, 1)).lower(*start_plain).compile()
    compiled = jax.jit(joint, donate_argnums=(0, 1)).lower(variables, state).compile()
    memory = compiled.memory_analysis()
    size = float("nan") if memory is None else memory.argument_size_in_bytes + memory.temp_size_in_bytes
    params, plain_state = jax.tree.map(jnp.copy, variables.params), inner.init(variables.params)
    decay = jax.tree.map(jnp.copy, variables.hyperparams)
    times: dict[str, list[float]] = {"plain": [], "joint": []}
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(EVERY):
            params, plain_state = steps(params, plain_state, decay)
        jax.block_until_ready(params)
        times["plain"].append((time.perf_counter() - start) / EVERY)
        start = time.perf_counter()
        for _ in range(EVERY):
            variables, state = compiled(variables, state)
        jax.block_until_ready(variables)
        times["joint"].append((time.perf_counter() - start) / EVERY)
    ratio = statistics.median(j / p for j, p in zip(times["joint"], times["plain"], strict=True))
    step, whole = statistics.median(times["plain"]), statistics.median(times["joint"])
    return {
        "weights": weights,
        "outer_moments": jnp.dtype(moments).name,
        "plain_ms": 1e3 * step,
        "joint_over_plain": ratio,
        "hypergradients_per_s": 1.0 / (EVERY * (whole - step)) if whole > step else math.nan,
        "bytes_per_weight": size / weights,
        "skipped": int(state.info.num_skipped),
    }


def precision() -> list[dict[str, Any]]:
    """Compare the default hypergradient in lower precisions with that in float32."""
    problem, make = make_problem(64, 32)
    (params, decay), batch = make()

    def hypergradient(problem: hg.BilevelProblem) -> np.ndarray:
        grads = hg.hypergrad(hg.implicit(problem))(params, decay, batch, batch, key=None)
        return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(grads)])

    reference, rows = hypergradient(problem), []
    with jax.default_matmul_precision("tensorfloat32"):
        found = {"TF32 matrix products": hypergradient(make_problem(64, 32)[0])}
    found["a loss in bfloat16"] = hypergradient(make_problem(64, 32, jnp.bfloat16)[0])
    for name, other in found.items():
        cosine = float(other @ reference / np.linalg.norm(other) / np.linalg.norm(reference))
        rows.append({"precision": name, "cosine": cosine, "finite": bool(np.isfinite(other).all())})
    return rows


def tell(row: dict[str, Any]) -> None:
    """Print a row."""
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print the tables, write the file; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--sizes", default="10,100,1000", help="millions of weights, with commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    record: dict[str, Any] = {**harness.circumstances(3), "device": device.device_kind, "platform": device.platform}
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}")
    record["correctness"] = correctness()
    for row in record["correctness"]:
        print(f"{row['method']:32s} error {row['error']:.1e}  {'right' if row['right'] else 'WRONG'}", flush=True)
    record["metagradient"] = metagradient(20, 5, 32) if args.quick else metagradient(200, 20, 512)
    tell(record["metagradient"])
    record["speed"] = []
    sizes = (0.01,) if args.quick else map(float, args.sizes.split(","))
    for millions, moments in itertools.product(sizes, (jnp.float32, jnp.bfloat16)):
        try:
            row = speed(millions, 2 if args.quick else 5, moments)
        except Exception as error:  # out of memory at the largest size is a result, too
            row = {"weights": millions * 1e6, "outer_moments": jnp.dtype(moments).name}
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]:.120}"
        record["speed"].append(row)
        tell(row)
    record["precision"] = precision()
    for row in record["precision"]:
        print(f"{row['precision']:32s} cosine {row['cosine']:.6f}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "device_check.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
