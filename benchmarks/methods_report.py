"""Turn results into Markdown: ``methods.md``, and the tables of costs in README and the docs.

``python benchmarks/methods_report.py`` writes the tables into the pages, from ``methods.json``, ``step_cost.json``,
``self_tuning_cost.json``, ``minimize.json``, ``scikit_learn.json`` and ``race.json`` in the results.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report

RESULTS = Path(__file__).parent / "results"
README_HEAD = ("method", "hyperparameters", "time", "memory", "what to know")
DOCS_HEAD = ("method", "time", "memory", "cosine", "length")
STEP_HEAD = (
    "network, weights",
    "Neumann 10, in gradients",
    "CG 10, in gradients",
    "joint step every 10, Neumann 10, in plain steps",
    "the same, default solver",
    "call with nothing due, in plain steps",
    "scratch, MiB",
)
NETWORK_NAMES = {"mlp64": "MLP", "mlp256": "MLP", "mlp1024": "MLP", "cnn": "CNN"}


class Row(NamedTuple):
    """A line of README's table: what is measured of it, and what is said."""

    title: str
    measured: str  # its candidate in the results
    hyperparams: str
    note: str


_STEPS = "millions, also of the optimizer"
README = (
    Row("`implicit`", "implicit, default", "millions, in the training loss", "assumes weights near their optimum"),
    Row("`unrolled`, 10 steps", "unrolled 10, reverse", _STEPS, "short windows learn rates that are too small"),
    Row("`unrolled`, 50 steps", "unrolled 50, reverse", _STEPS, "long windows can be chaotic"),
    Row("`unrolled`, 10 steps, `forward()`", "unrolled 10, forward", "a few", "time for one; grows with their number"),
)
DOCS = {
    "`implicit`, the default": "implicit, default",
    "`implicit`, `identity()`": "implicit, identity",
    "`implicit`, `neumann(5)`": "implicit, neumann 5",
    "`implicit`, `neumann(20)`": "implicit, neumann 20",
    "`implicit`, `cg(10)`": "implicit, cg 10",
    "`unrolled`, 10 steps": "unrolled 10, reverse",
    "`unrolled`, 50 steps": "unrolled 50, reverse",
}


def methods(record: dict[str, Any]) -> str:
    """Return all figures of ``methods.py``, as Markdown."""
    goodness = record["goodness"]
    parts = ["# Every method on one problem", report.how(record), report.circumstances(record)]
    for name, found in record["networks"].items():
        rows = [
            (
                which,
                f"{v['cpu_ms']:.2f}",
                f"{v['wall_ms']:.2f}",
                f"{v['in_gradients']:.2f}",
                f"{v['scratch_copies']:.2f}",
            )
            for which, v in found["candidates"].items()
        ]
        head = ("", "CPU ms", "wall ms", "in gradients", "scratch, in copies of the weights")
        parts += [f"## {name}: {found['weights']:,} weights", report.table(head, rows)]
    good = [(n, f"{v['cosine']:.3f}", f"{v['norm_ratio']:.3f}") for n, v in goodness["methods"].items()]
    parts += [
        f"## Beside the exact hypergradient: softmax regression on digits, solved, condition number "
        f"{goodness['condition']:g}, decay {goodness['decay']:g}, step {goodness['step']:g}",
        report.table(("", "cosine", "norm ratio"), good),
    ]
    return "\n\n".join(parts) + "\n"


def readme_table(found: dict[str, Any], self_tuning: dict[str, Any]) -> str:
    """Return README's table: what one hypergradient costs."""
    rows: list[Sequence[str]] = [(row.title, row.hyperparams, *_cost(found, row.measured), row.note) for row in README]
    steps = [self_tuning["networks"][name]["candidates"] for name in ("mlp256", "mlp1024")]
    times = " / ".join(f"{one['Delta-STN step']['in_plain_steps']:.1f}" for one in steps)
    each = " / ".join(f"{one['Delta-STN hypergradient']['in_plain_steps']:.1f}" for one in steps)
    rows.append(
        (
            "`direct`, self-tuning",
            "dozens, also dropout rates",
            f"{each} steps",
            "a second copy of the weights",
            f"every training step takes {times} plain ones",
        )
    )
    return report.table(README_HEAD, rows)


def docs_table(found: dict[str, Any]) -> str:
    """Return the table of the docs: what each solver and window costs, and how near it comes."""
    good = found["goodness"]["methods"]
    rows = [
        (title, *_cost(found, name), f"{good[name]['cosine']:.2f}", f"{good[name]['norm_ratio']:.2f}")
        for title, name in DOCS.items()
    ]
    return report.table(DOCS_HEAD, rows)


