"""Learned decays that hold when the weights are trained again: a decay per word, by how often the word occurs.

    w*(c) = argmin_w  CE(w; train) + ½ Σⱼ cⱼ ‖wⱼ‖²          log cⱼ = s + B(log dⱼ) a + zⱼ

Softmax regression on word counts of 20 newsgroups, each document scaled to length 1. dⱼ is the number of documents with
word j, B a basis of piecewise-linear functions, s the logarithm of the best single decay. The inner problem is solved
to a small gradient, so that trained and retrained weights are the same.

    python experiments/text_decay.py [--seeds 5] [--quick] [--out experiments/results]

Rows, with equal budgets counted in gradients of the training loss (a Hessian product counts as 2):

    one decay          a grid of 17, from whose best all other rows start, and one of 53
    by frequency       a learned (4 numbers), by implicit differentiation; by TPE (Optuna) at the same budget
    per word           a + z learned (2,004 numbers), with no prior; with z ~ N(0, 0.5²); by TPE
    tf-idf, one decay  the weights of words that the field found by hand, and a grid

Learned rows take hypergradients from three quarters of the validation documents, and keep the step at which the loss
on the last quarter is lowest. Grid and TPE select on all validation documents; TPE draws three points at random, and
searches within a factor of e² for a frequency and of e for a word. "All" is the test loss of weights
trained on training and validation documents together, at the decays found, scaled by the number of documents.

The documents are read from ``$HYPERGRAD_DATA/20news/20news_counts.npz``. Without it the script draws documents of its
own: common words without meaning, rarer words that belong to a class. Writes ``text_decay.json``, ``.md`` and ``.png``.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from jax import lax
from matplotlib.figure import Figure

import hypergrad as hg

KNOTS, PRIOR_SCALE = 4, 0.5
GRID, FINE_GRID = np.linspace(-5.0, -13.0, 17), np.linspace(-5.0, -13.0, 53)  # log decays
RATE = 0.3  # of Adam on the log decays


class Size(NamedTuple):
    """How large an experiment is."""

    train: int = 1000
    valid: int = 1000
    words: int = 2000
    outer_steps: int = 20
    seeds: int = 5


QUICK = Size(train=60, valid=60, words=80, outer_steps=3, seeds=1)


class Documents(NamedTuple):
    """Rows of word counts scaled to length 1 (n, words), and classes (n,)."""

    x: jax.Array
    y: jax.Array


class Data(NamedTuple):
    """Three splits, and how many training and validation documents contain each word (at least 1)."""

    train: Documents
    valid: Documents
    test: Documents
    frequency: np.ndarray


class Found(NamedTuple):
    """What a method found: log decays per word, what it spent, and what it saw on the way."""

    log_decays: jax.Array
    gradients: float
    curve: list[tuple[float, ...]] = []  # gradients, fitted, held out, test loss  # noqa: RUF012
    trials: int = 0  # of TPE


class Solution(NamedTuple):
    """Weights at which the gradient of the inner loss is small, and the gradients that it took to find them."""

    params: Any
    gradients: jax.Array
    gradient_norm: jax.Array


def load(seed: int, size: Size, *, idf: bool = False) -> Data:
    """Return the splits of a seed, of the most frequent words."""
    counts, classes = corpus(size.words)
    order = np.random.default_rng(seed).permutation(len(classes))
    seen = counts[order[: size.train + size.valid]]
    frequency = np.maximum((seen > 0).sum(0), 1)
    if idf:
        counts = np.log1p(counts) * (1 + np.log(len(seen) / frequency))
    counts = counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)
    parts = np.split(order, [size.train, size.train + size.valid])
    train, valid, test = (
        Documents(jnp.asarray(counts[at], jnp.float32), jnp.asarray(classes[at], jnp.int32)) for at in parts
    )
    return Data(train, valid, test, frequency)


@cache
def corpus(words: int) -> tuple[np.ndarray, np.ndarray]:
    """Return counts (documents, words) of the most frequent words, and classes."""
    path = Path(os.environ.get("HYPERGRAD_DATA", "")) / "20news" / "20news_counts.npz"
    if not path.exists():
        return drawn_corpus(words)
    with np.load(path) as file:
        counts, indices, starts, y = (file[f"train_{part}"] for part in ("counts", "indices", "indptr", "y"))
    present = np.bincount(indices)
    place = np.full(len(present), -1)
    place[np.argsort(-present, kind="stable")[:words]] = np.arange(words)
    rows, columns = np.repeat(np.arange(len(y)), np.diff(starts)), place[indices]
    dense = np.zeros((len(y), words), np.float32)
    dense[rows[columns >= 0], columns[columns >= 0]] = counts[columns >= 0]
    return dense, y


def drawn_corpus(words: int) -> tuple[np.ndarray, np.ndarray]:
    """Return documents by Zipf's law, in which every second of the rarer words favours one of five classes."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 40 * int(np.sqrt(words)))
    rate = np.tile(8.0 / np.arange(1, words + 1), (5, 1))
    for word in range(words // 10, words, 2):
        rate[word % 5, word] *= 3.0
    counts = rng.poisson(rate[y]).astype(np.float32)
    return counts + 1e-6 * (counts.sum(0) == 0), y


def cross_entropy(params: Any, data: Documents) -> jax.Array:
    """Return the mean negative log-likelihood."""
    logits = data.x @ params["w"] + params["b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, data.y).mean()


def error(params: Any, data: Documents) -> jax.Array:
    """Return the share of documents that are classified wrongly."""
    return jnp.mean((data.x @ params["w"] + params["b"]).argmax(-1) != data.y)


@jax.jit
def judge(params: Any, data: Documents) -> tuple[jax.Array, jax.Array]:
    """Return cross-entropy and error."""
    return cross_entropy(params, data), error(params, data)


def inner_loss(params: Any, log_decays: jax.Array, batch: Documents, _key: Any) -> jax.Array:
    """Return the training loss; one log decay per word."""
    return cross_entropy(params, batch) + hg.penalties.l2(params, {"w": jnp.exp(log_decays)[:, None], "b": 1e-6})


def outer_loss(params: Any, _log_decays: jax.Array, batch: Documents, _key: Any) -> jax.Array:
    """Return the validation loss."""
    return cross_entropy(params, batch)


def curvature(params: Any, log_decays: jax.Array, batch: Documents) -> Any:
    """Return an approximate diagonal of the Hessian of the inner loss: decays, and a share of the squared inputs."""
    classes = params["w"].shape[1]
    diagonal = jnp.exp(log_decays) + jnp.mean(batch.x**2, axis=0) / classes
    return {
        "w": jnp.broadcast_to(diagonal[:, None], params["w"].shape),
        "b": jnp.full_like(params["b"], 1.0 / classes),
    }


@partial(jax.jit, static_argnames="max_steps")
def solve(params: Any, log_decays: jax.Array, batch: Documents, *, max_steps: int = 300) -> Solution:
    """Minimise the inner loss by L-BFGS from ``params``, in units in which the curvature is about 1."""
    scale = jax.tree.map(jnp.sqrt, curvature(params, log_decays, batch))
    unscaled = lambda scaled: jax.tree.map(jnp.divide, scaled, scale)  # noqa: E731
    objective = lambda scaled: inner_loss(unscaled(scaled), log_decays, batch, None)  # noqa: E731
    tx, value_and_grad = optax.lbfgs(memory_size=20), optax.value_and_grad_from_state(objective)

    def step(at: Any) -> Any:
        scaled, state, spent, number, _ = at
        value, gradient = value_and_grad(scaled, state=state)
        updates, state = tx.update(gradient, state, scaled, value=value, grad=gradient, value_fn=objective)
        spent += optax.tree.get(state, "num_linesearch_steps")
        return optax.apply_updates(scaled, updates), state, spent, number + 1, optax.tree.norm(gradient)

    def unfinished(at: Any) -> jax.Array:
        return (at[3] < max_steps) & (at[4] > 1e-4)

    start = jax.tree.map(jnp.multiply, params, scale)
    first = start, tx.init(start), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.array(jnp.inf)
    scaled, _, spent, _, norm = lax.while_loop(unfinished, step, first)
    return Solution(unscaled(scaled), spent, norm)


def zeros(data: Data) -> Any:
    """Return weights of zero."""
    classes = int(data.train.y.max()) + 1
    return {"w": jnp.zeros((data.train.x.shape[1], classes)), "b": jnp.zeros(classes)}


def grid(data: Data, values: np.ndarray = GRID) -> tuple[Found, Any]:
    """Return the best single decay, and the weights there."""
    params, best, spent = zeros(data), (np.inf, 0.0, None), 0.0
    for value in values:  # from the strongest decay on, each from the weights of the one before
        solution = solve(params, jnp.full(len(data.frequency), value), data.train)
        params, spent = solution.params, spent + float(solution.gradients)
        best = min(best, (float(judge(params, data.valid)[0]), value, params), key=lambda one: one[0])
    _, value, params = best
    return Found(jnp.full(len(data.frequency), value), spent), params


def families(data: Data) -> dict[str, tuple[Any, Callable[[Any], jax.Array]]]:
    """Return by name where a family of decays starts, and its log decays relative to the single one."""
    knots = np.quantile(np.log(data.frequency), np.linspace(0, 1, KNOTS))
    basis = jnp.asarray([np.interp(np.log(data.frequency), knots, row) for row in np.eye(KNOTS)], jnp.float32)
    by_frequency = {"frequency": jnp.zeros(KNOTS)}
    return {
        "by frequency": (by_frequency, lambda h: h["frequency"] @ basis),
        "per word": (
            by_frequency | {"word": jnp.zeros(len(data.frequency))},
            lambda h: h["frequency"] @ basis + h["word"],
        ),
    }


def learn(data: Data, start: Found, params: Any, family: Any, size: Size, *, prior: bool = False) -> Found:
    """Learn the decays of a family by implicit differentiation; stop where the held-out quarter says."""
    hyperparams, relative = family
    cut = 3 * len(data.valid.y) // 4
    fitted, held_out = Documents(*(leaf[:cut] for leaf in data.valid)), Documents(*(leaf[cut:] for leaf in data.valid))
    log_decays = lambda h: start.log_decays + relative(h)  # noqa: E731
    problem = hg.BilevelProblem(
        lambda params, h, batch, key: inner_loss(params, log_decays(h), batch, key),
        lambda params, h, batch, key: outer_loss(params, log_decays(h), batch, key),
    )
    if prior:
        near = hg.priors.normal(0.0, PRIOR_SCALE)
        problem = hg.with_prior(problem, lambda h: near(h["word"]), num_examples=cut)
    solver = hg.solvers.cg(30, rtol=1e-2, warm_start=True, preconditioner=hg.preconditioners.jacobi())
    diagonal = lambda params, h: curvature(params, log_decays(h), data.train)  # noqa: E731
    hypergradient = hg.value_and_hypergrad(hg.implicit(problem, solver, diagonal=diagonal))
    tx = optax.adam(optax.cosine_decay_schedule(RATE, size.outer_steps))
    outer_state, state, spent, curve = tx.init(hyperparams), None, start.gradients, []
    best = (np.inf, hyperparams)
    for _ in range(size.outer_steps + 1):
        solution = solve(params, log_decays(hyperparams), data.train)
        params, spent = solution.params, spent + float(solution.gradients)
        losses = [float(judge(params, split)[0]) for split in (fitted, held_out, data.test)]
        curve.append((spent, *losses))
        best = min(best, (losses[1], hyperparams), key=lambda one: one[0])
        (_, gradient), info = hypergradient(params, hyperparams, data.train, fitted, key=None, state=state)
        state, spent = info.state, spent + 2 * float(info.solver.num_products) + 3
        updates, outer_state = tx.update(gradient, outer_state)
        hyperparams = optax.apply_updates(hyperparams, updates)
    return Found(log_decays(best[1]), curve[-1][0], curve)


def tpe(data: Data, start: Found, params: Any, family: Any, budget: float, seed: int) -> Found:
    """Search the same family by TPE, from the single decay on, until the budget of gradients is spent."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=3))
    zero, relative = family
    leaves, structure = jax.tree.flatten(zero)
    study.enqueue_trial({f"{i}.{j}": 0.0 for i, leaf in enumerate(leaves) for j in range(leaf.size)})
    widths = jax.tree.leaves({"frequency": 2.0, "word": 1.0} if "word" in zero else {"frequency": 2.0})
    best, spent = (np.inf, start.log_decays), start.gradients
    while spent < budget:
        trial = study.ask()
        drawn = [
            jnp.asarray([trial.suggest_float(f"{i}.{j}", -widths[i], widths[i]) for j in range(leaf.size)])
            for i, leaf in enumerate(leaves)
        ]
        log_decays = start.log_decays + relative(jax.tree.unflatten(structure, drawn))
        solution = solve(params, log_decays, data.train)
        spent += float(solution.gradients)
        loss = float(judge(solution.params, data.valid)[0])
        study.tell(trial, loss)
        best = min(best, (loss, log_decays), key=lambda one: one[0])
    return Found(best[1], spent, trials=len(study.trials))


def outcome(data: Data, found: Found, count: int) -> dict[str, Any]:
    """Train new weights at the decays found, on the training documents and on all; judge them on the test documents."""
    solution = solve(zeros(data), found.log_decays, data.train)
    alone = solution.params
    both = Documents(*(jnp.concatenate(pair) for pair in zip(data.train, data.valid, strict=True)))
    share = len(data.train.y) / len(both.y)
    together = solve(zeros(data), found.log_decays + np.log(share), both).params
    row: dict[str, Any] = {"hyperparams": count, "gradients": round(found.gradients), "trials": found.trials}
    row |= {"gradient_norm": float(solution.gradient_norm), "curve": found.curve}
    row["valid"] = float(judge(alone, data.valid)[0])
    for name, params in (("retrained", alone), ("all", together)):
        row[f"{name}_test"], row[f"{name}_error"] = (float(value) for value in judge(params, data.test))
    return row


def run(seed: int, size: Size) -> tuple[dict[str, dict[str, Any]], dict[str, Found]]:
    """Return the rows of one seed, and what the learned methods found."""
    data = load(seed, size)
    single, params = grid(data)
    made = families(data)
    found = {"one decay, grid": single, "one decay, fine grid": grid(data, FINE_GRID)[0]}
    found["by frequency, learned"] = learn(data, single, params, made["by frequency"], size)
    budget = found["by frequency, learned"].gradients
    found["by frequency, TPE"] = tpe(data, single, params, made["by frequency"], budget, seed)
    found["per word, learned"] = learn(data, single, params, made["per word"], size)
    found["per word, learned with a prior"] = learn(data, single, params, made["per word"], size, prior=True)
    budget = found["per word, learned with a prior"].gradients
    found["per word, TPE"] = tpe(data, single, params, made["per word"], budget, seed)
    words = len(data.frequency)
    counts = {"one": 1, "by": KNOTS, "per": KNOTS + words}
    rows = {name: outcome(data, one, counts[name.split()[0].rstrip(",")]) for name, one in found.items()}
    weighted = load(seed, size, idf=True)
    rows["tf-idf, one decay, grid"] = outcome(weighted, grid(weighted)[0], 1)
    return rows, found


COLUMNS = {
    "valid": "validation loss",
    "retrained_test": "test loss",
    "retrained_error": "test error %",
    "all_test": "all: test loss",
    "all_error": "all: test error %",
}


def table(seeds: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Return means and standard errors over the seeds as Markdown."""
    lines = [("method", "hyperparameters", "gradients", *COLUMNS.values()), ("---",) * (3 + len(COLUMNS))]
    for name in seeds[0]:
        rows = [seed[name] for seed in seeds]
        gradients = round(float(np.mean([row["gradients"] for row in rows])))
        cells = []
        for column in COLUMNS:
            percent = column.endswith("error")
            values = np.asarray([row[column] for row in rows]) * (100 if percent else 1)
            spread = f" ± {values.std(ddof=1) / len(values) ** 0.5:.{2 if percent else 4}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{1 if percent else 3}f}{spread}")
        lines.append((name, f"{rows[0]['hyperparams']:,}", f"{gradients:,}", *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(data: Data, found: dict[str, Found], path: Path) -> None:
    """Save the picture of a seed: losses against gradients, and the decays that were learned."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {
        "by frequency, learned": "tab:green",
        "per word, learned": "0.6",
        "per word, learned with a prior": "tab:red",
    }
    for name, colour in colours.items():
        spent, _, held_out, test = np.asarray(found[name].curve).T
        left.plot(spent, test, color=colour, label=name)
        left.plot(spent[held_out.argmin()], test[held_out.argmin()], "o", color=colour)
        right.plot(data.frequency, np.exp(found[name].log_decays), ".", markersize=2, color=colour, label=name)
    right.axhline(float(jnp.exp(found["one decay, grid"].log_decays[0])), color="tab:blue", label="one decay, grid")
    left.set(
        xlabel="cost, gradients of the training loss",
        ylabel="test loss, nats",
        title="dots: chosen by the held-out quarter",
    )
    right.set(xscale="log", yscale="log", xlabel="documents with the word", ylabel="decay c of the word, in ½ c w²")
    right.legend(fontsize="small")
    left.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=95, pil_kwargs={"optimize": True})


def main(argv: Sequence[str] | None = None) -> list[dict[str, dict[str, Any]]]:
    """Run all seeds, write the files, print the table; return the rows by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--quick", action="store_true", help="a few words and steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else Size()
    seeds: list[dict[str, dict[str, Any]]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds or size.seeds):
        rows, found = run(seed, size)
        seeds.append(rows)
        if seed == 0:
            draw(load(seed, size), found, args.out / "text_decay.png")
        text = table(seeds)
        print(f"{len(seeds)} seeds\n\n{text}", flush=True)
        where = f"python {platform.python_version()}, jax {jax.__version__}, {size}"
        (args.out / "text_decay.json").write_text(json.dumps({"circumstances": where, "seeds": seeds}, indent=1) + "\n")
        (args.out / "text_decay.md").write_text(f"# Learned decays of words, retrained\n\n{text}\n\n{where}\n")
    return seeds


if __name__ == "__main__":
    main()
