"""Tell what ``self_tuning.py`` found: a Markdown table, what follows from it, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
from matplotlib.figure import Figure

FULL = "16 random runs, each the whole budget"
START = "first values of self-tuning, held fixed"
_LEARNING = "self-tuning"


def table(record: dict[str, Any]) -> str:
    """Return circumstances, results, comparisons by seed, and the choice of trials, as Markdown."""
    machine, race, seeds = record["machine"], record["race"], record["seeds"]
    settings = race["settings"]
    parts = [
        "# Self-tuning against black-box search, at equal cost",
        f"{race['data']}, MLP of two hidden layers of {settings['hidden']}, batches of {settings['batch']}, Adam at "
        f"{settings['rate']:g}; {race['budget']:,} gradients a method and seed; a look at the validation loss every "
        f"{race['look']}; seeds {', '.join(seeds)}. Mean ± standard deviation over seeds; test at the weights of the "
        "lowest validation loss. Accounting: docstring of `benchmarks/self_tuning.py`.",
        f"Hyperparameters and upper ends of their intervals (all begin at 0): {_box(record['box'])}.",
        _table(
            ("method", "gradients", "trials begun", "valid loss", "test loss", "test error, %"),
            [_row(name, [found[name] for found in seeds.values()]) for name in _methods(record)],
        ),
        f"No search: {START}. Not at equal cost: the {FULL}.",
        "## By seed",
        *(_versus(record, name) for name in _methods(record) if name.startswith(_LEARNING)),
        "## Rivals' trials",
        _choice(record),
        f"{machine['cpu']}, {machine['cores']} cores, python {machine['python']}, jax {machine['jax']}, "
        f"optax {machine['optax']}, flax {machine['flax']}, optuna {record['optuna']}, {machine['date']}.",
    ]
    return "\n\n".join(parts) + "\n"


def draw(record: dict[str, Any], path: Path) -> None:
    """Save the picture: lowest validation loss so far against gradients spent, and what each seed ends with."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    names, lowest = _methods(record), np.inf
    for place, name in enumerate(names):
        found = [seed[name] for seed in record["seeds"].values()]
        ours, whole = name.startswith(_LEARNING), name == FULL
        colour = "0.4" if whole else f"C{place}"
        ends = [one["valid_loss"] for one in found]
        lowest = min(lowest, *ends)
        right.plot(ends, [-place + 0.12] * len(ends), "o", color=colour, markersize=4)
        right.plot([one["test_loss"] for one in found], [-place - 0.12] * len(ends), "x", color=colour, markersize=5)
        if whole:
            left.axhline(np.mean(ends), color=colour, linestyle=":")
            continue
        losses = np.asarray([one["curve"] for one in found])
        spent = record["race"]["look"] * np.arange(1, losses.shape[1] + 1)
        style = ("-." if "random point" in name else "-") if ours else "--"
        left.plot(spent, losses.mean(0), style, linewidth=2 if ours else 1.4, color=colour)
    left.set(ylim=(0.95 * lowest, min(2.3, 2.2 * lowest)), xlim=(0, None))
    left.set(xlabel="gradients of the training loss spent", ylabel="lowest validation loss so far, nats")
    left.set_title(f"mean over {len(record['seeds'])} seeds ({record['race']['data']})", fontsize="medium")
    right.set_yticks(-np.arange(len(names)), [name.replace(", from", ",\nfrom") for name in names], fontsize="small")
    for label, line in zip(right.get_yticklabels(), right.lines[::2], strict=True):
        label.set_color(line.get_color())
    right.set(xlabel="loss at the end, nats")
    right.set_title("each seed: validation (dot), test (cross)", fontsize="medium")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=85, pil_kwargs={"optimize": True})


def _methods(record: dict[str, Any]) -> list[str]:
    """Return what every seed has results of: while the race goes on, that may be less than all."""
    first, *others = record["seeds"].values()
    return [name for name in first if all(name in found for found in others)]


