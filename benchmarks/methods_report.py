"""Turn the results of ``methods.py`` into Markdown: a file of their own, and the table of README.

``python benchmarks/methods_report.py`` prints README's table, from results/methods.json and self_tuning_cost.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report

RESULTS = Path(__file__).parent / "results"
HEAD = ("method", "tunes", "how many", "cost", "memory", "direction, length", "beware")


class Row(NamedTuple):
    """A line of README's table: what is measured of it, and what is said."""

    title: str
    measured: str  # its candidate in the results
    tunes: str
    how_many: str
    beware: str


_LOSS, _ALL, _MILLIONS = "what enters the training loss", "also rates, schedules, momenta", "millions"
ROWS = (
    Row("`implicit`, the default", "implicit, default", _LOSS, _MILLIONS, "damped: for weights in training"),
    Row("`implicit`, `identity()`", "implicit, identity", _LOSS, _MILLIONS, "a baseline: length says nothing"),
    Row("`implicit`, `neumann(5)`", "implicit, neumann 5", _LOSS, _MILLIONS, "short: use Adam outside"),
    Row("`implicit`, `neumann(20)`", "implicit, neumann 20", _LOSS, _MILLIONS, "weights near the optimum"),
    Row("`implicit`, `cg(10)`", "implicit, cg 10", _LOSS, _MILLIONS, "stops where H is indefinite: `damping`"),
    Row("`unrolled`, K = 10", "unrolled 10, reverse", _ALL, _MILLIONS, "short windows shrink learning rates"),
    Row("`unrolled`, K = 50", "unrolled 50, reverse", _ALL, _MILLIONS, "`eps_root` for Adam; chaos when long"),
    Row("`unrolled`, K = 10, `forward()`", "unrolled 10, forward", _ALL, "one to some; cost for each", "the same"),
)


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
    """Return README's table: which method when."""
    small, large = (found["networks"][name]["candidates"] for name in ("mlp256", "mlp1024"))
    rows = [_line(row, small, large, found["goodness"]["methods"]) for row in ROWS]
    steps = [self_tuning["networks"][name]["candidates"] for name in ("mlp256", "mlp1024")]
    times = " / ".join(f"{one['Delta-STN step']['in_plain_steps']:.1f}" for one in steps)
    each = " / ".join(f"{one['Delta-STN hypergradient']['in_plain_steps']:.1f}" for one in steps)
    rows.append(
        (
            "`direct`, self-tuning",
            "what enters the training loss, differentiably or not",
            "up to some dozens",
            f"{each} steps; every training step costs {times}",
            "two",
            "as far as it has learned",
            "train the response before λ moves",
        )
    )
    return report.table(HEAD, rows)


def _line(row: Row, small: dict[str, Any], large: dict[str, Any], goodness: dict[str, Any]) -> Sequence[str]:
    """Return one line."""
    cost, memory = (
        " / ".join(f"{one[row.measured][what]:.{digits}f}" for one in (small, large))
        for what, digits in (("in_gradients", 0), ("scratch_copies", 0))
    )
    good = goodness.get(row.measured)
    said = f"{good['cosine']:.2f}, {good['norm_ratio']:.2f}" if good else "as in reverse"
    return (row.title, row.tunes, row.how_many, cost, memory, said, row.beware)


def main() -> None:
    """Print README's table."""
    print(
        readme_table(*(json.loads((RESULTS / f"{name}.json").read_text()) for name in ("methods", "self_tuning_cost")))
    )


if __name__ == "__main__":
    main()
