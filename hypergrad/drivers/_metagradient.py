"""Metagradients: the exact gradient of the outer loss after a whole training run.

    w_T(λ) by T steps of the inner optimizer,        d mean_j L_out(w_{t_j}(λ), λ) / dλ

The run is cut into segments. A few of their first states are kept; the others are computed again, by a binomial
schedule, and each segment is differentiated by itself, from the last to the first. Memory does not grow with T.

Reference: Engstrom et al., Optimizing ML training with metagradient descent, arXiv 2503.13751; Griewank & Walther,
Algorithm 799: revolve, 2000.
"""

import dataclasses
import enum
import functools
import hashlib
import re
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hypergrad import data, dataflow, stores, tree, validate
from hypergrad.drivers import _revolve
from hypergrad.estimators import least_memory, unrolled
from hypergrad.problem import (
    BilevelParams,
    BilevelProblem,
    check_model_state,
    check_problem,
    check_variables,
    refuse_response,
    warn_of_overfitting,
)
from hypergrad.training import Context, Keys, Trained, outer_loss_fn, resolve_optimizer, split_keys, train
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree

__all__ = ["Call", "MetagradientInfo", "MetagradientStatus", "Run", "metagradient"]


class MetagradientStatus(enum.IntEnum):
    """How a metagradient ended.

    Attributes:
      FINISHED: value and hypergradient are finite.
      TRAINING: training reached weights, optimizer state or a loss that is not finite.
      OUTER_LOSS: the outer loss, or its gradient, is not finite.
      COTANGENT: on the way back the derivative in the state stopped being finite: the run is too rough to be
        differentiated. Take smaller learning rates, larger batches or a smoother model.
    """

    FINISHED = 0
    TRAINING = 1
    OUTER_LOSS = 2
    COTANGENT = 3


class MetagradientInfo(NamedTuple):
    """Diagnostics of a metagradient. ``params`` and ``params_grad`` are on the device, the rest on the host.

    Attributes:
      status: a ``MetagradientStatus``. Unless it is FINISHED, the hypergradient is NaN.
      at_step: the end of the segment in which training or the outer loss stopped being finite; the start of that in
        which the cotangent did; the last of ``evaluate_at`` where all is finite.
      outer_losses: (J,), at each of ``evaluate_at``; NaN where the run did not come to it.
      boundaries: (n + 1,) int, the steps at which segments begin, and the last of ``evaluate_at``.
      cotangent_norms: (n + 1,), ‖d value / d(w, s)‖ at each boundary, w the weights and s optimizer and model state.
        Where it grows by a constant factor from one to the one before, training is chaotic, and the gradient says
        little about other λ than this one.
      params: weights at the last of ``evaluate_at``.
      params_grad: d value / d params, at the weights that the run began with.
      num_forward: segments that ran forward in this call, without those that were differentiated.
      seconds: of this call.
      bytes_moved: by the store, in this call.
    """

    status: MetagradientStatus
    at_step: int
    outer_losses: np.ndarray
    boundaries: np.ndarray
    cotangent_norms: np.ndarray
    params: Params
    params_grad: Params
    num_forward: int
    seconds: float
    bytes_moved: int


class _Progress(NamedTuple):
    """What the way back has gathered so far."""

    cotangent: list[Array]  # of the floating leaves of the state
    hypergrad: Hyperparams
    outer_losses: Array
    norms: Array
    params: Params  # at the last evaluation


