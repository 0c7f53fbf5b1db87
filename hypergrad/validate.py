"""Checks made once, at construction or while tracing: each says expected, got, and what to do.

Most look at structures, shapes and dtypes only and so cost nothing in a compiled step. The one that
traces is ``independent_leaves``: it follows data through a jaxpr to find outputs that cannot depend on
an input, which is how a hypergradient that is zero by construction is refused instead of returned.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad import tree
from hypergrad.types import Array, Key, PyTree


def message(expected: str, got: str, fix: str) -> str:
    """Return the one form that every refusal has."""
    return f"expected {expected}; got {got}. {fix}"


def describe(value: Any) -> str:
    """Name a value's kind for a message: type, and dtype and shape where it is an array."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"{type(value).__name__} of dtype {value.dtype} and shape {value.shape}"
    return f"{type(value).__name__} ({value!r:.80})"


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
    if isinstance(value, jax.core.Tracer):
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
    leaves, names = jax.tree.leaves(value), tree.leaf_names(value)
    if not leaves:
        raise ValueError(message(f"{what} with at least one array", "an empty tree", "Pass at least one leaf."))
    for leaf, name in zip(leaves, names, strict=True):
        if not isinstance(leaf, int | float | complex | jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(
                message(f"{what} leaf {name} to be an array", describe(leaf), "Pass a pytree of arrays only.")
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            fix = "Integers, booleans and complex numbers have no gradient here: cast the leaf to a float dtype."
            raise TypeError(message(f"{what} leaf {name} of a floating dtype", str(jnp.result_type(leaf)), fix))


def same_structure(what: str, value: PyTree, like_what: str, like: PyTree) -> None:
    """Refuse ``value`` unless its structure and shapes are those of ``like``; names the first leaf that differs."""
    got: Any = jax.tree.structure(value)
    want: Any = jax.tree.structure(like)
    fix = f"Build {what} with the structure of {like_what}."
    if got != want:
        names, like_names = tree.leaf_names(value), tree.leaf_names(like)
        odd = [n for n in names if n not in like_names] + [n for n in like_names if n not in names]
        where = f" (first difference at leaf {odd[0]})" if odd else ""
        raise ValueError(message(f"{what} with the structure of {like_what}, {want}", f"{got}{where}", fix))
    for name, a, b in zip(tree.leaf_names(like), jax.tree.leaves(value), jax.tree.leaves(like), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(message(f"{what} leaf {name} of shape {jnp.shape(b)}", f"shape {jnp.shape(a)}", fix))


def by_prefix(
    name: str, what: str, params: PyTree, coefficients: PyTree, *, of: str = "params"
) -> list[tuple[str, Any, Any]]:
    """Return (path, weight, coefficient) for every weight, each coefficient spread over the subtree below it.

    Refuses coefficients that are no tree prefix of ``params``, or that do not broadcast to their weight's shape.
    """
    try:
        spread = jax.tree.map(lambda c, sub: jax.tree.map(lambda _: c, sub), coefficients, params)
    except (ValueError, TypeError) as error:
        wanted = f"{what} to be a tree prefix of {of}"
        fix = f"Use one number, or the own structure of {of} with numbers or arrays in place of subtrees."
        got = f"{jax.tree.structure(coefficients)} for {jax.tree.structure(params)}"
        raise ValueError(f"{name}: " + message(wanted, got, fix)) from error
    leaves = jax.tree.leaves(params)
    found = list(zip(tree.leaf_names(params), leaves, jax.tree.leaves(spread), strict=True))
    for path, weight, coefficient in found:
        shape, own = jnp.shape(weight), jnp.shape(coefficient)
        if len(own) > len(shape) or any(a not in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False)):
            fix = "Pass one number, or an array of that shape; one value an example cannot act on weights."
            raise ValueError(
                f"{name}: " + message(f"{what} for {path} that broadcast to its shape {shape}", f"shape {own}", fix)
            )
    return found


def batch_size(batch: PyTree) -> int:
    """Return the leading axis that all arrays of a batch share."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        fix = "Give all arrays of the batch a common leading axis, or use one perturbation a batch (per_example=False)."
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
        return jax.random.key(int(key))
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
