"""The state of one run of a model with self-tuning layers, independent of the library that the model is written in.

    y = W₀ x + b₀ + g ⊙ (W₁ x) + c ⊙ b₁,        g = V d,  c = C d

for every layer that is linear in its weights. d is the displacement of the hyperparameters, one row per example, so
that g and c hold one gate per example and output unit. A layer runs twice, with W₀ and with W₁; no weights are stored
per example.

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
from hypergrad.types import Array, Params, PyTree

__all__ = [
    "Gates",
    "LayerInfo",
    "LayerResponse",
    "Run",
    "active",
    "current",
    "describe_layer",
    "disable_self_tuning",
    "displaced_weights",
    "named_leaves",
    "pop_inputs",
    "weights_by_path",
]


class LayerResponse(NamedTuple):
    """The response parameters of one layer.

    Attributes:
      weight: W₁, of the shape of the kernel or embedding.
      bias: b₁, of the shape of the bias (the features); () for a layer without bias.
      gate: V, (n, *features).
      bias_gate: C, (n, *features); () for a layer without bias.
    """

    weight: Array
    bias: Any
    gate: Array
    bias_gate: Any


class Gates(NamedTuple):
    """A layer's response at the displacements of a batch, computed before the loss runs and not in each step of a scan.

    Attributes:
      weight: W₁.
      gate: V d, (B, *features).
      shift: (C d) ⊙ b₁, (B, *features); () for a layer without bias.
    """

    weight: Array
    gate: Array
    shift: Any


class LayerInfo(NamedTuple):
    """A layer encountered while tracing.

    Attributes:
      weight: shape and dtype of its kernel or embedding.
      bias: shape and dtype of its bias, or None.
      features: shape of the trailing axes of its outputs, which have one gate each.
      fan_in: number of inputs that one output sums over; for an embedding the number of its features.
    """

    weight: jax.ShapeDtypeStruct
    bias: jax.ShapeDtypeStruct | None
    features: tuple[int, ...]
    fan_in: int


@dataclasses.dataclass
class Run:
    """One trace of a loss: the gates to apply, and the layers and outputs encountered.

    An outermost call is a call of a module that is not inside the call of another module.

    Attributes:
      params: the weights that the loss receives; layers are located in it by their path.
      layers: response of each layer by path; None only records the layers in ``found``.
      displacement: (B, n), one row per example; None if the examples do not differ.
      linear: a scalar t ≈ 0 that multiplies all gates, and stops gradients at their inputs: for a derivative at t = 0.
      replay: outputs that replace those of the outermost calls, in order; None: no replacement.
      found: the layers encountered, by path.
      outputs: the outputs of the outermost calls.
      gates: of each layer by path, from ``layers`` and ``displacement``.
      roots: paths in ``params`` where models were located, by identity of arrays ("same") or by structure ("alike").
      trace: the JAX trace in which the loss runs.
      transformed: whether the current outermost call is inside a JAX transformation that the loss applies.
      depth: nesting depth of the current module call.
      prefix: path in ``params`` of the weights of the current outermost module; None: they are not in ``params``.
    """

    params: Params
    layers: dict[str, LayerResponse] | None
    displacement: Array | None = None
    linear: Array | None = None
    replay: list[Any] | None = None
    found: dict[str, LayerInfo] = dataclasses.field(default_factory=dict)
    outputs: list[Any] = dataclasses.field(default_factory=list)
    gates: dict[str, Gates] = dataclasses.field(init=False)
    roots: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    trace: Any = None
    transformed: bool = False
    depth: int = 0
    prefix: str | None = ""

    def __post_init__(self) -> None:
        """Compute the gates of all layers."""
        self.trace, self.gates = tracers.current_trace(), {}
        if self.layers is not None and self.displacement is not None:
            for path, layer in self.layers.items():
                gate, shift = _gates(self.displacement, layer.gate), ()
                if not isinstance(layer.bias, tuple):
                    shift = _gates(self.displacement, layer.bias_gate) * layer.bias[None]
                self.gates[path] = Gates(layer.weight, gate, shift)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Count a call of a module."""
        if self.depth == 0:
            self.transformed = tracers.current_trace() != self.trace
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def record_output(self, output: Any) -> Any:
        """Record the output of an outermost call; return the output to use instead."""
        if self.transformed and (self.linear is not None or self.replay is not None):
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

    def record_layer(self, path: str, layer: LayerInfo) -> Gates | None:
        """Record a layer; return its gates, or None if there is nothing to add."""
        self.found[path] = layer
        return self.gates.get(path)

    def add(self, path: str, output: Array, inputs: Array, gates: Gates, product: Callable[..., Array]) -> Array:
        """Return the layer's output plus its response; ``product(weight, inputs)`` is the layer without bias.

        For a derivative at t = 0, gradients stop at the inputs of W₁: their own displacement contributes to second
        order in t.
        """
        gate = self._per_output(path, gates.gate, output)
        total = output + self._scaled(gate * product(gates.weight, self._stopped(inputs)))
        if isinstance(gates.shift, tuple):
            return total
        return total + self._scaled(self._per_output(path, gates.shift, output))

    def add_transposed(
        self, path: str, output: Array, inputs: Array, gates: Gates, product: Callable[..., Array]
    ) -> Array:
        """Do the same for a product with the transposed embedding, where the gates multiply the inputs."""
        inputs = self._stopped(inputs)
        return output + self._scaled(product(gates.weight, self._per_output(path, gates.gate, inputs) * inputs))

    def check(self) -> None:
        """Refuse a run in which two models were located at the same weights."""
        double = [root for root, how in self.roots.items() if len(how) == 2]
        if double and self.gates:
            got = f"two models with weights like those at {double[0]!r}, one of them with other arrays"
            fix = "Run a model that is not tuned (a teacher, say) inside of hg.responses.disable_self_tuning()."
            raise ValueError(validate.message("one model for each part of params", got, fix))

    def _per_output(self, path: str, gate: Array, output: Array) -> Array:
        """Reshape a gate (B, *features) to (B, 1, …, 1, *features), to multiply an output (B, …, *features)."""
        rows, *features = gate.shape
        between = output.ndim - len(features) - 1
        # If the loss itself applies vmap over examples, every example has a leading axis of 1 and would get all rows.
        allowed = (rows,) if self.transformed else (1, rows)
        if between < 0 or output.shape[0] not in allowed:
            fix = (
                "Give the layer inputs with the batch's examples along their leading axis (or 1), not under jax.vmap, "
                "leave it out (self_tuning(layers=...)), or use one perturbation per batch (per_example=False)."
            )
            wanted = f"layer {path} to have outputs with one row for each of {rows} examples"
            raise ValueError(validate.message(wanted, f"shape {output.shape}", fix))
        return gate.reshape(rows, *(1,) * between, *features).astype(output.dtype)

    def _stopped(self, inputs: Array) -> Array:
        return inputs if self.linear is None else lax.stop_gradient(inputs)

    def _scaled(self, term: Array) -> Array:
        return term if self.linear is None else self.linear.astype(term.dtype) * term


