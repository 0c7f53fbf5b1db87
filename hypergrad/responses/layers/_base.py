"""What one run of a model with self-tuning layers knows, apart from the library that the model is written in.

    y = W₀ x + b₀ + g ⊙ (W₁ x) + c ⊙ b₁,        g = V d,  c = C d

for every layer that is linear in its weights; d is the displacement of the hyperparameters, a row an example, so
that g and c hold one gate an example and output unit. A layer runs twice, with W₀ and with W₁; no example has weights
of its own.

Reference: MacKay et al., Self-tuning networks, arXiv 1903.03088.
"""

import contextlib
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import tracers
from jax import lax

from hypergrad import validate
from hypergrad.types import Array, Params


class LayerResponse(NamedTuple):
    """What the response of one layer learns.

    Attributes:
      weight: W₁, of the kernel's or embedding's shape.
      bias: b₁, of the bias's shape (the features); () for a layer without.
      gate: V, (n, *features).
      bias_gate: C, (n, *features); () for a layer without bias.
    """

    weight: Array
    bias: Any
    gate: Array
    bias_gate: Any


class Gates(NamedTuple):
    """A layer's response at the displacements of a batch, worked out before the loss runs, not in each step of a scan.

    Attributes:
      weight: W₁.
      gate: V d, (B, *features).
      shift: (C d) ⊙ b₁, (B, *features); () for a layer without bias.
    """

    weight: Array
    gate: Array
    shift: Any


class Found(NamedTuple):
    """A layer that a run came by.

    Attributes:
      weight: shape and dtype of its kernel or embedding.
      bias: of its bias, or None.
      features: shape of its outputs' trailing axes, one gate each.
      fan_in: inputs that one output sums over; for an embedding the number of its features.
    """

    weight: jax.ShapeDtypeStruct
    bias: jax.ShapeDtypeStruct | None
    features: tuple[int, ...]
    fan_in: int


@dataclasses.dataclass
class Run:
    """One trace of a loss: which gates to apply, and what was seen.

    Attributes:
      params: the weights that the loss was given; layers are found in it by their path.
      layers: response of each layer by path; None only looks for layers and fills ``found``.
      displacement: (B, n), a row an example; None where nothing differs between examples.
      linear: a scalar t ≈ 0 that multiplies all gates, whose inputs then are held fixed: for a derivative at t = 0.
      replay: outputs to return from the outermost calls, in order, in place of their own; None for their own.
      found: layers met, by path.
      outputs: what the outermost calls returned.
      gates: of each layer by path, from ``layers`` and ``displacement``.
      roots: places in ``params`` where models were found, by the very arrays ("same") or by structure ("alike").
      trace: the transformation under which the loss runs.
      apart: the outermost call under way is inside of a transformation of the loss's own.
      depth: of the call under way.
      prefix: where in ``params`` the outermost module's own weights begin; None: they are not in it.
    """

    params: Params
    layers: dict[str, LayerResponse] | None
    displacement: Array | None = None
    linear: Array | None = None
    replay: list[Any] | None = None
    found: dict[str, Found] = dataclasses.field(default_factory=dict)
    outputs: list[Any] = dataclasses.field(default_factory=list)
    gates: dict[str, Gates] = dataclasses.field(init=False)
    roots: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    trace: Any = None
    apart: bool = False
    depth: int = 0
    prefix: str | None = ""

    def __post_init__(self) -> None:
        """Work out all gates."""
        known = {} if self.layers is None or self.displacement is None else self.layers
        self.gates = {path: self._gates(layer) for path, layer in known.items()}
        self.trace = tracers.current_trace()

    def _gates(self, layer: LayerResponse) -> Gates:
        def along(gate: Array) -> Array:
            return _along(self.displacement, gate)

        shift = () if isinstance(layer.bias, tuple) else along(layer.bias_gate) * layer.bias
        return Gates(layer.weight, along(layer.gate), shift)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Count a call of a module."""
        if self.depth == 0:
            self.apart = tracers.current_trace() != self.trace
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def returned(self, output: Any) -> Any:
        """Note what an outermost call returned, and return what stands in its place."""
        if self.apart and (self.linear is not None or self.replay is not None):
            fix = "Use hg.responses.delta_stn(linearized=False), or move the model's call out of the transformation."
            wanted = "a linearised loss to call its model outside of jax.grad, jit, vmap, checkpoint, scan, …"
            raise ValueError(validate.message(wanted, "a call inside of one", fix))
        self.outputs.append(output)
        if self.replay is None:
            return output
        place = len(self.outputs) - 1
        if place >= len(self.replay):
            fix = "Call the same modules in the same order whenever the loss runs."
            raise ValueError(validate.message(f"{len(self.replay)} calls of a model", f"call {place + 1}", fix))
        return self.replay[place]

    def gates_of(self, path: str, found: Found) -> Gates | None:
        """Return a layer's gates, or None where there is nothing to add; notes that the layer was met."""
        self.found[path] = found
        return self.gates.get(path)

    def add(self, path: str, output: Array, inputs: Array, gates: Gates, again: Callable[..., Array]) -> Array:
        """Return the layer's output with its response: ``again(weight, inputs)`` is the layer without bias.

        Where the derivative at t = 0 alone is wanted, W₁ sees inputs that are held fixed: what their own displacement
        would add is of second order in t.
        """
        gate = self._beside(path, gates.gate, output)
        total = output + self._scaled(gate * again(gates.weight, self._held(inputs)))
        if isinstance(gates.shift, tuple):
            return total
        return total + self._scaled(self._beside(path, gates.shift, output))

    def add_transposed(
        self, path: str, output: Array, inputs: Array, gates: Gates, again: Callable[..., Array]
    ) -> Array:
        """Return what ``add`` does, of an embedding that is multiplied by: the gates are on its inputs."""
        inputs = self._held(inputs)
        return output + self._scaled(again(gates.weight, self._beside(path, gates.gate, inputs) * inputs))

    def _beside(self, path: str, gate: Array, output: Array) -> Array:
        """Return a gate (B, *features) in the form (B, 1, …, 1, *features) of an output (B, …, *features)."""
        rows, *features = gate.shape
        between = output.ndim - len(features) - 1
        # Under the loss's own vmap over examples, each has a leading axis of 1, and gates of its own: not of all rows.
        allowed = (rows,) if self.apart else (1, rows)
        if between < 0 or output.shape[0] not in allowed:
            fix = (
                "Give the layer inputs with the batch's examples along their leading axis, not under jax.vmap (or 1), "
                "leave it out (self_tuning(layers=...)), or use one perturbation a batch (per_example=False)."
            )
            wanted = f"layer {path} to have outputs with one row for each of {rows} examples"
            raise ValueError(validate.message(wanted, f"shape {output.shape}", fix))
        return gate.reshape(rows, *(1,) * between, *features).astype(output.dtype)

    def check(self) -> None:
        """Refuse a run that took two models for one."""
        double = [root for root, how in self.roots.items() if len(how) == 2]
        if double and self.gates:
            got = f"two models whose weights are like those at {double[0]!r}, of which one's are other arrays"
            fix = "Run a model that is not tuned (a teacher, an average of weights) inside of hg.responses.untuned()."
            raise ValueError(validate.message("one model for each part of params", got, fix))

    def _held(self, inputs: Array) -> Array:
        return inputs if self.linear is None else lax.stop_gradient(inputs)

    def _scaled(self, term: Array) -> Array:
        return term if self.linear is None else self.linear.astype(term.dtype) * term