def metagradient(
    problem: BilevelProblem,
    inner_optimizer: Any,
    *,
    batch_at: Callable[[Array], Batch],
    num_steps: int,
    segment: int = 50,
    store: stores.Store = stores.host(),  # noqa: B008
    evaluate_at: Sequence[int] | None = None,
) -> Callable[..., tuple[tuple[Array, Hyperparams], MetagradientInfo]]:
    """Return a function that trains T steps and differentiates the outer loss through all of them.

    ``fn(params, hyperparams, outer_batch, *, key, model_state=None, store=None) -> ((value, hypergrad), info)``

    value = mean_j L_out(w_{t_j}(λ), λ); hypergrad = d value / dλ, where λ may act through the loss (weights of
    examples, decays, augmentation), the optimizer (a learning rate per step), or the batches' contents.

    Args:
      problem: over plain weights; losses differentiable in weights and hyperparameters, the inner one twice.
      inner_optimizer: an optax transformation, or a function of the constrained hyperparameters that returns one.
      batch_at: ``batch_at(i) -> batch`` of step i, a pure function of a traced int32; ``hg.IndexedBatch`` or arrays.
      num_steps: T ≥ 1.
      segment: steps per segment. One segment at a time is differentiated in memory, with about 2 √segment copies of
        weights, optimizer state and gradient.
      store: of the states that are kept: ``hg.stores.host(10)``, ``device``, or ``directory``, which can resume. Over
        several processes: ``device``.
      evaluate_at: increasing numbers of steps in 1 … T at which the outer loss is taken; None: (T,). The run ends at
        the last. A segment ends at each of them: segments of another length are compiled again.

    Returns:
      The function. ``store`` of a call takes the place of the one given here: each call of one compiled function may
      have a directory of its own. Step i uses ``fold_in(k, i)`` with k the first of ``jax.random.split(key, 5)``, as
      one unroll of the whole run does. The outer loss uses the second, or ``fold_in(second, j)`` at the j-th of
      several. The optimizer state is fresh, and its dependence on λ is differentiated. With n segments and s slots,
      r n − C(s + r, r − 1) segments run forward, where C(s + r, s) ≥ n; all n are differentiated. It runs as a Python
      loop over compiled segments: call it outside of ``jax.jit``.

    Raises:
      TypeError: arguments of another kind; at the call, traced arguments, or a ``batch_at`` that does not take a traced
        step.
      ValueError: numbers out of range, a problem with a response; at the call what ``hg.unrolled`` refuses: Adam
        without ``eps_root``, a hyperparameter without effect; weights that several processes share, in another store
        than ``device``. What ``store`` refuses.

    Exact, to rounding. Useful where training is smooth: see ``info.cotangent_norms``.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> inner = lambda w, target, batch, key: 0.5 * jnp.sum((w - target) ** 2)
    >>> problem = hg.BilevelProblem(inner, lambda w, target, batch, key: jnp.sum(w))
    >>> fn = metagradient(problem, optax.sgd(0.5), batch_at=lambda i: (), num_steps=3, segment=1)
    >>> (value, grad), info = fn(jnp.zeros(1), jnp.ones(1), (), key=None)
    >>> float(value), grad.tolist(), info.status.name                        # w_3 = (1 − ½³) target
    (0.875, [0.875], 'FINISHED')

    Reference: Engstrom et al., arXiv 2503.13751; Griewank & Walther 2000.
    """
    run = Run(problem, inner_optimizer, batch_at, num_steps, segment, store, evaluate_at)

    def fn(
        params: Params,
        hyperparams: Hyperparams,
        outer_batch: Batch,
        *,
        key: Key,
        model_state: ModelState = None,
        store: stores.Store | None = None,
    ) -> tuple[tuple[Array, Hyperparams], MetagradientInfo]:
        return Call(run, params, hyperparams, outer_batch, key, model_state, store).result()

    return fn


