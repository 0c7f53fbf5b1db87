"""Tell what ``hypernetwork.py`` measured: a table and a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import hypergrad as hg
from experiments.common import datasets
from experiments.hypernetwork.run import Run, Settings

START, GRID, GLOBAL = "one decay, the first", "one decay, best of the grid", "one decay, global"
EACH = ("a decay per input, local", "a decay per weight, local")

Results: TypeAlias = dict[str, dict[str, Any]]
"""By row: ``hyperparams``, ``gradients``; one number a seed: ``valid_loss``, ``test_loss``, ``test_error``."""


class Outcome(NamedTuple):
    """One seed.

    Attributes:
      rows: by name, the numbers of the table.
      grid: (decay, validation loss) of the grid.
      curve: (decay, validation loss) that the global hypernetwork gives.
      history: by name of a local run, (step, validation loss, decays) at every look.
    """

    rows: Results
    grid: np.ndarray
    curve: np.ndarray
    history: dict[str, list[tuple[int, float, Any]]]


def retrained(name: str) -> str:
    """Return the row of training from scratch with the decays that run ``name`` learned."""
    return f"{name}, retrained"


@jax.jit
def _judge(params: Any, split: datasets.Split) -> tuple[jax.Array, jax.Array]:
    logits = split.x @ params["kernel"] + params["bias"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, split.y).mean()
    return loss, (logits.argmax(-1) != split.y).mean()


def measure(runs: dict[str, Any], splits: datasets.Splits, settings: Settings) -> Outcome:
    """Read all losses of one seed's runs; of the grid, the best validation loss makes the row."""
    valid = lambda params: float(_judge(params, splits.valid)[0])  # noqa: E731
    grid = np.asarray([(one.decay, valid(one.params)) for one in runs[GRID]])
    best = runs[GRID][grid[:, 1].argmin()]._replace(gradients=sum(one.gradients for one in runs[GRID]))
    rows = {name: _row(one, splits) for name, one in (runs | {GRID: best}).items()}
    share = np.linspace(0.01, 0.99, 99)
    low, high = math.log(settings.low), math.log(settings.high)
    global_params = runs[GLOBAL].variables.params
    at = [hg.BilevelParams(global_params, jnp.asarray(math.log(u / (1 - u)))) for u in share]
    curve = [
        (math.exp(low + u * (high - low)), valid(hg.responses.deployable_params(v)))
        for u, v in zip(share, at, strict=True)
    ]
    history = {name: [(step, valid(params), decay) for step, params, decay in runs[name].history] for name in EACH}
    return Outcome(rows, grid, np.asarray(curve), history)


def collect(outcomes: Sequence[Outcome]) -> Results:
    """Return the rows of the table from every seed's."""
    results: Results = {}
    for name, first in outcomes[0].rows.items():
        rows = [one.rows[name] for one in outcomes]
        losses = {key: [row[key] for row in rows] for key in ("valid_loss", "test_loss", "test_error")}
        results[name] = {"hyperparams": first["hyperparams"], "gradients": first["gradients"], **losses}
    return results


def table(results: Results) -> str:
    """Return the rows as text; mean ± standard deviation over the seeds, and on how many each beats the grid."""
    lines = [("", "decays", "gradients", "valid loss", "test loss", "test error, %", "test loss below the grid's")]
    for name, row in results.items():
        ours, grid = np.asarray(row["test_loss"]), np.asarray(results[GRID]["test_loss"])
        beaten = "" if name == GRID else f"{(ours < grid).sum()}/{len(ours)}"
        error = _mean_spread(100 * np.asarray(row["test_error"]), 1)
        counts = (f"{row['hyperparams']:,}", f"{row['gradients']:,}")
        lines.append((name, *counts, _mean_spread(row["valid_loss"], 4), _mean_spread(ours, 4), error, beaten))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = lambda line: [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]  # noqa: E731
    text = ["  ".join(pad(line)) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], "mean ± standard deviation over seeds"])


def draw(outcome: Outcome, title: str, path: Path) -> None:
    """Save the picture: the global curve, losses and decays on the way, and the learned decays by input."""
    figure = Figure(figsize=(13, 3.5), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    curve, losses, decays, image = figure.subplots(1, 4)
    _draw_global(curve, outcome)
    for name, colour in zip(EACH, ("tab:green", "tab:red"), strict=True):
        steps = [step for step, _, _ in outcome.history[name]]
        losses.plot(steps, [loss for _, loss, _ in outcome.history[name]], color=colour, label=name)
        low, middle, high = np.asarray(
            [np.quantile(_flat(decay), (0.05, 0.5, 0.95)) for _, _, decay in outcome.history[name]]
        ).T
        decays.plot(steps, middle, color=colour, label=name)
        decays.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    for name, style in ((START, ":"), (GRID, "--")):
        losses.axhline(outcome.rows[name]["valid_loss"], color="black", linestyle=style, linewidth=1, label=name)
    losses.set(xlabel="steps", ylabel="validation loss", title="losses")
    losses.legend(frameon=False, fontsize="x-small")
    decays.set(xlabel="steps", yscale="log", title="decays: median, 5 % to 95 %")
    kernel = np.log10(np.asarray(outcome.history[EACH[0]][-1][2]["kernel"]))
    shown = image.imshow(kernel.reshape((math.isqrt(kernel.size), -1)), cmap="viridis", interpolation="nearest")
    image.set(xticks=[], yticks=[], title="log₁₀ decay by input pixel")
    figure.colorbar(shown, ax=image, shrink=0.8)
    for axes in (curve, losses, decays, image):
        axes.title.set_fontsize("medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


def _draw_global(axes: Axes, outcome: Outcome) -> None:
    axes.plot(*outcome.curve.T, color="tab:blue", label="global hypernetwork")
    axes.plot(*outcome.grid.T, "o-", color="black", markersize=3, linewidth=1, label="trained at each decay")
    axes.axvline(outcome.rows[GLOBAL]["decay"], color="tab:blue", linestyle=":", label="learned")
    axes.set(xscale="log", xlabel="weight decay", ylabel="validation loss", title="one decay")
    axes.legend(frameon=False, fontsize="x-small")


def _row(one: Run, splits: datasets.Splits) -> dict[str, Any]:
    (valid, _), (test, error) = (_judge(one.params, split) for split in (splits.valid, splits.test))
    decays = _flat(one.decay)
    losses = {"valid_loss": float(valid), "test_loss": float(test), "test_error": float(error)}
    return {"hyperparams": decays.size, "gradients": one.gradients, "decay": float(decays[0]), **losses}


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _mean_spread(values: Any, digits: int) -> str:
    spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"
