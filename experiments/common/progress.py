"""Show how an outer problem is doing while an experiment runs, and write it down when asked.

A bar shows outer loss, norm of the hypergradient and residual of its solve, and says where a step was skipped.
``--log run.csv`` writes a row a look, ``--log runs/`` (any name without .csv) a TensorBoard event file for each run
(``tensorboard --logdir runs``).
"""

import argparse
import contextlib
import csv
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tensorboardX import SummaryWriter
from tqdm import tqdm

import hypergrad as hg

FIGURES = ("loss", "outer_loss", "hypergrad_norm", "residual", "skipped")  # the columns of a log, after run and step
_SHOWN = {"outer_loss": "outer loss", "hypergrad_norm": "|hypergrad|"}  # on the bar, where not by its name

Write = Callable[[str, int, dict[str, float]], None]


class Progress(NamedTuple):
    """A bar and a log.

    Attributes:
      bar: the tqdm bar.
      look: ``look(run, step, info=None, *, advance=1, **figures)`` moves the bar by ``advance``, shows the info's
        figures and those of ``FIGURES`` given by name, and logs them as those of ``step`` of the run of that name.
    """

    bar: tqdm
    look: Callable[..., None]


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Give an example's command line ``--log``."""
    parser.add_argument("--log", type=_log, help="write progress there: a new .csv file, or a folder for TensorBoard")


def _log(given: str) -> Path:
    """Refuse, before anything runs, a file that is there already: a log is not written over."""
    path = Path(given)
    if path.is_file() or (path.exists() and path.suffix.lower() == ".csv"):
        raise argparse.ArgumentTypeError(f"{given} exists: name a new .csv file, or a folder")
    return path


@contextlib.contextmanager
def progress(total: float | None, *, unit: str = "step", log: Path | None = None, **options: Any) -> Iterator[Progress]:
    """Open a bar over ``total`` units and, if ``log`` is given, the log; other options are tqdm's."""
    with tqdm(total=total, unit=unit, **options) as bar, _writer(log) as write:

        def look(run: str, step: int, info: Any = None, *, advance: float = 1, **figures: Any) -> None:
            values = _figures(info) | {name: float(value) for name, value in figures.items()}
            shown = [name for name in FIGURES if name in values and (name != "skipped" or values[name])]
            bar.set_postfix({_SHOWN.get(name, name): f"{values[name]:.3g}" for name in shown}, refresh=False)
            bar.update(advance)
            write(run, step, values)

        yield Progress(bar, look)


def _figures(info: hg.HypergradInfo | None) -> dict[str, float]:
    """Return the columns of a log that ``hg.diagnostics.scalars`` knows."""
    found = {} if info is None else hg.diagnostics.scalars(info)
    columns = {"outer_loss": "outer_loss", "hypergrad_norm": "hypergrad_norm", "solver/residual": "residual"}
    figures = {column: found[name] for name, column in columns.items() if name in found}
    return figures | ({"skipped": float(found["skip_reason"] != 0)} if found else {})


@contextlib.contextmanager
def _writer(log: Path | None) -> Iterator[Write]:
    if log is None:
        yield lambda *_: None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.suffix.lower() == ".csv":
        with log.open("w", newline="") as file:
            rows = csv.DictWriter(file, ["run", "step", *FIGURES])
            rows.writeheader()

            def write_row(run: str, step: int, values: dict[str, float]) -> None:
                rows.writerow({"run": run, "step": step} | values)
                file.flush()

            yield write_row
        return
    with contextlib.ExitStack() as stack:
        writers: dict[str, Any] = {}

        def write_events(run: str, step: int, values: dict[str, float]) -> None:
            if run not in writers:
                inside = [part for part in Path(run).parts if part not in ("/", "..")]
                writers[run] = stack.enter_context(SummaryWriter(str(log.joinpath(*inside))))
            for name, value in values.items():
                writers[run].add_scalar(name, value, step)

        yield write_events


def chunks(steps: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a run into the pieces between two looks at it."""
    return itertools.pairwise([*range(0, steps, length), steps])
