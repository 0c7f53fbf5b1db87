"""Tell what ``weight_decay.py`` measured: a table, what follows from it, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from comparison import EQUAL_GRID, FULL_GRID, RIVAL_ON_BOTH, Outcome
from fixed_decay import Settings
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Results: TypeAlias = dict[str, dict[str, Any]]
"""By row: ``hyperparams``, ``gradients``; one number a seed: ``valid_loss``, ``test_loss``, ``test_error``."""

_LEARNED = ("per layer, carried", "per layer, retrained", "per weight, carried", "per weight, retrained")
_LINES = {
    "no decay": ("0.5", "-"),
    EQUAL_GRID: ("tab:blue", ":"),
    FULL_GRID: ("tab:blue", "-"),
    "per layer, carried": ("tab:green", "-"),
    "per weight, carried": ("tab:red", "-"),
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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def summary(results: Results) -> str:
    """Say from the numbers alone how the test loss of learned decays stands to that of each rival."""
    lines = ["mean test loss of learned decays as a ratio to each rival's (seeds on which it is lower):"]
    for name in _LEARNED:
        ours, parts = np.asarray(results[name]["test_loss"]), []
        for rival in (r for r in results if r not in _LEARNED):
            theirs = np.asarray(results[rival]["test_loss"])
            parts.append(f"{ours.mean() / theirs.mean():.2f} × {rival} ({(ours < theirs).sum()}/{len(ours)})")
        lines.append(f"  {name}: " + "; ".join(parts))
    carried, again = results["per weight, carried"], results["per weight, retrained"]
    gap = np.mean(carried["test_loss"]) / np.mean(carried["valid_loss"])
    lines.append(
        f"per weight, carried: test loss is {gap:.1f} × validation loss, which {carried['hyperparams']:,} decays fit;"
    )
    lines.append(f"  retraining from scratch multiplies its test loss by {_ratio(again, carried):.2f}.")
    return "\n".join(lines)


def draw(outcomes: Sequence[dict[str, Outcome]], settings: Settings, title: str, path: Path) -> None:
    """Save the picture: validation loss against gradients spent, and the learned decays by layer."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    figure.suptitle(title)
    _draw_curves(left, outcomes)
    _draw_decays(right, outcomes[0], settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


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
    axes.axhline(rival, color="black", linestyle="--", linewidth=1, label="test loss of train + validation")
    axes.plot([], [], "x", color="black", label="test loss at the end")
    axes.set(yscale="log", xlabel="cost of the run, gradients of the training loss", ylabel="cross-entropy, nats")
    axes.set_title("validation loss: mean and range over seeds", fontsize="medium")
    axes.legend(fontsize="small", frameon=False)
    axes.grid(which="both", alpha=0.2)


def _draw_decays(axes: Axes, outcome: dict[str, Outcome], settings: Settings) -> None:
    each, one = outcome["per weight, carried"].run.decay, outcome["per layer, carried"].run.decay
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
    axes.set(xscale="log", xlim=(settings.low, settings.high), ylim=(0.9 - len(names), 0.95))
    axes.set(xlabel="weight decay c, in ½ c w²")
    axes.set_title("learned decays by layer (first seed)", fontsize="medium")
    keys = {"one a weight": ("tab:red", "-"), "one a layer": ("tab:green", "-")}
    for key, (colour, style) in (keys | {"best of the grid": ("tab:blue", "--"), "start": ("0.5", ":")}).items():
        axes.plot([], [], style, color=colour, label=key)
    axes.legend(fontsize="small", frameon=False, loc="lower left")


def _mean_spread(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def _ratio(row: dict[str, Any], other: dict[str, Any]) -> float:
    return float(np.mean(row["test_loss"]) / np.mean(other["test_loss"]))
