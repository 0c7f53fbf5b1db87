"""Tell what ``distillation.py`` measured: a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import hypergrad as hg
from experiments.common import datasets

Tests = Mapping[str, Sequence[hg.diagnostics.Retrained]]
_NAMES = {"jointly_trained": "jointly trained", "retrained": "retrained"}  # fields of a result, as they are shown


def table(results: Tests) -> str:
    """Return both accuracies for each kind of start; mean ± standard deviation over the seeds."""
    lines = ["test accuracy".ljust(12) + "".join(name.rjust(17) for name in _NAMES.values())]
    for how, tests in results.items():
        each = (_accuracies(tests, name) for name in _NAMES)
        lines.append(how.ljust(13) + "".join(f"{a.mean():.3f} ± {a.std():.3f}".rjust(17) for a in each))
    return "\n".join([*lines, "mean ± standard deviation over seeds; chance is 0.1"])


def draw(results: Tests, points: Mapping[str, np.ndarray], path: Path) -> None:
    """Save the picture: the points of the first seed, and both accuracies of every seed."""
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    count = len(next(iter(points.values())))
    grid = figure.add_gridspec(2, count + 4)
    for row, how in enumerate(results):
        for column, image in enumerate(points[how]):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(image.reshape(8, 8), cmap="gray_r")
            axes.set(xticks=[], yticks=[], ylabel=how if column == 0 else "")
    axes = figure.add_subplot(grid[:, count:])
    for row, tests in enumerate(results.values()):
        for shift, (name, shown), colour in zip((0.18, -0.18), _NAMES.items(), ("tab:blue", "tab:orange"), strict=True):
            values = _accuracies(tests, name)
            axes.barh(-row + shift, values.mean(), 0.34, color=colour, alpha=0.75, label=shown if row == 0 else None)
            axes.plot(values, [-row + shift] * len(values), "k.", markersize=4)
    axes.axvline(1 / datasets.NUM_CLASSES, color="0.4", linestyle=":", linewidth=1)
    axes.set_yticks([-row for row in range(len(results))], list(results))
    axes.set(xlim=(0, 1), xlabel="test accuracy: mean, and each seed (dotted: chance)")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=95, pil_kwargs={"optimize": True})


def _accuracies(tests: Sequence[hg.diagnostics.Retrained], name: str) -> np.ndarray:
    return np.array([np.mean(getattr(test, name)) for test in tests])
