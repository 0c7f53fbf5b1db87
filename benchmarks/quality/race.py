"""A race: gradient methods against searches, at equal total cost, for 2 to 10,656 hyperparameters.

    python benchmarks/quality/race.py [--quick] [--choose] [--seeds 5] [--only "10; 100"] [--split 500/400]
        [--environments DIR] [--merge]

The problem: an MLP (64-144-10) on scikit-learn's digits, 1,797 images: of ``--split 200/800`` 200 are for training and
800 for validation, and the others are the test set. Batches of 100, Adam. The hyperparameters are log decays of groups
of weights, between 1e-6 and 1:

    2         one for each layer
    10        eight rows of pixels, two halves of the hidden units
    100       64 pixels, 36 groups of four hidden units
    10,656    every weight that multiplies something

A gradient of the training loss on a batch costs 1, and so does one of the validation loss; a product with second
derivatives costs 2. All methods may spend the same. Gradient methods train once, by ``hg.bilevel``, with an outer step
every 10 steps: 3 Hessian products and 1 for the residual they begin with, 1 mixed product and 1 outer gradient
(``implicit``), as much with 1 Hessian product (``SOBA``), or 2 for each differentiated step (``unrolled``). They begin
at one decay for all weights, drawn from the box. A search trains new weights for every point, with the settings that
its package advises: random search, TPE, ASHA and Hyperband (Optuna), and, in an environment of their own that is made
in ``--environments``, SMAC, DEHB and CMA-ES. From 100 hyperparameters on, TPE searches the 10 groups, and CMA-ES is the
separable one. A look at the validation loss every 100 is free; everyone keeps the weights and the hyperparameters of
the lowest, and test is the test loss there. "Retrained" trains new weights with these hyperparameters held fixed, as
long as a trial, and keeps those of the lowest validation loss.

``--choose`` tries the length of a trial for each search, and the outer rate of each gradient method, by the validation
loss on seeds 100 and 101, with 500 training and 400 validation images (the shortest length, and SOBA's rate, are at the
edge of what is tried); the race is run on seeds 0 to 4, with both splits. Beside it stand weights trained on training
and validation images together with one fixed decay, for a tenth of the cost. Writes ``race.json``, ``race.md`` and
``race.png``.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peer_accuracy
import tasks
from matplotlib.figure import Figure

import hypergrad as hg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import black_box
import harness
from black_box import ASHA, HYPERBAND, RANDOM, TPE

HIDDEN, BATCH, EVERY, LOOK, BUDGET = 144, 100, 10, 100, 10_000
LOW, HIGH, RATE = float(np.log(1e-6)), 0.0, 3e-3
SIZES = 2, 10, 100, (64 + 10) * HIDDEN
CMA, SEPARABLE, SMAC, DEHB, PEERS = "CMA-ES", "separable CMA-ES", "SMAC", "DEHB", "searches"
GRADIENTS = {"implicit": 10 + 2 * 5 + 1, "SOBA": 10 + 2 * 3 + 1, "unrolled": 10 + 2 * 10 + 1}
"""Methods, and what they spend on 10 steps and an outer step."""
FEW, MANY = (RANDOM, TPE, ASHA, HYPERBAND, SMAC, DEHB, CMA), (RANDOM, TPE, SEPARABLE)
LENGTHS, RATES, CHOICE_SEEDS = (500, 1000, 2000), (0.03, 0.1, 0.3), (100, 101)
TOGETHER = -4.0, -6.0, -8.0, -10.0  # log decays
POINTS, RETRAINED = 25, 5
INNER = optax.adam(RATE, eps_root=1e-8)  # which reverse mode can differentiate
BOX = hg.bijectors.interval(LOW, HIGH)
CHOSEN: dict[str, float] = {
    **dict.fromkeys(GRADIENTS, 0.1),
    "SOBA": 0.03,
    **dict.fromkeys((RANDOM, TPE, SMAC), 1000),
    **dict.fromkeys((ASHA, HYPERBAND, DEHB, CMA, SEPARABLE), 500),
}
"""Gradients of a whole trial, and outer rates, as ``--choose`` found them."""
Weights = dict[str, jax.Array]


class Seen(NamedTuple):
    """A look: what was spent since the last, validation and test loss, and λ."""

    spent: int
    valid: float
    test: float
    hyperparams: jax.Array


class Settings(NamedTuple):
    """What everyone may spend, what was chosen for each, and where the searches' environment is."""

    budget: int = BUDGET
    split: str = "200/800"
    chosen: dict[str, float] = CHOSEN
    environments: Path | None = None


