"""What a run takes, before it runs: memory by part, and what would lower it; for whole runs the time, too.

    peak per device = variables + states + batches + results + scratch memory        as XLA compiles the program

``plan`` computes nothing: its arguments may be ``jax.ShapeDtypeStruct``, with shardings or without.
``metagradient_plan`` times one segment of a metagradient, and multiplies by their number.
"""

import collections
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from hypergrad import data, stores, tree, validate
from hypergrad.drivers import _bilevel, _functional, _metagradient, _revolve
from hypergrad.estimators import Estimator
from hypergrad.problem import BilevelParams, BilevelProblem, OverfittingWarning, check_variables
from hypergrad.types import Array, Batch, Hyperparams, Key, ModelState, Params, PyTree

__all__ = ["Advice", "MemoryPlan", "MetagradientPlan", "metagradient_plan", "plan"]

_FEW_VECTORS = 6  # in scratch memory, of hg.solvers.cg(3): its own, new weights, constrained hyperparameters


class Advice(NamedTuple):
    """A change, and about how many bytes per device it saves."""

    change: str
    saves: int


class MemoryPlan(NamedTuple):
    """Bytes per device of one call, by part. ``advice`` has the largest saving first.

    Attributes:
      device_bytes: the peak: the sum of the other parts.
      per_weight: device_bytes over the number of weights on a device.
      weights: w.
      hyperparams: λ.
      inner_state: state of the inner optimizer.
      outer_state: state of the outer optimizer; 0 of a functional call.
      estimator_state: the solver's warm start (one vector by default), the basis of ``recycled_cg``, a copy of the
        weights.
      batches: the batches given, and the model state.
      activations: scratch memory that grows with the batches: activations, and their tangents. Half of it is what half
        of each batch saves. 0 where nothing grows, or where that is not known (a loss that takes one batch size only,
        one example on each device, data in a closure): ``vectors`` then has it.
      vectors: the rest of the scratch memory: the solver's vectors, the steps that an unroll keeps, new weights,
        constrained hyperparameters.
      results: memory of results that cannot take the place of a donated argument.
      advice: what to change where it is too much.
    """

    device_bytes: int
    per_weight: float
    weights: int
    hyperparams: int
    inner_state: int
    outer_state: int
    estimator_state: int
    batches: int
    activations: int
    vectors: int
    results: int
    advice: tuple[Advice, ...]

    def __str__(self) -> str:
        """Return a table of the parts, and the advice."""
        parts = {name: size for name, size in self._asdict().items() if name in self._fields[2:-1] and size > 0}
        width = len(f"{self.device_bytes:,}")
        return "\n".join(
            [
                f"{self.device_bytes:,} bytes per device, {self.per_weight:.1f} per weight",
                *(f"{size:>{width},}  {name}" for name, size in parts.items()),
                *(f"to save about {saves:,}: {change}" for change, saves in self.advice),
            ]
        )


