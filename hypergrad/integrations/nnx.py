"""Flax NNX: losses of a module become a problem, and an optimizer trains the module and its hyperparameters.

    problem = hg.integrations.nnx.problem(model, train_loss, valid_loss)
    optimizer = hg.integrations.nnx.Optimizer(model, hg.bilevel(...), hyperparams)
    optimizer.update(model, grads, inner_batch=..., outer_batch=...)

Losses take (model, hyperparams, batch, key). The model that they get is a copy: they may switch it to ``eval()``, and
what a forward pass writes into it (batch statistics) is the new model state. Its random streams start from the loss's
key, so that all products of a linear solve share one dropout mask.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hypergrad import validate
from hypergrad.drivers import BilevelState, HypergradInfo, check_bilevel
from hypergrad.problem import BilevelParams, BilevelProblem
from hypergrad.types import Batch, Hyperparams, ModelState, Params, PyTree

__all__ = ["Optimizer", "model_state", "params", "problem"]


def params(model: nnx.Module, *, wrt: Any = nnx.Param) -> Params:
    """Return the weights of a module as nested dicts of arrays, the form that a problem's losses see.

    Args:
      model: an NNX module.
      wrt: filter of the variables that are trained.

    Returns:
      E.g. ``{"hidden": {"kernel": ..., "bias": ...}}``. For a penalty inside a loss: ``hg.penalties.l2(params(model),
      decay)``; for one hyperparameter per weight: ``jax.tree.map(jnp.zeros_like, params(model))``.

    >>> from flax import nnx
    >>> import hypergrad as hg
    >>> sorted(hg.integrations.nnx.params(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    ['bias', 'kernel']
    """
    return nnx.to_pure_dict(nnx.state(model, wrt))


def model_state(model: nnx.Module, *, wrt: Any = nnx.Param) -> ModelState:
    """Return what a module holds beside its weights and random streams, e.g. batch statistics, as nested dicts.

    Args:
      model: an NNX module.
      wrt: filter of the variables that are trained.

    Returns:
      Nested dicts of arrays; () where there is nothing else.

    >>> from flax import nnx
    >>> import hypergrad as hg
    >>> sorted(hg.integrations.nnx.model_state(nnx.BatchNorm(2, rngs=nnx.Rngs(0))))
    ['mean', 'var']
    """
    return nnx.to_pure_dict(_others(model, wrt)) or ()


def problem(
    model: nnx.Module,
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    *,
    wrt: Any = nnx.Param,
) -> BilevelProblem:
    """Return the problem of two losses of an NNX module.

    Args:
      model: gives the structure, its mode (``train()`` or ``eval()``) and constants; its weights are not kept.
      inner_loss: ``inner_loss(model, hyperparams, batch, key) -> scalar``. ``model`` is a copy with the weights of the
        call.
      outer_loss: the same signature. Begin it with ``model.eval()`` where the model has dropout or batch statistics.
      wrt: filter of the variables that are trained; the others are the model state.

    Returns:
      A ``BilevelProblem`` whose weights are ``params(model)``. It is stateful where the module has variables that are
      neither trained nor random streams.

    Raises:
      TypeError: no module.

    Warns where the outer loss changes the model's statistics: it then runs in training mode.

    Valid when the losses leave ``hyperparams`` and what they close over unchanged. The random streams of ``model`` are
    reseeded from ``key``, each with its own; without a key they stay those of the model given here.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    >>> def valid_loss(model, decay, batch, key):
    ...     return jnp.mean((model(batch[0]) - batch[1]) ** 2)
    >>> def train_loss(model, decay, batch, key):
    ...     return valid_loss(model, decay, batch, key) + hg.penalties.l2(hg.integrations.nnx.params(model), decay)
    >>> problem = hg.integrations.nnx.problem(model, train_loss, valid_loss)
    >>> zeros = {"kernel": jnp.zeros((3, 1)), "bias": jnp.zeros(1)}
    >>> float(problem.inner_loss(zeros, 0.1, (jnp.eye(3), jnp.ones((3, 1))), None))
    1.0
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(validate.message("an nnx.Module", validate.describe(model), "Pass the model itself."))
    graphdef, *states = nnx.split(model, wrt, nnx.RngState, ...)
    weights, streams, others = states
    stateful = bool(jax.tree.leaves(others))

    def on_weights(loss: Callable[..., Any], *, keeps: bool) -> Callable[..., Any]:
        def of_weights(params: Params, hyperparams: Hyperparams, batch: Batch, key: Any, state: ModelState = ()) -> Any:
            states = _filled(weights, params), _reseeded(streams, key), _filled(others, state or {})
            called = nnx.merge(graphdef, *states, copy=True)
            value = loss(called, hyperparams, batch, key)
            if not stateful:
                return value
            new = nnx.to_pure_dict(_others(called, wrt))
            if keeps and any(a is not b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True)):
                warnings.warn(
                    "The outer loss changes the model's statistics: it runs in training mode. Begin it with "
                    "model.eval().",
                    stacklevel=2,
                )
            return value, new

        return of_weights

    return BilevelProblem(on_weights(inner_loss, keeps=False), on_weights(outer_loss, keeps=True), stateful=stateful)


class Hyperparam(nnx.Variable[Any]):
    """An array of hyperparameters in the state of an ``Optimizer``."""


class Optimizer(nnx.Module):
    """Trains a module by ``hg.bilevel``, as ``nnx.Optimizer`` does by an optax optimizer.

    w ← tx's inner optimizer on every call, λ ← its outer optimizer where an outer step is due.

    Args:
      model: an NNX module, of which ``tx``'s problem was made by ``problem``.
      tx: what ``hg.bilevel`` returned.
      hyperparams: the hyperparameters, unconstrained.
      wrt: filter of the variables that are trained, as for ``problem``.

    Raises:
      TypeError: ``tx`` is not from ``hg.bilevel``.
      ValueError: as ``tx.init`` does.

    Works under ``nnx.jit``, ``nnx.split`` and with checkpoints of ``nnx.state(optimizer)``.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> model, x = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), jnp.eye(3)
    >>> loss = lambda model, scale, batch, key: jnp.mean((scale * model(batch) - 1.0) ** 2)
    >>> problem = hg.integrations.nnx.problem(model, loss, loss)
    >>> tx = hg.bilevel(hg.implicit(problem), inner_optimizer=optax.adam(0.1), outer_optimizer=optax.adam(0.1))
    >>> optimizer = hg.integrations.nnx.Optimizer(model, tx, jnp.array(1.0))
    >>> optimizer.update(model, inner_batch=x, outer_batch=x)
    >>> int(optimizer.info.step)
    1
    """

    def __init__(self, model: nnx.Module, tx: Any, hyperparams: Hyperparams, *, wrt: Any = nnx.Param) -> None:
        self.tx, self.wrt = tx, wrt
        variables = BilevelParams(params(model, wrt=wrt), hyperparams)
        state = check_bilevel(tx).init(variables, model_state=model_state(model, wrt=wrt))
        self.held = nnx.data(jax.tree.map(Hyperparam, hyperparams))
        self.opt_state = nnx.data(jax.tree.map(nnx.OptState, state))

    def update(
        self,
        model: nnx.Module,
        grads: Any = None,
        /,
        *,
        inner_batch: Batch,
        outer_batch: Batch = None,
        **extra: Any,
    ) -> None:
        """Update the module and the hyperparameters in place.

        Args:
          model: the module. After a forward pass that has updated its batch statistics, they are kept.
          grads: gradient of the inner loss, from ``nnx.grad``; None to have it computed from ``inner_batch``.
          inner_batch: of the inner loss.
          outer_batch: of the outer loss; may be None where no outer step is due.
          **extra: ``solve_batch=``, ``value=`` and keywords for the inner optimizer, as for ``tx.update``.

        Raises:
          ValueError, TypeError: as ``tx.update`` does.
        """
        variables = BilevelParams(params(model, wrt=self.wrt), self.hyperparams)
        if grads is not None:
            grads = nnx.to_pure_dict(nnx.state(grads, self.wrt))
        updates, state = self.tx.update(
            grads,
            self.state,
            variables,
            inner_batch=inner_batch,
            outer_batch=outer_batch,
            model_state=model_state(model, wrt=self.wrt),
            **extra,
        )
        updated: Any = optax.apply_updates(variables, updates)
        weights, hyperparams = updated
        nnx.update(model, _filled(nnx.state(model, self.wrt), weights))
        if state.model_state != ():
            nnx.update(model, _filled(_others(model, self.wrt), state.model_state))
        _write(self.held, hyperparams)
        _write(self.opt_state, state)

    @property
    def hyperparams(self) -> Hyperparams:
        """The hyperparameters, unconstrained, in the form that they were given in."""
        return _read(self.held)

    @property
    def state(self) -> BilevelState:
        """The ``BilevelState``, as arrays."""
        return _read(self.opt_state)

    @property
    def info(self) -> HypergradInfo:
        """Diagnostics of the last outer step that was due."""
        return self.state.info


def _others(model: nnx.Module, wrt: Any) -> Any:
    return nnx.state(model, nnx.Not(nnx.Any(wrt, nnx.RngState)))


def _filled(state: Any, values: Any) -> Any:
    """Return a copy of an ``nnx.State`` with other values."""
    copy = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(copy, values)
    return copy


def _reseeded(streams: Any, key: Any) -> Any:
    """Return random streams with keys from ``key``, each its own, that have drawn nothing."""
    if key is None:
        return streams
    leaves, structure = jax.tree.flatten(streams)
    fresh = []
    for place, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            own = jax.random.fold_in(key, place)
            fresh.append(own if leaf.shape == () else jax.random.split(own, leaf.shape))
        else:
            fresh.append(jnp.zeros_like(leaf))
    return jax.tree.unflatten(structure, fresh)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _read(held: PyTree) -> PyTree:
    return jax.tree.map(lambda variable: variable[...], held, is_leaf=_is_variable)


def _write(held: PyTree, values: PyTree) -> None:
    for variable, value in zip(jax.tree.leaves(held, is_leaf=_is_variable), jax.tree.leaves(values), strict=True):
        variable[...] = value
