"""Tell what ``weight_decay.py`` measured: a table, what follows from it, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.weight_decay.comparison import EQUAL_GRID, FULL_GRID, RIVAL_ON_BOTH, Outcome
from experiments.weight_decay.fixed_decay import Settings

Results: TypeAlias = dict[str, dict[str, Any]]
"""By row: ``hyperparams``, ``gradients``; one number a seed: ``valid_loss``, ``test_loss``, ``test_error``."""

_LEARNED = tuple(f"per {what}, {how}" for what in ("layer", "weight") for how in ("jointly trained", "retrained"))
_LINES = {
    "no decay": ("0.5", "-"),
    EQUAL_GRID: ("tab:blue", ":"),
    FULL_GRID: ("tab:blue", "-"),
    "per layer, jointly trained": ("tab:green", "-"),
    "per weight, jointly trained": ("tab:red", "-"),
    "per weight, retrained": ("tab:red", ":"),
}


def collect(outcomes: Sequence[dict[str, Outcome]]) -> Results:
    """Return the rows of the table from every seed's outcomes."""
    rows = {}
    for name in outcomes[0]:
        seeds = [outcome[name] for outcome in outcomes]
        rows[name] = {
            "hyperparams": seeds[0].hyperparams,
            "gradients": round(seeds[0].gradients),
            "valid_loss": [one.run.curve[-1][1] for one in seeds],
            "test_loss": [one.test_loss for one in seeds],
            "test_error": [one.test_error for one in seeds],
        }
    return rows


def table(results: Results) -> str:
    """Return the rows as text; mean ± standard deviation over the seeds."""
    lines = [("", "hyperparams", "budget, gradients", "valid loss", "test loss", "test error, %")]
    for name, row in results.items():
        valid = "(trained on)" if name == RIVAL_ON_BOTH else _mean_spread(row["valid_loss"], 3)
        error = _mean_spread([100 * e for e in row["test_error"]], 1)
        counts = (f"{row['hyperparams']:,}", f"{row['gradients']:,}")
        lines.append((name, *counts, valid, _mean_spread(row["test_loss"], 3), error))
    return f"{_align(lines)}\nmean ± standard deviation over seeds; a Hessian or mixed product counts as 2 gradients"


def summary(results: Results) -> str:
    """Say from the numbers alone how learned decays stand to every rival, and what retraining costs them."""
    rivals = [name for name in results if name not in _LEARNED]
    lines, verdicts = [("", *rivals)], []
    for name in _LEARNED:
        ours, cells, beaten = np.asarray(results[name]["test_loss"]), [], []
        for rival in rivals:
            theirs = np.asarray(results[rival]["test_loss"])
            cells.append(f"{ours.mean() / theirs.mean():.2f} ({(ours < theirs).sum()}/{len(ours)})")
            beaten += [rival] * bool(ours.mean() < theirs.mean())
        lines.append((name, *cells))
        verdicts.append(f"{name}: lower mean test loss than {', '.join(beaten) or 'no rival'}")
    joint, again = results["per weight, jointly trained"], results["per weight, retrained"]
    gap = np.mean(joint["test_loss"]) / np.mean(joint["valid_loss"])
    ratio = np.mean(again["test_loss"]) / np.mean(joint["test_loss"])
    verdicts.append(
        f"one decay per weight: jointly trained, the test loss is {gap:.1f} times the fitted validation loss;\n"
        f"  retraining from scratch with its decays multiplies the test loss by {ratio:.2f}"
    )
    head = "Mean test loss as a ratio to a rival's (seeds on which it is lower):"
    return "\n".join([head, _align(lines), "", *verdicts])


def draw(outcomes: Sequence[dict[str, Outcome]], settings: Settings, title: str, path: Path) -> None:
    """Save the picture: validation loss against gradients spent, and the learned decays by layer."""
    figure = Figure(figsize=(10.5, 5.0), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_curves(left, outcomes)
    _draw_decays(right, outcomes[0], settings)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize="small", frameon=False)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize="small", frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=95, pil_kwargs={"optimize": True})


def _draw_curves(axes: Axes, outcomes: Sequence[dict[str, Outcome]]) -> None:
    for name, (colour, style) in _LINES.items():
        if name not in outcomes[0]:
            continue
        curves = np.asarray([outcome[name].run.curve for outcome in outcomes])
        spent, losses = curves[0, :, 0], curves[:, :, 1]
        axes.plot(spent, losses.mean(0), style, color=colour, label=name)
        axes.fill_between(spent, losses.min(0), losses.max(0), color=colour, alpha=0.12, linewidth=0)
        axes.plot(
            spent[-1], np.mean([outcome[name].test_loss for outcome in outcomes]), "x", color=colour, clip_on=False
        )
    rival = float(np.mean([outcome[RIVAL_ON_BOTH].test_loss for outcome in outcomes]))
    axes.axhline(rival, color="black", linestyle="--", linewidth=1, label="train + validation: test loss")
    axes.plot([], [], "x", color="black", label="test loss at the end")
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="cost of the run, gradients of the training loss", ylabel="cross-entropy, nats")
    axes.set_title("validation loss: mean and range over seeds", fontsize="medium")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="both", alpha=0.2)


def _draw_decays(axes: Axes, outcome: dict[str, Outcome], settings: Settings) -> None:
    each, one = outcome["per weight, jointly trained"].run.decay, outcome["per layer, jointly trained"].run.decay
    bins = np.geomspace(settings.low, settings.high, 61)
    names = []
    for place, layer in enumerate(each):
        decays = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each[layer])])
        share, base = np.histogram(decays, bins)[0] / len(decays), -place
        names.append(f"layer {place + 1}\n{len(decays):,}\nweights")
        axes.stairs(base + 0.8 * share / share.max(), bins, baseline=base, fill=True, color="tab:red", alpha=0.5)
        axes.plot([float(one[layer])] * 2, [base, base + 0.8], color="tab:green", linewidth=2)
    best = outcome.get(FULL_GRID, outcome[EQUAL_GRID]).run.decay
    axes.axvline(best, color="tab:blue", linestyle="--", linewidth=1)
    axes.axvline(float(np.sqrt(settings.low * settings.high)), color="0.5", linestyle=":", linewidth=1)
    axes.set_yticks(0.4 - np.arange(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set(xscale="log", xlim=(settings.low, settings.high), xlabel="weight decay c, in ½ c w²")
    axes.set_title("learned decays by layer (first seed)", fontsize="medium")
    keys = {"one per weight": ("tab:red", "-"), "one per layer": ("tab:green", "-")}
    for key, (colour, style) in (keys | {"best of the grid": ("tab:blue", "--"), "start": ("0.5", ":")}).items():
        axes.plot([], [], style, color=colour, label=f"decay: {key}")


def _align(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _mean_spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"
