"""Self-tuning networks: layers of an unmodified Flax model that learn how their outputs answer to the hyperparameters.

    y = W₀ x + b₀ + (V h̃) ⊙ (W₁ x) + (C h̃) ⊙ b₁        one row h̃ an example, two matrix products a layer

    STN      h̃ = λ + σε                                   one loss trains everything
    Δ-STN    h̃ = σε, the displacement from λ              W₀, b₀ ← SGD on L(net(x; 0); λ)
                                                          W₁, b₁, V, C ← SGD on L(o + ȯ; λ + σε)

with (o, ȯ) the outputs and their derivative along σε (one JVP): centred, so that ``params`` are the weights to deploy,
and linear in the response, so that its noise does not reach the weights.

Reference: MacKay et al., Self-tuning networks, arXiv 1903.03088; Bae & Grosse, Delta-STN, arXiv 2010.13514.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hypergrad import validate
from hypergrad.problem import BilevelProblem, ResponseSpec, check_problem, refuse_response
from hypergrad.responses._base import flat, marks_of
from hypergrad.responses.layers import Found, LayerResponse, Run, displaced_weights, intercepted, weights_by_path
from hypergrad.types import Array, Batch, Hyperparams, Loss, ModelState, Params, PyTree


class CenteredParams(NamedTuple):
    """What a centred self-tuning network (Δ-STN) learns.

    Attributes:
      params: W₀, b₀ and all other weights of the model: those at the current hyperparameters.
      layers: W₁, b₁, V, C of each self-tuning layer, by its path in ``params``.
    """

    params: Params
    layers: dict[str, LayerResponse]

    def weights_at(self, _hyperparams: Hyperparams, /) -> Params:
        """Return ``params``: the response is zero at the centre."""
        return self.params


class UncenteredParams(NamedTuple):
    """What an uncentred self-tuning network (STN) learns.

    Attributes:
      params: W₀, b₀ and all other weights of the model: those at λ = 0.
      layers: W₁, b₁, V, C of each self-tuning layer, by its path in ``params``.
    """

    params: Params
    layers: dict[str, LayerResponse]

    def weights_at(self, hyperparams: Hyperparams, /) -> Params:
        """Return W₀ + (V λ) ⊙ W₁, and the other weights."""
        return displaced_weights(self.params, self.layers, flat(hyperparams))


class SelfTuningForm(NamedTuple):
    """Which self-tuning network.

    Attributes:
      centered: h̃ is the displacement from the current hyperparameters.
      linearized: the response is trained on outputs that are linear in it.
      gate_std: standard deviation of V and C at first; 0 only for a centred form.
    """

    centered: bool
    linearized: bool
    gate_std: float


def delta_stn(*, linearized: bool = True) -> SelfTuningForm:
    """Return the form of Δ-STN: centred, V = 0 at first and, unless told otherwise, linearised.

    An inner step costs about 2.5 plain ones for an MLP, more where elementwise work weighs as much as products; about 2
    without the linearisation (response and weights are then trained by one loss). Give the response its own optimizer:
    it starts from zero, and learns slowly at the weights' rate.

    >>> delta_stn().centered
    True

    Reference: Bae & Grosse, arXiv 2010.13514.
    """
    validate.flag("linearized", linearized)
    return SelfTuningForm(centered=True, linearized=linearized, gate_std=0.0)


def stn(*, gate_std: float = 0.01) -> SelfTuningForm:
    """Return the form of the classical STN: uncentred, V ~ N(0, gate_std²) at first. About 2 plain steps.

    >>> stn().centered
    False

    Reference: MacKay et al., arXiv 1903.03088.
    """
    validate.number("gate_std", gate_std, low=0.0, strict=True)
    return SelfTuningForm(centered=False, linearized=False, gate_std=gate_std)


def self_tuning(
    problem: BilevelProblem,
    *,
    form: SelfTuningForm | None = None,
    per_example: PyTree = True,
    layers: Callable[[str], bool] | None = None,
) -> BilevelProblem:
    """Return the problem in which layers of the losses' own Flax model learn a response to the hyperparameters.

    y = W₀ x + b₀ + (V h̃) ⊙ (W₁ x) + (C h̃) ⊙ b₁ for each ``Dense``, ``DenseGeneral``, ``Conv``, ``Embed`` and cell of a
    recurrent network; nothing in the model or the losses changes for Linen. An NNX model goes through ``self_tunable``
    first. The inner variable is what ``hg.responses.init(problem, key, params, hyperparams, batch)`` returns.

    Args:
      problem: reparameterized before if at all; its losses run a model with weights ``params``, or a part of them.
      form: ``delta_stn()`` (None) or ``stn()``.
      per_example: tree prefix of bools over the hyperparameters. True: one perturbation an example, and both losses
        always get that hyperparameter with a leading batch axis (a rate of shape () arrives as (B,)). False: one a
        batch; for what acts on weights, as decays do: the loss gets weights with that part of the response in them.
      layers: ``layers(path) -> bool``, which layers are to respond, e.g. ``lambda path: path != "head"``; None: all.

    Returns:
      A ``BilevelProblem`` for ``hg.direct``; without ``perturbed`` around it nothing trains the response.

    Raises:
      TypeError: an argument of the wrong kind.
      ValueError: a problem that has a response; from ``init`` and the losses: no layer found, a layer whose outputs do
        not have the examples along their leading axis, weights of a layer that differ from what it runs with (as under
        ``nn.scan`` over layers), a batch whose arrays differ in their leading axis.

    Right where the best response is close to a gate an output unit near λ, and where each example's loss depends on its
    own hyperparameters alone (batch statistics mix examples: of second order in σ). A penalty on weights sees those at
    the centre: mark its hyperparameters False in ``per_example``. Call the model on the batch, not under ``jax.vmap``
    over examples. The linearised form further needs that call outside of all transformations, and is trained on what
    the model returns: not on what it sows (return activations to penalise them). The value is the weights' loss; of the
    response only the gradient is added. Models are found by the very arrays of ``params``, changed ones (cast, dropped)
    by their structure: run a second model of equal structure under ``untuned()``.

    >>> import flax.linen as nn, hypergrad as hg, jax, jax.numpy as jnp
    >>> model, x = nn.Dense(2), jnp.ones((4, 3))
    >>> loss = lambda w, h, x, key: (h * jnp.sum(model.apply({"params": w}, x) ** 2, 1)).mean()
    >>> problem = hg.responses.perturbed(self_tuning(hg.BilevelProblem(loss, loss)), scale=0.5)
    >>> params, h = model.init(jax.random.key(0), x)["params"], jnp.array(0.1)
    >>> hg.responses.init(problem, 0, params, h, x).layers[""].gate.shape
    (1, 2)

    Reference: MacKay et al., arXiv 1903.03088; Bae & Grosse, arXiv 2010.13514.
    """
    check_problem(problem)
    refuse_response("self_tuning", problem)
    form = delta_stn() if form is None else form
    if not isinstance(form, SelfTuningForm):
        fix = "Pass hg.responses.delta_stn() or hg.responses.stn()."
        raise TypeError(validate.message("form to be a SelfTuningForm", validate.describe(form), fix))
    for mark in jax.tree.leaves(per_example, is_leaf=lambda x: x is None):
        validate.flag("per_example", mark)
    kind = CenteredParams if form.centered else UncenteredParams
    extended = bool(problem.has_aux or problem.stateful)

    def widened(loss: Loss) -> Loss:
        """Hand hyperparameters with a leading batch axis to ``loss``, where the user asked for that."""

        def plain(params: Params, hyperparams: Hyperparams, batch: Batch, key: Any, *state: ModelState) -> Any:
            return loss(params, _per_example(per_example, hyperparams, batch), batch, key, *state)

        return plain

    def gated(loss: Loss, center: Hyperparams) -> Loss:
        """Run ``loss`` at hyperparameters that have their leading axes."""

        def of_response(response_params: PyTree, hyperparams: Hyperparams, *rest: Any) -> Any:
            params, own = _checked(response_params, kind)
            rows, shared = _displacement(form, per_example, hyperparams, center)
            at = params if shared is None else displaced_weights(params, own, shared)
            return _run(loss, Run(at, own, rows), hyperparams, *rest)

        return of_response

    def weights(response_params: PyTree, hyperparams: Hyperparams) -> Params:
        params, own = _checked(response_params, kind)
        moved = flat(hyperparams) - (flat(lax.stop_gradient(hyperparams)) if form.centered else 0.0)
        return displaced_weights(params, own, moved)

    def unperturbed(loss: Loss) -> Loss:
        """Run ``loss`` at the weights of the current hyperparameters: no layer need run twice."""

        def of_response(response_params: PyTree, hyperparams: Hyperparams, *rest: Any) -> Any:
            return widened(loss)(weights(response_params, hyperparams), hyperparams, *rest)

        return of_response

    def linearized(center: Hyperparams) -> Loss:
        loss = problem.inner_loss

        def of_response(response_params: PyTree, hyperparams: Hyperparams, *rest: Any) -> Any:
            params, own = _checked(response_params, kind)
            result = widened(loss)(params, center, *rest)
            held = lax.stop_gradient(params)
            rows, shared = _displacement(form, per_example, hyperparams, center)

            def outputs(t: Array) -> list[Any]:
                here = held if shared is None else displaced_weights(held, own, t * shared)
                run = Run(here, own, rows, linear=t)
                _run(loss, run, hyperparams, *rest)
                return run.outputs

            start = jnp.zeros((), flat(center).dtype)
            at, slope = jax.jvp(outputs, (start,), (jnp.ones_like(start),))
            if not at:
                fix = "Call the model's own apply in the inner loss, or use delta_stn(linearized=False)."
                raise ValueError(validate.message("an inner loss that runs a Flax model", "no call of one", fix))
            replay = [jax.tree.map(_moved, o, do) for o, do in zip(at, slope, strict=True)]
            there = held if shared is None else displaced_weights(held, own, shared)
            second = _run(loss, Run(there, own, replay=replay), hyperparams, *rest)
            response_loss = second[0] if extended else second
            # Its gradient alone: the value stays the loss that trains the weights.
            change = response_loss - lax.stop_gradient(response_loss)
            return (result[0] + change, *result[1:]) if extended else result + change

        return of_response

    def start(key: Array | None, params: Params, hyperparams: Hyperparams, batch: Batch, state: ModelState) -> Any:
        found = _find(problem, widened(problem.inner_loss), params, hyperparams, batch, state)
        chosen = {path: layer for path, layer in found.items() if layers is None or layers(path)}
        if not chosen:
            fix = "Layers are nn.Dense, DenseGeneral, Conv, Embed and recurrent cells; NNX models need self_tunable."
            got = f"{', '.join(found) or 'none'}, of which layers() chose none" if found else "none"
            raise ValueError(validate.message("an inner loss that runs layers that can be tuned", got, fix))
        dtypes = _check_weights(params, chosen)
        size = int(flat(hyperparams).size)
        keys = jax.random.split(validate.required_key(key), len(chosen))
        own = {
            path: _start(k, layer, dtypes[path], size, form.gate_std)
            for k, (path, layer) in zip(keys, chosen.items(), strict=True)
        }
        return kind(jax.tree.map(jnp.copy, params), own)

    def losses_at(center: Hyperparams) -> tuple[Loss, Loss]:
        inner = linearized(center) if form.linearized else gated(problem.inner_loss, center)
        return inner, gated(problem.outer_loss, center)

    view = ResponseSpec(
        init=start,
        weights=weights,
        losses_at=losses_at,
        base_problem=dataclasses.replace(
            problem, inner_loss=widened(problem.inner_loss), outer_loss=widened(problem.outer_loss)
        ),
        per_example=per_example,
    )
    losses = {"inner_loss": unperturbed(problem.inner_loss), "outer_loss": unperturbed(problem.outer_loss)}
    return dataclasses.replace(problem, **losses, response=view)  # type: ignore[arg-type]


def _run(loss: Loss, run: Run, hyperparams: Hyperparams, *rest: Any) -> Any:
    with intercepted(run):
        return loss(run.params, hyperparams, *rest)


def _moved(output: Any, slope: Any) -> Any:
    return output + slope if jnp.issubdtype(jnp.asarray(output).dtype, jnp.inexact) else output


def _checked(response_params: Any, kind: type) -> Any:
    if not isinstance(response_params, kind):
        fix = "Start from hg.responses.init(problem, key, params, hyperparams, batch)."
        raise TypeError(validate.message(f"self-tuning params ({kind.__name__})", type(response_params).__name__, fix))
    return response_params


def _per_example(per_example: PyTree, hyperparams: Hyperparams, batch: Batch) -> Hyperparams:
    """Give the marked hyperparameters a leading batch axis."""
    if not any(jax.tree.leaves(per_example)):
        return hyperparams
    size = validate.batch_size(batch)

    def spread(mark: bool, h: Array) -> Array:
        return jnp.broadcast_to(h, (size, *jnp.shape(h))) if mark else h

    return jax.tree.map(spread, marks_of(per_example, hyperparams), hyperparams)


def _displacement(
    form: SelfTuningForm, per_example: PyTree, hyperparams: Hyperparams, center: Hyperparams
) -> tuple[Array | None, Array | None]:
    """Return h̃ in two parts: a row an example (B, n) or None, and what all examples share (n,) or None."""
    marks = jax.tree.leaves(marks_of(per_example, center))
    rows: list[Array] = []
    shared: list[Array] = []
    sizes = {jnp.shape(h)[0] for h, mark in zip(jax.tree.leaves(hyperparams), marks, strict=True) if mark}
    count = sizes.pop() if sizes else 1
    for h, c, mark in zip(jax.tree.leaves(hyperparams), jax.tree.leaves(center), marks, strict=True):
        moved = jnp.asarray(h, flat(center).dtype) - (c if form.centered else 0.0)
        size = jnp.size(c)
        rows.append(moved.reshape(count, size) if mark else jnp.zeros((count, size), moved.dtype))
        shared.append(jnp.zeros(size, moved.dtype) if mark else moved.reshape(size))
    return (
        jnp.concatenate(rows, 1) if any(marks) else None,
        None if all(marks) else jnp.concatenate(shared),
    )


def _find(
    problem: BilevelProblem, loss: Loss, params: Params, hyperparams: Hyperparams, batch: Batch, state: ModelState
) -> dict[str, Found]:
    """Return the layers that the inner loss runs, by path, without computing anything."""
    if batch is None:
        fix = "Pass a training batch: hg.responses.init(problem, key, params, hyperparams, batch)."
        raise ValueError(validate.message("a batch, to look for layers with", "None", fix))
    found: dict[str, Found] = {}

    def look(params: Params, hyperparams: Hyperparams, batch: Batch, state: ModelState, key: Array) -> Any:
        run = Run(params, None)
        result = _run(loss, run, hyperparams, batch, key, *([state] if problem.stateful else []))
        found.update(run.found)
        return result

    jax.eval_shape(look, params, hyperparams, batch, state, jax.random.key(0))
    return found


def _check_weights(params: Params, layers: dict[str, Found]) -> dict[str, Any]:
    """Return the dtype of each layer's weights in ``params``, which need be those that it runs with."""
    leaves, places, dtypes = jax.tree.leaves(params), weights_by_path(params), {}
    for path, layer in layers.items():
        shape = jnp.shape(leaves[places[path][0]]) if path in places else None
        if shape != layer.weight.shape or (layer.bias is not None and layer.bias.shape != layer.features):
            got = f"{'no such array' if shape is None else f'shape {shape}'} in params"
            fix = "Layers under nn.scan or nn.vmap over weights cannot respond: leave them out with layers=..."
            raise ValueError(validate.message(f"layer {path} to run with weights {layer.weight.shape}", got, fix))
        dtypes[path] = jnp.asarray(leaves[places[path][0]]).dtype
    return dtypes


def _start(key: Array, layer: Found, dtype: Any, size: int, gate_std: float) -> LayerResponse:
    weight_key, bias_key, *gate_keys = jax.random.split(key, 4)
    std = 1.0 / math.sqrt(max(layer.fan_in, 1))
    gates = [gate_std * jax.random.normal(k, (size, *layer.features), dtype) for k in gate_keys]
    weight = std * jax.random.normal(weight_key, layer.weight.shape, dtype)
    if layer.bias is None:
        return LayerResponse(weight, (), gates[0], ())
    return LayerResponse(weight, std * jax.random.normal(bias_key, layer.bias.shape, dtype), *gates)
