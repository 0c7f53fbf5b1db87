"""How far one machine goes: bytes per weight and seconds of joint training with one decay per weight.

    python benchmarks/cost/scale.py [--quick] [--sizes 1,10,100,300] [--largest 400] [--out DIR]

An MLP of eight hidden layers and a transformer, in float32, Adam inside and outside, the default solver, an outer step
on every call; the outer optimizer keeps the decays at or above 0. Ten joint steps on one batch, after one that
compiles, each size in a process of its own: seconds per step, the training loss before and after, the largest resident
set of the process, and ``hg.plan`` of the step. Rows with a first outer moment in bfloat16, and with log decays
(``hg.bijectors.exp``), show what these change. The largest size is run with bfloat16 moments.

Then, from compilation alone, what each of eight devices would hold: weights, decays and states split over eight virtual
devices, and the batch on all of them. Writes ``scale.json`` and ``scale.md``.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
import networks

LAYERS, BATCH, STEPS, DEVICES = 8, 8, 10, 8
SEQUENCE, VOCABULARY = 16, 256  # the transformer sees a fourth of the rows, of so many tokens
HEADERS = "weights", "network", "variant", "plan, bytes per weight", "resident, bytes per weight", "resident, GiB"
MIB = 2**20


class MLP(nn.Module):
    """Hidden layers of one width."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (n, 10)."""
        for _ in range(self.layers):
            x = nn.tanh(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def network(name: str, millions: float) -> tuple[Any, Any]:
    """Return a module of about so many million weights and the shape and kind of its batches."""
    layers = LAYERS if millions >= 1 else 1
    if name == "mlp":
        width = max(8, round(math.sqrt(1e6 * millions / layers) / 8) * 8)
        return MLP(width, layers), (jnp.float32, (BATCH, width))
    width = max(8, round(math.sqrt(1e6 * millions / (12 * layers)) / 8) * 8)
    return networks.LanguageModel(VOCABULARY, width, layers), (jnp.int32, (BATCH // 4, SEQUENCE))


def joint(name: str, millions: float, variant: str) -> tuple[Any, Any, Any]:
    """Return the transformation, a function that makes the variables, and one that makes a batch."""
    module, (dtype, shape) = network(name, millions)
    exp = variant == "log decays"

    def cross_entropy(params: Any, batch: Any) -> jax.Array:
        logits: Any = module.apply({"params": params}, batch[0])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    problem = hg.BilevelProblem(
        lambda w, decay, batch, _key: cross_entropy(w, batch) + hg.penalties.l2(w, decay),
        lambda w, _decay, batch, _key: cross_entropy(w, batch),
    )
    outer: Any = optax.adam(1e-8, mu_dtype=jnp.bfloat16 if variant == "bfloat16 moments" else None)
    if exp:
        problem, outer = hg.reparameterize(problem, hg.bijectors.exp()), optax.adam(1e-2)
    else:
        outer = optax.chain(outer, optax.keep_params_nonnegative())
    tx = hg.bilevel(hg.implicit(problem), inner_optimizer=optax.adam(1e-4), outer_optimizer=outer)

    def make() -> hg.BilevelParams:
        params = module.init(jax.random.key(0), jnp.zeros(shape, dtype))["params"]
        start = math.log(1e-7) if exp else 1e-7
        return hg.BilevelParams(params, jax.tree.map(lambda w: jnp.full_like(w, start), params))

    def batch() -> Any:
        rng = np.random.default_rng(0)
        if dtype == jnp.int32:
            return tuple(jnp.asarray(rng.integers(0, VOCABULARY, shape), jnp.int32) for _ in range(2))
        return jnp.asarray(rng.normal(size=shape), jnp.float32), jnp.asarray(rng.integers(0, 10, shape[0]), jnp.int32)

    return tx, make, batch


def trained(name: str, millions: float, variant: str) -> dict[str, Any]:
    """Take the joint steps in this process; return the row."""
    tx, make, draw = joint(name, millions, variant)
    batch = draw()
    shapes = jax.eval_shape(make)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))
    planned = hg.plan(tx, shapes, inner_batch=batch, outer_batch=batch)
    before = harness.peak_rss_mib()
    variables = jax.jit(make)()
    state = jax.jit(tx.init)(variables)

    def step(variables: Any, state: Any) -> Any:
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=batch)
        return optax.apply_updates(variables, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    variables, state = compiled(variables, state)
    first, begun = float(state.info.inner_loss), time.perf_counter()
    for _ in range(STEPS):
        variables, state = compiled(variables, state)
    jax.block_until_ready(variables)
    seconds = (time.perf_counter() - begun) / STEPS
    peak = harness.peak_rss_mib()
    return {
        "weights": count,
        "hyperparameters": count,
        "network": name,
        "variant": variant,
        "planned_bytes_per_weight": planned.per_weight,
        "resident_mib": peak,
        "resident_before_mib": before,
        "resident_bytes_per_weight": (peak - before) * MIB / count,
        "seconds_per_step": seconds,
        "loss": [first, float(state.info.inner_loss)],
        "skipped": int(state.info.num_skipped),
        **harness.circumstances(STEPS),
    }


def sharded(name: str, millions: float) -> dict[str, Any]:
    """Return the plan of one of eight devices: of each leaf the last axis is split that eight divides."""
    tx, make, draw = joint(name, millions, "float32")
    mesh = jax.make_mesh((DEVICES,), ("model",), axis_types=(AxisType.Auto,))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731

    def placed(leaf: Any) -> Any:
        axis = max((axis for axis, size in enumerate(leaf.shape) if size % DEVICES == 0), default=None)
        axes = [None if other != axis else "model" for other in range(leaf.ndim)]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(*axes))

    shapes = jax.tree.map(placed, jax.eval_shape(make))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place()), draw())
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))
    found = hg.plan(tx, shapes, inner_batch=batch, outer_batch=batch)
    return {
        "weights": count,
        "network": name,
        "mib_per_device": found.device_bytes / MIB,
        "bytes_per_weight_over_all": DEVICES * found.device_bytes / count,
    }


