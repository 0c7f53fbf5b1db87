"""Turn the results of ``methods.py`` into Markdown: a file of their own, the table of README and that of the docs.

``python benchmarks/methods_report.py`` prints both tables, from results/methods.json and self_tuning_cost.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report

RESULTS = Path(__file__).parent / "results"
README_HEAD = ("method", "hyperparameters", "time", "memory", "what to know")
DOCS_HEAD = ("method", "time", "memory", "cosine", "length")


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


def _cost(found: dict[str, Any], name: str) -> tuple[str, str]:
    """Return time in gradients and memory in copies of the weights, each on the small and the large network."""
    both = [found["networks"][network]["candidates"][name] for network in ("mlp256", "mlp1024")]
    time, memory = (" / ".join(f"{one[what]:.0f}" for one in both) for what in ("in_gradients", "scratch_copies"))
    return time, memory


def main() -> None:
    """Print both tables."""
    found, self_tuning = (json.loads((RESULTS / f"{n}.json").read_text()) for n in ("methods", "self_tuning_cost"))
    print(readme_table(found, self_tuning), docs_table(found), sep="\n\n")


if __name__ == "__main__":
    main()
