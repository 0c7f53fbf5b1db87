"""What frozen weights save: the cost of a Hessian product where only some weights are trained.

    python benchmarks/frozen_weights.py [--quick] [--rounds 9] [--out DIR]

An MLP, softmax cross-entropy, one learned decay per trained array. Weights are trained:

    all             every weight
    last layers     those after a frozen prefix that holds at least 90 % of the weights
    adapters        two matrices of rank 8 beside every weight matrix (LoRA, arXiv 2106.09685); all others are frozen

The cost of a product is that of a hypergradient with 20 Neumann terms less that of one with 10, over 10, from rounds in
which the candidates take turns. Writes ``frozen_weights.json`` and ``frozen_weights.md``.
"""

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import optax
import report
from candidates import Candidate, compile_candidate

import hypergrad as hg

FEW, MANY = 10, 20
RANK = 8


class Case(NamedTuple):
    """A network of which some weights are trained.

    Attributes:
      params: the weights, frozen ones included.
      trainable: tree prefix of bools.
      logits: ``logits(params, x)``.
    """

    params: Any
    trainable: Any
    logits: Any


def cases(inputs: int, width: int, depth: int) -> dict[str, Case]:
    """Return the three choices of what is trained, on one network."""
    sizes = [inputs, *[width] * depth, 10]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    weights = [
        {"w": jax.random.normal(key, (n, m)) / n**0.5, "b": jnp.zeros(m)}
        for key, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]
    counts = [optax.tree.size(layer) for layer in weights]
    frozen = next(i for i in range(len(counts)) if sum(counts[:i]) >= 0.9 * sum(counts))
    adapters = [
        {"a": jax.random.normal(key, (n, RANK)) / n**0.5, "b": 0.01 * jax.random.normal(key, (RANK, m))}
        for key, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]

    def logits(layers: Any, x: jax.Array) -> jax.Array:
        for layer in layers[:-1]:
            x = jax.nn.gelu(x @ layer["w"] + layer["b"])
        return x @ layers[-1]["w"] + layers[-1]["b"]

    def adapted(params: Any, x: jax.Array) -> jax.Array:
        for place, (layer, adapter) in enumerate(zip(params["base"], params["adapters"], strict=True)):
            x = x @ layer["w"] + (x @ adapter["a"]) @ adapter["b"] + layer["b"]
            x = jax.nn.gelu(x) if place < depth else x
        return x

    return {
        "all": Case(weights, True, logits),
        "last layers": Case(weights, [place >= frozen for place in range(len(weights))], logits),
        "adapters": Case({"base": weights, "adapters": adapters}, {"base": False, "adapters": True}, adapted),
    }


def trained(case: Case) -> list[bool]:
    """Return which leaves of the weights are trained."""
    return jax.tree.leaves(jax.tree.broadcast(case.trainable, case.params))


def problem(case: Case) -> hg.BilevelProblem:
    """Return the losses; hyperparameters are a log decay per trained array."""
    chosen = trained(case)

    def cross_entropy(params: Any, batch: Any) -> jax.Array:
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(case.logits(params, batch[0]), batch[1])
        return losses.mean()

    def inner(params: Any, decays: Any, batch: Any, _key: Any) -> jax.Array:
        own = [leaf for leaf, is_trained in zip(jax.tree.leaves(params), chosen, strict=True) if is_trained]
        return cross_entropy(params, batch) + hg.penalties.l2(own, [jnp.exp(decay) for decay in decays])

    def outer(params: Any, _decays: Any, batch: Any, _key: Any) -> jax.Array:
        return cross_entropy(params, batch)

    return hg.BilevelProblem(inner, outer)


def candidate(case: Case, products: int, batches: tuple[Any, ...]) -> Candidate:
    """Return a hypergradient with so many products, compiled."""
    solver = hg.solvers.neumann(products, step_size=0.01)
    fn = hg.value_and_hypergrad(hg.implicit(problem(case), solver, trainable=case.trainable))
    decays = [jnp.full((), -5.0)] * sum(trained(case))
    return compile_candidate(functools.partial(fn, key=None), case.params, decays, *batches)


def measure(inputs: int, width: int, depth: int, batch: int, rounds: int, min_ms: float) -> dict[str, Any]:
    """Return the cost of a product in each case."""
    keys = jax.random.split(jax.random.key(1), 4)
    batches = tuple(
        (jax.random.normal(keys[i], (batch, inputs)), jax.random.randint(keys[i + 1], (batch,), 0, 10)) for i in (0, 2)
    )
    found = cases(inputs, width, depth)
    compiled = {(name, k): candidate(case, k, batches) for name, case in found.items() for k in (FEW, MANY)}
    thunks = {f"{name}, {k}": one.thunk() for (name, k), one in compiled.items()}
    timings = harness.interleave(thunks, rounds=rounds, min_ms=min_ms)

    def product_ms(name: str) -> list[float]:
        few, many = (timings[f"{name}, {k}"].cpu_ms for k in (FEW, MANY))
        return [(b - a) / (MANY - FEW) for a, b in zip(few, many, strict=True)]

    record: dict[str, Any] = {}
    for name, case in found.items():
        sizes = [leaf.size for leaf in jax.tree.leaves(case.params)]
        share = sum(size for size, own in zip(sizes, trained(case), strict=True) if own) / sum(sizes)
        saving = [a / b for a, b in zip(product_ms("all"), product_ms(name), strict=True)]
        record[name] = {
            "weights": sum(sizes),
            "trained_share": round(share, 4),
            "product_ms": round(statistics.median(product_ms(name)), 3),
            "hypergradient_ms": round(statistics.median(timings[f"{name}, {FEW}"].cpu_ms), 2),
            "times_cheaper": round(statistics.median(saving), 2),
            "scratch_mib": round(harness.scratch_mib(compiled[name, FEW].compiled), 1),
        }
    return record


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and write its results."""
    args = harness.arguments(__doc__ or "", ["mlp"], Path(__file__).parent / "results").parse_args(argv)
    sizes, rounds, min_ms = ((8, 8, 12, 8), 3, 5.0) if args.quick else ((784, 256, 12, 256), args.rounds, 60.0)
    jax.config.update("jax_disable_most_optimizations", args.quick)  # most of a quick run is compilation
    found = {**harness.circumstances(rounds), "cases": measure(*sizes, rounds, min_ms)}
    record = {"quick": args.quick, "networks": {"mlp": found}}
    head = (
        "trained",
        "weights",
        "share trained",
        "ms per product",
        "times cheaper",
        "hypergradient, ms",
        "scratch, MiB",
    )
    rows = [
        (
            name,
            f"{v['weights']:,}",
            f"{v['trained_share']:.1%}",
            f"{v['product_ms']:.2f}",
            f"{v['times_cheaper']:.1f}",
            f"{v['hypergradient_ms']:.1f}",
            f"{v['scratch_mib']:.1f}",
        )
        for name, v in found["cases"].items()
    ]
    where = harness.where(found["machine"])
    text = f"# Hessian products where weights are frozen\n\n{report.table(head, rows)}\n\n{where}\n"
    harness.write(args.out, "frozen_weights", record, text)
    print(text)
    return record


if __name__ == "__main__":
    main()