def plan(
    driver: Any,
    variables: BilevelParams,
    *,
    inner_batch: Batch,
    outer_batch: Batch,
    inner_optimizer: Any = None,
    solve_batch: Batch = None,
    model_state: ModelState = None,
    device_bytes: int | None = None,
    extra_args: Mapping[str, Any] | None = None,
) -> MemoryPlan:
    """Compile a joint step or a hypergradient, do not run it, and return its memory by part.

    It is compiled a second time with half of each batch, which tells what grows with them.

    Args:
      driver: a ``hg.bilevel(...)``: the step is ``update`` and ``optax.apply_updates`` in one ``jax.jit`` with
        variables and state donated, and takes the gradients itself. (Without ``donate_argnums`` old and new variables
        and states are in memory together.) Or an estimator: the call is that of
        ``hg.value_and_hypergrad(estimator, inner_optimizer)``.
      variables: ``BilevelParams`` of arrays or ``jax.ShapeDtypeStruct``, whose shardings count.
      inner_batch: as of ``update`` or of the function, arrays or ``jax.ShapeDtypeStruct``.
      outer_batch: likewise.
      inner_optimizer: with an estimator: of the inner steps before the hypergradient.
      solve_batch: as of ``update``.
      model_state: of a stateful problem.
      device_bytes: a budget; with it, ``advice`` is empty where the plan fits.
      extra_args: more keywords of ``update`` by name, with a ``hg.bilevel``.

    Returns:
      A ``MemoryPlan``.

    Raises:
      TypeError: ``driver`` is neither; variables that are no ``BilevelParams``; an ``inner_optimizer`` beside a
        ``hg.bilevel``, or ``extra_args`` beside an estimator.
      ValueError: ``device_bytes`` < 1; what the driver refuses.

    Valid for the program as this version of XLA compiles it for the default backend. Memory that the process holds
    beside (other arrays, the compiler, Python) is not in it.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> loss = lambda w, h, batch, key: jnp.sum((batch @ w) ** 2) + hg.penalties.l2(w, h)
    >>> tx = hg.bilevel(hg.implicit(hg.BilevelProblem(loss, loss)), inner_optimizer=optax.adam(1e-3),
    ...                 outer_optimizer=optax.adam(1e-2))
    >>> shapes = jax.ShapeDtypeStruct((1000,), jnp.float32)
    >>> rows = jax.ShapeDtypeStruct((8, 1000), jnp.float32)
    >>> found = plan(tx, hg.BilevelParams(shapes, shapes), inner_batch=rows, outer_batch=rows)
    >>> found.weights, found.outer_state, found.advice[0].saves > 0
    (4000, 8004, True)

    Reference: ``jax.stages.Compiled.memory_analysis``.
    """
    if device_bytes is not None:
        validate.positive_int("device_bytes", device_bytes)
    variables = check_variables(jax.tree.map(_shape, variables))
    batches = jax.tree.map(_shape, (inner_batch, outer_batch, solve_batch))
    model_state, extra = jax.tree.map(_shape, (model_state, dict(extra_args or {})))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverfittingWarning)  # nothing is learned here
        program = _program(driver, inner_optimizer, variables, batches, model_state, extra)
        memory: Any = program.lower(batches).compile().memory_analysis()
        activations, half = _activations(program, batches, memory.temp_size_in_bytes)
    sizes = {name: _bytes_on_a_device(part) for name, part in program.parts.items()}
    sizes |= {
        "activations": activations or 0,
        "vectors": memory.temp_size_in_bytes - (activations or 0),
        "results": max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
    }
    count = sum(math.prod(_on_a_device(leaf)) for leaf in jax.tree.leaves(variables.params))
    total = sum(sizes.values())
    advice: tuple[Advice, ...] = ()
    if device_bytes is None or total > device_bytes:
        vector = None if activations is None else max(4 * count, sizes["weights"])  # at least float32
        advice = _advice(program, sizes, vector, half, device_bytes)
    return MemoryPlan(total, total / max(count, 1), **sizes, advice=advice)


class _Program(NamedTuple):
    """A driver's call: what it holds, by part, and how it is lowered."""

    parts: dict[str, PyTree]
    lower: Callable[[Any], jax.stages.Lowered]  # from inner, outer and solve batch
    estimator: Estimator
    windowed: bool  # whether leaves of the inner batch have a window axis


def _program(
    driver: Any,
    inner_optimizer: Any,
    variables: BilevelParams,
    batches: Any,
    model_state: ModelState,
    extra: dict[str, Any],
) -> _Program:
    if isinstance(driver, _bilevel.BilevelTransformation):
        if inner_optimizer is not None:
            fix = "Leave inner_optimizer out: hg.bilevel has its own."
            raise TypeError(validate.message("no inner_optimizer beside a hg.bilevel", "one", fix))
        return _joint_step(driver, variables, batches, model_state, extra)
    if not isinstance(driver, Estimator):
        fix = "Pass tx=hg.bilevel(...), or an estimator such as hg.implicit(problem)."
        raise TypeError(validate.message("a hg.bilevel or an estimator", validate.describe(driver), fix))
    if extra:
        fix = "Leave them out: only the update of a hg.bilevel takes more."
        raise TypeError(validate.message("no extra_args beside an estimator", ", ".join(extra), fix))
    return _hypergradient(driver, inner_optimizer, variables, batches, model_state)