def describe_layer(weight: Array, bias: Array | None, features: Any, *, embedding: bool) -> LayerInfo:
    """Return the description of a layer."""
    of = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype)  # noqa: E731
    features = (features,) if isinstance(features, int) else tuple(features)
    inputs = jnp.shape(weight)[: jnp.ndim(weight) - len(features)]
    fan_in = math.prod(features if embedding else inputs)
    return LayerInfo(of(weight), None if bias is None else of(bias), features, fan_in)


def pop_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return a layer's positional arguments; take its inputs out of the keywords if they are passed that way."""
    return args or tuple(kwargs.pop(name) for name in ("inputs", "query") if name in kwargs)


_RUNS = threading.local()
_CONTEXT, _NUMBERS = jax.make_user_context(default_value=0), itertools.count(1)


@contextlib.contextmanager
def active(run: Run | None) -> Iterator[None]:
    """Make ``run`` the one that layers look up; with None, layers run unchanged.

    The number in the JAX context makes functions that the loss itself jits or checkpoints trace again in each run: the
    cached trace of another run has the gates of that run, or none.
    """
    stack = _RUNS.__dict__.setdefault("stack", [])
    with _CONTEXT(next(_NUMBERS)):
        stack.append(run)
        try:
            yield
        finally:
            stack.pop()


@contextlib.contextmanager
def disable_self_tuning() -> Iterator[None]:
    """Run the models called inside without response: a teacher, an average of weights, a target network.

    Needed if such a model has weights of the same structure as the one that is tuned, and they are not constants.

    >>> import hypergrad as hg
    >>> with hg.responses.disable_self_tuning():
    ...     pass  # teacher.apply(...)

    Reference: none; a model whose weights are not the arrays of ``params`` themselves is located by its structure.
    """
    with active(None):
        yield


def current() -> Run | None:
    """Return the active run, if any."""
    stack = _RUNS.__dict__.get("stack")
    return stack[-1] if stack else None


def _gates(displacement: Array, gate: Array) -> Array:
    return jnp.tensordot(displacement.astype(gate.dtype), gate, 1)


def displaced_weights(params: Params, layers: dict[str, LayerResponse], displacement: Array | None) -> Params:
    """Return W₀ + g ⊙ W₁ and b₀ + c ⊙ b₁ for a displacement (n,) that all examples share; None: no displacement."""
    if displacement is None:
        return params
    places = weights_by_path(params)
    leaves, structure = jax.tree.flatten(params)
    for path, response in layers.items():
        weight, bias = places[path]
        moved = [(weight, response.weight, response.gate)]
        if bias is not None and not isinstance(response.bias, tuple):
            moved.append((bias, response.bias, response.bias_gate))
        for place, direction, gate in moved:
            step = jnp.broadcast_to(_gates(displacement, gate), direction.shape) * direction
            leaves[place] = leaves[place] + step.astype(leaves[place].dtype)
    return jax.tree.unflatten(structure, leaves)


def weights_by_path(params: Params) -> dict[str, tuple[int, int | None]]:
    """Return, for each layer by path, the indices of its weight and bias among the leaves of ``params``."""
    found: dict[str, dict[str, int]] = {}
    for place, (path, _) in enumerate(named_leaves(params)):
        found.setdefault("/".join(path[:-1]), {})["".join(path[-1:])] = place
    weights = {path: names.get("kernel", names.get("embedding")) for path, names in found.items()}
    return {path: (place, found[path].get("bias")) for path, place in weights.items() if place is not None}


def named_leaves(tree: PyTree) -> list[tuple[tuple[str, ...], Any]]:
    """Return the leaves with their paths; an NNX variable or a boxed array counts as a leaf itself."""
    found = []
    for keys, leaf in jax.tree.leaves_with_path(tree):
        path = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys]
        inside = len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey)
        path = path[:-1] if inside and path[-2] in ("kernel", "embedding", "bias") else path
        found.append((tuple(path), leaf))
    return found
