"""Does ``check_hypergrad`` pass correct code and find bugs, on the models that people have?

    python benchmarks/check_matrix.py [--quick] [--only cnn,mlp] [--bugs none,sign] [--out DIR]

Models of 10,000 to 300,000 weights: a CNN with ReLU and max pooling, an MLP with batch normalisation and dropout, a
transformer in bfloat16, an LSTM; one log decay per array of weights. Each is checked after a few hundred steps of Adam,
with ``implicit`` and its default solver, and with ``unrolled`` over a window of eight steps. Then thirteen bugs are
planted, one at a time.

A cell says what the check said: for correct code "passed" is right, for a bug "FAILED", a refusal by ``ValueError``,
or a verdict that names the cause. Writes ``check_matrix.json`` and ``check_matrix.md``; with ``--bugs`` the cells that
are not run again keep what the file has.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

CLASSES, WINDOW = 4, 8
Change = Callable[["Case"], "Case"]


class CNN(nn.Module):
    """Two convolutions with ReLU, a maximum pool, a dense layer."""

    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return logits (n, classes) of flat images (n, 64)."""
        del train
        x = nn.relu(nn.Conv(self.width, (3, 3))(x.reshape(-1, 8, 8, 1)))
        x = nn.max_pool(nn.relu(nn.Conv(2 * self.width, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


class MLP(nn.Module):
    """Batch normalisation and dropout."""

    width: int = 480

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return logits (n, classes)."""
        for _ in range(2):
            x = nn.tanh(nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x)))
            x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(CLASSES)(x)


class Transformer(nn.Module):
    """One block over the rows of an image, computed in bfloat16."""

    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return logits (n, classes)."""
        del train
        x = nn.Dense(self.width, dtype=jnp.bfloat16)(x.reshape(-1, 8, 8))
        x = x + nn.MultiHeadDotProductAttention(4, dtype=jnp.bfloat16)(nn.LayerNorm(dtype=jnp.bfloat16)(x))
        x = x + nn.Dense(self.width, dtype=jnp.bfloat16)(nn.gelu(nn.Dense(2 * self.width, dtype=jnp.bfloat16)(x)))
        return nn.Dense(CLASSES)(x.mean(axis=1).astype(jnp.float32))


class LSTM(nn.Module):
    """An LSTM over the rows of an image."""

    width: int = 48

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return logits (n, classes)."""
        del train
        outputs: Any = nn.RNN(nn.OptimizedLSTMCell(self.width))(x.reshape(-1, 8, 8))
        return nn.Dense(CLASSES)(outputs[:, -1])


MODELS = {"cnn": CNN, "mlp": MLP, "transformer": Transformer, "lstm": LSTM}


class Case(NamedTuple):
    """What is checked.

    Attributes:
      inner_loss: of (params, log decays, batch, key, model state), returns (loss, model state).
      outer_loss: likewise.
      wrap: turns an estimator into the one that is checked.
    """

    inner_loss: Callable[..., Any]
    outer_loss: Callable[..., Any]
    wrap: Callable[[hg.Estimator], hg.Estimator] = lambda estimator: estimator


def correct(model: Any) -> Case:
    """Return losses without a bug."""

    def logits(params: Any, x: jax.Array, key: Any, state: Any, train: bool) -> Any:
        inputs, rngs = {"params": params, **state}, None if key is None else {"dropout": key}
        if not train:
            return model.apply(inputs, x, train=False), state
        return model.apply(inputs, x, train=True, rngs=rngs, mutable=list(state))

    def inner(params: Any, decay: Any, batch: Any, key: Any, state: Any) -> Any:
        out, new = logits(params, batch[0], key, state, True)
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(out, batch[1]).mean()
        return loss + hg.penalties.l2(params, jax.tree.map(jnp.exp, decay)), new

    def outer(params: Any, _decay: Any, batch: Any, _key: Any, state: Any) -> Any:
        out, _ = logits(params, batch[0], None, state, False)
        return optax.losses.softmax_cross_entropy_with_integer_labels(out, batch[1]).mean(), state

    return Case(inner, outer)


def _estimates(change: Callable[[Any, Any], Any]) -> Change:
    """Return a bug in the estimator: ``change(estimate, hyperparams) -> hypergradient``."""

    def wrapped(estimator: hg.Estimator) -> hg.Estimator:
        def estimate(state: Any, ctx: hg.Context) -> hg.Estimate:
            found = estimator.estimate(state, ctx)
            return found._replace(hypergrad=change(found, ctx.hyperparams))

        return estimator._replace(estimate=estimate, reference=None)

    return lambda case: case._replace(wrap=wrapped)


def _inner(change: Callable[..., Any]) -> Change:
    """Return a bug in the inner loss: ``change(loss, params, decay, batch, key, state)``."""

    def planted(case: Case) -> Case:
        return case._replace(inner_loss=lambda *args: change(case.inner_loss, *args))

    return planted


def _one_leaf(tree: Any, change: Callable[[Any], Any]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [change(leaves[0]), *leaves[1:]])


def _other_batch(estimator: hg.Estimator) -> hg.Estimator:
    def moved(ctx: hg.Context) -> hg.Context:
        batches = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=-1) if leaf.ndim > 2 else leaf, ctx.inner_batches)
        return ctx._replace(inner_batches=batches)

    wrapped = estimator._replace(estimate=lambda state, ctx: estimator.estimate(state, moved(ctx)), reference=None)
    train = estimator.train
    return wrapped if train is None else wrapped._replace(train=lambda state, ctx: train(state, moved(ctx)))


def _own_key(estimator: hg.Estimator) -> hg.Estimator:
    def estimate(state: Any, ctx: hg.Context) -> hg.Estimate:
        keys = ctx.keys._replace(solve=None if ctx.keys.solve is None else jax.random.fold_in(ctx.keys.solve, 7))
        return estimator.estimate(state, ctx._replace(keys=keys))

    return estimator._replace(estimate=estimate, reference=None)


_SEEDS = np.random.default_rng(0)


def _draws(loss: Any, params: Any, decay: Any, batch: Any, key: Any, state: Any) -> Any:
    noise = jnp.asarray(0.1 * _SEEDS.normal(size=batch[0].shape), batch[0].dtype)
    return loss(params, decay, (batch[0] + noise, batch[1]), key, state)


@jax.custom_vjp
def _twice(x: jax.Array) -> jax.Array:
    return x


_twice.defvjp(lambda x: (x, ()), lambda _, ct: (2.0 * ct,))


def _stopped(loss: Any, params: Any, decay: Any, *rest: Any) -> Any:
    return loss(params, _one_leaf(decay, jax.lax.stop_gradient), *rest)


def _wrong_rule(loss: Any, params: Any, decay: Any, *rest: Any) -> Any:
    return loss(params, _one_leaf(decay, _twice), *rest)


def _l1(loss: Any, params: Any, decay: Any, *rest: Any) -> Any:
    value, state = loss(params, decay, *rest)
    sizes = jax.tree.map(lambda w, d: jnp.exp(d) * jnp.abs(w).sum(), params, decay)
    return value + jax.tree.reduce(jnp.add, sizes), state


BUGS: dict[str, Change] = {
    "sign": _estimates(lambda found, _: jax.tree.map(jnp.negative, found.hypergrad)),
    "no mixed term": _estimates(lambda found, _: jax.tree.map(jnp.zeros_like, found.hypergrad)),
    "another batch": lambda case: case._replace(wrap=_other_batch),
    "another dropout key": lambda case: case._replace(wrap=_own_key),
    "stop_gradient": _inner(_stopped),
    "loss scaled": _estimates(lambda found, _: jax.tree.map(lambda g: 1.5 * g, found.hypergrad)),
    "solve stopped": lambda case: case._replace(
        wrap=lambda e: hg.implicit(e.problem, hg.solvers.from_callable(_tenth))
    ),
    "wrong mode": lambda case: case._replace(wrap=lambda e: hg.direct(e.problem)),
    "a leaf left out": _estimates(lambda found, _: _one_leaf(found.hypergrad, lambda g: 0.0 * g)),
    "kink": _inner(_l1),
    "own random numbers": _inner(_draws),
    "no bijector": _estimates(lambda found, h: jax.tree.map(lambda g, d: g * jnp.exp(-d), found.hypergrad, h)),
    "wrong derivative rule": _inner(_wrong_rule),
}


def _tenth(_matvec: Any, b: Any, _x0: Any) -> Any:
    return jax.tree.map(lambda v: 0.1 * v, b)


def check(name: str, how: str, plant: Change | None, quick: bool) -> dict[str, Any]:
    """Return the verdict, its first reason, and the seconds it took."""
    rng = np.random.default_rng(0)
    size = 16 if quick else 64
    model: Any = MODELS[name](32) if quick else MODELS[name]()
    x, y = jnp.asarray(rng.normal(size=(2 * size, 64)), jnp.float32), jnp.asarray(rng.integers(0, CLASSES, 2 * size))
    train, valid = (x[:size], y[:size]), (x[size:], y[size:])
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x[:2], train=False)
    params = variables.pop("params")
    decay = jax.tree.map(lambda _: jnp.array(-6.0), params)
    case = correct(model) if plant is None else plant(correct(model))
    problem, key = hg.BilevelProblem(case.inner_loss, case.outer_loss, stateful=True), jax.random.key(3)
    if plant is BUGS["kink"]:
        decay = jax.tree.map(lambda _: jnp.array(-3.0), decay)
    params, variables = _trained(problem, params, decay, variables, train, key, 20 if quick else 300)
    at, options = hg.BilevelParams(params, decay), {"key": key, "model_state": variables, "max_seconds": 60.0}
    start = time.perf_counter()
    try:
        if how == "unrolled":
            window = jax.tree.map(lambda leaf: jnp.stack([leaf] * WINDOW), train)
            found = hg.diagnostics.check_hypergrad(
                case.wrap(hg.unrolled(problem)), at, window, valid, inner_optimizer=optax.sgd(0.1), **options
            )
        else:
            found = hg.diagnostics.check_hypergrad(case.wrap(hg.implicit(problem)), at, train, valid, **options)
        verdict, reason = found.verdict, (*found.reasons, "")[0]
    except ValueError as error:
        verdict, reason = "refused", str(error)
    seconds = time.perf_counter() - start
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"verdict": verdict, "reason": reason[:300], "seconds": round(seconds, 1), "weights": weights}


def _trained(
    problem: hg.BilevelProblem, params: Any, decay: Any, state: Any, batch: Any, key: jax.Array, steps: int
) -> tuple[Any, Any]:
    """Return weights and model state after Adam's steps, with the mask of the check."""
    optimizer, mask = optax.adam(optax.linear_schedule(3e-3, 0.0, steps)), jax.random.split(key, 5)[2]

    @jax.jit
    def step(params: Any, inner_state: Any, state: Any) -> Any:
        fn = lambda w: problem.inner_loss(w, decay, batch, mask, state)  # noqa: E731
        grads, state = jax.grad(fn, has_aux=True)(params)
        updates, inner_state = optimizer.update(grads, inner_state, params)
        return optax.apply_updates(params, updates), inner_state, state

    inner_state = optimizer.init(params)
    for _ in range(steps):
        params, inner_state, state = step(params, inner_state, state)
    return params, state


def applies(how: str, bug: str, name: str) -> bool:
    """Return whether a bug can be in a model: no key without dropout, no solve in an unroll."""
    if how == "unrolled" and bug in ("solve stopped", "kink", "another dropout key", "wrong mode"):
        return False
    return bug != "another dropout key" or name == "mlp"


def report(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    parts = [
        "# What check_hypergrad says of correct code and of thirteen bugs",
        "An empty cell was not run, or the bug cannot be in that model.",
    ]
    for how in ("implicit", "unrolled"):
        names = list(record["models"])
        lines = [("", *(f"{name}, {record['models'][name]['weights']:,} weights" for name in names))]
        lines.append(tuple("---" for _ in lines[0]))
        for bug in ("none", *BUGS):
            cells = [record["models"][name][how].get(bug) for name in names]
            lines.append(
                (bug, *("" if cell is None else f"{cell['verdict']}, {cell['seconds']:.0f} s" for cell in cells))
            )
        parts += [f"## {how}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*parts, harness.where(record["machine"])]) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, three bugs: does it run?")
    parser.add_argument("--only", default=",".join(MODELS), help="models, with a comma between")
    parser.add_argument("--bugs", help="rows of the table, with a comma between; all if left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=hg.OverfittingWarning)
    kept = args.out / "check_matrix.json"
    models = json.loads(kept.read_text())["models"] if args.bugs and kept.exists() else {}
    record: dict[str, Any] = {**harness.circumstances(1), "models": models}
    rows = args.bugs.split(",") if args.bugs else ["none", *BUGS]
    for name in ["lstm"] if args.quick else args.only.split(","):
        found = models.setdefault(name, {"implicit": {}, "unrolled": {}})
        for how in ("implicit", "unrolled"):
            for bug in ("none", "sign", "stop_gradient") if args.quick else rows:
                if applies(how, bug, name):
                    cell = found[how][bug] = check(name, how, BUGS.get(bug), args.quick)
                    found["weights"] = cell["weights"]
                    print(name, how, bug, cell, flush=True)
        harness.write(args.out, "check_matrix", record, report(record))
    return record


if __name__ == "__main__":
    main()
