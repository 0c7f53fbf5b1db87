"""Numbers of a run for a logger, and a progress bar.

    scalars(info)      outer_loss, hypergrad_norm, num_skipped, solver/residual, …      one flat dict of floats
    progress(total)    outer loss, residual, skipped outer steps, seconds per outer step

Both take what ``hg.bilevel`` tells, and the result so far of ``hg.minimize``.

The dict is what TensorBoard, Weights & Biases, ``clu.metric_writers`` and ``csv.DictWriter`` take.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from hypergrad import tree, validate
from hypergrad.drivers import BilevelState, HypergradInfo, MinimizeResult, SkipReason, solves_in

__all__ = ["progress", "scalars"]


def scalars(info: HypergradInfo | BilevelState | MinimizeResult) -> dict[str, float]:
    """Return the numbers of an outer step by name, as Python floats.

    Args:
      info: ``state.info`` of ``hg.bilevel`` or its state, the info of a functional call, or a result of
        ``hg.minimize``, one problem's: the last one, or the one that ``callback`` gets.

    Returns:
      ``step`` (the call of ``update`` that made it), ``outer_loss``, ``inner_loss``, ``hypergrad_norm``,
      ``skip_reason`` (the number of a ``hg.SkipReason``), ``num_skipped``, and for each linear solve
      ``solver/num_products``, ``solver/residual``, ``solver/undamped_residual``, ``solver/damping`` and
      ``solver/status``; with several solves their places come between, ``solver/0/residual``. Figures that are not
      known (NaN: the inner loss of given gradients, a residual that was not measured) are left out. Empty before the
      first outer step. Of a result of ``hg.minimize``: ``step``, the number of its last outer step from 0, and the
      last entries of its ``history`` by name; ``num_gradients`` and ``num_products`` are sums over the steps so far,
      and ``status`` is the number of a ``hg.MinimizeStatus``. Add the hyperparameters yourself, constrained.

    Raises:
      TypeError: not an info, or traced values: call it outside ``jax.jit``.
      ValueError: results of several problems.

    Reading the numbers waits for the device: call it at every outer step or less often.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner = lambda w, h, batch, key: 0.5 * jnp.sum(jnp.exp(h) * w**2 - 2 * w)
    >>> problem = hg.BilevelProblem(inner, lambda w, h, batch, key: jnp.sum(w))
    >>> fn = hg.value_and_hypergrad(hg.implicit(problem, hg.solvers.cg(2)))
    >>> found = hg.diagnostics.scalars(fn(jnp.ones(2), jnp.zeros(2), (), (), key=None)[1])
    >>> found["outer_loss"], found["solver/num_products"]
    (2.0, 1.0)
    """
    info = _checked(info)
    if isinstance(info, MinimizeResult):
        return _known(_last_step(info))
    made = int(info.step) >= 0 or float(info.hypergrad_norm) != 0 or int(info.skip_reason) != 0
    if not made:
        return {}
    found = {
        "step": info.step,
        "outer_loss": info.outer_loss,
        "inner_loss": info.inner_loss,
        "hypergrad_norm": info.hypergrad_norm,
        "skip_reason": info.skip_reason,
        "num_skipped": info.num_skipped,
    }
    solves = solves_in(info.method)
    for place, solve in enumerate(solves):
        prefix = "solver" if len(solves) == 1 else f"solver/{place}"
        found |= {f"{prefix}/{name}": value for name, value in solve._asdict().items() if np.ndim(value) == 0}
    return _known(found)


@contextlib.contextmanager
def progress(total: int, **options: Any) -> Iterator[Callable[..., None]]:
    """Open a progress bar for a training loop, in a terminal or a notebook.

    The bar shows the outer loss, the residual of the linear solve (of ``hg.minimize``: of the inner solve), skipped
    outer steps with the last reason, and seconds per outer step.

    Args:
      total: calls of ``update`` in the run.
      **options: of ``tqdm.tqdm``, e.g. ``desc="seed 0"``.

    Yields:
      ``show(info, advance=1)``: moves the bar by ``advance`` calls and shows ``info``: what ``scalars`` takes. It is a
      ``callback`` of ``hg.minimize``, with ``max_steps`` for ``total``.

    Raises:
      ImportError: tqdm is not installed.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> loss = lambda w, h, batch, key: 0.5 * jnp.sum(jnp.exp(h) * w**2 - 2 * w)
    >>> tx = hg.bilevel(hg.implicit(hg.BilevelProblem(loss, loss)), inner_optimizer=optax.sgd(0.1),
    ...                 outer_optimizer=optax.sgd(0.1))
    >>> variables = hg.BilevelParams(jnp.ones(2), jnp.zeros(2))
    >>> state = tx.init(variables)
    >>> with hg.diagnostics.progress(3, disable=True) as show:
    ...     for _ in range(3):
    ...         updates, state = tx.update(None, state, variables, inner_batch=(), outer_batch=())
    ...         show(state)
    """
    from tqdm.auto import tqdm

    last, since, pace = -1, time.perf_counter(), math.nan
    with tqdm(total=total, unit="call", **options) as bar:

        def show(info: HypergradInfo | BilevelState | MinimizeResult, advance: int = 1) -> None:
            nonlocal last, since, pace
            found = scalars(info)
            if found and found["step"] != last:
                now = time.perf_counter()
                pace = math.nan if last < 0 else now - since
                last, since = int(found["step"]), now
            shown = {}
            if found:
                shown["outer loss"] = f"{found['outer_loss']:.4g}" if "outer_loss" in found else "nan"
            residuals = [value for name, value in found.items() if name.endswith(("/residual", "inner_gradient_norm"))]
            if residuals:
                shown["residual"] = f"{max(residuals):.2g}"
            if found.get("num_skipped"):
                reason = int(found["skip_reason"])
                because = f" ({SkipReason(reason).name})" if reason else ""
                shown["skipped"] = f"{found['num_skipped']:.0f}{because}"
            if not math.isnan(pace):
                shown["s per outer step"] = f"{pace:.2g}"
            bar.set_postfix(shown, refresh=False)
            bar.update(advance)

        yield show


def _last_step(result: MinimizeResult) -> dict[str, Any]:
    if np.ndim(result.num_steps):
        fix = "Take one: jax.tree.map(lambda leaf: leaf[i], result)."
        raise ValueError(validate.message("the result of one problem", f"of {len(result.num_steps)}", fix))
    last = int(result.num_steps) - 1
    found = {name: entries[last] for name, entries in result.history._asdict().items()}
    for name in ("num_gradients", "num_products"):
        found[name] = np.sum(getattr(result.history, name))
    return {"step": last, "status": result.status, **found}


def _known(found: dict[str, Any]) -> dict[str, float]:
    numbers = {name: float(value) for name, value in found.items()}
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def _checked(info: Any) -> HypergradInfo | MinimizeResult:
    info = info.info if isinstance(info, BilevelState) else info
    if not isinstance(info, HypergradInfo | MinimizeResult):
        raise TypeError(validate.message("a HypergradInfo", validate.describe(info), "Pass state.info."))
    if any(tree.is_traced(leaf) for leaf in jax.tree.leaves(info)):
        fix = "Call it outside jax.jit, on the state that the compiled step returned."
        raise TypeError(validate.message("numbers", "traced values", fix))
    return info