class Run:
    """What all calls of one ``metagradient`` share: checked settings, and compiled segments."""

    def __init__(
        self,
        problem: BilevelProblem,
        inner_optimizer: Any,
        batch_at: Any,
        num_steps: Any,
        segment: Any,
        store: Any,
        evaluate_at: Any,
    ) -> None:
        check_problem(problem)
        refuse_response("metagradient", problem)
        if not callable(batch_at):
            fix = "Pass a function of the step number, e.g. lambda i: hg.IndexedBatch(data, rows[i])."
            raise TypeError(validate.message("batch_at to be callable", validate.describe(batch_at), fix))
        self.num_steps = validate.positive_int("num_steps", num_steps)
        self.segment = min(validate.positive_int("segment", segment), self.num_steps)
        self.evaluate_at = _evaluations(evaluate_at, self.num_steps)
        self.store, self.inner_optimizer = _checked_store(store), inner_optimizer
        last = self.evaluate_at[-1]
        self.boundaries = sorted({*range(0, last, self.segment), *self.evaluate_at})

        @functools.wraps(problem.inner_loss)
        def at_step(params: Params, hyperparams: Hyperparams, step: Array, *rest: Any) -> Any:
            return problem.inner_loss(params, hyperparams, data.gathered(_batch(batch_at, step)), *rest)

        self.problem = dataclasses.replace(problem, inner_loss=at_step)
        self.forward = jax.jit(self._forward, static_argnums=0)
        self.reverse = jax.jit(self._reverse, static_argnums=0, donate_argnums=6)
        self.end = jax.jit(self._end)
        self.checked = jax.jit(self._checked)

    @property
    def num_segments(self) -> int:
        return len(self.boundaries) - 1

    def length(self, number: int) -> int:
        return self.boundaries[number + 1] - self.boundaries[number]

    def context(
        self, hyperparams: Hyperparams, start: Trained, keys: Keys, first: Any, length: int, outer: Any
    ) -> Context:
        steps = jnp.asarray(first, jnp.int32) + jnp.arange(length, dtype=jnp.int32)
        return Context(self.problem, hyperparams, start, start, steps, outer, keys, self.inner_optimizer)

    def _optimizer(self, hyperparams: Hyperparams) -> Any:
        return resolve_optimizer(self.inner_optimizer, self.problem.constrain(hyperparams))

    def begin(self, variables: BilevelParams, model_state: ModelState) -> Trained:
        """Return the first state. Not compiled: XLA would put moments, which are zeros, whole on each device."""
        params, hyperparams = variables
        start = Trained(params, self._optimizer(hyperparams).init(params), model_state, ())
        return tree.strip_weak_types(start)

    def _end(self, variables: BilevelParams, cotangent: list[Array]) -> BilevelParams:
        """Return the cotangents that reach weights and λ through the first state."""
        model_state = ()  # of the start: given, and not differentiated

        def floats(variables: BilevelParams) -> list[Array]:
            params, inner_state, *_ = self.begin(variables, model_state)
            return tree.split_floating((params, inner_state))[0]

        states, back = jax.vjp(floats, variables)
        return back(cotangent[: len(states)])[0]

    def _steps(
        self, length: int, at: Trained, hyperparams: Hyperparams, keys: Keys, first: Any, **options: Any
    ) -> Trained:
        ctx = self.context(hyperparams, at, keys, first, length, None)
        return train(ctx, hyperparams=hyperparams, first_step=first, **options)

    def _forward(
        self, length: int, at: Trained, hyperparams: Hyperparams, keys: Keys, first: Array
    ) -> tuple[Trained, Array]:
        """Return the state after a segment, and whether it is finite."""
        reached = self._steps(length, at._replace(inner_loss=jnp.nan), hyperparams, keys, first)
        finite = jnp.isfinite(reached.inner_loss) & ~tree.newly_bad(reached[:3], at[:3])
        return reached._replace(inner_loss=()), finite

    def _reverse(
        self,
        settings: tuple[int, bool],
        at: Trained,
        hyperparams: Hyperparams,
        keys: Keys,
        first: Array,
        outer_batch: Batch,
        before: _Progress,
        number: Array,
        evaluation: Array,
    ) -> tuple[_Progress, Array]:
        """Return what is gathered after a segment, and whether training, outer loss and cotangent are finite."""
        length, evaluates = settings
        floats, restore = tree.split_floating(at._replace(inner_loss=()))
        options: dict[str, Any] = {"mixed": True, "checkpoint_every": least_memory(length)}

        def segment(floats: list[Array], hyperparams: Hyperparams) -> tuple[list[Array], tuple[Trained, Array]]:
            start = restore(floats)._replace(inner_loss=jnp.nan)
            reached = self._steps(length, start, hyperparams, keys, first, **options)
            loss = lax.stop_gradient(reached.inner_loss)
            reached = reached._replace(inner_loss=())
            return tree.split_floating(reached)[0], (lax.stop_gradient(reached), loss)

        ends, back, (reached, loss) = jax.vjp(segment, floats, hyperparams, has_aux=True)
        cotangent, hypergrad, losses, norms, params = before
        outer_finite = jnp.array(True)
        if evaluates:
            restored = tree.split_floating(reached)[1]
            count = len(self.evaluate_at)
            if keys.outer is not None and count > 1:
                keys = keys._replace(outer=jax.random.fold_in(keys.outer, evaluation))
            ctx = self.context(hyperparams, reached, keys, first, length, outer_batch)

            def outer(ends: list[Array], hyperparams: Hyperparams) -> Array:
                here = restored(ends)
                return outer_loss_fn(ctx._replace(at=here))(here.params, hyperparams)[0]

            value, (slopes, direct) = jax.value_and_grad(outer, argnums=(0, 1))(ends, hyperparams)
            outer_finite = jnp.isfinite(value) & tree.all_finite((slopes, direct))
            cotangent = [c + (g / count).astype(c.dtype) for c, g in zip(cotangent, slopes, strict=True)]
            hypergrad = jax.tree.map(lambda a, g: a + g.astype(a.dtype) / count, hypergrad, direct)
            losses = losses.at[evaluation].set(value.astype(losses.dtype))
            params = optax.tree.where(evaluation == count - 1, reached.params, params)
            norms = norms.at[number + 1].set(tree.scaled_norm(cotangent).astype(norms.dtype))
        trained = jnp.isfinite(loss) & ~tree.newly_bad(reached[:3], at[:3])
        cotangent, through = back(cotangent)
        hypergrad = jax.tree.map(lambda a, g: a + g.astype(a.dtype), hypergrad, through)
        finite = jnp.stack([trained, outer_finite, tree.all_finite((cotangent, through))])
        norms = norms.at[number].set(tree.scaled_norm(cotangent).astype(norms.dtype))
        return _Progress(cotangent, hypergrad, losses, norms, params), finite

    def _checked(self, hyperparams: Hyperparams, start: Trained, keys: Keys, outer_batch: Batch) -> Any:
        take_steps = unrolled(self.problem).train
        assert take_steps is not None
        fresh = start._replace(inner_state=None, inner_loss=jnp.nan)
        ctx = self.context(hyperparams, fresh, keys, 0, self.boundaries[-1], outer_batch)
        return take_steps((), ctx)[2]

    def check(self, *given: Any) -> None:
        """Refuse what ``hg.unrolled`` refuses, once for arrays of the same shapes, and without computing anything."""
        self.checked.eval_shape(*given)


