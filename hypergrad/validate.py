"""Checks at construction or while tracing. Each message says what was expected, what came, and what to do.

They look at types, structures, shapes and dtypes only, and so cost nothing in a compiled step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad import tree
from hypergrad.types import Array, Key, PyTree

__all__ = [
    "as_key",
    "batch_size",
    "by_prefix",
    "describe",
    "flag",
    "floating_leaves",
    "message",
    "number",
    "positive_int",
    "required_key",
    "same_structure",
    "scalar_loss",
    "transformation",
    "unroll",
]


def message(expected: str, got: str, fix: str) -> str:
    """Return the one form that every refusal has."""
    return f"expected {expected}; got {got}. {fix}"


def describe(value: Any) -> str:
    """Name a value's kind for a message: type, dtype and shape of an array, and of others a repr of one line."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"{type(value).__name__} of dtype {value.dtype} and shape {value.shape}"
    text = repr(value)
    return type(value).__name__ if "\n" in text else f"{type(value).__name__} ({text:.80})"


def positive_int(name: str, value: Any) -> int:
    """Return ``value`` if it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(message(f"{name} to be a Python int of at least 1", describe(value), "Pass an int."))
    if value < 1:
        raise ValueError(message(f"{name} to be at least 1", str(value), f"Pass {name}=1 or more."))
    return int(value)


def unroll(value: Any) -> None:
    """Refuse anything but True or an integer of at least 1 as ``unroll`` of a scan."""
    if value is not True:
        positive_int("unroll", value)


def flag(name: str, value: Any) -> None:
    """Refuse anything but True or False."""
    if not isinstance(value, bool):
        raise TypeError(message(f"{name} to be a bool", describe(value), "Pass True or False."))


def number(name: str, value: Any, *, low: float, strict: bool = False) -> None:
    """Refuse a concrete number below ``low`` (or at it, if ``strict``) or not finite; a traced one passes."""
    if tree.is_traced(value):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | jax.Array | np.ndarray):
        raise TypeError(message(f"{name} to be a number", describe(value), "Pass a float."))
    if jnp.ndim(value) != 0:
        raise ValueError(message(f"{name} to be one number", describe(value), "Pass a scalar."))
    inside = float(value) > low if strict else float(value) >= low
    if not (inside and np.isfinite(float(value))):
        bound = f"finite and {'>' if strict else '>='} {low:g}"
        raise ValueError(message(f"{name} to be {bound}", f"{float(value):g}", f"Choose {name} {bound}."))


def floating_leaves(what: str, value: PyTree) -> None:
    """Refuse a tree without leaves, or with a leaf that is not a real floating-point array."""
    if not jax.tree.leaves(value):
        raise ValueError(message(f"{what} with at least one array", "an empty tree", "Pass at least one leaf."))
    for leaf, label in zip(jax.tree.leaves(value), tree.labels(what, value), strict=True):
        if not isinstance(leaf, int | float | complex | jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            fix = "Keep functions and static fields out of it (Equinox: eqx.partition(model, eqx.is_inexact_array))."
            raise TypeError(message(f"{label} to be an array", describe(leaf), fix))
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            fix = "It has no gradient: cast it to a float dtype, or pass it to the loss in another way (model_state)."
            raise TypeError(message(f"{label} of a floating dtype", str(jnp.result_type(leaf)), fix))


def same_structure(
    what: str, value: PyTree, like_what: str, like: PyTree, *, dtypes: bool = False, fix: str = ""
) -> None:
    """Refuse ``value`` unless its structure and shapes (and ``dtypes``) are those of ``like``.

    The message names the first leaf that differs, with both sides.
    """
    fix = fix or f"Build {what} with the structure of {like_what}."
    want, got = (dict(zip(tree.labels(what, x), jax.tree.leaves(x), strict=True)) for x in (like, value))
    for label in [*want, *got]:
        sides = [_form(side[label], dtypes=dtypes) if label in side else "no such leaf" for side in (want, got)]
        if label not in want or label not in got:
            raise ValueError(message(f"{what} with the structure of {like_what}, {label}: {sides[0]}", sides[1], fix))
        if sides[0] != sides[1]:
            raise ValueError(message(f"{label} of {sides[0]}", sides[1], fix))
    structures = [str(jax.tree.structure(x)) for x in (like, value)]
    if structures[0] != structures[1]:
        texts = [text if len(text) <= 300 else f"{text[:300]}…" for text in structures]
        raise ValueError(message(f"{what} with the structure of {like_what}, {texts[0]}", texts[1], fix))


def _form(leaf: Any, *, dtypes: bool) -> str:
    return f"shape {jnp.shape(leaf)}" + (f" and dtype {jnp.result_type(leaf)}" if dtypes else "")


def by_prefix(
    name: str, what: str, params: PyTree, coefficients: PyTree, *, of: str = "params"
) -> list[tuple[str, Any, Any]]:
    """Return (path, weight, coefficient) for every weight, each coefficient spread over the subtree below it.

    Refuses coefficients that are no numbers, no tree prefix of ``params``, or that do not broadcast to their weight.
    """
    for leaf in jax.tree.leaves(coefficients):
        if not isinstance(leaf, int | float | jax.Array | np.ndarray | np.generic):
            raise TypeError(f"{name}: " + message(f"{what} to be numbers or arrays", describe(leaf), "Pass a float."))
    try:
        spread = jax.tree.broadcast(coefficients, params)
    except (ValueError, TypeError) as error:
        wanted = f"{what} to be a tree prefix of {of}"
        fix = f"Use one number, or the structure of {of} with numbers or arrays in place of subtrees."
        got = f"{jax.tree.structure(coefficients)} for {jax.tree.structure(params)}"
        raise ValueError(f"{name}: " + message(wanted, got, fix)) from error
    leaves = jax.tree.leaves(params)
    found = list(zip(tree.leaf_names(params), leaves, jax.tree.leaves(spread), strict=True))
    for path, weight, coefficient in found:
        shape, own = jnp.shape(weight), jnp.shape(coefficient)
        if len(own) > len(shape) or any(a not in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False)):
            fix = "Pass one number, or an array of that shape. One value per example cannot act on weights."
            wanted = f"{what} for {path or of} that broadcast to its shape {shape}"
            raise ValueError(f"{name}: " + message(wanted, f"shape {own}", fix))
    return found


def batch_size(batch: PyTree) -> int:
    """Return the leading axis that all arrays of a batch share."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        fix = (
            "Give all arrays of the batch a common leading axis, or use one perturbation per batch (per_example=False)."
        )
        raise ValueError(message("a batch whose arrays share their leading axis of examples", f"{sorted(sizes)}", fix))
    return int(sizes.pop()[0])