def _row(name: str, found: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    return (
        name,
        f"{np.mean([one['gradients'] for one in found]):,.0f}",
        f"{np.mean([one['trials'] for one in found]):.0f}",
        _spread([one["valid_loss"] for one in found], 4),
        _spread([one["test_loss"] for one in found], 4),
        _spread([100 * one["test_error"] for one in found], 1),
    )


def _versus(record: dict[str, Any], ours: str) -> str:
    """Say from the numbers on how many seeds self-tuning is better than each rival, and by how much."""
    seeds, rows = list(record["seeds"].values()), []
    for name in _methods(record):
        if name.startswith(_LEARNING):
            continue
        cells = []
        for key in ("valid_loss", "test_loss"):
            gains = np.asarray([seed[name][key] - seed[ours][key] for seed in seeds])
            cells += [f"{gains.mean():+.4f}", f"{(gains > 0).sum()} of {len(gains)}"]
        rows.append((name, *cells))
    head = (f"{ours}, against", "valid: gain", "better on", "test: gain", "better on")
    return _table(head, rows)


def _choice(record: dict[str, Any]) -> str:
    choice = record["choice"]
    if not choice:
        return f"Trials that the budget pays for in full: {record['trials']}, not chosen on other seeds."
    counts = sorted({count for found in choice["valid_loss"].values() for count in found}, key=int)

    def cell(name: str, count: str) -> str:
        loss = choice["valid_loss"][name].get(count)
        text = "" if loss is None else f"{loss:.4f}"
        return f"**{text}**" if text and count == str(record["trials"][name]) else text

    rows = [(name, *(cell(name, count) for count in counts)) for name in choice["valid_loss"]]
    text = f"Mean validation loss on seeds {', '.join(map(str, choice['seeds']))} (none of the race), by the number of "
    return f"{text}trials that the budget pays for in full; bold: taken in the race.\n\n" + _table(("", *counts), rows)


def _box(tree: Any, path: str = "") -> str:
    if not isinstance(tree, dict):
        return f"{path} {tree:g}"
    names = {name: f"{path} {name}".strip() if name != "rate" else path for name in tree}
    return ", ".join(_box(below, names[name]) for name, below in tree.items())


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def costs(record: dict[str, Any]) -> str:
    """Return targets and all figures of ``self_tuning_cost.py``, as Markdown."""
    parts = [
        "# Cost of a self-tuning step",
        "CPU time (all threads), median of rounds in which the candidates take turns; ratios are medians of the ratio "
        "inside a round. An inner step is a call of `update` on which nothing outer is due; the hypergradient is what "
        "an outer step adds, on a batch of the same size.",
    ]
    targets = []
    for name, found in record["networks"].items():
        for which, target in record["targets"].items():
            measured = found["candidates"][which]["in_plain_steps"]
            met = "met" if measured <= target else "**missed**"
            targets.append((f"{which}, in plain steps", name, f"≤ {target:.2f}", f"{measured:.2f}", met))
    parts += ["## Targets", _table(("what", "network", "target", "measured", ""), targets)]
    for name, found in record["networks"].items():
        head = ("", "CPU ms", "wall ms", "in plain steps", "over by hand", "scratch MiB")
        rows = [
            (
                which,
                f"{one['cpu_ms']:.2f}",
                f"{one['wall_ms']:.2f}",
                f"{one['in_plain_steps']:.2f}",
                f"{one['over_hand']:.2f}" if "over_hand" in one else "",
                f"{one['scratch_mib']:.1f}",
            )
            for which, one in found["candidates"].items()
        ]
        where = harness.where(found["machine"], ("cpu", "cores", "python", "jax", "jaxlib", "flax", "date"))
        load = f"load {found['load'][0]}"
        parts += [f"## {name}: hidden layers of {found['hidden']}, batches of {found['batch']}", _table(head, rows)]
        parts += [f"{found['rounds']} rounds, {load}, {where}"]
    return "\n\n".join(parts) + "\n"
