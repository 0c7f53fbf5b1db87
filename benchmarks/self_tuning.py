"""A race: self-tuning, which trains once, against black-box searches, at equal total cost in gradients.

    python benchmarks/self_tuning.py [--tiny] [--data fashion_mnist] [--seeds 5] [--choose | --report] [--out DIR]

The problem is that of ``experiments/self_tuning_mlp``: five hyperparameters of an MLP on 2,000 images. All use the same
model, Adam at one rate, batch size and box of hyperparameters. All look at the validation loss after every
``look`` gradients spent, keep the weights of the lowest one, and read the test split once, at those weights.

The unit is one gradient of the plain training loss on one batch. Charged are

    plain training    1 a step
    Delta-STN         3 an inner step: more than ``self_tuning_cost.py`` measures
    STN               2 an inner step: what it measures for the wide network
    either            2 an outer step for a validation batch of the training batch's size, in proportion for others

so that self-tuning takes fewer, dearer steps. Looks are free, and everyone has as many. A rival's budget is cut into
trials. Into how many is chosen for each rival by itself with ``--choose``, by the validation loss on seeds 100 and 101;
self-tuning's settings were chosen on seeds 100 to 102; the race is run on seeds 0 to 4. A trial whose validation loss
has not fallen for a quarter of the budget ends. Self-tuning begins at a quarter of each interval, which is a good
guess: so it is run from a random point of the box too. Beside it, for orientation: one run at that guess, held fixed,
and the best of 16 random runs, each of which may use the whole budget.

Writes ``self_tuning.json``, ``self_tuning.md`` and the picture.
"""

import argparse
import importlib.metadata
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import black_box
import harness
import jax
import numpy as np
import optax
import self_tuning_report as report
from black_box import ASHA, HYPERBAND, RANDOM, TPE, Piece
from self_tuning_report import FULL, START

import hypergrad as hg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments import self_tuning_mlp as example  # noqa: E402
from experiments.common import datasets  # noqa: E402
from experiments.self_tuning_mlp import run  # noqa: E402

FORMS = {"self-tuning, Delta-STN": (hg.responses.delta_stn(), 3), "self-tuning, STN": (hg.responses.stn(), 2)}
"""Form, and gradients that an inner step is charged."""

ANYWHERE = ", from a random point"
"""What the name ends with where self-tuning begins anywhere in the box, as a random trial does."""

TRIALS = {RANDOM: 8, TPE: 8, HYPERBAND: 4, ASHA: 2}
"""That the budget pays for in full: the best of ``COUNTS`` by ``--choose``."""

COUNTS: dict[str, Sequence[int]] = {
    RANDOM: (4, 8, 16, 32),
    TPE: (4, 8, 16, 32),
    HYPERBAND: (1, 2, 4, 8, 16, 32),
    ASHA: (1, 2, 4, 8, 16, 32),
}
CHOICE_SEEDS = 100, 101


class Race(NamedTuple):
    """What everyone gets.

    Attributes:
      data: name of the data set.
      settings: of the example: model, optimizer, batch size, and what self-tuning uses.
      valid: validation images, the first of the split.
      budget: gradients of one method on one seed.
      look: gradients between two looks at the validation loss.
      full: random runs that get the whole budget each.
    """

    data: str = "fashion_mnist"
    settings: example.Settings = example.Settings()
    valid: int = 2000
    budget: int = 6000
    look: int = 100
    full: int = 16


TINY = Race("digits", example.Settings(hidden=8, warmup=10), budget=160, look=20, full=2)


class Tools(NamedTuple):
    """What is compiled once for all seeds.

    Attributes:
      rival: ``rival(name, trials, seed, budget) -> pieces``.
      tuned: ``tuned(name, seed) -> pieces``.
      fixed: ``fixed(seed) -> pieces``: one run of the whole budget at self-tuning's first values.
      judge: ``judge(params, seed) -> (loss, error)`` on the test split.
    """

    rival: Callable[..., Iterator[Piece]]
    tuned: Callable[[str, int], Iterator[Piece]]
    fixed: Callable[[int], Iterator[Piece]]
    judge: Callable[[Any, int], tuple[float, float]]


