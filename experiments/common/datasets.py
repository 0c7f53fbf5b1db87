"""Data for the examples: three splits each, small enough in training that regularisation matters.

Weights are trained on ``train``, hyperparameters on ``valid``; ``test`` is read once, for the table. The seed
chooses the training images (for digits all three splits). Digits come with scikit-learn; MNIST and Fashion-MNIST
are read from ``$HYPERGRAD_DATA/mnist/*.gz`` and ``fashion_mnist/*.gz``, the original idx files.
"""

import functools
import gzip
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

NUM_CLASSES = 10
_DIGITS_TRAIN, _DIGITS_VALID = 200, 400
_IDX_TRAIN, _IDX_VALID = {"mnist": 1_000, "fashion_mnist": 2_000}, 10_000


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
      x: float32 (n, features), in [0, 1].
      y: int32 (n,).
    """

    x: jax.Array
    y: jax.Array


class Splits(NamedTuple):
    """The three parts of a data set."""

    train: Split
    valid: Split
    test: Split


def load(name: str, seed: int, train: int | None = None) -> Splits:
    """Return the splits of ``digits``, ``mnist`` or ``fashion_mnist`` for one seed, with so many training images."""
    rng = np.random.default_rng(seed)
    return _digits(train or _DIGITS_TRAIN, rng) if name == "digits" else _from_idx(name, train or _IDX_TRAIN[name], rng)


def draw(split: Split, size: int, key: jax.Array) -> Split:
    """Return ``size`` random examples, with replacement, or the whole split where it is not larger."""
    if len(split.y) <= size:
        return split
    index = jax.random.randint(key, (size,), 0, len(split.y))
    return Split(split.x[index], split.y[index])


def _digits(size: int, rng: np.random.Generator) -> Splits:
    x, y = load_digits(return_X_y=True)
    order = np.split(rng.permutation(len(y)), [size, size + _DIGITS_VALID])
    return Splits(*(_split(x[index] / 16.0, y[index]) for index in order))


def _from_idx(name: str, size: int, rng: np.random.Generator) -> Splits:
    x, y, x_test, y_test = _read(name)
    subset = rng.choice(len(y) - _IDX_VALID, size, replace=False)
    pairs = ((x[subset], y[subset]), (x[-_IDX_VALID:], y[-_IDX_VALID:]), (x_test, y_test))
    return Splits(*(_split(images / np.float32(255), labels) for images, labels in pairs))


@functools.cache
def _read(name: str) -> tuple[np.ndarray, ...]:
    root = os.environ.get("HYPERGRAD_DATA")
    files = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    paths = [Path(root or "") / name / file for file in files]
    if root is None or not all(path.exists() for path in paths):
        found = "it is not set" if root is None else f"{root} has no {name}/ with all four"
        raise SystemExit(
            f"--data {name} needs the environment variable HYPERGRAD_DATA: the folder that holds "
            f"{name}/ with {', '.join(files)}; {found}."
        )
    x, y, x_test, y_test = (_idx(path) for path in paths)
    return x.reshape(len(x), -1), y, x_test.reshape(len(x_test), -1), y_test


def _idx(path: Path) -> np.ndarray:
    """Read an idx file: 4 bytes of which the last is the rank, the sizes as big-endian int32, uint8 data."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(np.frombuffer(raw, ">i4", rank, 4))


def _split(x: np.ndarray, y: np.ndarray) -> Split:
    return Split(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))