def scalar_loss(name: str, value: Any, fix: str) -> Array:
    """Return the loss value if it is one real floating-point number."""
    if not isinstance(value, int | float | jax.Array | np.ndarray | np.generic):
        raise TypeError(message(f"{name} to return a scalar", describe(value), fix))
    if jnp.shape(value) != ():
        raise ValueError(
            message(f"{name} to return a scalar", f"shape {jnp.shape(value)}", "Reduce it, e.g. with jnp.mean.")
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(message(f"{name} to return a float", str(jnp.result_type(value)), "Cast it to float32."))
    return jnp.asarray(value)


def as_key(key: Key) -> Array | None:
    """Return a typed key from a typed key, an integer seed, or raw uint32 key data; None stays None."""
    if key is None:
        return None
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape != ():
            raise ValueError(message("one random key", f"keys of shape {key.shape}", "Pass a single key."))
        return key
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        try:
            return jax.random.key(int(key))
        except OverflowError as error:
            fix = "Pass a smaller seed."
            raise ValueError(message("key to fit into a signed 64-bit integer", str(key), fix)) from error
    if isinstance(key, jax.Array | np.ndarray):
        if (
            key.dtype == jnp.uint32
            and key.shape == jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
        ):
            return jax.random.wrap_key_data(jnp.asarray(key))
        if jnp.issubdtype(key.dtype, jnp.integer) and key.ndim == 0:
            return jax.random.key(key)
    raise TypeError(message("key to be an int or a jax.random.key", describe(key), "Pass jax.random.key(seed)."))


def required_key(key: Key) -> Array:
    """Return a typed key as ``as_key`` does; None is refused."""
    found = as_key(key)
    if found is None:
        raise TypeError(message("key to be an int or a jax.random.key", "None", "Pass jax.random.key(seed)."))
    return found


def transformation(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """Return an optax transformation that takes (and drops, where it knows none) extra keywords."""
    if isinstance(value, optax.MultiSteps):
        value = value.gradient_transformation()
    if not isinstance(value, optax.GradientTransformation):
        fix = "Pass an optax optimizer, e.g. optax.adam(1e-3)."
        raise TypeError(message(f"{name} to be an optax.GradientTransformation", describe(value), fix))
    return optax.with_extra_args_support(value)
