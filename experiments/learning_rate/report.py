"""Tell what ``learning_rate.py`` measured: a table, what follows from it, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.learning_rate.fixed_schedule import PRICE

Results: TypeAlias = dict[str, dict[str, Any]]
"""By row: ``gradients`` of the search; one number a seed: ``valid_loss``, ``test_loss``, ``test_error``."""

CONSTANT, COSINE = "constant, grid of 10", "cosine, grid of 10"
WIDE, LEARNED = "wide grid, equal budget", "learned, one per step"
LEARNED_EACH = "learned, one per step and array"
_COLOURS = {
    CONSTANT: "tab:blue",
    COSINE: "tab:green",
    WIDE: "tab:orange",
    LEARNED: "tab:red",
    LEARNED_EACH: "tab:purple",
}


class Outcome(NamedTuple):
    """One method on one seed; losses are means over runs held out.

    Attributes:
      rates: float32 (K,), or a tree of them over the arrays of the weights.
      gradients: of the training loss, that the search for them cost.
      curve: (step, validation loss) on the way, the last at the end.
      test_loss: cross-entropy in nats, at the end.
      test_error: share of wrong labels, at the end.
    """

    rates: Any
    gradients: int
    curve: list[tuple[float, float]]
    test_loss: float
    test_error: float


def collect(outcomes: Sequence[dict[str, Outcome]]) -> Results:
    """Return the rows of the table from every seed's outcomes."""
    rows = {}
    for name in outcomes[0]:
        seeds = [outcome[name] for outcome in outcomes]
        rows[name] = {
            "gradients": seeds[0].gradients,
            "valid_loss": [one.curve[-1][1] for one in seeds],
            "test_loss": [one.test_loss for one in seeds],
            "test_error": [one.test_error for one in seeds],
        }
    return rows


def table(results: Results) -> str:
    """Return the rows as text; mean ± standard deviation over the seeds."""
    heads = ("search, gradients", "valid loss", "test loss", "test error, %")
    lines = [f"{'':30}" + "".join(f"  {head:>17}" for head in heads)]
    lines.append("-" * len(lines[0]))
    for name, row in results.items():
        losses = (_mean_spread(row[part], 3) for part in ("valid_loss", "test_loss"))
        cells = (f"{row['gradients']:,}", *losses, _mean_spread([100 * e for e in row["test_error"]], 1))
        lines.append(f"{name:30}" + "".join(f"  {cell:>17}" for cell in cells))
    lines.append("mean ± standard deviation over seeds, of means over runs held out;")
    lines.append(f"a hypergradient counts as {PRICE} training runs, the validation loss after a run is not counted")
    return "\n".join(lines)


def summary(results: Results) -> str:
    """Say from the numbers alone how learned rates stand to every rival."""
    lines = ["Mean ratio of losses over seeds (seeds on which the learned rates' is lower):"]
    for learned in (LEARNED, LEARNED_EACH):
        for rival in (name for name in results if name not in (learned, LEARNED_EACH)):
            parts = []
            for what, loss in (("validation", "valid_loss"), ("test", "test_loss")):
                ours, theirs = (np.asarray(results[row][loss]) for row in (learned, rival))
                parts.append(f"{what} {np.mean(ours / theirs):.2f} ({(ours < theirs).sum()}/{len(ours)})")
            lines.append(f"  {learned:30} to {rival:24} {', '.join(parts)}")
    return "\n".join(lines)


def draw(outcomes: Sequence[dict[str, Outcome]], title: str, path: Path) -> None:
    """Save the picture: the rates by step, and the validation loss on the way."""
    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _draw_rates(left, outcomes)
    _draw_curves(right, outcomes)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75, pil_kwargs={"optimize": True})


def _draw_rates(axes: Axes, outcomes: Sequence[dict[str, Outcome]]) -> None:
    for name in (CONSTANT, COSINE, WIDE, LEARNED):
        each = np.asarray([outcome[name].rates for outcome in outcomes])
        if name == LEARNED:
            axes.plot(each.T, color=_COLOURS[name], linewidth=0.8, alpha=0.3)
        axes.plot(np.exp(np.log(np.maximum(each, 1e-12)).mean(0)), color=_COLOURS[name], linewidth=2)
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    axes.set_title("rates, one per step: geometric mean over seeds (thin: each)", fontsize="medium")
    axes.grid(alpha=0.2)


def _draw_curves(axes: Axes, outcomes: Sequence[dict[str, Outcome]]) -> None:
    for name, colour in _COLOURS.items():
        curves = np.asarray([outcome[name].curve for outcome in outcomes])
        steps, losses = curves[0, :, 0], curves[:, :, 1]
        axes.plot(steps, losses.mean(0), color=colour, linewidth=2, label=name)
        axes.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.set(yscale="log", xlabel="step", ylabel="cross-entropy, nats")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title("validation loss on runs held out: mean and range over seeds", fontsize="medium")
    axes.grid(which="both", alpha=0.2)


def _mean_spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"