def found_in(weight: Array, bias: Array | None, features: Any, *, embedding: bool) -> Found:
    """Describe a layer."""
    of = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype)  # noqa: E731
    features = (features,) if isinstance(features, int) else tuple(features)
    inputs = jnp.shape(weight)[: jnp.ndim(weight) - len(features)]
    fan_in = math.prod(features if embedding else inputs)
    return Found(of(weight), None if bias is None else of(bias), features, fan_in)


_RUNS = threading.local()


_CONTEXT, _NUMBERS = jax.make_user_context(default_value=0), itertools.count(1)


@contextlib.contextmanager
def active(run: Run | None) -> Iterator[None]:
    """Make ``run`` the one that layers look at; None: layers run as they are.

    What the loss has jitted or checkpointed itself is traced anew in each run: a trace kept from another one has its
    gates, or none.
    """
    stack = _RUNS.__dict__.setdefault("stack", [])
    with _CONTEXT(next(_NUMBERS)):
        stack.append(run)
        try:
            yield
        finally:
            stack.pop()


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Run models inside as they are, without response: a teacher, an average of weights, a target network.

    Needed where such a model has weights of the same structure as the one that is tuned, and they are no constants.

    >>> import hypergrad as hg
    >>> with hg.responses.untuned():
    ...     pass  # teacher.apply(...)

    Reference: none; a model is found by its weights' structure where they are not the very arrays of ``params``.
    """
    with active(None):
        yield


def current() -> Run | None:
    """Return the run under way, if any."""
    stack = _RUNS.__dict__.get("stack")
    return stack[-1] if stack else None


def _along(displacement: Any, gate: Array) -> Array:
    """Return V d, checked."""
    if displacement.shape[-1] != gate.shape[0]:
        fix = "Make response parameters anew (hg.responses.init) for other hyperparameters."
        wanted = f"as many hyperparameters as the response was made for, {gate.shape[0]}"
        raise ValueError(validate.message(wanted, str(displacement.shape[-1]), fix))
    return jnp.tensordot(displacement.astype(gate.dtype), gate, 1)


def displaced_weights(params: Params, layers: dict[str, LayerResponse], displacement: Array) -> Params:
    """Return W₀ + g ⊙ W₁ and b₀ + c ⊙ b₁ for a displacement (n,) that all examples share."""
    weights = weights_by_path(params)
    moved = {}
    for path, response in layers.items():
        weight, bias = weights[path]
        moved[weight] = (response.weight, response.gate)
        if bias is not None and not isinstance(response.bias, tuple):
            moved[bias] = (response.bias, response.bias_gate)
    leaves, structure = jax.tree.flatten(params)
    for place, (direction, gate) in moved.items():
        step = _along(displacement, gate) * direction
        leaves[place] = leaves[place] + step.astype(leaves[place].dtype)
    return jax.tree.unflatten(structure, leaves)


_NAMES = ("kernel", "embedding", "bias")


def weights_by_path(params: Params) -> dict[str, tuple[int, int | None]]:
    """Return, for each layer by path, the places of its weight and bias among the leaves of ``params``."""
    found: dict[str, dict[str, int]] = {}
    for place, (keys, _) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
        words = [_word(key) for key in keys]
        if len(words) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and words[-2] in _NAMES:
            # An NNX variable, or a boxed array: its value is a level below.
            words.pop()
        found.setdefault("/".join(words[:-1]), {})[words[-1] if words else ""] = place
    result = {}
    for path, names in found.items():
        weight = names.get("kernel", names.get("embedding"))
        if weight is not None:
            result[path] = (weight, names.get("bias"))
    return result


def _word(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