def _joint_step(
    tx: _bilevel.BilevelTransformation, variables: BilevelParams, batches: Any, model_state: ModelState, extra: Any
) -> _Program:
    state = jax.eval_shape(lambda v, m: tx.init(v, model_state=m), variables, model_state)
    state = _placed(state, *variables)._replace(outer=_placed(state.outer, *reversed(variables)))

    def step(variables: BilevelParams, state: Any, batches: Any, extra: Any) -> Any:
        names = "inner_batch", "outer_batch", "solve_batch"
        updates, state = tx.update(None, state, variables, **dict(zip(names, batches, strict=True)), **extra)
        return optax.apply_updates(variables, updates), state

    parts = {
        "weights": variables.params,
        "hyperparams": variables.hyperparams,
        "inner_state": state.inner,
        "outer_state": state.outer,
        "estimator_state": state.estimator,
        "batches": (batches, extra, state.model_state),
    }

    def lower(batches: Any) -> jax.stages.Lowered:
        return jax.jit(step, donate_argnums=(0, 1)).lower(variables, state, batches, extra)

    return _Program(parts, lower, tx.estimator, tx.window > 1)


def _hypergradient(
    estimator: Estimator, inner_optimizer: Any, variables: BilevelParams, batches: Any, model_state: ModelState
) -> _Program:
    init, run = _functional.compiled(estimator, inner_optimizer)
    model_state, key = () if model_state is None else model_state, jax.eval_shape(lambda: jax.random.key(0))
    state = _placed(jax.eval_shape(init, variables, key, model_state), *variables)
    parts = {
        "weights": variables.params,
        "hyperparams": variables.hyperparams,
        "inner_state": (),
        "outer_state": (),
        "estimator_state": state,
        "batches": (batches, model_state),
    }

    def lower(batches: Any) -> jax.stages.Lowered:
        inner_batch, outer_batch, solve_batch = batches
        return jax.jit(run).lower(variables, inner_batch, outer_batch, key, state, model_state, solve_batch)

    return _Program(parts, lower, estimator, inner_optimizer is not None)