class Call:
    """One call: the loop over the schedule."""

    def __init__(
        self,
        run: Run,
        params: Params,
        hyperparams: Hyperparams,
        outer_batch: Batch,
        key: Key,
        model_state: ModelState,
        store: stores.Store | None = None,
    ) -> None:
        self.begun = time.perf_counter()
        self.run, self.outer_batch = run, outer_batch
        self.store = run.store if store is None else _checked_store(store)
        if any(map(tree.is_traced, jax.tree.leaves((params, hyperparams, outer_batch, key, model_state)))):
            fix = "Call it outside of jax.jit, jax.vmap and jax.grad: it is a loop over compiled segments."
            raise TypeError(validate.message("concrete arguments of a metagradient", "traced ones", fix))
        arrays = jax.tree.map(jnp.asarray, BilevelParams(params, hyperparams))
        self.variables = check_variables(tree.strip_weak_types(arrays))
        self.keys = split_keys(validate.as_key(key))
        self.model_state = check_model_state(run.problem, model_state)
        given = self.variables, self.model_state
        self.start = tree.beside(run.begin(*given), given)
        if self.store.where != "device" and not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(self.start)):
            fix = "Pass store=hg.stores.device(slots=10): each device keeps its own part."
            got = "weights or optimizer state that several processes share"
            raise ValueError(validate.message(f"states that one process can keep in the {self.store.where}", got, fix))
        run.check(self.variables.hyperparams, self.start, self.keys, outer_batch)
        warn_of_overfitting(run.problem, self.variables.hyperparams, outer_batch)
        self.num_forward = 0
        self.blank = self._blank()

    def _blank(self) -> _Progress:
        hyperparams = self.variables.hyperparams
        floats = [jnp.zeros_like(x) for x in tree.split_floating(self.start)[0]]
        dtype = tree.wider(*(x.dtype for x in floats))
        losses, norms = jnp.zeros(len(self.run.evaluate_at), dtype), jnp.full(self.run.num_segments + 1, -1, dtype)
        params = optax.tree.zeros_like(self.variables.params)
        blank = _Progress(floats, tree.promoted_zeros_like(hyperparams), losses, norms, params)
        return tree.beside(blank, (self.start, self.variables, self.outer_batch))

    def _about(self) -> dict[str, Any]:
        """Return what tells this run from others, by name."""
        run = self.run
        arguments = self.reverse_arguments(self.start, run.num_segments - 1, self.blank)  # one that evaluates
        program = jax.make_jaxpr(run.reverse, static_argnums=0)(*arguments)
        forms = lambda part: [f"{leaf.dtype}{list(leaf.shape)}" for leaf in map(jnp.asarray, jax.tree.leaves(part))]  # noqa: E731
        return {
            "num_steps": run.num_steps,
            "segment": run.segment,
            "evaluate_at": list(run.evaluate_at),
            "shapes of params": forms(self.variables.params),
            "shapes of hyperparams": forms(self.variables.hyperparams),
            "shapes of the optimizer state": forms(self.start.inner_state),
            "values of the optimizer state": _digest(self.start.inner_state),
            "values of params": _digest(self.variables.params),
            "values of hyperparams": _digest(self.variables.hyperparams),
            "values of model_state": _digest(self.model_state),
            "values of outer_batch": _digest(self.outer_batch),
            "key": _digest(self.keys),
            "losses, batch_at and optimizer, as traced": _digest(re.sub(r"0x[0-9a-f]+", "", str(program))),
            "data, and other constants of losses, batch_at and optimizer": _digest(dataflow.constants(program)),
        }

    def result(self) -> tuple[tuple[Array, Hyperparams], MetagradientInfo]:
        """Follow the schedule from where an earlier call stopped, if one did."""
        run, actions = self.run, list(_revolve.schedule(self.run.num_segments, self.store.slots))
        self.kept = self.store.open(self._about)
        position, progress = self._resumed()
        if position < len(actions):
            self.kept.reserve(self.num_bytes_kept)
        del self.blank  # donated, or not needed any more
        here: Trained | None = self.start if position == 0 else None
        if position and actions[position - 1].kind == "keep":
            here = self._restored(actions[position - 1].at, actions[:position])
        status, at_step = MetagradientStatus.FINISHED, run.boundaries[-1]
        for index in range(position, len(actions)):
            kind, at, to = actions[index]
            if kind == "restore":
                here = self._restored(at, actions[:index])
            elif kind == "drop":
                self.kept.drop(at)
            elif kind == "keep":
                self.kept.put(at, here)
                self.kept.record(index + 1, None)
            elif kind == "forward":
                assert here is not None
                here, bad = self._run_on(here, at, to)
                if bad is not None:
                    status, at_step = MetagradientStatus.TRAINING, run.boundaries[bad + 1]
                    break
            else:
                progress, found = run.reverse(*self.reverse_arguments(here, at, progress))
                finite = np.asarray(found)
                if not finite.all():
                    status = list(MetagradientStatus)[1 + int(np.argmin(finite))]
                    at_step = run.boundaries[at if status == MetagradientStatus.COTANGENT else at + 1]
                    break
                self.kept.record(index + 1, progress)
        return self._finished(progress, status, at_step)

    def _resumed(self) -> tuple[int, _Progress]:
        try:
            return self.kept.resume(self.blank)
        except stores.DamagedError as damage:
            warnings.warn(f"{damage}: the run begins again.", stacklevel=4)
            return 0, self.blank

    @property
    def num_bytes_of_states(self) -> int:
        """What the store holds at most of states: those beside the first."""
        return (min(self.store.slots, self.run.num_segments) - 1) * tree.num_bytes(self.start)

    @property
    def num_bytes_kept(self) -> int:
        """What the store holds at most: states, and two of what is gathered."""
        return self.num_bytes_of_states + 2 * tree.num_bytes(self.blank)

    def _restored(self, at: int, done: Sequence[_revolve.Action]) -> Trained:
        """Return the state at a boundary; where it is damaged, run on from the one kept before it."""
        if at == 0:
            return self.start
        try:
            return self.kept.get(at, self.start)
        except stores.DamagedError as damage:
            before = max({0, *(number for number in _live(done) if number < at)})
            warnings.warn(f"{damage}: it is computed again from step {self.run.boundaries[before]}.", stacklevel=4)
            state, _ = self._run_on(self._restored(before, done), before, at)
            self.kept.put(at, state)
            return state

    def _run_on(self, state: Trained, at: int, to: int) -> tuple[Trained, int | None]:
        """Return the state after segments, and the first of them that is not finite."""
        run = self.run
        for number in range(at, to):
            state, finite = run.forward(*self.forward_arguments(state, number))
            self.num_forward += 1
            if not bool(finite):
                return state, number
        return state, None

    def forward_arguments(self, state: Trained, number: int) -> tuple[Any, ...]:
        """Return what ``Run.forward`` takes for a segment."""
        first = jnp.asarray(self.run.boundaries[number], jnp.int32)
        return self.run.length(number), state, self.variables.hyperparams, self.keys, first

    def reverse_arguments(self, state: Trained | None, number: int, progress: _Progress) -> tuple[Any, ...]:
        """Return what ``Run.reverse`` takes for a segment."""
        run, end = self.run, self.run.boundaries[number + 1]
        evaluates = end in run.evaluate_at
        numbers = run.boundaries[number], number, run.evaluate_at.index(end) if evaluates else 0
        first, *places = (jnp.asarray(x, jnp.int32) for x in numbers)
        rest = self.variables.hyperparams, self.keys, first, self.outer_batch, progress, *places
        return (run.length(number), evaluates), state, *rest

    def _finished(
        self, progress: _Progress, status: MetagradientStatus, at_step: int
    ) -> tuple[tuple[Array, Hyperparams], MetagradientInfo]:
        ends = self.run.end(self.variables, progress.cotangent)
        hyperparams = self.variables.hyperparams
        hypergrad = jax.tree.map(
            lambda a, g, h: (a + g).astype(h.dtype), progress.hypergrad, ends.hyperparams, hyperparams
        )
        params_grad = ends.params
        if status == MetagradientStatus.FINISHED and not bool(tree.all_finite((hypergrad, params_grad))):
            status, at_step = MetagradientStatus.COTANGENT, 0
        if status != MetagradientStatus.FINISHED:
            hypergrad, params_grad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), (hypergrad, params_grad))
        # Not with NaN from the start: jax_debug_nans would stop healthy runs.
        boundaries, norms, params = np.asarray(self.run.boundaries), np.array(progress.norms), progress.params
        measured = norms[np.searchsorted(boundaries, self.run.evaluate_at)] >= 0
        losses = np.where(measured, progress.outer_losses, np.nan)
        norms[norms < 0] = np.nan
        if not measured[-1]:
            params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
        info = MetagradientInfo(
            status,
            at_step,
            losses,
            boundaries,
            norms,
            params,
            params_grad,
            self.num_forward,
            time.perf_counter() - self.begun,
            self.kept.bytes_moved,
        )
        return (jnp.asarray(losses.mean(), progress.outer_losses.dtype), hypergrad), info