def step_cost_table(found: dict[str, Any]) -> str:
    """Return the table of the docs: what joint steps cost; in brackets the same loop by hand."""

    def beside(calls: dict[str, Any], which: str) -> str:
        own, hand = (calls[f"{which} {by}"]["in_units"] for by in ("library", "hand"))
        return f"{own:.2f} ({hand:.2f})"

    rows: list[Sequence[str]] = []
    for name, network in found["networks"].items():
        title = NETWORK_NAMES.get(name, name)
        grads, calls = network["hypergradient"]["candidates"], network["steps"]["candidates"]
        cells = [beside(grads, "neumann 10"), beside(grads, "cg 10"), beside(calls, "joint step")]
        cells += [beside(calls, "joint step default"), beside(calls, "idle step")]
        scratch = grads["neumann 10 library"]["scratch_mib"]
        rows.append((f"{title}, {network['weights']:,}", *cells, f"{scratch:.0f}"))
    return report.table(STEP_HEAD, rows)


def minimize_table(found: dict[str, Any]) -> str:
    """Return a row per method: gap in percent and cost to 1 %, medians over seeds, a column per problem."""
    problems = found["problems"]
    sizes = {name: next(iter(seeds.values()))["hyperparameters"] for name, seeds in problems.items()}
    head = ("method", *(f"{name} ({size:,})" for name, size in sizes.items()))
    methods = dict.fromkeys(m for seeds in problems.values() for m in next(iter(seeds.values()))["rows"])

    def cell(seeds: dict[str, Any], method: str) -> str:
        rows = [seed["rows"][method] for seed in seeds.values() if method in seed["rows"]]
        gaps = [100 * row["gap"] for row in rows if row["gap"] is not None]
        if not gaps:
            return ""
        costs = [row.get("cost to 1 %") for row in rows]
        known = [cost for cost in costs if cost is not None]
        cost = f" ({statistics.median(known):,.0f})" if 2 * len(known) > len(costs) else ""
        gap = statistics.median(gaps)
        shown = "< 0.001" if gap < 1e-3 else f"{gap:.2g}" if gap < 10 else f"{gap:,.0f}"
        return shown + cost

    return report.table(head, [(m, *(cell(seeds, m) for seeds in problems.values())) for m in methods])


def scikit_learn_table(found: dict[str, Any]) -> str:
    """Return a row per problem and method: cross-validated loss, test loss, median seconds."""
    rows = []
    for problem, seeds in found["problems"].items():
        for method in next(iter(seeds.values())):
            each = [seed[method] for seed in seeds.values()]
            cv, test = (statistics.mean(row[key] for row in each) for key in ("cv", "test"))
            seconds = statistics.median(row["seconds"] for row in each)
            rows.append((problem, method, f"{cv:.4f}", f"{test:.4f}", f"{seconds:.2f}"))
    return report.table(("problem", "method", "cross-validated loss", "test loss", "seconds"), rows)


def race_table(found: dict[str, Any]) -> str:
    """Return a row per method: mean test loss, and that of new weights, by number of hyperparameters."""
    sizes = next(iter(found["splits"].values()))
    names = dict.fromkeys(name for seeds in sizes.values() for name in next(iter(seeds.values())))

    def cell(seeds: dict[str, Any], name: str) -> str:
        rows = [seed[name] for seed in seeds.values() if name in seed]
        means = [statistics.mean(row[key][-1] for row in rows) for key in ("test", "retrained") if rows]
        return " / ".join(f"{mean:.3f}" for mean in means)

    rows = [(name, *(cell(seeds, name) for seeds in sizes.values())) for name in names]
    return report.table(("method", *(f"{int(size):,}" for size in sizes)), rows)


def _cost(found: dict[str, Any], name: str) -> tuple[str, str]:
    """Return time in gradients and memory in copies of the weights, each on the small and the large network."""
    both = [found["networks"][network]["candidates"][name] for network in ("mlp256", "mlp1024")]
    time, memory = (" / ".join(f"{one[what]:.0f}" for one in both) for what in ("in_gradients", "scratch_copies"))
    return time, memory


def pages() -> dict[str, dict[str, str]]:
    """Return the tables by page and by the name of their place there."""
    names = "methods", "self_tuning_cost", "step_cost", "minimize", "scikit_learn", "race"
    found, self_tuning, cost, minimized, searches, race = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in names
    )
    return {
        "README.md": {"methods": readme_table(found, self_tuning)},
        "docs/how_to_choose.md": {"methods": docs_table(found)},
        "docs/results.md": {
            "step cost": step_cost_table(cost),
            "minimize": minimize_table(minimized),
            "scikit-learn": scikit_learn_table(searches),
            "race": race_table(race),
        },
    }


def placed(text: str, name: str, table: str) -> str:
    """Return a page with a table in its place."""
    before, start, rest = text.partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- end {name} -->")
    if not (start and end):
        raise ValueError(f"no place for {name!r} in the page")
    return f"{before}{start}\n\n{table}\n\n{end}{after}"


def main() -> None:
    """Write the tables into the pages."""
    for page, tables in pages().items():
        path = Path(__file__).resolve().parents[1] / page
        text = path.read_text()
        for name, table in tables.items():
            text = placed(text, name, table)
        path.write_text(text)


if __name__ == "__main__":
    main()
