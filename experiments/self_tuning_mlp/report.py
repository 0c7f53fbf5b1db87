"""What a run of ``self_tuning_mlp.py`` leaves behind, and the table and the picture of it."""

from pathlib import Path
from typing import Any, NamedTuple

import hypergrad as hg

TUNED, NONE = "tuned while training", "no regularisation"
START, STOP = "its first values, held fixed", "its last values, held fixed"


class Run(NamedTuple):
    """A whole run.

    Attributes:
      gradients: spent at each look.
      losses: validation loss at each look.
      values: constrained hyperparameters at each look.
      test: cross-entropy and error on the test split, of the weights of the lowest validation loss.
    """

    gradients: list[int]
    losses: list[float]
    values: list[Any]
    test: tuple[float, float]

    def row(self) -> dict[str, Any]:
        """Return what the table shows."""
        best = min(self.losses)
        scores = {"valid_loss": best, "test_loss": self.test[0], "test_error": self.test[1]}
        return {"gradients": self.gradients[-1], **scores, "last_values": named(self.values[-1])}


def named(values: Any) -> dict[str, float]:
    """Return constrained hyperparameters by a short name."""
    rates = {f"dropout, {place}": value["rate"] for place, value in values["dropout"].items()}
    both = rates | {"input noise": values["noise"], "label smoothing": values["smoothing"]}
    return {name: float(value) for name, value in both.items()}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as text."""
    head = ("", "gradients", "valid loss", "test loss", "test error, %", *rows[TUNED]["last_values"])
    lines = [head]
    for name, row in rows.items():
        scores = f"{row['valid_loss']:.3f}", f"{row['test_loss']:.3f}", f"{100 * row['test_error']:.1f}"
        lines.append((name, f"{row['gradients']:,}", *scores, *(f"{v:.2f}" for v in row["last_values"].values())))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def draw(runs: dict[str, Run], title: str, path: Path) -> None:
    """Save the picture: the hyperparameters of the run that tuned itself, and the validation losses of all."""
    tuned, losses = runs[TUNED], {name: run.losses for name, run in runs.items()}
    moved = [named(values) for values in tuned.values]
    figure = hg.diagnostics.plot_trajectories(tuned.gradients, moved, losses=losses, title=title, xlabel="gradients")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})