def make_tools(race: Race) -> Tools:
    """Build model, problem and trainers."""
    settings = race.settings
    model = example.MLP(settings.hidden)
    plain = example.make_problem(model)
    begin_plain, trainer = run.held_fixed(plain, model, optax.adam(settings.rate), settings.batch)
    sizes = settings.batch, settings.outer_batch
    tuning = {}
    for name, (form, price) in FORMS.items():
        problem, tx = example.self_tune(plain, settings, form)
        tuning[name] = problem, price, *run.tuning_itself(problem, model, tx, sizes)

    def load(seed: int) -> datasets.Splits:
        splits = datasets.load(race.data, seed)
        return splits._replace(valid=jax.tree.map(lambda leaf: leaf[: race.valid], splits.valid))

    @jax.jit
    def init(key: jax.Array, x: jax.Array) -> Any:
        return model.init(key, x[:1], train=False)["params"]

    def rival(name: str, trials: int, seed: int, budget: int) -> Iterator[Piece]:
        splits = load(seed)
        length = max(1, budget // trials // race.look) * race.look

        def train(values: Any, number: int) -> Iterator[run.Look]:
            key = jax.random.fold_in(jax.random.key(seed), number)
            at = begin_plain(init(key, splits.train.x), values)
            return trainer.looks(at, splits, key, range(race.look, length + 1, race.look))

        study = black_box.study(name, seed, trials=trials, trial_gradients=length, look=race.look)
        return black_box.search(study, example.HIGH, train, race.look, race.budget // 4)

    def tuned(name: str, seed: int) -> Iterator[Piece]:
        problem, price, begin, trainer = tuning[name.removesuffix(ANYWHERE)]
        splits, key = load(seed), jax.random.key(seed)
        values = jax.tree.map(lambda high: settings.begin * high, example.HIGH)
        if name.endswith(ANYWHERE):
            leaves, structure = jax.tree.flatten(example.HIGH)
            drawn = np.random.default_rng(seed).uniform(size=len(leaves))
            values = jax.tree.unflatten(structure, (drawn * leaves).tolist())
        hyperparams = hg.unconstrain(example.BOUNDS, values)
        batch = datasets.draw(splits.train, settings.batch, key)
        start = hg.responses.init(problem, key, init(key, splits.train.x), hyperparams, batch)
        stops = _stops(settings, price, race)
        before = 0
        at = begin(hg.BilevelParams(start, hyperparams), key)
        for seen in trainer.looks(at, splits, key, stops):
            spent = settings.gradients(seen.steps, price)
            yield Piece(spent - before, seen.loss, seen.params, seen.values, 0)
            before = spent

    def fixed(seed: int) -> Iterator[Piece]:
        splits, key = load(seed), jax.random.key(seed)
        values = jax.tree.map(lambda high: settings.begin * high, example.HIGH)
        at = begin_plain(init(key, splits.train.x), values)
        for seen in trainer.looks(at, splits, key, range(race.look, race.budget + 1, race.look)):
            yield Piece(race.look, seen.loss, seen.params, values, 0)

    def judge(params: Any, seed: int) -> tuple[float, float]:
        loss, error = trainer.judge(params, load(seed).test)
        return float(loss), float(error)

    return Tools(rival, tuned, fixed, judge)


def follow(pieces: Iterator[Piece], budget: int) -> tuple[Piece, dict[str, Any]]:
    """Train until the budget is spent; return the piece of the lowest validation loss, and a record."""
    spent, curve = 0, []
    best: Piece | None = None
    for piece in pieces:
        spent += piece.gradients
        if best is None or piece.loss < best.loss:
            best = piece
        curve.append(round(best.loss, 4))
        if spent >= budget:
            break
    assert best is not None
    record = {"gradients": spent, "trials": piece.trial + 1, "valid_loss": best.loss, "curve": curve}
    return best, {**record, "values": [round(float(x), 4) for x in jax.tree.leaves(best.values)]}


def choose(
    race: Race, tools: Tools, counts: dict[str, Sequence[int]], seeds: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Return each rival's mean best validation loss by number of trials."""
    found: dict[str, dict[str, float]] = {}
    for name, numbers in counts.items():
        found[name] = {}
        for count in numbers:
            losses = [follow(tools.rival(name, count, seed, race.budget), race.budget)[0].loss for seed in seeds]
            found[name][str(count)] = round(statistics.mean(losses), 4)
        print(f"{name}: {found[name]}", flush=True)
    return found


def compete(race: Race, tools: Tools, name: str, seed: int) -> dict[str, Any]:
    """Run one method on one seed."""
    budget = race.budget
    if name.removesuffix(ANYWHERE) in FORMS:
        pieces = tools.tuned(name, seed)
    elif name == START:
        pieces = tools.fixed(seed)
    elif name == FULL:
        budget *= race.full
        runs = tools.rival(RANDOM, race.full, seed, budget)
        pieces = itertools.takewhile(lambda piece: piece.trial < race.full, runs)
    else:
        pieces = tools.rival(name, TRIALS[name], seed, budget)
    best, record = follow(pieces, budget)
    loss, error = tools.judge(best.params, seed)
    print(f"seed {seed}, {name}: valid {best.loss:.4f}, test {loss:.4f}, {record['trials']} trials", flush=True)
    if name == FULL:
        del record["curve"]  # a thousand points, of runs that did not compete
    return {**record, "test_loss": loss, "test_error": error}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the race, or the choice of the rivals' trials; write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="digits, a hundred gradients: does it run?")
    parser.add_argument("--data", choices=["digits", "fashion_mnist"], default="fashion_mnist")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--choose", action="store_true", help="try numbers of trials on other seeds, then stop")
    parser.add_argument("--report", action="store_true", help="only write table and picture of the results there are")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "self_tuning.png")
    args = parser.parse_args(argv)
    race = TINY if args.tiny else Race(args.data)
    jax.config.update("jax_disable_most_optimizations", args.tiny)  # most of a tiny run is compilation
    path = args.out / "self_tuning.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if args.report:
        _write(args, before)
        return before
    tools = make_tools(race)
    if args.choose:
        tiny: tuple[dict[str, Sequence[int]], Sequence[int]] = (dict.fromkeys(TRIALS, (2, 4)), CHOICE_SEEDS[:1])
        counts, seeds = tiny if args.tiny else (COUNTS, CHOICE_SEEDS)
        record = {**before, "choice": {"seeds": seeds, "valid_loss": choose(race, tools, counts, seeds)}}
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n")
        return record
    record = {
        **harness.circumstances(rounds=1),
        "optuna": importlib.metadata.version("optuna"),
        "tiny": args.tiny,
        "race": {**race._asdict(), "settings": race.settings._asdict()},
        "box": example.HIGH,
        "trials": TRIALS,
        "choice": before.get("choice", {}),
        "seeds": {str(seed): {} for seed in range(args.seeds)},
    }
    for names in ((*FORMS, *(name + ANYWHERE for name in FORMS), *TRIALS, START), (FULL,)):
        for seed, found in record["seeds"].items():
            found |= {name: compete(race, tools, name, int(seed)) for name in names}
        _write(args, record)
    print(report.table(record))
    return record


def _write(args: argparse.Namespace, record: dict[str, Any]) -> None:
    harness.write(args.out, "self_tuning", record, report.table(record))
    report.draw(record, args.picture)


def _stops(settings: example.Settings, price: int, race: Race) -> list[int]:
    """Return the numbers of steps that are reached with ``look``, 2·``look``, … gradients."""
    stops, steps = [], 0
    for paid in range(race.look, race.budget + 1, race.look):
        while settings.gradients(steps + 1, price) <= paid:
            steps += 1
        stops.append(steps)
    return stops


if __name__ == "__main__":
    main()