def _activations(program: _Program, batches: Any, scratch: int) -> tuple[int | None, int]:
    """Return the scratch memory that grows with the batches, and what half of each saves; (None, 0) if not known."""
    inner, outer, solve = batches
    stacked = isinstance(solve, data.FreshBatches)
    try:
        halved = _half(inner, int(program.windowed)), _half(outer, 0), _half(solve, int(stacked))
        if halved == batches:  # one example in each, or on each device, or data in the losses alone
            return None, 0
        memory: Any = program.lower(halved).compile().memory_analysis()
    except Exception:  # whatever a loss raises that takes no other batch
        return None, 0
    saved = min(max(0, scratch - memory.temp_size_in_bytes), scratch // 2)
    return 2 * saved, saved + _bytes_on_a_device(batches) - _bytes_on_a_device(halved)


def _half(batch: Batch, axis: int) -> Batch:
    """Return a batch of half as many examples on each device, or one.

    Leaves may have other axes in place of that of the examples: those are cut that hold the most elements.
    """
    is_part = lambda part: isinstance(part, data.IndexedBatch)  # noqa: E731
    elements: collections.Counter[int] = collections.Counter()
    for part in jax.tree.leaves(batch, is_leaf=is_part):
        leaf = part.indices if is_part(part) else part
        if len(jnp.shape(leaf)) > axis:
            elements[leaf.shape[axis]] += math.prod(leaf.shape)
    examples = max(elements, key=elements.__getitem__, default=0)

    def cut(part: Any) -> Any:
        leaf = part.indices if is_part(part) else part
        if len(jnp.shape(leaf)) <= axis or leaf.shape[axis] != examples:
            return part
        here = _on_a_device(leaf)[axis]
        shape = (*leaf.shape[:axis], -(-here // 2) * (examples // here), *leaf.shape[axis + 1 :])
        shorter: Any = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)
        return part._replace(indices=shorter) if is_part(part) else shorter

    return jax.tree.map(cut, batch, is_leaf=is_part)


def _advice(
    program: _Program, sizes: dict[str, int], vector: int | None, half: int, budget: int | None
) -> tuple[Advice, ...]:
    """Return what would save at least a fiftieth, the largest saving first.

    ``vector`` has the bytes of a vector like the weights; None where it is not known what the vectors take. ``half``
    is what half of each batch saves.
    """
    change = "learn fewer hyperparameters, e.g. one per group"
    found = [Advice(change, sizes["hyperparams"] + sizes["outer_state"])]
    outer_states = jax.tree.leaves(program.parts["outer_state"], is_leaf=_is_adam)
    first_moments = [adam.mu for adam in outer_states if _is_adam(adam)]
    wide = [leaf for leaf in jax.tree.leaves(first_moments) if leaf.dtype == jnp.float32]
    if wide:
        change = "keep the first moment of the outer optimizer in bfloat16: optax.adam(rate, mu_dtype=jnp.bfloat16)"
        found.append(Advice(change, _bytes_on_a_device(wide) // 2))
    change = "halve the batches, use hg.microbatched, or put jax.checkpoint around parts of the model"
    found.append(Advice(change, half))
    state = sizes["estimator_state"]
    more = 0 if vector is None else max(0, sizes["vectors"] - _FEW_VECTORS * vector)
    if program.estimator.unknowns is not None:
        change = "take a solver that keeps less: hg.solvers.cg(3, relative_damping=0.01) has no warm start and no basis"
        found.append(Advice(change, state + more))
    elif more:
        change = "halve the window of hg.unrolled, the hyperparameters of hg.forward, or num_pairs of hg.evolution"
        found.append(Advice(change, (state + more) // 2))
    total, whole = sum(sizes.values()), sizes["batches"] + sizes["activations"]
    found = [advice for advice in found if advice.saves >= total / 50]
    shared, devices = total - whole, 2
    while budget is not None and whole + shared / devices > budget > whole:
        devices *= 2
    change = f"shard weights, hyperparameters and states over {devices} times the devices: jax.sharding.NamedSharding"
    beyond = budget is not None and budget <= whole
    if beyond:
        change += f" (not enough alone: batches and activations take {whole:,})"
    if beyond or shared >= total / 25:
        found.append(Advice(change, shared - shared // devices))
    return tuple(sorted(found, key=lambda advice: -advice.saves))


def _is_adam(x: Any) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def _shape(x: Any) -> Any:
    """Return the shape, the dtype and the sharding of a leaf that is a number."""
    if isinstance(x, jax.ShapeDtypeStruct) or not tree.is_number(x):
        return x
    placed = x.sharding if isinstance(x, jax.Array) and not tree.is_traced(x) else None
    if placed is not None and len(placed.device_set) == 1:
        placed = None  # it goes where the others are
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=placed)


def _placed(state: PyTree, *variables: PyTree) -> PyTree:
    """Return shapes of a state, each with the sharding of the variable that it is of, as ``init`` gives it.

    That is the first of the same shape whose path ends the path of the leaf; where none does, the first of that shape.
    A leaf may have an axis more in front, as that of the vectors of a basis.
    """
    known: dict[Any, Any] = {}
    for path, leaf in itertools.chain.from_iterable(map(jax.tree.leaves_with_path, variables)):
        known.setdefault((path, leaf.shape), leaf.sharding)
        known.setdefault(leaf.shape, leaf.sharding)

    def placed(path: tuple[Any, ...], leaf: Any) -> Any:
        sharding = None
        for shape in (leaf.shape, leaf.shape[1:]):
            ends = [(path[start:], shape) for start in range(len(path) + 1)]
            sharding = next((known[end] for end in [*ends, shape] if end in known), None)
            if sharding is not None:
                break
        if isinstance(sharding, NamedSharding) and shape != leaf.shape:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map_with_path(placed, state)


def _on_a_device(leaf: Any) -> tuple[int, ...]:
    return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)


def _bytes_on_a_device(part: PyTree) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(part) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(math.prod(_on_a_device(leaf)) * leaf.dtype.itemsize for leaf in leaves)


class MetagradientPlan(NamedTuple):
    """What a metagradient would take. Times are those of this machine, as it is now.

    Attributes:
      segment: steps per segment.
      slots: states that the store may keep.
      num_segments: n.
      num_repeats: r, how often a segment runs forward at most before it is differentiated.
      num_forward: segments that run forward in all, without those that are differentiated.
      forward_seconds: of one segment of full length.
      reverse_seconds: of one segment of full length that is differentiated.
      seconds: of all, without compilation, and without the transfers and files of the store.
      device_bytes: the peak on the device: arguments, results and scratch memory of a differentiated segment, the first
        state, and what the store keeps there. Memory of the compiler is not in it.
      host_bytes: of the states kept in host memory.
      disk_bytes: of the files.
    """

    segment: int
    slots: int
    num_segments: int
    num_repeats: int
    num_forward: int
    forward_seconds: float
    reverse_seconds: float
    seconds: float
    device_bytes: int
    host_bytes: int
    disk_bytes: int

    @property
    def forward_equivalents(self) -> float:
        """The time of all, in segments that run forward."""
        return self.seconds / self.forward_seconds

    def __str__(self) -> str:
        """Return the plan in two lines."""
        return (
            f"{self.num_segments:,} segments of up to {self.segment:,} steps, {self.slots:,} slots: "
            f"{self.num_forward:,} segments run forward, about {self.seconds:.3g} s\n"
            f"{self.device_bytes:,} bytes on the device, {self.host_bytes:,} on the host, {self.disk_bytes:,} in files"
        )


def metagradient_plan(
    problem: BilevelProblem,
    inner_optimizer: Any,
    *,
    batch_at: Callable[[Array], Batch],
    num_steps: int,
    segment: int = 50,
    store: stores.Store = stores.host(),  # noqa: B008
    evaluate_at: Sequence[int] | None = None,
) -> Callable[..., MetagradientPlan]:
    """Return a function that predicts the memory and the time of a metagradient, from one segment of it.

    ``fn(params, hyperparams, outer_batch, *, key, model_state=None, device_bytes=None) -> MetagradientPlan``

    seconds = (r n − C(s + r, r − 1)) · seconds forward + n · seconds reverse, with n segments of one length and s
    slots. A shorter segment counts in proportion to its length. The outer losses are added.

    Args:
      problem: all arguments are as in ``metagradient``. No file is written.
      inner_optimizer: an optax transformation, or a function of the constrained hyperparameters.
      batch_at: batch of a step.
      num_steps: T.
      segment: steps per segment; with a budget, the longest tried.
      store: where states are kept; with a budget, the most slots tried.
      evaluate_at: steps at which the outer loss is taken.

    Returns:
      The function. ``device_bytes`` is a budget for the peak: it tries shorter segments, each half as long as the one
      before, and fewer slots of ``hg.stores.device``, until the run fits. Among the plans that fit, it returns the one
      with the fewest forward steps. Then pass ``segment=plan.segment`` and, on the device,
      ``store=hg.stores.device(plan.slots)`` to ``metagradient``.

    Raises:
      TypeError: as ``metagradient``.
      ValueError: as ``metagradient``; or ``device_bytes`` below what one step and one slot take.

    Valid if all steps take about as long as those of the longest segment, which is timed. On a shared machine times
    vary.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> loss = lambda w, target, batch, key: 0.5 * jnp.sum((w - target) ** 2)
    >>> problem = hg.BilevelProblem(loss, lambda w, target, batch, key: jnp.sum(w))
    >>> fn = metagradient_plan(problem, optax.sgd(0.5), batch_at=lambda i: (), num_steps=1000, segment=10)
    >>> plan = fn(jnp.zeros(1), jnp.ones(1), (), key=None)
    >>> plan.num_segments, plan.num_repeats, plan.num_forward
    (100, 3, 222)

    Reference: Griewank & Walther 2000.
    """
    settings = problem, inner_optimizer, batch_at, num_steps
    first = _metagradient.Run(*settings, segment, store, evaluate_at)

    def fn(
        params: Params,
        hyperparams: Hyperparams,
        outer_batch: Batch,
        *,
        key: Key,
        model_state: ModelState = None,
        device_bytes: int | None = None,
    ) -> MetagradientPlan:
        if device_bytes is not None:
            validate.positive_int("device_bytes", device_bytes)
        given = params, hyperparams, outer_batch, key, model_state
        run = first
        found: list[tuple[int, int, int, int, _metagradient.Run]] = []  # steps forward, the order, bytes, slots
        while True:
            call = _metagradient.Call(run, *given)
            used, of_a_state = _peak(call), _bytes_on_a_device(jax.tree.map(_shape, call.start))
            slots = min(store.slots, run.num_segments)
            if store.where != "device":
                of_a_state = 0
            elif device_bytes is not None:
                slots = min(slots, 1 + (device_bytes - used) // of_a_state)
            needed = used + (slots - 1) * of_a_state
            if device_bytes is None or (slots > 0 and needed <= device_bytes):
                found.append((_steps_forward(run, slots), len(found), needed, slots, run))
            if run.segment == 1 or (found and slots in (store.slots, run.num_segments)):
                break
            run = _metagradient.Run(*settings, run.segment // 2, store, evaluate_at)
        if not found:
            fix = "Shard the weights, or take smaller batches."
            got = f"{used:,} for segments of one step and one slot"
            raise ValueError(validate.message(f"a metagradient in {device_bytes:,} bytes", got, fix))
        *_, needed, slots, run = min(found)
        slots = store.slots if slots == run.num_segments else slots
        return _planned(_metagradient.Call(run, *given, store._replace(slots=slots)), needed)

    return fn


def _longest(call: _metagradient.Call) -> int:
    """Return the number of the longest segment; of several, the first."""
    return max(range(call.run.num_segments), key=call.run.length)


def _steps_forward(run: _metagradient.Run, slots: int) -> int:
    """Return how many steps run forward, without those that are differentiated."""
    parts = (action for action in _revolve.schedule(run.num_segments, slots) if action.kind == "forward")
    return sum(run.boundaries[action.to] - run.boundaries[action.at] for action in parts)


def _peak(call: _metagradient.Call) -> int:
    """Return the bytes on a device of a segment that is differentiated, as compiled, and of the first state."""
    run = call.run
    settings, *rest = call.reverse_arguments(call.start, _longest(call), call.blank)
    memory: Any = run.reverse.lower((settings[0], True), *rest).compile().memory_analysis()
    # Results take the place of donated arguments.
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    first = 0 if run.num_segments == 1 else _bytes_on_a_device(jax.tree.map(_shape, call.start))  # of one: an argument
    return used + first - memory.alias_size_in_bytes


def _planned(call: _metagradient.Call, device_bytes: int) -> MetagradientPlan:
    """Time a segment, and count."""
    run, store, number, on_disk, progress = call.run, call.store, _longest(call), call.num_bytes_kept, call.blank

    def seconds(fn: Callable[[], Any]) -> float:
        times = []
        for _ in range(4):  # the first compiles
            begun = time.perf_counter()
            jax.block_until_ready(fn())
            times.append(time.perf_counter() - begun)
        return min(times[1:])

    def reverse(evaluates: bool) -> Any:
        nonlocal progress
        (length, _), *rest = call.reverse_arguments(call.start, number, progress)
        progress, finite = run.reverse((length, evaluates), *rest)
        return finite

    one = seconds(lambda: run.forward(*call.forward_arguments(call.start, number)))
    evaluating = seconds(lambda: reverse(True))
    back = evaluating if len(run.evaluate_at) == run.num_segments else seconds(lambda: reverse(False))
    steps = _steps_forward(run, store.slots) * one + run.boundaries[-1] * back
    return MetagradientPlan(
        segment=run.segment,
        slots=store.slots,
        num_segments=run.num_segments,
        num_repeats=_revolve.num_repeats(run.num_segments, store.slots),
        num_forward=_revolve.num_forward(run.num_segments, store.slots),
        forward_seconds=one,
        reverse_seconds=back,
        seconds=steps / run.length(number) + len(run.evaluate_at) * max(0.0, evaluating - back),
        device_bytes=device_bytes,
        host_bytes=call.num_bytes_of_states if store.where == "host" else 0,
        disk_bytes=on_disk if store.where == "directory" else 0,
    )