def _checked_store(store: Any) -> stores.Store:
    if not isinstance(store, stores.Store):
        fix = "Pass hg.stores.host(slots=10), device or directory."
        raise TypeError(validate.message("store to be a Store", validate.describe(store), fix))
    return store


def _batch(batch_at: Callable[[Array], Batch], step: Array) -> Batch:
    try:
        return batch_at(step)
    except (
        IndexError,
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        if isinstance(error, IndexError) and "static" not in str(error):  # of data, not of a traced slice
            raise
        fix = "Pass e.g. hg.IndexedBatch(data, jnp.asarray(rows)[i]); no NumPy array, slice or if takes a traced i."
        got = f"one that raised {type(error).__name__}"
        raise TypeError(validate.message("batch_at to take a traced step number", got, fix)) from error


def _evaluations(evaluate_at: Any, num_steps: int) -> tuple[int, ...]:
    if evaluate_at is None:
        return (num_steps,)
    entries = np.asarray(evaluate_at).tolist() if isinstance(evaluate_at, np.ndarray | jax.Array) else evaluate_at
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes):
        fix = "Pass a tuple of ints, e.g. evaluate_at=(num_steps // 2, num_steps)."
        raise TypeError(validate.message("evaluate_at to be a sequence of steps", validate.describe(evaluate_at), fix))
    found = tuple(validate.positive_int("an entry of evaluate_at", step) for step in entries)
    if not found or list(found) != sorted(set(found)) or found[-1] > num_steps:
        fix = "Pass e.g. evaluate_at=(num_steps // 2, num_steps)."
        wanted = f"evaluate_at to be increasing numbers of steps, up to {num_steps}"
        raise ValueError(validate.message(wanted, str(found), fix))
    return found


def _live(actions: Sequence[_revolve.Action]) -> set[int]:
    """Return the boundaries whose states are kept after these actions."""
    found: set[int] = set()
    for kind, at, _ in actions:
        if kind == "keep":
            found.add(at)
        if kind == "drop":
            found.discard(at)
    return found


def _digest(part: PyTree) -> str:
    """Return a checksum of the values of a tree."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(part):
        if isinstance(leaf, str):
            found.update(leaf.encode())
        else:
            found.update(np.asarray(jax.random.key_data(leaf) if tree.is_key(leaf) else leaf).tobytes())
    return found.hexdigest()