def report(record: dict[str, Any]) -> str:
    """Return the tables."""
    lines = ["# Joint training at scale", "", ABOUT, ""]
    lines.append("| " + " | ".join([*HEADERS, "seconds per joint step", "loss", "outer steps skipped"]) + " |")
    lines.append("|" + " --- |" * (len(HEADERS) + 3))
    for row in record["rows"]:
        cells = [
            f"{row['weights'] / 1e6:.3g} M",
            row["network"],
            row["variant"],
            f"{row['planned_bytes_per_weight']:.1f}",
            f"{row['resident_bytes_per_weight']:.1f}",
            f"{row['resident_mib'] / 1024:.2f}",
            f"{row['seconds_per_step']:.3g}",
            f"{row['loss'][0]:.3f} → {row['loss'][1]:.3f}",
            f"{row['skipped']} of {STEPS + 1}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Planned, on a mesh of {DEVICES} devices:", ""]
    lines += ["| weights | network | MiB per device | bytes per weight over all |", "| --- | --- | --- | --- |"]
    for row in record["mesh"]:
        lines.append(
            f"| {row['weights'] / 1e6:.3g} M | {row['network']} | {row['mib_per_device']:,.0f} | "
            f"{row['bytes_per_weight_over_all']:.1f} |"
        )
    lines += ["", harness.where(record["machine"])]
    return "\n".join(lines) + "\n"


ABOUT = f"""Weights of an MLP of {LAYERS} hidden layers or of a transformer of {LAYERS} layers, one decay per weight,
Adam inside and outside, the default solver, an outer step on every call, batches of {BATCH} rows or of
{BATCH // 4} sequences of {SEQUENCE} tokens. "plan" is `hg.plan`; "resident" is what the largest resident set of the
process grew by after the plan was made, which compiles as the run does: below 10 million weights that hides part of it.
The loss is that of training, {STEPS} steps apart. The guard skips outer steps from random weights where three products
leave a residual above 3: they cost the same. `python benchmarks/cost/scale.py` writes this."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny size: does it run?")
    parser.add_argument("--sizes", default="1,10,100,300", help="millions of weights, with commas")
    parser.add_argument(
        "--largest", type=float, default=400, help="millions of weights of the MLP with bfloat16 moments"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "MILLIONS", "VARIANT"), help="one row, in this process")
    parser.add_argument("--mesh", nargs=2, metavar=("NETWORK", "MILLIONS"), help="one plan over eight virtual devices")
    args = parser.parse_args(argv)
    if args.one:
        row = trained(args.one[0], float(args.one[1]), args.one[2])
        print(json.dumps(row))
        return row
    if args.mesh:
        jax.config.update("jax_num_cpu_devices", DEVICES)
        row = sharded(args.mesh[0], float(args.mesh[1]))
        print(json.dumps(row))
        return row
    sizes = ["0.02"] if args.quick else args.sizes.split(",")
    wanted = [(name, size, "float32") for size in sizes for name in ("mlp", "transformer")]
    middle = sizes[len(sizes) // 2]
    wanted += [("mlp", middle, variant) for variant in ("bfloat16 moments", "log decays")]
    if not args.quick:
        wanted.append(("mlp", str(args.largest), "bfloat16 moments"))
    record: dict[str, Any] = {**harness.circumstances(STEPS), "rows": [], "mesh": []}
    for case in wanted:
        record["rows"].append(harness.in_a_process(__file__, ["--one", *case]))
        print({k: v for k, v in record["rows"][-1].items() if k not in ("machine",)}, flush=True)
        harness.write(args.out, "scale", record, report(record))
    for name, size in [(name, size) for size in sizes[-2:] for name in ("mlp", "transformer")]:
        record["mesh"].append(harness.in_a_process(__file__, ["--mesh", name, size]))
        print(record["mesh"][-1], flush=True)
        harness.write(args.out, "scale", record, report(record))
    return record


if __name__ == "__main__":
    main()
