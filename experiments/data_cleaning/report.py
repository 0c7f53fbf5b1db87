"""Tell what ``data_cleaning.py`` measured: two tables and a picture."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.data_cleaning import comparison as rows
from experiments.data_cleaning.comparison import Result

_NOTE = 'mean ± standard deviation over seeds; "that network": the one of validation only'
_OURS = (rows.JOINT, rows.RETRAINED, rows.KEPT, rows.KEPT_JOINED)
_BEST = (rows.JOINT, rows.RETRAINED, rows.KEPT_JOINED)


def tables(results: Sequence[Result]) -> str:
    """Return the rows as text: networks, then searches for wrong labels."""
    networks = _table("trained on", ("examples", "test loss", "test error, %"), [each.networks for each in results])
    searches = _table("wrong if", ("precision", "recall", "F1", "AUC"), [each.searches for each in results])
    return f"{networks}\n\n{searches}\n{_NOTE}"


def summary(results: Sequence[Result]) -> str:
    """Say from the numbers alone what learned weights are worth beside other uses of the same examples."""
    lines = ["test error, in points (and on how many seeds), below that of", " " * 34 + _joined(_BEST)]
    for rival in (name for name in results[0].networks if name not in (*_OURS, rows.ORACLE)):
        errors = {name: np.array([each.networks[name].test_error for each in results]) for name in (rival, *_BEST)}
        lines.append(f"  {rival}".ljust(34) + _joined(_gain(100 * (errors[rival] - errors[x]), 1) for x in _BEST))
    lines += ["wrong labels found by learned weights, above those by", " " * 34 + _joined(("F1", "AUC"))]
    for rival in (name for name in results[0].searches if name != rows.BY_WEIGHT):
        pairs = [(each.searches[rows.BY_WEIGHT], each.searches[rival]) for each in results]
        gains = ([ours.f1 - theirs.f1 for ours, theirs in pairs], [ours.auc - theirs.auc for ours, theirs in pairs])
        lines.append(f"  {rival}".ljust(34) + _joined(_gain(np.array(gain), 3) for gain in gains))
    return "\n".join(lines)


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Save the picture: learned weights of right and of wrong labels, and test errors."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    figure.suptitle(f"one learned weight an example ({title})")
    left, right = figure.subplots(1, 2)
    weights, wrong = (
        np.concatenate([each.weights for each in results]),
        np.concatenate([each.wrong for each in results]),
    )
    for label, chosen, colour in (("right label", ~wrong, "tab:green"), ("wrong label", wrong, "tab:red")):
        left.hist(weights[chosen], np.linspace(0, 1, 41), alpha=0.55, color=colour, label=label)
    left.axvline(0.5, color="0.4", linestyle=":", linewidth=1)
    auc = np.mean([each.searches[rows.BY_WEIGHT].auc for each in results])
    left.set(xlabel="learned weight (dotted: its start)", ylabel=f"examples (seeds: {len(results)})")
    left.set_title(f"AUC of wrong labels {auc:.3f}", fontsize="medium")
    left.legend(frameon=False)
    places = np.arange(len(results[0].networks))[::-1]
    for place, name in zip(places, results[0].networks, strict=True):
        errors = [100 * each.networks[name].test_error for each in results]
        right.barh(place, np.mean(errors), 0.7, color="tab:blue" if name in _OURS else "0.6", alpha=0.75)
        right.plot(errors, [place] * len(errors), "k.", markersize=4)
    right.set_yticks(places, list(results[0].networks))
    right.set(xlabel="test error, %: mean, and each seed")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=95, pil_kwargs={"optimize": True})


def _table(head: str, columns: Sequence[str], seeds: Sequence[dict[str, Any]]) -> str:
    lines = [head.ljust(32) + "".join(column.rjust(16) for column in columns)]
    for name in seeds[0]:
        values = np.array([seed[name] for seed in seeds]).T
        lines.append(name.ljust(32) + "".join(map(_cell, columns, values)))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(column: str, values: np.ndarray) -> str:
    scale, digits = {"examples": (1, 0), "test error, %": (100, 1)}.get(column, (1, 3))
    return f"{scale * values.mean():.{digits}f} ± {scale * values.std():.{digits}f}".rjust(16)


def _gain(values: np.ndarray, digits: int) -> str:
    return f"{values.mean():+.{digits}f} ({(values > 0).sum()} of {len(values)})"


def _joined(cells: Iterable[str]) -> str:
    return "".join(cell.rjust(28) for cell in cells)