class Data(NamedTuple):
    """Digits for one seed."""

    train: tasks.Split
    valid: tasks.Split
    test: tasks.Split


def load(seed: int, settings: Settings) -> Data:
    """Return the images of one seed."""
    return Data(*tasks.digits(seed, *map(int, settings.split.split("/"))))


def groups(size: int) -> dict[str, np.ndarray]:
    """Return the group of every input of either layer; that of every weight for the largest size."""
    pixels, hidden = np.arange(64), np.arange(HIDDEN)
    inputs = {
        SIZES[0]: (0 * pixels, 0 * hidden + 1),
        SIZES[1]: (pixels // 8, 8 + hidden // (HIDDEN // 2)),
        SIZES[2]: (pixels, 64 + hidden // (HIDDEN // 36)),
    }
    if size in inputs:
        return {name: group[:, None] for name, group in zip(("w0", "w1"), inputs[size], strict=True)}
    return {"w0": np.arange(64 * HIDDEN).reshape(64, HIDDEN), "w1": np.arange(64 * HIDDEN, size).reshape(HIDDEN, 10)}


def fresh(key: jax.Array) -> Weights:
    """Return new weights."""
    first, second = jax.random.split(key)
    return {
        "w0": jax.random.normal(first, (64, HIDDEN)) * np.sqrt(2 / 64),
        "b0": jnp.zeros(HIDDEN),
        "w1": jax.random.normal(second, (HIDDEN, 10)) * np.sqrt(1 / HIDDEN),
        "b1": jnp.zeros(10),
    }


def cross_entropy(weights: Weights, batch: Any) -> jax.Array:
    """Return the mean over a batch."""
    hidden = jax.nn.relu(batch.x @ weights["w0"] + weights["b0"])
    logits = hidden @ weights["w1"] + weights["b1"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()


def losses(weights: Weights, data: Data) -> tuple[jax.Array, jax.Array]:
    """Return validation and test loss."""
    return cross_entropy(weights, data.valid), cross_entropy(weights, data.test)


def make_problem(size: int) -> hg.BilevelProblem:
    """Return the problem over log decays."""
    places = groups(size)

    def inner(weights: Weights, logs: jax.Array, batch: Any, _key: Any) -> jax.Array:
        decays = {name: jnp.exp(logs[place]) for name, place in places.items()}
        decays |= {"b0": jnp.zeros(()), "b1": jnp.zeros(())}
        return cross_entropy(weights, batch) + hg.penalties.l2(weights, decays)

    return hg.BilevelProblem(inner, lambda weights, _logs, batch, _key: cross_entropy(weights, batch))


@functools.cache
def plain(size: int) -> Any:
    """Return ``look(weights, state, logs, data, key)``: training with λ held fixed until the next look."""
    inner = make_problem(size).inner_loss

    @jax.jit
    def look(weights: Weights, state: Any, logs: jax.Array, data: Data, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> Any:
            weights, state = carry
            grads = jax.grad(inner)(weights, logs, tasks.draw(data.train, BATCH, key), None)
            updates, state = INNER.update(grads, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        (weights, state), _ = jax.lax.scan(step, (weights, state), jax.random.split(key, LOOK))
        return weights, state, *losses(weights, data)

    return look


def trial(size: int, logs: jax.Array, data: Data, key: jax.Array, length: int) -> Iterator[Seen]:
    """Train new weights with λ held fixed, from look to look."""
    weights = fresh(key)
    state = INNER.init(weights)
    for count in range(max(1, length // LOOK)):
        weights, state, valid, test = plain(size)(weights, state, logs, data, jax.random.fold_in(key, count))
        yield Seen(LOOK, float(valid), float(test), logs)


@functools.cache
def joint(size: int, name: str) -> tuple[Any, Any]:
    """Return ``init(variables, rate)`` and ``look(variables, state, data, key, rate)``, five outer steps later."""
    problem = hg.reparameterize(make_problem(size), BOX)
    choices: dict[str, tuple[hg.Estimator, dict[str, Any]]] = {
        "implicit": (hg.implicit(problem), {"every": EVERY}),
        "SOBA": (hg.implicit(problem, hg.solvers.richardson(1)), {"every": EVERY}),
        "unrolled": (hg.unrolled(problem), {"window": EVERY}),
    }
    estimator, window = choices[name]

    def transformation(rate: Any) -> Any:
        return hg.bilevel(estimator, inner_optimizer=INNER, outer_optimizer=optax.adam(rate), **window)

    @jax.jit
    def init(variables: hg.BilevelParams, rate: Any) -> Any:
        return transformation(rate).init(variables)

    @jax.jit
    def look(variables: hg.BilevelParams, state: Any, data: Data, key: jax.Array, rate: Any) -> Any:
        tx = transformation(rate)

        def step(carry: Any, key: jax.Array) -> Any:
            variables, state = carry
            inner, outer = jax.random.split(key)
            if "window" in window:
                batch = jax.vmap(lambda key: tasks.draw(data.train, BATCH, key))(jax.random.split(inner, EVERY))
            else:
                batch = tasks.draw(data.train, BATCH, inner)
            batches = {"inner_batch": batch, "outer_batch": tasks.draw(data.valid, BATCH, outer)}
            updates, state = tx.update(None, state, variables, **batches)
            return (optax.apply_updates(variables, updates), state), None

        keys = jax.random.split(key, 5 if "window" in window else 5 * EVERY)
        (variables, state), _ = jax.lax.scan(step, (variables, state), keys)
        return variables, state, *losses(variables.params, data)

    return init, look


def gradient_method(size: int, name: str, seed: int, data: Data, rate: float) -> Generator[Seen, None, None]:
    """Train weights and λ together, without end."""
    init, look = joint(size, name)
    start = np.random.default_rng(seed).uniform(0.05, 0.95) * (HIGH - LOW) + LOW
    key = jax.random.key(seed)
    variables = hg.BilevelParams(fresh(key), hg.unconstrain(BOX, jnp.full(size, start)))
    state = init(variables, rate)
    for count in itertools.count():
        variables, state, valid, test = look(variables, state, data, jax.random.fold_in(key, count), rate)
        hyperparams = hg.constrain(BOX, variables.hyperparams)
        yield Seen(5 * GRADIENTS[name], float(valid), float(test), hyperparams)


def search(size: int, name: str, seed: int, data: Data, length: int, settings: Settings) -> Generator[Seen, None, None]:
    """Train new weights for one point after another, without end."""
    coordinates = SIZES[1] if name == TPE and size > SIZES[1] else size
    wide = groups_of_groups(size) if coordinates < size else np.arange(size)

    trials = settings.budget // length

    def train(point: Any, number: int, share: float = 1.0) -> Iterator[Seen]:
        logs = jnp.asarray(LOW + (HIGH - LOW) * np.asarray(point, np.float32)[wide])
        key = jax.random.fold_in(jax.random.key(seed), number)
        yield from trial(size, logs, data, key, round(share * length))

    if name in (SMAC, DEHB, CMA, SEPARABLE):
        assert settings.environments is not None
        asked = {"method": name, "size": size, "seed": seed, "trials": trials, "shortest": LOOK / length}
        yield from _asked(settings.environments, asked, train)
    elif name == RANDOM:
        rng = np.random.default_rng(seed)
        for number in itertools.count():
            yield from train(rng.uniform(size=size), number)
    else:

        def reported(point: list[float], number: int) -> Iterator[_Report]:
            for count, seen in enumerate(train(point, number), 1):
                yield _Report(seen.valid, count * LOOK, seen)

        study = black_box.study(name, seed, trials=trials, trial_gradients=length, look=LOOK)
        for piece in black_box.search(study, [1.0] * coordinates, reported, LOOK, patience=length):
            yield piece.params


class _Report(NamedTuple):
    """What ``black_box.search`` hears of a look."""

    loss: float
    steps: int
    params: Seen


def groups_of_groups(size: int) -> np.ndarray:
    """Return the one of the 10 groups that each of ``size`` is in."""
    few, many = groups(SIZES[1]), groups(size)
    wide = np.zeros(size, int)
    for name, places in many.items():
        wide[places] = np.broadcast_to(few[name], places.shape)
    return wide


def _asked(environments: Path, settings: dict[str, Any], train: Any) -> Iterator[Seen]:
    script = Path(__file__).resolve().parent / "_peer_search.py"
    command = [str(peer_accuracy.interpreter(environments, PEERS)), str(script), json.dumps(settings)]
    clean = peer_accuracy.environment()
    with subprocess.Popen(command, env=clean, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        try:
            for number in itertools.count():
                point, share = json.loads(peer.stdout.readline())
                best = np.inf
                for seen in train(point, number, share):
                    yield seen
                    best = min(best, seen.valid)
                print(best, file=peer.stdin, flush=True)
        finally:
            peer.stdin.close()
            peer.terminate()


def follow(looks: Iterator[Seen], budget: int) -> list[Seen]:
    """Return the looks at which the validation loss was lowest so far, with what was spent in all."""
    spent = 0
    best: list[Seen] = []
    for seen in looks:
        spent += seen.spent
        if spent > budget:
            break
        if not best or seen.valid < best[-1].valid:
            best.append(seen._replace(spent=spent))
    return best


def compete(size: int, name: str, seed: int, data: Data, settings: Settings) -> list[Seen]:
    """Run one method on one seed; return its best looks."""
    chosen = settings.chosen[name]
    if name in GRADIENTS:
        looks = gradient_method(size, name, seed, data, chosen)
    else:
        looks = search(size, name, seed, data, int(chosen), settings)
    try:
        return follow(looks, settings.budget)
    finally:
        looks.close()


def measured(size: int, name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Return the losses at a number of costs, and those of new weights at some of them."""
    data = load(seed, settings)
    best = compete(size, name, seed, data, settings)
    costs = np.linspace(0, settings.budget, POINTS + 1)[1:]
    at = [next((seen for seen in reversed(best) if seen.spent <= cost), None) for cost in costs]
    again: list[float | None] = [None] * POINTS
    for index in range(POINTS // RETRAINED - 1, POINTS, POINTS // RETRAINED):
        if (seen := at[index]) is not None:
            key = jax.random.fold_in(jax.random.key(1000 + seed), index)
            length = int(settings.chosen[RANDOM])
            again[index] = min(trial(size, seen.hyperparams, data, key, length), key=lambda new: new.valid).test
    row: dict[str, list[float | None]] = {
        "valid": [seen and round(seen.valid, 5) for seen in at],
        "test": [seen and round(seen.test, 5) for seen in at],
        "retrained": [value and round(value, 5) for value in again],
    }
    last = {key: row[key][-1] for key in ("valid", "test", "retrained")}
    print(f"{size}; seed {seed}; {name}: {last}", flush=True)
    return row


def together(seed: int, settings: Settings) -> dict[str, float]:
    """Return test losses of weights trained on training and validation images, by log decay; nothing is searched."""
    data = load(seed, settings)
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), data.train, data.valid)
    found = {}
    for log_decay in TOGETHER:
        looks = trial(
            SIZES[0], jnp.full(SIZES[0], log_decay), data._replace(train=both), jax.random.key(seed), BUDGET // 10
        )
        found[f"{log_decay:g}"] = round(list(looks)[-1].test, 5)
    return found


def choose(sizes: Sequence[int], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the mean lowest validation loss of each method by what it may choose, over sizes and two seeds."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys([*GRADIENTS, *FEW, *MANY]):
        found[name] = {}
        for value in RATES if name in GRADIENTS else LENGTHS:
            tried = settings._replace(chosen={**settings.chosen, name: value})
            runs = [(size, seed) for size in sizes if name in methods(size, settings) for seed in CHOICE_SEEDS]
            ends = [compete(size, name, seed, load(seed, tried), tried)[-1].valid for size, seed in runs]
            found[name][f"{value:g}"] = round(statistics.mean(ends), 4)
        print(f"{name}: {found[name]}", flush=True)
    return found


def methods(size: int, settings: Settings) -> list[str]:
    """Return who runs: those of the environment only where there is one."""
    away = () if settings.environments else (SMAC, DEHB, CMA, SEPARABLE)
    return [name for name in (*GRADIENTS, *(FEW if size <= SIZES[1] else MANY)) if name not in away]


def report(record: dict[str, Any]) -> str:
    """Return a table for each split and number of hyperparameters, and who is the lowest."""
    parts = [
        "# Gradient methods against searches, at equal cost",
        f"`benchmarks/quality/race.py`: decays of groups of weights, {record['budget']:,} gradients for each run, "
        "digits, mean ± standard deviation over seeds. Losses at the weights of the lowest validation loss; retrained: "
        "new weights at the hyperparameters found.",
    ]
    for split, size, seeds in [(split, *item) for split, found in record["splits"].items() for item in found.items()]:
        lines = ["## {} training / {} validation images, {:,} hyperparameters".format(*split.split("/"), int(size)), ""]
        lines += ["| method | validation | test | retrained test |", "|" + " --- |" * 4]
        for name in _names(seeds):
            cells = [
                _cell([found[name][key][-1] for found in seeds.values()]) for key in ("valid", "test", "retrained")
            ]
            title = "TPE, 10 groups" if name == TPE and int(size) > SIZES[1] else name
            lines.append(f"| {title} | {' | '.join(cells)} |")
        parts += ["\n".join(lines), *(_verdict(seeds, key) for key in ("test", "retrained"))]
    for split, seeds in record["together"].items():
        cells = [f"{log}: {_cell([found[log] for found in seeds.values()])}" for log in next(iter(seeds.values()))]
        head = "{} + {} images trained on together, test loss by log decay".format(*split.split("/"))
        parts.append(f"{head}: {', '.join(cells)}.")
    if choice := record.get("choice"):
        lines = ["## Choices", "", "Mean validation loss on seeds 100 and 101.", "", "| method | |", "| --- | --- |"]
        lines += [f"| {name} | {', '.join(f'{k}: {v}' for k, v in found.items())} |" for name, found in choice.items()]
        parts.append("\n".join(lines))
    about = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]
    parts.append(f"{machine['cpu']}, {machine['cores']} cores, jax {machine['jax']}, {about}, {machine['date']}.")
    return "\n\n".join(parts) + "\n"


def _names(seeds: dict[str, Any]) -> list[str]:
    return list(next(iter(seeds.values())))


def _cell(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values):.4f}"


def _verdict(seeds: dict[str, Any], key: str) -> str:
    """Compare the lowest gradient method with the lowest search, seed by seed."""
    ends = {name: np.array([found[name][key][-1] for found in seeds.values()]) for name in _names(seeds)}
    ours, theirs = (
        min((name for name in ends if (name in GRADIENTS) == gradient), key=lambda name: float(ends[name].mean()))
        for gradient in (True, False)
    )
    gap = ends[ours] - ends[theirs]
    error = f" ± {gap.std(ddof=1) / np.sqrt(len(gap)):.4f} (standard error by seeds)" if len(gap) > 1 else ""
    what = {"test": "test loss", "retrained": "test loss of new weights"}[key]
    return (
        f"Lowest {what}: {min(ends, key=lambda name: float(ends[name].mean()))}. {ours} minus {theirs}: "
        f"{gap.mean():+.4f}{error}, lower on {int((gap < 0).sum())} of {len(gap)}."
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the losses over cost with the first split: a column for each number of hyperparameters."""
    sizes, costs = next(iter(record["splits"].values())), np.linspace(0, record["budget"], POINTS + 1)[1:]
    names = list(dict.fromkeys(name for seeds in sizes.values() for name in _names(seeds)))
    figure = Figure(figsize=(3.3 * len(sizes), 8.0), layout="constrained")
    grid = figure.subplots(3, len(sizes), squeeze=False, sharex=True)
    for column, (size, seeds) in enumerate(sizes.items()):
        for axis, key in zip(grid[:, column], ("valid", "test", "retrained"), strict=True):
            lowest = np.inf
            for place, name in enumerate(names):
                if name not in _names(seeds):
                    continue
                rows = np.array([found[name][key] for found in seeds.values()], float)
                seen = np.isfinite(rows).all(axis=0)
                middle, spread = rows[:, seen].mean(axis=0), rows[:, seen].std(axis=0)
                style, width = ("-", 2.0) if name in GRADIENTS else ("--", 1.1)
                axis.plot(costs[seen], middle, style, lw=width, color=f"C{place}" if place < 10 else "k", label=name)
                axis.fill_between(costs[seen], middle - spread, middle + spread, color=f"C{place % 10}", alpha=0.08)
                lowest = min(lowest, middle.min())
            axis.set(ylim=(0.8 * lowest, 2.2 * lowest))
            axis.spines[["top", "right"]].set_visible(False)
        grid[0, column].set_title(f"{int(size):,} hyperparameters", fontsize="medium")
        grid[2, column].set_xlabel("gradients spent")
    for axis, label in zip(grid[:, 0], ("validation loss", "test loss", "test loss, retrained"), strict=True):
        axis.set_ylabel(label)
    known = {label: handle for axis in grid[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=90)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the race, or the choice; write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two hyperparameters, few gradients: does it run?")
    parser.add_argument("--choose", action="store_true", help="try trial lengths and outer rates on other seeds")
    parser.add_argument("--only", default="; ".join(map(str, SIZES)), help="numbers of hyperparameters")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--split", default=Settings().split, help="training and validation images, e.g. 500/400")
    parser.add_argument("--environments", type=Path, help="folder of the environment of SMAC, DEHB and CMA-ES")
    parser.add_argument("--merge", action="store_true", help="keep the other numbers that the file has")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    args = parser.parse_args(argv)
    settings = Settings(split=args.split, environments=args.environments)
    sizes = [int(size) for size in args.only.split("; ")]
    if args.quick:
        short = {name: 0.1 if name in GRADIENTS else 200 for name in CHOSEN}
        settings, sizes, args.seeds = settings._replace(budget=600, chosen=short), [SIZES[0]], 1
    versions = {"optuna": importlib.metadata.version("optuna"), **installed(args.environments)}
    kept = args.out / "race.json"
    before = json.loads(kept.read_text()) if kept.exists() and (args.merge or args.choose) else {}
    record = {
        "splits": {},
        "together": {},
        **before,
        **harness.circumstances(1),
        "versions": versions,
        "budget": settings.budget,
    }
    if args.choose:
        record["choice"] = choose(sizes, settings)
    for size, seed in [] if args.choose else itertools.product(sizes, range(args.seeds)):
        found = {name: measured(size, name, seed, settings) for name in methods(size, settings)}
        sizes_found = record["splits"].setdefault(args.split, {})
        sizes_found[str(size)] = {**(sizes_found[str(size)] if seed else {}), str(seed): found}
        record["splits"] = dict(sorted(record["splits"].items()))
        record["splits"][args.split] = harness.in_order(sizes_found, [str(size) for size in SIZES])
        record["together"].setdefault(args.split, {})[str(seed)] = together(seed, settings)
        harness.write(args.out, "race", record, report(record))
    if record["splits"]:
        draw(record, args.out / "race.png")
    harness.write(args.out, "race", record, report(record))
    return record


def installed(environments: Path | None) -> dict[str, str]:
    """Make the environment where it is missing; return the versions it has.

    Raises:
      RuntimeError: it cannot be made.
    """
    if environments is None:
        return {}
    python = peer_accuracy.interpreter(environments, PEERS)
    if not python.exists() and (reason := peer_accuracy.install(environments, PEERS, ("smac", "dehb", "cmaes"))):
        raise RuntimeError(f"no environment of SMAC, DEHB and CMA-ES: {reason}")
    code = (
        "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('smac', 'dehb', 'cmaes')}))"
    )
    return json.loads(subprocess.run([str(python), "-c", code], capture_output=True, check=True).stdout)


if __name__ == "__main__":
    main()
