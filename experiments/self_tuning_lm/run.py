"""The training loop of ``self_tuning_lm.py``, the same for every method, its table and its picture."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import lax

import hypergrad as hg
from experiments.common import progress
from experiments.self_tuning_lm import model as lm


class Method(NamedTuple):
    """A way of training.

    Attributes:
      start: what is trained, with the optimizer's state.
      advance: ``start = advance(start, key)`` is one step.
      read: ``read(start)`` gives plain weights, constrained hyperparameters, and the last outer step's info or None.
      steps: how many.
      cost: of a step, in plain gradients.
    """

    start: Any
    advance: Callable[[Any, jax.Array], Any]
    read: Callable[[Any], tuple[Any, Any, Any]]
    steps: int
    cost: float


class Run(NamedTuple):
    """One training run, looked at now and then.

    Attributes:
      history: constrained hyperparameters at each look.
      valid: validation loss, nats a word, at each look.
      test: test loss where the validation loss was lowest.
      gradients: what training cost, in plain gradients.
      seconds: of training, without looks.
    """

    history: list[dict[str, float]]
    valid: list[float]
    test: float
    gradients: float
    seconds: float


Evaluate = Callable[[Any], tuple[float, float]]


def evaluator(problem: hg.BilevelProblem, text: lm.Text, size: int) -> Evaluate:
    """Return ``evaluate(params) -> (validation loss, test loss)`` over all of both texts."""
    parts = [lm.windows(part, size) for part in (text.valid, text.test)]

    @jax.jit
    def mean(params: Any, batches: jax.Array) -> jax.Array:
        return lax.map(lambda batch: problem.outer_loss(params, lm.START, batch, None), batches).mean()

    return lambda params: (float(mean(params, parts[0])), float(mean(params, parts[1])))


def fit(name: str, method: Method, evaluate: Evaluate, looks: int, seed: int, shown: progress.Progress) -> Run:
    """Take all steps, with as many looks, evenly spread; the test loss is of the look that validates best."""
    at, key, seconds = method.start, jax.random.key(seed + 1), 0.0
    history: list[dict[str, float]] = []
    pairs: list[tuple[float, float]] = []
    shown.bar.set_description(name)
    for look in range(looks):
        begin, (start, stop) = time.perf_counter(), (method.steps * n // looks for n in (look, look + 1))
        for i in range(start, stop):
            at = jax.block_until_ready(method.advance(at, jax.random.fold_in(key, i)))
            shown.bar.update()
        seconds += time.perf_counter() - begin
        params, hyperparams, info = method.read(at)
        pairs.append(evaluate(params))
        history.append({n: float(hyperparams[n]) for n in lm.START})
        shown.look(f"seed {seed}/{name}", stop, info, advance=0, loss=pairs[-1][0])
    return Run(history, [valid for valid, _ in pairs], min(pairs)[1], method.steps * method.cost, seconds)


def table(runs: dict[str, Run]) -> str:
    """Return one row a run: perplexities at the look that validates best, and at the end."""
    lines: list[tuple[str, ...]] = [("", "best valid", "test then", "valid at end", "gradients", "seconds")]
    for name, run in runs.items():
        best, last = min(run.valid), run.valid[-1]
        figures = [f"{math.exp(loss):.1f}" for loss in (best, run.test, last)]
        lines.append((name, *figures, f"{run.gradients:.0f}", f"{run.seconds:.0f}"))
    text = ["  ".join([line[0].ljust(24), *(cell.rjust(12) for cell in line[1:])]) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], "perplexity a word; seconds include compilation"])


def strengths(runs: dict[str, Run]) -> str:
    """Return the hyperparameters that each run ended with."""
    lines = [("", *lm.START)]
    lines += [(name, *(f"{value:.3f}" for value in run.history[-1].values())) for name, run in runs.items()]
    return "\n".join("  ".join([line[0].ljust(24), *(cell.rjust(9) for cell in line[1:])]) for line in lines)


def draw(runs: dict[str, Run], tuned: Run, title: str, path: Path) -> None:
    """Save the picture: the hyperparameters of the run that tuned itself, and the validation losses of all."""
    looks = len(tuned.valid)
    gradients = [round(tuned.gradients * (look + 1) / looks) for look in range(looks)]
    losses = {name: run.valid for name, run in runs.items()}
    figure = hg.diagnostics.plot_trajectories(gradients, tuned.history, losses=losses, title=title, xlabel="gradients")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})
