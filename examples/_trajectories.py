"""Draw how hyperparameters moved during a run, with the losses beside them."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(
    history: dict[str, list[float]],
    steps: list[int],
    losses: dict[str, list[float]],
    title: str,
    path: Path,
    *,
    xlabel: str = "steps",
) -> None:
    """Save the picture: one line a hyperparameter, those that stay within [0, 1] in a panel of their own; losses.

    Args:
      history: each hyperparameter's constrained values, one at each of ``steps``.
      steps: where on the horizontal axis.
      losses: each run's losses, one at each of ``steps``.
      title: of the whole picture.
      path: of the PNG; folders are made.
      xlabel: what ``steps`` count.
    """
    rates = [name for name, values in history.items() if min(values) >= 0 and max(values) <= 1]
    others = [name for name in history if name not in rates]
    panels = [(names, label) for names, label in ((rates, "rates"), (others, "other strengths")) if names]
    figure = Figure(figsize=(4 * (len(panels) + 1), 3.6), layout="constrained")
    *left, right = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    for axes, (names, label) in zip(left, panels, strict=True):
        _lines(axes, steps, {name: history[name] for name in names}, label, xlabel)
    _lines(right, steps, losses, "loss", xlabel)
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


def _lines(axes: Axes, steps: Sequence[int], series: dict[str, list[float]], ylabel: str, xlabel: str) -> None:
    for name, values in series.items():
        axes.plot(steps, values, label=name, linewidth=1.4)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
