"""Pictures of a run, drawn with matplotlib (``pip install "hypergrad-jax[plot]"``): each returns a ``Figure``.

    plot_trajectories   how hyperparameters moved: a line each, a median and a band for a tensor of them
    plot_solver         outer loss, norm of the hypergradient and residual of its solve over training
    plot_comparison     solvers: how close to the converged hypergradient, in what time

Nothing is shown or saved here: call ``figure.savefig``. Matplotlib is imported when a picture is asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hypergrad import tree, validate
from hypergrad.diagnostics._base import readable
from hypergrad.diagnostics._solvers import SolverComparison
from hypergrad.solvers import SolveInfo, Status
from hypergrad.types import PyTree

__all__ = ["plot_comparison", "plot_solver", "plot_trajectories"]

_FEW, _MANY = 8, 30  # lines of a panel with a legend above it, and with one beside it; more make a heat map


def plot_trajectories(
    steps: Sequence[float],
    snapshots: Sequence[PyTree],
    *,
    losses: Mapping[str, Sequence[float]] | None = None,
    title: str = "",
    xlabel: str = "steps",
) -> Any:
    """Draw how hyperparameters moved during a run.

    Each leaf goes to one of up to three panels. Logarithmic axis: all values are positive, and the largest is above 1
    or at least 10 times the smallest. Linear axis from 0 to 1: any other leaf with all values in [0, 1]. Linear axis:
    all remaining leaves. A leaf of several numbers is drawn as their median with the range from the 10th to the 90th
    percentile. A panel of more than 30 leaves is a heat map of their medians, sorted by the last one.

    Args:
      steps: places on the horizontal axis, one per snapshot.
      snapshots: trees of hyperparameters, best constrained ones: ``problem.constrain(variables.hyperparams)``.
      losses: by name, one number per snapshot, in a panel of their own.
      title: of the picture.
      xlabel: what ``steps`` count.

    Returns:
      A ``matplotlib.figure.Figure``.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no snapshots, or not one per step.

    >>> import hypergrad as hg
    >>> figure = hg.diagnostics.plot_trajectories([0, 1], [{"rate": 0.1}, {"rate": 0.2}])
    >>> figure.axes[0].get_ylabel()
    'in [0, 1]'
    """
    if not snapshots or len(snapshots) != len(steps):
        got = f"{len(snapshots)} for {len(steps)} steps"
        raise ValueError(validate.message("one snapshot per step, at least one", got, "Keep one at every look."))
    for snapshot in snapshots[1:]:
        validate.same_structure("a later snapshot", snapshot, "the first", snapshots[0])
    tensors: dict[str, np.ndarray] = {
        name: np.stack([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves])
        for name, *leaves in zip(tree.leaf_names(snapshots[0]), *map(jax.tree.leaves, snapshots), strict=True)
    }
    panels: dict[str, dict[str, np.ndarray]] = {"in [0, 1]": {}, "positive": {}, "value": {}}
    for name, rows in tensors.items():
        low, high = rows.min(), rows.max()
        positive = low > 0 and (high > 1 or high >= 10 * low)
        panels["positive" if positive else "in [0, 1]" if 0 <= low <= high <= 1 else "value"][readable(name)] = rows
    panels = {kind: rows for kind, rows in panels.items() if rows}
    wide = sum(1.8 for drawn in panels.values() if len(drawn) > _FEW)  # room for names beside the panel
    figure = _figure(4.0 * (len(panels) + bool(losses)) + wide, 3.6)
    axes = figure.subplots(1, len(panels) + bool(losses), squeeze=False)[0]
    for panel, (kind, drawn) in zip(axes, panels.items(), strict=False):
        if len(drawn) > _MANY:
            _heat_map(figure, panel, steps, drawn, kind)
            panel.set(xlabel=xlabel)
            continue
        for place, (name, one) in enumerate(drawn.items()):
            style = (
                {} if len(drawn) <= _FEW else {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10]}
            )
            (line,) = panel.plot(steps, np.median(one, 1), linewidth=1.4, label=name, **style)
            if one.shape[1] > 1:
                panel.fill_between(steps, *np.quantile(one, (0.1, 0.9), axis=1), color=line.get_color(), alpha=0.15)
        panel.set(xlabel=xlabel, ylabel=kind, yscale="log" if kind == "positive" else "linear")
        _legend(panel, beside=len(drawn) > _FEW)
    if losses:
        for name, line_of in losses.items():
            axes[-1].plot(steps, line_of, linewidth=1.4, label=name)
        axes[-1].set(xlabel=xlabel, ylabel="loss")
        _legend(axes[-1])
    return _finished(figure, title)


def plot_solver(infos: Any, *, retrained: Mapping[int, float] | None = None, title: str = "") -> Any:
    """Draw outer loss, norm of the hypergradient, and residual of its linear solve over training.

    Args:
      infos: ``state.info`` kept at several calls, or infos of ``hg.value_and_hypergrad``, as a list or stacked as
        ``lax.scan`` does. Those from before the first outer step are left out; the horizontal axis is ``info.step``
        where it counts.
      retrained: by step, the outer loss of new weights that were trained with the hyperparameters of that step, as
        ``hg.diagnostics.retrain`` finds it: points beside the curve of the jointly trained weights.
      title: of the picture.

    Returns:
      A ``matplotlib.figure.Figure``; skipped steps are marked, and solves that stopped at negative curvature, diverged
      or were not finite.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no info of an estimate.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> solve = hg.SolveInfo(*map(jnp.asarray, (5, 0.1, 0.1, 0.0, 1)))
    >>> info = hg.HypergradInfo(*map(jnp.asarray, (10, 1.0, 0.5, 2.0, 0, 0)), method=solve)
    >>> len(hg.diagnostics.plot_solver([info, info]).axes)
    3
    """
    if hasattr(infos, "hypergrad_norm"):  # stacked along a leading axis
        stacked = jax.tree.map(np.asarray, infos)
        infos = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(stacked.step))]
    counted = [info for info in infos if int(info.step) >= 0]
    if not counted:  # infos of functional calls have no number; before the first estimate norms are exactly 0
        counted = [info for info in infos if float(info.hypergrad_norm) != 0]
    if not counted:
        raise ValueError(validate.message("infos of estimates", f"{len(infos)} from before the first", "Train longer."))
    counts = [int(info.step) for info in counted]
    steps = np.array(counts if min(counts) >= 0 else range(len(counted)))
    solves = [info.solver for info in counted if isinstance(info.solver, SolveInfo)]
    figure = _figure(10.5 if solves else 7.0, 3.2)
    axes = figure.subplots(1, 3 if solves else 2)
    skipped = np.array([bool(info.skipped) for info in counted])
    lines = {"outer loss": [info.outer_loss for info in counted], "|hypergrad|": [i.hypergrad_norm for i in counted]}
    for panel, (name, values) in zip(axes, lines.items(), strict=False):
        numbers = np.array([float(value) for value in values])
        panel.plot(steps, numbers, linewidth=1.4)
        if skipped.any():
            panel.plot(steps[skipped], np.zeros(skipped.sum()), "rx", label="skipped")
        panel.set(xlabel="step", ylabel=name)
    if retrained:
        axes[0].plot(list(retrained), list(retrained.values()), "s", fillstyle="none", label="new weights")
    if solves:
        residuals = np.array([float(solve.residual) for solve in solves])
        failed = np.array([int(solve.status) >= Status.INDEFINITE for solve in solves])
        axes[2].semilogy(steps, np.maximum(residuals, np.finfo(np.float32).tiny), linewidth=1.4)
        if failed.any():
            axes[2].semilogy(steps[failed], residuals[failed], "rx", label="broke down")
        axes[2].set(xlabel="step", ylabel="residual of the solve")
    for panel in axes:
        if panel.get_legend_handles_labels()[0]:
            _legend(panel)
    return _finished(figure, title)


def _legend(panel: Any, *, beside: bool = False) -> None:
    """Put the legend above the axes or beside them, where it covers no curve."""
    where: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 2, "fontsize": "small"}
    if beside:
        where = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": "xx-small"}
    panel.legend(frameon=False, **where)


def _heat_map(figure: Any, panel: Any, steps: Sequence[float], drawn: Mapping[str, np.ndarray], kind: str) -> None:
    """Draw a row per leaf, coloured by its median, sorted by the last one; some rows have their name."""
    medians = {name: np.median(one, 1) for name, one in drawn.items()}
    names = sorted(medians, key=lambda name: medians[name][-1])
    rows = np.stack([medians[name] for name in names])
    logs = kind == "positive"
    mesh = panel.pcolormesh(steps, np.arange(len(names)), np.log10(rows) if logs else rows, shading="nearest")
    figure.colorbar(mesh, ax=panel, label="log10" if logs else kind)
    shown = np.unique(np.linspace(0, len(names) - 1, 15).astype(int))
    panel.set_yticks(shown, [names[place] for place in shown], fontsize="xx-small")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('hg.diagnostics.plot_* need matplotlib: pip install "hypergrad-jax[plot]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _finished(figure: Any, title: str) -> Any:
    if title:
        figure.suptitle(title, fontsize="medium")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_comparison(comparison: SolverComparison) -> Any:
    """Draw how close each solver of ``compare_solvers`` comes, 1 − cosine, against its time per hypergradient.

    Args:
      comparison: what ``hg.diagnostics.compare_solvers`` returned. Rows without a reference are left out.

    Returns:
      A ``matplotlib.figure.Figure``: filled marks for the last solve, hollow ones for the first.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no row has a reference.

    >>> import hypergrad as hg
    >>> status = hg.solvers.Status.TRUNCATED
    >>> row = hg.diagnostics.SolverRow("cg(3)", status, 3, 0.1, 0.0, 0.0, 0.99, 0.9, 0.8, 1.0, 2.0, 1.0)
    >>> hg.diagnostics.plot_comparison(hg.diagnostics.SolverComparison((row,), "")).axes[0].get_xlabel()
    'ms per hypergradient'
    """
    rows = [row for row in comparison.rows if row.cosine == row.cosine]
    if not rows:
        fix = "Pass solvers with damping, or a point where H is definite."
        raise ValueError(validate.message("a comparison with a converged reference", "none", fix))
    figure = _figure(7.0, 4.0)
    panel = figure.subplots()
    for row in rows:
        for cosine, filled in ((row.first_cosine, False), (row.cosine, True)):
            missing = max(1.0 - cosine, 1e-9)
            panel.plot(row.milliseconds, missing, "o", color="C0", fillstyle="full" if filled else "none")
        panel.annotate(
            row.name,
            (row.milliseconds, max(1.0 - row.cosine, 1e-9)),
            fontsize=7,
            xytext=(4, 2),
            textcoords="offset points",
        )
    panel.set(xscale="log", yscale="log", xlabel="ms per hypergradient", ylabel="1 − cosine (hollow: first solve)")
    return _finished(figure, "Solvers beside a converged solve")
